"""Draw the figures of chapter 15: `python chapters/figures/15_serving.py` writes 15_*.svg beside this."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, Rectangle
from style import canvas, look, save

from minillm.learn import COLORS
from minillm.learn.excerpts import results

BLUE, ORANGE, WINE, SKY, BLACK = COLORS
GRAY, PALE = "#777777", "#f2f2f2"
look(9)


def recorded(suite: str) -> dict:
    """By a GPU where a part is recorded, else by a CPU."""
    return results(suite, "h100", "h200", "cpu-2-cores")


def box(
    ax: plt.Axes, x: float, y: float, width: float, height: float, label: str, color: str = "white", **style
) -> None:
    """A labeled box."""
    ax.add_patch(Rectangle((x, y), width, height, fc=color, ec=style.pop("edge", GRAY), lw=0.9, **style))
    ax.text(x + width / 2, y + height / 2, label, ha="center", va="center", fontsize=8)


def arrow(ax: plt.Axes, begin: tuple[float, float], end: tuple[float, float], label: str = "", above: bool = True,
          color: str = GRAY) -> None:  # fmt: skip
    """An arrow with what it carries."""
    ax.add_patch(FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=9, color=color, shrinkA=0, shrinkB=0))
    middle = (begin[0] + end[0]) / 2, (begin[1] + end[1]) / 2
    ax.text(middle[0], middle[1] + (0.06 if above else -0.06), label, ha="center", va="bottom" if above else "top",
            fontsize=7.5, color=BLACK)  # fmt: skip


def layers() -> None:
    """A service: clients, balancer, replicas of two processes each, a store of answers."""
    figure, ax = canvas(9.2, 3.75)
    for y in (0.55, 1.55, 2.55):
        box(ax, 0.1, y, 0.95, 0.5, "client", PALE)
        arrow(ax, (1.06, y + 0.25), (1.98, 1.8))
    box(ax, 2.0, 1.2, 1.25, 1.2, "balancer\n\nretries,\nhealth,\npolicy", SKY)
    for y, name in ((2.3, "replica 1"), (0.25, "replica 2")):
        ax.add_patch(Rectangle((4.1, y - 0.12), 4.9, 1.2, fc="white", ec=GRAY, lw=0.8, ls="--"))
        ax.text(4.16, y + 1.11, name, fontsize=7.5, color=GRAY, va="bottom")
        box(ax, 4.25, y + 0.1, 1.75, 0.75, "event loop\nHTTP, admission,\ntokens, SSE", "#cfe8cf")
        box(ax, 7.15, y + 0.1, 1.7, 0.75, "engine\nscheduler, model", "#fbe3c0")
        arrow(ax, (6.01, y + 0.65), (7.14, y + 0.65), "token ids")
        arrow(ax, (7.14, y + 0.3), (6.01, y + 0.3), "pieces", above=False)
        arrow(ax, (3.26, 1.8), (4.24, y + 0.47))
        arrow(ax, (5.12, y + (0.1 if y > 1 else 0.86)), (5.12, 1.91 if y > 1 else 1.59))
    box(ax, 4.35, 1.6, 1.55, 0.3, "answers (Redis)", PALE)
    ax.text(6.58, 3.45, "a process each, and a pipe", ha="center", fontsize=7.5, color=GRAY)
    save(figure, "15_layers")


def pressure() -> None:
    """Where tokens of a client wait that reads slowly."""
    figure, ax = canvas(9.2, 2.5)
    places = [
        (0.1, "engine", "one step,\nall requests", "#fbe3c0"),
        (2.0, "piece", "what came since\nthe last send:\nmerged", "#cfe8cf"),
        (3.9, "send", "waits until the\nlast event is out", "#cfe8cf"),
        (5.8, "sockets", "both sides' buffers\nfull", PALE),
        (7.7, "client", "reads slowly", PALE),
    ]
    for i, (x, name, what, color) in enumerate(places):
        box(ax, x, 0.95, 1.4, 0.85, f"{name}\n{what}", color)
        if i:
            arrow(ax, (x - 0.49, 1.37), (x - 0.01, 1.37))
    ax.plot([1.75, 1.75], [0.55, 2.2], color=WINE, lw=1.3, ls="--")
    ax.text(0.8, 2.28, "never waits for a client", ha="center", color=WINE, fontsize=8)
    ax.text(5.5, 2.28, "each client waits for itself", ha="center", color=WINE, fontsize=8)
    ax.add_patch(FancyArrowPatch((8.4, 0.85), (2.7, 0.85), connectionstyle="arc3,rad=-0.16", arrowstyle="-|>",
                                 mutation_scale=10, color=WINE, lw=1.2))  # fmt: skip
    ax.text(5.55, 0.5, "back-pressure", ha="center", va="bottom", color=WINE, fontsize=8.5)
    ax.text(5.55, 0.02, "bound: one answer's text; after 30 s in one send the client is dropped, its request aborted",
            ha="center", va="bottom", fontsize=7.5, color=GRAY)  # fmt: skip
    save(figure, "15_pressure")


POLICIES = {"round_robin": "round robin", "least_loaded": "least loaded", "two_choices": "two choices",
            "session": "session", "prefix": "prefix", "session_unbounded": "session,\nno bound",
            "prefix_without_load": "prefix,\nload ignored"}  # fmt: skip
KINDS = {"own_counted": "own requests counted", "four_routers": "of four routers", "reports_alone": "reports alone"}


def routing() -> None:
    """p99 of the time to the first token by policy, on three traces; hit rates."""
    r = recorded("router")["traces"]
    figure, axes = plt.subplots(1, 3, figsize=(10.4, 3.3), width_ratios=(1, 1.35, 1.2))
    for ax, trace, color in ((axes[0], "chat_4", BLUE), (axes[1], "hot_session", ORANGE)):
        names = [name for name in POLICIES if name in r[trace]]
        for i, name in enumerate(names):
            row = r[trace][name]
            ax.bar(i, 1e3 * row["ttft_p99"], 0.7, color=color)
            ax.text(i, 1e3 * row["ttft_p99"], f"{row['hit_rate']:.0%}", ha="center", va="bottom", fontsize=7.5)
        ax.set_xticks(range(len(names)), [POLICIES[name] for name in names], rotation=45, ha="right", fontsize=8)
    axes[0].set(ylabel="TTFT, p99, ms", title="conversations, 4 replicas\n(above bars: hit rate)")
    axes[1].set(title="one hot session, 4 replicas\n(above bars: hit rate)", ylabel="TTFT, p99, ms", yscale="log")
    for j, (kind, color) in enumerate(zip(KINDS, (BLUE, SKY, WINE), strict=True)):
        heights = [r["bursts"][f"{name}_{kind}"]["fullest"] for name in list(POLICIES)[:3]]
        axes[2].bar(np.arange(3) + 0.27 * (j - 1), heights, 0.25, color=color, label=KINDS[kind])
    axes[2].axhline(8, color=GRAY, lw=0.8, ls=":")
    axes[2].set_xticks(range(3), [POLICIES[name] for name in list(POLICIES)[:3]], rotation=45, ha="right", fontsize=8)
    axes[2].set(title="bursts of 64, 8 replicas", ylabel="requests on the fullest")
    axes[2].set_ylim(0, 100)
    axes[2].legend(fontsize=7.5, loc="upper left")
    figure.tight_layout()
    save(figure, "15_routing")


def loops() -> None:
    """A stall of two seconds, as one client in a closed loop and as independent users see it."""
    r = recorded("chapter_15")["stall"]
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 2.8), sharey=True)
    for ax, name, color in ((axes[0], "closed", WINE), (axes[1], "open", BLUE)):
        seen = np.array(r[name]["seen"])
        ax.axvspan(r["seconds"] / 2, r["seconds"] / 2 + r["stall, s"], color=GRAY, alpha=0.2, lw=0)
        ax.plot(seen[:, 0], seen[:, 1], ".", color=color, ms=4)
        p99 = r[name]["latency, s"]["p99"]
        ax.axhline(p99, color=GRAY, lw=0.9, ls="--")
        ax.text(0.2, p99 * 1.08, f"p99 {p99:.2f} s", fontsize=8, va="bottom")
        ax.set(xlabel="came after, s", yscale="log")
        ax.set_title(f"{name} loop: {r[name]['above 0.5 s']} of {len(seen)} above 0.5 s")
    axes[0].set_ylabel("latency, s")
    figure.tight_layout()
    save(figure, "15_loops")


def curve() -> None:
    """Left, waits and goodput by rate; right, an overload with a long and with a short queue."""
    r = recorded("chapter_15")
    rows = r["curve"]["open"]
    figure, axes = plt.subplots(1, 2, figsize=(9.4, 3.2))
    rate = [x["rate"] for x in rows]
    for name, color in (("p50", BLUE), ("p99", WINE)):
        axes[0].plot(rate, [x["TTFT, s"][name] for x in rows], "o-", color=color, ms=4, lw=1.3, label=f"TTFT {name}")
    axes[0].axvline(r["curve"]["most, requests/s"], color=GRAY, lw=0.9, ls=":")
    axes[0].set(xlabel="requests a second", ylabel="seconds", yscale="log")
    other = axes[0].twinx()
    other.plot(rate, [x["goodput, requests/s"] for x in rows], "s--", color=ORANGE, ms=4, lw=1.2, label="goodput")
    other.set_ylabel("goodput, requests/s", color=ORANGE)
    other.set_ylim(bottom=0)
    other.spines["right"].set_visible(True)
    lines = [*axes[0].get_lines()[:2], *other.get_lines()]
    axes[0].legend(lines, [line.get_label() for line in lines], fontsize=8, loc="lower right")
    for most, color, marker in (("1024", WINE, "o"), ("4", BLUE, "^")):
        seen = r["bound"][most]["seen"]
        done = np.array([(at, first) for at, first in seen if first is not None])
        label = f"queue of {int(most):,}"
        axes[1].plot(done[:, 0], done[:, 1], marker, color=color, ms=4, ls="", label=label)
        refused = [at for at, first in seen if first is None]
        axes[1].plot(refused, [0] * len(refused), "x", color=color, ms=4, label="429" if refused else None)
    axes[1].axhline(r["curve"]["limits, s"]["ttft"], color=GRAY, lw=0.8, ls=":")
    axes[1].set(xlabel="came after, s", ylabel="first token after, s")
    axes[1].legend(fontsize=8, loc="upper left")
    figure.tight_layout()
    save(figure, "15_curve")


if __name__ == "__main__":
    layers()
    pressure()
    routing()
    loops()
    curve()
