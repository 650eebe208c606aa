"""One way to record a measurement: results with the device, versions, commit and date that they belong to."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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


def record_path(suite: str) -> Path:
    """Where this device's record of a suite is written: below $OUT, or in results/."""
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "benchmarks" / "results" / device()[0]
    return folder / f"{suite}.json"


def recorded(suite: str) -> dict:
    """The results that this device's record holds so far: of where it is written, else of results/; {} of none."""
    for path in (record_path(suite), ROOT / "benchmarks" / "results" / device()[0] / f"{suite}.json"):
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))["results"]
    return {}


def parts_asked(parts: Iterable[str], left_out: Collection[str] = ()) -> list[str]:
    """The parts that the command line names; else all but those left out."""
    wanted = [a for a in sys.argv[1:] if not a.startswith("--")]
    if unknown := set(wanted) - set(parts):
        raise SystemExit(f"part: expected some of {', '.join(parts)}, got {', '.join(unknown)}")
    return wanted or [part for part in parts if part not in left_out]


def run_parts(suite: str, parts: dict[str, Callable[[Any, Callable[[dict], None]], None]], wanted: Sequence[str],
              bench: Any, kept: bool) -> None:  # fmt: skip
    """Run them one after another, each with a function that records what it has so far, beside the others'."""
    results, begin = recorded(suite), time.perf_counter()
    for name in wanted:
        start = time.perf_counter()

        def save(found: dict, name: str = name) -> None:
            results[name] = found
            if kept:
                record(suite, results)

        parts[name](bench, save)
        now = time.perf_counter()
        print(f"{name}: {now - start:.0f} s, {now - begin:.0f} s in all", flush=True)


def record(suite: str, results: dict, packages: tuple[str, ...] = ("torch", "numpy", "transformers")) -> Path:
    """Write results/<device>/<suite>.json with its provenance and return the path. Figures keep four significant
    digits.
    """
    _, description = device()
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
    path = record_path(suite)
    path.parent.mkdir(parents=True, exist_ok=True)
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
