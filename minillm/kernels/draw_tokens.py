"""Draw a token from each row of logits with every option of a request: penalties, temperature, min-p, top-k, top-p.

`sampling.py` sorts the vocabulary. Nothing is sorted here, and nothing comes back to the host, so a CUDA graph can hold
it: a row of kernels, of which a program leaves at once where its row does not need it.

What a filter keeps is always a beginning of the row in the order (distance, token), where distance is how far a logit
lies below the row's largest. So one number, the border, says what is kept; it need not be known exactly, either:

    scan      a row without filters: argmax(logits / temperature + noise), as `gumbel_argmax` does, and done.
              A row with filters: its largest and its smallest logit.
    narrow    up to three times, until few tokens are left between. The border lies between `low` and `high`: eight
              distances between them, and how much lies within each. Top-k counts tokens, top-p adds up weights
              exp(-distance / temperature). Min-p says its border at once.
    collect   of tokens nearer than `low`, which are kept for certain, the best after noise. And a list of those between
              `low` and `high`; for top-k of all up to `high`, since top-p wants their sum.
    settle    If the best of all is a certain one, it is the token. Else add up what comes before it: too much, and it
              is refused, then the best of those before it is next, and so on. Mostly the first or second is right.
              Only top-k looks for its border, by bisection. Where the list would be too long (many equal logits;
              a top-k of thousands) all of the row stands for it: slower, and right.

The result does not depend on how rows are cut among programs: sums of weights are made of chunks of fixed size, or of
integers, and the list's order does not matter.

Bytes: the logits three to five times. FLOPs: about 40 an element and pass: comparisons with eight distances, or noise.
Sources: Maddison et al., 2014, "A* Sampling" (the Gumbel-max trick). Testing a drawn token instead of finding the
border is the rejection sampling of FlashInfer (Ye et al., 2025), with numbers that stay the same for each round.
"""

import torch
from torch import Tensor

from .common import arguments, ceil_div, next_power_of_2, operation, pdl, previous_done, sm_count, tl, triton
from .gumbel_argmax import COLDEST, GREEDY_BELOW, gumbel_noise, noise, noise_key
from .gumbel_argmax import torch_path as draw_plainly

__all__ = ["count_tokens", "draw_tokens", "set_counts"]

PASSES = 3
BLOCK = 2048  # elements that a program has in registers at a time: scan, settle
COLLECTED = 1024  # the same: collect, which needs more registers for each
CHUNK = 4096  # elements whose weights are added up in one go: narrow
CAPACITY = 4096  # of the list
LARGEST = tl.constexpr(3.4e38)
LAST = tl.constexpr(2147483647)
NEVER = tl.constexpr(9223372036854775807)
LOG2_E = tl.constexpr(1.4426950408889634)
UNIT = tl.constexpr(1099511627776.0)  # 2^40: weights as integers
IN_PROMPT, COUNT = -32768, 32767  # of a count: the sign bit, the others


def reference(
    logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
    repetition: Tensor, presence: Tensor, frequency: Tensor, rows: Tensor, counts: Tensor,
) -> Tensor:  # fmt: skip
    """Row by row, with a sorted row."""
    tokens = []
    for i, row in enumerate(logits.float()):
        seen = counts[rows[i]].int()
        if repetition[i] != 1 or presence[i] != 0 or frequency[i] != 0:
            row = torch.where(seen != 0, torch.where(row > 0, row / repetition[i], row * repetition[i]), row)
            row = row - presence[i] * ((seen & COUNT) > 0) - frequency[i] * (seen & COUNT)
        if temperatures[i] >= GREEDY_BELOW:
            if 0 < top_k[i] < row.numel() or top_p[i] < 1 or min_p[i] > 0:
                row = (row - row.max()) / temperatures[i]
            else:
                row = row / temperatures[i]  # as in `gumbel_argmax`
            ordered, order = row.sort(descending=True, stable=True)
            kept = ordered >= ordered[0] + min_p[i].log()
            if 0 < top_k[i] < row.numel():
                kept &= ordered >= ordered[top_k[i] - 1]
            share = ordered.masked_fill(~kept, float("-inf")).softmax(-1)
            likelier = share.cumsum(-1) - share
            likelier[0] = 0
            kept &= (likelier < top_p[i]) | (top_p[i] >= 1) | (likelier == 0)
            row = torch.full_like(row, float("-inf")).scatter(0, order[kept], ordered[kept])
            row = row + gumbel_noise(seeds[i : i + 1], positions[i : i + 1], row.numel())[0]
        tokens.append(row.argmax())
    return torch.stack(tokens) if tokens else positions.new_empty(0, dtype=torch.int64)


