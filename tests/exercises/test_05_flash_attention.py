"""The contracts of the exercises of chapter 5."""

import itertools
import math
import os
import random
import weakref
from unittest.mock import patch

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.learn.testing import (
    exercise,
    expect,
    expect_close,
    expect_equal,
    expect_launches_compile,
    expect_parts,
    last,
)

INF = float("inf")


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that any torch operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


class Scores(TorchDispatchMode):
    """Of the floating tensors that torch operations make, those with neither D nor E features: the elements of the
    largest (`most`), and of all that were there at one time (`held`).
    """

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.sizes, self.most, self.held, self.alive = sizes, 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and t.is_floating_point() and all(t.numel() % n for n in self.sizes):
                self.alive[id(t)] = weakref.ref(t)
                self.most = max(self.most, t.numel())
        self.alive = {i: ref for i, ref in self.alive.items() if ref() is not None}
        distinct = {
            t.untyped_storage().data_ptr(): t.numel() for ref in self.alive.values() if (t := ref()) is not None
        }
        self.held = max(self.held, sum(distinct.values()))
        return out


def spread(t: torch.Tensor) -> torch.Tensor:
    """The same values, not contiguous: every other number of each row of a larger tensor."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), math.nan, dtype=t.dtype)
    wide[..., :-1:2] = t
    return wide[..., :-1:2]


def expect_new(got, given) -> None:
    """Nothing of what was returned lies in the memory of what was given."""
    memory = {t.untyped_storage().data_ptr() for t in given}
    shared = any(t.untyped_storage().data_ptr() in memory for t in got if isinstance(t, torch.Tensor))
    expect(not shared, "expected new tensors\n  got one that shares memory with an input: writing to it changes both")


def expect_few_scores(limit: int, what: str, call) -> None:
    """`call()` makes no tensor of more than `limit` elements."""
    with Largest() as largest:
        call()
    expect(largest.elements <= limit, f"{what}: expected tensors of at most {limit:,} elements\n"
           f"  got one of {largest.elements:,}: are there scores, or a mask, of more than one block?")  # fmt: skip


def expect_blocks_of_scores(call, what: str, tokens: int, keys: int, block: int, *sizes: int) -> None:
    """`call()` makes no T x S scores: neither in one tensor nor, block by block, in a list that is kept."""
    with Scores(*sizes) as scores:
        call()
    parts = tokens * math.ceil(keys / block)  # a maximum and a sum of each block may be kept
    limit = max(tokens * block, parts)
    expect(scores.most <= limit, f"{what}: expected at most {limit:,} scores in a tensor\n"
           f"  got one of {scores.most:,}: are there scores of more than one block?")  # fmt: skip
    limit = 6 * tokens * block + 20 * tokens + 4 * parts
    expect(scores.held <= limit, f"{what}: expected the scores of one block at a time, a few tensors of {tokens} x "
           f"{block}\n  got {scores.held:,} numbers at one time: are those of all blocks kept?")  # fmt: skip


def expect_untouched(call, **tensors: torch.Tensor) -> None:
    before = {name: t.clone() for name, t in tensors.items()}
    call()
    for name, t in tensors.items():
        same = torch.equal(t.nan_to_num(7.0), before[name].nan_to_num(7.0))
        expect(same, f"expected {name} as it was before the call\n  got a changed one")


# ---- 5.w1


@exercise("5.w1", "one_more")
class TestOneMore:
    def walk(self, impl, scores, values):
        state = -INF, 0.0, 0.0
        for score, value in zip(scores, values, strict=True):
            state = expect_parts(impl(*state, score, value), "m", "l", "acc")
        return state

    def _same(self, impl, scores, values):
        m, total, acc = self.walk(impl, scores, values)
        weights = [math.exp(s - max(scores)) for s in scores]
        what = f"scores {scores}"
        expect_equal(f"m, {what}", m, max(scores))
        expect_close(f"l, {what}", total, math.fsum(weights))
        expect_close(f"acc, {what}", acc, math.fsum(w * v for w, v in zip(weights, values, strict=True)))

    def test_first(self, impl):
        """the first key: m is its score, l is 1, acc is its value"""
        expect_close("(m, l, acc)", expect_parts(impl(-INF, 0.0, 0.0, 2.5, 7.0), "m", "l", "acc"), (2.5, 1.0, 7.0))

    def test_by_hand(self, impl):
        """after (ln 3, 4/3, 4) the score ln 6 with the value 4: (ln 6, 5/3, 6)"""
        got = expect_parts(impl(math.log(3), 4 / 3, 4.0, math.log(6), 4.0), "m", "l", "acc")
        expect_close("(m, l, acc)", got, (math.log(6), 5 / 3, 6.0))

    def test_smaller(self, impl):
        """a key below the maximum leaves m as it is: after (ln 6, 5/3, 6) the score ln 2 with the value 0: l is 2"""
        got = expect_parts(impl(math.log(6), 5 / 3, 6.0, math.log(2), 0.0), "m", "l", "acc")
        expect_close("(m, l, acc)", got, (math.log(6), 2.0, 6.0))

    def test_value_of_zero(self, impl):
        """the first key's value may be 0, and values may cancel out: that key counts in l as any other"""
        self._same(impl, [2.0, 3.0], [0.0, 5.0])
        self._same(impl, [1.0, 1.0, 2.0], [4.0, -4.0, 5.0])

    def test_every_key_counts(self, impl):
        """a score of 0 is a score; a large value shows however small its weight"""
        self._same(impl, [0.0, -1.0, 0.0], [2.0, 3.0, 5.0])
        for gap in (20.0, 60.0, 300.0):
            value = math.exp(gap)
            for scores, values in (([gap, 0.0], [1.0, value]), ([0.0, gap], [value, 1.0])):
                acc = self.walk(impl, scores, values)[2]
                expect_close(f"acc, scores {scores}, values {values}", acc, 2.0)

    def test_floats(self, impl):
        """three Python floats, with the digits of floats"""
        state = self.walk(impl, [0.1, 0.3, -0.2], [1 / 3, 0.7, 3.0])
        expect(all(type(x) is float for x in state), f"expected three float\n  got {state}")
        weights = [math.exp(s - 0.3) for s in (0.1, 0.3, -0.2)]
        expect_close("l", state[1], math.fsum(weights), atol=0, rtol=1e-13)
        acc = math.fsum(w * v for w, v in zip(weights, (1 / 3, 0.7, 3.0), strict=True))
        expect_close("acc", state[2], acc, atol=0, rtol=1e-13)

    def test_any_order(self, impl):
        """growing, falling, mixed and equal scores"""
        for scores in ([-2.0, -1.0, 0.5, 3.0], [3.0, 0.5, -1.0, -2.0], [-5.0, -4.0, -7.0], [1.0, 1.0, 1.0]):
            self._same(impl, scores, [3.0, -1.0, 2.0, 5.0][: len(scores)])

    def test_large(self, impl):
        """scores of ±1,000: no overflow, nothing divided by 0"""
        self._same(impl, [-1000.0, -999.0, 1000.0, 999.0], [1.0, 2.0, 3.0, 4.0])
        self._same(impl, [-1001.0, -1000.0], [1.0, 2.0])
        self._same(impl, [1000.0, -1000.0, 998.0], [1.0, 2.0, 3.0])


