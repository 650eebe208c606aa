"""An HTTP client for a router: connections to one replica that are kept, answers that are handed on as they come.

Source: RFC 9112 (HTTP/1.1), as h11 reads and writes it.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import h11

from .policies import Replica

__all__ = ["Backend", "Broken", "Headers", "whole"]

Headers = Sequence[tuple[bytes, bytes]]
KEPT = 2.0  # seconds that a connection may be idle: less than what uvicorn closes it after
WHOLE = 64 << 20  # bytes of an answer that is no stream


class Broken(Exception):
    """A replica that did not answer to the end. silent: it took too long, and may live."""

    def __init__(self, message: str, silent: bool = False) -> None:
        super().__init__(message)
        self.silent = silent


class Backend(Replica):
    """A replica by its address. Raises ValueError for one that is not http://host:port."""

    def __init__(self, url: str) -> None:
        super().__init__(url.rstrip("/"))
        try:
            parts = urlsplit(url)
            self.host, self.port = parts.hostname, parts.port or 80
        except ValueError:
            self.host = None
        if not self.host or parts.scheme != "http" or self.name != f"http://{parts.netloc}" or parts.username:
            raise ValueError(f"replica: expected http://host:port, got {url!r}")
        self.healthy, self.silent, self.requests, self.broken = True, 0, 0, 0
        self.look = asyncio.Event()  # at its health, now
        self._idle, self._all = list[_Connection](), set[_Connection]()

    @asynccontextmanager
    async def ask(
        self, method: str, target: bytes, headers: Headers, body: bytes, seconds: float
    ) -> AsyncIterator[tuple[h11.Response, AsyncGenerator[bytes]]]:
        """Send a request -> its answer's head and the parts of its body. Whoever leaves early has the replica drop it.

        Raises Broken, while the body is read, too, where the replica does not answer to the end, or is silent for
        `seconds`; h11.LocalProtocolError for a request that cannot be written.
        """
        named = [(b"host", self.name.removeprefix("http://").encode())]
        sized = [(b"content-length", str(len(body)).encode())]
        request = h11.Request(method=method, target=target, headers=[*named, *sized, *headers])
        connection: _Connection | None = None
        try:
            async with asyncio.timeout(seconds):
                connection, head = await self._begin(request, body)
            yield head, connection.body(seconds)
        except (OSError, h11.RemoteProtocolError) as error:  # a TimeoutError is an OSError
            raise Broken(f"{self.name}: {type(error).__name__}: {error}", isinstance(error, TimeoutError)) from None
        finally:
            if connection is not None:
                self._give_back(connection)

    def drop_all(self) -> None:
        """Whoever waits for an answer gets Broken."""
        for connection in list(self._all):
            self._drop(connection)
        self._idle.clear()

    async def _begin(self, request: h11.Request, body: bytes) -> tuple["_Connection", h11.Response]:
        """Send it on a connection that was kept; on another one where the replica had closed that meanwhile."""
        while True:
            kept = self._kept()
            connection = kept or _Connection(*await asyncio.open_connection(self.host, self.port))
            self._all.add(connection)
            try:
                await connection.send(request, body)
                return connection, await connection.event()
            except BaseException as error:
                closed = isinstance(error, ConnectionError | h11.RemoteProtocolError) and connection in self._all
                self._drop(connection)
                if kept is None or not closed:
                    raise

    def _kept(self) -> "_Connection | None":
        while self._idle:
            connection = self._idle.pop()
            if connection.lives:
                return connection
            self._drop(connection)
        return None

    def _give_back(self, connection: "_Connection") -> None:
        state = connection.state
        if state.our_state is state.their_state is h11.DONE and connection in self._all:
            state.start_next_cycle()
            connection.used = time.monotonic()
            self._idle.append(connection)
        else:  # the answer is not complete, or the last one
            self._drop(connection)

    def _drop(self, connection: "_Connection") -> None:
        self._all.discard(connection)
        connection.writer.transport.abort()


class _Connection:
    """To a replica, for one request after another."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.state, self.used = h11.Connection(h11.CLIENT), time.monotonic()

    @property
    def lives(self) -> bool:
        """The replica has not closed it, as far as is known, nor reset it, and will not in a moment."""
        ended = self.reader.at_eof() or self.writer.transport.is_closing()
        return not ended and time.monotonic() - self.used < KEPT

    async def send(self, request: h11.Request, body: bytes) -> None:
        events = (request, h11.Data(data=body), h11.EndOfMessage())
        self.writer.write(b"".join([self.state.send(event) or b"" for event in events]))
        await self.writer.drain()

    async def event(self) -> Any:
        """The next part of the answer."""
        while (event := self.state.next_event()) is h11.NEED_DATA or isinstance(event, h11.InformationalResponse):
            if event is h11.NEED_DATA:
                self.state.receive_data(await self.reader.read(1 << 16))
        if isinstance(event, h11.ConnectionClosed):
            raise ConnectionResetError("closed before the answer")
        return event

    async def body(self, seconds: float) -> AsyncGenerator[bytes]:
        while True:
            async with asyncio.timeout(seconds):
                event = await self.event()
            if isinstance(event, h11.EndOfMessage):
                return
            yield bytes(event.data)


async def whole(chunks: AsyncIterator[bytes]) -> bytes:
    """All of a body. Raises Broken for one that is too large."""
    data = bytearray()
    async for chunk in chunks:
        data += chunk
        if len(data) > WHOLE:
            raise Broken(f"an answer of more than {WHOLE} bytes")
    return bytes(data)
