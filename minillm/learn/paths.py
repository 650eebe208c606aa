"""Where the curriculum's files are: the checkout that this package is installed from, or the one around the current
folder.
"""

from pathlib import Path

__all__ = ["root", "stem_of", "stems"]


def root() -> Path:
    """The folder that holds `chapters/`, `solutions/` and `tests/exercises/`.

    Raises FileNotFoundError outside a checkout (the package alone has no exercises).
    """
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[2]):
        if (folder / "solutions").is_dir() and (folder / "tests" / "exercises").is_dir():
            return folder
    raise FileNotFoundError(
        "the curriculum's folders (solutions/, tests/exercises/) are not here: run this inside the minillm checkout"
    )


def stems() -> list[str]:
    """The stems of all chapters that have exercises, in order: ["01_backpropagation", ...]."""
    return sorted(path.stem for path in (root() / "solutions").glob("[0-9][0-9]_*.py"))


def stem_of(chapter: str | int) -> str:
    """The stem of a chapter given as 2, "2", "02", "02_transformer" or an exercise number "2.3".

    Raises ValueError when no chapter with exercises matches.
    """
    text = str(chapter).split(".")[0]
    for stem in stems():
        if text == stem or (text.isdigit() and int(text) == int(stem[:2])):
            return stem
    raise ValueError(f"chapter: expected one of {', '.join(s[:2] for s in stems())}, got {chapter!r}")
