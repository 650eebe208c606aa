"""What a client is told when something is wrong, in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

import logging
from typing import Any

from ..constrained import ConstraintError

__all__ = ["ApiError", "Stopped", "of_generation", "of_value"]

LOG = logging.getLogger("minillm.server")
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Stopped(RuntimeError):
    """The engine takes nothing any more."""


class ApiError(Exception):
    """An answer with an error. param: the field that is wrong. headers: to send with it."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        """What is sent."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def of_value(error: ValueError | TypeError) -> ApiError:
    """Of an argument that the library refused: its messages begin with the argument's name."""
    name, colon, _ = str(error).partition(":")
    return ApiError(400, str(error), name if colon and name.replace("_", "").isalnum() else None)


def of_generation(error: BaseException | None) -> ApiError:
    """Of what went wrong while tokens were made. What is no fault of the client's is told to the log alone."""
    if isinstance(error, ConstraintError):
        return of_value(error)
    if isinstance(error, Stopped):
        return ApiError(503, "the server is shutting down", code="shutting_down")
    LOG.error("a request failed: %r", error)
    return ApiError(500, "the request failed on the server; its log says more", code="internal_error")
