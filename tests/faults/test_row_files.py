"""Hostile rows: every wrong kind, broken text, tables that are none."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from jlora.data import Columns, parse_snippets, read_rows
from tests.faults.guard import refused, survives

GOOD = '{"prompt": "a", "completion": "b"}\n'
LINES = {
    "a list": "[1]",
    "text": '"prompt"',
    "a number": "3",
    "nothing": "null",
    "NaN": "NaN",
    "an empty object": "{}",
    "a number for text": '{"prompt": 3, "completion": "b"}',
    "NaN for text": '{"prompt": "a", "completion": NaN}',
    "a list for text": '{"prompt": ["a"], "completion": "b"}',
    "nothing for text": '{"prompt": "a", "completion": null}',
    "an object for text": '{"text": {"a": 1}}',
    "no answer": '{"prompt": "a", "completion": ""}',
    "empty text": '{"text": ""}',
    "a key missing": '{"prompt": "a"}',
    "a thousand keys": json.dumps({f"k{n}": n for n in range(1000)}),
    "a key that a terminal obeys": '{"\\u001b[2J\\n": 1}',
    "a value that a terminal obeys": '{"prompt": "a", "completion": ["\\u001b[2J"]}',
    "half a character": '{"prompt": "a", "completion": "\\ud800"}',
    "half a character in the prompt": '{"prompt": "\\udfff", "completion": "b"}',
    "half a character in a turn": '{"messages": [{"role": "assistant", "content": "\\ud83d"}]}',
    "cut": '{"prompt": "a", "completion',
    "two objects": "{} {}",
    "single quotes": "{'prompt': 'a'}",
    "a comment": '{"prompt": "a"} // b',
    "deep lists": "[" * 100_000,
    "deep objects": '{"prompt":' * 100_000,
    "a deep value": '{"prompt": ' + "[" * 900 + "]" * 900 + ', "completion": "b"}',
    "a huge number": '{"prompt": ' + "9" * 100_000 + "}",
    "messages of another kind": '{"messages": "hello"}',
    "no messages": '{"messages": []}',
    "messages in an object": '{"messages": {"role": "user"}}',
    "a message of another kind": '{"messages": ["hello"]}',
    "an unknown role": '{"messages": [{"role": "robot", "content": "a"}]}',
    "a list for a role": '{"messages": [{"role": ["user"], "content": "a"}]}',
    "a long role": json.dumps({"messages": [{"role": "user" * 10_000, "content": "a"}]}),
    "no content": '{"messages": [{"role": "assistant"}]}',
    "a list for content": '{"messages": [{"role": "assistant", "content": [{"type": "text"}]}]}',
    "a call of text": '{"messages": [{"role": "assistant", "tool_calls": "add"}]}',
    "half a character in a call": '{"messages": [{"role": "assistant", "tool_calls": [{"name": "\\ud83d"}]}]}',
    "a tool of text": '{"messages": [{"role": "assistant", "content": "a"}], "tools": ["add"]}',
    "tools of no JSON": '{"messages": [{"role": "assistant", "content": "a"}], "tools": "[{"}',
    "half a character in a tool": '{"messages": [{"role": "assistant", "content": "a"}], "tools": [{"a": "\\ud83d"}]}',
    "a weight of NaN": '{"messages": [{"role": "assistant", "content": "a", "weight": NaN}]}',
    "an image": '{"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}',
    "a deep part": '{"messages": [{"role": "assistant", "content": ' + "[" * 900 + "]" * 900 + "}]}",
    "an answer of nothing": '{"conversations": [{"from": "gpt", "value": ""}]}',
    "a prompt of text before turns": '{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}',
    "no turn to learn": '{"messages": [{"role": "user", "content": "a"}]}',
    "a preference of numbers": '{"prompt": "a", "chosen": 1, "rejected": 2}',
    "an empty preference": '{"prompt": "a", "chosen": "", "rejected": "c"}',
    "half a preference": '{"prompt": "a", "chosen": "b"}',
    "an instruction of numbers": '{"instruction": 3, "output": "b"}',
    "an empty output": '{"instruction": "a", "output": ""}',
    "a label of a list": '{"text": "a", "label": [1]}',
    "a label of truth": '{"text": "a", "label": true}',
    "no label": '{"text": "a", "label": null}',
    "a label of NaN": '{"text": "a", "label": NaN}',
    "a label of infinity": '{"text": "a", "label": -Infinity}',
    "not UTF-8": b'{"prompt": "\xff\xfe", "completion": "b"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "overlong UTF-8": b'{"prompt": "\xc0\xaf"}',
    "surrogates in UTF-8": b'{"prompt": "\xed\xa0\x80"}',
    "a NUL": b'{"prompt": "a\x00", "completion": "b"}',
    "binary": bytes(range(128, 256)),
}


def test_deep_calls_end_in_an_error_at_most(tmp_path):
    for depth in (500, 900, 980):
        deep = "[" * depth + "]" * depth
        calls = '{"messages": [{"role": "assistant", "tool_calls": [{"function": ' + deep + "}]}]}"
        tools = '{"messages": [{"role": "assistant", "content": "a"}], "tools": [{"function": ' + deep + "}]}"
        text = json.dumps({"messages": [{"role": "assistant", "content": "a"}], "tools": deep})
        for line in (calls, tools, text):
            (tmp_path / "rows.jsonl").write_text(line)
            survives(lambda: read_rows(tmp_path / "rows.jsonl"), tmp_path)


@pytest.mark.parametrize("name", LINES)
def test_a_row_is_refused(name, tmp_path):
    line = LINES[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD.encode() + (line if isinstance(line, bytes) else line.encode()))
    refused(lambda: read_rows(path), tmp_path, r"rows\.jsonl:2: ")


def bomb(start, byte):
    """1 GiB and more in a megabyte: gzip members of one block each after the first."""
    return gzip.compress(start) + gzip.compress(byte * 2**24) * 70


TABLES = {
    "a.csv": {
        "more fields": b"prompt,completion\na,b,c\n",
        "fewer fields": b"prompt,completion\na\n",
        "no header": b"\n\n",
        "nothing": b"",
        "a header alone": b"prompt,completion\n",
        "other columns": b"x,y\na,b\n",
        "not UTF-8": b"prompt,completion\na,\xff\n",
        "UTF-16": "prompt,completion\na,b\n".encode("utf-16"),
        "an open quote": b'prompt,completion\na,"b' + b"x" * 200_000,
        "a field past the reader's limit": b"prompt,completion\na," + b"x" * 200_000 + b"\n",
        "a NUL": b"prompt,completion\n\x00,\x00\x00\n\x00",
        "an empty answer": b"prompt,completion\na,\n",
    },
    "a.tsv": {
        "more fields": b"sentence\tlabel\na\t1\t2\n",
        "fewer fields": b"sentence\tlabel\na\n",
        "not UTF-8": b"sentence\tlabel\n\xc3(\t1\n",
        "other columns": b"x\ty\na\tb\n",
    },
    "a.parquet": {
        "nothing": b"",
        "the letters alone": b"PAR1PAR1",
        "a length past the file": b"PAR1" + b"\xff\xff\xff\x7f" + b"PAR1",
        "a length below 0": b"PAR1" + b"\xff\xff\xff\xff" + b"PAR1",
        "zeros": b"PAR1" + bytes(100) + b"\x20\x00\x00\x00PAR1",
        "text": b"prompt,completion",
        "encrypted": b"PARE" + bytes(40) + b"PARE",
    },
    "a.json": {
        "an empty row": b"{}",
        "nothing": b"",
        "an empty array": b"[ ]",
        "an array in an array": b'[[{"prompt": "a", "completion": "b"}]]',
        "a row over lines": b'{\n  "prompt": "a", "completion": "b"\n}',
        "cut": b'[{"prompt": "a", "completion": "b"},',
        "cut in a row": b'[{"prompt": "a", "completion": "b"}, {"prompt": "a", "comp',
        "no comma": b'[{"prompt": "a", "completion": "b"} {"prompt": "a", "completion": "b"}]',
        "a comma at the end": b'[{"prompt": "a", "completion": "b"},]',
        "more after the end": b'[{"prompt": "a", "completion": "b"}]\n[]',
        "deep": b"[" * 100_000,
        "a huge number": b"[" + b"9" * 100_000 + b"]",
        "not UTF-8": b'[{"prompt": "\xff", "completion": "b"}]',
        "UTF-16": '[{"prompt": "a", "completion": "b"}]'.encode("utf-16"),
    },
    "a.jsonl.gz": {
        "not packed": b'{"prompt": "a", "completion": "b"}',
        "nothing": b"",
        "cut": gzip.compress(GOOD.encode() * 100)[:-9],
        "changed": gzip.compress(GOOD.encode())[:-8] + bytes(8),
        "no deflate": gzip.compress(GOOD.encode())[:10] + b"\xff" * 40,
        "a bomb": bomb(b"", b" "),
    },
    "a.json.gz": {
        "a bomb of spaces": bomb(b"[", b" "),
        "a bomb of a row": bomb(b'[{"prompt": "', b"a"),
        "a bomb after the end": bomb(b"[]", b" "),
        "a bomb of brackets": bomb(b"", b"["),
    },
    "a.csv.gz": {"a bomb": bomb(b"prompt,completion\n", b"a"), "not packed": b"prompt,completion\na,b\n"},
    "a.parquet.gz": {"packed": gzip.compress(b"PAR1")},
    "a.gz": {"no ending": gzip.compress(GOOD.encode())},
    "a.txt": {"another ending": b"{}"},
    "a": {"no ending": b"{}"},
}


@pytest.mark.parametrize(("file", "name"), [(file, name) for file, held in TABLES.items() for name in held])
def test_a_table_is_refused(file, name, tmp_path):
    if file == "a.parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / file).write_bytes(TABLES[file][name])
    refused(lambda: read_rows(tmp_path / file), tmp_path, file)


@pytest.mark.parametrize("part", range(8))
def test_a_changed_byte_of_parquet(part, tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.table({"prompt": ["a", "b"] * 20, "completion": ["c", "d"] * 20})
    parquet.write_table(table, tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    rng = np.random.default_rng(part)
    for at in rng.integers(0, len(whole), 40):
        changed = bytearray(whole)
        changed[at] = rng.integers(0, 256)
        (tmp_path / "a.parquet").write_bytes(changed)
        survives(lambda: read_rows(tmp_path / "a.parquet"), tmp_path)


@pytest.mark.parametrize("kind", ["ints", "nested", "bytes", "dictionary of ints", "no rows", "no columns"])
def test_parquet_of_other_kinds(kind, tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {
        "ints": {"prompt": [1], "completion": [2]},
        "nested": {"prompt": [{"a": [1]}], "completion": ["b"]},
        "bytes": {"prompt": [b"\xff"], "completion": ["b"]},
        "dictionary of ints": {"prompt": pa.array([7]).dictionary_encode(), "completion": ["b"]},
        "no rows": {"prompt": pa.array([], pa.string()), "completion": pa.array([], pa.string())},
        "no columns": {},
    }
    parquet.write_table(pa.table(columns[kind]), tmp_path / "a.parquet")
    refused(lambda: read_rows(tmp_path / "a.parquet"), tmp_path, r"a\.parquet")


@pytest.mark.parametrize(
    "columns",
    [
        Columns(prompt="{mr.__class__.__mro__}", completion="{ref}"),
        Columns(prompt="{mr[0]}", completion="{ref}"),
        Columns(prompt="{__class__}", completion="{ref}"),
        Columns(prompt="{0}", completion="{ref}"),
        Columns(prompt="{}", completion="{ref}"),
        Columns(prompt="{", completion="{ref}"),
        Columns(prompt="{mr:d}", completion="{ref}"),
        Columns(prompt="{mr!z}", completion="{ref}"),
        Columns(rename=("prompt",)),
        Columns(rename=("prompt=none",)),
    ],
)
def test_templates_reach_columns_only(columns, tmp_path):
    (tmp_path / "a.csv").write_text("mr,ref\na,b\n")
    refused(lambda: read_rows(tmp_path / "a.csv", columns=columns), tmp_path)


@pytest.mark.parametrize("text", [b"1\tx\ttext\n", b"1 2 3\n", b"1\tnan\xff\n", b"\x00\n", b"1\t\t\n"])
def test_snippets_are_refused(text, tmp_path):
    (tmp_path / "a.txt").write_bytes(text)
    refused(lambda: parse_snippets(tmp_path / "a.txt"), tmp_path, r"a\.txt")


def test_pipes_devices_and_folders_are_no_data(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("pipe", "zero", "loop", "folder", "absent"):
        refused(lambda name=name: read_rows(tmp_path / f"{name}.jsonl"), tmp_path, "no such data file|symbolic")
