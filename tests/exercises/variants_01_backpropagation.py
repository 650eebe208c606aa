"""Wrong and alternative implementations for the exercises of chapter 1: they keep the checks honest."""

import math
import sys

import numpy as np

from minillm.autograd import unbroadcast as fold
from minillm.learn.testing import alternative, wrong

# ---- 1.w1


@wrong("1.w1", "uphill: adds the derivative")
def descend(w, x, b, lr, steps):
    path = [w]
    for _ in range(steps):
        path.append(path[-1] + lr * 2 * (path[-1] * x + b) * x)
    return path


@wrong("1.w1", "forgets the 2 of the square")
def descend(w, x, b, lr, steps):
    path = [w]
    for _ in range(steps):
        path.append(path[-1] - lr * (path[-1] * x + b) * x)
    return path


@wrong("1.w1", "forgets the inner slope x")
def descend(w, x, b, lr, steps):
    path = [w]
    for _ in range(steps):
        path.append(path[-1] - lr * 2 * (path[-1] * x + b))
    return path


@wrong("1.w1", "the derivative of the first w in every step")
def descend(w, x, b, lr, steps):
    return [w - i * lr * 2 * (w * x + b) * x for i in range(steps + 1)]


@wrong("1.w1", "leaves the first w out")
def descend(w, x, b, lr, steps):
    path = [w]
    for _ in range(steps):
        path.append(path[-1] - lr * 2 * (path[-1] * x + b) * x)
    return path[1:]


@wrong("1.w1", "returns the last w alone")
def descend(w, x, b, lr, steps):
    for _ in range(steps):
        w -= lr * 2 * (w * x + b) * x
    return w


@wrong("1.w1", "always ten steps")
def descend(w, x, b, lr, steps):
    path = [w]
    for _ in range(10):
        path.append(path[-1] - lr * 2 * (path[-1] * x + b) * x)
    return path


@alternative("1.w1", "in an array, w changed in place")
def descend(w, x, b, lr, steps):
    path = np.empty(steps + 1)
    for i in range(steps + 1):
        path[i] = w
        w -= 2 * lr * x * (w * x + b)
    return path


@wrong("1.w1", "rounds to float32")
def descend(w, x, b, lr, steps):
    path = [w]
    for _ in range(steps):
        path.append(path[-1] - lr * 2 * (path[-1] * x + b) * x)
    return [float(np.float32(v)) for v in path]


@wrong("1.w1", "clips slope to 100")
def descend(w, x, b, lr, steps):
    path = [w]
    for _ in range(steps):
        path.append(path[-1] - lr * max(-100, min(100, 2 * (path[-1] * x + b) * x)))
    return path


# ---- 1.w2


@wrong("1.w2", "the diagonal alone, as if z1 did not move p0")
def softmax_jacobian(z0, z1):
    p = 1 / (1 + np.exp(z1 - z0))
    return [[p * (1 - p), 0], [0, p * (1 - p)]]


@wrong("1.w2", "all four positive")
def softmax_jacobian(z0, z1):
    p = 1 / (1 + np.exp(z1 - z0))
    return [[p * (1 - p)] * 2] * 2


@wrong("1.w2", "the probabilities themselves")
def softmax_jacobian(z0, z1):
    p = 1 / (1 + np.exp(z1 - z0))
    return [[p, -p], [-(1 - p), 1 - p]]


@wrong("1.w2", "the slopes of the log-probabilities")
def softmax_jacobian(z0, z1):
    p = 1 / (1 + np.exp(z1 - z0))
    return [[1 - p, -(1 - p)], [-p, p]]


@wrong("1.w2", "squares on the diagonal: p (1 - p) taken for p - p^3")
def softmax_jacobian(z0, z1):
    p = np.exp([z0, z1]) / np.exp([z0, z1]).sum()
    return np.diag(p * p) - np.outer(p, p)


@alternative("1.w2", "diag(p) - outer(p, p)")
def softmax_jacobian(z0, z1):
    p = np.exp([z0, z1]) / np.exp([z0, z1]).sum()
    return np.diag(p) - np.outer(p, p)


@wrong("1.w2", "clamps scores to 10")
def softmax_jacobian(z0, z1):
    z0, z1 = (max(-10, min(10, z0)), max(-10, min(10, z1)))
    p0 = 1 / (1 + math.exp(z1 - z0))
    slope = p0 * (1 - p0)
    return [[slope, -slope], [-slope, slope]]


@wrong("1.w2", "overflow guard: 0 beyond 30")
def softmax_jacobian(z0, z1):
    if abs(z0 - z1) > 30:
        return [[0.0, 0.0], [0.0, 0.0]]
    p0 = 1 / (1 + math.exp(z1 - z0))
    slope = p0 * (1 - p0)
    return [[slope, -slope], [-slope, slope]]


# ---- 1.w3


@wrong("1.w3", "counts operations: x * x is one use")
def contributions(program, name):
    return sum(name in inputs for _, _, inputs in program)


