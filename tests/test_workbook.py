"""reset, solve and update: what a learner wrote stays, to the byte, whatever the curriculum and the learner changed."""

import copy
import json
import os
import shutil
import subprocess
import tempfile
from contextlib import chdir, contextmanager
from pathlib import Path

import nbformat
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from minillm.cli import app
from minillm.learn import checker, exercises, progress, workbook
from minillm.learn.paths import root, stems

START = "# %% [markdown]\n# # Exercises 1{version}\n\n# %%\nfrom minillm.learn import check\n\nONE = 1{version}\n"
EXERCISE = '''
# %% [markdown]
# ## Exercise {number}: of {name}
#
# Return a sum.{statement}

# %%
def {name}(a, b):
    """a + b{stub}"""
    ### BEGIN SOLUTION
    total = a + b  # the sum
    return total
    ### END SOLUTION

# %%
check("{number}", {name})

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Add.{hint}
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Because.
'''
CHECK = '''
@exercise("{number}", "{name}")
class Test_{name}:
    def test_sum(self, impl):
        """the sum of two numbers"""
        expect_equal("sum", impl(2, 3), 5)
'''
NUMBERS = {"1.w1": "warm", "1.1": "first", "1.2": "second", "1.3": "third"}
STEM = "01_small"


def source(numbers=tuple(NUMBERS), version="", **changes) -> str:
    """A solutions file. changes: number with _ for its dot -> fields of EXERCISE"""
    fields = {"statement": "", "stub": "", "hint": ""}
    parts = [START.format(version=version)]
    for number in numbers:
        own = {**fields, **changes.get("e" + number.replace(".", "_"), {})}
        parts.append(EXERCISE.format(number=number, name=NUMBERS[number], **own))
    return "".join(parts)


def revise(text: str) -> None:
    Path("solutions", f"{STEM}.py").write_text(text)


