# %% [markdown]
# # Exercises 1: backpropagation
#
# Six functions, each at most 30 lines: the parts of a reverse-mode engine that people get wrong. They belong to
# [chapter 1](../chapters/01_backpropagation.md) and its [lab](../notebooks/01_backpropagation.ipynb).
#
# Run the next cell, then take the exercises in any order. Replace `raise NotImplementedError(...)` by your code and
# run the `check` cell under it: it says which contracts hold, and on a failure what was expected and what came.

# %%
from collections.abc import Callable

import numpy as np

from minillm.autograd import unbroadcast as fold  # for exercise 1.2
from minillm.learn import check

# %% [markdown]
# ## Exercise 1.1: undo broadcasting
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | the backward of NumPy's broadcasting, which every operation needs | 2 of 5 | 15 | Baydin et al., 2018 |
#
# In `y = x + b` with `x` of shape `[8, 3]` and `b` of shape `[3]`, NumPy repeats `b` eight times. The gradient of `y`
# has shape `[8, 3]`, that of `b` must have shape `[3]`. An element that was used eight times gets the **sum** of
# eight gradients.
#
# Write the function that sums `g` down to `shape`. Broadcasting repeats along two kinds of axes: those that it puts in
# front (`[3]` → `[8, 3]`), and those of size 1 (`[8, 1]` → `[8, 3]`). One array can have both.


# %%
def unbroadcast(g: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sum g over the axes along which an array of `shape` was repeated.

    g: the gradient, of a shape to which `shape` broadcasts. Returns an array of exactly `shape`.
    """
    ### BEGIN SOLUTION
    extra = g.ndim - len(shape)  # axes that broadcasting put in front
    repeated = [extra + i for i, n in enumerate(shape) if n == 1 and g.shape[extra + i] != 1]
    return g.sum(axis=(*range(extra), *repeated), keepdims=True).reshape(shape)
    ### END SOLUTION


# %%
check("1.1", unbroadcast)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# NumPy aligns shapes at their **last** axis. So `g.ndim - len(shape)` axes stand in front, and axis `i` of `shape` is
# axis `i + that number` of `g`.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Collect the numbers of all axes to sum over, call `g.sum(axis=tuple_of_them, keepdims=True)` once, and `reshape` the
# result to `shape`. `keepdims` matters: without it the axes of size 1 that `shape` wants are gone.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Broadcasting is a linear map that copies; the transpose of "copy" is "add". Written as a matrix, the map
# `[3]` → `[8, 3]` stacks eight identity matrices, and its transpose adds eight blocks. The other way is a loop: while
# `g` has more axes than `shape`, `g = g.sum(0)`; then for each axis of size 1, `g = g.sum(axis, keepdims=True)`. It
# reads well and makes one pass over memory an axis instead of one in all.

# %% [markdown]
# ## Exercise 1.2: backward of a batched matmul
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | the gradient of the operation that costs nearly all the time, for any batch | 3 of 5 | 20 | Giles, 2008 |
#
# The forward pass was `y = a @ b` with `a` `[..., M, K]`, `b` `[..., K, N]` and `y` `[..., M, N]`. The axes before the
# last two are batch axes, and they broadcast: `a` may be `[B, M, K]` while `b` is one matrix `[K, N]` for the whole
# batch, which is what every linear layer does.
#
# Given `g = dL/dy` (shape of `y`), return `dL/da` and `dL/db`, each with the shape of its input. Derive it from one
# element: $y_{mn} = \sum_k a_{mk} b_{kn}$. The package's `unbroadcast` is
# imported above under the name `fold`.


# %%
def matmul_backward(g: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of a @ b.  g [..., M, N], a [..., M, K], b [..., K, N] -> (da, db), shaped as a and b."""
    ### BEGIN SOLUTION
    da = g @ b.mT  # [..., M, N] @ [..., N, K] -> [..., M, K]
    db = a.mT @ g  # [..., K, M] @ [..., M, N] -> [..., K, N]
    return fold(da, a.shape), fold(db, b.shape)
    ### END SOLUTION


# %%
check("1.2", matmul_backward)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Take two dimensions first. $a_{mk}$ appears in $y_{mn}$ for every $n$, with factor $b_{kn}$. So
# $\partial L/\partial a_{mk} = \sum_n g_{mn} b_{kn}$: which product of two matrices is that?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# The shapes leave one choice: `da` `[M, K]` from `g` `[M, N]` and `b` `[K, N]`; `db` `[K, N]` from `a` `[M, K]` and
# `g` `[M, N]`. With a batch, transpose the last two axes only (`.mT`, not `.T`), and fold each result to its input's
# shape.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** $\partial L/\partial a_{mk} = \sum_n g_{mn} b_{kn}$ is $g\,b^\top$, and
# $\partial L/\partial b_{kn} = \sum_m a_{mk} g_{mn}$ is $a^\top g$. Each costs as many multiply-adds as the forward
# product, so backward costs twice forward: the 1 : 2 that all training estimates rest on. `minillm/autograd/rules.py`
# treats one matrix for a whole batch apart: it flattens the batch into the rows and lets a single matmul do the sum,
# instead of making `B` matrices and adding them.

# %% [markdown]
# ## Exercise 1.3: topological order
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | the order in which backward must visit a graph | 3 of 5 | 20 | Kahn, 1962 |
#
# A node may be used by several others. Backward may pass its gradient on only when **all** users have added their
# share. So it walks a list in which every node stands after all of its inputs, from the end to the start.
#
# Write the function that makes this list. Each node has one attribute, `inputs`, a list of nodes (empty for a leaf).
# Every node that `root` depends on appears exactly once, inputs before users, `root` last. Graphs are deep: a chain
# of 5,000 nodes must work, so do not recurse (Python stops at about 1,000 calls). Leave the nodes as they are.


# %%
class Node:
    """An operation of a graph: all that matters here is where its inputs come from."""

    def __init__(self, name: str, *inputs: "Node"):
        self.name, self.inputs = name, list(inputs)


# %%
def topological_order(root: Node) -> list[Node]:
    """All nodes that root depends on, root included: each once, and after all of its inputs."""
    ### BEGIN SOLUTION
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        node, inputs_done = stack.pop()
        if inputs_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))  # comes up again when all that lies above it is done
            stack.extend((before, False) for before in node.inputs)
    return order
    ### END SOLUTION


