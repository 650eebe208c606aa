"""Which replica gets a request. `router` asks; benchmarks/router.py shows where each policy fails.

A request costs a replica two things: the part of its prompt that is not in the prefix cache has to be computed, and all
that runs there gets slower. Policies differ in which of the two they look at, and in how old their knowledge is.
"""

import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from math import ceil
from typing import Any, TypeVar

__all__ = [
    "POLICIES", "LeastLoaded", "Policy", "PrefixAware", "Replica", "RoundRobin", "SessionHash", "Task", "TwoChoices",
    "route_text",
]  # fmt: skip

CHUNK = 128  # characters of a prompt that share a name in the prefix index
LONGEST = 64 << 10  # characters that are looked at


@dataclass(eq=False)
class Replica:
    """A server that answers. in_flight: choices that this router has there. others: what it reported beyond those."""

    name: str
    in_flight: int = 0
    others: int = 0

    @property
    def load(self) -> int:
        """Choices there, as far as is known: what was sent a moment ago counts, whoever reports what and when."""
        return self.in_flight + self.others

    def reported(self, requests: int) -> None:
        """It says how many it has. Those of this router are among them, and are known better here."""
        self.others = max(0, requests - self.in_flight)


R = TypeVar("R", bound=Replica)


@dataclass(frozen=True)
class Task:
    """What a policy knows of a request: its prompt as text, whose conversation it belongs to, how many it asks for."""

    text: str = ""
    session: str = ""
    choices: int = 1

    @cached_property
    def names(self) -> list[bytes]:
        """The names of the text's whole chunks, each of all up to there."""
        names, name = [], b""
        for at in range(CHUNK, min(len(self.text), LONGEST) + 1, CHUNK):
            name = _hash(name, self.text[at - CHUNK : at].encode(errors="replace"))
            names.append(name)
        return names


class Policy:
    """`choose` one of some replicas, at least one; then `sent`, or not. `forget` what is known of one that has gone."""

    def __init__(self, seed: int | None = None) -> None:
        self.random = random.Random(seed)

    def choose(self, replicas: Sequence[R], task: Task) -> R:
        """Where the request shall go."""
        raise NotImplementedError

    def sent(self, replica: Replica, task: Task) -> None:
        """It went there."""

    def forget(self, replica: Replica) -> None:
        """Its caches are empty."""

    def _least(self, replicas: Sequence[R], cost: Callable[[R], float]) -> R:
        """One of the cheapest, by lot: a fixed one would get all requests of an idle system."""
        costs = [cost(replica) for replica in replicas]
        best = min(costs)
        return self.random.choice([r for r, c in zip(replicas, costs, strict=True) if c == best])


class RoundRobin(Policy):
    """One after the other. Right where requests cost the same and caches do not matter; it knows neither."""

    def __init__(self, seed: int | None = None) -> None:
        super().__init__(seed)
        self.turn = 0

    def choose(self, replicas: Sequence[R], task: Task) -> R:
        """The next one."""
        self.turn += 1
        return replicas[self.turn % len(replicas)]


class LeastLoaded(Policy):
    """The one with the fewest requests. It needs to know all loads as they are now: of old ones, each router sees the
    same minimum, and all send there.
    """

    def choose(self, replicas: Sequence[R], task: Task) -> R:
        """The least loaded one."""
        return self._least(replicas, lambda replica: replica.load)


class TwoChoices(Policy):
    """The less loaded of two drawn at random. n requests on n replicas: the fullest has about log log n / log 2, with
    one drawn about log n / log log n. Of old loads, the minimum is among the two drawn in 2 / n of all cases, and gets
    so much until the next report, where `LeastLoaded` sends all; that is still twice its share.

    Source: Azar, Broder, Karlin, Upfal, "Balanced Allocations" (1994); Mitzenmacher, "The Power of Two Choices in
    Randomized Load Balancing" (2001), and of old loads "How Useful Is Old Information?" (2000).
    """

    def choose(self, replicas: Sequence[R], task: Task) -> R:
        """The less loaded of two."""
        drawn = self.random.sample(replicas, min(2, len(replicas)))
        return self._least(drawn, lambda replica: replica.load)


