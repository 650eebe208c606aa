"""Every kernel against its reference in fp64, over drawn shapes: lengths that are multiples of nothing, strides,
several sequences.
"""

import sys
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.kernels import KERNELS, use

from .conftest import GPU, TOLERANCE, error

pytestmark = pytest.mark.usefixtures("triton")
EXAMPLES = settings(max_examples=30 if GPU else 8)


def close(name: str, got, expected, dtype: torch.dtype, typical: float = 0.0) -> None:
    pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    for i, (g, e) in enumerate(pairs):
        assert error(g, e, typical) < TOLERANCE[dtype], f"{name}, result {i}, shape {list(g.shape)}"


def randn(seed: int, *shape: int, device, dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


@EXAMPLES
@given(st.integers(0, 5), st.integers(1, 700), st.booleans(), st.integers(0, 99))
def softmax_rows(device, dtype, rows, n, masked, seed):
    x = randn(seed, rows, n, device=device, dtype=dtype) * 4
    mask = randn(seed + 1, rows, n, device=device, dtype=torch.float32) > 0 if masked else None
    op = KERNELS["softmax"]
    close("softmax", op(x, mask), op.reference(x, mask), dtype)


def test_softmax(device, dtype):
    softmax_rows(device, dtype)


def test_softmax_long_rows(device, dtype):
    op = KERNELS["softmax"]
    for n in (65_536, 65_537, 100_003):
        x = randn(0, 2, n, device=device, dtype=dtype) * 4
        mask = torch.arange(n, device=device) % 3 > 0  # one mask for all rows
        close("softmax", op(x), op.reference(x), dtype)
        close("softmax", op(x, mask), op.reference(x, mask), dtype)


def test_softmax_of_nothing_is_zero(device, dtype):
    x = randn(0, 3, 8, device=device, dtype=dtype)
    mask = torch.tensor([True, False, True], device=device)[:, None]
    y = KERNELS["softmax"](x, mask)
    assert y[1].abs().max() == 0
    assert torch.allclose(y[0].float().sum(), torch.ones((), device=device), atol=1e-2)


def test_softmax_of_large_numbers(device):
    x = torch.tensor([[3e4, 2.9e4, -3e4], [-1e30, -1e30, 1e30]], device=device)
    close("softmax", KERNELS["softmax"](x), KERNELS["softmax"].reference(x), torch.float32)


@EXAMPLES
@given(st.integers(0, 9), st.integers(1, 1500), st.integers(0, 99))
def norm_rows(device, dtype, rows, n, seed):
    x, residual = (randn(seed + i, rows, n, device=device, dtype=dtype) for i in (0, 1))
    weight = randn(seed + 2, n, device=device, dtype=dtype)
    op = KERNELS["rms_norm"]
    close("rms_norm", op(x, weight, 1e-5), op.reference(x, weight, 1e-5), dtype)
    op = KERNELS["add_rms_norm"]
    close("add_rms_norm", op(x, residual, weight, 1e-5), op.reference(x, residual, weight, 1e-5), dtype)


def test_rms_norm(device, dtype):
    norm_rows(device, dtype)


def test_rms_norm_of_a_view(device, dtype):
    """Every second row of a wider buffer."""
    x = randn(0, 8, 200, device=device, dtype=dtype)[::2, :100]
    weight = randn(1, 100, device=device, dtype=dtype)
    close("rms_norm", KERNELS["rms_norm"](x, weight, 1e-6), KERNELS["rms_norm"].reference(x, weight, 1e-6), dtype)


@EXAMPLES
@given(st.integers(0, 5), st.integers(1, 9), st.integers(1, 5), st.integers(1, 40), st.integers(0, 99))
def rope_heads(device, dtype, tokens, heads, kv_heads, half, seed):
    size = 2 * half
    qkv = randn(seed, tokens, (heads + 2 * kv_heads) * size, device=device, dtype=dtype)
    angles = randn(seed + 1, tokens, half, device=device, dtype=torch.float32) * 9
    slots = torch.randperm(tokens + 3, generator=torch.Generator().manual_seed(seed))[:tokens].to(device) - 1
    norm = randn(seed + 2, 2, size, device=device, dtype=dtype)
    for name, weights in (("rope", ()), ("rope_and_cache", ()), ("rope_and_cache", (*norm, 1e-6))):
        results = []
        for path in ("triton", "reference"):
            buffer = qkv.clone()
            sections = buffer.split([heads * size, kv_heads * size, kv_heads * size], dim=-1)
            q, k, v = (x.unflatten(-1, (-1, size)) for x in sections)
            caches = torch.zeros(2, tokens + 3, kv_heads, size, device=device, dtype=dtype)
            more = (v,) if name == "rope_and_cache" else ()
            slotted = (*caches, slots, None, None, *weights) if more else ()
            call = KERNELS[name] if path == "triton" else KERNELS[name].reference
            call(q, k, *more, angles.cos(), angles.sin(), *slotted)
            results.append((buffer, caches))
        for got, expected in zip(*results, strict=True):
            assert error(got, expected) < TOLERANCE[dtype]


def test_rope(device, dtype):
    rope_heads(device, dtype)


@EXAMPLES
@given(st.integers(0, 5), st.integers(1, 5000), st.integers(0, 99))
def swiglu_rows(device, dtype, rows, n, seed):
    x = randn(seed, rows, 2 * n, device=device, dtype=dtype) * 2
    close("swiglu", KERNELS["swiglu"](x), KERNELS["swiglu"].reference(x), dtype)


def test_swiglu(device, dtype):
    swiglu_rows(device, dtype)


@EXAMPLES
@given(
    st.sampled_from([1, 1, 1, 2, 5]), st.integers(1, 80), st.integers(1, 1500), st.booleans(), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def linears(device, dtype, rows, n, k, added, use_swiglu, seed):
    x, residual = (randn(seed + i, rows, k, device=device, dtype=dtype) for i in range(2))
    w = randn(seed + 2, (1 + use_swiglu) * n, k, device=device, dtype=dtype) / k**0.5
    norm, residual = randn(seed + 3, k, device=device, dtype=dtype), residual if added else None
    kept = [None if t is None else t.clone() for t in (x, residual)]
    op, args = KERNELS["linear"], (x, w)
    close("linear", op(*args), op.reference(*args), dtype, typical=1.0)
    op, args = KERNELS["norm_linear"], (x, residual, norm, w, 1e-5, use_swiglu)
    close("norm_linear", op(*args), op.reference(*args), dtype, typical=1.0)
    for t, before in zip((x, residual), kept, strict=True):
        assert t is None or torch.equal(t, before)


def test_linear(device, dtype):
    linears(device, dtype)


def test_linear_of_many_tokens(device, dtype, monkeypatch):
    """SwiGLU is then the product's epilogue; where it cannot be, the parts run one after another."""
    monkeypatch.setattr(sys.modules["minillm.kernels.fused_linear"], "MANY", 2)
    linears(device, dtype)


@EXAMPLES
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), max_size=5), st.integers(0, 9), st.integers(0, 2),
    st.sampled_from([1, 2, 16]), st.integers(0, 99),
)  # fmt: skip
def steps_and_back(device, work, extra, empty, block_size, seed):
    """(tokens known, new tokens) of each sequence; some tokens and sequences of padding."""
    generator, rows, longest, most = torch.Generator().manual_seed(seed), 9, 32, 3
    wide, narrow = seed % 3, seed % 4  # options of 64 and of 32 bits
    first_token = 1 + 2 * wide + narrow
    first_block = first_token + longest + most
    matrix = torch.randint(
        -(2**31), 2**31 - 1, (rows, first_block + longest // block_size), generator=generator, dtype=torch.int32
    )
    matrix[:, 0] = 1
    steps = torch.full((4, 12), rows - 1, dtype=torch.int32)
    steps[1:] = 0
    for i, (known, count) in enumerate(work):
        row, relative = i * 7 % (rows - 1), count == 1 and i % 2 == 0
        matrix[row, 0] = known + count
        steps[:3, i] = torch.tensor([row, -1 if relative else known, i % 3 > 0])
        steps[3, i + 1 :] += count
    tokens, sequences = int(steps[3, -1]) + extra, max(1, len(work) + empty)
    steps, matrix = steps.to(device), matrix.to(device)
    options, lengths = (
        torch.zeros(shape, dtype=torch.int32, device=device) for shape in ((first_token - 1, 13), (13,))
    )
    sizes = (first_token, first_block, wide, block_size, tokens, sequences)
    op, written = KERNELS["step_inputs"], (options.clone(), lengths.clone())
    for got, want in zip(
        op(steps, matrix, *written, *sizes), op.reference(steps, matrix, options, lengths, *sizes), strict=True
    ):
        assert torch.equal(got, want)
        assert got.dtype == want.dtype
    assert torch.equal(written[0], options)
    assert torch.equal(written[1], lengths)
    if wide:  # the two halves of 64 bits, side by side
        seeds = options[:2].view(-1).view(torch.int64)[: len(work)]
        assert seeds.tolist() == [int(matrix[r, 1:3].clone().view(torch.int64)) for r in steps[0, : len(work)].tolist()]
    sampled = torch.arange(100, 100 + sequences * most, device=device).view(sequences, most)
    given = torch.tensor([i % (most + 1) for i in range(sequences)], dtype=torch.int32, device=device)
    expected = matrix.clone()
    KERNELS["append_tokens"](steps, matrix, sampled, given, first_token)
    KERNELS["append_tokens"].reference(steps, expected, sampled, given, first_token)
    assert torch.equal(matrix, expected)


@pytest.mark.parametrize("path", ["triton", "torch"])
def test_step_inputs(device, path):
    with use(path):
        steps_and_back(device)


@EXAMPLES
@given(st.integers(0, 150), st.integers(1, 150), st.integers(1, 200), st.booleans(), st.integers(0, 99))
def products(device, dtype, m, n, k, aligned, seed):
    if aligned:  # what the copy engine can read
        n, k = n + -n % 8, k + -k % 8
    x, w = randn(seed, m, k, device=device, dtype=dtype), randn(seed + 1, n, k, device=device, dtype=dtype)
    close("matmul", KERNELS["matmul"](x, w), KERNELS["matmul"].reference(x, w), dtype, typical=k**0.5)
    w = randn(seed + 1, 2 * n, k, device=device, dtype=dtype) / k**0.5
    op = KERNELS["matmul_swiglu"]
    close("matmul_swiglu", op(x, w), op.reference(x, w), dtype, typical=0.4)


def test_matmul(device, dtype):
    products(device, dtype)


@pytest.mark.parametrize(("n", "k"), [(48, 64), (7, 64), (200, 33)])
def test_product_with_swiglu_is_both_after_another(device, dtype, n, k):
    """The weight is that of the layer: gate's rows, then up's."""
    x, w = randn(0, 5, k, device=device, dtype=dtype), randn(1, 2 * n, k, device=device, dtype=dtype) / k**0.5
    apart = KERNELS["swiglu"].reference(KERNELS["matmul"].reference(x.double(), w.double()).to(dtype))
    for path in ("triton", "torch", "reference"):
        with use(path):
            assert error(KERNELS["matmul_swiglu"](x, w), apart) < 2 * TOLERANCE[dtype]


@EXAMPLES
@given(
    st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90)), min_size=1, max_size=3),
    st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    st.sampled_from([16, 64, 128, 20, 80]),
    st.sampled_from([(True, 0), (False, 0), (True, 1), (True, 17), (True, 1000)]),
    st.integers(0, 99),
)
def sequences(device, dtype, lengths, heads, size, mask, seed):
    bounds = [
        torch.tensor([0, *torch.tensor([pair[i] for pair in lengths]).cumsum(0)], dtype=torch.int32, device=device)
        for i in (0, 1)
    ]
    total_q, total_k = (int(b[-1]) for b in bounds)
    q = randn(seed, total_q, heads[0], size, device=device, dtype=dtype)
    k, v = (randn(seed + i, total_k, heads[1], size, device=device, dtype=dtype) for i in (1, 2))
    given_ = (q, k, v, *bounds, max(pair[0] for pair in lengths), *mask)
    op = KERNELS["flash_attention"]
    expected = op.reference(*given_)
    close("flash_attention", op(*given_), expected, dtype, typical=0.1)
    close("its torch path", op.torch(*given_), expected, dtype, typical=0.1)