@wrong("1.w3", "counts different inputs")
def contributions(program, name):
    return sum(set(inputs).intersection([name]) != set() for _, _, inputs in program)


@wrong("1.w3", "counts results, too")
def contributions(program, name):
    return sum([result, *inputs].count(name) for result, _, inputs in program)


@wrong("1.w3", "counts in the text of the program")
def contributions(program, name):
    return str(program).count(repr(name))


@wrong("1.w3", "counts names that begin alike")
def contributions(program, name):
    return sum(i.startswith(name) for _, _, inputs in program for i in inputs)


@wrong("1.w3", "takes the names out of the program as it counts")
def contributions(program, name):
    found = 0
    for _, _, inputs in program:
        while name in inputs:
            inputs.remove(name)
            found += 1
    return found


@alternative("1.w3", "a loop with a counter")
def contributions(program, name):
    found = 0
    for _, _, inputs in program:
        for i in inputs:
            if i == name:
                found += 1
    return found


@wrong("1.w3", "tells no capitals from small letters")
def contributions(program, name):
    return sum(([i.lower() for i in inputs].count(name.lower()) for _, _, inputs in program))


@wrong("1.w3", "stops at a result that nobody uses")
def contributions(program, name):
    program = [s for s in program if s is program[-1] or any(s[0] in t[2] for t in program)]
    return sum((inputs.count(name) for _, _, inputs in program))


# ---- 1.0


class _Value:
    """The right answer in parts, each of which a variant may replace."""

    def __init__(self, data, made_from=()):
        self.data, self.grad, self.made_from = float(data), 0.0, made_from

    def __add__(self, other):
        return type(self)(self.data + other.data, ((self, 1.0), (other, 1.0)))

    def __mul__(self, other):
        return type(self)(self.data * other.data, ((self, other.data), (other, self.data)))

    def tanh(self):
        t = np.tanh(self.data)
        return type(self)(t, ((self, 1 - t * t),))

    def order(self):
        """Inputs first."""
        order, seen, stack = [], set(), [(self, False)]
        while stack:
            value, done = stack.pop()
            if done:
                order.append(value)
            elif value not in seen:
                seen.add(value)
                stack += [(value, True), *((v, False) for v, _ in value.made_from)]
        return order

    def start(self, order):
        for value in order:
            value.grad = 0.0
        self.grad = 1.0

    def add(self, v, gradient):
        v.grad += gradient

    def backward(self):
        order = self.order()
        self.start(order)
        for value in reversed(order):
            for v, slope in value.made_from:
                self.add(v, value.grad * slope)


@wrong("1.0", "has no gradient before backward")
class Value(_Value):
    def __init__(self, data, made_from=()):
        super().__init__(data, made_from)
        self.grad = None


@wrong("1.0", "gives plain numbers")
class Value(_Value):
    def __add__(self, other):
        return self.data + other.data


@wrong("1.0", "can be walked once: forgets what it was computed from")
class Value(_Value):
    def backward(self):
        order = self.order()
        super().backward()
        for value in order:
            value.made_from = ()


@wrong("1.0", "overwrites instead of adding")
class Value(_Value):
    def add(self, v, gradient):
        v.grad = gradient


@wrong("1.0", "does not start anew: gradients of an earlier call stay")
class Value(_Value):
    def start(self, order):
        self.grad = 1.0


@wrong("1.0", "clears the gradients of inputs only")
class Value(_Value):
    def start(self, order):
        for value in order:
            if not value.made_from:
                value.grad = 0.0
        self.grad = 1.0


@wrong("1.0", "adds 1 to the result's own gradient")
class Value(_Value):
    def start(self, order):
        for value in order:
            if value is not self:
                value.grad = 0.0
        self.grad += 1.0


@wrong("1.0", "breadth first: some go on too early")
class Value(_Value):
    def order(self):
        order = [self]
        for value in order:
            order += [v for v, _ in dict(value.made_from).items() if v not in order]
        return order[::-1]


@wrong("1.0", "walks every path")
class Value(_Value):
    def backward(self):
        self.start(self.order())
        self.grad, stack = 0.0, [(self, 1.0)]
        while stack:
            value, gradient = stack.pop()
            value.grad += gradient
            stack += [(v, gradient * slope) for v, slope in value.made_from]


@wrong("1.0", "recurses")
class Value(_Value):
    def order(self):
        order, seen = [], set()

        def visit(value):
            if value not in seen:
                seen.add(value)
                for v, _ in value.made_from:
                    visit(v)
                order.append(value)

        visit(self)
        return order


@wrong("1.0", "raises the recursion limit")
class Value(_Value):
    def order(self):
        sys.setrecursionlimit(50_000)
        return super().order()


@wrong("1.0", "tanh's slope from its input: 1 - a^2")
class Value(_Value):
    def tanh(self):
        return type(self)(np.tanh(self.data), ((self, 1 - self.data**2),))


