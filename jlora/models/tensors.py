"""Where each tensor of a Hub checkpoint lies in a Flax parameter tree."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class HFTensor:
    """`name` on the Hub is the leaf at `path` (its row `layer` if that leaf is a stack), transposed or as it is.

    torch keeps linear weights (out, in), Flax kernels are (in, out): `transpose` is True for those.
    """

    name: str
    path: str
    layer: int | None = None
    transpose: bool = False


def dense_tensors(hub: str, path: str, layer: int | None = None) -> list[HFTensor]:
    """A linear layer's weight and bias."""
    weight = HFTensor(f"{hub}.weight", f"{path}/kernel", layer, transpose=True)
    return [weight, HFTensor(f"{hub}.bias", f"{path}/bias", layer)]


def norm_tensors(hub: str, path: str, layer: int | None = None) -> list[HFTensor]:
    """A LayerNorm's scale and bias."""
    return [HFTensor(f"{hub}.weight", f"{path}/scale", layer), HFTensor(f"{hub}.bias", f"{path}/bias", layer)]
