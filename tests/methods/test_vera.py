"""VeRA as docs/adding-a-method.md writes it: its formula, its count, and its file. The table runs its properties."""

import jax
import numpy as np
import pytest
from toys import jitter, page

import jlora
from jlora.io.peft_read import adapter_json, read_arrays
from jlora.io.plain import load_plain, save_plain
from jlora.tree import size

VERA = page("adding-a-method")


def test_formula():
    frozen, trained = VERA.example()
    assert size(trained) == 4 * (4 + 16)
    moved = jitter(trained)
    leaf = jlora.combine(frozen, moved)["layer_2"]["kernel"]
    other = jlora.combine(frozen, moved)["layer_1"]["kernel"]
    np.testing.assert_array_equal(leaf.lora_a, other.lora_a)  # shared
    a, b = VERA.shared(0, 0, (16,), 4, "float32"), VERA.shared(0, 1, (16,), 4, "float32").T
    entry = moved["layer_2"]["kernel"]
    want = np.eye(16) + a @ np.diag(entry.d) @ b @ np.diag(entry.b)
    np.testing.assert_allclose(jlora.merge(frozen, moved)["layer_2"]["kernel"], want, atol=1e-5)
    np.testing.assert_allclose(np.std(VERA.shared(0, 0, (400,), 50, "float32")) * 20, 1, rtol=0.05)
    with pytest.raises(ValueError, match="'nowhere' matches no"):
        VERA.make(frozen, 2, targets="nowhere")


def test_there_and_back(tmp_path):
    params, trained = VERA.example()
    moved = jitter(trained)
    save_plain(tmp_path, moved, params, "base", {"method": "vera"}, {})
    _, again = load_plain(tmp_path, adapter_json(tmp_path), read_arrays(tmp_path), params)
    assert jax.tree.structure(again) == jax.tree.structure(moved)
    jax.tree.map(np.testing.assert_array_equal, again, moved)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 5000
