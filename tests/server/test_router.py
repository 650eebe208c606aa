"""A router: what a client sees when replicas die, refuse, hang or shut down, and which of them is asked.

Cases of other routers: a client's errors opened the circuit (sglang#25811), a retry went to the replica that had failed
(NeMo-RL#3613), loads of streams that broke were never given back (vllm-project/router#211), failures within a stream
did not count (ferro-labs/ai-gateway#136), a replica that came back was thought to have its cache (ROCm/ATOM#2276).
"""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import openai
import pytest
from typer.testing import CliRunner

from minillm.cli import app
from minillm.server import upstream
from minillm.server.listener import HeaderTimeout, Listener
from minillm.server.policies import LeastLoaded, PrefixAware, RoundRobin, SessionHash
from minillm.server.router import Router
from minillm.server.upstream import _Connection

from .conftest import until
from .replicas import BREAK, CUT, TOKENS, Replica, Routed, chunk, refusal, routed

CHAT = {"messages": [{"role": "user", "content": "x"}]}
POST = "/v1/chat/completions"


def served(*replicas: Replica) -> list[int]:
    return [len(replica.requests) for replica in replicas]


class First(RoundRobin):
    """The first of those that are healthy."""

    def choose(self, replicas, task):
        return replicas[0]


def test_answers_are_the_replicas(server):
    """A real server behind it: streams, whole answers, errors, other addresses."""
    router = Routed([server.url])
    ask = {"model": "tiny", "messages": CHAT["messages"], "max_tokens": 9, "temperature": 0}
    direct, through = [c.chat.completions.create(**ask) for c in (server.client, router.client)]
    assert through.choices == direct.choices
    events = [e.choices[0] for e in router.client.chat.completions.create(**ask, stream=True)]
    assert "".join([e.delta.content or "" for e in events]) == direct.choices[0].message.content
    assert [e.finish_reason for e in events if e.finish_reason] == ["length"]
    direct, through = [c.post("/v1/completions", json={"prompt": 5}) for c in (server.http, router.http)]
    assert (through.status_code, through.json()) == (direct.status_code, direct.json())
    for path in ("/v1/models", "/v1/models/none", "/version", "/no/where?x=1"):
        direct, through = server.http.get(path), router.http.get(path)
        assert (through.status_code, through.json()) == (direct.status_code, direct.json())
    assert sorted(through.headers) == sorted(direct.headers)
    assert router.http.post("/tokenize", json={"prompt": "hello"}).json()["count"] > 0
    router.close()


def test_headers_and_address_reach_the_replica():
    replica = Replica(refusal(200, "fine"))
    with routed(replica) as router:
        router.http.post("/v1/%78?a=%20b", json=CHAT, headers={"authorization": "Bearer k", "x-a": "b", "te": "x"})
    ((path, headers, body),) = replica.requests
    assert path == "/v1/%78?a=%20b"
    assert json.loads(body) == CHAT
    assert (headers["authorization"], headers["x-a"]) == ("Bearer k", "b")
    assert headers["host"] == replica.url.removeprefix("http://")
    assert not {"te", "accept-encoding"} & set(headers)


def test_a_replica_that_is_gone_is_not_noticed():
    gone, there = Replica(), Replica()
    gone.kill()
    with routed(gone, there) as router:
        assert ["".join(router.stream()) for _ in range(4)] == ["ab"] * 4
        assert served(gone, there) == [0, 4]
        until(lambda: not router.router.backends[0].healthy)


@pytest.mark.parametrize(
    "script", [[BREAK], [chunk(), BREAK], [chunk(), chunk(""), BREAK]], ids=["head", "role", "empty"]
)
def test_before_the_first_token_another_answers(script):
    dies, there = Replica(script), Replica()
    with routed(dies, there, policy=First()) as router:
        events = [*router.client.chat.completions.create(model="m", **CHAT, stream=True)]
        assert [e.choices[0].delta.role for e in events] == ["assistant", None, None, None]
        assert served(there) == [1]
        assert router.router.retries == 1


def test_after_the_first_token_its_streams_end_with_an_error_and_others_do_not_notice():
    go = threading.Event()
    script = [chunk(), chunk("a"), go, chunk("b"), chunk("", "stop"), b"data: [DONE]\n\n"]
    dies, lives = Replica(script), Replica(script)
    with routed(dies, lives) as router:
        streams = [router.stream() for _ in range(6)]
        assert [next(stream) for stream in streams] == ["a"] * 6
        dies.kill()
        until(lambda: sum([b.broken for b in router.router.backends]) == 3)
        go.set()
        ends = []
        for stream in streams:
            try:
                ends.append("".join(stream))
            except openai.APIError as error:
                ends.append(error.code)
        assert sorted(ends) == ["b"] * 3 + ["lost"] * 3
        assert served(dies, lives) == [3, 3]  # none of them was sent again
        assert router.router.retries == 0


