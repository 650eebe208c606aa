"""A request fails, at whatever point of a step: it ends with its error, its neighbors keep every token, and afterwards
counters, gauges and the prefix cache are true.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.cache.blocks import BlockTable
from minillm.config import SpeculativeConfig
from minillm.engine.engine import Engine
from minillm.engine.metrics import EngineMetrics
from minillm.engine.runner import Results, Runner
from minillm.engine.text import StopText
from minillm.sampling import SamplingParams

from .conftest import Guessing, assert_home, oracle, run, tiny_model

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
BOTH = pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])


GUESSES = SpeculativeConfig(num_speculative_tokens=3, adaptive=False)
speculative: list[SpeculativeConfig | None] = [None]


@pytest.fixture(autouse=True, scope="module", params=[None, GUESSES], ids=["plain", "guesses"])
def with_guesses(request):
    """Everything here also with several tokens a step."""
    speculative[0] = request.param


def engine_of(**options) -> Engine:
    options = {"num_blocks": 40, "block_size": 4, "max_num_seqs": 4, "speculative": speculative[0], **options}
    if speculative[0] is None:
        return Engine(tiny_model(), **options)
    engine = Guessing(tiny_model(), **options)
    engine.runner.futures = [[*p, *oracle(tuple(p), GREEDY, 64)] for p in ([1, 2, 3], [4, 5], [6] * 9, [49, 1, 2])]
    return engine


class Fault(Exception):
    pass


def patched(monkeypatch, owner, name, is_bad, after=0):
    """`owner.name` raises for the request that `is_bad` tells from its arguments, after so many calls for it."""
    original, calls = getattr(owner, name), []

    def wrapped(self, *args, **kwargs):
        if is_bad(self, *args):
            calls.append(None)
            if len(calls) > after:
                raise Fault(name)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


# Where the bad request, whose prompt begins with 49, is struck: (owner, method, how it is told).
def of_request(_, request, *rest):
    return request.prompt_token_ids[0] == 49


POINTS = {
    "extending its blocks": (BlockTable, "extend", lambda table, *_: getattr(table, "bad", False)),
    "finding its prefix": (BlockTable, "match_prefix", lambda _, ids: ids[0] == 49),
    "counting its tokens": (EngineMetrics, "got_tokens", of_request),
    "counting its end": (EngineMetrics, "finished", of_request),
    "counting its admission": (EngineMetrics, "admitted", of_request),
    "its text": (StopText, "push", lambda stream, *_: stream.bad),
    "the rest of its text": (StopText, "flush", lambda stream, *_: stream.bad),
    "launching it": (Runner, "forward", lambda runner, plan: 49 in plan.values.tolist()),
    "drawing for it": (Runner, "draw", lambda runner, plan, *_: runner.bad_row in plan.steps[0, : plan.num_sequences]),
}


class Piece:
    """What `StopText` wants of a decoder."""

    def push(self, token: int) -> str:
        return f"{token} "

    def flush(self) -> str:
        return ""


@BOTH
@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("point", POINTS)
def test_one_fails_and_the_others_keep_every_token(point, after, async_scheduling, monkeypatch):
    engine = engine_of(async_scheduling=async_scheduling)
    requests = [engine.add(list(p), GREEDY)[0] for p in [(1, 2, 3, 4, 5), (49, 2, 3), (1, 2, 3, 4, 6), (7,)]]
    for request in requests:
        request.text_stream = StopText([], Piece())
        request.text_stream.bad = request.table.bad = request is requests[1]
    engine.runner.bad_row = -7
    owner, name, is_bad = POINTS[point]
    patched(monkeypatch, owner, name, is_bad, after)
    for _ in range(100):
        engine.runner.bad_row = requests[1].row if requests[1].row >= 0 else -7
        if not engine.has_unfinished():
            break
        engine.step()
    monkeypatch.undo()
    assert_home(engine)
    assert (engine.metrics.running, engine.metrics.waiting, engine.metrics.cache_usage) == (0, 0, 0)
    bad, struck = requests[1], requests[1].finish_reason == "error"
    assert struck or after  # it may be over before the third call
    if struck:
        assert isinstance(bad.error, Fault)
    assert bad.output_token_ids == oracle((49, 2, 3), GREEDY, 64)[: len(bad.output_token_ids)]
    for i in (0, 2, 3):
        assert requests[i].error is None
        expected = oracle(tuple(requests[i].prompt_token_ids), GREEDY, 64)
        assert requests[i].output_token_ids == expected
        assert requests[i].text == "".join(f"{token} " for token in expected)
    # Whatever it had promised to the prefix cache is right, or gone.
    for prompt in ((49, 2, 3), (1, 2, 3, 4, 5), (49, 2, 3, *bad.output_token_ids)):
        [again] = engine.add(list(prompt), GREEDY)
        run(engine)
        assert again.output_token_ids == oracle(prompt, GREEDY, 64)


@BOTH
def test_counters_are_true_afterwards(async_scheduling, monkeypatch):
    engine = engine_of(async_scheduling=async_scheduling)
    assert (engine.metrics.running, engine.metrics.waiting) == (0, 0)
    requests = [engine.add([i, 2], GREEDY)[0] for i in (1, 49, 3, 4, 5)]
    assert (engine.metrics.running, engine.metrics.waiting) == (0, 5)  # before the first step
    patched(monkeypatch, EngineMetrics, "got_tokens", of_request, after=3)
    engine.step()
    assert (engine.metrics.running, engine.metrics.waiting) == (4, 1)
    engine.abort(requests[0])
    assert engine.metrics.running == 3
    run(engine)
    m = engine.metrics
    assert (m.num_requests, m.num_finished, m.num_aborted, m.num_failed) == (5, 3, 1, 1)
    assert (m.running, m.waiting, m.cache_usage) == (0, 0, 0)
    engine.add([1], GREEDY)
    engine.reset()
    assert (m.num_aborted, m.waiting) == (2, 0)


@BOTH
def test_a_step_that_cannot_be_read_leaves_nothing_that_was_not_written(async_scheduling, monkeypatch):
    """The first request's step is lost. It had promised two blocks of its prompt, and another one has taken them."""
    engine = engine_of(async_scheduling=async_scheduling)
    prompt = tuple(range(1, 12))
    [writer] = engine.add(list(prompt), GREEDY)
    clear = [layer.k.fill_ for layer in engine.runner.cache.layers]
    read = Results.read
    monkeypatch.setattr(Results, "read", lambda self: (_ for _ in ()).throw(Fault("lost")))
    engine.step()
    [reader] = engine.add([*prompt, 20], GREEDY)  # async: finds blocks that a step on its way is to write
    for fill in clear:
        fill(1000.0)  # what the lost step wrote never arrived
    engine.step()
    monkeypatch.setattr(Results, "read", read)
    run(engine)
    assert_home(engine)
    assert writer.finish_reason == "error"
    assert isinstance(writer.error, Fault)
    if reader.finish_reason != "error":  # else it was in a step that was lost, too
        assert reader.output_token_ids == oracle((*prompt, 20), GREEDY, 64)
    [after] = engine.add(list(prompt), GREEDY)
    run(engine)
    assert after.num_cached == 0 or reader.finish_reason != "error"
    assert after.output_token_ids == oracle(prompt, GREEDY, 64)


