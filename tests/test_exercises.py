"""The exercises keep their promises: stubs hold nothing of a solution, and checks tell right from wrong."""

import functools
import io
import json
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell

from minillm.learn.checker import GRACE, TIME_LIMIT, _classes, _outcomes, load_module, load_notebook, run
from minillm.learn.exercises import BEGIN, END, _edited, render, stale
from minillm.learn.isolation import ChildEnded, can_fork, in_child, neutral_state
from minillm.learn.paths import root, stems


@cache
def _checks(stem: str) -> dict[str, type]:
    with neutral_state():
        return _classes(stem)


EVERY_CONTRACT = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
NUMBERS = [(stem, number) for stem in stems() for number in _checks(stem)]
LINES_TO_WRITE = 30  # at most, an exercise


def _variants(stem: str) -> list:
    return load_module(root() / "tests" / "exercises" / f"variants_{stem}.py").VARIANTS


def _statuses(number: str, impl) -> list[str]:
    """What each contract says of an implementation, tried as in a notebook."""
    return [outcome.status for outcome in run(number, impl)]


def _together(stem: str, number: str, impls: list) -> list[list[str]]:
    """What each contract says of each implementation, all tried in one child process: to make one takes longer than
    most checks. One that ends it has no statuses, nor have those after it.

    Of a wrong one the contracts up to the first that refuses it, as a notebook explains no other; in `make deep` all.
    """
    statuses: list[list[str]] = [[] for _ in impls]

    def job(send: Callable[[dict], None]) -> None:
        for i, impl in enumerate(impls):
            for outcome in _outcomes(_checks(stem)[number], impl):
                send({"i": i, "status": outcome.status})
                if outcome.status == "failed" and not EVERY_CONTRACT:
                    break

    i = 0
    if can_fork():
        try:
            for message in in_child(job, TIME_LIMIT + GRACE):
                i = message["i"]
                statuses[i].append(message["status"])
        except ChildEnded:
            statuses[i:] = [[] for _ in impls[i:]]
    return statuses


def test_notebooks_are_generated():
    """In CI all of them; elsewhere a notebook that a learner works in is theirs."""
    found = [path for path in stale() if os.environ.get("CI") or not _edited(path)]
    assert found == [], "run `minillm exercises build`"


def _run_in_ipython(path: Path, send: Callable[[dict], None]) -> None:
    """Run a notebook's code cells as Jupyter's kernel does, until one raises; send what each printed, and that error.

    Each kernel would import torch anew; this process has done so.
    """
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    shell = InteractiveShell(display_banner=False, history_load_length=0)
    shell.history_manager.enabled = False
    with neutral_state():
        os.environ["MPLBACKEND"] = "agg"
        os.chdir(path.parent)
        for cell in notebook.cells:
            if cell.cell_type != "code":
                continue
            with redirect_stdout(io.StringIO()) as out:
                result = shell.run_cell(cell.source)
            error = result.error_before_exec or result.error_in_exec
            send({"printed": out.getvalue(), "error": None if error is None else repr(error)})
            if error is not None:
                return


def _ran(path: Path) -> list[dict]:
    messages: list[dict] = []
    if can_fork():
        messages += in_child(functools.partial(_run_in_ipython, path), 120)
    else:
        _run_in_ipython(path, messages.append)
    return messages


@pytest.mark.parametrize("stem", stems())
def test_a_notebook_runs_with_its_stubs(stem):
    """No cell raises, and every check says that its exercise is not written yet."""
    path = root() / "exercises" / f"{stem}.ipynb"
    messages = _ran(path)
    assert not [m for m in messages if m["error"]]
    printed = "".join(m["printed"] for m in messages)
    if os.environ.get("CI") or not _edited(path):
        assert re.findall(r"^… (\S+): not written yet", printed, re.MULTILINE) == list(_checks(stem))


def test_a_cell_that_raises_is_seen(tmp_path):
    cells = [nbformat.v4.new_code_cell(source) for source in ("x = 1\nx", "1 / 0", "print(2)")]
    book = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python"}})
    nbformat.write(book, tmp_path / "book.ipynb")
    first, error = _ran(tmp_path / "book.ipynb")
    assert (first["error"], "1" in first["printed"]) == (None, True)
    assert error["error"].startswith("ZeroDivisionError")
    (tmp_path / "book.ipynb").write_text("{}")
    with pytest.raises(Exception, match="notebook|nbformat|valid"):
        _ran(tmp_path / "book.ipynb")


@pytest.mark.parametrize("stem", stems())
def test_generation_is_deterministic(stem):
    source = (root() / "solutions" / f"{stem}.py").read_text(encoding="utf-8")
    assert render(source, stem) == render(source, stem)


