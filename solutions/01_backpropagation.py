# %% [markdown]
# # Exercises 1: backpropagation
#
# Ten exercises on [chapter 1](../chapters/01_backpropagation.md) and its
# [lab](../notebooks/01_backpropagation.ipynb): three **warm-ups** of five minutes (1.w1 to 1.w3), the **core** (1.0, a
# whole engine for numbers), and six steps **beyond** (1.1 to 1.6; 1.3, 1.5 and 1.6 are optional), which neither chapter
# nor lab shows in this form.
#
# Run the next cell, then take the exercises in any order. Replace `raise NotImplementedError(...)` by your code and
# run the `check` cell under it: it says which contracts hold, and on a failure what was expected and what came.
#
# In all of them arrays need not be contiguous, inputs stay as they are, and arrays that are returned have the dtype of
# those that were given (which have one dtype), unless an exercise says otherwise.

# %%
import math
from collections.abc import Callable

import numpy as np

from minillm.autograd import unbroadcast
from minillm.learn import check

# %% [markdown]
# ## Exercise 1.w1: ten steps downhill
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: gradient descent, `w -= lr * grad`, by hand | 1 of 5 | 5 | Cauchy, 1847 |
#
# The loss is $(w x + b)^2$; `x` and `b` are given and stay. Work out its derivative in `w`, and take `steps` steps of
# gradient descent: each subtracts `lr` times the derivative **at the present `w`**.
#
# Return the list of all values of `w`, the first one included: `steps + 1` numbers. With `w = 2`, `x = 3`, `b = -5` and
# `lr = 0.01` the derivative is 6, and the list begins 2, 1.94.


# %%
def descend(w: float, x: float, b: float, lr: float, steps: int) -> list[float]:
    """Gradient descent on (w x + b)^2 -> [w before the first step, after it, ..., after the last]."""
    ### BEGIN SOLUTION
    path = [w]
    for _ in range(steps):
        path.append(path[-1] - lr * 2 * (path[-1] * x + b) * x)
    return path
    ### END SOLUTION


# %%
check("1.w1", descend)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The chain rule has two factors here: the square's slope, and the slope of $w x + b$ in $w$.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# The derivative is $2\,(w x + b)\,x$, and $w x + b$ changes with every step.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** With $u = w x + b$ one step turns $u$ into $u\,(1 - 2\,\mathrm{lr}\,x^2)$. So the distance from the minimum
# shrinks by the same factor in each step, 0.82 in the example; it grows when $\mathrm{lr} > 1 / x^2$. A learning rate
# that is too large is not slow but wrong, and the loss climbs. Another way is that closed form, without a loop. In a
# network each direction has its own factor, and one learning rate must serve all: AdamW (exercise 1.6) scales each
# parameter's step by itself.

# %% [markdown]
# ## Exercise 1.w2: a Jacobian of two classes
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: how each score moves each probability | 1 of 5 | 5 | Bridle, 1990 |
#
# Softmax makes two probabilities of two scores: $p_0 = e^{z_0} / (e^{z_0} + e^{z_1})$, and $p_1$ likewise. Return the
# four slopes $\partial p_i / \partial z_j$ as two rows, `i` first: `[[dp0/dz0, dp0/dz1], [dp1/dz0, dp1/dz1]]`.
#
# With numbers: scores 0 and $\log 3$ have the probabilities 1/4 and 3/4, and the first slope is 3/16. Work out the
# other three on paper before you write. Scores are between -20 and 20.


# %%
def softmax_jacobian(z0: float, z1: float) -> list[list[float]]:
    """[[dp0/dz0, dp0/dz1], [dp1/dz0, dp1/dz1]] for p = softmax((z0, z1))."""
    ### BEGIN SOLUTION
    p0 = 1 / (1 + math.exp(z1 - z0))
    slope = p0 * (1 - p0)
    return [[slope, -slope], [-slope, slope]]
    ### END SOLUTION


# %%
check("1.w2", softmax_jacobian)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The two probabilities add up to 1 whatever the scores are. So what does each column add up to?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Adding the same number to both scores changes nothing. So what does each row add up to? One slope is left, and it is
# $p_0\,(1 - p_0)$.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** $\partial p_i / \partial z_j = p_i\,([i = j] - p_j)$. With two classes $1 - p_0 = p_1$, so all four have the
# size $p_0\,p_1$: largest at 1/4 for equal scores, nearly 0 when one class has it all. A softmax that is sure hardly
# moves: chapter 2 divides its scores by a root for this reason. Another way is `diag(p) - outer(p, p)`, for any
# number of classes; exercise 1.1 does without that matrix.

