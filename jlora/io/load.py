"""`load(source)`: a pretrained decoder with its parameters and tokenizer, from a file, a folder or the Hub."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.io.head import JUDGING, with_head
from jlora.io.objects import read_json
from jlora.io.pypi import MINILM, SMOLLM2, pip_file
from jlora.io.sizes import checked_config
from jlora.io.tensors import Source, build, safetensors_source
from jlora.io.text import one_line
from jlora.models import family
from jlora.models.tensors import HFTensor
from jlora.placing import specs_on
from jlora.quant import quantise as quantised
from jlora.quant.leaf import QuantisedLeaf
from jlora.quant.tree import from_layers, planned
from jlora.sharding import place

READ = (".json", ".txt", ".model", ".jinja")
SHORT = {"smollm2-135m-instruct": SMOLLM2, "smollm2-135m": SMOLLM2, "all-minilm-l6-v2": MINILM}


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model, its parameter tree, config and tokenizer; `tensors`: where each Hub tensor lies in the tree."""

    model: Any
    params: Any
    config: Any
    tokenizer: Any
    source: str
    tensors: list[HFTensor]
    folder: Path | None = None
    """Where the Hub files lie, for a source in Hub format."""
    fresh: tuple[str, ...] = ()
    """Paths of a head that the checkpoint does not hold; told by its headers, all of the head where it has no files."""
    revision: str | None = None
    """Of `source`, where that is a Hub id and one was asked for."""
    stops: tuple[int, ...] = ()
    """Tokens that end an answer by the checkpoint's files or its chat template, beside the tokenizer's own."""

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end an answer or a turn, the tokenizer's first. (Gemma's turns end in one of their own.)"""
        own = getattr(self.tokenizer, "eos_token_id", None)
        return tuple(dict.fromkeys([*([] if own is None else [int(own)]), *self.stops]))

    def speaking(self, template: str | None) -> Pretrained:
        """The same with another chat template, whose end of a turn ends answers too; None: with its own."""
        from jlora.data.tokens import turn_end  # which reads this package

        if template is None or self.tokenizer is None:
            return self
        tokenizer = copy.copy(self.tokenizer)
        tokenizer.chat_template = template
        return dataclasses.replace(self, tokenizer=tokenizer, stops=(*self.stops, *turn_end(tokenizer)))

    def check(self, length: int, token: int) -> None:
        """Raises ValueError for more positions than the model has a table for, a prefix's columns counted, or a token
        that it does not have: the row read instead is NaN."""
        most = {"gpt2": "n_positions", "bert": "max_position_embeddings", "roberta": "max_position_embeddings"}
        table, columns = most.get(self.config.model_type), getattr(self.model, "n", 0)
        rows = getattr(self.config, table) if table else 0
        rows -= self.config.pad_token_id + 1 if self.config.model_type == "roberta" else 0
        if table and length > rows - columns:
            taken = f", {columns} of them its prefix's" if columns else ""
            raise ValueError(
                f"{self.source} has {rows} positions{taken}, a row has {length} tokens: set max_length to "
                f"{rows - columns}"
            )
        if token >= self.config.vocab_size:
            raise ValueError(
                f"token {token} is past the {self.config.vocab_size} of {self.source}: its tokenizer has grown, "
                "its embedding has not"
            )

    @property
    def layouts(self) -> dict[str, str]:
        """`lorafy`'s layouts: which leaves are stacks of linear kernels."""
        return layouts_of(self.tensors)


def layouts_of(tensors: Iterable[HFTensor]) -> dict[str, str]:
    """The layouts of the stacks of linear kernels among the leaves."""
    return {t.path: "sio" for t in tensors if t.layer is not None and t.path.endswith("/kernel")}


