"""Products of 8-bit numbers: sums of int8 to the last bit, scales, bias, K in parts, what no descriptor can read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.kernels import quantize_rows, use, w8a8
from minillm.kernels.w8a8 import _by_floats

from .conftest import GPU, error

FP8 = torch.float8_e4m3fn
EXAMPLES = settings(max_examples=20 if GPU else 15)
OUT = [torch.float32, torch.float16] + [torch.bfloat16] * GPU  # the interpreter computes bfloat16 wrongly
# Hopper's tensor cores keep about 14 bits of a sum of fp8 products, so the error grows with K: 1.3e-3 at 4,096, 2.9e-3
# at 14,336, a tenth of what rounding the factors to fp8 costs. Rounding to the result's dtype comes on top.
FP8_SUMS = 1e-3 if GPU else 1e-6
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(params=[torch.int8, FP8], ids=["int8", "fp8"])
def kind(request) -> torch.dtype:
    return request.param


@pytest.fixture(params=["triton", "torch"])
def path(request):
    with use(request.param):
        yield request.param


def draw(seed: int, m: int, n: int, k: int, device, kind) -> tuple[torch.Tensor, ...]:
    """(x_q, x_scale, w_q, w_scale)"""
    generator = torch.Generator().manual_seed(seed)
    if kind == torch.int8:
        x, w = (torch.randint(-128, 128, (rows, k), generator=generator).to(kind) for rows in (m, n))
    else:
        x, w = ((torch.randn(rows, k, generator=generator) * 50).clamp(-448, 448).to(kind) for rows in (m, n))
    scales = (torch.rand(rows, 1, generator=generator) + 0.1 for rows in (m, n))
    x_scale, w_scale = (scale.to(device) / 100 for scale in scales)
    return x.to(device), x_scale, w.to(device), w_scale


@EXAMPLES
@given(
    st.integers(0, 70), st.integers(1, 150), st.integers(1, 300), st.booleans(), st.booleans(), st.sampled_from(OUT),
    st.integers(0, 99),
)  # fmt: skip
def products(device, kind, m, n, k, aligned, biased, out, seed):
    if aligned:  # what the copy engine can read
        n, k = n + -n % 8, k + -k % 16
    args = draw(seed, m, n, k, device, kind)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(device) if biased else None
    got, expected = w8a8(*args, bias, out), w8a8.reference(*args, bias, out)
    typical = float(args[1].mean() * args[3].mean()) * k**0.5 * 3000
    assert error(got, expected, typical if kind == FP8 else 1e-3) < ROUNDING[out] + FP8_SUMS * (kind == FP8)


def test_products(device, kind, path):
    products(device, kind)


@EXAMPLES
@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 200), st.integers(0, 99))
def sums(device, m, n, k, seed):
    x, _, w, _ = draw(seed, m, n, k, device, torch.int8)
    got = w8a8(x, x.new_ones(m, 1, dtype=torch.float32), w, x.new_ones(n, dtype=torch.float32), None, torch.float32)
    assert torch.equal(got.double(), x.double() @ w.double().T)  # below 2^24


def test_sums_of_int8_are_exact(device, path):
    sums(device)


@pytest.mark.parametrize("k", [1, 576, 1040, 2048, 5000])
def test_long_sums_of_the_largest_are_exact(device, path, k):
    """-128 · -128 · K is beyond what fp32 adds up one by one."""
    x = torch.full((3, k), -128, dtype=torch.int8, device=device)
    x[1, ::3], x[2, -1] = 127, 1
    w = torch.cat((x, x[:, torch.arange(k - 1, -1, -1)], x[:2]))  # 8 rows
    ones = torch.ones(8, device=device)
    got = w8a8(x, ones[:3], w, ones, None, torch.float32)
    expected = x.double() @ w.double().T
    assert torch.equal(got, expected.float())
    if path == "torch":  # what serves where torch has no product of integers
        assert torch.equal(_by_floats(x, w).double(), expected)


def test_smollm2s_layer(device, kind, path):
    """K = 576, a multiple of 64 but not of 128; numbers as they come from quantising."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, 576, generator=generator).to(device) for rows in (7, 96))
    with use("reference"):
        args = (*quantize_rows(x, kind), *quantize_rows(w, kind))
    y = w8a8(*args, None, torch.float16)
    assert error(y, w8a8.reference(*args, None, torch.float16), 1.0) < 1e-3 + FP8_SUMS
    assert error(y.float(), x @ w.T) < (0.02 if kind == torch.int8 else 0.05)  # both sides rounded to 8 bits


