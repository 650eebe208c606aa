"""What keeps the package readable: import order, documented names, short functions."""

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest

from minillm.learn.paths import root

# From top to bottom: a file imports only from what stands above it. README.md shows the same order.
ORDER = [
    "autograd",
    "extras",
    "config",
    "capacity",
    "files",
    "data",
    "kernels",
    "fetch",
    "model",
    "sampling",
    "evaluate",
    "cache",
    "generate",
    "quant",
    "adapters",
    "constrained",
    "engine",
    "progress",
    "llm",
    "prompting",
    "server",
    "distributed",
    "learn",
    "cli",
]
LONGEST_FUNCTION = 40
LONGEST_KERNEL = 60
FILES = sorted(p for p in (root() / "minillm").rglob("*.py"))
MODULES = [".".join(p.relative_to(root()).with_suffix("").parts).removesuffix(".__init__") for p in FILES]


def _unit(path: Path) -> str:
    return path.relative_to(root() / "minillm").with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """The units of minillm that a file imports."""
    package = path.relative_to(root()).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names = [".".join([*base, a.name]) for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("minillm.")}
    return found


@pytest.mark.parametrize(
    "path", [f for f in FILES if _unit(f) not in ("__init__", "__main__")], ids=lambda p: _unit(p) + "/" + p.stem
)
def test_imports_only_what_stands_above(path):
    unit = _unit(path)
    for other in imports(path) - {unit, "__version__", "LLM", "SamplingParams"}:
        assert ORDER.index(other) < ORDER.index(unit), f"{unit} imports {other}, which stands below it"


def test_autograd_needs_numpy_alone():
    allowed = sys.stdlib_module_names | {"numpy"}
    for path in (root() / "minillm" / "autograd").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert {a.name.split(".")[0] for a in node.names} <= allowed, path.name
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.split(".")[0] in allowed, path.name


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_documented(module):
    """`__all__` is what is public; each function, class and public method in it says what it does."""
    loaded = importlib.import_module(module)
    assert loaded.__doc__, f"{module} has no docstring"
    if module.rpartition(".")[2] in ("cli",) or not hasattr(loaded, "__all__"):
        return
    for name in loaded.__all__:
        value = getattr(loaded, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert inspect.getdoc(value), f"{module}.{name}"
        if inspect.isclass(value):
            for n in [n for n, m in vars(value).items() if inspect.isfunction(m) and not n.startswith("_")]:
                assert inspect.getdoc(getattr(value, n)) or n == "forward", f"{module}.{name}.{n}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_module_with_public_names_says_which(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    public = [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    declared = any(isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__" for n in tree.body)
    assert declared or not public, f"{path}: declares no __all__"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_functions_are_short(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            kernel = any("jit" in ast.unparse(d) for d in node.decorator_list)
            docstring = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
            length = node.end_lineno - node.lineno + 1 - docstring
            assert length <= (LONGEST_KERNEL if kernel else LONGEST_FUNCTION), (
                f"{path.name}: {node.name} has {length} lines"
            )


@pytest.mark.parametrize("path", sorted((root() / "minillm" / "kernels").glob("*.py")), ids=lambda p: p.stem)
def test_kernels_files_are_typed_but_for_kernels(path):
    """mypy is told to accept untyped functions there, as kernels are; all others have types, here as elsewhere."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and not any("jit" in ast.unparse(d) for d in node.decorator_list):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            arguments += [a for a in (node.args.vararg, node.args.kwarg) if a]
            untyped = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            untyped += [] if node.returns else ["->"]
            assert not untyped, f"{path.name}:{node.lineno}: {node.name}: {untyped}"


def test_every_ignored_type_error_says_which_and_why():
    """`# type: ignore[code]  # why`"""
    for path in FILES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(r"#\s*(type: ?ignore|mypy:)", line):
                assert re.search(r"# type: ignore\[[a-z, -]+\]  # \w+", line), f"{path.name}:{number}: {line.strip()}"


def test_nothing_unpickles():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            unpickles = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"} & set(names)
            assert not unpickles, f"{path.name} imports {unpickles}"
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                assert "load" not in names, path.name
            if isinstance(node, ast.Attribute) and node.attr == "load":
                assert ast.unparse(node) != "torch.load", path.name
            assert not (isinstance(node, ast.keyword) and node.arg == "allow_pickle"), path.name
