"""y += b (a x) where each token has an adapter of its own, or none: LoRA for many tenants in one batch.

A slot holds an adapter: of each part of a merged layer (q, k and v) a [r, in] and, below one another, b [out, r]; the
scale is in b. Tokens are sorted by adapter once a step (`LoraPlan`), so that those of one are rows of one product:
`shrink_kernel` gives a x [r], `expand_kernel` adds b (a x). What an adapter does not change (`parts` 0) is not read.

Bytes: each adapter that the batch has once, r (in + out) numbers, whatever number of tokens it has: for 64 adapters of
rank 16 at 4096 x 4096 in bf16 17 MB, of which an H100 reads 3 TB/s: 5.6 µs. Beside that x, y and a x, little. So there
must be many programs: `in` is split among them, their sums are stored apart and added up by whoever reads them, always
in the same order. A program finds its tokens as in paged attention: adapter i has its first block at
starts[i] // BLOCK_M + i. What was there before the kernel right before (the plan, adapters) is read without waiting for
that one (`previous_done` tells why).

Sources: Chen et al., 2023, "Punica" (gathered products, SGMV); Sheng et al., 2023, "S-LoRA".
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .common import (
    arguments,
    ceil_div,
    next_power_of_2,
    on_tensor_cores,
    operation,
    pdl,
    previous_done,
    tl,
    triton,
    tuned,
)

__all__ = ["LoraPlan", "multi_lora"]


@dataclass(frozen=True)
class LoraPlan:
    """Which token has which adapter, and tokens sorted by it: made once a step, for all layers.

    adapters [N] int32: 0 for none, i for slot i - 1. order [N] int32: tokens, those of one adapter together; starts
    [slots + 2] int32: where in `order` each adapter's begin, and N.
    """

    adapters: Tensor
    order: Tensor
    starts: Tensor

    @classmethod
    def of(cls, adapters: Tensor, slots: int) -> "LoraPlan":
        """Without waiting for a GPU.  adapters [N] int32, of 0 to slots"""
        found, order = adapters.sort(stable=True)
        bounds = torch.arange(slots + 2, dtype=torch.int32, device=adapters.device)
        return cls(adapters, order.int(), torch.searchsorted(found, bounds, out_int32=True))


def reference(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, parts: Tensor, rows: Sequence[int], adapters: Tensor, order: Tensor,
    starts: Tensor,
) -> None:  # fmt: skip
    """In fp64, token by token."""
    for token, adapter in enumerate(adapters.tolist()):
        if adapter:
            first = 0
            for part, size in enumerate(rows):
                if parts[adapter - 1, part]:
                    low = a[adapter - 1, part].double() @ x[token].double()
                    change = b[adapter - 1, first : first + size].double() @ low
                    y[token, first : first + size] = (y[token, first : first + size].double() + change).to(y.dtype)
                first += size


def torch_path(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, parts: Tensor, rows: Sequence[int], adapters: Tensor, order: Tensor,
    starts: Tensor,
) -> None:  # fmt: skip
    """Adapter by adapter."""
    bounds = starts.tolist()
    for slot, there in enumerate(parts.tolist()):
        begin, end = bounds[slot + 1 : slot + 3]
        if begin == end:
            continue
        everybody, tokens = end - begin == len(x), order[begin:end].long()
        seen = (x if everybody else x[tokens]).to(a.dtype)  # [tokens, in]
        low, first = (seen @ a[slot].flatten(0, 1).T).chunk(len(rows), 1), 0  # [tokens, r] each
        for part, size in enumerate(rows):
            to_part = b[slot, first : first + size].T  # [r, size]
            if there[part] and everybody and y.dtype == b.dtype:
                y[:, first : first + size].addmm_(low[part], to_part)
            elif there[part]:
                y[tokens, first : first + size] += (low[part] @ to_part).to(y.dtype)
            first += size


def check(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, parts: Tensor, rows: Sequence[int], adapters: Tensor, order: Tensor,
    starts: Tensor,
) -> None:  # fmt: skip
    """Raise for shapes that do not fit; plan and `parts` are not read (a GPU would wait)."""
    arguments(y=y, x=x, a=a, b=b)
    if not 1 <= len(rows) <= 3:
        raise ValueError(f"rows: expected those of 1 to 3 parts, got {list(rows)}")
    if y.dim() != 2 or x.dim() != 2 or len(x) != len(y) or y.shape[1] != sum(rows) or y.stride(1) != 1:
        raise ValueError(
            f"y: expected [N, {sum(rows)}] (the sum of rows) beside x [N, in], got {list(y.shape)} and {list(x.shape)}"
        )
    slots, rank = a.shape[0], a.shape[2] if a.dim() == 4 else 0
    if a.dim() != 4 or a.shape[1:] != (len(rows), rank, x.shape[1]) or rank < 16 or rank & (rank - 1):
        raise ValueError(
            f"a: expected [slots, {len(rows)}, r, {x.shape[1]}], r a power of 2 from 16 on, got shape {list(a.shape)}"
        )
    if b.shape != (slots, sum(rows), rank) or a.stride(3) != 1 or b.stride(2) != 1:
        raise ValueError(f"b: expected [{slots}, {sum(rows)}, {rank}], got shape {list(b.shape)}")
    for name, tensor, shape in (
        ("parts", parts, (slots, len(rows))), ("adapters", adapters, (len(x),)), ("order", order, (len(x),)),
        ("starts", starts, (slots + 2,)),
    ):  # fmt: skip
        if tensor.shape != shape or tensor.dtype != torch.int32 or tensor.device != x.device:
            raise ValueError(
                f"{name}: expected int32 {list(shape)} on {x.device}, got {tensor.dtype} {list(tensor.shape)}"
            )


@triton.jit
def tokens_of(block, starts_ptr, slots, tokens, BLOCK_M: tl.constexpr, COUNT: tl.constexpr):
    """The adapter of a block of tokens, and which places in `order` are its: (adapter, first, end).

    All starts are read at once and counted: a search would wait for one after another. COUNT: at least slots + 2.
    """
    adapter = tl.arange(0, COUNT)
    begin = tl.load(starts_ptr + adapter, mask=adapter < slots + 2, other=tokens)
    reached = (begin // BLOCK_M + adapter <= block) & (adapter < slots + 1)
    adapter, start = tl.sum(reached.to(tl.int32)) - 1, tl.max(tl.where(reached, begin, 0))
    end = tl.min(tl.where(reached, tokens, begin))
    return adapter, start + (block - start // BLOCK_M - adapter) * BLOCK_M, end


@triton.jit(do_not_specialize=["tokens"])
def shrink_kernel(
    x_ptr, a_ptr, low_ptr, parts_ptr, order_ptr, starts_ptr, tokens, slots, k, chunk, stride_x, stride_slot,
    stride_part, stride_rank, stride_there, PARTS: tl.constexpr, R: tl.constexpr, COUNT: tl.constexpr,
    PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a x of BLOCK_M tokens of one adapter, one part, over `chunk` of x's columns; at the tokens' places in `order`."""
    adapter, first, end = tokens_of(tl.program_id(0), starts_ptr, slots, tokens, BLOCK_M, COUNT)
    part, split = tl.program_id(1), tl.program_id(2)
    there = tl.load(parts_ptr + (adapter - 1) * stride_there + part, mask=adapter > 0, other=0)
    place = first + tl.arange(0, BLOCK_M)
    keep = place < end
    token = tl.load(order_ptr + place, mask=keep, other=0).to(tl.int64)
    previous_done(PDL)
    if there != 0 and first < end:
        rank, column = tl.arange(0, R), tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + token[:, None] * stride_x
        a_ptrs = a_ptr + (adapter - 1).to(tl.int64) * stride_slot + part * stride_part + rank[:, None] * stride_rank
        acc = tl.zeros((BLOCK_M, R), tl.float32)
        for begin in range(split * chunk, tl.minimum(split * chunk + chunk, k), BLOCK_K):
            at = begin + column
            x = tl.load(x_ptrs + at[None, :], mask=keep[:, None] & (at < k)[None, :], other=0.0)
            a = tl.load(a_ptrs + at[None, :], mask=(at < k)[None, :], other=0.0)
            acc = tl.dot(x.to(a.dtype), a.T, acc, input_precision=PRECISION)
        row = ((split * tokens + place) * PARTS + part).to(tl.int64)
        tl.store(low_ptr + row[:, None] * R + rank[None, :], acc, mask=keep[:, None])


