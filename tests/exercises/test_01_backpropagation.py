"""The contracts of the exercises of chapter 1."""

import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch

from minillm.learn.testing import exercise, expect, expect_close, expect_equal, expect_parts


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


class Work(np.ndarray):
    """Adds up how many numbers NumPy's functions read or write, in `Work.done`."""

    done = 0

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        plain = [np.asarray(x) if isinstance(x, Work) else x for x in inputs]
        if out is not None:
            kwargs["out"] = tuple(np.asarray(x) if isinstance(x, Work) else x for x in out)
        result = getattr(ufunc, method)(*plain, **kwargs)
        inner = plain[0].shape[-1] if ufunc is np.matmul else 1
        Work.done += inner * max(np.size(x) for x in (*plain, result))
        return result.view(Work) if isinstance(result, np.ndarray) else result

    def __array_function__(self, function, types, args, kwargs):
        result = super().__array_function__(function, types, args, kwargs)
        Work.done += np.size(result)
        return result


def work_of(call: Callable[[], object], most_lines: int, question: str) -> int:
    """Numbers that NumPy handled in arrays of class Work while `call` ran; stops it after so many lines of Python."""
    lines, before = 0, sys.gettrace()

    def trace(frame, event, arg):
        nonlocal lines
        lines += event == "line"
        expect(
            lines <= most_lines,
            f"expected far fewer than {most_lines:,} lines of Python to run\n  got      more: {question}",
        )
        return trace

    Work.done = 0
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return Work.done


@contextmanager
def recursion_limit_left_alone() -> Iterator[None]:
    """Refuse a call that sets Python's recursion limit, be it to put it back later."""

    def refuse(limit: int) -> None:
        expect(False, f"expected the recursion limit to be left alone\n  got      sys.setrecursionlimit({limit:,})")

    with patch.object(sys, "setrecursionlimit", refuse):
        yield


def jacobian_of_softmax(p: np.ndarray) -> np.ndarray:
    """[..., classes] -> [..., classes, classes], entry (i, j) = dp_i / dz_j, written out."""
    jacobian = np.zeros((*p.shape, p.shape[-1]))
    for i in range(p.shape[-1]):
        for j in range(p.shape[-1]):
            jacobian[..., i, j] = p[..., i] * ((i == j) - p[..., j])
    return jacobian


@exercise("1.w1", "descend")
class TestDescend:
    def test_first_step(self, impl):
        """from w = 2 with x = 3, b = -5 and lr = 0.01 the first step leads to 1.94: the derivative is 6"""
        expect_close("w before and after one step", impl(2.0, 3.0, -5.0, 0.01, 1), [2.0, 1.94], atol=1e-12, rtol=1e-12)

    def test_ten_steps(self, impl):
        """ten steps give eleven numbers; each step takes the derivative at the present w"""
        for w, x, b, lr in [
            (2.0, 3.0, -5.0, 0.01),
            (-1.0, 0.5, 2.0, 0.3),
            (1.0, -2.0, 1.0, 0.3),
            (-4000.0, 3.0, 500.0, 0.02),
        ]:
            # In u = w x + b a step multiplies by 1 - 2 lr x².
            expected = [((w * x + b) * (1 - 2 * lr * x * x) ** i - b) / x for i in range(11)]
            what = f"w for x = {x:g}, b = {b:g}, lr = {lr:g}"
            expect_close(what, impl(w, x, b, lr, 10), expected, atol=1e-9, rtol=1e-11)

    def test_any_numbers(self, impl):
        """40 draws: up to 200 steps, rates up to 3, which lead far away, below 0, or nowhere; whole numbers, too"""
        r = rng(21)
        cases = [(*r.uniform(-3, 3, 3), r.choice([-0.1, 0.001, 0.1, 0.6, 3.0]), r.integers(0, 60)) for _ in range(40)]
        for w, x, b, lr, steps in [*cases, (2.0, 0.1, 5.0, 0.3, 200), (3, 2, -1, 0.01, 4), (2, 3, 1, 1, 5)]:
            expected = [w]
            while len(expected) <= steps:
                u = expected[-1] * x + b
                expected.append(expected[-1] - 2 * lr * u * x)
            numbers = [v if isinstance(v, int) else float(v) for v in (w, x, b, lr)]
            expect_close(f"w for w, x, b, lr = {numbers}", impl(*numbers, int(steps)), expected, atol=0, rtol=1e-7)

    def test_no_step(self, impl):
        """no step: the list holds the first w alone"""
        expect_close("w", impl(2.0, 3.0, -5.0, 0.01, 0), [2.0])

    def test_flat(self, impl):
        """with x = 0 the loss does not depend on w, and with w x + b = 0 it is at its minimum: w stays"""
        expect_close("w for x = 0", impl(2.0, 0.0, 4.0, 0.1, 2), [2.0, 2.0, 2.0])
        expect_close("w at the minimum", impl(2.0, 3.0, -6.0, 0.1, 2), [2.0, 2.0, 2.0])


@exercise("1.w2", "softmax_jacobian")
class TestSoftmaxJacobian:
    def test_by_hand(self, impl):
        """scores 0 and log 3, probabilities 1/4 and 3/4: all four slopes are 3/16 or -3/16"""
        got = impl(0.0, float(np.log(3)))
        expect_close("slopes", got, [[3 / 16, -3 / 16], [-3 / 16, 3 / 16]], atol=1e-9)

    def test_equal(self, impl):
        """equal scores: 1/4 on the diagonal, whatever the scores are"""
        for z in (0.0, 5.0, -20.0):
            expect_close(f"slopes at ({z:g}, {z:g})", impl(z, z), [[0.25, -0.25], [-0.25, 0.25]], atol=1e-9)

    def test_measured(self, impl):
        """equals slopes that were measured, row i for p_i and column j for z_j"""

        def softmax(z):
            return np.exp(z) / np.exp(z).sum()

        for z in ([1.0, -0.5], [-3.0, 2.0], [20.0, -20.0], [0.1, 4.0]):
            at, eps = np.array(z), 1e-6
            columns = [(softmax(at + eps * d) - softmax(at - eps * d)) / (2 * eps) for d in np.eye(2)]
            expect_close(f"slopes at {tuple(z)}", impl(*z), np.array(columns).T, atol=1e-8)

    def test_any_scores(self, impl):
        """300 pairs of scores: to 1 in 10 million where they are near one another"""
        for z in rng(22).uniform(-20, 20, (300, 2)).tolist():
            far = abs(z[0] - z[1])
            slope = float(np.exp(-far) / (1 + np.exp(-far)) ** 2)
            expected = [[slope, -slope], [-slope, slope]]
            rtol = 1e-9 if far < 10 else 0.05 if far < 33 else 1.0
            expect_close(f"slopes at ({z[0]:.3f}, {z[1]:.3f})", impl(*z), expected, atol=1e-16, rtol=rtol)

    def test_small(self, impl):
        """one class has it nearly all: the slopes are small, not 0, and right to 1 in 20"""
        for z in ([12.0, 1.0], [-15.0, 16.0], [-2.0, 18.0], [-19.0, -4.0]):
            slope = float(np.exp(-abs(z[0] - z[1])))  # p (1 - p), where p is nearly 1
            expected = [[slope, -slope], [-slope, slope]]
            expect_close(f"slopes at {tuple(z)}", impl(*z), expected, atol=0, rtol=0.05)


