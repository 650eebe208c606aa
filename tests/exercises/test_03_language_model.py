"""The contracts of chapter 3's exercises: warm-ups, the training loop, merges, encoding, a step in pieces, losses, the
nucleus, streaming.
"""

import ast
import bisect
import builtins
import codecs
import heapq
import inspect
import itertools
import math
import random
import re
import textwrap
from contextlib import ExitStack
from unittest import mock

import numpy as np
import torch
from torch import nn

from minillm.learn.testing import ContractError, exercise, expect, expect_close, expect_equal, expect_parts

SENTENCES = (
    "A list is a mutable sequence, typically used to store collections of similar items. The list type also provides "
    "the sort method. Lists may be constructed in several ways: a pair of square brackets denotes the empty list; the "
    "items of a tuple are separated by commas. Übergrößen, 日本語 and 🙂🙂 are strings too."
)


def words_of(text: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for word in re.findall(r" ?\w+|[^\w\s]", text):
        counts[word] = counts.get(word, 0) + 1
    return counts


def joined(symbols: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    """`symbols` with `pair` joined from left to right, by recursion from the left end."""
    if len(symbols) < 2:
        return symbols
    if symbols[:2] == pair:
        return (pair[0] + pair[1], *joined(symbols[2:], pair))
    return (symbols[0], *joined(symbols[1:], pair))


def plain_merges(word_counts: dict[str, int], num_merges: int, min_count: int = 1) -> list[tuple[bytes, bytes]]:
    """Repeat every word as often as it occurs and count without any weights."""
    text = [tuple(bytes([b]) for b in w.encode()) for w, n in word_counts.items() for _ in range(n)]
    merges = []
    for _ in range(num_merges):
        pairs = [(s[i], s[i + 1]) for s in text for i in range(len(s) - 1)]
        if not pairs:
            break
        count, best = min((-pairs.count(pair), pair) for pair in set(pairs))
        if -count < min_count:
            break
        merges.append(best)
        text = [joined(s, merges[-1]) for s in text]
    return merges


def pairs_of(got: object) -> list:
    """`got` as a list of tuples, after holding that it is a list."""
    what = "nothing (is a `return` missing?)" if got is None else type(got).__name__
    expect(isinstance(got, list | tuple), f"expected a list of pairs\n  got      {what}")
    return [tuple(pair) if isinstance(pair, list | tuple) else pair for pair in got]


@exercise("3.w1", "halve")
class TestHalve:
    def _is(self, impl, probabilities, p, ends, expected):
        given = list(probabilities)
        got = expect_parts(impl(given, p, *ends), "low", "high")
        expect_close(
            f"(low, high) of {probabilities}, p = {p}, from {ends}", list(got), list(expected), atol=0, rtol=1e-15
        )
        expect_equal("probabilities afterwards", given, list(probabilities))

    def test_by_hand(self, impl):
        """(.5, .25, .15, .1), p = .7: from (0, 1) to (0, .5), then (.25, .5), then (.25, .375)"""
        ends = (0.0, 1.0)
        for expected in ((0.0, 0.5), (0.25, 0.5), (0.25, 0.375)):
            self._is(impl, [0.5, 0.25, 0.15, 0.1], 0.7, ends, expected)
            ends = expected

    def test_equal(self, impl):
        """a token whose probability is the middle is kept, and exactly p is enough"""
        self._is(impl, [0.5, 0.25, 0.25], 0.5, (0.0, 1.0), (0.5, 1.0))
        self._is(impl, [0.125, 0.375, 0.5], 0.875, (0.25, 0.5), (0.375, 0.5))

    def test_order(self, impl):
        """the tokens may stand in any order"""
        self._is(impl, [0.1, 0.25, 0.5, 0.15], 0.7, (0.0, 0.5), (0.25, 0.5))

    def test_one(self, impl):
        """one token, and an interval that does not begin at 0"""
        self._is(impl, [1.0], 0.9, (0.5, 1.5), (1.0, 1.5))
        self._is(impl, [1.0], 0.9, (1.0, 1.5), (1.0, 1.25))

    def test_all_count(self, impl):
        """each token above the middle counts: several of one probability, and those above the interval, too"""
        self._is(impl, [0.25, 0.25, 0.25, 0.25], 0.9, (0.0, 0.5), (0.25, 0.5))
        self._is(impl, [0.25, 0.125, 0.25, 0.125, 0.25], 0.75, (0.125, 0.25), (0.1875, 0.25))
        self._is(impl, [0.75, 0.25 - 2.0**-14, 2.0**-14], 1.0, (0.0, 2.0**-12), (0.0, 2.0**-13))
        self._is(impl, [0.75, 0.1875, 0.0625], 0.8125, (0.125, 0.25), (0.1875, 0.25))

    def test_random(self, impl):
        """60 rows of 30 tokens, p close to what the middle keeps, above it and below"""
        for seed in range(60):
            chance = random.Random(seed)
            weights = [chance.random() ** 3 for _ in range(30)]
            row = [w / sum(weights) for w in weights]
            low, high = chance.choice([(0.0, 0.1), (0.01, 0.05), (0.02, 2.0)])
            middle = (low + high) / 2
            kept = math.fsum(x for x in row if x >= middle)
            self._is(impl, row, kept * (1 - 1e-9), (low, high), (middle, high))
            self._is(impl, row, kept * (1 + 1e-9) + 1e-12, (low, high), (low, middle))

    def test_narrow(self, impl):
        """an interval that is already narrow is halved like any other"""
        for low in (0.0, 0.25):
            self._is(impl, [0.5, 0.5], 0.75, (low, low + 2.0**-30), (low + 2.0**-31, low + 2.0**-30))


@exercise("3.w2", "whole_characters")
class TestWholeCharacters:
    def _is(self, impl, data, text, rest):
        got = expect_parts(impl(data), "text", "rest")
        expect_equal(f"(text, rest) of {data}", tuple(got), (text, rest))

    def test_by_hand(self, impl):
        """F0 9F is the beginning of an emoji: no text, and both bytes wait"""
        self._is(impl, b"\xf0\x9f", "", b"\xf0\x9f")

    def test_whole(self, impl):
        """what ends with a character leaves nothing"""
        for text in ("", "a", "é", "日本", "a🙂"):
            self._is(impl, text.encode(), text, b"")

    def test_unchanged(self, impl):
        """spaces, line ends, zeros, a byte-order mark and U+FFFD are characters like others"""
        for text in ("日e\u0301🙂 é" * 700, " a ", "a\r\nb\n", "\x00", "\ufeffa", "a\ufffd", "\ufffd\ufeff\t"):
            self._is(impl, text.encode(), text, b"")
            self._is(impl, text.encode() + b"\xe6\x97", text, b"\xe6\x97")
            self._is(impl, text.encode() + b"\xf0\x9f\x99", text, b"\xf0\x9f\x99")

    def test_everywhere(self, impl):
        """a text cut at any byte: all whole characters, and the one, two or three bytes of the next"""
        text = "aé日🙂b"
        data = text.encode()
        for cut in range(len(data) + 1):
            whole = next(n for n in range(len(text), -1, -1) if len(text[:n].encode()) <= cut)
            self._is(impl, data[:cut], text[:whole], data[len(text[:whole].encode()) : cut])


@exercise("3.w3", "over_all")
class TestOverAll:
    def _is(self, impl, means, counts, mean):
        given = list(means), list(counts)
        got, perplexity = expect_parts(impl(*given), "mean", "perplexity")
        expect_close(f"mean of {means} over {counts} tokens", got, mean, atol=1e-12, rtol=1e-12)
        what = f"perplexity of {means} over {counts} tokens"
        expect_close(what, perplexity, math.exp(mean), atol=0, rtol=1e-9)
        expect_equal("the lists afterwards", [repr(x) for x in given], [repr(list(means)), repr(list(counts))])

    def test_one(self, impl):
        """one text: its own mean, and e to the power of it"""
        self._is(impl, [math.log(8)], [20], math.log(8))

    def test_two(self, impl):
        """9 tokens of 1 nat and 1 token of 11: 2 nats a token, not 6"""
        self._is(impl, [1.0, 11.0], [9, 1], 2.0)

    def test_several(self, impl):
        """three texts of different lengths"""
        self._is(impl, [2.0, 3.0, 0.5], [10, 30, 60], 1.4)

    def test_empty(self, impl):
        """a text without tokens has a mean of NaN, and takes no part"""
        self._is(impl, [2.0, math.nan, 4.0], [1, 0, 3], 3.5)
        self._is(impl, [math.nan, 2.0, math.nan, math.nan], [0, 5, 0, 0], 2.0)

    def test_nothing_lost(self, impl):
        """a text that the model knew by heart has a mean of 0, and its tokens count; so does a text of one token"""
        self._is(impl, [0.0, 4.0], [3, 1], 1.0)
        self._is(impl, [0.0, 0.0], [3, 1], 0.0)
        self._is(impl, [6.0, 1.0, 2.0], [1, 1, 2], 2.75)
        self._is(impl, [0.3, 100.0, 60.0], [1, 3 * 10**12, 10**12], (0.3 + 360e12) / (4 * 10**12 + 1))


STREAM = torch.tensor([random.Random(i).randrange(7) for i in range(40)])


def losses_of(got: object, steps: int) -> list[float]:
    """`got`, after holding that it is a list of as many floats as there were steps."""
    expect(isinstance(got, list | tuple), f"expected a list of losses\n  got      {type(got).__name__}")
    expect_equal("number of losses", len(got), steps)
    for loss in got:
        expect(isinstance(loss, float), f"a loss: expected a float\n  got      {type(loss).__name__}")
    return list(got)


@exercise("3.0", "train")
class TestTrain:
    def _expected(self, steps, batch, window, lr, seed, ids=STREAM, scale=1.0):
        """Losses and model, one prediction at a time."""
        model, generator, losses = Toy(scale=scale), torch.Generator().manual_seed(seed), []
        for _ in range(steps):
            starts = torch.randint(len(ids) - window, (batch,), generator=generator).tolist()
            terms = []
            for start in starts:
                for i in range(start, start + window):
                    scores = model(ids[None, start : i + 1])[0, -1]
                    terms.append(scores.logsumexp(0) - scores[ids[i + 1]])
            loss = torch.stack(terms).mean()
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter -= lr * gradient
            losses.append(loss.item())
        return losses, model

    def _same(self, impl, steps=3, batch=4, window=5, lr=0.5, seed=0, ids=STREAM, scale=1.0, atol=1e-4):
        losses, expected = self._expected(steps, batch, window, lr, seed, ids, scale)
        model, given = Toy(scale=scale), ids.clone()
        optimizer = PlainSGD(model.parameters(), lr=lr)
        got = impl(model, optimizer, given, steps, batch, window, torch.Generator().manual_seed(seed))
        expect_close("losses, each before its step", losses_of(got, steps), losses, atol=atol)
        expect_close(f"embed after {steps} steps", model.embed, expected.embed, atol=atol)
        expect_close(f"head after {steps} steps", model.head, expected.head, atol=atol)
        expect(torch.equal(given, ids), "token_ids was changed")
        return optimizer

    def test_targets(self, impl):
        """a window's targets are the tokens one place further, the last one included"""
        model, ids = NextNumber(), torch.arange(60) % 9
        got = impl(model, PlainSGD(model.parameters(), lr=0.0), ids, 1, 4, 5, torch.Generator().manual_seed(0))
        expect_shift(losses_of(got, 1)[0], "loss on 0, 1, 2, ...")

    def test_windows(self, impl):
        """each step draws `batch` windows of `window` tokens with the generator, and shows them to the model at once"""
        shown = []

        class Watching(Toy):
            def forward(self, token_ids):
                expect_equal("dtype given to the model", token_ids.dtype, torch.int64)
                shown.append(token_ids.tolist())
                return super().forward(token_ids)

        for count, batch in ((40, 4), (9, 8), (8, 8), (40, 1)):
            shown.clear()
            model, generator = Watching(), torch.Generator().manual_seed(7)
            optimizer = PlainSGD(model.parameters(), lr=0.1)
            impl(model, optimizer, STREAM[:count].clone(), 3, batch, 6, torch.Generator().manual_seed(7))
            expect_equal(f"calls of the model in 3 steps on {count} tokens", len(shown), 3)
            for step, rows in enumerate(shown):
                starts = torch.randint(count - 6, (batch,), generator=generator).tolist()
                expected = [STREAM[a : a + 6].tolist() for a in starts]
                expect_equal(f"inputs of step {step} on {count} tokens", rows, expected)

    def test_one_step(self, impl):
        """the loss is the mean over all batch · window predictions; the parameters move against its gradient"""
        self._same(impl, steps=1)
        self._same(impl, steps=1, batch=1)
        self._same(impl, steps=1, window=1)

    def test_several_steps(self, impl):
        """three steps: each along its own batch's gradient alone"""
        optimizer = self._same(impl)
        expect_equal("steps of the optimizer", optimizer.steps, 3)
        self._same(impl, steps=4, batch=2, window=7, seed=3)
        self._same(impl, steps=9, batch=11, window=12, lr=0.1, seed=4)
        before = torch.get_rng_state()
        self._same(impl, steps=2)
        expect(torch.equal(torch.get_rng_state(), before), "torch's own generator was used or seeded; draw with yours")

    def test_whole_stream(self, impl):
        """a stream of window + 1 tokens has one window"""
        self._same(impl, steps=2, batch=3, window=5, ids=STREAM[:6])

    def test_no_clipping(self, impl):
        """a large gradient is used as it is"""
        self._same(impl, steps=2, scale=8.0, lr=0.05, atol=1e-3)
        self._same(impl, steps=1, scale=4000.0, lr=0.001, atol=1e-2)

    def test_rising(self, impl):
        """where the loss rises, here with a rate below 0, all steps are taken all the same"""
        self._same(impl, steps=5, lr=-1.0, atol=1e-3)

    def test_gradient_before(self, impl):
        """what stood in .grad before the call takes no part, in whichever group of the optimizer"""
        _, expected = self._expected(2, 4, 5, 0.5, 0)
        model = Toy()
        optimizer = with_old_gradients(model, 0.5)
        impl(model, optimizer, STREAM.clone(), 2, 4, 5, torch.Generator().manual_seed(0))
        expect_close("embed after two steps", model.embed, expected.embed, atol=1e-4)
        expect_close("head after two steps", model.head, expected.head, atol=1e-4)
        expect_close("learning rates afterwards", [group["lr"] for group in optimizer.param_groups], [0.5, 0.5])

    def test_gaps(self, impl):
        """a score 300 below the largest has the loss 300, not infinity"""
        model = nn.Embedding(7, 7)
        nn.init.zeros_(model.weight)
        model.weight.data[:, 3] = 300.0
        ids = torch.tensor([3, 1, 3, 1, 2])
        got = impl(model, PlainSGD(model.parameters(), lr=0.0), ids, 1, 2, 4, torch.Generator().manual_seed(0))
        expect_close("losses", losses_of(got, 1), [225.0], atol=1e-3)

    def test_floats(self, impl):
        """the losses are Python floats, so that keeping them does not keep the graphs; none for no step"""
        model = Toy()
        optimizer = PlainSGD(model.parameters(), lr=0.1)
        for steps in (2, 0):
            got = impl(model, optimizer, STREAM.clone(), steps, 2, 4, torch.Generator().manual_seed(0))
            losses_of(got, steps)

    def test_learns(self, impl):
        """200 steps on a text that counts up: the loss is near 0"""
        model, ids = Toy(), torch.arange(80) % 7
        optimizer = PlainSGD(model.parameters(), lr=2.0)
        got = impl(model, optimizer, ids, 200, 8, 1, torch.Generator().manual_seed(0))
        expect_close("learning rate after 200 steps", optimizer.param_groups[0]["lr"], 2.0, rtol=0)
        expect(losses_of(got, 200)[-1] < 0.1, f"loss of the last of 200 steps: expected under 0.1\n  got {got[-1]:.3f}")


@exercise("3.1", "learn_merges")
class TestLearnMerges:
    def test_by_hand(self, impl):
        """low 3 times and lower once: first l+o (4 times, before o+w of the same count), then lo+w, then e+r"""
        got = pairs_of(impl({"low": 3, "lower": 1}, 3))
        expect_equal("merges", got, [(b"l", b"o"), (b"lo", b"w"), (b"e", b"r")])

    def test_counts_weigh(self, impl):
        """a word that occurs often counts as often"""
        expect_equal("first merge", pairs_of(impl({"ab": 1, "cab": 1, "xy": 5}, 1)), [(b"x", b"y")])

    def test_words_stay(self, impl):
        """word_counts stays as it is"""
        for words in ({"low": 3, "lower": 1}, {"ab": 1}, {"aaaa": 2, "": 1}):
            before = dict(words)
            impl(words, 3)
            expect_equal("word_counts afterwards", list(words.items()), list(before.items()))

    def test_ties(self, impl):
        """of equal counts the smallest pair wins, whatever the order of the words"""
        for words in ({"zy": 2, "ab": 2, "ba": 2}, {"ba": 2, "zy": 2, "ab": 2}):
            expect_equal("merges", pairs_of(impl(words, 3)), [(b"a", b"b"), (b"b", b"a"), (b"z", b"y")])

    def test_ties_of_tuples(self, impl):
        """pairs are compared as tuples of bytes: (a, d) before (ab, c), and (ab, c) before (b, x)"""
        got = pairs_of(impl({"ab": 5, "abc": 2, "ad": 2}, 2))
        expect_equal("merges", got, [(b"a", b"b"), (b"a", b"d")])
        got = pairs_of(impl({"ab": 5, "bx": 2, "abc": 2}, 2))
        expect_equal("merges", got, [(b"a", b"b"), (b"ab", b"c")])

    def test_overlap_counts(self, impl):
        """aaa twice and bc 3 times: a+a comes first, since overlapping pairs count and it occurs 4 times"""
        got = pairs_of(impl({"aaa": 2, "bc": 3}, 3))
        expect_equal("merges", got, [(b"a", b"a"), (b"b", b"c"), (b"aa", b"a")])
        expect_equal("first merge", pairs_of(impl({"xyxy": 2, "bc": 3}, 1)), [(b"x", b"y")])

    def test_overlap_joins(self, impl):
        """a a a a a becomes aa aa a, from left to right; then aa+a, which is smaller than aa+aa, and the rest"""
        got = pairs_of(impl({"aaaaa": 1}, 3))
        expect_equal("merges", got, [(b"a", b"a"), (b"aa", b"a"), (b"aa", b"aaa")])

    def test_bytes(self, impl):
        """symbols are bytes: é is two of them, and they are joined like any others"""
        expect_equal("merges", pairs_of(impl({"é": 2, "ab": 1}, 1)), [(b"\xc3", b"\xa9")])

    def test_stops(self, impl):
        """when every word is one symbol there is nothing left to join"""
        expect_equal("merges", pairs_of(impl({"ab": 1, "c": 4}, 10)), [(b"a", b"b")])
        expect_equal("no words", pairs_of(impl({}, 3)), [])
        expect_equal("words of one letter and of none", pairs_of(impl({"a": 3, "": 2}, 3)), [])
        expect_equal("no merges", pairs_of(impl({"ab": 1}, 0)), [])

    def test_min_count(self, impl):
        """it stops when the most frequent pair occurs fewer than min_count times, and not when just as often"""
        words = {"ab": 3, "cab": 2, "xy": 4, "uv": 1}
        for least, count in ((5, 1), (4, 2), (3, 2), (2, 3), (1, 4), (6, 0)):
            expected = [(b"a", b"b"), (b"x", b"y"), (b"c", b"ab"), (b"u", b"v")][:count]
            expect_equal(f"merges with min_count={least}", pairs_of(impl(words, 9, least)), expected)

    def test_min_count_is_of_pairs(self, impl):
        """min_count is about pairs: one that stands in three rare words is frequent"""
        got = pairs_of(impl({"abc": 1, "dab": 1, "eab": 1}, 9, min_count=3))
        expect_equal("merges with min_count=3", got, [(b"a", b"b")])

    def test_text(self, impl):
        """on real text it is as if every word stood in the list as often as it occurs"""
        words = words_of(SENTENCES)
        before = dict(words)
        expect_equal("merges", pairs_of(impl(words, 40)), plain_merges(words, 40))
        expect_equal("merges with min_count=4", pairs_of(impl(words, 60, 4)), plain_merges(words, 60, 4))
        expect_equal("word_counts afterwards", words, before)

    def test_large(self, impl):
        """150 words, counts of thousands, tokens of many bytes, words with zeros and capitals"""
        chance = random.Random(8)
        words = {
            "".join(chance.choices("aAbB\x00é", k=chance.randint(2, 4))): chance.randint(1, 12) for _ in range(150)
        }
        many = {word: 1000 * count for word, count in words.items()}
        expect_equal("merges", pairs_of(impl(many, 15)), plain_merges(words, 15))
        long = {"abcdefghijklmnopqrst": 2, "xabcdefghijklmnopqrst": 1}
        expect_equal("merges of long words", pairs_of(impl(long, 30)), plain_merges(long, 30))


TABLE = {pair: rank for rank, pair in enumerate(plain_merges(words_of(SENTENCES), 120))}


def plain_encode(word: str, table: dict[tuple[bytes, bytes], int]) -> tuple[list[bytes], list[int]]:
    """Apply each merge in turn, everywhere, and count what became shorter: the same for tables that were learned."""
    symbols, ranks = tuple(bytes([b]) for b in word.encode()), []
    for pair in sorted(table, key=table.get):
        after = joined(symbols, pair)
        ranks += [table[pair]] * (len(symbols) - len(after))
        symbols = after
    return list(symbols), ranks


@exercise("3.2", "encode_word")
class TestEncodeWord:
    def _same(self, impl, word, table, tokens, ranks=None):
        got_tokens, got_ranks = expect_parts(impl(word, table), "tokens", "ranks")
        expect_equal(f"tokens of {word!r}", got_tokens, tokens)
        if ranks is not None:
            expect_equal(f"ranks of {word!r}", got_ranks, ranks)

    def test_by_hand(self, impl):
        """lowest with l+o, lo+w, e+s gives low, es, t by the ranks 0, 1, 2"""
        table = {(b"l", b"o"): 0, (b"lo", b"w"): 1, (b"e", b"s"): 2}
        self._same(impl, "lowest", table, [b"low", b"es", b"t"], [0, 1, 2])

    def test_long_tokens(self, impl):
        """tokens have any length: 2, 4, ..., 64 bytes"""
        table = {(b"a" * 2**i, b"a" * 2**i): i for i in range(6)}
        ranks = [i for i in range(6) for _ in range(2 ** (6 - i))]
        self._same(impl, "a" * 128, table, [b"a" * 64] * 2, ranks)

    def test_rank_decides(self, impl):
        """the smallest rank is joined first, not the leftmost pair and not the longest token"""
        table = {(b"b", b"c"): 0, (b"a", b"b"): 1, (b"ab", b"c"): 2}
        self._same(impl, "abc", table, [b"a", b"bc"])
        table = {(b"a", b"b"): 0, (b"c", b"d"): 1, (b"b", b"c"): 2, (b"bc", b"d"): 3}
        self._same(impl, "abcd", table, [b"ab", b"cd"])

    def test_leftmost(self, impl):
        """of equal ranks the leftmost: aaa is aa a"""
        self._same(impl, "aaa", {(b"a", b"a"): 0}, [b"aa", b"a"])
        self._same(impl, "aaaaa", {(b"a", b"a"): 0, (b"aa", b"aa"): 1}, [b"aaaa", b"a"])

    def test_ranks(self, impl):
        """ranks of the joins in the order made: a rank a join, also when one pair is joined twice"""
        table = {(b"c", b"d"): 3, (b"a", b"b"): 5, (b"ab", b"cd"): 8}
        self._same(impl, "abcd", table, [b"abcd"], [3, 5, 8])
        self._same(impl, "abcdab", table, [b"abcd", b"ab"], [3, 5, 5, 8])
        self._same(impl, "aaaaa", {(b"a", b"a"): 0, (b"aa", b"aa"): 1}, [b"aaaa", b"a"], [0, 0, 1])

    def test_order_of_the_table(self, impl):
        """ranks count, not the order in which the dictionary holds them"""
        shuffled = list(TABLE.items())
        random.Random(3).shuffle(shuffled)
        for word in (" collections", " separated", "similar"):
            self._same(impl, word, dict(shuffled), *plain_encode(word, TABLE))

    def test_bytes(self, impl):
        """without merges a word is its UTF-8 bytes, and no rank is used"""
        self._same(impl, "né", {}, [b"n", b"\xc3", b"\xa9"], [])
        self._same(impl, "", {(b"a", b"b"): 0}, [], [])

    def test_text(self, impl):
        """on real words it equals applying every merge in turn, and nothing is lost"""
        table = dict(TABLE)
        differ = (" collected", " denoted", " between")  # where the longest token first makes another cut
        for word in [*words_of(SENTENCES), "constructions", "listless", "🙂🙂🙂", *differ]:
            expected = plain_encode(word, TABLE)
            tokens, ranks = expect_parts(impl(word, table), "tokens", "ranks")
            expect_equal(f"tokens of {word!r}", tokens, expected[0])
            expect_equal(f"ranks of {word!r}", ranks, expected[1])
            expect_equal(f"bytes of {word!r}", b"".join(tokens), word.encode())
        expect_equal("the table afterwards", table, TABLE)


PAD = 0


class Toy(nn.Module):
    """Logits of the next token from the running mean of embeddings: causal, differentiable, tiny."""

    def __init__(self, vocab: int = 7, width: int = 5, scale: float = 1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Parameter(scale * torch.randn(vocab, width, generator=generator))
        self.head = nn.Parameter(torch.randn(width, vocab, generator=generator))

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        seen = torch.arange(1, token_ids.shape[1] + 1)[None, :, None]
        return (self.embed[token_ids].cumsum(1) / seen) @ self.head  # [B, T, V]


class InPieces(Toy):
    """A toy that refuses more than `rows` rows at once, and rows before the last ones have been through backward."""

    def __init__(self, rows: int):
        super().__init__()
        self.rows, self.seen, self.waiting = rows, 0, False
        self.shown: list[torch.Tensor] = []
        self.calls: list[int] = []

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        rows = len(token_ids)
        self.shown += token_ids.detach().clone()
        self.calls.append(rows)
        expect(rows <= self.rows, f"rows given to the model: expected at most {self.rows} at once\n  got {rows}")
        expect(not self.waiting, "expected backward of each part before the next part's forward\n  got two forwards")
        logits = super().forward(token_ids)
        self.seen += rows
        if logits.requires_grad:
            self.waiting = True
            logits.register_hook(self._went_back)
        return logits

    def _went_back(self, gradient: torch.Tensor) -> None:
        self.waiting = False


class PlainSGD:
    """What an optimizer is to a training step. torch.optim would import its compiler first, for seconds."""

    def __init__(self, parameters, lr: float):
        self.param_groups, self.steps = [{"params": list(parameters), "lr": lr}], 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None if set_to_none else torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        if closure is not None:
            with torch.enable_grad():
                closure()
        self.steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter -= group["lr"] * parameter.grad


def with_old_gradients(model: nn.Module, lr: float) -> PlainSGD:
    """An optimizer of two groups, whose parameters have gradients left over."""
    optimizer = PlainSGD(model.parameters(), lr)
    optimizer.param_groups = [{"params": [parameter], "lr": lr} for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 10.0)
    return optimizer


def plain_loss(model: nn.Module, batch: torch.Tensor, pad: int = PAD) -> torch.Tensor:
    """Mean of -ln p(next token) over real targets, one prediction at a time."""
    losses = []
    for row in batch:
        for t in range(1, len(row)):
            if row[t] != pad:
                scores = model(row[None, :t])[0, -1]
                losses.append(scores.logsumexp(0) - scores[row[t]])
    return torch.stack(losses).mean()


BATCH = torch.tensor([[3, 1, 4, 1, 5, 2], [2, 6, 5, 3, PAD, PAD], [5, 4, PAD, PAD, PAD, PAD], [1, 6, 2, PAD, PAD, PAD]])


class NextNumber(nn.Module):
    """Nearly sure that each token is followed by the next number: logits 20 for it, 0 for the others."""

    def __init__(self, vocab: int = 9):
        super().__init__()
        self.vocab, self.weight = vocab, nn.Parameter(torch.tensor(20.0))

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.weight * nn.functional.one_hot((token_ids + 1) % self.vocab, self.vocab)  # [B, T, V]


def expect_shift(got: object, what: str) -> None:
    """Hold that the loss of NextNumber on numbers that count up is 0; another one says that targets are not shifted."""
    small = isinstance(got, float) and abs(got) < 1e-3
    if not small and isinstance(got, float):
        raise ContractError(
            f"{what}: expected 0, for the model is sure of each next token\n{'':{len(what)}}  got      {got:.4g}\n"
            "is the target of a position the token after it, and the last position without one?"
        )
    expect_close(what, got, 0.0, atol=1e-3)


@exercise("3.3", "training_step")
class TestTrainingStep:
    def _same(self, impl, batch, pieces, scale=1.0):
        """Loss and parameters after one step, against the whole batch in one go."""
        model, expected = Toy(scale=scale), Toy(scale=scale)
        loss = plain_loss(expected, batch)
        loss.backward()
        given = batch.clone()
        got = impl(model, PlainSGD(model.parameters(), lr=0.5), given, PAD, pieces)
        expect_close(f"loss before the step, pieces={pieces}", got, loss.item(), atol=1e-5)
        for (name, after), want in zip(model.named_parameters(), expected.parameters(), strict=True):
            what = f"{name} after a step with lr=0.5, pieces={pieces}"
            expect_close(what, after, want - 0.5 * want.grad, atol=1e-5 * scale)
        expect(torch.equal(given, batch), "the batch was changed")

    def test_targets(self, impl):
        """each position's target is the token after it, and the last position has none"""
        for batch in (torch.tensor([[2, 3, 4, 5, 6]]), torch.tensor([[1, 2, 3, PAD], [4, 5, 6, 7]])):
            model = NextNumber()
            expect_shift(impl(model, PlainSGD(model.parameters(), lr=0.0), batch, PAD), "loss on 2, 3, 4, ...")

    def test_loss(self, impl):
        """the loss is the mean of -ln p of each next token"""
        model = Toy()
        expected = plain_loss(model, BATCH[:1]).item()
        got = impl(model, PlainSGD(model.parameters(), lr=0.0), BATCH[:1].clone(), PAD)
        expect_close("loss without padding", got, expected, atol=1e-5)

    def test_padding(self, impl):
        """padding is no target: neither in the sum nor in the number it is divided by"""
        model = Toy()
        expected = plain_loss(model, BATCH).item()
        got = impl(model, PlainSGD(model.parameters(), lr=0.0), BATCH.clone(), PAD)
        expect_close("loss with padding", got, expected, atol=1e-5)

    def test_another_pad(self, impl):
        """pad_id is an argument: token 0 counts when it is not the padding"""
        model = Toy()
        batch = torch.where(BATCH == PAD, 6, torch.where(BATCH == 6, PAD, BATCH))
        expected = plain_loss(model, batch, pad=6).item()
        for pieces in (1, 2):
            got = impl(model, PlainSGD(model.parameters(), lr=0.0), batch.clone(), 6, pieces)
            expect_close(f"loss with pad_id=6, pieces={pieces}", got, expected, atol=1e-5)

    def test_float(self, impl):
        """the loss is a Python float, so that keeping it does not keep the whole graph"""
        model = Toy()
        for pieces in (1, 2):
            got = impl(model, PlainSGD(model.parameters(), lr=0.0), BATCH.clone(), PAD, pieces)
            expect(isinstance(got, float), f"return value: expected a float\n  got {type(got).__name__}")

    def test_step(self, impl):
        """the optimizer steps along this batch's gradient, and the loss is that before the step"""
        self._same(impl, BATCH, 1)

    def test_pieces(self, impl):
        """pieces change nothing: loss and gradient are those of the mean over all targets of the batch"""
        self._same(impl, BATCH, 2)
        self._same(impl, BATCH, 4)
        self._same(impl, torch.cat([BATCH, BATCH.flip(0)[:2]]), 3)

    def test_sizes(self, impl):
        """24 rows of 15 tokens in 1, 8, 12 and 24 pieces; rates and batch stay"""
        lengths = [random.Random(i).randint(1, 15) for i in range(24)]
        batch = torch.zeros(24, 15, dtype=torch.int64)
        for i, length in enumerate(lengths):
            batch[i, :length] = torch.tensor([random.Random(100 * i + j).randint(1, 6) for j in range(length)])
        for pieces in (1, 8, 12, 24):
            self._same(impl, batch, pieces)
        model = InPieces(3)
        optimizer = PlainSGD(model.parameters(), lr=0.5)
        impl(model, optimizer, batch, PAD, 8)
        expect_equal("rows of each call of the model, 24 in 8 pieces", model.calls, [3] * 8)
        expect_close("learning rate after the step", optimizer.param_groups[0]["lr"], 0.5, rtol=0)

    def test_no_targets(self, impl):
        """a part without a single target adds nothing"""
        batch = torch.tensor([[3, 1, 4, 1], [5, 2, PAD, PAD], [6, PAD, PAD, PAD], [2, PAD, PAD, PAD]])
        self._same(impl, batch, 2)
        self._same(impl, batch, 4)

    def test_one_step(self, impl):
        """one step of the optimizer, however many pieces"""
        for pieces in (1, 2, 4):
            model = Toy()
            optimizer = PlainSGD(model.parameters(), lr=0.5)
            impl(model, optimizer, BATCH.clone(), PAD, pieces)
            expect_equal(f"steps of the optimizer, pieces={pieces}", optimizer.steps, 1)

    def test_memory(self, impl):
        """the model sees B / pieces rows at once, and each part is through backward before the next one enters"""
        for pieces in (1, 2, 4):
            model = InPieces(4 // pieces)
            impl(model, PlainSGD(model.parameters(), lr=0.5), BATCH.clone(), PAD, pieces)
            expect_equal(f"rows of each call of the model, pieces={pieces}", model.calls, [4 // pieces] * pieces)
            expect(model.seen >= 4, f"rows given to the model: expected all 4\n  got {model.seen}")
            rows = [row[: BATCH.shape[1] - 1].tolist() for row in model.shown]
            expect_equal(f"rows given to the model in turn, pieces={pieces}", rows, BATCH[:, :-1].tolist())

    def test_no_clipping(self, impl):
        """a large gradient is used as it is"""
        self._same(impl, BATCH, 1, scale=8.0)
        self._same(impl, BATCH, 2, scale=8.0)
        self._same(impl, BATCH, 1, scale=4000.0)

    def test_gaps(self, impl):
        """a score 300 below the largest has the loss 300, not infinity"""
        scores = torch.tensor([0.0, 300.0, 0.0, 0.0, 0.0])
        for pieces, batch in ((1, torch.tensor([[1, 2, 3, 1]])), (2, torch.tensor([[1, 2, 3, 1], [4, 1, 1, PAD]]))):
            model = nn.Embedding(5, 5)
            nn.init.zeros_(model.weight)
            model.weight.data += scores
            expected = plain_loss(model, batch).item()
            got = impl(model, PlainSGD(model.parameters(), lr=0.0), batch, PAD, pieces)
            expect_close(f"loss, pieces={pieces}", got, expected, atol=1e-3)

    def test_empty_row(self, impl):
        """a row that is padding alone has no targets, and takes none from the others"""
        batch = torch.tensor([[3, 1, 4, 1], [PAD, PAD, PAD, PAD], [2, 5, PAD, PAD]])
        self._same(impl, batch, 1)
        self._same(impl, batch, 3)

    def test_gradient_before(self, impl):
        """what stood in .grad before the call takes no part in the step"""
        for pieces in (1, 2, 4):
            model, expected = Toy(), Toy()
            impl(model, with_old_gradients(model, 0.5), BATCH.clone(), PAD, pieces)
            plain_loss(expected, BATCH).backward()
            for name in ("embed", "head"):
                after, want = getattr(model, name), getattr(expected, name)
                what = f"{name} after the step, pieces={pieces}"
                expect_close(what, after, want - 0.5 * want.grad, atol=1e-5)

    def test_two_steps(self, impl):
        """the second step forgets the first one's gradient"""
        model, expected = Toy(), Toy()
        optimizer = PlainSGD(model.parameters(), lr=0.5)
        for rows in (BATCH[:2], BATCH[2:]):
            impl(model, optimizer, rows.clone(), PAD, 2)
            gradients = torch.autograd.grad(plain_loss(expected, rows), list(expected.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(expected.parameters(), gradients, strict=True):
                    parameter -= 0.5 * gradient
        expect_close("embed after two steps", model.embed, expected.embed, atol=1e-5)

    def test_learns(self, impl):
        """40 steps on one batch bring the loss down"""
        model = Toy()
        optimizer = PlainSGD(model.parameters(), lr=1.0)
        losses = [impl(model, optimizer, BATCH.clone(), PAD, 2) for _ in range(40)]
        expect(all(isinstance(loss, float) for loss in losses), "return value: expected a float")
        expect(
            losses[-1] < losses[0] / 2,
            f"loss after 40 steps: expected under {losses[0] / 2:.3f}\n  got {losses[-1]:.3f}",
        )


def tensor_of(what: str, got: object) -> torch.Tensor:
    """`got`, after holding that it is a tensor."""
    found = "nothing (is a `return` missing?)" if got is None else type(got).__name__
    expect(isinstance(got, torch.Tensor), f"{what}: expected a tensor\n{'':{len(what)}}  got      {found}")
    return got


def plain_losses(token_ids: list[int], window: int, stride: int) -> list[float]:
    """Score each token by the first window that predicts it, one forward pass a token."""
    model, losses = Toy(), []
    for target in range(1, len(token_ids)):
        begin = next(b for b in range(0, len(token_ids), stride) if b + window >= target)
        with torch.no_grad():
            scores = model(torch.tensor([token_ids[begin:target]]))[0, -1].double()
        losses.append((scores.logsumexp(-1) - scores[token_ids[target]]).item())
    return losses


class Watched(Toy):
    """A toy that refuses windows it could not hold."""

    def __init__(self, window: int):
        super().__init__()
        self.window, self.calls = window, 0

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        shape = tuple(token_ids.shape)
        right = len(shape) == 2 and shape[0] == 1 and 1 <= shape[1] <= self.window
        expect(right, f"shape given to the model: expected [1, T] with 1 <= T <= {self.window}\n  got {list(shape)}")
        expect_equal("dtype given to the model", token_ids.dtype, torch.int64)
        self.calls += 1
        return super().forward(token_ids)


def tokens(count: int, seed: int = 0) -> list[int]:
    return [random.Random(seed * 1000 + i).randrange(7) for i in range(count)]


@exercise("3.4", "token_losses")
class TestTokenLosses:
    def _same(self, impl, count, window, stride):
        """The vector, then the perplexity that follows from it."""
        case = f"{count} tokens, window {window}, stride {stride}"
        expected = plain_losses(tokens(count), window, stride)
        got = tensor_of(f"losses of {case}", impl(Watched(window), tokens(count), window, stride))
        expect_equal(f"number of losses of {case}", tuple(got.shape), (count - 1,))
        expect_close(f"losses of {case}", got, expected, atol=1e-5)
        perplexity = math.exp(sum(expected) / len(expected))
        expect_close(f"perplexity of {case}, exp of the mean", got.mean().exp(), perplexity, rtol=1e-4)

    def test_uniform(self, impl):
        """a model that knows nothing about V tokens has the loss ln V everywhere"""
        got = impl(lambda ids: torch.zeros(1, ids.shape[1], 50), tokens(30), 8, 8)
        expect_close("losses", got, [math.log(50)] * 29, atol=1e-5)

    def test_one_window(self, impl):
        """a text that fits into the window is scored in one go, its first token excepted"""
        self._same(impl, 20, 64, 64)

    def test_windows_side_by_side(self, impl):
        """stride = window: no token is left out between two windows, and the tail counts"""
        for count in (17, 20, 25, 26):
            self._same(impl, count, 8, 8)

    def test_overlapping_windows(self, impl):
        """a smaller stride gives context: each token is scored once, by the first window that predicts it"""
        for window, stride in ((8, 4), (8, 3), (8, 1), (5, 2)):
            self._same(impl, 41, window, stride)

    def test_long(self, impl):
        """400 tokens"""
        self._same(impl, 400, 16, 11)

    def test_short(self, impl):
        """two tokens make one prediction; windows of one token predict one each"""
        self._same(impl, 2, 8, 4)
        self._same(impl, 2, 1, 1)
        self._same(impl, 9, 1, 1)

    def test_no_needless_windows(self, impl):
        """it stops when the last token is scored"""
        for stride, calls in ((2, 5), (1, 9), (8, 2)):
            model = Watched(8)
            impl(model, tokens(17), 8, stride)
            expect_equal(f"windows shown for 17 tokens, window 8, stride {stride}", model.calls, calls)
        for count, window, stride in ((17, 32, 2), (17, 17, 1), (17, 16, 1), (2, 8, 1), (2, 1, 1)):
            model = Watched(window)
            impl(model, tokens(count), window, stride)
            expect_equal(f"windows shown for {count} tokens, window {window}, stride {stride}", model.calls, 1)

    def test_float32(self, impl):
        """float32 without a graph; logits in bfloat16 are made float32 before the softmax"""
        got = tensor_of("losses", impl(Toy(), tokens(20), 8, 4))
        expect_equal("dtype of the losses", got.dtype, torch.float32)
        expect(not got.requires_grad, "the losses keep a graph, and with it every window's activations")
        scores = torch.tensor([2.0, 1.0, 0.5, -1.0, 3.0, 0.25, -2.0])
        got = tensor_of("losses", impl(lambda ids: scores.bfloat16().expand(1, ids.shape[1], 7), tokens(20), 8, 4))
        expect_equal("dtype of the losses from bfloat16 logits", got.dtype, torch.float32)
        expected = [(scores.logsumexp(0) - scores[i]).item() for i in tokens(20)[1:]]
        expect_close("losses from bfloat16 logits", got, expected, atol=1e-5)
        got = tensor_of("losses", impl(lambda ids: scores.double().expand(1, ids.shape[1], 7), tokens(20), 8, 4))
        expect_equal("dtype of the losses from float64 logits", got.dtype, torch.float32)

    def test_gaps(self, impl):
        """a score 300 below the largest has the loss 300, not infinity"""
        for dtype in (torch.float32, torch.bfloat16):
            scores = torch.tensor([0.0, 300.0, -300.0, 0.0, 0.0, 0.0, 0.0], dtype=dtype)
            got = impl(lambda ids, s=scores: s.expand(1, ids.shape[1], 7), [1, 1, 0, 2, 1, 4], 4, 2)
            expect_close("losses of scores 300 and 600 below the largest", got, [0, 300, 600, 0, 300], atol=1e-3)
        scores = torch.tensor([0.0, -math.inf, 0.0])
        got = impl(lambda ids: scores.expand(1, ids.shape[1], 3), [0, 0, 1, 2], 2, 1)
        expect_close("losses where token 1 has the score -∞", got, [math.log(2), math.inf, math.log(2)], atol=1e-5)

    def test_inputs(self, impl):
        """the list of tokens stays as it was"""
        for count in (20, 3, 2):
            ids = tokens(count)
            impl(Toy(), ids, 8, 4)
            expect_equal("token_ids afterwards", ids, tokens(count))
            expect(torch.is_grad_enabled(), "gradients are off after the call: expected `with torch.no_grad():`")


def plain_nucleus(row: list[float], p: float) -> list[int]:
    """Ids of the smallest set by its definition: sorted and added up in fp64. For rows without equal logits."""
    total, weights = math.fsum(map(math.exp, row)), {i: math.exp(x) for i, x in enumerate(row)}
    kept, mass = [], 0.0
    for i in sorted(weights, key=lambda i: -row[i]):
        if mass >= p:
            break
        kept.append(i)
        mass += weights[i] / total
    return sorted(kept)


def ids_kept(what: str, got: object, logits: torch.Tensor) -> list[list[int]]:
    """The ids that stay in each row, after holding shape and values."""
    got = tensor_of(what, got)
    expect_equal(f"{what}: shape", tuple(got.shape), tuple(logits.shape))
    stays = got > float("-inf")
    expect_close(f"{what}: logits that stay", got[stays], logits[stays], atol=0, rtol=0)
    return [row.nonzero().flatten().tolist() for row in stays]


SORTS = [
    *((torch, name) for name in ("sort", "argsort", "msort", "topk", "kthvalue", "unique")),
    *((torch.Tensor, name) for name in ("sort", "argsort", "msort", "topk", "kthvalue", "unique")),
    *((np, name) for name in ("sort", "argsort", "partition", "argpartition", "unique", "lexsort")),
    *((bisect, name) for name in ("insort", "insort_left", "insort_right")),
    *((heapq, name) for name in ("nlargest", "nsmallest", "heapify", "heappush", "heappop")),
    (builtins, "sorted"),
]


def sorts_in(impl: object) -> set[str]:
    """Names in an implementation's source that sort: of what cannot be caught when it is called, as `list.sort`."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(impl)))
    except (OSError, TypeError, SyntaxError):
        return set()
    called = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    names = {node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "") for node in called}
    return names & {"sort", "sorted", *(name for _, name in SORTS)}


def refuse(name: str):
    def refused(*_args, **_kwargs):
        raise ContractError(f"expected a search for the threshold\n  got      a call of {name}, which sorts")

    return refused


@exercise("3.5", "keep_top_p")
class TestKeepTopP:
    def test_by_hand(self, impl):
        """of .1 .5 .15 .25, p = .7 keeps .5 and .25: together .75, and .5 alone is not enough"""
        logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
        expect_equal("ids that stay", ids_kept("p = 0.7", impl(logits, 0.7), logits), [[1, 3]])

    def test_best_stays(self, impl):
        """the likeliest token stays, also when it alone has more than p, be it next to nothing"""
        logits = torch.tensor([[0.05, 0.9, 0.05]]).log()
        for p in (1e-3, 1e-7, 1e-12):
            expect_equal(f"p = {p}: ids that stay", ids_kept(f"p = {p}", impl(logits, p), logits), [[1]])
        expect_equal("ids that stay", ids_kept("p = 0.1", impl(logits, 0.1), logits), [[1]])

    def test_crossing(self, impl):
        """the token that brings the sum to p belongs to the set"""
        logits = torch.tensor([[0.6, 0.3, 0.1]]).log()
        expect_equal("ids that stay", ids_kept("p = 0.8", impl(logits, 0.8), logits), [[0, 1]])

    def test_exactly_p(self, impl):
        """exactly p is enough: of 1/2 1/4 1/8 1/8, p = 1/2 keeps one token and p = 3/4 two"""
        logits = -math.log(2) * torch.tensor([[2.0, 1.0, 3.0, 3.0]])
        for p, expected in ((0.5, [[1]]), (0.75, [[0, 1]]), (0.8, [[0, 1, 2, 3]])):
            expect_equal(f"p = {p}: ids that stay", ids_kept(f"p = {p}", impl(logits, p), logits), expected)

    def test_ties(self, impl):
        """tokens of equal probability stay or go together"""
        logits = torch.zeros(1, 4)
        expect_equal("ids that stay", ids_kept("four equal, p = 0.5", impl(logits, 0.5), logits), [[0, 1, 2, 3]])
        logits = torch.tensor([[0.1, 0.2, 0.4, 0.1, 0.2]]).log()
        for p, expected in ((0.3, [[2]]), (0.5, [[1, 2, 4]]), (0.75, [[1, 2, 4]]), (0.85, [[0, 1, 2, 3, 4]])):
            expect_equal(f"p = {p}: ids that stay", ids_kept(f"p = {p}", impl(logits, p), logits), expected)

    def test_rows(self, impl):
        """each row has its own threshold: one token where the model is sure, many where it is not"""
        logits = torch.tensor([[9.0, 0.0, 0.1, 0.2], [0.1, 0.0, 0.2, 0.3]])
        expect_equal("ids that stay", ids_kept("two rows", impl(logits, 0.9), logits), [[0], [0, 1, 2, 3]])

    def test_p_per_row(self, impl):
        """p may be a tensor: each row has its own, also when there are as many rows as tokens"""
        row = torch.tensor([0.2, 0.5, 0.3]).log()
        logits, p = row.expand(3, 3).clone(), torch.tensor([0.9, 0.4, 0.7])
        expect_equal("ids that stay", ids_kept("p per row", impl(logits, p), logits), [[0, 1, 2], [1], [1, 2]])
        expect_close("p afterwards", p, [0.9, 0.4, 0.7])
        logits, p = row.expand(2, 3).clone(), torch.tensor([0.6, 1.0])
        expect_equal("ids that stay", ids_kept("p per row", impl(logits, p), logits), [[1, 2], [0, 1, 2]])

    def test_one_beside_others(self, impl):
        """a row with p = 1 keeps every token, however small, beside rows with less"""
        row = torch.tensor([10.0, 9.0, -10.0, -30.0])
        logits, p = row.expand(3, 4).clone(), torch.tensor([0.5, 1.0, 0.9])
        got = ids_kept("p = .5, 1, .9", impl(logits, p), logits)
        expect_equal("ids that stay", got, [[0], [0, 1, 2, 3], [0, 1]])

    def test_random(self, impl):
        """on random rows without ties it equals sorting and adding up"""
        logits = 2 * torch.randn(20, 60, generator=torch.Generator().manual_seed(0))
        for p in (0.05, 0.5, 0.9, 0.99):
            expected = [plain_nucleus(row.tolist(), p) for row in logits]
            got = ids_kept(f"p = {p}", impl(logits.clone(), p), logits)
            for row, (mine, want) in enumerate(zip(got, expected, strict=True)):
                expect_equal(f"p = {p}, row {row}: ids that stay", mine, want)

    def test_near(self, impl):
        """probabilities near 0.0001 that differ by one part in 100,000 are told apart"""
        order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
        logits = torch.cat([torch.tensor([math.log(9000)]), order * -1e-5])[None]  # [1, 1001]
        weights = [9000.0, *(math.exp(i * -1e-5) for i in range(1000))]
        for count in (100, 500, 800):
            p = (sum(weights[:count]) + weights[count] / 2) / sum(weights)  # half of the token that crosses it
            expected = [0, *((order < count).nonzero().flatten() + 1).tolist()]
            got = ids_kept(f"p = {p:.6f}", impl(logits, p), logits)
            expect_equal(f"p = {p:.6f}: number of tokens that stay", len(got[0]), len(expected))
            expect_equal(f"p = {p:.6f}: ids that stay", got[0], expected)

    def test_small_and_near(self, impl):
        """two probabilities near 0.000001 that differ by one part in 100,000 are told apart"""
        weights = torch.tensor([1.0, 1e-6, 1.00001e-6], dtype=torch.float64)
        logits = weights.log().float()[None]
        p = float((weights[0] + weights[2] / 2) / weights.sum())
        expect_equal("ids that stay", ids_kept(f"p = {p:.7f}", impl(logits, p), logits), [[0, 2]])

    def test_extremes(self, impl):
        """gaps of 300, logits of 10,000 and of minus infinity, a vocabulary of one"""
        logits = torch.tensor([[0.0, 300.0, 299.0, -300.0], [1e4, 1e4 - 1, 0.0, -1e4]])
        expect_equal("p = 0.9: ids that stay", ids_kept("p = 0.9", impl(logits, 0.9), logits), [[1, 2], [0, 1]])
        expect_equal("p = 0.7: ids that stay", ids_kept("p = 0.7", impl(logits, 0.7), logits), [[1], [0]])
        logits = torch.tensor([[math.log(3), -math.inf, 0.0, -math.inf]])
        for p, expected in ((0.7, [[0]]), (0.8, [[0, 2]])):
            what = f"two refused before, p = {p}"
            expect_equal(f"{what}: ids that stay", ids_kept(what, impl(logits, p), logits), expected)
        expect_equal("the only token", ids_kept("V = 1", impl(torch.zeros(2, 1), 0.3), torch.zeros(2, 1)), [[0], [0]])

    def test_views(self, impl):
        """logits need not be contiguous"""
        logits = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.7, 0.1, 0.15, 0.05]]).log()
        view = logits.T.contiguous().T
        expect_equal("ids that stay", ids_kept("a transposed view", impl(view, 0.65), logits), [[1, 3], [0]])

    def test_one_keeps_all(self, impl):
        """p = 1 keeps every token, also those that no fp32 sum would miss"""
        logits = torch.tensor([[10.0, 9.0, -10.0, -30.0], [0.1, 0.2, 0.3, 0.4]])
        expect_equal("ids that stay", ids_kept("p = 1", impl(logits, 1.0), logits), [[0, 1, 2, 3]] * 2)
        logits = 3 * torch.randn(4, 500, generator=torch.Generator().manual_seed(2))
        for p in (1.0, torch.ones(4)):
            expect_equal("ids that stay", ids_kept("p = 1", impl(logits, p), logits), [list(range(500))] * 4)
        logits = torch.tensor([[-math.inf, 0.0, -math.inf, -200.0]])
        for p in (1.0, torch.ones(1)):
            what = "p = 1, two refused before"
            expect_equal(f"{what}: ids that stay", ids_kept(what, impl(logits, p), logits), [[1, 3]])

    def test_no_sort(self, impl):
        """nothing is sorted"""
        logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(3))
        found = sorts_in(impl)
        expect(not found, f"expected a search for the threshold\n  got      a call of {', '.join(found)}, which sorts")
        with ExitStack() as stack:
            for owner, name in SORTS:
                stack.enter_context(mock.patch.object(owner, name, refuse(f"{owner.__name__}.{name}")))
            tensor_of("the result", impl(logits, 0.7))

    def test_input_stays(self, impl):
        """the logits that came in are not changed"""
        logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
        before = logits.clone()
        for p in (0.5, 1.0, torch.tensor([0.5])):
            impl(logits, p)
            expect_close("logits afterwards", logits, before, atol=0, rtol=0)
        p = torch.tensor([0.5, 1.0])
        impl(logits.expand(2, 4).clone(), p)
        expect_close("p afterwards", p, [0.5, 1.0], atol=0, rtol=0)


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def plain_stream(pieces: list[bytes]) -> list[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return [*(decoder.decode(piece) for piece in pieces), decoder.decode(b"", final=True)]


def strict_stream(pieces: list[bytes]) -> list[str]:
    """As plain_stream, but ED A0, where a surrogate begins, is known for invalid at once: Python's decoder waits."""
    out, waiting = [], b""
    for piece in pieces:
        waiting += piece
        whole = max((n for n in range(1, min(3, len(waiting)) + 1) if _may_become(waiting[-n:])), default=0)
        out.append(waiting[: len(waiting) - whole].decode(errors="replace"))
        waiting = waiting[len(waiting) - whole :]
    return [*out, waiting.decode(errors="replace")]


def _may_become(data: bytes) -> bool:
    """Whether bytes can follow that make of `data`, one byte or more, a single character."""
    tails = [bytes([b]) * n for b in (0x80, 0x90, 0xA0) for n in (1, 2, 3)]
    return any(_is_one(data + tail[:1] + b"\x80" * (len(tail) - 1)) for tail in tails)


def _is_one(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False


def expect_stream(impl: type, pieces: list[bytes]) -> None:
    got = stream(impl, pieces)
    if got != plain_stream(pieces):  # which is right but for a surrogate's beginning, where either will do
        expect_equal(f"pieces of {pieces}", got, strict_stream(pieces))
    expect_equal(f"all of {pieces}", "".join(got), b"".join(pieces).decode(errors="replace"))


def stream(impl: type, pieces: list[bytes]) -> list[str]:
    decoder = impl()
    return [*(decoder.push(piece) for piece in pieces), decoder.flush()]


@exercise("3.6", "StreamDecoder")
class TestStreamDecoder:
    def test_whole_characters(self, impl):
        """complete characters come out at once"""
        expect_equal("pieces", stream(impl, [b"Hi", " é".encode(), b"!"]), ["Hi", " é", "!", ""])

    def test_half_a_character(self, impl):
        """the beginning of a character waits until the rest is there"""
        smile = "🙂".encode()
        got = stream(impl, [b"a" + smile[:1], smile[1:3], smile[3:] + b"b"])
        expect_equal("pieces", got, ["a", "", "🙂b", ""])

    def test_single_bytes(self, impl):
        """byte by byte, every character comes with its last byte"""
        text = "aé日🙂 ß"
        expected = [c for character in text for c in [""] * (len(character.encode()) - 1) + [character]] + [""]
        expect_equal("pieces", stream(impl, [bytes([b]) for b in text.encode()]), expected)

    def test_invalid(self, impl):
        """a byte that cannot be part of UTF-8 becomes U+FFFD at once, and what follows comes out"""
        expect_equal("pieces", stream(impl, [b"a\xff", b"b", b"\x80c"]), ["a\ufffd", "b", "\ufffdc", ""])

    def test_broken_off(self, impl):
        """a character that is broken off by another becomes U+FFFD"""
        expect_equal(
            "pieces", stream(impl, [b"\xf0\x9f", b"A", b"\xe6\x97", b"\xff"]), ["", "\ufffdA", "", "\ufffd\ufffd", ""]
        )

    def test_never(self, impl):
        """what can never become a character does not wait: C0, F5, FF, E0 80, F0 80, F4 90"""
        for data in (b"\xc0", b"\xc1", b"\xf5", b"\xf8", b"\xff", b"\xe0\x80", b"\xf0\x80", b"\xf4\x90", b"\xed\xa0"):
            for pieces in ([data, b"a"], [*(bytes([b]) for b in data), b"\x80", b"b"], [b"a" + data]):
                expect_stream(impl, pieces)

    def test_any_bytes(self, impl):
        """any bytes, cut anywhere: each piece as soon as it is sure, and all of them as bytes.decode has it"""
        draw = random.Random(5)
        alphabet = b"a \x80 \xa0 \xbf \xc2 \xc3\xa9 \xe0 \xe6\x97 \xed \xf0\x9f \xf4 \x90".split()
        for _ in range(300):
            expect_stream(impl, [b"".join(draw.choices(alphabet, k=draw.randint(0, 3))) for _ in range(5)])

    def test_nothing_is_changed(self, impl):
        """line ends, zeros and a byte-order mark come out as they are; nothing comes of nothing"""
        for text in ("日é" * 3000, "\ufeffa", "a\r\nb\rc", "\x00x", "x\ufeff"):
            expect_equal(f"pieces of {text!r}", stream(impl, [text.encode()]), [text, ""])
        expect_equal("pieces of nothing", stream(impl, [b"", b"\xc3", b"", b"\xa9"]), ["", "", "", "é", ""])

    def test_again(self, impl):
        """after flush the next stream begins anew"""
        decoder = impl()
        got = [decoder.push(b"\xf0\x9f"), decoder.flush(), decoder.push(b"\x99"), decoder.push(b"ok"), decoder.flush()]
        expect_equal("push F0 9F, flush, push 99, push ok, flush", got, ["", "\ufffd", "\ufffd", "ok", ""])

    def test_flush(self, impl):
        """flush returns U+FFFD for what never became whole, once"""
        decoder = impl()
        expect_equal("push", decoder.push(b"ok\xf0\x9f"), "ok")
        expect_equal("flush", decoder.flush(), "\ufffd")
        expect_equal("second flush", decoder.flush(), "")
        expect_equal("flush of a new decoder", impl().flush(), "")

    def test_two_streams(self, impl):
        """two decoders do not mix"""
        one, other = impl(), impl()
        one.push(b"\xc3")
        expect_equal("the other's push", other.push(b"x"), "x")
        expect_equal("the first one's push", one.push(b"\xa9"), "é")

    def test_random(self, impl):
        """any bytes, cut anywhere: each piece is what can be known by then, all are decode(errors="replace")"""
        pool = ["é", "日", "🙂", "a", " "]
        for seed in range(60):
            chance = random.Random(seed)
            data = b"".join(
                bytes([chance.randrange(256)]) if chance.random() < 0.2 else chance.choice(pool).encode()
                for _ in range(12)
            )
            expect_stream(impl, pieces_of(data, sorted(chance.sample(range(len(data) + 1), 5))))
