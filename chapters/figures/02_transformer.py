"""Draw the figures of chapter 2: `python chapters/figures/02_transformer.py` writes 02_*.svg beside this file."""

import math

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from style import look, save

from minillm.config import ModelConfig
from minillm.learn import COLORS
from minillm.learn.excerpts import results

BLUE, ORANGE, WINE, SKY, BLACK = COLORS
GRAY, LIGHT = "#777777", "#e8edf3"
KINDS = {"none": (BLACK, ":"), "learned": (ORANGE, "-."), "sinusoidal": (WINE, "--"), "rotary": (BLUE, "-")}
look(9)


def blank(ax: Axes, width: float, height: float) -> None:
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.axis("off")


def box(
    ax: Axes, x: float, y: float, width: float, height: float, text: str, color: str = LIGHT, size: float = 9
) -> None:
    """A rounded box around its center."""
    style = "round,pad=0,rounding_size=0.12"
    ax.add_patch(
        FancyBboxPatch((x - width / 2, y - height / 2), width, height, boxstyle=style, fc=color, ec="black", lw=0.8)
    )
    ax.text(x, y, text, ha="center", va="center", fontsize=size)


def arrow(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str = "black", width: float = 1.0
) -> None:
    ax.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=color, lw=width, shrinkA=0, shrinkB=0)
    )


# ---- the idea ------------------------------------------------------------------------------------------------------


def attention_table() -> None:
    """Four queries and four keys: scores, causal mask and softmax, weighted values."""
    exponentials = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 2, 5, 1], [4, 1, 1, 2]])
    weights = np.tril(exponentials) / np.tril(exponentials).sum(1, keepdims=True)
    values = np.array([[8, 0], [0, 8], [4, 4], [0, 0]])
    output = weights @ values
    names = {1: "0", 2: "ln 2", 4: "ln 4", 5: "ln 5"}
    figure, ax = plt.subplots(figsize=(7.4, 2.9))
    blank(ax, 18.4, 7)

    def grid(left: float, texts: list[list[str]], shade: np.ndarray, title: str, hidden: bool = False) -> None:
        rows, columns = len(texts), len(texts[0])
        for i in range(rows):
            for j in range(columns):
                dark = float(shade[i, j])
                face = "#d9d9d9" if hidden and j > i else plt.cm.Blues(0.75 * dark)
                ax.add_patch(Rectangle((left + j, 4.2 - i), 1, 1, fc=face, ec="white", lw=1.5))
                ax.text(
                    left + j + 0.5,
                    4.7 - i,
                    texts[i][j],
                    ha="center",
                    va="center",
                    color="white" if dark > 0.7 else "black",
                    fontsize=8.5,
                )
        ax.text(left + columns / 2, 6.1, title, ha="center", va="center")

    scores = np.log(exponentials)
    grid(
        1.2,
        [[names[int(e)] for e in row] for row in exponentials],
        scores / scores.max() * 0.6,
        "scores\n$q\\,k^T/\\sqrt{D}$",
    )
    masked = [["0" if j > i else f"{fraction(weights[i, j])}" for j in range(4)] for i in range(4)]
    grid(7.2, masked, weights, "weights: softmax,\nfuture hidden", hidden=True)
    grid(13.0, [[str(v) for v in row] for row in values], np.zeros((4, 2)), "values\n$v$")
    grid(16.2, [[f"{v:g}" for v in row] for row in output], np.zeros((4, 2)), "output")
    for i in range(4):
        ax.text(1.05, 4.7 - i, f"query {i + 1}", ha="right", va="center", fontsize=8)
    for left in (1.2, 7.2):
        for j in range(4):
            ax.text(left + j + 0.5, 0.85, f"key {j + 1}", ha="center", va="center", fontsize=7.5)
    for x, sign in ((6.2, "→"), (12.1, "×"), (15.6, "=")):
        ax.text(x, 3.2, sign, ha="center", va="center", fontsize=14)
    ax.add_patch(Rectangle((7.2, 2.2), 4, 1, fill=False, ec=ORANGE, lw=2))
    ax.add_patch(Rectangle((16.2, 2.2), 2, 1, fill=False, ec=ORANGE, lw=2))
    save(figure, "02_attention")


def fraction(value: float) -> str:
    """0.625 -> "5/8"."""
    return str(round(value)) if value in (0, 1) else f"{round(value * 8)}/8"


