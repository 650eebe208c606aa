"""Draw the figures of chapter 6: `python chapters/figures/06_kv_cache.py` writes 06_*.svg beside this file."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle
from style import look, save

from minillm.config import LLAMA_3_8B
from minillm.learn import COLORS
from minillm.learn.excerpts import results

BLUE, ORANGE, WINE, SKY, BLACK = COLORS
GRAY, LIGHT = "#777777", "#e8edf3"
PALE_BLUE, PALE_ORANGE, PALE_WINE = "#dbe7f5", "#fdeccb", "#f0dbe2"
look(9)


def blank(ax: Axes, width: float, height: float) -> None:
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.axis("off")


def cell(
    ax: Axes, x: float, y: float, text: str = "", face: str = "white", edge: str = "#bbbbbb", lw: float = 0.8
) -> None:
    ax.add_patch(Rectangle((x, y), 1, 1, fc=face, ec=edge, lw=lw))
    if text:
        ax.text(x + 0.5, y + 0.48, text, ha="center", va="center", fontsize=7.5)


def recompute(prompt: int = 4, new: int = 4) -> None:
    """Tokens that pass through the model in each step: without a cache and with one."""
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 2.5))
    tokens = prompt + new
    for ax, cached in zip(axes, (False, True), strict=True):
        ax.set(xlim=(0, 13.4), ylim=(0.2, 6.6), aspect="equal")
        ax.axis("off")
        total = 0
        for step in range(new):
            y, known = 4.4 - 1.25 * step, prompt + step
            ax.text(2.3, y + 0.5, f"step {step + 1}", ha="right", va="center", fontsize=8.5)
            for i in range(tokens):
                if i < known:
                    computed = not cached or step == 0 or i == known - 1
                    total += computed
                    cell(
                        ax, 2.6 + i, y, str(i + 1), PALE_ORANGE if computed else PALE_BLUE, ORANGE if computed else BLUE
                    )
                elif i == known:
                    cell(ax, 2.6 + i, y, "?", "white", WINE, 1.4)
        title = "with a cache" if cached else "without a cache"
        ax.text(2.6 + tokens / 2, 6.1, f"{title}: {total} tokens computed", ha="center", fontsize=9.5)
    handles = [
        Rectangle((0, 0), 1, 1, fc=f, ec=e) for f, e in ((PALE_ORANGE, ORANGE), (PALE_BLUE, BLUE), ("white", WINE))
    ]
    names = ["passes through the model", "keys and values read from the cache", "chosen in this step"]
    figure.legend(handles, names, loc="lower center", ncols=3, fontsize=8, bbox_to_anchor=(0.5, -0.05))
    figure.tight_layout()
    save(figure, "06_recompute")


def step() -> None:
    """One decode step of one layer: the new token's q against stored keys, and where its k and v go."""
    figure, ax = plt.subplots(figsize=(7.4, 3.3))
    blank(ax, 24, 10.6)

    def box(x: float, y: float, width: float, height: float, text: str, face: str, edge: str) -> None:
        ax.add_patch(Rectangle((x, y), width, height, fc=face, ec=edge, lw=1))
        ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8.5)

    def arrow(start: tuple[float, float], end: tuple[float, float], color: str = "black") -> None:
        ax.add_patch(
            FancyArrowPatch(start, end, color=color, arrowstyle="-|>", mutation_scale=10, shrinkA=0, shrinkB=0)
        )

    box(0.1, 4.3, 2.7, 1.5, "position 6\n[hidden]", LIGHT, "black")
    for y, name, color in ((8.0, "k", ORANGE), (4.5, "q", BLACK), (1.0, "v", BLUE)):
        box(4.4, y, 1.5, 1.1, name, "white", color)
        arrow((2.8, 5.05), (4.4, y + 0.55), color)
    ax.text(6.3, 9.35, "after RoPE", fontsize=7.5, ha="center", color=BLACK)
    ax.text(6.3, 5.85, "after RoPE", fontsize=7.5, ha="center", color=BLACK)
    for y, name, face, edge in ((8.0, "keys", PALE_ORANGE, ORANGE), (1.0, "values", PALE_BLUE, BLUE)):
        for i in range(10):
            stored, new = i < 6, i == 6
            ax.add_patch(Rectangle((8.2 + i, y), 1, 1.1, fc=face if stored or new else "white", ec=edge,
                                   lw=1.8 if new else 0.8, ls="-" if stored or new else ":"))  # fmt: skip
            ax.text(8.7 + i, y + 0.53, str(i), ha="center", va="center", fontsize=7.5,
                    color="black" if stored or new else GRAY)  # fmt: skip
        ax.text(18.5, y + 0.55, f"{name} [capacity, H_kv, D]\nslots 7 to 9: reserved", va="center", fontsize=8)
    for y, color in ((8.55, ORANGE), (1.55, BLUE)):  # into slot 6, around the others
        above = y > 5
        turn = 10.3 if above else 0.25
        ax.plot([5.9, 7.2, 7.2, 14.7], [y, y, turn, turn], color=color, lw=1.2)
        arrow((14.7, turn), (14.7, 9.1 if above else 1.0), color)
    box(9.1, 4.3, 5.2, 1.5, "softmax(q kᵀ / √D) v\nover slots 0 to 6", LIGHT, BLACK)
    arrow((5.9, 5.05), (9.1, 5.05), BLACK)
    arrow((11.7, 8.0), (11.7, 5.8), ORANGE)
    arrow((11.7, 2.1), (11.7, 4.3), BLUE)
    box(16.4, 4.3, 3.4, 1.5, "output\n[H, D]", LIGHT, "black")
    arrow((14.3, 5.05), (16.4, 5.05))
    save(figure, "06_step")


