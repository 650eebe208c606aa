"""Checks of exercises 10: round and repair by hand, the weight of a file, the Hessian, GPTQ, a calibration with three
bugs, another tool's nibbles, a kernel that dequantizes, AWQ's search.
"""

import itertools
import math
import os
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

from minillm.learn.testing import (
    exercise,
    expect,
    expect_close,
    expect_equal,
    expect_launches_compile,
    expect_parts,
    last,
)


def random_tensor(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_integers(low, high, shape, seed=0, dtype=torch.int64):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expect_tensor(what, got, dtype, shape):
    expect(isinstance(got, torch.Tensor), f"{what}: expected a tensor, got {type(got).__name__}")
    expect_equal(f"{what}: dtype", got.dtype, dtype)
    expect_equal(f"{what}: shape", tuple(got.shape), shape)


def expect_kept(what, now, before):
    """NaN stands where it stood."""
    same = now.shape == before.shape and bool(((now == before) | (now.isnan() & before.isnan())).all())
    expect(same, f"{what}: expected to be left as it is\n  got another {what}")


# ---- 10.1


@exercise("10.1", "by_hand")
class TestByHand:
    NAMES = ("H", "loss to the nearest", "where the second moves", "loss", "loss in the other order")

    def test_hessian(self, impl):
        """H is the sum of xᵀ x"""
        expect_close("H", expect_parts(impl(), *self.NAMES)[0], [[2, 1], [1, 1]])

    def test_nearest(self, impl):
        """rounded to the nearest, both errors add up in the second output"""
        expect_close("the loss", expect_parts(impl(), *self.NAMES)[1], 0.65)

    def test_repair(self, impl):
        """the second weight moves to where the loss is smallest, for the first as it is"""
        expect_close("the second weight moves to", expect_parts(impl(), *self.NAMES)[2], 0.7)

    def test_loss(self, impl):
        """it is rounded from there, and the loss counts from the original weights"""
        expect_close("the loss", expect_parts(impl(), *self.NAMES)[3], 0.25)

    def test_other_order(self, impl):
        """the other way around the first weight absorbs the error of the second"""
        expect_close("the loss", expect_parts(impl(), *self.NAMES)[4], 0.45)


# ---- 10.2


@exercise("10.2", "bits_per_weight")
class TestBitsPerWeight:
    def test_scales(self, impl):
        """a scale of 16 bits for each group of each row"""
        expect_close("groups of 64", impl(576, 576, 64, False, False), 4.25)
        expect_close("groups of 32", impl(24, 128, 32, False, False), 4.5)

    def test_whole_rows(self, impl):
        """group 0 is a whole row"""
        expect_close("a row of 1536", impl(576, 1536, 0, False, False), 4 + 16 / 1536)
        expect_close("with zero points", impl(16, 80, 0, True, False), 4.25)

    def test_zero_points(self, impl):
        """a zero point of 4 bits for each group of each row"""
        expect_close("groups of 64", impl(576, 576, 64, True, False), 4 + 20 / 64)

    def test_order(self, impl):
        """the order is a word for each column, shared by all rows"""
        expect_close("groups of 64", impl(576, 1536, 64, False, True), 4.25 + 32 / 576)
        expect_close("with zero points", impl(16, 64, 32, True, True), 4 + 20 / 32 + 2)

    def test_words(self, impl):
        """words that are not full count whole: weights along the rows, zero points down them"""
        expect_close("rows of 12", impl(8, 12, 4, False, False), (2 * 32 + 3 * 16) / 12)
        expect_close("9 rows", impl(9, 16, 8, True, False), (9 * 2 * 32 + 9 * 2 * 16 + 2 * 2 * 32) / (9 * 16))
        expect_close("3 rows of 5", impl(3, 5, 0, True, True), (3 * 32 + 3 * 16 + 32 + 5 * 32) / 15)


# ---- 10.3


def mean_product(tokens):
    """[n, K] -> the mean of xᵀ x, fp64"""
    return tokens.double().T @ tokens.double() / len(tokens)


@exercise("10.3", "Hessian")
class TestHessian:
    def matrix(self, hessian, k):
        expect_tensor("matrix", hessian.matrix, torch.float32, (k, k))
        return hessian.matrix

    def test_by_hand(self, impl):
        """the mean of xᵀ x over tokens, not their sum"""
        hessian = impl(2)
        hessian.add(torch.tensor([[[1.0, 0.0], [1.0, 1.0]], [[3.0, -2.0], [1.0, 1.0]]]))
        expect_close("matrix", self.matrix(hessian, 2), [[3.0, -1.0], [-1.0, 1.5]])

    def test_begins_with_zeros(self, impl):
        """zeros before anything was seen"""
        expect_close("matrix", self.matrix(impl(3), 3), torch.zeros(3, 3))

    def test_padding(self, impl):
        """tokens that the mask leaves out do not count, on either side, whatever stands there"""
        for filled in (5.0, math.nan, math.inf):
            x, mask = random_tensor(3, 6, 4), torch.ones(3, 6, dtype=torch.bool)
            mask[0, :2] = mask[1, 3:] = mask[2, 1:5:2] = False
            kept = mean_product(x[mask])
            x[~mask] = filled
            hessian = impl(4)
            hessian.add(x, mask)
            expect_close(f"matrix, {filled} at padding", self.matrix(hessian, 4), kept)
        x, mask = random_tensor(1, 9, 4), torch.ones(1, 9, dtype=torch.bool)
        mask[0, 2] = False
        hessian = impl(4)
        hessian.add(x, mask)
        expect_close("matrix, padding at one place of nine", self.matrix(hessian, 4), mean_product(x[mask]))

    def test_batches(self, impl):
        """each token counts alike, however they are cut into batches"""
        tokens = random_tensor(30, 5, seed=1) * torch.linspace(0.5, 3, 30)[:, None]
        hessian, seen = impl(5), 0
        for b, t in ((1, 12), (2, 4), (1, 1), (3, 3)):
            hessian.add(tokens[seen : seen + b * t].view(b, t, 5))
            seen += b * t
            expect_close(f"matrix after {seen} tokens", self.matrix(hessian, 5), mean_product(tokens[:seen]))

    def test_equal_tokens(self, impl):
        """a token counts as often as it is seen, and one whose numbers are all 0 like any other"""
        x = random_tensor(1, 4, 3, seed=3)
        x[0, 1:3] = 0
        x[0, 3] = x[0, 0]
        hessian = impl(3)
        for _ in range(2):
            hessian.add(x)
            expect_close("matrix", self.matrix(hessian, 3), mean_product(x[0]))

    def test_shapes(self, impl):
        """one channel, one token; a batch that is not contiguous"""
        hessian = impl(1)
        hessian.add(torch.tensor([[[2.0]]]))
        hessian.add(torch.tensor([[[4.0], [1.0]]]))
        expect_close("matrix of one channel", self.matrix(hessian, 1), [[7.0]])
        x, mask = random_tensor(6, 5, 4, seed=4).transpose(0, 1), random_tensor(6, 5, seed=5).T > 0
        hessian = impl(4)
        hessian.add(x)
        hessian.add(x, mask)
        both = torch.cat((x.flatten(0, 1), x[mask]))
        expect_close("matrix of a transposed batch", self.matrix(hessian, 4), mean_product(both))

    def test_with_and_without(self, impl):
        """a mask holds for its own batch alone"""
        x, mask = random_tensor(2, 3, 4, seed=6), torch.tensor([[True, False, False], [True, True, False]])
        hessian, seen = impl(4), []
        for given in (None, mask, None):
            hessian.add(x, given)
            seen.append(x.flatten(0, 1) if given is None else x[given])
            expect_close("matrix", self.matrix(hessian, 4), mean_product(torch.cat(seen)))

    def test_batches_with_padding(self, impl):
        """a batch weighs as much as it has real tokens, not places"""
        hessian, real = impl(4), []
        for i, lengths in enumerate(((6, 1), (2, 3), (1, 1))):
            x, mask = random_tensor(2, 6, 4, seed=i) * (i + 1), torch.arange(6) < torch.tensor(lengths)[:, None]
            real.append(x[mask])
            hessian.add(x, mask)
            expect_close(f"matrix after batch {i}", self.matrix(hessian, 4), mean_product(torch.cat(real)))

    def test_empty_batches(self, impl):
        """padding alone, or no token, changes nothing; not even at first"""
        x, none = random_tensor(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool)
        hessian = impl(4)
        hessian.add(x * math.nan, none.clone())
        hessian.add(torch.zeros(0, 3, 4))
        expect_close("matrix", self.matrix(hessian, 4), torch.zeros(4, 4))
        hessian.add(x.clone())
        hessian.add(x.clone(), none)
        hessian.add(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.bool))
        hessian.add(x + 1)
        both = mean_product(torch.cat((x, x + 1)).flatten(0, 1))
        expect_close("matrix", self.matrix(hessian, 4), both)

    def test_half(self, impl):
        """fp16 and bf16 are multiplied and summed in fp32"""
        for dtype in (torch.float16, torch.bfloat16):
            x = (random_tensor(5, 701, 3, seed=2) * 400).to(dtype)  # squares beyond fp16, counts beyond its integers
            hessian = impl(3)
            for part in x:
                hessian.add(part[None])
            got = self.matrix(hessian, 3)
            expected = mean_product(x.flatten(0, 1))
            expect_close(f"matrix of {dtype}", got / 160_000, expected / 160_000, atol=1e-5)
        hessian = impl(1)
        hessian.add(torch.full((1, 2, 1), 2.0**20, dtype=torch.bfloat16))
        expect_close("matrix of bf16 numbers beyond fp16", self.matrix(hessian, 1), [[2.0**40]])

    def test_many_batches(self, impl):
        """hundreds of batches lose no digits"""
        hessian = impl(2)
        x = torch.tensor([[[1.0, 0.1]]])
        for _ in range(1000):
            hessian.add(x)
        expect_close("matrix", self.matrix(hessian, 2), [[1.0, 0.1], [0.1, 0.01]], rtol=1e-4)

    def test_apart(self, impl):
        """two of them have nothing in common"""
        first, second = impl(2), impl(2)
        first.add(torch.ones(1, 1, 2))
        second.add(torch.full((1, 2, 2), 3.0))
        expect_close("matrix of the first", self.matrix(first, 2), torch.ones(2, 2))
        expect_close("matrix of the second", self.matrix(second, 2), torch.full((2, 2), 9.0))

    def test_input(self, impl):
        """x and mask stay as they are"""
        x, mask = random_tensor(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])
        x[~mask] = math.nan
        kept, kept_mask = x.clone(), mask.clone()
        impl(4).add(x, mask)
        expect_kept("x", x, kept)
        expect_kept("mask", mask, kept_mask)

    def test_reused(self, impl):
        """what the caller writes into x and mask afterwards does not reach the matrix"""
        x, mask = random_tensor(2, 3, 4, seed=7), torch.tensor([[True, True, False], [True, False, False]])
        kept, hessian = mean_product(x[mask]), impl(4)
        hessian.add(x, mask)
        x.fill_(9.0)
        mask.fill_(True)
        expect_close("matrix", self.matrix(hessian, 4), kept)


