"""Adapters read from PEFT's format: the trained tree is made from the file's own tensors, whoever wrote them.

A stack of layers is one leaf here. Layers of it that the file does not adapt get zero factors, and layers of a smaller
rank are padded with zeros: the same function.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.config import LoraConfig
from jlora.io.objects import read_json
from jlora.io.patterns import Patterns
from jlora.io.peft import MAGNITUDE, PREFIX, ROWS, module_of
from jlora.io.tensors import finite, some
from jlora.io.text import one_line
from jlora.io.tied import without_copies
from jlora.io.whole import misfit, stacked, weights_of, whole_of
from jlora.leaves import is_implicit
from jlora.lora import LoraFactors
from jlora.methods.dora import DoraFactors, with_magnitude
from jlora.methods.token_rows import TokenRows
from jlora.models.tensors import HFTensor
from jlora.tree import path_of, paths

OTHER = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How the names of PEFT's inits begin that take the factors out of the base, each time an adapter is loaded."""
KINDS = (*OTHER, *OTHER.values(), MAGNITUDE, ROWS)


def adapter_json(folder: str | Path) -> dict[str, Any]:
    """adapter_config.json. Raises FileNotFoundError without it, ValueError where it is no JSON object."""
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; an adapter folder holds it and adapter_model.safetensors")
    return read_json(path)


def read_config(folder: str | Path) -> LoraConfig:
    """The `LoraConfig` of adapter_config.json. Raises ValueError for a peft_type or a setting that is not read here."""
    path, held = Path(folder) / "adapter_config.json", adapter_json(folder)
    if held.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {held.get('peft_type')!r:.60}; this reads 'LORA'")
    for name in ("target_parameters", "layer_replication", "alora_invocation_tokens"):
        if held.get(name):
            raise ValueError(f"{path}: {name} is not read here: {held[name]!r:.60}")
    init = held.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGED_BASE):
        raise ValueError(
            f"{path}: the factors stand on a base that {init!r:.40} changed: save them again by PEFT's save_pretrained "
            "with path_initial_model_for_weight_conversion, which makes them factors of the plain base"
        )
    fields = {field.name for field in dataclasses.fields(LoraConfig)} - {"init_lora_weights"}
    try:
        return LoraConfig(**{name: held[name] for name in fields & set(held) if held[name] is not None})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from None


def read_arrays(folder: str | Path) -> dict[str, np.ndarray]:
    """The tensors of adapter_model.safetensors (or .bin), without PEFT's prefix. Raises ValueError if damaged."""
    import ml_dtypes  # noqa: F401  (safetensors.numpy knows bfloat16 only once this is imported)
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file() and (older := path.with_suffix(".bin")).is_file():
        from jlora.io.torchfile import read_bin

        path = older
        held = {name: np.asarray(x) for name, x in read_bin(older).items()}
    elif path.is_file():
        try:
            held = load_file(path)
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is cut short or no safetensors file: {one_line(error)}") from None
    else:
        raise FileNotFoundError(f"{path}: no such file; an adapter folder holds it and adapter_config.json")
    out = {name.removeprefix(PREFIX).replace(".base_layer.", "."): x for name, x in held.items()}
    if len(out) != len(held):
        raise ValueError(f"{path} holds a tensor twice, with and without {PREFIX!r}")
    bad = [name for name, x in out.items() if not finite(x)]
    if bad:
        raise ValueError(f"{path} holds NaN or infinity in {some(bad, 4)}: the training went wrong")
    return out


@dataclasses.dataclass
class Part:
    """What the file holds about one module: A [in, r], B [r, out], the scaling, and DoRA's magnitude [out] or None."""

    layer: int | None
    a: np.ndarray
    b: np.ndarray
    scaling: float
    magnitude: np.ndarray | None


