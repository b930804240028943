"""Models in Flax Linen, no word of LoRA in them."""