@exercise("1.w3", "contributions")
class TestContributions:
    PROGRAM = (("square", "mul", ["x", "x"]), ("y", "add", ["square", "x"]))

    def _is(self, impl, program, name, expected):
        given = [(result, operation, list(inputs)) for result, operation, inputs in program]
        got = impl(given, name)
        text = "; ".join(f"{r} = {o}({', '.join(i)})" for r, o, i in program) or "nothing"
        expect_equal(f"terms of {name}'s gradient in: {text}", got, expected)
        expect(given == [(r, o, list(i)) for r, o, i in program], "the program was changed")

    def test_x(self, impl):
        """x * x + x: three terms for x, two of them from the product"""
        self._is(impl, self.PROGRAM, "x", 3)

    def test_result(self, impl):
        """nobody uses y: 0 terms; the square has one"""
        self._is(impl, self.PROGRAM, "y", 0)
        self._is(impl, self.PROGRAM, "square", 1)

    def test_inputs_only(self, impl):
        """only inputs count: not an operation of that name, nor a value whose name begins alike; an empty program"""
        program = (("xx", "x", ["x2", "x"]), ("x2", "mul", ["xx", "xx"]), ("z", "concat", ["x", "x", "w", "x"]))
        self._is(impl, program, "x", 4)
        self._is(impl, program, "xx", 2)
        self._is(impl, (), "x", 0)

    def test_every_place(self, impl):
        """every place counts, also in operations whose result nobody uses; `X` is another value than `x`"""
        program = (("a", "mul", ["x", "X"]), ("b", "add", ["X", "X"]), ("c", "tanh", ["x"]), ("y", "add", ["x", "x"]))
        self._is(impl, program, "x", 4)
        self._is(impl, program, "X", 3)

    def test_many(self, impl):
        """a program of 60 operations with one to four inputs, and every value of it"""
        r, names, program = rng(23), ["x", "w", "b"], []
        for i in range(60):
            program.append(
                (f"v{i}", str(r.choice(["add", "mul", "concat"])), [str(n) for n in r.choice(names, i % 4 + 1)])
            )
            names.append(f"v{i}")
        for name in names:
            self._is(impl, program, name, sum(n == name for _, _, inputs in program for n in inputs))


