"""Every kernel compiles for every generation of GPUs, as it would be launched there, and none is needed for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minillm.kernels import KERNELS

pytest.importorskip("triton")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled anyway")]

SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227}  # KiB that a program may have
SPILLED = 256  # bytes of a thread's registers that may live in memory
NEVER_ON_TURING = {"matmul", "matmul_swiglu", "flash_attention", "w8a8"}  # Triton has no tensor cores there
ALL = os.environ.get("HYPOTHESIS_PROFILE") == "deep"


# A process each: what 80 launches, too, 86 and 89 need not compile again.
@pytest.mark.parametrize("capabilities", [(75,), (80, 86, 89), (90,)], ids=str)
def test_launches_compile_and_fit(capabilities):
    command = [sys.executable, str(Path(__file__).with_name("launches.py")), *map(str, capabilities)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "MINILLM_KERNELS"))}
    done = subprocess.run(
        command + ["--all"] * ALL, capture_output=True, text=True, env=environment | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [why for line in found if (why := _wrong(line))]
    assert not wrong, "\n".join(wrong)
    for capability in capabilities:
        here = [line for line in found if line["capability"] == capability]
        by_torch = {line["operation"] for line in here if line.get("path") == "torch"}
        assert by_torch == (NEVER_ON_TURING if capability < 80 else set())
        assert {line["operation"] for line in here} == set(KERNELS)
        early = {line["sizes"]["PDL"] for line in here if "PDL" in line.get("sizes", {})}
        assert early == {"True" if capability >= 90 else "False"}
        assert any(line.get("descriptors") for line in here) == (capability >= 90)
        if capability in (86, 89):  # what was not compiled again is as it was: samples say so
            assert sum("same" in line for line in here) >= 3


def _wrong(line: dict) -> str:
    """What is wrong with a launch, in a line; empty if nothing is."""
    if line.get("path") == "torch":
        return ""
    limit, at = SHARED[line["capability"]], f" (capability {line['capability']}: {line['what']}; {line['sizes']})"
    if "error" in line:
        return f"{line['kernel']}: {line['error']}{at}"
    if not line.get("same", True):
        return f"{line['kernel']}: other code than for 80; compile all of them again{at}"
    if line["shared"] > limit * 1024:
        return f"{line['kernel']}: {line['shared'] / 1024:.0f} KiB of shared memory a program, of {limit}{at}"
    if line["local_bytes"] > SPILLED:
        return f"{line['kernel']}: {line['local_bytes']} B of a thread's registers spilled, over {SPILLED}{at}"
    return ""
