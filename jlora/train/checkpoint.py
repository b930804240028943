"""Checkpoints by orbax: the train state (never the base), the data position, and what the run was."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from jlora.train.step import TrainState


class Checkpoints:
    """`folder`/STEP/: arrays of the `TrainState` by key path, and JSON {position, run}.

    `run` is what must not change between a run and its resumption; a difference is refused with both values shown.
    """

    def __init__(self, folder: str | Path, run: dict[str, Any], keep: int = 2):
        self.folder = epath.Path(folder).absolute()  # gs:// too
        self.run = json.loads(json.dumps(run))
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, state: TrainState, position: dict[str, Any]) -> None:
        """Start saving (asynchronously); an unfinished save leaves the previous checkpoint whole."""
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        arrays = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}
        meta = {"position": position, "run": self.run}
        with self.explained():  # that of the save before, too: it ends first
            self.manager.save(
                step, args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta))
            )

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

        Raises ValueError naming each value of `run` that changed and is not in `allow`.
        """
        step = self.manager.latest_step()
        if step is None:
            return None
        meta = self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        changed = [
            f"{key}: {meta['run'].get(key)!r} -> {self.run.get(key)!r}"
            for key in sorted({*meta["run"], *self.run})
            if meta["run"].get(key) != self.run.get(key) and key not in allow
        ]
        if changed:
            raise ValueError(f"{self.folder} holds another run ({'; '.join(changed)}): resume with its settings")
        leaves, treedef = jax.tree.flatten_with_path(state)
        shapes = {
            jax.tree_util.keystr(path): jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for path, x in leaves
        }
        arrays = self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes)))["state"]
        return jax.tree.unflatten(treedef, [arrays[key] for key in shapes]), meta["position"]

    def clear(self) -> None:
        """Delete every checkpoint: they are another run's."""
        for step in self.manager.all_steps():
            self.manager.delete(step)

    def close(self) -> None:
        """Wait until every save is on disk."""
        try:
            with self.explained():
                self.manager.wait_until_finished()
        finally:
            self.manager.close()