@exercise("1.0", "Value")
class TestValue:
    def _back(self, impl, value):
        expect(isinstance(value, impl), f"expected a Value\n  got      {type(value).__name__} {value!r:.60}")
        value.backward()

    def test_numbers(self, impl):
        """+, * and tanh compute: .data holds the number, and .grad is 0 before backward"""
        a, b = impl(2.0), impl(-3.0)
        for name, got, expected in [
            ("a + b", a + b, -1.0),
            ("a * b", a * b, -6.0),
            ("a.tanh()", a.tanh(), np.tanh(2.0)),
            ("a * a", a * a, 4.0),
            ("tanh of 1,000", impl(1000.0).tanh(), 1.0),
        ]:
            expect(isinstance(got, impl), f"{name}: expected a Value\n  got      {type(got).__name__}")
            expect_close(f"data of {name}", got.data, expected)
            expect_close(f"grad of {name} before backward", got.grad, 0.0)
        zero, one = impl(0.0), impl(1.0)
        for name, got in [
            ("a + 0", a + zero),
            ("0 + a", zero + a),
            ("a * 1", a * one),
            ("1 * a", one * a),
            ("0 * a", zero * a),
            ("tanh of 0", zero.tanh()),
        ]:
            given = any(got is value for value in (a, zero, one))
            expect(not given, f"{name}: expected a new Value\n  got      one of those that were given")
        expect_equal("data of a and b afterwards", [a.data, b.data], [2.0, -3.0])

    def test_by_hand(self, impl):
        """s = w x + b, L = s s at w = 2, x = 3, b = -5: the gradients are 6, 4, 2; s has 2 and L has 1"""
        w, x, b = impl(2.0), impl(3.0), impl(-5.0)
        s = w * x + b
        loss = s * s
        self._back(impl, loss)
        expect_close("gradients of w, x, b, s, L", [v.grad for v in (w, x, b, s, loss)], [6.0, 4.0, 2.0, 2.0, 1.0])

    def test_used_twice(self, impl):
        """x * x + x at 3: the contributions of all three uses add up to 7"""
        x = impl(3.0)
        self._back(impl, x * x + x)
        expect_close("gradient of x", x.grad, 7.0)
        x = impl(3.0)
        self._back(impl, x + x * x)
        expect_close("gradient of x, the sum the other way round", x.grad, 7.0)

    def test_order(self, impl):
        """h = tanh(w x), L = h + h h, and h h + h: h goes on when both uses have delivered"""
        for flip in (False, True):
            w, x = impl(0.5), impl(2.0)
            h = (w * x).tanh()
            square = h * h
            self._back(impl, square + h if flip else h + square)
            t = np.tanh(1.0)
            expected = (1 + 2 * t) * (1 - t * t)
            expect_close("gradients of w and x", [w.grad, x.grad], [expected * 2, expected / 2], atol=1e-9)

    def test_random_programs(self, impl):
        """40 random programs, against torch"""
        r = rng(12)
        for _ in range(40):
            numbers = r.uniform(-1, 1, 3)
            mine = [impl(float(v)) for v in numbers]
            theirs = [torch.tensor(v, requires_grad=True) for v in numbers]
            for _ in range(10):
                i, j, kind = r.integers(0, len(mine)), r.integers(0, len(mine)), r.integers(0, 3)
                for values in (mine, theirs):
                    a, b = values[i], values[j]
                    values.append(a.tanh() if kind == 0 else a + b if kind == 1 else a * b)
                theirs[-1].retain_grad()
            self._back(impl, mine[-1])
            theirs[-1].backward()
            expected = [0.0 if t.grad is None else float(t.grad) for t in theirs]
            expect_close("gradients of 13 values", [v.grad for v in mine], expected, atol=1e-9)

    def test_starts_anew(self, impl):
        """a second backward, of the same result or of another one, starts anew; what does not depend keeps its grad"""
        x, w, other = impl(3.0), impl(4.0), impl(5.0)
        square = x * x
        y, z = square * w, square + other
        self._back(impl, y)
        self._back(impl, y)
        expect_close("gradients of x, x x and w after the second call", [v.grad for v in (x, square, w)], [24, 4, 9])
        self._back(impl, z)
        got = [v.grad for v in (x, square, other, w, y)]
        expect_close("gradients of x, x x, other, w and y after z.backward()", got, [6, 1, 1, 9, 1])
        self._back(impl, y)
        got = [v.grad for v in (x, square, other, w, y, z)]
        expect_close("gradients of x, x x, other, w, y, z after y.backward() again", got, [24, 4, 1, 9, 1, 1])
        more = y + x  # built on what has been walked
        self._back(impl, more)
        expect_close("gradients of x and y after backward of y + x", [x.grad, y.grad], [25, 1])
        self._back(impl, square * impl(0.0))
        expect_close("gradients of x and x x after backward of 0 times x x", [x.grad, square.grad], [0, 0])
        expect_equal("data of x, w, other afterwards", [x.data, w.data, other.data], [3.0, 4.0, 5.0])

    def test_saturated(self, impl):
        """tanh is flat far out: the slope at 20 is 0, and at 3 it is 0.0099"""
        for at in (-20.0, 3.0, 20.0):
            x = impl(at)
            self._back(impl, x.tanh())
            expect_close(f"gradient of tanh at {at:g}", x.grad, 1 - np.tanh(at) ** 2, atol=1e-12)

    def test_alone(self, impl):
        """a Value that was computed from nothing: its gradient is 1"""
        x = impl(3.0)
        self._back(impl, x)
        expect_close("gradient", x.grad, 1.0)

    def test_once(self, impl):
        """30 values in a row that are used twice each: a billion paths, 60 edges"""
        h = x = impl(1.0)
        for _ in range(30):
            h = h + h
        work_of(lambda: self._back(impl, h), 20_000, "is each path walked?")
        expect_close("gradient of the first", x.grad, 2.0**30)

    def test_deep(self, impl):
        """a chain of 5,000 operations: no recursion, and Python's limit stays as it is"""
        h = x = impl(1.0)
        one = impl(1.0)
        for _ in range(5000):
            h = h * one
        with recursion_limit_left_alone():
            self._back(impl, h)
        expect_close("gradient of the first", x.grad, 1.0)
        expect_close("gradient of the 1 that is used 5,000 times", one.grad, 5000.0)


