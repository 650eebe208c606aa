"""Quantization-aware training: the gradient, the rounding, what it wins back."""

import copy

import pytest
import torch
import torch.nn.functional as F

from minillm.config import ModelConfig
from minillm.data import reference_text
from minillm.model import Transformer
from minillm.model.linear import Dense
from minillm.quant import Grid, Scheme, fake_quantize, minmax_grid
from minillm.quant.qat import FakeQuantLinear, fake_quantized, quantization_aware, straight_through, train

SCHEMES = {
    "int4 groups": Scheme(4, group_size=16),
    "int3 rows": Scheme(3, strategy="channel"),
    "int2, zero points": Scheme(2, symmetric=False, group_size=32),
    "int8 tensor": Scheme(8, strategy="tensor"),
    "fp8": Scheme(8, "float", strategy="channel"),
    "nf4": Scheme(4, "nf", group_size=16),
}


def make(**changes) -> Transformer:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    sizes |= {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 64}
    model = Transformer(ModelConfig(**{**sizes, "tie_word_embeddings": True, **changes}))
    model.reset_parameters(0.1)
    return model


IDS = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(1))


# ---- the gradient


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_rounded_forward_straight_backward(scheme):
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    grid = minmax_grid(w.detach(), scheme)
    y = straight_through(w, grid, scheme)
    assert torch.equal(y, fake_quantize(w.detach(), grid, scheme))
    upstream = torch.randn_like(y)
    y.backward(upstream)
    assert torch.equal(w.grad, upstream), "nothing lies beyond a grid that reaches to the largest number"


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_no_gradient_beyond_the_range(scheme):
    """Integers: where rounding moves a number by over half a step; other formats: beyond the largest level."""
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grid = minmax_grid(w.detach(), scheme, shrink=0.4)
    straight_through(w, grid, scheme).sum().backward()
    size = {"tensor": 64, "channel": 64, "group": scheme.group_size}[scheme.strategy]
    step = grid.scale.expand(8, -1).repeat_interleave(size, 1)[:, :64]  # [8, 64]
    if scheme.kind == "int":
        within = (fake_quantize(w.detach(), grid, scheme) - w.detach()).abs() <= step / 2 * 1.0001
    else:
        within = w.abs() <= step * {"float": 448, "nf": 1}[scheme.kind]
    assert 5 < (~within).sum() < w.numel() / 2
    assert torch.equal(w.grad, within.float())


def test_a_hand_made_example():
    scheme = Scheme(2, strategy="channel")  # -2, -1, 0, 1 times the scale
    w = torch.tensor([[-3.0, -2.4, -1.2, 0.3, 1.4, 1.6]], requires_grad=True)
    y = straight_through(w, Grid(torch.ones(1, 1)), scheme)
    assert y.tolist() == [[-2, -2, -1, 0, 1, 1]]
    y.sum().backward()
    assert w.grad.tolist() == [[0, 1, 1, 1, 1, 0]]


# ---- the layer and the model


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "mlp_bias": True, "qk_norm": True}], ids=["plain", "more"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_export_computes_what_was_trained(scheme, changes):
    """To the bit, after some steps; by plain layers that hold what was stored."""
    if scheme.strategy == "group" and scheme.group_size == 32:
        scheme = Scheme(scheme.bits, symmetric=scheme.symmetric, group_size=16)
    model = quantization_aware(make(**changes), scheme)
    text = torch.randint(0, 128, (400,), generator=torch.Generator().manual_seed(2))
    before = model.embed_tokens.weight.clone()
    train(model, text, steps=3, window=16, batch=2, lr=1e-2)
    assert not torch.equal(before, model.embed_tokens.weight)
    exported = Transformer(model.config)
    exported.load_state_dict(model.state_dict())
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, FakeQuantLinear)]
    assert len(layers) == 4 * len(model.layers)
    for name, layer in layers:
        stored = layer.quantized()
        assert stored.scheme == scheme
        assert stored.q.dtype == (torch.float8_e4m3fn if scheme.kind == "float" else torch.int8)
        exported.get_submodule(name).weight = torch.nn.Parameter(stored.dequantize())
    with torch.no_grad():
        assert torch.equal(exported.logits(exported(IDS)), model.logits(model(IDS)))


