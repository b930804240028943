"""What a run does when the disk is full, the process is told to end, or a step's numbers are not finite."""

import gc
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jlora.cli import main
from jlora.train import Checkpoints, Interrupted, Sums, evaluate, fit, init_state, make_train_step
from tests.small import rows, small_model


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


@pytest.mark.parametrize("damage", ["gone", "half", "a bit"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_named(damage, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # orbax's reads after the first that failed
    saved = Checkpoints(tmp_path / "run", {})
    fit(STEP, start(), None, Batches(), steps=4, checkpoints=saved, save_every=2)
    saved.close()
    want = {n: fit(STEP, start(), None, Batches(), steps=n) for n in (2, 4)}
    told = 0
    files = sorted(p.relative_to(tmp_path / "run") for p in (tmp_path / "run" / "4").rglob("*") if p.is_file())
    for n, file in enumerate(files):
        copy = tmp_path / f"copy{n}"
        shutil.copytree(tmp_path / "run", copy)
        data = bytearray((copy / file).read_bytes())
        (copy / file).unlink()
        if damage != "gone":
            if damage == "a bit" and data:
                data[len(data) * 3 // 5] ^= 16
            (copy / file).write_bytes(data[: len(data) // 2] if damage == "half" else data)
        again = Checkpoints(copy, {})
        try:
            state, position = again.restore(start())
            step = int(state.step)
            assert position == {"at": step}
            jax.tree.map(np.testing.assert_array_equal, want[step], state)
        except ValueError as error:
            assert re.search(r"/4: this checkpoint is damaged; .*goes on from step 2 ", str(error))
            shutil.rmtree(copy / "4")
            told += 1
            fresh = Checkpoints(copy, {})
            assert int(fresh.restore(start())[0].step) == 2
            fresh.close()
        again.close()
    assert told >= 3
    until = time.monotonic() + 10
    while reads() and time.monotonic() < until:  # they end by themselves
        time.sleep(0.05)


def reads():
    """Orbax's unfinished reads, which some thread of the array store still holds."""
    gc.collect()
    return [x for x in gc.get_objects() if type(x) is types.CoroutineType and "_read_" in x.__qualname__]


def test_a_clock_set_back_changes_nothing(tmp_path, monkeypatch):
    real, calls = time.time, iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: real() - 3600.0 * next(calls))
    for steps in (3, 6):
        saved = Checkpoints(tmp_path, {})
        state, position = saved.restore(start()) or (start(), {"at": 0})
        assert position["at"] == steps - 3
        fit(STEP, state, None, Batches(position["at"]), steps=steps, checkpoints=saved, save_every=1)
        saved.close()
    again = Checkpoints(tmp_path, {})
    assert again.manager.all_steps() == [5, 6]
    state, _ = again.restore(start())
    again.close()
    jax.tree.map(np.testing.assert_array_equal, state, fit(STEP, start(), None, Batches(), steps=6))


def test_a_full_disk_ends_the_command_with_one_sentence_and_it_goes_on(tmp_path, capsys):
    words = ["train", "--model", small_model(tmp_path / "model"), "--data", rows(tmp_path, 24), "--held-out", "8"]
    words += ["--steps", "6", "--save-every", "3", "--eval-every", "0", "--samples", "0"]
    words += ["--output", str(tmp_path / "run")]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 16; exec "$@"', "limited", sys.executable, "-m", "jlora.cli", *words],  # kB a file
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 1 and "jlora/commands" not in done.stderr, done.stderr  # no trace of ours
    assert "checkpoints: a checkpoint could not be written; none is left (" in done.stderr
    assert not (tmp_path / "run" / "adapter").exists()
    main([*words, "--resume"])
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists() and capsys.readouterr().err


def test_a_bit_in_a_checkpoints_record_is_damage(tmp_path):
    """In any byte of it: a changed name or setting must not be taken for another run's."""
    saved = Checkpoints(tmp_path / "run", {"batch": 4})
    fit(STEP, start(), None, Batches(), steps=2, checkpoints=saved, save_every=2)
    saved.close()
    record = tmp_path / "run" / "2" / "meta" / "metadata"
    data = record.read_bytes()
    for n in range(3, len(data), 7):
        record.write_bytes(data[:n] + bytes([data[n] ^ 1]) + data[n + 1 :])
        again = Checkpoints(tmp_path / "run", {"batch": 4})
        with pytest.raises(ValueError, match=r"this checkpoint is damaged; .*starts from step 0"):
            again.restore(start())
        again.close()