# ---- 10.4

TIE = 1e-3  # of a step


def limits(bits):
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def inputs(tokens, k, seed=0):
    """Correlated inputs of unequal size.  -> fp64 [tokens, K]"""
    mixed = random_tensor(tokens, k, seed=seed, dtype=torch.float64) @ random_tensor(k, k, seed=seed + 100).double()
    return (mixed + 2 * random_tensor(tokens, 1, seed=seed + 200).double()) * torch.linspace(0.3, 2.0, k).double()


def one_by_one(w, h, scale, bits, damping):
    """The statement, word for word, in fp64: fix a column, solve for the free ones.  -> q int8 [N, K]

    Whoever computes in fp32 must come to the same integers, so no number may be close to a tie.
    """
    w, h, scale = w.double().clone(), h.double().clone(), scale.double()
    k, (first, last_) = w.shape[1], limits(bits)
    alive = h.diagonal() > 0
    h += torch.diag(damping * h.diagonal())
    q = torch.zeros_like(w)
    columns = torch.arange(k)[alive].tolist()
    for i, j in enumerate(columns):
        rest = columns[i + 1 :]
        x = w[:, j] / scale[:, 0]
        inside = (x > first - 0.6) & (x < last_ + 0.6)
        assert ((x - x.floor() - 0.5).abs()[inside] > TIE).all(), "the check's own case is too close to a tie"
        q[:, j] = x.round().clamp(first, last_)
        error = w[:, j] - q[:, j] * scale[:, 0]
        if rest:
            w[:, rest] += torch.outer(error, torch.linalg.solve(h[rest][:, rest], h[rest, j]))
    return q.to(torch.int8)


