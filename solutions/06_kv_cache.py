# %% [markdown]
# # Exercises 6: the KV cache
#
# Ten exercises on [chapter 6](../chapters/06_kv_cache.md) and its [lab](../notebooks/06_kv_cache.ipynb): three
# **warm-ups** of five minutes (6.w1 to 6.w3), the **core** (6.0), and six steps **beyond** (6.1 to 6.6, optional),
# which neither chapter nor lab shows in this form.
#
# Run the next cell, then take the exercises in any order. Replace `raise NotImplementedError(...)` by your code and
# run the `check` cell under it: it says which contracts hold, and on a failure what was expected and what came.
#
# Shapes: `B` sequences, `T` new tokens, `S` slots, `H` query and `H_kv` key/value heads, `D` features a head. Query
# head h reads key/value head h // (H / H_kv), scores are `q · k / sqrt(D)`, and RoPE has rotated the keys already.
# Numbers are fp32 unless an exercise says otherwise. Tensors need not be contiguous, and inputs stay as they are where
# nothing else is said.

# %%
import math

import torch

from minillm.learn import check

# %% [markdown]
# ## Exercise 6.w1: count the tokens
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: what a cache saves, in tokens through the model | 1 of 5 | 5 | – |
#
# A prompt of `prompt` tokens, `n` tokens to generate, one a step. Without a cache each step runs the model over all
# tokens so far; with one, the first step runs over the prompt, every later one over the token that is new. Return how
# many tokens pass through the model in each way. `n` is 0 or more (0: no step at all, nothing passes). No loop: n may
# be 10⁹.
#
# On paper first: 3 tokens, 5 to generate.


# %%
def tokens_computed(prompt: int, n: int) -> tuple[int, int]:
    """(without a cache, with one)"""
    ### BEGIN SOLUTION
    if n == 0:
        return 0, 0
    return n * prompt + n * (n - 1) // 2, prompt + n - 1
    ### END SOLUTION


# %%
check("6.w1", tokens_computed)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Write down the five steps. The token that a step generates passes through the model in the *next* step; the last one
# never does.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Step i, counted from 0, runs over prompt + i tokens: a sum of 0 to n - 1 is n (n - 1) / 2, in integers `//`.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** 3 + 4 + 5 + 6 + 7 = 25 against 3 + 1 + 1 + 1 + 1 = 7.

# %% [markdown]
# ## Exercise 6.w2: a ring of slots
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: which position stands where | 1 of 5 | 5 | Jiang et al., 2023, 2 |
#
# A ring of `window` slots: position p goes to slot p % window, over what stood there. After `length` tokens (positions
# 0 ... length - 1), which position does each slot hold? Return a list of `window` entries, -1 for a slot that was never
# written. The tokens themselves may be many: no loop over them.
#
# On paper first: a ring of 4 after 6 tokens.


# %%
def ring(length: int, window: int) -> list[int]:
    """[position in slot 0, in slot 1, ...]"""
    ### BEGIN SOLUTION
    newest = length - 1
    return [max(-1, newest - (newest - slot) % window) for slot in range(window)]
    ### END SOLUTION


# %%
check("6.w2", ring)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Start from the newest token: in which slot does it stand, and how far back is the one in slot s?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# The token in slot s is (newest - s) % window steps older than the newest; Python's `%` is never negative here. What
# comes out below 0 was never written.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** [4, 5, 2, 3]: 0 and 1 were overwritten. The package's `_positions_in_ring` is this line with tensors. The
# other way is to look at the last `window` positions only: `for p in range(max(0, length - window), length)`.

# %% [markdown]
# ## Exercise 6.w3: 0 · NaN
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: a weight of 0 does not silence what stands in a slot | 1 of 5 | 5 | – |
#
# Slots behind a sequence's end hold whatever stood in memory before, perhaps NaN. `seen` `[S]`, bool, says which slots
# hold tokens. Return the attention output `[D]`: the softmax of the `scores` `[S]` over the slots that are seen, times
# their `values` `[S, D]`. What stands in the other slots, scores and values, must not show. At least one is seen. The
# inputs stay as they are; a NaN in a slot that *is* seen is somebody's mistake and shows.


