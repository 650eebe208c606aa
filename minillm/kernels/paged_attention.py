"""Attention of new queries to keys and values that lie in blocks, found through a table: one kernel for every batch.

Sequence i has the queries cu_seqlens_q[i] ... cu_seqlens_q[i + 1] - 1, which stand at the end of its context_lens[i]
tokens. Its token j has its key and value in the slot

    block_tables[i, j // block_size] · block_size + j % block_size

One query a sequence is decoding, many are a prompt or a chunk of one, and a batch may mix them.

Bytes: a decoding step reads every key and value of its sequences once, 2 · context · H_kv · D · element size each, for
4 · context · H · D FLOPs: in bf16 as many FLOPs a byte as query heads share a key (1 to 8), where an H100 could do 240.
Memory is the limit, and the reads are all that counts. So the query heads of one key/value head are rows of one
product, which reads each key once for all of them; and when there are fewer sequences than the chip has room for,
the context is split among programs, and a second kernel joins their results by their log-sum-exp. The number of splits
follows from the shapes alone, never from lengths: a CUDA graph replays whatever was captured.

Sources: Kwon et al., 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention"; Dao et
al., 2023, "Flash-Decoding" (the split); the search for a program's sequence is vLLM's.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import (
    arguments,
    ceil_div,
    next_power_of_2,
    operation,
    pdl,
    previous_done,
    sm_count,
    tl,
    triton,
    tuned,
)

__all__ = ["paged_attention"]

MAX_HEAD_SIZE = 256


def gathered(cache: Tensor, table: Tensor, length: int, block_size: int) -> Tensor:
    """The first `length` tokens of one sequence.  cache [slots, H_kv, D], table [W] -> [length, H_kv, D]"""
    token = torch.arange(length, device=cache.device)
    return cache[table[token // block_size].long() * block_size + token % block_size]


def reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, cu_seqlens_q: Tensor,
    max_seqlen_q: int, block_size: int, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """In fp64, sequence by sequence, keys and values gathered, the scores written out."""
    scale, out, bounds = q.shape[-1] ** -0.5 if scale is None else scale, torch.zeros_like(q), cu_seqlens_q.tolist()
    for i, length in enumerate(context_lens.tolist()):
        first, last = bounds[i], bounds[i + 1]
        if length == 0 or first == last:
            continue
        groups = q.shape[1] // k_cache.shape[1]
        k, v = (
            gathered(c, block_tables[i], length, block_size).double().repeat_interleave(groups, dim=1)
            for c in (k_cache, v_cache)
        )  # [length, H, D]
        scores = torch.einsum("thd,shd->hts", q[first:last].double(), k) * scale
        position = torch.arange(length - (last - first), length, device=q.device)[:, None]
        scores = scores.masked_fill(torch.arange(length, device=q.device) > position, -torch.inf)
        out[first:last] = torch.einsum("hts,shd->thd", scores.softmax(-1), v).to(q.dtype)
    return out


def _gathered_blocks(cache: Tensor, table: Tensor, lengths: list[int], block_size: int) -> Tensor:
    """Whole blocks side by side, and 0 past each sequence's end, where another's NaN may lie.

    cache [slots, H_kv, D], table [B, W], of which nothing past the end is looked at -> [B, W · block_size, H_kv, D]
    """
    starts = torch.arange(0, table.shape[1] * block_size, block_size, device=cache.device)
    table = table.where(starts < torch.tensor(lengths, device=cache.device)[:, None], 0)
    blocks = cache.unflatten(0, (-1, block_size)).index_select(0, table.flatten())  # [B · W, block_size, H_kv, D]
    out = blocks.view(len(table), -1, *cache.shape[1:])
    for row, length in zip(out, lengths, strict=True):
        row[length:] = 0
    return out


def torch_path(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, cu_seqlens_q: Tensor,
    max_seqlen_q: int, block_size: int, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """All sequences with one query in one padded call of torch's fused attention, longer ones in a call each."""
    out, bounds, lengths = torch.zeros_like(q), cu_seqlens_q.tolist(), context_lens.tolist()
    counts = [b - a for a, b in itertools.pairwise(bounds)]
    single = [i for i, (count, length) in enumerate(zip(counts, lengths, strict=True)) if count == 1 and length]
    several = [i for i, (count, length) in enumerate(zip(counts, lengths, strict=True)) if count > 1 and length]
    for group in ([single] if single else []) + [[i] for i in several]:
        count, ends = counts[group[0]], [lengths[i] for i in group]
        rows = torch.tensor([bounds[i] for i in group], device=q.device)[:, None] + torch.arange(count, device=q.device)
        table = block_tables[group][:, : ceil_div(max(ends), block_size)]  # [B, W]
        k, v = (_gathered_blocks(cache, table, ends, block_size) for cache in (k_cache, v_cache))  # [B, S, H_kv, D]
        first = torch.tensor(ends, device=q.device)[:, None] - count
        position = first + torch.arange(count, device=q.device)  # [B, T]
        mask = torch.arange(k.shape[1], device=q.device) <= position[..., None]  # [B, T, S]
        out[rows] = F.scaled_dot_product_attention(
            q[rows].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
            attn_mask=mask[:, None], scale=scale, enable_gqa=q.shape[1] != k.shape[2],
        ).transpose(1, 2)  # fmt: skip
    return out


