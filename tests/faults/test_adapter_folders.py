"""Hostile adapter folders: settings of every wrong kind, tensors that fit nothing, links, patterns that never end."""

from __future__ import annotations

import json
import os

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jlora.io.adapters import about
from jlora.io.peft_read import load_peft
from jlora.models.tensors import HFTensor
from tests.faults.guard import refused

PARAMS = {"q": {"kernel": np.ones((6, 8), np.float32), "bias": np.ones(8, np.float32)}}
PARAMS |= {"embed_tokens": {"embedding": np.ones((5, 6), np.float32)}}
Q = "model.layers.17.self_attn.q_proj"
TENSORS = [HFTensor(f"{Q}.weight", "q/kernel", None, True), HFTensor(f"{Q}.bias", "q/bias")]
TENSORS += [HFTensor("m.embed_tokens.weight", "embed_tokens/embedding")]
NAME = f"base_model.model.{Q}"
BASE = "base_model.model.m."
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
A, B = np.full((2, 6), 0.5, np.float32), np.full((8, 2), 0.5, np.float32)
ARRAYS = {f"{NAME}.lora_A.weight": A, f"{NAME}.lora_B.weight": B}


def write(folder, config=None, arrays=None):
    text = config if isinstance(config, str | bytes) else json.dumps(CONFIG if config is None else config)
    (folder / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    save_file({k: np.ascontiguousarray(v) for k, v in (ARRAYS if arrays is None else arrays).items()},
              folder / "adapter_model.safetensors")  # fmt: skip


def read(folder):
    return load_peft(folder, PARAMS, TENSORS)


def but(**changes):
    return {**CONFIG, **changes}


CONFIGS = {
    "nothing": "",
    "cut": '{"peft_type": "LORA", "r"',
    "a list": "[]",
    "text": '"LORA"',
    "null": "null",
    "not UTF-8": b'{"peft_type": "\xff"}',
    "deep": '{"a":' * 100_000,
    "NaN": '{"peft_type": "LORA", "lora_alpha": NaN}',
    "infinity": '{"peft_type": "LORA", "lora_alpha": -Infinity}',
    "1e999": '{"peft_type": "LORA", "lora_alpha": 1e999}',
    "a number of 10,000 digits": '{"peft_type": "LORA", "r": ' + "9" * 10_000 + "}",
    "no kind": {"r": 2},
    **{f"kind {kind!r:.20}": but(peft_type=kind) for kind in ("IA3", "lora", None, 3, ["LORA"], {}, "x\x1b[2J" * 1000)},
    **{f"r {r!r:.20}": but(r=r) for r in (0, -1, 1.5, "8", True, [], {}, 1e3)},
    **{f"alpha {a!r:.20}": but(lora_alpha=a) for a in ("8", True, [8], {}, "nan")},
    **{f"dropout {d!r}": but(lora_dropout=d) for d in (1.0, -0.1, "0.1", 7, True, [])},
    **{f"targets {t!r:.20}": but(target_modules=t) for t in (3, [3], {"a": 1}, [["q"]], True)},
    **{f"saved {t!r:.20}": but(modules_to_save=t) for t in (3, [3], {"a": 1})},
    **{f"alphas {p!r:.20}": but(alpha_pattern=p) for p in (3, [], "q", {"q": "8"}, {"q": None}, {"q": [1]})},
    **{f"ranks {p!r:.20}": but(rank_pattern=p) for p in (3, [], {"q": 0}, {"q": "8"}, {"q": 1.5})},
    **{f"no regex {p!r:.20}": but(alpha_pattern={p: 1}) for p in ("(", "[", "*", "a{9999999999}", "(?P<", "q" * 5000)},
    "a regex that takes for ever": but(alpha_pattern={r"(\w|\w\w|.)+(\w|\w\w|.)+[0-9]{3}": 1}),
    "another that takes for ever": but(alpha_pattern={"(.|..|...)+[xyz]": 1}),
    **{f"rslora {u!r}": but(use_rslora=u) for u in ("true", 1, [])},
    **{f"bias {b!r}": but(bias=b) for b in (3, True, ["all"])},
    **{f"layers {x!r}": but(layers_to_transform=x) for x in ("0", [0.5], ["0"], [None])},
    **{f"rows {x!r:.20}": but(trainable_token_indices=x) for x in ("0", {"a": 3}, [0.5], {"a": ["0"]}, 7, [True])},
    "parameters of experts": but(target_parameters=["experts"]),
    "layers repeated": but(layer_replication=[[0, 4]]),
    "DoRA with no magnitudes": but(use_dora=True),
}  # fmt: skip


def tensors(**changes):
    return {**ARRAYS, **{f"{NAME}.{name.replace('__', '.')}": x for name, x in changes.items()}}


def filled(value, dtype="f4"):
    return np.full((2, 6), value, dtype)


WEIGHTS = {
    "A alone": {f"{NAME}.lora_A.weight": A},
    "B alone": {f"{NAME}.lora_B.weight": B},
    "a magnitude alone": {f"{NAME}.lora_magnitude_vector": np.ones(8, np.float32)},
    "rank 0": {f"{NAME}.lora_A.weight": A[:0], f"{NAME}.lora_B.weight": B[:, :0]},
    "two ranks": tensors(lora_B__weight=np.ones((8, 3), np.float32)),
    "A of another width": tensors(lora_A__weight=np.ones((2, 7), np.float32)),
    "B of another width": tensors(lora_B__weight=np.ones((9, 2), np.float32)),
    "A of one axis": tensors(lora_A__weight=np.ones(6, np.float32)),
    "B of three axes": tensors(lora_B__weight=np.ones((8, 2, 1), np.float32)),
    "A of no axes": tensors(lora_A__weight=np.float32(1)),
    "A transposed": tensors(lora_A__weight=A.T),
    **{f"A with {v}": tensors(lora_A__weight=filled(v)) for v in (np.nan, np.inf, -np.inf)},
    "B with one NaN": tensors(lora_B__weight=np.r_[B[:-1], [[0.5, np.nan]]].astype("f4")),
    **{f"A of {d}": tensors(lora_A__weight=filled(1, d)) for d in ("i8", "i4", "u1", "i2", "?")},
    "float16 with infinity": tensors(lora_A__weight=filled(np.inf, "f2")),
    "an unknown module": {**ARRAYS, "base_model.model.m.z_proj.lora_A.weight": A},
    "a name with a path": {**ARRAYS, "../../q_proj.lora_A.weight": A},
    "a name that a terminal obeys": {**ARRAYS, "base_model.model.\x1b[2J\n.lora_A.weight": A},
    "a long name": {**ARRAYS, "x" * 100_000: A},
    "no name": {**ARRAYS, "": A},
    "a name twice": {**ARRAYS, f"{Q}.lora_A.weight": A},
    "a bias of another shape": tensors(bias=np.ones(1, np.float32)),
    "a bias of no axes": tensors(bias=np.float32(1)),
    "a whole weight transposed": tensors(weight=np.ones((6, 8), np.float32)),
    "a magnitude too short": tensors(lora_magnitude_vector=np.ones(7, np.float32)),
    "rows with no ids": {"base_model.model.m.embed_tokens.token_adapter.trainable_tokens_delta": np.ones((1, 6), "f4")},
    "a thousand unknown": {f"m.{n}.lora_A.weight": A for n in range(1000)},
}


def test_the_folder_that_the_cases_change_is_good(tmp_path):
    write(tmp_path)
    frozen, lora, _ = read(tmp_path)
    assert lora["q"]["kernel"].scaling == 2 and jax.tree.structure(frozen) == jax.tree.structure(PARAMS)


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_are_refused(name, tmp_path):
    write(tmp_path, CONFIGS[name])
    refused(lambda: read(tmp_path), tmp_path, "adapter_config.json|does not fit the model")


@pytest.mark.parametrize("name", WEIGHTS)
def test_tensors_are_refused(name, tmp_path):
    write(tmp_path, arrays=WEIGHTS[name])
    refused(lambda: read(tmp_path), tmp_path, "does not fit the model|adapter_model")


@pytest.mark.parametrize("ids", [[5], [-1], [2**40], []])
def test_rows_of_no_tokens(ids, tmp_path):
    row = np.ones((len(ids) or 1, 6), np.float32)
    write(tmp_path, but(trainable_token_indices=ids), {f"{BASE}embed_tokens.token_adapter.trainable_tokens_delta": row})
    refused(lambda: read(tmp_path), tmp_path, "does not fit the model")


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["absent", "pipe", "device", "loop", "folder", "another file", "empty"])
def test_what_is_no_file(kind, file, tmp_path):
    write(tmp_path)
    path = tmp_path / file
    path.unlink()
    (tmp_path / "secret").write_text("hello")
    make = {
        "absent": lambda: None, "pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path), "folder": path.mkdir, "empty": path.touch,
        "another file": lambda: path.symlink_to(tmp_path / "secret"),
    }  # fmt: skip
    make[kind]()
    refused(lambda: read(tmp_path), tmp_path, file)


