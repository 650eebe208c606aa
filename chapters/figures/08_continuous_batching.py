"""Draw the figures of chapter 8: `python chapters/figures/08_continuous_batching.py` writes 08_*.svg beside this."""

import contextlib

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter
from style import look, save

from minillm.cache.blocks import BlockPool, BlockTable
from minillm.config import LLAMA_3_8B, ModelConfig
from minillm.engine.request import Request
from minillm.engine.scheduler import Scheduler
from minillm.learn import COLORS
from minillm.learn.excerpts import results
from minillm.sampling import SamplingParams

BLUE, ORANGE, WINE, SKY, BLACK = COLORS
GRAY, PALE = "#777777", "#dcdcdc"
LABELS = {"smollm2": "SmolLM2-135M", "qwen3": "Qwen3-0.6B"}
look(9)


def gantt() -> None:
    """The same requests, batched three ways, as measured."""
    measured = results("chapter_08")["batching"]
    figure, axes = plt.subplots(3, 1, figsize=(7.6, 5.6), sharex=True)
    for ax, (name, way) in zip(axes, measured["ways"].items(), strict=True):
        for one in way["lines"]:
            for start, end, color in (
                (one["began"], one["first"], ORANGE),
                (one["first"], one["last"], BLUE),
                (one["last"], one["left"], PALE),
            ):
                ax.barh(one["row"], end - start, left=start, height=0.8, color=color)
            ax.plot([one["began"]] * 2, [one["row"] - 0.4, one["row"] + 0.4], color="white", lw=1.2)
        came = [one["arrived"] for one in way["lines"]]
        ax.plot(came, [measured["rows"] - 0.25] * len(came), "|", color="black", ms=6)
        title = f"{name}: {way['seconds']:.1f} s, first token after {way['TTFT, s']['p50']:.1f} s (median)"
        ax.set(yticks=[], ylabel="rows", ylim=(measured["rows"], -0.6))
        ax.set_title(title, fontsize=9, loc="left")
    axes[-1].set_xlabel("seconds")
    handles = [Patch(fc=color) for color in (ORANGE, BLUE, PALE)] + [
        plt.Line2D([], [], color="black", ls="", marker="|")
    ]
    names = ["until the first token", "decoding", "row held for nothing", "a request arrives"]
    figure.legend(handles, names, loc="lower center", ncols=4, bbox_to_anchor=(0.5, -0.03), fontsize=8)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    save(figure, "08_gantt")


def batch() -> None:
    """What a decode step takes at least on an H100, by batch: weights, cache, products."""
    ceilings = results("chapter_05", "h100")["ceilings"]
    copy, product = ceilings["copy bytes/s"], ceilings["matmul FLOP/s"]
    small = ModelConfig.from_dict(results("chapter_02")["numbers"]["config"])
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.1))
    batches = np.array([2**i for i in range(11)])
    for ax, (name, config) in zip(axes, (("SmolLM2-135M", small), ("an 8B model", LLAMA_3_8B)), strict=True):
        flops = sum(config.flops_per_token(0).values())
        weights = flops / copy  # 2 FLOPs and, in 16 bits, 2 bytes for each weight of a matrix
        ax.loglog(batches, 1e3 * np.full(len(batches), weights), color=BLUE, label="weights, read once")
        ax.loglog(batches, 1e3 * batches * flops / product, color=WINE, ls="-.", label="products with them")
        for context, style in ((256, ":"), (2048, "-")):
            cache = 1e3 * batches * context * config.kv_bytes_per_token() / copy
            ax.loglog(batches, cache, color=ORANGE, ls=style, label=f"cache of {context:,} tokens each")
        ax.set(title=name, xlabel="requests that decode", xticks=[1, 8, 64, 512])
        ax.set_xticks([1, 8, 64, 512], ["1", "8", "64", "512"])
        ax.minorticks_off()
    axes[0].set_ylabel("ms a step, at least")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="lower center", ncols=4, bbox_to_anchor=(0.5, -0.06), fontsize=8
    )
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    save(figure, "08_batch")


