"""A learner's exercise notebook changed in place: one stub back, one solution in, or all that is new in the curriculum.

The generator leaves in a notebook's metadata what it wrote into which cell. A cell whose text is another one by now has
been filled: `update` never touches it, `reset` and `solve` change the named exercise alone and keep a copy.
"""

import ast
import json
import os
import re
import subprocess
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from . import progress
from .exercises import fingerprint, name_cells, render, solution_cells, write_text
from .paths import root, stem_of, stems

__all__ = ["Change", "exercises_of", "is_shown", "reset", "solve", "source_of", "update"]

MARK = "# Solution {number}, put here by `minillm exercises solve`; it does not count as yours in `minillm progress`."
Cell = dict[str, Any]


@dataclass
class Change:
    """What became of a notebook: names of cells that got a new text, were added, removed, or stayed because a learner
    had filled them though the curriculum has another text now; `copy` is where a replaced text was put.
    """

    path: Path
    changed: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    outdated: list[str] = field(default_factory=list)
    copy: Path | None = None

    def __bool__(self) -> bool:
        """Whether anything was written."""
        return bool(self.changed or self.added or self.removed)


@dataclass
class _Book:
    """A learner's notebook: its bytes as read, its cells, the name of each (None: a cell of the learner's own), and the
    fingerprints of what the generator wrote.
    """

    path: Path
    read: bytes
    content: dict[str, Any]
    names: list[str | None]
    record: dict[str, str]

    @property
    def cells(self) -> list[Cell]:
        return self.content["cells"]

    def is_filled(self, cell: Cell, name: str | None, new: dict[str, Cell]) -> bool:
        """Whether a cell holds anything but what the generator wrote."""
        if name is None or (name in new and cell["cell_type"] != new[name]["cell_type"]):
            return True
        text = _text(cell)
        return fingerprint(text) != self.record.get(name) and not (name in new and text == _text(new[name]))

    def insert(self, at: int, name: str, cell: Cell) -> None:
        self.cells.insert(at, cell)
        self.names.insert(at, name)


def reset(number: str) -> Change:
    """Put the stub of exercise `number` back; all other cells stay as they are, and what is replaced is kept in
    `.minillm/kept/`.

    Raises ValueError for a number that no exercise has and for a damaged notebook, FileNotFoundError without one.
    """
    stem, new, solved = _wanted(number)
    return _fill(stem, number, {name: _text(new[name]) for name in solved}, solved)


def solve(number: str) -> Change:
    """Put the solution of exercise `number` into its cell, marked as such; all other cells stay as they are, and what
    is replaced is kept in `.minillm/kept/`. The record of progress notes that it was shown. Raises as `reset` does.
    """
    stem, _, solved = _wanted(number)
    change = _fill(stem, number, solved, solved)
    progress.remember_shown(number)
    return change


def update(chapter: str | None = None) -> tuple[list[Change], list[str]]:
    """Bring what is new in statements, hints, stubs and checks into the notebook of one chapter, or into all: (what
    became of each, what went wrong). No filled cell is touched; a missing notebook is written.

    Raises ValueError for an unknown chapter.
    """
    changes, problems = [], []
    for stem in [stem_of(chapter)] if chapter else stems():
        try:
            changes.append(_update(stem))
        except (ValueError, OSError, RuntimeError) as e:
            problems.append(str(e))
    return changes, problems


def is_shown(number: str, text: str) -> bool:
    """Whether the text of a cell is the solution that `solve` put there: it has the mark, or is the same code in an
    exercise whose solution was shown.
    """
    if MARK.format(number=number) in text:
        return True
    if number not in progress.shown():
        return False
    try:
        code = ast.dump(ast.parse(text))
        return any(ast.dump(ast.parse(solved)) == code for solved in _wanted(number)[2].values())
    except SyntaxError:
        return False


# ---- what the curriculum says ----------------------------------------------------------------------------------------


def _wanted(number: str) -> tuple[str, dict[str, Cell], dict[str, str]]:
    """Of exercise `number`: its chapter's stem and cells by name, and the texts, marked, of its cells solved."""
    stem = stem_of(number)
    known = progress.exercises()[stem]
    if number not in known:
        raise ValueError(f"number: expected one of {', '.join(known)}, got {number!r}")
    mark, own = MARK.format(number=number), number.replace(".", "-")
    solved = {name: text for name, text in solution_cells(_source(stem), stem).items() if _exercise(name) == own}
    return stem, _new(stem), {name: f"{mark}\n{text}" for name, text in solved.items()}


