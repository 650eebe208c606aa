"""Keys and values of 8 bits: rounded on their way into the cache as `rtn` rounds, read back by both kernels' paths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.kernels import KERNELS, AttentionPlan, paged_attention, rope_and_cache, use
from minillm.kernels.rope import quantize_heads
from minillm.quant.rtn import Scheme, minmax_grid, quantize

from .conftest import GPU, TOLERANCE, error
from .test_paged_attention import HEADS, batch, poisoned, sequences

__all__ = ["poisoned"]  # torch.empty hands out NaN here too

EXAMPLES = settings(max_examples=30 if GPU else 8)
CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN")  # NumPy's, for rows of q that belong to nobody
SCHEMES = {torch.int8: Scheme(8, "int", strategy="channel"), FP8: Scheme(8, "float", strategy="channel")}


@pytest.fixture(params=SCHEMES, ids=["int8", "fp8"])
def stored(request) -> torch.dtype:
    return request.param


def rounded(x: torch.Tensor, stored: torch.dtype, scale_dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """What `rtn` makes of each row.  [..., D] -> same, [...]"""
    rows = x.flatten(0, -2)
    grid = minmax_grid(rows, SCHEMES[stored], scale_dtype)
    q, scale = quantize(rows, grid, SCHEMES[stored]).view(x.shape), grid.scale.view(x.shape[:-1]).to(scale_dtype)
    return q, scale


def by_head(scale: torch.Tensor) -> torch.Tensor:
    """The same [slots, H_kv], a head's side by side in memory."""
    return scale.T.contiguous().T


def same_bits(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return got.dtype == expected.dtype and torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


@given(
    st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=6, max_size=6), min_size=1, max_size=4),
    st.sampled_from([1.0, 1e-3, 1e-9]), st.sampled_from([torch.float32, torch.float16]),
)  # fmt: skip
def rows_are_rounded(stored, rows, factor, scale_dtype):
    x = torch.tensor(rows) * factor
    for got, expected in zip(quantize_heads(x, stored, scale_dtype), rounded(x, stored, scale_dtype), strict=True):
        assert torch.equal(got.float(), expected.float())


def test_rows_are_rounded_as_rtn_rounds(stored):
    rows_are_rounded(stored)


def test_ties_go_to_the_even_and_zeros_stay(stored):
    q, scale = quantize_heads(torch.tensor([[255.0, 1.0, 3.0, 5.0], [0.0] * 4]), torch.int8, torch.float32)
    assert scale.tolist() == [2.0, 1.0]
    assert q.tolist() == [[127, 0, 2, 2], [0, 0, 0, 0]]  # 127.5, 0.5, 1.5, 2.5


