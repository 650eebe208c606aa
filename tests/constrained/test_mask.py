"""Masks of all tokens at once against one walk for each token, whichever way the walk was made."""

from functools import cache
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.constrained import (
    ConstraintError,
    ConstraintTooLarge,
    Limits,
    NoTokenFits,
    Vocabulary,
    compile_constraint,
    mask,
    packed,
    vocabulary_of,
)
from minillm.constrained.automaton import DEAD
from minillm.model.tokenizer_hf import load_tokenizer
from minillm.model.weights import model_path

from .test_regex import patterns
from .vocabularies import END, random_walk, small

SCHEMAS = [
    {"type": "object", "properties": {"name": {"type": "string"}, "b": {"type": "integer"}}, "required": ["name"]},
    {"type": "object", "properties": {"name": {"type": "string"}, "a": {}}, "additionalProperties": {"type": "number"}},
    {"type": "string", "maxLength": 9},
    {"type": "string", "minLength": 5, "maxLength": 13},
    {"type": "array", "items": {"enum": ["a", "ab", True, None, 12]}, "minItems": 2},
    {"type": "string", "pattern": "aa|é{2}"},
    {"type": "string", "pattern": "^[a-c]+$", "minLength": 4},
    {"anyOf": [{"type": "string", "pattern": "^a"}, {"type": "number", "minimum": -1}, {"type": "null"}]},
    {"type": "object", "patternProperties": {"^a": {"type": "boolean"}, "b$": {"type": "null"}}},
    {"type": "object", "propertyNames": {"maxLength": 2}, "maxProperties": 3},
    {},
]
WAYS = {"as it is": (500, 16, None), "by bytes": (0, 256, None), "sweeps": (0, 0, True), "walks": (10**9, 0, False)}


def one_by_one(constraint, state) -> np.ndarray:
    tokens = constraint.vocabulary.tokens
    found = np.array([bool(t) and constraint.walk(state, t) != DEAD for t in tokens])
    found[constraint.vocabulary.end_ids] = constraint.accepts(state)
    return found


@pytest.fixture(params=WAYS)
def fresh(request, monkeypatch):
    """A vocabulary with nothing kept, and one way to walk."""
    few, few_bytes, far = WAYS[request.param]
    monkeypatch.setattr(mask, "FEW", few)
    monkeypatch.setattr(mask, "FEW_BYTES", few_bytes)
    if far is not None:
        monkeypatch.setattr(Vocabulary, "_leads_far", lambda *_: far)
    return lambda: Vocabulary([*small().tokens], [END])


def check_along(constraint, random: Random, steps: int = 12) -> None:
    state = constraint.start
    for _ in range(steps):
        mask = constraint.allowed(state)
        np.testing.assert_array_equal(mask, one_by_one(constraint, state))
        tokens = [t for t in mask.nonzero()[0].tolist() if t != END]
        if not tokens:
            return
        state = constraint.advance(state, random.choice(tokens))


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: str(schema)[:60])
def test_masks_of_schemas(fresh, schema):
    for seed in range(4):
        check_along(compile_constraint("json", schema, fresh()), Random(seed))


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=60)
@given(pattern=patterns, seed=st.integers(0, 99))
def test_masks_of_drawn_patterns(way, pattern, seed):
    few, few_bytes, far = WAYS[way]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask, "FEW", few)
        patch.setattr(mask, "FEW_BYTES", few_bytes)
        if far is not None:
            patch.setattr(Vocabulary, "_leads_far", lambda *_: far)
        check_along(compile_constraint("regex", pattern, Vocabulary([*small().tokens], [END])), Random(seed))


@settings(max_examples=60)
@given(schema=st.sampled_from(SCHEMAS), seed=st.integers(0, 10**6))
def test_what_is_kept_of_other_requests_changes_nothing(schema, seed):
    """The same vocabulary all the time, with room for a few masks only, so that they come and go."""
    check_along(compile_constraint("json", schema, _crowded()), Random(seed))


@cache
def _crowded() -> Vocabulary:
    return Vocabulary([*small().tokens], [END], cache_bytes=6000)


@settings(max_examples=60)
@given(schema=st.sampled_from(SCHEMAS), seed=st.integers(0, 10**6))
def test_tokens_lead_where_their_bytes_lead(schema, seed):
    constraint, random = compile_constraint("json", schema, small()), Random(seed)
    state, text = constraint.start, b""
    for _ in range(12):
        tokens = [t for t in constraint.allowed(state).nonzero()[0].tolist() if t != END]
        if not tokens:
            break
        token = random.choice(tokens)
        state, text = constraint.advance(state, token), text + constraint.vocabulary.tokens[token]
        at = constraint.start
        for i in range(len(text)):
            at = constraint.walk(at, text[i : i + 1])
        assert at == state


