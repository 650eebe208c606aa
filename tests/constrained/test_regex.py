"""Regular expressions against Python's `re`, which shares no code with them."""

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minillm.constrained import ConstraintError, ConstraintTooLarge, Limits
from minillm.constrained.automaton import DEAD, Automaton
from minillm.constrained.regex import build, complement, digit_ranges, parse, utf8

ALPHABET = "ab1_ -.\n\té日😀\x7f\u0800\uffff\U0010ffff"
LITERALS = [
    "a",
    "b",
    "1",
    " ",
    "_",
    "é",
    "日",
    "😀",
    r"\.",
    r"\n",
    r"\t",
    r"\x61",
    r"\u00e9",
    r"\U0001f600",
    r"\-",
    "{",
    "}",
]
CLASSES = [
    ".",
    r"\d",
    r"\D",
    r"\w",
    r"\W",
    r"\s",
    r"\S",
    "[ab]",
    "[^ab]",
    "[a-z]",
    r"[^\W1]",
    r"[\d\-é]",
    "[é-日]",
    "[^日]",
    r"[^\D]",
]
COUNTS = ["*", "+", "?", "{2}", "{1,}", "{,2}", "{0,3}", "{2,3}", "*?", "+?", "{1,2}?"]

atoms = st.sampled_from(LITERALS + CLASSES)


def _grow(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(COUNTS)).map(lambda two: f"(?:{two[0]}){two[1]}"),
    )


patterns = st.recursive(atoms, _grow, max_leaves=6)


def fullmatch(pattern: str, text: str) -> bool:
    automaton = Automaton()
    return automaton.matches(build(automaton, parse(pattern)), text.encode())


@settings(max_examples=400)
@given(data=st.data(), pattern=patterns)
def test_it_matches_what_python_matches(data, pattern):
    """Texts that match are drawn from the pattern, others by changing one character of these, or at random."""
    compiled = re.compile(pattern, re.ASCII)
    characters = st.characters(exclude_categories=["Cs"])
    near = data.draw(st.from_regex(compiled, fullmatch=True, alphabet=characters))
    assume(len(near) <= 12)  # Python's takes time that grows exponentially where repeats are nested
    at = data.draw(st.integers(0, max(len(near) - 1, 0)))
    changed = near[:at] + data.draw(st.sampled_from([*ALPHABET, ""])) + near[at + 1 :]
    for text in (near, changed, data.draw(st.text(ALPHABET, max_size=5))):
        assert fullmatch(pattern, text) == bool(compiled.fullmatch(text)), text


@pytest.mark.parametrize(
    ("pattern", "accepted", "refused"),
    [
        ("", [""], ["a"]),
        ("^a$|^b$", ["a", "b"], ["ab", ""]),
        ("a|", ["a", ""], ["aa"]),
        ("(^a)|(b$)", ["a", "b"], ["ab"]),
        ("x{,3}", ["", "xxx"], ["xxxx"]),
        ("a{x}", ["a{x}"], ["a"]),
        ("[-a]", ["-", "a"], ["b"]),
        ("[a-]", ["-", "a"], ["b"]),
        ("(?P<year>[0-9]{4})", ["2024"], ["24"]),
        (".", ["日", "\r"], ["\n", "ab"]),
    ],
)
def test_cases(pattern, accepted, refused):
    assert [text for text in accepted if not fullmatch(pattern, text)] == []
    assert [text for text in refused if fullmatch(pattern, text)] == []


@pytest.mark.parametrize(
    ("pattern", "what", "at"),
    [
        ("a(?=b)", "look-ahead", 1),
        ("(?<!b)a", "look-behind", 0),
        (r"(a)\1", "back reference", 3),
        ("(?P<n>a)(?P=n)", "back reference", 8),
        ("(?i)a", "flags", 0),
        (r"\bword", "word boundary", 0),
        (r"\p{L}", "Unicode property", 0),
        ("(?>a)", "atomic", 0),
        ("a*+", "possessive", 2),
        ("a**", "two", 2),
        ("*a", "repeat", 0),
        ("(a", "expected )", 0),
        ("a)", "before )", 1),
        ("[a", "expected ]", 0),
        ("[]a]", "dialects", 0),
        ("[z-a]", "range", 0),
        (r"[\d-z]", "range", 0),
        (r"\ud800", "none", 0),
        (r"\u12", "hexadecimal", 0),
        ("a{3,2}", "smaller number first", 1),
        ("a\\", "behind", 1),
    ],
)
def test_what_is_not_supported_is_named_with_its_position(pattern, what, at):
    with pytest.raises(ConstraintError, match=rf"{re.escape(what)}.*position {at} ") as error:
        fullmatch(pattern, "a")
    assert not isinstance(error.value, ConstraintTooLarge)


@pytest.mark.parametrize("pattern", ["a^b", "a$b", "(a^)*b", "(a$|b)c"])
def test_an_anchor_inside_is_refused(pattern):
    with pytest.raises(ConstraintError, match="begins|ends"):
        fullmatch(pattern, "ab")


