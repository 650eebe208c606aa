"""A linear layer: what the model asks of it (`Linear`), and the one whose weights are plain matrices (`Dense`).

Whether a layer's weights are quantized, adapted or sharded is its own affair: it names the tensors that it reads from a
checkpoint, loads them, and multiplies. Neither the model nor whoever loads, saves or serves it asks which kind it is.

What reads one input is one layer: queries, keys and values are a single product, and so are an MLP's gate and up. Their
rows lie one after another; `parts` says whose they are.
"""

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..kernels import linear, norm_linear, swiglu

if TYPE_CHECKING:
    from .layers import Batch, RMSNorm

__all__ = ["Dense", "Linear", "LinearFactory", "dense"]


class Linear(nn.Module):
    """f(x W^T + b): the contract. It holds no weight; a subclass has `forward`, `wanted`, `load` and `tensors`.

    - in_features: the length of an input.
    - parts: whose rows W has, in order, and how many: {"q_proj": 576, "k_proj": 192, "v_proj": 192}, or {"o_proj": 576}
      where nothing is merged. In a checkpoint each part is a matrix of its own.
    """

    def __init__(self, in_features: int, parts: dict[str, int]) -> None:
        super().__init__()
        self.in_features, self.parts = in_features, dict(parts)

    @property
    def out_features(self) -> int:
        """Rows of all parts together."""
        return sum(self.parts.values())

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        """What a config.json says of how the weight is stored; None: as it is."""
        return None

    def wanted(self) -> dict[str, torch.Size]:
        """The tensors that `load` takes from a checkpoint and their shapes, by names such as "q_proj.weight"."""
        raise NotImplementedError

    def load(self, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
        """Take the `wanted` tensors, whose names and shapes have been checked; compute in `dtype` on `device`.

        `tensors` are mapped from a file, which is read as they are looked at. Raises ValueError that names the tensor
        for a dtype which cannot be used.
        """
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """What `load` takes, by the same names: what is written to a checkpoint."""
        raise NotImplementedError

    def forward(self, x: Tensor, batch: "Batch | None" = None) -> Tensor:
        """[..., in_features] -> [..., out_features]. `batch` is for layers that treat its rows differently."""
        raise NotImplementedError

    def add_norm(
        self, norm: "RMSNorm", branch: Tensor, stream: Tensor | None, batch: "Batch | None" = None,
        use_swiglu: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What a decoder layer wants around a product: (f(norm(branch + stream) W^T + b), branch + stream).

        f is SwiGLU over the halves of the result, or nothing; without a stream branch is the sum. A subclass whose
        kernel can do more than the product overrides this.
        """
        normed, stream = norm.add(branch, stream)
        y = self(normed, batch)
        return (swiglu(y) if use_swiglu else y), stream

    def tie(self, embedding: nn.Embedding) -> bool:
        """Be the head of a model whose head is its embedding [vocab, hidden] -> whether they now share the tensor.

        If not, `load` gets the embedding as if it were the head's.
        """
        return False


# (name in the model, such as "layers.0.self_attn.qkv_proj"; in_features; parts; whether it has a bias) -> the layer
LinearFactory = Callable[[str, int, dict[str, int], bool], Linear]


class Dense(Linear):
    """x W^T + b with W [out, in] as it is. One token on a GPU takes one kernel for norm, product and what is around."""

    def __init__(self, in_features: int, parts: dict[str, int], bias: bool = False) -> None:
        super().__init__(in_features, parts)
        self.weight: Tensor = nn.Parameter(torch.empty(self.out_features, in_features))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.bias: Tensor | None = nn.Parameter(torch.zeros(self.out_features)) if bias else None

    def wanted(self) -> dict[str, torch.Size]:
        """A weight and, if there are biases, a bias for each part."""
        shapes = {}
        for part, rows in self.parts.items():
            shapes[f"{part}.weight"] = torch.Size((rows, self.in_features))
            if self.bias is not None:
                shapes[f"{part}.bias"] = torch.Size((rows,))
        return shapes

    def load(self, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
        """Where device and dtype are right, a part that needs no merging is used as it comes, and so are parts that lie
        one after another already, as gate and up do in most files; others are copied, one by one.
        """
        self.weight = nn.Parameter(self._merged(tensors, "weight", device, dtype), requires_grad=False)
        if self.bias is not None:
            self.bias = nn.Parameter(self._merged(tensors, "bias", device, dtype), requires_grad=False)

    def _merged(
        self, tensors: Mapping[str, Tensor], kind: str, device: torch.device, dtype: torch.dtype
    ) -> Tensor:  # fmt: skip
        found = [floating(f"{part}.{kind}", tensors[f"{part}.{kind}"]) for part in self.parts]
        shape = (self.out_features, self.in_features) if kind == "weight" else (self.out_features,)
        if all(_follows(a, b) for a, b in pairwise(found)):
            return found[0].as_strided(shape, found[0].stride()).to(device, dtype)
        merged = torch.empty(shape, device=device, dtype=dtype)
        for rows, part in zip(merged.split(list(self.parts.values())), found, strict=True):
            rows.copy_(part)
        return merged

    def tensors(self) -> dict[str, Tensor]:
        """Views of the parts."""
        found: dict[str, Tensor] = {}
        for kind, merged in (("weight", self.weight), ("bias", self.bias)):
            if merged is not None:
                parts = zip(self.parts, merged.detach().split(list(self.parts.values())), strict=True)
                found |= {f"{part}.{kind}": rows for part, rows in parts}
        return found

    def forward(self, x: Tensor, batch: "Batch | None" = None) -> Tensor:
        return linear(x, self.weight, self.bias)

    def add_norm(
        self, norm: "RMSNorm", branch: Tensor, stream: Tensor | None, batch: "Batch | None" = None,
        use_swiglu: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As `Linear.add_norm`; for one token by one kernel."""
        return norm_linear(branch, stream, norm.weight, self.weight, norm.eps, use_swiglu, self.bias)

    def tie(self, embedding: nn.Embedding) -> bool:
        """Share it."""
        self.weight = embedding.weight
        return True


def dense(name: str, in_features: int, parts: dict[str, int], bias: bool) -> Linear:
    """The factory of a model whose layers are all `Dense`."""
    return Dense(in_features, parts, bias)


def _follows(a: Tensor, b: Tensor) -> bool:
    """Whether b's rows lie right behind a's."""
    same = a.dtype == b.dtype and a.stride() == b.stride() and a.is_contiguous()
    return (
        same
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and (a.data_ptr() + a.nbytes == b.data_ptr())
    )


def floating(name: str, tensor: Tensor) -> Tensor:
    """The tensor itself. Raises ValueError for numbers that mean nothing without a scale: integers, fp8."""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(
            f"{name} holds {str(tensor.dtype).removeprefix('torch.')}: the weights are quantized, which is not"
            " supported here; use the unquantized checkpoint"
        )
    return tensor
