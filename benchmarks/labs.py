"""Every lab on this machine's GPU, top to bottom, as a reader there would run it: does each cell run, how long does it
take, and what do the cells say that time kernels?

    python benchmarks/labs.py             all labs, recorded under results/<device>/labs.json
    python benchmarks/labs.py 09 10       these alone

Cells run in IPython, without a notebook server, each lab in a process of its own, as a kernel is; what cells that ask
for a GPU printed is kept. On a CPU, where `make test-notebooks` holds every output, nothing is recorded.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "agg")

import torch
from common import ROOT, record


def run(path: Path) -> dict:
    """Its seconds, cells, and what the cells printed that ask for a GPU. Raises RuntimeError that names a cell."""
    from IPython.core.interactiveshell import InteractiveShell

    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance()
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    start, said = time.perf_counter(), {}
    for i, cell in enumerate(cells):
        source, printed = "".join(cell["source"]), io.StringIO()
        with contextlib.redirect_stdout(printed):
            done = shell.run_cell(source)
        expected = "raises-exception" in cell["metadata"].get("tags", [])
        if not done.success and not expected:
            why = done.error_before_exec or done.error_in_exec
            raise RuntimeError(f"{path.name}, code cell {i}: {type(why).__name__}: {why}\n{source[:300]}")
        if "cuda" in source and printed.getvalue().strip():
            said[str(i)] = printed.getvalue()[-3000:]
    return {"seconds": time.perf_counter() - start, "cells": len(cells), "printed": said}


def apart(path: Path) -> dict:
    """`run` in a process of its own, or what failed."""
    command = [sys.executable, __file__, "--one", str(path)]
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr.strip()[-1000:]}
    return json.loads(done.stdout.splitlines()[-1])


def main(wanted: list[str]) -> int:
    """Run, show, record; the exit status says whether all ran."""
    if wanted[:1] == ["--one"]:
        print(json.dumps(run(Path(wanted[1]))))
        return 0
    results = {}
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        if wanted and path.stem[:2] not in wanted:
            continue
        found = results[path.stem] = apart(path)
        rest = {k: v for k, v in found.items() if k != "printed"}
        print(path.stem, rest, *found.get("printed", {}).values(), flush=True)
        if torch.cuda.is_available():
            record("labs", results, ("torch", "triton"))
    return any("failed" in found for found in results.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
