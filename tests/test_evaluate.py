"""Perplexity against brute force over single tokens and transformers' own loss."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm.evaluate import Comparison, Score, choose, compare, perplexity, windows

VOCAB = 11


class Recorder:
    """A model whose logits depend on all tokens that it may see, and that remembers what it was shown."""

    def __init__(self):
        self.table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
        self.seen = []

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        self.seen.append(token_ids[0].tolist())
        return self.table[token_ids].cumsum(1)  # [1, T, V]: every earlier token counts


def brute_force(ids: list[int], window: int, stride: int) -> tuple[float, list[int]]:
    """Sum of -ln p, one forward pass a token: for each token find the first window that predicts it."""
    model, total, contexts = Recorder(), 0.0, []
    for target in range(1, len(ids)):
        begin = 0
        while begin + window < target:  # the window at `begin` predicts begin+1 .. begin+window
            begin += stride
        context = torch.tensor([ids[begin:target]])
        total -= model(context)[0, -1].double().log_softmax(-1)[ids[target]].item()
        contexts.append(target - begin)
    return total, contexts


@given(st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=40), st.integers(1, 12), st.integers(1, 12))
def test_every_token_is_scored_once_with_its_context(ids, window, stride):
    stride = min(stride, window)
    got = perplexity(Recorder(), ids, window, stride)
    expected, contexts = brute_force(ids, window, stride)
    assert got.num_tokens == len(ids) - 1
    assert got.nll == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert all(seen > window - stride or seen == i + 1 for i, seen in enumerate(contexts)), "less context than promised"


def test_one_window_is_transformers_loss(smollm, smollm_reference, hf_tokenizer):
    ids = hf_tokenizer.encode("A list is a mutable sequence. It may hold objects of different types.")
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        loss = smollm_reference(tokens, labels=tokens).loss.item()
    ours = perplexity(lambda x: smollm.logits(smollm(x)), ids)
    assert ours.num_tokens == len(ids) - 1
    assert ours.cross_entropy == pytest.approx(loss, abs=1e-4)
    assert ours.perplexity == pytest.approx(math.exp(loss), rel=1e-4)


def test_windows_shown_to_the_model():
    model = Recorder()
    perplexity(model, list(range(10)), window=4, stride=2)
    assert model.seen == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8]]
    model = Recorder()
    perplexity(model, list(range(9)), window=4)
    assert model.seen == [[0, 1, 2, 3], [4, 5, 6, 7]]  # 8 is predicted by the last window, and nothing is left over


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    score = perplexity(lambda ids: torch.zeros(*ids.shape, VOCAB), [1, 2, 3, 4, 5], window=3, num_bytes=8)
    assert score.perplexity == pytest.approx(VOCAB)
    assert score.bits_per_byte == pytest.approx(4 * math.log2(VOCAB) / 8)


def test_tensors_and_half_precision():
    model = Recorder()
    ids = torch.randint(0, VOCAB, (30,), generator=torch.Generator().manual_seed(1))
    exact = perplexity(model, ids.tolist(), 7, 3)
    assert perplexity(model, ids, 7, 3) == exact
    rounded = perplexity(lambda x: model(x).bfloat16(), ids, 7, 3)
    assert rounded == perplexity(lambda x: model(x).bfloat16().float(), ids, 7, 3), "summed in less than fp32"
    assert rounded.nll == pytest.approx(exact.nll, rel=0.02)


def test_scores_add_up():
    a, b = Score(10.0, 4, 20), Score(2.0, 2, 4)
    assert a + b == Score(12.0, 6, 24)
    assert (a + b).cross_entropy == pytest.approx(2.0)
    assert (a + b).bits_per_byte == pytest.approx(12 / math.log(2) / 24)
    assert (a + Score(1.0, 1)).num_bytes is None
    with pytest.raises(ValueError, match="num_bytes"):
        _ = (a + Score(1.0, 1)).bits_per_byte


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window: expected 1 or more"),
        ({"window": 4, "stride": 5}, "stride: expected 1 to window"),
        ({"stride": 0}, "stride"),
        ({"token_ids": [1]}, "token_ids: expected one text of at least 2"),
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": [[1, 2], [3, 4]]}, "token_ids"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        perplexity(Recorder(), **({"token_ids": [1, 2, 3]} | arguments))


# ---- two models, one text


class Fixed:
    """A model that knows nothing of the past: random logits for each token."""

    def __init__(self, seed: int, noise: float = 1.0):
        self.table = noise * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.table[token_ids]


IDS = torch.randint(0, VOCAB, (7, 13), generator=torch.Generator().manual_seed(2))


def by_hand(reference, model, ids) -> tuple[list[float], ...]:
    """Every position's distributions, one by one, by torch.distributions."""
    nll_a, nll_b, kl, flips = [], [], [], []
    for t in range(len(ids) - 1):
        a, b = (
            torch.distributions.Categorical(logits=m(ids[None, : t + 1])[0, -1].double()) for m in (reference, model)
        )
        nll_a.append(-a.log_prob(ids[t + 1]).item())
        nll_b.append(-b.log_prob(ids[t + 1]).item())
        kl.append(torch.distributions.kl_divergence(a, b).item())
        flips.append(float(a.probs.argmax() != b.probs.argmax()))
    return nll_a, nll_b, kl, flips


