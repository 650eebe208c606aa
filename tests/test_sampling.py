"""Sampling against transformers' logits processors, brute force, and what the definitions say (hypothesis)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minillm.sampling import (
    SamplingParams,
    apply_repetition_penalty,
    apply_temperature,
    distribution,
    draw,
    greedy,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    sample,
)

EXAMPLES = 300
INFINITY = float("inf")
rows = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40).map(torch.tensor)
# Few values, so that ties are the rule.
tied_rows = st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 3.0]), min_size=1, max_size=12).map(torch.tensor)
# Differences that fp32 keeps when the largest is subtracted.
coarse_rows = st.lists(st.integers(-2000, 2000), min_size=1, max_size=40).map(lambda row: torch.tensor(row) / 64)
shares = st.floats(0.01, 1.0)


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kept(logits: torch.Tensor) -> list:
    return (logits > -INFINITY).tolist()


# ---- each step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda x: keep_top_k(x, 1), TopKLogitsWarper(1)),
        (lambda x: keep_top_k(x, 40), TopKLogitsWarper(40)),
        (lambda x: keep_top_k(x, 10**6), TopKLogitsWarper(10**6)),
        (lambda x: keep_top_p(x, 0.9), TopPLogitsWarper(0.9)),
        (lambda x: keep_top_p(x, 0.01), TopPLogitsWarper(0.01)),
        (lambda x: keep_top_p(x, 0.999), TopPLogitsWarper(0.999)),
        (lambda x: keep_min_p(x, 0.05), MinPLogitsWarper(0.05)),
        (lambda x: keep_min_p(x, 0.7), MinPLogitsWarper(0.7)),
        (lambda x: keep_min_p(x, 1.0), MinPLogitsWarper(1.0)),
        (lambda x: keep_min_p(x, 0.0), MinPLogitsWarper(0.0)),
    ],
)
def test_filters_as_transformers(ours, theirs):
    logits = random_logits(16, 500)
    before = logits.clone()
    torch.testing.assert_close(ours(logits), theirs(None, logits), rtol=0, atol=0)
    assert torch.equal(logits, before), "the caller's logits changed"
    torch.testing.assert_close(ours(logits[3]), theirs(None, logits[3:4])[0], rtol=0, atol=0)  # one row without a batch


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature_as_transformers(temperature):
    logits = random_logits(4, 500)
    expected = TemperatureLogitsWarper(temperature)(None, logits).softmax(-1)
    torch.testing.assert_close(apply_temperature(logits, temperature).softmax(-1), expected)


@pytest.mark.parametrize("penalty", [0.8, 1.0, 1.3])
def test_repetition_penalty_as_transformers(penalty):
    logits = random_logits(3, 50)
    previous = torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(1))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(previous, logits)
    torch.testing.assert_close(apply_repetition_penalty(logits, penalty, previous.tolist()), expected)
    torch.testing.assert_close(apply_repetition_penalty(logits[1], penalty, previous[1]), expected[1])


def test_repetition_penalty_of_rows_of_different_lengths():
    logits = torch.tensor([[2.0, -2.0, 1.0], [2.0, -2.0, 1.0], [2.0, -2.0, 1.0]])
    expected = [[1.0, -4.0, 1.0], [2.0, -2.0, 1.0], [2.0, -2.0, 0.5]]
    assert apply_repetition_penalty(logits, 2.0, [[0, 1, 1, 0], [], [2]]).tolist() == expected
    with pytest.raises(ValueError):
        apply_repetition_penalty(logits, 2.0, [[0], [1]])


@settings(max_examples=EXAMPLES)
@given(rows | tied_rows, shares)
def test_top_p_keeps_the_smallest_set(logits, p):
    probabilities = logits.double().softmax(-1)
    chosen = (keep_top_p(logits, p) > -INFINITY).tolist()
    inside = sorted((x.item() for x, k in zip(probabilities, chosen, strict=True) if k), reverse=True)
    outside = [x.item() for x, k in zip(probabilities, chosen, strict=True) if not k]
    assert sum(inside) >= p - 1e-6
    assert sum(inside[:-1]) < p + 1e-6, "one token fewer would do"
    assert not outside or max(outside) <= inside[-1] * (1 + 1e-6), "a likelier token was refused"


@settings(max_examples=EXAMPLES)
@given(tied_rows, st.integers(1, 14))
def test_top_k_keeps_ties(logits, k):
    limit = sorted(logits.tolist(), reverse=True)[min(k, len(logits)) - 1]
    assert kept(keep_top_k(logits, k)) == [x >= limit for x in logits.tolist()]


@settings(max_examples=EXAMPLES)
@given(rows, st.floats(0, 1))
def test_min_p_keeps_what_is_near_the_best(logits, min_p):
    ratio = (logits.double() - logits.double().max()).exp()
    for share, k in zip(ratio.tolist(), kept(keep_min_p(logits, min_p)), strict=True):
        assert k == (share >= min_p) or math.isclose(share, min_p, rel_tol=1e-5)


def test_ties_at_the_border_of_top_p_go_to_the_smallest_ids():
    assert kept(keep_top_p(torch.zeros(10), 0.25)) == [True] * 3 + [False] * 7
    assert kept(keep_top_p(torch.log(torch.tensor([0.25, 0.5, 0.25])), 0.5)) == [False, True, False]
    assert kept(keep_top_p(torch.tensor([1.0, 2.0, 2.0]), 0.0)) == [False, True, False], "one stays whatever p is"


@pytest.mark.parametrize(
    "keep", [lambda x: keep_top_p(x, 1.0), lambda x: keep_top_k(x, 0), lambda x: keep_top_k(x, -1)]
)
def test_off_keeps_all(keep):
    """Even the least likely of many: the sum of their fp32 probabilities reaches 1 long before."""
    logits = torch.cat([torch.tensor([20.0]), torch.full((50_000,), -20.0)])
    assert torch.equal(keep(logits), logits)


def test_off_for_one_row_keeps_all_of_it():
    logits = torch.cat([torch.tensor([20.0]), torch.full((50_000,), -20.0)]).expand(2, -1)
    kept_of_both = keep_top_p(logits, torch.tensor([1.0, 0.9])) > -INFINITY
    assert kept_of_both.sum(-1).tolist() == [50_001, 1]
    assert (keep_top_k(logits, torch.tensor([-1, 1])) > -INFINITY).sum(-1).tolist() == [50_001, 1]
    assert (keep_min_p(logits, torch.tensor([0.0, 0.5])) > -INFINITY).sum(-1).tolist() == [50_001, 1]


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature: expected a number above 0"):
        apply_temperature(torch.zeros(3), temperature)


# ---- all steps together --------------------------------------------------------------------------------------------

OPTIONS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-9, 0.01, 0.5, 1.0, 3.0, 100.0]),
    top_p=st.sampled_from([0.001, 0.3, 0.9, 1.0]),
    top_k=st.sampled_from([-1, 0, 1, 3, 50]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
    repetition_penalty=st.sampled_from([0.5, 1, 1.0, 1.5]),
)


@settings(max_examples=EXAMPLES)
@given(coarse_rows | tied_rows, OPTIONS)
def test_a_distribution_sums_to_one_and_keeps_the_best(logits, params):
    previous = list(range(0, len(logits), 2))
    got = distribution(logits, params, previous)
    assert got.shape == logits.shape
    assert got.dtype == torch.float32
    assert abs(got.double().sum().item() - 1) < 1e-5
    penalized = logits
    if params.repetition_penalty != 1:
        penalized = apply_repetition_penalty(logits, params.repetition_penalty, previous)
    assert got[penalized.argmax()] == got.max() > 0
    # No filter reorders: of two tokens the likelier one is never left with less, unless it lost a tie.
    order = penalized.argsort(descending=True, stable=True)
    assert (got[order].diff() <= 1e-6).all()


@settings(max_examples=EXAMPLES)
@given(rows)
def test_temperature_to_zero_is_greedy(logits):
    for temperature in (0.0, 1e-38, 1e-9, 9e-6):
        got = distribution(logits, SamplingParams(temperature=temperature))
        assert got.tolist() == [float(i == logits.argmax()) for i in range(len(logits))]
        assert sample(logits, SamplingParams(temperature=temperature)) == greedy(logits) == logits.argmax()


def test_a_penalty_changes_greedy_too():
    logits = torch.tensor([2.0, 1.5, -1.0])
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    assert sample(logits, params, [0]) == 1
    assert sample(logits.expand(2, -1), params, [[0], [1]]).tolist() == [1, 0]
    assert distribution(logits, params, [0]).tolist() == [0.0, 1.0, 0.0]


def test_greedy_takes_one_of_two_equals():
    """A temperature that only divides would leave 1/2 each."""
    assert distribution(torch.tensor([1.0, 1.0]), SamplingParams(temperature=9e-6)).tolist() == [1.0, 0.0]


def test_small_temperature_does_not_overflow():
    assert apply_temperature(torch.tensor([1000.0, 999.0]), 1e-37).softmax(-1).tolist() == [1.0, 0.0]
    got = distribution(torch.tensor([1000.0, 999.0, -1e30]), SamplingParams(temperature=1e-5))
    assert got.tolist() == [1.0, 0.0, 0.0]


def test_order_of_the_steps():
    """Penalty, temperature, min-p, top-k, top-p, as in vLLM; each of these results depends on it."""
    logits = torch.log(torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]))

    def ids(**options) -> list[int]:
        return distribution(logits, SamplingParams(**options), [0]).nonzero().flatten().tolist()

    assert ids(top_p=0.8) == [0, 1, 2]
    assert ids(top_p=0.8, temperature=3.0) == [0, 1, 2, 3]  # temperature before top-p
    assert ids(min_p=0.35) == [0, 1]
    assert ids(min_p=0.35, temperature=3.0) == [0, 1, 2, 3, 4]  # ... and before min-p
    assert ids(top_p=0.8, min_p=0.25) == [0, 1]  # min-p first: of .59, .24 and .18 two are enough
    assert ids(top_p=0.75, min_p=0.35) == [0, 1]  # min-p first: of .714 and .286 both are needed
    assert ids(top_p=0.7, min_p=0.35) == [0]  # min-p first: .714 alone is enough, where top-p first would keep two
    assert ids(top_k=2, top_p=0.7) == [0]  # top-k first, for the same reason
    assert ids(repetition_penalty=10.0, top_k=1) == [1]  # the penalty first


def test_order_differs_from_transformers_in_min_p():
    """transformers puts min-p after top-p: what the module's docstring claims."""
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    model = AutoModelForCausalLM.from_config(config)
    options = GenerationConfig(do_sample=True, temperature=0.7, top_k=5, top_p=0.7, min_p=0.35)
    processors = model._get_logits_processor(generation_config=options)
    names = [type(p).__name__ for p in processors]
    assert names == ["TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper"]


