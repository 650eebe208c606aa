"""Prompts, label scores and intervals: against the model alone, and against what is known of binomials."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm.prompting import Shot, answer_of, calibrated, difference, few_shot, label_scores, pick, share

POOL = [Shot(f"text {i}", " yes" if i % 3 else " no") for i in range(30)]


def test_a_prompt_ends_where_the_label_begins():
    assert few_shot([Shot("a {x}", " no")], "b") == "Input: a {x}\nLabel: no\n\nInput: b\nLabel:"
    assert few_shot([], "b", "{text} ->{label}", instruction="Say.") == "Say.\n\nb ->"
    for wrong in ("{text}", "{label}", "{text} {label}."):
        with pytest.raises(ValueError, match="template: expected"):
            few_shot([], "b", wrong)


@given(st.integers(0, 20), st.integers(0, 99))
def test_examples_are_drawn_once_and_balanced(count, seed):
    shots = pick(POOL, count, seed)
    assert len(set(shots)) == count
    labels = [shot.label for shot in shots]
    assert abs(labels.count(" yes") - labels.count(" no")) <= 1
    assert pick(POOL, count, seed) == shots
    assert len(set(pick(POOL, count, seed, balanced=False))) == count


def test_a_pool_may_be_too_small():
    with pytest.raises(ValueError, match="pool: expected 11 examples with the label ' no', got 10"):
        pick(POOL, 22)
    with pytest.raises(ValueError, match="count: expected"):
        pick([], 2)
    assert len(pick(POOL, 30, balanced=False)) == 30


@pytest.mark.slow
def test_scores_are_the_models(smollm_llm):
    prompts, labels = ["The capital of France is", "2 + 2 ="], [" Paris", " four", " 4", " London, England"]
    scores = label_scores(smollm_llm, prompts, labels)
    tokenizer, model = smollm_llm.tokenizer, smollm_llm.engine.model
    for i, prompt in enumerate(prompts):
        for j, label in enumerate(labels):
            ids, begin = tokenizer.encode(prompt + label), len(tokenizer.encode(prompt))
            with torch.inference_mode():
                logp = model.logits(model(torch.tensor([ids])))[0].log_softmax(-1)
            expected = [float(logp[k - 1, ids[k]]) for k in range(begin, len(ids))]
            assert float(scores[i, j]) == pytest.approx(sum(expected), abs=1e-3)
    assert int(scores[0].argmax()) == 0
    mean = label_scores(smollm_llm, prompts[:1], labels[-1:], mean=True)
    count = len(tokenizer.encode(prompts[0] + labels[-1])) - len(tokenizer.encode(prompts[0]))
    assert float(mean) == pytest.approx(float(scores[0, -1]) / count, abs=1e-4)
    with pytest.raises(ValueError, match="tokens of its own"):
        label_scores(smollm_llm, ["The capital of France is P"], ["aris"])
    with pytest.raises(ValueError, match="labels: expected one or more"):
        label_scores(smollm_llm, ["a"], [])


def test_calibration_takes_out_what_the_prompt_makes_likely():
    """A model that always adds ln 9 to the first label, whatever the text."""
    text = torch.tensor([[0.6, 0.4], [0.3, 0.7], [0.5, 0.5]], dtype=torch.float64).log()
    biased, nothing = text + torch.tensor([math.log(9), 0.0]), torch.tensor([math.log(9), 0.0])
    assert biased.argmax(1).tolist() == [0, 0, 0]
    torch.testing.assert_close(calibrated(biased, nothing).exp(), text.exp())
    torch.testing.assert_close(calibrated(biased, torch.stack((nothing, nothing + 3))).exp(), text.exp())


def test_the_last_match_is_the_answer():
    assert answer_of("So 3 + 4 = 7. The answer is 7, no, the answer is 8.", r"answer is (\d+)") == "8"
    assert answer_of("I do not know", r"answer is (\d+)") is None


def test_intervals_hold_what_they_should_as_often_as_they_say():
    draw = torch.Generator().manual_seed(0)
    for p, n in ((0.5, 60), (0.9, 60)):
        held = 0
        for _ in range(300):
            interval = share(torch.rand(n, generator=draw) < p)
            held += interval.low <= p <= interval.high
        assert 0.90 < held / 300 <= 1
    held = 0
    for seed in range(200):
        a = torch.rand(80, generator=draw) < 0.7
        b = a ^ (torch.rand(80, generator=draw) < 0.2)  # the same cases, a fifth the other way round
        found = difference(a, b, draws=500, seed=seed)
        held += found.low <= 0.2 * (2 * 0.7 - 1) <= found.high
    assert held / 200 > 0.88


def test_pairs_are_worth_more_than_two_intervals():
    a = torch.tensor([1.0, 0.0] * 50)
    b = a.clone()
    b[:10:2] = 0  # five cases lost, none won
    found = difference(a, b)
    assert found.mean == pytest.approx(0.05)
    assert found.is_clear
    assert share(a).low < float(b.mean())
    assert not difference(a, a).is_clear
    assert "[" in str(found)


def test_shares_stay_between_0_and_1():
    assert share([True] * 5).high <= 1
    assert min(share([False] * n).low for n in range(1, 60)) == 0
    assert max(share([True] * n).high for n in range(1, 60)) <= 1
    assert share([True] * 5).low == pytest.approx(0.5655, abs=1e-3)
    for wrong in (lambda: share([]), lambda: difference([], []), lambda: difference([1], [1, 2])):
        with pytest.raises(ValueError, match="expected"):
            wrong()
