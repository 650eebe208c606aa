# %% [markdown]
# # Exercises 4: GPUs and Triton
#
# Nine exercises on [chapter 4](../chapters/04_gpu_and_triton.md) and its [lab](../notebooks/04_gpu_and_triton.ipynb):
# three **warm-ups** of five minutes (4.w1 to 4.w3), the **core** (4.0, a whole small kernel and its launch), and five
# steps **beyond** (4.1 to 4.5), each a step that neither chapter nor lab shows. Two of these are marked optional.
#
# Run the next cell. Replace `raise NotImplementedError(...)` by your code and run the `check` cell under it. Without an
# NVIDIA GPU the kernels run in Triton's interpreter, on the CPU. It is slow and exact: the checks compare results, and
# count the bytes that your kernel asks for. The interpreter also accepts what no GPU runs, so at the end each kernel is
# compiled for one, which needs none. **No kernel reads or writes anything outside of its tensors.**

# %%
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so it stands above that line

import triton
import triton.language as tl

from minillm.learn import check

# %% [markdown]
# ## Exercise 4.w1: a program's block
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: which elements are a program's own, and which lanes are off | 1 of 5 | 5 | Tillet, Kung and Cox, 2019 |
#
# `n` elements are dealt out in blocks of `block`, one a program, from program 0 on. Return two lists of `block`
# entries: the offsets of program `program`, and its mask: True where the offset lies within the `n` elements.
#
# First on paper: n = 10, blocks of 4, programs 0, 1 and 2.


# %%
def block_of(program: int, block: int, n: int) -> tuple[list[int], list[bool]]:
    """(offsets, mask) of one program, as a kernel would compute them"""
    ### BEGIN SOLUTION
    offsets = [program * block + lane for lane in range(block)]
    return offsets, [offset < n for offset in offsets]
    ### END SOLUTION


# %%
check("4.w1", block_of)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# In Triton: `offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)`, and then `offs < n`.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Lane 0 of program 2 has the offset 2 · 4. The last element is number n - 1.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** All programs run the same code with the same number of lanes; only the number of the program differs. A lane
# that is off still has an offset, but sends no request. Another way: `torch.arange(program * block, (program + 1) *
# block)`, then `< n`, and `.tolist()` on both.

# %% [markdown]
# ## Exercise 4.w2: a tile's offsets
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: a column and a row that broadcast to a tile | 1 of 5 | 5 | Tillet, Kung and Cox, 2019 |
#
# A matrix lies in memory row by row; element (i, j) has the offset i · `stride` + j. Cut it into tiles of `rows` by
# `columns`. Return the offsets of all elements of the tile that is number `row` from the top and number `column` from
# the left, both from 0: an integer tensor [rows, columns].
#
# First on paper: the tile of 3 × 4 at (0, 0), with a stride of 10.


# %%
def tile_offsets(row: int, column: int, rows: int, columns: int, stride: int) -> torch.Tensor:
    """-> [rows, columns] offsets of one tile's elements"""
    ### BEGIN SOLUTION
    i = row * rows + torch.arange(rows)[:, None]  # [rows, 1]
    j = column * columns + torch.arange(columns)[None, :]  # [1, columns]
    return i * stride + j
    ### END SOLUTION


# %%
check("4.w2", tile_offsets)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `[:, None]` makes a column of a vector, `[None, :]` a row. A column plus a row is a whole table.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# The tile's first row is row · rows of the matrix. Only the rows are multiplied by the stride.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** This is how every kernel on matrices finds its addresses: two index vectors, one stride an axis, and a
# broadcast. With a stride for the columns, too, a transposed view costs nothing to address (exercise 4.3). Another
# way is two loops, or `row * rows * stride + column * columns` plus the offsets of the tile at (0, 0).

