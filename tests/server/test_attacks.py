"""What has felled other servers: each is refused by name or bounded, and afterwards the server is alive and empty.

Sources: CVE-2026-34756 (n), -73559 (prompts), -116181 (ids out of range), -55574 and -105757 (patterns, schemas),
-115911 (templates), CVE-2025-48956 (headers), CVE-2026-24779 (images by address), CVE-2024-37032 (names as paths).
"""

import gzip
import json
import socket
from contextlib import suppress
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minillm.constrained import ConstraintTooLarge
from minillm.server import bodies, listener, protocol
from minillm.server.errors import of_generation
from minillm.server.service import ServerConfig

from .conftest import MODEL, until

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
PROMPT = {"prompt": "hello", "max_tokens": 2}


def refused(answer, status: int = 400) -> dict:
    """The error of an answer, in OpenAI's form."""
    assert answer.status_code == status, answer.text[:300]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(error["message"]) < 1000
    return error


@pytest.mark.parametrize(
    ("param", "changes"),
    [
        ("n", {"n": 10**6}), ("n", {"n": 0}), ("n", {"n": True}), ("n", {"n": "2"}), ("n", {"n": 65}),
        ("prompt", {"prompt": ["x"] * 100_000}), ("prompt", {"prompt": []}), ("prompt", {"prompt": [[]]}),
        ("prompt", {"prompt": ["x", 1]}), ("prompt", {"prompt": [[1], "x"]}), ("prompt", {"prompt": {"x": 1}}),
        ("prompt", {"prompt": None}), ("prompt", {"prompt": [10**9]}), ("prompt", {"prompt": [-1]}),
        ("prompt", {"prompt": [1.5]}), ("prompt", {"prompt": [True]}), ("prompt", {"prompt": [5] * 128}),
        ("prompt", {"prompt": "hello " * 500}), ("prompt", {"prompt": "x" * 1_000_000}), ("prompt", {"prompt": ""}),
        ("stop_token_ids", {"stop_token_ids": [10**9]}), ("stop_token_ids", {"stop_token_ids": [-1]}),
        ("stop_token_ids", {"stop_token_ids": list(range(257))}), ("stop_token_ids", {"stop_token_ids": ["a"]}),
        ("logit_bias", {"logit_bias": {"100000000": 1}}), ("logit_bias", {"logit_bias": {"-1": 1}}),
        ("logit_bias", {"logit_bias": {"5": 101}}), ("logit_bias", {"logit_bias": {"5": "1"}}),
        ("logit_bias", {"logit_bias": {"x": 1}}), ("logit_bias", {"logit_bias": {"9" * 5000: 1}}),
        ("logit_bias", {"logit_bias": {str(i): 1 for i in range(10_000)}}), ("logit_bias", {"logit_bias": [1]}),
        ("logprobs", {"logprobs": -1}), ("logprobs", {"logprobs": 10**9}), ("logprobs", {"logprobs": True}),
        ("stop", {"stop": ["x"] * 17}), ("stop", {"stop": "x" * 1000}), ("stop", {"stop": [""]}), ("stop", {"stop": 1}),
        ("temperature", {"temperature": -1}), ("temperature", {"temperature": 10**400}), ("top_p", {"top_p": 0}),
        ("max_tokens", {"max_tokens": 0}), ("max_tokens", {"max_tokens": -1}), ("max_tokens", {"max_tokens": 1.5}),
        ("seed", {"seed": 2**64}), ("priority", {"priority": 2**40}), ("timeout", {"timeout": -1}),
        ("stream", {"stream": "yes"}), ("stream_options", {"stream_options": {"include_usage": True}}),
        ("include_usage", {"stream": True, "stream_options": {"include_usage": 1}}),
        ("model", {"model": 5}), ("best_of", {"best_of": 3}), ("suffix", {"suffix": "x"}),
        ("guided_json", {"guided_json": {}}), ("guided_grammar", {"guided_grammar": "x"}),
        ("max_token", {"max_token": 1}), ("messages", HELLO),
    ],
)  # fmt: skip
def test_a_field_is_refused_by_name(server, param, changes):
    assert refused(server.http.post(COMPLETION, json=PROMPT | changes))["param"] == param


