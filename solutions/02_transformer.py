# %% [markdown]
# # Exercises 2: the transformer
#
# Ten exercises on [chapter 2](../chapters/02_transformer.md) and its [lab](../notebooks/02_transformer.ipynb): three
# **warm-ups** of five minutes (2.w1 to 2.w3), the **core** (2.0, attention itself), and six steps **beyond** (2.1 to
# 2.6; 2.3, 2.5 and 2.6 are optional), which neither chapter nor lab shows in this form.
#
# Run the next cell, then take the exercises in any order. Replace `raise NotImplementedError(...)` by your code and
# run the `check` cell under it: it says which contracts hold, and on a failure what was expected and what came.
#
# Shapes: `B` sequences, `T` query tokens, `S` key tokens, `H` query heads, `H_kv` key/value heads, `D` features a
# head, `d_model` features of a token. In all exercises tensors need not be contiguous (a part of a cache is not), and
# inputs stay as they are. Tensors that one exercise is given have one floating-point dtype, and its results have that
# dtype, unless it says otherwise.

# %%
from collections.abc import Callable

import torch
import torch.nn.functional as F

from minillm.learn import check

# %% [markdown]
# ## Exercise 2.w1: what sixteen bits hold
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: where fp16 overflows and bf16 rounds | 1 of 5 | 5 | Micikevicius et al., 2018 |
#
# Models are served in 16 bits. fp16 has a small range (it ends at 65,504), bf16 has few digits (8 bits of precision).
# Say what `300 * 300` is in fp16 and what `257` is in bf16 before you go on; chapter 2's norm and its positions stumble
# over these two.
#
# Return whether the product of two integers comes out exactly when both factors are stored in `dtype`, and their
# product is computed and stored in it.


# %%
def is_exact(a: int, b: int, dtype: torch.dtype) -> bool:
    """Whether a · b in `dtype` is the true product."""
    ### BEGIN SOLUTION
    product = torch.tensor(a).to(dtype) * torch.tensor(b).to(dtype)
    return product.double().item() == a * b
    ### END SOLUTION


# %%
check("2.w1", is_exact)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `torch.tensor(257).to(torch.bfloat16)` shows what is stored. What is stored for 90,000 in fp16?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Multiply two tensors of the dtype, turn the product into a Python number with `.item()`, and compare it with Python's
# own product.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** 300 · 300 is infinite in fp16, and 257 is 256 in bf16: with 8 bits of precision the integers from 256 on go
# by steps of 2. So RMSNorm squares in fp32 (exercise 2.2), and a position must not become bf16 before it is an angle
# (exercise 2.3). Another way is arithmetic on bits: a product is exact if its odd part has at most as many bits as
# the dtype's precision (11 for fp16) and it does not overflow.

# %% [markdown]
# ## Exercise 2.w2: which dimensions are missing?
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: line a mask up with the scores of all heads | 1 of 5 | 5 | Vaswani et al., 2017, section 3.2.3 |
#
# Scores are `[B, H, T, S]`. `real` `[B, S]` is True where a token is text and False where it is padding. Return a
# boolean mask that broadcasts against the scores, of shape `[B, 1, T, S]` with `T = S`: query `t` of sequence `b`
# may see key `s` if `s <= t` **and** key `s` is text.


# %%
def visible(real: torch.Tensor) -> torch.Tensor:
    """real bool [B, S] -> bool [B, 1, S, S], True where a query may see a key"""
    ### BEGIN SOLUTION
    size = real.shape[-1]
    causal = torch.ones(size, size, dtype=torch.bool, device=real.device).tril()  # [T, S]
    return causal & real[:, None, None, :]  # [B, 1, T, S]
    ### END SOLUTION


# %%
check("2.w2", visible)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Broadcasting lines shapes up at their right ends. Write `[T, S]` and `[B, ?, ?, S]` under each other: which
# dimensions of size 1 must `real` get, and where?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `x[:, None, None, :]`, or `unsqueeze` twice, puts two dimensions of size 1 behind the first. `tril` keeps the lower
# triangle, and `&` is "and".
# </details>

