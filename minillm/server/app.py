"""The HTTP server: routes, keys, bodies with limits, answers as a whole or as server-sent events.

A client that leaves is noticed while it is answered, and its request is aborted; one that does not take what it is sent
is left after a while. Server-sent events: lines "data: {...}", an empty one between two, "data: [DONE]" at the end
(WHATWG's HTML standard, "Server-sent events"; OpenAI's API reference, "Streaming").
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from .. import __version__
from ..llm import LLM
from .bridge import Piece
from .errors import ApiError, of_generation
from .listener import Keys
from .metrics import CONTENT_TYPE
from .page import HEADERS, PAGE
from .process import EngineProcess
from .protocol import Asked, parse, read_chat, read_completion, read_fields
from .service import Replayed, Running, ServerConfig, Service

__all__ = ["Reply", "Routes", "make_app"]

T = TypeVar("T")
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
EVENTS += [(b"x-accel-buffering", b"no")]  # nginx shall not collect them
LARGE = 64 << 10  # bytes of a body that others read first


class ClientGone(Exception):
    """It takes nothing any more."""


class Reply(Response):
    """An answer to a running request: one object, or a stream of chunks. until: when, on the event loop's clock, the
    client does not want it any more.
    """

    def __init__(self, running: Running | Replayed, until: float) -> None:
        self.running, self.until, self.background = running, until, None
        self.answer, self.config = running.answer, running.service.config
        self.extra = [(b"x-cache", running.source.encode())] if running.source else []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work, gone = asyncio.create_task(self._work(send)), asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            finished = work.done()
            work.cancel()
            gone.cancel()
            self.running.close()
            await asyncio.gather(work, gone, return_exceptions=True)
        if finished:
            with suppress(ClientGone):  # the connection is closed, as its answer is not complete
                work.result()

    async def _work(self, send: Send) -> None:
        if self.answer.asked.stream:
            return await self._stream(send)
        pieces = {index: Piece() for index in range(self.answer.choices)}
        try:
            async with asyncio.timeout_at(self.until):
                async for index, piece in self.running.pieces():
                    pieces[index].add(piece)
        except TimeoutError:
            raise _timed_out() from None
        body = _encoded(self.answer.whole(pieces))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": headers + self.extra})
        await self._send(send, {"type": "http.response.body", "body": body})
        return None

    async def _stream(self, send: Send) -> None:
        error = None
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": EVENTS + self.extra})
        try:
            async with asyncio.timeout_at(self.until):
                await self._events(send, self.answer.first())
                async for index, piece in self.running.pieces():
                    await self._events(send, self.answer.chunks(index, piece))
        except TimeoutError:
            error = _timed_out()
        except ApiError as e:
            error = e
        await self._events(send, self.answer.last() if error is None else [error.body()])
        await self._send(send, {"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _events(self, send: Send, events: list[dict[str, Any]]) -> None:
        if events:
            body = b"".join([b"data: %b\n\n" % _encoded(event) for event in events])
            await self._send(send, {"type": "http.response.body", "body": body, "more_body": True})

    async def _send(self, send: Send, message: Message) -> None:
        """Returns once what came before is on its way: so a slow client holds back its own answer, and nothing else."""
        try:
            async with asyncio.timeout(self.config.send_seconds):
                await send(message)
        except TimeoutError:
            raise ClientGone from None


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _encoded(value: Any) -> bytes:
    # A stranger's text may hold halves of surrogate pairs, which UTF-8 has no bytes for.
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def _timed_out() -> ApiError:
    return ApiError(504, "timeout: the answer was not complete in time", "timeout", "timeout")


class Routes:
    """What each address does."""

    def __init__(self, service: Service) -> None:
        self.service, self.config, self.started = service, service.config, int(time.time())
        self.reading = 0  # bytes of bodies in memory

    def routes(self) -> list[Route]:
        """Addresses and their methods."""
        post, get = ["POST"], ["GET"]
        return [
            Route("/", self.page, methods=get),
            Route("/v1/chat/completions", self.chat, methods=post),
            Route("/v1/completions", self.completions, methods=post),
            Route("/tokenize", self.tokenize, methods=post),
            Route("/detokenize", self.detokenize, methods=post),
            Route("/v1/models", self.models, methods=get),
            Route("/v1/models/{name:path}", self.model, methods=get),
            Route("/health", self.health, methods=get),
            Route("/version", self.version, methods=get),
            Route("/metrics", self.metrics, methods=get),
        ]

    async def page(self, request: Request) -> Response:
        """GET /: a page to talk to the model and to watch the engine."""
        return Response(PAGE, headers=HEADERS, media_type="text/html")

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        return await self._generate(request, chat=True)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions"""
        return await self._generate(request, chat=False)

    async def _generate(self, request: Request, chat: bool) -> Response:
        start, defaults = asyncio.get_running_loop().time(), self.service.model.sampling_defaults

        def read(body: dict[str, Any]) -> Asked:
            most = self.config.max_queued_requests
            return read_chat(body, defaults) if chat else read_completion(body, defaults, most)

        async with self._body(request, read) as asked:
            until = start + min(asked.timeout or self.config.timeout, self.config.timeout)
            try:
                async with asyncio.timeout_at(until):
                    fresh = "no-cache" in request.headers.get("cache-control", "")
                    return Reply(await self.service.begin(asked, request.scope.get("key", ""), fresh), until)
            except TimeoutError:
                raise _timed_out() from None

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize: {"prompt": text} or {"messages": [...]} -> its tokens, as vLLM's."""
        known = {"model": str, "prompt": str, "messages": list, "add_special_tokens": bool}
        async with self._body(request, lambda body: read_fields(body, known)) as given:
            if ("prompt" in given) == ("messages" in given):
                raise ApiError(400, "prompt: expected either prompt or messages", "prompt")
            if "prompt" in given:
                special = given.get("add_special_tokens", True)
                tokens = await self.service.in_pool(self.service.encode, "prompt", given["prompt"], special)
            else:
                messages = read_chat({"messages": given["messages"]}, {}).messages
                tokens = await self.service.in_pool(self.service.chat_prompt, messages, {})
        longest = self.service.model.max_model_len
        return JSONResponse({"count": len(tokens), "max_model_len": longest, "tokens": tokens})

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize: {"tokens": ids} -> their text, as vLLM's."""
        known = {"model": str, "tokens": list}
        async with self._body(request, lambda body: read_fields(body, known)) as given:
            tokens = given.get("tokens")
            if tokens is None or not all([type(token) is int and token < 2**31 for token in tokens]):
                raise ApiError(400, "tokens: expected a list of token ids", "tokens")
            text = await self.service.in_pool(self.service.tokenizer.decode, tokens)
        return Response(_encoded({"prompt": text}), media_type="application/json")

    async def models(self, request: Request) -> Response:
        """GET /v1/models: the model and its adapters."""
        names = [self.config.name, *self.service.adapters]
        return JSONResponse({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{name}"""
        name = request.path_params["name"]
        if name not in (self.config.name, *self.service.adapters):
            raise ApiError(404, f"model: no {name!r:.100} here", "model", "model_not_found")
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        parent = self.config.name if name in self.service.adapters else None
        longest = self.service.model.max_model_len
        facts = {"id": name, "object": "model", "created": self.started, "owned_by": "minillm"}
        return facts | {"root": name, "parent": parent, "max_model_len": longest}

    async def health(self, request: Request) -> Response:
        """GET /health: 200 while requests are taken."""
        ready = self.service.engine.alive and not self.service.admission.closed
        return Response(status_code=200 if ready else 503)

    async def version(self, request: Request) -> Response:
        """GET /version"""
        return JSONResponse({"version": __version__})

    async def metrics(self, request: Request) -> Response:
        """GET /metrics"""
        text = await self.service.engine.metrics(self.config.name) + self.service.admission.prometheus()
        text += self.service.cache.prometheus() if self.service.cache else ""
        return Response(text, media_type=CONTENT_TYPE)

    @asynccontextmanager
    async def _body(self, request: Request, read: Callable[[dict[str, Any]], T]) -> AsyncIterator[T]:
        """What `read` makes of a request's JSON, which may be of a limited size and take a limited time."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a page of another site cannot send this without being asked first
            raise ApiError(415, f"content-type: expected application/json, got {kind[:40]!r}")
        if request.headers.get("content-encoding", "identity") != "identity":
            raise ApiError(415, "content-encoding: expected none")
        data = bytearray()
        try:
            async with asyncio.timeout(self.config.body_seconds):
                async for chunk in request.stream():
                    data += chunk
                    self.reading += len(chunk)
                    if len(data) > self.config.max_body_bytes:
                        raise ApiError(413, f"body: expected at most {self.config.max_body_bytes} bytes")
                    if self.reading > 32 * self.config.max_body_bytes:
                        raise ApiError(429, "too many bodies at once", headers={"Retry-After": "1"})
            if len(data) > LARGE:
                await self.service.check(data)
                yield await self.service.in_pool(lambda: read(parse(data)))
            else:
                yield read(parse(data))
        except ClientDisconnect:
            raise ApiError(400, "body: not complete") from None  # nobody hears it
        except TimeoutError:
            raise ApiError(408, f"body: expected within {self.config.body_seconds:g} s") from None
        finally:
            self.reading -= len(data)


def make_app(model: LLM | EngineProcess, config: ServerConfig) -> Starlette:
    """The ASGI app of a model; `app.state.service` is its `Service`. Raises as `Service`."""
    service = Service(model, config)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        if service.cache is not None:
            await service.cache.close()
        service.close()

    async def said(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = ApiError(error.status_code, f"{request.method} {request.url.path[:100]}: {error.detail}")
        elif not isinstance(error, ApiError):
            error = of_generation(error)
        return Response(_encoded(error.body()), error.status, error.headers, "application/json")

    app = Starlette(
        routes=Routes(service).routes(), lifespan=lifespan,
        exception_handlers={ApiError: said, HTTPException: said, Exception: said},
    )  # fmt: skip
    app.add_middleware(Keys, keys=config.api_keys)
    app.state.service = service
    return app
