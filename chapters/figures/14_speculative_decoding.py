"""Draw the figures of chapter 14: `python chapters/figures/14_speculative_decoding.py` writes 14_*.svg beside this."""

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, Rectangle
from style import canvas, look, save

from minillm.config import StepCosts
from minillm.engine.draft_length import seconds
from minillm.learn import COLORS
from minillm.learn.excerpts import measured_on, results

BLUE, ORANGE, WINE, SKY, BLACK = COLORS
GRAY = "#777777"
TASKS = {"copy-edit": (BLUE, "o"), "summary": (ORANGE, "s"), "story": (WINE, "^")}
WAYS = {"chosen": (BLUE, "o"), "always 8": (SKY, "s"), "head": (ORANGE, "^")}
look(9)


def recorded() -> dict:
    """By a GPU where it is recorded, else by a CPU."""
    return results("chapter_14", measured_on("chapter_14", "h100", "h200") or "cpu-2-cores")


def step() -> None:
    """One step with four guesses: what is computed, drawn, given and dropped."""
    figure, ax = canvas(8.0, 3.1)
    x0, unit, width = 2.1, 1.12, 0.98
    text = ["the", "old", "stone", "road", "was"]
    drawn = ["old", "stone", "bridge", "is", "in"]

    def box(i: int, y: float, label: str, color: str, edge: str = GRAY, style: str = "-") -> None:
        ax.add_patch(Rectangle((x0 + unit * i, y), width, 0.36, fc=color, ec=edge, lw=0.9, ls=style))
        ax.text(x0 + unit * i + width / 2, y + 0.18, label, ha="center", va="center", fontsize=9,
                color=GRAY if color == "white" and style == ":" else BLACK)  # fmt: skip

    for i, word in enumerate(text):
        box(i, 0.55, word, "#e8e8e8" if i == 0 else SKY)
        ax.text(x0 + unit * i + width / 2, 0.4, "last token" if i == 0 else f"guess {i}", ha="center", va="top",
                fontsize=7.5, color=GRAY)  # fmt: skip
        ax.add_patch(FancyArrowPatch((x0 + unit * i + width / 2, 0.92), (x0 + unit * i + width / 2, 1.2),
                                     arrowstyle="-|>", mutation_scale=8, color=GRAY, shrinkA=0, shrinkB=0))  # fmt: skip
    ax.add_patch(Rectangle((x0, 1.21), unit * 4 + width, 0.34, fc="white", ec=GRAY, lw=0.9))
    ax.text(x0 + unit * 2 + width / 2, 1.38, "one forward: the weights are read once", ha="center", va="center")
    for i, word in enumerate(drawn):
        ax.add_patch(FancyArrowPatch((x0 + unit * i + width / 2, 1.56), (x0 + unit * i + width / 2, 1.83),
                                     arrowstyle="-|>", mutation_scale=8, color=GRAY, shrinkA=0, shrinkB=0))  # fmt: skip
        color, style = ("#cfe8cf", "-") if i < 2 else (ORANGE, "-") if i == 2 else ("white", ":")
        box(i, 1.84, word, color, style=style)
    notes = ["= guess 1", "= guess 2", "not guess 3", "behind a wrong\nguess: dropped", "dropped"]
    for i, note in enumerate(notes):
        ax.text(x0 + unit * i + width / 2, 2.28, note, ha="center", va="bottom", fontsize=7.5,
                color=GRAY if i > 2 else BLACK)  # fmt: skip
    ax.plot([x0, x0 + 2 * unit + width], [2.66, 2.66], color=BLACK, lw=1.2)
    ax.text(x0 + unit + width / 2, 2.7, "given: three tokens", ha="center", va="bottom")
    for y, label in ((0.73, "computed"), (2.02, "drawn, each with\nits place's noise")):
        ax.text(x0 - 0.2, y, label, ha="right", va="center")
    note = "their keys and values: overwritten by the next step"
    ax.text(x0 + 3.5 * unit + width / 2, 0.08, note, ha="center", fontsize=7.5, color=GRAY)
    ax.plot([x0 + 3 * unit, x0 + 4 * unit + width], [0.22, 0.22], color=GRAY, lw=0.8)
    save(figure, "14_step")


