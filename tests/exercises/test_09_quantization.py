"""Checks of exercises 9: a grid by hand, honest bits, signal to noise, scale and zero point, rounding in groups, packed
int4, a gradient through rounding, a writer and a reader with three bugs.
"""

import math
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
        expect(isinstance(zero, int), f"zero: expected an integer, got {type(zero).__name__}")

    def test_stored(self, impl):
        """each weight over the scale, rounded, plus the zero point"""
        expect_equal("stored", list(expect_parts(impl(), *self.NAMES)[2]), [-4, -2, -1, 3])

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

    def test_kept(self, impl):
        """weights that stay count with 16 bits, each as much as any other"""
        expect_close("a quarter stays", impl(4, 64, False, 192, 64), (4.25 * 192 + 16 * 64) / 256)
        got = impl(4, 64, False, 106_168_320, 28_346_688)
        expect_close("SmolLM2", got, (4.25 * 106_168_320 + 16 * 28_346_688) / 134_515_008)

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

    def test_inputs(self, impl):
        """both inputs stay as they are"""
        w, back = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
        impl(w, back)
        expect_equal("w", w.tolist(), [3.0, 4.0])
        expect_equal("back", back.tolist(), [3.0, 4.5])


@exercise("9.4", "grid")
class TestGrid:
    def made(self, impl, w, bits):
        scale, zero = expect_parts(impl(w, bits), "scale", "zero")
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

    def test_rows_of_zeros(self, impl):
        """a row of zeros has scale 1 and is read back as zeros; its neighbors keep their grids"""
        w = torch.tensor([[0.0, 0.0, 0.0], [-1.0, 0.0, 2.0]])
        scale, zero = self.made(impl, w, 2)
        expect_close("scale", scale, [1.0, 1.0])
        back = self.back(w, scale, zero, 2)
        expect_close("a row of zeros comes back as", back[0], [0.0, 0.0, 0.0])
        expect_equal("zero of the other row", int(zero[1]), -1)

    def test_small_rows(self, impl):
        """small numbers keep a small scale"""
        scale, _ = self.made(impl, torch.tensor([[-3e-12, 12e-12]]), 4)
        expect_close("scale", scale * 1e12, [1.0])

    def test_half(self, impl):
        """fp16 and bf16 are computed with in fp32"""
        for dtype in (torch.float16, torch.bfloat16):
            w = random_tensor(5, 20, seed=3).to(dtype)
            w[0, 0], w[0, 1] = -60000.0, 60000.0  # their difference is beyond fp16
            scale, zero = self.made(impl, w, 4)
            low, high = w.double().amin(1).clamp(max=0), w.double().amax(1).clamp(min=0)
            expected = (high - low) / 15
            expect_close(f"scale of {dtype}", scale, expected, atol=0, rtol=1e-6)
            expect_equal(f"zero of {dtype}", zero.tolist(), (-8 - low / expected).round().int().tolist())

    def test_errors(self, impl):
        """ValueError for NaN and infinity, in any row"""
        for bad in (math.nan, math.inf, -math.inf):
            w = torch.ones(3, 4)
            w[2, 1] = bad
            expect_raises(ValueError, lambda w=w: impl(w, 4), f"{bad} in the last row")

    def test_input(self, impl):
        """w stays as it is"""
        w = torch.tensor([[3.0, 1.5], [0.0, 0.0]])
        impl(w, 4)
        expect_equal("w", w.tolist(), [[3.0, 1.5], [0.0, 0.0]])


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
            expect_close(f"{bits} bits, groups of {group}", impl(x, bits, group), self.expected(x, bits, group))

    def test_zeros(self, impl):
        """a group of zeros stays zeros"""
        w = torch.tensor([[0.0, 0.0, 7.5, 1.0]])
        expect_close("read back", impl(w, 4, 2), [[0.0, 0.0, 7.0, 1.0]])

    def test_small(self, impl):
        """small groups are rounded like large ones"""
        w = torch.tensor([[7.5e-12, 1.2e-12]])
        expect_close("read back, times 1e12", impl(w, 4, 2) * 1e12, [[7.0, 1.0]])

    def test_dimensions(self, impl):
        """any number of dimensions, any strides"""
        w = led_by_positive(random_tensor(2, 3, 4, 8), 4)
        expect_close("four dimensions", impl(w, 4, 4), self.expected(w, 4, 4))
        expect_close("one", impl(w[0, 0, 0], 4, 4), self.expected(w[0, 0, 0], 4, 4))
        turned = led_by_positive(random_tensor(5, 12), 4).t().contiguous().t()
        expect_close("a transposed view", impl(turned, 3, 4), self.expected(turned, 3, 4))

    def test_dtypes(self, impl):
        """computed in fp32, returned in w's dtype"""
        for dtype in (torch.float16, torch.bfloat16):
            w = led_by_positive(random_tensor(4, 64, seed=2), 16).to(dtype)
            got = impl(w, 8, 16)
            expect_tensor("read back", got, dtype, (4, 64))
            expect_close(f"{dtype}", got, self.expected(w, 8, 16).to(dtype), atol=0, rtol=1e-6)
        expect_tensor("read back", impl(torch.ones(2, 4), 4, 4), torch.float32, (2, 4))

    def test_errors(self, impl):
        """ValueError if groups do not fill a row"""
        for k, group in ((8, 3), (8, 16), (12, 8)):
            expect_raises(ValueError, lambda k=k, group=group: impl(torch.ones(6, k), 4, group), f"{k} by {group}")

    def test_input(self, impl):
        """w stays as it is"""
        w = random_tensor(3, 8)
        kept = w.clone()
        impl(w, 4, 4)
        expect_close("w", w, kept, atol=0, rtol=0)


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
        q[0, 7], q[1, :8] = 7, 7
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
        for k in (24, 17, 8, 3):
            got = impl.unpack(words.clone(), k)
            expect_tensor(f"unpacked, k = {k}", got, torch.int8, (4, k))
            expect_equal(f"unpacked, k = {k}", got.tolist(), q[:, :k].tolist())

    def test_errors(self, impl):
        """ValueError for numbers outside -8 ... 7"""
        for bad in (8, -9, 127, -128):
            q = self.numbers(2, 16)
            q[1, 3] = bad
            expect_raises(ValueError, lambda q=q: impl.pack(q), f"a number {bad}")

    def test_no_rows(self, impl):
        """no rows pack to no rows"""
        expect_tensor("packed", impl.pack(torch.zeros(0, 12, dtype=torch.int8)), torch.int32, (0, 2))
        expect_tensor("unpacked", impl.unpack(torch.zeros(0, 2, dtype=torch.int32), 12), torch.int8, (0, 12))

    def test_inputs(self, impl):
        """inputs stay as they are"""
        q = self.numbers(2, 16)
        kept, words = q.clone(), self.words(q)
        kept_words = words.clone()
        impl.pack(q)
        impl.unpack(words, 16)
        expect_equal("q", q.tolist(), kept.tolist())
        expect_equal("words", words.tolist(), kept_words.tolist())


