"""A progress bar that asks for nothing: a widget in Jupyter where ipywidgets is installed, plain text elsewhere."""

import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["progress_bar"]


def progress_bar(total: int, desc: str = "", unit: str = "it", disable: bool = False) -> "tqdm":
    """A bar over `total` steps, to be used in a `with` block; `bar.update(n)` moves it n steps (default 1).

    In a notebook without ipywidgets tqdm warns and draws text; the warning would be the first thing that a reader
    sees, so it is left out.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*IProgress not found.*")
        from tqdm.auto import tqdm
    return tqdm(total=total, desc=desc, unit=unit, disable=disable)
