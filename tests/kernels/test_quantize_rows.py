"""Rows in 8 bits: bit for bit as `minillm.quant` rounds, alone and behind the norm and SwiGLU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.kernels import KERNELS, add_rms_norm, norm_quantize_rows, quantize_rows, rms_norm, swiglu, use
from minillm.kernels import swiglu_quantize_rows as swiglu_rows
from minillm.quant.rtn import Scheme, minmax_grid, quantize

from .conftest import GPU

FP8 = torch.float8_e4m3fn
SCHEMES = {torch.int8: Scheme(8, strategy="channel"), FP8: Scheme(8, "float", strategy="channel")}
ORDER = "compiled, another kernel may add up a row's squares in another order: see the next test"
EXAMPLES = settings(max_examples=20 if GPU else 15)


@pytest.fixture(params=[torch.int8, FP8], ids=["int8", "fp8"])
def to(request) -> torch.dtype:
    return request.param


@pytest.fixture(params=["triton", "torch", "reference"])
def path(request):
    """Ours, torch's, the reference."""
    with use(request.param):
        yield request.param


def draw(seed: int, *shape: int, device, dtype) -> torch.Tensor:
    """Numbers of all sizes, some 0, some rows of zeros."""
    generator = torch.Generator().manual_seed(seed)
    a_row = (*shape[:-1], 1)
    x = torch.randn(shape, generator=generator) * torch.randn(a_row, generator=generator).exp()
    for part in (shape, a_row):
        x = x * (torch.rand(part, generator=generator) > 0.1)
    return x.to(device, dtype)


def same(got: tuple, expected: tuple, rounds_fp8: bool = True) -> None:
    """Scales and numbers, bit for bit; in the interpreter, which cuts fp8 off, within its error."""
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == e.dtype
        if g.dtype == FP8 and not rounds_fp8:
            assert ((g.float() - e.float()).abs() <= e.float().abs() / 2 + 2**-9).all()
        else:
            assert torch.equal(g.float(), e.float())


@EXAMPLES
@given(st.integers(1, 6), st.integers(1, 3000), st.integers(0, 99))
def rounds_as_the_package_does(device, dtype, to, path, rows, k, seed):
    x = draw(seed, rows, k, device=device, dtype=dtype)
    q, scale = quantize_rows(x, to)
    for where in {x.device, torch.device("cpu")}:
        grid = minmax_grid(x.to(where), SCHEMES[to])
        expected = quantize(x.to(where), grid, SCHEMES[to])
        same((q.to(where), scale.to(where)), (expected, grid.scale), rounds_fp8=GPU or path != "triton")


def test_rounds_as_the_package_does(device, dtype, to, path):
    rounds_as_the_package_does(device, dtype, to, path)


def test_ties_go_to_the_even_integer_and_the_largest_is_clamped(device, path):
    halves = torch.arange(-127.5, 128, 0.5, device=device)[None]  # the scale is 1
    for x in (halves, halves * 0.25, -halves):
        q, scale = quantize_rows(x)
        assert scale.item() == x.max().item() / 127.5
        assert torch.equal(q.float(), (x / scale).round().clamp(-128, 127))
        assert q.min() == -128
        assert q.max() == 127


def test_zeros_and_tiny_numbers(device, to, path):
    x = torch.zeros(3, 40, device=device)
    x[1, 3], x[2, 5] = 1e-45, 3e38
    q, scale = quantize_rows(x, to)
    assert scale[0] == 1
    assert scale.isfinite().all()
    assert q[:2].float().abs().max() in (0, 127)  # 1e-45 / 127.5 is 0 in fp32
    assert q[2, 5].float() == (127 if to == torch.int8 else 448)


def test_any_number_of_axes_and_strides(device, dtype, to, path):
    x = draw(3, 2, 6, 100, device=device, dtype=dtype)[:, ::2, 10:70]
    q, scale = quantize_rows(x, to)
    assert q.shape == (2, 3, 60)
    assert scale.shape == (2, 3, 1)
    same((q, scale), quantize_rows(x.contiguous(), to))
    step = 0.51 if to == torch.int8 else 17 if GPU or path != "triton" else 240  # of a scale; the interpreter cuts off
    assert ((q.float() * scale - x.float()).abs() <= scale * step).all()


@EXAMPLES
@given(st.integers(1, 5), st.integers(1, 1500), st.booleans(), st.integers(0, 99))
def fused_is_one_after_another(device, dtype, to, rows, k, added, seed):
    """The norm and its rounding, which is the rounding of what the unfused norm gives."""
    x, residual = (draw(seed + i, rows, k, device=device, dtype=dtype) for i in range(2))
    weight, residual = draw(seed + 2, k, device=device, dtype=dtype), residual if added else None
    q, scale, total = norm_quantize_rows(x, residual, weight, 1e-5, to)
    if residual is None:
        normed, expected = rms_norm(x, weight, 1e-5), x
    else:
        normed, expected = add_rms_norm(x, residual, weight, 1e-5)
    same((q, scale, total), (*quantize_rows(normed, to), expected))
    gate_up = draw(seed, rows, 2 * k, device=device, dtype=dtype)
    same(swiglu_rows(gate_up, to), quantize_rows(swiglu(gate_up), to))


@pytest.mark.parametrize("path", [pytest.param("triton", marks=pytest.mark.skipif(GPU, reason=ORDER)), "torch"])
def test_fused_is_one_after_another(device, dtype, to, path):
    with use(path):
        fused_is_one_after_another(device, dtype, to)


def test_fused_against_the_reference(device, dtype, to, triton):
    """A norm that is off by its last bit moves some numbers by one step."""
    x, residual = (draw(i, 9, 700, device=device, dtype=dtype) for i in range(2))
    weight = draw(5, 700, device=device, dtype=dtype)
    for name, args in (("norm_quantize_rows", (x, residual, weight, 1e-5, to)), ("swiglu_quantize_rows", (x, to))):
        got, expected = KERNELS[name](*args), KERNELS[name].reference(*args)
        torch.testing.assert_close(got[1], expected[1], rtol=8e-3, atol=0)
        error = (got[0].float() * got[1] - expected[0].float() * expected[1]).norm()
        limit = 2e-2 if to == torch.int8 or GPU else 0.15  # the interpreter cuts fp8 off
        assert error <= limit * (expected[0].float() * expected[1]).norm()


BAD = [
    (quantize_rows, (torch.zeros(3, 4).int(),), "x: expected a floating dtype"),
    (quantize_rows, (torch.zeros(3, 0),), "x: expected a last axis of at least 1"),
    (quantize_rows, (torch.zeros(3, 4), torch.uint8), "dtype: expected torch.int8 or torch.float8_e4m3fn"),
    (norm_quantize_rows, (torch.zeros(3, 4), None, torch.ones(5), 1e-5), r"weight: expected shape \[4\]"),
    (norm_quantize_rows, (torch.zeros(3, 4), torch.zeros(4), torch.ones(4), 1e-5), r"residual: expected shape \[3, 4"),
    (norm_quantize_rows, (torch.zeros(3, 4), None, torch.ones(4), 1e-5, torch.int16), "dtype: expected"),
    (swiglu_rows, (torch.zeros(3, 5),), "gate_up: expected a last axis of 2 I"),
    (swiglu_rows, (torch.zeros(3, 4), torch.float16), "dtype: expected"),
]


@pytest.mark.parametrize(("call", "args", "says"), BAD)
def test_bad_input_is_named(call, args, says):
    with pytest.raises((TypeError, ValueError), match=says):
        call(*args)
