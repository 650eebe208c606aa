"""Masks of one bit a token, against numpy's own reading of them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm.constrained import packed
from minillm.kernels import KERNELS, mask_logits

from .conftest import GPU

OP = KERNELS["mask_logits"]


def case(device, dtype, rows, size, seed, wider):
    """logits, rows, which, masks; and what logits must become"""
    draw = np.random.default_rng(seed)
    kept = torch.randn(rows, size + wider, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    logits = kept[:, :size]  # of a wider matrix: the last one's neighbors must stay
    chosen = draw.permutation(rows)[: draw.integers(rows + 1)]
    allowed = draw.random((3, size)) < draw.choice([0.02, 0.5, 0.98])
    which = draw.integers(0, 3, len(chosen))
    expected = kept.clone()
    for row, mask in zip(chosen, which, strict=True):
        expected[row, :size][torch.from_numpy(~allowed[mask]).to(device)] = -torch.inf
    masks = np.stack([packed(mask) for mask in allowed])
    return kept, (logits, *(torch.from_numpy(x).to(device) for x in (chosen, which, masks))), expected


@given(st.integers(1, 5), st.integers(1, 9000), st.integers(0, 99), st.sampled_from([0, 40]))
def masked(device, dtype, rows, size, seed, wider):
    for run in (mask_logits, OP.torch):
        whole, args, expected = case(device, dtype, rows, size, seed, wider)
        run(*args)
        assert torch.equal(whole, expected)


def test_kernel_and_torch(device, dtype, triton):
    masked(device, dtype)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_large_vocabulary(triton):
    whole, args, expected = case(torch.device("cuda"), torch.bfloat16, 200, 151_936, 0, 0)
    mask_logits(*args)
    assert torch.equal(whole, expected)


LOGITS, ROWS, MASKS = torch.zeros(2, 70), torch.tensor([0]), torch.zeros(1, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((LOGITS[0], ROWS, ROWS, MASKS), r"logits: expected \[rows, vocabulary\]"),
        ((LOGITS, ROWS.int(), ROWS, MASKS), "rows: expected"),
        ((LOGITS, ROWS, torch.tensor([0, 0]), MASKS), r"which: expected \[1\]"),
        ((LOGITS, ROWS, ROWS, MASKS[:, :2]), r"masks: expected \[1, 3\] of torch.int32"),
        ((LOGITS, ROWS, ROWS, MASKS.long()), "masks: expected"),
    ],
)
def test_bad_input_is_named(args, says):
    with pytest.raises(ValueError, match=says):
        mask_logits(*args)
