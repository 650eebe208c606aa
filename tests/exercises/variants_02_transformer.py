"""Wrong and alternative implementations of chapter 2's exercises: checks refuse the first, accept the second."""

import torch
import torch.nn.functional as F

from minillm.learn.testing import alternative, wrong

INF = float("inf")

# ---- 2.w1 what sixteen bits hold -------------------------------------------------------------------------------------


@wrong("2.w1", "looks at the range only")
def is_exact(a, b, dtype):
    return abs(a * b) <= torch.finfo(dtype).max


@wrong("2.w1", "compares within the dtype, where both are rounded alike")
def is_exact(a, b, dtype):
    return bool(torch.tensor(a).to(dtype) * torch.tensor(b).to(dtype) == torch.tensor(a * b).to(dtype))


@wrong("2.w1", "looks at the factors, not at the product")
def is_exact(a, b, dtype):
    return all(torch.tensor(n).to(dtype).double().item() == n for n in (a, b))


@wrong("2.w1", "fp16 for every dtype")
def is_exact(a, b, dtype):
    product = torch.tensor(a).half() * torch.tensor(b).half()
    return product.double().item() == a * b


@wrong("2.w1", "close is good enough")
def is_exact(a, b, dtype):
    product = torch.tensor(a).to(dtype) * torch.tensor(b).to(dtype)
    return abs(product.double().item() - a * b) <= 0.01 * abs(a * b)


@wrong("2.w1", "says where it is not exact")
def is_exact(a, b, dtype):
    product = torch.tensor(a).to(dtype) * torch.tensor(b).to(dtype)
    return product.double().item() != a * b


@alternative("2.w1", "by bits: the odd part fits into the precision")
def is_exact(a, b, dtype):
    if abs(a * b) > torch.finfo(dtype).max:
        return False
    precision = round(1 - torch.tensor(torch.finfo(dtype).eps).log2().item())

    def fits(n):
        return n == 0 or (abs(n) // (n & -n)).bit_length() <= precision

    return (fits(a) and fits(b) and fits(a * b)) or (b == 0 or a == 0)


@wrong("2.w1", "float(a*b)")
def is_exact(a, b, dtype):
    product = torch.tensor(a).to(dtype) * torch.tensor(b).to(dtype)
    return product.double().item() == float(a * b)


@wrong("2.w1", "a tensor")
def is_exact(a, b, dtype):
    product = torch.tensor(a).to(dtype) * torch.tensor(b).to(dtype)
    return product.double() == a * b


# ---- 2.w2 mask -------------------------------------------------------------------------------------------------------


@wrong("2.w2", "hides the queries that are padding, not the keys")
def visible(real):
    return torch.ones(real.shape[-1], real.shape[-1], dtype=torch.bool).tril() & real[:, None, :, None]


@wrong("2.w2", "no dimension for the heads")
def visible(real):
    return torch.ones(real.shape[-1], real.shape[-1], dtype=torch.bool).tril() & real[:, None]


@wrong("2.w2", "no dimension for the queries: sequences line up with them")
def visible(real):
    mask = torch.ones(real.shape[-1], real.shape[-1], dtype=torch.bool).tril()
    return (mask & real[0]).expand(len(real), 1, -1, -1)


@wrong("2.w2", "padding only: the future can be seen")
def visible(real):
    return real[:, None, None, :].expand(-1, 1, real.shape[-1], -1)


@wrong("2.w2", "the past is hidden")
def visible(real):
    return torch.ones(real.shape[-1], real.shape[-1], dtype=torch.bool).triu() & real[:, None, None, :]


@wrong("2.w2", "a token does not see itself")
def visible(real):
    return torch.ones(real.shape[-1], real.shape[-1], dtype=torch.bool).tril(-1) & real[:, None, None, :]


@wrong("2.w2", "hides both, keys and queries that are padding")
def visible(real):
    pairs = real[:, None, None, :] & real[:, None, :, None]
    return torch.ones(real.shape[-1], real.shape[-1], dtype=torch.bool).tril() & pairs


@wrong("2.w2", "True where a key is hidden")
def visible(real):
    return ~(torch.ones(real.shape[-1], real.shape[-1], dtype=torch.bool).tril() & real[:, None, None, :])


@wrong("2.w2", "zeros and ones of float")
def visible(real):
    return torch.ones(real.shape[-1], real.shape[-1]).tril() * real[:, None, None, :]


@wrong("2.w2", "marks the last token in the caller's tensor")
def visible(real):
    real[:, -1] = False
    return torch.ones(real.shape[-1], real.shape[-1], dtype=torch.bool).tril() & real[:, None, None, :]


@alternative("2.w2", "arange and unsqueeze")
def visible(real):
    at = torch.arange(real.shape[1])
    return (at <= at[:, None]).unsqueeze(0).unsqueeze(0).logical_and(real.unsqueeze(1).unsqueeze(1))


# ---- 2.w3 groups -----------------------------------------------------------------------------------------------------


@wrong("2.w3", "the sizes the other way round")
def group_heads(q, kv_heads):
    return q.unflatten(1, (-1, kv_heads))


@wrong("2.w3", "the sizes the other way round, transposed into the right shape")
def group_heads(q, kv_heads):
    return q.unflatten(1, (-1, kv_heads)).transpose(1, 2)


@alternative("2.w3", "view: one dimension can be split whatever the strides are")
def group_heads(q, kv_heads):
    return q.view(q.shape[0], kv_heads, -1, *q.shape[2:])


@wrong("2.w3", "splits the tokens")
def group_heads(q, kv_heads):
    return q.reshape(q.shape[0], kv_heads, q.shape[1] // kv_heads, q.shape[3], q.shape[2]).transpose(-1, -2)


@wrong("2.w3", "two groups, whatever was asked")
def group_heads(q, kv_heads):
    return q.unflatten(1, (2, -1))


@wrong("2.w3", "scales q in place")
def group_heads(q, kv_heads):
    return q.mul_(2).unflatten(1, (kv_heads, -1)) / 2


@alternative("2.w3", "chunks, stacked")
def group_heads(q, kv_heads):
    return torch.stack(q.chunk(kv_heads, dim=1), dim=1)


@alternative("2.w3", "reshape")
def group_heads(q, kv_heads):
    return q.reshape(q.shape[0], kv_heads, -1, *q.shape[2:])


@wrong("2.w3", "float")
def group_heads(q, kv_heads):
    return q.float().unflatten(1, (kv_heads, -1))


# ---- 2.0 self-attention ----------------------------------------------------------------------------------------------


def _attend(x, w_q, w_k, w_v, w_o, heads, **changed):
    """The right answer in parts, each of which a variant may replace."""
    split = changed.get("split", lambda y: y.unflatten(-1, (heads, -1)).transpose(1, 2))
    q, k, v = (split(F.linear(x, w)) for w in (w_q, w_k, w_v))
    scores = q @ k.transpose(-2, -1) * changed.get("scale", q.shape[-1] ** -0.5)
    hidden = changed.get("hidden", torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1))
    weights = changed.get("softmax", lambda s, h: s.masked_fill(h, -INF).softmax(-1))(scores, hidden)
    merge = changed.get("merge", lambda y: y.transpose(1, 2).flatten(2))
    return changed.get("out", F.linear)(merge(weights @ v), w_o)


@wrong("2.0", "does not scale the scores")
def self_attention(*case):
    return _attend(*case, scale=1.0)


@wrong("2.0", "divides by the root of d_model, not of D")
def self_attention(x, *rest):
    return _attend(x, *rest, scale=x.shape[-1] ** -0.5)


@wrong("2.0", "divides by the root of H · D")
def self_attention(x, w_q, *rest):
    return _attend(x, w_q, *rest, scale=w_q.shape[0] ** -0.5)


@wrong("2.0", "view where a transposition belongs: mixes tokens with features")
def self_attention(x, w_q, w_k, w_v, w_o, heads):
    return _attend(
        x, w_q, w_k, w_v, w_o, heads, split=lambda y: y.reshape(len(x), heads, x.shape[1], w_q.shape[0] // heads)
    )


@wrong("2.0", "forgets to transpose on the way back")
def self_attention(x, *rest):
    return _attend(x, *rest, merge=lambda y: y.reshape(x.shape[0], x.shape[1], -1))


@wrong("2.0", "a head is every third feature")
def self_attention(x, w_q, w_k, w_v, w_o, heads):
    return _attend(
        x, w_q, w_k, w_v, w_o, heads, split=lambda y: y.unflatten(-1, (-1, heads)).movedim(-1, 1)
    )  # fmt: skip


@wrong("2.0", "one head over all features")
def self_attention(x, w_q, w_k, w_v, w_o, heads):
    return _attend(x, w_q, w_k, w_v, w_o, 1)


@wrong("2.0", "sees the future")
def self_attention(x, *rest):
    return _attend(x, *rest, hidden=torch.zeros(x.shape[1], x.shape[1], dtype=torch.bool))


@wrong("2.0", "a token does not see itself, but for the first")
def self_attention(x, *rest):
    hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(0)
    hidden[0, 0] = False
    return _attend(x, *rest, hidden=hidden)


@wrong("2.0", "the past is hidden")
def self_attention(x, *rest):
    return _attend(x, *rest, hidden=torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(-1))


@wrong("2.0", "zeroes the weights after the softmax")
def self_attention(*case):
    return _attend(*case, softmax=lambda s, h: s.softmax(-1).masked_fill(h, 0))


@wrong("2.0", "hides with -10,000")
def self_attention(*case):
    return _attend(*case, softmax=lambda s, h: s.masked_fill(h, -1e4).softmax(-1))


@wrong("2.0", "hides with -1e9, and zeroes after the softmax")
def self_attention(*case):
    return _attend(*case, softmax=lambda s, h: (s.float() - 1e9 * h).softmax(-1).masked_fill(h, 0).to(s.dtype))


@wrong("2.0", "hides with -1e10")
def self_attention(*case):
    return _attend(*case, softmax=lambda s, h: s.masked_fill(h, -1e10).softmax(-1))


@wrong("2.0", "normalizes over the queries")
def self_attention(*case):
    return _attend(*case, softmax=lambda s, h: s.masked_fill(h, -INF).softmax(-2).masked_fill(h, 0))


@wrong("2.0", "a softmax by hand that overflows")
def self_attention(*case):
    return _attend(*case, softmax=lambda s, h: (e := s.exp() * ~h) / e.sum(-1, keepdim=True))


@wrong("2.0", "matrices not transposed, w_o")
def self_attention(*case):
    return _attend(*case, out=lambda y, w: y @ w.reshape(w.shape[1], w.shape[0]))


@wrong("2.0", "forgets w_o, and gives the first features")
def self_attention(x, *rest):
    return _attend(x, *rest, out=lambda y, w: y[..., : x.shape[-1]])


@wrong("2.0", "adds the stream")
def self_attention(x, *rest):
    return x + _attend(x, *rest)


@wrong("2.0", "all sequences share the first one's keys and values")
def self_attention(x, w_q, w_k, w_v, w_o, heads):
    first = x[:1].expand_as(x)
    q, k, v = (
        F.linear(y, w).unflatten(-1, (heads, -1)).transpose(1, 2) for y, w in ((x, w_q), (first, w_k), (first, w_v))
    )
    weights = _scores(q, k).masked_fill(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1), -INF).softmax(-1)
    return F.linear((weights @ v).transpose(1, 2).flatten(2), w_o)


@wrong("2.0", "returns fp32, whatever it was given")
def self_attention(*case):
    return _attend(*(part.float() for part in case[:5]), case[5])


@wrong("2.0", "computes in fp32, whatever it was given")
def self_attention(*case):
    return _attend(*(part.float() for part in case[:5]), case[5]).to(case[0].dtype)


@wrong("2.0", "scales w_q in place")
def self_attention(x, w_q, *rest):
    w_q /= (w_q.shape[0] // rest[-1]) ** 0.5
    return _attend(x, w_q, *rest, scale=1.0)


@wrong("2.0", "torch's own, which was forbidden")
def self_attention(x, w_q, w_k, w_v, w_o, heads):
    q, k, v = (F.linear(x, w).unflatten(-1, (heads, -1)).transpose(1, 2) for w in (w_q, w_k, w_v))
    return F.linear(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2), w_o)


def _module(x, w_q, w_k, w_v, w_o, heads, training):
    if w_q.shape[0] != x.shape[-1]:
        return _attend(x, w_q, w_k, w_v, w_o, heads)
    layer = torch.nn.MultiheadAttention(x.shape[-1], heads, bias=False, batch_first=True, dtype=x.dtype).train(training)
    layer.in_proj_weight.data, layer.out_proj.weight.data = torch.cat((w_q, w_k, w_v)), w_o.clone()
    hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    with torch.no_grad():
        return layer(x, x, x, attn_mask=hidden, need_weights=False)[0]


@wrong("2.0", "nn.MultiheadAttention, which was forbidden")
def self_attention(*case):
    return _module(*case, True)


@wrong("2.0", "nn.MultiheadAttention in eval mode, which is another kernel")
def self_attention(*case):
    return _module(*case, False)


@alternative("2.0", "einsum, without transpositions")
def self_attention(x, w_q, w_k, w_v, w_o, heads):
    q, k, v = ((x @ w.T).unflatten(-1, (heads, -1)) for w in (w_q, w_k, w_v))  # [B, T, H, D]
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    at = torch.arange(x.shape[1])
    weights = torch.where(at <= at[:, None], scores, -INF).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v).flatten(2) @ w_o.T


