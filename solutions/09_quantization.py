# %% [markdown]
# # Exercises 9: quantization
#
# Eight exercises on [chapter 9](../chapters/09_quantization.md) and its [lab](../notebooks/09_quantization.ipynb):
# three **warm-ups** of five minutes (9.1 to 9.3), the **core** (9.4 and 9.5), and three steps **beyond** (9.6 to 9.8,
# optional), which go on where chapter and lab stop: rows that end within a word, a scale that learns, bugs in earnest.
#
# Run the next cell, then take the exercises in any order. Replace `raise NotImplementedError(...)` by your code and
# run the `check` cell under it: it says which contracts hold, and on a failure what was expected and what came.
#
# Conventions, in all of them: integers are **signed**, of b bits from -2^(b-1) to 2^(b-1) - 1. A weight w is stored as
# `q = clamp(round(w / scale) + zero)` and read back as `(q - zero) * scale`. Rounding is to the nearest, ties to the
# even integer, as `torch.round` does. Tensors may have any strides (a transposed view). What is passed in stays as it
# is, and what comes back shares no memory with it.

# %%
import math

import torch

from minillm.learn import check

# %% [markdown]
# ## Exercise 9.1: by hand
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: one scale, one zero point, four weights | 1 of 5 | 5 | Jacob et al., 2018, 2.1 |
#
# Take a pencil. Four weights share one asymmetric grid of **3 bits**, integers from -4 to 3:
#
# $$w = (-0.5,\; 0,\; 0.4,\; 1.6)$$
#
# 1. The grid reaches from the smallest to the largest weight in 2³ - 1 steps. What is `scale`?
# 2. The smallest weight should get the smallest integer: `zero = round(-4 - smallest / scale)`. What is it?
# 3. Which integers are stored, and which numbers are read back?
# 4. Later a weight of 2.4 comes, for which the grid was not made. What is it read back as?
#
# Return the five answers: `(scale, zero, [four integers], [four numbers], one number)`.


# %%
def by_hand() -> tuple[float, int, list[int], list[float], float]:
    """(scale, zero, what is stored, what is read back, what 2.4 is read back as)"""
    ### BEGIN SOLUTION
    return 0.3, -2, [-4, -2, -1, 3], [-0.6, 0.0, 0.3, 1.5], 1.5
    ### END SOLUTION


# %%
check("9.1", by_hand)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The range is 1.6 + 0.5 wide, and 8 integers have 7 steps between them.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# -4 + 0.5 / 0.3 is -2.33, which rounds to -2. Then divide each weight by the scale, round, add the zero point, and cut
# to -4 ... 3. Reading back, the zero point is taken off again.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** The scale is 2.1 / 7 = 0.3. Zero falls on an integer, -2, so a weight of 0 is read back as 0: pruned
# weights and padding stay what they were. The price stands in the ends: the grid that holds 0 exactly reaches from
# (-4 + 2) · 0.3 = -0.6 to (3 + 2) · 0.3 = 1.5, not from -0.5 to 1.6. Rounding the zero point moved it by a third of a
# step. 2.4 would be integer 8 - 2 = 6 and is cut to 3: 1.5, an error of three steps. That is *clipping*.

# %% [markdown]
# ## Exercise 9.2: honest bits
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: what "4 bits" weigh | 1 of 5 | 5 | Dettmers and Zettlemoyer, 2023, 2 |
#
# A model has `rounded` weights in groups of `group`. Each is stored in `bits` bits. Each group stores a scale of 16
# bits besides, and, if `has_zero`, a zero point of `bits` bits. The other `kept` weights (embedding, head, norms)
# stay in 16 bits. How many bits a weight is that, over **all** weights of the model?


# %%
def bits_per_weight(bits: int, group: int, has_zero: bool, rounded: int, kept: int = 0) -> float:
    """Bits a weight, scales, zero points and unrounded weights included"""
    ### BEGIN SOLUTION
    each = bits + (16 + (bits if has_zero else 0)) / group
    return (each * rounded + 16 * kept) / (rounded + kept)
    ### END SOLUTION


