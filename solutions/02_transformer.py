# %% [markdown]
# # Exercises 2: the transformer
#
# Six pieces of [chapter 2](../chapters/02_transformer.md), in the order in which the
# [lab](../notebooks/02_transformer.ipynb) builds them. Each has a card, a stub and a `check`. Two hints stand below
# each, closed; open them when you are stuck for five minutes.
#
# Shapes: `B` sequences, `T` tokens, `H` query heads, `H_kv` key/value heads, `D` features a head, `hidden` = width of
# the residual stream.

# %%
import torch
import torch.nn.functional as F

from minillm.learn import check

# %% [markdown]
# ## Exercise 2.1: scaled dot-product attention with a mask
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | the weighted average at the center of everything | 2 of 5 | 15 | Vaswani et al., 2017, section 3.2.1 |
#
# Compute `softmax(q kᵀ / sqrt(D)) v` without `F.scaled_dot_product_attention`.
#
# - Every query row of `q` gets one weight for each key row of `k`. Its weights are positive and sum to 1.
# - `mask` is boolean: True means "may attend". A pair with False gets weight exactly 0, and the rest still sums to 1.
# - Any number of leading dimensions (batch, heads) must work.


# %%
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """q [..., T, D], k [..., S, D], v [..., S, D_v], mask bool, broadcastable to [..., T, S] -> [..., T, D_v]"""
    ### BEGIN SOLUTION
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5  # [..., T, S]
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ v  # [..., T, D_v]
    ### END SOLUTION


# %%
check("2.1", attention)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Three lines: scores, mask, weighted sum. `k.transpose(-2, -1)` swaps the last two dimensions whatever stands before
# them. Which dimension of `[..., T, S]` belongs to one query's choices?
# </details>
#
# <details><summary>Hint 2</summary>
#
# A weight of exactly 0 after the softmax needs a score of minus infinity before it, since exp(-inf) = 0:
# `scores.masked_fill(~mask, float("-inf"))`. Zeroing weights after the softmax leaves rows that no longer sum to 1.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** The dot product of two vectors with D independent entries of variance 1 has variance D. Divided by sqrt(D)
# it has variance 1 again, so the softmax starts soft at any head size. The mask goes in front of the softmax because
# the softmax normalizes over what it sees: a key that is removed afterwards has already taken its share. `-1e9`
# instead of `-inf` also works in fp32 but overflows in fp16; `-inf` is safe as long as no row is masked entirely
# (softmax of only `-inf` is 0/0; `NoCache.attend` lets padding attend to itself for this reason). Subtracting the
# row's maximum before `exp` is needed when you write the softmax by hand; `Tensor.softmax` does it.

# %% [markdown]
# ## Exercise 2.2: RMSNorm
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | the norm of every Llama-like model | 1 of 5 | 10 | Zhang and Sennrich, 2019 |
#
# Divide each vector of the last dimension by its root mean square, then scale each feature:
#
# `x / sqrt(mean(x²) + eps) · weight`
#
# `x` may be half precision. Compute the statistics in fp32 and return `x`'s own dtype: in fp16 the square of 300 is
# already infinite.


# %%
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """x [..., hidden], weight [hidden] -> [..., hidden], dtype of x"""
    ### BEGIN SOLUTION
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)  # [..., hidden] · [..., 1]
    return weight * x32.to(x.dtype)
    ### END SOLUTION


# %%
check("2.2", rms_norm)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `mean(-1, keepdim=True)` keeps a dimension of size 1, so that the division broadcasts over the features. No mean is
# subtracted: that would be LayerNorm.
# </details>
#
# <details><summary>Hint 2</summary>
#
# `x.float()` first, `.to(x.dtype)` last. `eps` stands under the root, beside the mean of squares.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** LayerNorm subtracts the mean and divides by the standard deviation. RMSNorm leaves the mean alone: one
# reduction instead of two, no bias, and the paper finds the same quality. The output does not change when `x` is
# scaled (up to `eps`), so a layer sees the direction of the residual stream and not its length, which grows from
# layer to layer. `torch.nn.functional.rms_norm` is another way. Whether the scaling by `weight` happens before or
# after the cast back differs by model (Llama: after; Gemma: before, with `1 + weight`); in half precision the last
# bit tells.

# %% [markdown]
# ## Exercise 2.3: rotary positions
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | turn queries and keys by their position | 3 of 5 | 20 | Su et al., 2021 |
#
# Split each head into two halves. Feature `i` of the first half and feature `i` of the second are one pair, a point
# in the plane: `D/2` pairs. Turn pair `i` counterclockwise by the angle `position · theta^(-2i/D)`, for i = 0 .. D/2
# - 1:
#
# - `first'  = first · cos - second · sin`
# - `second' = second · cos + first · sin`
#
# The same for every batch row and head. The contract that matters: the dot product of a turned query and a turned key
# depends on the two positions only through their difference.