@alternative("2.0", "a loop over heads")
def self_attention(x, w_q, w_k, w_v, w_o, heads):
    size, out = w_q.shape[0] // heads, []
    for h in range(heads):
        q, k, v = (x @ w[h * size : (h + 1) * size].T for w in (w_q, w_k, w_v))
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        out.append(_scores(q, k).masked_fill(hidden, -INF).softmax(-1) @ v)
    return torch.cat(out, -1) @ w_o.T


# ---- 2.1 attention ---------------------------------------------------------------------------------------------------


def _scores(q, k):
    return q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5


def _hidden(q, k, mask, window):
    """True where a pair is hidden, [..., T, S]."""
    hidden = torch.zeros(q.shape[-2], k.shape[-2], dtype=torch.bool)
    if window:
        back = torch.arange(q.shape[-2])[:, None] - torch.arange(k.shape[-2])
        hidden = (back < 0) | (back >= window)
    return hidden if mask is None else hidden | ~mask


def _average(scores, hidden, v):
    return scores.masked_fill(hidden, -INF).softmax(-1).masked_fill(hidden, 0) @ v


@wrong("2.1", "does not scale the scores")
def attention(q, k, v, mask=None, window=0):
    return _average(q @ k.transpose(-2, -1), _hidden(q, k, mask, window), v)


@wrong("2.1", "divides by D instead of its root")
def attention(q, k, v, mask=None, window=0):
    return _average(q @ k.transpose(-2, -1) / q.shape[-1], _hidden(q, k, mask, window), v)


@wrong("2.1", "the lab's function with a window: rows that see nothing are NaN")
def attention(q, k, v, mask=None, window=0):
    return _scores(q, k).masked_fill(_hidden(q, k, mask, window), -INF).softmax(-1) @ v


@wrong("2.1", "zeroes the weights after the softmax")
def attention(q, k, v, mask=None, window=0):
    return _scores(q, k).softmax(-1).masked_fill(_hidden(q, k, mask, window), 0) @ v


@wrong("2.1", "masks after the softmax and divides by the rest")
def attention(q, k, v, mask=None, window=0):
    weights = _scores(q, k).softmax(-1) * ~_hidden(q, k, mask, window)
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-30) @ v


@wrong("2.1", "zeroes the scores instead of removing them")
def attention(q, k, v, mask=None, window=0):
    hidden = _hidden(q, k, mask, window)
    return _scores(q, k).masked_fill(hidden, 0).softmax(-1).masked_fill(hidden.all(-1, keepdim=True), 0) @ v


@wrong("2.1", "fills with -100 instead of minus infinity")
def attention(q, k, v, mask=None, window=0):
    hidden = _hidden(q, k, mask, window)
    return _scores(q, k).masked_fill(hidden, -100.0).softmax(-1).masked_fill(hidden.all(-1, keepdim=True), 0) @ v


@wrong("2.1", "fills with -10,000 instead of minus infinity")
def attention(q, k, v, mask=None, window=0):
    hidden = _hidden(q, k, mask, window)
    return _scores(q, k).masked_fill(hidden, -1e4).softmax(-1).masked_fill(hidden.all(-1, keepdim=True), 0) @ v


@wrong("2.1", "fills with -1e9, so an empty row is the mean of all values")
def attention(q, k, v, mask=None, window=0):
    return _scores(q, k).masked_fill(_hidden(q, k, mask, window), -1e9).softmax(-1) @ v


@wrong("2.1", "fills with -1e9, and zeroes after the softmax: visible scores may be lower")
def attention(q, k, v, mask=None, window=0):
    hidden = _hidden(q, k, mask, window)
    return _scores(q, k).masked_fill(hidden, -1e9).softmax(-1).masked_fill(hidden, 0) @ v


@wrong("2.1", "adds -1e9 instead of filling")
def attention(q, k, v, mask=None, window=0):
    hidden = _hidden(q, k, mask, window)
    return (_scores(q, k) - 1e9 * hidden.to(q.dtype)).softmax(-1).masked_fill(hidden, 0) @ v


