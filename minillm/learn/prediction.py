"""`predict(...)` and, a cell later, `reveal(...)`: the reader of a lab commits to a guess before the answer is shown.

    predict("6.a", "How many times faster is token 500 with the cache?", guess=None)   # the reader writes 8 for None

    ratio = ...                                                                        # a cell that computes, silent
    reveal("6.a", ratio)                                                               # your guess 8, answer 41.3

Without a guess, as when all cells run at once, the answer is folded away in JupyterLab, so that a stored notebook does
not tell it before the reader was asked.
"""

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import checker, progress

__all__ = ["predict", "reveal"]

CLOSE = 1.1  # a number within this factor of the answer counts as found


@dataclass(frozen=True)
class Question:
    """What was asked, and the guess: a number, a text, a choice's letter, or None."""

    text: str
    unit: str
    choices: tuple[str, ...]
    guess: Any


_asked: dict[str, Question] = {}  # of this notebook's run; the record of progress keeps guesses, and is not asked


def predict(key: str, question: str, guess: Any = None, *, choices: Sequence[str] = (), unit: str = "") -> None:
    """Ask `question`; `guess` is what the reader writes in place of None. It is kept beside the progress.

    `key` is the chapter and a letter, "6.a". `choices` are the answers to choose from: the guess, and the answer given
    to `reveal`, is then a letter, "a" for the first. A `unit` ("GFLOP", "times") asks for a number. With neither, a
    number or a few words will do.

    Raises ValueError for another form of key, a guess that is no choice, and one that is no number where a unit is
    named.

    >>> predict("6.b", "How long is a cache of 8 GB?", guess=100_000, unit="tokens")
    6.b  How long is a cache of 8 GB?
         your guess: 100,000 tokens (kept)
    """
    if not isinstance(key, str) or not re.fullmatch(r"\d+\.[a-z]", key):
        raise ValueError(f'key: expected a chapter and a letter, such as "6.a", got {key!r}')
    if isinstance(choices, str) or len(choices) == 1 or len(choices) > 26:
        raise ValueError(f"choices: expected 2 to 26 texts in a list, got {choices!r}")
    asked = Question(question, unit, tuple(choices), None)
    asked = Question(question, unit, tuple(choices), None if guess is None else _value(asked, "guess", guess))
    if checker.is_loading():
        return
    _asked[key] = asked
    lines = [f"{key}  {question}", *(f"     ({_letter(i)}) {choice}" for i, choice in enumerate(choices))]
    if asked.guess is None:
        form = f"one of {', '.join(_letters(asked))}, in quotes," if choices else "a number" if unit else "your guess"
        lines.append(f"     write {form}{f' ({unit})' if unit else ''} in place of None, and run this cell again")
    else:
        progress.remember_guess(key, question, asked.guess)
        lines.append(f"     your guess: {_shown(asked, asked.guess)} (kept)")
    print("\n".join(lines))


def reveal(key: str, answer: Any, why: str = "") -> None:
    """Show the answer to the question `key` beside the guess, how far off that was, and `why` it is so.

    `answer` has the form of the guess: a number, a letter of the choices, a text. Raises ValueError when the question
    was not asked in this notebook, and for an answer of another form.

    >>> reveal("6.b", 174_762, why="46,080 bytes a token")
    6.b  How long is a cache of 8 GB?
         your guess: 100,000 tokens
         answer:     174,762 tokens
         1.7 times too low
         46,080 bytes a token
    """
    if checker.is_loading():
        return
    if key not in _asked:
        raise ValueError(f"key: no question {key!r} was asked; run the cell with predict({key!r}, ...) first")
    asked = _asked[key]
    value = _value(asked, "answer", answer)
    rows = [("answer", _shown(asked, value))]
    verdict = ""
    if asked.guess is not None:
        progress.remember_answer(key, value)
        rows.insert(0, ("your guess", _shown(asked, asked.guess)))
        verdict = _verdict(asked, value)
    _display(key, asked, rows, [line for line in (verdict, why) if line])


def _value(asked: Question, name: str, value: Any) -> Any:
    """A guess or an answer as a plain number, a letter or a text; NumPy's and torch's numbers as Python's."""
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    if asked.choices:
        if value not in _letters(asked):
            raise ValueError(f"{name}: expected one of {', '.join(_letters(asked))}, in quotes, got {value!r}")
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and math.isfinite(value):
        return value
    if asked.unit or not isinstance(value, str):
        raise ValueError(f"{name}: expected a number{f' of {asked.unit}' * bool(asked.unit)}, got {value!r}")
    return value


def _letters(asked: Question) -> list[str]:
    return [_letter(i) for i in range(len(asked.choices))]


def _letter(i: int) -> str:
    return "abcdefghijklmnopqrstuvwxyz"[i]


def _shown(asked: Question, value: Any) -> str:
    if asked.choices:
        return f"({value}) {asked.choices[_letters(asked).index(value)]}"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (1000 <= abs(value) < 1e15) or (value.is_integer() and abs(value) < 1e15):
        text = f"{value:,.0f}" if isinstance(value, float) else f"{value:,}"
    else:
        text = f"{value:.3g}"
    return f"{text} {asked.unit}".rstrip()


def _verdict(asked: Question, answer: Any) -> str:
    """How far off the guess was, in words."""
    guess = asked.guess
    if isinstance(guess, str) or isinstance(answer, str):
        if asked.choices or str(guess).strip().casefold() == str(answer).strip().casefold():
            return "right" if guess == answer or not asked.choices else "not this time"
        return "compare the two"
    if guess == answer:
        return "right"
    if guess * answer <= 0:
        return f"{abs(guess - answer):.3g} too {'high' if guess > answer else 'low'}"
    ratio = guess / answer if guess * guess > answer * answer else answer / guess
    if ratio <= CLOSE:
        return f"close: within {max(1, math.ceil(100 * (ratio - 1) - 1e-9))} %"
    return f"{ratio:.3g} times too {'high' if guess > answer else 'low'}"


def _display(key: str, asked: Question, rows: list[tuple[str, str]], below: list[str]) -> None:
    width = max(len(name) for name, _ in rows) + 1
    plain = [f"{key}  {asked.text}", *(f"     {name + ':':{width}} {text}" for name, text in rows)]
    plain += [f"     {line}" for line in below]
    try:
        from IPython import get_ipython
    except ImportError:
        get_ipython = lambda: None  # noqa: E731
    if get_ipython() is None:
        print("\n".join(plain))
        return
    from IPython.display import display

    cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in rows)
    inside = f"<table>{cells}</table>" + "".join(f"<p>{html.escape(line)}</p>" for line in below)
    title = f"<b>{key}</b> {html.escape(asked.text)}"
    if asked.guess is None:
        page = f"<details><summary>{title} Guess above first; then open the answer.</summary>{inside}</details>"
    else:
        page = f"<p>{title}</p>{inside}"
    display({"text/html": page, "text/plain": "\n".join(plain)}, raw=True)
