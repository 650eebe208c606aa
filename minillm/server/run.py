"""Listening: uvicorn around the app, with limits on connections that have not said yet what they want."""

import asyncio
import logging
import socket
import sys
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..llm import LLM
from .app import make_app
from .process import EngineProcess
from .service import ServerConfig

__all__ = ["HeaderTimeout", "Server", "listen"]

LOG = logging.getLogger("minillm.server")
HEADER_SECONDS, HEADER_BYTES, CONNECTIONS = 10.0, 32 << 10, 4096


class HeaderTimeout(H11Protocol):
    """A connection on which a request's head must be complete in time: uvicorn watches only those that send nothing."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in the parent
        """A client has connected."""
        super().connection_made(transport)
        self.loop.call_later(HEADER_SECONDS, self._look, None)

    def _look(self, before: object) -> None:
        """before: the request that was answered when we looked last, None before the first."""
        answered = self.cycle is None or self.cycle.response_complete
        if answered and self.cycle is before:
            self.transport.close()
        elif not self.transport.is_closing():
            self.loop.call_later(HEADER_SECONDS, self._look, self.cycle if answered else self)


class Server(uvicorn.Server):
    """uvicorn's, of one model: what runs when it is told to end is finished, what comes is refused.

        Server(LLM(...), ServerConfig(), host="127.0.0.1", port=8000).run()

    drain_seconds: how long what runs may take then. port 0: any that is free; `address` says which.
    """

    def __init__(
        self, model: LLM | EngineProcess, config: ServerConfig, host: str = "127.0.0.1", port: int = 8000,
        drain_seconds: int = 30, **options: Any,
    ) -> None:  # fmt: skip
        self.app = make_app(model, config)
        super().__init__(
            uvicorn.Config(
                self.app, host, port, http=HeaderTimeout, ws="none", access_log=False, server_header=False,
                proxy_headers=False, limit_concurrency=CONNECTIONS, h11_max_incomplete_event_size=HEADER_BYTES,
                timeout_graceful_shutdown=drain_seconds, **options,
            )
        )  # fmt: skip

    @property
    def address(self) -> str:
        """Where it listens, once it does."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first one lets what runs finish, a second one does not."""
        self.app.state.service.admission.closed = True
        super().handle_exit(sig, frame)


def listen(model: LLM | EngineProcess, config: ServerConfig, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve until SIGINT or SIGTERM, which then has its usual effect. Raises OSError where the address is taken."""
    if host not in ("127.0.0.1", "::1", "localhost") and not config.api_keys:
        LOG.warning("listening on %s without a key: whoever reaches it may use it", host)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"port: cannot listen on {host}:{port}: {error.strerror}") from None
    with listening:
        server = Server(model, config, host, port, log_level="warning")
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        print(f"{config.name}: {address}", file=sys.stderr, flush=True)
        try:
            server.run([listening])
        finally:
            server.app.state.service.close()  # a second signal leaves no time for the app's own end
