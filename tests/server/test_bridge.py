"""The engine's thread: what it hands over, and what happens when a step or a request fails."""

import asyncio
import threading

import pytest

from minillm import LLM, SamplingParams
from minillm.server.bridge import FAILURES, EngineThread, Piece, Prompt, Stream
from minillm.server.errors import Stopped

from .conftest import until

PARAMS = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


@pytest.fixture
def llm(tiny_path) -> LLM:
    return LLM(tiny_path, device="cpu", max_num_seqs=4)


@pytest.fixture
def thread(llm):
    thread = EngineThread(llm.engine)
    yield thread
    thread.stop()
    assert not thread.stepper.thread.is_alive()
    assert not llm.engine.has_unfinished()
    assert llm.engine.pool.num_used == 0
    assert not thread.stepper.owners


def prompt(ids=(5, 6, 7), params=PARAMS, **more) -> Prompt:
    return Prompt(list(ids), params, **more)


async def collect(thread: EngineThread, *prompts: Prompt) -> dict[int, Piece]:
    stream, found = await thread.submit(prompts), {}
    async for index, piece in stream:
        found.setdefault(index, Piece()).add(piece)
    return found


def test_pieces_are_the_whole(thread, tiny_llm):
    params = SamplingParams(temperature=1, seed=3, n=2, max_tokens=10, logprobs=1, ignore_eos=True)
    found = asyncio.run(collect(thread, prompt((5, 6), params), prompt((7, 8), params)))
    wanted = tiny_llm.generate([[5, 6], [7, 8]], params, use_tqdm=False)
    for index, output in enumerate([one for each in wanted for one in each.outputs]):
        piece = found[index]
        assert (piece.token_ids, piece.text, piece.finish_reason) == (output.token_ids, output.text, "length")
        assert [list(d) for d in piece.logprobs] == [list(d) for d in output.logprobs]


def test_a_reader_who_comes_late_gets_one_piece(thread, llm):
    async def late():
        stream = await thread.submit([prompt()])
        while llm.engine.has_unfinished():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        return [piece async for _, piece in stream]

    [piece] = asyncio.run(late())
    assert len(piece.token_ids) == 10
    assert piece.finish_reason == "length"


def test_all_prompts_or_none(thread, llm):
    with pytest.raises(ValueError, match="prompt_token_ids"):
        asyncio.run(collect(thread, prompt(), prompt((10**6,))))
    assert not llm.engine.has_unfinished()
    assert len(asyncio.run(collect(thread, prompt()))[0].token_ids) == 10


def test_who_leaves_before_the_engine_knows(thread, llm):
    async def leave():
        task = asyncio.create_task(thread.submit([prompt()]))
        await asyncio.sleep(0)  # it lies in the inbox
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    until(lambda: not llm.engine.has_unfinished() and not thread.stepper.owners)


def test_who_leaves_while_a_constraint_is_prepared(thread, llm, monkeypatch):
    """The abort is there before the request."""
    go, prepare = threading.Event(), llm.engine.prepare
    monkeypatch.setattr(llm.engine, "prepare", lambda *arguments: go.wait(30) and prepare(*arguments))
    params = SamplingParams(max_tokens=10, structured_outputs={"regex": "a{100}"})

    async def leave():
        task = asyncio.create_task(thread.submit([prompt(params=params)]))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        until(thread.stepper.inbox.empty)
        go.set()
        await asyncio.to_thread(thread.stepper.pool.shutdown)

    asyncio.run(leave())
    until(thread.stepper.inbox.empty)
    assert llm.engine.metrics.num_requests == 0


def test_abort_more_than_once_and_after_the_end(thread):
    async def twice():
        stream = await thread.submit([prompt()])
        async for _ in stream:
            thread.abort(stream)
            thread.abort(stream)
            break
        assert len((await collect(thread, prompt()))[0].token_ids) == 10
        thread.abort(stream)

    asyncio.run(twice())


def test_a_step_that_raises_ends_what_runs_and_nothing_else(thread, llm, monkeypatch):
    def broken():
        monkeypatch.undo()
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(llm.engine, "_step", broken)
    [piece] = asyncio.run(collect(thread, prompt())).values()
    assert (piece.finish_reason, str(piece.error)) == ("error", "the device is gone")
    assert thread.alive
    assert len(asyncio.run(collect(thread, prompt()))[0].token_ids) == 10


def test_an_engine_that_only_fails_is_given_up(thread, llm, monkeypatch):
    def broken():
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(llm.engine, "_step", broken)
    for _ in range(FAILURES):
        assert asyncio.run(collect(thread, prompt()))[0].finish_reason == "error"
    until(lambda: not thread.stepper.thread.is_alive())
    with pytest.raises(Stopped):
        asyncio.run(collect(thread, prompt()))


def test_what_runs_at_the_end_is_told(thread):
    async def stopped():
        stream = await thread.submit([prompt((5,), SamplingParams(max_tokens=120, ignore_eos=True))])
        await asyncio.to_thread(thread.stop)
        return [piece async for _, piece in stream][-1]

    piece = asyncio.run(stopped())
    assert piece.finish_reason == "length" or isinstance(piece.error, Stopped)
    with pytest.raises(Stopped):
        asyncio.run(collect(thread, prompt()))


def test_a_loop_that_is_closed_stops_nobody(thread, llm):
    loop = asyncio.new_event_loop()
    loop.run_until_complete(thread.submit([prompt()]))
    loop.close()
    assert len(asyncio.run(collect(thread, prompt()))[0].token_ids) == 10


def test_a_stream_knows_its_end():
    async def play():
        stream = Stream(2)
        stream.put(0, Piece([1], "a"))
        stream.put(0, Piece([2], "b", finish_reason="stop"))
        stream.put(1, Piece([3], "c", finish_reason="length"))
        return [(index, piece.text, piece.finish_reason) async for index, piece in stream]

    assert asyncio.run(play()) == [(0, "ab", "stop"), (1, "c", "length")]
