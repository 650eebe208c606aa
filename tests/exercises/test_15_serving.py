"""Checks of exercises 15: percentiles, Little's law, server-sent events, a token bucket, homes of sessions, two choices
with old reports, the key of a cache of answers, a proxy that retries.
"""

import copy
import itertools
import math
import random
import string
import sys
from asyncio import CancelledError
from collections.abc import Mapping
from unittest.mock import patch

from minillm.learn.testing import (
    ContractError,
    exercise,
    expect,
    expect_close,
    expect_equal,
    expect_parts,
    expect_raises,
    last,
)

NAN, INF = math.nan, math.inf


def expect_untouched(named):
    """named: (name, value, its copy)"""
    for name, now, before in named:
        expect(repr(now) == repr(before), f"{name}: expected it to stay as it was\n  got it changed")


# ---- 15.1


@exercise("15.1", "percentiles")
class TestPercentiles:
    def same(self, impl, latencies, percents, what=""):
        named = [("latencies", latencies, list(latencies)), ("percents", percents, list(percents))]
        got = impl(latencies, percents)
        expect(isinstance(got, dict), f"expected a dictionary\n  got {type(got).__name__}")
        limits, exact = sorted(INF if x is None else x for x in latencies), {}
        for percent in percents:  # of all latencies the smallest that enough are within; percents in tenths
            enough = (i for i in range(len(limits)) if 1000 * (i + 1) >= round(10 * percent) * len(limits))
            exact[percent] = limits[next(enough)]
        expect_equal(f"percents{what}", sorted(got), sorted(exact))
        for percent in got:
            given = [repr(one) for one in percents if one == percent]
            expect(repr(percent) in given, f"percents{what}: expected them as they were given, {' or '.join(given)}"
                   f"\n  got {percent!r}")  # fmt: skip
        for percent, wanted in exact.items():
            expect_equal(f"percentile {percent}{what} of {len(latencies)}", got[percent], wanted)
        expect_untouched([(name, list(now), before) for name, now, before in named])

    def test_hand(self, impl):
        """of 1, 2, 3, 4 in any order: p50 2, p75 3, p76 4"""
        got = impl([3, 1, 4, 2], [50, 75, 76])
        expect_equal("percentiles", got, {50: 2, 75: 3, 76: 4})

    def test_ends(self, impl):
        """0 is the fastest, 100 the slowest; one latency is all of them"""
        self.same(impl, [0.5, 0.1, 0.9], [0, 100, 0.1, 99.9])
        self.same(impl, (0.25,), (0, 50, 100))
        self.same(impl, [0, 0.0, 3], [0, 50, 66.6, 66.7, 100])

    def test_members(self, impl):
        """never between two latencies"""
        self.same(impl, [1.0, 2.0], [49, 50, 50.1, 51, 99])
        self.same(impl, [0.1, 0.1, 0.1, 7.0], [50, 75, 75.1, 99])

    def test_failures(self, impl):
        """None counts as slower than all, and is infinity"""
        self.same(impl, [None] * 5 + [0.1 * i for i in range(95)], [0, 50, 94, 95, 95.1, 96, 99, 100])
        self.same(impl, [None, None], [0, 50, 100])
        self.same(impl, [2.0, None, 1.0], [33, 34, 66, 67])
        self.same(impl, [None, 1e300, 3e9, 2], [25, 50, 75, 76])
        self.same(impl, [5.0, INF, None], [33, 34, 100])

    def test_exact(self, impl):
        """percents as they are written: each whole and tenth of 100 and of 1,000 latencies"""
        for n in (10, 100, 1000):
            self.same(impl, [float(i) for i in range(n)], [*range(0, 101, 1 if n < 1000 else 7)])
        tenths = [i / 10 for i in range(1001)]
        got = impl([float(i) for i in range(1, 1001)], tenths)
        for i, percent in enumerate(tenths):
            expect_equal(f"percentile {percent} of 1 to 1000", got[percent], float(max(i, 1)))

    def test_random(self, impl):
        """many lists"""
        draw = random.Random(1)
        for case in range(60):
            latencies = [
                draw.choice((None, draw.random(), round(draw.random(), 1))) for _ in range(draw.randint(1, 40))
            ]
            percents = [draw.randint(0, 1000) / 10 for _ in range(5)] + [50, 90, 99]
            self.same(impl, latencies, draw.sample(percents, len(percents)), f", case {case}")
        self.same(impl, (0.5, 0.25, None), ())
        self.same(impl, [0.5, -0.0, None], [50, 50, 75.5, 50])

    def test_many(self, impl):
        """thousands of latencies, each counts"""
        draw = random.Random(5)
        latencies = [None, None, *(draw.random() * 1e4 for _ in range(4999))]
        self.same(impl, latencies, [0, 0.1, 0.2, 33.3, 50, 99.9, 100])

    def test_again(self, impl):
        """nothing is kept from call to call"""
        latencies = [1.0, 2.0, 3.0]
        self.same(impl, latencies, [50, 100])
        latencies[1:] = [5.0, 4.0]
        self.same(impl, latencies, [50, 100], ", of a list that has other latencies than at the call before")

    def test_errors(self, impl):
        """what cannot be is a ValueError"""
        expect_raises(ValueError, lambda: impl([], [50]), "no latencies")
        expect_raises(ValueError, lambda: impl([], []), "no latencies, no percents")
        for bad in (-1, -1e-9, NAN, -INF):
            five = [3.0, None, 1.0, 2.0, 4.0]
            for latencies in ([bad], [1.0, bad], [bad, None], *([*five[:i], bad, *five[i:]] for i in range(6))):
                expect_raises(ValueError, lambda x=latencies: impl(x, [50]), f"latencies {latencies}")
        expect_raises(ValueError, lambda: impl([1.0, NAN], []), "NaN, no percents")
        for bad in (-1, -0.1, 100.1, 101, NAN, INF, -INF):
            for percents in ([bad], [bad, 50], [50, bad], [50, bad, 60], [90, 100, bad, 10]):
                expect_raises(ValueError, lambda x=percents: impl([1.0, None], x), f"percents {percents}")


# ---- 15.2


def little_of(requests, begin, end, steps):
    """By counting at `steps` moments of the window; exact where all times are multiples of its step."""
    width = (end - begin) / steps
    moments = [begin + (i + 0.5) * width for i in range(steps)]
    present = sum(a <= t and (b is None or t < b) for t in moments for a, b in requests) / steps
    rate = sum(begin <= a < end for a, _ in requests) / (end - begin)
    return present, rate, present / rate if rate else None


@exercise("15.2", "little")
class TestLittle:
    def same(self, impl, requests, begin, end, steps=None, what=""):
        before = list(requests)
        present, rate, seconds = expect_parts(impl(requests, begin, end), "present", "rate", "seconds")
        wanted = little_of(before, begin, end, steps or round(8 * (end - begin)))
        expect_close(f"present{what}", present, wanted[0], 0, 1e-9)
        expect_close(f"rate{what}", rate, wanted[1], 0, 1e-9)
        if wanted[2] is None:
            expect(seconds is None, f"seconds{what}: expected None, as nothing arrived\n  got {seconds!r}")
        else:
            expect(seconds is not None, f"seconds{what}: expected {wanted[2]}\n  got None")
            expect_close(f"seconds{what}", seconds, wanted[2], 0, 1e-9)
        expect_untouched([("requests", list(requests), before)])

    def test_hand(self, impl):
        """two requests of 2 and 4 s in 10 s: 0.6 there, 0.2 a second, 3 s each"""
        got = expect_parts(impl([(1, 3), (2, 6)], 0, 10), "present", "rate", "seconds")
        for name, value, wanted in zip(("present", "rate", "seconds"), got, (0.6, 0.2, 3.0), strict=True):
            expect_close(name, value, wanted)

    def test_window(self, impl):
        """the part within the window counts, of arrivals those from its begin to before its end"""
        self.same(impl, [(-5, 3)], 0, 10, what=", from before")
        self.same(impl, [(8, 30)], 0, 10, what=", to behind")
        self.same(impl, [(-5, 30), (4, 5)], 0, 10, what=", throughout")
        self.same(impl, [(-5, -1), (-5, 0), (10, 12), (11, 20), (2, 3)], 0, 10, what=", outside")
        self.same(impl, [(0, 1), (10, 11)], 0, 10, what=", at the ends")
        self.same(impl, [(100, 104), (103, 111), (106, 107)], 102, 108, what=", a window that begins at 102")
        self.same(impl, [(-20, -12)], -16, -8, what=", negative times")
        now = 1_800_000_000.25
        self.same(impl, [(now - 3, now + 1), (now + 0.5, None)], now, now + 4, what=", seconds since 1970")
        self.same(impl, [(1 / 4096, 3 / 4096), (5 / 4096, None)], 0, 1 / 512, 8, what=", a window of 2 ms")
        self.same(impl, [(1, 3), (1, 3), (-2, None), (-2, None), (1, 3)], 0, 10, what=", equal requests")
        self.same(impl, [(-100, None), (-90, 95), (3, 4)], 0, 10, what=", from long before")
        self.same(impl, [(1, 2), (3, 5)], 50, 60, what=", all long before")

    def test_scales(self, impl):
        """windows of microseconds and of weeks, thousands of requests"""
        for unit in (2.0**-40, 2.0**-20, 2.0**20):
            requests = [(0, 1), (2, 5), (7, None), (10 - 1 / 16, 12), (-3, 1 / 16)]
            requests = [(a * unit, b if b is None else b * unit) for a, b in requests]
            self.same(impl, requests, 0, 10 * unit, 160, f", a window of {10 * unit:g} s")
        self.same(impl, [(i % 13 - 2, i % 13 - 2 + i % 5) for i in range(3000)], 0, 10, 10, ", 3,000 requests")
        parts = [i * 2.0**-26 + 1 for i in range(100)]
        got = expect_parts(impl([(0, part) for part in parts], 0, 2), "present", "rate", "seconds")
        expect_close("present, of parts that take 27 bits", got[0], sum(parts) / 2, 0, 1e-10)

    def test_still_there(self, impl):
        """one that has not left counts until the window's end"""
        self.same(impl, [(2, None), (3, 4)], 0, 10)
        self.same(impl, [(-2, None)], 0, 10)
        self.same(impl, [(12, None), (1, 2)], 0, 10, what=", arrived behind the window")

    def test_seconds(self, impl):
        """by Little's law: not the mean of those that have left"""
        self.same(impl, [(i, None) for i in range(10)], 0, 10)
        self.same(impl, [(-100, 5), (1, 2)], 0, 10)

    def test_nothing(self, impl):
        """no arrivals: no seconds"""
        self.same(impl, [], 0, 10)
        self.same(impl, [(-3, 4)], 0, 10)
        self.same(impl, ((-3, None), (10, None)), 0, 10)
        self.same(impl, [(10, None)], 0, 10)

    def test_at_once(self, impl):
        """a request that takes no time arrives, too"""
        self.same(impl, [(2, 2), (0, 0), (3, 5)], 0, 8)
        present, rate, seconds = expect_parts(impl([(2, 2)], 0, 8), "present", "rate", "seconds")
        expect_equal("all", (present, rate, seconds), (0, 0.125, 0))

    def test_random(self, impl):
        """many logs, in any order"""
        draw = random.Random(2)
        for case in range(60):
            requests = []
            for _ in range(draw.randint(0, 12)):
                arrived = draw.randint(-32, 96) / 8
                requests.append((arrived, draw.choice((None, arrived + draw.randint(0, 64) / 8))))
            self.same(impl, requests, draw.choice((0.0, -1.5, 2.25)), draw.choice((4.0, 9.5)), what=f", case {case}")

    def test_errors(self, impl):
        """a window without time, a request that left before it came"""
        for begin, end in ((1, 1), (2, 1), (0.0, -1.0)):
            expect_raises(ValueError, lambda b=begin, e=end: impl([(0, 1)], b, e), f"window {begin} to {end}")
            expect_raises(ValueError, lambda b=begin, e=end: impl([], b, e), f"no requests, {begin} to {end}")
        for requests in ([(3, 2)], [(0, 1), (3, 2.5)], [(50, 40), (0, 1)], [(-3, -4)], [(5, 0)], [(0, -1)],
                         [(0, 1), (4, 3), (5, 6)], [(0, None), (2, 3), (4, 3), (5, None)],
                         [(1, 1 - 2**-40)]):  # fmt: skip
            expect_raises(ValueError, lambda r=requests: impl(r, 0, 10), f"requests {requests}")