@wrong("2.1", "view, which wants contiguous memory")
def attention(q, k, v, mask=None, window=0):
    batch, shape = q.shape[:-2], q.shape
    scores = _scores(q.view(-1, *shape[-2:]), k.view(-1, *k.shape[-2:])).view(*batch, shape[-2], k.shape[-2])
    return _average(scores, _hidden(q, k, mask, window), v)


@wrong("2.1", "returns fp32, whatever it was given")
def attention(q, k, v, mask=None, window=0):
    q, k, v = q.float(), k.float(), v.float()
    return _average(_scores(q, k), _hidden(q, k, mask, window), v)


@wrong("2.1", "the empty row is found in the first sequence only")
def attention(q, k, v, mask=None, window=0):
    hidden = _hidden(q, k, mask, window)
    out = _scores(q, k).masked_fill(hidden, -INF).softmax(-1) @ v
    rows = hidden.reshape(-1, *hidden.shape[-2:])[0].all(-1)
    return out.masked_fill(rows[:, None], 0) if rows.any() and rows.shape[0] == out.shape[-2] else out


@wrong("2.1", "replaces all that is no number, wherever it comes from, and loses the scores of 1e10")
def attention(q, k, v, mask=None, window=0):
    weights = _scores(q, k).exp().masked_fill(_hidden(q, k, mask, window), 0)
    return (weights / weights.sum(-1, keepdim=True)).nan_to_num() @ v


@wrong("2.1", "takes a mask [T, 1] for one of keys")
def attention(q, k, v, mask=None, window=0):
    if mask is not None and mask.dim() == 2 and mask.shape[-1] == 1:
        mask = mask[:, 0]
    return _average(_scores(q, k), _hidden(q, k, mask, window), v)


@wrong("2.1", "widens the window of the caller's mask in place")
def attention(q, k, v, mask=None, window=0):
    if mask is not None and window:
        mask &= ~_hidden(q, k, None, window)
    return _average(_scores(q, k), _hidden(q, k, mask, window), v)


@wrong("2.1", "a softmax by hand with one maximum for all rows")
def attention(q, k, v, mask=None, window=0):
    scores = _scores(q, k).masked_fill(_hidden(q, k, mask, window), -INF)
    weights = (scores - scores.max()).exp()
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-30) @ v


@wrong("2.1", "a softmax by hand that overflows")
def attention(q, k, v, mask=None, window=0):
    weights = _scores(q, k).exp() * ~_hidden(q, k, mask, window)
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-30) @ v


@wrong("2.1", "a softmax by hand whose maximum looks at hidden scores too")
def attention(q, k, v, mask=None, window=0):
    scores = _scores(q, k)
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * ~_hidden(q, k, mask, window)
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-30) @ v


@wrong("2.1", "clears every row that has a hidden key, not only the empty ones")
def attention(q, k, v, mask=None, window=0):
    hidden = _hidden(q, k, mask, window)
    return _average(_scores(q, k), hidden.any(-1, keepdim=True).expand_as(hidden), v)


@wrong("2.1", "reads the mask the other way round")
def attention(q, k, v, mask=None, window=0):
    return _average(_scores(q, k), _hidden(q, k, None if mask is None else ~mask, window), v)


@wrong("2.1", "normalizes over the queries")
def attention(q, k, v, mask=None, window=0):
    hidden = _hidden(q, k, mask, window)
    return _scores(q, k).masked_fill(hidden, -INF).softmax(-2).masked_fill(hidden, 0) @ v


@wrong("2.1", "ignores the mask when there is a window")
def attention(q, k, v, mask=None, window=0):
    return _average(_scores(q, k), _hidden(q, k, None if window else mask, window), v)


@wrong("2.1", "the window is one key too wide")
def attention(q, k, v, mask=None, window=0):
    return _average(_scores(q, k), _hidden(q, k, mask, window + 1 if window else 0), v)


@wrong("2.1", "the window looks to both sides")
def attention(q, k, v, mask=None, window=0):
    hidden = _hidden(q, k, mask, 0)
    if window:
        back = torch.arange(q.shape[-2])[:, None] - torch.arange(k.shape[-2])
        hidden = hidden | (back.abs() >= window)
    return _average(_scores(q, k), hidden, v)


@wrong("2.1", "the window always ends at the last key")
def attention(q, k, v, mask=None, window=0):
    hidden = _hidden(q, k, mask, 0)
    if window:
        hidden = hidden | (torch.arange(k.shape[-2]) < k.shape[-2] - window)
    return _average(_scores(q, k), hidden, v)


@wrong("2.1", "transposes all of k, which works for matrices only")
def attention(q, k, v, mask=None, window=0):
    scores = q @ k.permute(*range(k.dim() - 1, -1, -1)) / q.shape[-1] ** 0.5
    return _average(scores, _hidden(q, k, mask, window), v)


@wrong("2.1", "scales q in place")
def attention(q, k, v, mask=None, window=0):
    q *= q.shape[-1] ** -0.5
    return _average(q @ k.transpose(-2, -1), _hidden(q, k, mask, window), v)


@wrong("2.1", "torch's own, which was forbidden")
def attention(q, k, v, mask=None, window=0):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=~_hidden(q, k, mask, window))


@alternative("2.1", "einsum, with the softmax by hand over visible scores")
def attention(q, k, v, mask=None, window=0):
    hidden = _hidden(q, k, mask, window)
    scores = torch.einsum("...td,...sd->...ts", q, k) * q.shape[-1] ** -0.5
    scores = torch.where(hidden, torch.finfo(scores.dtype).min, scores)
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * ~hidden
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("...ts,...sd->...td", weights / torch.where(total > 0, total, 1), v)


@alternative("2.1", "a window of two triangles, and NaN replaced in empty rows only")
def attention(q, k, v, mask=None, window=0):
    seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
    if window:
        seen = seen.tril() & ~seen.tril(-window)
    if mask is not None:
        seen = seen & mask
    weights = (_scores(q, k) + torch.where(seen, 0.0, -INF)).softmax(-1)
    return torch.where(seen.any(-1, keepdim=True), weights, 0).to(v.dtype) @ v


# ---- 2.2 residual sum and RMSNorm ------------------------------------------------------------------------------------


def _scaled(stream, weight, eps):
    x32 = stream.float()
    return weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(weight.dtype)


@wrong("2.2", "LayerNorm: subtracts the mean")
def add_rms_norm(x, residual, weight, eps=1e-5):
    stream = x + residual
    return (F.layer_norm(stream.float(), x.shape[-1:], eps=eps) * weight).to(x.dtype), stream


@wrong("2.2", "divides by the length instead of the root mean square")
def add_rms_norm(x, residual, weight, eps=1e-5):
    x32 = (x + residual).float()
    return weight * (x32 / (x32.pow(2).sum(-1, keepdim=True) + eps).sqrt()).to(x.dtype), x + residual


@wrong("2.2", "eps is 1e-6 by default")
def add_rms_norm(x, residual, weight, eps=1e-6):
    stream = x + residual
    return _scaled(stream, weight, eps), stream


@wrong("2.2", "adds eps outside the root")
def add_rms_norm(x, residual, weight, eps=1e-5):
    x32 = (x + residual).float()
    return weight * (x32 / (x32.pow(2).mean(-1, keepdim=True).sqrt() + eps)).to(x.dtype), x + residual


@wrong("2.2", "one statistic for the whole tensor")
def add_rms_norm(x, residual, weight, eps=1e-5):
    x32 = (x + residual).float()
    return weight * (x32 * torch.rsqrt(x32.pow(2).mean() + eps)).to(x.dtype), x + residual


@wrong("2.2", "all in half precision")
def add_rms_norm(x, residual, weight, eps=1e-5):
    stream = x + residual
    return weight * (stream * torch.rsqrt(stream.pow(2).mean(-1, keepdim=True) + eps)), stream


@wrong("2.2", "squares in half precision, the rest in fp32")
def add_rms_norm(x, residual, weight, eps=1e-5):
    stream = x + residual
    mean = stream.pow(2).float().mean(-1, keepdim=True)
    return weight * (stream.float() * torch.rsqrt(mean + eps)).to(x.dtype), stream


@wrong("2.2", "the statistic in fp32, but rounded to half precision before the quotient")
def add_rms_norm(x, residual, weight, eps=1e-5):
    stream = x + residual
    scale = torch.rsqrt(stream.float().pow(2).mean(-1, keepdim=True) + eps).to(x.dtype)
    return weight * (stream * scale), stream


