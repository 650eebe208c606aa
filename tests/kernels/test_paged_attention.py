"""Attention through block tables, against the reference and against attention to keys that lie in a row."""

import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.kernels import KERNELS, AttentionPlan, flash_attention, paged_attention, use

from .conftest import GPU, TOLERANCE, error

EXAMPLES = settings(max_examples=30 if GPU else 8)
CPU = torch.device("cpu")
HEADS = [(4, 4), (9, 3), (8, 1), (6, 2)]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """torch.empty hands out NaN: what a path does not write, or reads too early, shows."""
    empty = torch.empty

    def poison(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poison)


def batch(
    device, dtype, counts, contexts, heads, kv_heads, size, block_size, seed=0, *,
    cache_dtype=None, padding=0, window=0, in_a_row=False,
):  # fmt: skip
    """Arguments of paged_attention for sequences of `contexts` tokens, of which the last `counts` are queries.

    Whatever must not be looked at is nonsense: tables beyond a sequence's end and before its window, two blocks of NaN
    (and those of the window), `padding` rows of q that belong to nobody.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    widths = [-(-context // block_size) for context in contexts]
    order = torch.randperm(sum(widths) + 2, generator=generator).to(torch.int32)
    order = order.sort().values if in_a_row else order
    tables = torch.full((len(counts), max([*widths, 1]) + 1), 2**30, dtype=torch.int32)  # beyond the end: nonsense
    caches = randn(2, len(order) * block_size, kv_heads, size).to(cache_dtype or dtype)
    by_block = caches.unflatten(1, (-1, block_size))
    by_block[:, order[:2].tolist()] = torch.nan
    rows = zip(tables, order[2:].split(widths) if widths else (), counts, contexts, strict=False)
    for row, blocks, count, context in rows:
        row[: len(blocks)] = blocks
        oldest = max(0, context - count - window + 1) // block_size if window and count else 0
        by_block[:, blocks[:oldest].tolist()] = torch.nan
        row[:oldest] = 2**30
    bounds = torch.tensor([0, *counts]).cumsum(0).to(device, torch.int32)
    lengths = torch.tensor(contexts, dtype=torch.int32, device=device)
    q = randn(sum(counts) + padding, (heads + 2) * size)[:, : heads * size].unflatten(-1, (heads, size))
    q[sum(counts) :] = torch.nan
    return q, *caches, tables.to(device), lengths, bounds, max([*counts, 0]), block_size, None, window


def sequences(decode):
    count = st.integers(0, 1) if decode else st.integers(0, 20)
    pair = st.tuples(count, st.integers(0, 90)).map(lambda p: (p[0], p[0] + p[1]))
    return st.lists(pair, max_size=4)


@EXAMPLES
@given(sequences(False) | sequences(True), st.sampled_from(HEADS), st.sampled_from([16, 24, 64, 128]),
       st.sampled_from([1, 4, 16, 32, 256]), st.integers(0, 20), st.sampled_from([0, 0, 1, 7, 33, 200]),
       st.booleans(), st.integers(0, 99))  # fmt: skip
def drawn(device, dtype, pairs, heads, size, block_size, padding, window, in_a_row, seed):
    counts, contexts = [p[0] for p in pairs], [p[1] for p in pairs]
    args = batch(
        device, dtype, counts, contexts, *heads, size, block_size, seed, padding=padding, window=window,
        in_a_row=in_a_row,
    )  # fmt: skip
    with use("triton"):
        got = paged_attention(*args)
    expected = KERNELS["paged_attention"].reference(*args)
    assert error(got, expected) < TOLERANCE[dtype]
    with use("torch"):
        assert error(paged_attention(*args), expected) < TOLERANCE[dtype]


def test_against_reference(device, dtype):
    drawn(device, dtype)


@pytest.mark.parametrize("path", ["triton", "torch"])
@pytest.mark.parametrize("counts", [[1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 3], [0, 0], [], [1]])
def test_rows_of_nobody_are_zero(device, counts, path):
    """Padding tokens come last, padding sequences anywhere; also a sequence of context 0 whose query is there."""
    contexts = [count + 40 * bool(count) for count in counts]
    contexts[:1] = [0][: len(contexts)]
    args = batch(device, torch.float32, counts, contexts, 6, 2, 16, 8, padding=5)
    expected = KERNELS["paged_attention"].reference(*args)
    with use(path):
        got = paged_attention(*args)
    assert error(got, expected) < TOLERANCE[torch.float32]
    assert not got[sum(counts) :].any()


@pytest.mark.parametrize("window", [1, 5, 64, 300, 1000])
@pytest.mark.parametrize("counts", [[1, 1], [40, 1]])
def test_window_equals_a_masked_row(device, dtype, window, counts):
    """Against torch's attention over keys in a row, with the window as a mask; 300 splits a decoding step."""
    contexts = [400, 90]
    args = batch(device, dtype, counts, contexts, 4, 2, 32, 16, window=window)
    q, k_cache, v_cache, tables = args[:4]
    expected, at = [], 0
    for row, count, context in zip(tables.long(), counts, contexts, strict=True):
        position, key = torch.arange(context, device=device)[-count:, None], torch.arange(context, device=device)
        slots = row.where(row < 2**30, 0)[key // 16] * 16 + key % 16
        k, v = (cache[slots].float().nan_to_num().transpose(0, 1)[None] for cache in (k_cache, v_cache))
        mask = (key <= position) & (key > position - window)
        queries = q[at : at + count].float().transpose(0, 1)[None]
        out = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, enable_gqa=True)
        expected.append(out[0].transpose(0, 1))
        at += count
    for path in ("triton", "torch", "reference"):
        with use(path):
            assert error(paged_attention(*args), torch.cat(expected).to(dtype)) < TOLERANCE[dtype]


