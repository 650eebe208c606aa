"""Guesses: what is looked up, which draws are given, and that nobody can tell from the tokens that there were any."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.cache.blocks import chain_hash
from minillm.config import EngineConfig, SpeculativeConfig
from minillm.engine.engine import Engine
from minillm.engine.speculative import count_given, look_up, look_up_one
from minillm.kernels import gumbel_argmax
from minillm.sampling import SamplingParams

from . import test_constraints as constraints
from .conftest import FortuneTeller, Guessing, assert_home, oracle, run, tiny_model

ALL = SpeculativeConfig(num_speculative_tokens=3, adaptive=False)
BOTH = pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, seed=4, max_tokens=16, ignore_eos=True)
FILTERED = SamplingParams(temperature=1.3, seed=7, top_k=9, top_p=0.9, frequency_penalty=0.4, max_tokens=16)


def guessing(*jobs: tuple[list[int], SamplingParams], **options) -> Guessing:
    """An engine that guesses the tokens of these jobs, mostly."""
    engine = Guessing(
        tiny_model(), **{"num_blocks": 60, "block_size": 4, "max_num_seqs": 4, "speculative": ALL, **options}
    )
    engine.runner.futures = [[*prompt, *oracle(tuple(prompt), params, 64)] for prompt, params in jobs]
    return engine


# ---- looking up ----------------------------------------------------------------------------------------------------


def look_up_slowly(tokens: list[int], count: int, most: int, least: int) -> list[int]:
    text = list(tokens)
    for n in range(most, least - 1, -1):
        for place in range(len(tokens) - 1, n - 1, -1):
            if tokens[place - n : place] == tokens[len(tokens) - n :]:
                for j in range(count):
                    text.append(text[place + j])
                return text[len(tokens) :]
    return tokens[-1:] * count


@pytest.mark.parametrize(
    ("tokens", "guesses"),
    [
        ([1, 2, 3, 4, 5, 9, 1, 2, 3], [4, 5, 9, 1]),
        ([7, 2, 3, 4, 1, 2, 3, 5, 8, 9, 1, 2, 3], [5, 8, 9, 1]),  # three that agree go before two
        ([7, 2, 3, 4, 8, 9, 6, 2, 3, 5, 6, 7, 1, 2, 3], [5, 6, 7, 1]),  # of equal ones the latest
        ([5, 1, 2, 1, 2], [1, 2, 1, 2]),  # what followed goes on by itself
        ([1, 2, 3, 4], [4, 4, 4, 4]),  # nothing agrees
        ([6], [6, 6, 6, 6]),
    ],
)
def test_what_is_looked_up(tokens, guesses):
    assert look_up_one(tokens, 4, 3, 2) == guesses
    assert look_up_slowly(tokens, 4, 3, 2) == guesses


# 0 and 256 and their like: bytes of neighbors may look like a token.
TEXTS = st.lists(st.sampled_from([0, 1, 256, 257, 65536]), min_size=1, max_size=24)


@settings(max_examples=300)
@given(st.lists(TEXTS, min_size=1, max_size=4), st.integers(1, 6), st.integers(1, 4), st.integers(0, 3))
def test_all_ways_to_look_up_agree(texts, count, least, more):
    lengths = torch.tensor([len(text) for text in texts], dtype=torch.int32)
    tokens = torch.full((len(texts), 26), 1, dtype=torch.int32)  # behind a text stands what is left from others
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = torch.tensor(text, dtype=torch.int32)
    expected = [look_up_slowly(text, count, least + more, least) for text in texts]
    assert [look_up_one(text, count, least + more, least) for text in texts] == expected
    assert look_up(tokens, lengths, count, least + more, least).tolist() == expected


def test_padding_is_looked_up_without_harm():
    assert look_up(torch.zeros(2, 5, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), 3, 3, 2).shape == (2, 3)


# ---- which draws are given -----------------------------------------------------------------------------------------


def test_draws_are_given_up_to_the_first_surprise():
    drawn = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [9, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    guesses = torch.tensor([[1, 2, 3], [1, 0, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]], dtype=torch.int32)
    most = torch.tensor([4, 4, 4, 2, 1], dtype=torch.int32)
    assert count_given(drawn, guesses, most).tolist() == [4, 2, 1, 2, 1]


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    expected = p * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def two_tokens(draws: int, guess: int, redraw: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts [V, V] of the first two tokens of requests of different seeds, with one guess, and what they should be.

    redraw: a wrong rule for comparison, which draws again from all of p where a guess was rejected.
    """
    torch.manual_seed(3)
    size, temperature = 5, torch.full((draws,), 0.7)
    first, second = torch.randn(size), torch.randn(size, size)  # logits; of the second token behind each first one
    p = torch.softmax(first / 0.7, 0)[:, None] * torch.softmax(second / 0.7, 1)
    seeds, place = torch.arange(draws) * 7919, torch.full((draws,), 11)

    def draw(logits, place, seeds=seeds):
        return gumbel_argmax(logits.expand(draws, size).contiguous(), temperature, seeds, place)

    drawn = torch.stack((draw(first, place), draw(second[guess], place + 1)), 1)
    given = count_given(drawn, torch.full((draws, 1), guess), torch.full((draws,), 2))
    a = drawn[:, 0]
    if redraw:
        a = torch.where(given == 2, a, draw(first, place, seeds + 1))
    b = torch.where(given == 2, drawn[:, 1], draw(second[a], place + 1))  # of who got one token: in the next step
    return torch.bincount(a * size + b, minlength=size * size).double(), p.view(-1).double()


