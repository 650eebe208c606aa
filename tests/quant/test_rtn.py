"""Rounding: what the grid promises, whatever the numbers."""

import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given
from hypothesis import strategies as st

from minillm.quant import Grid, QuantizedTensor, Scheme, dequantize, error_grid, fake_quantize, minmax_grid, quantize

SCHEMES = st.one_of(
    st.builds(Scheme, st.integers(2, 8), st.just("int"), st.booleans(), st.just("group"), st.sampled_from([1, 8, 24])),
    st.builds(Scheme, st.integers(2, 8), st.just("int"), st.booleans(), st.sampled_from(["channel", "tensor"])),
    st.just(Scheme(8, "float", strategy="channel")),
    st.just(Scheme(4, "nf", group_size=12)),
)  # fmt: skip


def weights(seed: int, scale: float = 1.0, rows: int = 5) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 24, generator=g) * scale + 0.3 * scale * torch.randn(rows, 1, generator=g)


@given(SCHEMES, st.integers(0, 99), st.sampled_from([1e-4, 1.0, 300.0]))
def test_nobody_is_farther_away_than_half_a_step(scheme, seed, scale):
    w = weights(seed, scale)
    grid = minmax_grid(w, scheme)
    error = (fake_quantize(w, grid, scheme) - w).abs()
    size = scheme.group_size or 24
    steps = grid.scale.expand(5, -1).repeat_interleave(size, 1)[:, :24] if scheme.strategy != "tensor" else grid.scale
    if scheme.kind == "int":  # a symmetric range ends half a step below the largest; a zero point is rounded, too
        assert bool((error <= steps * (0.5 if scheme.symmetric else 1.0) * 1.0001 + 1e-9).all())
    elif scheme.kind == "float":  # 3 bits of mantissa, or the smallest step
        assert bool((error <= torch.maximum(w.abs() / 16, steps * 2**-10) * 1.0001).all())
    else:
        assert bool((error <= steps * 0.16).all())


@given(SCHEMES, st.integers(0, 99))
def test_what_is_on_the_grid_stays(scheme, seed):
    w = weights(seed)
    grid = minmax_grid(w, scheme)
    once = quantize(w, grid, scheme)
    again = quantize(dequantize(once, grid, scheme), grid, scheme)
    assert torch.equal(again.float(), once.float())
    assert torch.equal(QuantizedTensor.round(w, grid, scheme).dequantize(), fake_quantize(w, grid, scheme))


@given(st.integers(2, 8), st.booleans(), st.integers(0, 99))
def test_grids_are_those_of_compressed_tensors(bits, symmetric, seed):
    w = weights(seed)
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="channel")
    scale, zero = calculate_qparams(w.amin(1, keepdim=True), w.amax(1, keepdim=True), args)
    grid = minmax_grid(w, Scheme(bits, symmetric=symmetric, strategy="channel"))
    torch.testing.assert_close(grid.scale, scale, rtol=1e-6, atol=0)
    if grid.zero is None:
        assert not zero.any()
    else:
        assert (grid.zero - zero).abs().max() <= 0.5001


@given(SCHEMES)
def test_zero_stays_zero_and_zeros_have_a_scale(scheme):
    w = weights(1).abs() + 1  # a range that does not hold 0 by itself
    w[2], w[0, 3] = 0, 0
    rounded = fake_quantize(w, minmax_grid(w, scheme), scheme)
    assert not rounded[2].any()
    assert rounded[0, 3] == 0
    assert bool((minmax_grid(torch.zeros(2, 24), scheme).scale == 1).all())


@given(SCHEMES, st.integers(0, 99))
def test_a_grid_by_error_is_never_worse(scheme, seed):
    w = weights(seed)
    w[1, 5] = 40
    count = torch.rand(24, generator=torch.Generator().manual_seed(seed))
    losses = [
        float(((fake_quantize(w, grid, scheme) - w).square() * count).sum())
        for grid in (error_grid(w, scheme, count), minmax_grid(w, scheme))
    ]
    assert losses[0] <= losses[1] * (1 + 1e-6)