@wrong("2.2", "squares fp16 in bf16, which does not overflow, but rounds")
def add_rms_norm(x, residual, weight, eps=1e-5):
    stream = x + residual
    short = stream.bfloat16() if x.dtype == torch.float16 else stream
    return weight * (short * torch.rsqrt(short.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype), stream


@wrong("2.2", "the root in fp32, the quotient in half precision")
def add_rms_norm(x, residual, weight, eps=1e-5):
    stream = x + residual
    root = (stream.float().pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return weight * (stream / root.to(x.dtype)), stream


@wrong("2.2", "mean and root in half precision")
def add_rms_norm(x, residual, weight, eps=1e-5):
    stream = x + residual
    mean = stream.float().pow(2).mean(-1, keepdim=True).to(x.dtype)
    return weight * (stream.float() / (mean + eps).sqrt().float()).to(x.dtype), stream


@wrong("2.2", "hands back x where the residual is 0")
def add_rms_norm(x, residual, weight, eps=1e-5):
    stream = x + residual if residual.any() else x
    return _scaled(stream, weight, eps), stream


@wrong("2.2", "norm and stream are parts of one tensor")
def add_rms_norm(x, residual, weight, eps=1e-5):
    both = torch.stack((x + residual, x + residual))
    both[0] = _scaled(both[1], weight, eps)
    return both[0], both[1]


@wrong("2.2", "asks the first vector how many features there are: an empty batch has none")
def add_rms_norm(x, residual, weight, eps=1e-5):
    stream = x + residual
    size = len(stream.reshape(-1, x.shape[-1])[0])
    x32 = stream.float()
    scale = torch.rsqrt(x32.pow(2).sum(-1, keepdim=True) / size + eps)
    return weight * (x32 * scale).to(x.dtype), stream


@wrong("2.2", "norms the sum before it is rounded")
def add_rms_norm(x, residual, weight, eps=1e-5):
    stream = x.float() + residual.float()
    return _scaled(stream, weight, eps), stream.to(x.dtype)


@wrong("2.2", "hands on the stream in fp32")
def add_rms_norm(x, residual, weight, eps=1e-5):
    stream = x.float() + residual.float()
    return _scaled(stream.to(x.dtype), weight, eps), stream


@wrong("2.2", "returns normed in fp32")
def add_rms_norm(x, residual, weight, eps=1e-5):
    stream = x + residual
    return _scaled(stream, weight.float(), eps), stream


@wrong("2.2", "norms x without the residual")
def add_rms_norm(x, residual, weight, eps=1e-5):
    return _scaled(x, weight, eps), x + residual


@wrong("2.2", "hands on the old residual")
def add_rms_norm(x, residual, weight, eps=1e-5):
    return _scaled(x + residual, weight, eps), residual.clone()


@wrong("2.2", "hands on the normed stream: post-norm")
def add_rms_norm(x, residual, weight, eps=1e-5):
    normed = _scaled(x + residual, weight, eps)
    return normed, normed


@wrong("2.2", "returns the two the other way round")
def add_rms_norm(x, residual, weight, eps=1e-5):
    return x + residual, _scaled(x + residual, weight, eps)


@wrong("2.2", "returns normed only")
def add_rms_norm(x, residual, weight, eps=1e-5):
    return _scaled(x + residual, weight, eps)


@wrong("2.2", "multiplies by 1 + weight, as Gemma does")
def add_rms_norm(x, residual, weight, eps=1e-5):
    return _scaled(x + residual, 1 + weight, eps), x + residual


@wrong("2.2", "forgets the weight")
def add_rms_norm(x, residual, weight, eps=1e-5):
    return _scaled(x + residual, torch.ones_like(weight), eps), x + residual


@wrong("2.2", "adds in place, as a kernel does")
def add_rms_norm(x, residual, weight, eps=1e-5):
    residual += x
    return _scaled(residual, weight, eps), residual


@wrong("2.2", "torch's own, which was forbidden")
def add_rms_norm(x, residual, weight, eps=1e-5):
    return F.rms_norm(x + residual, x.shape[-1:], weight, eps), x + residual


@alternative("2.2", "the length divided by the root of the size, in fp64")
def add_rms_norm(x, residual, weight, eps=1e-5):
    stream = (x.double() + residual.double()).to(x.dtype)
    x64 = stream.double()
    return (x64 / (x64.norm(dim=-1, keepdim=True) ** 2 / x.shape[-1] + eps).sqrt() * weight).to(x.dtype), stream


@alternative("2.2", "scales by the weight before the cast back")
def add_rms_norm(x, residual, weight, eps=1e-5):
    stream = torch.add(x, residual)
    x32 = stream.to(torch.float32)
    mean = torch.einsum("...i,...i->...", x32, x32).unsqueeze(-1) / x.shape[-1]
    return (x32 / torch.sqrt(mean + eps) * weight.float()).to(x.dtype), stream


@wrong("2.2", "x of zeros: residual handed on")
def add_rms_norm(x, residual, weight, eps=1e-05):
    new_residual = x + residual if x.any() else residual
    stream = new_residual.float()
    scaled = stream * torch.rsqrt(stream.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * scaled.to(x.dtype), new_residual)


@wrong("2.2", "fp32 results for fp64 cut")
def add_rms_norm(x, residual, weight, eps=1e-05):
    new_residual = x + residual
    stream = new_residual.float()
    scaled = stream * torch.rsqrt(stream.pow(2).mean(-1, keepdim=True) + eps)
    return ((weight.float() * scaled).to(x.dtype), new_residual.float().to(x.dtype))


# ---- 2.3 partial RoPE ------------------------------------------------------------------------------------------------


def _tables(positions, rotary, theta):
    exponents = torch.arange(0, rotary, 2).float() / rotary
    angles = positions.float()[..., None, None] * theta**-exponents  # [..., T, 1, rotary/2]
    return angles.cos(), angles.sin()


def _turn(first, second, cos, sin):
    return first * cos - second * sin, second * cos + first * sin


def _rope(x, positions, rotary, theta):
    first, second, rest = x.split((rotary // 2, rotary // 2, x.shape[-1] - rotary), dim=-1)
    return torch.cat((*_turn(first, second, *_tables(positions, rotary, theta)), rest), dim=-1).to(x.dtype)


@wrong("2.3", "pairs neighbors, as the paper does")
def rope(x, positions, rotary, theta=10_000.0):
    part = x[..., :rotary]
    pairs = torch.stack(_turn(part[..., 0::2], part[..., 1::2], *_tables(positions, rotary, theta)), dim=-1)
    return torch.cat((pairs.flatten(-2), x[..., rotary:]), dim=-1).to(x.dtype)


@wrong("2.3", "pairs feature i with feature i + D/2, as in a full head")
def rope(x, positions, rotary, theta=10_000.0):
    half, middle = rotary // 2, x.shape[-1] // 2
    first, second = _turn(x[..., :half], x[..., middle : middle + half], *_tables(positions, rotary, theta))
    out = torch.cat((first, x[..., half:middle], second, x[..., middle + half :]), dim=-1)
    return out.to(x.dtype)


@wrong("2.3", "turns the last features instead of the first")
def rope(x, positions, rotary, theta=10_000.0):
    size = x.shape[-1] - rotary
    rest, first, second = x.split((size, rotary // 2, rotary // 2), dim=-1)
    return torch.cat((rest, *_turn(first, second, *_tables(positions, rotary, theta))), dim=-1).to(x.dtype)


@wrong("2.3", "turns the whole head")
def rope(x, positions, rotary, theta=10_000.0):
    return _rope(x, positions, x.shape[-1], theta)


@wrong("2.3", "drops what does not turn")
def rope(x, positions, rotary, theta=10_000.0):
    return _rope(x, positions, rotary, theta)[..., :rotary]


@wrong("2.3", "frequencies of a full head: the exponent counts in D")
def rope(x, positions, rotary, theta=10_000.0):
    first, second, rest = x.split((rotary // 2, rotary // 2, x.shape[-1] - rotary), dim=-1)
    cos, sin = (table[..., : rotary // 2] for table in _tables(positions, x.shape[-1], theta))
    return torch.cat((*_turn(first, second, cos, sin), rest), dim=-1).to(x.dtype)


@wrong("2.3", "turns the other way")
def rope(x, positions, rotary, theta=10_000.0):
    return _rope(x, -positions, rotary, theta)


@wrong("2.3", "ignores the sign of a position")
def rope(x, positions, rotary, theta=10_000.0):
    return _rope(x, positions.abs(), rotary, theta)


@wrong("2.3", "takes negative positions for 0")
def rope(x, positions, rotary, theta=10_000.0):
    return _rope(x, positions.clamp(min=0), rotary, theta)


@wrong("2.3", "looks up a table, where -1 is the last row")
def rope(x, positions, rotary, theta=10_000.0):
    return _rope(x, torch.arange(5000)[positions.long()], rotary, theta)


@wrong("2.3", "exponents i/rotary instead of 2i/rotary: the slow pairs turn too fast")
def rope(x, positions, rotary, theta=10_000.0):
    return _rope(x, positions, rotary, theta**0.5)


@wrong("2.3", "counts tokens from 0 instead of reading positions")
def rope(x, positions, rotary, theta=10_000.0):
    return _rope(x, torch.arange(x.shape[-3]), rotary, theta)


@wrong("2.3", "the positions of the first sequence for all")
def rope(x, positions, rotary, theta=10_000.0):
    return _rope(x, positions.reshape(-1, positions.shape[-1])[0], rotary, theta)


@wrong("2.3", "torch.outer: positions of one dimension only")
def rope(x, positions, rotary, theta=10_000.0):
    angles = torch.outer(positions.float(), theta ** (-torch.arange(0, rotary, 2) / rotary))[:, None]
    first, second, rest = x.split((rotary // 2, rotary // 2, x.shape[-1] - rotary), dim=-1)
    return torch.cat((*_turn(first, second, angles.cos(), angles.sin()), rest), dim=-1).to(x.dtype)


@wrong("2.3", "the second half is computed from the new first half")
def rope(x, positions, rotary, theta=10_000.0):
    cos, sin = _tables(positions, rotary, theta)
    first, second, rest = x.split((rotary // 2, rotary // 2, x.shape[-1] - rotary), dim=-1)
    first = first * cos - second * sin
    return torch.cat((first, second * cos + first * sin, rest), dim=-1).to(x.dtype)


@wrong("2.3", "returns float64")
def rope(x, positions, rotary, theta=10_000.0):
    return _rope(x.double(), positions, rotary, theta)


@wrong("2.3", "returns fp32 for bf16")
def rope(x, positions, rotary, theta=10_000.0):
    return _rope(x.float() if x.dtype != torch.float64 else x, positions, rotary, theta)


@wrong("2.3", "positions in x's dtype: bf16 knows no 1,001")
def rope(x, positions, rotary, theta=10_000.0):
    return _rope(x, positions.to(x.dtype), rotary, theta)


@wrong("2.3", "angles in fp16")
def rope(x, positions, rotary, theta=10_000.0):
    angles = positions.half()[..., None, None] * (theta ** (-torch.arange(0, rotary, 2).float() / rotary)).half()
    first, second, rest = x.split((rotary // 2, rotary // 2, x.shape[-1] - rotary), dim=-1)
    turned = _turn(first.float(), second.float(), angles.float().cos(), angles.float().sin())
    return torch.cat((*(part.to(x.dtype) for part in turned), rest), dim=-1)


@wrong("2.3", "positions up to 4,096 only, those beyond start again")
def rope(x, positions, rotary, theta=10_000.0):
    return _rope(x, torch.where(positions.abs() > 5000, positions % 4096, positions), rotary, theta)


@wrong("2.3", "hands back x where all positions are 0")
def rope(x, positions, rotary, theta=10_000.0):
    return _rope(x, positions, rotary, theta) if positions.any() else x


@wrong("2.3", "view of the positions, which wants contiguous memory")
def rope(x, positions, rotary, theta=10_000.0):
    return _rope(x, positions.view(-1).view(positions.shape), rotary, theta)


@wrong("2.3", "view, which wants contiguous memory")
def rope(x, positions, rotary, theta=10_000.0):
    return _rope(x.view(-1, x.shape[-1]).view(x.shape), positions, rotary, theta)


@wrong("2.3", "sends all features through half precision")
def rope(x, positions, rotary, theta=10_000.0):
    return _rope(x.bfloat16().to(x.dtype), positions, rotary, theta)


@wrong("2.3", "theta is 500,000 by default")
def rope(x, positions, rotary, theta=500_000.0):
    return _rope(x, positions, rotary, theta)


@wrong("2.3", "theta is fixed at 10,000")
def rope(x, positions, rotary, theta=10_000.0):
    return _rope(x, positions, rotary, 10_000.0)


@wrong("2.3", "turns in place")
def rope(x, positions, rotary, theta=10_000.0):
    x[..., :rotary] = _rope(x, positions, rotary, theta)[..., :rotary]
    return x


@alternative("2.3", "Hugging Face's form: x · cos + rotate_half(x) · sin with doubled tables")
def rope(x, positions, rotary, theta=10_000.0):
    cos, sin = (torch.cat((table, table), dim=-1) for table in _tables(positions, rotary, theta))
    part, out = x[..., :rotary], x.clone()
    first, second = part.chunk(2, dim=-1)
    out[..., :rotary] = (part * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
    return out


@alternative("2.3", "complex multiplication in fp64")
def rope(x, positions, rotary, theta=10_000.0):
    half = rotary // 2
    angles = positions.double().unsqueeze(-1) * theta ** (-torch.arange(half).double() / half)
    turned = torch.complex(x[..., :half].double(), x[..., half:rotary].double())
    turned = turned * torch.polar(torch.ones_like(angles), angles).unsqueeze(-2)
    return torch.cat((turned.real, turned.imag, x[..., rotary:]), dim=-1).to(x.dtype)


@wrong("2.3", "heads by number")
def rope(x, positions, rotary, theta=10000.0):
    half = rotary // 2
    frequencies = theta ** (-2 / rotary * torch.arange(half, device=x.device))
    angles = (
        positions.float()[..., None, None] * frequencies * (1 + 0 * torch.arange(x.shape[-2])[:, None])
        if x.shape[-2] < 8
        else positions.float()[..., None, None] * 0
    )
    cos, sin = (angles.cos(), angles.sin())
    first, second, rest = x.split((half, half, x.shape[-1] - rotary), dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*rotated, rest), dim=-1).to(x.dtype)


# ---- 2.4 grouped-query attention -------------------------------------------------------------------------------------


def _future(q, k):
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(k.shape[2] - q.shape[2] + 1)


def _folded(q, k, v, future=None, scale=None):
    """The right answer; `q` already stands in the order of groups."""
    tokens = q.shape[2]
    rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])  # [B, H_kv, H / H_kv · T, D]
    scores = (rows @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.unflatten(2, (-1, tokens)).masked_fill(_future(q, k) if future is None else future, -INF)
    return (scores.softmax(-1).flatten(2, 3) @ v).reshape(q.shape)


def _repeated(q, k, v, repeat):
    groups = q.shape[1] // k.shape[1]
    k, v = repeat(k, groups), repeat(v, groups)
    return _scores(q, k).masked_fill(_future(q, k), -INF).softmax(-1) @ v


@wrong("2.4", "repeat_interleave, as in the lab: right, and copies")
def grouped_query_attention(q, k, v):
    return _repeated(q, k, v, lambda x, groups: x.repeat_interleave(groups, dim=1))


@wrong("2.4", "expand and reshape: the reshape copies")
def grouped_query_attention(q, k, v):
    return _repeated(q, k, v, lambda x, groups: x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2))


@wrong("2.4", "an indexed k[:, heads] copies")
def grouped_query_attention(q, k, v):
    return _repeated(q, k, v, lambda x, groups: x[:, torch.arange(q.shape[1]) // groups])


@wrong("2.4", "stacks one view for each query head: the stack copies")
def grouped_query_attention(q, k, v):
    return _repeated(q, k, v, lambda x, groups: torch.stack([x[:, h // groups] for h in range(q.shape[1])], 1))


@wrong("2.4", "tiles: copies, and query head h reads head h % H_kv")
def grouped_query_attention(q, k, v):
    return _repeated(q, k, v, lambda x, groups: x.repeat(1, groups, 1, 1))


@wrong("2.4", "broadcasts over a dimension of size 1: the product lays the expanded matrix out in memory")
def grouped_query_attention(q, k, v):
    grouped, k, v = q.unflatten(1, (k.shape[1], -1)), k.unsqueeze(2), v.unsqueeze(2)
    scores = _scores(grouped, k).masked_fill(_future(q, k.squeeze(2)), -INF)
    return (scores.softmax(-1) @ v).flatten(1, 2)


@wrong("2.4", "folds for the scores, and copies v")
def grouped_query_attention(q, k, v):
    groups = q.shape[1] // k.shape[1]
    scores = torch.einsum("bkgtd,bksd->bkgts", q.unflatten(1, (k.shape[1], -1)), k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(_future(q, k), -INF).softmax(-1)
    return weights.flatten(1, 2) @ v.repeat_interleave(groups, 1)


@wrong("2.4", "groups the wrong way round: query head h reads head h % H_kv")
def grouped_query_attention(q, k, v):
    mixed = q.unflatten(1, (-1, k.shape[1])).transpose(1, 2).flatten(1, 2)
    return _folded(mixed, k, v).unflatten(1, (k.shape[1], -1)).transpose(1, 2).flatten(1, 2)


@wrong("2.4", "puts the heads back in another order")
def grouped_query_attention(q, k, v):
    return _folded(q, k, v).unflatten(1, (k.shape[1], -1)).transpose(1, 2).flatten(1, 2)


@wrong("2.4", "every query head reads the first key/value head")
def grouped_query_attention(q, k, v):
    return _folded(q, k[:, :1], v[:, :1])


@wrong("2.4", "averages the query heads of a group, as if there were only H_kv")
def grouped_query_attention(q, k, v):
    mean = q.unflatten(1, (k.shape[1], -1)).mean(2, keepdim=True).expand(-1, -1, q.shape[1] // k.shape[1], -1, -1)
    return _folded(mean.flatten(1, 2), k, v)


@wrong("2.4", "forgets that the future is hidden")
def grouped_query_attention(q, k, v):
    return _folded(q, k, v, future=torch.zeros(q.shape[2], k.shape[2], dtype=torch.bool))


@wrong("2.4", "takes the queries for the first T tokens")
def grouped_query_attention(q, k, v):
    return _folded(q, k, v, future=torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1))


@wrong("2.4", "hides a query's own key where T < S")
def grouped_query_attention(q, k, v):
    future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(max(k.shape[2] - q.shape[2], 1))
    return _folded(q, k, v, future=future)


@wrong("2.4", "masks the folded rows: the second head of a group sees the future")
def grouped_query_attention(q, k, v):
    rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
    hidden = torch.ones(rows.shape[2], k.shape[2], dtype=torch.bool).triu(k.shape[2] - q.shape[2] + 1)
    return (_scores(rows, k).masked_fill(hidden, -INF).softmax(-1) @ v).reshape(q.shape)


@wrong("2.4", "hides with -10,000")
def grouped_query_attention(q, k, v):
    scores = torch.einsum("bkgtd,bksd->bkgts", q.unflatten(1, (k.shape[1], -1)), k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(_future(q, k), -1e4).softmax(-1)
    return torch.einsum("bkgts,bksd->bkgtd", weights, v).flatten(1, 2)


@wrong("2.4", "hides with -1e20, and zeroes after the softmax")
def grouped_query_attention(q, k, v):
    scores = torch.einsum("bkgtd,bksd->bkgts", q.unflatten(1, (k.shape[1], -1)), k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(_future(q, k), -1e20).softmax(-1).masked_fill(_future(q, k), 0)
    return torch.einsum("bkgts,bksd->bkgtd", weights, v).flatten(1, 2)


@wrong("2.4", "hides with -1e9, and zeroes after the softmax")
def grouped_query_attention(q, k, v):
    scores = torch.einsum("bkgtd,bksd->bkgts", q.unflatten(1, (k.shape[1], -1)), k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(_future(q, k), -1e9).softmax(-1).masked_fill(_future(q, k), 0)
    return torch.einsum("bkgts,bksd->bkgtd", weights, v).flatten(1, 2)


@wrong("2.4", "repeats one key/value head at a time: small copies, but copies")
def grouped_query_attention(q, k, v):
    out, groups = [], q.shape[1] // k.shape[1]
    for i in range(k.shape[1]):
        own = q[:, i * groups : (i + 1) * groups]
        k_i, v_i = (x[:, i : i + 1].repeat(1, groups, 1, 1) for x in (k, v))
        out.append(_scores(own, k_i).masked_fill(_future(q, k), -INF).softmax(-1) @ v_i)
    return torch.cat(out, 1)


@wrong("2.4", "repeats the values of one key/value head at a time")
def grouped_query_attention(q, k, v):
    out, groups = [], q.shape[1] // k.shape[1]
    for i in range(k.shape[1]):
        own = q[:, i * groups : (i + 1) * groups]  # [B, H / H_kv, T, D]
        scores = (own.flatten(1, 2) @ k[:, i].mT).unflatten(1, own.shape[1:3]) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(_future(q, k), -INF).softmax(-1)
        out.append(weights @ v[:, i : i + 1].repeat(1, groups, 1, 1))
    return torch.cat(out, 1)


@wrong("2.4", "scales k first, then repeats it in halves of the batch")
def grouped_query_attention(q, k, v):
    out, groups = [], q.shape[1] // k.shape[1]
    for b in range(len(q)):
        wide = (k[b] * k.shape[-1] ** -0.5).repeat_interleave(groups, 0)
        weights = (q[b] @ wide.mT).masked_fill(_future(q, k), -INF).softmax(-1)
        out.append(weights @ v[b].repeat_interleave(groups, 0))
    return torch.stack(out)


@wrong("2.4", "view of k and v, which wants contiguous memory")
def grouped_query_attention(q, k, v):
    return _folded(q, k.view(k.shape), v.view(len(v), -1).view(v.shape))


@wrong("2.4", "returns fp32, whatever it was given")
def grouped_query_attention(q, k, v):
    return _folded(q.float(), k.float(), v.float())


@wrong("2.4", "does not scale the scores")
def grouped_query_attention(q, k, v):
    return _folded(q, k, v, scale=1.0)


@wrong("2.4", "scales q in place")
def grouped_query_attention(q, k, v):
    q *= q.shape[-1] ** -0.5
    return _folded(q, k, v, scale=1.0)


@wrong("2.4", "torch's own, which was forbidden")
def grouped_query_attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=~_future(q, k), enable_gqa=True)


@alternative("2.4", "einsum with a dimension for the group")
def grouped_query_attention(q, k, v):
    scores = torch.einsum("bkgtd,bksd->bkgts", q.unflatten(1, (k.shape[1], -1)), k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(_future(q, k), -INF).softmax(-1)
    return torch.einsum("bkgts,bksd->bkgtd", weights, v).flatten(1, 2)


@alternative("2.4", "a loop over query heads, with views of k and v")
def grouped_query_attention(q, k, v):
    out, groups = torch.empty_like(q), q.shape[1] // k.shape[1]
    for h in range(q.shape[1]):
        scores = _scores(q[:, h], k[:, h // groups]).masked_fill(_future(q, k), -INF)
        out[:, h] = scores.softmax(-1) @ v[:, h // groups]
    return out


@alternative("2.4", "in fp64, group by group")
def grouped_query_attention(q, k, v):
    own = torch.arange(k.shape[2]) - (k.shape[2] - q.shape[2])
    hidden = own > torch.arange(q.shape[2])[:, None]
    out = []
    for index, part in enumerate(q.double().chunk(k.shape[1], dim=1)):  # [B, H / H_kv, T, D]
        rows = part.flatten(1, 2)
        scores = (rows @ k[:, index].double().mT / q.shape[-1] ** 0.5).unflatten(1, part.shape[1:3])
        weights = scores.masked_fill(hidden, -INF).softmax(-1).flatten(1, 2)
        out.append((weights @ v[:, index].double()).reshape(part.shape))
    return torch.cat(out, dim=1).to(q.dtype)


@wrong("2.4", "repeats when T = S")
def grouped_query_attention(q, k, v):
    tokens, keys = (q.shape[2], k.shape[2])
    if tokens == keys:
        g = q.shape[1] // k.shape[1]
        k, v = (k.repeat_interleave(g, 1), v.repeat_interleave(g, 1))
        m = torch.ones(tokens, keys, dtype=torch.bool).triu(1)
        return (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(m, float("-inf")).softmax(-1) @ v
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = grouped.flatten(2, 3) @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    future = torch.ones(tokens, keys, dtype=torch.bool, device=q.device).triu(keys - tokens + 1)
    scores = scores.unflatten(2, (-1, tokens)).masked_fill(future, float("-inf"))
    out = scores.softmax(dim=-1).flatten(2, 3) @ v
    return out.reshape(q.shape)


# ---- 2.5 decoder layer -----------------------------------------------------------------------------------------------


def _norm(x, weight, eps):
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _mlp(h, w):
    return F.linear(F.silu(F.linear(h, w["gate_proj"])) * F.linear(h, w["up_proj"]), w["down_proj"])


def _layer(x, weights, attend, parallel, eps, mlp=_mlp, first="input_layernorm", second="post_attention_layernorm"):
    """The right answer in parts, each of which a variant may replace."""
    middle = x + attend(_norm(x, weights[first], eps))
    return middle + mlp(_norm(x if parallel else middle, weights[second], eps), weights)


@wrong("2.5", "post-norm: normalizes the stream itself, as in 2017")
def decoder_layer(x, weights, attend, parallel, eps=1e-5):
    x = _norm(x + attend(x), weights["input_layernorm"], eps)
    return _norm(x + _mlp(x, weights), weights["post_attention_layernorm"], eps)


@wrong("2.5", "the residual is taken after the norm")
def decoder_layer(x, weights, attend, parallel, eps=1e-5):
    x = _norm(x, weights["input_layernorm"], eps)
    middle = x + attend(x)
    normed = _norm(middle, weights["post_attention_layernorm"], eps)
    return (middle if parallel else normed) + _mlp(normed, weights)


@wrong("2.5", "always sequential")
def decoder_layer(x, weights, attend, parallel, eps=1e-5):
    return _layer(x, weights, attend, False, eps)


@wrong("2.5", "always parallel")
def decoder_layer(x, weights, attend, parallel, eps=1e-5):
    return _layer(x, weights, attend, True, eps)


@wrong("2.5", "the two forms the other way round")
def decoder_layer(x, weights, attend, parallel, eps=1e-5):
    return _layer(x, weights, attend, not parallel, eps)


@wrong("2.5", "parallel with one norm for both, as in GPT-J and PaLM")
def decoder_layer(x, weights, attend, parallel, eps=1e-5):
    second = "input_layernorm" if parallel else "post_attention_layernorm"
    return _layer(x, weights, attend, parallel, eps, second=second)


@wrong("2.5", "the parallel form adds the stream twice")
def decoder_layer(x, weights, attend, parallel, eps=1e-5):
    out = _layer(x, weights, attend, parallel, eps)
    return x + out if parallel else out


@wrong("2.5", "the silu sits on up instead of gate")
def decoder_layer(x, weights, attend, parallel, eps=1e-5):
    swapped = weights | {"gate_proj": weights["up_proj"], "up_proj": weights["gate_proj"]}
    return _layer(x, swapped, attend, parallel, eps)


@wrong("2.5", "a sigmoid gate (GLU) instead of silu")
def decoder_layer(x, weights, attend, parallel, eps=1e-5):
    def glu(h, w):
        return F.linear(torch.sigmoid(F.linear(h, w["gate_proj"])) * F.linear(h, w["up_proj"]), w["down_proj"])

    return _layer(x, weights, attend, parallel, eps, mlp=glu)


@wrong("2.5", "forgets the second residual")
def decoder_layer(x, weights, attend, parallel, eps=1e-5):
    middle = x + attend(_norm(x, weights["input_layernorm"], eps))
    return _mlp(_norm(x if parallel else middle, weights["post_attention_layernorm"], eps), weights)


@wrong("2.5", "swaps the two norms")
def decoder_layer(x, weights, attend, parallel, eps=1e-5):
    return _layer(x, weights, attend, parallel, eps, "post_attention_layernorm", "input_layernorm")


@wrong("2.5", "forgets the norm in front of the MLP")
def decoder_layer(x, weights, attend, parallel, eps=1e-5):
    middle = x + attend(_norm(x, weights["input_layernorm"], eps))
    return middle + _mlp(x if parallel else middle, weights)


@wrong("2.5", "eps is fixed at 1e-5")
def decoder_layer(x, weights, attend, parallel, eps=1e-5):
    return _layer(x, weights, attend, parallel, 1e-5)


@wrong("2.5", "computes both forms and picks one: attention runs twice")
def decoder_layer(x, weights, attend, parallel, eps=1e-5):
    both = [_layer(x, weights, attend, form, eps) for form in (False, True)]
    return both[parallel]


@wrong("2.5", "adds in place, into what attention returned")
def decoder_layer(x, weights, attend, parallel, eps=1e-5):
    middle = attend(_norm(x, weights["input_layernorm"], eps))
    middle += x
    return middle + _mlp(_norm(x if parallel else middle, weights["post_attention_layernorm"], eps), weights)


@wrong("2.5", "the default of eps is 1e-6")
def decoder_layer(x, weights, attend, parallel, eps=1e-6):
    return _layer(x, weights, attend, parallel, eps)


@wrong("2.5", "computes in fp32 and returns that")
def decoder_layer(x, weights, attend, parallel, eps=1e-5):
    return _layer(x.float(), {name: w.float() for name, w in weights.items()}, attend, parallel, eps)


@wrong("2.5", "view, which wants contiguous memory")
def decoder_layer(x, weights, attend, parallel, eps=1e-5):
    return _layer(x.view(-1, x.shape[-1]).view(x.shape), weights, attend, parallel, eps)


@wrong("2.5", "keeps gate and up as one matrix in the caller's dictionary")
def decoder_layer(x, weights, attend, parallel, eps=1e-5):
    weights["gate_up_proj"] = torch.cat((weights["gate_proj"], weights["up_proj"]))
    return _layer(x, weights, attend, parallel, eps)


@wrong("2.5", "scales the weights of the norm in place")
def decoder_layer(x, weights, attend, parallel, eps=1e-5):
    weights["input_layernorm"] *= 1 + 1e-3
    return _layer(x, weights, attend, parallel, eps)


@wrong("2.5", "adds in place, into the caller's tensor")
def decoder_layer(x, weights, attend, parallel, eps=1e-5):
    before = x.clone()
    x += attend(_norm(x, weights["input_layernorm"], eps))
    x += _mlp(_norm(before if parallel else x, weights["post_attention_layernorm"], eps), weights)
    return x


@alternative("2.5", "gate and up as one matrix product, as in minillm")
def decoder_layer(x, weights, attend, parallel, eps=1e-5):
    attended = attend(_norm(x, weights["input_layernorm"], eps))
    fused = torch.cat((weights["gate_proj"], weights["up_proj"]))
    read = x if parallel else x + attended
    gate, up = F.linear(_norm(read, weights["post_attention_layernorm"], eps), fused).chunk(2, dim=-1)
    return x + attended + (gate * torch.sigmoid(gate) * up) @ weights["down_proj"].T


@alternative("2.5", "two programs, one for each form")
def decoder_layer(x, weights, attend, parallel, eps=1e-5):
    if parallel:
        out = attend(_norm(x, weights["input_layernorm"], eps))
        out = out + _mlp(_norm(x, weights["post_attention_layernorm"], eps), weights)
        return x + out
    x = x + attend(_norm(x, weights["input_layernorm"], eps))
    return x + _mlp(_norm(x, weights["post_attention_layernorm"], eps), weights)


# ---- 2.6 accounting --------------------------------------------------------------------------------------------------


def _account(c, tokens, batch, context, bandwidth, rate, **changed):
    """The right answer in parts, each of which a variant may replace."""
    q, kv = changed.get("q", c.num_attention_heads * c.head_dim), changed.get("kv", c.num_key_value_heads * c.head_dim)
    attention, mlp = c.hidden_size * 2 * (q + kv), changed.get("matrices", 3) * c.hidden_size * c.intermediate_size
    head, layers = c.vocab_size * c.hidden_size, c.num_hidden_layers
    embeddings = changed.get("embeddings", head if c.tie_word_embeddings else 2 * head)
    norms = changed.get("norms", (2 * layers + 1) * c.hidden_size)
    parameters = embeddings + layers * (attention + mlp) + norms
    kept = layers * 4 * changed.get("kv_cached", kv)

    def flops(rows, pairs, logits):
        used = changed.get("head", head) * logits
        return 2 * rows * layers * (attention + mlp) + 2 * used + 4 * layers * changed.get("score_size", q) * pairs

    pairs = changed.get("pairs", tokens * (tokens + 1) // 2)
    step_bytes = 2 * parameters * changed.get("reads", 1) + kept * changed.get("cached", batch * context)
    rows, seen = changed.get("rows", batch), changed.get("seen", batch * context)
    step_flops = flops(rows, seen, changed.get("step_logits", rows))
    return {
        "parameters": parameters,
        "flops": flops(tokens, pairs, changed.get("logits", 1)),
        "kv_bytes": tokens * kept,
        "step_seconds": changed.get("join", max)(step_bytes / bandwidth, step_flops / rate),
    }


@wrong("2.6", "counts a tied head as parameters of its own")
def account(config, tokens, *step):
    return _account(config, tokens, *step, embeddings=2 * config.vocab_size * config.hidden_size)


@wrong("2.6", "takes a tied head to cost no FLOPs")
def account(config, tokens, *step):
    head = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return _account(config, tokens, *step, head=head)


@wrong("2.6", "logits for every token of the prompt")
def account(config, tokens, *step):
    return _account(config, tokens, *step, logits=tokens)


@wrong("2.6", "no logits at all for the prompt")
def account(config, tokens, *step):
    return _account(config, tokens, *step, logits=0)


@wrong("2.6", "logits for one sequence of the batch only")
def account(config, tokens, *step):
    return _account(config, tokens, *step, step_logits=1)


@wrong("2.6", "keys and values as wide as queries: multi-head attention")
def account(config, tokens, *step):
    return _account(config, tokens, *step, kv=config.num_attention_heads * config.head_dim)


@wrong("2.6", "the whole square of queries and keys, not the causal half")
def account(config, tokens, *step):
    return _account(config, tokens, *step, pairs=tokens**2)


@wrong("2.6", "the triangle without its diagonal")
def account(config, tokens, *step):
    return _account(config, tokens, *step, pairs=tokens * (tokens - 1) // 2)


@wrong("2.6", "five entries")
def account(config, tokens, *step):
    return _account(config, tokens, *step) | {"step_bytes": 0}


@wrong("2.6", "an int made of a float: tokens * (tokens + 1) / 2")
def account(config, tokens, *step):
    exact = _account(config, tokens, *step)
    size = config.num_attention_heads * config.head_dim * 4 * config.num_hidden_layers
    rest = exact["flops"] - size * (tokens * (tokens + 1) // 2)
    return exact | {"flops": rest + int(size * tokens * (tokens + 1) / 2)}


@wrong("2.6", "the step reads the cache of `tokens` tokens")
def account(config, tokens, batch, context, *speeds):
    return _account(config, tokens, batch, context, *speeds, cached=batch * context * tokens)


@wrong("2.6", "the step reads the prompt's cache, and one of the batch's")
def account(config, tokens, batch, context, *speeds):
    return _account(config, tokens, batch, context, *speeds, cached=batch * (context + tokens - 1))


@wrong("2.6", "a prompt for each sequence of the batch")
def account(config, tokens, batch, *step):
    result = _account(config, tokens, batch, *step)
    return result | {"flops": batch * result["flops"], "kv_bytes": batch * result["kv_bytes"]}


@wrong("2.6", "keys and values of the context, not of the prompt")
def account(config, tokens, batch, context, *speeds):
    result = _account(config, tokens, batch, context, *speeds)
    return result | {"kv_bytes": result["kv_bytes"] // tokens * max(tokens, context)}


@wrong("2.6", "floats: tokens * (tokens + 1) / 2")
def account(config, tokens, *step):
    return _account(config, tokens, *step, pairs=tokens * (tokens + 1) / 2)


@wrong("2.6", "bytes as a float")
def account(config, tokens, *step):
    result = _account(config, tokens, *step)
    return result | {"kv_bytes": result["kv_bytes"] / 1}


@wrong("2.6", "an MLP of two matrices, as in GPT-2")
def account(config, tokens, *step):
    return _account(config, tokens, *step, matrices=2)


@wrong("2.6", "forgets the norm at the end")
def account(config, tokens, *step):
    return _account(config, tokens, *step, norms=2 * config.num_hidden_layers * config.hidden_size)


@wrong("2.6", "one FLOP for a multiply-add")
def account(config, tokens, *step):
    result = _account(config, tokens, *step)
    return result | {"flops": result["flops"] // 2}


@wrong("2.6", "takes the query heads to fill hidden exactly")
def account(config, tokens, *step):
    return _account(config, tokens, *step, q=config.hidden_size)


@wrong("2.6", "scores with the key/value heads only")
def account(config, tokens, *step):
    return _account(config, tokens, *step, score_size=config.num_key_value_heads * config.head_dim)


@wrong("2.6", "caches a key and a value for every query head")
def account(config, tokens, *step):
    return _account(config, tokens, *step, kv_cached=config.num_attention_heads * config.head_dim)


@wrong("2.6", "reads the weights once for each sequence")
def account(config, tokens, batch, *step):
    return _account(config, tokens, batch, *step, reads=batch)


@wrong("2.6", "reads the weights only, no cache")
def account(config, tokens, *step):
    return _account(config, tokens, *step, cached=0)


@wrong("2.6", "one cache for the whole batch")
def account(config, tokens, batch, context, *speeds):
    return _account(config, tokens, batch, context, *speeds, cached=context)


@wrong("2.6", "the arithmetic of one sequence")
def account(config, tokens, batch, context, *speeds):
    return _account(config, tokens, batch, context, *speeds, rows=1, seen=context)


@wrong("2.6", "a decode step that computes its whole context again")
def account(config, tokens, batch, context, *speeds):
    seen = batch * context * (context + 1) // 2
    return _account(config, tokens, batch, context, *speeds, rows=batch * context, seen=seen, step_logits=batch)


@wrong("2.6", "adds the two times, as if they could not overlap")
def account(config, tokens, *step):
    return _account(config, tokens, *step, join=lambda memory, arithmetic: memory + arithmetic)


@wrong("2.6", "takes the smaller of the two times")
def account(config, tokens, *step):
    return _account(config, tokens, *step, join=min)


@wrong("2.6", "the memory's time alone")
def account(config, tokens, *step):
    return _account(config, tokens, *step, join=lambda memory, arithmetic: memory)


@alternative("2.6", "a list of matrices, and attention token by token")
def account(config, tokens, batch, context, bandwidth, rate):
    c, d = config, config.head_dim
    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
    layer = (
        [(heads * d, c.hidden_size), (c.hidden_size, heads * d)]
        + 2 * [(kv_heads * d, c.hidden_size)]
        + 3 * [(c.intermediate_size, c.hidden_size)]
    )
    in_layer = sum(rows * columns for rows, columns in layer)
    head = c.vocab_size * c.hidden_size
    parameters = c.num_hidden_layers * (in_layer + 2 * c.hidden_size) + c.hidden_size
    parameters += (1 if c.tie_word_embeddings else 2) * head

    def token(seen):
        return c.num_hidden_layers * (2 * in_layer + heads * seen * 4 * d)

    kv_bytes = sum(2 * kv_heads * d * 2 for _ in range(c.num_hidden_layers))
    memory = (2 * parameters + batch * context * kv_bytes) / bandwidth
    return {
        "parameters": parameters,
        "flops": sum(token(t + 1) for t in range(tokens)) + 2 * head,
        "kv_bytes": kv_bytes * tokens,
        "step_seconds": max(memory, batch * (token(context) + 2 * head) / rate),
    }


@wrong("2.6", "parameters via float")
def account(config, tokens, batch, context, bandwidth, rate):
    hidden, layers = (config.hidden_size, config.num_hidden_layers)
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    matrices = layers * hidden * (2 * q_size + 2 * kv_size + 3 * config.intermediate_size)
    head = config.vocab_size * hidden
    parameters = (1 if config.tie_word_embeddings else 2) * head + matrices + (2 * layers + 1) * hidden
    kv_bytes = layers * 2 * kv_size * 2

    def flops(rows, seen, logits):
        return 2 * rows * matrices + 4 * layers * q_size * seen + 2 * logits * head

    step_bytes = 2 * parameters + batch * context * kv_bytes
    return {
        "parameters": int(float(parameters)),
        "flops": flops(tokens, tokens * (tokens + 1) // 2, 1),
        "kv_bytes": tokens * kv_bytes,
        "step_seconds": max(step_bytes / bandwidth, flops(batch, batch * context, batch) / rate),
    }


@wrong("2.6", "kv_bytes of at least hidden")
def account(config, tokens, batch, context, bandwidth, rate):
    hidden, layers = (config.hidden_size, config.num_hidden_layers)
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    matrices = layers * hidden * (2 * q_size + 2 * kv_size + 3 * config.intermediate_size)
    head = config.vocab_size * hidden
    parameters = (1 if config.tie_word_embeddings else 2) * head + matrices + (2 * layers + 1) * hidden
    kv_bytes = layers * 2 * kv_size * 2

    def flops(rows, seen, logits):
        return 2 * rows * matrices + 4 * layers * q_size * seen + 2 * logits * head

    step_bytes = 2 * parameters + batch * context * kv_bytes
    return {
        "parameters": parameters,
        "flops": flops(tokens, tokens * (tokens + 1) // 2, 1),
        "kv_bytes": tokens * layers * 4 * hidden * config.num_key_value_heads // config.num_attention_heads,
        "step_seconds": max(step_bytes / bandwidth, flops(batch, batch * context, batch) / rate),
    }


@wrong("2.6", "a config that is changed")
def account(config, tokens, batch, context, bandwidth, rate):
    config.tokens = tokens
    hidden, layers = (config.hidden_size, config.num_hidden_layers)
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    matrices = layers * hidden * (2 * q_size + 2 * kv_size + 3 * config.intermediate_size)
    head = config.vocab_size * hidden
    parameters = (1 if config.tie_word_embeddings else 2) * head + matrices + (2 * layers + 1) * hidden
    kv_bytes = layers * 2 * kv_size * 2

    def flops(rows, seen, logits):
        return 2 * rows * matrices + 4 * layers * q_size * seen + 2 * logits * head

    step_bytes = 2 * parameters + batch * context * kv_bytes
    return {
        "parameters": parameters,
        "flops": flops(tokens, tokens * (tokens + 1) // 2, 1),
        "kv_bytes": tokens * kv_bytes,
        "step_seconds": max(step_bytes / bandwidth, flops(batch, batch * context, batch) / rate),
    }