# %% [markdown] tags=["solution"]
# **Why.** A row of the mask is a query, a column a key. Padding hides *keys*, so it varies along the last dimension;
# put one place further left (`real[:, None, :, None]`) it would hide queries, with the same shape. The 1 in front of
# `T` serves all heads without a copy. A query that is padding itself may see nothing at all: exercise 2.1 says what
# then. Another way is arithmetic on `arange`: `s <= t` with one of the two a column.

# %% [markdown]
# ## Exercise 2.w3: six heads in two groups
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: split a dimension in two, the right one first | 1 of 5 | 5 | Ainslie et al., 2023 |
#
# With grouped queries, query head `h` reads key/value head `h // (H / H_kv)`: of six query heads and two key/value
# heads, heads 0, 1, 2 read head 0, and 3, 4, 5 read head 1. Return `q` with its head dimension split in two, so that
# `result[:, i]` holds the query heads that read key/value head `i`, in their order. Try both orders of the two sizes
# on `torch.arange(6)` first.


# %%
def group_heads(q: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """q [B, H, T, D] -> [B, H_kv, H / H_kv, T, D]"""
    ### BEGIN SOLUTION
    return q.unflatten(1, (kv_heads, -1))
    ### END SOLUTION


# %%
check("2.w3", group_heads)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Splitting a dimension counts like an odometer: the last of the new dimensions runs fastest. Heads 0 and 1 stand side
# by side in a group, so which of the two sizes comes last?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `torch.arange(6).unflatten(0, (2, 3))` is `[[0, 1, 2], [3, 4, 5]]`. One of the sizes may be -1: torch works it out.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** `(3, 2)` and a transposition give `[[0, 2, 4], [1, 3, 5]]`, the same shape: then query head 1 reads another
# group's keys, no error is raised, and the text is nonsense. `repeat_interleave` and `repeat` differ in the same way.
# Another way is `q.chunk(kv_heads, dim=1)` and a `stack`, which copies.

# %% [markdown]
# ## Exercise 2.0: causal self-attention
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | core: from the tokens' vectors to what attention adds to them | 2 of 5 | 25 | Vaswani et al., 2017, section 3.2 |
#
# Write multi-head attention whole, from this page, without `F.scaled_dot_product_attention` and without
# `nn.MultiheadAttention`.
#
# 1. Queries, keys and values: `x` times each matrix, as `F.linear` does it: `x W^T`. `w_q`, `w_k`, `w_v` are
#    `[H · D, d_model]`; `H · D` need not be `d_model`.
# 2. Split into `heads` heads: features 0 to D - 1 are head 0, the next D are head 1.
# 3. In each head: scores `q k^T / sqrt(D)`. Token `t` sees tokens 0 to `t`: later ones get the weight 0, however large
#    their scores are, and the weights of the others add up to 1.
# 4. The weighted sum of values; the heads side by side again, in their order; times `w_o` `[d_model, H · D]`.
#
# No positions, no bias.


# %%
def self_attention(
    x: torch.Tensor, w_q: torch.Tensor, w_k: torch.Tensor, w_v: torch.Tensor, w_o: torch.Tensor, heads: int
) -> torch.Tensor:
    """x [B, T, d_model], w_q, w_k, w_v [H · D, d_model], w_o [d_model, H · D] -> [B, T, d_model]"""
    ### BEGIN SOLUTION
    q, k, v = (F.linear(x, w).unflatten(-1, (heads, -1)).transpose(1, 2) for w in (w_q, w_k, w_v))  # [B, H, T, D]
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5  # [B, H, T, T]
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)  # [T, T]
    weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
    return F.linear((weights @ v).transpose(1, 2).flatten(2), w_o)
    ### END SOLUTION


# %%
check("2.0", self_attention)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A head is a dimension: `[B, T, H · D]` becomes `[B, T, H, D]`, then `[B, H, T, D]`. Then the matrix products and the
# softmax do all heads of all sequences at once. On the way back the same two steps, the other way round.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `unflatten(-1, (heads, -1))`, `transpose(1, 2)`, and at the end `transpose(1, 2)`, `flatten(2)`. The mask comes
# *before* the softmax: `masked_fill(future, float("-inf"))`, with `triu(1)` for what lies above the diagonal.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Each step is the chapter's formula; what goes wrong is the order of dimensions. `view(B, heads, T, D)` on
# `[B, T, H · D]` has the right shape and mixes tokens with features; `reshape` without the `transpose` on the way back
# mixes heads with tokens. A last token that changes earlier outputs shows both. A mask behind the softmax leaves rows
# that add up to less than 1; a mask of -10,000 lets a future key in as soon as visible scores lie below that.
# Other ways: `einsum("bthd,bshd->bhts", q, k)` without transpositions, or a loop over heads, slices of D features
# each, which is where the word comes from.

