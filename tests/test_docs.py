"""Every Python block of docs/ runs as printed, after what its page takes for granted; commands have the flags that
they are printed with; links lead somewhere.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import yaml

import jlora
from jlora.cli import COMMANDS, main, parse
from jlora.io import load
from jlora.io.peft import save_peft
from jlora.io.save import hub_arrays, write_shards
from jlora.models.bert import Bert, BertConfig, hf_tensors
from tests.small import small_model

DOCS = Path(__file__).parent.parent / "docs"
COMMON = """
import jax, jax.numpy as jnp, optax, jlora
from jax.sharding import NamedSharding, PartitionSpec
from jlora.io import load
base = load("HuggingFaceTB/SmolLM2-360M")
params, layouts, model = base.params, base.layouts, base.model
"""
GIVEN = {
    "models.md": """
tokens, mask, source = jnp.ones((1, 4), jnp.int32), jnp.ones((1, 4), bool), "HuggingFaceTB/SmolLM2-360M"
mesh, spec = jax.make_mesh((1,), ("data",)), lambda path, shape: PartitionSpec()
from jlora.io.peft import save_peft
lora = jlora.lorafy(params, 2, layouts=layouts)[1]
save_peft("adapter", lora, jlora.LoraConfig(r=2), base.tensors, base.source)
""",
    "methods.md": """
from jlora.methods import ia3
from jlora.methods.named import MethodConfig
from jlora.io.adapters import load_adapter, save_adapter
""",
    "own-transformer.md": "",
    "llama3-tpu.md": """
from pathlib import Path
from jlora.commands.settings import TrainConfig, save_settings
from tests.small import rows
rows(Path("."))
Path("llama").mkdir()
save_settings(TrainConfig("HuggingFaceTB/SmolLM2-360M", "rows.jsonl", held_out=8, seed=1), Path("llama/settings.yaml"))
""",
    "training.md": """
import numpy as np
from jlora.train.preference import PairSource, preference_sums
from jlora.train import make_train_step
from jlora.data import Example
tx = optax.adamw(1e-4)
one = Example(np.arange(6, dtype=np.int32), np.arange(6) > 3)
pairs = [(one, one)] * 8
""",
}
"""What runs before a page's blocks. A page that is not here is compiled only; its own test runs it."""
PAGES = sorted(path.name for path in DOCS.glob("*.md") if "```python" in path.read_text(encoding="utf-8"))


def small_encoder(folder):
    """A random BERT with a classifier, in Hub format."""
    sizes = {"vocab_size": 15, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "model_type": "bert"}
    config = BertConfig(**sizes)
    tensors = hf_tensors(config, True, head="classify")
    params = Bert(config, head="classify").init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    folder.mkdir()
    write_shards(folder, hub_arrays(tensors, params, "float32"), 10**9)
    (folder / "config.json").write_text(json.dumps(sizes))


@pytest.mark.parametrize("page", PAGES)
def test_blocks(page, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.S)
    codes = [compile(block, f"{page}, block {n}", "exec") for n, block in enumerate(blocks, start=1)]
    if page not in GIVEN:
        return
    monkeypatch.chdir(tmp_path)
    small_model(tmp_path / "HuggingFaceTB" / "SmolLM2-360M")
    small_encoder(tmp_path / "roberta-base-folder")
    names = {"__name__": page}
    exec(compile(COMMON + GIVEN[page], f"given to {page}", "exec"), names)
    for code in codes:
        exec(code, names)


def test_links_lead_somewhere():
    for path in [*DOCS.glob("*.md"), DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
            assert "://" in target or (path.parent / target).exists(), f"{path.name} links to {target}"


def commands(path):
    """The words of each `jlora` line of a page, as bash takes them."""
    for line in re.findall(r"^    (?:.*&& )?(jlora (?:.*\\\n)*.*)$", path.read_text(encoding="utf-8"), re.M):
        said = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], check=True, capture_output=True, text=True)
        yield said.stdout.split("\0")[1:-1]


@pytest.mark.parametrize("path", [*DOCS.glob("*.md"), DOCS.parent / "README.md"], ids=lambda path: path.name)
def test_commands_are_taken_as_printed(path, monkeypatch):
    monkeypatch.setattr("jlora.commands.settings.read_settings", lambda cls, path: {"model": "m", "data": "d"})
    for name, *words in commands(path):
        module, settings, _ = COMMANDS[name]
        config = parse(getattr(importlib.import_module(module), settings), words, f"jlora {name}")
        assert "://" not in str(getattr(config, "adapter", "")), "an adapter is read from a local folder"


def test_the_evaluation_on_e2e(tmp_path, monkeypatch, capsys):
    """docs/training.md's, on a small model and rows under E2E's names: by the templates of the training."""
    pytest.importorskip("sacrebleu")
    (words,) = (words for words in commands(DOCS / "training.md") if words[0] == "eval")
    trained = yaml.safe_load((DOCS.parent / "experiments/e2e.yaml").read_text())
    assert [words[words.index(f"--{name}") + 1] for name in ("prompt", "completion")] == [
        trained["prompt"],
        trained["completion"],
    ]
    monkeypatch.chdir(tmp_path)
    folder = small_model(tmp_path / "model")
    base = load(folder)
    lora = jlora.lorafy(base.params, 2, layouts=base.layouts)[1]
    save_peft("run-e2e/adapter", lora, jlora.LoraConfig(r=2), base.tensors, base.source)
    lines = [f'"name[{n}], food[good]",{word} film\n' for n in range(2) for word in ("good", "fine")]
    (tmp_path / "testset_w_refs.csv").write_text('"mr","ref"\n' + "".join(lines))
    main([folder if word == trained["model"] else word for word in words] + ["--max-new-tokens", "4", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 4
    assert {"bleu", "chrf"} <= set(found["difference"])
