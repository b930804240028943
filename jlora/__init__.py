"""jlora: LoRA for any JAX function. A weight may be an object that knows how it is used."""

from jlora.config import LoraConfig
from jlora.leaves import ImplicitLeaf, LoraLeaf, MaterialisedWarning
from jlora.lift import lift
from jlora.lora import LoraFactors, combine, lorafy, merge

__all__ = [
    "ImplicitLeaf",
    "LoraConfig",
    "LoraFactors",
    "LoraLeaf",
    "MaterialisedWarning",
    "combine",
    "lift",
    "lorafy",
    "merge",
]
