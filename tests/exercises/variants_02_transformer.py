"""Wrong and alternative implementations of chapter 2's exercises: checks refuse the first, accept the second."""

import torch
import torch.nn.functional as F

from minillm.learn.testing import alternative, wrong

# ---- 2.1 attention ---------------------------------------------------------------------------------------------------


@wrong("2.1", "does not scale the scores")
def attention(q, k, v, mask=None):
    scores = q @ k.transpose(-2, -1)
    return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1) @ v


@wrong("2.1", "divides by D instead of its root")
def attention(q, k, v, mask=None):
    scores = q @ k.transpose(-2, -1) / q.shape[-1]
    return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1) @ v


@wrong("2.1", "zeroes the weights after the softmax")
def attention(q, k, v, mask=None):
    weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights if mask is None else weights * mask) @ v


@wrong("2.1", "zeroes the scores instead of removing them")
def attention(q, k, v, mask=None):
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    return (scores if mask is None else scores.masked_fill(~mask, 0)).softmax(-1) @ v


@wrong("2.1", "reads the mask the other way round")
def attention(q, k, v, mask=None):
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    return (scores if mask is None else scores.masked_fill(mask, float("-inf"))).softmax(-1) @ v


@wrong("2.1", "normalizes over the queries")
def attention(q, k, v, mask=None):
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-2) @ v


@wrong("2.1", "ignores the mask")
def attention(q, k, v, mask=None):
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v


@wrong("2.1", "transposes all of k, which works for matrices only")
def attention(q, k, v, mask=None):
    scores = q @ k.permute(*range(k.dim() - 1, -1, -1)) / q.shape[-1] ** 0.5
    return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1) @ v


@wrong("2.1", "a softmax by hand that overflows")
def attention(q, k, v, mask=None):
    weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).exp()
    weights = weights if mask is None else weights * mask
    return weights / weights.sum(-1, keepdim=True) @ v


@wrong("2.1", "scales q in place")
def attention(q, k, v, mask=None):
    q *= q.shape[-1] ** -0.5
    scores = q @ k.transpose(-2, -1)
    return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1) @ v


@alternative("2.1", "torch's own")
def attention(q, k, v, mask=None):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@alternative("2.1", "einsum, with the softmax by hand")
def attention(q, k, v, mask=None):
    scores = torch.einsum("...td,...sd->...ts", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = torch.where(mask, scores, torch.finfo(scores.dtype).min)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("...ts,...sd->...td", weights / weights.sum(-1, keepdim=True), v)


# ---- 2.2 RMSNorm -----------------------------------------------------------------------------------------------------


@wrong("2.2", "LayerNorm: subtracts the mean")
def rms_norm(x, weight, eps=1e-5):
    return (F.layer_norm(x.float(), x.shape[-1:], eps=eps) * weight).to(x.dtype)


@wrong("2.2", "divides by the length instead of the root mean square")
def rms_norm(x, weight, eps=1e-5):
    x32 = x.float()
    return weight * (x32 / (x32.pow(2).sum(-1, keepdim=True) + eps).sqrt()).to(x.dtype)


@wrong("2.2", "adds eps outside the root")
def rms_norm(x, weight, eps=1e-5):
    x32 = x.float()
    return weight * (x32 / (x32.pow(2).mean(-1, keepdim=True).sqrt() + eps)).to(x.dtype)


@wrong("2.2", "one statistic for the whole tensor")
def rms_norm(x, weight, eps=1e-5):
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.pow(2).mean() + eps)).to(x.dtype)


@wrong("2.2", "squares in half precision")
def rms_norm(x, weight, eps=1e-5):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


@wrong("2.2", "returns fp32 whatever came in")
def rms_norm(x, weight, eps=1e-5):
    x32 = x.float()
    return weight.float() * x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)


@wrong("2.2", "multiplies by 1 + weight, as Gemma does")
def rms_norm(x, weight, eps=1e-5):
    x32 = x.float()
    return (1 + weight) * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@wrong("2.2", "forgets the weight")
def rms_norm(x, weight, eps=1e-5):
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@alternative("2.2", "torch's own")
def rms_norm(x, weight, eps=1e-5):
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)


