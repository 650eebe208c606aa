"""What benchmarks/engine.py asks of an engine, and the arithmetic on what comes back. Nothing here reads a clock.

Shapes, requests, arrival times, the bytes that decoding must move, percentiles, and the driver that lets requests
arrive at their time (`serve`, with the clock as an argument). tests/test_bench_engine.py holds all of it.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from minillm.capacity import SHAPES as KNOWN
from minillm.config import ModelConfig

# Of the package's shapes (`minillm plan`), context cut to 8,192: no request here is longer. Llama's scaling of RoPE is
# left out: it costs nothing.
SHAPES = {
    short: replace(KNOWN[name], max_position_embeddings=8192, rope_scaling=None)
    for short, name in zip(("smollm2", "qwen3", "llama1b", "llama8b"), KNOWN, strict=True)
} | {"tiny": ModelConfig(10_240, 64, 128, 2, 4, 2, 16, 8192, 1e-5, 1e4, tie_word_embeddings=True)}  # for --quick
NAMES = {
    "smollm2": "SmolLM2-135M",
    "qwen3": "Qwen3-0.6B",
    "llama1b": "Llama-3.2-1B",
    "llama8b": "Llama-3.1-8B",
    "tiny": "tiny",
}
PUBLISHED_LABEL = "other engines, tokens/s: one H100 80GB HBM3, 2026-11-27, vLLM 0.26, torch 2.11; not in this run"
BESIDE = "other engines, tokens/s: on the same machine, in turn"
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "workload": {
        "qwen3": {"vLLM": 19_004, "nano-vllm": 16_868, "transformers generate, batch 64": 730},
        "smollm2": {"vLLM": 30_151},
        "llama1b": {"vLLM": 30_509},
        "llama8b": {"vLLM": 8_042},
    },
    "stream": {
        "qwen3": {"vLLM": 477, "nano-vllm": 466, "transformers eager": 15, "transformers compiled": 225},
        "smollm2": {"vLLM": 578},
        "llama1b": {"vLLM": 636},
        "llama8b": {"vLLM": 149},
    },
    "prompts": {},
}


def measured_beside(figures: dict[str, dict[str, dict[str, float]]]) -> None:
    """Take what other engines reached on the same machine, in turn with ours, in the place of what was published."""
    global PUBLISHED, PUBLISHED_LABEL
    for part, shapes in figures.items():
        if part not in PUBLISHED or not set(shapes) <= set(SHAPES):
            raise ValueError(f"figures: expected parts {', '.join(PUBLISHED)} of known shapes, got {part!r}")
    PUBLISHED = {part: figures.get(part, {}) for part in PUBLISHED}
    PUBLISHED_LABEL = BESIDE


@dataclass(frozen=True)
class Sizes:
    """How much of everything. Pairs are (shortest, longest) or (prompt, output) tokens."""

    workload: tuple[int, int] = (256, 1024)  # requests, the longest prompt and output
    stream: tuple[int, int] = (128, 512)
    stream_runs: int = 5
    conversations: int = 64
    system: int = 512  # tokens that all conversations begin with
    message: int = 64  # tokens of a user's message, and of an answer
    turns: int = 4
    chat_runs: int = 5
    open_prompts: tuple[int, int] = (64, 256)  # the requests that arrive at a rate
    open_outputs: tuple[int, int] = (64, 192)
    open_requests: int = 1024  # all at once, to find the saturated throughput
    open_fractions: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9)  # of it
    open_seconds: float = 6.0  # of arrivals
    open_limit: float = 12.0  # after so many seconds what still runs is aborted
    prompts: tuple[tuple[int, int, int], ...] = ((32, 4096, 16), (8, 7900, 16), (1, 7900, 1), (1, 1024, 1))
    prompts_limit: int = 8192  # tokens of a request
    special: tuple[int, int] = (64, 256)
    special_requests: int = 256
    special_runs: int = 2
    quantized_runs: int = 1
    adapted: int = 64
    adapted_runs: int = 2
    adapter_kinds: tuple[int, ...] = (1, 8, 64)
    constrained: tuple[int, tuple[int, int], int] = (64, (64, 256), 2)  # requests, (prompt, longest output), runs
    idle_batches: tuple[int, ...] = (1, 64, 256)
    idle_steps: int = 20
    peers: tuple[int, int, int] = (64, 256, 64)  # requests, prompt, output
    cpu16: tuple[int, int, int] = (16, 32, 3)  # requests, output, passes
    cpu_stream: tuple[int, int] = (64, 5)  # output, passes


FULL = Sizes()
QUICK = Sizes(
    workload=(8, 128), stream=(16, 32), stream_runs=3, conversations=4, system=64, message=16, turns=2, chat_runs=1,
    open_prompts=(8, 32), open_outputs=(8, 16), open_requests=32, open_fractions=(0.5, 0.9), open_seconds=1.0,
    open_limit=5.0, special=(8, 16), special_requests=4, special_runs=1, idle_batches=(1, 4), idle_steps=10,
    peers=(4, 16, 8), cpu16=(16, 8, 1), cpu_stream=(8, 1), adapted=4, adapted_runs=1, adapter_kinds=(1, 3),
    constrained=(4, (8, 16), 1), prompts=((2, 100, 4), (1, 200, 1)), prompts_limit=256,
)  # fmt: skip


# ---- requests ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A prompt and how many tokens to generate. `at`: seconds from the start until it arrives."""

    prompt: list[int]
    max_tokens: int
    at: float = 0.0