@exercise("1.1", "softmax_backward")
class TestSoftmaxBackward:
    def _same(self, impl, shape, dtype=np.float64):
        r = rng(len(shape))
        z = torch.tensor(r.standard_normal(shape), requires_grad=True)
        p = z.softmax(-1)
        g = r.standard_normal(shape)
        p.backward(torch.tensor(g))
        inputs = g.astype(dtype), p.detach().numpy().astype(dtype)
        got = impl(*(x.copy() for x in inputs))
        atol = {np.float64: 1e-12, np.float32: 1e-6, np.float16: 4e-3}[dtype]
        expect(isinstance(got, np.ndarray), f"expected an array\n  got      {type(got).__name__}")
        expect_close(f"dℓ/dz for shape {list(shape)}", got, z.grad, atol=atol, rtol=atol)
        expect_equal("dtype", np.asarray(got).dtype, np.dtype(dtype))

    def test_by_hand(self, impl):
        """two equal probabilities, g = (1, 0): the gradient is (1/4, -1/4)"""
        expect_close("dℓ/dz", impl(np.array([[1.0, 0.0]]), np.array([[0.5, 0.5]])), [[0.25, -0.25]])

    def test_equals_torch(self, impl):
        """rows of a matrix: as torch has it"""
        self._same(impl, (4, 5))
        self._same(impl, (3, 3))

    def test_jacobian(self, impl):
        """equals g times the Jacobian, written out"""
        p = np.array([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0]])
        g = np.array([[1.0, -2.0, 3.0], [4.0, 5.0, 6.0]])
        expect_close("dℓ/dz", impl(g, p), np.einsum("ni,nij->nj", g, jacobian_of_softmax(p)), atol=1e-12)

    def test_any_number_of_axes(self, impl):
        """one row, and rows under several axes, as in attention: [batch, heads, queries, keys]"""
        self._same(impl, (6,))
        for shape in [(2, 3, 4, 5), (1, 1, 2, 1), (2, 3, 4), (3, 1, 5), (2, 1, 3, 2, 4), (3, 1), (1, 300), (300, 2)]:
            self._same(impl, shape)
        self._same(impl, (2, 3, 4), np.float16)

    def test_columns(self, impl):
        """arrays that are views, transposed or every second row, as slices of a batch are"""
        g, p = rng().standard_normal((5, 4)), torch.tensor(rng(1).standard_normal((5, 4))).softmax(0).numpy()
        expected = np.einsum("ni,nij->nj", g.T, jacobian_of_softmax(p.T))
        expect_close("dℓ/dz for transposed arrays", impl(g.T, p.T), expected, atol=1e-12)
        expect_close("dℓ/dz for every second row", impl(g.T[::2], p.T[::2]), expected[::2], atol=1e-12)

    def test_constant_gradient(self, impl):
        """a gradient that is the same for every class moves nothing: probabilities add up to 1 whatever z is"""
        p = np.array([[0.2, 0.3, 0.5]])
        expect_close("dℓ/dz", impl(np.full((1, 3), 7.0), p), np.zeros((1, 3)), atol=1e-12)

    def test_small_probabilities(self, impl):
        """probabilities down to 1e-9 have their gradient, too"""
        p = np.array([[1 - 3e-5 - 1e-9, 1e-5, 2e-5, 1e-9]])
        g = np.array([[1.0, -5e4, 3e4, 2e8]])
        expected = np.einsum("ni,nij->nj", g, jacobian_of_softmax(p))
        expect_close("dℓ/dz", impl(g, p), expected, atol=1e-12, rtol=1e-9)

    def test_no_jacobian(self, impl):
        """rows of 1,000 elements, one or eight: at most ten arrays as large as p at once, not a Jacobian a row"""
        for shape in [(8, 1000), (1000,), (2, 1, 4, 1000)]:
            g, p = rng().standard_normal(shape), np.full(shape, 1e-3)
            most = 10 * p.nbytes + 10_000  # small objects of Python's own
            tracemalloc.start()
            try:
                impl(g, p)
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            what = f"p of shape {list(shape)}"
            expect(peak < most, f"{what}: expected at most {most:,} bytes\n  got      {peak:,} bytes at the peak")

    def test_one_sum_a_row(self, impl):
        """3 rows of 4,000 elements: one sum a row, so some 10 numbers handled for each of p, not 4,000 (no timing)"""
        g, p = rng().standard_normal((3, 4000)), np.full((3, 4000), 1 / 4000)
        done = work_of(lambda: impl(g.view(Work), p.view(Work)), 2000, "does a loop walk the columns?")
        said = f"expected at most {40 * p.size:,} numbers handled\n  got      {done:,}: is a Jacobian there, by column?"
        expect(done <= 40 * p.size, said)

    def test_inputs_and_dtype(self, impl):
        """float16, float32 and float64 stay what they are, and g and p stay as they were"""
        for dtype in (np.float32, np.float16):
            self._same(impl, (2, 3), dtype)
        g, p = np.array([[1.0, 2.0]]), np.array([[0.5, 0.5]])
        impl(g, p)
        expect_equal("g afterwards", g.tolist(), [[1.0, 2.0]])
        expect_equal("p afterwards", p.tolist(), [[0.5, 0.5]])


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
        da, db = expect_parts(impl(g, a, b), "da", "db")
        expect_close(f"da for {a_shape} @ {b_shape}", da, ta.grad, atol=1e-10)
        expect_close(f"db for {a_shape} @ {b_shape}", db, tb.grad, atol=1e-10)
        same = all(np.array_equal(x, y) for x, y in zip((g, a, b), inputs, strict=True))
        expect(same, "g, a or b was changed; return new arrays instead")
        own = not any(np.shares_memory(new, given) for new in (da, db) for given in (g, a, b))
        expect(own, "da or db has the memory of g, a or b; return new arrays instead")
        expect_equal("dtypes of da and db", [np.asarray(x).dtype for x in (da, db)], [np.dtype(np.float64)] * 2)

    def test_matrices(self, impl):
        """two matrices: da has a's shape, db has b's, values as torch's; also with one row, column or inner number"""
        for m, k, n in [(2, 3, 4), (1, 3, 4), (2, 1, 4), (2, 3, 1)]:
            self._same(impl, (m, k), (k, n))

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
        self._same(impl, (2, 3), (6, 5, 3, 4))
        self._same(impl, (5, 2, 1), (1, 4))  # K = 1 is no batch axis

    def test_both_broadcast(self, impl):
        """batch axes of size 1 broadcast on either side"""
        self._same(impl, (1, 4, 2, 3), (5, 1, 3, 2))

    def test_missing_and_one(self, impl):
        """one input lacks a batch axis and has a batch axis of size 1 besides: both are summed"""
        self._same(impl, (6, 5, 2, 3), (1, 3, 4))
        self._same(impl, (1, 2, 3), (6, 5, 3, 4))
        self._same(impl, (5, 1, 3), (1, 3, 4))  # M = 1 is no batch axis

    def test_empty_batch(self, impl):
        """a batch of no pairs: the gradient of the one matrix is 0"""
        self._same(impl, (0, 2, 3), (3, 4))
        self._same(impl, (0, 2, 3), (1, 3, 4))
        self._same(impl, (2, 3), (5, 0, 3, 4))
        g, a, b = np.zeros((0, 2, 4), np.float32), np.zeros((0, 2, 3), np.float32), np.ones((3, 4), np.float32)
        da, db = expect_parts(impl(g, a, b), "da", "db")
        expect_close("db of an empty batch", db, np.zeros((3, 4)))
        expect_equal("dtypes of da and db", [np.asarray(x).dtype for x in (da, db)], [np.dtype(np.float32)] * 2)

    def test_views_and_dtype(self, impl):
        """transposed views are right, too, and float32 stays float32"""
        r = rng(2)
        g, a, b = (r.standard_normal(s).astype(np.float32) for s in ((4, 2, 5), (3, 2, 5), (4, 3)))
        g, a, b = g.transpose(1, 2, 0), a.transpose(1, 2, 0), b.T  # [2, 5, 4], [2, 5, 3], [3, 4]
        da, db = expect_parts(impl(g, a, b), "da", "db")
        for dtype in (np.float16, np.float64):
            parts = expect_parts(impl(*(x.astype(dtype) for x in (g, a, b))), "da", "db")
            expect_equal("dtypes of da and db", [np.asarray(x).dtype for x in parts], [np.dtype(dtype)] * 2)
        one = np.ones((1, 1))
        da, db = expect_parts(impl(g[0, :, :1], g[0, :, 1:2], one), "da", "db")
        expect(not np.shares_memory(da, g), "da has the memory of g where b is a single 1; return new arrays instead")
        da, db = expect_parts(impl(g, a, b), "da", "db")
        expect_close("da", da, np.einsum("bmn,kn->bmk", g, b), atol=1e-5)
        expect_close("db", db, np.einsum("bmk,bmn->kn", a, g), atol=1e-5)
        expect_equal("dtypes of da and db", [np.asarray(x).dtype for x in (da, db)], [np.dtype(np.float32)] * 2)


class _Node:
    def __init__(self, name, *inputs):
        self.name, self.inputs = name, list(inputs)

    def __repr__(self):
        return self.name