def test_compared_position_by_position():
    reference, model = Recorder(), Fixed(1)
    got = compare(reference, {"other": model, "itself": reference}, IDS)
    for i, ids in enumerate(IDS):
        for field, values in zip(vars(got["other"]).values(), by_hand(reference, model, ids), strict=True):
            assert field.dtype == torch.float64
            assert field[i].item() == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert got["other"].perplexity == pytest.approx(math.exp(got["other"].nll.mean()))
    assert got["other"].log_ratio == pytest.approx(
        math.log(got["other"].perplexity / got["other"].reference_perplexity)
    )
    same = got["itself"]
    assert (same.difference, same.log_ratio, same.log_ratio_error, same.kl.max(), same.flips.max()) == (0, 0, 0, 0, 0)


def test_one_window_is_perplexity():
    got = compare(Fixed(0), {"x": Fixed(1)}, IDS[:1])["x"]
    assert got.perplexity == pytest.approx(perplexity(Fixed(1), IDS[0], window=12).perplexity)
    assert math.isnan(got.log_ratio_error)
    assert math.isnan(got.difference_error)


def test_the_paired_error_is_what_resampling_windows_gives():
    generator = torch.Generator().manual_seed(0)
    hard = torch.randn(40, generator=generator).double() + 2.6  # what both models find hard
    worse = 0.02 + 0.01 * torch.randn(40, generator=generator).double()
    got = Comparison(hard, hard + worse, torch.zeros(40), torch.zeros(40))
    drawn = torch.randint(0, 40, (20_000, 40), generator=generator)
    a, b = hard[drawn].mean(1), (hard + worse)[drawn].mean(1)  # [20000]
    assert got.log_ratio_error == pytest.approx((b - a).std().item(), rel=0.05)
    # Perplexities of the resampled texts differ so much that only the first order can be expected, and its scale.
    assert got.difference_error == pytest.approx((b.exp() - a.exp()).std().item(), rel=0.15)
    assert got.perplexity_error == pytest.approx(b.exp().std().item(), rel=0.15)
    assert got.perplexity_error > 20 * got.difference_error


def test_a_token_in_front():
    """The same tokens are scored, each with one more before it."""
    model = Recorder()
    got = compare(model, {"x": Fixed(1)}, IDS, bos=3)["x"]
    assert model.seen == [[3, *row] for row in IDS.tolist()]
    for i, ids in enumerate(IDS):
        nll = by_hand(Recorder(), Fixed(1), torch.tensor([3, *ids]))[0][1:]
        assert got.reference_nll[i].item() == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    assert torch.equal(got.nll, compare(Fixed(0), {"x": Fixed(1)}, IDS)["x"].nll), "other tokens were scored"


def test_a_model_that_rules_tokens_out():
    """p = 0 adds nothing to the divergence; q = 0 where p > 0 makes it infinite."""

    def sure(ids):
        return torch.full((*ids.shape, VOCAB), -torch.inf).scatter(-1, torch.full_like(ids, 4)[..., None], 0.0)

    ids = torch.full((1, 3), 4)
    assert compare(sure, {"x": lambda ids: torch.zeros(*ids.shape, VOCAB)}, ids)["x"].kl.item() == pytest.approx(
        math.log(VOCAB)
    )
    assert compare(Fixed(0), {"x": sure}, ids)["x"].kl.item() == math.inf


def test_windows_are_cut():
    assert windows(list(range(10)), 3, 2).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert "perplexity" in str(compare(Fixed(0), {"x": Fixed(1)}, windows(IDS.flatten(), 9, 5))["x"])
    for arguments in ((range(10), 3, 4), (range(10), 1, 2), (range(10), 3, 0), ([[1, 2]], 2, 1)):
        with pytest.raises(ValueError, match=r"token_ids|window, count"):
            windows(
                torch.tensor(arguments[0]) if isinstance(arguments[0], list) else list(arguments[0]), *arguments[1:]
            )
    for shape in ((3,), (0, 4), (2, 1)):
        with pytest.raises(ValueError, match=r"token_ids: expected \[N, T\]"):
            compare(Fixed(0), {}, torch.zeros(shape, dtype=torch.long))


@given(st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5), min_size=1, max_size=4))
def test_choices(choices):
    """Each alone, without padding."""
    prompt, model = [1, 2, 3], Recorder()
    got = choose(model, prompt, choices)
    for score, choice in zip(got.tolist(), choices, strict=True):
        log_probs = model(torch.tensor([[*prompt, *choice]]))[0].double().log_softmax(-1)
        own = [log_probs[len(prompt) - 1 + i, token].item() for i, token in enumerate(choice)]
        assert score == pytest.approx(sum(own) / len(own), rel=1e-4, abs=1e-5)


def test_a_long_right_answer_beats_a_short_wrong_one(smollm, hf_tokenizer):
    prompt = hf_tokenizer.encode("Question: What is the capital of France?\nAnswer: The capital of France is")
    choices = [hf_tokenizer.encode(text) for text in (" Paris, a city on the river Seine", " Rome", " blue")]
    assert choose(lambda x: smollm.logits(smollm(x)), prompt, choices).argmax() == 0


@pytest.mark.parametrize(("prompt", "choices"), [([], [[1]]), ([1], []), ([1], [[1], []])])
def test_nothing_to_choose(prompt, choices):
    with pytest.raises(ValueError, match="prompt, choices"):
        choose(Recorder(), prompt, choices)
