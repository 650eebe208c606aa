"""Between an event loop and the engine: a thread that steps, and what it hands over.

The thread alone touches the engine once it runs, but for what takes long and needs no lock: adapters and constraints
are prepared by others. Whatever is wanted of it (add, abort, stop) lies in an inbox, which it empties before each step:
so nobody fights for the engine's lock, and an abort takes effect within a step. After each step it wakes the event loop
once, with what all requests got.

A `Stream` keeps what its reader has not taken yet, merged into one piece for each choice: a client that reads slowly
gets larger pieces later, nobody waits for it, and the most that is kept is the output itself.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..adapters.serving import LoRARequest
from ..engine.engine import Engine, Prepared
from ..engine.request import Request
from ..sampling import SamplingParams
from .metrics import render

__all__ = ["EngineThread", "Piece", "Prompt", "Stopped", "Stream"]

LOG = logging.getLogger("minillm.server")
PREPARING = 2  # threads that do so
FAILURES = 3  # steps in a row that raised: the engine is given up


class Stopped(RuntimeError):
    """The engine takes nothing any more."""


@dataclass
class Prompt:
    """What to generate from."""

    token_ids: list[int]
    params: SamplingParams
    adapter: LoRARequest | None = None
    priority: int = 0
    cache_salt: str = ""


@dataclass
class Piece:
    """What one choice got since its reader last looked. `num_cached`: of its prompt, what the prefix cache held."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[dict[int, float]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, float] | None] | None = None
    num_cached: int = 0
    finish_reason: str | None = None
    error: BaseException | None = None

    def add(self, later: "Piece") -> None:
        """Take in what came after."""
        self.token_ids += later.token_ids
        self.text += later.text
        self.logprobs += later.logprobs
        self.prompt_logprobs = self.prompt_logprobs or later.prompt_logprobs
        self.num_cached = later.num_cached
        self.finish_reason, self.error = later.finish_reason, later.error


class Stream:
    """What some prompts give: choice i * n + j is the j-th of prompt i. Lives in the event loop.

        async for index, piece in stream: ...

    Ends once every choice has. Whoever leaves early calls `EngineThread.abort`.
    """

    def __init__(self, choices: int) -> None:
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.requests: list[Request] = []  # the engine thread's
        self.aborted = False  # likewise
        self.loop: Any = asyncio.get_running_loop()
        self._open, self._kept = set(range(choices)), dict[int, Piece]()
        self._news = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        while self._open or self._kept:
            await self._news.wait()
            self._news.clear()
            kept, self._kept = self._kept, {}
            for index, piece in kept.items():
                yield index, piece

    def put(self, index: int, piece: Piece) -> None:
        """Keep a piece for the reader."""
        if piece.finish_reason is not None:
            self._open.discard(index)
        if index in self._kept:
            self._kept[index].add(piece)
        else:
            self._kept[index] = piece
        self._news.set()

    def fail(self, error: BaseException) -> None:
        """Nothing more will come."""
        self.settle(error)
        for index in list(self._open):
            self.put(index, Piece(finish_reason="error", error=error))

    def settle(self, error: BaseException | None) -> None:
        """The engine has taken the prompts, or refused them."""
        if self.accepted.done():  # nobody waits any more
            return
        if error is None:
            self.accepted.set_result(None)
        else:
            self.accepted.set_exception(error)


