"""From a model to a quantized one: the products of all decoder layers in few bits; the embedding and the head stay.

quantize_model(model, "gptq", bits=4, group_size=64, calibration=token_ids)
quantize_checkpoint("smollm2-135m-instruct", "out", "gptq")         # what `minillm quantize` does
LLM("smollm2-135m-instruct", quantization="int8")                   # on the fly, by rounding to the nearest
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..data import calibration as calibration_text
from ..files import atomic_directory, copy_tokenizer
from ..kernels.common import SINCE, TENSOR_CORES
from ..model import Transformer
from ..model.linear import Dense
from ..model.tokenizer_hf import load_tokenizer
from ..model.weights import load, model_path, resolve_device, save_into
from .awq import awq_model
from .calibrate import gptq_model, sites
from .formats import CompressedTensors
from .linear import QuantLinear, rounding
from .rtn import QuantizedTensor, Scheme, minmax_grid
from .smoothquant import activation_maxima, best_alphas, round_activations, smooth

__all__ = [
    "METHODS",
    "ON_THE_FLY",
    "check_device",
    "load_on_the_fly",
    "on_the_fly",
    "quantize_checkpoint",
    "quantize_model",
    "round_model",
]

# What each is for, in a line.
METHODS: Mapping[str, str] = MappingProxyType({
    "rtn": "round to the nearest",
    "gptq": "round column by column, the most used first, and let those to come make up for it (calibrated)",
    "awq": "scale up what meets large activations, then round (calibrated)",
    "smoothquant": "8-bit weights and activations, outliers moved from these into those (calibrated)",
    "fp8": "fp8 weights and activations; weights rounded as by gptq, for inputs in fp8 (calibrated)",
})  # fmt: skip
CALIBRATED = ("gptq", "awq", "smoothquant", "fp8")
# LLM(quantization=...): weights alone in 8 or 4 bits; weights and activations in 8.
ON_THE_FLY = {"int8": ("rtn", 8), "int4": ("rtn", 4), "w8a8": ("w8a8", 8), "fp8": ("fp8", 8)}
GROUPS = (128, 64, 32, 96, 48)  # sizes that torch has a product for on a CPU first

Progress = Callable[[str], object]


def quantize_model(
    model: Transformer, method: str = "gptq", *, bits: int | None = None, group_size: int | None = None,
    symmetric: bool = True, calibration: Tensor | None = None, progress: Progress | None = None,
) -> Transformer:  # fmt: skip
    """Quantize in place: every layer but the head becomes a `QuantLinear`, and the config says how. -> the model

    - method: of METHODS. bits: 2 to 8, 4 if not given; 8 for smoothquant and fp8. group_size: weights that share a
      scale; by default the first of 128, 64, 32, 96 and 48 that divides every row; 0: a whole row, as 8 bits have it.
    - symmetric: without zero points. calibration: token ids [windows, T] of text such as the model will read, for
      methods that look at activations. progress: called with each layer's name.

    Raises ValueError that names the argument for what cannot work, before anything is changed.
    """
    layers = sites(model)
    format = format_of(method, bits, group_size, symmetric, _rows(model))
    if method in CALIBRATED:
        if calibration is None:
            raise ValueError(f"calibration: expected token ids [windows, T] for method {method!r}, got none")
        ids = calibration.to(model.device)
        if method in ("gptq", "fp8"):
            read = partial(round_activations, scheme=format.scheme) if format.activations else None
            weights, _ = gptq_model(
                model, ids.split(8), format.scheme, order="activations", grid="error", scale_dtype=format.scale_dtype,
                progress=progress, read=read,
            )  # fmt: skip
            for name, weight in weights.items():
                _replace(model, name, QuantLinear.of(layers[name], weight, format))
            return _described(model, format)
        if method == "awq":
            awq_model(model, ids.split(8), format.scheme, scale_dtype=format.scale_dtype)
        else:
            maxima = activation_maxima(model, ids)
            smooth(model, maxima, best_alphas(model, ids[:2], maxima))
    return round_model(model, format, progress)


def round_model(model: Transformer, format: CompressedTensors, progress: Progress | None = None) -> Transformer:
    """Round every layer but the head to the nearest, in place, layer by layer. -> the model"""
    for name, layer in sites(model).items():
        weight = layer.weight.detach()
        grid = minmax_grid(weight, format.scheme, format.scale_dtype)
        rounded = QuantizedTensor.round(weight, grid, format.scheme)
        _replace(model, name, QuantLinear.of(layer, rounded, format))
        if progress is not None:
            progress(name)
    return _described(model, format)


def on_the_fly(model: Transformer, quantization: str) -> Transformer:
    """What `LLM(quantization=...)` does to a model without a checkpoint: one of ON_THE_FLY. -> the model

    Raises ValueError for another.
    """
    return _with_head(round_model(model, _format_on_the_fly(quantization, _rows(model))))


def check_device(device: torch.device, quantization: str | None, about: Mapping[str, Any] | None) -> None:
    """Raise ValueError for activations in 8 bits on a GPU whose tensor cores do not multiply them.

    quantization: of ON_THE_FLY, or None; about: a checkpoint's quantization_config, or None.
    """
    kind = {"int-quantized": "w8a8", "float-quantized": "fp8"}.get((about or {}).get("format", ""), quantization)
    since = {"w8a8": TENSOR_CORES, "fp8": SINCE[torch.float8_e4m3fn]}.get(kind or "", (0, 0))
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < since:
        raise ValueError(
            f"quantization: {kind} needs a GPU of compute capability {since[0]}.{since[1]} or later, got"
            f" {torch.cuda.get_device_name(device)}; take int8 or int4, whose activations stay in 16 bits"
        )


def load_on_the_fly(
    name: str | os.PathLike, quantization: str, device: str = "auto", dtype: str = "auto"
) -> Transformer:  # fmt: skip
    """A model of which each layer is rounded as it is read: of the unrounded ones there is never more than one.

    quantization: of ON_THE_FLY. Raises as `load`, and ValueError for another quantization.
    """
    config = ModelConfig.from_pretrained(model_path(name))
    attention = config.num_attention_heads * config.head_dim
    rows = {"qkv_proj, gate_up_proj": config.hidden_size, "o_proj": attention, "down_proj": config.intermediate_size}
    format = _format_on_the_fly(quantization, rows)
    model = load(name, device, dtype, rounding(format, resolve_device(device)))
    return _with_head(_described(model, format))


def _format_on_the_fly(quantization: str, rows: Mapping[str, int]) -> CompressedTensors:
    if quantization not in ON_THE_FLY:
        raise ValueError(f"quantization: expected one of {', '.join(ON_THE_FLY)}, got {quantization!r}")
    method, bits = ON_THE_FLY[quantization]
    return format_of(method, bits, None, True, rows)


def _with_head(model: Transformer) -> Transformer:
    """On a CPU the head is in 8 bits, too: of a small model's bytes for a token it is the largest part."""
    if model.device.type == "cpu" and isinstance(model.lm_head, Dense):
        weight, format = model.lm_head.weight.detach(), CompressedTensors(Scheme(8, strategy="channel"))
        rounded = QuantizedTensor.round(weight, minmax_grid(weight, format.scheme), format.scheme)
        model.lm_head, model.tied = QuantLinear.of(model.lm_head, rounded, format), False
    return model


