"""Run by test_processes.py, once a process: PORT COUNT NUMBER MESH. Process 0 prints losses and the adapter's norm."""

import json
import sys

import jax
import numpy as np

port, count, number, mesh = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
jax.distributed.initialize(f"127.0.0.1:{port}", count, number, initialization_timeout=60)

from jax.experimental import multihost_utils  # noqa: E402  (no JAX call may come before initialize)

from tests.scale.eight import alone, off, sharded  # noqa: E402

losses, state, moved, *_ = sharded(mesh, 3, 0)
whole = multihost_utils.process_allgather(state.trained, tiled=True)
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