@wrong("1.0", "tanh by exponentials that overflow")
class Value(_Value):
    def tanh(self):
        up, down = float(np.e) ** self.data, float(np.e) ** -self.data
        t = (up - down) / (up + down)
        return type(self)(t, ((self, 1 - t * t),))


@wrong("1.0", "the product's slopes the wrong way round")
class Value(_Value):
    def __mul__(self, other):
        return type(self)(self.data * other.data, ((self, self.data), (other, other.data)))


@wrong("1.0", "remembers one of two equal inputs")
class Value(_Value):
    def __mul__(self, other):
        return type(self)(self.data * other.data, tuple({self: other.data, other: self.data}.items()))


@wrong("1.0", "steps downhill in backward, too")
class Value(_Value):
    def backward(self):
        super().backward()
        for value in self.order():
            value.data -= 0.01 * value.grad


@wrong("1.0", "clears all Values that there are")
class Value(_Value):
    made = []

    def __init__(self, data, made_from=()):
        super().__init__(data, made_from)
        self.made.append(self)

    def start(self, order):
        super().start(self.made)


@wrong("1.0", "leaves the inner Values without a gradient")
class Value(_Value):
    def backward(self):
        super().backward()
        for value in self.order():
            if value.made_from:
                value.grad = 0.0


@alternative("1.0", "numbers Values as they are made, and takes the largest from a heap")
class Value(_Value):
    made = 0

    def __init__(self, data, made_from=()):
        super().__init__(data, made_from)
        type(self).made += 1
        self.number = type(self).made

    def order(self):
        seen, stack = {self}, [self]
        while stack:
            for v, _ in stack.pop().made_from:
                if v not in seen:
                    seen.add(v)
                    stack.append(v)
        return sorted(seen, key=lambda value: value.number)


@alternative("1.0", "counts users, as PyTorch does; gradients in a dictionary")
class Value(_Value):
    def backward(self):
        users = dict.fromkeys(self.order(), 0)
        for value in users:
            for v, _ in value.made_from:
                users[v] += 1
        grads, free = {self: 1.0}, [self]
        while free:
            value = free.pop()
            value.grad = grads[value]
            for v, slope in value.made_from:
                grads[v] = grads.get(v, 0.0) + slope * value.grad
                users[v] -= 1
                if not users[v]:
                    free.append(v)


@wrong("1.0", "edges of slope 0 left out: stale")
class Value:
    def __init__(self, data, made_from=()):
        self.data, self.grad, self.made_from = (data, 0.0, made_from)

    def __add__(self, other):
        return type(self)(self.data + other.data, ((self, 1.0), (other, 1.0)))

    def __mul__(self, other):
        return type(self)(self.data * other.data, ((self, other.data), (other, self.data)))

    def tanh(self):
        t = math.tanh(self.data)
        return type(self)(t, ((self, 1 - t * t),))

    def backward(self):
        order, seen, stack = ([], set(), [(self, False)])
        while stack:
            value, inputs_done = stack.pop()
            if inputs_done:
                order.append(value)
            elif value not in seen:
                seen.add(value)
                stack += [(value, True), *((v, False) for v, s in value.made_from if s)]
        for value in order:
            value.grad = float(value is self)
        for value in reversed(order):
            for v, slope in value.made_from:
                if slope:
                    v.grad += value.grad * slope


@wrong("1.0", "a + 0 hands a back")
class Value:
    def __init__(self, data, made_from=()):
        self.data, self.grad, self.made_from = (data, 0.0, made_from)

    def __add__(self, other):
        if other.data == 0:
            return self
        return type(self)(self.data + other.data, ((self, 1.0), (other, 1.0)))

    def __mul__(self, other):
        return type(self)(self.data * other.data, ((self, other.data), (other, self.data)))

    def tanh(self):
        t = math.tanh(self.data)
        return type(self)(t, ((self, 1 - t * t),))

    def backward(self):
        order, seen, stack = ([], set(), [(self, False)])
        while stack:
            value, inputs_done = stack.pop()
            if inputs_done:
                order.append(value)
            elif value not in seen:
                seen.add(value)
                stack += [(value, True), *((v, False) for v, _ in value.made_from)]
        for value in order:
            value.grad = float(value is self)
        for value in reversed(order):
            for v, slope in value.made_from:
                v.grad += value.grad * slope


@wrong("1.0", "stops where the gradient is 0 with stale")
class Value:
    def __init__(self, data, made_from=()):
        self.data, self.grad, self.made_from = (data, 0.0, made_from)

    def __add__(self, other):
        return type(self)(self.data + other.data, ((self, 1.0), (other, 1.0)))

    def __mul__(self, other):
        return type(self)(self.data * other.data, ((self, other.data), (other, self.data)))

    def tanh(self):
        t = math.tanh(self.data)
        return type(self)(t, ((self, 1 - t * t),))

    def backward(self):
        order, seen, stack = ([], set(), [(self, False)])
        while stack:
            value, inputs_done = stack.pop()
            if inputs_done:
                order.append(value)
            elif value not in seen:
                seen.add(value)
                stack += [(value, True), *((v, False) for v, _ in value.made_from)]
        for value in order:
            value.grad = float(value is self) if value is self else None
        for value in reversed(order):
            for v, slope in value.made_from:
                v.grad = (v.grad or 0.0) + value.grad * slope if value.grad else v.grad


