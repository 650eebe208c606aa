"""Rotation: orthogonal, and the function stays what it was."""

import pytest
import torch

from minillm.config import ModelConfig
from minillm.model.layers import RMSNorm
from minillm.model.weights import load, save
from minillm.quant.calibrate import rtn_model, sites
from minillm.quant.rotation import hadamard, random_hadamard, rotate_model
from minillm.quant.rtn import Scheme

from .test_calibrate import LLAMA, QWEN, text, tiny

BIASED = ModelConfig(
    60, 48, 64, 2, 4, 2, 8, max_position_embeddings=64, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True
)


class TestMatrix:
    @pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 20, 24, 28, 36, 64, 128, 576, 896, 1536])
    def test_plus_and_minus_one_with_orthogonal_rows(self, n):
        h = hadamard(n)
        assert (h.abs() == 1).all()
        assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))  # small integers: exact

    @pytest.mark.parametrize("n", [0, 3, 9, 6, 22])
    def test_no_such_size(self, n):
        with pytest.raises(ValueError, match="n: expected"):
            hadamard(n)

    def test_random_signs(self):
        r = random_hadamard(576)
        torch.testing.assert_close(r @ r.T, torch.eye(576, dtype=torch.float64), rtol=0, atol=1e-13)
        assert torch.equal(r, random_hadamard(576))
        assert not torch.equal(r, random_hadamard(576, seed=1))
        torch.testing.assert_close(r.abs(), torch.full_like(r, 1 / 24))


class TestModel:
    @pytest.mark.parametrize("heads", [True, False])
    @pytest.mark.parametrize("config", [LLAMA, QWEN, BIASED], ids=["llama", "qwen", "biased"])
    def test_computes_the_same(self, config, heads, monkeypatch):
        """With norms in fp64, too, which the model has in fp32, to the last digits."""
        monkeypatch.setattr(
            RMSNorm, "forward", lambda n, x: x / (x.square().mean(-1, keepdim=True) + n.eps).sqrt() * n.weight
        )
        model = tiny(config).double()
        turned = rotate_model(model, heads=heads)
        for a, b in zip(model.logits(model(text())), turned.logits(turned(text())), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # logits are fp32
        x = model(text())
        scale = model.norm.weight
        r = random_hadamard(config.hidden_size)
        torch.testing.assert_close(turned(text()), (x / scale) @ r, rtol=1e-9, atol=1e-9)

    def test_in_fp32(self):
        model = tiny()
        turned = rotate_model(model)
        torch.testing.assert_close(turned.logits(turned(text())), model.logits(model(text())), rtol=1e-4, atol=1e-4)

    def test_everything_was_turned(self):
        model = tiny()
        turned = rotate_model(model)
        for name, linear in sites(turned).items():
            assert not torch.isclose(linear.weight, model.get_submodule(name).weight).all(0).any() or "qkv" in name
        qkv = [m.layers[0].self_attn.qkv_proj.tensors()["v_proj.weight"] for m in (model, turned)]
        without = rotate_model(model, heads=False).layers[0].self_attn.qkv_proj.tensors()["v_proj.weight"]
        assert not torch.allclose(qkv[1], without)
        assert all((norm == 1).all() for name, norm in turned.named_parameters() if "norm" in name)

    def test_the_model_itself_stays(self):
        model = tiny()
        before = {name: p.clone() for name, p in model.named_parameters()}
        rotate_model(model)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert model.tied
        assert model.config.tie_word_embeddings

    def test_the_head_is_its_own_and_is_saved(self, tmp_path):
        turned = rotate_model(tiny())
        assert not turned.tied
        assert not turned.config.tie_word_embeddings
        assert turned.lm_head.weight.data_ptr() != turned.embed_tokens.weight.data_ptr()
        again = load(save(turned, tmp_path / "turned"), "cpu", "float32")
        torch.testing.assert_close(again.logits(again(text())), turned.logits(turned(text())))

    def test_an_outlier_channel_goes_under(self):
        """What it is for: one channel of the stream is written and read by far larger weights."""
        model = tiny()
        for name, linear in sites(model).items():
            if name.endswith(("qkv_proj", "gate_up_proj")):
                linear.weight[:, 3] *= 50
        for layer in model.layers:
            layer.input_layernorm.weight[3] /= 50
            layer.post_attention_layernorm.weight[3] /= 50
        turned, scheme = rotate_model(model), Scheme(4, "int", True, "channel")
        for name, linear in sites(turned).items():
            if name.endswith(("qkv_proj", "gate_up_proj")):
                assert linear.weight.abs().amax() < 8 * linear.weight.square().mean().sqrt()
        expected = model(text()) / model.norm.weight
        r = random_hadamard(32).float()
        rtn_model(turned, scheme)
        error = (turned(text()) @ r.T - expected).square().mean()
        rtn_model(model, scheme)
        assert error < 0.5 * (model(text()) / model.norm.weight - expected).square().mean()

    def test_a_size_without_a_matrix(self):
        with pytest.raises(ValueError, match="n: expected"):
            rotate_model(tiny(ModelConfig(60, 18, 32, 1, 2, 1, 8, max_position_embeddings=64)))
