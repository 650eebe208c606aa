"""The contracts of chapter 3's exercises: merges, encoding, the training step, perplexity, the nucleus, streaming."""

import codecs
import copy
import math
import random
import re
from fractions import Fraction

import torch
from torch import nn

from minillm.learn.testing import exercise, expect, expect_close, expect_equal

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


def plain_merges(word_counts: dict[str, int], num_merges: int) -> list[tuple[bytes, bytes]]:
    """Repeat every word as often as it occurs and count without any weights."""
    text = [tuple(bytes([b]) for b in w.encode()) for w, n in word_counts.items() for _ in range(n)]
    merges = []
    for _ in range(num_merges):
        pairs = [(s[i], s[i + 1]) for s in text for i in range(len(s) - 1)]
        if not pairs:
            break
        counted = [(-pairs.count(pair), pair) for pair in set(pairs)]
        merges.append(min(counted)[1])
        text = [joined(s, merges[-1]) for s in text]
    return merges


@exercise("3.1", "learn_merges")
class TestLearnMerges:
    def test_by_hand(self, impl):
        """low 3 times and lower once: first l+o (4 times, before o+w of the same count), then lo+w, then e+r"""
        got = impl({"low": 3, "lower": 1}, 3)
        expect_equal("merges", [tuple(pair) for pair in got], [(b"l", b"o"), (b"lo", b"w"), (b"e", b"r")])

    def test_counts_weigh(self, impl):
        """a word that occurs often counts as often"""
        expect_equal("first merge", [tuple(p) for p in impl({"ab": 1, "cab": 1, "xy": 5}, 1)], [(b"x", b"y")])

    def test_ties(self, impl):
        """of equal counts the smallest pair wins, whatever the order of the words"""
        for words in ({"zy": 2, "ab": 2, "ba": 2}, {"ba": 2, "zy": 2, "ab": 2}):
            expected = [(b"a", b"b"), (b"b", b"a"), (b"z", b"y")]
            expect_equal("merges", [tuple(p) for p in impl(words, 3)], expected)

    def test_overlap(self, impl):
        """a a a a a becomes aa aa a, from left to right; then aa+a, which is smaller than aa+aa, and the rest"""
        got = [tuple(p) for p in impl({"aaaaa": 1}, 3)]
        expect_equal("merges", got, [(b"a", b"a"), (b"aa", b"a"), (b"aa", b"aaa")])

    def test_bytes(self, impl):
        """symbols are bytes: é is two of them, and they are joined like any others"""
        expect_equal("merges", [tuple(p) for p in impl({"é": 2, "ab": 1}, 1)], [(b"\xc3", b"\xa9")])

    def test_stops(self, impl):
        """when every word is one symbol there is nothing left to join"""
        expect_equal("merges", [tuple(p) for p in impl({"ab": 1, "c": 4}, 10)], [(b"a", b"b")])
        expect_equal("no words", impl({}, 3), [])
        expect_equal("no merges", impl({"ab": 1}, 0), [])

    def test_text(self, impl):
        """on real text it equals counting everything without weights"""
        words = words_of(SENTENCES)
        before = dict(words)
        expect_equal("merges", [tuple(p) for p in impl(words, 40)], plain_merges(words, 40))
        expect_equal("word_counts afterwards", words, before)


RANKS = {pair: rank for rank, pair in enumerate(plain_merges(words_of(SENTENCES), 120))}


def plain_encode(word: str, ranks: dict[tuple[bytes, bytes], int]) -> list[bytes]:
    """Apply each merge of the table in turn, everywhere: the same for tables that were learned."""
    symbols = tuple(bytes([b]) for b in word.encode())
    for pair in sorted(ranks, key=ranks.get):
        symbols = joined(symbols, pair)
    return list(symbols)