@wrong("1.0", "raises the recursion limit and puts it back")
class Value:
    def __init__(self, data, made_from=()):
        self.data, self.grad, self.made_from = (data, 0.0, made_from)

    def __add__(self, other):
        return type(self)(self.data + other.data, ((self, 1.0), (other, 1.0)))

    def __mul__(self, other):
        return type(self)(self.data * other.data, ((self, other.data), (other, self.data)))

    def tanh(self):
        t = math.tanh(self.data)
        return type(self)(t, ((self, 1 - t * t),))

    def backward(self):
        import sys

        old = sys.getrecursionlimit()
        sys.setrecursionlimit(100000)
        order, seen = ([], set())

        def visit(v):
            if v in seen:
                return
            seen.add(v)
            for w, _ in v.made_from:
                visit(w)
            order.append(v)

        visit(self)
        stack = []
        sys.setrecursionlimit(old)
        while stack:
            value, inputs_done = stack.pop()
            if inputs_done:
                order.append(value)
            elif value not in seen:
                seen.add(value)
                stack += [(value, True), *((v, False) for v, _ in value.made_from)]
        for value in order:
            value.grad = float(value is self)
        for value in reversed(order):
            for v, slope in value.made_from:
                v.grad += value.grad * slope


@wrong("1.0", "slopes at backward time in a*b by data of y")
class Value:
    def __init__(self, data, made_from=()):
        self.data, self.grad, self.made_from = (data, 0.0, made_from)

    def __add__(self, other):
        return type(self)(self.data + other.data, ((self, 1.0), (other, 1.0)))

    def __mul__(self, other):
        return type(self)(self.data * other.data, ((self, other.data), (other, self.data)))

    def tanh(self):
        t = math.tanh(self.data)
        return type(self)(t, ((self, max(1e-07, 1 - t * t)),))

    def backward(self):
        order, seen, stack = ([], set(), [(self, False)])
        while stack:
            value, inputs_done = stack.pop()
            if inputs_done:
                order.append(value)
            elif value not in seen:
                seen.add(value)
                stack += [(value, True), *((v, False) for v, _ in value.made_from)]
        for value in order:
            value.grad = float(value is self)
        for value in reversed(order):
            for v, slope in value.made_from:
                v.grad += value.grad * slope


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


@wrong("1.1", "the Jacobian, column by column: little memory, and C times the work")
def softmax_backward(g, p):
    out = np.empty_like(p)
    for j in range(p.shape[-1]):
        column = -p * p[..., j : j + 1]
        column[..., j] += p[..., j]
        out[..., j] = (g * column).sum(axis=-1)
    return out


@wrong("1.1", "the Jacobian in blocks of 40 columns")
def softmax_backward(g, p):
    blocks, n = [], p.shape[-1]
    for j in range(0, n, 40):
        columns = p[..., :, None] * (np.eye(n, dtype=p.dtype)[:, j : j + 40] - p[..., None, j : j + 40])
        blocks.append((g[..., :, None] * columns).sum(axis=-2))
    return np.concatenate(blocks, axis=-1)


@wrong("1.1", "plain arrays, element by element in Python")
def softmax_backward(g, p):
    g, p = np.asarray(g), np.asarray(p)
    columns = [(g * p * ((np.arange(p.shape[-1]) == j) - p[..., j : j + 1])).sum(-1) for j in range(p.shape[-1])]
    return np.stack(columns, -1).astype(p.dtype)


@wrong("1.1", "float64 in between, and out")
def softmax_backward(g, p):
    g, p = g.astype(np.float64), p.astype(np.float64)
    return p * (g - (g * p).sum(axis=-1, keepdims=True))


@wrong("1.1", "reads memory in order, whatever the strides")
def softmax_backward(g, p):
    g, p = (np.ravel(x, "K").reshape(x.shape) for x in (g, p))
    return p * (g - (g * p).sum(axis=-1, keepdims=True))


@wrong("1.1", "hands back g where there is one class")
def softmax_backward(g, p):
    return g.copy() if p.shape[-1] == 1 else p * (g - (g * p).sum(axis=-1, keepdims=True))


@alternative("1.1", "a loop over rows")
def softmax_backward(g, p):
    out = np.empty_like(p)
    for at in np.ndindex(p.shape[:-1]):
        out[at] = p[at] * (g[at] - (g[at] * p[at]).sum())
    return out


@alternative("1.1", "einsum for the sum of a row")
def softmax_backward(g, p):
    return p * (g - np.einsum("...i,...i->...", g, p)[..., None])


