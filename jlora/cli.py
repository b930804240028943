"""`jlora <command>`: logs to stderr, results to stdout; exit 0 ok, 1 failure, 2 usage, 130 Ctrl-C, 143 on SIGTERM."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import Any

import tyro

COMMANDS = {
    "train": ("jlora.commands.train", "TrainConfig", "train"),
    "sweep": ("jlora.commands.sweep", "SweepConfig", "sweep_command"),
    "eval": ("jlora.commands.evaluate", "EvalConfig", "evaluate_command"),
    "generate": ("jlora.commands.generate", "GenerateCommand", "generate_command"),
    "chat": ("jlora.commands.generate", "ChatCommand", "chat_command"),
    "merge": ("jlora.commands.merge", "MergeConfig", "merge_command"),
    "mix": ("jlora.commands.mix", "MixConfig", "mix_command"),
    "export": ("jlora.commands.export", "ExportConfig", "export_command"),
    "serve": ("jlora.commands.serve", "ServeConfig", "serve_command"),
    "data": ("jlora.commands.data", "DataConfig", "data_command"),
    "profile": ("jlora.commands.profile", "ProfileConfig", "profile_command"),
    "plan": ("jlora.plan", "PlanConfig", "run"),
    "doctor": ("jlora.doctor", "DoctorConfig", "run"),
    "demo": ("jlora.demo", "DemoConfig", "demo"),
}
"""Name: (module, dataclass of its settings, function of them). A module is imported when its command runs."""

SEVERAL = ("train", "doctor")
"""Commands that run as one program on several hosts."""


def main(args: Sequence[str] | None = None) -> None:
    """Run one command; a process that fails ends with its exit code."""
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if words else sys.stderr)
        raise SystemExit(0 if words else 2)
    name, *rest = words
    if name not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(name, COMMANDS)
        hint = f": did you mean {' or '.join(close)}?" if close else ""
        print(f"jlora: {name} is not a command{hint}\n\n{usage()}", file=sys.stderr)
        raise SystemExit(2)
    module, settings, function = COMMANDS[name]
    loaded = importlib.import_module(module)
    as_json, rest = "--json" in rest, [word for word in rest if word != "--json"]
    try:
        config = parse(getattr(loaded, settings), rest, f"jlora {name}")
        if as_json and hasattr(config, "json"):
            config = dataclasses.replace(config, json=True)
    except (ValueError, OSError) as error:
        print(f"jlora {name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    import jax

    from jlora.compiled import keep_compiled

    keep_compiled()
    try:
        with joined(name) as first:
            result = getattr(loaded, function)(config)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"jlora {name}: {sentence(error, name)}", file=sys.stderr)
        raise SystemExit(1) from None
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not (isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)):
            raise
        print(f"jlora {name}: out of memory{less(config)}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if result is not None and first:
        print(json.dumps(result) if as_json else table(result))


@contextmanager
def joined(name: str) -> Iterator[bool]:
    """The run joined to its other processes, if `name` is a command of several; whether this is the first of them,
    the only one that speaks. Ends the process with 143 (to be started again) where another one was lost.
    """
    import jax

    from jlora import distributed

    if name not in SEVERAL or not distributed.launcher():
        yield True
        return
    distributed.start()
    first, stderr = jax.process_index() == 0, sys.stderr
    try:
        with nullcontext() if first else redirect_stderr(io.StringIO()):
            yield first
    except jax.errors.JaxRuntimeError as error:
        told = " ".join(str(error).split())
        if not distributed.LOST.search(told):
            raise
        print(
            f"jlora {name}: process {jax.process_index()}: another process of the run is gone ({told[:200]}): "
            "start all of them again with --resume",
            file=stderr,
            flush=True,
        )
        os._exit(143)  # the usual way out waits for the lost one


def sentence(error: BaseException, name: str = "") -> str:
    """An error of the command `name` as it is told; the system's own with the file first, and what would help."""
    if not (isinstance(error, OSError) and error.strerror):
        return str(error)
    helps = dict.fromkeys((errno.EROFS, errno.EACCES), " (give another folder with --output)")
    goes_on = "; the run goes on with --resume from its last checkpoint" if name == "train" else ""
    helps[errno.ENOSPC] = f" (free some space{goes_on})"
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}{helps.get(error.errno or 0, '')}"


def less(config: Any) -> str:
    """What among a command's settings would take less memory."""
    if hasattr(config, "remat"):
        return ": lower --batch (and raise --accumulate) or --max-length, or --remat full"
    flags = [flag for name, flag in (("batch", "--batch"), ("max_length", "--max-length")) if hasattr(config, name)]
    return f": lower {' or '.join(flags)}" if flags else ""


def parse(cls: Any, args: Sequence[str], prog: str) -> Any:
    """Settings of the dataclass `cls` from flags; `--config FILE.yaml` gives other defaults, and flags win."""
    from jlora.commands.settings import read_settings

    words, given = list(args), {}
    for n, word in enumerate(words):
        if word == "--config" or word.startswith("--config="):
            path = word.partition("=")[2] or "".join(words[n + 1 : n + 2])
            if not path:
                raise ValueError("--config needs a file: --config run.yaml")
            given = read_settings(cls, path)
            del words[n : n + (1 if "=" in word else 2)]
            break
    return tyro.cli(cls, prog=prog, args=words, default=with_defaults(cls, given))


def with_defaults(cls: Any, given: dict[str, Any]) -> Any:
    """An instance of `cls` whose fields in `given` are set; tyro must still ask for those with no default."""
    missing = {
        field.name: tyro.MISSING
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    return cls(**{**missing, **given})


def usage() -> str:
    """The commands, a line each: the first of each settings' docstring."""
    lines = ["usage: jlora COMMAND [--config FILE.yaml] [--json] [flags]   (jlora COMMAND --help)", ""]
    for name, (module, settings, _) in COMMANDS.items():
        doc = getattr(importlib.import_module(module), settings).__doc__
        lines.append(f"  {name:10} {doc.splitlines()[0]}")
    return "\n".join(lines)


def table(result: Any, indent: str = "") -> str:
    """A result for people: `name: value` lines."""
    if not isinstance(result, dict):
        return str(result)
    lines = []
    for name, value in result.items():
        if isinstance(value, dict) and name == "side_by_side":
            lines += grid(value)
        elif isinstance(value, dict):
            lines += [f"{indent}{name}:", table(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines.append(f"{indent}{name}:")
            lines += [table(item, indent + "  ") for item in value]
        else:
            lines.append(f"{indent}{name}: {value:.4g}" if isinstance(value, float) else f"{indent}{name}: {value}")
    return "\n".join(lines)


def grid(columns: dict[str, dict[str, Any]]) -> list[str]:
    """{column: results of one kind} as lines, a figure a line; a figure that a column lacks is left empty."""

    def flat(result: dict[str, Any], before: str = "") -> dict[str, str]:
        out: dict[str, str] = {}
        for name, value in result.items():
            if isinstance(value, dict):
                out |= flat(value, f"{before}{name}.")
            else:
                out[before + name] = f"{value:.4g}" if isinstance(value, float) else str(value)
        return out

    held = {name: flat(result) for name, result in columns.items()}
    names = list(dict.fromkeys(name for column in held.values() for name in column))
    rows = [["", *held], *([name, *(column.get(name, "") for column in held.values())] for name in names)]
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *rest = sizes
    return [
        row[0].ljust(first) + "".join(cell.rjust(size + 2) for cell, size in zip(row[1:], rest, strict=True))
        for row in rows
    ]


if __name__ == "__main__":
    main()
