"""Log probabilities of each row's likeliest tokens, and of one token that was drawn, in one pass over the logits.

    logprob(t) = logits[t] - logsumexp(logits)

A row is cut among programs; each finds the `count` largest of its part by taking the largest so many times, and sums up
exponentials on the way. A second kernel does the same with what the parts found. log_softmax in fp32, then a selection
as torch has them, write and read the row several times.

Bytes: V logits a row, read once (the second kernel reads `count` a part). FLOPs: about 10 an element, and `count`
comparisons. Source of the sum: Milakov and Gimelshein, 2018, "Online normalizer calculation for softmax".
"""

import torch
from torch import Tensor

from .common import arguments, ceil_div, next_power_of_2, operation, pdl, previous_done, tl, triton

__all__ = ["top_logprobs"]

BLOCK = 2048
MOST = 64  # candidates that the kernel takes one by one; more are torch's work
Found = tuple[Tensor, Tensor, Tensor]


def reference(logits: Tensor, tokens: Tensor, count: int) -> Found:
    """In fp64, sorted."""
    logprobs = logits.double().log_softmax(-1)  # [S, V]
    best, ids = logprobs.sort(dim=-1, descending=True, stable=True)
    return ids[:, :count].contiguous(), best[:, :count].float(), logprobs.gather(1, tokens[:, None])[:, 0].float()


def torch_path(logits: Tensor, tokens: Tensor, count: int) -> Found:
    """In fp32, selected."""
    logprobs = logits.log_softmax(-1, dtype=torch.float32)
    best = logprobs.topk(count)
    return best.indices, best.values, logprobs.gather(1, tokens[:, None])[:, 0]


def check(logits: Tensor, tokens: Tensor, count: int) -> None:
    """Raise unless logits are [S, V], V contiguous, tokens int64 [S], and count 0 to V."""
    arguments(logits=logits)
    if logits.dim() != 2 or logits.shape[1] == 0 or logits.stride(1) != 1:
        raise ValueError(f"logits: expected [rows, vocabulary], the latter contiguous, got {list(logits.shape)}")
    if tokens.shape != logits.shape[:1] or tokens.dtype != torch.int64 or tokens.device != logits.device:
        raise ValueError(f"tokens: expected [{len(logits)}] of int64, got {list(tokens.shape)} of {tokens.dtype}")
    if not 0 <= count <= logits.shape[1]:
        raise ValueError(f"count: expected 0 to {logits.shape[1]} (the vocabulary), got {count}")


@triton.jit
def part_kernel(
    logits_ptr, best_ptr, id_ptr, max_ptr, sum_ptr, size, stride, count, PDL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """BLOCK logits of one row a program: the largest, one after another, and the sum of exponentials."""
    previous_done(PDL)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * stride + offs, mask=offs < size, other=-float("inf")).to(tl.float32)
    top = tl.max(x, 0)
    at = row * tl.num_programs(1) + part
    tl.store(max_ptr + at, top)
    tl.store(sum_ptr + at, tl.sum(tl.exp(x - tl.where(top == -float("inf"), 0.0, top)), 0))
    for j in range(count):
        top = tl.max(x, 0)
        first = tl.min(tl.where(x == top, offs, 2147483647), 0)
        tl.store(best_ptr + at * count + j, top)
        tl.store(id_ptr + at * count + j, first)
        x = tl.where(offs == first, -float("inf"), x)


@triton.jit
def whole_kernel(
    logits_ptr, token_ptr, best_ptr, id_ptr, max_ptr, sum_ptr, out_ptr, out_id_ptr, chosen_ptr, parts, stride, count,
    PDL: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program: the largest of what its parts found, less the logarithm of the whole sum."""
    previous_done(PDL)
    row = tl.program_id(0).to(tl.int64)
    offs_p, offs = tl.arange(0, PARTS), tl.arange(0, BLOCK)
    tops = tl.load(max_ptr + row * parts + offs_p, mask=offs_p < parts, other=-float("inf"))
    sums = tl.load(sum_ptr + row * parts + offs_p, mask=offs_p < parts, other=0.0)
    top = tl.max(tops, 0)
    lse = top + tl.log(tl.sum(sums * tl.exp(tops - top), 0))
    token = tl.load(token_ptr + row)
    tl.store(chosen_ptr + row, tl.load(logits_ptr + row * stride + token).to(tl.float32) - lse)
    found = row * parts * count + offs
    x = tl.load(best_ptr + found, mask=offs < parts * count, other=-float("inf"))
    ids = tl.load(id_ptr + found, mask=offs < parts * count, other=2147483647)
    for j in range(count):
        top = tl.max(x, 0)
        first = tl.min(tl.where(x == top, ids, 2147483647), 0)
        tl.store(out_ptr + row * count + j, top - lse)
        tl.store(out_id_ptr + row * count + j, first.to(tl.int64))
        x = tl.where((x == top) & (ids == first), -float("inf"), x)


def _fake(logits: Tensor, tokens: Tensor, count: int) -> Found:
    best = logits.new_empty((len(logits), count), dtype=torch.float32)
    return best.to(torch.int64), best, logits.new_empty(len(logits), dtype=torch.float32)


@operation("top_logprobs", reference=reference, torch=torch_path, check=check, fake=_fake)
def top_logprobs(logits: Tensor, tokens: Tensor, count: int) -> Found:
    """The `count` likeliest tokens of each row with their log probabilities, and that of the token in `tokens`.

    logits [S, V] of any floating dtype, tokens [S] int64 -> ids [S, count] int64, likeliest first, of equal ones the
    smallest id (on a CPU any); log probabilities [S, count] fp32; those of tokens [S] fp32. Raises TypeError and
    ValueError with the argument's name.
    """
    rows, size = logits.shape
    if count > MOST or rows == 0:
        return torch_path(logits, tokens, count)
    ids, best, chosen = _fake(logits, tokens, count)
    parts, device = ceil_div(size, BLOCK), logits.device
    found = torch.empty((rows, parts, count), dtype=torch.float32, device=device)
    found_ids = torch.empty((rows, parts, count), dtype=torch.int32, device=device)
    tops, sums = (torch.empty((rows, parts), dtype=torch.float32, device=device) for _ in range(2))
    part_kernel[(rows, parts)](
        logits, found, found_ids, tops, sums, size, logits.stride(0), count, BLOCK=BLOCK, num_warps=8, **pdl(device)
    )
    whole_kernel[(rows,)](
        logits, tokens, found, found_ids, tops, sums, best, ids, chosen, parts, logits.stride(0), count,
        PARTS=next_power_of_2(parts), BLOCK=next_power_of_2(max(2, parts * count)), num_warps=8, **pdl(device),
    )  # fmt: skip
    return ids, best, chosen
