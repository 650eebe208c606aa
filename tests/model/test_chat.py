"""Chat templates against transformers: what they may use, and what messages may look like."""

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from minillm.model.tokenizer import Tokenizer
from minillm.model.tokenizer_hf import load_tokenizer

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SUM = "{% for m in messages %}{{ '<' + m['content'] + '>' }}{% endfor %}"


@cache
def both():
    """(ours, theirs), with several named tokens."""
    place = Path(mkdtemp())
    special = ["<|end|>", "<|pad|>", "<|unk|>", "<|image|>"]
    Tokenizer.train("hello world " * 20, 20, special, eos_token="<|end|>").save(place)
    config = json.loads((place / "tokenizer_config.json").read_text())
    config |= {
        "pad_token": "<|pad|>",
        "unk_token": {"content": "<|unk|>", "__type": "AddedToken"},
        "image_token": "<|image|>",
    }
    (place / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(place), AutoTokenizer.from_pretrained(place)


def rendered(template: str, messages=CHAT, **options) -> tuple[str, str]:
    ours, theirs = both()
    expected = theirs.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    return ours.apply_chat_template(messages, False, chat_template=template, **options), expected


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ pad_token }}",
        "{% for m in messages %}{%- generation -%} {{ loop.index }} x{% endgeneration %}{% endfor %}",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
        "{% set n = namespace(x=1) %}{% generation %}{% set n.x = 2 %}{% endgeneration %}{{ n.x }}",
        "{{ pad_token }}{{ unk_token }}{{ eos_token }}{{ image_token }}{{ bos_token }}[{{ bos_token is defined }}]",
        "{{ messages[0].keys() | list }}{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}",
        "{% macro f(m) %}{{ m.content | upper }}{% endmacro %}{% for m in messages %}{{ f(m) }}{% break %}{% endfor %}",
        "{{ messages | tojson(indent=2) }}{{ {'a': 'é<>'} | tojson }}",
        "{{ strftime_now('%Y') }}",
    ],
)
def test_templates_as_transformers(template):
    ours, expected = rendered(template)
    assert ours == expected


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
        {"role": "assistant", "content": "x", "tool_calls": None},
        {"role": "assistant", "content": "x", "reasoning": "because"},
        {"role": "assistant", "content": "x", "thinking": "because", "reasoning_content": None},
        {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "there"}]},
        {"role": "user"},
        {},
    ],
)
def test_messages_of_any_shape_as_transformers(message):
    whole = "{% for m in messages %}{{ m | tojson }}{{ m.content }}{% endfor %}"
    parts = """{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}
    {% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"""
    for template in (whole, parts):
        ours, expected = rendered(template, [message])
        assert ours == expected


def function(place: str) -> str:
    """The weather.

    Args:
        place: Where.
    """
    return place


def test_tools_and_several_templates_as_transformers(tmp_path):
    ours, expected = rendered("{{ tools | tojson }}", tools=[{"name": "f"}, function])
    assert ours == expected
    ours, expected = rendered("{{ documents | tojson }}", documents=[{"title": "t", "text": "x"}])
    assert ours == expected
    ours, theirs = both()
    several = {"default": "plain", "tool_use": "tools", "rag": "found"}
    mine = Tokenizer(ours._spec, chat_template=several)
    theirs.chat_template = several
    for options in ({}, {"tools": [{"name": "f"}]}, {"chat_template": "rag"}, {"chat_template": "{{ 1 + 1 }}"}):
        expected = theirs.apply_chat_template(CHAT, tokenize=False, **options)
        assert mine.apply_chat_template(CHAT, **options) == expected
    mine.save(tmp_path)
    assert load_tokenizer(tmp_path).chat_template == AutoTokenizer.from_pretrained(tmp_path).chat_template == several
    theirs.chat_template = None


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "user", "content": 5},
    ],
)
def test_what_the_template_cannot_render_names_messages(message):
    with pytest.raises(ValueError, match=r"messages: the chat template cannot render them \("):
        both()[0].apply_chat_template([message], chat_template=SUM)


anything = st.recursive(
    st.none() | st.integers() | st.text(max_size=4) | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type", "text"]), inner)
    ),
)


@given(anything | st.lists(anything, max_size=2))
def test_any_messages_are_rendered_or_named(messages):
    ours, theirs = both()
    template = SUM + "{{ messages[0].content[0].text }}{{ messages[1]['role'] | upper }}"
    try:
        expected = theirs.apply_chat_template(messages, chat_template=template, tokenize=False)
    except Exception:
        with pytest.raises(ValueError, match="messages: "):
            ours.apply_chat_template(messages, chat_template=template)
    else:
        assert ours.apply_chat_template(messages, False, chat_template=template) == expected


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"chat_template": "{% for %}"}, "chat_template: not a Jinja template"),
        ({"chat_template": "{% nonsense %}"}, "chat_template: not a Jinja template"),
        ({"chat_template": "{{ raise_exception('roles must alternate') }}"}, "messages: .*roles must alternate"),
        ({"chat_template": "{{ messages.__class__.__mro__ }}"}, "messages: .*unsafe"),
        ({"chat_template": "{{ 1 / 0 }}"}, "messages: .*ZeroDivisionError"),
        ({"chat_template": "x", "tools": "f"}, "tools: expected a list"),
        ({"chat_template": "x", "tools": [5]}, "tools: expected a list"),
    ],
)
def test_errors(options, says):
    with pytest.raises(ValueError, match=says):
        both()[0].apply_chat_template(CHAT, **options)


def test_several_without_a_default():
    mine = Tokenizer(both()[0]._spec, chat_template={"a": "x", "b": "y"})
    with pytest.raises(ValueError, match=r"chat_template: expected one of the names \['a', 'b'\]"):
        mine.apply_chat_template(CHAT)
