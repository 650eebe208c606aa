"""The lower rungs of chapter 4's ladders: kernels that work and are not fast yet, and launches with chosen sizes."""

import torch
from torch import Tensor

from minillm import kernels
from minillm.kernels.common import TensorDescriptor, ceil_div, sm_count, tl, triton
from minillm.kernels.lessons.softmax import softmax_kernel
from minillm.kernels.matmul import matmul_kernel, matmul_tma_kernel
from minillm.kernels.rms_norm import rms_norm_kernel
from minillm.kernels.swiglu import swiglu_kernel

EPS = 1e-5


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, SCATTERED: tl.constexpr, BLOCK: tl.constexpr):
    """x + y, a block of neighbors a program; SCATTERED: a program's elements lie as far apart as there are programs."""
    lane = tl.arange(0, BLOCK)
    offs = tl.program_id(0) + lane * tl.num_programs(0) if SCATTERED else tl.program_id(0) * BLOCK + lane
    x, y = tl.load(x_ptr + offs, mask=offs < n), tl.load(y_ptr + offs, mask=offs < n)
    tl.store(out_ptr + offs, x + y, mask=offs < n)


@triton.jit
def three_pass_softmax_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """One row a program, read three times: for the maximum, for the sum, for the result."""
    x_ptr, y_ptr = x_ptr + tl.program_id(0).to(tl.int64) * n, y_ptr + tl.program_id(0).to(tl.int64) * n
    lane, top, total = tl.arange(0, BLOCK), -float("inf"), 0.0
    for start in range(0, n, BLOCK):
        x = tl.load(x_ptr + start + lane, mask=start + lane < n, other=-float("inf")).to(tl.float32)
        top = tl.maximum(top, tl.max(x, 0))
    for start in range(0, n, BLOCK):
        x = tl.load(x_ptr + start + lane, mask=start + lane < n, other=-float("inf")).to(tl.float32)
        total += tl.sum(tl.exp(x - top), 0)
    for start in range(0, n, BLOCK):
        x = tl.load(x_ptr + start + lane, mask=start + lane < n, other=-float("inf")).to(tl.float32)
        tl.store(y_ptr + start + lane, (tl.exp(x - top) / total).to(y_ptr.dtype.element_ty), mask=start + lane < n)


@triton.jit
def two_pass_rms_kernel(x_ptr, w_ptr, y_ptr, n, eps, BLOCK: tl.constexpr):
    """One row a program, read twice: for the squares, for the result."""
    x_ptr, y_ptr = x_ptr + tl.program_id(0).to(tl.int64) * n, y_ptr + tl.program_id(0).to(tl.int64) * n
    lane, squares = tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        x = tl.load(x_ptr + start + lane, mask=start + lane < n, other=0.0).to(tl.float32)
        squares += x * x
    scale = tl.rsqrt(tl.sum(squares, 0) / n + eps)
    for start in range(0, n, BLOCK):
        x = tl.load(x_ptr + start + lane, mask=start + lane < n, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + start + lane, mask=start + lane < n, other=0.0).to(tl.float32)
        tl.store(y_ptr + start + lane, (x * scale * w).to(y_ptr.dtype.element_ty), mask=start + lane < n)


