"""Products with 8-bit weights against the reference in fp64."""

import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.kernels import KERNELS, w8a16
from minillm.learn.compiling import compile_kernel

from .conftest import GPU, TOLERANCE, error

OP = KERNELS["w8a16"]
EXAMPLES = settings(max_examples=20 if GPU else 10)


def module() -> ModuleType:
    """The kernel's file, which its operation hides."""
    return sys.modules["minillm.kernels.w8a16"]


def weight(seed: int, n: int, k: int, device, scale_dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """q, scale"""
    draw = torch.Generator().manual_seed(seed)
    q = torch.randint(-128, 128, (n, k), generator=draw).to(torch.int8)
    return q.to(device), (torch.rand(n, 1, generator=draw) + 0.5).div(128).to(device, scale_dtype)


@EXAMPLES
@given(
    st.sampled_from([1, 1, 2, 9, 17, 70]), st.integers(1, 150), st.sampled_from([1, 7, 64, 128, 200, 576, 1024]),
    st.sampled_from([torch.float16, torch.float32, torch.bfloat16]), st.integers(0, 99),
)  # fmt: skip
def products(device, dtype, tokens, n, k, scale_dtype, seed):
    args = weight(seed, n, k, device, scale_dtype)
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    bias = x.new_ones(n) if seed % 2 else None
    assert error(w8a16(x, *args, bias), OP.reference(x, *args, bias), typical=k**0.5 / 2) < TOLERANCE[dtype]


@pytest.mark.parametrize("sizes", [{}, {"PROGRAMS": 64}, {"BLOCK_K": 32, "PROGRAMS": 1}], ids=str)
def test_against_the_reference(device, dtype, triton, monkeypatch, sizes):
    real = module().tuned
    monkeypatch.setattr(module(), "tuned", lambda *args, **default: {**real(*args, **default), **sizes})
    products(device, dtype)


def test_many_tokens(device, dtype, triton, monkeypatch):
    monkeypatch.setattr(module(), "WHOLE_ABOVE", 0)
    products(device, dtype)


def test_torch_path(dtype):
    args = weight(1, 20, 576, "cpu")
    x = torch.randn(2, 3, 576).to(dtype)
    assert error(OP.torch(x, *args), OP.reference(x, *args)) < 2 * TOLERANCE[dtype]


def test_views_and_empty_inputs(device, triton):
    q, scale = weight(3, 30, 128, device)
    buffer = torch.randn(6, 2, 200, device=device)
    x = buffer[::2, :, 8:136]
    expected = OP.reference(x, q, scale)
    assert error(w8a16(x, q, scale[:, 0]), expected) < 2e-6
    assert error(w8a16(x, q.T.contiguous().T, scale), expected) < 2e-6
    assert w8a16(x[:0], q, scale).shape == (0, 2, 30)
    assert w8a16(x, q[:0], scale[:0]).shape == (3, 2, 0)


def test_every_number_is_written_and_nothing_foreign_read(device, triton, monkeypatch):
    """Outputs begin as NaN, and so does what lies beyond x's columns and rows."""
    empty = torch.empty
    poisoned = lambda *a, **k: empty(*a, **k).fill_(float("nan"))  # noqa: E731
    for tokens, k in ((1, 576), (3, 72)):
        q, scale = weight(4, 70, k, device)
        buffer = torch.full((tokens + 2, k + 64), float("nan"), device=device)
        buffer[:tokens, :k] = torch.randn(tokens, k)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", poisoned)
            got = w8a16(buffer[:tokens, :k], q, scale)
        assert error(got, OP.reference(buffer[:tokens, :k], q, scale)) < 2e-6


X, Q, SCALE = torch.randn(2, 64), torch.ones(12, 64, dtype=torch.int8), torch.ones(12, 1)
BAD = [
    ((X.long(), Q, SCALE), "x: expected a floating dtype"),
    ((X, Q.int(), SCALE), "q: expected int8"),
    ((X, Q[:, :60], SCALE), r"q: expected \[N, K\] with x's last axis"),
    ((X, Q[0], SCALE), r"q: expected \[N, K\]"),
    ((X, Q, SCALE.int()), "scale: expected a floating dtype"),
    ((X, Q, SCALE[:11]), r"scale: expected \[12\] or \[12, 1\]"),
    ((X, Q, SCALE, torch.ones(11)), r"bias: expected \[12\]"),
    ((X, Q, SCALE, torch.ones(12).half()), r"bias: expected \[12\] .* of torch.float32"),
    ((X, Q.to("meta"), SCALE), "q: expected the device of x"),
]


@pytest.mark.parametrize(("args", "says"), BAD)
def test_bad_input_is_named(args, says):
    with pytest.raises((TypeError, ValueError), match=says):
        w8a16(*args)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compiles_for_an_h100(dtype):
    """Every default size, without a spilled register."""
    for m, n in ((1, 4096), (16, 14_336), (32, 4096), (64, 14_336), (256, 4096)):
        sizes = module()._sizes(torch.empty(1, dtype=dtype), m, n)
        del sizes["PROGRAMS"]
        found = compile_kernel(
            module().w8a16_kernel, dtype, torch.int8, torch.float32, dtype, dtype, m, n, 4096, 32, 4096,
            BIAS=True, EVEN=True, PDL=False, **sizes,
        )  # fmt: skip
        assert found.local_bytes == 0, (m, n, found)
