"""Where the curriculum's files are: the checkout that this package is installed from, or the one around the current
folder.
"""

from pathlib import Path

__all__ = ["has_root", "root", "stem_of", "stems"]


def root() -> Path:
    """The folder that holds `chapters/`, `solutions/` and `tests/exercises/`.

    Raises FileNotFoundError outside a checkout: the package alone has no exercises.
    """
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[2]):
        if (folder / "solutions").is_dir() and (folder / "tests" / "exercises").is_dir():
            return folder
    raise FileNotFoundError(
        f"{here}: the curriculum's folders (chapters/, exercises/, solutions/, tests/exercises/, benchmarks/) are not"
        " here, and the installed package does not bring them: get minillm's repository, run `make setup` in it, and"
        " there repeat this as `.venv/bin/minillm ...`"
    )


def has_root() -> bool:
    """Whether the curriculum's files are at hand; without them the package stands alone."""
    try:
        return root().is_dir()
    except FileNotFoundError:
        return False


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
