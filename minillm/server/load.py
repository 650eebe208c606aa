"""Load for a server, and what its clients feel: `minillm bench serve`.

Open loop: requests come at times drawn beforehand, independent of each other (Poisson), however slow the server is, and
every latency counts from the drawn time. Closed loop: so many clients, each of which sends its next request once it has
its answer. A server that stands still for a second is then asked nothing meanwhile, and the requests that would have
waited are missing from the percentiles: coordinated omission (Tene, 2013, "How NOT to Measure Latency").

- TTFT: until the first text. ITL: between two deliveries of text of one request, all requests together. Per token: from
  the first to the last text over the later tokens; a delivery may hold several. Latency: until the last byte.
- Goodput: finished requests a second whose TTFT and time per token are within limits (Zhong et al., 2024, DistServe).
- Cached: what of the prompts the server says it found in its prefix cache. Prompts that come again are answered faster
  than anybody's first: unless told otherwise, no two are alike, and no two runs draw the same ones.
"""

import asyncio
import collections
import itertools
import json
import random
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

__all__ = [
    "TITLE", "Job", "Limits", "Seen", "Target", "closed_loop", "line", "open_loop", "poisson", "prompts_of",
    "read_prompts", "summary", "sweep", "words",
]  # fmt: skip

WORDS = [
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state",
    "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company",
    "system", "program", "question", "work", "government", "number", "night", "point", "home", "water", "room",
    "mother", "area", "money", "story", "fact", "month", "lot", "right", "study", "book", "eye", "job", "word",
    "business", "issue", "side", "kind", "head", "house", "service", "friend", "father", "power", "hour", "game",
]  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A server. natural: answers may end by themselves; else each has exactly the tokens that are asked for (the field
    `ignore_eos`, which minillm and vLLM know). cold: no request shares blocks with another (`cache_salt`, likewise).

    Raises ValueError for an address that is none.
    """

    url: str
    model: str | None = None
    key: str | None = None
    chat: bool = True
    natural: bool = False
    cold: bool = False
    seconds: float = 600.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url: expected http://host:port, got {self.url!r}")

    def first_model(self) -> str:
        """The name of the server's own model. Raises OSError for a server that does not answer."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        asked = urllib.request.Request(f"{self.url.rstrip('/')}/v1/models", headers=headers)
        with urllib.request.urlopen(asked, timeout=10) as answer:
            return json.load(answer)["data"][0]["id"]

    def request(self, job: "Job") -> bytes:
        """What goes over the wire. HTTP/1.0: the answer comes as it is, and ends with the connection."""
        parts, path = urlsplit(self.url), "chat/completions" if self.chat else "completions"
        said = [{"role": "user", "content": job.prompt}] if isinstance(job.prompt, str) else job.prompt
        body: dict[str, Any] = {"messages": said} if self.chat else {"prompt": job.prompt}
        body |= {"max_tokens": job.max_tokens, "stream": True, "stream_options": {"include_usage": True}}
        body |= ({"model": self.model} if self.model else {}) | ({} if self.natural else {"ignore_eos": True})
        data = json.dumps(body | ({"cache_salt": f"{random.getrandbits(64):x}"} if self.cold else {})).encode()
        head = [f"POST {parts.path.rstrip('/')}/v1/{path} HTTP/1.0", f"Host: {parts.netloc}"]
        head += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
        head += [f"Authorization: Bearer {self.key}"] if self.key else []
        return "\r\n".join([*head, "", ""]).encode() + data


@dataclass(frozen=True)
class Job:
    """A request: text, messages, or token ids for completions. at: seconds from the start until it comes."""

    prompt: str | list
    max_tokens: int
    at: float = 0.0


@dataclass
class Seen:
    """What became of a request. Times are in seconds from the run's start. error: an HTTP status or what happened."""

    at: float
    sent: float = 0.0
    texts: list[float] = field(default_factory=list)  # when text came
    end: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    cached: int = 0
    error: str | None = None

    @property
    def per_token(self) -> float:
        """Seconds a token after the first."""
        return (self.texts[-1] - self.texts[0]) / max(1, self.tokens - 1)


@dataclass(frozen=True)
class Limits:
    """What a user accepts, in seconds."""

    ttft: float = 1.0
    per_token: float = 0.1


# ---- requests --------------------------------------------------------------------------------------------------------


