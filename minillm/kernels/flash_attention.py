"""Attention without the score matrix: softmax(q kᵀ · scale) v for packed sequences, exact, in one pass over k and v.

FLOPs: 4 T S D a query head (two products), half of that when causal. Bytes, if q, k, v and the result move once:
(2 H T + 2 H_kv S) D · element size; the naive way also writes and reads scores and weights, 4 H T S numbers more. At
4,096 tokens, 32 heads of 64 in bf16, that is 4.3 GB against 0.07 GB. So done, arithmetic is the limit.

How: a program holds BLOCK_M queries and walks over the keys in blocks of BLOCK_N. Softmax needs the maximum and the sum
of a whole row, but both can be had on the way. With m the maximum so far, l the sum of e^(s - m) and a the sum of
e^(s - m) v, a block with the new maximum m' turns them into

    l <- l e^(m - m') + Σ e^(s - m')          a <- a e^(m - m') + Σ e^(s - m') v

and a / l is the answer at the end. Three more things make it fast: blocks that the mask leaves whole skip the mask,
blocks that it hides are never visited, and 2^x with log2(e) folded into the scale takes the place of e^x.

Sources: Milakov and Gimelshein, 2018 (the running softmax); Dao et al., 2022, and Dao, 2023, "FlashAttention-2"; the
two loops are Triton's tutorial's idea (Tillet et al.).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import (
    TENSOR_CORES,
    TensorDescriptor,
    arguments,
    ceil_div,
    fits_descriptor,
    has_copy_engine,
    next_power_of_2,
    operation,
    tl,
    triton,
    tuned,
)

__all__ = ["flash_attention"]

MAX_HEAD_SIZE = 256


def visible(len_q: int, len_k: int, causal: bool, window: int, device: torch.device) -> Tensor:
    """Which key a query may see: query i stands at position i + len_k - len_q.  [len_q, len_k] bool"""
    position = torch.arange(len_q, device=device)[:, None] + len_k - len_q
    key = torch.arange(len_k, device=device)[None, :]
    keep = (key <= position) if causal else torch.ones(len_q, len_k, dtype=torch.bool, device=device)
    return keep & (key > position - window) if window else keep


def _one_by_one(
    compute: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor,
    cu_k: Tensor, causal: bool, window: int,
) -> Tensor:  # fmt: skip
    out = torch.empty_like(q)
    bounds_q, bounds_k = cu_q.tolist(), cu_k.tolist()
    for i in range(len(bounds_q) - 1):
        a, b, c, d = bounds_q[i], bounds_q[i + 1], bounds_k[i], bounds_k[i + 1]
        keep = visible(b - a, d - c, causal, window, q.device)
        out[a:b] = compute(q[a:b], k[c:d], v[c:d], keep)
    return out


def reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    causal: bool = True, window: int = 0, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """In fp64, sequence by sequence, the scores written out."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def compute(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # [S, H, D]
        scores = torch.einsum("thd,shd->hts", q.double(), k) * scale
        weights = scores.masked_fill(~keep, -torch.inf).softmax(-1).masked_fill(~keep, 0)
        return torch.einsum("hts,shd->thd", weights, v).to(q.dtype)

    return _one_by_one(compute, q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window)


def torch_path(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    causal: bool = True, window: int = 0, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """torch's fused attention, sequence by sequence."""

    def compute(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        square = causal and not window and q.shape[0] == k.shape[0]
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, tokens, D]
        mask = None if square else keep
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=square, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )[0].transpose(0, 1)  # [T, H, D]
        return out if square else out.masked_fill(~keep.any(-1)[:, None, None], 0)

    return _one_by_one(compute, q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window)


