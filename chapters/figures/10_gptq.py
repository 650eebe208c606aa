"""Draw the figures of chapter 10: `python chapters/figures/10_gptq.py` writes 10_*.svg beside this file."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, Rectangle
from style import canvas, look, save

from minillm.learn import COLORS
from minillm.learn.excerpts import measured_on, results

BLUE, ORANGE, WINE, SKY, BLACK = COLORS
GRAY = "#777777"
look(9)


def recorded() -> dict:
    """The ladder and what belongs to it: by a GPU where it is recorded, else by a CPU."""
    return results("chapter_10", "h100", "h200", "cpu-2-cores")


def arrow(ax: plt.Axes, begin: tuple, end: tuple, color: str, **options: object) -> None:
    ax.add_patch(
        FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=10, color=color, shrinkA=0, shrinkB=0, **options)
    )


def plane() -> None:
    """Two weights: lines of equal loss, the nearest point of the grid, and the one that is found by repairing."""
    figure, ax = plt.subplots(figsize=(5.4, 3.4))
    h, w = np.array([[1.0, 0.8], [0.8, 1.0]]), np.array([0.3, 0.4])
    mended = w[1] + h[0, 1] / h[1, 1] * w[0]  # where the second should be once the first is 0

    def loss(*q: np.ndarray | float) -> np.ndarray:
        d = np.stack((w[0] - q[0], w[1] - q[1]))
        return np.einsum("i...,ij,j...->...", d, h, d)

    a, b = np.meshgrid(np.linspace(-1.4, 2.4, 300), np.linspace(-1.0, 1.9, 300))
    nearest, found = float(loss(0.0, 0.0)), float(loss(0.0, 1.0))
    ax.contour(a, b, loss(a, b), [0.05, found, nearest, 1, 2], colors=GRAY, linewidths=0.7)
    x, y = np.meshgrid(range(-1, 3), range(-1, 2))
    ax.plot([0, 0], [-1, 1.9], color=SKY, lw=1.2, zorder=0)
    ax.plot(x.ravel(), y.ravel(), "o", color="white", mec=BLACK, ms=6, clip_on=False, zorder=3)
    ax.plot(*w, "o", color=BLACK, ms=5)
    ax.text(w[0] + 0.06, w[1] + 0.02, "w", va="bottom")
    ax.plot(0, 0, "o", color=WINE, ms=8, zorder=4)
    ax.text(-0.12, -0.14, f"nearest: {nearest:.3f}", color=WINE, ha="right", va="top")
    ax.plot(0, 1, "o", color=BLUE, ms=8, zorder=4)
    ax.text(-0.12, 1.1, f"repaired: {found:.3f}", color=BLUE, ha="right", va="bottom")
    arrow(ax, tuple(w), (0, mended), ORANGE)
    ax.plot(0, mended, "x", color=ORANGE, ms=6, mew=1.6)
    ax.text(0.62, 0.62, "the first is rounded,\nthe second makes up for it", color=ORANGE, fontsize=8, va="bottom")
    arrow(ax, (0, mended + 0.04), (0, 0.92), BLUE)
    ax.set(xlabel="first weight, in steps of the grid", ylabel="second weight", xlim=(-1.4, 2.4), ylim=(-1.0, 1.75))
    ax.set_xticks(range(-1, 3))
    ax.set_yticks(range(-1, 2))
    ax.set_aspect("equal")
    save(figure, "10_plane")


def columns() -> None:
    """The weight in the middle of its rounding, and the row of the factor that spreads a column's error."""
    figure, ax = canvas(7.6, 2.3)
    unit, x0, y0, at, block, group, rows, count = 0.23, 0.5, 0.55, 9, 8, 4, 5, 20
    for j in range(count):
        in_block = at // block * block <= j < (at // block + 1) * block
        color = "#dddddd" if j < at else ORANGE if j == at else SKY if in_block else "white"
        for i in range(rows):
            ax.add_patch(Rectangle((x0 + unit * j, y0 + unit * i), unit, unit, fc=color, ec=GRAY, lw=0.5))
    top = y0 + unit * rows
    for g in range(0, count + 1, group):
        ax.plot([x0 + unit * g] * 2, [y0 - 0.06, top + 0.06], color=BLACK, lw=0.9)
    ax.text(x0 + unit * at / 2, top + 0.12, "rounded", ha="center")
    ax.text(x0 + unit * (at + 0.5), top + 0.12, "j", ha="center", color=ORANGE)
    ax.text(x0 + unit * 13, top + 0.12, "of the block:", ha="center")
    ax.text(x0 + unit * 13, y0 - 0.22, "at once", ha="center", color=BLUE)
    ax.text(x0 + unit * 18, top + 0.12, "later blocks:", ha="center")
    ax.text(x0 + unit * 18, y0 - 0.22, "after the block", ha="center", color=BLUE)
    ax.text(x0 + unit * 2, y0 - 0.22, "a group", ha="center", fontsize=8)
    ax.text(x0 - 0.1, y0 + unit * rows / 2, "N", ha="right", va="center")
    ax.text(x0 + unit * 10, 0.05, "K columns", ha="center", fontsize=8)
    u0, size = 5.75, 0.083
    for i in range(count):
        for j in range(i, count):
            fill = ORANGE if i == at == j else BLUE if i == at else "#eeeeee"
            ax.add_patch(Rectangle((u0 + size * j, y0 + size * (count - 1 - i) - 0.25), size, size, fc=fill, ec="none"))
    ax.text(u0 + size * 10, y0 + size * count - 0.17, "U, of H⁻¹ = UᵀU", ha="center")
    ax.text(
        u0 + size * 6, y0 + size * 5.5 - 0.25, "row j:\nwho takes\nhow much", ha="center", va="center", fontsize=7.5
    )
    save(figure, "10_columns")


