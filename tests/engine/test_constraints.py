"""Guaranteed output in the engine: valid, the same whatever runs beside it; who asks for too much fails alone."""

import contextlib
import copy
import functools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm.config import ModelConfig
from minillm.engine import constraints
from minillm.engine.engine import Engine
from minillm.generate import naive
from minillm.model import Transformer
from minillm.model.tokenizer import Tokenizer
from minillm.sampling import SamplingParams, StructuredOutputsParams

END = "<|end|>"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "n": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
WANTED = {
    "json": {"json": SCHEMA},
    "as text": {"json": json.dumps({"type": "array", "items": {"enum": [1, "é", None]}, "maxItems": 4})},
    "regex": {"regex": r"(ab|[0-9]{2,4}){1,3}-x?"},
    "choice": {"choice": ["yes", "no", "maybe not", "yesterday"]},
}


@functools.cache
def tokenizer() -> Tokenizer:
    text = ['{"name": "yesterday", "n": 12, "ok": true}', "maybe not yes no é abab 2024-x [1, null]"] * 3
    return Tokenizer.train(text, 300, special_tokens=[END], eos_token=END)


@functools.cache
def model() -> Transformer:
    """With more logits than there are tokens, as padded vocabularies have."""
    torch.manual_seed(0)
    config = ModelConfig(320, 32, 48, 2, 4, 2, 8, max_position_embeddings=160, eos_token_ids=())
    made = Transformer(config).eval().requires_grad_(False)
    made.reset_parameters(std=0.3)
    return made


def engine(**options) -> Engine:
    return Engine(model(), tokenizer=tokenizer(), **{"num_blocks": 80, "max_num_seqs": 6, "block_size": 4, **options})


def run(engine: Engine, todo: list[tuple[list[int], SamplingParams]]) -> list:
    requests = [engine.add(prompt, params)[0] for prompt, params in todo]
    while engine.has_unfinished():
        engine.step()
    return requests


def jobs(count: int = 16, most: int = 60) -> list[tuple[list[int], SamplingParams]]:
    kinds = [*WANTED.values(), None]
    return [
        (
            [5, 6, 7, 8, 9, 10, 11, 12, i + 13],
            SamplingParams(
                temperature=0.8, seed=i, max_tokens=most, structured_outputs=kinds[i % 5] and dict(kinds[i % 5])
            ),
        )
        for i in range(count)
    ]


def valid(text: str, wanted: StructuredOutputsParams) -> bool:
    kind, value = wanted.asked
    if kind == "json":
        pytest.importorskip("jsonschema").validate(json.loads(text), json.loads(value))
        return True
    return text in value if kind == "choice" else re.fullmatch(value, text) is not None


def test_what_ends_by_itself_is_valid():
    requests, ended = run(engine(), jobs(60)), 0
    for request in requests:
        assert request.error is None
        wanted = request.params.structured_outputs
        if wanted is not None and request.finish_reason == "stop":
            assert valid(request.text, wanted), request.text
            ended += 1
    assert ended > 30


@pytest.mark.parametrize(
    "options",
    [
        {"async_scheduling": True},
        {"num_blocks": 11},
        {"max_num_batched_tokens": 5},
        {"max_num_seqs": 1},
        {"async_scheduling": True, "num_blocks": 11},
    ],
    ids=str,
)
def test_tokens_do_not_depend_on_the_schedule(options):
    todo = jobs(most=30)
    expected = [request.output_token_ids for request in run(engine(), todo)]
    other = engine(**options)
    assert [request.output_token_ids for request in run(other, todo)] == expected
    assert (other.metrics.num_preemptions > 0) == ("num_blocks" in options)
    again = run(other, todo)  # prompts out of the prefix cache
    assert [request.output_token_ids for request in again] == expected


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"num_blocks": 30}, {"enforce_eager": True}], ids=str)
def test_on_a_gpu_masks_are_drawn_in_graphs(options):
    """Free, constrained and biased requests, with and without log probabilities: greedy tokens are those of a CPU."""
    more = [{}, {"logprobs": 2}, {"top_k": 5}, {"logprobs": 1, "repetition_penalty": 1.2}]
    todo = [
        (
            prompt,
            replace(params, temperature=0, **(more[i % 4] if params.structured_outputs else {"logit_bias": {9: 3}})),
        )
        for i, (prompt, params) in enumerate(jobs(20, most=30))
    ]
    expected = [request.output_token_ids for request in run(engine(), todo)]
    other = Engine(
        copy.deepcopy(model()).to("cuda"), tokenizer=tokenizer(), max_num_seqs=6, block_size=4,
        **{"num_blocks": 80, **options},
    )  # fmt: skip
    for _ in range(2):
        assert [request.output_token_ids for request in run(other, todo)] == expected
    alone = [job for job in todo if job[1].structured_outputs]  # a step with a bias is drawn without a graph
    expected = [request.output_token_ids for request in run(engine(), alone)]
    assert [request.output_token_ids for request in run(other, alone)] == expected
    if not options.get("enforce_eager"):
        assert any(kind.masked for _, kind in other.runner.draw_graphs)


