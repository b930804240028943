"""From files to batches: rows, tokens with a loss mask, and length buckets in a reproducible order."""

from jlora.data.batches import BatchSource, bucket_lengths, collate
from jlora.data.files import DataError, records
from jlora.data.labels import Labelled, LabelSource, are_numbers, label_examples
from jlora.data.packing import PackedSource, pack
from jlora.data.rows import Columns, Row, classes_of, read_rows
from jlora.data.snippets import DOMAINS, parse_snippets, rated_rows, split_rows
from jlora.data.tokens import Example, tokenise, tokenise_rows

__all__ = [
    "DOMAINS",
    "BatchSource",
    "Columns",
    "DataError",
    "Example",
    "LabelSource",
    "Labelled",
    "PackedSource",
    "Row",
    "are_numbers",
    "bucket_lengths",
    "classes_of",
    "collate",
    "label_examples",
    "pack",
    "parse_snippets",
    "rated_rows",
    "read_rows",
    "records",
    "split_rows",
    "tokenise",
    "tokenise_rows",
]
