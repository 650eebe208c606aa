"""Activations to 8 bits, row by row as they come ("dynamic, per token"): alone, behind RMSNorm, behind SwiGLU.

A row is a token: its largest number sets its scale, so that no calibration is needed and no other token matters.

    int8    scale = amax / 127.5,   q = clamp(round(x / scale), -128, 127)
    fp8     scale = amax / 448,     q = the nearest number of E4M3, whose largest is 448

127.5, half of the 255 steps between -128 and 127, is the convention of compressed-tensors: the largest number falls
half a step beyond 127 if it is positive, and is clamped. Ties go to the even integer. A row of zeros has scale 1. All
is computed in fp32 with IEEE's division, so that scales and numbers equal, bit for bit, those of `minillm.quant.rtn`.

Bytes, a row of K elements of bf16: 2 K read, K + 4 written. FLOPs: about 5 an element, a division among them. Memory is
the limit. The norm and SwiGLU have the row in registers already: fused, what they write and what is read again, 4 K
bytes, stays away. RMSNorm, sum and quantising: 4 K read, 3 K written, in place of 6 K and 5 K.

A row with infinity or NaN gives no useful numbers, and no error: to ask would mean to wait for the GPU.

Source: the scheme is LLM.int8's without its outliers (Dettmers et al., 2022); Micikevicius et al., 2022 (E4M3).
"""

import torch
from torch import Tensor

from .common import arguments, ceil_div, divided, next_power_of_2, operation, pdl, previous_done, tl, triton, tuned
from .rms_norm import add_reference, add_torch_path
from .rms_norm import check as norm_check
from .rms_norm import reference as norm_reference
from .rms_norm import torch_path as norm_torch_path
from .swiglu import check as swiglu_check
from .swiglu import reference as swiglu_reference
from .swiglu import torch_path as swiglu_torch_path

__all__ = ["norm_quantize_rows", "quantize_rows", "swiglu_quantize_rows"]

FP8 = torch.float8_e4m3fn
DTYPES = (torch.int8, FP8)


