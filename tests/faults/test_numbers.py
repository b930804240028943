"""Training and evaluation at their edges: no labels, no rows, too many tokens, tokens that the model does not have."""

from __future__ import annotations

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.cli import main
from jlora.data import BatchSource, Example
from jlora.io.load import Pretrained
from jlora.models.bert import BertConfig
from jlora.models.gpt2 import GPT2Config
from jlora.train import OptimiserConfig, Sums, evaluate, init_state, make_optimiser, make_train_step
from tests.small import small_model


def sums(trained, frozen, batch, key):
    loss = jnp.sum(batch["weights"] * (trained["w"] - batch["labels"]) ** 2)
    count = batch["weights"].sum()
    return Sums(loss, count, jnp.zeros(()), jnp.zeros(()), jnp.zeros(()), count)


def test_a_batch_with_no_label_changes_nothing():
    tx = make_optimiser(OptimiserConfig(learning_rate=0.1, warmup=0), 4)
    state = init_state({"w": jnp.full(3, 2.0)}, tx)
    batch = {"weights": np.zeros(3, np.float32), "labels": np.ones(3, np.float32)}
    state, (got, norm) = make_train_step(sums, tx)(state, None, batch)
    np.testing.assert_array_equal(state.trained["w"], 2.0)
    assert (float(got.loss), float(got.tokens), float(norm), int(state.step)) == (0, 0, 0, 1)


def test_a_batch_past_float16_changes_no_weight():
    tx = make_optimiser(OptimiserConfig(learning_rate=0.1, warmup=0), 4)
    state = init_state({"w": jnp.full(3, 300, jnp.float16)}, tx)
    batch = {"weights": np.ones(3, np.float16), "labels": np.zeros(3, np.float16)}
    state, (got, _) = make_train_step(sums, tx)(state, None, batch)
    assert bool(jnp.isinf(got.loss)) and state.trained["w"].dtype == jnp.float16
    np.testing.assert_array_equal(state.trained["w"], 300)


def test_examples_with_no_label_make_batches():
    none = [Example(np.arange(4, dtype=np.int32), np.zeros(4, bool))] * 3
    batch = BatchSource(none, 2, [8])[0]
    assert batch["tokens"].shape == (2, 8) and batch["weights"].sum() == 0


def test_nothing_to_evaluate():
    assert evaluate(None, None, None, [])["examples"] == 0
    with pytest.raises(ValueError, match="no examples"):
        BatchSource([], 2, [8])


def held(config):
    return Pretrained(None, None, config, None, "base", [])


def test_positions_and_tokens_that_a_model_does_not_have():
    gpt2 = held(GPT2Config(vocab_size=10, n_positions=16))
    gpt2.check(16, 9)
    with pytest.raises(ValueError, match="base has 16 positions, a row has 17 tokens: set max_length to 16"):
        gpt2.check(17, 9)
    with pytest.raises(ValueError, match="token 10 is past the 10 of base"):
        gpt2.check(4, 10)
    roberta = BertConfig(10, 8, 8, 1, 2, max_position_embeddings=18, pad_token_id=1, model_type="roberta")
    held(roberta).check(16, 9)
    with pytest.raises(ValueError, match="16 positions"):
        held(roberta).check(17, 9)
    held(types.SimpleNamespace(model_type="llama", vocab_size=10)).check(10**6, 9)  # rotary: no table to leave


def test_a_tokenizer_that_grew_is_refused_on_the_command_line(tmp_path, capsys):
    model = small_model(tmp_path / "m")
    path = tmp_path / "m" / "tokenizer.json"
    words = json.loads(path.read_text())
    words["model"]["vocab"]["late"] = len(words["model"]["vocab"])
    path.write_text(json.dumps(words))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "good late", "completion": " positive"}) + "\n")
    with pytest.raises(SystemExit) as end:
        main(["train", "--model", model, "--data", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "run")])
    assert end.value.code == 1 and "token 15 is past the 15 of" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_same_seed_gives_the_same_bits():
    params = {"w": jnp.ones((8, 8))}
    import jlora

    one, two = (jlora.lorafy(params, 2, key=jax.random.key(3), targets="w")[1] for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    three = jlora.lorafy(params, 2, key=jax.random.key(4), targets="w")[1]
    assert not np.array_equal(one["w"].lora_a, three["w"].lora_a)
