"""The contracts of the exercises of chapter 4. Kernels run in Triton's interpreter, or compiled on a GPU."""

import math
import os
from contextlib import nullcontext

import torch

from minillm.learn.footprint import footprint
from minillm.learn.testing import (
    exercise,
    expect,
    expect_close,
    expect_equal,
    expect_launches_compile,
    expect_parts,
    last,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
NAN = float("nan")


ROOM = 8192  # elements of NaN before and behind a tensor: a store without its mask shows there, and does no harm


def roomy(x: torch.Tensor) -> torch.Tensor:
    """A copy of x with room around it."""
    whole = torch.full((x.numel() + 2 * ROOM,), NAN, dtype=x.dtype, device=DEVICE)
    inner = whole[ROOM : ROOM + x.numel()].view(x.shape)
    return inner.copy_(x)


def expect_room_untouched(*tensors: torch.Tensor) -> None:
    for t in tensors:
        flat = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())
        if t.is_floating_point() and flat.numel() > 2 * ROOM:
            around = torch.cat((flat[:ROOM], flat[-ROOM:]))
            expect(bool(around.isnan().all()), "memory outside a tensor was written: a store needs its mask")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return roomy(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def view(x: torch.Tensor, extra: int = 3, transposed: bool = False) -> torch.Tensor:
    """The same matrix amid NaN: rows further apart than they are long (transposed: columns), NaN behind the last."""
    x = x.T if transposed else x
    memory = roomy(torch.full((x.shape[0] + 2, x.shape[1] + extra), NAN, dtype=x.dtype, device=x.device))
    out = memory[: x.shape[0], : x.shape[1]]
    out.copy_(x)
    return out.T if transposed else out


def launch(kernel, grid: tuple, *args, **sizes) -> None:
    """Run the kernel; what it raised comes out as it was raised, not wrapped by the interpreter."""
    try:
        kernel[grid](*args, **sizes)
    except Exception as error:
        raise (error.__cause__ or error) from None
    expect_room_untouched(*(a for a in args if isinstance(a, torch.Tensor)))


def power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


# ---- 4.1


def run_softmax(kernel, x: torch.Tensor, lengths: list[int], block: int | None = None) -> torch.Tensor:
    length = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    y = roomy(torch.full(x.shape, NAN, dtype=x.dtype))
    launch(kernel, (x.shape[0],), x, length, y, x.shape[1], x.stride(0), BLOCK=block or power_of_2(x.shape[1]))
    return y


def softmax_of(x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for r, n in enumerate(lengths):
        out[r, :n] = x[r, :n].double().cpu().softmax(0)
    return out


@exercise("4.1", "masked_softmax_kernel")
class TestMaskedSoftmax:
    def _same(self, impl, x, lengths, rtol=1e-5, **kwargs):
        before = x.clone()
        expect_close("y", run_softmax(impl, x, lengths, **kwargs), softmax_of(x, lengths), rtol=rtol)
        expect(torch.equal(x.nan_to_num(), before.nan_to_num()), "x was changed; write to y alone")

    def test_by_hand(self, impl):
        """scores (0, ln 3, 5, 5) of which two count: (1/4, 3/4, 0, 0)"""
        x = torch.tensor([[0.0, math.log(3), 5.0, 5.0]], device=DEVICE)
        expect_close("y", run_softmax(impl, x, [2]), [[0.25, 0.75, 0, 0]])

    def test_lengths(self, impl):
        """five rows of 16, each with a length of its own, up to the whole row"""
        self._same(impl, randn(5, 16), [16, 1, 7, 15, 2])

    def test_no_power_of_two(self, impl):
        """rows of 11 in a BLOCK of 16 or 32: nothing is written behind a row"""
        self._same(impl, randn(3, 11), [11, 4, 9])
        self._same(impl, randn(3, 11), [11, 4, 9], block=32)

    def test_padding_is_nan(self, impl):
        """NaN and infinity in the padding leave no trace"""
        x = randn(3, 8)
        x[0, 5:], x[1, 2:], x[2, 7:] = NAN, float("inf"), -float("inf")
        self._same(impl, x, [5, 2, 7])

    def test_length_zero(self, impl):
        """a row of length 0 is a row of zeros"""
        self._same(impl, randn(3, 6), [0, 6, 0])

    def test_large_scores(self, impl):
        """scores of 1,000 do not overflow, scores of -1,000 do not vanish"""
        self._same(impl, randn(2, 8) + torch.tensor([[1000.0], [-1000.0]], device=DEVICE), [8, 5], rtol=1e-3)

    def test_strides(self, impl):
        """rows of x with a gap between them"""
        self._same(impl, view(randn(4, 10)), [10, 3, 8, 1])

    def test_fp16(self, impl):
        """fp16: exponentials and their sum in fp32, fp16 in y"""
        self._same(impl, 2 * randn(2, 600, dtype=torch.float16), [600, 333], rtol=6e-4)

    def test_reads_what_counts(self, impl):
        """reads each score that counts once, and no other (in the interpreter, where bytes can be counted)"""
        if not INTERPRETED:
            return
        x, lengths = randn(4, 12), [3, 12, 0, 7]
        length, y = torch.tensor(lengths, dtype=torch.int32), roomy(torch.zeros(4, 12))
        with footprint(x=x, y=y) as seen:
            launch(impl, (4,), x, length, y, 12, 12, BLOCK=16)
        expect_equal("bytes of x read", seen.bytes_moved("x"), 4 * sum(lengths))
        expect_equal("bytes of y written", seen.bytes_moved("y"), 4 * y.numel())

    @last
    def test_compiles(self, impl):
        """it compiles for a GPU, in fp16"""
        expect_launches_compile(lambda: run_softmax(impl, randn(1, 100, dtype=torch.float16), [70]))


# ---- 4.2


def add_norm(x, residual, weight, eps):
    """What should stand in x and in residual, in fp64; the sum rounded to the residual's dtype."""
    total = (x.double() + residual.double()).to(residual.dtype)
    h = total.double()
    return (h / (h.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()), total


@exercise("4.2", "add_rms_norm_kernel")
class TestAddRMSNorm:
    def _same(self, impl, x, residual, weight, eps=1e-5, block=8, atol=1e-5, rtol=1e-5):
        normed, total = add_norm(x, residual, weight, eps)
        kept = weight.clone()
        sizes = (x.shape[1], x.stride(0), residual.stride(0), eps)
        launch(impl, (x.shape[0],), x, residual, weight, *sizes, BLOCK=block)
        expect_close("residual afterwards", residual, total, atol=1e-6)
        expect_close("x afterwards", x, normed, atol=atol, rtol=rtol)
        expect(torch.equal(weight, kept), "weight was changed")

    def test_by_hand(self, impl):
        """x = (1, 5), residual = (2, -1): sum (3, 4), mean square 12.5, weight (1, 2)"""
        x, residual = roomy(torch.tensor([[1.0, 5.0]])), roomy(torch.tensor([[2.0, -1.0]]))
        weight = torch.tensor([1.0, 2.0], device=DEVICE)
        launch(impl, (1,), x, residual, weight, 2, 2, 2, 0.0, BLOCK=2)
        expect_close("residual afterwards", residual, [[3.0, 4.0]])
        expect_close("x afterwards", x, [[3 / 12.5**0.5, 8 / 12.5**0.5]])

    def test_one_block(self, impl):
        """rows of 16 in one BLOCK of 16"""
        self._same(impl, randn(3, 16), randn(3, 16, seed=1), randn(16, seed=2), block=16)

    def test_several_blocks(self, impl):
        """rows of 24 in blocks of 8"""
        self._same(impl, randn(3, 24), randn(3, 24, seed=1), randn(24, seed=2))

    def test_no_multiple(self, impl):
        """rows of 21 in blocks of 8, and of 5 in one block of 8: the mean is over n elements"""
        self._same(impl, randn(3, 21), randn(3, 21, seed=1), randn(21, seed=2))
        self._same(impl, randn(3, 5), randn(3, 5, seed=1), randn(5, seed=2))

    def test_strides(self, impl):
        """x and residual with gaps of different width between rows"""
        x, residual = view(randn(3, 13), extra=4), view(randn(3, 13, seed=1), extra=7)
        self._same(impl, x, residual, randn(13, seed=2))

    def test_eps(self, impl):
        """eps is added to the mean, inside the root"""
        self._same(impl, 0.01 * randn(2, 12), 0.01 * randn(2, 12, seed=1), randn(12, seed=2), eps=0.5, atol=1e-7)

    def test_fp16(self, impl):
        """fp16 with squares beyond 65,504: mean and scaling in fp32, one rounding at the end"""
        x, residual = (300 * randn(2, 40, seed=s, dtype=torch.float16) for s in (0, 1))
        self._same(impl, x, residual, randn(40, seed=2, dtype=torch.float16), block=16, atol=1e-6, rtol=6e-4)

    def test_norm_of_the_rounded_sum(self, impl):
        """the norm is of the sum as it is stored, in fp16, and rounded once at the end"""
        x = torch.full((1, 8), 0.75, device=DEVICE, dtype=torch.float16)
        residual = torch.full((1, 8), 2048.0, device=DEVICE, dtype=torch.float16)
        x[0, 0], residual[0, 0] = 0.5, 0.5  # 2048.75 becomes 2048: the first element's share shows it
        weight = torch.full((8,), 1000.0, device=DEVICE, dtype=torch.float16)
        weight[1:] = 1.0 + 1 / 1024
        normed, _ = add_norm(x, residual, weight, 1e-5)
        launch(impl, (1,), x, residual, weight, 8, 8, 8, 1e-5, BLOCK=8)
        expect_equal("residual afterwards", residual.tolist(), [[1.0] + [2048.0] * 7])
        expect_equal("x afterwards", x.tolist(), normed.half().tolist())

    def test_traffic(self, impl):
        """x read and written once; residual read at most twice, written once (where bytes can be counted)"""
        if not INTERPRETED:
            return
        x, residual, weight = randn(2, 21), randn(2, 21, seed=1), randn(21, seed=2)
        with footprint(x=x, residual=residual) as seen:
            launch(impl, (2,), x, residual, weight, 21, 21, 21, 1e-5, BLOCK=8)
        expect_equal("bytes of x read", seen.bytes_moved("x", of="loads"), 4 * x.numel())
        expect_equal("bytes of x written", seen.bytes_moved("x", of="stores"), 4 * x.numel())
        expect_equal("bytes of residual written", seen.bytes_moved("residual", of="stores"), 4 * x.numel())
        read = seen.bytes_moved("residual", of="loads")
        expect(read <= 8 * x.numel(), f"residual: expected at most {8 * x.numel()} bytes read\n  got {read}")

    @last
    def test_compiles(self, impl):
        """it compiles for a GPU, in fp16"""
        x, residual = (randn(1, 100, seed=s, dtype=torch.float16) for s in (0, 1))
        args = (x, residual, randn(100, dtype=torch.float16), 100, 100, 100, 1e-5)
        expect_launches_compile(lambda: launch(impl, (1,), *args, BLOCK=64))


# ---- 4.3


@exercise("4.3", "matmul_bias_kernel")
class TestMatmulBias:
    def _same(self, impl, x, w, bias, y=None, blocks=(16, 16, 16), atol=1e-5, rtol=1e-5):
        (m, k), n = x.shape, w.shape[1]
        y = roomy(torch.full((m, n), NAN, dtype=x.dtype)) if y is None else y
        sizes = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), blocks, strict=True))
        grid = (-(-m // blocks[0]), -(-n // blocks[1]))
        launch(impl, grid, x, w, bias, y, m, n, k, *x.stride(), *w.stride(), *y.stride(), **sizes)
        expect_close("y", y, x.double() @ w.double() + bias.double(), atol=atol, rtol=rtol)

    def test_one_tile(self, impl):
        """one tile, one step along k: 16 x 16 x 16"""
        self._same(impl, randn(16, 16), randn(16, 16, seed=1), randn(16, seed=2))

    def test_grid(self, impl):
        """several tiles and steps: 32 x 64 x 48 in tiles of 16 x 32 x 16, and one row of three tiles"""
        self._same(impl, randn(32, 48), randn(48, 64, seed=1), randn(64, seed=2), blocks=(16, 32, 16))
        self._same(impl, randn(16, 16), randn(16, 96, seed=1), randn(96, seed=2), blocks=(16, 32, 16))

    def test_no_multiples(self, impl):
        """21 x 19 x 35: tiles hang over on all three axes, over NaN"""
        x, w, bias = view(randn(21, 35)), view(randn(35, 19, seed=1)), randn(19, seed=2)
        y = roomy(torch.full((21, 19), NAN))
        with footprint(x=x, w=w, bias=bias, y=y) if INTERPRETED else nullcontext() as seen:
            self._same(impl, x, w, bias, y)
        strays = seen.strays if INTERPRETED else 0
        expect(strays == 0, f"expected no access outside x, w, bias and y\n  got {strays} (a mask is missing)")

    def test_nothing_is_written_outside(self, impl):
        """a result amid other data: what lies around it stays"""
        memory = roomy(torch.full((24, 30), 7.0))
        self._same(impl, randn(18, 16), randn(16, 20, seed=1), randn(20, seed=2), y=memory[:18, :20])
        expect(bool((memory[18:] == 7).all() and (memory[:, 20:] == 7).all()), "memory around y was written")

    def test_transposed_views(self, impl):
        """x, w and y as transposed views, one at a time and all together"""
        for tx, tw, ty in ((True, False, False), (False, True, False), (False, False, True), (True, True, True)):
            x, w = view(randn(18, 20), transposed=tx), view(randn(20, 22, seed=1), transposed=tw)
            y = roomy(torch.full((22, 18), NAN)).T if ty else None
            self._same(impl, x, w, randn(22, seed=2), y)

    def test_accumulates_in_fp32(self, impl):
        """fp16 inputs, k = 2,112: the sum of 2,112 ones, plus a bias of 0.5 that is rounded with it, is 2,112"""
        x, w = (roomy(torch.ones(shape, dtype=torch.float16)) for shape in ((16, 2112), (2112, 16)))
        bias = roomy(torch.full((16,), 0.5, dtype=torch.float16))
        self._same(impl, x, w, bias, blocks=(16, 16, 32), atol=0.6)
        x, w = randn(16, 512, dtype=torch.float16), randn(512, 16, seed=1, dtype=torch.float16)
        bias = randn(16, seed=2, dtype=torch.float16)
        self._same(impl, x, w, bias, blocks=(16, 16, 32), atol=1e-3, rtol=6e-4)

    def test_inputs_stay(self, impl):
        """x, w and bias stay as they were"""
        inputs = randn(16, 16), randn(16, 16, seed=1), randn(16, seed=2)
        kept = [t.clone() for t in inputs]
        self._same(impl, *inputs)
        expect(all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True)), "x, w or bias was changed")

    def test_traffic(self, impl):
        """reads x once for each column of tiles, w once for each row of tiles (where bytes can be counted)"""
        if not INTERPRETED:
            return
        x, w, bias, y = randn(40, 24), randn(24, 20, seed=1), randn(20, seed=2), roomy(torch.zeros(40, 20))
        with footprint(x=x, w=w, y=y) as seen:
            sizes = (*x.stride(), *w.stride(), *y.stride())
            launch(impl, (3, 2), x, w, bias, y, 40, 20, 24, *sizes, BLOCK_M=16, BLOCK_N=16, BLOCK_K=16)
        expect_equal("bytes of x read", seen.bytes_moved("x"), 2 * 4 * x.numel())
        expect_equal("bytes of w read", seen.bytes_moved("w"), 3 * 4 * w.numel())
        expect_equal("bytes of y written", seen.bytes_moved("y"), 4 * y.numel())

    @last
    def test_compiles(self, impl):
        """it compiles for a GPU, in fp16"""
        x, w, bias = (randn(*shape, dtype=torch.float16) for shape in ((64, 64), (64, 64), (64,)))
        expect_launches_compile(lambda: self._same(impl, x, w, bias, blocks=(64, 64, 32), atol=0.05, rtol=0.01))


