"""Which replica gets a request: policies on three traces, by simulation; what a proxy costs; a chat on real servers.

    python benchmarks/router.py [traces] [costs] [chat] [--small]

`traces` simulates replicas in steps, with a queue, prefill, decoding and a prefix cache each, so that a policy's
effect is not mixed with a machine's noise: its seconds are the simulation's. `costs` and `chat` are measured: a
request's way through `minillm route` and HAProxy, and conversations on 2 and 4 replicas behind a router.
"""

import heapq
import itertools
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from common import parts_asked, run_parts

from minillm.server.policies import (
    CHUNK,
    LeastLoaded,
    Policy,
    PrefixAware,
    Replica,
    RoundRobin,
    SessionHash,
    Task,
    TwoChoices,
)

TOKEN = 4  # characters
# A replica: steps of so many seconds + so much for each sequence; tokens of prompts a second, and in one step;
# sequences that run at once; tokens that the cache holds.
STEP, EACH, PREFILL, BUDGET, ROWS, CACHE = 0.006, 0.0001, 20_000, 2048, 32, 80_000


@dataclass
class Asked:
    """A request of a trace. then: what its session asks next, so many seconds after the answer."""

    task: Task
    output: int
    then: "Asked | None" = None
    after: float = 0.0
    arrived: float = 0.0
    todo: int = 0
    made: int = 0
    first: float | None = None
    view: Replica | None = None


@dataclass
class Engine:
    """A simulated replica."""

    queue: deque[Asked] = field(default_factory=deque)
    running: list[Asked] = field(default_factory=list)
    cache: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    busy: bool = False
    cached: int = 0
    asked: int = 0
    most: int = 0

    @property
    def load(self) -> int:
        """Requests here."""
        return len(self.queue) + len(self.running)

    def step(self) -> tuple[float, list[Asked]]:
        """-> (its seconds, who gets a token at its end)."""
        while self.queue and len(self.running) < ROWS:
            self.running.append(self._begun(self.queue.popleft()))
        budget = BUDGET
        for one in self.running:
            took = min(budget, one.todo)
            one.todo -= took
            budget -= took
        return STEP + EACH * len(self.running) + (BUDGET - budget) / PREFILL, [r for r in self.running if not r.todo]

    def _begun(self, one: Asked) -> Asked:
        names = one.task.names
        hit = next((i for i, name in enumerate(names) if name not in self.cache), len(names))
        tokens = len(one.task.text) // TOKEN
        one.todo = max(1, tokens - hit * CHUNK // TOKEN)
        self.cached, self.asked = self.cached + tokens - one.todo, self.asked + tokens
        for name in reversed(names):
            self.cache[name] = None
            self.cache.move_to_end(name)
        while len(self.cache) > CACHE * TOKEN // CHUNK:
            self.cache.popitem(last=False)
        return one


def simulate(trace: list[Asked], replicas: int, policy: Callable[[int], Policy], routers: int = 1,
             report: float = 1.0, own: bool = True) -> dict[str, float]:  # fmt: skip
    """Run a trace. routers: each has a policy and sees the others' requests in reports alone, every `report` seconds.
    own: whether a router counts what it sent itself; without, it sees reports alone.
    """
    engines = [Engine() for _ in range(replicas)]
    views = [[Replica(f"r{i}") for i in range(replicas)] for _ in range(routers)]
    policies, number, done = [policy(i) for i in range(routers)], itertools.count(), []
    events: list[tuple[float, int, str, object]] = [(one.arrived, next(number), "ask", one) for one in trace]
    events.append((0.0, next(number), "report", None))
    heapq.heapify(events)
    left, now = sum(_length(one) for one in trace), 0.0
    while left:
        now, _, kind, what = heapq.heappop(events)
        if kind == "report":
            for view, engine in ((v, e) for row in views for v, e in zip(row, engines, strict=True)):
                view.reported(engine.load)
            heapq.heappush(events, (now + report, next(number), "report", None))
            continue
        if kind == "ask":
            router = next(number) % routers
            chosen = policies[router].choose(views[router], what.task)
            policies[router].sent(chosen, what.task)
            engine = engines[views[router].index(chosen)]
            chosen.in_flight += own
            what.arrived, what.view = now, chosen
            engine.queue.append(what)
            engine.most = max(engine.most, engine.load)
        else:
            engine, tokens = what
            for one in tokens:
                one.made += 1
                one.first = now if one.first is None else one.first
                if one.made == one.output:
                    engine.running.remove(one)
                    one.view.in_flight -= own
                    done.append((one.first - one.arrived, now))
                    left -= 1
                    if one.then is not None:
                        heapq.heappush(events, (now + one.after, next(number), "ask", one.then))
            engine.busy = False
        if not engine.busy and engine.load:
            seconds, tokens = engine.step()
            engine.busy = True
            heapq.heappush(events, (now + seconds, next(number), "step", (engine, tokens)))
    return _told(done, engines)


def _told(done: list[tuple[float, float]], engines: list[Engine]) -> dict[str, float]:
    waits = sorted(wait for wait, _ in done)
    loads = [engine.most for engine in engines]
    return {
        "ttft_p50": waits[len(waits) // 2], "ttft_p99": waits[len(waits) * 99 // 100],
        "hit_rate": sum(e.cached for e in engines) / sum(e.asked for e in engines),
        "seconds": max(end for _, end in done), "requests": len(done), "fullest": max(loads), "emptiest": min(loads),
    }  # fmt: skip


def _length(one: Asked | None) -> int:
    return 0 if one is None else 1 + _length(one.then)


# ---- traces ----------------------------------------------------------------------------------------------------------


def words(draw: random.Random, tokens: int) -> str:
    """A text of so many tokens."""
    return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=tokens * TOKEN))