def budget() -> None:
    """The example of the chapter: who gets which of a step's six tokens."""
    plans = [[("A", 1), ("B", 5)], [("A", 1), ("B", 4), ("C", 1)], [("A", 1), ("B", 1), ("C", 2)],
             [("A", 1), ("B", 1), ("C", 1)]]  # fmt: skip
    gets = ["A", "A, B", "A, B, C", "A, B, C"]
    colors = {"A": BLUE, "B": ORANGE, "C": WINE}
    figure, ax = plt.subplots(figsize=(7.6, 2.9))
    for step, plan in enumerate(plans):
        height = 0
        for name, count in plan:
            for _ in range(count):
                ax.bar(step, 0.92, bottom=height + 0.04, width=0.62, color=colors[name])
                ax.text(step, height + 0.5, name, ha="center", va="center", color="white", fontsize=9)
                height += 1
        ax.text(step, 6.25, f"a token for {gets[step]}", ha="center", fontsize=8)
    ax.plot([-0.6, 3.5], [6, 6], color="black", lw=0.9, ls="--")
    ax.text(3.55, 6, "budget", va="center", fontsize=8.5)
    ax.set(xlim=(-0.6, 4.0), ylim=(0, 7), xticks=range(4), ylabel="tokens of the step")
    ax.set_xticks(range(4), [f"step {i}" for i in range(1, 5)])
    save(figure, "08_budget")


def chunks() -> None:
    """Seconds of every step around the arrival of a long prompt, by budget, as measured."""
    measured = results("chapter_08")["chunks"]
    figure, axes = plt.subplots(1, 3, figsize=(7.8, 2.9), sharey=True)
    for ax, row in zip(axes, measured["rows"], strict=True):
        steps, came, now = row["steps, s"], row["arrivals"][0], 0.0
        waited = 0.0
        for i, seconds in enumerate(steps):
            inside = i >= came and waited < row["TTFT, s"] - 1e-3
            waited += seconds if i >= came else 0.0
            ax.bar(
                now, 1e3 * seconds, width=seconds, align="edge", color=ORANGE if inside else BLUE, ec="white", lw=0.5
            )
            now += seconds
        ax.set_title(f"budget {row['budget']}:\nfirst token after {row['TTFT, s']:.1f} s", fontsize=9)
        ax.set(xlabel="seconds", xlim=(0, None))
    axes[0].set_ylabel("ms a step: what the others wait")
    handles = [Patch(fc=ORANGE), Patch(fc=BLUE)]
    names = [f"steps with a part of the prompt of {measured['prompt']}", "the others"]
    figure.legend(handles, names, loc="lower center", ncols=2, bbox_to_anchor=(0.5, -0.05), fontsize=8)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    save(figure, "08_chunks")


def preemption(blocks: int = 14) -> None:
    """The package's scheduler with too few blocks: who computes what, and the blocks in use."""
    rng, pool = np.random.default_rng(5), BlockPool(blocks, 16, enable_prefix_caching=False)
    scheduler, plans, used = Scheduler(pool, 8, 512), [], []
    for i in range(6):
        prompt, outputs = [0] * int(rng.integers(10, 40)), int(rng.integers(20, 60))
        scheduler.add(Request(str(i), prompt, SamplingParams(), BlockTable(pool), outputs, order=i))
    while scheduler.running or scheduler.waiting:
        scheduled, _ = scheduler.schedule()
        plans.append(scheduled)
        used.append(pool.num_used)
        scheduler.advance(scheduled)
        for request, _ in scheduled:
            if request.num_pending:
                request.num_pending = 0
                request.output_token_ids.append(0)
                if request.is_full:
                    scheduler.remove(request)
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7.4, 3.6), sharex=True, gridspec_kw={"height_ratios": [3, 1.2]}
    )
    seen: set[Request] = set()
    for step, plan in enumerate(plans):
        for request, count in plan:
            again = count > 1 and request in seen
            color = WINE if again else ORANGE if request not in seen else BLUE
            seen.add(request)
            above.barh(int(request.request_id), 1, left=step, height=0.8, color=color)
    above.set(ylabel="request", yticks=range(6))
    above.invert_yaxis()
    handles = [Patch(fc=color) for color in (ORANGE, BLUE, WINE)]
    above.legend(handles, ["prompt", "one token a step", "everything again"], fontsize=8, loc="upper right")
    below.fill_between(range(len(used)), used, step="post", color="#c9d8ea")
    below.axhline(blocks, color="black", lw=0.9, ls="--")
    below.set(xlabel="step", ylabel="blocks", ylim=(0, blocks * 1.15), yticks=[0, blocks])
    figure.tight_layout()
    save(figure, "08_preemption")


