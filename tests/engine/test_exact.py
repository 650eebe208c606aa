"""Whatever the schedule, a request's tokens are those of the oracle, every block comes home, the counters add up."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.engine.engine import Engine
from minillm.sampling import SamplingParams

from .conftest import assert_home, oracle, tiny_model

QUICK = os.environ.get("HYPOTHESIS_PROFILE") == "quick"
EXAMPLES = 100 if QUICK else 2000
DEVICES = [
    pytest.param("cpu", marks=[] if QUICK else pytest.mark.slow),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.slow]),
]

# Few different beginnings, so that prefixes are shared; and the same prompt more than once.
BEGINNINGS = [(), (1, 2, 3, 4), (1, 2, 3, 4, 5, 6, 7, 8, 9)]
PROMPTS = st.builds(
    lambda a, b: (*a, *b), st.sampled_from(BEGINNINGS), st.lists(st.integers(0, 3), min_size=1, max_size=9)
)
# prompt, max_tokens, n, arrives at step, priority, abort so many steps later, sampling
ARRIVALS = st.lists(
    st.tuples(
        PROMPTS, st.integers(1, 12), st.sampled_from([1, 1, 1, 2, 3]), st.integers(0, 6), st.integers(0, 2),
        st.none() | st.integers(1, 8), st.sampled_from(["greedy", "greedy", "greedy", "sampled", "filtered"]),
    ),
    min_size=1, max_size=6,
)  # fmt: skip
SAMPLING = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.8, "seed": 5},
    "filtered": {"temperature": 1.2, "seed": 6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3,
                 "presence_penalty": 0.2, "frequency_penalty": 0.1},
}  # fmt: skip


def add(engine: Engine, arrival: tuple, started: list) -> str | None:
    """Add a request -> its id; note what each of its completions must give."""
    prompt, max_tokens, n, _, priority, _, kind = arrival
    params = SamplingParams(max_tokens=max_tokens, n=n, **SAMPLING[kind])
    if len(prompt) >= engine.max_model_len:
        with pytest.raises(ValueError, match="prompt_token_ids: expected 1 to"):
            engine.add_request(list(prompt), params)
        return None
    key = engine.add_request(list(prompt), params, priority=priority)
    for i in range(n):
        alone = dict(SAMPLING[kind])
        if "seed" in alone:
            alone["seed"] += i
        request = engine.requests[f"{key}/{i}" if i else key]
        started.append((request, prompt, SamplingParams(max_tokens=max_tokens, **alone)))
    return key


def play(engine: Engine, arrivals: list) -> list:
    """Requests arrive, some are aborted, until all is done -> (request, prompt, params of the oracle)."""
    todo, started, aborts = list(arrivals), [], {}
    for step in range(3000):
        for arrival in [a for a in todo if a[3] <= step]:
            todo.remove(arrival)
            key = add(engine, arrival, started)
            if key is not None and arrival[5] is not None:
                aborts[key] = step + arrival[5]
        for key in [k for k, at in aborts.items() if at == step]:
            engine.abort(key)
            assert not engine.abort(key)
        assert engine.pool.num_used <= engine.pool.num_blocks
        assert len(engine.scheduler.running) <= engine.scheduler.max_num_seqs
        engine.step()
        if not todo and not engine.has_unfinished():
            return started
    raise AssertionError("hangs")


def assert_counted(engine: Engine, started: list) -> None:
    m, requests = engine.metrics, [request for request, _, _ in started]
    tokens = sum(len(r.output_token_ids) for r in requests)
    assert m.num_requests == len(requests) == m.num_finished + m.num_aborted
    assert m.num_failed == 0
    assert m.num_aborted == sum(r.finish_reason == "abort" for r in requests)
    assert m.num_generated_tokens == tokens
    assert m.num_preemptions == sum(r.num_preemptions for r in requests)
    assert m.num_cached_tokens <= m.num_prompt_tokens
    assert m.time_to_first_token.count == sum(bool(r.output_token_ids) for r in requests)
    assert m.inter_token_latency.count == tokens - m.time_to_first_token.count
    assert m.request_latency.count == m.num_finished


def schedules(device: str):
    @settings(max_examples=EXAMPLES if device == "cpu" else 60, deadline=None)
    @given(
        ARRIVALS, st.integers(6, 20), st.sampled_from([1, 2, 4, 8]), st.integers(1, 5), st.integers(1, 30),
        st.booleans(), st.booleans(),
    )  # fmt: skip
    def check(arrivals, num_blocks, block_size, max_num_seqs, budget, prefix_caching, async_scheduling):
        engine = Engine(
            tiny_model(device), num_blocks=num_blocks, block_size=block_size, max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget, enable_prefix_caching=prefix_caching, async_scheduling=async_scheduling,
            enforce_eager=True,
        )  # fmt: skip
        started = play(engine, arrivals)
        for request, prompt, params in started:
            expected = oracle(prompt, params, engine.max_model_len, device)
            if request.finish_reason == "abort":
                expected = expected[: len(request.output_token_ids)]
            assert request.error is None
            assert request.output_token_ids == expected
        assert_home(engine)
        assert_counted(engine, started)

    return check


@pytest.mark.parametrize("device", DEVICES)
def test_schedules(device):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of tensors this small, threads only slow each other down
    try:
        schedules(device)()
    finally:
        torch.set_num_threads(threads)


def test_who_was_preempted_does_not_come_back_without_the_token_on_its_way():
    """A request of better rank takes the victim's row in the very step: were the victim readmitted in it as well, its
    last token, which the device alone knows, would be lost (found by leaving the scheduler's guard out).
    """
    arrivals = [
        ((0, 0, 1, 3, 0), 4, 10, 0), ((3,), 6, 6, 0), ((3, 0, 0, 2), 9, 2, 2), ((3, 2), 4, 1, 1), ((3, 2), 3, 4, 1),
        ((3, 2, 0, 2, 1), 4, 0, 1), ((2,), 9, 5, 0),
    ]  # fmt: skip
    engine = Engine(tiny_model(), num_blocks=18, block_size=1, max_num_seqs=4, max_num_batched_tokens=6,
                    enable_prefix_caching=False, async_scheduling=True, enforce_eager=True)  # fmt: skip
    started = play(engine, [(prompt, length, 1, at, rank, None, "greedy") for prompt, length, at, rank in arrivals])
    assert engine.metrics.num_preemptions
    for request, prompt, params in started:
        assert request.output_token_ids == oracle(prompt, params, engine.max_model_len)
