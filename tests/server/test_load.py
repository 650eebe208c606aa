"""Load on a server: who is sent when, what is counted, and which latencies are told."""

import asyncio
import itertools
import json
import random
from contextlib import asynccontextmanager

import pytest
from typer.testing import CliRunner

from minillm.cli import app
from minillm.server import load
from minillm.server.load import Job, Limits, Seen, Target
from minillm.server.service import ServerConfig

from .conftest import MODEL


def seen(at: float, *texts: float, error: str | None = None, **more) -> Seen:
    return Seen(at, at, list(texts), texts[-1] if texts else at, len(texts), error=error, **more)


class TestSummary:
    def test_latencies_count_from_the_intended_time(self):
        """A server that stands still from 0 to 9, asked once a second: who came meanwhile waited."""
        stalled = [seen(float(t), 9.0 + t / 10) for t in range(10)]
        for one in stalled:
            one.sent = one.texts[0] - 0.1  # whenever a busy client got to it
        found = load.summary(stalled, 10.0, Limits())
        assert found["TTFT, s"]["p50"] == pytest.approx(9 - 0.9 * 4.5)
        assert found["latency, s"]["p50"] == found["TTFT, s"]["p50"]
        assert found["sent late, s"]["p99"] > 8

    def test_goodput_needs_both_limits_and_an_answer(self):
        limits = Limits(ttft=1.0, per_token=0.1)
        runs = [seen(0, 0.5, 0.6), seen(0, 1.5, 1.6), seen(0, 0.5, 0.7), seen(0, error="429"), seen(0, 1.0, 1.05)]
        found = load.summary(runs, 5.0, limits)
        assert (found["requests"], found["finished"], found["errors"]) == (5, 4, {"429": 1})
        assert (found["goodput, requests/s"], found["within both limits"]) == (2 / 5, 2 / 5)
        assert (found["requests/s"], found["output tokens/s"]) == (4 / 5, 8 / 5)

    def test_a_queue_that_is_left_at_the_end_counts(self):
        assert load.summary([seen(0, 1.0), seen(4.0, 19.0, 20.0)], 5.0, Limits())["output tokens/s"] == 3 / 20

    def test_deliveries_of_several_tokens(self):
        one = seen(0, 1.0, 2.0, 4.0)
        one.tokens = 31
        found = load.summary([one], 5.0, Limits())
        assert found["per token, s"]["p50"] == pytest.approx(0.1)
        assert found["ITL, s"]["p50"] == 1.5

    def test_what_the_server_found_in_its_cache(self):
        runs = [seen(0, 1.0, prompt_tokens=30, cached=16), seen(0, 1.0, prompt_tokens=10)]
        found = load.summary(runs, 1.0, Limits())
        assert (found["prompt tokens"], found["cached"]) == (20, 0.4)

    def test_nothing(self):
        found = load.summary([seen(0, error="closed")], 1.0, Limits())
        assert (found["TTFT, s"], found["cached"], found["finished"]) == (None, 0, 0)
        assert "closed: 1" in load.line({"loop": "open", "rate": 1.0} | found)


def test_users_are_independent_of_each_other():
    times = load.poisson(50, 200, random.Random(0))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert len(times) == pytest.approx(10_000, rel=0.04)
    assert sum([(g - mean) ** 2 for g in gaps]) / len(gaps) == pytest.approx(mean**2, rel=0.1)  # exponential
    assert times == sorted(times)
    assert times[-1] < 200


def test_drawn_prompts():
    def draw(*arguments) -> list[str]:
        return [*itertools.islice(load.words(*arguments, random.Random(0)), 40)]

    assert len(set(draw(20, 0, 0))) == 40
    assert {len(text.split()) for text in draw(20, 5, 0)} == {20}
    assert len({text.split()[0] for text in draw(20, 0, 0)}) > 10  # nothing in common, not even a block
    assert len({tuple(text.split()[:5]) for text in draw(20, 5, 0)}) == 1
    assert len({tuple(text.split()[5:7]) for text in draw(20, 5, 0)}) > 10
    assert len(set(draw(20, 0, 3))) == 3