# %% [markdown]
# ## Exercise 1.w3: who uses x?
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: how many contributions a gradient is the sum of | 1 of 5 | 5 | Linnainmaa, 1976 |
#
# A program is a list of operations, each `(result, operation, inputs)`. `x * x + x` is
#
# `[("square", "mul", ["x", "x"]), ("y", "add", ["square", "x"])]`
#
# In backward a value's gradient is the sum over every **place** where it stands as an input. Return how many terms
# that sum has for the value called `name`. How many has `x` here? (A value that nobody uses has 0, `y` for example.)


# %%
def contributions(program: list[tuple[str, str, list[str]]], name: str) -> int:
    """How many terms the gradient of the value `name` is the sum of."""
    ### BEGIN SOLUTION
    return sum(inputs.count(name) for _, _, inputs in program)
    ### END SOLUTION


# %%
check("1.w3", contributions)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Write the derivative of `x * x + x` and count where each part comes from: two from the product, one from the sum.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# A list's `count` says how often something stands in it.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Three: $\bar x = \bar s \cdot x + \bar s \cdot x + 1$ with $\bar s = 1$, which is $2x + 1$. An engine that
# overwrites instead of adding keeps one of the three; one that takes the two places of `x * x` for one user loses
# one of them. The number of places is also what PyTorch counts down before it lets a node go on (exercise 1.3). Another
# way is one loop over all inputs of all operations, with a counter.

# %% [markdown]
# ## Exercise 1.0: an engine for numbers
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | core: record while running, then walk back once | 2 of 5 | 30 | Linnainmaa, 1976 |
#
# `Value(3.0)` is a number that remembers where it came from. Write the class from this page, without the lab's:
#
# - `.data` is the number, `.grad` what backward finds, 0.0 before that.
# - `a + b`, `a * b` and `a.tanh()` give a new `Value`; `a` and `b` are Values, and may be the same one.
# - `y.backward()` sets `.grad` of `y` and of every Value that it was computed from to $\partial y / \partial$ that
#   value: 1 for `y` itself. Contributions of several uses add up. Each call starts anew: what earlier calls left in
#   `.grad` does not count. Values that `y` does not depend on keep their `.grad`, and no `.data` changes.
# - Each operation is walked **once**: 30 values in a row that are used twice each have $2^{30}$ paths and 60 edges.
# - A chain of 5,000 operations works: do not recurse (Python stops at about 1,000 calls), and leave its limit alone.


# %%
class Value:
    """A number that remembers which Values it was computed from, and its slope in each."""

    def __init__(self, data: float, made_from: tuple = ()) -> None:
        """made_from is yours: what backward will need of the operation.  Value(3.0) has none."""
        ### BEGIN SOLUTION
        self.data, self.grad, self.made_from = data, 0.0, made_from  # pairs of an input and the slope in it
        ### END SOLUTION

    def __add__(self, other: "Value") -> "Value":
        ### BEGIN SOLUTION
        return Value(self.data + other.data, ((self, 1.0), (other, 1.0)))
        ### END SOLUTION

    def __mul__(self, other: "Value") -> "Value":
        ### BEGIN SOLUTION
        return Value(self.data * other.data, ((self, other.data), (other, self.data)))
        ### END SOLUTION

    def tanh(self) -> "Value":
        ### BEGIN SOLUTION
        t = math.tanh(self.data)
        return Value(t, ((self, 1 - t * t),))
        ### END SOLUTION

    def backward(self) -> None:
        """Set .grad of every Value that this one depends on."""
        ### BEGIN SOLUTION
        order, seen, stack = [], set(), [(self, False)]
        while stack:
            value, inputs_done = stack.pop()
            if inputs_done:
                order.append(value)  # after all of its inputs
            elif value not in seen:
                seen.add(value)
                stack += [(value, True), *((v, False) for v, _ in value.made_from)]
        for value in order:
            value.grad = float(value is self)
        for value in reversed(order):
            for v, slope in value.made_from:
                v.grad += value.grad * slope
        ### END SOLUTION


