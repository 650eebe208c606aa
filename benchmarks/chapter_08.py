"""Measurements of chapter 8.

    python benchmarks/chapter_08.py             on a CPU, with SmolLM2: about three minutes
    python benchmarks/chapter_08.py gpu         on a GPU, random weights of SmolLM2's and Qwen3-0.6B's shape
    python benchmarks/chapter_08.py gpu --cpu   the same code with a tiny shape on a CPU, nothing recorded

On the CPU: the same requests batched statically, dynamically and continuously; the time of a decode step by batch; a
long prompt that arrives while others decode, by token budget; arrivals at a rate; what preemption costs in steps and
tokens (counted, without a model); the scheduler's own time. On the GPU: decode steps with and without CUDA graphs,
overlap and dependent launch, by batch, beside the byte floor; the long prompt; arrivals at a rate.
"""

import contextlib
import dataclasses
import gc
import itertools
import statistics
import sys
import time
import unittest.mock
from collections.abc import Callable, Sequence

import numpy as np
import torch
import workloads as w
from common import median_seconds, record

from minillm.cache.blocks import BlockPool, BlockTable
from minillm.config import ModelConfig
from minillm.engine.engine import Engine
from minillm.engine.metrics import EngineMetrics
from minillm.engine.request import Request
from minillm.engine.scheduler import Scheduler
from minillm.generate import cached_batch, naive
from minillm.model import Transformer
from minillm.sampling import SamplingParams

GPU = "gpu" in sys.argv[1:]
CPU = not torch.cuda.is_available() or "--cpu" in sys.argv[1:]
TRY = GPU and CPU
TTFT_LIMIT, TOKEN_LIMIT = (1.5, 0.3) if CPU else (0.2, 0.025)  # seconds: what counts as good service


def greedy(count: int) -> SamplingParams:
    return SamplingParams(temperature=0, ignore_eos=True, max_tokens=count)


# ---- the same requests, batched three ways -------------------------------------------------------------------------

ROWS, COUNT, RATE = 6, 18, 4.0  # rows of a batch, requests, arrivals a second


def arrivals() -> list[w.Job]:
    """Requests with drawn lengths, most of them short and some long, that arrive one after another."""
    rng = np.random.default_rng(8)
    at = np.cumsum(rng.exponential(1 / RATE, COUNT)) - 0.1
    outputs = np.clip(rng.exponential(26, COUNT), 4, 96).astype(int)
    prompts = [rng.integers(0, 49_152, n).tolist() for n in rng.integers(16, 97, COUNT)]
    return [w.Job(p, int(n), max(0.0, float(t))) for p, n, t in zip(prompts, outputs, at, strict=True)]


class Clock:
    """Seconds since it was made; `calls` are the times at which a model's logits were ready, one a step."""

    def __init__(self, model: Transformer) -> None:
        self.start, self.calls, logits = time.perf_counter(), [], type(model).logits

        def timed(hidden_states: torch.Tensor) -> torch.Tensor:
            found = logits(model, hidden_states)
            self.calls.append(self.now())
            return found

        model.logits = timed

    def now(self) -> float:
        return time.perf_counter() - self.start

    def wait_until(self, moment: float) -> None:
        time.sleep(max(0.0, moment - self.now()))


def in_batches(model: Transformer, jobs: Sequence[w.Job], rows: int, wait: bool) -> tuple[list[dict], list[list[int]]]:
    """Batches of at most `rows` requests, one after another, each until its longest output is done.

    wait: a batch starts when it is full (static batching); else with those that are there (dynamic batching).
    """
    clock, coming, lines, outputs = Clock(model), list(jobs), [], []
    while coming:
        clock.wait_until(coming[min(rows, len(coming)) - 1 if wait else 0].at)
        size = min(rows, sum(job.at <= clock.now() for job in coming))
        batch, coming = coming[:size], coming[size:]
        begin, clock.calls = clock.now(), []
        outputs += cached_batch(model, [job.prompt for job in batch], [greedy(job.max_tokens) for job in batch])
        end = clock.now()
        for row, job in enumerate(batch):
            times = clock.calls[: job.max_tokens]
            lines.append(line(job, row, begin, times, end))
    del model.logits
    return lines, outputs


