"""`check("2.3", fn)`: one line a contract, and on a failure what was expected, what came, and where.

The same classes run in three places: here (notebooks), in `minillm check 02` (on the files in exercises/), and under
pytest.
"""

import importlib.util
import inspect
import io
import json
import linecache
import re
import reprlib
import signal
import sys
import sysconfig
import threading
import traceback
import types
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import progress, workbook
from .isolation import ChildEnded, Send, can_fork, in_child, neutral_state
from .notebook import Session, session
from .paths import root, stem_of
from .testing import NOTES, ContractError, is_stub

__all__ = ["Outcome", "check", "check_chapter", "load_notebook", "run"]

TIME_LIMIT = 10.0  # seconds a contract; a check takes milliseconds, so this is an endless loop
GRACE = 2.0  # more seconds for a child process to stop by itself before it is killed
OUTPUT_LIMIT = 10_000  # characters a contract
PROBLEMS = "__problems__"  # key of a loaded notebook's namespace
MARKS = {"passed": "✓", "skipped": "·"}
SHOWN_LINES = 20  # of what the code printed, with a failure
_LIBRARIES = [Path(__file__).parents[1], *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib"))]
_loading = False  # true while a notebook or a solutions file is loaded: its own check() cells stay silent


class TimeLimit(BaseException):
    """The implementation ran too long. Not an Exception, so that a learner's `except Exception` does not swallow it."""


class OutputLimit(BaseException):
    """The implementation printed too much."""


@dataclass(frozen=True)
class Outcome:
    """One contract of one exercise: `status` is "passed" (`message` then holds what there is to tell besides),
    "failed", "stopped" (too long, or too much output), "missing" (the stub), "broken" (the check itself crashed) or
    "skipped" (tried once the others hold).
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
    if passed and workbook.is_shown(number, _cell_of(impl)):
        print(f"  (the solution's pass, not counted as yours; `minillm exercises reset {number}` brings the stub back)")
    elif passed:
        progress.remember(number, len(outcomes))
    return passed


def _cell_of(impl: Any) -> str:
    """The text of the cell or file that a learner's function, class or kernel was written in; empty if unknown."""
    impl = inspect.unwrap(getattr(impl, "fn", impl))
    for fn in [impl, *(vars(impl).values() if isinstance(impl, type) else ())]:
        code = getattr(inspect.unwrap(getattr(fn, "__func__", fn)), "__code__", None)
        if code is not None and (lines := linecache.getlines(code.co_filename)):
            return "".join(lines)
    return ""


def is_loading() -> bool:
    """Whether a notebook or a solutions file is being loaded, so that what it would print is of no interest."""
    return _loading


def report(number: str, outcomes: list[Outcome]) -> str:
    """The outcomes of one exercise as text: a verdict, then a line a contract, the first failure explained."""
    if any(o.status == "missing" for o in outcomes):
        return f"… {number}: not written yet. Replace the line `raise NotImplementedError` above and run both cells."
    good = sum(o.status == "passed" for o in outcomes)
    lines = [f"{'✓' if good == len(outcomes) else '✗'} {number}: {good} of {len(outcomes)} contracts hold"]
    explained = False
    for o in outcomes:
        later = " (tried once the others hold)" if o.status == "skipped" else ""
        note = f": {o.message}" if o.status == "passed" and o.message else ""
        lines.append(f"  {MARKS.get(o.status, '✗')} {o.contract}{note}{later}")
        if o.status not in MARKS and not explained:
            lines += [f"      {line}" for line in o.message.splitlines()]
            explained = True
    return "\n".join(lines)


def run(number: str, impl: Any) -> list[Outcome]:
    """Run every contract of exercise `number` against `impl`, each with a time limit and its output caught; where
    that works, in a child process, so that nothing they do harms this one.
    """
    if not isinstance(number, str):
        raise ValueError(f'number: expected text such as "{number}", in quotes, got {number!r}')
    with neutral_state():  # the file of checks makes tensors, too
        classes = _classes(stem_of(number))
    cls = classes.get(number)
    if cls is None:
        raise ValueError(f"number: expected one of {', '.join(classes)}, got {number!r}")
    if not can_fork() or _uses_gpu(cls):
        return list(_outcomes(cls, impl))
    return _run_in_child(cls, impl)


def _uses_gpu(cls: type) -> bool:
    """Whether the file of a check asks for a GPU, and there is one: the driver does not survive a fork."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available() and "cuda" in inspect.getsource(sys.modules[cls.__module__])


def _contracts(cls: type) -> list[str]:
    names = [name for name in vars(cls) if name.startswith("test_")]
    return sorted(names, key=lambda name: getattr(vars(cls)[name], "last", False))  # stable


def _text(contract: Any) -> str:
    return " ".join((contract.__doc__ or contract.__name__).split())


def _outcomes(cls: type, impl: Any) -> Iterator[Outcome]:
    held = True
    for name in _contracts(cls):
        contract = getattr(cls(), name)
        if getattr(contract, "last", False) and not held:
            yield Outcome(_text(contract), "skipped")
            continue
        outcome = _run_one(contract, impl)
        held = held and outcome.status == "passed"
        yield outcome
        if outcome.status in ("missing", "stopped"):  # the other contracts would only make the learner wait
            return


def _run_in_child(cls: type, impl: Any) -> list[Outcome]:
    outcomes: list[Outcome] = []

    def job(send: Send) -> None:
        for outcome in _outcomes(cls, impl):
            send(asdict(outcome))

    try:
        outcomes += (Outcome(**message) for message in in_child(job, TIME_LIMIT + GRACE))
    except ChildEnded as e:
        contract = getattr(cls, _contracts(cls)[len(outcomes)])
        outcomes.append(Outcome(_text(contract), "stopped" if e.why == "time" else "failed", _why_ended(e)))
    return outcomes


def _why_ended(e: ChildEnded) -> str:
    """What the learner is told of a child process that ended before its time."""
    if e.why == "time":
        return f"stopped after {TIME_LIMIT:g} s: does a loop never end?"
    if e.why == "exit":
        return "your code ended the process (os._exit?); remove that call"
    said = f"your code crashed ({signal.Signals(e.number).name}): is memory outside of an array or tensor written?"
    if e.number == signal.SIGKILL:
        said = "the system killed your code (SIGKILL): does it take more memory than there is?"
    # The innermost line comes first in the trace, and Python's own files say nothing to a learner.
    frames = re.findall(r'^  File "(.*)", line (\d+) in (\S+)', e.trace, re.MULTILINE)
    own = [f for f in frames if _is_own(f[0])]
    return said + (f"\nline {own[0][1]} in {own[0][2]}" if own else "")


def _run_one(contract: Any, impl: Any) -> Outcome:
    text = _text(contract)
    printed = _Capped()
    del NOTES[:]
    try:
        with neutral_state(), _limits(printed):
            contract(impl)
    except ContractError as e:
        outcome = Outcome(text, "failed", str(e))
    except TimeLimit:
        outcome = Outcome(text, "stopped", f"stopped after {TIME_LIMIT:g} s: does a loop never end?")
    except OutputLimit:
        outcome = Outcome(text, "stopped", f"stopped after {OUTPUT_LIMIT:,} characters of output: does a loop print?")
    except SystemExit:
        outcome = Outcome(text, "failed", "your code called exit(); remove that call")
    except Exception as e:
        if is_stub(e):
            return Outcome(text, "missing")
        outcome = _crash(text, e, Path(contract.__func__.__code__.co_filename))
    else:
        return Outcome(text, "passed", "\n".join(NOTES))
    lines = printed.getvalue()[:1000].splitlines()[:SHOWN_LINES]
    said = ["your code printed:", *(f"  {line}" for line in lines)] if lines else []
    return Outcome(text, outcome.status, "\n".join([outcome.message, *said]))


def _crash(contract: str, error: Exception, check_file: Path) -> Outcome:
    """An exception that no contract asked for: say on which line of the learner's code, or that the result could not
    be used.
    """
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for i, f in enumerate(frames) if any(Path(p.filename) == check_file for p in frames[:i])]
    own = [f for f in inside if Path(f.filename) != check_file and _is_own(f.filename)]
    interpreter = type(error).__name__ == "InterpreterError"  # Triton's, around the text of the error itself
    said = str(error) if interpreter else f"{type(error).__name__}: {error}"
    if own:
        given = _arguments(error, own[0])
        line = f"line {own[-1].lineno} in {own[-1].name}: {own[-1].line}"
        return Outcome(contract, "failed", f"your code raised {said}\n{line}{given}")
    if "'function' object is not subscriptable" in said:
        return Outcome(contract, "failed", "your kernel cannot be launched: is `@triton.jit` missing above its `def`?")
    if isinstance(error, TypeError) and "argument" in str(error) and not _in_library(frames[-1].filename):
        return Outcome(contract, "failed", f"your object could not be called as the stub is: {said}")
    if Path(frames[-1].filename) == check_file:
        blame = "what your code returned could not be used"
    else:
        blame = "an error within the check, raised by no line of yours; most often what your code returned causes it"
    missing = "\nis a `return` missing?" if re.search("'NoneType' object (has no attr|is not [si])", said) else ""
    where = [f for f in frames if Path(f.filename) == check_file][-1]
    return Outcome(contract, "broken", f"{blame}: {said}{missing}\nin the check: {where.line}")


def _in_library(filename: str) -> bool:
    return any(Path(filename).is_relative_to(folder) for folder in _LIBRARIES)


def _is_own(filename: str) -> bool:
    """Whether a file, or a cell under its made-up name, holds a learner's code: nothing of Python, of libraries or of
    this package.
    """
    return not (filename.startswith("<frozen") or _in_library(filename))


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


def _classes(stem: str) -> dict[str, Any]:
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
    if spec is None or spec.loader is None:
        raise ImportError(f"{path}: expected a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    before, _loading = _loading, True
    try:
        spec.loader.exec_module(module)
    finally:
        _loading = before
    return module


def load_notebook(path: Path, skip: Collection[int] = (), begin: Callable[[int], None] = lambda _: None) -> dict:
    """Run a notebook's code cells in order, as Jupyter does, and return what they define; a cell that fails is passed
    over, and so are those with a number in `skip`. `begin(number)` is called before each cell, from 1.

    What went wrong is under the key PROBLEMS: a list of messages. Raises ValueError for a file that is no notebook.
    """
    global _loading
    problems: list[str] = []
    _loading, before = True, _loading
    try:
        with session(path.parent) as shell:
            shell.names[PROBLEMS] = problems
            for number, source in enumerate(_code_cells(path), 1):
                begin(number)
                if number not in skip:
                    problems += _run_cell(shell, path.name, number, source)
            return shell.names
    finally:
        _loading = before


def _run_cell(shell: Session, notebook: str, number: int, source: str) -> list[str]:
    """Run one cell; return what went wrong, nothing for a stub."""
    begins = source.strip().splitlines()[0]
    try:
        with _limits(_Capped()):
            # Numbered, as cells may begin alike, and Triton reads a kernel's source back by this name.
            shell.run(source, f"<{notebook}, code cell {number}: {begins[:50]}>")
    except SyntaxError as e:
        return [f"cannot be read: {e.msg}, in line {e.lineno} of its cell: {(e.text or '').strip()}"]
    except (TimeLimit, OutputLimit):
        return [f"the cell that begins `{begins}` was stopped: an endless loop?"]
    except (Exception, SystemExit) as e:
        if not is_stub(e):
            return [f"the cell that begins `{begins}` raised {type(e).__name__}: {e}"]
    return []


def _code_cells(path: Path) -> list[str]:
    """The code cells of a notebook, without empty ones."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(
            f"{path}: not a notebook any more ({e}); `git checkout -- {path.name}` in its folder brings the stubs back,"
            " and loses what you wrote"
        ) from e
    return [source for source in sources if source.strip()]


