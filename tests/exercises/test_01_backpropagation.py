"""The contracts of the exercises of chapter 1."""

import numpy as np
import torch

from minillm.learn.testing import exercise, expect, expect_close, expect_equal


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def loop_unbroadcast(g: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Element by element: each element of g goes to the one element of `shape` that it was copied from."""
    out = np.zeros(shape, g.dtype)
    for at in np.ndindex(g.shape):
        tail = at[len(at) - len(shape) :]
        out[tuple(0 if n == 1 else i for i, n in zip(tail, shape, strict=True))] += g[at]
    return out


@exercise("1.1", "unbroadcast")
class TestUnbroadcast:
    def _same(self, impl, g_shape, shape):
        g = rng().standard_normal(g_shape)
        before = g.copy()
        got = impl(g, shape)
        expect_close(f"g {g_shape} -> {shape}", got, loop_unbroadcast(g, shape), atol=1e-12)
        expect(np.array_equal(g, before), "g was changed; return a new array instead")

    def test_nothing_to_do(self, impl):
        """a gradient that has the shape already stays as it is"""
        self._same(impl, (2, 3), (2, 3))
        self._same(impl, (2, 1), (2, 1))

    def test_axes_in_front(self, impl):
        """axes that broadcasting put in front are summed away"""
        self._same(impl, (8, 3), (3,))
        self._same(impl, (3, 3), (3,))
        self._same(impl, (2, 4, 3), (3,))

    def test_axes_of_size_one(self, impl):
        """axes of size 1 are summed and stay, with size 1"""
        self._same(impl, (8, 3), (8, 1))
        self._same(impl, (4, 3, 2), (1, 3, 1))

    def test_both_kinds(self, impl):
        """both kinds in one array"""
        self._same(impl, (5, 4, 3), (4, 1))
        self._same(impl, (2, 3, 4, 3), (1, 1, 3))

    def test_scalar(self, impl):
        """the gradient of a scalar is the sum of everything, with shape ()"""
        self._same(impl, (2, 3), ())
        self._same(impl, (), ())

    def test_float32(self, impl):
        """float32 stays float32"""
        expect_equal("dtype", impl(np.ones((4, 3), np.float32), (1, 3)).dtype, np.dtype(np.float32))


@exercise("1.2", "matmul_backward")
class TestMatmulBackward:
    def _same(self, impl, a_shape, b_shape):
        r = rng(1)
        a, b = r.standard_normal(a_shape), r.standard_normal(b_shape)
        ta, tb = torch.tensor(a, requires_grad=True), torch.tensor(b, requires_grad=True)
        y = ta @ tb
        g = r.standard_normal(tuple(y.shape))
        y.backward(torch.tensor(g))
        inputs = [x.copy() for x in (g, a, b)]
        got = impl(g, a, b)
        expect(
            isinstance(got, tuple | list) and len(got) == 2,
            f"expected the pair (da, db)\n  got {type(got).__name__}",
        )
        expect_close(f"da for {a_shape} @ {b_shape}", got[0], ta.grad, atol=1e-10)
        expect_close(f"db for {a_shape} @ {b_shape}", got[1], tb.grad, atol=1e-10)
        same = all(np.array_equal(x, y) for x, y in zip((g, a, b), inputs, strict=True))
        expect(same, "g, a or b was changed; return new arrays instead")

    def test_matrices(self, impl):
        """two matrices: da has a's shape, db has b's, values as torch's"""
        self._same(impl, (2, 3), (3, 4))

    def test_square(self, impl):
        """square matrices, where a forgotten transpose still has the right shape"""
        self._same(impl, (3, 3), (3, 3))

    def test_batch(self, impl):
        """a batch of pairs: only the last two axes are transposed"""
        self._same(impl, (5, 2, 3), (5, 3, 4))
        self._same(impl, (2, 2, 2, 2), (2, 2, 2, 2))

    def test_one_matrix_for_the_batch(self, impl):
        """one matrix b for a whole batch: its gradient is summed over the batch"""
        self._same(impl, (5, 2, 3), (3, 4))
        self._same(impl, (6, 5, 2, 3), (3, 4))

    def test_one_matrix_on_the_left(self, impl):
        """one matrix a for a whole batch"""
        self._same(impl, (2, 3), (5, 3, 4))

    def test_both_broadcast(self, impl):
        """batch axes of size 1 broadcast on either side"""
        self._same(impl, (1, 4, 2, 3), (5, 1, 3, 2))


class _Node:
    def __init__(self, name, *inputs):
        self.name, self.inputs = name, list(inputs)

    def __repr__(self):
        return self.name


def check_order(impl, root, count):
    before = {}
    stack = [root]
    while stack:
        node = stack.pop()
        if node not in before:
            before[node] = list(node.inputs)
            stack.extend(node.inputs)
    got = impl(root)
    expect(isinstance(got, list), f"expected a list of nodes\n  got {type(got).__name__}")
    expect_equal("number of nodes", len(got), count)
    expect(set(got) == set(before), f"expected every node below the root exactly once\n  got {got[:10]}")
    position = {node: i for i, node in enumerate(got)}
    for node in got:
        for needed in node.inputs:
            expect(
                position[needed] < position[node],
                f"expected input {needed} before its user {node}\n  got positions {position[needed]} and"
                f" {position[node]}",
            )
    expect(got[-1] is root, f"expected the root {root} at the end\n  got {got[-1]}")
    expect(all(node.inputs == inputs for node, inputs in before.items()), "a node's inputs were changed")


@exercise("1.3", "topological_order")
class TestTopologicalOrder:
    def test_leaf(self, impl):
        """a leaf alone is its own order"""
        check_order(impl, _Node("a"), 1)

    def test_chain(self, impl):
        """a chain: inputs first, root last"""
        a = _Node("a")
        b = _Node("b", a)
        check_order(impl, _Node("c", b), 3)

    def test_diamond(self, impl):
        """a node with two users appears once"""
        a = _Node("a")
        b, c = _Node("b", a), _Node("c", a)
        check_order(impl, _Node("d", b, c), 4)

    def test_used_twice_by_one(self, impl):
        """x * x: one node that is both inputs of another"""
        x = _Node("x")
        check_order(impl, _Node("y", x, x), 2)

    def test_short_and_long_path(self, impl):
        """a node with a short and a long way to the root stands before both, whichever input comes first"""
        for flip in (False, True):
            a = _Node("a")
            b = _Node("b", a)
            c = _Node("c", b)
            d = _Node("d", c)
            check_order(impl, _Node("root", *((d, a) if flip else (a, d))), 5)
            e = _Node("e", b)  # b, in the middle of the long way, is also used next to the root
            check_order(impl, _Node("root", *((e, d) if flip else (d, e))), 6)

    def test_random_graphs(self, impl):
        """100 random graphs"""
        r = rng(3)
        for _ in range(100):
            nodes = [_Node("0")]
            for i in range(1, 9):
                inputs = [nodes[-1]] + [nodes[j] for j in r.integers(0, i, r.integers(0, 3))]
                nodes.append(_Node(str(i), *(inputs[j] for j in r.permutation(len(inputs)))))
            check_order(impl, nodes[-1], 9)

    def test_ladder(self, impl):
        """16 diamonds in a row have 65,536 paths but 49 nodes"""
        node = _Node("start")
        for i in range(16):
            node = _Node(f"join{i}", _Node(f"left{i}", node), _Node(f"right{i}", node))
        check_order(impl, node, 49)

    def test_deep(self, impl):
        """a chain of 5,000 nodes: no recursion"""
        node = _Node("0")
        for i in range(1, 5000):
            node = _Node(str(i), node)
        check_order(impl, node, 5000)


@exercise("1.4", "cross_entropy")
class TestCrossEntropy:
    def _same(self, impl, logits, targets, atol=1e-9):
        t = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
        loss = torch.nn.functional.cross_entropy(t, torch.tensor(targets))
        loss.backward()
        before = logits.copy(), targets.copy()
        with np.errstate(all="ignore"):
            got = impl(logits, targets)
        expect(
            isinstance(got, tuple | list) and len(got) == 2,
            f"expected the pair (loss, gradient)\n  got {type(got).__name__}",
        )
        expect_close("loss", got[0], loss, atol=atol, rtol=1e-6)
        expect_close("gradient", got[1], t.grad, atol=atol)
        expect(
            np.array_equal(logits, before[0]) and np.array_equal(targets, before[1]),
            "logits or targets were changed; work on a copy",
        )

    def test_by_hand(self, impl):
        """equal logits for 4 classes: the loss is log 4, the gradient 1/4 everywhere but 1/4 - 1 at the target"""
        loss, gradient = impl(np.zeros((1, 4)), np.array([2]))
        expect_close("loss", loss, np.log(4))
        expect_close("gradient", gradient, [[0.25, 0.25, -0.75, 0.25]])

    def test_equals_torch(self, impl):
        """loss and gradient of a batch equal torch's: a mean over the batch"""
        r = rng(4)
        self._same(impl, r.standard_normal((6, 5)) * 3, r.integers(0, 5, 6))
        self._same(impl, r.standard_normal((1, 2)), np.array([1]))

    def test_large_logits(self, impl):
        """logits of 10,000 in float32: finite and right"""
        logits = np.array([[1e4, 0, -1e4], [-1e4, 1e4, 9.9e3]], np.float32)
        self._same(impl, logits, np.array([1, 2]), atol=1e-4)

    def test_rows_far_apart(self, impl):
        """one row near 0, one near 10,000: each row is made safe by itself"""
        self._same(impl, np.array([[0.0, 1.0], [1e4, 1e4 + 1.0]]), np.array([0, 1]))

    def test_shift(self, impl):
        """adding a constant to a row changes nothing"""
        r = rng(5)
        logits, targets = r.standard_normal((3, 4)), np.array([0, 3, 1])
        shift = np.array([[5.0], [-7.0], [100.0]])
        first, second = impl(logits, targets), impl(logits + shift, targets)
        expect_close("loss after the shift", second[0], first[0], atol=1e-9)
        expect_close("gradient after the shift", second[1], first[1], atol=1e-9)


@exercise("1.5", "numeric_gradient")
class TestNumericGradient:
    def test_matches_torch(self, impl):
        """a function of a matrix: every element's derivative, as torch has it"""
        x, w = rng(6).standard_normal((3, 4)), rng(7).standard_normal((4, 2))
        t = torch.tensor(x, requires_grad=True)
        (torch.tanh(t @ torch.tensor(w)) ** 2).sum().backward()
        expect_close("gradient", impl(lambda a: (np.tanh(a @ w) ** 2).sum(), x), t.grad, atol=1e-7)

    def test_shapes(self, impl):
        """the result has x's shape, for a scalar and for three axes too"""
        for shape in [(), (1,), (2, 1, 3)]:
            x = rng(8).standard_normal(shape)
            expect_close(f"gradient for shape {shape}", impl(lambda a: (a**2).sum(), x), 2 * x, atol=1e-7)

    def test_second_order(self, impl):
        """the error is of order eps squared: for x³ at eps = 0.01 it is 0.0001"""
        got = impl(lambda a: (a**3).sum(), np.array([1.0, -2.0]), 1e-2)
        expect_close("gradient of x³ with eps = 0.01", got, [3 + 1e-4, 12 + 1e-4], atol=1e-9)

    def test_one_element_at_a_time(self, impl):
        """each element is moved alone: the others are where they were, to the last digit"""
        # A product is linear in each factor, so central differences are exact at any eps.
        got = impl(lambda a: a.prod(), np.array([1.0, 2.0, 3.0]), 0.1)
        expect_close("gradient of a product at (1, 2, 3), eps = 0.1", got, [6, 3, 2], atol=1e-9)

    def test_x_is_left_alone(self, impl):
        """x is as it was"""
        x = rng(9).standard_normal((2, 3))
        before = x.copy()
        impl(lambda a: (a * a).sum(), x)
        expect(np.array_equal(x, before), "x was changed; put each element back, or work on a copy")

    def test_float32(self, impl):
        """a float32 x is differenced in float64"""
        x = np.array([1.0, 1000.0], np.float32)
        expect_close("gradient of x²", impl(lambda a: (a**2).sum(), x), [2, 2000], atol=1e-3)


def adamw_by_hand(p, g, m, v, t, lr, beta1, beta2, eps, decay):
    """One step for one number, in Python's floats, written from algorithm 2 of Loshchilov and Hutter (2019)."""
    m = beta1 * m + (1.0 - beta1) * g
    v = beta2 * v + (1.0 - beta2) * g**2
    step = m / (1.0 - beta1**t) / ((v / (1.0 - beta2**t)) ** 0.5 + eps)
    return p - lr * step - lr * decay * p, m, v


@exercise("1.6", "adamw_step")
class TestAdamWStep:
    def _steps(self, impl, count, **given):
        """Run `count` steps on random gradients and compare after each; `given` are arguments by name."""
        a = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, **given}
        r = rng(10)
        p = r.standard_normal((2, 3))
        m, v = np.zeros_like(p), np.zeros_like(p)
        for t in range(1, count + 1):
            g = r.standard_normal((2, 3))
            values = [array.ravel().tolist() for array in (p, g, m, v)]
            new = [adamw_by_hand(*one, t, *a.values()) for one in zip(*values, strict=True)]
            got = impl(p, g, m, v, t, **given)
            expect(
                isinstance(got, tuple | list) and len(got) == 3,
                f"expected (p, m, v)\n  got {type(got).__name__}",
            )
            p, m, v = got
            for name, array, expected in zip("pmv", got, zip(*new, strict=True), strict=True):
                expect_close(f"{name} after step {t}", array, np.reshape(expected, (2, 3)), atol=1e-10, rtol=1e-9)

    def test_inputs_are_left_alone(self, impl):
        """p, g, m and v are as they were"""
        arrays = list(rng(11).uniform(0.1, 1, (4, 3)))
        before = [a.copy() for a in arrays]
        impl(*arrays, 2)
        for name, now, then in zip("pgmv", arrays, before, strict=True):
            expect(np.array_equal(now, then), f"{name} was changed; return a new array instead")

    def test_first_step_is_lr(self, impl):
        """without decay the first step has size lr, for small gradients and for large ones"""
        g = np.array([1e-3, -1.0, 1e3])
        p, _, _ = impl(np.zeros(3), g, np.zeros(3), np.zeros(3), 1, lr=0.1, weight_decay=0.0)
        expect_close("p after one step from 0", p, [-0.1, 0.1, -0.1], atol=1e-5)

    def test_ten_steps(self, impl):
        """ten steps equal the formula worked number by number: p, m and v"""
        self._steps(impl, 10)

    def test_all_arguments(self, impl):
        """other values of every argument"""
        values = {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 1e-2, "weight_decay": 0.3}
        self._steps(impl, 5, **values)

    def test_decay_is_decoupled(self, impl):
        """with a zero gradient the parameter shrinks by lr · weight_decay, and m and v stay 0"""
        p, m, v = impl(np.array([2.0, -4.0]), np.zeros(2), np.zeros(2), np.zeros(2), 1, lr=0.1, weight_decay=0.5)
        expect_close("p", p, [1.9, -3.8], atol=1e-9)
        expect_close("m", m, [0, 0])
        expect_close("v", v, [0, 0])
