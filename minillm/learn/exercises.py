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

__all__ = ["build", "render", "stale"]

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
HEADING = re.compile(r"^## Exercise (\d+\.w?\d+): (.+)$", re.MULTILINE)


def render(source: str, stem: str) -> str:
    """The exercise notebook, as JSON text, of a solutions file in jupytext's percent format.

    Raises ValueError for unbalanced markers or a marked region that no exercise heading precedes.
    """
    require("lab", "jupytext")
    import jupytext

    cells, title, number = [], None, None
    for cell in jupytext.reads(source, fmt="py:percent").cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "markdown" and (found := HEADING.search(cell.source)):
            if number:
                cells.append(_link(number, stem))
            number, title = found.groups()
        if "solution" in tags:
            continue
        text = (
            _stub(cell.source, f"Exercise {number}: {title}" if number else None)
            if cell.cell_type == "code"
            else cell.source
        )
        cells.append((cell.cell_type, text))
    if number:
        cells.append(_link(number, stem))
    notebook = {
        "cells": [_cell(kind, text, f"{stem}-{i:02d}") for i, (kind, text) in enumerate(cells)],
        "metadata": {
            "minillm": {"generated": _fingerprint(text for _, text in cells)},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _link(number: str, stem: str) -> tuple[str, str]:
    return (
        "markdown",
        f"[Solution {number}, and why](../solutions/{stem}.py): open it when your own passes,"
        " or when both hints did not help.",
    )


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
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
        written.append(path)
    return written, kept


def _rendered(stem: str) -> str:
    return render((root() / "solutions" / f"{stem}.py").read_text(encoding="utf-8"), stem)


def _fingerprint(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _edited(path: Path) -> bool:
    """Whether a notebook's cells differ from those that the generator last wrote into it."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        return (
            _fingerprint("".join(cell["source"]) for cell in notebook["cells"])
            != notebook["metadata"]["minillm"]["generated"]
        )
    except (ValueError, KeyError):
        return True
