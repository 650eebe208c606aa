"""`minillm serve`, as a process."""

import json
import re
import signal
import socket
import subprocess
import sys

import httpx
import psutil
import pytest
from typer.testing import CliRunner

from minillm.cli import app

from .conftest import MODEL

SERVE = [sys.executable, "-m", "minillm.cli", "serve"]


@pytest.fixture
def process(tiny_path, adapter_path):
    """A server process, and its address."""
    options = [
        "--port",
        "0",
        "--served-model-name",
        MODEL,
        "--lora-modules",
        f"pirate={adapter_path}",
        "--device",
        "cpu",
        "--speculative-config",
        '{"method": "ngram", "num_speculative_tokens": 3, "adaptive": false}',
    ]
    with subprocess.Popen([*SERVE, str(tiny_path), *options], stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if found := re.search(r"http://[\d.]+:\d+", line):
                break
        else:
            raise AssertionError("it ended")
        yield process, found[0]
        process.kill()


def test_it_serves_on_this_machine_alone_until_it_is_told_to_end(process):
    server, address = process
    listening = [c for c in psutil.Process(server.pid).net_connections() if c.status == psutil.CONN_LISTEN]
    assert [c.laddr.ip for c in listening] == ["127.0.0.1"]
    assert address == f"http://127.0.0.1:{listening[0].laddr.port}"
    assert [m["id"] for m in httpx.get(f"{address}/v1/models").json()["data"]] == [MODEL, "pirate"]
    body = {"prompt": "hello", "max_tokens": 100, "ignore_eos": True, "stream": True, "model": "pirate"}
    with httpx.stream("POST", f"{address}/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.send_signal(signal.SIGTERM)
        *_, last, done = [line for line in lines if line]
    assert done == "data: [DONE]"
    assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert server.wait(30) == -signal.SIGTERM


def test_speculation_is_asked_for_as_json(process):
    _, address = process
    body = {"prompt": [5, 6, 7] * 5, "max_tokens": 20, "ignore_eos": True, "temperature": 0}
    assert httpx.post(f"{address}/v1/completions", json=body).status_code == 200
    counted = dict(
        re.findall(r"^vllm:spec_decode_num_(\w+)_total{.*} (\d+)$", httpx.get(f"{address}/metrics").text, re.M)
    )
    assert set(counted) == {"drafts", "draft_tokens", "accepted_tokens"}
    assert int(counted["draft_tokens"]) >= int(counted["drafts"]) > 0


def test_a_port_that_is_taken(tiny_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["serve", str(tiny_path), "--port", str(port), "--device", "cpu"])
    assert result.exit_code == 1
    assert f"port: cannot listen on 127.0.0.1:{port}" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--lora-modules", "nothing"], "expected NAME=FOLDER"),
        (["--lora-modules", "a=/no/where"], "/no/where"),
        (["--max-model-len", "100000"], "max_model_len"),
        (["--speculative-config", "ngram"], "--speculative-config: expected JSON, got 'ngram'"),
        (["--speculative-config", '{"method": "guess"}'], "method"),
    ],
)
def test_errors_are_one_line(tiny_path, options, says):
    result = CliRunner().invoke(app, ["serve", str(tiny_path), *options])
    assert result.exit_code == 1
    assert says in result.output
    assert "Traceback" not in result.output
