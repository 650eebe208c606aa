"""Answers that were given before, from Redis: for requests that are equal in all that decides an answer.

Only those whose answer is determined: temperature 0, or a seed. What is stored are tokens, text and log probabilities,
as JSON; ids and times are each answer's own, and a stream gets what was stored in one piece. Equal requests at the same
time are computed once: all read along, until the last of them leaves. (Within this server; another replica computes
its own.)

Redis is no part of the answer: who does not hear from it within `seconds` computes, and after three of them in a row
nobody asks for `pause` seconds. What it returns is believed only if it holds the request's own name: a connection on
which a reply was left unread gives the next request somebody else's answer (OpenAI, "March 20 ChatGPT outage", 2023).
"""

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..extras import require
from .bridge import Piece
from .errors import ApiError
from .process import read_piece, written_piece
from .protocol import Asked

if TYPE_CHECKING:
    from .service import Running

__all__ = ["CacheConfig", "Flight", "ResponseCache", "digest", "is_determined"]

LOG = logging.getLogger("minillm.server")
LARGEST = 1 << 20  # bytes of an entry
CONNECTIONS, FAILURES = 32, 3


@dataclass(frozen=True)
class CacheConfig:
    """Where answers are kept: url as redis://host:port/0. model: the `digest` of what computes them. ttl: seconds that
    one is kept.
    """

    url: str
    model: str
    ttl: float = 3600.0
    seconds: float = 0.1
    pause: float = 5.0


