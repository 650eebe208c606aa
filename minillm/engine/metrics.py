"""What an engine counts: requests, tokens, the cache, and how long its users wait. Rendered as Prometheus text.

- Time to first token (TTFT): from a request's arrival to its first token. Two parts: the queue (until it runs), then
  its prompt (until the first token); which of them is long says what to do about it.
- Inter-token latency (ITL): between two tokens of one request; what a reader sees as speed.
- Throughput: generated tokens of all requests a second.

Histograms count in buckets, so that they cost the same after a billion tokens; percentiles are read off the buckets.
Text format: Prometheus' documentation, "Exposition formats".
"""

import bisect
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .request import Request

if TYPE_CHECKING:
    from .scheduler import Scheduler

__all__ = ["EngineMetrics", "Histogram", "LogLine"]

# Seconds, from 0.1 ms to 1,000 s: 1, 1.6, 2.5, 4, 6.3, 10, ..., five to a decade.
BOUNDS = tuple(float(f"{10 ** (e / 5):.2g}") for e in range(-20, 16))
TOKENS = tuple(float(2**e) for e in range(17))  # of a step


@dataclass
class Histogram:
    """How often a value fell between two bounds; the sum and the number of all values."""

    bounds: tuple[float, ...] = BOUNDS
    counts: list[int] = field(default_factory=list)
    sum: float = 0.0
    count: int = 0
    _last: tuple[float, int] = field(default=(-1.0, 0), repr=False, compare=False)  # a step's values are mostly alike

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, or the same value several times."""
        if value != self._last[0]:
            self._last = value, bisect.bisect_left(self.bounds, value)
        self.counts[self._last[1]] += times
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

    def lines(self, name: str, label: str = "") -> list[str]:
        """In Prometheus' text format: buckets count all values up to their bound. label: of all, as `key="value"`."""
        total, out, braced = 0, [], f"{{{label}}}" if label else ""
        for bound, n in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += n
            out.append(f'{name}_bucket{{{label}{"," if label else ""}le="{bound}"}} {total}')
        return [*out, f"{name}_sum{braced} {self.sum:.9g}", f"{name}_count{braced} {self.count}"]


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
    "num_drafts": "Times that guesses of a request were checked.",
    "num_draft_tokens": "Guesses that were checked.",
    "num_accepted_tokens": "Those of them that were right, and all before them.",
}