def waves_of(root):
    """Wave of each node: its longest way from the root, by relaxing edges until nothing changes."""
    wave, changed = {root: 0}, [root]
    while changed:
        user = changed.pop(0)
        for node in user.inputs:
            if wave.get(node, -1) < wave[user] + 1:
                wave[node] = wave[user] + 1
                changed.append(node)
    return wave


def check_waves(impl, root):
    wave = waves_of(root)
    before = {node: (dict(vars(node)), list(node.inputs)) for node in wave}
    lines = [f"{node} has the inputs {', '.join(map(str, node.inputs))}" for node in wave if node.inputs]
    graph = f"\n  the graph: {'; '.join(lines) or f'{root} alone'}" if len(wave) < 12 else ""
    of_class = set(vars(_Node))
    with recursion_limit_left_alone():
        got = impl(root)
    expect(got is not None, "expected a list of waves\n  got      nothing (is a `return` missing?)")
    lists = isinstance(got, list) and all(isinstance(w, list) for w in got)
    expect(lists, f"expected a list of lists of nodes\n  got      {repr(got)[:80]}")
    other = next((x for w in got for x in w if not isinstance(x, _Node)), None)
    expect(other is None, f"expected nodes in the waves\n  got      {other!r}, a {type(other).__name__}")
    for node, (attributes, inputs) in before.items():
        expect(getattr(node, "inputs", None) == inputs, f"the inputs of {node} were changed{graph}")
        new = (set(vars(node)) - set(attributes)) | (set(vars(_Node)) - of_class)
        expect(not new, f"{node} got the attribute {', '.join(new)}; leave the nodes as they are")
        name = attributes["name"]
        expect(node.name == name, f"the node {name!r} is called {node.name!r} now; leave the nodes as they are")
        expect(vars(node) == attributes, f"attributes of {node} were changed or removed; leave the nodes as they are")
    shown = f"\n  got {got}{graph}" if graph else ""
    expect(all(got), f"expected no empty wave{shown}")
    flat = [x for w in got for x in w]
    twice = next((x for x, count in Counter(flat).items() if count > 1), None)
    expect(twice is None, f"expected every node once, {twice} is there {flat.count(twice)} times{shown}")
    for node, i in wave.items():
        at = next((j for j, w in enumerate(got) if node in w), None) if len(wave) < 60 else i
        expect(at == i, f"expected {node} in wave {i} (from 0), got {'it nowhere' if at is None else at}{shown}")
    expect(len(flat) == len(wave), f"expected {len(wave):,} nodes in all, got {len(flat):,}{shown}")


@exercise("1.3", "backward_waves")
class TestBackwardWaves:
    def test_leaf(self, impl):
        """a leaf alone is one wave"""
        check_waves(impl, _Node("a"))

    def test_chain(self, impl):
        """a chain: one node a wave, root first"""
        a = _Node("a")
        b = _Node("b", a)
        check_waves(impl, _Node("c", b))

    def test_diamond(self, impl):
        """two nodes that wait for the same user are one wave; a node with two users comes once, after both"""
        a = _Node("a")
        b, c = _Node("b", a), _Node("c", a)
        check_waves(impl, _Node("d", b, c))

    def test_used_twice_by_one(self, impl):
        """x * x: one node that is both inputs of another, alone and with more around it"""
        x = _Node("x")
        check_waves(impl, _Node("y", x, x))
        for flip in (False, True):
            z = _Node("z", x)
            check_waves(impl, _Node("root", *((z, x, x) if flip else (x, x, z))))

    def test_leaves(self, impl):
        """a leaf next to the root is released at once, though the graph goes on elsewhere"""
        for flip in (False, True):
            a, b = _Node("a"), _Node("b")
            chain = _Node("d", _Node("c", a), b)
            check_waves(impl, _Node("root", *((chain, _Node("e")) if flip else (_Node("e"), chain))))

    def test_wide(self, impl):
        """a node of 300 inputs, which share 2, and 300 uses of one node"""
        a, b = _Node("a"), _Node("b")
        check_waves(impl, _Node("root", *(_Node(str(i), a, b) for i in range(300))))
        check_waves(impl, _Node("root", *[a] * 300))

    def test_one_name(self, impl):
        """two different nodes of one name are two nodes"""
        a = _Node("a")
        check_waves(impl, _Node("add", _Node("mul", a), _Node("mul", a)))

    def test_short_and_long_path(self, impl):
        """a node with a short and a long way from the root waits for the long one, whichever input stands first"""
        for flip in (False, True):
            a = _Node("a")
            b = _Node("b", a)
            c = _Node("c", b)
            d = _Node("d", c)
            check_waves(impl, _Node("root", *((d, a) if flip else (a, d))))
            e = _Node("e", b)  # b, in the middle of the long way, is also used next to the root
            check_waves(impl, _Node("root", *((e, d) if flip else (d, e))))

    def test_random_graphs(self, impl):
        """100 random graphs"""
        r = rng(3)
        for _ in range(100):
            nodes = [_Node("0")]
            for i in range(1, 9):
                nodes.append(_Node(str(i), *(nodes[j] for j in r.integers(max(0, i - 4), i, r.integers(1, 4)))))
            check_waves(impl, nodes[-1])

    def test_ladder(self, impl):
        """16 diamonds in a row have 65,536 paths but 49 nodes"""
        node = _Node("start")
        for i in range(16):
            node = _Node(f"join{i}", _Node(f"left{i}", node), _Node(f"right{i}", node))
        check_waves(impl, node)

    def test_deep(self, impl):
        """a chain of 5,000 nodes: no recursion"""
        node = _Node("0")
        for i in range(1, 5000):
            node = _Node(str(i), node)
        check_waves(impl, node)


