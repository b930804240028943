"""PEFT's files of other methods: IA3, PROMPT_TUNING, P_TUNING and PREFIX_TUNING, written and read.

IA3 holds `base_model.model.<module>.ia3_l`, [out, 1] where outputs are scaled, [1, in] where inputs are. The others
hold one tensor `prompt_embeddings`: [n, d], what stands before the prompt (of p-tuning what its network gives), or
[n, l * 2 * e], layer by layer the keys and the values that the cache begins with. They are of decoders here: in an
encoder PEFT's head reads a virtual token, not the first real one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.io.load import Pretrained
from jlora.io.peft import PREFIX, module_of, put_adapter, targets_of
from jlora.io.whole import stacked, whole_of
from jlora.leaves import RANK
from jlora.lift import lift
from jlora.lora import Together, is_adapter
from jlora.merging import combine
from jlora.methods import full, ia3
from jlora.methods.columns import reading
from jlora.methods.plant import entries_of, leaves_of, plant
from jlora.methods.prefix import PrefixLayer, PrefixRows
from jlora.methods.prefix_kv import KeptColumns
from jlora.methods.together import flat, together
from jlora.tree import path_of

PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
EMBEDDINGS = "prompt_embeddings"


def kind_of(base: Pretrained, trained: Any) -> str | None:
    """PEFT's peft_type of a trained tree that one of these files holds exactly, or None."""
    trees = trained.trees if isinstance(trained, Together) else (trained,)
    entries = every_entry(trained)
    adapters = [x for x in entries.values() if is_adapter(x)]
    if adapters and all(isinstance(x, ia3.Ia3) for x in adapters):
        modules = {path if x.names else path.rpartition("/")[0] for path, x in entries.items() if is_adapter(x)}
        # a bias that trains itself is added after the scaling here, before it in PEFT
        beside = {path.rpartition("/")[0] for path, x in entries.items() if not is_adapter(x)} & modules
        alone = len(entries) == sum(len(entries_of(tree)) for tree in trees)
        return "IA3" if alone and not beside else None
    if len(trees) > 1 or len(entries) != 1 or not adapters or not hasattr(base.model, "init_cache"):
        return None
    if base.config.model_type.startswith("gemma"):
        return None  # it multiplies what its embedding gives by sqrt(d), and PEFT's rows are added after that
    if isinstance(adapters[0], KeptColumns):
        return "PREFIX_TUNING"
    plain = isinstance(adapters[0], PrefixRows) and adapters[0].network is None
    return "PROMPT_TUNING" if plain else None


def every_entry(trained: Any) -> dict[str, Any]:
    """The entries of all trees by path."""
    trees = trained.trees if isinstance(trained, Together) else (trained,)
    return {path: entry for tree in trees for path, entry in entries_of(tree).items()}


def save_kin(
    folder: str | Path,
    base: Pretrained,
    trained: Any,
    kind: str,
    card: Mapping[str, Any],
    task: str | None = "CAUSAL_LM",
) -> Path:
    """Write `trained`, a tree of this `kind` (`kind_of`, or "P_TUNING" for "PROMPT_TUNING"). Returns the folder."""
    arrays, told = ia3_file(base, trained) if kind == "IA3" else prompt_file(base, trained, kind)
    written = {
        "peft_type": kind,
        "task_type": task,
        "base_model_name_or_path": base.source,
        "revision": base.revision,
        "inference_mode": True,
        **told,
    }
    folder = Path(folder)
    facts = {"base model": base.source, "method": kind, **card}
    body = "".join(f"- {name}: {value}\n" for name, value in facts.items())
    text = f"---\nbase_model: {base.source}\nlibrary_name: peft\ntags: [jlora]\n---\n\n# Adapter\n\n{body}"
    put_adapter(folder, arrays, text, written)
    return folder