# ---- 4.4

CARD = {"bandwidth": 1000.0, "flops": 5000.0, "launch": 0.25}


def step(flops: float, reads: dict, writes: dict) -> dict:
    return {"flops": flops, "reads": dict(reads), "writes": dict(writes)}


@exercise("4.4", "roofline")
class TestRoofline:
    def _is(self, impl, steps, outputs, expected, machine=CARD):
        kept = [{**s, "reads": dict(s["reads"]), "writes": dict(s["writes"])} for s in steps]
        got = expect_parts(impl(steps, outputs, dict(machine)), "apart", "fused", "intensity")
        for name, value, wanted in zip(("seconds apart", "seconds fused", "intensity"), got, expected, strict=True):
            expect_close(name, value, wanted, atol=1e-12)
        expect(steps == kept, "the steps were changed")

    def test_one_step(self, impl):
        """one kernel, bound by memory: 300 bytes read, 100 written, 100 FLOPs"""
        self._is(impl, [step(100, {"x": 300}, {"y": 100})], {"y"}, (0.65, 0.65, 0.25))

    def test_bound_by_arithmetic(self, impl):
        """one kernel under the flat roof: the larger of the two times, not their sum"""
        self._is(impl, [step(10_000, {"x": 300}, {"y": 100})], {"y"}, (2.25, 2.25, 25.0))

    def test_intermediate_stays(self, impl):
        """silu, then product: the intermediate is neither written nor read"""
        silu = step(200, {"gate": 100}, {"s": 100})
        product = step(50, {"s": 100, "up": 100}, {"y": 100})
        self._is(impl, [silu, product], {"y"}, (0.45 + 0.55, 0.55, 250 / 300))

    def test_read_by_several(self, impl):
        """a tensor that three steps read moves once when fused, three times apart"""
        steps = [step(10, {"x": 200}, {name: 8}) for name in ("max", "sum")]
        steps.append(step(10, {"x": 200, "max": 8, "sum": 8}, {"y": 200}))
        self._is(impl, steps, {"y"}, (2 * 0.458 + 0.25 + 0.416, 0.65, 30 / 400))

    def test_intermediate_that_is_wanted(self, impl):
        """an intermediate in `outputs` is written, and still not read again: residual + norm"""
        add = step(100, {"x": 100, "residual": 100}, {"h": 100})
        norm = step(400, {"h": 100, "weight": 10}, {"y": 100})
        self._is(impl, [add, norm], {"y", "h"}, (0.55 + 0.46, 0.25 + 0.41, 500 / 410))

    def test_in_place(self, impl):
        """a tensor that is read from outside and then written: both count; read again after that: no more"""
        steps = [step(100, {"r": 100, "x": 50}, {"r": 100}), step(100, {"r": 100}, {"x": 50})]
        self._is(impl, steps, {"r", "x"}, (0.5 + 0.4, 0.25 + 0.3, 200 / 300))

    def test_written_twice(self, impl):
        """an output that two steps write is written once when fused"""
        steps = [step(10, {"x": 100}, {"y": 100}), step(10, {"y": 100}, {"y": 100})]
        self._is(impl, steps, {"y"}, (0.9, 0.45, 0.1))

    def test_mixed(self, impl):
        """apart: each step has its own maximum; fused: one maximum of the sums"""
        steps = [step(10_000, {"x": 100}, {"a": 900}), step(0, {"a": 900}, {"y": 1100})]
        self._is(impl, steps, {"y"}, (2.25 + 2.25, 2.25, 10_000 / 1200))


