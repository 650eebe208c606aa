"""Quantization-aware training: the model computes with rounded weights while it learns, and learns to live with them.

Rounding is a staircase. Its derivative is 0 almost everywhere, so nothing would be learned. The straight-through
estimator pretends that the staircase is the straight line it follows: forward it rounds, backward the gradient passes
as if it had not. Where a weight lies beyond the last step, the line ends, too: the gradient is 0 there.

The weights that are trained are fp32. Small steps add up in them unseen until one crosses the middle between two
levels, and what the layer computes with jumps by a whole level. The grid is taken anew from the weights in each forward
pass. Rounding is `rtn`'s, in training and in `quantized`: what is exported computes, to the bit, what was trained. (A
trainer that divides the largest weight by 7 and an exporter that divides by 7.5 each look right alone.)

Sources: Bengio et al., 2013, "Estimating or Propagating Gradients Through Stochastic Neurons" (straight-through);
Jacob et al., 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference".
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import linear
from ..model import Transformer
from ..model.linear import Dense, Linear, LinearFactory
from .rtn import FP8_MAX, Grid, QuantizedTensor, Scheme, fake_quantize, minmax_grid

if TYPE_CHECKING:
    from ..model.layers import Batch, RMSNorm

__all__ = ["FakeQuantLinear", "fake_quantized", "quantization_aware", "straight_through", "train"]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
        ctx.save_for_backward(_within(w, grid, scheme))
        return fake_quantize(w, grid, scheme)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (within,) = ctx.saved_tensors
        return grads[0] * within, None, None


def straight_through(w: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """`rtn.fake_quantize`, with a gradient: that of the identity within the grid's range, 0 beyond.  [N, K] -> [N, K]

    The range reaches half a step beyond the outermost levels: as far as rounding moves a number anyway.
    """
    return _StraightThrough.apply(w, grid, scheme)


def _within(w: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """Where rounding moves a number by half a step at most.  -> bool [N, K]"""
    if scheme.kind == "int":
        first, last = (limit + sign * 0.5 for limit, sign in zip(scheme.limits, (-1, 1), strict=True))
        slack = 1e-4  # max|w| over its own scale is 7.5 but for rounding
    else:
        last = FP8_MAX if scheme.kind == "float" else 1.0
        first, slack = -last, 1e-4
    size = w.numel() if scheme.strategy == "tensor" else w.shape[-1] // grid.scale.shape[1]
    scaled = w.reshape(*grid.scale.shape, size) / grid.scale[..., None]  # [N, G, size]
    if grid.zero is not None:
        scaled = scaled + grid.zero[..., None]
    return ((scaled >= first - slack) & (scaled <= last + slack)).reshape(w.shape)


class FakeQuantLinear(Dense):
    """A layer that trains an fp32 weight and computes with what `scheme` leaves of it."""

    def __init__(self, in_features: int, parts: dict[str, int], scheme: Scheme, bias: bool = False) -> None:
        super().__init__(in_features, parts, bias)
        scheme.groups(in_features)  # raises now if they do not fill a row
        self.scheme = scheme

    def forward(self, x: Tensor, batch: "Batch | None" = None) -> Tensor:
        w = self.weight
        return linear(x, straight_through(w, minmax_grid(w.detach(), self.scheme), self.scheme), self.bias)

    def add_norm(
        self, norm: "RMSNorm", branch: Tensor, stream: Tensor | None, batch: "Batch | None" = None,
        use_swiglu: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """By parts: `Dense`'s kernel would multiply by the weight itself."""
        return Linear.add_norm(self, norm, branch, stream, batch, use_swiglu)

    def quantized(self) -> QuantizedTensor:
        """The weight as it is stored, of the merged rows. What it computes is what `forward` computed."""
        w = self.weight.detach()
        return QuantizedTensor.round(w, minmax_grid(w, self.scheme), self.scheme)


def fake_quantized(scheme: Scheme) -> LinearFactory:
    """The factory of a model in training: all layers by `scheme`, but for the head."""

    def make(name: str, in_features: int, parts: dict[str, int], bias: bool) -> Linear:
        if name == "lm_head":
            return Dense(in_features, parts, bias)
        return FakeQuantLinear(in_features, parts, scheme, bias)

    return make


def quantization_aware(model: Transformer, scheme: Scheme) -> Transformer:
    """A copy of a model of `Dense` layers that computes with rounded weights. Untrained it is what rounding to the
    nearest makes of the model; `train` makes it better.
    """
    copy = Transformer(model.config, fake_quantized(scheme)).to(model.device, model.dtype)
    copy.load_state_dict(model.state_dict())
    return copy


def train(
    model: Transformer, token_ids: Tensor, steps: int = 200, lr: float = 1e-3, window: int = 128, batch: int = 8,
    seed: int = 0,
) -> list[float]:  # fmt: skip
    """Train on random windows of a text [T], in place, as chapter 3 does: AdamW, warm-up, then a straight line to 0,
    gradients clipped to norm 1.  -> the loss of each step, in nats a token

    Raises ValueError for a text shorter than a window and the token behind it.
    """
    if token_ids.dim() != 1 or len(token_ids) <= window:
        raise ValueError(f"token_ids: expected one text of over {window} tokens, got {tuple(token_ids.shape)}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    generator, losses = torch.Generator().manual_seed(seed), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 20, 1 - step / steps)
        starts = torch.randint(len(token_ids) - window, (batch,), generator=generator)
        rows = token_ids[starts[:, None] + torch.arange(window + 1)]  # [batch, window + 1]
        loss = F.cross_entropy(model.logits(model(rows[:, :-1])).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    model.revision += 1
    return losses
