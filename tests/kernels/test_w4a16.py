"""Products with 4-bit weights against the reference in fp64: both orders of the weight, every variant of the kernel."""

import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.kernels import KERNELS, repack, unpack, w4a16
from minillm.kernels.common import TensorDescriptor
from minillm.learn.compiling import compile_kernel
from minillm.quant.rtn import Scheme, minmax_grid, quantize

from .conftest import GPU, TOLERANCE, error

OP = KERNELS["w4a16"]
EXAMPLES = settings(max_examples=20 if GPU else 10)
VARIANTS = {
    "as tuned": {},
    "products": {"BLOCK_M": 16, "BLOCK_N": 32, "FIRST": False, "PROGRAMS": 1},
    "products, split": {"BLOCK_M": 8, "BLOCK_N": 64, "FIRST": False, "PROGRAMS": 64, "TILES": 1},
    "scaled first": {"BLOCK_M": 16, "BLOCK_N": 64, "FIRST": True, "TILES": 4},
    "copied": {"BLOCK_M": 16, "BLOCK_N": 128, "TILES": 2, "PROGRAMS": 1},
    "copied, split": {"BLOCK_M": 32, "BLOCK_N": 64, "TILES": 1, "PROGRAMS": 64},
}


def module() -> ModuleType:
    """The kernel's file, which its operation hides."""
    return sys.modules["minillm.kernels.w4a16"]