def check_chapter(chapter: str, source: Path | None = None) -> dict[str, list[Outcome]]:
    """Check every exercise of a chapter in the learner's notebook (or another .ipynb or .py file): number -> outcomes.

    Remembers what passes, unless it is the solution. Raises ValueError for an unknown chapter, FileNotFoundError for a
    missing file.
    """
    stem = stem_of(chapter)
    source = source or root() / "exercises" / f"{stem}.ipynb"
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file; `minillm exercises build` writes the exercise notebooks")
    if source.suffix == ".ipynb":
        _code_cells(source)  # refuse here what is no notebook
    results = _examine_in_child(stem, source) if can_fork() else dict(_examined(stem, source))
    for number, outcomes in results.items():
        if all(o.status == "passed" for o in outcomes) and not _is_shown(stem, number, source):
            progress.remember(number, len(outcomes))
    return results


def _is_shown(stem: str, number: str, source: Path) -> bool:
    if source.suffix == ".ipynb":
        text = workbook.source_of(_classes(stem)[number].object_name, _code_cells(source))
        return workbook.is_shown(number, text)
    return source.resolve() == (root() / "solutions" / f"{stem}.py").resolve()


def _examined(
    stem: str, source: Path, skip: Collection[int] = (), begin: Callable[[int], None] = lambda _: None
) -> Iterator[tuple[str, list[Outcome]]]:
    """Exercise number, outcomes: one at a time."""
    if source.suffix == ".ipynb":
        namespace = load_notebook(source, skip, begin)
        begin(0)
    else:
        namespace = vars(load_module(source))
    for number, cls in _classes(stem).items():
        if cls.object_name in namespace:
            yield number, run(number, namespace[cls.object_name])
        else:
            why = "\n".join([f"{source.name} defines no `{cls.object_name}`", *namespace.get(PROBLEMS, [])])
            yield number, [Outcome(f"`{cls.object_name}` is defined", "failed", why)]


