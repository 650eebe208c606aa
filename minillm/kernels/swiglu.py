"""SwiGLU: silu(gate) · up, where one product gave both: gate_up [..., 2 I] -> [..., I]; and as that product's epilogue.

Bytes: 2 I read and I written for each token. FLOPs: about 6 an element of the result. Memory is the limit. torch's two
operations write silu(gate) and read it again: 5 I in place of 3. As the epilogue of the product (`matmul_swiglu`) even
the 2 I never leave the chip: the tile that holds a gate's column holds its up column beside it.

Source: Shazeer, 2020, "GLU Variants Improve Transformer".
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import arguments, ceil_div, operation, pdl, previous_done, tl, triton, tuned

__all__ = ["swiglu"]


def reference(gate_up: Tensor) -> Tensor:
    """In fp64.  [..., 2 I] -> [..., I]"""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return (gate * gate.sigmoid() * up).to(gate_up.dtype)


def torch_path(gate_up: Tensor) -> Tensor:
    """Two operations."""
    gate, up = gate_up.chunk(2, dim=-1)  # [..., I] each
    if torch.is_grad_enabled():
        return F.silu(gate) * up
    return F.silu(gate).mul_(up)


def check(gate_up: Tensor) -> None:
    """Raise for a last axis that is odd or empty."""
    arguments(gate_up=gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2 or gate_up.shape[-1] == 0:
        raise ValueError(
            f"gate_up: expected a last axis of 2 I elements, gate then up, got shape {list(gate_up.shape)}"
        )


@triton.jit
def swiglu_kernel(x_ptr, y_ptr, n, stride_x, PDL: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements of one row a program."""
    previous_done(PDL)
    blocks = tl.cdiv(n, BLOCK)  # of a row: programs that follow one another read what lies side by side
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x_ptr + row * stride_x + offs, mask=offs < n, other=0.0).to(tl.float32)  # [BLOCK]
    up = tl.load(x_ptr + row * stride_x + n + offs, mask=offs < n, other=0.0).to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(y_ptr.dtype.element_ty).to(tl.float32)  # rounded where torch rounds
    tl.store(y_ptr + row * n + offs, (silu * up).to(y_ptr.dtype.element_ty), mask=offs < n)


@operation(
    "swiglu",
    reference=reference,
    torch=torch_path,
    check=check,
    fake=lambda gate_up: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
)
def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up for gate and up side by side on the last axis.

    gate_up [..., 2 I] -> [..., I] in its dtype, contiguous. Raises TypeError and ValueError with the argument's name.
    """
    n = gate_up.shape[-1] // 2
    rows = gate_up.reshape(-1, 2 * n)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    y = torch.empty((*gate_up.shape[:-1], n), dtype=gate_up.dtype, device=gate_up.device)
    if rows.shape[0] == 0:
        return y
    sizes = tuned(gate_up.device, "swiglu", BLOCK=4096 if n > 2048 else 1024, num_warps=8)
    swiglu_kernel[(ceil_div(n, sizes["BLOCK"]) * rows.shape[0],)](
        rows, y, n, rows.stride(0), **pdl(rows.device), **sizes
    )
    return y
