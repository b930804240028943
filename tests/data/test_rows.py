"""Rows: what is read, and what a bad row says."""

import dataclasses
import json

import pytest

from jlora.data import Columns, DataError, classes_of, parse_snippets, rated_rows, read_rows, split_rows
from jlora.data.rows import parse_row
from jlora.data.tokens import tokenise
from tests.small import tokenizer


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
        ('{"prompt": "x", "completion": " \\n"}', "bad.jsonl:2: key 'completion' is empty"),
        ('{"prompt": "x", "chosen": "y", "rejected": " "}', "bad.jsonl:2: key 'rejected' is empty"),
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
    assert [(r.prompt, r.completion) for r in rated_rows(path)] == [
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


def test_what_a_record_is_is_told_by_its_keys():
    kinds = {
        "answer": {"prompt": "p", "completion": "c"},
        "text": {"text": "all of it"},
        "chat": {"messages": [{"role": "assistant", "content": "x"}]},
        "preference": {"prompt": "p", "chosen": "a", "rejected": "b"},
        "label": {"sentence1": "x", "sentence2": "y", "label": 1},
    }
    rows = {kind: parse_row(record, "x:1") for kind, record in kinds.items()}
    assert {kind: row.kind for kind, row in rows.items()} == {kind: kind for kind in kinds}
    assert (rows["label"].text, rows["label"].pair, rows["label"].label) == ("x", "y", 1)
    assert (rows["preference"].completion, rows["preference"].rejected) == ("a", "b")
    alpaca = parse_row({"instruction": "Add.", "input": "1 1", "output": "2"}, "x:1")
    assert alpaca.prompt == "### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n" and alpaca.completion == "2"
    for label, said in ((None, "nothing"), ("", "str ''"), (" ", "str ''"), (float("nan"), "float 'nan'")):
        with pytest.raises(DataError, match=f"x:1: key 'label' must be a class or a number, got {said}"):
            parse_row({"text": "a", "label": label}, "x:1")


def test_preferences_between_chats():
    turn = lambda role, content: {"role": role, "content": content}
    ask, good, bad = turn("user", "q"), turn("assistant", "yes"), turn("assistant", "no")
    before = [turn("user", "hello"), turn("assistant", "hi"), ask]
    whole = parse_row({"prompt": "q", "chosen": [*before, good], "rejected": [*before, bad]}, "x:1")
    after = parse_row({"prompt": before, "chosen": [good], "rejected": [bad]}, "x:1")
    assert whole == after and whole.kind == "preference" and whole.given == 3
    one, other = whole.sides
    assert (one.kind, one.messages, other.messages) == ("chat", (*before, good), (*before, bad))
    known = {"hello": "good", "hi": "bad", "q": "film", "yes": "fine"}
    turns = [{**turn, "content": known[turn["content"]]} for turn in one.messages]
    words = tokenizer()
    example = tokenise(dataclasses.replace(one, messages=tuple(turns)), words)
    assert words.decode(example.tokens[example.loss_mask]) == "fine <|im_end|>"  # not the answer before it
    for wrong, text in (
        ({"chosen": [ask, good], "rejected": [ask, good]}, "'chosen' has no assistant turn of its own"),
        ({"chosen": [ask, good], "rejected": "no"}, "'rejected' must be a list"),
        ({"prompt": [{}], "chosen": [good], "rejected": [bad]}, r"'prompt\[0\].role' must be one of"),
    ):
        with pytest.raises(DataError, match=f"x:1: key {text}"):
            parse_row(wrong, "x:1")


def test_chosen_and_rejected_come_before_messages(tmp_path):
    chat = lambda answer: [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
    record = {
        "prompt": "q",
        "chosen": chat("yes"),
        "rejected": chat("no"),
        "messages": chat("yes"),
        "score_chosen": 8.0,
    }
    path = write(tmp_path / "a.jsonl", record, {**record, "chosen": "yes", "rejected": "no"})
    whole, text = read_rows(path)
    assert (whole.kind, whole.messages, whole.rejected_messages) == ("preference", (*chat("yes"),), (*chat("no"),))
    assert (text.kind, text.completion, text.rejected) == ("preference", "yes", "no")
    for row in read_rows(path, columns=Columns(rename=("messages=messages",))):
        assert (row.kind, row.messages) == ("chat", (*chat("yes"),))
    for key in ("chosen", "rejected"):  # half a pair is none
        assert parse_row({**record, key: None}, "x:1").kind == "chat"
        with pytest.raises(DataError, match=f"x:1: key '{key}'"):
            parse_row({"prompt": "q", "chosen": "yes", "rejected": "no", key: None}, "x:1")


def test_templates_make_rows_of_other_columns(tmp_path):
    path = tmp_path / "e2e.csv"
    path.write_text("mr,ref\nname[A],It is A.\n")
    (row,) = read_rows(path, columns=Columns(prompt="{mr} ->", completion=" {ref}"))
    assert (row.prompt, row.completion) == ("name[A] ->", " It is A.")
    (row,) = read_rows(path, columns=Columns(rename=("text=mr", "label=ref")))
    assert (row.text, row.label) == ("name[A]", "It is A.")
    with pytest.raises(DataError, match=r"e2e.csv:2: prompt template names 'm'.*the row's keys: 'mr', 'ref'"):
        read_rows(path, columns=Columns(prompt="{m}", completion="{ref}"))
    path.write_text("mr,ref\nname[A],It is A.\nname[B]\n")  # a line of fewer fields
    with pytest.raises(DataError, match=r"e2e.csv:3: completion template names 'ref', which is empty in this row"):
        read_rows(path, columns=Columns(prompt="{mr}", completion="{ref}"))
    path.write_text("mr,ref\nname[A],\n")
    with pytest.raises(DataError, match=r"e2e.csv:2: key 'completion' is empty"):
        read_rows(path, columns=Columns(prompt="{mr}", completion=" {ref}"))
    with pytest.raises(DataError, match=r"e2e.csv:2: column 'x' is missing"):
        read_rows(path, columns=Columns(rename=("text=x",)))


def test_a_template_names_columns_as_they_are(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("x\tgood film\n")
    (row,) = read_rows(path, columns=Columns(prompt="{2} ->", completion=" {1}", header=False))
    assert (row.prompt, row.completion) == ("good film ->", " x")
    write(path := tmp_path / "a.jsonl", {"user.name": "good", "a[0]": "b", "": "c", "n": 1.25})
    (row,) = read_rows(path, columns=Columns(prompt="{{{user.name}}} {a[0]}{}", completion="{n:.1f} {a[0]!r:>4}"))
    assert (row.prompt, row.completion) == ("{good} bc", "1.2  'b'")
    with pytest.raises(DataError, match=r"a.jsonl:1: prompt template '\{a\[0\]:d\}'"):
        read_rows(path, columns=Columns(prompt="{a[0]:d}", completion="{n}"))


MANY = {
    "chat": {"messages": [{"role": "assistant", "content": "x"}]},
    "preference": {"chosen": "a", "rejected": "b"},
    "alpaca": {"instruction": "do", "input": "", "output": "done"},
    "label": {"text": "t", "label": 1},
}


@pytest.mark.parametrize("kind", MANY)
def test_what_is_asked_for_wins_over_a_record_s_other_keys(tmp_path, kind):
    path = write(tmp_path / "a.jsonl", {"q": "why", "a": "so", "prompt": "old", **MANY[kind]})
    for columns in (
        Columns(prompt="{q}?", completion=" {a}"),
        Columns(rename=("prompt=q",), completion=" {a}"),
        Columns(rename=("prompt=q", "completion=a")),
    ):
        (row,) = read_rows(path, columns=columns)
        assert row.kind == "answer" and row.prompt.startswith("why") and row.completion.strip() == "so"
    (row,) = read_rows(path, columns=Columns(rename=("text=q", "label=a")))
    assert (row.kind, row.text, row.label) == ("label", "why", "so")
    if kind == "preference":
        (row,) = read_rows(path, columns=Columns(prompt="{q}?"))
        assert (row.prompt, row.completion, row.rejected) == ("why?", "a", "b")


def test_renames_move_columns(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "answer", "completion": "question", "text": "t"})
    (row,) = read_rows(path, columns=Columns(rename=("prompt=completion", "completion=prompt")))
    assert (row.prompt, row.completion) == ("question", "answer")
    (row,) = read_rows(path, columns=Columns(rename=("completion=text",), prompt="{completion}"))
    assert (row.prompt, row.completion) == ("question", "t")
    with pytest.raises(DataError, match="key 'completion' is missing"):
        read_rows(path, columns=Columns(rename=("note=completion",)))
    chats = write(tmp_path / "b.jsonl", {"q": "why", **{k: MANY["chat"]["messages"] for k in ("chosen", "rejected")}})
    with pytest.raises(DataError, match=r"b.jsonl:1: a prompt template is text, and 'chosen' a chat"):
        read_rows(chats, columns=Columns(prompt="{q}"))


def test_tsv_quotes_are_text_and_parquet_gives_the_same(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "a.tsv").write_text('sentence\tlabel\na "quote\t1\nb\t0\n')
    table = pa.table({"sentence": ['a "quote', "b"], "label": [1, 0]})
    parquet.write_table(table, tmp_path / "a.parquet")
    tsv, pq = read_rows(tmp_path / "a.tsv"), read_rows(tmp_path / "a.parquet")
    assert [r.text for r in tsv] == [r.text for r in pq] == ['a "quote', "b"]
    assert classes_of(tsv) == classes_of(pq) == ["0", "1"]
    assert classes_of([parse_row({"text": "", "label": n}, "") for n in (10, 9, "b", -1)]) == ["-1", "9", "10", "b"]
    assert classes_of([parse_row({"text": "", "label": n}, "") for n in ("²", "--1", 3)]) == ["3", "--1", "²"]
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:50])
    with pytest.raises(DataError, match=r"b.parquet: not Parquet, or cut short"):
        read_rows(tmp_path / "b.parquet")


@pytest.mark.filterwarnings("ignore")
def test_a_hub_set_is_read_whole_or_streamed(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", *({"prompt": str(n), "completion": "c"} for n in range(5)))
    rows = read_rows(f"hub:{folder}")
    assert [r.prompt for r in rows] == list("01234") and rows[3].where == f"hub:{folder}[train]:3"
    assert [r.prompt for r in read_rows(f"hub:{folder}", limit=2)] == list("01")
    with pytest.raises(DataError, match=r"hub:.*\[test\]"):
        read_rows(f"hub:{folder}", split="test")