@triton.jit
def no_dot_kernel(x_ptr, w_ptr, y_ptr, n, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """x wᵀ with products and sums, no tensor cores; sizes are multiples of the tile."""
    rows = (tl.program_id(0) // (n // N)).to(tl.int64) * M + tl.arange(0, M)
    columns = (tl.program_id(0) % (n // N)).to(tl.int64) * N + tl.arange(0, N)
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, k, K):
        ks = start + tl.arange(0, K)
        x = tl.load(x_ptr + rows[:, None] * k + ks[None, :]).to(tl.float32)  # [M, K]
        w = tl.load(w_ptr + columns[:, None] * k + ks[None, :]).to(tl.float32)  # [N, K]
        acc += tl.sum(x[:, None, :] * w[None, :, :], 2)
    tl.store(y_ptr + rows[:, None] * n + columns[None, :], acc.to(y_ptr.dtype.element_ty))


@triton.jit
def intensity_kernel(x_ptr, y_ptr, n, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """2 ROUNDS FLOPs an element between one read and one write."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    y = x
    for _ in tl.static_range(ROUNDS):
        y = y * 0.999 + x
    tl.store(y_ptr + offs, y, mask=offs < n)


def launched(kernel, grid: int, out: Tensor, *args, **sizes) -> Tensor:
    kernel[(grid,)](*args, **sizes)
    return out


def add(x: Tensor, y: Tensor, block: int, warps: int, scattered: bool = False) -> Tensor:
    out = torch.empty_like(x)
    sizes = {"SCATTERED": scattered, "BLOCK": block, "num_warps": warps}
    return launched(add_kernel, ceil_div(len(x), block), out, x, y, out, len(x), **sizes)


def softmax(x: Tensor, warps: int) -> Tensor:
    y, n = torch.empty_like(x), x.shape[1]
    sizes = {"MASKED": False, "BLOCK": triton.next_power_of_2(n), "num_warps": warps}
    return launched(softmax_kernel, len(x), y, x, x, y, n, n, 0, **sizes)


def three_passes(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    return launched(three_pass_softmax_kernel, len(x), y, x, y, x.shape[1], BLOCK=1024, num_warps=4)


def softmax_steps(x: Tensor) -> Tensor:
    exponentials = (x - x.amax(-1, keepdim=True)).exp()
    return exponentials / exponentials.sum(-1, keepdim=True)


def two_passes(x: Tensor, w: Tensor) -> Tensor:
    y = torch.empty_like(x)
    return launched(two_pass_rms_kernel, len(x), y, x, w, y, x.shape[1], EPS, BLOCK=1024, num_warps=4)


def norm(x: Tensor, w: Tensor, warps: int) -> Tensor:
    y, n = torch.empty_like(x), x.shape[1]
    sizes = {"ADD": False, "PDL": False, "ROWS": 1, "BLOCK": triton.next_power_of_2(n), "num_warps": warps}
    return launched(rms_norm_kernel, len(x), y, x, x, w, y, y, len(x), n, n, n, EPS, **sizes)


def swiglu(x: Tensor, block: int, warps: int) -> Tensor:
    rows, n = x.shape[0], x.shape[1] // 2
    y = x.new_empty(rows, n)
    sizes = {"PDL": False, "BLOCK": block, "num_warps": warps}
    return launched(swiglu_kernel, ceil_div(n, block) * rows, y, x, y, n, 2 * n, **sizes)


def no_dot(x: Tensor, w: Tensor) -> Tensor:
    (m, k), n = x.shape, w.shape[0]
    y = x.new_empty(m, n)
    return launched(no_dot_kernel, m // 32 * (n // 32), y, x, w, y, n, k, M=32, N=32, K=16, num_warps=4)


def tiles(x: Tensor, w: Tensor, m: int, n: int, k: int, group: int, warps: int, stages: int) -> Tensor:
    y = x.new_empty(x.shape[0], w.shape[0])
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": group, "num_warps": warps, "num_stages": stages}
    grid, (rows, depth), columns = ceil_div(x.shape[0], m) * ceil_div(w.shape[0], n), x.shape, w.shape[0]
    matmul_kernel[(grid,)](
        x, w, y, rows, columns, depth, depth, depth, columns, SWIGLU=False, PRECISION="ieee", **sizes
    )  # fmt: skip
    return y


def tma(x: Tensor, w: Tensor, y: Tensor, sizes: dict) -> object:
    """Launch the copy engine's kernel and return what was compiled."""
    m, n, k = (sizes[f"BLOCK_{axis}"] for axis in "MNK")
    blocks = ((x, [m, k]), (w[None], [1, n, k]), (y, [m, n]))  # with SwiGLU w has two parts
    programs = min(sm_count(0), ceil_div(len(x), m) * ceil_div(len(w), n))
    descriptors = [TensorDescriptor.from_tensor(t, block) for t, block in blocks]
    shape = (x.shape[0], w.shape[0], x.shape[1])
    return matmul_tma_kernel[(programs,)](*descriptors, *shape, SWIGLU=False, PROGRAMS=programs, GROUP_M=8, **sizes)


def sum_then_norm(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return kernels.rms_norm(total, w, EPS), total