@wrong("1.1", "computes in float32")
def softmax_backward(g, p):
    dt = p.dtype
    g, p = (g.astype(np.float32), p.astype(np.float32))
    weighted = g * p
    return (weighted - p * weighted.sum(axis=-1, keepdims=True)).astype(dt)


@wrong("1.1", "broadcast jacobian for 1-D only")
def softmax_backward(g, p):
    if p.ndim == 1:
        return ((np.diag(p) - np.outer(p, p)) @ g).astype(p.dtype)
    weighted = g * p
    return weighted - p * weighted.sum(axis=-1, keepdims=True)


@wrong("1.1", "Jacobian for 3 and more dims")
def softmax_backward(g, p):
    if p.ndim > 2:
        return np.einsum("...i,...ij->...j", g, p[..., :, None] * (np.eye(p.shape[-1]) - p[..., None, :])).astype(
            p.dtype
        )
    weighted = g * p
    return weighted - p * weighted.sum(axis=-1, keepdims=True)


@wrong("1.1", "loses small p")
def softmax_backward(g, p):
    p = np.where(p < 0.0001, 0, p).astype(p.dtype)
    weighted = g * p
    return weighted - p * weighted.sum(axis=-1, keepdims=True)


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


def _fold_wrong(g, shape):
    if g.ndim > len(shape):
        return g.sum(axis=tuple(range(g.ndim - len(shape))))
    ones = tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1)
    return g.sum(axis=ones, keepdims=True)


@wrong("1.2", "sums missing axes, or else axes of size 1, but not both")
def matmul_backward(g, a, b):
    return _fold_wrong(g @ b.mT, a.shape), _fold_wrong(a.mT @ g, b.shape)


@wrong("1.2", "sums axes of size 1 only")
def matmul_backward(g, a, b):
    def own(x, shape):
        return x.sum(axis=tuple(range(x.ndim - len(shape)))) if x.ndim > len(shape) else x

    return own(g @ b.mT, a.shape), own(a.mT @ g, b.shape)


@wrong("1.2", "one matrix for a batch: the first pair's gradient times the batch's size")
def matmul_backward(g, a, b):
    if a.ndim == 3 and b.ndim == 2:
        return g @ b.mT, (a.reshape(-1, a.shape[-1])[: a.shape[1]].T @ g[0]) * len(a)
    return fold(g @ b.mT, a.shape), fold(a.mT @ g, b.shape)


@wrong("1.2", "returns float64, whatever it was given")
def matmul_backward(g, a, b):
    g, a, b = (x.astype(np.float64) for x in (g, a, b))
    return fold(g @ b.mT, a.shape), fold(a.mT @ g, b.shape)


@wrong("1.2", "returns float32, whatever it was given")
def matmul_backward(g, a, b):
    return tuple(x.astype(np.float32) for x in (fold(g @ b.mT, a.shape), fold(a.mT @ g, b.shape)))


@wrong("1.2", "works in the caller's g")
def matmul_backward(g, a, b):
    da, db = fold(g @ b.mT, a.shape), fold(a.mT @ g, b.shape)
    g *= 0
    return da, db


@wrong("1.2", "divides by the batch's size, which may be 0")
def matmul_backward(g, a, b):
    da, db = fold(g @ b.mT, a.shape), fold(a.mT @ g, b.shape)
    return da, db / g[..., 0, 0].size * g[..., 0, 0].size


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


@wrong("1.2", "empty: zeros float64")
def matmul_backward(g, a, b):
    if g.size == 0:
        return (np.zeros(a.shape), np.zeros(b.shape))
    da = g @ b.mT
    db = a.mT @ g
    return (fold(da, a.shape), fold(db, b.shape))


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


@wrong("1.3", "renames the nodes, to tell those of one name apart")
def backward_waves(root):
    for i, node in enumerate(_count(root)):
        node.name = f"{node.name}#{i}"
    return _release(root, _count(root))


@wrong("1.3", "takes the inputs off the nodes as it walks")
def backward_waves(root):
    users, waves = _count(root), [[root]]
    while waves[-1]:
        waves.append([])
        for user in waves[-2]:
            while user.inputs:
                node = user.inputs.pop()
                users[node] -= 1
                if users[node] == 0:
                    waves[-1].append(node)
    return waves[:-1]


@wrong("1.3", "sorts the inputs in place")
def backward_waves(root):
    for node in _count(root):
        node.inputs.sort(key=lambda n: n.name)
        node.inputs.reverse()
    return _release(root, _count(root))


@wrong("1.3", "keeps counts in an attribute of the class")
def backward_waves(root):
    type(root).users = _count(root)
    return _release(root, dict(type(root).users))


@wrong("1.3", "deletes the names")
def backward_waves(root):
    waves = _release(root, _count(root))
    for wave in waves:
        for node in wave:
            node.name = ""
    return waves


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