def _rows(model: Transformer) -> dict[str, int]:
    """{layer: numbers in a row of its weight}"""
    return {name: layer.in_features for name, layer in sites(model).items()}


def _replace(model: Transformer, name: str, layer: QuantLinear) -> None:
    parent, _, slot = name.rpartition(".")
    setattr(model.get_submodule(parent), slot, layer)


def _described(model: Transformer, format: CompressedTensors) -> Transformer:
    """Say in the model's config what its layers are."""
    model.config = dataclasses.replace(model.config, quantization_config=format.to_config())
    model.revision += 1
    return model


def format_of(
    method: str, bits: int | None, group_size: int | None, symmetric: bool, rows: Mapping[str, int]
) -> CompressedTensors:
    """How a method's weights are stored, in layers whose rows are so long. Raises ValueError for what cannot work."""
    if method not in (*METHODS, "w8a8"):
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if method in ("smoothquant", "fp8", "w8a8"):
        if bits not in (None, 8):
            raise ValueError(f"bits: expected 8 for method {method!r}, whose activations are in 8 bits too, got {bits}")
        if group_size or not symmetric:
            raise ValueError(f"group_size, symmetric: expected one scale a row and no zero points for {method!r}")
        return CompressedTensors(Scheme(8, "float" if method == "fp8" else "int", strategy="channel"), True)
    bits = 4 if bits is None else bits
    if group_size is None:
        fits = [size for size in GROUPS if all(k % size == 0 for k in rows.values())]
        group_size = 0 if bits == 8 or not fits else fits[0]
    if group_size == 0:
        return CompressedTensors(Scheme(bits, symmetric=symmetric, strategy="channel"))
    scheme = Scheme(bits, symmetric=symmetric, group_size=group_size)
    for name, k in rows.items():
        try:
            scheme.groups(k)
        except ValueError as error:
            raise ValueError(f"{error} (layer {name})") from error
    return CompressedTensors(scheme)


def quantize_checkpoint(
    name: str | os.PathLike, out: str | os.PathLike, method: str = "gptq", *, bits: int | None = None,
    group_size: int | None = None, symmetric: bool = True, windows: int = 64, window: int = 512,
    device: str = "auto", progress: Progress | None = None,
) -> Path:  # fmt: skip
    """Read a model, quantize it, and write it to the new directory `out`, with its tokenizer: all of it or nothing.

    Calibrates on `windows` windows of `window` tokens of Python's language reference. Raises ValueError as
    `quantize_model` does, and if `out` exists.
    """
    target, source = Path(out), model_path(name)
    if target.exists():
        raise ValueError(f"out: {target} exists; give another directory, or delete it")
    config = ModelConfig.from_pretrained(source)
    if config.quantization_config is not None:
        raise ValueError(f"name: {source} is quantized already; start from the unquantized model")
    text = None
    if method in CALIBRATED:
        text = calibration_text(load_tokenizer(source), windows, min(window, config.max_position_embeddings))
    model = load(source, device=device, dtype="float32")
    quantize_model(
        model, method, bits=bits, group_size=group_size, symmetric=symmetric,
        calibration=text, progress=progress,
    )  # fmt: skip
    with atomic_directory(target) as folder:
        save_into(folder, model)
        copy_tokenizer(source, folder)
    return target