@exercise("1.4", "cross_entropy")
class TestCrossEntropy:
    def _same(self, impl, logits, targets, atol=1e-9):
        t = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
        loss = torch.nn.functional.cross_entropy(t, torch.tensor(targets.astype(np.int64)))
        loss.backward()
        before = logits.copy(), targets.copy()
        with np.errstate(all="ignore"):
            got_loss, gradient = expect_parts(impl(logits, targets), "loss", "gradient")
        expect(
            np.array_equal(logits, before[0]) and np.array_equal(targets, before[1]),
            "logits or targets were changed; work on a copy",
        )
        rtol = {np.float64: 1e-9, np.float32: 1e-5, np.float16: 1e-5}[logits.dtype.type]
        expect_close("loss", got_loss, loss, atol=min(atol, 1e-4), rtol=rtol)
        expect_close("gradient", gradient, t.grad, atol=atol, rtol=rtol)
        expect_equal("dtype of the gradient", np.asarray(gradient).dtype, logits.dtype)

    def test_by_hand(self, impl):
        """equal logits for 4 classes: the loss is log 4, the gradient 1/4 everywhere but 1/4 - 1 at the target"""
        loss, gradient = expect_parts(impl(np.zeros((1, 4)), np.array([2])), "loss", "gradient")
        expect_close("loss", loss, np.log(4))
        expect_close("gradient", gradient, [[0.25, 0.25, -0.75, 0.25]])

    def test_equals_torch(self, impl):
        """loss and gradient of a batch equal torch's: a mean over the batch"""
        r = rng(4)
        self._same(impl, r.standard_normal((6, 5)) * 3, r.integers(0, 5, 6))
        self._same(impl, r.standard_normal((1, 2)), np.array([1]))

    def test_large_logits(self, impl):
        """logits of 10,000 in float32: finite and right; also where two lie 300 apart, and all near -10,000"""
        logits = np.array([[1e4, 0, -1e4], [-1e4, 1e4, 9.9e3]], np.float32)
        for targets in ([1, 2], [2, 0], [0, 1]):
            self._same(impl, logits, np.array(targets), atol=1e-4)
        self._same(impl, np.array([[300.0, 0, 1], [-1e4, -1e4, -9.9e3]], np.float32), np.array([1, 0]), atol=1e-4)

    def test_rows_far_apart(self, impl):
        """one row near 0, one near 10,000: each row is made safe by itself"""
        self._same(impl, np.array([[0.0, 1.0], [1e4, 1e4 + 1.0]]), np.array([0, 1]))
        logits = rng(9).standard_normal((12, 5)) + 2000.0 * np.arange(-6, 6)[:, None]
        self._same(impl, logits, rng(10).integers(0, 5, 12))
        for size in (0.1, 30.0, 300.0):
            self._same(impl, size * rng(11).standard_normal((40, 30)), rng(12).integers(0, 30, 40))

    def test_dtypes(self, impl):
        """the gradient has the logits' dtype: float32, float16"""
        self._same(impl, np.array([[1.0, 2.0, 0.5]], np.float32), np.array([1]), atol=1e-6)
        self._same(impl, np.array([[1.0, 2.0, 0.5], [3.0, -4.0, 0.0]], np.float16), np.array([1, 2]), atol=1e-3)

    def test_many_rows_in_float16(self, impl):
        """70,000 rows in float16, more than float16 can count: mean and gradient are right, computed in float32"""
        logits = rng(8).standard_normal((70_000, 2)).astype(np.float16)
        targets = (logits[:, 0] > 0.5).astype(np.int64)
        self._same(impl, logits, targets, atol=1e-7)

    def test_many_classes_in_float16(self, impl):
        """70,000 equal logits in float16: the sum of exponentials is more than float16 holds; the loss is log 70,000"""
        loss, gradient = expect_parts(impl(np.zeros((1, 70_000), np.float16), np.array([69_999])), "loss", "gradient")
        expect_close("loss", loss, np.log(70_000), atol=0.02)
        expect_close("gradient at the target", np.asarray(gradient)[0, -1], -1, atol=1e-3)
        expect_equal("dtype of the gradient", np.asarray(gradient).dtype, np.dtype(np.float16))

    def test_one_class(self, impl):
        """with a single class the loss and its gradient are 0"""
        self._same(impl, np.array([[3.0], [-400.0]]), np.array([0, 0]))

    def test_views_and_targets(self, impl):
        """transposed logits, targets of int32 and uint8, a class that is the target of several rows"""
        for kind in (np.int32, np.uint8):
            self._same(impl, rng(6).standard_normal((5, 4)).T, np.array([2, 2, 4, 2], kind))

    def test_narrow_targets(self, impl):
        """targets of int8 or uint8, where rows and classes are more than these can count"""
        for kind, most in ((np.int8, 127), (np.uint8, 255)):
            logits = rng(7).standard_normal((300, 270))
            self._same(impl, logits, rng(8).integers(0, most + 1, 300).astype(kind))

    def test_shift(self, impl):
        """adding a constant to a row changes nothing"""
        r = rng(5)
        logits, targets = r.standard_normal((3, 4)), np.array([0, 3, 1])
        shift = np.array([[5.0], [-7.0], [100.0]])
        first, second = impl(logits, targets), impl(logits + shift, targets)
        expect_close("loss after the shift", second[0], first[0], atol=1e-9)
        expect_close("gradient after the shift", second[1], first[1], atol=1e-9)