def load() -> None:
    """Latency and good requests by rate of arrivals: on the CPU, and on the H100 where it is recorded."""
    panels = [("SmolLM2, one CPU thread", results("chapter_08")["curve"])]
    with contextlib.suppress(FileNotFoundError):
        panels.append(("Qwen3-0.6B's shape, H100", results("chapter_08", "h100")["shapes"]["qwen3"]["curve"]))
    figure, axes = plt.subplots(2, len(panels), figsize=(4.0 * len(panels), 4.2), squeeze=False, sharex="col")
    for column, (title, found) in zip(axes.T, panels, strict=True):
        rates = [row["requests"] / found["seconds of arrivals"] for row in found["rates"]]
        for name, color in (("TTFT, s", BLUE), ("ITL, s", ORANGE)):
            for percentile, style in (("p50", "-"), ("p99", ":")):
                values = [1e3 * row[name][percentile] for row in found["rates"]]
                label = f"{name[:-3]}, {'median' if percentile == 'p50' else '99 of 100'}"
                column[0].semilogy(rates, values, "o", ls=style, color=color, ms=3.5, label=label)
        column[0].set(ylabel="ms", title=title)
        column[0].yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        column[0].yaxis.set_major_formatter("{x:,.0f}")
        column[0].yaxis.set_minor_formatter(NullFormatter())
        column[1].plot(rates, [100 * row["within both limits"] for row in found["rates"]], "o-", color=WINE, ms=3.5)
        column[1].axvline(found["saturated requests/s"], color=GRAY, lw=0.8, ls="--", label="all at once")
        column[1].set(xlabel="requests that arrive a second", ylabel="% within both limits", ylim=(0, 105))
    axes[0][0].legend(fontsize=7.5, loc="upper left")
    axes[1][0].legend(fontsize=7.5, loc="lower left")
    axes[0][0].set_ylim(top=12 * axes[0][0].get_ylim()[1])
    figure.tight_layout()
    save(figure, "08_load")


def steps() -> None:
    """A decode step on the H100: by batch beside its floor of bytes, and by how it is launched."""
    shapes = results("chapter_08", "h100")["shapes"]
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.2), width_ratios=[1, 1, 1.5])
    for ax, (name, shape) in zip(axes, shapes.items(), strict=False):
        batches = [row["batch"] for row in shape["sweep"]]
        ax.loglog(batches, [1e3 * row["seconds"] for row in shape["sweep"]], "o-", color=BLUE, ms=4, label="measured")
        floor = [1e3 * row["floor"] for row in shape["sweep"]]
        ax.loglog(batches, floor, "s--", color=ORANGE, ms=4, label="least: weights and cache read once")
        ax.set(title=LABELS[name], xlabel="requests that decode", ylim=(0.05, 30))
        ax.set_xticks(batches[::2], batches[::2])
        ax.set_yticks([0.1, 1, 10], ["0.1", "1", "10"])
        ax.minorticks_off()
    axes[0].set_ylabel("ms a step")
    axes[0].legend(fontsize=7, loc="upper left")
    rows = [(name, row) for name, shape in shapes.items() for row in shape["modes"]]
    looks = ((GRAY, ""), (SKY, "///"), (ORANGE, ""), (BLUE, ""))
    for j, (label, (color, hatch)) in enumerate(zip(rows[0][1]["seconds"], looks, strict=True)):
        at = [i + 0.2 * (j - 1.5) for i in range(len(rows))]
        values = [1e3 * row["seconds"][label] for _, row in rows]
        axes[2].bar(at, values, 0.19, color=color, hatch=hatch, ec="white", lw=0, label=label)
    axes[2].set(yscale="log", title="how it is launched", ylim=(0.3, 200))
    axes[2].set_yticks([1, 10], ["1", "10"])
    axes[2].minorticks_off()
    names = [f"{LABELS[name].split('-')[0]}\n{row['batch']}" for name, row in rows]
    axes[2].set_xticks(range(len(rows)), names, fontsize=7.5)
    axes[2].set_xlabel("model, batch")
    axes[2].legend(fontsize=6.5, loc="upper center", ncols=2, handlelength=1.2, columnspacing=0.8)
    figure.tight_layout()
    save(figure, "08_steps")


