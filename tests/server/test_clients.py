"""What OpenAI's Python client does with a server, against the engine alone."""

import asyncio
import json
import os
import shutil
import subprocess
from pathlib import Path

import openai
import pytest

from minillm import SamplingParams

from .conftest import MODEL, until

HELLO = [{"role": "user", "content": "hello"}]
MORE = {"ignore_eos": True}
GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 12, "extra_body": MORE}


@pytest.fixture
def expected(tiny_llm):
    """What the engine gives alone."""

    def of(prompt, **params):
        tiny_llm.engine.reset()
        params = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, **params}
        return tiny_llm.generate([prompt], SamplingParams(**params), use_tqdm=False)[0]

    return of


def test_a_conversation(client, expected, tiny_llm):
    prompt = tiny_llm.chat_prompt(HELLO)
    found, wanted = client.chat.completions.create(messages=HELLO, **GREEDY), expected(prompt)
    [choice] = found.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (wanted.text, "assistant", "length")
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(prompt), 12)
    assert found.usage.total_tokens == len(prompt) + 12
    assert (found.object, found.model, choice.logprobs) == ("chat.completion", MODEL, None)
    assert client.chat.completions.create(messages=HELLO, **GREEDY).id != found.id


def test_a_conversation_as_a_stream(client, expected, tiny_llm):
    """The role first and once, the reason last and once, one id, no usage unasked."""
    chunks = list(client.chat.completions.create(messages=HELLO, stream=True, **GREEDY))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(d.content or "" for d in deltas) == expected(tiny_llm.chat_prompt(HELLO)).text
    assert [d.role for d in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_comes_last_and_alone(client):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = client.chat.completions.create(messages=HELLO, **options, **GREEDY)
    assert last.choices == []
    assert last.usage.completion_tokens == 12
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_usage_in_each_chunk(client):
    """vLLM's, which load generators ask for."""
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    chunks = list(client.chat.completions.create(messages=HELLO, **options, **GREEDY))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1], chunks[-1].choices) == (0, 12, [])
    del options["stream_options"]["include_usage"]
    assert all(c.usage is None for c in client.chat.completions.create(messages=HELLO, **options, **GREEDY))


def test_what_goes_over_the_wire(server):
    body = {"prompt": "hello", "max_tokens": 3, "stream": True, **MORE}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events)


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_in_all_forms(client, expected, tiny_llm, stream):
    ids = tiny_llm.tokenizer.encode("the quick fox")
    for prompt, each in (
        ("the quick fox", [ids]), (["hello", "the quick fox"], ["hello", ids]), (ids, [ids]),
        ([ids, [5, 6]], [ids, [5, 6]]),
    ):  # fmt: skip
        found = client.completions.create(prompt=prompt, stream=stream, **GREEDY)
        texts = dict.fromkeys(range(len(each)), "")
        for part in found if stream else [found]:
            for choice in part.choices:
                texts[choice.index] += choice.text
        assert list(texts.values()) == [expected(one).text for one in each]


def test_several_choices_are_seeded_one_by_one(client, expected):
    params = {"temperature": 1.0, "seed": 7, "n": 3}
    found = client.completions.create(model=MODEL, prompt="hello", max_tokens=12, extra_body=MORE, **params)
    assert [c.text for c in found.choices] == [o.text for o in expected("hello", **params).outputs]
    assert [c.index for c in found.choices] == [0, 1, 2]
    assert found.usage.completion_tokens == 36
    again = client.completions.create(
        model=MODEL, prompt="hello", max_tokens=12, extra_body=MORE, stream=True, **params
    )
    texts = ["", "", ""]
    for chunk in again:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [c.text for c in found.choices]


