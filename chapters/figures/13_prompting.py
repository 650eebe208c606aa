"""Draw the figures of chapter 13: `python chapters/figures/13_prompting.py` writes 13_*.svg beside this file."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Circle, FancyArrowPatch, Rectangle
from style import canvas, look, save

from minillm.learn import COLORS
from minillm.learn.excerpts import measured_on, results

BLUE, ORANGE, WINE, SKY, BLACK = COLORS
GRAY = "#777777"
look(9)
recorded = results("chapter_13", measured_on("chapter_13", "h100", "h200", "cpu-2-cores") or "h100")


def arrow(ax: plt.Axes, begin: tuple, end: tuple, color: str, bend: float = 0.0) -> None:
    ax.add_patch(
        FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=10, color=color, shrinkA=2, shrinkB=2,
                        connectionstyle=f"arc3,rad={bend}")
    )  # fmt: skip


def circuit() -> None:
    """Two heads: what each token carries after the first, and where the second looks."""
    figure, ax = canvas(7.6, 2.6)
    tokens, x0, step = ["A", "B", "C", "A"], 1.9, 1.4
    for i, token in enumerate(tokens):
        x = x0 + step * i
        ax.add_patch(Rectangle((x - 0.3, 0.2), 0.6, 0.34, fc="#eeeeee", ec=GRAY, lw=0.6))
        ax.text(x, 0.37, token, ha="center", va="center")
        ax.add_patch(Rectangle((x - 0.45, 1.15), 0.9, 0.34, fc="#f6dca8", ec=GRAY, lw=0.6))
        before = tokens[i - 1] if i else "–"
        ax.text(x, 1.32, f"{token}, after {before}", ha="center", va="center", fontsize=7.5)
        arrow(ax, (x, 0.54), (x, 1.13), GRAY)
        if i:
            arrow(ax, (x - step + 0.1, 0.56), (x - 0.2, 1.13), ORANGE)
    last = x0 + step * 3
    arrow(ax, (x0 + step, 1.52), (last - 0.1, 2.02), BLUE, -0.15)
    arrow(ax, (last, 1.52), (last, 2.0), GRAY)
    ax.add_patch(Rectangle((last - 0.45, 2.02), 0.9, 0.34, fc=SKY, ec=GRAY, lw=0.6))
    ax.text(last, 2.19, "next: B", ha="center", va="center", fontsize=8)
    ax.text(0.05, 0.37, "tokens", va="center", fontsize=8)
    ax.text(0.05, 1.32, "after the first head", va="center", fontsize=8)
    ax.text(0.05, 0.85, "previous token", va="center", fontsize=8, color=ORANGE)
    ax.text(x0 + step * 1.1, 2.05, "looks for “after A”, copies the token", fontsize=8, color=BLUE, ha="right")
    save(figure, "13_circuit")


def induction() -> None:
    """Loss by position over repeated tokens, and the prefix-matching score of every head."""
    r = recorded["induction"]
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.4), width_ratios=(1, 1.25))
    loss = r["by position"]
    axes[0].plot(range(1, len(loss) + 1), loss, color=BLUE, lw=1.2)
    axes[0].axvline(r["length"], color=GRAY, lw=0.8, ls=":")
    axes[0].text(r["length"] + 1, max(loss), "the repeat begins", fontsize=8, color=GRAY, va="top")
    axes[0].set(xlabel="position", ylabel="loss, nats", ylim=(0, None))
    scores = np.array(r["induction"]).T  # [heads, layers]
    image = axes[1].imshow(scores, aspect="auto", cmap="cividis", vmin=0, vmax=1)
    axes[1].set(xlabel="layer", ylabel="head", title="prefix-matching score")
    axes[1].set_yticks(range(len(scores)))
    for layer, head in [map(int, name.split(".")) for name, _ in r["before"][:2]]:
        axes[1].add_patch(Circle((layer, head), 0.42, fill=False, ec=ORANGE, lw=1.4))
    figure.colorbar(image, ax=axes[1])
    figure.tight_layout()
    save(figure, "13_induction")


def ablation() -> None:
    """Loss on the repeat by how many heads are silenced, against heads of the same layers that match no prefix."""
    r = recorded["induction"]
    figure, ax = plt.subplots(figsize=(5.6, 3.0))
    rows, plain = r["rows"], r["rows"][0]["second"]
    numbers = sorted({row["n"] for row in rows if row["name"] == "induction"})
    top = {row["n"]: row for row in rows if row["name"] == "induction"}
    ax.errorbar(numbers, [top[n]["second"] for n in numbers], yerr=[2 * top[n]["error"] for n in numbers],
                color=BLUE, marker="o", ms=4, lw=1.2, capsize=2, label="highest scores")  # fmt: skip
    for n in numbers:
        control = [row["second"] for row in rows if row["name"] == "control" and row["n"] == n]
        ax.plot([n] * len(control), control, "x", color=GRAY, ms=5, mew=1.1,
                label="others of the same layers" if n == numbers[0] else None)  # fmt: skip
    before = [row for row in rows if row["name"] == "previous"]
    ax.plot([row["n"] for row in before], [row["second"] for row in before], "^", color=ORANGE, ms=6,
            label="previous-token heads")  # fmt: skip
    ax.axhline(plain, color=GRAY, lw=0.8, ls=":")
    ax.axhline(r["rows"][0]["first"], color=GRAY, lw=0.8, ls="--")
    ax.text(numbers[-1], plain, "none silenced", ha="right", va="top", fontsize=7.5, color=GRAY)
    ax.text(numbers[0], r["rows"][0]["first"], "first half, none silenced", va="bottom", fontsize=7.5, color=GRAY)
    ax.set(xscale="log", xlabel="heads silenced", ylabel="loss on the repeat, nats", ylim=(0, 16.5))
    ax.set_xticks(numbers, [str(n) for n in numbers])
    ax.minorticks_off()
    ax.legend(fontsize=7.5, loc="center right")
    save(figure, "13_ablation")


def wordings() -> None:
    """One question in ten wordings, raw and calibrated, with intervals."""
    rows = recorded["wordings"]["rows"]
    figure, ax = plt.subplots(figsize=(6.6, 3.5))
    for key, color, shift, marker, label in (
        ("accuracy", BLUE, 0.14, "o", "as it is"), ("calibrated", ORANGE, -0.14, "s", "calibrated")
    ):  # fmt: skip
        means = [row[key]["mean"] for row in rows]
        low, high = ([abs(row[key]["mean"] - row[key][side]) for row in rows] for side in ("low", "high"))
        ax.errorbar(means, [-i + shift for i in range(len(rows))], xerr=[low, high], fmt=marker, ms=4, lw=1,
                    color=color, capsize=2, label=label)  # fmt: skip
    ax.axvline(0.5, color=GRAY, lw=0.8, ls=":")
    ax.set_yticks([-i for i in range(len(rows))], [row["name"] for row in rows])
    ax.set(xlabel="accuracy, 95 % interval", xlim=(0.25, 1))
    ax.legend(fontsize=8, loc="lower right")
    save(figure, "13_wordings")


def shots() -> None:
    """Accuracy by number of examples, a dot a draw; and by order of the same four."""
    r = recorded["shots"]
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.1), width_ratios=(1.4, 1))
    ks = [row["k"] for row in r["by k"]]
    for key, color, shift, label in (("accuracy", BLUE, -0.15, "as it is"), ("calibrated", ORANGE, 0.15, "calibrated")):
        for i, k in enumerate(ks):
            dots = [row[key] for row in r["rows"] if row["k"] == k]
            axes[0].plot([i + shift] * len(dots), dots, ".", color=color, ms=5, alpha=0.6)
        axes[0].plot([i + shift for i in range(len(ks))], [row[key]["mean"] for row in r["by k"]], color=color, lw=1.2,
                     label=label)  # fmt: skip
    axes[0].axhline(0.5, color=GRAY, lw=0.8, ls=":")
    axes[0].set_xticks(range(len(ks)), [str(k) for k in ks])
    axes[0].set(xlabel="examples", ylabel="accuracy, a dot a draw", ylim=(0.4, 1))
    axes[0].legend(fontsize=8)
    for i, order in enumerate(r["orders"]):
        for last, color, marker in (("positive", BLUE, "o"), ("negative", WINE, "^")):
            rows = [row for row in order["rows"] if row["last"] == last]
            axes[1].plot([row["said positive"] for row in rows], [row["accuracy"] for row in rows], marker, ms=4,
                         color=color, mfc=color if i == 0 else "none",
                         label=f"last: {last}" if i == 0 else None)  # fmt: skip
    axes[1].set(
        xlabel="share of answers “positive”", title="orders of four (open: another four)", xlim=(0, 1), ylim=(0.4, 1)
    )
    axes[1].legend(fontsize=7.5)
    figure.tight_layout()
    save(figure, "13_shots")


def automaton() -> None:
    """The states of -?[0-9]+ and the way of three tokens through them."""
    figure, ax = canvas(7.2, 1.9)
    places = {"start": (0.9, 0.9), "sign": (2.9, 1.45), "digits": (4.9, 0.9)}
    labels = {"start": "-?[0-9]+", "sign": "[0-9]+", "digits": "[0-9]*"}
    for name, (x, y) in places.items():
        ax.add_patch(Circle((x, y), 0.42, fc="#f0f0f0", ec=BLACK, lw=1))
        if name == "digits":
            ax.add_patch(Circle((x, y), 0.37, fill=False, ec=BLACK, lw=0.8))
        ax.text(x, y, labels[name], ha="center", va="center", fontsize=7.5, family="monospace")
    arrow(ax, (0.1, 0.9), (0.5, 0.9), GRAY)
    arrow(ax, (1.3, 1.03), (2.49, 1.37), BLUE)
    ax.text(1.85, 1.33, "-", color=BLUE, ha="center", family="monospace")
    arrow(ax, (3.3, 1.37), (4.49, 1.03), BLUE)
    ax.text(3.95, 1.33, "0 … 9", color=BLUE, ha="center")
    arrow(ax, (1.31, 0.8), (4.48, 0.8), BLUE, 0.12)
    ax.text(2.9, 0.38, "0 … 9", color=BLUE, ha="center")
    arrow(ax, (5.2, 1.2), (5.25, 0.62), BLUE, -1.6)
    ax.text(5.95, 0.9, "0 … 9", color=BLUE, va="center")
    ax.text(4.9, 0.32, "complete: may end", ha="center", fontsize=7.5, color=GRAY)
    save(figure, "13_automaton")


if __name__ == "__main__":
    circuit()
    automaton()
    for name, draw in (("induction", induction), ("induction", ablation), ("wordings", wordings), ("shots", shots)):
        if name in recorded and (name != "shots" or "orders" in recorded[name]):
            draw()
