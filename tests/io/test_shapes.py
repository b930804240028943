"""An adapter read onto a model of shapes, as for a dry run or an export: what it holds, and what it leaves out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora.io import Pretrained
from jlora.io.adapters import load_adapter, save_adapter
from jlora.methods.named import MethodConfig, make
from jlora.models.gpt2 import GPT2, GPT2Config, hf_tensors

CONFIG = GPT2Config(31, 16, 16, 3, 2)
METHODS = {
    "biases": jlora.LoraConfig(r=2, target_modules=["c_attn"], bias="all"),
    "whole modules": jlora.LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["c_fc/kernel", "wpe"]),
    "DoRA": MethodConfig(method="dora", rank=2),
    "IA3": MethodConfig(method="ia3", targets=("c_attn", "mlp/c_proj")),
    "IA3 and a module": MethodConfig(method="ia3", targets=("mlp/c_proj",)),
}


@pytest.fixture(scope="module")
def base():
    model = GPT2(CONFIG)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return Pretrained(model, params, CONFIG, None, "tiny", hf_tensors(CONFIG))


def written(base, name, folder):
    """The trained tree, every value of it its own."""
    what, options = METHODS[name], {"layouts": base.layouts, "key": jax.random.key(1)}
    if isinstance(what, jlora.LoraConfig):
        _, trained = jlora.lorafy(base.params, config=what, **options)
    else:
        _, trained = make(base.params, what, train=("c_fc/kernel",) if "module" in name else (), **options)
    trained = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(x.size), x.shape), trained)
    save_adapter(folder, base, trained, what)
    return trained


@pytest.mark.parametrize("name", METHODS)
def test_it_needs_no_weights(name, base, tmp_path):
    trained = written(base, name, tmp_path)
    shapes = jax.eval_shape(lambda: base.params)
    _, got, _ = load_adapter(dataclasses.replace(base, params=shapes), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, got, trained)
    dry = jax.eval_shape(lambda p: load_adapter(dataclasses.replace(base, params=p), tmp_path)[1], shapes)
    assert jax.tree.map(lambda x: x.shape, dry) == jax.tree.map(lambda x: x.shape, trained)


@pytest.mark.parametrize("name", METHODS)
def test_layers_that_the_file_leaves_out_are_the_bases(name, base, tmp_path):
    trained = written(base, name, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    held = {key: x for key, x in load_file(path).items() if ".h.1." not in key}
    save_file(held, path)
    frozen, got, _ = load_adapter(base, tmp_path)
    for n in (0, 2):
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[n], b[n]), got["h"], trained["h"])
    merged, plain = jlora.merge(frozen, got)["h"], base.params["h"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b[1], atol=1e-6), merged, plain)
    shapes = dataclasses.replace(base, params=jax.eval_shape(lambda: base.params))
    dry = jax.eval_shape(lambda p: load_adapter(dataclasses.replace(base, params=p), tmp_path)[1], shapes.params)
    assert jax.tree.map(lambda x: x.shape, dry) == jax.tree.map(lambda x: x.shape, got)
    if name == "IA3":
        load_adapter(shapes, tmp_path)
        return
    with pytest.raises(ValueError, match=r"h/.*: the adapter leaves out some of its 3 layers, so the weights are"):
        load_adapter(shapes, tmp_path)
