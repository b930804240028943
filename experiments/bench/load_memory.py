"""Peak host memory while a checkpoint is loaded onto device shards, against what the shards themselves hold.

    python experiments/bench/load_memory.py [--gigabytes 2] [--dtype float32]

A random Llama in Hub format is written to a temporary folder and loaded in a fresh process over 8 simulated devices.
Anonymous memory (RssAnon) is sampled every 2 ms: pages of the mapped file are the system's to drop.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

CHILD = "--child"


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def child(folder: str, dtype: str) -> None:
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jlora.io import load
    from jlora.tree import nbytes

    mesh = Mesh(jax.devices(), ("fsdp",))

    def sharding(path: str, shape: jax.ShapeDtypeStruct) -> NamedSharding:
        axis = max(range(len(shape.shape)), key=lambda n: (shape.shape[n] % 8 == 0, shape.shape[n]))
        spec = [None] * len(shape.shape)
        if shape.shape[axis] % 8 == 0:
            spec[axis] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    jax.block_until_ready(jax.device_put(jnp.zeros(8), NamedSharding(mesh, PartitionSpec("fsdp"))))
    load(folder, weights=False)
    before, peak, over = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not over.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    base = load(folder, dtype=jnp.dtype(dtype), sharding=sharding)
    jax.block_until_ready(base.params)
    over.set()
    watcher.join()
    held = nbytes(base.params)
    largest = max(x.nbytes for x in jax.tree.leaves(base.params))
    print(json.dumps({"shards": held, "largest": largest, "above": peak[0] - before - held}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(CHILD, default=None)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.dtype)
        return
    import numpy as np

    from jlora.io.save import write_shards
    from jlora.models.llama import LlamaConfig, hf_tensors

    d, f, v = 1024, 2816, 32768
    layers = max(1, round((given.gigabytes * 1e9 / 4 - 2 * v * d) / (4 * d * d + 3 * d * f)))
    config = LlamaConfig(v, d, f, layers, 8, 8, 128)
    rng = np.random.default_rng(0)
    sizes = {"embed": (v, d), "lm_head": (v, d), "gate": (f, d), "up": (f, d), "down": (d, f), "norm": (d,)}

    def arrays():
        for t in hf_tensors(config):
            shape = next((s for name, s in sizes.items() if name in t.name), (d, d))
            yield t.name, rng.standard_normal(shape, np.float32)

    with tempfile.TemporaryDirectory() as folder:
        total = write_shards(Path(folder), arrays(), 500_000_000)
        (Path(folder) / "config.json").write_text(json.dumps(config.to_hf()))
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
        env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, __file__, CHILD, folder, "--dtype", given.dtype]
        out = json.loads(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)
    mb = {name: f"{size / 1e6:.0f} MB" for name, size in {"checkpoint": total, **out}.items()}
    biggest = 4 * v * d
    print(f"{mb}; above them: {out['above'] / biggest:.2f} x the largest tensor of the file ({biggest / 1e6:.0f} MB)")


if __name__ == "__main__":
    main()