@pytest.mark.parametrize("guess", range(5))
def test_the_distribution_is_kept(guess):
    """100,000 draws; 24 degrees of freedom: above 60 in one of 15,000 cases."""
    assert chi_square(*two_tokens(100_000, guess, redraw=False)) < 60
    assert chi_square(*two_tokens(100_000, guess, redraw=True)) > 200


# ---- in the engine -------------------------------------------------------------------------------------------------

JOBS = [([1, 2, 3], GREEDY), ([4, 5], SAMPLED), ([6] * 9, FILTERED), ([1, 2, 3, 4, 9], GREEDY)]


@BOTH
def test_a_penalty_counts_what_is_given_and_nothing_else(async_scheduling):
    """Were guesses counted that were wrong, or not counted that were right, later tokens would differ."""
    hard = [SamplingParams(temperature=t, seed=3, frequency_penalty=0.9, repetition_penalty=1.4, presence_penalty=0.5,
                           max_tokens=40, ignore_eos=True) for t in (0, 0.9)]  # fmt: skip
    jobs = [([1, 2, 3, i], params) for i in range(3) for params in hard]
    engine = guessing(*jobs, async_scheduling=async_scheduling)
    requests = [engine.add(*job)[0] for job in jobs]
    run(engine)
    for request, (prompt, params) in zip(requests, jobs, strict=True):
        assert request.output_token_ids == oracle(tuple(prompt), params, 64)
    assert engine.metrics.num_accepted_tokens > 100


@BOTH
@pytest.mark.parametrize("options", [{}, {"num_blocks": 16}, {"max_num_batched_tokens": 5}], ids=str)
def test_constraints_hold_along_guesses(async_scheduling, options):
    """The same tokens as without guesses, which are often right, and often not in the language."""
    todo = constraints.jobs(most=30)
    plain = constraints.run(constraints.engine(), todo)
    engine = Guessing(
        constraints.model(), tokenizer=constraints.tokenizer(), async_scheduling=async_scheduling, speculative=ALL,
        **{"num_blocks": 80, "max_num_seqs": 6, "block_size": 4, **options},
    )  # fmt: skip
    engine.runner.futures = [r.tokens() for r in plain]
    requests = constraints.run(engine, todo)
    assert [r.error for r in requests] == [None] * len(todo)
    assert [r.output_token_ids for r in requests] == [r.output_token_ids for r in plain]
    assert engine.metrics.num_accepted_tokens > 50
    assert_home(engine)


@BOTH
def test_who_asks_the_host_for_each_token_has_no_guesses(async_scheduling):
    """A caller's mask, and others beside it who have some."""
    asked = []

    def allowed(tokens):
        asked.append(len(tokens))
        return torch.arange(50) % 2 != tokens[-1] % 2

    engine = guessing(*JOBS, async_scheduling=async_scheduling)
    [bound] = engine.add([4, 5, 6], SAMPLED, allowed=allowed)
    free = [engine.add(*job)[0] for job in JOBS]
    run(engine)
    assert asked == list(range(3, 3 + SAMPLED.max_tokens))
    everything = [6, *bound.output_token_ids]
    assert all((a + b) % 2 for a, b in itertools.pairwise(everything))
    for request, (prompt, params) in zip(free, JOBS, strict=True):
        assert request.output_token_ids == oracle(tuple(prompt), params, 64)
    assert engine.metrics.num_accepted_tokens > 10


