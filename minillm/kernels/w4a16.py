"""y = x wᵀ + b with a weight of 4 bits: w[n, k] = (q[n, k] - z[n, g]) · s[n, g], where group g = k // group size.

Bytes: the weight once, N K / 2, and a scale (and zero point) a group; at group 128 in bf16 0.516 a weight, 30.3 MB for
4096 x 14336 where bf16 has 117. FLOPs: 2 M N K, 4 M a byte: up to about M = 64 memory is the limit on an H100.
Next comes arithmetic: at 3 TB/s 5.8e12 weights arrive a second, and 132 multiprocessors issue 28e12 instructions, one a
lane: 4.8 a weight, for everything.

Turning 4 bits into a number takes 1.9 of them. The bits of a bf16 from 128 to 256 count in ones, so OR-ing a nibble
into 128's bits gives 128 + nibble; shift, AND and OR do that for both halves of a 32-bit word, and a subtraction takes
128 + 8 + z from both, exactly (fp16 has 1024 + nibble).

That wants neighbors in k in the two halves of a word. A checkpoint (compressed-tensors) has nibble i of word j =
weight 8 j + i. `repack` makes tiles [K / 64, N, 8]: of 64 weights of a row, nibble i of half h of word j is weight

    16 i + 2 j + h

so nibbles i of the 8 words are 16 neighbors in k, the depth of one tensor-core product, and rows of a tile lie one
after the other. Both orders are taken; the first is repacked in every call on a GPU.

The kernels compute yᵀ = w xᵀ: rows of w fill the 64 rows of a tensor-core product, which tokens could not, and unpacked
weights stay in registers, where only the left operand may be. From Hopper on a copy engine brings what is read, weights
are scaled first, and a step is one product. Elsewhere, in fp32, and for groups that are no multiple of 64, products
with K = 16 are summed for a group, then scaled in fp32. When N gives too few programs, K is split among them, and a
kernel adds up, always in the same order. For many tokens, whose product is bound by arithmetic, the weight is turned
into numbers once, and cuBLAS multiplies.

Sources: Kim et al., 2022, "Who Says Elephants Can't Run" (numbers by OR); Frantar et al., 2024, "MARLIN" (the order).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import (
    INTERPRETED,
    TensorDescriptor,
    arguments,
    ceil_div,
    fits_descriptor,
    has_copy_engine,
    on_tensor_cores,
    operation,
    pdl,
    previous_done,
    sm_count,
    tl,
    triton,
    tuned,
)

__all__ = ["repack", "unpack", "w4a16"]

TILE = 64  # weights of a row in a tile
ONE_SCALE = 1 << 30  # the group size, for the kernel, where a row has one scale
WHOLE_ABOVE = 256  # tokens for which the weight is written out, 2 N K bytes and more, and multiplied by cuBLAS


def unpack(packed: Tensor, k: int) -> Tensor:
    """The integers.  packed int32 [N, K / 8] or tiles [ceil(K / 64), N, 8] -> int8 [N, K], -8 to 7"""
    octets = packed.contiguous().view(torch.uint8)
    nibbles = torch.stack((octets & 15, octets >> 4), -1)
    if packed.dim() == 3:  # [tile, row, word, half, nibble] -> [row, tile, nibble, word, half]
        nibbles = nibbles.view(*packed.shape, 2, 4).permute(1, 0, 4, 2, 3)
    return nibbles.reshape(packed.shape[-2] if packed.dim() == 3 else packed.shape[0], -1)[:, :k].to(torch.int8) - 8


def repack(packed: Tensor, scales: Tensor, zeros: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Into the order that the kernels read: once, when a weight is loaded.

    packed int32 [N, K / 8] -> tiles int32 [ceil(K / 64), N, 8]; scales and zeros keep their shape [N, G], but now
    neighbors in N are neighbors in memory, and zeros have scales' dtype. Where K is no multiple of 64, the last tile is
    filled up.
    """
    k = 8 * packed.shape[1]
    q = F.pad((unpack(packed, k) + 8).view(torch.uint8), (0, -k % TILE), value=8)
    parts = q.view(len(q), -1, 4, 8, 2).permute(1, 0, 3, 4, 2)  # as in `unpack`, back
    tiles = (parts[..., 0::2] | parts[..., 1::2] << 4).flatten(3).view(torch.int32).squeeze(-1)
    return tiles, scales.t().contiguous().t(), None if zeros is None else zeros.to(scales.dtype).t().contiguous().t()


