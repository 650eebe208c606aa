"""Wrong and alternative implementations for the exercises of chapter 1: they keep the checks honest."""

import numpy as np

from minillm.autograd import unbroadcast as fold
from minillm.learn.testing import alternative, wrong

# ---- 1.1


@wrong("1.1", "element by element: g p (1 - p), the diagonal alone")
def softmax_backward(g, p):
    return g * p * (1 - p)


@wrong("1.1", "the sum over the whole array instead of each row")
def softmax_backward(g, p):
    return p * (g - (g * p).sum())


@wrong("1.1", "subtracts the plain mean of g")
def softmax_backward(g, p):
    return p * (g - g.mean(axis=-1, keepdims=True))


@wrong("1.1", "the backward of log-softmax")
def softmax_backward(g, p):
    return g - p * g.sum(axis=-1, keepdims=True)


@wrong("1.1", "builds the Jacobian")
def softmax_backward(g, p):
    jacobian = p[..., :, None] * (np.eye(p.shape[-1], dtype=p.dtype) - p[..., None, :])
    return np.einsum("...i,...ij->...j", g, jacobian).astype(p.dtype)


@wrong("1.1", "sums along axis 1, which is the last one of a matrix only")
def softmax_backward(g, p):
    axis = min(1, p.ndim - 1)
    return p * (g - (g * p).sum(axis=axis, keepdims=True))


@wrong("1.1", "works in the caller's array")
def softmax_backward(g, p):
    g -= (g * p).sum(axis=-1, keepdims=True)
    g *= p
    return g


@alternative("1.1", "einsum for the sum of a row")
def softmax_backward(g, p):
    return p * (g - np.einsum("...i,...i->...", g, p)[..., None])


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


@wrong("1.3", "depth first, a node as soon as it is met")
def backward_order(root):
    order, seen, stack = [], set(), [root]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            order.append(node)
            stack.extend(node.inputs)
    return order


@wrong("1.3", "breadth first: goes by the shortest path")
def backward_order(root):
    order, seen = [root], {root}
    for node in order:
        for before in node.inputs:
            if before not in seen:
                seen.add(before)
                order.append(before)
    return order


@wrong("1.3", "recursion")
def backward_order(root):
    order, seen = [], set()

    def visit(node):
        if node not in seen:
            seen.add(node)
            for before in node.inputs:
                visit(before)
            order.append(node)

    visit(root)
    return order[::-1]


def _count(root, key=lambda node: node):
    users, stack = {key(root): 0}, [root]
    while stack:
        for node in stack.pop().inputs:
            if key(node) not in users:
                users[key(node)] = 0
                stack.append(node)
            users[key(node)] += 1
    return users


def _release(root, users, key=lambda node: node):
    order, ready = [], [root]
    while ready:
        order.append(ready.pop())
        for node in order[-1].inputs:
            users[key(node)] -= 1
            if users[key(node)] == 0:
                ready.append(node)
    return order


@wrong("1.3", "inputs before users, root at the end")
def backward_order(root):
    return _release(root, _count(root))[::-1]


@wrong("1.3", "takes nodes of one name for one node")
def backward_order(root):
    return _release(root, _count(root, str), str)


@wrong("1.3", "counts a node used twice by one user once, and counts it down twice")
def backward_order(root):
    users, stack = {root: 0}, [root]
    while stack:
        for node in set(stack.pop().inputs):
            if node not in users:
                users[node] = 0
                stack.append(node)
            users[node] += 1
    order, ready = [], [root]
    while ready:
        order.append(ready.pop())
        for node in order[-1].inputs:
            users[node] -= 1
            if users[node] <= 0:
                ready.append(node)
    return order


@wrong("1.3", "releases a node by its first user")
def backward_order(root):
    order, ready, seen = [], [root], {root}
    while ready:
        order.append(ready.pop(0))
        for node in order[-1].inputs:
            if node not in seen:
                seen.add(node)
                ready.append(node)
    return order


@wrong("1.3", "leaves out the leaves")
def backward_order(root):
    order = _release(root, _count(root))
    return [node for node in order if node.inputs or node is root]


@wrong("1.3", "returns names")
def backward_order(root):
    return [node.name for node in _release(root, _count(root))]


@wrong("1.3", "empties the nodes' inputs on the way")
def backward_order(root):
    order = _release(root, _count(root))
    for node in order:
        node.inputs.clear()
    return order


@alternative("1.3", "the lab's: depth first, inputs before users, turned around")
def backward_order(root):
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


@wrong("1.4", "computes in float64 and returns that")
def cross_entropy(logits, targets):
    log_p, rows = _parts(logits.astype(np.float64)), np.arange(len(targets))
    gradient = np.exp(log_p)
    gradient[rows, targets] -= 1
    return -log_p[rows, targets].mean(), gradient / len(targets)


