"""AWQ: scales that help rounding and change nothing before it."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm.quant.awq import awq_model, fold, magnitudes, search_scale
from minillm.quant.calibrate import rtn_model, sites, walk
from minillm.quant.gptq import fit_grid
from minillm.quant.rtn import Scheme, fake_quantize

from .test_calibrate import ALL, LLAMA, QWEN, text, tiny
from .test_rotation import BIASED

SCHEME = Scheme(3, "int", False, "group", 16)
configs = pytest.mark.parametrize("config", [LLAMA, QWEN, BIASED], ids=["llama", "qwen", "biased"])


def scales(model, seed: int = 0) -> dict[str, torch.Tensor]:
    """Any, but for o_proj one a value head."""
    g = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(x.in_features, generator=g).exp() for name, x in sites(model).items()}
    for name in found:
        if name.endswith("o_proj"):
            found[name] = found[name].view(2, 2, 8)[:, :1].expand(2, 2, 8).reshape(-1)
    return found


def problem(seed: int = 0, tokens: int = 300):
    """A few channels are large."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 64, generator=g) * torch.randn(64, generator=g).exp()
    return torch.randn(24, 64, generator=g), x, x.T @ x / tokens


class TestFold:
    @configs
    def test_computes_the_same(self, config):
        model = tiny(config).double()
        folded = copy.deepcopy(model)
        fold(folded, scales(model))
        torch.testing.assert_close(folded(text()), model(text()), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("name", ALL[:4])
    def test_inputs_are_divided_and_columns_multiplied(self, name):
        model = tiny(BIASED).double()
        folded, scale = copy.deepcopy(model), scales(model)[name]
        fold(folded, {name: scale})
        before, after = ({s.name: s.inputs[0] for s in walk(m, [text()])} for m in (model, folded))
        for other in ALL:
            torch.testing.assert_close(after[other], before[other] / (scale if other == name else 1.0))
        weights = [m.get_submodule(name).weight for m in (model, folded)]
        torch.testing.assert_close(weights[1], weights[0] * scale)

    def test_in_fp32(self):
        model = tiny()
        folded = copy.deepcopy(model)
        fold(folded, scales(model))
        torch.testing.assert_close(folded.logits(folded(text())), model.logits(model(text())), rtol=1e-4, atol=1e-4)
        assert folded.revision > model.revision

    def test_scales_that_query_heads_cannot_share(self):
        model = tiny()
        with pytest.raises(ValueError, match=r"layers.0.self_attn.o_proj: expected one scale for all query heads"):
            fold(model, {ALL[1]: torch.rand(32) + 0.5})

    @pytest.mark.parametrize("bad", [torch.ones(31), torch.zeros(32), -torch.ones(32), torch.full((32,), torch.inf)])
    def test_bad_scales(self, bad):
        with pytest.raises(ValueError, match="32 positive scales"):
            fold(tiny(), {ALL[0]: bad})

    def test_unknown_layer(self):
        with pytest.raises(ValueError, match=r"names such as layers.0.self_attn.qkv_proj, got lm_head"):
            fold(tiny(), {"lm_head": torch.ones(32)})


class TestMagnitudes:
    def test_mean_of_absolute_values_over_all_tokens(self):
        a, b = torch.randn(5, 6), torch.randn(20, 6)
        torch.testing.assert_close(magnitudes([a, b]), torch.cat([a, b]).abs().mean(0))

    def test_query_heads_that_share_values(self):
        x = torch.randn(50, 6 * 4)  # 6 query heads, 2 value heads, 4 channels each
        found = magnitudes([x], (6, 2)).view(6, 4)
        mean = x.abs().mean(0).view(6, 4)
        for head in range(6):
            torch.testing.assert_close(found[head], mean[:3].mean(0) if head < 3 else mean[3:].mean(0))


class TestSearch:
    @given(st.integers(0, 2**31), st.sampled_from([SCHEME, Scheme(4, "int", True, "channel")]))
    def test_never_worse_than_none(self, seed, scheme):
        w, x, h = problem(seed)
        scale, strength = search_scale(w, h, magnitudes([x]), scheme)
        assert (scale > 0).all()
        assert 0 <= strength <= 1
        scaled = w * scale
        rounded = fake_quantize(scaled, fit_grid(scaled, scheme), scheme) / scale
        nearest = fake_quantize(w, fit_grid(w, scheme), scheme)
        loss = [float((x @ (q - w).T).square().mean()) for q in (rounded, nearest)]
        assert loss[0] <= loss[1] * 1.001
        assert (strength > 0) == (scale != 1).any()

    def test_helps_where_few_channels_are_large(self):
        w, x, h = problem()
        scale, strength = search_scale(w, h, magnitudes([x]), SCHEME)
        rounded = fake_quantize(w * scale, fit_grid(w * scale, SCHEME), SCHEME) / scale
        nearest = fake_quantize(w, fit_grid(w, SCHEME), SCHEME)
        assert strength > 0
        assert (x @ (rounded - w).T).square().mean() < 0.8 * (x @ (nearest - w).T).square().mean()
        largest = magnitudes([x]).argmax()
        assert scale[largest] == scale.max() > 1 > scale.min()
        assert float(scale.max() * scale.min()) == pytest.approx(1)

    def test_channels_that_are_always_zero(self):
        w, x, _ = problem()
        x[:, [0, 9]] = 0
        scale, strength = search_scale(w, x.T @ x / len(x), magnitudes([x]), SCHEME)
        assert scale.isfinite().all()
        assert strength > 0, "the others are scaled all the same"
        assert scale[0] == scale[9] == 1

    def test_no_input_at_all(self):
        w, _, h = problem()
        scale, strength = search_scale(w, 0 * h, torch.zeros(64), SCHEME)
        assert (scale == 1).all()
        assert strength == 0

    def test_a_mean_without_absolute_values_is_refused(self):
        w, x, h = problem()
        with pytest.raises(ValueError, match="absolute value missing"):
            search_scale(w, h, x.mean(0), SCHEME)


class TestModel:
    @configs
    def test_computes_the_same_and_rounds_better(self, config):
        model = tiny(config)
        for _, linear in sites(model).items():
            linear.weight *= 1 + torch.rand(linear.weight.shape[1])
        model.layers[0].input_layernorm.weight[[2, 7]] *= 20
        model.layers[1].post_attention_layernorm.weight[5] *= 20
        nearest, ours, told = copy.deepcopy(model), copy.deepcopy(model), []
        strengths = awq_model(ours, text(20).split(5), SCHEME, progress=told.append)
        assert list(strengths) == told == ALL
        assert max(strengths.values()) > 0
        test = text(20, seed=5)
        torch.testing.assert_close(ours(test), model(test), rtol=1e-3, atol=1e-3)
        rtn_model(ours, SCHEME)
        rtn_model(nearest, SCHEME)
        assert (ours(test) - model(test)).square().mean() < (nearest(test) - model(test)).square().mean()
