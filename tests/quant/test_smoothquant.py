"""SmoothQuant: the same function, easier to round; what the model's activations are."""

import copy

import pytest
import torch
from torch import Tensor

from minillm.config import ModelConfig
from minillm.kernels import use
from minillm.model import Transformer
from minillm.model.linear import Linear
from minillm.quant import Scheme, fake_quantize, minmax_grid
from minillm.quant.smoothquant import (
    ALL,
    INT8,
    NORMS,
    activation_maxima,
    best_alphas,
    migration,
    outlier_channels,
    residual_streams,
    round_activations,
    smooth,
    watched,
)

VARIANTS = {
    "llama": {},
    "all heads": {"num_key_value_heads": 4},
    "one value head": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen3": {"qk_norm": True, "head_dim": 24},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "qwen3, biases": {"qk_norm": True, "qkv_bias": True, "o_bias": True},
}


def make(dtype: torch.dtype = torch.float64, **changes) -> Transformer:
    """A small model in which nothing is 0 or 1, and whose norms have three large channels."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    sizes |= {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 64}
    model = Transformer(ModelConfig(**{**sizes, **changes})).eval().to(dtype).requires_grad_(False)
    model.reset_parameters(0.2)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.copy_(torch.rand(parameter.shape) + 0.5 if "norm" in name else torch.randn(parameter.shape))
    for layer in model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight[[3, 20, 41]] *= 40
    return model


IDS = torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(1))


class Rounded(Linear):
    """x and W in int8."""

    def __init__(self, inner: Linear, scheme: Scheme = INT8) -> None:
        super().__init__(inner.in_features, inner.parts)
        self.bias, self.scheme = inner.bias, scheme
        self.weight = fake_quantize(inner.weight, minmax_grid(inner.weight, scheme), scheme)

    def forward(self, x: Tensor, batch=None) -> Tensor:
        return torch.nn.functional.linear(round_activations(x, self.scheme), self.weight, self.bias)


def slots(model: Transformer) -> dict[str, tuple]:
    """name -> (its parent, its attribute)"""
    found = {}
    for i, layer in enumerate(model.layers):
        found |= {f"layers.{i}.self_attn.{slot}": (layer.self_attn, slot) for slot in ("qkv_proj", "o_proj")}
        found |= {f"layers.{i}.mlp.{slot}": (layer.mlp, slot) for slot in ("gate_up_proj", "down_proj")}
    return found


def rounded(model: Transformer) -> Transformer:
    model = copy.deepcopy(model)
    for parent, slot in slots(model).values():
        setattr(parent, slot, Rounded(getattr(parent, slot)))
    return model


def inputs(model: Transformer, ids: Tensor) -> dict[str, Tensor]:
    """What each linear reads, in the order of `watched`."""
    seen = {}
    with watched(model, lambda name, x: seen.__setitem__(name, x.clone())):
        model(ids)
    return seen


# ---- activations


def test_rounding_tokens():
    """Each row by its own largest number, over 127.5 steps."""
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 50, 0.01])[:, None]
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    assert torch.equal(round_activations(x), (x / scale).round().clamp(-128, 127) * scale)
    fp8 = round_activations(x, Scheme(8, "float", strategy="channel"))
    assert ((fp8 - x).abs() <= x.abs() / 16 + x.abs().amax(-1, keepdim=True) / 448 / 1024).all(), "3 bits of mantissa"


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_inputs_are_those_of_the_layers(changes):
    """The products of what was seen are what the layers pass on."""
    model = make(**changes)
    seen, streams = inputs(model, IDS), residual_streams(model, IDS)
    assert list(seen) == list(slots(model))
    assert torch.equal(model.norm(streams[-1]), model(IDS))
    assert torch.equal(streams[0], model.embed_tokens(IDS))
    for i, layer in enumerate(model.layers):
        assert torch.equal(seen[f"layers.{i}.self_attn.qkv_proj"], layer.input_layernorm(streams[i]))
        middle = streams[i] + layer.self_attn.o_proj(seen[f"layers.{i}.self_attn.o_proj"])
        assert torch.equal(seen[f"layers.{i}.mlp.gate_up_proj"], layer.post_attention_layernorm(middle))
        assert torch.equal(middle + layer.mlp.down_proj(seen[f"layers.{i}.mlp.down_proj"]), streams[i + 1])


def test_maxima():
    model = make(torch.float32)
    before, layers = model(IDS), [getattr(*place) for place in slots(model).values()]
    maxima = activation_maxima(model, IDS)
    for name, x in inputs(model, IDS).items():
        assert torch.allclose(maxima[name], x.flatten(0, -2).abs().amax(0), rtol=1e-5)
    assert all(getattr(*place) is layer for place, layer in zip(slots(model).values(), layers, strict=True))
    assert torch.equal(model(IDS), before)


def test_the_model_is_put_back_after_an_error():
    model = make()
    layers = [getattr(*place) for place in slots(model).values()]
    with pytest.raises(KeyError), watched(model, lambda name, x: {}[name]):
        model(IDS)
    assert all(getattr(*place) is layer for place, layer in zip(slots(model).values(), layers, strict=True))


def test_a_layer_that_is_not_seen_is_an_error():
    """Else its maxima would be missing or those of fewer tokens, in silence."""
    model = make()
    model.layers[1].mlp.forward = lambda x, batch=None: x  # as a replaced method would
    with pytest.raises(RuntimeError, match="each linear layer to see 60 tokens"):
        activation_maxima(model, IDS)


def test_outliers_are_found():
    maxima = {"a": torch.tensor([1.0, 2, 3, 50, 2]), "b": torch.tensor([0.1, 0.1, 1.5, 0.1])}
    found = outlier_channels(maxima, times=10)
    assert [(o.name, o.channel, o.largest, o.times_median) for o in found] == [
        ("a", 3, 50.0, 25.0),
        ("b", 2, 1.5, pytest.approx(15)),
    ]
    norms = {n: x for n, x in activation_maxima(make(), IDS).items() if n.endswith(NORMS)}
    channels = {n: {o.channel for o in outlier_channels(norms) if o.name == n} for n in norms}
    assert all(c == {3, 20, 41} for c in channels.values()), channels


# ---- smoothing


@pytest.mark.parametrize("alpha", [0, 0.5, 0.8, 1])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_the_same_function(changes, alpha, dtype, tolerance):
    model = make(dtype, **changes)
    maxima, revision = activation_maxima(model, IDS), model.revision
    weights = {name: p.clone() for name, p in model.named_parameters()}
    with use("reference" if dtype == torch.float64 else "auto"):  # whose norms compute in fp64
        before = model(IDS)
        used = smooth(model, maxima, alpha)
        after = model(IDS)
    assert torch.allclose(after, before, rtol=0, atol=tolerance * before.abs().max())
    assert set(used) == set(slots(model))
    assert model.revision > revision
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, weights[name])}
    assert not any(name.startswith(("norm", "embed", "lm_head")) or "q_norm" in name for name in changed)
    assert {n.rpartition(".")[0] for n in changed if n.endswith("proj.weight")} == set(slots(model))


@pytest.mark.parametrize("alpha", [0.5, 1])
def test_channels_become_alike(alpha):
    """What each layer reads is x / s: with alpha 1 all maxima are equal, with 0.5 they follow the weights'."""
    model = make()
    before, maxima = inputs(model, IDS), activation_maxima(model, IDS)
    used = smooth(model, maxima, alpha, NORMS)
    for name, x in inputs(model, IDS).items():
        assert torch.allclose(x * used.get(name, 1), before[name], rtol=1e-4, atol=1e-5), name
        if name in used:
            x_max = x.flatten(0, -2).abs().amax(0)
            ratio = x_max / getattr(*slots(model)[name]).weight.abs().amax(0) if alpha == 0.5 else x_max
            assert (ratio.max() / ratio.min()).item() == pytest.approx(1, abs=1e-4)
    used = smooth(model, maxima, alpha, ("o_proj", "down_proj"))
    assert set(used) == {name for name in slots(model) if not name.endswith(NORMS)}
    for name, x in inputs(model, IDS).items():
        if name in used:
            assert torch.allclose(x * used[name], before[name], rtol=1e-4, atol=1e-5), name