PLAIN = {"peft_type": "JLORA", "form": 1, "settings": {}, "weights": {}, "trees": [{}]}
FACTORS = {"lora_a": {"array": "a", "shape": [6, 2]}, "lora_b": {"array": "b", "shape": [2, 8]}}


def entry(kind="LoraFactors", **fields):
    return {"kind": kind, "fields": {**FACTORS, "scaling": 1.0, "layout": "io", **fields}}


PLAINS = {
    "another form": {**PLAIN, "form": 2},
    "no trees": {k: v for k, v in PLAIN.items() if k != "trees"},
    "trees of another kind": {**PLAIN, "trees": 3},
    "a tree of another kind": {**PLAIN, "trees": [3]},
    "weights of another kind": {**PLAIN, "weights": [1]},
    "other weights": {**PLAIN, "weights": {"z": [1]}},
    "settings of another kind": {**PLAIN, "settings": [1]},
    "an unknown method": {**PLAIN, "settings": {"method": "x"}},
    "an unknown entry": {**PLAIN, "trees": [{"q/kernel": entry("Payload")}]},
    "an entry of a class of Python": {**PLAIN, "trees": [{"q/kernel": entry("object")}]},
    "a list for an entry's kind": {**PLAIN, "trees": [{"q/kernel": {"kind": ["LoraFactors"], "fields": {}}}]},
    "no fields": {**PLAIN, "trees": [{"q/kernel": {"kind": "LoraFactors"}}]},
    "unknown fields": {**PLAIN, "trees": [{"q/kernel": entry(more=1)}]},
    "an array that is not there": {**PLAIN, "trees": [{"q/kernel": entry(lora_a={"array": "z", "shape": [6, 2]})}]},
    "an array of another shape": {**PLAIN, "trees": [{"q/kernel": entry(lora_a={"array": "a", "shape": [7, 2]})}]},
    "a list for an array": {**PLAIN, "trees": [{"q/kernel": entry(lora_a={"array": ["a"], "shape": [6, 2]})}]},
    "text for an array": {**PLAIN, "trees": [{"q/kernel": entry(lora_a="a")}]},
    "text for a scaling": {**PLAIN, "trees": [{"q/kernel": entry(scaling="a")}]},
    "an infinite scaling": json.dumps({**PLAIN, "trees": [{"q/kernel": entry(scaling=7.5)}]}).replace("7.5", "1e999"),
    "a number for an array": {**PLAIN, "trees": [{"q/kernel": entry(lora_a=3.0)}]},
    "an unknown layout": {**PLAIN, "trees": [{"q/kernel": entry(layout="xyz")}]},
    "factors of another weight": {**PLAIN, "trees": [{"q/kernel": entry(layout="oi")}]},
    "a weight that is not there": {**PLAIN, "trees": [{"z/kernel": entry()}]},
    "a number at a weight": {**PLAIN, "trees": [{"q/kernel": 3}]},
    "deep entries": json.dumps({**PLAIN, "trees": [{"q/kernel": 0}]}).replace(
        "0}", '{"tuple": [' * 400 + "]}" * 400 + "}"
    ),
}


@pytest.mark.parametrize("name", PLAINS)
def test_the_plain_form_is_refused(name, tmp_path):
    import jlora
    from jlora.io import plain
    from jlora.io.peft_read import adapter_json, read_arrays

    write(tmp_path, PLAINS[name], {"a": A.T, "b": B.T})

    def load():
        about(tmp_path)
        frozen, trained = plain.load_plain(tmp_path, adapter_json(tmp_path), read_arrays(tmp_path), PARAMS)
        jax.eval_shape(lambda: jlora.merge(frozen, trained))

    refused(load, tmp_path)
