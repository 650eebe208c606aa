"""The engine against its floor and against other engines: throughput, one stream, chat, arrivals at a rate, idle time.

    python benchmarks/engine.py            on a GPU: everything, under 8 minutes; on a CPU: cpu16, cpu_stream
    python benchmarks/engine.py --quick    a tiny shape, about a minute on two cores, nothing recorded
    python benchmarks/engine.py --only workload,stream --shapes qwen3

Each part has a file of its own, results/<device>/engine_<part>.json, written again after every shape, so that what
is done stays when something later fails. Weights are random (`load_format="dummy"`): speed does not depend on them.
First of all, greedy tokens of a small fp32 model must be the oracle's; on bf16, tokens are counted, not compared.

workload   nano-vllm's: 256 requests at once, 133,966 output tokens. The better of two runs after a warm-up.
stream     one request alone. Median of five.
special    256 requests and one, with top-p, top-k, min-p, penalties, log probabilities, against plain ones in turn.
quantized  the workload and one stream with weights of 4 and 8 bits, on the fly, against the same engine's in full.
prompts    32 requests of 4,096 tokens, 8 and one of 7,900, one of 1,024; the best of three. (Shapes with that context.)
adapters   64 requests without adapters, with one for all, with 8 and 64 different ones.
speculative  SmolLM2's own weights, copying, summing up, telling, 1 to 256 at once: guesses against plain decoding.
constrained  64 requests whose output must fit a JSON schema, against free ones of the same lengths.
idle       the GPU's idle time while a steady batch decodes, out of torch.profiler.
poisson    requests that arrive at fractions of the saturated rate: TTFT, ITL, goodput.
chat       conversations with a common beginning, prefix caching on and off. Median of five.
peers      transformers on the same requests in the same run: `generate` and its continuous batching.
cpu16      16 requests at once on the CPU against transformers one after another; file engine_cpu.json.
cpu_stream one answer on the CPU, in turn with transformers and llama.cpp; file engine_cpu_stream.json.

The byte floor: a decode step reads every weight once, reads the keys and values of every running sequence and writes
one token's (workloads.step_bytes), all at the copy rate measured in this run. Prompts count nothing in it.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import peers
import torch
import workloads as w
from common import record
from engine_parts import (
    DTYPE,
    GPU,
    LIMITS,
    TOKEN_LIMIT,
    TTFT_LIMIT,
    Bench,
    adapters,
    chat,
    check_tokens,
    constrained,
    idle,
    poisson,
    prompts,
    quantized,
    special,
    stream,
    workload,
)
from engine_speculative import DEFINITION, speculative

PARTS: dict[str, Callable[[Bench], dict | None]] = {
    "chat": chat, "workload": workload, "stream": stream, "special": special, "quantized": quantized,
    "adapters": adapters, "constrained": constrained, "speculative": speculative, "idle": idle, "poisson": poisson,
    "prompts": prompts,
    "peers": peers.against_transformers,
}  # fmt: skip
CPU: dict[str, tuple[Callable[[w.Sizes], dict], str]] = {  # and the suite under which each is recorded
    "cpu16": (peers.cpu16, "engine_cpu"), "cpu_stream": (peers.cpu_stream, "engine_cpu_stream"),
}  # fmt: skip
PACKAGES = ("torch", "triton", "transformers")
FLOOR = (
    "decode steps only, all requests running at once: weights once a step, every running sequence's keys and values"
    " read, one token's written, over the copy bytes/s of this run"
)
DEFINITIONS = {
    "workload": {"of two runs": "the better, after a warm-up", "sampling": "temperature 0.6", "floor": FLOOR},
    "stream": {
        "of five runs": "the median; decoding tokens/s leaves the first token and its time out", "floor": FLOOR,
    },
    "special": {
        "of plain": "the better of several runs each, in turn; of greedy ones where the special ones are greedy",
    },
    "quantized": {
        "runs": "the workload once, after a short warm-up; of one stream the best of three, its first token left out",
    },
    "prompts": {
        "of three runs": "the best, after a first; prompt tokens over the seconds until the last token", "cases":
        "requests x tokens of each prompt + tokens of each answer",
    },
    "adapters": {
        "runs": "rank 16, all layers but the head, 64 requests; the better of two each, in turn",
    },
    "constrained": {
        "runs": "the better of two each, in turn, after a first: texts with known masks, with new ones, free texts",
    },
    "speculative": DEFINITION,
    "idle": {
        "idle": "1 - (union of kernels, copies and fills) / (last end - first start), in a torch.profiler trace of the"
        " steps of a steady batch, CUDA activities only; of three traces the one in the middle",
        "between steps": "the part of it between a step's last kernel, before the copy of its tokens to the host, and"
        " the next step's first, from which on kernels follow one another; null where steps cannot be told apart",
        "idle without the profiler": "1 - (the trace's busy time a step) / (a step's wall time without the profiler)",
    },
    "poisson": {
        "TTFT": "from the drawn time of arrival", "ITL": "between deliveries of one request, all requests together",
        "goodput": f"finished requests/s with TTFT <= {TTFT_LIMIT} s and <= {TOKEN_LIMIT} s a later token on average,"
        " over the seconds of arrivals or, where that is later, until the last token",
        "saturated": "all requests at once, start and end included",
    },
    "chat": {"turns": "all conversations take a turn at once; the next follows when all are done"},
    "peers": {"minillm": "median of five", "transformers": "one run after a warm-up, no request seen before"},
}  # fmt: skip


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny shape, nothing recorded")
    parser.add_argument("--only", default=",".join(PARTS) if GPU else "", help=f"some of {', '.join((*PARTS, *CPU))}")
    parser.add_argument("--shapes", default="", help=f"some of {', '.join(w.SHAPES)}")
    parser.add_argument(
        "--beside", type=Path, help="JSON of what others reach on this machine, {part: {shape: {engine: tokens/s}}}"
    )
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs (enforce_eager); nothing recorded")
    parser.add_argument("--sync", action="store_true", help="async_scheduling=False; nothing recorded")
    chosen = parser.parse_args(arguments)
    default_parts = [*PARTS, *CPU] if chosen.quick else [*CPU]
    chosen.only = [p for p in chosen.only.split(",") if p] or default_parts
    chosen.shapes = [s for s in chosen.shapes.split(",") if s] or (
        ["tiny"] if chosen.quick or not GPU else [s for s in w.SHAPES if s != "tiny"]
    )
    for name, values, known in (("only", chosen.only, (*PARTS, *CPU)), ("shapes", chosen.shapes, w.SHAPES)):
        if unknown := set(values) - set(known):
            parser.error(f"--{name}: expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    return chosen


def ceilings() -> dict[str, float]:
    """This machine's, measured now."""
    if GPU:
        import gpu

        found = gpu.ceilings()
        torch.cuda.empty_cache()
        return found
    from kernels import cpu_ceilings

    return cpu_ceilings()


