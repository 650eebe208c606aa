"""The length of drafts: the best by the model, measured without being paid for, and never a loss worth the name."""

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest

from minillm.config import SpeculativeConfig, StepCosts
from minillm.engine.draft_length import FORGOTTEN, GAIN, Acceptance, Speculation, best_lengths, best_width, seconds
from minillm.engine.engine import Engine
from minillm.sampling import SamplingParams

from .conftest import Guessing, assert_home, oracle, run, tiny_model

# A device whose step takes 1 until 100 tokens, and then as much longer as it has more; checking costs a tenth more.
FLAT = StepCosts(((1, 1.0), (100, 1.0), (200, 2.0)), ((9, 1.1), (100, 1.1), (200, 2.2)))
# One on which each token costs.
STEEP = StepCosts(((1, 1.0), (2, 1.5)), ((9, 5.0), (18, 9.5)))
COSTS = pytest.mark.parametrize("costs", [FLAT, STEEP], ids=["flat", "steep"])


def test_costs_lie_on_straight_lines():
    assert [seconds(((1, 1.0), (11, 2.0)), n) for n in (0, 1, 6, 11, 21)] == pytest.approx([1, 1, 1.5, 2, 3])
    assert seconds(((10, 4.0),), np.array([5, 10, 20])) == pytest.approx([4, 4, 8])
    assert seconds(((1, 3.0), (2, 1.0)), 10) == 1  # measured so by chance: more tokens are never for less
    with pytest.raises(ValueError, match="plain: expected .tokens, seconds. pairs, tokens ascending"):
        StepCosts(((2, 1.0), (1, 1.0)), ((1, 1.0),))


def goodput(chances, lengths, others, costs):
    tokens = len(chances) + others
    gain = sum(sum(row[:n]) for row, n in zip(chances, lengths, strict=True))
    return (len(chances) + gain) / seconds(costs.checked if sum(lengths) else costs.plain, tokens + sum(lengths))


@COSTS
def test_the_lengths_are_the_best_of_all(costs):
    rng = random.Random(0)
    guessed = 0
    for _ in range(300):
        chances = [
            list(itertools.accumulate([rng.random() ** 0.3 for _ in range(rng.randint(0, 4))], lambda a, b: a * b))
            for _ in range(rng.randint(1, 3))
        ]
        others = rng.choice([0, 0, 90, 150])
        lengths = best_lengths(chances, others, 1000, costs)
        found = goodput(chances, lengths, others, costs)
        best = max(
            goodput(chances, every, others, costs)
            for every in itertools.product(*(range(len(row) + 1) for row in chances))
        )
        plain = goodput(chances, [0] * len(chances), others, costs)
        assert found == pytest.approx(best) or (sum(lengths) == 0 and best <= GAIN * plain)
        guessed += sum(lengths) > 0
    assert guessed > 30


def test_a_budget_is_kept():
    chances = [[0.9] * 8] * 4
    assert sum(best_lengths(chances, 0, 10, FLAT)) == 6
    assert sum(best_lengths(chances, 10, 10, FLAT)) == 0


# A device of graphs: for 1, 4 and 16 sequences; a graph costs the same whatever it holds.
PADDED = StepCosts(
    ((1, 1.0), (4, 1.0), (16, 1.1)), ((5, 1.4), (20, 1.6), (80, 4.0)),
    ((2, ((1, 1.1), (4, 1.2), (16, 1.5))), (5, ((1, 1.4), (4, 1.6), (16, 4.0)))),
)  # fmt: skip


def test_a_width_is_chosen_by_the_graph_that_would_run():
    sure, half, never = [0.9, 0.8, 0.7, 0.6], [0.5, 0.25, 0.1, 0.0], [0.0] * 4
    assert best_width([sure], 100, PADDED) == 5  # (1 + 3) / 1.4 against 1.9 / 1.1 and 1
    assert best_width([half], 100, PADDED) == 2  # 1.5 / 1.1 against 1.85 / 1.4
    assert best_width([never], 100, PADDED) == 1
    assert best_width([half] * 4, 100, PADDED) == 2
    assert best_width([half] * 5, 100, PADDED) == 1  # the graph of 16: 7.5 / 1.5 against 5 / 1.0
    assert best_width([sure] * 16, 100, PADDED) == 2  # 30.4 / 1.5 against 64 / 4
    assert best_width([sure] * 16, 31, PADDED) == 1  # the budget
    assert best_width([sure] * 17, 1000, PADDED) == 1  # no graph has room
    assert best_width([[], sure], 100, PADDED) == 5  # one that may have none
    with pytest.raises(ValueError, match="padded: expected .tokens, seconds. pairs"):
        StepCosts(((1, 1.0),), ((1, 1.0),), ((2, ()),))