# %%
check("1.3", topological_order)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Depth first, with a list as your own stack. A node belongs into the result when you come back to it after all of its
# inputs, not when you first meet it.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Put pairs `(node, inputs_done)` on the stack. Popping `(node, False)`: skip it if seen; else remember it, push
# `(node, True)` back, and push its inputs with `False` on top. Popping `(node, True)`: append the node to the result.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** The pair `(node, True)` lies under the node's inputs on the stack, so it is popped after they and everything
# they depend on are in the list. The other way is Kahn's: count the users of each node, start from `root`, and release
# a node when its last user has been visited. PyTorch does this in its C++ engine, with a priority queue in place of
# the list. A breadth-first walk is wrong: it puts a node by its *shortest* path to the root, and the longest decides.

# %% [markdown]
# ## Exercise 1.4: cross-entropy and its gradient
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | the loss of every language model, without overflow, and its gradient in closed form | 2 of 5 | 20 | Bridle, 1990 |
#
# `logits` `[N, C]` are scores, `targets` `[N]` the right classes. With $p = \mathrm{softmax}(z)$ along each row, the
# loss is the mean over rows of $-\log p_{\text{target}}$. Return the loss and $\partial L/\partial z$ `[N, C]`.
#
# In float32, `exp(89)` is infinity. Logits of 10,000 must give a finite loss and gradient.