def main(arguments: list[str]) -> int:
    """Run the parts for every shape; the exit status says whether all went well."""
    chosen = parse(arguments)
    if chosen.beside:
        w.measured_beside(json.loads(chosen.beside.read_text(encoding="utf-8")))
    sizes = w.QUICK if chosen.quick or not GPU else w.FULL
    options = ({"enforce_eager": True} if chosen.eager else {}) | ({"async_scheduling": False} if chosen.sync else {})
    kept = not (chosen.quick or options)
    print(f"greedy tokens as the oracle's: {check_tokens()} requests", flush=True)
    failed = []
    if parts := [part for part in PARTS if part in chosen.only]:
        ceiling = ceilings()
        print({name: f"{value:.3e}" for name, value in ceiling.items()}, flush=True)
        failed += run_parts(parts, chosen.shapes, sizes, ceiling, options, kept and GPU)
    for name in [name for name in CPU if name in chosen.only]:
        if not attempt(name, partial(finish_cpu, name, chosen.quick, kept and not GPU)):
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return bool(failed)


def run_parts(
    parts: list[str], shapes: list[str], sizes: w.Sizes, ceiling: dict, options: dict, kept: bool
) -> list[str]:
    """Every part for every shape, each recorded as soon as it is done -> what failed."""
    results: dict[str, dict] = {part: {} for part in parts}
    failed = []
    for shape in shapes:
        bench = Bench(shape, sizes, ceiling["copy bytes/s"], options)
        for part in parts:
            start = time.perf_counter()

            def measure(part: str = part, bench: Bench = bench) -> None:
                results[part][bench.shape] = PARTS[part](bench)
                if kept:
                    record(f"engine_{part}", document(part, results[part], ceiling), PACKAGES)

            if not attempt(f"{part} of {shape}", measure):
                failed.append(f"{part} of {shape}")
                bench.free()
            print(f"  {part} took {time.perf_counter() - start:.1f} s", flush=True)
        bench.free()
    return failed


def document(part: str, shapes: dict, ceiling: dict) -> dict:
    note = {"note on published": w.PUBLISHED_LABEL} if part in w.PUBLISHED else {}
    limits = {"dtype": DTYPE, "weights": "random", **LIMITS}
    return {"ceilings": ceiling, "engine": limits, "definitions": DEFINITIONS[part], **note, "shapes": shapes}


def attempt(name: str, action: Callable[[], object]) -> bool:
    """Whether `action` ended well; else its traceback is shown, and the run goes on."""
    try:
        action()
        return True
    except Exception:
        print(f"{name} failed:", flush=True)
        traceback.print_exc()
        return False


def finish_cpu(name: str, quick: bool, kept: bool) -> None:
    measure, suite = CPU[name]
    row = measure(w.QUICK if quick else w.FULL)
    if kept:
        print(record(suite, row, PACKAGES))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
