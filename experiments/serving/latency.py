"""The paper's latency table on another grid or machine: every way of `experiments/paper/latency.py`, as Markdown.

python experiments/serving/latency.py [--layers 24] [--grid 32x512 16x256 1x128] [--repeats 10] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from experiments.paper.latency import NAMES, Config, cells, show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--grid", nargs="+", default=["8x128", "4x64", "1x32"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    points = [tuple(map(int, cell.split("x"))) for cell in given.grid]
    config = Config(tuple((b, s, given.repeats, tuple(NAMES)) for b, s in points), layers=given.layers)
    done = {cell.name: cell.run({}) for cell in cells(config)}
    print(show(config, done).tables[0].markdown())
    if given.json:
        given.json.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
