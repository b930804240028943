"""Chat templates give what transformers' own sandbox gives, and no more than they are granted."""

import time

import pytest

from jlora.data import sandbox
from jlora.data.marks import marks_of
from jlora.data.template import render
from tests.small import tokenizer

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  hi {% x %} <b> "},
    {"role": "assistant", "content": "yes\nand no"},
    {"role": "user", "content": "日本 🎉"},
]
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m['content']|trim + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "a namespace and a marked answer": """
{%- set rest = messages[1:] if messages[0]['role'] == 'system' else messages %}
{%- set ns = namespace(n=0, text='') %}
{% for m in rest %}
    {%- set ns.n = ns.n + 1 %}{% set ns.text = ns.text ~ m.role ~ loop.index ~ loop.length ~ loop.last %}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {% generation %}{{ m.content }}{% endgeneration %}
{% endfor %}{{ ns.n }}{{ ns.text }}{{ messages|tojson(indent=2) }}{{ eos_token }}{{ tools is none }}""",
    "macros, loops and calls": """{% macro one(m, n=2) %}[{{ m.role }}:{{ n }}]{{ caller() if caller }}{% endmacro %}
{% for m in messages|selectattr('role', 'equalto', 'user')|list %}{{ one(m) }}{{ one(m, n=3) }}{% endfor %}
{% call one(messages[0]) %}in it{% endcall %}{% set x %}q{{ 1 }}{% endset %}{{ x }}{% filter upper %}abc{% endfilter %}
{% for m in messages if m.role != 'system' %}{{ loop.index }}{% if loop.index > 1 %}{% break %}{% endif %}{% endfor %}
{% for x in [[1, [2]], 3] recursive %}{{ loop(x) if x is iterable else x }}{% else %}none{% endfor %}
{% for k, v in {'a': 1, 'b': 2}|dictsort %}{{ k }}{{ v }}{% endfor %}{{ {'a': 1}.items()|list }}{{ dict(a=1).a }}""",
    "filters and operators": """{{ messages|map(attribute='role')|join(', ') }}{{ messages|groupby('role')|length }}
{{ messages|map(attribute='content')|map('trim')|list }}{{ 'a,b'.split(',')|last }}{{ 'x%s' % 3 }}{{ [1] + [2] * 2 }}
{{ '%s-%d'|format('a', 3) }}{{ '{}:{:>4}'.format(2, 'b') }}{{ 2**3 }}{{ 7 // 2 }}{{ 'b' in 'abc' }}{{ 'ab'[::-1] }}
{{ nothing|default('y') }}{{ nothing }}{{ [3, 1]|sort }}{{ 'abc'|replace('b', '__') }}{{ 'a\nb'|indent(2) }}
{{ messages[-1].content[:2] ~ 1.5 ~ none ~ true }}{{ 3 is divisibleby 3 }}{{ '<&'|e }}{{ range(3)|list }}""",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_as_transformers_renders(name):
    words = tokenizer()
    words.chat_template = TEMPLATES[name]
    for prompt in (True, False):
        want = words.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
        assert render(words, MESSAGES, prompt) == want
    assert "macros" not in name or "[user:3]" in want


MARKED = {
    "a loop": "{% for m in messages %}{% if m.role == 'assistant' %}<a>{% generation %}{{ m.content }}\n"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "no answer": "{% generation %}{% endgeneration %}{{ messages[0].content }}{% generation %}1{% endgeneration %}",
    "nothing": "{{ messages[0].content }}{% if false %}{% generation %}1{% endgeneration %}{% endif %}",
}


@pytest.mark.parametrize("name", MARKED)
def test_marks_stand_where_transformers_finds_them(name):
    from transformers.utils.chat_template_utils import render_jinja_template

    words = tokenizer()
    words.chat_template = MARKED[name]
    how = {"chat_template": MARKED[name], "return_assistant_tokens_mask": True}
    (want,), (marks,) = render_jinja_template([MESSAGES], **how)
    text = render(words, MESSAGES, False)
    assert text == want and marks_of(text) == tuple(marks)


def test_marks_go_through_macros_and_blocks():
    said = "{% macro said(m) %}[{% generation %}{{ m }}{% endgeneration %}]{% endmacro %}"
    text = sandbox.rendered(
        said + "{% set x %}a{{ said('bc') }}{% endset %}{{ x }}{{ said('d') }}{{ said('e')|upper }}"
    )
    assert text == "a[bc][d][E]" and [text[begin:end] for begin, end in marks_of(text) or ()] == ["bc", "d"]
    assert marks_of(sandbox.rendered("a")) is None


def test_long_conversations_are_within_the_bounds():
    words = tokenizer()
    words.chat_template = TEMPLATES["chatml"]
    many = [{"role": "user", "content": "word " * 400}] * 500
    assert len(render(words, many, True)) > 10**6


def test_steps_are_granted_anew_to_each_rendering():
    turns = int(0.6 * sandbox.STEPS)
    template = "{% for a in range(1000) %}{% for b in range(" + str(turns // 1000) + ") %}{% endfor %}{% endfor %}ok"
    assert sandbox.rendered(template) == sandbox.rendered(template) == "ok"
    began = time.process_time()
    with pytest.raises(sandbox.TooMuch, match="500,000 steps"):
        sandbox.rendered(template + template)
    assert time.process_time() - began < 5