def test_guesses_take_nobodys_blocks():
    """The first one's guesses would need a block that the other has: it waits with them until that one ends."""
    first, other = [1, 2, 3], [4, 5, 6, 7, 8, 9, 10]
    engine = guessing((first, GREEDY), num_blocks=3)
    params = [replace(GREEDY, max_tokens=6), replace(GREEDY, max_tokens=2)]
    requests = [engine.add(*job)[0] for job in zip((first, other), params, strict=True)]
    run(engine)
    assert engine.metrics.num_preemptions == 0
    assert engine.metrics.num_accepted_tokens
    for request in requests:
        expected = oracle(tuple(request.prompt_token_ids), request.params, 12)
        assert request.output_token_ids == expected


@pytest.mark.gpu
@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_graphs_of_steps_with_guesses(async_scheduling):
    """Prompts that repeat themselves, some at once and one alone; each check is replayed."""
    jobs = [([1, 2, 3] * 3, GREEDY), ([4, 5] * 4, SAMPLED), ([6] * 9, FILTERED), ([1, 2, 3, 4, 9], GREEDY)]
    engine = Engine(
        tiny_model("cuda"), num_blocks=60, block_size=4, max_num_seqs=4, max_num_batched_tokens=64,
        async_scheduling=async_scheduling, speculative=replace(ALL, prompt_lookup_max=2, prompt_lookup_min=1),
    )  # fmt: skip
    assert engine.runner.guess_graphs.keys() == {(n, width) for n in (1, 2, 4) for width in (2, 4)}
    requests = [engine.add(*job)[0] for job in jobs]
    run(engine)
    jobs.append(jobs[0])
    requests.append(engine.add(*jobs[0])[0])
    run(engine)
    assert_home(engine)
    for request, (prompt, params) in zip(requests, jobs, strict=True):
        assert request.output_token_ids == oracle(tuple(prompt), params, 64, "cuda")
    assert engine.metrics.num_drafts
    assert {kind.width for _, kind in engine.runner.draw_graphs} == {1, 2, 4}


# ---- names of blocks -----------------------------------------------------------------------------------------------


def test_no_graph_is_asked_for_log_probabilities_of_a_prompt(monkeypatch):
    """Graphs keep the hidden states of tokens that are drawn alone, those of steps with guesses, too."""
    asked = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2, ignore_eos=True)
    engine, seen = guessing(([7, 1, 7, 1, 7], GREEDY)), []
    shape = engine.runner._shape

    def spying(plan, slots):
        seen.append(plan.width)
        assert plan.prompt_logprobs is None
        return shape(plan, slots)

    monkeypatch.setattr(engine.runner, "_shape", spying)
    engine.add([7, 1, 7, 1, 7], GREEDY)
    engine.step()
    engine.step()
    [request] = engine.add([3, 4], asked)  # as short as a sequence with guesses
    run(engine)
    assert max(seen) > 1
    assert request.error is None
    assert len(request.prompt_logprobs) == 2


def contents(engine: Engine) -> dict[bytes, torch.Tensor]:
    """What each published block holds, by its name."""
    size, cache = engine.pool.block_size, engine.runner.cache
    return {
        name: torch.stack([x[:, block * size : (block + 1) * size] for x in (cache.k, cache.v)])
        for name, block in engine.pool._block_of.items()
    }


