"""`jlora merge`: base and adapter as one plain model folder in Hub format."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

import jlora
from jlora.commands.settings import scheme
from jlora.data.template import template_for
from jlora.io import Pretrained, load
from jlora.io.adapters import load_adapter
from jlora.io.classes import head_for, hub_classes, read_classes
from jlora.io.save import refuse_used, save


@dataclasses.dataclass(frozen=True)
class MergeConfig:
    """Write base + adapter as one plain model in Hub format: no latency added, nothing of jlora needed to run it."""

    model: str
    """Short name, Hub id, folder in Hub format, or .gguf file."""
    adapter: str
    """Folder of the adapter."""
    output: str
    """The new folder."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the tensors written; the sum is taken in float32."""
    quantise: Literal["none", "nf4", "int8", "int4"] = "none"
    """Of the base that the adapter was trained on: merged onto what its codes stand for, written as floats."""
    shard_bytes: int = 5_000_000_000
    """Largest safetensors file."""


def read_base(model: str, adapter: str, *, quantise: str = "none", weights: bool = True) -> tuple[Pretrained, bool]:
    """(the base as the adapter's folder needs it, with its chat template, whether with a head for labels)."""
    head, template = head_for(adapter), template_for(None, adapter)
    return load(model, quantise=scheme(quantise), weights=weights, **head).speaking(template), bool(head)


def merge_command(config: MergeConfig) -> dict[str, Any]:
    """{output, tensors, bytes}. Raises ValueError where the adapter does not fit, FileExistsError for a used folder."""
    refuse_used(config.output)
    base, head = read_base(config.model, config.adapter, quantise=config.quantise)
    frozen, lora, _ = load_adapter(base, config.adapter)
    return save(
        config.output,
        base,
        jlora.merge(frozen, lora),
        dtype=jnp.dtype(config.dtype),
        shard_bytes=config.shard_bytes,
        config=hub_classes(read_classes(config.adapter), base.config.model_type) if head else {},
    )
