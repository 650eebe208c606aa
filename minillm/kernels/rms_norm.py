"""RMSNorm, alone and with the residual sum in front: y = h / sqrt(mean(h²) + eps) · weight, h = x or x + residual.

Bytes, a row of N elements: x read and y written, 2 N; with the residual also residual read and h written, 4 N (weight
stays in cache). FLOPs: about 4 an element. Memory is the limit. Unfused in torch, the sum costs 3 N and the norm, as
five operations in fp32, some 20 N.

Sources: Zhang and Sennrich, 2019, "Root Mean Square Layer Normalization"; the fusion is what every serving engine does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import arguments, ceil_div, next_power_of_2, operation, pdl, previous_done, tl, triton, tuned

__all__ = ["add_rms_norm", "rms_norm"]


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In fp64.  x [..., N], weight [N] -> [..., N]"""
    x64 = x.double()
    return (x64 * torch.rsqrt(x64.pow(2).mean(-1, keepdim=True) + eps) * weight.double()).to(x.dtype)


def torch_path(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Statistics in fp32, as Hugging Face's Llama rounds them: torch's own operation does so only in fp32."""
    if x.dtype == weight.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    x32 = x.float()  # fp16 squares overflow, and a bf16 mean is rounded
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * x32.to(x.dtype)


def add_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum)."""
    total = x.double() + residual.double()
    return reference(total, weight, eps).to(x.dtype), total.to(x.dtype)


def add_torch_path(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum rounded to x's dtype, then its norm."""
    total = x + residual
    return torch_path(total, weight, eps), total


def check(x: Tensor, weight: Tensor, eps: float) -> None:
    """Raise for a weight that is not [N], and for an eps that is not positive."""
    arguments(x=x, weight=weight)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected a last axis of at least 1 element, got shape {list(x.shape)}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight: expected shape [{x.shape[-1]}], x's last axis, got {list(weight.shape)}")
    if not eps > 0:
        raise ValueError(f"eps: expected a positive number, got {eps}")


def add_check(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    """As `check`, and raise for a residual of another shape or dtype than x."""
    arguments(x=x, residual=residual)
    check(x, weight, eps)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual: expected shape {list(x.shape)} and {x.dtype}, as x, got {list(residual.shape)} and"
            f" {residual.dtype}"
        )


@triton.jit
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rows, n, stride_x, stride_residual, eps,
    ADD: tl.constexpr, PDL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program (several when they are short), each held in registers from read to write."""
    previous_done(PDL)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]  # [ROWS, 1]
    offs = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    inside = (row < rows) & (offs < n)
    h = tl.load(x_ptr + row * stride_x + offs, mask=inside, other=0.0)
    if ADD:
        h = h.to(tl.float32) + tl.load(residual_ptr + row * stride_residual + offs, mask=inside, other=0.0).to(
            tl.float32
        )
        h = h.to(sum_ptr.dtype.element_ty)  # the norm sees the sum as later layers will: rounded
        tl.store(sum_ptr + row * n + offs, h, mask=inside)
    h = h.to(tl.float32)  # [ROWS, BLOCK]
    scale = tl.rsqrt(tl.sum(h * h, 1) / n + eps)[:, None]  # [ROWS, 1]
    weight = tl.load(weight_ptr + offs, mask=offs < n, other=0.0)
    y = (h * scale).to(y_ptr.dtype.element_ty).to(tl.float32) * weight.to(tl.float32)
    tl.store(y_ptr + row * n + offs, y.to(y_ptr.dtype.element_ty), mask=inside)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    n = x.shape[-1]
    flat = [t.reshape(-1, n) if t is not None else x.reshape(-1, n) for t in (x, residual)]
    flat = [t if t.stride(-1) == 1 else t.contiguous() for t in flat]
    rows, block = flat[0].shape[0], next_power_of_2(n)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(y) if residual is not None else y
    if rows == 0:
        return y, total
    sizes = tuned(x.device, f"rms_norm {block}", ROWS=max(1, 2048 // block), num_warps=max(4, min(16, block // 1024)))
    rms_norm_kernel[(ceil_div(rows, sizes["ROWS"]),)](
        flat[0], flat[1], weight.contiguous(), y, total, rows, n, flat[0].stride(0), flat[1].stride(0), eps,
        ADD=residual is not None, BLOCK=block, **pdl(x.device), **sizes,
    )  # fmt: skip
    return y, total


@operation(
    "rms_norm",
    reference=reference,
    torch=torch_path,
    check=check,
    fake=lambda x, weight, eps: x.new_empty(x.shape),
)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis, statistics in fp32.

    x [..., N], weight [N] -> [..., N] in x's dtype. Raises TypeError and ValueError with the argument's name.
    """
    return _launch(x, None, weight, eps)[0]


@operation(
    "add_rms_norm",
    reference=add_reference,
    torch=add_torch_path,
    check=add_check,
    fake=lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and the sum itself, which is the residual stream from here on.

    x and residual [..., N], weight [N] -> (normed [..., N], sum [..., N]), both in x's dtype.
    """
    return _launch(x, residual, weight, eps)
