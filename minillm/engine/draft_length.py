"""How many guesses to check: as many as give the most tokens a second, by what was seen so far.

A guess costs the time of one more token in the step, right or wrong, and brings a token if it and all guesses before it
are right. So a step of S requests, of n tokens without guesses, gives with guesses k_1 ... k_S

    goodput = (S + sum over requests i, and j = 1 ... k_i, of P_i(the first j guesses are right)) / seconds(n + sum k_i)

tokens a second (Liu et al., 2024, "Optimizing Speculative Decoding for Serving Large Language Models Using Goodput").
The terms of the sum fall with j, and requests do not disturb each other: so for each total the best guesses are those
of the largest terms, and one pass over the sorted terms finds the best of all totals. No guess at all is one of the
totals, so by this model speculation is never slower than plain decoding.

Where steps are CUDA graphs, a step costs what its graph costs, whatever it holds: S sequences of w tokens each. Then a
guess that fits into the graph is for nothing, and what is left to choose is w (`best_width`).

P_i is measured (`Acceptance`). While nothing is guessed there is nothing to measure. Guesses that are looked up the
host then looks up for itself now and then, and compares them with the tokens that come. That costs the device nothing,
so a request whose text does not repeat itself is decoded as without speculation, and one that begins to is noticed.
Those of a draft head nobody knows but the device: but how often they are right is known from its training, and what
was seen of a request, or of all, is forgotten with time, so that they are tried again.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import SpeculativeConfig, StepCosts
from .constraints import Follower
from .speculative import look_up_one

if TYPE_CHECKING:
    from .request import Request
    from .scheduler import Scheduler

__all__ = ["Acceptance", "Speculation", "best_lengths", "best_width", "room", "seconds"]

MEMORY = 0.95  # what an observation still counts after the next one
PRIOR = 1.0  # observations that what is known of all requests together counts as, for each of them
GAIN = 1.03  # by how much guessing must be better than not, as probabilities are estimates
WATCHED = 2  # requests that begin to be watched in a step, about: that takes the host up to 0.2 ms each
FORGOTTEN = 32  # steps without a guess after which what was seen counts half, where nothing can be watched


@dataclass
class Acceptance:
    """How often guesses of one request (or of all) were right, by their place, the latest counting most.

    tried[j]: how often guess j was reached, those before it being right; right[j]: how often it was right then.
    guesses: those that are being watched, without being checked; the first `seen` were right.
    """

    tried: list[float]
    right: list[float]
    guesses: list[int] = field(default_factory=list)
    seen: int = 0
    chances: list[float] | None = None

    @classmethod
    def of(cls, count: int) -> "Acceptance":
        """Nothing is known."""
        return cls([0.0] * count, [0.0] * count)

    def learn(self, count: int, accepted: int) -> None:
        """Of `count` guesses the first `accepted` were right."""
        for j in range(min(accepted + 1, count)):
            self.see(j, j < accepted)
        self.guesses, self.seen = [], 0

    def see(self, place: int, right: bool) -> None:
        """The guess for this place was right or not, and all before it were."""
        self.tried[place] = MEMORY * self.tried[place] + 1
        self.right[place] = MEMORY * self.right[place] + right
        self.chances = None

    def forget(self) -> None:
        """What was seen is old."""
        self.tried, self.right = [0.5 * n for n in self.tried], [0.5 * n for n in self.right]
        self.chances = None

    def rates(self, prior: Sequence[float]) -> list[float]:
        """The chance of each guess, given that those before it are right. prior: what it is where nothing was seen."""
        seen = zip(self.right, self.tried, prior, strict=True)
        return [(right + PRIOR * before) / (tried + PRIOR) for right, tried, before in seen]

    def survival(self, prior: Sequence[float]) -> list[float]:
        """The chance that the first j + 1 guesses are all right, for each j."""
        if self.chances is None:
            product, self.chances = 1.0, []
            for rate in self.rates(prior):
                product *= rate
                self.chances.append(product)
        return self.chances


def best_lengths(chances: Sequence[Sequence[float]], others: int, budget: int, costs: StepCosts) -> list[int]:
    """How many guesses of each request give the most tokens a second.

    chances[i][j]: the chance that the first j + 1 guesses of request i are all right, as many as may be checked.
    others: tokens of the step that no request decodes (of prompts). budget: tokens that the step may have.
    """
    tokens, room = len(chances) + others, max(0, budget - len(chances) - others)
    whose = np.repeat(np.arange(len(chances)), [len(row) for row in chances])
    offers = np.array([chance for row in chances for chance in row])
    order = np.argsort(-offers, kind="stable")[:room]  # stable: of equal chances of a request the first guess first
    totals = tokens + np.arange(len(order) + 1)
    gain = len(chances) + np.concatenate(([0.0], np.cumsum(offers[order])))
    goodput = gain / seconds(costs.checked, totals)
    goodput[0] = GAIN * len(chances) / seconds(costs.plain, tokens)
    most = int(np.argmax(goodput))
    return np.bincount(whose[order[:most]], minlength=len(chances)).tolist()


def best_width(chances: Sequence[Sequence[float]], budget: int, costs: StepCosts) -> int:
    """How many tokens of each request a step should have for the most tokens a second, of `costs.padded`; 1: no guess.
    chances and budget: as for `best_lengths`.
    """
    requests = len(chances)
    best, goodput = 1, GAIN * requests / seconds(costs.plain, requests)
    for width, pairs in costs.padded:
        at = bisect.bisect_left(pairs, (requests, 0.0))  # the least graph that has room
        if at < len(pairs) and requests * width <= budget:
            gain = requests + sum([sum(row[: width - 1]) for row in chances])
            if gain / pairs[at][1] > goodput:
                best, goodput = width, gain / pairs[at][1]
    return best


def seconds(pairs: Sequence[tuple[int, float]], tokens: Any) -> Any:
    """What steps of so many tokens take (a number or an array), by straight lines between the (tokens, seconds) pairs,
    and beyond them as between the last two; before the first: as that.
    """
    x, y = np.array(pairs).T
    slope = max(0.0, (y[-1] - y[-2]) / (x[-1] - x[-2])) if len(x) > 1 else y[0] / x[0]
    return np.interp(tokens, x, y) + slope * np.maximum(0, np.asarray(tokens) - x[-1])


class Speculation:
    """Says how many guesses the next step may check of each request. costs: of steps; None: always all guesses. rates:
    how often guesses are right, before any was seen, given that those before are; None: that must be watched first.
    """

    def __init__(
        self, config: SpeculativeConfig, costs: StepCosts | None, budget: int, rates: Sequence[float] | None = None
    ) -> None:  # fmt: skip
        self.config, self.costs, self.budget = config, costs, budget
        self.count = config.num_speculative_tokens
        self.is_watched = rates is None
        self.rates = [0.0] + [0.5] * (self.count - 1) if rates is None else list(rates)
        self.all = Acceptance.of(self.count)
        self.plain_steps = 0  # since the last one with guesses
        self.stride = 1  # a request is watched at every so many of its tokens

    def choose(self, scheduler: "Scheduler") -> None:
        """Set `Request.drafts` of all that run."""
        running = scheduler.running
        rooms = [min(self.count, room(request)) for request in running]
        if self.costs is None:
            for request, most in zip(running, rooms, strict=True):
                request.drafts = most
            return
        prior = self.all.rates(self.rates)
        chances, decoding, others = [], [], sum(r.num_tokens - r.num_computed for r in scheduler.waiting[:1])
        for request, most in zip(running, rooms, strict=True):
            request.drafts = 0
            if request.is_full:
                continue
            if (needed := request.num_tokens - request.num_computed) == 1:
                decoding.append(request)
                chances.append(self._known(request).survival(prior)[:most])
            else:
                others += needed
        self.stride = 1 + len(running) // WATCHED
        lengths = [0] * len(decoding)
        if any(row and row[0] > GAIN - 1 for row in chances):
            lengths = self._lengths(chances, others, self.costs)
        for request, length in zip(decoding, lengths, strict=True):
            request.drafts = length
        self.plain_steps = 0 if any(lengths) else self.plain_steps + 1
        if not self.is_watched and self.plain_steps % FORGOTTEN == FORGOTTEN - 1:
            self.all.forget()

    def _lengths(self, chances: Sequence[Sequence[float]], others: int, costs: StepCosts) -> list[int]:
        if not costs.padded:
            return best_lengths(chances, min(others, self.budget), self.budget, costs)
        width = 1 if others else best_width(chances, self.budget, costs)  # a prompt takes what guesses would
        return [min(width - 1, len(row)) for row in chances]

    def _known(self, request: "Request") -> Acceptance:
        if request.acceptance is None:
            request.acceptance = Acceptance.of(self.count)
        return request.acceptance

    def learn(self, request: "Request", num_guesses: int, tokens: Sequence[int]) -> None:
        """The request gets these tokens, of a step that checked so many guesses."""
        if self.costs is None:
            return
        if num_guesses:
            self._known(request).learn(num_guesses, len(tokens) - 1)
            self.all.learn(num_guesses, len(tokens) - 1)
        else:
            (self._watch if self.is_watched else self._forget)(request, tokens[0])

    def _forget(self, request: "Request", _: int) -> None:
        if len(request.output_token_ids) % max(self.stride, FORGOTTEN) == 0:
            self._known(request).forget()

    def _watch(self, request: "Request", token: int) -> None:
        """Would a guess have been this token?"""
        known = self._known(request)
        if not known.guesses:
            if len(request.output_token_ids) % self.stride:
                return
            c = self.config
            known.guesses, known.seen = look_up_one(request.tokens(), self.count, c.prompt_lookup_max, c.least), 0
        right = known.guesses[known.seen] == token
        known.see(known.seen, right)
        self.all.see(known.seen, right)
        known.seen += 1
        if not right or known.seen == self.count:
            known.guesses = []


def room(request: "Request") -> int:
    """How many guesses may be checked of a request in its next step.

    None while it computes its prompt; none beyond its last token; none where the host must know which token it is that
    is drawn: for `min_tokens`, and for a mask that only a caller's function knows.
    """
    if request.num_tokens - request.num_computed != 1 or request.num_output < request.params.min_tokens:
        return 0
    if request.allowed is not None and not isinstance(request.allowed, Follower):
        return 0
    return max(0, request.max_tokens - request.num_output - 1)