def _examine_in_child(stem: str, source: Path) -> dict[str, list[Outcome]]:
    """Load and check in a child process. A cell that ends it is left out the next time, and named."""
    ended: dict[int, str] = {}
    while True:
        results: dict[str, list[Outcome]] = {}
        cell = 0

        def job(send: Send) -> None:
            def begin(number: int) -> None:  # a cell must not hang; contracts have limits of their own
                send({"cell": number, "limit": TIME_LIMIT + GRACE if number else None})

            for number, outcomes in _examined(stem, source, ended, begin):
                send({"number": number, "outcomes": [asdict(o) for o in outcomes]})

        try:
            for message in in_child(job, None):
                cell = message.get("cell", cell)
                if "number" in message:
                    results[message["number"]] = [Outcome(**o) for o in message["outcomes"]]
        except ChildEnded as e:
            if not cell or cell in ended:
                raise ValueError(f"{source}: {_why_ended(e)}") from None
            ended[cell] = _why_ended(e)
            continue
        return {number: _with_ended(outcomes, source, ended) for number, outcomes in results.items()}


def _with_ended(outcomes: list[Outcome], source: Path, ended: dict[int, str]) -> list[Outcome]:
    """What is missing may have stood in a cell that ended the process."""
    if not ended or not outcomes[0].contract.endswith("is defined"):
        return outcomes
    cells = _code_cells(source)
    told = [f"the cell that begins `{cells[i - 1].strip().splitlines()[0]}`: {why}" for i, why in ended.items()]
    return [replace(outcomes[0], message="\n".join([outcomes[0].message, *told]))]
