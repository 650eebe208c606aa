"""Draw the figures of chapter 9: `python chapters/figures/09_quantization.py` writes 09_*.svg beside this file."""

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import FancyArrowPatch, Rectangle
from style import canvas, look, save

from minillm.config import LLAMA_3_8B
from minillm.learn import COLORS
from minillm.learn.excerpts import results
from minillm.quant.rtn import NF4

BLUE, ORANGE, WINE, SKY, BLACK = COLORS
GRAY = "#777777"
look(9)


def formats() -> None:
    """The bits of a number in each format, and which numbers there are."""
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 2.9), width_ratios=(1, 1.25))
    layouts = {
        "fp32": (1, 8, 23),
        "bf16": (1, 8, 7),
        "fp8 E4M3": (1, 4, 3),
        "int8": (0, 0, 8),
        "int4": (0, 0, 4),
        "NF4": (0, 0, 4),
    }
    colors = (WINE, ORANGE, SKY)
    for i, (name, parts) in enumerate(layouts.items()):
        x, fills = 0, colors if parts[1] else ("white", "white", "#dddddd")
        for count, color in zip(parts, fills, strict=True):
            for _ in range(count):
                axes[0].add_patch(Rectangle((x, -i - 0.35), 1, 0.7, fc=color, ec="white", lw=0.6))
                x += 1
        axes[0].text(-0.6, -i, name, ha="right", va="center")
        axes[0].text(x + 0.5, -i, {"NF4": "number of a level", "int8": "integer", "int4": "integer"}.get(name, ""),
                     va="center", fontsize=8)  # fmt: skip
    axes[0].set(xlim=(-8, 33), ylim=(-5.6, 1.3))
    axes[0].axis("off")
    for x, color, word in ((0, WINE, "sign"), (5.5, ORANGE, "exponent"), (15, SKY, "fraction")):
        axes[0].add_patch(Rectangle((x, 0.75), 1, 0.5, fc=color))
        axes[0].text(x + 1.4, 1.0, word, va="center", fontsize=8)
    fp8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    lines = {
        "fp8 E4M3 / 448": fp8[fp8.isfinite()].unique() / 448,
        "int8, Δ = 1/127.5": torch.arange(-128, 128) / 127.5,
        "int4, Δ = 1/7.5": torch.arange(-8, 8) / 7.5,
        "NF4": torch.tensor(NF4),
    }
    for i, values in enumerate(lines.values()):
        axes[1].plot(values, torch.full((len(values),), -float(i)), "|", ms=15, mew=0.8, color=BLUE)
    axes[1].set_yticks([-i for i in range(len(lines))], list(lines))
    axes[1].set(ylim=(-3.6, 0.6), xlabel="of the largest number")
    figure.tight_layout()
    save(figure, "09_formats")


def by_hand() -> None:
    """Four weights, their grid of 3 bits, and what is read back."""
    figure, ax = plt.subplots(figsize=(7.6, 1.9))
    scale, zero = 0.5, -1
    for q in range(-4, 4):
        x = (q - zero) * scale
        ax.plot([x, x], [-0.12, 0.12], color=BLACK, lw=1.2)
        ax.text(x, -0.28, f"{q}", ha="center", va="top")
        ax.text(x, -0.72, f"{x:g}", ha="center", va="top", color=GRAY, fontsize=8)
    ax.plot([-1.9, 2.4], [0, 0], color=GRAY, lw=0.6)
    for w, q in ((-1.6, -4), (0.0, -1), (0.7, 0), (1.9, 3)):
        x = (q - zero) * scale
        ax.plot(w, 0.75, "o", color=BLUE, ms=6)
        ax.text(w, 0.92, f"{w:g}", ha="center", va="bottom", color=BLUE)
        ax.add_patch(
            FancyArrowPatch((w, 0.68), (x, 0.14), arrowstyle="-|>", mutation_scale=9, color=BLUE, shrinkA=0, shrinkB=0)
        )
    ax.text(-2.1, 0.75, "weights", ha="right", va="center", color=BLUE)
    ax.text(-2.1, -0.4, "stored", ha="right", va="center")
    ax.text(-2.1, -0.84, "read back", ha="right", va="center", color=GRAY)
    ax.annotate("", (0.5, 0.3), (0.0, 0.3), arrowprops={"arrowstyle": "<->", "color": ORANGE})
    ax.text(0.25, 0.36, "Δ", ha="center", color=ORANGE)
    ax.text(0, -1.12, "zero point", ha="center", va="top", fontsize=8, color=WINE)
    ax.set(xlim=(-2.75, 2.5), ylim=(-1.4, 1.25))
    ax.axis("off")
    save(figure, "09_by_hand")


