"""Run by test_split.py with eight simulated devices: tests/scale/eight.py on quantised weights."""

import json
import sys
import tempfile

import jax
import numpy as np
from jax.sharding import NamedSharding

import jlora
from jlora import sharding
from jlora.io import load
from tests.scale import eight
from tests.small import small_model

plain = eight.setting


def quantised(scheme):
    def setting(*what):
        frozen, *rest = plain(*what)
        return jlora.quantise(frozen, scheme, layouts=eight.LAYOUTS), *rest

    return setting


def loaded():
    """Whether a base read onto a mesh has the codes of one read whole, and how up_proj's lie."""
    mesh = sharding.make_mesh("fsdp=4,tensor=2")
    at = lambda path, w: NamedSharding(mesh, sharding.specs({path: w}, eight.LAYOUTS, mesh, min_size=0)[path])
    with tempfile.TemporaryDirectory() as folder:
        model = small_model(folder)
        spread, whole = (load(model, quantise="nf4", sharding=how).params for how in (at, None))
    same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), spread, whole)
    spec = spread["layers"]["mlp"]["up_proj"]["kernel"].parts["codes"].sharding.spec
    return {"run": "loaded", "same": all(jax.tree.leaves(same)), "codes": str(spec)}


def main():
    print(json.dumps(loaded()), flush=True)
    for text in sys.argv[1:]:
        scheme, mesh = text.split(":")
        eight.setting = quantised(scheme)
        eight.alone.cache_clear()  # it knows nothing of schemes
        losses, _ = eight.alone(2)
        mine, _, moved, spec, _ = eight.sharded(mesh, 2)
        report = {
            "run": text,
            "losses": eight.off(losses, mine),
            "gathered": [[list(c.dtypes), c.bytes, c.where] for c in moved if c.kind == "all-gather"],
            "specs": {path: str(s) for path, s in spec.items() if "q_proj" in path},
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