@pytest.mark.parametrize(
    ("param", "changes"),
    [
        ("messages", {"messages": []}), ("messages", {"messages": "hello"}), ("messages", {"messages": [5]}),
        ("messages", {"messages": [{"content": "x"}]}), ("messages", {"messages": [{"role": "user"}]}),
        ("messages", {"messages": [{"role": "user", "content": "x"}] * 5000}),
        ("messages", {"messages": [{"role": "user", "content": "hello" * 200}]}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x:/"}}]}]}),
        ("messages", {"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}),
        ("tools", {"tools": [{"type": "function"}]}), ("tool_choice", {"tool_choice": "auto"}),
        ("chat_template", {"chat_template": "{% for i in range(10**9) %}x{% endfor %}"}),
        (None, {"chat_template_kwargs": {"tokenize": True}}), (None, {"chat_template_kwargs": {"messages": True}}),
        (None, {"chat_template_kwargs": {"x": "y" * 10}}),
        ("top_logprobs", {"top_logprobs": 2}), ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("logprobs", {"logprobs": 2}), ("response_format", {"response_format": {"type": "xml"}}),
        ("response_format", {"response_format": {"type": "json_schema"}}),
        ("response_format", {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}),
        ("grammar", {"structured_outputs": {"grammar": "x"}}), ("structured_outputs", {"structured_outputs": {}}),
        ("prompt", PROMPT),
    ],
)  # fmt: skip
def test_a_field_of_a_conversation_is_refused_by_name(server, param, changes):
    assert refused(server.http.post(CHAT, json=HELLO | changes))["param"] == param


def test_what_asks_for_nothing_is_no_error(server):
    idle = {"tools": [], "tool_choice": "none", "user": "me", "metadata": {"a": "b"}, "store": False, "seed": None}
    assert server.http.post(CHAT, json=HELLO | idle).status_code == 200


@pytest.mark.parametrize(
    "asked",
    [
        {"regex": "(a+)+b" * 50}, {"regex": "((a{1,1000}){1,1000}){1,1000}"}, {"regex": "(" * 60_000},
        {"json": "[" * 60_000}, {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
        {"json": {"type": "nonsense"}}, {"json": {"allOf": [{"type": "string"}, {"type": "number"}]}},
        {"choice": ["x" * 10**6]}, {"choice": []}, {"json": {"pattern": "(?<=x)y", "type": "string"}},
    ],
    ids=lambda asked: f"{asked!r:.40}",
)  # fmt: skip
def test_forms_that_take_too_much_are_refused_or_served(server, asked):
    answer = server.http.post(CHAT, json=HELLO | {"structured_outputs": asked})
    assert answer.status_code == 200 or refused(answer)


def test_many_forms_leave_nothing_behind(server):
    for i in range(100):
        body = HELLO | {"structured_outputs": {"regex": f"a{{{i + 1}}}"}}
        assert server.http.post(CHAT, json=body).status_code == 200
    assert len(server.llm.engine.constraints.found) <= 64


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"5", b"null", b'"x"', b"\xff\xfe", b'{"prompt": NaN}', b'{"prompt": "x", "n": Infinity}',
        b"[" * 100_000, b'{"a":' * 100_000, b'{"logit_bias":' + b'{"a":' * 70 + b"1" + b"}" * 71,
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", b'{"prompt": "\\ud800", "max_tokens": 1, "x": "\\udfff"}',
    ],
    ids=lambda body: f"{body!r:.30}",
)  # fmt: skip
def test_bodies_that_are_none(server, body):
    refused(server.http.post(COMPLETION, content=body, headers={"content-type": "application/json"}))


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("prompt", PROMPT | {"prompt": ["x"] * 50_000}), ("messages", {"messages": HELLO["messages"] * 5000}),
        ("stop_token_ids", PROMPT | {"stop_token_ids": [*range(50_000)]}),
        ("logit_bias", PROMPT | {"logit_bias": {str(i): 1 for i in range(20_000)}}), (None, [0] * 50_000),
        (None, HELLO | {"structured_outputs": {"json": {"enum": [*range(70_000)]}}}), (None, None),
    ],
)  # fmt: skip
def test_no_thread_looks_at_a_large_body_that_wants_too_much(server, monkeypatch, param, body):
    def looked(body):
        raise AssertionError("the server's own process has read it")

    monkeypatch.setattr("minillm.server.app.parse", looked)
    data = b"[" * 100_000 if body is None else json.dumps(body).encode()
    answer = server.http.post(COMPLETION, content=data, headers={"content-type": "application/json"})
    assert refused(answer)["param"] == param


