"""Mixtures against dense matrices written out in numpy, against PEFT, and the command on files."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.cli import main
from jlora.commands.mix import MixConfig, mix_command, read
from jlora.io.peft import save_peft
from jlora.mix import mix
from jlora.models.llama import Llama, LlamaConfig, hf_tensors

SHAPE = (3, 10, 8)
PARAMS = {"layers": {"k": jnp.zeros(SHAPE)}, "out": jnp.zeros((6, 9)), "bias": jnp.zeros(4)}


def adapter(seed, rank, alpha=6.0, targets=("layers", "out")):
    _, lora = jlora.lorafy(PARAMS, rank, alpha=alpha, targets=targets, layouts={"layers/k": "sio"})
    return jax.tree.map(lambda x: jax.random.normal(jax.random.key(seed * 99 + x.size), x.shape), lora)


def deltas(tree):
    """{path: W} of a tree's differences, f64."""
    held = jlora.tree.paths(tree, lambda x: isinstance(x, jlora.LoraFactors))
    return {
        path: np.asarray(e.lora_a, np.float64) @ np.asarray(e.lora_b, np.float64) * e.scaling
        for path, e in held.items()
    }


A, B, C = adapter(1, 2), adapter(2, 3, alpha=1.0), adapter(3, 4, targets="out")


def close(got, want, tol=1e-4):
    assert set(got) == set(want)
    for path in want:
        np.testing.assert_allclose(got[path], want[path], atol=tol * np.abs(want[path]).max())


def test_linear_is_the_sum_and_a_rank_cuts_it_best():
    a, b, c = deltas(A), deltas(B), deltas(C)
    want = {path: 0.7 * a[path] - 1.3 * b[path] for path in a}
    want["out"] = want["out"] + 2.0 * c["out"]
    got = mix([A, B, C], [0.7, -1.3, 2.0])
    close(deltas(got), want)
    assert got["layers"]["k"].lora_a.shape == (3, 10, 5) and got["out"].lora_b.shape == (9, 9)
    assert got["bias"] is None
    cut = mix([A, B, C], [0.7, -1.3, 2.0], rank=2)
    assert cut["layers"]["k"].lora_a.shape == (3, 10, 2)
    u, s, vt = np.linalg.svd(want["out"], full_matrices=False)
    close({"out": deltas(cut)["out"]}, {"out": u[:, :2] * s[:2] @ vt[:2]})
    for layer, d in enumerate(want["layers/k"]):
        u, s, vt = np.linalg.svd(d, full_matrices=False)
        close({0: deltas(cut)["layers/k"][layer]}, {0: u[:, :2] * s[:2] @ vt[:2]})

    close(deltas(mix([A, B], [1, 2], "svd")), deltas(mix([A, B], [1, 2], rank=3)))


def test_taking_an_adapter_away_unlearns_it():
    both = mix([mix([A, B], [1, 1]), A], [1, -1], rank=3)
    close(deltas(both), deltas(B))


def ties(ds, weights, density):
    """TIES as the paper puts it: trim, elect, merge what agrees."""
    trimmed = []
    for d, w in zip(ds, weights, strict=True):
        least = np.sort(np.abs(d).ravel())[-max(1, int(density * d.size))]
        trimmed.append(np.where(np.abs(d) >= least, d, 0) * np.sign(w))
    sign = np.where(sum(trimmed) >= 0, 1, -1)
    total, count = 0, 0
    for d, w in zip(trimmed, weights, strict=True):
        total, count = total + np.where(np.sign(d) == sign, abs(w) * d, 0), count + (np.sign(d) == sign)
    return total / np.maximum(count, 1)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.3)])
def test_ties_and_prune_a_layer_at_a_time(weights):
    a, b = deltas(A), deltas(B)
    got = mix([A, B], weights, "ties", rank=10, density=0.3)
    close({"out": deltas(got)["out"]}, {"out": ties((a["out"], b["out"]), weights, 0.3)})
    layers = np.stack([ties(pair, weights, 0.3) for pair in zip(a["layers/k"], b["layers/k"], strict=True)])
    close({"k": deltas(got)["layers/k"]}, {"k": layers})
    got = mix([A], [2.0], "prune", rank=10, density=0.3)
    least = np.sort(np.abs(a["out"]).ravel())[-int(0.3 * 54)]
    close({"out": deltas(got)["out"]}, {"out": np.where(np.abs(a["out"]) >= least, 2 * a["out"], 0)})


def test_dare_is_unbiased_and_each_number_is_gone_or_rescaled():
    a, b = deltas(A)["out"], deltas(B)["out"]
    only = [{"out": tree["out"]} for tree in (A, B)]
    draw = lambda n, method="dare": deltas(mix(only, [1.0, 0.5], method, rank=6, key=jax.random.key(n)))
    first = draw(0)["out"]
    options = np.stack([x * 2 * a + y * b for x in (0, 1) for y in (0, 1)])
    assert np.abs(options - first).min(0).max() < 1e-4
    assert np.abs(draw(1)["out"] - first).max() > 0.1
    mean = np.mean([draw(n)["out"] for n in range(40)], axis=0)
    assert np.linalg.norm(mean - a - 0.5 * b) < 0.35 * np.linalg.norm(a + 0.5 * b)
    assert np.abs(draw(0, "dare_ties")["out"] - first).max() > 0.1
    every = mix([A, B], [1.0, 1.0], "dare", rank=10, density=1.0)
    close(deltas(every), {path: deltas(A)[path] + deltas(B)[path] for path in deltas(A)})