# %%
check("9.2", bits_per_weight)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A group's scale and zero point are shared by `group` weights: how much of them falls to one?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Then a mean of two kinds of weights, each kind as often as there are such weights.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Groups of 32 with a zero point make 4 bits 4.625, groups of 128 make them 4.16. And a small model is mostly
# embedding: SmolLM2 rounds 106 of its 135 million weights, and "4 bits" in groups of 64 are 6.7 bits a weight. For a
# model of 8 billion the same rule gives about 5.8, as embedding and head are 13 % of it.

# %% [markdown]
# ## Exercise 9.3: signal to noise
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: one number for how much rounding costs | 1 of 5 | 5 | Widrow and Kollár, 2008, 1 |
#
# The signal-to-quantization-noise ratio of a tensor `w` and what is read back for it, in decibels:
#
# $$\text{SQNR} = 10 \log_{10} \frac{\sum w^2}{\sum (w - \hat{w})^2}$$
#
# over all elements, as a Python float. Infinite if nothing was lost. Half-precision inputs must not spoil it: compute
# in fp64.


# %%
def sqnr(w: torch.Tensor, back: torch.Tensor) -> float:
    """The ratio in decibels; w and back of one shape, of any floating dtype"""
    ### BEGIN SOLUTION
    signal, noise = w.double().square().sum(), (w.double() - back.double()).square().sum()
    return math.inf if noise == 0 else 10 * math.log10(float(signal / noise))
    ### END SOLUTION


# %%
check("9.3", sqnr)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Two sums of squares. Turn both tensors into fp64 **before** you subtract.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Python refuses to divide a float by 0.0, and torch makes NaN of 0 / 0: look at the noise first.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Squares of small fp16 numbers are 0 (the smallest is 6e-8), and sums of many bf16 numbers stop growing.
# A ratio of sums weights large elements more than a mean of row ratios would. It is what matters to a product: the
# relative error of y = x W^T follows it, as long as the error has nothing to do with x. Chapter 10 begins where it has.

# %% [markdown]
# ## Exercise 9.4: scale and zero point
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | core: an asymmetric grid that holds 0 | 2 of 5 | 20 | Jacob et al., 2018, 2.1 and 3 |
#
# Find the asymmetric grid of each row of `w` [N, K], as exercise 9.1 did by hand.
#
# - `scale` [N] is fp32: the row's range over the number of steps, 2^bits - 1. The range goes from the smallest to the
#   largest number of the row and **always holds 0**: if all numbers of a row are positive, it starts at 0; if all are
#   negative, it ends there.
# - `zero` [N] is int32: the integer that stands for 0, `first - smallest / scale` rounded, where `first` is the
#   smallest integer. It lies within the integers' limits.
# - 0 is then read back as exactly 0, and every number of the row to within half a scale.
# - A row of zeros has scale 1, and is read back as zeros.
# - `w` may be fp32, fp16 or bf16; compute in fp32. It stays as it is. ValueError if it holds NaN or infinity.


