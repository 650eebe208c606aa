# %% [markdown]
# # Exercises 1: backpropagation
#
# Six functions, each at most 30 lines: the parts of a reverse-mode engine that people get wrong. They belong to
# [chapter 1](../chapters/01_backpropagation.md) and its [lab](../notebooks/01_backpropagation.ipynb); each asks for
# one step beyond what these two show.
#
# Run the next cell, then take the exercises in any order. Replace `raise NotImplementedError(...)` by your code and
# run the `check` cell under it: it says which contracts hold, and on a failure what was expected and what came.

# %%
from collections.abc import Callable

import numpy as np

from minillm.autograd import unbroadcast
from minillm.learn import check

# %% [markdown]
# ## Exercise 1.1: the backward of softmax
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | a vector-Jacobian product whose Jacobian is not diagonal, without building it | 2 of 5 | 15 | Bridle, 1990 |
#
# Attention (chapter 2) turns its scores into weights by a softmax along the last axis: $p_i = e^{z_i} / \sum_j
# e^{z_j}$. Every $z_j$ moves every $p_i$, so each row has a Jacobian of `[C, C]`:
#
# $$\frac{\partial p_i}{\partial z_j} = p_i\,([i = j] - p_j)$$
#
# Given the output `p` `[..., C]` and `g = dL/dp` of the same shape, return `dL/dz`. Insert the Jacobian into $\bar
# z_j = \sum_i g_i\, \partial p_i / \partial z_j$ and simplify until only element-wise products and one sum a row are
# left. With rows of 1,000 elements, a Jacobian a row would take 1,000 times the memory of `p`.


# %%
def softmax_backward(g: np.ndarray, p: np.ndarray) -> np.ndarray:
    """dL/dz for p = softmax(z) along the last axis.  g = dL/dp [..., C], p [..., C] -> [..., C]."""
    ### BEGIN SOLUTION
    weighted = g * p  # [..., C]
    return weighted - p * weighted.sum(axis=-1, keepdims=True)  # [..., C]
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
# The other way is the Jacobian itself, `np.einsum("...i,...ij->...j", g, J)`: right, and $C$ times the memory and work.
# FlashAttention's backward rests on this form: the sum $\sum_i g_i p_i$ can be had without keeping `p` (chapter 5).

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
# element: $y_{mn} = \sum_k a_{mk} b_{kn}$. The package's
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
# $\partial L/\partial a_{mk} = \sum_n g_{mn} b_{kn}$: which product of two matrices is that?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# The shapes leave one choice: `da` `[M, K]` from `g` `[M, N]` and `b` `[K, N]`; `db` `[K, N]` from `a` `[M, K]` and
# `g` `[M, N]`. With a batch, transpose the last two axes only (`.mT`, not `.T`), and sum each result down to its
# input's shape.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** $\partial L/\partial a_{mk} = \sum_n g_{mn} b_{kn}$ is $g\,b^\top$, and
# $\partial L/\partial b_{kn} = \sum_m a_{mk} g_{mn}$ is $a^\top g$. Each costs as many multiply-adds as the forward
# product, so backward costs twice forward: the 1 : 2 that all training estimates rest on. `minillm/autograd/rules.py`
# treats one matrix for a whole batch apart: it flattens the batch into the rows and lets a single matmul do the sum,
# instead of making `B` matrices and adding them.

# %% [markdown]
# ## Exercise 1.3: the walk back in waves
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | which nodes backward may visit side by side, by counting users as PyTorch does | 3 of 5 | 20 | Kahn, 1962 |
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
# (Python stops at about 1,000 calls). Leave the nodes as they are: no new attributes.


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
# | the loss of every language model, without overflow, and its gradient in closed form | 2 of 5 | 20 | Bridle, 1990 |
#
# `logits` `[N, C]` are scores, `targets` `[N]` the right classes. With $p = \mathrm{softmax}(z)$ along each row, the
# loss is the mean over rows of $-\log p_{\text{target}}$. Return the loss and $\partial L/\partial z$ `[N, C]`,
# in the logits' dtype.
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
# underflows to all zeros. The other way is `np.logaddexp.reduce(logits, axis=1)` for $\log \sum_j e^{z_j}$: one call.
# This closed form is also why frameworks have `cross_entropy` on logits rather than on probabilities.

# %% [markdown]
# ## Exercise 1.5: check the gradient of a large model
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | the test that finds wrong derivatives, cheap enough for large models | 3 of 5 | 20 | Griewank and Walther, 2008 |
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
# and return the **largest** error over `directions` of them; a NaN anywhere must come out as NaN. Compute in float64
# even if `x` is float32 (near 1, float32 has steps of $1.2 \cdot 10^{-7}$, and a change of $10^{-6}$ drowns in them),
# and never change `x`, not even for a moment: `f` may look at it.


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
# Return the *uncorrected* means: the correction is made anew in each step. `eps` stands outside the square root. And
# `m *= beta1` changes the caller's array.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Adam with the decay inside the gradient (`g + weight_decay * p`) divides the decay by $\sqrt{\hat v}$ too:
# parameters with large gradients are then hardly decayed. Loshchilov and Hutter moved it out. The memory is the price:
# two more arrays as large as the model, which is why training needs four times the bytes of the weights (weights,
# gradients, m, v) before a single activation is counted. Inference needs one.
# The other way folds both corrections into the step size, with `eps` scaled by $\sqrt{1 - \beta_2^t}$ to be the same
# formula. (The paper multiplies the decay by a schedule of its own; $\eta \lambda$ is PyTorch's convention.)
