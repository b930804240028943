"""Which weights are meant: a group in models of several families, layers by number, and the entry of `layouts` that a
path gets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.lora import is_adapter
from jlora.methods import bitfit, full, ia3
from jlora.methods.plant import entries_of
from jlora.models.bert import Bert, BertConfig
from jlora.models.deberta import Deberta, DebertaConfig
from jlora.models.gpt2 import GPT2, GPT2Config
from jlora.models.llama import Llama, LlamaConfig
from jlora.targets import known
from jlora.tree import paths

MODELS = {
    "bert": Bert(BertConfig(31, 16, 24, 2, 4), scan_layers=False),
    "deberta": Deberta(DebertaConfig(31, 16, 24, 2, 4), scan_layers=False),
    "gpt2": GPT2(GPT2Config(31, 16, 8, 2, 2), scan_layers=False),
    "llama": Llama(LlamaConfig(31, 16, 24, 2, 4, 2, 4), scan_layers=False),
}
MLP = {
    "bert": {"intermediate/dense", "output/dense"},
    "deberta": {"intermediate/dense", "output/dense"},
    "gpt2": {"mlp/c_fc", "mlp/c_proj"},
    "llama": {"mlp/gate_proj", "mlp/up_proj", "mlp/down_proj"},
}


def chosen(params, **options):
    return set(paths(jax.eval_shape(lambda p: jlora.lorafy(p, 2, **options)[1], params), is_adapter))


@pytest.mark.parametrize("name", MODELS)
def test_mlp_and_attention_part_the_layers_between_them(name):
    model = MODELS[name]
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 4), int)))["params"]
    mlp, attention, every = (chosen(params, targets=group) for group in ("mlp", "attention", "all-linear"))
    top = {"deberta": "encoder/", "bert": "encoder/"}.get(name, "")
    stem = top + {"gpt2": "h_", "llama": "layers_"}.get(name, "layer_")
    assert mlp == {f"{stem}{n}/{weight}/kernel" for n in (0, 1) for weight in MLP[name]}
    assert mlp | attention == every and not mlp & attention


def test_names_of_other_libraries():
    """Haiku's and OPT's MLPs; a module called position-wise is no table of positions."""
    w = np.ones((4, 4), np.float32)
    params = {
        "PositionwiseFeedForward_0": {"Dense_0": {"kernel": w}},
        "position_table": {"kernel": w},
        "layers": {"fc1": {"kernel": w}, "fc2": {"kernel": w}, "out_proj": {"kernel": w}},
        "crossattention": {"output": {"dense": {"kernel": w}}},
    }
    mlp = {"PositionwiseFeedForward_0/Dense_0/kernel", "layers/fc1/kernel", "layers/fc2/kernel"}
    assert chosen(params, targets="mlp") == mlp
    every = mlp | {"layers/out_proj/kernel", "crossattention/output/dense/kernel"}
    assert chosen(params, targets="all-linear") == every


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


SHAPES = {"weight": (4, 4), "bias": 4}
FLAT = {
    "model.embed_tokens.weight": jnp.ones((7, 4)),
    **{f"model.layers.{n}.self_attn.q_proj.{name}": jnp.ones(s) for n in (0, 1) for name, s in SHAPES.items()},
    "model.layers.0.mlp.fc1.weight": jnp.ones((6, 4)),
    "model.ln_f.weight": jnp.ones(4),
    "lm_head.weight": jnp.ones((7, 4)),
}


def unflatten(flat):
    tree = {}
    for path, leaf in flat.items():
        *modules, name = path.split(".")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[name] = leaf
    return tree


def test_flat_names_with_dots_are_read_as_nested_ones():
    """Axes, the head, groups, biases and layers, of a state dict as of torch."""
    nested = unflatten(FLAT)
    same = lambda lora: {path.replace(".", "/"): entry for path, entry in entries_of(lora).items()}
    for options in ({}, {"targets": "mlp"}, {"config": jlora.LoraConfig(r=2, bias="all", layers_to_transform=1)}):
        flat, want = (same(jlora.lorafy(params, 2, **options)[1]) for params in (FLAT, nested))
        assert flat.keys() == want.keys() and "lm_head/weight" not in flat
        assert [getattr(x, "layout", "") for x in flat.values()] == [getattr(want[p], "layout", "") for p in flat]
    for make in (bitfit.make, bitfit.norms, lambda p: full.top(p, 1)):
        assert same(make(FLAT)[1]).keys() == same(make(nested)[1]).keys()
    with pytest.raises(ValueError, match=r"^model.layers.0.self_attn.q_proj: one entry for several weights"):
        ia3.make(FLAT, targets="q_proj", feedforward=())
    _, scaled = ia3.make(FLAT, targets=(), feedforward="fc1")
    assert entries_of(scaled)["model.layers.0.mlp.fc1.weight"].scale.shape == (4,)
