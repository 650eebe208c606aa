"""Checks of exercises 6: tokens counted, a ring, a weight of 0, append and attend, memory plans, a cache that grows and
rewinds, decoding a batch, a rolling window with sinks, moved keys, and the batch at which arithmetic limits.
"""

import math
import pickle
import random
import sys
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.learn.testing import (
    ContractError,
    exercise,
    expect,
    expect_close,
    expect_equal,
    expect_parts,
    expect_raises,
)


def heads(kv_heads, head_dim=128, **more):
    return {"kv_heads": kv_heads, "head_dim": head_dim, **more}


def random_tensor(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def softmax_sum(q, keys, values):
    """Attention of one query [H, D] to a list of keys and values [H_kv, D], in fp64, head by head."""
    groups, out = q.shape[0] // keys[0].shape[0], torch.zeros(q.shape, dtype=torch.float64)
    for h in range(q.shape[0]):
        scores = [float(q[h].double() @ key[h // groups].double()) / math.sqrt(q.shape[1]) for key in keys]
        weights = [math.exp(s - max(scores)) for s in scores]
        for weight, value in zip(weights, values, strict=True):
            out[h] += weight / sum(weights) * value[h // groups].double()
    return out


def spread(t):
    """The same values, not contiguous: every other number of each row of a larger tensor."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), math.nan, dtype=t.dtype)
    wide[..., :-1:2] = t
    return wide[..., :-1:2]


def view_of(t):
    """The same values with heads before slots in memory, as some caches have them; writes go there."""
    return t.transpose(-3, -2).contiguous().transpose(-3, -2)


def same(a, b):
    """NaN stands where it stood."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def expect_kept(what, **pairs):
    for name, (now, before) in pairs.items():
        expect(same(now, before), f"{what}: expected {name} as before the call\n  got a changed one")


def expect_new(what, got, *given):
    memory = {t.untyped_storage().data_ptr() for t in given}
    shared = got.untyped_storage().data_ptr() in memory
    expect(not shared, f"{what}: expected a new tensor\n  got one that shares memory with an input")


class Count(TorchDispatchMode):
    """Counts tensor operations."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def few_lines(most, message):
    """Raise `message` once more than `most` lines of Python were run: a loop over what should be computed."""
    lines = 0

    def watch(frame, event, arg):
        nonlocal lines
        lines += event == "line"
        if lines > most:
            raise ContractError(message)
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def uninitialized_is_nan():
    """torch.empty gives NaN, as it may anywhere."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@exercise("6.w1", "tokens_computed")
class TestTokensComputed:
    def _same(self, impl, prompt, n):
        got = expect_parts(impl(prompt, n), "without", "with")
        what = f"{prompt} tokens, {n} to generate"
        expect(all(type(x) is int for x in got), f"{what}: expected two int\n  got {got}")
        expect_equal(f"without a cache, {what}", got[0], sum(prompt + i for i in range(n)))
        expect_equal(f"with one, {what}", got[1], sum(1 if i else prompt for i in range(n)))

    def test_by_hand(self, impl):
        """3 tokens, 5 to generate: 3 + 4 + 5 + 6 + 7 = 25 without a cache, 3 + 1 + 1 + 1 + 1 = 7 with one"""
        self._same(impl, 3, 5)

    def test_any(self, impl):
        """other lengths; a single token to generate takes the prompt alone"""
        for prompt, n in ((1, 1), (7, 1), (1, 6), (100, 900), (12, 13)):
            self._same(impl, prompt, n)

    def test_none(self, impl):
        """nothing to generate: nothing passes"""
        self._same(impl, 9, 0)

    def test_many(self, impl):
        """10⁹ tokens: no loop, and exact"""
        n = 10**9
        with few_lines(1000, "n = 10⁹: expected a formula\n  got a loop over the steps"):
            got = expect_parts(impl(3, n), "without", "with")
        expect_equal("without a cache", got[0], 3 * n + n * (n - 1) // 2)
        expect_equal("with one", got[1], n + 2)
        n = 3 * 10**9 + 7
        expect_equal(f"n = {n:,}", tuple(impl(1, n)), (n + n * (n - 1) // 2, n))


@exercise("6.w2", "ring")
class TestRing:
    def _same(self, impl, length, window):
        expected = [-1] * window
        for p in range(length):
            expected[p % window] = p
        got = impl(length, window)
        expect_equal(f"positions in a ring of {window} after {length} tokens", got, expected)
        expect(all(type(p) is int for p in got), f"a ring of {window}: expected int\n  got {got}")

    def test_by_hand(self, impl):
        """a ring of 4 after 6 tokens: [4, 5, 2, 3]"""
        self._same(impl, 6, 4)

    def test_not_full(self, impl):
        """before it is full: -1 in slots that were never written; nothing at all"""
        for length in (3, 1, 0):
            self._same(impl, length, 4)

    def test_full(self, impl):
        """just full, once around, and a ring of one slot"""
        for length, window in ((4, 4), (5, 4), (8, 4), (29, 7), (5, 1), (0, 1)):
            self._same(impl, length, window)

    def test_many(self, impl):
        """10¹² tokens: no loop over them"""
        n = 10**12
        with few_lines(1000, "10¹² tokens: expected a formula\n  got a loop over them"):
            got = impl(n + 2, 5)
        expect_equal("positions in a ring of 5 after 10¹² + 2 tokens", got, [n, n + 1, n - 3, n - 2, n - 1])


@exercise("6.w3", "blend")
class TestBlend:
    def _same(self, impl, seen, garbage=0.0, scale=1.0):
        seen = torch.tensor(seen)
        scores, values = scale * random_tensor(len(seen)), random_tensor(len(seen), 3, seed=1)
        expected = scores[seen].double().softmax(0) @ values[seen].double()
        scores[~seen], values[~seen] = garbage, garbage
        kept = scores.clone(), values.clone(), seen.clone()
        got = impl(scores, values, seen)
        what = f"seen {seen.int().tolist()}, {garbage:g} elsewhere"
        expect_close(f"output, {what}", got, expected)
        expect_kept(what, scores=(scores, kept[0]), values=(values, kept[1]), seen=(seen, kept[2]))

    def test_all_seen(self, impl):
        """all slots hold tokens: the softmax of the scores times the values"""
        self._same(impl, [True] * 5)

    def test_some_seen(self, impl):
        """the softmax is over the slots that are seen: at the end, at the beginning, anywhere"""
        for seen in ([1, 1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0, 0, 1], [0, 1, 0]):
            self._same(impl, [bool(x) for x in seen])
            self._same(impl, [bool(x) for x in seen], 1e4)

    def test_garbage(self, impl):
        """NaN and infinity in the other slots do not show"""
        for garbage in (math.nan, math.inf, -math.inf):
            self._same(impl, [True, False, True, False], garbage)

    def test_low_scores(self, impl):
        """scores of several hundred and of -10¹⁰: what hides must be lower still"""
        self._same(impl, [True, False, True, True], math.nan, scale=300.0)
        low = torch.tensor([-100.0, -50.0, -100.0])
        got = impl(low, torch.tensor([[1.0], [7.0], [3.0]]), torch.tensor([True, False, True]))
        expect_close("output, visible scores of -100, one of -50 between that is not seen", got, [2.0])
        scores, values = torch.tensor([-1e10, 5.0, -1e10]), torch.tensor([[1.0], [7.0], [3.0]])
        got = impl(scores, values, torch.tensor([True, False, True]))
        expect_close("output, visible scores of -10¹⁰", got, [2.0])

    def test_a_real_nan(self, impl):
        """NaN in a slot that is seen shows"""
        values = torch.tensor([[1.0, 2.0], [math.nan, 4.0], [5.0, 6.0]])
        got = impl(torch.zeros(3), values, torch.tensor([True, True, False]))
        expect_close("output", got, [math.nan, 3.0])
        scores = torch.tensor([0.0, math.nan, 0.0])
        got = impl(scores, torch.ones(3, 2), torch.tensor([True, True, False]))
        expect_close("output, a score of NaN that is seen", got, [math.nan, math.nan])

    def test_inputs(self, impl):
        """inputs that are not contiguous"""
        scores, values, seen = random_tensor(6), random_tensor(6, 3, seed=1), torch.tensor([True, True, False] * 2)
        expected = scores[seen].softmax(0) @ values[seen]
        expect_close("output", impl(spread(scores), spread(values), seen), expected)


@exercise("6.0", "append_and_attend")
class TestAppendAndAttend:
    def hold(self, impl, steps, slots=12, q_heads=4, kv_heads=2, size=6, garbage=7.0, change=lambda t: t, scale=1.0):
        """Take `steps` tokens at a time and compare with all at once."""
        total, length = sum(steps), 0
        q = scale * random_tensor(total, q_heads, size)
        k, v = random_tensor(total, kv_heads, size, seed=1), random_tensor(total, kv_heads, size, seed=2)
        caches = [change(torch.full((slots, kv_heads, size), garbage)) for _ in range(2)]
        for new in steps:
            parts = [x[length : length + new].clone() for x in (q, k, v)]
            what = f"{new} new after {length}, {q_heads} heads on {kv_heads}"
            got = impl(*parts, *caches, length)
            rows = [softmax_sum(q[p], k[: p + 1], v[: p + 1]) for p in range(length, length + new)]
            expect_close(f"attention, {what}", got, torch.stack(rows), atol=1e-5 * max(1, scale))
            length += new
            for name, cache, full in zip(("k_cache", "v_cache"), caches, (k, v), strict=True):
                expect_close(f"{name} in slots 0 to {length - 1}, {what}", cache[:length], full[:length])
                rest = torch.full_like(cache[length:], garbage)
                expect(same(cache[length:], rest), f"{name}, {what}: slots from {length} on were changed")
            expect_new(what, got, *caches, *parts)
            before = [x[length - new : length] for x in (q, k, v)]
            expect_kept(what, **dict(zip("qkv", zip(parts, before, strict=True), strict=True)))

    def test_prompt(self, impl):
        """a prompt into an empty cache: stored, and causal attention"""
        self.hold(impl, [5], q_heads=2, kv_heads=2)
        self.hold(impl, [1], q_heads=2, kv_heads=2)
        self.hold(impl, [1, 1], q_heads=1, kv_heads=1)

    def test_token(self, impl):
        """single tokens after a prompt see all before and themselves"""
        self.hold(impl, [5, 1, 1, 1], q_heads=2, kv_heads=2)

    def test_heads(self, impl):
        """query head h reads key/value head h // (H / H_kv)"""
        for q_heads, kv_heads in ((4, 2), (6, 2), (6, 1)):
            self.hold(impl, [4, 1], q_heads=q_heads, kv_heads=kv_heads)

    def test_chunks(self, impl):
        """chunks of several tokens: each sees the cached ones and those of its step up to itself"""
        self.hold(impl, [3, 4, 1, 2, 2])
        self.hold(impl, [1, 2, 5])

    def test_garbage(self, impl):
        """what stands in slots behind does not show, NaN and infinity neither, and stays"""
        for garbage in (1e4, math.inf, math.nan):
            self.hold(impl, [3, 2, 1], garbage=garbage)

    def test_to_the_last_slot(self, impl):
        """the cache may be filled to the last slot"""
        self.hold(impl, [4, 3, 1], slots=8)
        self.hold(impl, [8], slots=8)

    def test_too_many(self, impl):
        """ValueError when the new tokens do not fit, and nothing changes"""
        q, k = random_tensor(3, 2, 4), random_tensor(3, 2, 4, seed=1)
        caches = [random_tensor(6, 2, 4, seed=s) for s in (2, 3)]
        kept = [x.clone() for x in caches]
        for length in (4, 6):
            why = f"3 tokens after {length} in 6 slots"
            expect_raises(ValueError, lambda n=length: impl(q, k, k.clone(), *caches, n), why)
            expect_kept(why, k_cache=(caches[0], kept[0]), v_cache=(caches[1], kept[1]))

    def test_views(self, impl):
        """caches and inputs that are not contiguous: the caches are changed in place"""
        self.hold(impl, [3, 2, 1], change=view_of)
        q, k, v = random_tensor(3, 4, 6), random_tensor(3, 2, 6, seed=1), random_tensor(3, 2, 6, seed=2)
        caches = torch.zeros(5, 2, 6), torch.zeros(5, 2, 6)
        got = impl(spread(q), spread(k), spread(v), *caches, 0)
        rows = [softmax_sum(q[p], k[: p + 1], v[: p + 1]) for p in range(3)]
        expect_close("attention, inputs not contiguous", got, torch.stack(rows), atol=1e-5)

    def test_large_scores(self, impl):
        """scores in the hundreds do not overflow; beside scores of -10¹⁰ the future stays hidden"""
        self.hold(impl, [3, 2], scale=300.0)
        q, k, v = torch.full((3, 1, 4), 1e5), torch.full((3, 1, 4), -5e4), random_tensor(3, 1, 4)
        got = impl(q, k, v, torch.zeros(3, 1, 4), torch.zeros(3, 1, 4), 0)
        means = torch.stack([v[: i + 1].double().mean(0) for i in range(3)])
        expect_close("attention, all scores -10¹⁰", got, means, atol=1e-5)


@exercise("6.1", "max_sequences")
class TestMaxSequences:
    GB = 10**9

    def test_grouped(self, impl):
        """Llama 3 8B in bf16: 16.06 GB of weights and 131,072 bytes a token on a GPU of 80 GB"""
        got = impl(80 * self.GB, 16_060_522_496, [heads(8)] * 32, 8192)
        expect_equal("sequences of 8,192", got, 59)
        expect_equal("with 32 key/value heads", impl(80 * self.GB, 16_060_522_496, [heads(32)] * 32, 8192), 14)
        expect_equal("with 1 key/value head", impl(80 * self.GB, 16_060_522_496, [heads(1)] * 32, 8192), 476)

    def test_latent(self, impl):
        """MLA keeps one latent and one turned key a token, for all heads"""
        got = impl(10_000_000, 0, [{"latent": 512, "rope": 64}] * 3, 100)
        expect_equal("sequences", got, 10_000_000 // (3 * 576 * 2 * 100))
        mixed = [{"latent": 512, "rope": 64}, heads(2, 64)]
        expect_equal("mixed with a GQA layer", impl(10_000_000, 0, mixed, 100), 10_000_000 // ((576 + 256) * 200))

    def test_windows(self, impl):
        """a layer with a window keeps no more than its window; short sequences keep what they have"""
        layers = [heads(1, 64, window=100)] * 5 + [heads(1, 64)]
        expect_equal("long", impl(10**8, 0, layers, 10_000), 10**8 // (256 * (5 * 100 + 10_000)))
        expect_equal("short", impl(10**8, 0, layers, 40), 10**8 // (256 * 6 * 40))
        latent = [{"latent": 100, "rope": 28, "window": 10}]
        expect_equal("MLA with a window", impl(10**6, 0, latent, 500), 10**6 // 2560)

    def test_blocks(self, impl):
        """each layer's tokens are rounded up to whole blocks, after the window"""
        expect_equal(
            "17 tokens, blocks of 16", impl(10**6, 0, [heads(1, 64)] * 2, 17, block=16), 10**6 // (2 * 256 * 32)
        )
        expect_equal(
            "16 tokens, blocks of 16", impl(10**6, 0, [heads(1, 64)] * 2, 16, block=16), 10**6 // (2 * 256 * 16)
        )
        layers = [heads(1, 64, window=20)]
        expect_equal("a window of 20, blocks of 16", impl(10**6, 0, layers, 1000, block=16), 10**6 // (256 * 32))
        layers = [heads(1, 64, window=9), heads(1, 64, window=9), heads(1, 64, window=9)]
        expect_equal("three layers of 9 tokens", impl(10**6, 0, layers, 50, block=16), 10**6 // (256 * 48))

    def test_bytes_of_a_number(self, impl):
        """4 bits are half a byte"""
        expect_equal("1 byte", impl(10**6, 0, [heads(2, 64)], 100, size=1), 39)
        got = impl(10**6, 0, [heads(2, 64)], 100, size=0.5)
        expect_equal("half a byte", got, 78)
        expect(type(got) is int, f"half a byte: expected an int, got {type(got).__name__}")
        odd = [{"latent": 5, "rope": 2}]
        expect_equal("7 numbers of half a byte, 10 tokens", impl(3500, 0, odd, 10, size=0.5), 100)
        expect_equal("the same in blocks of 3", impl(4199, 0, odd, 10, size=0.5, block=3), 99)
        expect_equal("two such layers", impl(3500, 0, odd * 2, 5, size=0.5), 100)
        expect_equal("half a byte, with weights", impl(10**6, 500_000, [heads(2, 64)], 100, size=0.5), 39)
        expect_equal("4 bytes, with weights", impl(10**6, 500_000, [heads(1, 64)], 10, size=4), 97)
        expect_equal("3.5 bytes a sequence", impl(35, 0, odd, 1, size=0.5), 10)

    def test_nothing_fits(self, impl):
        """0, an int, when the weights or the first sequence do not fit; the last bytes count"""
        expect_equal("weights too large", impl(100, 200, [heads(1, 64)], 10), 0)
        expect_equal("weights alone", impl(200, 200, [heads(1, 64)], 10), 0)
        expect_equal("one byte short", impl(2559, 0, [heads(1, 64)], 10), 0)
        got = impl(2560, 0, [heads(1, 64)], 10)
        expect_equal("exactly one", got, 1)
        expect(type(got) is int, f"expected an int, got {type(got).__name__}")


@exercise("6.2", "Cache")
class TestCache:
    def parts(self, got):
        return expect_parts(got, "keys", "values")

    def test_appends(self, impl):
        """append returns all keys and all values in order"""
        cache, k, v = impl(2, 8), random_tensor(20, 2, 8), random_tensor(20, 2, 8, seed=1)
        for first, last in ((0, 3), (3, 4), (4, 5), (5, 16), (16, 20)):
            keys, values = self.parts(cache.append(k[first:last], v[first:last]))
            expect_close("keys", keys, k[:last])
            expect_close("values", values, v[:last])
            expect_equal("length", cache.length, last)

    def test_capacity(self, impl):
        """capacity doubles, once or more, only when tokens do not fit"""
        cache = impl(1, 4, capacity=3)
        expect_equal("at first", cache.capacity, 3)
        for new, expected in ((3, 3), (1, 6), (2, 6), (1, 12), (5, 12), (37, 96)):
            cache.append(torch.ones(new, 1, 4), torch.ones(new, 1, 4))
            expect_equal(f"after {cache.length} tokens", cache.capacity, expected)

    def test_views(self, impl):
        """an append that needs no growth copies nothing: keys and values stay where they are"""
        cache = impl(2, 4, capacity=8)
        keys, values = self.parts(cache.append(torch.ones(2, 2, 4), torch.ones(2, 2, 4)))
        later, later_v = self.parts(cache.append(torch.ones(3, 2, 4), torch.ones(3, 2, 4)))
        expect(later.data_ptr() == keys.data_ptr(), "keys were copied: return a view of what is stored")
        expect(later_v.data_ptr() == values.data_ptr(), "values were copied: return a view of what is stored")
        expect(keys.data_ptr() != values.data_ptr(), "keys and values are the same memory")

    def test_copies_no_old_token(self, impl):
        """one token after 500, with room for it: no tensor of old tokens is made, and nothing of them is copied"""
        cache = impl(1, 4, capacity=1024)
        parts = self.parts(cache.append(torch.ones(500, 1, 4), torch.ones(500, 1, 4)))
        memory, made = {t.untyped_storage().data_ptr() for t in parts}, []

        class Made(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                if isinstance(out, torch.Tensor):
                    copied = "copy_" in func.__name__
                    if copied or out.untyped_storage().data_ptr() not in memory:
                        made.append(out.numel())
                return out

        with Made():
            cache.append(torch.ones(1, 1, 4), torch.ones(1, 1, 4))
        expect(max(made) <= 4 * 16, f"expected copies of the new token alone, 4 numbers\n  got {max(made):,} numbers")

    def test_exactly_full(self, impl):
        """tokens that fill the capacity at once are copied too, and a capacity of 1 is one"""
        for tokens in (1, 4):
            cache, k, v = impl(1, 4, capacity=tokens), random_tensor(tokens, 1, 4), random_tensor(tokens, 1, 4, seed=1)
            expect_equal("capacity at first", cache.capacity, tokens)
            kept = k.clone(), v.clone()
            got = self.parts(cache.append(k, v))
            k.zero_(), v.zero_()
            for name, g, e in zip(("keys", "values"), got, kept, strict=True):
                expect_close(f"{name}, after the input was changed", g, e)
            expect_equal("capacity", cache.capacity, tokens)
            cache.append(kept[0][:1], kept[1][:1])
            expect_equal("capacity with one more", cache.capacity, 2 * tokens)

    def test_nothing_yet(self, impl):
        """no token at all: keys and values of none, in fp32"""
        none = torch.zeros(0, 2, 4, dtype=torch.float16)
        for got in self.parts(impl(2, 4).append(none, none)):
            expect_equal("shape", tuple(got.shape), (0, 2, 4))
            expect_equal("dtype", got.dtype, torch.float32)

    def test_rewinds(self, impl):
        """rewind forgets the end; the next tokens take its place"""
        cache, k, v = impl(2, 8), random_tensor(12, 2, 8), random_tensor(12, 2, 8, seed=1)
        cache.append(k[:9], v[:9])
        cache.rewind(5)
        expect_equal("length", cache.length, 5)
        keys, values = self.parts(cache.append(k[10:], v[10:]))
        expect_close("keys", keys, torch.cat((k[:5], k[10:])))
        expect_close("values", values, torch.cat((v[:5], v[10:])))
        cache.rewind(7)
        expect_equal("rewinding to the present length", cache.length, 7)

    def test_rewind_is_final(self, impl):
        """ValueError for what was dropped: 9 tokens, rewind(5), then rewind(8)"""
        cache, k = impl(1, 4), random_tensor(9, 1, 4)
        cache.append(k, k)
        cache.rewind(5)
        for length in (8, 9, 6):
            expect_raises(ValueError, lambda n=length: cache.rewind(n), f"9 tokens, rewind(5), then rewind({length})")
        expect_equal("length", cache.length, 5)

    def test_numbers(self, impl):
        """fp32 is stored whatever comes; no new token is no change; keys and values need not be contiguous"""
        cache, k, v = impl(2, 4), random_tensor(6, 2, 4), random_tensor(6, 2, 4, seed=1)
        keys, values = self.parts(cache.append(spread(k[:3]), spread(v[:3])))
        expect_close("keys", keys, k[:3])
        keys, values = self.parts(cache.append(k[3:5].half(), v[3:5].double()))
        expect(keys.dtype == values.dtype == torch.float32, f"expected fp32, got {keys.dtype} and {values.dtype}")
        expect_close("keys, of which two came in fp16", keys, torch.cat((k[:3], k[3:5].half())))
        keys, values = self.parts(cache.append(k[:0], v[:0]))
        expect_close("values after no new token", values, v[:5])
        expect_equal("length after no new token", cache.length, 5)
        expect_equal("capacity after 5 tokens", cache.capacity, 8)

    def test_rewind_then_growth(self, impl):
        """growing after a rewind keeps the right tokens; rewinding moves nothing and never shrinks"""
        cache, k = impl(1, 4, capacity=4), random_tensor(40, 1, 4)
        keys, _ = self.parts(cache.append(k[:8], k[:8]))
        cache.rewind(2)
        expect_equal("capacity after rewind", cache.capacity, 8)
        again, _ = self.parts(cache.append(k[20:22], k[20:22]))
        expect(again.data_ptr() == keys.data_ptr(), "rewind moved the cache")
        keys, values = self.parts(cache.append(k[22:30], k[22:30]))
        expected = torch.cat((k[:2], k[20:30]))
        expect_close("keys", keys, expected)
        expect_close("values", values, expected)
        expect_equal("capacity", cache.capacity, 16)

    def test_rewind_to_nothing(self, impl):
        """rewind(0) empties it"""
        cache, k = impl(1, 4), random_tensor(6, 1, 4)
        cache.append(k, k)
        cache.rewind(0)
        expect_equal("capacity after rewind(0)", cache.capacity, 8)
        keys, _ = self.parts(cache.append(k[3:], k[3:]))
        expect_close("keys", keys, k[3:])

    def test_errors(self, impl):
        """ValueError for a length that never was, and nothing changes"""
        cache, k = impl(1, 4), random_tensor(3, 1, 4)
        cache.append(k, k)
        expect_raises(ValueError, lambda: cache.rewind(4), "longer than the cache")
        expect_raises(ValueError, lambda: cache.rewind(-1), "a negative length")
        expect_equal("length", cache.length, 3)

    def test_inputs(self, impl):
        """a later change of the input does not reach the cache"""
        cache, k = impl(1, 4), random_tensor(3, 1, 4)
        kept = k.clone()
        keys, values = self.parts(cache.append(k, k))
        k.zero_()
        expect_close("keys", keys, kept)
        expect_close("values", values, kept)


@exercise("6.3", "decode_step")
class TestDecodeStep:
    def case(self, lengths, active, slots=7, q_heads=2, kv_heads=2, garbage=None, scale=1.0):
        rows = len(lengths)
        q = scale * random_tensor(rows, q_heads, 8)
        k, v = random_tensor(rows, kv_heads, 8, seed=1), random_tensor(rows, kv_heads, 8, seed=2)
        caches = [random_tensor(rows, slots, kv_heads, 8, seed=s) for s in (3, 4)]
        if garbage is not None:
            for cache in caches:
                for row, length in enumerate(lengths):
                    cache[row, length:] = garbage
        return q, k, v, *caches, torch.tensor(lengths), torch.tensor(active)

    def expected(self, q, k, v, k_cache, v_cache, lengths, active):
        out, caches = torch.zeros(q.shape, dtype=torch.float64), (k_cache.clone(), v_cache.clone())
        for row in range(len(q)):
            if active[row]:
                n = int(lengths[row])
                out[row] = softmax_sum(q[row], [*k_cache[row, :n], k[row]], [*v_cache[row, :n], v[row]])
                caches[0][row, n], caches[1][row, n] = k[row], v[row]
        return out, *caches

    def hold(self, impl, case, atol=1e-5):
        out, k_cache, v_cache = self.expected(*case)
        others = dict(zip(("q", "k", "v", "lengths", "active"), (*case[:3], *case[5:]), strict=True))
        kept = {name: x.clone() for name, x in others.items()}
        got = impl(*case)
        what = f"lengths {case[5].tolist()}, active {case[6].int().tolist()}"
        what += f", {case[0].shape[1]} heads on {case[1].shape[1]}"
        expect_close(f"attention, {what}", got, out, atol=atol)
        expect_close(f"k_cache after, {what}", case[3], k_cache)
        expect_close(f"v_cache after, {what}", case[4], v_cache)
        expect_kept(what, **{name: (x, kept[name]) for name, x in others.items()})
        expect_new(what, got, *case)

    def test_one_row(self, impl):
        """one sequence attends to its tokens and the new one, which is stored"""
        self.hold(impl, self.case([3], [True]))

    def test_heads(self, impl):
        """query head h reads key/value head h // (H / H_kv)"""
        for q_heads, kv_heads in ((4, 2), (6, 2), (6, 1)):
            self.hold(impl, self.case([2, 5], [True, True], q_heads=q_heads, kv_heads=kv_heads))

    def test_different_lengths(self, impl):
        """each row sees its own tokens only"""
        self.hold(impl, self.case([3, 1, 6, 5], [True] * 4))

    def test_first_token(self, impl):
        """a row with nothing stored attends to the new token alone"""
        self.hold(impl, self.case([0, 4], [True, True]))

    def test_finished_rows(self, impl):
        """a finished row gives 0 and is left alone, full or not"""
        self.hold(impl, self.case([7, 2, 5, 7], [False, True, False, False]))
        self.hold(impl, self.case([7, 2], [False, False]))
        for active in ([False, True, False], [False, False, False]):
            case = self.case([2, 3, 7], active)
            for x in case[:3]:
                x[~case[6]] = math.nan
            expected = self.expected(*case)
            what = f"active {active}, NaN in q, k and v of finished rows"
            expect_close(f"attention, {what}", impl(*case), expected[0], atol=1e-5)
            for name, after, e in zip(("k_cache", "v_cache"), case[3:5], expected[1:], strict=True):
                expect_close(f"{name}, {what}", after, e)

    def test_garbage(self, impl):
        """what stands past a row's end does not show, and stays as it is"""
        for garbage in (1e4, float("inf"), float("nan")):
            case = self.case([3, 0, 5], [True, True, False], garbage=garbage, q_heads=4)
            out, *caches = self.expected(*case)
            expect_close(f"attention, lengths [3, 0, 5], {garbage:g} behind them", impl(*case), out, atol=1e-5)
            for name, after, expected in zip(("k_cache", "v_cache"), case[3:5], caches, strict=True):
                expect(same(after, expected), f"{name}: slots past a row's end held {garbage:g}, and were changed")

    def test_large_scores(self, impl):
        """scores in the hundreds do not overflow"""
        self.hold(impl, self.case([2, 5], [True, True], scale=300.0), atol=1e-4)
        one = torch.ones(1, 1, 4)
        k_cache, v_cache = torch.full((1, 5, 1, 4), -5e4), random_tensor(1, 5, 1, 4)
        new, mean = random_tensor(1, 1, 4, seed=1), v_cache[:, :2].double().sum(1)
        case = (1e5 * one, -5e4 * one, new, k_cache, v_cache, torch.tensor([2]), torch.tensor([True]))
        expect_close("attention, all scores -10¹⁰", impl(*case), (mean + new) / 3, atol=1e-5)

    def test_views(self, impl):
        """caches that are views, with heads before slots in memory, are changed in place; inputs may be views"""
        q, k, v, k_cache, v_cache, *rest = self.case([3, 1, 6, 5], [True, True, False, True], q_heads=4)
        self.hold(impl, (spread(q), spread(k), spread(v), view_of(k_cache), view_of(v_cache), *rest))
        q, k, v, k_cache, v_cache, *rest = self.case([3, 1, 6], [True] * 3, q_heads=4)
        self.hold(impl, (q, k, v, view_of(k_cache), view_of(v_cache), *rest))
        self.hold(impl, self.case([3, 1, 6], [True] * 3, q_heads=4, kv_heads=1))

    def test_no_loop(self, impl):
        """64 rows take no more tensor operations than 2"""
        counts = []
        for rows in (2, 64):
            case = self.case([3, 1] * (rows // 2), [True, False] * (rows // 2))
            with Count() as count:
                impl(*case)
            counts.append(count.calls)
        expect(
            counts[1] <= counts[0] + 4,
            f"expected about {counts[0]} tensor operations for 64 rows, as for 2\n  got {counts[1]:,}: a loop?",
        )


@exercise("6.4", "SinkCache")
class TestSinkCache:
    def hold(self, impl, sinks, window, steps, q_heads=2, kv_heads=1, scale=1.0, change=lambda t: t.clone()):
        """Take `steps` tokens at a time and compare with all at once; the cache's size is watched."""
        total, cache = sum(steps), impl(sinks, window, kv_heads, 8)
        q = scale * random_tensor(total, q_heads, 8)
        k, v = random_tensor(total, kv_heads, 8, seed=1), random_tensor(total, kv_heads, 8, seed=2)
        first = 0
        for new in steps:
            parts = [change(x[first : first + new]) for x in (q, k, v)]
            got = cache.step(*parts)
            what = f"sinks {sinks}, window {window}, tokens {first} to {first + new - 1} of steps {steps}"
            for name in ("k", "v"):
                shape = tuple(getattr(cache, name).shape)
                expect_equal(f"the cache's {name}, {what}", shape, (sinks + window, kv_heads, 8))
            rows = []
            for p in range(first, first + new):
                seen = [j for j in range(p + 1) if j < sinks or j > p - window]
                rows.append(softmax_sum(q[p], [k[j] for j in seen], [v[j] for j in seen]))
            expect_close(
                f"attention, {what}",
                got,
                torch.stack(rows),
                atol=1e-5 * max(1, scale),
            )
            before = [x[first : first + new] for x in (q, k, v)]
            expect_kept(what, **dict(zip("qkv", zip(parts, before, strict=True), strict=True)))
            kept = {t.untyped_storage().data_ptr() for t in tensors_in(vars(cache))}
            shared = any(x.untyped_storage().data_ptr() in kept for x in parts)
            expect(not shared, f"{what}: the cache keeps memory of the step's inputs: copy what it needs")
            for x in parts:
                x.fill_(math.nan)  # whoever kept the caller's memory sees it change
            first += new
        return cache

    def test_one_by_one(self, impl):
        """single tokens, far past the window"""
        self.hold(impl, 2, 4, [1] * 17)
        self.hold(impl, 2, 3, [70, 1, 1, 20, 1])

    def test_fills(self, impl):
        """before sinks and window are full a token sees all that came"""
        self.hold(impl, 3, 5, [2, 1, 3, 1])

    def test_long_prompt(self, impl):
        """a prompt longer than the cache in one step, then single tokens"""
        self.hold(impl, 2, 4, [15, 1, 1, 1, 1, 1, 1])

    def test_chunks(self, impl):
        """steps of several tokens: none sees the cache as a later one leaves it"""
        self.hold(impl, 1, 4, [5, 3, 3, 2, 4, 6, 1, 5])

    def test_prompt_shorter_than_sinks(self, impl):
        """sinks may come in several steps"""
        self.hold(impl, 4, 3, [1, 1, 7, 1, 2])

    def test_no_sinks(self, impl):
        """without sinks it is a plain window; with a window of 1 a token sees sinks and itself"""
        self.hold(impl, 0, 3, [4, 1, 1, 2, 1])
        self.hold(impl, 2, 1, [1, 2, 3, 1, 1])

    def test_heads(self, impl):
        """query head h reads key/value head h // (H / H_kv)"""
        for q_heads, kv_heads in ((4, 2), (6, 2), (3, 1), (2, 2), (1, 1)):
            self.hold(impl, 1, 3, [3, 1, 2, 1], q_heads=q_heads, kv_heads=kv_heads)

    def test_any_memory(self, impl):
        """slots never written may hold NaN, as torch.empty may give"""
        with uninitialized_is_nan():
            self.hold(impl, 2, 4, [1, 2, 1, 6, 1])
            self.hold(impl, 3, 5, [4, 1])

    def test_two_caches(self, impl):
        """two caches of one size know nothing of each other"""
        k, v = random_tensor(6, 1, 4), random_tensor(6, 1, 4, seed=1)
        one, two = impl(1, 3, 1, 4), impl(1, 3, 1, 4)
        alone = one.step(k[:3], k[:3], v[:3]).clone()
        two.step(k[3:], k[3:], v[3:])
        got = one.step(k[3:4], k[3:4], v[3:4])
        expected = softmax_sum(k[3], list(k[:4]), list(v[:4]))
        expect_close("attention of the first cache, after a step of the second", got[0], expected, atol=1e-5)
        expect_close("its first step", alone[0], v[0])

    def test_fixed_memory(self, impl):
        """after 400 tokens the cache keeps no more numbers than after 40"""
        cache, x, sizes, pickled = impl(1, 4, 1, 8), random_tensor(1, 1, 8), [], []
        for token in range(400):
            cache.step(x.clone(), x.clone(), x.clone())
            if token in (39, 399):
                sizes.append(numbers_in(cache))
                pickled.append(pickled_size(cache))
        expect(
            sizes[1] <= sizes[0],
            f"sinks 1, window 4: expected {sizes[0]:,} numbers in the cache's attributes, as after 40 tokens\n"
            f"  got {sizes[1]:,} after 400",
        )
        expect(
            pickled[1] <= pickled[0] + 200,
            f"sinks 1, window 4: expected about {pickled[0]:,} bytes in what the cache keeps, as after 40 tokens\n"
            f"  got {pickled[1]:,} after 400: does something beside keys and values grow?",
        )

    def test_large_scores(self, impl):
        """scores in the hundreds do not overflow; inputs need not be contiguous"""
        self.hold(impl, 1, 3, [5, 1, 2], scale=300.0)
        self.hold(impl, 1, 3, [5, 1, 2], q_heads=4, kv_heads=2, change=spread)
        cache, v = impl(1, 2, 1, 4), random_tensor(6, 1, 4)
        q, k = torch.full((6, 1, 4), 1e5), torch.full((6, 1, 4), -5e4)
        got = torch.cat([cache.step(q[i:j], k[i:j], v[i:j]) for i, j in ((0, 3), (3, 4), (4, 6))])
        seen = [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 5]]
        means = torch.stack([v[some].double().mean(0) for some in seen])
        expect_close("attention, sinks 1, window 2, all scores -10¹⁰", got, means, atol=1e-5)


def pickled_size(thing) -> int:
    """The bytes of all that an object keeps; 0 where something cannot be pickled."""
    try:
        return len(pickle.dumps(vars(thing)))
    except Exception:
        return 0


def tensors_in(thing, depth=3):
    """The tensors among an object's attributes, those in lists and dictionaries included."""
    if isinstance(thing, torch.Tensor):
        return [thing]
    inner = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple | set) else ()
    return [t for x in inner for t in tensors_in(x, depth - 1)] if depth else []


def numbers_in(thing, depth=3):
    """How many numbers an object's attributes hold, lists and dictionaries of tensors included."""
    if isinstance(thing, torch.Tensor):
        return thing.untyped_storage().nbytes()
    if isinstance(thing, dict):
        entries = (
            sum(1 if isinstance(x, int | float) else numbers_in(x, depth - 1) for x in thing.values()) if depth else 0
        )
        return entries if depth == 3 else entries + len(thing)
    if isinstance(thing, list | tuple | set):
        return sum(1 if isinstance(x, int | float) else numbers_in(x, depth - 1) for x in thing) if depth else 0
    return numbers_in(vars(thing), depth) if hasattr(thing, "__dict__") and depth == 3 else 0


def turned(raw, positions, theta):
    """RoPE with complex numbers in fp64.  raw [S, H, D] -> [S, H, D] in raw's dtype"""
    half = raw.shape[-1] // 2
    angles = positions.double()[:, None] * theta ** (-torch.arange(half).double() * 2 / raw.shape[-1])
    pairs = (
        torch.complex(raw[..., :half].double(), raw[..., half:].double())
        * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    return torch.cat((pairs.real, pairs.imag), -1).to(raw.dtype)


@exercise("6.5", "cut")
class TestCut:
    def hold(self, impl, slots, start, stop, theta=10_000.0, dtype=torch.float32, atol=1e-5, size=16, values_in=None,
             change=lambda t: t):  # fmt: skip
        kind = values_in or dtype
        raw = random_tensor(slots, 2, size, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        v = change(random_tensor(slots, 2, size, seed=1).to(kind))
        k = change(turned(raw, torch.arange(slots), theta).to(dtype))
        left = torch.cat((raw[:start], raw[stop:]))
        kept = k.clone(), v.clone()
        keys, values = expect_parts(impl(k, v, start, stop, theta), "keys", "values")
        rtol = 1e-9 if dtype == torch.float64 else 1e-5
        expect_close("keys", keys, turned(left, torch.arange(len(left)), theta), atol=atol, rtol=rtol)
        expect_close("values", values, torch.cat((v[:start], v[stop:])))
        expect_equal("dtype of the keys", keys.dtype, dtype)
        expect_equal("dtype of the values", values.dtype, kind)
        expect(bool((k == kept[0]).all() and (v == kept[1]).all()), "the inputs were changed")
        keys.fill_(7.0), values.fill_(7.0)
        same = bool((k == kept[0]).all() and (v == kept[1]).all())
        expect(same, "writing into what came back changes the inputs: return new tensors")

    def test_the_middle(self, impl):
        """keys behind the gap are as if they had always stood there; values are only joined"""
        self.hold(impl, 12, 3, 7)

    def test_the_beginning(self, impl):
        """the oldest tokens go"""
        self.hold(impl, 9, 0, 5)

    def test_the_end(self, impl):
        """nothing stands behind the gap"""
        self.hold(impl, 9, 6, 9)
        self.hold(impl, 9, 0, 9)

    def test_nothing(self, impl):
        """start = stop removes nothing"""
        self.hold(impl, 6, 4, 4)

    def test_one_head(self, impl):
        """a single head, a single feature pair"""
        raw = random_tensor(9, 1, 2)
        k, v = turned(raw, torch.arange(9), 10_000.0), random_tensor(9, 1, 2, seed=1)
        keys, values = expect_parts(impl(k, v, 2, 5), "keys", "values")
        expect_close("keys", keys, turned(torch.cat((raw[:2], raw[5:])), torch.arange(6), 10_000.0), atol=1e-5)
        expect_close("values", values, torch.cat((v[:2], v[5:])))

    def test_theta_and_size(self, impl):
        """other frequencies, other head sizes"""
        self.hold(impl, 40, 10, 31, theta=500.0)
        self.hold(impl, 40, 1, 31, size=6)
        self.hold(impl, 40, 1, 31, theta=7.5)

    def test_far(self, impl):
        """a gap of 150,001 tokens: angles keep their precision"""
        raw, v = random_tensor(150_020, 1, 4), torch.zeros(150_020, 1, 4)
        k = turned(raw, torch.arange(150_020), 3.0)
        keys, _ = expect_parts(impl(k, v, 7, 150_008, 3.0), "keys", "values")
        expected = turned(raw[150_008:], torch.arange(7, 19), 3.0)
        expect_close("keys behind the gap", keys[7:], expected, atol=1e-4)

    def test_bf16(self, impl):
        """bf16 in, bf16 out; keys and values each in their own dtype"""
        self.hold(impl, 12, 3, 7, dtype=torch.bfloat16, atol=0.05)
        self.hold(impl, 12, 3, 7, values_in=torch.float16)
        self.hold(impl, 12, 3, 7, dtype=torch.bfloat16, atol=0.05, values_in=torch.float32)

    def test_fp64(self, impl):
        """fp64 keys: angles keep their precision, and the inputs stay as they are"""
        self.hold(impl, 12, 3, 7, dtype=torch.float64, atol=1e-12)
        self.hold(impl, 12, 0, 11, dtype=torch.float64, atol=1e-12)

    def test_not_contiguous(self, impl):
        """keys and values that are views, with heads before slots in memory"""
        self.hold(impl, 12, 3, 7, change=view_of)
        self.hold(impl, 12, 3, 7, change=spread)


@exercise("6.6", "saturating_batch")
class TestSaturatingBatch:
    def limited(self, batch, weights, layers, q, kv, dim, context, peak, bandwidth, size):
        flops = batch * (2 * weights + 4 * layers * q * dim * context)
        moved = size * (weights + batch * context * 2 * layers * kv * dim)
        return flops / peak >= moved / bandwidth

    def test_weights_alone(self, impl):
        """with no context to speak of: the ridge, in 16 bits"""
        expect_equal("batch", impl(10**9, 1, 1, 1, 2, 1, 700.5e12, 3e12), 234)

    def test_grows_with_the_context(self, impl):
        """Llama 3 8B's layers on an H100-like machine, held against the definition on both sides of the answer"""
        previous = 0
        for context in (1, 100, 300, 450):
            case = (7_504_658_432, 32, 32, 8, 128, context, 740e12, 3.0e12, 2)
            got = impl(*case[:8])
            expect(
                isinstance(got, int) and not isinstance(got, bool), f"context {context}: expected an int, got {got!r}"
            )
            expect(self.limited(got, *case), f"context {context}: at a batch of {got} memory still limits")
            expect(not self.limited(got - 1, *case), f"context {context}: a batch of {got - 1} is enough")
            expect(got > previous, f"context {context}: expected more than {previous}, got {got}")
            previous = got

    def test_never(self, impl):
        """None where each further sequence brings more reading than arithmetic"""
        expect_equal("8,192 tokens", impl(7_504_658_432, 32, 32, 8, 128, 8192, 740e12, 3.0e12), None)

    def test_sharing_helps(self, impl):
        """fewer key/value heads, another answer"""
        expect_equal("32 of 32 heads", impl(10**9, 16, 32, 32, 64, 1000, 740e12, 3.0e12), None)
        got = impl(10**9, 16, 32, 1, 64, 1000, 740e12, 3.0e12)
        expect(got is not None, "1 of 32 heads: expected a batch, got None")
        expect(self.limited(got, 10**9, 16, 32, 1, 64, 1000, 740e12, 3e12, 2), f"memory still limits at {got}")

    def test_bytes_of_a_number(self, impl):
        """8-bit numbers halve what is read, weights and cache"""
        got = impl(10**9, 1, 1, 1, 2, 1, 700.5e12, 3e12, size=1)
        expect_equal("batch", got, 117)
        got = impl(10**9, 1, 1, 1, 2, 1, 700.5e12, 3e12, size=0.5)
        expect_equal("batch, half a byte", got, 59)

    def test_drawn(self, impl):
        """drawn machines and models, held against the definition"""
        draw = random.Random(0)
        found = set()
        for _ in range(300):
            kv = draw.choice((1, 2, 8))
            case = (draw.randint(10**5, 10**9), draw.randint(1, 40), kv * draw.choice((1, 4, 16)), kv, 64,
                    draw.randint(1, 3000), draw.uniform(1e11, 9e14), draw.uniform(1e10, 4e12),
                    draw.choice((1, 2, 4)))  # fmt: skip
            got = impl(*case)
            found.add(got is None)
            if got is None:
                expect(not self.limited(10**12, *case), f"{case}: expected a batch, got None")
            else:
                expect(got >= 1, f"{case}: expected 1 or more, got {got}")
                expect(self.limited(got * (1 + 1e-9), *case), f"{case}: at a batch of {got} memory still limits")
                expect(
                    got == 1 or not self.limited((got - 1) * (1 - 1e-9), *case), f"{case}: less than {got} is enough"
                )
        expect(found == {True, False}, "expected both batches and None among the drawn cases")

    def test_no_search(self, impl):
        """an answer of 10¹² or so: it is not counted up to"""
        weights = 10**12
        with few_lines(5000, "an answer of 10¹²: expected a formula\n  got more than 5,000 lines of Python: a search"):
            got = impl(weights, 1, 2, 1, 1, weights // 4 - 1, 4.0, 1.0)
        expect(isinstance(got, int), f"expected an int, got {got!r}")
        expect_close("where (10¹² - 2) B reaches 2·10¹² + (10¹² - 4) B", got, weights, rtol=1e-3)

    def test_exact(self, impl):
        """a tie counts as limited by arithmetic; two lines that run side by side never meet"""
        expect_equal("61,440 B / 8 reaches 57,344 + 4,096 B", impl(28_672, 2, 4, 4, 8, 16, 8.0, 1.0), 16)
        expect_equal("32,768 B / 8 stays below 28,672 + 4,096 B", impl(14_336, 2, 4, 4, 8, 16, 8.0, 1.0), None)

    def test_at_least_one(self, impl):
        """a machine with little arithmetic is limited by it at once"""
        got = impl(10**6, 2, 4, 4, 16, 10, 1e9, 1e12)
        expect_equal("batch", got, 1)
        expect(type(got) is int, f"expected an int\n  got {got!r}")