def test_an_exporter_with_its_own_scale_is_seen():
    """amax / 7 instead of amax / 7.5: the same weights, other logits."""
    scheme, model = SCHEMES["int4 groups"], make()
    model = quantization_aware(model, scheme)
    wrong = copy.deepcopy(model)
    for layer in wrong.modules():
        if isinstance(layer, FakeQuantLinear):
            w = layer.weight.detach()
            grid = minmax_grid(w, scheme)
            rounded = fake_quantize(w, Grid(grid.scale * 7.5 / 7), scheme)
            layer.forward = lambda x, batch=None, rounded=rounded, bias=layer.bias: F.linear(x, rounded, bias)
    with torch.no_grad():
        assert (wrong.logits(wrong(IDS)) - model.logits(model(IDS))).abs().max() > 1e-3


def test_untrained_it_is_the_model_rounded():
    scheme, model = SCHEMES["int3 rows"], make()
    rounded = copy.deepcopy(model)
    for name, layer in rounded.named_modules():
        if isinstance(layer, Dense) and name != "lm_head":
            w = layer.weight.detach()
            layer.weight = torch.nn.Parameter(fake_quantize(w, minmax_grid(w, scheme), scheme))
    aware = quantization_aware(model, scheme)
    assert torch.equal(aware(IDS), rounded(IDS))
    assert not torch.equal(aware(IDS), model(IDS))
    assert type(aware.lm_head) is Dense
    assert aware.lm_head.weight is aware.embed_tokens.weight
    assert aware.state_dict().keys() == model.state_dict().keys()


def test_the_fused_road_rounds_too():
    """What `Dense` does in one kernel multiplies by the weight itself."""
    model = quantization_aware(make(), SCHEMES["int3 rows"])
    layer = model.layers[0]
    x, stream = torch.randn(2, 1, 5, 32, generator=torch.Generator().manual_seed(3))
    for projection, norm in (
        (layer.self_attn.qkv_proj, layer.input_layernorm),
        (layer.mlp.gate_up_proj, layer.post_attention_layernorm),
    ):
        got, total = projection.add_norm(norm, x, stream)
        assert torch.equal(total, x + stream)
        assert torch.allclose(got, projection(norm(x + stream)), atol=1e-6)


def test_groups_that_do_not_fill_a_row():
    with pytest.raises(ValueError, match="group_size: expected a divisor of the row length 32, got 24"):
        Transformer(make().config, fake_quantized(Scheme(4, group_size=24)))


# ---- training


def test_training_wins_back_what_rounding_lost():
    """Two bits, characters of the reference."""
    text = "\n\n".join(reference_text().values())[:60_000]
    ids = torch.tensor([min(ord(c), 127) for c in text])
    model = make(num_hidden_layers=1)
    first = train(model, ids, steps=120, window=32, batch=16, lr=1e-2)

    def loss(model: Transformer) -> float:
        rows = ids[: 32 * 200].view(200, 32)
        with torch.no_grad():
            return F.cross_entropy(model.logits(model(rows[:, :-1])).flatten(0, 1), rows[:, 1:].flatten()).item()

    scheme = Scheme(2, strategy="channel")
    aware = quantization_aware(model, scheme)
    exact, rounded = loss(model), loss(aware)
    assert sum(first[-10:]) < sum(first[:10]) * 0.8
    assert rounded > exact + 0.2
    revision = aware.revision
    losses = train(aware, ids, steps=80, window=32, batch=16, lr=5e-3)
    assert len(losses) == 80
    assert aware.revision > revision
    assert loss(aware) < exact + (rounded - exact) / 2


def test_training_is_repeatable():
    ids = torch.randint(0, 128, (400,), generator=torch.Generator().manual_seed(2))
    a, b, c = (
        train(quantization_aware(make(), SCHEMES["int3 rows"]), ids, steps=3, window=16, batch=2, seed=seed)
        for seed in (0, 0, 1)
    )
    assert a == b
    assert a != c


def test_too_short_a_text():
    with pytest.raises(ValueError, match="token_ids: expected one text of over 16 tokens"):
        train(make(), torch.arange(16), window=16)
