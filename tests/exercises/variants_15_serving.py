"""Implementations that the checks of exercises 15 must refuse, and others that they must accept."""

import base64
import bisect
import codecs
import hashlib
import hmac
import json
import math
import random
import re
import sys
import unicodedata
import zlib
from collections import deque
from contextlib import closing
from fractions import Fraction

import numpy as np

from minillm.learn.testing import alternative, wrong

INF = math.inf

# ---- 15.1


def ranked(
    latencies,
    percents,
    *,
    failed=INF,
    rank=None,
    low=0,
    high=100,
    nan=True,
    empty=True,
    least=1,
    values=None,
    give=lambda found: found,
    look=lambda x: x >= 0,
):
    """The right one, but for what is switched."""
    rank = rank or (lambda p, n: -(-round(10 * p) * n // 1000))
    kept = (
        [x for x in latencies if x is not None] if failed is None else [failed if x is None else x for x in latencies]
    )
    if (empty and not latencies) or not all(look(x) for x in kept):
        raise ValueError
    ordered, found = sorted(kept) if values is None else values(kept), {}
    for p in percents:
        if not low <= p <= high and (nan or p == p):
            raise ValueError
        found[p] = ordered[min(max(rank(p, len(ordered)), least), len(ordered)) - 1] if ordered else INF
    return give(found)


def ranker(**switches):
    return lambda latencies, percents: ranked(latencies, percents, **switches)


for switches, why in (
    ({"failed": None}, "failures are dropped"),
    ({"failed": 0.0}, "failures are fast"),
    ({"failed": 1e9}, "failures are a large number"),
    ({"rank": lambda p, n: math.ceil(p / 100 * n)}, "rounding of floats"),
    ({"rank": lambda p, n: int(p * n / 100) + 1}, "one too far at whole ranks"),
    ({"rank": lambda p, n: round(p * n / 100)}, "the nearest rank"),
    ({"rank": lambda p, n: int(p * n / 100)}, "rounds down"),
    ({"rank": lambda p, n: -(-int(p) * n // 100)}, "whole percents alone"),
    ({"rank": lambda p, n: math.ceil((n - 1) * p / 100) + 1}, "of n - 1 gaps"),
    ({"rank": lambda p, n: -(-round(1000 - 10 * p) * n // 1000)}, "from the other end"),
    ({"values": list}, "not sorted"),
    ({"values": lambda x: sorted(x, reverse=True)}, "the wrong way round"),
    ({"values": lambda x: sorted(set(x))}, "equal ones count once"),
    ({"empty": False}, "no latencies are no error"),
    ({"look": lambda x: True}, "negative latencies pass"),
    ({"look": lambda x: not x < 0}, "NaN passes"),
    ({"look": lambda x: x > 0}, "0 is refused"),
    ({"look": lambda x: 0 <= x < INF}, "failures are refused"),
    ({"low": -INF}, "a negative percent passes"),
    ({"high": INF}, "more than 100 percent passes"),
    ({"low": 0.1}, "0 percent is refused"),
    ({"high": 99.9}, "100 percent is refused"),
    ({"give": lambda found: list(found.values())}, "a list"),
    ({"give": lambda found: {int(p): x for p, x in found.items()}}, "percents are cut"),
    ({"give": lambda found: {p / 100: x for p, x in found.items()}}, "shares for percents"),
    ({"give": lambda found: {p: None if x == INF else x for p, x in found.items()}}, "None for infinity"),
    ({"give": lambda found: {p: round(x, 3) for p, x in found.items()}}, "rounded"),
):
    wrong("15.1", why)(ranker(**switches))


@wrong("15.1", "between two latencies")
def percentiles(latencies, percents):
    ranked(latencies, percents)
    values = [1e300 if x is None else x for x in latencies]
    return {p: INF if (x := float(np.percentile(values, p))) > 1e200 else x for p in percents}


@wrong("15.1", "sorts the caller's list")
def percentiles(latencies, percents):
    found = ranked(latencies, percents)
    if isinstance(latencies, list):
        latencies.sort(key=lambda x: INF if x is None else x)
    return found


@wrong("15.1", "0 percent takes the last of the list")
def percentiles(latencies, percents):
    found = ranked(latencies, percents)
    return {p: max(INF if x is None else x for x in latencies) if p == 0 else x for p, x in found.items()}


@alternative("15.1", "fractions of the written percent")
def percentiles(latencies, percents):
    ordered = sorted(math.inf if x is None else float(x) for x in latencies)
    if len(ordered) == 0 or any(x != x or x < 0 for x in ordered) or not all(0 <= p <= 100 for p in percents):
        raise ValueError
    return {p: ordered[max(0, math.ceil(Fraction(str(p)) * len(ordered) / 100) - 1)] for p in percents}


def keyed_by_floats(latencies, percents):
    return {float(p): found for p, found in ranked(latencies, percents).items()}


def large_for_failed(latencies, percents):
    found = ranked(latencies, percents, failed=1e9)
    return {p: INF if x >= 1e9 else x for p, x in found.items()}


for impl, why in (
    (keyed_by_floats, "percents as floats"),
    (large_for_failed, "a failure is a large number"),
    (ranker(look=lambda x: 0 <= x < INF, failed=1e308), "an infinite latency is an error"),
):
    wrong("15.1", why)(impl)


def up_to_a_failure(latencies, percents):
    seen = latencies[: latencies.index(None)] if None in latencies else latencies
    if not latencies or not all(x >= 0 for x in seen):
        raise ValueError
    return ranked(latencies, percents, look=lambda x: True)


def ends_of_percents(latencies, percents):
    if percents and not (0 <= percents[0] <= 100 and 0 <= percents[-1] <= 100):
        raise ValueError
    return ranked(latencies, percents, low=-INF, high=INF)


def sample(values):
    return sorted(values if len(values) <= 1028 else random.Random(0).sample(values, 1028))


def keeps_results(latencies, percents, kept={}):  # noqa: B006
    key = id(latencies), len(latencies), tuple(percents)
    if key not in kept:
        kept[key] = ranked(latencies, percents)
    return dict(kept[key])


def refuses_twice(latencies, percents):
    if len(set(percents)) < len(percents):
        raise ValueError
    return ranked(latencies, percents)


for impl, why in (
    (up_to_a_failure, "looks at latencies up to the first failure"),
    (ends_of_percents, "looks at the first and last percent"),
    (ranker(values=sample), "a sample of 1,028"),
    (ranker(look=lambda x: math.copysign(1, x) > 0), "-0.0 is negative"),
    (keeps_results, "keeps a list's result"),
    (refuses_twice, "a percent given twice is an error"),
):
    wrong("15.1", why)(impl)


# ---- 15.2


def lawful(
    requests,
    begin,
    end,
    *,
    window=True,
    look=True,
    still=None,
    clip_begin=True,
    clip_end=True,
    zero=True,
    came=lambda a, begin, end: begin <= a < end,
    give=None,
    width=None,
):
    if window and not begin < end:
        raise ValueError
    inside, arrivals, stays = 0.0, 0, []
    for a, b in requests:
        if look and b is not None and b < a:
            raise ValueError
        until = (end if still is None else still(a, end)) if b is None else b
        until = min(until, end) if clip_end else until
        part = until - (max(a, begin) if clip_begin else a)
        inside += max(0.0, part) if zero else part
        arrivals += came(a, begin, end)
        if b is not None:
            stays.append(b - a)
    width = end - begin if width is None else width(begin, end, requests)
    present, rate = inside / width, arrivals / width
    seconds = present / rate if arrivals else None
    return (present, rate, seconds) if give is None else give(present, rate, seconds, stays)


def lawyer(**switches):
    return lambda requests, begin, end: lawful(requests, begin, end, **switches)


def mean(values):
    return sum(values) / len(values) if values else None


for switches, why in (
    ({"window": False, "width": lambda b, e, r: (e - b) or 1}, "any window"),
    ({"look": False}, "any request"),
    ({"still": lambda a, end: a}, "one that is there counts for nothing"),
    ({"clip_begin": False}, "time before the window counts"),
    ({"clip_end": False}, "time behind the window counts"),
    ({"zero": False}, "those outside count negatively"),
    ({"came": lambda a, b, e: True}, "all arrivals"),
    ({"came": lambda a, b, e: b < a < e}, "an arrival at the begin is lost"),
    ({"came": lambda a, b, e: b <= a <= e}, "an arrival at the end counts"),
    ({"came": lambda a, b, e: a < e}, "arrivals from before count"),
    ({"came": lambda a, b, e: a >= b}, "arrivals from behind count"),
    ({"width": lambda b, e, r: e or 1}, "the window begins at 0"),
    ({"width": lambda b, e, r: (max([a for a, _ in r], default=b) - b) or 1}, "up to the last arrival"),
    ({"give": lambda p, r, s, stays: (p, r, mean(stays) if s is not None else None)}, "the mean of those that left"),
    ({"give": lambda p, r, s, stays: (p, r, s or 0.0)}, "0 for None"),
    ({"give": lambda p, r, s, stays: (p, r, p * r if s is not None else None)}, "times the rate"),
    ({"give": lambda p, r, s, stays: (p, r, r / p if s is not None and p else s)}, "the law upside down"),
    ({"give": lambda p, r, s, stays: (r, p, s)}, "the other order"),
    ({"give": lambda p, r, s, stays: (p, r)}, "two numbers"),
    ({"give": lambda p, r, s, stays: (round(p, 2), r, s)}, "rounded"),
    ({"give": lambda p, r, s, stays: (p, r, s or None)}, "None for 0 seconds"),
):
    wrong("15.2", why)(lawyer(**switches))


@wrong("15.2", "those that have not left are left out")
def little(requests, begin, end):
    return lawful([(a, b) for a, b in requests if b is not None], begin, end)


@wrong("15.2", "only requests that lie within")
def little(requests, begin, end):
    lawful(requests, begin, end)
    return lawful([(a, b) for a, b in requests if a >= begin and (b is None or b <= end)], begin, end)


@wrong("15.2", "a request of no time is none")
def little(requests, begin, end):
    lawful(requests, begin, end)
    return lawful([(a, b) for a, b in requests if a != b], begin, end)


@wrong("15.2", "equal ends are an error")
def little(requests, begin, end):
    if any(a == b for a, b in requests):
        raise ValueError
    return lawful(requests, begin, end)


@wrong("15.2", "sorts the caller's list")
def little(requests, begin, end):
    found = lawful(requests, begin, end)
    if isinstance(requests, list):
        requests.sort(key=lambda r: r[0])
    return found


@wrong("15.2", "an empty log is an error")
def little(requests, begin, end):
    if not requests:
        raise ValueError
    return lawful(requests, begin, end)


@wrong("15.2", "looks at requests of the window alone")
def little(requests, begin, end):
    if not begin < end:
        raise ValueError
    if any(b is not None and b < a for a, b in requests if begin <= a < end):
        raise ValueError
    return lawful(requests, begin, end, look=False)


@alternative("15.2", "a sweep over arrivals and departures")
def little(requests, begin, end):
    if end <= begin or any(b is not None and a > b for a, b in requests):
        raise ValueError
    changes = sorted([(a, 1) for a, _ in requests] + [(b, -1) for _, b in requests if b is not None])
    area, there, at = 0.0, 0, begin
    for time, change in [*changes, (end, 0)]:
        now = min(max(time, begin), end)
        area, there, at = area + there * (now - at), there + change, now
    count = len([a for a, _ in requests if begin <= a < end])
    width = end - begin
    return [area / width, count / width, area / count if count else None]


def single(requests):
    return [tuple(None if t is None else float(np.float32(t)) for t in pair) for pair in requests]


for change, why in (
    (single, "times in single precision"),
    (lambda requests: list(dict.fromkeys(requests)), "equal requests once"),
    (lambda requests: [(a, None if b == 0 and a > 0 else b) for a, b in requests], "left at 0 has not left"),
    (
        lambda requests: [tuple(None if t is None else round(t, 3) for t in pair) for pair in requests],
        "times in milliseconds",
    ),
):
    wrong("15.2", why)(lambda requests, begin, end, change=change: lawful(change(requests), begin, end))


def without_bad_ones_inside(requests):
    return [r for i, r in enumerate(requests) if r[1] is None or r[0] <= r[1] or i in (0, len(requests) - 1)]


for change, why in (
    (lambda requests: requests[-1000:], "the last 1,000 requests"),
    (without_bad_ones_inside, "looks at the first and last request"),
    (lambda requests: [(a, a if b is not None and a - 1e-9 < b < a else b) for a, b in requests], "a tolerance"),
):
    wrong("15.2", why)(lambda requests, begin, end, change=change: lawful(change(requests), begin, end))


for switches, why in (
    ({"give": lambda p, r, s, stays: (round(p, 9), round(r, 9), s)}, "rounded to nine digits"),
    ({"came": lambda a, b, e: b <= a < e - 1e-6}, "an arrival within a microsecond of the end is lost"),
):
    wrong("15.2", why)(lawyer(**switches))


@wrong("15.2", "a window of a day at most")
def little(requests, begin, end):
    if end - begin > 86400:
        raise ValueError
    return lawful(requests, begin, end)


@wrong("15.2", "a sum in single precision")
def little(requests, begin, end):
    _, rate, seconds = lawful(requests, begin, end)
    parts = [max(0.0, (end if b is None else min(b, end)) - max(a, begin)) for a, b in requests]
    present = float(np.sum(np.array(parts, np.float32))) / (end - begin)
    return present, rate, seconds if seconds is None else present / rate


# ---- 15.3


class Parser:
    """The right one, in other words; variants change a part."""

    def __init__(self):
        self.decoder, self.text, self.cr = self.decoding(), "", False
        self.clear()

    def decoding(self):
        return codecs.getincrementaldecoder("utf-8-sig")("replace")

    def clear(self):
        self.name, self.data = "message", []

    def feed(self, data):
        text = self.decode(data)
        if self.cr and text:
            text, self.cr = text.removeprefix("\n"), False
        *lines, self.text = self.split(self.text + text)
        self.cr = text.endswith("\r") or (self.cr and not text)
        return [event for line in lines for event in self.take(line)]

    def decode(self, data):
        return self.decoder.decode(data)

    def split(self, text):
        return re.split("\r\n|\r|\n", text)

    def take(self, line):
        if not line:
            return self.finish()
        self.field(*self.cut(line))
        return []

    def finish(self):
        found = [self.event()] if self.data else []
        self.clear()
        return found

    def event(self):
        return (self.name, "\n".join(self.data))

    def cut(self, line):
        name, _, value = line.partition(":")
        return name, value.removeprefix(" ")

    def field(self, name, value):
        if name == "data":
            self.data.append(value)
        elif name == "event":
            self.name = value or "message"


alternative("15.3", "lines by a regular expression")(Parser)


@alternative("15.3", "bytes, decoded line by line")
class Events:
    def __init__(self):
        self.rest, self.start, self.skip = bytearray(), True, False
        self.parser = Parser()

    def feed(self, data):
        found = []
        for byte in bytes(data):
            if byte == 10 and self.skip:
                self.skip = False
                continue
            self.skip = byte == 13
            if byte not in (10, 13):
                self.rest.append(byte)
                continue
            line = bytes(self.rest)
            if self.start:
                line, self.start = line.removeprefix(b"\xef\xbb\xbf"), False
            found += self.parser.take(line.decode("utf-8", "replace"))
            self.rest.clear()
        return found


def parser(why, **parts):
    wrong("15.3", why)(type("Events", (Parser,), parts))


def finish_always(self):
    found = [self.event()]
    self.clear()
    return found


def finish_keeping_name(self):
    found = [self.event()] if self.data else []
    self.data = []
    return found


def finish_named_lives(self):
    found = [self.event()] if self.data else []
    if found:
        self.clear()
    return found


def field_of(data="data", fold=False, strict=True, name=lambda old, new: new or "message", more=()):
    def field(self, key, value):
        key = key.lower() if fold else key.strip() if not strict else key
        if key in (data, *more):
            self.data.append(value)
        elif key == "event":
            self.name = name(self.name, value)

    return field


def feed_cr_waits(self, data):
    text, self.text = self.text + self.decode(data), ""
    if text.endswith("\r"):
        text, self.text = text[:-1], "\r"
    *lines, rest = self.split(text)
    self.text = rest + self.text
    return [event for line in lines for event in self.take(line)]


def feed_without_cr(self, data):
    *lines, self.text = self.split(self.text + self.decode(data))
    return [event for line in lines for event in self.take(line)]


def feed_crlf_once(self, data):
    """An empty piece between CR and LF makes two ends of them."""
    text = self.decode(data)
    if self.cr:
        text = text.removeprefix("\n")
    *lines, self.text = self.split(self.text + text)
    self.cr = text.endswith("\r")
    return [event for line in lines for event in self.take(line)]


def python_lines(text):
    *lines, last = (text + "\0").splitlines()
    return [*lines, last[:-1]]


def feed_whole(self, data):
    *lines, _ = self.split(self.decode(data))
    return [event for line in lines for event in self.take(line)]


def feed_generator(self, data):
    return iter(Parser.feed(self, data))


def feed_first(self, data):
    return Parser.feed(self, data)[:1]


def feed_raising(self, data):
    if not data:
        raise ValueError
    return Parser.feed(self, data)


for why, parts in (
    ("each piece by itself", {"feed": feed_whole}),
    ("CR at the end waits", {"feed": feed_cr_waits}),
    ("CR LF across pieces ends two lines", {"feed": feed_without_cr}),
    ("CR LF with an empty piece between ends two lines", {"feed": feed_crlf_once}),
    ("an iterator", {"feed": feed_generator}),
    ("one event a piece", {"feed": feed_first}),
    ("no bytes are an error", {"feed": feed_raising}),
    ("LF alone ends lines", {"split": lambda self, text: text.split("\n")}),
    ("LF and CR LF end lines", {"split": lambda self, text: text.replace("\r\n", "\n").split("\n")}),
    ("splits where Python does", {"split": lambda self, text: python_lines(text)}),
    (
        "characters cut in two",
        {"decode": lambda self, data: bytes(data).decode("utf-8", "replace").removeprefix("\ufeff")},
    ),
    ("invalid bytes are an error", {"decoding": lambda self: codecs.getincrementaldecoder("utf-8-sig")()}),
    ("invalid bytes are dropped", {"decoding": lambda self: codecs.getincrementaldecoder("utf-8-sig")("ignore")}),
    ("Latin-1", {"decoding": lambda self: codecs.getincrementaldecoder("latin-1")()}),
    ("the mark stays", {"decoding": lambda self: codecs.getincrementaldecoder("utf-8")("replace")}),
    ("marks are dropped everywhere", {"decode": lambda self, data: self.decoder.decode(data).replace("\ufeff", "")}),
    ("marks are dropped at each line", {"take": lambda self, line: Parser.take(self, line.removeprefix("\ufeff"))}),
    ("events without data are given", {"finish": finish_always}),
    ("names live on", {"finish": finish_keeping_name}),
    ("names of events without data live on", {"finish": finish_named_lives}),
    ("empty data is no data", {"finish": lambda self: [e for e in Parser.finish(self) if e[1]]}),
    ("data without a line between", {"event": lambda self: (self.name, "".join(self.data))}),
    ("an end of line behind data", {"event": lambda self: (self.name, "".join(x + "\n" for x in self.data))}),
    ("the last data alone", {"event": lambda self: (self.name, self.data[-1])}),
    ("the first data alone", {"event": lambda self: (self.name, self.data[0])}),
    ("always message", {"event": lambda self: ("message", "\n".join(self.data))}),
    ("data alone", {"event": lambda self: "\n".join(self.data)}),
    ("data, event", {"event": lambda self: ("\n".join(self.data), self.name)}),
    ("trimmed", {"event": lambda self: (self.name, "\n".join(self.data).strip())}),
    ("all spaces are dropped", {"cut": lambda self, line: (line.partition(":")[0], line.partition(":")[2].strip())}),
    (
        "leading spaces are dropped",
        {"cut": lambda self, line: (line.partition(":")[0], line.partition(":")[2].lstrip(" "))},
    ),
    ("the space is needed", {"cut": lambda self, line: tuple(line.split(": ", 1)) if ": " in line else (line, "")}),
    ("the space stays", {"cut": lambda self, line: line.partition(":")[::2]}),
    (
        "a tab is dropped",
        {"cut": lambda self, line: (line.partition(":")[0], re.sub("^[ \t]", "", line.partition(":")[2]))},
    ),
    (
        "the last colon",
        {"cut": lambda self, line: (line.rpartition(":")[0], line.rpartition(":")[2].removeprefix(" "))},
    ),
    (
        "a line without a colon is ignored",
        {"cut": lambda self, line: Parser.cut(self, line) if ":" in line else ("", "")},
    ),
    (
        "a line without a colon is data",
        {"cut": lambda self, line: Parser.cut(self, line) if ":" in line else ("data", line)},
    ),
    ("names in any case", {"field": field_of(fold=True)}),
    ("names are trimmed", {"field": field_of(strict=False)}),
    ("the first name counts", {"field": field_of(name=lambda old, new: new if old == "message" else old)}),
    ("an empty name is a name", {"field": field_of(name=lambda old, new: new)}),
    ("an empty name changes nothing", {"field": field_of(name=lambda old, new: new or old)}),
    ("comments are data", {"field": field_of(more=("",))}),
    ("ids are data", {"field": field_of(more=("id",))}),
    (
        "what stands at the end of a piece counts as a line",
        {"feed": lambda self, data: Parser.feed(self, data) + (Parser.feed(self, b"\n") if data[-1:] == b"\n" else [])},
    ),
):
    parser(why, **parts)


@wrong("15.3", "one state for all")
class Events(Parser):
    shared = Parser()

    def feed(self, data):
        return self.shared.feed(data)


@wrong("15.3", "the same list each time")
class Events(Parser):
    def __init__(self):
        super().__init__()
        self.found = []

    def feed(self, data):
        self.found[:] = super().feed(data)
        return self.found


@wrong("15.3", "all events so far")
class Events(Parser):
    def __init__(self):
        super().__init__()
        self.found = []

    def feed(self, data):
        self.found += super().feed(data)
        return list(self.found)


def ends_with_done(self):
    self.over = getattr(self, "over", False)
    found = [self.event()] if self.data and not self.over else []
    self.over = self.over or self.data == ["[DONE]"]
    self.clear()
    return found


def begins_data_anew(self, name, value):
    if name == "retry":
        self.data = []
    Parser.field(self, name, value)


HALF = codecs.getincrementaldecoder("utf-8")("replace")


def decode_with_one(self, data):
    text = HALF.decode(data)
    if text and not hasattr(self, "begun"):
        self.begun, text = True, text.removeprefix("\ufeff")
    return text


for part, change, why in (
    ("decode", decode_with_one, "one decoder for all parsers"),
    ("finish", ends_with_done, "nothing after [DONE]"),
    ("field", begins_data_anew, "retry begins the data anew"),
    ("cut", lambda self, line: Parser.cut(self, line[:65_536]), "64 KiB of a line"),
    ("event", lambda self: (self.name, "\n".join(self.data[:100])), "100 lines of data"),
    ("event", lambda self: (self.name.lower(), "\n".join(self.data)), "names in lower case"),
    ("event", lambda self: (self.name.rstrip(), "\n".join(self.data)), "a name's last spaces are dropped"),
    ("event", lambda self: (self.name if self.name.strip() else "message", "\n".join(self.data)), "a name of spaces"),
    (
        "event",
        lambda self: (self.name, "\n".join(d if d.strip() else "" for d in self.data)),
        "data of spaces is empty",
    ),
    ("event", lambda self: (self.name, "\n".join(d.removeprefix("\xa0") for d in self.data)), "another kind of space"),
    ("decode", lambda self, data: re.sub("\ufffd+", "\ufffd", self.decoder.decode(data)), "one mark for all bad bytes"),
):
    wrong("15.3", why)(type("Events", (Parser,), {part: change}))


def cut_name(self):
    return (self.name.partition(":")[0] or "message", "\n".join(self.data))


wrong("15.3", "a name up to its colon")(type("Events", (Parser,), {"event": cut_name}))


class AtOnce(Parser):
    def feed(self, data):
        return super().feed(data) if data else self.finish()


class Flushed(Parser):
    def decode(self, data):
        return self.decoder.decode(data, not data)


class Blank(Parser):
    def take(self, line):
        return super().take(line.strip() and line)


class Once(Parser):
    given = None

    def finish(self):
        found = [event for event in super().finish() if event != self.given]
        self.given = found[-1] if found else self.given
        return found


def name_first(self, name, value):
    if name != "event" or not self.data:
        Parser.field(self, name, value)


def comment_forgets(self, name, value):
    self.name = self.name if name else "message"
    Parser.field(self, name, value)


for impl, why in (
    (AtOnce, "no bytes end the stream"),
    (Flushed, "no bytes end a character"),
    (Blank, "a line of spaces is empty"),
    (Once, "the same event once"),
    (type("Events", (Parser,), {"field": name_first}), "a name behind data is not read"),
    (type("Events", (Parser,), {"field": comment_forgets}), "a comment forgets the name"),
    (type("Events", (Parser,), {"field": lambda self, name, value: Parser.field(
        self, "event" if name.startswith("event") else name, value)}), "fields that begin with event"),
    (type("Events", (Parser,), {"cut": lambda self, line: (
        line.partition(":")[0], line.partition(":")[2].removeprefix(" ").rstrip("\0"))}), "last zero bytes dropped"),
    (type("Events", (Parser,), {"event": lambda self: (
        self.name.lstrip("\ufeff"), "\n".join(self.data))}), "a name's mark is dropped"),
):  # fmt: skip
    wrong("15.3", why)(impl)


# ---- 15.4


class Right:
    """The right bucket; variants change a part."""

    def __init__(self, rate, burst, clock):
        self.check(rate, burst)
        self.rate, self.burst, self.clock = rate, burst, clock
        self.there, self.at = self.first(), clock()

    def check(self, rate, burst):
        if not (rate > 0 and burst > 0):
            raise ValueError

    def first(self):
        return self.burst

    def fill(self):
        now = self.now()
        self.there, self.at = min(self.burst, self.there + self.rate * (now - self.at)), now

    def now(self):
        return max(self.clock(), self.at)

    def level(self):
        self.fill()
        return self.there

    def valid(self, tokens):
        return 0 <= tokens <= self.burst

    def take(self, tokens):
        if not self.valid(tokens):
            raise ValueError
        self.fill()
        if tokens <= self.there:
            self.there -= tokens
            return 0
        return self.wait(tokens)

    def wait(self, tokens):
        return (tokens - self.there) / self.rate

    def settle(self, tokens):
        self.fill()
        self.there = min(self.there - tokens, self.burst)


alternative("15.4", "the right one, in other words")(Right)


@alternative("15.4", "by the time at which it would be full")
class Bucket:
    def __init__(self, rate, burst, clock):
        if not rate > 0 or not burst > 0:
            raise ValueError
        self.rate, self.burst, self.clock, self.seen = rate, burst, clock, clock()
        self.full = self.seen

    def _now(self):
        self.seen = max(self.seen, self.clock())
        return self.seen

    def level(self):
        return self.burst - max(0.0, self.full - self._now()) * self.rate

    def take(self, tokens):
        if not 0 <= tokens <= self.burst:
            raise ValueError
        lacking = tokens - self.level()
        if lacking > 1e-12:
            return lacking / self.rate
        self.settle(tokens)
        return 0.0

    def settle(self, tokens):
        now = self._now()
        self.full = max(max(self.full, now) + tokens / self.rate, now)


def settle_late(self, tokens):
    self.there = min(self.there - tokens, self.burst)


def settle_not_below(self, tokens):
    Right.settle(self, tokens)
    self.there = max(0, self.there)


def settle_unbounded(self, tokens):
    self.fill()
    self.there -= tokens


def settle_other_way(self, tokens):
    self.fill()
    self.there = min(self.there + tokens, self.burst)


def settle_more_alone(self, tokens):
    if tokens > 0:
        Right.settle(self, tokens)


def settle_by_take(self, tokens):
    if tokens > 0:
        Right.take(self, min(tokens, self.burst))
    else:
        Right.settle(self, tokens)


def take_all(self, tokens):
    wait = Right.take(self, tokens)
    if wait:
        self.there = min(self.there, 0)
    return wait


def take_debt(self, tokens):
    wait = Right.take(self, tokens)
    if wait:
        self.there -= tokens
    return wait


def take_strictly(self, tokens):
    if not self.valid(tokens):
        raise ValueError
    self.fill()
    if tokens < self.there:
        self.there -= tokens
        return 0
    return self.wait(tokens)


def take_without_look(self, tokens):
    self.fill()
    return self.wait(tokens) if tokens > self.there else Right.take(self, tokens)


def take_zero_free(self, tokens):
    return 0 if tokens == 0 else Right.take(self, tokens)


def take_true(self, tokens):
    return not Right.take(self, tokens)


def fill_unbounded(self):
    now = self.now()
    self.there, self.at = self.there + self.rate * (now - self.at), now


def fill_whole(self):
    now = self.now()
    self.there, self.at = min(self.burst, self.there + int(self.rate * (now - self.at))), now


def fill_by_minute(self):
    now = self.now()
    if int(now) > int(self.at):
        self.there = self.burst
    self.at = now


def fill_from_start(self):
    now = self.now()
    self.there = min(self.burst, self.there + self.rate * (now - self.at))


def fill_slow_debt(self):
    now = self.now()
    if self.there < 0:
        self.there = 0 if now > self.at else self.there
    self.there, self.at = min(self.burst, self.there + self.rate * (now - self.at)), now


def fill_back(self):
    """Stands still, but counts from the time it stepped back to."""
    now = self.clock()
    self.there, self.at = min(self.burst, self.there + self.rate * max(0, now - self.at)), now


def fill_by_burst(self):
    now = self.now()
    self.there, self.at = min(self.burst, self.there + self.burst * (now - self.at)), now


for why, parts in (
    ("empty at first", {"first": lambda self: 0}),
    ("one second's worth at first", {"first": lambda self: min(self.rate, self.burst)}),
    ("no bound", {"fill": fill_unbounded}),
    ("whole tokens", {"fill": fill_whole}),
    ("reset each second", {"fill": fill_by_minute}),
    ("the time is not kept", {"fill": fill_from_start}),
    ("debts are forgotten", {"fill": fill_slow_debt}),
    ("time is counted twice after a step back", {"fill": fill_back}),
    ("fills by burst", {"fill": fill_by_burst}),
    ("a step back takes tokens", {"now": lambda self: self.clock()}),
    ("settles before it has filled", {"settle": settle_late}),
    ("never below 0", {"settle": settle_not_below}),
    ("settles the wrong way", {"settle": settle_other_way}),
    ("nothing comes back", {"settle": settle_more_alone}),
    ("settles only what is there", {"settle": settle_by_take}),
    ("a refusal takes what is there", {"take": take_all}),
    ("a refusal takes all the same", {"take": take_debt}),
    ("not the last tokens", {"take": take_strictly}),
    ("more than burst waits", {"take": take_without_look}),
    ("0 tokens are free of debts", {"take": take_zero_free}),
    ("true and false", {"take": take_true}),
    ("waits for a full bucket", {"wait": lambda self, n: (self.burst - self.there) / self.rate}),
    ("waits as if empty", {"wait": lambda self, n: n / self.rate}),
    ("waits times the rate", {"wait": lambda self, n: (n - self.there) * self.rate}),
    ("whole seconds", {"wait": lambda self, n: math.ceil((n - self.there) / self.rate)}),
    ("minutes", {"wait": lambda self, n: 60 * (n - self.there) / self.rate}),
    ("at least a second", {"wait": lambda self, n: max(1.0, (n - self.there) / self.rate)}),
    ("negative tokens pass", {"valid": lambda self, n: n <= self.burst}),
    ("NaN passes", {"valid": lambda self, n: not (n < 0 or n > self.burst)}),
    ("burst itself is refused", {"valid": lambda self, n: 0 <= n < self.burst}),
    ("0 is refused", {"valid": lambda self, n: 0 < n <= self.burst}),
    ("more than is there is refused", {"valid": lambda self, n: 0 <= n <= max(self.level(), 0) or n == self.burst}),
    ("any rate", {"check": lambda self, rate, burst: None}),
    ("a rate of 0 passes", {"check": lambda self, rate, burst: Right.check(self, rate or 1, burst)}),
    ("any burst", {"check": lambda self, rate, burst: Right.check(self, rate, 1)}),
    ("NaN as rate passes", {"check": lambda self, rate, burst: Right.check(self, 1 if rate != rate else rate, burst)}),
    ("level at 0 at least", {"level": lambda self: max(0, Right.level(self))}),
    ("level as it was last", {"level": lambda self: self.there}),
    ("level in whole tokens", {"level": lambda self: int(Right.level(self))}),
):
    wrong("15.4", why)(type("Bucket", (Right,), parts))


@wrong("15.4", "one level for all")
class Bucket(Right):
    levels = {}

    def __init__(self, rate, burst, clock):
        super().__init__(rate, burst, clock)
        self.mine = self.levels.setdefault(clock, self)

    def take(self, tokens):
        return Right.take(self.mine, tokens)

    def level(self):
        return Right.level(self.mine)


class Late(Right):
    """Asks the clock when it is asked."""

    def __init__(self, rate, burst, clock):
        super().__init__(rate, burst, lambda: 0)
        self.clock, self.at = clock, None

    def now(self):
        now = self.clock()
        self.at = now if self.at is None else self.at
        return max(now, self.at)


alternative("15.4", "asks the clock when it is asked first")(Late)


class Stepwise(Right):
    def fill(self):
        now = self.now()
        while self.at + 1 <= now:
            self.at, self.there = self.at + 1, min(self.burst, self.there + self.rate)
        super().fill()


class TwoReadings(Right):
    def fill(self):
        super().fill()
        self.at = self.now()


class OneClock(Right):
    def now(self):
        return max(CLOCKS[-1](), self.at)

    def __init__(self, rate, burst, clock):
        CLOCKS.append(clock)
        super().__init__(rate, burst, clock)


CLOCKS = []


class Whole(Right):
    def __init__(self, rate, burst, clock):
        super().__init__(rate, int(burst) or burst, clock)


class Bounded(Right):
    def settle(self, tokens):
        super().settle(tokens)
        self.there = max(self.there, -5 * self.burst)


class Milliseconds(Right):
    def now(self):
        return max(round(self.clock(), 3), self.at)


class Quick(Right):
    def check(self, rate, burst):
        if not (rate > 0.1 and burst > 0):
            raise ValueError


class FromZero(Right):
    def __init__(self, rate, burst, clock):
        super().__init__(rate, burst, clock)
        self.at = 0.0


for impl, why in (
    (Stepwise, "a loop over the seconds"),
    (TwoReadings, "the clock is read twice"),
    (OneClock, "the last bucket's clock for all"),
    (Whole, "a burst of whole tokens"),
    (Bounded, "a debt of five bursts at most"),
    (Milliseconds, "time in milliseconds"),
    (Quick, "a rate of 0.1 at least"),
    (FromZero, "a clock that begins at 0"),
):
    wrong("15.4", why)(impl)


class Hour(Right):
    def wait(self, tokens):
        return min(3600, super().wait(tokens))


wrong("15.4", "waits of an hour at most")(Hour)


class AtMostAnHour(Right):
    def fill(self):
        now = self.now()
        self.there, self.at = min(self.burst, self.there + self.rate * min(3600, now - self.at)), now


class TakesLater(Right):
    def take(self, tokens):
        found = super().take(tokens)
        self.at = self.now()
        return found


class SettlesLater(Right):
    def settle(self, tokens):
        super().settle(tokens)
        self.at = self.now()


class NoTimeYet(Right):
    def fill(self):
        self.at = self.at or self.clock()
        super().fill()


class Tolerant(Right):
    def take(self, tokens):
        found = super().take(tokens)
        return 0 if found and tokens - self.there < 1e-6 else found


class TenThousandths(Right):
    def now(self):
        return max(round(self.clock(), 4), self.at)


for impl, why in (
    (AtMostAnHour, "an hour at most at once"),
    (TakesLater, "take reads the clock twice"),
    (SettlesLater, "settle reads the clock twice"),
    (NoTimeYet, "a time of 0 is none"),
    (Tolerant, "a millionth may be missing"),
    (TenThousandths, "time in ten-thousandths"),
):
    wrong("15.4", why)(impl)


# ---- 15.5


def number(session, name, join=lambda s, n: json.dumps([s, n]), size=6):
    data = join(session, name).encode("utf-8", "surrogatepass")
    return (int.from_bytes(hashlib.blake2b(data, digest_size=size).digest()) + 0.5) / 256**size


def housed(
    session,
    replicas,
    *,
    join=lambda s, n: json.dumps([s, n]),
    cost=None,
    valid=True,
    negative=True,
    infinite=True,
    zero=True,
    size=6,
):
    weights = replicas.values()
    if valid and ((negative and any(w < 0 for w in weights)) or (infinite and not all(abs(w) < INF for w in weights))):
        raise ValueError
    rivals = {n: w for n, w in replicas.items() if w > 0 or not zero}
    if not rivals:
        raise ValueError
    cost = cost or (lambda u, w: -math.log(u) / w)
    return min(rivals, key=lambda n: (cost(number(session, n, join, size), rivals[n]), n))


def houser(**switches):
    return lambda session, replicas: housed(session, replicas, **switches)


for switches, why in (
    ({"cost": lambda u, w: -u}, "weights do not count"),
    ({"cost": lambda u, w: -u * w}, "u times w"),
    ({"cost": lambda u, w: -u - w}, "u plus w"),
    ({"cost": lambda u, w: u / w}, "u over w, the smallest"),
    ({"cost": lambda u, w: -math.log(u) / w**2}, "squares of weights"),
    ({"cost": lambda u, w: -math.log(u) / max(1, w)}, "at least weight 1"),
    ({"cost": lambda u, w: -math.log(u) / max(1, round(w))}, "whole weights"),
    ({"cost": lambda u, w: -math.log(u) / min(w, 10)}, "at most weight 10"),
    ({"cost": lambda u, w: -math.log(u) * w}, "the light ones get more"),
    ({"join": lambda s, n: s + n}, "in one piece"),
    ({"join": lambda s, n: n + s}, "in one piece, the name first"),
    ({"join": lambda s, n: f"{s}:{n}"}, "a colon between"),
    ({"join": lambda s, n: f"{n}|{s}"}, "a bar between, the name first"),
    ({"join": lambda s, n: f"{s}\0{n}"}, "a zero byte between"),
    ({"join": lambda s, n: s}, "one number for all replicas"),
    ({"join": lambda s, n: json.dumps([s, n.lower().strip()])}, "folded names"),
    ({"join": lambda s, n: json.dumps([s[:8], n])}, "eight characters of a session"),
    ({"join": lambda s, n: json.dumps([s, n[:1]])}, "one character of a name"),
    ({"valid": False, "zero": True}, "any weights"),
    ({"negative": False}, "negative ones pass"),
    ({"infinite": False}, "infinite ones and NaN pass"),
):
    wrong("15.5", why)(houser(**switches))


@wrong("15.5", "names that cannot be encoded")
def home(session, replicas):
    session.encode(), [name.encode() for name in replicas]
    return housed(session, replicas)


@wrong("15.5", "Python's hash")
def home(session, replicas):
    housed(session, replicas)
    return min(
        (n for n, w in replicas.items() if w > 0),
        key=lambda n: -math.log((hash((session, n)) % 2**32 + 1) / 2**33) / replicas[n],
    )


@wrong("15.5", "Python's hash of one text")
def home(session, replicas):
    housed(session, replicas)
    return min((n for n, w in replicas.items() if w > 0), key=lambda n: hash(json.dumps([session, n])))


def remainder(session, names):
    return names[int.from_bytes(hashlib.sha256(session.encode("utf-8", "surrogatepass")).digest()) % len(names)]


@wrong("15.5", "the remainder by n")
def home(session, replicas):
    housed(session, replicas)
    return remainder(session, sorted(n for n, w in replicas.items() if w > 0))


@wrong("15.5", "the remainder by all weights")
def home(session, replicas):
    housed(session, replicas)
    at, total = number(session, "") * sum(replicas.values()), 0.0
    for name in sorted(replicas):
        total += replicas[name]
        if at < total:
            break
    return name


@wrong("15.5", "by the mapping's order")
def home(session, replicas):
    housed(session, replicas)
    return remainder(session, [n for n, w in replicas.items() if w > 0])


@wrong("15.5", "by lot")
def home(session, replicas):
    housed(session, replicas)
    return random.choices(list(replicas), list(replicas.values()))[0]


HOMES = {}


@wrong("15.5", "remembers")
def home(session, replicas):
    housed(session, replicas)
    if (kept := HOMES.get(session)) not in replicas:
        HOMES[session] = kept = housed(session, replicas)
    return kept


@wrong("15.5", "takes weights of 0 out of the caller's mapping")
def home(session, replicas):
    found = housed(session, replicas)
    for name in [n for n, w in replicas.items() if w == 0]:
        del replicas[name]
    return found


@wrong("15.5", "none is nobody")
def home(session, replicas):
    return housed(session, replicas) if any(w > 0 for w in replicas.values()) else None


@wrong("15.5", "a ring with too few points")
def home(session, replicas):
    housed(session, replicas)
    ring = sorted((number(str(i), n), n) for n, w in replicas.items() if w > 0 for i in range(3))
    return ring[bisect.bisect(ring, (number(session, "?"),)) % len(ring)][1]


@wrong("15.5", "the place is the number, -1 is the one before")
def home(session, replicas):
    names = sorted(n for n, w in replicas.items() if w > 0)
    first = housed(session, replicas)
    return names[names.index(first) - 1]


@alternative("15.5", "the largest ln(u) / w, a length in front")
def home(session, replicas):
    if not all(math.isfinite(w) and w >= 0 for w in replicas.values()) or not any(replicas.values()):
        raise ValueError
    best = None
    for name, weight in sorted(replicas.items()):
        if weight == 0:
            continue
        first = session.encode("utf-8", "surrogatepass")
        data = len(first).to_bytes(8) + first + name.encode("utf-8", "surrogatepass")
        uniform = (int.from_bytes(hashlib.sha256(data).digest()[:6]) + 1) / (2**48 + 1)
        if best is None or math.log(uniform) / weight > best[0]:
            best = math.log(uniform) / weight, name
    return best[1]


@alternative("15.5", "random numbers seeded by the pair")
def home(session, replicas):
    if not all(0 <= w < INF for w in replicas.values()):
        raise ValueError
    rivals = [n for n in replicas if replicas[n] > 0]
    if not rivals:
        raise ValueError
    return min(rivals, key=lambda n: random.Random(ascii((session, n))).expovariate(1) / replicas[n])


for sep in ("-", "\n", "\x1f", "::"):
    wrong("15.5", f"{sep!r} between")(houser(join=lambda s, n, sep=sep: f"{s}{sep}{n}"))
wrong("15.5", "a dash between, the name first")(houser(join=lambda s, n: f"{n}-{s}"))
for change, why in (
    (str.lower, "sessions in lower case"),
    (str.strip, "sessions without spaces at their ends"),
    (lambda s: s.encode("utf-8", "replace").decode(), "surrogates of sessions replaced"),
    (lambda s: s.encode("utf-8", "ignore").decode(), "surrogates of sessions left out"),
    (lambda s: unicodedata.normalize("NFC", s), "sessions composed"),
    (lambda s: str(s.__hash__()), "the method behind Python's hash"),
):
    wrong("15.5", why)(houser(join=lambda s, n, change=change: json.dumps([change(s), n])))
wrong("15.5", "32 characters of a name")(houser(join=lambda s, n: json.dumps([s, n[:32]])))
wrong("15.5", "a name's port is cut off")(houser(join=lambda s, n: json.dumps([s, n.split(":80")[0]])))


@wrong("15.5", "weight 0 is a very small one")
def home(session, replicas):
    housed(session, replicas)
    return housed(session, {name: max(weight, 1e-9) for name, weight in replicas.items()})


@wrong("15.5", "a mapping has to be a dict")
def home(session, replicas):
    return housed(session, replicas | {})


@wrong("15.5", "a power that underflows")
def home(session, replicas):
    return housed(session, replicas, cost=lambda u, w: -(u ** (1 / w)))


def half(text):
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8])


for join, why in (
    (lambda s, n: f"{len(s)}{s}{n}", "a length in front that has no end"),
    (lambda s, n: f"{s}{n}{len(n)}", "a length behind that has no begin"),
    (lambda s, n: f"{len(s)}{len(n)}{s}{n}", "two lengths in one piece"),
    (lambda s, n: f"{s}|||{n}", "three bars between"),
    (lambda s, n: f"{n}\u241f{s}", "a symbol between, the name first"),
    (lambda s, n: json.dumps(sorted([s, n])), "pairs in order"),
    (lambda s, n: str((half(s) + half(n)) % 2**64), "the sum of two digests"),
    (lambda s, n: json.dumps([s, unicodedata.normalize("NFC", n)]), "names composed"),
    (lambda s, n: f"{len(s)} {s}{n}".encode("utf-8", "backslashreplace").decode(), "surrogates written"),
    (lambda s, n: json.dumps([s[:1000], n]), "1,000 characters of a session"),
    (lambda s, n: json.dumps([s, n[:500]]), "500 characters of a name"),
    (lambda s, n: json.dumps([s, n.removeprefix("http://")]), "names without a scheme"),
    (lambda s, n: json.dumps([s, n.rstrip("/")]), "names without a last slash"),
):
    wrong("15.5", why)(houser(join=join))
wrong("15.5", "a number of one byte")(houser(size=1))
wrong("15.5", "weights of one digit")(houser(cost=lambda u, w: -math.log(u) / float(f"{w:.1g}")))


@wrong("15.5", "weights by a sum that overflows")
def home(session, replicas):
    total = sum(replicas.values())
    if not total > 0:
        raise ValueError
    return housed(session, {name: weight / total for name, weight in replicas.items()})


@wrong("15.5", "one replica is not looked at")
def home(session, replicas):
    if len(replicas) == 1 and math.isnan(*replicas.values()):
        return next(iter(replicas))
    return housed(session, replicas)


# ---- 15.6


class Chooser:
    """The right one; variants change a part."""

    def __init__(self, n, draw):
        self.n, self.draw = n, draw
        self.own, self.others, self.gone = [0] * n, [0] * n, set()

    def choose(self):
        left = [i for i in self.drawn() if i not in self.gone] or self.rest()
        if not left:
            return None
        chosen = self.pick(left)
        self.sent(chosen)
        return chosen

    def drawn(self):
        return list(self.draw())

    def rest(self):
        return [i for i in range(self.n) if i not in self.gone]

    def pick(self, left):
        return min(left, key=self.load)

    def load(self, i):
        return self.own[i] + self.others[i]

    def sent(self, i):
        self.own[i] += 1

    def finished(self, i):
        self.own[i] -= 1

    def report(self, i, requests):
        self.gone.discard(i)
        self.others[i] = self.beyond(i, requests)

    def beyond(self, i, requests):
        return max(0, requests - self.own[i])

    def lost(self, i):
        self.gone.add(i)
        self.own[i] = self.others[i] = 0


alternative("15.6", "the right one, in other words")(Chooser)


@alternative("15.6", "loads as one number, kept up to date")
class TwoChoices:
    def __init__(self, n, draw):
        self.draw, self.own, self.load = draw, np.zeros(n, int), np.zeros(n, int)
        self.out = np.zeros(n, bool)

    def choose(self):
        a, b = self.draw()
        if self.out[a] and self.out[b]:
            if self.out.all():
                return None
            a = int(np.where(self.out, 10**9, self.load).argmin())
        elif self.out[a] or (not self.out[b] and self.load[b] < self.load[a]):
            a = b
        self.own[a] += 1
        self.load[a] += 1
        return a

    def finished(self, replica):
        self.own[replica] -= 1
        self.load[replica] -= 1

    def report(self, replica, requests):
        self.out[replica] = False
        self.load[replica] = max(requests, self.own[replica])

    def lost(self, replica):
        self.out[replica] = True
        self.own[replica] = self.load[replica] = 0


def report_replaces(self, i, requests):
    self.gone.discard(i)
    self.own[i], self.others[i] = 0, requests


def report_ignored_if_less(self, i, requests):
    self.gone.discard(i)
    self.others[i] = max(self.others[i], self.beyond(i, requests))


def report_keeps_lost(self, i, requests):
    self.others[i] = self.beyond(i, requests)


def lost_keeps(*names):
    def lost(self, i):
        self.gone.add(i)
        for name in {"own", "others"} - set(names):
            getattr(self, name)[i] = 0

    return lost


def finished_of_others(self, i):
    if self.others[i]:
        self.others[i] -= 1
    else:
        self.own[i] -= 1


for why, parts in (
    ("the least loaded of all", {"drawn": lambda self: [*self.draw(), *self.rest()]}),
    ("the first drawn", {"pick": lambda self, left: left[0]}),
    ("the more loaded", {"pick": lambda self, left: max(left, key=self.load)}),
    ("of equal ones the last", {"pick": lambda self, left: min(reversed(left), key=self.load)}),
    ("of equal ones the smallest number", {"pick": lambda self, left: min(sorted(left), key=self.load)}),
    ("of equal ones the largest number", {"pick": lambda self, left: min(sorted(left)[::-1], key=self.load)}),
    ("draws twice", {"drawn": lambda self: (self.draw(), list(self.draw()))[1]}),
    (
        "draws nothing while all are idle",
        {"drawn": lambda self: list(self.draw()) if any(map(self.load, range(self.n))) else [0]},
    ),
    ("draws again while both are lost", {"rest": lambda self: [i for i in self.draw() if i not in self.gone]}),
    ("what it sent does not count", {"sent": lambda self, i: None, "finished": lambda self, i: None}),
    ("reports do not count", {"load": lambda self, i: self.own[i]}),
    ("own requests do not count", {"load": lambda self, i: self.others[i]}),
    ("the larger of both", {"load": lambda self, i: max(self.own[i], self.others[i])}),
    ("what ended stays", {"finished": lambda self, i: None}),
    ("what ended was others'", {"finished": finished_of_others}),
    ("own requests are counted twice", {"beyond": lambda self, i, requests: requests}),
    ("others below 0", {"beyond": lambda self, i, requests: requests - self.own[i]}),
    ("others are added up", {"beyond": lambda self, i, requests: self.others[i] + max(0, requests - self.own[i])}),
    ("a report is the truth, own requests are gone", {"report": report_replaces}),
    ("a report never lowers", {"report": report_ignored_if_less}),
    ("lost for ever", {"report": report_keeps_lost}),
    ("own requests outlive a loss", {"lost": lost_keeps("own")}),
    (
        "reports outlive a loss",
        {
            "lost": lambda self, i: (self.gone.add(i), self.own.__setitem__(i, 0))[0],
            "report": lambda self, i, n: (
                self.gone.discard(i),
                self.others.__setitem__(i, max(self.others[i], self.beyond(i, n))),
            )[0],
        },
    ),
    ("a loss is nothing", {"lost": lambda self, i: None}),
    (
        "a loss empties, and the replica is chosen",
        {"lost": lambda self, i: (self.own.__setitem__(i, 0), self.others.__setitem__(i, 0))[0]},
    ),
    ("both lost: nobody", {"rest": lambda self: []}),
    ("both lost: the first of the rest", {"rest": lambda self: Chooser.rest(self)[:1]}),
    ("both lost: the last of equal ones", {"rest": lambda self: Chooser.rest(self)[::-1]}),
    (
        "one lost: the least loaded of the rest",
        {"drawn": lambda self: d if not self.gone & set(d := list(self.draw())) else self.rest()},
    ),
    (
        "one is sent, and not counted when all others are lost",
        {"sent": lambda self, i: self.own.__setitem__(i, self.own[i] + (len(self.rest()) > 1))},
    ),
    (
        "counts a replica drawn twice twice",
        {
            "sent": lambda self, i: None,
            "drawn": lambda self: [i for i in self.draw() if self.own.__setitem__(i, self.own[i] + 1) is None],
        },
    ),
):
    wrong("15.6", why)(type("TwoChoices", (Chooser,), parts))


@wrong("15.6", "one state for all")
class TwoChoices(Chooser):
    states = {}

    def __init__(self, n, draw):
        super().__init__(n, draw)
        self.own = self.states.setdefault(n, self.own)


@wrong("15.6", "all lost is an error")
class TwoChoices(Chooser):
    def choose(self):
        if len(self.gone) == self.n:
            self.draw()
            raise RuntimeError
        return super().choose()


class Eight(Chooser):
    def __init__(self, n, draw):
        super().__init__(n, draw)
        self.own, self.others = [0] * 8, [0] * 8


class Byte(Chooser):
    def load(self, i):
        return min(255, super().load(i))


wrong("15.6", "eight replicas at most")(Eight)
wrong("15.6", "loads of a byte")(Byte)


class Sets(Chooser):
    def rest(self):
        return set(range(self.n)) - self.gone


class TextOrder(Chooser):
    def rest(self):
        return sorted(super().rest(), key=str)


class Same(Chooser):
    def pick(self, left):
        best = left[0]
        for i in left[1:]:
            mine, least = self.load(i), self.load(best)
            if mine <= least and mine is not least:
                best = i
        return best


class Many(Chooser):
    def load(self, i):
        return min(32, self.own[i]) + self.others[i]


for impl, why in (
    (Sets, "the rest in a set's order"),
    (TextOrder, "the rest in the order of texts"),
    (Same, "equal loads are the same object"),
    (Many, "32 own requests at most"),
):
    wrong("15.6", why)(impl)


# ---- 15.7

NONE_OF = ("stream", "stream_options", "user", "metadata", "timeout", "priority")
STANDARD = {"temperature": 1, "top_p": 1, "n": 1, "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0}


def whole(value):
    if type(value) is dict:
        return {k: whole(v) for k, v in value.items()}
    if type(value) is list:
        return [whole(v) for v in value]
    return int(value) if type(value) is float and value == value and abs(value) < INF and value == int(value) else value


def is_default(name, value):
    return (
        name in STANDARD
        and type(value) in ((bool,) if name == "logprobs" else (int, float))
        and value == STANDARD[name]
    )


def named(
    client,
    body,
    digests,
    *,
    without=NONE_OF,
    greedy=("seed", "top_p"),
    plain=whole,
    sort=True,
    default=is_default,
    null=lambda v: v is not None,
    seeded=lambda b: b.get("seed") is not None,
    zero=lambda t: t == 0,
    missing=1,
    text=None,
    digest=lambda model, digests: digests.get(model),
    who=lambda client: client,
    only=None,
    written=None,
):
    """The right one, but for what is switched."""
    given = {k: v for k, v in body.items() if null(v) and k not in without and k != "model"}
    temperature = body.get("temperature")
    cold = zero(missing if temperature is None else temperature)
    model = digest(body.get("model"), digests)
    if model is None or not (cold or seeded(body)):
        return None
    if cold:
        given = {k: v for k, v in given.items() if k not in greedy}
    given = {k: v for k, v in given.items() if not default(k, v) and (only is None or k in only)}
    parts = plain([who(client), model, given])
    said = written(parts) if written else json.dumps(parts, sort_keys=sort)
    return text(said) if text else "answers:" + hashlib.sha256(said.encode()).hexdigest()


def namer(**switches):
    return lambda client, body, digests: named(client, body, digests, **switches)


def sorted_lists(value):
    if type(value) is dict:
        return {k: sorted_lists(v) for k, v in value.items()}
    if type(value) is list:
        return sorted((sorted_lists(v) for v in value), key=lambda v: json.dumps(v, sort_keys=True))
    return whole(value)


def without_nulls(value):
    if type(value) is dict:
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if type(value) is list else whole(value)


def as_floats(value):
    if type(value) is dict:
        return {k: as_floats(v) for k, v in value.items()}
    if type(value) is list:
        return [as_floats(v) for v in value]
    return float(value) if type(value) in (int, float) else value


def folded(value):
    if type(value) is dict:
        return {k: folded(v) for k, v in value.items()}
    if type(value) is list:
        return [folded(v) for v in value]
    return value.strip() if isinstance(value, str) else whole(value)


def shallow(value):
    client, model, given = value
    return [client, model, {k: int(v) if type(v) is float and v.is_integer() else v for k, v in given.items()}]


def top_sorted(parts):
    return json.dumps([*parts[:2], sorted(parts[2].items())])


for switches, why in (
    ({"who": lambda c: None}, "clients share"),
    ({"who": lambda c: c.lower().strip()}, "clients are folded"),
    ({"digest": lambda m, d: m if m in d else None}, "by the model's name"),
    ({"digest": lambda m, d: d.get(m, "?")}, "unknown models have keys"),
    ({"digest": lambda m, d: d.get(m, next(iter(d.values())))}, "unknown models are the first one"),
    ({"digest": lambda m, d: "x" if m in d else None}, "all models are one"),
    ({"digest": lambda m, d: d.get((m or "").lower())}, "names in any case"),
    ({"seeded": lambda b: True}, "draws without a seed are kept"),
    ({"seeded": lambda b: bool(b.get("seed"))}, "seed 0 is none"),
    ({"seeded": lambda b: "seed" in b}, "a seed of null is one"),
    ({"seeded": lambda b: False}, "seeds do not count"),
    ({"zero": lambda t: t < 1e-6}, "nearly 0 is 0"),
    ({"zero": lambda t: t is not None and t == 0 and type(t) is int}, "0.0 is not 0"),
    ({"missing": 0}, "a missing temperature is 0"),
    ({"greedy": ()}, "seed and top_p decide greedy answers"),
    ({"greedy": ("seed",)}, "top_p decides greedy answers"),
    ({"greedy": ("seed", "top_p", "n")}, "n does not decide greedy answers"),
    ({"greedy": ("seed", "top_p", "top_k")}, "top_k does not decide greedy answers"),
    ({"without": (*NONE_OF, "seed")}, "one key for all seeds"),
    ({"without": (*NONE_OF, "max_tokens")}, "max_tokens is left out"),
    ({"without": (*NONE_OF, "temperature")}, "temperature is left out"),
    ({"without": (*NONE_OF, "cache_salt")}, "the salt is left out"),
    ({"without": NONE_OF[1:]}, "streams have keys of their own"),
    ({"without": NONE_OF[:-1]}, "priority decides"),
    ({"without": ()}, "all fields decide"),
    ({"only": {"messages", "prompt", "temperature", "max_tokens", "seed", "top_p", "stop", "n"}}, "known fields alone"),
    ({"only": {"messages"}}, "messages alone"),
    ({"null": lambda v: True}, "null is a value"),
    ({"null": bool}, "empty values are not given"),
    ({"default": lambda k, v: False}, "defaults are values"),
    ({"default": lambda k, v: k in STANDARD and v == STANDARD[k]}, "true is 1"),
    ({"default": lambda k, v: k in STANDARD and v is STANDARD[k]}, "1.0 is no default"),
    ({"default": lambda k, v: is_default(k, v) or k == "n"}, "n is left out"),
    ({"default": lambda k, v: is_default(k, v) or (k == "min_p" and v == 0)}, "a default more"),
    ({"plain": lambda x: x}, "1.0 is not 1"),
    ({"plain": shallow}, "1.0 is not 1 inside"),
    ({"plain": as_floats}, "large seeds are rounded"),
    ({"plain": sorted_lists}, "the order of lists does not count"),
    ({"plain": without_nulls}, "null inside is not given"),
    ({"plain": folded}, "trimmed"),
    ({"sort": False}, "the order of fields counts"),
    ({"written": top_sorted}, "the order of fields counts inside"),
    ({"written": lambda parts: "".join(map(str, parts[:2])) + json.dumps(parts[2], sort_keys=True)}, "in one piece"),
    ({"written": lambda parts: ":".join(map(str, parts[:2])) + json.dumps(parts[2], sort_keys=True)}, "colons between"),
    ({"written": lambda parts: "\0".join(map(str, parts[:2])) + json.dumps(parts[2], sort_keys=True)}, "zeros between"),
    (
        {"written": lambda parts: re.sub(r"\\u[0-9a-f]{4}", "?", json.dumps(parts, sort_keys=True))},
        "other letters replaced",
    ),
    ({"written": lambda parts: json.dumps(parts, sort_keys=True).lower()}, "lower case"),
    ({"written": lambda parts: json.dumps(parts, sort_keys=True).replace('"', "")}, "without quotes"),
    ({"written": lambda parts: re.sub(r"[\[\]]", "", json.dumps(parts, sort_keys=True))}, "without brackets"),
    ({"written": lambda parts: json.dumps(parts, sort_keys=True)[:4096]}, "4,096 characters"),
    ({"text": lambda said: said}, "the whole request"),
    ({"text": lambda said: said[:128]}, "its first characters"),
    ({"text": lambda said: hashlib.sha256(said.encode()).digest()}, "bytes"),
    ({"text": lambda said: str(hash(said))}, "Python's hash"),
    ({"text": lambda said: hashlib.sha256(said.encode()).hexdigest()[:2]}, "a short digest"),
    ({"text": lambda said: 3 * hashlib.sha256(said.encode()).hexdigest()}, "a long key"),
    ({"text": lambda said: hashlib.sha256(said.encode()).digest().decode("latin-1")}, "not printable"),
):
    wrong("15.7", why)(namer(**switches))


@wrong("15.7", "the client in front")
def cache_key(client, body, digests):
    found = named(client, body, digests)
    return None if found is None else f"{ascii(client)[1:-1]}:{found[-64:]}"


@wrong("15.7", "texts in UTF-8, without those that have none")
def cache_key(client, body, digests):
    return named(
        client,
        body,
        digests,
        written=lambda p: json.dumps(p, sort_keys=True, ensure_ascii=False).encode("utf-8", "replace").decode(),
    )


@wrong("15.7", "surrogates are an error")
def cache_key(client, body, digests):
    return named(client, body, digests, written=lambda p: json.dumps(p, sort_keys=True, ensure_ascii=False))


@wrong("15.7", "takes the caller's body apart")
def cache_key(client, body, digests):
    found = named(client, body, digests)
    body.pop("stream", None)
    return found


@wrong("15.7", "a field is without effect at all depths")
def cache_key(client, body, digests):
    def cut(value):
        if type(value) is dict:
            return {k: cut(v) for k, v in value.items() if k not in NONE_OF}
        return [cut(v) for v in value] if type(value) is list else whole(value)

    return named(client, body, digests, plain=cut)


@wrong("15.7", "an error for what may not be kept")
def cache_key(client, body, digests):
    if (found := named(client, body, digests)) is None:
        raise ValueError
    return found


@wrong("15.7", "an empty text for what may not be kept")
def cache_key(client, body, digests):
    return named(client, body, digests) or ""


@alternative("15.7", "repr of sorted pairs, with types")
def cache_key(client, body, digests):
    def told(value):
        if isinstance(value, bool) or value is None:
            return ("b", repr(value))
        if isinstance(value, int | float):
            return ("n", repr(Fraction(value)))
        if isinstance(value, str):
            return ("s", ascii(value))
        if isinstance(value, list):
            return ("l", [told(one) for one in value])
        return ("d", sorted((ascii(name), told(one)) for name, one in value.items()))

    fields = {k: v for k, v in body.items() if v is not None}
    cold, model = told(fields.get("temperature", 1)) == told(0), digests.get(fields.get("model"))
    if model is None or ("seed" not in fields and not cold):
        return None
    dropped = {*NONE_OF, "model", *(("seed", "top_p") if cold else ())}
    kept = {k: v for k, v in fields.items() if k not in dropped and told(v) != told(STANDARD.get(k))}
    data = repr((ascii(client), model, told(kept))).encode()
    return base64.b64encode(hashlib.sha512(data).digest()).decode()


def digest_of(text):
    return hashlib.sha256(text.encode()).hexdigest()


def shallow(value, deep=6):
    if type(value) is dict:
        return {k: shallow(v, deep - 1) if deep else v for k, v in value.items()}
    if type(value) is list:
        return [shallow(v, deep - 1) if deep else v for v in value]
    return whole(value)


def changed(leaf):
    """whole(), and then `leaf` of each text and number and list"""

    def change(value):
        if type(value) is dict:
            return {k: change(v) for k, v in value.items()}
        return leaf([change(v) for v in value] if type(value) is list else whole(value))

    return change


def is_texts(value):
    return type(value) is list and bool(value) and all(type(v) is str for v in value)


def default_if_true(name, value):
    return is_default(name, value) or (name in ("temperature", "top_p") and value is True)


for switches, why in (
    ({"text": lambda said: digest_of(said)[:8]}, "32 bits of a digest"),
    ({"text": lambda said: str(zlib.crc32(said.encode()))}, "a checksum"),
    ({"plain": shallow}, "numbers to a depth"),
    ({"plain": changed(lambda v: float(f"{v:.15g}") if type(v) is float and v == v else v)}, "15 digits"),
    ({"plain": changed(lambda v: "\n".join(v) if is_texts(v) else v)}, "lists of texts in one piece"),
    ({"plain": changed(lambda v: v[0] if is_texts(v) and len(v) == 1 else v)}, "a list of one text is the text"),
    ({"plain": changed(lambda v: v.replace("\r\n", "\n") if type(v) is str else v)}, "ends of lines made equal"),
    ({"default": default_if_true}, "true is the default 1"),
    ({"zero": lambda t: float(t) == 0}, "a text as temperature"),
    ({"zero": lambda t: not isinstance(t, str) and t < 1e-12}, "a small temperature is 0"),
    ({"digest": lambda model, digests: (digests.get(model) or "").lower() or None}, "digests in lower case"),
    ({"digest": lambda model, digests: (digests.get(model) or "")[:12] or None}, "12 characters of a digest"),
    ({"digest": lambda model, digests: digests.setdefault(model) and digests[model]}, "adds to the digests"),
    ({"who": lambda client: client[:64]}, "64 characters of a client"),
):
    wrong("15.7", why)(namer(**switches))


def shown(encode, why):
    """Keys that tell the client in other letters."""

    def key(client, body, digests):
        found = named(client, body, digests)
        return found and f"{encode(client.encode('utf-8', 'surrogatepass'))[:48]}:{digest_of(found)}"

    wrong("15.7", why)(key)


shown(lambda client: client.hex(), "the client in hexadecimal")
shown(lambda client: base64.b64encode(client).decode(), "the client in base64")
shown(lambda client: ascii(client[:8]), "the client's first characters")


@wrong("15.7", "fields with an underscore are left out")
def cache_key(client, body, digests):
    return named(client, {k: v for k, v in body.items() if not k.startswith("_")}, digests)


wrong("15.7", "a seed of -1 is none")(namer(seeded=lambda b: b.get("seed") not in (None, -1)))
wrong("15.7", "200,000 characters of a text")(
    namer(plain=changed(lambda v: v[:200_000] if type(v) is str else v)),
)


def keyed(client, body, digests):
    found = named("", body, digests)
    return found and hmac.new(client.encode("utf-8", "surrogatepass"), found.encode(), "sha256").hexdigest()


def joined(value):
    """A message's parts of text as one text."""
    if type(value) is dict:
        return {k: joined(v) for k, v in value.items()}
    if type(value) is list and value and all(type(v) is dict and v.get("type") == "text" for v in value):
        return "".join(v["text"] for v in value)
    return [joined(v) for v in value] if type(value) is list else whole(value)


def fields(change):
    return lambda client, body, digests: named(client, change(body), digests)


def last_messages(body):
    return {**body, "messages": body["messages"][-8:]} if "messages" in body else body


def seed_as_text(body):
    return {**body, "seed": str(whole(body["seed"]))} if body.get("seed") is not None else body


def two_digits(body):
    return {k: round(v, 2) if type(v) is float and v > 0.1 else v for k, v in body.items()}


alternative("15.7", "two digests, for the client and for all")(
    lambda client, body, digests: (found := named(client, body, digests)) and digest_of(client.encode(
        "utf-8", "surrogatepass").hex())[:40] + ":" + digest_of(found)[:40]
)  # fmt: skip
wrong("15.7", "the client fills up an HMAC's key")(keyed)
for encode, why in (
    (lambda client: ascii(client[-4:]), "the client's last characters"),
    (lambda client: ascii(client[3:7]), "the client's middle"),
    (lambda client: base64.b85encode(client).decode(), "the client in base 85"),
    (lambda client: client.hex()[::-1], "the client's hexadecimal backwards"),
    (lambda client: ".".join(map(str, client[:10])), "the client's bytes as numbers"),
):
    shown(encode, why)
for switches, why in (
    ({"text": lambda said: "answer:v1:" + digest_of(said)[:4]}, "16 bits behind a long begin"),
    ({"text": lambda said: f"{zlib.crc32(said.encode()):064x}"}, "a checksum of many zeros"),
    ({"text": lambda said: f"{zlib.crc32(said.encode()):08x}" * 2}, "a checksum twice"),
    ({"digest": lambda model, digests: digests.get(model) or None}, "an empty digest is none"),
    ({"digest": lambda model, digests: digests.get(str(model).split(":")[0])}, "a model's tag is dropped"),
    ({"default": lambda k, v: k in STANDARD and json.dumps(v) in ("1", "1.0", "0", "0.0", "false")
      and is_default(k, v)}, "-0.0 is no default"),
    ({"null": lambda v: v is not None and v != {}}, "an empty dictionary is not given"),
    ({"plain": lambda parts: shallow(parts, 30)}, "numbers to a depth of 30"),
    ({"plain": joined}, "parts of a text in one piece"),
    ({"plain": lambda parts: whole([*parts[:2], {k: sorted(v, key=json.dumps) if k == "tools" else v
                                                 for k, v in parts[2].items()}])}, "tools in any order"),
):  # fmt: skip
    wrong("15.7", why)(namer(**switches))
for change, why in (
    (last_messages, "the last eight messages"),
    (seed_as_text, "a seed is text"),
    (two_digits, "two digits"),
    (lambda body: {k.replace("completion_", ""): v for k, v in body.items()}, "two names of a field"),
):
    wrong("15.7", why)(fields(change))


# ---- 15.8


class Refused(Exception):
    """As the notebook's."""

    def __init__(self, status):
        super().__init__(status)
        self.status = status


def shut(events):
    if hasattr(events, "close"):
        events.close()


def sent(
    replicas,
    request,
    attempts=3,
    *,
    most=lambda replicas, attempts: replicas[:attempts],
    hold=True,
    retry_late=False,
    needs_finish=True,
    room=(429, 503),
    kinds=(ConnectionError,),
    end=shut,
    begun_by=None,
    status=503,
    last=True,
    late=502,
    stop=True,
    ask=lambda replica, request: replica(request),
    keep=True,
    all_at_once=False,
):
    """The right one, but for what is switched."""
    begun_by = begun_by or (lambda event: bool(event.get("text")) or "finish" in event)
    for replica in most(replicas, attempts):
        held, begun, events, done = [], not hold, None, False
        try:
            events = ask(replica, request)
            for event in list(events) if all_at_once else events:
                begun = begun or begun_by(event)
                held.append(event)
                if begun:
                    yield from held if keep else held[-1:]
                    held = []
                if "finish" in event:
                    done = True
                    if stop:
                        return
            if done or not needs_finish:
                yield from held
                return
        except Refused as refusal:
            if last:
                status = refusal.status
            if refusal.status not in room:
                yield {"error": refusal.status}
                return
        except kinds:
            if done:
                return
        finally:
            end(events)
        if begun and not retry_late:
            yield {"error": late}
            return
    yield {"error": status}


def sender(**switches):
    return lambda replicas, request, attempts=3: sent(replicas, request, attempts, **switches)


for switches, why in (
    ({"retry_late": True}, "begins anew after the first text"),
    ({"hold": False}, "gives what came before the first text at once"),
    ({"hold": False, "retry_late": True}, "holds nothing, and begins anew"),
    ({"needs_finish": False}, "a stream that ends is complete"),
    ({"room": range(400, 600)}, "all refusals lead to the next one"),
    ({"room": (503,)}, "429 is the request's fault"),
    ({"room": (429,)}, "503 is the request's fault"),
    ({"room": (429, 500, 503)}, "500 leads to the next one"),
    ({"room": ()}, "no refusal leads to the next one"),
    ({"kinds": (Exception,)}, "all errors are the network's"),
    ({"kinds": (OSError,)}, "errors of the system are the network's"),
    ({"kinds": (ConnectionError, TimeoutError)}, "a time-out is the network's"),
    ({"kinds": (ConnectionResetError,)}, "a reset alone"),
    ({"kinds": ()}, "errors of the network are raised"),
    ({"end": lambda events: None}, "iterators stay open"),
    ({"end": lambda events: events.close()}, "iterators without close are an error"),
    ({"begun_by": lambda event: True}, "any event is the first text"),
    ({"begun_by": lambda event: bool(event.get("text", "").strip()) or "finish" in event}, "a space is no text"),
    ({"begun_by": lambda event: "finish" in event}, "all is held back"),
    ({"begun_by": lambda event: bool(event.get("text"))}, "a finish without text is held back"),
    ({"begun_by": lambda event: bool(event["text"]) if "text" in event else True}, "an event without text is text"),
    ({"most": lambda replicas, attempts: replicas}, "all replicas"),
    ({"most": lambda replicas, attempts: replicas[:3]}, "always three"),
    ({"most": lambda replicas, attempts: replicas[: attempts + 1]}, "one more"),
    ({"most": lambda replicas, attempts: replicas[::-1][:attempts]}, "from the last one"),
    ({"most": lambda replicas, attempts: [r for r in replicas for _ in range(2)][:attempts]}, "each twice"),
    ({"most": lambda replicas, attempts: (list(replicas) * attempts)[:attempts]}, "again from the start"),
    ({"most": lambda replicas, attempts: replicas[:1]}, "the first alone"),
    ({"status": 502}, "nobody answers: 502"),
    ({"last": False}, "the refusal's status is lost"),
    ({"late": 503}, "broken later: 503"),
    ({"stop": False}, "goes on behind a finish"),
    ({"keep": False}, "what was held is lost"),
    ({"all_at_once": True}, "asks for all events at first"),
    ({"ask": lambda replica, request: replica({**request, "retry": True})}, "changes the request"),
    ({"ask": lambda replica, request: replica(request.pop("stop", None) and request)}, "takes from the request"),
):
    wrong("15.8", why)(sender(**switches))


@wrong("15.8", "as it was given")
def forward(replicas, request, attempts=3):
    last = None
    for replica in replicas[:attempts]:
        try:
            yield from replica(request)
            return
        except Exception as error:
            last = error
    yield {"error": getattr(last, "status", 503)}


@wrong("15.8", "closes after all that is well alone")
def forward(replicas, request, attempts=3):
    opened = []

    def ask(replica, request):
        opened.append(replica(request))
        return opened[-1]

    yield from sent(replicas, request, attempts, end=lambda events: None, ask=ask)
    for events in opened:
        shut(events)


@wrong("15.8", "closes all at the end")
def forward(replicas, request, attempts=3):
    opened = []

    def ask(replica, request):
        opened.append(replica(request))
        return opened[-1]

    try:
        yield from sent(replicas, request, attempts, end=lambda events: None, ask=ask)
    finally:
        for events in opened:
            shut(events)


@wrong("15.8", "one event behind")
def forward(replicas, request, attempts=3):
    waiting = deque()
    with closing(sent(replicas, request, attempts)) as events:
        for event in events:
            waiting.append(event)
            if len(waiting) > 1:
                yield waiting.popleft()
    yield from waiting


@wrong("15.8", "holds back what has no text, later too")
def forward(replicas, request, attempts=3):
    held = []
    with closing(sent(replicas, request, attempts)) as events:
        for event in events:
            held.append(event)
            if event.get("text") or "finish" in event or "error" in event:
                yield from held
                held = []


@wrong("15.8", "a list")
def forward(replicas, request, attempts=3):
    return list(sent(replicas, request, attempts))


@wrong("15.8", "stops at the error, and says nothing")
def forward(replicas, request, attempts=3):
    for event in sent(replicas, request, attempts):
        if event.get("error") == 502:
            return
        yield event


@wrong("15.8", "a finish behind an error")
def forward(replicas, request, attempts=3):
    for event in sent(replicas, request, attempts):
        yield event
        if "error" in event:
            yield {"finish": "error"}


@wrong("15.8", "the first refusal's status")
def forward(replicas, request, attempts=3):
    first = []

    def ask(replica, request):
        try:
            return replica(request)
        except Refused as error:
            first.append(error.status)
            raise

    for event in sent(replicas, request, attempts, ask=ask):
        yield {"error": first[0]} if "error" in event and first and first[0] in (429, 503) else event


@wrong("15.8", "a break forgets the refusal before it")
def forward(replicas, request, attempts=3):
    broke = []

    def ask(replica, request):
        try:
            found = replica(request)
        except Refused:
            broke.clear()
            raise
        except ConnectionError:
            broke.append(1)
            raise
        broke.append(1)
        return found

    for event in sent(replicas, request, attempts, ask=ask):
        yield {"error": 503} if event == {"error": 429} and broke else event


@alternative("15.8", "a part that holds back, a part that tries")
def forward(replicas, request, attempts=3):
    last = {"error": 503}
    for index in range(min(attempts, len(replicas))):
        stream, seen = None, 0
        try:
            stream = iter(replicas[index](request))
            early = []
            while True:
                event = next(stream, None)
                if event is None:
                    raise ConnectionError("ended")
                early.append(event)
                if event.get("text") or "finish" in event:
                    seen += len(early)
                    while early:
                        one = early.pop(0)
                        yield one
                        if "finish" in one:
                            return
                    break
            while True:
                event = next(stream, {"error": 502})
                yield event
                if "finish" in event or "error" in event:
                    return
        except ConnectionError:
            if seen:
                yield {"error": 502}
                return
        except Refused as error:
            last = {"error": error.status}
            if error.status != 429 and error.status != 503:
                break
        finally:
            if callable(getattr(stream, "close", None)):
                stream.close()
    yield last


for switches, why in (
    ({"room": (429, 502, 503, 504)}, "502 and 504 say that there is no room"),
    ({"room": (408, 429, 503)}, "408 says that there is no room"),
    ({"room": (429, *range(501, 600))}, "501 and more say that there is no room"),
    ({"most": lambda replicas, attempts: replicas[: attempts or 3]}, "0 attempts are 3"),
    ({"begun_by": lambda event: bool(event.get("text")) or event.get("finish") == "stop"}, "one kind of finish"),
    (
        {"ask": lambda replica, request: replica({k: request[k] for k in ("prompt", "stop") if k in request})},
        "known fields of the request alone",
    ),
):
    wrong("15.8", why)(sender(**switches))


@wrong("15.8", "asks the first one before the client wants an event")
def forward(replicas, request, attempts=3):
    if not replicas or attempts < 1:
        return sent(replicas, request, attempts)
    try:
        events, error = replicas[0](request), None
    except Exception as e:
        events, error = None, e

    def first(_):
        if error:
            raise error
        return events

    return sent([first, *replicas[1:]], request, attempts)


@wrong("15.8", "16 events are held")
def forward(replicas, request, attempts=3):
    def short(replica):
        def ask(request):
            events = replica(request)
            try:
                held = deque(maxlen=16)
                for event in events:
                    held.append(event)
                    if event.get("text") or "finish" in event:
                        yield from held
                        held.clear()
                    if "finish" in event:
                        return
            finally:
                shut(events)

        return ask

    yield from sent([short(replica) for replica in replicas], request, attempts)


@wrong("15.8", "what was refused before says how a stream breaks")
def forward(replicas, request, attempts=3):
    refused = []

    def noting(replica):
        def ask(request):
            events = None
            try:
                events = replica(request)
                yield from events
            except Refused as refusal:
                refused.append(refusal.status)
                raise
            finally:
                shut(events)

        return ask

    for event in sent([noting(replica) for replica in replicas], request, attempts):
        yield {"error": refused[-1]} if event == {"error": 502} and refused else event


wrong("15.8", "an EOFError is a break")(sender(kinds=(ConnectionError, EOFError)))


def only_named(replicas, request, attempts=3):
    five = ConnectionError, ConnectionResetError, ConnectionAbortedError, ConnectionRefusedError, BrokenPipeError

    def ask(replica, request):
        events = None
        try:
            events = replica(request)
            yield from events
        except ConnectionError as error:
            if type(error) not in five:
                raise RuntimeError from error
            raise
        finally:
            shut(events)

    yield from sent(replicas, request, attempts, ask=ask)


class LeftOpen:
    """An iterator whose close() does nothing for a client that leaves at the finish."""

    def __init__(self, events):
        self.events, self.event = events, {}

    def __iter__(self):
        return self

    def __next__(self):
        self.event = next(self.events)
        return self.event

    def close(self):
        if "finish" not in self.event or sys.exc_info()[0] is not GeneratorExit:
            shut(self.events)


@wrong("15.8", "closes behind an error, which the client may not wait for")
def forward(replicas, request, attempts=3):
    status = 503
    for replica in replicas[:attempts]:
        events = None
        try:
            events, held, begun = replica(request), [], False
            for event in events:
                held.append(event)
                begun = begun or bool(event.get("text")) or "finish" in event
                while begun and held:
                    yield held.pop(0)
                if "finish" in event:
                    shut(events)
                    return
        except Refused as refusal:
            status = refusal.status
            if status not in (429, 503):
                shut(events)
                yield {"error": status}
                return
        except ConnectionError:
            pass
        except BaseException:
            shut(events)
            raise
        if begun:
            yield {"error": 502}
        shut(events)
        if begun:
            return
    yield {"error": status}


wrong("15.8", "open when the client leaves at the finish")(
    sender(ask=lambda replica, request: LeftOpen(replica(request)))
)


@wrong("15.8", "attempts by name alone")
def forward(replicas, request, *, attempts=3):
    yield from sent(replicas, request, attempts)


wrong("15.8", "named kinds, and none derived")(only_named)
for switches, why in (
    ({"kinds": (ConnectionError, AttributeError)}, "an AttributeError is a break"),
    ({"kinds": (ConnectionError, AssertionError, ArithmeticError)}, "failed assertions are a break"),
    ({"room": (429, 503, 507)}, "507 leads to the next one"),
    ({"begun_by": lambda event: event.get("text", "") not in ("", "0") or "finish" in event}, "0 is no text"),
    ({"begun_by": lambda event: bool(event.get("text", "").strip("\n")) or "finish" in event}, "a newline is no text"),
):
    wrong("15.8", why)(sender(**switches))
for change, why in (
    (lambda event: {"finish": event["finish"]} if "finish" in event else event, "a finish alone"),
    (lambda event: {"text": event["text"]} if "text" in event else event, "text alone"),
):
    wrong("15.8", why)(
        lambda replicas, request, attempts=3, change=change: (
            change(event) for event in sent(replicas, request, attempts)
        )
    )


alternative("15.8", "the right one, in other words")(sender())
