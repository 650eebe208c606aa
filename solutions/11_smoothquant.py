# %% [markdown]
# # Exercises 11: SmoothQuant
#
# Eight exercises on [chapter 11](../chapters/11_smoothquant.md) and its [lab](../notebooks/11_smoothquant.ipynb): two
# **warm-ups** of five minutes (11.1 and 11.2), the **core** (11.3 and 11.4), and four steps **beyond** (11.5 to 11.8,
# optional), which neither chapter nor lab shows in this form.
#
# Run the next cell, then take the exercises in any order. Replace `raise NotImplementedError(...)` by your code and
# run the `check` cell under it: it says which contracts hold, and on a failure what was expected and what came.
#
# Conventions, in all of them: integers are **signed and symmetric**, without zero points. Numbers that share a scale
# have `scale = largest |x| / 127.5`, half of the 255 steps between -128 and 127 (7.5 for 4 bits), and are stored as
# `clamp(round(x / scale), -128, 127)`. Ties go to the even integer. A weight W is [N, K], a token's activations are a
# row x [K], and y = x Wᵀ. Products of 8-bit numbers that are to be fast need one scale a row of x and one a row of W.
#
# Without a GPU, exercise 11.5 runs in Triton's interpreter. The variable that turns it on is read when Triton is
# imported: that is why it stands above the imports.

# %%
import os
from collections.abc import Iterable

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from minillm.kernels.common import tl, triton
from minillm.learn import check

# %% [markdown]
# ## Exercise 11.1: which scale a token gets
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: one outlier, three ways to choose scales | 1 of 5 | 5 | Dettmers et al., 2022, 2 |
#
# Take a pencil. Two tokens, four channels, 8 bits:
#
# $$X = \begin{pmatrix} 51 & 2 & -1 & 0.4 \\ 2.55 & 1.1 & 0.3 & -0.06 \end{pmatrix}$$
#
# 1. Each token gets a scale as it comes. Which two?
# 2. Which one does the whole tensor get, if all share it?
# 3. What is the **second** token read back as, with its own scale?
# 4. And with the tensor's?
# 5. *Static* scales were made beforehand, from text in which the largest number was 25.5. All tokens share that one.
#    What is the 51 read back as?
#
# Return the five answers: `([two scales], scale, [four numbers], [four numbers], one number)`.


# %%
def which_scale() -> tuple[list[float], float, list[float], list[float], float]:
    """(scale of each token, scale of the tensor, token 2 by its own, token 2 by the tensor's, 51 by the static one)"""
    ### BEGIN SOLUTION
    return [0.4, 0.02], 0.4, [2.54, 1.1, 0.3, -0.06], [2.4, 1.2, 0.4, 0.0], 25.4
    ### END SOLUTION


# %%
check("11.1", which_scale)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A scale is the largest size among the numbers that share it, over 127.5. 51 / 127.5 = 0.4.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Divide by the scale, round, cut to -128 ... 127, multiply by the scale. 2.55 / 0.02 is 127.5: it rounds to 128, which
# 8 bits do not have. And 51 is 255 static scales.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** By its own scale the second token loses at most half of 0.02. By the tensor's, which the *first* token set,
# its smallest number is gone and the third is a third too large: tokens pay for a neighbor. The static scale cuts the
# outlier to half of its size, and the outlier is what the model relies on. A scale for each token costs a maximum over
# each row, which is fused into the norm before it; that is why all serving engines have it.
#
# What no scale of a row can do: help the small *channels* of a token that has a large one. The first token's 0.4 is one
# step. That is what the rest of the chapter is for.

