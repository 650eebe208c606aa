"""A small vocabulary of bytes that has all that makes masks difficult, and walks through masks."""

from functools import cache
from random import Random

from minillm.constrained import FINISHED, Constraint, Vocabulary

WORDS = [
    '{"',
    '": ',
    '", "',
    '"}',
    "}]",
    '["',
    "], [",
    "true",
    "false",
    "null",
    "ab",
    "abc",
    "aaaa",
    "a" * 12,
    " a",
    "  ",
    "12",
    "0.5",
    "-1",
    "1234567890",
    "é",
    "日本",
    "日",
    "😀",
    '\\"',
    "\\u",
    "\\ud83d\\u",
    "\\n",
    "e+",
    '"a"',
    '"a": ',
    "name",
    '"name',
    'b", "',
]
HALVES = [b"\xc3", b"\xa9\xc3", b"\xe6\x97", b"a\xf0\x9f", b"\x98\x80", b"\xed\xa0\x80", b"\xff\xfe"]
END = 256 + len(WORDS) + len(HALVES) + 1


@cache
def small() -> Vocabulary:
    """Each byte, some words, halves of characters, a special token, the end."""
    tokens = [bytes([b]) for b in range(256)] + [word.encode() for word in WORDS] + HALVES
    return Vocabulary([*tokens, None, b"</s>"], [END])


def random_walk(constraint: Constraint, random: Random, soft: int = 40, hard: int = 3000) -> bytes | None:
    """The bytes of tokens drawn from the masks, until the end token; None if that takes too long.

    After `soft` tokens it ends as soon as it can, and takes what closes something where that may come.
    """
    state, text = constraint.start, b""
    for step in range(hard):
        mask = constraint.allowed(state)
        if mask[END] and (step > soft or random.random() < 0.3):
            assert constraint.advance(state, END) == FINISHED
            return text
        closing = [token for token in b'"}]' if mask[token]] if step > soft else []
        plain = [token for token in b"a0-/.@" if mask[token]] if step > soft else []
        tokens = closing or plain or [token for token in mask.nonzero()[0].tolist() if token != END]
        if not tokens:
            continue
        token = random.choice(tokens)
        text += constraint.vocabulary.tokens[token] or b""
        state = constraint.advance(state, token)
    return None