def load_peft(
    folder: str | Path, params: Any, tensors: Sequence[HFTensor], dtype: Any = jnp.float32
) -> tuple[Any, Any, LoraConfig]:
    """(frozen, lora, config): an adapter's folder as `lorafy` would give the two trees for `params`.

    Full modules and biases of the file are whole trained leaves, in the file's values.
    Raises ValueError listing tensors that have no place in the model, or whose shape does not fit it.
    """
    config, settings, where = read_config(folder), adapter_json(folder), Path(folder) / "adapter_config.json"
    arrays = without_copies(read_arrays(folder), tensors, settings, where)
    found = Reading(config, settings, arrays, paths(params, is_implicit), where)
    by_name = {tensor.name: tensor for tensor in tensors}
    by_module = {module_of(t): t for t in tensors if t.name.endswith(".weight")}
    wrong = []
    for name, array in arrays.items():
        kind = next((k for k in KINDS if name.endswith(f".{k}")), None)
        module = name.removesuffix(f".{kind}") if kind else ""
        if not jnp.issubdtype(array.dtype, jnp.floating):
            wrong.append(f"{name} holds {array.dtype}, not floats")
        elif kind is None and name in by_name:
            wrong += found.whole(by_name[name], array)
        elif module not in by_module:
            wrong.append(f"{name} has no place in the model")
        elif kind == ROWS:
            wrong += found.token_rows(module, by_module[module], array, dtype)
        elif kind in OTHER:
            wrong += found.factors(module, by_module[module], array, arrays.get(f"{module}.{OTHER[kind]}"))
        elif not {f"{module}.{first}" for first in OTHER} & set(arrays):
            wrong.append(f"{name} has no A beside it")
    if wrong:
        raise ValueError(f"{folder} does not fit the model: {some(wrong, 6)}")
    frozen, lora = planted(params, found.parts, found.full, dtype)
    rows = found.rows
    place = lambda keys, leaf, entry: rows.get(path_of(keys), entry)
    placed = jax.tree_util.tree_map_with_path(place, params, lora, is_leaf=is_implicit) if rows else lora
    return frozen, placed, config


class Reading:
    """What a file's tensors are in the tree, gathered; each method gives the sentences of what does not fit."""

    def __init__(
        self,
        config: LoraConfig,
        settings: dict[str, Any],
        arrays: dict[str, np.ndarray],
        leaves: dict[str, Any],
        where: Path,
    ) -> None:
        self.config, self.arrays, self.leaves = config, arrays, leaves
        self.alphas, self.ids = Patterns(config.alpha_pattern, where), token_ids(settings, where)
        self.dora = bool(settings.get("use_dora"))
        self.parts: dict[str, list[Part]] = {}
        self.full: dict[str, list[tuple[HFTensor, np.ndarray]]] = {}
        self.rows: dict[str, TokenRows] = {}

    def whole(self, tensor: HFTensor, array: np.ndarray) -> list[str]:
        """A tensor trained whole."""
        self.full.setdefault(tensor.path, []).append((tensor, array))
        return misfit(self.leaves[tensor.path], tensor, array)

    def token_rows(self, module: str, tensor: HFTensor, array: np.ndarray, dtype: Any) -> list[str]:
        """Rows [n, d] of an embedding."""
        ids = self.ids.get(module.rpartition(".")[2], ())
        words, *d = self.leaves[tensor.path].shape
        if array.shape != (len(ids), *d) or not all(0 <= n < words for n in ids):
            return [f"{module}.{ROWS} {list(array.shape)} for {len(ids)} token ids of {words} tokens {d}"]
        self.rows[tensor.path] = TokenRows(jnp.asarray(array, dtype), ids)
        return []

    def factors(self, module: str, tensor: HFTensor, a: np.ndarray, b: np.ndarray | None) -> list[str]:
        """A [r, in], B [out, r] and the magnitude [out] of one module."""
        shape = tuple(self.leaves[tensor.path].shape[-2:])
        if b is None or not factors_fit(a, b, shape):
            have = "missing" if b is None else list(b.shape)
            return [f"{module}: A {list(a.shape)} with B {have}, for a weight [in, out] = {list(shape)}"]
        magnitude = self.arrays.get(f"{module}.{MAGNITUDE}")
        if (magnitude is not None or self.dora) and (magnitude is None or magnitude.size != shape[1]):
            have = "missing" if magnitude is None else list(magnitude.shape)
            return [f"{module}.{MAGNITUDE} {have}, for {shape[1]} outputs"]
        scaling = scaling_of(self.config, self.alphas, module, a.shape[0])
        self.parts.setdefault(tensor.path, []).append(Part(tensor.layer, a.T, b.T, scaling, magnitude))
        return []