# %%
def grid(w: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale [N] fp32, zero [N] int32) of w [N, K]"""
    ### BEGIN SOLUTION
    if not bool(w.isfinite().all()):
        raise ValueError("w: expected finite numbers, got NaN or infinity")
    first, last = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low, high = w.float().amin(1).clamp(max=0), w.float().amax(1).clamp(min=0)  # [N] each
    scale = (high - low) / (last - first)
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, (first - low / scale).round().clamp(first, last).to(torch.int32)
    ### END SOLUTION


# %%
check("9.4", grid)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `amin` and `amax` give each row's ends; `clamp` makes the range hold 0. What happens to a row of zeros when you divide
# by its scale?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `torch.where(scale > 0, scale, 1.0)`. The zero point follows from the widened lower end, so that -low / scale lies
# between 0 and 2^bits - 1.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** A grid that does not hold 0 turns every 0 into a small number: padding, pruned weights and ReLU's zeros
# become a bias that all products share. A row of positive numbers pays for it with integers that nothing uses, which
# a float offset (GGUF's Q4_1, torch's CPU kernel) avoids.
#
# Number of steps, not number of integers: 2^bits - 1. With 2^bits the largest weight of each row would be cut by one
# step, or the range's end would never be reached.

# %% [markdown]
# ## Exercise 9.5: fake quantization in groups
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | core: what a weight is after it was stored and read back | 2 of 5 | 20 | Frantar et al., 2023, 4 (grouping) |
#
# Round `w` [..., K] symmetrically, every `group` neighbors of a row by a scale of their own, and return what is read
# back, in w's shape and dtype.
#
# - `scale` = max|w| of the group over **half the number of steps**, (2^bits - 1) / 2: 7.5 for 4 bits. The largest
#   number then falls half a step beyond the last integer: cut to -2^(bits-1) ... 2^(bits-1) - 1.
# - Ties go to the even integer. A group of zeros stays zeros.
# - Compute in fp32, whatever w's dtype is; turn the result into w's dtype at the end.
# - `w` may have any number of dimensions and any strides (a transposed view), and stays as it is.
# - ValueError if groups do not fill a row.


# %%
def fake_quantize(w: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """What w is after it was stored in `bits` bits, a scale every `group` weights.  [..., K] -> [..., K]"""
    ### BEGIN SOLUTION
    if w.shape[-1] % group:
        raise ValueError(f"group: expected a divisor of the row length {w.shape[-1]}, got {group}")
    first, last = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    groups = w.float().unflatten(-1, (-1, group))  # [..., G, group]
    scale = groups.abs().amax(-1, keepdim=True) / ((last - first) / 2)
    scale = torch.where(scale > 0, scale, 1.0)
    return ((groups / scale).round().clamp(first, last) * scale).reshape(w.shape).to(w.dtype)
    ### END SOLUTION


# %%
check("9.5", fake_quantize)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `unflatten(-1, (-1, group))` cuts the last axis into groups without caring about strides. Everything else happens
# along the new last axis.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `keepdim=True`, so that the scale [..., G, 1] divides its group and no other. Cut *after* rounding: 7.5 rounds to 8,
# which 4 bits do not have.
# </details>

# %% [markdown] tags=["solution"]
# **Why 7.5.** With max|w| / 7 the integer -8 is never used: 15 of 16 levels. With 7.5 all are, the step is 7 % smaller,
# and so is the rounding error of every other weight; the largest one pays with half a step, cut to 7 or moved to -8.
# What matters more is that all tools that touch a checkpoint agree: torchao had three different answers in one pipeline
# (7.5 against 7 or 8), and models that were trained for one grid were exported on another.

# %% [markdown]
# ## Exercise 9.6: eight weights in a word (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: pack and unpack int4 | 3 of 5 | 25 | Frantar et al., 2024 (Marlin), 3 |
#
# Torch has no tensors of 4 bits. Checkpoints store eight of them in an int32.
#
# - `pack(q)`: q int8 [N, K], each from -8 to 7 -> int32 [N, ceil(K / 8)]. Word j of a row holds the numbers 8j to
#   8j + 7, each as q + 8 (0 to 15) in four bits, the first in the **lowest** bits. What is left of the last word is 0.
# - `unpack(words, k)`: the first k numbers of each row, int8 [N, k].
# - `pack` raises ValueError for numbers outside -8 ... 7: they would spill into their neighbors.
# - Inputs stay as they are; N may be 0. Work on whole tensors: a loop over 4,096 x 4,096 weights takes minutes (the
#   check cannot see one).


# %%
class Int4:
    """Numbers of 4 bits, eight in an int32."""

    @staticmethod
    def pack(q: torch.Tensor) -> torch.Tensor:
        """int8 [N, K] -> int32 [N, ceil(K / 8)]"""
        ### BEGIN SOLUTION
        if bool(((q < -8) | (q > 7)).any()):
            raise ValueError("q: expected numbers from -8 to 7")
        count = -(-q.shape[1] // 8)
        digits = torch.zeros(len(q), count * 8, dtype=torch.int64)
        digits[:, : q.shape[1]] = q.long() + 8
        words = (digits.unflatten(1, (count, 8)) << torch.arange(0, 32, 4)).sum(-1)  # [N, count], up to 2^32
        return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)
        ### END SOLUTION

    @staticmethod
    def unpack(words: torch.Tensor, k: int) -> torch.Tensor:
        """int32 [N, W] -> int8 [N, k]"""
        ### BEGIN SOLUTION
        digits = (words[:, :, None] >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15  # [N, W, 8]
        return (digits.flatten(1)[:, :k] - 8).to(torch.int8)
        ### END SOLUTION


# %%
check("9.6", Int4)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Numbers to [N, W, 8], shifted by (0, 4, ..., 28), summed. Sums of disjoint bits are what `|` would give.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Work in int64: the eighth number reaches into the sign bit of an int32. A word of 2^31 or more is 2^32 less as an
# int32. Unpacking, `>>` drags copies of the sign bit along: mask with 15.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Which number lies where is a convention, and there are three in use: compressed-tensors and GPTQ store
# neighbors from the lowest bits up (GPTQ down the rows, not along them), AWQ stores 0, 2, 4, 6, 1, 3, 5, 7, so that one
# mask of a word gives a GPU pairs that lie side by side in fp16. Marlin orders whole tiles. A kernel chooses, and a
# loader must convert.
#
# Stored as q + 8, a number needs no sign extension: mask, subtract. Speed of packing is no detail: a Python loop took
# AutoGPTQ four minutes a layer, tensor operations 120 times less.

# %% [markdown]
# ## Exercise 9.7: a gradient through rounding (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: the straight-through estimator with clipping, a scale that learns | 4 of 5 | 30 | Esser et al., 2020, 2.1 |
#
# Rounding has slope 0 almost everywhere: nothing would learn. The **straight-through estimator** pretends in backward
# that `round(x)` was `x`. Write symmetric fake quantization whose weights *and scale* get a gradient.
#
# - Forward, exactly: `clamp(round(w / scale), first, last) * scale`, w [N, K], scale [N, 1], integers of `bits` bits.
# - Backward to `w`: the output's gradient where `first <= w / scale <= last`, and 0 where the number was cut, since
#   there a small change of w changes nothing.
# - Backward to `scale`, with the same pretense: differentiate `clamp(w / scale) * scale` with the rounding error held
#   fixed. For x = w / scale inside the limits the slope is `round(x) - x`; where it was cut, `first` or `last`. Summed
#   over the row: [N, 1].
# - In fp32 and fp64: computed and returned in w's dtype. Inputs stay as they are.


# %%
def fake_quantize_ste(w: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Fake quantization that passes gradients.  w [N, K], scale [N, 1] -> [N, K]"""
    ### BEGIN SOLUTION
    x = (w / scale).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)  # its gradient is 0 where it cuts
    return (x + (x.round() - x).detach()) * scale
    ### END SOLUTION


