"""Adapters of many tenants in one batch, against a loop over tokens in fp64."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.kernels import KERNELS, LoraPlan, multi_lora
from minillm.learn.compiling import compile_kernel

from .conftest import GPU, TOLERANCE, error

OP = KERNELS["multi_lora"]
EXAMPLES = settings(max_examples=25 if GPU else 8)


def case(seed, tokens, k, rows, rank, slots, used, device, dtype) -> tuple:
    """y, x, a, b, parts, rows, and a plan's three; `used`: of how many adapters tokens have one."""
    draw = torch.Generator().manual_seed(seed)
    y, x = (torch.randn(tokens, n, generator=draw).to(device, dtype) for n in (sum(rows), k))
    a = (torch.randn(slots, len(rows), rank, k, generator=draw) / k**0.5).to(device, dtype)
    b = torch.randn(slots, sum(rows), rank, generator=draw).to(device, dtype)
    parts = torch.randint(0, 2, (slots, len(rows)), generator=draw).int().to(device)
    adapters = torch.randint(0, used + 1, (tokens,), generator=draw).int().to(device)
    plan = LoraPlan.of(adapters, slots)
    return y, x, a, b, parts, rows, plan.adapters, plan.order, plan.starts


def ran(run, args) -> torch.Tensor:
    y = args[0].clone()
    run(y, *args[1:])
    return y


@EXAMPLES
@given(
    st.integers(0, 999), st.sampled_from([1, 2, 16, 17, 70]), st.sampled_from([8, 64, 200, 576]),
    st.sampled_from([(64,), (96, 32, 32), (70, 70), (8, 24, 40)]), st.sampled_from([16, 32, 64]), st.integers(1, 9),
    st.integers(0, 9),
)  # fmt: skip
def sums(device, dtype, seed, tokens, k, rows, rank, slots, used):
    args = case(seed, tokens, k, rows, rank, slots, min(used, slots), device, dtype)
    expected = ran(OP.reference, args)
    got = ran(multi_lora, args)
    limit = TOLERANCE[dtype] * (2 if dtype != torch.float32 else 4)  # a x is rounded, too
    assert error(got, expected, typical=rank**0.5) < limit
    untouched = args[6] == 0
    assert torch.equal(got[untouched], args[0][untouched])


def test_against_the_reference(device, dtype, triton):
    sums(device, dtype)


def test_torch_path(dtype):
    for seed in range(8):
        args = case(seed, 30, 72, (96, 32, 32), 16, 5, seed % 4 + 1, "cpu", dtype)
        if seed > 4:  # all have one
            plan = LoraPlan.of(torch.full((30,), seed - 3, dtype=torch.int32), 5)
            args = (*args[:6], plan.adapters, plan.order, plan.starts)
        assert error(ran(OP.torch, args), ran(OP.reference, args), typical=4) < 4 * TOLERANCE[dtype]


def test_views_absent_parts_and_nothing_foreign(device, triton):
    """Rows of x and y inside larger ones, slots with other slots between; what is not of the batch is NaN."""
    y, x, a, b, parts, rows, *plan = case(3, 20, 64, (32, 16, 16), 16, 6, 3, device, torch.float32)
    wide_x, wide_y = (
        torch.full((20, 100), float("nan"), device=device),
        torch.full((20, 90), float("nan"), device=device),
    )
    wide_x[:, 7:71], wide_y[:, 5:69] = x, y
    slots = torch.full((6, a[0].numel() + b[0].numel() + 9), float("nan"), device=device)
    slots[:, : a[0].numel()], slots[:, a[0].numel() : -9] = a.flatten(1), b.flatten(1)
    a2, b2 = slots[:, : a[0].numel()].view(a.shape), slots[:, a[0].numel() : -9].view(b.shape)
    for slot in range(3, 6):
        slots[slot] = float("nan")  # nobody's
    for slot, there in enumerate(parts.tolist()):
        for part in range(3):
            if not there[part]:
                a2[slot, part] = float("nan")
    expected = ran(OP.reference, (y, x, a, b, parts, rows, *plan))
    multi_lora(wide_y[:, 5:69], wide_x[:, 7:71], a2, b2, parts, rows, *plan)
    assert error(wide_y[:, 5:69].contiguous(), expected) < 1e-5
    assert wide_y[:, :5].isnan().all()
    assert wide_y[:, 69:].isnan().all()