def line(job: w.Job, row: int, begin: float, times: list[float], end: float) -> dict:
    """A request in the diagram: when it came, began, had its first and last token, and left its row."""
    gaps = [b - a for a, b in itertools.pairwise(times)]
    return {"row": row, "arrived": job.at, "began": begin, "first": times[0], "last": times[-1], "left": end,
            "tokens": len(times), "prompt": len(job.prompt), "gaps": gaps}  # fmt: skip


def continuously(model: Transformer, jobs: Sequence[w.Job], rows: int) -> tuple[list[dict], list[list[int]]]:
    """The engine, with requests added when they arrive."""
    engine = Engine(model, num_blocks=rows * 16, max_num_seqs=rows, max_num_batched_tokens=128, max_model_len=256)
    clock, coming, found, began, seen = Clock(model), list(jobs), {}, {}, {}
    while coming or engine.has_unfinished():
        while coming and coming[0].at <= clock.now():
            job = coming.pop(0)
            key = engine.add_request(job.prompt, greedy(job.max_tokens))
            found[key], seen[key] = job, engine.requests[key]
        if not engine.has_unfinished():
            clock.wait_until(coming[0].at)
            continue
        begin = clock.now()
        got = engine.step()
        for request in [*engine.scheduler.running, *got]:
            began.setdefault(request.request_id, (request.row, begin))
        for request in got:
            request.__dict__.setdefault("times", []).append(clock.now())
    del model.logits
    lines = [line(found[k], *began[k], seen[k].times, seen[k].times[-1]) for k in found]
    return lines, [seen[k].output_token_ids for k in found]


def batching(model: Transformer) -> dict:
    """Static, dynamic, continuous; the tokens must be the same."""
    jobs = arrivals()
    ways = {
        "static": lambda: in_batches(model, jobs, ROWS, wait=True),
        "dynamic": lambda: in_batches(model, jobs, ROWS, wait=False),
        "continuous": lambda: continuously(model, jobs, ROWS),
    }
    continuously(model, jobs[:3], ROWS)
    runs: dict[str, list] = {name: [] for name in ways}
    for _ in range(2):
        for name, way in ways.items():
            runs[name].append(way())
    expected = runs["static"][0][1]
    if any(tokens != expected for found in runs.values() for _, tokens in found):
        raise AssertionError("the three ways disagree on tokens")
    result = {"rows": ROWS, "requests": COUNT, "arrivals a second": RATE, "runs": 2,
              "output tokens": sum(job.max_tokens for job in jobs), "ways": {}}  # fmt: skip
    for name, found in runs.items():
        lines = min((lines for lines, _ in found), key=lambda lines: max(x["left"] for x in lines))
        result["ways"][name] = summary(lines)
        print(" ", name, {k: v for k, v in result["ways"][name].items() if k != "lines"}, flush=True)
    return result


def summary(lines: list[dict]) -> dict:
    end = max(x["last"] for x in lines)
    held = sum(x["left"] - x["began"] for x in lines)
    gaps = [gap for x in lines for gap in x.pop("gaps")]
    return {
        "seconds": end, "output tokens/s": sum(x["tokens"] for x in lines) / end,
        "TTFT, s": w.spread([x["first"] - x["arrived"] for x in lines]), "ITL, s": w.spread(gaps),
        "latency, s": w.spread([x["last"] - x["arrived"] for x in lines]),
        "rows held for nothing": sum(x["left"] - x["last"] for x in lines) / held, "lines": lines,
    }  # fmt: skip


# ---- the time of a step, by batch ----------------------------------------------------------------------------------


