"""Teaching from the box: agendas that add up, notes for each chapter, and errors that `check` answers as they say."""

import itertools
import json
import re
import subprocess
import sys

import pytest

from minillm.learn import agendas, mistakes
from minillm.learn.checker import report, run
from minillm.learn.paths import root, stems

from .conftest import PROFILE

PAGES = [root() / "teaching" / "agendas.md", *[root() / "teaching" / "notes" / f"{stem}.md" for stem in stems()]]
SECTIONS = ["Why", "The first five minutes", "Timing", "Where a room stalls", "Common errors"]
by_stem = pytest.mark.parametrize("stem", stems())


def errors_of(stem: str) -> dict:
    return json.loads(mistakes.path_of(stem).read_text(encoding="utf-8"))


def parts(stem: str) -> dict[str, str]:
    """Heading -> the text under it."""
    text = (root() / "teaching" / "notes" / f"{stem}.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^## ([^\n]+)\n\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))


# ---- agendas ---------------------------------------------------------------------------------------------------------


@by_stem
def test_cards_are_those_of_the_notebook(stem):
    """Read from the generated notebook in another way: each card's minutes and difficulty."""
    cells = json.loads((root() / "exercises" / f"{stem}.ipynb").read_text(encoding="utf-8"))["cells"]
    shown = []
    for text in ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"):
        if text.startswith("## Exercise"):
            row = [part.strip() for part in text.splitlines()[4].strip("| ").split(" | ")]
            number = text.split()[2].rstrip(":")
            shown.append((number, row[1], row[2], "optional" in text.splitlines()[0] + row[0]))
    found = [(c.number, f"{c.difficulty} of 5", str(c.minutes), c.kind == "optional") for c in agendas.cards(stem)]
    assert found == shown


@pytest.mark.parametrize(
    ("minutes", "chapters"), [(210, [6]), (420, [6, 7]), (180, [9]), (90, [1]), (480, [13, 14, 15])]
)
def test_an_agenda_adds_up(minutes, chapters):
    """To the minute; nobody sits longer than 90 of them, a tenth is free, and each exercise has its place once."""
    of = [stem for stem in stems() if int(stem[:2]) in chapters]
    plan = agendas.plan(minutes, of)
    assert sum(m for m, _ in plan.items) == minutes
    free = next(m for m, what in plan.items if what.startswith("Questions"))
    assert free >= 0.1 * minutes - 1
    sitting = 0
    for length, what in plan.items[:-2]:
        sitting = 0 if what == "Break" else sitting + length
        assert sitting <= 90
    places = [(m, what) for part in (plan.items, plan.home, plan.optional) for m, what in part]
    for card in (card for stem in of for card in agendas.cards(stem)):
        if card.kind == "warm-up":
            assert sum(re.search(rf"\b{re.escape(card.number)}\b", what) is not None for _, what in places) == 1
        else:
            found = [m for m, what in places if what.startswith(f"Exercise {card.number}:")]
            assert found == [card.minutes]
    for stem in of:
        assert [m for m, what in places if f"/{stem}.ipynb)" in what] == [agendas.glance(stem)[1]]


def test_what_does_not_fit_is_for_home():
    stem = stems()[0]
    plan = agendas.plan(60, [stem])
    assert sum(m for m, _ in plan.items) == 60
    assert plan.home
    assert not [what for _, what in plan.items if "optional" in what], "optional ones never before the core"


def test_the_shown_agenda_ends_in_time():
    for minutes, numbers in ((210, [6]), (420, [6, 7])):
        rows = re.findall(r"^\| (\d+):(\d\d) \| (\d*)", agendas.agenda(minutes, *numbers), re.MULTILINE)
        at = [60 * int(hours) + int(rest) for hours, rest, _ in rows]
        assert at[-1] == minutes
        assert [later - earlier for earlier, later in itertools.pairwise(at)] == [int(m) for *_, m in rows[:-1]]


def test_fifteen_weeks():
    rows = agendas.semester().splitlines()[2:]
    assert len(rows) == 15
    for row in rows:
        in_class = row.split(" | ")[3]
        assert sum(int(m) for m in re.findall(r"(?:[a-z-]|\d+\.w?\d+) (\d+)(?:,|$)", in_class)) == 180


def test_a_heading_without_a_card(tmp_path, monkeypatch):
    stem = stems()[0]
    text = (root() / "solutions" / f"{stem}.py").read_text(encoding="utf-8")
    (tmp_path / "solutions").mkdir()
    (tmp_path / "solutions" / f"{stem}.py").write_text(text.replace("2 of 5 | 15", "easy", 1), encoding="utf-8")
    monkeypatch.setattr(agendas, "root", lambda: tmp_path)
    with pytest.raises(ValueError, match=r"found none for \['1\."):
        agendas.cards.__wrapped__(stem)


# ---- pages -----------------------------------------------------------------------------------------------------------


def test_pages_are_in_step():
    """cog would print the same again; `make teaching` regenerates."""
    names = [str(page.relative_to(root())) for page in PAGES]
    command = [sys.executable, "-m", "cogapp", "-P", "--check", *names]
    done = subprocess.run(command, cwd=root(), capture_output=True, text=True)
    assert done.returncode == 0, "run `make teaching`\n" + done.stdout + done.stderr


@by_stem
def test_notes(stem):
    sections = parts(stem)
    assert list(sections) == SECTIONS
    assert len(re.findall(r"[.?!](?=\s|$)", sections["Why"].strip())) == 2, "what the chapter is for, in two sentences"
    assert 25 <= len(sections["The first five minutes"].split()) <= 120
    numbers = {card.number for card in agendas.cards(stem)}
    stalls = re.findall(r"^- \*\*(\S+)\.\*\* ", sections["Where a room stalls"], re.MULTILINE)
    assert len(stalls) >= 3
    assert set(stalls) <= numbers, "exercises that are there"


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_links_resolve(page):
    text = re.sub(r"```.*?```|<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert targets
    for target in targets:
        assert (page.parent / target).exists(), target


def test_every_page_is_a_chapters():
    assert sorted((root() / "teaching" / "notes").iterdir()) == PAGES[1:]
    assert sorted((root() / "teaching" / "errors").iterdir()) == [mistakes.path_of(stem) for stem in stems()]


# ---- common errors ---------------------------------------------------------------------------------------------------


@by_stem
def test_errors_are_those_of_today(stem):
    kept = errors_of(stem)
    assert kept["sources"] == mistakes.sources(stem), "checks or variants changed: run `make teaching`"
    assert list(kept["exercises"]) == [card.number for card in agendas.cards(stem)]
    known = mistakes.wrong_ones(stem)
    for number, errors in kept["exercises"].items():
        assert len({error["mistake"] for error in errors}) == len(errors) == 3
        assert {error["mistake"] for error in errors} <= {impl.variant[2] for impl in known[number]}
        assert all(error["message"] for error in errors)


def masked(text: str) -> str:
    """Without digits, which another processor or another version of torch may round otherwise."""
    return re.sub(r"\b(?:nan|inf)\b|[-+]?\d[\d.,e+-]*", "#", text)


def drawn(stem: str) -> list[str]:
    """One exercise, another one after each day with a commit; all of them in `make deep`."""
    numbers = [card.number for card in agendas.cards(stem)]
    if PROFILE == "deep":
        return numbers
    command = ["git", "log", "-1", "--format=%ct"]
    done = subprocess.run(command, cwd=root(), capture_output=True, text=True)
    day = int(done.stdout or 0) // 86_400 if done.returncode == 0 else 0
    return [numbers[day % len(numbers)]]


@by_stem
def test_check_says_what_the_notes_say(stem):
    impls = mistakes.wrong_ones(stem)
    for number in drawn(stem):
        for error in errors_of(stem)["exercises"][number]:
            impl = next(impl for impl in impls[number] if impl.variant[2] == error["mistake"])
            got = mistakes.said(number, impl)
            assert got is not None
            assert {k: masked(text) for k, text in got.items()} == {k: masked(text) for k, text in error.items()}


def test_that_is_what_check_prints():
    stem = stems()[0]
    number, errors = next(iter(errors_of(stem)["exercises"].items()))
    printed = report(number, run(number, mistakes.wrong_ones(stem)[number][0]))
    first = [f"  ✗ {errors[0]['contract']}", *[f"      {line}" for line in errors[0]["message"].splitlines()]]
    assert masked("\n".join(first)) in masked(printed)
    lines = [line for line in first if line.strip()]
    assert "\n".join(lines) in mistakes.common(stem), "and the notes show it so"


def test_errors_prefer_different_contracts(monkeypatch):
    answers = {"a": "one", "b": "one", "c": "two", "d": None, "e": "three", "f": "four"}
    asked = []

    def said(number, impl):
        asked.append(impl)
        return answers[impl] and {"mistake": impl, "contract": answers[impl], "message": "m"}

    monkeypatch.setattr(mistakes, "said", said)
    assert [e["mistake"] for e in mistakes._three("1.1", list(answers))] == ["a", "c", "e"]
    assert asked == ["a", "b", "c", "d", "e"], "none is run in vain"
    assert [e["mistake"] for e in mistakes._three("1.1", ["a", "b", "d", "c"])] == ["a", "b", "c"]
    assert [e["mistake"] for e in mistakes._three("1.1", ["a"])] == ["a"]


def test_what_is_stopped_is_no_error_to_show():
    def impl(*args, **kwargs):
        raise NotImplementedError("Exercise 1.1: a stub")

    assert mistakes.said(agendas.cards(stems()[0])[0].number, impl) is None
