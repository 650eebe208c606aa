"""Rotary positions, in place for queries and keys; and the same with keys and values written to a cache's slots.

Each pair (x_i, x_{i + D/2}) of a head turns by the angle of its token's position:

    x_i       <- x_i cos_i - x_{i+D/2} sin_i
    x_{i+D/2} <- x_{i+D/2} cos_i + x_i sin_i

Bytes a token: (H + H_kv) D elements read and written, and D numbers of cos and sin, which heads share. With the cache
also H_kv D values read and written; the keys go to their slots alone, since attention reads them there: one trip
through the chip instead of two (rotate, then read and copy). FLOPs: 3 an element. Memory is the limit. Qwen3 norms
every head of q and k before it turns them; a program holds whole heads, so that is part of the same trip. So is
rounding to a cache of 8 bits: each head of a key or a value is a row with a scale of its own, from its largest number.

Sources: Su et al., 2021, "RoFormer", with Hugging Face's layout of pairs (the halves of a head); slots as in vLLM
(Kwon et al., 2023).
"""

import torch
from torch import Tensor

from .common import arguments, ceil_div, divided, next_power_of_2, operation, pdl, previous_done, tl, triton, tuned
from .rms_norm import reference as norm_reference
from .rms_norm import torch_path as norm_torch_path

__all__ = ["QUANTIZED_DTYPES", "apply_rope", "quantize_heads", "rope", "rope_and_cache", "rope_factors", "store_rows"]

# Of a cache that has scales: the half of what all its numbers span. For int8 that is half of 255 steps.
QUANTIZED_DTYPES = {torch.int8: 127.5, torch.float8_e4m3fn: 448.0}
SCALE_DTYPES = (torch.float16, torch.float32)


