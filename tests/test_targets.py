"""Which weights are meant: layers by number, and the entry of `layouts` that a path gets."""

import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.targets import known
from jlora.tree import paths

BLOCKS = {f"Block_{n}": {f"Dense_{m}": {"kernel": jnp.ones((4, 4))} for m in range(2)} for n in range(3)}


def adapted(lora):
    return [path for path, entry in paths(lora, lambda x: isinstance(x, jlora.LoraFactors)).items()]


@pytest.mark.parametrize("layers", [0, (0, 2)])
def test_layers_are_those_of_the_blocks(layers):
    _, lora = jlora.lorafy(BLOCKS, config=jlora.LoraConfig(r=2, layers_to_transform=layers))
    wanted = np.atleast_1d(layers)
    assert adapted(lora) == [f"Block_{n}/Dense_{m}/kernel" for n in wanted for m in range(2)]


def test_rows_of_a_stack_have_no_number():
    stack = {"layers": {"Dense_0": {"kernel": jnp.ones((3, 4, 4))}}}
    with pytest.raises(ValueError, match="no layer number in layers/Dense_0/kernel; a scanned stack is one leaf"):
        jlora.lorafy(stack, layouts={"kernel": "sio"}, config=jlora.LoraConfig(r=2, layers_to_transform=0))


def test_a_path_of_its_own_goes_before_a_longer_one_and_that_before_a_pattern():
    layouts = {"kernel": "a", "model/decoder/head/kernel": "b", "decoder/head/kernel": "c", "head/kernel": "d"}
    assert known("decoder/head/kernel", layouts) == "c"
    assert known("head/kernel", layouts) == "d"
    assert known("head/kernel", {"kernel": "a", "model/head/kernel": "b"}) == "b"
    assert known("other/kernel", layouts) == "a"
    assert known("other/bias", layouts) is None and known("w", None) is None
    params = {"decoder": {"head": {"kernel": jnp.ones((2, 3, 4))}}, "head": {"kernel": jnp.ones((2, 3, 4))}}
    layouts = {"decoder/head/kernel": "sio", "head/kernel": "ioo"}
    _, lora = jlora.lorafy(params, 2, targets="kernel", layouts=layouts)
    assert (lora["head"]["kernel"].layout, lora["decoder"]["head"]["kernel"].layout) == ("ioo", "sio")