def ia3_file(base: Pretrained, trained: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors, settings) of IA3's vectors, and of leaves trained whole."""
    arrays: dict[str, np.ndarray] = {}
    names: dict[bool, list[str]] = {False: [], True: []}
    whole, entries = set(), every_entry(trained)
    of = {path if x.names is None else f"{path}/{x.names[0]}": x for path, x in entries.items() if is_adapter(x)}
    of |= {path: x for path, x in entries.items() if not is_adapter(x)}
    shapes = {path: leaf.shape for path, leaf in leaves_of(base.params).items()}
    for tensor in base.tensors:
        if (entry := of.get(tensor.path)) is None:
            continue
        row = lambda x, tensor=tensor: np.asarray(x if tensor.layer is None else x[tensor.layer])
        if not is_adapter(entry):
            arrays[PREFIX + tensor.name] = np.ascontiguousarray(row(entry).T if tensor.transpose else row(entry))
            # PEFT saves a classifier's parts together, under its name
            name = module_of(tensor)
            whole.add(next((part for part in name.split(".") if part in ("classifier", "score")), name))
            continue
        inputs = entry.axes[-1] == len(shapes[tensor.path]) - 2
        names[inputs].append(module_of(tensor))
        arrays[f"{PREFIX}{module_of(tensor)}.ia3_l"] = row(entry.scale).reshape((1, -1) if inputs else (-1, 1))
    lists = {inputs: targets_of(found, base.tensors) for inputs, found in names.items()}
    kernels = [t for t in base.tensors if t.path in of and t.path.endswith("/kernel")]
    return arrays, {
        "target_modules": sorted({*lists[False], *lists[True]}),
        "feedforward_modules": lists[True],
        "fan_in_fan_out": bool(kernels) and not any(t.transpose for t in kernels),
        "modules_to_save": sorted(whole) or None,
        "init_ia3_weights": True,
    }


