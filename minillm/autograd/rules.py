"""The rule table: for every operation, how to compute it and how to differentiate it.

The table is all the calculus that this package knows. An entry is a forward function and one
gradient function for each input. A gradient function receives ``g``, the gradient of the loss with
respect to the operation's output (same shape as the output), and returns the gradient with respect
to that input: a vector-Jacobian product, never the Jacobian itself.

**The argument names are the memory bill.** A gradient function asks for what it needs by name, and
the engine keeps from the forward pass what some gradient function asked for, and nothing else:

    a, b        the input arrays          out      the output array
    shape       this input's shape        shapes   the shapes of all inputs
    i           this input's position     axis, keepdims, exponent, ...   the operation's attributes

So ``add`` keeps nothing, ``exp`` keeps its output, ``mul`` keeps each input whose *partner* needs a
gradient. Broadcasting is absent from the table: the engine passes every result through
``unbroadcast``, once, for all operations.

Sources: Rumelhart, Hinton and Williams 1986 (the method); Baydin et al. 2018, JMLR 18(153) (reverse
mode among the kinds of automatic differentiation); Griewank and Walther 2008 (the cost theorems).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

__all__ = ["RULES", "Rule", "rule", "unbroadcast"]

Axis = int | tuple[int, ...] | None


class Rule(NamedTuple):
    """One operation: ``forward(*arrays, **attributes) -> array`` and a gradient for each input."""

    forward: Callable[..., np.ndarray]
    backward: tuple[Callable[..., np.ndarray], ...]  # the last one serves all further inputs
    needs: tuple[tuple[str, ...], ...]  # beside ``g``, the argument names of each gradient function


def rule(forward: Callable, *backward: Callable) -> Rule:
    """Build a ``Rule``, reading what each gradient function needs from its signature."""
    codes = [gradient.__code__ for gradient in backward]
    needs = tuple(code.co_varnames[1 : code.co_argcount] for code in codes)  # argument 0 is g
    return Rule(forward, backward, needs)


def unbroadcast(g: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sum ``g`` down to ``shape``: the backward of NumPy's broadcasting.

    An input element that was repeated n times took part in n outputs, so its gradient is the sum of
    n gradients. Broadcasting repeats along axes put in front and along axes of size 1; those are
    the axes to sum over.
    """
    extra = g.ndim - len(shape)  # axes that broadcasting put in front
    repeated = [extra + i for i, n in enumerate(shape) if n == 1 and g.shape[extra + i] != 1]
    axes = (*range(extra), *repeated)
    return g.sum(axis=axes, keepdims=True).reshape(shape) if axes else g  # (*shape)


def _matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(..., M, K) @ (..., K, N) -> (..., M, N); the leading axes broadcast."""
    if min(a.ndim, b.ndim) < 2:
        raise ValueError("matmul needs at least two axes on each side; reshape a vector to (1, K)")
    return a @ b  # (..., M, N)


def _matmul_grad_b(g: np.ndarray, a: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """db = aᵀ g. If b is one matrix for a whole batch, its batch sum happens inside one matmul."""
    if len(shape) == 2:
        a, g = a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])  # (batch*M, K), (batch*M, N)
    return a.mT @ g  # (..., K, N)


def _unreduce(g: np.ndarray, shape: tuple[int, ...], axis: Axis, keepdims: bool) -> np.ndarray:
    """Undo a reduction's shape change: put the reduced axes back, then repeat along them."""
    if axis is not None and not keepdims:
        g = np.expand_dims(g, axis)  # size 1 where an axis was reduced away
    return np.broadcast_to(g, shape)  # (*shape), a view: nothing is copied


def _max_grad(
    g: np.ndarray, a: np.ndarray, out: np.ndarray, shape: tuple[int, ...], axis: Axis, keepdims: bool
) -> np.ndarray:
    """The gradient goes to the maximum; equal maxima share it, which is what torch.amax does."""
    winners = a == _unreduce(out, shape, axis, keepdims)  # (*shape) bool
    share = winners.sum(axis=axis, keepdims=True, dtype=g.dtype)  # how many share one output
    return _unreduce(g, shape, axis, keepdims) * winners / share  # (*shape)


def _maximum_grad(g: np.ndarray, mine: np.ndarray, other: np.ndarray) -> np.ndarray:
    """g where ``mine`` won, half of it on a tie (torch's convention), else 0."""
    return g * (mine > other) + g / 2 * (mine == other)


def _index_grad(g: np.ndarray, shape: tuple[int, ...], index: Any) -> np.ndarray:
    """Scatter-add. ``grad[index] += g`` would drop all but one of several gradients for one row."""
    grad = np.zeros(shape, g.dtype)
    np.add.at(grad, index, g)
    return grad  # (*shape)


