"""Agendas of workshops: their minutes are those of the exercises' cards and of the chapters' "At a glance".

`python -m minillm.learn.agendas 210 6` prints one for any minutes and chapters.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from .curriculum import title_of
from .paths import root, stem_of, stems

__all__ = ["Card", "Plan", "agenda", "cards", "glance", "plan", "semester", "timing"]

WELCOME, OPENING, BREAK, CLOSING = 10, 15, 15, 10  # minutes
LONGEST = 90  # minutes without a break
WEEKS = 15  # of a semester
BUFFER = 0.1  # of all minutes: for questions, and whoever is behind
KINDS = ("warm-up", "core", "beyond", "optional")
CARD = re.compile(
    r"^# ## Exercise (\d+\.w?\d+): (.+)\n#\n# \| Goal .*\n# \|[-|]+\n# \| (.*?) \| (\d) of 5 \| (\d+) \|", re.MULTILINE
)


@dataclass(frozen=True)
class Card:
    """An exercise's card: `kind` is one of KINDS, difficulty 1 to 5."""

    number: str
    title: str
    kind: str
    difficulty: int
    minutes: int


@dataclass
class Plan:
    """Items as (minutes, what), in order; `home` are labs and exercises that found no place, `optional` optional
    exercises that found none: (minutes, what) too.
    """

    minutes: int
    items: list[tuple[int, str]] = field(default_factory=list)
    home: list[tuple[int, str]] = field(default_factory=list)
    optional: list[tuple[int, str]] = field(default_factory=list)
    since_break: int = 0

    def left(self) -> int:
        """Minutes that nothing is planned for."""
        return self.minutes - sum(minutes for minutes, _ in self.items)

    def fits(self, minutes: int, reserved: int) -> bool:
        """Whether an item, with the break that it needs, leaves `reserved` minutes."""
        return self.left() - minutes - BREAK * self._tired(minutes) >= reserved

    def add(self, minutes: int, what: str) -> None:
        """Append an item, after a break where it is time for one."""
        if self._tired(minutes):
            self.items.append((BREAK, "Break"))
            self.since_break = 0
        self.items.append((minutes, what))
        self.since_break += minutes

    def _tired(self, minutes: int) -> bool:
        return self.since_break > 0 and self.since_break + minutes > LONGEST


@cache
def cards(stem: str) -> list[Card]:
    """The exercises of a chapter, in order. Raises ValueError for a heading without a card."""
    text = (root() / "solutions" / f"{stem}.py").read_text(encoding="utf-8")
    found = []
    for number, title, goal, difficulty, minutes in CARD.findall(text):
        said = f"{title} {goal}"
        kind = next((kind for kind in ("warm-up", "optional", "beyond") if kind in said), "core")
        found.append(Card(number, title.removesuffix(" (optional)"), kind, int(difficulty), int(minutes)))
    headings = re.findall(r"^# ## Exercise (\S+):", text, re.MULTILINE)
    if headings != [card.number for card in found]:
        missing = sorted(set(headings) - {card.number for card in found})
        raise ValueError(f"solutions/{stem}.py: expected a card under each heading, found none for {missing}")
    return found


@cache
def glance(stem: str) -> tuple[int, int]:
    """Minutes to read a chapter, and of its lab."""
    text = (root() / "chapters" / f"{stem}.md").read_text(encoding="utf-8")
    rows = [re.search(rf"^\| \**{row}\** \| (\d+) minutes", text, re.MULTILINE) for row in
            ("Reading", "Lab and exercises")]  # fmt: skip
    if None in rows:
        raise ValueError(f"chapters/{stem}.md: expected minutes of Reading and of Lab in `At a glance`")
    reading, lab = (int(found[1]) for found in rows if found)
    return reading, lab