def test_refusals():
    whole = {**A, "bias": jnp.ones(4)}
    for args, options, text in (
        (([A], [1.0, 2.0]), {}, "1 adapters and 2 weights"),
        (([A, whole], [1, 1]), {}, "bias: trained whole, and only LoRA"),
        (([A, B], [1, 1], "factors"), {}, r"ranks \[2, 3\], and sums of factors need one"),
        (([A], [1], "x"), {}, "'x' is not known: linear"),
        (([A], [1]), {"density": 0.0}, "density 0.0"),
        (([A], [1]), {"rank": 0}, "rank 0"),
        (([A], [1], "cat"), {"rank": 2}, "svd cuts to a rank"),
    ):
        with pytest.raises(ValueError, match=text):
            mix(*args, **options)


SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three adapters in PEFT's format for one tiny Llama: of q and v, rsLoRA with a rank of their own, of o alone."""
    config = LlamaConfig(97, 32, 48, 2, 4, 2, 8)
    tensors = hf_tensors(config)
    params = jax.eval_shape(lambda: Llama(config).init(jax.random.key(0), jnp.zeros((1, 1), int)))["params"]
    layouts = {t.path: "sio" for t in tensors if t.layer is not None and t.transpose}
    place = tmp_path_factory.mktemp("mix")
    for n, (name, options) in enumerate(
        {
            "a": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
            "b": {"r": 4, "target_modules": ["q_proj", "v_proj"], "use_rslora": True, "rank_pattern": {"v_proj": 2}},
            "c": {"r": 4, "target_modules": ["o_proj"]},
        }.items()
    ):
        settings = jlora.LoraConfig(lora_alpha=6, **options)
        shapes = jax.eval_shape(lambda p, s=settings: jlora.lorafy(p, config=s, layouts=layouts)[1], params)
        lora = jax.tree.map(lambda x, n=n: jax.random.normal(jax.random.key(n * 7 + x.size), x.shape) / 3, shapes)
        save_peft(place / name, lora, settings, tensors, "small")
    return place


def command(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(["mix", "--json", *map(str, words)])
        raise SystemExit(0)
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def test_command(folders, capsys, tmp_path):
    out = tmp_path / "mixed"
    code, text, _ = command(capsys, f"{folders}/a:0.7", f"{folders}/b:-1", f"{folders}/c", "-o", out)
    assert code == 0 and json.loads(text) == {"output": str(out), "rank": 8, "modules": 6}
    a, b, c, mixed = (deltas(read(str(folder))) for folder in (folders / "a", folders / "b", folders / "c", out))
    want = {path: c[path] if "o_proj" in path else 0.7 * a[path] - b[path] for path in (*a, *c)}
    close(mixed, want)
    code, _, err = command(capsys, f"{folders}/a:x", "-o", out)
    assert code == 1 and "'x' is no weight; write FOLDER:NUMBER" in err
    code, _, err = command(capsys, f"{folders}/nowhere:1", "-o", out)
    assert code == 1 and "nowhere/adapter_config.json: no such file" in err
    other = tmp_path / "other"
    shutil.copytree(folders / "a", other)
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "else"}))
    code, _, err = command(capsys, f"{folders}/a", other, "-o", out)
    assert code == 1 and "other is for else" in err
    (other / "adapter_config.json").write_text(json.dumps({**settings, "revision": "v2"}))
    code, _, err = command(capsys, f"{folders}/a", other, "-o", out)
    assert code == 1 and "other is for small@v2" in err


@pytest.mark.filterwarnings("default")  # peft's own
def test_peft_mixes_to_the_same_differences(folders, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model = peft.PeftModel.from_pretrained(base, str(folders / "a"), adapter_name="a")
    model.load_adapter(str(folders / "b"), adapter_name="b")
    trees = [read(str(folders / name)) for name in "ab"]
    weights = [0.7, 0.5]
    for theirs, options in {
        "cat": {"method": "cat"},
        "svd": {"method": "svd", "rank": 3},
        "ties_svd": {"method": "ties", "rank": 3},
        "magnitude_prune_svd": {"method": "prune", "rank": 3},
    }.items():
        extra = {"svd_rank": 3} if "svd" in theirs else {}
        model.add_weighted_adapter(["a", "b"], weights, theirs, theirs, density=0.4, **extra)
        got = deltas(mix(trees, weights, density=0.4, **options))
        for name, module in model.named_modules():
            if hasattr(module, "lora_A") and theirs in module.lora_A:
                path = name.removeprefix("base_model.model.") + "/kernel"
                close({0: got[path]}, {0: module.get_delta_weight(theirs).detach().numpy().T}, 1e-3)
    # their sum of factors needs equal ranks
    model.add_weighted_adapter(["a", "a"], [0.7, -0.5], "linear", "linear")
    got = deltas(mix([trees[0]] * 2, [0.7, -0.5], "factors"))
    module = model.base_model.model.model.layers[1].self_attn.q_proj
    path = "model.layers.1.self_attn.q_proj/kernel"
    close({0: got[path]}, {0: module.get_delta_weight("linear").detach().numpy().T}, 1e-3)
    assert torch.isfinite(module.get_delta_weight("linear")).all()
    mix_command(MixConfig((f"{folders}/a:1", f"{folders}/c:2"), str(tmp_path / "both"), rank=4))
    again = peft.PeftModel.from_pretrained(base, str(tmp_path / "both"))
    assert {n.split(".")[-2] for n, _ in again.named_modules() if n.endswith("lora_A")} >= {
        "q_proj",
        "v_proj",
        "o_proj",
    }