@contextmanager
def classroom(text: str):
    """The notebook of a curriculum of its own, in the current folder."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        for name in ("solutions", "tests/exercises"):
            Path(name).mkdir(parents=True)
        checks = "".join(CHECK.format(number=number, name=name) for number, name in NUMBERS.items())
        head = "from minillm.learn.testing import exercise, expect_equal\n"
        Path("tests", "exercises", f"test_{STEM}.py").write_text(head + checks)
        revise(text)
        exercises.build()
        yield Path("exercises", f"{STEM}.ipynb").absolute()


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def save(path: Path, book: dict) -> None:
    path.write_text(json.dumps(book, ensure_ascii=False), encoding="utf-8")


def text_of(cell: dict) -> str:
    return "".join(cell["source"])


def named(path: Path) -> dict[str, str]:
    return {cell["id"]: text_of(cell) for cell in load(path)["cells"]}


def fill(path: Path, name: str, text: str) -> None:
    book = load(path)
    next(cell for cell in book["cells"] if cell["id"] == name)["source"] = text.splitlines(keepends=True)
    save(path, book)


MINE = "def first(a, b):\n    return sum((a, b))  # ünï"


class TestReset:
    def test_the_stub_comes_back_and_all_else_stays(self):
        with classroom(source()) as path:
            fresh = load(path)
            fill(path, "1-2-second", "def second(a, b):\n    return a")
            fill(path, "1-1-first", MINE)
            book = load(path)
            change = workbook.reset("1.1")
            after = load(path)
            assert named(path)["1-1-first"] == text_of(next(c for c in fresh["cells"] if c["id"] == "1-1-first"))
            at = [c["id"] for c in book["cells"]].index("1-1-first")
            del book["cells"][at], after["cells"][at]
            assert after == book
            assert change.copy.read_text(encoding="utf-8") == MINE + "\n"

    def test_a_stub_that_is_there_is_left_alone(self):
        with classroom(source()) as path:
            before = path.read_bytes()
            assert not workbook.reset("1.1")
            assert path.read_bytes() == before

    def test_a_deleted_cell_comes_back_in_its_place(self):
        with classroom(source()) as path:
            book = load(path)
            wanted = [c["id"] for c in book["cells"]]
            book["cells"] = [c for c in book["cells"] if c["id"] not in ("1-1-first", "1-1-card")]
            save(path, book)
            workbook.reset("1.1")
            assert list(named(path)) == [name for name in wanted if name != "1-1-card"]

    def test_each_copy_has_a_place_of_its_own(self):
        with classroom(source()) as path:
            copies = []
            for text in (MINE, MINE + "\n\nx = 1"):
                fill(path, "1-1-first", text)
                copies.append(workbook.reset("1.1").copy)
            assert [c.read_text(encoding="utf-8") for c in copies] == [MINE + "\n", MINE + "\n\nx = 1\n"]

    def test_nothing_is_replaced_where_no_copy_can_be_kept(self):
        with classroom(source()) as path:
            fill(path, "1-1-first", MINE)
            Path(".minillm").mkdir()
            Path(".minillm", "kept").write_text("a file")
            before = path.read_bytes()
            with pytest.raises(OSError, match="kept"):
                workbook.reset("1.1")
            assert path.read_bytes() == before


class TestSolve:
    def test_it_passes_and_is_not_the_learners(self, capsys):
        with classroom(source()) as path:
            workbook.solve("1.1")
            assert named(path)["1-1-first"].startswith("# Solution 1.1, put here by `minillm exercises solve`")
            outcomes = checker.check_chapter("1")
            assert [o.status for o in outcomes["1.1"]] == ["passed"]
            assert checker.check("1.1", checker.load_notebook(path)["first"])
            assert "not counted as yours" in capsys.readouterr().out
            assert progress.load() == {}
            assert "solution shown" in CliRunner().invoke(app, ["progress"], env={"COLUMNS": "100"}).output
            assert [bool(row["shown_at"]) for row in progress.summary()] == [False, True, False, False]

    def test_the_mark_tells_where_the_record_is_lost(self):
        with classroom(source()):
            workbook.solve("1.1")
            Path(".minillm", "progress.json").unlink()
            checker.check_chapter("1")
            assert progress.load() == {}

    def test_the_same_code_without_the_mark_is_not_either(self):
        with classroom(source()) as path:
            workbook.solve("1.1")
            cell = named(path)["1-1-first"]
            fill(path, "1-1-first", "# mine!\n" + cell.partition("\n")[2].replace("  # the sum", ""))
            checker.check_chapter("1")
            assert progress.load() == {}
            fill(path, "1-1-first", MINE)
            checker.check_chapter("1")
            assert list(progress.load()) == ["1.1"]

    def test_who_writes_the_solutions_code_unseen_has_passed(self):
        with classroom(source()) as path:
            workbook.solve("1.2")
            code = named(path)["1-2-second"].partition("\n")[2].replace("second", "first")
            fill(path, "1-1-first", code)
            checker.check_chapter("1")
            assert list(progress.load()) == ["1.1"]

    def test_an_earlier_pass_stays(self):
        with classroom(source()) as path:
            fill(path, "1-1-first", MINE)
            checker.check_chapter("1")
            change = workbook.solve("1.1")
            assert change.copy.read_text(encoding="utf-8") == MINE + "\n"
            checker.check_chapter("1")
            assert list(progress.load()) == ["1.1"]

    def test_the_solutions_file_is_nobodys_pass(self):
        with classroom(source()):
            results = checker.check_chapter("1", Path("solutions", f"{STEM}.py"))
            assert {o.status for outcomes in results.values() for o in outcomes} == {"passed"}
            assert progress.load() == {}

    def test_there_and_back(self):
        with classroom(source()) as path:
            before = named(path)
            workbook.solve("1.1")
            change = workbook.reset("1.1")
            assert named(path) == before
            assert change.copy is None, "the solution is in solutions/ already"


@pytest.mark.parametrize("stem", stems())
def test_each_solution_passes_in_its_cell_alone(stem, tmp_path):
    """On the real exercises: the solved cell needs nothing from the cells of other exercises."""
    for folder in ("solutions", "tests/exercises"):
        (tmp_path / folder).mkdir(parents=True)
    for name in (f"solutions/{stem}.py", f"tests/exercises/test_{stem}.py"):
        shutil.copy(root() / name, tmp_path / name)
    with chdir(tmp_path):
        exercises.build()
        number = list(progress.exercises()[stem])[-1]
        workbook.solve(number)
        name = checker._classes(stem)[number].object_name
        outcomes = checker.run(number, checker.load_notebook(Path("exercises", f"{stem}.ipynb").absolute())[name])
        assert {o.status for o in outcomes} == {"passed"}


# ---- update ----------------------------------------------------------------------------------------------------------

CHANGES = st.fixed_dictionaries({}, optional={
    "e" + n.replace(".", "_"): st.fixed_dictionaries({}, optional={
        "statement": st.sampled_from([" Better.", " Two\n# lines."]), "stub": st.just(", new"), "hint": st.just(" Do!"),
    })
    for n in NUMBERS
})  # fmt: skip
VERSIONS = st.builds(
    lambda chosen, version, changes: source([n for n in NUMBERS if n in chosen], version, **changes),
    st.sets(st.sampled_from(list(NUMBERS)), min_size=1), st.sampled_from(["", "0"]), CHANGES,
)  # fmt: skip
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["write", "append", "own", "delete", "copy", "move", "output", "retype"]),
        st.integers(0, 99),
        st.integers(0, 99),
    ),
    max_size=8,
)
DAMAGE = st.sampled_from(["", "", "", "no ids", "no record", "positions as ids"])


def edit(book: dict, edits: list) -> list[dict]:
    """Change a notebook as people do; return the cells that hold something of the learner's."""
    cells, mine = book["cells"], []
    for n, (what, i, j) in enumerate(edits):
        at, to = i % (len(cells) or 1), j % (len(cells) or 1)
        if what == "own" or not cells:
            cell = {"cell_type": "code", "id": f"own{n}", "metadata": {}, "source": [f"x = {n}"], "outputs": []}
            cells.insert(at, cell | {"execution_count": 3})
            mine.append(cells[at])
        elif what in ("write", "append", "retype"):
            cells[at]["source"] = (cells[at]["source"] if what == "append" else []) + [f"\n# mine {n} «é»\n", "y"]
            cells[at]["cell_type"] = "raw" if what == "retype" else cells[at]["cell_type"]
            mine.append(cells[at])
        elif what == "delete":
            gone = cells.pop(at)
            mine = [cell for cell in mine if cell is not gone]
        elif what == "copy":
            cells.insert(to, copy.deepcopy(cells[at]))
            mine += [cells[to]] if any(cells[at + (to <= at)] is cell for cell in mine) else []
        elif what == "move":
            cells.insert(to, cells.pop(at))
        elif cells[at]["cell_type"] == "code":
            cells[at].update(outputs=[{"output_type": "stream", "name": "stdout", "text": ["hi"]}], execution_count=n)
    return [cell for cell in cells if any(cell is other for other in mine)]


