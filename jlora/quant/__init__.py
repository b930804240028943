"""Weights in 8 and 4 bits that stand where weights stood: QLoRA is LoRA on them, and so for every other method."""

from jlora.quant.leaf import QuantisedLeaf
from jlora.quant.loftq import loftq
from jlora.quant.schemes import NF4, SCHEMES, Int4, Int8
from jlora.quant.tree import dequantise, merge_quantised, quantise

__all__ = ["NF4", "SCHEMES", "Int4", "Int8", "QuantisedLeaf", "dequantise", "loftq", "merge_quantised", "quantise"]
