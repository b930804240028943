"""A chat template of one's own: in training, beside the adapter, and wherever that is used."""

import json
from pathlib import Path

import pytest

from jlora.cli import main
from jlora.commands.generate import GenerateCommand, ready, rendered
from jlora.commands.settings import TrainConfig
from jlora.commands.tasks import Answers, Labels
from jlora.data import Row, read_rows
from jlora.data.template import FILE
from jlora.io import load
from tests.small import small_model

MOVED = "{% for m in messages if m.role != 'system' %}{{ messages[0].content if loop.last }} {{ m.content }} "
MOVED += "<|im_end|> {% endfor %}"
"""No answer extends the prompt that it had."""
OWN = "{% for m in messages %}{{ m.role if m.role == 'user' }} {{ m.content }} <unk> {% endfor %}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(model, rows, file of OWN): a model whose own template does not do."""
    folder = tmp_path_factory.mktemp("own")
    model = Path(small_model(folder / "model"))
    (model / FILE).write_text(MOVED)
    (model / "generation_config.json").write_text('{"eos_token_id": 2, "top_k": 7}')
    turns = [{"role": role, "content": text} for role, text in (("system", "film"), ("user", "good"))]
    turns.append({"role": "assistant", "content": "positive"})
    (folder / "rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 4)
    (folder / "own.jinja").write_text(OWN)
    return str(model), str(folder / "rows.jsonl"), str(folder / "own.jinja")


@pytest.fixture(scope="module")
def adapter(place, tmp_path_factory):
    model, data, own = place
    out = tmp_path_factory.mktemp("run")
    args = ["--steps", "1", "--batch", "4", "--buckets", "1", "--chat-template", own]
    main(["train", "--model", model, "--data", data, "--output", str(out), *args])
    return out / "adapter"


def ends(capsys, code, *args):
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    assert ended.value.code == code
    return capsys.readouterr().err


def test_a_template_that_does_not_do_is_replaced_in_training(place, adapter, tmp_path, capsys):
    model, data, _ = place
    args = ("train", "--model", model, "--data", data, "--output", str(tmp_path), "--dry-run")
    assert "does not extend its own prefix here: give one of your own (chat_template) that does" in ends(
        capsys, 1, *args
    )
    assert f"{tmp_path}/no.jinja: no such file" in ends(capsys, 1, *args, "--chat-template", f"{tmp_path}/no.jinja")
    assert (adapter / FILE).read_text() == OWN
    held = Answers(TrainConfig(model, data, adapter=str(adapter)))  # a run that goes on from it
    base = held.load()
    assert base.tokenizer.chat_template == OWN and load(model).tokenizer.chat_template == MOVED
    (example,) = held.tokenised(read_rows(data, limit=1), base)[0]
    texts = [base.tokenizer.decode(tokens) for tokens in (example.prompt, example.tokens[example.loss_mask])]
    assert texts == ["film <unk> user good <unk>", "positive <unk>"]  # which ends its turns


def test_it_is_used_with_the_adapter(place, adapter, tmp_path, capsys):
    model, data, own = place
    evaluated = ("eval", "--json", "--model", model, "--data", data, "--draws", "2", "--batch", "4")
    assert "does not extend its own prefix" in ends(capsys, 1, *evaluated)
    for given in (("--adapter", str(adapter)), ("--chat-template", own)):
        main([*evaluated, *given])
        assert json.loads(capsys.readouterr().out)["rows"] == 4
    asked = [{"role": "user", "content": "good"}]
    for given, template in (
        ({"adapter": str(adapter)}, OWN),
        ({"chat_template": own}, OWN),
        ({"adapter": str(adapter), "chat_template": f"{model}/{FILE}"}, MOVED),
        ({}, MOVED),
    ):
        base, _ = ready(GenerateCommand(model, **given))
        assert base.tokenizer.chat_template == template
        assert base.tokenizer.decode(rendered(base, asked)).startswith("user good" if template == OWN else "good")
        assert (base.tokenizer.convert_tokens_to_ids("<unk>") in base.ends) == (template == OWN)


def test_it_goes_where_the_adapter_goes(place, adapter, tmp_path):
    model, data, own = place
    main(["merge", "--model", model, "--adapter", str(adapter), "--output", str(tmp_path / "merged")])
    assert load(tmp_path / "merged").tokenizer.chat_template == OWN
    told = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert told == {"eos_token_id": [2, 0], "top_k": 7}  # <unk> ends OWN's turns
    main(["export", "--model", model, "--adapter", str(adapter), "--output", str(tmp_path / "peft")])
    assert (tmp_path / "peft" / FILE).read_text() == OWN
    main(["mix", f"{adapter}:0.5", str(tmp_path / "peft"), "-o", str(tmp_path / "mixed")])
    assert (tmp_path / "mixed" / FILE).read_text() == OWN
    (tmp_path / "peft" / FILE).unlink()
    main(["mix", f"{adapter}:0.5", str(tmp_path / "peft"), "-o", str(tmp_path / "mixed")])
    assert not (tmp_path / "mixed" / FILE).exists()
    main(["data", data, "--model", model, "--chat-template", own, "--show", "1"])


def test_a_sweep_keeps_it(place, tmp_path):
    model, data, own = place
    args = ["--steps", "1", "--batch", "4", "--buckets", "1", "--chat-template", own, "--grid", "seed=1"]
    main(["sweep", "--model", model, "--data", data, "--output", str(tmp_path), *args])
    assert [path.read_text() for path in tmp_path.rglob(FILE)] == [OWN]


def test_a_server_speaks_by_it(place, monkeypatch, capsys):
    pytest.importorskip("uvicorn")
    served = []

    def engine(base, **settings):
        served.append(base.tokenizer.chat_template)
        raise ValueError("enough")

    monkeypatch.setattr("jlora.serve.engine.Engine", engine)
    ends(capsys, 1, "serve", "--model", place[0], "--chat-template", place[2])
    assert served == [OWN]


def test_labels_have_no_chats(place):
    rows = [Row(text="a", label="b"), Row(text="a", label="c")]
    with pytest.raises(ValueError, match="labels are of no chats, leave it out"):
        Labels(TrainConfig("m", "d", chat_template=place[2]), rows)
