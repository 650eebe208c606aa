"""Matrix product y = x wᵀ with w as `nn.Linear` keeps it, [N, K]; and with SwiGLU as its epilogue.

FLOPs: 2 M N K. Bytes, if every matrix moves once: (M K + N K + M N) · element size. For 8192³ in bf16 that is 1.1e12
FLOPs for 0.4 GB, 2,700 FLOPs a byte: arithmetic is the limit. A program computes one tile of y, [BLOCK_M, BLOCK_N],
and reads K (BLOCK_M + BLOCK_N) elements for it: the larger the tile, the fewer reads, until accumulators fill the
registers. Programs that run side by side should share rows and columns while these are in L2: hence the order of tiles
in groups of GROUP_M rows.

Two kernels. `matmul_kernel` reads through masked pointers and takes any shape and stride. `matmul_tma_kernel` reads
through Hopper's copy engine by descriptors made on the host, and is persistent: one program a multiprocessor walks many
tiles, so that the loads of the next tile overlap the store of the last.

Sources: the tiling of Goto and van de Geijn, 2008, "Anatomy of high-performance matrix multiplication"; the grouped
order is Triton's tutorial's (Tillet et al., 2019).
"""

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
    sm_count,
    tl,
    triton,
    tuned,
)

__all__ = ["matmul", "matmul_swiglu"]


def reference(x: Tensor, w: Tensor) -> Tensor:
    """In fp64.  x [..., K], w [N, K] -> [..., N]"""
    return (x.double() @ w.double().mT).to(x.dtype)


def torch_path(x: Tensor, w: Tensor) -> Tensor:
    """cuBLAS, MKL, or what torch has."""
    return F.linear(x, w)


def swiglu_reference(x: Tensor, w: Tensor) -> Tensor:
    """In fp64, w's rows being the gate's, then up's."""
    gate, up = (x.double() @ w.double().mT).chunk(2, -1)  # [..., I] each
    return (gate * gate.sigmoid() * up).to(x.dtype)


def swiglu_torch_path(x: Tensor, w: Tensor) -> Tensor:
    """The product, then silu and product."""
    gate, up = F.linear(x, w).chunk(2, -1)  # [..., I] each
    return F.silu(gate) * up


def check(x: Tensor, w: Tensor) -> None:
    """Raise unless x is [..., K] and w [N, K], of one dtype."""
    arguments(x=x, w=w)
    if w.dim() != 2:
        raise ValueError(f"w: expected [N, K], got shape {list(w.shape)}")
    if x.dim() == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"x: expected [..., {w.shape[1]}] (w's K), got shape {list(x.shape)}")
    if x.dtype != w.dtype:
        raise TypeError(f"w: expected x's dtype, {x.dtype}, got {w.dtype}")


def swiglu_check(x: Tensor, w: Tensor) -> None:
    """As `check`, and raise for an odd number of rows in w."""
    check(x, w)
    if w.shape[0] % 2:
        raise ValueError(f"w: expected an even number of rows (the gate's, then up's), got {w.shape[0]}")


