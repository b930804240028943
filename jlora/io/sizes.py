"""A config as a family reads it, its sizes checked: a file from anywhere may say anything."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora.io.text import one_line

LARGEST = 2**24
"""Of any size in a config; the largest in use are vocabularies of some 262,000 and windows of ten million."""
MOST_LAYERS = 4096
POSITIVE = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
POSITIVE += ("n_embd", "n_head", "n_positions", "max_position_embeddings")
UNSET = ("max_relative_positions", "position_buckets")
"""Where the Hub's configs write -1 for none, as every DeBERTa's does."""


def checked_config(family: Any, hub: Mapping[str, Any], where: object) -> Any:
    """`family.from_hf(hub)`. Raises ValueError naming `where` for a field that is missing, of another type or no
    possible size."""
    for field in dataclasses.fields(family):  # before anything of such a size is made
        value = hub.get(field.name)
        none = value == -1 and field.name in UNSET
        if str(field.type).startswith("int") and value is not None and not (none or fits(value, "int")):
            raise ValueError(f"{where}: {field.name} is {value!r:.60}, no size of a model")
    try:
        with np.errstate(all="raise"):
            config = family.from_hf(hub)
    except KeyError as error:
        raise ValueError(f"{where} lacks {one_line(error)}") from None
    except (TypeError, ArithmeticError, AttributeError, IndexError) as error:
        raise ValueError(f"{where}: a field is of another type or size than its family's: {one_line(error)}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {one_line(error)}") from None
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not (fits(value, str(field.type)) or (value == -1 and field.name in UNSET)):
            raise ValueError(f"{where}: {field.name} is {value!r:.60}, not {field.type} in its range")
    none = [name for name in POSITIVE if getattr(config, name, None) is not None and getattr(config, name) < 1]
    if none:
        raise ValueError(f"{where}: {none[0]} is {getattr(config, none[0])}; it is 1 or more")
    if not 0 < config.num_hidden_layers <= MOST_LAYERS:
        raise ValueError(f"{where}: {config.num_hidden_layers} layers; 1 to {MOST_LAYERS} are possible")
    return config


def fits(value: Any, kind: str) -> bool:
    """Whether `value` is of the annotated type, and a number in a config's range."""
    kind, _, rest = kind.partition(" | ")
    if value is None:
        return rest == "None"
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST
    if kind == "float":
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    return isinstance(value, {"bool": bool, "str": str}.get(kind, object))
