"""Faults, ends, several completions, log probabilities, seeds, and what the counters show."""

import itertools
import math

import pytest
import torch

from minillm.engine import batch
from minillm.engine.engine import Engine
from minillm.engine.metrics import EngineMetrics, Histogram
from minillm.engine.runner import Results
from minillm.generate import naive
from minillm.sampling import SamplingParams

from .conftest import assert_home, oracle, run, tiny_model

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
BOTH = pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])


def engine_of(**options) -> Engine:
    return Engine(tiny_model(), **{"num_blocks": 40, "block_size": 4, "max_num_seqs": 4, **options})


def outputs(engine: Engine, prompts: list, params: list) -> list:
    keys = [engine.add_request(list(p), q) for p, q in zip(prompts, params, strict=True)]
    requests = [engine.requests[k] for k in keys]
    run(engine)
    assert_home(engine)
    return requests


class Breaks:
    """A model that raises whenever a batch holds a token it does not like."""

    def __init__(self, engine: Engine, token: int, error: BaseException) -> None:
        self.forward, self.token, self.error, self.calls = engine.runner._forward, token, error, 0
        self.table = engine.runner.table
        engine.runner._forward = self

    def __call__(self, tokens: int, sequences: int, decode: bool, **more) -> torch.Tensor:
        self.calls += 1
        if self.token in self.table.batch(tokens, sequences, decode).token_ids.tolist():
            raise self.error
        return self.forward(tokens, sequences, decode, **more)


