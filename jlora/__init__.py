"""jlora: LoRA for any JAX function. A weight may be an object that knows how it is used."""

from jlora.leaves import ImplicitLeaf, LoraLeaf, MaterialisedWarning
from jlora.lift import lift

__all__ = ["ImplicitLeaf", "LoraLeaf", "MaterialisedWarning", "lift"]
