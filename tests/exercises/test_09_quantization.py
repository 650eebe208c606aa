"""Checks of exercises 9: a grid by hand, honest bits, signal to noise, scale and zero point, rounding in groups, packed
int4, a gradient through rounding, a writer and a reader with three bugs.
"""

import math
import numbers
import warnings

import torch

from minillm.learn.testing import exercise, expect, expect_close, expect_equal, expect_parts, expect_raises


def random_tensor(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def led_by_positive(w, group):
    """w [..., K] with signs turned so that the largest number of each group is positive.

    A negative one is -7.5 scales, a tie: in floating point it may fall to either side.
    """
    parts = w.unflatten(-1, (-1, group))
    return (parts * parts.gather(-1, parts.abs().argmax(-1, keepdim=True)).sign()).flatten(-2)


def limits(bits):
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def turned(x):
    """The same numbers, but neighbors in the last axis are not neighbors in memory: no view flattens them."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def expect_kept(what, x, before):
    """Hold that an argument is what it was before the call."""
    expect_equal(f"{what}, which has to stay as it is", x.flatten().tolist(), before.flatten().tolist())


def expect_tensor(what, got, dtype, shape):
    expect(isinstance(got, torch.Tensor), f"{what}: expected a tensor, got {type(got).__name__}")
    expect_equal(f"{what}: dtype", got.dtype, dtype)
    expect_equal(f"{what}: shape", tuple(got.shape), shape)


@exercise("9.1", "by_hand")
class TestByHand:
    NAMES = ("scale", "zero", "what is stored", "what is read back", "what 2.4 is read back as")

    def test_scale(self, impl):
        """the range over the number of steps, which is one less than the number of integers"""
        expect_close("scale", expect_parts(impl(), *self.NAMES)[0], 0.3)

    def test_zero(self, impl):
        """the zero point is the nearest integer to where 0 falls"""
        zero = expect_parts(impl(), *self.NAMES)[1]
        expect_equal("zero", zero, -2)
        expect(isinstance(zero, numbers.Integral), f"zero: expected an integer, got {type(zero).__name__}")

    def test_stored(self, impl):
        """each weight over the scale, rounded, plus the zero point"""
        stored = expect_parts(impl(), *self.NAMES)[2]
        stored = stored.tolist() if hasattr(stored, "tolist") else stored
        stored = expect_parts(stored, "first integer", "second", "third", "fourth")
        expect_equal("stored", stored, [-4, -2, -1, 3])
        for q in stored:
            expect(isinstance(q, numbers.Integral), f"stored: expected integers, got {q!r}, a {type(q).__name__}")

    def test_read_back(self, impl):
        """the zero point is taken off before the scale is put on; 0 comes back as 0"""
        expect_close("read back", expect_parts(impl(), *self.NAMES)[3], [-0.6, 0.0, 0.3, 1.5])

    def test_clipped(self, impl):
        """a number beyond the grid gets its last integer"""
        expect_close("2.4 is read back as", expect_parts(impl(), *self.NAMES)[4], 1.5)


@exercise("9.2", "bits_per_weight")
class TestBitsPerWeight:
    def test_scale(self, impl):
        """a group's scale is shared by its weights"""
        expect_close("4 bits, groups of 64", impl(4, 64, False, 640), 4.25)
        expect_close("2 bits, groups of 16", impl(2, 16, False, 160), 3.0)

    def test_zero_point(self, impl):
        """a zero point has as many bits as a weight"""
        expect_close("4 bits, groups of 32", impl(4, 32, True, 320), 4.625)
        expect_close("8 bits, groups of 32", impl(8, 32, True, 320), 8.75)

    def test_three_bits(self, impl):
        """3 bits are 3, not rounded up to 4, and the answer is not rounded"""
        expect_close("3 bits, groups of 128, a zero point", impl(3, 128, True, 1280), 3.1484375, rtol=1e-7)

    def test_kept(self, impl):
        """weights that stay count with 16 bits, each as much as any other"""
        expect_close("a quarter stays", impl(4, 64, False, 192, 64), (4.25 * 192 + 16 * 64) / 256)
        got = impl(4, 64, False, 106_168_320, 28_346_688)
        expect_close("SmolLM2", got, (4.25 * 106_168_320 + 16 * 28_346_688) / 134_515_008)
        expect_close("one in a hundred stays", impl(4, 64, False, 6336, 64), (4.25 * 6336 + 16 * 64) / 6400)
        got = impl(4, 32, True, 192, 64)
        expect_close("a quarter stays, the others have zero points", got, (4.625 * 192 + 16 * 64) / 256)

    def test_all_kept(self, impl):
        """a model of which nothing is rounded has 16 bits a weight"""
        expect_close("nothing rounded", impl(4, 64, True, 0, 10), 16.0)


@exercise("9.3", "sqnr")
class TestSqnr:
    def test_formula(self, impl):
        """ten times the decimal logarithm of the ratio of two sums of squares"""
        got = impl(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
        expect_close("25 over 0.25", got, 20.0)
        w, back = torch.tensor([[1.0, 2.0], [10.0, 20.0]]), torch.tensor([[0.0, 2.0], [10.0, 22.0]])
        expect_close("all elements count together", impl(w, back), 10 * math.log10(505 / 5))
        expect_close("noise above the signal", impl(torch.tensor([1.0]), torch.tensor([11.0])), -20.0)

    def test_float(self, impl):
        """the answer is a Python float"""
        got = impl(torch.ones(2), torch.zeros(2))
        expect(type(got) is float, f"expected a float, got {type(got).__name__}")

    def test_exact(self, impl):
        """infinite if nothing was lost"""
        got = impl(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
        expect_equal("no error", got, math.inf)
        expect_equal("zeros for zeros", impl(torch.zeros(3), torch.zeros(3)), math.inf)
        expect_equal("no numbers at all", impl(torch.zeros(0, 4), torch.zeros(0, 4)), math.inf)

    def test_nearly_exact(self, impl):
        """a small error is finite, whatever the scale of the numbers"""
        w = torch.tensor([1.0, 2.0], dtype=torch.float64)
        got, expected = impl(w, w + torch.tensor([0, 2.0**-40])), 10 * math.log10(5 * 4.0**40)
        expect_close("an error of 2^-40", got, expected, atol=0, rtol=1e-9)
        for size in (1e-30, 1e30):
            got = impl(torch.tensor([3.0, 4.0]) * size, torch.tensor([3.0, 4.5]) * size)
            expect_close(f"25 over 0.25, times {size:g}, squares beyond fp32", got, 20.0, atol=1e-4)

    def test_half(self, impl):
        """fp16 and bf16 do not spoil it"""
        w = torch.full((4000,), 2.0**-13, dtype=torch.float16)
        expect_close("small numbers in fp16", impl(w, w * 0.5), 10 * math.log10(4), atol=1e-4)
        w = torch.full((3000,), 1.0, dtype=torch.bfloat16)
        back = w.clone()
        back[0] = 0.5
        expect_close("a long sum in bf16", impl(w, back), 10 * math.log10(12_000), atol=1e-4)
        got = impl(torch.tensor([1.0, 3.0], dtype=torch.bfloat16), torch.tensor([1.0 + 2.0**-12, 3.0]))
        expect_close("a difference that bf16 does not see", got, 10 * math.log10(10 * 4.0**12), atol=1e-4)
        for dtype in (torch.float16, torch.bfloat16):
            w, back = torch.tensor([2048.0], dtype=dtype), torch.tensor([-0.5], dtype=dtype)
            expected = 20 * math.log10(2048 / 2048.5)
            expect_close(f"2048 and -0.5, whose difference is none of {dtype}", impl(w, back), expected, atol=1e-5)

    def test_strides(self, impl):
        """transposed tensors count like any other"""
        w, back = turned(torch.tensor([[1.0, 2.0], [10.0, 20.0]])), torch.tensor([[0.0, 2.0], [10.0, 22.0]])
        expect_close("w transposed in memory", impl(w, back), 10 * math.log10(505 / 5))

    def test_inputs(self, impl):
        """both inputs stay as they are"""
        for dtype in (torch.float32, torch.float64, torch.float16):
            w, back = torch.tensor([3.0, 4.0], dtype=dtype), torch.tensor([3.0, 4.5], dtype=dtype)
            kept = w.clone(), back.clone()
            impl(w, back)
            expect_kept(f"w, {dtype}", w, kept[0])
            expect_kept(f"back, {dtype}", back, kept[1])


@exercise("9.4", "grid")
class TestGrid:
    def made(self, impl, w, bits):
        kept = w.clone()
        scale, zero = expect_parts(impl(w, bits), "scale", "zero")
        expect_kept("w", w, kept)
        expect_tensor("scale", scale, torch.float32, (len(w),))
        expect_tensor("zero", zero, torch.int32, (len(w),))
        return scale, zero

    def back(self, w, scale, zero, bits):
        q = ((w / scale[:, None]).round() + zero[:, None]).clamp(*limits(bits))
        return (q - zero[:, None]) * scale[:, None]

    def test_by_hand(self, impl):
        """the grid of exercise 9.1, for each row its own"""
        w = torch.tensor([[-0.5, 0.0, 0.4, 1.6], [-1.4, 0.7, 0.1, 0.2], [0.0, -3.0, 0.5, 0.2]])
        scale, zero = self.made(impl, w, 3)
        expect_close("scale", scale, [0.3, 0.3, 0.5])
        expect_equal("zero", zero.tolist(), [-2, 1, 2])

    def test_bits(self, impl):
        """2^bits - 1 steps, for any number of bits"""
        w = torch.tensor([[-3.0, 12.0]])
        for bits, expected in ((2, 5.0), (4, 1.0), (8, 15 / 255)):
            scale, zero = self.made(impl, w, bits)
            expect_close(f"scale, {bits} bits", scale, [expected])
            expect_equal(f"zero, {bits} bits", zero.tolist(), [round(limits(bits)[0] + 3 / expected)])

    def test_one_sign(self, impl):
        """the range holds 0 where all numbers are positive, or negative"""
        scale, zero = self.made(impl, torch.tensor([[3.0, 1.5], [-1.5, -3.0]]), 4)
        expect_close("scale", scale, [0.2, 0.2])
        expect_equal("zero", zero.tolist(), [-8, 7])

    def test_zero_is_exact(self, impl):
        """0 is read back as 0, and every number to within half a scale"""
        for bits in (2, 3, 4, 8):
            w = random_tensor(7, 33, seed=bits) + torch.linspace(-3, 3, 7)[:, None]
            w[:, 5] = 0
            scale, zero = self.made(impl, w, bits)
            back = self.back(w, scale, zero, bits)
            expect_equal("0 comes back as", back[:, 5].abs().tolist(), [0.0] * 7)
            worst = float(((back - w).abs() / scale[:, None]).max())
            expect(worst <= 0.5001, f"{bits} bits: expected errors of at most half a scale, got {worst:.3f} of one")
            first, last = limits(bits)
            expect(
                first <= int(zero.min()) and int(zero.max()) <= last,
                f"zero: expected {first} to {last}, got {zero.tolist()}",
            )

    def test_ties(self, impl):
        """a zero point between two integers goes to the even one"""
        w = torch.tensor([[-7.5, 7.5], [-6.5, 8.5], [-5.5, 9.5], [-0.5, 14.5]])  # scale 1
        _, zero = self.made(impl, w, 4)
        expect_equal("-0.5, -1.5, -2.5, -7.5 rounded", zero.tolist(), [0, -2, -2, -8])

    def test_rows_of_zeros(self, impl):
        """a row of zeros has scale 1 and is read back as zeros; its neighbors keep their grids"""
        w = torch.tensor([[0.0, 0.0, 0.0], [-1.0, 0.0, 2.0], [-0.5, 0.0, 0.5], [0.0, 0.0, 6.0]])
        scale, zero = self.made(impl, w, 2)
        expect_close("scale", scale, [1.0, 1.0, 1 / 3, 2.0])
        back = self.back(w, scale, zero, 2)
        expect_close("a row of zeros comes back as", back[0], [0.0, 0.0, 0.0])
        expect_equal("zero of the second row", int(zero[1]), -1)
        expect_close("scale of nothing but zeros", self.made(impl, torch.zeros(2, 3), 4)[0], [1.0, 1.0])

    def test_sizes(self, impl):
        """small numbers keep a small scale, large ones a large one"""
        for size in (1e-30, 1e-12, 1e30):
            scale, zero = self.made(impl, torch.tensor([[-3.0, 12.0]]) * size, 4)
            expect_close(f"scale of (-3, 12) times {size:g}, over {size:g}", scale.double() / size, [1.0])
            expect_equal("zero", zero.tolist(), [-5])

    def test_half(self, impl):
        """fp16 and bf16 are computed with in fp32"""
        for dtype in (torch.float16, torch.bfloat16):
            w = random_tensor(5, 20, seed=3).to(dtype)
            w[0, 0], w[0, 1] = -60000.0, 50000.0  # their difference is beyond fp16
            w[1] = 60000.0  # as is their sum
            scale, zero = self.made(impl, w, 4)
            low, high = w.double().amin(1).clamp(max=0), w.double().amax(1).clamp(min=0)
            expected = (high - low) / 15
            expect_close(f"scale of {dtype}", scale, expected, atol=0, rtol=1e-6)
            expect_equal(f"zero of {dtype}", zero.tolist(), (-8 - low / expected).round().int().tolist())

    def test_errors(self, impl):
        """ValueError for NaN and infinity, in any row"""
        for bad in (math.nan, math.inf, -math.inf):
            for row, column, dtype in ((2, 1, torch.float32), (0, 0, torch.float16), (1, 3, torch.bfloat16)):
                w = torch.ones(3, 4, dtype=dtype)
                w[row, column] = bad
                expect_raises(ValueError, lambda w=w: impl(w, 4), f"{bad} at {(row, column)}")

    def test_strides(self, impl):
        """a transposed w has the same grid"""
        scale, zero = self.made(impl, turned(torch.tensor([[-3.0, 12.0, 1.0], [-0.5, 0.0, 7.0]])), 4)
        expect_close("scale", scale, [1.0, 0.5])
        expect_equal("zero", zero.tolist(), [-5, -7])

    def test_input(self, impl):
        """w stays as it is"""
        for dtype in (torch.float32, torch.float16):
            w = torch.tensor([[3.0, -1.5, 0.5], [0.0, 0.0, 0.0], [-4.0, -5.0, -0.5]], dtype=dtype)
            kept = w.clone()
            impl(w, 4)
            expect_kept("w", w, kept)


@exercise("9.5", "fake_quantize")
class TestFakeQuantize:
    def expected(self, w, bits, group):
        """Number by number, in fp64 where fp32 is enough."""
        first, last = limits(bits)
        flat = w.float().reshape(-1, w.shape[-1])
        out = torch.zeros(flat.shape)
        for i, row in enumerate(flat.tolist()):
            for begin in range(0, len(row), group):
                part = row[begin : begin + group]
                scale = max(map(abs, part)) / ((last - first) / 2)
                for j, x in enumerate(part):
                    out[i, begin + j] = 0 if scale == 0 else min(max(round(x / scale), first), last) * scale
        return out.reshape(w.shape)

    def compare(self, what, impl, w, bits, group):
        expected, kept = self.expected(w, bits, group).to(w.dtype), w.clone()
        got = impl(w, bits, group)
        expect_kept("w", w, kept)
        expect_tensor(what, got, w.dtype, tuple(w.shape))
        tolerance = {"atol": 1e-6} if w.dtype == torch.float32 else {"atol": 0, "rtol": 1e-6}
        expect_close(what, got, expected, **tolerance)

    def test_by_hand(self, impl):
        """4 bits: max|w| over 7.5, ties to the even integer, cut to -8 ... 7"""
        w = torch.tensor([[7.5, 0.5, 1.5, 2.5, -3.4, 0.0], [-7.5, -0.5, -1.5, 5.4, 5.6, 0.2]])
        expected = [[7.0, 0.0, 2.0, 2.0, -3.0, 0.0], [-8.0, 0.0, -2.0, 5.0, 6.0, 0.0]]
        expect_close("read back", impl(w, 4, 6), expected)

    def test_groups(self, impl):
        """every group of neighbors in a row has a scale of its own"""
        w = torch.tensor([[7.5, 1.0, 75.0, 10.0, 0.75, 0.1], [7.5, 1.2, 7.5, 1.2, -7.5, 1.2]])
        expected = [[7.0, 1.0, 70.0, 10.0, 0.7, 0.1], [7.0, 1.0, 7.0, 1.0, -8.0, 1.0]]
        expect_close("groups of 2", impl(w, 4, 2), expected)
        w = random_tensor(3, 24) * torch.tensor([1.0, 10.0, 0.01]).repeat_interleave(8)
        for bits, group in ((8, 8), (4, 12), (3, 4), (2, 24), (2, 1)):
            x = led_by_positive(w, group)
            self.compare(f"{bits} bits, groups of {group}", impl, x, bits, group)

    def test_zeros(self, impl):
        """a group of zeros stays zeros"""
        w = torch.tensor([[0.0, 0.0, 7.5, 1.0]])
        expect_close("read back", impl(w, 4, 2), [[0.0, 0.0, 7.0, 1.0]])

    def test_sizes(self, impl):
        """groups of small and of large numbers are rounded like others"""
        for size in (1e-30, 1e-12, 1e30):
            got = impl(torch.tensor([[7.5, 1.2]]) * size, 4, 2)
            expect_close(f"(7.5, 1.2) times {size:g}, read back, over {size:g}", got.double() / size, [[7.0, 1.0]])

    def test_dimensions(self, impl):
        """any number of dimensions, any strides"""
        w = led_by_positive(random_tensor(2, 3, 4, 8), 4)
        self.compare("four dimensions", impl, w, 4, 4)
        self.compare("one", impl, w[0, 0, 0].clone(), 4, 4)
        for shape in ((5, 12), (2, 3, 8)):
            w = turned(led_by_positive(random_tensor(*shape), 4))
            self.compare(f"a transposed view {list(shape)}", impl, w, 3, 4)

    def test_dtypes(self, impl):
        """computed in fp32, returned in w's dtype"""
        for dtype in (torch.float16, torch.bfloat16):
            self.compare("read back", impl, led_by_positive(random_tensor(4, 64, seed=2), 16).to(dtype), 8, 16)
        expect_tensor("read back", impl(torch.ones(2, 4), 4, 4), torch.float32, (2, 4))
        w = torch.tensor([[7.5, 0.5 + 1e-12, 1.5 - 1e-12, -3.0]], dtype=torch.float64)
        got = impl(w, 4, 4)
        expect_tensor("read back", got, torch.float64, (1, 4))
        expect_close("fp64: 0.5 + 1e-12 is a tie in fp32", got, [[7.0, 0.0, 2.0, -3.0]])

    def test_errors(self, impl):
        """ValueError if groups do not fill a row"""
        for k, group in ((8, 3), (8, 16), (12, 8)):
            expect_raises(ValueError, lambda k=k, group=group: impl(torch.ones(6, k), 4, group), f"{k} by {group}")

    def test_input(self, impl):
        """w stays as it is"""
        w = random_tensor(3, 8)
        for x in (w, w[0].clone(), turned(w), w.half(), w.double(), torch.zeros(3, 8)):
            for group in (4, 8):
                kept = x.clone()
                got = impl(x, 4, group)
                expect_kept("w", x, kept)
                got += 1
                expect_kept("w, after the result was changed (do they share memory?)", x, kept)


@exercise("9.6", "Int4")
class TestInt4:
    def numbers(self, n, k, seed=0):
        return torch.randint(-8, 8, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)

    def words(self, q):
        """One number after the other."""
        rows = []
        for row in q.tolist():
            row = row + [-8] * (-len(row) % 8)
            words = [sum((row[8 * j + i] + 8) << (4 * i) for i in range(8)) for j in range(len(row) // 8)]
            rows.append([w - 2**32 if w >= 2**31 else w for w in words])
        return torch.tensor(rows, dtype=torch.int32).reshape(len(q), -(-q.shape[1] // 8))

    def test_order(self, impl):
        """the first number lies in the lowest bits, each as q + 8"""
        got = impl.pack(torch.tensor([[-7, -6, -5, -4, -3, -2, -1, -8]], dtype=torch.int8))
        expect_tensor("packed", got, torch.int32, (1, 1))
        expect_equal("1, 2, ..., 7, 0 from the lowest bits up", f"{int(got[0, 0]):08x}", "07654321")

    def test_packs(self, impl):
        """words of many numbers, the highest bit included"""
        q = self.numbers(5, 24)
        q[0, 7], q[1, :8], q[2] = 7, 7, -8
        expected = self.words(q)
        got = impl.pack(q)
        expect_tensor("packed", got, torch.int32, (5, 3))
        expect_equal("packed", got.tolist(), expected.tolist())

    def test_rest(self, impl):
        """what is left of the last word is 0"""
        for k in (1, 7, 9, 12):
            q = self.numbers(3, k, seed=k)
            expected = self.words(q)
            got = impl.pack(q)
            expect_tensor(f"packed, K = {k}", got, torch.int32, (3, -(-k // 8)))
            expect_equal(f"packed, K = {k}", got.tolist(), expected.tolist())

    def test_unpacks(self, impl):
        """the first k numbers of each row, as int8"""
        q = self.numbers(4, 24, seed=9)
        q[0, :8], q[1, :8] = 7, -8
        words = self.words(q)
        for k in (24, 17, 8, 3, 1):
            got = impl.unpack(words.clone(), k)
            expect_tensor(f"unpacked, k = {k}", got, torch.int8, (4, k))
            expect_equal(f"unpacked, k = {k}", got.tolist(), q[:, :k].tolist())

    def test_one_row(self, impl):
        """one row is a matrix, too"""
        q = self.numbers(1, 11)
        words = self.words(q)
        got = impl.unpack(words.clone(), 11)
        expect_tensor("unpacked", got, torch.int8, (1, 11))
        expect_equal("unpacked", got.tolist(), q.tolist())
        got = impl.pack(q)
        expect_tensor("packed", got, torch.int32, (1, 2))
        expect_equal("packed", got.tolist(), words.tolist())

    def test_strides(self, impl):
        """transposed tensors pack and unpack like any other"""
        q = self.numbers(3, 20)
        expect_equal("packed", impl.pack(turned(q)).tolist(), self.words(q).tolist())
        expect_equal("unpacked", impl.unpack(turned(self.words(q)), 20).tolist(), q.tolist())

    def test_errors(self, impl):
        """ValueError for numbers outside -8 ... 7, wherever they are"""
        for bad in (8, -9, 127, -128):
            for row, column in ((1, 3), (0, 0), (2, 9), (1, 17)):
                q = self.numbers(3, 18)
                q[row, column] = bad
                expect_raises(ValueError, lambda q=q: impl.pack(q), f"a number {bad} at {(row, column)}")

    def test_no_rows(self, impl):
        """no rows pack to no rows"""
        expect_tensor("packed", impl.pack(torch.zeros(0, 12, dtype=torch.int8)), torch.int32, (0, 2))
        expect_tensor("unpacked", impl.unpack(torch.zeros(0, 2, dtype=torch.int32), 12), torch.int8, (0, 12))

    def test_inputs(self, impl):
        """inputs stay as they are"""
        for k in (16, 12, 5):
            q = self.numbers(2, k)
            words = self.words(q)
            kept, kept_words = q.clone(), words.clone()
            impl.pack(q)
            expect_kept("q", q, kept)
            impl.unpack(words, k)
            expect_kept("words", words, kept_words)


@exercise("9.7", "fake_quantize_ste")
class TestSte:
    def run(self, impl, w, scale, bits, grad=None):
        kept = w.clone(), scale.clone()
        w, scale = w.clone().requires_grad_(), scale.clone().requires_grad_()
        out = impl(w, scale, bits)
        expect_tensor("output", out, w.dtype, tuple(w.shape))
        expect_kept("w", w.detach(), kept[0])
        expect_kept("scale", scale.detach(), kept[1])
        grad = torch.ones_like(w) if grad is None else grad
        expect(out.requires_grad, "the output has no gradient: nothing that was rounded can learn")
        (out * grad).sum().backward()
        zeros = (torch.zeros_like(w), torch.zeros_like(scale))
        found = [z if x.grad is None else x.grad for x, z in zip((w, scale), zeros, strict=True)]
        return out.detach(), *found

    CASE = (torch.tensor([[0.5, 1.3, -2.6, 9.0, -20.0, 7.4]]), torch.tensor([[1.0]]))

    def test_forward(self, impl):
        """the value is that of rounding: exactly"""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = impl(*self.CASE, 4)
        expect_close("output", out, [[0.0, 1.0, -3.0, 7.0, -8.0, 7.0]], atol=1e-6)
        for dtype in (torch.float32, torch.float64):
            w = random_tensor(5, 40, seed=1, dtype=dtype)
            scale = torch.tensor([[0.07], [0.12], [1e-12], [0.29], [1e6]], dtype=dtype)
            for bits in (2, 3, 8):
                expected = (w / scale).round().clamp(*limits(bits)) * scale
                kept = w.clone()
                out = impl(w, scale, bits)
                expect_kept("w", w, kept)
                expect_tensor("output", out, dtype, (5, 40))
                expect_close(f"output, {bits} bits, {dtype}", out, expected, atol=0, rtol=0)

    def test_tie(self, impl):
        """a tie is where the quotient w / scale falls between two integers"""
        scale = torch.tensor([[0.33]])
        expect_close("2.5 scales, over the scale", impl(scale * 2.5, scale, 4) / scale, [[2.0]])
        scale = torch.tensor([[0.5]])
        w = torch.tensor([[0.25, 0.75, 1.25, -0.25, -0.75]])
        expect_close("ties go to the even integer", impl(w, scale, 4), [[0.0, 1.0, 1.0, 0.0, -1.0]])
        for dtype, bit in ((torch.float32, 2.0**-12), (torch.float64, 2.0**-40)):
            w, scale = torch.tensor([[0.5 + bit, 100.5 + bit]], dtype=dtype), torch.ones(1, 1, dtype=dtype)
            expect_close(f"what lies {bit:g} above a tie, {dtype}", impl(w, scale, 8), [[1.0, 101.0]])

    def test_weights(self, impl):
        """the gradient passes to w where nothing was cut, and is 0 where something was"""
        grad = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
        _, got, _ = self.run(impl, *self.CASE, 4, grad)
        expect_close("gradient of w", got, [[1.0, 2.0, 3.0, 0.0, 0.0, 0.0]])

    def test_scaled_weights(self, impl):
        """the gradient of w does not grow with the scale"""
        _, got, _ = self.run(impl, torch.tensor([[0.3, -0.9], [30.0, -90.0]]), torch.tensor([[0.25], [25.0]]), 4)
        expect_close("gradient of w", got, [[1.0, 1.0], [1.0, 1.0]])

    def test_limits(self, impl):
        """the limits themselves are inside"""
        _, w, scale = self.run(impl, torch.tensor([[14.0, -16.0]]), torch.tensor([[2.0]]), 4)
        expect_close("gradient of w", w, [[1.0, 1.0]])
        expect_close("gradient of the scale", scale, [[0.0]])

    def test_scale_inside(self, impl):
        """the slope for the scale is round(x) - x where nothing was cut"""
        w, scale = torch.tensor([[0.6, 2.6], [-1.4, 0.2]]), torch.tensor([[2.0], [1.0]])
        _, _, got = self.run(impl, w, scale, 4)
        expect_close("gradient of the scale", got, [[(0 - 0.3) + (1 - 1.3)], [(-1 + 1.4) + (0 - 0.2)]], atol=1e-5)

    def test_scale_cut(self, impl):
        """the slope for the scale is the limit where a number was cut"""
        w, scale = torch.tensor([[50.0], [-50.0]]), torch.tensor([[2.0], [2.0]])
        _, _, got = self.run(impl, w, scale, 3)
        expect_close("gradient of the scale", got, [[3.0], [-4.0]])

    def test_both(self, impl):
        """against the formulas, in fp64, with gradients that differ"""
        for bits in (2, 3, 4):
            w = random_tensor(6, 30, seed=bits, dtype=torch.float64)
            scale = torch.linspace(0.1, 0.7, 6, dtype=torch.float64)[:, None]
            grad = random_tensor(6, 30, seed=10 + bits, dtype=torch.float64)
            first, last = limits(bits)
            x = w / scale
            inside = (x >= first) & (x <= last)
            out, of_w, of_scale = self.run(impl, w, scale, bits, grad)
            expect_close("output", out, x.round().clamp(first, last) * scale, atol=0, rtol=0)
            expect_close("gradient of w", of_w, torch.where(inside, grad, 0.0), atol=1e-12, rtol=1e-12)
            slope = torch.where(inside, x.round() - x, x.clamp(first, last))
            expected = (grad * slope).sum(1, keepdim=True)
            expect_close("gradient of the scale", of_scale, expected, atol=1e-12, rtol=1e-12)

    def test_strides(self, impl):
        """a transposed w is rounded like any other"""
        w = random_tensor(3, 5, seed=4)
        scale = torch.tensor([[0.25], [0.5], [0.125]])
        expect_close("output", impl(turned(w), scale, 3), (w / scale).round().clamp(-4, 3) * scale)

    def test_inputs(self, impl):
        """w and scale stay as they are"""
        for size in (1e-10, 1.0, 1e6):
            w, scale = self.CASE[0] * size, self.CASE[1] * size
            kept = w.clone(), scale.clone()
            impl(w, scale, 4)
            expect_kept("w", w, kept[0])
            expect_kept("scale", scale, kept[1])


@exercise("9.8", "Mended")
class TestMended:
    def file(self, w, group, symmetric):
        """What the format says, one number after the other."""
        n, k = w.shape
        packed = [[0] * (k // 8) for _ in range(n)]
        scales, zeros = torch.zeros(n, k // group), torch.zeros(n, k // group, dtype=torch.int32)
        for i in range(n):
            for g in range(k // group):
                part = w[i, g * group : (g + 1) * group]
                low, high = min(float(part.min()), 0.0), max(float(part.max()), 0.0)
                scale = max(-low, high) / 7.5 if symmetric else (high - low) / 15
                z = 0 if symmetric else max(-8, min(7, round(-8 - low / scale)))
                scales[i, g], zeros[i, g] = scale, z
                for j, x in enumerate(part.tolist()):
                    at = g * group + j
                    q = max(-8, min(7, round(x / scale) + z))
                    packed[i][at // 8] |= (q + 8) << (4 * (at % 8))
        words = torch.tensor([[x - 2**32 if x >= 2**31 else x for x in row] for row in packed], dtype=torch.int32)
        found = {"packed": words, "scale": scales}
        return found if symmetric else found | {"zero": zeros}

    def value(self, file, group):
        q = torch.tensor(
            [[((x >> (4 * i)) & 15) - 8 for x in row for i in range(8)] for row in file["packed"].tolist()]
        )
        z = file.get("zero", torch.zeros_like(file["scale"])).repeat_interleave(group, 1)
        return (q - z) * file["scale"].repeat_interleave(group, 1)

    def written(self, impl, w, group, symmetric):
        kept = w.clone()
        got = impl.write(w, group, symmetric)
        expect_kept("w", w, kept)
        expect(isinstance(got, dict), f"write: expected a dictionary, got {type(got).__name__}")
        expect_equal(
            "tensors of the file", sorted(got), ["packed", "scale"] if symmetric else ["packed", "scale", "zero"]
        )
        groups = w.shape[1] // group
        expect_tensor("packed", got["packed"], torch.int32, (len(w), w.shape[1] // 8))
        expect_tensor("scale", got["scale"], torch.float32, (len(w), groups))
        if not symmetric:
            expect_tensor("zero", got["zero"], torch.int32, (len(w), groups))
        return got

    def test_symmetric_scale(self, impl):
        """a symmetric scale is max|w| / 7.5"""
        w = torch.tensor([[7.5, -1.0, 3.0, 2.0, 0.0, 1.0, 0.1, 2.0], [0.3, -15.0, 0, 0, 1, 1, 1, 1]])
        expect_close("scale", self.written(impl, w, 8, True)["scale"], [[1.0], [2.0]])

    def test_zero_point(self, impl):
        """the zero point is stored as it is"""
        w = torch.tensor([[-3.0, 12.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [-1.0, -15.0, -2, -2, -2, -2, -2, -2.0]])
        got = self.written(impl, w, 8, False)
        expect_close("scale", got["scale"], [[1.0], [1.0]])
        expect_equal("zero", got["zero"].tolist(), [[-5], [7]])

    def test_order(self, impl):
        """the first number of a word lies in its lowest bits"""
        w = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, -7.5]])
        got = self.written(impl, w, 8, True)["packed"]
        expect_equal("packed, in hexadecimal", f"{int(got[0, 0]) & 0xFFFFFFFF:08x}", "0edcba98")

    def hexadecimal(self, words):
        return [f"{x & 0xFFFFFFFF:08x}" for x in words.flatten().tolist()]

    def expect_file(self, what, impl, w, group, symmetric):
        expected, got = self.file(w, group, symmetric), self.written(impl, w, group, symmetric)
        for name, x in expected.items():
            if name == "packed":
                expect_equal(f"packed, in hexadecimal, {what}", self.hexadecimal(got[name]), self.hexadecimal(x))
            else:
                expect_close(f"{name}, {what}", got[name], x)

    def test_ties(self, impl):
        """ties go to the even integer; a weight is rounded first, then the zero point added"""
        for low in (-3.0, -6.5, -7.5, -5.0, 0.0):  # scale 1
            w = torch.tensor([[low, low + 15, 0.5, 1.5, 2.5, 3.5, -0.0, 1.0]])
            self.expect_file(f"from {low} to {low + 15}", impl, w, 8, False)
        self.expect_file("symmetric", impl, torch.tensor([[7.5, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.0]]), 8, True)

    def test_writes(self, impl):
        """files of many weights are as the format says, whatever the group"""
        for group in (16, 12, 3, 48):
            w = random_tensor(3, 48, seed=5)
            self.expect_file(f"symmetric, groups of {group}", impl, led_by_positive(w, group), group, True)
            self.expect_file(f"asymmetric, groups of {group}", impl, w + 0.4, group, False)

    def test_reads(self, impl):
        """files that another program wrote are read"""
        for symmetric in (True, False):
            for group in (12, 8, 48):
                file = self.file(random_tensor(3, 48, seed=6) + (0 if symmetric else 0.4), group, symmetric)
                expected = self.value(file, group)
                got = impl.read({name: x.clone() for name, x in file.items()}, group)
                expect_tensor("w", got, torch.float32, (3, 48))
                kind = "symmetric" if symmetric else "asymmetric"
                expect_close(f"w, {kind}, groups of {group}", got, expected)

    def test_round_trip(self, impl):
        """reading what was written loses at most half a scale"""
        for symmetric in (True, False):
            w = random_tensor(4, 32, seed=7)
            file = self.written(impl, w, 8, symmetric)
            got = impl.read(file, 8)
            expect_tensor("w", got, torch.float32, (4, 32))
            error = (got - w).abs() / file["scale"].repeat_interleave(8, 1)
            expect(float(error.max()) <= 0.501, f"expected at most half a scale, got {float(error.max()):.2f} of one")

    def test_strides(self, impl):
        """transposed tensors are written and read like any other"""
        for symmetric in (True, False):
            w = led_by_positive(random_tensor(3, 16, seed=8), 8)
            self.expect_file("w transposed in memory", impl, turned(w), 8, symmetric)
            file = self.file(w, 8, symmetric)
            got = impl.read({name: turned(x) for name, x in file.items()}, 8)
            expect_close("w, read", got, self.value(file, 8))

    def test_inputs(self, impl):
        """w and the file stay as they are"""
        for symmetric in (True, False):
            w = led_by_positive(random_tensor(3, 16, seed=9), 8)
            kept = w.clone()
            impl.write(w, 8, symmetric)
            expect_kept("w", w, kept)
            file = self.file(w, 8, symmetric)
            before = {name: x.clone() for name, x in file.items()}
            impl.read(file, 8)
            expect_equal("tensors of the file, after it was read", sorted(file), sorted(before))
            for name, x in before.items():
                expect_kept(name, file[name], x)