class TestFaults:
    @BOTH
    def test_a_request_fails_and_the_others_go_on(self, async_scheduling):
        engine = engine_of(async_scheduling=async_scheduling)
        Breaks(engine, 49, RuntimeError("kernel"))
        prompts = [(1, 2, 3), (4, 49, 5), (6, 8)]
        good, bad, late = outputs(engine, prompts, [GREEDY] * 3)
        assert (bad.finish_reason, str(bad.error), bad.output_token_ids) == ("error", "kernel", [])
        for request, prompt in ((good, prompts[0]), (late, prompts[2])):
            assert request.output_token_ids == oracle(prompt, GREEDY, 64)
        assert engine.metrics.num_failed == 1
        assert engine.metrics.num_finished == 2

    @BOTH
    def test_reading_fails(self, async_scheduling, monkeypatch):
        """An error that shows only when the result is read: whoever was in that step fails, nobody else."""
        engine = engine_of(async_scheduling=async_scheduling)
        first = engine.requests[engine.add_request([1, 2], GREEDY)]
        engine.step()
        read = Results.read
        monkeypatch.setattr(Results, "read", lambda self: (_ for _ in ()).throw(RuntimeError("device")))
        while not first.finished:
            engine.step()
        monkeypatch.setattr(Results, "read", read)
        assert first.finish_reason == "error"
        [after] = outputs(engine, [(3, 4)], [GREEDY])
        assert after.output_token_ids == oracle((3, 4), GREEDY, 64)

    def test_sampling_fails_for_one(self, broken_sampling):
        engine = engine_of()
        odd = SamplingParams(top_k=3, max_tokens=4)
        good, bad = outputs(engine, [(1, 2), (1, 2)], [GREEDY, odd])
        assert bad.finish_reason == "error"
        assert good.output_token_ids == oracle((1, 2), GREEDY, 64)

    @BOTH
    @pytest.mark.parametrize("call", range(1, 12))
    def test_an_upload_that_fails_once_harms_nobody(self, call, async_scheduling, monkeypatch):
        """Tokens, tables and steps go to the device in several calls; any of them may raise, and is made again."""
        engine, calls = engine_of(async_scheduling=async_scheduling), []

        def failing(values, device, to_device=batch.to_device):
            calls.append(None)
            if len(calls) == call:
                raise RuntimeError("out of memory")
            return to_device(values, device)

        monkeypatch.setattr(batch, "to_device", failing)
        prompts = [(1, 2, 3), (4, 5), (6,) * 6]
        requests = outputs(engine, prompts, [GREEDY] * 3)
        assert len(calls) > call
        for request, prompt in zip(requests, prompts, strict=True):
            assert request.error is None
            assert request.output_token_ids == oracle(prompt, GREEDY, 64)

    def test_blocks_that_could_not_be_copied_are_not_used(self, monkeypatch):
        """The second completion's step needs a copy that fails: it fails, its neighbor and the next one are right."""
        engine = engine_of()
        key = engine.add_request([1, 2, 3, 4, 5], SamplingParams(temperature=0, n=2, max_tokens=6, ignore_eos=True))
        requests = [engine.requests[key], engine.requests[f"{key}/1"]]

        def failing(pairs):
            if pairs:
                raise RuntimeError("out of memory")

        monkeypatch.setattr(engine.runner.cache, "copy", failing)
        run(engine)
        assert_home(engine)
        assert [request.finish_reason for request in requests] == ["length", "error"]
        assert requests[0].output_token_ids == oracle(
            (1, 2, 3, 4, 5), SamplingParams(temperature=0, max_tokens=6, ignore_eos=True), 64
        )
        [after] = outputs(engine, [(3, 4)], [GREEDY])
        assert after.output_token_ids == oracle((3, 4), GREEDY, 64)

    def test_interrupt_leaves_the_engine_usable_after_reset(self):
        engine = engine_of()
        broken = Breaks(engine, 49, KeyboardInterrupt())
        engine.add_request([1, 2, 3], GREEDY)
        request = engine.requests[engine.add_request([49], GREEDY)]
        with pytest.raises(KeyboardInterrupt):
            run(engine)
        engine.reset()
        assert request.finish_reason == "abort"
        assert_home(engine)
        broken.token = -1
        [after] = outputs(engine, [(3, 4)], [GREEDY])
        assert after.output_token_ids == oracle((3, 4), GREEDY, 64)

    def test_abort_twice_and_unknown(self):
        engine = engine_of()
        key = engine.add_request([1], GREEDY)
        assert engine.abort(key)
        assert not engine.abort(key)
        assert not engine.abort("nobody")
        assert_home(engine)
        assert engine.metrics.num_aborted == 1

    @BOTH
    def test_abort_with_a_step_on_its_way(self, async_scheduling):
        engine = engine_of(async_scheduling=async_scheduling)
        keys = [engine.add_request([i, 2], GREEDY) for i in range(3)]
        requests = [engine.requests[k] for k in keys]
        engine.step()
        engine.abort(keys[1])
        run(engine)
        assert_home(engine)
        for i in (0, 2):
            assert requests[i].output_token_ids == oracle((i, 2), GREEDY, 64)

    def test_longer_than_the_pool(self):
        """The cache holds 16 tokens: a prompt of 16 is refused, one of 10 stops when the cache is full."""
        engine = engine_of(num_blocks=4)
        assert engine.max_model_len == 16
        with pytest.raises(ValueError, match=r"prompt_token_ids: expected 1 to 15 tokens.*got 16; shorten it, or give"):
            engine.add_request(list(range(16)), GREEDY)
        [request] = outputs(engine, [tuple(range(10))], [SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)])
        assert (len(request.output_token_ids), request.finish_reason) == (6, "length")

    def test_id_in_use(self):
        engine = engine_of()
        engine.add_request([1], GREEDY, "a")
        with pytest.raises(ValueError, match="request_id: 'a' is in use"):
            engine.add_request([1], GREEDY, "a")
        engine.add_request([1], GREEDY, "b/1")
        with pytest.raises(ValueError, match="request_id: 'b/1' is in use"):  # one of the two that would be made
            engine.add_request([1], SamplingParams(n=2), "b")
        engine.add_request([1], GREEDY, "b")
        assert engine.abort("b")
        assert set(engine.requests) == {"a", "b/1"}  # not "b/1", which only looks like one of its completions

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"block_size": 3}, "block_size"),
            ({"block_size": 0}, "block_size: expected an integer, 1 or more, got 0"),
            ({"max_num_seqs": 0}, "max_num_seqs: expected an integer, 1 or more, got 0"),
            ({"max_num_batched_tokens": 0}, "max_num_batched_tokens: expected an integer"),
            ({"max_model_len": 65}, r"max_model_len: expected 2 to 64 \(the model's context\), got 65"),
            ({"num_blocks": 0}, "num_blocks: expected an integer, 1 or more, got 0"),
            ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization: expected a share"),
        ],
    )
    def test_bad_arguments(self, options, says):
        with pytest.raises(ValueError, match=says):
            engine_of(**options)

    def test_bad_requests(self):
        engine = engine_of()
        for prompt, params, says in (
            ([], GREEDY, "prompt_token_ids: expected 1 to"),
            ([50], GREEDY, r"prompt_token_ids: expected ids in 0\.\.49"),
            ([1], SamplingParams(stop=["x"]), "stop: expected none, as this engine has no tokenizer"),
        ):
            with pytest.raises(ValueError, match=says):
                engine.add_request(prompt, params)
        assert_home(engine)

    def test_no_room_at_the_start(self, monkeypatch):
        """The message says what was wanted, what fits, and what to lower."""
        from minillm.engine import engine as module

        monkeypatch.setattr(module, "CPU_CACHE_BYTES", 4 * tiny_model().config.kv_bytes_per_token("float32") * 3)
        with pytest.raises(MemoryError, match=r"64\) tokens takes 16 blocks of 4, and 3 fit; lower max_model_len"):
            Engine(tiny_model(), block_size=4, max_model_len=64)
        assert Engine(tiny_model(), block_size=4).max_model_len == 12  # nothing was asked for: what fits


