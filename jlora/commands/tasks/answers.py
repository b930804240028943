"""Answers to prompts, turns of chats, and text: the task that the others change."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.commands.parts import batches_of, objective, optimiser_of
from jlora.commands.settings import TrainConfig, say, scheme
from jlora.commands.share import shared
from jlora.commands.spread import Spread, spread_of
from jlora.data import BatchSource, DataError, Example, Row, bucket_lengths, tokenise_rows
from jlora.data.batches import label_count
from jlora.data.template import template_for, write_template
from jlora.io import Pretrained
from jlora.methods.named import Sight
from jlora.train import TrainState, answer_sums, evaluate, init_state, make_eval_step, make_train_step
from jlora.train.loop import Stop

REMAT: dict[str, Any] = {"none": False, "full": True, "dots": "dots", "offload": "offload"}
SEEN = 8
"""Batches that eva looks at."""
Judge = Callable[[Any, Any, BatchSource, Stop, Callable[[int], None]], dict[str, float]]
"""f(trained, held, batches, stop, progress) -> figures, `held` as a task has it; raises `Interrupted` once `stop()`."""


class Answers:
    """Answers to prompts, turns of chats, and text, by a decoder."""

    head: str | None = None
    labels: int | None = None
    whole: tuple[str, ...] = ()
    """Modules that train whole."""

    def __init__(self, config: TrainConfig):
        self.config, self.cut, self.spread = config, 0, Spread()
        self.template = template_for(config.chat_template, config.adapter)

    def load(self) -> Pretrained:
        """The model as the settings want it."""
        c = self.config
        kinds: dict[str, Any] = {"dtype": jnp.dtype(c.dtype), "remat": REMAT[c.remat]}
        kinds |= {"quantise": scheme(c.quantise), "head": self.head, "labels": self.labels}
        base, self.spread = spread_of(c, kinds)
        if base.tokenizer is None:
            raise ValueError(f"{base.source} has no tokenizer: rows of text need tokenizer.json beside the weights")
        return base.speaking(self.template)

    def examples(self, rows: list[Row], base: Pretrained, name: str) -> list[Any]:
        """The rows as the model reads them, but those whose cut leaves nothing to learn; says how many were cut, which
        `cut` counts, and left out. Raises DataError where none is left."""
        most = self.config.max_length
        found, cut = shared(rows, lambda part: self.tokenised(part, base))
        if cut:
            say(f"{name}: {cut} of {len(rows)} rows were cut to max_length = {most}")
        self.cut += cut
        good = [example for example in found if self.teaches(example)]
        if not good:
            raise DataError(f"{name}: there is nothing to learn from its rows within max_length = {most}")
        if lost := len(found) - len(good):
            say(f"{name}: {lost} of {len(found)} examples are left out: the cut leaves nothing to learn in them")
        self.fits(base, good)
        return good

    def fits(self, base: Pretrained, examples: list[Any]) -> None:
        """Raises ValueError for tokens or positions that the model lacks; once it has its prefix, that takes some."""
        flat = self.flat(examples)
        base.check(max(len(e.tokens) for e in flat), max(int(e.tokens.max(initial=0)) for e in flat))

    def tokenised(self, rows: list[Row], base: Pretrained) -> tuple[list[Any], int]:
        """(examples, how many were cut)."""
        found, cut = tokenise_rows(rows, base.tokenizer, self.config.max_length, base.ends)
        if not self.config.completion_only_loss:
            found = [Example(e.tokens, np.ones(len(e.tokens), bool)) for e in found]
        return found, cut

    def teaches(self, example: Any) -> bool:
        """Whether there is anything to learn from it."""
        return label_count(example) > 0

    def flat(self, examples: list[Any]) -> list[Example]:
        """The examples' token sequences one by one."""
        return examples

    def training(self, examples: list[Any], steps: int) -> BatchSource:
        return batches_of(self.config, examples, steps, self.spread.own(self.config.batch))

    def testing(self, examples: list[Any]) -> BatchSource:
        """All of them once, in order."""
        c, own = self.config, self.spread.own(self.config.batch)
        return BatchSource(examples, c.batch, bucket_lengths(examples, c.buckets), own=own)

    def sight(self, base: Pretrained, examples: list[Any]) -> Sight:
        """What eva looks at: the model on the first batches of training. Raises ValueError for several processes."""
        if jax.process_count() > 1:
            raise ValueError("eva looks at whole batches: one process")
        many, parts = [self.training(examples, SEEN)[n] for n in range(SEEN)], self.config.accumulate
        if parts > 1:
            many = [{name: x[n] for name, x in batch.items()} for batch in many for n in range(parts)]
        return Sight(self.sees(base), many[:SEEN], lambda batch: batch["mask"])

    def sees(self, base: Pretrained) -> Callable[[Any, Any], Any]:
        """f(params, batch): anything that runs the whole model."""
        return answer_sums(base.model)

    def objective(self, base: Pretrained) -> Any:
        """(trained, frozen, batch, key or None) -> `Sums`: with a key the training loss, without it the plain one."""
        return self.spread.sums(objective(self.config, base))

    def held(self, frozen: Any, start: Any) -> Any:
        """What the objective takes for the frozen tree. start: the trained tree before the first step."""
        return frozen

    def judge(self, base: Pretrained) -> Judge:
        step = self.spread.step(make_eval_step(self.objective(base)))

        def judge(trained: Any, held: Any, batches: BatchSource, stop: Stop, progress: Any) -> dict[str, float]:
            return self.named(evaluate(step, trained, held, watched(batches, progress), stop))

        return judge

    def named(self, means: dict[str, float]) -> dict[str, float]:
        """An evaluation's figures from the `means` of its sums."""
        return {**means, "perplexity": math.exp(min(means["loss"], 700.0))}

    def planned(self, examples: list[Any]) -> BatchSource:
        """`training` for all of the run: `steps`, or what `epochs` passes over the examples take."""
        source = self.training(examples, self.config.steps or 1)
        source.steps = self.config.steps or max(1, round(self.config.epochs * source.per_epoch))
        return source

    def steps(self, examples: list[Any]) -> int:
        """Of the run."""
        return len(self.planned(examples))

    def begin(self, base: Pretrained, start: Any, steps: int) -> tuple[TrainState, Callable[..., Any]]:
        """(the state before the first step, the compiled `step(state, held, batch)` on batches as `spread` splits
        them). start: the trained tree, or its shapes, which give the state's. base: with the model as it is run."""
        c, tx = self.config, optimiser_of(self.config, steps)
        first = functools.partial(init_state, tx=tx)
        shapes = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(start))
        state = self.spread.state(jax.eval_shape(first, start) if shapes else first(start))
        lies = self.spread.lies(state)
        return state, make_train_step(self.objective(base), tx, seed=c.seed, accumulate=c.accumulate, lies=lies)

    def digest(self, examples: list[Any]) -> int:
        """A checksum of the tokens and of what is learned about them, to tell one data set from another."""
        value = 0
        for example in self.flat(examples):
            value = zlib.crc32(example.loss_mask.tobytes(), zlib.crc32(example.tokens.tobytes(), value))
        return value

    def asked(self, rows: list[Row]) -> list[Row]:
        """The rows whose prompts a model can answer."""
        return [row for row in rows if row.prompt or row.messages]

    def beside(self, folder: Path) -> None:
        """Write what else belongs into an adapter's folder."""
        write_template(folder, self.template)


def watched(batches: BatchSource, progress: Callable[[int], None]) -> Any:
    """The batches one by one; `progress(n)` after the n-th is used."""
    for n in range(len(batches)):
        yield batches[n]
        progress(n + 1)
