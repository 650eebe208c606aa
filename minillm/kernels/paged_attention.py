"""Attention of new queries to keys and values that lie in blocks, found through a table: one kernel for every batch.

Sequence i has the queries cu_seqlens_q[i] ... cu_seqlens_q[i + 1] - 1, which stand at the end of its context_lens[i]
tokens. Its token j has its key and value in the slot

    block_tables[i, j // block_size] · block_size + j % block_size

One query a sequence is decoding, many are a prompt or a chunk of one, and a batch may mix them.

Bytes: a decoding step reads every key and value of its sequences once, 2 · context · H_kv · D · element size each, for
4 · context · H · D FLOPs: in bf16 as many FLOPs a byte as query heads share a key (1 to 8), where an H100 could do 240.
Memory is the limit, and the reads are all that counts. So the query heads of one key/value head are rows of one
product, which reads each key once for all of them; and when there are fewer sequences, or blocks of a prompt's queries,
than the chip has room for, the context is split among programs, and a second kernel joins their results by their
log-sum-exp. The number of splits follows from the shapes alone, never from lengths: a CUDA graph replays whatever was
captured. (A split of a prompt's context has at least CHUNK keys: for fewer the join would cost more than it saves.)

A prompt is limited by arithmetic, and by the instructions around it: of its tiles only those at the diagonal, and at a
window's edge, are masked, as in flash_attention.py.

A cache of 8 bits halves the bytes. It has a scale a token and head (`quantize_heads` in rope.py makes them), and
nothing need be multiplied out: q · (k s) = (q · k) s, one number a key, and Σ p (v s) = Σ (p s) v. What then limits is
instructions: at 3 TB/s 13 numbers arrive in a multiprocessor's cycle, which issues 128 instructions, one a lane. So the
cache is read as 16-bit words of two features, which tensor cores' loads can transpose (bytes they could not), and even
and odd features are two products of fp16: fp16 holds every number of 8 bits, and turning a byte into one of bf16 takes
twice the instructions. A query, whose range may be bf16's, is first divided by a power of two.

Sources: Kwon et al., 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention"; Dao et
al., 2023, "Flash-Decoding" (the split); the search for a program's sequence is vLLM's.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import (
    INTERPRETED,
    arguments,
    ceil_div,
    next_power_of_2,
    on_tensor_cores,
    operation,
    pdl,
    previous_done,
    sm_count,
    tl,
    triton,
    tuned,
)
from .rope import QUANTIZED_DTYPES, check_cache, store_rows

__all__ = ["AttentionPlan", "paged_attention"]

MAX_HEAD_SIZE = 256


SHORT = 1024  # tokens up to which a context that is split is read in small tiles, so that more programs share it
FEW = 16  # queries a sequence up to which contexts are split: of one token and guesses that are checked behind it
CHUNK = 1024  # keys that a split of a prompt's chunk has at least
ALONE = 256  # tokens from which on a sequence that lies in a row is attended to by itself: less copied, one call more
FORMATS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
GAIN = tl.constexpr(64.0)  # of p · scale_v on its way through the product: in fp16 small ones would lose bits
ON_GPU = tl.constexpr(not INTERPRETED)  # the interpreter has no inline assembly


def dequantized(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows of a cache as numbers of dtype, by their scales if they have any.  x [..., D], scale [...]"""
    if scale is None:
        return x if x.dtype == dtype else x.to(dtype)
    exact = torch.promote_types(dtype, torch.float32)
    return (x.to(exact) * scale.to(exact).unsqueeze(-1)).to(dtype)