def digest(folder: Path, *facts: object) -> str:
    """Of all files in a folder (weights, configuration, template) and of what else decides what they compute. Reads
    every byte: a path, a size and a date do not tell whether somebody trained on.
    """
    whole = hashlib.sha256(repr(facts).encode())
    for file in sorted(folder.iterdir()):
        if file.is_file():
            with file.open("rb") as stream:
                whole.update(file.name.encode() + b"\0" + hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()


def is_determined(asked: Asked) -> bool:
    """Is there one answer? Greedy, or drawn from random numbers that the request names."""
    return asked.params.temperature == 0 or asked.params.seed is not None


class Flight:
    """An answer that is made, or was found, and is read by several."""

    def __init__(self, forget: Callable[[], object]) -> None:
        self.forget = forget
        self.log: list[tuple[int, Piece]] = []
        self.prompts: list[list[int]] | None = None
        self.error: ApiError | None = None
        self.readers, self.found, self.ended = 0, False, False
        self.task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """Wake whoever reads."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def begun(self) -> list[list[int]]:
        """-> the prompts' token ids, once they are known. Raises ApiError where it came to nothing."""
        while self.prompts is None and not self.ended:
            await self._changed.wait()
        if self.prompts is None:
            raise self.error or AssertionError("it ended without prompts and without an error")
        return self.prompts

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """All from the start; what has come since the reader last looked in one piece for each choice, of its own."""
        at = 0
        while at < len(self.log) or not self.ended:
            kept: dict[int, Piece] = {}
            for index, piece in self.log[at:]:
                kept.setdefault(index, Piece()).add(piece)
            at = len(self.log)
            for index, piece in kept.items():
                yield index, piece
            if at == len(self.log) and not self.ended:
                await self._changed.wait()
        if self.error is not None:
            raise self.error

    def leave(self) -> None:
        """A reader goes. After the last one nobody wants the answer."""
        self.readers -= 1
        if not self.readers and not self.ended and self.task is not None:
            self.task.cancel()
            self.forget()  # at once: nobody shall join what is ending


class ResponseCache:
    """Raises ImportError without the package redis, and ValueError for an address that is none.

    adapters: the `digest` of each by its name.
    """

    def __init__(self, config: CacheConfig, adapters: Mapping[str, str]) -> None:
        require("cache", "redis")
        import redis.asyncio as redis

        self.config, self.adapters = config, adapters
        try:
            pool = redis.BlockingConnectionPool.from_url(
                config.url, max_connections=CONNECTIONS, timeout=config.seconds
            )
        except ValueError as error:
            raise ValueError(f"cache: expected redis://host:port/0, got {config.url!r} ({error})") from None
        self.redis = redis.Redis(connection_pool=pool)
        self.flights: dict[str, Flight] = {}
        self.counts = dict.fromkeys(("hit", "miss", "shared", "failure"), 0)
        self._failures, self._closed_until = 0, 0.0  # in a row; on the monotonic clock

    def name(self, asked: Asked, client: str) -> str:
        """A request's name: equal ones have the same. client: its key; it shall not learn whether others asked so."""
        decides = {
            "model": self.config.model, "adapter": self.adapters.get(asked.model or ""), "client": client,
            "salt": asked.cache_salt, "params": asdict(asked.params), "prompts": asked.prompts,
            "messages": asked.messages, "variables": asked.variables, "echo": asked.echo,
            "only_prompt": asked.only_prompt, "logprobs": asked.logprobs,
        }  # fmt: skip
        return "minillm:1:" + hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    async def join(self, name: str, start: Callable[[], Awaitable["Running"]]) -> tuple[Flight, str]:
        """The flight of a request, which the caller leaves: what is kept (hit), what others wait for (shared), else
        what `start` starts (miss). Raises ApiError.
        """
        flight = self.flights.get(name)
        source = "" if flight is None else "hit" if flight.ended else "shared"
        if flight is None:
            flight = self.flights[name] = Flight(lambda: self.flights.pop(name, None))
            flight.task = asyncio.create_task(self._fly(name, flight, start))
        flight.readers += 1
        try:
            await flight.begun()
        except BaseException:
            flight.leave()
            raise
        source = source or ("hit" if flight.found else "miss")
        self.counts[source] += 1
        return flight, source

    async def close(self) -> None:
        """Drop what is under way."""
        for flight in list(self.flights.values()):
            if flight.task is not None:
                flight.task.cancel()
        await self.redis.aclose()

    def prometheus(self) -> str:
        """What happened, in Prometheus' text format. failure: of Redis."""
        lines = [f'minillm_cache_total{{result="{name}"}} {count}\n' for name, count in self.counts.items()]
        return "".join(["# TYPE minillm_cache_total counter\n", *lines])

    # ---- inside ------------------------------------------------------------------------------------------------------

    async def _fly(self, name: str, flight: Flight, start: Callable[[], Awaitable["Running"]]) -> None:
        try:
            found = _read(name, await self._redis(lambda: self.redis.get(name)))
            if found is not None:
                flight.found, (flight.prompts, flight.log) = True, found
                return
            await self._compute(flight, await start())
            flight.ended = True
            flight.changed()  # its readers need not wait until it is stored; who comes until then still finds it here
            if len(entry := _written(name, flight)) <= LARGEST:
                await self._redis(lambda: self.redis.set(name, entry, px=int(1000 * self.config.ttl)))
        except asyncio.CancelledError:
            flight.error = ApiError(503, "the server is shutting down", code="shutting_down")
            raise
        except ApiError as error:
            flight.error = error
        except Exception as error:
            LOG.exception("a cached request failed")
            flight.error = ApiError(500, f"the request failed ({type(error).__name__})", code="internal_error")
        finally:
            flight.ended = True
            if self.flights.get(name) is flight:
                flight.forget()
            flight.changed()

    async def _compute(self, flight: Flight, running: "Running") -> None:
        try:
            flight.prompts = running.answer.prompts
            flight.changed()
            async for index, piece in running.pieces():
                flight.log.append((index, piece))
                flight.changed()
        finally:
            running.close()

    async def _redis(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        """What Redis says; None while it does not answer in time."""
        now = time.monotonic()
        if now < self._closed_until:
            return None
        if self._failures >= FAILURES:  # one tries, the others wait for what it finds
            self._closed_until = now + 2 * self.config.seconds
        try:
            async with asyncio.timeout(self.config.seconds):
                found = await ask()
        except Exception as error:
            self.counts["failure"] += 1
            self._failures += 1
            if self._failures >= FAILURES:
                LOG.warning("no answers from Redis for %g s: %s", self.config.pause, type(error).__name__)
                self._closed_until = time.monotonic() + self.config.pause
            return None
        self._failures = 0
        return found


def _written(name: str, flight: Flight) -> bytes:
    pieces: dict[int, Piece] = {}
    for index, piece in flight.log:
        pieces.setdefault(index, Piece()).add(piece)
    return json.dumps([name, flight.prompts, [[i, written_piece(piece)] for i, piece in pieces.items()]]).encode()


def _read(name: str, entry: bytes | None) -> tuple[list[list[int]], list[tuple[int, Piece]]] | None:
    """What was stored by this name. Whatever else it is counts as nothing."""
    with suppress(ValueError, TypeError, KeyError):
        whose, prompts, pieces = json.loads(entry or b"null")
        if whose == name:
            return prompts, [(index, read_piece(piece)) for index, piece in pieces]
    return None