def test_end_and_special_tokens():
    constraint = compile_constraint("regex", "ab*", small())
    assert not constraint.allowed(constraint.start)[[END, END - 1]].any()
    behind = constraint.advance(constraint.start, ord("a"))
    assert constraint.allowed(behind)[END]
    assert not constraint.allowed(behind)[END - 1], "a special token"
    with pytest.raises(ValueError, match="read-only"):
        constraint.allowed(behind)[0] = True


def test_masks_are_shared_by_equal_constraints():
    first, second = (compile_constraint("json", SCHEMAS[0], small()) for _ in range(2))
    assert first.packed(first.start) is second.packed(second.start)


def test_equal_masks_are_one_array():
    """However many characters a string may still have, if the longest token fits."""
    constraint = compile_constraint("regex", '"a{0,300}"', small())
    states = [constraint.walk(constraint.start, b'"' + b"a" * n) for n in (5, 6, 90)]
    assert len(set(states)) == 3
    assert len({id(constraint.packed(state)) for state in states}) == 1
    close = constraint.walk(constraint.start, b'"' + b"a" * 300)
    assert constraint.packed(close) is not constraint.packed(states[0])


def test_a_vocabulary_that_lacks_a_byte_says_so():
    lacking = Vocabulary([b"a", b"b", None], [2])
    with pytest.raises(NoTokenFits, match="lacks a byte"):
        compile_constraint("regex", "c", lacking)
    constraint = compile_constraint("regex", "ac|ab", lacking)
    behind = constraint.advance(constraint.start, 0)
    assert constraint.allowed(behind).tolist() == [False, True, False]
    late = compile_constraint("regex", "a(c|d)", lacking)
    with pytest.raises(NoTokenFits):
        late.allowed(late.advance(late.start, 0))


def test_a_model_with_more_logits_than_tokens():
    padded = Vocabulary([b"a", b"b"], [3], size=6)
    constraint = compile_constraint("regex", "a*", padded)
    assert constraint.allowed(constraint.start).tolist() == [True, False, False, True, False, False]


@pytest.mark.parametrize("arguments", [([b"a"], [1]), ([b"a"], [-1]), ([b"a", b"b"], [0], 1)])
def test_what_is_no_vocabulary_is_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        Vocabulary(*arguments)


def test_two_tokens_of_the_same_bytes_are_both_allowed():
    constraint = compile_constraint("regex", "aa", Vocabulary([b"a", b"a", b"aa", None], [3]))
    assert constraint.allowed(constraint.start).tolist() == [True, True, True, False]


def test_budgets_end_one_request_and_no_other():
    """Its neighbor, with the same vocabulary, goes on."""
    neighbor = compile_constraint("json", SCHEMAS[0], small())
    with pytest.raises(ConstraintTooLarge):  # noqa: PT012
        hostile = compile_constraint("regex", "(a|b)*a(a|b){14}", small(), Limits(states=100))
        for seed in range(100):
            random_walk(hostile, Random(seed))
    assert random_walk(neighbor, Random(0))


# ---- a real tokenizer ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(model_path("smollm2-135m-instruct"))


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (SCHEMAS[0], b'{"name": "'),
        (SCHEMAS[1], b'{"'),
        (SCHEMAS[3], b'"ab'),
        (SCHEMAS[5], '"x\xe9'.encode()),
        (SCHEMAS[10], b"[1"),
    ],
)
def test_masks_of_a_real_vocabulary(tokenizer, schema, text):
    constraint = compile_constraint("json", schema, tokenizer)
    state = constraint.walk(constraint.start, text)
    np.testing.assert_array_equal(constraint.allowed(state), one_by_one(constraint, state))


def test_of_a_real_tokenizer_special_tokens_are_left_out(tokenizer):
    vocabulary = vocabulary_of(tokenizer)
    assert vocabulary is vocabulary_of(tokenizer)
    assert vocabulary.end_ids.tolist() == [tokenizer.eos_token_id]
    assert not any(vocabulary.tokens[i] for i in tokenizer.special_tokens.values())
    constraint = compile_constraint("regex", "[^x]*", tokenizer)
    mask = constraint.allowed(constraint.start)
    assert not mask[[i for i in tokenizer.special_tokens.values() if i != tokenizer.eos_token_id]].any()
    assert mask[tokenizer.eos_token_id]


def test_errors_are_value_errors():
    assert issubclass(ConstraintError, ValueError)
    assert issubclass(ConstraintTooLarge, ConstraintError)
    assert issubclass(NoTokenFits, ConstraintError)


@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_packed_bits_are_the_mask(bits):
    words = packed(np.array(bits))
    assert words.dtype == np.int32
    assert len(words) == -(-len(bits) // 32)
    assert [bool(words[i // 32] >> (i % 32) & 1) for i in range(len(bits))] == bits