def dequantize(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, k: int, dtype: torch.dtype, exact: torch.dtype
) -> Tensor:  # fmt: skip
    """(q - z) · s, computed in `exact`.  -> [N, K] of dtype"""
    q = unpack(packed, k).unflatten(-1, (scales.shape[1], -1))  # [N, G, size]
    if zeros is not None:
        q = q - zeros[..., None]  # -15 to 15
    return (q.to(exact) * scales[..., None].to(exact)).flatten(1).to(dtype)


def reference(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:  # fmt: skip
    """In fp64."""
    y = x.double() @ dequantize(packed, scales, zeros, x.shape[-1], torch.float64, torch.float64).mT
    return (y if bias is None else y + bias.double()).to(x.dtype)


def torch_path(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:  # fmt: skip
    """The weight in x's dtype, whole, then `F.linear`."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    return F.linear(x, dequantize(packed, scales, zeros, x.shape[-1], x.dtype, exact), bias)


def check(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None = None, bias: Tensor | None = None
) -> None:  # fmt: skip
    """Raise unless the shapes and dtypes are those that `w4a16` names."""
    arguments(x=x, scales=scales)
    k = x.shape[-1] if x.dim() else 0
    if k == 0 or k % 8:
        raise ValueError(f"x: expected [..., K] with K a multiple of 8, got shape {list(x.shape)}")
    if packed.dtype != torch.int32:
        raise TypeError(f"packed: expected int32, 8 weights a word, got {packed.dtype}")
    tiled = packed.dim() == 3
    right = (ceil_div(k, TILE), packed.shape[1], 8) if tiled else (packed.shape[0] if packed.dim() else 0, k // 8)
    if packed.shape != right:
        raise ValueError(
            f"packed: expected [N, {k // 8}] (x's K / 8), or `repack`'s [{ceil_div(k, TILE)}, N, 8], got shape"
            f" {list(packed.shape)}"
        )
    n = right[1] if tiled else right[0]
    if scales.dim() != 2 or scales.shape[0] != n or scales.shape[1] == 0 or k % (8 * scales.shape[1]):
        raise ValueError(
            f"scales: expected [{n}, G] (packed's rows), G groups of a multiple of 8 weights in {k}, got shape"
            f" {list(scales.shape)}"
        )
    whole = scales.dtype if tiled else torch.int8
    if zeros is not None and (zeros.dtype != whole or zeros.shape != scales.shape):
        raise ValueError(
            f"zeros: expected {whole} of scales' shape {list(scales.shape)}, got {zeros.dtype} {list(zeros.shape)}"
        )
    if bias is not None and (bias.shape != (n,) or bias.dtype != x.dtype):
        raise ValueError(f"bias: expected [{n}] (packed's rows) of {x.dtype}, got {list(bias.shape)} of {bias.dtype}")
    for name, tensor in (("packed", packed), ("zeros", zeros), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {tensor.device}")


@triton.jit
def sixteenth(words, i: tl.constexpr, dtype: tl.constexpr):
    """Nibbles i of both halves, plus 128 in bf16 and 1024 in fp16 and fp32.  [...] -> [..., 2]

    All before the product is constants and elementwise, or the compiler would send weights through shared memory. For
    fp32, too, a nibble goes into a 16-bit number: pairs of 16-bit integers came out wrong on an H100 (ptxas 12.8).
    """
    pair = (words >> 4 * i) & 0x000F000F
    kind: tl.constexpr = tl.bfloat16 if dtype == tl.bfloat16 else tl.float16
    pair = pair | (0x43004300 if dtype == tl.bfloat16 else 0x64006400)  # 128 + nibble or 1024 + nibble, twice
    low, high = pair.to(tl.int16).to(kind, bitcast=True), (pair >> 16).to(tl.int16).to(kind, bitcast=True)
    return tl.join(low.to(dtype), high.to(dtype))


@triton.jit
def sixteenths(words, offset, i: tl.constexpr, dtype: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr):
    """Of every tile 16 neighbors, minus `offset`.  words [BLOCK_N, WORDS], offset [BLOCK_N] -> [BLOCK_N, 2 WORDS]"""
    return tl.reshape(sixteenth(words, i, dtype), (BLOCK_N, 2 * WORDS)) - offset[:, None]


@triton.jit
def neighbors(words, dtype: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr):
    """All of whole tiles, neighbors in k beside each other.  words [TILES, BLOCK_N, 8] -> [BLOCK_N, COLUMNS]

    The shapes only name registers anew: this is the order in which a tensor core wants them.
    """
    even = tl.join(sixteenth(words, 0, dtype), sixteenth(words, 2, dtype))
    odd = tl.join(sixteenth(words, 1, dtype), sixteenth(words, 3, dtype))
    q = tl.permute(tl.join(even, odd), (1, 0, 4, 5, 2, 3))  # [row, tile, i // 2, i % 2, word, half]
    return tl.reshape(q, (BLOCK_N, COLUMNS))


@triton.jit
def scale_of(scale_ptr, zero_ptr, rows, inside, ZEROS: tl.constexpr):
    """Of one group: scales, fp32, and 8 + zero point, int32.  rows: offsets [BLOCK_N] -> 2 x [BLOCK_N]"""
    scale = tl.load(scale_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    zero = tl.full(rows.shape, 8, tl.int32)
    if ZEROS:
        zero += tl.load(zero_ptr + rows, mask=inside, other=0).to(tl.int32)
    return scale, zero


@triton.jit(do_not_specialize=["m", "steps"])  # or each number of tokens might be compiled anew
def w4a16_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, bias_ptr, y_ptr, m, n, k, group, steps, stride_xm, stride_sn, stride_sg,
    ZEROS: tl.constexpr, BIAS: tl.constexpr, PER: tl.constexpr, EVEN: tl.constexpr, FIRST: tl.constexpr,
    PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of yᵀ for BLOCK_M tokens, from `steps` steps of TILES tiles each: one part of K.

    PER: how many of a step's four products share a scale. EVEN: no column is beyond k. FIRST: weights are scaled before
    the product, which rounds them to x's dtype, and spares a second accumulator where one fills the registers.
    """
    previous_done(PDL)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = offs_n < n
    word, column = tl.arange(0, 8 * TILES), tl.arange(0, 16 * TILES)
    w_ptrs = w_ptr + (word // 8 * n * 8)[None, :] + (offs_n * 8)[:, None] + (word % 8)[None, :]
    columns = column // 16 * 64 + column % 16
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + columns[None, :]  # [BLOCK_M, 16 TILES]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    above: tl.constexpr = 128 if dtype == tl.bfloat16 else 1024
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first = tl.program_id(2) * steps * TILES
    for tile in range(first, tl.minimum(first + steps * TILES, tl.cdiv(k, 64)), TILES):
        words = tl.load(w_ptrs + tile * n * 8, mask=inside[:, None], other=0)
        for i in tl.static_range(4):
            begin = tile * 64 + i * 16
            if i % PER == 0:
                at = tl.minimum(begin, k - 1) // group * stride_sg  # beyond k nothing counts, but must be there
                scale, zero = scale_of(scale_ptr + at, zero_ptr + at, offs_n * stride_sn, inside, ZEROS)
                offset = (zero + above).to(dtype)  # exact: up to 143 in bf16, 1039 in fp16
                part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            w = sixteenths(words, offset, i, dtype, BLOCK_N, 8 * TILES)
            keep = (offs_m < m)[:, None]
            x = tl.load(x_ptrs + begin, mask=keep if EVEN else keep & (begin + columns < k)[None, :], other=0.0)
            if FIRST:
                acc = tl.dot(w * scale.to(dtype)[:, None], x.T, acc, input_precision="ieee")
            else:
                part = tl.dot(w, x.T, part, input_precision="ieee")
                if i % PER == PER - 1:
                    acc += part * scale[:, None]
    if BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=inside, other=0.0).to(tl.float32)[:, None]
    row = (tl.program_id(2) * m + offs_m).to(tl.int64)  # y is [parts, M, N]
    keep = inside[:, None] & (offs_m < m)[None, :]
    tl.store(y_ptr + row[None, :] * n + offs_n[:, None], acc.to(y_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["m", "steps"])
def w4a16_copied_kernel(
    x_desc, w_desc, scale_desc, zero_desc, bias_ptr, y_ptr, m, n, k, steps,
    ZEROS: tl.constexpr, BIAS: tl.constexpr, GROUP: tl.constexpr, WAIT: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The same, with all that is read brought by the copy engine, which finds 0 beyond a matrix's end.

    A step's TILES tiles are one product with K = 64 TILES and have one scale; weights are scaled before it. WAIT: on a
    GPU. Without it Triton 3.6 and 3.7 let a product run on while the next step's weights are written to its registers.
    """
    previous_done(PDL)
    first_n, first_m = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_M
    dtype: tl.constexpr = x_desc.dtype
    above: tl.constexpr = 136 if dtype == tl.bfloat16 else 1032
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first = tl.program_id(2) * steps * TILES
    last = tl.minimum(first + steps * TILES, tl.cdiv(k, 64))
    tl.assume(first < last)
    for tile in range(first, last, TILES):
        x = x_desc.load([first_m, tile * 64])
        words = w_desc.load([tile, first_n // 4, 0])  # four rows are a line of 128 bytes
        w = neighbors(tl.reshape(words, (TILES, BLOCK_N, 8)), dtype, BLOCK_N, 64 * TILES) - above
        if ZEROS:
            w -= tl.reshape(zero_desc.load([tile * 64 // GROUP, first_n]), (BLOCK_N, 1)).to(dtype)
        w *= tl.reshape(scale_desc.load([tile * 64 // GROUP, first_n]), (BLOCK_N, 1)).to(dtype)
        acc = tl.dot(w, x.T, acc)
        if WAIT:  # no instruction, but it needs the sums
            acc = tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)
    offs_n, offs_m = first_n + tl.arange(0, BLOCK_N), first_m + tl.arange(0, BLOCK_M)
    if BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < n, other=0.0).to(tl.float32)[:, None]
    row = (tl.program_id(2) * m + offs_m).to(tl.int64)
    keep = (offs_n < n)[:, None] & (offs_m < m)[None, :]
    tl.store(y_ptr + row[None, :] * n + offs_n[:, None], acc.to(y_ptr.dtype.element_ty), mask=keep)


@triton.jit
def dequantize_kernel(
    w_ptr, scale_ptr, zero_ptr, out_ptr, n, k, group, stride_sn, stride_sg,
    ZEROS: tl.constexpr, PER: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The weight itself, [N, K] in out's dtype: BLOCK_N rows of TILES tiles, which have one scale or are one tile."""
    previous_done(PDL)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile, inside = tl.program_id(1) * TILES, offs_n < n
    word, column = tl.arange(0, 8 * TILES), tl.arange(0, 16 * TILES)
    columns = tile * 64 + column // 16 * 64 + column % 16
    there = inside[:, None] & (tile + word // 8 < tl.cdiv(k, 64))[None, :]
    at = ((tile + word // 8) * n * 8)[None, :] + (offs_n * 8)[:, None] + (word % 8)[None, :]
    words = tl.load(w_ptr + at, mask=there, other=0)
    for i in tl.static_range(4):
        if i % PER == 0:
            of_group = tl.minimum(tile * 64 + i * 16, k - 1) // group * stride_sg
            scale, zero = scale_of(scale_ptr + of_group, zero_ptr + of_group, offs_n * stride_sn, inside, ZEROS)
        q = sixteenths(words, (zero + 1024).to(tl.float32), i, tl.float32, BLOCK_N, 8 * TILES)
        to = out_ptr + offs_n.to(tl.int64)[:, None] * k + (columns + i * 16)[None, :]
        keep = inside[:, None] & (columns + i * 16 < k)[None, :]
        tl.store(to, (q * scale[:, None]).to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def add_parts_kernel(
    parts_ptr, bias_ptr, y_ptr, n, size, BIAS: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr
):
    """y + bias, from fp32 parts [PARTS, size] of y [size], added up from the first to the last."""
    previous_done(PDL)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(PARTS):
        acc += tl.load(parts_ptr + i * size + offs, mask=offs < size, other=0.0)
    if BIAS:
        acc += tl.load(bias_ptr + offs % n, mask=offs < size, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, acc.to(y_ptr.dtype.element_ty), mask=offs < size)


def _sizes(x: Tensor, m: int, n: int, k: int, group: int, kind: str = "") -> dict:
    """What `tuned` has for the shape class, made to fit: every step's tiles have one scale, or are one tile."""
    tokens = next((size for size in (8, 16, 32, 64, 128) if m <= size), 256)
    default = {"BLOCK_M": min(128, tokens), "BLOCK_N": 64, "TILES": 2, "FIRST": tokens > 64, "PROGRAMS": 3}
    default |= {"num_warps": 4, "num_stages": 4 if tokens <= 64 else 3}
    if kind == "copied ":
        default |= {"BLOCK_M": tokens, "BLOCK_N": 128, "PROGRAMS": 2, "num_stages": 4}
        if tokens > 64:
            default |= {"TILES": 1, "PROGRAMS": 1, "num_warps": 4 if tokens == 128 else 8}
        del default["FIRST"]
    elif not on_tensor_cores(x):  # small tiles, or registers run out
        kind, tokens = "fp32 ", min(tokens, 16)
        default |= {"BLOCK_M": tokens, "BLOCK_N": 32, "FIRST": False, "num_stages": 4}
    elif tokens > 128:
        default |= {"BLOCK_N": 128, "num_warps": 8}
    sizes = tuned(x.device, f"w4a16 {kind}{tokens}{' wide' if n > 8192 else ''}", **default)
    fills = TILE * ceil_div(k, TILE) if group == ONE_SCALE else group
    while sizes["TILES"] > 1 and fills % (TILE * sizes["TILES"]):
        sizes["TILES"] //= 2
    if sizes["TILES"] == 1 and not kind:  # Triton 3.6 miscompiles products of K = 16 for 8 tokens
        sizes["BLOCK_M"] = max(16, sizes["BLOCK_M"])
    return sizes


def split(steps: int, programs: int, wanted: int) -> int:
    """Among how many programs to split `steps`, each at least 4, for `wanted` programs in all: by shapes alone."""
    parts = max(1, min(wanted // programs, steps // 4, 16))
    return ceil_div(steps, ceil_div(steps, parts))  # none is empty


def _products_a_scale(group: int) -> int:
    """Of the four products of a tile."""
    return 4 if group % 64 == 0 else 2 if group % 32 == 0 else 1


def _whole(tiles: Tensor, scales: Tensor, zeros: Tensor | None, k: int, dtype: torch.dtype, early: dict) -> Tensor:
    """The weight [N, K]."""
    n, size = tiles.shape[1], k // scales.shape[1]
    w = torch.empty((n, k), dtype=dtype, device=tiles.device)
    group = ONE_SCALE if scales.shape[1] == 1 else size
    together = 2 if group % (2 * TILE) == 0 else 1
    dequantize_kernel[(ceil_div(n, 64), ceil_div(ceil_div(k, TILE), together))](
        tiles, scales, scales if zeros is None else zeros, w, n, k, group, *scales.stride(),
        ZEROS=zeros is not None, PER=_products_a_scale(group), BLOCK_N=64, TILES=together, num_warps=4, **early,
    )  # fmt: skip
    return w


def _lines(of_groups: Tensor) -> Tensor:
    """[N, G], as `repack` gives it -> [G, N]"""
    return of_groups.t() if of_groups.shape[1] > 1 else of_groups.view(1, -1)


def _launch(x: Tensor, tiles: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, early: dict) -> Tensor:
    (m, k), n = x.shape, tiles.shape[1]
    size = k // scales.shape[1]
    group = ONE_SCALE if scales.shape[1] == 1 else size
    zero = scales if zeros is None else zeros
    by_copy_engine = (
        x.dtype != torch.float32 and group % TILE == 0 and has_copy_engine(x)
        and fits_descriptor(x, tiles, _lines(scales), _lines(zero))
    )  # fmt: skip
    sizes = _sizes(x, m, n, k, group, "copied " if by_copy_engine else "")
    wanted, block_m = sizes.pop("PROGRAMS") * sm_count(x.device.index), sizes["BLOCK_M"]
    block_n, each = sizes["BLOCK_N"], sizes["TILES"]
    across, steps = (ceil_div(n, block_n), ceil_div(m, block_m)), ceil_div(len(tiles), each)
    parts = split(steps, across[0] * across[1], wanted)
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    out = y if parts == 1 else torch.empty((parts, m, n), dtype=torch.float32, device=x.device)
    options = dict(ZEROS=zeros is not None, BIAS=bias is not None and parts == 1, **early, **sizes)
    last = (x if bias is None else bias, out, m, n, k)
    if by_copy_engine:
        w4a16_copied_kernel[(*across, parts)](
            TensorDescriptor.from_tensor(x, [block_m, TILE * each]),
            TensorDescriptor.from_tensor(tiles.view(len(tiles), -1, 32), [each, block_n // 4, 32]),
            *(TensorDescriptor.from_tensor(_lines(t), [1, block_n]) for t in (scales, zero)),
            *last, ceil_div(steps, parts), GROUP=group, WAIT=not INTERPRETED, **options,
        )  # fmt: skip
    else:
        w4a16_kernel[(*across, parts)](
            x, tiles, scales, zero, *last, group, ceil_div(steps, parts), x.stride(0), *scales.stride(),
            PER=_products_a_scale(group), EVEN=k % TILE == 0, **options,
        )  # fmt: skip
    if parts > 1:
        add_parts_kernel[(ceil_div(m * n, 512),)](
            out, x if bias is None else bias, y, n, m * n, BIAS=bias is not None, PARTS=parts, BLOCK=512, **early
        )
    return y


@operation(
    "w4a16",
    reference=reference,
    torch=torch_path,
    check=check,
    fake=lambda x, packed, scales, zeros=None, bias=None: x.new_empty((*x.shape[:-1], scales.shape[0])),
)
def w4a16(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:  # fmt: skip
    """x wᵀ + bias with w = (q - z) · s of 4 bits.

    - x [..., K], K a multiple of 8
    - packed: q + 8, as int32 [N, K / 8] (compressed-tensors) or, which a GPU wants, `repack`'s [ceil(K / 64), N, 8]
    - scales [N, G] of a floating dtype, each for K / G neighbors; zeros: z, int8 [N, G] (beside tiles of scales' dtype,
      as `repack` gives them), or None for 0
    - bias [N] of x's dtype, or None

    -> [..., N] in x's dtype, summed in fp32. The kernel needs groups of a multiple of 16, or whole rows; others are
    torch's. Raises TypeError and ValueError with the argument's name.
    """
    n, k = scales.shape[0], x.shape[-1]
    if x.numel() == 0 or n == 0:
        return x.new_empty((*x.shape[:-1], n))
    if scales.shape[1] > 1 and k // scales.shape[1] % 16:
        return torch_path(x, packed, scales, zeros, bias)
    early = pdl(x.device) if packed.dim() == 3 and packed.is_contiguous() else {"PDL": False}
    if packed.dim() == 2:
        packed, scales, zeros = repack(packed, scales, zeros)
    if zeros is not None and zeros.stride() != scales.stride():
        scales, zeros, early = scales.contiguous(), zeros.contiguous(), {"PDL": False}
    rows = x.reshape(-1, k)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    bias = None if bias is None else bias.contiguous()
    tiles = packed.contiguous()
    if len(rows) > WHOLE_ABOVE:
        return F.linear(rows, _whole(tiles, scales, zeros, k, x.dtype, early), bias).view(*x.shape[:-1], n)
    return _launch(rows, tiles, scales, zeros, bias, early).view(*x.shape[:-1], n)