def layer() -> None:
    """The residual stream with its two additions, and what lies on the side roads."""
    figure, ax = plt.subplots(figsize=(7.4, 4.5))
    blank(ax, 20, 12)
    y = 2.0
    ax.add_patch(Rectangle((2.4, 0.2), 13.6, 11.6, fc="#fbfbfb", ec=GRAY, ls="--", lw=0.9))
    ax.text(15.8, 0.35, "one layer, repeated (SmolLM2: 30 times)", ha="right", va="bottom", color=GRAY, fontsize=8)
    arrow(ax, (1.9, y), (16.5, y), BLUE, 4)
    ax.text(2.7, 1.2, "residual stream  [B, T, d_model]", color=BLUE)
    box(ax, 1.0, y, 1.8, 1.3, "embed\ntokens", size=8.5)
    box(ax, 17.3, y, 1.5, 1.3, "norm", size=8.5)
    box(ax, 19.2, y, 1.3, 1.3, "head", size=8.5)
    arrow(ax, (18.05, y), (18.55, y))
    attention_part = [
        "RMSNorm",
        "q, k, v\nprojections",
        "RoPE\non q and k",
        "attention to\nearlier tokens",
        "o projection",
    ]
    mlp_part = ["RMSNorm", "gate and up\nprojections", "silu(gate) · up", "down projection"]
    for left, parts, color, title in (
        (3.0, attention_part, "#fde9d2", "attention: mixes tokens"),
        (9.6, mlp_part, "#dbe7f5", "MLP: each token by itself"),
    ):
        middle, right, step = left + 2.6, left + 5.4, 7.9 / len(parts)
        heights = [3.0 + step * (i + 0.5) for i in range(len(parts))]
        # Up on the left, through the stack, down on the right.
        ax.plot([left, left], [y, heights[0]], color="black", lw=1)
        arrow(ax, (left, heights[0]), (middle - 1.75, heights[0]))
        for i, (part, at) in enumerate(zip(parts, heights, strict=True)):
            box(ax, middle, at, 3.5, step * 0.7, part, color, 8.5)
            if i:
                arrow(ax, (middle, heights[i - 1] + step * 0.35), (middle, at - step * 0.35))
        ax.plot([middle + 1.75, right, right], [heights[-1], heights[-1], y + 0.5], color="black", lw=1)
        arrow(ax, (right, y + 1.2), (right, y + 0.36))
        ax.add_patch(plt.Circle((right, y), 0.36, fc="white", ec="black", zorder=5))
        ax.text(right, y - 0.02, "+", ha="center", va="center", zorder=6, fontsize=11)
        ax.text(middle, 11.3, title, ha="center", va="center")
    save(figure, "02_layer")


