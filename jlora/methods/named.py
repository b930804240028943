"""Every method by its name and one flat set of settings: what `jlora train --method` runs.

A method is a function of (params, settings, layouts, key) in `METHODS`; adding one is a line there. Names joined by +
make a sum: "lora+bitfit", "lora+prompt", "lora+prefix" (Hu et al., appendix E), "lora+houlsby".
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jlora.config import LoraConfig, keep_base
from jlora.lora import is_adapter, lorafy
from jlora.methods import adalora, adapter, bitfit, dora, eva, full, fused, ia3, intrinsic, prefix, prefix_kv
from jlora.methods.plant import leaves_of
from jlora.methods.points import POINTS, find
from jlora.methods.together import flat, together
from jlora.targets import targeted
from jlora.tree import Targets, slashed

EVERY = ("all-linear",)


@dataclasses.dataclass(frozen=True)
class MethodConfig:
    """What a method may be told; each reads what it knows."""

    method: str = "lora"
    """lora, rslora, lora-plus, dora, pissa, olora, eva, adalora, ia3, full, top, bitfit, norms, houlsby, pfeiffer, lin,
    parallel, prompt, p-tuning, prefix, prefix-kv, intrinsic, or a sum: lora+bitfit."""
    rank: int = 8
    """Of LoRA and its kin; alpha / rank scales them. adalora ends with it on average."""
    alpha: float = 16.0
    targets: tuple[str, ...] = EVERY
    """Of LoRA and its kin, and IA3 where given: names, regexes over parameter paths, or the groups all-linear,
    attention, mlp."""
    exclude: tuple[str, ...] = ()
    parts: str = ""
    """Of lora and lora-plus, for fused weights: which of the equal parts of each target's outputs are adapted. x-x is
    query and value of GPT-2's c_attn, the target to name."""
    dropout: float = 0.0
    """Of the adapter's input."""
    init: Literal["kaiming", "gaussian", "pissa", "olora"] = "kaiming"
    rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    width: int = 16
    """Of adapter layers (houlsby, pfeiffer, lin, parallel)."""
    drop: int = 0
    """The first layers that get no adapter layer."""
    virtual_tokens: int = 16
    """Of prompt, p-tuning, prefix and prefix-kv."""
    network: int = 128
    """Width of p-tuning's network."""
    top_layers: int = 2
    """Layers that train in top."""
    dimension: int = 1000
    """Of intrinsic, the scales counted."""
    projection: Literal["fastfood", "sparse", "dense"] = "fastfood"
    """Of intrinsic."""


Made = Callable[[Any, MethodConfig, Any, Any], tuple[Any, Any]]


def lora_config(config: MethodConfig, train: Targets = ()) -> LoraConfig:
    """LoRA's settings under PEFT's names. train: leaves to train whole."""
    names = names_of(config.method)
    init = next((name for name in ("pissa", "olora") if name in names), config.init)
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=config.targets[0] if len(config.targets) == 1 else list(config.targets),
        exclude_modules=list(config.exclude),
        use_rslora=config.rslora or "rslora" in names,
        init_lora_weights=init,
        lora_dropout=config.dropout,
        modules_to_save=train,
    )


def lora(params: Any, c: MethodConfig, layouts: Any, key: Any) -> tuple[Any, Any]:
    config = lora_config(c)
    if not c.parts:
        return lorafy(params, config=config, layouts=layouts, key=key)
    enable = [letter == "x" for letter in c.parts]
    chosen = dict.fromkeys(targeted(config, leaves_of(params), layouts), enable)
    return fused.make(params, c.rank, parts=chosen, alpha=c.alpha, layouts=layouts, key=key)


def by_dora(params: Any, c: MethodConfig, layouts: Any, key: Any) -> tuple[Any, Any]:
    return dora.with_magnitude(*lora(params, c, layouts, key))


def by_adalora(params: Any, c: MethodConfig, layouts: Any, key: Any) -> tuple[Any, Any]:
    config, first = lora_config(c), first_rank(c)
    grown = (first / c.rank) ** (0.5 if config.use_rslora else 1)  # the scaling of rank r throughout
    config = dataclasses.replace(config, r=first, lora_alpha=grown * c.alpha)
    return adalora.make(params, config=config, layouts=layouts, key=key)


