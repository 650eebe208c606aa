"""Wrong and alternative implementations for the exercises of chapter 1: they keep the checks honest."""

import numpy as np

from minillm.autograd import unbroadcast as fold
from minillm.learn.testing import alternative, wrong

# ---- 1.1


@wrong("1.1", "sums the axes in front, forgets those of size 1")
def unbroadcast(g, shape):
    return g.sum(axis=tuple(range(g.ndim - len(shape)))).reshape(shape) if g.size == np.prod(shape) else g.sum(axis=0)


@wrong("1.1", "takes the mean of the repeats instead of their sum")
def unbroadcast(g, shape):
    extra = g.ndim - len(shape)
    axes = (*range(extra), *(extra + i for i, n in enumerate(shape) if n == 1))
    return g.mean(axis=axes, keepdims=True).reshape(shape) if axes else g


@wrong("1.1", "loses the axes of size 1 (no keepdims)")
def unbroadcast(g, shape):
    extra = g.ndim - len(shape)
    return g.sum(axis=(*range(extra), *(extra + i for i, n in enumerate(shape) if n == 1)))


@wrong("1.1", "keeps the first copy instead of adding all")
def unbroadcast(g, shape):
    while g.ndim > len(shape):
        g = g[0]
    return g[tuple(slice(0, 1) if n == 1 else slice(None) for n in shape)]


@wrong("1.1", "aligns shapes at their first axis")
def unbroadcast(g, shape):
    padded = (*shape, *([1] * (g.ndim - len(shape))))
    axes = tuple(i for i, n in enumerate(padded) if n != g.shape[i])
    return g.sum(axis=axes, keepdims=True).reshape(shape)


@wrong("1.1", "forgets the axes in front when there are also axes of size 1")
def unbroadcast(g, shape):
    extra = g.ndim - len(shape)
    axes = tuple(extra + i for i, n in enumerate(shape) if n == 1) or tuple(range(extra))
    out = g.sum(axis=axes, keepdims=True)
    return out.reshape(shape) if out.size == np.prod(shape) else out


@alternative("1.1", "one axis after the other")
def unbroadcast(g, shape):
    while g.ndim > len(shape):
        g = np.asarray(g.sum(axis=0))
    for axis, n in enumerate(shape):
        if n == 1:
            g = g.sum(axis=axis, keepdims=True)
    return g


@alternative("1.1", "scatter-add by position")
def unbroadcast(g, shape):
    index = np.broadcast_to(np.arange(int(np.prod(shape))).reshape(shape), g.shape)
    out = np.zeros(int(np.prod(shape)), g.dtype)
    np.add.at(out, index.ravel(), g.ravel())
    return out.reshape(shape)


# ---- 1.2


@wrong("1.2", "forgets to fold the batch")
def matmul_backward(g, a, b):
    return g @ b.mT, a.mT @ g


@wrong("1.2", "transposes all axes instead of the last two")
def matmul_backward(g, a, b):
    return fold(g @ b.T, a.shape), fold(a.T @ g, b.shape)


@wrong("1.2", "no transposes: right only by shape, for square matrices")
def matmul_backward(g, a, b):
    if a.shape[-1] == a.shape[-2] == b.shape[-1]:
        return fold(g @ b, a.shape), fold(a @ g, b.shape)
    return fold(g @ b.mT, a.shape), fold(a.mT @ g, b.shape)


@wrong("1.2", "returns (db, da)")
def matmul_backward(g, a, b):
    return fold(a.mT @ g, b.shape), fold(g @ b.mT, a.shape)


@wrong("1.2", "factors in the wrong order: db = gᵀ a")
def matmul_backward(g, a, b):
    return fold(g @ b.mT, a.shape), fold((g.mT @ a), (*b.shape[:-2], b.shape[-1], b.shape[-2])).reshape(b.shape)


@wrong("1.2", "takes the batch's mean instead of its sum")
def matmul_backward(g, a, b):
    da, db = g @ b.mT, a.mT @ g
    da, db = fold(da, a.shape) * (a.size / da.size), fold(db, b.shape) * (b.size / db.size)
    return da, db


@alternative("1.2", "einsum")
def matmul_backward(g, a, b):
    da = np.einsum("...mn,...kn->...mk", g, b)
    db = np.einsum("...mk,...mn->...kn", a, g)
    return fold(da, a.shape), fold(db, b.shape)


@alternative("1.2", "the batch flattened into rows where b is one matrix")
def matmul_backward(g, a, b):
    da = fold(g @ np.swapaxes(b, -1, -2), a.shape)
    if b.ndim == 2 and a.ndim > 2:
        return da, a.reshape(-1, a.shape[-1]).T @ g.reshape(-1, g.shape[-1])
    return da, fold(np.swapaxes(a, -1, -2) @ g, b.shape)