def enumeration() -> None:
    """Losses of all 256 ways to round eight weights up or down; how far each method is from the least, by K."""
    r = results("chapter_10")["enumeration"]
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.0), width_ratios=(1.35, 1))
    losses = np.array(r["losses"]) / r["picked"]["least"]
    axes[0].hist(losses, np.geomspace(0.9, losses.max() * 1.05, 34), color="#cccccc")
    axes[0].set_xscale("log")
    places = {"RTN": (WINE, "nearest"), "back to front": (ORANGE, "GPTQ, largest input last"),
              "front to back": (BLUE, "GPTQ, largest input first")}  # fmt: skip
    most = axes[0].get_ylim()[1]
    for i, (key, (color, label)) in enumerate(places.items()):
        x = r["picked"][key] / r["picked"]["least"]
        axes[0].plot([x, x], [0, most * (0.62 + 0.16 * i)], color=color, lw=1.6)
        axes[0].text(x, most * (0.66 + 0.16 * i), f" {label}", color=color, va="bottom", fontsize=8).set_bbox(
            {"fc": "white", "ec": "none", "pad": 0.5, "alpha": 0.85}
        )
    axes[0].set(xlabel="loss / least loss", ylabel="of 256 roundings", ylim=(0, most * 1.15))
    axes[0].set_yticks(range(0, int(most) + 1, 5))
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if t <= losses.max() * 1.05]
    axes[0].set_xticks(ticks, [f"{t:,}" for t in ticks])
    axes[0].minorticks_off()
    for key, (color, label) in places.items():
        axes[1].semilogy(
            [x["k"] for x in r["by k"]], [x["over the least"][key] for x in r["by k"]],
            color=color, marker={"RTN": "^", "front to back": "o"}.get(key, "s"), ms=4, label=label,
        )  # fmt: skip
    axes[1].set(xlabel="weights, K", ylabel="loss / least loss, mean of rows", ylim=(0.9, 8))
    axes[1].set_yticks([1, 2, 5], ["1", "2", "5"])
    axes[1].minorticks_off()
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    save(figure, "10_enumeration")


def ladder() -> None:
    """Nats lost by each method, with and without zero points, and their paired errors."""
    rows = [row for row in recorded()["ladder"]["rows"] if row["name"] != "quantize_model"]
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure, ax = plt.subplots(figsize=(7.4, 3.4))
    for symmetric, color, shift in ((True, ORANGE, 0.2), (False, BLUE, -0.2)):
        chosen = {row["name"]: row["judge"] for row in rows if row["symmetric"] == symmetric}
        if not chosen:
            continue
        y = [-names.index(name) - shift for name in chosen]
        ax.barh(y, [x["nats"] for x in chosen.values()], 0.36, color=color,
                xerr=[x["error"] for x in chosen.values()], error_kw={"lw": 1, "capsize": 2},
                label="symmetric" if symmetric else "with zero points")  # fmt: skip
    ax.set_yticks([-i for i in range(len(names))], names)
    ax.set(xlabel="nats a token more than fp32, ± paired error")
    ax.legend(fontsize=8, loc="center right")
    save(figure, "10_ladder")