# %% [markdown]
# ## Exercise 4.w3: the maximum of a row
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: what lanes that are off read as | 1 of 5 | 5 | none |
#
# Row r of `x` [rows, n], fp32, contiguous, is the work of program r. Store its maximum in `y[r]`. `BLOCK` is a power of
# two, at least n: the lanes behind the row are off, and must not win. Two lines are given; load, reduce, store.
#
# First on paper: a row (-5, -2, -9) in a block of 4. What comes out with `other=0.0`, what with `other=-float("inf")`?
#
# ```python
# row_max_kernel[(rows,)](x, y, n, BLOCK=triton.next_power_of_2(n))
# ```


# %%
@triton.jit
def row_max_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """y[r] = max of row r.  x [rows, n] -> y [rows]"""
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    ### BEGIN SOLUTION
    x = tl.load(x_ptr + row * n + offs, mask=offs < n, other=-float("inf"))  # [BLOCK]
    tl.store(y_ptr + row, tl.max(x, 0))
    ### END SOLUTION


# %%
check("4.w3", row_max_kernel)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `tl.load(pointers, mask=..., other=...)`: lanes with a mask of False read as `other`. `tl.max(x, 0)` is a scalar.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Row r begins at `x_ptr + row * n`. `other` must be what never wins a maximum: minus infinity.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** A reduction over a block counts all of its lanes, those that are off, too. So `other` must be what the
# operation does not notice: minus infinity for a maximum, 0 for a sum, 1 for a product. Without `other` the value is
# undefined. On paper: 0, which is in no row, and -2. Another way: load with `other=0.0`, then
# `tl.max(tl.where(offs < n, x, -float("inf")), 0)`.

# %% [markdown]
# ## Exercise 4.0: a kernel and its launch
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | core: all of it: kernel, output, grid, launch | 2 of 5 | 20 | Tillet, Kung and Cox, 2019 |
#
# Write `scaled_add_relu(a, x, y)`: a new tensor with max(a · x + y, 0), made by a kernel of your own **in one launch**.
#
# - `a` is a number; `x` and `y` are contiguous vectors [n] of one dtype, fp32 or fp16, on one device. The result has
#   their dtype. x and y stay as they are.
# - Compute in fp32, and round once.
# - A program takes a block of **128** elements. Launch as many programs as that needs, and no more; n need not be a
#   multiple of 128, and may be 0.
# - Each element of x and y is read once, each one of the result is written once.
#
# The check looks at `scaled_add_relu`. In the kernel `x_ptr` is the address of x's first element, and
# `out_ptr.dtype.element_ty` the dtype of what it points to.


# %%
@triton.jit
def scaled_add_relu_kernel(x_ptr, y_ptr, out_ptr, a, n, BLOCK: tl.constexpr):
    """out = max(a x + y, 0) for the elements of one block.  x, y, out [n]"""
    ### BEGIN SOLUTION
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    x = tl.load(x_ptr + offs, mask=inside).to(tl.float32)
    y = tl.load(y_ptr + offs, mask=inside).to(tl.float32)
    out = tl.maximum(a * x + y, 0.0)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=inside)
    ### END SOLUTION


