"""The commands as a user types them: results, exit codes, what is written, and what bad input says."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import yaml

import jlora
from jlora.cli import main, sentence
from jlora.io import load
from jlora.io.adapters import load_adapter
from jlora.train import OptimiserConfig
from jlora.train.track import Tracker
from tests.small import rows, small_model

FAST = ["--steps", "30", "--batch", "8", "--learning-rate", "0.02", "--held-out", "12", "--save-every", "10"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    return {"model": small_model(folder / "model"), "data": rows(folder), "folder": folder}


@pytest.fixture(scope="module")
def trained(place):
    out = place["folder"] / "run"
    main(["train", "--model", place["model"], "--data", place["data"], "--output", str(out), *FAST])
    return out


def run(capsys, *args):
    """(exit code, stdout, stderr)."""
    code = 0
    try:
        main(list(args))
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return code, said.out, said.err


def test_train_learns_and_leaves_what_it_says(trained):
    report = json.loads((trained / "report.json").read_text())
    assert report["before"]["exact"] <= 0.5 < 0.99 <= report["after"]["exact"]
    assert report["step"] == 30
    assert {"adapter", "settings.yaml", "metrics.jsonl", "plot.png"} <= {path.name for path in trained.iterdir()}
    assert [s["after"] for s in report["samples"]] == [s["want"].strip() for s in report["samples"]]
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(31), 30]
    checkpoints = sum(f.stat().st_size for f in (trained / "checkpoints").rglob("*") if f.is_file())
    assert checkpoints < 2 * 3.5 * (trained / "adapter" / "adapter_model.safetensors").stat().st_size + 200_000


def test_settings_saved_run_again_to_the_same_adapter(trained, place, tmp_path):
    again = tmp_path / "again"
    main(["train", "--config", str(trained / "settings.yaml"), "--output", str(again)])
    same = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (trained, again)]
    assert same[0] == same[1]


def test_eval_and_merge(trained, place, tmp_path, capsys):
    adapter = str(trained / "adapter")
    code, out, _ = run(
        capsys, "eval", "--json", "--model", place["model"], "--data", place["data"], "--adapter", adapter
    )
    report = json.loads(out)
    assert code == 0 and report["adapter"]["exact"] > 0.99 > report["base"]["exact"]
    merged = tmp_path / "merged"
    code, out, err = run(
        capsys, "merge", "--json", "--model", place["model"], "--adapter", adapter, "--output", str(merged),
        "--dtype", "float32", "--shard-bytes", "20000",
    )  # fmt: skip
    assert code == 0, err
    assert len(list(merged.glob("model-*-of-*.safetensors"))) > 1
    base, plain = load(place["model"]), load(merged)
    frozen, lora, _ = load_adapter(base, adapter)
    tokens = np.array([[3, 4, 5, 9, 10]])
    want = jlora.lift(base.model.apply)({"params": jlora.combine(frozen, lora)}, tokens)
    np.testing.assert_allclose(plain.model.apply({"params": plain.params}, tokens), want, atol=1e-5)
    code, _, err = run(capsys, "merge", "--model", place["model"], "--adapter", adapter, "--output", str(merged))
    assert code == 1 and "exists and is not empty" in err


def test_export_to_gguf_is_what_llama_cpp_adds(trained, place, tmp_path, capsys):
    gguf = pytest.importorskip("gguf")
    path, adapter = tmp_path / "adapter.gguf", str(trained / "adapter")
    code, _, err = run(
        capsys, "export", "--to", "gguf", "--model", place["model"], "--adapter", adapter, "--output", str(path)
    )
    assert code == 0, err
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "adapter"
    scaling = reader.fields["adapter.lora.alpha"].contents() / 8
    held = {tensor.name: tensor.data for tensor in reader.tensors}
    base = load(place["model"])
    _, lora, _ = load_adapter(base, adapter)
    entry = lora["layers"]["self_attn"]["q_proj"]["kernel"]
    delta = np.asarray(entry.lora_a[1] @ entry.lora_b[1]).T * entry.scaling
    # llama.cpp's order of rows: the two halves of each rotary head, interleaved
    want = delta.reshape(4, 2, 4, -1).swapaxes(1, 2).reshape(delta.shape)
    got = scaling * held["blk.1.attn_q.weight.lora_b"] @ held["blk.1.attn_q.weight.lora_a"]
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert len(held) == 2 * 7 * 2


def test_training_goes_on_from_an_adapter(trained, place, tmp_path, capsys):
    args = ["train", "--json", "--model", place["model"], "--data", place["data"], "--held-out", "12", "--steps", "2"]
    code, out, err = run(capsys, *args, "--output", str(tmp_path / "on"), "--adapter", str(trained / "adapter"))
    assert code == 0, err
    assert json.loads(out)["before"]["exact"] > 0.99


def test_packing_other_optimisers_and_early_stopping(place, tmp_path, capsys):
    args = ["train", "--json", "--model", place["model"], "--data", place["data"], "--held-out", "12", "--batch", "2"]
    args += ["--max-length", "40", "--packing", "--optimiser", "lion", "--schedule", "wsd", "--samples", "0"]
    args += ["--learning-rate", "0.01", "--steps", "200", "--eval-every", "5", "--patience", "2", "--clip", "0"]
    code, out, err = run(capsys, *args, "--output", str(tmp_path), "--label-smoothing", "0.05", "--z-loss", "1e-4")
    assert code == 0, err
    report = json.loads(out)
    assert report["step"] < 200 and report["best"]["step"] == report["step"] - 10
    assert report["best"]["loss"] < 0.5 * report["before"]["loss"]
    code, out, err = run(
        capsys,
        "eval",
        "--json",
        "--model",
        place["model"],
        "--data",
        place["data"],
        "--adapter",
        str(tmp_path / "best"),
    )
    assert json.loads(out)["adapter"]["exact"] > 0.9


def test_a_run_that_diverges_stops_with_the_batch_in_hand(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jlora.commands.parts.rates", lambda config: OptimiserConfig(float("inf"), clip=0.0))
    told = []
    tracker = Tracker(lambda kind, step, figures: told.append(step), lambda: told.append("closed"))
    monkeypatch.setattr("jlora.commands.watch.make_tracker", lambda *_: tracker)
    args = ["train", "--model", place["model"], "--data", place["data"], "--output", str(tmp_path), "--steps", "30"]
    code, _, err = run(capsys, *args, "--bad-steps", "2", "--batch", "4")
    assert code == 1 and "3 in a row: try a lower learning rate" in err
    assert np.load(tmp_path / "bad-batch.npz")["tokens"].shape[0] == 4
    assert not (tmp_path / "adapter").exists() and told == [1, 2, 3, 4, "closed"]  # one good step, three bad


def test_generate_with_and_without_the_adapter(trained, place, capsys, monkeypatch):
    prompt, adapter = "Review : awful film Sentiment :", str(trained / "adapter")
    code, out, err = run(capsys, "generate", "--model", place["model"], "--adapter", adapter, "--raw", prompt)
    assert (code, out) == (0, "negative\n"), err
    args = ["generate", "--json", "--model", place["model"], "--adapter", adapter, "--raw", "--beams", "2"]
    code, out, err = run(capsys, *args, prompt, prompt.replace("awful", "good"))
    assert json.loads(out)["answers"] == ["negative", "positive"]
    monkeypatch.setattr("sys.stdin", io.StringIO("good film\n\n"))
    code, out, err = run(capsys, "chat", "--model", place["model"], "--max-new-tokens", "5")
    assert code == 0 and len(out.split()) >= 1, err
    code, out, err = run(capsys, "chat", "--model", place["model"], "--beams", "4")  # it streams: no beams
    assert code == 2 and "--beams" in err
    code, out, err = run(capsys, "generate", "--model", place["model"], "--top-p", "0", "a")
    assert code == 1 and "top_p = 0.0 is out of its range" in err


def test_a_merged_folder_loads_in_transformers(trained, place, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    main(["merge", "--model", place["model"], "--adapter", str(trained / "adapter"), "--output", str(tmp_path / "m"),
          "--dtype", "float32"])  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "m")("Review : good film Sentiment :")["input_ids"]
    ours = load(tmp_path / "m")  # a Path will do
    with torch.no_grad():
        want = theirs(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(ours.model.apply({"params": ours.params}, np.array([ids])), want, atol=1e-4)


def test_chat_rows(place, tmp_path, capsys):
    data = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "good film"}, {"role": "assistant", "content": "positive"}]
    data.write_text(json.dumps({"messages": turns}) + "\n")
    code, out, err = run(capsys, "train", "--dry-run", "--json", "--model", place["model"], "--data", str(data))
    assert code == 0 and json.loads(out)["rows"] == 1
    assert "user : good film <|im_end|> <|im_start|> assistant :«positive <|im_end|>»" in err


def test_answers_of_chats_are_written_and_measured(place, tmp_path, capsys):
    data, turn = tmp_path / "chats.jsonl", lambda role, text: {"role": role, "content": text}
    moods = [("good", "positive"), ("bad", "negative")] * 4
    chats = ([turn("user", f"{word} film"), turn("assistant", answer)] for word, answer in moods)
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    common = ["--json", "--model", place["model"], "--data", str(data), "--metrics", "exact", "--max-new-tokens", "2"]
    args = ["--eval-data", str(data), "--learning-rate", "0.03", "--warmup", "0", "--buckets", "1", "--samples", "2"]
    code, out, err = run(capsys, "train", *common, *args, "--steps", "30", "--output", str(tmp_path / "run"))
    assert code == 0, err
    report = json.loads(out)
    assert [(one["want"], one["after"]) for one in report["samples"]] == [(answer, answer) for _, answer in moods[:2]]
    assert "good film <|im_end|> <|im_start|> assistant :" in report["samples"][0]["prompt"]
    assert "after, 2 written answers: exact answer 100.0%" in err
    code, out, err = run(capsys, "eval", *common, "--adapter", str(tmp_path / "run" / "adapter"), "--draws", "2")
    assert code == 0 and json.loads(out)["adapter"]["exact"] == 1, err


def test_rows_of_text_have_no_prompt_to_answer(place, tmp_path, capsys):
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": f"good film {'bad ' * n}"}) + "\n" for n in range(6)))
    args = ["train", "--json", "--model", place["model"], "--data", str(data), "--held-out", "2", "--steps", "1"]
    args += ["--buckets", "1", "--output", str(tmp_path / "run")]
    code, out, err = run(capsys, *args)
    assert code == 0, err
    report = json.loads(out)
    assert report["samples"] == [] and report["after"]["tokens"] > 0
    code, _, err = run(capsys, *args, "--overwrite", "--metrics", "exact")
    assert code == 1 and "metrics of written answers need rows of prompt and completion" in err


def test_dry_run_reads_no_weights(place, tmp_path, capsys):
    import shutil

    shutil.copytree(place["model"], tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    held = weights.read_bytes()
    size = int.from_bytes(held[:8], "little")
    weights.write_bytes(held[: 8 + size] + b"\xff" * (len(held) - 8 - size))  # NaN everywhere
    out = tmp_path / "run"
    args = ["train", "--dry-run", "--json", "--model", str(tmp_path / "model"), "--data", place["data"]]
    code, said, err = run(capsys, *args, "--output", str(out), "--rank", "2")
    assert code == 0, err
    assert not out.exists()
    assert json.loads(said)["trained_parameters"] == 2 * 2 * (32 + 32 + 3 * (32 + 48) + 2 * (32 + 16) + 32 + 32)
    assert "q_proj/kernel" in err and "«positive <|im_end|>»" in err


@pytest.mark.parametrize(
    "line, sentence",
    [
        ('{"prompt": "a"}', "rows.jsonl:2: key 'completion' is missing"),
        ("{", "rows.jsonl:2: not JSON"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', r"messages\[0\].role"),
    ],
)
def test_a_bad_row_names_file_line_and_key(place, tmp_path, capsys, line, sentence):
    import re

    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    code, out, err = run(capsys, "train", "--model", place["model"], "--data", str(data))
    assert code == 1 and not out and re.search(sentence, err)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("learnig_rate: 1", "unknown key 'learnig_rate': did you mean learning_rate"),
        ("rank: many", "key 'rank': int, got 'many'"),
        ("targets: 3", "key 'targets': a list of text"),
        ("init: xavier", "one of kaiming, gaussian"),
        ("- a", "not a list"),
        ("a: [", "not YAML"),
    ],
)
def test_a_bad_settings_file_is_a_usage_error(tmp_path, capsys, text, sentence):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    code, _, err = run(capsys, "train", "--config", str(path), "--model", "m", "--data", "d")
    assert code == 2 and sentence in err


def test_flags_win_over_the_file(place, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    settings = {"model": place["model"], "data": place["data"], "rank": 3, "learning-rate": "2e-3", "targets": "mlp"}
    path.write_text(yaml.safe_dump(settings))
    code, _, err = run(capsys, "train", "--config", str(path), "--rank", "5", "--dry-run")
    assert code == 0, err
    assert "rank: 5" in err and "learning_rate: 0.002" in err and "gate_proj" in err and "q_proj" not in err


def test_usage_errors(capsys):
    assert run(capsys)[0] == 2
    code, _, err = run(capsys, "trian")
    assert code == 2 and "did you mean train" in err
    assert run(capsys, "train", "--modle", "x")[0] == 2
    assert run(capsys, "--help")[0] == 0
    code, _, err = run(capsys, "train", "--model", "no/such/model", "--data", "none.jsonl")
    assert code == 1 and "none.jsonl: no such data file" in err
    code, _, err = run(capsys, "train", "--model", "m", "--data", "d", "--rank", "0")
    assert code == 1 and "rank = 0" in err


def test_resume_refuses_other_settings(trained, place, capsys):
    args = ["train", "--model", place["model"], "--data", place["data"], "--output", str(trained), *FAST]
    held = {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    code, _, err = run(capsys, *args, "--resume", "--rank", "4")
    assert code == 1 and "rank: 8 -> 4" in err
    held[".lock"] = (trained / ".lock").read_bytes()
    assert {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()} == held


def test_sigterm_saves_and_resume_gives_the_same_bits(trained, place, tmp_path):
    out = tmp_path / "run"
    args = [sys.executable, "-m", "jlora.cli", "train", "--model", place["model"], "--data", place["data"]]
    args += ["--output", str(out), *FAST]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(args, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        for line in process.stderr:
            if line.startswith("training 10/"):
                process.send_signal(signal.SIGTERM)
                break
        process.stderr.read()
    assert process.returncode == 143
    assert not (out / "adapter").exists()
    subprocess.run([*args, "--resume"], env=env, check=True, capture_output=True)
    same = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (trained, out)]
    assert same[0] == same[1]
    assert (trained / "metrics.jsonl").read_text() == (out / "metrics.jsonl").read_text()


def test_a_full_disk_names_resume_where_a_run_goes_on():
    full = OSError(errno.ENOSPC, "No space left on device", "out")
    assert sentence(full, "merge") == "out: No space left on device (free some space)"
    assert "goes on with --resume" in sentence(full, "train")


@pytest.mark.parametrize(
    "error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")]
)
def test_out_of_memory_is_a_sentence(error, capsys, monkeypatch):
    def full(config):
        raise error

    for command, function, help in (
        ("train", "train.train", ": lower --batch (and raise --accumulate) or --max-length, or --remat full"),
        ("eval", "evaluate.evaluate_command", ": lower --batch or --max-length"),
        ("merge", "merge.merge_command", ""),
    ):
        monkeypatch.setattr(f"jlora.commands.{function}", full)
        more = ["--adapter", "a", "--output", "o"] if command == "merge" else ["--data", "d"]
        said = f"jlora {command}: out of memory{help}\n"
        assert run(capsys, command, "--model", "m", *more) == (1, "", said)


def test_other_failures_of_jax_are_not_called_out_of_memory(monkeypatch):
    def broken(config):
        raise jax.errors.JaxRuntimeError("INTERNAL: no such thing")

    monkeypatch.setattr("jlora.commands.merge.merge_command", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        main(["merge", "--model", "m", "--adapter", "a", "--output", "o"])