def test_prompts_of_a_file(tmp_path):
    file = tmp_path / "prompts"
    said = [{"role": "user", "content": "b"}]
    file.write_text(f'a é\n\n{{"prompt": "c", "max_tokens": 3}}\n{json.dumps({"messages": said})}\n', encoding="utf-8")
    assert load.read_prompts(file, 7) == [Job("a é", 7), Job("c", 3), Job(said, 7)]
    drawn = [*itertools.islice(load.prompts_of(file, 7, 0, 0, 0)(random.Random(0)), 6)]
    assert {job.max_tokens for job in drawn[:3]} == {3, 7}
    assert drawn[:3] == drawn[3:]  # all of them, and again
    for text, says in (("", "expected prompts"), ('a\n{"x": 1}', ":2: expected JSON"), ("{", ":1: expected JSON")):
        file.write_text(text)
        with pytest.raises(ValueError, match=says):
            load.read_prompts(file, 7)


# ---- against a server that does as it is told ------------------------------------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
USAGE = {"completion_tokens": 5, "prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}
PARTS = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}, {"choices": [{"delta": {"content": "é"}}]}]
PARTS += [{"choices": [{"text": "b"}]}, {"choices": [{"delta": {}}]}, {"choices": [], "usage": USAGE}]
EVENTS = [f"data: {json.dumps(part, ensure_ascii=False)}\n\n".encode() for part in PARTS]
DONE = b"data: [DONE]\n\n"


