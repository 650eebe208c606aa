"""`check("2.3", fn)`: one line a contract, and on a failure what was expected, what came, and where.

The same classes run in three places: here (notebooks), in `minillm check 02` (on the files in exercises/), and under
pytest.
"""

import importlib.util
import io
import json
import linecache
import reprlib
import signal
import sys
import threading
import traceback
import types
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import progress
from .paths import root, stem_of
from .testing import ContractError

__all__ = ["Outcome", "check", "check_chapter", "load_notebook", "run"]

TIME_LIMIT = 10.0  # seconds a contract; a check takes milliseconds, so this is an endless loop
OUTPUT_LIMIT = 10_000  # characters a contract
PROBLEMS = "__problems__"  # key of a loaded notebook's namespace
SHOWN_LINES = 20  # of what the code printed, with a failure
_loading = False  # true while a notebook or a solutions file is loaded: its own check() cells stay silent


class TimeLimit(BaseException):
    """The implementation ran too long. Not an Exception, so that a learner's `except Exception` does not swallow it."""


class OutputLimit(BaseException):
    """The implementation printed too much."""


@dataclass(frozen=True)
class Outcome:
    """One contract of one exercise: `status` is "passed", "failed", "missing" (the stub) or "broken" (the check
    itself crashed).
    """

    contract: str
    status: str
    message: str = ""


def check(number: str, impl: Any) -> bool:
    """Check `impl` against the contracts of exercise `number`; print the result, remember a pass, return whether all
    hold.

    Raises ValueError for a number that no exercise has.
    """
    if _loading:
        return False
    outcomes = run(number, impl)
    passed = all(o.status == "passed" for o in outcomes)
    print(report(number, outcomes))
    if passed:
        progress.remember(number, len(outcomes))
    return passed


def report(number: str, outcomes: list[Outcome]) -> str:
    """The outcomes of one exercise as text: a verdict, then a line a contract, the first failure explained."""
    if any(o.status == "missing" for o in outcomes):
        return f"… {number}: not written yet. Replace the line `raise NotImplementedError` above and run both cells."
    good = sum(o.status == "passed" for o in outcomes)
    lines = [f"{'✓' if good == len(outcomes) else '✗'} {number}: {good} of {len(outcomes)} contracts hold"]
    explained = False
    for o in outcomes:
        lines.append(f"  {'✓' if o.status == 'passed' else '✗'} {o.contract}")
        if o.status != "passed" and not explained:
            lines += [f"      {line}" for line in o.message.splitlines()]
            explained = True
    return "\n".join(lines)


def run(number: str, impl: Any) -> list[Outcome]:
    """Run every contract of exercise `number` against `impl`, each with a time limit and its output caught."""
    if not isinstance(number, str):
        raise ValueError(f'number: expected text such as "{number}", in quotes, got {number!r}')
    cls = _classes(stem_of(number)).get(number)
    if cls is None:
        raise ValueError(f"number: expected one of {', '.join(_classes(stem_of(number)))}, got {number!r}")
    outcomes = []
    for name in [n for n in vars(cls) if n.startswith("test_")]:
        outcomes.append(_run_one(getattr(cls(), name), impl))
        if outcomes[-1].status in ("missing", "stopped"):  # the other contracts would only make the learner wait
            break
    return outcomes


def _run_one(contract: Any, impl: Any) -> Outcome:
    text = " ".join((contract.__doc__ or contract.__name__).split())
    printed = _Capped()
    try:
        with _limits(printed):
            contract(impl)
    except NotImplementedError:
        return Outcome(text, "missing")
    except ContractError as e:
        outcome = Outcome(text, "failed", str(e))
    except TimeLimit:
        outcome = Outcome(text, "stopped", f"stopped after {TIME_LIMIT:g} s: does a loop never end?")
    except OutputLimit:
        outcome = Outcome(text, "stopped", f"stopped after {OUTPUT_LIMIT:,} characters of output: does a loop print?")
    except SystemExit:
        outcome = Outcome(text, "failed", "your code called exit(); remove that call")
    except Exception as e:
        outcome = _crash(text, e, Path(contract.__func__.__code__.co_filename))
    else:
        return Outcome(text, "passed")
    lines = printed.getvalue()[:1000].splitlines()[:SHOWN_LINES]
    said = ["your code printed:", *(f"  {line}" for line in lines)] if lines else []
    return Outcome(text, outcome.status, "\n".join([outcome.message, *said]))


def _crash(contract: str, error: Exception, check_file: Path) -> Outcome:
    """An exception that no contract asked for: say on which line of the learner's code, or that the result could not
    be used.
    """
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for i, f in enumerate(frames) if any(Path(p.filename) == check_file for p in frames[:i])]
    own = [f for f in inside if Path(f.filename) != check_file and "minillm/learn" not in Path(f.filename).as_posix()]
    said = f"{type(error).__name__}: {error}"
    if not own and isinstance(error, TypeError) and "argument" in str(error):
        return Outcome(contract, "failed", f"your object could not be called as the stub is: {said}")
    if not own:
        return Outcome(
            contract, "broken", f"what your code returned could not be used: {said}\nin the check: {frames[-1].line}"
        )
    mine = next((f for f in own if "site-packages" not in f.filename), own[0])
    given = _arguments(error, own[0])
    return Outcome(
        contract, "failed", f"your code raised {said}\nline {mine.lineno} in {mine.name}: {mine.line}{given}"
    )


