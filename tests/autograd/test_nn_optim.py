"""Layers and optimizers against torch, step by step."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.autograd import Tensor
from minillm.autograd.nn import MLP, Linear, Module, ReLU, Sequential, cross_entropy
from minillm.autograd.optim import SGD, AdamW


def twins(sizes, seed=0):
    """Our MLP and torch's with the same float64 weights."""
    ours = MLP(sizes, np.random.default_rng(seed))
    layers = []
    for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        layers += [torch.nn.ReLU()] * (i > 0) + [torch.nn.Linear(n_in, n_out)]
    theirs = torch.nn.Sequential(*layers)
    theirs.load_state_dict({k.removeprefix("layers."): torch.tensor(v) for k, v in ours.state_dict().items()})
    return ours, theirs


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda p: SGD(p, 0.1), lambda p: torch.optim.SGD(p, 0.1)),
        (lambda p: SGD(p, 0.05, momentum=0.9), lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)),
        (lambda p: AdamW(p, 0.01), lambda p: torch.optim.AdamW(p, 0.01)),
        (
            lambda p: AdamW(p, 0.02, (0.8, 0.95), 1e-6, 0.3),
            lambda p: torch.optim.AdamW(p, 0.02, (0.8, 0.95), 1e-6, 0.3),
        ),
    ],
    ids=["sgd", "momentum", "adamw", "adamw, all arguments"],
)
def test_optimizers_follow_torch_step_by_step(ours, theirs):
    rng = np.random.default_rng(0)
    target = rng.standard_normal((4, 3))
    start = rng.standard_normal((4, 3))
    x, t = Tensor(start, requires_grad=True), torch.tensor(start, requires_grad=True)
    mine, other = ours([x]), theirs([t])
    for _ in range(30):
        mine.zero_grad()
        other.zero_grad()
        (((x - target) ** 2) * np.arange(1, 4.0)).sum().backward()
        (((t - torch.tensor(target)) ** 2) * torch.arange(1, 4)).sum().backward()
        mine.step()
        other.step()
        np.testing.assert_allclose(x.data, t.detach().numpy(), rtol=1e-10)


def test_training_follows_torch():
    """Ten steps of an MLP, float32: same losses, same weights."""
    ours, theirs = twins([8, 16, 12, 5])
    rng = np.random.default_rng(1)
    mine = AdamW(ours.parameters(), 1e-2)
    other = torch.optim.AdamW(theirs.parameters(), 1e-2)
    for _ in range(10):
        x, y = rng.standard_normal((20, 8), np.float32), rng.integers(0, 5, 20)
        loss, reference = (
            cross_entropy(ours(Tensor(x)), y),
            torch.nn.functional.cross_entropy(theirs(torch.tensor(x)), torch.tensor(y)),
        )
        assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
        mine.zero_grad()
        other.zero_grad()
        loss.backward()
        reference.backward()
        mine.step()
        other.step()
    for p, t in zip(ours.parameters(), theirs.parameters(), strict=True):
        np.testing.assert_allclose(p.data, t.detach().numpy(), atol=1e-5)


def test_optimizer_skips_what_has_no_gradient():
    x, unused = Tensor([1.0], requires_grad=True), Tensor([1.0], requires_grad=True)
    optimizer = AdamW([x, unused], weight_decay=0.5)
    x.sum().backward()
    optimizer.step()
    assert unused.data.tolist() == [1]
    assert x.data[0] < 1
    optimizer.zero_grad()
    assert x.grad is None
    assert x.dtype == np.float32


