"""How much JSON a body may hold. A program of its own, too, with the standard library alone.

Reading JSON holds the interpreter's lock: two megabytes of it stop the event loop, and with it everybody's tokens, for
a tenth of a second. So a large body is first read by another process, which runs this file: on its standard input come
a length in a line and a body of that length, again and again; for each it writes a line, null or [message, field].
Whoever wants too much is refused there, and no thread of the server has looked at it.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

__all__ = ["ENTRIES", "BodyReader", "Refused", "parse"]

DEPTH = 64  # of nested JSON
VALUES = 1 << 16  # beside those of a prompt
ENTRIES = {"messages": 4096, "logit_bias": 1024, "stop_token_ids": 256, "stop": 16}
FREE = ("prompt", "tokens")  # how many there may be, depends on the model


class Refused(ValueError):
    """What is wrong with a body. param: the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param = message, param


def parse(body: bytes | bytearray, prompts: int | None = None) -> dict[str, Any]:
    """JSON -> its object. prompts: how many there may be. Raises Refused for what is none, and for too much."""
    try:
        found = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(f"body: expected JSON in UTF-8 ({type(error).__name__}: {error})") from None
    if not isinstance(found, dict):
        raise Refused(f"body: expected a JSON object, got {found!r:.40}")
    several = isinstance(prompt := found.get("prompt"), list) and not isinstance(next(iter(prompt), 0), int)
    for name, most in ENTRIES.items() if prompts is None or not several else [*ENTRIES.items(), ("prompt", prompts)]:
        value = found.get(name)
        if isinstance(value, list | dict) and len(value) > most:
            raise Refused(f"{name}: expected at most {most} entries, got {len(value)}", name)
    level, values = [value for name, value in found.items() if name not in FREE], 0
    for _ in range(DEPTH):
        values += len(level)
        if values > VALUES:
            raise Refused(f"body: expected at most {VALUES} values beside a prompt")
        if not (level := [value for one in level if isinstance(one, dict | list) for value in _inside(one)]):
            return found
    raise Refused(f"body: expected JSON nested at most {DEPTH} deep")


def _inside(value: dict | list) -> Any:
    return value.values() if isinstance(value, dict) else value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


class BodyReader:
    """The process that reads large bodies first. prompts: as `parse`'s."""

    def __init__(self, prompts: int) -> None:
        self.prompts, self.thread = prompts, ThreadPoolExecutor(1, "bodies")
        self.process: subprocess.Popen | None = None

    def check(self, body: bytes | bytearray) -> None:
        """In `thread`, which only waits. Raises Refused."""
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, "-I", __file__, str(self.prompts)]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None  # pipes both
        assert stdout is not None
        stdin.write(b"%d\n" % len(body))
        stdin.write(body)
        stdin.flush()
        if (refused := json.loads(stdout.readline() or '["body: cannot be read", null]')) is not None:
            raise Refused(*refused)

    def close(self) -> None:
        """End the process."""
        self.thread.shutdown(wait=False, cancel_futures=True)
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def _main(prompts: int) -> None:
    while line := sys.stdin.buffer.readline():
        told = None
        try:
            parse(sys.stdin.buffer.read(int(line)), prompts)
        except Refused as refused:
            told = [refused.message[:1000], refused.param]
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    _main(int(sys.argv[1]))