def loss(w, q, scale, h):
    error = w.double() - q.double() * scale.double()
    return float(((error @ h.double()) * error).sum())


def case(n, k, tokens, bits=4, seed=0, reach=1.0):
    """w, h, scale; the grid ends at `reach` of the largest weight."""
    x = inputs(tokens, k, seed)
    w = random_tensor(n, k, seed=seed + 300)
    return w, mean_product(x).float(), reach * w.abs().amax(1, keepdim=True) / limits(bits)[1]


def expect_q(what, got, expected):
    expect_tensor(what, got, torch.int8, tuple(expected.shape))
    wrong = (got != expected).nonzero()
    if len(wrong):
        row, column = min(wrong.tolist(), key=lambda at: (at[1], at[0]))
        expect(
            False,
            f"{what}: expected {int(expected[row, column])}\n{'':{len(what)}}  got      {int(got[row, column])}  at"
            f" position ({row}, {column}), the first column that differs\n{len(wrong)} of {expected.numel()} differ",
        )


@exercise("10.4", "gptq")
class TestGptq:
    def expect_case(self, impl, what, w, h, scale, bits, damping=0.01):
        got = impl(w.clone(), h.clone(), scale.clone(), bits, damping)
        expect_q(what, got, one_by_one(w, h, scale, bits, damping))

    def test_by_hand(self, impl):
        """exercise 10.1: 0.4 becomes 0, and 0.3 becomes 1; in the other order 0 and 1"""
        w, one = torch.tensor([[0.4, 0.3]]), torch.ones(1, 1)
        h = torch.tensor([[2.0, 1.0], [1.0, 1.0]])
        expect_q("q", impl(w, h, one, 4, 0.0), torch.tensor([[0, 1]], dtype=torch.int8))
        turned = impl(w.flip(1), h.flip(0, 1), one, 4, 0.0)
        expect_q("q of the columns turned around", turned, torch.tensor([[0, 1]], dtype=torch.int8))

    def test_uncorrelated(self, impl):
        """for a diagonal h it is rounding to the nearest, each row by its own scale"""
        w = random_tensor(5, 12, seed=4)
        scale = w.abs().amax(1, keepdim=True) / 7
        got = impl(w, torch.diag(torch.linspace(0.1, 9, 12)), scale, 4, 0.01)
        expect_q("q", got, (w / scale).round().clamp(-8, 7).to(torch.int8))

    def test_repairs(self, impl):
        """each column's error moves all columns to its right, so as to serve the output best"""
        for seed, n, k in ((0, 1, 3), (1, 6, 10), (0, 8, 24), (2, 1, 24), (0, 5, 1)):
            self.expect_case(impl, f"q of {n} x {k}", *case(n, k, 200, seed=seed), 4, 0.0)

    def test_far(self, impl):
        """the error of the first of 140 columns reaches the last"""
        w, h, scale = case(4, 140, 400, seed=0)
        size = h.diagonal().rsqrt()  # inputs of one size, so that a share of the mean damps them as their own does
        self.expect_case(impl, "q of 4 x 140", w, h * size * size[:, None], scale, 4, 0.01)

    def test_not_contiguous(self, impl):
        """w, h and scale may be parts of larger tensors"""
        w, h, scale = case(6, 10, 100, seed=1)
        around = torch.zeros(12, 12)
        around[:10, :10] = h
        got = impl(w.T.contiguous().T, around[:10, :10], scale.repeat(1, 2)[:, :1], 4, 0.0)
        expect_q("q", got, one_by_one(w, h, scale, 4, 0.0))

    def test_better(self, impl):
        """the output's error is smaller than that of rounding to the nearest"""
        w, h, scale = case(24, 64, 300, bits=3, seed=7)
        ours = loss(w, impl(w, h, scale, 3, 0.01), scale, h)
        nearest = loss(w, (w / scale).round().clamp(-4, 3), scale, h)
        expect(ours < 0.8 * nearest, f"expected a loss below 0.8 of {nearest:,.0f}, to the nearest\n  got {ours:,.0f}")

    def test_bits(self, impl):
        """integers of 1, 2, 3 and 8 bits"""
        for bits, seed in ((1, 0), (2, 0), (3, 0), (8, 1)):
            self.expect_case(impl, f"q in {bits} bits", *case(6, 12, 100, bits=max(bits, 3), seed=seed), bits, 0.0)
        self.expect_case(impl, "q of 10 x 40 in 8 bits", *case(10, 40, 200, bits=8, seed=13), 8, 0.0)

    def test_clamped(self, impl):
        """weights beyond the grid: the error that is made up for is the one after clamping"""
        self.expect_case(impl, "q on a grid of half the range", *case(10, 14, 100, seed=0, reach=0.5), 4, 0.0)
        self.expect_case(impl, "q in 8 bits, half", *case(10, 14, 100, bits=8, seed=0, reach=0.5), 8, 0.0)

    def test_damping(self, impl):
        """each number of the diagonal grows by a share of itself; with 1 it doubles"""
        for damping in (0.0, 0.1, 1.0):
            self.expect_case(impl, f"q for damping {damping}", *case(8, 16, 100, seed=0), 4, damping)
        w, h, scale = case(8, 16, 100, seed=1)
        size = torch.ones(16)
        size[3] = 100.0  # one channel that is far larger than the others
        self.expect_case(impl, "q with one huge channel", w, h * size * size[:, None], scale, 4, 0.01)

    def test_default(self, impl):
        """damping is 0.01 unless given"""
        w, h, scale = case(12, 16, 8, seed=4)
        expect_q("q", impl(w, h, scale, 4), one_by_one(w, h, scale, 4, 0.01))

    def test_low_rank(self, impl):
        """fewer tokens than channels: damping is enough"""
        self.expect_case(impl, "q for 7 tokens, 16 channels", *case(8, 16, 7, seed=0), 4, 0.05)

    def test_any_multiple(self, impl):
        """a multiple of h gives the same"""
        w, h, scale = case(8, 16, 100, seed=2)
        expected = one_by_one(w, h, scale, 4, 0.01)
        for factor in (2.0**-40, 2.0**-20, 2.0**20):
            expect_q(f"q for h times {factor:g}", impl(w, h * factor, scale, 4, 0.01), expected)

    def test_dead(self, impl):
        """a column whose input was always 0 becomes 0, the others are as without it"""
        w, h, scale = case(9, 12, 100, seed=2)
        for alone in (0, 11):
            one_less = h.clone()
            one_less[alone], one_less[:, alone] = 0, 0
            self.expect_case(impl, f"q with dead column {alone}", w, one_less, scale, 4)
        dead = torch.tensor([0, 5, 11])
        h[dead], h[:, dead] = 0, 0
        self.expect_case(impl, "q with dead columns", w, h, scale, 4)
        self.expect_case(impl, "q with dead columns, undamped", w, h, scale, 4, 0.0)
        expect_q("q for inputs of 0", impl(w, h * 0, scale, 4), torch.zeros(9, 12, dtype=torch.int8))

    def test_small_is_not_dead(self, impl):
        """a column with tiny inputs is rounded like any other"""
        w, h, scale = case(9, 12, 100, seed=2)
        for tiny in (1e-4, 1e-6):
            size = torch.ones(12)
            size[4] = tiny
            self.expect_case(impl, f"q with a channel times {tiny}", w, h * size * size[:, None], scale, 4)

    def test_half(self, impl):
        """w and h in fp16 or bf16 are computed with in fp32 or fp64"""
        for dtype in (torch.float16, torch.bfloat16):
            w, h, scale = case(8, 12, 200, bits=8, seed=0)
            self.expect_case(impl, f"q of {dtype}", w.to(dtype), (h * 0.5).to(dtype), scale, 8, 0.05)

    def test_half_beside_fp32(self, impl):
        """w in fp16 with h in fp32, beyond what fp16 holds; damping of a bf16 h that bf16 would round away"""
        w, h, scale = case(8, 12, 200, bits=8, seed=0)
        self.expect_case(impl, "q of w in fp16, a large h", w.half(), h * 2.0**20, scale, 8, 0.05)
        tokens = random_integers(-2, 3, (7, 16))
        h = mean_product(torch.cat((tokens, tokens[:1] * 0))).to(torch.bfloat16)  # eighths: exact
        w = random_tensor(4, 16, seed=4)
        self.expect_case(impl, "q of h in bf16", w, h, w.abs().amax(1, keepdim=True) / 7, 4, 0.0015)

    def test_input(self, impl):
        """w, h and scale stay as they are, in fp32 and in fp64"""
        for dtype in (torch.float32, torch.float64):
            given = [x.to(dtype) for x in case(5, 8, 50, seed=71)]
            given[1][2], given[1][:, 2] = 0, 0
            kept = [x.clone() for x in given]
            impl(*given, 4, 0.01)
            for name, now, before in zip(("w", "h", "scale"), given, kept, strict=True):
                expect_kept(name, now, before)


