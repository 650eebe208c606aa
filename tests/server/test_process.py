"""The engine in a process of its own answers as the one in a thread, and takes nobody with it when it dies."""

import json
import os
import re
import signal

import openai
import pytest

from minillm import SamplingParams
from minillm.server.bridge import Piece, Prompt
from minillm.server.process import EngineProcess, _read_event, _read_prompt, _written, _written_event
from minillm.server.service import ServerConfig

from .conftest import MODEL, Running, until

ASKED = {"prompt": [[5, 6], [7, 8, 9]], "max_tokens": 8, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def far(tiny_path, adapter_path):
    """A server whose engine is a process."""
    adapters = {"pirate": adapter_path}
    engine = EngineProcess(tiny_path, adapters, device="cpu", max_loras=1)
    running = Running(engine, ServerConfig(MODEL, adapters))
    yield running
    running.close()
    assert not engine._process.is_alive()
    assert not engine._streams


def counted(far: Running, name: str) -> float:
    return float(re.search(rf"^{name} (\S+)$", far.http.get("/metrics").text, re.MULTILINE)[1])


def test_answers_are_the_same(far, tiny_path, server):
    for changes in (
        {}, {"logprobs": 2, "echo": True}, {"logit_bias": {"104": 5.5}}, {"model": "pirate"}, {"n": 2, "seed": 1},
        {"structured_outputs": {"choice": ["yes", "no"]}, "ignore_eos": False}, {"stop": "e", "min_tokens": 2},
    ):  # fmt: skip
        found, wanted = (s.http.post("/v1/completions", json=ASKED | changes).json() for s in (far, server))
        assert found["choices"] == wanted["choices"], changes
    stream = far.client.completions.create(
        model=MODEL, prompt="hello", max_tokens=8, stream=True, extra_body={"ignore_eos": True}
    )
    assert [c.choices[0].finish_reason for c in stream][-1] == "length"


def test_what_the_engine_refuses_is_said(far):
    for param, changes in (
        ("stop_token_ids", {"stop_token_ids": [10**6]}),
        ("lookbehind", {"structured_outputs": {"regex": "(?<=a)b"}, "ignore_eos": False}),
    ):
        answer = far.http.post("/v1/completions", json=ASKED | changes)
        assert answer.status_code == 400
        assert param in answer.text.replace("(?<", "lookbehind")


def test_who_leaves_is_aborted(far):
    with far.http.stream("POST", "/v1/completions", json=ASKED | {"stream": True, "max_tokens": 120}) as answer:
        next(answer.iter_lines())
    until(lambda: counted(far, "minillm_aborted_total") + counted(far, "minillm_finished_total") == 2)
    assert counted(far, "minillm_requests_running") == 0


def test_an_engine_that_dies(far):
    """Its streams are told, who comes is refused, and health says so."""
    with far.http.stream("POST", "/v1/completions", json=ASKED | {"stream": True, "max_tokens": 120}) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.kill(far.service.engine._process.pid, signal.SIGKILL)
        *_, last, done = [line for line in lines if line]
    assert done == "data: [DONE]"
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    until(lambda: far.http.get("/health").status_code == 503)
    with pytest.raises(openai.InternalServerError):
        far.client.completions.create(model=MODEL, prompt="hello")
    assert far.http.get("/metrics").status_code in (200, 503)


def test_a_model_that_cannot_be_loaded(tiny_path, tmp_path):
    with pytest.raises(ValueError, match="max_model_len"):
        EngineProcess(tiny_path, device="cpu", max_model_len=10**6)
    with pytest.raises(RuntimeError, match="nowhere"):
        EngineProcess(tiny_path, {"a": str(tmp_path / "nowhere")}, device="cpu", max_loras=1)


def test_what_goes_through_the_pipe_is_the_same_behind_it():
    params = SamplingParams(
        stop=["a"], stop_token_ids=[3], logit_bias={5: -1.5}, logprobs=2, seed=-5, top_k=3, min_tokens=2
    )
    for one in (params, SamplingParams(structured_outputs={"json": {"type": "object"}})):
        prompt = Prompt([1, 2], one, None, -3, "salt")
        assert _read_prompt(json.loads(json.dumps(_written(prompt)))) == prompt
    piece = Piece([1], "é", [{1: -0.5, 7: float("-inf")}], [None, {2: -1.0}], 3, "error", ValueError("x: no"))
    *event, read = _read_event(json.loads(json.dumps(_written_event(7, 1, piece))))
    assert event == [7, 1]
    assert (str(read.error), type(read.error)) == ("x: no", ValueError)
    read.error = piece.error
    assert read == piece