def load(
    source: str | Path,
    *,
    dtype: Any = jnp.float32,
    revision: str | None = None,
    scan_layers: bool = True,
    remat: Any = False,
    weights: bool = True,
    sharding: Callable[[str, Any], Any] | None = None,
    head: str | None = None,
    labels: int | None = None,
    quantise: Any = None,
) -> Pretrained:
    """A model from a `.gguf` file, a folder in Hub format, the Hub ("owner/name", "hf://owner/name@revision"), or a
    short name of `SHORT`.

    dtype: of the parameters and the computation. revision: branch, tag or commit, for the Hub. weights: False gives
    `params` as shapes and reads no tensor. sharding: (path, ShapeDtypeStruct) -> Sharding of that leaf; each
    device's part is read by itself. head: of an encoder, as its family names them. labels: classes of that head; where
    the checkpoint holds none, or another number, it is drawn afresh. quantise: a scheme of `jlora.quantise` for all
    linear weights; a layer at a time, so the floats are never whole in memory.
    Raises ValueError listing tensors that are missing, unknown or wrongly shaped, FileNotFoundError for no source.
    """
    from jlora.data.tokens import special_ids, turn_end  # which reads this package

    source = str(source)
    path = locate(source, revision)
    if path.is_dir():
        hub = read_json(path / "config.json")
        kind = family(str(hub.get("model_type", "none"))[:80])
        config = checked_config(kind.config, hub, path / "config.json")
        tokenizer, stored = folder_tokenizer(path), None
        stops = stops_of(path, hub, config.vocab_size, set() if tokenizer is None else special_ids(tokenizer))
    else:
        from jlora.io.gguf import read_gguf, tokenizer_of

        config, stored, reader = read_gguf(path)
        kind, tokenizer, stops = family(config.model_type), tokenizer_of(reader), ()
    extra = {} if head is None else {"head": head}
    if head is not None and "head" not in {field.name for field in dataclasses.fields(kind.model)}:
        raise ValueError(f"{source}: {config.model_type} has no head {head!r}: encoders do")
    if labels is not None:
        config = dataclasses.replace(config, num_labels=labels)
    tensors = kind.hf_tensors(config, scan_layers, **extra)
    model = kind.model(config, dtype=dtype, param_dtype=dtype, scan_layers=scan_layers, remat=remat, **extra)
    try:
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    except (TypeError, ValueError, ArithmeticError) as error:  # whichever operation meets sizes that do not fit
        raise ValueError(f"{path}: the model of its config cannot be made: {one_line(error)}") from None
    params, fresh = shapes if quantise is None else quantised(shapes, quantise, layouts=layouts_of(tensors)), []
    if weights or head in JUDGING:
        stored = renamed(stored or folder_source(path, weights), tensors, kind.prefix)
        if head in JUDGING:
            stored, fresh = with_head(stored, tensors, shapes)
        if weights:
            made = {} if quantise is None else quantisers(shapes, quantise, layouts_of(tensors))
            spare = unread(kind, config, stored)
            params = build(shapes, tensors, stored, sharding=sharding, optional=spare, made=made)
    stops += () if tokenizer is None else turn_end(tokenizer)
    folder = path if path.is_dir() else None
    name, revision = hub_id(source, revision)
    return Pretrained(model, params, config, tokenizer, name, tensors, folder, tuple(fresh), revision, stops)


def quantisers(shapes: Any, scheme: Any, layouts: Mapping[str, Any]) -> dict[str, Any]:
    """{path: f(layers one by one, the float weight's sharding or None) -> the leaf} of all linear weights."""

    def make(layers: Iterable[Any], sharding: Any, path: str, layout: str) -> QuantisedLeaf:
        leaf = from_layers(layers, layout, path, scheme)
        if not isinstance(sharding, jax.sharding.NamedSharding):
            return jax.device_put(leaf, sharding)
        mesh: Any = sharding.mesh
        return place(leaf, specs_on(mesh, leaf, sharding.spec), mesh)

    plan = planned(shapes, layouts=layouts)
    return {path: functools.partial(make, path=path, layout=layout) for path, layout in plan.items()}


def locate(source: str, revision: str | None = None) -> Path:
    """The file or folder that `source` names, downloaded if need be. Raises FileNotFoundError."""
    if source.lower() in SHORT:
        return pip_file(SHORT[source.lower()])
    if Path(source).exists():
        return Path(source)
    name, revision = hub_id(source, revision)
    if name.count("/") == 1 and not name.endswith(".gguf"):
        return snapshot(name, revision)
    raise FileNotFoundError(f"{source}: no such file or folder, Hub id (owner/name) or short name {list(SHORT)}")


def hub_id(source: str, revision: str | None = None) -> tuple[str, str | None]:
    """("owner/name", revision) of "hf://owner/name@revision"; a file, a folder or a short name is itself, of none."""
    if source.lower() in SHORT or Path(source).exists():
        return source, None
    name, _, own = source.removeprefix("hf://").removeprefix("models/").partition("@")
    return name, own or revision


