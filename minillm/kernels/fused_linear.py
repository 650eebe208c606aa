"""Linear layers for one token: y = x wᵀ + b, and y = f(norm(x + residual) wᵀ + b), each in one kernel.

norm is RMSNorm, f is nothing or SwiGLU over the two halves of w's rows, b is there or not. A single stream decodes one
token a step: x is a vector [K], w is [N, K], and the product has one multiply-add for each weight.

Bytes: w, once: 2 N K in bf16. FLOPs: 2 N K, one a byte, where an H100 could do 240: memory is the limit. But a small
model's matrix is read in 0.4 to 4 µs, and the smallest of kernels takes 1.2 in a CUDA graph (`benchmarks/NOTES.md`).
So what counts as much as bytes is the number of kernels, and norm, sum and SwiGLU ride along: every program reads the
whole vector (a few KB, from L2), forms the sum, and has seen all squares when it is done,

    norm(h) wᵀ = (h · norm_weight) wᵀ / sqrt(mean(h²) + eps),    h = x + residual

With more tokens, cuBLAS and the kernels for each part are faster (`benchmarks/NOTES.md`), and each part runs alone;
with many, SwiGLU rides along again, as the epilogue of our product (`matmul_swiglu`).
On a CPU, too, a product with one vector is not what its library does best: see `torch_path`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import arguments, ceil_div, has_copy_engine, operation, pdl, previous_done, tl, triton, tuned
from .matmul import matmul_swiglu
from .rms_norm import add_reference, add_rms_norm, add_torch_path, rms_norm
from .rms_norm import check as norm_check
from .rms_norm import reference as norm_reference
from .rms_norm import torch_path as norm_torch_path
from .swiglu import reference as swiglu_reference
from .swiglu import swiglu
from .swiglu import torch_path as swiglu_torch_path

__all__ = ["linear", "norm_linear"]

MKL = torch.backends.mkl.is_available()
MANY = 1024  # tokens from which on our product with SwiGLU as its epilogue is faster than cuBLAS and SwiGLU behind it
SHORT = 3072  # numbers of x up to which w xᵀ is the faster product on a CPU (`benchmarks/NOTES.md`)


def reference(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """In fp64.  x [..., K], w [N, K], bias [N] -> [..., N]"""
    y = x.double() @ w.double().mT
    return (y if bias is None else y + bias.double()).to(x.dtype)


def torch_path(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`; for a few short rows in fp32 on a CPU as w xᵀ, which MKL multiplies 1.2 to 3 times as fast.

    Its product with a vector reads short rows of w at half of memory's speed: so one row goes twice.
    """
    k = x.shape[-1]
    rows = x.numel() // max(k, 1)
    few = 0 < rows <= 8 and max(rows, 2) * k <= SHORT
    if not (few and MKL and x.is_cpu and x.dtype is torch.float32):
        return F.linear(x, w, bias)
    flat = x.reshape(rows, k)
    y = torch.mm(w, (flat if rows > 1 else torch.cat((flat, flat))).t())[:, :rows].t()  # [M, N]
    y = y.contiguous().view(*x.shape[:-1], len(w))
    return y if bias is None else y + bias