def prompt_file(base: Pretrained, trained: Any, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors, settings) of virtual tokens, or of keys and values."""
    (entry,) = every_entry(trained).values()
    layers, heads, width = cached(base.model)
    if kind == "PREFIX_TUNING":
        both = np.stack([np.asarray(entry.keys), np.asarray(entry.values)], 1)  # [l, 2, n, e]
        rows = both.transpose(2, 0, 1, 3).reshape(both.shape[2], -1)
        told = {"encoder_hidden_size": None, "prefix_projection": False, "token_dim": heads * width}
        told |= {"num_layers": both.shape[0]}
    else:
        rows = np.asarray(entry.rows)
        told = {"token_dim": rows.shape[1], "num_layers": layers}
        told |= {"encoder_hidden_size": rows.shape[1]} if kind == "P_TUNING" else {"prompt_tuning_init": "RANDOM"}
    told |= {"num_virtual_tokens": rows.shape[0], "num_attention_heads": heads, "num_transformer_submodules": 1}
    return {EMBEDDINGS: np.ascontiguousarray(rows)}, told


def cached(model: Any) -> tuple[int, int, int]:
    """(layers, key heads, their size) of a decoder."""
    keys = jax.eval_shape(lambda: model.init_cache(1, 1))["kv"][0]
    one = keys.shape if hasattr(keys, "shape") else (len(keys), *keys[0].shape)
    return one[0], one[-3], one[-1]


def load_kin(folder: str | Path, held: Mapping[str, Any], arrays: Mapping[str, np.ndarray], base: Pretrained) -> Any:
    """(frozen, trained) of a folder with one of these kinds. Raises ValueError where it does not fit the model."""
    if held["peft_type"] == "IA3":
        return load_ia3(folder, arrays, base)
    if set(arrays) != {EMBEDDINGS} or arrays[EMBEDDINGS].ndim != 2:
        raise ValueError(f"{folder}: one tensor {EMBEDDINGS} [n, ...] is expected, not {', '.join(arrays)}")
    if not hasattr(base.model, "init_cache") or base.config.model_type.startswith("gemma"):
        raise ValueError(f"{folder}: {held['peft_type']} is read for decoders other than Gemma")
    rows = arrays[EMBEDDINGS]
    if held["peft_type"] != "PREFIX_TUNING":
        leaves = leaves_of(base.params)
        table = next(path for path in leaves if path.endswith(("embed_tokens/embedding", "wte/embedding")))
        if rows.shape[1] != leaves[table].shape[1]:
            raise ValueError(f"{folder}: rows of {rows.shape[1]} numbers for an embedding {list(leaves[table].shape)}")
        return plant(base.params, {table: (leaves[table], PrefixRows(jnp.asarray(rows)))})
    layers, heads, width = cached(base.model)
    if rows.shape[1] != layers * 2 * heads * width:
        raise ValueError(
            f"{folder}: rows of {rows.shape[1]} numbers; {layers} layers of {heads} heads of {width} need "
            f"{layers * 2 * heads * width}"
        )
    both = jnp.asarray(rows.reshape(len(rows), layers, 2, -1).transpose(2, 1, 0, 3))
    return base.params, KeptColumns(both[0], both[1])


def load_ia3(folder: str | Path, arrays: Mapping[str, np.ndarray], base: Pretrained) -> Any:
    """IA3's vectors, ones in layers of a stack that the file leaves out; full modules are whole trained leaves."""
    by_name = {tensor.name: tensor for tensor in base.tensors}
    by_module = {module_of(t): t for t in base.tensors if t.path.endswith("/kernel")}
    vectors = {name.removesuffix(".ia3_l"): x for name, x in arrays.items() if name.endswith(".ia3_l")}
    whole = {name: x for name, x in arrays.items() if not name.endswith(".ia3_l")}
    lost = sorted({*vectors} - {*by_module}) + sorted({*whole} - {*by_name})
    if lost or not vectors:
        raise ValueError(
            f"{folder} does not fit the model: no place for {', '.join(lost[:6]) or 'nothing: it is empty'}"
        )
    inputs = {by_module[name].path for name, x in vectors.items() if x.shape[0] == 1}
    outputs = {by_module[name].path for name in vectors} - inputs
    among = lambda some: (lambda path, leaf: path in some) if some else ()
    one = lambda p: ia3.make(p, targets=among(outputs), feedforward=among(inputs), layouts=base.layouts)
    saved = {by_name[name].path for name in whole}
    kept = lambda p: full.make(p, train=lambda path, leaf: path in saved)
    frozen, trained = together(base.params, kept, one) if whole else one(base.params)
    values: dict[str, Any] = {}
    for name, x in [*vectors.items(), *whole.items()]:
        tensor = by_name.get(name) or by_module[name]
        values.setdefault(tensor.path, []).append((tensor, x))

    def fill(entry: Any, path: str) -> Any:
        scaled = is_adapter(entry)
        path = path if not scaled or entry.names is None else f"{path}/{entry.names[0]}"
        shape = tuple((entry.scale if scaled else entry).shape)
        for tensor, x in values[path]:
            want = shape[0 if tensor.layer is None else 1 :]
            got = (x.size,) if scaled else x.shape[::-1] if tensor.transpose else x.shape
            if got != want:
                raise ValueError(f"{folder}: {tensor.name} {list(x.shape)} does not fit {list(want)}")
        if not scaled:
            return whole_of(entry, values[path], jnp.float32)
        held = {tensor.layer: x.reshape(-1) for tensor, x in values[path]}
        return dataclasses.replace(entry, scale=stacked(held, shape[0], lambda: jnp.ones(shape), jnp.float32))

    def tree(t: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda keys, x: fill(x, path_of(keys)), t, is_leaf=is_adapter)

    trees = tuple(tree(t) for t in trained.trees) if isinstance(trained, Together) else tree(trained)
    return frozen, flat(Together(trees)) if isinstance(trained, Together) else trees


def as_keys_and_values(base: Pretrained, frozen: Any, trained: Any) -> KeptColumns:
    """A layer prefix as what it puts into the cache: the keys and values of its columns, through the frozen weights."""
    (first, *_) = [x for x in entries_of(trained).values() if isinstance(x, PrefixLayer)]
    n = first.prefix.shape[first.axes.index(RANK)]
    model = reading(base.model, frozen, trained)
    apply = lift(model.apply)
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = combine(frozen, trained)
    _, cache = apply({"params": params}, tokens, cache=model.init_cache(1, 1), method="hidden")
    rows = lambda x: jnp.swapaxes(x[0, :, :n], 0, 1).reshape(n, -1).astype(jnp.float32)
    keys, values = (jnp.stack([rows(x) for x in every]) for every in cache["kv"])
    return KeptColumns(keys, values)