def chat(conversations: int = 96, turns: int = 8, rate: float = 12.0) -> Iterator[Asked]:
    """Conversations that share a system prompt and grow: each turn holds all before it."""
    draw = random.Random(1)
    system, now = words(draw, 400), 0.0
    for number in range(conversations):
        now += draw.expovariate(rate)
        text, asked = system, []
        for _ in range(turns):
            text += words(draw, draw.randint(50, 300))
            asked.append(Asked(Task(text, f"s{number}"), draw.randint(20, 80), after=draw.expovariate(0.5)))
            text += words(draw, asked[-1].output)
        for one, then in itertools.pairwise(asked):
            one.then = then
        asked[0].arrived = now
        yield asked[0]


def hot_session(requests: int = 600, rate: float = 60.0, share: float = 0.6) -> Iterator[Asked]:
    """One session asks more than half of all, in parallel, about one long document."""
    draw = random.Random(2)
    document, now = words(draw, 1500), 0.0
    for number in range(requests):
        now += draw.expovariate(rate)
        hot = draw.random() < share
        text = (document if hot else "") + words(draw, 100)
        yield Asked(Task(text, "hot" if hot else f"s{number % 40}"), draw.randint(30, 120), arrived=now)


def bursts(count: int = 12, size: int = 64, pause: float = 1.0) -> Iterator[Asked]:
    """Many at once, again and again; a report of loads comes in the middle of every fifth burst."""
    draw = random.Random(3)
    for burst in range(count):
        for _ in range(size):
            yield Asked(
                Task(words(draw, 60)), draw.randint(20, 60), arrived=(burst + 1) * pause + (draw.random() - 0.5) * 0.05
            )


CHAT = {"round_robin": RoundRobin, "least_loaded": LeastLoaded, "two_choices": TwoChoices,
        "session": SessionHash, "prefix": PrefixAware}  # fmt: skip
HOT = CHAT | {"session_unbounded": lambda seed: SessionHash(seed, bound=None),
              "prefix_without_load": lambda seed: PrefixAware(seed, weight=0.0)}  # fmt: skip


def traces(small: bool, save: Callable[[dict], None]) -> None:
    """Every policy on every trace."""
    found: dict = {"replica": {"step": STEP, "each": EACH, "prefill": PREFILL, "budget": BUDGET, "rows": ROWS,
                               "cache_tokens": CACHE}}  # fmt: skip
    for replicas in (2, 4):
        few = {"conversations": 12, "turns": 3} if small else {"conversations": 60 * replicas, "rate": 3.0 * replicas}
        found[f"chat_{replicas}"] = {n: simulate([*chat(**few)], replicas, p) for n, p in CHAT.items()}
    trace = {"requests": 60} if small else {}
    found["hot_session"] = {n: simulate([*hot_session(**trace)], 4, p) for n, p in HOT.items()}
    few = {"count": 2} if small else {}
    found["bursts"] = {
        f"{name}_{kind}": simulate([*bursts(**few)], 8, policy, **options)
        for name, policy in (("round_robin", RoundRobin), ("least_loaded", LeastLoaded), ("two_choices", TwoChoices))
        for kind, options in (
            ("reports_alone", {"report": 5.0, "own": False}), ("own_counted", {"report": 5.0}),
            ("four_routers", {"report": 5.0, "routers": 4}),
        )
    }  # fmt: skip
    for name, policies in found.items():
        for policy, told in policies.items() if name != "replica" else ():
            print(f"{name:12} {policy:28} " + "  ".join(f"{k} {v:.3g}" for k, v in told.items()))
    save(found)


PARTS: dict[str, Callable] = {"traces": traces}

if __name__ == "__main__":
    small = "--small" in sys.argv
    run_parts("router", PARTS, parts_asked(PARTS), small, not small)
