"""How a `LoraLeaf` goes through a multiplication by a number and a change of sign.

W·c + scaling * A·(B·c): the factor takes the number, as `scaling` is static and c may be traced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jlora.rules import rule


@rule("mul")
@rule("div")
def scaled(eqn: Any, bind: Callable[..., Any], position: int, *operands: Any) -> Any:
    """W·c, c·W and W/c."""
    leaf, c = operands[position], operands[1 - position]
    divided = eqn.primitive.name == "div"
    if jnp.ndim(c) > 0 or (divided and position != 0):
        return NotImplemented
    w = bind(*(leaf.w if n == position else x for n, x in enumerate(operands)))
    b, c = leaf.lora_b, jnp.asarray(c)
    wide = jnp.promote_types(b.dtype, c.dtype)  # the factors keep at least the precision of the number
    b, c = b.astype(wide), c.astype(wide)
    return dataclasses.replace(leaf, w=w, lora_b=b / c if divided else b * c)


@rule("neg")
def neg(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any) -> Any:
    return dataclasses.replace(leaf, w=bind(leaf.w), lora_b=-leaf.lora_b)