# %% [markdown]
# ## Exercise 2.1: attention with a mask and a window
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: attention that survives padding, at any size of the scores | 3 of 5 | 25 | Beltagy et al., 2020, 3.1 |
#
# Compute `softmax(q kᵀ / sqrt(D)) v` without `F.scaled_dot_product_attention`, where some pairs are hidden:
#
# - `mask` is boolean: True means "may attend". Masked weights are exactly 0, whatever the scores are (1e10, or -1e10
#   where all visible scores of a row are as low), and the others of the row still sum to 1.
# - `window`, if it is not 0: query t sees only the last `window` keys up to its own, t - window + 1 .. t (then
#   S = T). A pair must be allowed by the mask **and** by the window.
# - A row that may see nothing gives 0, not NaN. Such rows are padding: nobody reads them, but a NaN spreads.
# - Any number of leading dimensions (batch, heads) must work, and every mask that broadcasts to `[..., T, S]`, such as
#   `[S]`, `[T, 1]` or `[B, 1, 1, S]`.
# - The output has the dtype of `q`, `k` and `v`, which is one: fp32, fp64 or bf16.


# %%
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, window: int = 0
) -> torch.Tensor:
    """q [..., T, D], k [..., S, D], v [..., S, D_v], mask bool, broadcastable to [..., T, S] -> [..., T, D_v]"""
    ### BEGIN SOLUTION
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5  # [..., T, S]
    hidden = torch.zeros(scores.shape[-2:], dtype=torch.bool, device=q.device)  # [T, S]
    if window:
        back = torch.arange(q.shape[-2], device=q.device)[:, None] - torch.arange(k.shape[-2], device=q.device)
        hidden = (back < 0) | (back >= window)
    if mask is not None:
        hidden = hidden | ~mask  # [..., T, S]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)  # an empty row is NaN here
    return weights.masked_fill(hidden, 0.0) @ v  # [..., T, D_v]
    ### END SOLUTION


# %%
check("2.1", attention)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Bring mask and window into one boolean tensor first. For the window you need t - s for every pair: two `arange`s,
# one of them a column.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# A constant such as -1e9 is no minus infinity: in an empty row every score would be the same constant, and the
# softmax would spread the weight evenly. So use the real one, and ask what 0/0 leaves behind, in which rows, and
# which entries of these rows your boolean tensor marks.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** If the entries of q and k are independent with mean 0 and variance 1, their dot product has variance D;
# divided by sqrt(D) it has variance 1 again, so the softmax starts soft at any head size. The mask goes in front of
# the softmax, because a key that is removed afterwards has already taken its share, and a very large masked score
# takes all of it: dividing by the rest then is 0/0. A fill of -100 hides only from rows whose scores are well above
# it.
#
# Softmax of -inf alone is 0/0 = NaN, with `Tensor.softmax` as by hand (-inf minus a maximum of -inf). Torch 2.13's
# fused kernel on a CPU gives 0 for such a row; other kernels and versions differ, so `NoCacheLayer` lets padding
# attend to itself. The other way is a softmax by hand: take from each row its own maximum over the *visible*
# scores, exponentiate, set hidden entries to 0, and divide by the sum where it is not 0. Kernels do this block by
# block (chapter 5), and skip blocks that lie outside the window: with `window` W the work grows as T · W, not T².

