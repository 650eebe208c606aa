"""Write minillm/gpus.json, the figures that `minillm plan` reckons with, from the records below results/.

    python benchmarks/capacity.py

- Copy and product of a GPU: the median of the ceilings that its records begin with.
- Kernels of a decode step: what the profiler counted (engine_idle), as a line over the number of layers.
- A kernel's own time: what the steps of chapter 8's sweep took beyond their bytes and FLOPs, over their kernels. One
  sequence alone has kernels of its own, which start before the one in front of them is done. The sweep was recorded on
  an H100; other GPUs take its figure.
- Memory: as sold, in bytes; no record has it.
"""

import json
import statistics
from pathlib import Path

import workloads as w

from minillm.capacity import SHAPES, find_gpu, plan

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "minillm" / "gpus.json"
MEMORY = {"h100": 80e9, "h200": 141e9}
KINDS = {"alone": "1", "several": "64"}  # sequences of the profiled batch


def records(device: str) -> dict[str, dict]:
    """{suite: what was recorded}"""
    folder = ROOT / "benchmarks" / "results" / device
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def kernels(idle: dict) -> dict[str, dict[str, int]]:
    """Kernels of a decode step: so many a layer, and so many besides."""
    found = {}
    for kind, batch in KINDS.items():
        layers = [w.SHAPES[shape].num_hidden_layers for shape in idle["shapes"]]
        line = statistics.linear_regression(layers, [row[batch]["kernels a step"] for row in idle["shapes"].values()])
        found[kind] = {"a layer": round(line.slope), "besides": round(line.intercept)}
    return found


def kernel_seconds(sweep: dict, counts: dict, copy: float, product: float) -> dict[str, float]:
    """What a kernel takes beside its share of bytes and FLOPs."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for shape, rows in sweep["shapes"].items():
        for row in rows["sweep"]:
            kind = "alone" if row["batch"] == 1 else "several"
            launched = counts[kind]["a layer"] * w.SHAPES[shape].num_hidden_layers + counts[kind]["besides"]
            rest = row["seconds"] - row["bytes"] / copy - row["flops"] / product
            found[kind].append(rest / launched)
    return {kind: float(f"{statistics.median(times):.3g}") for kind, times in found.items()}


def table() -> dict:
    """The content of gpus.json."""
    h100, gpus = records("h100"), {}
    counts = kernels(h100["engine_idle"]["results"])
    for device, memory in MEMORY.items():
        every = [r for r in records(device).values() if "copy bytes/s" in r["results"].get("ceilings", {})]
        copy, product = (
            statistics.median(r["results"]["ceilings"][key] for r in every) for key in ("copy bytes/s", "matmul FLOP/s")
        )
        if device == "h100":
            taken = kernel_seconds(h100["chapter_08"]["results"], counts, copy, product)
        gpus[device] = {
            "name": every[0]["provenance"]["device"], "measured": max(r["provenance"]["date"] for r in every),
            "memory, bytes": memory, "copy, bytes/s": copy, "product, FLOP/s": product, "a kernel, s": taken,
        }  # fmt: skip
    return {"source": "benchmarks/capacity.py, from benchmarks/results/", "kernels a step": counts, "gpus": gpus}


def text() -> str:
    return json.dumps(table(), indent=1) + "\n"


# ---- the plan against the records ------------------------------------------------------------------------------------


def recorded() -> list[tuple[str, str, str, str | None, float]]:
    """(device, what ran, shape, quantization, tokens/s) of the engine, wherever the plan has a row for it."""
    found = []
    for device in MEMORY:
        every = records(device)
        for part, key in (("workload", "output tokens/s"), ("stream", "decoding tokens/s")):
            rows = every[f"engine_{part}"]["results"]["shapes"]
            found += [(device, part, shape, None, row[key]) for shape, row in rows.items()]
            few = every.get("engine_quantized", {"results": {"shapes": {}}})["results"]["shapes"]
            found += [(device, part, s, bits, row[key]) for s, rows in few.items() for bits, row in rows.items()]
        adapted = every.get("engine_adapters", {"results": {"shapes": {}}})["results"]["shapes"]
        found += [(device, "64 at once", s, None, x["rows"]["0"]["output tokens/s"]) for s, x in adapted.items()]
    return [(d, part, s, None if bits == "bf16" else bits, rate) for d, part, s, bits, rate in found]


def planned(device: str, part: str, shape: str, bits: str | None) -> float:
    """Tokens/s. nano-vllm's workload as what it is on average: so many requests running, of the mean lengths."""
    jobs = w.workload()
    tokens, steps = sum(job.max_tokens for job in jobs), max(job.max_tokens for job in jobs) - 1
    means = round(sum(len(job.prompt) for job in jobs) / len(jobs)), round(tokens / len(jobs)), round(tokens / steps)
    prompt, output, running = {"workload": means, "stream": (128, 512, 1), "64 at once": (64, 256, 64)}[part]
    name = dict(zip(w.SHAPES, SHAPES, strict=False))[shape]
    found = plan(name, find_gpu(device), prompt + output, output, quantization=bits, max_num_seqs=running)
    return found["loads"][1]["tokens/s"]


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
    print(TARGET)