def test_strengths():
    x, w = torch.tensor([100.0, 1, 4, 0, 2]), torch.tensor([0.5, 0.5, 1, 1, 0])
    s = migration(x, w, 0.5)
    assert s[3:].tolist() == [1, 1], "a channel of zeros is left alone"
    raw = (x.sqrt() / w.sqrt())[:3]
    assert torch.allclose(s[:3], raw / raw.prod() ** (1 / 3))
    assert torch.allclose((x / s)[:3] / (w * s)[:3], ((x / s) / (w * s))[0].expand(3)), "both sides equally hard"
    assert torch.equal(migration(torch.zeros(3), torch.ones(3), 0.5), torch.ones(3))
    assert migration(torch.tensor([1e30, 1e-30]), torch.ones(2), 1).isfinite().all()
    for alpha in (-0.1, 1.1):
        with pytest.raises(ValueError, match="alpha: expected 0 to 1"):
            migration(x, w, alpha)


def test_query_heads_of_a_value_head_share():
    model = make(**VARIANTS["llama"])
    used = smooth(model, activation_maxima(model, IDS), 0.7)["layers.0.self_attn.o_proj"].view(2, 2, 16)
    assert torch.equal(used[:, 0], used[:, 1])
    assert not torch.equal(used[0], used[1])


