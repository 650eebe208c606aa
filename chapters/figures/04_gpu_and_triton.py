"""Draws the figures of chapter 4: `python chapters/figures/04_gpu_and_triton.py`.

04_memory.svg, 04_program.svg, 04_order.svg; 04_sm.svg, 04_ladders.svg and 04_roofline.svg from benchmarks/results/.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from style import canvas, look, save

from minillm.learn import COLORS
from minillm.learn.excerpts import results

BLUE, ORANGE, WINE, SKY, BLACK = COLORS
GRAY, LIGHT = "#666666", "#eef3f9"
look(11)


def box(ax: plt.Axes, x: float, y: float, width: float, height: float, color: str, fill: str = LIGHT) -> None:
    ax.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.1",
            fc=fill,
            ec=color,
            lw=1.3,
            mutation_aspect=1,
        )
    )


def memory() -> None:
    """The levels of memory, what each is for, and its size."""
    figure, ax = canvas(10.6, 5.3)
    box(ax, 0.2, 2.15, 7.0, 2.75, GRAY, "white")
    ax.text(0.4, 4.65, "one of 132 streaming multiprocessors", va="center", color=GRAY)
    for i in range(4):
        x = 0.45 + 1.67 * i
        box(ax, x, 3.15, 1.5, 1.2, BLUE)
        ax.text(x + 0.75, 4.05, "scheduler", ha="center", va="center", fontsize=10)
        ax.text(x + 0.75, 3.75, "tensor core", ha="center", va="center", fontsize=10)
        ax.text(x + 0.75, 3.4, "registers 64 KB", ha="center", va="center", fontsize=8.5, color=BLUE, weight="bold")
    box(ax, 0.45, 2.35, 6.51, 0.6, BLACK, "#f4f4f4")
    ax.text(3.7, 2.65, "shared memory and L1, 256 KB", ha="center", va="center", color=BLACK, weight="bold")
    box(ax, 0.2, 1.2, 7.0, 0.6, ORANGE, "#fdf5e4")
    ax.text(3.7, 1.5, "L2 cache, 50 MB, shared by all", ha="center", va="center", color="#8a5a00", weight="bold")
    box(ax, 0.2, 0.2, 7.0, 0.65, WINE, "#f9edf1")
    ax.text(3.7, 0.52, "device memory (HBM3), 80 GB, 3.35 TB/s", ha="center", va="center", color=WINE, weight="bold")
    for low, high in ((0.85, 1.2), (1.8, 2.35), (2.95, 3.15)):
        ax.add_patch(
            FancyArrowPatch((3.7, low), (3.7, high), arrowstyle="<|-|>", mutation_scale=11, color=GRAY, lw=1.2)
        )
    for y, color, text in (
        (3.75, BLUE, "of one thread\n33 MB on the whole chip"),
        (2.65, BLACK, "of one program: its tiles; all programs\nthat are here at once divide it up"),
        (1.5, "#8a5a00", "holds what other programs\nread a moment ago"),
        (0.52, WINE, "everything else: weights,\nactivations, the KV cache"),
    ):
        ax.text(7.45, y, text, va="center", color=color, fontsize=10)
    save(figure, "04_memory")


def program() -> None:
    """Ten numbers, three programs of four lanes: offsets and mask."""
    figure, ax = canvas(10.4, 3.7)
    colors = (BLUE, WINE, "#8a5a00")
    for i in range(12):
        inside, color = i < 10, colors[i // 4]
        x = 1.6 + 0.68 * i + 0.12 * (i // 4)
        ax.add_patch(
            Rectangle((x, 2.0), 0.62, 0.5, fc=LIGHT if inside else "white", ec=color, lw=1.3, ls="-" if inside else ":")
        )
        ax.text(x + 0.31, 2.25, str(i), ha="center", va="center", color="black" if inside else GRAY)
        ax.add_patch(Rectangle((x, 1.2), 0.62, 0.42, fc=color if inside else "white", ec=color, lw=1.3))
        ax.text(
            x + 0.31, 1.41, "yes" if inside else "no", ha="center", va="center", fontsize=9.5,
            color="white" if inside else GRAY,
        )  # fmt: skip
        ax.text(x + 0.31, 0.82, f"x[{i}]" if inside else "–", ha="center", va="center", fontsize=9.5, color=GRAY)
    for p, color in enumerate(colors):
        left = 1.6 + 0.68 * 4 * p + 0.12 * p
        ax.text(left + 1.33, 3.3, f"program {p}", ha="center", va="center", color=color, weight="bold")
        ax.text(left + 1.33, 2.9, f"{p} · 4 + (0, 1, 2, 3)", ha="center", va="center", color=color, fontsize=10)
    for y, text in ((2.25, "offsets"), (1.41, "offsets < 10"), (0.82, "in memory")):
        ax.text(1.4, y, text, ha="right", va="center")
    ax.text(
        5.8,
        0.3,
        "x has ten numbers; offsets 10 and 11 send no request",
        ha="center",
        va="center",
        color=GRAY,
        fontsize=10,
    )
    save(figure, "04_program")


def multiprocessor() -> None:
    """Left, a program's block, warps and threads; right, the slots for warps of one SM, filled by a compiled kernel."""
    kernel = results("compiled", "cpu-2-cores")["softmax, 4 warps"]
    warps, held = kernel["num_warps"], kernel["programs an SM"]
    figure, ax = canvas(10.8, 4.3)
    ax.text(2.4, 4.1, "one program", ha="center", va="center", weight="bold")
    ax.add_patch(Rectangle((0.3, 3.35), 4.2, 0.42, fc=LIGHT, ec=BLUE, lw=1.2))
    ax.text(2.4, 3.56, "its block: 4,096 numbers of a row", ha="center", va="center", fontsize=10)
    for w in range(warps):
        x = 0.3 + 1.07 * w
        ax.add_patch(Rectangle((x, 1.95), 0.99, 1.0, fc="white", ec=BLUE, lw=1.2))
        ax.text(x + 0.5, 2.75, f"warp {w}", ha="center", va="center", color=BLUE, fontsize=9.5)
        for i in range(32):
            ax.add_patch(Rectangle((x + 0.1 + 0.1 * (i % 8), 2.1 + 0.11 * (i // 8)), 0.07, 0.07, fc=BLUE, ec="none"))
        ax.add_patch(FancyArrowPatch((x + 0.5, 3.33), (x + 0.5, 2.98), arrowstyle="-|>", mutation_scale=9, color=GRAY))
    text = (
        f"num_warps = {warps}: {32 * warps} threads, {4096 // (32 * warps)} numbers each\n"
        f"{kernel['registers']} registers a thread, by the compiler"
    )
    ax.text(2.4, 1.5, text, ha="center", va="center", fontsize=10)
    ax.text(7.9, 4.1, "one SM: 64 slots for warps", ha="center", va="center", weight="bold")
    fills = (BLUE, SKY, WINE, ORANGE)
    for slot in range(64):
        program = slot // warps
        x, y = 5.3 + 0.325 * (slot % 16), 3.3 - 0.42 * (slot // 16)
        on = program < held
        fill = fills[program % 4] if on else "white"
        ax.add_patch(Rectangle((x, y), 0.29, 0.36, fc=fill, ec=GRAY, lw=0.7))
        if on and slot % warps == 1:
            color = BLACK if fill in (SKY, ORANGE) else "white"
            ax.text(x + 0.145, y + 0.18, str(program), ha="center", va="center", fontsize=9, color=color, zorder=5)
    used = -(-kernel["registers"] // 8) * 8 * 32 * warps
    ax.add_patch(Rectangle((5.3, 1.05), 5.16, 0.34, fc="white", ec=GRAY, lw=0.9))
    for program in range(held):
        width = 5.16 * used / 65_536
        ax.add_patch(Rectangle((5.3 + width * program, 1.05), width, 0.34, fc=fills[program % 4], ec="white", lw=0.7))
    ax.text(5.3, 1.55, "65,536 registers", va="center", fontsize=10)
    text = (
        f"{used:,} registers a program: {held} fit, {held * warps} of 64 warps: occupancy {held * warps / 64:.0%}.\n"
        "A scheduler issues for a warp that is ready while others wait."
    )
    ax.text(7.88, 0.55, text, ha="center", va="center", fontsize=10)
    save(figure, "04_sm")


def ladders() -> None:
    """Time of every rung over the floor, and what it asks for over what must move."""
    r = results("chapter_04", "h100")
    copy, peak = r["ceilings"]["copy bytes/s"], r["ceilings"]["matmul FLOP/s"]
    figure, axes = plt.subplots(3, 2, figsize=(12.4, 8.6))
    for ax, x in zip(axes.flat, [x for x in r["ladders"] if not x["name"].startswith("matmul_swiglu")], strict=True):
        floor = max(x["needed"] / copy, x["flops"] / peak)
        names = [rung["name"].replace("1 warps", "1 warp") for rung in x["rungs"]]
        times = [rung["seconds"] / floor for rung in x["rungs"]]
        product = x["flops"] / x["needed"] > 100
        asked = [0 if rung["asked"] is None or product else rung["asked"] / x["needed"] for rung in x["rungs"]]
        at = np.arange(len(names))
        ax.barh(at - 0.19, times, 0.36, color=BLUE, label="time over the floor")
        ax.barh(at + 0.19, asked, 0.36, color=SKY, hatch="//", ec="white", lw=0, label="bytes asked over those needed")
        for i, (time, rung) in enumerate(zip(times, x["rungs"], strict=True)):
            seconds = rung["seconds"]
            label = f"{1e6 * seconds:.0f} µs" if seconds < 1e-3 else f"{1e3 * seconds:.3g} ms"
            ax.text(time * 1.03, i - 0.19, label, va="center", fontsize=9)
        ax.set_yticks(at, names)
        ax.invert_yaxis()
        ax.set_title(x["name"], fontsize=11)
        ax.axvline(1, color=BLACK, lw=0.9, ls="--")
        if product:
            ax.set_xscale("log")
            ax.set_xlim(0.5, max(times) * 4)
        else:
            ax.set_xlim(0, max(times) * 1.2)
    axes[0, 0].legend(fontsize=9, loc="lower right")
    figure.tight_layout()
    save(figure, "04_ladders")


def order() -> None:
    """Sixteen programs that run at once, row by row and in groups of four rows."""
    figure, axes = plt.subplots(1, 2, figsize=(10.4, 4.6))
    for ax, group in zip(axes, (1, 4), strict=True):
        numbers = np.empty((8, 16), int)
        for i in range(numbers.size):
            first = i // (group * 16) * group
            numbers[first + i % (group * 16) % group, i % (group * 16) // group] = i
        wave = numbers < 16
        for (m, n), number in np.ndenumerate(numbers):
            running = wave[m, n]
            ax.add_patch(Rectangle((n, m), 1, 1, fc=BLUE if running else "white", ec="#bbbbbb", lw=0.7))
            ax.text(n + 0.5, m + 0.5, number, ha="center", va="center", fontsize=7, color="white" if running else GRAY)
        rows, columns = wave.any(1), wave.any(0)
        for m in np.flatnonzero(rows):
            ax.add_patch(Rectangle((-1.5, m + 0.12), 1.2, 0.76, fc=WINE, ec="none"))
        for n in np.flatnonzero(columns):
            ax.add_patch(Rectangle((n + 0.12, -1.5), 0.76, 1.2, fc=ORANGE, ec="none"))
        ax.set_title(f"{'row by row' if group == 1 else 'in groups of 4 rows'}: {rows.sum()} + {columns.sum()} strips")
        ax.text(-1.7, 4, "rows of x", rotation=90, ha="right", va="center", color=WINE)
        ax.text(8, -1.75, "columns of w", ha="center", va="bottom", color="#8a5a00")
        ax.set_xlim(-2.6, 16.2)
        ax.set_ylim(8.2, -2.6)
        ax.set_aspect("equal")
        ax.axis("off")
    save(figure, "04_order")


def roofline() -> None:
    """Measured FLOP/s over intensity, under the two measured ceilings."""
    r = results("chapter_04", "h100")
    copy, peak = r["ceilings"]["copy bytes/s"], r["ceilings"]["matmul FLOP/s"]
    figure, ax = plt.subplots(figsize=(9.2, 4.9))
    intensity = np.logspace(-1.3, 4, 200)
    ax.loglog(intensity, np.minimum(copy * intensity, peak) / 1e12, color=GRAY, lw=1.6)
    ax.text(
        0.3,
        0.3 * copy / 1e12 * 1.6,
        f"copy, {copy / 1e12:.2f} TB/s",
        rotation=33,
        rotation_mode="anchor",
        color=GRAY,
        fontsize=10,
    )
    ax.text(1e4, peak / 1e12 * 1.3, f"cuBLAS, bf16, {peak / 1e12:.0f} TFLOP/s", ha="right", color=GRAY, fontsize=10)
    ax.axvline(peak / copy, color=GRAY, lw=0.8, ls=":")
    ax.text(peak / copy * 1.1, 0.05, f"ridge, {peak / copy:.0f}", color=GRAY, fontsize=10)
    styles = {"minillm matmul": (BLUE, "o"), "cuBLAS": (ORANGE, "x"), "multiply-adds in fp32": (WINE, "s")}
    for kernel, (color, marker) in styles.items():
        points = [p for p in r["roofline"] if p["kernel"] == kernel]
        x, y = [p["intensity"] for p in points], [p["flops/s"] / 1e12 for p in points]
        ax.plot(x, y, marker, color=color, ms=6, label=kernel, mfc="none" if marker == "s" else color)
    for ladder in r["ladders"]:
        best = min(ladder["rungs"], key=lambda rung: rung["seconds"])
        x = ladder["flops"] / ladder["needed"]
        if x < 10:
            ax.plot(x, ladder["flops"] / best["seconds"] / 1e12, "^", color=BLACK, ms=6)
    ax.plot([], [], "^", color=BLACK, label="best of add, softmax, norm, SwiGLU")
    ax.set_xlabel("FLOPs a byte")
    ax.set_ylabel("TFLOP/s")
    ax.set_ylim(0.03, peak / 1e12 * 2)
    ax.legend(frameon=False, loc="upper left")
    save(figure, "04_roofline")


if __name__ == "__main__":
    memory()
    program()
    multiprocessor()
    ladders()
    order()
    roofline()