# %%
check("9.7", fake_quantize_ste)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Add something to x that makes it `round(x)` and that autograd does not see. And look up what gradient `torch.clamp`
# has: inside, outside, and on its limits.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Clamp first, then round with `.detach()` around the difference (the limits are whole numbers, so the value is the
# same), then multiply by the scale. Let autograd do the product rule: the scale appears twice.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Inside, d(x̄ s)/ds = round(x) + s · dx/ds = round(x) - w/s: a scale that is too large sees its rounding
# errors, one that is too small sees the cut numbers pull it up by `last` each. The two balance: LSQ finds the clipping
# that minmax does not look for. Esser et al. scale this gradient by 1 / sqrt(K · last), as it sums over many weights
# and would otherwise move the scale much faster than weights move.
#
# Passing the gradient where numbers were cut ("STE without clipping") is a common mistake: such weights drift outward
# without end, as nothing in the loss tells them that they have arrived.

# %% [markdown]
# ## Exercise 9.8: find three bugs (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: mend a writer and a reader | 3 of 5 | 25 | vLLM issue 38966 and torchao issue 4824, for two of them |
#
# The cell below writes and reads weights in 4 bits. The format says:
#
# - `packed` int32 [N, K/8]: the eight numbers of a word from its **lowest** bits up, each stored as q + 8.
# - `scale` fp32 [N, K/group]. Symmetric: max|w| / 7.5. Asymmetric: (high - low) / 15 over a range that holds 0.
# - `zero` int32 [N, K/group], only if asymmetric: the integer z that stands for 0, stored **as it is**.
# - w = (q - z) · scale, z = 0 if symmetric. No group is all zeros.
#
# Three mistakes were planted, each made in earnest by well-known tools. One makes weights a little worse, one makes a
# model answer «!!!!», and one **cannot be seen** by writing and reading back. Write the mended pair: the same
# methods, the same names of tensors. K is a multiple of 8, and of `group`.