def first_rank(c: MethodConfig) -> int:
    """AdaLoRA's ranks at first: half as many again (Zhang et al., section 4)."""
    return -(-3 * c.rank // 2)


def budget(c: MethodConfig, steps: int) -> adalora.Budget:
    """AdaLoRA's schedule for a run: a tenth of it with all ranks, three tenths with those it ends with."""
    return adalora.Budget(first_rank(c), c.rank, steps, steps // 10, 3 * steps // 10, max(1, steps // 100))


@dataclasses.dataclass(frozen=True)
class Sight:
    """What eva reads activations off: `apply(params, batch)`, a few batches, and the mask of a batch's columns."""

    apply: Callable[[Any, Any], Any]
    batches: Iterable[Any]
    mask: Callable[[Any], Any] | None = None


def sight_of_all(sight: Sight, params: Any) -> Sight:
    """`sight` of trees that lack weights which another method trains whole: those are `params`'."""
    whole = lambda p: jax.tree.map(lambda x, own: own if x is None else x, p, params, is_leaf=lambda x: x is None)
    return dataclasses.replace(sight, apply=lambda p, batch: sight.apply(whole(p), batch))


def by_eva(params: Any, c: MethodConfig, layouts: Any, key: Any, sight: Sight | None = None) -> tuple[Any, Any]:
    config = lora_config(c)
    if sight is None:
        keep_base("EVA", config=config)
        return lora(params, c, layouts, key)
    return eva.make(
        params, c.rank, sight.apply, sight.batches, mask=sight.mask, config=config, layouts=layouts, key=key
    )


def by_ia3(params: Any, c: MethodConfig, layouts: Any, key: Any) -> tuple[Any, Any]:
    if c.targets == EVERY:
        return ia3.make(params, layouts=layouts)
    chosen = find(c.targets, leaves_of(params), layouts, "targets")
    inputs = {path for path in chosen if re.search(POINTS["mlp out"], slashed(path))}
    outputs = set(chosen) - inputs
    among = lambda names: (lambda path, leaf: path in names) if names else ()
    return ia3.make(params, targets=among(outputs), feedforward=among(inputs), layouts=layouts)


def by_layers(kind: str) -> Made:
    """An adapter layer of one kind."""
    return lambda params, c, layouts, key: adapter.make(
        params, c.width, kind=kind, drop=c.drop, layouts=layouts, key=key
    )


METHODS: dict[str, Made] = {
    "full": lambda params, c, layouts, key: full.make(params),
    "top": lambda params, c, layouts, key: full.top(params, c.top_layers),
    "bitfit": lambda params, c, layouts, key: bitfit.make(params, layouts=layouts),
    "norms": lambda params, c, layouts, key: bitfit.norms(params),
    "intrinsic": lambda params, c, layouts, key: intrinsic.make(params, c.dimension, projection=c.projection),
    **dict.fromkeys(("lora", "rslora", "lora-plus", "pissa", "olora"), lora),
    "eva": by_eva,
    "dora": by_dora,
    "adalora": by_adalora,
    "ia3": by_ia3,
    **{kind: by_layers(kind) for kind in adapter.KINDS},
    "prompt": lambda params, c, layouts, key: prefix.embedding(params, c.virtual_tokens, key=key),
    "p-tuning": lambda params, c, layouts, key: prefix.embedding(params, c.virtual_tokens, hidden=c.network, key=key),
    "prefix": lambda params, c, layouts, key: prefix.layer(params, c.virtual_tokens, layouts=layouts, key=key),
    "prefix-kv": lambda params, c, layouts, key: prefix_kv.make(params, c.virtual_tokens, layouts=layouts, key=key),
}
"""In the order in which the parts of a sum are made: what trains leaves whole comes before what builds on them."""

LORA_KIN = ("lora", "rslora", "lora-plus", "pissa", "olora", "eva", "dora")
"""Methods whose files are PEFT's LoRA."""


def check_parts(c: MethodConfig) -> None:
    """Raises ValueError for `parts` that are none, or that the method or its other settings do not know."""
    kin = [name for name in names_of(c.method) if name in (*LORA_KIN, "adalora")]
    if set(c.parts) != {"x"} and set(c.parts) != {"x", "-"}:
        raise ValueError(f"parts = {c.parts!r:.40}: a letter for each part, x for those that are adapted, as x-x")
    if kin not in (["lora"], ["lora-plus"]) or c.init != "kaiming" or c.rslora:
        raise ValueError(
            f"parts = {c.parts!r}: only lora and lora-plus, with init kaiming and without rslora, have them"
        )
    if c.targets == EVERY:
        raise ValueError(f"parts = {c.parts!r}: name the fused weights in targets, as c_attn")


def names_of(method: str) -> list[str]:
    """The methods of a sum, in the order in which they are made. Raises ValueError for a name that is not known."""
    names = [name.strip() for name in method.split("+")]
    for name in names:
        if name not in METHODS:
            close = difflib.get_close_matches(name, METHODS) or list(METHODS)
            raise ValueError(f"method {name!r} is not known: {', '.join(close)}; or a sum, as lora+bitfit")
    if len(set(names)) < len(names):
        raise ValueError(f"method {method!r}: each once")
    if "full" in names and len(names) > 1:
        raise ValueError(f"method {method!r}: full trains every weight, nothing is left to add to")
    return sorted(names, key=list(METHODS).index)


def make(
    params: Any,
    config: MethodConfig,
    *,
    layouts: Any = None,
    train: Targets = (),
    key: Any = None,
    sight: Sight | None = None,
) -> Any:
    """(frozen, trained) by `config.method`. train: leaves to train whole beside it (a new head).

    sight: what eva looks at; without it eva starts as lora. Weights that train whole are kept in float32. Raises
    ValueError for an unknown name, and what the method raises.
    """
    names, key = names_of(config.method), jax.random.key(0) if key is None else key
    if config.parts:
        check_parts(config)

    def one(name: str) -> Callable[[Any], tuple[Any, Any]]:
        if name == "eva" and sight:
            whole = sight_of_all(sight, params)
            return lambda p: by_eva(p, config, layouts, key, whole)
        return lambda p: METHODS[name](p, config, layouts, key)

    parts: list[Callable[[Any], tuple[Any, Any]]] = [one(name) for name in names]
    if (callable(train) or list(train)) and names != ["full"]:
        parts.insert(0, lambda p: full.make(p, train=train))
    frozen, trained = parts[0](params) if len(parts) == 1 else together(params, *parts)
    wide = lambda x: x if is_adapter(x) or not jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
    return frozen, jax.tree.map(wide, flat(trained), is_leaf=is_adapter)
