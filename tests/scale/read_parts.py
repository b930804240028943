"""Stacked layers read from named tensors straight to eight devices: each gets its part, and reads nothing else."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jlora.io.tensors import Source, build
from jlora.models.tensors import HFTensor

HELD = {f"h.{n}.w": np.random.default_rng(n).normal(size=(16, 8)).astype(np.float32) for n in range(4)}
TENSORS = [HFTensor(name, "w", layer=n, transpose=True) for n, name in enumerate(HELD)]


def main():
    mesh, whole = jax.make_mesh((2, 4), ("a", "b")), np.stack([x.T for x in HELD.values()])
    for spec in (P("a", "b", None), P(None, "b", "a"), P(None, None, ("a", "b")), P()):
        most = 0

        def read(name, index):
            nonlocal most
            part = HELD[name][index]
            most = max(most, part.size)
            return part

        source = Source("here", {name: x.shape for name, x in HELD.items()}, read)
        shapes = {"w": jax.ShapeDtypeStruct(whole.shape, jnp.float32)}
        place = NamedSharding(mesh, spec)
        built = build(shapes, TENSORS, source, sharding=lambda path, shape, place=place: place)["w"]
        same = all(np.array_equal(shard.data, whole[shard.index]) for shard in built.addressable_shards)
        print(json.dumps({"spec": str(spec), "same": same, "most": most}), flush=True)


if __name__ == "__main__":
    main()