def sharing() -> None:
    """Who reads whose keys and values: multi-head, grouped-query, multi-query, in SmolLM2's shape."""
    config = ModelConfig.from_dict(results("chapter_02")["numbers"]["config"])
    figure, axes = plt.subplots(3, 1, figsize=(7.4, 3.9))
    for ax, kv_heads, name in zip(
        axes, (9, 3, 1), ("multi-head", "grouped-query\n(SmolLM2)", "multi-query"), strict=True
    ):
        blank(ax, 20, 3.5)
        size = 2 * config.num_hidden_layers * kv_heads * config.head_dim * 2
        ax.text(0, 1.7, name, va="center")
        ax.text(
            16.6, 1.7, f"{kv_heads} key/value head{'s' if kv_heads > 1 else ''}\n{size:,} bytes a token", va="center"
        )
        for h in range(9):
            x, shared = 4.6 + 1.3 * h, 4.6 + 1.3 * (h // (9 // kv_heads) * (9 // kv_heads) + (9 // kv_heads - 1) / 2)
            ax.plot([x, shared], [2.55, 1.0], color=GRAY, lw=0.8)
            ax.add_patch(plt.Circle((x, 2.75), 0.42, fc="#dbe7f5", ec=BLUE))
            ax.text(x, 2.73, f"q{h}", ha="center", va="center", fontsize=7.5)
        for h in range(kv_heads):
            x = 4.6 + 1.3 * (h * (9 // kv_heads) + (9 // kv_heads - 1) / 2)
            ax.add_patch(Rectangle((x - 0.5, 0.2), 1.0, 0.8, fc="#fde9d2", ec=ORANGE))
            ax.text(x, 0.58, f"kv{h}", ha="center", va="center", fontsize=7.5)
    save(figure, "02_heads_sharing")


def rotation() -> None:
    """A fast and a slow pair turning with position, and two pairs of positions at the same distance."""
    figure, axes = plt.subplots(1, 3, figsize=(7.4, 2.75))
    circle = np.linspace(0, 2 * math.pi, 200)
    for ax in axes:
        ax.plot(np.cos(circle), np.sin(circle), color="#cccccc", lw=0.8)
        ax.set(xlim=(-1.35, 1.35), ylim=(-1.35, 1.35), aspect="equal")
        ax.axis("off")

    def hand(ax: Axes, angle: float, text: str, color: str, reach: float = 1.18) -> None:
        arrow(ax, (0, 0), (math.cos(angle), math.sin(angle)), color, 1.4)
        ax.text(
            reach * math.cos(angle), reach * math.sin(angle), text, ha="center", va="center", color=color, fontsize=8
        )

    config = ModelConfig.from_dict(results("chapter_02")["numbers"]["config"])
    slower = config.rope_theta ** (-2 * 4 / config.head_dim)
    for ax, frequency, title in (
        (axes[0], 1.0, "pair 0: 1 radian a token"),
        (axes[1], slower, f"pair 4: {slower:.2f} radian"),
    ):
        for p in range(6):
            hand(ax, frequency * p, str(p), plt.cm.viridis(p / 7))
        ax.set_title(title, fontsize=9)
    start_q, start_k, frequency = 0.3, 0.9, 0.35
    for shift, color in ((0, BLUE), (7, ORANGE)):
        q, k = start_q + frequency * (5 + shift), start_k + frequency * (2 + shift)
        hand(axes[2], q, f"q{5 + shift}", color)
        hand(axes[2], k, f"k{2 + shift}", color)
        arc = np.linspace(k, q, 40)
        axes[2].plot(0.45 * np.cos(arc), 0.45 * np.sin(arc), color=color, lw=2)
    axes[2].set_title("distance 3 at two places:\nthe same angle between", fontsize=9)
    save(figure, "02_rope")


# ---- measured ------------------------------------------------------------------------------------------------------


def positions() -> None:
    """Learning curves, and accuracy by position up to four times the trained length."""
    measured = results("chapter_02")["positions"]
    figure, axes = plt.subplots(2, 2, figsize=(7.4, 4.6))
    titles = {"three back": "“which symbol stood three places back?”", "first": "“which symbol came first?”"}
    for row, (task, runs) in zip(axes, measured["runs"].items(), strict=True):
        for kind, run in runs.items():
            color, dashes = KINDS[kind]
            row[0].plot(run["loss"], color=color, ls=dashes, label=kind, lw=1.4)
            row[1].plot(run["accuracy"], color=color, ls=dashes, label=kind, lw=1.4)
            if "accuracy, window" in run:
                row[1].plot(run["accuracy, window"], color=SKY, lw=2.2, label="rotary, window of 32")
        row[0].set(title=f"{titles[task]}\ntraining loss", ylim=(0, 2.9), xlabel="step", xlim=(0, 300))
        row[1].set(ylim=(0, 1.06), xlabel="position", xlim=(0, measured["tested length"]))
        row[1].set_title(f"accuracy by position\n(trained on {measured['trained length']})")
        row[1].axvline(measured["trained length"], color="black", lw=0.8, ls=":")
        row[1].axhline(1 / measured["symbols"], color="black", lw=0.8, ls=":")
    axes[1, 1].text(1, 0.08, "guessing", fontsize=7.5, va="bottom")
    axes[1, 1].text(36, 0.4, "none and learned stay at 1.00", fontsize=7.5)
    axes[1, 0].legend(fontsize=8)
    window = [line for line in axes[0, 1].get_lines() if "window" in line.get_label()]
    axes[0, 1].legend(handles=window, fontsize=8, loc=(0.45, 0.76))
    figure.tight_layout()
    save(figure, "02_positions")


def beyond() -> None:
    """SmolLM2's loss past the context it was trained with."""
    measured = results("chapter_02")["beyond"]
    figure, ax = plt.subplots(figsize=(7.4, 2.5))
    labels = {"plain": "as trained", "linear": "linear scaling by 2", "llama3": "Llama 3 scaling by 2"}
    for (name, losses), look_of in zip(
        measured["loss"].items(), ((BLUE, "o-"), (ORANGE, "s--"), (WINE, "^-.")), strict=True
    ):
        middles = [(i + 0.5) * measured["bin"] for i in range(len(losses))]
        ax.plot(middles, losses, look_of[1], color=look_of[0], label=labels[name], ms=4, lw=1.4)
    ax.axvline(measured["trained context"], color="black", lw=0.8, ls=":")
    ax.text(measured["trained context"] + 80, ax.get_ylim()[1], "trained context", fontsize=8, va="top")
    ax.set(xlabel="position", ylabel="loss, nats a token", ylim=(0, None))
    ax.legend(fontsize=8, loc="lower left", ncols=3, frameon=True, framealpha=1, edgecolor="none")
    save(figure, "02_beyond")


def maps() -> None:
    """The best head of each of three kinds on a real sentence."""
    measured = results("chapter_02")["heads"]
    words = [w.strip() or "_" for w in measured["sentence"]["tokens"]]
    figure, axes = plt.subplots(1, 3, figsize=(9.4, 3.9), sharey=True)
    for ax, name in zip(axes, ("previous token", "first token", "induction"), strict=True):
        where = measured["best"][name][0]
        ax.imshow(measured["sentence"]["maps"][name], cmap="Blues", vmin=0, vmax=1)
        ax.set_title(f"{name}\nlayer {where[0]}, head {where[1]}", fontsize=10)
        ax.set_xticks(range(len(words)), words, rotation=90, fontsize=8)
        ax.set_yticks(range(len(words)), words, fontsize=8)
        ax.spines[["top", "right"]].set_visible(True)
        ax.tick_params(length=0)
    axes[0].set_ylabel("token that looks")
    axes[1].set_xlabel("token that is looked at")
    figure.tight_layout()
    save(figure, "02_maps")


def silenced() -> None:
    """What silencing each head, one at a time, does to copying."""
    measured = results("chapter_02")["heads"]
    extra = np.array(measured["each"]).T - measured["loss"][1]  # [heads, layers]
    figure, ax = plt.subplots(figsize=(7.4, 2.5))
    image = ax.imshow(extra, cmap="RdBu_r", vmin=-extra.max(), vmax=extra.max(), aspect="auto")
    for head, layer in np.argwhere(extra > 0.15 * extra.max()):
        ax.text(layer, head, f"{extra[head, layer]:.1f}", ha="center", va="center", fontsize=7,
                color="white" if extra[head, layer] > 0.5 * extra.max() else "black")  # fmt: skip
    ax.set(xlabel="layer", ylabel="head", xticks=range(0, extra.shape[1], 2), yticks=range(extra.shape[0]))
    figure.colorbar(image, ax=ax, label="loss added, nats")
    save(figure, "02_silenced")


def cost() -> None:
    """Where the time of a forward goes, and what arithmetic rate it reaches."""
    measured = results("chapter_02")
    rows, ceiling = measured["forward"], measured["ceilings"]["matmul FLOP/s"]
    parts = {
        "projections": (BLUE, ""),
        "mlp": (SKY, ""),
        "attention": (ORANGE, ""),
        "norms": (WINE, ""),
        "head": (BLACK, ""),
        "other": ("white", "///"),
    }
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 2.9), width_ratios=(1.35, 1))
    names = [f"{row['tokens']:,}" for row in rows]
    bottom = np.zeros(len(rows))
    for part, (color, hatch) in parts.items():
        share = np.array([row["parts"][part] / sum(row["parts"].values()) for row in rows])
        axes[0].bar(
            names, share, bottom=bottom, color=color, hatch=hatch, edgecolor="black", lw=0.4, label=part, width=0.75
        )
        bottom += share
    axes[0].set(title="share of a forward's time", xlabel="tokens", ylim=(0, 1))
    axes[0].tick_params(axis="x", labelsize=8)
    axes[0].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    axes[1].plot(
        [row["tokens"] for row in rows], [row["flops"] / row["seconds"] / 1e9 for row in rows], "o-", color=BLUE, ms=4
    )
    axes[1].axhline(ceiling / 1e9, color="black", lw=0.8, ls=":")
    axes[1].text(1, ceiling / 1e9 * 0.97, "large matmul", fontsize=8, va="top")
    axes[1].set(title="GFLOP/s reached", xlabel="tokens", xscale="log", ylim=(0, None))
    figure.tight_layout()
    save(figure, "02_cost")


if __name__ == "__main__":
    for draw in (attention_table, layer, sharing, rotation, positions, beyond, maps, silenced, cost):
        draw()
