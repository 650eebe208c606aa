"""Tiny random compressed-tensors checkpoints, each kind that transformers reads, and what it must compute with them.

`write` shares the rounding of the package (`rtn`), as every writer must, but packs with compressed-tensors' own
functions: it is what our writer and reader are held against, and so knows neither.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from minillm.quant import QuantizedTensor, Scheme, fake_quantize, minmax_grid

SHAPE = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip
IDS = torch.arange(24).view(2, 12)


@dataclass(frozen=True)
class Kind:
    """How weights and, if at all, activations are quantized, and compressed-tensors' name of the format."""

    weights: Scheme
    format: str = "pack-quantized"
    activations: Scheme | None = None


KINDS = {
    "int4": Kind(Scheme(4, group_size=32)),
    "int4 asymmetric": Kind(Scheme(4, "int", False, group_size=32)),
    "int4 a channel": Kind(Scheme(4, strategy="channel")),
    "int3": Kind(Scheme(3, group_size=32)),
    "w8a16": Kind(Scheme(8, strategy="channel")),
    "w8a8": Kind(Scheme(8, strategy="channel"), "int-quantized", Scheme(8, strategy="channel")),
    "fp8": Kind(
        Scheme(8, "float", strategy="channel"), "float-quantized", Scheme(8, "float", strategy="channel")
    ),
}  # fmt: skip


def config(kind: Kind) -> dict:
    """The `quantization_config` of a kind."""

    def arguments(scheme: Scheme, strategy: str, dynamic: bool) -> dict:
        size = {} if scheme.group_size is None else {"group_size": scheme.group_size}
        return {
            "num_bits": scheme.bits, "type": scheme.kind, "symmetric": scheme.symmetric, "strategy": strategy,
            "dynamic": dynamic, **size,
        }  # fmt: skip

    group = {
        "targets": ["Linear"],
        "weights": arguments(kind.weights, kind.weights.strategy, False),
        "input_activations": kind.activations and arguments(kind.activations, "token", True),
    }
    return {
        "quant_method": "compressed-tensors", "format": kind.format, "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": group},
    }  # fmt: skip


def stored(quantized: QuantizedTensor, kind: Kind) -> dict[str, Tensor]:
    """A weight's tensors by names such as "weight_packed"."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    q, grid, bits = quantized.q, quantized.grid, kind.weights.bits
    if kind.format != "pack-quantized":
        return {"weight": q, "weight_scale": grid.scale}
    tensors = {
        "weight_packed": pack_to_int32(q, bits),
        "weight_scale": grid.scale,
        "weight_shape": torch.tensor(q.shape),
    }
    if grid.zero is not None:
        tensors["weight_zero_point"] = pack_to_int32(grid.zero.to(torch.int8), bits, packed_dim=0)
    return tensors


def write(folder: Path, kind: Kind) -> tuple[LlamaForCausalLM, dict[str, QuantizedTensor]]:
    """Fill an existing folder; returns the model that it means, activations rounded too, and its weights by name."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(copy.deepcopy(SHAPE)).float().eval()
    tensors, weights = model.state_dict(), {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            w = tensors.pop(f"{name}.weight")
            weights[name] = QuantizedTensor.round(w, minmax_grid(w, kind.weights), kind.weights)
            tensors |= {f"{name}.{part}": tensor for part, tensor in stored(weights[name], kind).items()}
            layer.weight.data = weights[name].dequantize()
            if kind.activations:
                layer.register_forward_pre_hook(lambda _, x, scheme=kind.activations: rounded(x[0], scheme))
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    about = SHAPE.to_dict() | {"architectures": ["LlamaForCausalLM"], "quantization_config": config(kind)}
    (folder / "config.json").write_text(json.dumps(about | {"dtype": "float32"}), encoding="utf-8")
    return model, weights


def rounded(x: Tensor, scheme: Scheme) -> Tensor:
    """Activations, a scale for each token.  [B, T, K] -> [B, T, K]"""
    rows = x.flatten(0, -2)
    return fake_quantize(rows, minmax_grid(rows, scheme), scheme).view(x.shape)
