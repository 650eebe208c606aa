"""Perplexity against brute force over single tokens and transformers' own loss."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm.evaluate import Score, perplexity

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
