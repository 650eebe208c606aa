"""Models in fewer bits: rounding, methods that lose less by it, the layers that compute with it, the file formats."""

from ..model.weights import QUANTIZED
from .formats import CompressedTensors
from .gguf import factory as gguf_factory
from .importers import parse
from .linear import QuantLinear, factory, imported
from .methods import (
    METHODS,
    ON_THE_FLY,
    check_device,
    load_on_the_fly,
    on_the_fly,
    quantize_checkpoint,
    quantize_model,
    round_model,
)
from .rtn import Grid, QuantizedTensor, Scheme, dequantize, error_grid, fake_quantize, minmax_grid, quantize

__all__ = [
    "METHODS",
    "ON_THE_FLY",
    "CompressedTensors",
    "Grid",
    "QuantLinear",
    "QuantizedTensor",
    "Scheme",
    "check_device",
    "dequantize",
    "error_grid",
    "fake_quantize",
    "load_on_the_fly",
    "minmax_grid",
    "on_the_fly",
    "quantize",
    "quantize_checkpoint",
    "quantize_model",
    "round_model",
]

# What `weights.load` makes of the quantization_config of a checkpoint.
QUANTIZED["compressed-tensors"] = lambda about: factory(CompressedTensors.from_config(about), about.get("ignore") or [])
QUANTIZED["gguf"] = gguf_factory
for _method in ("gptq", "awq"):
    QUANTIZED[_method] = lambda about: imported(parse(about))