# %% [markdown]
# ## Exercise 2.2: residual sum and RMSNorm in one
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: the norm as engines call it, in half precision | 3 of 5 | 20 | Zhang and Sennrich, 2019 |
#
# Between two sublayers stand a sum and a norm. Engines do both in one kernel, which reads and writes the stream
# once:
#
# 1. `new_residual = x + residual`, in the dtype of `x`: the stream, handed on to the next sum;
# 2. `normed = new_residual / sqrt(mean(new_residual²) + eps) · weight`, in the dtype of `x`: the next sublayer's
#    input.
#
# All three tensors have one dtype, which may be fp16 or bf16. Then square, mean, root and quotient are computed in
# fp32 all the same, and they start from the **rounded** sum: norm and stream must not speak of different numbers. The
# quotient is rounded to the dtype once, before or after it is multiplied by `weight`.
# Write it out, without `F.rms_norm`, and return two new tensors, none of which shares memory with an input or the
# other (a real kernel overwrites its inputs). A batch may be empty.


# %%
def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and residual [..., d_model], weight [d_model], one dtype -> (normed, new_residual), both like x"""
    ### BEGIN SOLUTION
    new_residual = x + residual
    stream = new_residual.float()
    scaled = stream * torch.rsqrt(stream.pow(2).mean(-1, keepdim=True) + eps)  # [..., d_model] · [..., 1]
    return weight * scaled.to(x.dtype), new_residual
    ### END SOLUTION


# %%
check("2.2", add_rms_norm)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Take the two outputs apart: the stream never leaves its own dtype, the statistic never leaves fp32. No mean is
# subtracted: that would be LayerNorm.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# There are two roundings to half precision, and the order decides: which one comes before the square, which one
# after the quotient? `x.float() + residual.float()` has not been rounded yet.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** RMSNorm leaves the mean alone: one reduction instead of LayerNorm's two, no bias, and the paper finds the
# same quality. One entry of SmolLM2's stream reaches 22,550 (chapter 2, "What heads do"). Its square, 5.1 · 10⁸,
# does not fit into fp16, which ends at 65,504: the mean is infinite, the whole vector becomes 0. In bf16 it fits,
# but mean and root keep 8 bits each, and every feature is off by the same factor, up to 0.4 % a rounding.
#
# Why the rounded sum? It is what memory holds: whoever reads the stream later (the next sum, a second GPU, a
# recomputation) sees these numbers. vLLM's CUDA kernel `fused_add_rms_norm` does the same. Another way is
# `F.rms_norm(x + residual, (d_model,), weight, eps)`, which also computes in fp32. Whether the scaling by `weight`
# happens before or after the cast back differs by model (Llama: after; Gemma: before, with `1 + weight`); in half
# precision the last bit tells, and the checks accept both.

# %% [markdown]
# ## Exercise 2.3: partial rotary positions
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond (optional): rotate some features of a head by the token's position | 3 of 5 | 25 | Su et al., 2021 |
#
# Chapter and lab rotate whole heads. GPT-NeoX rotates only the first quarter of each head, and other models follow:
# what is not rotated can match content whatever the distance.
#
# Only the first `rotary` features of each head rotate (even, 2 <= rotary <= D); the rest pass through. Pairs are
# halves of the rotated part: feature `i` with feature `i + rotary/2`, for i = 0 .. rotary/2 - 1. Pair `i` rotates
# counterclockwise by the angle `position · theta^(-2i/rotary)`:
#
# - `first'  = first · cos - second · sin`
# - `second' = second · cos + first · sin`
#
# `positions` are integers of shape `[..., T]`, also negative ones; its leading dimensions broadcast against those
# of `x` (`[T]` for all sequences alike, `[B, T]` for sequences of different offsets). Every head of a token
# rotates alike. Compute angles in fp32 or better (fp32 is good enough for fp64, too), and return a new tensor in the
# dtype of `x`.


# %%
def rope(x: torch.Tensor, positions: torch.Tensor, rotary: int, theta: float = 10_000.0) -> torch.Tensor:
    """x [..., T, H, D], positions [..., T] integers, rotary even -> like x"""
    ### BEGIN SOLUTION
    half = rotary // 2
    frequencies = theta ** (-2 / rotary * torch.arange(half, device=x.device))  # [rotary/2]
    angles = positions.float()[..., None, None] * frequencies  # [..., T, 1, rotary/2]: the same for every head
    cos, sin = angles.cos(), angles.sin()
    first, second, rest = x.split((half, half, x.shape[-1] - rotary), dim=-1)
    rotated = first * cos - second * sin, second * cos + first * sin  # [..., T, H, rotary/2] each
    return torch.cat((*rotated, rest), dim=-1).to(x.dtype)  # [..., T, H, D]
    ### END SOLUTION


# %%
check("2.3", rope)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `torch.outer` takes vectors only. Multiply by broadcasting: positions `[..., T]` must meet
# `[..., T, H, rotary/2]`, so two dimensions are missing at their end.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# bf16 has 8 bits: which integers above 256 does it know? So when may `x`'s dtype enter, and what is the dtype of a
# product of bf16 and fp32? For the features that pass through, `split` takes a tuple of sizes, and a size may be 0.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** A rotation by angle a is multiplication with $e^{\mathrm{i}a}$; in the score only the difference of the
# two angles is left, and it does not matter whether positions start at 0, at -5 or at 1,000. Features that pass
# through add a part that knows no distance at all. GPT-NeoX-20B rotates 25 % of each head (Black et al., 2022); in a
# config this is `partial_rotary_factor`. The exponent runs over the rotated part, so that the slowest pair is
# nearly as slow as in a full head.
#
# Other ways: complex numbers (`torch.view_as_complex`, `torch.polar`); or Hugging Face's
# `x · cos + rotate_half(x) · sin` with doubled tables. The paper pairs neighbors (0, 1), (2, 3), ...; Hugging
# Face's checkpoints pair halves. The two differ by a reordering of rows of `q_proj` and `k_proj`, so either is
# right as long as weights and code agree. Engines look cos and sin up in a table by position, as
# `Transformer.forward` does.

# %% [markdown]
# ## Exercise 2.4: grouped-query attention without copies
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: share keys and values between query heads, and read them once | 4 of 5 | 30 | Ainslie et al., 2023 |
#
# The lab repeats keys and values until every query head has its own. That is right, and it gives back what sharing
# saved: the copy is as large as the cache of multi-head attention. Do without:
#
# - query head h reads key/value head `h // (H / H_kv)`;
# - the T queries belong to the **last** T of the S tokens, as when a cache holds the earlier ones: query t sees
#   keys 0 .. S - T + t. With T = S that is plain causal attention, with T = 1 a decode step;
# - keys after that have the weight 0, whatever the scores are, those of -40,000 among the visible ones included;
# - no tensor on the way may hold a key or value more than once: group the queries instead. Not only
#   `repeat_interleave` and an indexed `k[:, heads]` copy; a `@` that broadcasts over a dimension of size 1 lays the
#   repeated matrix out in memory too;
# - the output has the dtype of `q`, `k` and `v`: fp32, fp64 or bf16;
# - write it out, without `F.scaled_dot_product_attention`.


# %%
def grouped_query_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [B, H, T, D], k and v [B, H_kv, S, D], T <= S -> [B, H, T, D]"""
    ### BEGIN SOLUTION
    tokens, keys = q.shape[2], k.shape[2]
    grouped = q.unflatten(1, (k.shape[1], -1))  # [B, H_kv, H / H_kv, T, D]
    scores = grouped.flatten(2, 3) @ k.transpose(-2, -1) / q.shape[-1] ** 0.5  # [B, H_kv, H / H_kv · T, S]
    future = torch.ones(tokens, keys, dtype=torch.bool, device=q.device).triu(keys - tokens + 1)  # [T, S]
    scores = scores.unflatten(2, (-1, tokens)).masked_fill(future, float("-inf"))  # [B, H_kv, H / H_kv, T, S]
    out = scores.softmax(dim=-1).flatten(2, 3) @ v  # [B, H_kv, H / H_kv · T, D]
    return out.reshape(q.shape)  # [B, H, T, D]
    ### END SOLUTION


