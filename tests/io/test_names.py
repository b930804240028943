"""Checkpoints under the names of the Hub's own files: another prefix, old LayerNorms, what a model does not need."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.io import load
from jlora.io.save import hub_arrays
from jlora.models import family
from jlora.models.bert import BertConfig
from jlora.models.deberta import DebertaConfig
from jlora.models.gpt2 import GPT2Config
from tests.faults.torchbytes import table, tensor, zipped
from tests.small import small_model

CONFIGS = {
    "bert": BertConfig(15, 8, 16, 2, 2, max_position_embeddings=12),
    "roberta": BertConfig(15, 8, 16, 2, 2, max_position_embeddings=12, model_type="roberta"),
    "deberta-v2": DebertaConfig(15, 8, 16, 2, 2, max_position_embeddings=12, position_biased_input=False),
    "gpt2": GPT2Config(15, n_positions=12, n_embd=8, n_layer=2, n_head=2),
}
HEADS = {kind: ["none", "pooled", "classify", "regress", "mlm"] for kind in CONFIGS} | {"gpt2": [None]}
CASES = [(kind, head, prefixed) for kind in CONFIGS for head in HEADS[kind] for prefixed in (True, False)]
CASES.remove(("gpt2", None, True))  # as it is written here
BESIDE = {
    "bert": ["bert.pooler.dense.weight", "bert.embeddings.position_ids", "cls.predictions.transform.LayerNorm.gamma"],
    "roberta": ["roberta.pooler.dense.weight", "roberta.embeddings.position_ids", "lm_head.decoder.weight"],
    "deberta-v2": ["deberta.embeddings.position_ids", "lm_predictions.lm_head.bias", "mask_predictions.dense.weight"]
    + [f"deberta.embeddings.{name}_embeddings._weight" for name in ("word", "position")]
    + ["deberta.embeddings.position_embeddings.weight"],
    "gpt2": ["h.0.attn.bias", "h.1.attn.masked_bias", "lm_head.weight"],
}
"""What files of a family hold, wanted or not."""


def checkpoint(kind, head):
    """{name: array} of random numbers, under the names that are written here."""
    config, of = CONFIGS[kind], family(kind)
    extra = {} if head is None else {"head": head}
    shapes = jax.eval_shape(of.model(config, **extra).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)
    return dict(hub_arrays(of.hf_tensors(config, **extra), params, np.float32))


def write(folder, kind, held, torch=False):
    """A model's folder, its weights in safetensors or as torch keeps them."""
    from safetensors.numpy import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(CONFIGS[kind])))
    if not torch:
        save_file({name: np.ascontiguousarray(x) for name, x in held.items()}, folder / "model.safetensors")
        return str(folder)
    keys = {name: str(n) for n, name in enumerate(held)}
    strides = lambda x: tuple(step // x.itemsize for step in x.strides)
    body = table(**{name: tensor(keys[name], x.size, x.shape, strides(x)) for name, x in held.items()})
    (folder / "pytorch_model.bin").write_bytes(zipped(body, {keys[name]: x.tobytes() for name, x in held.items()}))
    return str(folder)


def old(name, prefix, prefixed):
    """A name of an old file, where a base model has its prefix or has none."""
    name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    base = name.removeprefix(prefix)
    heads = ("classifier.", "cls.", "lm_head.", *(["pooler."] if prefix == "deberta." else []))
    return prefix + base if prefixed and not base.startswith(heads) else base


@pytest.mark.parametrize("kind, head, prefixed", CASES)
def test_old_names_are_the_same_leaves(kind, head, prefixed, tmp_path):
    held, extra, prefix = checkpoint(kind, head), {} if head is None else {"head": head}, family(kind).prefix
    want = load(write(tmp_path / "new", kind, held), **extra)
    other = {old(name, prefix, prefixed): x for name, x in held.items()}
    assert set(other) != set(held) and len(other) == len(held)
    wanted = {old(name, prefix, True) for name in held}
    other |= {name: np.ones(3, np.float32) for name in BESIDE[kind] if name not in wanted}
    got = load(write(tmp_path / "old", kind, other, torch=not prefixed), **extra)
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)
    assert got.fresh == () and [tensor.name for tensor in got.tensors] == list(held)


def test_a_decoder_saved_without_its_head_has_its_prefix_put_back(tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = small_model(tmp_path / "m")
    want, path = load(folder).params, tmp_path / "m" / "model.safetensors"
    save_file({name.removeprefix("model."): x for name, x in load_file(path).items()}, path)
    jax.tree.map(np.testing.assert_array_equal, load(folder).params, want)


def test_two_tensors_of_one_name_are_not_chosen_between(tmp_path):
    held = checkpoint("bert", "none")
    held["bert.embeddings.LayerNorm.gamma"] = held["embeddings.LayerNorm.weight"] + 1
    with pytest.raises(ValueError, match=r"1 unknown: bert\.embeddings\.LayerNorm\.gamma"):
        load(write(tmp_path / "m", "bert", held))