def error() -> None:
    """Signal to noise by bits; rounding against clipping."""
    r = results("chapter_09")["error"]
    figure, axes = plt.subplots(1, 3, figsize=(8.8, 2.9), width_ratios=(1.25, 1, 1))
    names = {
        "uniform, channel": ("evenly spread", BLACK, "o"),
        "normal, channel": ("normal, 4,096 a row", ORANGE, "s"),
        "SmolLM2, 64": ("SmolLM2, groups of 64", SKY, "D"),
        "SmolLM2, channel": ("SmolLM2, rows", BLUE, "v"),
        "SmolLM2, tensor": ("SmolLM2, one scale", WINE, "^"),
    }
    for key, (label, color, marker) in names.items():
        axes[0].plot(r["bits"], r["sqnr"][key], color=color, marker=marker, ms=4, label=label)
    axes[0].set(xlabel="bits", ylabel="SQNR, dB", ylim=(0, 64))
    axes[0].legend(fontsize=7, loc="upper left")
    ends = np.array(r["clip at"])
    for ax, bits in zip(axes[1:], ("3", "8"), strict=True):
        rounding, clipping = np.array(r["clipping"][bits]).T
        ax.semilogy(ends, rounding, color=BLUE, label="rounding")
        ax.semilogy(ends, np.maximum(clipping, 1e-8), color=ORANGE, ls="--", label="clipping")
        ax.semilogy(ends, rounding + clipping, color=BLACK, lw=0.9, label="both")
        best = int((rounding + clipping).argmin())
        ax.plot(ends[best], (rounding + clipping)[best], "o", color=BLACK)
        ax.set(title=f"{bits} bits: best {ends[best]:.1f} σ", xlabel="end of the grid, σ", ylim=(1e-6, 1))
    axes[1].set_ylabel("squared error / σ²")
    axes[2].legend(fontsize=7.5)
    figure.tight_layout()
    save(figure, "09_error")


def sharing() -> None:
    """A weight of 4 rows and 8 columns: who shares a scale."""
    figure, ax = canvas(7.6, 1.75)
    colors = (SKY, "#f6dca8", "#e3b7c6", "#dddddd")
    halves = ((SKY, BLUE), ("#f6dca8", ORANGE), ("#e3b7c6", WINE), ("#dddddd", GRAY))  # a color a scale, so eight
    for i, (name, group) in enumerate((("tensor", 0), ("channel", 8), ("group of 4", 4))):
        x0 = 0.2 + 2.55 * i
        for row in range(4):
            for column in range(8):
                color = SKY if not group else colors[row] if group == 8 else halves[row][column // 4]
                ax.add_patch(Rectangle((x0 + 0.26 * column, 1.08 - 0.26 * row), 0.26, 0.26, fc=color, ec="white"))
        count = {0: "1 scale", 8: "4 scales", 4: "8 scales"}[group]
        ax.text(x0 + 1.04, 1.45, f"{name}: {count}", ha="center")
    ax.text(0.1, 0.82, "N rows", rotation=90, ha="center", va="center", fontsize=8)
    ax.text(1.24, 0.12, "K columns: inputs", ha="center", fontsize=8)
    save(figure, "09_sharing")


def straight_through() -> None:
    """Rounding with clipping, its true slope, and the one that training uses."""
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 2.4))
    x = np.linspace(-6.5, 6.5, 2001)
    axes[0].plot(x, np.clip(np.round(x), -4, 3), color=BLUE)
    axes[0].plot(x, np.clip(x, -4, 3), color=ORANGE, ls="--", lw=1)
    axes[0].set(title="forward, 3 bits", xlabel="w / Δ", ylabel="stored integer")
    axes[1].plot(x, np.zeros_like(x), color=BLUE, label="true slope of rounding")
    axes[1].plot(x, ((x >= -4) & (x <= 3)).astype(float), color=ORANGE, ls="--", label="straight through")
    axes[1].set(title="backward", xlabel="w / Δ", ylabel="slope", ylim=(-0.1, 1.6))
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    save(figure, "09_straight_through")