# %%
SHIFTS = torch.tensor([28, 24, 20, 16, 12, 8, 4, 0])


class Broken:
    """Weights in 4 bits on disk. Three mistakes."""

    @staticmethod
    def write(w: torch.Tensor, group: int, symmetric: bool) -> dict[str, torch.Tensor]:
        """w [N, K] -> the tensors of the file"""
        groups = w.unflatten(1, (-1, group))  # [N, G, group]
        if symmetric:
            scale, zero = groups.abs().amax(-1) / 7, torch.zeros(1, dtype=torch.int32)
        else:
            low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
            scale = (high - low) / 15
            zero = (-8 - low / scale).round().clamp(-8, 7).int()
        q = ((groups / scale[..., None]).round() + zero[..., None]).clamp(-8, 7).long() + 8
        words = (q.flatten(1).unflatten(1, (-1, 8)) << SHIFTS).sum(-1)
        file = {"packed": torch.where(words < 2**31, words, words - 2**32).int(), "scale": scale}
        return file if symmetric else file | {"zero": zero - 1}

    @staticmethod
    def read(file: dict[str, torch.Tensor], group: int) -> torch.Tensor:
        """The tensors of a file -> w [N, K]"""
        q = ((file["packed"].long()[..., None] >> SHIFTS) & 15).flatten(1) - 8
        zero = file["zero"] if "zero" in file else torch.zeros_like(file["scale"])
        return ((q.unflatten(1, (-1, group)) - zero[..., None]) * file["scale"][..., None]).flatten(1)


# %% [markdown]
# The pair that keeps to the format:


# %%
class Mended:
    """Weights in 4 bits on disk, as the format says."""

    @staticmethod
    def write(w: torch.Tensor, group: int, symmetric: bool) -> dict[str, torch.Tensor]:
        """w [N, K] -> {"packed": ..., "scale": ...} and, unless symmetric, "zero" """
        ### BEGIN SOLUTION
        parts = w.unflatten(1, (-1, group))
        low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        step = (high - low) / 15
        z = torch.zeros_like(step) if symmetric else (-8 - low / step).round().clamp(-8, 7)
        digits = ((parts / step[..., None]).round() + z[..., None]).clamp(-8, 7).flatten(1).long() + 8
        whole = (digits.unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)).sum(-1)
        found = {"packed": torch.where(whole < 2**31, whole, whole - 2**32).to(torch.int32), "scale": step}
        if not symmetric:
            found["zero"] = z.to(torch.int32)
        return found
        ### END SOLUTION

    @staticmethod
    def read(file: dict[str, torch.Tensor], group: int) -> torch.Tensor:
        """The tensors of a file -> w [N, K] fp32"""
        ### BEGIN SOLUTION
        bits = (file["packed"].long()[..., None] >> torch.arange(0, 32, 4)) & 15  # [N, K/8, 8]
        z = file.get("zero", torch.zeros_like(file["scale"]))[..., None]
        return ((bits.flatten(1).unflatten(1, (-1, group)) - 8 - z) * file["scale"][..., None]).flatten(1)
        ### END SOLUTION


# %%
check("9.8", Mended)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Hold each line of the code against one line of the format. A round trip tells about two of the three; for the third
# write a file of one word by hand: weights 0, 1, 2, ... with scale 1.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Half the number of steps; which end of a word comes first; and what is taken off a zero point that nobody adds again.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** (1) `/ 7` against 7.5: all works, every weight is a little worse, and a model trained for one grid is
# exported on the other (torchao 4824). (2) `zero - 1`: GPTQ's first format stores z - 1, as its kernel adds 1. Who
# reads it without adding shifts every weight by one scale: the model answers «!!!!» (vLLM 38966); and z = 0 becomes
# -1, which as an unsigned nibble is 15. (3) `SHIFTS` runs from the highest bits down, in writer and reader alike:
# reading back what one wrote is no test of a format. Have another program read it, as the package's tests do.
