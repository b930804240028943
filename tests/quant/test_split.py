"""Quantised weights over eight simulated devices: one device's losses, and codes on the wires, never floats."""

import pytest
from jax.sharding import PartitionSpec as P

from tests.devices import on_eight

RUNS = ["nf4:fsdp=8", "int8:data=2,fsdp=2,tensor=2"]
SMALLEST = 32 * 16 * 4  # bytes of the smallest weight's matrix in float32; the largest factor has half of them


@pytest.fixture(scope="module")
def split():
    return on_eight("tests.quant.split", *RUNS, key="run")


@pytest.mark.parametrize("run, codes", [(RUNS[0], "u8"), (RUNS[1], "s8")])
def test_codes_are_gathered_and_no_weight(split, run, codes):
    report = split[run]
    assert report["losses"] < 1e-5
    layers = [(dtypes, size) for dtypes, size, where in report["gathered"] if "/while/" in where]
    assert max(size for dtypes, size in layers if codes in dtypes) >= SMALLEST / 4 / (2 if codes == "u8" else 1)
    if run == RUNS[0]:  # with tensors split, activations are gathered too
        assert max(size for dtypes, size in layers if codes not in dtypes) < SMALLEST
    written = [(dtypes, size) for dtypes, size, where in report["gathered"] if "written_out" in where]
    assert max([size for dtypes, size in written if codes not in dtypes], default=0) < 512  # scales an output


def test_reading_onto_a_mesh_gives_the_same_codes_in_parts(split):
    assert split["loaded"]["same"] and split["loaded"]["codes"] == str(P(None, "fsdp", "tensor"))


def test_the_arrays_lie_as_the_weight_where_they_divide(split):
    at = "layers/self_attn/q_proj/kernel/parts/"
    assert split[RUNS[0]]["specs"][at + "codes"] == str(P(None, "fsdp", None))
    assert split[RUNS[0]]["specs"][at + "absmax"] == str(P(None, None, None))  # one block an output: nothing to split
    assert split[RUNS[1]]["specs"][at + "codes"] == str(P(None, "fsdp", "tensor"))
    assert split[RUNS[1]]["specs"][at + "scale"] == str(P(None, "tensor"))