# ---- 1.3


@wrong("1.3", "appends a node when it is first met (depth first, reversed)")
def topological_order(root):
    order, seen, stack = [], set(), [root]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            order.append(node)
            stack.extend(node.inputs)
    return order[::-1]


@wrong("1.3", "breadth first, reversed: goes by the shortest path")
def topological_order(root):
    order, seen = [root], {root}
    for node in order:
        for before in node.inputs:
            if before not in seen:
                seen.add(before)
                order.append(before)
    return order[::-1]


@wrong("1.3", "recursion")
def topological_order(root):
    order, seen = [], set()

    def visit(node):
        if node not in seen:
            seen.add(node)
            for before in node.inputs:
                visit(before)
            order.append(node)

    visit(root)
    return order


@wrong("1.3", "lists a node once for each user")
def topological_order(root):
    order, stack = [], [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        else:
            stack.append((node, True))
            stack.extend((before, False) for before in node.inputs)
    return order


@wrong("1.3", "users first, root at the start")
def topological_order(root):
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((before, False) for before in node.inputs)
    return order[::-1]


@wrong("1.3", "leaves out the leaves")
def topological_order(root):
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen and (node.inputs or node is root):
            seen.add(node)
            stack.append((node, True))
            stack.extend((before, False) for before in node.inputs)
    return order


@wrong("1.3", "empties the nodes' inputs on the way")
def topological_order(root):
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            while node.inputs:
                stack.append((node.inputs.pop(), False))
    return order


@alternative("1.3", "Kahn's: a node is released by its last user")
def topological_order(root):
    users, stack = {root: 0}, [root]
    while stack:
        for before in stack.pop().inputs:
            if before not in users:
                users[before] = 0
                stack.append(before)
            users[before] += 1
    order, ready = [], [root]
    while ready:
        node = ready.pop()
        order.append(node)
        for before in node.inputs:
            users[before] -= 1
            if users[before] == 0:
                ready.append(before)
    return order[::-1]


# ---- 1.4


def _parts(z):
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


@wrong("1.4", "no maximum taken out: overflows")
def cross_entropy(logits, targets):
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rows = np.arange(len(targets))
    loss = -np.log(p[rows, targets]).mean()
    p[rows, targets] -= 1
    return loss, p / len(targets)


@wrong("1.4", "log of a softmax: the log of 0 where a probability underflows")
def cross_entropy(logits, targets):
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    rows = np.arange(len(targets))
    loss = -np.log(p[rows, targets]).mean()
    p[rows, targets] -= 1
    return loss, p / len(targets)


@wrong("1.4", "one maximum for the whole batch")
def cross_entropy(logits, targets):
    z = logits - logits.max()
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    rows = np.arange(len(targets))
    gradient = np.exp(log_p)
    gradient[rows, targets] -= 1
    return -log_p[rows, targets].mean(), gradient / len(targets)


@wrong("1.4", "sums over the batch")
def cross_entropy(logits, targets):
    log_p, rows = _parts(logits), np.arange(len(targets))
    gradient = np.exp(log_p)
    gradient[rows, targets] -= 1
    return -log_p[rows, targets].sum(), gradient


@wrong("1.4", "the loss is a mean, its gradient that of the sum")
def cross_entropy(logits, targets):
    log_p, rows = _parts(logits), np.arange(len(targets))
    gradient = np.exp(log_p)
    gradient[rows, targets] -= 1
    return -log_p[rows, targets].mean(), gradient


@wrong("1.4", "the gradient is the probabilities, without the target's 1")
def cross_entropy(logits, targets):
    log_p, rows = _parts(logits), np.arange(len(targets))
    return -log_p[rows, targets].mean(), np.exp(log_p) / len(targets)


@wrong("1.4", "changes the logits it was given")
def cross_entropy(logits, targets):
    rows = np.arange(len(targets))
    logits -= logits.max(axis=1, keepdims=True)
    log_p = _parts(logits)
    gradient = np.exp(log_p)
    gradient[rows, targets] -= 1
    return -log_p[rows, targets].mean(), gradient / len(targets)


@wrong("1.4", "keeps the result in range with a small constant inside the log")
def cross_entropy(logits, targets):
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    rows = np.arange(len(targets))
    loss = -np.log(p[rows, targets] + 1e-9).mean()
    p[rows, targets] -= 1
    return loss, p / len(targets)


@alternative("1.4", "logaddexp and a one-hot matrix")
def cross_entropy(logits, targets):
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    onehot = np.eye(logits.shape[1])[targets]
    return -(onehot * log_p).sum() / len(targets), (np.exp(log_p) - onehot) / len(targets)


# ---- 1.5


@wrong("1.5", "one-sided difference")
def numeric_gradient(f, x, eps=1e-6):
    x = np.array(x, np.float64)
    gradient = np.empty_like(x)
    for at in np.ndindex(x.shape):
        moved = x.copy()
        moved[at] += eps
        gradient[at] = (f(moved) - f(x)) / eps
    return gradient


@wrong("1.5", "divides by eps instead of 2 eps")
def numeric_gradient(f, x, eps=1e-6):
    x = np.array(x, np.float64)
    gradient = np.empty_like(x)
    for at in np.ndindex(x.shape):
        above, below = x.copy(), x.copy()
        above[at] += eps
        below[at] -= eps
        gradient[at] = (f(above) - f(below)) / eps
    return gradient


@wrong("1.5", "does not put the element back")
def numeric_gradient(f, x, eps=1e-6):
    x = np.array(x, np.float64)
    gradient = np.empty_like(x)
    for at in np.ndindex(x.shape):
        x[at] += eps
        above = f(x)
        x[at] -= 2 * eps
        gradient[at] = (above - f(x)) / (2 * eps)
    return gradient


@wrong("1.5", "moves all elements at once: one number for all")
def numeric_gradient(f, x, eps=1e-6):
    x = np.array(x, np.float64)
    return np.full(x.shape, (f(x + eps) - f(x - eps)) / (2 * eps))


@wrong("1.5", "stays in float32")
def numeric_gradient(f, x, eps=1e-6):
    gradient = np.zeros(x.shape)
    for at in np.ndindex(x.shape):
        above, below = x.copy(), x.copy()
        above[at] += eps
        below[at] -= eps
        gradient[at] = (f(above) - f(below)) / (2 * eps)
    return gradient


@wrong("1.5", "works in the caller's array and leaves the last change in it")
def numeric_gradient(f, x, eps=1e-6):
    gradient = np.zeros(x.shape)
    for at in np.ndindex(x.shape):
        x[at] += eps
        above = f(x.astype(np.float64))
        x[at] -= 2 * eps
        gradient[at] = (above - f(x.astype(np.float64))) / (2 * eps)
    return gradient


@alternative("1.5", "unit vectors on the flattened array")
def numeric_gradient(f, x, eps=1e-6):
    x = np.asarray(x, np.float64)
    steps = np.eye(x.size).reshape(x.size, *x.shape) * eps
    return np.array([(f(x + step) - f(x - step)) / (2 * eps) for step in steps]).reshape(x.shape)


# ---- 1.6


@wrong("1.6", "no bias correction")
def adamw_step(p, g, m, v, t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    return p * (1 - lr * weight_decay) - lr * m / (np.sqrt(v) + eps), m, v


@wrong("1.6", "Adam with L2: the decay enters the gradient")
def adamw_step(p, g, m, v, t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    g = g + weight_decay * p
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    return p - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps), m, v


@wrong("1.6", "the decay forgets the learning rate")
def adamw_step(p, g, m, v, t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    return p * (1 - weight_decay) - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps), m, v


@wrong("1.6", "eps inside the square root")
def adamw_step(p, g, m, v, t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    return p * (1 - lr * weight_decay) - lr * (m / (1 - beta1**t)) / np.sqrt(v / (1 - beta2**t) + eps), m, v


@wrong("1.6", "returns the corrected means, so the correction piles up")
def adamw_step(p, g, m, v, t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    m, v = m / (1 - beta1**t), v / (1 - beta2**t)
    return p * (1 - lr * weight_decay) - lr * m / (np.sqrt(np.abs(v)) + eps), m, v


@wrong("1.6", "updates m and v in place")
def adamw_step(p, g, m, v, t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    m *= beta1
    m += (1 - beta1) * g
    v *= beta2
    v += (1 - beta2) * g * g
    return p * (1 - lr * weight_decay) - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps), m, v


@wrong("1.6", "takes t to count from 0")
def adamw_step(p, g, m, v, t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    t = t + 1
    return p * (1 - lr * weight_decay) - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps), m, v


@alternative("1.6", "the corrections folded into step size and eps")
def adamw_step(p, g, m, v, t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    m, v = m + (1 - beta1) * (g - m), v + (1 - beta2) * (g**2 - v)
    root = np.sqrt(1 - beta2**t)
    return p - lr * weight_decay * p - lr * root / (1 - beta1**t) * m / (np.sqrt(v) + eps * root), m, v
