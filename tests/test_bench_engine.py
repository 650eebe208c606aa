"""What the engine's benchmark counts: its workload, its floors, its percentiles, its driver. No timing."""

import contextlib
import importlib.util
import math
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.learn.paths import root


@contextlib.contextmanager
def loaded(name):
    """A file of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", root() / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def w():
    with loaded("workloads") as module:
        yield module


@pytest.fixture(scope="module")
def common():
    with loaded("common") as module:
        yield module


def test_the_workload_is_the_one_that_others_were_measured_on(w):
    random.seed(0)
    prompts = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    outputs = [random.randint(100, 1024) for _ in range(256)]
    jobs = w.workload()
    assert [job.prompt for job in jobs] == prompts
    assert [job.max_tokens for job in jobs] == outputs
    assert sum(outputs) == 133_966


@pytest.mark.parametrize(
    ("shape", "parameters", "kv_bytes"),
    [
        ("smollm2", 134_515_008, 2 * 30 * 3 * 64 * 2),
        ("qwen3", 596_049_920, 2 * 28 * 8 * 128 * 2),
        ("llama1b", 1_235_814_400, 2 * 16 * 8 * 64 * 2),
    ],
)
def test_shapes_are_those_of_the_models(w, shape, parameters, kv_bytes):
    """Published parameter counts: SmolLM2-135M, Qwen3-0.6B, Llama-3.2-1B."""
    config = w.SHAPES[shape]
    assert config.num_parameters() == parameters
    assert config.kv_bytes_per_token("bfloat16") == kv_bytes
    assert config.tie_word_embeddings
    assert config.qk_norm == (shape == "qwen3")
    assert type(config).from_dict(config.to_dict()) == config


def test_bytes_of_one_step_by_hand(w):
    # 1,000 bytes of weights; sequences of 10 and 20 cached tokens at 8 bytes: 30 read, 2 written.
    assert w.step_bytes([10, 20], 1000, 8) == 1000 + 8 * 30 + 8 * 2
    assert w.decode_bytes([w.Job([0] * 10, 2), w.Job([0] * 20, 2)], 1000, 8, 256) == (1, 1256)
    assert w.decode_bytes([w.Job([0] * 10, 1)], 1000, 8, 256) == (0, 0)  # the only token comes with the prompt


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8), st.integers(1, 4))
def test_bytes_of_decoding_are_those_of_its_steps(w, lengths, max_num_seqs):
    """Played through step by step: a sequence takes a place until its last token, then the next one has it."""
    waiting = [(prompt, output - 1) for prompt, output in lengths]
    running, steps, moved = [], 0, 0
    while waiting or running:
        while waiting and len(running) < max_num_seqs:
            if waiting[0][1]:
                running.append(waiting.pop(0))
            else:
                waiting.pop(0)  # needs no decode step
        if running:
            moved += w.step_bytes([context for context, _ in running], 1000, 8)
            steps += 1
        running = [(context + 1, left - 1) for context, left in running if left > 1]
    jobs = [w.Job([0] * prompt, output) for prompt, output in lengths]
    assert w.decode_bytes(jobs, 1000, 8, max_num_seqs) == (steps, moved)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30), st.floats(0, 100))
def test_percentiles_are_numpys(w, values, percent):
    assert w.percentile(values, percent) == pytest.approx(np.percentile(values, percent), abs=1e-6)


def test_percentiles_of_nothing(w):
    assert math.isnan(w.percentile([], 50))
    assert w.spread([]) is None


def test_poisson_arrivals(w):
    jobs = w.poisson_jobs(50, 40, (3, 5), (2, 4), seed=0)
    times = [job.at for job in jobs]
    assert times == sorted(times)
    assert times[0] > 0
    assert times[-1] < 40
    assert len(jobs) == pytest.approx(2000, abs=4 * 2000**0.5)
    gaps = np.diff(times)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # exponential: deviation and mean are equal
    assert {len(job.prompt) for job in jobs} == {3, 4, 5}
    assert {job.max_tokens for job in jobs} == {2, 3, 4}
    assert jobs == w.poisson_jobs(50, 40, (3, 5), (2, 4), seed=0)


def test_conversations_share_their_beginning_alone(w):
    system, users = w.messages(count=3, turns=2, system=7, message=4, seed=0)
    assert len(system) == 7
    assert [[len(message) for message in turns] for turns in users] == [[4, 4]] * 3
    assert len({tuple(message) for turns in users for message in turns}) == 6


class FakeEngine:
    """Every step takes a second and gives each request a token; the first one takes two steps."""

    def __init__(self, clock):
        self.clock, self.left, self.aborted = clock, {}, []

    def add_request(self, prompt, params):
        key = f"request {len(prompt)}"
        self.left[key] = [params, 1]
        return key

    def has_unfinished(self):
        return bool(self.left)

    def abort(self, key):
        self.aborted.append(key)
        del self.left[key]

    def step(self):
        self.clock.now += 1
        outputs = []
        for key, (left, delay) in list(self.left.items()):
            if delay:
                self.left[key] = [left, 0]
                continue
            self.left[key][0] -= 1
            outputs.append(SimpleNamespace(request_id=key, new_token_ids=[5], finished=left == 1))
            if left == 1:
                del self.left[key]
        return outputs


def play(w, jobs, limit=100.0):
    clock = SimpleNamespace(now=50.0)  # a clock that does not start at 0
    engine = FakeEngine(clock)

    def sleep(seconds):
        assert seconds > 0
        clock.now += seconds

    return engine, w.serve(engine, jobs, lambda job: job.max_tokens, limit, lambda: clock.now, sleep)


def test_requests_arrive_at_their_time_and_not_before(w):
    _, (a, b, c) = play(w, [w.Job([0], 3, 0.5), w.Job([0] * 2, 2, 2.0), w.Job([0] * 3, 1, 20.0)])
    assert a.times == pytest.approx([2.5, 3.5, 4.5], abs=0.01)
    # Comes while a step runs, from 1.5 to 2.5; added after it, first token at the end of the second step from there.
    assert b.times == pytest.approx([4.5, 5.5], abs=0.01)
    assert b.ttft == pytest.approx(2.5, abs=0.01)  # from its arrival, the wait for the step included
    assert c.times == pytest.approx([22.0], abs=0.01)
    assert all(one.finished for one in (a, b, c))
    assert a.gaps == pytest.approx([1, 1])
    assert a.per_token == pytest.approx(1)
    assert c.per_token == 0


def test_the_limit_aborts_what_runs(w):
    engine, served = play(w, [w.Job([0], 3, 0.0), w.Job([0] * 2, 50, 0.0), w.Job([0] * 3, 1, 60.0)], limit=10.0)
    assert engine.aborted == ["request 2"]
    assert [one.finished for one in served] == [True, False]  # the third never came
    assert not engine.has_unfinished()


def test_summary_counts_what_was_in_time(w):
    quick = w.Served(w.Job([0], 3, 1.0), [1.1, 1.2, 1.3], 3, True)
    late = w.Served(w.Job([0], 2, 1.0), [3.0, 3.1], 2, True)  # TTFT 2
    slow = w.Served(w.Job([0], 2, 1.0), [1.1, 5.1], 2, True)  # 4 s a token
    cut = w.Served(w.Job([0], 9, 4.0), [], 0, False)
    got = w.summary([quick, late, slow, cut], seconds=10.0, ttft_limit=0.5, token_limit=1.0)
    assert (got["requests"], got["finished"]) == (4, 3)
    assert got["goodput, requests/s"] == pytest.approx(0.1)
    shorter = w.summary([quick, late, slow, cut], seconds=4.0, ttft_limit=0.5, token_limit=1.0)
    assert shorter["goodput, requests/s"] == pytest.approx(1 / 5.1)  # until the last token
    assert got["within both limits"] == 0.25
    assert got["TTFT, s"]["p50"] == pytest.approx(0.1)
    assert got["ITL, s"]["p99"] == pytest.approx(4 - 0.03 * 3.9)
    assert got["output tokens/s"] == pytest.approx(7 / 5.1)


def test_idle_time_by_hand(w):
    # Step one: kernels 0-2, 3-5, its tokens go to the host 5.5-6. Between: a copy 6-6.5, a kernel that moves what was
    # copied 7-7.5, a copy 8-8.5. Step two: kernels 9-10, 10-12, 13-14, tokens to the host 14-15.
    kernels = [w.Span(a, b) for a, b in ((0, 2), (3, 5), (7, 7.5), (9, 10), (10, 12), (13, 14))]
    copies = [w.Span(6, 6.5, kernel=False), w.Span(8, 8.5, kernel=False)]
    tokens = [w.Span(5.5, 6, kernel=False, to_host=True), w.Span(14, 15, kernel=False, to_host=True)]
    got = w.idle([*copies, *tokens, *kernels], steps=2)
    assert got["between steps"] == pytest.approx(2 / 15)  # 5-5.5, 6.5-7, 7.5-8, 8.5-9
    assert got["inside steps"] == pytest.approx(2 / 15)  # 2-3 and 12-13
    assert got["idle"] == pytest.approx(4 / 15)
    assert (got["busy"], got["whole"], got["kernels a step"]) == (11, 15, 3)


def test_overlapping_kernels_count_once(w):
    got = w.idle([w.Span(0, 6), w.Span(1, 3), w.Span(8, 10), w.Span(9, 10, False, True)], steps=1)
    assert got["idle"] == pytest.approx(0.2)
    assert got["between steps"] == 0


def test_steps_that_cannot_be_told_apart(w):
    got = w.idle([w.Span(0, 1), w.Span(2, 3), w.Span(4, 5)], steps=2)
    assert got["idle"] == pytest.approx(0.4)
    assert got["between steps"] is None
    assert got["inside steps"] is None


def test_parts_run_one_by_one_are_kept_side_by_side(common, tmp_path, monkeypatch):
    """Two calls with $OUT: the second once overwrote what the first had measured for five minutes."""
    monkeypatch.setenv("OUT", str(tmp_path))
    parts = {name: lambda bench, save, name=name: save({"of": name}) for name in ("first", "second", "third")}
    for wanted in ("first", "second"):
        common.run_parts("chapter_of_nobody", parts, [wanted], None, True)
    assert common.recorded("chapter_of_nobody") == {"first": {"of": "first"}, "second": {"of": "second"}}
    common.run_parts("chapter_of_nobody", parts, ["third"], None, False)
    assert "third" not in common.recorded("chapter_of_nobody")


def test_unknown_parts_are_named(common, monkeypatch):
    monkeypatch.setattr("sys.argv", ["chapter", "--small"])
    assert common.parts_asked({"a": 0, "b": 0}, left_out=("a",)) == ["b"]
    monkeypatch.setattr("sys.argv", ["chapter", "c"])
    with pytest.raises(SystemExit, match="expected some of a, b, got c"):
        common.parts_asked({"a": 0, "b": 0})
