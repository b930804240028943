"""`LoraConfig`: what `lorafy` does, under PEFT's field names."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

from jlora.inits import CHANGES_BASE, INITS


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The settings of one adapter; fields and defaults as in PEFT's class of the same name, where they are here.

    init_lora_weights: True (kaiming), or a name of `jlora.inits.INITS`.
    layers_to_transform: layer numbers in the paths (layers_3/..., Block_3/...); a stack of layers under scan is one
        leaf, and is adapted whole or not at all.
    lora_dropout: kept for the adapter's file; in training `combine(..., dropout=, key=)` carries it out.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: Any = "all-linear"
    exclude_modules: Any = ()
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    lora_dropout: float = 0.0
    modules_to_save: Any = ()
    layers_to_transform: tuple[int, ...] | None = None
    bias: str = "none"

    def __post_init__(self) -> None:
        """Raises ValueError naming a field of another type or range."""
        self.init_name()
        check_rank("r", self.r)
        check_number("lora_alpha", self.lora_alpha)
        check_number("lora_dropout", self.lora_dropout)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout}: it must be at least 0 and below 1")
        for name, check in (("rank_pattern", check_rank), ("alpha_pattern", check_number)):
            table: Mapping[Any, Any] = getattr(self, name)
            if not isinstance(table, Mapping) or not all(isinstance(pattern, str) for pattern in table):
                raise ValueError(f"{name}={table!r:.60}: a table of pattern: value is expected")
            for pattern, value in table.items():
                check(f"{name}[{pattern!r:.60}]", value)
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            held: Collection[Any] | Callable[..., Any] = getattr(self, name)
            if not (isinstance(held, str) or callable(held)):
                named = isinstance(held, Collection) and not isinstance(held, Mapping)
                if not named or not all(isinstance(item, str) for item in held):
                    raise ValueError(f"{name}={held!r:.60}: a name, a list of names or a predicate is expected")
        if not isinstance(self.use_rslora, bool) or not isinstance(self.bias, str):
            raise ValueError(f"use_rslora={self.use_rslora!r:.40}, bias={self.bias!r:.40}: a bool and a name")
        layers = self.layers_to_transform
        if isinstance(layers, int):  # PEFT takes a single one
            object.__setattr__(self, "layers_to_transform", (layers,))
        elif layers is not None and not all(isinstance(n, int) for n in layers):
            raise ValueError(f"layers_to_transform={layers!r:.60}: layer numbers are expected")

    def init_name(self) -> str:
        """The name in `INITS`. Raises ValueError for one that is not there."""
        name = "kaiming" if self.init_lora_weights is True else self.init_lora_weights
        if not isinstance(name, str) or name not in INITS:
            raise ValueError(f"init_lora_weights={name!r} is not known: use True or one of {', '.join(INITS)}")
        return str(name)


def keep_base(method: str, *, init: str | None = None, config: LoraConfig | None = None, **rest: Any) -> None:
    """Raises ValueError if these options of `lorafy` change the base, for a method that has factors of its own."""
    name = init or (config or LoraConfig()).init_name()
    if name in CHANGES_BASE:
        raise ValueError(f"init {name!r} takes its factors out of the base, and {method} has others: use 'kaiming'")


def check_rank(name: str, value: Any) -> None:
    """Raises ValueError for a rank that is no whole number of 1 or more."""
    try:
        whole = operator.index(value)
    except TypeError:
        whole = 0
    if whole < 1 or isinstance(value, bool):
        raise ValueError(f"{name}={value!r:.40}: the rank must be 1 or more, a whole number")


def check_number(name: str, value: Any) -> None:
    """Raises ValueError for what is no finite number."""
    try:
        good = not isinstance(value, bool | str) and math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        good = False
    if not good:
        raise ValueError(f"{name}={value!r:.40}: a finite number is expected")
