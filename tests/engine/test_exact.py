"""Whatever the schedule, a request gives what the oracle gives alone: tokens, text, log probabilities. Every block
comes home, and the counters add up.
"""

import dataclasses
from collections import defaultdict
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minillm.config import SpeculativeConfig
from minillm.engine.engine import Engine
from minillm.engine.request import Request
from minillm.sampling import SamplingParams

from .conftest import VOCAB, Guessing, Letters, assert_home, oracle_tokens, prompt_oracle, text_oracle, tiny_model
from .heads import head_path

# ---- what is drawn -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrival:
    """A request: when it comes, when it is aborted (so many steps later), and what it asks for.

    stops: where in the text that it would give stop strings are cut out, (first character, how many) each.
    stop_at: which of the tokens that it would give is made a stop token.
    """

    prompt: tuple[int, ...]
    at: int = 0
    abort: int | None = None
    priority: int = 0
    salt: str = ""
    n: int = 1
    kind: str = "greedy"
    max_tokens: int = 8
    min_tokens: int = 0
    ignore_eos: bool = False
    stops: tuple[tuple[int, int], ...] = ()
    stop_at: int | None = None
    bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True)
class Settings:
    """An engine."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    budget: int
    prefix_caching: bool
    async_scheduling: bool
    kind: str = "plain"
    speculative: SpeculativeConfig | None = None


SAMPLING = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.8, "seed": 5},
    "filtered": {"temperature": 1.2, "seed": 6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3,
                 "presence_penalty": 0.2, "frequency_penalty": 0.1},
    "min_p": {"temperature": 1.5, "seed": 7, "min_p": 0.05},
    "penalized": {"temperature": 0, "repetition_penalty": 1.2, "frequency_penalty": -0.3},
}  # fmt: skip
# Few different beginnings, so that prefixes are shared; and the same prompt more than once.
BEGINNINGS = [(), (1, 2, 3, 4), (1, 2, 3, 4, 5, 6, 7, 8, 9)]
PROMPTS = st.builds(
    lambda a, b: (*a, *b), st.sampled_from(BEGINNINGS), st.lists(st.integers(0, 3), min_size=1, max_size=9)
)
BIASES = st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([float("-inf"), -4.0, 3.0, 9.0]), max_size=3)


def mostly(value, *others: st.SearchStrategy) -> st.SearchStrategy:
    """`value` in half of all draws, so that most requests want few things."""
    return st.sampled_from([True, False]).flatmap(lambda plain: st.just(value) if plain else st.one_of(*others))


ARRIVALS = st.lists(
    st.builds(
        Arrival, PROMPTS, st.integers(0, 6), mostly(None, st.integers(1, 8)), st.integers(0, 2),
        mostly("", st.sampled_from(["a", "b"])), st.sampled_from([1, 1, 1, 2, 3]),
        mostly("greedy", st.sampled_from(sorted(SAMPLING))), st.integers(1, 12), mostly(0, st.integers(0, 12)),
        st.booleans(), mostly((), st.lists(st.tuples(st.integers(0, 14), st.integers(1, 6)), max_size=3).map(tuple)),
        mostly(None, st.integers(0, 8)), mostly((), BIASES.map(lambda bias: tuple(bias.items()))),
        mostly(None, st.integers(0, 3)), mostly(None, st.integers(0, 3)),
    ),
    min_size=1, max_size=6,
)  # fmt: skip
ENGINES = st.builds(
    Settings, st.integers(6, 20), st.sampled_from([1, 2, 4, 8]), st.integers(1, 5), st.integers(1, 30), st.booleans(),
    st.booleans(), st.sampled_from(["plain", "windows"]),
    st.one_of(st.none(), st.builds(SpeculativeConfig, st.just("ngram"), st.integers(1, 5), st.integers(2, 3),
                                   st.integers(1, 2), st.just(False))),
)  # fmt: skip

# ---- playing -------------------------------------------------------------------------------------------------------


@dataclass
class Started:
    """A request (one of n), the parameters of its oracle, and what `step` said about it."""

    request: Request
    prompt: tuple[int, ...]
    params: SamplingParams
    stop: tuple[str, ...]
    pieces: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)


class Player:
    """Plays arrivals on an engine, and knows what each request must give."""

    def __init__(self, engine: Engine, arrivals: list[Arrival], device: str = "cpu", kind: str = "plain") -> None:
        self.engine, self.todo, self.device, self.kind = engine, list(arrivals), device, kind
        self.started: dict[Request, Started] = {}

    def play(self) -> list[Started]:
        """Requests arrive, some are aborted, until all is done."""
        engine, aborts = self.engine, defaultdict(list)
        for step in range(3000):
            for arrival in [a for a in self.todo if a.at <= step]:
                self.todo.remove(arrival)
                key = self.add(arrival)
                if key is not None and arrival.abort is not None:
                    aborts[step + arrival.abort].append(key)
            for key in aborts[step]:
                engine.abort(key)
                assert not engine.abort(key)
            assert engine.pool.num_used <= engine.pool.num_blocks
            assert len(engine.scheduler.running) <= engine.scheduler.max_num_seqs
            for request in engine.step():
                self.started[request].pieces += request.new_text
                self.started[request].tokens += request.new_token_ids
            if not self.todo and not engine.has_unfinished():
                return list(self.started.values())
        raise AssertionError("hangs")

    def add(self, a: Arrival) -> str | None:
        """Add a request -> its id; note what each of its completions must give."""
        params = SamplingParams(
            max_tokens=a.max_tokens, min_tokens=min(a.min_tokens, a.max_tokens), ignore_eos=a.ignore_eos,
            logit_bias=dict(a.bias), logprobs=a.logprobs, **SAMPLING[a.kind],
        )  # fmt: skip
        if len(a.prompt) >= self.engine.max_model_len:
            with pytest.raises(ValueError, match="prompt_token_ids: expected 1 to"):
                self.engine.add_request(list(a.prompt), params)
            return None
        free = self.free(a.prompt, self.alone(params, 0))
        if a.stop_at is not None and free:
            params = dataclasses.replace(params, stop_token_ids=[int(free[a.stop_at % len(free)])])
            free = self.free(a.prompt, self.alone(params, 0))
        _, text, _ = text_oracle(free, (), 0)
        stop = tuple(text[at : at + length] for at, length in a.stops if text[at : at + length])
        if self.engine.tokenizer is None:
            stop = ()
        asked = dataclasses.replace(params, n=a.n, stop=stop, prompt_logprobs=a.prompt_logprobs)
        made = self.engine.add(list(a.prompt), asked, priority=a.priority, cache_salt=a.salt)
        for i, request in enumerate(made):
            self.started[request] = Started(request, a.prompt, self.alone(params, i), stop)
        return made[0].request_id

    def alone(self, params: SamplingParams, i: int) -> SamplingParams:
        """What the i-th completion is for the oracle, which knows no tokenizer: its end token becomes a stop token."""
        ends = set() if params.ignore_eos or self.engine.tokenizer is None else {Letters.eos_token_id}
        seed = None if params.seed is None else params.seed + i
        return dataclasses.replace(params, seed=seed, stop_token_ids=sorted(ends | set(params.stop_token_ids)))

    def free(self, prompt: tuple[int, ...], params: SamplingParams) -> list:
        """What the oracle gives, stop strings aside."""
        return oracle_tokens(prompt, params, self.engine.max_model_len, self.device, self.kind)

    def check(self, s: Started) -> None:
        """A request is over: it has given what the oracle gives, or, aborted, a beginning of it."""
        request, tokens, was_aborted = s.request, self.free(s.prompt, s.params), s.request.finish_reason == "abort"
        assert request.error is None
        count, text, stopped = text_oracle(tokens, s.stop, s.params.min_tokens)
        if was_aborted:
            assert len(request.output_token_ids) <= count
            count, text, _ = text_oracle(tokens[: len(request.output_token_ids)], s.stop, s.params.min_tokens)
        else:
            ended = stopped or (count == len(tokens) and tokens[-1].is_end)
            assert request.finish_reason == ("stop" if ended else "length")
            assert s.tokens == request.output_token_ids
            assert s.pieces == request.text
        assert request.output_token_ids == tokens[:count]
        if self.engine.tokenizer is not None:
            assert request.text == text
        self.check_logprobs(s, tokens[:count], was_aborted)

    def check_logprobs(self, s: Started, tokens: list, was_aborted: bool) -> None:
        request = s.request
        if s.params.logprobs is None:
            assert request.logprobs is None
        else:
            assert_same_logprobs(request.logprobs, [token.logprobs for token in tokens])
        if request.params.prompt_logprobs is None:
            assert request.prompt_logprobs is None
            return
        expected = prompt_oracle(s.prompt, request.params.prompt_logprobs, self.device, self.kind)
        got = request.prompt_logprobs
        assert len(got) == len(expected)
        assert got[0] is None
        known = [i for i in range(1, len(got)) if got[i] is not None]
        assert was_aborted or len(known) == len(got) - 1
        assert_same_logprobs([got[i] for i in known], [expected[i] for i in known])


def assert_same_logprobs(got: list[dict], expected: list[dict]) -> None:
    assert [list(one) for one in got] == [list(one) for one in expected]
    for one, other in zip(got, expected, strict=True):
        assert list(one.values()) == pytest.approx(list(other.values()), abs=1e-3)


def assert_counted(engine: Engine, started: list[Started]) -> None:
    m, requests = engine.metrics, [s.request for s in started]
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


@pytest.fixture
def one_thread():
    """Of tensors this small, threads only slow each other down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def schedule_is_exact(device: str, arrivals: list, e, told: bool = False) -> Engine:
    engine = (Guessing if told else Engine)(
        tiny_model(device, e.kind), num_blocks=e.num_blocks, block_size=e.block_size, max_num_seqs=e.max_num_seqs,
        max_num_batched_tokens=e.budget, enable_prefix_caching=e.prefix_caching, async_scheduling=e.async_scheduling,
        enforce_eager=True, tokenizer=Letters(), speculative=e.speculative,
    )  # fmt: skip
    player = Player(engine, arrivals, device, e.kind)
    if told:
        engine.runner.futures = [
            (*a.prompt, *player.free(a.prompt, SamplingParams(max_tokens=a.max_tokens, **SAMPLING[a.kind])))
            for a in arrivals if len(a.prompt) < engine.max_model_len
        ]  # fmt: skip
    started = player.play()
    for one in started:
        player.check(one)
    assert_home(engine)
    assert_counted(engine, started)
    return engine


