"""Models in fewer bits: rounding, methods that lose less by it, the layers that compute with it, the file formats."""

from .rtn import Grid, QuantizedTensor, Scheme, dequantize, error_grid, fake_quantize, minmax_grid, quantize

__all__ = ["Grid", "QuantizedTensor", "Scheme", "dequantize", "error_grid", "fake_quantize", "minmax_grid", "quantize"]