@alternative("1.4", "logaddexp and a one-hot matrix")
def cross_entropy(logits, targets):
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    onehot = np.eye(logits.shape[1], dtype=logits.dtype)[targets]
    return -(onehot * log_p).sum() / len(targets), (np.exp(log_p) - onehot) / len(targets)


# ---- 1.5


def _error(f, x, gradient, rng, directions, eps, unit=True, sides=2, divide=2.0, again=True, keep=max):
    x, errors, d = np.asarray(x, np.float64), [], None
    for _ in range(directions):
        if again or d is None:
            d = rng.standard_normal(x.shape)
            d = d / np.sqrt((d * d).sum()) if unit else d
        below = f(x - eps * d) if sides == 2 else f(x)
        measured, claimed = (f(x + eps * d) - below) / (divide * eps), (gradient * d).sum()
        errors.append(abs(measured - claimed) / (abs(measured) + abs(claimed) + 1e-12))
    return float(keep(errors))


@wrong("1.5", "one-sided difference")
def gradient_error(f, x, gradient, rng, directions=4, eps=1e-6):
    return _error(f, x, gradient, rng, directions, eps, sides=1, divide=1.0)


@wrong("1.5", "divides by eps instead of 2 eps")
def gradient_error(f, x, gradient, rng, directions=4, eps=1e-6):
    return _error(f, x, gradient, rng, directions, eps, divide=1.0)


@wrong("1.5", "directions are not scaled to length 1")
def gradient_error(f, x, gradient, rng, directions=4, eps=1e-6):
    return _error(f, x, gradient, rng, directions, eps, unit=False)


@wrong("1.5", "one direction, again and again")
def gradient_error(f, x, gradient, rng, directions=4, eps=1e-6):
    return _error(f, x, gradient, rng, directions, eps, again=False)


@wrong("1.5", "the error of the last direction")
def gradient_error(f, x, gradient, rng, directions=4, eps=1e-6):
    return _error(f, x, gradient, rng, directions, eps, keep=lambda errors: errors[-1])


@wrong("1.5", "the mean of the errors")
def gradient_error(f, x, gradient, rng, directions=4, eps=1e-6):
    return _error(f, x, gradient, rng, directions, eps, keep=np.mean)


@wrong("1.5", "stays in float32")
def gradient_error(f, x, gradient, rng, directions=4, eps=1e-6):
    errors = []
    for _ in range(directions):
        d = rng.standard_normal(x.shape)
        d = (d / np.sqrt((d * d).sum())).astype(x.dtype)
        step = (d * np.asarray(eps, x.dtype)).astype(x.dtype)
        measured, claimed = (f(x + step) - f(x - step)) / (2 * eps), (gradient * d).sum()
        errors.append(abs(measured - claimed) / (abs(measured) + abs(claimed) + 1e-12))
    return float(max(errors))


@wrong("1.5", "one element at a time, as in the lab")
def gradient_error(f, x, gradient, rng, directions=4, eps=1e-6):
    x, measured = np.array(x, np.float64), np.empty(np.shape(x))
    for at in np.ndindex(x.shape):
        above, below = x.copy(), x.copy()
        above[at] += eps
        below[at] -= eps
        measured[at] = (f(above) - f(below)) / (2 * eps)
    return float(np.abs(measured - gradient).sum() / (np.abs(measured).sum() + np.abs(gradient).sum() + 1e-12))


@wrong("1.5", "takes the scale out by the gradient: 1 for a gradient twice too large")
def gradient_error(f, x, gradient, rng, directions=4, eps=1e-6):
    x, worst = np.asarray(x, np.float64), 0.0
    for _ in range(directions):
        d = rng.standard_normal(x.shape)
        d = d / np.sqrt((d * d).sum())
        measured, claimed = (f(x + eps * d) - f(x - eps * d)) / (2 * eps), (gradient * d).sum()
        worst = max(worst, abs(measured - claimed) / (abs(measured) + 1e-12))
    return float(worst)


@alternative("1.5", "all directions drawn first")
def gradient_error(f, x, gradient, rng, directions=4, eps=1e-6):
    x = np.array(x, dtype=np.float64)
    drawn = rng.standard_normal((directions, *x.shape)).reshape(directions, -1)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    steps = drawn.reshape(directions, *x.shape)
    measured = np.array([(f(x + eps * d) - f(x - eps * d)) / (2 * eps) for d in steps])
    claimed = drawn @ np.ravel(gradient)
    return float((np.abs(measured - claimed) / (np.abs(measured) + np.abs(claimed) + 1e-12)).max())


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
