# %% [markdown]
# # Exercises 10: GPTQ
#
# Eight exercises on [chapter 10](../chapters/10_gptq.md) and its [lab](../notebooks/10_gptq.ipynb): two **warm-ups** of
# five minutes (10.1 and 10.2), the **core** (10.3 and 10.4), and four steps **beyond** (10.5 to 10.8, optional), which
# neither chapter nor lab shows. Two of these are hunts for bugs that well-known tools really had.
#
# Run the next cell, then take the exercises in any order. Replace `raise NotImplementedError(...)` by your code and
# run the `check` cell under it: it says which contracts hold, and on a failure what was expected and what came.
#
# Conventions, in all of them: a layer computes `y = x wᵀ` with a weight w [N, K]; a row of w is one output. **H**
# [K, K] is the **mean** of xᵀ x over the layer's inputs x [K]. Integers of b bits are signed, from -2^(b-1) to
# 2^(b-1) - 1. Tensors need not be contiguous, unless an exercise says that they are.
#
# Without a GPU, exercise 10.7 runs in Triton's interpreter. The variable that turns it on is read when Triton is
# imported: that is why it stands above the imports.

# %%
import os
from collections.abc import Callable

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from minillm.kernels.common import tl, triton
from minillm.learn import check

# %% [markdown]
# ## Exercise 10.1: who absorbs what
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: round one weight, repair the other | 1 of 5 | 5 | Frantar et al., 2023, 3 |
#
# Take a pencil. A row of two weights, **w = (0.4, 0.3)**, is rounded to whole numbers. The layer saw two inputs,
# x = (1, 0) and x = (1, 1). To keep the numbers round, use **sums** over the two inputs here, no means.
#
# 1. H, the sum of xᵀ x?
# 2. The loss, the sum over both inputs of (x · (w - q))², when both weights are rounded to the nearest?
# 3. The first weight is rounded, to 0. To which number should the second one move, before it is rounded, so that the
#    loss becomes smallest?
# 4. It is rounded from there. The loss now?
# 5. The other way around: the second weight is rounded first, the first one moves and is rounded last. The loss?
#
# Return the five answers: `([[h00, h01], [h10, h11]], loss, number, loss, loss)`.


# %%
def by_hand() -> tuple[list[list[float]], float, float, float, float]:
    """(H, loss of rounding to the nearest, where the second weight moves, loss then, loss in the other order)"""
    ### BEGIN SOLUTION
    return [[2, 1], [1, 1]], 0.65, 0.7, 0.25, 0.45
    ### END SOLUTION


# %%
check("10.1", by_hand)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# With d = w - q the loss is 2 d₁² + 2 d₁ d₂ + d₂². Rounding the first weight fixes d₁ = 0.4. Which d₂ makes the rest
# smallest? Then the second weight should have become 0.3 - d₂.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# The slope 2 d₁ + 2 d₂ is 0 for d₂ = -d₁. The other way around d₂ = 0.3 is fixed, and the slope is 4 d₁ + 2 d₂.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Outputs are 0.4 and 0.7. Rounding to the nearest answers 0 and 0: each weight's error is below half, but in
# the second output both add up, 0.16 + 0.49. Repaired, the second weight moves to 0.3 + 0.4 = 0.7 and becomes 1: its
# own error is 0.7, larger than rounding would ever allow, and the outputs are 0 and 1: 0.16 + 0.09.
#
# In the other order the second weight becomes 0, the first should become 0.4 + 0.15 = 0.55, and becomes 1: 0.36 + 0.09.
# The first weight's input is larger (H₁₁ = 2 against 1), so its error should be as small as possible, while there is
# still somebody left to make up for it: act-order rounds columns with a large diagonal first.

# %% [markdown]
# ## Exercise 10.2: what a file of 4 bits weighs
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: bits a weight of one layer, to the byte | 1 of 5 | 5 | Frantar et al., 2023, 4 (grouping) |
#
# A layer [N, K] is stored in 4 bits, in groups of `group` neighbors in a row, which divides K; `group=0` means one
# group, the whole row. The file holds
#
# - the weights: each row in words of 32 bits, 8 weights a word; the last word of a row may not be full;
# - a scale of 16 bits for each group of each row;
# - with `zeros`: a zero point of 4 bits for each group of each row, packed **down** the rows: for each group the N zero
#   points of its column in words of 32 bits, the last of which may not be full;
# - with `order` (act-order whose groups are those of the *sorted* columns): for each of the K columns a word of 32
#   bits that says which group it belongs to.
#
# How many bits of the file are there for each of the N · K weights?


