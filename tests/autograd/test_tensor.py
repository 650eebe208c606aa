"""The graph: order, reuse, memory, and what bad input is told."""

import gc
import weakref

import numpy as np
import pytest
import torch

from minillm.autograd import Tensor, concat, maximum, no_grad, saved_bytes, topological_order
from minillm.autograd.nn import MLP, cross_entropy


def leaf(*shape, dtype=np.float32, seed=0):
    return Tensor(np.random.default_rng(seed).standard_normal(shape).astype(dtype), requires_grad=True)


def test_worked_example():
    """The example that the chapter does by hand."""
    w, x, b = (Tensor(v, requires_grad=True) for v in (np.float64(2), np.float64(3), np.float64(-5)))
    loss = (w * x + b) ** 2
    loss.backward()
    assert loss.item() == 1
    assert (w.grad, x.grad, b.grad) == (6, 4, 2)


def test_diamond_and_reuse():
    """One value used by several others, also twice by one, collects every share."""
    x = leaf(3, dtype=np.float64)
    t = torch.tensor(x.data.copy(), requires_grad=True)

    def f(x, exp, tanh):
        a = exp(x)
        b, c = a * a, tanh(a) + x
        return ((b * c + a - c) * (a + b)).sum()

    f(x, Tensor.exp, Tensor.tanh).backward()
    f(t, torch.exp, torch.tanh).backward()
    np.testing.assert_allclose(x.grad, t.grad.numpy(), rtol=1e-12)


def test_long_paths_and_short_ones_meet():
    """A node next to the result that also feeds a long chain waits for the chain's share."""
    x = leaf(2, dtype=np.float64)
    a = x * 2.0
    long = a
    for _ in range(5):
        long = long * 1.5
    (a + long).sum().backward()
    np.testing.assert_allclose(x.grad, 2 * (1 + 1.5**5))


def test_random_graphs_equal_torch():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        start = [rng.uniform(0.5, 1.5, 3) for _ in range(2)]
        mine = [Tensor(a, requires_grad=True) for a in start]
        other = [torch.tensor(a, requires_grad=True) for a in start]
        ours, theirs = list(mine), list(other)
        for _ in range(30):
            i, j = rng.integers(0, len(ours), 2)
            kind = rng.integers(0, 4)
            for values in (ours, theirs):
                a, b = values[i], values[j]
                values.append([a + b, a * b * 0.5, a - b, (a * 0.3).tanh()][kind])
        (ours[-1] + ours[5]).sum().backward()
        (theirs[-1] + theirs[5]).sum().backward()
        for m, o in zip(mine, other, strict=True):
            expected = np.zeros(3) if o.grad is None else o.grad.numpy()
            np.testing.assert_allclose(np.zeros(3) if m.grad is None else m.grad, expected, rtol=1e-9)


def test_chain_of_ten_thousand():
    """No recursion: neither in the walk, nor when the graph is freed."""
    x = leaf(1, dtype=np.float64)
    y = x
    for _ in range(10_000):
        y = y + 1e-4 * x
    y.sum().backward()
    np.testing.assert_allclose(x.grad, 2.0)
    del y


def test_topological_order_puts_inputs_first():
    x = leaf(2)
    a = x.exp()
    y = (a * x + a).sum()
    order = topological_order(y.node)
    position = {node: i for i, node in enumerate(order)}
    assert len(position) == len(order) == 5
    assert order[0] is x
    assert order[-1] is y.node
    for node in order[1:]:
        assert all(position[target] < position[node] for target in node.inputs)


def test_gradients_add_up_until_zeroed():
    x = leaf(3)
    for times in (1, 2):
        (2 * x).sum().backward()
        np.testing.assert_allclose(x.grad, 2 * times)
    x.zero_grad()
    assert x.grad is None
    x.backward(np.ones(3))  # a leaf is its own result
    np.testing.assert_allclose(x.grad, 1)


def test_gradients_do_not_share_memory():
    """add gives one array to both of its inputs; what the user does to one must not reach the other."""
    x, y = leaf(3), leaf(3, seed=1)
    seed = np.ones(3, np.float32)
    (x + y).backward(seed)
    x.grad *= 5
    assert y.grad.tolist() == seed.tolist() == [1, 1, 1]


def test_only_what_requires_a_gradient_gets_one():
    x, w = Tensor(np.ones((2, 3))), leaf(3, 2, dtype=np.float64)
    y = (x @ w).sum()
    y.backward()
    assert x.grad is None
    assert w.grad is not None
    assert y.detach().requires_grad is False
    assert y.detach().node is None


def test_no_grad_records_nothing():
    x = leaf(3)
    with no_grad():
        y = (x * 2).sum()
        with no_grad():
            pass
        z = x * 2  # still off after an inner block
    assert not y.requires_grad
    assert y.node is None
    assert z.node is None
    assert (x * 2).requires_grad
    with pytest.raises(ZeroDivisionError), no_grad():
        1 / 0  # noqa: B018
    assert (x * 2).requires_grad, "recording is on again after an error"

    @no_grad()
    def predict():
        return x * 2

    assert not predict().requires_grad


def test_retain_graph_and_freed_graph():
    x = leaf(3)
    y = (x * x).sum()
    y.backward(retain_graph=True)
    y.backward()
    np.testing.assert_allclose(x.grad, 4 * x.data, rtol=1e-6)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        y.backward()


def test_a_partly_freed_graph_changes_no_gradient():
    x = leaf(3)
    shared = x * x
    shared.sum().backward()
    before = x.grad.copy()
    with pytest.raises(RuntimeError, match="freed"):
        (x * 2 + shared).sum().backward()
    np.testing.assert_array_equal(x.grad, before)