def snapshot(name: str, revision: str | None) -> Path:
    """The Hub's files of a model, downloaded or from the cache.

    HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are honoured. Raises FileNotFoundError saying
    what would help: the page to accept, the name, or the network.
    """
    from huggingface_hub import errors, snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "pytorch_model*.bin"]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted[:-1]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except errors.GatedRepoError:
        raise FileNotFoundError(
            f"{name} is gated: accept its terms at https://huggingface.co/{name}, then set HF_TOKEN"
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        at = f" at revision {revision}" if revision else ""
        raise FileNotFoundError(f"{name}{at} is not on the Hub (a private one needs HF_TOKEN)") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        reason = one_line(error)
        raise FileNotFoundError(f"{name} is not in the cache and the Hub cannot be reached: {reason}") from None
    except Exception as error:  # of a connection that ends in a file; which kind depends on the Hub's client
        reason = one_line(f"{type(error).__name__}: {error}")
        raise FileNotFoundError(f"{name} is not in the cache and the Hub broke off: run it again ({reason})") from None
    return folder


def folder_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer by transformers, or None if it has none. No code of the folder is run, and nothing is
    fetched. Raises ValueError for files that make no tokenizer."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")):
        return None
    odd = [path for path in folder.iterdir() if path.suffix in READ and path.exists() and not path.is_file()]
    if odd:  # a pipe would be waited for
        raise ValueError(f"{folder}: its tokenizer cannot be read: {odd[0].name} is no file")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a file's wrong key or type meets in there
        reason = one_line(f"{type(error).__name__} {error}")
        raise ValueError(f"{folder}: its tokenizer cannot be read: {reason}") from None


def stops_of(folder: Path, hub: Mapping[str, Any], vocabulary: int, special: set[int]) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json, else of config.json: a number or several. Numbers past the vocabulary,
    which small copies of a model keep, are left out, and of config.json, whose number may be no more than its class's
    default, those that are not `special`. Raises ValueError for anything else."""
    file = folder / "generation_config.json"
    found = read_json(file).get("eos_token_id") if file.exists() else None
    if found is None:
        file, found = folder / "config.json", hub.get("eos_token_id")
    many = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(n) is int for n in many):
        raise ValueError(f"{file}: eos_token_id {str(found)[:40]} is no token's number, nor a list of them")
    return tuple(n for n in many if 0 <= n < vocabulary and (file.name != "config.json" or n in special))


def folder_source(folder: Path, needed: bool = True) -> Source:
    """The weights of a folder: safetensors, else pytorch_model.bin read by a restricted unpickler. needed: False gives
    a source of nothing where there is neither."""
    bins = any(folder.glob("pytorch_model*.bin"))
    if any(folder.glob("*.safetensors")) or (needed and not bins):
        return safetensors_source(folder)
    if not bins:
        return Source(str(folder), {}, lambda name, index: np.empty(0))
    from jlora.io.torchfile import bin_source

    return bin_source(folder)


def renamed(source: Source, tensors: Sequence[HFTensor], prefix: str) -> Source:
    """`source` under the names of `tensors`. LayerNorms of the first BERTs have a gamma and a beta; a base model is
    stored with `prefix` where it was saved under a head, and without where it was not."""
    wanted = {tensor.name for tensor in tensors}
    stored = {name: name for name in source.shapes}
    for name in source.shapes:
        now = re.sub(r"\.beta$", ".bias", re.sub(r"\.gamma$", ".weight", name))
        spelt = (now, prefix + now, now.removeprefix(prefix))
        new = next((n for n in spelt if n in wanted and n not in stored), None)
        if new and name not in wanted:
            stored[new] = stored.pop(name)
    shapes = {name: source.shapes[was] for name, was in stored.items()}
    return dataclasses.replace(source, shapes=shapes, read=lambda name, index: source.read(stored[name], index))


def unread(kind: Any, config: Any, source: Source) -> list[str]:
    """Tensors that may lie in a checkpoint and are not needed: a tied head's copy, buffers a family names."""
    named = getattr(kind, "unread", None)
    tied = ["lm_head.weight"] if getattr(config, "tie_word_embeddings", False) else []
    buffers = [name for name in source.shapes if name.endswith("rotary_emb.inv_freq")]
    return [*tied, *buffers, *(named(config, source.shapes) if named else ())]
