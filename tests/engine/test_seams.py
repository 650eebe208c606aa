"""What later chapters add to the engine, shown by doubles: each is an addition, and no line of the engine knows it."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from minillm.config import SpeculativeConfig
from minillm.engine import batch as batch_module
from minillm.engine.engine import Engine
from minillm.engine.runner import Runner
from minillm.generate import naive
from minillm.sampling import SamplingParams

from .conftest import Guessing, assert_home, oracle, run, tiny_model

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, seed=4, max_tokens=9, ignore_eos=True)
FILTERED = SamplingParams(temperature=1.3, seed=7, top_k=9, top_p=0.9, frequency_penalty=0.4, max_tokens=11)
BOTH = pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
JOBS = [((1, 2, 3), GREEDY), ((4, 5), SAMPLED), ((6,) * 9, FILTERED), ((1, 2, 3, 4, 9), GREEDY)]


def engine_of(kind: type[Engine] = Engine, **options) -> Engine:
    return kind(tiny_model(), **{"num_blocks": 40, "block_size": 4, "max_num_seqs": 3, **options})


# ---- guesses of another kind ---------------------------------------------------------------------------------------


TWO = SpeculativeConfig(num_speculative_tokens=2, adaptive=False)


@BOTH
@pytest.mark.parametrize("num_blocks", [40, 7])  # 7: with preemption
def test_a_step_may_give_several_tokens(async_scheduling, num_blocks):
    engine = engine_of(Guessing, async_scheduling=async_scheduling, num_blocks=num_blocks, speculative=TWO)
    engine.runner.futures = [[*prompt, *oracle(prompt, params, 28)] for prompt, params in JOBS]
    requests = [engine.add(list(prompt), params)[0] for prompt, params in JOBS * 2]
    most = 0
    while engine.has_unfinished():
        most = max([most, *(len(request.new_token_ids) for request in engine.step())])
    assert most == 3
    assert_home(engine)
    assert (engine.metrics.num_preemptions > 0) == (num_blocks == 7)
    for request, (prompt, params) in zip(requests, JOBS * 2, strict=True):
        assert request.error is None
        assert request.output_token_ids == oracle(prompt, params, engine.max_model_len)
    assert engine.metrics.num_generated_tokens == sum(len(r.output_token_ids) for r in requests)
    assert engine.metrics.num_accepted_tokens > engine.metrics.num_drafts / 2


@BOTH
def test_an_end_within_a_step_drops_what_follows(async_scheduling):
    free = oracle((3,), GREEDY, 64)
    for stop in free[2:5]:
        params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, stop_token_ids=[stop])
        engine = engine_of(Guessing, async_scheduling=async_scheduling, speculative=TWO)
        engine.runner.futures = [[3, *free]]
        [request] = engine.add([3], params)
        run(engine)
        assert_home(engine)
        assert request.output_token_ids == oracle((3,), params, 64)


# ---- an option that no kernel knows --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_an_option_is_declared_once(monkeypatch, dtype):
    """It reaches the model in the rows of its own requests, whatever else is in the batch."""
    monkeypatch.setitem(batch_module.OPTIONS, "color", dtype)
    engine, seen = engine_of(), {}
    forward = engine.model.forward

    def spying(token_ids, batch=None, cache=None, rows=None):
        for i, count in enumerate(batch.cu_seqlens_q.diff().tolist()):
            if count:
                seen.setdefault(int(batch.options["color"][i]), set()).add(float(batch.options["temperature"][i]))
        return forward(token_ids, batch, cache, rows)

    monkeypatch.setattr(engine.model, "forward", spying)
    big = 2**40 + 1 if dtype == torch.int64 else 2**20 + 1
    for color, temperature in ((7, 0.0), (big, 0.5), (-3, 1.5)):
        params = SamplingParams(temperature=temperature, max_tokens=3, seed=1)
        [request] = engine.add([1, 2, 3, int(10 * temperature)], params)
        request.options["color"] = color
    run(engine)
    assert seen == {7: {0.0}, big: {0.5}, -3: {1.5}}


# ---- names of blocks -----------------------------------------------------------------------------------------------


def test_two_roots_never_share_a_block():
    engine = engine_of()
    prompt = list(range(1, 14))
    cached = []
    for salt in ("", "tenant", "", "tenant", "other"):
        request_id = engine.add_request(prompt, GREEDY, cache_salt=salt)
        request = engine.requests[request_id]
        run(engine)
        cached.append(request.num_cached)
        assert request.output_token_ids == oracle(tuple(prompt), GREEDY, 64)
    assert cached == [0, 0, 12, 12, 0]


def test_changed_weights_are_not_answered_from_the_cache(monkeypatch):
    torch.manual_seed(1)
    from minillm.model import Transformer

    model = Transformer(tiny_model().config).eval().requires_grad_(False)
    model.reset_parameters(std=0.4)
    engine = Engine(model, num_blocks=40, block_size=4)
    prompt = list(range(1, 14))
    first = engine.add(prompt, GREEDY)[0]
    run(engine)
    model.layers[0].mlp.down_proj.weight.mul_(-1.5)
    second, expected = engine.add(prompt, GREEDY)[0], [int(t) for t in naive(model, prompt, GREEDY)]
    run(engine)
    assert (first.num_cached, second.num_cached) == (0, 0)
    assert second.output_token_ids == expected != first.output_token_ids


# ---- masks that arrive late ----------------------------------------------------------------------------------------


@BOTH
def test_masks_may_arrive_after_the_layers_were_launched(async_scheduling, monkeypatch):
    """Even ids after odd ones and the other way round: decided by a token that the layers started without."""
    engine, order = engine_of(async_scheduling=async_scheduling), []
    forward = engine.runner.forward
    monkeypatch.setattr(engine.runner, "forward", lambda plan: (order.append("forward"), forward(plan))[1])

    def allowed(token_ids):
        order.append(tuple(token_ids))
        return torch.arange(50) % 2 != token_ids[-1] % 2

    free = engine.add([1, 2, 3], GREEDY)[0]
    [bound] = engine.add([4, 5, 6], SAMPLED, allowed=allowed)
    run(engine)
    assert_home(engine)
    assert free.output_token_ids == oracle((1, 2, 3), GREEDY, 64)
    everything = [6, *bound.output_token_ids]
    assert all((a + b) % 2 for a, b in pairwise(everything))
    assert len(bound.output_token_ids) == SAMPLED.max_tokens
    for i, what in enumerate(order):  # each question comes after the layers of its step, and knows every token so far
        if what != "forward":
            assert order[i - 1] == "forward"
    assert [len(what) - 3 for what in order if what != "forward"] == list(range(9))


def test_a_mask_that_fails_concerns_one_request():
    engine = engine_of()
    free = engine.add([1, 2, 3], GREEDY)[0]
    [bad] = engine.add([4, 5], GREEDY, allowed=lambda ids: (_ for _ in ()).throw(RuntimeError("grammar")))
    run(engine)
    assert_home(engine)
    assert (bad.finish_reason, str(bad.error)) == ("error", "grammar")
    assert free.output_token_ids == oracle((1, 2, 3), GREEDY, 64)


# ---- a plan is numbers ---------------------------------------------------------------------------------------------


def test_a_second_runner_replays_the_plans(monkeypatch):
    """As the ranks of a tensor-parallel group do: same weights, same plans, same tokens, and no request in sight."""
    engine = engine_of(num_blocks=9)
    other = Runner(engine.model, engine.config, engine.layout)
    other.allocate(9)
    launched, draw = [], engine.runner.draw
    copied, copy = [], engine.runner.cache.copy

    def recording(plan, masks=None):
        results = draw(plan, masks)
        launched.append((plan, copied[-1:], results.read()))
        copied.clear()
        return results

    monkeypatch.setattr(engine.runner, "draw", recording)
    monkeypatch.setattr(engine.runner.cache, "copy", lambda pairs: (copied.append(list(pairs)), copy(pairs))[1])
    jobs = [*JOBS, ((2, 3, 4, 5, 6), SamplingParams(temperature=1.0, seed=3, n=2, max_tokens=5, logprobs=2))]
    for prompt, params in jobs:
        engine.add(list(prompt), params)
    run(engine)
    assert engine.metrics.num_preemptions
    for plan, copies, tokens in launched:
        assert all(isinstance(getattr(plan, name), np.ndarray) for name in ("places", "values", "steps", "ready"))
        for pairs in copies:
            other.cache.copy(pairs)
        assert other.launch(plan).read() == tokens
