"""Draw the figures of chapter 12: `python chapters/figures/12_lora.py` writes 12_*.svg beside this file."""

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle
from style import canvas, look, save

from minillm.learn import COLORS
from minillm.learn.excerpts import measured_on, results

BLUE, ORANGE, WINE, SKY, BLACK = COLORS
GRAY = "#777777"
look(9)


def recorded() -> dict:
    """By a GPU where it is recorded, else by a CPU."""
    return results("chapter_12", *(("h100", "h200") if measured_on("chapter_12", "h100", "h200") else ("cpu-2-cores",)))


def arrow(ax: plt.Axes, begin: tuple, end: tuple, color: str = GRAY) -> None:
    ax.add_patch(FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=9, color=color, shrinkA=0, shrinkB=0))


def low_rank() -> None:
    """Left, the layer with its two thin matrices beside it; right, a bottleneck adapter behind it."""
    figure, ax = canvas(8.2, 2.9)

    def box(x: float, y: float, w: float, h: float, label: str, color: str, size: float = 9) -> None:
        ax.add_patch(Rectangle((x, y), w, h, fc=color, ec=GRAY, lw=0.8))
        ax.text(x + w / 2, y + h / 2, label, ha="center", va="center", fontsize=size)

    def circle(x: float, y: float, label: str = "+") -> None:
        ax.add_patch(plt.Circle((x, y), 0.12, fc="white", ec=BLACK, lw=0.8))
        ax.text(x, y, label, ha="center", va="center", fontsize=9)

    ax.text(2.2, 2.72, "LoRA: beside the weight", ha="center", fontsize=9.5)
    ax.text(1.45, 0.06, "x  [K]", ha="center")
    box(0.3, 0.75, 1.5, 1.1, "W  [N, K]\nfrozen", "#e8e8e8")
    box(2.3, 0.75, 1.5, 0.2, "", SKY)
    ax.text(3.9, 0.85, "A  [r, K]", va="center")
    box(2.95, 1.3, 0.2, 0.72, "", ORANGE)
    ax.text(3.25, 1.66, "B  [N, r], times γ", va="center")
    arrow(ax, (1.45, 0.24), (1.05, 0.73))
    arrow(ax, (1.45, 0.24), (3.05, 0.73))
    arrow(ax, (3.05, 0.95), (3.05, 1.29))
    ax.text(3.12, 1.12, "r numbers", fontsize=7.5, va="center", color=GRAY)
    circle(2.05, 2.3)
    arrow(ax, (1.05, 1.86), (1.95, 2.25))
    arrow(ax, (3.05, 2.03), (2.18, 2.27))
    arrow(ax, (2.05, 2.42), (2.05, 2.62))
    ax.text(2.25, 2.48, "the same as one weight, W + γ B A", fontsize=7.5, color=BLUE, va="center")

    ax.text(6.7, 2.72, "bottleneck: behind the sublayer", ha="center", fontsize=9.5)
    box(5.6, 0.3, 2.2, 0.35, "W  [N, K], frozen", "#e8e8e8")
    box(6.55, 0.92, 1.25, 0.22, "down  [m, N]", SKY, 7.5)
    box(6.75, 1.32, 0.85, 0.22, "f", "white", 8)
    box(6.55, 1.72, 1.25, 0.22, "up  [N, m]", ORANGE, 7.5)
    arrow(ax, (6.7, 0.08), (6.7, 0.29))
    arrow(ax, (7.17, 0.66), (7.17, 0.91))
    arrow(ax, (7.17, 1.15), (7.17, 1.31))
    arrow(ax, (7.17, 1.55), (7.17, 1.71))
    arrow(ax, (6.0, 0.66), (6.0, 2.17))
    circle(6.0, 2.3)
    arrow(ax, (7.17, 1.95), (6.13, 2.28))
    arrow(ax, (6.0, 2.42), (6.0, 2.62))
    ax.text(5.92, 1.4, "h", ha="right", va="center")
    ax.text(8.2, 2.2, "f bends: no weight\ndoes the same", fontsize=7.5, color=WINE, va="center", ha="right")
    save(figure, "12_low_rank")