HISTOGRAMS = {
    "time_to_first_token": "From a request's arrival to its first token: queue_time and prefill_time together.",
    "queue_time": "From a request's arrival until it first runs.",
    "prefill_time": "From there to its first token.",
    "inter_token_latency": "Between two tokens of one request.",
    "request_latency": "From a request's arrival to its last token, of those that got all.",
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
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)
    time_to_first_token: Histogram = field(default_factory=Histogram)
    queue_time: Histogram = field(default_factory=Histogram)
    prefill_time: Histogram = field(default_factory=Histogram)
    inter_token_latency: Histogram = field(default_factory=Histogram)
    request_latency: Histogram = field(default_factory=Histogram)
    tokens_per_step: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    started: float = field(default_factory=time.perf_counter)
    _watched: "Scheduler | None" = field(default=None, repr=False, compare=False)

    # ---- the moment --------------------------------------------------------------------------------------------------

    def watch(self, scheduler: "Scheduler") -> None:
        """Whose state `running`, `waiting` and `cache_usage` tell: looked at when asked, so that they are never old."""
        self._watched = scheduler

    @property
    def running(self) -> int:
        """Requests that run."""
        return len(self._watched.running) if self._watched else 0

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._watched.waiting) if self._watched else 0

    @property
    def cache_usage(self) -> float:
        """The share of the cache's blocks that some request holds."""
        return self._watched.pool.num_used / self._watched.pool.num_blocks if self._watched else 0.0

    @property
    def num_ended(self) -> int:
        """Requests that are over, one way or another."""
        return self.num_finished + self.num_aborted + self.num_failed

    @property
    def hit_rate(self) -> float:
        """The share of prompts' tokens that the prefix cache held."""
        return self.num_cached_tokens / self.num_prompt_tokens if self.num_prompt_tokens else 0.0

    @property
    def throughput(self) -> float:
        """Generated tokens a second since the last reset."""
        return self.num_generated_tokens / (time.perf_counter() - self.started)

    # ---- counting ----------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Start counting anew."""
        vars(self).update(vars(type(self)(_watched=self._watched)))

    def launched(self, num_tokens: int) -> None:
        """A step began, of so many tokens."""
        self.num_steps += 1
        self.num_scheduled_tokens += num_tokens
        self.tokens_per_step.observe(num_tokens)

    def admitted(self, request: Request) -> None:
        """A request runs for the first time."""
        self.num_prompt_tokens += len(request.prompt_token_ids)
        self.num_cached_tokens += request.num_cached
        if request.arrival_time:
            self.queue_time.observe(request.admission_time - request.arrival_time)

    def got_tokens(self, request: Request, count: int, now: float) -> None:
        """A step gave the request `count` tokens at time `now`; of several the later ones come with the first."""
        if request.first_token_time:
            self.inter_token_latency.observe(now - request.last_token_time)
        else:
            self.time_to_first_token.observe(now - request.arrival_time)
            self.prefill_time.observe(now - request.admission_time)
            request.first_token_time = now
        if count > 1:
            self.inter_token_latency.observe(0.0, count - 1)
        request.last_token_time = now
        self.num_generated_tokens += count

    def checked(self, num_guesses: int, num_accepted: int) -> None:
        """Of so many guesses for one request so many were right, the first ones."""
        self.num_drafts += 1
        self.num_draft_tokens += num_guesses
        self.num_accepted_tokens += num_accepted
        by_place = self.num_accepted_tokens_per_pos
        by_place += [0] * (num_guesses - len(by_place))
        for place in range(num_accepted):
            by_place[place] += 1

    def finished(self, request: Request, now: float) -> None:
        """A request ended, one way or another."""
        if request.finish_reason == "abort":
            self.num_aborted += 1
        elif request.finish_reason == "error":
            self.num_failed += 1
        else:
            self.num_finished += 1
            self.request_latency.observe(now - request.arrival_time)

    # ---- telling -----------------------------------------------------------------------------------------------------

    def prometheus(self) -> str:
        """Everything in Prometheus' text format."""
        lines = []
        for name, told in COUNTERS.items():
            full = f"minillm_{name.removeprefix('num_')}_total"
            lines += [f"# HELP {full} {told}", f"# TYPE {full} counter", f"{full} {getattr(self, name)}"]
        full = "minillm_accepted_tokens_per_pos_total"
        lines += [f"# HELP {full} Guesses that were right, by their place.", f"# TYPE {full} counter"]
        lines += [f'{full}{{position="{i}"}} {n}' for i, n in enumerate(self.num_accepted_tokens_per_pos)]
        for name, value in (
            ("requests_running", self.running), ("requests_waiting", self.waiting), ("cache_usage", self.cache_usage),
            ("prefix_cache_hit_rate", self.hit_rate),
        ):  # fmt: skip
            lines += [f"# TYPE minillm_{name} gauge", f"minillm_{name} {value:.9g}"]
        for name, told in HISTOGRAMS.items():
            full = f"minillm_{name}_seconds"
            lines += [f"# HELP {full} {told}", f"# TYPE {full} histogram", *getattr(self, name).lines(full)]
        full = "minillm_tokens_per_step"
        lines += [f"# HELP {full} Tokens computed in a step.", f"# TYPE {full} histogram"]
        return "\n".join([*lines, *self.tokens_per_step.lines(full)]) + "\n"


class LogLine:
    """One line every few seconds on what an engine does: what happened since the last one, and the moment."""

    def __init__(self, metrics: EngineMetrics, seconds: float = 5.0) -> None:
        self.metrics, self.seconds = metrics, seconds
        self.last = time.perf_counter()
        self.before = self._counts()

    def _counts(self) -> tuple[int, int, int]:
        m = self.metrics
        return m.num_scheduled_tokens, m.num_generated_tokens, m.num_preemptions

    def due(self) -> str | None:
        """The line, if it is time for one."""
        now = time.perf_counter()
        if now - self.last < self.seconds:
            return None
        seconds, m, counts = now - self.last, self.metrics, self._counts()
        computed, generated, preempted = (max(0, new - old) for new, old in zip(counts, self.before, strict=True))
        self.last, self.before = now, counts
        return (
            f"running {m.running}, waiting {m.waiting}, {generated / seconds:.0f} tokens/s generated,"
            f" {computed / seconds:.0f} computed, cache {m.cache_usage:.0%} full, prefix hits {m.hit_rate:.0%},"
            f" {preempted} preempted"
        )
