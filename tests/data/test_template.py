"""A chat template given as a file: read whole or refused, and beside an adapter."""

import pytest

from jlora.data.sandbox import LONGEST
from jlora.data.template import FILE, read_template, template_for, write_template

WRONG = {
    "nothing": (b" \n", "it is empty"),
    "not UTF-8": (b"\xff{{ messages }}", "'utf-8' codec can't decode byte 0xff"),
    "unclosed": (b"{{ messages }}\n{% for m in messages %}", r"Unexpected end of template.* at line 2"),
    "an unknown filter": (b"{{ messages|evil }}", "No filter named 'evil'. at line 1"),
    "an unknown tag": (b"{% evil %}", "Encountered unknown tag 'evil'. at line 1"),
    "too long": (b"x" * (LONGEST + 1), "it has more than 131,072 characters"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_no_template_is_refused(name, tmp_path):
    data, text = WRONG[name]
    (tmp_path / "chat.jinja").write_bytes(data)
    with pytest.raises(ValueError, match=rf"chat\.jinja: not a chat template: {text}"):
        read_template(tmp_path / "chat.jinja")


def test_no_file_is_told(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(FileNotFoundError, match=rf"{path}: no such file; a chat template is a file of Jinja"):
            read_template(path)


def test_the_file_goes_before_the_adapter_and_the_adapter_before_the_tokenizer(tmp_path):
    assert template_for(None, None) is None and template_for(None, tmp_path) is None
    write_template(tmp_path, "its own\r\n{{ messages }} é")
    assert template_for(None, tmp_path) == read_template(tmp_path / FILE) == "its own\r\n{{ messages }} é"
    (tmp_path / "given").write_text("given")
    assert template_for(str(tmp_path / "given"), tmp_path) == "given"
    write_template(tmp_path, None)  # no adapter keeps the one that another left there
    assert template_for(None, tmp_path) is None
