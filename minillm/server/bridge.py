"""Between an event loop and the engine: a thread that steps, and what it hands over.

The thread alone touches the engine once it runs, but for what takes long and needs no lock: adapters and constraints
are prepared by others. Whatever is wanted of it (add, abort, stop) lies in an inbox, which it empties before each step:
so nobody fights for the engine's lock, and an abort takes effect within a step. After each step it hands over once,
what all requests got.

A `Stream` keeps what its reader has not taken yet, merged into one piece for each choice: a client that reads slowly
gets larger pieces later, nobody waits for it, and the most that is kept is the output itself. Streams and the engine
know each other by numbers, so that the engine may as well live in another process.
"""

import asyncio
import itertools
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from ..adapters.serving import LoRARequest
from ..engine.engine import Engine, Prepared
from ..engine.request import Request
from ..sampling import SamplingParams
from .errors import Stopped
from .metrics import render

__all__ = ["EngineThread", "Event", "Piece", "Prompt", "Stepper", "Stream", "Streams"]

LOG = logging.getLogger("minillm.server")
PREPARING = 2  # threads that do so
FAILURES = 3  # steps in a row that raised: the engine is given up


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


# Of a stream's number: what a choice got; or, without an index, whether the prompts were taken, or why all ends.
Event = tuple[int, int, Piece] | tuple[int, None, BaseException | None]


# ---- in the event loop -----------------------------------------------------------------------------------------------


class Stream:
    """What some prompts give: choice i * n + j is the j-th of prompt i.

        async for index, piece in stream: ...

    Ends once every choice has. Whoever leaves early calls `Streams.abort`.
    """

    def __init__(self, choices: int, number: int = 0) -> None:
        self.number = number
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
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
        self._kept.setdefault(index, Piece()).add(piece)
        self._news.set()

    def settle(self, error: BaseException | None) -> None:
        """The engine has taken the prompts; or refused them, or later failed: then nothing more comes."""
        if error is not None:
            for index in list(self._open):
                self.put(index, Piece(finish_reason="error", error=error))
        if not self.accepted.done():
            self.accepted.set_exception(error) if error else self.accepted.set_result(None)