def gathered(cache: Tensor, table: Tensor, first: int, last: int, block_size: int) -> Tensor:
    """The tokens first ... last - 1 of one sequence.  cache [slots, H_kv, D], table [W] -> [last - first, H_kv, D]"""
    token = torch.arange(first, last, device=cache.device)
    return cache[table[token // block_size].long() * block_size + token % block_size]


def reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, cu_seqlens_q: Tensor,
    max_seqlen_q: int, block_size: int, scale: float | None = None, window: int = 0,
    max_seqlen_k: int | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """In fp64, sequence by sequence, keys and values gathered, the scores written out."""
    scale, out, bounds = q.shape[-1] ** -0.5 if scale is None else scale, torch.zeros_like(q), cu_seqlens_q.tolist()
    for i, length in enumerate(context_lens.tolist()):
        first, last = bounds[i], bounds[i + 1]
        if length == 0 or first == last:
            continue
        position = torch.arange(length - (last - first), length, device=q.device)[:, None]
        oldest = max(0, length - (last - first) - window + 1) if window else 0  # the first key that a query sees
        key = torch.arange(oldest, length, device=q.device)
        groups = q.shape[1] // k_cache.shape[1]
        k, v = (
            gathered(
                dequantized(c, factor, torch.float64), block_tables[i], oldest, length, block_size
            ).repeat_interleave(groups, dim=1)
            for c, factor in ((k_cache, k_scale), (v_cache, v_scale))
        )  # [keys, H, D]
        scores = torch.einsum("thd,shd->hts", q[first:last].double(), k) * scale
        hidden = (key > position) | (key <= position - window) if window else key > position
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[first:last] = torch.einsum("hts,shd->thd", weights, v).to(q.dtype)
    return out


@dataclass(frozen=True)
class Call:
    """One call of torch's attention: B sequences of T queries and S keys each, shorter ones padded.

    rows, of q, and slots, of the cache, are slices where they lie side by side in memory: then nothing is copied.
    """

    rows: slice | Tensor  # [B · T]
    slots: slice | Tensor  # [B · S]
    sequences: int
    mask: Tensor | None  # [B, 1, T, S], 0 or -inf
    causal: bool

    def __call__(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float | None, k_scale: Tensor | None,
        v_scale: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """q [B · T, H, D], the rows already taken -> [B · T, H, D]"""
        k, v = self._taken(k_cache, k_scale, q.dtype), self._taken(v_cache, v_scale, q.dtype)  # [B, H_kv, S, D]
        one = q.shape[0] == self.sequences  # T is 1, and its axis stands between heads and features by itself
        q = q.unsqueeze(2) if one else q.unflatten(0, (self.sequences, -1)).transpose(1, 2)  # [B, H, T, D]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask, is_causal=self.causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.squeeze(2) if one else out.transpose(1, 2).flatten(0, 1)

    def _taken(self, cache: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        taken = dequantized(self._rows(cache), None if scale is None else self._rows(scale), dtype)  # [B · S, H_kv, D]
        return taken.unflatten(0, (self.sequences, -1)).transpose(1, 2)

    def _rows(self, cache: Tensor) -> Tensor:
        # index_select: six times as fast as cache[slots] on a CPU
        return cache[self.slots] if isinstance(self.slots, slice) else cache.index_select(0, self.slots)


@dataclass(frozen=True)
class Sequence:
    """What one step has of a sequence: its row of the table, its queries' rows of q, and its length with them."""

    table: int
    first: int
    last: int
    length: int

    @property
    def count(self) -> int:
        """How many queries."""
        return self.last - self.first

    def oldest(self, window: int) -> int:
        """The first token that one of the queries sees."""
        return max(0, self.length - self.count - window + 1) if window else 0


class AttentionPlan:
    """Where a step's sequences have their queries, keys and values: found out once a step, used by every layer.

        plan = AttentionPlan(block_tables, context_lens, cu_seqlens_q, block_size)      # as for `paged_attention`
        plan.write(k, v, k_cache, v_cache)              # a layer's new keys and values into their slots
        out = plan.attend(q, k_cache, v_cache)          # what paged_attention gives, by torch

    For the torch path alone, and for one step: it reads tables and lengths when it is made. A sequence whose blocks
    follow one another is read in place; others, if they have one query each, share a call of torch's attention.
    """

    def __init__(self, block_tables: Tensor, context_lens: Tensor, cu_seqlens_q: Tensor, block_size: int) -> None:
        self.block_tables, self.block_size = block_tables, block_size
        bounds = cu_seqlens_q.tolist()
        found = enumerate(zip(bounds, bounds[1:], context_lens.tolist(), strict=False))
        sequences = (Sequence(i, first, last, length) for i, (first, last, length) in found)
        self.sequences = [s for s in sequences if s.count and s.length]
        self.queries = sum(s.count for s in self.sequences)
        self.calls: dict[tuple[int, torch.dtype], list[Call]] = {}
        self.writes: list[tuple[slice | Tensor, slice | Tensor]] | None = None

    def write(
        self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Put keys and values of the queries' tokens into their slots.  k, v [N, H_kv, D], caches [slots, H_kv, D],
        scales [slots, H_kv]
        """
        if self.writes is None:
            self.writes = self._writes()
        for slots, rows in self.writes:
            if self.queries != k.shape[0]:  # else these are all rows, in order
                k, v = k[rows], v[rows]
            store_rows(k, k_cache, k_scale, slots)
            store_rows(v, v_cache, v_scale, slots)

    def attend(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float | None = None, window: int = 0,
        k_scale: Tensor | None = None, v_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """What `paged_attention` gives.  q [N, H, D], caches [slots, H_kv, D] -> [N, H, D]"""
        calls = self.calls.get((window, q.dtype))
        if calls is None:
            calls = self.calls[window, q.dtype] = self._calls(window, q.dtype)
        if len(calls) == 1 and self.queries == q.shape[0]:
            return calls[0](q, k_cache, v_cache, scale, k_scale, v_scale)
        out = q.new_zeros(q.shape)
        for call in calls:
            out[call.rows] = call(q[call.rows], k_cache, v_cache, scale, k_scale, v_scale)
        return out

    def _writes(self) -> list[tuple[slice | Tensor, slice | Tensor]]:
        """(slots, rows of k) of all new tokens: two slices for one sequence, else all by index."""
        device = self.block_tables.device
        slots = [self._slots(s, s.length - s.count) for s in self.sequences]
        rows = [slice(s.first, s.last) for s in self.sequences]
        if len(self.sequences) < 2:
            return list(zip(slots, rows, strict=True))
        return [(torch.cat([_indices(x, device) for x in slots]), torch.cat([_indices(x, device) for x in rows]))]

    def _calls(self, window: int, dtype: torch.dtype) -> list[Call]:
        """Sequences with one query together; longer ones, and long contexts that are read in place, each alone."""
        found = [(s, self._slots(s, s.oldest(window))) for s in self.sequences]
        alone = [s.count > 1 or (isinstance(slots, slice) and s.length >= ALONE) for s, slots in found]
        together = [x for x, apart in zip(found, alone, strict=True) if not apart]
        groups = ([together] if together else []) + [[x] for x, apart in zip(found, alone, strict=True) if apart]
        return [self._call(group, window, dtype) for group in groups]

    def _call(self, group: list[tuple[Sequence, slice | Tensor]], window: int, dtype: torch.dtype) -> Call:
        device, members, slots = self.block_tables.device, [s for s, _ in group], [x for _, x in group]
        count, first, last = members[0].count, members[0].first, members[-1].last
        rows: slice | Tensor = slice(first, last)
        if last - first != count * len(group):
            rows = torch.tensor([s.first for s in members], device=device)
        keys = [s.length - s.oldest(window) for s in members]
        causal = count == keys[0] and (not window or count <= window)  # torch's own mask fits
        if len(group) == 1 and (count == 1 or causal):
            return Call(rows, slots[0], 1, None, count > 1)
        key = torch.arange(max(keys), device=device)
        position = torch.tensor(keys, device=device)[:, None] - count + torch.arange(count, device=device)  # [B, T]
        hidden = key > position[..., None]  # [B, T, S]
        if window:
            hidden |= key <= position[..., None] - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)[:, None]
        if len(group) == 1:
            return Call(rows, slots[0], 1, mask, False)
        # Past a sequence's end its own last key stands in: weight 0 would not help against another's NaN.
        padded = torch.stack([_indices(x, device)[key.clamp(max=n - 1)] for x, n in zip(slots, keys, strict=True)])
        return Call(rows, padded.flatten(), len(group), mask, False)

    def _slots(self, sequence: Sequence, first: int) -> slice | Tensor:
        """The slots of a sequence's tokens from `first` on; a slice if their blocks follow one another."""
        size, begin, last = self.block_size, first // self.block_size, sequence.length
        table = self.block_tables[sequence.table, begin : ceil_div(last, size)]
        blocks = table.tolist()
        if blocks == list(range(blocks[0], blocks[0] + len(blocks))):
            offset = (blocks[0] - begin) * size
            return slice(offset + first, offset + last)
        slots = table.long()[:, None] * size + torch.arange(size, device=table.device)  # [blocks, block_size]
        return slots.flatten()[first - begin * size : last - begin * size]


def _indices(slots: slice | Tensor, device: torch.device) -> Tensor:
    return torch.arange(slots.start, slots.stop, device=device) if isinstance(slots, slice) else slots


def torch_path(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, cu_seqlens_q: Tensor,
    max_seqlen_q: int, block_size: int, scale: float | None = None, window: int = 0,
    max_seqlen_k: int | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """By a plan for this call alone."""
    plan = AttentionPlan(block_tables, context_lens, cu_seqlens_q, block_size)
    return plan.attend(q, k_cache, v_cache, scale, window, k_scale, v_scale)


def check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, cu_seqlens_q: Tensor,
    max_seqlen_q: int, block_size: int, scale: float | None = None, window: int = 0,
    max_seqlen_k: int | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Raise for shapes, dtypes and devices that do not fit; tables and lengths are not read (a GPU would wait)."""
    arguments(q=q)
    if q.dim() != 3 or not 1 <= q.shape[2] <= MAX_HEAD_SIZE or q.stride(-1) != 1:
        raise ValueError(f"q: expected [tokens, heads, D], D contiguous and up to {MAX_HEAD_SIZE}, got {list(q.shape)}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 3 or cache.shape[2] != q.shape[2] or not cache.is_contiguous():
            raise ValueError(f"{name}: expected [slots, H_kv, {q.shape[2]}], contiguous, got {list(cache.shape)}")
    check_cache(q, k_cache, v_cache, k_scale, v_scale)
    if v_cache.shape != k_cache.shape or not k_cache.shape[1] or q.shape[1] % k_cache.shape[1]:
        raise ValueError(
            f"k_cache: expected v_cache's shape and heads that divide q's {q.shape[1]}, got {list(k_cache.shape)}"
        )
    if block_size < 1 or block_size & (block_size - 1):
        raise ValueError(f"block_size: expected a power of 2, got {block_size}")
    if k_cache.shape[0] % block_size:
        raise ValueError(f"k_cache: expected whole blocks of {block_size} slots, got {k_cache.shape[0]} slots")
    if window < 0:
        raise ValueError(f"window: expected a number of keys, or 0 for all, got {window}")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale: expected a number above 0, got {scale}")
    sequences = len(context_lens)
    expected = {"block_tables": (block_tables, 2, sequences), "context_lens": (context_lens, 1, sequences)}
    for name, (x, dims, length) in (expected | {"cu_seqlens_q": (cu_seqlens_q, 1, sequences + 1)}).items():
        if x.dim() != dims or len(x) != length or x.dtype != torch.int32 or x.device != q.device:
            raise ValueError(
                f"{name}: expected int32, {dims} axes, length {length}, on {q.device}, got {x.dtype} {list(x.shape)}"
                f" on {x.device}"
            )


@triton.jit
def sequence_of(block, cu_ptr, sequences, BLOCK_Q: tl.constexpr):
    """The sequence that owns block `block` of queries, when sequence i has its first at cu[i] // BLOCK_Q + i."""
    low, high = 0, sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(cu_ptr + middle) // BLOCK_Q + middle <= block:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def work_of(
    block, context_ptr, cu_ptr, tokens, sequences, DECODE: tl.constexpr, BLOCK_Q: tl.constexpr
):  # fmt: skip
    """A program's sequence, that one's first row, queries and tokens in all, and which query is the program's first.

    Rows of q that belong to no sequence go to the programs that find none: a context of 0 gives 0.
    """
    sequence = block if DECODE else sequence_of(block, cu_ptr, sequences + 1, BLOCK_Q)
    first = tl.load(cu_ptr + tl.minimum(sequence, sequences))
    count = tl.load(cu_ptr + tl.minimum(sequence + 1, sequences)) - first
    context = tl.load(context_ptr + sequence, mask=sequence < sequences, other=0)
    first_q = 0 if DECODE else (block - first // BLOCK_Q - sequence) * BLOCK_Q
    idle = count == 0 if DECODE else sequence == sequences
    if idle:
        if DECODE:  # the idle ones before this have a row each: as many as there are sequences without a query
            first = tl.load(cu_ptr + sequences) + sequence - first
        count = tl.minimum(tokens - first, 1) if DECODE else tokens - first
        context = 0
    return sequence, first, count, context, first_q


@triton.jit
def two_numbers(words, STORED: tl.constexpr, dtype: tl.constexpr):
    """The low and the high byte of each 16-bit word, as numbers.

    An int8 b goes into fp16 by its bits: those from 1024 to 2048 count in ones, so that 0x6400 | (b + 128) is 1152 + b.
    On a GPU two words at a time, in a register; the compiler would take them apart.
    """
    if ON_GPU:
        if STORED == "int8":
            low, high = tl.inline_asm_elementwise(
                """{
                .reg .b32 shifted, offset;
                shr.b32 shifted, $2, 8;
                mov.b32 offset, 0xE480E480;
                lop3.b32 $0, $2, 0x00FF00FF, 0x64806480, 0x6A;
                lop3.b32 $1, shifted, 0x00FF00FF, 0x64806480, 0x6A;
                add.f16x2 $0, $0, offset;
                add.f16x2 $1, $1, offset;
                }""",
                "=&r,=&r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
            )  # fmt: skip
        else:
            low, high = tl.inline_asm_elementwise(
                """{
                .reg .b32 sorted;
                .reg .b16 lows, highs;
                prmt.b32 sorted, $2, 0, 0x3120;
                mov.b32 {lows, highs}, sorted;
                cvt.rn.f16x2.e4m3x2 $0, lows;
                cvt.rn.f16x2.e4m3x2 $1, highs;
                }""",
                "=r,=r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
            )  # fmt: skip
    elif STORED == "int8":
        low, high = words.to(tl.int8), (words >> 8).to(tl.int8)
    else:
        low = words.to(tl.int8).to(tl.float8e4nv, bitcast=True)
        high = (words >> 8).to(tl.int8).to(tl.float8e4nv, bitcast=True)
    return low.to(dtype), high.to(dtype)


@triton.jit
def queries(q_ptrs, used, scale, STORED: tl.constexpr):
    """Of a cache in words: the even features and the odd ones, over a power of two, by which scores' scale grows."""
    q = tl.load(q_ptrs, mask=used, other=0.0)
    odd_q = q
    if STORED != "":
        odd_q = tl.load(q_ptrs + 1, mask=used, other=0.0)
        dtype: tl.constexpr = tl.float32 if q.dtype == tl.float32 else tl.float16
        largest = tl.max(tl.maximum(tl.abs(q), tl.abs(odd_q)), 1).to(tl.float32)
        unit = tl.exp2(tl.ceil(tl.log2(tl.maximum(largest, 1.0e-30))))  # [BLOCK_M]
        q, odd_q, scale = (q / unit[:, None]).to(dtype), (odd_q / unit[:, None]).to(dtype), scale * unit
    return q, odd_q, scale


@triton.jit
def products(q, odd_q, k, scale_ptrs, known, STORED: tl.constexpr, PRECISION: tl.constexpr):
    """q k [BLOCK_M, BLOCK_N]"""
    if STORED == "":
        return tl.dot(q, k.to(q.dtype), input_precision=PRECISION)  # a cache may have a dtype of its own
    else:
        k, odd_k = two_numbers(k, STORED, q.dtype)
        s = tl.dot(odd_q, odd_k, tl.dot(q, k, input_precision=PRECISION), input_precision=PRECISION)
        return s * tl.load(scale_ptrs, mask=known, other=0.0).to(tl.float32)[None, :]


@triton.jit
def with_values(
    acc, odd_acc, p, v, scale_ptrs, known, dtype: tl.constexpr, STORED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """acc + p v, the odd features' sum apart."""
    if STORED == "":
        acc = tl.dot(p.to(dtype), v.to(dtype), acc, input_precision=PRECISION)
    else:
        v, odd_v = two_numbers(v, STORED, dtype)
        p = (p * (tl.load(scale_ptrs, mask=known, other=0.0).to(tl.float32) * GAIN)[None, :]).to(dtype)
        acc = tl.dot(p, v, acc, input_precision=PRECISION)
        odd_acc = tl.dot(p, odd_v, odd_acc, input_precision=PRECISION)
    return acc, odd_acc


@triton.jit
def keys_of(
    lowest, context, split, SPLITS: tl.constexpr, LEAST: tl.constexpr, WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The first key of a split, and the one behind its last: of those that queries from position `lowest` on may see.

    A split has at least LEAST keys: of short contexts the last ones have none.
    """
    seen = tl.minimum(context, lowest + BLOCK_Q)
    oldest = tl.maximum(0, lowest - WINDOW + 1) if WINDOW else 0
    a_split = tl.maximum(tl.cdiv(tl.cdiv(seen - oldest, BLOCK_N), SPLITS), LEAST // BLOCK_N) * BLOCK_N
    return oldest + split * a_split, tl.minimum(seen, oldest + (split + 1) * a_split)


@triton.jit
def attend_to(
    acc, odd_acc, row_max, row_sum, q, odd_q, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, begin, end, position,
    scale, stride_slot,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, STORED: tl.constexpr, PRECISION: tl.constexpr, STRIDE: tl.constexpr,
    D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Take the keys begin ... end - 1 of one sequence and head into the running softmax, BLOCK_N at a time.

    MASKED: some query may not see some of them, or they are no whole number of tiles. `scale` has log2(e) in it.
    """
    offs_d = tl.arange(0, BLOCK_D)
    for start in tl.range(begin, end, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        known = offs_n < end
        if MASKED:
            number = tl.load(table_ptr + offs_n // BLOCK_SIZE, mask=known, other=0)
        else:
            number = tl.load(table_ptr + offs_n // BLOCK_SIZE)
        slot = number.to(tl.int64) * BLOCK_SIZE + offs_n % BLOCK_SIZE
        at = (slot * STRIDE)[:, None] + offs_d[None, :]  # [BLOCK_N, BLOCK_D], the same of keys and values
        if MASKED or D != BLOCK_D:
            there = known[:, None] & (offs_d < D)[None, :]
            k, v = tl.load(k_ptr + at, mask=there, other=0), tl.load(v_ptr + at, mask=there, other=0)
        else:
            k, v = tl.load(k_ptr + at), tl.load(v_ptr + at)
        s = products(q, odd_q, k.T, k_scale_ptr + slot * stride_slot, known, STORED, PRECISION)
        by = scale[:, None] if STORED != "" else scale
        if MASKED:
            visible = known[None, :] & (offs_n[None, :] <= position[:, None])
            if WINDOW:
                visible = visible & (offs_n[None, :] > position[:, None] - WINDOW)
            s = tl.where(visible, s * by, -float("inf"))
            new_max = tl.maximum(row_max, tl.max(s, 1))
            p = tl.exp2(s - new_max[:, None])
        else:  # product and difference are one instruction
            new_max = tl.maximum(row_max, tl.max(s, 1) * scale)
            p = tl.exp2(s * by - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        acc, odd_acc = acc * shrink[:, None], odd_acc * shrink[:, None]
        scale_ptrs = v_scale_ptr + slot * stride_slot
        acc, odd_acc = with_values(acc, odd_acc, p, v, scale_ptrs, known, q.dtype, STORED, PRECISION)
        row_max = new_max
    return acc, odd_acc, row_max, row_sum


@triton.jit(do_not_specialize=["tokens"])
def paged_attention_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, out_ptr, lse_ptr, table_ptr, context_ptr, cu_ptr, tokens, sequences,
    stride_q, stride_table, stride_slot, stride_head, scale,
    H_KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLITS: tl.constexpr,
    LEAST: tl.constexpr, WINDOW: tl.constexpr, DECODE: tl.constexpr, STORED: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q queries of one sequence, the GROUP heads of one key/value head, one split of the context a program.

    STORED: "int8" or "fp8", of a cache read as words of two features, of which BLOCK_D cover a head; else "".
    """
    block, head_kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, first, count, context, first_q = work_of(block, context_ptr, cu_ptr, tokens, sequences, DECODE, BLOCK_Q)
    previous_done(PDL)
    if first_q >= count:
        return
    row = tl.arange(0, BLOCK_Q * BLOCK_G)  # query-major: BLOCK_G rows a query, GROUP of them used
    query, group, offs_d = first_q + row // BLOCK_G, row % BLOCK_G, tl.arange(0, BLOCK_D)
    head, token = head_kv * GROUP + group, (first + query).to(tl.int64)
    out = (token * (H_KV * GROUP) + head) * SPLITS + split  # [BLOCK_M]
    real = (query < count) & (group < GROUP)
    lowest = context - count + first_q  # the first query's position
    begin, end = keys_of(lowest, context, split, SPLITS, LEAST, WINDOW, BLOCK_Q, BLOCK_N)
    if split > 0 and begin >= end:  # the first one says what a sequence without keys gets
        tl.store(lse_ptr + out, -1.0e30, mask=real)
        return
    each: tl.constexpr = 2 if STORED != "" else 1  # features of an element of the cache
    used = real[:, None] & (offs_d < D // each)[None, :]
    q_ptrs = q_ptr + token[:, None] * stride_q + head[:, None] * D + each * offs_d[None, :]
    q, odd_q, scale = queries(q_ptrs, used, scale, STORED)
    acc = tl.zeros((BLOCK_Q * BLOCK_G, BLOCK_D), tl.float32)
    odd_acc = acc
    row_max = tl.full((BLOCK_Q * BLOCK_G,), -1.0e30, tl.float32)  # finite: rows that see nothing
    row_sum = tl.zeros((BLOCK_Q * BLOCK_G,), tl.float32)
    at = head_kv * (D // each)
    k_ptr, v_ptr, table_ptr = k_ptr + at, v_ptr + at, table_ptr + sequence * stride_table
    k_scale_ptr, v_scale_ptr = k_scale_ptr + head_kv * stride_head, v_scale_ptr + head_kv * stride_head
    # Tiles that every query sees as a whole need no mask: of a prompt all but the last.
    whole = begin
    if not DECODE and not WINDOW:
        whole += tl.maximum(tl.minimum(lowest + 1, end) - begin, 0) // BLOCK_N * BLOCK_N
        acc, odd_acc, row_max, row_sum = attend_to(
            acc, odd_acc, row_max, row_sum, q, odd_q, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, begin, whole,
            lowest + row // BLOCK_G, scale, stride_slot, False, WINDOW, STORED, PRECISION, H_KV * D // each, D // each,
            BLOCK_SIZE, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    acc, odd_acc, row_max, row_sum = attend_to(
        acc, odd_acc, row_max, row_sum, q, odd_q, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, whole, end,
        lowest + row // BLOCK_G, scale, stride_slot, True, WINDOW, STORED, PRECISION, H_KV * D // each, D // each,
        BLOCK_SIZE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    total = (tl.where(row_sum == 0, 1.0, row_sum) * (GAIN if each == 2 else 1.0))[:, None]
    out_ptrs = out_ptr + out[:, None] * D + each * offs_d[None, :]
    tl.store(out_ptrs, (acc / total).to(out_ptr.dtype.element_ty), mask=used)
    if each == 2:
        tl.store(out_ptrs + 1, (odd_acc / total).to(out_ptr.dtype.element_ty), mask=used)
    if SPLITS > 1:
        lse = tl.where(row_sum == 0, -1.0e30, row_max + tl.log2(tl.where(row_sum == 0, 1.0, row_sum)))
        tl.store(lse_ptr + out, lse, mask=real)


@triton.jit
def join_kernel(
    part_ptr, lse_ptr, out_ptr, D: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """One head of one token a program: its splits, weighted by 2^lse."""
    previous_done(PDL)
    row = tl.program_id(0).to(tl.int64)
    offs_s, offs_d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + row * SPLITS + offs_s)  # [SPLITS]
    weight = tl.exp2(lse - tl.max(lse, 0))
    weight = weight / tl.sum(weight, 0)
    part_ptrs = part_ptr + (row * SPLITS + offs_s)[:, None] * D + offs_d[None, :]
    there = (lse > -1.0e29)[:, None] & (offs_d < D)[None, :]  # a split without keys has written nothing else
    part = tl.load(part_ptrs, mask=there, other=0.0)  # [SPLITS, BLOCK_D]
    out = tl.sum(part * weight[:, None], 0)
    tl.store(out_ptr + row * D + offs_d, out.to(out_ptr.dtype.element_ty), mask=offs_d < D)


def splits(blocks: int, num_kv_heads: int, device: torch.device, most: int = 64) -> int:
    """Into how many parts a step cuts each context, so that every multiprocessor has work: a power of 2. blocks: of
    queries; of a decoding step, one a sequence.
    """
    wanted = ceil_div(7 * sm_count(device.index) // 4, max(1, blocks * num_kv_heads))
    return min(most, next_power_of_2(wanted))


# Found on an H100.
_SIZES = {
    "decode": {"BLOCK_M": 16, "BLOCK_N": 128, "num_warps": 4, "num_stages": 2},
    "split": {"BLOCK_M": 16, "BLOCK_N": 128, "num_warps": 4, "num_stages": 3},
    "short": {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3},
    "prefill": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
}


def _cut(sequences: int, kv_heads: int, queries: int, most: int | None, device: torch.device) -> tuple[str, int]:
    """The kind of a launch, and among how many parts each context is split. queries: of a sequence, at most. most: keys
    that a query sees, if that is known.
    """
    if queries > FEW or (parts := splits(sequences, kv_heads, device)) == 1:
        return "decode" if queries == 1 else "prefill", 1
    if queries > 1:
        return "prefill", parts
    if most is None:
        return "split", parts
    kind = "short" if most <= SHORT else "split"
    return kind, min(parts, next_power_of_2(ceil_div(most, _SIZES[kind]["BLOCK_N"])))  # no more than there are tiles


def _of_parts(out: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Where splits leave results and log-sum-exps.  [N, H, D] -> [N, H, parts, D], [N, H, parts]"""
    if parts == 1:
        return out, out
    lse = out.new_empty((*out.shape[:2], parts), dtype=torch.float32)
    return lse.new_empty((*lse.shape, out.shape[2])), lse


def _join(target: Tensor, lse: Tensor, out: Tensor, parts: int, block_d: int, early: dict[str, bool]) -> None:
    tokens, heads, size = out.shape
    join_kernel[(tokens * heads,)](
        target, lse, out, D=size, SPLITS=parts, BLOCK_D=block_d, num_warps=max(1, parts * block_d // 8192), **early
    )


def _sizes(q: Tensor, k_cache: Tensor, kind: str, block_d: int) -> dict[str, int]:
    if not on_tensor_cores(q) or k_cache.dtype == torch.float32 or block_d > 128:  # small tiles, or registers run out
        if on_tensor_cores(q):
            return {"BLOCK_M": min(32, _SIZES[kind]["BLOCK_M"]), "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
        block_n, warps = (32, 4) if block_d <= 128 else (16, 8)
        return {"BLOCK_M": 16, "BLOCK_N": block_n, "num_warps": warps, "num_stages": 1}
    if k_cache.dtype not in QUANTIZED_DTYPES:
        return tuned(q.device, f"paged_attention {kind} {block_d}", **_SIZES[kind])
    sizes = dict(_SIZES[kind])
    if kind != "prefill":
        sizes |= {"num_stages": 3, "maxnreg": 128}  # registers of a thread: four programs a multiprocessor
    return tuned(q.device, f"paged_attention {kind} {block_d} 8-bit", **sizes)


@operation(
    "paged_attention",
    reference=reference,
    torch=torch_path,
    check=check,
    fake=lambda q, *_, **__: torch.empty_like(q, memory_format=torch.contiguous_format),
)
def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, cu_seqlens_q: Tensor,
    max_seqlen_q: int, block_size: int, scale: float | None = None, window: int = 0,
    max_seqlen_k: int | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention of each sequence's newest tokens to all of its tokens, in blocks.

    q [N, H, D], all sequences' queries one after another; k_cache and v_cache [slots, H_kv, D], fp16, bf16 or fp32
    whatever q is, or int8 or float8_e4m3fn with k_scale and v_scale [slots, H_kv], fp32 or fp16; block_tables [S, W]
    int32, the blocks of each sequence in order; context_lens [S] int32, tokens of each, the queries included;
    cu_seqlens_q [S + 1] int32. No sequence has more than `max_seqlen_q` queries. `window` > 0: a query sees its own key
    and those of the window - 1 tokens before it, and no block before that is looked at. `max_seqlen_k`: no sequence has
    more tokens, if that is known; a launch for few tokens is a little faster.
    -> [N, H, D] in q's dtype. Rows behind the last sequence's, and those of a sequence of context 0, get 0 (that is how
    a batch is padded). Raises TypeError and ValueError with the argument's name.
    """
    tokens, heads, size = q.shape
    stored = FORMATS.get(k_cache.dtype, "")
    if stored and size % 2:  # words of two features do not fit
        return torch_path(
            q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, max_seqlen_q, block_size, scale, window,
            max_seqlen_k, k_scale, v_scale,
        )  # fmt: skip
    sequences, kv_heads, decode = len(context_lens), k_cache.shape[1], max_seqlen_q == 1
    if tokens == 0 or sequences == 0:
        return q.new_zeros((tokens, heads, size))
    out = q.new_empty((tokens, heads, size))
    block_d, block_g = max(16, next_power_of_2(size)), next_power_of_2(heads // kv_heads)
    most = min([n for n in (window, max_seqlen_k) if n], default=None)  # keys that a query sees
    kind, parts = _cut(sequences, kv_heads, max_seqlen_q, most, q.device)
    sizes = _sizes(q, k_cache, kind, block_d)
    block_q, least = max(1, max(16, sizes.pop("BLOCK_M")) // block_g), 0
    if max_seqlen_q > FEW and (most is None or most > CHUNK):
        parts, least = splits(ceil_div(tokens, block_q), kv_heads, q.device, 8), CHUNK
    target, lse = _of_parts(out, parts)
    blocks = max(tokens, sequences) if decode else tokens // block_q + sequences + 1  # the last: padding
    q = q if q.stride(1) == size else q.contiguous()
    scale, early = (size**-0.5 if scale is None else scale) * math.log2(math.e), pdl(q.device)
    if stored:
        k_cache, v_cache = k_cache.view(torch.int16), v_cache.view(torch.int16)
    k_scale, v_scale = (k_cache, v_cache) if k_scale is None or v_scale is None else (k_scale, v_scale)
    paged_attention_kernel[(blocks, kv_heads, parts)](
        q, k_cache, v_cache, k_scale, v_scale, target, lse, block_tables, context_lens, cu_seqlens_q, tokens, sequences,
        q.stride(0), block_tables.stride(0), k_scale.stride(0), k_scale.stride(1), scale,
        H_KV=kv_heads, GROUP=heads // kv_heads, D=size, BLOCK_SIZE=block_size, SPLITS=parts, LEAST=least,
        WINDOW=window, DECODE=decode, STORED=stored, PRECISION="ieee", BLOCK_Q=block_q, BLOCK_G=block_g,
        BLOCK_D=max(16, block_d // 2) if stored else block_d, **early, **sizes,
    )  # fmt: skip
    if parts > 1:
        _join(target, lse, out, parts, block_d, early)
    return out
