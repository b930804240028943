"""Checkpoints by orbax: the train state (never the base), the data position, and what the run was."""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from jlora.train.step import TrainState


def not_raised_too(record: logging.LogRecord) -> bool:
    """Orbax logs, with its whole trace, what it then raises."""
    return record.exc_info is None or "orbax" not in record.pathname


logging.getLogger("absl").addFilter(not_raised_too)


class Damaged(ValueError):
    """Arrays, or their record, that are not what was saved."""


DAMAGE = (Damaged, FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, KeyError)
STATUS = re.compile(r"(NOT_FOUND|OUT_OF_RANGE|DATA_LOSS|FAILED_PRECONDITION|INVALID_ARGUMENT):")
"""What reading raises, and begins with in the array store's errors, where bits or format are wrong; else a right, the
network or memory was lacking, and the checkpoint may be whole."""


class Checkpoints:
    """`folder`/STEP/: arrays of the `TrainState` by key path, and JSON {position, run, bits, sum}.

    `run` is what must not change between a run and its resumption; a difference is refused with both values shown.
    `defaults`: what it means that a record, of an older version, says nothing of a value.
    `before` is called at the start of every save: what must not lag behind a checkpoint is written down there.
    """

    def __init__(
        self,
        folder: str | Path,
        run: dict[str, Any],
        keep: int = 2,
        before: Callable[[], None] = lambda: None,
        defaults: Mapping[str, Any] | None = None,
    ):
        self.folder, self.before = epath.Path(folder).absolute(), before  # gs:// too
        self.run, self.defaults = json.loads(json.dumps(run)), json.loads(json.dumps(dict(defaults or {})))
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, state: TrainState, position: dict[str, Any]) -> None:
        """Start saving (asynchronously); an unfinished save leaves the previous checkpoint whole."""
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        self.before()
        arrays = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}
        meta = {"position": position, "run": self.run, "bits": bits_of(arrays)}
        meta["sum"] = sum_of(meta)
        both = ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta))
        with self.explained():  # the save before, too: it ends first
            self.manager.save(step, args=both)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """What goes wrong in a write as an OSError that says what is left."""
        try:
            yield
        except Exception as error:  # orbax and its array store raise many kinds, from their threads
            whole = sorted(int(path.name) for path in self.folder.glob("*") if path.name.isdigit())
            left = f"that of step {whole[-1]} is whole: free space and go on with --resume" if whole else "none is left"
            reason = " ".join(str(error).split())
            raise OSError(f"{self.folder}: a checkpoint could not be written; {left} ({reason[:200]})") from error

    def restore(self, state: TrainState, allow: Sequence[str] = ()) -> tuple[TrainState, dict[str, Any]] | None:
        """(state, data position) of the latest checkpoint, or None where there is none. `state` gives the structure.

        Raises ValueError naming each value of `run` that changed and is not in `allow`, for arrays that are not those
        of `state`, for a checkpoint that cannot be read, and for a damaged one, naming the one before it.
        """
        step = self.manager.latest_step()
        if step is None:
            return None
        with self.reading(step):
            meta = self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            if meta.pop("sum", None) not in (None, sum_of(meta)):
                raise Damaged("its record of the run is not what was saved")
            meta = {"position": meta["position"], "run": dict(meta["run"]), "bits": meta.get("bits")}
        was = {**self.defaults, **meta["run"]}
        changed = [
            f"{key}: {was.get(key)!r} -> {self.run.get(key)!r}"
            for key in sorted({*was, *self.run})
            if was.get(key) != self.run.get(key) and key not in allow
        ]
        if changed:
            raise ValueError(f"{self.folder} holds another run ({'; '.join(changed)}): resume with its settings")
        leaves, treedef = jax.tree.flatten_with_path(state)
        names = {jax.tree_util.keystr(path) for path, _ in leaves}
        if other := sorted(names.symmetric_difference(meta["bits"] or names)):
            raise ValueError(
                f"{self.folder / str(step)} holds other arrays than this run has ({', '.join(other[:3])}): resume with "
                "the optimiser's settings it was saved under"
            )
        shapes = {
            jax.tree_util.keystr(path): jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for path, x in leaves
        }
        with self.reading(step):
            arrays = self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes)))[
                "state"
            ]
            if meta["bits"] not in (None, bits_of(arrays)):
                raise Damaged("its arrays are not what was saved")
        return jax.tree.unflatten(treedef, [arrays[key] for key in shapes]), meta["position"]

    @contextmanager
    def reading(self, step: int) -> Iterator[None]:
        """What goes wrong in reading the checkpoint of `step` as a ValueError that says what to do."""
        try:
            yield
        except Exception as error:  # as above
            wrong = "cannot be read"
            if isinstance(error, DAMAGE) or STATUS.match(str(error)):
                before = [n for n in self.manager.all_steps() if n < step]
                then = f"--resume goes on from step {max(before)}" if before else "the run starts from step 0"
                wrong = f"is damaged; without this folder {then}"
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"{self.folder / str(step)}: this checkpoint {wrong} ({reason[:200]})") from None

    def clear(self) -> None:
        """Delete every checkpoint: they are another run's."""
        for step in self.manager.all_steps():
            self.manager.delete(step)

    def close(self) -> None:
        """Wait until every save is on disk."""
        with self.explained():  # closing can raise the write's error once more
            try:
                self.manager.wait_until_finished()
            finally:
                self.manager.close()


def sum_of(meta: Mapping[str, Any]) -> int:
    """What tells a record of JSON with a bit changed."""
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


@jax.jit
def added(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Of each array the sum of its elements' bits, u32 []."""

    def one(x: jax.Array) -> jax.Array:
        words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}.get(x.dtype.itemsize)
        bits = x if words is None or x.dtype == bool else jax.lax.bitcast_convert_type(x, words)
        return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)

    return jax.tree.map(one, arrays)


def bits_of(arrays: dict[str, jax.Array]) -> dict[str, int]:
    """What tells arrays with a bit changed: the array store checks its index alone. Works on shards."""
    return {name: int(total) for name, total in added(arrays).items()}