def plan(minutes: int, chapters: Sequence[str], welcome: int = WELCOME) -> Plan:
    """Plan so many minutes over these stems: of each the opening, warm-ups, lab and core; then, as they fit, exercises
    beyond it, and optional ones. A tenth stays free.
    """
    result = Plan(minutes)
    reserved = CLOSING + round(minutes * BUFFER)
    if welcome:
        result.add(welcome, "Welcome; each reads out the line of `minillm doctor --room`")
    later = []
    for stem in chapters:
        of, number = cards(stem), int(stem[:2])
        warm = [card for card in of if card.kind == "warm-up"]
        wanted = [(OPENING, f"Opening of chapter {number}, as in its [notes](notes/{stem}.md)")]
        if warm:
            numbers = ", ".join(card.number for card in warm)
            wanted.append((sum(card.minutes for card in warm), f"Warm-ups {numbers}"))
        wanted.append((glance(stem)[1], f"[Lab {number}](../notebooks/{stem}.ipynb)"))
        wanted += [_exercise(card) for card in of if card.kind == "core"]
        for item in wanted:
            if result.fits(item[0], reserved):
                result.add(*item)
            else:
                result.home.append(item)
        later += [card for card in of if card.kind in KINDS[2:]]
    for card in sorted(later, key=lambda card: (KINDS.index(card.kind), card.difficulty, card.minutes)):
        item = _exercise(card)
        if not result.home and result.fits(item[0], reserved):
            result.add(*item)
        else:
            (result.optional if card.kind == "optional" else result.home).append(item)
    result.items.append((result.left() - CLOSING, "Questions, and time for whoever is behind"))
    result.items.append((CLOSING, "Closing: what to remember, what to do at home"))
    return result


def _exercise(card: Card) -> tuple[int, str]:
    return card.minutes, f"Exercise {card.number}: {card.title}" + (" (optional)" if card.kind == "optional" else "")


def agenda(minutes: int, *numbers: int) -> str:
    """An agenda as Markdown: when, how long, what; what to read before, and what is left for home."""
    chapters = [stem_of(number) for number in numbers]
    planned = plan(minutes, chapters)
    before = [f"[chapter {int(stem[:2])}](../chapters/{stem}.md) ({glance(stem)[0]} minutes)" for stem in chapters]
    lines = [f"Read before: {', '.join(before)}.", "", "| at | minutes | what |", "|---|---|---|"]
    at = 0
    for length, what in planned.items:
        lines.append(f"| {at // 60}:{at % 60:02d} | {length} | {what} |")
        at += length
    lines += [f"| {at // 60}:{at % 60:02d} | | End |", ""]
    for name, left in (("Left for home", planned.home), ("Who is faster, and at home", planned.optional)):
        if left:
            lines.append(f"{name}, {sum(m for m, _ in left)} minutes: {'; '.join(what for _, what in left)}.\n")
    return "\n".join(lines).rstrip()


def semester(minutes: int = 180) -> str:
    """A week a chapter: what to read before, what class has room for, what is left, as a Markdown table."""
    lines = ["| week | chapter | read before | in class | left for home | optional |", "|---|---|---|---|---|---|"]
    for week, stem in enumerate(stems()[:WEEKS], 1):
        planned = plan(minutes, [stem], welcome=WELCOME if week == 1 else 0)
        breaks = sum(what == "Break" for _, what in planned.items)
        shown = ", ".join(f"{_short(what)} {m}" for m, what in planned.items[:-1] if what != "Break")
        home = ", ".join(f"{_short(what)} {m}" for m, what in planned.home) or "–"
        lines.append(
            f"| {week} | [{int(stem[:2])}. {title_of(stem)}](../chapters/{stem}.md) | {glance(stem)[0]} | {shown},"
            f" closing {CLOSING}{f', breaks {breaks * BREAK}' if breaks else ''} | {home} |"
            f" {sum(m for m, _ in planned.optional)} |"
        )
    return "\n".join(lines)


def _short(what: str) -> str:
    if found := re.match(r"Exercise (\S+):", what):
        return found[1]
    word = re.sub(r"^\[?(\w+(?:-ups)?).*", r"\1", what).lower()
    return {"questions": "free"}.get(word, word)


def timing(chapter: str) -> str:
    """The minutes of a chapter's parts as a Markdown table, exercises with kind and difficulty."""
    stem = stem_of(chapter)
    reading, lab = glance(stem)
    lines = ["| what | kind | difficulty | minutes |", "|---|---|---|---|"]
    lines += [f"| reading | before | | {reading} |", f"| lab | | | {lab} |"]
    lines += [f"| {c.number} {c.title} | {c.kind} | {c.difficulty} of 5 | {c.minutes} |" for c in cards(stem)]
    sums = [(kind, sum(c.minutes for c in cards(stem) if c.kind == kind)) for kind in KINDS]
    told = ", ".join(f"{kind} {minutes}" for kind, minutes in sums if minutes)
    return "\n".join([*lines, "", f"Exercises in all: {sum(m for _, m in sums)} minutes ({told})."])


if __name__ == "__main__":
    print(agenda(*map(int, sys.argv[1:])))