def rule() -> None:
    """p and q of three tokens, what they have in common, and the residual."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.6, 0.2])
    both = np.minimum(p, q)
    figure, axes = plt.subplots(1, 3, figsize=(8.2, 2.3), sharey=True)
    place = np.arange(3)
    axes[0].bar(place, both, 0.6, color=SKY, label="kept: min(p, q)")
    axes[0].bar(place, q - both, 0.6, bottom=both, color="white", ec=WINE, hatch="////", lw=0.8, label="rejected")
    axes[0].set_title("guesses, drawn from q")
    axes[1].bar(place, p - both, 0.6, color=ORANGE, label="max(0, p − q)")
    axes[1].set_title("instead of the rejected")
    axes[2].bar(place, both, 0.6, color=SKY)
    axes[2].bar(place, p - both, 0.6, bottom=both, color=ORANGE)
    for x, y in zip(place, p, strict=True):
        axes[2].plot([x - 0.36, x + 0.36], [y, y], color=BLACK, lw=1.6, label="p" if x == 0 else None)
    axes[2].set_title("together: p")
    for ax in axes:
        ax.set_xticks(place, ["token 1", "token 2", "token 3"])
        ax.legend(fontsize=7.5, loc="upper right")
        ax.set_ylim(0, 0.8)
    axes[0].set_ylabel("probability")
    figure.tight_layout()
    save(figure, "14_rule")


def gain() -> None:
    """Speed-up by the number of guesses; what a check costs by the batch."""
    r = recorded()
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.2))
    k = np.arange(1, 17)
    for alpha, color in ((0.9, BLUE), (0.6, ORANGE), (0.3, WINE)):
        tau = (1 - alpha ** (k + 1)) / (1 - alpha)
        axes[0].plot(k, tau, color=color, lw=1.4, label=f"α = {alpha}")
        axes[0].plot(k, tau / (1 + 0.1 * k), color=color, lw=1.2, ls="--")
    axes[0].plot([], [], color=GRAY, label="guesses free")
    axes[0].plot([], [], color=GRAY, ls="--", label="c = 0.1")
    axes[0].axhline(1, color=GRAY, lw=0.8, ls=":")
    axes[0].set(xlabel="guesses k", ylabel="speed-up, checks free", ylim=(0, 8.6))
    axes[0].legend(fontsize=8)
    ceil = results("engine_stream", "h200")["ceilings"]
    ridge = ceil["matmul FLOP/s"] / ceil["copy bytes/s"]
    batch = np.geomspace(1, 512, 200)
    axes[1].semilogx(batch, np.maximum(1, 9 * batch / ridge) / np.maximum(1, batch / ridge), color=BLACK, lw=1.3,
                     base=2, label="roofline, bf16 weights")  # fmt: skip
    few = ridge / 4
    axes[1].semilogx(batch, np.maximum(1, 9 * batch / few) / np.maximum(1, batch / few), color=GRAY, lw=1.2, ls="--",
                     base=2, label="roofline, 4-bit weights")  # fmt: skip
    costs = StepCosts(*(tuple(map(tuple, r["batches"]["costs"][kind])) for kind in ("plain", "checked")))
    sizes = np.array([n for n, _ in costs.plain])
    cost = [seconds(costs.checked, 9 * n) / seconds(costs.plain, n) for n in sizes]
    device = {"h100": "H100", "h200": "H200"}.get(measured_on("chapter_14", "h100", "h200") or "", "2 CPU cores")
    axes[1].semilogx(sizes, cost, "o-", color=BLUE, ms=4, lw=1.2, base=2, label=f"SmolLM2 on {device}")
    axes[1].set(xlabel="batch", ylabel="check of 8 guesses over a plain step", ylim=(0, 10))
    axes[1].set_xticks([4**e for e in range(5)], [str(4**e) for e in range(5)])
    axes[1].legend(fontsize=8, loc="upper left")
    figure.tight_layout()
    save(figure, "14_gain")


def tasks() -> None:
    """Left, how often a guess is right by place; right, one stream's speed over plain decoding."""
    rows = [x for x in recorded()["tasks"]["rows"] if x["temperature"] == 0]
    figure, axes = plt.subplots(1, 2, figsize=(8.8, 3.0), width_ratios=(1.2, 1))
    for x in rows:
        color, marker = TASKS[x["task"]]
        always = x["engines"]["always 8"]
        counts = [always["checks"], *always["right by place"]]
        rates = [b / a for a, b in pairwise(counts) if a]
        axes[0].plot(range(1, len(rates) + 1), rates, color=color, marker=marker, ms=4, lw=1.3, label=x["task"])
    axes[0].set(xlabel="place of the guess", ylabel="right, where those before are", ylim=(0, 1.04))
    axes[0].set_xticks(range(1, 9))
    axes[0].legend(fontsize=8)
    for i, x in enumerate(rows):
        kinds = [(name, color) for name, (color, _) in WAYS.items() if name in x["engines"]]
        width = 0.8 / len(kinds)
        for j, (name, color) in enumerate(kinds):
            value, at = x["engines"][name]["of plain"], i + width * (j - (len(kinds) - 1) / 2)
            axes[1].bar(at, value, 0.94 * width, color=color, label=name if i == 0 else None)
            axes[1].text(at, value, f"{value:.2f}", ha="center", va="bottom", fontsize=7.5)
    axes[1].axhline(1, color=GRAY, lw=0.8, ls=":")
    axes[1].set_xticks(range(len(rows)), [x["task"] for x in rows])
    axes[1].set_ylabel("tokens/s over plain decoding")
    axes[1].margins(y=0.12)
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    save(figure, "14_tasks")


