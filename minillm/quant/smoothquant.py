"""SmoothQuant: move what is hard to round from the activations, where it is, to the weights, which can take it.

An int8 product needs both factors in int8, the activations x [tokens, K], too. A few of their K channels are tens of
times as large as the others, in every token. They set each row's scale, and the others keep few of the 255 steps. A
scale for each channel would help, but it cannot be taken out of the sum over channels that a product is. So it is put
in: for any s_j > 0,

    y_i = Σ_j x_j W_ij = Σ_j (x_j / s_j) (s_j W_ij)        s_j = max|x_j|^α / max_i|W_ij|^(1 - α)

α = 0 leaves the activations alone but for evening out the weights, α = 1 makes all channels of x alike. Nobody divides
when the model runs: x / s comes out of whatever made x.

- Behind a norm: its weight, divided by s. Every reader of the norm must be multiplied: q, k, v are one product here,
  gate and up another, so each norm has one reader. The final norm is read by the head, which stays as it is.
- o_proj: attention adds up values, so the rows of v_proj are divided. The query heads that share a value head share s.
- down_proj: silu(gate) · up is linear in up, so the rows of up_proj are divided.

All three are exact; a row of v or up has a scale of its own, so nothing is lost there. (The paper smooths norms alone.)

What the last two are for is another outlier: a few tokens, the first above all, in which a few channels of down_proj's
input are thousands. A scale for each token keeps them to themselves; one scale for all tokens, taken beforehand, is
set by them and rounds everything else to zero.

Sources: Xiao et al., 2023, "SmoothQuant"; Dettmers et al., 2022, "LLM.int8()" (outlier channels); Sun et al., 2024,
"Massive Activations in Large Language Models" (outlier tokens).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..model import Transformer
from ..model.linear import Dense, Linear
from ..model.transformer import Layer
from .rtn import Scheme, fake_quantize, minmax_grid

if TYPE_CHECKING:
    from ..model.layers import Batch

__all__ = [
    "Outlier",
    "activation_maxima",
    "best_alphas",
    "migration",
    "outlier_channels",
    "residual_streams",
    "round_activations",
    "smooth",
    "watched",
]

INT8 = Scheme(8, strategy="channel")  # a row is a token of activations, an output channel of a weight


def round_activations(x: Tensor, scheme: Scheme = INT8) -> Tensor:
    """x after rounding with a scale for each token, found as it comes.  [..., K] -> the same shape and dtype"""
    rows = x.flatten(0, -2)  # [tokens, K]
    return fake_quantize(rows, minmax_grid(rows, scheme), scheme).view(x.shape)


# ---- what the activations are ----------------------------------------------------------------------------------------


class _Watched(Linear):
    """A layer that shows its input to somebody first."""

    def __init__(self, inner: Linear, see: Callable[[Tensor], None]) -> None:
        super().__init__(inner.in_features, inner.parts)
        self.inner, self.see = inner, see

    def forward(self, x: Tensor, batch: "Batch | None" = None) -> Tensor:
        self.see(x)
        return self.inner(x, batch)


@contextmanager
def watched(model: Transformer, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within it, `see` gets the input of every linear layer of the model's stack whenever one is computed, by names
    such as "layers.0.self_attn.qkv_proj".

    A layer stands in each one's place and passes on to it. (A hook on a module that is called in another way than
    expected sees nothing, and says nothing.) After it the model is as before.
    """
    places = [place for i, layer in enumerate(model.layers) for place in _linears(i, layer)]
    try:
        for name, parent, slot in places:
            setattr(parent, slot, _Watched(getattr(parent, slot), partial(see, name)))
        yield
    finally:
        for _, parent, slot in places:
            if isinstance(here := getattr(parent, slot), _Watched):
                setattr(parent, slot, here.inner)


def _linears(i: int, layer: Layer) -> list[tuple[str, nn.Module, str]]:
    """(name, what holds it, under which attribute) of a layer's four."""
    parts = (("self_attn", ("qkv_proj", "o_proj")), ("mlp", ("gate_up_proj", "down_proj")))
    return [(f"layers.{i}.{part}.{slot}", getattr(layer, part), slot) for part, slots in parts for slot in slots]