@pytest.mark.parametrize("as_list", [False, True])
def test_stop_strings_across_tokens(client, expected, as_list):
    text = expected("hello").text
    stop = text[3:6]  # wherever the borders of its tokens are
    found = client.completions.create(prompt="hello", stop=["never", stop] if as_list else stop, **GREEDY)
    assert found.choices[0].text == text[: text.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    chunks = client.completions.create(prompt="hello", stop=stop, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in chunks) == found.choices[0].text


def test_log_probabilities_of_a_conversation(client, expected, tiny_llm):
    wanted = expected(tiny_llm.chat_prompt(HELLO), logprobs=3)
    asked = {"messages": HELLO, "logprobs": True, "top_logprobs": 3, **GREEDY}
    content = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert len(content) == 12
    for entry, token, known in zip(content, wanted.token_ids, wanted.logprobs, strict=True):
        assert entry.logprob == pytest.approx(known[token], abs=1e-4)
        known_token = token < tiny_llm.tokenizer.vocab_size  # the model has more rows
        assert bytes(entry.bytes) == (tiny_llm.tokenizer.token_bytes(token) if known_token else b"")
        best = sorted(known.values(), reverse=True)[:3]
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(best, abs=1e-4)
    streamed = client.chat.completions.create(stream=True, **asked)
    parts = [c.choices[0].logprobs.content for c in streamed if c.choices[0].logprobs]
    assert [e.token for part in parts for e in part] == [e.token for e in content]
    only = client.chat.completions.create(messages=HELLO, logprobs=True, **GREEDY).choices[0].logprobs.content
    assert all(entry.top_logprobs == [] for entry in only)


def test_echo_with_log_probabilities(client, expected, tiny_llm):
    prompt = "the quick fox"
    ids, wanted = tiny_llm.tokenizer.encode(prompt), expected(prompt, logprobs=0, prompt_logprobs=0)
    [choice] = client.completions.create(prompt=prompt, echo=True, logprobs=0, **GREEDY).choices
    assert choice.text == prompt + wanted.text
    found = choice.logprobs
    assert found.token_logprobs[0] is None
    tokens = ids + wanted.token_ids
    known = [d[t] for d, t in zip(wanted.prompt_logprobs[1:] + wanted.logprobs, tokens[1:], strict=True)]
    assert found.token_logprobs[1:] == pytest.approx(known, abs=1e-4)
    assert found.text_offset == [sum(len(t) for t in found.tokens[:i]) for i in range(len(tokens))]
    assert all(len(best) == 1 for best in found.top_logprobs[1:])


@pytest.mark.parametrize("prompt", ["hello", ["hello", "the quick fox"]])
def test_only_the_prompt(client, prompt):
    """What evaluations ask for."""
    found = client.completions.create(model=MODEL, prompt=prompt, echo=True, max_tokens=0, logprobs=0)
    assert [c.text for c in found.choices] == ([prompt] if isinstance(prompt, str) else prompt)
    assert found.usage.completion_tokens == 0
    assert all(len(c.logprobs.tokens) == len(c.logprobs.token_logprobs) for c in found.choices)


def test_biases(client):
    found = client.completions.create(prompt="hello", logit_bias={"104": 100}, logprobs=0, **GREEDY)
    assert len(set(found.choices[0].logprobs.tokens)) == 1
    stopped = {"model": MODEL, "temperature": 0, "extra_body": {"stop_token_ids": [104]}}
    ended = client.completions.create(prompt="hello", logit_bias={"104": 100}, **stopped)
    assert (ended.choices[0].finish_reason, ended.usage.completion_tokens) == ("stop", 1)


def test_forms(client):
    """By any of the four ways to ask."""
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 22]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    plain = {"model": MODEL, "messages": HELLO, "max_tokens": 60, "temperature": 1, "seed": 1}
    found = client.chat.completions.create(response_format=form, **plain)
    assert json.loads(found.choices[0].message.content)["a"] in (1, 22)
    for asked, wanted in ({"choice": ["yes", "no"]}, ("yes", "no")), ({"regex": "ab?"}, ("a", "ab")):
        found = client.chat.completions.create(extra_body={"structured_outputs": asked}, **plain)
        assert found.choices[0].message.content in wanted
    found = client.chat.completions.create(response_format={"type": "json_object"}, **plain)
    assert found.choices[0].message.content.lstrip().startswith("{")
    assert client.chat.completions.create(response_format={"type": "text"}, **plain).choices