def reference(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Divisions in fp64, rounded to fp32: IEEE's division in fp32, on any device.  x [..., K]"""
    largest = x.double().abs().amax(-1, keepdim=True)
    scale = (largest / (127.5 if dtype == torch.int8 else 448)).float()
    scale = scale.masked_fill(scale == 0, 1.0)
    y = (x.double() / scale.double()).float()
    return (y.round().clamp(-128, 127) if dtype == torch.int8 else y.clamp(-448, 448)).to(dtype), scale


def torch_path(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """In fp32."""
    x = x.float()
    scale = divided(x.abs().amax(-1, keepdim=True), 127.5 if dtype == torch.int8 else 448)
    scale.masked_fill_(scale == 0, 1.0)
    y = x / scale
    return (y.round_().clamp_(-128, 127) if dtype == torch.int8 else y.clamp_(-448, 448)).to(dtype), scale


def norm_quantize_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum and norm in fp64, each rounded to x's dtype, then the rounding."""
    total = x.clone() if residual is None else add_reference(x, residual, weight, eps)[1]
    return *reference(norm_reference(total, weight, eps), dtype), total


def norm_quantize_torch_path(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor, Tensor]:
    """One after another."""
    if residual is None:
        normed, total = norm_torch_path(x, weight, eps), x.clone()
    else:
        normed, total = add_torch_path(x, residual, weight, eps)
    return *torch_path(normed, dtype), total


def swiglu_quantize_reference(gate_up: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """SwiGLU in fp64, rounded to the input's dtype, then the rounding."""
    return reference(swiglu_reference(gate_up), dtype)


def swiglu_quantize_torch_path(gate_up: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """One after the other."""
    return torch_path(swiglu_torch_path(gate_up), dtype)


def check(x: Tensor, dtype: torch.dtype = torch.int8) -> None:
    """Raise for rows without elements, and for a dtype that is neither int8 nor fp8 E4M3."""
    arguments(x=x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected a last axis of at least 1 element, got shape {list(x.shape)}")
    _check_dtype(dtype)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected torch.int8 or torch.float8_e4m3fn, got {dtype}")


def norm_quantize_check(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype = torch.int8
) -> None:
    """As RMSNorm's, and raise for a residual of another shape or dtype than x, and for another dtype."""
    norm_check(x, weight, eps)
    if residual is not None:
        arguments(x=x, residual=residual)
        if residual.shape != x.shape or residual.dtype != x.dtype:
            raise ValueError(
                f"residual: expected shape {list(x.shape)} and {x.dtype}, as x, got {list(residual.shape)} and"
                f" {residual.dtype}"
            )
    _check_dtype(dtype)


def swiglu_quantize_check(gate_up: Tensor, dtype: torch.dtype = torch.int8) -> None:
    """As SwiGLU's, and raise for another dtype."""
    swiglu_check(gate_up)
    _check_dtype(dtype)


@triton.jit
def quantized(y, TO_FP8: tl.constexpr):
    """Rows in fp32, 0 outside -> (8 bits each, a scale a row).  [ROWS, BLOCK] -> ([ROWS, BLOCK], [ROWS, 1])"""
    largest = tl.max(tl.abs(y), 1)[:, None]  # [ROWS, 1]
    scale = tl.div_rn(largest, 448.0 if TO_FP8 else 127.5)
    scale = tl.where(scale > 0, scale, 1.0)
    y = tl.div_rn(y, scale)  # `/` may be off by its last bit, and a tie then falls to the other side
    if TO_FP8:
        q = tl.minimum(tl.maximum(y, -448.0), 448.0).to(tl.float8e4nv)
    else:
        y = tl.minimum(tl.maximum(y, -128.0), 127.0)
        # Between 2^23 and 2^24 neighbors in fp32 are 1 apart: the sum rounds y to an integer, ties to the even one.
        q = ((y + 12582912.0) - 12582912.0).to(tl.int8)  # 1.5 · 2^23
    return q, scale


@triton.jit
def quantize_rows_kernel(
    x_ptr, residual_ptr, weight_ptr, q_ptr, scale_ptr, total_ptr, rows, n, stride_x, stride_residual, eps,
    NORM: tl.constexpr, ADD: tl.constexpr, TO_FP8: tl.constexpr, PDL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program, each held in registers from read to write; sum and norm round where `rms_norm` does."""
    previous_done(PDL)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]  # [ROWS, 1]
    offs = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    inside = (row < rows) & (offs < n)
    y = tl.load(x_ptr + row * stride_x + offs, mask=inside, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + row * stride_residual + offs, mask=inside, other=0.0)
        y = (y.to(tl.float32) + residual.to(tl.float32)).to(x_ptr.dtype.element_ty)
    if NORM:
        tl.store(total_ptr + row * n + offs, y, mask=inside)
        h = y.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(h * h, 1) / n + eps)[:, None]  # [ROWS, 1]
        weight = tl.load(weight_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        y = ((h * inverse).to(x_ptr.dtype.element_ty).to(tl.float32) * weight).to(x_ptr.dtype.element_ty)
    q, scale = quantized(y.to(tl.float32), TO_FP8)
    tl.store(q_ptr + row * n + offs, q, mask=inside)
    tl.store(scale_ptr + row, scale, mask=row < rows)


@triton.jit
def swiglu_quantize_rows_kernel(
    x_ptr, q_ptr, scale_ptr, rows, n, stride_x,
    TO_FP8: tl.constexpr, PDL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program; rounds where `swiglu` does."""
    previous_done(PDL)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]  # [ROWS, 1]
    offs = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    inside = (row < rows) & (offs < n)
    gate = tl.load(x_ptr + row * stride_x + offs, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * stride_x + n + offs, mask=inside, other=0.0).to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(x_ptr.dtype.element_ty).to(tl.float32)
    q, scale = quantized((silu * up).to(x_ptr.dtype.element_ty).to(tl.float32), TO_FP8)
    tl.store(q_ptr + row * n + offs, q, mask=inside)
    tl.store(scale_ptr + row, scale, mask=row < rows)


def _rows(x: Tensor) -> Tensor:
    """[..., N] -> [rows, N], last axis contiguous."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _sizes(x: Tensor, name: str, n: int) -> dict[str, int]:
    block = next_power_of_2(n)
    default = {"ROWS": max(1, 2048 // block), "num_warps": max(4, min(16, block // 1024))}
    return {**tuned(x.device, f"{name} {block}", **default), "BLOCK": block}


def _empty(x: Tensor, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    q = torch.empty((*x.shape[:-1], n), dtype=dtype, device=x.device)
    return q, torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    n, rows = x.shape[-1], _rows(x)
    q, scale = _empty(x, n, dtype)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device) if weight is not None else x
    if rows.shape[0] == 0:
        return q, scale, total
    added = rows if residual is None else _rows(residual)
    sizes = _sizes(x, "quantize_rows" if weight is None else "norm_quantize_rows", n)
    quantize_rows_kernel[(ceil_div(rows.shape[0], sizes["ROWS"]),)](
        rows, added, rows if weight is None else weight.contiguous(), q, scale, total, rows.shape[0], n,
        rows.stride(0), added.stride(0), eps,
        NORM=weight is not None, ADD=residual is not None, TO_FP8=dtype == FP8, **pdl(x.device), **sizes,
    )  # fmt: skip
    return q, scale, total


@operation(
    "quantize_rows",
    reference=reference,
    torch=torch_path,
    check=check,
    fake=lambda x, dtype=torch.int8: (x.new_empty(x.shape, dtype=dtype), _scales(x)),
)
def quantize_rows(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Round each row to 8 bits with a scale of its own: x ≈ q · scale.

    x [..., K]; dtype torch.int8 or torch.float8_e4m3fn -> (q [..., K] in dtype, scale [..., 1] fp32). Raises TypeError
    and ValueError with the argument's name.
    """
    return _launch(x, None, None, 1.0, dtype)[:2]


@operation(
    "norm_quantize_rows",
    reference=norm_quantize_reference,
    torch=norm_quantize_torch_path,
    check=norm_quantize_check,
    fake=lambda x, residual, weight, eps, dtype=torch.int8: (
        x.new_empty(x.shape, dtype=dtype),
        _scales(x),
        x.new_empty(x.shape),
    ),
)
def norm_quantize_rows(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_rows` of the RMSNorm of x + residual, and the sum itself, which is the residual stream from here on.

    x and residual [..., K] (None: nothing is added), weight [K] -> (q [..., K] in dtype, scale [..., 1] fp32, sum
    [..., K] in x's dtype). Raises TypeError and ValueError with the argument's name.
    """
    return _launch(x, residual, weight, eps, dtype)


@operation(
    "swiglu_quantize_rows",
    reference=swiglu_quantize_reference,
    torch=swiglu_quantize_torch_path,
    check=swiglu_quantize_check,
    fake=lambda gate_up, dtype=torch.int8: (
        gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2), dtype=dtype),
        _scales(gate_up),
    ),
)
def swiglu_quantize_rows(gate_up: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of silu(gate) · up, for gate and up side by side on the last axis.

    gate_up [..., 2 I] -> (q [..., I] in dtype, scale [..., 1] fp32). Raises TypeError and ValueError with the
    argument's name.
    """
    n, rows = gate_up.shape[-1] // 2, _rows(gate_up)
    q, scale = _empty(gate_up, n, dtype)
    if rows.shape[0] == 0:
        return q, scale
    sizes = _sizes(gate_up, "swiglu_quantize_rows", n)
    swiglu_quantize_rows_kernel[(ceil_div(rows.shape[0], sizes["ROWS"]),)](
        rows, q, scale, rows.shape[0], n, rows.stride(0), TO_FP8=dtype == FP8, **pdl(gate_up.device), **sizes
    )
    return q, scale


def _scales(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