class TestEnds:
    @BOTH
    def test_end_token_and_stop_token(self, async_scheduling):
        """With a step on its way when the end shows: its token is dropped."""
        free = oracle((3,), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), 64)
        stop = free[4]
        params = [
            SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=[stop]),
            SamplingParams(temperature=0, max_tokens=12),
        ]
        requests = outputs(engine_of(async_scheduling=async_scheduling), [(3,), (3,)], params)
        for request, p in zip(requests, params, strict=True):
            assert request.output_token_ids == oracle((3,), p, 64)
        assert requests[0].finish_reason == "stop"
        assert requests[0].output_token_ids[-1] == stop

    def test_min_tokens(self):
        free = oracle((3,), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), 64)
        params = SamplingParams(temperature=0, max_tokens=12, min_tokens=7, ignore_eos=True, stop_token_ids=free[:3])
        [request] = outputs(engine_of(), [(3,)], [params])
        assert request.output_token_ids == oracle((3,), params, 64)
        assert len(request.output_token_ids) >= 7


class TestCompletions:
    @BOTH
    @pytest.mark.parametrize("prefix_caching", [False, True])
    def test_n_shares_the_prompt(self, prefix_caching, async_scheduling):
        """Three completions of 9 tokens in blocks of 4: two full blocks are shared, the third is copied on write."""
        engine = engine_of(enable_prefix_caching=prefix_caching, async_scheduling=async_scheduling)
        params = SamplingParams(temperature=1.0, seed=11, n=3, max_tokens=6, ignore_eos=True)
        prompt = tuple(range(9))
        key = engine.add_request(list(prompt), params)
        requests = [engine.requests[name] for name in (key, f"{key}/1", f"{key}/2")]
        shared = 0
        for _ in range(200):
            if not engine.has_unfinished():
                break
            engine.step()
            shared = max(shared, *engine.pool.references)
        assert shared == 3
        assert_home(engine)
        for i, request in enumerate(requests):
            alone = SamplingParams(temperature=1.0, seed=11 + i, max_tokens=6, ignore_eos=True)
            assert request.output_token_ids == oracle(prompt, alone, 64)
        assert requests[1].num_cached == requests[2].num_cached == 8

    def test_abort_drops_all(self):
        engine = engine_of()
        key = engine.add_request([1, 2, 3], SamplingParams(n=3, max_tokens=20, ignore_eos=True))
        engine.step()
        engine.step()
        assert engine.abort(key)
        assert_home(engine)


