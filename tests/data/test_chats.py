"""Turns of chats: what of them reaches the template, and what a bad one says."""

import json
import types

import pytest

from jlora.data import Columns, DataError
from jlora.data.rows import adapt, parse_row
from jlora.data.template import render
from tests.small import tokenizer

ASK = {"role": "user", "content": "q"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}


def messages(*chat):
    return parse_row({"messages": list(chat)}, "x:1").messages


def refused(text, record):
    with pytest.raises(DataError, match=f"^x:1: key '{text}"):
        parse_row(record, "x:1")


def test_what_a_template_writes_beside_the_content_reaches_it():
    chat = messages(
        {**ASK, "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "sum"},
        {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"},
        {"role": "assistant", "content": "two"},
    )
    write = "{% for m in messages %}{{ m.name }}|{{ m.reasoning_content }}|{{ m.content }}|{{ m.tool_call_id }}|"
    write += "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %};"
    write += "{% endfor %}"
    text = render(types.SimpleNamespace(chat_template=write, special_tokens_map={}), chat, False)
    assert text == 'ann||q||;|sum|||add{"a": 1, "b": null};add||2|c1|;||two||;'


def test_a_null_is_a_key_that_is_not_there():
    keys = ("tool_calls", "tool_call_id", "name", "reasoning_content", "weight", "from", "value")
    filled = dict.fromkeys(keys)
    answer = {"role": "assistant", "content": "a"}
    assert messages({**ASK, **filled}, {**answer, **filled}) == messages(ASK, answer) == (ASK, answer)
    assert messages({**answer, "tool_calls": []}) == (answer,)
    call = {**CALL, "index": None, "function": {**CALL["function"], "parameters": None}}
    (turn,) = messages({"role": "assistant", "tool_calls": [call]})
    assert turn == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_a_weight_of_0_is_handed_on():
    answer = {"role": "assistant", "content": "a"}
    chat = messages(ASK, {**answer, "weight": 0}, ASK, {**answer, "weight": 1}, ASK, {**answer, "weight": None})
    assert [turn.get("weight") for turn in chat] == [None, 0, None, None, None, None]
    for weight in (2, 0.5, "0", True, [0]):
        refused(r"messages\[0\].weight' must be 0 ", {"messages": [{**answer, "weight": weight}]})
    refused("messages' has no assistant turn but of weight 0", {"messages": [ASK, {**answer, "weight": 0}]})
    pair = {"chosen": [ASK, answer], "rejected": [ASK, {**answer, "content": "b", "weight": 0}]}
    refused("rejected' has no assistant turn of its own", pair)


def test_an_answer_of_nothing_is_refused():
    for content in ("", " \n", []):
        chat = [ASK, {"role": "assistant", "content": content, "reasoning_content": "hm"}]
        refused(r"messages\[1\].content' is empty", {"messages": chat})
    refused(r"messages\[0\].content' must be text, got nothing", {"messages": [{"role": "assistant", "content": None}]})
    assert messages({"role": "tool", "content": ""}, {"role": "assistant", "content": "a"})[0]["content"] == ""


def test_parts_of_text_are_joined():
    part = {"type": "text", "text": "a ", "image_url": None}
    (turn,) = messages({"role": "assistant", "content": [part, {"type": "text", "text": "film"}]})
    assert turn["content"] == "a film"
    for wrong, text in (
        ({"type": "image_url", "image_url": {}}, r"\[1\]' must be a part of type text, .*, got str 'image_url'"),
        ({"text": "b"}, r"\[1\]' must be a part of type text"),
        ("b", r"\[1\]' must be a part of type text"),
        ({"type": "text"}, r"\[1\].text' must be text, got nothing"),
    ):
        refused(rf"messages\[0\].content{text}", {"messages": [{**ASK, "content": [part, wrong]}]})


@pytest.mark.parametrize(
    ("turn", "text"),
    [
        ({"tool_calls": "add(1)"}, "tool_calls' must be a list of objects, got str"),
        ({"tool_calls": ["add(1)"]}, "tool_calls' must be a list of objects, got list"),
        ({"tool_calls": [{"function": {"name": "\ud83d"}}]}, "tool_calls' holds half a character"),
        ({"tool_calls": [{"function": b"add"}]}, "tool_calls' must be what JSON can hold"),
        ({"reasoning_content": ["hm"]}, "reasoning_content' must be text, got list"),
        ({"name": 3}, "name' must be text, got int"),
        ({"tool_call_id": "\udfff"}, "tool_call_id' holds half a character"),
    ],
)
def test_a_bad_key_of_a_turn_is_named(turn, text):
    refused(rf"messages\[0\].{text}", {"messages": [{"role": "assistant", "content": "a", **turn}]})


def test_who_speaks_goes_by_several_names():
    names = {"system": ["developer"], "user": ["human"], "assistant": ["gpt", "chatgpt"]}
    names |= {"tool": ["function", "observation"]}
    for role, others in names.items():
        for other in others:
            chat = messages({"from": other, "value": "x"}, {"role": "assistant", "content": "a"})
            assert chat[0] == {"role": role, "content": "x"}
    refused(r"messages\[0\].from' must be one of system, user", {"messages": [{"from": "bot", "value": "x"}]})
    refused(r"messages\[0\].role' must be one of .*, got nothing", {"messages": [{"content": "x"}]})
    refused(r"messages\[0\].value' must be text, got int", {"messages": [{"from": "gpt", "value": 3}]})


def test_conversations_are_chats():
    said = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    record = {"id": "i", "conversations": said, "text": "all"}
    row = parse_row(record, "x:1")
    assert row.kind == "chat"
    assert [(turn["role"], turn["content"]) for turn in row.messages] == [
        ("system", "s"),
        ("user", "q"),
        ("assistant", "a"),
    ]
    both = {**record, "messages": [ASK, {"role": "assistant", "content": "b"}]}
    assert parse_row(both, "x:1").messages[1]["content"] == "b"
    assert parse_row(adapt(both, Columns(rename=("conversations=conversations",)), "x:1"), "x:1") == row
    assert parse_row(adapt(record, Columns(rename=("text=text",)), "x:1"), "x:1").kind == "text"
    refused("conversations' has no assistant turn", {"conversations": said[:2]})


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}}