# %%
def bits_per_weight(n: int, k: int, group: int, zeros: bool, order: bool) -> float:
    """All bits of the layer's file over its weights"""
    ### BEGIN SOLUTION
    groups = k // group if group else 1
    bits = 32 * n * -(-k // 8) + 16 * n * groups
    if zeros:
        bits += 32 * -(-n // 8) * groups
    return (bits + (32 * k if order else 0)) / (n * k)
    ### END SOLUTION


# %%
check("10.2", bits_per_weight)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Add up bits, divide once at the end. `-(-k // 8)` is how many words 8 to a word take, rounded up.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Words: N times those of a row. Scales: N times K / group. Zero points: K / group times the words of one column.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Groups of 128 with zero points make 4.16 bits, groups of 32 make 4.63: smaller groups fit better and weigh
# more, so methods may be compared at equal *bits*, not at equal "4 bits". The order's index is nothing in bytes (32 / N
# bits a weight) and much in time: a kernel that looks up each column's group reads scales all over the place. With
# **static groups** (grids of the original groups, found before anything is reordered) the file needs no index at all.

# %% [markdown]
# ## Exercise 10.3: the Hessian
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | core: what a layer's inputs have in common, from batches with padding | 2 of 5 | 20 | Frantar et al., 2023, 3 |
#
# Gather H = **mean** of xᵀ x over all tokens that a layer sees, batch after batch.
#
# - `Hessian(k)` begins with `matrix`, zeros [K, K] in fp32.
# - `add(x, mask)` sees a batch: x [B, T, K]; mask [B, T] bool is True for real tokens, False for padding. `mask=None`:
#   all are real.
# - `matrix` [K, K] is at any time the mean over all **real tokens** seen so far, each counted alike: it does not
#   depend on how tokens are cut into batches. It stays fp32.
# - What stands at padding does not count, be it NaN. A batch of padding alone, or of no token, changes nothing.
# - x may be fp32, fp16 or bf16; the squares of large fp16 numbers must not overflow. Inputs stay as they are, and the
#   caller may overwrite them once `add` has returned.


# %%
class Hessian:
    """The mean of xᵀ x over the tokens seen: `matrix` [K, K], fp32."""

    def __init__(self, k: int) -> None:
        ### BEGIN SOLUTION
        self.matrix, self.tokens = torch.zeros(k, k), 0
        ### END SOLUTION

    def add(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """See a batch.  x [B, T, K], mask [B, T] bool"""
        ### BEGIN SOLUTION
        x = (x.flatten(0, 1) if mask is None else x[mask]).float()  # [tokens, K]
        if len(x):
            self.tokens += len(x)
            self.matrix = self.matrix + (x.T @ x - len(x) * self.matrix) / self.tokens
        ### END SOLUTION


# %%
check("10.3", Hessian)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Index with the mask instead of multiplying by it: 0 · NaN is NaN. Then everything is one matrix [tokens, K], and the
# sum over its tokens is one product.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# A mean of means is right only when each is weighted by its tokens. Keep a sum and a count, or move the old mean toward
# the new one by the new tokens' share. Turn x into fp32 before the product.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Padding is not rare and not harmless: every padded position holds the same embedding, so with long padding
# H is mostly one vector's outer product, and GPTQ spends its repairs on a token that nobody reads (NVIDIA's
# Model-Optimizer had this, issue 1261). A sum instead of a mean would serve GPTQ as well, as any multiple of H gives
# the same result, but a sum in fp32 loses digits once it has become much larger than what is added, and damping that
# is a plain number would mean something else for every amount of text.
#
# The paper's H is 2 xᵀ x, the second derivative of the squared error. The factor changes nothing either.

# %% [markdown]
# ## Exercise 10.4: GPTQ
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | core: round a matrix column by column, repairing the rest | 4 of 5 | 40 | Frantar et al., 2023, 3 |
#
# Round w [N, K], for inputs with Hessian h [K, K], to integers: `q · scale` is read back, one scale a row, [N, 1].
#
# - First h is **damped**: each number of its diagonal grows by `damping` times **itself**.
# - Columns are rounded from the first to the last: `q = clamp(round(w / scale))` in 1 to 8 `bits`. After each, the
#   columns to its right move to where they make up best for its error: where the loss (w - q · scale) H
#   (w - q · scale)ᵀ is smallest, if all that is rounded stays and they were free. The error is what it is after
#   clamping.
# - A **dead** column, whose input was always 0 (its diagonal in h is 0), becomes q = 0, whatever its weights are, and
#   leaves the others as they are.
# - h may be of rank below K (fewer tokens than channels); damping makes it invertible. A multiple of h gives the
#   same q.
# - w and h may be fp32, fp16 or bf16; compute in fp32 or fp64. Inputs stay as they are. Returns int8 [N, K].
#
# Rows share everything but their numbers: loop over columns, not over rows. Blocks and groups are not asked for.


# %%
def gptq(w: torch.Tensor, h: torch.Tensor, scale: torch.Tensor, bits: int, damping: float = 0.01) -> torch.Tensor:
    """w [N, K], h [K, K], scale [N, 1] -> q int8 [N, K]"""
    ### BEGIN SOLUTION
    limits = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    w, h = w.double(), h.double()
    dead = h.diagonal() == 0
    w = w.masked_fill(dead, 0)
    h = h + torch.diag(damping * h.diagonal() + dead)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)  # [K, K]
    q = torch.zeros_like(w)
    for j in range(w.shape[1]):
        q[:, j] = (w[:, j] / scale[:, 0]).round().clamp(*limits)
        error = (w[:, j] - q[:, j] * scale[:, 0]) / upper[j, j]  # [N]
        w[:, j + 1 :] -= torch.outer(error, upper[j, j + 1 :])
    return q.to(torch.int8)
    ### END SOLUTION


# %%
check("10.4", gptq)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Fix an error e in column j. The later columns R serve best if they move by H_RR⁻¹ H_Rj e. That can be solved for each
# column as it stands (slow, and right), read off the inverse of H, or off the inverse's upper Cholesky factor, which
# has all these moves at once.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# With `upper` such that upperᵀ · upper = H⁻¹ (`torch.linalg.cholesky(..., upper=True)`), the move is
# w_i -= (w_j - q_j · scale) / upper_jj · upper_ji for i > j. For dead columns put 1 on the diagonal and 0 in w before
# anything else. Let w be a copy.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Row j of the factor holds what the inverse of H *without the columns before j* has in its first row, divided
# by the root of its first number: that is why it is computed once, and used for all columns. Slicing the plain inverse
# instead (`inverse[j, j+1:] / inverse[j, j]`) is right for the first column only, as later ones may still "move"
# columns that are rounded already. That mistake runs without an error, and is a little better than rounding to the
# nearest, so nobody looks.
#
# The error is taken **after** clamping: a weight beyond the grid's end is a large error, and the largest reason to
# repair. Damping by the own number instead of the mean of all: one channel that is a thousand times as large as others
# makes a hundredth of the mean ten times what the others have (the lab looks at one). The paper, and most tools, add
# the mean. That has its merit, too: of a channel that is nearly dead 1 % is nothing, and repairs run wild into it. So
# the package takes the own number or, where that is larger, the median (the chapter has the numbers).

# %% [markdown]
# ## Exercise 10.5: three bugs in a calibration (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: mend what feeds GPTQ | 3 of 5 | 25 | Model-Optimizer issue 1261 and keras issue 23512, for two of them |
#
# A network is a stack of layers, `x -> relu(x wᵀ)` each. The function below quantizes one layer after another. It
# should keep to this:
#
# - For each layer, in order, `quantize(w, h)` is called once. What it returns is the layer's new weight; the new
#   weights are returned as a list.
# - `h` [K, K] is the mean of xᵀ x over all real tokens of all batches, each token counted alike, in fp32. Batches are
#   (x [B, T, K], mask [B, T] bool), of different sizes; mask is False for padding, where anything may stand.
# - The layer's inputs are those that it will have in the **quantized** network: the layers before it compute with their
#   new weights.
# - `weights` and batches stay as they are.
#
# Three mistakes were planted. With each, everything runs, and the result is a little worse: that is how such bugs live
# on. Write the mended function.


# %%
def broken(
    weights: list[torch.Tensor], batches: list[tuple[torch.Tensor, torch.Tensor]],
    quantize: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> list[torch.Tensor]:  # fmt: skip
    """The weights [N, K] of a stack, quantized. Three mistakes."""
    done, inputs = [], [x for x, _ in batches]
    for w in weights:
        hessians = []
        for x in inputs:
            rows = x.flatten(0, 1)  # [B · T, K]
            hessians.append(rows.T @ rows / len(rows))
        done.append(quantize(w, torch.stack(hessians).mean(0)))
        inputs = [torch.relu(x @ w.T) for x in inputs]
    return done


# %% [markdown]
# The function that keeps to it:


# %%
def quantize_stack(
    weights: list[torch.Tensor], batches: list[tuple[torch.Tensor, torch.Tensor]],
    quantize: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> list[torch.Tensor]:  # fmt: skip
    """weights [N, K] each -> the new weights"""
    ### BEGIN SOLUTION
    x = torch.cat([part[mask] for part, mask in batches])  # [tokens, K]: what is real, of all batches
    found = []
    for w in weights:
        found.append(quantize(w, x.T @ x / len(x)))
        x = torch.relu(x @ found[-1].T)
    return found
    ### END SOLUTION


# %%
check("10.5", quantize_stack)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Hold each sentence of the list against the line that should make it true. What is never used? Who computes the next
# layer's inputs, and with what? When is a mean of means not a mean?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# The mask; the weight in the last line of the loop; batches of different sizes. Tokens of this network do not look at
# each other, so all real tokens can be put into one matrix first.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** (1) Padding was counted: H describes a token that nobody reads. (2) The next layer saw what the *unquantized*
# network gives: it cannot make up for errors that were made before it. In keras all Hessians of a block were collected
# before any of its layers was quantized (issue 23512), which is this bug within a block. (3) A mean of means counts the
# tokens of a small batch more: the last batch of a text usually is one.
#
# In a transformer tokens do look at each other, so padding must stay in the batch, masked in attention, until the
# layer's inputs are taken: that is what `minillm.quant.calibrate.walk` does.

# %% [markdown]
# ## Exercise 10.6: another tool's nibbles (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: convert an AWQ checkpoint, and find what garbles it | 3 of 5 | 30 | Lin et al., 2024 (AutoAWQ's «gemm») |
#
# A layer [N, K] lies in an AWQ file like this:
#
# - `qweight` int32 [K, N/8], `qzeros` int32 [K/g, N/8], `scales` fp16 [K/g, N]. Numbers are unsigned, 0 to 15.
# - A word holds eight **outputs**: its nibble i, counted from the lowest bits, is that of output `8 · j + ORDER[i]`,
#   where j is the word's column and ORDER = 0, 2, 4, 6, 1, 3, 5, 7. Zero points likewise.
# - w = (q - z) · scale.
#
# What `minillm.kernels.w4a16` reads:
#
# - `packed` int32 [N, K/8]: nibble i of word j is weight 8 j + i of the row, stored as q + 8, q from -8 to 7.
# - `scales` fp32 [N, K/g]; `zeros` int8 [N, K/g], from -8 to 7. w = (q - z) · scale: the same weights.
#
# The converter below has three mistakes: one is about the order of nibbles, one shows up in half of the words only,
# and one moves every weight by eight steps. Write the mended one. N and K are multiples of 8; inputs stay as they are.

# %%
ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])


class Broken:
    """From an AWQ file to what w4a16 reads. Three mistakes."""

    @staticmethod
    def unpack(words: torch.Tensor) -> torch.Tensor:
        """int32 [R, N/8] -> int64 [R, N], 0 to 15"""
        nibbles = words[..., None] >> (4 * torch.arange(7)) & 15  # the highest one needs no mask: nothing is above it
        nibbles = torch.cat((nibbles, words[..., None] >> 28), -1)  # [R, N/8, 8]
        return nibbles[..., ORDER].flatten(1).long()

    @staticmethod
    def convert(
        qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """-> packed int32 [N, K/8], scales fp32 [N, K/g], zeros int8 [N, K/g]"""
        q, z = Broken.unpack(qweight).T, Broken.unpack(qzeros).T  # [N, K], [N, K/g]
        words = (q.unflatten(1, (-1, 8)) << 4 * torch.arange(8)).sum(-1)
        packed = torch.where(words < 2**31, words, words - 2**32).int()
        return packed, scales.T.float(), z.to(torch.int8)


# %% [markdown]
# The converter that keeps to both formats:


# %%
def convert_awq(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """[K, N/8], [K/g, N/8], [K/g, N] -> packed int32 [N, K/8], scales fp32 [N, K/g], zeros int8 [N, K/g]"""

    ### BEGIN SOLUTION
    def by_output(stored: torch.Tensor) -> torch.Tensor:
        digits = stored.long()[..., None] >> 4 * torch.arange(8) & 15  # [R, N/8, 8]
        outputs = torch.empty_like(digits)
        outputs[..., ORDER] = digits
        return outputs.flatten(1).T  # [N, R]

    digits = by_output(qweight).unflatten(1, (-1, 8)) << 4 * torch.arange(8)  # [N, K/8, 8]
    total = digits.sum(-1)
    packed = torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)
    return packed, scales.T.float(), (by_output(qzeros) - 8).to(torch.int8)
    ### END SOLUTION


# %%
check("10.6", convert_awq)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Write one word by hand in which output o has the number o: by the format its nibbles, from the lowest, are 0, 2, 4, 6,
# 1, 3, 5, 7. What does `unpack` make of it? And what is `-1 >> 28`?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `a[..., ORDER]` *takes* in that order; here one has to *put* in that order, which is to take in the inverse order,
# `ORDER.argsort()`. And only the weights' offset of 8 was thought of: (q - 8) - z is not q - z.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** (1) An order and its inverse are easily confused, and here they differ: 0, 2, 4, 6, 1, 3, 5, 7 against 0, 4,
# 1, 5, 2, 6, 3, 7. A writer with the same confusion reads its own files back correctly, so a round trip is no test of a
# format. (2) `>>` on a signed integer copies the sign bit: 15 in the highest nibble becomes -1, wherever the word's
# first bit is set. (3) Shifting q and z by the same 8 leaves q - z as it was; shifting one of them does not.
#
# AWQ's order is no whim: masking a word with 0x000F000F gives two numbers in its two halves, which for this order are
# neighboring outputs, as a pair of fp16 wants them.

# %% [markdown]
# ## Exercise 10.7: a kernel that dequantizes (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: y = x wᵀ with packed weights, in Triton | 4 of 5 | 40 | Frantar et al., 2024 (MARLIN) |
#
# x [M, K] is fp32 or fp16, `packed` int32 [N, K/8] (nibble i of word j is weight 8 j + i of the row, stored as q + 8),
# `scales` fp32 [N, K/group], `zeros` int8 [N, K/group]: w = (q - z) · scale. y [M, N] has x's dtype. All are
# contiguous.
#
# Program i does BLOCK_N rows of the weight for all tokens: y's columns i · BLOCK_N and after, with M padded to BLOCK_M
# rows. It goes through K in steps of BLOCK_K and turns the weights of each step into x's dtype where it computes; no
# weight is written to memory. M and N are any numbers; K is a multiple of `group`, and `group` of BLOCK_K. A scale may
# be negative, 0, or too small for fp16. Sums are fp32. `tl.dot` multiplies in x's dtype, with
# `input_precision="ieee"`. Nothing is written beyond y, nor read beyond the inputs (the check cannot see reads). The
# launch is written, but for its `grid`.


# %%
@triton.jit
def w4_kernel(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, y_ptr, m, n, k, group,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of y, for all tokens"""
    ### BEGIN SOLUTION
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    in_n, in_m = offs_n < n, offs_m < m
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, k, BLOCK_K):
        columns = begin + offs_k
        x = tl.load(x_ptr + offs_m[:, None] * k + columns[None, :], mask=in_m[:, None], other=0.0)
        words = tl.load(packed_ptr + offs_n[:, None] * (k // 8) + (columns // 8)[None, :], mask=in_n[:, None], other=0)
        at = offs_n * (k // group) + begin // group
        scale, zero = tl.load(scale_ptr + at, mask=in_n, other=0.0), tl.load(zero_ptr + at, mask=in_n, other=0)
        q = (words >> (columns % 8 * 4)[None, :]) & 15  # [BLOCK_N, BLOCK_K]
        w = (q - 8 - zero[:, None]).to(tl.float32) * scale[:, None]
        acc = tl.dot(x, tl.trans(w.to(x.dtype)), acc, input_precision="ieee")
    keep = in_m[:, None] & in_n[None, :]
    tl.store(y_ptr + offs_m[:, None] * n + offs_n[None, :], acc.to(y_ptr.dtype.element_ty), mask=keep)
    ### END SOLUTION


def w4_linear(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
) -> torch.Tensor:  # fmt: skip
    """Launch the kernel.  x [M, K], packed [N, K/8], scales and zeros [N, K/group] -> [M, N]"""
    (m, k), n, block_n, block_k = x.shape, len(packed), 32, 32
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    ### BEGIN SOLUTION
    grid = (triton.cdiv(n, block_n),)
    ### END SOLUTION
    w4_kernel[grid](
        x, packed, scales, zeros, y, m, n, k, k // scales.shape[1],
        BLOCK_M=max(16, triton.next_power_of_2(m)), BLOCK_N=block_n, BLOCK_K=block_k,
    )  # fmt: skip
    return y


# %%
check("10.7", w4_linear)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Load the words with one pointer for each *weight*: column c lies in word c // 8, so eight neighbors load the same
# word. Then every element shifts by its own 4 · (c % 8), and masks.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# One step lies within one group, as BLOCK_K divides it: scale and zero point are [BLOCK_N], at row · (k // group) +
# begin // group. `tl.trans` turns the weights to [BLOCK_K, BLOCK_N]. Mask rows of x by m, all of w by n, both in the
# store.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** The bytes are right at once: a weight costs half a byte from memory, and is two bytes only in registers. What
# is slow is everything else: eight loads for one word (the cache serves them, but each is an instruction), integer to
# float to fp16 conversions, one program a stripe of N with nothing in flight while it computes. The package's
# `w4a16` loads each word once, makes floats by OR-ing nibbles into an exponent's bits, keeps q - z exact and scales the
# *sum* of a group in fp32, lays words in the order in which tensor cores want them, and splits K where N gives too few
# programs. The chapter measures each of these steps.

# %% [markdown]
# ## Exercise 10.8: AWQ's search (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: scale columns up before rounding | 3 of 5 | 25 | Lin et al., 2024, 3.2 |
#
# AWQ multiplies column k of the weight by s_k before it is rounded, and lets the input be divided by it:
# x wᵀ = (x / s) (w s)ᵀ. Find s for w [N, K] from inputs x [T, K].
#
# - m = mean of **|x|** over the tokens, [K]. A try is s = m^α, divided by the root of (its largest times its smallest
#   number). A channel whose input was always 0 has s = 1 and does not take part in that largest and smallest.
# - α is 0, 1/steps, 2/steps, ..., 1: steps + 1 tries.
# - `quantize(w)` [N, K] -> [N, K] gives what is read back after rounding. A try's loss is the mean square of the
#   **output's** error, between x wᵀ and (x / s) quantize(w s)ᵀ.
# - The smallest loss wins, of equal ones the smallest α. Returns (s fp32 [K], α). Inputs stay as they are; x may be
#   fp16 or bf16: compute in fp32.


# %%
def awq_scale(
    w: torch.Tensor, x: torch.Tensor, quantize: Callable[[torch.Tensor], torch.Tensor], steps: int = 20
) -> tuple[torch.Tensor, float]:  # fmt: skip
    """w [N, K], x [T, K] -> the scale of each column, fp32 [K], and its α"""
    ### BEGIN SOLUTION
    w, x = w.float(), x.float()
    m = x.abs().mean(0)
    alive, least = m > 0, float("inf")
    for step in range(steps + 1):
        s = torch.ones_like(m)
        if bool(alive.any()):
            power = m[alive] ** (step / steps)
            s[alive] = power / (power.max() * power.min()).sqrt()
        loss = float((x @ w.T - (x / s) @ quantize(w * s).T).square().mean())
        if loss < least:
            best, strength, least = s, step / steps, loss
    return best, strength
    ### END SOLUTION


# %%
check("10.8", awq_scale)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A loop over α around the formula. What is 0^α for α = 0, and what for α > 0? Set channels that are dead apart first.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `alive = m > 0`; compute the power of `m[alive]` alone and put it into a tensor of ones. Compare by `<`, so that of
# equal losses the first stays.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** α = 0 is s = 1, plain rounding, so AWQ never loses on its calibration text. α = 1 would make all inputs
# equally large and give the weights all of the difficulty: a column that is ten times as large as its group's others
# then sets the group's step. The best lies between.
#
# Without `abs` the mean of a channel that takes both signs is near 0, and a power of a negative number is NaN: a
# well-known tool had this (llm-compressor issue 1788), another divided by channels that are 0 (AutoAWQ issue 498).
# Dividing by the root of largest times smallest changes nothing for a grid that follows the weights; it keeps both
# x / s and w s in reach of fp16.
