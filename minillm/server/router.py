"""A proxy in front of replicas of one server: it says which of them answers, and what happens when one does not.

A request may be sent again as long as its client has seen no token: until then nobody can tell, and generating twice
harms nobody. After that its stream ends with an error event; other streams do not notice. A replica is out once a
connection to it broke, until /health answers again, which is asked at once. It is out when it does not answer at all,
too, and then whatever waits there is told so; one that answers 503 is shutting down: it gets nothing new and finishes
what it has. Errors of the request (4xx) say nothing about a replica's health. Where none is healthy all are tried.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

import h11
from starlette.types import Message, Receive, Scope, Send

from .errors import ApiError
from .metrics import CONTENT_TYPE
from .policies import Policy, Task, route_text
from .upstream import Backend, Broken, Headers, whole

__all__ = ["Router", "RouterConfig"]

LOG = logging.getLogger("minillm.server")
# What belongs to one connection, and what the replica shall not be asked or says itself.
OWN = {b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"proxy-authorization",
       b"proxy-authenticate", b"host", b"content-length", b"expect", b"accept-encoding", b"date"}  # fmt: skip
LARGE = 64 << 10  # bytes of a body that is read beside the event loop
HELD = 1 << 20  # bytes of a stream that may come before its first token
LOADS = (b"vllm:num_requests_running{", b"vllm:num_requests_waiting{")


@dataclass(frozen=True)
class RouterConfig:
    """How a router treats its replicas.

    - attempts: replicas that a request is tried on. A request that kills its replica kills so many.
    - answer_seconds: the longest silence of a replica, before its first byte and between two.
    - check_seconds: between two looks at /health and at the loads in /metrics, and how long an answer may take;
      failures: looks without an answer, one after another, after which a replica is out.
    - api_key: the replicas' own, for /metrics. Clients' keys are passed on, and looked at there.
    - max_body_bytes, body_seconds, send_seconds: as `ServerConfig`'s.
    """

    attempts: int = 3
    answer_seconds: float = 630.0
    check_seconds: float = 1.0
    failures: int = 3
    api_key: str | None = None
    max_body_bytes: int = 2 << 20
    body_seconds: float = 30.0
    send_seconds: float = 30.0


class Router:
    """The ASGI app. Addresses: /health (200 while a replica is healthy), /metrics (its own), all others the replicas'.
    Raises ValueError unless replicas are given, each once.
    """

    def __init__(self, urls: Sequence[str], policy: Policy, config: RouterConfig | None = None) -> None:
        self.backends, self.policy = [Backend(url) for url in urls], policy
        self.config, self.retries, self.errors = config or RouterConfig(), 0, 0
        if not urls or len({backend.name for backend in self.backends}) < len(urls):
            raise ValueError(f"replica: expected addresses, each once, got {', '.join(urls) or 'none'}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request, or the server's begin and end."""
        if scope["type"] == "lifespan":
            return await self._live(receive, send)
        client = _Client(send, self.config.send_seconds)
        with suppress(_Gone):  # the connection is closed, as its answer is not complete
            try:
                if scope["path"] in ("/health", "/metrics"):
                    await self._own(scope["path"], client)
                else:
                    await self._answer(scope, receive, client)
            except ApiError as error:
                self.errors += 1
                await client.failed(error)
        return None

    # ---- health ------------------------------------------------------------------------------------------------------

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        watching = [asyncio.create_task(self._watch(backend)) for backend in self.backends]
        await send({"type": "lifespan.startup.complete"})
        await receive()
        for task in watching:
            task.cancel()
        for backend in self.backends:
            backend.drop_all()
        await send({"type": "lifespan.shutdown.complete"})

    async def _watch(self, backend: Backend) -> None:
        while True:
            backend.look.clear()
            await self._check(backend)
            with suppress(TimeoutError):
                async with asyncio.timeout(self.config.check_seconds):
                    await backend.look.wait()
                    await asyncio.sleep(self.config.check_seconds / 20)  # who breaks often is not asked more often

    async def _check(self, backend: Backend) -> None:
        try:
            status, _ = await self._get(backend, b"/health")
            backend.silent, backend.healthy = 0, status == 200
            _, text = await self._get(backend, b"/metrics")
            lines = [line.rpartition(b" ") for line in text.splitlines() if line.startswith(LOADS)]
            backend.reported(int(sum([float(value) for _, _, value in lines])))
        except Broken as error:
            backend.silent += 1
            if backend.silent < self.config.failures and error.silent:  # it may only be slow
                return
            if backend.healthy:
                LOG.warning("out: %s", error)
            backend.healthy = False
            backend.drop_all()
            self.policy.forget(backend)
        except Exception:
            LOG.exception("%s: its metrics cannot be read", backend.name)

    async def _get(self, backend: Backend, path: bytes) -> tuple[int, bytes]:
        key, seconds = self.config.api_key, self.config.check_seconds
        headers = [(b"authorization", b"Bearer " + key.encode())] if key else []
        async with backend.ask("GET", path, headers, b"", seconds) as (head, chunks), aclosing(chunks):
            return head.status_code, await whole(chunks)

    # ---- requests ----------------------------------------------------------------------------------------------------

    async def _own(self, path: str, client: "_Client") -> None:
        if path == "/health":
            return await client.whole(200 if any([b.healthy for b in self.backends]) else 503, [], b"")
        lines = [f"minillm_router_retries_total {self.retries}", f"minillm_router_errors_total {self.errors}"]
        for b in self.backends:
            values = {"requests_total": b.requests, "broken_total": b.broken, "in_flight": b.in_flight,
                      "load": b.load, "healthy": int(b.healthy)}  # fmt: skip
            lines += [f'minillm_router_{name}{{replica="{b.name}"}} {value}' for name, value in values.items()]
        body = "".join([f"{line}\n" for line in lines]).encode()
        return await client.whole(200, [(b"content-type", CONTENT_TYPE.encode())], body)

    async def _answer(self, scope: Scope, receive: Receive, client: "_Client") -> None:
        body = await self._read(receive)
        task = await asyncio.to_thread(_task, scope, body) if len(body) > LARGE else _task(scope, body)
        work, gone = asyncio.create_task(self._try_all(scope, body, task, client)), asyncio.create_task(_left(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            finished = work.done()
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        if finished:
            work.result()

    async def _read(self, receive: Receive) -> bytes:
        data, most = bytearray(), self.config.max_body_bytes
        try:
            async with asyncio.timeout(self.config.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    data += message.get("body", b"")
                    if len(data) > most:
                        raise ApiError(413, f"body: expected at most {most} bytes")
                    if not message.get("more_body"):
                        return bytes(data)
        except TimeoutError:
            raise ApiError(408, f"body: expected within {self.config.body_seconds:g} s") from None

    async def _try_all(self, scope: Scope, body: bytes, task: Task, client: "_Client") -> None:
        """Replica after replica, until one answers, or one has answered in part."""
        left, busy = list(self.backends), None
        for attempt in range(min(self.config.attempts, len(left))):
            backend = self.policy.choose([one for one in left if one.healthy] or left, task)
            left.remove(backend)
            self.retries += attempt > 0
            try:
                return await self._forward(backend, scope, body, task, client)
            except Broken as error:
                LOG.warning("broken: %s", error)
                backend.broken += 1
                backend.healthy = False
                if client.begun:
                    raise ApiError(502, "the answer is not complete: its replica was lost", code="lost") from None
            except _Busy as error:
                busy = error
                backend.healthy = backend.healthy and error.status != 503
            finally:
                if not backend.healthy:
                    backend.look.set()
        if busy is not None:
            return await client.whole(busy.status, busy.headers, busy.body)
        raise ApiError(503, "no replica answers", code="no_replica", headers={"Retry-After": "1"})

    async def _forward(self, backend: Backend, scope: Scope, body: bytes, task: Task, client: "_Client") -> None:
        """One attempt. Raises Broken, perhaps in the middle of an answer, and _Busy."""
        target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        headers = [(name, value) for name, value in scope["headers"] if name not in OWN]
        asked = backend.ask(scope["method"], target, headers, body, self.config.answer_seconds)
        backend.requests += 1
        backend.in_flight += task.choices
        self.policy.sent(backend, task)
        try:
            async with asked as (head, chunks), aclosing(chunks):
                kept = [(name, value) for name, value in head.headers if name not in OWN]
                if not dict(kept).get(b"content-type", b"").startswith(b"text/event-stream"):
                    status, found = head.status_code, await whole(chunks)
                    if status == 503 or (status == 429 and b'"rate_limit_exceeded"' not in found):
                        raise _Busy(status, kept, found)
                    return await client.whole(status, kept, found)
                async for data in _from_first_token(chunks):
                    await client.part(head.status_code, kept, data)
                await client.end()
        except h11.LocalProtocolError as error:
            raise ApiError(400, f"request: {error}") from None
        finally:
            backend.in_flight -= task.choices


class _Gone(Exception):
    """The client takes nothing any more."""


class _Busy(Exception):
    """The replica has no room, or is shutting down: another one may do better."""

    def __init__(self, status: int, headers: Headers, body: bytes) -> None:
        super().__init__(status)
        self.status, self.headers, self.body = status, headers, body


class _Client:
    """Who is answered. begun: some of the answer is on its way."""

    def __init__(self, send: Send, seconds: float) -> None:
        self.to, self.seconds, self.begun = send, seconds, False

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        sized = [*headers, (b"content-length", str(len(body)).encode())]
        await self.send({"type": "http.response.start", "status": status, "headers": sized})
        await self.send({"type": "http.response.body", "body": body})

    async def part(self, status: int, headers: Headers, data: bytes) -> None:
        if not self.begun:
            await self.send({"type": "http.response.start", "status": status, "headers": [*headers]})
        await self.send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        await self.send({"type": "http.response.body", "body": b""})

    async def failed(self, error: ApiError) -> None:
        body = json.dumps(error.body()).encode()
        if self.begun:
            await self.send({"type": "http.response.body", "body": b"data: %b\n\ndata: [DONE]\n\n" % body})
        else:
            headers = [(name.lower().encode(), value.encode()) for name, value in (error.headers or {}).items()]
            await self.whole(error.status, [(b"content-type", b"application/json"), *headers], body)

    async def send(self, message: Message) -> None:
        self.begun = True
        try:
            async with asyncio.timeout(self.seconds):
                await self.to(message)
        except OSError:
            raise _Gone from None


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _task(scope: Scope, body: bytes) -> Task:
    """What the policy looks at. Whatever is wrong with the body, a replica says so."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        return Task()
    if not isinstance(given, dict):
        return Task()
    session = dict(scope["headers"]).get(b"x-session-id", b"").decode("latin-1")
    n, prompt = given.get("n"), given.get("prompt")
    several = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    choices = (n if type(n) is int and 0 < n < 1024 else 1) * min(several, 1024)
    return Task(route_text(given), session or str(given.get("prompt_cache_key") or given.get("user") or ""), choices)


async def _from_first_token(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """A stream's parts, none before its first token. Raises Broken where the replica says instead that it ends."""
    held, waits = b"", True
    async for chunk in chunks:
        if waits:
            held += chunk
            events = [line for line in held.split(b"\n")[:-1] if line.startswith(b"data:")]
            if any([event.startswith(b'data: {"error"') and b'"shutting_down"' in event for event in events]):
                raise Broken("it shuts down")
            if len(held) < HELD and not any([_tells(event) for event in events]):
                continue
            waits, chunk = False, held
        yield chunk
    if waits and held:
        yield held


def _tells(event: bytes) -> bool:
    """Does it hold a token, or an end, or what only its client understands?"""
    try:
        choices: list[dict[str, Any]] = json.loads(event[5:])["choices"]
        told = [
            [c.get("text"), (c.get("delta") or {}).get("content"), c["logprobs"], c["finish_reason"]] for c in choices
        ]
    except (ValueError, TypeError, KeyError, AttributeError):
        return True
    return any([any(one) for one in told])
