# %% [markdown]
# # Exercises 5: FlashAttention
#
# Nine exercises on [chapter 5](../chapters/05_flash_attention.md) and its [lab](../notebooks/05_flash_attention.ipynb):
# three **warm-ups** of five minutes (5.w1 to 5.w3), the **core** (5.0), and five steps **beyond** (5.1 to 5.5,
# optional), the parts of an attention kernel that people get wrong.
#
# Run the next cell, then take the exercises in any order. Replace `raise NotImplementedError(...)` by your code and
# run the `check` cell under it: it says which contracts hold, and on a failure what was expected and what came.
#
# Shapes: `T` queries, `S` keys, `D` features a head, `H` heads. A *partial result* of some keys is the triple
# `(m, l, acc)`: for each query the largest score `m`, the sum `l` of `exp(score - m)`, and the sum `acc` of
# `exp(score - m) · value`. Its attention is `acc / l`, its log-sum-exp `m + log(l)`. Exponentials are base e here.
# Numbers are fp32 unless an exercise says otherwise. Tensors need not be contiguous, and inputs stay as they are.
#
# Without a GPU, exercise 5.5 runs in Triton's interpreter. The variable that turns it on is read when Triton is
# imported: that is why it stands above the imports.

# %%
import math
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from minillm.kernels.common import tl, triton
from minillm.learn import check

# %% [markdown]
# ## Exercise 5.w1: one more key
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: the running softmax with plain numbers | 1 of 5 | 5 | Milakov and Gimelshein, 2018, 3.1 |
#
# One query. `(m, l, acc)` is the partial result of the keys seen so far: the largest score, the sum of `exp(score -
# m)`, the sum of `exp(score - m) · value`. Before the first key it is `(-inf, 0, 0)`. One more key comes, with `score`
# and `value`. Return the partial result with that key counted in. All five are Python floats, and so are the three.
#
# On paper first: after scores 0 and ln 3 with values 6 and 2 it is (ln 3, 4/3, 4). What does the score ln 6 with the
# value 4 make of it? The check asks.
#
# `exp` is only ever taken of numbers up to 0, so scores of ±1,000 are no problem.


# %%
def one_more(m: float, l: float, acc: float, score: float, value: float) -> tuple[float, float, float]:  # noqa: E741
    """(m, l, acc) with one more key"""
    ### BEGIN SOLUTION
    highest = max(m, score)
    shrink, weight = math.exp(m - highest), math.exp(score - highest)
    return highest, l * shrink + weight, acc * shrink + weight * value
    ### END SOLUTION


# %%
check("5.w1", one_more)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The new maximum first. Old sums were counted from the old one: by which factor do they shrink?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `math.exp(m - highest)` for the old sums, `math.exp(score - highest)` for the new key: one of the two is 1.
# `math.exp(-inf)` is 0, so the first key needs no case of its own.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** On paper: the factor for the old is 3/6, so l = 4/3 · 1/2 + 1 = 5/3 and acc = 4 · 1/2 + 4 = 6. In the kernel
# the same three lines work on a row of scores in place of one, and on a tile of queries in place of one.

# %% [markdown]
# ## Exercise 5.w2: which blocks do these keys touch?
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: from keys to blocks, rounding the right way | 1 of 5 | 5 | – |
#
# Block b holds the keys `b · block` ... `(b + 1) · block - 1`. A query sees the keys `first` ... `last`, both included.
# Return `(begin, end)`: the blocks begin ... end - 1 are those that hold at least one of these keys. With
# `last = first - 1` there is no key: then begin = end, whichever. No loop over blocks: there may be 10¹².
#
# On paper first: keys 5 to 18 in blocks of 4.


# %%
def touched(first: int, last: int, block: int) -> tuple[int, int]:
    """(begin, end) of the blocks that hold any of the keys first ... last; first is 0 or more"""
    ### BEGIN SOLUTION
    if last < first:
        return 0, 0
    return first // block, last // block + 1
    ### END SOLUTION


# %%
check("5.w2", touched)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# In which block is key j?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# The block of the first key, and one past the block of the last. No key at all: look at `first = 4, last = 3`.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** 5 // 4 = 1 and 18 // 4 + 1 = 5: blocks 1 to 4. Of these, 2 and 3 lie inside and need no mask. Exercise 5.3
# asks for both ranges, for a whole tile of queries.