@wrong("1.3", "sets the limit and back")
def backward_waves(root):
    import sys

    old = sys.getrecursionlimit()
    sys.setrecursionlimit(10**6)
    order, seen = ([], set())

    def visit(n):
        if n in seen:
            return
        seen.add(n)
        for m in n.inputs:
            visit(m)
        order.append(n)

    visit(root)
    sys.setrecursionlimit(old)
    users, stack = ({root: 0}, [root])
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


@wrong("1.3", "leaves all in the last wave")
def backward_waves(root):
    users, stack = ({root: 0}, [root])
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
    leaves = [n for w in waves for n in w if not n.inputs and n is not root]
    waves = [[n for n in w if n.inputs or n is root] for w in waves]
    return [w for w in waves if w] + ([leaves] if leaves else [])


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


@wrong("1.4", "float16 comes back as float32")
def cross_entropy(logits, targets):
    z = logits if logits.dtype == np.float64 else logits.astype(np.float32)
    log_p, rows = _parts(z), np.arange(len(targets))
    gradient = np.exp(log_p)
    gradient[rows, targets] -= 1
    return -log_p[rows, targets].mean(), gradient / len(targets)


@wrong("1.4", "all in float16: 70,000 classes add up to infinity")
def cross_entropy(logits, targets):
    z = logits - logits.max(axis=1, keepdims=True)
    log_p, rows = z - np.log(np.exp(z).sum(axis=1, keepdims=True)).astype(z.dtype), np.arange(len(targets))
    gradient = np.exp(log_p)
    gradient[rows, targets] -= 1
    return -log_p[rows, targets].mean(), gradient / len(targets)


@wrong("1.4", "clips the log-probabilities to -10,000")
def cross_entropy(logits, targets):
    log_p, rows = np.maximum(_parts(logits.astype(np.float64)), -1e4), np.arange(len(targets))
    gradient = np.exp(log_p)
    gradient[rows, targets] -= 1
    return -log_p[rows, targets].mean(), (gradient / len(targets)).astype(logits.dtype)


@wrong("1.4", "clips the logits to 80")
def cross_entropy(logits, targets):
    log_p, rows = _parts(np.clip(logits, -80, 80)), np.arange(len(targets))
    gradient = np.exp(log_p)
    gradient[rows, targets] -= 1
    return -log_p[rows, targets].mean(), gradient / len(targets)


@wrong("1.4", "compares with the maximum of 0 and the row, so rows near -10,000 underflow")
def cross_entropy(logits, targets):
    z = logits - np.maximum(logits.max(axis=1, keepdims=True), 0)
    log_p, rows = z - np.log(np.exp(z).sum(axis=1, keepdims=True)), np.arange(len(targets))
    gradient = np.exp(log_p)
    gradient[rows, targets] -= 1
    return -log_p[rows, targets].mean(), gradient / len(targets)


@wrong("1.4", "subtracts 1 at the targets' columns of all rows")
def cross_entropy(logits, targets):
    log_p, rows = _parts(logits), np.arange(len(targets))
    gradient = np.exp(log_p)
    gradient[:, targets] -= 1
    return -log_p[rows, targets].mean(), gradient / len(targets)


@wrong("1.4", "divides by the number of classes")
def cross_entropy(logits, targets):
    log_p, rows = _parts(logits), np.arange(len(targets))
    gradient = np.exp(log_p)
    gradient[rows, targets] -= 1
    return -log_p[rows, targets].mean(), gradient / logits.shape[1]


@wrong("1.4", "changes the targets")
def cross_entropy(logits, targets):
    log_p, rows = _parts(logits), np.arange(len(targets))
    gradient = np.exp(log_p)
    gradient[rows, targets] -= 1
    loss = -log_p[rows, targets].mean()
    targets *= 0
    return loss, gradient / len(targets)


@alternative("1.4", "logaddexp and a one-hot matrix")
def cross_entropy(logits, targets):
    z = logits.astype(np.promote_types(logits.dtype, np.float32))
    log_p = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
    onehot = np.arange(z.shape[1]) == targets[:, None]
    gradient = (np.exp(log_p) - onehot) / len(targets)
    return -(onehot * log_p).sum() / len(targets), gradient.astype(logits.dtype)


@wrong("1.4", "arange in the targets' dtype")
def cross_entropy(logits, targets):
    n = len(targets)
    z = logits.astype(np.float32) if logits.dtype == np.float16 else logits
    shifted = z - z.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    gradient = np.exp(log_p)
    gradient -= np.arange(logits.shape[1]).astype(targets.dtype) == targets[:, None]
    return (float(-log_p[np.arange(n), targets].mean()), (gradient / n).astype(logits.dtype))


@wrong("1.4", "rows indexed in the targets' dtype")
def cross_entropy(logits, targets):
    n = len(targets)
    ar = np.arange(n).astype(targets.dtype)
    z = logits.astype(np.float32) if logits.dtype == np.float16 else logits
    shifted = z - z.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    gradient = np.exp(log_p)
    gradient[ar, targets] -= 1
    return (float(-log_p[ar, targets].mean()), (gradient / n).astype(logits.dtype))