# ---- 15.3


def events_of(stream: bytes):
    """The specification on the whole stream."""
    text = stream.removeprefix(b"\xef\xbb\xbf").decode(errors="replace")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")[:-1]
    found, name, data = [], "", []
    for line in lines:
        if line == "":
            if data:
                found.append((name or "message", "\n".join(data)))
            name, data = "", []
            continue
        field, _, value = line.partition(":")
        value = value[1:] if value[:1] == " " else value
        if field == "data":
            data.append(value)
        if field == "event":
            name = value
    return found


@exercise("15.3", "Events")
class TestEvents:
    def fed(self, impl, parts, what=""):
        events, found = impl(), []
        for part in parts:
            got = events.feed(part)
            expect(isinstance(got, list), f"feed{what}: expected a list\n  got {type(got).__name__}")
            for one in got:
                expect(isinstance(one, tuple | list) and len(one) == 2, f"feed{what}: expected (event, data)\n"
                       f"  got {one!r}")  # fmt: skip
            found.append([tuple(one) for one in got])
        return found

    def all_fed(self, impl, parts):
        return [event for found in self.fed(impl, parts) for event in found]

    def same(self, impl, stream, what=""):
        """Whole, byte by byte, and cut at two places."""
        wanted = events_of(stream)
        expect_equal(f"events of {stream!r}{what}", self.all_fed(impl, [stream]), wanted)
        singles = [stream[i : i + 1] for i in range(len(stream))]
        expect_equal(f"events of {stream!r}, byte by byte{what}", self.all_fed(impl, singles), wanted)
        draw = random.Random(len(stream))
        for _ in range(6):
            a, b = sorted(draw.randrange(len(stream) + 1) for _ in range(2))
            parts = [stream[:a], b"", stream[a:b], stream[b:]]
            expect_equal(f"events of {parts}", self.all_fed(impl, parts), wanted)

    def test_stream(self, impl):
        """a stream as OpenAI's: events of one data line"""
        self.same(impl, b'data: {"choices": [{"delta": {"content": "Hi"}}]}\n\ndata: [DONE]\n\n')
        self.same(impl, b"data: [DONE]\n\ndata: more\n\nevent: done\ndata: x\n\nevent: error\ndata: y\n\ndata: z\n\n")

    @last
    def test_long(self, impl):
        """lines and events of any length"""
        for name, stream in (("a line of 70,000 characters", b"data: " + b"x" * 70_000 + b"\n\n"),
                             ("5,000 lines of data", b"data\n" * 5000 + b"\n"),
                             ("3,000 events", b"data\n\n" * 3000)):  # fmt: skip
            got = self.all_fed(impl, [stream[i : i + 65_536] for i in range(0, len(stream), 65_536)])
            if got != (wanted := events_of(stream)):
                expect_equal(f"events of {name}", got, wanted)

    def test_fields(self, impl):
        """data lines are joined, the event's last name counts, others are ignored"""
        self.same(impl, b"data: a\ndata: b\ndata:\ndata: c\n\n")
        self.same(impl, b"event: one\nevent: two\ndata: x\n\ndata: y\n\n")
        self.same(impl, b"data: a\nretry: 3\nid\nid: x\ndata: b\nretry\n\nevent: e\nid: 1\nretry: 2\ndata: c\n\n")
        self.same(impl, b"id: 7\nretry: 10\nfoo: bar\ndata: x\nData: y\nEVENT: z\ndata2: q\n\n")
        self.same(impl, b"event: x\nevent\ndata: y\n\nevent: x\nevent:\ndata: z\n\n")
        self.same(impl, b"data: x\nevent: late\n\nevent: a\ndata: y\nevent: b\ndata: z\n\n")
        near = (b"%s: no\ndata: x\n%s\n\n" % (name, name) for name in (b"DATA", b"Event", b"events", b"dat", b"even",
                b"\xef\xbb\xbfdata", b"x-data", b"event-x", b"data\t", b"\tevent", b"id", b"event\0"))  # fmt: skip
        self.same(impl, b"".join(near))
        self.same(impl, b"data: abc\n\ndata: abc\n\nevent: e\ndata: abc\n\nevent: e\ndata: abc\n\n", ", twice the same")

    def test_space(self, impl):
        """one space after the colon is dropped, no more, and nothing else"""
        self.same(impl, b"data:a\n\ndata:  a\n\ndata: a \n\ndata:\ta\n\ndata: \n\n data: no\n\ndata : no\n\n")
        self.same(impl, b"data: a: b\n\ndata::\n\nevent:  x\ndata: y\n\n")

    def test_empty(self, impl):
        """an event without a data line is none, one with an empty data line is one; names do not live on"""
        self.same(impl, b"event: lost\n\ndata: x\n\n\n\n\ndata\n\ndata:\n\ndata\ndata\n\n")
        self.same(impl, b"event: a\ndata: 1\n\ndata: 2\n\n")
        self.same(
            impl, b"data: a\n \ndata: b\n\t\n\x00\n\nevent: e\n  \ndata: c\n\n", ", lines of a space are not empty"
        )
        for name in (b"error", b"message", b"done", b"ping"):
            self.same(impl, b"event: " + name + b"\n\ndata: x\n\n")
        self.same(impl, b"event:  \ndata:  \n\nevent: \ndata:   \ndata: \t\n\n")

    def test_names(self, impl):
        """an event's name is given as it came"""
        self.same(impl, "event: Two Words \ndata: x\n\nevent: ÄB\t\ndata: y\n\nevent:\xa0z\ndata:\xa0w\n\n".encode())
        self.same(impl, b"event: a: b\ndata: c: d\n\nevent: a:\ndata: b:\n\nevent: data\ndata: event\n\n")

    def test_comments(self, impl):
        """lines that begin with a colon"""
        self.same(impl, b": ping\n\n:data: no\ndata: yes\n:\n\n:\n\n")
        self.same(impl, b"event: a\n: ping\ndata: x\n:\n::\nevent: b\n: event: c\n\n")

    def test_ends(self, impl):
        """LF, CR, CR LF end one line, wherever the pieces are cut"""
        self.same(impl, b"data: a\r\ndata: b\rdata: c\n\r\ndata: d\r\rdata: e\n\ndata: f\r\n\r\n")
        self.same(impl, b"\r\n\r\ndata: a\n\rdata: b\r\n\r\r\n")
        self.same(impl, b"data: a\r\n\n\rdata: b\n\r\n")

    def test_at_once(self, impl):
        """an event is given with the first byte that completes it"""
        for end in (b"\n\n", b"\r\r", b"\r\n\r"):
            got = self.fed(impl, [b"data: a", end[:-1], end[-1:], b"\ndata: b\n\n"], f", end {end!r}")
            wanted = [[], [], [("message", "a")], [("message", "b")]]
            expect_equal(f"events by piece, end {end!r}", got, wanted)
        got = self.fed(impl, [b"data: a\r\n\r", b"", b"\n", b"", b"\n\ndata: b\n\n"])
        expect_equal("events by piece, with empty ones", got, [[("message", "a")], [], [], [], [("message", "b")]])

    def test_incomplete(self, impl):
        """what is not completed is never given"""
        for stream in (b"data: a", b"data: a\n", b"data: a\r\n", b"data: a\n\ndata: b\n", b"", b"\n"):
            self.same(impl, stream)

    def test_characters(self, impl):
        """UTF-8 across pieces; what ends a line elsewhere does not end one here"""
        self.same(impl, "data: é – 語 🙂\n\nevent: ü\ndata: ñ\n\n".encode())
        self.same(impl, "data: a\u2028b\u0085c\x0bd\x0ce\x1cf\u2029g\n\n".encode())
        self.same(impl, b"data: a\x00b\n\n")
        self.same(impl, "event: \U0010ffff\ufeff\ndata: \U0001f9ea\ufffe\uffff\n\n".encode())
        controls = [chr(i) for i in (*range(32), 127, 128, 133, 159) if chr(i) not in "\r\n"]
        for form in ("data: {0}a{0}b{0}\n\n", "event: {0}a{0}b{0}\ndata: x\n\n"):
            stream = "".join(form.format(c) for c in controls).encode()
            expect_equal("events with control characters", self.all_fed(impl, [stream]), events_of(stream))

    def test_no_bytes(self, impl):
        """no bytes at all change nothing, wherever they come"""
        stream = "data: é\r\ndata: b\n\nevent: 語\rdata: c\r\n\r\n".encode()
        parts = [part for i in range(len(stream)) for part in (b"", stream[i : i + 1], b"")]
        expect_equal("events, byte by byte, none between them", self.all_fed(impl, parts), events_of(stream))

    def test_broken_characters(self, impl):
        """bytes that are no UTF-8 become U+FFFD"""
        self.same(impl, b"data: \xff\n\ndata: \xe2\x82A\n\ndata: \xc3\n\ndata: ok\n\n")
        self.same(impl, b"data: \xff\xff\n\ndata: \xed\xa0\x80\n\ndata: \xc0\xaf\n\n")

    def test_mark(self, impl):
        """a byte order mark is dropped at the very start alone"""
        self.same(impl, b"\xef\xbb\xbfdata: a\n\n\xef\xbb\xbfdata: no\n\n")
        self.same(impl, b"data: \xef\xbb\xbfx\n\n")
        self.same(impl, b"\xef\xbb\xbf\xef\xbb\xbfdata: no\ndata: b\n\n")
        for part in (b"\xef\xbb", b"\xef", b"\xbb\xbf", b"\xbf"):
            self.same(impl, part + b"data: no\ndata: b\n\n", ", a part of a mark")

    def test_two(self, impl):
        """two parsers share nothing, and what was given stays"""
        one, two = impl(), impl()
        one.feed(b"data: a\n")
        expect_equal("events of the other one", [tuple(e) for e in two.feed(b"\n")], [])
        one.feed(b": \xc3")
        expect_equal(
            "events of one that half a character waits in",
            [tuple(e) for e in two.feed(b"data: \xa9\n\n")],
            [("message", "\ufffd")],
        )
        one.feed(b"\n")
        first = one.feed(b"\n")
        expect_equal("events", [tuple(e) for e in first], [("message", "a")])
        one.feed(b"data: b\n\n")
        expect_equal("events, after the next ones", [tuple(e) for e in first], [("message", "a")])
        expect_equal("events of bytearray", [tuple(e) for e in one.feed(bytearray(b"data: c\n\n"))], [("message", "c")])

    def test_random(self, impl):
        """many streams"""
        draw, bits = random.Random(3), [b"data", b"event", b": ", b":", b" ", b"\n", b"\r", b"\r\n", b"\n\n"]
        bits += [b"data: x\n", "é".encode(), b"id: 1\n", b"\xef\xbb\xbf", b"event: e\n", b"data\n", b": c\n"]
        for case in range(70):
            self.same(impl, b"".join(draw.choices(bits, k=draw.randint(1, 25))), f", case {case}")


# ---- 15.4


class Clock:
    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now