@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("counts", [[1, 1], [9, 1]])
def test_cache_of_another_dtype(device, dtype, cache_dtype, counts):
    args = batch(device, dtype, counts, [60, 1], 6, 2, 32, 8, cache_dtype=cache_dtype)
    expected = KERNELS["paged_attention"].reference(*args)
    for path in ("triton", "torch"):
        with use(path):
            got = paged_attention(*args)
        assert error(got, expected) < 2 * TOLERANCE[dtype]  # keys and values are rounded to q's dtype


@pytest.mark.parametrize("most", [None, 700, 5000])
@pytest.mark.parametrize("contexts", [[1], [700], [513, 1, 0, 64]])
def test_split_context(device, dtype, contexts, most):
    """Few sequences: programs share a context, and a second kernel joins them. A context of 0 gives 0."""
    args = batch(device, dtype, [1] * len(contexts), contexts, 8, 2, 64, 16)
    with use("triton"):
        got = paged_attention(*args, max_seqlen_k=most)
    assert error(got, KERNELS["paged_attention"].reference(*args)) < TOLERANCE[dtype]
    assert not got[[c == 0 for c in contexts]].any()


@pytest.mark.parametrize("window", [0, 90])
@pytest.mark.parametrize("counts", [[9], [2, 1, 5], [16, 0, 1, 3]])
def test_split_context_of_a_few_queries(device, dtype, counts, window, monkeypatch):
    """One token and guesses behind it: their context, too, is shared by programs. Padding behind them gives 0."""
    monkeypatch.setattr(sys.modules["minillm.kernels.paged_attention"], "splits", lambda *_: 4)
    contexts = [700 if count == max(counts) else count + 130 * bool(count) for count in counts]
    args = batch(device, dtype, counts, contexts, 8, 2, 64, 16, padding=3, window=window)
    with use("triton"):
        got = paged_attention(*args)
    assert error(got, KERNELS["paged_attention"].reference(*args)) < TOLERANCE[dtype]
    assert not got[sum(counts) :].any()


