"""`LoraConfig`: what `lorafy` does, under PEFT's field names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jlora.inits import INITS


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The settings of one adapter; fields and defaults as in PEFT's class of the same name, where they are here.

    init_lora_weights: True (kaiming), or a name of `jlora.inits.INITS`.
    layers_to_transform: indices in the paths (".../layers_3/..."); a stack of layers under scan is one leaf, and is
        adapted whole or not at all.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: Any = "all-linear"
    exclude_modules: Any = ()
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    lora_dropout: float = 0.0
    modules_to_save: Any = ()
    layers_to_transform: tuple[int, ...] | None = None
    bias: str = "none"

    def __post_init__(self) -> None:
        self.init_name()
        if self.r < 1:
            raise ValueError(f"r={self.r}: the rank must be 1 or more")

    def init_name(self) -> str:
        """The name in `INITS`. Raises ValueError for one that is not there."""
        name = "kaiming" if self.init_lora_weights is True else self.init_lora_weights
        if name not in INITS:
            raise ValueError(f"init_lora_weights={name!r} is not known: use True or one of {', '.join(INITS)}")
        return str(name)