# What each operation keeps of a (4, 8) float32 input of 128 bytes, beyond its leaves.
KEPT = {
    "add": (lambda a, b: a + b, 0),
    "mul": (lambda a, b: a * b, 0),  # both inputs, but they are leaves
    "relu": (lambda a, b: a.relu(), 128),
    "exp": (lambda a, b: a.exp(), 128),
    "mul of computed values": (lambda a, b: (a + b) * (a - b), 256),
    "two users of one array": (lambda a, b: (e := a.exp()) * e + e.relu(), 256),
    "mul by a constant": (lambda a, b: (a + b) * 2, 4),
    "sum": (lambda a, b: (a + b).sum(), 0),
    "views count once": (lambda a, b: (e := a.exp()).mT @ e.reshape(4, 8), 128),
    "mean of max": (lambda a, b: maximum(a + 1, b + 1).mean(), 256),
    "concat": (lambda a, b: concat([a + 1, b]), 0),
    "index": (lambda a, b: a[np.array([0, 1])], 16),  # the two int64 indices
}


@pytest.mark.parametrize("name", KEPT)
def test_saved_bytes(name):
    f, expected = KEPT[name]
    y = f(leaf(4, 8), leaf(4, 8, seed=1))
    assert saved_bytes(y) == expected
    y.backward(np.ones(y.shape))
    assert saved_bytes(y) == 0, "backward frees what it used"


def test_saved_bytes_of_an_mlp():
    """Inputs of every layer, log-probabilities, index arrays: the chapter's formula."""
    n, sizes = 32, [64, 128, 128, 10]
    model = MLP(sizes, np.random.default_rng(0))
    x, y = np.zeros((n, 64), np.float32), np.zeros(n, np.int64)
    loss = cross_entropy(model(Tensor(x)), y)
    assert saved_bytes(loss) == 4 * n * (64 + 128 + 128 + 10) + 2 * 8 * n
    with no_grad():
        assert saved_bytes(cross_entropy(model(Tensor(x)), y)) == 0


def test_what_backward_does_not_need_is_freed_at_once():
    x = leaf(4)
    middle = x + 1
    watched = weakref.ref(middle.data.base)
    y = middle + 1
    del middle
    gc.collect()
    assert watched() is None, "add keeps neither input nor output"
    assert y.requires_grad


def test_dtypes():
    assert Tensor([1, 2]).dtype == Tensor(3.0).dtype == Tensor(np.arange(3)).dtype == np.float32
    assert Tensor(np.float64(3)).dtype == Tensor(np.zeros(2)).dtype == np.float64
    x32, x64 = Tensor(np.zeros(2, np.float32)), Tensor(np.zeros(2))
    assert (x32 * np.float64(2)).dtype == (np.ones(2) * x32).dtype == np.float32, "a constant follows"
    assert (2 - x64).dtype == np.float64
    with pytest.raises(TypeError, match="float32, float64"):
        x32 + x64


def test_arrays_on_the_left():
    x = leaf(2, 2)
    a = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    for got, expected in [
        (a + x, a + x.data),
        (a - x, a - x.data),
        (a * x, a * x.data),
        (a / x, a / x.data),
        (a @ x, a @ x.data),
    ]:
        assert isinstance(got, Tensor)
        np.testing.assert_array_equal(got.data, expected)


def test_bad_data():
    with pytest.raises(TypeError, match=r"requires_grad=True needs floating-point data, got int64"):
        Tensor([1, 2], requires_grad=True)
    for bad in ("text", [None], object(), Tensor(1.0), [1j]):
        with pytest.raises(TypeError, match="real numbers"):
            Tensor(bad)


def test_data_cannot_be_changed_in_place():
    values = np.ones(3, np.float32)
    x = Tensor(values, requires_grad=True)
    with pytest.raises(TypeError, match="in place"):
        x[0] = 5.0
    with pytest.raises(ValueError, match="read-only"):
        x.data[0] = 5.0
    with pytest.raises(ValueError, match=r"expected shape \(3,\), got \(2,\)"):
        x.data = np.ones(2)
    values[0] = 2.0  # the caller's own array stays the caller's
    y = (x * x).sum()
    x.data = np.zeros(3)  # replacing is fine: the graph still holds the old values
    y.backward()
    assert x.grad.tolist() == [4, 2, 2]
    assert x.dtype == np.float32


def test_bad_backward():
    x = leaf(2, 3)
    with pytest.raises(RuntimeError, match=r"single-element tensor, got shape \(2, 3\).*\.sum\(\)"):
        (x * 2).backward()
    with pytest.raises(ValueError, match=r"gradient: expected shape \(2, 3\), got \(3,\)"):
        (x * 2).backward(np.ones(3))
    with pytest.raises(RuntimeError, match="does not require a gradient"):
        Tensor(1.0).backward()
    with no_grad():
        y = x.sum()
    with pytest.raises(RuntimeError, match=r"outside no_grad\(\)"):
        y.backward()
    assert x.grad is None


def test_bad_index():
    x = leaf(2, 3)
    with pytest.raises(IndexError):
        x[5]
    with pytest.raises(IndexError):
        x[Tensor([0.0])]
    assert [row.shape for row in x] == [(3,), (3,)], "iteration ends"


def test_repr_and_item():
    x = Tensor(2.0, requires_grad=True)
    assert repr(x) == "Tensor(2.0, requires_grad=True)"
    assert repr(x * 2) == "Tensor(4.0, requires_grad=True, op='mul')"
    assert (x * 2).item() == 4.0
