"""Requests that end early, from within and from without: Ctrl-C, aborts, streams left alone, several threads."""

import sys
import threading
import time

import pytest

from minillm import LLM, SamplingParams
from minillm.engine.request import Request
from minillm.llm import RequestOutput

LONG = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture
def llm(tiny_llm):
    """Idle before, and idle after."""
    tiny_llm.engine.reset()
    yield tiny_llm
    assert not tiny_llm.engine.has_unfinished()
    assert tiny_llm.engine.pool.num_used == 0


def alone(llm: LLM, prompt: list[int], params: SamplingParams) -> str:
    return llm.generate([prompt], params, use_tqdm=False)[0].text


# ---- streams -------------------------------------------------------------------------------------------------------


def test_a_stream_begins_with_its_first_piece(llm):
    """Until then it has an empty output, and the engine knows nothing of it."""
    stream = llm.stream([5, 6], SHORT)
    assert (stream.output.text, stream.output.token_ids, stream.output.finish_reason) == ("", [], None)
    assert stream.output.prompt_token_ids == [5, 6]
    assert stream.output.metrics.total_time == 0
    assert not llm.engine.has_unfinished()
    stream.close()
    assert list(stream) == []
    assert not llm.engine.has_unfinished()


def test_a_stream_that_nobody_wants_any_more_is_ended(llm):
    stream = llm.stream([5, 6], LONG)
    next(stream)
    assert llm.engine.has_unfinished()
    del stream
    assert not llm.engine.has_unfinished()


# ---- Ctrl-C --------------------------------------------------------------------------------------------------------


def interrupts(engine, where, after: int):
    """Ctrl-C in the call `after` of a function."""
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) == after:
            raise KeyboardInterrupt
        return where(*args, **kwargs)

    return interrupted


def test_ctrl_c_between_steps_ends_the_own_requests_alone(llm, monkeypatch):
    expected = alone(llm, [7, 8, 9], LONG)
    stream = llm.stream([7, 8, 9], LONG)
    text = next(stream)
    monkeypatch.setattr(llm.engine, "step", interrupts(llm.engine, llm.engine.step, 3))
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2], [3, 4]], LONG, use_tqdm=False)
    monkeypatch.undo()
    assert len(llm.engine.requests) == 1
    assert text + "".join(stream) == expected
    assert stream.output.finish_reason == "length"


@pytest.mark.parametrize("where", ["forward", "draw"])
def test_ctrl_c_within_a_step_ends_all(llm, monkeypatch, where):
    """What is half done is not known: other streams end too, say so, and the engine goes on."""
    stream = llm.stream([7, 8, 9], LONG)
    first = next(stream)
    monkeypatch.setattr(llm.engine.runner, where, interrupts(llm.engine, getattr(llm.engine.runner, where), 3))
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2], [3, 4]], LONG, use_tqdm=False)
    monkeypatch.undo()
    assert not llm.engine.has_unfinished()
    rest = first + "".join(stream)
    assert stream.output.finish_reason == "abort"
    assert stream.output.text == rest
    expected = alone(llm, [7, 8, 9], LONG)
    assert expected.startswith(rest.removesuffix("\ufffd"))  # it may have ended inside a character
    assert "".join(llm.stream([7, 8, 9], LONG)) == expected


def test_an_old_stream_does_not_end_a_new_one(llm, monkeypatch):
    """After a reset, names may come again; a handle ends what it was made for."""
    old = llm.stream([5, 6], LONG)
    next(old)
    monkeypatch.setattr(llm.engine.runner, "forward", interrupts(llm.engine, llm.engine.runner.forward, 1))
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2]], SHORT, use_tqdm=False)
    monkeypatch.undo()
    new = llm.stream([9, 9], LONG)
    next(new)
    old.close()
    "".join(new)
    assert (new.output.finish_reason, len(new.output.token_ids)) == ("length", 40)


# ---- threads -------------------------------------------------------------------------------------------------------


@pytest.fixture
def restless():
    """Threads change over a hundred times as often, so that they meet."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(interval)


def run_all(*jobs) -> None:
    """Each in a thread of its own; what one raises is raised."""
    errors: list[BaseException] = []

    def guarded(job):
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "hangs"
    if errors:
        raise errors[0]


@pytest.mark.usefixtures("restless")
def test_two_threads_generate_and_a_third_streams(llm):
    prompts = [[5, 6], [7, 8, 9], [5, 6, 7], [1]]
    params = [SHORT, SamplingParams(seed=3, max_tokens=9, ignore_eos=True)]
    expected = {(tuple(p), q): alone(llm, p, q) for p in prompts for q in params}
    wrong, done = [], []

    def generating(first: int) -> None:
        for i in range(first, first + 20):
            two = [prompts[i % 4], prompts[(i + 1) % 4]]
            outs = llm.generate(two, params[i % 2], use_tqdm=False)
            wrong.extend(o.text for o, p in zip(outs, two, strict=True) if o.text != expected[tuple(p), params[i % 2]])
            done.append(None)

    def streaming() -> None:
        for i in range(20):
            text = "".join(llm.stream(prompts[i % 4], params[i % 2]))
            wrong.extend([text] if text != expected[tuple(prompts[i % 4]), params[i % 2]] else [])
            done.append(None)

    run_all(lambda: generating(0), lambda: generating(1), streaming)
    assert len(done) == 60
    assert wrong == []


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize("way", ["the request", "its id", "reset"])
def test_another_thread_ends_it(llm, way):
    """A Stop button: `generate` comes back, and says that its request was aborted."""
    llm.engine.metrics.reset()
    forever = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)
    ended = []

    def generating() -> None:
        while not any(out.finish_reason == "abort" for out in ended):
            ended.extend(llm.generate([[5, 6]], forever, use_tqdm=False))

    def aborting() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            found = [r for r in list(llm.engine.requests.values()) if 3 < len(r.output_token_ids) < 60]
            if not found:
                time.sleep(0.001)
            elif way == "reset":
                llm.engine.reset()
                return
            elif llm.engine.abort(found[0] if way == "the request" else found[0].request_id):
                return
        raise AssertionError("never seen running")

    run_all(generating, aborting)
    assert ended[-1].finish_reason == "abort"
    assert 3 < len(ended[-1].token_ids) < 120
    assert alone(llm, [5, 6], SHORT)


# ---- what several completions measure ------------------------------------------------------------------------------


def test_the_first_token_of_several_completions_is_the_earliest(llm):
    """Wherever it stands, and though one has none yet."""
    requests: list[Request] = llm.engine.add([5, 6], SamplingParams(n=3, max_tokens=2))
    for request, first, last in zip(requests, (1007.0, 0.0, 1003.0), (1008.0, 0.0, 1011.0), strict=True):
        request.arrival_time, request.first_token_time, request.last_token_time = 1000.0, first, last
        request.output_token_ids = [1, 2] if first else []
    output = RequestOutput(None, [5, 6])
    output.update(requests)
    m = output.metrics
    assert (m.time_to_first_token, m.total_time) == (3.0, 11.0)
    assert (m.num_prompt_tokens, m.num_generated_tokens, m.tokens_per_second) == (2, 4, 4 / 11)
    assert len(output.outputs) == 3
    llm.engine.reset()