def norm_linear_reference(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, w: Tensor, eps: float = 1e-6, use_swiglu: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """In fp64, but for the sum, which is rounded to x's dtype: the residual stream from here on."""
    total = x.clone() if residual is None else add_reference(x, residual, norm_weight, eps)[1]
    y = reference(norm_reference(total.double(), norm_weight, eps), w, bias)
    return (swiglu_reference(y) if use_swiglu else y).to(x.dtype), total


def _by_parts(
    norm: Callable, add_norm: Callable, act: Callable, product: Callable, product_and_act: Callable | None = None
) -> Callable[..., tuple[Tensor, Tensor]]:  # fmt: skip
    """`norm_linear` one part after another, by these functions for RMSNorm, the sum with it, SwiGLU and the product;
    the last two as one where there is a function for that, and no bias.
    """

    def run(
        x: Tensor, residual: Tensor | None, norm_weight: Tensor, w: Tensor, eps: float = 1e-6,
        use_swiglu: bool = False, bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if residual is None:
            normed, total = norm(x, norm_weight, eps), x.clone()
        else:
            normed, total = add_norm(x, residual, norm_weight, eps)
        if use_swiglu and product_and_act is not None and bias is None:
            return product_and_act(normed, w), total
        y = product(normed, w, bias)
        return (act(y) if use_swiglu else y), total

    return run


norm_linear_torch_path = _by_parts(norm_torch_path, add_torch_path, swiglu_torch_path, torch_path)
_several_tokens = _by_parts(rms_norm, add_rms_norm, swiglu, F.linear)
_many_tokens = _by_parts(rms_norm, add_rms_norm, swiglu, F.linear, matmul_swiglu)


def check(x: Tensor, w: Tensor, bias: Tensor | None = None) -> None:
    """Raise unless x is [..., K], w [N, K] and bias [N] or None, of one dtype."""
    arguments(x=x, w=w)
    if w.dim() != 2 or x.dim() == 0 or x.shape[-1] != w.shape[1] or x.dtype != w.dtype:
        raise ValueError(
            f"w: expected [N, K] with x's last axis as K, of x's dtype, got x {list(x.shape)} of {x.dtype} and w"
            f" {list(w.shape)} of {w.dtype}"
        )
    if bias is not None:
        arguments(x=x, bias=bias)
        if bias.shape != w.shape[:1] or bias.dtype != x.dtype:
            raise ValueError(
                f"bias: expected [{w.shape[0]}] (w's rows) of {x.dtype}, got {list(bias.shape)} of {bias.dtype}"
            )


def norm_linear_check(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, w: Tensor, eps: float = 1e-6, use_swiglu: bool = False,
    bias: Tensor | None = None,
) -> None:  # fmt: skip
    """As `check` and RMSNorm's, and raise for a residual unlike x, and for SwiGLU over an odd number of rows."""
    check(x, w, bias)
    norm_check(x, norm_weight, eps)
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"residual: expected x's shape and dtype, {list(x.shape)}, got {list(residual.shape)}")
    if use_swiglu and w.shape[0] % 2:
        raise ValueError(f"w: expected an even number of rows (the gate's, then up's), got {w.shape[0]}")


@triton.jit
def one_token_kernel(
    x_ptr, residual_ptr, norm_ptr, w_ptr, bias_ptr, y_ptr, total_ptr, n, k, stride_w, eps,
    NORM: tl.constexpr, ADD: tl.constexpr, SWIGLU: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N features a program: multiply, and add up at the end."""
    offs_n, offs_k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + offs_n.to(tl.int64)[:, None] * stride_w + offs_k[None, :]  # [BLOCK_N, BLOCK_K]
    up_ptrs = w_ptr + (offs_n + n).to(tl.int64)[:, None] * stride_w + offs_k[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    # One step ahead: the first weights are on their way before the kernel that computes x is done.
    both = (offs_n < n)[:, None] & (offs_k < k)[None, :]
    next_w = tl.load(w_ptrs, mask=both, other=0.0, eviction_policy="evict_first")
    if SWIGLU:
        next_up = tl.load(up_ptrs, mask=both, other=0.0, eviction_policy="evict_first")
    previous_done(PDL)
    for start in range(0, k, BLOCK_K):
        inside = start + offs_k < k
        both = (offs_n < n)[:, None] & (start + BLOCK_K + offs_k < k)[None, :]
        h = tl.load(x_ptr + start + offs_k, mask=inside, other=0.0)  # [BLOCK_K]
        if ADD:
            h32 = h.to(tl.float32) + tl.load(residual_ptr + start + offs_k, mask=inside, other=0.0).to(tl.float32)
            h = h32.to(x_ptr.dtype.element_ty)
        if NORM:
            tl.store(total_ptr + start + offs_k, h, mask=inside & (tl.program_id(0) == 0))
        h = h.to(tl.float32)
        if NORM:
            squares += h * h
            h = h * tl.load(norm_ptr + start + offs_k, mask=inside, other=0.0).to(tl.float32)
        w, next_w = next_w, tl.load(w_ptrs + start + BLOCK_K, mask=both, other=0.0, eviction_policy="evict_first")
        acc += w.to(tl.float32) * h[None, :]
        if SWIGLU:
            w = next_up
            next_up = tl.load(up_ptrs + start + BLOCK_K, mask=both, other=0.0, eviction_policy="evict_first")
            up += w.to(tl.float32) * h[None, :]
    scale = tl.rsqrt(tl.sum(squares, 0) / k + eps) if NORM else 1.0
    y = tl.sum(acc, 1) * scale  # [BLOCK_N]
    if BIAS:
        y += tl.load(bias_ptr + offs_n, mask=offs_n < n, other=0.0).to(tl.float32)
    if SWIGLU:
        up_y = tl.sum(up, 1) * scale
        if BIAS:
            up_y += tl.load(bias_ptr + n + offs_n, mask=offs_n < n, other=0.0).to(tl.float32)
        y = y * tl.sigmoid(y) * up_y
    tl.store(y_ptr + offs_n, y.to(y_ptr.dtype.element_ty), mask=offs_n < n)


def _one_token(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor | None, w: Tensor, eps: float, use_swiglu: bool,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    k, n = w.shape[1], w.shape[0] // 2 if use_swiglu else w.shape[0]
    early = pdl(x.device) if w.stride(-1) == 1 else {"PDL": False}  # a copy of w would be the kernel right before
    x, w = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, w))
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    total = x if norm_weight is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # Few rows: fewer of them a program, so that all multiprocessors have work. Short ones (a small model's head): short
    # steps, as much of a long one would be beyond the row's end.
    kind = "small" if n <= 2048 else "narrow" if k < 1024 else "large"
    block_n, block_k, warps = {"small": (2, 1024, 4), "narrow": (16, 128, 2), "large": (8, 512, 4)}[kind]
    sizes = tuned(x.device, f"linear {kind}", BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=3)
    one_token_kernel[(ceil_div(n, sizes["BLOCK_N"]),)](
        x, x if residual is None else residual.contiguous(), x if norm_weight is None else norm_weight.contiguous(), w,
        x if bias is None else bias.contiguous(), y, total, n, k, w.stride(0), eps,
        NORM=norm_weight is not None, ADD=residual is not None, SWIGLU=use_swiglu, BIAS=bias is not None,
        **early, **sizes,
    )  # fmt: skip
    return y, total


@operation(
    "linear",
    reference=reference,
    torch=torch_path,
    check=check,
    fake=lambda x, w, bias=None: x.new_empty((*x.shape[:-1], w.shape[0])),
)
def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x wᵀ + bias.  x [..., K], w [N, K], bias [N] or None -> [..., N] in x's dtype; for one token by a kernel of ours,
    else by cuBLAS. Raises TypeError and ValueError with the argument's name.
    """
    one = x.numel() == x.shape[-1] > 0
    return _one_token(x, None, None, w, 1.0, False, bias)[0] if one else F.linear(x, w, bias)


@operation(
    "norm_linear",
    reference=norm_linear_reference,
    torch=norm_linear_torch_path,
    check=norm_linear_check,
    fake=lambda x, residual, norm_weight, w, eps=1e-6, use_swiglu=False, bias=None: (
        x.new_empty((*x.shape[:-1], w.shape[0] // 2 if use_swiglu else w.shape[0])),
        x.new_empty(x.shape),
    ),
)
def norm_linear(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, w: Tensor, eps: float = 1e-6, use_swiglu: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """f(norm(x + residual) wᵀ + bias), and the sum x + residual itself, which is the residual stream from here on.

    x and residual [..., K] (None: nothing is added), norm_weight [K], w [N, K], bias [N] or None -> ([..., N],
    [..., K]) in x's dtype; with use_swiglu w and bias hold the gate's rows, then up's, and the first result is
    [..., N / 2]. Raises TypeError and ValueError with the argument's name.
    """
    if x.numel() == x.shape[-1]:
        return _one_token(x, residual, norm_weight, w, eps, use_swiglu, bias)
    many = x.numel() >= MANY * x.shape[-1] and x.dtype != torch.float32 and has_copy_engine(x)
    run = _many_tokens if many else _several_tokens
    return run(x, residual, norm_weight, w, eps, use_swiglu, bias)
