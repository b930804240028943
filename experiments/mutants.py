"""Change a module in one place at a time, run the tests that reach the place, and say which changes none of them saw.

    python experiments/mutants.py lift leaves lora tree io --sample 40 --json mutants.json

Each mutant runs in a process forked after the heavy imports, with the tests that reached its line in a first run, the
quickest first. Mutants: a comparison, an operator or a boolean swapped, a `not` or a minus taken away, a number
changed, a returned value lost, a call or a raise left out. Texts of errors, annotations and decorators stay.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import dataclasses
import importlib.machinery
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CORE = ["tests/test_lora.py", "tests/test_lift.py"]
TESTS = {
    "jlora/lift.py": [*CORE, "tests/faults/test_api.py"],
    "jlora/leaves.py": [*CORE, "tests/test_dimension_numbers.py"],
    "jlora/lora.py": [*CORE, "tests/faults/test_api.py"],
    "jlora/merging.py": [*CORE, "tests/faults/test_api.py"],
    "jlora/tree.py": ["tests/test_tree.py", "tests/test_lora.py"],
    "jlora/io/peft.py": ["tests/io/test_peft.py", "tests/io/test_from_peft.py"],
    "jlora/io/beside.py": ["tests/io/test_peft.py", "tests/faults/test_interrupts.py"],
    "jlora/io/adapters.py": [
        "tests/methods/test_named.py",
        "tests/methods/test_fused.py",
        "tests/faults/test_adapter_folders.py",
    ],
    "jlora/io/peft_read.py": [
        "tests/io/test_peft.py",
        "tests/io/test_from_peft.py",
        "tests/faults/test_adapter_folders.py",
    ],
    "jlora/io/tensors.py": ["tests/io/test_load.py", "tests/io/test_tensors.py", "tests/faults/test_safetensors.py"],
    "jlora/io/save.py": ["tests/io/test_load.py", "tests/io/test_save.py", "tests/faults/test_interrupts.py"],
    "jlora/io/plain.py": [
        "tests/io/test_peft_kin.py",
        "tests/methods/test_named.py",
        "tests/faults/test_adapter_folders.py",
    ],
    "jlora/methods/fused.py": ["tests/methods/test_fused.py"],
    "jlora/io/gguf.py": ["tests/io/test_gguf.py", "tests/faults/test_gguf_files.py"],
}
QUIET = ("-x", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")
HEAVY = (
    "jax",
    "jax.numpy",
    "flax.linen",
    "optax",
    "numpy",
    "pytest",
    "hypothesis",
    "safetensors.numpy",
    "transformers",
)
SWAPS: dict[type, type] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
UNTOUCHED = {"annotation", "returns", "decorator_list", "exc", "cause"}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change: where it is, what it reads before and after, and the module with it."""

    file: str
    line: int
    column: int
    what: str
    tree: ast.Module

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f"{self.file}:{self.line}:{self.column}: {self.what}"