def damage(book: dict, how: str) -> None:
    if how == "no ids":
        book["nbformat_minor"] = 4
        for cell in book["cells"]:
            del cell["id"]
    elif how:
        del book["metadata"]["minillm"]["cells"]
    if how == "positions as ids":
        for i, cell in enumerate(book["cells"]):
            cell["id"] = f"{STEM}-{i:02d}"


def without_id(cell: dict) -> dict:
    return {k: v for k, v in cell.items() if k != "id"}


@settings(max_examples=100)
@given(VERSIONS, VERSIONS, EDITS, DAMAGE)
@example(source(["1.1"]), source(["1.w1", "1.1"], "0", e1_1={"stub": ", new"}), [("write", 3, 0)], "")
def test_update_loses_nothing(old, new, edits, how):
    """Every cell in which somebody wrote is there afterwards, unchanged, in the same order; twice is as once."""
    with classroom(old) as path:
        book = load(path)
        mine = copy.deepcopy(edit(book, edits))
        damage(book, how)
        save(path, book)
        revise(new)
        changes, problems = workbook.update()
        assert (len(changes), problems) == (1, [])
        after = load(path)
        left = iter([without_id(cell) for cell in after["cells"]])
        for cell in mine:
            assert without_id(cell) in left, "kept, and in order"
        assert after["metadata"]["kernelspec"] == book["metadata"]["kernelspec"]
        before = path.read_bytes()
        assert not any(workbook.update()[0])
        assert path.read_bytes() == before


