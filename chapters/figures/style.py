"""What the scripts beside this share: the look of a figure, and how it is written."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

__all__ = ["canvas", "look", "save"]


def look(size: float) -> None:
    """Set fonts of `size` points, no frames, and the same file for the same figure."""
    plt.rcParams.update(
        {
            "font.size": size,
            "axes.titlesize": size + 0.5 if size < 10 else "large",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "figure.facecolor": "white",
            "legend.frameon": False,
            "svg.hashsalt": "minillm",
        }
    )


def save(figure: plt.Figure, name: str) -> None:
    """Write name.svg here; with a folder as the script's argument also name.png into it, to look at."""
    figure.savefig(Path(__file__).parent / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
    if len(sys.argv) > 1:
        figure.savefig(Path(sys.argv[1]) / f"{name}.png", dpi=110, bbox_inches="tight")
    plt.close(figure)


def canvas(width: float, height: float) -> tuple[plt.Figure, plt.Axes]:
    """An empty drawing surface with one unit an inch."""
    figure, ax = plt.subplots(figsize=(width, height))
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.axis("off")
    return figure, ax
