"""The layer: what it computes against its dequantized weight, on every road; moved, saved, served."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from minillm.config import ModelConfig
from minillm.engine.engine import Engine
from minillm.generate import naive
from minillm.kernels import swiglu, use
from minillm.model import Transformer
from minillm.model.layers import RMSNorm
from minillm.model.linear import Dense
from minillm.quant import CompressedTensors, QuantizedTensor, QuantLinear, Scheme, minmax_grid, quantize_model
from minillm.sampling import SamplingParams

from .test_formats import EACH, FORMATS


def layer_of(format: CompressedTensors, k: int = 64, rows: int = 48, bias: bool = False) -> QuantLinear:
    torch.manual_seed(0)
    dense = Dense(k, {"a": rows - 16, "b": 16}, bias)
    if bias:
        torch.nn.init.normal_(dense.bias)
    grid = minmax_grid(dense.weight.detach(), format.scheme)
    return QuantLinear.of(dense, QuantizedTensor.round(dense.weight.detach(), grid, format.scheme), format)


def rounded_rows(x: torch.Tensor, format: CompressedTensors) -> torch.Tensor:
    """x as its product sees it."""
    if not format.activations:
        return x
    scheme = dataclasses.replace(format.scheme, strategy="channel")
    flat = x.reshape(-1, x.shape[-1])
    return QuantizedTensor.round(flat, minmax_grid(flat, scheme), scheme).dequantize().view(x.shape)


@EACH
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 5, 64), (0, 64)])
def test_it_multiplies_by_what_is_stored(format, bias, shape):
    layer = layer_of(format, bias=bias)
    x = torch.randn(shape)
    expected = F.linear(rounded_rows(x, format), layer.quantized().dequantize(), layer.bias)
    with use("reference"):
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    on_cpu = layer(x)  # x in bf16 on some roads: 8 bits of its numbers, and of the result's
    assert on_cpu.dtype == x.dtype
    torch.testing.assert_close(on_cpu, expected, atol=0.03, rtol=0.01)


@pytest.mark.parametrize("k", [60, 36])
@pytest.mark.parametrize("scheme", [Scheme(4, strategy="channel"), Scheme(3, strategy="channel")])
def test_rows_that_no_kernel_takes(k, scheme):
    layer = layer_of(CompressedTensors(scheme), k=k, rows=23)
    x = torch.randn(4, k)
    expected = F.linear(x, layer.quantized().dequantize())
    torch.testing.assert_close(layer(x), expected, atol=0.03, rtol=0.01)


@EACH
@pytest.mark.parametrize("with_stream", [False, True])
@pytest.mark.parametrize("use_swiglu", [False, True])
def test_norm_and_product_in_fewer_kernels(format, with_stream, use_swiglu):
    """The road of a GPU gives what the plain one gives."""
    layer, norm = layer_of(format, bias=True), RMSNorm(64, 1e-5)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    branch, stream = torch.randn(3, 64), torch.randn(3, 64) if with_stream else None
    total = branch if stream is None else branch + stream
    with torch.no_grad(), use("reference"):
        y, after = layer.add_norm(norm, branch, stream, use_swiglu=use_swiglu)
        plain = layer(norm(total))
    torch.testing.assert_close(after, total)
    # A last bit of the norm may decide which way a number is rounded.
    torch.testing.assert_close(
        y, swiglu(plain) if use_swiglu else plain, atol=0.03 if format.activations else 1e-5, rtol=0
    )


@EACH
def test_moved_and_converted_it_keeps_its_weight(format):
    layer = layer_of(format, bias=True)
    before = layer.quantized().dequantize()
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.quantized().dequantize(), before)
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


@EACH
def test_parts_are_split_and_joined(format):
    layer = layer_of(format, bias=True)
    again = QuantLinear(64, layer.parts, format, True)
    tensors = layer.tensors()
    assert {name: tensor.shape for name, tensor in tensors.items()} == again.wanted()
    again.load(tensors, torch.device("cpu"), torch.float32)
    x = torch.randn(3, 64)
    assert torch.equal(again(x), layer(x))


@pytest.mark.parametrize("name", ["int4", "int8", "int8 and activations"])
def test_the_engine_serves_it_as_the_oracle_generates(name):
    torch.manual_seed(1)
    model = (
        Transformer(ModelConfig(300, 64, 128, 2, 4, 2, 16, max_position_embeddings=128)).eval().requires_grad_(False)
    )
    model.reset_parameters(0.3)
    format = FORMATS[name]
    before = model.fingerprint()
    quantize_model(model, "smoothquant" if format.activations else "rtn", bits=format.scheme.bits,
                   calibration=torch.randint(0, 300, (2, 16)))  # fmt: skip
    assert model.fingerprint() != before
    engine = Engine(model, num_blocks=40, max_num_seqs=4, max_num_batched_tokens=20)
    prompts = [[i + 5 * j for j in range(4 + 5 * i)] for i in range(1, 5)]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with use("reference", "w4a16"):
        requests = [engine.add(prompt, params)[0] for prompt in prompts]
        while engine.has_unfinished():
            engine.step()
        for request, prompt in zip(requests, prompts, strict=True):
            assert request.output_token_ids == [int(token) for token in naive(model, prompt, params)]


def test_zero_points_between_integers_are_kept():
    """As what they add to each weight of a group; the format that is written has no place for them."""
    layer = layer_of(FORMATS["int4 asymmetric"])
    weight = layer.quantized()
    weight.grid.zero[3, 0] += 0.5
    layer.set(weight, None, torch.device("cpu"))
    assert layer.zero is None
    torch.testing.assert_close(layer.quantized().dequantize(), weight.dequantize(), rtol=1e-6, atol=1e-6)
    x = torch.randn(3, layer.in_features)
    for path, tolerance in (("reference", 1e-5), ("torch", 3e-2)):  # torch's packed product rounds x to bf16
        with use(path):
            torch.testing.assert_close(layer(x), x @ weight.dequantize().T, rtol=tolerance, atol=tolerance)
    with pytest.raises(ValueError, match="zero: expected whole zero points to write"):
        layer.tensors()