@pytest.mark.usefixtures("one_thread")
@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(ARRIVALS, ENGINES)
def test_schedules(arrivals, e):
    schedule_is_exact("cpu", arrivals, e)


@pytest.mark.usefixtures("one_thread")
@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(ARRIVALS, ENGINES, st.integers(1, 5))
def test_schedules_with_guesses_that_are_often_right(arrivals, e, count):
    guesses = SpeculativeConfig(num_speculative_tokens=count, adaptive=False)
    schedule_is_exact("cpu", arrivals, dataclasses.replace(e, speculative=guesses), told=True)


@pytest.mark.usefixtures("one_thread")
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(ARRIVALS, ENGINES, st.integers(1, 5))
def test_schedules_with_a_draft_head(arrivals, e, count):
    guesses = SpeculativeConfig("draft_head", count, adaptive=False, path=head_path(e.kind))
    schedule_is_exact("cpu", arrivals, dataclasses.replace(e, speculative=guesses))


@pytest.mark.gpu
@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(ARRIVALS, ENGINES)
def test_schedules_on_a_gpu(arrivals, e):
    """Fewer, as every kernel is launched from Python: seconds each."""
    schedule_is_exact("cuda", arrivals, e)


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
    player = Player(engine, [Arrival(p, at, priority=rank, max_tokens=length) for p, length, at, rank in arrivals])
    started = player.play()
    assert engine.metrics.num_preemptions
    for one in started:
        player.check(one)
