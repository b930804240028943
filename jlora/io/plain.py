"""Any trained tree in one plain form, bit for bit: for methods, and sums of them, that PEFT has no file for.

adapter_model.safetensors holds the arrays by their key paths ("layers/mlp/down_proj/kernel/down"; in a sum with the
number of the tree before it), adapter_config.json says what each is: `peft_type` "JLORA", the method's settings, the
shapes of the weights that are touched, and the trees, an entry a path. PEFT refuses such a folder by its `peft_type`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import jlora.methods.named  # noqa: F401  (every method's entries are known once it is imported)
from jlora.io.peft import put_adapter
from jlora.io.text import one_line
from jlora.lora import Adapter, LoraFactors, Together, axes_of, is_adapter
from jlora.methods.fused import FusedFactors
from jlora.methods.plant import entries_of, leaves_of, plant

KIND, FORM = "JLORA", 1


def save_plain(
    folder: str | Path,
    trained: Any,
    params: Any,
    base: str,
    settings: Mapping[str, Any],
    card: Mapping[str, Any],
    revision: str | None = None,
) -> Path:
    """Write `trained`, made for a model with the weights `params`; the folder's files are complete or absent."""
    trees = trained.trees if isinstance(trained, Together) else (trained,)
    arrays: dict[str, np.ndarray] = {}
    told: list[dict[str, Any]] = []
    for n, tree in enumerate(trees):
        lead = f"{n}/" if len(trees) > 1 else ""
        told.append(
            {path: encode(entry, f"{lead}{path}".rstrip("/"), arrays) for path, entry in entries_of(tree).items()}
        )
    touched = {path for tree in told for path in tree}
    shapes = {path: list(leaf.shape) for path, leaf in leaves_of(params).items() if under(path, touched)}
    written = {
        "peft_type": KIND,
        "form": FORM,
        "base_model_name_or_path": base,
        "revision": revision,
        "settings": dict(settings),
        "weights": shapes,
        "trees": told,
    }
    folder = Path(folder)
    lines = "".join(f"- {name}: {value}\n" for name, value in {"base model": base, **settings, **card}.items())
    text = f"---\nbase_model: {base}\ntags: [jlora]\n---\n\n# Adapter\n\n{lines}\nIt is read by jlora, not by PEFT.\n"
    put_adapter(folder, arrays, text, written)
    return folder


def under(path: str, places: set[str]) -> bool:
    """Whether one of `places` is this path or a module around it ("" is the whole tree)."""
    return any(place in ("", path) or path.startswith(f"{place}/") for place in places)


