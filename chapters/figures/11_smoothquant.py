"""Draw the figures of chapter 11: `python chapters/figures/11_smoothquant.py` writes 11_*.svg beside this file."""

import math

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from style import canvas, look, save

from minillm.learn import COLORS
from minillm.learn.excerpts import measured_on, results

BLUE, ORANGE, WINE, SKY, BLACK = COLORS
GRAY = "#777777"
look(9)
SLOTS = {
    "qkv_proj": (BLUE, "o"),
    "o_proj": (SKY, "v"),
    "gate_up_proj": (ORANGE, "s"),
    "down_proj": (WINE, "^"),
}


def recorded() -> dict:
    """The file of a GPU where there is one, else the CPU's."""
    return results("chapter_11", measured_on("chapter_11", "h100", "h200", "cpu-2-cores"))


def outliers() -> None:
    """How large the channels of one layer are, and the largest one of every layer."""
    r = recorded()["outliers"]
    p = r["picture"]
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.0))
    place = np.linspace(0, 100, len(p["x"]))
    axes[0].semilogy(place, p["x"], color=BLUE, label="inputs")
    axes[0].semilogy(place, p["w"], color=ORANGE, label="weights")
    axes[0].semilogy(place, p["x, smoothed"], color=BLUE, ls="--", lw=1, label="inputs, smoothed")
    axes[0].semilogy(place, p["w, smoothed"], color=ORANGE, ls="--", lw=1, label="weights, smoothed")
    axes[0].set(xlabel="channels, largest input first, %", ylabel="largest size", title=p["layer"])
    axes[0].legend(fontsize=7.5)
    for slot, (color, marker) in SLOTS.items():
        chosen = [x for name, x in r["layers"].items() if name.endswith(slot)]
        ratio = [x["largest"] / x["median"] for x in chosen]
        axes[1].semilogy(range(len(ratio)), ratio, color=color, marker=marker, ms=3, lw=0.9, label=slot)
    axes[1].set(xlabel="layer", title="largest channel over the median one")
    axes[1].legend(fontsize=7.5)
    figure.tight_layout()
    save(figure, "11_outliers")


def tokens() -> None:
    """The largest number of each token where massive activations are, and in the stream."""
    r = recorded()["outliers"]
    p, streams = r["picture"], r["streams"]
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 2.7))
    axes[0].semilogy(p["tokens"], color=WINE, marker=".", lw=0.6)
    axes[0].axhline(p["tokens' median number"], color=GRAY, lw=0.8, ls=":")
    median = p["tokens' median number"]
    axes[0].text(len(p["tokens"]) - 1, median * 1.2, "median of all numbers", ha="right", color=GRAY, fontsize=8)
    axes[0].set(xlabel="token", ylabel="largest size", title=f"input of {p['deep']}")
    axes[1].semilogy([s["first"] for s in streams], color=WINE, marker="o", ms=3, label="first token, largest")
    axes[1].semilogy([s["rest"] for s in streams], color=BLUE, marker="s", ms=3, label="other tokens, largest")
    axes[1].semilogy([s["median"] for s in streams], color=GRAY, lw=0.9, ls="--", label="median number")
    axes[1].set(xlabel="layers done", title="the residual stream")
    axes[1].legend(fontsize=7.5)
    figure.tight_layout()
    save(figure, "11_tokens")


def by_hand() -> None:
    """Two channels in 4 bits, before and after migration."""
    figure, ax = canvas(8.2, 2.0)
    rows = (
        (1.25, "plain", (("64", "59.7"), ("1", "0")), (("0.25", "0"), ("4", "3.73")), "0"),
        (0.35, "s = (16, 0.5)", (("4", "3.73"), ("2", "2.13")), (("4", "3.73"), ("2", "2.13")), "18.5"),
    )
    ax.text(2.35, 1.85, "x", ha="center")
    ax.text(4.75, 1.85, "w", ha="center")
    ax.text(7.1, 1.85, "x · w = 20", ha="center")
    for y, name, x, w, answer in rows:
        ax.text(0.05, y, name, va="center")
        for x0, pairs, color in ((1.55, x, BLUE), (3.95, w, ORANGE)):
            for i, (exact, back) in enumerate(pairs):
                ax.add_patch(Rectangle((x0 + 0.8 * i, y - 0.22), 0.76, 0.44, fc="white", ec=color))
                ax.text(x0 + 0.8 * i + 0.38, y, exact, ha="center", va="center")
                ax.text(x0 + 0.8 * i + 0.38, y - 0.36, back, ha="center", va="center", fontsize=8, color=WINE)
        ax.text(7.1, y, answer, ha="center", va="center", color=WINE, fontsize=11)
        ax.text(1.5, y - 0.36, "read back", ha="right", va="center", fontsize=8, color=WINE)
    save(figure, "11_by_hand")