# %% [markdown]
# ## Exercise 5.w3: the mask of one block
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: causal, for a block anywhere | 1 of 5 | 5 | – |
#
# A tile has `M` queries at the positions `position` ... `position + M - 1`, a block the `N` keys `start` ...
# `start + N - 1`. Return the mask `[M, N]`, bool, True where the query may see the key: the key's position is at most
# the query's. Whole blocks come out all True, hidden ones all False, those on the diagonal in between.


# %%
def block_mask(position: int, M: int, start: int, N: int) -> torch.Tensor:
    """[M, N] bool: which of the keys start ... each of the queries position ... sees"""
    ### BEGIN SOLUTION
    return start + torch.arange(N) <= position + torch.arange(M)[:, None]
    ### END SOLUTION


# %%
check("5.w3", block_mask)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Positions of queries as a column, `[M, 1]`, of keys as a row, `[N]`: comparing them gives `[M, N]`.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `torch.arange(M)[:, None]` is a column. `tril` is right for one place of the block only.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** A kernel does this with `tl.arange`, for blocks on the diagonal alone: elsewhere the answer is known from the
# corners. The other way, `torch.ones(M, N).tril(position - start).bool()`, says the same: the diagonal is moved.

# %% [markdown]
# ## Exercise 5.0: attention, one block of keys at a time
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | core: exact attention without the matrix of scores | 2 of 5 | 20 | Dao et al., 2022, 3.1; Rabe and Staats, 2021 |
#
# Attention of one head without a mask: `softmax(q kᵀ / sqrt(D)) v`. Walk over the keys, `block` at a time, keep
# `(m, l, acc)` for each query, divide at the end.
#
# - q `[T, D]`, k `[S, D]`, v `[S, E]`: values may have another size than keys. S is at least 1. Return a new `[T, E]`.
# - `block` need not divide S, and may be larger.
# - **Never hold more than `T x block` scores.**
# - Scores of ±1,000 or -10¹⁰ are no problem, and each query has its own maximum.


# %%
def online_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int) -> torch.Tensor:
    """q [T, D], k [S, D], v [S, E] -> [T, E]"""
    ### BEGIN SOLUTION
    m = torch.full((len(q),), -torch.inf)  # [T]
    total, acc = torch.zeros(len(q)), torch.zeros(len(q), v.shape[1])
    for keys, values in zip(k.split(block), v.split(block), strict=True):
        scores = q @ keys.T / q.shape[1] ** 0.5  # [T, block]
        new_m = torch.maximum(m, scores.amax(1))
        weights, shrink = torch.exp(scores - new_m[:, None]), torch.exp(m - new_m)
        total = total * shrink + weights.sum(1)
        acc = acc * shrink[:, None] + weights @ values
        m = new_m
    return acc / total[:, None]
    ### END SOLUTION


# %%
check("5.0", online_attention)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Warm-up 5.w1, with `[T]` in place of each number of the state, and a block of keys in place of one. Every query has
# its own maximum: `scores.amax(1)`.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Per block: scores `[T, block]`, the new maximum, the weights from there, the factor `exp(m - new_m)` for what was
# summed before, **both** for the sum and for `acc` (`shrink[:, None]`). `k.split(block)` gives the last block what is
# left.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** After each block the three definitions hold for the keys seen so far: the proof by induction of the chapter,
# as a loop. m starts at -inf here, and from the first block on it is finite, as every query sees every key. With a mask
# a query may see nothing of a block: then -inf - (-inf) has to be avoided (exercise 5.2).
#
# The other way is two passes: one over the keys for the maximum and the sum, one for the output. It needs no factors,
# and reads the keys twice.

# %% [markdown]
# ## Exercise 5.1: merging two partial results
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | a step beyond: the running softmax without an order | 2 of 5 | 20 | Milakov and Gimelshein, 2018, 3.1 |
#
# The chapter walks over key blocks from left to right. But two partial results of *any* two sets of keys can be merged
# into that of all their keys, so blocks may be taken in any order, or by different programs. Write that merge. It must
# be
#
# - **associative and commutative**: any grouping and any order give the same, up to rounding;
# - **with a neutral element**: the partial result of no keys is `m = -inf`, `l = 0`, `acc = 0`. Merging with it changes
#   nothing; two of them give it again. In one call some queries may have keys on both sides, some on one, some on none.
# - **safe**: scores of ±1,000 or -10¹⁰ give neither `inf` nor NaN.
#
# Any number of leading dimensions must work. The numbers of both sides are all fp32 or all fp64, and stay so. Return
# new tensors, with no memory of the inputs', even where one side is empty, and leave the inputs alone.

