"""Run by test_split.py with eight simulated devices: tests/scale/eight.py on quantised weights."""

import json
import sys

import jlora
from tests.scale import eight

plain = eight.setting


def quantised(scheme):
    def setting():
        frozen, lora, sums = plain()
        return jlora.quantise(frozen, scheme, layouts=eight.LAYOUTS), lora, sums

    return setting


def main():
    for text in sys.argv[1:]:
        scheme, mesh = text.split(":")
        eight.setting = quantised(scheme)
        losses, _ = eight.alone(2)
        mine, _, moved, spec = eight.sharded(mesh, 2)
        report = {
            "run": text,
            "losses": eight.off(losses, mine),
            "gathered": [[list(c.dtypes), c.bytes, c.where] for c in moved if c.kind == "all-gather"],
            "specs": {path: str(s) for path, s in spec.items() if "q_proj" in path},
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