def scaled_add_relu(a: float, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """max(a x + y, 0) of two vectors [n], by the kernel above"""
    ### BEGIN SOLUTION
    out = torch.empty_like(x)
    n = x.numel()
    scaled_add_relu_kernel[(triton.cdiv(n, 128),)](x, y, out, a, n, BLOCK=128)
    return out
    ### END SOLUTION


# %%
check("4.0", scaled_add_relu)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Seven lines of kernel: offsets, mask, two loads, the formula, one store. Three lines around it: room for the result
# (`torch.empty_like`), the launch, `return`.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# The launch is `kernel[(programs,)](arguments in their order, BLOCK=128)`, with `triton.cdiv(n, 128)` programs: n /
# 128, rounded up. Tensors are handed over as they are; a kernel sees their addresses. `.to(tl.float32)` after a load.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** The grid in square brackets says how often the kernel runs, the parentheses what each run gets. n // 128
# programs would forget the tail; one program more would find all its lanes off. Two reads and a write, 12 bytes an
# element in fp32: torch's three operations (`a * x`, `+ y`, `relu`) move 28. In fp16 a · x may leave the range although
# the sum does not: 402 · 300 - 60,000 is 60,600, and 120,600 is more than fp16 holds.
#
# The launch returns before the GPU is done, so a clock needs `torch.cuda.synchronize()`. Another way to the grid is a
# function, `lambda meta: (triton.cdiv(n, meta["BLOCK"]),)`, which serves when `BLOCK` is tuned.

# %% [markdown]
# ## Exercise 4.1: softmax over rows of different lengths
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: a mask that comes from data, and no byte read in vain | 2 of 5 | 20 | Milakov and Gimelshein, 2018 |
#
# A batch of attention scores is padded: row `r` of `x` `[rows, n]` has `length[r]` scores that count, the rest is
# whatever lay there, NaN included. Write the kernel. Row `r` of `y` gets the softmax over the first `length[r]`
# elements and 0 in all further ones. A length of 0 gives a row of zeros.
#
# - One program a row; `BLOCK` is a power of two, at least `n`.
# - Rows of `x` lie `stride_x` elements apart and may have a gap between them; rows of `y` lie `n` apart.
# - `length` is int32, from 0 to `n`. `x` is fp32 or fp16, and so is `y`, perhaps the other one; compute in fp32 and
#   store in the dtype of `y`. `x` and `length` stay as they are.
# - **Read only the scores that count, each of them once**, and write each element of `y` once. In a batch with lengths
#   from 1 to `n`, that is half of the bytes.
#
# The check launches it so:
#
# ```python
# masked_softmax_kernel[(rows,)](x, length, y, n, x.stride(0), BLOCK=triton.next_power_of_2(n))
# ```


# %%
@triton.jit
def masked_softmax_kernel(x_ptr, length_ptr, y_ptr, n, stride_x, BLOCK: tl.constexpr):
    """Softmax of the first length[r] elements of each row, 0 behind.  x [rows, n], length [rows] -> y [rows, n]"""
    ### BEGIN SOLUTION
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(length_ptr + row)
    offs = tl.arange(0, BLOCK)
    counts = offs < length
    x = tl.load(x_ptr + row * stride_x + offs, mask=counts, other=-float("inf")).to(tl.float32)  # [BLOCK]
    top = tl.maximum(tl.max(x, 0), -3.0e38)  # finite for a row of length 0
    exponentials = tl.exp(x - top)
    total = tl.sum(exponentials, 0)
    y = exponentials / tl.where(total == 0, 1.0, total)
    tl.store(y_ptr + row * n + offs, y.to(y_ptr.dtype.element_ty), mask=offs < n)
    ### END SOLUTION


# %%
check("4.1", masked_softmax_kernel)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Two masks: what is loaded ends at the length, what is stored ends at `n`. Choose `other` in the load so that a masked
# element becomes 0 by itself after the exponential.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# The length is a scalar that the program loads from `length_ptr + row`. With a length of 0 the maximum is $-\infty$,
# and $-\infty - (-\infty)$ is NaN: keep the maximum finite, and do not divide by a sum of 0.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** A mask costs nothing where it saves a load: lanes that are masked off send no request. `minillm`'s kernel
# takes a mask of one byte an element, which can express any pattern and must itself be read; a length is 4 bytes a row.
# The other way, loading all of the row and masking with `tl.where`, gives the same numbers unless the padding holds NaN
# or infinity in a place where arithmetic meets it, and moves twice the bytes on average. Serving engines go one step
# further and do not pad at all: sequences lie end to end, and a table of their bounds is the mask (chapter 5).

# %% [markdown]
# ## Exercise 4.2: residual and RMSNorm in one kernel, for rows that do not fit
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: fusion, in place, in two passes over a row | 3 of 5 | 25 | Zhang and Sennrich, 2019 |
#
# Between two blocks of a transformer stands `residual = residual + x; x = norm(residual) * weight`. Do both in one
# kernel and in place: afterwards `residual` holds the sum and `x` the normed sum. Nothing else is allocated.
#
# This time `BLOCK` may be smaller than `n`, so a row goes through a loop, twice: the first pass adds and collects the
# squares, the second one scales.
#
# - One program a row. Rows lie `stride_x` and `stride_residual` elements apart. `x`, `residual` and `weight` are fp32
#   or fp16, each on its own: a model may keep its residual in fp32. `weight` stays as it is.
# - The sum is rounded to the dtype of `residual` when it is stored, and **the norm is taken of the rounded sum**: later
#   layers will see the rounded one.
# - The sum, squares, their mean and the scaling are in fp32. `x / sqrt(mean(x²) + eps) * weight`, rounded once at the
#   end to x's dtype (the package's kernel rounds before the weight, too).
# - Of each row, `x` is read once and written once; `residual` is read at most twice and written once.
#
# ```python
# add_rms_norm_kernel[(rows,)](x, residual, weight, n, x.stride(0), residual.stride(0), eps, BLOCK=64)
# ```


# %%
@triton.jit
def add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, n, stride_x, stride_residual, eps, BLOCK: tl.constexpr):
    """residual += x, then x = RMSNorm(residual) * weight, both in place.  x and residual [rows, n], weight [n]"""
    ### BEGIN SOLUTION
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_x
    residual_ptr += row * stride_residual
    squares = tl.zeros((BLOCK,), tl.float32)  # one a lane, joined after the loop
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h = x + tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h = h.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + offs, h, mask=offs < n)
        squares += h.to(tl.float32) * h.to(tl.float32)
    scale = tl.rsqrt(tl.sum(squares, 0) / n + eps)
    tl.debug_barrier()  # what other threads of this program stored must be visible before it is read
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        tl.store(x_ptr + offs, (h * scale * w).to(x_ptr.dtype.element_ty), mask=offs < n)
    ### END SOLUTION


