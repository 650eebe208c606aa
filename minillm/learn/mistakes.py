"""Common errors of each exercise, for instructors: what the wrong variants in tests/exercises/ get wrong, and what
`check` says to it.

`python -m minillm.learn.mistakes [chapter]` runs them and writes teaching/errors/NN_stem.json (a minute or two); pages
quote that by cog.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .agendas import cards
from .checker import load_module, run
from .exercises import write_text
from .isolation import neutral_state
from .paths import root, stem_of, stems

__all__ = ["common", "found", "path_of", "said", "sources", "write", "wrong_ones"]

SHOWN = 3  # errors an exercise
LINES = 8  # of a message


def path_of(stem: str) -> Path:
    """Where the errors of a chapter are kept."""
    return root() / "teaching" / "errors" / f"{stem}.json"


def sources(stem: str) -> str:
    """A hash of the checks and the variants that the errors come from."""
    texts = [(root() / "tests" / "exercises" / f"{kind}_{stem}.py").read_bytes() for kind in ("test", "variants")]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


def wrong_ones(stem: str) -> dict[str, list[Any]]:
    """Exercise number -> its wrong variants, in the order of their file: the likeliest first."""
    with neutral_state():
        variants = load_module(root() / "tests" / "exercises" / f"variants_{stem}.py").VARIANTS
    of: dict[str, list[Any]] = {card.number: [] for card in cards(stem)}
    for impl in variants:
        kind, number, _ = impl.variant
        if kind == "wrong":
            of.setdefault(number, []).append(impl)
    return of


def said(number: str, impl: Any) -> dict[str, str] | None:
    """What `check` says to a wrong variant: the mistake, the first contract that does not hold, and why. None when the
    first that does not hold is stopped or broken. Line numbers and addresses in memory are left out.
    """
    first = next((o for o in run(number, impl) if o.status not in ("passed", "skipped")), None)
    if first is None or first.status != "failed":
        return None
    message = re.sub(r"\bline \d+ in\b", "line … in", re.sub(r"x[0-9a-f]{8,}\b", "x…", first.message))
    lines = message.partition("\nyour code printed:")[0].splitlines()  # warnings, which come once a process
    shown = lines if len(lines) <= LINES else [*lines[: LINES - 1], "…"]
    return {"mistake": impl.variant[2], "contract": first.contract, "message": "\n".join(shown)}


def found(stem: str) -> dict[str, list[dict[str, str]]]:
    """Exercise number -> three errors: the first that three different contracts refuse, else the first of all."""
    return {number: _three(number, impls) for number, impls in wrong_ones(stem).items()}


def _three(number: str, impls: list[Any]) -> list[dict[str, str]]:
    tried: list[dict[str, str]] = []
    chosen: dict[str, dict[str, str]] = {}
    for error in filter(None, (said(number, impl) for impl in impls)):
        tried.append(error)
        chosen.setdefault(error["contract"], error)
        if len(chosen) == SHOWN:
            break
    rest = [error for error in tried if error not in chosen.values()][: SHOWN - len(chosen)]
    return [error for error in tried if error in chosen.values() or error in rest]


def write(chapters: list[str]) -> Iterator[Path]:
    """Run the variants of these chapters (none: all) and write their files. Raises ValueError where an exercise has
    fewer than three that a contract refuses.
    """
    if not Path("/proc/driver/nvidia").exists():
        os.environ["TRITON_INTERPRET"] = "1"  # kernels read it as they are decorated
    for stem in [stem_of(chapter) for chapter in chapters] or stems():
        content: dict[str, Any] = {"sources": sources(stem), "exercises": found(stem)}
        if few := [number for number, errors in content["exercises"].items() if len(errors) < SHOWN]:
            raise ValueError(
                f"tests/exercises/variants_{stem}.py: expected {SHOWN} wrong ones, refused, of each in {few}"
            )
        path_of(stem).parent.mkdir(parents=True, exist_ok=True)
        write_text(path_of(stem), json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        yield path_of(stem)


def common(chapter: str) -> str:
    """The errors of a chapter as Markdown, an exercise folded away; read from the file that `write` wrote."""
    stem = stem_of(chapter)
    errors = json.loads(path_of(stem).read_text(encoding="utf-8"))["exercises"]
    lines: list[str] = []
    for card in cards(stem):
        lines += [f"<details><summary>{card.number} {_plain(card.title)}</summary>", ""]
        for error in errors.get(card.number, []):
            message = [f"    {line}".rstrip() for line in error["message"].splitlines()]
            lines += [f"- {error['mistake']}", "", "  ```text", f"  ✗ {error['contract']}"]
            lines += [f"  {line}".rstrip() for line in message] + ["  ```", ""]
        lines += ["</details>", ""]
    return "\n".join(lines).rstrip()


def _plain(title: str) -> str:
    return re.sub(r"[*`]", "", title)


if __name__ == "__main__":
    for path in write(sys.argv[1:]):
        print(path)