# %%
def rope(x: torch.Tensor, positions: torch.Tensor, theta: float = 10_000.0) -> torch.Tensor:
    """x [B, T, H, D], positions [T] (any integers) -> [B, T, H, D]"""
    ### BEGIN SOLUTION
    exponents = torch.arange(0, x.shape[-1], 2, device=x.device).float() / x.shape[-1]  # [D/2]
    angles = torch.outer(positions.float(), theta**-exponents)  # [T, D/2]
    cos, sin = angles.cos()[:, None, :], angles.sin()[:, None, :]  # [T, 1, D/2]: the same for every head
    first, second = x.chunk(2, dim=-1)  # [B, T, H, D/2] each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)  # [B, T, H, D]
    ### END SOLUTION


# %%
check("2.3", rope)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `torch.outer(positions, frequencies)` gives the table of angles, `[T, D/2]`. It must meet `[B, T, H, D/2]`: where is
# a dimension missing?
# </details>
#
# <details><summary>Hint 2</summary>
#
# Frequencies: `theta ** -(torch.arange(0, D, 2) / D)`. Give cos and sin a heads dimension with `[:, None, :]`.
# Halves: `x.chunk(2, dim=-1)`; put them back together with `torch.cat`, first half first. Compute both new halves
# from the old ones.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** A rotation by angle a is multiplication with e^(ia). For a pair seen as one complex number, the real part
# of q·e^(i·m·f) times the conjugate of k·e^(i·n·f) is the real part of q·k̄·e^(i·(m-n)·f): only m - n is left. The
# paper pairs neighbors (0, 1), (2, 3), ...; Hugging Face checkpoints pair the halves (0, D/2), (1, D/2 + 1), .... The
# two differ by a fixed reordering of features that is absorbed in the rows of `q_proj` and `k_proj`, so either is
# right as long as weights and code agree. `fetch.py` undoes the reordering for GGUF files.

# %% [markdown]
# ## Exercise 2.4: grouped-query attention
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | project, split into heads, share keys and values, merge | 3 of 5 | 20 | Ainslie et al., 2023 |
#
# From the stream `x` to what attention adds to it, without positions:
#
# 1. project: `q = x · w_qᵀ`, `k = x · w_kᵀ`, `v = x · w_vᵀ` (weights as `nn.Linear` stores them: `[out, in]`);
# 2. split the features into heads of `D = w_q.shape[0] / num_heads`: head `h` is features `h·D .. (h+1)·D - 1`;
# 3. causal attention in every query head; query head `h` reads key/value head `h // (num_heads / num_kv_heads)`;
# 4. put the heads side by side again and project with `w_o`.
#
# `F.scaled_dot_product_attention(q, k, v, is_causal=True)` on `[B, heads, T, D]` is welcome; do the sharing yourself.