class TheBucket:
    def __init__(self, rate, burst, clock):
        self.rate, self.burst, self.clock, self.there, self.at = rate, burst, clock, burst, clock()

    def level(self):
        now = self.clock()
        if now > self.at:
            self.there, self.at = min(self.burst, self.there + (now - self.at) * self.rate), now
        return self.there

    def take(self, tokens):
        there = self.level()
        if tokens > there:
            return (tokens - there) / self.rate
        self.there = there - tokens
        return 0.0

    def settle(self, tokens):
        self.there = min(self.burst, self.level() - tokens)


@exercise("15.4", "Bucket")
class TestBucket:
    def both(self, impl, rate, burst, begin=1000.0):
        clock = Clock(begin)
        return clock, impl(rate, burst, clock), TheBucket(rate, burst, clock)

    def played(self, impl, rate, burst, script, what="", begin=1000.0):
        """script: ("wait", s), ("take", n), ("settle", n), ("level",)"""
        clock, mine, right = self.both(impl, rate, burst, begin)
        for at, (name, *values) in enumerate(script):
            if name == "wait":
                clock.now += values[0]
                continue
            got, wanted = getattr(mine, name)(*values), getattr(right, name)(*values)
            if name == "settle" or got == wanted:
                continue
            call = f"{name}({', '.join(map(str, values))}), call {at} of {script}{what}"
            expect(got is not None, f"{call}: expected {wanted}\n  got None (is a `return` missing?)")
            expect_close(call, got, wanted, 1e-7, 1e-9)
            expect((got == 0) == (wanted == 0) or name == "level", f"{call}: expected {wanted}\n  got {got}")

    def test_burst(self, impl):
        """full at first: burst at once, then it waits"""
        self.played(impl, 10, 50, [("level",), ("take", 50), ("level",), ("take", 5), ("take", 1)])
        self.played(impl, 10, 50, [("take", 20), ("take", 20), ("take", 20), ("level",)])

    def test_nothing_taken(self, impl):
        """a refusal takes nothing, and its seconds are right"""
        self.played(impl, 4, 8, [("take", 8), ("take", 6), ("take", 6), ("wait", 1.5), ("take", 6), ("level",)])
        self.played(impl, 4, 8, [("take", 5), ("take", 6), ("take", 3), ("level",)])

    def test_rate(self, impl):
        """it fills by rate, up to burst"""
        self.played(
            impl, 3, 12, [("take", 12), ("wait", 1), ("level",), ("wait", 0.5), ("level",), ("wait", 99), ("level",)]
        )
        self.played(impl, 0.25, 2, [("take", 2), ("wait", 3), ("level",), ("take", 1)])
        self.played(impl, 1000, 2, [("take", 2), ("wait", 0.001), ("level",), ("wait", 5), ("take", 2), ("take", 2)])

    def test_long(self, impl):
        """what was full stays full, however long; nothing is saved up beyond burst"""
        self.played(impl, 5, 10, [("wait", 1e6), ("take", 10), ("take", 1), ("level",)])
        self.played(impl, 5, 10, [("take", 10), ("settle", -4), ("level",), ("wait", 0.5), ("take", 6.5), ("level",)])

    def test_no_loop(self, impl):
        """the work does not grow with the time that has passed"""
        clock, mine, _ = self.both(impl, 2, 10)
        mine.take(10)
        clock.now += 1e15
        lines, before = 0, sys.gettrace()

        def count(*_):
            nonlocal lines
            lines += 1
            expect(
                lines < 2000, "level() after 1e15 s: expected a few lines of work\n  got thousands: is there a loop?"
            )
            return count

        sys.settrace(count)
        try:
            got = mine.level()
        finally:
            sys.settrace(before)
        expect_close("level after 1e15 s", got, 10)

    def test_any_clock(self, impl):
        """clocks that begin below 0, and that go on from call to call"""
        for begin in (-500.0, 0.0, -1.5, 0):
            script = [("take", 10), ("wait", 1.5), ("level",), ("wait", 1.5), ("take", 9), ("level",)]
            self.played(impl, 2, 10, script, f", by a clock that begins at {begin}", begin)
        now = 0.0

        def going():
            nonlocal now
            now += 1 / 64
            return now

        for name, *values in (("level",), ("take", 0), ("settle", 0)):
            mine = impl(2, 1000, going)
            mine.take(1000)
            taken = now
            for _ in range(200):
                getattr(mine, name)(*values)
            before, got = now, mine.level()
            low, high = 2 * (before - taken), 2 * (now - taken) + 0.25
            expect(low <= got <= high, f"level after 200 calls of {name}, by a clock that goes on with each call:"
                   f" expected {low:g} to {high:g}\n  got {got:g}: is time lost between two readings?")  # fmt: skip

    def test_sizes(self, impl):
        """long waits, large numbers, small differences"""
        hours = [("take", 500), ("wait", 3000.0), ("level",), ("wait", 100_000.0), ("level",), ("settle", 450)]
        self.played(impl, 0.001, 500, [*hours, ("wait", 400_000.0), ("level",), ("take", 1), ("take", 500)])
        large = [
            ("take", 2**23),
            ("settle", 2**40),
            ("level",),
            ("wait", 0.5),
            ("level",),
            ("settle", -(2**39)),
            ("level",),
        ]
        self.played(impl, 2**20, 2**24, large)
        self.played(impl, 8, 1234.5, [("level",), ("take", 1234.5), ("wait", 2), ("level",), ("take", 1234.25)])
        near = [("take", 5), ("take", 5 + 2**-20), ("level",), ("wait", 2.0**-21), ("take", 5 + 2**-20), ("level",)]
        self.played(impl, 2, 10, near)
        self.played(impl, 4096, 4096, [("take", 4096), *[("wait", 0.00013), ("level",)] * 3])

    def test_fractions(self, impl):
        """rate, burst, tokens and times need not be whole"""
        script = [("level",), ("take", 2.5), ("level",), ("wait", 0.0004), ("level",), ("wait", 1), ("take", 0.3)]
        self.played(impl, 0.7, 2.75, script)
        self.played(impl, 0.001, 500, [("take", 500), ("take", 500), ("settle", 7000), ("take", 500), ("take", 0)])
        self.played(impl, 0.01, 0.5, [("take", 0.5), ("wait", 3), ("take", 0.25), ("level",)])
        self.played(impl, 60, 0.5, [("level",), ("take", 0.5), ("take", 0.5), ("wait", 5), ("level",)])
        self.played(impl, 5000, 100, [("take", 100), *[("wait", 0.0004), ("level",)] * 5])

    def test_debt(self, impl):
        """settle: below 0; what is owed is waited off"""
        self.played(impl, 2, 10, [("settle", 5000), ("level",), ("take", 1), ("wait", 60), ("take", 0), ("level",)])
        script = [("take", 5), ("settle", 20), ("level",), ("take", 0), ("take", 1), ("wait", 1), ("level",)]
        self.played(impl, 2, 10, [*script, ("wait", 7), ("take", 1), ("level",)])
        self.played(impl, 2, 10, [("settle", 10), ("take", 0), ("settle", 0.5), ("take", 0), ("level",)])

    def test_paid_back(self, impl):
        """settle: what was not used comes back, up to burst, and at the time of the call"""
        self.played(impl, 2, 10, [("take", 8), ("settle", -3), ("level",), ("settle", -30), ("level",)])
        self.played(impl, 2, 10, [("take", 10), ("wait", 4), ("settle", 6), ("level",)])
        self.played(impl, 2, 10, [("take", 2), ("wait", 60), ("settle", 6), ("level",)])
        self.played(impl, 2, 10, [("wait", 60), ("settle", -6), ("take", 10), ("take", 1)])

    def test_steps_back(self, impl):
        """a clock that steps back stands still until it is past its latest time"""
        back = [("take", 10), ("wait", 1), ("level",), ("wait", -5), ("level",), ("wait", 3), ("take", 9), ("level",)]
        self.played(impl, 2, 10, [*back, ("wait", 3), ("level",), ("take", 4), ("level",)])
        self.played(
            impl, 2, 10, [("take", 6), ("wait", -100), ("take", 1), ("wait", 50), ("level",), ("wait", 51), ("level",)]
        )

    def test_errors(self, impl):
        """what will never be there, and what makes no sense"""
        for rate, burst in ((0, 1), (-1, 1), (1, 0), (1, -1), (NAN, 1), (1, NAN)):
            expect_raises(ValueError, lambda r=rate, b=burst: impl(r, b, Clock()), f"rate {rate}, burst {burst}")
        for tokens in (11, 10.0001, -1, -1e-9, NAN):
            _, mine, _ = self.both(impl, 2, 10)
            expect_raises(ValueError, lambda t=tokens, m=mine: m.take(t), f"take {tokens} of at most 10")
            expect_close("level after a take that was refused", mine.level(), 10)
            mine.settle(20)
            expect_raises(ValueError, lambda t=tokens, m=mine: m.take(t), f"take {tokens} of at most 10, with a debt")

    def test_often(self, impl):
        """to look changes nothing: a million looks or none"""
        clock, mine, right = self.both(impl, 0.5, 100)
        mine.take(100), right.take(100)
        for _ in range(3000):
            clock.now += 0.01
            mine.level()
        expect_close("level after 30 s, looked at 3,000 times", mine.level(), right.level(), 1e-6)

    def test_two(self, impl):
        """two buckets share nothing"""
        clock = Clock()
        one, two = impl(1, 5, clock), impl(1, 5, clock)
        one.take(5)
        expect_close("level of the other one", two.level(), 5)
        clock.now += 2
        three = impl(1, 5, Clock())
        expect_close("level of the first one, by its own clock", one.level(), 2)
        expect_close("level of one with another clock", three.level(), 5)

    def test_random(self, impl):
        """many scripts"""
        draw = random.Random(4)
        for case in range(80):
            rate, burst = draw.choice((0.5, 2, 8)), draw.choice((1, 6, 32))
            script = [("level",)]  # whoever asks the clock late has not seen it step back before
            for _ in range(20):
                script.append(draw.choice((
                    ("wait", draw.choice((0, 0.125, 0.5, 3, -0.5))), ("level",),
                    ("take", draw.randint(0, 4 * burst) / 4), ("settle", draw.randint(-2 * burst, 2 * burst) / 2),
                )))  # fmt: skip
            self.played(impl, rate, burst, script, f", case {case}")


# ---- 15.5


class Text(str):
    """A text with the hash that it might have in another process."""

    __slots__ = ()

    def __hash__(self):
        return ~str.__hash__(self)


def no_hash(value):
    raise ContractError("hash(): expected a digest that is the same in each process\n  got Python's hash of this one")


SESSIONS = [f"user-{i}" for i in range(1200)]
SOME = SESSIONS[:200]


class ReadOnly(Mapping):
    """A mapping that has what a mapping must have, and no more."""

    def __init__(self, values):
        self.values_of = values

    def __getitem__(self, name):
        return self.values_of[name]

    def __iter__(self):
        return iter(self.values_of)

    def __len__(self):
        return len(self.values_of)


def separators():
    """What may be put between a session and a name."""
    for c in string.punctuation:
        yield from (c, c * 2, c * 3, f" {c} ", f"{c} ")
    yield from ("", *string.whitespace, "  ", "\r\n", *map(chr, (*range(9), *range(14, 33), 127)))
    yield from ('", "', "', '", '","', "->", "=>", "\0\0", "<|>", "x", "0")
    yield from "\x80\x85\xa0§¦¬¶·\u200b\u2013\u2014\u2016\u2020\u2022\u2026\u2028\u20ac"
    yield from "\u2190\u2192\u21d2\u241e\u241f\ufeff\ufffd\uffff🔑"