def test_any_number_of_axes_and_strides(device, kind, path):
    x, x_scale, w, w_scale = draw(0, 12, 40, 96, device, kind)
    x, x_scale = x.view(2, 6, 96)[:, ::2, 16:80], x_scale.view(2, 6)[:, ::2]
    w, w_scale = w[::2, 32:], w_scale[::2]
    got = w8a8(x, x_scale, w, w_scale, None, torch.float16)
    assert got.shape == (2, 3, 20)
    plain = [t.contiguous() for t in (x, x_scale, w, w_scale)]
    assert error(got, w8a8.reference(*plain, None, torch.float16)) < 1e-3 + FP8_SUMS


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
@pytest.mark.parametrize("out", OUT[1:])
def test_k_in_parts(device, kind, out, splits, triton, monkeypatch):
    """Parts that K's end cuts short, or that lie beyond it; and int8's sums are the same in any number of parts."""
    module = __import__("sys").modules["minillm.kernels.w8a8"]
    sizes = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "GROUP_M": 2, "PER_SM": 1, "num_warps": 4, "num_stages": 2}
    if GPU:
        sizes |= {"BLOCK_M": 64}
    monkeypatch.setattr(module, "_sizes", lambda *_: {"SPLITS": splits, **sizes})
    args = draw(1, 21, 72, 5 * 64 + 16, device, kind)
    bias = torch.randn(72, device=device)
    got, expected = w8a8(*args, bias, out), w8a8.reference(*args, bias, out)
    assert error(got, expected) < ROUNDING[out] + FP8_SUMS
    if kind == torch.int8:
        monkeypatch.setattr(module, "_sizes", lambda *_: {"SPLITS": 1, **sizes})
        assert torch.equal(got, w8a8(*args, bias, out))


def test_sizes_split_what_leaves_multiprocessors_idle():
    module = __import__("sys").modules["minillm.kernels.w8a8"]
    device = torch.device("cpu")
    few = module.sm_count(None) * 2
    assert module._sizes(device, 1, 64, 16_384)["SPLITS"] == min(8, few)
    assert module._sizes(device, 1, 64, 4096)["SPLITS"] == min(2, few)
    assert module._sizes(device, 1, 64, 576)["SPLITS"] == 1
    assert module._sizes(device, 1, 64 * few, 16_384)["SPLITS"] == 1
    assert module._sizes(device, 8192, 14_336, 16_384)["SPLITS"] == 1


def test_a_token_does_not_depend_on_those_beside_it(device, triton):
    """Of int8, every bit: other tiles, other numbers of rows."""
    x, x_scale, w, w_scale = draw(2, 70, 48, 160, device, torch.int8)
    together = w8a8(x, x_scale, w, w_scale, None, torch.float16)
    for i in (0, 69):
        assert torch.equal(w8a8(x[i : i + 1], x_scale[i : i + 1], w, w_scale, None, torch.float16)[0], together[i])


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 64, 100, 256, 2048])
@pytest.mark.parametrize(("n", "k"), [(4096, 14_336), (14_336, 4096), (576, 576), (1536, 576), (1000, 4096)])
def test_at_the_sizes_of_models(m, n, k, kind):
    args = draw(0, m, n, k, "cuda", kind)
    bias = torch.randn(n, device="cuda")
    for out in (torch.bfloat16, torch.float32):
        got, expected = w8a8(*args, bias, out), w8a8.reference(*args, bias, out)
        assert error(got, expected) < ROUNDING[out] + FP8_SUMS * max(1, k / 4096 + 0.5) * (kind == FP8)


BYTES = torch.zeros(3, 16, dtype=torch.int8)
ONES = torch.ones(3)
BAD = [
    ((BYTES.float(), ONES, BYTES, ONES), "x_q: expected torch.int8 or torch.float8_e4m3fn"),
    ((BYTES, ONES, BYTES.to(FP8), ONES), "w_q: expected x_q's dtype, torch.int8"),
    ((BYTES, ONES, BYTES[:, :8], ONES), r"w_q: expected \[N, K\] with x_q's last axis"),
    ((BYTES, ONES, BYTES[0], ONES), r"w_q: expected \[N, K\]"),
    ((BYTES[:, :0], ONES, BYTES[:, :0], ONES), "x_q's last axis as K, 1 or more"),
    ((BYTES, ONES[:2], BYTES, ONES), r"x_scale: expected \[3, 1\] of torch.float32"),
    ((BYTES, ONES, BYTES, ONES.half()), r"w_scale: expected \[3, 1\] of torch.float32.*torch.float16"),
    ((BYTES, 0.1, BYTES, ONES), "x_scale: expected a tensor, got float"),
    ((BYTES, ONES, BYTES, ONES, ONES[:2]), r"bias: expected \[3\]"),
    ((BYTES, ONES, BYTES, ONES, None, torch.int32), "out_dtype: expected one of torch.float32"),
    ((BYTES, ONES, BYTES, ONES.to("meta")), "w_scale: expected the device of x_q"),
]


@pytest.mark.parametrize(("args", "says"), BAD)
def test_bad_input_is_named(args, says):
    with pytest.raises((TypeError, ValueError), match=says):
        w8a8(*args)
