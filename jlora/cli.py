"""`jlora <command>`: logs to stderr, results to stdout; exit 0 ok, 1 failure, 2 usage, 143 saved on SIGTERM."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import tyro

from jlora.demo import DemoConfig, demo


def main(args: Sequence[str] | None = None) -> None:
    """Run one command; the process ends with its exit code."""
    commands = {"demo": DemoConfig}
    config = tyro.extras.subcommand_cli_from_dict(commands, prog="jlora", args=args)
    try:
        result = demo(config)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"jlora: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    print(json.dumps(result))