def _concat_grad(g: np.ndarray, shapes: list[tuple[int, ...]], i: int, axis: int) -> np.ndarray:
    """Cut out of ``g`` the piece that came from input i."""
    start = sum(shape[axis] for shape in shapes[:i])
    before = (slice(None),) * (axis % g.ndim)
    return g[*before, start : start + shapes[i][axis]]  # shapes[i]


def _pow_grad(g: np.ndarray, a: np.ndarray, exponent: float) -> np.ndarray:
    """d(aⁿ) = n aⁿ⁻¹. At n = 0 the formula would make 0 · inf at a = 0."""
    return g * exponent * a ** (exponent - 1) if exponent else np.zeros_like(g)


def _sigmoid(a: np.ndarray) -> np.ndarray:
    """1 / (1 + e⁻ᵃ) as exp(-log(1 + e⁻ᵃ)): no overflow, and exact for very negative a too."""
    return np.exp(-np.logaddexp(0, -a))


def _silu_grad(g: np.ndarray, a: np.ndarray) -> np.ndarray:
    """With s = sigmoid(a): d(a s) = s + a s (1 - s). s is computed again instead of kept."""
    s = _sigmoid(a)
    return g * s * (1 + a * (1 - s))


def _log_softmax(a: np.ndarray, axis: int) -> np.ndarray:
    """a - log Σ exp(a), with the maximum taken out first so that exp never overflows."""
    shifted = a - a.max(axis=axis, keepdims=True)  # largest value 0
    return shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))


# Read a line as: "name": rule(forward, gradient for a, gradient for b)
RULES: dict[str, Rule] = {
    # Arithmetic on two inputs; the shapes broadcast.
    "add": rule(np.add, lambda g: g, lambda g: g),
    "sub": rule(np.subtract, lambda g: g, lambda g: -g),
    "mul": rule(np.multiply, lambda g, b: g * b, lambda g, a: g * a),
    "div": rule(np.divide, lambda g, b: g / b, lambda g, b, out: -g * out / b),  # d(a/b)/db = -a/b²
    "maximum": rule(np.maximum, lambda g, a, b: _maximum_grad(g, a, b), lambda g, a, b: _maximum_grad(g, b, a)),
    "where": rule(  # the condition is an attribute, not an input: it has no gradient
        lambda a, b, condition: np.where(condition, a, b),
        lambda g, condition: g * condition,
        lambda g, condition: g * ~condition,
    ),
    "matmul": rule(_matmul, lambda g, b: g @ b.mT, _matmul_grad_b),  # da = g bᵀ, db = aᵀ g
    # One input, element by element. Where the derivative can be had from the output, keep that:
    # the next operation often keeps the same array, and it is stored once.
    "neg": rule(np.negative, lambda g: -g),
    "pow": rule(lambda a, exponent: a**exponent, _pow_grad),
    "exp": rule(np.exp, lambda g, out: g * out),  # (eᵃ)' = eᵃ
    "log": rule(np.log, lambda g, a: g / a),
    "tanh": rule(np.tanh, lambda g, out: g * (1 - out * out)),
    "sigmoid": rule(_sigmoid, lambda g, out: g * out * (1 - out)),
    "relu": rule(lambda a: np.maximum(a, 0), lambda g, out: g * (out > 0)),  # 0 at the kink
    "silu": rule(lambda a: a * _sigmoid(a), _silu_grad),
    # Reductions over `axis` (None: all axes).
    "sum": rule(np.sum, _unreduce),
    "mean": rule(
        np.mean,
        lambda g, shape, axis, keepdims: _unreduce(g * (g.size / max(1, math.prod(shape))), shape, axis, keepdims),
    ),
    "max": rule(np.max, _max_grad),
    # out = a - log Σ eᵃ, so ∂outⱼ/∂aᵢ = [i = j] - softmaxᵢ, and softmax = exp(out).
    "log_softmax": rule(_log_softmax, lambda g, out, axis: g - np.exp(out) * g.sum(axis=axis, keepdims=True)),
    # Moving elements: the gradient moves back the way the values came.
    "reshape": rule(lambda a, new_shape: a.reshape(new_shape), lambda g, shape: g.reshape(shape)),
    "transpose": rule(lambda a, axes: a.transpose(axes), lambda g, axes: g.transpose(np.argsort(axes))),
    "index": rule(lambda a, index: a[index], _index_grad),  # with integer arrays: embedding lookup
    "concat": rule(lambda *arrays, axis: np.concatenate(arrays, axis), _concat_grad),
}