def test_the_error_event_is_the_last_but_done():
    with routed(Replica([chunk(), chunk("a"), BREAK])) as router:
        text = router.http.post(POST, json={**CHAT, "stream": True}).text
    *_, last, done, empty = text.split("\n\n")
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (set(error), error["code"], done, empty) == (
        {"message", "type", "param", "code"},
        "lost",
        "data: [DONE]",
        "",
    )


def test_an_answer_that_is_no_stream_is_sent_again_up_to_its_end():
    dies, there = Replica(CUT), Replica(refusal(200, "fine"))
    with routed(dies, there, policy=First()) as router:
        assert router.http.post(POST, json=CHAT).json()["error"]["code"] == "fine"


@pytest.mark.parametrize("reset", [True, False])
def test_a_connection_that_the_replica_closed_meanwhile_is_nobodys_fault(reset, monkeypatch):
    monkeypatch.setattr(upstream, "KEPT", 1e9)
    replica = Replica()
    with routed(replica, check_seconds=60.0) as router:
        for _ in range(3):
            assert "".join(router.stream()) == "ab"
            writers = [w for w in replica.writers if not w.transport.is_closing()]
            for writer in writers:
                replica.loop.call_soon_threadsafe(writer.transport.abort if reset else writer.close)
            (backend,) = router.router.backends
            until(lambda backend=backend: not any([c.lives for c in backend._idle]))
        assert backend.broken == 0


def test_a_connection_that_closes_as_it_is_used(monkeypatch):
    """The replica's end is on its way while the request is: it is sent again, to the same one."""
    replica = Replica()
    with routed(replica, check_seconds=60.0) as router:
        assert "".join(router.stream()) == "ab"
        monkeypatch.setattr(_Connection, "lives", True)
        for writer in list(replica.writers):
            replica.loop.call_soon_threadsafe(writer.close)
        until(lambda: all([w.transport.is_closing() for w in replica.writers]))
        assert "".join(router.stream()) == "ab"
        assert (router.router.backends[0].broken, router.router.retries) == (0, 0)


def test_attempts_are_bounded():
    replicas = [Replica([BREAK]) for _ in range(4)]
    with routed(*replicas, attempts=2) as router:
        answer = router.http.post(POST, json=CHAT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_replica")
        assert answer.headers["retry-after"] == "1"
        assert sorted([count > 0 for count in served(*replicas)]) == [False, False, True, True]


@pytest.mark.parametrize("refused", [refusal(429, "queue_full"), refusal(503, "shutting_down")])
def test_who_has_no_room_is_left_for_another(refused):
    full, there = Replica(refused), Replica(refusal(200, "fine"))
    full.health = refused[0] if refused[0] == 503 else 200
    with routed(full, there, policy=First()) as router:
        assert router.http.post(POST, json=CHAT).json()["error"]["code"] == "fine"


def test_all_are_full():
    """The client is told what a replica said, and when to come again; all stay healthy."""
    replicas = [Replica(refusal(429, "queue_full", **{"retry-after": "17"})) for _ in range(2)]
    with routed(*replicas) as router:
        answer = router.http.post(POST, json=CHAT)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "17")
        assert answer.json()["error"]["code"] == "queue_full"
        assert served(*replicas) == [1, 1]
        assert all([b.healthy for b in router.router.backends])


def test_a_key_whose_tokens_are_spent_is_not_tried_elsewhere():
    replicas = [Replica(refusal(429, "rate_limit_exceeded")) for _ in range(2)]
    with routed(*replicas) as router:
        assert router.http.post(POST, json=CHAT).status_code == 429
        assert sum(served(*replicas)) == 1


@pytest.mark.parametrize("status", [400, 401, 404, 422, 500])
def test_errors_of_requests_say_nothing_about_health(status):
    replicas = [Replica(refusal(status, "wrong")) for _ in range(2)]
    with routed(*replicas) as router:
        answers = [router.http.post(POST, json=CHAT) for _ in range(30)]
        assert {(a.status_code, a.json()["error"]["code"]) for a in answers} == {(status, "wrong")}
        assert all([b.healthy for b in router.router.backends])
        assert served(*replicas) == [15, 15]
        assert router.router.retries == 0