# %%
Partial = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def merge(a: Partial, b: Partial) -> Partial:
    """The partial result of the keys of a and b together.  Each: m [..., T], l [..., T], acc [..., T, D]"""
    ### BEGIN SOLUTION
    m = torch.maximum(a[0], b[0])  # [..., T]
    origin = m.masked_fill(m == float("-inf"), 0.0)  # no keys on either side: -inf - 0, not -inf - (-inf)
    total, acc = torch.zeros_like(m), torch.zeros_like(a[2])
    for part_m, part_l, part_acc in (a, b):
        shrink = torch.exp(part_m - origin)  # [..., T], at most 1
        total = total + part_l * shrink
        acc = acc + part_acc * shrink[..., None]
    return m, total, acc
    ### END SOLUTION


# %%
check("5.1", merge)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Both sides count their exponentials from their own maximum. Bring both to the same one: by which factor does
# `exp(s - m)` change when `m` becomes `m'`?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# The larger maximum makes both factors at most 1, so nothing overflows. One case is left: both maxima are `-inf`, and
# their difference is NaN. There any finite number may stand in for the common maximum, since `exp(-inf)` is 0.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** $e^{s - m'} = e^{s - m}\,e^{m - m'}$ holds for each key, so it holds for sums of keys: factors $e^{m_a - m'}$
# and $e^{m_b - m'}$ bring both sides to the origin $m' = \max(m_a, m_b)$, and then sums of disjoint sets add. What
# comes out depends on the set of keys alone, so order and grouping cannot matter; in floating point they change the
# last bits. Sets under union with the empty set: a commutative monoid, which is what a parallel reduction needs.
#
# The other way is to return $(\text{acc}/l,\; m + \log l)$, two numbers less to carry: exercise 5.4. The package's
# kernel starts with $m = -10^{30}$ instead of $-\infty$: finite, so no case is needed, as long as real scores are
# larger.

# %% [markdown]
# ## Exercise 5.2: one tile, with a sink
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | a step beyond: causal, any dtype, from a start that is not empty | 3 of 5 | 30 | Xiao et al., 2024; gpt-oss, 2025 |
#
# The core, 5.0, as a kernel has it: one tile of queries of one head, causal. Query i stands at position `position + i`
# and sees the keys at positions up to its own; key j stands at position j. (`position` is S - T when the last query is
# the last token, but do not rely on it. It may be negative: a query before the first key sees nothing.) Scores are
# `q · k / sqrt(D)`.
#
# The step beyond: gpt-oss gives each head a **sink**, a trained number that takes part in the softmax like the score
# of one more key that every query sees and whose value is 0. It costs no pass of its own: think about where it can
# enter the running state.
#
# - Return the output `[T, D]` in `q`'s dtype and the log-sum-exp `[T]` in fp32, the sink counted in both.
# - Compute in fp32 from the inputs on, whatever their dtypes (q may have another than k and v).
# - A query that sees nothing gets output 0, and as log-sum-exp the sink, or `-inf` without one.
# - Keys that no query of the tile sees are not visited: what stands there may even be NaN. One exception: the rest of
#   the last visited block, which is finite. (Each query has its own mask, in any block.) `block` need not divide
#   anything.
# - Never hold more than `T x block` scores, nor a mask or a sum of them that is larger.
# - Scores may be -10¹⁰: what hides a key must be lower still.