@settings(max_examples=60)
@given(VERSIONS, VERSIONS, st.sets(st.integers(0, 99), max_size=4), st.sets(st.integers(0, 99), max_size=2))
def test_update_brings_all_that_is_new(old, new, written, deleted):
    """What nobody wrote in is as the generator writes it now, in its order; what somebody deleted stays out."""
    with classroom(old) as path:
        book = load(path)
        for i in written:
            book["cells"][i % len(book["cells"])]["source"] = ["mine"]
        gone = {book["cells"][i % len(book["cells"])]["id"] for i in deleted}
        book["cells"] = [cell for cell in book["cells"] if cell["id"] not in gone]
        filled = {cell["id"] for cell in book["cells"] if cell["source"] == ["mine"]}
        had = set(book["metadata"]["minillm"]["cells"])
        save(path, book)
        revise(new)
        workbook.update("1")
        nbformat.validate(load(path))
        fresh = {cell["id"]: text_of(cell) for cell in json.loads(exercises.render(new, STEM))["cells"]}
        found = named(path)
        wanted = {name: "mine" if name in filled else text for name, text in fresh.items() if name not in gone}
        assert {name: text for name, text in found.items() if name in fresh} == wanted
        assert {name for name in found if name not in fresh} <= had
        kept = {name for name in found if name not in fresh and name not in filled}
        at_work = {tuple(name.split("-")[:2]) for name in filled}
        lost = {name for name in had - set(fresh) - gone - filled if tuple(name.split("-")[:2]) in at_work}
        assert kept == lost, "what is no more stays where somebody wrote, and goes elsewhere"
        if not written and not deleted:
            assert list(found) == list(fresh)
            assert not exercises._edited(path)


@settings(max_examples=40)
@given(VERSIONS, EDITS, DAMAGE, st.sampled_from(["reset", "solve"]))
def test_reset_and_solve_change_one_cell(text, edits, how, command):
    with classroom(text) as path:
        number = next(iter(progress.exercises()[STEM]))
        name = f"{number.replace('.', '-')}-{NUMBERS[number]}"
        book = load(path)
        mine = copy.deepcopy(edit(book, edits))
        damage(book, how)
        save(path, book)
        before = load(path)["cells"]
        change = getattr(workbook, command)(number)
        after = load(path)["cells"]
        changed = [cell for cell in before if cell not in after]
        assert len(changed) <= 1
        assert len([cell for cell in after if cell not in before]) <= 1
        assert len(after) == len(before) + bool(change.added)
        assert sum(text_of(cell) in exercises.render(text, STEM) for cell in changed) == 0 or not change.copy
        for cell in changed:
            if without_id(cell) in [without_id(one) for one in mine]:
                assert change.copy.read_text(encoding="utf-8") == text_of(cell) + "\n"
        if not how:
            texts = [text_of(cell) for cell in after if cell.get("id") == name]
            assert any("raise NotImpl" in one if command == "reset" else "# Solution" in one for one in texts)


