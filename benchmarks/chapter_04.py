"""What chapter 4 quotes: ladders from naive to near the limit, three ways to fool oneself, a roofline, autotuning.

    python benchmarks/chapter_04.py                  all parts, recorded (one GPU, about five minutes)
    python benchmarks/chapter_04.py ladders caches   these parts again; the rest of the recorded file stays
    python benchmarks/chapter_04.py --cpu            tiny sizes in Triton's interpreter: results compared, nothing timed

A rung of a ladder has the bytes that it asks memory for; the ladder has those that must move whatever one does.
"""
# ruff: noqa: E402

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

CPU = "--cpu" in sys.argv
if CPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import naive
import torch
import torch.nn.functional as F
from common import ROOT, device, record
from kernels import add_rms, difference, rms
from naive import EPS
from torch import Tensor

from minillm import kernels
from minillm.kernels.common import ceil_div, sm_count

if not CPU:
    import gpu

DEVICE = "cpu" if CPU else "cuda"
DTYPE = torch.float16 if CPU else torch.bfloat16  # the interpreter computes bf16 wrongly
SIZE = torch.finfo(DTYPE).bits // 8


@dataclass
class Rung:
    """One way to do a ladder's work: its function, and the bytes that it asks memory for, None where nobody says."""

    name: str
    run: Callable
    asked: float | None


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(DTYPE)


def ladders() -> list[dict]:
    """Every ladder: outputs compared with the first rung's, then timed."""
    n = 10_000 if CPU else 1 << 26
    inputs = tuple(torch.randn(n, device=DEVICE) for _ in range(2))
    rungs = [Rung("torch", torch.add, 12 * n)]
    rungs.append(Rung("scattered elements", lambda x, y: naive.add(x, y, 1024, 4, scattered=True), 12 * n))
    for block, warps in ((32, 1), (128, 4), (1024, 4), (4096, 8))[2 if CPU else 0 :]:
        rungs.append(Rung(f"blocks of {block}", lambda x, y, b=block, w=warps: naive.add(x, y, b, w), 12 * n))
    found = [ladder(f"vector add, {n:,} fp32", inputs, rungs, 12 * n, n)]

    rows, n = (8, 1500) if CPU else (65_536, 4096)
    one, x, w = rows * n * SIZE, randn(rows, n), randn(n)
    rungs = [Rung("torch, five operations", naive.softmax_steps, 8 * one)]
    rungs.append(Rung("one kernel, three passes", naive.three_passes, 4 * one))
    rungs += [Rung(f"row in registers, {k} warps", lambda x, k=k: naive.softmax(x, k), 2 * one) for k in (1, 4)]
    rungs += [Rung("minillm", kernels.softmax, 2 * one), Rung("torch.softmax", lambda x: x.softmax(-1), None)]
    found.append(ladder(f"softmax {rows:,} x {n:,}", (x,), rungs, 2 * one, 5 * rows * n))

    rungs = [Rung("torch, six operations", rms, 18 * one), Rung("one kernel, two passes", naive.two_passes, 3 * one)]
    rungs += [Rung(f"row in registers, {k} warps", lambda x, w, k=k: naive.norm(x, w, k), 2 * one) for k in (1, 4)]
    rungs.append(Rung("minillm", lambda x, w: kernels.rms_norm(x, w, EPS), 2 * one))
    found.append(ladder(f"rms_norm {rows:,} x {n:,}", (x, w), rungs, 2 * one, 4 * rows * n))

    rungs = [Rung("torch", add_rms, 21 * one), Rung("torch's sum, minillm's norm", naive.sum_then_norm, 5 * one)]
    rungs.append(Rung("minillm", lambda x, r, w: kernels.add_rms_norm(x, r, w, EPS), 4 * one))
    found.append(ladder(f"add_rms_norm {rows:,} x {n:,}", (x, randn(rows, n), w), rungs, 4 * one, 5 * rows * n))

    rows, n = (8, 1500) if CPU else (16_384, 14_336)
    one, x = rows * n * SIZE, randn(rows, 2 * n)
    rungs = [Rung("torch, two operations", kernels.KERNELS["swiglu"].torch, 5 * one)]
    rungs += [Rung(f"blocks of {b}", lambda x, b=b: naive.swiglu(x, b, 4), 3 * one) for b in (128, 1024)]
    rungs.append(Rung("minillm", kernels.swiglu, 3 * one))
    found.append(ladder(f"swiglu {rows:,} x {n:,}", (x,), rungs, 3 * one, 6 * rows * n))
    return [*found, *products()]


