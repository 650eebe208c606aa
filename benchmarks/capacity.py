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


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
    print(TARGET)
