"""Quantize a model layer by layer, each layer on what the layers before it, quantized already, really give.

A method such as GPTQ wants to see a layer's inputs. `walk` carries the calibration text through the model, stops
before each `Linear`, shows its inputs, and goes on with whatever weights it then has: an error that was made early is
seen, and can be answered, by all that comes later. Each product is computed once.

The embedding and the head stay as they are.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels import swiglu
from ..model.layers import Attention, Batch, LayerCache, NoCache, PaddedBatch, Rope
from ..model.linear import Dense, Linear
from ..model.transformer import Transformer
from .gptq import Hessian, Report, fit_grid, gptq
from .rtn import QuantizedTensor, Scheme

__all__ = ["Site", "gptq_model", "quantize_layers", "replace_weight", "rtn_model", "sites", "walk", "windows"]

Batches = Iterable[Tensor | tuple[Tensor, PaddedBatch]]
Read = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Site:
    """A linear layer of the model: its `name`, such as "layers.0.self_attn.qkv_proj", the layer itself, and what it was
    given, `inputs`: a tensor [tokens, K] a batch, padding left out.
    """

    name: str
    linear: Dense
    inputs: list[Tensor]

    @property
    def hessian(self) -> Tensor:
        """mean(xᵀ x) over the inputs, fp32 [K, K]."""
        h = Hessian(self.linear.in_features, self.linear.weight.device)
        for x in self.inputs:
            h.add(x)
        return h.matrix


def windows(token_ids: Tensor, count: int = 64, length: int = 512, seed: int = 0) -> Tensor:
    """Calibration text: windows from random places of a text [T], in the text's order.  -> [count, length]

    Raises ValueError for a text that is shorter than a window.
    """
    if len(token_ids) < length:
        raise ValueError(f"token_ids: expected a text of {length} tokens or more, got {len(token_ids)}")
    generator = torch.Generator().manual_seed(seed)
    begins = torch.randint(len(token_ids) - length + 1, (count,), generator=generator).sort().values
    return torch.stack([token_ids[b : b + length] for b in begins.tolist()])


def sites(model: Transformer) -> dict[str, Dense]:
    """All linear layers but the head, by name, in the order of computation.

    Raises ValueError for one that has no plain weight.
    """
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear)]
    return {name: _dense(name, linear) for name, linear in linears if linear is not model.lm_head}


@torch.no_grad()
def walk(model: Transformer, batches: Batches, read: Read | None = None) -> Iterator[Site]:
    """Every linear layer with its inputs, one after another; the walk goes on with the weights as they are by then.

    batches: token ids [B, T] int64, or (token ids, `PaddedBatch`). read: what layers will make of an input before they
    multiply, such as rounding it to 8 bits; they are shown what comes of it. Raises ValueError where there are none.
    """
    read = read or _as_it_is
    texts = _texts(model, batches)
    caches = NoCache(model.config).layers
    xs = [model.embed_tokens(text.token_ids) for text in texts]  # [B, T, hidden] each: the residual stream
    for i, layer in enumerate(model.layers):
        attn, mlp = layer.self_attn, layer.mlp
        between = [read(layer.input_layernorm(x)) for x in xs]
        yield _site(f"layers.{i}.self_attn.qkv_proj", attn.qkv_proj, texts, between)
        between = [read(_attend(attn, x, text, caches[i])) for x, text in zip(between, texts, strict=True)]
        yield _site(f"layers.{i}.self_attn.o_proj", attn.o_proj, texts, between)
        xs = [x + attn.o_proj(y) for x, y in zip(xs, between, strict=True)]
        between = [read(layer.post_attention_layernorm(x)) for x in xs]
        yield _site(f"layers.{i}.mlp.gate_up_proj", mlp.gate_up_proj, texts, between)
        between = [read(swiglu(mlp.gate_up_proj(x))) for x in between]
        yield _site(f"layers.{i}.mlp.down_proj", mlp.down_proj, texts, between)
        xs = [x + mlp.down_proj(y) for x, y in zip(xs, between, strict=True)]


def quantize_layers(
    model: Transformer, batches: Batches, method: Callable[[Site], QuantizedTensor],
    progress: Callable[[str], object] | None = None, read: Read | None = None,
) -> dict[str, QuantizedTensor]:  # fmt: skip
    """Ask `method` for each layer's quantized weight, and go on with it.  -> {name: weight [N, K], parts merged}

    Changes `model`: afterwards its weights are the quantized ones, in its dtype. `progress` is called with the name of
    each layer that is done; there are `len(sites(model))`. `read`: as for `walk`.
    """
    done = {}
    for site in walk(model, batches, read):
        done[site.name] = method(site)
        replace_weight(model, site.linear, done[site.name].dequantize())
        if progress is not None:
            progress(site.name)
    return done


def rtn_model(
    model: Transformer, scheme: Scheme, grid: str = "minmax", batches: Batches | None = None,
    scale_dtype: torch.dtype = torch.float32, progress: Callable[[str], object] | None = None,
) -> dict[str, QuantizedTensor]:  # fmt: skip
    """Round every layer to the nearest; as `quantize_layers`, but there need be no text.

    With `batches` and grid "error" an error in a column counts by the mean square of its input.
    """

    def method(site: Site) -> QuantizedTensor:
        weight = site.linear.weight
        importance = site.hessian.diagonal() if site.inputs else None
        return QuantizedTensor.round(weight, fit_grid(weight, scheme, grid, importance, scale_dtype), scheme)

    if batches is not None:
        return quantize_layers(model, batches, method, progress)
    done = {}
    for name, linear in sites(model).items():
        done[name] = method(Site(name, linear, []))
        replace_weight(model, linear, done[name].dequantize())
        if progress is not None:
            progress(name)
    return done


def gptq_model(
    model: Transformer, batches: Batches, scheme: Scheme, *, damping: float = 0.01, order: str | None = None,
    grid: str = "minmax", block: int = 128, scale_dtype: torch.dtype = torch.float32,
    progress: Callable[[str], object] | None = None, read: Read | None = None,
) -> tuple[dict[str, QuantizedTensor], dict[str, Report]]:  # fmt: skip
    """`gptq` on every layer, as `quantize_layers`.  -> {name: weight}, {name: how it went}"""
    reports: dict[str, Report] = {}

    def method(site: Site) -> QuantizedTensor:
        weight, reports[site.name] = gptq(
            site.linear.weight, site.hessian, scheme,
            block=block, damping=damping, order=order, grid=grid, scale_dtype=scale_dtype,
        )  # fmt: skip
        return weight

    return quantize_layers(model, batches, method, progress, read), reports


def replace_weight(model: Transformer, linear: Dense, weight: Tensor) -> None:
    """Give a layer of the model another weight.  weight [N, K]

    Never in place: a loaded weight may be the file itself, mapped into memory.
    """
    linear.weight = nn.Parameter(weight.to(linear.weight), requires_grad=False)
    model.revision += 1


def _as_it_is(x: Tensor) -> Tensor:
    return x


# ---- parts of the walk ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Text:
    """A batch of calibration text on the model's device, and the angles of its positions."""

    token_ids: Tensor
    batch: PaddedBatch | None
    rope: Rope


