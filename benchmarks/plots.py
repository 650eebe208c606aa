"""Pictures of the recorded GPU results, beside them: roofline, peers, attention by length.

python benchmarks/plots.py [device]      results/<device>/kernels.json -> kernels_*.svg (default: h100)
"""

import json
import sys

import matplotlib
import numpy as np
from common import ROOT

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, PEERS, CEILING = "#1f5fa8", ["#c0392b", "#e08a1e", "#2e8b57", "#8e6bb0"], "#666666"
STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "minillm",
    "legend.frameon": False,
}  # fmt: skip


def roofline(rows: list[dict], ceiling: dict[str, float]) -> plt.Figure:
    """FLOP/s against FLOPs a byte, for what does arithmetic, under both ceilings."""
    figure, ax = plt.subplots(figsize=(6.4, 3.6))
    intensity = np.geomspace(8, 2e4, 200)
    limit = np.minimum(intensity * ceiling["copy bytes/s"], ceiling["matmul FLOP/s"])
    ax.loglog(intensity, limit / 1e12, color=CEILING, lw=1)
    for suite, color, label in (("matmul", PEERS[0], "products"), ("attention", OURS, "attention")):
        chosen = [row for row in rows if row["suite"] == suite]
        x = [row["flops"] / row["bytes"] for row in chosen]
        y = [row["flops"] / row["seconds"]["minillm"] / 1e12 for row in chosen]
        ax.loglog(x, y, "o", color=color, ms=4, label=label)
    ax.set(xlabel="FLOPs a byte", ylabel="TFLOP/s", title="roofline, with this GPU's measured ceilings")
    ax.legend(loc="lower right")
    return figure


def bars(rows: list[dict], suite: str, title: str) -> plt.Figure:
    """How much longer each peer takes: 1 is as fast as ours."""
    chosen = [row for row in rows if row["suite"] == suite]
    peers = list(dict.fromkeys(name for row in chosen for name in row["seconds"] if name != "minillm"))
    figure, ax = plt.subplots(figsize=(7.6, 0.34 * len(chosen) + 1.1))
    height = 0.8 / len(peers)
    for i, peer in enumerate(peers):
        ratio = [row["seconds"].get(peer, np.nan) / row["seconds"]["minillm"] for row in chosen]
        ax.barh(np.arange(len(chosen)) + i * height - 0.4, ratio, height, align="edge", color=PEERS[i], label=peer)
    ax.axvline(1, color=OURS, lw=1.5)
    ax.set_yticks(range(len(chosen)), [row["case"] for row in chosen], fontsize=8)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ticks = [t for t in (0.5, 1, 2, 4, 8, 16) if t <= 1.3 * ax.get_xlim()[1]]
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    ax.set_xlabel("time of the peer, ours being 1")
    ax.set_title(title)
    ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.4 / (0.34 * len(chosen) + 1.1) - 0.06), ncols=4)
    return figure


def lengths(rows: list[dict]) -> plt.Figure:
    """TFLOP/s by the length of the sequences, causal, one panel a head size."""
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 3), sharey=True)
    for ax, layout in zip(axes, ("d64 h32/32", "d128 h16/16"), strict=True):
        chosen = [row for row in rows if row["case"].startswith(f"attention {layout} causal")]
        x = [int(row["case"].split()[-1]) for row in chosen]
        for i, name in enumerate(chosen[0]["seconds"]):
            y = [row["flops"] / row["seconds"][name] / 1e12 for row in chosen]
            ax.plot(x, y, "o-", ms=4, color=OURS if name == "minillm" else PEERS[i - 1], label=name)
        ax.set_xscale("log", base=2)
        ax.set_xticks(x, [f"{n:,}" for n in x])
        ax.set(title=f"causal, {layout.replace('/', ' on ')}", xlabel="tokens a sequence")
    axes[0].set_ylim(0, 1.05 * max(line.get_ydata().max() for ax in axes for line in ax.lines))
    axes[0].set_ylabel("TFLOP/s")
    axes[1].legend(fontsize=8, loc="lower right")
    return figure


def main(device: str = "h100") -> None:
    """Write all pictures of a device."""
    folder = ROOT / "benchmarks" / "results" / device
    recorded = json.loads((folder / "kernels.json").read_text(encoding="utf-8"))["results"]
    rows, ceiling = recorded["rows"], recorded["ceilings"]
    plt.rcParams.update(STYLE)
    pictures = {
        "roofline": roofline(rows, ceiling),
        "memory": bars(rows, "memory", "what moves bytes"),
        "matmul": bars(rows, "matmul", "products"),
        "attention": lengths(rows),
    }
    for name, figure in pictures.items():
        path = folder / f"kernels_{name}.svg"
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
        print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