# %%
check("1.0", Value)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# An operation knows its inputs and its slopes when it runs: keep both in the new Value. Backward then needs an order in
# which every Value comes after all that use it. Put a Value on a list once everything that it was computed from is
# on it, and read the list from its end.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Depth first with a stack of your own: push `(value, False)`. When it is popped the first time, push `(value, True)`
# and then its inputs; when the `True` comes up, its inputs are done. A set holds what was seen. `+=` adds
# contributions.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** The three rules of the chapter: slopes multiply along an edge, contributions add at a value, and a value goes
# on only when all of its users have delivered. A walk that recurses into the inputs and adds on the way is right,
# too, but takes each path, $2^{30}$ of them. A walk by distance from the result visits each value once, and some too
# early. Sorting is one way; counting the users that have not delivered yet is another (exercise 1.3), and a third is to
# number Values as they are made: a Value's number is larger than its inputs', so a heap of numbers gives an order.
#
# Setting `.grad` at the start of the walk and adding to it within are two things. PyTorch does not reset: its
# `backward` adds to what the parameters hold, so that several batches can share a step, and `zero_grad` is the price.

# %% [markdown]
# ## Exercise 1.1: the backward of softmax
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: the product with a Jacobian that is not diagonal, without building it | 2 of 5 | 20 | Bridle, 1990 |
#
# Attention (chapter 2) turns its scores into weights by a softmax along the last axis: $p_i = e^{z_i} / \sum_j
# e^{z_j}$. Every $z_j$ moves every $p_i$, so each row has a Jacobian of `[classes, classes]`:
#
# $$\frac{\partial p_i}{\partial z_j} = p_i\,([i = j] - p_j)$$
#
# Given the output `p` `[..., classes]` and `g = dℓ/dp` of the same shape and dtype (float16, 32 or 64), return `dℓ/dz`,
# in that dtype. Insert the Jacobian into $\bar z_j = \sum_i g_i\, \partial p_i / \partial z_j$ and simplify until only
# element-wise products and one sum a row are left. With rows of 1,000 elements, a Jacobian a row would take 1,000
# times the memory of `p`, and 1,000 times the work even if it is made column by column.


# %%
def softmax_backward(g: np.ndarray, p: np.ndarray) -> np.ndarray:
    """dℓ/dz for p = softmax(z) along the last axis.  g = dℓ/dp [..., classes], p [..., classes] -> [..., classes]."""
    ### BEGIN SOLUTION
    weighted = g * p  # [..., classes]
    return weighted - p * weighted.sum(axis=-1, keepdims=True)  # [..., classes]
    ### END SOLUTION


# %%
check("1.1", softmax_backward)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Split the sum in two: the part with $[i = j]$ has one term, the other has $p_j$ in every term.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# What is left in the brackets is $g_j$ minus one number for the whole row: the mean of $g$ under the distribution $p$.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** $\bar z_j = \sum_i g_i p_i [i = j] - \sum_i g_i p_i p_j = p_j\,(g_j - \sum_i g_i p_i)$: what each class was
# given, against the average. So $\bar z$ sums to 0 along a row, as it must: adding a constant to $z$ changes nothing.
# The other way is the Jacobian itself, `np.einsum("...i,...ij->...j", g, J)`: right, and as many times
# the memory and work as there are classes. FlashAttention's backward rests on this form: the sum $\sum_i g_i p_i$
# can be had without keeping `p` (chapter 5).

# %% [markdown]
# ## Exercise 1.2: backward of a batched matmul
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: the gradient of the operation that costs nearly all the time, for any batch | 3 of 5 | 25 | Giles, 2008 |
#
# The forward pass was `y = a @ b` with `a` `[..., M, K]`, `b` `[..., K, N]` and `y` `[..., M, N]`. The axes before the
# last two are batch axes, and they broadcast: `a` may be `[B, M, K]` while `b` is one matrix `[K, N]` for the whole
# batch, which is what every linear layer does. Either may lack batch axes, have some of size 1, or both; and a batch
# may have size 0.
#
# Given `g = dℓ/dy` (shape of `y`), return `dℓ/da` and `dℓ/db`, each a new array with the shape and dtype of its input.
# Derive it from one element: $y_{mn} = \sum_k a_{mk} b_{kn}$. The package's
# `unbroadcast(gradient, shape)`, imported above, sums a gradient down to a shape.