# %% [markdown]
# ## Exercise 11.2: two channels
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: migrate by hand | 1 of 5 | 5 | Xiao et al., 2023, 4 |
#
# A norm's output, two tokens and two channels, and the layer that reads it:
#
# $$X = \begin{pmatrix} -16 & 1 \\ 8 & 0.5 \end{pmatrix}, \qquad
# W = \begin{pmatrix} 0.25 & -1 \\ -0.125 & 0.5 \end{pmatrix}, \qquad
# s_j = \frac{(\max_i |X_{ij}|)^\alpha}{(\max_i |W_{ij}|)^{1-\alpha}}$$
#
# 1. What are s₁ and s₂ with α = 0.5?
# 2. X is divided by s, channel by channel. What is then the largest size in each of its channels?
# 3. W is multiplied by s. What is the largest size in each of its columns?
# 4. What is y = x Wᵀ for the first token, afterwards?
# 5. Before all this the norm's weight was (2, 0.5). What must it be now?
# 6. What are s₁ and s₂ with α = 1?
#
# Return the six pairs, each a list of two numbers.


# %%
def migrate() -> tuple[list[float], ...]:
    """(s, largest sizes of X, of W, y of the first token, the norm's weight, s with alpha 1)"""
    ### BEGIN SOLUTION
    return [8.0, 1.0], [2.0, 1.0], [2.0, 1.0], [-5.0, 2.5], [0.25, 0.5], [16.0, 1.0]
    ### END SOLUTION


# %%
check("11.2", migrate)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The largest sizes are (16, 1) in X's channels and (0.25, 1) in W's columns. A root is a power of a half.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# √(16 / 0.25) = 8. The division by s is done by the norm's weight, so that nobody divides when the model runs. And y
# does not change at all.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** With α = 0.5 the two factors meet in the middle: both have the largest sizes √(max|X| · max|W|) = (2, 1). The
# outlier was 16 times its neighbor and is 2 times it; the weights pay, whose columns were 4 apart and are 2 apart the
# other way. With α = 1 all of the trouble is the weights': X has (1, 1), W has (4, 1).
#
# The first token's y is -16 · 0.25 - 1 = -5 before and -2 · 2 - 1 = -5 after.

# %% [markdown]
# ## Exercise 11.3: what calibration keeps
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | core: per-channel maxima over batches, and the factors | 2 of 5 | 20 | Xiao et al., 2023, 4 |
#
# `batches` gives pairs `(x, lengths)`: activations x [B, T, K] in front of a layer, of which row b has `lengths[b]`
# tokens (int64 [B], from 0 to T). **What lies behind them is padding**: any numbers, infinity and NaN included.
# `weights` are all layers that read x, each [N, K] with an N of its own.
#
# Return `(x_max, s)`, both fp32 [K]:
#
# - `x_max`: the largest **size** |x| of each channel over all tokens of all batches, padding left out.
# - `s = x_max ** alpha / w_max ** (1 - alpha)`, where `w_max` is the largest size in each column over **all** weights.
# - s is 1 where x_max or w_max is 0. (Numbers that are small and not 0 are not touched.)
# - ValueError unless 0 <= alpha <= 1, and if there was no token at all.
# - `batches` may be a generator, which can be walked through once; x and the weights may be fp32, fp16 or bf16, mixed
#   too, with any strides, and K, T and B differ from case to case (T and B from batch to batch). Inputs stay as they
#   are.