@torch.inference_mode()
def activation_maxima(model: Transformer, token_ids: Tensor) -> dict[str, Tensor]:
    """The largest |x| of each input channel of each linear layer, over the tokens of all windows.

    token_ids [N, T], windows such as `data.calibration` gives, read one by one -> {name: fp32 [in_features]}. Raises
    RuntimeError if a layer saw fewer tokens than there are.
    """
    maxima: dict[str, Tensor] = {}
    seen: dict[str, int] = {}

    def see(name: str, x: Tensor) -> None:
        largest = x.flatten(0, -2).abs().amax(0).float()  # [K]
        maxima[name] = torch.maximum(maxima[name], largest) if name in maxima else largest
        seen[name] = seen.get(name, 0) + x[..., 0].numel()

    with watched(model, see):
        for ids in token_ids:
            model(ids[None])
    if len(seen) != 4 * len(model.layers) or set(seen.values()) != {token_ids.numel()}:
        raise RuntimeError(f"expected each linear layer to see {token_ids.numel()} tokens, got {seen}")
    return {name: x.clone() for name, x in maxima.items()}  # not tensors of inference mode


@dataclass(frozen=True)
class Outlier:
    """An input channel far larger than the others: its largest |x|, and how many times the layer's median channel's."""

    name: str
    channel: int
    largest: float
    times_median: float


def outlier_channels(maxima: Mapping[str, Tensor], times: float = 10.0) -> list[Outlier]:
    """The channels of `activation_maxima` that are over `times` the median of their layer, largest ratio first."""
    found = []
    for name, x in maxima.items():
        ratio = x / x.median().clamp(min=torch.finfo(x.dtype).tiny)  # [K]
        for j in torch.nonzero(ratio > times).flatten().tolist():
            found.append(Outlier(name, j, x[j].item(), ratio[j].item()))
    return sorted(found, key=lambda outlier: -outlier.times_median)


@torch.inference_mode()
def residual_streams(model: Transformer, token_ids: Tensor) -> Tensor:
    """The stream that layers read and add to, before the first, between them and behind the last, where massive
    activations stand.  token_ids [B, T] -> [layers + 1, B, T, hidden]
    """
    rope = model.rope_cos[: token_ids.shape[-1]], model.rope_sin[: token_ids.shape[-1]]
    caches = model._no_cache.layers
    streams = [model.embed_tokens(token_ids)]
    for i, layer in enumerate(model.layers):
        streams.append(layer(streams[-1], rope, caches[i]))
    return torch.stack(streams)


# ---- moving it into the weights --------------------------------------------------------------------------------------

NORMS = ("qkv_proj", "gate_up_proj")
ALL = (*NORMS, "o_proj", "down_proj")
ALPHAS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)