def words(count: int, shared: int, distinct: int, draw: random.Random) -> Iterator[str]:
    """Prompts of `count` words without end; the first `shared` words are the same in all. distinct: so many different
    ones, in turn; 0: no two are alike.
    """
    common = draw.choices(WORDS, k=min(shared, count))
    made = (" ".join(common + draw.choices(WORDS, k=count - len(common))) for _ in itertools.count())
    return itertools.cycle([next(made) for _ in range(distinct)]) if distinct else made


def read_prompts(path: Path, max_tokens: int) -> list[Job]:
    """One a line: plain text, or JSON with "prompt" or "messages", and "max_tokens" where it is another.

    Raises ValueError for what is neither, and for a file without any.
    """
    jobs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("{"):
            try:
                given = json.loads(line)
                jobs.append(Job(given.get("messages") or given["prompt"], given.get("max_tokens", max_tokens)))
            except (ValueError, KeyError):
                raise ValueError(f'{path}:{number}: expected JSON with "prompt" or "messages"') from None
        elif line.strip():
            jobs.append(Job(line, max_tokens))
    if not jobs:
        raise ValueError(f"{path}: expected prompts, one a line")
    return jobs


def poisson(rate: float, seconds: float, draw: random.Random) -> list[float]:
    """Times within `seconds` at which independent users come, `rate` a second on average."""
    times, at = [], 0.0
    while (at := at + draw.expovariate(rate)) < seconds:
        times.append(at)
    return times


# ---- runs ------------------------------------------------------------------------------------------------------------


async def open_loop(target: Target, jobs: Iterable[Job]) -> list[Seen]:
    """Send each job when its time has come, whatever became of the others."""
    start = time.perf_counter()

    async def later(job: Job) -> Seen:
        await asyncio.sleep(start + job.at - time.perf_counter())
        return await _ask(target, job, start)

    return await asyncio.gather(*[later(job) for job in jobs])


async def closed_loop(target: Target, jobs: Iterator[Job], clients: int, seconds: float) -> list[Seen]:
    """So many clients, each with one request at a time, for `seconds`; what runs then is finished."""
    start, seen = time.perf_counter(), list[Seen]()

    async def client() -> None:
        while (now := time.perf_counter() - start) < seconds and (job := next(jobs, None)) is not None:
            seen.append(await _ask(target, replace(job, at=now), start))
            if seen[-1].error:  # refused at once: not again at once
                await asyncio.sleep(0.05)

    await asyncio.gather(*[client() for _ in range(clients)])
    return seen


async def _ask(target: Target, job: Job, start: float) -> Seen:
    seen, parts = Seen(job.at), urlsplit(target.url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    secure = ssl.create_default_context() if parts.scheme == "https" else None
    writer = None
    try:
        async with asyncio.timeout(target.seconds):
            reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=secure, limit=1 << 22)
            seen.sent = time.perf_counter() - start
            writer.write(target.request(job))
            await _read(reader, seen, start)
    except TimeoutError:
        seen.error = "timeout"
    except (OSError, ValueError, asyncio.LimitOverrunError) as error:
        seen.error = type(error).__name__
    finally:
        seen.end = time.perf_counter() - start
        if writer is not None:
            writer.close()
    return seen


async def _read(reader: asyncio.StreamReader, seen: Seen, start: float) -> None:
    """An answer as it comes: server-sent events."""
    status = (await reader.readline()).split(None, 2)[1:2]
    while (await reader.readline()).strip():
        pass
    if status != [b"200"]:
        seen.error = status[0].decode("latin-1") if status else "closed"
        return
    seen.error = "incomplete"
    while line := await reader.readline():
        if line.startswith(b"data: [DONE]"):
            if seen.tokens and not seen.texts:  # tokens that have no text: halves of characters, special ones
                seen.texts.append(time.perf_counter() - start)
            seen.error = None if seen.texts else "empty"
        elif line.startswith(b"data: "):
            event = json.loads(line[6:])
            if "error" in event:
                seen.error = str(event["error"].get("code") or "error")
                return
            if any([choice.get("text") or choice.get("delta", {}).get("content") for choice in event["choices"]]):
                seen.texts.append(time.perf_counter() - start)
            if usage := event.get("usage"):
                seen.tokens, seen.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
                seen.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def prompts_of(
    path: Path | None, max_tokens: int, count: int, shared: int, distinct: int
) -> Callable[[random.Random], Iterator[Job]]:
    """What a run asks, without end, by the run's random numbers: the file's prompts in any order, or else `words`."""
    given = read_prompts(path, max_tokens) if path else None

    def jobs(draw: random.Random) -> Iterator[Job]:
        if given:
            return itertools.cycle(draw.sample(given, len(given)))
        return (Job(text, max_tokens) for text in words(count, shared, distinct, draw))

    return jobs