# ---- 4.5


def numbered(num_m: int, num_n: int, group: int) -> list[tuple[int, int]]:
    """All tiles in order of their numbers, by walking through the bands."""
    order = []
    for first in range(0, num_m, group):
        for column in range(num_n):
            order += [(row, column) for row in range(first, min(first + group, num_m))]
    return order


def cheapest(num_m: int, num_n: int, programs: int, row_bytes: int, column_bytes: int) -> tuple[int, int]:
    best = None
    for group in range(1, num_m + 1):
        order, total = numbered(num_m, num_n, group), 0
        while order:
            wave, order = order[:programs], order[programs:]
            total += row_bytes * len({r for r, _ in wave}) + column_bytes * len({c for _, c in wave})
        best = (group, total) if best is None or total < best[1] else best
    return best


@exercise("4.5", "best_group")
class TestBestGroup:
    def _is(self, impl, *case):
        names = "num_m, num_n, programs, row_bytes, column_bytes"
        got = expect_parts(impl(*case), "group", "bytes")
        expect_equal(f"(group, bytes) for {names} = {case}", tuple(got), cheapest(*case))

    def test_by_hand(self, impl):
        """4 x 4 tiles, 4 at a time, strips of 1: squares of 2 x 2, four waves of 4 strips"""
        expect_equal("(group, bytes)", tuple(expect_parts(impl(4, 4, 4, 1, 1), "group", "bytes")), (2, 16))

    def test_all_at_once(self, impl):
        """all tiles in one wave: any group does, so 1"""
        self._is(impl, 3, 5, 15, 10, 20)
        self._is(impl, 3, 5, 99, 10, 20)

    def test_one_at_a_time(self, impl):
        """one program: nothing is shared, so 1"""
        self._is(impl, 3, 4, 1, 10, 20)

    def test_lower_band(self, impl):
        """rows that no group divides: the last band is lower"""
        for num_m in (5, 7, 11):
            self._is(impl, num_m, 6, 9, 100, 100)

    def test_short_wave(self, impl):
        """tiles that programs do not divide: the last wave is short, and waves begin inside a band"""
        self._is(impl, 6, 7, 8, 100, 100)
        self._is(impl, 8, 9, 13, 100, 100)

    def test_strips_of_different_cost(self, impl):
        """expensive rows want low bands, expensive columns want high ones"""
        self._is(impl, 16, 16, 16, 800, 100)
        self._is(impl, 16, 16, 16, 100, 800)

    def test_a_gpu(self, impl):
        """4,096 x 8,192 in tiles of 128 x 256, K = 4,096 in bf16, 132 programs"""
        self._is(impl, 32, 32, 132, 128 * 4096 * 2, 256 * 4096 * 2)
