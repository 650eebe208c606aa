"""Generation with a cache against generation without one, token by token; and the windows and batches of both."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.config import ModelConfig
from minillm.generate import Token, cached, cached_batch, naive, occupancy
from minillm.model import Transformer
from minillm.sampling import SamplingParams

from .cache.test_contiguous import CONFIGS, VOCAB, tiny

PROMPTS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=14)
WINDOWS = st.sampled_from([0, 1, 2, 5, 8])
NAMES = st.sampled_from(sorted(CONFIGS))


def ids(steps):
    return [int(step) for step in steps]


@settings(max_examples=60, deadline=None)
@given(NAMES, PROMPTS, st.integers(1, 24), WINDOWS, st.none() | st.integers(2, 30))
def test_cached_is_naive(name, prompt, max_tokens, window, limit):
    model, params = tiny(name), SamplingParams(temperature=0, max_tokens=max_tokens)
    expected = ids(naive(model, prompt, params, limit, window))
    assert ids(cached(model, prompt, params, limit, window)) == expected
    assert len(expected) == max(0, min(max_tokens, (limit or 64) - len(prompt)))


@settings(max_examples=30, deadline=None)
@given(NAMES, st.lists(st.tuples(PROMPTS, st.integers(1, 20)), min_size=1, max_size=5), WINDOWS, st.data())
def test_a_batch_is_its_sequences_one_by_one(name, requests, window, data):
    model, prompts = tiny(name), [prompt for prompt, _ in requests]
    params = [SamplingParams(temperature=0, max_tokens=n) for _, n in requests]
    limit = data.draw(st.none() | st.integers(6, 30))
    expected = [ids(naive(model, p, x, limit, window)) for p, x in zip(prompts, params, strict=True)]
    assert cached_batch(model, prompts, params, limit, window) == expected


@functools.cache
def ending() -> tuple[Transformer, list[int]]:
    """A model whose greedy text after [3] ends with an end token that comes fifth or later."""
    model = tiny("grouped")
    free = ids(naive(model, [3], SamplingParams(temperature=0, max_tokens=12)))
    end = next(t for i, t in enumerate(free) if i >= 4 and t not in free[:i])
    settings = {k: v for k, v in vars(model.config).items() if k != "eos_token_ids"}
    other = Transformer(ModelConfig(**settings, eos_token_ids=(end,))).eval().requires_grad_(False)
    other.load_state_dict(model.state_dict())
    return other, free[: free.index(end) + 1]


@pytest.mark.parametrize("way", [naive, cached])
def test_ends(way):
    model, text = ending()
    params = SamplingParams(temperature=0, max_tokens=12)
    steps = list(way(model, [3], params))
    assert ids(steps) == text
    assert [step.is_end for step in steps] == [False] * (len(text) - 1) + [True]
    going_on = list(way(model, [3], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)))
    assert ids(going_on)[: len(text)] == text
    assert len(going_on) == 12
    stopped = list(way(model, [3], SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[text[1]])))
    assert ids(stopped) == text[: text.index(text[1]) + 1]
    late = ids(way(model, [3], SamplingParams(temperature=0, max_tokens=12, min_tokens=12)))
    assert len(late) == 12
    assert text[-1] not in late[:-1]


def test_a_batch_goes_on_until_the_longest_has_ended():
    model, text = ending()
    params = SamplingParams(temperature=0, max_tokens=12)
    other = ids(naive(model, [7, 8], params))
    outputs = cached_batch(model, [[3], [7, 8]], params)
    assert outputs == [text, other]
    assert occupancy(outputs) == (len(text) + len(other)) / (2 * max(len(text), len(other)))
    assert occupancy([[1], [1, 2, 3, 4]]) == 5 / 8
    assert occupancy([[], []]) == 1


@pytest.mark.parametrize("seed", [0, 1])
def test_drawn_tokens_agree_too(seed):
    model = tiny("grouped")
    params = SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.2, seed=seed, max_tokens=15)
    expected = ids(naive(model, [1, 2, 3], params))
    assert ids(cached(model, [1, 2, 3], params)) == expected
    assert cached_batch(model, [[5], [1, 2, 3], [7] * 9], params)[1] == expected


def test_logprobs():
    model, params = tiny("qwen3"), SamplingParams(temperature=0, max_tokens=6, logprobs=2)
    for a, b in zip(naive(model, [1, 2], params), cached(model, [1, 2], params), strict=True):
        assert isinstance(b, Token)
        assert a.logprobs.keys() == b.logprobs.keys()
        assert list(a.logprobs.values()) == pytest.approx(list(b.logprobs.values()), abs=1e-4)


def test_each_token_is_computed_once(monkeypatch):
    model, params, seen = tiny("llama"), SamplingParams(temperature=0, max_tokens=5), []
    forward = Transformer.forward
    monkeypatch.setattr(
        Transformer, "forward", lambda self, x, *a, **k: seen.append(x.shape) or forward(self, x, *a, **k)
    )
    list(cached(model, [1, 2, 3], params))
    assert seen == [(1, 3), (1, 1), (1, 1), (1, 1), (1, 1)]
    seen.clear()
    list(naive(model, [1, 2, 3], params))
    assert seen == [(1, n) for n in (3, 4, 5, 6, 7)]


def test_bad_input():
    model, params = tiny("llama"), SamplingParams(max_tokens=2)
    for way in (naive, cached):
        with pytest.raises(ValueError, match="token_ids: expected at least one token"):
            next(way(model, [], params))
        with pytest.raises(ValueError, match="window: expected an integer"):
            next(way(model, [1], params, window=-1))
        with pytest.raises(ValueError, match="token_ids: expected ids in 0"):
            next(way(model, [VOCAB], params))
    with pytest.raises(ValueError, match="token_ids: expected at least one token"):
        cached_batch(model, [[1], []], params)
    with pytest.raises(ValueError, match="params: expected one for all or one each of 1 prompt or more, got 1 and 2"):
        cached_batch(model, [[1], [2]], [params])
    with pytest.raises(ValueError, match="params: expected one for all"):
        cached_batch(model, [], params)
    assert cached_batch(model, [[1] * 8, [2]], params, max_model_len=8)[0] == []


def test_inference_mode_does_not_leak():
    steps = cached(tiny("llama"), [1], SamplingParams(max_tokens=3))
    next(steps)
    assert not torch.is_inference_mode_enabled()
