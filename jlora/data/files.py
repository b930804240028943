"""Records of a data source one by one, each with where it stands: JSONL, CSV, TSV, Parquet, the Hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jlora.io.text import one_line


class DataError(ValueError):
    """A row that cannot be used; the message names file, line and key."""


Records = Iterator[tuple[str, Any]]


def records(source: str | Path, *, split: str = "train", stream: bool = False, header: bool = True) -> Records:
    """("file:line", record) of FILE.jsonl, .csv, .tsv, .parquet, or hub:NAME (also hub:NAME:CONFIG or a local folder).

    header: whether the first line of a .csv or .tsv names its columns; if not they are "1", "2", ...
    stream: rows of the Hub come as they are asked for, and the rest is never fetched.
    Raises FileNotFoundError for no file, DataError for one that cannot be read.
    """
    name = str(source)
    if name.startswith("hub:"):
        return _hub(name[4:], split, stream)
    path = Path(source)
    if path.suffix not in READERS:
        raise DataError(f"{path}: a data file ends in {', '.join(READERS)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such data file (give FILE{', FILE'.join(READERS)} or hub:NAME)")
    if header or path.suffix not in (".csv", ".tsv"):
        return READERS[path.suffix](path)
    return READERS[path.suffix](path, header=False)


def _jsonl(path: Path) -> Records:
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            where = f"{path}:{line}"
            try:
                text = raw.decode("utf-8")
                if text.strip():
                    yield where, json.loads(text)
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 (byte {error.start} of the line)") from None
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
            except RecursionError:
                raise DataError(f"{where}: nested too deep for a row") from None
            except ValueError as error:
                raise DataError(f"{where}: not JSON: {one_line(error)}") from None


def _csv(path: Path, header: bool = True, **dialect: Any) -> Records:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, **dialect)
        if not header:
            first = next(csv.reader(file, **dialect), [])
            reader.fieldnames = [str(n + 1) for n in range(len(first))]
            file.seek(0)
        try:
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


READERS: dict[str, Callable[..., Records]] = {".jsonl": _jsonl, ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet}


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
