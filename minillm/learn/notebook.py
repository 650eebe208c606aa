"""Run a notebook's cells outside of Jupyter as Jupyter would: magics, shell lines, `name?`, `await` at the top.

Magics that run Python (`%%time`, `%%capture`, `%time`, ...) run it; the others, and all that goes to a shell, are
passed over.
"""

import ast
import asyncio
import inspect
import linecache
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Session", "session"]

# Cell magics whose body is Python that leaves its names in the notebook, and the options of each that take a value.
RUNS_BODY = {"time": "", "capture": "", "prun": "lsTDm", "debug": "b", "mprun": "fTc", "lprun": "fmTDsu"}
# Line magics followed by a statement that Jupyter runs in the notebook.
RUNS_LINE = {"time": "", "prun": "lsTDm", "debug": "b"}


class Session:
    """One notebook's names, and the part of IPython's shell that transformed cells call."""

    def __init__(self, names: dict[str, Any], runner: asyncio.Runner) -> None:
        self.names, self._runner, self._name, self._bodies = names, runner, "<cell>", 0
        names.update(get_ipython=lambda: self, display=lambda *args, **kwargs: None, In=[], Out={})

    def run(self, source: str, name: str) -> None:
        """Run a cell's source under the file name `name`; errors come out as they are raised."""
        try:
            code = _compiled(source, name)
        except SyntaxError:
            source = _without_magics(source)
            code = _compiled(source, name)
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        outer, self._name = self._name, name
        try:
            result = eval(code, self.names)
            if inspect.iscoroutine(result):
                self._runner.run(result)
        finally:
            self._name = outer

    def run_line_magic(self, magic: str, line: str, *_: Any) -> None:
        """`%magic line`"""
        if magic in RUNS_LINE:
            self._run_body(_after_options(line, RUNS_LINE[magic]))
        elif magic == "run" and line.strip().endswith(".py"):
            self._run_body(Path(line.strip()).read_text(encoding="utf-8"))
        elif magic == "cd" and line.strip():
            os.chdir(Path(line.strip()).expanduser())
        elif magic in ("env", "set_env") and "=" in line:
            variable, value = line.split("=", 1)
            os.environ[variable.strip()] = value.strip()

    def run_cell_magic(self, magic: str, line: str, body: str) -> None:
        """`%%magic line`, and under it a body"""
        if magic == "capture":
            self._capture(line, body)
        elif magic in RUNS_BODY:
            self._run_body(f"{_after_options(line, RUNS_BODY[magic])}\n{body}")

    def _run_body(self, body: str) -> None:
        self._bodies += 1  # a name of its own, as for cells
        self.run(body, f"{self._name.removesuffix('>')}, body {self._bodies}>")

    def _capture(self, line: str, body: str) -> None:
        from IPython.utils.capture import capture_output

        with capture_output() as captured:
            self._run_body(body)
        words = [word for word in line.split() if not word.startswith("-")]
        if words:
            self.names[words[0]] = captured

    def system(self, _: str) -> None:
        """`!command`: not run"""

    def getoutput(self, _: str) -> list[str]:
        """`names = !command`: not run, so no lines"""
        return []

    def run_line_cell_magic(self, *_: Any) -> None:
        """Older spelling; nothing is run."""


def _compiled(source: str, name: str) -> Any:
    return compile(source, name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def _without_magics(source: str) -> str:
    """The cell as plain Python that calls `get_ipython()`; as it is where IPython is not installed."""
    try:
        from IPython.core.inputtransformer2 import TransformerManager
    except ImportError:
        return "\n".join("pass" if line.startswith(("%", "!")) else line for line in source.splitlines())
    return TransformerManager().transform_cell(source)


def _after_options(line: str, valued: str) -> str:
    """What follows `-x` and `-x value` at the beginning of a magic's line."""
    while line.lstrip().startswith("-"):
        option, _, line = line.lstrip().partition(" ")
        if len(option) == 2 and option[1] in valued:
            line = line.lstrip().partition(" ")[2]
    return line


@contextmanager
def session(folder: Path) -> Iterator[Session]:
    """A notebook's session, with the notebook's folder as the current one, as in Jupyter; plots open no window."""
    before, path = os.getcwd(), list(sys.path)
    os.environ.setdefault("MPLBACKEND", "agg")
    try:
        os.chdir(folder)
        sys.path.insert(0, str(folder.resolve()))
        with asyncio.Runner() as runner:
            yield Session({"__name__": "__main__"}, runner)
    finally:
        sys.path[:] = path
        os.chdir(before)