class EngineThread:
    """The thread that owns an engine.

        thread = EngineThread(engine)
        stream = await thread.submit([Prompt(...), ...])
        try:
            async for index, piece in stream: ...
        finally:
            thread.abort(stream)
        thread.stop()

    `alive` says whether it takes requests.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.alive = engine, True
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._owners: dict[Request, tuple[Stream, int]] = {}
        self._pool = ThreadPoolExecutor(PREPARING, "prepare")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def submit(self, prompts: Sequence[Prompt]) -> Stream:
        """Queue all prompts, or none. Raises as `Engine.add`, and Stopped."""
        stream = Stream(sum([prompt.params.n for prompt in prompts]))
        try:
            if any([p.adapter or p.params.structured_outputs for p in prompts]):
                await asyncio.get_running_loop().run_in_executor(self._pool, self.queue, stream, prompts)
            else:
                self.queue(stream, prompts)
            await stream.accepted
        except BaseException:  # the client may have left: what is queued nonetheless is dropped
            self.abort(stream)
            raise
        return stream

    def queue(self, stream: Stream, prompts: Sequence[Prompt]) -> None:
        """The part of `submit` that may take long. Raises as `Engine.prepare`."""
        self._inbox.put(partial(self._add, stream, prompts, self._prepared(prompts)))
        if not self.alive:  # looked at after putting: else it could end in between, and nobody would answer
            self._call(stream, stream.settle, Stopped("the engine has stopped"))

    async def metrics(self, model: str) -> str:
        """For Prometheus. model: what it is called."""
        return render(self.engine.metrics, model)

    def abort(self, stream: Stream) -> None:
        """Whatever of the stream still runs is not wanted any more. May be called at any time, more than once."""
        self._inbox.put(partial(self._abort, stream))

    def stop(self, timeout: float = 10.0) -> None:
        """Take nothing more, drop what runs, and wait for the thread's end."""
        self._inbox.put(self._stop)
        self._thread.join(timeout)

    def _prepared(self, prompts: Sequence[Prompt]) -> list[Prepared]:
        found: dict[tuple[int, int], Prepared] = {}  # the prompts of one request have one object of each
        keys = [(id(p.params), id(p.adapter)) for p in prompts]
        for key, p in zip(keys, prompts, strict=True):
            if key not in found:
                found[key] = self.engine.prepare(p.params, p.adapter)
        return [found[key] for key in keys]

    # ---- in the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        failures = 0
        while self.alive:
            self._empty_inbox()
            if not self.engine.has_unfinished():
                continue
            try:
                self._hand_over(self.engine.step())
                failures = 0
            except Exception as error:  # the engine has dropped all requests
                failures += 1
                LOG.exception("a step failed")
                self._fail_all(error)
                self.alive = failures < FAILURES
        self._fail_all(Stopped("the engine has stopped"))
        while not self._inbox.empty():  # what came meanwhile is refused
            self._inbox.get()()

    def _empty_inbox(self) -> None:
        if not self.engine.has_unfinished():
            self._inbox.get()()  # waits
        while not self._inbox.empty():
            self._inbox.get()()

    def _stop(self) -> None:
        self.alive = False

    def _add(self, stream: Stream, prompts: Sequence[Prompt], prepared: Sequence[Prepared]) -> None:
        if stream.aborted:  # while its constraint was prepared
            return
        error: BaseException | None = None if self.alive else Stopped("the engine has stopped")
        try:
            for p, ready in zip(prompts, prepared, strict=True) if self.alive else ():
                stream.requests += self.engine.add(
                    p.token_ids, p.params, None, p.priority, p.cache_salt, prepared=ready
                )
        except Exception as e:  # of one prompt: the others are not wanted without it
            error = e
            self._abort(stream)
        self._owners.update({request: (stream, index) for index, request in enumerate(stream.requests)})
        self._call(stream, stream.settle, error)

    def _abort(self, stream: Stream) -> None:
        stream.aborted = True
        for request in stream.requests:
            if not request.finished:
                self.engine.abort(request)
            self._owners.pop(request, None)
        stream.requests.clear()

    def _hand_over(self, got: Sequence[Request]) -> None:
        batches: dict[Any, list[tuple[Stream, int, Piece]]] = {}
        for request in got:
            owner = self._owners.get(request)
            if owner is None:
                continue
            if request.finished:
                del self._owners[request]
            stream, index = owner
            batches.setdefault(stream.loop, []).append((stream, index, _piece(request)))
        for loop, batch in batches.items():
            _call_soon(loop, partial(_deliver, batch))

    def _fail_all(self, error: BaseException) -> None:
        for stream, index in self._owners.values():
            self._call(stream, stream.put, index, Piece(finish_reason="error", error=error))
        self._owners.clear()
        self.engine.reset()

    def _call(self, stream: Stream, function: Callable[..., None], *arguments: object) -> None:
        _call_soon(stream.loop, partial(function, *arguments))


def _call_soon(loop: Any, function: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:  # the loop is closed: nobody reads any more
        LOG.debug("an event loop has gone")


def _deliver(batch: list[tuple[Stream, int, Piece]]) -> None:
    for stream, index, piece in batch:
        stream.put(index, piece)


def _piece(request: Request) -> Piece:
    """What the last step gave the request, copied: the next step may begin before anybody looks."""
    count, known = len(request.new_token_ids), request.logprobs
    return Piece(
        list(request.new_token_ids), request.new_text, known[len(known) - count :] if known and count else [],
        request.prompt_logprobs if len(request.output_token_ids) == count else None,
        request.num_cached, request.finish_reason, request.error,
    )  # fmt: skip