@pytest.fixture(params=["descriptors", "pointers"])
def read_by(request, monkeypatch):
    """As on a GPU with a copy engine, and on one without."""
    module = import_module("minillm.kernels.flash_attention")  # its name in the package is the operation's
    if request.param == "pointers":
        monkeypatch.setattr(module, "has_copy_engine", lambda x: False)


@pytest.mark.usefixtures("read_by")
def test_flash_attention(device, dtype):
    sequences(device, dtype)


@pytest.mark.usefixtures("read_by")
def test_flash_attention_of_views_into_one_buffer(device, dtype):
    qkv = randn(0, 50, (4 + 2 + 2) * 64, device=device, dtype=dtype)
    q, k, v = (x.unflatten(-1, (-1, 64)) for x in qkv.split([4 * 64, 2 * 64, 2 * 64], dim=-1))
    cu = torch.tensor([0, 20, 50], dtype=torch.int32, device=device)
    op = KERNELS["flash_attention"]
    close("views", op(q, k, v, cu, cu, 30), op.reference(q, k, v, cu, cu, 30), dtype)
    close("scale", op(q, k, v, cu, cu, 30, True, 0, 0.3), op.reference(q, k, v, cu, cu, 30, True, 0, 0.3), dtype)


@pytest.mark.usefixtures("read_by")
def test_a_neighbors_nan_stays_with_it(device, dtype):
    """Blocks reach over a sequence's end: what stands there must not come through."""
    q, k, v = (randn(i, 60, 2, 64, device=device, dtype=dtype) for i in range(3))
    cu = torch.tensor([0, 21, 60], dtype=torch.int32, device=device)
    clean = KERNELS["flash_attention"](q, k, v, cu, cu, 39)
    k[21:], v[21:] = float("nan"), float("inf")
    assert torch.equal(KERNELS["flash_attention"](q, k, v, cu, cu, 39)[:21], clean[:21])
