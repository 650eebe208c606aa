"""The pieces of JSON as languages: strings, numbers within bounds, any value to a depth.

What is generated is one line in the form of Python's `json.dumps`, where the one space behind : and , may be missing.
Numbers have at most 17 digits in front of the point and 20 behind it, and an exponent below 200: all that is accepted
can be read as a finite number.
"""

import json
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from .automaton import Automaton, Node, byte_set
from .regex import Ranges, complement, digit_ranges, utf8

__all__ = ["JsonText"]

SHORT_ESCAPES = {0x22: b'"', 0x5C: b"\\", 0x08: b"b", 0x0C: b"f", 0x0A: b"n", 0x0D: b"r", 0x09: b"t"}
DIGITS = 17
PLACES = 20  # behind the point: a double from 0.0001 on is written without an exponent, with 17 digits that count
HEX = [byte_set((ord(low), ord(low)), (ord(low.upper()), ord(low.upper()))) for low in "0123456789abcdef"]
ANY_CHARACTER = complement([])


class JsonText:
    """Makes the pieces, for one automaton; each is made once."""

    def __init__(self, automaton: Automaton) -> None:
        self._a = a = automaton
        self._characters: dict[tuple[tuple[int, int], ...], Node] = {}
        space = a.optional(a.literal(b" "))
        self.comma, self.colon = a.concat(a.literal(b","), space), a.concat(a.literal(b":"), space)
        self.quote = a.literal(b'"')
        self.character = self.characters(ANY_CHARACTER, every_escape=True)
        self.string = self.string_of(a.repeat(self.character))
        self.null, self.boolean = a.literal(b"null"), a.union([a.literal(b"true"), a.literal(b"false")])
        self.digit = a.byte(byte_set((0x30, 0x39)))
        self.integer = self.integer_within(None, None)
        self.number = self._number()
        self._any: list[Node] = [a.union([self.null, self.boolean, self.number, self.string])]

    # ---- strings ---------------------------------------------------------------------------------------------------

    def string_of(self, content: Node) -> Node:
        """A string with such a content, escapes included. Its end belongs to it: masks are kept by such pieces."""
        return self._a.concat(self.quote, self._a.concat(content, self.quote))

    def length(self, least: int, most: int | None) -> Node:
        """The content of any string of `least` to `most` characters."""
        return self._a.repeat(self.character, least, most)

    def characters(self, ranges: Ranges, every_escape: bool = False) -> Node:
        r"""One character of a set, as it may stand in a string: itself where it may, \n, \u000a, \ud83d\ude00.

        A printing ASCII character is not spelled \u0061, nor / as \/, unless `every_escape`.
        """
        key = (*ranges, (every_escape, 0))
        if key not in self._characters:
            a, plain = self._a, _without(ranges, [(0, 0x1F), (0x22, 0x22), (0x5C, 0x5C)])
            found = [utf8(a, plain)]
            found += [a.literal(b"\\" + short) for code, short in SHORT_ESCAPES.items() if _holds(ranges, code)]
            escaped = ranges if every_escape else _without(ranges, [(0x20, 0x7E)])
            found += [a.literal(b"\\/")] if every_escape and _holds(ranges, ord("/")) else []
            self._characters[key] = a.union(found + self._unicode_escapes(escaped))
        return self._characters[key]

    def _unicode_escapes(self, ranges: Ranges) -> list[Node]:
        found = []
        for first, last in ranges:
            if first <= 0xFFFF:
                found += self._hex(first, min(last, 0xFFFF))
            if last <= 0xFFFF:
                continue
            # A pair of surrogates is a number of two digits to the base 1024.
            low, high = (divmod(code - 0x10000, 1024) for code in (max(first, 0x10000), last))
            for (a, b), (c, d) in digit_ranges(low, high, 0, 1023):
                seconds = self._a.union(self._hex(0xDC00 + c, 0xDC00 + d))
                found += [self._a.concat(unit, seconds) for unit in self._hex(0xD800 + a, 0xD800 + b)]
        return found

    def _hex(self, first: int, last: int) -> list[Node]:
        low, high = (tuple(int(digit, 16) for digit in f"{code:04x}") for code in (first, last))
        return [
            self._a.concat(self._a.literal(b"\\u"), *[self._a.byte(sum(HEX[a : b + 1])) for a, b in places])
            for places in digit_ranges(low, high, 0, 15)
        ]  # fmt: skip

    def spelled(self, text: str) -> Node:
        """One string, in every way in which it can be written."""
        units = [self.characters([(ord(c), ord(c))], every_escape=True) for c in text]
        return self.string_of(self._a.concat(*units))

    # ---- values ----------------------------------------------------------------------------------------------------

    def value(self, value: Any) -> Node:
        """One value as `json.dumps` writes it, with ASCII alone or not."""
        if isinstance(value, list):
            return self.array([self.value(item) for item in value])
        if isinstance(value, dict):
            pairs = [self._a.concat(self.value(key), self.colon, self.value(item)) for key, item in value.items()]
            return self._a.concat(self._a.literal(b"{"), self._listed(pairs), self._a.literal(b"}"))
        texts = {json.dumps(value), json.dumps(value, ensure_ascii=False)}
        return self._a.union([self._a.literal(text.encode()) for text in texts])

    def array(self, items: Sequence[Node]) -> Node:
        """An array of exactly these items."""
        return self._a.concat(self._a.literal(b"["), self._listed(items), self._a.literal(b"]"))

    def _listed(self, items: Sequence[Node]) -> Node:
        parts = [part for item in items for part in (self.comma, item)]
        return self._a.concat(*parts[1:])

    def any_value(self, nesting: int) -> Node:
        """Any JSON with at most so many arrays and objects within one another."""
        while len(self._any) <= nesting:
            inner = self._any[-1]
            self._any.append(self._a.union([self._any[0], self.any_array(inner), self.any_object(inner)]))
        return self._any[nesting]

    def any_array(self, item: Node) -> Node:
        """An array of any number of items."""
        a = self._a
        items = a.concat(item, a.repeat(a.concat(self.comma, item)))
        return a.concat(a.literal(b"["), a.optional(items), a.literal(b"]"))

    def any_object(self, item: Node) -> Node:
        """An object of any names with such values."""
        a = self._a
        pair = a.concat(self.string, a.concat(self.colon, item))
        pairs = a.concat(pair, a.repeat(a.concat(self.comma, pair)))
        return a.concat(a.literal(b"{"), a.optional(pairs), a.literal(b"}"))

    # ---- numbers ---------------------------------------------------------------------------------------------------

    def integer_within(self, low: int | None, high: int | None) -> Node:
        """An integer from `low` to `high`, exactly, digit by digit; None is 17 digits far."""
        furthest = 10**DIGITS - 1
        low, high = max(-furthest, -furthest if low is None else low), min(furthest, furthest if high is None else high)
        parts = [self._natural(max(low, 0), high)]
        if low < 0:
            parts.append(self._a.concat(self._a.literal(b"-"), self._natural(max(1, -high), -low)))
        return self._a.union(parts)

    def _natural(self, low: int, high: int) -> Node:
        found = []
        for length in range(1, DIGITS + 1):
            first, last = max(low, 10 ** (length - 1) if length > 1 else 0), min(high, 10**length - 1)
            if first > last:
                continue
            a, b = (tuple(map(int, str(n))) for n in (first, last))
            for places in digit_ranges(a, b, 0, 9):
                found.append(self._a.concat(*[self._digits(*place) for place in places]))
        return self._a.union(found)

    def _digits(self, first: int, last: int) -> Node:
        return self._a.byte(byte_set((0x30 + first, 0x30 + last)))

    def _number(self) -> Node:
        a = self._a
        whole = a.concat(a.optional(a.literal(b"-")), self._natural(0, 10**DIGITS - 1))
        power = a.concat(a.optional(a.literal(b"1")), a.repeat(self.digit, 1, 2))  # 0 to 199
        sign = a.optional(a.byte(byte_set((0x2B, 0x2B), (0x2D, 0x2D))))
        exponent = a.concat(a.byte(byte_set((0x45, 0x45), (0x65, 0x65))), sign, power)
        return a.concat(whole, a.optional(self._fraction(a.repeat(self.digit, 1, PLACES))), a.optional(exponent))

    def _fraction(self, digits: Node) -> Node:
        return self._a.concat(self._a.literal(b"."), digits)

    def number_within(self, low: tuple[Decimal, bool] | None, high: tuple[Decimal, bool] | None) -> Node:
        """A number without exponent between bounds, each (bound, whether the bound itself is left out).

        Who reads it rounds it to a double. That keeps <= and >=, but could make 1.00000000000000001 the 1 that is left
        out: beside such a bound a number has at most 15 digits, which a double tells apart.
        """
        digits = PLACES
        for bound, strict in (b for b in (low, high) if b):
            digits = min(digits, max(1, 15 - len(str(abs(int(bound)))))) if strict else digits
        zero = (Decimal(0), False)
        minus = self._a.literal(b"-")
        if low is None or low[0] < 0:
            mirrored = (max((-high[0], high[1]), zero) if high else zero), ((-low[0], low[1]) if low else None)
            negative = self._a.concat(minus, self._magnitude(*mirrored, digits))
        else:
            negative = self._a.nothing
        if high is not None and (high[0] < 0 or high == (Decimal(0), True)):
            return negative
        return self._a.union([negative, self._magnitude(max(low or zero, zero), high, digits)])

    def _magnitude(self, low: tuple[Decimal, bool], high: tuple[Decimal, bool] | None, digits: int) -> Node:
        above = self._half(low[0], low[1], digits, up=True)
        return above if high is None else self._a.both(above, self._half(high[0], high[1], digits, up=False))

    def _half(self, bound: Decimal, strict: bool, digits: int, up: bool) -> Node:
        """Numbers without sign on one side of a bound that is 0 or more."""
        a, whole = self._a, int(bound)
        tail = f"{bound:f}".partition(".")[2].rstrip("0")
        any_fraction = a.optional(self._fraction(a.repeat(self.digit, 1, digits)))
        beyond = self._natural(whole + 1, 10**DIGITS - 1) if up else self._natural(0, whole - 1)
        equal = a.literal(str(whole).encode())
        within = self._fraction_half(tail, strict, digits, up)
        # Without a point, the fraction is 0.
        alone = [equal] if (not up and (tail or not strict)) or (up and not tail and not strict) else []
        return a.union([a.concat(beyond, any_fraction), a.concat(equal, self._fraction(within)), *alone])

    def _fraction_half(self, tail: str, strict: bool, left: int, up: bool) -> Node:
        """One to `left` digits behind a point that make a fraction on one side of 0.`tail`."""
        a, zeros = self._a, _zeros(self._a, left)
        if left <= 0:
            return a.nothing
        if not tail:
            if up:
                return (
                    a.both(a.repeat(self.digit, 1, left), a.complement(zeros))
                    if strict
                    else a.repeat(self.digit, 1, left)
                )
            return a.nothing if strict else zeros
        digit, rest = int(tail[0]), tail[1:]
        more = a.repeat(self.digit, 0, left - 1)
        found = []
        if up and digit < 9:
            found.append(a.concat(self._digits(digit + 1, 9), more))
        if not up and digit > 0:
            found.append(a.concat(self._digits(0, digit - 1), more))
        inner = self._fraction_half(rest, strict, left - 1, up)
        # The digits may end here: what is left of the bound is above 0, or is 0 and allowed.
        ends = bool(rest) or not strict if not up else not rest and not strict
        found.append(a.concat(a.literal(tail[0].encode()), a.optional(inner) if ends else inner))
        return a.union(found)


def _zeros(automaton: Automaton, most: int) -> Node:
    """One to `most` zeros."""
    return automaton.repeat(automaton.literal(b"0"), 1, max(most, 1))


def _without(ranges: Ranges, others: Ranges) -> Ranges:
    """The characters of the first set that are not in the second."""
    kept = complement(others)
    return [
        (max(a, c), min(b, d)) for a, b in ranges for c, d in kept if max(a, c) <= min(b, d)
    ]  # fmt: skip


def _holds(ranges: Ranges, code: int) -> bool:
    return any([first <= code <= last for first, last in ranges])
