"""The contracts of the exercises of chapter 4. Kernels run in Triton's interpreter, or compiled on a GPU."""

import math
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from minillm.learn.footprint import footprint
from minillm.learn.testing import (
    ContractError,
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
    """Run the kernel, and hold that it reads and writes nothing outside of its tensors; what it raised comes out as it
    was raised, not wrapped by the interpreter.
    """
    tensors = {f"argument {i}": a for i, a in enumerate(args) if isinstance(a, torch.Tensor)}
    with footprint(**tensors) if INTERPRETED else nullcontext() as seen:
        try:
            kernel[grid](*args, **sizes)
        except Exception as error:
            raise (error.__cause__ or error) from None
    expect_room_untouched(*tensors.values())
    expect_no_strays(seen)


def expect_no_strays(seen: Any) -> None:
    strays = 0 if seen is None else seen.strays
    if strays:
        raise ContractError(
            f"expected no access outside of the tensors\n  got      {strays} (a load or store needs its mask)"
        )


def expect_a_program_a_row(seen: Any, name: str, rows: int, width: int) -> None:
    """Hold that each row of `name` was written by one program, and that no program wrote two."""
    found: dict[int, set[int]] = {}
    for program, offsets in seen.stores[name]:
        found.setdefault(program, set()).update((offsets // width).tolist())
    several = {program: sorted(done) for program, done in found.items() if len(done) > 1}
    expect(not several, f"rows of {name} by program: expected one a program\n  got      {several}")
    expect_equal(f"programs that write rows of {name}", len(found), rows)


@contextmanager
def launches() -> Iterator[list[tuple[tuple, Any, int]]]:
    """What is launched in the block, each with its grid, its footprint and its BLOCK; the tensors among its arguments
    have the names "0", "1", ... there. A kernel gets copies with room around them, so that a store without a mask does
    no harm.
    """
    from triton.runtime.interpreter import InterpretedFunction

    run, found = InterpretedFunction.run, []

    def noted(self: Any, *args: Any, grid: Any, warmup: bool, **sizes: Any) -> Any:
        with _disable_current_modes():
            launch_copies(self, args, grid, warmup, sizes)

    def launch_copies(self: Any, args: tuple, grid: Any, warmup: bool, sizes: dict) -> None:
        own = [roomy(a) if isinstance(a, torch.Tensor) else a for a in args]
        named = {n: roomy(a) if isinstance(a, torch.Tensor) else a for n, a in sizes.items()}
        tensors = [t for t in (*own, *named.values()) if isinstance(t, torch.Tensor)]
        with footprint(**{str(i): t for i, t in enumerate(tensors)}) as seen:
            run(self, *own, grid=grid, warmup=warmup, **named)
        expect_room_untouched(*tensors)
        expect_no_strays(seen)
        given = [a for a in (*args, *sizes.values()) if isinstance(a, torch.Tensor)]
        for to, t in zip(given, tensors, strict=True):
            to.copy_(t)
        size = grid(sizes) if callable(grid) else grid
        found.append((tuple(size) if isinstance(size, tuple | list) else (size,), seen, sizes.get("BLOCK", 128)))

    with patch.object(InterpretedFunction, "run", noted):
        yield found


def power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


# ---- 4.w1


@exercise("4.w1", "block_of")
class TestBlockOf:
    def _is(self, impl, program, block, n, offsets, mask):
        got = expect_parts(impl(program, block, n), "offsets", "mask")
        what = f"of program {program}, blocks of {block}, n = {n}"
        for name, values, kind in zip(("offsets", "mask"), got, (int, bool), strict=True):
            expect(isinstance(values, list | tuple), f"{name}: expected a list\n  got      {type(values).__name__}")
            other = next((v for v in values if type(v) is not kind), None)
            said = f"{name}: expected a list of Python's {kind.__name__}\n  got      {other!r} in it"
            expect(other is None, said)
        expect_equal(f"offsets {what}", list(got[0]), offsets)
        expect_equal(f"mask {what}", list(got[1]), mask)

    def test_by_hand(self, impl):
        """10 numbers, blocks of 4: program 2 has the offsets 8, 9, 10, 11, and the last two lie outside"""
        self._is(impl, 2, 4, 10, [8, 9, 10, 11], [True, True, False, False])

    def test_first(self, impl):
        """program 0 begins at 0; a block that is full has no lane off"""
        self._is(impl, 0, 4, 10, [0, 1, 2, 3], [True] * 4)
        self._is(impl, 1, 2, 4, [2, 3], [True] * 2)

    def test_outside(self, impl):
        """a program behind the end has as many lanes as any, all off; one lane a block"""
        self._is(impl, 3, 4, 12, [12, 13, 14, 15], [False] * 4)
        self._is(impl, 5, 1, 6, [5], [True])
        self._is(impl, 0, 8, 0, list(range(8)), [False] * 8)

    def test_many(self, impl):
        """blocks of 1,024 and of 3, programs far in, and a last element that is the first of a block"""
        for program, block, n in ((0, 1024, 1000), (7, 1024, 7169), (999, 3, 3000), (999, 3, 2998), (1, 128, 128)):
            offsets = list(range(program * block, (program + 1) * block))
            self._is(impl, program, block, n, offsets, [i <= n - 1 for i in offsets])


# ---- 4.w2


@exercise("4.w2", "tile_offsets")
class TestTileOffsets:
    def _is(self, impl, row, column, rows, columns, stride):
        got = impl(row, column, rows, columns, stride)
        kind = "nothing (is a `return` missing?)" if got is None else type(got).__name__
        expect(isinstance(got, torch.Tensor), f"expected a tensor\n  got      {kind}")
        wanted = [[(row * rows + i) * stride + column * columns + j for j in range(columns)] for i in range(rows)]
        what = f"tile ({row}, {column}) of {rows} x {columns}, rows {stride} apart"
        expect_equal(f"shape of {what}", tuple(got.shape), (rows, columns))
        expect(not got.is_floating_point(), f"{what}: expected whole numbers\n  got      {got.dtype}")
        expect_equal(f"offsets of {what}", got.tolist(), wanted)

    def test_by_hand(self, impl):
        """the first tile of 3 x 4, rows 10 apart: 0 1 2 3, then 10 11 12 13, then 20 21 22 23"""
        got = impl(0, 0, 3, 4, 10)
        expect(isinstance(got, torch.Tensor), f"expected a tensor\n  got      {type(got).__name__}")
        expect_equal("offsets", got.tolist(), [[0, 1, 2, 3], [10, 11, 12, 13], [20, 21, 22, 23]])

    def test_further(self, impl):
        """tiles further down and to the right"""
        self._is(impl, 2, 0, 3, 4, 10)
        self._is(impl, 0, 3, 3, 4, 20)
        self._is(impl, 5, 2, 2, 8, 30)

    def test_one(self, impl):
        """tiles of one row, one column, one element"""
        self._is(impl, 4, 1, 1, 5, 11)
        self._is(impl, 1, 4, 5, 1, 11)
        self._is(impl, 2, 3, 1, 1, 7)

    def test_many(self, impl):
        """tiles of any size, in matrices of any width"""
        for case in (
            (3, 7, 64, 32, 1000),
            (1, 1, 5, 9, 18),
            (9, 0, 2, 128, 128),
            (0, 9, 128, 2, 20),
            (12, 13, 3, 3, 77),
        ):
            self._is(impl, *case)

    def test_far(self, impl):
        """in a large matrix offsets are more than int16 holds"""
        self._is(impl, 30, 20, 4, 8, 3000)


# ---- 4.w3


@exercise("4.w3", "row_max_kernel")
class TestRowMax:
    def _same(self, impl, x, block):
        y, before = roomy(torch.full((len(x),), NAN)), x.clone()
        launch(impl, (len(x),), x, y, x.shape[1], BLOCK=block)
        expect_close("y", y, [max(row) for row in x.tolist()], atol=0, rtol=0)
        expect(torch.equal(x, before), "x was changed; write to y alone")

    def test_by_hand(self, impl):
        """rows (1, 7, 3, 2) and (5, 4, 9, 8): 7 and 9"""
        self._same(impl, roomy(torch.tensor([[1.0, 7, 3, 2], [5, 4, 9, 8]])), 4)

    def test_negative(self, impl):
        """three negative numbers in a BLOCK of 4: the lane that is off must not win"""
        self._same(impl, roomy(torch.tensor([[-5.0, -2, -9], [-1, -3, -2], [-1e30, -2e30, -3e30]])), 4)

    def test_infinite(self, impl):
        """a row of minus infinity alone, and infinity, which wins"""
        self._same(impl, roomy(torch.tensor([[-math.inf] * 3, [-math.inf, 2, 1], [3e38, math.inf, -math.inf]])), 8)

    def test_programs(self, impl):
        """program r does row r (in the interpreter, where programs can be told apart)"""
        if not INTERPRETED:
            return
        x, y = randn(4, 5), roomy(torch.zeros(4))
        with footprint(y=y) as seen:
            launch(impl, (4,), x, y, 5, BLOCK=8)
        expect_equal("programs that wrote y", seen.picture("y").tolist(), [0.0, 1.0, 2.0, 3.0])

    def test_wide(self, impl):
        """rows of 11 in a BLOCK of 16: the next row does not count"""
        self._same(impl, randn(5, 11), 16)
        self._same(impl, randn(3, 1), 1)
        for n in (33, 64, 100, 257):
            x = -randn(2, n).abs() - 5
            x[0, -1], x[1, 0] = -1.0, -2.0  # the last element of a row wins, and the first
            self._same(impl, x, power_of_2(n))

    @last
    def test_compiles(self, impl):
        """it compiles for a GPU"""
        expect_launches_compile(lambda: launch(impl, (1,), randn(1, 100), roomy(torch.zeros(1)), 100, BLOCK=128))


# ---- 4.0


class Operations(TorchDispatchMode):
    """Notes torch's operations, but for those that make room or views."""

    FREE = ("empty", "zeros", "full", "view", "slice", "detach", "alias", "as_strided", "reshape", "expand", "squeeze")

    def __init__(self) -> None:
        super().__init__()
        self.computed: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.split(".")[0]
        if not any(free in name for free in self.FREE):
            self.computed.append(name)
        return function(*args, **(kwargs or {}))


@exercise("4.0", "scaled_add_relu")
class TestScaledAddReLU:
    def _same(self, impl, x, y, a, rtol=1e-6):
        given = x.clone(), y.clone()
        with launches() if INTERPRETED else nullcontext([]) as found:
            got = impl(a, x, y)
        kind = "nothing (is a `return` missing?)" if got is None else type(got).__name__
        expect(isinstance(got, torch.Tensor), f"expected a tensor\n  got      {kind}")
        if INTERPRETED and x.numel():
            expect_equal(f"launches of a Triton kernel for n = {x.numel()}", len(found), 1)
        expect_equal("dtype of the result", got.dtype, x.dtype)
        expect_equal("shape of the result", tuple(got.shape), tuple(x.shape))
        wanted = (a * x.double() + y.double()).clamp(min=0).to(x.dtype)
        expect_close("result", got, wanted, atol=1e-6, rtol=rtol)
        expect(torch.equal(x, given[0]) and torch.equal(y, given[1]), "x or y was changed; the result is a new tensor")
        expect(got.numel() == 0 or got.data_ptr() not in (x.data_ptr(), y.data_ptr()), "expected a new tensor")
        return found

    def test_by_hand(self, impl):
        """2 · (1, -3, 2) + (1, 1, -5): (3, 0, 0)"""
        x, y = (roomy(torch.tensor(v)) for v in ((1.0, -3.0, 2.0), (1.0, 1.0, -5.0)))
        got = impl(2.0, x, y)
        expect_close("result", got, [3.0, 0.0, 0.0])

    def test_kernel(self, impl):
        """a kernel of your own makes it, in one launch (in the interpreter, where launches can be seen)"""
        for n in (300, 2000):
            self._same(impl, randn(n), randn(n, seed=1), 0.5)

    def test_all_in_the_kernel(self, impl):
        """torch makes room for the result, and computes nothing"""
        for dtype in (torch.float32, torch.float16):
            x, y, asked = randn(300, dtype=dtype), randn(300, seed=1, dtype=dtype), Operations()
            with launches() if INTERPRETED else nullcontext(), asked:
                impl(0.5, x, y)
            said = f"{dtype}: expected all arithmetic in the kernel\n  got      torch's {', '.join(asked.computed)}"
            expect(not asked.computed, said)

    def test_lengths(self, impl):
        """one block, several, a block that is partly off, a single number, none"""
        for n in (128, 384, 300, 127, 129, 1, 0):
            self._same(impl, randn(n), randn(n, seed=1), -1.5)

    def test_programs(self, impl):
        """128 elements a program, as many programs as that takes (in the interpreter)"""
        for n, programs in ((0, 0), (1, 1), (50, 1), (128, 1), (129, 2), (300, 3), (384, 3), (1000, 8)):
            found = self._same(impl, randn(n), randn(n, seed=1), 2.0)
            if INTERPRETED:
                blocks = [block for _, _, block in found]
                expect(set(blocks) <= {128}, f"BLOCK for n = {n}: expected 128\n  got      {blocks}")
                expect_equal(f"programs for n = {n}", sum(math.prod(grid) for grid, _, _ in found), programs)

    def test_traffic(self, impl):
        """each element of x and y is read once, each one of the result written once (where bytes can be counted)"""
        if not INTERPRETED:
            return
        found = [seen for _, seen, _ in self._same(impl, randn(300), randn(300, seed=1), 2.0)]
        expect_equal("bytes read", sum(seen.bytes_moved(of="loads") for seen in found), 2 * 4 * 300)
        expect_equal("bytes written", sum(seen.bytes_moved(of="stores") for seen in found), 4 * 300)

    def test_fp16(self, impl):
        """fp16: computed in fp32, rounded once, fp16 in the result"""
        x, y = (randn(200, seed=s, dtype=torch.float16) for s in (0, 1))
        self._same(impl, x, y, 1 / 3, rtol=6e-4)
        x, y = (roomy(torch.full((5,), v, dtype=torch.float16)) for v in (300.0, -60_000.0))
        self._same(impl, x, y, 201.0, rtol=6e-4)  # 60,300 - 60,000
        self._same(impl, 2 * x, y, 201.0, rtol=6e-4)  # 120,600, more than fp16 holds, less 60,000

    @last
    def test_compiles(self, impl):
        """it compiles for a GPU, in fp16"""
        x, y = (randn(200, seed=s, dtype=torch.float16) for s in (0, 1))
        expect_launches_compile(lambda: impl(0.5, x, y))


# ---- 4.1


def run_softmax(
    kernel, x: torch.Tensor, lengths: list[int], block: int | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    length = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    y = roomy(torch.full(x.shape, NAN, dtype=dtype or x.dtype))
    launch(kernel, (x.shape[0],), x, length, y, x.shape[1], x.stride(0), BLOCK=block or power_of_2(x.shape[1]))
    expect_equal("lengths afterwards", length.tolist(), lengths)
    return y


def softmax_of(x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for r, n in enumerate(lengths):
        out[r, :n] = x[r, :n].double().cpu().softmax(0)
    return out


@exercise("4.1", "masked_softmax_kernel")
class TestMaskedSoftmax:
    def _same(self, impl, x, lengths, rtol=1e-5, atol=1e-6, **kwargs):
        before = x.clone()
        expect_close("y", run_softmax(impl, x, lengths, **kwargs), softmax_of(x, lengths), rtol=rtol, atol=atol)
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
        self._same(impl, randn(2, 1), [1, 0], block=1)

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

    def test_far_below(self, impl):
        """scores of -40,000 and -1e10 count like any others: what is masked is minus infinity, not a large number"""
        x = torch.tensor([[-40_000.0, -40_001.0, 0, 0], [-1e10, -1e10, 0, 0], [-300.0, 0.0, 300.0, 0]])
        self._same(impl, roomy(x), [2, 2, 3], rtol=0.01)
        x = torch.tensor([[-65_504.0, -65_504.0, 0, 0], [-40_000.0, -65_504.0, -40_000.0, 0]], dtype=torch.float16)
        self._same(impl, roomy(x), [2, 3], rtol=6e-4)

    def test_wide(self, impl):
        """rows of 300, many of them, scores from -60 to 60"""
        self._same(impl, 20 * randn(9, 300), [300, 299, 257, 256, 255, 129, 2, 1, 0], rtol=1e-4)

    def test_strides(self, impl):
        """rows of x with a gap between them"""
        self._same(impl, view(randn(4, 10)), [10, 3, 8, 1])

    def test_fp16(self, impl):
        """fp16: exponentials and their sum in fp32, fp16 in y"""
        self._same(impl, roomy(2 * randn(2, 600, dtype=torch.float16)), [600, 333], rtol=6e-4)

    def test_dtype_of_y(self, impl):
        """y has a dtype of its own: fp16 scores with an fp32 y are not rounded, nor fp32 scores before an fp16 y"""
        x = randn(3, 20, dtype=torch.float16)
        self._same(impl, x, [20, 7, 13], dtype=torch.float32, rtol=1e-5)
        self._same(impl, 4 * randn(3, 20), [20, 7, 13], dtype=torch.float16, rtol=6e-4, atol=1e-7)

    def test_reads_what_counts(self, impl):
        """a program a row, which reads each score that counts once, and no other (where bytes can be counted)"""
        if not INTERPRETED:
            return
        x, lengths = randn(4, 12), [3, 12, 0, 7]
        length, y = torch.tensor(lengths, dtype=torch.int32), roomy(torch.zeros(4, 12))
        with footprint(x=x, y=y) as seen:
            launch(impl, (4,), x, length, y, 12, 12, BLOCK=16)
        expect_equal("bytes of x read", seen.bytes_moved("x"), 4 * sum(lengths))
        expect_equal("bytes of y written", seen.bytes_moved("y"), 4 * y.numel())
        expect_a_program_a_row(seen, "y", 4, 12)

    @last
    def test_compiles(self, impl):
        """it compiles for a GPU, in fp16"""
        x = randn(1, 100, dtype=torch.float16)
        expect_launches_compile(lambda: run_softmax(impl, x, [70], dtype=torch.float32))


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
        expect_close("residual afterwards", residual, total, atol=1e-6, rtol=1e-6)
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

    def test_dtypes(self, impl):
        """x, residual and weight have dtypes of their own: the sum has residual's, the normed sum x's"""
        x, residual = torch.full((2, 24), 0.75, dtype=torch.float16), torch.full((2, 24), 2048.0)
        x[:, 3], residual[:, 5] = -3.0, 0.5
        self._same(impl, roomy(x), roomy(residual), randn(24, seed=2), rtol=6e-4)
        self._same(impl, randn(2, 21), randn(2, 21, seed=1, dtype=torch.float16), randn(21, dtype=torch.float16))
        residual = torch.full((2, 21), 1000.0)
        self._same(impl, randn(2, 21, dtype=torch.float16), roomy(residual), randn(21, seed=2), rtol=6e-4)
        x, residual, weight = randn(2, 200, dtype=torch.float16), randn(2, 200, seed=1), randn(200, seed=2)
        normed, _ = add_norm(x, residual, weight, 1e-5)
        launch(impl, (2,), x, residual, weight, 200, 200, 200, 1e-5, BLOCK=64)
        same = int((x == normed.half()).sum())
        expect(
            same > 390, f"x in fp16, residual in fp32: expected 400 numbers that are rounded once\n  got      {same}"
        )

    def test_strides(self, impl):
        """x and residual with gaps of different width between rows"""
        x, residual = view(randn(3, 13), extra=4), view(randn(3, 13, seed=1), extra=7)
        self._same(impl, x, residual, randn(13, seed=2))

    def test_wide(self, impl):
        """rows of 300 and of 1 in blocks of 64 and of 512, a row of zeros, numbers of 1,000"""
        for n, block in ((300, 64), (300, 512), (1, 64), (256, 256)):
            x, residual = 1000 * randn(5, n), randn(5, n, seed=1)
            x[2], residual[2] = 0, 0
            self._same(impl, x, residual, randn(n, seed=2), block=block)

    def test_eps(self, impl):
        """eps is added to the mean, inside the root"""
        self._same(impl, randn(2, 12), randn(2, 12, seed=1), randn(12, seed=2), eps=100.0)
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
        """a program a row; x read and written once, residual read at most twice, written once (in the interpreter)"""
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
        expect_a_program_a_row(seen, "x", 2, 21)

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
        """one tile of 16 x 32, one step of 64 along k"""
        self._same(impl, randn(16, 64), randn(64, 32, seed=1), randn(32, seed=2), blocks=(16, 32, 64))

    def test_grid(self, impl):
        """several tiles and steps: 32 x 64 x 48 in tiles of 16 x 32 x 16, and one row of three tiles"""
        self._same(impl, randn(32, 48), randn(48, 64, seed=1), randn(64, seed=2), blocks=(16, 32, 16))
        self._same(impl, randn(16, 16), randn(16, 96, seed=1), randn(96, seed=2), blocks=(16, 32, 16))

    def test_no_multiples(self, impl):
        """21 x 19 x 35: tiles hang over on all three axes, over NaN"""
        x, w, bias = view(randn(21, 35)), view(randn(35, 19, seed=1)), randn(19, seed=2)
        y = roomy(torch.full((21, 19), NAN))
        self._same(impl, x, w, bias, y)

    def test_many_tiles(self, impl):
        """70 x 90 x 130 in tiles of 32 x 16 x 64 and of 16 x 64 x 32"""
        for blocks in ((32, 16, 64), (16, 64, 32)):
            x, w, bias = view(randn(70, 130)), view(randn(130, 90, seed=1)), 100 * randn(90, seed=2)
            self._same(impl, x, w, bias, roomy(torch.full((70, 90), NAN)), blocks, atol=1e-4)

    def test_small(self, impl):
        """one row, one column, k below a step"""
        self._same(impl, view(randn(1, 20)), view(randn(20, 17, seed=1)), randn(17, seed=2))
        self._same(impl, view(randn(18, 33)), view(randn(33, 1, seed=1)), randn(1, seed=2))
        self._same(impl, view(randn(5, 3)), view(randn(3, 4, seed=1)), randn(4, seed=2))

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
        """fp16 inputs, k = 2,112 ones: 2,112 each, plus a bias of 0.5 that is rounded with it"""
        x, w = (roomy(torch.ones(shape, dtype=torch.float16)) for shape in ((16, 2112), (2112, 16)))
        bias = roomy(torch.full((16,), 0.5, dtype=torch.float16))
        self._same(impl, x, w, bias, blocks=(16, 16, 32), atol=0.6)

    def test_rounds_once(self, impl):
        """fp16 random numbers, k = 512: the sum and the bias in fp32, one rounding at the end"""
        x, w = randn(16, 512, dtype=torch.float16), randn(512, 16, seed=1, dtype=torch.float16)
        bias = randn(16, seed=2, dtype=torch.float16)
        self._same(impl, x, w, bias, blocks=(16, 16, 32), atol=1e-3, rtol=6e-4)

    def test_dtypes(self, impl):
        """bias and y have dtypes of their own: fp16 inputs with a bias and a result of fp32 are not rounded"""
        x, w = randn(18, 40, dtype=torch.float16), randn(40, 20, seed=1, dtype=torch.float16)
        for bias in (randn(20, seed=2), randn(20, seed=2, dtype=torch.float16)):
            self._same(impl, x, w, bias, roomy(torch.full((18, 20), NAN)))
        y = roomy(torch.full((18, 20), NAN, dtype=torch.float16))
        self._same(impl, x, w, 1000 + randn(20, seed=2), y, rtol=6e-4)

    def test_sum_and_bias_cancel(self, impl):
        """-2,049 plus a bias of 2,049.75 is 0.75: fp16 has neither number, so neither is rounded first"""
        for kind, kind_of_y in ((torch.float16, torch.float16), (torch.float32, torch.float16), (torch.float16, None)):
            x, w = torch.ones((16, 16), dtype=kind), torch.full((16, 16), -128.0, dtype=kind)
            w[3] = -129.0
            y = roomy(torch.full((16, 16), NAN, dtype=kind_of_y or torch.float32))
            self._same(impl, roomy(x), roomy(w), roomy(torch.full((16,), 2049.75)), y)

    def test_precision(self, impl):
        """tl.dot multiplies fp32 inputs in fp32, not in TF32 (seen in the interpreter, which itself computes either)"""
        if not INTERPRETED:
            return
        from triton.runtime.interpreter import InterpreterBuilder

        dot, asked = InterpreterBuilder.create_dot, set()

        def noted(builder, a, b, d, precision, *rest):
            asked.add(getattr(precision, "name", str(precision)))
            return dot(builder, a, b, d, precision, *rest)

        with patch.object(InterpreterBuilder, "create_dot", noted):
            self._same(impl, randn(16, 16), randn(16, 16, seed=1), randn(16, seed=2))
        said = 'expected input_precision="ieee" in tl.dot (TF32 is the default)\n  got      '
        expect(asked <= {"IEEE"}, said + ", ".join(sorted(asked)))

    def test_inputs_stay(self, impl):
        """x, w and bias stay as they were"""
        inputs = randn(16, 16), randn(16, 16, seed=1), randn(16, seed=2)
        kept = [t.clone() for t in inputs]
        self._same(impl, *inputs)
        expect(all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True)), "x, w or bias was changed")

    def test_traffic(self, impl):
        """a program reads its rows of x and columns of w once, and writes its tile once (where it can be counted)"""
        if not INTERPRETED:
            return
        x, w, bias, y = randn(40, 24), randn(24, 20, seed=1), randn(20, seed=2), roomy(torch.zeros(40, 20))
        with footprint(x=x, w=w, y=y) as seen:
            sizes = (*x.stride(), *w.stride(), *y.stride())
            launch(impl, (3, 2), x, w, bias, y, 40, 20, 24, *sizes, BLOCK_M=16, BLOCK_N=16, BLOCK_K=16)
        # Lanes that are off may be pointed at elements within: at most whole tiles are read.
        for name, moved, most in (
            ("x", seen.bytes_moved("x"), 2 * 4 * 48 * 24),
            ("w", seen.bytes_moved("w"), 3 * 4 * 24 * 32),
        ):
            expect(moved <= most, f"bytes of {name} read: expected at most {most}\n  got {moved}")
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
        names, card = set(outputs), dict(machine)
        got = expect_parts(impl(steps, names, card), "apart", "fused", "intensity")
        for name, value, wanted in zip(("seconds apart", "seconds fused", "intensity"), got, expected, strict=True):
            expect_close(name, value, wanted, atol=1e-12)
        expect(steps == kept, "the steps were changed")
        expect(names == set(outputs) and card == machine, "outputs or machine was changed")

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

    def test_output_only_read(self, impl):
        """a name in `outputs` that no step writes is in memory already: it is read, and not written"""
        self._is(impl, [step(100, {"x": 300}, {"y": 100})], {"x", "y"}, (0.65, 0.65, 0.25))
        self._is(impl, [step(100, {"x": 300}, {"y": 100})], {"y", "elsewhere"}, (0.65, 0.65, 0.25))

    def test_nothing_read(self, impl):
        """a step that reads nothing, and one whose result nobody needs"""
        steps = [step(0, {}, {"zeros": 100}), step(50, {"x": 100}, {"unused": 40})]
        self._is(impl, steps, {"zeros"}, (0.35 + 0.39, 0.45, 0.25))

    def test_written_twice(self, impl):
        """an output that two steps write is written once when fused"""
        steps = [step(10, {"x": 100}, {"y": 100}), step(10, {"y": 100}, {"y": 100})]
        self._is(impl, steps, {"y"}, (0.9, 0.45, 0.1))

    def test_mixed(self, impl):
        """apart: each step has its own maximum; fused: one maximum of the sums"""
        steps = [step(10_000, {"x": 100}, {"a": 900}), step(0, {"a": 900}, {"y": 1100})]
        self._is(impl, steps, {"y"}, (2.25 + 2.25, 2.25, 10_000 / 1200))
        sizes = {name: 10 * 3**i for i, name in enumerate("abcdef")}
        for seed in range(40):
            chance = random.Random(seed)
            names = [chance.sample("abcdef", 3) for _ in range(chance.randint(1, 6))]
            steps = [
                step(chance.choice([0, 500, 20_000]), {a: sizes[a], b: sizes[b]}, {c: sizes[c]}) for a, b, c in names
            ]
            wanted = set(chance.sample("abcdef", 3))
            each = [(sum(s["reads"].values()) + sum(s["writes"].values()), s["flops"]) for s in steps]
            written = {c for _, _, c in names}
            first = {n: min([i for i, (_, _, c) in enumerate(names) if c == n], default=99) for n in sizes}
            outside = {n for i, (a, b, _) in enumerate(names) for n in (a, b) if i <= first[n]}
            moved = sum(sizes[n] for n in outside) + sum(sizes[n] for n in written & wanted)
            flops = sum(f for _, f in each)
            apart = sum(0.25 + max(b / 1000, f / 5000) for b, f in each)
            fused = 0.25 + max(moved / 1000, flops / 5000)
            self._is(impl, steps, wanted, (apart, fused, flops / moved))
        steps = [step(10_000, {"x": 100}, {"a": 900}), step(5000, {"a": 900}, {"y": 100})]
        self._is(impl, steps, {"y"}, (2.25 + 1.25, 3.25, 15_000 / 200))


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

    def test_edges(self, impl):
        """one row of tiles, one column, one tile"""
        for case in ((1, 9, 4, 10, 20), (9, 1, 4, 10, 20), (1, 1, 4, 10, 20)):
            self._is(impl, *case)

    def test_any_group(self, impl):
        """the best may be any number from 1 to num_m: 3, 5, 6, or all rows"""
        for case in ((6, 6, 9, 1, 1), (10, 12, 25, 1, 1), (12, 12, 36, 1, 1), (7, 40, 20, 1, 9)):
            self._is(impl, *case)

    def test_random(self, impl):
        """80 draws of all numbers"""
        for seed in range(80):
            chance = random.Random(seed)
            case = chance.randint(1, 14), chance.randint(1, 12), chance.randint(1, 40)
            self._is(impl, *case, chance.choice([1, 7, 1000]), chance.choice([1, 7, 1000]))

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