def test_seed_is_reproducible_whatever_the_batch():
    """Alone, in company, preempted: the same tokens."""
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=12, ignore_eos=True)
    expected = oracle((1, 2, 3), params, 64)
    other = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
    for num_blocks in (40, 8):  # 8: no room for all
        requests = outputs(engine_of(num_blocks=num_blocks), [(4, 5), (1, 2, 3), (6,) * 6], [other, params, other])
        assert requests[1].output_token_ids == expected
    assert sum(r.num_preemptions for r in requests) > 0


@pytest.mark.parametrize("seed", [2**40 + 5, -3, -(2**63), 2**63 - 1])
def test_all_64_bits_of_a_seed_count(seed):
    params = SamplingParams(temperature=1.0, seed=seed, max_tokens=10, ignore_eos=True)
    [request] = outputs(engine_of(), [(1, 2)], [params])
    assert request.output_token_ids == oracle((1, 2), params, 64)


def test_requests_without_a_seed_differ():
    params = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)
    a, b = outputs(engine_of(), [(1,), (1,)], [params, params])
    assert a.output_token_ids != b.output_token_ids


@BOTH
def test_logprobs_are_the_oracles(async_scheduling):
    params = [
        SamplingParams(temperature=0, max_tokens=6, logprobs=3, ignore_eos=True),
        SamplingParams(temperature=0.9, seed=1, top_p=0.8, max_tokens=6, logprobs=0, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=6, ignore_eos=True),
    ]
    requests = outputs(engine_of(async_scheduling=async_scheduling), [(1, 2)] * 3, params)
    for request, p in zip(requests[:2], params, strict=False):
        steps = list(naive(tiny_model(), [1, 2], p))
        assert request.output_token_ids == [int(s) for s in steps]
        for got, step in zip(request.logprobs, steps, strict=True):
            assert list(got) == list(step.logprobs)
            assert list(got.values()) == pytest.approx(list(step.logprobs.values()), abs=1e-5)
    assert requests[2].logprobs is None


class TestPrefixCache:
    def test_a_full_hit_computes_the_last_token_alone(self):
        engine = engine_of(num_blocks=20)
        first, second = (outputs(engine, [tuple(range(9))], [GREEDY])[0] for _ in range(2))
        assert first.output_token_ids == second.output_token_ids
        assert second.num_cached == 8
        assert engine.metrics.hit_rate == 8 / 18

    @BOTH
    def test_the_next_turn_finds_what_was_generated(self, async_scheduling):
        """5 tokens and 12 outputs; the last is never computed. With one more, all 16 that were are found."""
        engine = engine_of(async_scheduling=async_scheduling)
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        [first] = outputs(engine, [(1, 2, 3, 4, 5)], [params])
        [second] = outputs(engine, [(*first.tokens(), 6)], [GREEDY])
        assert second.num_cached == 16
        assert second.output_token_ids == oracle((*first.tokens(), 6), GREEDY, 64)

    def test_off(self):
        engine = engine_of(enable_prefix_caching=False)
        for _ in range(2):
            outputs(engine, [tuple(range(9))], [GREEDY])
        assert engine.metrics.num_cached_tokens == 0


@BOTH
def test_an_end_by_length_wastes_no_step(async_scheduling):
    """It is known before the last token is: that token is computed by nobody. A stop token costs one row of a step."""
    engine = engine_of(async_scheduling=async_scheduling)
    outputs(engine, [(1, 2, 3), (4, 5)], [GREEDY, GREEDY])
    assert engine.metrics.num_scheduled_tokens == 3 + 2 + 2 * (8 - 1)
    free = oracle((3,), GREEDY, 64)
    stop = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, stop_token_ids=[free[3]])
    engine.metrics.reset()
    [request] = outputs(engine, [(3,)], [stop])
    assert engine.metrics.num_scheduled_tokens == len(request.output_token_ids) + async_scheduling


def test_the_longest_context_goes_first(monkeypatch):
    """In every step, whatever the order of arrival: what of attention starts last should be short."""
    engine, seen = engine_of(), []
    plan = engine.table.plan
    monkeypatch.setattr(
        engine.table,
        "plan",
        lambda scheduled: (seen.append([r.num_computed for r, _ in scheduled]), plan(scheduled))[1],
    )
    outputs(engine, [(1,), (2,) * 9, (3,) * 4, (4,) * 20], [GREEDY] * 4)
    assert max(map(len, seen)) == 4
    assert seen[1] == [20, 9, 4, 1]
    assert all(lengths == sorted(lengths, reverse=True) for lengths in seen)