class SessionHash(Policy):
    """A session's home: of the numbers hash(session, replica), the largest one's replica. When one of n replicas goes,
    only its own sessions move, 1 / n of them; when one comes, it takes 1 / (n + 1) of each.

    A home that holds more than `bound` times the mean load, and more than `least` requests, is passed over for the next
    largest number: sessions cost more than they differ in count, and without a bound one of them can hold its home
    full for ever, while others idle. bound None: it never is. Requests without a session go to the least loaded one.
    Raises ValueError for a bound below 1, which not all can keep.

    Source: Thaler, Ravishankar, "Using Name-Based Mappings to Increase Hit Rates" (1998); Mirrokni, Thorup,
    Zadimoghaddam, "Consistent Hashing with Bounded Loads" (2018).
    """

    def __init__(self, seed: int | None = None, bound: float | None = 1.25, least: int = 8) -> None:
        super().__init__(seed)
        if bound is not None and bound < 1:
            raise ValueError(f"bound: expected at least 1, the mean load, or None, got {bound}")
        self.bound, self.least = bound, least

    def choose(self, replicas: Sequence[R], task: Task) -> R:
        """The session's home, or the first beside it that has room."""
        if not task.session:
            return self._least(replicas, lambda replica: replica.load)
        order = sorted(replicas, key=lambda replica: _hash(task.session.encode(), replica.name.encode()), reverse=True)
        if self.bound is None:
            return order[0]
        total = sum([replica.load for replica in replicas]) + 1
        room = max(self.least, ceil(self.bound * total / len(replicas)))
        return next(replica for replica in order if replica.load < room)


class PrefixAware(Policy):
    """The least expected work: chunks of the prompt that are not cached there + `weight` x load. Both are time: a chunk
    costs its prefill, a request in flight slows this one down by as much as `weight` chunks would. So a hot prefix is
    computed a second time elsewhere as soon as that is cheaper than to queue where it lies.

    What lies where is guessed from what was sent: of each replica the names of the `capacity` chunks used last. A
    chunk's name hashes all before it, too, so that a prefix is there when its last name is.

    Source: the sum of both, as in vLLM's production stack (a score of match and load); chained names as of vLLM's and
    SGLang's prefix caches.
    """

    def __init__(self, seed: int | None = None, weight: float = 4.0, capacity: int = 1 << 16) -> None:
        super().__init__(seed)
        self.weight, self.capacity = weight, capacity
        self.known: dict[Replica, OrderedDict[bytes, None]] = {}

    def choose(self, replicas: Sequence[R], task: Task) -> R:
        """The cheapest one."""
        names = task.names

        def cost(replica: R) -> float:
            known = self.known.get(replica, ())
            cached = next((i for i, name in enumerate(names) if name not in known), len(names))
            return len(names) - cached + self.weight * replica.load

        return self._least(replicas, cost)

    def sent(self, replica: Replica, task: Task) -> None:
        """Its chunks will lie there."""
        known = self.known.setdefault(replica, OrderedDict())
        for name in reversed(task.names):  # a prefix's end is dropped first
            known[name] = None
            known.move_to_end(name)
        while len(known) > self.capacity:
            known.popitem(last=False)

    def forget(self, replica: Replica) -> None:
        """None of them does."""
        self.known.pop(replica, None)


POLICIES: dict[str, Callable[[], Policy]] = {
    "round_robin": RoundRobin, "least_loaded": LeastLoaded, "two_choices": TwoChoices, "prefix": PrefixAware,
    "session": SessionHash,
}  # fmt: skip


def route_text(body: dict[str, Any]) -> str:
    """A request's prompt as text that grows with its conversation: the model (adapters share no keys and values), then
    the prompt, or all messages, one after the other.
    """
    start = f"{body.get('model')}\n{body.get('cache_salt')}\n"
    messages, room, parts = body.get("messages"), LONGEST, [start]
    if not isinstance(messages, list):
        return start + str(body.get("prompt"))[:LONGEST]
    for message in messages:
        if room <= 0:
            break
        parts.append(f"{message.get('role')}: {message.get('content')}\n" if isinstance(message, dict) else "")
        room -= len(parts[-1])
    return "".join(parts)


def _hash(first: bytes, second: bytes) -> bytes:
    return blake2b(len(first).to_bytes(4) + first + second, digest_size=16).digest()
