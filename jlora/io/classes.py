"""The classes of an adapter's head: classes.json beside it, and what the Hub's config.json says of them."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, TypeAlias

from jlora.io.beside import put
from jlora.io.objects import read_json

FILE = "classes.json"
"""The classes' names in the order of the head's outputs; null: it gives a number."""
Classes: TypeAlias = list[str] | None
MODELS = {"bert": "Bert", "roberta": "Roberta", "deberta-v2": "DebertaV2"}
"""What transformers calls the model of a family, before ForSequenceClassification."""


def write_classes(folder: Path, classes: Classes) -> None:
    """Write classes.json beside an adapter."""
    put(folder / FILE, (json.dumps(classes) + "\n").encode())


def read_classes(folder: str | Path) -> Classes:
    """What classes.json holds. Raises ValueError where that are no names."""
    path = Path(folder) / FILE
    classes: Any = 0
    with contextlib.suppress(ValueError, RecursionError):
        classes = json.loads(path.read_text(encoding="utf-8"))
    names = isinstance(classes, list) and len(classes) > 1 and all(isinstance(name, str) for name in classes)
    if classes is not None and not names:
        raise ValueError(f"{path}: a list of the classes' names is expected, or null for a number")
    return classes


def checkpoint_classes(folder: Path) -> list[str]:
    """The names of the classes of a head of the Hub, in the order of its outputs, by config.json's id2label; or []."""
    file = folder / "config.json"
    held: Any = read_json(file).get("id2label") if file.is_file() else None
    with contextlib.suppress(AttributeError, ValueError, TypeError):
        names = [name for _, name in sorted((int(n), name) for n, name in held.items())]
        return names if all(isinstance(name, str) for name in names) else []
    return []


def in_order(found: list[str], held: list[str]) -> list[str] | None:
    """The classes of the data, `found`, as the head of a checkpoint has them, `held`: all of its, by their names in any
    case, or by their numbers where it calls them LABEL_0, LABEL_1 ...; None where they are others."""
    mine = {name.casefold(): name for name in found}
    if {name.casefold() for name in held} >= {*mine} and len(mine) == len(found):
        return [mine.get(name.casefold(), name) for name in held]
    numbers = [str(n) for n in range(len(held))]
    return numbers if held == [f"LABEL_{n}" for n in numbers] and {*found} <= {*numbers} else None


def head_for(folder: str | Path) -> dict[str, Any]:
    """How `load` reads a base for the adapter of `folder`: {head, labels} where it is of labels, else {}.

    Raises ValueError for one of labels without classes.json, as PEFT writes it, and what `read_classes` raises.
    """
    if (Path(folder) / FILE).is_file():
        classes = read_classes(folder)
        return {"head": "regress", "labels": 1} if classes is None else {"head": "classify", "labels": len(classes)}
    settings = Path(folder) / "adapter_config.json"
    if settings.is_file() and read_json(settings).get("task_type") == "SEQ_CLS":
        raise ValueError(f"{folder} is of labels: write their names into {FILE} there, in the order of the outputs")
    return {}


def hub_classes(classes: Classes, model_type: str) -> dict[str, Any]:
    """The keys of config.json by which transformers makes a model with this head."""
    names = ["LABEL_0"] if classes is None else classes
    return {
        "architectures": [f"{MODELS[model_type]}ForSequenceClassification"],
        "num_labels": len(names),
        "id2label": {str(n): name for n, name in enumerate(names)},
        "label2id": {name: n for n, name in enumerate(names)},
        "problem_type": "regression" if classes is None else "single_label_classification",
    }