# %%
check("4.2", add_rms_norm_kernel)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The first pass can keep a vector of `BLOCK` partial sums of squares and join them once after the loop. The second pass
# need not add again: the sum stands in `residual`.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `h = h.to(residual_ptr.dtype.element_ty)` before the store, and `h.to(tl.float32)` before squaring. Divide by `n`, not
# by the number of lanes: the last block may be partly masked, with `other=0.0` adding nothing. `tl.debug_barrier()`
# between the passes makes every thread of the program see what the others stored.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Apart, the sum costs 3 n (two reads, one write) and the norm 2 n. Fused it is 2 n read and 2 n written, plus
# the second read of the sum: 5 n of requests, of which the last n may come out of a cache, since the row was written a
# moment ago (do not count on it: in the chapter's ladder the norm in two passes takes nearly as much longer as it asks
# for more). `minillm`'s kernel holds a whole row in registers and does without that read, 4 n, up to the row length
# where registers run out. The other way is to keep fp32 sums without rounding them: more exact inside this kernel, and
# not what the unfused model computes, so that fused and unfused drift apart in fp16.

# %% [markdown]
# ## Exercise 4.3: a tiled matrix product with a bias, any strides
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: tiles, two masks, an accumulator and an epilogue | 4 of 5 | 35 | Goto and van de Geijn, 2008 |
#
# `y = x @ w + bias` with `x` `[m, k]`, `w` `[k, n]`, `bias` `[n]`, `y` `[m, n]`. A program computes the tile of
# `[BLOCK_M, BLOCK_N]` at row `tl.program_id(0)` and column `tl.program_id(1)` of the grid of tiles.
#
# - `x` and `w` have any strides, in both axes: each may be a transposed view. `y` too.
# - `m`, `n` and `k` are no multiples of the tile. Memory behind a matrix holds NaN.
# - `x` and `w` have one dtype, fp32 or fp16; `bias` and `y` each have one of their own. `x`, `w`, `bias` stay as they
#   are.
# - Accumulate in fp32 whatever the inputs' dtype, add the bias in fp32, round once, to the dtype of `y`.
# - `tl.dot(a, b, acc, input_precision="ieee")` adds a product of tiles to `acc`. Leave `"ieee"` in: without it a GPU
#   rounds fp32 inputs to 10 bits of mantissa (TF32).
# - A program reads its rows of `x` and its columns of `w` once, and computes no other tile. (Lanes that are off may be
#   pointed at elements within, by `% m` and `% n`, in place of a mask.)
#
# ```python
# matmul_bias_kernel[(triton.cdiv(m, 16), triton.cdiv(n, 32))](
#     x, w, bias, y, m, n, k, *x.stride(), *w.stride(), *y.stride(), BLOCK_M=16, BLOCK_N=32, BLOCK_K=16)
# ```


