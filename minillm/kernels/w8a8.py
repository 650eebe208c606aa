"""Matrix product of 8-bit numbers, y = (x_q w_qᵀ) · x_scale · w_scale + bias: a scale a row of x and a row of w.

A scale that all of a row shares leaves the sum: 8-bit products are added in int32 (fp32 for fp8), and the scales come
once, in the epilogue. Sums of int8 are exact (K · 2^14 < 2^31 for K up to 131,071): however the work is cut, every bit
of y is the same, and a token's result does not depend on those beside it. fp8 products are added by Hopper's tensor
cores with some 14 bits of mantissa; `max_num_imprecise_acc` of `tl.dot` would move each partial sum to fp32 after so
many products. We leave Triton's default, never, which is also the fast mode of cuBLAS and CUTLASS.

Bytes: M K + N K + 2 M N, half of bf16's where M is small and w counts; FLOPs: 2 M N K, at twice the rate of bf16. For
K4096 N14336 on an H100 (3 TB/s, 1,979 TFLOP/s): w alone takes 20 µs, and above M of about 330 arithmetic is the limit.

Three kernels. `w8a8_tma_kernel` is the one that counts: `matmul`'s persistent kernel, with BLOCK_K twice as long, for
elements half as long. (On Hopper, Triton 3.7 lets a step's products run into the next step's only where their sums are
fp32. It waits for those of int8, so that longer steps, or a second program a multiprocessor, may pay.) Few rows of x
give few tiles, too few for all multiprocessors if w has few rows as well: then K is split, each part writes its sums,
and `sum_kernel` adds these up in a fixed order. `w8a8_kernel` reads through masked pointers and takes what the copy
engine cannot: K no multiple of 16, y in fp32, GPUs before Hopper.

Sources: Jacob et al., 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference"; for fp8 sums, DeepSeek-AI, 2024, "DeepSeek-V3 Technical Report", section 3.3.2.
"""

from typing import Any

import torch
from torch import Tensor

from .common import (
    TENSOR_CORES,
    TensorDescriptor,
    ceil_div,
    fits_descriptor,
    has_copy_engine,
    next_power_of_2,
    operation,
    pdl,
    previous_done,
    sm_count,
    tl,
    triton,
    tuned,
)
from .matmul import tile_of

__all__ = ["w8a8"]

DTYPES = (torch.int8, torch.float8_e4m3fn)
OUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EXACT = 1024  # this many products of int8 add up in fp32 without rounding: 1024 · 2^14 = 2^24


