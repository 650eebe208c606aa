"""Softmax over the last axis: y_i = e^(x_i - max x) / Σ_j e^(x_j - max x), with a mask if wanted.

Bytes: each element read once and written once, 2 · rows · N · element size, if a row fits into registers. FLOPs: about
5 an element, one of them an exponential. At 16 bits that is 1.25 FLOPs a byte, where an H100 could do 300: memory
is the limit. torch's unfused form (max, subtract, exp, sum, divide) reads and writes five times as much.

Rows of more than MAX_BLOCK elements go through the loop of Milakov and Gimelshein (2018, "Online normalizer
calculation for softmax"): one pass keeps a running maximum and a sum that is rescaled whenever the maximum grows, a
second pass writes. That reads twice.

A row with everything masked gives zeros (torch's softmax of -inf alone gives NaN).
"""

import torch
from torch import Tensor

from .common import arguments, next_power_of_2, operation, tl, triton, tuned

__all__ = ["softmax"]

MAX_BLOCK = 65_536  # elements of a row that one program holds in registers


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
def long_softmax_kernel(
    x_ptr, mask_ptr, y_ptr, n, stride_x, stride_mask,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program, in two passes of BLOCK elements: the online maximum and sum, then the result."""
    row = tl.program_id(0).to(tl.int64)
    top = tl.full((BLOCK,), -3.0e38, tl.float32)  # of each lane; lanes are joined after the loop
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * stride_x + offs, mask=offs < n, other=-float("inf")).to(tl.float32)
        if MASKED:
            x = tl.where(tl.load(mask_ptr + row * stride_mask + offs, mask=offs < n, other=0) != 0, x, -float("inf"))
        new_top = tl.maximum(top, x)
        total = total * tl.exp(top - new_top) + tl.exp(x - new_top)
        top = new_top
    row_top = tl.max(top, 0)
    row_total = tl.sum(total * tl.exp(top - row_top), 0)
    scale = 1.0 / tl.where(row_total == 0, 1.0, row_total)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * stride_x + offs, mask=offs < n, other=-float("inf")).to(tl.float32)
        if MASKED:
            x = tl.where(tl.load(mask_ptr + row * stride_mask + offs, mask=offs < n, other=0) != 0, x, -float("inf"))
        tl.store(y_ptr + row * n + offs, (tl.exp(x - row_top) * scale).to(y_ptr.dtype.element_ty), mask=offs < n)


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
    block = next_power_of_2(n)
    sizes = tuned(x.device, f"softmax {min(block, 2 * MAX_BLOCK)}", num_warps=max(1, min(16, block // 1024)))
    kernel, block = (softmax_kernel, block) if block <= MAX_BLOCK else (long_softmax_kernel, 16_384)
    kernel[(rows.shape[0],)](
        rows, kept, y, n, rows.stride(0), kept.stride(0), MASKED=mask is not None, BLOCK=block, **sizes
    )
    return y
