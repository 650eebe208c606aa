"""Draw the figures of chapter 5: `python chapters/figures/05_flash_attention.py` writes 05_*.svg beside this file."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from style import look, save

from minillm.learn import COLORS
from minillm.learn.excerpts import results

BLUE, ORANGE, WINE, SKY, BLACK = COLORS
GRAY, LIGHT = "#777777", "#e8edf3"
PALE_BLUE, PALE_WINE, PALE_ORANGE = "#dbe7f5", "#f3dde4", "#fdf0d8"
look(9)


def blank(ax: Axes, width: float, height: float) -> None:
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.axis("off")


def box(ax: Axes, x: float, y: float, width: float, height: float, text: str, color: str = LIGHT) -> None:
    """A rounded box around its center."""
    corner, style = (x - width / 2, y - height / 2), "round,pad=0,rounding_size=0.12"
    ax.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, fc=color, ec="black", lw=0.8))
    ax.text(x, y, text, ha="center", va="center", fontsize=8.5)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str = "black", lw: float = 1) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 9, "shrinkA": 0, "shrinkB": 0}
    ax.add_patch(FancyArrowPatch(start, end, color=color, lw=lw, **style))


def traffic() -> None:
    """What passes between memory and chip: naive with three kernels, fused with one."""
    figure, ax = plt.subplots(figsize=(7.4, 3.6))
    blank(ax, 24, 11.4)
    for y, name in ((7.8, "chip"), (6.95, "memory")):
        ax.text(0.1, y, name, va="center", color=GRAY)
    ax.plot([0, 24], [7.4, 7.4], color=GRAY, lw=0.9, ls="--")

    def small(x: float, text: str) -> None:
        box(ax, x, 5.9, 0.85, 1.1, text, PALE_BLUE)

    def square(x: float, text: str) -> None:
        ax.add_patch(Rectangle((x - 1.25, 3.9), 2.5, 2.5, fc=PALE_WINE, ec=WINE, lw=1))
        ax.text(x, 5.15, text, ha="center", va="center", fontsize=8.5)

    for x, text in ((4.6, "q kᵀ"), (9.5, "softmax"), (14.3, "· v")):
        box(ax, x, 9.7, 2.4, 1.2, text, PALE_BLUE)
    for x, text, target in ((2.4, "q", 4.0), (3.5, "k", 4.4)):
        small(x, text)
        arrow(ax, (x, 6.45), (target, 9.1), BLUE)
    square(7.0, "scores\nT × T")
    arrow(ax, (5.4, 9.1), (6.4, 6.4), WINE, 2.2)
    arrow(ax, (7.6, 6.4), (8.8, 9.1), WINE, 2.2)
    square(11.9, "weights\nT × T")
    arrow(ax, (10.2, 9.1), (11.3, 6.4), WINE, 2.2)
    arrow(ax, (12.5, 6.4), (13.6, 9.1), WINE, 2.2)
    small(14.1, "v")
    arrow(ax, (14.1, 6.45), (14.2, 9.1), BLUE)
    small(15.5, "o")
    arrow(ax, (14.8, 9.1), (15.45, 6.45), BLUE)
    ax.text(8.7, 2.9, "naive: 4 T² + 4 T D numbers", ha="center", color=WINE)
    ax.plot([16.9, 16.9], [2.3, 11.2], color="#bbbbbb", lw=0.8)
    box(ax, 20.5, 9.7, 5.6, 1.9, "q kᵀ, softmax, · v\none block at a time", PALE_BLUE)
    for x, text in ((18.2, "q"), (19.6, "k"), (21.0, "v")):
        small(x, text)
        arrow(ax, (x, 6.45), (x, 8.75), BLUE)
    small(22.8, "o")
    arrow(ax, (22.8, 8.75), (22.8, 6.45), BLUE)
    ax.text(20.5, 2.9, "fused: 4 T D numbers", ha="center", color=BLUE)
    at, unit = 1.2, 18.5 / 65  # bars to scale for T = 4,096 and D = 64: 4 T D is 1, 4 T² is T / D = 64
    ax.add_patch(Rectangle((at, 1.1), 65 * unit, 0.6, fc=PALE_WINE, ec=WINE, lw=0.8))
    ax.text(at + 65 * unit + 0.2, 1.4, "naive", va="center", fontsize=8, color=WINE)
    ax.add_patch(Rectangle((at, 0.2), unit, 0.6, fc=PALE_BLUE, ec=BLUE, lw=0.8))
    ax.text(at + unit + 0.2, 0.5, "fused (to scale, 4,096 tokens, heads of 64)", va="center", fontsize=8, color=BLUE)
    save(figure, "05_traffic")


def tiling() -> None:
    """A tile of queries, blocks of keys and values, and the state that is carried along."""
    figure, ax = plt.subplots(figsize=(7.4, 3.9))
    blank(ax, 24, 12.6)
    left, top, step, rows = 5.0, 10.6, 2.9, 1.6
    ax.text(
        left + 2 * step + 1.3, 12.2, "keys and values, a block at a time: [$S_b$, D] each", ha="center", color=ORANGE
    )
    for j in range(5):
        now = j == 2
        face = PALE_ORANGE if now else "#fbf6ef"
        ax.add_patch(Rectangle((left + j * step, top), 2.6, 1.0, fc=face, ec=ORANGE, lw=1.8 if now else 0.8))
        ax.text(left + j * step + 1.3, top + 0.5, f"block {j + 1}", ha="center", va="center", fontsize=8)
    for i in range(4):
        y, now = top - 0.5 - rows * (i + 1), i == 1
        ax.add_patch(Rectangle((2.0, y), 2.2, 1.3, fc=PALE_BLUE if now else "#f3f7fb", ec=BLUE, lw=1.8 if now else 0.8))
        ax.text(3.1, y + 0.65, f"tile {i + 1}", ha="center", va="center", fontsize=8)
        for j in range(5):
            here = now and j == 2
            face = "#b9d2f2" if here else "#eef3fa" if now and j < 2 else "white"
            corner, width = (left + j * step, y), 1.8 if here else 0.6
            ax.add_patch(Rectangle(corner, 2.6, 1.3, fc=face, ec=BLUE if here else "#bbbbbb", lw=width))
            if now:
                text = ("taken in", "taken in", "scores\n[$T_b$, $S_b$]", "to come", "to come")[j]
                ax.text(left + j * step + 1.3, y + 0.65, text, ha="center", va="center", fontsize=7.5)
    ax.text(
        1.8, top - 0.5 - 1.5 * rows - 0.15, "$T_b$ queries\n[$T_b$, D]", ha="right", va="center", color=BLUE, fontsize=8
    )
    y = 1.2
    box(ax, 5.2, y, 5.8, 1.7, "state after block 2\nm [$T_b$], l [$T_b$], o [$T_b$, D]", PALE_BLUE)
    box(ax, 12.4, y, 4.6, 1.7, "shrink by $e^{m - m'}$,\nadd block 3", "#b9d2f2")
    box(ax, 18.8, y, 5.0, 1.7, "state after block 3\nm', l', o'", PALE_BLUE)
    arrow(ax, (8.1, y), (10.1, y))
    arrow(ax, (14.7, y), (16.3, y))
    arrow(ax, (left + 2 * step + 1.3, top - 0.5 - 2 * rows), (12.2, y + 0.85), BLUE, 1.4)
    arrow(ax, (21.3, y), (22.6, y))
    ax.text(22.7, y, "…\no / l", va="center", fontsize=8.5)
    save(figure, "05_tiling")


def blocks(length: int = 16, window: int = 5) -> None:
    """Whole, masked and skipped blocks of 16 by 16, causal and with a window, and one tile's loops."""
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 3.5))
    size = 64
    for ax, limit, title in ((axes[0], 0, "causal"), (axes[1], window * size, f"causal, window of {window * size}")):
        for i in range(length):
            for j in range(length):
                low, high = i * size, i * size + size - 1  # the tile's first and last query
                first, last = j * size, j * size + size - 1  # the block's first and last key
                seen = first <= high and (not limit or last > low - limit)
                whole = last <= low and (not limit or first > high - limit)
                color = BLUE if whole else ORANGE if seen else "#f0f0f0"
                ax.add_patch(Rectangle((j, length - 1 - i), 1, 1, fc=color, ec="white", lw=0.8))
        ax.add_patch(Rectangle((0, length - 1 - 11), length, 1, fill=False, ec="black", lw=1.4))
        ax.set(xlim=(-0.1, length + 0.1), ylim=(-0.1, length + 0.1), aspect="equal", title=title)
        ax.set(xticks=[], yticks=[], xlabel="blocks of 64 keys →", ylabel="← tiles of 64 queries")
        ax.spines[["left", "bottom"]].set_visible(False)
    text = {0: "tile 12: 11 whole blocks,\nthen 1 masked", 1: "tile 12: 1 masked,\n4 whole, 1 masked"}
    for i, ax in enumerate(axes):
        ax.text(length - 0.2, length - 3.2, text[i], ha="right", va="center", fontsize=8)
    handles = [Rectangle((0, 0), 1, 1, fc=color) for color in (BLUE, ORANGE, "#f0f0f0")]
    names = ["whole: no mask", "masked, pair by pair", "skipped"]
    figure.legend(handles, names, loc="lower center", ncols=3, bbox_to_anchor=(0.5, -0.05), fontsize=8)
    save(figure, "05_blocks")