def test_a_batch_is_its_rows():
    """One SamplingParams a row, greedy ones among them, gives what each row gives alone."""
    logits = random_logits(6, 200, seed=3)
    params = [
        SamplingParams(temperature=0),
        SamplingParams(top_p=0.5),
        SamplingParams(top_k=3, temperature=0.7),
        SamplingParams(min_p=0.1, repetition_penalty=1.2),
        SamplingParams(top_k=-1, top_p=1.0),
        SamplingParams(top_k=1000, temperature=2),
    ]
    previous = [[1], [2, 3], [], [5, 5, 6], [], [7]]
    together = distribution(logits, params, previous)
    for row, p, ids, got in zip(logits, params, previous, together, strict=True):
        torch.testing.assert_close(got, distribution(row, p, ids))
    same = distribution(logits, params[1])
    torch.testing.assert_close(same, torch.stack([distribution(row, params[1]) for row in logits]))


def test_half_precision_logits():
    logits = random_logits(2, 100).bfloat16()
    for params in (SamplingParams(top_p=0.9), SamplingParams(top_k=5, min_p=0.01, temperature=0.5)):
        torch.testing.assert_close(distribution(logits, params), distribution(logits.float(), params))


# ---- drawing -------------------------------------------------------------------------------------------------------


def test_frequencies_are_the_probabilities():
    """Chi-square over 20,000 draws: 9 degrees of freedom exceed 27.9 once in a thousand; the seed is fixed."""
    logits = random_logits(10, seed=4)
    params = SamplingParams(temperature=1.5)
    expected = 20_000 * distribution(logits, params).numpy()
    tokens = sample(logits.expand(20_000, -1), params, generator=torch.Generator().manual_seed(0))
    counts = np.bincount(tokens.numpy(), minlength=10)
    assert ((counts - expected) ** 2 / expected).sum() < 27.9