# %%
def smoothing_factors(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]], weights: list[torch.Tensor], alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(largest size of each channel, factors): fp32 [K] each.  batches of (x [B, T, K], lengths [B]), weights [N, K]"""
    ### BEGIN SOLUTION
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected 0 to 1, got {alpha}")
    rows = []
    for x, lengths in batches:
        real = torch.arange(x.shape[1]) < lengths[:, None]  # [B, T]
        if bool(real.any()):
            rows.append(x[real].float().abs().amax(0))  # [K]
    if not rows:
        raise ValueError("batches: expected at least one token, got none")
    x_max = torch.stack(rows).amax(0)
    w_max = torch.cat([w.float() for w in weights]).abs().amax(0)
    alive = (x_max > 0) & (w_max > 0)
    s = x_max.where(alive, 1.0) ** alpha / w_max.where(alive, 1.0) ** (1 - alpha)
    return x_max, s
    ### END SOLUTION


# %%
check("11.3", smoothing_factors)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A mask [B, T] selects tokens: `x[mask]` is [tokens, K]. Multiplying by the mask will not do: NaN times 0 is NaN. `abs`
# comes before the maximum.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `torch.arange(T) < lengths[:, None]` is the mask. Keep one [K] a batch, or the larger of it and what you had. Put 1 in
# for x_max *and* w_max where either is 0, and the formula gives 1.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** A maximum without `abs` works on most channels and fails where the outlier is negative: s is too small, or
# NaN, a negative number to a power. llm-compressor's AWQ had that bug. Padding was in the statistics of several tools,
# too; its "activations" are those of a token that no user ever sends.
#
# Why all readers: q, k and v read one norm, whose weight can be divided by one s only. A channel that is 0 in the
# calibration text would get s = 0 and be divided by it, so it is left alone.
#
# The maximum is a statistic of the extreme: one odd token sets it. That hurts less than it seems to, as α = 0.5 takes
# its root.

# %% [markdown]
# ## Exercise 11.4: into the norm and every reader
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | core: fold the factors so that the layer computes the same | 2 of 5 | 20 | Xiao et al., 2023, 4 |
#
# `layer` holds a decoder layer's tensors by the names that checkpoints use. `x` is the residual stream, H wide:
#
# ```text
# h = input_layernorm(x)              x = x + o_proj(attention(q_proj(h), k_proj(h), v_proj(h)))
# h = post_attention_layernorm(x)     x = x + down_proj(silu(gate_proj(h)) * up_proj(h))
# ```
#
# Each norm has a `.weight` [H], each projection a `.weight` [N, H], `o_proj` and `down_proj` [H, N]. Some models have a
# `.bias` besides: of a norm [H] (added after its weight was multiplied), of a projection [N]. A mixture of experts has
# a `router.weight` [E, H], too, which reads the second norm.
#
# Return a new dictionary with the same names, in which `s_attention` [H] is divided out of what the first norm gives
# and `s_mlp` [H] out of what the second gives, such that **the layer computes the same function**.
#
# - `None` for either: that half stays as it is.
# - Tensors keep their dtypes; factors are fp32. Compute in fp32 and round once. `layer` and its tensors stay as they
#   are (those that need no change may be the same tensors).


# %%
def fold(
    layer: dict[str, torch.Tensor], s_attention: torch.Tensor | None, s_mlp: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """A layer that computes the same, and whose norms give what they gave, divided by s [H]."""
    ### BEGIN SOLUTION
    halves = (
        ("input_layernorm", ("q_proj", "k_proj", "v_proj"), s_attention),
        ("post_attention_layernorm", ("gate_proj", "up_proj", "router"), s_mlp),
    )
    folded = dict(layer)
    for norm, readers, s in halves:
        if s is None:
            continue
        for name in (f"{norm}.weight", f"{norm}.bias"):
            if name in layer:
                folded[name] = (layer[name].float() / s).to(layer[name].dtype)
        for name in (f"{reader}.weight" for reader in readers):
            if name in layer:
                folded[name] = (layer[name].float() * s).to(layer[name].dtype)
    return folded
    ### END SOLUTION


# %%
check("11.4", fold)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# For each norm write down who reads it: three in the first half, two or three in the second. Everybody else stays.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# A norm with a bias gives n · weight + bias: both are divided. A projection's bias is added after its product, where
# nothing of s is left. [N, H] times [H] scales columns.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** x / s comes out of whatever makes x, here a vector that is multiplied in anyway: it costs nothing when the
# model runs. *Every* reader must be scaled. A router, a second branch, an adapter on q alone are easily forgotten, and
# the model is then silently wrong where they read (llm-compressor had that with MoE routers; the router's choice is
# what suffers).
#
# Which norms there are depends on the model: those with four norms a layer have two that nobody reads through a
# product; a norm of q and k after the projection (Qwen3) is not in the way.

# %% [markdown]
# ## Exercise 11.5: int8 product with an epilogue (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: a kernel that adds in int32 and scales once | 4 of 5 | 35 | Jacob et al., 2018, 2.2 |
#
# `y[i, j] = (sum over l of x[i, l] · w[j, l]) · x_scale[i] · w_scale[j] + bias[j]`, with x int8 [m, k], w int8 [n, k],
# scales fp32 [m] and [n], bias fp32 [n]. A program computes the tile of `[BLOCK_M, BLOCK_N]` at row `tl.program_id(0)`
# and column `tl.program_id(1)` of the grid of tiles.
#
# - **The sum is exact**, in int32: `tl.dot(a, b, acc, out_dtype=tl.int32)`. Scales and bias come after the loop, in
#   fp32; then the result is rounded once, to the dtype of y (fp32, fp16 or bf16).
# - Rows of x lie `stride_x` elements apart, those of w `stride_w`; within a row elements are neighbors. y [m, n] is
#   contiguous.
# - m, n and k are no multiples of the tile. Nothing outside the tensors is read or written. x is read once for each
#   column of tiles, w once for each row of tiles.
#
# The check launches it so:
#
# ```python
# int8_matmul_kernel[(triton.cdiv(m, 16), triton.cdiv(n, 32))](
#     x, w, x_scale, w_scale, bias, y, m, n, k, x.stride(0), w.stride(0), BLOCK_M=16, BLOCK_N=32, BLOCK_K=32)
# ```


# %%
@triton.jit
def int8_matmul_kernel(
    x_ptr, w_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, y_ptr, m, n, k, stride_x, stride_w,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of (x wᵀ) · x_scale · w_scale + bias.  x int8 [m, k], w int8 [n, k] -> y [m, n]"""
    ### BEGIN SOLUTION
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, k, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        x_mask = (rows[:, None] < m) & (ks[None, :] < k)
        w_mask = (ks[:, None] < k) & (columns[None, :] < n)
        x = tl.load(x_ptr + rows[:, None] * stride_x + ks[None, :], mask=x_mask, other=0)  # [BLOCK_M, BLOCK_K]
        w = tl.load(w_ptr + columns[None, :] * stride_w + ks[:, None], mask=w_mask, other=0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, w, acc, out_dtype=tl.int32)
    x_scale = tl.load(x_scale_ptr + rows, mask=rows < m, other=0.0)
    w_scale = tl.load(w_scale_ptr + columns, mask=columns < n, other=0.0)
    bias = tl.load(bias_ptr + columns, mask=columns < n, other=0.0)
    y = acc.to(tl.float32) * x_scale[:, None] * w_scale[None, :] + bias[None, :]
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(y_ptr + rows[:, None] * n + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
    ### END SOLUTION


# %%
check("11.5", int8_matmul_kernel)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The loop is that of chapter 4's product with two changes: the accumulator is int32, and w is [n, k], so the tile
# [BLOCK_K, BLOCK_N] is loaded with the roles of its axes exchanged.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `tl.zeros((BLOCK_M, BLOCK_N), tl.int32)`. Afterwards `acc.to(tl.float32)`, times a column [BLOCK_M, 1] of scales,
# times a row [1, BLOCK_N] of scales, plus a row of the bias: each loaded once, with a mask.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** What all of a row shares leaves the sum, so the loop is nothing but int8: twice the rate of fp16 on a GPU's
# tensor cores and half of the bytes. A scale for each *channel* l would stand inside the sum; that is why activations
# get one a token, and why smoothing exists. Sums of int8 fit in int32 up to k = 131,071, and are exact in any order:
# splitting k, or another tile, changes no bit. fp32 sums stop being exact at 2²⁴, about 1,000 products of the largest
# size.
#
# On a Hopper GPU, `minillm`'s kernel reads tiles through the copy engine instead of masked pointers, and programs stay
# and take tile after tile. What it computes is this.

# %% [markdown]
# ## Exercise 11.6: find three bugs (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: mend a smoothed layer in few bits | 3 of 5 | 25 | llm-compressor 1788 and torchao 4824, for two of them |
#
# The cell below smooths a layer, and computes with both factors in `bits` bits. It is meant to do this:
#
# - `factors(x, w, alpha)`: x [B, T, K] of calibration, w [N, K]: s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), the
#   maxima over all tokens and all rows. No channel is all zeros.
# - `quantize(rows, bits)`: rows [R, K] -> (int8 [R, K], scale [R, 1]). Each row has a scale of its own, its largest
#   size over half the number of steps, (2^bits - 1) / 2. Cut to -2^(bits-1) ... 2^(bits-1) - 1. No row is all zeros.
# - `product(x, w, s, bits)`: x [B, T, K] -> y [B, T, N], the product of x / s and w · s, both quantized, in which
#   **what a token gets depends on that token alone**. Strides may be any.
#
# Three mistakes were planted. One shows only for some signs, one makes everything a little worse, and one lets the last
# word of a sentence change the first. Write the mended class, with the same methods.


# %%
class Broken:
    """A smoothed layer in few bits. Three mistakes."""

    @staticmethod
    def factors(x: torch.Tensor, w: torch.Tensor, alpha: float) -> torch.Tensor:
        """[B, T, K], [N, K] -> [K]"""
        x_max, w_max = x.flatten(0, 1).amax(0).abs(), w.abs().amax(0)
        return x_max**alpha / w_max ** (1 - alpha)

    @staticmethod
    def quantize(rows: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[R, K] -> int8 [R, K], fp32 [R, 1]"""
        last = 2 ** (bits - 1) - 1
        scale = rows.abs().amax(1, keepdim=True) / last
        return (rows / scale).round().clamp(-last - 1, last).to(torch.int8), scale

    @staticmethod
    def product(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, bits: int) -> torch.Tensor:
        """[B, T, K], [N, K], [K] -> [B, T, N]"""
        x_q, x_scale = Broken.quantize((x / s).flatten(1), bits)  # [B, T · K]
        w_q, w_scale = Broken.quantize(w * s, bits)
        sums = x_q.view(x.shape).int() @ w_q.int().T  # [B, T, N]
        return sums * x_scale[:, None] * w_scale.T


# %% [markdown]
# The layer that does what it is meant to do:


# %%
class Mended:
    """A smoothed layer in few bits."""

    @staticmethod
    def factors(x: torch.Tensor, w: torch.Tensor, alpha: float) -> torch.Tensor:
        """[B, T, K], [N, K] -> [K]"""
        ### BEGIN SOLUTION
        largest = x.abs().amax((0, 1)), w.abs().amax(0)
        return largest[0].pow(alpha) * largest[1].pow(alpha - 1)
        ### END SOLUTION

    @staticmethod
    def quantize(rows: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[R, K] -> int8 [R, K], fp32 [R, 1]"""
        ### BEGIN SOLUTION
        step = rows.abs().amax(1, keepdim=True) / ((2**bits - 1) / 2)
        whole = torch.round(rows / step)
        return whole.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8), step
        ### END SOLUTION

    @staticmethod
    def product(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, bits: int) -> torch.Tensor:
        """[B, T, K], [N, K], [K] -> [B, T, N]"""
        ### BEGIN SOLUTION
        tokens, token_scales = Mended.quantize((x / s).reshape(-1, x.shape[-1]), bits)  # [B · T, K]
        rows, row_scales = Mended.quantize(w * s, bits)
        y = (tokens.int() @ rows.int().T) * token_scales * row_scales.T  # [B · T, N]
        return y.view(*x.shape[:-1], len(w))
        ### END SOLUTION


# %%
check("11.6", Mended)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Hold each line against the statement. Where does the sign go? How many steps are there between the ends? And over what
# is `amax` taken when x comes in?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `abs` of a maximum is not the maximum of `abs`. Half the number of steps is 7.5 for 4 bits, not 7. A row of `quantize`
# is to be one token.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** (1) `amax(0).abs()`: a channel whose outlier is negative counts with its largest positive number, gets a
# small s, and stays an outlier; nothing crashes, which a missing `abs` otherwise brings about by a NaN. (2) `/ 7`
# leaves the integer -8 unused: 7 % larger steps; and whoever reads the file with the other convention is off by as much
# (exercise 9.8 had it in a writer). (3) One scale for a whole sequence: the largest number of any token sets it.
# Perplexity rises a little; worse is that tokens see *later* ones, so that a prompt read at once and the same prompt
# read token by token give different answers, and a prefix cache holds numbers that depend on who came after.

# %% [markdown]
# ## Exercise 11.7: an int8 cache (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: keys and values in 8 bits, a scale a token and head | 3 of 5 | 30 | Sheng et al., 2023 (FlexGen), 5 |
#
# A cache of `slots` slots for H key/value heads of D features. It holds four tensors, as attributes: `k` and `v`, int8
# [slots, H, D], and `k_scale` and `v_scale`, fp32 [slots, H].
#
# - `write(k, v, slots)`: k and v [N, H, D] of any floating dtype, slots int64 [N]. Row i goes into slot `slots[i]`, in
#   place of what was there. **Each head of each token has a scale of its own**: its largest size over 127.5, or 1 if it
#   is all zeros. A slot of **-1** means that this token is not kept. All other slots stay as they are.
# - `attend(q, slots)`: attention of one token over those in `slots` [S] (in any order, each once), and no others.
#   q [H · G, D]; query head h reads key/value head `h // G`. Scores are divided by √D. -> fp32 [H · G, D]
# - Strides may be any. Compute in fp32. Inputs stay as they are.


# %%
class Int8Cache:
    """Keys and values in 8 bits: `k`, `v` int8 [slots, H, D]; `k_scale`, `v_scale` fp32 [slots, H]."""

    def __init__(self, slots: int, heads: int, dim: int) -> None:
        ### BEGIN SOLUTION
        self.k, self.v = (torch.zeros(slots, heads, dim, dtype=torch.int8) for _ in range(2))
        self.k_scale, self.v_scale = (torch.ones(slots, heads) for _ in range(2))
        ### END SOLUTION

    def write(self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """k, v [N, H, D], slots int64 [N], -1: not kept"""
        ### BEGIN SOLUTION
        kept = slots >= 0
        for x, held, scales in ((k, self.k, self.k_scale), (v, self.v, self.v_scale)):
            x = x[kept].float()  # [n, H, D]
            scale = x.abs().amax(-1) / 127.5  # [n, H]
            scale = torch.where(scale > 0, scale, 1.0)
            held[slots[kept]] = (x / scale[..., None]).round().clamp(-128, 127).to(torch.int8)
            scales[slots[kept]] = scale
        ### END SOLUTION

    def attend(self, q: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """q [H · G, D], slots int64 [S] -> [H · G, D] fp32"""
        ### BEGIN SOLUTION
        heads, dim = self.k.shape[1:]
        groups = q.float().unflatten(0, (heads, -1))  # [H, G, D]
        scores = groups @ self.k[slots].float().permute(1, 2, 0)  # [H, G, S]
        weights = (scores * self.k_scale[slots].T[:, None] / dim**0.5).softmax(-1)
        return ((weights * self.v_scale[slots].T[:, None]) @ self.v[slots].float().transpose(0, 1)).flatten(0, 1)
        ### END SOLUTION


# %%
check("11.7", Int8Cache)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `amax(-1)` of k's size is [N, H]: a scale a token and head. Cut after rounding: 127.5 rounds to 128, and 128 as int8
# is -128. Drop the tokens of slot -1 before you index with the slots: -1 is the last slot to Python.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `q.unflatten(0, (H, G))` puts query heads beside their key head. A key's scale is the same for all D, so it may
# multiply the score; a value's may multiply the weight, after the softmax.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** D + 4 bytes instead of 2 D (bf16) a head: 0.53 for D = 64, and paged decode, whose time is those bytes, gains
# nearly as much. Scales a token and head need no calibration, and a token that is written never changes others: with
# one scale a head, kept for all time, a later and larger token would be cut, or all earlier ones would have to be
# rounded anew. It would be worse besides, as tokens differ in size: the lab's table shows about twice the error.
#
# The scale leaves the product q · k as it did in exercise 11.5, so a kernel multiplies S scores instead of S · D keys.
# A few large *channels* of the keys are left: 8 bits take them; with 4 bits people scale keys by channel (KIVI) or
# rotate them.

# %% [markdown]
# ## Exercise 11.8: turning instead of scaling (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: the Hadamard transform without its matrix | 3 of 5 | 25 | Ashkboos et al., 2024 (QuaRot) |
#
# Smoothing makes an outlier channel smaller. A rotation spreads it over many. The Hadamard matrix of size 1 is (1), and
#
# $$H_{2n} = \begin{pmatrix} H_n & H_n \\ H_n & -H_n \end{pmatrix}, \qquad H_n H_n^T = n I$$
#
# Write `rotate(x, size)`: every `size` neighbors of x's last axis, as a row vector, times H_size / √size.
#
# - x [..., K] of any number of dimensions and any strides; K a multiple of `size`, which is a power of 2 (1 included:
#   nothing changes). ValueError otherwise.
# - The result has x's shape and dtype. Compute in fp32; fp64 for fp64. x stays as it is.
# - Without the matrix: in log₂(size) steps, each of which replaces pairs (a, b) by (a + b, a - b). (The check cannot
#   see how you do it.)


# %%
def rotate(x: torch.Tensor, size: int) -> torch.Tensor:
    """Each `size` neighbors times the normalized Hadamard matrix.  [..., K] -> [..., K]"""
    ### BEGIN SOLUTION
    if size < 1 or size & (size - 1) or x.shape[-1] % size:
        raise ValueError(f"size: expected a power of 2 that divides {x.shape[-1]}, got {size}")
    y = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, size)  # [rows, size]
    reach = 1
    while reach < size:
        a, b = y.unflatten(1, (-1, 2, reach)).unbind(2)  # [rows, size / (2 reach), reach] each
        y = torch.stack((a + b, a - b), 2).flatten(1)
        reach *= 2
    return (y / size**0.5).reshape(x.shape).to(x.dtype)
    ### END SOLUTION


# %%
check("11.8", rotate)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# H₂ pairs neighbors. By the recursion H₄ does that for (0, 1) and (2, 3), and then for (0, 2) and (1, 3): partners are
# 1, then 2, then 4 apart.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `unflatten(-1, (-1, 2, reach))` lays partners side by side on the axis of 2. Divide by √size once, at the end.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** The matrix is symmetric and orthogonal: turning twice gives x back, lengths stay, and with x turned *and*
# each row of W turned the product x Wᵀ is what it was, H Hᵀ / size = 1. A single outlier a becomes a / √size in each of
# the size channels, so the row's largest number, and its scale, falls by √size; rows that were even stay about as they
# were. In contrast to smoothing nothing is calibrated, and weights get easier, too, not harder. The price: the turn
# must be computed, unless it can be folded into the weights around (the residual stream's can, once norms have no
# weights). In front of down_proj it cannot, and runs as a kernel: K log₂ size additions a row instead of K · size.
