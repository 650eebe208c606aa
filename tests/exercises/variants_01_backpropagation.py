"""Wrong and alternative implementations for the exercises of chapter 1: they keep the checks honest."""

import sys

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


@wrong("1.1", "returns float32, whatever it was given")
def softmax_backward(g, p):
    return (p * (g - (g * p).sum(axis=-1, keepdims=True))).astype(np.float32)


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


def _count(root, key=lambda node: node):
    users, stack = {key(root): 0}, [root]
    while stack:
        for node in stack.pop().inputs:
            if key(node) not in users:
                users[key(node)] = 0
                stack.append(node)
            users[key(node)] += 1
    return users


def _release(root, users, key=lambda node: node, once=False):
    waves = [[root]]
    while waves[-1]:
        released = []
        for user in waves[-1]:
            for node in set(user.inputs) if once else user.inputs:
                users[key(node)] -= 1
                if users[key(node)] == 0:
                    released.append(node)
        waves.append(released)
    return waves[:-1]


@wrong("1.3", "breadth first: goes by the shortest path")
def backward_waves(root):
    waves, seen = [[root]], {root}
    while waves[-1]:
        waves.append([])
        for user in waves[-2]:
            for node in user.inputs:
                if node not in seen:
                    seen.add(node)
                    waves[-1].append(node)
    return waves[:-1]


@wrong("1.3", "one node a wave, in a right order")
def backward_waves(root):
    return [[node] for wave in _release(root, _count(root)) for node in wave]


@wrong("1.3", "counts a node used twice by one user twice, and counts it down once")
def backward_waves(root):
    return _release(root, _count(root), once=True)


@wrong("1.3", "counts a node used twice by one user once, and counts it down twice")
def backward_waves(root):
    users, stack = {root: 0}, [root]
    while stack:
        for node in set(stack.pop().inputs):
            if node not in users:
                users[node] = 0
                stack.append(node)
            users[node] += 1
    return _release(root, users)


@wrong("1.3", "takes nodes of one name for one node")
def backward_waves(root):
    return _release(root, _count(root, str), str)


@wrong("1.3", "counts with recursion")
def backward_waves(root):
    users = {root: 0}

    def visit(user):
        for node in user.inputs:
            users[node] = users.get(node, 0) + 1
            if users[node] == 1:
                visit(node)

    visit(root)
    return _release(root, users)


@wrong("1.3", "raises the recursion limit")
def backward_waves(root):
    sys.setrecursionlimit(50_000)
    return _release(root, _count(root))


@wrong("1.3", "marks the nodes")
def backward_waves(root):
    for node in _count(root):
        node.seen = True
    return _release(root, _count(root))


@wrong("1.3", "an empty wave at the end")
def backward_waves(root):
    return [*_release(root, _count(root)), []]


@wrong("1.3", "waves from the leaves up, turned around: as late as possible")
def backward_waves(root):
    height = {}
    for wave in reversed(_release(root, _count(root))):
        for node in wave:
            height[node] = 1 + max((height[n] for n in node.inputs), default=-1)
    waves = [[] for _ in range(height[root] + 1)]
    for node, h in height.items():
        waves[height[root] - h].append(node)
    return waves


@wrong("1.3", "returns names")
def backward_waves(root):
    return [[node.name for node in wave] for wave in _release(root, _count(root))]


@wrong("1.3", "the lab's list, turned around")
def backward_waves(root):
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


@alternative("1.3", "the longest way from the root, over the lab's order")
def backward_waves(root):
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((before, False) for before in node.inputs)
    wave = {root: 0}
    for user in reversed(order):
        for node in user.inputs:
            wave[node] = max(wave.get(node, 0), wave[user] + 1)
    waves = [[] for _ in range(max(wave.values()) + 1)]
    for node, i in wave.items():
        waves[i].append(node)
    return waves


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


def _error(f, x, gradient, rng, directions, eps, unit=True, sides=2, divide=2.0, again=True, keep=np.max):
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


@wrong("1.5", "loses a NaN in Python's max")
def gradient_error(f, x, gradient, rng, directions=4, eps=1e-6):
    return _error(f, x, gradient, rng, directions, eps, keep=lambda errors: max(0.0, *errors))


@wrong("1.5", "forgets the absolute value of the difference")
def gradient_error(f, x, gradient, rng, directions=4, eps=1e-6):
    x, errors = np.asarray(x, np.float64), []
    for _ in range(directions):
        d = rng.standard_normal(x.shape)
        d = d / np.sqrt((d * d).sum())
        measured, claimed = (f(x + eps * d) - f(x - eps * d)) / (2 * eps), (gradient * d).sum()
        errors.append((measured - claimed) / (abs(measured) + abs(claimed) + 1e-12))
    return float(np.max(errors))


@wrong("1.5", "scales each row to length 1")
def gradient_error(f, x, gradient, rng, directions=4, eps=1e-6):
    x, errors = np.asarray(x, np.float64), []
    for _ in range(directions):
        d = rng.standard_normal(x.shape)
        d = d / (np.linalg.norm(d, axis=-1, keepdims=True) if d.ndim else abs(d))
        measured, claimed = (f(x + eps * d) - f(x - eps * d)) / (2 * eps), (gradient * d).sum()
        errors.append(abs(measured - claimed) / (abs(measured) + abs(claimed) + 1e-12))
    return float(np.max(errors))


@wrong("1.5", "works in the caller's array and puts it back")
def gradient_error(f, x, gradient, rng, directions=4, eps=1e-6):
    x, errors = np.asarray(x, np.float64), []
    for _ in range(directions):
        d = rng.standard_normal(x.shape)
        d = d / np.sqrt((d * d).sum())
        before = x.copy()
        x[...] = before + eps * d
        above = f(x)
        x[...] = before - eps * d
        measured, claimed = (above - f(x)) / (2 * eps), (gradient * d).sum()
        x[...] = before
        errors.append(abs(measured - claimed) / (abs(measured) + abs(claimed) + 1e-12))
    return float(np.max(errors))


@wrong("1.5", "draws from a generator of its own")
def gradient_error(f, x, gradient, rng, directions=4, eps=1e-6):
    return _error(f, x, gradient, np.random.default_rng(0), directions, eps)


@wrong("1.5", "forgets the small number below the fraction")
def gradient_error(f, x, gradient, rng, directions=4, eps=1e-6):
    x, errors = np.asarray(x, np.float64), []
    for _ in range(directions):
        d = rng.standard_normal(x.shape)
        d = d / np.sqrt((d * d).sum())
        measured, claimed = (f(x + eps * d) - f(x - eps * d)) / (2 * eps), (gradient * d).sum()
        errors.append(abs(measured - claimed) / np.float64(abs(measured) + abs(claimed)))
    return float(np.max(errors))


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
    x, errors = np.asarray(x, np.float64), []
    for _ in range(directions):
        d = rng.standard_normal(x.shape)
        d = d / np.sqrt((d * d).sum())
        measured, claimed = (f(x + eps * d) - f(x - eps * d)) / (2 * eps), (gradient * d).sum()
        errors.append(abs(measured - claimed) / (abs(measured) + 1e-12))
    return float(np.max(errors))


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