def turned(device, dtype, tokens, heads, kv_heads, half, seed, on_grid):
    """Arguments of rope_and_cache up to v, sin and cos; on_grid: of numbers that fp8 holds, at angle 0."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, 2 * half, generator=generator)
    angles = torch.randn(tokens, half, generator=generator)
    if on_grid:
        qkv = (qkv * 90).clamp(-448, 448).to(FP8).float()
        qkv[..., 0], angles = 448, angles * 0
    q, k, v = qkv.to(device, dtype).split([heads, kv_heads, kv_heads], 1)
    return q, k, v, angles.cos().to(device), angles.sin().to(device)


@EXAMPLES
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 5), st.integers(1, 40), st.booleans(), st.booleans(),
       st.sampled_from([torch.float32, torch.float16]), st.integers(0, 99))  # fmt: skip
def writes(device, dtype, stored, path, tokens, heads, kv_heads, half, normed, in_heads, scale_dtype, seed):
    # The interpreter loses the carry when it rounds fp32 to fp8: what needs no rounding is right there, too.
    on_grid = stored == FP8 and device.type == "cpu" and path == "triton"
    args = turned(device, dtype, tokens, heads, kv_heads, half, seed, on_grid)
    slots = torch.randperm(tokens + 3, generator=torch.Generator().manual_seed(seed))[:tokens].to(device) - 1
    norm = torch.rand(2, 2 * half, generator=torch.Generator().manual_seed(seed)).to(device, dtype) + 0.5
    more = (*norm, 1e-6) if normed and not on_grid else ()
    shape = (tokens + 3, kv_heads, 2 * half)
    plain = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(2)]
    caches = [torch.ones(shape, device=device).to(stored) for _ in range(2)]
    scales = [torch.full(shape[:2], -7.0, device=device, dtype=scale_dtype) for _ in range(2)]
    scales = [by_head(x) for x in scales] if in_heads else scales
    with use(path):
        for target in ((*plain, slots, None, None), (*caches, slots, *scales)):
            rope_and_cache(args[0].clone(), *args[1:], *target, *more)
    used = torch.zeros(shape[0], dtype=torch.bool, device=device)
    used[slots[slots >= 0]] = True
    for x, cache, scale in zip(plain, caches, scales, strict=True):
        q, expected = rounded(x[used], stored, scale_dtype)
        if device.type == "cuda" and dtype == torch.float32:  # the two compilations differ in fp32's last bit
            torch.testing.assert_close(
                scale[used], expected, rtol=1e-3 if scale_dtype == torch.float16 else 1e-6, atol=0
            )
            got, wanted = (c.float() * f.float()[..., None] for c, f in ((cache[used], scale[used]), (q, expected)))
            step = expected.float()[..., None] * (1.0 if stored == torch.int8 else 2**-9)
            assert ((got - wanted).abs() <= 1.01 * (step if stored == torch.int8 else step + wanted.abs() / 8)).all()
        else:
            assert same_bits(cache[used], q)
            assert torch.equal(scale[used], expected)
        assert (cache[~used].float() == 1).all()
        assert (scale[~used] == -7).all()


@pytest.mark.parametrize("path", ["triton", "torch", "reference"])
def test_a_kernel_writes_what_rtn_rounds(device, dtype, stored, path):
    writes(device, dtype, stored, path)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("path", ["triton", "torch"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_look_finite_later(device, stored, path, bad):
    q, k, v, cos, sin = turned(device, torch.float32, 3, 2, 2, 8, 0, True)
    v[1, 1, 5] = bad
    caches, scales = torch.zeros(2, 4, 2, 16, device=device).to(stored), torch.zeros(2, 4, 2, device=device)
    with use(path):
        rope_and_cache(q, k, v, cos, sin, *caches, torch.arange(3, device=device), *scales)
    read = caches[1].float() * scales[1][..., None]
    assert [[bool(head.isfinite().all()) for head in token] for token in read[:3]] == [
        [True] * 2,
        [True, False],
        [True] * 2,
    ]


# ---- reading -------------------------------------------------------------------------------------------------------


def batch_of_8_bits(device, dtype, stored, *sizes, size=1.0, **more):
    """As `batch`; what must not be looked at has the scale NaN. -> its arguments, and the scales."""
    args = list(batch(device, dtype, *sizes, **more))
    scales = []
    for i in (1, 2):
        nonsense = args[i].isnan().any(-1)
        args[i], scale = rounded(args[i].nan_to_num() * size, stored)
        scales.append(by_head(scale.masked_fill(nonsense, torch.nan)))
    return args, {"k_scale": scales[0], "v_scale": scales[1]}


@EXAMPLES
@given(sequences(False) | sequences(True), st.sampled_from(HEADS), st.sampled_from([7, 16, 24, 64, 128]),
       st.sampled_from([1, 4, 16, 32, 256]), st.integers(0, 20), st.sampled_from([0, 0, 1, 7, 33, 200]),
       st.booleans(), st.integers(0, 99))  # fmt: skip
def reads(device, dtype, stored, pairs, heads, size, block_size, padding, window, in_a_row, seed):
    counts, contexts = [p[0] for p in pairs], [p[1] for p in pairs]
    args, scales = batch_of_8_bits(
        device, dtype, stored, counts, contexts, *heads, size, block_size, seed, padding=padding, window=window,
        in_a_row=in_a_row,
    )  # fmt: skip
    expected = KERNELS["paged_attention"].reference(*args, **scales)
    for path in ("triton", "torch"):
        with use(path):
            assert error(paged_attention(*args, **scales), expected) < TOLERANCE[dtype]


def test_attention_against_reference(device, dtype, stored):
    reads(device, dtype, stored)


@pytest.mark.parametrize("contexts", [[1], [700], [513, 1, 0, 64]])
def test_split_context(device, dtype, stored, contexts):
    args, scales = batch_of_8_bits(device, dtype, stored, [1] * len(contexts), contexts, 8, 2, 64, 16)
    with use("triton"):
        got = paged_attention(*args, **scales)
    assert error(got, KERNELS["paged_attention"].reference(*args, **scales)) < TOLERANCE[dtype]


def test_the_reference_multiplies_out(stored):
    """Against a cache that holds the same numbers in 64 bits."""
    args, scales = batch_of_8_bits(CPU, torch.float64, stored, [1, 9], [60, 20], 6, 2, 32, 8, in_a_row=True)
    wide = [c.double() * s.double()[..., None] for c, s in zip(args[1:3], scales.values(), strict=True)]
    reference = KERNELS["paged_attention"].reference
    assert torch.equal(reference(*args, **scales), reference(args[0], *wide, *args[3:]))


@pytest.mark.parametrize("counts", [[1, 1], [9, 1]])
def test_small_values_keep_their_bits(device, dtype, stored, counts):
    """In fp16 the product of a probability and the scale of small values is subnormal."""
    args, scales = batch_of_8_bits(device, dtype, stored, counts, [200, 70], 6, 2, 32, 8, size=5e-4)
    with use("triton"):
        got = paged_attention(*args, **scales)
    assert error(got, KERNELS["paged_attention"].reference(*args, **scales)) < TOLERANCE[dtype]


@pytest.mark.parametrize("counts", [[1, 1], [9, 1]])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_a_query_of_any_size(device, dtype, stored, counts, size):
    """Products are of fp16, queries may have bf16's range; each row its own."""
    size = size if dtype != torch.float16 else size**0.1
    args, scales = batch_of_8_bits(device, dtype, stored, counts, [200, 70], 6, 2, 32, 8)
    args[0] *= size
    args[0][:, 1] = 0
    args[8] = 32**-0.5 / size
    with use("triton"):
        got = paged_attention(*args, **scales)
    assert error(got, KERNELS["paged_attention"].reference(*args, **scales)) < TOLERANCE[dtype]


