"""The data of the curriculum: what every Python already has, and texts written for it, so that nothing is downloaded.

- `digits()`: 1,797 handwritten digits of 8 by 8 pixels, from scikit-learn (Alpaydin and Kaynak, UCI, 1998).
- `reference_text()`: the language reference that ships inside CPython: technical English, about 465,000 characters.
  It differs between Python versions, so no exact figure that is made from it may be compared across versions.
- `reviews()`: 240 short reviews with their sentiment, written for this repository, under its license.
- `word_problems()`: word problems in one to three steps, made by a seeded generator.
- `orders()`: 600 spoken orders of a café with the JSON that is to be written down for each, made for this repository,
  under its license.
"""

import json
import random
import re
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .extras import require

if TYPE_CHECKING:  # digits and text need numpy alone
    from torch import Tensor

__all__ = [
    "Digits",
    "Order",
    "Review",
    "WordProblem",
    "calibration",
    "digits",
    "held_out",
    "orders",
    "reference_text",
    "reviews",
    "split_paragraphs",
    "split_topics",
    "word_problems",
]

HELD_OUT = 0.15  # of the characters: 24 windows of 512 of SmolLM2's tokens and a few more


@dataclass(frozen=True)
class Digits:
    """Handwritten digits, split into training and test images.

    `train_x` [N, 64] and `test_x` [M, 64] are float32 pixels in 0..1, row by row; `train_y` [N] and `test_y` [M] are
    int64 labels 0..9.
    """

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def digits(test_fraction: float = 0.25, seed: int = 0) -> Digits:
    """Load scikit-learn's 8 by 8 handwritten digits, shuffled by `seed` and split.

    Raises ValueError unless 0 < test_fraction < 1.
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction: expected a share between 0 and 1 (both excluded), got {test_fraction}")
    require("lab", "sklearn")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)  # [1797, 64] values 0..16, [1797]
    order = np.random.default_rng(seed).permutation(len(images))
    x, y = (images[order] / 16).astype(np.float32), labels[order].astype(np.int64)
    num_test = round(len(x) * test_fraction)
    return Digits(x[num_test:], y[num_test:], x[:num_test], y[:num_test])


@dataclass(frozen=True)
class Order:
    """An order as it is spoken, `text`, and what is to be written down, `wanted`.

    `wanted` has the keys item (str), count (int), size (str or None), extras (list of str, as spoken) and to_go (bool).
    """

    text: str
    wanted: dict[str, Any]

    @property
    def prompt(self) -> str:
        """What a model is given."""
        return f"Order: {self.text}\nJSON:"

    @property
    def answer(self) -> str:
        """What it should write behind the prompt, before its end token."""
        return " " + json.dumps(self.wanted)

    def is_met_by(self, output: str) -> bool:
        """Whether `output` is JSON, white space around it aside, that equals `wanted` in value and in type."""
        try:
            got = json.loads(output)
        except (ValueError, RecursionError):  # the latter for a row of brackets
            return False
        return json.dumps(got, sort_keys=True) == json.dumps(self.wanted, sort_keys=True)


def orders() -> tuple[list[Order], list[Order]]:
    """The 400 orders to train on and the 200 held out, both in an order without meaning.

    No opening of a held-out order occurs in training; half of them pair an item with an extra that never stand together
    there, and an item, "macchiato", and an extra, "hazelnut syrup", are new altogether.
    """
    sides: dict[str, list[Order]] = {"train": [], "test": []}
    for record in _records("orders"):
        sides[record["split"]].append(Order(record["text"], record["order"]))
    return sides["train"], sides["test"]


def reference_text() -> dict[str, str]:
    """The topics of CPython's language reference, {topic name: text}, sorted by name."""
    from pydoc_data.topics import topics

    return {name: topics[name] for name in sorted(topics)}


def split_topics(held_out: float = 0.1, seed: int = 0) -> tuple[dict[str, str], dict[str, str]]:
    """Split `reference_text()` by topic into (training, held-out) dictionaries.

    Whole topics are held out: neighboring sentences of one topic repeat each other, so a split inside a topic would
    leak training text into the test. Topics are drawn at random until they hold at least `held_out` of all
    characters.

    Raises ValueError unless 0 < held_out < 1.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a share between 0 and 1 (both excluded), got {held_out}")
    text = reference_text()
    names = list(text)
    random.Random(seed).shuffle(names)
    wanted, taken = held_out * sum(map(len, text.values())), 0
    test = {}
    for name in names:
        if taken >= wanted:
            break
        test[name] = text[name]
        taken += len(text[name])
    train = {name: body for name, body in text.items() if name not in test}
    return train, test


def split_paragraphs(held_out: float = 0.1, seed: int = 0) -> tuple[dict[str, str], dict[str, str]]:
    """`split_topics`, and every paragraph that stands in a held-out topic is dropped from the training topics.

    The reference prints some paragraphs in several topics: about half of the held-out text. White space does not count.
    """
    train, test = split_topics(held_out, seed)
    unseen = {_even(paragraph) for text in test.values() for paragraph in _paragraphs(text)}
    kept = {name: [part for part in _paragraphs(text) if _even(part) not in unseen] for name, text in train.items()}
    return {name: "\n\n".join(parts) for name, parts in kept.items() if parts}, test


def _paragraphs(text: str) -> list[str]:
    return [part for part in re.split(r"\n\s*\n", text) if part.strip()]


def _even(paragraph: str) -> str:
    return " ".join(paragraph.split())


class Encoder(Protocol):
    """What a tokenizer is needed for here."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text to ids."""


