"""Every rule of the table against torch.autograd and against central differences, over shapes that broadcast."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minillm.autograd import RULES, Tensor, apply, concat, maximum, unbroadcast, where

SETTINGS = settings(max_examples=25, deadline=None, derandomize=True)

# name -> (our operation, torch's, where the inputs may lie)
UNARY = {
    "neg": (lambda x: -x, lambda x: -x, (-3, 3)),
    "exp": (Tensor.exp, torch.exp, (-3, 3)),
    "log": (Tensor.log, torch.log, (0.1, 5)),
    "tanh": (Tensor.tanh, torch.tanh, (-3, 3)),
    "sigmoid": (Tensor.sigmoid, torch.sigmoid, (-6, 6)),
    "relu": (Tensor.relu, torch.relu, (-3, 3)),
    "silu": (Tensor.silu, torch.nn.functional.silu, (-6, 6)),
    "pow": (lambda x: x**3, lambda x: x**3, (-3, 3)),
    "pow -0.5": (lambda x: x**-0.5, lambda x: x**-0.5, (0.2, 5)),
    "pow 0": (lambda x: x**0, lambda x: x**0, (-3, 3)),
    "log_softmax": (Tensor.log_softmax, lambda x: torch.log_softmax(x, -1), (-5, 5)),
    "mul by itself": (lambda x: x * x, lambda x: x * x, (-3, 3)),
    "number on the left": (lambda x: 2 - 3 / x, lambda x: 2 - 3 / x, (0.5, 3)),
}
BINARY = {
    "add": (lambda a, b: a + b, lambda a, b: a + b),
    "sub": (lambda a, b: a - b, lambda a, b: a - b),
    "mul": (lambda a, b: a * b, lambda a, b: a * b),
    "div": (lambda a, b: a / b, lambda a, b: a / b),
    "maximum": (maximum, torch.maximum),
}
REDUCE = {
    "sum": (Tensor.sum, lambda x, axis, keep: x.sum(axis, keep) if axis is not None else x.sum()),
    "mean": (Tensor.mean, lambda x, axis, keep: x.mean(axis, keep) if axis is not None else x.mean()),
    "max": (Tensor.max, lambda x, axis, keep: x.amax(axis, keep) if axis is not None else x.amax()),
}


def agree(ours, theirs, arrays, rng, rtol=1e-9):
    """Outputs and all input gradients equal torch's, for a random gradient of the output."""
    mine = [Tensor(a, requires_grad=True) for a in arrays]
    other = [torch.tensor(a, requires_grad=True) for a in arrays]
    y, t = ours(*mine), theirs(*other)
    np.testing.assert_allclose(y.data, t.detach().numpy(), rtol=rtol, atol=rtol)
    g = np.asarray(rng.standard_normal(y.shape), y.dtype)
    y.backward(g)
    t.backward(torch.tensor(g))
    for m, o in zip(mine, other, strict=True):
        assert (m.grad.shape, m.grad.dtype) == (m.shape, m.dtype), "a gradient looks like its tensor"
        np.testing.assert_allclose(m.grad, o.grad.numpy(), rtol=rtol, atol=rtol)


def differences(f, arrays, eps=1e-6):
    """Check every input gradient of sum(w * f(...)) by central differences, in fp64."""
    rng = np.random.default_rng(0)
    w = np.asarray(rng.standard_normal(f(*map(Tensor, arrays)).shape))
    tensors = [Tensor(a, requires_grad=True) for a in arrays]
    f(*tensors).backward(w)
    for k, a in enumerate(arrays):
        numeric = np.zeros_like(a)
        for at in np.ndindex(a.shape):
            moved = []
            for sign in (1, -1):
                b = [x.copy() for x in arrays]
                b[k][at] += sign * eps
                moved.append((f(*map(Tensor, b)).data * w).sum())
            numeric[at] = (moved[0] - moved[1]) / (2 * eps)
        np.testing.assert_allclose(tensors[k].grad, numeric, rtol=1e-5, atol=1e-7)


def values(rng, shape, low=-3, high=3, dtype=np.float64):
    return rng.uniform(low, high, shape).astype(dtype)


seeds = st.integers(0, 2**31)
shapes = hnp.array_shapes(min_dims=1, max_dims=4, max_side=4)
pairs = hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=4, max_side=4, min_dims=0)


@pytest.mark.parametrize("name", UNARY)
@SETTINGS
@given(shape=shapes, seed=seeds)
def test_unary_equals_torch(name, shape, seed):
    rng = np.random.default_rng(seed)
    ours, theirs, (low, high) = UNARY[name]
    agree(ours, theirs, [values(rng, shape, low, high)], rng)