def test_priority_goes_first():
    engine = engine_of(max_num_seqs=1)
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    later = engine.requests[engine.add_request([1], params, priority=1)]
    sooner = engine.requests[engine.add_request([2], params, priority=0)]
    run(engine)
    assert sooner.first_token_time < later.first_token_time


class TestMetrics:
    def test_histogram(self):
        h = Histogram((1.0, 2.0, 4.0))
        for value, times in ((0.5, 2), (1.5, 1), (3.0, 1), (9.0, 1)):
            h.observe(value, times)
        assert h.counts == [2, 1, 1, 1]
        assert (h.count, h.sum) == (5, 14.5)
        assert h.quantile(0.4) == 1.0
        assert h.quantile(0.5) == 1.5  # half of the way through its bucket
        assert Histogram().quantile(0.5) == 0.0
        assert h.lines("x") == [
            'x_bucket{le="1.0"} 2', 'x_bucket{le="2.0"} 3', 'x_bucket{le="4.0"} 4', 'x_bucket{le="+Inf"} 5',
            "x_sum 14.5", "x_count 5",
        ]  # fmt: skip

    def test_quantiles_are_near_the_true_ones(self):
        values = torch.rand(5000, generator=torch.Generator().manual_seed(0)).mul(3).exp().mul(1e-3)
        h = Histogram()
        for value in values.tolist():
            h.observe(value)
        for q in (0.5, 0.9, 0.99):
            assert h.quantile(q) == pytest.approx(float(values.quantile(q)), rel=0.25)

    @BOTH
    def test_times_are_those_of_the_clock(self, async_scheduling, monkeypatch):
        """A clock that goes on by a second whenever somebody looks: sums are differences of what requests remember."""
        clock = itertools.count(1000.0)
        monkeypatch.setattr("time.perf_counter", lambda: next(clock))
        engine = engine_of(max_num_seqs=2, async_scheduling=async_scheduling)
        requests = outputs(engine, [(1, 2, 3), (4,), (5, 6)], [GREEDY] * 3)
        m = engine.metrics
        first = [r.first_token_time - r.arrival_time for r in requests]
        queue = [r.admission_time - r.arrival_time for r in requests]
        assert min(queue) > 0
        assert all(q < f for q, f in zip(queue, first, strict=True))
        between = [r.last_token_time - r.first_token_time for r in requests]
        assert min(between) >= GREEDY.max_tokens - 1
        for histogram, expected, count in (
            (m.time_to_first_token, first, 3), (m.queue_time, queue, 3), (m.inter_token_latency, between, 3 * 7),
            (m.prefill_time, [f - q for f, q in zip(first, queue, strict=True)], 3),
        ):  # fmt: skip
            assert (histogram.sum, histogram.count) == (sum(expected), count)
        assert m.request_latency.count == 3
        assert m.request_latency.sum > sum(first) + sum(between)  # until its end was noted: a look or more later
        assert m.request_latency.sum < sum(first) + sum(between) + 3 * 20

    def test_prometheus_text_is_read_back(self):
        engine = engine_of()
        outputs(engine, [(1, 2, 3), (4,)], [GREEDY, GREEDY])
        values = {}
        for line in engine.metrics.prometheus().splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                assert name not in values
                values[name] = float(value)
        assert values["minillm_generated_tokens_total"] == 16
        assert values["minillm_finished_total"] == 2
        assert values['minillm_time_to_first_token_seconds_bucket{le="+Inf"}'] == 2
        assert values["minillm_inter_token_latency_seconds_count"] == 14
        assert values["minillm_requests_running"] == values["minillm_cache_usage"] == 0
        assert all(math.isfinite(v) for v in values.values())

    def test_reset(self):
        metrics = EngineMetrics(num_steps=4)
        metrics.time_to_first_token.observe(1.0)
        metrics.reset()
        assert metrics.num_steps == metrics.time_to_first_token.count == 0