def first_token() -> None:
    """How much of the Hessian's trace is the first token's, by layer, for the four kinds of products."""
    layers = recorded().get("outlier", results("chapter_10")["outlier"])["layers"]
    figure, ax = plt.subplots(figsize=(7.2, 2.6))
    kinds = {"mlp.down_proj": (WINE, "o", "down"), "mlp.gate_up_proj": (BLUE, "s", "gate and up"),
             "self_attn.o_proj": (ORANGE, "^", "o"), "self_attn.qkv_proj": (SKY, "D", "q, k, v")}  # fmt: skip
    for kind, (color, marker, label) in kinds.items():
        y = [about["of the first token"] for name, about in layers.items() if name.endswith(kind)]
        ax.plot(range(len(y)), y, marker=marker, ms=3.5, lw=0.8, color=color, label=label)
    ax.axhline(1 / 512, color=GRAY, lw=0.8, ls=":")
    ax.set(yscale="log", xlabel="layer", ylabel="share of the trace", ylim=(1e-5, 2))
    ax.text(29.6, 1 / 470, "1 of 512", color=GRAY, fontsize=7.5, va="bottom", ha="right")
    ax.legend(fontsize=8, ncol=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    save(figure, "10_first_token")


def words() -> None:
    """Where the nibbles of a word stand, in a checkpoint and in a tile, and how one becomes a bf16."""
    figure, ax = canvas(7.8, 2.75)

    def word(y: float, labels: list[str], fills: list[str], title: str) -> None:
        for i, (label, fill) in enumerate(zip(labels, fills, strict=True)):
            ax.add_patch(Rectangle((2.0 + 0.7 * i, y), 0.7, 0.32, fc=fill, ec="white"))
            ax.text(2.35 + 0.7 * i, y + 0.16, label, ha="center", va="center", fontsize=8)
        ax.text(1.9, y + 0.16, title, ha="right", va="center", fontsize=8)

    places = [f"{31 - 4 * i}…{28 - 4 * i}" for i in range(8)]
    for i, place in enumerate(places):
        ax.text(2.35 + 0.7 * i, 2.6, place, ha="center", va="center", fontsize=7, color=GRAY)
    ax.text(1.9, 2.6, "bits", ha="right", va="center", fontsize=7, color=GRAY)
    eight = [f"w{i}" for i in range(7, -1, -1)]
    word(2.15, eight, ["#f6dca8"] * 8, "checkpoint, word 0")
    pairs = ["w49", "w33", "w17", "w1", "w48", "w32", "w16", "w0"]
    word(1.65, pairs, ["#e8e8e8"] * 3 + [SKY] + ["#e8e8e8"] * 3 + [SKY], "tile, word 0")
    ax.text(4.8, 1.42, "& 0x000F000F, | 0x43004300", ha="center", va="center", fontsize=8, color=BLUE)
    for half in range(2):
        x = 2.0 + 2.8 * half
        for bit, digit in enumerate("010000110000"):
            ax.add_patch(Rectangle((x + 0.175 * bit, 0.9), 0.175, 0.32, fc="#f0f0f0", ec="white"))
            ax.text(x + 0.175 * (bit + 0.5), 1.06, digit, ha="center", va="center", fontsize=7.5)
        ax.add_patch(Rectangle((x + 2.1, 0.9), 0.7, 0.32, fc=SKY, ec="white"))
        ax.text(x + 2.45, 1.06, f"nibble of w{1 - half}", ha="center", va="center", fontsize=5.5)
        ax.text(x + 0.09, 0.8, "sign", ha="center", va="top", fontsize=6.5, color=GRAY)
        ax.text(x + 0.87, 0.8, "exponent: 2⁷", ha="center", va="top", fontsize=6.5, color=GRAY)
        ax.text(x + 2.1, 0.8, "fraction, in units of 1", ha="center", va="top", fontsize=6.5, color=GRAY)
    ax.text(1.9, 1.06, "two bf16", ha="right", va="center", fontsize=8)
    ax.text(4.8, 0.4, "= 128 + nibble;   − (128 + 8 + z),   exact:   q − z", ha="center", va="center", color=BLUE)
    save(figure, "10_words")


def crossover() -> None:
    """Time of one layer's product by tokens: floors, and what was measured where it was."""
    place = measured_on("kernels_bits", "h100", "h200")
    ceilings = results("kernels_bits", place)["ceilings"] if place else results("chapter_05", "h100")["ceilings"]
    beta, pi = ceilings["copy bytes/s"], ceilings["matmul FLOP/s"]
    k, n = 4096, 14_336
    tokens = 2.0 ** np.linspace(0, 11, 200)
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.1))
    kinds = {"bf16": (BLACK, 16, 1, "s"), "W4A16": (BLUE, 4.125, 1, "o"), "W8A8": (WINE, 8, 2, "^")}
    for name, (color, bits, speed, marker) in kinds.items():
        moved = n * k * bits / 8 + tokens * (k * (1 if name == "W8A8" else 2) + 2 * n)
        floor = np.maximum(moved / beta, 2 * n * k * tokens / (speed * pi))
        axes[0].loglog(tokens, 1e6 * floor, color=color, lw=1.2, ls="--", label=f"{name}, floor")
        if found := measured(name, k, n):
            axes[0].loglog(list(found), [1e6 * s for s in found.values()], marker=marker, ms=4, color=color, lw=1,
                           label=f"{name}, measured")  # fmt: skip
    axes[0].set(xlabel="tokens", ylabel="µs", title=f"{(place or 'h100').upper()}, 4,096 to 14,336")
    axes[0].legend(fontsize=7)
    r = results("chapter_10")["speed"]
    for name, color, marker in (("fp32", ORANGE, "D"), *((x, kinds[x][0], kinds[x][3]) for x in kinds)):
        axes[1].loglog([x["rows"] for x in r["rows"]], [1e3 * x["seconds"][name] for x in r["rows"]],
                       color=color, marker=marker, ms=4, lw=1, label=name)  # fmt: skip
    axes[1].set(xlabel="tokens", ylabel="ms", title="one CPU core, 4,096 to 4,096")
    axes[1].legend(fontsize=7)
    for ax, ticks in ((axes[0], (1, 4, 16, 64, 256, 1024)), (axes[1], (1, 4, 16, 64, 256))):
        ax.set_xticks(ticks, [f"{t:,}" for t in ticks])
    axes[0].set_yticks([10, 20, 50, 100, 200], ["10", "20", "50", "100", "200"])
    axes[1].set_yticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
    for ax in axes:
        ax.minorticks_off()
    figure.tight_layout()
    save(figure, "10_crossover")


