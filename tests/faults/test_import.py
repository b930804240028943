"""Importing jlora is light: soon done, nothing of the file and training libraries, no word to the network."""

from __future__ import annotations

import json
import subprocess
import sys

SEEN = """
import socket, sys, time
def refuse(*args, **kwargs): raise RuntimeError("the network was asked")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
before, began = set(sys.modules), time.process_time()
import jlora
took = time.process_time() - began
import json
names = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps({"took": took, "names": sorted(names), "all": sorted(jlora.__all__), "dir": dir(jlora)}))
"""


def test_importing_jlora():
    out = subprocess.run([sys.executable, "-c", SEEN], capture_output=True, text=True, check=True).stdout
    seen = json.loads(out)
    heavy = {
        "torch",
        "transformers",
        "tokenizers",
        "matplotlib",
        "datasets",
        "huggingface_hub",
        "gguf",
        "orbax",
        "grain",
    }
    assert not heavy & set(seen["names"])
    assert set(seen["all"]) <= set(seen["dir"])
    assert seen["took"] < 5  # of processor time; about half a second where nothing else runs