def torch_path(
    logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
    repetition: Tensor, presence: Tensor, frequency: Tensor, rows: Tensor, counts: Tensor,
) -> Tensor:  # fmt: skip
    """All rows that want nothing special together, and all others."""
    top_k = top_k.masked_fill((top_k <= 0) | (top_k >= logits.shape[1]), 0)
    penalized = (repetition != 1) | (presence != 0) | (frequency != 0)
    special = penalized | ((temperatures >= GREEDY_BELOW) & ((top_k > 0) | (top_p < 1) | (min_p > 0)))
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    if len(plain := (~special).nonzero()[:, 0]):
        tokens[plain] = draw_plainly(logits[plain], temperatures[plain], seeds[plain], positions[plain])
    if len(i := special.nonzero()[:, 0]):
        logits = logits[i].float()
        if len(j := penalized[i].nonzero()[:, 0]):
            options = (x[i[j], None] for x in (repetition, presence, frequency))
            logits[j] = _penalize(logits[j], counts[rows[i[j]].long()].int(), *options)
        filters = [x[i, None] for x in (temperatures, top_k, top_p, min_p)]
        tokens[i] = _draw(logits, seeds[i], positions[i], *filters)
    return tokens


def _penalize(logits: Tensor, seen: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor) -> Tensor:
    logits = torch.where(seen != 0, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
    times = seen & COUNT
    return logits - presence * (times > 0) - frequency * times


def _draw(
    logits: Tensor, seeds: Tensor, positions: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """As `settle_kernel`: draw, and draw again among the likelier ones where top-p refuses the token."""
    tokens, is_greedy = logits.argmax(-1, keepdim=True), temperatures < GREEDY_BELOW
    if bool(is_greedy.all()):
        return tokens[:, 0]
    logits = (logits - logits.amax(-1, keepdim=True)) / temperatures.masked_fill(is_greedy, 1.0)
    smallest = min_p.log()
    if bool((top_k > 0).any()):
        kth = logits.topk(int(top_k.max())).values.gather(1, (top_k.long() - 1).clamp(min=0))
        smallest = smallest.maximum(kth.masked_fill(top_k <= 0, float("-inf")))
    logits.masked_fill_(logits < smallest, float("-inf"))
    shares = logits.softmax(-1) if bool((top_p < 1).any()) else None
    noisy = logits + gumbel_noise(seeds, positions, logits.shape[1])
    ids = torch.arange(logits.shape[1], device=logits.device)
    drawn = noisy.argmax(-1, keepdim=True)
    while shares is not None:
        own = logits.gather(1, drawn)
        before = (logits > own) | ((logits == own) & (ids < drawn))
        likelier = (shares * before).sum(-1, keepdim=True)
        refused = (likelier >= top_p) & (likelier > 0) & (top_p < 1)
        if not bool(refused.any()):
            break
        noisy.masked_fill_(refused & ~before, float("-inf"))
        drawn = noisy.argmax(-1, keepdim=True)
    return torch.where(is_greedy, tokens, drawn)[:, 0]


def check(
    logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
    repetition: Tensor, presence: Tensor, frequency: Tensor, rows: Tensor, counts: Tensor,
) -> None:  # fmt: skip
    """Raise unless logits are [S, V], V contiguous, each option [S] of its dtype, counts [rows, V] int16."""
    arguments(logits=logits)
    if logits.dim() != 2 or logits.shape[1] == 0 or logits.stride(1) != 1:
        raise ValueError(f"logits: expected [rows, vocabulary], the latter contiguous, got {list(logits.shape)}")
    real = {"temperatures": temperatures, "top_p": top_p, "min_p": min_p, "repetition": repetition,
            "presence": presence, "frequency": frequency}  # fmt: skip
    _each("seeds", seeds, logits, torch.int64)
    _each("positions", positions, logits, torch.int32, torch.int64)
    _each("top_k", top_k, logits, torch.int32)
    _each("rows", rows, logits, torch.int32)
    for name, x in real.items():
        _each(name, x, logits, torch.float32)
    _counts(counts, logits.shape[1], logits.device)


def _each(name: str, x: Tensor, like: Tensor, *dtypes: torch.dtype) -> None:
    if x.shape != like.shape[:1] or x.dtype not in dtypes or x.device != like.device or not x.is_contiguous():
        raise ValueError(
            f"{name}: expected [{len(like)}] of {dtypes[0]} on {like.device}, contiguous, got {list(x.shape)} of"
            f" {x.dtype} on {x.device}"
        )


def _counts(counts: Tensor, size: int | None, device: torch.device) -> None:
    fits = counts.dim() == 2 and counts.stride(1) == 1 and counts.shape[1] == (size or counts.shape[1])
    if not fits or counts.dtype != torch.int16 or counts.device != device:
        raise ValueError(
            f"counts: expected [rows, {size or 'vocabulary'}] of int16 on {device}, the latter contiguous, got"
            f" {list(counts.shape)} of {counts.dtype} on {counts.device}"
        )


# ---- what the kernels share; `option_ptrs` are in the order of `draw_tokens` -----------------------------------------


@triton.jit
def filters_of(option_ptrs, row, size):
    """(temperature, k, p, least share) of a row; 0, 1 and 0: the filter keeps all, as all do of a greedy row."""
    temperature, k = tl.load(option_ptrs[0] + row), tl.load(option_ptrs[3] + row)
    p, share = tl.load(option_ptrs[4] + row), tl.load(option_ptrs[5] + row)
    is_greedy = temperature < COLDEST
    k = tl.where(is_greedy | (k < 0) | (k >= size), 0, k)
    return temperature, k, tl.where(is_greedy, 1.0, p), tl.where(is_greedy, 0.0, share)


@triton.jit
def source_of(logits_ptr, stride, counts_ptr, counts_stride, option_ptrs, row):
    """What `read` needs to know of a row."""
    repetition, presence = tl.load(option_ptrs[6] + row), tl.load(option_ptrs[7] + row)
    frequency = tl.load(option_ptrs[8] + row)
    penalized = (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0)
    counts_ptr += tl.load(option_ptrs[9] + row).to(tl.int64) * counts_stride
    return logits_ptr + row * stride, counts_ptr, penalized, repetition, presence, frequency


@triton.jit
def read(source, offs, inside):
    """Logits in fp32 after the penalties; -inf outside."""
    logits_ptr, counts_ptr, penalized, repetition, presence, frequency = source
    logit = tl.load(logits_ptr + offs, mask=inside, other=-float("inf")).to(tl.float32)
    if penalized:
        seen = tl.load(counts_ptr + offs, mask=inside, other=0).to(tl.int32)
        times = (seen & 0x7FFF).to(tl.float32)
        less = tl.where(logit > 0, logit / repetition, logit * repetition)
        logit = tl.where(seen != 0, less, logit)
        logit = logit - tl.where(times > 0, presence, 0.0) - frequency * times
    return logit


@triton.jit
def distance(source, maximum, offs, inside):
    """How far logits lie below the largest; infinite for those of -inf."""
    return maximum - read(source, offs, inside)


@triton.jit
def log_odds(part, total):
    part = tl.minimum(tl.maximum(part / tl.maximum(total, 1e-6), 1e-5), 1.0 - 1e-5)
    return tl.log(part / (1.0 - part))


@triton.jit
def pivots_of(bracket, goal):
    """The eight distances that a pass looks at, the last of them `high`.  [8]

    While `low` is unknown they are dense near 0. Later they are dense where the goal should be: log-odds of sums are
    nearly straight lines, for normal distributions and for tails that fall off exponentially.
    """
    low, high, below, within, total, _, _ = bracket
    step = tl.arange(0, 8)
    away = tl.abs(step - 3).to(tl.float32)  # 0: 0, 1: 1/64, 2: 1/16, 3: 1/4
    away = tl.where(step < 3, -1.0, 1.0) * tl.where(step == 3, 0.0, tl.exp2(2.0 * away - 8.0))
    first, last = log_odds(below, total), log_odds(within, total)
    part = (log_odds(goal, total) - first) / tl.maximum(last - first, 1e-6) + away
    part = tl.minimum(tl.maximum(part, 0.0), 1.0)
    even = (step + 1) * 0.125
    pivots = tl.where(low < 0, high * even * even, low + (high - low) * part)
    return tl.where(step == 7, high, pivots)


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def scan_kernel(
    logits_ptr, counts_ptr, option_ptrs, best_ptr, token_ptr, least_ptr, length_ptr,
    size, stride, counts_stride, part, PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One part of one row a program: its best score and token; of a row with filters its largest and smallest logit."""
    previous_done(PDL)
    row, index = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, k, p, share = filters_of(option_ptrs, row, size)
    noisy = (temperature >= COLDEST) & (k == 0) & (p >= 1.0) & (share <= 0.0)
    source = source_of(logits_ptr, stride, counts_ptr, counts_stride, option_ptrs, row)
    key = noise_key(option_ptrs[1], option_ptrs[2], row)
    scale = 1.0 / tl.where(noisy, temperature, 1.0)
    start, stop = index * part, tl.minimum(index * part + part, size)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    least = tl.full([BLOCK], float("inf"), tl.float32)
    token = tl.full([BLOCK], 0, tl.int32) + start
    for at in range(start, stop, BLOCK):
        offs = at + tl.arange(0, BLOCK)
        score = read(source, offs, offs < stop)
        if noisy:
            score = score * scale + noise(key, offs)
        else:
            least = tl.minimum(least, tl.where(score > -float("inf"), score, float("inf")))
        better = score > best
        best, token = tl.where(better, score, best), tl.where(better, offs, token)
    top, out = tl.max(best, 0), row * tl.num_programs(1) + index
    tl.store(best_ptr + out, top)
    tl.store(token_ptr + out, tl.min(tl.where(best == top, token, LAST), 0))
    tl.store(least_ptr + out, tl.min(least, 0))
    if index == 0:
        tl.store(length_ptr + row, 0)


@triton.jit
def first_bracket(best_ptr, least_ptr, row, parts, temperature, k, p, share, PARTS: tl.constexpr):
    """Where the border lies before any pass, as `narrowed` says it.

    What is less than e^-32 times as likely as the best does not matter to top-p: V e^-32 < 1e-8.
    """
    offs = tl.arange(0, PARTS)
    maximum = tl.max(tl.load(best_ptr + row * parts + offs, mask=offs < parts, other=-float("inf")), 0)
    least = tl.min(tl.load(least_ptr + row * parts + offs, mask=offs < parts, other=float("inf")), 0)
    high = tl.minimum(maximum - least, LARGEST)
    high = tl.where((k == 0) & (p < 1.0), tl.minimum(high, 32.0 * temperature), high)
    high = tl.where(share > 0.0, tl.minimum(high, -tl.log(tl.where(share > 0.0, share, 1.0)) * temperature), high)
    low = tl.where((k == 0) & (p >= 1.0), high, -1.0)
    done = (low >= high).to(tl.float32)
    nothing = 0.0 * done
    return low, high, nothing, nothing, nothing, maximum, done


@triton.jit
def narrowed(bracket_ptr, sums_ptr, row, temperature, k, p, chunks, CAPACITY: tl.constexpr, CHUNKS: tl.constexpr):
    """The bracket after a pass: (low, high, what lies within each, within the first high, the largest logit, done).

    Done: what the list has to hold has place in it. Each of a bracket weighs at least exp(-high / temperature).
    """
    bracket_ptr += row * 16
    low, high, maximum = tl.load(bracket_ptr), tl.load(bracket_ptr + 1), tl.load(bracket_ptr + 5)
    below, within, total = tl.load(bracket_ptr + 2), tl.load(bracket_ptr + 3), tl.load(bracket_ptr + 4)
    done = tl.load(bracket_ptr + 6)
    step, chunk = tl.arange(0, 8), tl.arange(0, CHUNKS)
    pivots = tl.load(bracket_ptr + 8 + step)
    offs = (row * 8 + step[:, None]) * chunks + chunk[None, :]
    parts = tl.load(sums_ptr + offs, mask=chunk[None, :] < chunks, other=0.0)
    if done == 0.0:
        sums = tl.sum(parts, 1)
        total = tl.where(total > 0.0, total, tl.max(sums, 0))
        reached = (sums >= goal_of(k, p, total)) | (step == 7)
        within = tl.min(tl.where(reached, sums, float("inf")), 0)
        below = tl.maximum(below, tl.max(tl.where(reached, 0.0, sums), 0))
        low = tl.maximum(low, tl.max(tl.where(reached, -1.0, pivots), 0))
        high = tl.min(tl.where(reached, pivots, high), 0)
        most = tl.where(k > 0, within, (within - below) * tl.exp(high / temperature))
        done = (most <= CAPACITY).to(tl.float32)
    return low, high, below, within, total, maximum, done


@triton.jit
def goal_of(k, p, total):
    """What has to lie within the border."""
    return tl.where(k > 0, k.to(tl.float32), p * total)


@triton.jit
def store_bracket(bracket_ptr, row, bracket):
    for i in tl.static_range(7):
        tl.store(bracket_ptr + row * 16 + i, bracket[i])


@triton.jit
def narrow_kernel(
    logits_ptr, counts_ptr, option_ptrs, best_ptr, least_ptr, old_bracket_ptr, old_sums_ptr, bracket_ptr, sums_ptr,
    size, stride, counts_stride, parts, chunks, chunks_each, FIRST: tl.constexpr, CAPACITY: tl.constexpr,
    PDL: tl.constexpr, PARTS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Some chunks of one row a program: how much of each lies within each of the bracket's eight distances."""
    previous_done(PDL)
    row, index = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, k, p, share = filters_of(option_ptrs, row, size)
    if (k == 0) & (p >= 1.0) & (share <= 0.0):
        return
    if FIRST:
        bracket = first_bracket(best_ptr, least_ptr, row, parts, temperature, k, p, share, PARTS)
    else:
        bracket = narrowed(old_bracket_ptr, old_sums_ptr, row, temperature, k, p, chunks, CAPACITY, CHUNKS)
    if index == 0:
        store_bracket(bracket_ptr, row, bracket)
    _low, _high, _below, _within, total, maximum, done = bracket
    if done > 0.0:
        return
    pivots = pivots_of(bracket, goal_of(k, p, total))
    if index == 0:
        tl.store(bracket_ptr + row * 16 + 8 + tl.arange(0, 8), pivots)
    source = source_of(logits_ptr, stride, counts_ptr, counts_stride, option_ptrs, row)
    scale = -LOG2_E / temperature
    sums_ptr += (row * 8 + tl.arange(0, 8)) * chunks
    for chunk in range(index * chunks_each, tl.minimum((index + 1) * chunks_each, chunks)):
        offs = (chunk * CHUNK + tl.arange(0, CHUNK))[None, :]
        far = distance(source, maximum, offs, offs < size)
        weight = tl.where(k > 0, 1.0, tl.exp2(far * scale))
        inside = (far <= pivots[:, None]).to(tl.float32)  # a product costs one instruction less than a choice
        tl.store(sums_ptr + chunk, tl.sum(weight * inside, 1))


@triton.jit
def collect_kernel(
    logits_ptr, counts_ptr, option_ptrs, old_bracket_ptr, sums_ptr, bracket_ptr, best_ptr, token_ptr, length_ptr,
    list_ptr, size, stride, counts_stride, part, chunks,
    CAPACITY: tl.constexpr, PDL: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One part of one row a program: the best of those kept for certain, and the list of those that may be."""
    previous_done(PDL)
    row, index = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, k, p, share = filters_of(option_ptrs, row, size)
    if (k == 0) & (p >= 1.0) & (share <= 0.0):
        return
    bracket = narrowed(old_bracket_ptr, sums_ptr, row, temperature, k, p, chunks, CAPACITY, CHUNKS)
    if index == 0:
        store_bracket(bracket_ptr, row, bracket)
    low, high, _, _, _, maximum, done = bracket
    certain = tl.where(k > 0, -1.0, low)
    last = tl.where(done > 0.0, high, -1.0)  # no list if it would be too long
    some_certain, listing = certain >= 0.0, last > certain
    source = source_of(logits_ptr, stride, counts_ptr, counts_stride, option_ptrs, row)
    key, scale = noise_key(option_ptrs[1], option_ptrs[2], row), 1.0 / temperature
    start, stop = index * part, tl.minimum(index * part + part, size)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    token = tl.full([BLOCK], 0, tl.int32) + start
    # Atomics want each thread's elements apart. Loads of neighbors would put them together, and each block would be
    # exchanged between threads, with four barriers; the compiler does not know that `nothing` is 0.
    nothing = (temperature < 0.0).to(tl.int32)
    lane = tl.arange(0, BLOCK) ^ nothing
    for at in range(start, stop, BLOCK):
        offs = at + lane
        far = distance(source, maximum, offs, offs < stop)
        if some_certain:
            score = tl.where(far <= certain, noise(key, offs) - far * scale, -float("inf"))
            better = score > best
            best, token = tl.where(better, score, best), tl.where(better, offs, token)
        near = (far > certain) & (far <= last)
        if listing:
            place = tl.atomic_add(length_ptr + row + 0 * lane, 1, mask=near, sem="relaxed")
            tl.store(list_ptr + row * CAPACITY + place, order_of(far, offs), mask=near & (place < CAPACITY))
    top, out = tl.max(best, 0), row * tl.num_programs(1) + index
    tl.store(best_ptr + out, top)
    tl.store(token_ptr + out, tl.min(tl.where(best == top, token, LAST), 0))


@triton.jit
def order_of(far, token):
    """A number that is less for a smaller distance, and of equal ones for a smaller token.  int64

    The bits of fp32 numbers that are not negative grow with them.
    """
    return (far.to(tl.int32, bitcast=True).to(tl.int64) << 32) | token


@triton.jit
def survey(pool, limit, BLOCK: tl.constexpr):
    """Of the candidates that come before `limit` in order: how many, their weight, the best score and its order."""
    short, list_ptr, source, length, first, last, maximum, key, scale = pool
    count, weight = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int64)
    best, best_order = tl.full([BLOCK], -float("inf"), tl.float32), tl.full([BLOCK], NEVER, tl.int64)
    for at in range(0, length, BLOCK):
        offs = at + tl.arange(0, BLOCK)
        if short:
            order = tl.load(list_ptr + offs, mask=offs < length, other=NEVER)
        else:
            order = order_of(distance(source, maximum, offs, offs < length), offs)
        before = (order > first) & (order <= last) & (order < limit)
        token, far = order.to(tl.int32), (order >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        count += before.to(tl.int32)
        weight += tl.where(before, tl.exp(-far * scale) * UNIT, 0.0).to(tl.int64)
        score = tl.where(before, noise(key, token) - far * scale, -float("inf"))
        better = (score > best) | ((score == best) & before & (token < best_order.to(tl.int32)))
        best, best_order = tl.where(better, score, best), tl.where(better, order, best_order)
    top = tl.max(best, 0)
    token = tl.min(tl.where(best == top, best_order.to(tl.int32), LAST), 0)
    order = tl.min(tl.where((best == top) & (best_order.to(tl.int32) == token), best_order, NEVER), 0)
    return tl.sum(count, 0), tl.sum(weight, 0).to(tl.float32) * (1.0 / UNIT), top, order


@triton.jit
def border(pool, k, low, high, CAPACITY: tl.constexpr, BLOCK: tl.constexpr):
    """The order behind the k nearest and all that are as near as the k-th, by bisecting the bits of distances."""
    short, list_ptr, _, length, _, _, _, _, _ = pool
    offs = tl.arange(0, CAPACITY)
    listed = tl.load(list_ptr + offs, mask=offs < tl.where(short, length, 0), other=NEVER) >> 32
    under = tl.where(low < 0.0, -1, low.to(tl.int32, bitcast=True))
    over = high.to(tl.int32, bitcast=True)
    while under + 1 < over:
        middle = under + (over - under) // 2
        if short:
            count = tl.sum((listed <= middle).to(tl.int32), 0)
        else:
            count = survey(pool, (middle.to(tl.int64) + 1) << 32, BLOCK)[0]
        over = tl.where(count >= k, middle, over)
        under = tl.where(count == k, over - 1, tl.where(count > k, under, middle))
    return (over.to(tl.int64) + 1) << 32


@triton.jit
def is_ahead(score, order, top, first):
    """Whether a candidate beats the best of those that are certain."""
    return (score > top) | ((score == top) & (order < NEVER) & (order.to(tl.int32) < first))


@triton.jit
def settle_kernel(
    logits_ptr, counts_ptr, option_ptrs, bracket_ptr, best_ptr, token_ptr, length_ptr, list_ptr, out_ptr,
    size, stride, counts_stride, parts,
    CAPACITY: tl.constexpr, PDL: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program: the best of its parts, unless one of the list is better and kept."""
    previous_done(PDL)
    row, offs = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
    temperature, k, p, _share = filters_of(option_ptrs, row, size)
    best = tl.load(best_ptr + row * parts + offs, mask=offs < parts, other=-float("inf"))
    token = tl.load(token_ptr + row * parts + offs, mask=offs < parts, other=LAST)
    top = tl.max(best, 0)
    first = tl.min(tl.where(best == top, token, LAST), 0)
    if (k > 0) | (p < 1.0):
        bracket_ptr += row * 16
        low, high, maximum = tl.load(bracket_ptr), tl.load(bracket_ptr + 1), tl.load(bracket_ptr + 5)
        below, total, done = tl.load(bracket_ptr + 2), tl.load(bracket_ptr + 4), tl.load(bracket_ptr + 6)
        length = tl.load(length_ptr + row)
        short = (done > 0.0) & (length <= CAPACITY)
        length = tl.where(short, length, size)
        certain = tl.where((k > 0) | (low < 0.0), -1, order_of(low, LAST))
        source = source_of(logits_ptr, stride, counts_ptr, counts_stride, option_ptrs, row)
        key, scale = noise_key(option_ptrs[1], option_ptrs[2], row), 1.0 / temperature
        pool = short, list_ptr + row * CAPACITY, source, length, certain, order_of(high, LAST), maximum, key, scale
        limit = NEVER + tl.zeros_like(certain)
        if (k > 0) & (length > k):
            limit = border(pool, k, low, high, CAPACITY, BLOCK)
        _, weight, score, order = survey(pool, limit, BLOCK)
        below, goal = tl.where(k > 0, 0.0, below), p * tl.where(k > 0, weight, total)
        drawing = (p < 1.0) & is_ahead(score, order, top, first)
        while drawing:
            _, weight, next_score, next_order = survey(pool, order, BLOCK)
            refused = (below + weight >= goal) & (below + weight > 0.0)
            score, order = tl.where(refused, next_score, score), tl.where(refused, next_order, order)
            drawing = refused & is_ahead(score, order, top, first)
        first = tl.where(is_ahead(score, order, top, first), order.to(tl.int32), first)
    tl.store(out_ptr + row, first.to(tl.int64))


@operation(
    "draw_tokens",
    reference=reference,
    torch=torch_path,
    check=check,
    fake=lambda logits, *_: logits.new_empty(len(logits), dtype=torch.int64),
)
def draw_tokens(
    logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
    repetition: Tensor, presence: Tensor, frequency: Tensor, rows: Tensor, counts: Tensor,
) -> Tensor:  # fmt: skip
    """A token from each row, after penalties, temperature, min-p, top-k and top-p, in this order, as in `sampling`.

    logits [S, V] of any floating dtype; temperatures [S] fp32 (below 1e-5: greedy, and no filter matters), seeds [S]
    int64, positions [S] int32 or int64 as for `gumbel_argmax`; top_k [S] int32 (0 or less, or V or more: keeps all),
    top_p (1: all), min_p (0: all), repetition (1: none), presence and frequency (0: none) [S] fp32; rows [S] int32,
    where in counts [R, V] int16 a sequence's are: how often a token occurred in the output, and in the sign bit whether
    in the prompt. Of sequences without penalties nothing is read there. -> [S] int64.

    -inf and NaN are never drawn; a row of nothing else gives token 0. Raises TypeError and ValueError with the
    argument's name.
    """
    (n, size), device = logits.shape, logits.device
    tokens = torch.empty(n, dtype=torch.int64, device=device)
    if n == 0:
        return tokens

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    sms, chunks = sm_count(device.index), ceil_div(size, CHUNK)
    programs = max(1, 8 * sms // n)  # a row; so many that a few rows with filters among plain ones keep the GPU busy
    part = ceil_div(ceil_div(size, min(programs, ceil_div(size, BLOCK))), BLOCK) * BLOCK
    parts, each = ceil_div(size, part), ceil_div(chunks, min(programs, chunks))
    sizes = {"CHUNKS": next_power_of_2(chunks), "CAPACITY": CAPACITY}
    options = (temperatures, seeds, positions, top_k, top_p, min_p, repetition, presence, frequency, rows)
    row, strides = (logits, counts, options), (size, logits.stride(0), counts.stride(0))
    best, best_token, least = empty(n, parts), empty(n, parts, dtype=torch.int32), empty(n, parts)
    brackets, sums = empty(PASSES + 1, n, 16), empty(PASSES, n, 8, chunks)
    length, listed = empty(n, dtype=torch.int32), empty(n, CAPACITY, dtype=torch.int64)
    early = pdl(device)
    shape = {"num_warps": 8, "maxnreg": 64}  # registers: four programs to a multiprocessor

    scan_kernel[(n, parts)](*row, best, best_token, least, length, *strides, part, BLOCK=BLOCK, **shape, **early)
    for i in range(PASSES):
        narrow_kernel[(n, ceil_div(chunks, each))](
            *row, best, least, brackets[i - 1], sums[i - 1], brackets[i], sums[i], *strides, parts, chunks, each,
            FIRST=i == 0, PARTS=next_power_of_2(parts), CHUNK=CHUNK, **sizes, **shape, **early,
        )  # fmt: skip
    collect_kernel[(n, parts)](
        *row, brackets[-2], sums[-1], brackets[-1], best, best_token, length, listed, *strides, part,
        chunks, BLOCK=COLLECTED, **sizes, **shape, **early,
    )  # fmt: skip
    settle_kernel[(n,)](
        *row, brackets[-1], best, best_token, length, listed, tokens, *strides, parts,
        PARTS=next_power_of_2(parts), CAPACITY=CAPACITY, BLOCK=BLOCK, num_warps=8, **early,
    )  # fmt: skip
    return tokens


# ---- how often a token occurred --------------------------------------------------------------------------------------


def count_reference(counts: Tensor, rows: Tensor, tokens: Tensor, active: Tensor) -> None:
    """One by one."""
    for row, token in zip(rows[active].tolist(), tokens[active].tolist(), strict=True):
        if counts[row, token] & COUNT < COUNT:
            counts[row, token] += 1


def count_torch_path(counts: Tensor, rows: Tensor, tokens: Tensor, active: Tensor) -> None:
    """All at once."""
    at = (rows[active].long(), tokens[active])
    old = counts[at]
    counts[at] = old + ((old & COUNT) < COUNT).to(torch.int16)


def count_check(counts: Tensor, rows: Tensor, tokens: Tensor, active: Tensor) -> None:
    """Raise unless counts are [rows, V] int16, rows [S] int32, tokens [S] int64, active [S] bool."""
    _counts(counts, None, tokens.device)
    if tokens.dim() != 1 or tokens.dtype != torch.int64:
        raise ValueError(f"tokens: expected [S] of int64, got {list(tokens.shape)} of {tokens.dtype}")
    _each("rows", rows, tokens, torch.int32)
    _each("active", active, tokens, torch.bool)


@triton.jit
def count_kernel(counts_ptr, row_ptr, token_ptr, active_ptr, n, stride, PDL: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK sequences a program."""
    previous_done(PDL)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    active = tl.load(active_ptr + offs, mask=offs < n, other=0) != 0
    row = tl.load(row_ptr + offs, mask=active, other=0).to(tl.int64)
    at = counts_ptr + row * stride + tl.load(token_ptr + offs, mask=active, other=0)
    old = tl.load(at, mask=active, other=0).to(tl.int32)
    tl.store(at, (old + 1).to(tl.int16), mask=active & ((old & 0x7FFF) < 0x7FFF))


@operation(
    "count_tokens",
    reference=count_reference,
    torch=count_torch_path,
    check=count_check,
    fake=lambda counts, rows, tokens, active: None,
    in_place=("counts",),
)
def count_tokens(counts: Tensor, rows: Tensor, tokens: Tensor, active: Tensor) -> None:
    """Add one occurrence of each active sequence's new token to its row of counts; 32,767 stays.

    counts [R, V] int16 as for `draw_tokens`, rows [S] int32 (active sequences have a row each), tokens [S] int64,
    active [S] bool. Raises ValueError with the argument's name.
    """
    if len(tokens):
        count_kernel[(ceil_div(len(tokens), 256),)](
            counts, rows, tokens, active, len(tokens), counts.stride(0), BLOCK=256, num_warps=4, **pdl(tokens.device)
        )


def set_counts(counts: Tensor, row: int, prompt_ids: Tensor, output_ids: Tensor) -> None:
    """Fill one row of counts for a sequence that comes in, or comes back. Nothing waits for the device.

    counts [R, V] int16 as for `draw_tokens`; prompt_ids and output_ids int64 of any length, on the device of counts.
    """
    times = torch.zeros(counts.shape[1], dtype=torch.int32, device=counts.device)
    times.index_add_(0, output_ids, torch.ones_like(output_ids, dtype=torch.int32))
    times.clamp_(max=COUNT)
    times[prompt_ids] = times[prompt_ids] + IN_PROMPT
    counts[row] = times