def _source(stem: str) -> str:
    return (root() / "solutions" / f"{stem}.py").read_text(encoding="utf-8")


def _new(stem: str) -> dict[str, Cell]:
    return {cell["id"]: cell for cell in json.loads(render(_source(stem), stem))["cells"]}


def _exercise(name: str) -> str:
    """ "7-2-hint-1" is of "7-2", "start-text" of "start" """
    return "start" if name.startswith("start-") else "-".join(name.split("-")[:2])


# ---- reading and writing ---------------------------------------------------------------------------------------------


def _text(cell: Cell) -> str:
    return "".join(cell["source"])


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def _read(stem: str) -> _Book:
    path = Path(os.path.realpath(root() / "exercises" / f"{stem}.ipynb"))  # through a link
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `minillm exercises build` writes the exercise notebooks")
    read = path.read_bytes()
    try:
        content = json.loads(read.decode("utf-8"))
        texts = [(cell["cell_type"], _text(cell)) for cell in content["cells"]]
        made = content["metadata"].get("minillm", {})
        record = dict(made.get("cells", {}))
        if content["nbformat"] != 4:
            raise TypeError(f"nbformat {content['nbformat']}, expected 4")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(
            f"{path}: not a notebook any more ({type(e).__name__}: {e}); nothing was changed. In its folder,"
            f" `git checkout -- {path.name}` brings the stubs back, and loses what you wrote"
        ) from e
    names = _names(content["cells"], texts, record)
    if not record:
        once = _generated_once(path)
        record = {
            name: fingerprint(text) for name, (_, text) in zip(names, texts, strict=True) if name and text in once
        }
    return _Book(path, read, content, names, record)


def _generated_once(path: Path) -> set[str]:
    """Texts of cells in the versions of a notebook that git has as the generator wrote them: for a notebook that was
    made before its cells were recorded. A version that somebody worked in does not count.
    """
    texts: set[str] = set()
    for commit in (_git(path, "log", "--format=%H", "--", path.name) or "").split():
        try:
            old = json.loads(_git(path, "show", f"{commit}:./{path.name}") or "")
            cells = [_text(cell) for cell in old["cells"]]
            if fingerprint(*cells) == old["metadata"]["minillm"]["generated"]:
                texts.update(cells)
        except (ValueError, KeyError, TypeError):
            continue
    return texts