def workload(count: int = 256, longest: int = 1024) -> list[Job]:
    """nano-vllm's benchmark: random prompts of 100 to 1,024 tokens, outputs of 100 to 1,024. Less for --quick.

    The order of the draws is part of it: all prompts first, the length of each before its tokens.
    """
    draw = random.Random(0)
    prompts = [[draw.randint(0, 10_000) for _ in range(draw.randint(100, longest))] for _ in range(count)]
    return [Job(prompt, draw.randint(100, longest)) for prompt in prompts]


def random_jobs(count: int, prompts: tuple[int, int], outputs: tuple[int, int], seed: int, top: int = 10_000) -> list:
    """`count` jobs with lengths drawn evenly from the two ranges, ends included."""
    draw = random.Random(seed)
    return [
        Job([draw.randint(0, top) for _ in range(draw.randint(*prompts))], draw.randint(*outputs)) for _ in range(count)
    ]


def schema(kind: int) -> dict:
    """A form as people ask for: a name, numbers, some of several words, a note; `kind` decides how long and which."""
    words = [["red", "green", "blue"], ["open", "closed"], ["Monday", "Tuesday", "Friday"], ["S", "M", "L", "XL"]]
    properties = {
        "name": {"type": "string", "minLength": 1, "maxLength": 20 + 10 * kind},
        "age": {"type": "integer", "minimum": 0, "maximum": 100 + kind},
        "tags": {"type": "array", "items": {"enum": words[kind % 4]}, "minItems": 1, "maxItems": 4},
        "price": {"type": "number"},
        "note": {"type": "string", "maxLength": 400},
        "ok": {"type": "boolean"},
    }
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def poisson_jobs(
    rate: float, seconds: float, prompts: tuple[int, int], outputs: tuple[int, int], seed: int
) -> list[Job]:
    """Jobs that arrive independently of each other, `rate` a second on average, during `seconds`."""
    draw, at, times = random.Random(seed), 0.0, []
    while (at := at + draw.expovariate(rate)) < seconds:
        times.append(at)
    jobs = random_jobs(len(times), prompts, outputs, seed + 1)
    return [Job(job.prompt, job.max_tokens, at) for job, at in zip(jobs, times, strict=True)]


def messages(count: int, turns: int, system: int, message: int, seed: int) -> tuple[list[int], list[list[list[int]]]]:
    """A system prompt, and for each conversation the user's message of each turn, as random tokens."""
    draw = random.Random(seed)
    tokens = [[draw.randint(0, 10_000) for _ in range(n)] for n in (system, *[message] * (count * turns))]
    return tokens[0], [tokens[1 + i * turns : 1 + (i + 1) * turns] for i in range(count)]


# ---- floors --------------------------------------------------------------------------------------------------------


def step_bytes(contexts: Iterable[int], weight_bytes: int, kv_bytes_per_token: int) -> int:
    """Bytes that one decode step must move: every weight once; of each sequence, the keys and values of the `context`
    tokens in its cache read, and those of its new token written.
    """
    return weight_bytes + kv_bytes_per_token * sum(context + 1 for context in contexts)