def variants() -> None:
    """Bytes a token for one shape and five ways to attend, and the whole cache by context."""
    config = LLAMA_3_8B
    layers, size, heads = config.num_hidden_layers, config.head_dim, config.num_attention_heads
    each = {
        f"MHA, {heads} heads": 2 * heads * size,
        "GQA, 8 heads": 2 * 8 * size,
        "MLA, 512 + 64": 576,
        "MQA, 1 head": 2 * size,
    }
    colors, dashes = (WINE, BLUE, BLACK, ORANGE), ("-.", "-", (0, (5, 1, 1, 1)), ":")
    figure, axes = plt.subplots(1, 2, figsize=(7.8, 3.1), width_ratios=(1, 1.25))
    values = [2 * layers * n / 1024 for n in each.values()]
    axes[0].barh(list(each), values, color=colors, height=0.6)
    for i, value in enumerate(values):
        axes[0].text(value + 8, i, f"{value:,.0f} KiB", va="center", fontsize=8)
    axes[0].invert_yaxis()
    axes[0].set(title="16 bits, one token", xlim=(0, 660), xticks=[])
    axes[0].spines["bottom"].set_visible(False)
    context = np.array([2**i for i in range(10, 18)])
    for (name, n), color, dash in zip(each.items(), colors, dashes, strict=True):
        axes[1].loglog(context, 2 * layers * n * context / 1e9, color=color, ls=dash, label=name.split(",")[0])
    window = 2 * layers * 2 * 8 * size * (np.minimum(context, 1024) * 5 / 6 + context / 6) / 1e9
    axes[1].loglog(context, window, color=BLUE, ls="--", label="GQA, 5 of 6 layers\nwindow of 1,024")
    weights = config.weight_bytes() / 1e9
    axes[1].axhline(weights, color="black", lw=0.8, ls=":")
    axes[1].text(1050, weights * 1.12, "all weights", fontsize=8)
    axes[1].set(title="one sequence, GB", xlabel="context, tokens")
    axes[1].set_xticks(context[::2], [f"{n // 1024}k" for n in context[::2]])
    axes[1].minorticks_off()
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    save(figure, "06_variants")


def ring(window: int = 4, steps: int = 7) -> None:
    """What the slots of a ring hold as tokens come."""
    figure, ax = plt.subplots(figsize=(7.4, 2.3))
    blank(ax, 23.5, 6.4)
    for slot in range(window):
        ax.text(1.7, 4.7 - 1.1 * slot, f"slot {slot}", ha="right", va="center", fontsize=8)
    for i in range(steps):
        x = 2.2 + 3.2 * i
        ax.text(x + 0.5, 5.9, f"position {i}", ha="center", fontsize=8.5)
        for slot in range(window):
            held = i - (i - slot) % window  # the position in this slot after token i, from 0
            new = slot == i % window
            face = PALE_ORANGE if new else "#f3f3f3" if held < 0 else PALE_BLUE
            cell(
                ax,
                x,
                4.2 - 1.1 * slot,
                str(held) if held >= 0 else "",
                face,
                ORANGE if new else "#bbbbbb",
                1.4 if new else 0.8,
            )
        if i < steps - 1:
            ax.add_patch(
                FancyArrowPatch((x + 1.3, 2.6), (x + 2.9, 2.6), arrowstyle="-|>", mutation_scale=9, color=GRAY)
            )
    save(figure, "06_ring")


# ---- measured ------------------------------------------------------------------------------------------------------

WAYS = {"naive": WINE, "transformers, no cache": ORANGE, "transformers": BLACK, "cached": BLUE}
MARKS = {"naive": "s", "transformers, no cache": "v", "transformers": "^", "cached": "o"}
NAMES = {"naive": "naive", "transformers, no cache": "transformers, use_cache=False", "transformers": "transformers",
         "cached": "cached"}  # fmt: skip