def factors_fit(a: np.ndarray, b: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether A [r, in] and B [out, r] are of one rank, 1 or more, and of a weight [in, out] = `shape`."""
    return a.ndim == b.ndim == 2 and (a.shape[1], b.shape[0]) == shape and a.shape[0] == b.shape[1] >= 1


def token_ids(settings: dict[str, Any], where: Path) -> dict[str, tuple[int, ...]]:
    """The ids of trained rows by the embedding's last name; PEFT's list means embed_tokens."""
    held = settings.get("trainable_token_indices")
    held = {"embed_tokens": held} if isinstance(held, list) else held or {}
    lists = list(held.values()) if isinstance(held, dict) else [None]
    if not all(isinstance(ids, list) and all(type(n) is int for n in ids) for ids in lists):
        raise ValueError(f"{where}: trainable_token_indices is {held!r:.60}, not token ids")
    return {name: tuple(ids) for name, ids in held.items()}


def planted(
    params: Any, parts: dict[str, list[Part]], full: dict[str, list[tuple[HFTensor, np.ndarray]]], dtype: Any
) -> tuple[Any, Any]:
    """(frozen, lora) from what a file holds of each leaf: factors of its modules, or whole values."""
    leaves = paths(params, is_implicit)
    made: dict[str, Any] = {path: entry_of(leaves[path], found, dtype, path) for path, found in parts.items()}
    # PEFT writes an adapted embedding's own weight beside its factors: that is a base, not trained
    bases = {path: whole_of(leaves[path], full.pop(path), leaves[path].dtype) for path in set(full) & set(made)}
    made |= {path: whole_of(leaves[path], found, dtype) for path, found in full.items()}
    walk = jax.tree_util.tree_map_with_path
    tree = lambda pick: walk(lambda keys, leaf: pick(path_of(keys), leaf), params, is_leaf=is_implicit)
    lora = tree(lambda path, leaf: made.get(path))
    return tree(lambda path, leaf: None if path in full else bases.get(path, leaf)), lora


def scaling_of(config: LoraConfig, alphas: Patterns, module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r), of one module; `alphas`: the patterns of the config."""
    alpha = alphas.first(module, config.lora_alpha)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def entry_of(w: Any, found: list[Part], dtype: Any, path: str = "") -> LoraFactors | DoraFactors:
    """The factors of the leaf at `path` from its modules'."""
    scaling = found[0].scaling
    if found[0].layer is None:
        a, b, layout = found[0].a, found[0].b, "io"
    else:
        rank = max(part.a.shape[1] for part in found)
        a = np.zeros((w.shape[0], w.shape[1], rank), np.float32)
        b = np.zeros((w.shape[0], rank, w.shape[2]), np.float32)
        if not scaling and any(part.scaling for part in found):
            raise ValueError(f"{path}: alpha is 0 in some layers of the stack and not in others: give all of them one")
        for part in found:
            a[part.layer, :, : part.a.shape[1]] = part.a
            # one scaling for the stack: what is over goes into B
            b[part.layer, : part.b.shape[0]] = part.b if part.scaling == scaling else part.b * (part.scaling / scaling)
        layout = "sio"
    entry = LoraFactors(jnp.asarray(a, dtype), jnp.asarray(b, dtype), scaling, layout)
    if found[0].magnitude is None:
        return entry
    held = {part.layer: np.asarray(part.magnitude).reshape(-1) for part in found}
    norms = lambda: with_magnitude(weights_of(w, path), entry)[1].magnitude  # layers that are left out keep their own
    return DoraFactors(entry, stacked(held, w.shape[0], norms, dtype))
