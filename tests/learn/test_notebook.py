"""Cells run outside of Jupyter as in it."""

import json
import os

import pytest

pytest.importorskip("IPython")
from minillm.learn.checker import PROBLEMS, load_notebook


@pytest.fixture
def load(tmp_path):
    def run(*cells: str) -> dict:
        path = tmp_path / "n.ipynb"
        path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": cell} for cell in cells]}))
        return load_notebook(path)

    return run


@pytest.mark.parametrize(
    "cell",
    [
        "x = 5",
        "%%time\nx = 5",
        "%%capture\nx = 5\nprint(x)",
        "%%capture --no-stderr\nx = 5",
        "%%prun -s cumulative -q\nx = 5",
        "%%time\n%matplotlib inline\nx = 5\nlen?",
        "\n\n%%time\nx = 5",
        "%time x = 5",
        "x = 5\n%timeit x + 1",
        "!ls\nx = 5\n!echo {x}",
        "%pip install nothing\nx = 5",
        "%load_ext autoreload\n%autoreload 2\nx = 5",
        "x = 5\nlen?",
        "x = 5\nlen??",
        "?len\nx = 5",
        "files = !ls\nx = 5 + len(files)",
        "import asyncio\nawait asyncio.sleep(0)\nx = 5",
        "async def f(): return 5\nx = await f()",
        "%%time\nimport asyncio\nx = await asyncio.sleep(0, 5)",
        "async def numbers():\n    yield 5\nasync for x in numbers(): pass",
        ">>> x = 5",
        "  x = 5",
        "x = 5; x;",
        "display(5); x = 5",
        "get_ipython().run_line_magic('matplotlib', 'inline'); x = 5",
        "%unknown_magic\nx = 5",
        "if True:\n    %time x = 5",
        "x = 5 % 7",
        'text = """\n%time\n!ls\n"""; x = 5',
        "%env MINE=5\nimport os; x = int(os.environ['MINE'])",
    ],
)
def test_as_in_jupyter(load, cell, monkeypatch):
    monkeypatch.setenv("MINE", "0")
    names = load(cell)
    assert names[PROBLEMS] == []
    assert names["x"] == 5


def test_what_jupyter_does_not_keep_either(load):
    names = load("%%timeit\nx = 5", "%%bash\nx=5", "%%html\n<b>x = 5</b>", "%%writefile f.py\nx = 5", "%%nosuch\nx = 5")
    assert names[PROBLEMS] == []
    assert "x" not in names


def test_nothing_goes_to_a_shell(load, tmp_path):
    load("!touch made", "%%bash\ntouch made", "%sx touch made", "y = !touch made", "!!touch made")
    assert not (tmp_path / "made").exists()


def test_errors_within_magics_are_named(load):
    names = load("%%time\n1 / 0", "%%time\ndef f(:", "x = (", "await 1", "%%capture out\nprint('said')\nx = 5")
    problems = names[PROBLEMS]
    assert "begins `%%time` raised ZeroDivisionError" in problems[0]
    assert "cannot be read" in problems[1]
    assert "cannot be read: '(' was never closed" in problems[2]
    assert "TypeError" in problems[3]
    assert len(problems) == 4
    assert names["out"].stdout == "said\n"


def test_functions_of_magic_cells_know_their_source(load):
    """Triton reads a kernel's source back."""
    import inspect

    names = load("%%time\ndef f():\n    return 1", "%%time\ndef g():\n    return 2")
    assert "return 1" in inspect.getsource(names["f"])
    assert "return 2" in inspect.getsource(names["g"])


def test_the_notebooks_folder_is_the_current_one(load, tmp_path):
    (tmp_path / "helper_of_this_test.py").write_text("value = 7\n")
    (tmp_path / "data.txt").write_text("5")
    before = os.getcwd()
    names = load("from helper_of_this_test import value", "x = open('data.txt').read()", "%run helper_of_this_test.py")
    assert (names["x"], names["value"], names[PROBLEMS]) == ("5", 7, [])
    assert os.getcwd() == before


def test_loops_and_tasks_live_across_cells(load):
    names = load(
        "import asyncio\nevent = asyncio.Event()\nasync def wait(): await event.wait(); return 5",
        "await asyncio.sleep(0)\ntask = asyncio.create_task(wait())",
        "event.set()\nx = await task",
    )
    assert names[PROBLEMS] == []
    assert names["x"] == 5
