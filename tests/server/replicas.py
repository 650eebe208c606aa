"""Servers that do as a test says, and routers in front of them."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

import httpx
import openai

from minillm.server.listener import Listener
from minillm.server.policies import Policy, RoundRobin
from minillm.server.router import Router, RouterConfig

from .conftest import until

HEAD = b"HTTP/1.1 %b\r\ncontent-type: %b\r\nx-served-by: %b\r\n"
BREAK = object()  # of a script: the connection ends here
CUT = object()  # a script: a whole answer, of which one byte comes


def chunk(text: str | None = None, finish: str | None = None, **more) -> bytes:
    """An event of a conversation's stream."""
    delta = {"role": "assistant", "content": ""} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return b"data: %b\n\n" % json.dumps({"id": "1", "choices": [choice], **more}).encode()


TOKENS = [chunk(), chunk("a"), chunk("b"), chunk("", "stop"), b"data: [DONE]\n\n"]


def refusal(status: int, code: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    """A script's answer that is no stream."""
    return status, json.dumps({"error": {"message": code, "type": "x", "param": None, "code": code}}).encode(), headers


class Replica:
    """An HTTP server that follows a script: parts of a stream, events to wait for, BREAK; or one whole answer.

    requests: (path, headers, body) of what came. left: how many clients went away early. health: of /health; None:
    no answer.
    """

    def __init__(self, script=TOKENS) -> None:
        self.script, self.health, self.requests, self.left, self.load = script, 200, [], 0, 0
        self.loop, self.writers, self.port = asyncio.new_event_loop(), set(), 0
        self.start()

    def start(self) -> None:
        """Listen, where it did before."""
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        until(lambda: self.loop.is_running() and self.server is not None)
        self.port = self.server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def _run(self) -> None:
        self.server = None
        self.server = self.loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", self.port))
        self.loop.run_forever()

    def kill(self) -> None:
        """As a process that is killed: all connections break, nobody listens."""
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self._kill)
            self.thread.join()

    def _kill(self) -> None:
        self.server.close()
        for writer in self.writers:
            writer.transport.abort()
        for task in asyncio.all_tasks():
            task.cancel()
        self.loop.call_later(0.01, self.loop.stop)

    async def _serve(self, reader, writer) -> None:
        self.writers.add(writer)
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError), closing(writer):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = {name.lower(): value for name, _, value in [line.partition(": ") for line in head[1:]]}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                path = head[0].split()[1]
                if path == "/health":
                    await self._healthy(writer)
                elif path == "/metrics":
                    text = f'vllm:num_requests_running{{m="x"}} {self.load}\nvllm:num_requests_waiting{{m="x"}} 0\n'
                    await self._whole(writer, 200, text.encode(), {})
                else:
                    self.requests.append((path, headers, body))
                    await self._play(reader, writer)

    async def _healthy(self, writer) -> None:
        while self.health is None:
            await asyncio.sleep(0.005)
        await self._whole(writer, self.health, b"", {})

    async def _whole(self, writer, status, body, headers) -> None:
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()]).encode()
        head = HEAD % (f"{status} X".encode(), b"application/json", str(self.port).encode())
        writer.write(head + lines + b"content-length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()

    async def _play(self, reader, writer) -> None:
        script = self.script(len(self.requests)) if callable(self.script) else self.script
        if script is CUT:
            writer.write(HEAD % (b"200 OK", b"application/json", b"x") + b"content-length: 100\r\n\r\n{")
            script = [BREAK]
        if isinstance(script, tuple):
            return await self._whole(writer, *script)
        begun = False
        for part in script:
            if isinstance(part, threading.Event):
                while not part.is_set():
                    await asyncio.sleep(0.002)
                    if reader.at_eof() or writer.transport.is_closing():
                        self.left += 1
                        raise ConnectionResetError
            elif part is BREAK:
                writer.transport.abort()
                raise ConnectionResetError
            else:
                if not begun:
                    kind = HEAD % (b"200 OK", b"text/event-stream", str(self.port).encode())
                    writer.write(kind + b"transfer-encoding: chunked\r\n\r\n")
                    begun = True
                writer.write(b"%x\r\n%b\r\n" % (len(part), part))
                await writer.drain()
        writer.write(b"0\r\n\r\n")
        return None


class Routed:
    """A router in a thread, in front of replicas."""

    def __init__(self, urls: list[str], policy: Policy | None = None, **config) -> None:
        options = {"check_seconds": 0.1, "answer_seconds": 20.0, **config}
        self.router = Router(urls, policy or RoundRobin(), RouterConfig(**options))
        self.server = Listener(self.router, port=0, log_level="critical")
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        until(lambda: self.server.started)
        self.url = self.server.address
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="k", max_retries=0, timeout=30)
        self.http = httpx.Client(base_url=self.url, timeout=30)

    def stream(self, text: str = "x", **more):
        """A conversation's pieces as text, as they come."""
        messages = [{"role": "user", "content": text}]
        for event in self.client.chat.completions.create(model="tiny", messages=messages, stream=True, **more):
            if event.choices and event.choices[0].delta.content:
                yield event.choices[0].delta.content

    def idle(self) -> bool:
        """It has nothing anywhere."""
        return all([backend.in_flight == 0 for backend in self.router.backends])

    def close(self) -> None:
        """End it."""
        self.client.close()
        self.http.close()
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


@contextmanager
def routed(*replicas: Replica, policy: Policy | None = None, **config) -> Iterator[Routed]:
    """A router; afterwards nothing is in flight, and all have ended."""
    router = Routed([replica.url for replica in replicas], policy, **config)
    try:
        yield router
        until(router.idle)
    finally:
        router.close()
        for replica in replicas:
            replica.kill()
