"""Hub folders written by transformers, and the real GGUF, give transformers' logits; what does not fit is an error."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import jlora.io
from jlora.cli import main
from jlora.io.adapters import save_adapter
from jlora.io.pypi import SMOLLM2, pip_file
from jlora.io.save import save
from jlora.methods import named
from tests.small import small_model

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 9))


@pytest.fixture
def theirs():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


def logits(loaded, tokens):
    return np.asarray(loaded.model.apply({"params": loaded.params}, jnp.asarray(tokens)))


def close(got, want):
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("scan", [True, False])
def test_a_hub_folder(theirs, tmp_path, shard, scan):
    import torch

    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    loaded = jlora.io.load(str(tmp_path), scan_layers=scan)
    with torch.no_grad():
        close(logits(loaded, TOKENS), theirs(torch.tensor(TOKENS)).logits.numpy())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub's cache with owner/name in it, at revision v1 alone."""
    from huggingface_hub import constants

    for name, value in (("HF_HUB_CACHE", str(tmp_path / "hub")), ("HF_HUB_OFFLINE", True)):
        monkeypatch.setattr(constants, name, value)
    place = tmp_path / "hub" / "models--owner--name"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "v1").write_text("c" * 40)
    small_model(place / "snapshots" / ("c" * 40))


@pytest.mark.parametrize("source", ["hf://owner/name@v1", "owner/name@v1", "owner/name"])
@pytest.mark.parametrize("method", ["lora", "ia3", "houlsby"])  # PEFT's file, its other one, and jlora's
def test_an_adapter_names_its_base_as_peft_reads_it(hub, source, method, tmp_path):
    base = jlora.io.load(source, revision=None if "@" in source else "v1")
    settings = named.MethodConfig(method=method, rank=2, width=2)
    _, trained = named.make(base.params, settings, layouts=base.layouts)
    save_adapter(tmp_path / "a", base, trained, settings)
    held = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (held["base_model_name_or_path"], held["revision"]) == ("owner/name", "v1")
    assert "base_model: owner/name\n" in (tmp_path / "a" / "README.md").read_text()
    if method == "houlsby":
        return
    for said, want in (([], ["owner/name", "v1"]), (["--base", "hf://other/name@v2"], ["other/name", "v2"])):
        out = tmp_path / f"b{len(said)}"
        main(["export", "--model", "owner/name@v1", "--adapter", str(tmp_path / "a"), "--output", str(out), *said])
        held = json.loads((out / "adapter_config.json").read_text())
        assert [held["base_model_name_or_path"], held["revision"]] == want


def test_a_wrong_shape_is_named(theirs, tmp_path):
    from safetensors.numpy import load_file, save_file

    theirs.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    held["model.norm.weight"] = np.ones(31, np.float32)
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        jlora.io.load(str(tmp_path))


def test_a_missing_tensor_is_named(theirs, tmp_path):
    from safetensors.numpy import load_file, save_file

    theirs.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    del held["model.layers.1.mlp.up_proj.weight"]
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj"):
        jlora.io.load(str(tmp_path))


def test_the_real_gguf_answers_as_in_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    try:
        path = pip_file(SMOLLM2)
    except OSError as error:
        pytest.skip(f"SmolLM2 could not be fetched by pip: {error}")
    loaded = jlora.io.load("smollm2-135m-instruct")
    texts = ["The capital of France is", "In 2024, 1+1 isn't 3;\n\tnaïve  caffè 東京", "<|im_start|>user\nhi<|im_end|>"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()
    words = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in texts:
        tokens = loaded.tokenizer(text)["input_ids"]
        assert tokens == words(text)["input_ids"]
        with torch.no_grad():
            want = theirs(torch.tensor([tokens])).logits.numpy()
        got = logits(loaded, [tokens])
        close(got, want)
        if text == texts[0]:
            assert loaded.tokenizer.decode([int(got[0, -1].argmax())]) == " Paris"


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="owner/nothing is not in the cache and the Hub cannot be reached"):
        jlora.io.load("hf://owner/nothing@v1")
    with pytest.raises(FileNotFoundError, match=r"no such file or folder, Hub id \(owner/name\) or short name"):
        jlora.io.load("nothing.gguf")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        jlora.io.load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match="model_type 'mamba' is not supported"):
        jlora.io.load(str(tmp_path))


def test_a_cut_file_is_never_half_loaded(tmp_path):
    from tests.small import small_model

    folder = small_model(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is cut short or no safetensors"):
        jlora.io.load(folder)


def test_parts_go_to_their_devices(tmp_path):
    import jax
    from jax.sharding import SingleDeviceSharding

    from tests.small import small_model

    folder, asked = small_model(tmp_path / "m"), {}

    def sharding(path, shape):
        asked[path] = shape.shape
        return SingleDeviceSharding(jax.devices()[0])

    placed, plain = jlora.io.load(folder, sharding=sharding), jlora.io.load(folder)
    jax.tree.map(np.testing.assert_array_equal, placed.params, plain.params)
    assert asked["layers/mlp/down_proj/kernel"] == (2, 48, 32)


def test_an_answer_ends_where_the_checkpoint_says_too(tmp_path, capsys):
    folder = tmp_path / "m"
    small_model(folder)  # the tokenizer's end is 2
    file, config = folder / "generation_config.json", folder / "config.json"

    def ends(**held):
        file.write_text(json.dumps(held))
        return jlora.io.load(str(folder), weights=False).ends

    assert ends() == (2,) and ends(eos_token_id=7) == (2, 7) and ends(eos_token_id=[7, 2, 5, 99]) == (2, 7, 5)
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": [0, 8]}))
    assert ends() == (2, 0) and ends(eos_token_id=7) == (2, 7)  # 8 is a plain word
    file.unlink()
    assert jlora.io.load(str(folder), weights=False).ends == (2, 0)
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id two is no token's number"):
        ends(eos_token_id="two")
    ends(eos_token_id=list(range(15)))
    main(["generate", "good film", "--model", str(folder), "--raw"])
    assert len(capsys.readouterr().out.split()) <= 1  # whatever comes first ends it


def test_an_answer_ends_where_the_chat_template_ends_a_turn(tmp_path):
    small_model(tmp_path / "m")
    path = tmp_path / "m" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": "<unk>"}))  # of texts, as a base model's
    base = jlora.io.load(str(tmp_path / "m"))
    assert base.tokenizer.eos_token_id == 0 and set(base.ends) == {0, 2}
    save(tmp_path / "again", base, base.params)
    assert jlora.io.load(str(tmp_path / "again"), weights=False).ends == base.ends