def weight(seed: int, n: int, k: int, group: int, zeros: bool, device, dtype, scale_dtype=None) -> tuple:
    """packed, scales, zeros"""
    draw = torch.Generator().manual_seed(seed)
    packed = torch.randint(-(2**31), 2**31, (n, k // 8), generator=draw).int()
    scales = (torch.rand(n, k // group, generator=draw) + 0.5) / 8
    z = torch.randint(-8, 8, scales.shape, generator=draw).to(device, torch.int8) if zeros else None
    return packed.to(device), scales.to(device, scale_dtype or dtype), z


def sized(monkeypatch, variant: str) -> None:
    """That variant alone, with the copy engine or without it."""
    real, copied = module().tuned, variant.startswith("copied")

    def tuned(device, key, **default):
        return {**real(device, key, **default), **(VARIANTS[variant] if copied == ("copied" in key) else {})}

    monkeypatch.setattr(module(), "tuned", tuned)
    if not copied:
        monkeypatch.setattr(module(), "has_copy_engine", lambda x: False)


@EXAMPLES
@given(
    st.sampled_from([1, 1, 2, 5, 9, 17]), st.integers(1, 150),
    st.sampled_from([(8, 8), (40, 40), (64, 64), (128, 32), (192, 96), (256, 128), (320, 64), (576, 192), (576, 576),
                     (1024, 128), (48, 16), (240, 120)]),
    st.booleans(), st.booleans(), st.sampled_from([torch.float16, torch.float32, torch.bfloat16]), st.integers(0, 99),
)  # fmt: skip
def products(device, dtype, rounds, tokens, n, sizes, zeros, tiled, scale_dtype, seed):
    k, group = sizes
    args = weight(seed, n, k, group, zeros, device, dtype, scale_dtype)
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    bias = x.new_ones(n) if seed % 2 else None
    expected = OP.reference(x, *args, bias)
    got = w4a16(x, *(repack(*args) if tiled else args), bias)
    assert error(got, expected, typical=k**0.5 / 8) < rounds * TOLERANCE[dtype]


@pytest.mark.parametrize("variant", VARIANTS)
def test_against_the_reference(device, dtype, triton, monkeypatch, variant):
    sized(monkeypatch, variant)
    scaled_first = variant.startswith("copied") or variant == "scaled first"
    products(device, dtype, 2 if scaled_first else 1)  # scales and weights are rounded, too


def test_many_tokens_have_the_weight_written_out(device, dtype, triton, monkeypatch):
    monkeypatch.setattr(module(), "WHOLE_ABOVE", 0)
    products(device, dtype, 1)


@pytest.mark.parametrize("k", [64, 576, 72, 1024])
def test_the_weight_written_out_is_the_weight(device, dtype, triton, monkeypatch, k):
    """Rounded to x's dtype once, nothing left unwritten."""
    monkeypatch.setattr(module(), "WHOLE_ABOVE", 0)
    args = weight(7, 70, k, k if k % 128 else 128, True, device, dtype, torch.float32)
    empty = torch.empty
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *a, **kw: empty(*a, **kw).fill_(float("nan")))
        got = w4a16(torch.eye(k, dtype=dtype, device=device), *repack(*args))
    assert torch.equal(got.T, module().dequantize(*args, k, dtype, torch.float32))


def test_torch_path(dtype):
    for k, group in ((576, 576), (256, 32)):
        args = weight(1, 20, k, group, True, "cpu", dtype)
        x = torch.randn(2, 3, k).to(dtype)
        expected = OP.reference(x, *args)
        for given_ in (args, repack(*args)):
            assert error(OP.torch(x, *given_), expected) < 2 * TOLERANCE[dtype]


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 99))
def test_repacked_weights_are_the_same(n, octets, seed):
    packed, scales, zeros = weight(seed, n, 8 * octets, 8 * octets, True, "cpu", torch.float32)
    tiles, s, z = repack(packed, scales, zeros)
    assert tiles.shape == (-(-octets // 8), n, 8)
    assert torch.equal(unpack(tiles, 8 * octets), unpack(packed, 8 * octets))
    assert torch.equal(s, scales)
    assert torch.equal(z, zeros)
    assert s.shape == scales.shape
    assert s.stride(0) == 1


def test_the_checkpoints_order():
    """Nibble i of word j is weight 8 j + i, plus 8."""
    q = torch.arange(16).sub(8).repeat(2).view(1, 32)
    words = [sum((8 * j + i) % 16 << 4 * i for i in range(8)) for j in range(4)]
    packed = torch.tensor([words]).int()  # wraps: the sign bit is the last weight's
    assert torch.equal(unpack(packed, 32), q.to(torch.int8))


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounded_weights_are_multiplied_as_the_package_rounds(symmetric, device, triton):
    torch.manual_seed(0)
    w, scheme = torch.randn(24, 128), Scheme(4, "int", symmetric, "group", 64)
    grid = minmax_grid(w, scheme)
    q = quantize(w, grid, scheme)
    words = ((q.long() + 8).view(24, -1, 8) << 4 * torch.arange(8)).sum(-1).int()
    zeros = None if grid.zero is None else grid.zero.to(device, torch.int8)
    x = torch.randn(2, 128, device=device)
    got = w4a16(x, words.to(device), grid.scale.to(device), zeros)
    z = 0 if grid.zero is None else grid.zero.repeat_interleave(64, 1)
    expected = x.double() @ ((q.double() - z) * grid.scale.double().repeat_interleave(64, 1)).to(device).T
    assert error(got, expected.float()) < 2e-6


def test_views_and_empty_inputs(device, triton):
    args = weight(3, 30, 128, 64, True, device, torch.float32)
    buffer = torch.randn(6, 2, 200, device=device)
    x, tiles = buffer[::2, :, 8:136], repack(*args)
    assert error(w4a16(x, *tiles), OP.reference(x, *args)) < 2e-6
    assert error(w4a16(x[:, 0], *tiles), OP.reference(x[:, 0], *args)) < 2e-6
    turned = buffer[0].T[:128].T.t().contiguous().t()
    assert error(w4a16(turned, *tiles), OP.reference(turned, *args)) < 2e-6
    apart = (tiles[0], tiles[1], tiles[2].contiguous())  # zeros in another order than scales
    assert error(w4a16(x, *apart), OP.reference(x, *args)) < 2e-6
    assert w4a16(x[:0], *tiles).shape == (0, 2, 30)
    assert w4a16(x, tiles[0][:, :0], tiles[1][:0], tiles[2][:0]).shape == (3, 2, 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_number_is_written_and_nothing_foreign_read(device, triton, monkeypatch, variant):
    """Outputs begin as NaN, and so does what lies beyond x's columns and rows."""
    sized(monkeypatch, variant)
    empty = torch.empty
    poisoned = lambda *a, **k: empty(*a, **k).fill_(float("nan"))  # noqa: E731
    for tokens, k in ((1, 576), (3, 72)):
        args = repack(*weight(4, 70, k, k, True, device, torch.float32))
        buffer = torch.full((tokens + 2, k + 64), float("nan"), device=device)
        buffer[:tokens, :k] = torch.randn(tokens, k)
        x = buffer[:tokens, :k]
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", poisoned)
            got = w4a16(x, *args)
        assert error(got, OP.reference(x, *args)) < 2e-6


def test_the_same_sums_in_every_call(device, triton, monkeypatch):
    """Bit for bit, with K split; and a token's result does not depend on its neighbors."""
    sized(monkeypatch, "products, split")
    args = repack(*weight(5, 32, 1024, 128, False, device, torch.float32))
    x = torch.randn(4, 1024, device=device)
    first = w4a16(x, *args)
    assert torch.equal(w4a16(x, *args), first)
    assert torch.equal(w4a16(x.flip(0), *args).flip(0), first)


X = torch.randn(2, 64)
PACKED, SCALES, ZEROS = weight(6, 12, 64, 32, True, "cpu", torch.float32)
BAD = [
    ((X.long(), PACKED, SCALES), "x: expected a floating dtype"),
    ((X[:, :60], PACKED, SCALES), "x: expected .* K a multiple of 8"),
    ((X, PACKED.long(), SCALES), "packed: expected int32"),
    ((X, PACKED[:, :7], SCALES), r"packed: expected \[N, 8\]"),
    ((X, PACKED[0], SCALES), r"packed: expected \[N, 8\]"),
    ((X, PACKED.view(2, 6, 8), SCALES), r"packed: .*\[1, N, 8\]"),
    ((X, PACKED, SCALES.long()), "scales: expected a floating dtype"),
    ((X, PACKED, SCALES[:11]), r"scales: expected \[12, G\]"),
    ((X, PACKED, SCALES[:, :0]), r"scales: expected \[12, G\]"),
    ((X, PACKED, torch.ones(12, 3)), r"scales: .*a multiple of 8 weights in 64"),
    ((X, PACKED, SCALES, ZEROS.int()), "zeros: expected torch.int8"),
    ((X, PACKED, SCALES, ZEROS[:, :1]), r"zeros: expected torch.int8 of scales' shape \[12, 2\]"),
    ((X, PACKED, SCALES, ZEROS, torch.ones(11)), r"bias: expected \[12\]"),
    ((X, repack(PACKED, SCALES)[0], SCALES, ZEROS), r"zeros: expected torch.float32 of scales' shape \[12, 2\]"),
    ((X, PACKED, SCALES, None, torch.ones(12).half()), r"bias: expected \[12\] .* of torch.float32"),
    ((X, PACKED.to("meta"), SCALES), "packed: expected the device of x"),
]


@pytest.mark.parametrize(("args", "says"), BAD)
def test_bad_input_is_named(args, says):
    with pytest.raises((TypeError, ValueError), match=says):
        w4a16(*args)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("zeros", [False, True])
def test_compiles_for_an_h100(dtype, zeros):
    """Every default size, without a spilled register."""
    kernels, index = module(), torch.int32
    flags = {"ZEROS": zeros, "BIAS": True, "PDL": False}
    pointers = (dtype, index, dtype, dtype, dtype, dtype)
    for m, n in ((1, 4096), (8, 4096), (16, 14336), (32, 4096), (64, 14336), (256, 4096)):
        sizes = kernels._sizes(torch.empty(1, dtype=dtype), m, n, 4096, 128)
        del sizes["PROGRAMS"]
        found = compile_kernel(
            kernels.w4a16_kernel, *pointers, m, n, 4096, 128, 32, 4096, 1, n, PER=4, EVEN=True, **flags, **sizes
        )
        assert found.local_bytes == 0, (m, n, found)
    sizes = {"BLOCK_N": 64, "TILES": 2, "num_warps": 4}
    whole = (index, dtype, dtype, dtype, n, 4096, 128, 1, n)
    assert compile_kernel(kernels.dequantize_kernel, *whole, ZEROS=zeros, PER=4, PDL=False, **sizes).local_bytes == 0
    parts = (torch.float32, dtype, dtype, n, n)
    assert compile_kernel(kernels.add_parts_kernel, *parts, BIAS=True, PARTS=4, PDL=False, BLOCK=512).registers


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("m", [8, 16, 32, 64, 128, 256])
def test_the_copied_kernel_compiles_for_an_h100(dtype, zeros, m):
    kernels = module()
    sizes = kernels._sizes(torch.empty(1, dtype=dtype), m, 4096, 4096, 128, "copied ")
    del sizes["PROGRAMS"]
    tiles, rows = sizes["TILES"], sizes["BLOCK_N"]
    x, w = torch.empty(m, 4096, dtype=dtype), torch.empty(64, 1024, 32, dtype=torch.int32)
    scale = TensorDescriptor.from_tensor(torch.empty(32, 4096, dtype=dtype), [1, rows])
    found = compile_kernel(
        kernels.w4a16_copied_kernel, TensorDescriptor.from_tensor(x, [sizes["BLOCK_M"], 64 * tiles]),
        TensorDescriptor.from_tensor(w, [tiles, rows // 4, 32]), scale, scale, dtype, dtype, m, 4096, 4096, 8,
        ZEROS=zeros, BIAS=True, GROUP=128, WAIT=True, PDL=False, **sizes,
    )  # fmt: skip
    assert found.local_bytes == 0
