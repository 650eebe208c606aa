"""The server of a model: what `minillm serve` runs."""

import sys
from types import FrameType
from typing import Any

from starlette.applications import Starlette

from ..llm import LLM
from .app import make_app
from .listener import Listener
from .process import EngineProcess
from .service import ServerConfig

__all__ = ["EngineProcess", "Server", "ServerConfig", "listen"]


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
