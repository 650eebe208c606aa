"""Draw the figures of chapter 7: `python chapters/figures/07_paged_attention.py` writes 07_*.svg beside this file."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from style import canvas, look, save

from minillm.learn import COLORS
from minillm.learn.excerpts import results

BLUE, ORANGE, WINE, SKY, BLACK = COLORS
GRAY, LIGHT = "#777777", "#e8edf3"
PALE = {BLUE: "#c9dcf8", ORANGE: "#fbe7c4", WINE: "#f0cdd9", GRAY: "#eeeeee", "white": "white"}
look(9)


def text(ax: Axes, x: float, y: float, words: str, size: float = 8.5, **more: object) -> None:
    if more.get("color") == ORANGE:  # too pale for words
        more["color"] = "#8f6100"
    ax.text(x, y, words, **({"ha": "center", "va": "center", "fontsize": size} | more))


def box(ax: Axes, x: float, y: float, width: float, height: float, words: str, color: str = LIGHT) -> None:
    """A rounded box around its center."""
    corner, style = (x - width / 2, y - height / 2), "round,pad=0,rounding_size=0.08"
    ax.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, fc=color, ec="black", lw=0.8))
    text(ax, x, y, words)


def arrow(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str = "black", bend: float = 0
) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 9, "shrinkA": 0, "shrinkB": 0}
    ax.add_patch(FancyArrowPatch(start, end, color=color, lw=1, connectionstyle=f"arc3,rad={bend}", **style))


def block(ax: Axes, x: float, y: float, tokens: str, color: str, number: int, note: str = "") -> None:
    """One block of four slots with its tokens; its number above, a note below."""
    for i in range(4):
        filled = i < len(tokens) and tokens[i] != " "
        face = PALE[color] if filled else "white"
        ax.add_patch(Rectangle((x + 0.26 * i, y), 0.26, 0.34, fc=face, ec="#bbbbbb", lw=0.5))
        if filled:
            text(ax, x + 0.26 * i + 0.13, y + 0.17, tokens[i], 8, color="black" if color != GRAY else GRAY)
    ax.add_patch(Rectangle((x, y), 1.04, 0.34, fill=False, ec=color if color != "white" else "#bbbbbb", lw=1.4))
    text(ax, x + 0.52, y + 0.46, str(number), 7, color=GRAY)
    if note:
        text(ax, x + 0.52, y - 0.13, note, 7, color=color if color != "white" else GRAY)


def blocks() -> None:
    """Four moments of a pool of six blocks: two requests with one beginning, growth, and what stays behind."""
    figure, ax = canvas(8.4, 6.3)
    none, ab, xyz = ("", "white", ""), ("abcd", WINE, "2"), ("xyz", ORANGE, "1")
    steps = [
        (
            "1  A comes with 6 tokens: two blocks,\n    the second half full",
            ("A  [5, 1]", ""),
            [none, ("ef", BLUE, "1"), none, none, none, ("abcd", BLUE, "1")],
        ),
        (
            "2  B comes with the same 4 tokens first:\n    it names block 5 too, and gets block 3",
            ("A  [5, 1]", "B  [5, 3]"),
            [none, ("ef", BLUE, "1"), none, xyz, none, ab],
        ),
        (
            "3  A has generated 3 more tokens: block 1\n    is full, and block 0 is any free one",
            ("A  [5, 1, 0]", "B  [5, 3]"),
            [("i", BLUE, "1"), ("efgh", BLUE, "1"), none, xyz, none, ab],
        ),
        (
            "4  A is done: blocks 1 and 0 are free. Block 1\n    keeps its tokens until it is handed out",
            ("", "B  [5, 3]"),
            [none, ("efgh", GRAY, "0, published"), none, xyz, none, ("abcd", ORANGE, "1")],
        ),
    ]
    for i, (title, (a, b), pool) in enumerate(steps):
        y = 4.95 - 1.6 * i
        text(ax, 0.05, y + 1.0, title, 8.8, ha="left", va="center")
        text(ax, 0.15, y + 0.38, a, 9, ha="left", color=BLUE, family="monospace")
        text(ax, 0.15, y + 0.06, b, 9, ha="left", color=ORANGE, family="monospace")
        for number, (tokens, color, note) in enumerate(pool):
            block(ax, 1.75 + 1.11 * number, y + 0.05, tokens, color, number, note)
        if i:
            ax.plot([0.05, 8.35], [y + 1.33, y + 1.33], color="#dddddd", lw=0.8)
    text(ax, 5.05, 6.18, "pool: block number above, reference count below", 7.5, color=GRAY, ha="left")
    save(figure, "07_blocks")


def copy_on_write() -> None:
    """Two samples of one prompt: shared, a copy for who writes first, no copy for the last."""
    figure, ax = canvas(8.4, 2.9)
    panels = [
        ("after fork: both name both blocks", "A [5, 1]", "B [5, 1]", [("abcd", WINE, 5, "2"), ("ef", WINE, 1, "2")]),
        (
            "A writes g: block 1 is copied to 3",
            "A [5, 3]",
            "B [5, 1]",
            [("abcd", WINE, 5, "2"), ("ef", ORANGE, 1, "1"), ("efg", BLUE, 3, "1")],
        ),
        (
            "B writes h: it is alone, no copy",
            "A [5, 3]",
            "B [5, 1]",
            [("abcd", WINE, 5, "2"), ("efh", ORANGE, 1, "1"), ("efg", BLUE, 3, "1")],
        ),
    ]
    for i, (title, a, b, pool) in enumerate(panels):
        x = 0.1 + 2.85 * i
        text(ax, x, 2.7, title, 8.8, ha="left")
        text(ax, x, 2.3, a, 9, ha="left", color=BLUE, family="monospace")
        text(ax, x, 2.0, b, 9, ha="left", color=ORANGE, family="monospace")
        for j, (tokens, color, number, note) in enumerate(pool):
            block(ax, x + (1.3 if j else 0), 1.2 - (0.85 if j == 2 else 0), tokens, color, number, note)
        if i == 1:
            arrow(ax, (x + 2.42, 1.37), (x + 2.42, 0.52), BLUE, -0.5)
        if i:
            ax.plot([x - 0.2, x - 0.2], [0.1, 2.8], color="#dddddd", lw=0.8)
    save(figure, "07_copy_on_write")


def chain_and_tree() -> None:
    """The same three prompts as a chain of hashes in a table, and as a radix tree."""
    figure, ax = canvas(8.4, 4.3)
    text(ax, 2.05, 4.15, "hash chain: a table of full blocks", 9.5, weight="bold")
    text(ax, 6.3, 4.15, "radix tree: any length", 9.5, weight="bold")
    hashes = [
        (0.95, 3.3, "h₁ = H(h₀, abcd)", "block 5", WINE),
        (0.95, 2.1, "h₂ = H(h₁, efgh)", "block 1", BLUE),
        (3.05, 2.1, "h₂′ = H(h₁, efxy)", "block 3", ORANGE),
    ]
    for x, y, name, number, color in hashes:
        box(ax, x, y, 1.75, 0.62, f"{name}\n→ {number}", PALE[color])
    arrow(ax, (0.95, 2.98), (0.95, 2.42))
    arrow(ax, (1.5, 2.98), (2.8, 2.42))
    text(ax, 2.0, 1.45, "ef is computed and stored twice;\nthe tails i and pq are in no table", 8, color=GRAY)
    for i, (who, tokens, color) in enumerate(
        (("A", "abcd efgh i", BLUE), ("B", "abcd efxy", ORANGE), ("C", "pq", GRAY))
    ):
        text(ax, 0.3, 0.85 - 0.28 * i, who, 9, color=color, weight="bold")
        text(ax, 0.55, 0.85 - 0.28 * i, tokens, 9, ha="left", color=color, family="monospace")
    ax.plot([4.35, 4.35], [0.1, 4.25], color="#dddddd", lw=0.8)
    box(ax, 6.3, 3.55, 0.8, 0.4, "root", "white")
    nodes = [
        (5.6, 2.6, "abcdef", WINE, (6.2, 3.35)),
        (7.4, 2.6, "pq", GRAY, (6.4, 3.35)),
        (4.95, 1.6, "ghi", BLUE, (5.5, 2.4)),
        (6.3, 1.6, "xy", ORANGE, (5.7, 2.4)),
    ]
    for x, y, tokens, color, start in nodes:
        box(ax, x, y, 0.95, 0.4, tokens, PALE[color])
        arrow(ax, start, (x, y + 0.2))
    text(
        ax,
        6.3,
        0.72,
        "a node is split where two prompts part;\nonly leaves are evicted",
        8,
        color=GRAY,
    )
    save(figure, "07_chain_and_tree")


def waste() -> None:
    """What the pool is used for by policy; the last block's share by block size; hit rates by block size."""
    r = results("chapter_07")
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.1), width_ratios=[1.2, 1, 1])
    rows = r["reservation"]["reserved"]
    rows = {
        "longest": rows["the longest that is allowed"],
        "power of 2": rows["the next power of 2"],
        "exact (oracle)": rows["exactly, by an oracle"],
        "blocks of 256": r["reservation"]["paged"]["256"],
        "blocks of 16": r["reservation"]["paged"]["16"],
    }
    parts = [
        ("tokens", ("held",), BLUE),
        ("to come", ("to come",), SKY),
        ("never used", ("never", "last block"), ORANGE),
        ("free", ("gaps", "free"), "#dddddd"),
    ]
    left = [0.0] * len(rows)
    for label, keys, color in parts:
        width = [100 * sum(row.get(key, 0) for key in keys) for row in rows.values()]
        axes[0].barh(range(len(rows)), width, left=left, color=color, label=label, height=0.7)
        for i, (x, w) in enumerate(zip(left, width, strict=True)):
            if label == "tokens":
                axes[0].text(x + w - 1, i, f"{w:.0f}%", ha="right", va="center", color="white", fontsize=7.5)
        left = [a + b for a, b in zip(left, width, strict=True)]
    names = [f"{name}: {row['running']:.0f} at once" for name, row in rows.items()]
    axes[0].set(yticks=range(len(rows)), yticklabels=names, xlim=(0, 100), xlabel="% of the pool")
    axes[0].invert_yaxis()
    axes[0].legend(
        ncols=4, fontsize=7.2, loc="lower center", bbox_to_anchor=(0.3, 1.0), handlelength=1, columnspacing=1
    )
    pages = {int(size): row for size, row in r["reservation"]["paged"].items()}
    sizes = list(pages)
    axes[1].plot(sizes, [100 * row["last block"] for row in pages.values()], "o", color=BLUE, ms=4, label="simulated")
    formula = [100 * (b - 1) / 2 / (r["reservation"]["mean context"] + (b - 1) / 2) for b in sizes]
    axes[1].plot(sizes, formula, "-", color=GRAY, lw=1, label="(C − 1) / 2 a request")
    axes[1].set(xscale="log", xlabel="block size", title="empty slots, % of the pool", ylim=(0, None))
    axes[1].set_xticks(sizes, sizes, fontsize=7.5)
    axes[1].minorticks_off()
    axes[1].legend(fontsize=7.5)
    hits = r["prefix"]["rows"]
    lines = ((WINE, ":"), (ORANGE, "--"), (BLUE, "-."), ("", ""), (BLACK, "-"))
    for tokens, (color, style) in zip(r["prefix"]["pools"], lines, strict=True):
        if tokens == 196_608:
            continue
        label = "no limit" if tokens >= 1 << 21 else f"{tokens // 1024}k tokens"
        line = [100 * hits[size][str(tokens)]["hit rate"] for size in hits]
        axes[2].plot([int(size) for size in hits], line, "o", ls=style, color=color, ms=3.5, lw=1.2, label=label)
    axes[2].set(xscale="log", xlabel="block size", title="prompt tokens found, %", ylim=(30, 100))
    axes[2].set_xticks([int(size) for size in hits], list(hits), fontsize=7.5)
    axes[2].minorticks_off()
    axes[2].legend(fontsize=7.2, loc="lower left", title="pool", title_fontsize=7.5)
    figure.tight_layout()
    save(figure, "07_waste")


