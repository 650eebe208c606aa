"""Labs are committed as executed, in order, with outputs, something compared, and within their budget."""

import ast
import json
import re

import pytest

from minillm.learn.curriculum import is_draft
from minillm.learn.paths import root, stems

DRAFT = pytest.mark.skip(reason="the chapter is a draft, by its first line")
LABS = [
    pytest.param(root() / "notebooks" / f"{stem}.ipynb", marks=DRAFT if is_draft(stem) else (), id=stem)
    for stem in stems()
]
CELLS = range(30, 61)


def _cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def _code(path):
    return [cell for cell in _cells(path) if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]


@pytest.mark.parametrize("path", LABS)
class TestLab:
    def test_cells_within_budget(self, path):
        assert len(_cells(path)) in CELLS

    def test_executed_in_order(self, path):
        counts = [cell["execution_count"] for cell in _code(path)]
        assert counts == list(range(1, len(counts) + 1)), "run `python -m minillm.learn.labs` on it"

    def test_outputs_are_there_and_none_is_an_error(self, path):
        code = _code(path)
        assert sum(bool(cell["outputs"]) for cell in code) >= len(code) // 3
        for cell in code:
            tagged = "raises-exception" in cell["metadata"].get("tags", [])
            assert tagged or all(o["output_type"] != "error" for o in cell["outputs"])

    def test_plots_are_stored(self, path):
        shown = [o.get("data", {}) for cell in _code(path) for o in cell["outputs"]]
        images = [d for d in shown if "image/png" in d or "<img " in "".join(d.get("text/html", ""))]
        assert len(images) >= 3

    def test_pictures_have_words(self, path):
        """`show(figure, alt=...)`, and nothing that JupyterLab shows by itself."""
        for cell in _code(path):
            for data in [o.get("data", {}) for o in cell["outputs"]]:
                assert not [kind for kind in data if kind.startswith("image/")], "".join(cell["source"])[:200]
                for tag in re.findall(r"<img [^>]*>", "".join(data.get("text/html", ""))):
                    assert len(re.findall(r'alt="([^"]*)"', tag)[0].split()) >= 3

    def test_asks_before_it_answers(self, path):
        sources = ["".join(cell["source"]) for cell in _code(path)]
        asked = re.findall(r'^ *predict\(\s*"(\d+\.[a-z])"', "\n".join(sources), re.MULTILINE)
        shown = re.findall(r'^ *reveal\(\s*"(\d+\.[a-z])"', "\n".join(sources), re.MULTILINE)
        assert 3 <= len(asked) <= 7
        assert sorted(asked) == sorted(set(shown))
        guesses = [s for s in sources if "predict(" in s and not re.search(r"guess=None|^(?!.*guess=)", s, re.DOTALL)]
        assert not guesses, "committed with guess=None"

    def test_outputs_are_compared(self, path):
        tagged = [cell for cell in _code(path) if "nbval-check-output" in cell["metadata"].get("tags", [])]
        assert len(tagged) >= 5
        assert all(cell["outputs"] for cell in tagged), "a compared cell without output compares nothing"

    def test_no_installation_no_shell_no_absolute_path(self, path):
        for cell in _code(path):
            source = "".join(cell["source"])
            assert not re.search(r"^\s*[%!]", source, re.MULTILINE)
            strings = [
                n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant) and isinstance(n.value, str)
            ]
            assert not [s for s in strings if re.match(r"(/[A-Za-z]+/|[A-Z]:\\|~/)", s)]

    def test_outputs_name_no_folder_of_this_machine(self, path):
        shown = json.dumps([cell["outputs"] for cell in _code(path)])
        shown = re.sub(r'"image/[a-z+]+": "[^"]*"', "", shown)
        assert not re.search(r"site-packages|\.venv|/home/|/Users/|/tmp/", shown)
        assert str(root()) not in shown

    def test_kernel_and_links(self, path):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        assert notebook["metadata"]["kernelspec"]["name"] == "python3"
        text = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
        targets = [t for t in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in t]
        assert f"../chapters/{path.stem}.md" in targets
        assert f"../exercises/{path.stem}.ipynb" in targets or f"{path.stem}.ipynb" in " ".join(targets)
        for target in targets:
            assert (path.parent / target).exists(), target
