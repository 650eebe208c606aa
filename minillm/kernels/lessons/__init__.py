"""Kernels that a chapter builds and the engine has no use for: its own softmaxes ride along in attention and in draws.

All others in `kernels` run whenever a model does on a GPU.
"""

from .softmax import softmax

__all__ = ["softmax"]
