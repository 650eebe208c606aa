"""Layers: parameters and the function that uses them, no more.

Names and layouts are PyTorch's (``weight`` is (out, in), ``state_dict`` keys are dotted paths), so
that weights move between the two by name.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from .tensor import Tensor

__all__ = ["MLP", "Linear", "Module", "ReLU", "Sequential", "cross_entropy"]


class Module:
    """Finds parameters among its attributes: Tensors that require a gradient, other Modules, and
    lists or tuples of these. Subclasses define ``__call__``."""

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} defines no __call__")

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Yield (dotted name, parameter) in the order in which the attributes were set."""
        yield from _named_parameters(vars(self), prefix)

    def parameters(self) -> list[Tensor]:
        """All parameters, in a stable order."""
        return [parameter for _, parameter in self.named_parameters()]

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters."""
        for parameter in self.parameters():
            parameter.zero_grad()

    def state_dict(self) -> dict[str, np.ndarray]:
        """Name -> a copy of each parameter's values."""
        return {name: parameter.data.copy() for name, parameter in self.named_parameters()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Replace all parameters by ``state``. Changes nothing unless everything fits.

        Raises: KeyError for missing or surplus names, ValueError for a wrong shape.
        """
        own = dict(self.named_parameters())
        if missing := own.keys() - state.keys():
            raise KeyError(f"state: missing {sorted(missing)}")
        if surplus := state.keys() - own.keys():
            raise KeyError(f"state: {sorted(surplus)} are not parameters of this {type(self).__name__}")
        for name, parameter in own.items():
            if np.shape(state[name]) != parameter.shape:
                found = np.shape(state[name])
                raise ValueError(f"state[{name!r}]: expected shape {parameter.shape}, got {found}")
        for name, parameter in own.items():
            parameter.data = np.array(state[name])


def _named_parameters(attributes: dict, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in attributes.items():
        if isinstance(value, Tensor) and value.requires_grad:
            yield prefix + name, value
        elif isinstance(value, Module):
            yield from value.named_parameters(f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            items = {str(i): item for i, item in enumerate(value)}
            yield from _named_parameters(items, f"{prefix}{name}.")


class Linear(Module):
    """y = x Wᵀ + b for x (..., in_features), W (out_features, in_features), b (out_features,).

    W starts normal with variance 2 / in_features, which keeps the size of activations steady from
    one ReLU layer to the next (He et al. 2015, ICCV); b starts at 0.
    """

    def __init__(self, in_features: int, out_features: int, rng: np.random.Generator, bias: bool = True):
        weight = rng.standard_normal((out_features, in_features), np.float32)
        self.weight = Tensor(weight * np.float32((2 / in_features) ** 0.5), requires_grad=True)
        self.bias = Tensor(np.zeros(out_features, np.float32), requires_grad=True) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        y = x @ self.weight.mT  # (..., in) @ (in, out) -> (..., out)
        return y if self.bias is None else y + self.bias


class ReLU(Module):
    """max(x, 0), element by element."""

    def __call__(self, x: Tensor) -> Tensor:
        return x.relu()


class Sequential(Module):
    """Layers one after the other."""

    def __init__(self, *layers: Module):
        self.layers = layers

    def __call__(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class MLP(Sequential):
    """Linear layers of the given ``sizes`` (input, hidden ..., output) with a ReLU between each two."""

    def __init__(self, sizes: list[int], rng: np.random.Generator):
        layers: list[Module] = []
        for n_in, n_out in pairwise(sizes):
            layers += [Linear(n_in, n_out, rng), ReLU()]
        super().__init__(*layers[:-1])  # no ReLU after the last Linear: its outputs are the logits


def cross_entropy(logits: Tensor, targets: np.ndarray) -> Tensor:
    """Mean of -log softmax(logits)[target] over the batch; a scalar.

    Args:
        logits: (N, C). targets: (N,) integers in [0, C).
    Its gradient is (softmax(logits) - onehot(targets)) / N: what was believed minus what was true.
    Raises: ValueError for other shapes, dtypes or class numbers.
    """
    targets = np.asarray(targets)
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or targets.dtype.kind not in "iu":
        raise ValueError(
            "cross_entropy: expected logits (N, C) and integer targets (N,), got "
            f"{logits.shape} and {targets.dtype} {targets.shape}"
        )
    n, classes = logits.shape
    if n == 0 or targets.min() < 0 or targets.max() >= classes:
        raise ValueError(f"targets: expected at least one, all in [0, {classes})")
    return -logits.log_softmax()[np.arange(n), targets].mean()  # (N, C) -> (N,) -> ()