def encode(value: Any, key: str, arrays: dict[str, np.ndarray]) -> Any:
    """What JSON can say of an entry; its arrays go to `arrays` by key."""
    if dataclasses.is_dataclass(value):
        fields = {
            f.name: encode(getattr(value, f.name), f"{key}/{f.name}".lstrip("/"), arrays)
            for f in dataclasses.fields(value)
        }
        return {"kind": type(value).__name__, "fields": fields}
    if isinstance(value, Mapping):
        return {"dict": {str(name): encode(x, f"{key}/{name}", arrays) for name, x in value.items()}}
    if isinstance(value, tuple | list):
        return {"tuple": [encode(x, f"{key}/{n}", arrays) for n, x in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    arrays[key] = np.asarray(value, order="C")
    return {"array": key, "shape": list(arrays[key].shape)}


def kinds() -> dict[str, type]:
    """The entries there are, by name: every subclass of `Adapter` that is imported."""
    found: dict[str, type] = {}
    todo = [Adapter]
    while todo:
        cls = todo.pop()
        found[cls.__name__] = cls
        todo += cls.__subclasses__()
    return found


def decode(told: Any, arrays: Mapping[str, np.ndarray], known: Mapping[str, type]) -> Any:
    """The value again. Raises ValueError for an entry that is not known, or an array that is missing or misshapen."""
    if not isinstance(told, dict):
        return told
    if "array" in told:
        array = arrays.get(told["array"])
        if array is None or list(array.shape) != told["shape"]:
            have = "missing" if array is None else list(array.shape)
            raise ValueError(f"{told['array']} is {have}, {told['shape']} is written in adapter_config.json")
        return jnp.asarray(array)
    if "tuple" in told:
        return tuple(decode(x, arrays, known) for x in told["tuple"])
    if "dict" in told:
        return {name: decode(x, arrays, known) for name, x in told["dict"].items()}
    if not isinstance(told.get("kind"), str) or told["kind"] not in known:
        raise ValueError(f"an entry of kind {told.get('kind')!r} is not known: import the module that defines it")
    fields = {name: decode(x, arrays, known) for name, x in told["fields"].items()}
    made = known[told["kind"]](**fields)
    for field in dataclasses.fields(made):
        value = getattr(made, field.name)
        if not right_kind(value, str(field.type), field.metadata.get("static", False)):
            raise ValueError(f"{told['kind']}.{field.name} is {value!r:.60}, not {field.type}")
    return made


def right_kind(value: Any, kind: str, static: bool) -> bool:
    """Whether an entry's field holds what it should: settings of their type, arrays (or trees of them) elsewhere."""
    if not static:
        return not isinstance(value, bool | int | float | str)
    if isinstance(value, bool) or kind not in ("float", "int", "str"):
        return kind not in ("float", "int", "str")
    if kind == "str":
        return isinstance(value, str)
    return isinstance(value, int if kind == "int" else int | float) and math.isfinite(value)


def check_factors(path: str, entry: Any, shape: list[int] | None) -> None:
    """Raises ValueError for what is no entry, and for factors that are not of the weight they stand at."""
    if not is_adapter(entry) and not hasattr(entry, "shape"):
        raise ValueError(f"what stands at {one_line(path, 80)} is a {type(entry).__name__}")
    inner = getattr(entry, "lora", entry)
    if isinstance(inner, FusedFactors):
        if not isinstance(inner.enable, tuple) or not {*inner.enable} <= {True, False}:
            raise ValueError(f"the parts at {path} are {inner.enable!r:.60}")
        inner = inner.settled()
    if shape is None or not isinstance(inner, LoraFactors):
        return
    a, b = (list(x.shape) for x in (inner.lora_a, inner.lora_b))
    want = {letter: [shape[n] for n in axes_of(inner.layout, letter)] for letter in "sio"} if fits(inner, shape) else {}
    if not want or a[:-1] != want["s"] + want["i"] or b != [*want["s"], a[-1], *want["o"]]:
        raise ValueError(f"the factors at {path} are {a} and {b} with axes {inner.layout!r:.20}, for a weight {shape}")


def fits(entry: LoraFactors, shape: list[int]) -> bool:
    return len(entry.layout) == len(shape) and set(entry.layout) <= set("sio") and len(entry.lora_a.shape) > 0


def load_plain(folder: str | Path, held: Mapping[str, Any], arrays: Mapping[str, np.ndarray], params: Any) -> Any:
    """(frozen, trained) for `params` from adapter_config.json (`held`) and the arrays.

    Raises ValueError for another form, weights of other shapes, and what `decode` raises.
    """
    path = Path(folder) / "adapter_config.json"
    if held.get("form") != FORM:
        raise ValueError(f"{path}: form {held.get('form')!r} is not read here: {FORM} is")
    shapes = {name: list(leaf.shape) for name, leaf in leaves_of(params).items()}
    told = held.get("weights", {}), held.get("trees", [])
    if not isinstance(told[0], Mapping) or not isinstance(told[1], list) or not told[1]:
        raise ValueError(f"{folder} is damaged: 'trees' must be a list that is not empty, 'weights' an object")
    wrong = [
        f"{name} {shape} is {shapes.get(name, 'not there')}"
        for name, shape in held.get("weights", {}).items()
        if shapes.get(name) != shape
    ]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(f"{folder} does not fit the model: {one_line('; '.join(wrong[:4]) + more)}")
    known, trees = kinds(), []
    try:
        for told in held["trees"]:
            entries = {name: decode(entry, arrays, known) for name, entry in told.items()}
            for name, entry in entries.items():
                check_factors(name, entry, shapes.get(name))
            params, trained = planted(params, entries)
            trees.append(trained)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"{folder} is damaged: {one_line(error)}") from None
    return params, trees[0] if len(trees) == 1 else Together(tuple(trees))


def planted(params: Any, entries: Mapping[str, Any]) -> tuple[Any, Any]:
    """(frozen, trained) with these entries; arrays are leaves trained whole."""
    if set(entries) == {""}:
        return params, entries[""]
    leaves = leaves_of(params)
    return plant(params, {p: (leaves.get(p) if is_adapter(x) else None, x) for p, x in entries.items()})