def test_a_replica_that_shuts_down_finishes_and_gets_nothing_new():
    go = threading.Event()
    drains, there = Replica([chunk(), chunk("a"), go, *TOKENS[2:]]), Replica()
    with routed(drains, there, policy=First()) as router:
        stream = router.stream()
        assert next(stream) == "a"
        drains.health = 503
        until(lambda: not router.router.backends[0].healthy)
        assert "".join(router.stream()) == "ab"
        go.set()
        assert "".join(stream) == "b"
        assert served(drains, there) == [1, 1]


def test_a_stream_that_is_told_the_end_before_its_first_token():
    error = json.loads(refusal(503, "shutting_down")[1])
    drains = Replica([chunk(), b"data: %b\n\n" % json.dumps(error).encode(), b"data: [DONE]\n\n"])
    there = Replica()
    with routed(drains, there, policy=First()) as router:
        assert "".join(router.stream()) == "ab"


def test_a_replica_that_hangs():
    """What waits there goes elsewhere, without a connection that breaks."""
    never = threading.Event()
    hangs, there = Replica([never, *TOKENS]), Replica()
    with routed(hangs, there, policy=First()) as router, ThreadPoolExecutor() as pool:
        waiting = pool.submit(lambda: "".join(router.stream()))
        until(lambda: served(hangs) == [1])
        hangs.health = None
        assert waiting.result(20) == "ab"
        assert "".join(router.stream()) == "ab"
        assert served(hangs, there) == [1, 2]
        hangs.health = 200
        until(lambda: router.router.backends[0].healthy)


def test_one_slow_look_is_not_held_against_it():
    go = threading.Event()
    slow = Replica([chunk(), chunk("a"), go, *TOKENS[2:]])
    with routed(slow, failures=1000) as router:
        stream = router.stream()
        assert next(stream) == "a"
        slow.health = None
        until(lambda: router.router.backends[0].silent > 1)
        assert router.router.backends[0].healthy
        slow.health = 200
        go.set()
        assert "".join(stream) == "b"


def test_a_replica_comes_back_without_its_cache():
    policy = PrefixAware(weight=0.0)
    first, second = Replica(), Replica()
    with routed(first, second, policy=policy) as router:
        text = "one long conversation " * 40
        for _ in range(4):
            assert "".join(router.stream(text)) == "ab"
        assert sorted(served(first, second)) == [0, 4]
        home, away = (first, second) if served(first)[0] else (second, first)
        known = router.router.backends[0 if home is first else 1]
        home.kill()
        assert "".join(router.stream(text)) == "ab"
        assert served(home, away) == [4, 1]
        until(lambda: known not in policy.known)
        home.start()
        until(lambda: known.healthy)
        assert "".join(router.stream(text)) == "ab"
        assert served(home, away) == [4, 2]


def test_a_client_that_leaves_is_left():
    never = threading.Event()
    for script in ([never], [chunk(), chunk("a"), never]):
        replica = Replica(script)
        with routed(replica) as router:
            with pytest.raises(httpx.ReadTimeout):
                router.http.post(POST, json={**CHAT, "stream": True}, timeout=0.3)
            until(lambda replica=replica: replica.left == 1)
            until(router.idle)
            assert router.router.backends[0].broken == 0


def test_loads_are_given_back():
    """After streams that broke, were refused, were left: the next requests are shared evenly."""
    never = threading.Event()
    scripts = [[BREAK], [chunk(), chunk("a"), BREAK], refusal(429, "queue_full"), TOKENS, [chunk(), never]]
    replicas = [Replica(lambda i, k=k: scripts[(i + k) % len(scripts)]) for k in range(2)]
    with routed(*replicas) as router, ThreadPoolExecutor(8) as pool:

        def ask(i: int) -> None:
            body = {**CHAT, "stream": i % 2 == 0, "n": i % 4 + 1, "prompt": ["a", "b"]}
            with suppress(httpx.HTTPError):
                httpx.post(router.url + POST, json=body, timeout=0.4)

        list(pool.map(ask, range(40)))
        until(router.idle)
        assert sum(served(*replicas)) >= 40


