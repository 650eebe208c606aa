"""The tool that sees which program touches which bytes: exact counts for kernels whose traffic is known."""

import numpy as np
import pytest
import torch

from minillm.kernels import HAS_TRITON, INTERPRETED
from minillm.learn.footprint import footprint

if not (HAS_TRITON and INTERPRETED):
    pytest.skip("runs in Triton's interpreter", allow_module_level=True)

from minillm.kernels.common import TensorDescriptor, tl, triton
from minillm.kernels.lessons.softmax import long_softmax_kernel, softmax_kernel
from minillm.kernels.matmul import matmul_kernel, matmul_tma_kernel
from minillm.kernels.rms_norm import rms_norm_kernel


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offs, mask=offs < n), tl.load(y_ptr + offs, mask=offs < n)
    tl.store(out_ptr + offs, x + y, mask=offs < n)


@triton.jit
def unmasked_kernel(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + row * BLOCK + offs, tl.load(x_ptr + row * stride + offs) + tl.load(x_ptr + row * stride))


def test_vector_add():
    x, y, out = torch.randn(10), torch.randn(10), torch.empty(10)
    with footprint(x=x, y=y, out=out) as seen:
        add_kernel[(3,)](x, y, out, 10, BLOCK=4)
    assert torch.equal(out, x + y)
    assert [(p, offs.tolist()) for p, offs in seen.loads["x"]] == [(0, [0, 1, 2, 3]), (1, [4, 5, 6, 7]), (2, [8, 9])]
    assert [(p, offs.tolist()) for p, offs in seen.stores["out"]] == [(p, o.tolist()) for p, o in seen.loads["y"]]
    assert seen.stores["x"] == seen.loads["out"] == []
    assert seen.bytes_moved() == seen.bytes_touched() == 3 * 40
    assert seen.bytes_moved("x", "out") == 80
    assert seen.strays == 0
    assert seen.picture("x").tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert seen.picture("out", (2, 5)).tolist() == [[0, 0, 0, 0, 1], [1, 1, 1, 2, 2]]


def test_a_tensor_that_is_read_twice_counts_twice():
    x, y = torch.randn(3, 20, dtype=torch.float16), torch.empty(3, 20, dtype=torch.float16)
    with footprint(x=x, y=y) as seen:
        long_softmax_kernel[(3,)](x, x, y, 20, 20, 0, MASKED=False, BLOCK=8)
    assert seen.bytes_moved("x") == 2 * x.numel() * 2
    assert seen.bytes_touched("x") == seen.bytes_moved("y") == x.numel() * 2
    with footprint(x=x) as seen:
        add_kernel[(1,)](x, x, y, 4, BLOCK=4)
    assert seen.bytes_moved() == 2 * 4 * 2


def test_softmax():
    x, y = torch.randn(3, 20, dtype=torch.float16), torch.empty(3, 20, dtype=torch.float16)
    with footprint(x=x, y=y) as seen:
        softmax_kernel[(3,)](x, x, y, 20, 20, 0, MASKED=False, BLOCK=32)
    assert seen.bytes_moved("x", of="loads") == seen.bytes_moved("y", of="stores") == x.numel() * 2
    assert seen.bytes_moved("x", of="stores") == 0
    assert np.array_equal(seen.picture("y"), np.repeat([[0], [1], [2]], 20, axis=1))


def test_rms_norm():
    rows, n = 5, 12
    x, residual, weight = torch.randn(rows, n), torch.randn(rows, n), torch.randn(n)
    y, total = torch.empty(rows, n), torch.empty(rows, n)
    with footprint(x=x, residual=residual, weight=weight, y=y, total=total) as seen:
        rms_norm_kernel[(3,)](x, residual, weight, y, total, rows, n, n, n, 1e-5, ADD=True, PDL=False, ROWS=2, BLOCK=16)
    assert seen.bytes_moved("x", "residual", "y", "total") == 4 * rows * n * 4
    assert seen.bytes_moved("weight") == 3 * n * 4  # once a program
    assert seen.bytes_touched("weight") == n * 4


@pytest.mark.parametrize("tma", [False, True])
def test_matmul(tma):
    m, n, k, block = 48, 32, 40, 16
    x, w = torch.randn(m, k, dtype=torch.float16), torch.randn(n, k, dtype=torch.float16)
    y = torch.full((m, n), torch.nan, dtype=torch.float16)
    sizes = {"SWIGLU": False, "BLOCK_M": block, "BLOCK_N": block, "BLOCK_K": block, "GROUP_M": 2}
    with footprint(x=x, w=w, y=y) as seen:
        if tma:
            tiles = [TensorDescriptor.from_tensor(t, [1] * (t.dim() - 2) + [block, block]) for t in (x, w[None], y)]
            matmul_tma_kernel[(4,)](*tiles, m, n, k, PROGRAMS=4, **sizes)
        else:
            matmul_kernel[(6,)](x, w, y, m, n, k, k, k, n, PRECISION="ieee", **sizes)
    assert seen.bytes_moved("x") == n // block * m * k * 2  # each row of x once for every tile of columns
    assert seen.bytes_moved("w") == m // block * n * k * 2
    assert seen.bytes_moved("y") == m * n * 2
    assert seen.bytes_touched() == (m * k + n * k + m * n) * 2
    if not tma:
        assert seen.picture("y")[::block, ::block].tolist() == [[0, 2], [1, 3], [4, 5]]


def test_strides_broadcasts_and_grids_of_two_axes():
    x = torch.randn(6, 10)[:, :4]
    out = torch.empty(6, 4)
    with footprint(x=x, out=out) as seen:
        unmasked_kernel[(2, 3)](x, out, 10, BLOCK=4)
    assert torch.equal(out, x + x[:, :1])
    assert seen.bytes_moved("x") == 6 * (4 + 1) * 4
    expected = np.repeat(np.arange(6.0)[:, None], 4, axis=1)
    assert np.array_equal(seen.picture("x"), expected)
    assert np.array_equal(seen.picture("out"), expected)


def test_strays_are_counted_and_the_rest_is_empty():
    memory = torch.randn(8)
    x, out = memory[:6], torch.empty(8)
    with footprint(x=x, out=out) as seen:
        unmasked_kernel[(1, 1)](memory, out, 0, BLOCK=8)
    assert seen.strays == 2
    other = torch.empty(3)
    with footprint(other=other) as seen:
        pass
    assert np.isnan(seen.picture("other")).all()
    assert seen.bytes_moved() == seen.bytes_touched() == 0


def test_the_interpreter_is_restored_and_bad_input_named(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    before = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    with pytest.raises(KeyError), footprint(x=torch.empty(1)):
        raise KeyError
    assert (InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store) == before
    with footprint(x=torch.empty(1)) as seen, pytest.raises(ValueError, match="of: expected"):
        seen.bytes_moved(of="reads")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), footprint():
        pass