def test_rounding_hurts_less():
    model = make(torch.float32)
    exact, maxima = model(IDS), activation_maxima(model, IDS)
    error = {None: (rounded(model)(IDS) - exact).square().mean().item()}
    for where in (NORMS, ALL):
        smoothed = copy.deepcopy(model)
        smooth(smoothed, maxima, 0.5, where)
        error[where] = (rounded(smoothed)(IDS) - exact).square().mean().item()
    assert error[ALL] < error[None] / 3
    assert error[NORMS] < error[None] / 3


def test_the_best_alpha_of_each_layer():
    """Against trying each on the model itself, one layer at a time."""
    model, tried = make(torch.float32), (0.0, 0.5, 0.9)
    maxima = activation_maxima(model, IDS)
    best = best_alphas(model, IDS, maxima, tried)
    assert set(best) == set(slots(model))
    seen = inputs(model, IDS)
    for name in slots(model):
        exact = getattr(*slots(model)[name]).weight
        errors = []
        for alpha in tried:
            smoothed = copy.deepcopy(model)
            s = smooth(smoothed, maxima, alpha, (name.rpartition(".")[2],))[name]
            layer = Rounded(getattr(*slots(smoothed)[name]))
            layer.bias = None
            errors.append((layer(seen[name] / s) - seen[name] @ exact.T).square().sum().item())
        assert best[name] == tried[errors.index(min(errors))], (name, errors)
    assert set(smooth(model, maxima, best)) == set(best)


def test_what_cannot_be_smoothed():
    model = make()
    maxima = activation_maxima(model, IDS)
    with pytest.raises(ValueError, match="where: expected some of"):
        smooth(model, maxima, where=("lm_head",))
    with pytest.raises(TypeError, match=r"layers\.0\.self_attn\.qkv_proj, got Rounded; smooth before you quantize"):
        smooth(rounded(model), maxima)


# ---- the real model


def test_outliers_of_smollm2(smollm, smollm_path):
    """Its first token holds one activation that is thousands of times the others, in the same channel in all layers
    but the first and last few."""
    ids = torch.arange(1000, 1064)[None]
    streams = residual_streams(smollm, ids)[:, 0].abs()  # [31, 64, 576]
    for stream in streams[12:29]:
        token, channel = divmod(int(stream.argmax()), 576)
        assert (token, channel) == (0, 507)
        assert stream.max() > 1000 * stream.median()
    assert streams[0].max() < 100 * streams[0].median()