def test_tools_reach_the_template_as_in_transformers():
    words, answer = tokenizer(), {"role": "assistant", "content": "good"}
    writes = "{% if tools %}{{ tools | tojson }}{% endif %}{{ tools is none }}"
    for template in (words.chat_template + writes, {"default": "no", "tool_use": writes}):
        words.chat_template = template
        row = parse_row({"messages": [ASK, answer], "tools": [TOOL]}, "x:1")
        want = words.apply_chat_template([ASK, answer], tools=[TOOL], tokenize=False)
        assert render(words, row.messages, False, tools=row.tools) == want != render(words, row.messages, False)
        assert want.endswith("False") and json.dumps(TOOL) in want


def test_tools_are_read_in_every_row_of_a_chat():
    answer, other = {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
    chats = [{"messages": [ASK, answer]}, {"conversations": [ASK, answer]}, {"prompt": [ASK], "completion": [answer]}]
    filled = {**TOOL, "strict": None, "function": {**TOOL["function"], "returns": None}}
    for chat in [*chats, {"prompt": [ASK], "chosen": [answer], "rejected": [other]}]:
        for tools in ([TOOL], json.dumps([TOOL]), [filled]):
            row = parse_row({**chat, "tools": tools}, "x:1")
            assert row.tools == (TOOL,) and all(side.tools == (TOOL,) for side in row.sides)
        for nothing in (None, [], "", "[]"):
            assert parse_row({**chat, "tools": nothing}, "x:1").tools == ()
        renamed = adapt({**chat, "functions": [TOOL]}, Columns(rename=("tools=functions",)), "x:1")
        assert parse_row(renamed, "x:1").tools == (TOOL,)


@pytest.mark.parametrize(
    ("tools", "text"),
    [
        (TOOL, "must be a list of objects, got dict"),
        (["add"], "must be a list of objects, got list"),
        ("add", "must be a list of objects, or its JSON, got str 'add'"),
        ([b"add"], "must be a list of objects, or its JSON, got list"),
        ([{"name": "\ud83d"}], "holds half a character"),
        ('[{"name": "\\ud83d"}]', "holds half a character"),
    ],
)
def test_bad_tools_are_named(tools, text):
    refused(f"tools' {text}", {"messages": [{"role": "assistant", "content": "a"}], "tools": tools})


def test_a_prompt_of_turns_carries_no_loss():
    answer = {"role": "assistant", "content": "a"}
    before = [ASK, {"role": "assistant", "content": "hi"}, ASK]
    row = parse_row({"prompt": before, "completion": [answer]}, "x:1")
    assert (row.kind, row.messages, row.given) == ("chat", (*before, answer), 3)
    refused("completion' has no assistant turn", {"prompt": before, "completion": [ASK]})
    refused("completion' must be a list of .*, got list", {"prompt": before, "completion": []})
    refused("prompt' must be a list of .*, got str", {"prompt": "q", "completion": [answer]})
    refused("prompt' must be a list of .*, got nothing", {"completion": [answer]})
    refused("prompt' must be text, got list", {"prompt": before, "completion": "a"})


def test_dolly_is_read_as_alpaca():
    alpaca = parse_row({"instruction": "Add.", "input": "1 1", "output": "2"}, "x:1")
    dolly = {"instruction": "Add.", "context": "1 1", "response": "2", "category": "closed_qa"}
    assert (
        parse_row(dolly, "x:1") == alpaca == parse_row({"instruction": "Add.", "input": "1 1", "response": "2"}, "x:1")
    )
    bare = parse_row({"instruction": "Add.", "output": "2"}, "x:1")
    assert (
        parse_row({**dolly, "context": ""}, "x:1") == parse_row({"instruction": "Add.", "response": "2"}, "x:1") == bare
    )
    assert parse_row({**dolly, "prompt": "p", "completion": "c"}, "x:1").prompt == "p"
    columns = Columns(prompt="{instruction} {context}", completion="{response}")
    assert parse_row(adapt(dolly, columns, "x:1"), "x:1").prompt == "Add. 1 1"
    refused("response' is empty", {**dolly, "response": " "})
    refused("instruction' must be text, got nothing", {**dolly, "instruction": None})
