"""Sentences and pairs of sentences with a class or a number, by an encoder's head."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jlora
from jlora.commands.parts import trained_or_judged
from jlora.commands.settings import TrainConfig, say
from jlora.commands.tasks.answers import Answers, Judge, watched
from jlora.data import BatchSource, DataError, LabelSource, Row, are_numbers, bucket_lengths, classes_of, label_examples
from jlora.data.labels import class_weights
from jlora.io import Pretrained
from jlora.io.classes import FILE, Classes, checkpoint_classes, in_order, read_classes, write_classes
from jlora.io.load import locate
from jlora.io.tensors import some
from jlora.train.labels import label_figures, label_sums, outputs
from jlora.train.loop import Interrupted, Stop
from jlora.train.metrics import text_metric


class Labels(Answers):
    """Sentences and pairs of sentences with a class or a number, by an encoder's head, which trains whole."""

    def __init__(self, config: TrainConfig, rows: Sequence[Row]):
        super().__init__(config)
        self.known: list[str] | None = None
        if config.chat_template:
            raise ValueError(f"chat_template = {config.chat_template}: labels are of no chats, leave it out")
        if not config.completion_only_loss:
            raise ValueError("completion_only_loss is of answers, not of labels: leave it out")
        if config.adapter and (Path(config.adapter) / FILE).is_file():
            self.classes: Classes = read_classes(config.adapter)
        else:
            numbers = config.labels == "numbers" or (config.labels == "auto" and are_numbers(rows))
            found = [] if numbers else self.found(rows)
            self.known = in_order(found, checkpoint_classes(locate(config.model)))
            self.classes = None if numbers else self.known or found
        self.head = "regress" if self.classes is None else "classify"
        self.labels = 1 if self.classes is None else len(self.classes)
        for name in ("label_smoothing", "z_loss", "class_weights") if self.classes is None else ():
            if getattr(config, name):
                raise ValueError(f"{name} is of classes, and the labels of {config.data} are numbers: leave it out")
        self.weights = class_weights(config.class_weights, self.classes or (), rows) if config.class_weights else None

    def found(self, rows: Sequence[Row]) -> list[str]:
        """The classes of the rows. Raises DataError for a single one."""
        classes = classes_of(rows)
        if len(classes) == 1:
            raise DataError(f"{self.config.data}: every row has the label {classes[0]!r}: there is nothing to learn")
        return classes

    def load(self) -> Pretrained:
        try:
            base = super().load()
        except ValueError as error:
            if "has no head" not in str(error):
                raise
            raise ValueError(f"{error}; a decoder learns labels as answers: give prompt and completion") from None
        if self.classes and not (base.fresh or self.known or self.config.adapter):
            say(f"config.json does not name these labels: the head's outputs are taken to be {some(self.classes, 4)}")
        self.whole = ("classifier", *(["pooler"] if any(p.startswith("pooler") for p in base.fresh) else []))
        return base

    def tokenised(self, rows: list[Row], base: Pretrained) -> tuple[list[Any], int]:
        return label_examples(rows, base.tokenizer, self.config.max_length, self.classes)

    def teaches(self, example: Any) -> bool:
        return True

    def training(self, examples: list[Any], steps: int) -> BatchSource:
        c, lengths = self.config, bucket_lengths(examples, self.config.buckets)
        if c.packing:
            raise ValueError("packing is for answers, not for labels")
        return LabelSource(examples, c.batch, lengths, seed=c.seed, steps=steps, accumulate=c.accumulate)

    def testing(self, examples: list[Any]) -> BatchSource:
        return LabelSource(examples, self.config.batch, bucket_lengths(examples, self.config.buckets))

    def sees(self, base: Pretrained) -> Callable[[Any, Any], Any]:
        return label_sums(base.model, self.classes is None)

    def objective(self, base: Pretrained) -> Any:
        c, numbers = self.config, self.classes is None
        shaped = jlora.lift(label_sums(base.model, numbers, c.label_smoothing, c.z_loss, c.neftune, self.weights))
        return self.spread.sums(trained_or_judged(jlora.lift(label_sums(base.model, numbers)), shaped, c.dropout))

    def judge(self, base: Pretrained) -> Judge:
        run = jlora.lift(outputs(base.model))
        said = self.spread.rows(lambda trained, frozen, batch: run(jlora.combine(frozen, trained), batch))

        def judge(trained: Any, frozen: Any, batches: BatchSource, stop: Stop, progress: Any) -> dict[str, float]:
            return self.figures(*predictions(lambda batch: said(trained, frozen, batch), batches, stop, progress))

        return judge

    def figures(self, out: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """`label_figures`, and the user's metrics on names of classes (or on numbers as text)."""
        found = label_figures(out, labels, self.classes is None)
        for name in self.config.metrics:
            written, wanted = (self.names(x) for x in (out, labels))
            found[name.rpartition(":")[2]] = text_metric(name)(written, [[text] for text in wanted])
        return found

    def names(self, values: np.ndarray) -> list[str]:
        """Outputs [n, c], or labels [n], as the classes' names."""
        if self.classes is None:
            return [f"{value:g}" for value in (values[:, 0] if values.ndim == 2 else values)]
        return [self.classes[int(n)] for n in (values.argmax(-1) if values.ndim == 2 else values)]

    def digest(self, examples: list[Any]) -> int:
        labels = np.array([example.label for example in examples], np.float32)
        return zlib.crc32(labels.tobytes(), super().digest(examples))

    def asked(self, rows: list[Row]) -> list[Row]:
        return []

    def beside(self, folder: Path) -> None:
        write_classes(folder, self.classes)


def predictions(
    said: Callable[[Any], Any], batches: BatchSource, stop: Stop = lambda: False, progress: Any = lambda n: None
) -> tuple[np.ndarray, np.ndarray]:
    """(what the head says f64 [n, c], labels f64 [n]) of every example of a `LabelSource`."""
    out, labels = [], []
    for batch in watched(batches, progress):
        if stop():
            raise Interrupted
        there = batch["weights"] > 0
        out.append(np.asarray(said(batch), np.float64)[there])
        labels.append(batch["labels"][there].astype(np.float64))
    return np.concatenate(out), np.concatenate(labels)
