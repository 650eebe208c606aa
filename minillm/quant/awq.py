"""AWQ: before rounding, make the columns that matter larger; what gave them their input makes it smaller.

A column's weights matter as its inputs are large. Multiplied by s > 1 such a column takes more of its group's grid, so
its error, divided by s again, is smaller, as long as s does not stretch the whole group's range:

    x Wᵀ = (x / s) (W s)ᵀ

1/s costs nothing where it can be folded into what comes before: the norm's weight; the rows of v_proj for o_proj; those
of up_proj for down_proj. All that reads a norm has the same s (here it is one layer). So before rounding the model
computes what it did; then `rtn_model`, or `gptq_model`, rounds it.

How strong? s = (mean |x|)^α, and α is tried out for each layer: that with the smallest error of the output after
rounding. α = 0 is among them, so on these inputs no layer loses.

Source: Lin et al., 2024, "AWQ: Activation-aware Weight Quantization".
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..model.linear import Dense
from ..model.transformer import Layer, Transformer
from .calibrate import Batches, Site, replace_weight, sites, walk
from .gptq import fit_grid
from .rtn import Scheme, fake_quantize

__all__ = ["awq_model", "fold", "magnitudes", "search_scale"]


def magnitudes(inputs: list[Tensor], share: tuple[int, int] | None = None) -> Tensor:
    """mean |x| of each channel.  inputs [tokens, K] each -> fp32 [K]

    share: (query heads, key/value heads), where channels are those of the heads: all query heads that read the same
    values have the same, their mean.
    """
    tokens = sum(len(x) for x in inputs)
    mean = torch.stack([x.float().abs().sum(0) for x in inputs]).sum(0) / tokens
    if share is None:
        return mean
    heads, values = share
    by_value = mean.view(values, heads // values, -1)  # query head h reads value head h // (H / H_kv)
    return by_value.mean(1, keepdim=True).expand_as(by_value).reshape(-1)


def search_scale(
    w: Tensor, h: Tensor, magnitude: Tensor, scheme: Scheme, *, grid: str = "minmax", steps: int = 20,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, float]:  # fmt: skip
    """The scale of each column that serves rounding to the nearest best, and its α.  w [N, K] -> fp32 [K], around 1

    h [K, K]: mean(xᵀ x), by which the error of the output is known; magnitude [K]: mean |x|. A channel that is always 0
    has scale 1. α is one of steps + 1 numbers from 0 to 1. Raises ValueError for negative magnitudes.
    """
    if bool((magnitude < 0).any()):
        raise ValueError("magnitude: expected mean |x|, got negative numbers; is the absolute value missing?")
    w = w.detach().float()
    best, strength, least = torch.ones_like(magnitude), 0.0, float("inf")
    for step in range(steps + 1):
        scale = _power(magnitude, step / steps)
        scaled = w * scale
        importance = h.diagonal() / scale**2
        rounded = fake_quantize(scaled, fit_grid(scaled, scheme, grid, importance, scale_dtype), scheme) / scale
        error = w - rounded
        loss = float(((error @ h) * error).sum())
        if loss < least:
            best, strength, least = scale, step / steps, loss
    return best, strength


def _power(magnitude: Tensor, exponent: float) -> Tensor:
    """magnitude^exponent, of geometric mean 1 over the extremes; 1 for channels that are 0."""
    alive = magnitude > 0
    scale = magnitude**exponent
    if bool(alive.any()):
        scale = scale / (scale[alive].max() * scale[alive].min()).sqrt()
    return torch.where(alive, scale, 1.0)


@torch.no_grad()
def awq_model(
    model: Transformer, batches: Batches, scheme: Scheme, *, grid: str = "minmax", steps: int = 20,
    scale_dtype: torch.dtype = torch.float32, progress: Callable[[str], object] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Scale every layer of the model for rounding by `scheme`, in place; it computes what it did.  -> {name: α}

    Inputs are those of the model as it is, unquantized. `progress` is called with each layer's name.
    """
    config = model.config
    scales: dict[str, Tensor] = {}
    strengths: dict[str, float] = {}

    def search(site: Site) -> None:
        attention = site.name.endswith("o_proj")
        share = (config.num_attention_heads, config.num_key_value_heads) if attention else None
        scales[site.name], strengths[site.name] = search_scale(
            site.linear.weight, site.hessian, magnitudes(site.inputs, share), scheme,
            grid=grid, steps=steps, scale_dtype=scale_dtype,
        )  # fmt: skip

    for site in walk(model, batches):
        search(site)
        if progress is not None:
            progress(site.name)
    fold(model, scales)
    return strengths


@torch.no_grad()
def fold(model: Transformer, scales: dict[str, Tensor]) -> None:
    """Multiply the columns of layers by `scales` {name: [K]}, and divide what gives them their inputs.

    For o_proj the query heads that read one value head need one scale. Raises ValueError where they differ, for a name
    that is no layer's, and for a scale that is not positive.
    """
    linears = sites(model)
    for name, scale in scales.items():
        if name not in linears:
            raise ValueError(f"scales: expected names such as {next(iter(linears))}, got {name}")
        linear = linears[name]
        if scale.shape != (linear.in_features,) or not bool((scale > 0).all() & scale.isfinite().all()):
            raise ValueError(f"{name}: expected {linear.in_features} positive scales")
        layer = model.layers[int(name.split(".")[1])]
        _divide_source(model, layer, name, scale)
        replace_weight(model, linear, linear.weight.double() * scale.double())


def _divide_source(model: Transformer, layer: Layer, name: str, scale: Tensor) -> None:
    """Let what comes before a layer give 1 / scale of what it gave."""
    if name.endswith(("qkv_proj", "gate_up_proj")):
        norm = layer.input_layernorm if name.endswith("qkv_proj") else layer.post_attention_layernorm
        norm.weight = nn.Parameter((norm.weight.double() / scale.double()).to(norm.weight), requires_grad=False)
        return
    source = layer.self_attn.qkv_proj if name.endswith("o_proj") else layer.mlp.gate_up_proj
    if name.endswith("o_proj"):
        by_value = scale.view(model.config.num_key_value_heads, -1, model.config.head_dim)  # [H_kv, H / H_kv, D]
        if not torch.equal(by_value, by_value[:, :1].expand_as(by_value)):
            raise ValueError(f"{name}: expected one scale for all query heads that read the same values")
        scale = by_value[:, 0].reshape(-1)
    assert isinstance(source, Dense)
    rows = torch.ones(source.out_features, dtype=torch.float64, device=scale.device)
    rows[-len(scale) :] = 1 / scale.double()  # v_proj and up_proj are the last of their layers' parts
    replace_weight(model, source, source.weight.double() * rows[:, None])
    if source.bias is not None:
        source.bias = nn.Parameter((source.bias.double() * rows).to(source.bias), requires_grad=False)