# ---- 10.5


def stack_case(sizes=(5, 7, 4, 6), lengths=((4, 4), (3, 1), (6,), (1, 2, 1)), seed=0, filled=math.nan):
    """Weights of a stack, and batches whose padding is filled; right and left by turns."""
    weights = [random_tensor(n, k, seed=seed + n) / k**0.5 for k, n in itertools.pairwise(sizes)]
    batches = []
    for i, batch in enumerate(lengths):
        longest = max(batch) + i % 2
        mask = torch.arange(longest) < torch.tensor(batch)[:, None]
        mask = mask.flip(1) if i % 2 else mask
        x = random_tensor(len(batch), longest, sizes[0], seed=seed + 10 + i) * (1 + i) + 0.3
        x[~mask] = filled
        batches.append((x, mask))
    return weights, batches


def nearest_half(w, h):
    """A rounding so coarse that what comes after it sees it."""
    return (w * 2).round() / 2 + 0.25


@exercise("10.5", "quantize_stack")
class TestQuantizeStack:
    def run(self, impl, weights, batches):
        """-> the new weights, and what `quantize` was given"""
        calls = []

        def quantize(w, h):
            calls.append((w.clone(), h.clone()))
            return nearest_half(w, h)

        return impl(weights, batches, quantize), calls

    def expect_stack(self, impl, what, weights, batches):
        given = [w.clone() for w in weights], [(x.clone(), mask.clone()) for x, mask in batches]  # strides are kept
        got, calls = self.run(impl, *given)
        expect_equal(f"{what}: calls of quantize", len(calls), len(weights))
        tokens = torch.cat([x[mask] for x, mask in batches]).double()
        for i, (w, (seen, h)) in enumerate(zip(weights, calls, strict=True)):
            expect_close(f"{what}: the weight that quantize gets for layer {i}", seen, w)
            expect_tensor(f"{what}: layer {i}'s h", h, torch.float32, (w.shape[1], w.shape[1]))
            expect_close(f"{what}: layer {i}'s h", h, mean_product(tokens), atol=1e-5)
            tokens = torch.relu(tokens @ nearest_half(w, h).double().T)
        expect(isinstance(got, list), f"{what}: expected a list of weights, got {type(got).__name__}")
        expect_equal(f"{what}: number of weights", len(got), len(weights))
        for i, (w, new) in enumerate(zip(weights, got, strict=True)):
            expect_tensor(f"{what}: layer {i}'s new weight", new, torch.float32, tuple(w.shape))
            expect_close(f"{what}: layer {i}'s new weight", new, nearest_half(w, None))

    def test_one_layer(self, impl):
        """one layer, one batch without padding"""
        self.expect_stack(impl, "8 tokens", *stack_case((5, 7), ((4, 4),)))

    def test_padding(self, impl):
        """padding does not count, whatever stands there"""
        for filled in (7.0, 0.0, math.nan):
            weights, batches = stack_case((5, 7), ((4, 2),), filled=filled)
            self.expect_stack(impl, f"{filled} at padding", weights, batches)

    def test_batches(self, impl):
        """each token counts alike, in batches of different sizes, contiguous or not"""
        weights, batches = stack_case((5, 7), ((6, 6, 6), (1,), (2, 2)), filled=0.0)
        batches = [(x[:, :t], mask[:, :t]) for (x, mask), t in zip(batches, (6, 1, 2), strict=True)]
        self.expect_stack(impl, "batches of 18, 1 and 4 tokens", weights, batches)
        x, mask = batches[0]
        self.expect_stack(impl, "the same batch twice", weights, [*batches, (x, mask)])
        parts = [(x.transpose(0, 1).contiguous().transpose(0, 1), mask.T.contiguous().T) for x, mask in batches]
        self.expect_stack(impl, "batches that are not contiguous", weights, parts)

    def test_quantized_inputs(self, impl):
        """a layer sees what the quantized layers before it give, after relu"""
        self.expect_stack(impl, "three layers", *stack_case(lengths=((4, 4),)))

    def test_all(self, impl):
        """several layers, batches and lengths, padding on both sides; a batch of padding alone"""
        self.expect_stack(impl, "all together", *stack_case())
        weights, batches = stack_case(seed=3)
        alone = torch.full((2, 3, 5), math.nan), torch.zeros(2, 3, dtype=torch.bool)
        for place in (1, 0):
            texts = [*batches[:place], alone, *batches[place:]]
            self.expect_stack(impl, f"with a batch of padding at {place}", weights, texts)

    def test_input(self, impl):
        """weights and batches stay as they are"""
        weights, batches = stack_case()
        before = [w.clone() for w in weights], [(x.clone(), mask.clone()) for x, mask in batches]
        given, texts = list(weights), list(batches)
        self.run(impl, given, texts)
        expect_equal("number of weights", len(given), len(weights))
        for i, w in enumerate(before[0]):
            expect(given[i] is weights[i], f"weights: expected the list to be left as it is\n  got another weight {i}")
            expect_kept("weight", weights[i], w)
        expect_equal("number of batches", len(texts), len(batches))
        for (x, mask), (kept, kept_mask) in zip(batches, before[1], strict=True):
            expect_kept("x", x, kept)
            expect_kept("mask", mask, kept_mask)