@exercise("1.5", "gradient_error")
class TestGradientError:
    def _points(self, impl, shape, directions, eps):
        """Where f was called, as steps from x over eps, for a linear f whose gradient is half wrong; and the result."""
        c, claimed, x = rng(7).standard_normal(shape), rng(8).standard_normal(shape), np.zeros(shape)
        points = []

        def f(a):
            expect(not x.any(), "x was changed while f ran; move a copy")
            points.append(np.array(a) / eps)
            return (c * a).sum()

        got = impl(f, x, claimed, rng(9), directions, eps)
        steps = np.array([point.ravel() for point in points if np.abs(point).max() > 0])
        return got, steps, c.ravel(), claimed.ravel()

    def test_directions(self, impl):
        """every direction is a new one, of length 1 over all elements, there and back"""
        for shape in [(4,), (3, 4), (2, 1, 3)]:
            _, steps, _, _ = self._points(impl, shape, 16, 0.5)
            what = f"x of shape {list(shape)}"
            expect(
                len(steps) >= 32, f"{what}: expected f at 2 points for each of 16 directions\n  got {len(steps)} in all"
            )
            expect_close(f"{what}: lengths of the directions", np.linalg.norm(steps, axis=1), np.ones(len(steps)))
            different = len(np.unique(np.round(steps, 6), axis=0))
            expect(different >= 32, f"{what}: expected 32 different points for 16 directions\n  got {different}")

    def test_drawn_by_rng(self, impl):
        """the directions come from `rng`, standard normal"""
        _, steps, _, _ = self._points(impl, (3, 4), 2, 0.5)
        drawn = rng(9).standard_normal((2, 12))
        for x in (np.full((3, 4), 1000.0), np.full((3, 4), -1e-3)):
            moved = []

            def f(a, x=x, moved=moved):
                moved.append(np.linalg.norm(a - x))
                return (a * a).sum()

            impl(f, x, 2 * x, rng(9), 3, 0.25)
            expect_close(f"distances from x = {x[0, 0]:g}, eps = 0.25", moved, np.full(6, 0.25))
        for i, d in enumerate(drawn / np.linalg.norm(drawn, axis=1, keepdims=True)):
            near = np.abs(steps - d).max(axis=1).min()
            expect(near < 1e-6, f"expected f at x + eps · (direction {i} that rng draws)\n  got no such point")

    def test_second_order(self, impl):
        """central differences: for x³ at 1 and eps = 0.1 the error is 0.01 / 6.01"""
        for shape in [(), (1,), (1, 1)]:
            got = impl(lambda a: (a**3).sum(), np.ones(shape), np.full(shape, 3.0), rng(7), 3, 0.1)
            expect_close(f"error for shape {list(shape)}", got, 0.01 / 6.01, atol=1e-9)

    def test_right_gradient(self, impl):
        """a right gradient, of a matrix: the error is rounding, below 1e-6"""
        x, w = rng(6).standard_normal((3, 4)), rng(7).standard_normal((4, 2))
        t = torch.tensor(x, requires_grad=True)
        (torch.tanh(t @ torch.tensor(w)) ** 2).sum().backward()
        error = impl(lambda a: (np.tanh(a @ w) ** 2).sum(), x, t.grad.numpy(), rng(1))
        expect_close("error of a right gradient", error, 0.0, atol=1e-6)
        turned = x.T
        for what, grad in (("", 2 * turned), (" that lies in memory row by row", np.ascontiguousarray(2 * turned))):
            error = impl(lambda a: (a * a).sum(), turned, grad, rng(1))
            expect_close(f"error for a transposed x, a right gradient{what}", error, 0.0, atol=1e-6)

    def test_wrong_gradients(self, impl):
        """twice too large is an error of 1/3, zeros or the wrong sign of 1, for each direction alone"""
        c, x = rng(2).standard_normal((2, 3)), rng(3).standard_normal((2, 3))
        for name, gradient, error in [("twice", 2 * c, 1 / 3), ("0 times", 0 * c, 1.0), ("-1 times", -c, 1.0)]:
            for seed in range(6):
                got = impl(lambda a: (c * a).sum(), x, gradient, rng(seed), 1)
                expect_close(f"error of {name} the right gradient, one direction", got, error, atol=1e-6)
        for size in (1e-9, 1e-12):
            d = rng(3).standard_normal(x.shape)
            slope = abs((size * c * d).sum() / np.linalg.norm(d))
            got = impl(lambda a, size=size: (size * c * a).sum(), np.zeros(x.shape), 0 * c, rng(3), 1, 0.5)
            what = f"error of gradient 0 where the slope is {slope:.2g}"
            expect_close(what, got, slope / (slope + 1e-12), atol=1e-6)
        got = impl(lambda a: 5.0, x, 0 * c, rng(1))
        expect_close("error of gradient 0 for a constant function", got, 0.0, atol=1e-6)

    def test_largest_of_several(self, impl):
        """the largest error of all directions counts"""
        got, steps, c, claimed = self._points(impl, (3, 4), 16, 0.5)
        measured, said = np.abs(steps @ c), np.abs(steps @ claimed)
        errors = np.abs(steps @ (c - claimed)) / (measured + said + 1e-12)
        expect_close("the largest error of 16 directions", got, errors.max(), atol=1e-6)

    def test_nan(self, impl):
        """a NaN comes out as NaN: one in the gradient, or f of one direction, be it the first, a middle or the last"""
        x = np.ones(3)
        got = impl(lambda a: (a * a).sum(), x, np.array([2.0, np.nan, 2.0]), rng(1))
        expect(bool(np.isnan(got)), f"a NaN in the gradient: expected NaN\n  got      {got}")
        drawn = rng(1).standard_normal((5, 3))
        drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
        for at, bad in enumerate(drawn):
            for sign in (1, -1):

                def f(a, point=x + sign * 0.5 * bad):
                    return np.nan if np.abs(a - point).max() < 1e-9 else (a * a).sum()

                got = impl(f, x, 2 * x, rng(1), 5, 0.5)
                expect(
                    bool(np.isnan(got)), f"f is NaN for direction {at} of 0 to 4 only: expected NaN\n  got      {got}"
                )

    def test_infinite(self, impl):
        """where f is infinite the error is ∞ / ∞, NaN, and must come out"""
        for value in (np.inf, -np.inf):
            with np.errstate(all="ignore"):
                got = impl(lambda a, value=value: value if a[0] > 1 else 0.0, np.ones(3), np.ones(3), rng(1))
            expect(bool(np.isnan(got)), f"f is {value} on one side: expected NaN\n  got      {got}")

    def test_one_wrong_element(self, impl):
        """one wrong element among 1,000 shows"""
        x = rng(5).standard_normal(1000)
        gradient = 2 * x
        gradient[321] += 1
        error = impl(lambda a: (a * a).sum(), x, gradient, rng(6))
        expect(error > 1e-4, f"expected an error above 0.0001\n  got      {error}")

    def test_defaults(self, impl):
        """four directions of size 1e-6, if nothing else is asked for: eight calls, 1e-6 away from x"""
        points = []

        def f(a):
            points.append(np.linalg.norm(a))
            return a.sum()

        impl(f, np.zeros(3), np.ones(3), rng(1))
        expect_equal("calls of f", len(points), 8)
        expect_close("distances from x, in millionths", np.array(points) * 1e6, np.ones(8))

    def test_few_calls(self, impl):
        """10,000 elements, two directions: f is called a few times, not once an element"""
        calls = []

        def f(a):
            calls.append(1)
            expect(len(calls) <= 4, "f was called more than 4 times for 2 directions")
            return (a * a).sum()

        x = rng(9).standard_normal((100, 100))
        expect_close("error of a right gradient", impl(f, x, 2 * x, rng(1), 2), 0.0, atol=1e-4)

    def test_float32(self, impl):
        """a float32 x is moved in float64, and a float32 gradient is added up in float64; both stay as they are"""
        x = np.array([1.0, 1000.0, 3.0], np.float32)
        gradient, kinds = 2 * x, set()

        def f(a):
            kinds.add(np.asarray(a).dtype)
            return (a**2).sum()

        got = impl(f, x, gradient, rng(3))
        expect_close("error of a right gradient", got, 0.0, atol=1e-5)
        expect_equal("dtypes that f was called with", kinds, {np.dtype(np.float64)})
        expect_equal("x afterwards", x.tolist(), [1.0, 1000.0, 3.0])
        expect_equal("gradient afterwards", gradient.tolist(), [2.0, 2000.0, 6.0])
        x = np.full(4096, 1e4, np.float32) + np.arange(4096, dtype=np.float32)
        wide = x.astype(np.float64)
        got = impl(lambda a: (wide * (a - wide)).sum(), x, x, rng(4), 2, 1.0)
        expect_close("error of a right gradient of 4,096 large numbers", got, 0.0, atol=1e-10)


