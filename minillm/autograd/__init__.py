"""Reverse-mode automatic differentiation on NumPy, small enough to read in one sitting.

Read ``rules.py`` (the calculus), then ``tensor.py`` (the graph), then ``nn.py`` and ``optim.py``.
Nothing here imports anything but NumPy and the standard library, and nothing else in minillm imports
this: the rest of the package runs on torch, whose autograd works the same way.
"""

from . import nn, optim
from .rules import RULES, unbroadcast
from .tensor import (
    Tensor,
    apply,
    concat,
    maximum,
    no_grad,
    saved_bytes,
    topological_order,
    where,
)

__all__ = [
    "RULES",
    "Tensor",
    "apply",
    "concat",
    "maximum",
    "nn",
    "no_grad",
    "optim",
    "saved_bytes",
    "topological_order",
    "unbroadcast",
    "where",
]
