"""LoRA's layer, its training and its merging, against the formula, autograd on plain weights, and finite sums."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.adapters import LoraConfig, adapted, adapter_of, attach, detach, merge, unmerge
from minillm.adapters.bottleneck import BottleneckLinear
from minillm.adapters.lora import Adapter, LoraLinear, Pair, described, modules
from minillm.adapters.training import Example, loss_of, train
from minillm.config import ModelConfig
from minillm.model import Transformer
from minillm.quant import quantize_model
from minillm.quant.methods import on_the_fly

IDS = torch.arange(24).view(2, 12) * 5 % 60


def tiny(seed: int = 0, **options) -> Transformer:
    torch.manual_seed(seed)
    config = ModelConfig(60, 32, 64, 2, 4, 2, 8, max_position_embeddings=64, eos_token_ids=(7,), **options)
    model = Transformer(config).eval().requires_grad_(False)
    model.reset_parameters(std=0.2)
    return model


def drawn(model: Transformer, config: LoraConfig, seed: int = 1) -> Adapter:
    """An adapter that is not nothing, attached."""
    adapted(model, config)
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return adapter_of(model, config)


def logits(model: Transformer) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(IDS))


def test_a_new_adapter_changes_nothing_and_trains_alone():
    model = tiny()
    before = logits(model)
    adapted(model, LoraConfig(r=3, target_modules=("q_proj", "down_proj")))
    assert torch.equal(logits(model), before)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 2 * 2
    assert all("lora_" in name for name in names)
    a = model.layers[0].mlp.down_proj.lora_a["down_proj"]
    assert a.shape == (3, 64)
    assert a.abs().max() <= 1 / 8
    assert a.std() > 0.05


def test_the_layer_is_the_formula():
    """Of a merged layer each part has its own; the third has none."""
    model = tiny()
    base = model.layers[0].self_attn.qkv_proj
    torch.manual_seed(2)
    pairs = {
        "q_proj": Pair(torch.randn(3, 32), torch.randn(32, 3), 0.5),
        "v_proj": Pair(torch.randn(2, 32), torch.randn(16, 2), 2.0),
    }
    layer, x = LoraLinear(base, pairs), torch.randn(4, 7, 32)
    w = base.weight.clone()
    w[:32] += 0.5 * pairs["q_proj"].b @ pairs["q_proj"].a
    w[48:] += 2.0 * pairs["v_proj"].b @ pairs["v_proj"].a
    torch.testing.assert_close(layer(x), x @ w.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_and_back(dtype):
    model = tiny().to(dtype)
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    before = logits(model)
    drawn(model, LoraConfig(r=4, lora_alpha=3, target_modules="all-linear"))
    expected = logits(model)
    revision = model.revision
    adapter = merge(model)
    assert model.revision > revision
    assert not any(isinstance(m, LoraLinear) for m in model.modules())
    limit = 1e-5 if dtype == torch.float32 else 0.1
    assert (logits(model) - expected).abs().max() < limit * expected.abs().max()
    assert (logits(model) - before).abs().max() > 0.2
    unmerge(model, adapter)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, plain[name], atol=1e-6 if dtype == torch.float32 else 0.02, rtol=0)


def test_detaching_gives_the_model_back():
    model = tiny()
    before = logits(model)
    adapter = drawn(model, LoraConfig(target_modules=("gate_proj",)))
    changed = logits(model)
    assert detach(model).digest == adapter.digest
    assert torch.equal(logits(model), before)
    attach(model, adapter)
    assert torch.equal(logits(model), changed)


@settings(max_examples=15)
@given(st.integers(1, 9), st.floats(-40, 40), st.booleans(), st.integers(1, 5), st.floats(0.1, 9))
def test_a_config_is_found_again_from_pairs(r, alpha, rs, other, other_alpha):
    config = LoraConfig(
        r,
        alpha,
        ("q_proj", "up_proj"),
        rank_pattern={"up_proj": other},
        alpha_pattern={"layers.0.mlp.up_proj": other_alpha},
        use_rslora=rs,
    )
    adapter = adapter_of(adapted(tiny(), config))
    again = described(adapter.pairs)
    assert set(again.targets(modules(tiny()))) == set(adapter.pairs)
    for name, pair in adapter.pairs.items():
        assert again.rank(name) == pair.a.shape[0]
        assert again.scale(name) == pytest.approx(config.scale(name))


def test_the_digest_is_of_all_that_counts():
    pair = Pair(torch.ones(2, 32), torch.ones(32, 2), 1.0)
    name = "model.layers.0.self_attn.q_proj"
    config = LoraConfig()
    same = Adapter(LoraConfig(r=3), {name: Pair(torch.ones(2, 32), torch.ones(32, 2), 1.0)})
    first = Adapter(config, {name: pair})
    assert first.digest == same.digest
    others = [
        Pair(pair.a * 2, pair.b, 1.0),
        Pair(pair.a, pair.b * 2, 1.0),
        Pair(pair.a, pair.b, 2.0),
        Pair(pair.a.half(), pair.b, 1.0),
    ]
    digests = {Adapter(config, {name: other}).digest for other in others}
    digests.add(Adapter(config, {name.replace("q_", "k_"): pair}).digest)
    assert len(digests | {first.digest}) == 6


BAD = [
    ({"target_modules": ("c_attn",)}, "target_modules: .*c_attn.*q_proj"),
    ({"target_modules": ("lm_head.x",)}, "target_modules"),
]


@pytest.mark.parametrize(("options", "says"), BAD)
def test_targets_that_name_nothing(options, says):
    with pytest.raises(ValueError, match=says):
        adapted(tiny(), LoraConfig(**options))


def test_a_second_adapter_is_refused():
    model = adapted(tiny(), LoraConfig())
    with pytest.raises(ValueError, match="detach or merge"):
        adapted(model, LoraConfig())
    with pytest.raises(ValueError, match="expected one with an adapter"):
        adapter_of(tiny())


# ---- on few bits -----------------------------------------------------------------------------------------------------


def few_bits(kind: str) -> Transformer:
    model = tiny()
    if kind == "act-order":
        return quantize_model(model, "gptq", bits=4, group_size=16, calibration=IDS)
    return on_the_fly(model, kind)


@pytest.mark.parametrize("kind", ["int4", "int8", "w8a8"])
def test_gradients_through_few_bits_are_those_of_what_they_mean(kind):
    """QLoRA: A and B of both layers, against the same adapter on the weights read back."""
    model = few_bits(kind)
    adapter = drawn(model, LoraConfig(r=3, target_modules="all-linear"))
    plain = tiny()
    for name, layer in modules(plain).items():
        if name in adapter.pairs:
            part = name.rpartition(".")[2]
            base = modules(model)[name].base
            before = sum(base.parts[p] for p in list(base.parts)[: list(base.parts).index(part)])
            rows = slice(before, before + base.parts[part])
            layer.weight[rows] = base.quantized().dequantize(torch.float32)[rows]
    attach(plain, adapter).requires_grad_(False)
    examples = [Example([3, 9, 1, 4, 20, 33], 2), Example([5, 6, 7], 1)]
    grads = []
    for m in (model, plain):
        for p in m.parameters():
            p.requires_grad_(
                p.dim() == 2
                and any(
                    p is q
                    for layer in m.modules()
                    if isinstance(layer, LoraLinear)
                    for q in (*layer.lora_a.values(), *layer.lora_b.values())
                )
            )
        loss_of(m, examples)[0].backward()
        grads.append({name: p.grad for name, p in m.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) == 2 * 7 * 2
    for name, grad in grads[0].items():
        cosine = torch.nn.functional.cosine_similarity(grad.flatten(), grads[1][name].flatten(), 0)
        assert cosine > 0.98, name  # products on a CPU round their inputs


def test_merging_into_few_bits_loses_much_of_a_small_change():
    model = few_bits("int4")
    before = logits(model)
    adapter = drawn(model, LoraConfig(r=2, lora_alpha=0.5, target_modules="all-linear"))
    wanted = logits(model)
    merge(model)
    left = (logits(model) - wanted).norm() / (wanted - before).norm()
    assert left > 0.05
    with pytest.raises(ValueError, match="few bits cannot be unmerged"):
        unmerge(model, adapter)


# ---- training --------------------------------------------------------------------------------------------------------

EXAMPLES = [Example([i, 50, (i * 3) % 40, 7], 2) for i in range(40)]


@pytest.mark.parametrize("kind", ["dense", "int4"])
def test_training_learns_and_leaves_the_base_alone(kind):
    model = tiny() if kind == "dense" else few_bits("int4")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapted(model, LoraConfig(r=8, lora_alpha=16))
    revision = model.revision
    losses = train(model, EXAMPLES, 60, lr=2e-2, progress=False)
    assert losses[-1] < 0.5 * losses[0]
    assert model.revision > revision
    detach(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_accumulating_is_one_batch():
    """Though parts have answers of different lengths."""
    examples = [Example([1, 2, 3], 1), Example([4, 5, 6, 7, 8, 9, 10], 1), Example([3, 1], 1), Example([9, 9, 9, 9], 3)]
    found = []
    for accumulate in (1, 2, 4):
        model = adapted(tiny(), LoraConfig())
        losses = train(model, examples, 3, batch_size=4, accumulate=accumulate, progress=False)
        found.append((losses, adapter_of(model)))
    for losses, adapter in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-5)
        for name, pair in adapter.pairs.items():
            torch.testing.assert_close(pair.b, found[0][1].pairs[name].b, atol=1e-5, rtol=1e-4)


def test_the_loss_is_of_answers_alone():
    model, example = tiny(), Example([3, 9, 1, 4], 2)
    total, count = loss_of(model, [example, Example([8, 2], 1)])
    alone = 0.0
    for ids, first in (([3, 9, 1, 4], 2), ([8, 2], 1)):
        logp = model.logits(model(torch.tensor([ids]))).log_softmax(-1)[0]
        alone -= sum(float(logp[i - 1, ids[i]]) for i in range(first, len(ids)))
    assert count == 3
    assert float(total) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"steps": 0}, "steps"), ({"batch_size": 0}, "batch_size"), ({"batch_size": 4, "accumulate": 3}, "accumulate")],
)
def test_training_arguments_are_named(options, says):
    model = adapted(tiny(), LoraConfig())
    with pytest.raises(ValueError, match=f"{says}: expected"):
        train(model, EXAMPLES, **{"steps": 2, "progress": False, **options})
    with pytest.raises(ValueError, match="examples: expected"):
        train(model, [], 2)
    with pytest.raises(ValueError, match="with gradients"):
        train(tiny(), EXAMPLES, 2)
    with pytest.raises(ValueError, match="given: expected"):
        Example([1, 2], 2)


def test_a_loss_that_is_no_number_ends_it():
    model = adapted(tiny(), LoraConfig())
    model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="lower lr"):
        train(model, EXAMPLES, 2, progress=False)


@pytest.mark.parametrize("order", [None, torch.arange(32).flip(0)], ids=["in order", "ordered"])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_merging_into_few_bits_leaves_other_rows_and_the_order_alone(kind, order):
    """k and v keep their integers, scales and zero points when q is adapted; columns are those that they were."""
    model = few_bits(kind)
    layer = modules(model)["model.layers.0.self_attn.q_proj"]
    layer.set(layer.quantized(), layer.bias, torch.device("cpu"), order)
    drawn(model, LoraConfig(r=2, lora_alpha=32, target_modules=("q_proj",)))
    wanted, before, first = logits(model), layer.quantized(), layer.parts["q_proj"]
    merge(model)
    after = layer.quantized()
    assert layer.order is None if order is None else torch.equal(layer.order, order)
    assert torch.equal(after.dequantize()[first:], before.dequantize()[first:])
    assert not torch.equal(after.dequantize()[:first], before.dequantize()[:first])
    assert (logits(model) - wanted).norm() / wanted.norm() < (0.4 if kind == "int4" else 0.05)


def test_what_cannot_be_merged_is_told_before_anything_changes():
    model = tiny()
    adapter = drawn(model, LoraConfig(r=2, target_modules=("q_proj", "down_proj")))
    detach(model)
    model.layers[1].mlp.down_proj = BottleneckLinear(model.layers[1].mlp.down_proj, 4)
    before = model.layers[0].self_attn.qkv_proj.weight.clone()
    with pytest.raises(ValueError, match="down_proj"):
        unmerge(model, adapter)
    assert torch.equal(model.layers[0].self_attn.qkv_proj.weight, before)
