"""From a request's words to its last token."""

import json

import pytest

from minillm.constrained import FINISHED, ConstraintError, ConstraintTooLarge, Limits, compile_constraint

from .vocabularies import END, small


def text_of(constraint, text: str):
    return constraint.walk(constraint.start, text.encode())


@pytest.mark.parametrize(
    ("kind", "value", "accepted", "refused"),
    [
        ("json", {"type": "integer"}, ["12", "-3"], ["1.5", '"1"', ""]),
        ("json", '{"const": "a"}', ['"a"'], ["a"]),
        ("json", True, ["{}", "[[1, 2]]"], ["{", "x"]),
        ("regex", "[a-c]{2}", ["ab"], ["a", "abc"]),
        ("choice", ["yes", "no", "not sure"], ["yes", "no", "not sure"], ["not", "", "yesno"]),
        ("choice", ["日", "日本"], ["日", "日本"], ["本"]),
    ],
)
def test_kinds(kind, value, accepted, refused):
    constraint = compile_constraint(kind, value, small())
    assert [text for text in accepted if not constraint.accepts(text_of(constraint, text))] == []
    assert [text for text in refused if constraint.accepts(text_of(constraint, text))] == []


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("grammar", "x", "kind: expected one of json, regex, choice"),
        ("json", "{", "expected JSON"),
        ("json", 5, "schema: expected an object or a boolean"),
        ("json", {"x": {1, 2}}, "what JSON can hold"),
        ("json", {"const": float("nan")}, "what JSON can hold"),
        ("json", False, "nothing that can be generated"),
        ("regex", "(", "position 0"),
        ("regex", r"[^\s\S]", "no text is"),
        ("choice", "yes", "expected a list of strings"),
        ("choice", [], "at least one"),
        ("choice", ["a", 1], "expected strings"),
        ("choice", ["\ud800"], "surrogate"),
    ],
)
def test_what_cannot_be_kept_is_refused(kind, value, message):
    with pytest.raises(ConstraintError, match=message):
        compile_constraint(kind, value, small())


def test_a_pattern_is_text():
    with pytest.raises(TypeError, match="expected a str, got int"):
        compile_constraint("regex", 5, small())


def test_what_is_too_large_is_refused():
    for kind, value in (("regex", "a" * 101), ("choice", ["a" * 60, "b" * 60]), ("json", {"const": "a" * 100})):
        with pytest.raises(ConstraintTooLarge, match="100"):
            compile_constraint(kind, value, small(), Limits(source=100))


def test_from_the_first_token_to_the_end():
    constraint = compile_constraint("choice", ["ab"], small())
    state = constraint.advance(constraint.advance(constraint.start, ord("a")), ord("b"))
    assert constraint.allowed(state).nonzero()[0].tolist() == [END]
    assert constraint.advance(state, END) == FINISHED
    assert constraint.accepts(FINISHED)
    assert constraint.allowed(FINISHED).nonzero()[0].tolist() == [END]
    assert constraint.advance(FINISHED, END) == FINISHED
    assert constraint.advance(constraint.start, ord("a")) == constraint.walk(constraint.start, b"a"), "states stay"


@pytest.mark.parametrize("token", [END, END - 1, ord("b"), -1, 10**6])
def test_a_token_that_is_not_allowed_is_refused(token):
    constraint = compile_constraint("choice", ["ab"], small())
    with pytest.raises(ValueError, match="token: expected one that is allowed"):
        constraint.advance(constraint.start, token)


def test_nothing_follows_the_end():
    constraint = compile_constraint("choice", ["ab"], small())
    with pytest.raises(ValueError, match="expected one that is allowed"):
        constraint.advance(FINISHED, ord("a"))
    with pytest.raises(ValueError, match="state"):
        constraint.allowed(10**6)


def test_a_schema_as_text_is_the_schema():
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    first, second = (compile_constraint("json", value, small()) for value in (schema, json.dumps(schema)))
    assert first.packed(first.start) is second.packed(second.start)
