"""The engine in a process of its own, with the face of `EngineThread`.

Threads of one Python process share its interpreter lock: each time the event loop writes to a socket it gives the lock
away, and gets it back when the engine lets go. With a process for each, neither waits for the other. Once a step, what
all requests got goes through a pipe as JSON; nothing is unpickled.
"""

import asyncio
import atexit
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

from ..adapters.serving import LoRARequest
from ..constrained import ConstraintError
from ..llm import LLM
from ..model.tokenizer_hf import load_tokenizer
from ..model.weights import model_path
from ..sampling import SamplingParams
from .bridge import Event, Piece, Prompt, Stepper, Streams
from .errors import Stopped
from .metrics import render

__all__ = ["EngineProcess", "read_piece", "written_piece"]

ERRORS = {kind.__name__: kind for kind in (ConstraintError, ValueError, TypeError, Stopped)}


class EngineProcess(Streams):
    """A model in a process of its own: `options` are those of `LLM`, `adapters` folders that must be readable.

    Raises what `LLM` raises there, as a RuntimeError where it is none of ValueError and TypeError.
    """

    def __init__(self, model: str | os.PathLike, adapters: Mapping[str, str] | None = None, **options: Any) -> None:
        super().__init__(self._told_to_add, self._told_to_drop)
        context = multiprocessing.get_context("spawn")
        self._pipe, far = context.Pipe()
        self._sending = threading.Lock()
        arguments = (far, str(model), dict(adapters or {}), options)
        self._process = context.Process(target=_main, args=arguments, name="engine", daemon=True)
        self._process.start()
        atexit.register(self.stop)  # it ignores signals, and nobody else may end it
        far.close()
        try:
            kind, ready = json.loads(self._pipe.recv_bytes())
        except EOFError:
            raise RuntimeError("the engine's process ended before its model was loaded") from None
        if kind == "error":
            raise _error(ready)
        self.max_model_len, self.vocab_size, self.sampling_defaults = ready
        path = model_path(model)
        self.tokenizer = load_tokenizer(path) if (path / "tokenizer.json").is_file() else None
        self.alive = True
        self._asked: list[asyncio.Future[str]] = []  # for metrics
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    async def metrics(self, model: str) -> str:
        """As `EngineThread.metrics`."""
        future = asyncio.get_running_loop().create_future()
        self._asked.append(future)
        self._send("metrics", model)
        return await future

    def stop(self, timeout: float = 10.0) -> None:
        """Take nothing more, drop what runs, and wait for the process's end."""
        self.alive = False
        atexit.unregister(self.stop)
        with suppress(Stopped):  # it is gone already
            self._send("stop")
        self._process.join(timeout)
        if self._process.is_alive():
            self._process.kill()

    def _told_to_add(self, number: int, prompts: Sequence[Prompt]) -> None:
        self._send("add", number, [_written(prompt) for prompt in prompts])

    def _told_to_drop(self, number: int) -> None:
        with suppress(Stopped):
            self._send("abort", number)

    def _send(self, *message: Any) -> None:
        try:
            with self._sending:
                self._pipe.send_bytes(json.dumps(message).encode())
        except OSError:
            raise Stopped("the engine has stopped") from None

    def _read(self) -> None:
        """In a thread: what the child says, handed to the event loop."""
        with suppress(EOFError, OSError):
            while True:
                kind, what = json.loads(self._pipe.recv_bytes())
                if kind == "events":
                    self._hand_over([_read_event(event) for event in what])
                else:
                    _set(self._asked.pop(0), what)
        self.alive = False
        for future in self._asked:
            _set(future, "")
        self._hand_over([(number, None, Stopped("the engine has stopped")) for number in [*self._streams]])


# ---- the child -----------------------------------------------------------------------------------------------------


def _main(pipe: Connection, model: str, adapters: dict[str, str], options: dict[str, Any]) -> None:
    """What the child runs: what the parent says, until that is stop, or the parent is gone. Signals are its matter."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sending = threading.Lock()

    def tell(kind: str, what: Any) -> None:
        with sending:
            pipe.send_bytes(json.dumps([kind, what]).encode())

    try:
        llm = LLM(model, **options)
        for number, (name, path) in enumerate(adapters.items(), 1):
            llm.engine.prepare(llm.default_params(), LoRARequest(name, number, path))
    except Exception as error:
        return tell("error", _told(error))
    tell("facts", [llm.max_model_len, llm.vocab_size, llm.sampling_defaults])
    stepper = Stepper(llm.engine, lambda events: tell("events", [_written_event(*event) for event in events]))
    with suppress(EOFError, OSError):
        while (message := json.loads(pipe.recv_bytes()))[0] != "stop":
            match message:
                case ["add", number, prompts]:
                    stepper.add(number, [_read_prompt(prompt) for prompt in prompts])
                case ["abort", number]:
                    stepper.abort(number)
                case ["metrics", name]:
                    tell("metrics", render(llm.engine.metrics, name))
    return stepper.stop()


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


def _written_event(number: int, index: int | None, what: Piece | BaseException | None) -> list[Any]:
    return [number, index, written_piece(what) if isinstance(what, Piece) else what and _told(what)]


def _read_event(written: list[Any]) -> Event:
    number, index, what = written
    return (number, None, what and _error(what)) if index is None else (number, index, read_piece(what))


def _set(future: "asyncio.Future[str]", value: str) -> None:
    """From another thread."""
    with suppress(RuntimeError):  # the loop is closed
        future.get_loop().call_soon_threadsafe(lambda: None if future.done() else future.set_result(value))