def test_bad_optimizer_arguments():
    x = Tensor([1.0], requires_grad=True)
    with pytest.raises(ValueError, match="parameters"):
        SGD([], 0.1)
    with pytest.raises(ValueError, match="parameters"):
        SGD([Tensor([1.0])], 0.1)
    for lr in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="lr: expected a number above 0"):
            SGD([x], lr)
    with pytest.raises(ValueError, match="momentum"):
        SGD([x], 0.1, momentum=1.0)
    with pytest.raises(ValueError, match="betas"):
        AdamW([x], betas=(0.9, 1.0))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 6),
    classes=st.integers(1, 7),
    scale=st.sampled_from([1e-3, 1.0, 50.0, 1e4, 1e30]),
    seed=st.integers(0, 2**31),
)
def test_cross_entropy_equals_torch_on_extreme_logits(n, classes, scale, seed):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((n, classes)) * scale).astype(np.float32)
    targets = rng.integers(0, classes, n)
    x, t = Tensor(logits, requires_grad=True), torch.tensor(logits, requires_grad=True)
    loss = cross_entropy(x, targets)
    reference = torch.nn.functional.cross_entropy(t, torch.tensor(targets))
    loss.backward()
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(x.grad, t.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_cross_entropy_gradient_is_belief_minus_truth():
    x = Tensor(np.zeros((2, 4)), requires_grad=True)
    cross_entropy(x, [1, 3]).backward()
    np.testing.assert_allclose(x.grad, [[0.125, -0.375, 0.125, 0.125], [0.125, 0.125, 0.125, -0.375]])


def test_cross_entropy_bad_input():
    x = Tensor(np.zeros((2, 4)))
    for logits, targets in [(x, [1.0, 2.0]), (x, [1]), (x, [[1], [2]]), (Tensor(np.zeros(4)), 1), (x, [True, False])]:
        with pytest.raises(ValueError, match=r"logits \(N, C\) and integer targets \(N,\)"):
            cross_entropy(logits, targets)
    for targets in ([0, 4], [-1, 0]):
        with pytest.raises(ValueError, match=r"all in \[0, 4\)"):
            cross_entropy(x, targets)
    with pytest.raises(ValueError, match="at least one"):
        cross_entropy(Tensor(np.zeros((0, 4))), np.zeros(0, int))


def test_linear_equals_torch_for_any_leading_axes():
    layer = Linear(3, 5, np.random.default_rng(0))
    reference = torch.nn.Linear(3, 5)
    layer.bias.data = np.arange(5.0)
    reference.load_state_dict({k: torch.tensor(v) for k, v in layer.state_dict().items()})
    x = np.random.default_rng(1).standard_normal((2, 4, 3), np.float32)
    mine, other = Tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    y, t = layer(mine), reference(other)
    np.testing.assert_allclose(y.data, t.detach().numpy(), rtol=1e-5, atol=1e-6)
    g = np.random.default_rng(2).standard_normal(y.shape, np.float32)
    y.backward(g)
    t.backward(torch.tensor(g))
    np.testing.assert_allclose(mine.grad, other.grad.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer.weight.grad, reference.weight.grad.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer.bias.grad, reference.bias.grad.numpy(), rtol=1e-5, atol=1e-5)
    assert Linear(3, 5, np.random.default_rng(0), bias=False).bias is None


def test_linear_keeps_the_size_of_activations():
    """He initialization: after ten ReLU layers the mean square is still of order 1."""
    rng = np.random.default_rng(0)
    layers = [layer for _ in range(10) for layer in (Linear(256, 256, rng), ReLU())]
    y = Sequential(*layers)(Tensor(rng.standard_normal((64, 256), np.float32))).data
    assert 0.2 < (y**2).mean() < 5


def test_module_finds_parameters_by_dotted_names():
    rng = np.random.default_rng(0)

    class Net(Module):
        def __init__(self):
            self.blocks = [Linear(2, 2, rng), {"not": "searched"}, (Linear(2, 2, rng, bias=False),)]
            self.constant = Tensor([1.0])
            self.scale = Tensor([1.0], requires_grad=True)
            self.mlp = MLP([2, 3, 2], rng)

    net = Net()
    names = [name for name, _ in net.named_parameters()]
    assert names == [
        "blocks.0.weight",
        "blocks.0.bias",
        "blocks.2.0.weight",
        "scale",
        "mlp.layers.0.weight",
        "mlp.layers.0.bias",
        "mlp.layers.2.weight",
        "mlp.layers.2.bias",
    ]
    assert len(net.parameters()) == 8
    net.scale.sum().backward()
    net.zero_grad()
    assert net.scale.grad is None


def test_state_dict_round_trip_and_errors():
    a, b = (MLP([3, 4, 2], np.random.default_rng(seed)) for seed in (0, 1))
    state = a.state_dict()
    state["layers.0.bias"] += 1  # a copy: the model is untouched
    assert not a.layers[0].bias.data.any()
    b.load_state_dict(state)
    np.testing.assert_array_equal(b.layers[0].bias.data, 1)
    np.testing.assert_array_equal(b.layers[2].weight.data, a.layers[2].weight.data)
    before = b.state_dict()
    with pytest.raises(KeyError, match=r"missing \['layers.2.bias'\]"):
        b.load_state_dict({k: v for k, v in state.items() if k != "layers.2.bias"})
    with pytest.raises(KeyError, match=r"'extra'\] are not parameters of this MLP"):
        b.load_state_dict({**state, "extra": np.ones(1)})
    with pytest.raises(ValueError, match=r"'layers.2.bias'\]: expected shape \(2,\), got \(3,\)"):
        b.load_state_dict({**state, "layers.0.bias": np.zeros(4), "layers.2.bias": np.ones(3)})
    for name, value in b.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