def task() -> None:
    """Left, held-out orders right by what is trained, with Wilson's intervals; right, loss by learning rate."""
    r = recorded()
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.4), width_ratios=(1.15, 1))
    bars: list[tuple[str, float, float, float, str]] = []
    for name, x in r["task"]["prompted"].items():
        bars.append((name, x["share"], x["low"], x["high"], GRAY))
    rows = r["task"]["rows"]
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        middle = sorted(mine, key=lambda row: row["share"])[len(mine) // 2]
        color = WINE if name == "whole model" else BLUE
        bars.append((name, middle["share"], middle["low"], middle["high"], color))
    for i, (_, mean, low, high, color) in enumerate(bars):
        axes[0].errorbar(mean, -i, xerr=[[max(0, mean - low)], [max(0, high - mean)]], fmt="o", ms=4.5, color=color,
                         capsize=2.5, lw=1.2)  # fmt: skip
    axes[0].set_yticks([-i for i in range(len(bars))], [bar[0] for bar in bars], fontsize=8)
    axes[0].set(xlabel=f"share right of {r['task']['orders']} held-out orders, 95 %", xlim=(-0.03, 1.03))
    axes[0].grid(axis="x", color="#eeeeee")
    axes[0].set_axisbelow(True)
    kinds = {"LoRA": (BLUE, "o"), "whole model": (WINE, "s")}
    for kind, (color, marker) in kinds.items():
        mine = [x for x in r["rates"]["rows"] if x["name"] == kind and "dev" in x]
        axes[1].loglog([x["rate"] for x in mine], [x["dev"]["nats"] for x in mine], color=color, marker=marker, ms=4,
                       lw=1.2, label="LoRA, r = 8" if kind == "LoRA" else kind)  # fmt: skip
        if mine:
            best = min(mine, key=lambda x: x["dev"]["nats"])
            axes[1].plot(best["rate"], best["dev"]["nats"], "o", mfc="none", mec=color, ms=10)
    axes[1].set(xlabel=f"learning rate, {r['rates']['steps']} steps of 8", ylabel="nats a token, orders to choose by")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    save(figure, "12_task")


def memory() -> None:
    """Bytes that stay between two steps, by what they are, as counted; the peak of a step where a GPU measured it."""
    rows = recorded()["memory"]["rows"]
    first = min(row["batch"] for row in rows)
    names = ["whole model", "LoRA, r = 8", "LoRA, r = 8, bf16", "QLoRA, r = 8, bf16"]
    chosen = {row["name"]: row for row in rows if row["batch"] == first}
    labels = ["whole model, fp32", "LoRA, fp32 weights", "LoRA, bf16 weights", "QLoRA, int4 and bf16"]
    figure, ax = plt.subplots(figsize=(7.4, 2.3))
    for i, name in enumerate(names):
        row, left = chosen[name], 0.0
        for key, color in (("weights", "#bbbbbb"), ("gradients", ORANGE), ("optimizer", BLUE)):
            ax.barh(-i, row[key] / 1e6, 0.6, left=left, color=color, label=key if i == 0 else None)
            left += row[key] / 1e6
        text = f" {left:,.0f} MB"
        if "peak" in row:
            label = f"peak of a step of {first} orders"
            ax.plot(row["peak"] / 1e6, -i, "D", color=BLACK, ms=4, label=label if i == 0 else None)
        ax.text(left, -i, text, va="center", fontsize=8)
    ax.set_yticks([-i for i in range(len(names))], labels)
    ax.set_xlabel("MB")
    ax.margins(x=0.12)
    ax.legend(fontsize=8, loc="lower right")
    save(figure, "12_memory")


def sorted_tokens() -> None:
    """Six tokens of two adapters and one of none: as they come, sorted, and cut into blocks of two."""
    figure, ax = canvas(7.8, 2.45)
    mine, colors = [2, 0, 1, 2, 2, 1], {0: "#e0e0e0", 1: SKY, 2: ORANGE}
    order = sorted(range(6), key=lambda t: mine[t])
    unit, x0 = 0.62, 1.75

    def token(x: float, y: float, t: int, width: float = 0.56) -> None:
        ax.add_patch(Rectangle((x, y), width, 0.36, fc=colors[mine[t]], ec=GRAY, lw=0.6))
        ax.text(x + width / 2, y + 0.18, f"{t}", ha="center", va="center", fontsize=9)

    for t in range(6):
        token(x0 + unit * t, 1.95, t)
        at = order.index(t)
        ax.plot([x0 + unit * (t + 0.45), x0 + unit * (at + 0.45)], [1.93, 1.6], color=colors[mine[t]], lw=1.4)
    for place, t in enumerate(order):
        token(x0 + unit * place, 1.22, t)
    for place, (label, color) in {0: ("none", GRAY), 1: ("adapter 1", BLUE), 3: ("adapter 2", "#9a6a00")}.items():
        ax.text(x0 + unit * place, 1.1, label, fontsize=7.5, va="top", color=color)
    blocks = [("0", [], "no adapter:\nnothing to add"), ("1", [1, 2], ""), ("2", [], "no tokens\nleft"),
              ("3", [3, 4], ""), ("4", [5], "")]  # fmt: skip
    for i, (name, places, note) in enumerate(blocks):
        x = x0 + 1.17 * i - 0.45
        ax.text(x + 0.55, 0.66, f"block {name}", ha="center", fontsize=8)
        ax.add_patch(Rectangle((x, 0.12), 1.1, 0.44, fc="white", ec=GRAY, lw=0.8, ls="-" if places else ":"))
        for j, place in enumerate(places):
            token(x + 0.06 + 0.5 * j, 0.16, order[place], 0.46)
        ax.text(x + 0.55, 0.34, note, ha="center", va="center", fontsize=6.5, color=GRAY)
    for y, label in ((2.13, "tokens"), (1.4, "order"), (0.34, "programs")):
        ax.text(1.15, y, label, ha="right", va="center")
    save(figure, "12_sorted")


if __name__ == "__main__":
    low_rank()
    task()
    memory()
    sorted_tokens()