def migration(x_max: Tensor, w_max: Tensor, alpha: float) -> Tensor:
    """s_j = max|x_j|^α / max|w_j|^(1 - α); 1 for a channel of zeros in either.  [K], [K] -> fp32 [K]

    Scaled to a geometric mean of 1, which rounding with scales of their own does not notice. Raises ValueError unless
    0 <= alpha <= 1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected 0 to 1, got {alpha}")
    alive = (x_max > 0) & (w_max > 0)
    x, w = x_max.float().where(alive, 1.0), w_max.float().where(alive, 1.0)
    log = alpha * x.log() - (1 - alpha) * w.log()
    mean = log[alive].mean() if bool(alive.any()) else 0.0
    return (log - mean).exp().where(alive, 1.0)


@torch.no_grad()
def smooth(
    model: Transformer, maxima: Mapping[str, Tensor], alpha: float | Mapping[str, float] = 0.5,
    where: tuple[str, ...] = ALL,
) -> dict[str, Tensor]:  # fmt: skip
    """Change the model's weights in place so that its activations are easier to round. It computes the same function.

    maxima: of `activation_maxima`. alpha: one, or one for each layer's name. where: in front of which layers
    ("qkv_proj", "gate_up_proj", "o_proj", "down_proj"); NORMS is the paper's. -> {name: the s [in_features] used}

    Raises ValueError for an alpha or a `where` that does not exist, TypeError for layers that are not `Dense`: smooth
    first, then quantize.
    """
    if unknown := set(where) - set(ALL):
        raise ValueError(f"where: expected some of {', '.join(ALL)}, got {sorted(unknown)}")
    used = {}
    for i, layer in enumerate(model.layers):
        for name, parent, slot in _linears(i, layer):
            if slot in where:
                weight = _dense(name, getattr(parent, slot)).weight
                strength = alpha[name] if isinstance(alpha, Mapping) else alpha
                used[name] = _strengths(layer, slot, weight, maxima[name], strength)
                _divide(name, layer, slot, used[name])
                weight.mul_(used[name])
    model.revision += 1
    return used


@torch.inference_mode()
def best_alphas(
    model: Transformer, token_ids: Tensor, maxima: Mapping[str, Tensor], alphas: Sequence[float] = ALPHAS,
    scheme: Scheme = INT8,
) -> dict[str, float]:  # fmt: skip
    """For each linear layer the alpha whose rounded product is nearest to the exact one, in mean square, over windows
    [N, T]. One or two windows are enough.
    """
    places = {name: (layer, slot) for i, layer in enumerate(model.layers) for name, _, slot in _linears(i, layer)}
    weights = {
        name: _dense(name, getattr(parent, slot)).weight
        for i, layer in enumerate(model.layers) for name, parent, slot in _linears(i, layer)
    }  # fmt: skip
    errors: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        w = weights[name]
        y, found = x @ w.T, []
        for alpha in alphas:
            s = _strengths(*places[name], w, maxima[name], alpha)
            scaled = w * s
            rounded = fake_quantize(scaled, minmax_grid(scaled, scheme), scheme)
            found.append((round_activations(x / s, scheme) @ rounded.T - y).square().sum())
        errors[name] = errors.get(name, 0) + torch.stack(found)  # [alphas]

    with watched(model, see):
        for ids in token_ids:
            model(ids[None])
    return {name: alphas[int(error.argmin())] for name, error in errors.items()}


def _dense(name: str, linear: Linear) -> Dense:
    if not isinstance(linear, Dense):
        raise TypeError(
            f"model: expected plain weights in {name}, got {type(linear).__name__}; smooth before you quantize"
        )
    return linear


def _strengths(layer: Layer, slot: str, weight: Tensor, x_max: Tensor, alpha: float) -> Tensor:
    """`migration` for a layer's linear; in front of o_proj the same for all query heads of a value head.  -> [K]"""
    w_max = weight.abs().amax(0)  # [K]
    if slot != "o_proj":
        return migration(x_max, w_max, alpha)
    shape = _heads(layer)
    x_max, w_max = (x.view(shape).amax(1).flatten() for x in (x_max, w_max))  # [H_kv · D]
    return migration(x_max, w_max, alpha).view(shape[0], 1, shape[2]).expand(shape).flatten()


def _heads(layer: Layer) -> tuple[int, int, int]:
    """How o_proj's inputs lie: value head, query head of it, feature."""
    attn = layer.self_attn
    return attn.heads[2], attn.heads[0] // attn.heads[2], attn.head_dim


def _divide(name: str, layer: Layer, slot: str, s: Tensor) -> None:
    """Divide by s whatever makes the input of a layer's linear."""
    attn, mlp = layer.self_attn, layer.mlp
    if slot == "qkv_proj":
        layer.input_layernorm.weight.div_(s)
    elif slot == "gate_up_proj":
        layer.post_attention_layernorm.weight.div_(s)
    else:
        maker = _dense(name, attn.qkv_proj if slot == "o_proj" else mlp.gate_up_proj)
        rows = s.view(_heads(layer))[:, 0].flatten() if slot == "o_proj" else s  # v's, or up's: the last ones
        maker.weight[-len(rows) :].div_(rows[:, None])
        if maker.bias is not None:
            maker.bias[-len(rows) :].div_(rows)
