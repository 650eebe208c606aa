"""Kernels of the interpreter, compiled for a GPU that is not there."""

import math

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from minillm.learn import compiling
from minillm.learn.compiling import Compiled, DoesNotCompile, compile_kernel
from minillm.learn.testing import NOTES, ContractError, expect_compiles, expect_launches_compile

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled anyway")
TWICE = tl.constexpr(2.0)
PLAIN = 2.0
LOWEST = tl.constexpr(-math.inf)


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "root", lambda: tmp_path)
    return tmp_path


@triton.jit
def scaled(x, by):
    return x * by


@triton.jit
def uneven(x):
    total = 0
    for _ in range(10):
        total += tl.sum(x)
    return total


@triton.jit
def good_kernel(x_ptr, y_ptr, n, scale, BLOCK: tl.constexpr, DTYPE: tl.constexpr = tl.float32):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=LOWEST).to(DTYPE)
    tl.store(y_ptr + offs, scaled(x, TWICE) * scale, mask=offs < n)


@triton.jit
def global_kernel(x_ptr, y_ptr, n, scale, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs) * PLAIN)


@triton.jit
def nested_kernel(x_ptr, y_ptr, n, scale, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, uneven(tl.load(x_ptr + offs)))


def test_resources(no_cache):
    got = compile_kernel(good_kernel, torch.float16, torch.zeros(4), 100, 0.5, BLOCK=256, DTYPE=tl.float32)
    assert isinstance(got, Compiled)
    assert 8 <= got.registers <= 255
    assert (got.local_bytes, got.shared_bytes) == (0, 0)
    assert (no_cache / ".minillm" / "compiled.json").exists()


def test_a_known_source_is_not_compiled_again(monkeypatch):
    first = compile_kernel(good_kernel, torch.float16, torch.float32, 100, 0.5, BLOCK=128)
    monkeypatch.setattr(compiling, "_asked", lambda request: pytest.fail("compiled again"))
    assert compile_kernel(good_kernel, torch.float16, torch.float32, 7, 0.5, BLOCK=128) == first
    with pytest.raises(pytest.fail.Exception):
        compile_kernel(good_kernel, torch.float16, torch.float32, 7, 0.5, BLOCK=64)


def test_a_cache_that_cannot_be_written_is_no_hindrance(no_cache):
    (no_cache / ".minillm").write_text("in the way")
    assert compile_kernel(good_kernel, torch.float32, torch.float32, 100, 0.5, BLOCK=128).registers


@pytest.mark.parametrize(
    ("kernel", "block", "says", "where"),
    [
        (global_kernel, 128, "PLAIN", "line 3 in global_kernel"),
        (nested_kernel, 128, "total has initial type int32", "in uneven: for _ in range(10):"),
        (good_kernel, 100, "power of 2", "in good_kernel: offs = tl.arange(0, BLOCK)"),
    ],
)
def test_what_does_not_compile_is_named(kernel, block, says, where):
    with pytest.raises(DoesNotCompile) as refused:
        compile_kernel(kernel, torch.float32, torch.float32, 100, 0.5, BLOCK=block)
    with pytest.raises(ContractError) as failed:
        expect_compiles(kernel, torch.float32, torch.float32, 100, 0.5, BLOCK=block)
    assert says in refused.value.said
    assert says in str(failed.value)
    assert where.removeprefix("line 3 ") in str(failed.value)
    assert refused.value.name in where


def test_what_is_no_kernel_or_no_launch():
    with pytest.raises(TypeError, match="under `@triton.jit`"):
        compile_kernel(len, torch.float32)
    with pytest.raises(ContractError, match="is `@triton.jit` missing"):
        expect_compiles(lambda x_ptr: None, torch.float32)
    with pytest.raises(TypeError, match="missing a required argument"):
        compile_kernel(good_kernel, torch.float32)
    with pytest.raises(TypeError, match="x_ptr: expected a tensor"):
        compile_kernel(good_kernel, "x", torch.float32, 1, 1.0, BLOCK=16)


def test_launches_are_compiled_as_they_were_launched():
    x, y = torch.ones(16), torch.zeros(16)
    del NOTES[:]
    expect_launches_compile(lambda: good_kernel[(1,)](x, y, 16, 3.0, BLOCK=16))
    assert y.tolist() == [6.0] * 16
    assert len(NOTES) == 1
    assert "registers a thread" in NOTES[0]
    with pytest.raises(ContractError, match="PLAIN"):
        expect_launches_compile(lambda: global_kernel[(1,)](x, y, 16, 3.0, BLOCK=16))
    with pytest.raises(ContractError, match="expected a launch"):
        expect_launches_compile(lambda: None)