def _git(path: Path, *arguments: str) -> str | None:
    """What git prints in a file's folder, or None where it cannot be asked."""
    try:
        done = subprocess.run(["git", *arguments], cwd=path.parent, capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None


def _names(cells: list[Cell], texts: list[tuple[str, str]], record: dict[str, str]) -> list[str | None]:
    """By their ids; in a notebook without ids, or made before they were recorded, by what stands in the cells."""
    if not record or not any(cell.get("id") in record for cell in cells):
        return list(name_cells(texts))
    names: list[str | None] = []
    for cell in cells:
        name = cell.get("id")
        names.append(name if name in record and name not in names else None)  # a copied cell is the learner's
    return names


def _write(book: _Book) -> None:
    """Rename a complete file over the notebook, unless it was saved by somebody else meanwhile."""
    book.content["nbformat_minor"] = max(5, book.content.get("nbformat_minor", 0))
    text = json.dumps(book.content, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    text.encode("utf-8")  # raises before anything is touched
    if book.path.read_bytes() != book.read:
        raise RuntimeError(f"{book.path}: was saved by another program just now; nothing was changed, repeat")
    write_text(book.path, text)


def _keep(number: str, text: str) -> Path:
    """Put a text that is about to be replaced into a file of its own."""
    folder = root() / ".minillm" / "kept"
    folder.mkdir(parents=True, exist_ok=True)
    path = next(p for n in count(1) if not (p := folder / f"{number}-{n}.py").exists())
    write_text(path, text + "\n")
    return path


# ---- one exercise ----------------------------------------------------------------------------------------------------


def _fill(stem: str, number: str, texts: dict[str, str], solved: dict[str, str]) -> Change:
    """Give the cells of these names these texts; one that is gone is put behind the cell that it stood behind. What a
    learner wrote over stub and solution is kept.
    """
    book, new = _read(stem), _new(stem)
    change = Change(book.path)
    replaced = []
    for name, text in texts.items():
        if name not in book.names:
            book.insert(_place(book, name, new), name, {**new[name], "source": _lines(text)})
            change.added.append(name)
            continue
        at = book.names.index(name)
        cell = book.cells[at]
        if _text(cell) == text and cell["cell_type"] == "code":
            continue
        if book.is_filled(cell, name, new) and _text(cell) != solved[name]:
            replaced.append(_text(cell))
        book.cells[at] = {**new[name], "id": cell.get("id", name), "source": _lines(text)}
        change.changed.append(name)
    if change:
        if replaced:
            change.copy = _keep(number, "\n\n".join(replaced))
        book.record.update({name: fingerprint(_text(new[name])) for name in texts if book.record})
        _record(book)
        _write(book)
    return change


def _record(book: _Book) -> None:
    if book.record:
        book.content["metadata"].setdefault("minillm", {})["cells"] = book.record


def _place(book: _Book, name: str, new: dict[str, Cell]) -> int:
    """Where a missing cell belongs: behind the nearest one in front of it that is there."""
    for before in reversed(list(new)[: list(new).index(name)]):
        if before in book.names:
            return book.names.index(before) + 1
    return 0


# ---- a whole notebook ------------------------------------------------------------------------------------------------


def _update(stem: str) -> Change:
    new, path = _new(stem), root() / "exercises" / f"{stem}.ipynb"
    if not path.exists():
        write_text(path, render(_source(stem), stem))
        return Change(path, added=list(new))
    book = _read(stem)
    change = Change(book.path)
    _renew(book, new, change)
    _add(book, new, change)
    made = json.loads(render(_source(stem), stem))["metadata"]["minillm"]
    filled = {n for cell, n in zip(book.cells, book.names, strict=True) if n and book.is_filled(cell, n, new)}
    # A filled cell keeps what it was filled over ("": unknown); one that the learner took out stays out.
    book.record = {
        **{name: book.record[name] for name in {*book.names, *new} if name in book.record},
        **{name: book.record.get(name, "") for name in filled},
        **{name: made["cells"][name] for name in new if name in book.names and name not in filled},
    }
    before = book.content["metadata"].get("minillm", {})
    book.content["metadata"]["minillm"] = {**before, **made, "cells": book.record}
    if change or before != book.content["metadata"]["minillm"]:
        for cell, name in zip(book.cells, book.names, strict=True):
            if name is not None:
                cell["id"] = name
        _write(book)
    return change


def _renew(book: _Book, new: dict[str, Cell], change: Change) -> None:
    """Give each cell that nobody filled its new text; take it out where the curriculum has it no more, unless the
    learner wrote something in that exercise.
    """
    named = list(zip(book.cells, book.names, strict=True))
    filled = [book.is_filled(cell, name, new) for cell, name in named]
    at_work = {_exercise(name) for (_, name), touched in zip(named, filled, strict=True) if name and touched}
    cells: list[Cell] = []
    names: list[str | None] = []
    for (cell, name), touched in zip(named, filled, strict=True):
        if name is not None and touched and name in new:
            was = book.record.get(name)  # nothing, where it is not known what stood there
            change.outdated += [name] if was and was != fingerprint(_text(new[name])) else []
        elif name is not None and not touched and name in new and _text(cell) != _text(new[name]):
            cell = {**cell, **{k: v for k, v in new[name].items() if k not in ("id", "metadata")}}
            change.changed.append(name)
        elif name is not None and not touched and name not in new and _exercise(name) not in at_work:
            change.removed.append(name)
            continue
        cells.append(cell)
        names.append(name)
    book.content["cells"], book.names = cells, names


def _add(book: _Book, new: dict[str, Cell], change: Change) -> None:
    for name, cell in new.items():
        if name not in book.names and name not in book.record:  # else the learner took it out
            book.insert(_place(book, name, new), name, cell)
            change.added.append(name)


def exercises_of(names: list[str]) -> str:
    """Exercises of these cells, as "7.1, 7.2"."""
    numbers = dict.fromkeys(_exercise(name).replace("-", ".") for name in names)
    return ", ".join("the start" if number == "start" else number for number in numbers)


def source_of(name: str, cells: list[str]) -> str:
    """The text of the last of these code cells that defines `name`; empty when none does."""
    defines = re.compile(rf"^(?:async +)?(?:def|class) +{re.escape(name)}\b|^{re.escape(name)} *=", re.MULTILINE)
    return next((text for text in reversed(cells) if defines.search(text)), "")