# %%
def grouped_query_attention(
    x: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    w_v: torch.Tensor,
    w_o: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> torch.Tensor:
    """x [B, T, hidden], w_q [H·D, hidden], w_k and w_v [H_kv·D, hidden], w_o [hidden, H·D] -> [B, T, hidden]"""

    ### BEGIN SOLUTION
    def heads(weight: torch.Tensor, count: int) -> torch.Tensor:
        return F.linear(x, weight).unflatten(-1, (count, -1)).transpose(1, 2)  # [B, count, T, D]

    groups = num_heads // num_kv_heads
    q = heads(w_q, num_heads)  # [B, H, T, D]
    k = heads(w_k, num_kv_heads).repeat_interleave(groups, dim=1)  # [B, H, T, D]
    v = heads(w_v, num_kv_heads).repeat_interleave(groups, dim=1)  # [B, H, T, D]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, H, T, D]
    return F.linear(out.transpose(1, 2).flatten(2), w_o)  # [B, T, H·D] -> [B, T, hidden]
    ### END SOLUTION


# %%
check("2.4", grouped_query_attention)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A `view` to `[B, heads, T, D]` mixes tokens and features. Go through `[B, T, heads, D]`, then swap two dimensions;
# swap them back before you merge.
# </details>
#
# <details><summary>Hint 2</summary>
#
# With 6 query and 2 key/value heads, query heads 0, 1, 2 read key head 0 and 3, 4, 5 read key head 1:
# `repeat_interleave`, not `repeat`.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Sharing keys and values shrinks what must be kept for every past token (the KV cache, chapter 6) by
# `num_heads / num_kv_heads`; queries are not kept, so they stay many. `repeat_interleave` copies and is only for
# clarity: `enable_gqa=True` (in `minillm/model/layers.py`), an `expand`, or a kernel that reads head `h // groups`
# (chapter 5) computes the same without the copies. With one key/value head this is multi-query attention (Shazeer,
# 2019), with as many as query heads it is multi-head attention.

# %% [markdown]
# ## Exercise 2.5: a decoder layer from its parts
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | norms, residual stream and SwiGLU wired as in Llama | 2 of 5 | 15 | Shazeer, 2020; Touvron et al., 2023 |
#
# Attention is given: `attend` maps `[B, T, hidden]` to `[B, T, hidden]`. Wire the rest:
#
# 1. the stream, plus attention of the normalized stream (weight `input_layernorm`);
# 2. that sum, plus SwiGLU of the normalized sum (weight `post_attention_layernorm`).
#
# SwiGLU: `down(silu(gate(h)) · up(h))` with matrices `gate_proj`, `up_proj`, `down_proj` as `nn.Linear` stores them.
# `F.rms_norm(x, (hidden,), weight, eps)` and `F.silu` are at hand.


# %%
def decoder_layer(x: torch.Tensor, weights: dict[str, torch.Tensor], attend, eps: float = 1e-5) -> torch.Tensor:
    """One layer around `attend`.  x [B, T, hidden] -> [B, T, hidden]

    weights: norms [hidden], gate_proj and up_proj [intermediate, hidden], down_proj [hidden, intermediate].
    """
    ### BEGIN SOLUTION
    hidden = x.shape[-1:]
    x = x + attend(F.rms_norm(x, hidden, weights["input_layernorm"], eps))
    h = F.rms_norm(x, hidden, weights["post_attention_layernorm"], eps)  # [B, T, hidden]
    gated = F.silu(F.linear(h, weights["gate_proj"])) * F.linear(h, weights["up_proj"])  # [B, T, intermediate]
    return x + F.linear(gated, weights["down_proj"])
    ### END SOLUTION


# %%
check("2.5", decoder_layer)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The stream itself is never normalized inside a layer: a norm stands in front of each sublayer, on a side road. What
# is the MLP's input: the stream before or after attention?
# </details>
#
# <details><summary>Hint 2</summary>
#
# `x = x + attend(norm(x))`, then `x + mlp(norm(x))` with the new `x`. In the MLP the silu sits on `gate`, and the
# product is elementwise.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** With the norm on the side road ("pre-norm") the stream is a plain sum: embedding + attention 0 + MLP 0 +
# attention 1 + .... Gradients reach every layer unscaled, so deep stacks train without tricks (Xiong et al., 2020,
# "On Layer Normalization in the Transformer Architecture"). The original transformer normalized the sum
# ("post-norm"). GPT-J and PaLM feed attention and MLP from the same norm, in parallel; Llama does one after the
# other. The gate decides, feature by feature, how much of `up` passes.

# %% [markdown]
# ## Exercise 2.6: count parameters, FLOPs and cache bytes
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | know what a model costs from its config alone | 3 of 5 | 25 | Kaplan et al., 2020, section 2.1 |
#
# Given a config, return a dictionary with three exact integers:
#
# - `"parameters"`: of a Llama model as in chapter 2 (no biases, two norms a layer and one at the end). A tied head
#   has no parameters of its own.
# - `"flops"`: of one forward over a prompt of `tokens` tokens, logits for every token. A multiply-add is 2 FLOPs.
#   Count the matrix products only: projections, MLP, head (tied or not), and in attention scores and weighted sum,
#   where the token at index t attends to t + 1 tokens. The embedding is a lookup.
# - `"kv_bytes"`: to keep keys and values of all `tokens` tokens in all layers, 2 bytes a number.
#
# The check passes an object that has these attributes and no others: `vocab_size`, `hidden_size`,
# `intermediate_size`, `num_hidden_layers`, `num_attention_heads`, `num_key_value_heads`, `head_dim`,
# `tie_word_embeddings`. `head_dim` need not be `hidden_size / num_attention_heads`.


# %%
def account(config, tokens: int) -> dict[str, int]:
    """{"parameters", "flops" of a forward over `tokens` tokens, "kv_bytes" of them in 16 bits}"""
    ### BEGIN SOLUTION
    hidden, layers = config.hidden_size, config.num_hidden_layers
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    attention = hidden * (2 * q_size + 2 * kv_size)  # q and o, k and v
    mlp = 3 * hidden * config.intermediate_size  # gate, up, down
    head = config.vocab_size * hidden
    embeddings = head if config.tie_word_embeddings else 2 * head
    pairs = tokens * (tokens + 1) // 2  # 1 + 2 + ... + tokens
    return {
        "parameters": embeddings + layers * (attention + mlp + 2 * hidden) + hidden,
        "flops": 2 * tokens * (layers * (attention + mlp) + head) + 4 * layers * q_size * pairs,
        "kv_bytes": tokens * layers * 2 * kv_size * 2,
    }
    ### END SOLUTION


# %%
check("2.6", account)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A matrix `[out, in]` has out · in parameters and costs 2 · out · in FLOPs a token. List a layer's matrices: four in
# attention (two of them narrow), three in the MLP.
# </details>
#
# <details><summary>Hint 2</summary>
#
# For one query and one key, scores cost 2 · D and the weighted sum 2 · D in each of the H query heads. Queries and
# keys meet 1 + 2 + ... + tokens times. Only key/value heads are cached: `H_kv · D` numbers each for keys and values.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Everything but attention over the context is a weight times a vector, so FLOPs are twice the parameters
# that are used as matrices: 2N a token. Only attention over the context grows with the length, and only with *query*
# heads: grouped-query attention saves memory, not FLOPs. Norm weights and the embedding lookup do not multiply
# matrices. `ModelConfig.parameters()`, `flops_per_token()` and `kv_bytes_per_token()` in `minillm/config.py` are the
# same sums by part; the lab checks them against SmolLM2's real tensors and against torch's `FlopCounterMode`.