# %%
def matmul_backward(g: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of a @ b.  g [..., M, N], a [..., M, K], b [..., K, N] -> (da, db), shaped as a and b."""
    ### BEGIN SOLUTION
    da = g @ b.mT  # [..., M, N] @ [..., N, K] -> [..., M, K]
    db = a.mT @ g  # [..., K, M] @ [..., M, N] -> [..., K, N]
    return unbroadcast(da, a.shape), unbroadcast(db, b.shape)
    ### END SOLUTION


# %%
check("1.2", matmul_backward)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Take two dimensions first. $a_{mk}$ appears in $y_{mn}$ for every $n$, with factor $b_{kn}$. So
# $\partial \ell/\partial a_{mk} = \sum_n g_{mn} b_{kn}$: which product of two matrices is that?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# The shapes leave one choice: `da` `[M, K]` from `g` `[M, N]` and `b` `[K, N]`; `db` `[K, N]` from `a` `[M, K]` and
# `g` `[M, N]`. With a batch, transpose the last two axes only (`.mT`, not `.T`), and sum each result down to its
# input's shape.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** $\partial \ell/\partial a_{mk} = \sum_n g_{mn} b_{kn}$ is $g\,b^\top$, and
# $\partial \ell/\partial b_{kn} = \sum_m a_{mk} g_{mn}$ is $a^\top g$. Each costs as many multiply-adds as the forward
# product, so backward costs twice forward: the 1 : 2 that all training estimates rest on. `minillm/autograd/rules.py`
# treats one matrix for a whole batch apart: it flattens the batch into the rows and lets a single matmul do the sum,
# instead of making `B` matrices and adding them.

# %% [markdown]
# ## Exercise 1.3: the walk back in waves
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond (optional): which nodes backward may visit side by side, by counting users | 3 of 5 | 30 | Kahn, 1962 |
#
# A node may pass its gradient on only when **all** of its users have added their share. Chapter and lab sort the
# graph depth first and walk the list from its end. PyTorch's engine does not sort: it counts how many edges lead from
# users to each node, starts at the result, and releases a node when its last user has been visited. That is Kahn's
# algorithm. It also tells which nodes are free at the same time, and could run on several threads.
#
# Return these waves. The first is `[root]`; each further wave holds the nodes whose last user was visited in the wave
# before, in any order. Every node that `root` depends on is in exactly one wave.
#
# Each node has one attribute that matters, `inputs`, a list of nodes (empty for a leaf). A node may be there twice
# (`x * x`), and different nodes may have one name. Graphs are deep: a chain of 5,000 nodes must work, so do not recurse
# (Python stops at about 1,000 calls), and leave its limit alone. Leave the nodes as they are: no new attributes, no
# other names, inputs in their order.


# %%
class Node:
    """An operation of a graph: all that matters here is where its inputs come from."""

    def __init__(self, name: str, *inputs: "Node"):
        self.name, self.inputs = name, list(inputs)

    def __repr__(self) -> str:
        return self.name


# %%
def backward_waves(root: Node) -> list[list[Node]]:
    """The nodes that root depends on, in waves: each node as soon as all of its users stand in earlier waves."""
    ### BEGIN SOLUTION
    users, stack = {root: 0}, [root]  # node -> edges from users not yet visited
    while stack:
        for node in stack.pop().inputs:
            if node not in users:
                users[node] = 0
                stack.append(node)
            users[node] += 1
    waves = [[root]]
    while waves[-1]:
        released = []
        for user in waves[-1]:
            for node in user.inputs:
                users[node] -= 1
                if users[node] == 0:
                    released.append(node)
        waves.append(released)
    return waves[:-1]
    ### END SOLUTION


# %%
check("1.3", backward_waves)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Two passes. The first walks the graph in any order, visits each node once, and counts for each the edges that arrive
# from its users. The second counts down.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# What does `x * x` add to the count of `x`, and how often is it counted down? And which dictionary keys tell two
# nodes of one name apart?
# </details>

# %% [markdown] tags=["solution"]
# **Why.** A node's count reaches 0 exactly when its last user has been visited, so it can never come too early; and
# in a graph without cycles some node always has count 0, so none is left out. A node's wave is its *longest* path
# from the root; a breadth-first walk goes by the shortest, and is wrong. The other way computes that length: depth
# first for an order, then one more than the largest wave among the users. Counting needs no order, and an engine can
# start a node's backward the moment that it is released. (On a CPU PyTorch walks one by one all the same: of the
# released operations it takes the one that ran last.)

# %% [markdown]
# ## Exercise 1.4: cross-entropy and its gradient
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: the loss of every language model, without overflow, and its gradient | 2 of 5 | 25 | Bridle, 1990 |
#
# `logits` `[rows, classes]` are scores in float16, 32 or 64, `targets` `[rows]` the right classes, integers of any
# kind. With $p = \mathrm{softmax}(z)$ along each row, the loss is the mean over rows of $-\ln p_{\text{target}}$.
# Return the loss and its gradient for the logits, `[rows, classes]`, in the logits' dtype.
#
# In float32, `exp(89)` is infinity. Logits of 10,000, or -10,000, must give a finite and right loss and gradient. For
# float16 compute in float32: it ends at 65,504, and a vocabulary may have more entries than that. (The lab's way to
# pick the right class, `np.eye(10)[labels]`, would then first build a matrix of `classes` by `classes`: gigabytes.)


# %%
def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean cross-entropy and its gradient.  logits [rows, classes], targets [rows] -> (loss, gradient like logits)."""
    ### BEGIN SOLUTION
    n = len(targets)
    z = logits.astype(np.float32) if logits.dtype == np.float16 else logits
    shifted = z - z.max(axis=1, keepdims=True)  # [rows, classes], the largest of a row is 0
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))  # [rows, classes]
    gradient = np.exp(log_p)  # [rows, classes], the probabilities
    gradient[np.arange(n), targets] -= 1
    return float(-log_p[np.arange(n), targets].mean()), (gradient / n).astype(logits.dtype)
    ### END SOLUTION