# %%
@triton.jit
def matmul_bias_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, m, n, k, stride_xm, stride_xk, stride_wk, stride_wn, stride_ym, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of x @ w + bias.  x [m, k], w [k, n], bias [n] -> y [m, n]"""
    ### BEGIN SOLUTION
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        x_offs = rows * stride_xm + ks[None, :] * stride_xk  # [BLOCK_M, BLOCK_K]
        w_offs = ks[:, None] * stride_wk + columns * stride_wn  # [BLOCK_K, BLOCK_N]
        x = tl.load(x_ptr + x_offs, mask=(rows < m) & (ks[None, :] < k), other=0.0)
        w = tl.load(w_ptr + w_offs, mask=(ks[:, None] < k) & (columns < n), other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    y = acc + tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)
    y_offs = rows * stride_ym + columns * stride_yn
    tl.store(y_ptr + y_offs, y.to(y_ptr.dtype.element_ty), mask=(rows < m) & (columns < n))
    ### END SOLUTION


# %%
check("4.3", matmul_bias_kernel)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# An index of the rows as a column `[BLOCK_M, 1]` and one of the columns as a row `[1, BLOCK_N]` broadcast to all
# offsets of a tile. The third index, along `k`, moves on in the loop.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# The last block along `k` hangs over for both inputs: mask both, with 0, because 0 times the NaN behind the other one
# would be NaN. The bias comes after the loop, once, as a row `[1, BLOCK_N]`.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Strides make transposition free: a view with swapped strides is the transposed matrix. Free to write, that
# is. Which axis is contiguous decides how many bytes each request fetches that nobody asked for, and the compiler picks
# the way into shared memory by it. The bias in the epilogue costs N reads a row of tiles; as an operation of its own it
# would read and write the whole result again, 2 M N. The other way to the same numbers is to start from the bias:
# `acc = bias + zeros`. Accumulating in fp16 loses about half of the digits by 1,000 terms.

# %% [markdown]
# ## Exercise 4.4: the roofline of a chain of kernels (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: what fusing is worth, before it is written | 2 of 5 | 20 | Williams, Waterman and Patterson, 2009 |
#
# A chain of kernels is a list of steps. Each is a dictionary: `"flops"`, a number; `"reads"` and `"writes"`, from the
# names of tensors to bytes. The machine is a dictionary with `"bandwidth"` in bytes a second, `"flops"` in operations a
# second, and `"launch"`, seconds that every kernel costs whatever it does. On the roofline a kernel takes
#
# $$t = t_\text{launch} + \max\left(\frac{\text{bytes}}{\text{bandwidth}}, \frac{\text{FLOPs}}{\text{peak}}\right)$$
#
# Return three numbers: the seconds of the chain with one kernel a step; its seconds fused into one kernel; and the
# fused kernel's arithmetic intensity, in FLOPs a byte. The fused kernel
#
# - reads every tensor that comes from outside once, however many steps read it;
# - never reads what an earlier step has written: it is in registers;
# - writes only what the steps write *and* is in `outputs`, the set of the names that are needed afterwards, once each;
#   a name there that no step writes lies in memory already;
# - does all the arithmetic.
#
# Leave the arguments as they are.


# %%
def roofline(steps: list[dict], outputs: set[str], machine: dict[str, float]) -> tuple[float, float, float]:
    """(seconds one kernel a step, seconds fused, FLOPs a byte fused) of a chain of kernels on `machine`."""
    ### BEGIN SOLUTION

    def seconds(moved: float, flops: float) -> float:
        return machine["launch"] + max(moved / machine["bandwidth"], flops / machine["flops"])

    apart, made, moved = 0.0, set(), {}
    for step in steps:
        apart += seconds(sum(step["reads"].values()) + sum(step["writes"].values()), step["flops"])
        for name, size in step["reads"].items():
            if name not in made:
                moved["read", name] = size
        made |= step["writes"].keys()
        for name, size in step["writes"].items():
            if name in outputs:
                moved["write", name] = size
    flops = sum(step["flops"] for step in steps)
    total = sum(moved.values())
    return apart, seconds(total, flops), flops / total
    ### END SOLUTION


# %%
check("4.4", roofline)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The first number is a sum over steps, each with its own maximum. The second has one launch and one maximum: of the
# sums.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Walk through the steps with a set of names that have been written so far. A read counts if its name is not in that set
# yet, and only the first time. A name may be read from outside and written later (an update in place): both count.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** SiLU, then a product, over `n` elements: apart 5 n elements and two launches, fused 3 n and one. Where memory
# is the limit that is a gain of 5/3 for large n, and of 2 for small n, where launches are all there is. Where
# arithmetic is the limit, fusing saves launches alone. The model is a floor, and blind to two things: a fused kernel
# needs registers for everything at once, and cannot wait for a result of all programs (a norm over a row that several
# programs hold). Compilers decide by the same count.

# %% [markdown]
# ## Exercise 4.5: the order of tiles that moves the fewest bytes (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: which programs should run side by side, to share a cache | 3 of 5 | 25 | Tillet, Kung and Cox, 2019 |
#
# A product's result has `num_m` by `num_n` tiles. A GPU runs `programs` of them at a time; say that these waves follow
# one another: tiles 0 to `programs - 1`, then the next `programs`, and so on. A tile needs one strip of rows of `x` and
# one strip of columns of `w`. Strips that several tiles of a wave need are read once; nothing survives a wave. A strip
# of `x` costs `row_bytes`, one of `w` costs `column_bytes`.
#
# Tiles are numbered in groups: `group` rows of tiles form a band, and within the band numbers run down the first column
# of tiles, then the next column. The last band may be lower than the others.
#
# ```text
# group 2, 3 x 4 tiles:    0  2  4  6
#                          1  3  5  7
#                          8  9 10 11
# ```
#
# Return the group, from 1 to `num_m`, that moves the fewest bytes over all waves, and those bytes. Of several take the
# smallest.


# %%
def best_group(num_m: int, num_n: int, programs: int, row_bytes: int, column_bytes: int) -> tuple[int, int]:
    """(the group with the fewest bytes read, those bytes) for num_m x num_n tiles in waves of `programs`."""
    ### BEGIN SOLUTION

    def tile(number: int, group: int) -> tuple[int, int]:
        first = number // (group * num_n) * group
        height = min(group, num_m - first)
        inside = number % (group * num_n)
        return first + inside % height, inside // height

    def moved(group: int) -> int:
        total = 0
        for start in range(0, num_m * num_n, programs):
            wave = [tile(i, group) for i in range(start, min(start + programs, num_m * num_n))]
            total += row_bytes * len({m for m, _ in wave}) + column_bytes * len({n for _, n in wave})
        return total

    return min((moved(group), group) for group in range(1, num_m + 1))[::-1]
    ### END SOLUTION


# %%
check("4.5", best_group)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# First write the function from a tile's number to its row and column for one group; print it for the example above.
# Then count different rows and different columns wave by wave.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# A band holds `group * num_n` numbers. In the band that starts at row `first`, the height is the smaller of `group` and
# the rows that are left; the number inside the band, modulo the height, gives the row. The last wave may be short too.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** A wave of P tiles that forms a rectangle of a rows and b columns reads a + b strips, and a b = P: fewest for
# a square, $2\sqrt P$, where row by row it is 1 + P. For 132 programs that is about 23 against 133. Strips of different
# cost shift the best rectangle to $a \cdot \text{row\_bytes} = b \cdot \text{column\_bytes}$. The model is coarse:
# programs do not run in step, and L2 keeps more than one wave. So real kernels try a few groups and take the fastest;
# `minillm` has 8 as its default. The other way is a space-filling curve (Hilbert's), near square at every scale.