def test_never_half_a_character():
    automaton = Automaton()
    state = automaton.state(build(automaton, parse("[^a]*")))
    for character in ("é", "日", "😀", "\U0010ffff"):
        encoded = character.encode()
        behind = [automaton.walk(state, encoded[:i]) for i in range(len(encoded) + 1)]
        assert DEAD not in behind
        assert [automaton.nodes[at].nullable for at in behind] == [True, *[False] * (len(encoded) - 1), True]
    for broken in (b"\x80", b"\xc0\x80", b"\xc3a", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xff", b"\xe0\x80\x80"):
        assert automaton.walk(state, broken) == DEAD, broken


@pytest.mark.parametrize(
    "pattern",
    [
        "(a{0,1000}){0,1000}",
        "((a{0,100}){0,100}){0,100}",
        "a{99999999}",
        "(a|b)*a(a|b){99999}b(a|b){99999}",
        "(" * 1000 + ")" * 1000,
        "a" * 300_000,
    ],
)
def test_a_hostile_pattern_is_refused_when_it_is_read(pattern):
    with pytest.raises(ConstraintTooLarge):
        parse(pattern)


@pytest.mark.parametrize("limits", [Limits(states=20), Limits(nodes=60), Limits(seconds=0.0)])
def test_budgets_end_what_was_not_seen_when_it_was_read(limits):
    """(a|b)*a(a|b){12} has 8,192 states; a walk meets more and more of them."""
    automaton = Automaton(limits)
    with pytest.raises(ConstraintTooLarge, match="simpler"):  # noqa: PT012
        state = automaton.state(build(automaton, parse("(a|b)*a(a|b){12}")))
        for i in range(4000):
            state = automaton.walk(state, b"b" if i & i >> 3 & 1 else b"a")


def test_a_count_costs_nothing_before_it_is_walked():
    automaton = Automaton()
    state = automaton.state(build(automaton, parse("[a-z]{0,90000}")))
    assert automaton.walk(state, b"abc") != DEAD
    assert len(automaton.nodes) < 10


# ---- the automaton's other operations --------------------------------------------------------------------------------


@settings(max_examples=200)
@given(first=patterns, second=patterns, text=st.text("ab1é\n", max_size=5))
def test_both_and_complement(first, second, text):
    automaton = Automaton()
    a, b = (build(automaton, parse(pattern)) for pattern in (first, second))
    in_a, in_b = (bool(re.fullmatch(pattern, text, re.ASCII)) for pattern in (first, second))
    assert automaton.matches(automaton.both(a, b), text.encode()) == (in_a and in_b)
    assert automaton.matches(automaton.both(a, automaton.complement(b)), text.encode()) == (in_a and not in_b)
    assert automaton.matches(automaton.union([a, b]), text.encode()) == (in_a or in_b)


@settings(max_examples=200)
@given(first=patterns, second=patterns)
def test_no_state_is_a_dead_end(first, second):
    """From each state that a walk of the first moves meets, something is accepted: else it was DEAD."""
    automaton = Automaton()
    a, b = (build(automaton, parse(pattern)) for pattern in (first, second))
    for node in (automaton.both(a, b), automaton.both(a, automaton.complement(b))):
        seen, ahead = {node}, [node]
        while ahead and len(seen) < 60:
            found = ahead.pop()
            assert found is automaton.nothing or _holds_something(automaton, found)
            for _, after in automaton.moves(found):
                ahead += [after] if after not in seen else []
                seen.add(after)


def _holds_something(automaton, node) -> bool:
    seen, ahead = {node}, [node]
    while ahead:
        found = ahead.pop(0)
        if found.nullable:
            return True
        after = [after for _, after in automaton.moves(found) if after not in seen]
        seen.update(after)
        ahead += after
    return False


def test_what_nothing_satisfies_is_nothing():
    automaton = Automaton()
    a, b = (build(automaton, parse(pattern)) for pattern in ("a+b", "b+a"))
    assert automaton.both(a, b) is automaton.nothing
    assert automaton.complement(automaton.everything) is automaton.nothing
    assert automaton.both(build(automaton, parse("(aa)+")), build(automaton, parse("a(aa)*"))) is automaton.nothing


@given(st.integers(1, 40), st.integers(0, 130), st.integers(0, 1300))
def test_multiples(of, rest, number):
    automaton = Automaton()
    node = automaton.multiple(of, rest % of)
    assert automaton.matches(node, str(number).encode()) == (int(f"{rest % of}{number}") % of == 0)


@given(st.integers(0, 9999), st.integers(0, 9999))
def test_digit_ranges_hold_the_numbers_between(a, b):
    low, high = sorted((a, b))
    digits = [tuple(map(int, f"{n:04}")) for n in (low, high)]
    found = list(digit_ranges(*digits, 0, 9))
    for number in {low, high, low - 1, high + 1, (low + high) // 2} & set(range(10_000)):
        places = tuple(map(int, f"{number:04}"))
        hits = sum(all(x <= p <= y for p, (x, y) in zip(places, places_, strict=True)) for places_ in found)
        assert hits == (low <= number <= high)
    assert len(found) <= 2 * 4


@given(st.lists(st.tuples(st.integers(0, 0x10FFFF), st.integers(0, 3000)), max_size=4), st.integers(0, 0x10FFFF))
def test_utf8_of_a_set_and_of_its_complement(pairs, code):
    ranges = complement(complement(sorted([(a, min(a + n, 0x10FFFF)) for a, n in pairs])))
    code = next((a for a, _ in ranges), 65) if 0xD800 <= code <= 0xDFFF else code
    automaton = Automaton()
    held = any(a <= code <= b for a, b in ranges)
    assert automaton.matches(utf8(automaton, ranges), chr(code).encode()) == held
    assert automaton.matches(utf8(automaton, complement(ranges)), chr(code).encode()) == (not held)
