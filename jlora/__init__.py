"""jlora: LoRA for any JAX function. A weight may be an object that knows how it is used."""

from jlora import tree
from jlora.audit import Audit, audit
from jlora.config import LoraConfig
from jlora.layouts import Layout, layouts
from jlora.leaves import ImplicitLeaf, LoraLeaf, MaterialisedWarning
from jlora.lift import lift
from jlora.lora import LoraFactors, lorafy
from jlora.merging import combine, merge
from jlora.optim import keep, only_trainable, trainable_labels, trainable_mask
from jlora.quant import QuantisedLeaf, dequantise, quantise
from jlora.summary import summary

__all__ = [
    "Audit",
    "ImplicitLeaf",
    "Layout",
    "LoraConfig",
    "LoraFactors",
    "LoraLeaf",
    "MaterialisedWarning",
    "QuantisedLeaf",
    "audit",
    "combine",
    "dequantise",
    "keep",
    "layouts",
    "lift",
    "lorafy",
    "merge",
    "only_trainable",
    "quantise",
    "summary",
    "trainable_labels",
    "trainable_mask",
    "tree",
]
