"""Hostile model folders: config.json, tokenizers with code, chat templates that reach out of the sandbox, links."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from jlora.data.template import render
from jlora.io.load import folder_tokenizer, load
from jlora.io.pypi import extract_folder, open_member
from tests.faults.guard import refused
from tests.small import small_model, tokenizer

LLAMA = {"model_type": "llama", "vocab_size": 15, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2}
BERT = {**LLAMA, "model_type": "bert"}
GPT2 = {"model_type": "gpt2", "vocab_size": 15, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
RAW = {
    "nothing": "",
    "a list": "[]",
    "cut": '{"model_type": "llama", "vo',
    "deep": '{"a":' * 100_000,
    "NaN": '{"model_type": "llama", "rope_theta": NaN}',
    "not UTF-8": b'{"model_type": "\xff"}',
    "UTF-16": json.dumps(LLAMA).encode("utf-16"),
    "two objects": "{} {}",
    "a number of 10,000 digits": '{"vocab_size": ' + "9" * 10_000 + "}",
    **{f"kind {kind!r:.12}": {"model_type": kind} for kind in ("mamba", None, 3, ["llama"], {}, "x\x1b[2J\n" * 999)},
    **{f"no {name}": {k: v for k, v in LLAMA.items() if k != name} for name in SIZES},
    **{f"{name} {value!r:.12}": {**LLAMA, name: value} for name in SIZES
       for value in ("32", -1, 0, 2.5, None, [32], {}, True, 2**40, 10**30)},
    **{f"{name} {value!r:.12}": {**BERT, name: value} for name in SIZES for value in ("32", -1, 0, 2.5, 2**40)},
    **{f"{name} {value!r:.12}": {**GPT2, name: value} for name in ("n_positions", "n_embd", "n_layer", "n_head")
       for value in ("8", -1, 0, 2.5, 2**40)},
    "heads that divide nothing": {**LLAMA, "num_attention_heads": 5, "num_key_value_heads": 3, "head_dim": 8},
    "an odd head": {**LLAMA, "head_dim": 7},
    "a million layers": {**LLAMA, "num_hidden_layers": 10**6},
    "a theta of 1e999": '{"rope_theta": 1e999, ' + json.dumps(LLAMA)[1:],
    "a theta of text": {**LLAMA, "rope_theta": "x"},
    "a theta below 0": {**LLAMA, "rope_theta": -1.0},
    "rope of text": {**LLAMA, "rope_scaling": "linear"},
    "rope of a list": {**LLAMA, "rope_scaling": [1]},
    "rope by 0": {**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 0}},
    "rope by text": {**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": "2"}},
    "rope with nothing": {**LLAMA, "rope_scaling": {"rope_type": "llama3"}},
    "rope of an unknown kind": {**LLAMA, "rope_scaling": {"rope_type": "yarn"}},
    "an epsilon of text": {**LLAMA, "rms_norm_eps": "x"},
    "an epsilon below 0": {**LLAMA, "rms_norm_eps": -1.0},
    "an unknown activation": {**LLAMA, "hidden_act": ["silu"]},
    "a window of text": {**LLAMA, "model_type": "mistral", "sliding_window": "x"},
    "labels of a number": {**BERT, "id2label": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", RAW)
def test_a_config_is_refused(name, tmp_path):
    held = RAW[name]
    text = held if isinstance(held, str | bytes) else json.dumps(held)
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(lambda: load(str(tmp_path), weights=False), tmp_path)


TOKENIZERS = {
    "nothing": {"tokenizer.json": ""},
    "a list": {"tokenizer.json": "[]"},
    "another object": {"tokenizer.json": "{}"},
    "deep": {"tokenizer.json": '{"model":' * 50_000},
    "not UTF-8": {"tokenizer.json": b"\xff\xfe{}"},
    "an unknown model": {"tokenizer.json": '{"version": "1.0", "model": {"type": "Evil"}}'},
    "code of its own": {
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}, "tokenizer_class": "Evil"}',
        "evil.py": "open('ran', 'w').write('ran')\nclass Evil: pass\n",
    },
    "code by the model": {
        "config.json": '{"model_type": "evil", "auto_map": {"AutoTokenizer": "evil.Evil"}}',
        "tokenizer_config.json": "{}",
        "evil.py": "open('ran', 'w').write('ran')\nclass Evil: pass\n",
    },
    "settings of another kind": {"tokenizer.json": "{}", "tokenizer_config.json": "[]"},
    "settings cut": {"tokenizer_config.json": '{"tokenizer_class":'},
    "a class of numbers": {"tokenizer.json": "{}", "tokenizer_config.json": '{"tokenizer_class": 3}'},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_is_refused(name, tmp_path, monkeypatch):
    for file, text in TOKENIZERS[name].items():
        (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.chdir(tmp_path)
    refused(lambda: folder_tokenizer(tmp_path), tmp_path, "its tokenizer cannot be read")


ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "classes of a list": "{{ [].__class__.__base__.__subclasses__()[0]() }}",
    "globals of a function": "{{ raise_exception.__globals__['os'].system('touch ran') }}",
    "builtins of a function": "{{ raise_exception.__builtins__.open }}",
    "globals of cycler": "{{ cycler.__init__.__globals__.os.popen('touch ran').read() }}",
    "globals of joiner": "{{ joiner.__init__.__globals__.__builtins__.open('ran', 'w') }}",
    "lipsum": "{{ lipsum.__globals__['os'].system('touch ran') }}",
    "self": "{{ self.__init__.__globals__ }}{{ self._TemplateReference__context.environment.x.y }}",
    "attr filter": "{{ ''|attr('__class__')|attr('__mro__')|last|attr('x') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "format_map": "{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}",
    "map attribute": "{{ ['']|map(attribute='__class__.__mro__')|first|length }}",
    "changes messages": "{{ messages.append(1) }}",
    "changes a message": "{% set _ = messages[0].update({'role': 'x'}) %}",
    "clears messages": "{{ messages.clear() }}",
    "includes a file": "{% include '/etc/passwd' %}",
    "imports a file": "{% import 'os' as os %}{{ os.system('touch ran') }}",
    "extends a file": "{% extends '/etc/passwd' %}",
    "a generator's frame": "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "code of a macro": "{% macro m() %}{% endmacro %}{{ m._func.__code__.co_consts }}",
    "a range without end": "{% for n in range(10**9) %}{% endfor %}",
    "macros without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a syntax error": "{% for %}",
    "unclosed": "{{ messages",
    "an unknown filter": "{{ messages|evil }}",
    "its own exception": "{{ raise_exception('no\x1b[2J\n' * 100) }}",
    "nothing known": "{{ evil.x }}",
    "division by 0": "{{ 1 / 0 }}",
    "a sum of kinds": "{{ 'a' + 1 }}",
    "a message's number": "{{ messages[7].role.x }}",
}
TURNS = "{% for n in range(100) %}"
LONG = "{% set a = 'a' * 1000000 %}"
BOMBS = {
    "doubled": "{% set s = namespace(x='aaaaaaaa') %}" + TURNS + "{% set s.x = s.x ~ s.x %}{% endfor %}{{ s.x }}",
    "added": "{% set s = namespace(x='aaaaaaaa') %}" + TURNS + "{% set s.x = s.x + s.x %}{% endfor %}{{ s.x }}",
    "lists in lists": "{% set s = namespace(x=[1]) %}" + TURNS + "{% set s.x = [s.x, s.x] %}{% endfor %}{{ s.x }}",
    "tuples as a key": "{% set s = namespace(x=(1,)) %}"
    + TURNS
    + "{% set s.x = (s.x, s.x) %}{% endfor %}{{ {s.x: 1} }}",
    "blocks": "{% set a = 'aaaaaaaa' %}" + "{% set a %}{{ a }}{{ a }}{% endset %}" * 60,
    "a cycle": "{% set a = namespace() %}{% set a.b = [a] %}{{ a.b }}",
    "times": "{{ 'a' * 1000000000 }}",
    "a list, times": "{{ ([1] * 4000000)|list }}",
    "a power": "{{ 9 ** 999999999 }}",
    "center": "{{ 'a'|center(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}",
    "a format": "{{ '%1000000000d' % 1 }}",
    "a format's star": "{{ '%*d'|format(1000000000, 1) }}",
    "braces": "{{ '{:1000000000}'.format(1) }}",
    "braces in braces": "{{ '{:{}}'.format(1, 1000000000) }}",
    "replace": LONG + "{{ a.replace('', a) }}",
    "join": LONG + "{{ range(100000)|join(a) }}",
    "join of what is made on demand": LONG + "{{ a.join(range(90000)|map('string')) }}",
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a recursive loop": "{% for x in [range(90000)] recursive %}{{ loop([range(90000)]) }}{% endfor %}",
    "a tree of macros": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "batch": "{{ [1]|batch(1000000000, 'x')|list }}",
    "indent": "{{ ('\\n' * 100000)|indent(100000, true) }}",
    "tojson": "{{ (range(1000)|list)|tojson(indent=1000000) }}",
    "slices": LONG + "{% for i in range(100000) %}{% set b = a[1:] %}{% endfor %}",
    "comparisons": LONG + "{% for i in range(100000) %}{% if a == a ~ '' %}{% endif %}{% endfor %}",
    "membership": "{% set r = range(99999)|list %}{% for i in r %}{% if i in r %}{% endif %}{% endfor %}",
    "a slow filter": LONG + "{% for i in range(99999) %}{{ a|title|length }}{% endfor %}",
    "output": "{% for i in range(100000) %}" + "x" * 1000 + "{% endfor %}",
    "a long template": "x" * 200_000,
}


@pytest.fixture(scope="module")
def words():
    return tokenizer()


@pytest.mark.parametrize("name", ESCAPES)
def test_a_template_is_refused(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words.chat_template = ESCAPES[name]
    messages = [{"role": "user", "content": "good"}]
    refused(lambda: render(words, messages, True, "a model"), tmp_path, "a model: the chat template fails")
    assert messages == [{"role": "user", "content": "good"}]


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_asks_for_too_much_is_refused(name, words, tmp_path):
    words.chat_template = BOMBS[name]
    messages = [{"role": "user", "content": "good"}]
    says = "the chat template fails: TooMuch: it (takes|makes|writes|pads|has|uses)"
    refused(lambda: render(words, messages, True), tmp_path, says)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("good") / "m")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "folder", "secret"])
def test_what_is_no_file(kind, file, good, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(good, folder)
    (folder / file).unlink()
    secret, path = tmp_path / "secret", folder / file
    secret.write_text("hello")
    make = {"pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero"), "folder": path.mkdir}
    make |= {"loop": lambda: path.symlink_to(path), "secret": lambda: path.symlink_to(secret)}
    make[kind]()
    refused(lambda: load(str(folder)), tmp_path)


@pytest.mark.parametrize("name", ["../evil", "/evil", "pkg/../../evil", "pkg/sub/../../../evil", "pkg\\..\\..\\evil"])
def test_a_wheel_unpacks_inside_its_folder_only(name, tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.whl", "w") as file:
        file.writestr("pkg/" + name if not name.startswith("pkg") else name, "x")
    into = tmp_path / "into"
    into.mkdir()
    inside = "\\" in name  # a plain name here, where the separator is another
    if inside:
        extract_folder(tmp_path / "a.whl", "pkg/", into)
    else:
        refused(lambda: extract_folder(tmp_path / "a.whl", "pkg/", into), tmp_path, "unsafe path")
    assert not list(tmp_path.glob("evil")) and not (tmp_path.parent / "evil").exists()


def test_a_link_in_an_archive_is_not_followed(tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as file:
        link = tarfile.TarInfo("data.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)

    def read():
        with open_member(tmp_path / "a.tar.gz", "data.txt") as stream:
            stream.read()

    refused(read, tmp_path)
