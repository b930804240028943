"""Records of a data source one by one, each with where it stands: JSONL, JSON, CSV, TSV, Parquet, the Hub."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, AnyStr, BinaryIO, TextIO, cast

from jlora.io.text import one_line


class DataError(ValueError):
    """A row that cannot be used; the message names file, line and key."""


Records = Iterator[tuple[str, Any]]
LARGEST = 1 << 26
"""Characters of a line or of one row of an array: a packed file can hold far more than its size."""
CHUNK = 1 << 16
DECODER = json.JSONDecoder()
SPACE = re.compile(r"[ \t\n\r]*")
END = object()


def records(source: str | Path, *, split: str = "train", stream: bool = False, header: bool = True) -> Records:
    """("file:line", record) of FILE.jsonl, .json (an array, or an object a line), .csv, .tsv (each also .gz), .parquet,
    or hub:NAME (also hub:NAME:CONFIG or a local folder).

    header: whether the first line of a .csv or .tsv names its columns; if not they are "1", "2", ...
    stream: rows of the Hub come as they are asked for, and the rest is never fetched.
    Raises FileNotFoundError for no file, DataError for one that cannot be read.
    """
    name = str(source)
    if name.startswith("hub:"):
        return _hub(name[4:], split, stream)
    path = Path(source)
    packed = path.suffix == ".gz"
    ending = Path(path.stem).suffix if packed else path.suffix
    if ending not in READERS or (packed and ending == ".parquet"):
        raise DataError(f"{path}: a data file ends in {', '.join(READERS)} (but for the last also with .gz after it)")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such data file (give FILE{', FILE'.join(READERS)} or hub:NAME)")
    plain = header or ending not in (".csv", ".tsv")
    found = READERS[ending](path) if plain else READERS[ending](path, header=False)
    return _unpacked(found, path) if packed else found


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb"))


def _text(path: Path) -> TextIO:
    return io.TextIOWrapper(_opened(path), encoding="utf-8-sig", newline="")


def _unpacked(found: Records, path: Path) -> Records:
    try:
        yield from found
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not gzip, or cut short: {one_line(error)}") from None


def _lines(file: IO[AnyStr], path: Path) -> Iterator[AnyStr]:
    """The lines of a file. Raises DataError for one of more than `LARGEST`."""
    number = 0
    while line := file.readline(LARGEST + 1):
        number += 1
        if len(line) > LARGEST:
            raise DataError(f"{path}:{number}: a line of more than {LARGEST:,} characters is no row")
        yield line


def _jsonl(path: Path, hint: str = "") -> Records:
    with _opened(path) as file:
        for line, raw in enumerate(_lines(file, path), start=1):
            where = f"{path}:{line}"
            try:
                text = (raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw).decode("utf-8")
                if text.strip():
                    yield where, json.loads(text)
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 (byte {error.start} of the line)") from None
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}{hint}") from None
            except RecursionError:
                raise DataError(f"{where}: nested too deep for a row") from None
            except ValueError as error:
                raise DataError(f"{where}: not JSON: {one_line(error)}") from None


def _json(path: Path) -> Records:
    with _opened(path) as file:
        start = file.read(1 << 12).removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"["):
        yield from _array(path)
    else:
        yield from _jsonl(path, " (a .json file holds one array of objects, or an object a line)")


def _array(path: Path) -> Records:
    """The values of one array as they are asked for; `path[n]`: the one of index n."""
    text, at, number, ended = "", 0, 0, False
    with _text(path) as file:
        while True:
            where = f"{path}[{number}]"
            try:
                value, end = _item(text, at, number == 0)
                problem = ""
            except (ValueError, RecursionError) as error:
                value, end, problem = END, len(text), one_line(getattr(error, "msg", error))
            if end == len(text) and not ended:  # whatever was found may go on in what is not read yet
                if end - at > LARGEST:
                    raise DataError(f"{where}: no row ends within {LARGEST:,} characters: {problem or 'white space'}")
                more = _more(file, max(CHUNK, end - at), where)
                text, at, ended = text[at:] + more, 0, not more
                continue
            if problem or (value is END and end < len(text)):
                raise DataError(f"{where}: not JSON: {problem or 'text after the end of the array'}")
            if value is END:
                return
            yield where, value
            at, number = end, number + 1


def _item(text: str, at: int, first: bool) -> tuple[Any, int]:
    """(the value after the bracket or comma at `at`, or END, and where what follows begins). Raises JSONDecodeError."""
    at, opening = _after_space(text, at), "[" if first else ","
    if not first and text.startswith("]", at):
        return END, _after_space(text, at + 1)
    if not text.startswith(opening, at):
        raise json.JSONDecodeError(f"Expecting {opening!r}", text, at)
    at = _after_space(text, at + 1)
    if first and text.startswith("]", at):
        return END, _after_space(text, at + 1)
    value, at = DECODER.raw_decode(text, at)
    at = _after_space(text, at)
    if at < len(text) and text[at] not in ",]":
        raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    return value, at


def _after_space(text: str, at: int) -> int:
    match = SPACE.match(text, at)
    return match.end() if match else at


def _more(file: TextIO, size: int, where: str) -> str:
    try:
        return file.read(size)
    except UnicodeDecodeError:
        raise DataError(f"{where}: not UTF-8, here or soon after") from None


def _csv(path: Path, header: bool = True, **dialect: Any) -> Records:
    with _text(path) as file:
        reader = csv.DictReader(_lines(file, path), **dialect)
        try:
            if not header:
                first = next(csv.reader(_lines(file, path), **dialect), [])
                reader.fieldnames = [str(n + 1) for n in range(len(first))]
                file.seek(0)
            for record in reader:
                where = f"{path}:{reader.line_num}"
                if None in record:
                    raise DataError(f"{where}: more fields than the {len(reader.fieldnames or ())} of the header")
                yield where, record
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{reader.line_num + 1}: not UTF-8 (byte {error.start})") from None
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num + 1}: {one_line(error)}: JSONL has no such limit") from None


def _tsv(path: Path, header: bool = True) -> Records:
    # quotes in tab-separated sets (GLUE) are text, and often stand alone
    return _csv(path, header, delimiter="\t", quoting=csv.QUOTE_NONE)


def _parquet(path: Path) -> Records:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ImportError(f'{path} needs pyarrow: pip install "jlora[data]"') from None
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", record
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not Parquet, or cut short: {one_line(error)}") from None


READERS: dict[str, Callable[..., Records]] = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _tsv}
READERS[".parquet"] = _parquet


def _hub(name: str, split: str, stream: bool) -> Records:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise ImportError(f'hub:{name} needs the datasets package: pip install "jlora[data]"') from None
    name, _, config = name.partition(":")
    try:
        held = datasets.load_dataset(name, config or None, split=split, streaming=stream)
        for n, record in enumerate(held):
            yield f"hub:{name}[{split}]:{n}", record
    except (ValueError, OSError, DatasetsError) as error:
        raise DataError(f"hub:{name}[{split}]: {one_line(error)}") from None
