"""The exercises keep their promises: stubs hold nothing of a solution, and checks tell right from wrong."""

import json
import os

import pytest

from minillm.learn.checker import _classes, check_chapter, load_module, load_notebook, run
from minillm.learn.exercises import BEGIN, END, _edited, render, stale
from minillm.learn.paths import root, stems

NUMBERS = [(stem, number) for stem in stems() for number in _classes(stem)]
LINES_TO_WRITE = 30  # at most, an exercise
SECONDS = 1.0


def _variants(stem: str) -> list:
    return load_module(root() / "tests" / "exercises" / f"variants_{stem}.py").VARIANTS


def _statuses(number: str, impl) -> list[str]:
    return [outcome.status for outcome in run(number, impl)]


def test_notebooks_are_generated():
    """In CI all of them; elsewhere a notebook that a learner works in is theirs."""
    found = [path for path in stale() if os.environ.get("CI") or not _edited(path)]
    assert found == [], "run `minillm exercises build`"


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
def test_three_to_nine_exercises(stem):
    assert 3 <= len(_classes(stem)) <= 9


@pytest.mark.parametrize("stem", stems())
def test_stubs_are_missing(stem, tmp_path):
    """The untouched notebook: every exercise says that it is not written yet, and nothing else."""
    untouched = tmp_path / f"{stem}.ipynb"
    untouched.write_text(render((root() / "solutions" / f"{stem}.py").read_text(encoding="utf-8"), stem))
    names = load_notebook(untouched)
    for number, cls in _classes(stem).items():
        assert _statuses(number, names[cls.object_name])[-1] == "missing", number


@pytest.mark.parametrize(("stem", "number"), NUMBERS, ids=lambda v: v if "." in str(v) else "")
def test_wrong_ones_fail_and_alternatives_pass(stem, number):
    variants = [impl for impl in _variants(stem) if impl.variant[1] == number]
    wrong = [impl for impl in variants if impl.variant[0] == "wrong"]
    assert len(wrong) >= 3, f"exercise {number} has {len(wrong)} wrong implementations, expected at least 3"
    for impl in variants:
        kind, _, what = impl.variant
        statuses = _statuses(number, impl)
        assert "broken" not in statuses, f"the check itself crashed on «{what}»"
        assert "missing" not in statuses, f"«{what}» is a stub"
        assert ("failed" in statuses) == (kind == "wrong"), f"{kind} «{what}»: {statuses}"


def test_table_of_the_four_runs(capsys, monkeypatch, tmp_path):
    """Print what each check file was held against: solution, stub, wrong ones, alternatives."""
    monkeypatch.setattr("minillm.learn.progress._file", lambda: tmp_path / "progress.json")
    rows = []
    for stem in stems():
        solved = check_chapter(stem, root() / "solutions" / f"{stem}.py")
        untouched = tmp_path / f"{stem}.ipynb"
        untouched.write_text(render((root() / "solutions" / f"{stem}.py").read_text(encoding="utf-8"), stem))
        stubs = check_chapter(stem, untouched)
        for number in solved:
            variants = [v for v in _variants(stem) if v.variant[1] == number]
            refused = [v for v in variants if v.variant[0] == "wrong" and "failed" in _statuses(number, v)]
            accepted = [v for v in variants if v.variant[0] == "alternative" and "failed" not in _statuses(number, v)]
            passed = all(o.status == "passed" for o in solved[number])
            rows.append((number, passed, stubs[number][-1].status, len(refused), len(accepted), len(solved[number])))
            assert passed, f"the solution of {number} fails: {solved[number]}"
    with capsys.disabled():
        print("\nexercise  solution  stub      wrong refused  alternatives accepted  contracts")
        for number, passed, stub, refused, accepted, contracts in rows:
            print(
                f"{number:8}  {'passes' if passed else 'FAILS':8}  {stub:8}  {refused:13}  {accepted:21}  {contracts:9}"
            )
