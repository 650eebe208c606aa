"""The engine in a process of its own, with the face of `EngineThread`.

Threads of one Python process share its interpreter lock: each time the event loop writes to a socket it gives the lock
away, and gets it back when the engine lets go. With a process for each, neither waits for the other. Once a step, what
all requests got goes through a pipe as JSON; nothing is unpickled.

The parent's `Stream`s have numbers in the child, where a `_FarStream` stands for each: the child runs an
`EngineThread`, which does not know that its streams are far away.
"""

import asyncio
import atexit
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from ..adapters.serving import LoRARequest
from ..constrained import ConstraintError
from ..llm import LLM
from ..model.tokenizer_hf import load_tokenizer
from ..model.weights import model_path
from ..sampling import SamplingParams
from .bridge import PREPARING, EngineThread, Piece, Prompt, Stopped, Stream
from .metrics import render

__all__ = ["EngineProcess", "read_piece", "written_piece"]

ERRORS = {kind.__name__: kind for kind in (ConstraintError, ValueError, TypeError, Stopped)}


class EngineProcess:
    """A model in a process of its own: `options` are those of `LLM`, `adapters` folders that must be readable.

    Raises what `LLM` raises there, as a RuntimeError where it is none of ValueError and TypeError.
    """

    def __init__(self, model: str | os.PathLike, adapters: Mapping[str, str] | None = None, **options: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, far = context.Pipe()
        self._sending = threading.Lock()
        arguments = (far, str(model), dict(adapters or {}), options)
        self._process = context.Process(target=_main, args=arguments, name="engine", daemon=True)
        self._process.start()
        atexit.register(self.stop)  # it ignores signals, and nobody else may end it
        far.close()
        try:
            ready = json.loads(self._pipe.recv_bytes())
        except EOFError:
            raise RuntimeError("the engine's process ended before its model was loaded") from None
        if "error" in ready:
            raise _error(ready["error"])
        self.max_model_len, self.vocab_size, self.sampling_defaults = ready["facts"]
        path = model_path(model)
        self.tokenizer = load_tokenizer(path) if (path / "tokenizer.json").is_file() else None
        self.alive, self._streams, self._next = True, dict[int, Stream](), 0
        self._numbers: dict[Stream, int] = {}
        self._asked: list[asyncio.Future[str]] = []  # for metrics
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    async def submit(self, prompts: Sequence[Prompt]) -> Stream:
        """As `EngineThread.submit`."""
        stream = Stream(sum([prompt.params.n for prompt in prompts]))
        self._next += 1
        self._streams[self._next], self._numbers[stream] = stream, self._next
        try:
            self._send(["add", self._next, [_written(prompt) for prompt in prompts]])
            await stream.accepted
        except BaseException:
            self.abort(stream)
            raise
        return stream

    def abort(self, stream: Stream) -> None:
        """As `EngineThread.abort`."""
        number = self._numbers.pop(stream, None)
        if number is not None:
            self._streams.pop(number, None)
            with suppress(Stopped):
                self._send(["abort", number])

    async def metrics(self, model: str) -> str:
        """As `EngineThread.metrics`."""
        self._asked.append(asyncio.get_running_loop().create_future())
        future = self._asked[-1]
        self._send(["metrics", model])
        return await future

    def stop(self, timeout: float = 10.0) -> None:
        """As `EngineThread.stop`; the process ends, too."""
        self.alive = False
        atexit.unregister(self.stop)
        with suppress(Stopped):  # it is gone already
            self._send(["stop"])
        self._process.join(timeout)
        if self._process.is_alive():
            self._process.kill()

    def _send(self, message: list[Any]) -> None:
        try:
            with self._sending:
                self._pipe.send_bytes(json.dumps(message).encode())
        except OSError:
            raise Stopped("the engine has stopped") from None

    def _read(self) -> None:
        """In a thread: what the child says, handed to the event loop."""
        try:
            while True:
                kind, *rest = json.loads(self._pipe.recv_bytes())
                waiting = [*self._streams.values()]
                if kind == "metrics":
                    future = self._asked.pop(0)
                    future.get_loop().call_soon_threadsafe(_set, future, rest[0])
                elif waiting:
                    waiting[0].loop.call_soon_threadsafe(self._deliver, rest[0])
        except (EOFError, OSError):
            self.alive = False
        for future in self._asked:
            future.get_loop().call_soon_threadsafe(_set, future, "")
        for stream in [*self._streams.values()]:
            stream.loop.call_soon_threadsafe(stream.fail, Stopped("the engine has stopped"))

    def _deliver(self, events: list[list[Any]]) -> None:
        """In the event loop."""
        for number, *event in events:
            stream = self._streams.get(number)
            if stream is not None and len(event) == 1:
                stream.settle(None if event[0] is None else _error(event[0]))
            elif stream is not None:
                stream.put(event[0], read_piece(event[1]))


# ---- the child -----------------------------------------------------------------------------------------------------


class _FarLoop:
    """The parent's event loop, as the child's engine thread sees it: what is called is sent, once for a whole step."""

    def __init__(self, send: Callable[[list[Any]], None]) -> None:
        self.send, self.events, self._lock = send, list[list[Any]](), threading.Lock()

    def call_soon_threadsafe(self, function: Callable[[], None]) -> None:
        with self._lock:
            function()
            events, self.events = self.events, []
        if events:
            self.send(["events", events])


class _FarStream(Stream):
    """A parent's stream."""

    def __init__(self, number: int, loop: _FarLoop) -> None:
        self.number, self.loop, self.requests, self.aborted = number, loop, [], False

    def settle(self, error: BaseException | None) -> None:
        self.loop.events.append([self.number, error and _told(error)])

    def put(self, index: int, piece: Piece) -> None:
        self.loop.events.append([self.number, index, written_piece(piece)])


def _main(pipe: Connection, model: str, adapters: dict[str, str], options: dict[str, Any]) -> None:
    """What the child runs. Signals are the parent's matter."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        llm = LLM(model, **options)
        for number, (name, path) in enumerate(adapters.items(), 1):
            llm.engine.prepare(llm.default_params(), LoRARequest(name, number, path))
    except Exception as error:
        return pipe.send_bytes(json.dumps({"error": _told(error)}).encode())
    facts = [llm.max_model_len, llm.vocab_size, llm.sampling_defaults]
    pipe.send_bytes(json.dumps({"facts": facts}).encode())
    _Child(pipe, EngineThread(llm.engine)).run()
    return None


class _Child:
    def __init__(self, pipe: Connection, engine: EngineThread) -> None:
        self.pipe, self.engine, self.sending = pipe, engine, threading.Lock()
        self.streams, self.pool = dict[int, _FarStream](), ThreadPoolExecutor(PREPARING)

    def send(self, message: list[Any]) -> None:
        with self.sending:
            self.pipe.send_bytes(json.dumps(message).encode())

    def run(self) -> None:
        """Do as the parent says, until it says stop, or is gone."""
        loop, message = _FarLoop(self.send), list[Any](["start"])
        while message[0] != "stop":
            if message[0] == "add":
                self.add(_FarStream(message[1], loop), [_read_prompt(one) for one in message[2]])
            elif message[0] == "abort" and (stream := self.streams.pop(message[1], None)):
                self.engine.abort(stream)
            elif message[0] == "metrics":
                self.send(["metrics", render(self.engine.engine.metrics, message[1])])
            try:
                message = json.loads(self.pipe.recv_bytes())
            except (EOFError, OSError):
                break
        self.engine.stop()

    def add(self, stream: _FarStream, prompts: list[Prompt]) -> None:
        self.streams[stream.number] = stream
        if any([p.adapter or p.params.structured_outputs for p in prompts]):
            self.pool.submit(self.queue, stream, prompts)
        else:
            self.queue(stream, prompts)

    def queue(self, stream: _FarStream, prompts: list[Prompt]) -> None:
        try:
            self.engine.queue(stream, prompts)
        except Exception as error:
            stream.loop.call_soon_threadsafe(partial(stream.settle, error))


# ---- what goes through the pipe ------------------------------------------------------------------------------------


def _told(error: BaseException) -> list[str]:
    kind = next((name for name, kind in ERRORS.items() if isinstance(error, kind)), type(error).__name__)
    return [kind, str(error)]


def _error(told: list[str]) -> BaseException:
    kind, message = told
    return ERRORS[kind](message) if kind in ERRORS else RuntimeError(f"{kind}: {message}")


def _written(prompt: Prompt) -> list[Any]:
    adapter = None if prompt.adapter is None else [*vars(prompt.adapter).values()]
    return [prompt.token_ids, asdict(prompt.params), adapter, prompt.priority, prompt.cache_salt]


def _read_prompt(written: list[Any]) -> Prompt:
    token_ids, params, adapter, priority, salt = written
    if params["logit_bias"]:
        params["logit_bias"] = {int(token): value for token, value in params["logit_bias"].items()}
    made = None if adapter is None else LoRARequest(*adapter)
    return Prompt(token_ids, SamplingParams(**params), made, priority, salt)


def _pairs(logprobs: Sequence[Mapping[int, float] | None]) -> list[Any]:
    return [None if one is None else [*one.items()] for one in logprobs]  # JSON's objects have no numbers as keys


def written_piece(piece: Piece) -> list[Any]:
    """A piece as JSON's values."""
    of_prompt = piece.prompt_logprobs and _pairs(piece.prompt_logprobs)
    told = piece.error and _told(piece.error)
    known = [piece.token_ids, piece.text, _pairs(piece.logprobs), of_prompt]
    return [*known, piece.num_cached, piece.finish_reason, told]


def read_piece(written: list[Any]) -> Piece:
    """The piece that was written so."""
    token_ids, text, logprobs, of_prompt, num_cached, reason, told = written
    return Piece(
        token_ids, text, [dict(one) for one in logprobs],
        of_prompt and [one and dict(one) for one in of_prompt], num_cached, reason, told and _error(told),
    )  # fmt: skip


def _set(future: "asyncio.Future[str]", value: str) -> None:
    if not future.done():
        future.set_result(value)
