"""A server on the loopback address with a tiny model, its clients, and an engine that can be held."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import openai
import pytest
import torch

from minillm import LLM
from minillm.adapters import LoraConfig, adapted, adapter_of, peft_format
from minillm.adapters.lora import Adapter, Pair
from minillm.server.run import Server
from minillm.server.service import ServerConfig

MODEL = "tiny"


def until(happened: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for something; no test asks how long it took."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


class Running:
    """A server in a thread."""

    def __init__(self, llm: LLM, config: ServerConfig) -> None:
        self.server = Server(llm, config, port=0, log_level="critical")
        self.service, self.llm = self.server.app.state.service, llm
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        until(lambda: self.server.started)
        self.url = self.server.address
        key = config.api_keys[0] if config.api_keys else "none"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30)
        self.http = httpx.Client(base_url=self.url, timeout=30)

    def idle(self) -> bool:
        """Nothing runs, waits, or is held."""
        engine, admission = self.llm.engine, self.service.admission
        counts = (engine.pool.num_used, admission.requests, admission.tokens, len(self.service.engine.stepper.owners))
        return not engine.has_unfinished() and counts == (0, 0, 0, 0)

    def socket(self, head: str, body: bytes = b"") -> socket.socket:
        """A connection on which this has been sent."""
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)), timeout=30)
        connection.sendall(head.replace("\n", "\r\n").encode("latin-1") + body)
        return connection

    @contextmanager
    def held(self) -> Iterator[threading.Event]:
        """The engine makes no step meanwhile -> whether one waits."""
        go, waits, step = threading.Event(), threading.Event(), self.llm.engine.step

        def held() -> list:
            waits.set()
            go.wait(60)
            return step()

        self.llm.engine.step = held
        try:
            yield waits
        finally:
            self.llm.engine.step = step
            go.set()

    def close(self) -> None:
        """End it."""
        self.client.close()
        self.http.close()
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.service.close()


@pytest.fixture(scope="session")
def adapter_path(tiny_path, tmp_path_factory) -> str:
    """An adapter that changes tokens."""
    from minillm.model.weights import load

    config = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear")
    draw, folder = torch.Generator().manual_seed(1), tmp_path_factory.mktemp("adapters") / "pirate"
    pairs = {
        name: Pair(torch.randn(p.a.shape, generator=draw) / 4, torch.randn(p.b.shape, generator=draw) / 4, p.scale)
        for name, p in adapter_of(adapted(load(tiny_path, device="cpu"), config)).pairs.items()
    }
    peft_format.save(Adapter(config, pairs), folder)
    return str(folder)


@pytest.fixture(scope="session")
def _shared(tiny_path, adapter_path) -> Iterator[Running]:
    llm = LLM(tiny_path, device="cpu", max_num_seqs=8, max_loras=1)
    running = Running(llm, ServerConfig(MODEL, {"pirate": adapter_path}, max_queued_requests=64))
    yield running
    running.close()


@pytest.fixture
def server(_shared) -> Iterator[Running]:
    """Idle before, and alive and idle after."""
    until(_shared.idle)
    yield _shared
    assert _shared.http.get("/health").status_code == 200
    until(_shared.idle)


@pytest.fixture
def client(server) -> openai.OpenAI:
    return server.client


@pytest.fixture
def start(tiny_path) -> Iterator[Callable[..., Running]]:
    """A server of the test's own."""
    started: list[Running] = []

    def run(config: ServerConfig | None = None, **options) -> Running:
        started.append(Running(LLM(tiny_path, device="cpu", **options), config or ServerConfig(MODEL)))
        return started[-1]

    yield run
    for running in started:
        running.close()