@pytest.mark.parametrize("stem", stems())
def test_nothing_of_a_solution_reaches_a_stub(stem):
    """Plant a canary in every solution region and every solution cell: none may come out."""
    source = (root() / "solutions" / f"{stem}.py").read_text(encoding="utf-8")
    lines, inside, planted = [], False, 0
    for line in source.splitlines():
        lines.append(line)
        if line.strip() == BEGIN:
            inside = True
        elif line.strip() == END:
            inside = False
        if inside:
            lines.append(line[: len(line) - len(line.lstrip())] + "CANARY = 'CANARY'")
            planted += 1
        if line.startswith("# %% [markdown]") and '"solution"' in line:
            lines.append("# CANARY")
            planted += 1
    assert planted >= 3
    assert "CANARY" not in render("\n".join(lines), stem)


@pytest.mark.parametrize("stem", stems())
def test_no_line_of_a_solution_stands_in_its_notebook(stem):
    """Not even by way of a hint: no substantial line of a solution may appear word for word."""
    source = (root() / "solutions" / f"{stem}.py").read_text(encoding="utf-8")
    cells = json.loads((root() / "exercises" / f"{stem}.ipynb").read_text(encoding="utf-8"))["cells"]
    shown = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    inside = False
    for line in source.splitlines():
        if line.strip() == BEGIN:
            inside = True
        elif line.strip() == END:
            inside = False
        elif inside and len(line.strip()) > 30:
            assert line.strip() not in shown


@pytest.mark.parametrize(("stem", "number"), NUMBERS, ids=lambda v: v if "." in str(v) else "")
def test_size(stem, number):
    source = (root() / "solutions" / f"{stem}.py").read_text(encoding="utf-8")
    part = source.split(f"## Exercise {number}:")[1].split("## Exercise ")[0]
    written, inside = 0, False
    for line in part.splitlines():
        if line.strip() == BEGIN:
            inside = True
        elif line.strip() == END:
            inside = False
        elif inside and line.strip():
            written += 1
    assert 1 <= written <= LINES_TO_WRITE
    assert part.count("<summary>Hint 1") == 1
    assert part.count("<summary>Hint 2") == 1
    assert '["solution"]' in part, "a cell tagged solution says why"


@pytest.mark.parametrize("stem", stems())
def test_three_to_eleven_exercises(stem):
    assert 3 <= len(_checks(stem)) <= 11


@cache
def _untouched(stem: str) -> dict:
    """What the notebook defines before anybody wrote in it."""
    with tempfile.TemporaryDirectory() as folder:
        notebook = Path(folder) / f"{stem}.ipynb"
        notebook.write_text(render((root() / "solutions" / f"{stem}.py").read_text(encoding="utf-8"), stem))
        return load_notebook(notebook)


@cache
def _solved(stem: str) -> dict:
    return vars(load_module(root() / "solutions" / f"{stem}.py"))


def _verdict(said: list[str]) -> str:
    """Of an implementation, by what each contract said: "right", "wrong", "stub", or "" where the check crashed."""
    if not said or "broken" in said:
        return ""
    if "missing" in said:
        return "stub"
    return "right" if set(said) == {"passed"} else "wrong" if "failed" in said else ""


@pytest.mark.parametrize(("stem", "number"), NUMBERS, ids=lambda v: v if "." in str(v) else "")
def test_the_four_runs(record_property, stem, number):
    """The solution passes, the stub says that it is not written yet, each wrong one fails, each alternative passes."""
    name = _checks(stem)[number].object_name
    variants = [impl for impl in _variants(stem) if impl.variant[1] == number]
    kinds = [impl.variant[0] for impl in variants]
    assert kinds.count("wrong") >= 3, f"exercise {number} has {kinds.count('wrong')} wrong implementations"
    solution, stub = _solved(stem)[name], _untouched(stem)[name]
    # The solution once more at the end: none of the others left anything behind that decides for those after it.
    impls = [solution, stub, *variants, solution]
    expected = ["right", "stub", *("wrong" if kind == "wrong" else "right" for kind in kinds), "right"]
    statuses = _together(stem, number, impls)
    unharmed = _verdict(statuses[-1]) == "right"
    for impl, said, verdict in zip(impls, statuses, expected, strict=True):
        if not unharmed or _verdict(said) != verdict:  # alone, it may be another
            said = _statuses(number, impl)
        what = getattr(impl, "variant", ("", number, verdict))[2]
        assert "broken" not in said, f"the check itself crashed on «{what}»"
        assert _verdict(said) == verdict, f"expected {verdict}: «{what}»: {said}"
    # For the table after the tests (conftest.py).
    record_property("four runs", (number, len(said), kinds.count("wrong"), kinds.count("alternative")))