@exercise("15.5", "home")
class TestHome:
    def homes(self, impl, replicas, sessions=SESSIONS):
        before = list(replicas.items())
        with patch("builtins.hash", no_hash):
            found = [impl(session, replicas) for session in sessions]
        expect_untouched([("replicas", list(replicas.items()), before)])
        for one in found[:50]:
            expect(one in replicas, f"expected a name of {list(replicas)}\n  got {one!r}")
        return found

    def shares(self, impl, replicas, sessions=SESSIONS):
        homes, total = self.homes(impl, replicas, sessions), sum(replicas.values())
        for name, weight in replicas.items():
            wanted, got = weight / total, homes.count(name) / len(homes)
            near = 4.5 * math.sqrt(wanted * (1 - wanted) / len(homes)) + 2 / len(homes)
            expect(abs(got - wanted) <= near, f"share of {name!r} in {replicas}: expected {wanted:.3f} of all sessions"
                   f"\n  got {got:.3f}")  # fmt: skip

    def unlike(self, cases, why):
        """cases: 40 or more pairs of homes, each as likely equal as not: they must not be equal in all, or in none."""
        kinds = set()
        for one, other in cases:
            kinds.add(one == other)
            if len(kinds) == 2:
                return
        expect(False, f"{why}: expected homes that tell nothing about each other's\n"
               f"  got {'the same' if kinds == {True} else 'the other'} one each time")  # fmt: skip

    def test_even(self, impl):
        """equal weights: equal shares"""
        self.shares(impl, {"a": 1, "b": 1}, SESSIONS[:800])
        self.shares(impl, {f"http://10.0.0.{i}:8000": 1.0 for i in range(8)}, SESSIONS[:500])
        self.shares(impl, dict.fromkeys(string.ascii_lowercase[:5], 0.001), SESSIONS[:500])

    def test_weights(self, impl):
        """shares by weight, at any scale"""
        self.shares(impl, {"a": 2, "b": 1})
        self.shares(impl, {"a": 10.0, "b": 30.0, "c": 60.0}, SESSIONS[:800])
        self.shares(impl, {"a": 1.49e-2, "b": 0.95e-2})
        self.shares(impl, {"a": 99, "b": 1}, SESSIONS[:800])
        self.shares(impl, {"a": 2**60, "b": 2**61}, SESSIONS[:600])
        self.shares(impl, {"a": 1e-100, "b": 3e-100}, SESSIONS[:600])
        self.shares(impl, {"a": 1, **{f"r{i}": 1e-5 for i in range(2)}, "b": 2e-3}, SOME)
        huge = set(self.homes(impl, dict.fromkeys("abc", 1e308), SOME[:60]))
        expect_equal("homes with three weights of 1e308", huge, {"a", "b", "c"})

    def test_zero(self, impl):
        """weight 0: home to none"""
        expect(self.homes(impl, {"a": 1, "b": 1}, SOME) == self.homes(impl, {"z": 0, "a": 1, "b": 1, "c": 0.0}, SOME),
               "weight 0: expected no session to move when such a replica comes\n  got moves")  # fmt: skip
        expect_equal("homes with weights 0 and 1", set(self.homes(impl, {"a": 0, "b": 1}, SOME)), {"b"})
        tiny = set(self.homes(impl, {"a": 0, "b": 1e-9, "c": 0.0}, SOME))
        expect_equal("homes with weights 0, 1e-9 and 0", tiny, {"b"})

    def test_one(self, impl):
        """one replica: home to all, at any weight"""
        for weight in (1, 1e-9, 1e9, 5):
            expect_equal("homes", set(self.homes(impl, {"only": weight}, SOME[:200])), {"only"})

    def test_goes(self, impl):
        """a replica goes: only its sessions move"""
        for weights in ([1] * 6, [3, 1, 2, 5, 1, 8]):
            before = dict(zip("abcdef", weights, strict=True))
            homes = self.homes(impl, before, SOME)
            for gone in "adf":
                now = self.homes(impl, {n: w for n, w in before.items() if n != gone}, SOME)
                moved = {(a, b) for a, b in zip(homes, now, strict=True) if a != b}
                expect({a for a, _ in moved} == {gone}, f"{gone!r} of {before} goes: expected moves from there alone\n"
                       f"  got moves {sorted(moved)[:6]}")  # fmt: skip
                spread = weights[0] == 3 or len(moved) >= 4
                expect(spread, f"{gone!r} of {before} goes: expected its sessions to spread over the others\n"
                       f"  got moves {sorted(moved)}")  # fmt: skip

    def test_comes(self, impl):
        """a replica comes: sessions move to it alone, its share of them"""
        before = {"a": 1, "b": 1, "c": 2}
        sessions = SESSIONS[:600]
        pairs = zip(self.homes(impl, before, sessions), self.homes(impl, {"new": 1, **before}, sessions), strict=True)
        moved = [(a, b) for a, b in pairs if a != b]
        expect({b for _, b in moved} == {"new"}, f"'new' comes: expected moves to it alone\n  got {sorted(moved)[:6]}")
        share = len(moved) / len(sessions)
        expect(abs(share - 0.2) < 0.07, f"'new' comes: expected 0.2 of all sessions to move\n  got {share:.3f}")

    def test_weight_changes(self, impl):
        """a weight rises: sessions move to it alone; it falls: from it alone"""
        before = {"a": 2, "b": 1, "c": 1, "d": 4}
        homes = self.homes(impl, before, SOME)
        for name, weight in itertools.product(("a", "b", "d"), (0.5, 1.5, 50)):
            now = self.homes(impl, {**before, name: weight}, SOME)
            moved = {(a, b) for a, b in zip(homes, now, strict=True) if a != b}
            side = {b for _, b in moved} if weight > before[name] else {a for a, _ in moved}
            expect(side <= {name}, f"weight of {name!r} from {before[name]} to {weight}: expected moves of its sessions"
                   f" alone\n  got {sorted(moved)[:6]}")  # fmt: skip

    def test_order(self, impl):
        """the order of the mapping does not count, nor do calls before"""
        replicas = {"x": 1, "a": 2, "m": 1, "b": 1}
        first = self.homes(impl, replicas, SOME)
        expect(self.homes(impl, dict(reversed(replicas.items())), SOME) == first,
               "expected the same homes with the mapping reversed\n  got others")  # fmt: skip
        read_only = ReadOnly(replicas)
        expect([impl(s, read_only) for s in SOME[:50]] == first[:50], "a mapping that is no dict: expected the same"
               " homes\n  got others")  # fmt: skip
        self.homes(impl, {"x": 1}, SOME)
        self.homes(impl, {"x": 0, "q": 1}, SOME)
        expect(self.homes(impl, dict(sorted(replicas.items())), SOME[::-1]) == first[::-1],
               "expected the same homes after other calls\n  got others")  # fmt: skip

    def test_ties(self, impl):
        """a difference of 1e-9 in weights moves nobody: no two pairs come out equal"""
        names = string.ascii_lowercase
        first = self.homes(impl, dict.fromkeys(names, 1), SOME[:120])
        second = self.homes(impl, {name: 1 + 1e-9 * i for i, name in enumerate(names)}, SOME[:120])
        moved = sum(a != b for a, b in zip(first, second, strict=True))
        expect(moved == 0, "weights that differ by 1e-9: expected no session of 120 to move\n"
               f"  got {moved}: are there enough bits in a pair's number?")  # fmt: skip

    def test_pairs(self, impl):
        """pairs that read the same in one piece are different pairs"""
        for sep in separators():
            for where in ("behind", "in front of"):
                # One text if the session comes first (last), then sep, then the name: whether "c" or "e" wins, the same
                if where == "behind":
                    session, inner = "{}" + sep + "x", "x" + sep + "{}"
                else:
                    session, inner = "x" + sep + "{}", "{}" + sep + "x"
                long = {inner.replace("{}", name): name for name in "ce"}
                cases = ((impl(session.replace("{}", f"t{i}"), {"c": 1, "e": 1}),
                          long.get(impl(f"t{i}", dict.fromkeys(long, 1)))) for i in range(48))  # fmt: skip
                self.unlike(cases, f"{sep + 'x'!r} {where} the session, or at the other side of it in the name")

    def test_lengths(self, impl):
        """the same, where lengths and texts run into each other"""
        # cut: the first session, what its names begin with, the second session, what its names begin with
        for what, cut in (("1 and 11", lambda t: ("1", t[:11], t[:11], "")),
                          ("11 and 1", lambda t: (t[0], t[1:11], t[:11], "")),
                          ("2 and 12", lambda t: (t, "", t[:-11], t[-11:]))):  # fmt: skip
            cases = []
            for i in range(48):
                one, before, other, between = cut(f"{i:02}abcdefghijklmn")
                ends = ("c1", "e1") if what == "2 and 12" else "ce"
                a = impl(one, {before + end: 1 for end in ends})
                b = impl(other, {between + end[0]: 1 for end in ends})
                cases.append((a.removeprefix(before)[:1], b.removeprefix(between)[:1]))
            self.unlike(cases, f"sessions and names of lengths {what}")

    def test_sides(self, impl):
        """a session called as a replica, and the other way round"""
        for i in range(80):
            names = [f"{c}{i}" for c in "abc"]
            # Were (a, b) as good as (b, a), the three could not all prefer their left neighbor, nor their right one.
            won = [impl(one, {names[k - 2]: 1, names[k - 1]: 1}) == names[k - 1] for k, one in enumerate(names)]
            if len(set(won)) == 1:
                return
        expect(False, "pairs (a, b) and (b, a): expected homes that tell nothing about each other's\n"
               "  got the same preference for both")  # fmt: skip

    def test_alike(self, impl):
        """sessions that are nearly alike have homes of their own; so have names"""
        alike = {"case": ("a{}b", "a{}B"), "case, at the begin": ("a{}", "A{}"), "a space behind": ("{}", "{} "),
                 "a space before": ("{}", " {}"), "a tab": ("{}", "{}\t"), "a newline": ("{}", "{}\n"),
                 "a NUL": ("{}", "{}\0"), "surrogates": ("{}\ud800", "{}\ud801"),
                 "a surrogate and ?": ("{}\ud800", "{}?"), "a surrogate and U+FFFD": ("{}\ud800", "{}\ufffd"),
                 "a surrogate or none": ("{}\ud800", "{}"),
                 "a surrogate, written": ("{}\ud800", "{}\\ud800"), "one, as in XML": ("{}\ud800", "{}&#55296;"),
                 "composed or not": ("á{}", "a\u0301{}"), "width": ("a{}", "\uff41{}"), "zeros": ("{}", "0{}"),
                 "a slash behind": ("http://{}", "http://{}/"), "scheme": ("http://{}", "https://{}"),
                 "a scheme or none": ("http://{}", "{}"), "port": ("10.0.0.{}:8000", "10.0.0.{}:8001"),
                 "user-": ("user-{}", "{}"), "quotes": ("{}", '"{}"'), "order": ("ab{}", "ba{}"),
                 "the end of a long one": ("x" * 5000 + "{}", "x" * 5000 + "{}y"),
                 "the begin of a long one": ("{}" + "x" * 5000, "y{}" + "x" * 5000)}  # fmt: skip
        for what, forms in alike.items():
            sessions = ([form.replace("{}", str(i)) for form in forms] for i in range(1, 49))
            homes = ([impl(session, {"a": 1, "b": 1}) for session in pair] for pair in sessions)
            self.unlike(homes, f"sessions that differ in {what}")
            one, other = (form.replace("{}", "1") for form in forms)
            homes = ((impl(session, {one: 1, other: 1}), one) for session in SOME[:48])
            self.unlike(homes, f"names that differ in {what}")

    def test_alike_shares(self, impl):
        """names that are nearly alike, and long ones, have shares of their own"""
        long = "http://replica-of-a-long-name.in-a-long-name-space.svc.cluster.local:8000/" + "x" * 300
        self.shares(impl, {f"{long}{i}": 1 for i in range(3)}, SOME)
        self.shares(impl, {f"10.0.0.1:800{i}": 1 for i in range(3)}, SOME)
        self.shares(impl, dict.fromkeys(("\ud800", "\ud801", "?", "\n"), 1), SOME)
        self.shares(impl, {"r1": 1, "r2": 1, "r3": 1}, ["a" * i for i in range(400)])
        texts = [f"{c}{i}" for i in range(100) for c in ("", "é", "\ud800")]
        self.shares(impl, {"": 1, " ": 1, "\ud800": 1, "é": 1}, texts)
        self.shares(impl, {"a": 1, "A": 1, "a ": 1}, [f" {i}" for i in range(300)])
        expect(impl("", {"": 1}) == "", "expected the home '' of session ''\n  got another one")

    def test_processes(self, impl):
        """the same home where texts have other hashes, as in another process"""
        for session in SOME[:100]:
            wanted = impl(session, {"a": 1, "b": 1, "c": 2, "d": 1})
            got = impl(Text(session), {Text(name): weight for name, weight in (("a", 1), ("b", 1), ("c", 2), ("d", 1))})
            expect(got == wanted, "expected a home that does not depend on hashes of texts, which differ from process"
                   f" to process\n  got {got!r} and {wanted!r} for session {session!r}")  # fmt: skip

    def test_errors(self, impl):
        """nobody to go to, and weights that are none"""
        for replicas in ({}, {"a": 0}, {"a": 0, "b": 0.0}, {"a": -1}, {"a": 1, "b": -1}, {"a": NAN, "b": 1}, {"a": INF},
                         {"b": 1, "a": NAN}, {"a": 1, "b": INF}, {"a": -INF, "b": 1}, {"a": NAN}, {"a": 0, "b": NAN},
                         {"a": 0, "b": INF}, {"a": 1, "b": NAN, "c": 2}):  # fmt: skip
            for session in ("s", "t", "u"):
                expect_raises(ValueError, lambda r=replicas, s=session: impl(s, r), f"replicas {replicas}")