# %%
check("1.4", cross_entropy)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Softmax does not change when a constant is taken from a whole row. Take the row's maximum: then the largest exponent
# is 0. And never take the logarithm of a softmax: write $\log p_i = z_i - \log \sum_j e^{z_j}$.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# From that formula, $\partial(-\log p_t)/\partial z_i = p_i - [i = t]$: what the model believed minus what was true.
# The mean over the batch divides it by the number of rows. Float16 is converted at the start, and back at the end.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** `log(softmax(z))` computes `exp`, rounds small probabilities to 0, and then takes `log(0)`. The joined
# formula never leaves the range. A single maximum for the whole batch is not enough: a row that lies 1,000 below it
# underflows to all zeros. The other way is `np.logaddexp.reduce(logits, axis=1)` for $\log \sum_j e^{z_j}$: one call.
# This closed form is also why frameworks have `cross_entropy` on logits rather than on probabilities.

# %% [markdown]
# ## Exercise 1.5: check the gradient of a large model
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond (optional): the test that finds wrong derivatives of large models | 3 of 5 | 25 | Griewank, Walther, 2008 |
#
# The lab checks gradients one element at a time: two runs of the program an element. For a model with millions of
# parameters, move all of them at once, along a random direction $d$ of length 1. The slope along $d$ can be measured,
# and the gradient claims to know it:
#
# $$\text{measured} = \frac{f(x + \varepsilon d) - f(x - \varepsilon d)}{2 \varepsilon}, \qquad
# \text{claimed} = \sum_i \bar x_i\, d_i, \qquad
# \text{error} = \frac{|\text{measured} - \text{claimed}|}{|\text{measured}| + |\text{claimed}| + 10^{-12}}$$
#
# Draw each direction as `rng.standard_normal(x.shape)`, scale it to length 1 (the root of the sum of all squares),
# and return the **largest** error over `directions` of them; a NaN anywhere, be it of the last direction alone, must
# come out as NaN. Compute in float64, what `f` is called with included, even if `x` and `gradient` are float32 (near 1,
# float32 has steps of $1.2 \cdot 10^{-7}$, and a change of $10^{-6}$ drowns in them), and never change `x`, not even
# for a moment: `f` may look at it. Call `f` twice a direction, not once an element.


# %%
def gradient_error(
    f: Callable[[np.ndarray], float],
    x: np.ndarray,
    gradient: np.ndarray,
    rng: np.random.Generator,
    directions: int = 4,
    eps: float = 1e-6,
) -> float:
    """The largest relative error of `gradient`, of x's shape, as the gradient of f at x, along random directions."""
    ### BEGIN SOLUTION
    x = np.asarray(x, np.float64)
    errors = []
    for _ in range(directions):
        d = rng.standard_normal(x.shape)
        d = d / np.sqrt((d * d).sum())
        measured = (f(x + eps * d) - f(x - eps * d)) / (2 * eps)
        claimed = (gradient * d).sum()
        errors.append(abs(measured - claimed) / (abs(measured) + abs(claimed) + 1e-12))
    return float(np.max(errors))  # Python's max would lose a NaN
    ### END SOLUTION


