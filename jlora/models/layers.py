"""A model's layers: one module over a stack of parameters or a list of modules, under rematerialisation or not."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

INPUT = "layer input"


def layer_input(x: jax.Array) -> jax.Array:
    """x, under the name that `stacked` knows it by."""
    return checkpoint_name(x, INPUT)


def stacked(block: Any, fields: tuple[Any, ...], layers: int, shared: int, scan: bool, remat: bool | str) -> Any:
    """The layers of a model, to be set as an attribute in `setup` and run by `through`.

    `shared`: how many arguments all layers get alike. scan: one module over a stack of parameters, else a list of
    them. remat: False, True (keep nothing of a layer but its input), "dots" (keep products with weights too) or
    "offload" (keep the input, as `layer_input` names it, in the host's memory). Raises ValueError for another.
    """
    kind = lifted_block(block, layers, shared, scan, remat)
    return kind(*fields) if scan else [kind(*fields) for _ in range(layers)]


@functools.cache  # Flax changes the block's class while it derives one, which another thread may be tracing
def lifted_block(block: Any, layers: int, shared: int, scan: bool, remat: bool | str) -> Any:
    """The class of a layer under remat, or of all of them under scan."""
    if remat not in (False, True, "dots", "offload"):
        raise ValueError(f"remat {remat!r} is not known: False, True, 'dots' or 'offload'")
    if remat:
        policies = jax.checkpoint_policies
        offload = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
        policy = {"dots": policies.dots_with_no_batch_dims_saveable, "offload": offload}.get(str(remat))
        block = nn.remat(block, prevent_cse=not scan, policy=policy)
    if not scan:
        return block
    axes: Any = (0, *([nn.broadcast] * shared))
    return nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=axes, length=layers)


def through(layers: Any, x: jax.Array, own: Any, *shared: Any) -> tuple[jax.Array, Any]:
    """(x, new keys and values in the cache's form, or None) after all layers. own: None, or a tuple of what each layer
    has for itself: arrays with a leading axis of layers, or tuples of one a layer."""
    if not isinstance(layers, list | tuple):
        return layers(x, own, *shared)
    new = []
    for n, layer in enumerate(layers):
        x, one = layer(x, None if own is None else tuple(every[n] for every in own), *shared)
        new.append(one)
    return x, None if new[0] is None else tuple(zip(*new, strict=True))
