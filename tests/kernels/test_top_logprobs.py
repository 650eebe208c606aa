"""The likeliest tokens and their log probabilities, against a sorted row in fp64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm.kernels import KERNELS, top_logprobs, use

OP = KERNELS["top_logprobs"]


@given(st.integers(1, 3), st.integers(1, 5000), st.integers(0, 9), st.booleans(), st.integers(0, 99))
def rows(device, dtype, n, size, count, ties, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, size, generator=generator) * 4
    logits = (logits.round() if ties else logits).to(device, dtype)
    tokens = torch.randint(size, (n,), generator=generator).to(device)
    count = min(count, size)
    ids, best, chosen = top_logprobs(logits, tokens, count)
    expected_ids, expected, expected_chosen = OP.reference(logits, tokens, count)
    torch.testing.assert_close(best, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(chosen, expected_chosen, atol=2e-5, rtol=1e-5)
    assert torch.equal(ids, expected_ids)


def test_kernel(device, dtype, triton):
    rows(device, dtype)


@given(st.integers(1, 300), st.integers(0, 9), st.integers(0, 99))
def test_torch_path(size, count, seed):
    logits = torch.randn(2, size, generator=torch.Generator().manual_seed(seed))
    count, tokens = min(count, size), torch.tensor([0, size - 1])
    for got, want in zip(OP.torch(logits, tokens, count), OP.reference(logits, tokens, count), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_forbidden_tokens_have_no_probability(device, triton):
    logits = torch.tensor([[0.0, float("-inf"), 1.0]], device=device)
    ids, best, chosen = top_logprobs(logits, torch.tensor([1], device=device), 2)
    assert ids.tolist() == [[2, 0]]
    assert best.exp().sum().item() == pytest.approx(1)
    assert chosen.tolist() == [float("-inf")]


def test_many_candidates_are_torchs_work(device):
    logits = torch.randn(2, 200, device=device)
    with use("triton"):
        got = top_logprobs(logits, torch.tensor([3, 4], device=device), 150)
    for a, b in zip(got, OP.torch(logits, torch.tensor([3, 4], device=device), 150), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((torch.zeros(3), torch.zeros(3).long(), 1), "logits: expected"),
        ((torch.zeros(2, 3), torch.zeros(2), 1), r"tokens: expected \[2\] of int64"),
        ((torch.zeros(2, 3), torch.zeros(2).long(), 4), "count: expected 0 to 3"),
    ],
)
def test_bad_input_is_named(args, says):
    with pytest.raises(ValueError, match=says):
        top_logprobs(*args)