def test_events_do_not_wait_for_acknowledgements(monkeypatch):
    """On a socket as the commands make it, and to the replica."""
    replica, transports = Replica(), []
    begin = HeaderTimeout.connection_made

    def seen(self, transport) -> None:
        begin(self, transport)
        transports.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(HeaderTimeout, "connection_made", seen)
    router = Router([replica.url], RoundRobin())
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = Listener(router, port=0, log_level="critical")
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        until(lambda: server.started)
        assert httpx.post(f"http://127.0.0.1:{listening.getsockname()[1]}{POST}", json=CHAT).status_code == 200
        (kept, *_) = router.backends[0]._all
        to = kept.writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        server.should_exit = server.force_exit = True
        thread.join()
    assert all([*transports, to])
    replica.kill()


def test_what_others_send_there_counts():
    busy, idle = Replica(), Replica()
    busy.load = 9
    with routed(busy, idle, policy=LeastLoaded()) as router:
        until(lambda: router.router.backends[0].load == 9)
        for _ in range(5):
            assert "".join(router.stream()) == "ab"
        assert served(busy, idle) == [0, 5]


def test_a_session_keeps_its_replica():
    replicas = [Replica() for _ in range(3)]
    with routed(*replicas, policy=SessionHash()) as router:
        for i in range(5):
            assert "".join(router.stream(str(i), extra_headers={"x-session-id": "s"})) == "ab"
        assert sorted(served(*replicas)) == [0, 0, 5]
        for i in range(5):
            assert "".join(router.stream(str(i), user="s")) == "ab"
        assert sorted(served(*replicas)) == [0, 0, 10]


ODD = [b'{"messages": 5, "n": "x", "prompt": [[]]}', b'{"messages": [5, null], "n": -1, "user": {"a": 1}}']


@pytest.mark.parametrize("body", [b"{", b"5", b"[" * 100_000, b"\xff", b"", b"x" * 200_000, *ODD])
def test_bodies_that_are_wrong_are_the_replicas_matter(body):
    replica = Replica(refusal(400, "wrong"))
    with routed(replica, policy=PrefixAware()) as router:
        answer = router.http.post(POST, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400
        assert replica.requests[0][2] == body


def test_a_body_that_is_too_large():
    with routed(Replica(), max_body_bytes=1000) as router:
        answer = router.http.post(POST, content=b"x" * 1001)
        assert (answer.status_code, answer.json()["error"]["message"]) == (413, "body: expected at most 1000 bytes")


def test_its_own_addresses():
    replica = Replica()
    with routed(replica) as router:
        assert "".join(router.stream()) == "ab"
        assert router.http.get("/health").status_code == 200
        text = router.http.get("/metrics").text
        assert f'minillm_router_requests_total{{replica="{replica.url}"}} 1\n' in text
        assert f'minillm_router_in_flight{{replica="{replica.url}"}} 0\n' in text
        replica.kill()
        until(lambda: router.http.get("/health").status_code == 503)
        assert router.http.post(POST, json=CHAT).status_code == 503


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "https://a:1", "http://a:1/v1", "http://u:p@a:1", "http://a:x"])
def test_addresses_that_are_none(url):
    with pytest.raises(ValueError, match=r"replica: expected http://host:port"):
        Router([url], RoundRobin())


def test_no_replica_or_one_twice():
    with pytest.raises(ValueError, match="each once"):
        Router([], RoundRobin())
    with pytest.raises(ValueError, match="each once"):
        Router(["http://a:1", "http://a:1/"], RoundRobin())


def test_the_command():
    """`minillm route`: keys are asked for and passed on; it listens on this machine alone and ends when it is told."""
    replica = Replica()
    command = [sys.executable, "-m", "minillm.cli", "route", "--replica", replica.url, "--port", "0", "--api-key", "k"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            found = next(found for line in process.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
            assert httpx.post(found[0] + POST, json=CHAT).status_code == 401
            assert httpx.get(found[0] + "/metrics").status_code == 401
            answer = httpx.post(found[0] + POST, json={**CHAT, "stream": True}, headers={"authorization": "Bearer k"})
            assert answer.text.endswith("data: [DONE]\n\n")
            assert replica.requests[0][1]["authorization"] == "Bearer k"
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == -signal.SIGTERM
        finally:
            process.kill()
    replica.kill()


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--replica", "x"], "http://host:port"), (["--replica", "http://a:1", "--policy", "best"], "round_robin")],
)
def test_errors_are_one_line(options, says):
    result = CliRunner().invoke(app, ["route", *options])
    assert result.exit_code == 1
    assert says in result.output
    assert "Traceback" not in result.output


def test_a_router_needs_no_torch():
    """A proxy shall start at once, and be small."""
    code = "import sys, minillm.cli, minillm.server.router, minillm.server.listener; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