def batches() -> None:
    """Speed over plain decoding's, by batch."""
    rows = recorded()["batches"]["rows"]
    figure, axes = plt.subplots(1, len(TASKS), figsize=(9.0, 2.8), sharey=True)
    for ax, task in zip(axes, TASKS, strict=True):
        mine = [x for x in rows if x["task"] == task]
        sizes = [x["batch"] for x in mine]
        for name, (color, marker) in WAYS.items():
            if all(name in x["engines"] for x in mine):
                ax.semilogx(sizes, [x["engines"][name]["of plain"] for x in mine], base=2, color=color, marker=marker,
                            ms=4, lw=1.4, label=name)  # fmt: skip
        ax.axhline(1, color=GRAY, lw=0.8, ls=":")
        shown = sizes[::2] if len(sizes) > 4 else sizes
        ax.set_xticks(shown, [str(n) for n in shown])
        ax.set(xlabel="requests at once", title=task)
    axes[0].set_ylabel("tokens/s over plain decoding")
    axes[0].set_ylim(bottom=0)
    axes[-1].legend(fontsize=8)
    figure.tight_layout()
    save(figure, "14_batches")


def exits() -> None:
    """How often an early layer says the model's token, and the speed-up that this would give."""
    r = recorded()["exits"]
    found = {int(n): x for n, x in r["rows"].items()}
    layers, share = r["layers"], r["head's share"]

    def gained(n: int) -> float:
        cost, row = (1 - share) * n / layers + share, found[n]["in a row"]
        return max((1 + sum(row[:k])) / (1 + k * cost) for k in range(1, len(row) + 1))

    figure, ax = plt.subplots(figsize=(6.6, 2.9))
    ax.plot(list(found), [x["agree"] for x in found.values()], "o-", color=BLUE, ms=3.5, lw=1.3,
            label="says the model's token")  # fmt: skip
    ax.plot(list(found), [gained(n) for n in found], "s--", color=WINE, ms=3.5, lw=1.2,
            label="best speed-up, checks free")  # fmt: skip
    if where := measured_on("draft_head", "h100", "h200"):
        found_rates = results("draft_head", where)["agreement of guess 1, 2, ..., those before right"].values()
        rate = float(np.mean([x["trained"][0] for x in found_rates]))
        ax.plot(layers, rate, "*", color=ORANGE, ms=11, label=f"a trained head does: {rate:.0%}")
    ax.axhline(1, color=GRAY, lw=0.8, ls=":")
    ax.set(xlabel=f"layers before the exit, of {layers}", ylim=(0, max(1.35, 1.1 * max(map(gained, found)))))
    ax.legend(fontsize=8, loc="upper left")
    save(figure, "14_exits")


if __name__ == "__main__":
    step()
    rule()
    gain()
    tasks()
    batches()
    exits()