def quantize_heads(x: Tensor, dtype: torch.dtype, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each row over its own scale, to the nearest number of dtype.  x [..., D] -> [..., D] int8 or fp8, scale [...]

    scale = max|x| / QUANTIZED_DTYPES[dtype], 1 for a row of zeros, rounded to its dtype before x is divided by it. Rows
    with NaN or infinity have no finite scale, so that what is read is NaN. For finite ones this is what `minmax_grid`
    and `quantize` of minillm/quant/rtn.py give for a symmetric scheme with strategy "channel".
    """
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    scale = (divided(2 * largest, 255) if dtype == torch.int8 else divided(largest, 448)).to(scale_dtype)
    scale = torch.where(scale == 0, 1, scale)
    x = x / scale.float()
    q = x.round().clamp(-128, 127).nan_to_num() if dtype == torch.int8 else x.clamp(-448, 448)
    return q.to(dtype), scale.squeeze(-1)


def store_rows(x: Tensor, cache: Tensor, scale: Tensor | None, slots: slice | Tensor) -> None:
    """Put each token's row into its slot.  x [N, H_kv, D], cache [slots, H_kv, D], scale [slots, H_kv] or None"""
    if scale is None:
        cache[slots] = x.to(cache.dtype)
    else:
        cache[slots], scale[slots] = quantize_heads(x, cache.dtype, scale.dtype)


def rope_factors(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What both halves of a head are multiplied by, and what each half's partner is.

    cos, sin [..., D/2] -> [..., 1, D] each, the same for all heads: (cos, cos) and (-sin, sin). Computed once, they
    serve all layers of a step.
    """
    cos, sin = cos.to(dtype), sin.to(dtype)
    return torch.cat((cos, cos), -1).unsqueeze(-2), torch.cat((-sin, sin), -1).unsqueeze(-2)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) by its angle.  x [..., heads, D] -> [..., heads, D]

    cos and sin are [..., D/2], or what `rope_factors` makes of them for x's dtype. Pairs are the two halves of a head,
    as in Hugging Face checkpoints (the paper pairs neighbors; the two differ by a fixed permutation).
    """
    if cos.shape[-1] != x.shape[-1]:
        cos, sin = rope_factors(cos, sin, x.dtype)
    return (x * cos).add_(_partners(x).mul_(sin))


def _partners(x: Tensor) -> Tensor:
    """A copy with the halves of each head swapped."""
    return x.roll(x.shape[-1] // 2, -1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """`apply_rope` in place."""
    partners = _partners(x)
    x.mul_(cos).add_(partners.mul_(sin))


def reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """In fp64, then written back."""
    for x in (q, k):
        x.copy_(apply_rope(x.double(), cos.double(), sin.double()))


def torch_path(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """By torch, in place."""
    cos, sin = rope_factors(cos, sin, q.dtype)
    for x in (q, k):
        _turn(x, cos, sin)


def cache_reference(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
    q_weight: Tensor | None = None, k_weight: Tensor | None = None, eps: float = 1e-6,
) -> None:  # fmt: skip
    """`reference` on q and a copy of k, normed if there are weights; then rows stored in their slots."""
    k = k.clone()
    if q_weight is not None and k_weight is not None:
        q.copy_(norm_reference(q, q_weight, eps))
        k.copy_(norm_reference(k, k_weight, eps))
    reference(q, k, cos, sin)
    _store(k, v, k_cache, v_cache, slots, k_scale, v_scale)


def cache_torch_path(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
    q_weight: Tensor | None = None, k_weight: Tensor | None = None, eps: float = 1e-6,
) -> None:  # fmt: skip
    """As `torch_path`, q and k normed if there are weights; then rows stored in their slots."""
    factors = rope_factors(cos, sin, q.dtype)
    if q_weight is not None and k_weight is not None:
        q.copy_(norm_torch_path(q, q_weight, eps))
        k = norm_torch_path(k, k_weight, eps)
    _turn(q, *factors)
    _store(apply_rope(k, *factors), v, k_cache, v_cache, slots, k_scale, v_scale)


def _store(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:  # fmt: skip
    if len(slots) and slots.min() < 0:
        used = slots >= 0
        slots, k, v = slots[used], k[used], v[used]
    store_rows(k, k_cache, k_scale, slots)
    store_rows(v, v_cache, v_scale, slots)


def check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise unless q is [N, H, D], k [N, H_kv, D], cos and sin [N, D/2], D even, heads and features contiguous."""
    arguments(q=q, k=k, cos=cos, sin=sin)
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 3 or x.shape[-1] % 2 or x.shape[-1] == 0:
            raise ValueError(f"{name}: expected [tokens, heads, D] with an even D, got {list(x.shape)}")
        if x.numel() and (x.stride(-1) != 1 or (x.stride(-2) != x.shape[-1] and x.shape[-2] > 1)):
            raise ValueError(f"{name}: expected heads and features side by side in memory, got strides {x.stride()}")
    if k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2] or k.dtype != q.dtype:
        raise ValueError(
            f"k: expected [{q.shape[0]}, heads, {q.shape[2]}] and q's dtype, got {list(k.shape)}, {k.dtype}"
        )
    for name, x in (("cos", cos), ("sin", sin)):
        if x.shape != (q.shape[0], q.shape[2] // 2):
            raise ValueError(f"{name}: expected [{q.shape[0]}, {q.shape[2] // 2}] (tokens, D/2), got {list(x.shape)}")


def cache_check(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
    q_weight: Tensor | None = None, k_weight: Tensor | None = None, eps: float = 1e-6,
) -> None:  # fmt: skip
    """As `check`, and raise unless v is as k, caches are [slots, H_kv, D], with scales if they need them, and slots [N]
    of integers.
    """
    check(q, k, cos, sin)
    arguments(q=q, v=v)
    if v.shape != k.shape or (v.numel() and v.stride(-1) != 1):
        raise ValueError(f"v: expected k's shape {list(k.shape)}, features contiguous, got {list(v.shape)}")
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.dim() != 3 or x.shape[1:] != k.shape[1:] or not x.is_contiguous():
            raise ValueError(f"{name}: expected [slots, {k.shape[1]}, {k.shape[2]}], contiguous, got {list(x.shape)}")
    check_cache(q, k_cache, v_cache, k_scale, v_scale)
    if slots.shape != (q.shape[0],) or slots.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"slots: expected [{q.shape[0]}] of int32 or int64, got {list(slots.shape)}, {slots.dtype}")
    if (q_weight is None) != (k_weight is None):
        raise ValueError("k_weight: expected weights for both q and k, or for none")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and (weight.shape != q.shape[2:] or not weight.is_contiguous()):
            raise ValueError(f"{name}: expected [{q.shape[2]}], contiguous, got {list(weight.shape)}")


CACHE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, *QUANTIZED_DTYPES)


def check_cache(q: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """Raise unless the caches are on q's device, of one known dtype, and have scales if and only if that has 8 bits."""
    for name, cache, scale in (("k", k_cache, k_scale), ("v", v_cache, v_scale)):
        if cache.dtype not in CACHE_DTYPES or cache.dtype != k_cache.dtype:
            raise TypeError(
                f"{name}_cache: expected float16, bfloat16 or float32, or with scales int8 or float8_e4m3fn, both"
                f" caches alike, got {cache.dtype}"
            )
        if cache.device != q.device:
            raise ValueError(f"{name}_cache: expected the device of q, {q.device}, got {cache.device}")
        if cache.dtype not in QUANTIZED_DTYPES:
            if scale is not None:
                raise ValueError(f"{name}_scale: expected None for a cache of {cache.dtype}, got a tensor")
        elif scale is None or scale.shape != cache.shape[:2] or scale.dtype not in SCALE_DTYPES:
            got = "None" if scale is None else f"{list(scale.shape)}, {scale.dtype}"
            raise ValueError(
                f"{name}_scale: expected {list(cache.shape[:2])} (slots, H_kv) of float16 or float32 for a cache of"
                f" {cache.dtype}, got {got}"
            )
        elif scale.device != q.device:
            raise ValueError(f"{name}_scale: expected the device of q, {q.device}, got {scale.device}")
    if k_scale is not None and v_scale is not None:
        found = [(scale.dtype, scale.stride()) for scale in (k_scale, v_scale)]
        if found[0] != found[1]:
            raise ValueError(f"v_scale: expected k_scale's dtype and strides, {found[0]}, got {found[1]}")


@triton.jit
def quantized(first, second, scale_dtype: tl.constexpr, dtype: tl.constexpr):
    """`quantize_heads` of rows whose halves these are.  [..., HALF] twice -> the same of dtype, scale [..., 1]"""
    first, second = first.to(tl.float32), second.to(tl.float32)
    size = tl.maximum(tl.abs(first), tl.abs(second))
    size = tl.where((first != first) | (second != second), float("inf"), size)  # a maximum takes no notice of NaN
    largest = tl.max(size, 2)
    INT8: tl.constexpr = dtype == tl.int8
    scale = tl.div_rn(largest * 2, 255.0) if INT8 else tl.div_rn(largest, 448.0)
    scale = scale.to(scale_dtype)[:, :, None]
    scale = tl.where(scale == 0, 1.0, scale.to(tl.float32))
    first, second = tl.div_rn(first, scale), tl.div_rn(second, scale)
    if INT8:  # adding 1.5 · 2^23 leaves no bits for a fraction: to the nearest, ties to even
        first, second = first + 12582912.0 - 12582912.0, second + 12582912.0 - 12582912.0
        first, second = tl.clamp(first, -128.0, 127.0), tl.clamp(second, -128.0, 127.0)
    else:
        first, second = tl.clamp(first, -448.0, 448.0), tl.clamp(second, -448.0, 448.0)
    return first.to(dtype), second.to(dtype), scale.to(scale_dtype)


@triton.jit
def normed(x, weight, dtype: tl.constexpr):
    """x · weight, rounded to dtype where RMSNorm rounds."""
    return (x.to(dtype).to(tl.float32) * weight.to(tl.float32)).to(dtype).to(tl.float32)


@triton.jit
def rope_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, k_cache_ptr, v_cache_ptr, slot_ptr, k_scale_ptr, v_scale_ptr,
    q_weight_ptr, k_weight_ptr, tokens,
    stride_q, stride_k, stride_v, stride_cos, stride_slot, stride_head, eps,
    H: tl.constexpr, H_KV: tl.constexpr, HALF: tl.constexpr, NORMED: tl.constexpr,
    CACHED: tl.constexpr, QUANTIZED: tl.constexpr, PDL: tl.constexpr, TOKENS: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens and BLOCK_H heads a program; the queries' heads come first, then the keys'."""
    previous_done(PDL)
    blocks = tl.cdiv(H + H_KV, BLOCK_H)  # of heads
    row = (tl.program_id(0) // blocks * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None, None]  # [TOKENS, 1, 1]
    head = (tl.program_id(0) % blocks * BLOCK_H + tl.arange(0, BLOCK_H))[None, :, None]  # [1, BLOCK_H, 1]
    offs_d = tl.arange(0, BLOCK_D)[None, None, :]  # [1, 1, BLOCK_D]
    inside = (row < tokens) & (offs_d < HALF)
    cos = tl.load(cos_ptr + row * stride_cos + offs_d, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + row * stride_cos + offs_d, mask=inside, other=0.0)
    cos = cos.to(q_ptr.dtype.element_ty).to(tl.float32)
    sin = sin.to(q_ptr.dtype.element_ty).to(tl.float32)
    inside = inside & (head < H + H_KV)
    is_key = head >= H
    # One pointer tensor for both, so that a program may hold the last queries and the first keys.
    from_q = q_ptr + row * stride_q + head * (2 * HALF)
    first_ptr = tl.where(is_key, k_ptr + row * stride_k + (head - H) * (2 * HALF), from_q) + offs_d
    first = tl.load(first_ptr, mask=inside, other=0.0).to(tl.float32)  # [TOKENS, BLOCK_H, BLOCK_D]
    second = tl.load(first_ptr + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORMED:
        mean = (tl.sum(first * first, 2) + tl.sum(second * second, 2)) / (2 * HALF)  # [TOKENS, BLOCK_H]
        scale = tl.rsqrt(mean + eps)[:, :, None]
        weight_ptr = tl.where(is_key, k_weight_ptr, q_weight_ptr) + offs_d
        first = normed(first * scale, tl.load(weight_ptr, mask=offs_d < HALF, other=0.0), q_ptr.dtype.element_ty)
        second = normed(
            second * scale, tl.load(weight_ptr + HALF, mask=offs_d < HALF, other=0.0), q_ptr.dtype.element_ty
        )
    new_first = (first * cos - second * sin).to(q_ptr.dtype.element_ty)
    new_second = (second * cos + first * sin).to(q_ptr.dtype.element_ty)
    in_place = inside & (head < H) if CACHED else inside
    tl.store(first_ptr, new_first, mask=in_place)
    tl.store(first_ptr + HALF, new_second, mask=in_place)
    if CACHED:
        slot = tl.load(slot_ptr + row, mask=row < tokens, other=-1).to(tl.int64)  # [TOKENS, 1, 1]; -1: nowhere
        inside = inside & is_key & (slot >= 0)
        to = slot * (H_KV * 2 * HALF) + (head - H) * (2 * HALF) + offs_d
        v_from = v_ptr + row * stride_v + (head - H) * (2 * HALF) + offs_d
        v_first, v_second = tl.load(v_from, mask=inside, other=0.0), tl.load(v_from + HALF, mask=inside, other=0.0)
        if QUANTIZED:
            dtype: tl.constexpr = k_cache_ptr.dtype.element_ty
            scale_dtype: tl.constexpr = k_scale_ptr.dtype.element_ty
            at = slot * stride_slot + (head - H) * stride_head  # [TOKENS, BLOCK_H, 1]
            has_row = (row < tokens) & (head < H + H_KV) & is_key & (slot >= 0)
            k_first, k_second, scale = quantized(new_first, new_second, scale_dtype, dtype)
            tl.store(k_scale_ptr + at, scale, mask=has_row)
            v_first, v_second, scale = quantized(v_first, v_second, scale_dtype, dtype)
            tl.store(v_scale_ptr + at, scale, mask=has_row)
        else:
            k_first, k_second = new_first, new_second
        tl.store(k_cache_ptr + to, k_first.to(k_cache_ptr.dtype.element_ty), mask=inside)
        tl.store(k_cache_ptr + to + HALF, k_second.to(k_cache_ptr.dtype.element_ty), mask=inside)
        tl.store(v_cache_ptr + to, v_first.to(v_cache_ptr.dtype.element_ty), mask=inside)
        tl.store(v_cache_ptr + to + HALF, v_second.to(v_cache_ptr.dtype.element_ty), mask=inside)


def _launch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, cached: tuple[Tensor, ...] | None,
    scales: tuple[Tensor, Tensor] | None = None, weights: tuple[Tensor, Tensor] | None = None, eps: float = 0.0,
) -> None:  # fmt: skip
    tokens, heads, size = q.shape
    if tokens == 0:
        return
    v, k_cache, v_cache, slots = cached or (k, k, k, k)
    cos, sin = cos.contiguous(), sin.contiguous()
    all_heads = heads + k.shape[1]
    block_h = min(16, next_power_of_2(all_heads))
    name = "rope" if cached is None else "rope_and_cache"
    sizes = tuned(q.device, f"{name} {next_power_of_2(size)}", TOKENS=1, num_warps=4)
    rope_kernel[(ceil_div(tokens, sizes["TOKENS"]) * ceil_div(all_heads, block_h),)](
        q, k, v, cos, sin, k_cache, v_cache, slots, *(scales or (k, k)), *(weights or (q, k)), tokens,
        q.stride(0), k.stride(0), v.stride(0), cos.stride(0), *(scales[0].stride() if scales else (0, 0)), eps,
        H=heads, H_KV=k.shape[1], HALF=size // 2, NORMED=weights is not None, CACHED=cached is not None,
        QUANTIZED=scales is not None, BLOCK_H=block_h, BLOCK_D=next_power_of_2(size // 2), **pdl(q.device), **sizes,
    )  # fmt: skip


@operation(
    "rope",
    reference=reference,
    torch=torch_path,
    check=check,
    fake=lambda q, k, cos, sin: None,
    in_place=("q", "k"),
)
def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn every head of q and k by its token's angles, in place.

    q [N, H, D], k [N, H_kv, D] (views into one qkv buffer are fine), cos and sin [N, D/2] of each token's position.
    Raises TypeError and ValueError with the argument's name.
    """
    _launch(q, k, cos, sin, None)


@operation(
    "rope_and_cache",
    reference=cache_reference,
    torch=cache_torch_path,
    check=cache_check,
    fake=lambda *_, **__: None,
    in_place=("q", "k_cache", "v_cache", "k_scale", "v_scale"),
)
def rope_and_cache(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
    q_weight: Tensor | None = None, k_weight: Tensor | None = None, eps: float = 1e-6,
) -> None:  # fmt: skip
    """Turn q in place; write the turned keys, and the values, to their slots in the same pass. k stays as it is.

    q, k, cos and sin as for `rope`; v [N, H_kv, D]; k_cache and v_cache [slots, H_kv, D]; slots [N] int: the row of
    each token, no two alike; -1 writes nowhere. Caches of int8 or float8_e4m3fn have k_scale and v_scale [slots, H_kv],
    fp16 or fp32, and get what `quantize_heads` makes of each head. With q_weight and k_weight [D] every head of q and k
    goes through RMSNorm first (Qwen3).
    """
    weights = None if q_weight is None or k_weight is None else (q_weight, k_weight)
    scales = None if k_scale is None or v_scale is None else (k_scale, v_scale)
    _launch(q, k, cos, sin, (v, k_cache, v_cache, slots), scales, weights, eps)