def products() -> list[dict]:
    """The matrix product, and SwiGLU as its epilogue."""
    n = 128 if CPU else 8192
    x, w = randn(n, n), randn(n, n, scale=n**-0.5)
    out = n * n * SIZE

    def asked(m: int, columns: int) -> float:
        return n * n * n * SIZE * (1 / m + 1 / columns) + out

    rungs = [Rung("cuBLAS", F.linear, None), Rung("32 x 32, no tensor cores", naive.no_dot, asked(32, 32))]
    for m, c, k, group, warps in ((32, 32, 32, 1, 4), (64, 64, 32, 1, 4), (128, 128, 64, 1, 8), (128, 128, 64, 8, 8)):
        name = f"{m} x {c}, {'in groups of 8' if group > 1 else 'row by row'}"
        rungs.append(Rung(name, lambda x, w, a=(m, c, k, group, warps): naive.tiles(x, w, *a, stages=3), asked(m, c)))
    rungs.append(Rung("minillm: 128 x 256, copy engine", kernels.matmul, asked(128, 256)))
    found = [ladder(f"matmul {n} x {n} x {n}", (x, w), rungs, 3 * out, 2.0 * n**3)]
    m, i, k = (64, 48, 32) if CPU else (8192, 14_336, 4096)
    x, w = randn(m, k), randn(2 * i, k, scale=k**-0.5)
    needed = (m * k + 2 * i * k + m * i) * SIZE
    plain = kernels.KERNELS["swiglu"].torch
    rungs = [Rung("cuBLAS, then torch", lambda x, w: plain(F.linear(x, w)), needed + 6 * m * i * SIZE)]
    rungs.append(Rung("cuBLAS, then minillm", lambda x, w: kernels.swiglu(F.linear(x, w)), needed + 4 * m * i * SIZE))
    rungs.append(Rung("minillm, epilogue", kernels.matmul_swiglu, needed))
    return [*found, ladder(f"matmul_swiglu {m} x {i} x {k}", (x, w), rungs, needed, 4.0 * m * i * k)]


def ladder(name: str, inputs: tuple, rungs: list[Rung], needed: float, flops: float) -> dict:
    """Compare all rungs with the first, time them, and return the rows."""
    expected, rows = rungs[0].run(*inputs), []
    for rung in rungs:
        found = difference(rung.run(*inputs), expected)
        assert found < 1e-2, f"{name}, {rung.name}: differs by {found}"
        row = {"name": rung.name, "asked": rung.asked, "difference": found}
        if not CPU:
            row["seconds"] = gpu.seconds([lambda i=i, rung=rung: rung.run(*i) for i in gpu.copies(*inputs)])
            print(f"{name:36} {rung.name:32} {1e6 * row['seconds']:10.1f} µs", flush=True)
        rows.append(row)
    return {"name": name, "needed": needed, "flops": flops, "rungs": rows}


def launch_gaps() -> dict:
    """Seconds a launch of a small kernel: clock without waiting, a loop, the same loop as a graph; by elements."""
    found = {}
    for n in (64,) if CPU else (1 << 12, 1 << 16, 1 << 20, 1 << 24):
        x, y = torch.randn(2, n, device=DEVICE)
        out, count = torch.empty_like(x), 1 if CPU else 1000 if n < 1 << 24 else 100

        def run(x: Tensor = x, y: Tensor = y, out: Tensor = out, n: int = n) -> None:
            naive.add_kernel[(ceil_div(n, 1024),)](x, y, out, n, SCATTERED=False, BLOCK=1024, num_warps=4)

        run()
        assert torch.equal(out, x + y)
        if CPU:
            continue
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            run()
        asked = time.perf_counter() - start
        torch.cuda.synchronize()
        loop = time.perf_counter() - start
        graph = gpu.graph_seconds([run] * 500)
        found[str(n)] = {"not waited": asked / count, "loop": loop / count, "graph": graph}
    return found


