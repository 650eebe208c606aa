"""Draws the figures of chapter 1: `python chapters/figures/01_backpropagation.py`.

01_graph.svg, 01_broadcast.svg, 01_memory.svg, 01_digits.svg; the last two from benchmarks/results/.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from style import canvas, look, save

from minillm.data import digits
from minillm.learn import COLORS
from minillm.learn.excerpts import results

BLUE, ORANGE, WINE, SKY, BLACK = COLORS
FORWARD, BACKWARD, GRAY, LIGHT = BLUE, WINE, "#666666", "#eef3f9"
look(11)


def graph() -> None:
    """The worked example (w x + b)²: values going right, gradients coming back."""
    figure, ax = canvas(11.4, 4.9)
    # name -> (x, y, label, value, gradient)
    nodes = {
        "w": (0.9, 4.2, "w", 2, 6),
        "x": (0.9, 2.4, "x", 3, 4),
        "b": (4.1, 0.8, "b", -5, 2),
        "y": (4.1, 3.3, "y = w · x", 6, 2),
        "s": (7.1, 2.4, "s = y + b", 1, 2),
        "ℓ": (10.4, 2.4, "ℓ = s²", 1, 1),
    }
    # from, to, local derivative, where the label's center lies
    edges = [
        ("w", "y", "∂y/∂w = x = 3", (2.75, 4.2)),
        ("x", "y", "∂y/∂x = w = 2", (2.75, 2.4)),
        ("y", "s", "∂s/∂y = 1", (5.85, 3.25)),
        ("b", "s", "∂s/∂b = 1", (6.1, 1.35)),
        ("s", "ℓ", "∂ℓ/∂s = 2s = 2", (8.75, 2.65)),
    ]
    half_w, half_h = 0.72, 0.5
    for start, end, label, (x, y) in edges:
        (x0, y0), (x1, y1) = nodes[start][:2], nodes[end][:2]
        ax.add_patch(
            FancyArrowPatch(
                (x0 + half_w, y0),
                (x1 - half_w, y1),
                arrowstyle="-|>",
                mutation_scale=14,
                color=GRAY,
                lw=1.3,
                shrinkA=2,
                shrinkB=2,
            )
        )
        ax.text(x, y, label, ha="center", va="center", fontsize=9.5, color=GRAY)
    for name, (x, y, label, value, gradient) in nodes.items():
        ax.add_patch(
            FancyBboxPatch(
                (x - half_w, y - half_h),
                2 * half_w,
                2 * half_h,
                boxstyle="round,pad=0,rounding_size=0.12",
                fc=LIGHT,
                ec=FORWARD,
                lw=1.2,
            )
        )
        ax.text(x, y + 0.27, label, ha="center", va="center", fontsize=11, weight="bold")
        ax.text(x, y, f"value {value}".replace("-", "−"), ha="center", va="center", fontsize=10, color=FORWARD)
        ax.text(x, y - 0.28, f"∂ℓ/∂{name} = {gradient}", ha="center", va="center", fontsize=10, color=BACKWARD)
    for y, x0, x1, text_x, color, text in [
        (4.5, 6.2, 7.7, 7.85, FORWARD, "forward: values, left to right"),
        (0.5, 7.7, 6.2, 7.85, BACKWARD, "backward: gradients, right to left"),
    ]:
        ax.add_patch(FancyArrowPatch((x0, y), (x1, y), arrowstyle="-|>", mutation_scale=14, color=color, lw=1.8))
        ax.text(text_x, y, text, color=color, va="center")
    save(figure, "01_graph")


def cells(ax: plt.Axes, x: float, y: float, values: np.ndarray, color: str, faint: bool = False) -> None:
    """A grid of numbers with its top left corner at (x, y)."""
    for (row, column), value in np.ndenumerate(values):
        ax.add_patch(
            Rectangle(
                (x + 0.55 * column, y - 0.45 * (row + 1)), 0.55, 0.45, fc="white" if faint else LIGHT, ec=color, lw=1
            )
        )
        ax.text(
            x + 0.55 * (column + 0.5),
            y - 0.45 * (row + 0.5),
            f"{value:g}".replace("-", "−"),
            ha="center",
            va="center",
            fontsize=10,
            color=GRAY if faint else "black",
        )


def broadcast() -> None:
    """Forward copies a row four times; backward adds the four gradients."""
    figure, ax = canvas(10.4, 3.4)
    b = np.array([[10.0, 20.0, 30.0]])
    g = np.array([[1, 0, 2], [0, 1, -1], [3, 0, 0], [1, 1, 1.0]])
    ax.text(0.3, 3.25, "forward: broadcasting copies", color=FORWARD, weight="bold", va="center")
    cells(ax, 0.3, 1.95, b, FORWARD)
    ax.text(1.125, 2.2, "b  [3]", ha="center", va="center")
    cells(ax, 3.1, 2.6, np.repeat(b, 4, axis=0), FORWARD, faint=True)
    ax.text(3.925, 2.85, "b as used  [4, 3]", ha="center", va="center")
    for row in range(4):
        ax.add_patch(
            FancyArrowPatch(
                (2.0, 1.72), (3.05, 2.38 - 0.45 * row), arrowstyle="-|>", mutation_scale=10, color=FORWARD, lw=1
            )
        )
    ax.plot([5.2, 5.2], [0.7, 3.3], color="#cccccc", lw=1)
    ax.text(5.6, 3.25, "backward: the gradients of the copies add up", color=BACKWARD, weight="bold", va="center")
    cells(ax, 5.6, 2.6, g, BACKWARD, faint=True)
    ax.text(6.425, 2.85, "∂ℓ/∂y  [4, 3]", ha="center", va="center")
    cells(ax, 8.5, 1.95, g.sum(axis=0, keepdims=True), BACKWARD)
    ax.text(9.325, 2.2, "∂ℓ/∂b  [3]", ha="center", va="center")
    for row in range(4):
        ax.add_patch(
            FancyArrowPatch(
                (7.3, 2.38 - 0.45 * row), (8.45, 1.72), arrowstyle="-|>", mutation_scale=10, color=BACKWARD, lw=1
            )
        )
    ax.text(9.325, 1.2, "sum over the axis\nthat was copied", ha="center", va="center", fontsize=9.5, color=GRAY)
    save(figure, "01_broadcast")


def memory() -> None:
    """Allocated bytes during a training step and during inference, from the recorded benchmark."""
    r = results("chapter_01")["memory_over_time"]
    forward, backward, inference = (np.array(r[k]) / 1e6 for k in ("forward", "backward", "inference"))
    turn = len(forward)
    figure, ax = plt.subplots(figsize=(9.2, 3.9))
    steps = np.arange(1, turn + len(backward) + 1)
    both = np.concatenate([forward, backward])
    ax.fill_between(steps, both, color=FORWARD, alpha=0.12, lw=0)
    ax.plot(steps, both, color=FORWARD, lw=2.2, marker="o", ms=3.5)
    ax.plot(steps[:turn], inference, color=ORANGE, lw=2.2, marker="s", ms=3.5, ls="--")
    ax.axvline(turn + 0.5, color="#bbbbbb", lw=1, ls="--")
    top = both.max() * 1.2
    ax.text(turn / 2 + 0.5, top * 0.97, "forward", ha="center", color=GRAY)
    ax.text(turn + len(backward) / 2 + 0.5, top * 0.97, "backward", ha="center", color=GRAY)
    ax.text(turn - 3.2, forward[-1] + 0.6, "training step", color=FORWARD, weight="bold", ha="right")
    ax.text(turn - 3.2, inference[1] + 0.35, "inference (no_grad), between layers", color=BLACK, ha="right")
    gradient = r["gradient_bytes"] / 1e6
    ax.annotate(
        f"what stays: the gradients\nof the weights, {gradient:.1f} MB",
        (steps[-1], both[-1]),
        xytext=(steps[-1] - 0.6, 9.0),
        ha="right",
        va="center",
        color=BACKWARD,
        fontsize=10,
        arrowprops={"arrowstyle": "-", "color": BACKWARD, "lw": 1, "relpos": (0.93, 0)},
    )
    ax.annotate(
        "each ReLU keeps its output,\nwhich is the next layer's input",
        (steps[7], both[7]),
        xytext=(steps[0], both[7] + 2.2),
        color=FORWARD,
        fontsize=10,
        arrowprops={"arrowstyle": "-", "color": FORWARD, "lw": 1},
    )
    ax.set_ylim(0, top)
    ax.set_xlim(0.5, steps[-1] + 0.5)
    ax.set_xticks([1, turn, steps[-1]], ["first layer", "loss", "first layer again"])
    ax.set_ylabel("allocated between layers, MB")
    save(figure, "01_memory")


def read_digits() -> None:
    """The loss of every step, and the test images that the trained network misreads."""
    r = results("chapter_01")["training"]
    data = digits()
    shown = r["wrong"][:10]
    figure = plt.figure(figsize=(10.4, 3.3), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.05, 1))
    ax = left.subplots()
    losses = np.array(r["losses"])
    window = 22  # one epoch
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    ax.plot(np.arange(1, len(losses) + 1), losses, color=FORWARD, alpha=0.3, lw=1, label="one minibatch")
    ax.plot(np.arange(window, len(losses) + 1), smooth, color=FORWARD, lw=2, label="mean of one epoch")
    ax.axhline(np.log(10), color=GRAY, ls="--", lw=1)
    ax.text(len(losses), np.log(10) * 1.12, "guessing: ln 10", ha="right", va="bottom", color=GRAY, fontsize=9.5)
    ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel("cross-entropy, nats")
    ax.legend(frameon=False, fontsize=9.5, loc="lower left")
    grid = right.subplots(2, 5)
    right.suptitle(f"all {len(r['wrong'])} misread of {r['test_images']} test images: label → read as", fontsize=11)
    for image_ax in grid.flat:
        image_ax.axis("off")
    for image_ax, at, read in zip(grid.flat, shown, r["wrong_predicted"][:10], strict=False):
        image_ax.imshow(data.test_x[at].reshape(8, 8), cmap="gray_r")
        image_ax.set_title(f"{data.test_y[at]} → {read}", fontsize=11, color=BACKWARD, pad=3)
    save(figure, "01_digits")


if __name__ == "__main__":
    graph()
    broadcast()
    memory()
    read_digits()
