"""Softmax over the last axis: y_i = e^(x_i - max x) / Σ_j e^(x_j - max x), with a mask if wanted.

Bytes: each element read once and written once, 2 · rows · N · element size, if a row fits into registers. FLOPs: about
5 an element, one of them an exponential. At 16 bits that is 1.25 FLOPs a byte, where an H100 could do 300: memory
is the limit. torch's unfused form (max, subtract, exp, sum, divide) reads and writes four times as much.

A row that is too long for registers goes through a loop: one pass keeps the maximum so far and the sum, rescaled
whenever the maximum grows (Milakov and Gimelshein, 2018, "Online normalizer calculation for softmax"), a second pass
writes. It reads twice, but the second time from a cache, since few rows are on their way at once: backwards, what came
last being surest there, and with hints that x is to stay until then and that nobody waits for y.

A row with everything masked gives zeros (torch's softmax of -inf alone gives NaN).
"""

import torch
from torch import Tensor

from ..common import arguments, next_power_of_2, operation, tl, triton, tuned

__all__ = ["softmax"]


def reference(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """In fp64.  x [..., N], mask bool, broadcastable to x -> [..., N]"""
    x64 = x.double() if mask is None else x.double().masked_fill(~mask, -torch.inf)
    top = x64.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).min)
    exponentials = (x64 - top).exp()
    return (exponentials / exponentials.sum(-1, keepdim=True).clamp(min=1e-300)).to(x.dtype)


def torch_path(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """torch.softmax, statistics in fp32."""
    if mask is None:
        return x.softmax(-1)
    return x.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask, 0)


def check(x: Tensor, mask: Tensor | None = None) -> None:
    """Raise for an x without a last axis of at least 1, and for a mask that is not bool or does not broadcast."""
    arguments(x=x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected a last axis of at least 1 element, got shape {list(x.shape)}")
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected bool (True: keep), got {mask.dtype}")
    if mask.device != x.device:
        raise ValueError(f"mask: expected the device of x, {x.device}, got {mask.device}")
    try:
        torch.broadcast_to(mask, x.shape)
    except RuntimeError:
        raise ValueError(f"mask: expected a shape that broadcasts to {list(x.shape)}, got {list(mask.shape)}") from None


@triton.jit
def softmax_kernel(
    x_ptr, mask_ptr, y_ptr, n, stride_x, stride_mask,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program, held in registers from the one read to the one write."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    inside = offs < n
    x = tl.load(x_ptr + row * stride_x + offs, mask=inside, other=-float("inf")).to(tl.float32)  # [BLOCK]
    if MASKED:
        keep = tl.load(mask_ptr + row * stride_mask + offs, mask=inside, other=0)
        x = tl.where(keep != 0, x, -float("inf"))
    top = tl.maximum(tl.max(x, 0), -3.0e38)  # finite, so that a row of -inf alone is not inf - inf
    exponentials = tl.exp(x - top)
    total = tl.sum(exponentials, 0)
    y = exponentials / tl.where(total == 0, 1.0, total)
    tl.store(y_ptr + row * n + offs, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_block(x_ptr, mask_ptr, start, n, MASKED: tl.constexpr, BLOCK: tl.constexpr, KEEP: tl.constexpr):
    """Elements start ... start + BLOCK - 1 of a row, times log2(e); -inf where masked or past the end."""
    offs = start + tl.arange(0, BLOCK)
    policy: tl.constexpr = "evict_last" if KEEP else "evict_first"
    x = tl.load(x_ptr + offs, mask=offs < n, other=-float("inf"), eviction_policy=policy)
    x = x.to(tl.float32) * 1.4426950408889634
    if MASKED:
        x = tl.where(tl.load(mask_ptr + offs, mask=offs < n, other=0) != 0, x, -float("inf"))
    return x  # [BLOCK]


@triton.jit
def long_softmax_kernel(
    x_ptr, mask_ptr, y_ptr, n, stride_x, stride_mask,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program, in two passes of BLOCK elements: the maximum and the sum so far, then the result."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr, mask_ptr, y_ptr = x_ptr + row * stride_x, mask_ptr + row * stride_mask, y_ptr + row * n
    top = -3.0e38
    sums = tl.zeros((BLOCK,), tl.float32)  # one a lane, joined after the loop: one exponential an element and pass
    for start in range(0, n, BLOCK):
        x = load_block(x_ptr, mask_ptr, start, n, MASKED, BLOCK, KEEP=True)
        new_top = tl.maximum(top, tl.max(x, 0))
        sums = sums * tl.exp2(top - new_top) + tl.exp2(x - new_top)
        top = new_top
    total = tl.sum(sums, 0)
    shift = top + tl.log2(tl.where(total == 0, 1.0, total))
    last = (tl.cdiv(n, BLOCK) - 1) * BLOCK
    for done in range(0, n, BLOCK):
        offs = last - done + tl.arange(0, BLOCK)
        y = tl.exp2(load_block(x_ptr, mask_ptr, last - done, n, MASKED, BLOCK, KEEP=False) - shift)
        tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=offs < n, cache_modifier=".cs")


@operation(
    "softmax", reference=reference, torch=torch_path, check=check, fake=lambda x, mask=None: x.new_empty(x.shape)
)
def softmax(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax over the last axis, statistics in fp32.

    x [..., N] floating, mask bool and broadcastable to x (True: keep) -> [..., N] in x's dtype, contiguous. Raises
    TypeError and ValueError with the argument's name.
    """
    n = x.shape[-1]
    rows = x.reshape(-1, n)  # [rows, N]
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows.shape[0] == 0:
        return y
    kept = rows if mask is None else mask.broadcast_to(x.shape).reshape(-1, n).contiguous().view(torch.uint8)
    longest = next_power_of_2(n)
    sizes = tuned(
        x.device, f"softmax {longest}", BLOCK=min(longest, 8192), num_warps=max(1, min(8, longest // 512))
    )  # fmt: skip
    kernel = softmax_kernel if sizes["BLOCK"] >= n else long_softmax_kernel
    kernel[(rows.shape[0],)](rows, kept, y, n, rows.stride(0), kept.stride(0), MASKED=mask is not None, **sizes)
    return y