def adamw_by_hand(p, g, m, v, t, lr, beta1, beta2, eps, decay):
    """One step for one number, in Python's floats, written from algorithm 2 of Loshchilov and Hutter (2019),
    the decay times lr as in PyTorch."""
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
            got = expect_parts(impl(p, g, m, v, t, **given), "p", "m", "v")
            p, m, v = got
            for name, array, expected in zip("pmv", got, zip(*new, strict=True), strict=True):
                expect_close(f"{name} after step {t}", array, np.reshape(expected, (2, 3)), atol=1e-10, rtol=1e-9)

    def test_inputs_are_left_alone(self, impl):
        """p, g, m and v are as they were, and the results are new arrays: with decay and without, also for lr = 0"""
        for given in (
            {},
            {"weight_decay": 0.0},
            {"lr": 0.0},
            {"beta1": 0.0, "beta2": 0.0},
            {"beta1": 0.9, "eps": 1e-3},
        ):
            what = ", ".join(f"{name} = {value:g}" for name, value in given.items()) or "the defaults"
            for t in (1, 2):
                self._leaves_alone(impl, what, t, given)

    def _leaves_alone(self, impl, what, t, given):
        for shape in [(3,), (2, 3), ()]:
            arrays = [np.array(a) for a in rng(11).uniform(0.1, 1, (4, *shape))]
            if t == 1:
                arrays[2:] = [np.zeros(shape), np.zeros(shape)]
            before = [a.copy() for a in arrays]
            results = expect_parts(impl(*arrays, t, **given), "p", "m", "v")
            for name, now, then in zip("pgmv", arrays, before, strict=True):
                expect(np.array_equal(now, then), f"{what}: {name} was changed; return a new array instead")
                for result, new in zip("pmv", results, strict=True):
                    expect(not np.shares_memory(now, new), f"{what}: the new {result} is the memory of {name}")

    def test_dtype_and_views(self, impl):
        """float32 stays float32, and transposed views are right, too"""
        p, g, m, v = rng(13).uniform(0.1, 1, (4, 3, 2)).astype(np.float32)
        half = [x.astype(np.float16) for x in (p, g, m, v)]
        got = expect_parts(impl(*half, 3, eps=1e-3), "p", "m", "v")
        expect_equal("dtypes for float16", [np.asarray(x).dtype for x in got], [np.dtype(np.float16)] * 3)
        plain = expect_parts(impl(p, g, m, v, 3), "p", "m", "v")
        turned = expect_parts(impl(p.T, g.T, m.T, v.T, 3), "p", "m", "v")
        for name, a, b in zip("pmv", plain, turned, strict=True):
            expect_equal(f"dtype of {name}", np.asarray(a).dtype, np.dtype(np.float32))
            expect_close(f"{name} of transposed arrays", b, np.asarray(a).T)

    def test_first_step_is_lr(self, impl):
        """without decay the first step has size lr, for small gradients and for large ones"""
        g = np.array([1e-3, -1.0, 1e3])
        got = impl(np.zeros(3), g, np.zeros(3), np.zeros(3), 1, lr=0.1, weight_decay=0.0)
        p, m, v = expect_parts(got, "p", "m", "v")
        expect_close("p after one step from 0", p, [-0.1, 0.1, -0.1], atol=1e-5)
        expect_close("m", m, 0.1 * g, atol=1e-9)
        expect_close("v", v, 0.001 * g * g, atol=1e-9)

    def test_decay_is_decoupled(self, impl):
        """with a zero gradient the parameter shrinks by lr · weight_decay, and m and v stay 0"""
        got = impl(np.array([2.0, -4.0]), np.zeros(2), np.zeros(2), np.zeros(2), 1, lr=0.1, weight_decay=0.5)
        p, m, v = expect_parts(got, "p", "m", "v")
        expect_close("p", p, [1.9, -3.8], atol=1e-9)
        expect_close("m", m, [0, 0])
        expect_close("v", v, [0, 0])

    def test_ten_steps(self, impl):
        """ten steps equal the formula worked number by number: p, m and v"""
        self._steps(impl, 10)

    def test_late_steps(self, impl):
        """step 200, 2,000 and 20,000: the correction for the start at zero fades, and never ends at once"""
        for t in (200, 2000, 20_000):
            values = [0.5, -2.0, 0.3, 0.04]
            arrays = [np.array([x]) for x in values]
            for beta2 in (0.999, 0.9999):
                expected = adamw_by_hand(*values, t, 0.1, 0.9, beta2, 1e-8, 0.01)
                got = expect_parts(impl(*arrays, t, lr=0.1, beta2=beta2), "p", "m", "v")
                for name, array, number in zip("pmv", got, expected, strict=True):
                    expect_close(f"{name} after step {t:,}, β2 = {beta2}", array, [number], atol=1e-12, rtol=1e-9)

    def test_all_arguments(self, impl):
        """other values of every argument"""
        values = {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 1e-2, "weight_decay": 0.3}
        self._steps(impl, 5, **values)
        for values in ({"lr": 2.0, "weight_decay": 0.7}, {"lr": 1e-6, "eps": 10.0}, {"beta1": 0.99, "beta2": 0.5}):
            self._steps(impl, 4, **values)
