"""Listening: uvicorn around the app, with limits on connections that have not said yet what they want."""

import asyncio
import logging
import socket
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..llm import LLM
from .app import make_app
from .process import EngineProcess
from .service import ServerConfig

__all__ = ["EngineProcess", "HeaderTimeout", "Listener", "Server", "ServerConfig", "listen"]

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


class Server(Listener):
    """The one of a model: what runs when it is told to end is finished, what comes is refused.

    Server(LLM(...), ServerConfig(), host="127.0.0.1", port=8000).run()
    """

    app: Starlette

    def __init__(
        self,
        model: LLM | EngineProcess,
        config: ServerConfig,
        host: str = "127.0.0.1",
        port: int = 8000,
        **options: Any,
    ) -> None:
        super().__init__(make_app(model, config), host, port, **options)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first one lets what runs finish, a second one does not."""
        self.app.state.service.admission.closed = True
        super().handle_exit(sig, frame)


def listen(model: LLM | EngineProcess, config: ServerConfig, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve a model until SIGINT or SIGTERM. Raises as `Listener.listen`."""
    server = Server(model, config, host, port, log_level="warning")
    sys.setswitchinterval(5e-4)  # seconds that the event loop waits for a thread that makes tokens of a text; 5e-3 else
    try:
        server.listen(config.name, config.api_keys)
    finally:
        server.app.state.service.close()  # a second signal leaves no time for the app's own end
