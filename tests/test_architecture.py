"""ARCHITECTURE.md points at what is there: each file, each name in its file, and the order of imports."""

import ast
import re

import pytest

from minillm.learn.paths import root

from .test_gates import FILES, ORDER, _unit

PATH = root() / "ARCHITECTURE.md"
TEXT = PATH.read_text(encoding="utf-8")
LINKS = re.findall(r"\[([^\]]+)\]\(([^)]+)\)", TEXT)
NODES = re.findall(r'"([\w.]+)<br/>([\w/]+\.py)"', TEXT)  # of the picture
NAMES = sorted({(text.strip("`"), path) for text, path in LINKS if text.startswith("`")})
NAMES += sorted({(name, f"minillm/{path}") for name, path in NODES})


def defines(path: str, name: str) -> bool:
    """Whether a file has a function, class, constant or method, or a class sets an attribute, of this name."""
    tree = ast.parse((root() / path).read_text(encoding="utf-8"))
    owner, _, attribute = name.partition(".")
    for node in tree.body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        found = {getattr(node, "name", ""), *(getattr(t, "id", "") for t in targets)}
        if owner in found and (not attribute or attribute in _attributes(node)):
            return True
    return False


def _attributes(node: ast.AST) -> set[str]:
    fields = {n.target.id for n in getattr(node, "body", []) if isinstance(n, ast.AnnAssign)}
    plain = {t.id for n in getattr(node, "body", []) if isinstance(n, ast.Assign) for t in n.targets}
    methods = {n.name for n in getattr(node, "body", []) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    own = {
        n.attr for n in ast.walk(node)
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and ast.unparse(n.value) == "self"
    }  # fmt: skip
    return fields | plain | methods | own


@pytest.mark.parametrize("target", sorted({path for _, path in LINKS}))
def test_each_link_leads_somewhere(target):
    assert (root() / target.partition("#")[0]).exists()


@pytest.mark.parametrize(("name", "path"), NAMES, ids=lambda x: x.rpartition("/")[2])
def test_each_name_is_defined_where_it_points(name, path):
    assert defines(path, name), f"{path} defines no {name}"


def test_no_name_stands_without_its_file():
    """What is not a link cannot be followed, nor be checked: only files' names stand so, such as `config.json`."""
    outside = re.sub(r"```.*?```|\[[^\]]+\]\([^)]+\)", "", TEXT, flags=re.DOTALL)
    assert set(re.findall(r"`([^`]+)`", outside)) <= {"config.json"}
    pictured = re.findall(r"[\w/]+\.py", re.search(r"```mermaid.*?```", TEXT, re.DOTALL).group())
    assert len(NODES) == len(pictured) >= 10, "a node of the picture: name<br/>file"


def test_every_file_is_named():
    """A file of the package that no link leads to has been forgotten."""
    named = {path for _, path in LINKS}
    apart = {"autograd", "learn", "__init__", "__main__"}  # named as folders
    parts = {p.relative_to(root()).as_posix() for p in FILES if _unit(p) not in apart and p.stem != "__init__"}
    # Read by the tokenizers alone; an older name of `minillm/fetch.py`.
    assert parts - named <= {"minillm/model/tokenizer_files.py", "minillm/model/fetch.py"}


@pytest.mark.parametrize("document", ["ARCHITECTURE.md", "README.md"])
def test_the_order_of_imports(document):
    here = {_unit(p) for p in FILES}
    order = [unit for unit in ORDER if unit in here]
    text = (root() / document).read_text(encoding="utf-8").replace("`", "")
    assert ", ".join(order) in text, f"{document}: expected {', '.join(order)}"


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "AGENTS.md"])
def test_it_is_found(document):
    assert "](ARCHITECTURE.md" in (root() / document).read_text(encoding="utf-8")


def test_it_fits_on_two_screens():
    assert len(TEXT.splitlines()) <= 120


def test_what_is_checked_can_fail():
    assert defines("minillm/engine/batch.py", "DeviceTable.matrix")
    assert not defines("minillm/engine/batch.py", "DeviceTable.nothing")
    assert not defines("minillm/engine/batch.py", "Nothing")


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "AGENTS.md"])
def test_what_make_is_asked_for_is_in_the_makefile(document):
    asked = set(re.findall(r"(?:`|^)make ([a-z-]+)", (root() / document).read_text(encoding="utf-8"), re.MULTILINE))
    assert asked
    assert asked <= set(re.findall(r"^([a-z-]+):", (root() / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