def test_never_draws_what_was_refused():
    logits = random_logits(5000, 50, seed=5)
    for params in (SamplingParams(top_k=3), SamplingParams(top_p=0.3), SamplingParams(min_p=0.5)):
        tokens = sample(logits, params, generator=torch.Generator().manual_seed(1))
        assert (distribution(logits, params).gather(1, tokens[:, None]) > 0).all()


def test_a_time_of_zero_does_not_draw_a_refused_token(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, generator=None: self.zero_())
    assert draw(torch.tensor([0.0, 0.0, 1.0])).item() == 2


def test_seeds():
    logits = random_logits(1000, 100, seed=6)
    params = SamplingParams(seed=7)

    def tokens(seed: int) -> torch.Tensor:
        return sample(logits, params, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(tokens(7), tokens(7))
    assert not torch.equal(tokens(7), tokens(8))


def test_one_generator_a_row_makes_rows_independent_of_the_batch():
    logits = random_logits(4, 100, seed=8)
    params = SamplingParams(temperature=2.0)

    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = sample(logits, params, generator=generators(1, 2, 3, 4))
    assert together[2] == sample(logits[2:3], params, generator=generators(3))[0]
    assert together.shape == (4,)


def test_shapes():
    assert sample(torch.zeros(5), SamplingParams()).shape == ()
    assert sample(torch.zeros(2, 5), SamplingParams()).shape == (2,)
    assert sample(torch.zeros(2, 5), SamplingParams(temperature=0)).dtype == torch.int64


# ---- SamplingParams ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values", "error"),
    [
        ("temperature", [-0.1, float("nan"), INFINITY], ValueError),
        ("temperature", ["1", None, True], TypeError),
        ("top_p", [0, -0.5, 1.01, float("nan")], ValueError),
        ("top_p", ["0.9", None], TypeError),
        ("top_k", [-2], ValueError),
        ("top_k", [1.5, None, float("nan")], TypeError),
        ("min_p", [-0.1, 1.5, float("nan")], ValueError),
        ("repetition_penalty", [0, -1, float("nan"), INFINITY], ValueError),
        ("seed", [2**63], ValueError),
        ("seed", [1.0, "a"], TypeError),
        ("max_tokens", [0, -1], ValueError),
        ("max_tokens", [None, 1.5, True], TypeError),
        ("min_tokens", [-1, 17], ValueError),
        ("logprobs", [-1], ValueError),
        ("logprobs", [True], TypeError),
        ("ignore_eos", [1, None], TypeError),
        ("stop", ["", [""], [1]], ValueError),
        ("stop", [5], TypeError),
        ("stop_token_ids", [[-1], ["a"], [True]], ValueError),
        ("stop_token_ids", [7, "7"], TypeError),
    ],
)
def test_bad_values_name_the_argument(name, values, error):
    for value in values:
        with pytest.raises(error, match=f"^{name}: expected .*, got "):
            SamplingParams(**{name: value})


def test_good_values():
    params = SamplingParams(0, 1, -1, stop="\n", stop_token_ids=[3, 4], max_tokens=5, min_tokens=5, seed=-1, logprobs=0)
    assert (params.stop, params.stop_token_ids) == (("\n",), (3, 4))
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=None, stop_token_ids=None).stop == SamplingParams().stop_token_ids == ()
    assert hash(params) == hash(
        SamplingParams(0, 1, -1, stop=["\n"], stop_token_ids=(3, 4), max_tokens=5, min_tokens=5, seed=-1, logprobs=0)
    )
    with pytest.raises(AttributeError):
        params.seed = 3


def test_defaults_are_vllms():
    """The values that vLLM's documentation gives; nothing changes under a user who comes from there."""
    defaults = SamplingParams()
    assert (defaults.temperature, defaults.top_p, defaults.top_k, defaults.min_p) == (1.0, 1.0, 0, 0.0)
    assert (defaults.repetition_penalty, defaults.max_tokens, defaults.min_tokens, defaults.seed) == (1.0, 16, 0, None)