class Graphs:
    """Requests as `Simulation`'s, on a device of graphs, with guesses that cannot be watched."""

    def __init__(self, batch, chance, rates):
        self.inner = Simulation(PADDED, batch, chance)
        self.inner.speculation = Speculation(SpeculativeConfig(num_speculative_tokens=4), PADDED, 8192, rates)

    def gain(self, steps=400):
        """As `Simulation.gain`."""
        s, costs = self.inner, dict(PADDED.padded)
        plain, spent = seconds(PADDED.plain, len(s.requests)), 0.0
        while spent < steps * plain:
            for r in s.requests:
                r.num_output = len(r.output_token_ids)
            s.speculation.choose(SimpleNamespace(running=s.requests, waiting=[]))
            most = max(r.drafts for r in s.requests)
            width = next((w for w in costs if w > most), 5) if most else 1
            spent += plain if width == 1 else next(t for n, t in costs[width] if n >= len(s.requests))
            for r in s.requests:
                count = 1
                while count <= r.drafts and s.hit(r, count - 1):
                    count += 1
                s.speculation.learn(r, r.drafts, [0] * count)
                r.output_token_ids += [0] * count
        return sum(len(r.output_token_ids) for r in s.requests) / len(s.requests) * plain / spent


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("rates", [[0.1] * 4, [0.5] * 4, [0.9] * 4], ids=str)
@pytest.mark.parametrize("chance", [0.0, 0.3, 0.6, 0.9])
def test_a_head_that_is_not_what_its_training_says_does_not_lose(batch, rates, chance):
    """At least 0.96 of plain decoding: what was wrongly promised is tried again now and then."""
    assert Graphs(batch, lambda i, t: chance, rates).gain() >= 0.96


def test_a_head_wins_where_it_can():
    assert Graphs(1, lambda i, t: 0.8, [0.7] * 4).gain() > 1.8
    assert Graphs(4, lambda i, t: 0.8, [0.7] * 4).gain() > 1.5
    late = Graphs(1, lambda i, t: 0.9 if t > 100 else 0.0, [0.8] * 4)  # wrong at first; tried again
    assert late.gain() > 1.5


def test_what_was_seen_is_forgotten_where_nothing_can_be_watched():
    speculation = Speculation(SpeculativeConfig(num_speculative_tokens=2), PADDED, 100, [0.8, 0.6])
    r = Simulation.request(0)
    for _ in range(20):
        speculation.learn(r, 2, [0])
    assert r.acceptance.rates([0.8, 0.6])[0] < 0.1
    for _ in range(8 * FORGOTTEN):
        r.max_tokens = r.num_output  # so that it has no guesses
        speculation.choose(SimpleNamespace(running=[r], waiting=[]))
        speculation.learn(r, 0, [0])
        r.output_token_ids.append(0)
    assert r.acceptance.rates([0.8, 0.6])[0] > 0.7
    assert speculation.all.rates([0.8, 0.6])[0] > 0.7


def test_acceptance_follows_what_was_seen():
    seen, prior = Acceptance.of(3), [0.0, 0.5, 0.5]
    assert seen.survival(prior) == [0, 0, 0]
    for _ in range(100):
        seen.learn(3, 2)
    assert seen.survival(prior) == pytest.approx([1, 1, 0], abs=0.15)
    for _ in range(100):
        seen.learn(1, 0)  # tells nothing of the second guess
    assert seen.rates(prior) == pytest.approx([0, 1, 0], abs=0.15)


# ---- a simulation: what the choices cost, by the model that they are made by ----------------------------------------


class Simulation:
    """Requests whose next tokens are guessed rightly with known chances, decoded with the lengths that are chosen.

    chance(i, t): of each guess of request i for its token t, given those before.
    """

    def __init__(self, costs, batch, chance, seed=0):
        self.rng, self.costs, self.chance = random.Random(seed), costs, chance
        self.speculation = Speculation(SpeculativeConfig(num_speculative_tokens=8), costs, 8192)
        self.requests = [self.request(i) for i in range(batch)]

    @staticmethod
    def request(i):
        r = SimpleNamespace(
            name=i, output_token_ids=[], allowed=None, params=SimpleNamespace(min_tokens=0), max_tokens=10**6,
            num_output=0, num_tokens=1, num_computed=0, acceptance=None, drafts=0, is_full=False,
        )  # fmt: skip
        r.tokens = lambda: [0, 0, 0, 0]  # so that a guess is 0, and a token 0 is one that was guessed rightly
        return r

    def hit(self, r, ahead=0):
        return self.rng.random() < self.chance(r.name, len(r.output_token_ids) + ahead)

    def gain(self, steps=250):
        """Decode for as long as so many plain steps take -> tokens a second over those of plain decoding."""
        plain, spent = seconds(self.costs.plain, len(self.requests)), 0.0
        while spent < steps * plain:
            for r in self.requests:
                r.num_output = len(r.output_token_ids)
            self.speculation.choose(SimpleNamespace(running=self.requests, waiting=[]))
            drafts = [r.drafts for r in self.requests]
            spent += seconds(self.costs.checked if any(drafts) else self.costs.plain, len(self.requests) + sum(drafts))
            for r in self.requests:
                count = 1
                while count <= r.drafts and self.hit(r, count - 1):
                    count += 1
                given = [0] * (count - 1) + [0 if not r.drafts and self.hit(r) else 1]
                self.speculation.learn(r, r.drafts, given)
                r.output_token_ids += given
        return sum(len(r.output_token_ids) for r in self.requests) / len(self.requests) * plain / spent


