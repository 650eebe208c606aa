"""transformers and compressed-tensors read what follows our conventions, and compute the same with it."""

import pytest
import torch

pytest.importorskip("compressed_tensors", exc_type=ImportError)

from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from .oracle import IDS, KINDS, write


def read(folder, **options):
    """As a user would; transformers only warns of weights that it draws at random, so look."""
    model, told = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )  # fmt: skip
    assert not any(told.values()), told
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_logits(name, tmp_path):
    right, _ = write(tmp_path, KINDS[name])
    # Packed zero points do not fit into the layers that it builds, but it can dequantize them.
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if "asymmetric" in name else {}
    assert torch.equal(read(tmp_path, **options)(IDS).logits, right(IDS).logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_weights(name, tmp_path):
    _, weights = write(tmp_path, KINDS[name])
    model = read(tmp_path, quantization_config=CompressedTensorsConfig(dequantize=True))
    for layer, weight in weights.items():
        assert torch.equal(model.get_submodule(layer).weight, weight.dequantize()), layer