def check(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    causal: bool = True, window: int = 0, scale: float | None = None,
) -> None:  # fmt: skip
    """Raise for shapes, dtypes and devices that do not fit; the sequence bounds are not read (a GPU would wait)."""
    arguments(q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3 or x.shape[1] == 0 or not 1 <= x.shape[2] <= MAX_HEAD_SIZE:
            raise ValueError(f"{name}: expected [tokens, heads, D] with D up to {MAX_HEAD_SIZE}, got {list(x.shape)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype, {q.dtype}, got {x.dtype}")
    if k.shape[2] != q.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k: expected heads that divide q's {q.shape[1]}, and D = {q.shape[2]}, got shape {list(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v: expected k's shape {list(k.shape)}, got {list(v.shape)}")
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if x.dim() != 1 or len(x) < 1 or len(x) != len(cu_seqlens_q) or x.dtype != torch.int32 or x.device != q.device:
            raise ValueError(
                f"{name}: expected the bounds of {len(cu_seqlens_q) - 1} sequences, int32 on {q.device}, got"
                f" {list(x.shape)}, {x.dtype} on {x.device}"
            )
    if max_seqlen_q < 0 or window < 0:
        raise ValueError(f"max_seqlen_q, window: expected 0 or more, got {max_seqlen_q} and {window}")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale: expected a number above 0, got {scale}")
    if window and not causal:
        raise ValueError("window: expected 0 without causal; a window counts positions back from the query")


@triton.jit
def rows_of(x, row, head, end, COPIED: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """ROWS rows of one head, from `row` on; past `end` of those are zeros or another sequence's.  [ROWS, BLOCK_D]

    COPIED: x is a descriptor for the copy engine; else, where there is none, (pointer, its strides).
    """
    if COPIED:
        return x.load([row, head, 0]).reshape(ROWS, BLOCK_D)
    else:
        offs, offs_d = row + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
        at = offs.to(tl.int64)[:, None] * x[1] + head * x[2] + offs_d[None, :]
        return tl.load(x[0] + at, mask=(offs < end)[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def attend(
    acc, row_max, row_sum, q, k_rows, v_rows, row_k, head_kv, first, last, position, len_k, scale,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr, COPIED: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Take the keys first ... last - 1 into the running softmax; `scale` has log2(e) in it."""
    for start in tl.range(first, last, BLOCK_N):
        k = rows_of(k_rows, row_k + start, head_kv, row_k + len_k, COPIED, D, BLOCK_N, BLOCK_D)
        scores = tl.dot(q, k.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if MASKED:
            key = start + tl.arange(0, BLOCK_N)[None, :]
            keep = key < len_k
            if CAUSAL:
                keep = keep & (key <= position[:, None])
            if WINDOW:
                keep = keep & (key > position[:, None] - WINDOW)
            scores = tl.where(keep, scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)  # [BLOCK_M]
        weights = tl.exp2(scores * scale - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        v = rows_of(v_rows, row_k + start, head_kv, row_k + len_k, COPIED, D, BLOCK_N, BLOCK_D)
        if MASKED:  # past the end stand the next sequence's values: 0 · inf would be NaN
            v = tl.where(start + tl.arange(0, BLOCK_N)[:, None] < len_k, v, 0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)  # [BLOCK_M, BLOCK_D]
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def flash_attention_kernel(
    q_rows, k_rows, v_rows, o_ptr, cu_q_ptr, cu_k_ptr, stride_om, stride_oh, scale,
    D: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    COPIED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head of one sequence a program; the last queries, which see most, start first."""
    block, head, sequence = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row_q, row_k = tl.load(cu_q_ptr + sequence), tl.load(cu_k_ptr + sequence)
    len_q, len_k = tl.load(cu_q_ptr + sequence + 1) - row_q, tl.load(cu_k_ptr + sequence + 1) - row_k
    first_q = block * BLOCK_M
    if first_q >= len_q:
        return
    offs_m = first_q + tl.arange(0, BLOCK_M)
    position = offs_m + len_k - len_q  # [BLOCK_M]
    lowest, highest = first_q + len_k - len_q, tl.minimum(first_q + BLOCK_M, len_q) - 1 + len_k - len_q
    # Keys begin ... end - 1 are seen by some query of the block, whole_from ... whole_to - 1 by all of them.
    begin, end, whole_to = 0, len_k, len_k // BLOCK_N * BLOCK_N
    whole_from = 0
    if CAUSAL:
        end = tl.maximum(tl.minimum(highest + 1, len_k), 0)
        whole_to = tl.maximum(tl.minimum(lowest + 1, len_k), 0) // BLOCK_N * BLOCK_N
    if WINDOW:
        begin = tl.maximum(lowest - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        whole_from = tl.cdiv(tl.maximum(highest - WINDOW + 1, 0), BLOCK_N) * BLOCK_N
    whole_to = tl.maximum(whole_to, begin)
    whole_from = tl.minimum(whole_from, whole_to)

    q = rows_of(q_rows, row_q + first_q, head, row_q + len_q, COPIED, D, BLOCK_M, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_max = tl.full((BLOCK_M,), -1.0e30, tl.float32)  # finite: a row that sees nothing must not make inf - inf
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    head_kv = head // GROUP
    if WINDOW:
        acc, row_max, row_sum = attend(
            acc, row_max, row_sum, q, k_rows, v_rows, row_k, head_kv, begin, whole_from, position, len_k, scale,
            True, CAUSAL, WINDOW, PRECISION, COPIED, D, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    acc, row_max, row_sum = attend(
        acc, row_max, row_sum, q, k_rows, v_rows, row_k, head_kv, whole_from, whole_to, position, len_k, scale,
        False, CAUSAL, WINDOW, PRECISION, COPIED, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, row_max, row_sum = attend(
        acc, row_max, row_sum, q, k_rows, v_rows, row_k, head_kv, whole_to, end, position, len_k, scale,
        True, CAUSAL, WINDOW, PRECISION, COPIED, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    out = acc / tl.where(row_sum == 0, 1.0, row_sum)[:, None]
    offs_d = tl.arange(0, BLOCK_D)
    o_ptrs = o_ptr + (row_q + offs_m).to(tl.int64)[:, None] * stride_om + head * stride_oh + offs_d[None, :]
    tl.store(o_ptrs, out.to(o_ptr.dtype.element_ty), mask=(offs_m[:, None] < len_q) & (offs_d[None, :] < D))


@operation(
    "flash_attention",
    reference=reference,
    torch=torch_path,
    check=check,
    fake=lambda q, *_, **__: q.new_empty(q.shape),
    since=TENSOR_CORES,
)
def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    causal: bool = True, window: int = 0, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention within each of several packed sequences.

    q [T, H, D], k and v [S, H_kv, D], all sequences one after another; sequence i has the queries cu_seqlens_q[i] ...
    cu_seqlens_q[i + 1] - 1 (int32), and likewise keys. No sequence has more than `max_seqlen_q` queries. Query head h
    reads head h // (H / H_kv). `causal`: a query sees keys up to its own position, the last query standing at the last
    key; `window` > 0: of these only the last `window`. `scale` is 1 / sqrt(D) unless given. -> [T, H, D] in q's dtype;
    a query that sees nothing gets 0. Raises TypeError and ValueError with the argument's name.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    sequences = len(cu_seqlens_q) - 1
    if q.numel() == 0 or sequences == 0 or max_seqlen_q == 0:
        return out
    if k.shape[0] == 0:
        return out.zero_()
    size, block_d = q.shape[2], max(16, next_power_of_2(q.shape[2]))
    scale = (size**-0.5 if scale is None else scale) * math.log2(math.e)
    copied = q.dtype != torch.float32 and has_copy_engine(q)  # fp32 so spills registers
    sizes = _sizes(q, block_d, copied)
    block_m, block_n = sizes.pop("BLOCK_M"), sizes.pop("BLOCK_N")
    flash_attention_kernel[(ceil_div(max_seqlen_q, block_m), q.shape[1], sequences)](
        *(_rows(x, n, block_d, copied) for x, n in ((q, block_m), (k, block_n), (v, block_n))),
        out, cu_seqlens_q, cu_seqlens_k, out.stride(0), out.stride(1), scale,
        D=size, GROUP=q.shape[1] // k.shape[1], CAUSAL=causal, WINDOW=window, PRECISION="ieee",
        COPIED=copied, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d, **sizes,
    )  # fmt: skip
    return out


_SIZES = (
    {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},  # heads of up to 64
    {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},  # of up to 128
)


def _sizes(q: Tensor, block_d: int, copied: bool) -> dict[str, int]:
    if q.dtype == torch.float32:  # no tensor cores: small tiles, or registers run out
        default = {"BLOCK_M": 32 if block_d <= 64 else 16, "BLOCK_N": min(32, 4096 // block_d)}
        return tuned(q.device, f"flash_attention fp32 {block_d}", **default, num_warps=4, num_stages=1)
    default = dict(_SIZES[block_d > 64])
    if block_d > 128 or (not copied and block_d > 64):  # so that two stages fit into 99 KiB
        default |= {"BLOCK_M": 64, "BLOCK_N": 8192 // block_d, "num_warps": 4 if block_d <= 128 else 8, "num_stages": 2}
    return tuned(q.device, f"flash_attention {block_d}", **default)


def _rows(x: Tensor, rows: int, block_d: int, copied: bool) -> Any:
    """x as `rows_of` reads it."""
    if not copied:
        x = x if x.stride(-1) == 1 else x.contiguous()
        return x, x.stride(0), x.stride(1)
    return TensorDescriptor.from_tensor(_aligned(x), [rows, 1, block_d])


def _aligned(x: Tensor) -> Tensor:
    """x as the copy engine can read it: a copy only where its strides or its head size do not fit."""
    short = -x.shape[2] % (16 // x.element_size())
    x = F.pad(x, (0, short)) if short else x
    return x if fits_descriptor(x) else x.contiguous()
