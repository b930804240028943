"""The reading of a tree's leaves from named tensors, layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np

from jlora.io.tensors import Source, build
from jlora.models.tensors import HFTensor
from tests.devices import on_eight

HELD = {f"h.{n}.w": np.arange(6, dtype=np.float32).reshape(3, 2) + 10 * n for n in range(2)}
HELD["head"] = np.arange(4, dtype=np.float32).reshape(4, 1)
TENSORS = [HFTensor("head", "head"), *(HFTensor(f"h.{n}.w", "w", layer=n, transpose=True) for n in (1, 0))]
SOURCE = Source("here", {name: x.shape for name, x in HELD.items()}, lambda name, index: HELD[name][index])
SHAPES = {"w": jax.ShapeDtypeStruct((2, 2, 3), jnp.float32), "head": jax.ShapeDtypeStruct((4, 1), jnp.float32)}


def test_layers_are_stacked_in_their_order():
    built = build(SHAPES, TENSORS, SOURCE)
    np.testing.assert_array_equal(built["w"], np.stack([HELD[f"h.{n}.w"].T for n in range(2)]))
    np.testing.assert_array_equal(built["head"], HELD["head"])


def test_what_is_made_of_a_leaf_gets_its_layers_one_by_one():
    seen = {}
    maker = lambda path: lambda layers, place: seen.setdefault(path, [x.copy() for x in layers])
    built = build(SHAPES, TENSORS, SOURCE, made={path: maker(path) for path in SHAPES})
    assert built is not None and [x.shape for x in seen["w"]] == [(2, 3), (2, 3)] and len(seen["head"]) == 1
    for n, layer in enumerate(seen["w"]):
        np.testing.assert_array_equal(layer, HELD[f"h.{n}.w"].T)
    np.testing.assert_array_equal(seen["head"][0], HELD["head"])


def test_each_device_gets_its_part_and_no_more_is_read():
    found = on_eight("tests.scale.read_parts", key="spec").values()
    assert all(report["same"] for report in found)
    assert [report["most"] for report in found] == [2 * 16, 2 * 8, 8 * 2, 8 * 16]  # numbers of one read
