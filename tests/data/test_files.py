"""Files of rows: packed ones, arrays, marks of order, and where their rows stand."""

import gzip
import json

import pytest

from jlora.data import Columns, DataError, files, read_rows, records

RECORDS = [{"prompt": f"p{n} ], é", "completion": f'"c{n}"'} for n in range(50)]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)


def read(path, text, **how):
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return list(records(path, **how))


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json", ".json.gz"])
def test_lines_are_read_packed_and_after_a_byte_order_mark(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    for text in (LINES, f"\ufeff{LINES}"):
        found = read(path, text)
        assert [record for _, record in found] == RECORDS and found[2][0] == f"{path}:3"
    with pytest.raises(DataError, match=r":2: not JSON: Unexpected UTF-8 BOM|:2: not JSON: Expecting value"):
        read(path, f"{{}}\n\ufeff{LINES}")


@pytest.mark.parametrize("ending", [".csv", ".csv.gz"])
def test_tables_are_read_packed(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    found = read(path, '\ufeffprompt,completion\n"x\ny",z\np,q\n')
    assert found == [
        (f"{path}:3", {"prompt": "x\ny", "completion": "z"}),
        (f"{path}:4", {"prompt": "p", "completion": "q"}),
    ]
    assert read(path, "\ufeffx,y\np,q\n", header=False)[0] == (f"{path}:1", {"1": "x", "2": "y"})
    path = tmp_path / ending.replace("csv", "tsv").replace(".tsv", "a.tsv")
    assert read(path, 'a "b\tc\n', header=False)[0][1] == {"1": 'a "b', "2": "c"}


@pytest.mark.parametrize("chunk", [1, 7, 100, 1 << 16])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_its_values_wherever_a_chunk_ends(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(files, "CHUNK", chunk)
    path = tmp_path / "a.json"
    values = [*RECORDS[:9], 12345, "text, ]", [[]], None, -1.5e10, {}]
    for text in (json.dumps(values, indent=indent), f"\ufeff \r\n{json.dumps(values, ensure_ascii=False)}\n\n"):
        assert read(path, text) == [(f"{path}[{n}]", value) for n, value in enumerate(values)]
    assert read(path, " [ \n] ") == []


def test_an_array_is_read_as_far_as_is_asked(tmp_path):
    path = tmp_path / "alpaca_data.json"
    good = json.dumps({"instruction": "Add.", "input": "1 1", "output": "2"})
    path.write_text(f"[{good}, {good}, " + "{" * 200_000)
    assert [row.completion for row in read_rows(path, limit=2)] == ["2", "2"]
    with pytest.raises(DataError, match=r"alpaca_data.json\[2\]: not JSON: Expecting property name"):
        read_rows(path)
    path.write_text(f"[{good}, {{}}]")
    with pytest.raises(DataError, match=r"alpaca_data.json\[1\]: key 'prompt' is missing"):
        read_rows(path)
    path.write_text(f"[{good}\n{good}]")
    with pytest.raises(DataError, match=r"alpaca_data.json\[0\]: not JSON: Expecting ',' or '\]'"):
        read_rows(path)
    path.write_text(f"[{good}] {good}")
    with pytest.raises(DataError, match=r"alpaca_data.json\[1\]: not JSON: text after the end of the array"):
        read_rows(path)
    path.write_text('{\n"a": 1}')
    with pytest.raises(DataError, match=r"a.json:1: not JSON: .*one array of objects, or an object a line"):
        read_rows(path)


def test_a_line_and_a_row_have_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST", 100)
    monkeypatch.setattr(files, "CHUNK", 10)
    long = json.dumps({"prompt": "p" * 200, "completion": "c"})
    for name, where in (("a.jsonl", ":2: a line of more than 100"), ("a.json.gz", r"\[1\]: no row ends within 100")):
        text = f"{{}}\n{long}" if "jsonl" in name else f"[{{}}, {long}]"
        with pytest.raises(DataError, match=where):
            read(tmp_path / name, text)
    with pytest.raises(DataError, match=":2: a line of more than 100"):
        read(tmp_path / "a.csv", "prompt\n" + "p" * 200)


def test_what_is_no_data_file_is_told(tmp_path):
    for name in ("a.parquet.gz", "a.gz", "a.txt"):
        with pytest.raises(
            DataError, match=r"a data file ends in .jsonl, .json, .csv, .tsv, .parquet \(but for the last"
        ):
            records(tmp_path / name)
    (tmp_path / "a.jsonl.gz").write_text(LINES)
    with pytest.raises(DataError, match=r"a.jsonl.gz: not gzip, or cut short: Not a gzipped file"):
        read_rows(tmp_path / "a.jsonl.gz", columns=Columns())
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode())[:-20])
    with pytest.raises(DataError, match=r"a.jsonl.gz: not gzip, or cut short"):
        read_rows(tmp_path / "a.jsonl.gz")
