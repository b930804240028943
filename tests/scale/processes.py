"""Run by test_processes.py, once a process: PORT COUNT NUMBER MESH. Process 0 prints losses and the adapter's norm."""

import json
import sys

import jax
import numpy as np

port, count, number, mesh = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
jax.distributed.initialize(f"127.0.0.1:{port}", count, number, initialization_timeout=60)

from jax.experimental import multihost_utils  # noqa: E402  (no JAX call may come before initialize)

from jlora.commands.share import shared  # noqa: E402
from jlora.data import Example  # noqa: E402
from tests.scale.eight import alone, off, sharded  # noqa: E402

losses, state, moved, *_ = sharded(mesh, 3, 0)
whole = multihost_utils.process_allgather(state.trained, tiled=True)
told, lengths = [], [3, 1, 4, 1, 5, 9, 2]


def read(rows):
    told.append(len(rows))
    return [Example(np.arange(n, dtype=np.int32), np.arange(n) > 1) for n in rows], len(rows)


def refuse(rows):
    if number == count - 1:
        raise ValueError("row 6 is none")
    return read(rows)


found, cut = shared(lengths, read)
whole_rows = [len(one.loss_mask) for one in found] == lengths and cut == len(lengths) and told[0] <= 4
try:
    shared(lengths, refuse)
except ValueError as error:
    whole_rows &= str(error) == "row 6 is none"
else:
    whole_rows = False
print(json.dumps({"whole rows": whole_rows}), flush=True)
if number == 0:
    want, adapter = alone(3)
    pairs = zip(jax.tree.leaves(adapter), jax.tree.leaves(whole), strict=True)
    report = {
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "losses": off(want, losses),
        "adapter": max(float(np.max(np.abs(a - b))) for a, b in pairs),
        "kinds": sorted({one.kind for one in moved}),
    }
    print(json.dumps(report), flush=True)
multihost_utils.sync_global_devices("done")