# %%
check("2.4", grouped_query_attention)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# For one key/value head, the queries of its whole group, all heads and all tokens, are just rows that meet the same
# keys. `unflatten` splits the head dimension in two: which of the two sizes comes first?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# A matrix product does not care which head a row came from, but the mask does: give the scores their group and
# token dimensions back before you hide anything. In the mask, what is the first key that query 0 must not see?
# `triu` takes the number of a diagonal.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Sharing keys and values shrinks what must be kept for every past token (the KV cache, chapter 6) by
# `H / H_kv`; queries are not kept, so they stay many. A decode step reads the whole cache for one token, so its
# time is the bytes it reads; a copy for each query head would read them once and write and read them `H / H_kv`
# times more. With the group folded into the rows, a matrix times a vector becomes a matrix times a thin matrix:
# `H / H_kv` times the arithmetic for each byte read. Decode kernels (chapter 5) fold the same way.
#
# Another way is `torch.einsum("bkgtd,bksd->bkgts", ...)`, which folds by itself, a loop over query heads with views
# of `k`, or `enable_gqa=True` of torch's fused function (in `minillm/model/layers.py`). With one key/value head
# this is multi-query attention (Shazeer, 2019), with as many as query heads it is multi-head attention.

# %% [markdown]
# ## Exercise 2.5: a decoder layer, sequential and parallel
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond (optional): norms, stream and SwiGLU wired in two ways | 2 of 5 | 20 | Shazeer, 2020; Black et al., 2022 |
#
# Attention is given: `attend` maps `[B, T, d_model]` to `[B, T, d_model]`; call it once, and leave what it returns as
# it is (a cache may keep it). Wire the rest, in two forms.
# `norm1` has the weight `input_layernorm`, `norm2` the weight `post_attention_layernorm`:
#
# - sequential (Llama): `x` becomes `x + attend(norm1(x))`, then the result `x` becomes `x + mlp(norm2(x))`;
# - parallel: `x + attend(norm1(x)) + mlp(norm2(x))`, where both branches read the same `x`. GPT-NeoX has this form;
#   GPT-J and PaLM also share one norm between the branches.
#
# `mlp` is SwiGLU: `down(silu(gate(h)) · up(h))` with matrices `gate_proj`, `up_proj`, `down_proj` as `nn.Linear`
# stores them. `F.rms_norm(x, (d_model,), weight, eps)` and `F.silu` are at hand.


