"""What an engine counts: requests, tokens, the cache, and how long its users wait. Rendered as Prometheus text.

- Time to first token (TTFT): from a request's arrival to its first token; waiting in the queue, then its prompt.
- Inter-token latency (ITL): between two tokens of one request; what a reader sees as speed.
- Throughput: generated tokens of all requests a second.

Histograms count in buckets, so that they cost the same after a billion tokens; percentiles are read off the buckets.
Text format: Prometheus' documentation, "Exposition formats".
"""

import bisect
import time
from dataclasses import dataclass, field

from .request import Request

__all__ = ["EngineMetrics", "Histogram"]

# Seconds, from 0.1 ms to 1,000 s: 1, 1.6, 2.5, 4, 6.3, 10, ..., five to a decade.
BOUNDS = tuple(float(f"{10 ** (e / 5):.2g}") for e in range(-20, 16))


@dataclass
class Histogram:
    """How often a value fell between two bounds; the sum and the number of all values."""

    bounds: tuple[float, ...] = BOUNDS
    counts: list[int] = field(default_factory=list)
    sum: float = 0.0
    count: int = 0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, or the same value several times."""
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.sum += value * times
        self.count += times

    def quantile(self, q: float) -> float:
        """The value below which a share of `q` lies, by a straight line within its bucket; 0 of nothing."""
        below, wanted = 0, q * self.count
        for i, n in enumerate(self.counts):
            if n and below + n >= wanted:
                low = self.bounds[i - 1] if i else 0.0
                high = self.bounds[i] if i < len(self.bounds) else low
                return low + (high - low) * (wanted - below) / n
            below += n
        return 0.0

    def lines(self, name: str) -> list[str]:
        """In Prometheus' text format: buckets count all values up to their bound."""
        total, out = 0, []
        for bound, n in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += n
            out.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*out, f"{name}_sum {self.sum:.9g}", f"{name}_count {self.count}"]


# name of the counter -> what Prometheus' readers are told
COUNTERS = {
    "num_requests": "Requests that arrived.",
    "num_finished": "Requests that got all their tokens.",
    "num_aborted": "Requests that were not wanted any more.",
    "num_failed": "Requests that ended in an error.",
    "num_steps": "Steps of the engine.",
    "num_scheduled_tokens": "Tokens computed: prompts, outputs, and what preemption made necessary again.",
    "num_prompt_tokens": "Tokens of prompts of requests that began to run.",
    "num_cached_tokens": "Those of them that the prefix cache held.",
    "num_generated_tokens": "Tokens generated.",
    "num_preemptions": "Running requests that gave their blocks back.",
}


@dataclass
class EngineMetrics:
    """Counters since the last `reset`, and the state of the moment (`running`, `waiting`, `cache_usage`)."""

    num_requests: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    num_failed: int = 0
    num_steps: int = 0
    num_scheduled_tokens: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    running: int = 0
    waiting: int = 0
    cache_usage: float = 0.0
    time_to_first_token: Histogram = field(default_factory=Histogram)
    inter_token_latency: Histogram = field(default_factory=Histogram)
    request_latency: Histogram = field(default_factory=Histogram)
    started: float = field(default_factory=time.perf_counter)

    @property
    def hit_rate(self) -> float:
        """The share of prompts' tokens that the prefix cache held."""
        return self.num_cached_tokens / self.num_prompt_tokens if self.num_prompt_tokens else 0.0

    @property
    def throughput(self) -> float:
        """Generated tokens a second since the last reset."""
        return self.num_generated_tokens / (time.perf_counter() - self.started)

    def reset(self) -> None:
        """Start counting anew."""
        self.__init__()

    def got_tokens(self, requests: list[Request], now: float) -> None:
        """A step gave each of these requests a token at time `now`."""
        gaps: dict[float, int] = {}  # most share one gap: the time of a step
        for request in requests:
            if request.first_token_time:
                gap = now - request.last_token_time
                gaps[gap] = gaps.get(gap, 0) + 1
            else:
                request.first_token_time = now
                self.time_to_first_token.observe(now - request.arrival_time)
            request.last_token_time = now
        for gap, times in gaps.items():
            self.inter_token_latency.observe(gap, times)
        self.num_generated_tokens += len(requests)

    def finished(self, request: Request, now: float) -> None:
        """A request ended, one way or another."""
        if request.finish_reason == "abort":
            self.num_aborted += 1
        elif request.finish_reason == "error":
            self.num_failed += 1
        else:
            self.num_finished += 1
            self.request_latency.observe(now - request.arrival_time)

    def prometheus(self) -> str:
        """Everything in Prometheus' text format."""
        lines = []
        for name, told in COUNTERS.items():
            full = f"minillm_{name.removeprefix('num_')}_total"
            lines += [f"# HELP {full} {told}", f"# TYPE {full} counter", f"{full} {getattr(self, name)}"]
        for name, value in (
            ("requests_running", self.running), ("requests_waiting", self.waiting), ("cache_usage", self.cache_usage)
        ):  # fmt: skip
            lines += [f"# TYPE minillm_{name} gauge", f"minillm_{name} {value:.9g}"]
        for name in ("time_to_first_token", "inter_token_latency", "request_latency"):
            full = f"minillm_{name}_seconds"
            lines += [f"# TYPE {full} histogram", *getattr(self, name).lines(full)]
        return "\n".join(lines) + "\n"