# ---- 5.w2


@exercise("5.w2", "touched")
class TestTouched:
    def _same(self, impl, first, final, block):
        got = expect_parts(impl(first, final, block), "begin", "end")
        what = f"keys {first} to {final} in blocks of {block}"
        expect(all(type(x) is int for x in got), f"{what}: expected two int\n  got {got}")
        expect_equal(f"blocks, {what}", list(range(*got)), sorted({j // block for j in range(first, final + 1)}))

    def test_by_hand(self, impl):
        """keys 5 to 18 touch the blocks 1 to 4"""
        self._same(impl, 5, 18, 4)

    def test_edges(self, impl):
        """first and last key of a block, a single key, a single block"""
        for first, final in ((0, 0), (3, 3), (4, 4), (4, 7), (3, 4), (0, 15), (0, 16), (7, 8)):
            self._same(impl, first, final, 4)
        self._same(impl, 5, 5, 1)
        self._same(impl, 5, 18, 100)

    def test_no_key(self, impl):
        """no key: no block, also where a block begins"""
        for first in (0, 3, 4, 9):
            got = expect_parts(impl(first, first - 1, 4), "begin", "end")
            expect(got[0] == got[1], f"keys {first} to {first - 1}: expected begin = end\n  got {got}")

    def test_long(self, impl):
        """10¹² blocks, at once and to the last key"""
        n = 10**12
        expect_equal("keys 0 to 64·10¹²", tuple(impl(0, 64 * n, 64)), (0, n + 1))
        got = tuple(impl(4 * 10**17 - 1, 4 * 10**17, 4))
        expect_equal("keys 4·10¹⁷ - 1 to 4·10¹⁷ in blocks of 4", got, (10**17 - 1, 10**17 + 1))
        got = tuple(impl(3 * 10**17 + 2, 6 * 10**17 - 1, 3))
        expect_equal("keys 3·10¹⁷ + 2 to 6·10¹⁷ - 1 in blocks of 3: integers, no rounding", got, (10**17, 2 * 10**17))


# ---- 5.w3


@exercise("5.w3", "block_mask")
class TestBlockMask:
    def _same(self, impl, position, M, start, N):
        got = impl(position, M, start, N)
        what = f"{M} queries from {position}, {N} keys from {start}"
        expect(isinstance(got, torch.Tensor), f"{what}: expected a tensor\n  got {type(got).__name__}")
        expect_equal(f"dtype, {what}", got.dtype, torch.bool)
        expect_equal(f"mask, {what}", got.tolist(), [[start + j <= position + i for j in range(N)] for i in range(M)])

    def test_diagonal(self, impl):
        """on the diagonal: a triangle, in which a query sees itself"""
        self._same(impl, 0, 3, 0, 3)
        self._same(impl, 8, 4, 8, 4)

    def test_anywhere(self, impl):
        """queries and keys that begin at different places, in a rectangle"""
        for position, M, start, N in (
            (8, 4, 6, 5), (6, 4, 8, 3), (5, 3, 4, 8), (7, 1, 5, 4), (2, 6, 4, 1), (300, 2, 100, 300),
            (100, 300, 300, 2),
        ):  # fmt: skip
            self._same(impl, position, M, start, N)

    def test_whole_and_hidden(self, impl):
        """behind the queries all True, ahead of them all False"""
        self._same(impl, 16, 3, 4, 5)
        self._same(impl, 4, 3, 16, 5)

    def test_far(self, impl):
        """positions beyond what 16 and 32 bits, or fp32, can tell apart"""
        for position in (2**15 - 2, 2**24 + 1, 2**31 - 2, 2**40 + 1):
            self._same(impl, position, 4, position - 1, 6)

    def test_before_the_first_key(self, impl):
        """queries at negative positions see nothing"""
        self._same(impl, -3, 5, 0, 4)


# ---- 5.0


@exercise("5.0", "online_attention")
class TestOnlineAttention:
    def _same(self, impl, q, k, v, block, atol=1e-5, what=""):
        expected = (q.double() @ k.double().T / q.shape[1] ** 0.5).softmax(-1) @ v.double()
        got = []
        expect_untouched(lambda: got.append(impl(q, k, v, block)), q=q, k=k, v=v)
        what = f"output{what}, T = {len(q)}, S = {len(k)}, D = {q.shape[1]}, E = {v.shape[1]}, block = {block}"
        expect_close(what, got[0], expected, atol=atol, rtol=1e-4)

    def case(self, tokens, keys, size=8, values=5, scale=1.0):
        return randn(tokens, size, scale=scale), randn(keys, size, seed=1), randn(keys, values, seed=2)

    def test_one_block(self, impl):
        """all keys in one block: softmax(q kᵀ / sqrt(D)) v"""
        self._same(impl, *self.case(4, 6), 6)

    def test_two_blocks(self, impl):
        """two blocks; where the maximum moves, the sum and acc are brought to the new one"""
        self._same(impl, *self.case(4, 6, scale=3.0), 3)
        q, k, v = self.case(3, 6)
        ramp = torch.linspace(0.1, 3, 6)[:, None]
        self._same(impl, q.abs(), ramp * torch.ones_like(k), v, 2, what=" with growing scores")
        self._same(impl, q.abs(), ramp.flip(0) * torch.ones_like(k), v, 2, what=" with falling scores")

    def test_any_block(self, impl):
        """blocks of 1, 4, 20, 21 and 100 of 21 keys; a single query, a single key"""
        for block in (1, 4, 20, 21, 100):
            self._same(impl, *self.case(5, 21), block)
        self._same(impl, *self.case(1, 7), 3)
        self._same(impl, *self.case(150, 140), 130)
        self._same(impl, *self.case(3, 1), 2)

    def test_sizes(self, impl):
        """values with more or fewer features than keys"""
        for size, values in ((4, 1), (3, 16), (7, 7)):
            self._same(impl, *self.case(4, 9, size, values), 4)

    def test_large_scores(self, impl):
        """scores of several hundred, of -1,000 and of -10¹⁰: finite; each query has its own maximum"""
        self._same(impl, *self.case(5, 21, scale=300.0), 4, atol=1e-4)
        q, k, v = torch.tensor([[1.0], [-1.0], [1e7]]), torch.full((6, 1), -1000.0), randn(6, 3)
        self._same(impl, q, k, v, 4)

    def test_few_scores(self, impl):
        """13 queries, 40 keys, blocks of 8: no tensor of more than 104 elements at any time"""
        q, k, v = self.case(13, 40, 1, 1)
        expect_few_scores(104, "blocks of 8", lambda: impl(q, k, v, 8))

    def test_blocks_of_scores(self, impl):
        """small blocks, one query and 13: never more than T x block scores, nor all of them in a list"""
        for tokens, keys, block in ((1, 164, 4), (13, 6, 2), (13, 30, 4), (13, 1600, 16)):
            q, k, v = self.case(tokens, keys, 7, 11)
            what = f"T = {tokens}, S = {keys}, blocks of {block}"
            expect_blocks_of_scores(lambda q=q, k=k, v=v, n=block: impl(q, k, v, n), what, tokens, keys, block, 7, 11)

    def test_inputs(self, impl):
        """inputs that are not contiguous, and are as before the call; the output is new"""
        q, k, v = (spread(t) for t in self.case(4, 9, 8, 8))
        self._same(impl, q, k, v, 4)
        expect_untouched(lambda: impl(q, k, v, 4), q=q, k=k, v=v)
        expect_new([impl(q, k, v, 100)], (q, k, v))
        for tokens in (1, 3):
            q, k, v = self.case(tokens, 1)
            expect_new([impl(q, k, v, 4)], (q, k, v))
        q, k, v = self.case(4, 9)
        expect_untouched(lambda: impl(q, k, v, 4), q=q, k=k, v=v)


# ---- 5.1


def partial(scores: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The definition, from all scores at once.  scores [..., T, S], v [..., S, D]; rows with -inf see nothing there."""
    if scores.shape[-1] == 0:
        m = torch.full(scores.shape[:-1], -INF)
        return m, torch.zeros_like(m), torch.zeros(*m.shape, v.shape[-1])
    m = scores.amax(-1)
    weights = torch.where(scores == -INF, 0.0, torch.exp(scores - torch.where(m == -INF, 0.0, m)[..., None]))
    return m, weights.sum(-1), weights @ v


def expect_partial(what: str, got, expected) -> None:
    got = expect_parts(got, "m", "l", "acc")
    for name, g, e in zip(("m", "l", "acc"), got, expected, strict=True):
        expect_close(f"{what}: {name}", g, e, atol=1e-5, rtol=1e-5)


def pieces(*sizes: int, shape: tuple[int, ...] = (4,), scale: float = 3.0, seed: int = 0):
    """Scores and values of sum(sizes) keys, whole and in pieces."""
    scores, v = randn(*shape, sum(sizes), seed=seed, scale=scale), randn(*shape[:-1], sum(sizes), 3, seed=seed + 1)
    parts = [partial(s, x) for s, x in zip(scores.split(sizes, -1), v.split(sizes, -2), strict=True)]
    return partial(scores, v), parts


def clones(part) -> tuple[torch.Tensor, ...]:
    return tuple(t.clone() for t in part)


@exercise("5.1", "merge")
class TestMerge:
    def test_by_hand(self, impl):
        """scores (0, ln 2) and (ln 4, ln 8), values 1, 2, 3, 4: m = ln 8, l = 15/8, acc = 49/8"""
        a = torch.tensor([math.log(2)]), torch.tensor([1.5]), torch.tensor([[2.5]])
        b = torch.tensor([math.log(8)]), torch.tensor([1.5]), torch.tensor([[5.5]])
        expect_partial("merged", impl(a, b), (torch.tensor([math.log(8)]), [1.875], [[6.125]]))

    def test_two_parts(self, impl):
        """the merge of two parts is the partial result of all keys, whichever has the larger maximum"""
        for seed in range(4):
            whole, (a, b) = pieces(3, 5, seed=seed)
            expect_partial("a with b", impl(clones(a), clones(b)), whole)
            expect_partial("b with a", impl(clones(b), clones(a)), whole)

    def test_any_order_any_grouping(self, impl):
        """four parts in all 24 orders, left to right and in pairs: always the same"""
        whole, parts = pieces(1, 4, 2, 3)
        for order in itertools.permutations(parts):
            a, b, c, d = (clones(p) for p in order)
            expect_partial("((a b) c) d", impl(impl(impl(a, b), c), d), whole)
            a, b, c, d = (clones(p) for p in order)
            expect_partial("(a b)(c d)", impl(impl(a, b), impl(c, d)), whole)

    def test_neutral_element(self, impl):
        """the partial result of no keys changes nothing, from either side; two of them give it again"""
        whole, (a, none) = pieces(6, 0)
        expect_partial("a with nothing", impl(clones(a), clones(none)), whole)
        expect_partial("nothing with a", impl(clones(none), clones(a)), whole)
        got = expect_parts(impl(clones(none), clones(none)), "m", "l", "acc")
        expect_partial("nothing with nothing", got, none)
        expect(bool((got[1] == 0).all()), f"nothing with nothing: expected l = 0\n  got {float(got[1].max()):.3g}")

    def test_each_query_for_itself(self, impl):
        """queries with keys on both sides, on one and on none, in one call"""
        scores, v = randn(4, 6), randn(6, 3)
        scores[1, :3] = scores[2, 3:] = scores[3] = -INF
        for turn in range(4):  # each of the four is the first once
            some = scores.roll(turn, 0)
            a, b = partial(some[:, :3], v[:3]), partial(some[:, 3:], v[3:])
            expect_partial("merged", impl(a, b), partial(some, v))

    def test_large_scores(self, impl):
        """scores of ±1,000: finite, and equal to the softmax in fp64"""
        whole, (a, b) = pieces(4, 4, scale=1000.0, seed=2)
        expect_partial("merged", impl(a, b), whole)
        low = tuple(torch.tensor(x) for x in ([-1000.0], [1.0], [[1.0]]))
        lower = tuple(torch.tensor(x) for x in ([-1001.0], [1.0], [[3.0]]))
        e = math.exp(-1)
        expect_partial("merged", impl(low, lower), ([-1000.0], [1 + e], [[1 + 3 * e]]))
        far = torch.tensor([-1e10]), torch.tensor([2.0]), torch.tensor([[3.0]])
        none = torch.tensor([-INF]), torch.tensor([0.0]), torch.tensor([[0.0]])
        expect_partial("scores of -10¹⁰ with nothing", impl(clones(far), clones(none)), far)
        expect_partial("scores of -10¹⁰, twice", impl(clones(far), clones(far)), ([-1e10], [4.0], [[6.0]]))

    def test_leading_dimensions(self, impl):
        """batch and heads in front: m and l [2, 3, 4], acc [2, 3, 4, D]; D = T, a single query"""
        for shape in ((2, 3, 4), (2, 3), (5, 2, 2, 3), (1,), (1, 1, 1)):
            whole, (a, b) = pieces(3, 5, shape=shape)
            expect_partial(f"m {list(shape)}, merged", impl(a, b), whole)
            expect_partial(f"m {list(shape)}, not contiguous", impl(*([spread(t) for t in p] for p in (a, b))), whole)

    def test_dtype(self, impl):
        """fp64 in, fp64 out; fp32 in, fp32 out"""
        for dtype in (torch.float32, torch.float64):
            _, parts = pieces(3, 5)
            got = expect_parts(impl(*(tuple(t.to(dtype) for t in p) for p in parts)), "m", "l", "acc")
            for name, t in zip(("m", "l", "acc"), got, strict=True):
                expect_equal(f"dtype of {name}", t.dtype, dtype)

    def test_fp64_precision(self, impl):
        """fp64 keeps its digits: nothing goes through fp32 on the way"""
        a = tuple(torch.tensor(x, dtype=torch.float64) for x in ([0.1, 3.0], [1.1, 1 / 3], [[0.3], [0.7]]))
        b = tuple(torch.tensor(x, dtype=torch.float64) for x in ([0.4, 2.1], [1.7, 2 / 3], [[0.9], [0.1]]))
        for name, got, expected in zip(("m", "l", "acc"), impl(a, b), self.in_floats(a, b), strict=True):
            expect_close(f"{name} in fp64", got, expected, atol=0, rtol=1e-13)

    @staticmethod
    def in_floats(a, b):
        rows = []
        for (m, x, p), (n, y, r) in zip(
            *(zip(*(t.tolist() for t in part), strict=True) for part in (a, b)), strict=True
        ):
            top = max(m, n)
            f, g = math.exp(m - top), math.exp(n - top)
            rows.append((top, f * x + g * y, [f * s + g * t for s, t in zip(p, r, strict=True)]))
        return [list(x) for x in zip(*rows, strict=True)]

    def test_values_of_zero(self, impl):
        """keys whose values are 0 count in l: l tells who has no key, not acc"""
        many = torch.tensor([1.0]), torch.tensor([50.0]), torch.tensor([[10.0]])
        expect_partial("equal maxima of 50 keys each", impl(clones(many), clones(many)), ([1.0], [100.0], [[20.0]]))
        a = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0]), torch.zeros(2, 2)
        b = torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0]), torch.ones(2, 2)
        e = math.exp(-1)
        expect_partial("values of 0 on one side", impl(clones(a), clones(b)), ([1, 2], [3, 3 + e], [[1, 1], [e, e]]))
        expect_partial("values of 0 on the other", impl(clones(b), clones(a)), ([1, 2], [3, 3 + e], [[1, 1], [e, e]]))

    def test_no_queries(self, impl):
        """no query, no sequence or no feature: empty tensors of the same shapes come back, new ones"""
        for shape in ((0,), (2, 0), (0, 3)):
            a, b = ((torch.zeros(shape), torch.zeros(shape), torch.zeros(*shape, 3)) for _ in range(2))
            got = expect_parts(impl(a, b), "m", "l", "acc")
            shapes = [tuple(t.shape) for t in got]
            expect_equal(f"shapes for m {list(shape)}", shapes, [shape, shape, (*shape, 3)])
            expect(not any(x is y for x in got for y in (*a, *b)), "no query: expected new tensors\n  got an input")
        a, b = ((torch.zeros(2), torch.ones(2), torch.zeros(2, 0)) for _ in range(2))
        expect_partial("no features", impl(a, b), (torch.zeros(2), [2.0, 2.0], torch.zeros(2, 0)))

    def test_inputs_untouched(self, impl):
        """both inputs are as before the call, and what comes back is new, whichever side is empty"""
        for sizes in ((3, 5), (0, 5), (3, 0), (0, 0)):
            _, (a, b) = pieces(*sizes)
            named = {f"{s}[{i}]": t for s, p in (("a", a), ("b", b)) for i, t in enumerate(p)}
            expect_untouched(lambda a=a, b=b: impl(a, b), **named)
            expect_new(expect_parts(impl(a, b), "m", "l", "acc"), named.values())


# ---- 5.2


def tile_reference(q, k, v, position, sink=None):
    """The definition in fp64, scores written out."""
    scores = q.double() @ k.double().T / q.shape[1] ** 0.5
    scores = scores.masked_fill(torch.arange(len(k)) > position + torch.arange(len(q))[:, None], -INF)
    if sink is not None:
        scores = torch.cat((scores, torch.full((len(q), 1), float(sink), dtype=torch.float64)), 1)
        v = torch.cat((v.double(), torch.zeros(1, v.shape[1], dtype=torch.float64)))
    out = torch.nan_to_num(scores.softmax(-1)) @ v.double()
    return out, scores.logsumexp(-1)


@exercise("5.2", "flash_tile")
class TestFlashTile:
    def _same(self, impl, tokens, keys, position, block, sink=None, scale=1.0, size=8):
        q, k, v = randn(tokens, size, scale=scale), randn(keys, size, seed=1), randn(keys, size, seed=2)
        expected = tile_reference(q, k, v, position, sink)
        out, lse = expect_parts(impl(q, k, v, position, block, sink), "out", "log-sum-exp")
        what = f"T = {tokens}, S = {keys}, position = {position}, block = {block}, sink = {sink}"
        expect_close(f"output, {what}", out, expected[0], atol=2e-5, rtol=1e-4)
        expect_close(f"log-sum-exp, {what}", lse, expected[1], atol=2e-5, rtol=1e-5)

    def test_one_block(self, impl):
        """all keys in one block: causal attention; a single query"""
        self._same(impl, 4, 4, 0, 4)
        self._same(impl, 4, 4, 0, 64)
        self._same(impl, 1, 5, 3, 8)

    def test_many_blocks(self, impl):
        """blocks of 1, 3 and 16 keys, none of which need divide the 21 keys"""
        for block in (1, 3, 16):
            self._same(impl, 5, 21, 16, block)

    def test_positions(self, impl):
        """the tile stands anywhere: at the start, in the middle, past the last key; each block has its mask"""
        for position in (0, 7, 30):
            self._same(impl, 6, 20, position, 4)
        self._same(impl, 11, 20, 3, 3)

    def test_sink(self, impl):
        """a sink takes its share of the sum and adds nothing to the output, small, large, and with no key in sight"""
        for sink in (-2.0, 0.0, 3.0, 50.0, 300.0, -300.0):
            self._same(impl, 5, 12, 7, 4, sink)
        self._same(impl, 3, 5, -8, 4, 1.5)

    def test_queries_that_see_nothing(self, impl):
        """a query that sees nothing: output 0; log-sum-exp -inf without a sink, and the sink with one"""
        self._same(impl, 6, 9, -4, 2)
        self._same(impl, 6, 9, -4, 2, -1.0)
        self._same(impl, 3, 0, 0, 4)

    def test_large_scores(self, impl):
        """scores of several hundred: finite; of -10¹⁰: hidden keys stay hidden beside them"""
        self._same(impl, 5, 21, 16, 4, scale=300.0)
        q, k, v = torch.full((4, 4), 1e5), torch.full((10, 4), -5e4), randn(10, 4, seed=2)
        got = expect_parts(impl(q, k, v, 5, 4), "out", "log-sum-exp")
        means = torch.stack([v[: 6 + i].double().mean(0) for i in range(4)])
        expect_close("output, all scores -10¹⁰", got[0], means, atol=1e-5)
        expect_close("log-sum-exp, all scores -10¹⁰", got[1], torch.full((4,), -1e10), rtol=1e-5)

    def test_hidden_keys_with_large_scores(self, impl):
        """a hidden key whose score is larger by hundreds does not push the visible ones to 0"""
        q, k, v = torch.ones(4, 4), randn(10, 4, seed=1), randn(10, 4, seed=2)
        k[6:] += 300.0
        expected = tile_reference(q, k, v, 3)
        got = expect_parts(impl(q, k, v, 3, 8), "out", "log-sum-exp")
        expect_close("output", got[0], expected[0], atol=2e-5)
        expect_close("log-sum-exp", got[1], expected[1], atol=2e-5)

    def test_hidden_keys_not_visited(self, impl):
        """NaN behind the block of the last visible key does not reach the output"""
        q, k, v = randn(4, 8), randn(32, 8, seed=1), randn(32, 8, seed=2)
        expected = tile_reference(q, k, v, 4)[0]
        k[8:] = v[8:] = float("nan")
        expect_close("output", impl(q, k, v, 4, 4)[0], expected, atol=1e-5)

    def test_half_precision(self, impl):
        """fp16 and bf16: output in q's dtype, log-sum-exp and everything in between in fp32, from the inputs on"""
        kinds = (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)
        for (kind, others), size in itertools.product((*kinds, (torch.bfloat16, torch.float32)), (16, 32)):
            q = randn(4, size).to(kind)
            k, v = (randn(300, size, seed=s).to(others) for s in (1, 2))
            got = expect_parts(impl(q, k, v, 296, 16), "out", "log-sum-exp")
            expected = tile_reference(q, k, v, 296)
            what = f"q in {kind}, k and v in {others}, D = {size}"
            expect_equal(f"dtype of the output, {what}", got[0].dtype, kind)
            expect_equal(f"dtype of the log-sum-exp, {what}", got[1].dtype, torch.float32)
            atol = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[kind]
            expect_close(f"output, {what}", got[0], expected[0], atol=atol, rtol=atol)
            expect_close(f"log-sum-exp, {what}", got[1], expected[1], atol=1e-4)

    def test_fp32_on_the_way(self, impl):
        """q in half precision: values in fp32 are not rounded before they are summed, nor is the running sum"""
        for dtype in (torch.float16, torch.bfloat16):
            step = torch.finfo(dtype).eps / 4
            q, k = torch.zeros(1, 4, dtype=dtype), torch.zeros(2, 4)
            v = torch.tensor([[1.0 + step] * 4, [-1.0] * 4])
            got = expect_parts(impl(q, k, v, 1, 1), "out", "log-sum-exp")
            what = f"the mean of 1 + {step:g} and -1, q in {dtype}"
            expect_close(what, got[0], torch.full((1, 4), step / 2), atol=0, rtol=1e-2)
            v = torch.ones(2500 if dtype == torch.float16 else 300, 4)
            got = expect_parts(impl(q, torch.zeros_like(v), v, len(v) - 1, 1), "out", "log-sum-exp")
            expect_close(
                f"the mean of {len(v):,} ones, q in {dtype}, blocks of one key", got[0], torch.ones(1, 4), atol=1e-2
            )

    def test_dtypes_of_nothing(self, impl):
        """a tile that sees nothing, a sink that half precision cannot hold: output in q's dtype, the rest in fp32"""
        for dtype in (torch.float16, torch.bfloat16):
            q, k, v = (randn(3, 8, seed=s).to(dtype) for s in range(3))
            for position, sink in ((-9, None), (-9, 1.2345), (-1, -0.777)):
                got = expect_parts(impl(q, k, v, position, 2, sink), "out", "log-sum-exp")
                what = f"position {position}, sink {sink}, {dtype}"
                expect_equal(f"dtype of the output, {what}", got[0].dtype, dtype)
                expect_equal(f"dtype of the log-sum-exp, {what}", got[1].dtype, torch.float32)
                expect_close(f"log-sum-exp, {what}", got[1], tile_reference(q, k, v, position, sink)[1], atol=2e-5)

    def test_blocks_of_scores(self, impl):
        """small blocks, one query and 13: never more than T x block scores, nor all of them in a list"""
        for tokens, keys, block in ((1, 164, 4), (13, 6, 2), (13, 1600, 16)):
            q, k, v = randn(tokens, 7), randn(keys, 7, seed=1), randn(keys, 7, seed=2)
            what = f"T = {tokens}, S = {keys}, blocks of {block}"
            call = lambda q=q, k=k, v=v, n=block: impl(q, k, v, len(k) - len(q), n)  # noqa: E731
            expect_blocks_of_scores(call, what, tokens, keys, block, 7)

    def test_no_score_matrix(self, impl):
        """13 queries, 40 keys, blocks of 8: no tensor of more than 104 elements at any time"""
        q, k, v = randn(13, 1), randn(40, 1, seed=1), randn(40, 1, seed=2)
        expect_few_scores(104, "blocks of 8", lambda: impl(q, k, v, 27, 8))
        expect_few_scores(104, "blocks of 8, with a sink", lambda: impl(q, k, v, 27, 8, 1.0))

    def test_inputs_untouched(self, impl):
        """q, k and v are as before the call; they need not be contiguous"""
        q, k, v = randn(4, 8), randn(9, 8, seed=1), randn(9, 8, seed=2)
        expect_untouched(lambda: impl(q, k, v, 5, 4, 1.0), q=q, k=k, v=v)
        got = expect_parts(impl(*(spread(t) for t in (q, k, v)), 5, 4), "out", "log-sum-exp")
        expect_close("output, inputs not contiguous", got[0], tile_reference(q, k, v, 5)[0], atol=2e-5)


# ---- 5.3


def kinds(first, block_m, block_n, len_q, len_k, left, right) -> list[str]:
    """What each key block is, pair by pair."""
    found = []
    for start in range(0, len_k, block_n):
        seen = [
            0 <= j < len_k and (left < 0 or j >= p - left) and (right < 0 or j <= p + right)
            for p in (i + len_k - len_q for i in range(first, min(first + block_m, len_q)))
            for j in range(start, start + block_n)
        ]
        found.append("whole" if all(seen) else "masked" if any(seen) else "hidden")
    return found


def expand(ranges, blocks: int) -> list[str]:
    begin, whole_begin, whole_end, end = ranges
    return [
        "whole" if whole_begin <= b < whole_end else "masked" if begin <= b < end else "hidden" for b in range(blocks)
    ]


@exercise("5.3", "block_ranges")
class TestBlockRanges:
    def _same(self, impl, block_m, block_n, len_q, len_k, left=-1, right=0):
        for first in range(0, len_q, block_m):
            got = expect_parts(impl(first, block_m, block_n, len_q, len_k, left, right), "begin", "whole_begin",
                               "whole_end", "end")  # fmt: skip
            what = f"tile at {first}, blocks of {block_m} x {block_n}, {len_q} queries, {len_k} keys, ({left}, {right})"
            expect(all(isinstance(x, int) for x in got), f"{what}: expected four int\n  got {got}")
            ordered = 0 <= got[0] <= got[1] <= got[2] <= got[3] <= -(-len_k // block_n)
            expect(ordered, f"{what}: expected 0 <= begin <= whole_begin <= whole_end <= end <= blocks\n  got {got}")
            expected = kinds(first, block_m, block_n, len_q, len_k, left, right)
            expect_equal(f"blocks, {what}", expand(got, len(expected)), expected)

    def test_causal(self, impl):
        """causal: whole blocks, then the diagonal; any two block sizes"""
        for block_m, block_n in ((4, 4), (8, 4), (4, 8), (6, 4)):
            self._same(impl, block_m, block_n, 24, 24)

    def test_full(self, impl):
        """no limit on either side: all whole, but a last block that is not full"""
        self._same(impl, 4, 4, 12, 12, -1, -1)
        self._same(impl, 4, 4, 12, 14, -1, -1)

    def test_lengths(self, impl):
        """more keys than queries (a cache), and lengths that no block divides"""
        for len_q, len_k in ((5, 21), (13, 13), (1, 30), (7, 16)):
            self._same(impl, 4, 4, len_q, len_k)

    def test_more_queries_than_keys(self, impl):
        """queries before the first key: tiles that visit nothing, and tiles that are never whole"""
        self._same(impl, 4, 4, 19, 8)
        self._same(impl, 4, 4, 19, 8, 3, 1)
        for left, right in ((-1, -1), (2, -1), (-1, 5), (30, 30)):
            self._same(impl, 4, 4, 19, 8, left, right)

    def test_edges(self, impl):
        """no keys at all; blocks of one key, tiles of one query"""
        for left, right in ((-1, 0), (-1, -1), (2, 1)):
            got = expect_parts(impl(0, 4, 4, 6, 0, left, right), "begin", "whole_begin", "whole_end", "end")
            expect(len(set(got)) == 1, f"no keys, ({left}, {right}): expected begin = end\n  got {got}")
            self._same(impl, 1, 1, 5, 9, left, right)
            self._same(impl, 3, 1, 7, 9, left, right)

    def test_drawn(self, impl):
        """200 drawn cases"""
        draw = random.Random(0)
        for _ in range(200):
            sizes = [draw.randint(1, 6), draw.randint(1, 6), draw.randint(1, 16), draw.randint(0, 16)]
            self._same(impl, *sizes, draw.choice((-1, 0, 1, 3, 8, 20)), draw.choice((-1, 0, 0, 1, 3, 8, 20)))

    def test_short_last_tile(self, impl):
        """queries past the end do not count: the last tile's blocks may be whole for the few that are there"""
        self._same(impl, 8, 4, 9, 20, 9, 3)
        self._same(impl, 8, 2, 9, 20, 5, 0)

    def test_windows(self, impl):
        """looking back, ahead and both ways; windows shorter than a tile"""
        for left, right in ((0, 0), (2, 0), (7, 0), (16, 0), (-1, 5), (5, -1), (0, 9), (3, 3), (11, 6)):
            self._same(impl, 4, 4, 24, 24, left, right)
            self._same(impl, 8, 4, 15, 26, left, right)

    def test_long(self, impl):
        """lengths of 10¹²: no loop over keys or blocks"""
        n = 10**12
        got = impl(n - 128, 128, 64, n, n, -1, 0)
        expect_equal("ranges of the last causal tile", tuple(got), (0, 0, n // 64 - 2, n // 64))
        got = impl(n // 2, 128, 64, n, n, 255, 0)
        expect_equal("whole blocks of a window of 256", got[2] - got[1], 2)


# ---- 5.4


def splits(bounds: list[list[int]], batch: int = 2, heads: int = 3, size: int = 4, scale: float = 2.0):
    """Attention of one query over keys in chunks; bounds[b] are sequence b's.  (outs, lses, out, lse), fp64 inside."""
    keys = max(x[-1] for x in bounds)
    scores, v = randn(batch, heads, keys, scale=scale).double(), randn(batch, heads, keys, size, seed=1).double()
    count = len(bounds[0]) - 1
    outs = torch.full((count, batch, heads, size), float("nan"), dtype=torch.float64)
    lses = torch.full((count, batch, heads), -INF, dtype=torch.float64)
    out, lse = torch.zeros(batch, heads, size, dtype=torch.float64), torch.full((batch, heads), -INF).double()
    for b, edges in enumerate(bounds):
        for n, (i, j) in enumerate(itertools.pairwise(edges)):
            if i < j:
                outs[n, b] = torch.einsum("hs,hsd->hd", scores[b, :, i:j].softmax(-1), v[b, :, i:j])
                lses[n, b] = scores[b, :, i:j].logsumexp(-1)
        if edges[-1]:
            out[b] = torch.einsum("hs,hsd->hd", scores[b, :, : edges[-1]].softmax(-1), v[b, :, : edges[-1]])
            lse[b] = scores[b, :, : edges[-1]].logsumexp(-1)
    return outs.float(), lses.float(), out, lse


@exercise("5.4", "combine_splits")
class TestCombineSplits:
    def _same(self, impl, bounds, scale=2.0):
        outs, lses, out, lse = splits(bounds, len(bounds), scale=scale)
        got = expect_parts(impl(outs, lses), "out", "lse")
        expect_close(f"output, chunks {bounds}", got[0], out, atol=1e-5)
        expect_close(f"log-sum-exp, chunks {bounds}", got[1], lse, atol=1e-4, rtol=1e-5)

    def test_by_hand(self, impl):
        """sums of exponentials 3 and 1, outputs 8 and 0: the output is 6, the log-sum-exp ln 4"""
        outs = torch.tensor([8.0, 0.0]).reshape(2, 1, 1, 1)
        out, lse = expect_parts(impl(outs, torch.tensor([math.log(3), 0.0]).reshape(2, 1, 1)), "out", "lse")
        expect_close("output", out, [[[6.0]]])
        expect_close("log-sum-exp", lse, [[math.log(4)]])

    def test_one_chunk(self, impl):
        """a single chunk: nothing changes, but an empty one gives 0, and what comes back is new"""
        self._same(impl, [[0, 9], [0, 9]])
        self._same(impl, [[0, 9], [0, 0]])
        outs, lses, _, _ = splits([[0, 9], [0, 9]])
        expect_new(expect_parts(impl(outs, lses), "out", "lse"), (outs, lses))

    def test_chunks_of_any_length(self, impl):
        """2 to 5 chunks of different lengths equal attention over all keys"""
        self._same(impl, [[0, 5, 10], [0, 1, 10]])
        self._same(impl, [[0, 3, 4, 11, 12, 40], [0, 8, 16, 24, 32, 40]])

    def test_empty_chunks(self, impl):
        """chunks without keys, first, last or between: their output is NaN from old memory, and does not count"""
        self._same(impl, [[0, 0, 6, 6, 9], [0, 4, 8, 12, 16]])
        self._same(impl, [[0, 7, 7, 7, 7], [0, 0, 0, 0, 7]])

    def test_infinite_leftovers(self, impl):
        """leftovers in empty chunks may be infinite too"""
        outs, lses, out, _ = splits([[0, 5, 5], [0, 4, 9]])
        outs[1, 0] = INF
        expect_close("output", impl(outs, lses)[0], out, atol=1e-5)

    def test_a_real_nan(self, impl):
        """NaN from a chunk that has keys is somebody's mistake, and shows"""
        outs, lses, _, _ = splits([[0, 4, 9], [0, 4, 9]])
        outs[0, 0, 0, 0] = math.nan
        got = impl(outs, lses)[0]
        expect(bool(got[0, 0, 0].isnan()), f"expected NaN\n  got      {float(got[0, 0, 0])}")
        expect(int(got.isnan().sum()) == 1, f"expected one NaN\n  got {int(got.isnan().sum())}: the others are right")
        outs, lses = torch.ones(2, 1, 1, 1), torch.zeros(2, 1, 1)
        outs[1], lses[1] = math.nan, -120.0
        got = impl(outs, lses)[0]
        expect(
            bool(got.isnan().all()),
            "log-sum-exps 0 and -120, NaN from the second chunk, which has keys: expected NaN\n"
            f"  got      {float(got.reshape(-1)[0])}",
        )
        outs[1] = 5.0
        expect_close("output of log-sum-exps 0 and -120", impl(outs, lses)[0], [[[1.0]]])
        got = expect_parts(impl(outs, torch.tensor([0.0, math.nan]).reshape(2, 1, 1)), "out", "lse")
        expect(all(bool(x.isnan().all()) for x in got), "a log-sum-exp of NaN: expected NaN for both\n  got others")

    def test_each_head_for_itself(self, impl):
        """a chunk may be empty for one head and not for another"""
        outs, lses = randn(2, 1, 2, 3), randn(2, 1, 2)
        outs[1, 0, 0], lses[1, 0, 0] = math.nan, -INF
        got = expect_parts(impl(outs, lses), "out", "lse")
        share = lses[:, 0, 1].double().softmax(0)
        expect_close("output of the head with one chunk", got[0][0, 0], outs[0, 0, 0], atol=1e-5)
        expect_close("output of the head with two", got[0][0, 1], share @ outs[:, 0, 1].double(), atol=1e-5)
        expect_close("log-sum-exp", got[1][0], [float(lses[0, 0, 0]), float(lses[:, 0, 1].double().logsumexp(0))])

    def test_low_is_not_empty(self, impl):
        """only -inf says that a chunk has no key: one of -10³, -10⁶ or -10¹⁰ has, and its NaN shows"""
        for low in (-1e3, -1e6, -1e10):
            outs, lses = torch.tensor([3.0, 5.0]).reshape(2, 1, 1, 1), torch.full((2, 1, 1), max(low, -1e3))
            expect_close("output of 3 and 5, equal log-sum-exps", impl(outs, lses)[0], [[[4.0]]], atol=1e-2)
            outs = torch.tensor([3.0, math.nan]).reshape(2, 1, 1, 1)
            lses = torch.tensor([0.0, low]).reshape(2, 1, 1)
            got = impl(outs, lses)[0]
            expect(bool(got.isnan().all()), f"NaN beside a log-sum-exp of {low:g}: expected NaN\n  got {float(got)}")

    def test_a_sequence_without_keys(self, impl):
        """no key in any chunk: output 0, log-sum-exp -inf"""
        self._same(impl, [[0, 0, 0], [0, 4, 9]])

    def test_large(self, impl):
        """log-sum-exps of about ±1,000: finite"""
        self._same(impl, [[0, 5, 10], [0, 1, 10]], scale=1000.0)
        outs, lses, out, lse = splits([[0, 5, 10], [0, 1, 10]])
        got = impl(outs, lses - 1000)
        expect_close("output of very small sums", got[0], out, atol=1e-3)
        expect_close("log-sum-exp of very small sums", got[1], lse - 1000, atol=1e-3)

    def test_half_precision(self, impl):
        """outputs in fp16 and bf16: combined in fp32, rounded once, returned in their dtype"""
        for dtype in (torch.float16, torch.bfloat16):
            outs, lses, _, _ = splits([list(range(0, 65, 4)), list(range(0, 65, 4))])
            outs = outs.to(dtype)
            weights = lses.double().softmax(0)[..., None]
            out, lse = impl(outs, lses)
            expect_equal("dtype of the output", out.dtype, dtype)
            expect_equal("dtype of the log-sum-exp", lse.dtype, torch.float32)
            exact = (weights * outs.double()).sum(0)
            expect_close(f"output in {dtype}", out, exact, atol=1e-6, rtol=0.52 * torch.finfo(dtype).eps)

    def test_no_loop(self, impl):
        """4,096 chunks take no more tensor operations than 2"""

        class Count(TorchDispatchMode):
            calls = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                self.calls += 1
                return func(*args, **(kwargs or {}))

        counts = []
        for n in (2, 4096):
            outs, lses = randn(n, 1, 1, 2), randn(n, 1, 1)
            with Count() as count:
                impl(outs, lses)
            counts.append(count.calls)
        expect(
            counts[1] <= counts[0] + 4,
            f"expected about {counts[0]} operations for 4,096 chunks, as for 2\n  got {counts[1]:,}",
        )

    def test_inputs_untouched(self, impl):
        """outs and lses are as before the call, leftovers too; they need not be contiguous"""
        outs, lses, out, lse = splits([[0, 5, 5], [0, 4, 9]])
        expect_untouched(lambda: impl(outs, lses), outs=outs, lses=lses)
        one, its = splits([[0, 5], [0, 0]])[:2]
        expect_untouched(lambda: impl(one, its), outs=one, lses=its)
        got = expect_parts(impl(outs.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1), spread(lses)), "out", "lse")
        expect_close("output, inputs not contiguous", got[0], out, atol=1e-5)
        expect_close("log-sum-exp, inputs not contiguous", got[1], lse, atol=1e-4)


# ---- 5.5


def alibi_reference(q, k, v, slope):
    back = torch.arange(len(q))[:, None] - torch.arange(len(k))
    scores = q.double() @ k.double().T * q.shape[1] ** -0.5 - slope * back
    return scores.masked_fill(back < 0, -INF).softmax(-1) @ v.double()


def on_device(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.cuda() if torch.cuda.is_available() else t for t in tensors]


class Guarded:
    """While open, what a kernel reads and writes outside of its tensors is noted and left out, in the interpreter; so
    is the precision of each tl.dot. On a GPU, torch.empty_like hands out the front of a longer buffer instead.
    """

    rows, mark = 64, 12_345.0

    def __enter__(self):
        self.read = self.written = 0
        self.precisions, self.tails, self.ranges, self.patches = set(), [], [], []
        self.programs, self.tiles = [], set()
        if os.environ.get("TRITON_INTERPRET") == "1":
            self.watch()
        else:
            self.patches = [patch.object(torch, "empty_like", self.made)]
        for p in self.patches:
            p.start()
        return self

    def __exit__(self, *_):
        for p in self.patches:
            p.stop()

    def watch(self) -> None:
        from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

        run = InterpretedFunction.run
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
        dot = InterpreterBuilder.create_dot

        def launched(kernel, *args, **kwargs):
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            grid = kwargs["grid"]
            self.programs.append(math.prod(grid(kwargs) if callable(grid) else grid))
            self.ranges = [(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in tensors]
            return run(kernel, *args, **kwargs)

        def within(ptrs, mask):
            """The mask without addresses outside of every tensor, and how many these are."""
            wanted = np.broadcast_to(np.asarray(mask.data, bool), ptrs.data.shape)
            inside = np.zeros(ptrs.data.shape, bool)
            for low, high in self.ranges:
                inside |= (ptrs.data >= low) & (ptrs.data < high)
            return TensorHandle(wanted & inside, mask.dtype), int((wanted & ~inside).sum())

        def loaded(builder, ptrs, mask, *rest, **options):
            mask, outside = within(ptrs, mask)
            self.read += outside
            return load(builder, ptrs, mask, *rest, **options)

        def stored(builder, ptrs, value, mask, *rest, **options):
            mask, outside = within(ptrs, mask)
            self.written += outside
            return store(builder, ptrs, value, mask, *rest, **options)

        def multiplied(builder, a, b, d, precision, *rest):
            self.precisions.add(str(precision).rpartition(".")[2].lower())
            self.tiles.add(frozenset((a.data.shape[0], b.data.shape[1])))
            return dot(builder, a, b, d, precision, *rest)

        self.patches = [
            patch.object(InterpretedFunction, "run", launched),
            patch.object(InterpreterBuilder, "create_masked_load", loaded),
            patch.object(InterpreterBuilder, "create_masked_store", stored),
            patch.object(InterpreterBuilder, "create_dot", multiplied),
        ]

    def made(self, like: torch.Tensor, **options) -> torch.Tensor:
        tokens = like.shape[0]
        whole = torch.full(
            (tokens + self.rows, *like.shape[1:]), self.mark, dtype=options.get("dtype", like.dtype), device=like.device
        )
        self.tails.append(whole[tokens:])
        return whole[:tokens]

    def check(self, what: str) -> None:
        written = self.written or any(bool((tail != self.mark).any()) for tail in self.tails)
        expect(not written, f"{what}: something was written outside of the tensors: the store needs its mask")
        expect(
            not self.read,
            f"{what}: expected nothing read outside of q, k and v\n"
            f"  got {self.read:,} numbers: each load of rows past the end needs a mask",
        )
        loose = self.precisions - {"ieee"}
        expect(not loose, f'{what}: expected every tl.dot with input_precision="ieee"\n  got {", ".join(loose)}')


def behind_nan(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The same values, with rows of NaN behind the end: a load without its mask shows."""
    return [torch.cat((t, torch.full((64, *t.shape[1:]), math.nan, dtype=t.dtype)))[: len(t)] for t in tensors]


@exercise("5.5", "flash_alibi")
class TestFlashAlibi:
    got: list[torch.Tensor] = []

    def _same(self, impl, tokens, size=16, slope=0.25, block_m=16, block_n=16, dtype=torch.float32, scale=1.0):
        drawn = (randn(tokens, size, seed=s, scale=c).to(dtype) for s, c in ((0, scale), (1, 1), (2, 1)))
        q, k, v = on_device(*behind_nan(*drawn))
        what = f"T = {tokens}, D = {size}, slope = {slope}, blocks of {block_m} x {block_n}, {dtype}"
        with Guarded() as guarded:
            expect_untouched(lambda: self.got.append(impl(q, k, v, slope, block_m, block_n)), q=q, k=k, v=v)
        got = self.got.pop()
        guarded.check(what)
        if guarded.programs:
            programs = math.ceil(tokens / block_m)
            expect_equal(f"number of programs, {what}", guarded.programs, [programs])
            tile = frozenset((block_m, block_n))
            expect(tile in guarded.tiles, f"{what}: expected scores of {block_m} x {block_n}\n"
                   f"  got products of {sorted(map(sorted, guarded.tiles))}: is a block size ignored?")  # fmt: skip
        atol = 1e-5 if dtype == torch.float32 else 2e-3
        expect_equal(f"dtype, {what}", got.dtype, dtype)
        expect_close(f"output, {what}", got, alibi_reference(q.cpu(), k.cpu(), v.cpu(), slope), atol=atol, rtol=atol)

    def test_one_block(self, impl):
        """one tile, one block, no bias: causal attention"""
        self._same(impl, 16, slope=0.0)

    def test_bias(self, impl):
        """the penalty grows with the distance"""
        self._same(impl, 16, slope=0.5)

    def test_several_blocks(self, impl):
        """three tiles and three blocks, where the maximum moves"""
        self._same(impl, 48)
        self._same(impl, 48, slope=0.0, scale=4.0)

    def test_two_calls(self, impl):
        """a second call leaves the result of the first as it is"""
        q, k, v = on_device(*(randn(20, 16, seed=s) for s in range(3)))
        with Guarded():
            first = impl(q, k, v, 0.25, 16, 16)
            before = first.clone()
            impl(k, q, v, 0.5, 16, 16)
        expect_close("the first result, after a second call", first, before)

    def test_far(self, impl):
        """a gentle slope over 200 tokens: the penalty grows to the end"""
        self._same(impl, 200, slope=0.02, block_m=64, block_n=64)

    def test_any_length(self, impl):
        """lengths that no block divides, and a single token"""
        for tokens in (1, 21, 40):
            self._same(impl, tokens)

    def test_block_sizes(self, impl):
        """tiles longer than blocks and the other way round; D = 32"""
        self._same(impl, 40, 32, block_m=32, block_n=16)
        self._same(impl, 40, 32, block_m=16, block_n=32)

    def test_large_scores(self, impl):
        """scores of several hundred, all far below 0, and a steep slope: finite"""
        self._same(impl, 40, scale=200.0)
        self._same(impl, 40, slope=20.0)
        q, k = on_device(torch.full((20, 16), 1e5), torch.full((20, 16), -2.5e4))
        v = on_device(randn(20, 16))[0]
        means = torch.stack([v[: i + 1].double().mean(0) for i in range(20)])
        expect_close("output, all scores -10¹⁰", impl(q, k, v, 0.0, 16, 16), means, atol=1e-4)

    def test_hidden_blocks_not_visited(self, impl):
        """an infinite value reaches no query of an earlier tile: hidden blocks are not visited"""
        q, k, v = on_device(*(randn(48, 16, seed=s) for s in range(3)))
        expected = alibi_reference(q.cpu(), k.cpu(), v.cpu(), 0.25)
        v[32:] = INF
        expect_close("output of the first two tiles", impl(q, k, v, 0.25, 16, 16)[:32], expected[:32], atol=1e-5)

    def test_half_precision(self, impl):
        """fp16 in and out, the running state in fp32: 40 values of 30,000 do not overflow"""
        self._same(impl, 40, dtype=torch.float16)
        q, k = on_device(torch.zeros(40, 16, dtype=torch.float16), randn(40, 16).half())
        v = torch.full_like(k, 30_000.0)
        expect_close("output", impl(q, k, v, 0.0, 16, 16), torch.full((40, 16), 30_000.0), rtol=2e-3)
        self._same(impl, 40, dtype=torch.float16, scale=50.0)

    def test_small_weights_add_up(self, impl):
        """fp16, 255 keys that weigh 2⁻¹⁵ of the first each: a running sum in fp32 does not lose them"""
        q, k, v = (torch.zeros(256, 16, dtype=torch.float16) for _ in range(3))
        q[:, 0], k[0, 0], v[:] = 4.0, 15 * math.log(2), 1.0
        q, k, v = on_device(q, k, v)
        with Guarded():
            got = impl(q, k, v, 0.0, 128, 16)
        expect_close("output, all values 1", got, torch.ones(256, 16), atol=3e-3)

    def test_no_score_matrix(self, impl):
        """96 tokens: torch makes no tensor of 96 x 96 elements"""
        q, k, v = on_device(*(randn(96, 16, seed=s) for s in range(3)))
        with Largest() as largest:
            impl(q, k, v, 0.25, 32, 32)
        short = [x[:5] for x in (q, k, v)]
        with Guarded(), Scores(16) as scores:
            impl(*short, 0.25, 16, 16)
        expect(scores.most < 25, f"5 tokens: expected no tensor of 5 x 5 scores\n  got one of {scores.most} elements")
        expect(
            largest.elements < 96 * 96,
            f"expected tensors of fewer than 9,216 elements\n  got one of {largest.elements:,}",
        )

    @last
    def test_compiles(self, impl):
        """it compiles for a GPU, in fp16"""
        q, k, v = on_device(*(randn(100, 64, seed=s).half() for s in range(3)))
        expect_launches_compile(lambda: impl(q, k, v, 0.25, 64, 64))
