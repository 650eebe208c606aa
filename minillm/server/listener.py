"""Listening: uvicorn around any app, with limits on connections that have not said yet what they want, and keys.

A router needs this alone, and no torch.
"""

import asyncio
import hmac
import logging
import socket
import sys
from collections.abc import Sequence
from typing import Any

import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError

__all__ = ["HeaderTimeout", "Keys", "Listener"]

LOG = logging.getLogger("minillm.server")
HEADER_SECONDS, HEADER_BYTES, CONNECTIONS = 10.0, 32 << 10, 4096


class HeaderTimeout(H11Protocol):
    """A connection on which a request's head must be complete in time: uvicorn watches only those that send nothing."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in the parent
        """A client has connected."""
        super().connection_made(transport)
        # asyncio does so only for sockets that name their protocol, which `socket.create_server`'s do not: without it,
        # a token waits until the client has acknowledged the one before, up to 40 ms.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.loop.call_later(HEADER_SECONDS, self._look, None)

    def _look(self, before: object) -> None:
        """before: the request that was answered when we looked last, None before the first."""
        answered = self.cycle is None or self.cycle.response_complete
        if answered and self.cycle is before:
            self.transport.close()
        elif not self.transport.is_closing():
            self.loop.call_later(HEADER_SECONDS, self._look, self.cycle if answered else self)


class Listener(uvicorn.Server):
    """uvicorn's, with limits. What runs when it is told to end may take `drain_seconds` more. port 0: any that is free;
    `address` says which.
    """

    def __init__(
        self, app: ASGIApp, host: str = "127.0.0.1", port: int = 8000, drain_seconds: int = 30, **options: Any
    ) -> None:
        self.app = app
        super().__init__(
            uvicorn.Config(
                app, host, port, http=HeaderTimeout, ws="none", access_log=False, server_header=False,
                proxy_headers=False, limit_concurrency=CONNECTIONS, h11_max_incomplete_event_size=HEADER_BYTES,
                timeout_graceful_shutdown=drain_seconds, **options,
            )
        )  # fmt: skip

    @property
    def address(self) -> str:
        """Where it listens, once it does."""
        return _address(*self.servers[0].sockets[0].getsockname()[:2])

    def listen(self, name: str, keys: Sequence[str]) -> None:
        """Serve until SIGINT or SIGTERM, which then has its usual effect, and print the address first. Raises OSError
        where it is taken. keys: without any, whoever reaches it may use it, which is worth a warning.
        """
        host, port = self.config.host, self.config.port
        if host not in ("127.0.0.1", "::1", "localhost") and not keys:
            LOG.warning("listening on %s without a key: whoever reaches it may use it", host)
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listening = socket.create_server((host, port), family=family, backlog=2048)
        except OSError as error:
            raise OSError(f"port: cannot listen on {host}:{port}: {error.strerror}") from None
        with listening:
            print(f"{name}: {_address(host, listening.getsockname()[1])}", file=sys.stderr, flush=True)
            self.run([listening])


def _address(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Keys:
    """Lets pass who has a key: `Authorization: Bearer ...`. Everything but /health and the page needs one."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self.app, self.keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.keys and scope["path"] not in ("/", "/health"):
            sent = dict(scope["headers"]).get(b"authorization", b"")
            scheme, _, key = sent.partition(b" ")
            # All are compared, each in a time that does not tell how much of it is right.
            known = sum([hmac.compare_digest(key, one) for one in self.keys])
            if not known or scheme.lower() != b"bearer":
                error = ApiError(401, "a key is needed: Authorization: Bearer KEY", code="invalid_api_key")
                response = JSONResponse(error.body(), 401, {"WWW-Authenticate": "Bearer"})
                return await response(scope, receive, send)
            scope["key"] = key.decode("latin-1")
        return await self.app(scope, receive, send)
