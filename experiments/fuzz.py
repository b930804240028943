"""Each reader under atheris, a fuzzer that follows the branches it reaches: refused in one sentence, or read.

    pip install atheris && python experiments/fuzz.py --seconds 60

The files begun with are those of tests/faults/test_fuzz.py. Exits 1 if a reader raised anything but a clear ValueError
or OSError; the bytes that did it lie in build/fuzz/NAME.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOUND = ROOT / "build" / "fuzz"


def one(name: str, seconds: int) -> None:
    """Fuzz one reader in this process, which atheris ends."""
    import atheris

    with atheris.instrument_imports(include=["jlora.io", "jlora.data", "jlora.commands.settings"]):
        from tests.faults.test_fuzz import FILES, tried

    whole, read = FILES[name]
    with tempfile.TemporaryDirectory() as place:
        path, corpus = Path(place, "file", name), Path(place, "corpus")
        path.parent.mkdir()
        corpus.mkdir()
        (corpus / "whole").write_bytes(whole)

        def test(data: bytes) -> None:
            path.write_bytes(data)
            tried(lambda: read(path))

        FOUND.joinpath(name).mkdir(parents=True, exist_ok=True)
        words = [f"-max_total_time={seconds}", "-timeout=30", "-rss_limit_mb=4096", f"-max_len={2 * len(whole) + 64}"]
        atheris.Setup([sys.argv[0], *words, f"-artifact_prefix={FOUND / name}/", str(corpus)], test)
        atheris.Fuzz()


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for each reader")
    parser.add_argument("--only", nargs="*", help="names of files, as rows.csv; all if not given")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.here:
        one(args.here, args.seconds)
        return
    from tests.faults.test_fuzz import FILES

    failed = []
    for name in args.only or FILES:
        words = [sys.executable, __file__, "--here", name, "--seconds", str(args.seconds)]
        done = subprocess.run(words, stderr=subprocess.PIPE, text=True, check=False)
        lines = done.stderr.splitlines()
        runs = next((line for line in reversed(lines) if line.startswith(("Done", "#"))), "no run")
        print(f"{name}: {'clear' if done.returncode == 0 else 'FOUND'}; {runs}", flush=True)
        if done.returncode:
            failed.append(name)
            print("\n".join(lines[-25:]), file=sys.stderr)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
