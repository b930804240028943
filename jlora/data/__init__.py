"""From files to batches: rows, tokens with a loss mask, and length buckets in a reproducible order."""

from jlora.data.batches import BatchSource, bucket_lengths, collate
from jlora.data.packing import PackedSource, pack
from jlora.data.rows import DataError, Row, read_rows
from jlora.data.snippets import movie_rows, parse_snippets, split_rows
from jlora.data.tokens import Example, tokenise, tokenise_rows

__all__ = [
    "BatchSource",
    "DataError",
    "Example",
    "PackedSource",
    "Row",
    "bucket_lengths",
    "collate",
    "movie_rows",
    "pack",
    "parse_snippets",
    "read_rows",
    "split_rows",
    "tokenise",
    "tokenise_rows",
]