PEERS = {"SDPA flash": (ORANGE, "--", "FlashAttention-2"), "SDPA cuDNN": (WINE, "-.", "cuDNN")}


def ladder() -> None:
    """TFLOP/s of every step for both head sizes, with the peers and the large product as lines."""
    measured = results("chapter_05", "h100")
    figure, axes = plt.subplots(1, 2, figsize=(7.8, 3.6), sharey=True)
    product = measured["ceilings"]["matmul FLOP/s"] / 1e12
    for ax, case in zip(axes, measured["ladder"].values(), strict=True):
        rows = {row["step"]: row["FLOP/s"] / 1e12 for row in case["steps"] if "seconds" in row}
        peers = {name: rows.pop(name) for name in PEERS if name in rows}
        names = list(rows)
        colors = [BLUE if name == "minillm" else SKY for name in names]
        ax.barh(range(len(names)), rows.values(), color=colors, height=0.7)
        for i, value in enumerate(rows.values()):
            ax.text(
                value + 8, i, f"{value:.0f}", va="center", fontsize=7.5, bbox={"fc": "white", "ec": "none", "pad": 0.8}
            )
        lines = [(peers[name], *PEERS[name]) for name in peers] + [(product, BLACK, ":", "large product")]
        for i, (value, color, dashes, name) in enumerate(lines):
            ax.axvline(value, color=color, lw=1.2, ls=dashes)
            ax.text(value, -0.9 - 0.75 * (i == 1), name, color=color, fontsize=7.5, ha="center", va="bottom")
        ax.set(yticks=range(len(names)), yticklabels=names, xlabel="TFLOP/s", xlim=(0, product * 1.06))
        ax.set_title(f"{case['heads']} heads of {case['head size']}, {case['tokens']:,} tokens", pad=22)
        ax.tick_params(axis="y", labelsize=8)
    axes[0].invert_yaxis()
    figure.tight_layout()
    save(figure, "05_ladder")