def test_models_and_adapters(client, expected):
    assert [model.id for model in client.models.list()] == [MODEL, "pirate"]
    assert client.models.retrieve("pirate").parent == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("../x")
    own = client.completions.create(prompt="hello", **GREEDY)
    adapted = client.completions.create(prompt="hello", **{**GREEDY, "model": "pirate"})
    assert own.choices[0].text == expected("hello").text != adapted.choices[0].text
    assert adapted.model == "pirate"
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="gpt-4", prompt="hello")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")


def test_a_prefix_that_was_there(client):
    prompt = list(range(5, 55))
    first, second = (client.completions.create(prompt=prompt, **GREEDY).usage for _ in range(2))
    assert second.prompt_tokens_details.cached_tokens == 48 > first.prompt_tokens_details.cached_tokens
    both = client.completions.create(prompt=prompt, n=2, **GREEDY).usage
    assert (both.prompt_tokens, both.prompt_tokens_details.cached_tokens) == (50, 48)
    salted = client.completions.create(prompt=prompt, **GREEDY | {"extra_body": {"cache_salt": "mine", **MORE}})
    assert salted.usage.prompt_tokens_details.cached_tokens == 0


def test_many_at_once(server, expected, tiny_llm):
    """More than run at once, streamed and not: everybody gets what they would get alone."""
    prompts = [[5 + i, 6, 7 + i] for i in range(32)]
    wanted = [expected(prompt).text for prompt in prompts]

    async def one(client, index):
        found = await client.completions.create(prompt=prompts[index], stream=index % 2 == 0, **GREEDY)
        if index % 2:
            return found.choices[0].text
        return "".join([chunk.choices[0].text async for chunk in found])

    async def everybody():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            return await asyncio.gather(*[one(client, i) for i in range(32)])

    assert asyncio.run(everybody()) == wanted


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_is_aborted(server, stream):
    body = {"prompt": "hello", "max_tokens": 100, "stream": stream, **MORE}
    aborted = server.llm.engine.metrics.num_aborted
    data = json.dumps(body).encode()
    with server.held() as waits:
        head = (
            f"POST /v1/completions HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: {len(data)}\n\n"
        )
        connection = server.socket(head, data)
        until(waits.is_set)
        connection.close()
        until(lambda: not server.service.engine.stepper.inbox.empty())  # the abort waits for the step that is held
    until(server.idle)
    assert server.llm.engine.metrics.num_aborted == aborted + 1


def test_who_closes_a_stream_is_aborted(server, client):
    stream = client.completions.create(prompt="hello", stream=True, **GREEDY | {"max_tokens": 110})
    next(stream)
    stream.close()
    until(server.idle)


def test_tokens_and_text(server, tiny_llm):
    tokens = tiny_llm.tokenizer.encode("the quick fox")
    found = server.http.post("/tokenize", json={"prompt": "the quick fox"}).json()
    assert found == {"count": len(tokens), "max_model_len": 128, "tokens": tokens}
    assert server.http.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": "the quick fox"}
    chat = server.http.post("/tokenize", json={"messages": HELLO}).json()
    assert chat["tokens"] == tiny_llm.chat_prompt(HELLO)


def test_metrics_have_vllms_names(server, client):
    client.completions.create(prompt="hello", **GREEDY)
    text = server.http.get("/metrics").text
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        assert f'{name}{{model_name="tiny"}} 0\n' in text
    assert 'vllm:time_to_first_token_seconds_bucket{model_name="tiny",le="+Inf"} ' in text
    generated = server.llm.engine.metrics.num_generated_tokens
    assert f'vllm:generation_tokens_total{{model_name="tiny"}} {generated}\n' in text
    from prometheus_client.parser import text_string_to_metric_families

    assert len(list(text_string_to_metric_families(text))) > 20