@pytest.mark.parametrize("window", [0, 90, 300])
@pytest.mark.parametrize("counts", [[20], [17, 1, 0, 40]])
def test_split_context_of_a_chunk(device, dtype, counts, window, monkeypatch):
    """A chunk of a long prompt beside sequences that decode: what it sees is shared among programs."""
    module = sys.modules["minillm.kernels.paged_attention"]
    monkeypatch.setattr(module, "splits", lambda *_: 4)
    monkeypatch.setattr(module, "CHUNK", 128)
    contexts = [500 if count == 17 else count + 650 * (count > 17) for count in counts]
    args = batch(device, dtype, counts, contexts, 8, 2, 64, 16, padding=3, window=window)
    with use("triton"):
        got = paged_attention(*args)
    assert error(got, KERNELS["paged_attention"].reference(*args)) < TOLERANCE[dtype]
    assert not got[sum(counts) :].any()


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("in_a_row", [True, False])
def test_a_plan_serves_all_layers(dtype, in_a_row, cache_dtype, padding):
    """One plan, several caches, windows and scales: what is written is read, by long contexts and short ones."""
    counts, contexts = [1, 5, 1, 0, 1], [300, 290, 20, 9, 40]
    for window in (0, 30):
        args = batch(CPU, dtype, counts, contexts, 4, 2, 16, 8, padding=padding, window=window, in_a_row=in_a_row,
                     cache_dtype=cache_dtype)  # fmt: skip
        q, k_cache, v_cache, tables, lengths, bounds, _, block_size, *_ = args
        plan = AttentionPlan(tables, lengths, bounds, block_size)
        for layer in range(2):
            k, v = torch.randn(2, len(q), 2, 16).to(dtype)
            caches = k_cache.clone(), v_cache.clone()
            for new, cache in zip((k, v), caches, strict=True):
                for row, first, count, context in zip(tables, bounds.tolist(), counts, contexts, strict=False):
                    for i in range(count):
                        at = context - count + i
                        cache[int(row[at // block_size]) * block_size + at % block_size] = new[first + i]
            plan.write(k, v, k_cache, v_cache)
            for got, expected in zip((k_cache, v_cache), caches, strict=True):
                assert torch.equal(got.nan_to_num(), expected.nan_to_num())
            scale = 0.1 * (1 + layer)
            got = plan.attend(q, k_cache, v_cache, scale, window)
            assert (
                error(got, KERNELS["paged_attention"].reference(q, *caches, *args[3:8], scale, window))
                < (TOLERANCE[dtype])
            )


def test_one_stream_is_read_in_place(monkeypatch):
    """Blocks that follow one another are not copied, whatever the sequence's length."""
    args = batch(CPU, torch.float32, [1], [300], 4, 2, 16, 8, in_a_row=True)
    plan = AttentionPlan(*args[3:6], args[7])
    seen = []
    inner = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **more: seen.append((k, v)) or inner(
        q, k, v, **more
    ))  # fmt: skip
    plan.attend(*args[:3])
    for part, cache in zip(seen[0], args[1:3], strict=True):
        assert part.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()


def test_whole_prompts_equal_flash_attention(device, dtype):
    counts = [5, 33, 1]
    q, k_cache, v_cache, tables, lengths, bounds, longest, block_size, *_ = batch(
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
    "k_cache ": (1, torch.zeros(64, 2, 16).to(torch.float8_e5m2), TypeError, "float16, bfloat16 or float32, or with"),
    "v_cache ": (2, torch.zeros(64, 2, 16).half(), TypeError, "both caches alike"),
    "window": (9, -1, ValueError, "0 for all"),
    "scale": (8, -0.5, ValueError, "above 0"),
    "q": (0, torch.zeros(3, 16), ValueError, "tokens, heads, D"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_argument(name):
    args = list(batch(torch.device("cpu"), torch.float32, [1, 2], [9, 5], 4, 2, 16, 8))
    at, value, error_type, says = BAD[name]
    args[at] = value
    with pytest.raises(error_type, match=rf"{name.strip()}.*{says}"):
        paged_attention(*args)