def sizes() -> None:
    """TFLOP/s by tile, warps and stages; the shared memory of each, hatched where registers spill."""
    measured = results("chapter_05", "h100")["ladder"]
    figure, axes = plt.subplots(1, 2, figsize=(7.8, 4), sharey=True)
    for ax, case in zip(axes, measured.values(), strict=True):
        names = [row["step"].replace(" warps, ", ", ").replace(" stages", "") for row in case["sizes"]]
        rates = [row.get("FLOP/s", 0) / 1e12 for row in case["sizes"]]
        for i, (row, rate) in enumerate(zip(case["sizes"], rates, strict=True)):
            if not rate:
                ax.text(8, i, "does not fit", va="center", fontsize=7.5)
                continue
            spills = row.get("spills", 0) > 0
            color = BLUE if rate == max(rates) else SKY
            ax.barh(
                i, rate, color=color, height=0.72, hatch="////" if spills else None, ec="black" if spills else color
            )
            text = f"{rate:.0f}   {row['shared bytes'] / 1024:.0f} KiB" + ", spills" * spills
            ax.text(rate + 8, i, text, va="center", fontsize=7.5)
        ax.set(xlabel="TFLOP/s (and shared memory a program)", xlim=(0, 1.42 * max(rates)))
        ax.set(yticks=range(len(names)), yticklabels=names)
        ax.set_title(f"heads of {case['head size']}", fontsize=9)
        ax.tick_params(axis="y", labelsize=8)
    axes[0].set_ylabel("queries x keys, warps, stages")
    axes[0].invert_yaxis()
    figure.tight_layout()
    save(figure, "05_sizes")


def peers() -> None:
    """TFLOP/s by length for four layouts of heads: the package between FlashAttention-2 and cuDNN."""
    kernels = results("kernels", "h100")
    rows = [r for r in kernels["rows"] if r["suite"] == "attention" and "causal" in r["case"]]
    layouts = dict.fromkeys(" ".join(r["case"].split()[1:3]) for r in rows)
    figure, axes = plt.subplots(1, len(layouts), figsize=(7.8, 2.7), sharey=True)
    ways = {"SDPA cuDNN": PEERS["SDPA cuDNN"], "minillm": (BLUE, "-", "minillm"), "SDPA flash": PEERS["SDPA flash"]}
    for ax, layout in zip(axes, layouts, strict=True):
        chosen = [r for r in rows if " ".join(r["case"].split()[1:3]) == layout]
        lengths = [int(r["case"].split()[-1]) for r in chosen]
        for (name, (color, dashes, label)), marker in zip(ways.items(), "s^o", strict=True):
            rates = [r["flops"] / r["seconds"][name] / 1e12 for r in chosen]
            ax.plot(lengths, rates, marker=marker, ls=dashes, color=color, label=label, ms=4)
        ax.axhline(kernels["ceilings"]["matmul FLOP/s"] / 1e12, color=BLACK, lw=0.8, ls=":")
        size, heads = layout.split()
        ax.set_title(f"heads of {size[1:]}: {heads[1:]}", fontsize=8.5)
        ax.set_xscale("log", base=2)
        ax.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
        ax.minorticks_off()
        ax.set(xlabel="tokens", ylim=(0, None))
    axes[0].set_ylabel("TFLOP/s")
    axes[0].text(lengths[0], kernels["ceilings"]["matmul FLOP/s"] / 1e12 - 12, "large product", va="top", fontsize=7.5)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=3, bbox_to_anchor=(0.5, -0.08))
    figure.tight_layout()
    save(figure, "05_peers")


if __name__ == "__main__":
    for draw in (traffic, tiling, blocks):
        draw()
    for draw in (ladder, sizes, peers):
        try:
            draw()
        except FileNotFoundError as missing:
            print(f"{draw.__name__} is not drawn: {missing}")
