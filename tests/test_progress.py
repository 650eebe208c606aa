"""The progress bar draws, and says nothing about what is not installed."""

import json
import subprocess
import sys

import pytest

from minillm.progress import progress_bar

CELL = (
    "from minillm.progress import progress_bar\nwith progress_bar(3, 'generate', 'prompt') as bar:\n    bar.update(3)"
)


def test_bar(capsys):
    with progress_bar(2, "generate", "prompt") as bar:
        bar.update()
        bar.update(1)
    assert "generate: 100%" in capsys.readouterr().err


def test_disabled(capsys):
    with progress_bar(2, disable=True) as bar:
        bar.update()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("hide", [True, False])
def test_no_warning_in_a_notebook(tmp_path, hide):
    """Whether ipywidgets is there or not; in a process of its own, as the kernel's settings stay in a process."""
    before = 'import sys; sys.modules["ipywidgets"] = None\n' if hide else ""
    code = [
        "import sys, json, nbclient, nbformat",
        f"cell = nbformat.v4.new_code_cell({before + CELL!r})",
        "book = nbformat.v4.new_notebook(cells=[cell])",
        "nbclient.NotebookClient(book, timeout=60, kernel_name='python3').execute()",
        "print(json.dumps(cell.outputs))",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    outputs = json.loads(done.stdout.splitlines()[-1])
    assert "Warning" not in json.dumps(outputs)
    if hide:
        assert "generate: 100%" in "".join(o.get("text", "") for o in outputs)