# %%
def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean cross-entropy and its gradient.  logits [N, C] floats, targets [N] ints -> (loss, gradient [N, C])."""
    ### BEGIN SOLUTION
    n = len(targets)
    shifted = logits - logits.max(axis=1, keepdims=True)  # [N, C], the largest of a row is 0
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))  # [N, C]
    gradient = np.exp(log_p)  # [N, C], the probabilities
    gradient[np.arange(n), targets] -= 1
    return float(-log_p[np.arange(n), targets].mean()), gradient / n
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
# The mean over the batch divides it by `N`.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** `log(softmax(z))` computes `exp`, rounds small probabilities to 0, and then takes `log(0)`. The joined
# formula never leaves the range. A single maximum for the whole batch is not enough: a row that lies 1,000 below it
# underflows to all zeros. This closed form is also why frameworks have `cross_entropy` on logits rather than on
# probabilities.

# %% [markdown]
# ## Exercise 1.5: check a gradient by central differences
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | the test that finds every wrong derivative, whatever wrote it | 2 of 5 | 15 | Griewank and Walther, 2008 |
#
# $\dfrac{\partial f}{\partial x_i} \approx \dfrac{f(x + \varepsilon e_i) - f(x - \varepsilon e_i)}{2 \varepsilon}$, one
# element at a time. By Taylor's theorem the error is of order $\varepsilon^2$; a one-sided difference has
# $\varepsilon$.
#
# Return an array of `x`'s shape. Compute in float64 even if `x` is float32: near 1, float32 has steps of
# $1.2 \cdot 10^{-7}$, and a change of $10^{-6}$ drowns in them. Leave `x` as it was.


# %%
def numeric_gradient(f: Callable[[np.ndarray], float], x: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """Central differences of a scalar function f at x, any shape -> float64 array of x's shape."""
    ### BEGIN SOLUTION
    x = np.array(x, dtype=np.float64)  # a copy
    gradient = np.empty_like(x)
    for at in np.ndindex(x.shape):
        kept = x[at]
        x[at] = kept + eps
        above = float(f(x))
        x[at] = kept - eps
        below = float(f(x))
        x[at] = kept
        gradient[at] = (above - below) / (2 * eps)
    return gradient
    ### END SOLUTION


# %%
check("1.5", numeric_gradient)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `np.ndindex(x.shape)` walks over the positions of an array of any shape, a scalar's empty position included. Work on
# a float64 copy.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# For each position: remember the value, set it to value + ε and call `f`, set it to value - ε and call `f`, put the
# value back. The last step is the one that gets forgotten: without it all later positions are differenced elsewhere.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Expand both sides: $f(x \pm \varepsilon) = f \pm \varepsilon f' + \tfrac{\varepsilon^2}{2} f'' \pm
# \tfrac{\varepsilon^3}{6} f''' + \dots$ The even terms cancel in the difference, and $\tfrac{\varepsilon^2}{6} f'''$
# stays. Rounding adds about $10^{-16} / \varepsilon$, so $\varepsilon$ near $10^{-5}$ or $10^{-6}$ is best in float64.
# It costs two forward passes an *input*; backward costs about two in all. So this checks gradients and never trains.

# %% [markdown]
# ## Exercise 1.6: one step of AdamW
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | the optimizer that trained the models you will serve | 2 of 5 | 15 | Loshchilov and Hutter, 2019 |
#
# Running means of the gradient and of its square, each corrected for having started at zero:
#
# $$m_t = \beta_1 m_{t-1} + (1 - \beta_1) g, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g^2$$
#
# $$\hat m = \frac{m_t}{1 - \beta_1^t}, \qquad \hat v = \frac{v_t}{1 - \beta_2^t}, \qquad
# p_t = p_{t-1} - \eta \lambda\, p_{t-1} - \eta\, \frac{\hat m}{\sqrt{\hat v} + \epsilon}$$
#
# The decay $\eta\lambda\,p$ acts on the parameter alone and never enters $m$ or $v$: that is the W. `t` counts from 1.
# Return new arrays and leave the given ones alone.


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
# Four lines: `m`, `v`, the two corrected means (return the *uncorrected* ones), then `p`. `eps` stands outside the
# square root. Write `beta1 * m + ...`, not `m *= beta1`: the second changes the caller's array.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Adam with the decay inside the gradient (`g + weight_decay * p`) divides the decay by $\sqrt{\hat v}$ too:
# parameters with large gradients are then hardly decayed. Loshchilov and Hutter moved it out. The memory is the price:
# two more arrays as large as the model, which is why training needs four times the bytes of the weights (weights,
# gradients, m, v) before a single activation is counted. Inference needs one.