@pytest.mark.parametrize("stem", stems())
def test_update_on_the_real_exercises(stem, tmp_path):
    """Every other stub filled; then each statement is revised and an exercise comes in front."""
    text = (root() / "solutions" / f"{stem}.py").read_text(encoding="utf-8")
    solved = exercises.solution_cells(text, stem)
    book = json.loads(exercises.render(text, stem))
    mine = []
    for name in list(solved)[::2]:
        cell = next(cell for cell in book["cells"] if cell["id"] == name)
        cell["source"] = [solved[name], "\n# mine"]
        mine.append(cell)
    first = text.index("# %% [markdown]\n# ## Exercise")
    warm = EXERCISE.format(number=f"{int(stem[:2])}.w9", name="warm", statement="", stub="", hint="")
    revised = text[:first] + warm.lstrip() + "\n" + text[first:].replace("<summary>Hint", "<summary>Hint ")
    revised = revised.replace("<summary>Hint  ", "<summary>Hint ").replace("# | Goal |", "# | The goal |")
    with chdir(tmp_path):
        for folder in ("solutions", "tests/exercises", "exercises"):
            Path(folder).mkdir(parents=True)
        Path("solutions", f"{stem}.py").write_text(revised, encoding="utf-8")
        path = Path("exercises", f"{stem}.ipynb")
        save(path, book)
        (change,), problems = workbook.update(stem)
        assert not problems
        assert len(change.changed) == text.count("# | Goal |")
        assert workbook.exercises_of(change.added) == f"{int(stem[:2])}.w9"
        after = load(path)["cells"]
        assert [cell for cell in after if cell in mine] == mine
        assert [c["id"] for c in after] == [c["id"] for c in json.loads(exercises.render(revised, stem))["cells"]]


def git(*arguments: str) -> None:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    subprocess.run(command, check=True, capture_output=True)


def test_a_notebook_from_before_cells_were_recorded():
    """git tells what was generated; what a learner committed is theirs all the same."""
    if not shutil.which("git"):
        pytest.skip("no git")
    with classroom(source(["1.1", "1.2"])) as path:
        book = load(path)
        damage(book, "positions as ids")
        save(path, book)
        git("init", "-q")
        git("add", ".")
        git("commit", "-qm", "as generated")
        at = next(i for i, cell in enumerate(book["cells"]) if "def first" in text_of(cell))
        book["cells"][at]["source"] = [MINE]
        save(path, book)
        git("commit", "-qam", "mine")
        revise(source(["1.w1", "1.1", "1.2"], "0", e1_1={"stub": ", new", "hint": " Do!"}, e1_2={"stub": ", new"}))
        (change,), _ = workbook.update()
        assert change.changed == ["start-text", "start-code", "1-1-hint-1", "1-2-second"]
        assert change.added[0] == "1-w1-card"
        fresh = {cell["id"]: text_of(cell) for cell in workbook._new(STEM).values()}
        assert named(path) == {**fresh, "1-1-first": MINE}
        assert not any(workbook.update()[0])


# ---- what goes wrong -------------------------------------------------------------------------------------------------

COMMANDS = [["reset", "1.1"], ["solve", "1.1"], ["update"]]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
class TestErrors:
    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "{}", '{"cells": 3}', '{"cells": [{}], "metadata": {}, "nbformat": 4}',
                 '{"cells": [], "metadata": [], "nbformat": 4}', '{"cells": [], "metadata": {}, "nbformat": 3}']
    )  # fmt: skip
    def test_damaged(self, command, text):
        with classroom(source()) as path:
            path.write_text(text)
            result = CliRunner().invoke(app, ["exercises", *command])
            assert result.exit_code == 1
            assert f"{path.name}: not a notebook any more" in result.output.replace("\n", "")
            assert path.read_text() == text

    def test_missing(self, command):
        with classroom(source()) as path:
            path.unlink()
            result = CliRunner().invoke(app, ["exercises", *command])
            assert path.is_file() == (command == ["update"])
            assert "minillm exercises build" in result.output or command == ["update"]

    def test_saved_meanwhile(self, command, monkeypatch):
        """By JupyterLab, between our reading and our writing."""
        with classroom(source()) as path:
            fill(path, "1-1-first", MINE)
            revise(source(version="0"))
            taken = path.read_bytes()
            dumps = json.dumps

            def meanwhile(*args, **kwargs):
                if "indent" in kwargs and "cells" in args[0] and Path("ready").exists():
                    path.write_bytes(taken + b" ")
                return dumps(*args, **kwargs)

            names = workbook._names
            monkeypatch.setattr(workbook, "_names", lambda *a: (Path("ready").touch(), names(*a))[1])
            monkeypatch.setattr(workbook.json, "dumps", meanwhile)
            result = CliRunner().invoke(app, ["exercises", *command])
            assert result.exit_code == 1
            assert "was saved by another program" in result.output
            assert path.read_bytes() == taken + b" "

    def test_a_full_disk_leaves_the_old_one(self, command, monkeypatch):
        with classroom(source()) as path:
            fill(path, "1-1-first", MINE)
            revise(source(version="0"))
            before = path.read_bytes()

            def full(self, target):
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(Path, "replace", full)
            assert CliRunner().invoke(app, ["exercises", *command]).exit_code == 1
            assert path.read_bytes() == before
            assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("number", "said"),
    [("1.9", "expected one of 1.w1, 1.1, 1.2, 1.3, got '1.9'"), ("1", "expected one of 1.w1, 1.1"),
     ("9.1", "chapter: expected one of 01"), ("x", "chapter: expected one of 01"), ("", "chapter: expected one of 01")],
)  # fmt: skip
def test_unknown_numbers(number, said):
    with classroom(source()):
        for command in ("reset", "solve"):
            result = CliRunner().invoke(app, ["exercises", command, number])
            assert result.exit_code == 1
            assert said in result.output