def sweep(
    target: Target, prompts: Callable[[random.Random], Iterator[Job]], rates: Sequence[float], clients: Sequence[int],
    seconds: float, seed: int, limits: Limits,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A run for each rate (open loop) and each number of clients (closed loop), after one request that does not count
    -> the summary of each. prompts: jobs without end, other ones for each run.
    """
    asyncio.run(open_loop(target, itertools.islice(prompts(random.Random(f"{seed} warm-up")), 1)))
    for rate in rates:
        draw = random.Random(f"{seed} {rate} a second")
        times = poisson(rate, seconds, draw)
        jobs = [replace(job, at=at) for job, at in zip(prompts(draw), times, strict=False)]
        yield {"loop": "open", "rate": rate} | summary(asyncio.run(open_loop(target, jobs)), seconds, limits)
    for count in clients:
        jobs_of = prompts(random.Random(f"{seed} {count} clients"))
        seen = asyncio.run(closed_loop(target, jobs_of, count, seconds))
        yield {"loop": "closed", "clients": count} | summary(seen, seconds, limits)


# ---- what was seen ---------------------------------------------------------------------------------------------------


def summary(seen: Sequence[Seen], seconds: float, limits: Limits) -> dict[str, Any]:
    """Of one run whose requests came during `seconds`. Where the last answer ends later, rates count until then.

    Percentiles are those of finished requests; who was refused or lost counts in `errors` and against goodput.
    "sent late": how far behind its times the client itself was; much of it is this machine's fault.
    """
    done = [one for one in seen if one.error is None]
    whole = max([seconds, *[one.end for one in done]])
    good = [one for one in done if one.texts[0] - one.at <= limits.ttft and one.per_token <= limits.per_token]
    spread: dict[str, Callable[[Seen], Iterable[float]]] = {
        "TTFT, s": lambda one: [one.texts[0] - one.at], "per token, s": lambda one: [one.per_token],
        "ITL, s": lambda one: np.diff(one.texts), "latency, s": lambda one: [one.end - one.at],
    }  # fmt: skip
    prompts = sum([one.prompt_tokens for one in done])
    return {
        "requests": len(seen), "finished": len(done), "seconds": whole,
        "errors": dict(collections.Counter([one.error for one in seen if one.error])),
        "requests/s": len(done) / whole, "output tokens/s": sum([one.tokens for one in done]) / whole,
        "prompt tokens": prompts / max(1, len(done)), "cached": sum([one.cached for one in done]) / max(1, prompts),
        **{name: _percentiles([x for one in done for x in of(one)]) for name, of in spread.items()},
        "goodput, requests/s": len(good) / whole, "within both limits": len(good) / max(1, len(seen)),
        "sent late, s": _percentiles([one.sent - one.at for one in seen if one.sent]),
    }  # fmt: skip


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    names = ("p50", "p90", "p99")
    return dict(zip(names, np.percentile(values, [50, 90, 99]).tolist(), strict=True)) if values else None


TITLE = (
    "                finished   errors   tokens/s   cached | TTFT, ms p50/p90/p99 | per token, ms p50/p90/p99 |"
    " latency, s p50/p90/p99 | goodput/s  within"
)


def line(row: dict[str, Any]) -> str:
    """A run of `sweep` below `TITLE`."""

    def spread(name: str, unit: float, digits: int) -> str:
        return "/".join([f"{x * unit:.{digits}f}" for x in row[name].values()]) if row[name] else "-"

    name = f"{row['rate']:g} a second" if row["loop"] == "open" else f"{row['clients']} clients"
    late = row["sent late, s"]["p99"] if row["sent late, s"] else 0.0
    return (
        f"{name:>14}  {row['finished']:8}  {sum(row['errors'].values()):7}  {row['output tokens/s']:9.1f}"
        f"  {row['cached']:7.1%} | {spread('TTFT, s', 1e3, 0):>20} | {spread('per token, s', 1e3, 1):>25} |"
        f" {spread('latency, s', 1, 2):>22} | {row['goodput, requests/s']:9.2f} {row['within both limits']:7.0%}"
        + "".join([f"; {error}: {count}" for error, count in row["errors"].items()])
        + (f"; this client was {1e3 * late:.0f} ms late itself" if late > 0.05 else "")
    )
