"""A constraint on the tokens of one request, from compiling it to the end token.

    constraint = compile_constraint("json", schema, tokenizer)
    state = constraint.start
    while state != FINISHED:
        mask = constraint.allowed(state)                       # bool [vocabulary]
        token = ...                                            # drawn from logits where the mask is True
        state = constraint.advance(state, token)

Names are those of vLLM's structured outputs. A state is an integer, so a request can go back to an earlier one, as it
must when a draft of several tokens is not accepted.
"""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from .automaton import DEAD, Automaton, ConstraintError, ConstraintTooLarge, Limits, Node
from .mask import ByteTokens, Vocabulary, packed
from .regex import build, parse
from .schema import schema_language

__all__ = ["FINISHED", "KINDS", "Constraint", "compile_constraint", "vocabulary_of"]

KINDS = ("json", "regex", "choice")
FINISHED = -1  # the state behind an end token

_vocabularies: "WeakKeyDictionary[ByteTokens, Vocabulary]" = WeakKeyDictionary()


class Constraint:
    """A language and a vocabulary. One thread at a time may use it; requests with the same constraint may share it.

    start: the state in front of the first token.
    """

    def __init__(self, automaton: Automaton, language: Node, vocabulary: Vocabulary) -> None:
        self._automaton, self.vocabulary = automaton, vocabulary
        self.start = automaton.state(language)

    def allowed(self, state: int) -> NDArray[np.bool_]:
        """The tokens that may come: bool [vocabulary.size], read-only, True for at least one.

        An end token may come where the text is complete, and alone where it is FINISHED. Whatever is allowed can be
        continued to a complete text. Raises NoTokenFits where the vocabulary lacks what must come, ConstraintTooLarge
        beyond the limits: both end this request, and no other.
        """
        if state == FINISHED:
            mask = np.zeros(self.vocabulary.size, np.bool_)
            mask[self.vocabulary.end_ids] = True
            return mask
        return self.vocabulary.mask(self._automaton, self._known(state))

    def packed(self, state: int) -> NDArray[np.int32]:
        """The same, token 32 w + i as bit i of word w: int32 [ceil(size / 32)]. Equal ones are one array."""
        if state == FINISHED:
            return packed(self.allowed(state))
        return self.vocabulary.packed(self._automaton, self._known(state))

    def advance(self, state: int, token: int) -> int:
        """The state behind a token. Raises ValueError for one that is not allowed."""
        if token in self.vocabulary.ends:
            if self.accepts(state):
                return FINISHED
            raise ValueError(
                f"token: expected one that is allowed, got the end token {token} before the text is complete"
            )
        text = self.vocabulary.tokens[token] if 0 <= token < len(self.vocabulary.tokens) else None
        after = self.walk(state, text) if text and state != FINISHED else DEAD
        if after == DEAD:
            raise ValueError(f"token: expected one that is allowed in this state, got {token}, bytes {text!r}")
        return after

    def accepts(self, state: int) -> bool:
        """Whether the text is complete, so that it may end here."""
        return state == FINISHED or self._automaton.nodes[self._known(state)].nullable

    def walk(self, state: int, text: bytes) -> int:
        """The state behind some bytes; 0 where they are not allowed, from which nothing is."""
        return self._automaton.walk(self._known(state), text)

    def _known(self, state: int) -> int:
        if not 0 <= state < len(self._automaton.nodes):
            raise ValueError(f"state: expected one of this constraint, got {state}")
        return state


def compile_constraint(
    kind: str, value: Any, vocabulary: Vocabulary | ByteTokens, limits: Limits | None = None
) -> Constraint:
    """What one request asks of its output.

    kind: "json", with a JSON schema (dict, bool, or its JSON as str) as value; "regex", with a pattern that the whole
    text matches; "choice", with a list of strings of which the text is one. vocabulary: a tokenizer will do.
    Raises ConstraintError, a ValueError, for what cannot be kept, with the part and the reason.
    """
    if kind not in KINDS:
        raise ConstraintError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if not isinstance(vocabulary, Vocabulary):
        vocabulary = vocabulary_of(vocabulary)
    automaton = Automaton(limits)
    with automaton.timed():
        if kind == "json":
            language = schema_language(automaton, value)
        elif kind == "regex":
            language = build(automaton, parse(value, automaton.limits))
        else:
            language = _choice(automaton, value)
    if language is automaton.nothing:
        raise ConstraintError(f"{kind}: expected something that a text can be, got what no text is: {value!r:.80}")
    constraint = Constraint(automaton, language, vocabulary)
    constraint.allowed(constraint.start)  # what fails at once shall fail now
    return constraint


def vocabulary_of(tokenizer: ByteTokens) -> Vocabulary:
    """The vocabulary of a tokenizer, made once."""
    if tokenizer not in _vocabularies:
        _vocabularies[tokenizer] = Vocabulary.of(tokenizer)
    return _vocabularies[tokenizer]


def _choice(automaton: Automaton, value: Any) -> Node:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise ConstraintError(f"choice: expected a list of strings, at least one, got {value!r:.80}")
    if bad := [one for one in value if not isinstance(one, str)]:
        raise ConstraintError(f"choice: expected strings, got {bad[0]!r:.80}")
    if (size := sum([len(one) for one in value])) > automaton.limits.source:
        raise ConstraintTooLarge(f"choice: expected at most {automaton.limits.source} characters, got {size}")
    try:
        return automaton.union([automaton.literal(one.encode()) for one in value])
    except UnicodeEncodeError as e:
        raise ConstraintError(f"choice: expected Unicode, got a lone surrogate at position {e.start}") from None
