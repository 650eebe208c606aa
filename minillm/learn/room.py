"""`minillm doctor --room`: one line that thirty people read out one after another, so that who differs is heard.

The line ends in a code: four digits of the commit, four of what is installed. Equal codes mean equal text, checks and
packages; "changed" counts tracked files, exercises and labs left out, that are not as committed.
"""

import hashlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, requires, version

from . import doctor
from .paths import root

__all__ = ["line"]

MODEL = "smollm2-135m-instruct"


def line(model: str = MODEL) -> tuple[str, bool]:
    """The line, and whether all is well: "OK" or the first thing that fails with its remedy, Python, torch, whether
    the model is there, and the code.
    """
    first = _first_failure(model)
    facts = [f"Python {platform.python_version()}", f"torch {_version('torch')}"]
    facts += [f"model {'there' if doctor.cache_dir().joinpath(model).is_dir() else 'missing'}", _code()]
    if first is None:
        return f"OK: {', '.join(facts)}", True
    remedy = f", {first.remedy}" if first.remedy else ""
    return f"FAIL {first.name}: {' '.join(first.detail.split())}{remedy}. {', '.join(facts)}", False


def _first_failure(model: str) -> doctor.Finding | None:
    """Whatever else is broken, the line comes: what cannot even be looked at counts as failed."""
    try:
        return next((f for f in doctor.examine(model) if f.status == "FAIL"), None)
    except Exception as e:
        for name in _names():  # a package that is missing keeps the doctor from looking at the rest
            if _version(name) == "missing":
                return doctor.Finding("FAIL", name, "not installed", "`make setup` installs it")
        return doctor.Finding("FAIL", type(e).__name__, str(e).partition("\n")[0])


def _code() -> str:
    return f"code {_commit()}-{_environment()}" + (f", {n} files changed" if (n := _changed()) else "")


def _git(*arguments: str) -> str | None:
    """What git prints, or None where it cannot be asked."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root(), capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _commit() -> str:
    return (_git("rev-parse", "HEAD") or "none")[:4]


def _changed() -> int:
    own = (":(exclude)exercises", ":(exclude)notebooks")  # where people work
    return len((_git("status", "--porcelain", "--untracked-files=no", "--", ".", *own) or "").splitlines())


def _environment() -> str:
    """Four digits of Python's minor version and of the packages at their versions, build tags such as +cpu left out."""
    python = ".".join(platform.python_version_tuple()[:2])
    found = [f"{name} {_version(name).partition('+')[0]}" for name in _names()]
    return hashlib.sha256("\n".join([python, *found]).encode()).hexdigest()[:4]


def _names() -> list[str]:
    """The direct dependencies that every system has."""
    from packaging.requirements import Requirement

    asked = [Requirement(text) for text in requires("minillm") or []]
    marks = {r.name: str(r.marker or "") for r in asked if r.name != "minillm"}
    return sorted(name for name, mark in marks.items() if "platform" not in mark and '"browser"' not in mark)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"