@pytest.mark.parametrize("in_a_row", [True, False])
def test_a_plan_writes_and_reads(dtype, stored, in_a_row):
    counts, contexts = [1, 5, 1, 0, 1], [300, 290, 20, 9, 40]
    args, scales = batch_of_8_bits(CPU, dtype, stored, counts, contexts, 4, 2, 16, 8, padding=2, in_a_row=in_a_row)
    q, k_cache, v_cache, tables, lengths, bounds, _, block_size, *_ = args
    plan = AttentionPlan(tables, lengths, bounds, block_size)
    new = torch.randn(2, len(q), 2, 16).to(dtype)
    expected = []
    for x, cache, scale in zip(new, (k_cache, v_cache), scales.values(), strict=True):
        cache, scale = cache.clone(), scale.clone()
        for row, first, count, context in zip(tables, bounds.tolist(), counts, contexts, strict=False):
            for i in range(count):
                slot = int(row[(context - count + i) // block_size]) * block_size + (context - count + i) % block_size
                (cache[slot], scale[slot]) = rounded(x[first + i], stored)
        expected.append((cache, scale))
    plan.write(*new, k_cache, v_cache, *scales.values())
    for (cache, scale), got, its in zip(expected, (k_cache, v_cache), scales.values(), strict=True):
        assert same_bits(got, cache)
        assert torch.equal(its.nan_to_num(-1), scale.nan_to_num(-1))
    got = plan.attend(q, k_cache, v_cache, **scales)
    assert error(got, KERNELS["paged_attention"].reference(*args, **scales)) < TOLERANCE[dtype]


# ---- bad input -----------------------------------------------------------------------------------------------------

CACHE = torch.zeros(8, 2, 16)
SCALE = torch.ones(8, 2)
BAD = [
    (CACHE.to(torch.uint8), SCALE, SCALE, TypeError, "k_cache: expected float16, .* got torch.uint8"),
    (CACHE.to(torch.int8), None, None, ValueError, r"k_scale: expected \[8, 2\] \(slots, H_kv\) .* got None"),
    (CACHE.to(torch.int8), SCALE, None, ValueError, r"v_scale: expected \[8, 2\] .* torch.int8, got None"),
    (CACHE.to(FP8), SCALE[:7], SCALE, ValueError, r"k_scale: expected \[8, 2\] .* got \[7, 2\]"),
    (CACHE.to(FP8), SCALE, SCALE.bfloat16(), ValueError, "v_scale: expected .* float16 or float32 .* got .*bfloat16"),
    (CACHE.to(FP8), SCALE, SCALE.half(), ValueError, "v_scale: expected k_scale's dtype and strides"),
    (CACHE.to(FP8), SCALE, by_head(SCALE), ValueError, "v_scale: expected k_scale's dtype and strides"),
    (CACHE.half(), SCALE, SCALE, ValueError, "k_scale: expected None for a cache of torch.float16"),
]


@pytest.mark.parametrize(("cache", "k_scale", "v_scale", "error_type", "says"), BAD)
def test_bad_input_is_named(cache, k_scale, v_scale, error_type, says):
    q, k, v, cos, sin = turned(CPU, torch.float32, 3, 2, 2, 8, 0, False)
    with pytest.raises(error_type, match=says):
        rope_and_cache(q, k, v, cos, sin, cache, cache, torch.arange(3), k_scale, v_scale)
    table, lengths, bounds = (torch.tensor(x, dtype=torch.int32) for x in ([[0]], [3], [0, 3]))
    with pytest.raises(error_type, match=says):
        paged_attention(q, cache, cache, table, lengths, bounds, 3, 8, k_scale=k_scale, v_scale=v_scale)