def places(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that may change, in the order of the source."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in UNTOUCHED:
            continue
        for child in value if isinstance(value, list) else [value]:
            text = isinstance(child, ast.JoinedStr) or (
                isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            )
            if isinstance(child, ast.AST) and not text:
                yield from places(child)


def changes(node: ast.AST) -> Iterator[Callable[[Any], ast.AST]]:
    """What may become of `node`: functions from a copy of it to what stands there instead."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield lambda n: ast.Compare(n.left, [SWAPS[type(n.ops[0])](), *n.ops[1:]], n.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
        yield lambda n: ast.BinOp(n.left, SWAPS[type(n.op)](), n.right)
    elif isinstance(node, ast.BoolOp):
        yield lambda n: ast.BoolOp(SWAPS[type(n.op)](), n.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield lambda n: n.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield lambda n: ast.Constant(not n.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield lambda n: ast.Constant(n.value + 1)
    elif isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
        yield lambda n: ast.Return(ast.Constant(None))
    elif isinstance(node, ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield lambda n: ast.Pass()


def mutants(file: str) -> list[Mutant]:
    """Every change of a file, each on its own."""
    source = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    made: list[Mutant] = []
    for n, node in enumerate(places(source)):
        for change in changes(node):
            tree = copy.deepcopy(source)
            target = next(found for at, found in enumerate(places(tree)) if at == n)
            new = ast.copy_location(change(target), target)
            what = f"{ast.unparse(node)[:70]}  ->  {ast.unparse(new)[:70]}".replace("\n", " ")
            replace(tree, target, new)
            made.append(
                Mutant(
                    file,
                    getattr(node, "lineno", 0),
                    getattr(node, "col_offset", 0),
                    what,
                    ast.fix_missing_locations(tree),
                )
            )
    return made


def replace(tree: ast.AST, old: ast.AST, new: ast.AST) -> None:
    """Put `new` where `old` is."""
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, name, new)
            elif isinstance(value, list):
                value[:] = [new if item is old else item for item in value]


class Swapped(importlib.machinery.SourceFileLoader):
    """The import of one file, from a changed tree."""

    def __init__(self, mutant: Mutant):
        self.mutant = mutant
        self.module = mutant.file.removesuffix(".py").replace("/", ".")
        super().__init__(self.module, str(ROOT / mutant.file))

    def get_code(self, fullname: str) -> Any:
        """Its code."""
        return compile(self.mutant.tree, self.path, "exec")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """As a finder: of this module alone."""
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.module else None


class Reached:
    """A pytest plugin: which lines of a file each test reached, and its seconds."""

    def __init__(self, file: str):
        self.file, self.lines, self.seen = str(ROOT / file), set(), {}

    def trace(self, frame: Any, event: str, arg: Any) -> Any:
        """As `sys.settrace` calls it."""
        if frame.f_code.co_filename != self.file:
            return None
        if frame.f_lineno is not None:
            self.lines.add(frame.f_lineno)
        return self.trace

    def pytest_runtest_protocol(self, item: Any, nextitem: Any) -> None:
        """Before a test: what was reached until now was the one before."""
        self.close()
        self.item, self.began, self.lines = item.nodeid, time.perf_counter(), set()
        sys.settrace(self.trace)

    def close(self) -> None:
        """After the last."""
        sys.settrace(None)
        if hasattr(self, "item"):
            self.seen[self.item] = [time.perf_counter() - self.began, sorted(self.lines)]


def in_child(work: Callable[[], int], seconds: float) -> int | None:
    """The exit code of `work` in a forked process that says nothing, or None if it took longer."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        code = 1  # a module that cannot even be imported
        with contextlib.suppress(BaseException):
            code = work()
        os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def reach(file: str) -> dict[str, Any]:
    """{test: [seconds, lines it reached]} of the tests of a file. Raises RuntimeError if one fails."""
    import pytest

    with tempfile.TemporaryDirectory() as place:

        def work() -> int:
            plugin = Reached(file)
            code = int(pytest.main([*QUIET, *TESTS[file]], plugins=[plugin]))
            plugin.close()
            Path(place, "seen").write_text(json.dumps(plugin.seen))
            return code

        code = in_child(work, 3600)
        if code != 0:
            raise RuntimeError(f"the tests of {file} fail without a change (pytest: {code})")
        return json.loads(Path(place, "seen").read_text())


def judge(mutant: Mutant, seen: dict[str, Any], seconds: float) -> str:
    """ "killed", "slow" (killed: it did not end), "survived" or "unreached"."""
    import pytest

    tests = [name for name, (_, lines) in sorted(seen.items(), key=lambda found: found[1][0]) if mutant.line in lines]
    first = min(seen, key=lambda name: seen[name][0])
    inside = any(
        node.lineno <= mutant.line <= (node.end_lineno or 0)
        for node in ast.walk(mutant.tree)
        if isinstance(node, ast.FunctionDef)
    )
    if not tests and inside:
        return "unreached"

    def work() -> int:
        sys.meta_path.insert(0, Swapped(mutant))
        return int(pytest.main([*QUIET, *(tests or [first, *seen])]))

    code = in_child(work, seconds)
    return "slow" if code is None else "survived" if code == 0 else "killed"


def files_of(name: str) -> list[str]:
    """The files of "lift" or of "io"."""
    one = f"jlora/{name}.py"
    return [one] if one in TESTS else [file for file in TESTS if file.startswith(f"jlora/{name}/")]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="+")
    parser.add_argument("--sample", type=int, default=40, help="mutants a module")
    parser.add_argument("--tests", nargs="*", help="these alone, in place of the module's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=300, help="for one mutant, at most")
    parser.add_argument("--json", type=Path, help="results go here after each mutant, and a later run goes on from it")
    args = parser.parse_args()
    os.chdir(ROOT)
    os.environ["JAX_PLATFORMS"] = "cpu"  # an accelerator has one process
    sys.path.insert(0, str(ROOT))
    if args.tests:
        TESTS.update(dict.fromkeys(TESTS, args.tests))
    for module in HEAVY:
        importlib.import_module(module)
    held: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    with tempfile.TemporaryDirectory() as cache:  # what no change touches compiles once
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        for module in args.modules:
            every = [mutant for file in files_of(module) for mutant in mutants(file)]
            drawn = random.Random(args.seed).sample(every, min(args.sample, len(every)))
            reached: dict[str, Any] = {}
            for mutant in drawn:
                key = mutant.key
                if key not in held:
                    if mutant.file not in reached:
                        reached[mutant.file] = reach(mutant.file)
                    held[key] = judge(mutant, reached[mutant.file], args.seconds)
                    if args.json:
                        args.json.write_text(json.dumps(held, indent=1, ensure_ascii=False) + "\n")
                print(f"{held[key]:9} {key}", flush=True)
            dead = sum(held[m.key] in ("killed", "slow") for m in drawn)
            print(f"{module}: {dead} of {len(drawn)} killed, drawn of {len(every)}", flush=True)


if __name__ == "__main__":
    main()
