"""`jlora train` and `jlora eval` on labels and on preferences."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.cli import main
from tests.small import WORDS, small_model

PAIRS = {"good": " positive", "fine": " positive", "bad": " negative", "awful": " negative"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A small random BERT without a head, in Hub format, with a word tokenizer that knows pairs."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from jlora.io.save import hub_arrays
    from jlora.models.bert import Bert, BertConfig, hf_tensors

    folder = tmp_path_factory.mktemp("encoder")
    names = ["<pad>", "<cls>", "<sep>", *WORDS]
    config = BertConfig(len(names), 32, 48, 2, 4, max_position_embeddings=32)
    params = Bert(config, head="pooled").init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    save_file(dict(hub_arrays(hf_tensors(config, head="pooled"), params, np.float32)), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**dataclasses.asdict(config), "architectures": ["BertModel"]}))
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    both = {"single": "<cls> $A <sep>", "pair": "<cls> $A <sep> $B:1 <sep>:1"}
    words.post_processor = processors.TemplateProcessing(**both, special_tokens=[("<cls>", 1), ("<sep>", 2)])
    special = {"unk_token": "<unk>", "cls_token": "<cls>", "sep_token": "<sep>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return str(folder)


def result(capsys, *args):
    main(list(args))
    return json.loads(capsys.readouterr().out)


FAST = ["--steps", "40", "--batch", "16", "--buckets", "1", "--learning-rate", "0.01", "--targets", "query", "value"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_classes_of_pairs_are_learnt_and_the_head_goes_into_peft_s_file(encoder, tmp_path, capsys):
    data = tmp_path / "pairs.tsv"  # as GLUE's: no header, a label by name
    lines = [f"{PAIRS[b].strip()}\t{a} film\t{b} film" for a in PAIRS for b in PAIRS for _ in range(2)]
    data.write_text("\n".join(lines) + "\n")
    columns = ["--no-header", "--columns", "label=1", "sentence1=2", "sentence2=3"]
    place = ["--json", "--model", encoder, "--data", str(data), *columns]
    report = result(capsys, "train", *place, "--eval-data", str(data), "--output", str(tmp_path / "run"), *FAST)
    assert report["after"]["loss"] < 0.5 * report["before"]["loss"] and report["after"]["accuracy"] > 0.85
    adapter = tmp_path / "run" / "adapter"
    held = json.loads((adapter / "adapter_config.json").read_text())
    assert (held["task_type"], held["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
    assert json.loads((adapter / "classes.json").read_text()) == ["negative", "positive"]
    judged = result(capsys, "eval", *place, "--adapter", str(adapter), "--draws", "20")
    assert "base" not in judged  # its head is noise
    for name in ("loss", "accuracy", "f1", "matthews"):
        assert judged["adapter"][name] == pytest.approx(report["after"][name], abs=1e-5)
        low, high = judged["adapter"][f"{name}_interval"]
        assert low <= judged["adapter"][name] <= high

    merged = ["--model", encoder, "--adapter", str(adapter), "--output", str(tmp_path / "merged")]
    result(capsys, "merge", "--json", *merged, "--dtype", "float32")
    told = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert told["id2label"] == {"0": "negative", "1": "positive"} and told["num_labels"] == 2
    assert told["architectures"] == ["BertForSequenceClassification"]
    alone = result(capsys, "eval", *place, "--model", str(tmp_path / "merged"), "--draws", "20")
    assert alone["base"]["loss"] == pytest.approx(report["after"]["loss"], abs=1e-5)
    main(["export", *merged[:-1], str(tmp_path / "peft")])
    assert (tmp_path / "peft" / "classes.json").read_bytes() == (adapter / "classes.json").read_bytes()
    (tmp_path / "peft" / "classes.json").unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["merge", "--model", encoder, "--adapter", str(tmp_path / "peft"), "--output", str(tmp_path / "m")])
    assert "is of labels: write their names into classes.json there" in capsys.readouterr().err

    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification

    from jlora.io import load
    from jlora.io.adapters import load_adapter
    from jlora.merging import merge

    theirs = peft.PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2), adapter
    ).eval()
    tokens = np.array([[1, 8, 12, 2, 9, 12, 2]])
    types = np.array([[0, 0, 0, 0, 1, 1, 1]])
    base = load(encoder, head="classify", labels=2)
    frozen, lora, _ = load_adapter(base, adapter)
    ours = base.model.apply({"params": merge(frozen, lora)}, tokens, token_type_ids=types)
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    for model in (theirs, whole):
        with torch.no_grad():
            want = model(torch.tensor(tokens), token_type_ids=torch.tensor(types)).logits.numpy()
        np.testing.assert_allclose(ours, want, atol=1e-5)
    assert whole.config.id2label == {0: "negative", 1: "positive"}


def test_numbers_are_learnt(encoder, tmp_path, capsys):
    data = tmp_path / "scores.jsonl"
    score = {"good": 4.5, "fine": 3.0, "bad": 1.0, "awful": 0.0}
    rows = [{"text": f"{word}{' film' * n}", "label": value} for word, value in score.items() for n in (1, 2, 3, 4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text("def near(said, want):\n    return sum(map(float, said)) / len(want)\n")
    args = ["train", "--json", "--model", encoder, "--data", str(data), "--eval-data", str(data), *FAST]
    args += ["--metrics", f"{tmp_path / 'mine.py'}:near", "--output", str(tmp_path / "run"), "--steps", "80"]
    report = result(capsys, *args)
    assert report["after"]["pearson"] > 0.95 and report["after"]["loss"] < 0.2 * report["before"]["loss"]
    assert report["after"]["near"] == pytest.approx(np.mean(list(score.values())), abs=0.5)


def test_what_a_head_lacks_is_told_without_its_weights(encoder, tmp_path):
    from safetensors.numpy import load_file, save_file

    from jlora.io import load

    shutil.copytree(encoder, tmp_path / "m")
    loaded = lambda weights: load(tmp_path / "m", head="classify", weights=weights)
    fresh = lambda weights: {path.split("/")[0] for path in loaded(weights).fresh}
    assert fresh(False) == fresh(True) == {"classifier"}
    path = tmp_path / "m" / "model.safetensors"
    save_file({name: x for name, x in load_file(path).items() if "pooler" not in name}, path)
    assert fresh(False) == fresh(True) == {"classifier", "pooler"}
    path.unlink()
    assert fresh(False) == {"classifier", "pooler"}


@pytest.mark.parametrize(
    ("found", "held", "classes"),
    [
        (["bad", "good"], ["good", "bad"], ["good", "bad"]),
        (["bad", "good"], ["GOOD", "so-so", "BAD"], ["good", "so-so", "bad"]),
        (["0", "2"], ["LABEL_0", "LABEL_1", "LABEL_2"], ["0", "1", "2"]),
        (["1", "2"], ["LABEL_0", "LABEL_1"], None),
        (["bad", "good"], ["down", "up"], None),
        (["Bad", "bad"], ["bad", "up"], None),
        (["bad", "good"], [], None),
    ],
)
def test_classes_are_as_the_checkpoint_orders_them(found, held, classes):
    from jlora.io.classes import in_order

    assert in_order(found, held) == classes


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_classifier_of_the_hub_is_evaluated_by_its_own_names(encoder, tmp_path, capsys):
    from safetensors.numpy import load_file, save_file

    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"{word} film", "label": mood.strip()}) + "\n" for word, mood in PAIRS.items()) * 4
    )
    rows, merged = ["--data", str(tmp_path / "rows.jsonl")], tmp_path / "merged"
    main(["train", "--model", encoder, *rows, "--output", str(tmp_path / "run"), *FAST])
    main(["merge", "--model", encoder, "--adapter", str(tmp_path / "run" / "adapter"), "--output", str(merged)])
    capsys.readouterr()
    evaluate = lambda *args: result(capsys, "eval", "--json", "--model", str(merged), *args)["base"]["accuracy"]
    assert evaluate(*rows) == 1.0
    held = load_file(merged / "model.safetensors")
    save_file(
        {n: x[::-1].copy() if n.startswith("classifier") else x for n, x in held.items()}, merged / "model.safetensors"
    )
    config = json.loads((merged / "config.json").read_text())
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    turned = {"id2label": {"0": "POSITIVE", "1": "NEGATIVE"}, "label2id": {"POSITIVE": 0, "NEGATIVE": 1}}
    (merged / "config.json").write_text(json.dumps(config | turned))
    assert evaluate(*rows) == 1.0
    (merged / "config.json").write_text(json.dumps(config | {"id2label": {"0": "up", "1": "down"}}))
    main(["eval", "--json", "--model", str(merged), *rows])
    out, said = capsys.readouterr()
    assert json.loads(out)["base"]["accuracy"] == 0.0
    assert "the head's outputs are taken to be negative; positive" in said


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_preferences(loss, tmp_path, capsys):
    model, data = small_model(tmp_path / "model"), tmp_path / "pairs.jsonl"
    other = {" positive": " negative", " negative": " positive"}
    rows = [
        {"prompt": f"Review : {word}{' film' * n} Sentiment :", "chosen": answer, "rejected": other[answer]}
        for word, answer in PAIRS.items()
        for n in (1, 2, 3)
    ]
    if loss == "orpo":  # the same as chats
        said = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        rows = [{key: [{"role": said[key], "content": row[key].strip()}] for key in said} for row in rows]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = ["--json", "--model", model, "--data", str(data)]
    args = ["--eval-data", str(data), "--loss", loss, "--steps", "20", "--batch", "12", "--buckets", "1"]
    report = result(capsys, "train", *place, *args, "--learning-rate", "0.02", "--output", str(tmp_path / "run"))
    assert report["after"]["accuracy"] == 1 and report["after"]["loss"] < report["before"]["loss"]
    if loss == "dpo":
        assert report["before"]["loss"] == pytest.approx(np.log(2), abs=1e-6)
        more = ["train", *place, *args, "--steps", "1", "--adapter", str(tmp_path / "run" / "adapter")]
        again = result(capsys, *more, "--output", str(tmp_path / "again"))
        assert again["before"]["loss"] == pytest.approx(np.log(2), abs=1e-6)
        again = result(capsys, *more, "--reference", "base", "--output", str(tmp_path / "base"))
        assert again["before"]["loss"] == pytest.approx(report["after"]["loss"], rel=1e-5)
    judged = result(capsys, "eval", *place, "--adapter", str(tmp_path / "run" / "adapter"), "--draws", "20")
    assert judged["adapter"]["accuracy"] == 1 and judged["difference"]["margin"] > 0.5


def test_what_does_not_go_together(encoder, tmp_path, capsys):
    model, data = small_model(tmp_path / "model"), tmp_path / "rows.jsonl"

    def said(rows, *more):
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(SystemExit):
            main(["train", "--model", model, "--data", str(data), "--output", str(tmp_path / "run"), *more])
        return capsys.readouterr().err

    label = {"text": "good film", "label": 1}
    assert "every row has the label '1'" in said([label])
    assert "a decoder learns labels as answers: give prompt" in said([label, {**label, "label": 0}])
    unseen = tmp_path / "unseen.jsonl"
    unseen.write_text(json.dumps({**label, "label": -1}) + "\n")
    more = ["--model", encoder, "--eval-data", str(unseen), "--steps", "1"]
    assert "unseen.jsonl:1: key 'label' must be one of 0, 1, got -1" in said([label, {**label, "label": 0}], *more)
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert "needs loss: dpo or orpo" in said([pair])
    assert "mixes rows of kinds label, preference" in said([label, pair])
    assert "has no pairs" in said([{"prompt": "a", "completion": "b"}], "--loss", "dpo")


def test_a_sweep_trains_every_combination_as_train_would(tmp_path, capsys):
    from tests.small import rows

    place = ["--json", "--model", small_model(tmp_path / "model"), "--data", rows(tmp_path, 24), "--held-out", "8"]
    place += ["--steps", "6", "--batch", "16", "--buckets", "1", "--samples", "0", "--output"]
    grid = ["--grid", "rank=2,4", "learning-rate=0.02,0.005"]
    report = result(capsys, "sweep", *place, str(tmp_path / "sweep"), *grid)
    assert [trial["name"] for trial in report["trials"]][1] == "1-rank=2-learning_rate=0.005"
    one = ["--rank", "4", "--learning-rate", "0.02"]
    alone = result(capsys, "train", *place, str(tmp_path / "alone"), *one)
    trial = report["trials"][2]
    assert trial["after"]["loss"] == pytest.approx(alone["after"]["loss"], rel=1e-4)
    assert report["best"] == min(report["trials"], key=lambda t: t["after"]["loss"])["name"]
    with pytest.raises(SystemExit):
        main(["sweep", *place, str(tmp_path / "other"), "--grid", "targets=q_proj"])
    assert "NAME=VALUE,VALUE with a name of rank" in capsys.readouterr().err


def test_a_sweep_trains_equally_long_and_ends_with_nothing_half_done(tmp_path, capsys, monkeypatch):
    from jlora.commands import sweep
    from tests.small import rows

    few, many = (tmp_path / name for name in ("few", "many"))
    for folder, count in ((few, 16), (many, 32)):
        folder.mkdir()
        rows(folder, count)
    out = tmp_path / "sweep"
    args = ["sweep", "--model", small_model(tmp_path / "model"), "--data", str(few / "rows.jsonl"), "--batch", "8"]
    args += ["--buckets", "1", "--output", str(out), "--grid"]

    def ended(*more):
        with pytest.raises(SystemExit) as end:
            main([*args, *more])
        return end.value.code, capsys.readouterr().err

    code, said = ended(f"data={few / 'rows.jsonl'},{many / 'rows.jsonl'}")
    assert code == 1 and "0-data=rows takes 2 steps, 1-data=rows takes 4 steps: give --steps" in said
    code, said = ended("rank=2,4", "--track", "tensorboard")
    assert code == 1 and "a sweep has no track" in said and not out.exists()
    seen, each = [], sweep.each

    def figures(*args):
        seen.append(each(*args))
        if len(seen) == 1:  # a bad step, which is skipped
            return {**seen[0], "loss": float("nan")}
        os.kill(os.getpid(), signal.SIGTERM)
        return seen[-1]

    monkeypatch.setattr(sweep, "each", figures)
    code, said = ended("rank=2,4", "--steps", "5")
    assert code == 143 and len(seen) == 2 and "a sweep has no checkpoints" in said
    assert [path.name for path in out.iterdir()] == ["metrics.jsonl"]