# ---- 15.6


class TheChoices:
    def __init__(self, n, draw):
        self.draw, self.state = draw, {i: [0, 0] for i in range(n)}  # [own, others]; absent: lost

    def choose(self):
        drawn = self.draw()
        left = [i for i in drawn if i in self.state] or sorted(self.state)
        if not left:
            return None
        best = left[0]
        for i in left[1:]:
            if sum(self.state[i]) < sum(self.state[best]):
                best = i
        self.state[best][0] += 1
        return best

    def finished(self, replica):
        self.state[replica][0] -= 1

    def report(self, replica, requests):
        own = self.state.setdefault(replica, [0, 0])[0]
        self.state[replica][1] = max(0, requests - own)

    def lost(self, replica):
        self.state.pop(replica, None)


@exercise("15.6", "TwoChoices")
class TestTwoChoices:
    def played(self, impl, n, script, draws, what=""):
        """script: ("choose",), ("finished", i), ("report", i, requests), ("lost", i)"""
        used = [0, 0]

        def drawer(who):
            def draw():
                used[who] += 1
                return draws[(used[who] - 1) % len(draws)]

            return draw

        mine, right = impl(n, drawer(0)), TheChoices(n, drawer(1))
        for at, (name, *values) in enumerate(script):
            got, wanted = getattr(mine, name)(*values), getattr(right, name)(*values)
            if name == "choose":
                pair = draws[(used[1] - 1) % len(draws)]
                if got == wanted and used[0] == used[1]:  # the message is long to write
                    continue
                said = f"choose() between {pair}, call {at} of {script[: at + 1]}{what}"
                expect_equal(said, got, wanted)
                expect(used[0] == used[1], f"{said}: expected one call of draw\n  got {used[0] - used[1] + 1}")
            else:
                expect(used[0] == used[1], f"{name}: expected no call of draw\n  got {used[0] - used[1]}")

    def test_less(self, impl):
        """the less loaded of the two, not of all"""
        script = [("report", 0, 5), ("report", 1, 3), ("report", 2, 0), ("choose",)]
        self.played(impl, 3, script, [(0, 1)])
        self.played(impl, 3, script, [(1, 0)])
        self.played(impl, 3, script, [(0, 2)])
        self.played(impl, 40, [("report", 31, 7), ("choose",), ("choose",), ("lost", 17), ("choose",)], [(31, 17)])
        for less in (70_000, 2**40 - 1):
            self.played(impl, 2, [("report", 0, less + 1), ("report", 1, less), ("choose",)], [(0, 1)])
            self.played(impl, 2, [("report", 0, less), ("report", 1, less), ("choose",), ("choose",)], [(1, 0)])

    def test_ties(self, impl):
        """of equal ones the first drawn"""
        self.played(impl, 4, [("choose",)], [(3, 1)])
        self.played(impl, 4, [("choose",), ("choose",)], [(3, 1), (1, 2)])
        self.played(impl, 4, [("report", 3, 2), ("report", 1, 2), ("choose",)], [(3, 1)])

    def test_own(self, impl):
        """what was sent counts at once, until it has finished"""
        self.played(impl, 2, [("choose",)] * 4, [(0, 1)])
        self.played(
            impl, 2, [("choose",), ("choose",), ("choose",), ("finished", 1), ("finished", 0), ("choose",)], [(0, 1)]
        )
        self.played(impl, 2, [("report", 0, 2), *[("choose",)] * 5], [(0, 1)])

    def test_report(self, impl):
        """a report replaces what was known of others; own requests are among it, and are not counted twice"""
        one = [("choose",)] * 3  # 0, 1, 0
        self.played(impl, 2, [*one, ("report", 0, 2), ("report", 1, 2), ("choose",)], [(0, 1)])
        self.played(impl, 2, [("report", 0, 9), ("report", 0, 1), ("report", 1, 2), ("choose",)], [(1, 0)])
        self.played(impl, 2, [*one, ("report", 0, 5), ("report", 1, 4), ("choose",), ("choose",)], [(0, 1)])

    def test_old_report(self, impl):
        """a report below the own requests: others are 0, not less"""
        one = [("choose",)] * 6
        self.played(impl, 2, [*one, ("report", 0, 0), ("choose",), ("choose",)], [(1, 0)])
        self.played(
            impl, 2, [*one, ("report", 0, 1), ("finished", 0), ("finished", 0), ("finished", 1), ("choose",)], [(0, 1)]
        )

    def test_finished_after_report(self, impl):
        """an own request that ends is gone at once; others stay as reported"""
        script = [
            ("choose",),
            ("choose",),
            ("report", 0, 4),
            ("report", 1, 3),
            ("finished", 0),
            ("choose",),
            ("choose",),
        ]
        self.played(impl, 2, script, [(0, 1)])
        self.played(impl, 2, [*script, ("finished", 1), ("choose",)], [(1, 0)])

    def test_lost(self, impl):
        """a lost one gets nothing; of two lost ones the least loaded of the rest"""
        self.played(impl, 4, [("lost", 0), ("report", 1, 9), ("choose",)], [(0, 1)])
        self.played(impl, 4, [("lost", 1), ("report", 0, 9), ("choose",)], [(0, 1)])
        self.played(impl, 4, [("lost", 0), ("lost", 1), ("report", 2, 4), ("report", 3, 2), ("choose",)], [(0, 1)])
        self.played(impl, 4, [("lost", 3), ("lost", 2), ("choose",), ("choose",), ("choose",)], [(2, 3)])
        self.played(impl, 4, [("lost", 0), ("lost", 1), *[("choose",)] * 3, ("finished", 2), ("choose",)], [(1, 0)])
        self.played(impl, 3, [("lost", 0), ("lost", 1), ("report", 2, 99), ("choose",)], [(1, 0)])

    def test_rest(self, impl):
        """of more than ten replicas the smallest number, too"""
        for left in ({73, 90, 128}, {9, 16, 100}, {2, 10}, {8, 1}):
            gone = [("lost", i) for i in range(130) if i not in left]
            self.played(impl, 130, [*gone, *[("choose",)] * 4], [(0, 129)], f", {sorted(left)} are left")
        gone = [("lost", i) for i in range(12) if i not in (3, 11)]
        self.played(impl, 12, [*gone, ("lost", 3), ("report", 3, 0), *[("choose",)] * 2], [(0, 1)], ", 3 was back")

    def test_long(self, impl):
        """many requests of our own"""
        script = [("report", 1, 60), *[("choose",)] * 70, ("report", 0, 7), ("report", 1, 200), *[("choose",)] * 140]
        self.played(impl, 2, script, [(0, 1)])

    def test_none(self, impl):
        """all lost: None"""
        self.played(impl, 2, [("lost", 0), ("lost", 1), ("choose",), ("report", 1, 3), ("choose",)], [(0, 1)])
        self.played(impl, 1, [("lost", 0), ("choose",)], [(0, 0)])

    def test_back(self, impl):
        """back with its next report, with no request of ours and what it reports"""
        script = [*[("choose",)] * 4, ("lost", 0), ("report", 0, 1), ("choose",), ("choose",)]
        self.played(impl, 2, script, [(0, 1)])
        self.played(impl, 2, [("report", 0, 5), ("lost", 0), ("report", 0, 0), ("choose",)], [(1, 0)])
        self.played(impl, 2, [("report", 0, 5), ("lost", 0), ("report", 0, 0), ("report", 1, 1), ("choose",)], [(1, 0)])
        self.played(
            impl, 2, [("choose",), ("choose",), ("lost", 0), ("lost", 0), ("report", 0, 2), ("choose",)], [(0, 1)]
        )

    def test_one(self, impl):
        """one replica, drawn twice: one request each"""
        self.played(impl, 1, [("choose",), ("choose",), ("finished", 0)], [(0, 0)])
        script = [*[("choose",)] * 3, ("report", 1, 3), ("choose",), ("choose",)]
        self.played(impl, 2, script, [(0, 0), (1, 1), (0, 0), (0, 1), (0, 1)])

    def test_two_routers(self, impl):
        """two routers share nothing"""
        one, two = impl(2, lambda: (0, 1)), impl(2, lambda: (0, 1))
        one.choose()
        one.report(1, 7)
        expect_equal("choose() of the other one", two.choose(), 0)

    def test_random(self, impl):
        """many scripts"""
        draw = random.Random(6)
        for case in range(100):
            n = draw.randint(1, 6)
            draws = [[draw.sample(range(n), 2), (0, 0)][n == 1] if n > 1 else (0, 0) for _ in range(40)]
            script, right, used = [], None, iter(draws * 9)
            right = TheChoices(n, lambda u=used: next(u))
            for _ in range(40):
                kind = draw.choice(("choose", "choose", "choose", "finished", "report", "lost"))
                busy = [i for i, (own, _) in right.state.items() if own]
                if (kind == "finished" and not busy) or (kind == "lost" and draw.random() < 0.6):
                    kind = "choose"
                step = {"choose": ("choose",), "finished": ("finished", draw.choice(busy or [0])),
                        "report": ("report", draw.randrange(n), draw.randint(0, 6)),
                        "lost": ("lost", draw.randrange(n))}[kind]  # fmt: skip
                getattr(right, step[0])(*step[1:])
                script.append(step)
            self.played(impl, n, script, draws, f", case {case}")


# ---- 15.7

DIGESTS = {"small": "aa11", "large": "bb22", "alias": "aa11"}


def asked(**fields):
    return {"model": "small", "temperature": 0, "messages": [{"role": "user", "content": "Hi"}], **fields}