@asynccontextmanager
async def answering(*pieces: bytes, go: asyncio.Event | None = None):
    """A server that sends these bytes, one after another -> (its target, how many have asked)."""
    asked = []

    async def serve(reader, writer):
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        if go:
            await go.wait()
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield Target(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", seconds=20), asked


def sent_to(*pieces: bytes) -> Seen:
    async def play() -> Seen:
        async with answering(*pieces) as (target, _):
            return (await load.open_loop(target, [Job("x", 5)]))[0]

    return asyncio.run(play())


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_an_answer_in_pieces_of_any_size(size):
    whole = HEAD + b"".join(EVENTS) + DONE
    found = sent_to(*[whole[i : i + size] for i in range(0, len(whole), size)])
    assert (found.error, found.tokens, found.prompt_tokens, found.cached, len(found.texts)) == (None, 5, 9, 4, 2)
    assert found.at <= found.sent <= found.texts[0] <= found.texts[1] <= found.end


@pytest.mark.parametrize(
    ("error", "pieces"),
    [
        ("429", [b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\n\r\n{}"]), ("500", [b"HTTP/1.0 500 x\r\n\r\n"]),
        ("closed", []), ("closed", [b"\r\n"]), ("incomplete", [HEAD]), ("incomplete", [HEAD, *EVENTS]),
        ("empty", [HEAD, EVENTS[0], DONE]), ("JSONDecodeError", [HEAD, b"data: {\n\n"]),
        ("timeout", [HEAD, b'data: {"error": {"code": "timeout"}}\n\n', DONE]),
        ("error", [HEAD, b'data: {"error": {"message": "x"}}\n\n', DONE]),
    ],
)  # fmt: skip
def test_errors_have_names(error, pieces):
    assert sent_to(*pieces).error == error


def test_tokens_without_text_are_an_answer():
    found = sent_to(HEAD, EVENTS[0], EVENTS[-1], DONE)
    assert (found.error, found.tokens, len(found.texts)) == (None, 5, 1)


def test_nobody_listens():
    [found] = asyncio.run(load.open_loop(Target("http://127.0.0.1:1"), [Job("x", 5)]))
    assert found.error == "ConnectionRefusedError"


def test_who_waits_too_long_gives_up():
    async def play() -> list[Seen]:
        async with answering(go=asyncio.Event()) as (target, _):
            return await load.open_loop(Target(target.url, seconds=0.05), [Job("x", 5)])

    assert asyncio.run(play())[0].error == "timeout"


def test_an_open_loop_asks_whatever_became_of_the_others_and_a_closed_one_waits():
    async def play() -> None:
        go = asyncio.Event()
        async with answering(HEAD, *EVENTS, DONE, go=go) as (target, asked):
            task = asyncio.create_task(load.open_loop(target, [Job("x", 5, at / 100) for at in range(9)]))
            while len(asked) < 9:
                await asyncio.sleep(0.001)
            go.set()
            assert [one.error for one in await task] == [None] * 9
            go.clear()
            asked.clear()
            task = asyncio.create_task(load.closed_loop(target, itertools.repeat(Job("x", 5), 9), 3, 60.0))
            while len(asked) < 3:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
            assert len(asked) == 3
            go.set()
            assert len(await task) == len(asked) == 9

    asyncio.run(play())


def test_what_is_asked_for():
    job, chat, plain = Job("x", 5), Target("http://h:1/base/", "m", "k"), Target("http://h:1", chat=False, natural=True)
    head, _, body = chat.request(job).partition(b"\r\n\r\n")
    assert head.split(b"\r\n")[0] == b"POST /base/v1/chat/completions HTTP/1.0"
    assert b"Authorization: Bearer k" in head
    given = json.loads(body)
    assert given["messages"] == [{"role": "user", "content": "x"}]
    assert (given["model"], given["ignore_eos"], given["max_tokens"]) == ("m", True, 5)
    given = json.loads(plain.request(Job([1, 2], 5)).partition(b"\r\n\r\n")[2])
    assert given["prompt"] == [1, 2]
    assert not {"ignore_eos", "model", "cache_salt"} & set(given)
    cold = Target("http://h:1", cold=True)
    salts = {json.loads(cold.request(job).partition(b"\r\n\r\n")[2])["cache_salt"] for _ in range(5)}
    assert len(salts) == 5


# ---- against ours ----------------------------------------------------------------------------------------------------


def test_the_command(server, tmp_path):
    out = tmp_path / "found.json"
    command = ["bench", "serve", server.url, "--rates", "40", "--clients", "3", "--seconds", "0.3", "--words", "8"]
    options = ["--max-tokens", "5", "--out", str(out), "--seed", "1"]
    done = CliRunner().invoke(app, [*command, *options])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert (found["asked"]["model"], found["asked"]["seed"]) == (MODEL, 1)
    for run in found["runs"]:
        assert (run["requests"], run["errors"]) == (run["finished"], {})
        assert run["finished"] > 0
        assert run["output tokens/s"] * run["seconds"] == pytest.approx(5 * run["finished"])
        assert run["within both limits"] <= 1
    assert [run["loop"] for run in found["runs"]] == ["open", "closed"]
    assert len(done.output.splitlines()) == 3
    assert CliRunner().invoke(app, [*command, *options]).exit_code == 0
    assert json.loads(out.read_text())["runs"][0]["requests"] == found["runs"][0]["requests"]  # the same times


@pytest.mark.parametrize(
    ("more", "warm"), [([], False), (["--distinct", "1"], True), (["--distinct", "1", "--cold"], False)]
)
def test_a_warm_cache_is_told(start, tmp_path, more, warm):
    server, out = start(max_num_seqs=4), tmp_path / "found.json"
    command = ["bench", "serve", server.url, "--clients", "1", "--seconds", "0.3", "--words", "12", "--completions"]
    assert CliRunner().invoke(app, [*command, "--max-tokens", "2", "--out", str(out), *more]).exit_code == 0
    [run] = json.loads(out.read_text())["runs"]
    assert run["finished"] > 3
    assert (run["cached"] > 0.3) == warm


def test_who_is_refused_is_counted(start):
    server = start(ServerConfig(MODEL, max_queued_requests=2))

    async def play() -> list[Seen]:
        with server.held():
            tasks = [asyncio.create_task(load.open_loop(Target(server.url, MODEL), [Job("x", 5)])) for _ in range(8)]
            while sum([task.done() for task in tasks]) < 6:
                await asyncio.sleep(0.001)
        return [one for task in tasks for one in await task]

    found = load.summary(asyncio.run(play()), 1.0, Limits())
    assert (found["finished"], found["errors"]) == (2, {"429": 6})
