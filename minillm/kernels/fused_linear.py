"""A linear layer with what stands around it in a decoder layer: y = f(norm(x) wᵀ) + residual, few tokens in one kernel.

norm is RMSNorm, f is SwiGLU over the two halves of w's rows, and each of the three may be absent. A decoding step has
one token a sequence, so its products are thin: x is [M, K] with M from 1 to some hundred, w is [N, K].

Bytes: w, once: 2 N K in bf16; x and y are small beside it. FLOPs: 2 M N K, so M a byte: below M of about 240 an H100
waits for memory. For a small model even that is short: reading 1 MB takes 0.4 µs, and starting a kernel that depends on
the one before 1 to 2 µs. So what counts is the number of kernels. Apart, a layer's norms, SwiGLU and sums are kernels
beside the four products; here they ride along, because a norm is one factor a row of x,

    norm(x) wᵀ = (x · norm_weight) wᵀ / sqrt(mean(x²) + eps)

and a program that multiplies a whole row of x with rows of w has seen all of its squares when it is done.

With many tokens the products are large, cuBLAS is hard to beat, and one kernel more costs nothing: each part runs
alone. So it does in fp16, where x · norm_weight could overflow.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import arguments, ceil_div, operation, tl, triton, tuned
from .rms_norm import reference as norm_reference
from .rms_norm import rms_norm
from .rms_norm import torch_path as norm_torch_path
from .swiglu import reference as swiglu_reference
from .swiglu import swiglu
from .swiglu import torch_path as swiglu_torch_path

__all__ = ["fused_linear"]

FEW = 256  # tokens, at most, for one kernel


def reference(
    x: Tensor, w: Tensor, norm_weight: Tensor | None = None, eps: float = 1e-6, residual: Tensor | None = None,
    use_swiglu: bool = False,
) -> Tensor:  # fmt: skip
    """In fp64."""
    h = x.double() if norm_weight is None else norm_reference(x.double(), norm_weight, eps)
    y = h @ w.double().mT  # [..., N]
    y = swiglu_reference(y) if use_swiglu else y
    return (y if residual is None else y + residual.double()).to(x.dtype)


def torch_path(
    x: Tensor, w: Tensor, norm_weight: Tensor | None = None, eps: float = 1e-6, residual: Tensor | None = None,
    use_swiglu: bool = False,
) -> Tensor:  # fmt: skip
    """One after another."""
    y = F.linear(x if norm_weight is None else norm_torch_path(x, norm_weight, eps), w)
    y = swiglu_torch_path(y) if use_swiglu else y
    return y if residual is None else residual + y


def check(
    x: Tensor, w: Tensor, norm_weight: Tensor | None = None, eps: float = 1e-6, residual: Tensor | None = None,
    use_swiglu: bool = False,
) -> None:  # fmt: skip
    """Raise unless x is [..., K], w [N, K], norm_weight [K], residual as the result, all of one dtype."""
    arguments(x=x, w=w)
    if w.dim() != 2 or (use_swiglu and w.shape[0] % 2):
        raise ValueError(f"w: expected [N, K]{', N even (gate, then up)' if use_swiglu else ''}, got {list(w.shape)}")
    if x.dim() == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"x: expected [..., {w.shape[1]}] (w's K), got shape {list(x.shape)}")
    shape = (*x.shape[:-1], w.shape[0] // 2 if use_swiglu else w.shape[0])
    for name, t, expected in (
        ("w", w, w.shape),
        ("norm_weight", norm_weight, x.shape[-1:]),
        ("residual", residual, shape),
    ):
        if t is not None and (t.shape != expected or t.dtype != x.dtype):
            raise ValueError(f"{name}: expected shape {list(expected)} of {x.dtype}, got {list(t.shape)} of {t.dtype}")
    if not eps > 0:
        raise ValueError(f"eps: expected a positive number, got {eps}")


@triton.jit
def one_token_kernel(
    x_ptr, w_ptr, norm_ptr, residual_ptr, y_ptr, n, k, stride_w, eps,
    NORM: tl.constexpr, SWIGLU: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N features of one token a program: multiply, add up at the end."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + offs_n.to(tl.int64)[:, None] * stride_w + offs_k[None, :]  # [BLOCK_N, BLOCK_K]
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, k, BLOCK_K):
        inside = start + offs_k < k
        both = (offs_n < n)[:, None] & inside[None, :]
        x = tl.load(x_ptr + start + offs_k, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x = x * tl.load(norm_ptr + start + offs_k, mask=inside, other=0.0).to(tl.float32)
        acc += tl.load(w_ptrs + start, mask=both, other=0.0, eviction_policy="evict_first").to(tl.float32) * x[None, :]
        if SWIGLU:
            w_up = tl.load(w_ptrs + n * stride_w + start, mask=both, other=0.0, eviction_policy="evict_first")
            up += w_up.to(tl.float32) * x[None, :]
    y, u = tl.sum(acc, 1), tl.sum(up, 1)  # [BLOCK_N]
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / k + eps)
        y, u = y * scale, u * scale
    if SWIGLU:
        y = y * tl.sigmoid(y) * u
    if RESIDUAL:
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32) + tl.load(residual_ptr + offs_n, mask=offs_n < n, other=0.0)
    tl.store(y_ptr + offs_n, y.to(y_ptr.dtype.element_ty), mask=offs_n < n)


@triton.jit
def few_tokens_kernel(
    x_ptr, w_ptr, norm_ptr, residual_ptr, y_ptr, m, n, k, stride_x, stride_w, eps,
    NORM: tl.constexpr, SWIGLU: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y a program. Tokens go fastest through the grid: programs side by side read the same rows of w."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + offs_m[:, None] * stride_x + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
    w_ptrs = w_ptr + offs_n.to(tl.int64)[None, :] * stride_w + offs_k[:, None]  # [BLOCK_K, BLOCK_N]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, k, BLOCK_K):
        inside = start + offs_k < k
        both = (offs_n < n)[None, :] & inside[:, None]
        x = tl.load(x_ptrs + start, mask=(offs_m < m)[:, None] & inside[None, :], other=0.0)
        w = tl.load(w_ptrs + start, mask=both, other=0.0)
        if NORM:
            x32 = x.to(tl.float32)
            squares += tl.sum(x32 * x32, 1)
            norm = tl.load(norm_ptr + start + offs_k, mask=inside, other=0.0).to(tl.float32)
            x = (x32 * norm[None, :]).to(x.dtype)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        if SWIGLU:
            up = tl.dot(x, tl.load(w_ptrs + n * stride_w + start, mask=both, other=0.0), up, input_precision=PRECISION)
    if NORM:
        scale = tl.rsqrt(squares / k + eps)[:, None]
        acc, up = acc * scale, up * scale
    if SWIGLU:
        acc = acc * tl.sigmoid(acc) * up
    at = offs_m.to(tl.int64)[:, None] * n + offs_n[None, :]
    inside = (offs_m < m)[:, None] & (offs_n < n)[None, :]
    if RESIDUAL:
        acc = acc.to(y_ptr.dtype.element_ty).to(tl.float32) + tl.load(residual_ptr + at, mask=inside, other=0.0)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=inside)


# Found on an H100, by the number of tokens up to which each serves.
_SIZES = {
    1: {"BLOCK_N": 8, "BLOCK_K": 512, "num_warps": 4, "num_stages": 3},
    16: {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
    32: {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
    64: {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
    FEW: {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
}


@operation(
    "fused_linear",
    reference=reference,
    torch=torch_path,
    check=check,
    fake=lambda x, w, norm_weight=None, eps=1e-6, residual=None, use_swiglu=False: x.new_empty(
        (*x.shape[:-1], w.shape[0] // 2 if use_swiglu else w.shape[0])
    ),
)
def fused_linear(
    x: Tensor, w: Tensor, norm_weight: Tensor | None = None, eps: float = 1e-6, residual: Tensor | None = None,
    use_swiglu: bool = False,
) -> Tensor:  # fmt: skip
    """f(norm(x) wᵀ) + residual: with norm_weight [K] RMSNorm goes first, with use_swiglu silu(gate) · up follows.

    x [..., K], w [N, K] (with SwiGLU the gate's rows, then up's), residual as the result -> [..., N], or [..., N / 2]
    with SwiGLU, contiguous. Raises TypeError and ValueError with the argument's name.
    """
    rows, n = x.reshape(-1, x.shape[-1]), w.shape[0] // 2 if use_swiglu else w.shape[0]
    m, k = rows.shape
    if m > FEW or x.dtype == torch.float16:
        y = F.linear(x if norm_weight is None else rms_norm(x, norm_weight, eps), w)
        y = swiglu(y) if use_swiglu else y
        return y if residual is None else y.add_(residual)
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    if m == 0:
        return y
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    few = next(size for size in _SIZES if m <= size)
    sizes = tuned(x.device, f"fused_linear {few}", **_SIZES[few])
    tensors = (
        rows,
        w,
        rows if norm_weight is None else norm_weight,
        rows if residual is None else residual.contiguous(),
        y,
    )
    flags = {"NORM": norm_weight is not None, "SWIGLU": use_swiglu, "RESIDUAL": residual is not None}
    blocks = ceil_div(n, sizes["BLOCK_N"])
    if m == 1:
        one_token_kernel[(blocks,)](*tensors, n, k, w.stride(0), eps, **flags, **sizes)
    else:
        few_tokens_kernel[(ceil_div(m, sizes["BLOCK_M"]), blocks)](
            *tensors, m, n, k, rows.stride(0), w.stride(0), eps, PRECISION="ieee", **flags, **sizes
        )
    return y