# %%
def decoder_layer(
    x: torch.Tensor,
    weights: dict[str, torch.Tensor],
    attend: Callable[[torch.Tensor], torch.Tensor],
    parallel: bool,
    eps: float = 1e-5,
) -> torch.Tensor:
    """One layer around `attend`.  x [B, T, d_model] -> [B, T, d_model]

    weights: norms [d_model], gate_proj and up_proj [F, d_model], down_proj [d_model, F], F the inner size of the MLP.
    """
    ### BEGIN SOLUTION
    size = x.shape[-1:]
    middle = x + attend(F.rms_norm(x, size, weights["input_layernorm"], eps))
    h = F.rms_norm(x if parallel else middle, size, weights["post_attention_layernorm"], eps)  # [B, T, d_model]
    gated = F.silu(F.linear(h, weights["gate_proj"])) * F.linear(h, weights["up_proj"])  # [B, T, F]
    return middle + F.linear(gated, weights["down_proj"])
    ### END SOLUTION


# %%
check("2.5", decoder_layer)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The stream itself is never normalized inside a layer: a norm stands in front of each sublayer, on a side road.
# Draw both forms; they differ in one arrow.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Set the MLP to 0: do the two forms still differ? So which line needs to know `parallel`? And mind `x += ...`: it
# writes into the caller's tensor.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** With the norm on the side road ("pre-norm") the stream is a plain sum: embedding + attention 0 + MLP 0 +
# attention 1 + .... Gradients have a direct path to every layer, so deep stacks need less care with learning rate
# and warm-up than with the original transformer's norm on the sum ("post-norm"; Xiong et al., 2020, "On Layer
# Normalization in the Transformer Architecture").
#
# In the parallel form neither branch waits for the other: the matrices that read the norm can be joined in one
# product (with a shared norm), and in tensor parallelism one all-reduce a layer is enough instead of two. PaLM
# reports training about 15 % faster, with a small loss of quality at 8B and none at 62B (Chowdhery et al., 2022).
# The weights of one form are useless in the other. Another way to write SwiGLU is one matrix for gate and up, as
# `minillm`'s `MLP` has it.