# %%
def blend(scores: torch.Tensor, values: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """scores [S], values [S, D], seen [S] bool -> [D]"""
    ### BEGIN SOLUTION
    weights = scores.masked_fill(~seen, float("-inf")).softmax(0)
    return weights @ values.masked_fill(~seen[:, None], 0.0)
    ### END SOLUTION


# %%
check("6.w3", blend)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `0 * nan` is NaN, and so is a softmax with one NaN among its scores. Which of the two is cured by a mask on the
# scores?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `masked_fill` replaces, whatever stood there. Fill both: scores with -inf, values with 0. Adding -inf to NaN does not
# help.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Filling replaces, multiplying does not. `nan_to_num` would hide real mistakes, too. The other way is to
# select: `scores[seen].softmax(0) @ values[seen]`, right and simple, but on a GPU its shape depends on the data, so the
# host has to wait for it.

# %% [markdown]
# ## Exercise 6.0: append and attend
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | core: a step of one sequence with a cache | 2 of 5 | 20 | Pope et al., 2023, 2 |
#
# One layer, one sequence. The caches have room for S tokens; slots 0 ... length - 1 hold those so far. A step brings T
# new tokens: a prompt's (length is 0), a chunk of it, or a single one.
#
# - Store `k` and `v` in the slots length ... length + T - 1, **in place**: the caches given are changed, and nothing
#   else of them. They may be views that are not contiguous.
# - Then attend: the new token i, at position length + i, sees the keys at positions up to its own, cached or new.
#   Return a new `[T, H, D]`.
# - Slots behind hold anything, even NaN, which must not show.
# - If the T tokens do not fit, raise ValueError and change nothing.
# - Any sizes of steps give the same as all tokens at once.


# %%
def append_and_attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, length: int
) -> torch.Tensor:
    """q [T, H, D], k and v [T, H_kv, D], caches [S, H_kv, D], length tokens cached -> [T, H, D]"""
    ### BEGIN SOLUTION
    end = length + len(k)
    if end > len(k_cache):
        raise ValueError(f"k: expected at most {len(k_cache) - length} tokens, got {len(k)}")
    k_cache[length:end], v_cache[length:end] = k, v
    groups = q.shape[1] // k.shape[1]
    keys, values = (x[:end].repeat_interleave(groups, dim=1) for x in (k_cache, v_cache))  # [end, H, D]
    scores = torch.einsum("thd,shd->hts", q, keys) / q.shape[-1] ** 0.5
    future = torch.arange(end) > length + torch.arange(len(q))[:, None]  # [T, end]
    return torch.einsum("hts,shd->thd", scores.masked_fill(future, float("-inf")).softmax(-1), values)
    ### END SOLUTION


# %%
check("6.0", append_and_attend)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Three steps: assign into a slice of the caches, read slots 0 ... length + T - 1, attend with a mask. The mask compares
# positions of queries, which begin at `length`, with positions of keys, which begin at 0.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `x.repeat_interleave(groups, dim=1)` gives every query head its key/value head. The mask is `[T, length + T]`: with
# `tril()` of a square, or `is_causal=True`, a single new token would see the first key alone.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** By the prefix property the cached keys and values are what a run over all tokens would make again, so a step
# needs those of its own tokens alone. Reading `[:end]` keeps the rest of memory out without a mask; a batch of
# sequences of different lengths cannot cut like that (exercise 6.3).
#
# The other way is torch's fused attention with that mask and `enable_gqa=True`.

# %% [markdown]
# ## Exercise 6.1: what fits
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | a step beyond: plan a GPU's memory for any attention | 2 of 5 | 15 | DeepSeek-AI, 2024, 2.1; Gemma Team, 2025 |
#
# How many sequences of `length` tokens fit beside the weights? Layers may differ: `layers` has a dictionary for each.
#
# - `{"kv_heads": 8, "head_dim": 128}` keeps a key and a value a head and token: MHA, GQA and MQA differ in `kv_heads`.
# - `{"latent": 512, "rope": 64}` is MLA: **one** vector of 512 a token, from which the keys and values of all heads are
#   made, and one rotated key of 64 that all heads share.
# - Either may have `"window": W`: that layer never keeps more than W tokens.
#
# A layer's memory comes in blocks of `block` tokens, so what it holds of a sequence is rounded up to whole blocks.
# `size` is the bytes of a number (0.5 for 4 bits; half bytes add up, they are not rounded). Return an int. Weights that
# do not fit leave room for 0 sequences.