class Streams:
    """The event loop's side of an engine.

        stream = await engine.submit([Prompt(...), ...])
        try:
            async for index, piece in stream: ...
        finally:
            engine.abort(stream)

    add, drop: how a stream's prompts, by its number, get to the engine and away from it.
    """

    _loop: asyncio.AbstractEventLoop | None = None  # the one that submits

    def __init__(self, add: Callable[[int, Sequence[Prompt]], None], drop: Callable[[int], None]) -> None:
        self._add, self._drop, self._streams, self._numbers = add, drop, dict[int, Stream](), itertools.count()

    async def submit(self, prompts: Sequence[Prompt]) -> Stream:
        """Queue all prompts, or none. Raises as `Engine.add`, and Stopped."""
        self._loop = asyncio.get_running_loop()
        stream = Stream(sum([prompt.params.n for prompt in prompts]), next(self._numbers))
        self._streams[stream.number] = stream
        try:
            self._add(stream.number, prompts)
            await stream.accepted
        except BaseException:  # the client may have left: what is queued nonetheless is dropped
            self.abort(stream)
            raise
        return stream

    def abort(self, stream: Stream) -> None:
        """Whatever of the stream still runs is not wanted any more. May be called at any time, more than once."""
        if self._streams.pop(stream.number, None) is not None:
            self._drop(stream.number)

    def _hand_over(self, events: Sequence[Event]) -> None:
        """From another thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody reads any more
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            if (stream := self._streams.get(event[0])) is None:
                continue
            if event[1] is None:
                stream.settle(event[2])
            else:
                stream.put(event[1], event[2])


class EngineThread(Streams):
    """An engine in a thread of this process."""

    def __init__(self, engine: Engine) -> None:
        self.stepper = Stepper(engine, self._hand_over)
        super().__init__(self.stepper.add, self.stepper.abort)
        self.stop = self.stepper.stop

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self.stepper.alive

    async def metrics(self, model: str) -> str:
        """For Prometheus. model: what it is called."""
        return render(self.stepper.engine.metrics, model)


# ---- beside the engine -----------------------------------------------------------------------------------------------


class Stepper:
    """The thread that owns an engine. `tell` gets, from any thread, what happened to the streams of these numbers."""

    def __init__(self, engine: Engine, tell: Callable[[list[Event]], None]) -> None:
        self.engine, self.tell, self.alive = engine, tell, True
        self.requests: dict[int, list[Request]] = {}  # of each stream that is wanted; empty until the engine has them
        self.owners: dict[Request, tuple[int, int]] = {}
        self.inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.pool = ThreadPoolExecutor(PREPARING, "prepare")
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    def add(self, number: int, prompts: Sequence[Prompt]) -> None:
        """Queue a stream's prompts."""
        self.requests[number] = []
        if any([p.adapter or p.params.structured_outputs for p in prompts]):
            self.pool.submit(self._queue, number, prompts)
        else:
            self._queue(number, prompts)

    def abort(self, number: int) -> None:
        """Drop a stream's requests, if it still has any."""
        self.inbox.put(partial(self._abort, number))

    def stop(self, timeout: float = 10.0) -> None:
        """Take nothing more, drop what runs, and wait for the thread's end."""
        self.inbox.put(self._stop)
        self.thread.join(timeout)

    def _queue(self, number: int, prompts: Sequence[Prompt]) -> None:
        """What may take long."""
        try:
            found: dict[tuple[int, int], Prepared] = {}  # the prompts of one request have one object of each
            keys = [(id(p.params), id(p.adapter)) for p in prompts]
            for key, p in zip(keys, prompts, strict=True):
                if key not in found:
                    found[key] = self.engine.prepare(p.params, p.adapter)
        except Exception as error:
            return self.tell([(number, None, error)])
        self.inbox.put(partial(self._add, number, prompts, [found[key] for key in keys]))
        if not self.alive:  # looked at after putting: else it could end in between, and nobody would answer
            self.tell([(number, None, Stopped("the engine has stopped"))])
        return None

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
        while not self.inbox.empty():  # what came meanwhile is refused
            self.inbox.get()()

    def _empty_inbox(self) -> None:
        if not self.engine.has_unfinished():
            self.inbox.get()()  # waits
        while not self.inbox.empty():
            self.inbox.get()()

    def _stop(self) -> None:
        self.alive = False

    def _add(self, number: int, prompts: Sequence[Prompt], prepared: Sequence[Prepared]) -> None:
        if (requests := self.requests.get(number)) is None:  # aborted while its constraint was prepared
            return
        error: BaseException | None = None if self.alive else Stopped("the engine has stopped")
        try:
            for p, ready in zip(prompts, prepared, strict=True) if self.alive else ():
                requests += self.engine.add(p.token_ids, p.params, None, p.priority, p.cache_salt, prepared=ready)
        except Exception as e:  # of one prompt: the others are not wanted without it
            error = e
            self._abort(number)
        else:
            self.owners.update({request: (number, index) for index, request in enumerate(requests)})
        self.tell([(number, None, error)])

    def _abort(self, number: int) -> None:
        for request in self.requests.pop(number, ()):
            if not request.finished:
                self.engine.abort(request)
            self.owners.pop(request, None)

    def _hand_over(self, got: Sequence[Request]) -> None:
        events: list[Event] = []
        for request in got:
            if request in self.owners:
                number, index = self.owners.pop(request) if request.finished else self.owners[request]
                events.append((number, index, _piece(request)))
        if events:
            self.tell(events)

    def _fail_all(self, error: BaseException) -> None:
        numbers = {number for number, _ in self.owners.values()}
        self.owners.clear()
        self.engine.reset()
        self.tell([(number, None, error) for number in numbers])


def _piece(request: Request) -> Piece:
    """What the last step gave the request, copied: the next step may begin before anybody looks."""
    count, known = len(request.new_token_ids), request.logprobs
    return Piece(
        list(request.new_token_ids), request.new_text, known[len(known) - count :] if known and count else [],
        request.prompt_logprobs if len(request.output_token_ids) == count else None,
        request.num_cached, request.finish_reason, request.error,
    )  # fmt: skip