# ---- what llama.cpp's (tools/server/tests) and vLLM's (tests/entrypoints/openai) tests look at ----------------------


def test_how_long_a_conversation_may_become(client, tiny_llm):
    """By either name; without one, to the end of the context."""
    plain = {"model": MODEL, "messages": HELLO, "temperature": 0, "extra_body": MORE}
    for limits, wanted in (({"max_completion_tokens": 5}, 5), ({"max_tokens": 4, "max_completion_tokens": 5}, 5)):
        assert client.chat.completions.create(**plain, **limits).usage.completion_tokens == wanted
    found = client.chat.completions.create(**plain)
    assert (found.usage.total_tokens, found.choices[0].finish_reason) == (128, "length")
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=MODEL, prompt=[5] * 128)
    assert error.value.code == "context_length_exceeded"


def test_messages_of_all_kinds(client, expected, tiny_llm):
    """Parts instead of text, a role of one's own, fields of one's own, turns."""
    messages = [{"role": "system", "content": "a"}, *HELLO, {"role": "assistant", "content": "b"}]
    wanted = expected(tiny_llm.chat_prompt([*messages, {"role": "critic", "content": "the fox"}])).text
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "fox"}]
    critic = {"role": "critic", "content": parts, "weight": 1}
    messages = [message | {"name": "me", "refusal": None} for message in messages]
    found = client.chat.completions.create(messages=[*messages, critic], **GREEDY)
    assert found.choices[0].message.content == wanted


def test_choices_of_a_conversation_as_a_stream(client):
    asked = {"model": MODEL, "messages": HELLO, "n": 3, "seed": 5, "max_tokens": 6, "extra_body": MORE}
    whole = client.chat.completions.create(**asked)
    texts, roles, reasons = ["", "", ""], [], []
    for chunk in client.chat.completions.create(stream=True, **asked):
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles += [choice.index] * (choice.delta.role is not None)
        reasons += [choice.index] * (choice.finish_reason == "length")
    assert texts == [c.message.content for c in whole.choices]
    assert sorted(roles) == sorted(reasons) == [0, 1, 2]


def test_seeds(client):
    def draw(**seed) -> str:
        asked = {"model": MODEL, "prompt": "hello", "max_tokens": 16, "temperature": 1, "extra_body": MORE}
        return client.completions.create(**asked, **seed).choices[0].text

    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert draw(seed=-(2**63)) == draw(seed=-(2**63))
    assert draw() != draw()


def test_characters_of_several_bytes(client, expected):
    text = "é漢🙂 ṅ"
    found = client.completions.create(prompt=text, echo=True, **GREEDY).choices[0].text
    assert found == text + expected(text).text
    chunks = client.completions.create(prompt=text, echo=True, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in chunks) == found


def test_log_probabilities_as_a_stream(client):
    """Of a completion: lists that continue, offsets that count from the text's begin."""
    asked = {"prompt": "the quick fox", "logprobs": 2, **GREEDY}
    for echo in (False, True):
        whole = client.completions.create(echo=echo, **asked).choices[0].logprobs
        chunks = [c.choices[0].logprobs for c in client.completions.create(echo=echo, stream=True, **asked)]
        for name in ("text_offset", "tokens", "token_logprobs", "top_logprobs"):
            parts = [value for chunk in chunks if chunk for value in getattr(chunk, name)]
            wanted = getattr(whole, name)
            if name == "token_logprobs":
                wanted = [value if value is None else pytest.approx(value, abs=1e-4) for value in wanted]
            elif name == "top_logprobs":
                parts, wanted = ([best and sorted(best) for best in all_] for all_ in (parts, wanted))
            assert parts == wanted