def names_of(engine: Engine, tokens: list[int]) -> list[bytes]:
    size, names = engine.pool.block_size, [engine._root("")]
    for start in range(0, len(tokens) // size * size, size):
        names.append(chain_hash(names[-1], tokens[start : start + size]))
    return names[1:]


@BOTH
@pytest.mark.parametrize("end", ["length", "stop", "abort"])
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_a_block_with_a_name_holds_what_the_name_says(async_scheduling, end, block_size):
    """After every step each published block is one of known tokens, and what it holds is what plain decoding stores:
    a guess that was wrong is in no name, and in no block that has one.
    """
    prompt, free = [4, 5], oracle((4, 5), SAMPLED, 64)
    new = [i for i, token in enumerate(free) if token not in free[:i]]
    params = replace(SAMPLED, stop_token_ids=[free[new[-1]]] if end == "stop" else [])
    assert new[-1] > 8
    plain = Engine(tiny_model(), num_blocks=60, block_size=block_size)
    plain.add([*prompt, *free], GREEDY)
    run(plain)
    right = contents(plain)
    engine = guessing((prompt, SAMPLED), async_scheduling=async_scheduling, block_size=block_size)
    [request] = engine.add(prompt, params)
    for step in itertools.count():
        if end == "abort" and step == 4:
            engine.abort(request)
        if not engine.has_unfinished():
            break
        known = set(names_of(engine, request.tokens()))
        engine.step()
        known |= set(names_of(engine, request.tokens()))
        assert set(engine.pool._block_of.values()) <= set(range(60))
        assert set(engine.pool._block_of) <= known
    engine.step()  # and what was on its way when it ended
    assert engine.metrics.num_draft_tokens > engine.metrics.num_accepted_tokens > 0
    found = contents(engine)
    assert len(found) >= (8 if end != "abort" else 2) // block_size
    for name, content in found.items():
        torch.testing.assert_close(content, right[name], atol=1e-4, rtol=1e-4)


@BOTH
def test_the_next_turn_reads_what_speculation_stored(async_scheduling):
    """Prompts out of the cache: what was generated with guesses, and then something else."""
    engine = guessing(*JOBS, async_scheduling=async_scheduling, num_blocks=200)
    for prompt, params in JOBS:
        engine.add(prompt, params)
    run(engine)
    for prompt, params in JOBS:
        output = oracle(tuple(prompt), params, 64)
        for cut in (5, 9, len(output)):
            again = [*prompt, *output[:cut], 8]
            [request] = engine.add(again, GREEDY)
            run(engine)
            assert request.output_token_ids == oracle(tuple(again), GREEDY, 64)
            assert request.num_cached >= (len(prompt) + cut - 2) // 4 * 4
    assert_home(engine)


# ---- faults --------------------------------------------------------------------------------------------------------


@BOTH
def test_a_guess_that_fails_concerns_one_request(async_scheduling, monkeypatch):
    guess = FortuneTeller.guess

    def failing(self, tokens, lengths):
        if any(row[0] == 49 for row in tokens.tolist()):
            raise RuntimeError("guess")
        return guess(self, tokens, lengths)

    monkeypatch.setattr(FortuneTeller, "guess", failing)
    engine = guessing(*JOBS, async_scheduling=async_scheduling)
    requests = [engine.add(*job)[0] for job in JOBS[:3]]
    [bad] = engine.add([49, 1], GREEDY)
    run(engine)
    assert_home(engine)
    assert (bad.finish_reason, str(bad.error)) == ("error", "guess")
    for request, (prompt, params) in zip(requests, JOBS, strict=False):
        assert request.output_token_ids == oracle(tuple(prompt), params, 64)


# ---- settings and counters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "eagle"}, "method: expected 'ngram' or 'draft_head', got 'eagle'"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens: expected an integer, 1 or more, got 0"),
        ({"prompt_lookup_max": True}, "prompt_lookup_max: expected an integer, 1 or more, got True"),
        ({"prompt_lookup_min": 5, "prompt_lookup_max": 4}, "prompt_lookup_min: expected at most prompt_lookup_max"),
        ({"adaptive": 1}, "adaptive: expected True or False, got 1"),
        ({"step_costs": {}}, "step_costs: expected StepCosts or None"),
    ],
)
def test_settings_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        SpeculativeConfig(**fields)


def test_settings():
    assert SpeculativeConfig(prompt_lookup_max=1).least == 1
    assert SpeculativeConfig().least == 2
    with pytest.raises(ValueError, match="speculative: expected a SpeculativeConfig or None, got {}"):
        EngineConfig(speculative={})


def test_counters():
    engine = guessing(([1, 2, 3], GREEDY))
    [request] = engine.add([1, 2, 3], GREEDY)
    run(engine)
    m = engine.metrics
    assert m.num_accepted_tokens == sum(m.num_accepted_tokens_per_pos)
    assert m.num_accepted_tokens_per_pos == sorted(m.num_accepted_tokens_per_pos, reverse=True)
    assert m.num_steps - 2 <= m.num_drafts < m.num_steps  # the prompt has none, and perhaps the last token
    assert m.num_drafts <= m.num_draft_tokens <= 3 * m.num_drafts
    assert m.num_steps + m.num_accepted_tokens == len(request.output_token_ids)
    text = m.prometheus()
    assert f"minillm_accepted_tokens_total {m.num_accepted_tokens}\n" in text
    assert f'minillm_accepted_tokens_per_pos_total{{position="1"}} {m.num_accepted_tokens_per_pos[1]}\n' in text