def speed() -> None:
    """Seconds until each token, and seconds of each token."""
    measured = results("chapter_06")["generate"]
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.0))
    for name, color in WAYS.items():
        times = np.array(measured["each"][name])
        count = 1 + 4 * np.arange(len(times))
        style = {"color": color, "ls": "--" if "transformers" in name else "-", "label": NAMES[name], "lw": 1.5,
                 "marker": MARKS[name], "markevery": max(1, len(times) // 8), "ms": 4}  # fmt: skip
        axes[0].plot(count, times, **style)
        axes[1].plot(count[1:], 1000 * np.diff(times) / 4, **style)
    axes[0].set(title="seconds until the n-th token", xlabel="n", ylim=(0, None))
    axes[1].set(title="milliseconds a token", xlabel="n", ylim=(0, None))
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    save(figure, "06_speed")


def points(ax: Axes, rows: list[dict], title: str) -> None:
    groups = {"prefill": (WINE, "o"), "decode": (BLUE, "s")}
    for kind, (color, marker) in groups.items():
        chosen = [row for row in rows if row["kind"] == kind]
        contexts = sorted({row["before"] for row in chosen}) if kind == "decode" else [0]
        for i, before in enumerate(contexts):
            line = sorted((r for r in chosen if r["before"] == before), key=lambda r: (r["batch"], r["new"]))
            shade = color if i == 0 else ORANGE
            name = "prefill, by length" if kind == "prefill" else f"decode, by batch, {before + 1:,} tokens"
            xs, ys = [r["flops"] / r["bytes"] for r in line], [r["flops"] / r["seconds"] for r in line]
            ax.plot(xs, ys, marker, ls="-", lw=0.8, color=shade, label=name, ms=4)
            for j in (0, len(line) - 1) if i == 0 else (len(line) - 1,):
                row = line[j]
                text = f"{row['new']:,}" if kind == "prefill" else f"B={row['batch']}"
                if kind == "decode":
                    side, at = "left", (7, -3) if i else (4, -11)
                else:
                    side, at = "right", (-4, 6) if j == 0 else (4, -11)
                style = {"textcoords": "offset points", "fontsize": 7, "color": shade, "ha": side}
                ax.annotate(text, (xs[j], ys[j]), xytext=at, **style)
    ax.set(title=title, xlabel="FLOPs a byte", xscale="log", yscale="log")
    ax.margins(y=0.12)


def roof(ax: Axes, bandwidth: float, peak: float) -> None:
    low, high = ax.get_xlim()
    x = np.array([min(low, 0.3), peak / bandwidth, max(high, 4 * peak / bandwidth)])
    ax.plot(x, np.minimum(x * bandwidth, peak), color="black", lw=1)


def rooflines() -> None:
    """Prompts and decode steps under the roof: two CPU cores, and the GPU where it was measured."""
    cpu = results("chapter_06")["steps"]
    try:
        gpu = results("chapter_06", "h100")
    except FileNotFoundError:
        gpu = None
        print("06_roofline.svg is drawn without the GPU")
    shapes = [name for name in gpu if name.startswith("Llama")] if gpu else []
    figure, axes = plt.subplots(1, 1 + len(shapes), figsize=(4.0 * (1 + len(shapes)), 3.4), squeeze=False)
    rows = [row for row in cpu["rows"] if row["kind"] == "prefill" or row["before"] in (256, 2048)]
    points(axes[0, 0], rows, "SmolLM2,\nfp32, two CPU cores")
    roof(axes[0, 0], cpu["ceilings"]["read bytes/s"], cpu["ceilings"]["matmul FLOP/s"])
    for ax, name in zip(axes[0, 1:], shapes, strict=True):
        points(
            ax,
            [r for r in gpu[name]["rows"] if r["kind"] == "prefill" or r["cache"] == "paged"],
            f"{name},\nbf16, H100",
        )
        roof(ax, gpu["ceilings"]["copy bytes/s"], gpu["ceilings"]["matmul FLOP/s"])
    axes[0, 0].set_ylabel("FLOP/s reached")
    for ax in axes[0]:
        ax.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    save(figure, "06_roofline")


def gpu() -> None:
    """Shares of the ceilings on a GPU: prompts of a large product, decode steps of a copy."""
    measured = results("chapter_06", "h100")
    top, stream = measured["ceilings"]["matmul FLOP/s"], measured["ceilings"]["copy bytes/s"]
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.0))
    for (name, entry), color in zip(
        ((n, e) for n, e in measured.items() if n != "ceilings"), (WINE, BLUE), strict=True
    ):
        prompts = sorted((r for r in entry["rows"] if r["kind"] == "prefill"), key=lambda r: r["new"])
        lengths = [r["new"] for r in prompts]
        axes[0].plot(lengths, [100 * r["FLOP/s"] / top for r in prompts], "o-", color=color, ms=4, label=name)
        steps = [r for r in entry["rows"] if r["kind"] == "decode" and r["cache"] == "paged"]
        for before, dash, mark in zip(sorted({r["before"] for r in steps}), ("--", "-"), "s^", strict=False):
            line = sorted((r for r in steps if r["before"] == before), key=lambda r: r["batch"])
            batches, shares = [r["batch"] for r in line], [100 * r["bytes/s"] / stream for r in line]
            axes[1].plot(
                batches, shares, mark, ls=dash, color=color, ms=4, label=f"{name.split(',')[0]}, {before + 1:,}"
            )
    for ax, title, label in ((axes[0], "prefill: % of a large product", "tokens of the prompt"),
                             (axes[1], "decoding: % of a copy's speed", "sequences")):  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        ax.set(title=title, xlabel=label, ylim=(0, 103))
    axes[0].legend(fontsize=7.5)
    axes[1].legend(
        fontsize=7.5, title="shape, tokens each", title_fontsize=7.5, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    figure.tight_layout()
    save(figure, "06_gpu")


def windows() -> None:
    """Loss by position of a model that was trained without a window."""
    measured = results("chapter_06")["windows"]
    figure, ax = plt.subplots(figsize=(7.4, 2.7))
    for (name, losses), color, mark in zip(measured["loss"].items(), (BLUE, WINE, ORANGE), "os^", strict=True):
        middles = [(i + 0.5) * measured["bin"] for i in range(len(losses))]
        ax.plot(middles, losses, f"{mark}-", color=color, label=name, ms=3.5, lw=1.4)
    ax.axvline(measured["window"], color="black", lw=0.8, ls=":")
    ax.text(measured["window"] + 8, 0.15, f"window of {measured['window']}: the first token falls out", fontsize=8)
    ax.set(xlabel="position", ylabel="loss, nats a token", ylim=(0, None), xlim=(0, measured["length"]))
    ax.legend(fontsize=8, ncols=3, loc="upper right")
    save(figure, "06_windows")


def static() -> None:
    """A static batch as a schedule, and what its slots hold over its steps."""
    measured = results("chapter_06")["static"]["measured"]
    prompts, lengths = np.array(measured["prompts"]), np.array(measured["lengths"])
    figure, axes = plt.subplots(1, 2, figsize=(7.8, 3.3), width_ratios=(1.15, 1))
    total = lengths.max()
    for row, n in enumerate(lengths):
        axes[0].barh(row, n, color=BLUE, height=0.8)
        axes[0].barh(row, total - n, left=n, color=ORANGE, hatch="///", ec="white", height=0.8)
    axes[0].invert_yaxis()
    axes[0].set(
        title=f"{measured['occupancy']:.0%} of row-steps give a token",
        xlabel="step",
        yticks=[],
        ylabel="row",
        xlim=(0, total),
    )
    handles = [Rectangle((0, 0), 1, 1, fc=color) for color in (BLUE, ORANGE)]
    axes[0].legend(
        handles,
        ["gives a token", "finished, keeps its row"],
        fontsize=7.5,
        ncols=2,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.17),
    )
    steps, capacity = np.arange(1, total + 1), []
    slots = 64
    live, dead = [], []
    for done in steps:
        held = prompts + np.minimum(done, lengths) - 1
        while slots < held.max():
            slots *= 2
        capacity.append(slots * len(lengths))
        live.append(held[done <= lengths].sum())
        dead.append(held[done > lengths].sum())
    empty = np.array(capacity) - np.array(live) - np.array(dead)
    axes[1].stackplot(steps, live, dead, empty, colors=(BLUE, ORANGE, "#eeeeee"),
                      labels=("of rows at work", "of finished rows", "reserved, empty"))  # fmt: skip
    axes[1].set(title="slots of the cache", xlabel="step", xlim=(1, total), ylim=(0, max(capacity)))
    axes[1].legend(
        fontsize=7.5, ncols=3, loc="upper center", bbox_to_anchor=(0.45, -0.17), columnspacing=1, handlelength=1.5
    )
    figure.tight_layout()
    save(figure, "06_static")


if __name__ == "__main__":
    for draw in (recompute, step, variants, ring):
        draw()
    for draw in (speed, rooflines, gpu, windows, static):
        try:
            draw()
        except (FileNotFoundError, KeyError) as missing:
            print(f"{draw.__name__} is not drawn: {missing}")
