r"""Regular expressions, as languages over UTF-8 bytes.

A subset of Python's `re`, always for the whole text (`re.fullmatch` with `re.ASCII`):

    abc  .  [a-z_]  [^"]  \d \D \w \W \s \S  \n \r \t \f \v \a  \xHH  \uXXXX  \UXXXXXXXX  \. and other signs
    (...)  (?:...)  (?P<name>...)  a|b  *  +  ?  {m}  {m,}  {,n}  {m,n}, and with a lazy ? behind it, which is the same
    ^ and $ where each alternative begins and ends, where they say nothing new

Everything else is refused by name with its position: look-around, back references, flags, word boundaries, \p{...},
possessive repeats, ^ and $ elsewhere.

A pattern of a JSON schema is looked for anywhere in a string, in a dialect between JavaScript's and Python's: there
`search=True`, and \d, \w, \s, . mean what both agree on.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

from .automaton import Automaton, ConstraintError, ConstraintTooLarge, Limits, Node, byte_set

__all__ = ["Ranges", "Tree", "build", "complement", "digit_ranges", "one_set", "parse", "searched", "utf8"]

Ranges = list[tuple[int, int]]  # of code points, (first, last), in order and apart
Tree = tuple[
    Any, ...
]  # ("set", Ranges), ("cat", [Tree]), ("alt", [Tree]), ("repeat", Tree, least, most), ("^",), ("$",)

HIGHEST = 0x10FFFF
SURROGATES = (0xD800, 0xDFFF)
SIMPLE = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "a": "\a"}
HEX = {"x": 2, "u": 4, "U": 8}
ASCII_CLASSES: dict[str, Ranges] = {
    "d": [(0x30, 0x39)],
    "w": [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)],
    "s": [(0x09, 0x0D), (0x20, 0x20)],
}
REFUSED_GROUPS = {
    "?=": "look-ahead", "?!": "look-ahead", "?<=": "look-behind", "?<!": "look-behind", "?P=": "back reference",
    "?>": "atomic group", "?#": "comment", "?(": "conditional",
}  # fmt: skip
REFUSED_ESCAPES = {"b": "word boundary", "B": "word boundary", "A": "anchor", "Z": "anchor", "p": "Unicode property",
                   "P": "Unicode property", "k": "back reference"}  # fmt: skip


# ---- sets of code points ---------------------------------------------------------------------------------------------


def _joined(ranges: Sequence[tuple[int, int]]) -> Ranges:
    """In order, apart, without surrogates: these are no characters."""
    result: Ranges = []
    for first, last in sorted(ranges):
        if result and first <= result[-1][1] + 1:
            result[-1] = result[-1][0], max(last, result[-1][1])
        else:
            result.append((first, last))
    apart = []
    for first, last in result:
        apart += [(first, min(last, SURROGATES[0] - 1)), (max(first, SURROGATES[1] + 1), last)]
        if last < SURROGATES[0] or first > SURROGATES[1]:
            apart[-2:] = [(first, last)]
    return [(first, last) for first, last in apart if first <= last]


def complement(ranges: Ranges) -> Ranges:
    """All characters that are not in them."""
    edges = [-1, *[edge for pair in ranges for edge in pair], HIGHEST + 1]
    return _joined([(a + 1, b - 1) for a, b in zip(edges[::2], edges[1::2], strict=True) if a + 1 <= b - 1])


@cache
def _unicode_class(name: str) -> tuple[tuple[int, int], ...]:
    r"""What Python's \d, \w or \s takes of all of Unicode, and JavaScript's \s."""
    characters = "".join(map(chr, range(HIGHEST + 1)))
    found = [(m.start(), m.end() - 1) for m in re.finditer(rf"\{name}+", characters)]
    return tuple(_joined([*found, (0xFEFF, 0xFEFF)] if name == "s" else found))


def _class(name: str, wide: bool) -> Ranges:
    r"""\d, \D, ...: what dialects agree on, or with `wide` what any of them takes."""
    inverse = name.isupper()
    ranges = list(_unicode_class(name.lower())) if wide != inverse else ASCII_CLASSES[name.lower()]
    return complement(ranges) if inverse else ranges


# ---- from text to a tree ---------------------------------------------------------------------------------------------


class _Parser:
    def __init__(self, pattern: str, limits: Limits, search: bool, wide: bool) -> None:
        self.text, self.at, self.limits, self.depth = pattern, 0, limits, 0
        # A whole match is re.ASCII; a searched pattern is read by dialects that differ in what is not ASCII.
        self.search, self.wide = search, wide

    def refuse(self, what: str, at: int | None = None) -> ConstraintError:
        return ConstraintError(f"regex: {what} at position {self.at if at is None else at} of {self.text[:80]!r}")

    def peek(self, text: str) -> bool:
        return self.text.startswith(text, self.at)

    def take(self, text: str) -> bool:
        found = self.peek(text)
        self.at += len(text) * found
        return found

    def alternatives(self) -> Tree:
        found = [self.sequence()]
        while self.take("|"):
            found.append(self.sequence())
        return ("alt", found) if len(found) > 1 else found[0]

    def sequence(self) -> Tree:
        items: list[Tree] = []
        while self.at < len(self.text) and not self.peek("|") and not self.peek(")"):
            items.append(self.repeated(self.atom()))
        return ("cat", items)

    def atom(self) -> Tree:
        at, char = self.at, self.text[self.at]
        self.at += 1
        if char == "(":
            return self.group(at)
        if char == "[":
            return ("set", self.bracket(at))
        if char == "\\":
            return ("set", self.escape(at))
        if char == ".":
            ends = [(0x0A, 0x0A)]
            if self.search and not self.wide:  # JavaScript's line ends, too
                ends += [(0x0D, 0x0D), (0x2028, 0x2029)]
            return ("set", complement(ends))
        if char in "^$":
            return (char,)
        if char in "*+?":
            raise self.refuse(f"expected something to repeat before {char!r}", at)
        return ("set", self.one(ord(char), at))

    def one(self, code: int, at: int) -> Ranges:
        if SURROGATES[0] <= code <= SURROGATES[1] or code > HIGHEST:
            raise self.refuse(f"expected characters, got code point {code:#x}, which is none,", at)
        return [(code, code)]

    def group(self, at: int) -> Tree:
        for mark, what in REFUSED_GROUPS.items():
            if self.peek(mark):
                raise self.refuse(f"{what} (?...) is not supported", at)
        named = re.compile(r"\?P?<[A-Za-z_]\w*>|\?:").match(self.text, self.at)
        if self.peek("?") and not named:
            raise self.refuse("flags (?...) are not supported", at)
        self.at = named.end() if named else self.at
        self.depth += 1
        if self.depth > self.limits.depth:
            raise ConstraintTooLarge(f"regex: expected at most {self.limits.depth} groups within one another")
        inner = self.alternatives()
        if not self.take(")"):
            raise self.refuse("expected ) for the group", at)
        self.depth -= 1
        return inner

    def escape(self, at: int) -> Ranges:
        if self.at == len(self.text):
            raise self.refuse("expected a character behind \\", at)
        char = self.text[self.at]
        self.at += 1
        if char in "dDwWsS":
            return _class(char, self.wide) if self.search else _ascii_class(char)
        if char in SIMPLE:
            return [(ord(SIMPLE[char]),) * 2]
        if char in HEX:
            digits = self.text[self.at : self.at + HEX[char]]
            if not re.fullmatch(rf"[0-9a-fA-F]{{{HEX[char]}}}", digits):
                raise self.refuse(f"expected {HEX[char]} hexadecimal digits behind \\{char}", at)
            self.at += HEX[char]
            return self.one(int(digits, 16), at)
        if char.isdigit():
            raise self.refuse(f"back reference or octal \\{char} is not supported", at)
        if char.isalpha() or not char.isascii():
            raise self.refuse(f"{REFUSED_ESCAPES.get(char, 'escape')} \\{char} is not supported", at)
        return [(ord(char), ord(char))]

    def bracket(self, at: int) -> Ranges:
        """[...], whose [ was read."""
        inverse, ranges = self.take("^"), []  # type: bool, Ranges
        if self.peek("]"):
            raise self.refuse("an empty class, or one that begins with ], is read differently by dialects: use \\]", at)
        wide, self.wide = self.wide, self.wide != inverse
        while not self.take("]"):
            first = self.member(at)
            if self.peek("-") and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                last = self.member(at)
                single = len(first) == len(last) == 1 and first[0][0] == first[0][1] and last[0][0] == last[0][1]
                if not single or first[0][0] > last[0][0]:
                    raise self.refuse("expected a range from one character to a later one in the class", at)
                first = [(first[0][0], last[0][0])]
            ranges += first
        self.wide = wide
        ranges = _joined(ranges)
        return complement(ranges) if inverse else ranges

    def member(self, at: int) -> Ranges:
        if self.at >= len(self.text):
            raise self.refuse("expected ] for the class", at)
        char = self.text[self.at]
        self.at += 1
        return self.escape(self.at - 1) if char == "\\" else self.one(ord(char), self.at - 1)

    def repeated(self, tree: Tree) -> Tree:
        at, bounds = self.at, self.bounds()
        if bounds is None:
            return tree
        if tree[0] in "^$":
            raise self.refuse("an anchor cannot be repeated,", at)
        if self.peek("+"):
            raise self.refuse("possessive repeats are not supported,")
        self.take("?")  # lazy: the same language
        end = self.at
        if self.bounds() is not None:
            raise self.refuse("expected one repeat, got two", end)
        return ("repeat", tree, *bounds)

    def bounds(self) -> tuple[int, int | None] | None:
        for sign, found in {"*": (0, None), "+": (1, None), "?": (0, 1)}.items():
            if self.take(sign):
                return found
        braces = re.compile(r"\{(\d*)(,?)(\d*)\}", re.ASCII).match(self.text, self.at)
        if not braces or braces.group() in ("{}", "{,}"):
            return None  # a brace that stands for itself
        least, comma, most = braces.groups()
        if self.search and not least:
            raise self.refuse("{,n} is read differently by dialects: use {0,n},")
        if max(len(least), len(most)) > 7:
            raise ConstraintTooLarge(f"regex: expected smaller numbers in {braces.group()[:40]}")
        low, high = int(least or 0), (int(most) if most else None) if comma else int(least)
        if high is not None and low > high:
            raise self.refuse(f"expected the smaller number first in {braces.group()}")
        self.at = braces.end()
        return low, high


def _ascii_class(name: str) -> Ranges:
    ranges = ASCII_CLASSES[name.lower()]
    return complement(ranges) if name.isupper() else ranges


def parse(pattern: str, limits: Limits | None = None, search: bool = False, wide: bool = False) -> Tree:
    """What a pattern says, as a tree. search: a JSON schema's dialect. wide: what any dialect matches, not all.

    Raises ConstraintError that names what is not supported and where, ConstraintTooLarge beyond the limits.
    """
    limits = limits or Limits()
    if not isinstance(pattern, str):
        raise TypeError(f"regex: expected a str, got {type(pattern).__name__}")
    if len(pattern) > limits.source:
        raise ConstraintTooLarge(f"regex: expected at most {limits.source} characters, got {len(pattern)}")
    parser = _Parser(pattern, limits, search, wide)
    tree = parser.alternatives()
    if parser.at < len(pattern):
        raise parser.refuse("expected ( before )")
    if (size := _positions(tree)) > limits.positions:
        raise ConstraintTooLarge(
            f"regex: expected at most {limits.positions} positions, got {size} with all repeats written out; "
            "make the counts in {m,n} smaller"
        )
    return tree


def _positions(tree: Tree, outer: int = 1) -> int:
    if tree[0] in ("cat", "alt"):
        return sum([_positions(item, outer) for item in tree[1]])
    if tree[0] == "repeat":
        count = max(tree[2], tree[3] or 1)
        nested = 10 if count > 1 and outer > 1 else 1  # a state then is a set of pairs of counts
        return _positions(tree[1], max(count, outer)) * count * nested
    return 1


# ---- from a tree to a language ---------------------------------------------------------------------------------------


def build(automaton: Automaton, tree: Tree, characters: Callable[[Ranges], Node] | None = None) -> Node:
    """The language of a parsed pattern, for the whole text. characters: a set of characters as bytes; UTF-8 if None."""
    spelled = characters or (lambda ranges: utf8(automaton, ranges))
    return automaton.union([
        _build(automaton, items, spelled) for items, _, _ in _branches(tree)
    ])  # fmt: skip


def searched(
    automaton: Automaton, tree: Tree, characters: Callable[[Ranges], Node], any_text: Node, wide: bool = False
) -> Node:
    """The texts in which a parsed pattern is found somewhere: `any_text` on each side that has no anchor.

    wide: as in `parse`; Python's $ also matches in front of a newline at the end.
    """
    found = []
    end = automaton.optional(characters([(0x0A, 0x0A)])) if wide else automaton.empty
    for items, begins, ends in _branches(tree):
        inner = _build(automaton, items, characters)
        before, after = automaton.empty if begins else any_text, end if ends else any_text
        found.append(automaton.concat(before, inner, after))
    return automaton.union(found)


def one_set(tree: Tree) -> tuple[Ranges, int, int | None] | None:
    """(characters, least, most) of a pattern such as ^[a-z]{1,9}$; None for any other.

    Limits on the length then only change its counts.
    """
    branches = list(_branches(tree))
    items, begins, ends = branches[0]
    if len(branches) > 1 or not begins or not ends or [item[0] for item in items[1]] != ["repeat"]:
        return None
    _, inner, least, most = items[1][0]
    while inner[0] == "cat" and len(inner[1]) == 1:
        inner = inner[1][0]
    return (inner[1], least, most) if inner[0] == "set" else None


def _branches(tree: Tree) -> Iterator[tuple[Tree, bool, bool]]:
    """Each alternative without its anchors, and whether it had one in front and one behind."""
    if tree[0] == "alt":
        for branch in tree[1]:
            yield from _branches(branch)
        return
    items = list(tree[1]) if tree[0] == "cat" else [tree]
    begins, ends = items[:1] == [("^",)], items[-1:] == [("$",)]
    items = items[begins : len(items) - ends]
    if len(items) == 1 and items[0][0] in ("cat", "alt"):
        for inner, first, last in _branches(items[0]):
            yield inner, begins or first, ends or last
    else:
        yield ("cat", items), begins, ends


def _build(automaton: Automaton, tree: Tree, characters: Callable[[Ranges], Node]) -> Node:
    kind = tree[0]
    if kind == "set":
        return characters(tree[1])
    if kind == "cat":
        return automaton.concat(*[_build(automaton, item, characters) for item in tree[1]])
    if kind == "alt":
        return automaton.union([_build(automaton, item, characters) for item in tree[1]])
    if kind == "repeat":
        return automaton.repeat(_build(automaton, tree[1], characters), tree[2], tree[3])
    raise ConstraintError(f"regex: {kind} is supported only where an alternative begins (^) or ends ($)")


def utf8(automaton: Automaton, ranges: Ranges) -> Node:
    """One character of a set, as the bytes of UTF-8."""
    found = []
    for low, high in ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xFFFF), (0x10000, HIGHEST)):
        for first, last in ranges:
            a, b = max(first, low), min(last, high)
            if a > b:
                continue
            for places in digit_ranges(tuple(chr(a).encode()), tuple(chr(b).encode()), 0x80, 0xBF):
                found.append(automaton.concat(*[automaton.byte(byte_set(place)) for place in places]))
    return automaton.union(found)


def digit_ranges(low: tuple[int, ...], high: tuple[int, ...], least: int, most: int) -> Iterator[Ranges]:
    """The numbers from `low` to `high`, as few lists of ranges, one range a digit; digits behind the first go from
    `least` to `most`. 25 to 99 in decimal is [2][5-9] and [3-9][0-9]; the continuation bytes of UTF-8 are digits, too.
    """
    (a, *low_rest), (b, *high_rest) = low, high
    if not low_rest:
        yield [(a, b)]
        return
    lowest, highest = (least,) * len(low_rest), (most,) * len(low_rest)
    if a == b:
        yield from ([(a, a), *rest] for rest in digit_ranges(tuple(low_rest), tuple(high_rest), least, most))
        return
    if tuple(low_rest) != lowest:
        yield from ([(a, a), *rest] for rest in digit_ranges(tuple(low_rest), highest, least, most))
        a += 1
    last = b if tuple(high_rest) == highest else b - 1
    if a <= last:
        yield [(a, last), *[(least, most)] * len(low_rest)]
    if last < b:
        yield from ([(b, b), *rest] for rest in digit_ranges(lowest, tuple(high_rest), least, most))