def measured() -> None:
    """Decoding on an H100: bandwidth by shape beside torch's, and one sequence by the number of splits."""
    found, splits = results("kernels_paged", "h100"), results("chapter_07", "h100")["splits"]
    top = found["ceilings"]["copy bytes/s"]
    rows = [row for row in found["rows"] if row["suite"] == "paged"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.3), width_ratios=[1.7, 1])
    for i, (name, label, color, hatch) in enumerate(
        (("minillm", "minillm, blocks of 16", BLUE, ""), ("SDPA, contiguous", "SDPA, contiguous", ORANGE, "///"))
    ):
        values = [100 * row["bytes"] / row["seconds"][name] / top for row in rows]
        at = [j + 0.4 * (i - 0.5) for j in range(len(rows))]
        left.bar(at, values, 0.38, color=color, label=label, hatch=hatch, ec="white", lw=0)
    left.axhline(100, color=BLACK, lw=0.8, ls=":")
    names = ["\n".join((row["case"].split()[-3] + " ×", f"{int(row['case'].split()[-1]):,}")) for row in rows]
    left.set_xticks(range(len(rows)), names, fontsize=7.5)
    half = sum("d128" in row["case"] for row in rows)
    left.text((half - 1) / 2, 108, "Llama 3 8B's heads, D = 128", ha="center", fontsize=8)
    left.text(half + (len(rows) - half - 1) / 2, 108, "SmolLM2's, D = 64", ha="center", fontsize=8)
    left.axvline(half - 0.5, color="#dddddd", lw=0.8)
    left.set(ylabel="% of a copy's bandwidth", xlabel="sequences × context", ylim=(0, 119))
    left.legend(fontsize=7.5, loc="upper center", ncols=2, bbox_to_anchor=(0.5, 1.16))
    for row, color, style in zip(splits["rows"], (WINE, ORANGE, BLUE), (":", "--", "-"), strict=True):
        counts = [int(n) for n in row["seconds"]]
        share = [100 * row["bytes"] / seconds / top for seconds in row["seconds"].values()]
        right.plot(counts, share, "o", ls=style, color=color, ms=4, label=f"{row['context']:,} tokens")
    right.axvline(splits["automatic"], color=GRAY, lw=0.8, ls=":")
    right.text(splits["automatic"] * 0.93, 3, "chosen from shapes", fontsize=7.5, color=GRAY, ha="right")
    right.set(xscale="log", xlabel="splits; one sequence, 8B", ylim=(0, 119))
    right.set_xticks(counts, counts)
    right.minorticks_off()
    right.legend(fontsize=7.5, loc="upper left")
    figure.tight_layout()
    save(figure, "07_measured")


