"""Attention through block tables, against the reference and against attention to keys that lie in a row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.kernels import KERNELS, flash_attention, paged_attention, use

from .conftest import GPU, TOLERANCE, error

EXAMPLES = settings(max_examples=80 if GPU else 12)
HEADS = [(4, 4), (9, 3), (8, 1), (6, 2)]


def batch(device, dtype, counts, contexts, heads, kv_heads, size, block_size, seed=0):
    """Arguments of paged_attention for sequences of `contexts` tokens, of which the last `counts` are queries."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    widths = [-(-context // block_size) for context in contexts]
    order = torch.randperm(sum(widths) + 2, generator=generator).to(torch.int32)
    tables = torch.full((len(counts), max([*widths, 1]) + 1), 2**30, dtype=torch.int32)  # beyond the end: nonsense
    for row, blocks in zip(tables, order[2:].split(widths) if widths else (), strict=False):
        row[: len(blocks)] = blocks
    caches = randn(2, len(order) * block_size, kv_heads, size)
    caches[:, torch.cat([torch.arange(block_size) + b * block_size for b in order[:2].tolist()])] = torch.nan
    bounds = torch.tensor([0, *counts]).cumsum(0).to(device, torch.int32)
    lengths = torch.tensor(contexts, dtype=torch.int32, device=device)
    q = randn(sum(counts), (heads + 2) * size)[:, : heads * size].unflatten(-1, (heads, size))
    return q, *caches, tables.to(device), lengths, bounds, max([*counts, 0]), block_size


def sequences(decode):
    count = st.just(1) if decode else st.integers(0, 20)
    pair = st.tuples(count, st.integers(0, 90)).map(lambda p: (p[0], p[0] + p[1]))
    return st.lists(pair, max_size=4)


@EXAMPLES
@given(sequences(False) | sequences(True), st.sampled_from(HEADS), st.sampled_from([16, 24, 64, 128]),
       st.sampled_from([1, 4, 16, 32, 256]), st.integers(0, 99))  # fmt: skip
def drawn(device, dtype, pairs, heads, size, block_size, seed):
    counts, contexts = [p[0] for p in pairs], [p[1] for p in pairs]
    args = batch(device, dtype, counts, contexts, *heads, size, block_size, seed)
    with use("triton"):
        got = paged_attention(*args)
    expected = KERNELS["paged_attention"].reference(*args)
    assert error(got, expected) < TOLERANCE[dtype]
    with use("torch"):
        assert error(paged_attention(*args), expected) < TOLERANCE[dtype]


def test_against_reference(device, dtype):
    drawn(device, dtype)


@pytest.mark.parametrize("contexts", [[1], [700], [513, 1, 0, 64]])
def test_split_context(device, dtype, contexts):
    """Few sequences: programs share a context, and a second kernel joins them. A context of 0 gives 0."""
    args = batch(device, dtype, [1] * len(contexts), contexts, 8, 2, 64, 16)
    with use("triton"):
        got = paged_attention(*args)
    assert error(got, KERNELS["paged_attention"].reference(*args)) < TOLERANCE[dtype]
    assert not got[[c == 0 for c in contexts]].any()


def test_whole_prompts_equal_flash_attention(device, dtype):
    counts = [5, 33, 1]
    q, k_cache, v_cache, tables, lengths, bounds, longest, block_size = batch(
        device, dtype, counts, counts, 6, 2, 32, 8
    )
    slots = torch.cat([
        tables[i, torch.arange(n) // 8].long() * 8 + torch.arange(n, device=device) % 8 for i, n in enumerate(counts)
    ])  # fmt: skip
    expected = flash_attention(q.contiguous(), k_cache[slots], v_cache[slots], bounds, bounds, longest)
    for path in ("triton", "torch"):
        with use(path):
            got = paged_attention(q, k_cache, v_cache, tables, lengths, bounds, longest, block_size)
        assert error(got, expected) < 2 * TOLERANCE[dtype]


BAD = {
    "block_size": (7, 12, ValueError, "power of 2"),
    "context_lens": (4, torch.zeros(2), ValueError, "int32"),
    "block_tables": (3, torch.zeros(3, 4, dtype=torch.int32), ValueError, "length 2"),
    "cu_seqlens_q": (5, torch.zeros(2, dtype=torch.int32), ValueError, "length 3"),
    "k_cache": (1, torch.zeros(64, 5, 16), ValueError, "heads that divide"),
    "v_cache": (2, torch.zeros(64, 2, 8), ValueError, "expected"),
    "q": (0, torch.zeros(3, 16), ValueError, "tokens, heads, D"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_argument(name):
    args = list(batch(torch.device("cpu"), torch.float32, [1, 2], [9, 5], 4, 2, 16, 8))
    at, value, error_type, says = BAD[name]
    args[at] = value
    with pytest.raises(error_type, match=rf"{name}.*{says}"):
        paged_attention(*args)