# %%
def max_sequences(memory: int, weights: int, layers: list[dict], length: int, size: float = 2, block: int = 1) -> int:
    """Sequences of `length` tokens that fit into `memory` bytes beside `weights` bytes."""
    ### BEGIN SOLUTION
    total = 0.0
    for layer in layers:
        numbers = layer["latent"] + layer["rope"] if "latent" in layer else 2 * layer["kv_heads"] * layer["head_dim"]
        tokens = min(length, layer.get("window", length))
        total += -(-tokens // block) * block * numbers * size
    return max(0, int((memory - weights) // total))
    ### END SOLUTION


# %%
check("6.1", max_sequences)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# For each layer: numbers a token, times tokens kept, times bytes of a number. What a token keeps differs by kind: in
# MLA nothing comes twice, and nothing is multiplied by heads.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# First cut the tokens to the window, then round up to blocks, layer by layer. Rounding the sum of all layers instead
# would promise memory that no layer has. Two sequences never share a byte, so the last division rounds down.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** DeepSeek-V2's 128 heads of 128 would need 2 · 128 · 128 = 32,768 numbers a token and layer. Its latent needs
# 576: as much as GQA with 2.25 key/value heads, while every head still reads keys of its own (made from the latent). In
# a model with five windowed layers to one that sees all, only the sixth grows: at 128k tokens and a window of 1,024
# the memory is a sixth and a little.
#
# What the plan leaves out: activations, CUDA's context, fragmentation. Engines measure these by running the largest
# step once and take what is left (chapter 8).

# %% [markdown]
# ## Exercise 6.2: a cache that can be rewound
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | a step beyond: grow by doubling, forget without moving | 2 of 5 | 20 | Leviathan et al., 2023, 2.3 |
#
# A cache for one layer of one sequence. The package's grows; this one can also go **back**: "regenerate" drops the last
# answer, and speculative decoding (chapter 14) drops guesses that were wrong.
#
# - `append(k, v)` takes `[T, H_kv, D]` each and returns the keys and values of all tokens so far, `[length, H_kv, D]`.
#   T may be 0.
# - `length` is an attribute, the number of tokens so far. What is stored is fp32, whatever the dtype of k and v.
# - What comes back are **views** into the cache: an append that needs no growth copies nothing but the new tokens.
# - `capacity` starts as given, and doubles, once or more, only when the tokens do not fit. It never shrinks.
# - `rewind(length)` keeps the first `length` tokens. It moves nothing. Whatever is appended next takes the place of
#   what was dropped. ValueError for a length below 0 or above the present one (not the longest ever), which changes
#   nothing.


# %%
class Cache:
    """Keys and values of one sequence in one layer; `length` tokens in room for `capacity`."""

    def __init__(self, kv_heads: int, head_dim: int, capacity: int = 4) -> None:
        ### BEGIN SOLUTION
        self.length = 0
        self.k, self.v = (torch.zeros(capacity, kv_heads, head_dim) for _ in range(2))
        ### END SOLUTION

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        ### BEGIN SOLUTION
        return len(self.k)
        ### END SOLUTION

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new tokens, [T, H_kv, D] each, and return all keys and values, [length, H_kv, D] each."""
        ### BEGIN SOLUTION
        end, capacity = self.length + len(k), self.capacity
        while capacity < end:
            capacity *= 2
        if capacity > self.capacity:
            for name in ("k", "v"):
                old = getattr(self, name)
                grown = old.new_zeros(capacity, *old.shape[1:])
                grown[: self.length] = old[: self.length]
                setattr(self, name, grown)
        self.k[self.length : end], self.v[self.length : end] = k, v
        self.length = end
        return self.k[:end], self.v[:end]
        ### END SOLUTION

    def rewind(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        ### BEGIN SOLUTION
        if not 0 <= length <= self.length:
            raise ValueError(f"length: expected 0 to {self.length}, got {length}")
        self.length = length
        ### END SOLUTION


# %%
check("6.2", Cache)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A cache is a large tensor and a number. Which of the two changes in `rewind`?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `torch.cat` makes a new tensor every time and copies everything: quadratic in the length. Assign into a slice of what
# is there, and return slices. Only when the capacity is too small make a larger tensor and copy the first `length`.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Doubling copies 1 + 2 + 4 + ... + C/2 < C tokens until the capacity is C, and C is less than twice the
# longest length: less than two copies a token, on average. Growing by a fixed number of slots would copy
# quadratically. The price is memory: between half and all of it is used, and while growing the old and the new tensor
# are there together.
#
# Rewinding is free because attention is told how many keys there are: what lies behind is garbage that nobody reads. A
# ring (exercise 6.4) cannot be rewound past what it has overwritten.

# %% [markdown]
# ## Exercise 6.3: one token for each of several sequences
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | a step beyond: decode a static batch, finished rows included | 3 of 5 | 30 | Yu et al., 2022 (Orca), 3 |
#
# One decode step for B sequences with different numbers of tokens in the cache, some of them finished. Row b has
# `lengths[b]` tokens, in slots 0 ... lengths[b] - 1.
#
# - For an active row: store `k[b]` and `v[b]` in slot `lengths[b]` (in place; the caches may be views that are not
#   contiguous), then attend from `q[b]` to all of the row's tokens, the new one included.
# - A finished row is left alone: nothing is stored (its row may be full), and its output is 0.
# - Slots past a row's end hold whatever was there before: large numbers, even NaN. It must not show.
# - Return a new `[B, H, D]`. Change nothing but those slots; `lengths` stays.
# - Do without a loop over the sequences: 64 rows take no more tensor operations than 2.
# - Scores may be -10¹⁰: what hides a slot must be lower still.


# %%
def decode_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor, active: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """q [B, H, D], k, v [B, H_kv, D], caches [B, S, H_kv, D], lengths [B] int64, active [B] bool -> [B, H, D]"""
    ### BEGIN SOLUTION
    rows = active.nonzero()[:, 0]  # [A]
    k_cache[rows, lengths[rows]], v_cache[rows, lengths[rows]] = k[rows], v[rows]
    inside = torch.arange(k_cache.shape[1]) <= lengths[rows, None]  # [A, S]
    groups = q.shape[1] // k.shape[1]
    keys = k_cache[rows].repeat_interleave(groups, dim=2)  # [A, S, H, D]
    values = v_cache[rows].repeat_interleave(groups, dim=2).masked_fill(~inside[..., None, None], 0.0)
    scores = torch.einsum("bhd,bshd->bhs", q[rows], keys) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~inside[:, None], float("-inf")).softmax(-1)  # [A, H, S]
    out = torch.zeros_like(q)
    out[rows] = torch.einsum("bhs,bshd->bhd", weights, values)
    return out
    ### END SOLUTION


# %%
check("6.3", decode_step)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Select the active rows first, and work on these alone: then no store can go wrong, and no row is without a key.
# `cache[rows, slots] = x[rows]` stores one slot a row.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# A mask `[A, S]` from the lengths: the new token counts. Fill hidden scores with -inf *after* they are computed (NaN is
# then replaced), and zero hidden **values** too: a weight of 0 times NaN is NaN.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** A rectangle of slots and a mask is all that a static batch is. The mask depends on lengths that live on the
# GPU, so nothing waits for the host. But every row is read to the end of the rectangle, and finished rows, here
# skipped, keep their slots until the last one is done.
#
# The other way is to run all B rows and mask: simpler on a GPU, where a varying number of rows would be a varying
# shape. Then a finished row needs one slot that it may attend to (or its softmax is 0/0), and a place where its store
# does no harm: a slot that nobody reads, or a slot of -1 that the kernel skips, as the package's `rope_and_cache` does.

# %% [markdown]
# ## Exercise 6.4: a rolling window with sinks
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | a step beyond, optional: endless text in fixed memory | 4 of 5 | 45 | Xiao et al., 2024 (StreamingLLM), 3.2 |
#
# The chapter measures it: under a window a model that was trained without one gets much worse, and a few of the first
# tokens, kept, repair most of it. Write that cache for one layer of one sequence. The query at position p sees the key
# at position j when j ≤ p and (j < `sinks` or j > p - `window`).
#
# - `step(q, k, v)` takes T new tokens, q `[T, H, D]`, k and v `[T, H_kv, D]`, and returns their attention `[T, H, D]`
#   over all that they may see: tokens of earlier steps and of this one.
# - `k` and `v` of the cache are `[sinks + window, H_kv, D]` and stay that large, whatever T (a prompt longer than all
#   of it comes in one step) and however many steps. Nothing else that the cache keeps grows with the text.
# - Steps of any sizes give the same as all tokens at once, whatever stood in memory before (`torch.empty` may hold
#   NaN).
# - The inputs of a step stay as they are, and the cache has none of their memory: the caller may write into it later.
#
# Positions keep counting (keys are rotated by their true positions; StreamingLLM itself numbers them anew within the
# cache, which exercise 6.5 would allow).


# %%
class SinkCache:
    """Keys and values of the first `sinks` tokens and of the last `window`."""

    def __init__(self, sinks: int, window: int, kv_heads: int, head_dim: int) -> None:
        ### BEGIN SOLUTION
        self.sinks, self.window, self.length = sinks, window, 0
        self.k, self.v = (torch.zeros(sinks + window, kv_heads, head_dim) for _ in range(2))
        self.positions = torch.full((sinks + window,), -1)  # what each slot holds; -1: nothing
        ### END SOLUTION

    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of T new tokens.  q [T, H, D], k and v [T, H_kv, D] -> [T, H, D]"""
        ### BEGIN SOLUTION
        new = torch.arange(self.length, self.length + len(k))  # [T] positions
        keys, values, at = torch.cat((self.k, k)), torch.cat((self.v, v)), torch.cat((self.positions, new))
        seen = (at >= 0) & (at <= new[:, None]) & ((at < self.sinks) | (at > new[:, None] - self.window))  # [T, S + T]
        groups = q.shape[1] // k.shape[1]
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))  # [S + T, H, D]
        scores = torch.einsum("thd,shd->hts", q, keys) / q.shape[-1] ** 0.5
        out = torch.einsum("hts,shd->thd", scores.masked_fill(~seen, float("-inf")).softmax(-1), values)
        self.length += len(k)
        kept = (new < self.sinks) | (new >= self.length - self.window)
        slots = torch.where(new < self.sinks, new, self.sinks + (new - self.sinks) % self.window)[kept]
        self.k[slots], self.v[slots], self.positions[slots] = k[kept], v[kept], new[kept]
        return out
        ### END SOLUTION


# %%
check("6.4", SinkCache)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Keep, beside keys and values, the position that each slot holds, and -1 where none. Then who sees what is a comparison
# of positions, and the order of the slots does not matter: attention is a sum.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# First attend to the cache as it was *and* to the new tokens, then store: a new token may overwrite what an earlier
# query of the same step still sees. Of a long step store only sinks and the last `window`, so that no slot is written
# twice. Sinks go to slot p; all others to `sinks + (p - sinks) % window`.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** A ring overwrites position p - window when p arrives, just when it falls out of every later query's window.
# With several new tokens that is too early for the first of them: attend first, or keep room for a step's tokens beside
# the window.
#
# When two indices in `self.k[slots] = ...` are equal, which one wins is not defined. So what does not survive the step
# is dropped before the store, and slots are distinct.
#
# The window here counts by position: a token among the sinks that is also within the window counts once.

# %% [markdown]
# ## Exercise 6.5: cutting out the middle
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | a step beyond, optional: move stored keys | 3 of 5 | 20 | Su et al., 2021, 3.2; llama.cpp's context shift |
#
# When a conversation outgrows the context, llama.cpp can drop the oldest turns and move the rest up, without computing
# anything again. Values do not know where they stand. Keys do: they are stored after RoPE.
#
# Given one layer's cache, keys and values `[S, H_kv, D]` of the positions 0 ... S - 1, remove the tokens `start` ...
# `stop - 1`, and rotate the keys behind them so that they are as if their tokens had stood `stop - start` earlier. Pair
# i of a head is the features i and i + D/2, and a token at position p has it rotated by the angle $p\,\omega_i$ with
# $\omega_i = \text{rope\_theta}^{-2i/D}$: $(a, b)$ becomes $(a \cos - b \sin,\; b \cos + a \sin)$.
#
# Return new tensors, keys in k's dtype and values in v's, which may differ, and leave the inputs alone (fp64 ones, too,
# and these keep fp64's precision). Positions go beyond 100,000: an angle computed in fp32 is off by more than the
# tolerance there, so compute angles in fp64.


# %%
def cut(
    k: torch.Tensor, v: torch.Tensor, start: int, stop: int, rope_theta: float = 10_000.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values without the tokens start ... stop - 1, each [S - (stop - start), H_kv, D]"""
    ### BEGIN SOLUTION
    size = k.shape[-1]
    angles = -(stop - start) * rope_theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)  # [D/2]
    cos, sin = angles.cos().to(k.dtype), angles.sin().to(k.dtype)
    first, second = k[stop:].chunk(2, dim=-1)  # [S - stop, H_kv, D/2] each
    moved = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((k[:start], moved)), torch.cat((v[:start], v[stop:]))
    ### END SOLUTION


# %%
check("6.5", cut)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Rotating by the angle of p and then by minus the angle of d is rotating by the angle of p - d. All keys that move,
# move by the same distance.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# So there are D/2 angles in all, whatever S: minus the distance times each frequency. Rotate the keys behind the gap
# with them, and join. Values are only joined.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** $e^{\mathrm{i} p \omega} e^{-\mathrm{i} d \omega} = e^{\mathrm{i}(p - d) \omega}$: rotations of a plane add.
# The other way is to store keys before RoPE and rotate all of them at every step, which costs a pass over the cache a
# token.
#
# What this does **not** give is the cache of the shortened text. In the first layer, keys and values depend on their
# own token alone, and the result is exact. Above it they were computed from hidden states that had seen the removed
# tokens, and remember them. It works well enough in practice to be an option; it is no identity, and a prefix cache
# must not share such blocks (chapter 7).

# %% [markdown]
# ## Exercise 6.6: how many sequences until arithmetic limits?
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | a step beyond, optional: a decode step's roofline | 3 of 5 | 20 | Pope et al., 2023, 2; Williams et al., 2009 |
#
# A decode step of B sequences with `context` tokens each, the new one included, reads the `weights` matrix entries
# once for all, and every sequence's keys and values. Each weight takes part in one multiply-add a sequence; scores and
# the sum of values cost 2 FLOPs each for every query feature and token. Every number has `size` bytes.
#
# Arithmetic limits when FLOPs / `peak` is at least bytes / `bandwidth`. Return the smallest such B, or None when there
# is none, however large the batch. (Why can that be?) Do not count up to it: the answer may be 10¹².


# %%
def saturating_batch(
    weights: int, layers: int, heads: int, kv_heads: int, head_dim: int, context: int,
    peak: float, bandwidth: float, size: float = 2,
) -> int | None:  # fmt: skip
    """The smallest batch whose decode step is limited by arithmetic; peak in FLOP/s, bandwidth in bytes/s"""
    ### BEGIN SOLUTION
    arithmetic = (2 * weights + 4 * layers * heads * head_dim * context) / peak  # seconds, each sequence
    reading = 2 * layers * kv_heads * head_dim * context * size / bandwidth
    if arithmetic <= reading:
        return None
    return max(1, math.ceil(weights * size / bandwidth / (arithmetic - reading)))
    ### END SOLUTION


# %%
check("6.6", saturating_batch)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Both times are straight lines in B. Arithmetic's starts at 0, reading's at the weights. They meet if the first is
# steeper.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# B · arithmetic ≥ fixed + B · reading, each in seconds. Solve for B and round up. If a sequence's own reading takes at
# least as long as its arithmetic, no B will do.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** A batch shares weights and nothing else. Attention over a cache has, in 16 bits, $H / H_{kv}$ FLOPs a byte
# at every batch size, far below any GPU's ridge. So with a longer context the answer grows, and from some context on no
# batch is enough: each further sequence brings more reading than arithmetic. That context follows from `arithmetic =
# reading`. Grouped and latent attention push it out: fewer bytes for the same FLOPs.
#
# Memory usually ends the story before: exercise 6.1 says how many sequences fit at all.
