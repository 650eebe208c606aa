"""One way to record a measurement: results with the device, versions, commit and date that they belong to."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def device() -> tuple[str, str]:
    """(folder name, description) of what this runs on: the GPU where there is one, else the CPU with the cores we may
    use.
    """
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return next(
            (short for short in ("h100", "h200", "a100") if short in name.lower()), name.lower().replace(" ", "-")
        ), name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"cpu-{cores}-cores", f"{_cpu_name()}, {cores} cores"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def median_seconds(run: Callable[[], object], repeats: int = 5, warmup: int = 1) -> float:
    """The median wall-clock time of `run()` in seconds, after `warmup` calls."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def record(suite: str, results: dict, packages: tuple[str, ...] = ("torch", "numpy", "transformers")) -> Path:
    """Write results/<device>/<suite>.json with its provenance and return the path. Figures keep four significant
    digits.
    """
    folder, description = device()
    folder_path = Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "benchmarks" / "results" / folder
    document = {
        "provenance": {
            "suite": suite,
            "device": description,
            "versions": {"Python": platform.python_version(), **{p: _version(p) for p in packages}},
            "commit": _commit(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        },
        "results": _rounded(results),
    }
    folder_path.mkdir(parents=True, exist_ok=True)
    path = folder_path / f"{suite}.json"
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
