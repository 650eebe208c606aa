"""Whatever the schedule, a request's greedy tokens are those of the oracle, and every block comes home."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.config import ModelConfig
from minillm.engine.engine import Engine
from minillm.generate import naive
from minillm.model import Transformer
from minillm.sampling import SamplingParams

VOCAB = 50


@pytest.fixture(scope="module")
def model():
    """Tiny, with weights so large that no two logits come near each other."""
    torch.manual_seed(0)
    config = ModelConfig(VOCAB, 16, 24, 2, 4, 2, 8, max_position_embeddings=64)
    model = Transformer(config).eval().requires_grad_(False)
    model.reset_parameters(std=0.4)
    return model


@functools.cache
def oracle(model, prompt, max_tokens, limit):
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return [int(t) for t in naive(model, list(prompt), params, limit)]


# Few different beginnings, so that prefixes are shared; and the same prompt more than once.
BEGINNINGS = [(), (1, 2, 3, 4), (1, 2, 3, 4, 5, 6, 7, 8, 9)]
PROMPTS = st.builds(
    lambda a, b: (*a, *b), st.sampled_from(BEGINNINGS), st.lists(st.integers(0, 3), min_size=1, max_size=9)
)
ARRIVALS = st.lists(
    st.tuples(PROMPTS, st.integers(1, 12), st.integers(0, 6), st.integers(0, 2), st.none() | st.integers(1, 8)),
    min_size=1, max_size=7,
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    ARRIVALS, st.integers(6, 20), st.sampled_from([1, 2, 4, 8]), st.integers(1, 5), st.integers(1, 30), st.booleans(),
    st.booleans(),
)  # fmt: skip
def schedules(model, arrivals, num_blocks, block_size, max_num_seqs, budget, prefix_caching, async_scheduling):
    engine = Engine(
        model, num_blocks, block_size, max_num_seqs, budget, enable_prefix_caching=prefix_caching,
        async_scheduling=async_scheduling,
    )  # fmt: skip
    todo, started, aborted = list(arrivals), {}, {}
    for step in range(2000):
        for prompt, max_tokens, at, priority, abort_after in [a for a in todo if a[2] <= step]:
            todo.remove((prompt, max_tokens, at, priority, abort_after))
            params = SamplingParams(temperature=0, max_tokens=max_tokens)
            if len(prompt) >= engine.max_model_len:
                with pytest.raises(ValueError, match="prompt_token_ids: expected 1 to"):
                    engine.add_request(list(prompt), params)
                continue
            key = engine.add_request(list(prompt), params, priority=priority)
            started[key] = (engine.requests[key], prompt, max_tokens)
            if abort_after is not None and max_tokens > 6:
                aborted[key] = step + abort_after
        for key in [k for k, at in aborted.items() if at == step]:
            engine.abort(key)
            assert not engine.abort(key)
        engine.step()
        if not todo and not engine.has_unfinished():
            break
    else:
        raise AssertionError("hangs")
    for request, prompt, max_tokens in started.values():
        assert request.error is None
        expected = oracle(model, prompt, max_tokens, engine.max_model_len)
        if request.finish_reason == "abort":
            expected = expected[: len(request.output_token_ids)]
        assert request.output_token_ids == expected
    assert engine.pool.num_used == 0
    assert not any(engine.pool.references)


def test_schedules(model):
    schedules(model)