@exercise("3.2", "encode_word")
class TestEncodeWord:
    def test_by_hand(self, impl):
        """lowest with l+o, lo+w, e+s gives low, es, t"""
        ranks = {(b"l", b"o"): 0, (b"lo", b"w"): 1, (b"e", b"s"): 2}
        expect_equal("tokens", list(impl("lowest", ranks)), [b"low", b"es", b"t"])

    def test_rank_decides(self, impl):
        """the best rank is joined first, not the leftmost pair and not the longest token"""
        ranks = {(b"b", b"c"): 0, (b"a", b"b"): 1, (b"ab", b"c"): 2}
        expect_equal("tokens of abc", list(impl("abc", ranks)), [b"a", b"bc"])
        ranks = {(b"a", b"b"): 0, (b"c", b"d"): 1, (b"b", b"c"): 2, (b"bc", b"d"): 3}
        expect_equal("tokens of abcd", list(impl("abcd", ranks)), [b"ab", b"cd"])

    def test_leftmost(self, impl):
        """of equal ranks the leftmost: aaa is aa a"""
        expect_equal("tokens", list(impl("aaa", {(b"a", b"a"): 0})), [b"aa", b"a"])
        expect_equal("tokens", list(impl("aaaaa", {(b"a", b"a"): 0, (b"aa", b"aa"): 1})), [b"aaaa", b"a"])

    def test_looks_again(self, impl):
        """a join may make a pair that the table knows, to its left as well"""
        ranks = {(b"c", b"d"): 0, (b"b", b"cd"): 1, (b"a", b"bcd"): 2}
        expect_equal("tokens", list(impl("abcd", ranks)), [b"abcd"])

    def test_edges(self, impl):
        """a word without known pairs stays bytes; an empty word has no tokens"""
        expect_equal("tokens of é", list(impl("é", {(b"a", b"b"): 0})), [b"\xc3", b"\xa9"])
        expect_equal("tokens of the empty word", list(impl("", {(b"a", b"b"): 0})), [])

    def test_text(self, impl):
        """on real words it equals applying every merge in turn, and nothing is lost"""
        ranks = dict(RANKS)
        for word in [*words_of(SENTENCES), "constructions", "listless", "🙂🙂🙂", "separately"]:
            got = list(impl(word, ranks))
            expect_equal(f"tokens of {word!r}", got, plain_encode(word, RANKS))
            expect_equal(f"bytes of {word!r}", b"".join(got), word.encode())
        expect_equal("the table afterwards", ranks, RANKS)


PAD = 0