def calibration(tokenizer: Encoder, count: int = 64, length: int = 512, seed: int = 0) -> "Tensor":
    """Windows of training text, for looking at a model's activations.  -> [count, length] int64

    The training topics are one long row of tokens, cut into windows side by side, of which `seed` draws some: no token
    comes twice. No special token is in them. Raises ValueError if the text has fewer windows.
    """
    import torch

    rows = _windows(tokenizer, split_paragraphs(HELD_OUT)[0], count, length)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]]


def held_out(tokenizer: Encoder, count: int = 24, length: int = 512) -> "Tensor":
    """The first windows of text that `calibration` never shows, for judging what was calibrated, as there."""
    return _windows(tokenizer, split_paragraphs(HELD_OUT)[1], count, length)[:count]


def _windows(tokenizer: Encoder, texts: dict[str, str], count: int, length: int) -> "Tensor":
    """All windows of `length` tokens.  -> [n, length]"""
    import torch

    if count < 1 or length < 1:
        raise ValueError(f"count, length: expected 1 or more each, got {count} and {length}")
    ids = tokenizer.encode("\n\n".join(texts.values()), add_special_tokens=False)
    there = len(ids) // length
    if there < count:
        raise ValueError(f"count: expected at most {there} windows of {length} tokens, got {count}")
    return torch.tensor(ids[: there * length]).view(there, length)


def _records(name: str) -> list[dict[str, Any]]:
    """The lines of `minillm/texts/{name}.jsonl`."""
    text = (files(__package__) / "texts" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@dataclass(frozen=True)
class Review:
    """A short review. `about`: the thing reviewed, as it stands in the text; `label`: positive or negative."""

    text: str
    about: str
    label: str


def reviews() -> tuple[list[Review], list[Review]]:
    """40 reviews to draw examples from, and 200 for tests, as many of each label in both.

    Each thing is praised once and blamed once, both on the same side of the split: what a review is about says nothing
    of its label, and examples say nothing of a test's thing.
    """
    sides: dict[str, list[Review]] = {"pool": [], "test": []}
    for record in _records("reviews"):
        sides[record.pop("split")].append(Review(**record))
    return sides["pool"], sides["test"]


@dataclass(frozen=True)
class WordProblem:
    """A question whose answer is a whole number. `steps`: one sum a step, such as "3 * 4 = 12. 12 - 5 = 7."."""

    question: str
    steps: str
    answer: int


# What each step does to the number so far; the first has a number of its own.
_PROBLEMS = [
    ("{who} has {a} {things} and buys {b} more. How many {things} does {who} have?", "+"),
    ("{who} has {a} {things} and gives {b} to a friend. How many {things} does {who} have left?", "-"),
    ("{who} fills {a} boxes with {b} {things} each. How many {things} are in the boxes?", "*"),
    ("{who} has {a} {things}, finds {b} and then loses {c}. How many {things} does {who} have?", "+-"),
    ("{who} has {a} {things}, sells {b} and then buys {c}. How many {things} does {who} have?", "-+"),
    ("{who} buys {a} bags of {b} {things} and uses {c} of them. How many {things} are left?", "*-"),
    ("{who} buys {a} bags of {b} {things} and already had {c}. How many {things} does {who} have?", "*+"),
    (
        "{who} packs {a} boxes of {b} {things}, adds {c} loose ones and takes {d} out again. How many {things} does"
        " {who} have?",
        "*+-",
    ),
]
_PEOPLE = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gita", "Hugo", "Iris", "Jon", "Kira", "Liam")
_THINGS = ("apples", "beads", "books", "cards", "coins", "cups", "eggs", "keys", "lemons", "pens", "shells", "stamps")


def word_problems(count: int, seed: int = 0) -> list[WordProblem]:
    """Word problems in one, two or three steps, no two alike; no number on the way is below 1.

    The first problems of a seed are the same for every count. Raises ValueError for a count below 0 or above 10,000.
    """
    if not 0 <= count <= 10_000:
        raise ValueError(f"count: expected 0 to 10,000, got {count}")
    draw, found = random.Random(seed), dict[str, WordProblem]()
    while len(found) < count:
        template, operations = draw.choice(_PROBLEMS)
        value = draw.randint(2, 9) if operations[0] == "*" else draw.randint(3, 40)
        numbers, steps = [value], []
        for operation in operations:
            high = 9 if operation == "*" else min(40, value - 1) if operation == "-" else 40
            numbers.append(draw.randint(min(2, high), high))
            before = value
            value = {"+": value + numbers[-1], "-": value - numbers[-1], "*": value * numbers[-1]}[operation]
            steps.append(f"{before} {operation} {numbers[-1]} = {value}.")
        words = {"who": draw.choice(_PEOPLE), "things": draw.choice(_THINGS)} | dict(zip("abcd", numbers, strict=False))
        question = template.format(**words)
        found.setdefault(question, WordProblem(question, " ".join(steps), value))
    return list(found.values())
