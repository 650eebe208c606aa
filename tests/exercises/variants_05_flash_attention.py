"""Wrong and alternative implementations for the exercises of chapter 5: they keep the checks honest."""

import math
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from minillm.kernels.common import tl, triton
from minillm.learn.testing import alternative, wrong

INF = float("inf")

# ---- 5.w1


@wrong("5.w1", "adds without rescaling")
def one_more(m, l, a, score, value):  # noqa: E741
    m = max(m, score)
    return m, l + math.exp(score - m), a + math.exp(score - m) * value


@wrong("5.w1", "rescales the sum and not the values")
def one_more(m, l, a, score, value):  # noqa: E741
    new = max(m, score)
    return new, l * math.exp(m - new) + math.exp(score - new), a + math.exp(score - new) * value


@wrong("5.w1", "the new key is counted from the old maximum")
def one_more(m, l, a, score, value):  # noqa: E741
    new, weight = max(m, score), math.exp(min(score - m, 700)) if m > -INF else 1.0
    return new, l * math.exp(m - new) + weight, a * math.exp(m - new) + weight * value


@wrong("5.w1", "a is the attention, divided already")
def one_more(m, l, a, score, value):  # noqa: E741
    new = max(m, score)
    total = l * math.exp(m - new) + math.exp(score - new)
    return new, total, (a * math.exp(m - new) + math.exp(score - new) * value) / total


@wrong("5.w1", "every key becomes the origin, so that large gaps overflow")
def one_more(m, l, a, score, value):  # noqa: E741
    shrink = math.exp(min(m - score, 700.0))
    high = max(m, score)
    back = math.exp(score - high)
    return high, (l * shrink + 1) * back, (a * shrink + value) * back


@wrong("5.w1", "starts from a maximum of 0")
def one_more(m, l, a, score, value):  # noqa: E741
    new = max(m, score, 0.0)
    return new, l * math.exp(m - new) + math.exp(score - new), a * math.exp(m - new) + math.exp(score - new) * value


@wrong("5.w1", "the first key is told by acc = 0")
def one_more(m, l, acc, score, value):  # noqa: E741
    if acc == 0:
        return (score, 1.0, value)
    highest = max(m, score)
    shrink, weight = (math.exp(m - highest), math.exp(score - highest))
    return (highest, l * shrink + weight, acc * shrink + weight * value)


@wrong("5.w1", "torch's numbers come back")
def one_more(m, l, acc, score, value):  # noqa: E741
    highest = max(m, score)
    shrink, weight = (math.exp(m - highest), math.exp(score - highest))
    return tuple(torch.tensor([highest, l * shrink + weight, acc * shrink + weight * value], dtype=torch.float64))


@wrong("5.w1", "sums in fp32")
def one_more(m, l, acc, score, value):  # noqa: E741
    highest = max(m, score)
    shrink, weight = (math.exp(m - highest), math.exp(score - highest))
    return (highest, float(torch.tensor(l * shrink + weight)), float(torch.tensor(acc * shrink + weight * value)))


@alternative("5.w1", "by cases")
def one_more(m, l, a, score, value):  # noqa: E741
    if score <= m:
        return m, l + math.exp(score - m), a + math.exp(score - m) * value
    return score, l * math.exp(m - score) + 1, a * math.exp(m - score) + value


# ---- 5.w2


@wrong("5.w2", "the end rounded down")
def touched(first, last, block):
    return first // block, last // block


@wrong("5.w2", "rounds the last key up, as if it were one past the end")
def touched(first, last, block):
    return first // block, max(first // block, -(-last // block))


