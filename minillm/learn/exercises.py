"""The generator: solutions/NN_stem.py -> exercises/NN_stem.ipynb, deterministic to the byte, with nothing of a
solution in it.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from ..extras import require
from .paths import root, stems

__all__ = ["build", "fingerprint", "name_cells", "render", "solution_cells", "stale", "write_text"]

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
HEADING = re.compile(r"^## Exercise (\d+\.w?\d+): (.+)$", re.MULTILINE)
DEFINES = re.compile(r"^(?:async +)?(?:def|class) +(\w+)", re.MULTILINE | re.ASCII)


def render(source: str, stem: str) -> str:
    """The exercise notebook, as JSON text, of a solutions file in jupytext's percent format.

    Raises ValueError for unbalanced markers or a marked region that no exercise heading precedes.
    """
    cells = [(kind, text) for kind, text, _ in _rendered_cells(source, stem)]
    names = name_cells(cells)
    notebook = {
        "cells": [_cell(kind, text, name) for (kind, text), name in zip(cells, names, strict=True)],
        "metadata": {
            "minillm": {
                "generated": fingerprint(*(text for _, text in cells)),
                "cells": {name: fingerprint(text) for (_, text), name in zip(cells, names, strict=True)},
            },
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _rendered_cells(source: str, stem: str) -> list[tuple[str, str, str]]:
    """(kind, text, text in solutions/) of each cell of the exercise notebook."""
    require("lab", "jupytext")
    import jupytext

    cells: list[tuple[str, str, str]] = []
    title, number = None, None
    for cell in jupytext.reads(source, fmt="py:percent").cells:
        if cell.cell_type == "markdown" and (found := HEADING.search(cell.source)):
            if number:
                cells.append(_link(number, stem))
            number, title = found.groups()
        if "solution" in cell.metadata.get("tags", []):
            continue
        is_code = cell.cell_type == "code"
        text = _stub(cell.source, f"Exercise {number}: {title}" if number else None) if is_code else cell.source
        cells.append((cell.cell_type, text, cell.source))
    return [*cells, _link(number, stem)] if number else cells


def solution_cells(source: str, stem: str) -> dict[str, str]:
    """Name of each cell in which a learner writes -> the same cell solved, without the markers."""
    cells = _rendered_cells(source, stem)
    names = name_cells([(kind, text) for kind, text, _ in cells])
    return {
        name: "\n".join(line for line in solved.splitlines() if line.strip() not in (BEGIN, END)).strip("\n")
        for name, (_, text, solved) in zip(names, cells, strict=True)
        if text != solved and BEGIN in solved
    }


def _link(number: str, stem: str) -> tuple[str, str, str]:
    text = (
        f"[Solution {number}, and why](../solutions/{stem}.py): open it when your own passes,"
        " or when both hints did not help."
    )
    return "markdown", text, text


def name_cells(cells: Iterable[tuple[str, str]]) -> list[str]:
    """The id of each (kind, text): the exercise's number and the cell's part in it, as "7-2-hint-1".

    An id stays with its cell when others are added in front of it, so `minillm exercises update` finds it again.
    """
    names: list[str] = []
    number = "start"
    for kind, text in cells:
        part = "text" if kind == "markdown" else "code"
        if kind == "markdown" and (found := HEADING.search(text)):
            number, part = found[1].replace(".", "-"), "card"
        elif kind == "markdown" and (hint := re.search(r"<summary>Hint (\d+)", text)):
            part = f"hint-{hint[1]}"
        elif kind == "markdown" and text.startswith("[Solution "):
            part = "solution"
        elif kind == "code" and re.search(r"^check\(", text, re.MULTILINE):
            part = "check"
        elif kind == "code" and (defined := DEFINES.search(text)):
            part = defined[1][:40]
        name = f"{number}-{part}"
        same = sum(n == name or re.fullmatch(rf"{name}-x\d+", n) is not None for n in names)
        names.append(f"{name}-x{same + 1}" if same else name)
    return names


def _stub(text: str, title: str | None) -> str:
    """Replace each marked region by a NotImplementedError; at the margin (a solution's imports) by nothing."""
    lines, inside = [], False
    for line in text.splitlines():
        mark = line.strip()
        if mark == BEGIN and not inside:
            inside, indent = True, line[: len(line) - len(line.lstrip())]
            if title is None:
                raise ValueError(f"source: {BEGIN} stands before the first `## Exercise N.M: title` heading")
            if indent:
                lines.append(f'{indent}raise NotImplementedError("{title}")')
        elif mark == END and inside:
            inside = False
        elif BEGIN in line or END in line:
            raise ValueError(f"source: unbalanced or misplaced marker {mark!r} in {title}")
        elif not inside:
            lines.append(line)
    if inside:
        raise ValueError(f"source: {BEGIN} without {END} in {title}")
    return "\n".join(lines).strip("\n")


def _cell(kind: str, text: str, name: str) -> dict:
    cell = {"cell_type": kind, "id": name, "metadata": {}, "source": text.splitlines(keepends=True)}
    return cell | {"execution_count": None, "outputs": []} if kind == "code" else cell


def stale() -> list[Path]:
    """The exercise notebooks that differ from what their sources give now, and those that have no source."""
    wanted = {root() / "exercises" / f"{stem}.ipynb": stem for stem in stems()}
    differ = [
        path
        for path, stem in wanted.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != _rendered(stem)
    ]
    return differ + [path for path in (root() / "exercises").glob("*.ipynb") if path not in wanted]


def build(force: bool = False) -> tuple[list[Path], list[Path]]:
    """Write the stale exercise notebooks: (written, kept). Kept are those in which a learner worked, unless `force`."""
    written, kept = [], []
    for stem in stems():
        path, text = root() / "exercises" / f"{stem}.ipynb", _rendered(stem)
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        if path.is_file() and _edited(path) and not force:
            kept.append(path)
            continue
        write_text(path, text)
        written.append(path)
    return written, kept


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and rename it: there is the old one or the new one, never half of one."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # a full disk


def _rendered(stem: str) -> str:
    return render((root() / "solutions" / f"{stem}.py").read_text(encoding="utf-8"), stem)


def fingerprint(*texts: str) -> str:
    """A short hash of cells' texts, in order."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _edited(path: Path) -> bool:
    """Whether a notebook's cells differ from those that the generator last wrote into it."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        return (
            fingerprint(*("".join(cell["source"]) for cell in notebook["cells"]))
            != notebook["metadata"]["minillm"]["generated"]
        )
    except (ValueError, KeyError):
        return True
