"""Who may come in. A queue without a bound makes everybody's answer late; one with a bound says so at once.

What waits is counted in requests and in tokens of prompts, until a request's first token: the time that a new one would
wait is about the second number over the rate at which prompts are computed. Who finds the queue full gets 429 and when
to come again. A key's rate is a token bucket: it holds a minute's worth, drips full, and a request takes its prompt and
all that it may generate; what it did not generate flows back.
"""

import math
import time
from collections.abc import Callable

from ..engine.metrics import Histogram
from .errors import ApiError

__all__ = ["Admission", "Bucket", "Ticket"]


class Bucket:
    """Tokens that one key may still spend: at most `per_minute`, and as many come back in a minute."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self.clock = per_minute, clock
        self.level, self.at = per_minute, clock()

    def wait(self, tokens: float) -> float:
        """Take tokens, if they are there -> 0; else the seconds until they are, and nothing is taken."""
        now = self.clock()
        self.level = min(self.per_minute, self.level + (now - self.at) * self.per_minute / 60)
        self.at = now
        if tokens > self.level:
            return (tokens - self.level) * 60 / self.per_minute
        self.level -= tokens
        return 0.0

    def refund(self, tokens: float) -> None:
        """Tokens that were not spent."""
        self.level = min(self.per_minute, self.level + tokens)


class Ticket:
    """A place in the queue for some choices. Each leaves it with its first token; `close` gives back what is left."""

    def __init__(self, admission: "Admission", choices: int) -> None:
        self.admission, self.share, self.waiting = admission, 0, set(range(choices))
        self.since = time.monotonic()
        admission.requests += choices

    def sized(self, prompt_tokens: int) -> None:
        """How many tokens the prompts have is known. Raises ApiError where the queue has no room for them."""
        self.admission.check_tokens(prompt_tokens)
        self.share = -(-prompt_tokens // max(1, len(self.waiting)))
        self.admission.tokens += self.share * len(self.waiting)

    def leave(self, choice: int) -> None:
        """The choice waits no more."""
        if choice in self.waiting:
            self.admission.waits.observe(time.monotonic() - self.since)
            self.waiting.remove(choice)
            self.admission.requests -= 1
            self.admission.tokens -= self.share

    def close(self) -> None:
        """No choice waits any more."""
        for choice in list(self.waiting):
            self.leave(choice)


class Admission:
    """What waits, and its bounds."""

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self.waits = Histogram()  # seconds until first tokens, for the advice when to come again
        self.requests, self.tokens, self.closed = 0, 0, False

    def enter(self, choices: int) -> Ticket:
        """A place for each choice of a request. Raises ApiError: 400 for more than ever fit, 429 while others wait,
        503 once the server shuts down.
        """
        if self.closed:
            raise ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})
        if choices > self.max_requests:
            raise ApiError(400, f"n: expected at most {self.max_requests} choices in a request, got {choices}", "n")
        if self.requests + choices > self.max_requests:
            raise self._full(f"{self.requests} requests wait; this server lets {self.max_requests} wait")
        return Ticket(self, choices)

    def check_tokens(self, tokens: int) -> None:
        """Raises ApiError unless so many more may wait. What is too long for the bound alone may wait alone."""
        if self.tokens and self.tokens + tokens > self.max_tokens:
            raise self._full(f"{self.tokens} tokens of prompts wait; this server lets {self.max_tokens} wait")

    def prometheus(self) -> str:
        """What waits, in Prometheus' text format."""
        gauges = (("requests", self.requests), ("tokens", self.tokens))
        return "".join([f"# TYPE minillm_queued_{n} gauge\nminillm_queued_{n} {value}\n" for n, value in gauges])

    def _full(self, message: str) -> ApiError:
        seconds = min(60, max(1, math.ceil(self.waits.quantile(0.5))))
        return ApiError(429, message, code="queue_full", headers={"Retry-After": str(seconds)})