def check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, cu_seqlens_q: Tensor,
    max_seqlen_q: int, block_size: int, scale: float | None = None,
) -> None:  # fmt: skip
    """Raise for shapes, dtypes and devices that do not fit; tables and lengths are not read (a GPU would wait)."""
    arguments(q=q, k_cache=k_cache, v_cache=v_cache)
    if q.dim() != 3 or not 1 <= q.shape[2] <= MAX_HEAD_SIZE or q.stride(-1) != 1:
        raise ValueError(f"q: expected [tokens, heads, D], D contiguous and up to {MAX_HEAD_SIZE}, got {list(q.shape)}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 3 or cache.shape[2] != q.shape[2] or cache.dtype != q.dtype or not cache.is_contiguous():
            raise ValueError(
                f"{name}: expected [slots, H_kv, {q.shape[2]}] of {q.dtype}, contiguous, got {list(cache.shape)}"
                f" of {cache.dtype}"
            )
    if v_cache.shape != k_cache.shape or q.shape[1] % k_cache.shape[1]:
        raise ValueError(
            f"k_cache: expected v_cache's shape and heads that divide q's {q.shape[1]}, got {list(k_cache.shape)}"
        )
    if block_size < 1 or block_size & (block_size - 1):
        raise ValueError(f"block_size: expected a power of 2, got {block_size}")
    if k_cache.shape[0] % block_size:
        raise ValueError(f"k_cache: expected whole blocks of {block_size} slots, got {k_cache.shape[0]} slots")
    sequences = len(context_lens)
    expected = {"block_tables": (block_tables, 2, sequences), "context_lens": (context_lens, 1, sequences)}
    for name, (x, dims, length) in (expected | {"cu_seqlens_q": (cu_seqlens_q, 1, sequences + 1)}).items():
        if x.dim() != dims or len(x) != length or x.dtype != torch.int32 or x.device != q.device:
            raise ValueError(
                f"{name}: expected int32, {dims} axes, length {length}, on {q.device}, got {x.dtype} {list(x.shape)}"
                f" on {x.device}"
            )


@triton.jit
def sequence_of(block, cu_ptr, sequences, BLOCK_Q: tl.constexpr):
    """The sequence that owns block `block` of queries, when sequence i has its first at cu[i] // BLOCK_Q + i."""
    low, high = 0, sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(cu_ptr + middle) // BLOCK_Q + middle <= block:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def paged_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, table_ptr, context_ptr, cu_ptr, sequences, stride_q, stride_table, scale,
    H_KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLITS: tl.constexpr,
    DECODE: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q queries of one sequence, the GROUP heads of one key/value head, one split of the context a program."""
    block, head_kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = block if DECODE else sequence_of(block, cu_ptr, sequences, BLOCK_Q)
    first = tl.load(cu_ptr + sequence)
    count = tl.load(cu_ptr + sequence + 1) - first  # queries of the sequence
    first_q = 0 if DECODE else (block - first // BLOCK_Q - sequence) * BLOCK_Q
    context = tl.load(context_ptr + sequence)
    previous_done(PDL)
    if first_q >= count:
        return
    row = tl.arange(0, BLOCK_Q * BLOCK_G)  # query-major: BLOCK_G rows a query, GROUP of them used
    query, group, offs_d = first_q + row // BLOCK_G, row % BLOCK_G, tl.arange(0, BLOCK_D)
    position = context - count + query  # [BLOCK_M]
    head = head_kv * GROUP + group
    used = ((query < count) & (group < GROUP))[:, None] & (offs_d < D)[None, :]
    token = (first + query).to(tl.int64)
    q = tl.load(q_ptr + token[:, None] * stride_q + head[:, None] * D + offs_d[None, :], mask=used, other=0.0)

    seen = tl.minimum(context, context - count + first_q + BLOCK_Q)  # keys that some query of the block may see
    a_split = tl.cdiv(tl.cdiv(seen, BLOCK_N), SPLITS) * BLOCK_N
    begin, end = split * a_split, tl.minimum(seen, (split + 1) * a_split)
    acc = tl.zeros((BLOCK_Q * BLOCK_G, BLOCK_D), tl.float32)
    row_max = tl.full((BLOCK_Q * BLOCK_G,), -1.0e30, tl.float32)  # finite: rows that see nothing
    row_sum = tl.zeros((BLOCK_Q * BLOCK_G,), tl.float32)
    for start in range(begin, end, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        known = offs_n < end
        number = tl.load(table_ptr + sequence * stride_table + offs_n // BLOCK_SIZE, mask=known, other=0)
        slot = number.to(tl.int64) * BLOCK_SIZE + offs_n % BLOCK_SIZE
        at = slot * (H_KV * D) + head_kv * D  # [BLOCK_N]
        k = tl.load(k_ptr + at[None, :] + offs_d[:, None], mask=known[None, :] & (offs_d < D)[:, None], other=0.0)
        v = tl.load(v_ptr + at[:, None] + offs_d[None, :], mask=known[:, None] & (offs_d < D)[None, :], other=0.0)
        s = tl.dot(q, k, input_precision=PRECISION) * scale  # [BLOCK_M, BLOCK_N]
        s = tl.where(known[None, :] & (offs_n[None, :] <= position[:, None]), s, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        p, shrink = tl.exp2(s - new_max[:, None]), tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        row_max = new_max

    acc = acc / tl.where(row_sum == 0, 1.0, row_sum)[:, None]
    out = (token * (H_KV * GROUP) + head) * SPLITS + split  # [BLOCK_M]
    tl.store(out_ptr + out[:, None] * D + offs_d[None, :], acc.to(out_ptr.dtype.element_ty), mask=used)
    if SPLITS > 1:
        lse = tl.where(row_sum == 0, -1.0e30, row_max + tl.log2(tl.where(row_sum == 0, 1.0, row_sum)))
        tl.store(lse_ptr + out, lse, mask=(query < count) & (group < GROUP))


@triton.jit
def join_kernel(
    part_ptr, lse_ptr, out_ptr, D: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """One head of one token a program: its splits, weighted by 2^lse."""
    previous_done(PDL)
    row = tl.program_id(0).to(tl.int64)
    offs_s, offs_d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + row * SPLITS + offs_s)  # [SPLITS]
    weight = tl.exp2(lse - tl.max(lse, 0))
    weight = weight / tl.sum(weight, 0)
    part_ptrs = part_ptr + (row * SPLITS + offs_s)[:, None] * D + offs_d[None, :]
    part = tl.load(part_ptrs, mask=(offs_d < D)[None, :], other=0.0)  # [SPLITS, BLOCK_D]
    out = tl.sum(part * weight[:, None], 0)
    tl.store(out_ptr + row * D + offs_d, out.to(out_ptr.dtype.element_ty), mask=offs_d < D)


def splits(sequences: int, num_kv_heads: int, device: torch.device) -> int:
    """Into how many parts a decoding step cuts each context, so that every multiprocessor has work: a power of 2."""
    wanted = ceil_div(7 * sm_count(device.index) // 4, max(1, sequences * num_kv_heads))
    return min(64, next_power_of_2(wanted))


# Found on an H100.
_SIZES = {
    "decode": {"BLOCK_M": 16, "BLOCK_N": 128, "num_warps": 4, "num_stages": 2},
    "split": {"BLOCK_M": 16, "BLOCK_N": 128, "num_warps": 4, "num_stages": 3},
    "prefill": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
}


def _sizes(q: Tensor, kind: str, block_d: int) -> dict[str, int]:
    if q.dtype == torch.float32 or block_d > 128:  # larger elements or heads: tiles that fit into shared memory
        return {**_SIZES[kind], "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    return tuned(q.device, f"paged_attention {kind} {block_d}", **_SIZES[kind])


@operation(
    "paged_attention",
    reference=reference,
    torch=torch_path,
    check=check,
    fake=lambda q, *_, **__: torch.empty_like(q, memory_format=torch.contiguous_format),
)
def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, cu_seqlens_q: Tensor,
    max_seqlen_q: int, block_size: int, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention of each sequence's newest tokens to all of its tokens, in blocks.

    q [N, H, D], all sequences' queries one after another; k_cache and v_cache [slots, H_kv, D]; block_tables [S, W]
    int32, the blocks of each sequence in order; context_lens [S] int32, tokens of each, the queries included;
    cu_seqlens_q [S + 1] int32. No sequence has more than `max_seqlen_q` queries. -> [N, H, D] in q's dtype. A sequence
    of context 0 gets 0 (that is how a batch is padded). Raises TypeError and ValueError with the argument's name.
    """
    tokens, heads, size = q.shape
    out = torch.empty((tokens, heads, size), dtype=q.dtype, device=q.device)
    sequences, kv_heads, decode = len(context_lens), k_cache.shape[1], max_seqlen_q == 1
    if tokens == 0 or sequences == 0:
        return out
    block_d, block_g = max(16, next_power_of_2(size)), next_power_of_2(heads // kv_heads)
    parts = splits(sequences, kv_heads, q.device) if decode else 1
    sizes = _sizes(q, "prefill" if not decode else "split" if parts > 1 else "decode", block_d)
    block_q = max(1, max(16, sizes.pop("BLOCK_M")) // block_g)
    target = out if parts == 1 else torch.empty((tokens, heads, parts, size), dtype=torch.float32, device=q.device)
    lse = target if parts == 1 else torch.empty((tokens, heads, parts), dtype=torch.float32, device=q.device)
    blocks = sequences if decode else tokens // block_q + sequences
    q = q if q.stride(1) == size else q.contiguous()
    scale = (size**-0.5 if scale is None else scale) * math.log2(math.e)
    paged_attention_kernel[(blocks, kv_heads, parts)](
        q, k_cache, v_cache, target, lse, block_tables, context_lens, cu_seqlens_q, sequences,
        q.stride(0), block_tables.stride(0), scale,
        H_KV=kv_heads, GROUP=heads // kv_heads, D=size, BLOCK_SIZE=block_size, SPLITS=parts, DECODE=decode,
        PRECISION="ieee", BLOCK_Q=block_q, BLOCK_G=block_g, BLOCK_D=block_d, **pdl(q.device), **sizes,
    )  # fmt: skip
    if parts > 1:
        join_kernel[(tokens * heads,)](
            target, lse, out, D=size, SPLITS=parts, BLOCK_D=block_d, num_warps=1, **pdl(q.device)
        )
    return out