def _arguments(error: Exception, called: traceback.FrameSummary) -> str:
    """What the learner's function holds under the names of its arguments: arrays as dtype and shape."""
    for frame, line in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        if (code.co_filename, code.co_name, line) == (called.filename, called.name, called.lineno):
            names = code.co_varnames[: code.co_argcount]
            return "\nwith " + ", ".join(f"{n} = {_describe(frame.f_locals.get(n))}" for n in names) if names else ""
    return ""


def _describe(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return reprlib.repr(value)


class _Capped(io.StringIO):
    def write(self, text: str) -> int:
        if self.tell() + len(text) > OUTPUT_LIMIT:
            raise OutputLimit
        return super().write(text)


@contextmanager
def _limits(out: io.StringIO) -> Iterator[None]:
    """Stop what runs longer than TIME_LIMIT; what it prints goes to `out`.

    Unix's interval timer also interrupts `sleep`; elsewhere, and outside the main thread, Python's own asynchronous
    exception serves.
    """
    with redirect_stdout(out), redirect_stderr(out):
        if hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread():

            def stop(*_: Any) -> None:
                raise TimeLimit

            before = signal.signal(signal.SIGALRM, stop)
            signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT, 0.5)  # again and again, should a bare `except` swallow it
            try:
                yield
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
        else:
            with _thread_timer():
                yield


@contextmanager
def _thread_timer() -> Iterator[None]:
    import ctypes

    target = ctypes.c_long(threading.get_ident())
    timer = threading.Timer(
        TIME_LIMIT, lambda: ctypes.pythonapi.PyThreadState_SetAsyncExc(target, ctypes.py_object(TimeLimit))
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _classes(stem: str) -> dict[str, type]:
    """Exercise number -> its class of contracts, read afresh from the check file."""
    module = load_module(root() / "tests" / "exercises" / f"test_{stem}.py")
    return {c.number: c for c in vars(module).values() if isinstance(c, type) and hasattr(c, "number")}


def load_module(path: Path) -> types.ModuleType:
    """Import a Python file by path, under a name of its own. The `check(...)` calls of a solutions file stay silent."""
    global _loading
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: this file of the curriculum is missing; `git status` tells what was moved or deleted"
        )
    spec = importlib.util.spec_from_file_location(f"_minillm_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    before, _loading = _loading, True
    try:
        spec.loader.exec_module(module)
    finally:
        _loading = before
    return module


def load_notebook(path: Path) -> dict[str, Any]:
    """Run a notebook's code cells in order and return what they define; a cell that fails is passed over.

    What went wrong is under the key PROBLEMS: a list of messages. Raises ValueError for a file that is no notebook.
    """
    global _loading
    problems: list[str] = []
    namespace: dict[str, Any] = {"__name__": "__main__", PROBLEMS: problems}
    _loading = True
    try:
        for number, source in enumerate(_code_cells(path), 1):
            # Numbered, as cells may begin alike, and Triton reads a kernel's source back by this name.
            name = f"<{path.name}, code cell {number}: {source.strip().splitlines()[0][:50]}>"
            linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
            try:
                with _limits(_Capped()):
                    exec(compile(source, name, "exec"), namespace)
            except NotImplementedError:
                pass
            except SyntaxError as e:
                problems.append(f"cannot be read: {e.msg}, in line {e.lineno} of its cell: {(e.text or '').strip()}")
            except (TimeLimit, OutputLimit):
                problems.append(
                    f"the cell that begins `{source.strip().splitlines()[0]}` was stopped: an endless loop?"
                )
            except (Exception, SystemExit) as e:
                problems.append(
                    f"the cell that begins `{source.strip().splitlines()[0]}` raised {type(e).__name__}: {e}"
                )
    finally:
        _loading = False
    return namespace


def _code_cells(path: Path) -> list[str]:
    """The code cells of a notebook, without empty ones and those that are for Jupyter alone (%, !)."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(
            f"{path}: not a notebook any more ({e}); `git checkout -- {path.name}` in its folder brings the stubs back,"
            " and loses what you wrote"
        ) from e
    return [source for source in sources if source.strip() and not source.lstrip().startswith(("%", "!"))]


def check_chapter(chapter: str, source: Path | None = None) -> dict[str, list[Outcome]]:
    """Check every exercise of a chapter in the learner's notebook (or another .ipynb or .py file): number -> outcomes.

    Remembers what passes. Raises ValueError for an unknown chapter, FileNotFoundError for a missing file.
    """
    stem = stem_of(chapter)
    source = source or root() / "exercises" / f"{stem}.ipynb"
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file; `minillm exercises build` writes the exercise notebooks")
    namespace = load_notebook(source) if source.suffix == ".ipynb" else vars(load_module(source))
    results = {}
    for number, cls in _classes(stem).items():
        if cls.object_name not in namespace:
            why = "\n".join([f"{source.name} defines no `{cls.object_name}`", *namespace.get(PROBLEMS, [])])
            results[number] = [Outcome(f"`{cls.object_name}` is defined", "failed", why)]
            continue
        results[number] = run(number, namespace[cls.object_name])
        if all(o.status == "passed" for o in results[number]):
            progress.remember(number, len(results[number]))
    return results