# %%
def flash_tile(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: int, block: int, sink: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of one tile.  q [T, D], k and v [S, D] -> (out [T, D], log-sum-exp [T])"""
    ### BEGIN SOLUTION
    tokens, size = q.shape
    positions = position + torch.arange(tokens)[:, None]  # [T, 1]
    m = torch.full((tokens,), float("-inf") if sink is None else sink)
    total = torch.full((tokens,), 0.0 if sink is None else 1.0)
    acc = torch.zeros(tokens, size)
    end = max(0, min(len(k), position + tokens))  # one past the last key that some query sees
    for start in range(0, end, block):
        keys = torch.arange(start, min(start + block, end))
        scores = q.float() @ k[keys].float().T / size**0.5  # [T, block]
        scores = scores.masked_fill(keys > positions, float("-inf"))
        new_m = torch.maximum(m, scores.amax(1))  # [T]
        origin = new_m.masked_fill(new_m == float("-inf"), 0.0)
        weights, shrink = torch.exp(scores - origin[:, None]), torch.exp(m - origin)
        total = total * shrink + weights.sum(1)
        acc = acc * shrink[:, None] + weights @ v[keys].float()
        m = new_m
    out = acc / total.masked_fill(total == 0, 1.0)[:, None]
    return out.to(q.dtype), m + torch.log(total)
    ### END SOLUTION


# %%
check("5.2", flash_tile)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The sink is a partial result of one key: its largest score is the sink, `l` is `exp(0)`, `acc` is 0. What is the
# state before the first block?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# The loop ends at the last key that the *last* query of the tile sees. A row may still see nothing of a block, or of
# any block: its maximum stays `-inf`, and needs the care of exercise 5.1. `-inf + log(0)` is `-inf`, as wanted.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** The softmax over S keys and the sink has the denominator $e^{\text{sink}} + \sum_j e^{s_j}$, and the sink's
# value is 0: it enters `m` and `l` and leaves `acc` alone. Starting from it, the loop runs as always. A head with
# nothing to say then gives 0 without needing a first token to look at (chapter 2 saw heads put their whole weight
# there).
#
# The other way is to run without the sink and multiply the result by
# $\sigma(\text{lse} - \text{sink})$: kernels that return the log-sum-exp can be given sinks from outside.

# %% [markdown]
# ## Exercise 5.3: which blocks a tile visits
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | a step beyond, optional: skip the hidden, mask the partial | 4 of 5 | 30 | Dao, 2023, 3.1; Beltagy et al., 2020 |
#
# A tile holds the queries `first` ... `first + block_m - 1` of `len_q`; the last tile may be short. The last query
# stands at the last key, so query i is at position p = i + len_k - len_q. With the window `(left, right)` it sees the
# keys
#
# $$p - \text{left} \;\le\; j \;\le\; p + \text{right}, \qquad 0 \le j < \text{len}_k$$
#
# where -1 means no limit on that side, whatever the lengths (FlashAttention's convention; causal is `(-1, 0)`, and the
# package's `window=W` is `(W - 1, 0)`). Key block b holds the keys `b · block_n` ... `(b + 1) · block_n - 1`. It is
#
# - **whole** when every query of the tile sees all of its `block_n` keys: no mask is needed;
# - **hidden** when no query sees any of its keys: it is not visited;
# - **masked** otherwise. A last block that reaches past `len_k` is never whole.
#
# Return four block indices `(begin, whole_begin, whole_end, end)` with begin ≤ whole_begin ≤ whole_end ≤ end: blocks
# from begin to whole_begin are masked, to whole_end whole, to end masked, all others hidden. A kernel then runs three
# loops. When all are hidden, begin = end. The four are `int`. The chapter's kernel has the two causal cases; here the
# window also looks ahead. A kernel cannot afford to look at pairs, so neither may you: lengths of 10¹² must take no
# time.


# %%
def block_ranges(
    first: int, block_m: int, block_n: int, len_q: int, len_k: int, left: int = -1, right: int = 0
) -> tuple[int, int, int, int]:
    """(begin, whole_begin, whole_end, end): masked, whole and masked key blocks of the tile that starts at `first`"""
    ### BEGIN SOLUTION
    lowest = first + len_k - len_q
    highest = min(first + block_m, len_q) - 1 + len_k - len_q
    # Keys seen by some query of the tile: from some_from to some_to - 1; by all of them: from all_from to all_to - 1.
    some_from, some_to, all_from, all_to = 0, len_k, 0, len_k
    if left >= 0:
        some_from, all_from = max(lowest - left, 0), max(highest - left, 0)
    if right >= 0:
        some_to, all_to = min(highest + right + 1, len_k), min(lowest + right + 1, len_k)
    if some_from >= some_to:
        return 0, 0, 0, 0
    begin, end = some_from // block_n, -(-some_to // block_n)
    whole_begin, whole_end = -(-all_from // block_n), max(all_to, 0) // block_n
    if whole_begin >= whole_end:
        return begin, begin, begin, end
    return begin, whole_begin, whole_end, end
    ### END SOLUTION


# %%
check("5.3", block_ranges)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# All queries of the tile lie between its lowest and its highest position. *Some* query sees a key if the union of their
# windows holds it, *all* do if the intersection does. Both are ranges: which of the two positions limits which end?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# From a range of keys to blocks: a block is visited if it *touches* the union (round begin down, end up), and whole if
# it lies *inside* the intersection (round begin up, end down). Then care for an empty union and an empty intersection.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Windows of neighboring queries are shifted by one. Their union runs from the lowest query's left end to the
# highest one's right end, their intersection from the highest one's left end to the lowest one's right end. With `left
# < block_m - 1` the intersection can be empty: then every visited block is masked. Work per tile is `end - begin`
# blocks: causal attention visits half, a window of W about (W + block_m) / block_n, however long the text.
#
# The other way, `flex_attention`'s `create_block_mask`, evaluates any mask function on all pairs once and keeps lists
# of whole and of partial blocks: general, and it costs memory and time in the number of pairs.

# %% [markdown]
# ## Exercise 5.4: combining splits of a long context
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | a step beyond: what decoding over a long context ends with | 3 of 5 | 20 | Dao et al., 2023, "Flash-Decoding" |
#
# One new token against 100,000 keys: one query a head, too few tiles to fill a GPU. So the context is split into N
# chunks, each chunk's attention is computed by its own program, and a second kernel combines. Each program hands over
# what kernels hand over: its **normalized** output and its log-sum-exp (natural logarithm), not `(m, l, acc)`.
#
# Sequences of a batch have different lengths while the grid has one size, so some chunks hold no key. Their program
# writes `-inf` as log-sum-exp and returns early: their output is **whatever stood in memory before**, even NaN.
#
# - Return the attention over all chunks `[B, H, D]` and its log-sum-exp `[B, H]`.
# - Outputs may come in fp16 or bf16; compute in fp32, and return the output in their dtype, the log-sum-exp in fp32.
# - A NaN in a chunk that has keys is a mistake made before, and must show, however small that chunk's share is.
# - A sequence without any key gets 0 and `-inf`. Log-sum-exps of ±1,000 are no problem.
# - N may be 1: the same holds, and what is returned is new, with no memory of the inputs'.
# - No Python loop over chunks: the reduction is a handful of tensor operations. Inputs stay as they are.


# %%
def combine_splits(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """outs [N, B, H, D], lses [N, B, H] in fp32 -> (out [B, H, D] in outs' dtype, lse [B, H] in fp32)"""
    ### BEGIN SOLUTION
    m = lses.amax(0)  # [B, H]
    m = m.masked_fill(m == float("-inf"), 0.0)
    share = torch.exp(lses - m)  # [N, B, H]: each chunk's sum, from the common origin
    total = share.sum(0)  # [B, H]
    values = outs.float().masked_fill((lses == float("-inf"))[..., None], 0.0)  # [N, B, H, D]: 0 · NaN would be NaN
    out = (share[..., None] * values).sum(0) / total.masked_fill(total == 0, 1.0)[..., None]  # [B, H, D]
    return out.to(outs.dtype), m + torch.log(total)
    ### END SOLUTION


# %%
check("5.4", combine_splits)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A chunk's output is `acc / l`, and its log-sum-exp is the logarithm of the sum of `exp(score)` over its keys. The
# whole softmax weights each chunk by the share of its sum in the sum of all sums.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# So the weights are a softmax of the log-sum-exps over the chunks. `torch.softmax` fails where all of them are `-inf`.
# And multiplying by a weight of 0 does not remove a NaN: the leftover itself has to go first. Which chunks are empty
# is said by `-inf`, not by a weight of 0: that may also be the weight of a chunk with keys, `exp(-120)`.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** With $L_n = \sum_{j \in n} e^{s_j} = e^{\text{lse}_n}$ and $\text{out}_n = \frac{1}{L_n}\sum_{j \in n}
# e^{s_j} v_j$, the attention over all keys is $\sum_n L_n\, \text{out}_n / \sum_n L_n$. It is exercise 5.1 with $m =
# \text{lse}$ and $l = 1$: a normalized result is a partial result too. Half-precision outputs are rounded once more
# than needed, which is why workspaces are often fp32.
#
# Which leftovers go is asked of the log-sum-exp. Asking the weight (`share > 0`) looks the same and is not: beside a
# log-sum-exp of 0 one of -120 has a share that is 0 in fp32, and a NaN in that chunk would be silenced. With the value
# left in, 0 · NaN is NaN, and shows.
#
# The same function merges attention over a shared prefix with that over each sequence's own suffix (cascade
# attention), results of several GPUs that hold parts of the context (ring attention), and a cache in two memories.
# Chapter 7's paged decode kernel ends in it.

# %% [markdown]
# ## Exercise 5.5: a kernel with a bias
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | a step beyond, optional: one head in Triton, with ALiBi made on the spot | 4 of 5 | 45 | Press et al., 2022 |
#
# Write a causal FlashAttention forward for one head, in Triton, with ALiBi: in place of positions in q and k, each
# score gets a penalty that grows with the distance, $q_i \cdot k_j / \sqrt{D} - \text{slope} \cdot (i - j)$ for j ≤ i.
# Nothing of size T x T may exist, neither scores nor biases: a kernel knows i and j.
#
# Program n takes the queries `n · BLOCK_M` ... of T. q, k, v and the output are contiguous `[T, D]`, fp32 or fp16; D is
# a power of two of at least 16; T is anything. Blocks of keys that the tile cannot see are not visited. The running
# state is fp32, whatever the scores are, and every `tl.dot` gets `input_precision="ieee"` (without it a GPU cuts fp32
# to TF32). Nothing is read or written outside of the tensors: loads past the end need a mask, of q, k and v, and so
# does the store.
#
# `flash_alibi` allocates and launches: `alibi_kernel[(number of programs,)](arguments ...)`.


# %%
@triton.jit
def alibi_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, T, scale, slope,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The attention of the queries program_id(0) · BLOCK_M ... of one head; q, k, v, o [T, D] contiguous"""
    ### BEGIN SOLUTION
    first, offs_d = tl.program_id(0) * BLOCK_M, tl.arange(0, D)
    offs_m = first + tl.arange(0, BLOCK_M)
    q = tl.load(q_ptr + offs_m[:, None] * D + offs_d, mask=offs_m[:, None] < T, other=0.0)  # [BLOCK_M, D]
    row_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    row_sum, acc = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M, D), tl.float32)
    for start in range(0, tl.minimum(first + BLOCK_M, T), BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        offs_kv, inside = offs_n[:, None] * D + offs_d, offs_n[:, None] < T
        k = tl.load(k_ptr + offs_kv, mask=inside, other=0.0)  # [BLOCK_N, D]
        v = tl.load(v_ptr + offs_kv, mask=inside, other=0.0)
        back = offs_m[:, None] - offs_n[None, :]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale - slope * back  # [BLOCK_M, BLOCK_N]
        scores = tl.where(back >= 0, scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))  # finite from the first block on: every query sees key 0
        weights, shrink = tl.exp(scores - new_max[:, None]), tl.exp(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        row_max = new_max
    out = (acc / row_sum[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + offs_m[:, None] * D + offs_d, out, mask=offs_m[:, None] < T)
    ### END SOLUTION


def flash_alibi(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slope: float, block_m: int = 16, block_n: int = 16
) -> torch.Tensor:
    """Launch alibi_kernel.  q, k, v [T, D] contiguous -> [T, D] in q's dtype"""
    ### BEGIN SOLUTION
    out = torch.empty_like(q)
    grid = (triton.cdiv(len(q), block_m),)
    alibi_kernel[grid](q, k, v, out, len(q), q.shape[1] ** -0.5, slope, D=q.shape[1], BLOCK_M=block_m, BLOCK_N=block_n)
    return out
    ### END SOLUTION


# %%
check("5.5", flash_alibi)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Exercise 5.2 in Triton's words: `tl.arange` for positions, `tl.load(pointer + offsets, mask=..., other=0.0)` for a
# block, `tl.dot` for products, `tl.max(x, 1)` and `tl.sum(x, 1)` for rows. The distance is a column of query positions
# minus a row of key positions, and the mask is its sign.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# The loop runs over `start` from 0 to the smaller of `first + BLOCK_M` and T, in steps of BLOCK_N. `tl.dot` wants both
# sides of one dtype: turn the weights into `v.dtype` before the second product, and let the accumulator stay fp32. Past
# T, the offsets of keys are larger than every real query's: the causal mask hides them. Rows past T are not stored.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** The bias is a function of i and j, and a program has both in registers: it costs two instructions a score and
# no bytes. Passing a mask or a bias *tensor* to SDPA costs T² reads, brings the bytes back that FlashAttention saved,
# and takes some fused kernels out of the choice. `flex_attention` generates kernels from such functions.
#
# Keys far away get a weight of at most $e^{-\text{slope} \cdot \text{distance}}$ times the difference of scores, and
# with the walk from left to right each block brings a new maximum, so `acc` is rescaled every time. Walking from right
# to left would almost never rescale. The result is the same: exercise 5.1.
#
# What a real kernel does more: 2^x with the scale folded in, whole blocks without the mask, heads and sequences as
# further axes of the grid, descriptors and pipelining. The chapter adds them one by one.