@given(st.lists(st.lists(st.integers(-1, 11), min_size=1, max_size=4), max_size=12), st.integers(0, 11))
def test_the_device_has_the_masks_that_a_step_asks_for(steps, broken):
    """Four rows for twelve masks; -1: a sequence without one. A step that fails leaves nothing wrong behind."""
    some = [np.full(3, 7 + i, np.int32) for i in range(12)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constraints, "ROWS", 2)
        table = constraints.MaskTable(4, 70, torch.device("cpu"))
    for at, step in enumerate(steps):
        wanted = [(i, some[k]) for i, k in enumerate(step) if k >= 0]
        if at == broken:
            with pytest.MonkeyPatch.context() as patch, contextlib.suppress(MemoryError):
                patch.setattr(constraints, "to_device", lambda *_: (_ for _ in ()).throw(MemoryError))
                table.set(constraints.Masks([i for i, _ in wanted], [mask for _, mask in wanted]))
        table.set(constraints.Masks([i for i, _ in wanted], [mask for _, mask in wanted]))
        got = table.bits[table.which]
        for i in range(4):
            expected = some[step[i]] if i < len(step) and step[i] >= 0 else np.full(3, -1)
            assert got[i].tolist() == expected.tolist()


def test_masks_travel_once():
    """Eight requests that may write the same: one array of bits, sent with the first step that needs it."""
    one, sent = engine(max_num_seqs=8), []
    real = one.runner.masks._send
    one.runner.masks._send = lambda new: (sent.append(len(new)), real(new))
    params = SamplingParams(temperature=0, max_tokens=12, structured_outputs={"regex": "[0-9]{12}"})
    run(one, [([5, 6, i], params) for i in range(8)])
    run(one, [([6, 6, i], params) for i in range(8)])
    assert len(sent) <= 12
    assert max(sent) <= 2


def test_several_completions_go_their_own_way():
    params = SamplingParams(n=3, seed=1, max_tokens=40, structured_outputs={"choice": WANTED["choice"]["choice"]})
    one = engine()
    requests = one.add([5, 6, 7], params)
    while one.has_unfinished():
        one.step()
    assert all(valid(request.text, params.structured_outputs) for request in requests)
    assert len({id(request.allowed) for request in requests}) == 3


def test_a_constraint_is_compiled_once():
    one = engine()
    run(one, jobs(20, most=3))
    assert len(one.constraints.found) == 4


def test_log_probabilities_are_the_models():
    """The likeliest token is reported, though it may not come."""
    params = SamplingParams(temperature=0, logprobs=1, max_tokens=4, structured_outputs={"regex": "[0-9]{9}"})
    [request] = run(engine(), [([5, 6, 7], params)])
    plain = SamplingParams(temperature=0, logprobs=1, max_tokens=1)
    [free] = run(engine(), [([5, 6, 7], plain)])
    best = free.output_token_ids[0]
    assert best != request.output_token_ids[0]
    assert request.logprobs[0][best] == pytest.approx(free.logprobs[0][best], abs=1e-4)


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"regex": "(a{0,1000}){0,1000}"}, "regex|pattern|states|positions"),
        ({"regex": "(?=a)b"}, "look"),
        ({"json": {"type": "array", "contains": {"const": 3}}}, "contains"),
        ({"json": "{"}, "JSON"),
        ({"choice": []}, "choice"),
    ],
    ids=str,
)
def test_what_cannot_be_kept_is_refused_when_it_is_added(wanted, says):
    one = engine()
    with pytest.raises(ValueError, match=says):
        one.add([5, 6], SamplingParams(structured_outputs=wanted))
    assert not one.requests


def test_a_constraint_that_grows_too_large_ends_its_request_alone(monkeypatch):
    one, todo = engine(), jobs(6)
    requests = [one.add(prompt, params)[0] for prompt, params in todo]
    monkeypatch.setattr(
        requests[0].allowed.constraint, "advance", lambda *_: (_ for _ in ()).throw(RuntimeError("large"))
    )
    while one.has_unfinished():
        one.step()
    assert str(requests[0].error) == "large"
    same = [r for r in requests[1:] if r.allowed is None or r.allowed.constraint is not requests[0].allowed.constraint]
    expected = run(engine(), jobs(6))
    for request in same:
        assert request.output_token_ids == expected[requests.index(request)].output_token_ids


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "expected one of json, regex, choice, got none"),
        ({"regex": "a", "choice": ["b"]}, "got regex and choice"),
        ({"regex": 3}, "regex: expected"),
        ({"choice": "yes"}, "choice: expected"),
        ({"json": 3}, "json: expected"),
    ],
)
def test_parameters_that_make_no_sense(options, says):
    with pytest.raises((TypeError, ValueError), match=says):
        StructuredOutputsParams(**options)


@pytest.mark.parametrize("more", [{"min_tokens": 2}, {"ignore_eos": True}, {"logit_bias": {3: 1.0}}])
def test_what_could_forbid_the_last_token_is_refused(more):
    with pytest.raises(ValueError, match=f"no {next(iter(more))} beside it"):
        SamplingParams(structured_outputs={"regex": "a"}, **more)
    with pytest.raises(TypeError, match="expected StructuredOutputsParams"):
        SamplingParams(structured_outputs="a")


def test_an_engine_without_a_tokenizer_refuses():
    one = Engine(model(), num_blocks=20)
    with pytest.raises(ValueError, match="structured_outputs: expected none, as this engine has no tokenizer"):
        one.add([1, 2], SamplingParams(structured_outputs={"regex": "a"}))
    with pytest.raises(ValueError, match="allowed: expected none beside"):
        engine().add([1, 2], SamplingParams(structured_outputs={"regex": "a"}), allowed=lambda tokens: None)


def test_who_cannot_keep_a_form_says_so():
    with pytest.raises(ValueError, match="structured_outputs: expected none, as only the engine"):
        next(naive(model(), [1, 2], SamplingParams(structured_outputs={"regex": "a"})))


def test_parameters_can_be_keys():
    params = SamplingParams(structured_outputs={"json": dict(SCHEMA)})
    assert len({params, SamplingParams(structured_outputs={"json": dict(SCHEMA)}), SamplingParams()}) == 2
