"""Whole checkpoints that GPTQ and AWQ wrote: loaded, served, and written anew as ours."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minillm.config import ModelConfig
from minillm.kernels import use
from minillm.model import Transformer
from minillm.model.weights import load, save
from minillm.quant import QuantLinear

from .test_importers import AWQ, GPTQ, Layer

CONFIG = ModelConfig(300, 64, 128, 2, 4, 2, 16, max_position_embeddings=128)
IDS = torch.randint(0, 300, (2, 11), generator=torch.Generator().manual_seed(0))


def checkpoint(folder, about: dict, method: str, act_order=False) -> Transformer:
    """A random model in a folder, quantized -> the same model with plain weights."""
    torch.manual_seed(0)
    plain = Transformer(CONFIG).eval().requires_grad_(False)
    save(plain, folder)
    tensors, weights = load_file(folder / "model.safetensors"), {}
    for i, name in enumerate([name for name in tensors if "layers" in name and name.endswith("proj.weight")]):
        n, k = tensors.pop(name).shape
        layer = Layer(i, n, k, symmetric=about.get("sym", not about.get("zero_point", True)))
        if act_order:  # the same for all with such rows, as what one product joins must have it
            layer.g = np.random.default_rng(k).permutation(layer.g)
            layer.weight = torch.from_numpy(
                (layer.u - layer.z[:, layer.g]) * layer.s[:, layer.g].astype(np.float32)
            ).float()
        part = name.removesuffix("weight")
        tensors |= {part + own: t for own, t in getattr(layer, method)().items()}
        weights[name] = layer.weight
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": about}))
    reference = folder.parent / "plain"
    save(plain, reference)
    save_file({**load_file(reference / "model.safetensors"), **weights}, reference / "model.safetensors")
    return load(reference, device="cpu", dtype="float32")


@pytest.mark.parametrize(("about", "method"), [
    (GPTQ, "gptq"), ({**GPTQ, "sym": True}, "gptq"), (AWQ, "awq"), ({**AWQ, "zero_point": False}, "awq"),
])  # fmt: skip
def test_it_computes_what_its_weights_say(tmp_path, about, method):
    plain = checkpoint(tmp_path / "model", about, method)
    model = load(tmp_path / "model", device="cpu", dtype="float32")
    assert isinstance(model.layers[1].mlp.down_proj, QuantLinear)
    with use("reference", "w4a16"):
        torch.testing.assert_close(model(IDS), plain(IDS), atol=1e-4, rtol=1e-4)
    save(model, tmp_path / "again")
    again = load(tmp_path / "again", device="cpu", dtype="float32")
    assert torch.equal(again(IDS), model(IDS))


def test_act_order(tmp_path):
    """The columns of x are taken in the order of the groups."""
    plain = checkpoint(tmp_path / "model", {**GPTQ, "desc_act": True}, "gptq", act_order=True)
    model = load(tmp_path / "model", device="cpu", dtype="float32")
    assert model.layers[0].mlp.gate_up_proj.order is not None
    with use("reference", "w4a16"):
        torch.testing.assert_close(model(IDS), plain(IDS), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="g_idx: a checkpoint quantized in order of activations"):
        model.layers[0].mlp.gate_up_proj.tensors()


def test_parts_of_one_product_need_one_order(tmp_path):
    checkpoint(tmp_path / "model", {**GPTQ, "desc_act": True}, "gptq", act_order=True)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.k_proj.g_idx"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.k_proj\.g_idx: expected the groups of q_proj"):
        load(tmp_path / "model", device="cpu")


def test_a_part_that_is_missing_is_named(tmp_path):
    checkpoint(tmp_path / "model", AWQ, "awq")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.qzeros"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"lacks tensor model\.layers\.0\.mlp\.up_proj\.qzeros"):
        load(tmp_path / "model", device="cpu")
