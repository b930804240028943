"""`jlora mix`: adapters with weights as one adapter, from files to a file; the base model is not needed."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import tyro

from jlora.commands.settings import say
from jlora.config import LoraConfig
from jlora.data.template import template_for, write_template
from jlora.io.load import read_json
from jlora.io.patterns import Patterns
from jlora.io.peft import save_peft
from jlora.io.peft_read import OTHER, Part, entry_of, read_arrays, read_config, scaling_of
from jlora.mix import Method, mix
from jlora.models.tensors import HFTensor
from jlora.train.report import Reporter


@dataclasses.dataclass(frozen=True)
class MixConfig:
    """Add adapters with weights, or take one away (a:-1), as one adapter: jlora mix a:0.7 b:0.3 -o c."""

    adapters: Annotated[tuple[str, ...], tyro.conf.Positional]
    """FOLDER:WEIGHT each, folders in PEFT's format; without a weight it is 1."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])]
    """The new folder."""
    method: Method = "linear"
    """linear: the sum, exactly (cat), or cut to `rank` (svd); prune, ties, dare, dare_ties; factors: PEFT's linear."""
    rank: int | None = None
    """Of the result; all that linear needs, or the largest of the adapters', if not given."""
    density: float = 0.5
    """The fraction of each difference that prune, ties and dare keep."""
    seed: int = 0
    """Of dare's draws."""


def mix_command(config: MixConfig) -> dict[str, Any]:
    """{output, rank, modules}. Raises ValueError for adapters of different bases, or that are not LoRA."""
    named = [weighted(word) for word in config.adapters]
    if not named:
        raise ValueError("adapters to mix are missing: jlora mix a:0.7 b:0.3 -o c")
    trees, weights = [read(folder) for folder, _ in named], [weight for _, weight in named]
    about = [read_json(Path(folder) / "adapter_config.json") for folder, _ in named]
    where = [(str(held.get("base_model_name_or_path")), held.get("revision")) for held in about]
    bases = {"@".join(map(str, filter(None, base))): folder for base, (folder, _) in zip(where, named, strict=True)}
    if len(bases) > 1:
        said = "; ".join(f"{folder} is for {base}" for base, folder in bases.items())
        raise ValueError(f"adapters of one base can be mixed: {said}")
    kinds: dict[str, str] = {name: part for tree in trees for name, entry in tree.items() for part in entry}
    for name in kinds:
        found = [tree[name] for tree in trees if name in tree]
        if len({tuple(entry) for entry in found}) > 1:
            raise ValueError(f"{name} is an embedding in one adapter and a linear weight in another")
    options = {"rank": config.rank, "density": config.density, "key": jax.random.key(config.seed)}
    mixed: dict[str, Any] = {}
    with Reporter(len(kinds), label="mixing", every=10) as bar:
        for name, part in kinds.items():
            each = [{name: tree.get(name, {part: None})} for tree in trees]
            mixed |= mix(each, weights, config.method, **options)
            bar.update(len(mixed))
    ranks = [entry.lora_a.shape[-1] for parts in mixed.values() for entry in parts.values()]
    turned = not about[0].get("fan_in_fan_out")
    tensors = [HFTensor(f"{name}.weight", f"{name}/{part}", None, turned) for name, part in kinds.items()]
    first = about[0]
    settings = LoraConfig(r=max(ranks), lora_alpha=max(ranks))
    card = {"made by": f"jlora mix {' '.join(config.adapters)} --method {config.method}"}
    save_peft(config.output, mixed, settings, tensors, *where[0], task=first.get("task_type"), card=card)
    said = {template_for(None, folder) for folder, _ in named}
    write_template(Path(config.output), said.pop() if len(said) == 1 else None)
    if said:
        say("the adapters' chat templates differ, and the mix has none: give one to eval, generate and chat")
    say(f"jlora eval --model {next(iter(bases))} --adapter {config.output} --data ... compares it with the base")
    return {"output": config.output, "rank": max(ranks), "modules": len(ranks)}


def weighted(word: str) -> tuple[str, float]:
    """ "folder:0.7" -> ("folder", 0.7). Raises ValueError for a weight that is no number."""
    folder, colon, weight = word.rpartition(":")
    if not colon or Path(word).is_dir():
        return word, 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{word}: {weight!r} is no weight; write FOLDER:NUMBER, as runs/a:0.7")
    return folder, number


def read(folder: str) -> dict[str, dict[str, Any]]:
    """{module: {"kernel" or "embedding": factors}} of a folder. Raises ValueError naming what are no factors."""
    settings, arrays = read_config(folder), read_arrays(folder)
    alphas = Patterns(settings.alpha_pattern, folder)
    factors = (*OTHER, *OTHER.values())
    other = [name for name in arrays if not name.endswith(factors)]
    if other:
        more = f" and {len(other) - 4} more" if len(other) > 4 else ""
        raise ValueError(
            f"{folder} holds {', '.join(other[:4])}{more}, and only LoRA factors can be mixed: train without these"
        )
    out: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        kind = next((kind for kind in OTHER if name.endswith(f".{kind}")), None)
        if kind is None:
            continue
        module = name.removesuffix(f".{kind}")
        b = arrays.get(f"{module}.{OTHER[kind]}")
        if b is None or array.ndim != 2 or b.ndim != 2 or not b.shape[1] == len(array) > 0:
            raise ValueError(f"{folder}: {name} {list(array.shape)} has no {OTHER[kind]} of its rank")
        part = "embedding" if "embedding" in kind else "kernel"
        held = Part(None, array.T, b.T, scaling_of(settings, alphas, module, len(array)), None)
        out[module] = {part: entry_of(None, [held], jnp.float32)}
    return out
