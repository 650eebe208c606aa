"""Pictures in a lab that everybody gets something from: with words for those who do not see them, in colors that the
color-blind tell apart.
"""

import base64
import html
import io
from typing import TYPE_CHECKING

from ..extras import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLORS", "show", "use_colors"]

# Any two, and each and white, are at least 25 apart (CIE76), in the eyes of the color-blind of all three kinds, too;
# a test reckons.
COLORS = ("#2a6fdb", "#e8a01e", "#9c2450", "#9ccbf2", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))  # beside the color, for print in gray


def use_colors() -> None:
    """Let matplotlib draw lines in COLORS, each with dashes of its own."""
    require("lab", "matplotlib")
    import matplotlib.pyplot as plt
    from cycler import cycler

    plt.rcParams["axes.prop_cycle"] = cycler(color=list(COLORS)) + cycler(linestyle=list(DASHES))


def show(figure: "Figure", alt: str, dpi: int = 100) -> None:
    """Show a matplotlib figure in the notebook, with `alt`, what it says in words, in the stored output, and close it.

    Say what can be seen (axes, the course of the curves, the number that matters), not that there is a plot. Outside
    of a notebook `alt` is printed. Raises ValueError for an `alt` of fewer than three words.

    >>> show(figure, alt="Time a token against its position: without the cache it grows to 60 ms, with it 4 ms stay.")
    """
    import matplotlib.pyplot as plt

    if not isinstance(alt, str) or len(alt.split()) < 3:
        raise ValueError(f"alt: expected a sentence that says what the picture shows, got {alt!r}")
    alt = " ".join(alt.split())
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=dpi, bbox_inches="tight", metadata={"Software": None})
    width = int.from_bytes(image.getvalue()[16:20], "big")  # of the PNG's header
    plt.close(figure)  # or Jupyter shows it again below the cell
    data = base64.b64encode(image.getvalue()).decode()
    try:
        from IPython import get_ipython
    except ImportError:
        get_ipython = lambda: None  # noqa: E731
    if get_ipython() is None:
        print(f"[picture: {alt}]")
        return
    from IPython.display import display

    # HTML, as JupyterLab gives the type image/png no alt text.
    page = f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}" width="{width}" style="max-width: 100%">'
    display({"text/html": page, "text/plain": f"[picture: {alt}]"}, raw=True)
