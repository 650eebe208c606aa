"""Tensors that remember how they were made, and the backward pass over that memory.

Every operation goes through ``apply``: it looks the operation up in the rule table, computes the
result, and, if a gradient will be wanted, records a ``Node``. The nodes form a graph without
cycles, and ``backward`` walks it from the result to the inputs.

What this file knows: graphs, order, memory. What it does not: any derivative (those are in rules.py).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np

from .rules import RULES, unbroadcast

__all__ = ["Node", "Tensor", "apply", "concat", "maximum", "no_grad", "saved_bytes", "topological_order", "where"]

_recording = True  # one switch for the whole process; torch keeps one a thread


@contextmanager
def no_grad() -> Iterator[None]:
    """Record no graph inside this block: what inference does. Also works as a decorator."""
    global _recording
    before, _recording = _recording, False
    try:
        yield
    finally:
        _recording = before  # not True: blocks may be nested


class Node:
    """What backward needs of one operation. It holds no Tensor but leaves, so that every array that
    no gradient function asked for is freed as soon as the forward pass has used it."""

    __slots__ = ("inputs", "op", "saved", "shapes")

    def __init__(self, op: str, inputs: list, shapes: list[tuple[int, ...]], saved: dict[str, Any]) -> None:
        self.op = op
        self.inputs = inputs  # for each input a Node, a leaf Tensor, or None (no gradient wanted)
        self.shapes = shapes  # for each input its shape
        self.saved: dict[str, Any] | None = saved  # name -> array or attribute; None once freed by backward

    def input_gradients(self, g: np.ndarray) -> Iterator[tuple["Node | Tensor", np.ndarray]]:
        """Yield (input, its gradient) for each input that wants one. ``g``: as the output."""
        rule = RULES[self.op]
        for i, target in enumerate(self.inputs):
            if target is None:
                continue
            k = min(i, len(rule.backward) - 1)
            values = {**(self.saved or {}), "shape": self.shapes[i], "shapes": self.shapes, "i": i}
            grad = rule.backward[k](g, **{name: values[name] for name in rule.needs[k]})
            yield target, unbroadcast(grad, self.shapes[i])  # shapes[i]


def topological_order(root: "Node | Tensor") -> list["Node | Tensor"]:
    """Everything that ``root`` depends on, each after all of its own inputs; ``root`` comes last.

    Depth first with a stack of its own: Python's recursion limit (1,000) would end a deep graph.
    """
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        node, inputs_done = stack.pop()
        if inputs_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))  # comes up again when everything above it is done
            if isinstance(node, Node):
                stack.extend((target, False) for target in node.inputs if target is not None)
    return order


def apply(op: str, *inputs: "Tensor", **attributes: Any) -> "Tensor":
    """Run operation ``op`` of the rule table on ``inputs`` and record it if a gradient is wanted.

    Raises: KeyError for an operation that the table lacks; TypeError if the inputs mix float32 and
    float64; ValueError if their shapes do not fit.
    """
    if op not in RULES:
        raise KeyError(f"op: expected one of {', '.join(RULES)}, got {op!r}")
    rule = RULES[op]
    arrays = [tensor.data for tensor in inputs]
    shapes = [array.shape for array in arrays]
    if len({array.dtype for array in arrays}) > 1:
        found = ", ".join(str(array.dtype) for array in arrays)
        raise TypeError(f"{op}: all inputs must have one dtype, got {found}; convert one with astype")
    try:
        out = rule.forward(*arrays, **attributes)
    except ValueError as error:
        found = " and ".join(str(shape) for shape in shapes)
        raise ValueError(f"{op}: inputs of shape {found} do not fit: {error}") from error
    result = Tensor(out)
    if not _recording or not any(tensor.requires_grad for tensor in inputs):
        return result
    targets = [(tensor.node or tensor) if tensor.requires_grad else None for tensor in inputs]
    # Keep what the gradient functions that will really run ask for, and nothing else.
    last = len(rule.needs) - 1
    needed = {n for i, t in enumerate(targets) if t is not None for n in rule.needs[min(i, last)]}
    values = {**dict(zip("ab", arrays, strict=False)), "out": result.data, **attributes}
    saved = {name: value for name, value in values.items() if name in needed}
    result.requires_grad, result.node = True, Node(op, targets, shapes, saved)
    return result


def saved_bytes(tensor: "Tensor") -> int:
    """Bytes of the arrays that the graph behind ``tensor`` keeps for backward.

    Parameters (leaves that require a gradient) are not counted: inference holds them too. An array
    that several nodes keep, or keep as views, counts once.
    """

    def buffer(array: np.ndarray) -> int:
        while isinstance(array.base, np.ndarray):  # a view's base owns the memory
            array = array.base
        return id(array)

    nodes = topological_order(tensor.node or tensor)
    leaves = {buffer(leaf.data) for leaf in nodes if isinstance(leaf, Tensor)}
    kept: dict[int, int] = {}  # buffer -> bytes of the largest view of it
    for node in nodes:
        for value in (node.saved or {}).values() if isinstance(node, Node) else ():
            for array in value if isinstance(value, tuple) else (value,):  # an index can be a tuple
                if isinstance(array, np.ndarray) and (key := buffer(array)) not in leaves:
                    kept[key] = max(kept.get(key, 0), array.nbytes)
    return sum(kept.values())


def _elementwise(op: str, what: str) -> Callable[["Tensor"], "Tensor"]:
    """A Tensor method that runs the one-input operation ``op``."""

    def method(self: "Tensor") -> "Tensor":
        return apply(op, self)

    method.__doc__ = f"{what}, element by element; the shape stays."
    return method


class Tensor:
    """A NumPy array of floats that can be differentiated through.

    Args:
        data: array or (nested) list of numbers, any shape. float64 arrays stay float64, everything
            else becomes float32. It is not copied if it need not be.
        requires_grad: collect the gradient with respect to this tensor in ``.grad`` (a NumPy array
            of the same shape and dtype, None until ``backward`` has run).

    ``.data`` is read-only: the graph may hold the same array for backward, and a change in place
    would make gradients silently wrong. Assign a whole new array instead, as optimizers do.
    """

    __slots__ = ("_data", "grad", "node", "requires_grad")
    __array_ufunc__ = None  # makes `array + tensor` call Tensor.__radd__, not NumPy's element loop

    def __init__(self, data: Any, requires_grad: bool = False) -> None:
        array = np.asarray(data)
        if array.dtype.kind not in "fiub":
            raise TypeError(f"data must be an array or list of real numbers, got {type(data).__name__}")
        if requires_grad and array.dtype.kind != "f":
            raise TypeError(
                f"requires_grad=True needs floating-point data, got {array.dtype}: a whole number is "
                "an index or a label and has no gradient; write 1.0 for 1, or convert with astype"
            )
        keep = isinstance(data, np.ndarray | np.generic) and array.dtype == np.float64
        self._data = _frozen(array.astype(np.float64 if keep else np.float32, copy=False))
        self.requires_grad = requires_grad
        self.grad: np.ndarray | None = None
        self.node: Node | None = None  # None for a leaf

    @property
    def data(self) -> np.ndarray:
        """The values, read-only. Assigning replaces them: same shape required."""
        return self._data

    @data.setter
    def data(self, new: np.ndarray) -> None:
        if np.shape(new) != self.shape:
            raise ValueError(f"data: expected shape {self.shape}, got {np.shape(new)}")
        self._data = _frozen(np.asarray(new, self.dtype))

    shape = property(lambda self: self._data.shape)
    dtype = property(lambda self: self._data.dtype)
    ndim = property(lambda self: self._data.ndim)

    def backward(self, gradient: np.ndarray | None = None, retain_graph: bool = False) -> None:
        """Add d(self)/d(leaf) to ``leaf.grad`` for every leaf that requires a gradient.

        Args:
            gradient: dL/d(self), shape of self. None means 1 and needs a single-element self.
            retain_graph: keep what the graph saved, so that backward can run again.
        Raises:
            RuntimeError: nothing here requires a gradient, no ``gradient`` for a non-scalar, or the
                graph was freed by an earlier backward. ValueError: ``gradient`` of another shape.
        """
        seed = self._seed(gradient)
        order = topological_order(self.node or self)
        if any(isinstance(node, Node) and node.saved is None for node in order):
            raise RuntimeError(
                "this graph was freed by an earlier backward(); run the forward pass again, or call "
                "backward(retain_graph=True) the first time"
            )
        grads = {order[-1]: seed}
        # From the result to the leaves: a node comes up when all its users have added their share.
        for node in reversed(order):
            g = grads.pop(node)
            if isinstance(node, Tensor):  # a leaf; copied, as two leaves may be given one array
                node.grad = np.array(g if node.grad is None else node.grad + g)
                continue
            for target, grad in node.input_gradients(g):
                # Not `+=`: the array may be another node's gradient too (add passes on its own g).
                grads[target] = grads[target] + grad if target in grads else grad
            if not retain_graph:
                node.saved = None  # memory falls while backward runs

    def _seed(self, gradient: np.ndarray | None) -> np.ndarray:
        """Check backward's arguments and return the gradient to start from, (*self.shape)."""
        if not self.requires_grad:
            raise RuntimeError(
                "backward() on a tensor that does not require a gradient: set requires_grad=True on "
                "a leaf and run the forward pass outside no_grad()"
            )
        if gradient is None:
            if self._data.size != 1:
                raise RuntimeError(
                    f"backward() without a gradient needs a single-element tensor, got shape "
                    f"{self.shape}: reduce it (for example .sum()) or pass gradient"
                )
            return np.ones_like(self._data)
        gradient = np.asarray(gradient, self.dtype)
        if gradient.shape != self.shape:
            raise ValueError(f"gradient: expected shape {self.shape}, got {gradient.shape}")
        return gradient

    def detach(self) -> "Tensor":
        """The same values, cut off from the graph."""
        return Tensor(self._data)

    def zero_grad(self) -> None:
        """Forget the collected gradient. Without this, backward adds to the old one."""
        self.grad = None

    def item(self) -> float:
        """The value of a single-element tensor as a Python float."""
        return self._data.item()

    def __repr__(self) -> str:
        made_by = f", op={self.node.op!r}" if self.node else ""
        return f"Tensor({self._data}, requires_grad={self.requires_grad}{made_by})"

    def __setitem__(self, index: Any, value: Any) -> NoReturn:
        raise TypeError("tensors cannot be changed in place; build a new one with where() or concat()")

    def _constant(self, other: Any) -> "Tensor":
        """``other`` as a Tensor; a bare number or array takes this tensor's dtype."""
        return other if isinstance(other, Tensor) else Tensor(np.asarray(other, self.dtype))

    # fmt: off
    # `other` is a Tensor, a number or an array.
    def __add__(self, other: Any) -> "Tensor": return apply("add", self, self._constant(other))
    def __sub__(self, other: Any) -> "Tensor": return apply("sub", self, self._constant(other))
    def __mul__(self, other: Any) -> "Tensor": return apply("mul", self, self._constant(other))
    def __truediv__(self, other: Any) -> "Tensor": return apply("div", self, self._constant(other))
    def __matmul__(self, other: Any) -> "Tensor": return apply("matmul", self, self._constant(other))
    def __radd__(self, other: Any) -> "Tensor": return apply("add", self._constant(other), self)
    def __rsub__(self, other: Any) -> "Tensor": return apply("sub", self._constant(other), self)
    def __rmul__(self, other: Any) -> "Tensor": return apply("mul", self._constant(other), self)
    def __rtruediv__(self, other: Any) -> "Tensor": return apply("div", self._constant(other), self)
    def __rmatmul__(self, other: Any) -> "Tensor": return apply("matmul", self._constant(other), self)
    def __pow__(self, exponent: float) -> "Tensor": return apply("pow", self, exponent=float(exponent))
    def __neg__(self) -> "Tensor": return apply("neg", self)
    def __getitem__(self, index: Any) -> "Tensor": return apply("index", self, index=index)
    # fmt: on

    exp = _elementwise("exp", "eˣ")
    log = _elementwise("log", "The natural logarithm")
    tanh = _elementwise("tanh", "The hyperbolic tangent")
    sigmoid = _elementwise("sigmoid", "1 / (1 + e⁻ˣ)")
    relu = _elementwise("relu", "max(x, 0)")
    silu = _elementwise("silu", "x · sigmoid(x), the nonlinearity of Llama's MLP")

    def sum(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> "Tensor":
        """The sum over ``axis`` (None: over all), which goes away or, with ``keepdims``, becomes 1."""
        return apply("sum", self, axis=axis, keepdims=keepdims)

    def mean(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> "Tensor":
        """The mean over ``axis``; shapes as in ``sum``."""
        return apply("mean", self, axis=axis, keepdims=keepdims)

    def max(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> "Tensor":
        """The maximum over ``axis``; shapes as in ``sum``. Equal maxima share the gradient."""
        return apply("max", self, axis=axis, keepdims=keepdims)

    def log_softmax(self, axis: int = -1) -> "Tensor":
        """log(softmax) along ``axis``, without overflow; the shape stays."""
        return apply("log_softmax", self, axis=axis)

    def reshape(self, *shape: int) -> "Tensor":
        """The same elements in another shape; one size may be -1."""
        return apply("reshape", self, new_shape=shape)

    def transpose(self, *axes: int) -> "Tensor":
        """The axes in the given order, e.g. x.transpose(1, 0); all of them must be named."""
        return apply("transpose", self, axes=tuple(axis % self.ndim for axis in axes))

    @property
    def mT(self) -> "Tensor":
        """The matrices transposed: the last two axes swapped, (..., M, N) -> (..., N, M)."""
        return self.transpose(*range(self.ndim - 2), -1, -2)


def concat(tensors: list[Tensor], axis: int = 0) -> Tensor:
    """Join tensors along ``axis``; their other axes must agree."""
    return apply("concat", *tensors, axis=axis)


def where(condition: np.ndarray, a: Tensor, b: Tensor) -> Tensor:
    """``a`` where the boolean array ``condition`` holds, else ``b``; all three broadcast."""
    return apply("where", a, b, condition=np.asarray(condition, bool))


def maximum(a: Tensor, b: Tensor) -> Tensor:
    """The larger of two tensors, element by element; on a tie each gets half of the gradient."""
    return apply("maximum", a, b)


def _frozen(array: np.ndarray) -> np.ndarray:
    """A read-only view; the array behind it stays as it was."""
    view = array.view()
    view.setflags(write=False)
    return view