def prompts() -> None:
    """What a prompt of 8,000 tokens does to 64 who decode, and they to it, by budget, on the H100."""
    shapes = results("chapter_08", "h100")["shapes"]
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 2.9), sharey=True)
    for ax, (name, shape) in zip(axes, shapes.items(), strict=True):
        found = shape["long prompts"]["rows"]
        budgets = [row["budget"] for row in found]
        for label, values, color, style in (
            ("first token of the prompt", [row["TTFT, s"] for row in found], WINE, "-"),
            ("ITL of the others, 99 of 100", [row["ITL, s"]["p99"] for row in found], ORANGE, ":"),
            ("ITL of the others, median", [row["ITL, s"]["p50"] for row in found], BLUE, "--"),
        ):
            ax.loglog(budgets, [1e3 * v for v in values], "o", ls=style, color=color, ms=4, label=label)
        ax.set(title=LABELS[name], xlabel="budget, tokens a step", ylim=(0.7, 400))
        ax.set_xticks(budgets, [f"{b:,}" for b in budgets], fontsize=7.5)
        ax.set_yticks([1, 10, 100], ["1", "10", "100"])
        ax.minorticks_off()
    axes[0].set_ylabel("ms")
    axes[1].legend(fontsize=7, loc="upper right")
    figure.tight_layout()
    save(figure, "08_prompts")


def overlap() -> None:
    """Host and device in three engines: eager, graphs, graphs and one step in flight (a sketch, not to scale)."""
    figure, axes = plt.subplots(3, 1, figsize=(7.4, 4.0), sharex=True)
    modes = (("kernels launched one by one", 0.25, 1.5, 0.7, 0), ("a CUDA graph", 0.25, 0.08, 0.7, 0),
             ("a CUDA graph, one step in flight", 0.25, 0.08, 0.7, 1))  # fmt: skip
    for ax, (title, schedule, launch, device, ahead) in zip(axes, modes, strict=True):
        ends, host_free = [], 0.0
        for i in range(6):
            ready = max(host_free, ends[i - 1 - ahead] if i > ahead else 0.0)
            ax.barh(1, schedule, left=ready, color=GRAY, height=0.7)
            ax.barh(1, launch, left=ready + schedule, color=ORANGE, height=0.7)
            host_free = ready + schedule + launch
            first = ready + schedule + min(launch, 0.08)
            begin = max(first, ends[-1] if ends else 0.0)
            busy = max(device, host_free - begin + 0.05) if launch > 1 else device
            if launch > 1:  # small kernels with gaps: the device waits for each launch
                for k in range(7):
                    ax.barh(0, device / 7, left=begin + k * (busy - device / 7) / 6, color=BLUE, height=0.7)
            else:
                ax.barh(0, device, left=begin, color=BLUE, height=0.7, ec="white")
            ends.append(begin + busy)
        ax.set(yticks=[0, 1], yticklabels=["device", "host"], xticks=[], xlim=(0, 6.5), ylim=(-0.5, 1.5))
        ax.set_title(title, fontsize=9, loc="left")
    axes[-1].set_xlabel("time →")
    handles = [Patch(fc=color) for color in (GRAY, ORANGE, BLUE)]
    names = ["read tokens, schedule", "launch", "kernels"]
    figure.legend(handles, names, loc="lower center", ncols=3, bbox_to_anchor=(0.5, -0.04), fontsize=8)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    save(figure, "08_overlap")


if __name__ == "__main__":
    for draw in (gantt, batch, budget, chunks, preemption, load, steps, prompts, overlap):
        draw()
