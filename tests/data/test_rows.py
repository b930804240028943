"""Rows: what is read, and what a bad row says."""

import json

import pytest

from jlora.data import DataError, movie_rows, parse_snippets, read_rows, split_rows


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_jsonl_and_csv_give_the_same_rows(tmp_path):
    jsonl = write(tmp_path / "a.jsonl", {"prompt": "x, y", "completion": " z"}, {"prompt": "p", "completion": "q"})
    (tmp_path / "a.csv").write_text('prompt,completion\n"x, y", z\np,q\n')
    rows, table = read_rows(jsonl), read_rows(tmp_path / "a.csv")
    assert (
        [(r.prompt, r.completion) for r in rows]
        == [(r.prompt, r.completion) for r in table]
        == [("x, y", " z"), ("p", "q")]
    )
    assert rows[1].where.endswith("a.jsonl:2") and table[1].where.endswith("a.csv:3")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "x"}', r"bad.jsonl:2: key 'completion' is missing \(the row's keys: 'prompt'\)"),
        ('{"prompt": 3, "completion": "y"}', r"bad.jsonl:2: key 'prompt' must be text, got int '3'"),
        ('{"prompt": "x", "completion": ""}', "bad.jsonl:2: key 'completion' is empty"),
        ('{"prompt": ', "bad.jsonl:2: not JSON"),
        ("[1]", "bad.jsonl:2: a row is an object"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', r"bad.jsonl:2: key 'messages\[0\].role'"),
        (
            '{"messages": [{"role": "assistant"}]}',
            r"bad.jsonl:2: key 'messages\[0\].content' must be text, got nothing",
        ),
        ('{"messages": [{"role": "user", "content": "x"}]}', "bad.jsonl:2: key 'messages' has no assistant turn"),
    ],
)
def test_a_bad_row_names_file_line_and_key(tmp_path, line, says):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "x", "completion": "y"}\n' + line + "\n")
    with pytest.raises(DataError, match=says):
        read_rows(path)


def test_snippets(tmp_path):
    path = tmp_path / "movie.txt"
    path.write_bytes(b"1\t2.25\tA joy.\r\n2\t-0.5\tMeh.\r\n3\t-1.0\tA bore.\r\n")
    assert parse_snippets(path)[1] == (-0.5, "Meh.")
    assert [(r.prompt, r.completion) for r in movie_rows(path)] == [
        ("Review: A joy.\nSentiment:", " positive"),
        ("Review: A bore.\nSentiment:", " negative"),
    ]
    path.write_text("1 2.25 no tabs\n")
    with pytest.raises(DataError, match=r"movie.txt:1: expected id<TAB>rating"):
        parse_snippets(path)


def test_split_depends_on_the_seed_alone(tmp_path):
    rows = read_rows(write(tmp_path / "a.jsonl", *({"prompt": str(n), "completion": "y"} for n in range(50))))
    train, held = split_rows(rows, 10, seed=1)
    assert (train, held) == split_rows(rows, 10, seed=1) != split_rows(rows, 10, seed=2)
    assert sorted(r.prompt for r in train + held) == sorted(r.prompt for r in rows) and len(held) == 10
