"""-inf in the logits of tokens that may not come, where a request's output must have a form (constrained decoding).

Masks come from the host, one bit a token: 19 KB a request for 151,936 tokens, where a byte each would be 152. Requests
in the same state have the same mask, which then comes once. Only what is forbidden is written, and nothing is read but
bits: at most V elements a row.
"""

import torch
from torch import Tensor

from .common import arguments, ceil_div, operation, pdl, previous_done, tl, triton

__all__ = ["mask_logits"]

BLOCK = 4096


def reference(logits: Tensor, rows: Tensor, which: Tensor, masks: Tensor) -> None:
    """Bits unpacked; also the torch path."""
    allowed = (masks[:, :, None] >> torch.arange(32, dtype=torch.int32, device=masks.device)) & 1  # [U, W, 32]
    forbidden = allowed.flatten(1)[:, : logits.shape[1]] == 0
    logits[rows] = logits[rows].masked_fill(forbidden[which], float("-inf"))


def check(logits: Tensor, rows: Tensor, which: Tensor, masks: Tensor) -> None:
    """Raise for shapes and dtypes that do not fit; values are not read (a GPU would wait)."""
    arguments(logits=logits)
    if logits.dim() != 2 or logits.shape[1] == 0 or logits.stride(1) != 1:
        raise ValueError(f"logits: expected [rows, vocabulary], the latter contiguous, got {list(logits.shape)}")
    words = ceil_div(logits.shape[1], 32)
    for name, x, shape, dtype in (
        ("rows", rows, [len(rows)], torch.int64), ("which", which, [len(rows)], torch.int64),
        ("masks", masks, [len(masks), words], torch.int32),
    ):  # fmt: skip
        if list(x.shape) != shape or x.dtype != dtype or x.device != logits.device or not x.is_contiguous():
            raise ValueError(
                f"{name}: expected {shape} of {dtype} on {logits.device}, got {list(x.shape)} of {x.dtype}"
            )


@triton.jit
def mask_logits_kernel(
    logits_ptr, row_ptr, which_ptr, mask_ptr, size, stride, words, PDL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """BLOCK logits of one row a program."""
    previous_done(PDL)
    row, which = tl.load(row_ptr + tl.program_id(0)), tl.load(which_ptr + tl.program_id(0))
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(mask_ptr + which * words + token // 32, mask=token < size, other=-1)
    tl.store(logits_ptr + row * stride + token, -float("inf"), mask=(token < size) & ((word >> (token % 32)) & 1 == 0))


@operation(
    "mask_logits", reference=reference, torch=reference, check=check, fake=lambda logits, *_: None, in_place=("logits",)
)
def mask_logits(logits: Tensor, rows: Tensor, which: Tensor, masks: Tensor) -> None:
    """Set to -inf, in place, what masks forbid: in row rows[i] of logits, by mask which[i].

    logits [S, V] of any floating dtype; rows and which int64 [M]; masks int32 [U, ceil(V / 32)]: token
    32 w + i is bit i of word w, set if it may come. Raises TypeError and ValueError with the argument's name.
    """
    if len(rows):
        size = logits.shape[1]
        mask_logits_kernel[(len(rows), ceil_div(size, BLOCK))](
            logits, rows, which, masks, size, logits.stride(0), masks.shape[1], BLOCK=BLOCK, num_warps=8,
            **pdl(logits.device),
        )  # fmt: skip