# %%
check("1.5", gradient_error)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `x + eps * d` is a new array; `x += ...` would change the caller's, and `np.asarray` copies nothing that is float64
# already.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `np.linalg.norm(d)` is the length over all elements; with an `axis` or an `ord` it means something else. What is
# `max(0.0, float("nan"))`?
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Expand both sides: $f(x \pm \varepsilon d) = f \pm \varepsilon f^{(1)} + \tfrac{\varepsilon^2}{2} f^{(2)}
# \pm \tfrac{\varepsilon^3}{6} f^{(3)} + \dots$, with derivatives along $d$. The even terms cancel, and
# $\tfrac{\varepsilon^2}{6} f^{(3)}$ stays; a one-sided difference keeps $\tfrac{\varepsilon}{2} f^{(2)}$. Rounding adds
# about $|f| \cdot 10^{-16} / \varepsilon$. For a function and derivatives of order one $\varepsilon$ near $10^{-5}$ is
# best; with a million elements each moves only $\varepsilon / 1000$, and a larger $\varepsilon$ is better.
#
# If the gradient is off by $e$, the numerator is $|e \cdot d|$, and a random $d$ is at a right angle to $e$ with
# probability 0. It may also be nearly at a right angle to the *gradient*: then both slopes are small, rounding stands
# out, and a right gradient looks bad. So judge a single error near $10^{-4}$ by drawing again; a real mistake stays.
# What a direction cannot tell is *which* element is wrong: for that, the other way, element by element, on the
# parameter that failed.

# %% [markdown]
# ## Exercise 1.6: one step of AdamW
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond (optional): the optimizer that trained the models you will serve | 2 of 5 | 15 | Loshchilov, Hutter, 2019 |
#
# Running means of the gradient and of its square, each corrected for having started at zero:
#
# $$m_t = \beta_1 m_{t-1} + (1 - \beta_1) g, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g^2$$
#
# $$\hat m = \frac{m_t}{1 - \beta_1^t}, \qquad \hat v = \frac{v_t}{1 - \beta_2^t}, \qquad
# p_t = p_{t-1} - \eta \lambda\, p_{t-1} - \eta\, \frac{\hat m}{\sqrt{\hat v} + \epsilon}$$
#
# The decay $\eta\lambda\,p$ acts on the parameter alone and never enters $m$ or $v$: that is the W. `t` counts from 1.
# Return new arrays, none of which shares memory with one that was given, and leave the given ones alone, whatever the
# numbers are (`weight_decay` may be 0).


# %%
def adamw_step(
    p: np.ndarray,
    g: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    t: int,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Step number t (1, 2, ...) for one parameter: all arrays have one shape -> new (p, m, v)."""
    ### BEGIN SOLUTION
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    p = p * (1 - lr * weight_decay) - lr * m_hat / (np.sqrt(v_hat) + eps)
    return p, m, v
    ### END SOLUTION


# %%
check("1.6", adamw_step)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Test it in your head on the first step, `t = 1`, with `m = v = 0`: the corrected means are exactly `g` and `g²`, so
# the step is `lr · g / |g|`. Its size is `lr`, whatever the size of the gradient.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Return the *uncorrected* means: the correction is made anew in each step. `eps` stands outside the square root. And
# `m *= beta1` changes the caller's array. (`np.sqrt` of a Python number is a float64, and makes a float32 array one.)
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Adam with the decay inside the gradient (`g + weight_decay * p`) divides the decay by $\sqrt{\hat v}$ too:
# parameters with large gradients are then hardly decayed. Loshchilov and Hutter moved it out. The memory is the price:
# two more arrays as large as the model, which is why training needs four times the bytes of the weights (weights,
# gradients, m, v) before a single activation is counted. Inference needs one.
# The other way folds both corrections into the step size, with `eps` scaled by $\sqrt{1 - \beta_2^t}$ to be the same
# formula. (The paper multiplies the decay by a schedule of its own; $\eta \lambda$ is PyTorch's convention.)
