"""Adapters as they were before LoRA: a small network behind a sublayer, h <- h + W_up f(W_down h).

Down to m = hidden / reduction_factor numbers, a nonlinearity, up again. After Houlsby et al. both sublayers have one,
after Pfeiffer et al. the MLP alone. W_up begins as 0. Because of f it is no change of a weight: it cannot be merged,
and every token pays for two products more, one after the other, in every layer: the contrast to LoRA (`lora.py`).

Sources: Houlsby et al., 2019, "Parameter-Efficient Transfer Learning for NLP"; Pfeiffer et al., 2021, "AdapterFusion".
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import Transformer
from ..model.linear import Linear
from .lora import Around, linears, replace

if TYPE_CHECKING:
    from ..model.layers import Batch

__all__ = ["ARCHITECTURES", "NONLINEARITIES", "BottleneckLinear", "bottlenecked", "without_bottlenecks"]

# Behind which of a layer's products: those that end a sublayer.
ARCHITECTURES: Mapping[str, tuple[str, ...]] = {"houlsby": ("o_proj", "down_proj"), "pfeiffer": ("down_proj",)}
NONLINEARITIES: Mapping[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


class BottleneckLinear(Around):
    """What `base` gives, h, plus W_up f(W_down h). W_down [m, out], W_up [out, m], fp32."""

    def __init__(self, base: Linear, size: int, nonlinearity: str = "relu", seed: int = 0) -> None:
        super().__init__(base)
        self.f = NONLINEARITIES[nonlinearity]
        draw, n = torch.Generator().manual_seed(seed), base.out_features
        self.down = nn.Parameter(torch.randn(size, n, generator=draw) / n**0.5)
        self.up = nn.Parameter(torch.zeros(n, size))

    def forward(self, x: Tensor, batch: "Batch | None" = None) -> Tensor:
        h = self.base(x, batch)
        return h + F.linear(self.f(F.linear(h.to(self.down.dtype), self.down)), self.up).to(h.dtype)


def bottlenecked(
    model: Transformer, architecture: str = "pfeiffer", reduction_factor: int = 16, nonlinearity: str = "relu",
    seed: int = 0,
) -> Transformer:  # fmt: skip
    """Give a model new adapters, in place; all else is frozen, and it computes what it did. -> the model

    Raises ValueError for names that are not known, a factor that leaves nothing, and a model that has some.
    """
    for name, value, known in (
        ("architecture", architecture, ARCHITECTURES), ("nonlinearity", nonlinearity, NONLINEARITIES)
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    hidden = model.config.hidden_size
    if not 1 <= reduction_factor <= hidden:
        raise ValueError(f"reduction_factor: expected 1 to {hidden} (hidden_size), got {reduction_factor!r}")
    layers = list(linears(model))
    if any(isinstance(layer, BottleneckLinear) for _, layer in layers):
        raise ValueError("model: expected one without bottlenecks; take those out first")
    model.requires_grad_(False)
    for i, (name, layer) in enumerate(layers):
        if name.rpartition(".")[2] in ARCHITECTURES[architecture]:
            made = BottleneckLinear(layer, hidden // reduction_factor, nonlinearity, seed + i)
            replace(model, name, made.to(model.device))
    return model


def without_bottlenecks(model: Transformer) -> Transformer:
    """Take them out again, in place. -> the model"""
    for name, layer in linears(model):
        if isinstance(layer, BottleneckLinear):
            replace(model, name, layer.base)
    return model
