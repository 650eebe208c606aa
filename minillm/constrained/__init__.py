"""Output of a guaranteed form: which tokens may come next, so that the text is what a schema or a pattern asks for."""

from .automaton import ConstraintError, ConstraintTooLarge, Limits
from .constraint import FINISHED, KINDS, Constraint, compile_constraint, vocabulary_of
from .mask import NoTokenFits, Vocabulary, packed

__all__ = [
    "FINISHED",
    "KINDS",
    "Constraint",
    "ConstraintError",
    "ConstraintTooLarge",
    "Limits",
    "NoTokenFits",
    "Vocabulary",
    "compile_constraint",
    "packed",
    "vocabulary_of",
]