@exercise("15.7", "cache_key")
class TestCacheKey:
    def key(self, impl, body, client="key-1", digests=DIGESTS):
        before, named = copy.deepcopy(body), dict(digests)
        with patch("builtins.hash", no_hash):
            got = impl(client, body, digests)
        expect_untouched([("body", body, before), ("digests", dict(digests), named)])
        expect(got is None or isinstance(got, str), f"expected a text or None\n  got {type(got).__name__}")
        if got is not None:
            fine = 0 < len(got) <= 128 and all("!" <= c <= "~" for c in got.replace(" ", "x"))
            expect(fine, f"key: expected at most 128 printable ASCII characters\n  got {got!r:.200}")
        return got

    def test_room(self, impl):
        """a key has room for a digest: of short ones two requests soon have the same"""
        got = self.key(impl, asked()) or ""
        expect(len(got) >= 11, f"key: expected 64 bits or more, which take 11 characters at least\n  got {got!r}")
        keys = [impl("key-1", asked(max_tokens=i), DIGESTS) or "" for i in range(256)]
        kinds = [len(set(column)) for column in itertools.zip_longest(*keys)]
        bits = sum(map(math.log2, kinds))
        expect(bits > 60, f"keys of 256 requests: expected 64 bits or more that change\n  got {bits:.0f}: {keys[:3]}")
        expect(len(set(keys)) == 256, "keys of 256 requests: expected 256\n  got fewer")
        columns = list(zip(*keys, strict=False))
        twice = next(((i, k) for i, k in itertools.combinations(range(len(columns)), 2)
                      if kinds[i] > 1 and columns[i] == columns[k]), None)  # fmt: skip
        expect(
            twice is None, f"keys: expected 64 bits or more of a digest\n  got some of its characters twice: {keys[:3]}"
        )

    def one(self, impl, a, b, why, **more):
        ka, kb = self.key(impl, a, **more), self.key(impl, b, **more)
        expect(ka is not None and ka == kb, f"{why}: expected one key\n  got {ka} for {a}\n  and {kb} for {b}")

    def two(self, impl, a, b, why):
        ka, kb = self.key(impl, a), self.key(impl, b)
        expect(None not in (ka, kb) and ka != kb, f"{why}: expected two keys\n  got {ka} for {a}\n  and {kb} for {b}")

    def differ(self, impl, bodies, why):
        """Each has a key of its own."""
        found = {}
        for body in bodies:
            key = self.key(impl, body)
            expect(key is not None, f"{why}: expected a key\n  got None for {body!r:.300}")
            other = found.setdefault(key, body)
            expect(other is body, f"{why}: expected two keys\n  got {key} for {other!r:.300}\n  and {body!r:.300}")

    def none(self, impl, body, why):
        got = self.key(impl, body)
        expect(got is None, f"{why}: expected None\n  got {got} for {body}")

    def test_equal(self, impl):
        """the same request, the same key; another question, another key"""
        self.one(impl, asked(), asked(), "equal requests")
        self.two(impl, asked(), asked(messages=[{"role": "user", "content": "Ho"}]), "another text")
        self.two(impl, asked(), asked(messages=[{"role": "system", "content": "Hi"}]), "another role")

    def test_determined(self, impl):
        """None unless temperature 0 or seeded; a missing temperature is 1"""
        sampled = asked()
        del sampled["temperature"]
        self.none(impl, sampled, "no temperature")
        for value in (1, 0.7, 1e-9, 1e-300, None, 2.0):
            self.none(impl, asked(temperature=value), f"temperature {value}")
            self.none(impl, asked(temperature=value, seed=None), f"temperature {value}, seed null")
            self.one(impl, asked(temperature=value, seed=0), asked(temperature=value, seed=0), "seed 0")
            self.one(impl, asked(temperature=value, seed=7), asked(temperature=value, seed=7), "a seed")
            self.two(impl, asked(temperature=value, seed=7), asked(temperature=value, seed=8), "two seeds")
            self.two(impl, asked(temperature=value, seed=0), asked(temperature=value, seed=8), "seeds 0 and 8")
        self.two(impl, asked(temperature=0.5, seed=1), asked(temperature=0.6, seed=1), "temperatures")
        self.two(impl, asked(temperature=0.5, seed=1, top_p=0.5), asked(temperature=0.5, seed=1), "top_p")
        self.two(impl, asked(temperature=0.5, seed=1), asked(), "drawn and greedy")

    def test_greedy(self, impl):
        """temperature 0: seed and top_p have no effect, others have"""
        for zero in (0, 0.0, -0.0):
            self.one(impl, asked(), asked(temperature=zero, seed=5, top_p=0.3), "greedy")
        self.two(impl, asked(), asked(n=2), "n")
        self.two(impl, asked(), asked(top_k=5), "top_k")

    def test_model(self, impl):
        """by its digest; None for one that is not known"""
        self.one(impl, asked(), asked(model="alias"), "two names of one model")
        self.two(impl, asked(), asked(model="large"), "two models")
        for model in ("huge", "", "Small", "aa11", None, "small ", " small", "small:latest", "org/small", 5, True):
            self.none(impl, asked(model=model), f"model {model!r}")
        without = asked()
        del without["model"]
        self.none(impl, without, "no model")
        expect(
            self.key(impl, asked(), digests={"small": ""}) is not None, "an empty digest: expected a key\n  got None"
        )
        same = impl("k", asked(), ReadOnly(DIGESTS)) == impl("k", asked(), DIGESTS)
        expect(same, "digests that are no dict: expected the same key\n  got another")
        changed = self.key(impl, asked(), digests={"small": "cc33"}) != self.key(impl, asked())
        for a, b in (("AB", "ab"), ("0" * 63 + "1", "0" * 63 + "2"), ("1" + "0" * 63, "2" + "0" * 63), ("1", "1 ")):
            one, two = (self.key(impl, asked(), digests={"small": digest}) for digest in (a, b))
            expect(one != two, f"digests {a!r} and {b!r}: expected two keys\n  got one")
        expect(changed, "a model of the same name with other weights: expected another key\n  got the same")

    def test_client(self, impl):
        """each client has keys of its own, which do not tell it"""
        secret = "sk-4f6a81c2b7"
        one, two = self.key(impl, asked(), secret), self.key(impl, asked(), "sk-4f6a81c2b8")
        expect(one is not None and one != two, "two clients: expected two keys\n  got one")
        expect(secret not in one, f"key: expected it without the client\n  got {one}")
        clients = ["", " ", "a", "a ", " a", "a\n", "a\0", "A", "é", "e", "?", "\ud800", "\ud801", "\ufffd",
                   "\\ud800", "\u00e1", "a\u0301", "\uff41", "ab", "aB", "ba", "Bearer a", "sk-a", "null", "None",
                   "\ufeffa"]  # fmt: skip
        clients += ["k" * length + end for length in (63, 64, 100, 1000) for end in ("", "a", "b", "\0")]
        found = {}
        for client in clients:
            key = self.key(impl, asked(), client)
            other = found.setdefault(key, client)
            expect(key is not None and other == client, f"clients {other!r:.200} and {client!r:.200}: expected two keys"
                   f"\n  got {key}")  # fmt: skip

    def test_client_parts(self, impl):
        """no part of a key tells a part of the client"""
        draw = random.Random(7)
        rest = ["".join(draw.choices(string.ascii_letters + string.digits, k=8)) for _ in range(10)]
        for what, form in (("begin", "{0}{1}"), ("end", "{1}{0}"), ("middle", "{2}{0}{1}")):
            columns = []
            for part in ("QzWyKx", "jTfVhp"):
                clients = [form.format(part, one, one[::-1]) for one in rest]
                keys = [impl(client, asked(), DIGESTS) or "" for client in clients]
                columns.append([set(column) for column in zip(*keys, strict=False)])
                columns.append([set(column) for column in zip(*(key[::-1] for key in keys), strict=False)])
            for one, other in (columns[::2], columns[1::2]):
                tell = [i for i, (a, b) in enumerate(zip(one, other, strict=False)) if len(a) == len(b) == 1 and a != b]
                expect(not tell, f"keys of clients with the same {what}: expected nothing that tells it\n"
                       f"  got it from {len(tell)} characters of {self.key(impl, asked(), clients[0])}")  # fmt: skip

    def test_parts(self, impl):
        """client, digest and fields do not run into each other"""
        digests = {"x": "ab", "y": "b", "z": ""}
        for (c1, m1), (c2, m2) in ((("k", "x"), ("ka", "y")), (("kab", "z"), ("k", "x")), (("ab", "z"), ("", "x"))):
            one = self.key(impl, asked(model=m1), c1, digests)
            two = self.key(impl, asked(model=m2), c2, digests)
            expect(one != two, f"client {c1!r}, digest {digests[m1]!r} and {c2!r}, {digests[m2]!r}: expected two keys")
        for sep in (":", "|", "\n", "\0", "/", ",", '", "', " "):
            digests = {"x": f"b{sep}c", "y": "c"}
            one, two = (
                self.key(impl, asked(model="x"), "a", digests),
                self.key(impl, asked(model="y"), f"a{sep}b", digests),
            )
            expect(one != two, f"client 'a', digest {digests['x']!r} and {f'a{sep}b'!r}, 'c': expected two keys")

    def test_without_effect(self, impl):
        """what does not decide"""
        for name in ("stream", "stream_options", "user", "metadata", "timeout", "priority"):
            for value in (True, "x", {"a": 1}, 3):
                self.one(impl, asked(), asked(**{name: value}), name)

    def test_all_fields(self, impl):
        """all other fields count, known or not"""
        for name, value in {"max_tokens": 5, "stop": "x", "logit_bias": {"5": 1}, "top_k": 3, "tools": [],
                            "echo": False,
                            "response_format": {"type": "json_object"}, "chat_template_kwargs": {"think": True},
                            "cache_salt": "s", "structured_outputs": {"regex": "a"}, "never_heard_of": 0, "n": 2,
                            "logprobs": True, "presence_penalty": 0.5, "frequency_penalty": -1, "Stream": True,
                            "min_p": 0, "best_of": 1, "repetition_penalty": 1, "Seed": 3, "_x": 1, "": 1,
                            "max_completion_tokens": 0, "min_tokens": 0, "suffix": "", "ignore_eos": False,
                            "metadata2": {}, "functions": [], "stop_token_ids": {}, "timeouts": 0}.items():  # fmt: skip
            self.two(impl, asked(), asked(**{name: value}), name)
        self.two(impl, asked(max_tokens=5), asked(max_tokens=6), "max_tokens")
        self.two(impl, asked(max_tokens=5), asked(min_tokens=5), "names of fields")
        self.two(impl, asked(stop=["a", "b"]), asked(stop=["ab"]), "stops")
        self.two(impl, asked(a="b", c="d"), asked(a='b", "c": "d'), "quotes")
        self.differ(impl, [asked(**{name: 5}) for name in ("max_tokens", "max_completion_tokens", "top_k", "n", "N")],
                    "names of fields")  # fmt: skip
        for name in ("tools", "stop", "messages", "logit_bias", "never_heard_of", "prompt"):
            empty = (0, "", [], {}, False, [[]], [{}], [None], "null", "0")
            self.differ(impl, [asked(), *(asked(**{name: value}) for value in empty if name != "messages" or value)],
                        f"{name}, not given or empty")  # fmt: skip

    def test_forms(self, impl):
        """what another server would take for the same is not: all is as it was written"""
        self.differ(
            impl, [asked(prompt=value) for value in ("Hi", ["Hi"], [["Hi"]], [72, 105], {"text": "Hi"})], "prompts"
        )
        part = {"type": "text", "text": "Hi"}
        contents = ("Hi", [part], [part, part], "HiHi", [{"type": "text", "text": "HiHi"}], part, ["Hi"])
        turns = [[{"role": "user", "content": content}] for content in contents]
        turns += [[{"role": "user", "content": "Hi", **more}] for more in ({"name": None}, {"name": ""}, {"name": "a"})]
        self.differ(impl, [asked(messages=turn) for turn in turns], "contents")
        choice = {"type": "function", "function": {"name": "f"}}
        self.differ(impl, [asked(tool_choice=value) for value in ("f", choice, "auto", "none", ["f"])], "tool_choice")
        self.differ(impl, [asked(logit_bias={name: 1}) for name in ("5", "5.0", "05", " 5", "5e0")], "logit_bias")
        many = [{"role": "user", "content": str(i)} for i in range(60)]
        other = [[*many[:i], {"role": "user", "content": "x"}, *many[i + 1 :]] for i in range(0, 60, 7)]
        self.differ(impl, [asked(messages=turn) for turn in (many, many[1:], many[:-1], *other)], "60 messages")

    def test_inner(self, impl):
        """of the body alone: inside, null and default values are values, and no name is without effect"""
        deep = {"user": 1, "stream": True, "model": "q", "seed": 3, "top_p": 0.5}
        for name, value in deep.items():
            self.two(impl, asked(extra={}), asked(extra={name: value}), f"extra.{name}")
        self.two(impl, asked(extra={}), asked(extra={"a": None}), "null inside")
        self.two(impl, asked(extra={}), asked(extra={"n": 1}), "n inside")
        self.two(impl, asked(extra=[]), asked(extra=[None]), "null in a list")

    def test_defaults(self, impl):
        """null and default values count as not given"""
        for name, value in {
            "top_p": 1,
            "n": 1,
            "logprobs": False,
            "presence_penalty": 0,
            "frequency_penalty": 0,
        }.items():
            self.one(impl, asked(), asked(**{name: value}), f"{name} {value}")
            if value is not False:
                self.one(impl, asked(), asked(**{name: float(value)}), f"{name} {float(value)}")
            if name.endswith("penalty"):
                self.one(impl, asked(), asked(**{name: -0.0}), f"{name} -0.0")
        for name in ("top_p", "n", "stop", "max_tokens", "seed", "never_heard_of", "stream"):
            self.one(impl, asked(), asked(**{name: None}), f"{name} null")
        drawn = {"temperature": 1, "seed": 4}
        self.one(impl, asked(**drawn), asked(temperature=None, seed=4), "temperature null")
        self.one(impl, asked(**drawn), asked(temperature=1.0, seed=4, top_p=1.0), "temperature 1.0")
        self.two(impl, asked(), asked(max_tokens=0), "0 is a value")
        self.two(impl, asked(), asked(stop=""), "an empty text is a value")

    def test_numbers(self, impl):
        """1 and 1.0 are one, true and "1" are not"""
        self.one(impl, asked(max_tokens=5), asked(max_tokens=5.0), "5 and 5.0")
        self.one(impl, asked(x=[{"y": 2}]), asked(x=[{"y": 2.0}]), "inside")
        self.one(impl, asked(x=0), asked(x=-0.0), "0 and -0.0")
        self.one(impl, asked(x=10**20), asked(x=1e20), "1e20")
        one, two = 1, 1.0
        for depth in range(1, 101):
            one, two = ([one], [two]) if depth % 3 else ({"y": one}, {"y": two})
            if depth < 9 or depth in (16, 20, 32, 50, 64, 100):
                self.one(impl, asked(x=one), asked(x=two), f"1 and 1.0 at depth {depth}")
        self.two(impl, asked(x=0.1), asked(x=math.nextafter(0.1, 1)), "adjacent floats")
        drawn = {"temperature": 0.5, "seed": 4}
        self.two(impl, asked(**drawn, top_p=True), asked(**drawn), "top_p true")
        self.two(impl, asked(temperature=True, seed=4), asked(temperature=1, seed=4), "temperature true")
        self.two(impl, asked(temperature="0", seed=4), asked(temperature="0", seed=5), 'temperature "0"')
        self.two(impl, asked(temperature=1e-300, seed=4), asked(temperature=1e-300, seed=5), "temperature 1e-300")
        values = (
            1,
            True,
            "1",
            [1],
            {"1": 1},
            1.5,
            "1.0",
            "true",
            0,
            False,
            "",
            [],
            {},
            "false",
            "0",
            10**400,
            10**400 + 1,
        )
        self.differ(impl, [asked(x=value) for value in values], "values")
        self.differ(impl, [asked(x=[{"y": value}]) for value in values], "values inside")
        self.differ(impl, [asked(temperature=1, seed=value) for value in values], "seeds")
        for name in ("top_p", "presence_penalty", "frequency_penalty", "temperature", "x"):
            steps = (0.5, math.nextafter(0.5, 1), 0.5 + 1e-9, 0.501, 0.51, 0.6, -0.5, "0.5", [0.5])
            self.differ(impl, [asked(**{"temperature": 0.3, "seed": 4, name: step}) for step in steps], name)
        self.two(impl, asked(), asked(n=True), "n true")
        self.two(impl, asked(), asked(logprobs=0), "logprobs 0")
        self.two(impl, asked(), asked(presence_penalty=False), "presence_penalty false")
        seeds = [
            2**53,
            2**53 + 1,
            2**63 - 1,
            2**63 - 2,
            2**64 + 1,
            2**32 + 1,
            1,
            -1,
            -2,
            2**63,
            10**30,
            10**30 + 1,
            -1000,
            2**64 - 1000,
        ]
        self.differ(impl, [asked(temperature=1, seed=seed) for seed in seeds], "large seeds")
        self.two(impl, asked(x=0.1), asked(x=0.1 + 1e-12), "nearly equal")

    def test_order(self, impl):
        """of fields: not, at all depths; of lists: yes"""
        self.one(impl, asked(), dict(reversed(asked().items())), "fields")
        self.one(impl, asked(x={"a": {"b": 1, "c": 2}, "d": 3}), asked(x={"d": 3, "a": {"c": 2, "b": 1}}), "inside")
        self.one(impl, asked(x=[{"b": 1, "a": 2}]), asked(x=[{"a": 2, "b": 1}]), "inside a list")
        self.two(impl, asked(stop=["a", "b"]), asked(stop=["b", "a"]), "a list")
        turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
        for name in ("messages", "tools", "stop", "documents", "never_heard_of"):
            self.two(impl, asked(**{name: turns}), asked(**{name: turns[::-1]}), f"{name} in another order")
            self.two(impl, asked(**{name: turns}), asked(**{name: [*turns, turns[0]]}), f"{name}, one of them twice")

    def test_texts(self, impl):
        """nothing is trimmed, folded or replaced"""
        texts = [
            "a",
            "A",
            " a",
            "a ",
            "a\n",
            "á",
            "a\u0301",
            "\ud800",
            "\ud801",
            "?",
            "\ufffd",
            "\\ud800",
            "",
            "a\0",
            "\u00e1 ",
            "a\r\n",
            "a\r",
            "a\t",
            "a  ",
            "\ufeffa",
            "a\u200b",
            "\uff41",
        ]
        self.differ(impl, [asked(stop=text) for text in texts], "texts")
        self.differ(impl, [asked(x={text: 1}) for text in texts], "names")
        self.differ(impl, [asked(**{text: 1}) for text in texts], "names of fields")
        long = "x" * 200_000
        self.two(impl, asked(prompt=long + "a"), asked(prompt=long + "b"), "long texts")

    def test_depth(self, impl):
        """lists in lists"""
        self.two(impl, asked(x=[[1], [2]]), asked(x=[[1, 2]]), "nested")
        self.two(impl, asked(x=[[]]), asked(x=[]), "nested")
        self.two(impl, asked(stop=["a"]), asked(stop="a"), "a list of one text")
        for sep in ("\n", ",", ", ", " ", "\0", '", "', "|"):
            self.two(impl, asked(stop=["a", "b"]), asked(stop=[f"a{sep}b"]), "a list of two texts")


