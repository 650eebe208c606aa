"""Who may come in, who must wait, and that every place comes back."""

import threading

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.server.admission import Admission, Bucket
from minillm.server.errors import ApiError
from minillm.server.service import ServerConfig

from .conftest import MODEL, until

PROMPT = {"prompt": "hello", "max_tokens": 2}


class TestBucket:
    def test_it_drips_full(self):
        now = [0.0]
        bucket = Bucket(60, lambda: now[0])
        assert bucket.wait(50) == 0
        assert bucket.wait(20) == 10  # 10 are there, one more comes each second
        now[0] = 10
        assert bucket.wait(20) == 0
        assert bucket.wait(1) == 1
        now[0] = 1e6
        assert bucket.wait(61) == 1  # never more than a minute's worth
        assert bucket.wait(60) == 0

    def test_what_was_not_spent_flows_back(self):
        bucket = Bucket(60, lambda: 0.0)
        bucket.wait(60)
        bucket.refund(20)
        assert bucket.wait(20) == 0
        bucket.refund(1000)
        assert bucket.level == 60


def refusal(call, *arguments) -> ApiError | None:
    """Why somebody is not let in, if so."""
    try:
        call(*arguments)
    except ApiError as error:
        return error
    return None


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 60), st.lists(st.integers(0, 4)), st.booleans())))
def test_every_place_comes_back(asked):
    admission, tickets = Admission(10, 100), []
    for choices, tokens, leave, close in asked:
        before = admission.requests
        error = refusal(lambda n=choices: tickets.append(admission.enter(n)))
        assert (error is not None) == (before + choices > 10)
        if error is None:
            error = refusal(tickets[-1].sized, tokens)
            if error is not None or close:
                tickets[-1].close()
            for choice in leave:
                tickets[-1].leave(choice)
        assert error is None or (error.status == 429 and int(error.headers["Retry-After"]) >= 1)
        assert 0 <= admission.requests <= 10
        assert admission.requests == sum(len(t.waiting) for t in tickets)
    for ticket in tickets:
        ticket.close()
    assert (admission.requests, admission.tokens) == (0, 0)


def in_background(*calls) -> list[threading.Thread]:
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    return threads


def test_a_full_queue(start):
    server, found = start(ServerConfig(MODEL, max_queued_requests=3)), []
    with server.held():
        waiting = in_background(*[lambda: found.append(server.client.completions.create(model=MODEL, **PROMPT))] * 3)
        until(lambda: server.service.admission.requests == 3)
        answer = server.http.post("/v1/completions", json=PROMPT)
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) >= 1
        with pytest.raises(openai.RateLimitError):
            server.client.completions.create(model=MODEL, **PROMPT)
    for thread in waiting:
        thread.join(20)
    assert len(found) == 3
    until(server.idle)
    assert server.http.post("/v1/completions", json=PROMPT).status_code == 200
    assert server.http.post("/v1/completions", json=PROMPT | {"n": 4}).status_code == 400  # would never fit


def test_a_queue_full_of_tokens(start):
    server = start(ServerConfig(MODEL, max_queued_tokens=60))
    long = {"prompt": [5] * 50, "max_tokens": 2}
    with server.held():
        [waiting] = in_background(lambda: server.http.post("/v1/completions", json=long))
        until(lambda: server.service.admission.tokens == 50)
        assert server.http.post("/v1/completions", json=long).status_code == 429
        [other] = in_background(lambda: server.http.post("/v1/completions", json=PROMPT))
        until(lambda: server.service.admission.tokens == 51)
    waiting.join(20)
    other.join(20)
    assert server.http.post("/v1/completions", json={"prompt": [5] * 100, "max_tokens": 2}).status_code == 200


def test_a_keys_tokens_of_a_minute(start):
    config = ServerConfig(MODEL, api_keys=("a", "b"), tokens_per_minute=30)
    server, asked = start(config), {"prompt": [5] * 10, "max_tokens": 10, "ignore_eos": True}

    def status(key, **changes):
        headers = {"authorization": f"Bearer {key}"}
        return server.http.post("/v1/completions", json=asked | changes, headers=headers).status_code

    early = {"logit_bias": {"104": 100}, "stop_token_ids": [104], "ignore_eos": False}
    assert status("a", max_tokens=20, **early) == 200  # 19 flow back
    server.service.buckets["a"].refund(11)
    assert [status("a"), status("a"), status("b"), status("b", n=5)] == [200, 429, 200, 400]
    assert status("a", prompt=[5], max_tokens=8) == 200  # what is left


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline(server, stream):
    with server.held():
        answer = server.http.post("/v1/completions", json=PROMPT | {"timeout": 0.05, "stream": stream})
    if stream:
        assert '"code":"timeout"' in answer.text
        assert answer.text.endswith("data: [DONE]\n\n")
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    until(server.idle)


def test_who_matters_more_goes_first(start):
    """One at a time: the first runs, then the third, which a smaller number puts before the second."""
    server, done = start(max_num_seqs=1), []

    def ask(name, priority):
        server.http.post("/v1/completions", json={"prompt": [5, 6], "max_tokens": 5, "priority": priority})
        done.append(name)

    threads = []
    with server.held():
        for number, (name, priority) in enumerate([("first", -2), ("second", 0), ("third", -1)], 1):
            threads += in_background(lambda name=name, priority=priority: ask(name, priority))
            until(lambda number=number: server.service.admission.requests == number)
    for thread in threads:
        thread.join(20)
    assert done == ["first", "third", "second"]


def test_who_runs_is_finished_and_who_comes_is_refused(start):
    """What a signal does."""
    server, found = start(), []
    with server.held():
        asked = {"prompt": "hello", "max_tokens": 8, "ignore_eos": True}
        [waiting] = in_background(lambda: found.append(server.http.post("/v1/completions", json=asked)))
        until(server.llm.engine.has_unfinished)
        server.server.handle_exit(15, None)
        until(lambda: not server.server.servers[0].is_serving())
        with pytest.raises(openai.APIConnectionError):
            server.client.with_options(timeout=5).completions.create(model=MODEL, **PROMPT)
    waiting.join(20)
    assert found[0].json()["usage"]["completion_tokens"] == 8
    server.thread.join(20)
    assert not server.thread.is_alive()
    assert not server.service.engine.stepper.thread.is_alive()


def test_a_connection_that_stays_open_is_told(start):
    server = start()
    server.service.admission.closed = True
    answer = server.http.post("/v1/completions", json=PROMPT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
    assert server.http.get("/health").status_code == 503
