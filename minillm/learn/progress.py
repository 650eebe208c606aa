"""What the learner has done: derived from checks passed, kept in one small file inside the checkout, so it moves with
the folder.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

from .paths import root, stems

__all__ = [
    "exercises",
    "load",
    "predictions",
    "remember",
    "remember_answer",
    "remember_guess",
    "remember_shown",
    "shown",
    "summary",
]

_said: set[str] = set()  # a notebook checks forty times; what cannot be written is said once


def _file() -> Path:
    return root() / ".minillm" / "progress.json"


def load() -> dict[str, dict]:
    """Exercise number -> {"passed_at": ISO time, "contracts": count}. A damaged file is set aside, not lost, and
    counts as empty; so does one that cannot be read.
    """
    return _look()["passed"]


def predictions() -> dict[str, dict]:
    """Key of a question in a lab -> {"question", "guess", "guessed_at"}, and "answer" once it was shown."""
    return _look()["predictions"]


def shown() -> dict[str, str]:
    """Exercise number -> ISO time at which `minillm exercises solve` first put its solution into the notebook."""
    return _look()["shown"]


def remember_shown(number: str) -> None:
    """Record that the solution of exercise `number` was put into the notebook; the first time stays."""
    now = _now()
    _change(lambda record: record["shown"].setdefault(number, now))


def remember(number: str, contracts: int) -> None:
    """Record that all `contracts` of exercise `number` hold; the first time stays.

    Where nothing can be written, a line says so, once.
    """
    done = {"passed_at": _now(), "contracts": contracts}
    _change(lambda record: record["passed"].setdefault(number, done))


def remember_guess(key: str, question: str, guess: Any) -> None:
    """Record what a reader of a lab expects; the first guess at a question stays."""
    entry = {"question": question, "guess": guess, "guessed_at": _now()}

    def edit(record: dict[str, dict]) -> None:
        if record["predictions"].get(key, {}).get("question") != question:
            record["predictions"][key] = entry

    _change(edit)


def remember_answer(key: str, answer: Any) -> None:
    """Record what a guess is compared with; nothing where there was none."""

    def edit(record: dict[str, dict]) -> None:
        if key in record["predictions"]:
            record["predictions"][key]["answer"] = answer

    _change(edit)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _look() -> dict[str, dict]:
    try:
        return _read()
    except OSError as e:
        _say_once(f"(the record of progress cannot be read: {_file()}, {e.strerror})")
        return _empty()


def _empty() -> dict[str, dict]:
    return {"passed": {}, "predictions": {}, "shown": {}}


def _read() -> dict[str, dict]:
    path = _file()
    empty = _empty()
    try:
        record = empty | json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(record[part], dict) for part in empty):
            raise TypeError(f"one of {', '.join(empty)} is no object")
        return record
    except (FileNotFoundError, NotADirectoryError):
        return empty
    except (ValueError, TypeError) as e:
        aside = next(a for n in count(1) if not (a := path.with_suffix(f".damaged{n}.json")).exists())
        path.replace(aside)
        print(f"the progress record was damaged ({e}) and is now {aside}; run the checks again to fill a new one")
        return empty


def _change(edit: Callable[[dict[str, dict]], Any]) -> None:
    """Let `edit` change the record, and write it, as a whole or not at all; several processes take turns."""
    path = _file()
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        with _lock(path.parent / "lock"):
            record = _read()
            edit(record)
            try:
                temporary.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)  # a full disk
    except OSError as e:
        _say_once(f"(not recorded for `minillm progress`: {path} cannot be written, {e.strerror})")


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        with suppress(ImportError, OSError):  # Windows; a network drive without locks
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        print(text)


def exercises() -> dict[str, dict[str, str]]:
    """Stem -> {exercise number: title}, read from the headings in solutions/."""
    heading = re.compile(r"^# ## Exercise (\d+\.w?\d+): (.+)$", re.MULTILINE)
    return {
        stem: dict(heading.findall((root() / "solutions" / f"{stem}.py").read_text(encoding="utf-8")))
        for stem in stems()
    }


def summary() -> list[dict]:
    """One dictionary an exercise: chapter, number, title, passed_at (None while open), shown_at (None, or when its
    solution was put into the notebook).
    """
    record = _look()
    passed, seen = record["passed"], record["shown"]
    return [
        {
            "chapter": stem,
            "number": number,
            "title": title,
            "passed_at": passed.get(number, {}).get("passed_at"),
            "shown_at": seen.get(number),
        }
        for stem, titles in exercises().items()
        for number, title in titles.items()
    ]
