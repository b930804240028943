"""docs/methods.md: its table's calls run, and merge and are filed as it says; its five calls run as printed."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import KEY, TOKENS, jitter

import jlora
from jlora.io import Pretrained
from jlora.io.adapters import load_adapter, save_adapter
from jlora.methods import (
    adalora,
    adapter,
    bitfit,
    dora,
    eva,
    full,
    ia3,
    intrinsic,
    named,
    prefix,
    prefix_kv,
    token_rows,
)
from jlora.methods.named import MethodConfig
from jlora.methods.together import together
from jlora.models.llama import Llama, LlamaConfig, hf_tensors

TEXT = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
ROWS = [
    (name.strip(), call, file.strip(), merges.strip())
    for name, call, file, merges in re.findall(r"^\|([^|]+)\| `([^`]+)` \|([^|]+)\|([^|]+)\|$", TEXT, re.M)
]
CONFIG = LlamaConfig(31, 16, 24, 3, 4, 2, 4, tie_word_embeddings=True, qkv_bias=True)
MODULES = [jlora, adalora, adapter, bitfit, dora, eva, full, ia3, intrinsic, named, prefix, prefix_kv, token_rows]
NAMES = {module.__name__.rpartition(".")[2]: module for module in MODULES}
NAMES |= {
    "together": together,
    "MethodConfig": MethodConfig,
    "save_adapter": save_adapter,
    "load_adapter": load_adapter,
}


@pytest.fixture(scope="module")
def base():
    model = Llama(CONFIG)
    return Pretrained(model, model.init(KEY, TOKENS)["params"], CONFIG, None, "tiny", hf_tensors(CONFIG))


def test_every_name_has_a_row():
    told = {name for name, *_ in ROWS if not name.startswith("(")}
    assert told >= set(named.METHODS) and len(ROWS) >= len(named.METHODS)
    for name in told:
        assert named.names_of(name)


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_rows(row, base, tmp_path):
    name, call, file, merges = row
    apply = lambda params, batch: base.model.apply({"params": params}, batch)
    names = {"params": base.params, "layouts": base.layouts, "apply": apply, "batches": [jnp.asarray(TOKENS)]}
    frozen, trained = eval(call, NAMES | names)
    if merges == "yes":
        assert jax.tree.structure(jax.eval_shape(jlora.merge, frozen, trained)) == jax.tree.structure(base.params)
    else:
        assert merges == "no"
        with pytest.raises(ValueError, match="cannot be merged"):
            jax.eval_shape(jlora.merge, frozen, trained)
    what = MethodConfig(method="lora" if name.startswith("(") else name)
    save_adapter(tmp_path, base, trained, what)
    kind = json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"]
    assert kind == {"plain": "JLORA"}.get(file.partition(";")[0], file)
    _, again, _ = load_adapter(base, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again, trained)
    if "settled" in file:
        save_adapter(tmp_path / "settled", base, adalora.settle(prefix.settle(jitter(trained))), what)
        kind = json.loads((tmp_path / "settled/adapter_config.json").read_text())["peft_type"]
        assert kind == file.rpartition(" ")[2]


def test_the_five_calls(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    names = {**NAMES, "base": base, "params": base.params, "layouts": base.layouts}
    exec(compile(code, "methods.md", "exec"), names)
    assert names["count"] == 3 * (8 + 8 + 24)
    assert names["what"] == MethodConfig("ia3")
    apply = lambda params: base.model.apply({"params": params}, jnp.asarray(TOKENS))
    np.testing.assert_allclose(jlora.lift(apply)(names["tuned"]), apply(names["merged"]), atol=1e-5)