def decode_bytes(jobs: Sequence[Job], weight_bytes: int, kv_bytes_per_token: int, max_num_seqs: int) -> tuple[int, int]:
    """(steps, bytes) of decoding `jobs`: `step_bytes` summed over the steps, without running them.

    A job's first token comes with its prompt, which counts nothing here; `max_tokens - 1` decode steps follow, the
    j-th with prompt + j - 1 tokens in the cache. At most `max_num_seqs` run at once, the next as soon as one ends.
    """
    ends: list[int] = []  # the step in which each running job ends
    for job in jobs:
        begin = heapq.heappop(ends) if len(ends) == max_num_seqs else 0
        heapq.heappush(ends, begin + job.max_tokens - 1)
    steps = max(ends, default=0)
    tokens = sum((n := job.max_tokens - 1) * len(job.prompt) + n * (n + 1) // 2 for job in jobs)
    return steps, steps * weight_bytes + tokens * kv_bytes_per_token


# ---- what came back ------------------------------------------------------------------------------------------------


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks, as NumPy's default; NaN of nothing."""
    if not values:
        return float("nan")
    ranked = sorted(values)
    place = percent / 100 * (len(ranked) - 1)
    low = int(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (place - low) * (ranked[high] - ranked[low])


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """The percentiles that are reported; None of nothing."""
    ranked = sorted(values)
    return {f"p{q}": percentile(ranked, q) for q in (50, 90, 99)} if ranked else None


@dataclass
class Served:
    """When a job came, when its tokens came (seconds from the start; several may come at once), whether all did."""

    job: Job
    times: list[float] = field(default_factory=list)
    tokens: int = 0
    finished: bool = False

    @property
    def ttft(self) -> float:
        """From the arrival, not from when the driver got to it: waiting is the engine's fault."""
        return self.times[0] - self.job.at

    @property
    def gaps(self) -> list[float]:
        """Seconds between deliveries."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]

    @property
    def per_token(self) -> float:
        """Mean seconds a token after the first."""
        return (self.times[-1] - self.times[0]) / max(1, self.tokens - 1)


def serve(
    engine: Any,
    jobs: Sequence[Job],
    params: Callable[[Job], Any],
    limit: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> list[Served]:
    """Drive `engine` with jobs in order of arrival: add what has come, step while there is work, else wait.

    After `limit` seconds what still runs is aborted and what has not come stays out.
    """
    coming, served, running = deque(jobs), [], {}
    start = clock()
    while coming or engine.has_unfinished():
        now = clock() - start
        if now > limit:
            break
        while coming and coming[0].at <= now:
            served.append(Served(coming.popleft()))
            running[engine.add_request(served[-1].job.prompt, params(served[-1].job))] = served[-1]
        if not engine.has_unfinished():
            sleep(min(coming[0].at - now, 0.001))
            continue
        outputs = engine.step()
        now = clock() - start
        for output in outputs:
            take(running, output, now)
    for key in running:
        engine.abort(key)
    while engine.has_unfinished():  # a step that was under way
        engine.step()
    return served


def take(running: dict[str, Served], output: Any, now: float) -> None:
    """Write down what one output brings."""
    one = running[output.request_id]
    if output.new_token_ids:
        one.times.append(now)
        one.tokens += len(output.new_token_ids)
    if output.finished:
        one.finished = True
        del running[output.request_id]


def summary(served: Sequence[Served], seconds: float, ttft_limit: float, token_limit: float) -> dict:
    """Latencies of one run, and its goodput: requests a second that finished with the first token within `ttft_limit`
    and the others within `token_limit` on average (after Zhong et al., 2024, DistServe, OSDI).

    Seconds are those of the arrivals or, when the last token comes later, those until then: a queue is not for free.
    """
    begun, done = [one for one in served if one.times], [one for one in served if one.finished]
    good = [one for one in done if one.ttft <= ttft_limit and one.per_token <= token_limit]
    last = max((one.times[-1] for one in begun), default=seconds)
    return {
        "requests": len(served),
        "finished": len(done),
        "output tokens/s": sum(one.tokens for one in served) / last,
        "TTFT, s": spread([one.ttft for one in begun]),
        "ITL, s": spread([gap for one in begun for gap in one.gaps]),
        "goodput, requests/s": len(good) / max(seconds, last),
        "within both limits": len(good) / max(1, len(served)),
    }


# ---- the GPU's time ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """One piece of the GPU's work: a kernel, or a copy or fill. Any unit of time."""

    start: float
    end: float
    kernel: bool = True
    to_host: bool = False  # the copy of a step's tokens to the host: the end of the step


def idle(spans: Sequence[Span], steps: int) -> dict:
    """How the GPU spent the time from the first start to the last end of `steps` steps.

    "idle": the share in which nothing ran (1 - union of the spans / whole). "between steps": the part of it between a
    step's last kernel, before the copy of its tokens to the host, and the next step's first, after which kernels follow
    one another without a copy; "inside steps": the rest. Both are None unless each step has one copy to the host.
    """
    ranked = sorted(spans, key=lambda s: s.start)
    whole, gaps, end = max(s.end for s in ranked) - ranked[0].start, [], ranked[0].start
    for span in ranked:
        if span.start > end:
            gaps.append((end, span.start))
        end = max(end, span.end)
    nothing = sum(b - a for a, b in gaps)
    kernels = sum(s.kernel for s in ranked)
    found = {"idle": nothing / whole, "busy": whole - nothing, "whole": whole, "kernels a step": kernels / steps}
    ends = [i for i, s in enumerate(ranked) if s.to_host]
    if len(ends) != steps:
        return found | {"between steps": None, "inside steps": None}
    between = 0.0
    for i in ends[:-1]:
        low = max(s.end for s in ranked[:i] if s.kernel)
        following = zip(ranked[i:], [*ranked[i + 1 :], Span(0, 0)], strict=True)
        high = next(s.start for s, after in following if s.kernel and after.kernel)
        between += sum(max(0.0, min(b, high) - max(a, low)) for a, b in gaps)
    return found | {"between steps": between / whole, "inside steps": (nothing - between) / whole}
