"""Chips, topologies and model sizes known by name."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

from jlora.io.objects import read_json
from jlora.io.sizes import checked_config
from jlora.models import family

GIB = 2**30

TPUS = {"v4": 32 * GIB, "v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB}
GPUS = {"a100-40": 40 * GIB, "a100": 80 * GIB, "h100": 80 * GIB, "h200": 141 * GIB, "l4": 24 * GIB}
"""Bytes of a device's memory by the vendors' data sheets."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """`name` as given; `devices`: how many of it are used; `memory`: bytes a device; `compiler`: what libtpu is asked
    for, "" for a GPU."""

    name: str
    devices: int
    memory: int
    compiler: str


def topology(name: str) -> Topology:
    """ "v5e:2x4" (TPU: chips along each axis), "h100:8" (GPU: how many), "v5p:1" (one chip).

    Raises ValueError for a chip that is not known or sizes that are no numbers.
    """
    kind, _, shape = name.partition(":")
    if kind in GPUS and re.fullmatch(r"[1-9]\d*", shape or "1"):
        return Topology(name, int(shape or 1), GPUS[kind], "")
    if kind in TPUS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*){0,2}", shape or "1"):
        sizes = [int(n) for n in (shape or "1").split("x")]
        count = math.prod(sizes)
        if count == 1:  # the compiler knows whole hosts only: one chip is one device of a host's four
            return Topology(name, 1, TPUS[kind], f"{kind}:2x2" + ("x1" if kind in ("v4", "v5p") else ""))
        return Topology(name, count, TPUS[kind], name)
    raise ValueError(
        f"topology {name!r} is not known: write CHIP:SHAPE like v5e:2x4 or v5p:2x2x1 ({', '.join(TPUS)}), "
        f"or GPU:COUNT like h100:8 ({', '.join(GPUS)})"
    )


def llama(hidden: int, inner: int, layers: int, heads: int, groups: int, vocab: int, **more: Any) -> dict[str, Any]:
    """The fields of a Llama's config.json that decide its shapes."""
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocab,
        "rope_theta": 500000.0,
        **more,
    }


MODELS = {
    "smollm2-135m": llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
    "llama-3.2-1b": llama(2048, 8192, 16, 32, 8, 128256, head_dim=64, tie_word_embeddings=True),
    "llama-3-8b": llama(4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b": llama(8192, 28672, 80, 64, 8, 128256),
}


def names() -> list[str]:
    """Every model known by name."""
    from jlora.models.gpt2 import GPT3

    return [*MODELS, "gpt2", *(f"gpt3-{size}" for size in GPT3)]


def config_of(name: str) -> Any:
    """The config of a known model, or of the folder or config.json at `name`; nothing is downloaded.

    Raises ValueError for a name that is none of these, and for a file that `load` would refuse.
    """
    low = name.lower()
    if low in MODELS:
        return family("llama").config.from_hf(MODELS[low])
    if low == "gpt2" or low.startswith("gpt3-"):
        from jlora.models.gpt2 import GPT3, GPT2Config

        if low == "gpt2":
            return GPT2Config()
        if low[5:] in GPT3:
            return GPT3[low[5:]]
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise ValueError(f"model {name!r} is no config.json, no folder with one, and none of {', '.join(names())}")
    hub = read_json(path)
    return checked_config(family(str(hub.get("model_type", "none"))[:80]).config, hub, path)
