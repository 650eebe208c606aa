"""y = x wᵀ + b with a weight of 8 bits and a scale a row: w[n, k] = q[n, k] · s[n].

Bytes: the weight once, N K, half of bf16's: for one token that is the time. Integers up to 128 are exact in bf16 and
fp16, so tensor cores sum x · q with q as it is, and the row's scale is multiplied into the sum, once.

As in `w4a16` the kernel computes yᵀ = q xᵀ, where rows of q fill the 64 rows of a tensor-core product, which few tokens
could not; when N gives too few programs, K is split among them, and parts are added up in one order. For many tokens q
is turned into x's dtype, whole, and cuBLAS multiplies.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import arguments, ceil_div, on_tensor_cores, operation, pdl, previous_done, sm_count, tl, triton, tuned
from .w4a16 import WHOLE_ABOVE, add_parts_kernel, split

__all__ = ["w8a16"]


def reference(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """In fp64."""
    y = x.double() @ (q.double() * scale.double().view(-1, 1)).mT
    return (y if bias is None else y + bias.double()).to(x.dtype)


def torch_path(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The weight in x's dtype, whole, then `F.linear`."""
    return F.linear(x, (q.float() * scale.float().view(-1, 1)).to(x.dtype), bias)


def check(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
    """Raise unless the shapes and dtypes are those that `w8a16` names."""
    arguments(x=x, scale=scale)
    if q.dtype != torch.int8:
        raise TypeError(f"q: expected int8, got {q.dtype}")
    if q.dim() != 2 or x.dim() == 0 or x.shape[-1] == 0 or q.shape[1] != x.shape[-1]:
        raise ValueError(f"q: expected [N, K] with x's last axis as K, got {list(q.shape)} for x {list(x.shape)}")
    n = len(q)
    if scale.shape not in ((n,), (n, 1)):
        raise ValueError(f"scale: expected [{n}] or [{n}, 1] (q's rows), got shape {list(scale.shape)}")
    if bias is not None and (bias.shape != (n,) or bias.dtype != x.dtype):
        raise ValueError(f"bias: expected [{n}] (q's rows) of {x.dtype}, got {list(bias.shape)} of {bias.dtype}")
    for name, tensor in (("q", q), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {tensor.device}")


@triton.jit(do_not_specialize=["m", "steps"])
def w8a16_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, y_ptr, m, n, k, steps, stride_xm,
    BIAS: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of yᵀ for BLOCK_M tokens, from `steps` blocks of K: one part of it. EVEN: none reaches beyond k."""
    previous_done(PDL)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    inside, there = (offs_n < n)[:, None], (offs_m < m)[:, None]
    w_ptrs = w_ptr + offs_n.to(tl.int64)[:, None] * k + offs_k[None, :]
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + offs_k[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first = tl.program_id(2) * steps
    for step in range(first, tl.minimum(first + steps, tl.cdiv(k, BLOCK_K))):
        begin = step * BLOCK_K
        keep = (begin + offs_k < k)[None, :]
        w = tl.load(w_ptrs + begin, mask=inside if EVEN else inside & keep, other=0)
        x = tl.load(x_ptrs + begin, mask=there if EVEN else there & keep, other=0.0)
        acc = tl.dot(w.to(x.dtype), x.T, acc, input_precision="ieee")
    acc *= tl.load(scale_ptr + offs_n, mask=offs_n < n, other=0.0).to(tl.float32)[:, None]
    if BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < n, other=0.0).to(tl.float32)[:, None]
    row = (tl.program_id(2) * m + offs_m).to(tl.int64)  # y is [parts, M, N]
    tl.store(
        y_ptr + row[None, :] * n + offs_n[:, None], acc.to(y_ptr.dtype.element_ty), mask=inside & (offs_m < m)[None, :]
    )


def _sizes(x: Tensor, m: int, n: int) -> dict[str, int]:
    tokens = next((size for size in (8, 16, 32, 64) if m <= size), 128)
    kind = "" if on_tensor_cores(x) else "fp32 "
    if kind:  # small tiles, or registers run out
        default = {"BLOCK_M": min(tokens, 16), "BLOCK_N": 32, "BLOCK_K": 64, "PROGRAMS": 3}
    else:
        default = {"BLOCK_M": tokens, "BLOCK_N": 64 if tokens <= 64 else 128, "BLOCK_K": 128, "PROGRAMS": 4}
    return tuned(
        x.device, f"w8a16 {kind}{tokens}{' wide' if n > 8192 else ''}", **default,
        num_warps=4 if tokens <= 64 else 8, num_stages=4 if tokens <= 32 else 3,
    )  # fmt: skip


def _launch(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, early: dict) -> Tensor:
    (m, k), n = x.shape, len(q)
    sizes = _sizes(x, m, n)
    wanted = sizes.pop("PROGRAMS") * sm_count(x.device.index)
    across, down, steps = ceil_div(n, sizes["BLOCK_N"]), ceil_div(m, sizes["BLOCK_M"]), ceil_div(k, sizes["BLOCK_K"])
    parts = split(steps, across * down, wanted)
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    out = y if parts == 1 else torch.empty((parts, m, n), dtype=torch.float32, device=x.device)
    given = x if bias is None else bias
    w8a16_kernel[(across, down, parts)](
        x, q, scale, given, out, m, n, k, ceil_div(steps, parts), x.stride(0),
        BIAS=bias is not None and parts == 1, EVEN=k % sizes["BLOCK_K"] == 0, **early, **sizes,
    )  # fmt: skip
    if parts > 1:
        add_parts_kernel[(ceil_div(m * n, 512),)](
            out, given, y, n, m * n, BIAS=bias is not None, PARTS=parts, BLOCK=512, **early
        )
    return y


@operation(
    "w8a16",
    reference=reference,
    torch=torch_path,
    check=check,
    fake=lambda x, q, scale, bias=None: x.new_empty((*x.shape[:-1], len(q))),
)
def w8a16(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x wᵀ + bias with w = q · scale of 8 bits.

    - x [..., K]; q int8 [N, K]; scale [N] or [N, 1] of a floating dtype; bias [N] of x's dtype, or None

    -> [..., N] in x's dtype, summed in fp32. Raises TypeError and ValueError with the argument's name.
    """
    n, k = q.shape
    if x.numel() == 0 or n == 0:
        return x.new_empty((*x.shape[:-1], n))
    rows = x.reshape(-1, k)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    if len(rows) > WHOLE_ABOVE:
        y = F.linear(rows, q.to(x.dtype)) * scale.view(-1).to(x.dtype)
        return (y if bias is None else y + bias).view(*x.shape[:-1], n)
    early = pdl(x.device) if q.is_contiguous() and scale.is_contiguous() else {"PDL": False}
    y = _launch(rows, q.contiguous(), scale.contiguous(), None if bias is None else bias.contiguous(), early)
    return y.view(*x.shape[:-1], n)