CHANCES = {
    "never": lambda i, t: 0.0,
    "seldom": lambda i, t: 0.1,
    "sometimes": lambda i, t: 0.35,
    "half": lambda i, t: 0.5,
    "some requests": lambda i, t: 0.95 if i % 4 == 0 else 0.05,
    "phases": lambda i, t: 0.95 if t // 50 % 2 else 0.05,
    "bursts": lambda i, t: 0.9 if t % 11 < 5 else 0.0,
}


@COSTS
@pytest.mark.parametrize("batch", [1, 4, 32, 256])
@pytest.mark.parametrize("name", CHANCES)
def test_speculation_never_loses(costs, batch, name):
    """At least 0.98 of plain decoding's tokens a second."""
    assert Simulation(costs, batch, CHANCES[name]).gain() >= 0.98


def test_speculation_wins_where_it_can():
    assert Simulation(FLAT, 1, lambda i, t: 0.95).gain() > 4
    assert Simulation(FLAT, 32, CHANCES["some requests"]).gain() > 1.5
    many = Simulation(FLAT, 256, CHANCES["never"])  # where each token costs, nothing is guessed; but all are watched
    assert many.gain() == pytest.approx(1)
    assert all(r.drafts == 0 and r.acceptance.tried[0] > 0 for r in many.requests)


# ---- in the engine -------------------------------------------------------------------------------------------------

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_an_engine_begins_to_guess_where_guesses_would_have_been_right(async_scheduling):
    """One text is the same token again and again: noticed while nothing is guessed, and then used. Others beside it."""
    costs = StepCosts(((1, 1.0), (100, 1.0)), ((1, 1.4), (100, 1.4)))
    config = SpeculativeConfig(num_speculative_tokens=4, step_costs=costs)
    engine = Engine(tiny_model(), num_blocks=60, block_size=4, async_scheduling=async_scheduling, speculative=config)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logit_bias={5: 100.0})
    [same] = engine.add([1, 2, 3], params)
    [other] = engine.add([4, 5, 6, 7], SamplingParams(temperature=0.9, seed=1, max_tokens=40, ignore_eos=True))
    first, steps = None, 0
    while not same.finished:
        engine.step()
        steps += 1
        first = steps if first is None and engine.metrics.num_drafts else first
    assert first is not None
    assert first > 2  # nothing is guessed before something was seen
    assert steps < 20
    run(engine)
    assert_home(engine)
    assert same.output_token_ids == [5] * 40
    assert other.output_token_ids == oracle((4, 5, 6, 7), other.params, 64)
    assert same.acceptance.right[0] > 0.8 * same.acceptance.tried[0]
    assert other.acceptance.right[0] < 0.2 * other.acceptance.tried[0]
    assert engine.metrics.num_accepted_tokens > 20
    engine.speculation.costs = STEEP  # where it does not pay, nothing is guessed, whatever the text is
    before = engine.metrics.num_drafts
    engine.add([1, 2, 3], params)
    run(engine)
    assert engine.metrics.num_drafts == before


@pytest.mark.parametrize("budget", [3, 64])
def test_an_engine_measures_its_steps(budget):
    """Before the first request; and it leaves nothing behind."""
    engine = Guessing(
        tiny_model(), num_blocks=60, block_size=4, max_num_seqs=6, max_num_batched_tokens=budget,
        speculative=SpeculativeConfig(num_speculative_tokens=4),
    )  # fmt: skip
    costs = engine.speculation.costs
    assert [n for n, _ in costs.plain] == ([1] if budget == 3 else [1, 4])
    assert [n for n, _ in costs.checked] == ([3] if budget == 3 else [5, 20])
    assert not engine.runner.table.matrix.any()
    [request] = engine.add([1, 2, 3], GREEDY)
    run(engine)
    assert request.output_token_ids == oracle((1, 2, 3), GREEDY, 64)