@wrong("5.w2", "blocks that lie inside")
def touched(first, last, block):
    begin, end = -(-first // block), (last + 1) // block
    return begin, max(begin, end)


@wrong("5.w2", "no care for no key")
def touched(first, last, block):
    return first // block, last // block + 1


@wrong("5.w2", "in floating point")
def touched(first, last, block):
    return (math.floor(first / block), math.floor(last / block) + 1) if last >= first else (0, 0)


@wrong("5.w2", "counts blocks")
def touched(first, last, block):
    return (first // block, last // block + 1 - first // block) if last >= first else (0, 0)


@wrong("5.w2", "divides floats")
def touched(first, last, block):
    if last < first:
        return (0, 0)
    return (first // block, int(last / block) + 1)


@alternative("5.w2", "round up one past the end")
def touched(first, last, block):
    begin = first // block
    return begin, begin if last < first else (last + block) // block


# ---- 5.w3


@wrong("5.w3", "a triangle wherever the block is")
def block_mask(position, M, start, N):
    return torch.ones(M, N, dtype=torch.bool).tril()


@wrong("5.w3", "a query does not see itself")
def block_mask(position, M, start, N):
    return start + torch.arange(N) < position + torch.arange(M)[:, None]


@wrong("5.w3", "the other way around: True where hidden")
def block_mask(position, M, start, N):
    return start + torch.arange(N) > position + torch.arange(M)[:, None]


@wrong("5.w3", "keys down, queries across")
def block_mask(position, M, start, N):
    return start + torch.arange(N)[:, None] <= position + torch.arange(M)


@wrong("5.w3", "0 and 1 in place of False and True")
def block_mask(position, M, start, N):
    return (start + torch.arange(N) <= position + torch.arange(M)[:, None]).float()


@wrong("5.w3", "negative positions count as 0")
def block_mask(position, M, start, N):
    return start + torch.arange(N) <= (position + torch.arange(M)[:, None]).clamp(min=0)


@wrong("5.w3", "positions in fp32")
def block_mask(position, M, start, N):
    return (
        torch.arange(start, start + N, dtype=torch.float32)
        <= torch.arange(position, position + M, dtype=torch.float32)[:, None]
    )


@wrong("5.w3", "positions in 16 bits")
def block_mask(position, M, start, N):
    return (start + torch.arange(N)).short() <= (position + torch.arange(M)).short()[:, None]


@alternative("5.w3", "a triangle, moved")
def block_mask(position, M, start, N):
    return torch.ones(M, N).tril(position - start).bool()


# ---- 5.0


def online(q, k, v, block, what=""):
    """The right one, but for what is named."""
    m, total, acc = torch.full((len(q),), -INF), torch.zeros(len(q)), torch.zeros(len(q), v.shape[1])
    if what == "from 0":
        m = torch.zeros(len(q))
    if what == "from -1e4":
        m = torch.full((len(q),), -1e4)
    end = len(k) // block * block if what == "whole blocks" else len(k)
    for start in range(0, end, block):
        keys, values = k[start : min(start + block, end)], v[start : min(start + block, end)]
        scores = q @ keys.T / (1 if what == "no scale" else q.shape[1] ** 0.5)
        highest = scores.amax() if what == "one maximum" else scores.amax(1)
        new = torch.maximum(m, highest) if what != "no maximum" else torch.zeros(len(q))
        weights, shrink = torch.exp(scores - new[:, None]), torch.exp(m - new)
        if what == "no maximum":
            shrink = torch.ones(len(q))
        total = (total if what == "sum not rescaled" else total * shrink) + weights.sum(1)
        acc = (acc if what == "acc not rescaled" else acc * shrink[:, None]) + weights @ values
        m = new
    return acc if what == "not divided" else acc / total[:, None]


@wrong("5.0", "acc is not brought to the new maximum")
def online_attention(q, k, v, block):
    return online(q, k, v, block, "acc not rescaled")


@wrong("5.0", "the sum is not brought to the new maximum")
def online_attention(q, k, v, block):
    return online(q, k, v, block, "sum not rescaled")


@wrong("5.0", "scores are not scaled")
def online_attention(q, k, v, block):
    return online(q, k, v, block, "no scale")


@wrong("5.0", "never divides")
def online_attention(q, k, v, block):
    return online(q, k, v, block, "not divided")


@wrong("5.0", "no maximum")
def online_attention(q, k, v, block):
    return online(q, k, v, block, "no maximum")


@wrong("5.0", "one maximum for all queries")
def online_attention(q, k, v, block):
    return online(q, k, v, block, "one maximum")


@wrong("5.0", "the maximum starts at 0")
def online_attention(q, k, v, block):
    return online(q, k, v, block, "from 0")


@wrong("5.0", "the maximum starts at -10,000")
def online_attention(q, k, v, block):
    return online(q, k, v, block, "from -1e4")


@wrong("5.0", "the last keys are left out when the block does not divide them")
def online_attention(q, k, v, block):
    return online(q, k, v, block, "whole blocks")


@wrong("5.0", "all scores at once")
def online_attention(q, k, v, block):
    return (q @ k.T / q.shape[1] ** 0.5).softmax(1) @ v


@wrong("5.0", "blocks of 128 keys, whatever is asked")
def online_attention(q, k, v, block):
    return online(q, k, v, 128)


@wrong("5.0", "two blocks at a time")
def online_attention(q, k, v, block):
    return online(q, k, v, 2 * block)


@wrong("5.0", "hands back the values where there is one key")
def online_attention(q, k, v, block):
    if len(k) == 1:
        return v.expand(len(q), -1)
    m = torch.full((len(q),), -torch.inf)
    total, acc = (torch.zeros(len(q)), torch.zeros(len(q), v.shape[1]))
    for keys, values in zip(k.split(block), v.split(block), strict=True):
        scores = q @ keys.T / q.shape[1] ** 0.5
        new_m = torch.maximum(m, scores.amax(1))
        weights, shrink = (torch.exp(scores - new_m[:, None]), torch.exp(m - new_m))
        total = total * shrink + weights.sum(1)
        acc = acc * shrink[:, None] + weights @ values
        m = new_m
    return acc / total[:, None]


@wrong("5.0", "never takes fewer than 8 keys")
def online_attention(q, k, v, block):
    block = max(block, 8)
    m = torch.full((len(q),), -torch.inf)
    total, acc = (torch.zeros(len(q)), torch.zeros(len(q), v.shape[1]))
    for keys, values in zip(k.split(block), v.split(block), strict=True):
        scores = q @ keys.T / q.shape[1] ** 0.5
        new_m = torch.maximum(m, scores.amax(1))
        weights, shrink = (torch.exp(scores - new_m[:, None]), torch.exp(m - new_m))
        total = total * shrink + weights.sum(1)
        acc = acc * shrink[:, None] + weights @ values
        m = new_m
    return acc / total[:, None]


@wrong("5.0", "keeps the scores of all blocks in a list")
def online_attention(q, k, v, block):
    scores = [q @ keys.T / q.shape[1] ** 0.5 for keys in k.split(block)]
    m = torch.stack([s.amax(1) for s in scores]).amax(0)[:, None]
    w = [torch.exp(s - m) for s in scores]
    return sum(a @ b for a, b in zip(w, v.split(block), strict=True)) / sum(a.sum(1) for a in w)[:, None]


@wrong("5.0", "one query at a time, all keys at once")
def online_attention(q, k, v, block):
    out = torch.empty(len(q), v.shape[1])
    for i in range(len(q)):
        out[i] = (q[i] @ k.T / q.shape[1] ** 0.5).softmax(0) @ v
    return out


@wrong("5.0", "keeps the weights of all blocks")
def online_attention(q, k, v, block):
    kept = []
    m = torch.full((len(q),), -torch.inf)
    total, acc = (torch.zeros(len(q)), torch.zeros(len(q), v.shape[1]))
    for keys, values in zip(k.split(block), v.split(block), strict=True):
        scores = q @ keys.T / q.shape[1] ** 0.5
        new_m = torch.maximum(m, scores.amax(1))
        weights, shrink = (torch.exp(scores - new_m[:, None]), torch.exp(m - new_m))
        total = total * shrink + weights.sum(1)
        acc = acc * shrink[:, None] + weights @ values
        m = new_m
        kept = [*kept, weights]
    return acc / total[:, None]


@alternative("5.0", "a partial result for each block, combined at the end")
def online_attention(q, k, v, block):
    parts = []
    for keys, values in zip(k.split(block), v.split(block), strict=True):
        s = q @ keys.T / q.shape[1] ** 0.5
        m = s.amax(1)
        p = (s - m[:, None]).exp()
        parts.append((m, p.sum(1), p @ values))
    top = torch.stack([m for m, _, _ in parts]).amax(0)
    total = sum(each * (m - top).exp() for m, each, _ in parts)
    return sum(a * (m - top).exp()[:, None] for m, _, a in parts) / total[:, None]


@wrong("5.0", "attention within each block, averaged")
def online_attention(q, k, v, block):
    parts = [online(q, a, b, block) for a, b in zip(k.split(block), v.split(block), strict=True)]
    return torch.stack(parts).mean(0)


@wrong("5.0", "scales the caller's q in place")
def online_attention(q, k, v, block):
    q *= q.shape[1] ** -0.5
    return online(q, k, v, block, "no scale")


@wrong("5.0", "acc has q's size")
def online_attention(q, k, v, block):
    out = torch.zeros_like(q)
    out[:] = online(q, k, v, block)
    return out


@alternative("5.0", "two passes: maximum and sum, then the output")
def online_attention(q, k, v, block):
    m, total = torch.full((len(q), 1), -1e30), torch.zeros(len(q), 1)
    for keys in k.split(block):
        s = q @ keys.T / q.shape[1] ** 0.5
        new = torch.maximum(m, s.amax(1, keepdim=True))
        total, m = total * (m - new).exp() + (s - new).exp().sum(1, keepdim=True), new
    out = torch.zeros(len(q), v.shape[1])
    for keys, values in zip(k.split(block), v.split(block), strict=True):
        out += ((q @ keys.T / q.shape[1] ** 0.5 - m).exp() / total) @ values
    return out


@alternative("5.0", "from right to left, keys as a slice")
def online_attention(q, k, v, block):
    m, total, acc = torch.full((len(q), 1), -INF), torch.zeros(len(q), 1), torch.zeros(len(q), v.shape[1])
    for start in reversed(range(0, len(k), block)):
        s = q @ k[start : start + block].T * q.shape[1] ** -0.5
        new = torch.maximum(m, s.max(1, keepdim=True).values)
        p, shrink = (s - new).exp(), (m - new).exp()
        total, acc, m = total * shrink + p.sum(1, keepdim=True), acc * shrink + p @ v[start : start + block], new
    return acc / total


# ---- 5.1


@wrong("5.1", "adds without rescaling")
def merge(a, b):
    return torch.maximum(a[0], b[0]), a[1] + b[1], a[2] + b[2]


@wrong("5.1", "no care for two empty sides: -inf minus -inf")
def merge(a, b):
    m = torch.maximum(a[0], b[0])
    x, y = torch.exp(a[0] - m), torch.exp(b[0] - m)
    return m, a[1] * x + b[1] * y, a[2] * x[..., None] + b[2] * y[..., None]


@wrong("5.1", "rescales the left side alone, as the running softmax does with raw scores")
def merge(a, b):
    m = torch.maximum(a[0], b[0])
    x = torch.exp(a[0] - m.masked_fill(m == -INF, 0.0))
    return m, a[1] * x + b[1], a[2] * x[..., None] + b[2]


@wrong("5.1", "the factor upside down: overflows, and is wrong before that")
def merge(a, b):
    m = torch.maximum(a[0], b[0])
    o = m.masked_fill(m == -INF, 0.0)
    x, y = torch.exp(o - a[0]), torch.exp(o - b[0])
    return m, a[1] * x + b[1] * y, a[2] * x[..., None] + b[2] * y[..., None]


@wrong("5.1", "forgets to rescale acc")
def merge(a, b):
    m = torch.maximum(a[0], b[0])
    o = m.masked_fill(m == -INF, 0.0)
    return m, a[1] * torch.exp(a[0] - o) + b[1] * torch.exp(b[0] - o), a[2] + b[2]


@wrong("5.1", "returns the attention in place of the sum")
def merge(a, b):
    m = torch.maximum(a[0], b[0])
    o = m.masked_fill(m == -INF, 0.0)
    x, y = torch.exp(a[0] - o), torch.exp(b[0] - o)
    total = a[1] * x + b[1] * y
    return m, total, (a[2] * x[..., None] + b[2] * y[..., None]) / total.clamp(min=1e-30)[..., None]


@wrong("5.1", "back to exponentials of the scores themselves: overflows")
def merge(a, b):
    x, y = torch.exp(a[0]), torch.exp(b[0])
    m = torch.maximum(a[0], b[0])
    z = torch.exp(m).clamp(min=1e-30)
    return m, (a[1] * x + b[1] * y) / z, (a[2] * x[..., None] + b[2] * y[..., None]) / z[..., None]


@wrong("5.1", "decides for all queries at once which side is larger")
def merge(a, b):
    if a[0].max() < b[0].max():
        a, b = b, a
    m = a[0]
    y = torch.exp(b[0] - m.masked_fill(m == -INF, 0.0))
    return m, a[1] + b[1] * y, a[2] + b[2] * y[..., None]


@wrong("5.1", "works in the caller's tensors")
def merge(a, b):
    m = torch.maximum(a[0], b[0])
    o = m.masked_fill(m == -INF, 0.0)
    for part in (a, b):
        shrink = torch.exp(part[0] - o)
        part[1].mul_(shrink)
        part[2].mul_(shrink[..., None])
    return m, a[1] + b[1], a[2] + b[2]


@wrong("5.1", "a maximum of -1e30 for no keys, so that nothing merged with nothing is not what it was")
def merge(a, b):
    m = torch.maximum(a[0], b[0]).clamp(min=-1e30)
    x, y = torch.exp(a[0] - m), torch.exp(b[0] - m)
    return m, a[1] * x + b[1] * y, a[2] * x[..., None] + b[2] * y[..., None]


@wrong("5.1", "gives the other side back when one is empty")
def merge(a, b):
    if (b[0] == -INF).all():
        return a
    if (a[0] == -INF).all():
        return b
    m = torch.maximum(a[0], b[0])
    o = m.masked_fill(m == -INF, 0.0)
    x, y = torch.exp(a[0] - o), torch.exp(b[0] - o)
    return m, a[1] * x + b[1] * y, a[2] * x[..., None] + b[2] * y[..., None]


@wrong("5.1", "in fp32 whatever comes")
def merge(a, b):
    a, b = (tuple(t.float() for t in part) for part in (a, b))
    m = torch.maximum(a[0], b[0])
    o = m.masked_fill(m == -INF, 0.0)
    x, y = torch.exp(a[0] - o), torch.exp(b[0] - o)
    return m, a[1] * x + b[1] * y, a[2] * x[..., None] + b[2] * y[..., None]


@wrong("5.1", "a sum of at least 1e-30: nothing merged with nothing is something")
def merge(a, b):
    m = torch.maximum(a[0], b[0])
    o = m.masked_fill(m == -INF, 0.0)
    x, y = torch.exp(a[0] - o), torch.exp(b[0] - o)
    return m, (a[1] * x + b[1] * y).clamp(min=1e-30), a[2] * x[..., None] + b[2] * y[..., None]


@wrong("5.1", "an origin of at least -1e9, below which real scores vanish")
def merge(a, b):
    m = torch.maximum(a[0], b[0])
    o = m.clamp(min=-1e9)
    x, y = torch.exp(a[0] - o), torch.exp(b[0] - o)
    return m, a[1] * x + b[1] * y, a[2] * x[..., None] + b[2] * y[..., None]


@wrong("5.1", "flattens by view, which needs contiguous inputs")
def merge(a, b):
    shape = a[0].shape
    flat = [(p[0].view(-1), p[1].view(-1), p[2].view(-1, p[2].shape[-1])) for p in (a, b)]
    m = torch.maximum(flat[0][0], flat[1][0])
    o = m.masked_fill(m == -INF, 0.0)
    x, y = torch.exp(flat[0][0] - o), torch.exp(flat[1][0] - o)
    acc = flat[0][2] * x[:, None] + flat[1][2] * y[:, None]
    return m.view(shape), (flat[0][1] * x + flat[1][1] * y).view(shape), acc.view(a[2].shape)


@wrong("5.1", "factors in fp32 for fp64")
def merge(a, b):
    m = torch.maximum(a[0], b[0])
    origin = m.masked_fill(m == float("-inf"), 0.0)
    total, acc = (torch.zeros_like(m), torch.zeros_like(a[2]))
    for part_m, part_l, part_acc in (a, b):
        shrink = torch.exp((part_m - origin).float())
        total = total + part_l * shrink
        acc = acc + part_acc * shrink[..., None]
    return (m, total, acc)


@wrong("5.1", "asks for the largest maximum of all: no query, no largest")
def merge(a, b):
    m = torch.maximum(a[0], b[0])
    if m.max() == -torch.inf:
        return (m, torch.zeros_like(m), torch.zeros_like(a[2]))
    origin = m.masked_fill(m == float("-inf"), 0.0)
    total, acc = (torch.zeros_like(m), torch.zeros_like(a[2]))
    for part_m, part_l, part_acc in (a, b):
        shrink = torch.exp(part_m - origin)
        total = total + part_l * shrink
        acc = acc + part_acc * shrink[..., None]
    return (m, total, acc)


@wrong("5.1", "who has no values has no keys")
def merge(a, b):
    m = torch.maximum(a[0], b[0])
    origin = m.masked_fill(m == float("-inf"), 0.0)
    total, acc = (torch.zeros_like(m), torch.zeros_like(a[2]))
    for part_m, part_l, part_acc in (a, b):
        shrink = torch.exp(part_m - origin)
        total = total + torch.where(part_acc.abs().sum(-1) > 0, part_l * shrink, 0)
        acc = acc + part_acc * shrink[..., None]
    return (m, total, acc)


@wrong("5.1", "hands back a where there is no query")
def merge(a, b):
    if a[0].numel() == 0:
        return a
    m = torch.maximum(a[0], b[0])
    origin = m.masked_fill(m == float("-inf"), 0.0)
    total, acc = (torch.zeros_like(m), torch.zeros_like(a[2]))
    for part_m, part_l, part_acc in (a, b):
        shrink = torch.exp(part_m - origin)
        total = total + part_l * shrink
        acc = acc + part_acc * shrink[..., None]
    return (m, total, acc)


@alternative("5.1", "nan_to_num on the factors, stacked")
def merge(a, b):
    ms, ls = torch.stack((a[0], b[0])), torch.stack((a[1], b[1]))
    m = ms.amax(0)
    factors = torch.nan_to_num(torch.exp(ms - m), nan=1.0)
    accs = torch.stack((a[2], b[2]))
    return m, (ls * factors).sum(0), (accs * factors[..., None]).sum(0)


# ---- 5.2


def tile(q, k, v, position, block, sink, *, dtype=torch.float32, end=None, mask="causal", rescale=True, start=None,
         back=False):  # fmt: skip
    """The right tile, with switches for what can go wrong."""
    tokens, size = q.shape
    positions = position + torch.arange(tokens)[:, None]
    m, total, acc = start or (
        torch.full((tokens,), -INF if sink is None else sink, dtype=dtype),
        torch.full((tokens,), 0.0 if sink is None else 1.0, dtype=dtype),
        torch.zeros(tokens, size, dtype=dtype),
    )
    end = max(0, min(len(k), position + tokens)) if end is None else end
    starts = range(0, end, block)
    for first in reversed(starts) if back else starts:
        keys = torch.arange(first, min(first + block, len(k)))
        s = q.to(dtype) @ k[keys].to(dtype).T / size**0.5
        if mask == "causal":
            s = s.masked_fill(keys > positions, -INF)
        elif mask == "strict":
            s = s.masked_fill(keys >= positions, -INF)
        elif mask == "square":
            s = s.masked_fill(keys > torch.arange(tokens)[:, None], -INF)
        elif mask == "finite":
            s = s.masked_fill(keys > positions, -1e9)
        new = torch.maximum(m, s.amax(1))
        origin = new.masked_fill(new == -INF, 0.0)
        p, shrink = torch.exp(s - origin[:, None]), torch.exp(m - origin)
        total = total * shrink + p.sum(1)
        acc = (acc * shrink[:, None] if rescale else acc) + p @ v[keys].to(dtype)
        m = new
    return (acc / total.masked_fill(total == 0, 1.0)[:, None]).to(q.dtype), (m + torch.log(total)).float()


@wrong("5.2", "does not rescale the accumulator")
def flash_tile(q, k, v, position, block, sink=None):
    return tile(q, k, v, position, block, sink, rescale=False)


@wrong("5.2", "the sink is forgotten")
def flash_tile(q, k, v, position, block, sink=None):
    return tile(q, k, v, position, block, None)


@wrong("5.2", "the sink enters the sum as it is, not as an exponential from the maximum")
def flash_tile(q, k, v, position, block, sink=None):
    out, lse = tile(q, k, v, position, block, None)
    if sink is None:
        return out, lse
    total = lse.exp() + sink
    return out * (lse.exp() / total)[:, None], total.log()


@wrong("5.2", "a query does not see itself")
def flash_tile(q, k, v, position, block, sink=None):
    return tile(q, k, v, position, block, sink, mask="strict")


@wrong("5.2", "the mask of a tile at position 0")
def flash_tile(q, k, v, position, block, sink=None):
    return tile(q, k, v, position, block, sink, mask="square")


@wrong("5.2", "masks with -1e9: a query that sees nothing averages what it must not see")
def flash_tile(q, k, v, position, block, sink=None):
    return tile(q, k, v, position, block, sink, mask="finite", end=len(k))


@wrong("5.2", "visits every block")
def flash_tile(q, k, v, position, block, sink=None):
    return tile(q, k, v, position, block, sink, end=len(k))


@wrong("5.2", "stops at the first query's last key")
def flash_tile(q, k, v, position, block, sink=None):
    return tile(q, k, v, position, block, sink, end=max(0, min(len(k), position + 1)))


@wrong("5.2", "computes in the inputs' dtype")
def flash_tile(q, k, v, position, block, sink=None):
    return tile(q, k, v, position, block, sink, dtype=q.dtype)


@wrong("5.2", "drops the last keys when the block does not divide them")
def flash_tile(q, k, v, position, block, sink=None):
    end = max(0, min(len(k), position + len(q)))
    return tile(q, k, v, position, block, sink, end=end // block * block)


@wrong("5.2", "all scores at once")
def flash_tile(q, k, v, position, block, sink=None):
    end = max(0, min(len(k), position + len(q)))
    s = q.float() @ k[:end].float().T / q.shape[1] ** 0.5
    s = s.masked_fill(torch.arange(end) > position + torch.arange(len(q))[:, None], -INF)
    if sink is not None:
        s = torch.cat((s, torch.full((len(q), 1), sink)), 1)
    p = torch.nan_to_num(s.softmax(1))[:, :end]
    return (p @ v[:end].float()).to(q.dtype), s.logsumexp(1)


@wrong("5.2", "the log-sum-exp without the maximum")
def flash_tile(q, k, v, position, block, sink=None):
    out, lse = tile(q, k, v, position, block, sink)
    return out, lse.exp().log()


@wrong("5.2", "scales q in its own dtype before it becomes fp32")
def flash_tile(q, k, v, position, block, sink=None):
    out, lse = tile((q * q.shape[1] ** -0.5).float() * q.shape[1] ** 0.5, k, v, position, block, sink)
    return out.to(q.dtype), lse


@wrong("5.2", "blocks of 128 keys, whatever is asked")
def flash_tile(q, k, v, position, block, sink=None):
    return tile(q, k, v, position, 128, sink, end=max(0, min(len(k), position + len(q))))


@wrong("5.2", "two blocks at a time")
def flash_tile(q, k, v, position, block, sink=None):
    return tile(q, k, v, position, 2 * block, sink, end=max(0, min(len(k), position + len(q))))


@wrong("5.2", "masks the last block alone")
def flash_tile(q, k, v, position, block, sink=None):
    end = max(0, min(len(k), position + len(q)))
    last = max(0, end - 1) // block * block
    m, total, acc = torch.full((len(q),), -INF if sink is None else sink), torch.ones(len(q)), None
    total, acc = torch.full((len(q),), 0.0 if sink is None else 1.0), torch.zeros(q.shape)
    for first in range(0, end, block):
        keys = torch.arange(first, min(first + block, end))
        s = q.float() @ k[keys].float().T / q.shape[1] ** 0.5
        if first == last:
            s = s.masked_fill(keys > position + torch.arange(len(q))[:, None], -INF)
        new = torch.maximum(m, s.amax(1))
        origin = new.masked_fill(new == -INF, 0.0)
        p, shrink = torch.exp(s - origin[:, None]), torch.exp(m - origin)
        total, acc, m = total * shrink + p.sum(1), acc * shrink[:, None] + p @ v[keys].float(), new
    return (acc / total.masked_fill(total == 0, 1.0)[:, None]).to(q.dtype), m + torch.log(total)


@wrong("5.2", "a mask of all keys before the loop")
def flash_tile(q, k, v, position, block, sink=None):
    seen = torch.arange(len(k)) <= position + torch.arange(len(q))[:, None]
    assert seen.shape == (len(q), len(k))
    return tile(q, k, v, position, block, sink)


@wrong("5.2", "hides with -1e9: scores that are lower hide instead")
def flash_tile(q, k, v, position, block, sink=None):
    if position < 0 or len(k) == 0:
        return tile(q, k, v, position, block, sink)
    return tile(q, k, v, position, block, sink, mask="finite")


@wrong("5.2", "a sink of 0 counts as none")
def flash_tile(q, k, v, position, block, sink=None):
    return tile(q, k, v, position, block, sink or None)


@wrong("5.2", "the output in the values' dtype")
def flash_tile(q, k, v, position, block, sink=None):
    out, lse = tile(q.float(), k, v, position, block, sink)
    return out.to(v.dtype), lse


@wrong("5.2", "scales the caller's q in place")
def flash_tile(q, k, v, position, block, sink=None):
    scaled = q.float()
    scaled *= q.shape[1] ** -0.5
    out, lse = tile(scaled * q.shape[1] ** 0.5, k, v, position, block, sink)
    return out.to(q.dtype), lse


@wrong("5.2", "the sink in q's dtype")
def flash_tile(q, k, v, position, block, sink=None):
    tokens, size = q.shape
    positions = position + torch.arange(tokens)[:, None]
    m = torch.full((tokens,), float("-inf") if sink is None else float(torch.tensor(sink, dtype=q.dtype)))
    total = torch.full((tokens,), 0.0 if sink is None else 1.0)
    acc = torch.zeros(tokens, size)
    end = max(0, min(len(k), position + tokens))
    for start in range(0, end, block):
        keys = torch.arange(start, min(start + block, end))
        scores = q.float() @ k[keys].float().T / size**0.5
        scores = scores.masked_fill(keys > positions, float("-inf"))
        new_m = torch.maximum(m, scores.amax(1))
        origin = new_m.masked_fill(new_m == float("-inf"), 0.0)
        weights, shrink = (torch.exp(scores - origin[:, None]), torch.exp(m - origin))
        total = total * shrink + weights.sum(1)
        acc = acc * shrink[:, None] + weights @ v[keys].float()
        m = new_m
    out = acc / total.masked_fill(total == 0, 1.0)[:, None]
    return (out.to(q.dtype), m + torch.log(total))


@wrong("5.2", "never takes fewer than 8 keys")
def flash_tile(q, k, v, position, block, sink=None):
    block = max(8, block)
    tokens, size = q.shape
    positions = position + torch.arange(tokens)[:, None]
    m = torch.full((tokens,), float("-inf") if sink is None else sink)
    total = torch.full((tokens,), 0.0 if sink is None else 1.0)
    acc = torch.zeros(tokens, size)
    end = max(0, min(len(k), position + tokens))
    for start in range(0, end, block):
        keys = torch.arange(start, min(start + block, end))
        scores = q.float() @ k[keys].float().T / size**0.5
        scores = scores.masked_fill(keys > positions, float("-inf"))
        new_m = torch.maximum(m, scores.amax(1))
        origin = new_m.masked_fill(new_m == float("-inf"), 0.0)
        weights, shrink = (torch.exp(scores - origin[:, None]), torch.exp(m - origin))
        total = total * shrink + weights.sum(1)
        acc = acc * shrink[:, None] + weights @ v[keys].float()
        m = new_m
    out = acc / total.masked_fill(total == 0, 1.0)[:, None]
    return (out.to(q.dtype), m + torch.log(total))


@wrong("5.2", "the maximum over hidden keys, too")
def flash_tile(q, k, v, position, block, sink=None):
    tokens, size = q.shape
    positions = position + torch.arange(tokens)[:, None]
    m = torch.full((tokens,), float("-inf") if sink is None else sink)
    total = torch.full((tokens,), 0.0 if sink is None else 1.0)
    acc = torch.zeros(tokens, size)
    end = max(0, min(len(k), position + tokens))
    for start in range(0, end, block):
        keys = torch.arange(start, min(start + block, end))
        scores = q.float() @ k[keys].float().T / size**0.5
        new_m = torch.maximum(m, scores.amax(1))
        scores = scores.masked_fill(keys > positions, float("-inf"))
        origin = new_m.masked_fill(new_m == float("-inf"), 0.0)
        weights, shrink = (torch.exp(scores - origin[:, None]), torch.exp(m - origin))
        total = total * shrink + weights.sum(1)
        acc = acc * shrink[:, None] + weights @ v[keys].float()
        m = new_m
    out = acc / total.masked_fill(total == 0, 1.0)[:, None]
    return (out.to(q.dtype), m + torch.log(total))


@wrong("5.2", "a tile that sees nothing comes back in fp32")
def flash_tile(q, k, v, position, block, sink=None):
    tokens, size = q.shape
    positions = position + torch.arange(tokens)[:, None]
    m = torch.full((tokens,), float("-inf") if sink is None else sink)
    total = torch.full((tokens,), 0.0 if sink is None else 1.0)
    acc = torch.zeros(tokens, size)
    end = max(0, min(len(k), position + tokens))
    if end == 0:
        return (acc, m)
    for start in range(0, end, block):
        keys = torch.arange(start, min(start + block, end))
        scores = q.float() @ k[keys].float().T / size**0.5
        scores = scores.masked_fill(keys > positions, float("-inf"))
        new_m = torch.maximum(m, scores.amax(1))
        origin = new_m.masked_fill(new_m == float("-inf"), 0.0)
        weights, shrink = (torch.exp(scores - origin[:, None]), torch.exp(m - origin))
        total = total * shrink + weights.sum(1)
        acc = acc * shrink[:, None] + weights @ v[keys].float()
        m = new_m
    out = acc / total.masked_fill(total == 0, 1.0)[:, None]
    return (out.to(q.dtype), m + torch.log(total))


@alternative("5.2", "from right to left, and the sink at the end")
def flash_tile(q, k, v, position, block, sink=None):
    out, lse = tile(q.float(), k, v, position, block, None, back=True)
    if sink is not None:
        total = torch.logaddexp(lse, torch.tensor(sink))
        out, lse = out * torch.exp(lse - total)[:, None], total
    return out.to(q.dtype), lse


# ---- 5.3


def ranges(first, block_m, block_n, len_q, len_k, left, right, short=True):
    low = first + len_k - len_q
    high = (min(first + block_m, len_q) if short else first + block_m) - 1 + len_k - len_q
    some = max(low - left, 0) if left >= 0 else 0, min(high + right + 1, len_k) if right >= 0 else len_k
    all_ = max(high - left, 0) if left >= 0 else 0, min(low + right + 1, len_k) if right >= 0 else len_k
    return some, all_


def to_blocks(some, all_, n):
    if some[0] >= some[1]:
        return 0, 0, 0, 0
    begin, end = some[0] // n, -(-some[1] // n)
    a, b = -(-all_[0] // n), max(all_[1], 0) // n
    return (begin, a, b, end) if a < b else (begin, begin, begin, end)


@wrong("5.3", "takes query i to stand at position i")
def block_ranges(first, block_m, block_n, len_q, len_k, left=-1, right=0):
    return to_blocks(*ranges(first, block_m, block_n, len_k, len_k, left, right), block_n)


@wrong("5.3", "visits everything, masked")
def block_ranges(first, block_m, block_n, len_q, len_k, left=-1, right=0):
    return 0, 0, 0, -(-len_k // block_n)


@wrong("5.3", "ends before the diagonal block")
def block_ranges(first, block_m, block_n, len_q, len_k, left=-1, right=0):
    begin, a, b, end = to_blocks(*ranges(first, block_m, block_n, len_q, len_k, left, right), block_n)
    return begin, a, b, max(b, end - 1) if right >= 0 else end


@wrong("5.3", "a last block past the end counts as whole")
def block_ranges(first, block_m, block_n, len_q, len_k, left=-1, right=0):
    some, all_ = ranges(first, block_m, block_n, len_q, len_k, left, right)
    if all_[1] == len_k:
        all_ = all_[0], -(-len_k // block_n) * block_n
    return to_blocks(some, all_, block_n)


@wrong("5.3", "the window as a number of keys: one too few on the left")
def block_ranges(first, block_m, block_n, len_q, len_k, left=-1, right=0):
    left = left - 1 if left > 0 else left
    return to_blocks(*ranges(first, block_m, block_n, len_q, len_k, left, right), block_n)


@wrong("5.3", "whole blocks by the union: the highest query's view")
def block_ranges(first, block_m, block_n, len_q, len_k, left=-1, right=0):
    some, _ = ranges(first, block_m, block_n, len_q, len_k, left, right)
    return to_blocks(some, some, block_n)


@wrong("5.3", "begins at the highest query's window: keys of the others are lost")
def block_ranges(first, block_m, block_n, len_q, len_k, left=-1, right=0):
    some, all_ = ranges(first, block_m, block_n, len_q, len_k, left, right)
    return to_blocks((all_[0], some[1]), all_, block_n)


@wrong("5.3", "counts queries past the end of a short tile")
def block_ranges(first, block_m, block_n, len_q, len_k, left=-1, right=0):
    return to_blocks(*ranges(first, block_m, block_n, len_q, len_k, left, right, short=False), block_n)


@wrong("5.3", "ignores what lies ahead: every window is causal")
def block_ranges(first, block_m, block_n, len_q, len_k, left=-1, right=0):
    return to_blocks(*ranges(first, block_m, block_n, len_q, len_k, left, 0), block_n)


@wrong("5.3", "returns keys instead of blocks")
def block_ranges(first, block_m, block_n, len_q, len_k, left=-1, right=0):
    return tuple(b * block_n for b in to_blocks(*ranges(first, block_m, block_n, len_q, len_k, left, right), block_n))


@wrong("5.3", "an empty intersection gives whole_end before whole_begin")
def block_ranges(first, block_m, block_n, len_q, len_k, left=-1, right=0):
    some, all_ = ranges(first, block_m, block_n, len_q, len_k, left, right)
    if some[0] >= some[1]:
        return 0, 0, 0, 0
    return some[0] // block_n, -(-all_[0] // block_n), max(all_[1], 0) // block_n, -(-some[1] // block_n)


@wrong("5.3", "no care for tiles that see nothing: blocks before the first")
def block_ranges(first, block_m, block_n, len_q, len_k, left=-1, right=0):
    some, all_ = ranges(first, block_m, block_n, len_q, len_k, left, right)
    begin, end = some[0] // block_n, -(-some[1] // block_n)
    a, b = -(-all_[0] // block_n), all_[1] // block_n
    return (begin, a, b, end) if a < b else (begin, begin, begin, end)


@wrong("5.3", "no limit ahead as a limit of len_k")
def block_ranges(first, block_m, block_n, len_q, len_k, left=-1, right=0):
    right = len_k if right < 0 else right
    return to_blocks(*ranges(first, block_m, block_n, len_q, len_k, left, right), block_n)


@wrong("5.3", "no limit behind as a limit of len_q")
def block_ranges(first, block_m, block_n, len_q, len_k, left=-1, right=0):
    left = len_q if left < 0 else left
    return to_blocks(*ranges(first, block_m, block_n, len_q, len_k, left, right), block_n)


@wrong("5.3", "a window of 0 counts as none")
def block_ranges(first, block_m, block_n, len_q, len_k, left=-1, right=0):
    return to_blocks(*ranges(first, block_m, block_n, len_q, len_k, left or -1, right), block_n)


@wrong("5.3", "one block more at the end")
def block_ranges(first, block_m, block_n, len_q, len_k, left=-1, right=0):
    begin, a, b, end = to_blocks(*ranges(first, block_m, block_n, len_q, len_k, left, right), block_n)
    return begin, a, b, min(end + 1, -(-len_k // block_n)) if end > begin else end


@wrong("5.3", "floats")
def block_ranges(first, block_m, block_n, len_q, len_k, left=-1, right=0):
    return tuple(map(float, to_blocks(*ranges(first, block_m, block_n, len_q, len_k, left, right), block_n)))


@alternative("5.3", "an infinite window as a very long one")
def block_ranges(first, block_m, block_n, len_q, len_k, left=-1, right=0):
    far = len_q + len_k
    left, right = (far if left < 0 else left), (far if right < 0 else right)
    low, high = first + len_k - len_q, min(first + block_m, len_q) - 1 + len_k - len_q

    def clip(x):
        return min(max(x, 0), len_k)

    begin, end = clip(low - left) // block_n, (clip(high + right + 1) + block_n - 1) // block_n
    if clip(low - left) >= clip(high + right + 1):
        return 0, 0, 0, 0
    a, b = (clip(high - left) + block_n - 1) // block_n, clip(low + right + 1) // block_n
    b = max(a, b)
    return (begin, a, b, end) if b > a else (begin, end, end, end)


# ---- 5.4


@wrong("5.4", "the mean of the chunks")
def combine_splits(outs, lses):
    return torch.nan_to_num(outs.float()).mean(0).to(outs.dtype), lses.logsumexp(0)


@wrong("5.4", "adds the chunks: their sums are lost")
def combine_splits(outs, lses):
    return torch.nan_to_num(outs.float()).sum(0).to(outs.dtype), lses.logsumexp(0)


@wrong("5.4", "multiplies leftovers by 0: 0 · NaN is NaN")
def combine_splits(outs, lses):
    m = lses.amax(0)
    share = torch.exp(lses - m.masked_fill(m == -INF, 0.0))
    out = (share[..., None] * outs.float()).sum(0) / share.sum(0).clamp(min=1e-30)[..., None]
    return out.to(outs.dtype), lses.logsumexp(0)


@wrong("5.4", "removes every NaN and infinity, real ones too")
def combine_splits(outs, lses):
    m = lses.amax(0)
    m = m.masked_fill(m == -INF, 0.0)
    share = torch.exp(lses - m)
    values = torch.nan_to_num(outs.float(), nan=0.0, posinf=0.0, neginf=0.0)
    total = share.sum(0)
    out = (share[..., None] * values).sum(0) / total.masked_fill(total == 0, 1.0)[..., None]
    return out.to(outs.dtype), m + total.log()


@wrong("5.4", "removes NaN alone: infinite leftovers stay")
def combine_splits(outs, lses):
    m = lses.amax(0)
    m = m.masked_fill(m == -INF, 0.0)
    share = torch.exp(lses - m)
    values = torch.where(outs.isnan(), 0.0, outs.float())
    out = (share[..., None] * values).sum(0) / share.sum(0).clamp(min=1e-30)[..., None]
    return out.to(outs.dtype), m + share.sum(0).log()


@wrong("5.4", "softmax over the chunks: NaN for a sequence without keys")
def combine_splits(outs, lses):
    values = torch.where(lses[..., None] > -INF, outs.float(), 0.0)
    return (lses.softmax(0)[..., None] * values).sum(0).to(outs.dtype), lses.logsumexp(0)


@wrong("5.4", "exponentials without the maximum")
def combine_splits(outs, lses):
    share = lses.exp()
    values = torch.where(share[..., None] > 0, outs.float(), 0.0)
    out = (share[..., None] * values).sum(0) / share.sum(0).clamp(min=1e-30)[..., None]
    return out.to(outs.dtype), share.sum(0).log()


@wrong("5.4", "combines in the outputs' dtype")
def combine_splits(outs, lses):
    m = lses.amax(0)
    m = m.masked_fill(m == -INF, 0.0)
    share = torch.exp(lses - m)
    weights = (share / share.sum(0).clamp(min=1e-30)).to(outs.dtype)
    values = torch.where(weights[..., None] > 0, outs, torch.zeros((), dtype=outs.dtype))
    return (weights[..., None] * values).sum(0), m + share.sum(0).log()


@wrong("5.4", "base 2, while log-sum-exps are natural")
def combine_splits(outs, lses):
    m = lses.amax(0)
    m = m.masked_fill(m == -INF, 0.0)
    share = torch.exp2(lses - m)
    values = torch.where(share[..., None] > 0, outs.float(), 0.0)
    out = (share[..., None] * values).sum(0) / share.sum(0).clamp(min=1e-30)[..., None]
    return out.to(outs.dtype), m + share.sum(0).log2()


@wrong("5.4", "a loop over the chunks")
def combine_splits(outs, lses):
    lse = torch.full(lses.shape[1:], -INF)
    out = torch.zeros(outs.shape[1:])
    for o, x in zip(outs.float(), lses, strict=True):
        total = torch.logaddexp(lse, x)
        a, b = (torch.nan_to_num(torch.exp(y - total)) for y in (lse, x))
        out = a[..., None] * out + torch.where(b[..., None] > 0, b[..., None] * o, 0.0)
        lse = total
    return out.to(outs.dtype), lse


@wrong("5.4", "cleans the caller's workspace")
def combine_splits(outs, lses):
    outs[lses == -INF] = 0
    lse = lses.logsumexp(0)
    weights = torch.exp(lses - lse.masked_fill(lse == -INF, 0.0))
    return (weights[..., None] * outs.float()).sum(0).to(outs.dtype), lse


def combined(outs, lses, empty):
    """The right one, but for which chunks count as empty."""
    m = lses.amax(0)
    m = m.masked_fill(m == -INF, 0.0)
    share = torch.exp(lses - m)
    total = share.sum(0)
    values = outs.float().masked_fill(empty(share, lses)[..., None], 0.0)
    out = (share[..., None] * values).sum(0) / total.masked_fill(total == 0, 1.0)[..., None]
    return out.to(outs.dtype), m + torch.log(total)


@wrong("5.4", "silences chunks by their share: one of exp(-120) is 0 in fp32, and so is its NaN")
def combine_splits(outs, lses):
    return combined(outs, lses, lambda share, lses: share <= 0)


@wrong("5.4", "silences chunks far below the largest")
def combine_splits(outs, lses):
    return combined(outs, lses, lambda share, lses: lses < lses.amax(0) - 60)


@wrong("5.4", "a log-sum-exp of NaN counts as empty")
def combine_splits(outs, lses):
    lses = lses.nan_to_num(-INF, -INF, -INF)
    return combined(outs, lses, lambda share, lses: lses == -INF)


@wrong("5.4", "one chunk is handed back")
def combine_splits(outs, lses):
    return (outs[0], lses[0]) if len(outs) == 1 else combined(outs, lses, lambda share, lses: lses == -INF)


@wrong("5.4", "one chunk is copied, leftovers and all")
def combine_splits(outs, lses):
    if len(outs) == 1:
        return outs[0].clone(), lses[0].clone()
    return combined(outs, lses, lambda share, lses: lses == -INF)


@wrong("5.4", "the log-sum-exp in the outputs' dtype")
def combine_splits(outs, lses):
    out, lse = combined(outs, lses, lambda share, lses: lses == -INF)
    return out, lse.to(outs.dtype)


@wrong("5.4", "fp32 whatever the outputs are")
def combine_splits(outs, lses):
    return combined(outs.float(), lses, lambda share, lses: lses == -INF)


@wrong("5.4", "a NaN anywhere makes the whole sequence NaN")
def combine_splits(outs, lses):
    out, lse = combined(outs, lses, lambda share, lses: lses == -INF)
    bad = out.isnan().any(-1, keepdim=True)
    return out.masked_fill(bad, float("nan")), lse


@wrong("5.4", "flattens by view, which needs contiguous inputs")
def combine_splits(outs, lses):
    n, b, h, d = outs.shape
    out, lse = combined(outs.view(n, b * h, 1, d), lses.view(n, b * h, 1), lambda share, lses: lses == -INF)
    return out.view(b, h, d), lse.view(b, h)


@wrong("5.4", "a log-sum-exp below -100,000 counts as empty")
def combine_splits(outs, lses):
    m = lses.amax(0)
    m = m.masked_fill(m == float("-inf"), 0.0)
    share = torch.exp(lses - m)
    total = share.sum(0)
    values = outs.float().masked_fill((lses < -100000.0)[..., None], 0.0)
    out = (share[..., None] * values).sum(0) / total.masked_fill(total == 0, 1.0)[..., None]
    return (out.to(outs.dtype), m + torch.log(total))


@wrong("5.4", "a chunk that is empty for one head is for all")
def combine_splits(outs, lses):
    m = lses.amax(0)
    m = m.masked_fill(m == float("-inf"), 0.0)
    share = torch.exp(lses - m)
    total = share.sum(0)
    values = outs.float().masked_fill((lses == float("-inf")).any(-1)[..., None, None], 0.0)
    out = (share[..., None] * values).sum(0) / total.masked_fill(total == 0, 1.0)[..., None]
    return (out.to(outs.dtype), m + torch.log(total))


@alternative("5.4", "torch.logsumexp and weights from it")
def combine_splits(outs, lses):
    lse = lses.logsumexp(0)
    weights = torch.exp(lses - lse.masked_fill(lse == -INF, 0.0))
    values = outs.float().masked_fill((lses == -INF)[..., None], 0.0)
    return torch.einsum("nbh,nbhd->bhd", weights, values).to(outs.dtype), lse


# ---- 5.5


@triton.jit
def switched_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, T, scale, slope,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    """The right kernel, but for what WRONG names."""
    first, offs_d = tl.program_id(0) * BLOCK_M, tl.arange(0, D)
    offs_m = first + tl.arange(0, BLOCK_M)
    if WRONG == "q unmasked":
        q = tl.load(q_ptr + offs_m[:, None] * D + offs_d)
    else:
        q = tl.load(q_ptr + offs_m[:, None] * D + offs_d, mask=offs_m[:, None] < T, other=0.0)
    row_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    if WRONG == "from 0":
        row_max = tl.zeros((BLOCK_M,), tl.float32)
    row_sum, acc = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M, D), tl.float32)
    end = tl.minimum(first + BLOCK_M, T)
    if WRONG == "visits all":
        end = T
    if WRONG == "stops early":
        end = tl.minimum(first + BLOCK_M, T) // BLOCK_N * BLOCK_N
    if WRONG == "square blocks":
        end = tl.minimum((tl.program_id(0) + 1) * BLOCK_N, T)
    for start in range(0, end, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        offs_kv = offs_n[:, None] * D + offs_d
        if WRONG == "k unmasked":
            k = tl.load(k_ptr + offs_kv)
        else:
            k = tl.load(k_ptr + offs_kv, mask=offs_n[:, None] < T, other=0.0)
        v = tl.load(v_ptr + offs_kv, mask=offs_n[:, None] < T, other=0.0)
        back = offs_m[:, None] - offs_n[None, :]
        if WRONG == "tf32":
            scores = tl.dot(q, tl.trans(k))
        else:
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if WRONG == "bias before the scale":
            scores = (scores - slope * back) * scale
        elif WRONG == "bias ends":
            scores = scores * scale - slope * tl.minimum(back, 64)
        elif WRONG == "bias grows":
            scores = scores * scale + slope * back
        elif WRONG == "bias of the block":
            scores = scores * scale - slope * (tl.arange(0, BLOCK_M)[:, None] - tl.arange(0, BLOCK_N)[None, :])
        else:
            scores = scores * scale - slope * back
        if WRONG == "hides with -1e9":
            scores = tl.where(back >= 0, scores, -1e9)
        elif WRONG != "no mask":
            scores = tl.where(back >= 0, scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        if WRONG == "no maximum":
            new_max = tl.zeros((BLOCK_M,), tl.float32)
        weights = tl.exp(scores - new_max[:, None])
        shrink = tl.exp(row_max - new_max)
        if WRONG == "no maximum":
            shrink = tl.zeros((BLOCK_M,), tl.float32) + 1.0
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        if WRONG != "no rescaling":
            acc = acc * shrink[:, None]
        acc += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        if WRONG == "half accumulator":
            acc = acc.to(o_ptr.dtype.element_ty).to(tl.float32)
        row_max = new_max
        if WRONG == "half sum":
            row_sum = row_sum.to(o_ptr.dtype.element_ty).to(tl.float32)
        if WRONG == "half maximum":
            row_max = new_max.to(o_ptr.dtype.element_ty).to(tl.float32)
    if WRONG != "not divided":
        acc = acc / row_sum[:, None]
    if WRONG == "store unmasked":
        tl.store(o_ptr + offs_m[:, None] * D + offs_d, acc.to(o_ptr.dtype.element_ty))
    else:
        tl.store(o_ptr + offs_m[:, None] * D + offs_d, acc.to(o_ptr.dtype.element_ty), mask=offs_m[:, None] < T)


def launch(q, k, v, slope, block_m, block_n, what="", programs=None):
    out = torch.empty_like(q) if what not in ("grid", "store unmasked") else torch.zeros_like(q)
    grid = (triton.cdiv(len(q), block_m) if programs is None else programs,)
    switched_kernel[grid](
        q, k, v, out, len(q), q.shape[1] ** -0.5, slope, D=q.shape[1], BLOCK_M=block_m, BLOCK_N=block_n, WRONG=what
    )
    return out


@wrong("5.5", "does not rescale the accumulator")
def flash_alibi(q, k, v, slope, block_m=16, block_n=16):
    return launch(q, k, v, slope, block_m, block_n, "no rescaling")


@wrong("5.5", "visits every block and leaves hiding to the mask")
def flash_alibi(q, k, v, slope, block_m=16, block_n=16):
    return launch(q, k, v, slope, block_m, block_n, "visits all")


@wrong("5.5", "the last block, when it is not full, is not visited")
def flash_alibi(q, k, v, slope, block_m=16, block_n=16):
    return launch(q, k, v, slope, block_m, block_n, "stops early")


@wrong("5.5", "ends as if both block sizes were equal")
def flash_alibi(q, k, v, slope, block_m=16, block_n=16):
    return launch(q, k, v, slope, block_m, block_n, "square blocks")


@wrong("5.5", "the bias is scaled by 1/sqrt(D) too")
def flash_alibi(q, k, v, slope, block_m=16, block_n=16):
    return launch(q, k, v, slope, block_m, block_n, "bias before the scale")


@wrong("5.5", "the bias has the wrong sign")
def flash_alibi(q, k, v, slope, block_m=16, block_n=16):
    return launch(q, k, v, slope, block_m, block_n, "bias grows")


@wrong("5.5", "distances within the block instead of in the text")
def flash_alibi(q, k, v, slope, block_m=16, block_n=16):
    return launch(q, k, v, slope, block_m, block_n, "bias of the block")


@wrong("5.5", "no causal mask within a block")
def flash_alibi(q, k, v, slope, block_m=16, block_n=16):
    return launch(q, k, v, slope, block_m, block_n, "no mask")


@wrong("5.5", "no maximum: exponentials overflow")
def flash_alibi(q, k, v, slope, block_m=16, block_n=16):
    return launch(q, k, v, slope, block_m, block_n, "no maximum")


@wrong("5.5", "the accumulator in fp16")
def flash_alibi(q, k, v, slope, block_m=16, block_n=16):
    return launch(q, k, v, slope, block_m, block_n, "half accumulator")


@wrong("5.5", "the running sum in fp16")
def flash_alibi(q, k, v, slope, block_m=16, block_n=16):
    return launch(q, k, v, slope, block_m, block_n, "half sum")


@wrong("5.5", "the running maximum in fp16")
def flash_alibi(q, k, v, slope, block_m=16, block_n=16):
    return launch(q, k, v, slope, block_m, block_n, "half maximum")


@wrong("5.5", "the penalty grows no more after 64 tokens")
def flash_alibi(q, k, v, slope, block_m=16, block_n=16):
    return launch(q, k, v, slope, block_m, block_n, "bias ends")


@wrong("5.5", "blocks of 16, whatever is asked for")
def flash_alibi(q, k, v, slope, block_m=16, block_n=16):
    return launch(q, k, v, slope, 16, 16)


@wrong("5.5", "keys in blocks of block_m")
def flash_alibi(q, k, v, slope, block_m=16, block_n=16):
    return launch(q, k, v, slope, block_m, block_m)


@wrong("5.5", "a program too many where the blocks divide T")
def flash_alibi(q, k, v, slope, block_m=16, block_n=16):
    return launch(q, k, v, slope, block_m, block_n, programs=len(q) // block_m + 1)


@wrong("5.5", "never divides by the sum")
def flash_alibi(q, k, v, slope, block_m=16, block_n=16):
    return launch(q, k, v, slope, block_m, block_n, "not divided")


@wrong("5.5", "a grid rounded down")
def flash_alibi(q, k, v, slope, block_m=16, block_n=16):
    return launch(q, k, v, slope, block_m, block_n, "grid", programs=max(1, len(q) // block_m))


@wrong("5.5", "loads rows of q past the end, which no output shows")
def flash_alibi(q, k, v, slope, block_m=16, block_n=16):
    return launch(q, k, v, slope, block_m, block_n, "q unmasked")


@wrong("5.5", "loads rows of k past the end, which the causal mask hides")
def flash_alibi(q, k, v, slope, block_m=16, block_n=16):
    return launch(q, k, v, slope, block_m, block_n, "k unmasked")


@wrong("5.5", "stores rows past the end, into torch.zeros_like")
def flash_alibi(q, k, v, slope, block_m=16, block_n=16):
    return launch(q, k, v, slope, block_m, block_n, "store unmasked")


@wrong("5.5", "the maximum starts at 0")
def flash_alibi(q, k, v, slope, block_m=16, block_n=16):
    return launch(q, k, v, slope, block_m, block_n, "from 0")


@wrong("5.5", "hides with -1e9: scores that are lower hide instead")
def flash_alibi(q, k, v, slope, block_m=16, block_n=16):
    return launch(q, k, v, slope, block_m, block_n, "hides with -1e9")


@wrong("5.5", "tl.dot as it is: fp32 is cut to TF32 on a GPU")
def flash_alibi(q, k, v, slope, block_m=16, block_n=16):
    return launch(q, k, v, slope, block_m, block_n, "tf32")


@wrong("5.5", "scales the caller's q in place")
def flash_alibi(q, k, v, slope, block_m=16, block_n=16):
    out = launch(q, k, v, slope, block_m, block_n)
    q *= q.shape[1] ** -0.5
    return out


@wrong("5.5", "torch, with scores and biases written out")
def flash_alibi(q, k, v, slope, block_m=16, block_n=16):
    back = torch.arange(len(q), device=q.device)[:, None] - torch.arange(len(k), device=q.device)
    scores = q.float() @ k.float().T * q.shape[1] ** -0.5 - slope * back
    return (scores.masked_fill(back < 0, -INF).softmax(-1) @ v.float()).to(q.dtype)


@triton.jit
def reversed_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, T, scale, slope,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """From right to left, with 2^x; -1e30 stands for no key yet."""
    first, offs_d = tl.program_id(0) * BLOCK_M, tl.arange(0, D)
    offs_m = first + tl.arange(0, BLOCK_M)
    q = tl.load(q_ptr + offs_m[:, None] * D + offs_d, mask=offs_m[:, None] < T, other=0.0)
    row_max = tl.full((BLOCK_M,), -1e30, tl.float32)
    row_sum, acc = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M, D), tl.float32)
    blocks = tl.cdiv(tl.minimum(first + BLOCK_M, T), BLOCK_N)
    for i in range(blocks):
        offs_n = (blocks - 1 - i) * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_kv = offs_n[:, None] * D + offs_d
        k = tl.load(k_ptr + offs_kv, mask=offs_n[:, None] < T, other=0.0)
        v = tl.load(v_ptr + offs_kv, mask=offs_n[:, None] < T, other=0.0)
        back = offs_m[:, None] - offs_n[None, :]
        scores = (tl.dot(q, tl.trans(k), input_precision="ieee") * scale - slope * back) * 1.4426950408889634
        scores = tl.where(back >= 0, scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights, shrink = tl.exp2(scores - new_max[:, None]), tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        row_max = new_max
    out = (acc / row_sum[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + offs_m[:, None] * D + offs_d, out, mask=offs_m[:, None] < T)


@alternative("5.5", "from right to left, with 2^x")
def flash_alibi(q, k, v, slope, block_m=16, block_n=16):
    out = torch.empty_like(q)
    reversed_kernel[(-(-len(q) // block_m),)](
        q, k, v, out, len(q), q.shape[1] ** -0.5, slope, D=q.shape[1], BLOCK_M=block_m, BLOCK_N=block_n
    )
    return out


@triton.jit
def untyped_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, T, scale, slope,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sum begins as the integer 0: the interpreter does not mind."""
    first, offs_d = tl.program_id(0) * BLOCK_M, tl.arange(0, D)
    offs_m = first + tl.arange(0, BLOCK_M)
    q = tl.load(q_ptr + offs_m[:, None] * D + offs_d, mask=offs_m[:, None] < T, other=0.0)
    row_max = tl.full((BLOCK_M,), -1e30, tl.float32)
    row_sum, acc = 0, tl.zeros((BLOCK_M, D), tl.float32)
    blocks = tl.cdiv(tl.minimum(first + BLOCK_M, T), BLOCK_N)
    for i in range(blocks):
        offs_n = (blocks - 1 - i) * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_kv = offs_n[:, None] * D + offs_d
        k = tl.load(k_ptr + offs_kv, mask=offs_n[:, None] < T, other=0.0)
        v = tl.load(v_ptr + offs_kv, mask=offs_n[:, None] < T, other=0.0)
        back = offs_m[:, None] - offs_n[None, :]
        scores = (tl.dot(q, tl.trans(k), input_precision="ieee") * scale - slope * back) * 1.4426950408889634
        scores = tl.where(back >= 0, scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights, shrink = tl.exp2(scores - new_max[:, None]), tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        row_max = new_max
    out = (acc / row_sum[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + offs_m[:, None] * D + offs_d, out, mask=offs_m[:, None] < T)


@wrong("5.5", "does not compile: the sum begins as the integer 0")
def flash_alibi(q, k, v, slope, block_m=16, block_n=16):
    out = torch.empty_like(q)
    untyped_kernel[(-(-len(q) // block_m),)](
        q, k, v, out, len(q), q.shape[1] ** -0.5, slope, D=q.shape[1], BLOCK_M=block_m, BLOCK_N=block_n
    )
    return out