def test_large_bodies_that_are_right(server):
    """Even if the process that reads them dies."""
    padded = json.dumps(PROMPT).encode() + b" " * 100_000
    for _ in range(2):
        answer = server.http.post(COMPLETION, content=padded, headers={"content-type": "application/json"})
        assert answer.status_code == 200
        server.service.bodies.process.kill()
        server.service.bodies.process.wait()
    ids = {"prompt": [[5, 6, 7]] * 60 + [[5] * 200_000], "max_tokens": 1}  # no prompt has so many, which is said later
    assert "at most 127 tokens" in refused(server.http.post(COMPLETION, json=ids))["message"]


def test_how_deep_a_body_may_be(server):
    schema = {"type": "string"}
    for _ in range(bodies.DEPTH // 2):
        schema = {"anyOf": [schema, {"type": "null"}]}
    deep = {"structured_outputs": {"json": schema}}
    assert "nested" in refused(server.http.post(CHAT, json=HELLO | deep))["message"]
    deep["structured_outputs"]["json"] = schema["anyOf"][0]["anyOf"][0]["anyOf"][0]
    assert server.http.post(CHAT, json=HELLO | deep).status_code == 200


def test_errors_of_constraints_are_the_clients():
    assert of_generation(ConstraintTooLarge("regex: too large")).status == 400
    assert of_generation(OSError("/secret")).status == 500
    assert "secret" not in of_generation(OSError("/secret")).message


def test_half_a_character_as_a_name(server):
    headers = {"content-type": "application/json"}
    answer = server.http.post(COMPLETION, content=b'{"prompt": "x", "\\ud800": 1}', headers=headers)
    assert refused(answer)["param"] == "?"


def test_half_a_character(server):
    """Lone surrogates, which no text has, come back as something that is text."""
    body = b'{"prompt": "\\ud800", "max_tokens": 1, "echo": true}'
    answer = server.http.post(COMPLETION, content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400)
    answer.json()


def test_kinds_and_sizes_of_bodies(server):
    plain = json.dumps(PROMPT).encode()
    refused(server.http.post(COMPLETION, content=plain, headers={"content-type": "text/plain"}), 415)
    bomb = {"content-type": "application/json", "content-encoding": "gzip"}
    refused(server.http.post(COMPLETION, content=gzip.compress(b" " * 10**7), headers=bomb), 415)
    refused(server.http.post("/nothing", json={}), 404)
    refused(server.http.get(COMPLETION), 405)
    refused(server.http.post("/detokenize", json={"tokens": [2**70]}))
    refused(server.http.post("/detokenize", json={"tokens": [-1]}))
    refused(server.http.post("/tokenize", json={}))
    assert server.llm.engine.metrics.num_failed == 0


def test_a_body_without_end(start):
    server = start(ServerConfig(MODEL, max_body_bytes=10_000))
    refused(server.http.post(COMPLETION, json={"prompt": "x" * 10_000}), 413)

    def endless():
        for _ in range(1000):
            yield b"x" * 1000

    sent = server.http.post(COMPLETION, content=endless(), headers={"content-type": "application/json"})
    refused(sent, 413)


def test_a_body_that_never_comes(start):
    server = start(ServerConfig(MODEL, body_seconds=0.2))
    head = "POST /v1/completions HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: 99\n\n"
    with server.socket(head, b"{") as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_heads_that_never_end(start, monkeypatch):
    monkeypatch.setattr(listener, "HEADER_SECONDS", 0.2)
    server = start()
    with server.socket("GET /health HTTP/1.1\nX: y") as connection:
        assert connection.recv(100) == b""
    with server.socket("GET /health HTTP/1.1\nHost: x\n\n") as connection:  # one that is answered, then half of one
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        assert connection.recv(100) == b""
    with server.socket("GET /health HTTP/1.1\nX: " + "y" * 100_000) as connection:
        assert connection.recv(100)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 431")


def test_a_key(start):
    server = start(ServerConfig(MODEL, api_keys=("secret", "other")))
    assert server.client.models.list().data[0].id == MODEL
    for path in ("/v1/models", "/metrics", "/version", "/nothing", "/v1/../v1/models", "//v1/models"):
        for header in ({}, {"authorization": "Bearer secre"}, {"authorization": "Basic secret"}):
            answer = server.http.get(path, headers=header)
            assert refused(answer, 401)["type"] == "authentication_error"
            assert answer.headers["www-authenticate"] == "Bearer"
    assert server.http.get("/metrics", headers={"authorization": "bearer other"}).status_code == 200
    assert server.http.get("/health").status_code == 200


def test_a_reader_that_never_reads(start):
    """It holds nobody back, and is left after a while."""
    server = start(ServerConfig(MODEL, send_seconds=0.2))
    body = json.dumps(
        PROMPT | {"n": 64, "max_tokens": 120, "stream": True, "logprobs": 20, "ignore_eos": True}
    ).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, port = server.url.removeprefix("http://").split(":")
    connection.connect((host, int(port)))
    head = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
    connection.sendall("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)
    assert server.http.post(COMPLETION, json=PROMPT).status_code == 200
    until(lambda: not server.server.server_state.tasks)
    until(server.idle)
    connection.close()


def test_many_who_hang_up(server):
    """At any point of their request, while others are served."""
    body = json.dumps(PROMPT | {"max_tokens": 100, "ignore_eos": True, "stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: {}\n\n"
    for i in range(200):
        with server.socket(head.format(len(body)), body[: i % 2 * i or len(body)]) as connection:
            if i % 3 == 0:
                connection.settimeout(0.01)
                with suppress(TimeoutError):
                    connection.recv(100)
        if i % 20 == 0:
            assert server.http.post(COMPLETION, json=PROMPT).status_code in (200, 429)


def test_nothing_of_a_client_becomes_a_label(server):
    for name in ("a", "b\nc", "/v1/x\ninjected 1"):
        server.http.post(COMPLETION, json=PROMPT | {"model": name})
        server.http.get(f"/v1/models/{quote(name)}")
    before = server.http.get("/metrics").text
    server.http.post(COMPLETION, json=PROMPT | {"model": "another"})
    after = server.http.get("/metrics").text
    assert [line.split()[0] for line in before.splitlines()] == [line.split()[0] for line in after.splitlines()]
    assert "injected" not in after


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = sorted(protocol.CHAT | protocol.COMPLETION | set(protocol.NOTHING) | {"guided_json", "x"})


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    path=st.sampled_from([CHAT, COMPLETION, "/tokenize", "/detokenize"]),
    base=st.sampled_from([HELLO, PROMPT, {"tokens": [1]}, {}]),
    changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3),
)
def test_no_body_is_the_servers_fault(server, path, base, changes):
    body = {"max_tokens": 2, **base, **changes}
    answer = server.http.post(path, json=body)
    assert answer.status_code in (200, 400, 404)
    if answer.status_code != 200:
        refused(answer, answer.status_code)