# ---- 10.6

PLACES = (0, 2, 4, 6, 1, 3, 5, 7)


def signed(word):
    return word - 2**32 if word >= 2**31 else word


def awq_words(q):
    """Number by number.  [R, N], 0 to 15 -> int32 [R, N/8]"""
    rows = [
        [signed(sum(row[8 * j + o] << (4 * i) for i, o in enumerate(PLACES))) for j in range(len(row) // 8)]
        for row in q.tolist()
    ]
    return torch.tensor(rows, dtype=torch.int32)


def plain_words(q):
    """Number by number.  [N, K], 0 to 15 -> int32 [N, K/8]"""
    rows = [
        [signed(sum(row[8 * j + i] << (4 * i) for i in range(8))) for j in range(len(row) // 8)] for row in q.tolist()
    ]
    return torch.tensor(rows, dtype=torch.int32)


@exercise("10.6", "convert_awq")
class TestConvertAwq:
    NAMES = ("packed", "scales", "zeros")

    def awq_case(self, n, k, group, seed=0):
        """q [K, N] and z [K/g, N], 0 to 15, and scales fp16"""
        q, z = random_integers(0, 16, (k, n), seed), random_integers(0, 16, (k // group, n), seed + 1)
        return q, z, (random_tensor(k // group, n, seed=seed + 2).abs() + 0.01).half()

    def expect_case(self, impl, what, q, z, scales):
        got = expect_parts(impl(awq_words(q), awq_words(z), scales.clone()), *self.NAMES)
        (k, n), groups = q.shape, len(z)
        expect_tensor(f"{what}: packed", got[0], torch.int32, (n, k // 8))
        expect_tensor(f"{what}: scales", got[1], torch.float32, (n, groups))
        expect_tensor(f"{what}: zeros", got[2], torch.int8, (n, groups))
        expect_equal(f"{what}: packed", got[0].tolist(), plain_words(q.T).tolist())
        expect_equal(f"{what}: zeros", got[2].tolist(), (z.T - 8).tolist())
        expect_equal(f"{what}: scales", got[1].tolist(), scales.float().T.tolist())

    def test_order(self, impl):
        """nibble i of a word is output ORDER[i], not output i, and not the other way around"""
        q = torch.arange(8).repeat(8, 1)  # output o has the number o in every column
        z = torch.arange(8)[None]
        packed, _, zeros = expect_parts(impl(awq_words(q), awq_words(z), torch.ones(1, 8).half()), *self.NAMES)
        expect_tensor("packed", packed, torch.int32, (8, 1))
        expect_tensor("zeros", zeros, torch.int8, (8, 1))
        rows = [f"{word & 0xFFFFFFFF:08x}" for word in packed.flatten().tolist()]
        expect_equal("packed, output o of which is all o", rows, [str(o) * 8 for o in range(8)])
        expect_equal("zeros, of which output o has o - 8", zeros.flatten().tolist(), list(range(-8, 0)))

    def test_columns(self, impl):
        """a row's neighbors lie from the lowest bits up"""
        q = torch.arange(8)[:, None].repeat(1, 8)  # column c of every output has the number c
        packed = expect_parts(impl(awq_words(q), awq_words(q[:1]), torch.ones(1, 8).half()), *self.NAMES)[0]
        expect_tensor("packed", packed, torch.int32, (8, 1))
        expect_equal("packed", [f"{word:08x}" for word in packed.flatten().tolist()], ["76543210"] * 8)

    def test_highest_bit(self, impl):
        """words whose first bit is set"""
        for number in (7, 8, 15):
            q = torch.full((16, 8), number)
            self.expect_case(impl, f"all {number}", q, q[:2], torch.ones(2, 8).half())

    def test_zero_points(self, impl):
        """weights and zero points move by the same 8"""
        q, _, scales = self.awq_case(8, 16, 8, seed=5)
        for number in (0, 8, 15):
            self.expect_case(impl, f"zero points of {number}", q, torch.full((2, 8), number), scales)

    def test_shapes(self, impl):
        """any N and K, any groups"""
        for seed, (n, k, group) in enumerate(((8, 8, 8), (24, 16, 16), (16, 40, 8), (40, 96, 32), (8, 64, 8))):
            self.expect_case(impl, f"N {n}, K {k}, groups of {group}", *self.awq_case(n, k, group, 10 * seed))

    def test_scales(self, impl):
        """scales come over exactly: 0, negative ones, fp16's smallest and largest"""
        q, z, scales = self.awq_case(8, 16, 8, seed=6)
        scales[0] = torch.tensor([0.0, -1.5, 6e-8, -6e-8, 65504.0, 6e-5, 0.1, 1.0])
        self.expect_case(impl, "scales of any size", q, z, scales)

    def test_not_contiguous(self, impl):
        """some outputs of a larger layer: inputs that are not contiguous"""
        q, z, scales = self.awq_case(32, 16, 8, seed=8)
        parts = awq_words(q)[:, 1:3], awq_words(z)[:, 1:3], scales[:, 8:24]
        got = expect_parts(impl(*parts), *self.NAMES)
        expected = plain_words(q.T)[8:24], scales.float().T[8:24], (z.T - 8)[8:24]
        for name, part, right in zip(self.NAMES, got, expected, strict=True):
            expect_equal(f"{name} of outputs 8 to 23", part.tolist(), right.tolist())

    def test_read_by_the_package(self, impl):
        """`minillm.kernels.w4a16` computes with what comes out as the file says"""
        from minillm.kernels import w4a16

        q, z, scales = self.awq_case(16, 64, 32, seed=77)
        w = ((q.unflatten(0, (2, 32)) - z[:, None]) * scales.double()[:, None]).flatten(0, 1).T  # [N, K]
        x, found = random_tensor(3, 64), expect_parts(impl(awq_words(q), awq_words(z), scales), *self.NAMES)
        parts = ((torch.int32, (16, 8)), (torch.float32, (16, 2)), (torch.int8, (16, 2)))
        for name, part, (dtype, shape) in zip(self.NAMES, found, parts, strict=True):
            expect_tensor(name, part, dtype, shape)
        got = w4a16(x, *found)
        expect_close("x wᵀ", got, x.double() @ w.T, atol=1e-3, rtol=1e-4)

    def test_input(self, impl):
        """inputs stay as they are"""
        q, z, scales = self.awq_case(16, 16, 8, seed=9)
        given = awq_words(q), awq_words(z), scales
        kept = [x.clone() for x in given]
        impl(*given)
        for name, now, before in zip(("qweight", "qzeros", "scales"), given, kept, strict=True):
            expect_kept(name, now, before)


# ---- 10.7

MARGIN = 4096  # elements around a tensor, so that a kernel that leaves it is reported and does not end the process
DOTS_IN = {torch.float32: "fp32", torch.float16: "fp16"}
ARITHMETIC = ("mm", "bmm", "matmul", "mul", "add", "sub", "bitwise", "sum", "linear", "einsum", "rshift", "and")


class Watch(TorchFunctionMode):
    """Notes torch operations that compute, the largest tensor that torch makes, and gives what torch.empty allocates a
    margin.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.given: list[torch.Tensor] = []
        self.largest = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "").strip("_")
        if name.startswith(ARITHMETIC):
            self.found.add(name)
        got = func(*args, **(kwargs or {}))
        if isinstance(got, torch.Tensor):
            self.largest = max(self.largest, got.numel())
        if func is torch.empty and got.is_contiguous():
            got = within(got, 77)
            self.given.append(got)
        return got

    def touched(self) -> bool:
        for x in self.given:
            buffer = x.as_strided((x.numel() + 2 * MARGIN,), (1,), 0)
            if not ((buffer[:MARGIN] == 77).all() and (buffer[-MARGIN:] == 77).all()):
                return True
        return False


def within(x, around):
    """x in the middle of a buffer filled with `around`."""
    buffer = torch.full((x.numel() + 2 * MARGIN,), around, dtype=x.dtype, device=x.device)
    buffer[MARGIN : MARGIN + x.numel()] = x.flatten()
    return buffer[MARGIN : MARGIN + x.numel()].view(x.shape)


def w4_case(m, n, k, group, dtype=torch.float32, seed=0, q=None, x=None):
    """Arguments of w4_linear, all else around x and scales NaN, and the exact result."""
    q = random_integers(0, 16, (n, k), seed) if q is None else q
    z = random_integers(-8, 8, (n, k // group), seed + 1, torch.int8)
    scales = random_tensor(n, k // group, seed=seed + 2).abs() + 0.1
    x = (random_tensor(m, k, seed=seed + 3) if x is None else x).to(dtype)
    w = ((q.unflatten(1, (-1, group)) - 8 - z[..., None]) * scales.double()[..., None]).flatten(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = [x, plain_words(q), scales, z]
    around = (math.nan, -1, math.nan, 99)
    return [within(t.to(device), a) for t, a in zip(given, around, strict=True)], x.double() @ w.T


@contextmanager
def dots():
    """-> the operands' dtypes and the precision of each tl.dot of the interpreter's; nothing on a GPU"""
    found: set[tuple[str, str, str]] = set()
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield found
        return
    from triton.runtime.interpreter import InterpreterBuilder

    create = InterpreterBuilder.create_dot

    def noted(self, a, b, d, input_precision, *args):
        found.add((str(a.dtype), str(b.dtype), str(input_precision).rpartition(".")[2].lower()))
        return create(self, a, b, d, input_precision, *args)

    with patch.object(InterpreterBuilder, "create_dot", noted):
        yield found


def expect_w4(impl, what, args, expected, watch=None):
    kept = [t.clone() for t in args]
    watch = watch or Watch()
    with watch, dots() as multiplied:
        got = impl(*args)
    name = DOTS_IN[args[0].dtype]
    for *operands, precision in sorted(multiplied):
        expect(
            operands == [name, name],
            f"{what}: expected tl.dot to multiply {name} by {name}, the dtype of x\n  got {' by '.join(operands)}",
        )
        expect(precision == "ieee", f'{what}: expected tl.dot with input_precision="ieee"\n  got "{precision}"')
    expect(not watch.touched(), f"{what}: expected nothing written outside of the output\n  got values beside it")
    expect_tensor(f"{what}: y", got, args[0].dtype, tuple(expected.shape))
    exact = args[0].dtype == torch.float32
    size = float(expected.abs().mean()) + 1e-9  # a product's numbers are of one size; its error is a share of that
    expect_close(
        f"{what}: y over its mean size", got.cpu() / size, expected / size,
        atol=1e-4 if exact else 1e-2, rtol=1e-5 if exact else 2e-3,
    )  # fmt: skip
    for name, now, before in zip(("x", "packed", "scales", "zeros"), args, kept, strict=True):
        expect_kept(name, now, before)


@exercise("10.7", "w4_linear")
class TestW4Linear:
    def test_numbers(self, impl):
        """nibble i of a word is the word's weight i, minus 8 and the zero point, times the scale"""
        q = (torch.arange(32)[None] + torch.arange(16)[:, None]) % 16
        args, expected = w4_case(16, 16, 32, 32, q=q, x=torch.eye(32)[:16])
        expect_w4(impl, "rows 0 to 15 of the identity", args, expected)
        args, expected = w4_case(16, 16, 32, 32, q=q, x=torch.eye(32)[16:])
        expect_w4(impl, "rows 16 to 31 of the identity", args, expected)

    def test_products(self, impl):
        """one token or several, one group"""
        for m in (1, 5, 16):
            expect_w4(impl, f"{m} tokens", *w4_case(m, 32, 32, 32, seed=m))

    def test_groups(self, impl):
        """each group of each row has its own scale and zero point"""
        for k, group in ((64, 32), (128, 64), (192, 96), (96, 96)):
            expect_w4(impl, f"{k} weights a row in groups of {group}", *w4_case(3, 32, k, group, seed=k + group))

    def test_any_n(self, impl):
        """N and M need not fill their blocks"""
        for m, n in ((2, 1), (3, 33), (17, 70), (40, 31)):
            expect_w4(impl, f"{m} tokens, {n} rows", *w4_case(m, n, 64, 32, seed=n))

    def test_fp16(self, impl):
        """fp16 in and out"""
        expect_w4(impl, "fp16", *w4_case(5, 48, 128, 64, torch.float16))

    def test_sums_in_fp32(self, impl):
        """fp16: sums pass fp16's largest number on the way, and come back"""
        x = torch.full((2, 128), 1000.0)
        x[:, 64:] = -999.0
        args, _ = w4_case(2, 32, 128, 32, torch.float16, q=torch.full((32, 128), 15), x=x)
        args[2].fill_(1.0)
        args[3].fill_(-8)
        expect_w4(impl, "1,000 and then -999, times 15", args, torch.full((2, 32), 64 * 15.0, dtype=torch.float64))

    def test_the_kernel_does_the_work(self, impl):
        """torch neither unpacks nor multiplies: the kernel reads packed weights"""
        args, expected = w4_case(4, 32, 64, 32)
        watch = Watch()
        expect_w4(impl, "4 tokens", args, expected, watch)
        expect(not watch.found, f"expected no arithmetic in torch\n  got {', '.join(sorted(watch.found))}")

        expect(watch.largest < 32 * 64, "expected no tensor of as many numbers as the weight has\n  got one")

    def test_any_scale(self, impl):
        """w is turned into x's dtype, not its factors: scales too small for fp16, negative ones and 0"""
        for dtype in (torch.float32, torch.float16):
            q = random_integers(0, 4, (32, 64), seed=3) * 4
            args, _ = w4_case(3, 32, 64, 32, dtype, q=q)
            args[3].fill_(-8)
            args[2].fill_(2.0**-26)  # a quarter of fp16's smallest number; times 4 it is exact
            args[2][1::3].neg_()
            args[2][2::3, 1] = 0.0
            w = (q.unflatten(1, (2, 32)) * args[2].cpu().double()[..., None]).flatten(1)
            expect_w4(impl, f"{dtype}", [args[0].mul_(1000), *args[1:]], args[0].cpu().double() @ w.T)

    @last
    def test_compiles(self, impl):
        """it compiles for a GPU, in fp16"""
        args, _ = w4_case(16, 64, 128, 64, torch.float16)
        expect_launches_compile(lambda: impl(*args))


# ---- 10.8


def by_groups(bits, group):
    """A quantizer: symmetric, a scale every `group` weights."""

    def quantize(w):
        parts = w.unflatten(1, (-1, group))
        scale = parts.abs().amax(-1, keepdim=True) / limits(bits)[1]
        scale = torch.where(scale > 0, scale, 1.0)
        return ((parts / scale).round().clamp(*limits(bits)) * scale).flatten(1)

    return quantize


def searched(w, x, quantize, steps):
    """-> the scale of each try, fp64, and its loss; the smallest first"""
    m = x.double().abs().mean(0)
    alive = m > 0
    tries = []
    for step in range(steps + 1):
        s = torch.ones_like(m)
        if alive.any():
            s[alive] = m[alive] ** (step / steps)
            s = torch.where(alive, s / (s[alive].max() * s[alive].min()).sqrt(), 1.0)
        read = quantize((w.float() * s.float()).float()).double() / s
        error = x.double() @ (w.double() - read).T
        tries.append((s, float(error.square().mean())))
    return tries


def landscape(w, x, errors):
    """A quantizer that knows the tries: it makes the loss of try i errors[i]² times what all tries share, and that of
    any other α, or of another weight, 0.
    """
    tries = torch.stack([s for s, _ in searched(w, x, lambda v: v, len(errors) - 1)])  # [tries, K]

    def quantize(v):
        s = (v / w).double()
        at = ((s / tries[:, None]).log().abs().amax((1, 2)) < 1e-3).nonzero()
        return v + errors[int(at[0])] * s.float() if len(at) else v

    return quantize


@exercise("10.8", "awq_scale")
class TestAwqScale:
    def awq_case(self, n, k, tokens, seed=0, outliers=2, dtype=torch.float32):
        """Inputs of both signs, whose means are near 0, some channels far larger than others."""
        size = random_tensor(k, seed=seed).abs() + 0.2
        size[random_integers(0, k, (outliers,), seed)] *= 12
        x = random_tensor(tokens, k, seed=seed + 1) * size
        return random_tensor(n, k, seed=seed + 2), x.to(dtype)

    def expect_errors(self, impl, what, errors, dtype=torch.float32, tiny=1.0):
        """tiny: the size of one channel"""
        w, x = self.awq_case(6, 16, 30, seed=14, dtype=dtype)
        x[:, 4] *= tiny
        best, steps = errors.index(min(errors)), len(errors) - 1
        s, strength = expect_parts(impl(w.clone(), x.clone(), landscape(w, x, errors), steps), "s", "α")
        expect_close(f"{what}: α", strength, best / steps)
        expect_close(f"{what}: s", s, searched(w, x, lambda v: v, steps)[best][0], atol=0, rtol=1e-4)

    def expect_case(self, impl, what, w, x, quantize, steps=20):
        tries = searched(w, x, quantize, steps)
        losses = [found for _, found in tries]
        best = losses.index(min(losses))
        runner_up = min([found for i, found in enumerate(losses) if i != best], default=math.inf)
        assert runner_up > 1.0005 * losses[best] or runner_up == losses[best], "the check's own case is too close"
        s, strength = expect_parts(impl(w.clone(), x.clone(), quantize, steps), "s", "α")
        expect_close(f"{what}: α", strength, best / steps)
        expect_tensor(f"{what}: s", s, torch.float32, (w.shape[1],))
        expect_close(f"{what}: s", s, tries[best][0], atol=1e-5, rtol=1e-4)

    def test_the_best(self, impl):
        """the α of the smallest loss, among steps + 1"""
        for seed, (bits, group) in enumerate(((3, 8), (4, 16), (3, 32))):
            self.expect_case(impl, f"{bits} bits", *self.awq_case(12, 32, 60, seed=10 * seed), by_groups(bits, group))

    def test_steps(self, impl):
        """α from 0 to 1, both included"""
        w, x = self.awq_case(12, 32, 60, seed=3)
        for steps in (1, 2, 7):
            self.expect_case(impl, f"{steps} steps", w, x, by_groups(3, 16), steps)
        w, x = self.awq_case(12, 32, 60, seed=4)
        fixed = lambda v: (v * 2).round() / 2  # noqa: E731  # a grid that does not follow the weights
        self.expect_case(impl, "a fixed grid", w, x, fixed, 10)

        best = self.awq_case(12, 32, 60, seed=3)
        s, strength = expect_parts(impl(*best, by_groups(3, 16)), "s", "α")
        tries = searched(*best, by_groups(3, 16), 20)
        found = min(range(21), key=lambda i: tries[i][1])
        expect_close("α of 20 steps, unless given", strength, found / 20)
        expect_close("s of 20 steps, unless given", s, tries[found][0], atol=1e-5, rtol=1e-4)

    def test_all_tries(self, impl):
        """the smallest of all losses: not the first dip, nor a coarse search's, nor what nearly is the smallest"""
        dips = [1.0, 0.9, 0.95, 1.2, 1.1, 1.0, 1.3, 0.5, 1.2, 0.8, 1.1]
        self.expect_errors(impl, "several dips", dips)
        self.expect_errors(impl, "the last is best", [3.0, 2.5, 2.0, 1.5, 1.0])
        self.expect_errors(impl, "the first is best", [1.0, 1.5, 2.0, 2.5, 3.0])
        self.expect_errors(impl, "huge losses", [3e5, 2e5, 1e5, 4e5])
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            self.expect_errors(impl, f"a loss 0.0004 smaller, {dtype}", [1.0, 0.9998, 1.1, 1.2, 1.3], dtype)

    def test_zeros(self, impl):
        """tokens and channels with some zeros count in full; a single token is enough"""
        w, x = self.awq_case(12, 32, 60, seed=3)
        x[0], x[-1], x[1:51, 5], x[10:40, 7] = 0, 0, 0, 0
        self.expect_case(impl, "zeros here and there", w, x, by_groups(3, 16))
        w, x = self.awq_case(12, 32, 1, seed=15)
        self.expect_case(impl, "one token", w, x, by_groups(3, 16))

    def test_size(self, impl):
        """mean |x|: neither |mean x|, which is near 0 here, nor the root of the mean square, nor the maximum"""
        w, x = self.awq_case(8, 16, 100, seed=5)
        x[0, 3] = 400.0
        x[1:51], x[51:] = x[1:51] + 0.0, -x[1:50]
        self.expect_case(impl, "4 bits", w, x, by_groups(4, 8))

    def test_output_error(self, impl):
        """the loss is the output's error, not the weight's"""
        w, x = self.awq_case(10, 24, 80, seed=6, outliers=1)
        self.expect_case(impl, "3 bits", w, x, by_groups(3, 8))
        mixed = x @ random_tensor(24, 24, seed=8) * 0.5 + 2 * x  # correlated channels
        self.expect_case(impl, "correlated channels", w, mixed, by_groups(3, 24))

    def test_dead(self, impl):
        """a channel that is always 0 has s = 1, and does not take part in the largest and smallest"""
        w, x = self.awq_case(10, 24, 80, seed=7)
        x[:, [2, 9]] = 0
        self.expect_case(impl, "two dead channels", w, x, by_groups(3, 8))
        for size in (0.01, 100):
            self.expect_case(impl, f"two dead channels, {size} times the input", w, x * size, by_groups(3, 8))

    def test_small_is_not_dead(self, impl):
        """a channel whose input is tiny takes part like any other"""
        self.expect_errors(impl, "a tiny channel", [3.0, 2.5, 2.0, 1.5, 1.0], tiny=1e-7)

    def test_all_dead(self, impl):
        """inputs of 0 alone: s = 1, and of equal losses the smallest α"""
        w, x = self.awq_case(4, 8, 10)
        s, strength = expect_parts(impl(w, x * 0, by_groups(3, 8), 5), "s", "α")
        expect_close("s", s, torch.ones(8))
        expect_close("α", strength, 0.0)

    def test_half(self, impl):
        """x in fp16 or bf16 is computed with in fp32"""
        for dtype in (torch.float16, torch.bfloat16):
            w, x = self.awq_case(10, 24, 80, seed=13)
            self.expect_case(impl, f"{dtype}", w, (x * 500).to(dtype), by_groups(3, 8))

    def test_input(self, impl):
        """w and x stay as they are"""
        w, x = self.awq_case(4, 8, 10, seed=9)
        x[:, 1] = 0
        kept = w.clone(), x.clone()
        impl(w, x, by_groups(3, 8), 4)
        expect_kept("w", w, kept[0])
        expect_kept("x", x, kept[1])