# %% [markdown]
# ## Exercise 2.6: what a prompt and a decode step cost
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond (optional): FLOPs, bytes and a floor in seconds from the config | 3 of 5 | 35 | Pope et al., 2023, 2 |
#
# Return a dictionary with four entries. The first three are exact integers, of type `int`, for any number of tokens (a
# float is exact up to 2⁵³ only), and depend on the config and `tokens` alone; the last does not depend on `tokens`:
#
# - `"parameters"`: of a Llama model as in chapter 2 (no biases, two norms a layer and one at the end). A tied head
#   has no parameters of its own.
# - `"flops"`: of one forward over a prompt of `tokens` tokens, with logits for the **last** token only. A
#   multiply-add is 2 FLOPs. Count the matrix products: projections, MLP, head (tied or not), and in attention
#   scores and weighted sum, where the token at index t attends to t + 1 tokens. The embedding is a lookup.
# - `"kv_bytes"`: to keep keys and values of these `tokens` tokens in all layers, 2 bytes a number.
# - `"step_seconds"`: a floor for one decode step of `batch` sequences. Each has one new token, which attends to
#   `context` tokens (itself included) and needs logits. Nothing is faster than its memory or its arithmetic: the
#   larger of bytes / `bandwidth` and FLOPs / `rate`. Bytes: all parameters once, 2 bytes each, and the cache of
#   `batch` · `context` tokens.
#
# The check passes an object that has these attributes and no others: `vocab_size`, `hidden_size`,
# `intermediate_size`, `num_hidden_layers`, `num_attention_heads`, `num_key_value_heads`, `head_dim`,
# `tie_word_embeddings`. `head_dim` need not be `hidden_size / num_attention_heads`.


# %%
def account(config, tokens: int, batch: int, context: int, bandwidth: float, rate: float) -> dict[str, int | float]:
    """{"parameters", "flops", "kv_bytes", "step_seconds"}; bandwidth in bytes a second, rate in FLOPs a second"""
    ### BEGIN SOLUTION
    hidden, layers = config.hidden_size, config.num_hidden_layers
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    matrices = layers * hidden * (2 * q_size + 2 * kv_size + 3 * config.intermediate_size)  # q, o, k, v; gate, up, down
    head = config.vocab_size * hidden
    parameters = (1 if config.tie_word_embeddings else 2) * head + matrices + (2 * layers + 1) * hidden
    kv_bytes = layers * 2 * kv_size * 2  # of one token

    def flops(rows: int, seen: int, logits: int) -> int:  # `seen`: keys that the queries see, all added up
        return 2 * rows * matrices + 4 * layers * q_size * seen + 2 * logits * head

    step_bytes = 2 * parameters + batch * context * kv_bytes
    return {
        "parameters": parameters,
        "flops": flops(tokens, tokens * (tokens + 1) // 2, 1),
        "kv_bytes": tokens * kv_bytes,
        "step_seconds": max(step_bytes / bandwidth, flops(batch, batch * context, batch) / rate),
    }
    ### END SOLUTION


# %%
check("2.6", account)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A matrix `[out, in]` has out · in parameters and costs 2 · out · in FLOPs for every token that passes. List a
# layer's matrices: four in attention (two of them narrow), three in the MLP. Which tokens pass the head?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Prompt and decode step are one formula with three numbers: tokens that pass the layers, pairs of a query and a key
# it sees, tokens that pass the head. What are the three for each? For one pair, every query head does one product
# over `D` for the score and one for the weighted sum. `/` makes a float even of whole numbers.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** All but attention over the context is a weight times a vector: FLOPs are twice the parameters that are
# used as matrices. Only attention over the context grows with the length, and only with *query* heads:
# grouped-query attention saves bytes, not FLOPs. Serving computes the last token's logits only: the others would
# predict tokens that the prompt already has. SmolLM2's head is a fifth of a token's FLOPs at short context, so this
# saves nearly a fifth of a prompt. Training needs all logits.
#
# At batch 1 the weights decide: 2 bytes read for 2 FLOPs, where hardware offers hundreds of FLOPs a byte. A larger
# batch reads the weights once for all its tokens and is nearly free until arithmetic takes over; its caches are not
# shared, and at long context they outweigh the weights (chapter 8 builds on both). The floor is a little high for
# an untied model, whose embedding table counts here although a step reads only `batch` of its rows: 7 % for Llama 3
# 8B.
#
# Another way is to list all tensors and products and add up, as the check does. `ModelConfig` in
# `minillm/config.py` has the same sums by part; the lab holds them against SmolLM2's real tensors and torch's
# `FlopCounterMode`.
