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


def dense_tensors(path: str, hub: str = "", bias: bool = True) -> list[HFTensor]:
    """A linear layer's weight and bias. hub: its name there, the path's own if not given."""
    hub = hub or dotted(path)
    weight = HFTensor(f"{hub}.weight", f"{path}/kernel", transpose=True)
    return [weight, HFTensor(f"{hub}.bias", f"{path}/bias")] if bias else [weight]


def norm_tensors(path: str, hub: str = "", bias: bool = True) -> list[HFTensor]:
    """A norm's scale and bias. hub: as in `dense_tensors`."""
    hub = hub or dotted(path)
    scale = HFTensor(f"{hub}.weight", f"{path}/scale")
    return [scale, HFTensor(f"{hub}.bias", f"{path}/bias")] if bias else [scale]


def layer_tensors(hub: str, path: str, layers: int, scan: bool, one: list[HFTensor]) -> list[HFTensor]:
    """Those of all layers: of layer n `one` under `hub`.n on the Hub, in row n at `path` or, no stack, at `path`_n."""
    out = []
    for n in range(layers):
        where, row = (path, n) if scan else (f"{path}_{n}", None)
        out += [dataclasses.replace(t, name=f"{hub}.{n}.{t.name}", path=f"{where}/{t.path}", layer=row) for t in one]
    return out


def prefixed(prefix: str, tensors: list[HFTensor]) -> list[HFTensor]:
    """The same under longer names on the Hub."""
    return [dataclasses.replace(tensor, name=prefix + tensor.name) for tensor in tensors]


def dotted(path: str) -> str:
    """A path as the Hub writes it."""
    return path.replace("/", ".")
