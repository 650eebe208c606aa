"""What cog prints into chapters: excerpts of the code, recorded results, and where these come from. Run from the
repository's root.
"""

import ast
import json
from pathlib import Path

from .paths import root

__all__ = ["code", "provenance", "results"]


def code(path: str, *names: str, docstring: bool = False) -> str:
    """A fenced excerpt of `path`: the named functions, classes, methods ("Class.method") or constants, or the whole
    file. Of a notebook, its code cells.

    Raises ValueError for a name that the file does not define.
    """
    source = (root() / path).read_text(encoding="utf-8")
    where = f"[`{path}`](../{path})"
    if path.endswith(".ipynb"):
        cells = json.loads(source)["cells"]
        source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        where = f"[The lab](../{path})"
    tree, lines = ast.parse(source), source.splitlines()
    parts = ["\n".join(_lines(_find(tree, name, path), lines, docstring)) for name in names] or [source.strip()]
    title = where + (f": {', '.join(f'`{n}`' for n in names)}" if names else "")
    return f"\n{title}\n\n```python\n" + "\n\n".join(parts) + "\n```\n"


def _find(tree: ast.Module, name: str, path: str) -> ast.stmt:
    body: list[ast.stmt] = tree.body
    for part in name.split("."):
        found = [n for n in body if part in _defined(n)]
        if not found:
            raise ValueError(f"name: {path} defines no {name!r}")
        body = getattr(found[0], "body", [])
    return found[0]


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Assign):
        return [t.id for t in node.targets if isinstance(t, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return [getattr(node, "name", "")]


def _end(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno


def _lines(node: ast.stmt, lines: list[str], docstring: bool) -> list[str]:
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    drop: set[int] = set()
    if not docstring:
        for n in ast.walk(node):
            if not isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if ast.get_docstring(n) and len(n.body) > 1:
                drop |= set(range(n.body[0].lineno, _end(n.body[0]) + 1))
    kept = [lines[i - 1] for i in range(first, _end(node) + 1) if i not in drop]
    indent = len(kept[0]) - len(kept[0].lstrip())
    return [line[indent:] for line in kept]


CPU = "cpu-2-cores"


def results(suite: str, *devices: str) -> dict:
    """What the benchmark `suite` recorded: benchmarks/results/<device>/<suite>.json, without provenance; "cpu-2-cores"
    if no device is named. Of several devices each part is the first one's that has it.

    Raises FileNotFoundError if none has the suite.
    """
    found: dict = {}
    for record in reversed(_records(suite, devices).values()):
        found |= record["results"]
    return found


def measured_on(suite: str, *devices: str) -> str | None:
    """The first of `devices` on which `suite` is recorded."""
    return next((device for device in devices if _path(suite, device).is_file()), None)


def provenance(suite: str, *devices: str) -> str:
    """On what, with which versions and when `suite` was measured, with a link to the file: a line for each device that
    `results` of the same devices takes a part from, and which, if there are several. Raises as `results`.
    """
    loaded = _records(suite, devices)
    taken = {part: device for device in reversed(loaded) for part in loaded[device]["results"]}
    lines = []
    for device in [d for d in loaded if d in taken.values()]:
        p = loaded[device]["provenance"]
        versions = ", ".join(f"{name} {version}" for name, version in p["versions"].items())
        link = f"[recorded results](../benchmarks/results/{device}/{suite}.json)"
        parts = [part for part in loaded[device]["results"] if taken[part] == device]
        which = f" of {', '.join(parts)}" if len(set(taken.values())) > 1 else ""
        lines.append(f"*Measured {p['date']} on {p['device']}; {versions}; {link}{which}.*")
    return "\n\n".join(lines)


def _records(suite: str, devices: tuple[str, ...]) -> dict[str, dict]:
    """Of those devices that have one."""
    devices = devices or (CPU,)
    there = [device for device in devices if _path(suite, device).is_file()]
    if not there:
        path = _path(suite, devices[0]).relative_to(root())
        raise FileNotFoundError(f"{path}: not recorded yet; run the script in benchmarks/")
    return {device: json.loads(_path(suite, device).read_text(encoding="utf-8")) for device in there}


def _path(suite: str, device: str) -> Path:
    return root() / "benchmarks" / "results" / device / f"{suite}.json"