class Toy(nn.Module):
    """Logits of the next token from the running mean of embeddings: causal, differentiable, tiny."""

    def __init__(self, vocab: int = 7, width: int = 5, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Parameter(torch.randn(vocab, width, generator=generator))
        self.head = nn.Parameter(torch.randn(width, vocab, generator=generator))

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        seen = torch.arange(1, token_ids.shape[1] + 1)[None, :, None]
        return (self.embed[token_ids].cumsum(1) / seen) @ self.head  # [B, T, V]


class PlainSGD:
    """What an optimizer is to a training step. torch.optim would import its compiler first, for seconds."""

    def __init__(self, parameters, lr: float):
        self.parameters, self.lr = list(parameters), lr

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.parameters:
            parameter.grad = None if set_to_none else torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter -= self.lr * parameter.grad


def plain_loss(model: nn.Module, token_ids: torch.Tensor) -> torch.Tensor:
    """Mean of -ln p(next token) over real targets, one prediction at a time."""
    losses = []
    for row in token_ids:
        for t in range(1, len(row)):
            if row[t] != PAD:
                scores = model(row[None, :t])[0, -1]
                losses.append(scores.exp().sum().log() - scores[row[t]])
    return torch.stack(losses).mean()


BATCH = torch.tensor([[3, 1, 4, 1, 5, 2], [2, 6, 5, 3, PAD, PAD], [5, 4, PAD, PAD, PAD, PAD]])


@exercise("3.3", "training_step")
class TestTrainingStep:
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
        losses = [
            (scores.exp().sum().log() - scores[row[t]]).item()
            for row in batch
            for t in range(1, 6)
            if row[t] != 6
            for scores in [model(row[None, :t])[0, -1]]
        ]
        got = impl(model, PlainSGD(model.parameters(), lr=0.0), batch, 6)
        expect_close("loss with pad_id=6", got, sum(losses) / len(losses), atol=1e-5)

    def test_float(self, impl):
        """the loss is a Python float, so that keeping it does not keep the whole graph"""
        model = Toy()
        got = impl(model, PlainSGD(model.parameters(), lr=0.0), BATCH.clone(), PAD)
        expect(isinstance(got, float), f"return value: expected a float\n  got {type(got).__name__}")

    def test_step(self, impl):
        """the optimizer takes one step along this batch's gradient"""
        model = Toy()
        expected = copy.deepcopy(model)
        plain_loss(expected, BATCH).backward()
        impl(model, PlainSGD(model.parameters(), lr=0.5), BATCH.clone(), PAD)
        for (name, got), want in zip(model.named_parameters(), expected.parameters(), strict=True):
            expect_close(f"{name} after a step", got, want - 0.5 * want.grad, atol=1e-5)

    def test_two_steps(self, impl):
        """the second step forgets the first one's gradient"""
        model, expected = Toy(), Toy()
        optimizer = PlainSGD(model.parameters(), lr=0.5)
        for rows in (BATCH[:1], BATCH[1:]):
            impl(model, optimizer, rows.clone(), PAD)
            gradients = torch.autograd.grad(plain_loss(expected, rows), list(expected.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(expected.parameters(), gradients, strict=True):
                    parameter -= 0.5 * gradient
        expect_close("embed after two steps", model.embed, expected.embed, atol=1e-5)

    def test_learns(self, impl):
        """40 steps on one batch bring the loss down"""
        model = Toy()
        optimizer = PlainSGD(model.parameters(), lr=1.0)
        losses = [impl(model, optimizer, BATCH.clone(), PAD) for _ in range(40)]
        expect(
            losses[-1] < losses[0] / 2,
            f"loss after 40 steps: expected under {losses[0] / 2:.3f}\n  got {losses[-1]:.3f}",
        )


def plain_perplexity(token_ids: list[int], window: int, stride: int) -> float:
    """Score each token by the first window that predicts it, one forward pass a token."""
    model, total = Toy(), 0.0
    for target in range(1, len(token_ids)):
        begin = next(b for b in range(0, len(token_ids), stride) if b + window >= target)
        with torch.no_grad():
            scores = model(torch.tensor([token_ids[begin:target]]))[0, -1].double()
        total += (scores.logsumexp(-1) - scores[token_ids[target]]).item()
    return math.exp(total / (len(token_ids) - 1))


class Watched(Toy):
    """A toy that refuses windows it could not hold."""

    def __init__(self, window: int):
        super().__init__()
        self.window, self.calls = window, 0

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        shape = tuple(token_ids.shape)
        right = len(shape) == 2 and shape[0] == 1 and 1 <= shape[1] <= self.window
        expect(right, f"shape given to the model: expected [1, T] with 1 <= T <= {self.window}\n  got {list(shape)}")
        self.calls += 1
        return super().forward(token_ids)


def tokens(count: int, seed: int = 0) -> list[int]:
    return [random.Random(seed * 1000 + i).randrange(7) for i in range(count)]


@exercise("3.4", "perplexity")
class TestPerplexity:
    def test_uniform(self, impl):
        """a model that knows nothing about V tokens has perplexity V"""
        got = impl(lambda ids: torch.zeros(1, ids.shape[1], 50), tokens(30), 8, 8)
        expect_close("perplexity", got, 50.0, rtol=1e-4)

    def test_one_window(self, impl):
        """a text that fits into the window is scored in one go, its first token excepted"""
        expect_close(
            "perplexity", impl(Watched(64), tokens(20), 64, 64), plain_perplexity(tokens(20), 64, 64), rtol=1e-4
        )

    def test_windows_side_by_side(self, impl):
        """stride = window: no token is left out between two windows, and the tail counts"""
        for count in (17, 20, 25, 26):
            expected = plain_perplexity(tokens(count), 8, 8)
            expect_close(f"perplexity of {count} tokens", impl(Watched(8), tokens(count), 8, 8), expected, rtol=1e-4)

    def test_overlapping_windows(self, impl):
        """a smaller stride gives context, and still scores each token once"""
        for window, stride in ((8, 4), (8, 3), (8, 1), (5, 2)):
            expected = plain_perplexity(tokens(41), window, stride)
            got = impl(Watched(window), tokens(41), window, stride)
            expect_close(f"perplexity, window {window}, stride {stride}", got, expected, rtol=1e-4)

    def test_short(self, impl):
        """two tokens make one prediction"""
        expect_close(
            "perplexity of 2 tokens", impl(Watched(8), [3, 5], 8, 4), plain_perplexity([3, 5], 8, 4), rtol=1e-4
        )

    def test_no_needless_windows(self, impl):
        """it stops when the last token is scored"""
        model = Watched(8)
        impl(model, tokens(17), 8, 2)
        expect_equal("windows shown for 17 tokens, window 8, stride 2", model.calls, 5)

    def test_inputs(self, impl):
        """the list of tokens stays as it was"""
        ids = tokens(20)
        impl(Toy(), ids, 8, 4)
        expect_equal("token_ids afterwards", ids, tokens(20))


def plain_nucleus(row: list[float], p: float) -> list[int]:
    """Ids of the smallest set, exactly in rationals of fp64 weights."""
    weights = [Fraction(math.exp(x)) for x in row]
    order = sorted(range(len(row)), key=lambda i: -row[i])
    total, kept = Fraction(0), []
    for i in order:
        if kept and total >= Fraction(p) * sum(weights):
            break
        kept.append(i)
        total += weights[i]
    return sorted(kept)


def ids_kept(what: str, got: torch.Tensor, logits: torch.Tensor) -> list[list[int]]:
    """The ids that stay in each row, after holding shape and values."""
    expect_equal(f"{what}: shape", tuple(got.shape), tuple(logits.shape))
    stays = got > float("-inf")
    expect_close(f"{what}: logits that stay", got[stays], logits[stays], atol=0, rtol=0)
    return [row.nonzero().flatten().tolist() for row in stays]


@exercise("3.5", "keep_top_p")
class TestKeepTopP:
    def test_by_hand(self, impl):
        """of .1 .5 .15 .25, p = .7 keeps .5 and .25: together .75, and .5 alone is not enough"""
        logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
        expect_equal("ids that stay", ids_kept("p = 0.7", impl(logits, 0.7), logits), [[1, 3]])

    def test_best_stays(self, impl):
        """the likeliest token stays, also when it alone has more than p"""
        logits = torch.tensor([[0.05, 0.9, 0.05]]).log()
        expect_equal("ids that stay", ids_kept("p = 0.1", impl(logits, 0.1), logits), [[1]])

    def test_crossing(self, impl):
        """the token that brings the sum to p belongs to the set"""
        logits = torch.tensor([[0.6, 0.3, 0.1]]).log()
        expect_equal("ids that stay", ids_kept("p = 0.8", impl(logits, 0.8), logits), [[0, 1]])

    def test_rows(self, impl):
        """each row has its own set: one token where the model is sure, many where it is not"""
        logits = torch.tensor([[9.0, 0.0, 0.0, 0.0], [0.1, 0.0, 0.2, 0.3]])
        expect_equal("ids that stay", ids_kept("two rows", impl(logits, 0.9), logits), [[0], [0, 1, 2, 3]])

    def test_random(self, impl):
        """on random rows it equals adding up one token at a time"""
        logits = 2 * torch.randn(20, 60, generator=torch.Generator().manual_seed(0))
        for p in (0.05, 0.5, 0.9, 0.99):
            expected = [plain_nucleus(row.tolist(), p) for row in logits]
            got = ids_kept(f"p = {p}", impl(logits.clone(), p), logits)
            for row, (mine, want) in enumerate(zip(got, expected, strict=True)):
                expect_equal(f"p = {p}, row {row}: ids that stay", mine, want)

    def test_input_stays(self, impl):
        """the logits that came in are not changed"""
        logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
        before = logits.clone()
        impl(logits, 0.5)
        expect_close("logits afterwards", logits, before, atol=0, rtol=0)


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def plain_stream(pieces: list[bytes]) -> list[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return [*(decoder.decode(piece) for piece in pieces), decoder.decode(b"", final=True)]


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
            pieces = pieces_of(data, sorted(chance.sample(range(len(data) + 1), 5)))
            got = stream(impl, pieces)
            expect_equal(f"pieces of {pieces}", got, plain_stream(pieces))
            expect_equal(f"all of {pieces}", "".join(got), data.decode(errors="replace"))