def bits_rows() -> list[dict]:
    """The kernels' suite in few bits on a GPU; empty where none is recorded."""
    place = measured_on("kernels_bits", "h100", "h200")
    return results("kernels_bits", place)["rows"] if place else []


def measured(name: str, k: int, n: int) -> dict[int, float]:
    """Seconds by tokens on a GPU, of this chapter's run or of the kernels' suites; empty where none is recorded."""
    if "crossover" in recorded():
        return {row["tokens"]: row["seconds"][name] for row in recorded()["crossover"]["rows"]}
    found = {}
    for row in bits_rows():
        case, seconds = row["case"], row["seconds"]
        if case.startswith(f"w4a16 {k} x {n}, ") and name in ("bf16", "W4A16"):
            found[int(case.split(", ")[1].split()[0])] = seconds["minillm" if name == "W4A16" else "cuBLAS bf16"]
        if case.startswith("w8a8 int8 ") and case.endswith(f" x {n} x {k}") and name == "W8A8":
            found[int(case.split()[2])] = seconds["minillm"]
    return dict(sorted((m, s) for m, s in found.items() if m <= 2048))


if __name__ == "__main__":
    plane()
    columns()
    words()
    enumeration()
    first_token()
    crossover()
    if "ladder" in recorded():
        ladder()