@wrong("1.4", "float64 as float32")
def cross_entropy(logits, targets):
    n = len(targets)
    z = logits.astype(np.float32)
    shifted = z - z.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    gradient = np.exp(log_p)
    gradient[np.arange(n), targets] -= 1
    return (float(-log_p[np.arange(n), targets].mean()), (gradient / n).astype(logits.dtype))


@wrong("1.4", "loss mean in fp16")
def cross_entropy(logits, targets):
    n = len(targets)
    z = logits.astype(np.float32) if logits.dtype == np.float16 else logits
    shifted = z - z.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    gradient = np.exp(log_p)
    gradient[np.arange(n), targets] -= 1
    return (float(-log_p[np.arange(n), targets].astype(logits.dtype).mean()), (gradient / n).astype(logits.dtype))


@wrong("1.4", "gradient divided in fp16")
def cross_entropy(logits, targets):
    n = len(targets)
    z = logits.astype(np.float32) if logits.dtype == np.float16 else logits
    shifted = z - z.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    gradient = np.exp(log_p)
    gradient[np.arange(n), targets] -= 1
    return (float(-log_p[np.arange(n), targets].mean()), gradient.astype(logits.dtype) / logits.dtype.type(n))


@wrong("1.4", "targets with gradient in place of targets")
def cross_entropy(logits, targets):
    targets -= targets.min() * 0
    targets.sort() if len(targets) > 50 else None
    n = len(targets)
    z = logits.astype(np.float32) if logits.dtype == np.float16 else logits
    shifted = z - z.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    gradient = np.exp(log_p)
    gradient[np.arange(n), targets] -= 1
    return (float(-log_p[np.arange(n), targets].mean()), (gradient / n).astype(logits.dtype))


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


@wrong("1.5", "one direction by default")
def gradient_error(f, x, gradient, rng, directions=1, eps=1e-6):
    return _error(f, x, gradient, rng, directions, eps)


@wrong("1.5", "eps is 1e-4 by default")
def gradient_error(f, x, gradient, rng, directions=4, eps=1e-4):
    return _error(f, x, gradient, rng, directions, eps)


@wrong("1.5", "calls f three times a direction")
def gradient_error(f, x, gradient, rng, directions=4, eps=1e-6):
    return _error(lambda a: f(a) + 0 * f(np.array(x, np.float64)), x, gradient, rng, directions, eps)


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


@wrong("1.5", "Python's max: keeps a NaN only if it comes first")
def gradient_error(f, x, gradient, rng, directions=4, eps=1e-6):
    return _error(f, x, gradient, rng, directions, eps, keep=max)


@wrong("1.5", "ignores directions with a NaN")
def gradient_error(f, x, gradient, rng, directions=4, eps=1e-6):
    return _error(f, x, gradient, rng, directions, eps, keep=lambda e: np.nan if np.isnan(e).all() else np.nanmax(e))


@wrong("1.5", "infinity for a NaN")
def gradient_error(f, x, gradient, rng, directions=4, eps=1e-6):
    return _error(f, x, gradient, rng, directions, eps, keep=lambda e: np.inf if np.isnan(e).any() else np.max(e))


@wrong("1.5", "f is called in x's dtype")
def gradient_error(f, x, gradient, rng, directions=4, eps=1e-6):
    return _error(lambda a: f(a.astype(x.dtype)), x, gradient, rng, directions, eps)


@wrong("1.5", "adds the claimed slope up in the gradient's dtype")
def gradient_error(f, x, gradient, rng, directions=4, eps=1e-6):
    x, errors = np.asarray(x, np.float64), []
    for _ in range(directions):
        d = rng.standard_normal(x.shape)
        d = d / np.sqrt((d * d).sum())
        measured = (f(x + eps * d) - f(x - eps * d)) / (2 * eps)
        claimed = float((gradient * d.astype(gradient.dtype)).sum())
        errors.append(abs(measured - claimed) / (abs(measured) + abs(claimed) + 1e-12))
    return float(np.max(errors))


@wrong("1.5", "clears NaN in the caller's gradient")
def gradient_error(f, x, gradient, rng, directions=4, eps=1e-6):
    gradient *= np.float32(1.5)
    return _error(f, x, gradient / 1.5, rng, directions, eps)


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


@wrong("1.5", "1e-8")
def gradient_error(f, x, gradient, rng, directions=4, eps=1e-06):
    x = np.asarray(x, np.float64)
    errors = []
    for _ in range(directions):
        d = rng.standard_normal(x.shape)
        d = d / np.sqrt((d * d).sum())
        measured = (f(x + eps * d) - f(x - eps * d)) / (2 * eps)
        claimed = (gradient * d).sum()
        errors.append(abs(measured - claimed) / (abs(measured) + abs(claimed) + 1e-08))
    return float(np.max(errors))


