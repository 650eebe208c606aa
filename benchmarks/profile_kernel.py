"""Softmax under a profiler: three ways, what Proton saw of each on a GPU.

    python benchmarks/profile_kernel.py     records benchmarks/results/<device>/profile.json

Proton (triton.profiler) gets every kernel's time from the driver, whoever launched it, and adds up what the scopes
around it say of bytes and FLOPs. It writes a tree as JSON; `proton-viewer -m time/us,tbyte/s softmax.hatchet` shows the
same in a terminal (it needs the package llnl-hatchet). For what a profiler cannot see, stalls and bank conflicts, take
NVIDIA's: `ncu --set full -k regex:softmax python benchmarks/profile_kernel.py`.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import naive
import torch
from common import record

ROWS, COLUMNS, ROUNDS = 65_536, 4096, 20


def kernels_in(node: dict[str, Any]) -> list[dict[str, Any]]:
    """The kernels below a node of Proton's tree: name, launches, nanoseconds of all launches."""
    found = [kernel for child in node.get("children", []) for kernel in kernels_in(child)]
    metrics = node.get("metrics", {})
    time = next((value for name, value in metrics.items() if name.startswith("time")), None)
    if time and not found:
        found.append({"name": node["frame"]["name"], "launches": metrics.get("count", 0), "ns": time})
    return found


def profiled(runs: dict[str, Any], x: torch.Tensor) -> dict[str, list[dict[str, Any]]]:
    """For each run the kernels that it launched, ROUNDS times after two that do not count."""
    import triton.profiler as proton

    for run in runs.values():
        run(x), run(x)
    torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "softmax")
        session = proton.start(str(path))
        for name, run in runs.items():
            with proton.scope(name, {"bytes": 2 * ROUNDS * x.numel() * x.element_size()}):
                for _ in range(ROUNDS):
                    run(x)
        torch.cuda.synchronize()
        proton.finalize(session)
        tree = json.loads(path.with_suffix(".hatchet").read_text(encoding="utf-8"))[0]
    return {node["frame"]["name"]: kernels_in(node) for node in tree["children"]}


@torch.inference_mode()
def main() -> None:
    """Profile, print and record."""
    if not torch.cuda.is_available():
        raise SystemExit(
            "profile_kernel.py: expected a GPU; without one, benchmarks/inspect_kernels.py compiles kernels"
        )
    os.environ.pop("TRITON_INTERPRET", None)
    x = torch.randn(ROWS, COLUMNS, device="cuda", dtype=torch.bfloat16)
    runs = {
        "torch, five operations": naive.softmax_steps,
        "one kernel, three passes": naive.three_passes,
        "row in registers": lambda x: naive.softmax(x, 4),
    }
    found = profiled(runs, x)
    moved = 2 * x.numel() * x.element_size()
    rows = {}
    for name, kernels in found.items():
        seconds = sum(k["ns"] for k in kernels) / ROUNDS * 1e-9
        rows[name] = {"seconds": seconds, "needed bytes/s": moved / seconds, "kernels": kernels}
        print(f"{name:26} {len(kernels)} kernels {1e6 * seconds:8.0f} µs")
    print(record("profile", {"rows": ROWS, "columns": COLUMNS, "rounds": ROUNDS, "runs": rows}, ("torch", "triton")))


if __name__ == "__main__":
    main()