def test_who_reads_a_lost_block_computes_anew(monkeypatch):
    """Three steps: the reader is admitted while the writer's step is on its way, which then turns out lost."""
    engine = engine_of(async_scheduling=True)
    prompt = tuple(range(1, 12))
    [writer] = engine.add(list(prompt), GREEDY)
    engine.step()  # launches the prompt
    lost = engine._in_flight[0]
    [reader] = engine.add([*prompt, 20], GREEDY)
    monkeypatch.setattr(lost, "read", lambda: (_ for _ in ()).throw(Fault("lost")))
    engine.step()  # launches the reader on the blocks of the prompt, then finds that these were never written
    assert reader.num_cached == 8
    assert (writer.finish_reason, reader.finish_reason) == ("error", None)
    for layer in engine.runner.cache.layers:
        layer.k.fill_(float("nan"))
    run(engine)
    assert_home(engine)
    assert reader.output_token_ids == oracle((*prompt, 20), GREEDY, 64)
    [after] = engine.add(list(prompt), GREEDY)
    run(engine)
    assert after.output_token_ids == oracle(prompt, GREEDY, 64)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.integers(8, 24), st.sampled_from([1, 2, 4]), st.integers(2, 20))
def test_faults_anywhere(seed, async_scheduling, num_blocks, block_size, budget):
    """Calls fail at random, of any kind and for anybody. Who ends well has the oracle's tokens, who fails a start."""
    rng = random.Random(seed)
    engine = Engine(
        tiny_model(), num_blocks=num_blocks, block_size=block_size, max_num_seqs=3, max_num_batched_tokens=budget,
        async_scheduling=async_scheduling,
    )  # fmt: skip
    started, patch = [], pytest.MonkeyPatch()
    for owner, name in (
        (BlockTable, "extend"), (BlockTable, "publish"), (Runner, "forward"), (Runner, "draw"), (Results, "read"),
        (EngineMetrics, "got_tokens"), (EngineMetrics, "finished"),
    ):  # fmt: skip
        original = getattr(owner, name)

        def wrapped(self, *args, original=original, **kwargs):
            if rng.random() < 0.03:
                raise Fault
            result = original(self, *args, **kwargs)
            if rng.random() < 0.01:  # after the work was done, which is worse
                raise Fault
            return result

        patch.setattr(owner, name, wrapped)
    try:
        for _ in range(60):
            if len(started) < 8 and rng.random() < 0.5:
                prompt = [1, 2, 3, 4, 5][: rng.randint(0, 5)] + [rng.randint(0, 3) for _ in range(rng.randint(1, 6))]
                if len(prompt) < engine.max_model_len:
                    params = SamplingParams(temperature=0, max_tokens=rng.randint(1, 9))
                    started.append((engine.add(prompt, params)[0], tuple(prompt), params))
            engine.step()
    finally:
        patch.undo()
    run(engine)
    assert_home(engine)
    m = engine.metrics
    assert len(started) == m.num_requests == m.num_finished + m.num_failed + m.num_aborted
    for request, prompt, params in started:
        expected = oracle(prompt, params, engine.max_model_len)
        assert request.output_token_ids == expected[: len(request.output_token_ids)]
        assert request.error is not None or request.output_token_ids == expected
        [again] = engine.add(list(prompt), params)
        run(engine)
        assert again.output_token_ids == expected