def test_the_same_sums_whatever_the_neighbors(device, triton):
    """Bit for bit: from call to call, and, where NumPy does not multiply, for a token among others or alone."""
    args = case(5, 40, 300, (64, 32), 16, 4, 4, device, torch.float32)
    first = ran(multi_lora, args)
    assert torch.equal(ran(multi_lora, args), first)
    y, x, a, b, parts, rows, adapters, *_ = args
    for token in (0, 7, 39):
        plan = LoraPlan.of(adapters[token : token + 1], 4)
        alone = ran(multi_lora, (y[token : token + 1], x[token : token + 1], a, b, parts, rows, *vars(plan).values()))
        assert torch.equal(alone[0], first[token]) if GPU else error(alone[0], first[token]) < 1e-6


@given(st.lists(st.integers(0, 6), max_size=50))
def test_a_plan_holds_every_token_once_sorted_by_adapter(adapters):
    plan = LoraPlan.of(torch.tensor(adapters, dtype=torch.int32), 6)
    assert sorted(plan.order.tolist()) == list(range(len(adapters)))
    assert plan.starts.tolist()[0] == 0
    assert plan.starts.tolist()[-1] == len(adapters)
    for adapter, (begin, end) in enumerate(zip(plan.starts.tolist(), plan.starts.tolist()[1:], strict=False)):
        assert all(adapters[token] == adapter for token in plan.order[begin:end].tolist())


GOOD = case(0, 6, 32, (16, 8), 16, 2, 2, "cpu", torch.float32)
BAD = [
    (0, GOOD[0][:, :20], r"y: expected \[N, 24\]"),
    (0, GOOD[0][:5], r"y: expected \[N, 24\]"),
    (2, GOOD[2][:, :1], r"a: expected \[slots, 2, r, 32\]"),
    (2, GOOD[2][:, :, :8], "a: .*power of 2 from 16 on"),
    (3, GOOD[3][:, :20], r"b: expected \[2, 24, 16\]"),
    (4, GOOD[4].long(), r"parts: expected int32 \[2, 2\]"),
    (5, (24, 0, 0, 0), "rows: expected those of 1 to 3 parts"),
    (6, GOOD[6][:5], r"adapters: expected int32 \[6\]"),
    (7, GOOD[7].long(), r"order: expected int32 \[6\]"),
    (8, GOOD[8][:3], r"starts: expected int32 \[4\]"),
    (1, GOOD[1].long(), "x: expected a floating dtype"),
]


@pytest.mark.parametrize(("index", "value", "says"), BAD)
def test_bad_input_is_named(index, value, says):
    args = list(GOOD)
    args[index] = value
    with pytest.raises((TypeError, ValueError), match=says):
        multi_lora(*args)


def test_nothing_for_nobody():
    args = case(0, 0, 32, (16, 8), 16, 2, 2, "cpu", torch.float32)
    multi_lora(*args)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("many", [False, True])
def test_compiles_for_an_h100(dtype, rank, many):
    kernels, index = sys.modules["minillm.kernels.multi_lora"], torch.int32
    if many and dtype == torch.float32:
        pytest.skip("fp32 always has the small tiles")
    sizes = dict(kernels._SIZES["fp32" if dtype == torch.float32 else "many" if many else "few"])
    block_n, block_k, splits = (sizes.pop(name) for name in ("BLOCK_N", "BLOCK_K", "SPLITS"))
    shared = {"PARTS": 3, "R": rank, "COUNT": 16, "PDL": False, "PRECISION": "ieee", **sizes}
    shrink = (dtype, dtype, torch.float32, index, index, index, 64, 8, 4096, 1024, 4096, 10**6, 4096 * rank, 4096, 400)
    assert compile_kernel(kernels.shrink_kernel, *shrink, BLOCK_K=block_k, **shared).local_bytes == 0
    expand = (torch.float32, dtype, dtype, index, index, index, 64, 8, 4096, 1024, 1024, 6144, 10**6, rank, 400)
    assert compile_kernel(kernels.expand_kernel, *expand, SPLITS=splits, BLOCK_N=block_n, **shared).local_bytes == 0
