"""Draw a token from each row of logits, in one pass: argmax(logits / temperature + Gumbel noise), greedy at 0.

The noise is not read: it is computed from (seed, position, token), the same numbers as `gumbel_noise` gives.
So sampling moves only the logits, V elements a row, where softmax, a sum and a search would read them several times,
and nothing has to come back to the host. A row is cut among programs when there are few, and a second kernel joins
their candidates; how many follows from the shapes alone, so that a CUDA graph can hold both.

FLOPs: about 30 an element, most of them integer; on an H100 reading and computing take about the same time.
Sources: Maddison et al., 2014, "A* Sampling" (the Gumbel-max trick); MurmurHash3's finalizer (Appleby, 2011).
"""

from functools import lru_cache

import torch
from torch import Tensor

from .common import (
    arguments,
    ceil_div,
    next_power_of_2,
    operation,
    pdl,
    previous_done,
    sm_count,
    tl,
    triton,
)

__all__ = ["GREEDY_BELOW", "gumbel_argmax", "gumbel_noise"]

GREEDY_BELOW = 1e-5  # a temperature below this is greedy, as in vLLM: dividing by it would overflow
COLDEST = tl.constexpr(GREEDY_BELOW)  # as kernels see it


def gumbel_noise(seeds: Tensor, positions: Tensor, size: int) -> Tensor:
    """-log(-log(u)) with u computed from (seed, position, token).  seeds [B] int64, positions [B] -> [B, size] fp32

    Adding it to log-probabilities and taking the largest draws a token (the Gumbel-max trick). The numbers are
    a hash, not a stream, so any row can be computed alone, again, and on any device: the kernel below
    computes the same. Source of the mixing: MurmurHash3's finalizer (Appleby, 2011).
    """
    low, high = (seeds & 0xFFFFFFFF).to(torch.int32), (seeds >> 32).to(torch.int32)
    key = mixed(mixed(mixed(positions.to(torch.int32) + 1) ^ low) ^ high)  # [B]
    bits = mixed(_token_bits(size, key.device) ^ key[:, None])  # [B, size]
    uniform = ((bits & 0x7FFFFF).float() + 0.5) * 2**-23  # never 0, never 1
    return uniform.log_().neg_().log_().neg_()


@lru_cache(maxsize=4)
def _token_bits(size: int, device: torch.device) -> Tensor:
    return mixed(torch.arange(1, size + 1, dtype=torch.int32, device=device))


def mixed(x: Tensor) -> Tensor:
    """Every bit of the result depends on every bit of x.  int32, wrapping; the masks make shifts those of uint32."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * -2048144789
    x = (x ^ ((x >> 13) & 0x7FFFF)) * -1028477387
    return x ^ ((x >> 16) & 0xFFFF)


def reference(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """The noise added to fp32 logits, by torch."""
    logits = logits.float()
    is_greedy = temperatures < GREEDY_BELOW
    noisy = logits / temperatures.clamp(min=GREEDY_BELOW)[:, None] + gumbel_noise(seeds, positions, logits.shape[1])
    return torch.where(is_greedy, logits.argmax(-1), noisy.argmax(-1))


def torch_path(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """As the reference; without noise where no row wants it."""
    if bool((temperatures < GREEDY_BELOW).all()):
        return logits.argmax(-1)
    return reference(logits, temperatures, seeds, positions)


def check(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor) -> None:
    """Raise unless logits are [B, V], V contiguous, temperatures fp32 [B], seeds int64 [B], positions int [B]."""
    arguments(logits=logits, temperatures=temperatures)
    if logits.dim() != 2 or logits.shape[1] == 0 or logits.stride(1) != 1:
        raise ValueError(f"logits: expected [rows, vocabulary], the latter contiguous, got {list(logits.shape)}")
    expected = {
        "temperatures": (temperatures, (torch.float32,)), "seeds": (seeds, (torch.int64,)),
        "positions": (positions, (torch.int32, torch.int64)),
    }  # fmt: skip
    for name, (x, dtypes) in expected.items():
        if x.shape != logits.shape[:1] or x.dtype not in dtypes or x.device != logits.device:
            raise ValueError(f"{name}: expected [{len(logits)}] of {dtypes[0]}, got {list(x.shape)} of {x.dtype}")


@triton.jit
def mix(x):
    """`mixed` on uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def noise_key(seed_ptr, position_ptr, row):
    """What seed and position of a row contribute to its noise."""
    seed = tl.load(seed_ptr + row)
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    return mix(mix(mix((tl.load(position_ptr + row) + 1).to(tl.uint32)) ^ low) ^ high)