@triton.jit(do_not_specialize=["tokens"])
def expand_kernel(
    low_ptr, b_ptr, y_ptr, parts_ptr, order_ptr, starts_ptr, tokens, slots, rows_0, rows_1, rows_2, stride_y,
    stride_slot, stride_row, stride_there, PARTS: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr,
    COUNT: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds b (a x) to BLOCK_N columns of one part of y, for BLOCK_M tokens of one adapter."""
    adapter, first, end = tokens_of(tl.program_id(0), starts_ptr, slots, tokens, BLOCK_M, COUNT)
    block, part, begin, rows = tl.program_id(1), 0, 0, rows_0  # which part's, and where that begins
    if PARTS > 1:
        blocks = tl.cdiv(rows_0, BLOCK_N)
        if block >= blocks:
            block, part, begin, rows = block - blocks, 1, rows_0, rows_1
            if PARTS > 2:
                blocks = tl.cdiv(rows_1, BLOCK_N)
                if block >= blocks:
                    block, part, begin, rows = block - blocks, 2, rows_0 + rows_1, rows_2
    there = tl.load(parts_ptr + (adapter - 1) * stride_there + part, mask=adapter > 0, other=0)
    place, rank = first + tl.arange(0, BLOCK_M), tl.arange(0, R)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    keep, inside = place < end, column < rows
    token = tl.load(order_ptr + place, mask=keep, other=0).to(tl.int64)
    b_ptrs = b_ptr + (adapter - 1).to(tl.int64) * stride_slot + (begin + column)[:, None] * stride_row
    needed = inside[:, None] & (there != 0) & (first < end)
    b = tl.load(b_ptrs + rank[None, :], mask=needed, other=0.0)
    previous_done(PDL)
    if there != 0 and first < end:
        low = tl.zeros((BLOCK_M, R), tl.float32)
        for split in tl.static_range(SPLITS):
            row = ((split * tokens + place) * PARTS + part).to(tl.int64)
            low += tl.load(low_ptr + row[:, None] * R + rank[None, :], mask=keep[:, None], other=0.0)
        change = tl.dot(low.to(b.dtype), b.T, input_precision=PRECISION)
        y_ptrs = y_ptr + token[:, None] * stride_y + (begin + column)[None, :]
        mask = keep[:, None] & inside[None, :]
        y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptrs, (y + change).to(y_ptr.dtype.element_ty), mask=mask)


_SIZES = {
    "few": {"BLOCK_M": 16, "BLOCK_N": 256, "BLOCK_K": 256, "SPLITS": 4, "num_warps": 4},
    "many": {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "SPLITS": 1, "num_warps": 4},
    "fp32": {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "SPLITS": 4, "num_warps": 4},  # no tensor cores: small tiles
}


@operation(
    "multi_lora",
    reference=reference,
    torch=torch_path,
    check=check,
    fake=lambda y, *_: None,
    in_place=("y",),
)
def multi_lora(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, parts: Tensor, rows: Sequence[int], adapters: Tensor, order: Tensor,
    starts: Tensor,
) -> None:  # fmt: skip
    """Add to y [N, sum(rows)] what each token's adapter makes of x [N, in].

    a [slots, P, r, in] and b [slots, sum(rows), r], r a power of 2 from 16 on (smaller ranks are filled up with 0), any
    strides but the last; rows: of each of the P parts, up to 3; parts [slots, P] int32, any first stride: which of them
    an adapter changes; adapters, order, starts: a `LoraPlan`'s. Summed in fp32; a x is rounded to a's dtype. Raises
    TypeError and ValueError with the argument's name.
    """
    tokens, k, slots, rank = len(x), x.shape[1], a.shape[0], a.shape[2]
    if tokens == 0:
        return
    kind = "fp32" if not on_tensor_cores(a) else "few" if tokens <= 256 else "many"
    sizes = tuned(x.device, f"multi_lora {kind}", **_SIZES[kind])
    block_m, block_n, block_k, warps = (sizes[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps"))
    chunk = ceil_div(ceil_div(k, block_k), sizes["SPLITS"]) * block_k
    splits = ceil_div(k, chunk)
    low = torch.empty((splits, tokens, len(rows), rank), dtype=torch.float32, device=x.device)
    blocks, early = ceil_div(tokens, block_m) + slots, pdl(x.device)
    common = {"PARTS": len(rows), "R": rank, "BLOCK_M": block_m, "num_warps": warps, "num_stages": 3, **early,
              "COUNT": next_power_of_2(slots + 2), "PRECISION": "ieee"}  # fmt: skip
    shrink_kernel[(blocks, len(rows), splits)](
        x, a, low, parts, order, starts, tokens, slots, k, chunk, x.stride(0), *a.stride()[:3], parts.stride(0),
        BLOCK_K=block_k, **common,
    )  # fmt: skip
    of_parts = (*rows, 0, 0)[:3]
    expand_kernel[(blocks, sum(ceil_div(n, block_n) for n in rows))](
        low, b, y, parts, order, starts, tokens, slots, *of_parts, y.stride(0), *b.stride()[:2], parts.stride(0),
        SPLITS=splits, BLOCK_N=block_n, **common,
    )  # fmt: skip