def caches() -> list[dict]:
    """Bytes a second of vector add: one set of buffers again and again, and sets that rotate beyond L2."""
    rows = []
    for n in (64,) if CPU else [1 << shift for shift in range(16, 27)]:
        sets = [tuple(torch.randn(3, n, device=DEVICE)) for _ in range(2 if CPU else max(2, (1 << 29) // (12 * n)))]

        def run(x: Tensor, y: Tensor, out: Tensor, n: int = n) -> None:
            naive.add_kernel[(ceil_div(n, 1024),)](x, y, out, n, SCATTERED=False, BLOCK=1024, num_warps=4)

        run(*sets[0])
        assert torch.equal(sets[0][2], sets[0][0] + sets[0][1])
        if not CPU:
            same = gpu.graph_seconds([lambda s=sets[0]: run(*s)] * 32)
            rotating = gpu.graph_seconds([lambda s=s: run(*s) for s in sets[:512]])
            rows.append({"bytes": 12 * n, "same": 12 * n / same, "rotating": 12 * n / rotating})
    return rows


def zeros() -> dict:
    """The same product on zeros, on one small number, on random numbers: FLOP/s, watts and MHz, two seconds each."""
    n, found = 64 if CPU else 8192, {}
    fills = {"zeros": torch.zeros, "ones": torch.ones, "random": torch.randn}
    for name, fill in [] if CPU else fills.items():
        a, b = (fill(n, n, device=DEVICE).to(DTYPE) for _ in range(2))
        count = 1500
        for _ in range(20):
            a @ b
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            a @ b
        time.sleep(0.5)
        query = ["nvidia-smi", "--query-gpu=power.draw,clocks.sm", "--format=csv,noheader,nounits"]
        said = subprocess.run(query, capture_output=True, text=True).stdout.split(",") if shutil.which(query[0]) else []
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        watts, mhz = (float(v) for v in said) if len(said) == 2 else (None, None)
        found[name] = {"flops/s": count * 2 * n**3 / seconds, "watts": watts, "MHz": mhz}
        time.sleep(2.0)  # the chip cools down
    return found


def roofline() -> list[dict]:
    """(kernel, intensity in FLOPs a byte, FLOP/s): one kernel with ever more arithmetic, products of ever more rows."""
    points = []

    def point(kernel: str, case: str, inputs: tuple, run: Callable, moved: float, flops: float) -> None:
        run(*inputs)
        if not CPU:
            seconds = gpu.seconds([lambda i=i: run(*i) for i in gpu.copies(*inputs)])
            row = {"kernel": kernel, "case": case, "intensity": flops / moved, "flops/s": flops / seconds}
            points.append(row)
            print(row, flush=True)

    n = 4096 if CPU else 1 << 26
    x = torch.randn(n, device=DEVICE)
    for rounds in (1, 4) if CPU else (1, 4, 16, 64, 128, 256, 512):

        def run(x: Tensor, rounds: int = rounds) -> Tensor:
            y = torch.empty_like(x)
            return naive.launched(
                naive.intensity_kernel, ceil_div(len(x), 1024), y, x, y, len(x), ROUNDS=rounds, BLOCK=1024
            )

        point("multiply-adds in fp32", f"{rounds} an element", (x,), run, 8 * n, 2 * rounds * n)
    n = 64 if CPU else 8192
    w = randn(n, n, scale=n**-0.5)
    for m in (16,) if CPU else (1, 8, 16, 64, 128, 256, 512, 1024, 4096, 8192):
        for name, run in (("minillm matmul", kernels.matmul), ("cuBLAS", F.linear)):
            point(name, f"{m} rows", (randn(m, n), w), run, SIZE * (2 * m * n + n * n), 2.0 * m * n * n)
    return points


def autotune() -> list[dict]:
    """Sizes for the copy engine's product at three shapes: seconds, registers, spills, shared memory."""
    rows = []
    configurations = ((64, 64, 64, 4, 3), (64, 128, 64, 4, 4), (128, 128, 64, 4, 4), (128, 128, 64, 8, 3))
    configurations += ((128, 256, 64, 8, 2), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 256, 64, 8, 3))
    for m, n, k in ((64, 64, 64),) if CPU else ((8192, 8192, 8192), (1024, 4096, 4096), (64, 8192, 8192)):
        x, w = randn(m, k), randn(n, k, scale=k**-0.5)
        for block_m, block_n, block_k, warps, stages in configurations[: 1 if CPU else None]:
            sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
            sizes |= {"num_warps": warps, "num_stages": stages}
            row = {"shape": [m, n, k], **sizes}
            try:
                y = x.new_empty(m, n)
                compiled = naive.tma(x, w, y, sizes)
                assert difference(y, F.linear(x, w)) < 1e-2
                if not CPU:
                    row |= {"registers": compiled.n_regs, "spills": compiled.n_spills}
                    row["shared"] = compiled.metadata.shared
                    sets = gpu.copies(x, w, y)
                    row["seconds"] = gpu.seconds([lambda s=s, sizes=sizes: naive.tma(*s, sizes) for s in sets])
            except Exception as error:
                if CPU:
                    raise
                row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            rows.append(row)
            print(row, flush=True)
    return rows


PARTS = {
    "ladders": ladders, "launch gaps": launch_gaps, "caches": caches, "zeros": zeros, "roofline": roofline,
    "autotune": autotune,
}  # fmt: skip


@torch.inference_mode()
def main(arguments: list[str]) -> None:
    """Measure the parts named, or all; on a CPU only compare."""
    names = {name.split()[0]: name for name in PARTS}
    wanted = [a for a in arguments if not a.startswith("--")] or list(names)
    if unknown := set(wanted) - set(names):
        raise SystemExit(f"part: expected some of {', '.join(names)}, got {', '.join(unknown)}")
    torch.manual_seed(0)
    path = ROOT / "benchmarks" / "results" / device()[0] / "chapter_04.json"
    found = json.loads(path.read_text(encoding="utf-8"))["results"] if path.is_file() and len(wanted) < 6 else {}
    if CPU:
        with kernels.use("triton"):
            for name in wanted:
                PARTS[names[name]]()
                print(f"{name}: results agree")
        return
    found["ceilings"] = gpu.ceilings()
    found["multiprocessors"] = sm_count(0)
    for name in wanted:
        found[names[name]] = PARTS[names[name]]()
    print(record("chapter_04", found, packages=("torch", "triton")))


if __name__ == "__main__":
    main(sys.argv[1:])