@exercise("9.7", "fake_quantize_ste")
class TestSte:
    def run(self, impl, w, scale, bits, grad=None):
        w, scale = w.clone().requires_grad_(), scale.clone().requires_grad_()
        out = impl(w, scale, bits)
        expect(isinstance(out, torch.Tensor), f"expected a tensor, got {type(out).__name__}")
        expect_equal("output shape", tuple(out.shape), tuple(w.shape))
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
        w, scale = random_tensor(5, 40, seed=1), torch.rand(5, 1) / 4 + 0.05
        for bits in (2, 3, 8):
            expected = (w / scale).round().clamp(*limits(bits)) * scale
            expect_close(f"output, {bits} bits", impl(w, scale, bits), expected, atol=1e-6)

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
            expect_equal("output dtype", out.dtype, torch.float64)
            expect_close("output", out, x.round().clamp(first, last) * scale)
            expect_close("gradient of w", of_w, torch.where(inside, grad, 0.0))
            slope = torch.where(inside, x.round() - x, x.clamp(first, last))
            expect_close("gradient of the scale", of_scale, (grad * slope).sum(1, keepdim=True), atol=1e-9)

    def test_inputs(self, impl):
        """w and scale stay as they are"""
        w, scale = self.CASE[0].clone(), self.CASE[1].clone()
        impl(w, scale, 4)
        expect_close("w", w, self.CASE[0], atol=0, rtol=0)
        expect_close("scale", scale, self.CASE[1], atol=0, rtol=0)


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
        got = impl.write(w, group, symmetric)
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

    def test_writes(self, impl):
        """files of many weights are as the format says"""
        for symmetric in (True, False):
            w = random_tensor(3, 48, seed=5)
            w = led_by_positive(w, 16) if symmetric else w + 0.4
            expected, got = self.file(w, 16, symmetric), self.written(impl, w, 16, symmetric)
            for name, x in expected.items():
                expect_close(f"{name}, {'symmetric' if symmetric else 'asymmetric'}", got[name], x)

    def test_reads(self, impl):
        """files that another program wrote are read"""
        for symmetric in (True, False):
            file = self.file(random_tensor(3, 48, seed=6) + (0 if symmetric else 0.4), 12, symmetric)
            got = impl.read({name: x.clone() for name, x in file.items()}, 12)
            expect_tensor("w", got, torch.float32, (3, 48))
            expect_close(f"w, {'symmetric' if symmetric else 'asymmetric'}", got, self.value(file, 12))

    def test_round_trip(self, impl):
        """reading what was written loses at most half a scale"""
        for symmetric in (True, False):
            w = random_tensor(4, 32, seed=7)
            file = self.written(impl, w, 8, symmetric)
            error = (impl.read(file, 8) - w).abs() / file["scale"].repeat_interleave(8, 1)
            expect(float(error.max()) <= 0.501, f"expected at most half a scale, got {float(error.max()):.2f} of one")