def test_one_damaged_notebook_does_not_hold_up_the_others():
    with classroom(source()) as path:
        Path("solutions", "02_more.py").write_text(source(["1.1"]))
        exercises.build()
        path.write_text("{")
        Path("solutions", "02_more.py").write_text(source(["1.1"], "0"))
        result = CliRunner().invoke(app, ["exercises", "update"])
        assert result.exit_code == 1
        assert "02_more.ipynb: 2 new text, in the start" in result.output
        assert "Reload Notebook from Disk" in result.output


def test_a_copy_of_a_cell_is_the_learners():
    with classroom(source()) as path:
        book = load(path)
        at = next(i for i, cell in enumerate(book["cells"]) if cell["id"] == "1-1-first")
        book["cells"].append(copied := copy.deepcopy(book["cells"][at]))
        save(path, book)
        revise(source(e1_1={"stub": ", new"}))
        workbook.update()
        cells = load(path)["cells"]
        assert ", new" in text_of(cells[at])
        assert cells[-1] == copied


def test_what_update_tells():
    with classroom(source(["1.1", "1.2"])) as path:
        fill(path, "1-1-first", MINE)
        revise(source(["1.w1", "1.1"], e1_1={"stub": ", new", "hint": " Do!"}))
        said = CliRunner().invoke(app, ["exercises", "update"]).output
        assert f"{STEM}.ipynb: 1 new text, in 1.1" in said
        assert "5 added, in 1.w1" in said
        assert "5 removed, in 1.2" in said
        assert "you filled what is another text now, and it stays: 1.1" in said
        assert "nothing to update" in CliRunner().invoke(app, ["exercises", "update"]).output


def test_a_notebook_that_jupyter_saved():
    """Its library writes other whitespace, more metadata, and outputs; nothing of that is taken for work."""
    with classroom(source()) as path:
        book = nbformat.read(path, as_version=4)
        for cell in book.cells:
            if cell.cell_type == "code":
                cell.update(execution_count=1, outputs=[nbformat.v4.new_output("stream", text="… not written yet")])
                cell.metadata["execution"] = {"iopub.status.idle": "2026-01-01"}
        book.metadata.language_info["version"] = "3.12.3"
        nbformat.write(book, path)
        revise(source(version="0", e1_1={"stub": ", new"}))
        (change,), _ = workbook.update()
        assert change.changed == ["start-text", "start-code", "1-1-first"]
        cells = {cell["id"]: cell for cell in load(path)["cells"]}
        assert cells["1-1-first"]["outputs"] == [], "of what is no longer there"
        assert cells["1-2-second"]["outputs"]
        assert load(path)["metadata"]["language_info"]["version"] == "3.12.3"


def test_a_link_stays_a_link():
    with classroom(source()) as path:
        target = Path("elsewhere.ipynb")
        os.rename(path, target)
        path.symlink_to(target.absolute())
        workbook.solve("1.1")
        assert path.is_symlink()
        assert "# Solution" in target.read_text()