def test_tokens_that_may_not_come(client, expected):
    banned = expected("hello").token_ids[0]
    free, found = (
        client.completions.create(prompt="hello", logit_bias=bias, logprobs=0, **GREEDY).choices[0].logprobs.tokens[0]
        for bias in ({}, {str(banned): -100})
    )
    assert free != found
    chat = client.chat.completions.create(messages=HELLO, logit_bias={"104": 100}, logprobs=True, **GREEDY)
    assert len({entry.token for entry in chat.choices[0].logprobs.content}) == 1


def test_a_stop_token_and_the_fewest_tokens(client, expected):
    tokens = expected("hello").token_ids
    last = next(i for i in range(3, 12) if tokens[i] not in tokens[:i])
    more = {"stop_token_ids": [tokens[last]], "ignore_eos": True}
    asked = {"model": MODEL, "prompt": "hello", "temperature": 0, "max_tokens": 12}
    found = client.completions.create(**asked, extra_body=more)
    assert (found.usage.completion_tokens, found.choices[0].finish_reason) == (last + 1, "stop")
    found = client.completions.create(**asked, extra_body=more | {"min_tokens": last + 2})
    assert found.usage.completion_tokens > last + 1


def test_forms_by_a_class(client):
    from enum import Enum

    import pydantic

    class Answer(Enum):
        yes = "yes"
        no = "no"

    class Reply(pydantic.BaseModel):
        answer: Answer

    asked = {"model": MODEL, "messages": HELLO, "max_tokens": 60, "seed": 1, "response_format": Reply}
    assert client.chat.completions.parse(**asked).choices[0].message.parsed.answer in Answer
    with client.chat.completions.stream(**asked) as stream:
        kinds = {event.type for event in stream}
    assert {"chunk", "content.delta", "content.done"} <= kinds


def test_what_is_not_here_is_refused_clearly(client):
    function = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    with pytest.raises(openai.BadRequestError, match="tools: not supported") as error:
        client.chat.completions.create(model=MODEL, messages=HELLO, tools=[{"type": "function", "function": function}])
    assert (error.value.param, error.value.code) == ("tools", "unsupported_parameter")
    for call in (
        lambda: client.embeddings.create(model=MODEL, input="x"), lambda: client.files.list(),
        lambda: client.responses.create(model=MODEL, input="x"), lambda: client.models.delete(MODEL),
    ):  # fmt: skip
        with pytest.raises(openai.APIStatusError) as error:
            call()
        assert error.value.status_code in (404, 405)
        assert error.value.body["type"] in ("not_found_error", "invalid_request_error")


def test_tokens_without_special_ones(server, tiny_llm):
    text = "<|end|>hello"
    for special in (True, False):
        found = server.http.post("/tokenize", json={"prompt": text, "add_special_tokens": special}).json()["tokens"]
        assert found == tiny_llm.tokenizer.encode(text, add_special_tokens=special)
        assert server.http.post("/detokenize", json={"tokens": found}).json() == {"prompt": text}
    assert server.http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_small_answers(server):
    from minillm import __version__

    assert server.http.get("/version").json() == {"version": __version__}
    assert server.http.head("/").status_code == server.http.get("/health").status_code == 200
    assert "max_model_len" in server.http.get("/v1/models").json()["data"][0]


# ---- OpenAI's client for JavaScript ----------------------------------------------------------------------------------


def test_the_client_for_javascript(server):
    """Run by `make test-clients`, which installs it and says where."""
    if not (folder := os.environ.get("OPENAI_NPM")) or not (node := shutil.which("node")):
        pytest.skip("run by `make test-clients`, where Node is")
    command = [node, str(Path(__file__).with_name("client.cjs")), f"{server.url}/v1", MODEL]
    environment = {**os.environ, "NODE_PATH": str(Path(folder).resolve() / "node_modules")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all is well"
