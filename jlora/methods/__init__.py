"""Ways to fine-tune, one a file. Each `make(params, ..., key=) -> (frozen, trained)`; the rest is as for LoRA."""
