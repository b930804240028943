"""What a run does when the disk is full, the process is told to end, or a step's numbers are not finite."""

import os
import resource
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jlora.train import Checkpoints, Interrupted, Sums, evaluate, fit, init_state, make_train_step


def sums_fn(trained, frozen, batch, key):
    one = jnp.ones(())
    return Sums(jnp.sum((trained["w"] - batch["x"]) ** 2), one, one, one, one, one)


class Batches:
    """Batch n holds n; its position is what was drawn."""

    def __init__(self, at=0):
        self.at = at

    def __next__(self):
        self.at += 1
        return {"x": np.full((40, 40), float(self.at), np.float32), "mask": np.ones((2, 3), bool)}

    def get_state(self):
        return {"at": self.at}


TX = optax.adam(0.1)
STEP = make_train_step(sums_fn, TX)


def start():
    return init_state({"w": jnp.zeros((40, 40))}, TX)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_write_that_fails_is_one_error_and_the_checkpoint_before_is_whole(tmp_path):
    # every file of more than 1000 bytes fails, as on a full disk
    held = resource.getrlimit(resource.RLIMIT_FSIZE)
    saved = Checkpoints(tmp_path, {})

    def full(record):
        if record["step"] == 5:
            saved.manager.wait_until_finished()
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, held[1]))

    try:
        with pytest.raises(OSError, match=r"could not be written; that of step \d is whole: free space"):
            fit(STEP, start(), None, Batches(), steps=9, checkpoints=saved, save_every=2, log=full)
            saved.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, held)
    again = Checkpoints(tmp_path, {})
    state, position = again.restore(start())
    again.close()
    assert int(state.step) == position["at"] == 4
    want = fit(STEP, start(), None, Batches(), steps=9)
    got = fit(STEP, state, None, Batches(position["at"]), steps=9)
    jax.tree.map(np.testing.assert_array_equal, want, got)


def test_sigterm_during_an_evaluation_saves_at_once(tmp_path):
    judge = lambda trained, frozen, batch: Sums(*map(jnp.float32, range(6)))
    drawn = []

    def parts():
        for n in range(100):
            drawn.append(n)
            if n == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield n

    saved = Checkpoints(tmp_path, {})
    after = lambda state, stop: evaluate(judge, None, None, parts(), stop) is None
    with pytest.raises(Interrupted):
        fit(STEP, start(), None, Batches(), steps=9, checkpoints=saved, after=after)
    assert drawn == [0, 1, 2, 3]
    again = Checkpoints(tmp_path, {})
    assert again.manager.latest_step() == 1
    again.close()


def test_bad_steps_change_nothing_and_the_last_state_is_saved(tmp_path):
    class Sometimes(Batches):
        def __next__(self):
            batch = super().__next__()
            return {**batch, "x": batch["x"] * (np.nan if self.at in (2, 3) else 1)}

    seen = []
    saved = Checkpoints(tmp_path, {})
    log = lambda record: seen.append(record)
    state = fit(STEP, start(), None, Sometimes(), steps=4, checkpoints=saved, bad_steps=2, log=log)
    saved.close()
    assert [np.isfinite(record["loss"]) for record in seen] == [True, False, False, True]
    assert seen[0]["read"] == seen[0]["places"] == 6 and np.isfinite(state.trained["w"]).all()
    with pytest.raises(FloatingPointError, match=r"2 in a row.*kept"):
        fit(STEP, start(), None, Sometimes(), steps=4, bad_steps=1, keep_bad=lambda batch: "kept")
    assert Checkpoints(tmp_path, {}).manager.latest_step() == 4