@pytest.mark.parametrize("name", BINARY)
@SETTINGS
@given(shapes=pairs, seed=seeds)
def test_binary_broadcasts_like_torch(name, shapes, seed):
    rng = np.random.default_rng(seed)
    a, b = (values(rng, shape, 0.5, 3) for shape in shapes.input_shapes)
    agree(*BINARY[name], [a, b], rng)


@pytest.mark.parametrize("name", REDUCE)
@SETTINGS
@given(shape=shapes, seed=seeds, keep=st.booleans(), data=st.data())
def test_reductions_equal_torch(name, shape, seed, keep, data):
    rng = np.random.default_rng(seed)
    axes = st.none() | st.integers(-len(shape), len(shape) - 1)
    some = st.sets(st.integers(0, len(shape) - 1), min_size=1).map(tuple)
    axis = data.draw(axes | some)
    keep = keep and axis is not None
    ours, theirs = REDUCE[name]
    # Rounded, so that max meets ties.
    a = values(rng, shape).round()
    agree(lambda x: ours(x, axis, keep), lambda x: theirs(x, axis, keep), [a], rng)


@SETTINGS
@given(
    batch=hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=2, max_side=3, min_dims=0),
    m=st.integers(1, 4),
    k=st.integers(1, 4),
    n=st.integers(1, 4),
    seed=seeds,
)
def test_matmul_broadcasts_like_torch(batch, m, k, n, seed):
    rng = np.random.default_rng(seed)
    left, right = batch.input_shapes
    a, b = values(rng, (*left, m, k)), values(rng, (*right, k, n))
    agree(lambda x, y: x @ y, lambda x, y: x @ y, [a, b], rng)


@SETTINGS
@given(shapes=hnp.mutually_broadcastable_shapes(num_shapes=3, max_dims=3, max_side=3), seed=seeds)
def test_where_broadcasts_like_torch(shapes, seed):
    rng = np.random.default_rng(seed)
    c, a, b = (values(rng, shape) for shape in shapes.input_shapes)
    agree(lambda x, y: where(c > 0, x, y), lambda x, y: torch.where(torch.tensor(c > 0), x, y), [a, b], rng)


@SETTINGS
@given(shape=shapes, seed=seeds, data=st.data())
def test_moving_elements_equals_torch(shape, seed, data):
    rng = np.random.default_rng(seed)
    a = values(rng, shape)
    axes = data.draw(st.permutations(range(len(shape))))
    agree(lambda x: x.transpose(*axes), lambda x: x.permute(*axes), [a], rng)
    agree(lambda x: x.reshape(-1), lambda x: x.reshape(-1), [a], rng)
    negative = [axis - len(shape) for axis in axes]
    agree(lambda x: x.transpose(*negative), lambda x: x.permute(*negative), [a], rng)
    if len(shape) >= 2:
        agree(lambda x: x.mT, lambda x: x.mT, [a], rng)


@SETTINGS
@given(pieces=st.lists(st.integers(1, 3), min_size=1, max_size=4), axis=st.integers(-3, 2), seed=seeds)
def test_concat_equals_torch(pieces, axis, seed):
    rng = np.random.default_rng(seed)
    shape = [2, 2, 2]
    arrays = []
    for size in pieces:
        shape[axis] = size
        arrays.append(values(rng, shape))
    agree(lambda *x: concat(list(x), axis), lambda *x: torch.cat(x, axis), arrays, rng)


INDEXES = {
    "one row": 1,
    "slice with a step": np.s_[::2, 1:],
    "ellipsis and new axis": np.s_[..., None, -1],
    "boolean mask": np.arange(12).reshape(4, 3) % 2 == 0,
    "embedding lookup, ids repeat": np.array([[0, 3, 3], [3, 1, 0]]),
    "pairs of rows and columns": (np.array([0, 0, 2]), np.array([1, 1, 2])),
}


@pytest.mark.parametrize("name", INDEXES)
def test_index_equals_torch(name):
    rng = np.random.default_rng(0)
    index = INDEXES[name]

    def to_torch(i):
        return torch.tensor(i) if isinstance(i, np.ndarray) else i

    # torch has no negative steps, none is used here
    theirs = tuple(map(to_torch, index)) if isinstance(index, tuple) else to_torch(index)
    agree(lambda x: x[index], lambda x: x[theirs], [values(rng, (4, 3))], rng)