@alternative("2.2", "the length divided by the root of the size")
def rms_norm(x, weight, eps=1e-5):
    x64 = x.double()
    return (x64 / (x64.norm(dim=-1, keepdim=True) ** 2 / x.shape[-1] + eps).sqrt() * weight).to(x.dtype)


# ---- 2.3 RoPE --------------------------------------------------------------------------------------------------------


def _tables(x, positions, theta, exponents):
    angles = torch.outer(positions.float(), theta**-exponents)
    return angles.cos()[:, None, :], angles.sin()[:, None, :]


def _exponents(x):
    return torch.arange(0, x.shape[-1], 2).float() / x.shape[-1]


@wrong("2.3", "pairs neighbors, as the paper does")
def rope(x, positions, theta=10_000.0):
    cos, sin = _tables(x, positions, theta, _exponents(x))
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


@wrong("2.3", "turns the other way")
def rope(x, positions, theta=10_000.0):
    cos, sin = _tables(x, positions, theta, _exponents(x))
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


@wrong("2.3", "a sign is lost: no rotation any more")
def rope(x, positions, theta=10_000.0):
    cos, sin = _tables(x, positions, theta, _exponents(x))
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos + first * sin), dim=-1)


@wrong("2.3", "exponents i/D instead of 2i/D: the slow pairs turn too fast")
def rope(x, positions, theta=10_000.0):
    cos, sin = _tables(x, positions, theta, torch.arange(x.shape[-1] // 2).float() / x.shape[-1])
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@wrong("2.3", "counts tokens from 0 instead of reading positions")
def rope(x, positions, theta=10_000.0):
    cos, sin = _tables(x, torch.arange(x.shape[1]), theta, _exponents(x))
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@wrong("2.3", "the second half is computed from the new first half")
def rope(x, positions, theta=10_000.0):
    cos, sin = _tables(x, positions, theta, _exponents(x))
    first, second = x.chunk(2, dim=-1)
    first = first * cos - second * sin
    return torch.cat((first, second * cos + first * sin), dim=-1)


@wrong("2.3", "turns every head by another angle (cos and sin meet the heads, not the tokens)")
def rope(x, positions, theta=10_000.0):
    angles = torch.outer(torch.arange(x.shape[2]).float(), theta ** -_exponents(x))
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@wrong("2.3", "adds sines and cosines, as the sinusoidal encoding does")
def rope(x, positions, theta=10_000.0):
    cos, sin = _tables(x, positions, theta, _exponents(x))
    return x + torch.cat((sin, cos), dim=-1)


@wrong("2.3", "theta is fixed at 10,000")
def rope(x, positions, theta=10_000.0):
    cos, sin = _tables(x, positions, 10_000.0, _exponents(x))
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@wrong("2.3", "turns in place")
def rope(x, positions, theta=10_000.0):
    cos, sin = _tables(x, positions, theta, _exponents(x))
    first, second = (half.clone() for half in x.chunk(2, dim=-1))
    x[..., : x.shape[-1] // 2] = first * cos - second * sin
    x[..., x.shape[-1] // 2 :] = second * cos + first * sin
    return x


@alternative("2.3", "Hugging Face's form: x · cos + rotate_half(x) · sin with doubled tables")
def rope(x, positions, theta=10_000.0):
    cos, sin = (torch.cat((table, table), dim=-1) for table in _tables(x, positions, theta, _exponents(x)))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@alternative("2.3", "complex multiplication")
def rope(x, positions, theta=10_000.0):
    angles = torch.outer(positions.float(), theta ** -_exponents(x))
    turned = (
        torch.complex(*(half.contiguous() for half in x.chunk(2, dim=-1)))
        * torch.polar(torch.ones_like(angles), angles)[:, None, :]
    )
    return torch.cat((turned.real, turned.imag), dim=-1)


# ---- 2.4 grouped-query attention -------------------------------------------------------------------------------------


def _grouped(x, w_q, w_k, w_v, w_o, num_heads, num_kv_heads, share, causal=True):
    b, t, _ = x.shape
    q = F.linear(x, w_q).view(b, t, num_heads, -1).transpose(1, 2)
    k, v = (
        share(F.linear(x, w).view(b, t, num_kv_heads, -1).transpose(1, 2), num_heads // num_kv_heads)
        for w in (w_k, w_v)
    )
    return F.linear(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).reshape(b, t, -1), w_o)


@wrong("2.4", "tiles the key/value heads: query head h reads head h % H_kv")
def grouped_query_attention(x, w_q, w_k, w_v, w_o, num_heads, num_kv_heads):
    return _grouped(x, w_q, w_k, w_v, w_o, num_heads, num_kv_heads, lambda y, groups: y.repeat(1, groups, 1, 1))


@wrong("2.4", "every query head reads the first key/value head")
def grouped_query_attention(x, w_q, w_k, w_v, w_o, num_heads, num_kv_heads):
    return _grouped(
        x, w_q, w_k, w_v, w_o, num_heads, num_kv_heads, lambda y, groups: y[:, :1].expand(-1, num_heads, -1, -1)
    )


@wrong("2.4", "forgets that the future is hidden")
def grouped_query_attention(x, w_q, w_k, w_v, w_o, num_heads, num_kv_heads):
    return _grouped(
        x, w_q, w_k, w_v, w_o, num_heads, num_kv_heads, lambda y, groups: y.repeat_interleave(groups, 1), causal=False
    )


@wrong("2.4", "views [B, T, H·D] as [B, H, T, D], which mixes tokens and features")
def grouped_query_attention(x, w_q, w_k, w_v, w_o, num_heads, num_kv_heads):
    b, t, _ = x.shape
    q = F.linear(x, w_q).view(b, num_heads, t, -1)
    k, v = (
        F.linear(x, w).view(b, num_kv_heads, t, -1).repeat_interleave(num_heads // num_kv_heads, 1) for w in (w_k, w_v)
    )
    return F.linear(F.scaled_dot_product_attention(q, k, v, is_causal=True).reshape(b, t, -1), w_o)


@wrong("2.4", "merges the heads without swapping tokens and heads back")
def grouped_query_attention(x, w_q, w_k, w_v, w_o, num_heads, num_kv_heads):
    b, t, _ = x.shape
    q = F.linear(x, w_q).view(b, t, num_heads, -1).transpose(1, 2)
    k, v = (
        F.linear(x, w).view(b, t, num_kv_heads, -1).transpose(1, 2).repeat_interleave(num_heads // num_kv_heads, 1)
        for w in (w_k, w_v)
    )
    return F.linear(F.scaled_dot_product_attention(q, k, v, is_causal=True).reshape(b, t, -1), w_o)


@wrong("2.4", "attends between the heads of a token instead of between tokens")
def grouped_query_attention(x, w_q, w_k, w_v, w_o, num_heads, num_kv_heads):
    b, t, _ = x.shape
    q = F.linear(x, w_q).view(b, t, num_heads, -1)
    k, v = (
        F.linear(x, w).view(b, t, num_kv_heads, -1).repeat_interleave(num_heads // num_kv_heads, 2) for w in (w_k, w_v)
    )
    return F.linear(F.scaled_dot_product_attention(q, k, v, is_causal=True).reshape(b, t, -1), w_o)


@wrong("2.4", "forgets the output projection (shapes happen to fit when H·D is hidden)")
def grouped_query_attention(x, w_q, w_k, w_v, w_o, num_heads, num_kv_heads):
    out = _grouped(
        x,
        w_q,
        w_k,
        w_v,
        torch.eye(w_q.shape[0]),
        num_heads,
        num_kv_heads,
        lambda y, groups: y.repeat_interleave(groups, 1),
    )
    return out[..., : x.shape[-1]]


@wrong("2.4", "averages the query heads of a group, as if there were only H_kv")
def grouped_query_attention(x, w_q, w_k, w_v, w_o, num_heads, num_kv_heads):
    size, groups = w_q.shape[0] // num_heads, num_heads // num_kv_heads
    mean = w_q.view(num_kv_heads, groups, size, -1).mean(1, keepdim=True).expand(-1, groups, -1, -1).reshape(w_q.shape)
    return _grouped(x, mean, w_k, w_v, w_o, num_heads, num_kv_heads, lambda y, groups: y.repeat_interleave(groups, 1))


@alternative("2.4", "torch's enable_gqa")
def grouped_query_attention(x, w_q, w_k, w_v, w_o, num_heads, num_kv_heads):
    q, k, v = (
        F.linear(x, w).unflatten(-1, (n, -1)).transpose(1, 2)
        for w, n in ((w_q, num_heads), (w_k, num_kv_heads), (w_v, num_kv_heads))
    )
    return F.linear(
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2), w_o
    )


@alternative("2.4", "einsum with a dimension for the group, nothing copied")
def grouped_query_attention(x, w_q, w_k, w_v, w_o, num_heads, num_kv_heads):
    q = F.linear(x, w_q).unflatten(-1, (num_kv_heads, num_heads // num_kv_heads, -1))  # [B, T, H_kv, groups, D]
    k, v = (F.linear(x, w).unflatten(-1, (num_kv_heads, -1)) for w in (w_k, w_v))  # [B, S, H_kv, D]
    scores = torch.einsum("btkgd,bskd->bkgts", q, k) / q.shape[-1] ** 0.5
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    out = torch.einsum("bkgts,bskd->btkgd", scores.masked_fill(future, float("-inf")).softmax(-1), v)
    return F.linear(out.flatten(2), w_o)


# ---- 2.5 decoder layer -----------------------------------------------------------------------------------------------


def _norm(x, weight, eps):
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _mlp(h, w):
    return F.linear(F.silu(F.linear(h, w["gate_proj"])) * F.linear(h, w["up_proj"]), w["down_proj"])


@wrong("2.5", "post-norm: normalizes the stream itself, as in 2017")
def decoder_layer(x, weights, attend, eps=1e-5):
    x = _norm(x + attend(x), weights["input_layernorm"], eps)
    return _norm(x + _mlp(x, weights), weights["post_attention_layernorm"], eps)


@wrong("2.5", "the residual is taken after the norm")
def decoder_layer(x, weights, attend, eps=1e-5):
    x = _norm(x, weights["input_layernorm"], eps)
    x = x + attend(x)
    x = _norm(x, weights["post_attention_layernorm"], eps)
    return x + _mlp(x, weights)


@wrong("2.5", "attention and MLP in parallel: the MLP reads the stream before attention")
def decoder_layer(x, weights, attend, eps=1e-5):
    attended = attend(_norm(x, weights["input_layernorm"], eps))
    return x + attended + _mlp(_norm(x, weights["post_attention_layernorm"], eps), weights)


@wrong("2.5", "the silu sits on up instead of gate")
def decoder_layer(x, weights, attend, eps=1e-5):
    x = x + attend(_norm(x, weights["input_layernorm"], eps))
    h = _norm(x, weights["post_attention_layernorm"], eps)
    return x + F.linear(
        F.linear(h, weights["gate_proj"]) * F.silu(F.linear(h, weights["up_proj"])), weights["down_proj"]
    )


@wrong("2.5", "a sigmoid gate (GLU) instead of silu")
def decoder_layer(x, weights, attend, eps=1e-5):
    x = x + attend(_norm(x, weights["input_layernorm"], eps))
    h = _norm(x, weights["post_attention_layernorm"], eps)
    return x + F.linear(
        torch.sigmoid(F.linear(h, weights["gate_proj"])) * F.linear(h, weights["up_proj"]), weights["down_proj"]
    )


@wrong("2.5", "forgets the second residual")
def decoder_layer(x, weights, attend, eps=1e-5):
    x = x + attend(_norm(x, weights["input_layernorm"], eps))
    return _mlp(_norm(x, weights["post_attention_layernorm"], eps), weights)


@wrong("2.5", "swaps the two norms")
def decoder_layer(x, weights, attend, eps=1e-5):
    x = x + attend(_norm(x, weights["post_attention_layernorm"], eps))
    return x + _mlp(_norm(x, weights["input_layernorm"], eps), weights)


@wrong("2.5", "forgets the norm in front of the MLP")
def decoder_layer(x, weights, attend, eps=1e-5):
    x = x + attend(_norm(x, weights["input_layernorm"], eps))
    return x + _mlp(x, weights)


@wrong("2.5", "adds in place, into the caller's tensor")
def decoder_layer(x, weights, attend, eps=1e-5):
    x += attend(_norm(x, weights["input_layernorm"], eps))
    x += _mlp(_norm(x, weights["post_attention_layernorm"], eps), weights)
    return x


@alternative("2.5", "gate and up as one matrix product, as in minillm")
def decoder_layer(x, weights, attend, eps=1e-5):
    x = x + attend(_norm(x, weights["input_layernorm"], eps))
    fused = torch.cat((weights["gate_proj"], weights["up_proj"]))
    gate, up = F.linear(_norm(x, weights["post_attention_layernorm"], eps), fused).chunk(2, dim=-1)
    return x + (gate * torch.sigmoid(gate) * up) @ weights["down_proj"].T


# ---- 2.6 accounting --------------------------------------------------------------------------------------------------


def _account(c, tokens, **changed):
    """The right answer in parts, each of which a variant may replace."""
    q, kv = changed.get("q", c.num_attention_heads * c.head_dim), changed.get("kv", c.num_key_value_heads * c.head_dim)
    attention, mlp = c.hidden_size * 2 * (q + kv), changed.get("matrices", 3) * c.hidden_size * c.intermediate_size
    head, layers = c.vocab_size * c.hidden_size, c.num_hidden_layers
    embeddings = changed.get("embeddings", head if c.tie_word_embeddings else 2 * head)
    norms = changed.get("norms", (2 * layers + 1) * c.hidden_size)
    pairs = changed.get("pairs", tokens * (tokens + 1) // 2)
    flops = (
        2 * tokens * (layers * (attention + mlp) + changed.get("head", head))
        + 4 * layers * changed.get("score_size", q) * pairs
    )
    return {
        "parameters": embeddings + layers * (attention + mlp) + norms,
        "flops": flops,
        "kv_bytes": tokens * layers * 4 * changed.get("kv_cached", kv),
    }


@wrong("2.6", "counts a tied head as parameters of its own")
def account(config, tokens):
    return _account(config, tokens, embeddings=2 * config.vocab_size * config.hidden_size)


@wrong("2.6", "takes a tied head to cost no FLOPs")
def account(config, tokens):
    return _account(config, tokens, head=0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)


@wrong("2.6", "keys and values as wide as queries: multi-head attention")
def account(config, tokens):
    return _account(config, tokens, kv=config.num_attention_heads * config.head_dim)


@wrong("2.6", "the whole square of queries and keys, not the causal half")
def account(config, tokens):
    return _account(config, tokens, pairs=tokens**2)


@wrong("2.6", "the triangle without its diagonal")
def account(config, tokens):
    return _account(config, tokens, pairs=tokens * (tokens - 1) // 2)


@wrong("2.6", "an MLP of two matrices, as in GPT-2")
def account(config, tokens):
    return _account(config, tokens, matrices=2)


@wrong("2.6", "forgets the norm at the end")
def account(config, tokens):
    return _account(config, tokens, norms=2 * config.num_hidden_layers * config.hidden_size)


@wrong("2.6", "one FLOP for a multiply-add")
def account(config, tokens):
    result = _account(config, tokens)
    return result | {"flops": result["flops"] // 2}


@wrong("2.6", "takes the query heads to fill hidden exactly")
def account(config, tokens):
    return _account(config, tokens, q=config.hidden_size)


@wrong("2.6", "scores with the key/value heads only")
def account(config, tokens):
    return _account(config, tokens, score_size=config.num_key_value_heads * config.head_dim)


@wrong("2.6", "caches a key and a value for every query head")
def account(config, tokens):
    return _account(config, tokens, kv_cached=config.num_attention_heads * config.head_dim)


@alternative("2.6", "a list of matrices, and attention token by token")
def account(config, tokens):
    c, d = config, config.head_dim
    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
    layer = (
        [(heads * d, c.hidden_size), (c.hidden_size, heads * d)]
        + 2 * [(kv_heads * d, c.hidden_size)]
        + 3 * [(c.intermediate_size, c.hidden_size)]
    )
    in_layer = sum(rows * columns for rows, columns in layer)
    head = c.vocab_size * c.hidden_size
    parameters = (
        c.num_hidden_layers * (in_layer + 2 * c.hidden_size)
        + c.hidden_size
        + (1 if c.tie_word_embeddings else 2) * head
    )
    flops = sum(
        2 * (c.num_hidden_layers * in_layer + head) + c.num_hidden_layers * heads * (t + 1) * 4 * d
        for t in range(tokens)
    )
    return {
        "parameters": parameters,
        "flops": flops,
        "kv_bytes": sum(2 * kv_heads * d * 2 for _ in range(c.num_hidden_layers)) * tokens,
    }
