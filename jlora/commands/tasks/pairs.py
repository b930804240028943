"""Preferences: which of two answers to a prompt is better."""

from __future__ import annotations

import sys
from typing import Any

from jlora.commands.parts import method_of
from jlora.commands.settings import TrainConfig
from jlora.commands.tasks.answers import Answers
from jlora.data import BatchSource, Example, Row, bucket_lengths, tokenise_rows
from jlora.data.tokens import shortened
from jlora.inits import CHANGES_BASE
from jlora.io import Pretrained
from jlora.methods.named import lora_config
from jlora.train.preference import PairSource, preference_sums


class Pairs(Answers):
    """Preferences, by DPO or ORPO."""

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        self.started = config.loss == "dpo" and bool(config.adapter) and config.reference == "start"
        init = lora_config(method_of(config)).init_lora_weights
        if config.loss == "dpo" and init in CHANGES_BASE and not config.adapter:
            raise ValueError(f"dpo's reference is the base, and {init} changes it: use init kaiming, or loss orpo")

    def tokenised(self, rows: list[Row], base: Pretrained) -> tuple[list[Any], int]:
        each = [side for row in rows for side in row.sides]
        sides, _ = tokenise_rows(each, base.tokenizer, sys.maxsize, base.ends, single=True)
        most, bos = self.config.max_length, getattr(base.tokenizer, "bos_token_id", None)
        pairs = list(zip(sides[::2], sides[1::2], strict=True))
        cut = sum(max(len(side.tokens) for side in pair) > most for pair in pairs)
        return [cut_alike(pair, most, bos) for pair in pairs], cut

    def teaches(self, example: Any) -> bool:
        return all(map(super().teaches, example))

    def flat(self, examples: list[Any]) -> list[Example]:
        return [example for pair in examples for example in pair]

    def training(self, examples: list[Any], steps: int) -> BatchSource:
        c = self.config
        if c.packing:
            raise ValueError("packing is for answers, not for pairs of them")
        return PairSource(examples, c.batch, self.lengths(examples), seed=c.seed, steps=steps, accumulate=c.accumulate)

    def testing(self, examples: list[Any]) -> BatchSource:
        return PairSource(examples, self.config.batch, self.lengths(examples))

    def lengths(self, examples: list[Any]) -> list[int]:
        return bucket_lengths([max(pair, key=lambda e: len(e.tokens)) for pair in examples], self.config.buckets)

    def objective(self, base: Pretrained) -> Any:
        c = self.config
        return self.spread.sums(preference_sums(base.model, c.loss, c.beta, c.dropout, self.started))

    def held(self, frozen: Any, start: Any) -> Any:
        """With an adapter to go on from it is dpo's reference as it is."""
        return (frozen, start) if self.started else frozen

    def named(self, means: dict[str, float]) -> dict[str, float]:
        return {"loss": means["loss"], "accuracy": means["exact"], "examples": means["examples"]}


def cut_alike(pair: tuple[Example, Example], most: int, bos: int | None) -> tuple[Example, Example]:
    """Both sides `shortened` to at most so many tokens, each by what the longer one has to lose, so that both answers
    come after the same prompt; where all of it would go, an answer that fits keeps one token of it."""
    over = max(len(side.tokens) for side in pair) - most

    def cut(side: Example) -> Example:
        return shortened(side, min(most, len(side.tokens) - min(over, len(side.prompt) - 1)), bos)

    return (cut(pair[0]), cut(pair[1])) if over > 0 else pair