def decoding(engine: Engine, batch: int, context: int, outputs: int) -> None:
    """Make `batch` requests decode, all prompts done."""
    draw = np.random.default_rng(batch)
    for _ in range(batch):
        engine.add_request(draw.integers(0, engine.model_config.vocab_size, context).tolist(), greedy(outputs))
    while any(not request.output_token_ids for request in engine.requests.values()):
        engine.step()
    for _ in range(3):
        engine.step()


def overlap(engine: Engine, ahead: bool) -> None:
    """Launch a step before the tokens of the last one are known, or not."""
    engine.config = dataclasses.replace(engine.config, async_scheduling=ahead)


def drop(engine: Engine) -> None:
    engine.reset()


def step_seconds(engine: Engine, steps: int, repeats: int = 5) -> float:
    """Median over `repeats` of the mean of `steps` steps."""

    def run() -> None:
        for _ in range(steps):
            engine.step()
        if engine.runner.device.type == "cuda":
            torch.cuda.synchronize()

    return median_seconds(run, repeats=repeats) / steps


def sweep(engine: Engine, batches: Sequence[int], context: int, steps: int, copy_rate: float, dtype: str) -> list[dict]:
    """Seconds of a decode step by batch, beside what its bytes take at the copy rate."""
    config, rows = engine.model_config, []
    for batch in batches:
        decoding(engine, batch, context, 12 * steps + 16)
        before = [request.num_tokens for request in engine.requests.values()]
        seconds = step_seconds(engine, steps)
        after = [request.num_tokens for request in engine.requests.values()]
        contexts = [(a + b) // 2 for a, b in zip(before, after, strict=True)]
        weights, kv = config.weight_bytes(dtype), config.kv_bytes_per_token(dtype)
        moved = w.step_bytes(contexts, weights, kv)
        flops = sum(sum(config.flops_per_token(c + 1).values()) for c in contexts)
        rows.append({"batch": batch, "context": contexts[0], "seconds": seconds, "bytes": moved,
                     "weight bytes": weights, "flops": flops, "floor": moved / copy_rate})  # fmt: skip
        print(f"  batch {batch:3}: {1e3 * seconds:8.3f} ms, floor {1e3 * moved / copy_rate:8.3f} ms", flush=True)
        drop(engine)
    return rows


def cpu_sweep(model: Transformer) -> dict:
    from kernels import cpu_ceilings

    ceilings = cpu_ceilings()
    engine = Engine(model, num_blocks=512, max_num_seqs=48, max_num_batched_tokens=512, max_model_len=256)
    return {
        "ceilings": ceilings,
        "rows": sweep(engine, (1, 2, 4, 8, 16, 32, 48), 32, 3, ceilings["copy bytes/s"], "float32"),
    }


# ---- a long prompt arrives -----------------------------------------------------------------------------------------


def interrupted(engine: Engine, running: int, context: int, prompt: int, prompts: int, after: int) -> dict:
    """Gaps between the tokens of `running` requests while `prompts` long prompts arrive, one after another."""
    draw, vocab = np.random.default_rng(5), engine.model_config.vocab_size
    budget = engine.scheduler.max_num_batched_tokens
    decoding(engine, running, context, 10_000)
    steps, first, marks, long = [], [], [], None
    wait, now = after, time.perf_counter()
    while len(first) < prompts or wait:
        if long is None and not wait:
            key = engine.add_request(draw.integers(0, vocab, prompt).tolist(), greedy(4))
            long, came = engine.requests[key], time.perf_counter()
            marks.append(len(steps))
        engine.step()
        before, now = now, time.perf_counter()
        steps.append(now - before)
        if long is not None and long.output_token_ids:
            first.append(now - came)
            long, wait = None, after
        elif wait:
            wait -= 1
    drop(engine)
    calm = steps[: marks[0]]
    return {"budget": budget, "TTFT, s": statistics.median(first),
            "ITL, s": {**w.spread(steps[marks[0] :]), "max": max(steps[marks[0] :])},
            "ITL before, s": statistics.median(calm), "steps, s": steps, "arrivals": marks}  # fmt: skip


def chunks(model: Transformer, budgets: Sequence[int] = (32, 128, 512)) -> dict:
    """A prompt of 512 tokens arrives while four requests decode."""
    rows = []
    for budget in budgets:
        engine = Engine(model, num_blocks=128, max_num_seqs=8, max_num_batched_tokens=budget, max_model_len=640,
                        enable_prefix_caching=False)  # fmt: skip
        runs = [interrupted(engine, 4, 32, 512, 1, 8) for _ in range(3)]
        rows.append(sorted(runs, key=lambda run: run["TTFT, s"])[1])
        row = rows[-1]
        print(f"  budget {budget:4}: longest gap {row['ITL, s']['max']:.3f} s, TTFT {row['TTFT, s']:.2f} s", flush=True)
    return {"running": 4, "prompt": 512, "runs": 3, "rows": rows}


# ---- arrivals at a rate --------------------------------------------------------------------------------------------


def curve(engine: Engine, fractions: Sequence[float], lengths: tuple, seconds: float, requests: int) -> dict:
    """TTFT, ITL and goodput at fractions of the rate that the engine reaches when all requests are there at once."""

    def params(job: w.Job) -> SamplingParams:
        return greedy(job.max_tokens)

    jobs = w.random_jobs(requests, *lengths, seed=1)
    tokens, best = sum(job.max_tokens for job in jobs), 1e9
    for _ in range(2):
        start = time.perf_counter()
        w.serve(engine, jobs, params, 1e9, time.perf_counter, time.sleep)
        best = min(best, time.perf_counter() - start)
    result = {"saturated output tokens/s": tokens / best, "saturated requests/s": requests / best, "rates": [],
              "limits, s": [TTFT_LIMIT, TOKEN_LIMIT], "seconds of arrivals": seconds}  # fmt: skip
    for fraction in fractions:
        rate = fraction * requests / best
        arriving = w.poisson_jobs(rate, seconds, *lengths, seed=2)
        served = w.serve(engine, arriving, params, 3 * seconds, time.perf_counter, time.sleep)
        row = w.summary(served, seconds, TTFT_LIMIT, TOKEN_LIMIT)
        last = max(one.times[-1] for one in served if one.times)
        inside = sum(one.times[-1] - one.job.at for one in served if one.times) / last
        done = [one for one in served if one.finished]
        spent = statistics.mean(one.times[-1] - one.job.at for one in done)
        result["rates"].append({"fraction": fraction, "requests/s": rate, "inside": inside, "latency, s": spent,
                                "arrived/s": len(served) / last, **row})  # fmt: skip
        ttft, itl = row["TTFT, s"], row["ITL, s"]
        late = f"TTFT p50 {ttft['p50']:.3f} p99 {ttft['p99']:.3f}, ITL p99 {itl['p99']:.3f}"
        good = row["goodput, requests/s"]
        print(f"  {fraction:.0%} of saturation: {rate:.2f} requests/s, {late}, goodput {good:.2f}", flush=True)
    return result


def cpu_curve(model: Transformer) -> dict:
    engine = Engine(model, num_blocks=128, max_num_seqs=16, max_num_batched_tokens=64, max_model_len=64)
    return curve(engine, (0.3, 0.6, 0.9, 1.2, 1.6), ((16, 32), (8, 24)), 12.0, 64)


# ---- preemption, counted -------------------------------------------------------------------------------------------


class Unguarded(Scheduler):
    """The scheduler that lets whoever was preempted come straight back: it never sees that the counter moved."""

    preemptions = 0

    def preempt(self, request: Request) -> None:
        super().preempt(request)
        self.metrics.num_preemptions -= 1
        self.preemptions += 1


class Headroom(Scheduler):
    """Admits the next request only if so many blocks more than it needs are free, while anybody runs."""

    blocks = 0

    def _admit(self, scheduled: dict, budget: int, copies: dict) -> None:
        wanted = -(-self.waiting[0].num_tokens // self.pool.block_size) + self.blocks
        if self.pool.num_free >= wanted or not self.running:
            super()._admit(scheduled, budget, copies)


def counted(blocks: int, budget: int, rule: str = "", headroom: int = 0, caching: bool = False) -> dict:
    """96 requests through a scheduler of at most 32 at once, no model: what they cost in steps and tokens."""
    rng, pool = np.random.default_rng(3), BlockPool(blocks, 16, caching)
    kind = {"": Scheduler, "unguarded": Unguarded, "headroom": Headroom}[rule]
    scheduler = kind(pool, 32, budget, EngineMetrics())
    if headroom:
        scheduler.blocks = headroom
    requests = [
        Request(str(i), rng.integers(0, 49_152, rng.integers(50, 200)).tolist(), SamplingParams(), BlockTable(pool),
                int(rng.integers(50, 400)), order=i)
        for i in range(96)
    ]  # fmt: skip
    useful = sum(len(r.prompt_token_ids) + r.max_tokens - 1 for r in requests)
    for request in requests:
        scheduler.add(request)
    steps = tokens = 0
    while scheduler.running or scheduler.waiting:
        scheduled, _ = scheduler.schedule()
        steps, tokens = steps + 1, tokens + sum(count for _, count in scheduled)
        scheduler.advance(scheduled)
        for request, _ in scheduled:
            if request.num_pending:
                request.num_pending = 0
                request.output_token_ids.append(int(rng.integers(0, 49_152)))
                if request.is_full:
                    scheduler.remove(request)
    assert pool.num_used == 0, "blocks were lost"
    times = scheduler.preemptions if rule == "unguarded" else scheduler.metrics.num_preemptions
    return {"blocks": blocks, "budget": budget, "rule": rule, "headroom": headroom, "prefix caching": caching,
            "steps": steps, "preemptions": times, "tokens": tokens, "computed again": tokens / useful - 1}  # fmt: skip


def preemption() -> dict:
    """By size of the pool; prompts of 50 to 199 tokens, outputs of 50 to 399, blocks of 16."""
    rows = [counted(blocks, 512, caching=caching) for blocks in (800, 500, 400, 200) for caching in (False, True)]
    rows += [counted(400, budget, rule) for budget in (64, 128) for rule in ("", "unguarded")]
    rows += [counted(400, 512, "headroom", headroom) for headroom in (16, 32, 64, 128)]
    for row in rows:
        print(" ", row, flush=True)
    return {"requests": 96, "at once": 32, "rows": rows}


# ---- the scheduler's own time --------------------------------------------------------------------------------------


def scheduling() -> dict:
    """Seconds of `schedule` and `advance` for a step in which all decode."""
    found = {}
    for batch in (1, 32, 256):
        pool = BlockPool(batch * 64, 16)
        scheduler = Scheduler(pool, batch, 1 << 20, EngineMetrics())
        for i in range(batch):
            scheduler.add(Request(str(i), [1] * 100, SamplingParams(), BlockTable(pool), 10_000, order=i))

        def step(scheduler: Scheduler = scheduler) -> None:
            scheduled, _ = scheduler.schedule()
            scheduler.advance(scheduled)
            for request, _ in scheduled:
                request.num_pending = 0
                request.output_token_ids.append(0)

        found[str(batch)] = median_seconds(step, repeats=201, warmup=5)
    print(" ", found, flush=True)
    return found


# ---- on a GPU ------------------------------------------------------------------------------------------------------

SHAPES = ("tiny",) if TRY else ("smollm2", "qwen3")
DEVICE = "cpu" if TRY else "cuda"
DTYPE = "float32" if TRY else "bfloat16"
MODES = {f"{'eager' if eager else 'graphs'}, {'overlap' if ahead else 'one after another'}": (eager, ahead)
         for eager in (True, False) for ahead in (False, True)}  # fmt: skip


def check_tokens() -> int:
    """Greedy tokens of a small fp32 model through the engine, in all four modes, must be the oracle's."""
    torch.manual_seed(0)
    config = ModelConfig(199, 128, 192, 2, 4, 2, 64, max_position_embeddings=256)
    model = Transformer(config)
    model.reset_parameters(std=0.4)  # so large that no two logits come near each other
    model = model.to(DEVICE).eval().requires_grad_(False)
    draw = np.random.default_rng(1)
    prompts = [draw.integers(0, 199, n).tolist() for n in (1, 5, 40, 17, 33, 2)]
    expected = [[int(t) for t in naive(model, prompt, greedy(12))] for prompt in prompts]
    for name, (eager, ahead) in MODES.items():
        engine = Engine(model, num_blocks=64, max_num_seqs=4, max_num_batched_tokens=24, max_model_len=64,
                        enforce_eager=eager, async_scheduling=ahead)  # fmt: skip
        requests = []
        for prompt in prompts:
            requests.append(engine.requests[engine.add_request(prompt, greedy(12))])
        while engine.has_unfinished():
            engine.step()
        for i, (request, tokens) in enumerate(zip(requests, expected, strict=True)):
            if request.output_token_ids != tokens:
                raise AssertionError(f"{name}, request {i}: {request.output_token_ids}, not {tokens}")
    return len(prompts) * len(MODES)


def build(model: Transformer, eager: bool) -> Engine:
    sizes = (64, 256, 512, 512) if TRY else (256, 8192, 8192, 14_000)
    seqs, budget, length, blocks = sizes
    start = time.perf_counter()
    engine = Engine(model, num_blocks=blocks, max_num_seqs=seqs, max_num_batched_tokens=budget, max_model_len=length,
                    enable_prefix_caching=False, enforce_eager=eager)  # fmt: skip
    print(f"  engine ({'eager' if eager else 'graphs'}) ready in {time.perf_counter() - start:.1f} s", flush=True)
    return engine


def budgets(engine: Engine, near: Sequence[int]) -> list[int]:
    """Budgets near these that are sizes of a graph, so that no step with a chunk is padded."""
    sizes = engine.runner.mixed_sizes or near
    return sorted({min(sizes, key=lambda size: abs(size - n)) for n in near})


BATCHES = (1, 8) if TRY else (1, 32, 256)


def without_dependent_launch(model: Transformer) -> dict[int, float]:
    """Seconds of a decode step with graphs and overlap, but every kernel launched when the one before it is done."""
    with unittest.mock.patch("minillm.engine.runner.dependent_launch", contextlib.nullcontext):
        engine = build(model, False)
    overlap(engine, True)
    found = {}
    for batch in BATCHES:
        decoding(engine, batch, 128, 400)
        found[batch] = step_seconds(engine, 3 if TRY else 25)
        drop(engine)
    print("  without dependent launch:", {k: f"{1e3 * v:.3f} ms" for k, v in found.items()}, flush=True)
    return found


def modes(engines: dict[bool, Engine]) -> list[dict]:
    """A decode step at batch 1, 32 and 256 with 128 tokens of context, in all four modes."""
    rows = []
    for batch in BATCHES:
        row = {"batch": batch, "seconds": {}}
        for name, (eager, ahead) in MODES.items():
            engine = engines[eager]
            overlap(engine, ahead)
            decoding(engine, batch, 128, 400)
            row["seconds"][name] = step_seconds(engine, 3 if TRY else 25)
            drop(engine)
        rows.append(row)
        print(f"  batch {batch:3}:", {k: f"{1e3 * v:.3f} ms" for k, v in row["seconds"].items()}, flush=True)
    return rows


def long_prompts(engine: Engine) -> dict:
    """64 requests decode, prompts of 8,000 tokens arrive one after another."""
    running, prompt, prompts, near = (4, 200, 2, (64, 256)) if TRY else (64, 8000, 4, (512, 1024, 2048, 4096, 8192))
    most, rows = engine.scheduler.max_num_batched_tokens, []
    for budget in budgets(engine, near):
        engine.scheduler.max_num_batched_tokens = budget
        row = interrupted(engine, running, 128, prompt, prompts, 16)
        rows.append({k: v for k, v in row.items() if k not in ("steps, s", "arrivals")})
        assert engine.scheduler.max_num_batched_tokens == most  # a reset makes a new scheduler
        print(f"  budget {budget:5}: ITL p50 {1e3 * row['ITL, s']['p50']:.2f} p99 {1e3 * row['ITL, s']['p99']:.2f} max"
              f" {1e3 * row['ITL, s']['max']:.2f} ms, TTFT {1e3 * row['TTFT, s']:.0f} ms", flush=True)  # fmt: skip
    return {"running": running, "prompt": prompt, "prompts": prompts, "rows": rows}


def gpu_shape(name: str, copy_rate: float) -> dict:
    """Everything of one shape."""
    torch.manual_seed(0)
    model = Transformer(w.SHAPES[name]).to(DEVICE, getattr(torch, DTYPE)).eval().requires_grad_(False)
    apart = without_dependent_launch(model)
    engines = {eager: build(model, eager) for eager in (False, True)}
    result = {"modes": [row | {"seconds without dependent launch": apart[row["batch"]]} for row in modes(engines)]}
    engine = engines[False]
    del engines
    gc.collect()
    overlap(engine, not TRY)
    batches, context = ((1, 4), 32) if TRY else ((1, 2, 4, 8, 16, 32, 64, 128, 256), 512)
    result["sweep"] = sweep(engine, batches, context, 2 if TRY else 20, copy_rate, DTYPE)
    result["long prompts"] = long_prompts(engine)
    if name != "smollm2":
        lengths = ((8, 32), (8, 16)) if TRY else ((64, 256), (64, 192))
        fractions = (0.5, 1.2) if TRY else (0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.2)
        result["curve"] = curve(engine, fractions, lengths, 4.0 if TRY else 2.0, 24 if TRY else 512)
    return result


def gpu_suite() -> dict:
    print(f"greedy tokens as the oracle's: {check_tokens()} requests", flush=True)
    if TRY:
        from kernels import cpu_ceilings as ceilings
    else:
        from gpu import ceilings
    found = ceilings()
    if not TRY:
        torch.cuda.empty_cache()
    result: dict = {"ceilings": found, "dtype": DTYPE, "weights": "random", "shapes": {}}
    for name in SHAPES:
        print(w.NAMES[name], flush=True)
        result["shapes"][name] = gpu_shape(name, found["copy bytes/s"])
        gc.collect()
        if not TRY:
            torch.cuda.empty_cache()
            print(record("chapter_08", result, packages=("torch", "triton")), flush=True)  # kept if a later shape fails
    return result


@torch.inference_mode()
def main() -> None:
    """Measure and record."""
    start = time.perf_counter()
    if GPU:
        gpu_suite()
    else:
        from minillm.model.weights import load, model_path

        torch.set_num_threads(1)  # two would wait for each other at every operation when anything else runs
        model = load(model_path("smollm2-135m-instruct"), device="cpu", dtype="float32")
        parts: dict[str, Callable[[], dict]] = {
            "batching": lambda: batching(model), "sweep": lambda: cpu_sweep(model), "chunks": lambda: chunks(model),
            "curve": lambda: cpu_curve(model), "preemption": preemption, "scheduling": scheduling,
        }  # fmt: skip
        result = {}
        for name, part in parts.items():
            print(name, flush=True)
            begin = time.perf_counter()
            result[name] = part()
            print(f"  {time.perf_counter() - begin:.0f} s", flush=True)
        print(record("chapter_08", result), flush=True)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