@triton.jit
def noise(key, tokens):
    """`gumbel_noise` of these tokens."""
    bits = mix(mix((tokens + 1).to(tl.uint32)) ^ key)
    uniform = ((bits & 0x7FFFFF).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(uniform))


@triton.jit
def gumbel_argmax_kernel(
    logits_ptr, temperature_ptr, seed_ptr, position_ptr, best_ptr, token_ptr, size, stride, part,
    PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One part of one row a program: its best score and token."""
    previous_done(PDL)
    row, index = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    is_greedy = temperature < COLDEST
    key = noise_key(seed_ptr, position_ptr, row)
    scale = 1.0 / tl.where(is_greedy, 1.0, temperature)
    start, stop = index * part, tl.minimum(index * part + part, size)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    token = tl.full([BLOCK], 0, tl.int32) + start
    for at in range(start, stop, BLOCK):
        offs = at + tl.arange(0, BLOCK)
        score = tl.load(logits_ptr + row * stride + offs, mask=offs < stop, other=-float("inf")).to(tl.float32)
        if not is_greedy:
            score = score * scale + noise(key, offs)
        better = score > best
        best, token = tl.where(better, score, best), tl.where(better, offs, token)
    top = tl.max(best, 0)
    first = tl.min(tl.where(best == top, token, 2147483647), 0)
    tl.store(best_ptr + row * tl.num_programs(1) + index, top)
    tl.store(token_ptr + row * tl.num_programs(1) + index, first.to(tl.int64))


@triton.jit
def best_of_parts_kernel(best_ptr, token_ptr, out_ptr, parts, PDL: tl.constexpr, BLOCK: tl.constexpr):
    """The winner among a row's parts; of equal ones the first."""
    previous_done(PDL)
    row, offs = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    best = tl.load(best_ptr + row * parts + offs, mask=offs < parts, other=-float("inf"))
    token = tl.load(token_ptr + row * parts + offs, mask=offs < parts, other=9223372036854775807)
    tl.store(out_ptr + row, tl.min(tl.where(best == tl.max(best, 0), token, 9223372036854775807), 0))


@operation(
    "gumbel_argmax",
    reference=reference,
    torch=torch_path,
    check=check,
    fake=lambda logits, *_: logits.new_empty(len(logits), dtype=torch.int64),
)
def gumbel_argmax(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """A token from each row's softmax(logits / temperature); the likeliest where the temperature is below 1e-5.

    logits [B, V] of any floating dtype, temperatures [B] fp32, seeds [B] int64, positions [B] int32 or int64 (the place
    of the new token in its sequence) -> [B] int64. Raises TypeError and ValueError with the argument's name.
    """
    rows, size = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return tokens
    block = 2048
    parts = max(1, min(ceil_div(2 * sm_count(logits.device.index), rows), ceil_div(size, block)))
    part = ceil_div(ceil_div(size, parts), block) * block
    parts = ceil_div(size, part)
    best = torch.empty((rows, parts), dtype=torch.float32, device=logits.device)
    candidates = tokens if parts == 1 else torch.empty((rows, parts), dtype=torch.int64, device=logits.device)
    gumbel_argmax_kernel[(rows, parts)](
        logits, temperatures, seeds, positions, best, candidates, size, logits.stride(0), part,
        BLOCK=block, num_warps=8, **pdl(logits.device),
    )  # fmt: skip
    if parts > 1:
        best_of_parts_kernel[(rows,)](
            best, candidates, tokens, parts, BLOCK=next_power_of_2(parts), num_warps=1, **pdl(logits.device)
        )
    return tokens