def test_an_outlier_is_clipped_where_that_serves_its_neighbors():
    w = torch.full((1, 64), 0.3) * torch.randn(64, generator=torch.Generator().manual_seed(0)).sign()
    w[0, 9] = 1.6
    scheme = Scheme(3, strategy="channel")
    assert error_grid(w, scheme).scale < minmax_grid(w, scheme).scale


def test_scales_are_rounded_before_anything_is_rounded_by_them():
    scheme = Scheme(4, group_size=8)
    grid = minmax_grid(weights(3), scheme, torch.bfloat16)
    assert torch.equal(grid.scale.bfloat16().float(), grid.scale)
    assert grid.scale.dtype == torch.float32


def test_by_hand():
    w = torch.tensor([[-1.0, 0.0, 0.5, 2.0]])
    scheme = Scheme(2, symmetric=False, strategy="channel")  # integers -2 to 1, three steps of 1 from -1 to 2
    grid = minmax_grid(w, scheme)
    assert (grid.scale.item(), grid.zero.item()) == (1.0, -1.0)
    assert quantize(w, grid, scheme).tolist() == [[-2, -1, -1, 1]]  # 0.5 to the even 0
    assert fake_quantize(w, grid, scheme).tolist() == [[-1.0, 0.0, 0.0, 2.0]]
    scheme = Scheme(2, strategy="channel")  # 2 over 1.5
    assert quantize(w, minmax_grid(w, scheme), scheme).tolist() == [[-1, 0, 0, 1]]


def test_bits_per_weight():
    assert Scheme(4, group_size=64).bits_per_weight(576, 576) == 4.25
    assert Scheme(4, symmetric=False, group_size=64).bits_per_weight(576, 576) == 4.3125
    assert Scheme(8, strategy="channel").bits_per_weight(10, 64, scale_bits=32) == 8.5
    assert math.isclose(Scheme(3, strategy="tensor").bits_per_weight(10, 16), 3.1)


@pytest.mark.parametrize(("options", "says"), [
    ({"bits": 9}, "bits: expected 2 to 8 for kind 'int', got 9"),
    ({"bits": 4.0}, "bits: expected 2 to 8"),
    ({"bits": 4, "kind": "float"}, "bits: expected 8 for kind 'float', got 4"),
    ({"kind": "fp4"}, "kind: expected one of int, float, nf, got 'fp4'"),
    ({"strategy": "row"}, "strategy: expected one of tensor, channel, group"),
    ({"group_size": None}, "group_size: expected a number for strategy 'group' alone, got None"),
    ({"strategy": "channel"}, "group_size: expected a number for strategy 'group' alone, got 64"),
    ({"group_size": 0}, "group_size: expected 1 or more, got 0"),
    ({"kind": "nf", "symmetric": False}, "symmetric: expected True for kind 'nf'"),
])  # fmt: skip
def test_schemes_that_do_not_exist(options, says):
    with pytest.raises(ValueError, match=says):
        Scheme(**{"group_size": 64, **options})


def test_numbers_that_cannot_be_rounded():
    scheme = Scheme(4, group_size=128)
    with pytest.raises(
        ValueError, match="group_size: expected a divisor of the row length 576, got 128; such as 32, 64"
    ):
        minmax_grid(torch.zeros(2, 576), scheme)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="w: expected finite numbers"):
            minmax_grid(torch.tensor([[bad, 1.0]]), Scheme(4, strategy="channel"))


def test_some_groups_of_a_grid():
    grid = minmax_grid(weights(0), Scheme(4, symmetric=False, group_size=8))
    one = grid[1]
    assert isinstance(one, Grid)
    assert torch.equal(one.scale, grid.scale[:, 1:2])
    assert torch.equal(one.zero, grid.zero[:, 1:2])