def ladder() -> None:
    """Perplexity by bits a weight, measured."""
    r = results("chapter_09")["granularity"]
    figure, ax = plt.subplots(figsize=(7.2, 3.3))
    for who, color, marker in (
        ("tensor", WINE, "^"), ("channel", BLUE, "s"), ("192", ORANGE, "o"), ("64", BLACK, "D"), ("32", SKY, "v"),
    ):  # fmt: skip
        chosen = [x for x in r["rows"] if x["who"] == who and x["scheme"] == "minmax" and not x["symmetric"]]
        chosen = [x for x in chosen if x["perplexity"] < 2000]
        label = {"tensor": "tensor (4 bits: far off)", "channel": who}.get(who, f"groups of {who}")
        ax.semilogy(
            [x["bits a weight"] for x in chosen], [x["perplexity"] for x in chosen], marker=marker, color=color,
            label=label, lw=1, ms=5,
        )  # fmt: skip
    ax.axhline(r["fp32"], color=GRAY, lw=0.8, ls=":")
    ax.text(5.9, r["fp32"] * 0.97, "fp32", va="top", color=GRAY)
    ax.set(xlabel="bits a weight, scales and zero points included", ylabel="perplexity", xlim=(2.8, 9), ylim=(10, 500))
    ax.set_yticks([10, 20, 50, 100, 200, 500], ["10", "20", "50", "100", "200", "500"])
    ax.minorticks_off()
    ax.legend(title="who shares a scale", fontsize=8)
    save(figure, "09_ladder")


def speedup() -> None:
    """The roofline's prediction: a decode step's weights, by batch."""
    ceilings = results("chapter_05", "h100")["ceilings"]
    beta, pi = ceilings["copy bytes/s"], ceilings["matmul FLOP/s"]
    count = LLAMA_3_8B.num_parameters() - LLAMA_3_8B.parameters()["embedding"]
    batch = 2.0 ** np.linspace(0, 11, 200)

    def floor(bits: float, speed: float = 1) -> np.ndarray:
        return np.maximum(count * bits / 8 / beta, 2 * count * batch / (speed * pi))

    figure, ax = plt.subplots(figsize=(6.4, 2.7))
    for name, bits, speed, color in (
        ("W4A16, groups of 64", 4.25, 1, BLUE), ("W8A16", 8, 1, ORANGE), ("W8A8", 8, 2, WINE),
    ):  # fmt: skip
        ax.semilogx(batch, floor(16) / floor(bits, speed), color=color, label=name,
                    ls={"W8A8": "--"}.get(name, "-"), lw=1.6)  # fmt: skip
    ax.set(xlabel="sequences in the batch", ylabel="times as fast as bf16", ylim=(0.8, 4))
    ax.set_xticks([1, 4, 16, 64, 256, 1024], ["1", "4", "16", "64", "256", "1,024"])
    ax.minorticks_off()
    ax.legend(fontsize=8)
    save(figure, "09_speedup")


if __name__ == "__main__":
    formats()
    by_hand()
    error()
    sharing()
    straight_through()
    speedup()
    if "granularity" in results("chapter_09"):
        ladder()
