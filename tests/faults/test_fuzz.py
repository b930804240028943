"""Every reader on changed files, drawn by hypothesis: refused in one sentence, or read. Nothing else."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jlora.commands.settings import TrainConfig, read_settings
from jlora.data import read_rows
from jlora.io.gguf import config_of, open_gguf, tokenizer_of
from jlora.io.peft_read import read_config
from jlora.io.sizes import checked_config
from jlora.io.torchfile import read_bin
from jlora.models.llama import LlamaConfig
from tests.faults import test_gguf_files, test_safetensors
from tests.faults.guard import clear
from tests.faults.test_adapter_folders import CONFIG
from tests.faults.test_model_folders import LLAMA
from tests.faults.torchbytes import stream, zipped

few = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


ENDS = [bytes(8), b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\x01" + bytes(7)]


@st.composite
def changed(draw, whole):
    """`whole` with a few bytes changed, taken out, put in, doubled or cut."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        size = draw(st.integers(1, 16))
        how = draw(st.sampled_from(["bytes", "ends", "out", "in", "twice", "cut"]))
        if how == "bytes":
            data[at : at + size] = draw(st.binary(min_size=size, max_size=size))
        elif how == "ends":
            data[at : at + 8] = draw(
                st.sampled_from([bytes(8), b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\x01" + bytes(7)])
            )
        elif how == "out":
            del data[at : at + size]
        elif how == "in":
            data[at:at] = draw(st.binary(max_size=size))
        elif how == "twice":
            data[at:at] = data[at : at + 64]
        else:
            del data[at:]
    return bytes(data)


def tried(call):
    """Run it; anything but one clear ValueError or OSError fails the test."""
    try:
        call()
    except (ValueError, OSError) as error:
        clear(error)


def gguf(path):
    reader = open_gguf(path)
    return config_of(reader), tokenizer_of(reader)


def weights(path):
    return {name: np.asarray(x) for name, x in read_bin(path).items()}


ROWS = b'{"prompt": "a", "completion": "b"}\n{"messages": [{"role": "assistant", "content": "\xc3\xa9"}]}\n'
FILES = {
    "model.safetensors": (test_safetensors.WHOLE, lambda path: test_safetensors.read(path.parent)),
    "zip.bin": (zipped(), weights),
    "stream.bin": (stream(), weights),
    "m.gguf": (test_gguf_files.WHOLE, gguf),
    "rows.jsonl": (ROWS, read_rows),
    "rows.json": (b'[{"prompt": "a", "completion": "b"},\n {"prompt": "\xc3\xa9", "completion": "d"}]\n', read_rows),
    "rows.jsonl.gz": (gzip.compress(ROWS, mtime=0), read_rows),
    "rows.csv": (b'prompt,completion\n"a, b",c\n\xc3\xa9,"d ""e"""\n', read_rows),
    "rows.tsv": (b"sentence\tlabel\na\t1\nb\t0\n", read_rows),
    "run.yaml": (b"model: m\nrank: 3\ntargets: [a, b]\nlearning-rate: 2e-4\n", lambda p: read_settings(TrainConfig, p)),
    "adapter_config.json": (json.dumps(CONFIG).encode(), lambda path: read_config(path.parent)),
}


@pytest.mark.parametrize("name", FILES)
def test_changed_files(name, tmp_path):
    whole, read = FILES[name]
    path = tmp_path / name
    path.write_bytes(whole)
    read(path)  # as it is, it is read

    @few
    @given(changed(whole))
    def run(data):
        path.write_bytes(data)
        tried(lambda: read(path))

    run()


def test_any_row(tmp_path):
    kinds = "prompt completion messages conversations text label chosen rejected instruction output response"
    keys = st.sampled_from(f"{kinds} role content from value tool_calls weight type".split())

    @few
    @given(st.dictionaries(keys, JSON | st.lists(st.dictionaries(keys, JSON, max_size=2), max_size=2), max_size=4))
    def run(row):
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
        tried(lambda: read_rows(tmp_path / "a.jsonl"))

    run()


def test_any_settings(tmp_path):
    names = [name.replace("_", "-") for name in TrainConfig.__dataclass_fields__]

    @few
    @given(st.dictionaries(st.sampled_from(names) | st.text(max_size=5), JSON, max_size=4))
    def run(held):
        (tmp_path / "a.yaml").write_text(yaml.safe_dump(held))
        tried(lambda: read_settings(TrainConfig, tmp_path / "a.yaml"))

    run()


@few
@given(
    st.dictionaries(st.sampled_from([*LLAMA, "rope_scaling", "rope_theta", "head_dim", "hidden_act"]), JSON, max_size=4)
)
def test_any_config(changes):
    tried(lambda: checked_config(LlamaConfig, {**LLAMA, **changes, "model_type": "llama"}, "config.json"))


def test_any_adapter_settings(tmp_path):
    @few
    @given(st.dictionaries(st.sampled_from([*CONFIG, "alpha_pattern", "rank_pattern", "bias", "use_rslora"]), JSON))
    def run(changes):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
        tried(lambda: read_config(tmp_path))

    run()
