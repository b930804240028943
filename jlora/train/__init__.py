"""Training as small functions: a loss on label positions, a step, checkpoints, a loop."""

from jlora.train.checkpoint import Checkpoints
from jlora.train.loop import Interrupted, evaluate, fit
from jlora.train.loss import Sums, answer_sums, chunked_sums, example_sums
from jlora.train.optimiser import OptimiserConfig, make_optimiser
from jlora.train.step import TrainState, init_state, make_eval_step, make_train_step

__all__ = [
    "Checkpoints",
    "Interrupted",
    "OptimiserConfig",
    "Sums",
    "TrainState",
    "answer_sums",
    "chunked_sums",
    "evaluate",
    "example_sums",
    "fit",
    "init_state",
    "make_eval_step",
    "make_optimiser",
    "make_train_step",
]
