"""What is learned from rows: answers to prompts, which of two answers is better, or a label by an encoder's head.

A task makes examples of rows, batches of examples, the objective and the figures of an evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence

from jlora.commands.settings import TrainConfig
from jlora.commands.tasks.answers import Answers
from jlora.commands.tasks.labels import Labels
from jlora.commands.tasks.pairs import Pairs
from jlora.data import Row

__all__ = ["Answers", "Labels", "Pairs", "task_of"]


def task_of(config: TrainConfig, rows: Sequence[Row], tests: Sequence[Row] = ()) -> Answers:
    """The task that the rows and `loss` ask for. tests: rows to evaluate on, of the same kind, which make no classes.
    Raises ValueError where they do not go together."""
    kinds = {row.kind for row in (*rows, *tests)}
    paired, judged = "preference" in kinds, "label" in kinds
    if (paired or judged) and len(kinds) > 1:
        raise ValueError(f"{config.data} mixes rows of kinds {', '.join(sorted(kinds))}: give each a file")
    if paired != (config.loss in ("dpo", "orpo")):
        want = "needs loss: dpo or orpo" if paired else "has no pairs: rows of prompt, chosen and rejected do"
        raise ValueError(f"{config.data} {want}")
    if config.class_weights and not judged:
        raise ValueError(f"class_weights are of labels, and the rows of {config.data} have none: leave it out")
    return Labels(config, rows) if judged else Pairs(config) if paired else Answers(config)