def kernel() -> None:
    """One program's rows and blocks, the grid, and the join."""
    figure, ax = canvas(8.4, 4.7)
    text(ax, 1.75, 4.55, "one program: a sequence, a key/value head, a split", 9.2, weight="bold", ha="left")
    ax.add_patch(Rectangle((0.35, 2.55), 1.0, 1.5, fc="white", ec="#999999", lw=0.8))
    ax.add_patch(Rectangle((0.35, 3.675), 1.0, 0.375, fc=PALE[BLUE], ec=BLUE, lw=0.8))
    text(ax, 0.85, 4.2, "q [16, D]", 8, color=BLUE)
    text(ax, 0.85, 3.86, "4 heads", 7.5, color=BLUE)
    text(ax, 0.85, 3.12, "12 rows\nunused", 7.5, color=GRAY)
    names = ["7", "2", "9", "4", "0", "6"]
    for j, name in enumerate(names):
        x = 2.1 + 0.62 * j
        here = 2 <= j < 4
        ax.add_patch(
            Rectangle((x, 3.75), 0.58, 0.36, fc=PALE[ORANGE] if here else "white", ec=ORANGE, lw=1.5 if here else 0.7)
        )
        text(ax, x + 0.29, 3.93, name, 8.5)
    text(ax, 5.95, 3.93, "block table of the sequence", 8, color=ORANGE, ha="left")
    for j in (2, 3):
        arrow(ax, (2.39 + 0.62 * j, 3.75), (3.05 + 0.9 * (j - 2), 3.34), ORANGE)
    for j, label in enumerate(("K of block 9", "K of block 4")):
        ax.add_patch(Rectangle((2.65 + 1.15 * j, 2.75), 1.1, 0.58, fc=PALE[ORANGE], ec=ORANGE, lw=0.8))
        text(ax, 3.2 + 1.15 * j, 3.04, f"{label}\n[16, D]", 7.5)
    text(
        ax,
        5.15,
        3.04,
        "read once for all four heads;\n1 tl.dot a tile of BLOCK_N keys,\nwhich may span blocks",
        8,
        ha="left",
        color="black",
    )
    arrow(ax, (1.4, 3.05), (2.6, 3.05), BLUE)
    ax.plot([0.1, 8.3], [2.3, 2.3], color="#dddddd", lw=0.8)
    text(ax, 0.1, 2.1, "grid: sequences × key/value heads × splits", 9.2, weight="bold", ha="left")
    colors = [PALE[BLUE], PALE[ORANGE], PALE[WINE], "#dddddd"]
    for row, (name, length) in enumerate((("sequence 0", 8), ("sequence 1", 3))):
        y = 1.45 - 0.62 * row
        text(ax, 0.1, y + 0.2, name, 8.2, ha="left")
        a_split = -(-length // 4)
        for j in range(8):
            inside = j < length
            face = colors[min(3, j // a_split)] if inside else "white"
            ax.add_patch(
                Rectangle((1.1 + 0.34 * j, y), 0.32, 0.4, fc=face, ec="#999999" if inside else "#e5e5e5", lw=0.6)
            )
    text(ax, 2.45, 0.52, "colors: splits. A short context leaves\nsome splits without keys: sum 0", 8, color=GRAY)
    for s in range(4):
        ax.add_patch(Rectangle((4.6, 1.62 - 0.3 * s), 1.35, 0.25, fc=colors[s], ec="#999999", lw=0.6))
        text(ax, 5.27, 1.745 - 0.3 * s, f"out {s}, lse {s}", 7.5)
        arrow(ax, (5.98, 1.745 - 0.3 * s), (6.5, 1.3), GRAY)
    arrow(ax, (3.9, 1.4), (4.52, 1.4))
    box(ax, 7.25, 1.3, 1.45, 0.72, "join: weights\n$2^{lse - max}$", LIGHT)
    text(ax, 7.25, 0.62, "out [H, D]", 8)
    arrow(ax, (7.25, 0.92), (7.25, 0.72))
    save(figure, "07_kernel")


if __name__ == "__main__":
    for draw in (blocks, copy_on_write, chain_and_tree, waste, kernel, measured):
        draw()