# One case for each entry of the table, held against central differences.
DIFFERENCES = {
    "add": (lambda a, b: a + b, [(2, 3), (3,)]),
    "sub": (lambda a, b: a - b, [(2, 1), (2, 3)]),
    "mul": (lambda a, b: a * b, [(2, 3), (1, 3)]),
    "div": (lambda a, b: a / b, [(3,), (2, 3)]),
    "maximum": (maximum, [(2, 3), (3,)]),
    "where": (lambda a, b: where([[True], [False]], a, b), [(2, 3), (3,)]),
    "matmul": (lambda a, b: a @ b, [(2, 1, 2, 3), (3, 3, 2)]),
    "neg": (lambda a: -a, [(2, 3)]),
    "pow": (lambda a: a**2.5, [(2, 3)]),
    "exp": (Tensor.exp, [(2, 3)]),
    "log": (Tensor.log, [(2, 3)]),
    "tanh": (Tensor.tanh, [(2, 3)]),
    "sigmoid": (Tensor.sigmoid, [(2, 3)]),
    "relu": (lambda a: (a - 1.5).relu(), [(2, 3)]),
    "silu": (lambda a: (a - 1.5).silu(), [(2, 3)]),
    "sum": (lambda a: a.sum(axis=1), [(2, 3, 2)]),
    "mean": (lambda a: a.mean(axis=(0, 2)), [(2, 3, 2)]),
    "max": (lambda a: a.max(axis=-1), [(2, 3, 2)]),
    "log_softmax": (lambda a: a.log_softmax(axis=0), [(3, 2)]),
    "reshape": (lambda a: a.reshape(3, -1), [(2, 3)]),
    "transpose": (lambda a: a.transpose(2, 0, 1), [(2, 3, 2)]),
    "index": (lambda a: a[np.array([0, 1, 1])], [(2, 3)]),
    "concat": (lambda a, b: concat([a, b], axis=-1), [(2, 3), (2, 1)]),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_central_differences(name):
    rng = np.random.default_rng(1)
    f, shapes = DIFFERENCES[name]
    differences(f, [values(rng, shape, 0.5, 3) for shape in shapes])


def test_every_rule_is_covered():
    assert DIFFERENCES.keys() == RULES.keys()


@pytest.mark.parametrize("name", DIFFERENCES)
def test_float32_stays_float32(name):
    rng = np.random.default_rng(2)
    f, shapes = DIFFERENCES[name]
    tensors = [Tensor(values(rng, s, 0.5, 3, np.float32), requires_grad=True) for s in shapes]
    y = f(*tensors)
    gradients = dict(y.node.input_gradients(np.ones_like(y.data)))  # before any cast on the way
    assert y.dtype == np.float32
    assert {g.dtype for g in gradients.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("name", ["sigmoid", "silu", "tanh", "log_softmax", "exp"])
def test_extreme_values_equal_torch(name):
    """No overflow, no warning, and the small numbers are right too."""
    a = np.array([-1e4, -80, -20, -1e-3, 0, 1e-3, 20, 80, 1e4], np.float32)
    if name == "exp":
        a = a[:-2]
    ours, theirs, _ = UNARY[name]
    agree(ours, theirs, [a], np.random.default_rng(0), rtol=2e-5)


def test_conventions_at_kinks_are_torchs():
    rng = np.random.default_rng(0)
    zero = np.zeros(3)
    agree(Tensor.relu, torch.relu, [zero], rng)
    agree(maximum, torch.maximum, [zero, zero.copy()], rng)
    agree(lambda a: a**0, lambda a: a**0, [zero], rng)
    agree(lambda a: a**1, lambda a: a**1, [zero], rng)


@SETTINGS
@given(shapes=pairs, seed=seeds)
def test_unbroadcast_is_the_transpose_of_broadcasting(shapes, seed):
    """<broadcast(a), g> = <a, unbroadcast(g)>: the two are transposed linear maps."""
    rng = np.random.default_rng(seed)
    a, g = values(rng, shapes.input_shapes[0]), values(rng, shapes.result_shape)
    back = unbroadcast(g, a.shape)
    assert back.shape == a.shape
    np.testing.assert_allclose((np.broadcast_to(a, g.shape) * g).sum(), (a * back).sum(), atol=1e-9)


def test_unbroadcast_with_an_empty_axis():
    assert unbroadcast(np.zeros((2, 0)), (2, 1)).tolist() == [[0], [0]]


def test_apply_names_operation_and_shapes():
    a, b = Tensor(np.ones((2, 3))), Tensor(np.ones((4, 3)))
    with pytest.raises(ValueError, match=r"mul: .*\(2, 3\) and \(4, 3\)"):
        a * b
    with pytest.raises(ValueError, match=r"matmul: .*\(2, 3\) and \(4, 3\)"):
        a @ b
    with pytest.raises(ValueError, match="reshape a vector"):
        a @ np.ones(3)
    with pytest.raises(ValueError, match="reshape"):
        a.reshape(4, 2)
    with pytest.raises(KeyError, match="expected one of add, sub"):
        apply("no such operation", a)