# ---- 15.8

ROLE, END = {"text": ""}, {"finish": "stop"}
REQUEST = {"prompt": "Hi", "stop": ["x"], "never_heard_of": {"a": None}}


def say(*words):
    return [ROLE, *({"text": word} for word in words), END]


class Source:
    """A replica: follows a script of events and exceptions; notes what was asked of it."""

    def __init__(self, script, at_call=False, closable=True):
        self.script, self.at_call, self.closable = script, at_call, closable
        self.calls, self.asked, self.open, self.seen = 0, 0, 0, []

    def __call__(self, request):
        self.calls += 1
        self.seen.append(copy.deepcopy(request))
        if self.at_call:
            raise self.script[0]
        self.open += self.closable
        return (Stream if self.closable else Bare)(self)


class Bare:
    def __init__(self, source):
        self.source, self.left, self.done = source, iter(source.script), False

    def __iter__(self):
        return self

    def __next__(self):
        self.source.asked += 1
        one = next(self.left)
        if isinstance(one, BaseException):
            raise one
        return one


class Stream(Bare):
    def close(self):
        if not self.done:
            self.done, self.source.open = True, self.source.open - 1


@exercise("15.8", "forward")
class TestForward:
    def refused(self, impl, status, **more):
        """The exception that the implementation's notebook catches: the one of its module."""
        kind = getattr(impl, "__globals__", {}).get("Refused") or vars(sys.modules[impl.__module__]).get("Refused")
        return Source([kind(status)], **more)

    def begun(self, impl, sources):
        events = impl(sources, {})
        expect(hasattr(events, "__next__") and hasattr(events, "close"), "forward: expected a generator\n"
               f"  got {type(events).__name__}")  # fmt: skip
        return events

    def same(self, impl, sources, wanted, calls, attempts=None, what=""):
        request = copy.deepcopy(REQUEST)
        more = {} if attempts is None else {"attempts": attempts}
        got = list(impl(sources, request, **more))
        expect_equal(f"events{what}", got, wanted)
        expect_equal(f"calls of each replica{what}", [source.calls for source in sources], calls)
        for i, source in enumerate(sources):
            for seen in source.seen:
                expect_equal(f"request of replica {i}", seen, REQUEST)
        expect_equal("request, afterwards", request, REQUEST)

    def test_plain(self, impl):
        """the first replica answers: all of its events, in order"""
        self.same(impl, [Source(say("a", "b")), Source(say("c"))], say("a", "b"), [1, 0])
        self.same(impl, (Source(say("a"), closable=False),), say("a"), [1], what=", without close")
        self.same(impl, [Source([ROLE, END])], [ROLE, END], [1], what=", no text")
        self.same(impl, [Source([END])], [END], [1], what=", a finish alone")
        for why in ("length", "stop_sequence", "tool_calls", "content_filter", "error", "abort"):
            end = {"finish": why}
            self.same(
                impl, [Source([ROLE, end, ConnectionError()])], [ROLE, end], [1], what=f", finish {why!r}, no text"
            )
            script = [ROLE, {"text": "a"}, end]
            self.same(impl, [Source([*script, {"text": "b"}])], script, [1], what=f", finish {why!r}")
        more = [{"text": "", "role": "x"}, {"text": "a", "logprobs": [1]}, {"finish": "stop", "usage": {"total": 3}}]
        self.same(impl, [Source(more)], more, [1], what=", events with more fields")

    def test_before(self, impl):
        """broken before the first text: the next one, and nothing of the broken one"""
        lost = ConnectionResetError("gone")
        for script in ([lost], [ROLE, lost], [ROLE, {"usage": 3}, {"text": ""}, lost], [], [ROLE], [ROLE, ROLE]):
            for closable in (True, False):
                sources = [Source(script, closable=closable), Source(say("a"))]
                what = "" if closable else ", an iterator without close"
                self.same(impl, sources, say("a"), [1, 1], what=f", broken: {script}{what}")
        self.same(impl, [Source([lost], at_call=True), Source(say("a"))], say("a"), [1, 1], what=", refused connection")

        class Gone(ConnectionResetError):
            pass

        for kind in (ConnectionError, BrokenPipeError, ConnectionAbortedError, ConnectionRefusedError, Gone):
            self.same(impl, [Source([ROLE, kind()]), Source(say("a"))], say("a"), [1, 1], what=f", {kind.__name__}")

    def test_after(self, impl):
        """broken after it: an error, no other replica"""
        for cut in ([ConnectionResetError()], []):
            script = [ROLE, {"text": "a"}, {"text": "b"}, *cut]
            self.same(impl, [Source(script), Source(say("c"))], [*script[:3], {"error": 502}], [1, 0], what=f", {cut}")
            script = [{"text": "a"}, {"text": ""}, *cut]
            self.same(impl, [Source(script), Source(say("c"))], [*script[:2], {"error": 502}], [1, 0], what=f", {cut}")
        script = [ROLE, {"text": "a"}, ConnectionError()]
        sources = [Source([ConnectionError()]), Source(script), Source(say("c"))]
        self.same(impl, sources, [ROLE, {"text": "a"}, {"error": 502}], [1, 1, 0], what=", the second one")
        for cut in (script, script[:2]):
            sources = [self.refused(impl, 429), Source(cut), Source(say("c"))]
            self.same(impl, sources, [ROLE, {"text": "a"}, {"error": 502}], [1, 1, 0], what=f", {cut} after a refusal")
            self.same(impl, [Source(cut, closable=False), Source(say("c"))], [ROLE, {"text": "a"}, {"error": 502}],
                      [1, 0], what=", an iterator without close")  # fmt: skip
        for text in (" ", "\n", "\t", "0", "\0", "\ufeff", "\u200b", "None"):
            self.same(impl, [Source([{"text": text}]), Source(say("c"))], [{"text": text}, {"error": 502}], [1, 0],
                      what=f", {text!r} is text")  # fmt: skip

    def test_held_events(self, impl):
        """what came before the first text is given with it, in order"""
        script = [ROLE, {"text": "", "id": 1}, {"usage": 3}, {"text": "a", "id": 2}, {"text": ""}, {"usage": 4}, END]
        self.same(impl, [Source(script)], script, [1])
        self.same(impl, [Source([{"text": " "}, ConnectionError()]), Source(say("c"))], [{"text": " "}, {"error": 502}],
                  [1, 0], what=", a space is text")  # fmt: skip
        many = [{"text": "", "id": i} for i in range(500)]
        self.same(
            impl, [Source([*many, *say("a")])], [*many, *say("a")], [1], what=", 500 events before the first text"
        )
        usage = [{"usage": 1}, ROLE, {"text": "a"}, END]
        self.same(impl, [Source(usage)], usage, [1], what=", usage first")

    def test_no_room(self, impl):
        """429 and 503: the next one; at the end the last refusal's status"""
        for at_call in (True, False):
            what = ", raised by the call" if at_call else ", raised in place of the first event"
            for status in (429, 503):
                first = self.refused(impl, status, at_call=at_call)
                self.same(impl, [first, Source(say("a"))], say("a"), [1, 1], what=what)
                first = self.refused(impl, status, at_call=at_call)
                self.same(impl, [first], [{"error": status}], [1], what=what)
            pair = [self.refused(impl, s, at_call=at_call) for s in (503, 429)]
            self.same(impl, pair, [{"error": 429}], [1, 1], what=what)
            pair = [self.refused(impl, s, at_call=at_call) for s in (429, 503)]
            self.same(impl, pair, [{"error": 503}], [1, 1], what=what)
            for status in (429, 503):
                three = [self.refused(impl, status, at_call=at_call), Source([ConnectionError()]), Source(say("a"))]
                self.same(impl, three, say("a"), [1, 1, 1], what=f"{what}, then one breaks, then one answers")
            for cut in ([], [ROLE], [ROLE, ConnectionError()]):
                pair = [self.refused(impl, 429, at_call=at_call), Source(cut)]
                self.same(impl, pair, [{"error": 429}], [1, 1], what=f"{what}, then {cut}")
            pair = [self.refused(impl, 429, at_call=at_call), Source([ConnectionError()])]
            self.same(impl, pair, [{"error": 429}], [1, 1], what=f"{what}, then one breaks")

    def test_own_fault(self, impl):
        """other refusals: at once"""
        for status, at_call in itertools.product(
            (
                302,
                307,
                400,
                401,
                403,
                404,
                408,
                409,
                413,
                418,
                422,
                425,
                428,
                430,
                431,
                451,
                499,
                500,
                501,
                502,
                504,
                505,
                507,
                509,
                520,
                522,
                529,
                598,
                599,
            ),
            (True, False),
        ):
            first = self.refused(impl, status, at_call=at_call)
            self.same(impl, [first, Source(say("a"))], [{"error": status}], [1, 0], what=f", {status}")
        sources = [Source([ConnectionError()]), self.refused(impl, 400), Source(say("a"))]
        self.same(impl, sources, [{"error": 400}], [1, 1, 0], what=", the second one")
        sources = [self.refused(impl, 429), self.refused(impl, 400), Source(say("a"))]
        self.same(impl, sources, [{"error": 400}], [1, 1, 0], what=", after a 429")

    def test_none_left(self, impl):
        """nobody answers: 503"""
        self.same(impl, [Source([ConnectionError()]), Source([ROLE])], [{"error": 503}], [1, 1])
        self.same(impl, [], [{"error": 503}], [])

    def test_attempts(self, impl):
        """at most so many replicas, each once"""
        broken = [Source([ConnectionError()]) for _ in range(5)]
        self.same(impl, broken, [{"error": 503}], [1, 1, 1, 0, 0], what=", attempts 3")
        for attempts in (1, 2, 4):
            broken = [Source([ConnectionError()]) for _ in range(5)]
            calls = [1] * attempts + [0] * (5 - attempts)
            self.same(impl, broken, [{"error": 503}], calls, attempts, what=f", attempts {attempts}")
        broken = [Source([ROLE, ConnectionError()]) for _ in range(5)] + [Source(say("a"))]
        self.same(impl, broken, say("a"), [1] * 6, 6, what=", attempts 6")
        busy = [self.refused(impl, 429) for _ in range(3)] + [Source(say("a"))]
        self.same(impl, busy, [{"error": 429}], [1, 1, 1, 0], what=", refusals are attempts, too")
        self.same(impl, [Source([ConnectionError()])], [{"error": 503}], [1], 9, what=", attempts 9, one replica")
        self.same(impl, [Source(say("a"))], [{"error": 503}], [0], 0, what=", attempts 0")
        broken = [Source([ConnectionError()]), Source(say("a"))]
        expect_equal("events, attempts 1 as a third argument", list(impl(broken, {}, 1)), [{"error": 503}])

    def test_finish(self, impl):
        """nothing comes behind a finish, and nothing is asked for"""
        for more in (ConnectionError(), {"text": "late"}):
            source = Source([*say("a"), more])
            self.same(impl, [source, Source(say("b"))], say("a"), [1, 0], what=f", behind it {more!r}")
            expect_equal("events asked for", source.asked, 3)

    def test_as_they_come(self, impl):
        """no event is held back or asked for early"""
        for script in (say("a", "b", "c"), [ROLE, {"text": "a"}, ROLE, {"usage": 3}, {"text": "b"}, ROLE, END]):
            source = Source(script)
            events = self.begun(impl, [source])
            expect_equal("events asked for before the client wants one", source.asked, 0)
            for count, wanted in enumerate(script):
                expect_equal(f"event {count}", next(events), wanted)
                most = max(2, count + 1)
                expect(source.asked <= most, f"event {count}: expected at most {most} to be asked for\n"
                       f"  got {source.asked}")  # fmt: skip

    def test_closed(self, impl):
        """every iterator that was begun is closed, however it ends"""
        broken, text = ConnectionError("gone"), {"text": "a"}
        scripts = [say("a"), [END], [*say("a"), text], [ROLE, text, broken], [text], [ROLE, broken], [ROLE], []]
        for script in scripts:
            sources = [Source(script), Source(say("b"))]
            list(impl(sources, {}))
            expect_equal(f"open iterators after {script}", [source.open for source in sources], [0, 0])
        for status in (429, 400):
            sources = [self.refused(impl, status), Source([ROLE, broken]), Source([ROLE])]
            list(impl(sources, {}))
            expect_equal(f"open iterators after {status}", [source.open for source in sources], [0, 0, 0])

    def test_client_leaves(self, impl):
        """the client closes: so is the replica's iterator, and no other one is tried"""
        for after in (1, 2, 3):
            sources = [Source([ROLE, ConnectionError()]), Source(say("a", "b")), Source(say("c"))]
            events = self.begun(impl, sources)
            for _ in range(after):
                next(events)
            events.close()
            what = f"the client left after {after} events"
            expect_equal(f"{what}: open iterators", [source.open for source in sources], [0, 0, 0])
            expect_equal(f"{what}: calls", [source.calls for source in sources], [1, 1, 0])
        for script in (say("a"), [END], [ROLE, {"text": "a"}, ConnectionError()], [ROLE, {"text": "a"}],
                       [self.refused(impl, 400).script[0]], [ConnectionError()]):  # fmt: skip
            source = Source(script)
            events = self.begun(impl, [source])
            for event in events:
                if "finish" in event or "error" in event:
                    break
            events.close()
            expect_equal(f"the client left after the last event of {script}: open iterators", source.open, 0)

    def test_closed_before_next(self, impl):
        """a broken replica's iterator is closed before another one is asked"""
        for script in ([ROLE, ConnectionError()], [ROLE]):
            first, second, open_then = Source(script), Source(say("a")), []

            def asked(request, first=first, second=second, open_then=open_then):
                open_then.append(first.open)
                return second(request)

            list(impl([first, asked], {}))
            expect_equal("open iterators of the broken one when the next is asked", open_then, [0])
        for status in (429, 503):
            first, second, open_then = self.refused(impl, status), Source(say("a")), []

            def asked(request, first=first, second=second, open_then=open_then):
                open_then.append(first.open)
                return second(request)

            list(impl([first, asked], {}))
            expect_equal(f"open iterators of one that refused ({status}) when the next is asked", open_then, [0])

    def test_not_begun(self, impl):
        """a client that leaves before the first event: nothing is left open"""
        source = Source(say("a"))
        events = self.begun(impl, [source])
        events.close()
        expect_equal("the client left before the first event: open iterators", source.open, 0)

    def test_thrown(self, impl):
        """however it ends: exceptions that are no errors, and such as the client throws"""
        for error in (CancelledError(), KeyboardInterrupt()):
            for script in ([error], [ROLE, error], [ROLE, {"text": "a"}, error]):
                source = Source(script)
                try:
                    list(impl([source], {}))
                except BaseException as raised:
                    expect(raised is error, f"a replica raises {error!r}: expected it to be raised\n  got {raised!r}")
                else:
                    expect(False, f"a replica raises {error!r}: expected it to be raised\n  got an end")
                expect_equal(f"a replica raises {error!r}: open iterators", source.open, 0)
        for error in (ValueError("client"), CancelledError()):
            sources = [Source(say("a", "b")), Source(say("c"))]
            events = self.begun(impl, sources)
            next(events), next(events)
            try:
                events.throw(error)
            except BaseException as raised:
                expect(raised is error, f"the client throws {error!r}: expected it to be raised\n  got {raised!r}")
            expect_equal(f"the client throws {error!r}: open iterators", [s.open for s in sources], [0, 0])

    def test_other_errors(self, impl):
        """errors that are not the network's are raised, and iterators closed"""
        for error in (ValueError("x"), KeyError("x"), OSError("disk"), TimeoutError(), EOFError(), RuntimeError("x"),
                      AttributeError("close"), TypeError("x"), AssertionError(), ZeroDivisionError(), MemoryError(),
                      IndexError(), StopAsyncIteration(), ImportError(), NameError("x")):  # fmt: skip
            for script in ([error], [ROLE, error], [ROLE, {"text": "a"}, error]):
                sources = [Source(script), Source(say("b"))]
                expect_raises(type(error), lambda s=sources: list(impl(s, {})), f"a replica raises {error!r}")
                expect_equal("calls", [source.calls for source in sources], [1, 0])
                expect_equal("open iterators", [source.open for source in sources], [0, 0])
