"""Preferences: which of two answers to a prompt is better."""

from __future__ import annotations

from typing import Any

from jlora.commands.parts import method_of
from jlora.commands.settings import TrainConfig, say
from jlora.commands.tasks.answers import Answers
from jlora.data import BatchSource, Example, Row, bucket_lengths, tokenise_rows
from jlora.inits import CHANGES_BASE
from jlora.io import Pretrained
from jlora.methods.named import lora_config
from jlora.train.preference import PairSource, preference_sums


class Pairs(Answers):
    """Preferences, by DPO or ORPO."""

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        init = lora_config(method_of(config)).init_lora_weights
        if config.loss == "dpo" and init in CHANGES_BASE and not config.adapter:
            raise ValueError(f"dpo's reference is the base, and {init} changes it: use init kaiming, or loss orpo")

    def tokenised(self, rows: list[Row], base: Pretrained) -> tuple[list[Any], int]:
        sides, cuts = [], 0
        for alone in zip(*(row.sides for row in rows), strict=True):
            side, cut = tokenise_rows(alone, base.tokenizer, self.config.max_length, base.ends, single=True)
            sides, cuts = [*sides, side], cuts + cut
        return list(zip(*sides, strict=True)), cuts

    def teaches(self, example: Any) -> bool:
        return all(map(super().teaches, example))

    def flat(self, examples: list[Any]) -> list[Example]:
        return [example for pair in examples for example in pair]

    def training(self, examples: list[Any], steps: int) -> BatchSource:
        c = self.config
        if c.packing:
            raise ValueError("packing is for answers, not for pairs of them")
        if c.loss == "dpo" and c.adapter:
            say(f"dpo's reference is the base without {c.adapter}; to be it, an adapter is merged first (jlora merge)")
        return PairSource(examples, c.batch, self.lengths(examples), seed=c.seed, steps=steps, accumulate=c.accumulate)

    def testing(self, examples: list[Any]) -> BatchSource:
        return PairSource(examples, self.config.batch, self.lengths(examples))

    def lengths(self, examples: list[Any]) -> list[int]:
        return bucket_lengths([max(pair, key=lambda e: len(e.tokens)) for pair in examples], self.config.buckets)

    def objective(self, base: Pretrained) -> Any:
        return self.spread.sums(preference_sums(base.model, self.config.loss, self.config.beta, self.config.dropout))

    def named(self, means: dict[str, float]) -> dict[str, float]:
        return {"loss": means["loss"], "accuracy": means["exact"], "examples": means["examples"]}
