"""What the learner has done: derived from checks passed, kept in one small file inside the checkout, so it moves with
the folder.
"""

import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path

from .paths import root, stems

__all__ = ["exercises", "load", "remember", "summary"]


def _file() -> Path:
    return root() / ".minillm" / "progress.json"


def load() -> dict[str, dict]:
    """Exercise number -> {"passed_at": ISO time, "contracts": count}. A damaged file is set aside, not lost, and
    counts as empty.
    """
    path = _file()
    if not path.exists():
        return {}
    try:
        passed = json.loads(path.read_text(encoding="utf-8"))["passed"]
        if not isinstance(passed, dict):
            raise TypeError("`passed` is not an object")
        return passed
    except (ValueError, KeyError, TypeError) as e:
        aside = path.with_suffix(".damaged.json")
        path.replace(aside)
        print(f"the progress record was damaged ({e}) and is now {aside}; run the checks again to fill a new one")
        return {}


def remember(number: str, contracts: int) -> None:
    """Record that all `contracts` of exercise `number` hold; the first time stays."""
    passed = load()
    passed.setdefault(number, {"passed_at": datetime.now(UTC).isoformat(timespec="seconds"), "contracts": contracts})
    path = _file()
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"passed": passed}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)


def exercises() -> dict[str, dict[str, str]]:
    """Stem -> {exercise number: title}, read from the headings in solutions/."""
    heading = re.compile(r"^# ## Exercise (\d+\.\d+): (.+)$", re.MULTILINE)
    return {
        stem: dict(heading.findall((root() / "solutions" / f"{stem}.py").read_text(encoding="utf-8")))
        for stem in stems()
    }


def summary() -> list[dict]:
    """One dictionary an exercise: chapter, number, title, passed_at (None while open)."""
    passed = load()
    return [
        {"chapter": stem, "number": number, "title": title, "passed_at": passed.get(number, {}).get("passed_at")}
        for stem, titles in exercises().items()
        for number, title in titles.items()
    ]
