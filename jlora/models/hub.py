"""What a family reads of a `config.json`, and what one may not say: fields that change results, of another value."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

ACTIVATIONS = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": nn.gelu,
    "relu": nn.relu,
    "silu": nn.silu,
    "tanh": jnp.tanh,
}


def said(config: Any, hub: Mapping[str, Any]) -> dict[str, Any]:
    """Of the fields of the dataclass `config` those that a `config.json` has, null being none."""
    return {f.name: hub[f.name] for f in dataclasses.fields(config) if hub.get(f.name) is not None}


def refuse_others(hub: Mapping[str, Any], only: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for a field of a `config.json` that is not what `only` says; null stands for False and None
    alone."""
    for name, value in only.items():
        given = hub.get(name, value)
        if given != value and (given is not None or value):
            raise ValueError(f"{name} {given!r} is not supported in {where}: {value!r} is")


def check_causal(hub: Mapping[str, Any]) -> None:
    """Raises ValueError for a `config.json` that makes its decoder see what follows (transformers from 5.2 on)."""
    refuse_others(hub, {"is_causal": True}, "a decoder")


def check_activations(hub: Mapping[str, Any], *names: str) -> None:
    """Raises ValueError where a field of a `config.json` names an activation that is not in `ACTIVATIONS`."""
    for name in names:
        if hub.get(name) not in (None, *ACTIVATIONS):
            raise ValueError(f"{name} {hub[name]!r} is not supported: {', '.join(ACTIVATIONS)} are")