def reference(
    x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """In fp64, in which the sums are exact."""
    y = x_q.double() @ w_q.double().mT * x_scale.double().reshape(*x_q.shape[:-1], 1) * w_scale.double().reshape(-1)
    return (y if bias is None else y + bias.double()).to(out_dtype)


def torch_path(
    x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """Integers by torch's own product, fp8 in fp32."""
    rows = x_q.reshape(-1, x_q.shape[-1])
    y = (_integers(rows, w_q) if x_q.dtype == torch.int8 else rows.float() @ w_q.float().t()).float()  # [M, N]
    y.mul_(x_scale.reshape(-1, 1)).mul_(w_scale.reshape(-1))
    y = y if bias is None else y.add_(bias)
    return y.to(out_dtype).view(*x_q.shape[:-1], len(w_q))


def _integers(x: Tensor, w: Tensor) -> Tensor:
    """Exact x wᵀ of int8.  [M, K], [N, K] -> [M, N] int32"""
    (m, k), n = x.shape, len(w)
    fits = x.is_cpu or (m > 16 and k % 8 == n % 8 == 0)  # what cuBLAS takes
    if not fits or k == 1:  # on CPUs torch 2.13 takes wrong numbers for K = 1
        return _by_floats(x, w)
    if x.is_cpu and m > 1 and k >= 2048:  # long rows of w are read faster when w comes first
        return torch._int_mm(w, x.t()).t().contiguous()
    return torch._int_mm(x, w.t())


def _by_floats(x: Tensor, w: Tensor) -> Tensor:
    """The same by products in fp32, each short enough to be exact."""
    y = torch.zeros((len(x), len(w)), dtype=torch.int32, device=x.device)
    for a, b in zip(x.split(EXACT, 1), w.split(EXACT, 1), strict=True):
        y += (a.float() @ b.float().t()).int()
    return y


def check(
    x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> None:  # fmt: skip
    """Raise unless x_q [..., K] and w_q [N, K] are of one 8-bit dtype, with a scale in fp32 for each row."""
    given = {"x_q": x_q, "x_scale": x_scale, "w_q": w_q, "w_scale": w_scale, "bias": bias}
    for name, t in given.items():
        if not isinstance(t, Tensor) and not (name == "bias" and t is None):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
        if t is not None and t.device != x_q.device:
            raise ValueError(f"{name}: expected the device of x_q, {x_q.device}, got {t.device}")
    if x_q.dtype not in DTYPES:
        raise TypeError(f"x_q: expected torch.int8 or torch.float8_e4m3fn (see quantize_rows), got {x_q.dtype}")
    if w_q.dtype != x_q.dtype:
        raise TypeError(f"w_q: expected x_q's dtype, {x_q.dtype}, got {w_q.dtype}")
    if w_q.dim() != 2 or x_q.dim() == 0 or not x_q.shape[-1] == w_q.shape[1] > 0:
        raise ValueError(
            f"w_q: expected [N, K] with x_q's last axis as K, 1 or more, got x_q {list(x_q.shape)} and w_q"
            f" {list(w_q.shape)}"
        )
    for name, scale, of in (("x_scale", x_scale, x_q.shape[:-1]), ("w_scale", w_scale, w_q.shape[:1])):
        if scale.dtype != torch.float32 or scale.shape not in (of, (*of, 1)):
            raise ValueError(
                f"{name}: expected {[*of, 1]} of torch.float32, one for each row, got {list(scale.shape)} of"
                f" {scale.dtype}"
            )
    if bias is not None and (bias.shape != w_q.shape[:1] or not bias.is_floating_point()):
        raise ValueError(
            f"bias: expected [{len(w_q)}] (w_q's rows) of a floating dtype, got {list(bias.shape)} of {bias.dtype}"
        )
    if out_dtype not in OUT_DTYPES:
        raise TypeError(f"out_dtype: expected one of {', '.join(map(str, OUT_DTYPES))}, got {out_dtype}")


@triton.jit
def scaled(acc, offs_m, offs_n, m, n, x_scale_ptr, w_scale_ptr, bias_ptr, BIAS: tl.constexpr):
    """The epilogue: sums of products, int32 or fp32, to y in fp32.  [BLOCK_M, BLOCK_N]"""
    x_scale = tl.load(x_scale_ptr + offs_m, mask=offs_m < m, other=0.0)
    w_scale = tl.load(w_scale_ptr + offs_n, mask=offs_n < n, other=0.0)
    y = acc.to(tl.float32) * x_scale[:, None] * w_scale[None, :]
    if BIAS:
        y += tl.load(bias_ptr + offs_n, mask=offs_n < n, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def w8a8_kernel(
    x_ptr, w_ptr, y_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, m, n, k, stride_xm, stride_wn,
    BIAS: tl.constexpr, ACC: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of y a program, any m, n and k."""
    previous_done(PDL)
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M)
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
    w_ptrs = w_ptr + offs_n[None, :] * stride_wn + offs_k[:, None]  # [BLOCK_K, BLOCK_N]
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for start in range(0, k, BLOCK_K):
        x = tl.load(x_ptrs, mask=(offs_m[:, None] < m) & (start + offs_k[None, :] < k), other=0.0)
        w = tl.load(w_ptrs, mask=(offs_n[None, :] < n) & (start + offs_k[:, None] < k), other=0.0)
        acc = tl.dot(x, w, acc, out_dtype=ACC)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    y = scaled(acc, offs_m, offs_n, m, n, x_scale_ptr, w_scale_ptr, bias_ptr, BIAS)
    inside = (offs_m[:, None] < m) & (offs_n[None, :] < n)
    tl.store(y_ptr + offs_m[:, None] * n + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["m"])
def w8a8_tma_kernel(
    x_desc, w_desc, y_desc, sums_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, m, n, k,
    BIAS: tl.constexpr, ACC: tl.constexpr, PDL: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Persistent: a program takes every so many-th piece, a tile of y and one of SPLITS parts of K. What lies outside
    reads as 0 and is not stored.
    """
    previous_done(PDL)
    num_m, num_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    steps = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLITS)  # of each part, the last one's beyond K's end, if need be
    for piece in tl.range(tl.program_id(0), num_m * num_n * SPLITS, tl.num_programs(0), flatten=True):
        tile_m, tile_n = tile_of(piece // SPLITS, num_m, num_n, GROUP_M)
        first = piece % SPLITS * steps
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for step in range(first, first + steps):
            x = x_desc.load([tile_m * BLOCK_M, step * BLOCK_K])  # [BLOCK_M, BLOCK_K]
            w = w_desc.load([tile_n * BLOCK_N, step * BLOCK_K])  # [BLOCK_N, BLOCK_K]
            acc = tl.dot(x, w.T, acc, out_dtype=ACC)
        offs_m, offs_n = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        if SPLITS == 1:
            y = scaled(acc, offs_m, offs_n, m, n, x_scale_ptr, w_scale_ptr, bias_ptr, BIAS)
            y_desc.store([tile_m * BLOCK_M, tile_n * BLOCK_N], y.to(y_desc.dtype))
        else:
            row = (piece % SPLITS * m + offs_m).to(tl.int64)[:, None]
            inside = (offs_m[:, None] < m) & (offs_n[None, :] < n)
            tl.store(sums_ptr + row * n + offs_n[None, :], acc, mask=inside)


@triton.jit(do_not_specialize=["m"])
def sum_kernel(
    sums_ptr, y_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, m, n,
    BIAS: tl.constexpr, ACC: tl.constexpr, PDL: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The parts of K together, from first to last.  sums [SPLITS, m, n] -> y [m, n]"""
    previous_done(PDL)
    offs_m = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offs, inside = offs_m[:, None] * n + offs_n[None, :], offs_n[None, :] < n  # [1, BLOCK]
    acc = tl.zeros((1, BLOCK), ACC)
    for split in tl.static_range(SPLITS):
        acc += tl.load(sums_ptr + split * m.to(tl.int64) * n + offs, mask=inside, other=0.0)
    y = scaled(acc, offs_m, offs_n, m, n, x_scale_ptr, w_scale_ptr, bias_ptr, BIAS)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=inside)


def _sizes(device: torch.device, m: int, n: int, k: int) -> dict[str, int]:
    """Tiles for the copy engine, programs a multiprocessor (PER_SM), and into how many parts K is split.

    Enough pieces to give each program one; and parts of 2,048 or more, for each must fill its pipeline.
    """
    shape_class = "large" if m > 1024 else next(str(size) for size in (16, 64, 128, 256, 1024) if m <= size)
    few = m <= 64
    sizes = tuned(
        device, f"w8a8 {shape_class}{' wide' if m <= 256 and n >= 12_288 else ''}", BLOCK_M=64 if few else 128,
        BLOCK_N=64 if few else 128 if m <= 128 else 256, BLOCK_K=256 if few else 128, GROUP_M=8,
        PER_SM=2 if few else 1, num_warps=4 if few else 8, num_stages=3,
    )  # fmt: skip
    tiles = ceil_div(m, sizes["BLOCK_M"]) * ceil_div(n, sizes["BLOCK_N"])
    return {"SPLITS": max(1, min(k // 2048, sm_count(device.index) * sizes["PER_SM"] // tiles)), **sizes}


def _launch_tma(rows: Tensor, w: Tensor, y: Tensor, epilogue: tuple, how: dict[str, Any], sizes: dict) -> None:
    """epilogue: scales of x and w, and the bias; how: BIAS, ACC and PDL."""
    (m, k), n = rows.shape, len(w)
    block_m, block_n, block_k, splits = (sizes[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLITS"))
    pieces = ceil_div(m, block_m) * ceil_div(n, block_n) * splits
    programs = min(pieces, sm_count(rows.device.index) * sizes["PER_SM"])
    sum_dtype = torch.int32 if rows.dtype == torch.int8 else torch.float32
    sums = torch.empty((splits, m, n), dtype=sum_dtype, device=y.device) if splits > 1 else y
    w8a8_tma_kernel[(programs,)](
        TensorDescriptor.from_tensor(rows, [block_m, block_k]),
        TensorDescriptor.from_tensor(w, [block_n, block_k]),
        TensorDescriptor.from_tensor(y, [block_m, block_n]),
        sums, *epilogue, m, n, k, **how, **{name: value for name, value in sizes.items() if name != "PER_SM"},
    )  # fmt: skip
    if splits > 1:
        sum_kernel[(m, ceil_div(n, 1024))](sums, y, *epilogue, m, n, **how, SPLITS=splits, BLOCK=1024, num_warps=4)


@operation(
    "w8a8",
    reference=reference,
    torch=torch_path,
    check=check,
    fake=lambda x_q, x_scale, w_q, w_scale, bias=None, out_dtype=torch.bfloat16: x_q.new_empty(
        (*x_q.shape[:-1], w_q.shape[0]), dtype=out_dtype
    ),
    since=TENSOR_CORES,
)
def w8a8(
    x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """(x_q w_qᵀ) · x_scale · w_scale + bias, the scales' products and the bias in fp32.

    x_q [..., K] and w_q [N, K], both int8 or both float8_e4m3fn; x_scale [..., 1] or [...] and w_scale [N, 1] or [N],
    fp32; bias [N] or None -> [..., N] in out_dtype (fp32, fp16 or bf16), contiguous. Raises TypeError and ValueError
    with the argument's name.
    """
    (n, k), rows = w_q.shape, x_q.reshape(-1, x_q.shape[-1])
    m = rows.shape[0]
    y = torch.empty((m, n), dtype=out_dtype, device=x_q.device)
    if m == 0 or n == 0:
        return y.view(*x_q.shape[:-1], n)
    how: dict[str, Any] = {"BIAS": bias is not None, "ACC": tl.int32 if x_q.dtype == torch.int8 else tl.float32}
    how |= pdl(x_q.device)
    rows, w = (t if t.stride(-1) == 1 else t.contiguous() for t in (rows, w_q))
    epilogue = (x_scale.contiguous(), w_scale.contiguous(), y if bias is None else bias.contiguous())
    if y.element_size() == 2 and fits_descriptor(rows, w, y) and has_copy_engine(y):
        _launch_tma(rows, w, y, epilogue, how, _sizes(x_q.device, m, n, k))
    else:
        block_m = min(64, max(16, next_power_of_2(m)))
        default = {"BLOCK_N": 64, "BLOCK_K": 32, "GROUP_M": 8, "num_warps": 4, "num_stages": 3}
        sizes = tuned(x_q.device, f"w8a8 pointers {block_m}", **default)
        w8a8_kernel[(ceil_div(m, block_m) * ceil_div(n, sizes["BLOCK_N"]),)](
            rows, w, y, *epilogue, m, n, k, rows.stride(0), w.stride(0), BLOCK_M=block_m, **how, **sizes
        )
    return y.view(*x_q.shape[:-1], n)