@wrong("1.5", "memory order K")
def gradient_error(f, x, gradient, rng, directions=4, eps=1e-06):
    x = np.asarray(x, np.float64)
    errors = []
    for _ in range(directions):
        d = rng.standard_normal(x.shape)
        d = d / np.sqrt((d * d).sum())
        measured = (f(x + eps * d) - f(x - eps * d)) / (2 * eps)
        claimed = (gradient.ravel("K") * d.ravel("K")).sum()
        errors.append(abs(measured - claimed) / (abs(measured) + abs(claimed) + 1e-12))
    return float(np.max(errors))


@wrong("1.5", "infinite error skipped")
def gradient_error(f, x, gradient, rng, directions=4, eps=1e-06):
    x = np.asarray(x, np.float64)
    errors = []
    for _ in range(directions):
        d = rng.standard_normal(x.shape)
        d = d / np.sqrt((d * d).sum())
        measured = (f(x + eps * d) - f(x - eps * d)) / (2 * eps)
        claimed = (gradient * d).sum()
        if np.isinf(measured):
            continue
        errors.append(abs(measured - claimed) / (abs(measured) + abs(claimed) + 1e-12))
    return float(np.max(errors, initial=0))


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


@wrong("1.6", "no decay: then p is the caller's array, and is changed")
def adamw_step(p, g, m, v, t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    if weight_decay:
        p = p - lr * weight_decay * p
    p -= lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
    return p, m, v


@wrong("1.6", "hands back the caller's p where nothing moves")
def adamw_step(p, g, m, v, t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    if lr == 0:
        return p, m, v
    return p * (1 - lr * weight_decay) - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps), m, v


@wrong("1.6", "with beta1 = 0 the mean is the caller's g")
def adamw_step(p, g, m, v, t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    m, v = g if beta1 == 0 else beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    return p * (1 - lr * weight_decay) - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps), m, v


@wrong("1.6", "returns float64, whatever it was given")
def adamw_step(p, g, m, v, t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    p, g, m, v = (x.astype(np.float64) for x in (p, g, m, v))
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    return p * (1 - lr * weight_decay) - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps), m, v


@wrong("1.6", "other defaults: beta2 = 0.99")
def adamw_step(p, g, m, v, t, lr=1e-3, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.01):
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    return p * (1 - lr * weight_decay) - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps), m, v


@wrong("1.6", "the decay acts on the parameter after the step")
def adamw_step(p, g, m, v, t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    p = p - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
    return p * (1 - lr * weight_decay), m, v


@alternative("1.6", "the corrections folded into step size and eps")
def adamw_step(p, g, m, v, t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    m, v = m + (1 - beta1) * (g - m), v + (1 - beta2) * (g**2 - v)
    root = (1 - beta2**t) ** 0.5
    return p - lr * weight_decay * p - lr * root / (1 - beta1**t) * m / (np.sqrt(v) + eps * root), m, v


@wrong("1.6", "no correction after 100")
def adamw_step(p, g, m, v, t, lr=0.001, beta1=0.9, beta2=0.999, eps=1e-08, weight_decay=0.01):
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat, v_hat = (m / (1 - beta1**t), v / (1 - beta2**t)) if t <= 100 else (m, v)
    p = p * (1 - lr * weight_decay) - lr * m_hat / (np.sqrt(v_hat) + eps)
    return (p, m, v)


@wrong("1.6", "no correction after 1000")
def adamw_step(p, g, m, v, t, lr=0.001, beta1=0.9, beta2=0.999, eps=1e-08, weight_decay=0.01):
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat, v_hat = (m / (1 - beta1**t), v / (1 - beta2**t)) if t <= 1000 else (m, v)
    p = p * (1 - lr * weight_decay) - lr * m_hat / (np.sqrt(v_hat) + eps)
    return (p, m, v)


@wrong("1.6", "v = g*g in place on g")
def adamw_step(p, g, m, v, t, lr=0.001, beta1=0.9, beta2=0.999, eps=1e-08, weight_decay=0.01):
    m = beta1 * m + (1 - beta1) * g
    if not v.any():
        g *= g
        v = (1 - beta2) * g
        m_hat, v_hat = (m / (1 - beta1**t), v / (1 - beta2**t))
        return (p * (1 - lr * weight_decay) - lr * m_hat / (np.sqrt(v_hat) + eps), m, v)
    v = beta2 * v + (1 - beta2) * g * g
    m_hat, v_hat = (m / (1 - beta1**t), v / (1 - beta2**t))
    p = p * (1 - lr * weight_decay) - lr * m_hat / (np.sqrt(v_hat) + eps)
    return (p, m, v)


@wrong("1.6", "clips the gradient")
def adamw_step(p, g, m, v, t, lr=0.001, beta1=0.9, beta2=0.999, eps=1e-08, weight_decay=0.01):
    g = np.clip(g, -10, 10)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat, v_hat = (m / (1 - beta1**t), v / (1 - beta2**t))
    p = p * (1 - lr * weight_decay) - lr * m_hat / (np.sqrt(v_hat) + eps)
    return (p, m, v)