@triton.jit
def tile_of(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Tile number -> (row, column) in the grouped order: GROUP_M rows of tiles, column by column."""
    in_group = GROUP_M * num_n
    first_m = (tile // in_group) * GROUP_M
    height = tl.minimum(num_m - first_m, GROUP_M)
    return first_m + (tile % in_group) % height, (tile % in_group) // height


@triton.jit
def finished(acc, SWIGLU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The epilogue.  [BLOCK_M, BLOCK_N] -> the same, or with SWIGLU [BLOCK_M, BLOCK_N / 2] from gate's and up's"""
    if SWIGLU:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        acc = gate * tl.sigmoid(gate) * up
    return acc


@triton.jit
def matmul_kernel(
    x_ptr, w_ptr, y_ptr, m, n, k, stride_xm, stride_wn, stride_ym,
    SWIGLU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of y a program, any m, n and k."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M)
    width: tl.constexpr = BLOCK_N // 2 if SWIGLU else BLOCK_N
    n_y = n // 2 if SWIGLU else n
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column, offs_k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    offs_n = tile_n.to(tl.int64) * width + column % width  # with SWIGLU of gate's rows, then of up's, n / 2 further on
    is_row = offs_n < n_y
    offs_n += column // width * n_y
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
    w_ptrs = w_ptr + offs_n[None, :] * stride_wn + offs_k[:, None]  # [BLOCK_K, BLOCK_N]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        x = tl.load(x_ptrs, mask=(offs_m[:, None] < m) & (start + offs_k[None, :] < k), other=0.0)
        w = tl.load(w_ptrs, mask=is_row[None, :] & (start + offs_k[:, None] < k), other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    y = finished(acc, SWIGLU, BLOCK_M, BLOCK_N).to(y_ptr.dtype.element_ty)
    offs_y = tile_n.to(tl.int64) * width + tl.arange(0, width)
    inside = (offs_m[:, None] < m) & (offs_y[None, :] < n_y)
    tl.store(y_ptr + offs_m[:, None] * stride_ym + offs_y[None, :], y, mask=inside)


@triton.jit
def matmul_tma_kernel(
    x_desc, w_desc, y_desc, m, n, k,
    SWIGLU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Persistent: program i computes the tiles i, i + PROGRAMS, ...; what lies outside reads as 0 and is not stored."""
    num_m, num_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    width: tl.constexpr = BLOCK_N // 2 if SWIGLU else BLOCK_N
    for tile in tl.range(tl.program_id(0), num_m * num_n, PROGRAMS, flatten=True):
        tile_m, tile_n = tile_of(tile, num_m, num_n, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, k, BLOCK_K):
            x = x_desc.load([tile_m * BLOCK_M, start])  # [BLOCK_M, BLOCK_K]
            w = w_desc.load([0, tile_n * width, start]).reshape(BLOCK_N, BLOCK_K)  # [1 or 2, width, BLOCK_K]
            acc = tl.dot(x, w.T, acc)
        y = finished(acc, SWIGLU, BLOCK_M, BLOCK_N)
        y_desc.store([tile_m * BLOCK_M, tile_n * width], y.to(y_desc.dtype))


def _launch(x: Tensor, w: Tensor, fused: bool) -> Tensor:
    (n, k), rows = w.shape, x.reshape(-1, x.shape[-1])
    m, n_y = rows.shape[0], n // 2 if fused else n
    y = torch.empty((m, n_y), dtype=x.dtype, device=x.device)
    if m == 0 or n == 0:
        return y.reshape(*x.shape[:-1], n_y)
    rows, w = (t if t.stride(-1) == 1 else t.contiguous() for t in (rows, w))
    name = "matmul_swiglu" if fused else "matmul"
    shape_class = "large" if m > 1024 else next(str(size) for size in (64, 128, 256, 1024) if m <= size)
    if m <= 256 and n >= 12_288:  # enough columns to give large tiles to every multiprocessor
        shape_class += " wide"
    if k and x.dtype != torch.float32 and fits_descriptor(rows, w, y) and has_copy_engine(x):
        _launch_tma(rows, w, y, fused, tuned(x.device, f"{name} tma {shape_class}", **_TMA))
    else:
        block_m = min(128, max(16, next_power_of_2(m)))
        sizes = tuned(
            x.device, f"{name} {block_m}", BLOCK_N=64, BLOCK_K=32, GROUP_M=8, num_warps=4, num_stages=3
        )  # fmt: skip
        grid = (ceil_div(m, block_m) * ceil_div(n, sizes["BLOCK_N"]),)
        matmul_kernel[grid](
            rows, w, y, m, n, k, rows.stride(0), w.stride(0), y.stride(0),
            SWIGLU=fused, PRECISION="ieee", BLOCK_M=block_m, **sizes,
        )  # fmt: skip
    return y.reshape(*x.shape[:-1], n_y)


# On an H100, 8192³ in bf16: the tile that fills the registers of two warp groups.
_TMA = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 8, "num_stages": 3}


def _launch_tma(x: Tensor, w: Tensor, y: Tensor, fused: bool, sizes: dict) -> None:
    (m, k), n, parts = x.shape, w.shape[0], 2 if fused else 1
    block_m, block_n, block_k = sizes["BLOCK_M"], sizes["BLOCK_N"], sizes["BLOCK_K"]
    tiles = ceil_div(m, block_m) * ceil_div(n, block_n)
    programs = min(tiles, sm_count(x.device.index))
    matmul_tma_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [block_m, block_k]),
        TensorDescriptor.from_tensor(w.view(parts, n // parts, k), [parts, block_n // parts, block_k]),
        TensorDescriptor.from_tensor(y, [block_m, block_n // parts]),
        m, n, k, SWIGLU=fused, PROGRAMS=programs, **sizes,
    )  # fmt: skip


@operation(
    "matmul",
    reference=reference,
    torch=torch_path,
    check=check,
    fake=lambda x, w: x.new_empty((*x.shape[:-1], w.shape[0])),
    since=TENSOR_CORES,
)
def matmul(x: Tensor, w: Tensor) -> Tensor:
    """x wᵀ, accumulated in fp32 (fp32 inputs without TF32).

    x [..., K], w [N, K] -> [..., N] in x's dtype, contiguous. Raises TypeError and ValueError with the argument's name.
    """
    return _launch(x, w, fused=False)


@operation(
    "matmul_swiglu",
    reference=swiglu_reference,
    torch=swiglu_torch_path,
    check=swiglu_check,
    fake=lambda x, w: x.new_empty((*x.shape[:-1], w.shape[0] // 2)),
    since=TENSOR_CORES,
)
def matmul_swiglu(x: Tensor, w: Tensor) -> Tensor:
    """silu(x gateᵀ) · (x upᵀ) in one kernel, w's rows being the gate's, then up's.

    x [..., K], w [2 I, K] -> [..., I] in x's dtype. Raises TypeError and ValueError with the argument's name.
    """
    return _launch(x, w, fused=True)