def folding() -> None:
    """Where each division and each multiplication goes in a layer."""
    figure, ax = canvas(8.6, 2.15)

    def box(x: float, y: float, text: str, color: str, width: float = 1.05) -> None:
        ax.add_patch(
            FancyBboxPatch((x, y - 0.19), width, 0.38, boxstyle="round,pad=0.02", fc="white", ec=color, lw=1.3)
        )
        ax.text(x + width / 2, y, text, ha="center", va="center", fontsize=8)

    def arrow(x: float, y: float, to: float) -> None:
        ax.add_patch(FancyArrowPatch((x, y), (to, y), arrowstyle="-|>", mutation_scale=9, color=BLACK, shrinkA=0,
                                     shrinkB=0))  # fmt: skip

    rows = (
        (1.55, ("norm", "q  k  v", "attention", "o"), ("÷ s", "· s      v ÷ s'", "", "· s'")),
        (0.55, ("norm", "gate  up", "silu(g) · u", "down"), ("÷ s", "· s      up ÷ s'", "", "· s'")),
    )
    for y, names, marks in rows:
        for i, (name, mark) in enumerate(zip(names, marks, strict=True)):
            x = 0.3 + 2.15 * i
            box(x, y, name, ORANGE if i in (1, 3) else GRAY, 1.3)
            ax.text(x + 0.65, y - 0.4, mark, ha="center", va="center", color=WINE, fontsize=9)
            if i < 3:
                arrow(x + 1.36, y, x + 2.11)
    save(figure, "11_folding")


def strength() -> None:
    """What W8A8 loses by the strength of the migration, beside other ways."""
    r = recorded()["methods"]["rows"]
    found = sorted(
        (float(name.split(", ")[1]), x)
        for name, x in r.items()
        if name.startswith("int8: all, ") and name[-1].isdigit()
    )
    figure, ax = plt.subplots(figsize=(6.6, 2.9))
    lost = [100 * math.expm1(x["loss"]) for _, x in found]
    errors = [100 * math.exp(x["loss"]) * x["error"] for _, x in found]
    ax.errorbar([a for a, _ in found], lost, errors,
                color=BLUE, marker="o", ms=4, capsize=2, label="one strength for all layers")  # fmt: skip
    for name, label, color, ls in (
        ("int8: plain", "no migration", WINE, "-"), ("int8: rotated", "rotated", ORANGE, "--"),
        ("int8: all, a strength a layer", "a strength for each layer", BLACK, ":"),
    ):  # fmt: skip
        ax.axhline(100 * math.expm1(r[name]["loss"]), color=color, ls=ls, lw=1.2, label=label)
    ax.set(xlabel="strength α", ylabel="perplexity lost, %", ylim=(-0.3, None))
    ax.legend(fontsize=8)
    save(figure, "11_strength")


def formats() -> None:
    """Signal to noise by how far a row's largest number sticks out: int8 against fp8."""
    layers = recorded()["outliers"]["layers"]
    figure, (ax, below) = plt.subplots(2, 1, figsize=(6.8, 4.2), sharex=True, height_ratios=(1, 1))
    crest = np.geomspace(2, 40, 100)
    ax.semilogx(crest, 20 * np.log10(127.5 * np.sqrt(12) / crest), color=BLUE, label="int8")
    ax.axhline(31.5, color=ORANGE, label="fp8 E4M3, long rows")
    short = crest[crest < 23]  # of at most the root of 576
    ax.semilogx(short, 31.5 - 10 * np.log10(1 - short**2 / 576), color=ORANGE, ls="--", label="fp8 E4M3, rows of 576")
    ax.set(ylabel="SQNR, dB")
    ax.legend(fontsize=8, loc="lower left")
    rows = [(kind, slot) for kind in ("weights", "activations") for slot in SLOTS]
    for y, (kind, slot) in enumerate(rows):
        color, marker = SLOTS[slot]
        values = sorted(x["crest"][kind] for name, x in layers.items() if name.endswith(slot))
        below.plot([values[0], values[-1]], [-y, -y], color=color, lw=1)
        below.plot(values[len(values) // 2], -y, marker, color=color, ms=5)
    names = [f"{'inputs' if kind == 'activations' else kind} of {slot}" for kind, slot in rows]
    below.set_yticks(-np.arange(len(rows)), names, fontsize=8)
    below.set(xlabel="crest factor (lines: all layers; marks: the middle one)")
    below.set_xticks([2, 4, 8, 12, 16, 32], ["2", "4", "8", "12", "16", "32"])
    below.minorticks_off()
    figure.tight_layout()
    save(figure, "11_formats")


def long_context() -> None:
    """What each cache loses by position, in KL divergence; what it does to a number that must be found again."""
    r = recorded()["long"]
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 2.9), width_ratios=(1.5, 1))
    styles = {
        "int8": (BLUE, "o"), "fp8": (ORANGE, "s"), "fp8, scale 1": (ORANGE, "v"), "int8, one scale": (SKY, "D"),
        "int4": (WINE, "^"), "int4, keys by channel": (BLACK, "x"),
    }  # fmt: skip
    for name, (color, marker) in styles.items():
        axes[0].semilogy(r["until"], r["rows"][name]["kl by position"], color=color, marker=marker, ms=4, lw=1,
                         label=name, ls="--" if "scale" in name else "-")  # fmt: skip
    axes[0].set(xlabel="position in the context", ylabel="KL to an fp32 cache, nats")
    axes[0].legend(fontsize=7, ncols=2, loc="upper right")
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(low, high * 12)
    rows = r["needles"]["rows"]
    names = ["fp32", *styles]
    place = -np.arange(len(names))
    axes[1].barh(place, [rows[n]["loss"] for n in names], xerr=[rows[n]["loss error"] for n in names], height=0.6,
                 color=[GRAY, *(styles[n][0] for n in names[1:])])  # fmt: skip
    axes[1].set_yticks(place, names)
    axes[1].set(xlabel="nats a digit of the number asked for")
    figure.tight_layout()
    save(figure, "11_long")


if __name__ == "__main__":
    by_hand()
    folding()
    outliers()
    tokens()
    formats()
    strength()
    long_context()