def _texts(model: Transformer, batches: Batches) -> list[_Text]:
    found = []
    for item in batches:
        ids, batch = item if isinstance(item, tuple) else (item, None)
        if ids.dim() != 2:
            raise ValueError(f"batches: expected token ids [B, T], got the shape {list(ids.shape)}")
        if batch is not None:
            if batch.attention_mask.shape != ids.shape:
                raise ValueError(
                    f"batches: expected a mask of token_ids' shape {list(ids.shape)},"
                    f" got {list(batch.attention_mask.shape)}"
                )
            batch = PaddedBatch(batch.attention_mask.bool().to(model.device))
        ids = ids.to(model.device)
        positions = torch.arange(ids.shape[1], device=model.device) if batch is None else batch.positions
        model._check(ids, positions)
        found.append(_Text(ids, batch, (model.rope_cos[positions], model.rope_sin[positions])))
    if not sum(
        text.token_ids.numel() if text.batch is None else int(text.batch.attention_mask.sum()) for text in found
    ):
        raise ValueError("batches: expected calibration text, got no token; was an iterator used up before?")
    return found


def _site(name: str, linear: Linear, texts: list[_Text], inputs: list[Tensor]) -> Site:
    tokens = [
        x.flatten(0, 1) if text.batch is None else x[text.batch.attention_mask]
        for x, text in zip(inputs, texts, strict=True)
    ]  # [tokens, K] each
    return Site(name, _dense(name, linear), tokens)


def _dense(name: str, linear: Linear) -> Dense:
    if not isinstance(linear, Dense):
        raise ValueError(
            f"{name}: expected a plain weight, got {type(linear).__name__}; is the model quantized already?"
        )
    return linear


class _Nothing(Linear):
    """A layer that gives what it gets."""

    def forward(self, x: Tensor, batch: Batch | None = None) -> Tensor:
        return x


@contextmanager
def _without_output(attn: Attention) -> Iterator[None]:
    """Attention ends before its last projection."""
    output = attn.o_proj
    attn.o_proj = _Nothing(output.in_features, {"o_proj": output.in_features})
    try:
        yield
    finally:
        attn.o_proj = output


def _attend(attn: Attention, x: Tensor, text: _Text, cache: LayerCache) -> Tensor:
    """What the heads give, side by side: o_proj's input.  [B, T, hidden] -> [B, T, H · D]"""
    with _without_output(attn):
        return attn(x, text.rope, cache, text.batch)
