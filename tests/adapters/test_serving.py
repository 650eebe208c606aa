"""Adapters in the engine: tokens are those of a model that has the adapter alone, whatever runs beside it."""

import os
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm import LLM
from minillm.adapters import LoraConfig, adapted, adapter_of, attach, detach, peft_format
from minillm.adapters.lora import Adapter, Pair
from minillm.adapters.serving import AdapterSlots, LoRARequest, Registry
from minillm.config import ModelConfig, SpeculativeConfig
from minillm.engine.draft_head import save_head
from minillm.engine.draft_training import new_head, own_outputs, train_head
from minillm.engine.engine import Engine
from minillm.engine.speculative import SpeculativeRunner
from minillm.generate import naive
from minillm.model import Transformer
from minillm.quant.methods import on_the_fly
from minillm.sampling import SamplingParams

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
VOCAB = 60
TARGETS = [("q_proj", "v_proj"), "all-linear", ("k_proj", "up_proj", "down_proj"), ("o_proj", "gate_proj")]


def fresh(device: str = "cpu", quantized: str | None = None) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(VOCAB, 32, 64, 2, 4, 2, 8, max_position_embeddings=96, eos_token_ids=(7,))
    model = Transformer(config).eval().requires_grad_(False)
    model.reset_parameters(std=0.3)
    model.to(device)
    return on_the_fly(model, quantized) if quantized else model


def made(seed: int, rank: int = 4, targets=None) -> Adapter:
    """One that changes tokens."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets or TARGETS[seed % 4])
    model, draw = adapted(fresh(), config), torch.Generator().manual_seed(seed)
    pairs = {
        name: Pair(torch.randn(p.a.shape, generator=draw) / 4, torch.randn(p.b.shape, generator=draw) / 4, p.scale)
        for name, p in adapter_of(model).pairs.items()
    }
    return Adapter(config, pairs)


ADAPTERS = [made(seed, rank) for seed, rank in ((0, 4), (1, 16), (2, 1), (3, 7), (4, 16))]


class Oracle:
    """What a prompt gives with an adapter alone."""

    def __init__(self, device: str = "cpu", quantized: str | None = None) -> None:
        self.model, self.found = fresh(device, quantized), {}

    def __call__(self, prompt: list[int], params: SamplingParams, adapter: Adapter | None) -> list[int]:
        key = (*prompt, repr(params), adapter and adapter.digest)
        if key not in self.found:
            if adapter is not None:
                attach(self.model, adapter)
            self.found[key] = [int(token) for token in naive(self.model, list(prompt), params)]
            if adapter is not None:
                detach(self.model)
        return self.found[key]


ORACLE = Oracle()


def jobs(count: int, seed: int = 0, most: int = 14) -> list[tuple[list[int], SamplingParams, Adapter | None]]:
    """Prompts with common beginnings, each with some adapter or none."""
    rng, start = random.Random(seed), [3, 9, 27, 21, 5, 15, 45, 17, 51, 33, 39, 57, 2, 6, 18, 54, 44, 11]
    return [
        (
            start[: rng.choice([0, 8, 18])] + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 25))],
            SamplingParams(temperature=rng.choice([0, 0, 0.9]), seed=i, max_tokens=rng.randint(1, most)),
            rng.choice([None, *ADAPTERS]),
        )
        for i in range(count)
    ]


def run(engine: Engine, todo) -> list[list[int]]:
    """All at once -> their tokens; afterwards nobody holds a slot."""
    requests = [engine.add(p, q, lora_request=None if a is None else LoRARequest("some", 1, a))[0] for p, q, a in todo]
    for _ in range(5000):
        if not engine.has_unfinished():
            break
        engine.step()
    assert not any(request.error for request in requests), [r.error for r in requests if r.error]
    assert engine.slots.held == [0] * engine.slots.count
    return [request.output_token_ids for request in requests]


@DEVICES
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_blocks": 14},
        {"max_num_batched_tokens": 7},
        {"async_scheduling": True},
        {"async_scheduling": True, "num_blocks": 14},
    ],
    ids=str,
)
def test_tokens_are_those_of_the_adapter_alone(device, options):
    """Five adapters and none in turns through two slots: chunks, shared prefixes, preemption."""
    engine = Engine(
        fresh(device),
        **{
            "num_blocks": 200,
            "block_size": 4,
            "max_num_seqs": 6,
            "max_num_batched_tokens": 40,
            "max_loras": 2,
            **options,
        },
    )
    oracle, todo = ORACLE if device == "cpu" else Oracle(device), jobs(30)
    assert run(engine, todo) == [oracle(*job) for job in todo]
    assert (engine.metrics.num_preemptions > 0) == (options.get("num_blocks") == 14)
    again = run(engine, todo)  # with a prefix cache by now
    assert again == [oracle(*job) for job in todo]


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_tokens_are_the_same_with_guesses(async_scheduling, monkeypatch):
    """Guesses of what the adapter, or another one, gives."""
    todo = jobs(16)
    expected = [ORACLE(*job) for job in todo]
    futures = [[*prompt, *tokens] for (prompt, _, _), tokens in zip(todo, expected, strict=True)]

    def guess(self, tokens, lengths):
        known = []
        for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True):
            future = next((f[length:] for f in futures if f[:length] == row[:length]), [])
            known.append((future + [1] * self.num_guesses)[: self.num_guesses])
        return torch.tensor(known, dtype=torch.int32)

    monkeypatch.setattr(SpeculativeRunner, "guess", guess)
    engine = Engine(
        fresh(), num_blocks=60, block_size=4, max_num_seqs=4, max_loras=2, async_scheduling=async_scheduling,
        speculative=SpeculativeConfig(num_speculative_tokens=3, adaptive=False),
    )  # fmt: skip
    assert run(engine, todo) == expected
    assert engine.metrics.num_accepted_tokens > 20


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_tokens_are_the_same_with_a_draft_head(async_scheduling, tmp_path):
    """One head, trained on the model alone, beside adapters."""
    todo = jobs(8)
    plain = Engine(fresh(), num_blocks=200, block_size=4, max_num_seqs=8)
    examples = own_outputs(plain, [prompt for prompt, _, _ in todo], SamplingParams(temperature=0, max_tokens=16))
    head = new_head(plain.model, examples)
    train_head(head, examples, 15, lr=6e-3, batch_size=8, progress=False)
    engine = Engine(
        fresh(), num_blocks=60, block_size=4, max_num_seqs=4, max_loras=2, async_scheduling=async_scheduling,
        speculative=SpeculativeConfig("draft_head", 3, adaptive=False, path=save_head(head, tmp_path / "head")),
    )  # fmt: skip
    for _ in range(2):  # then with a prefix cache, apart for each adapter
        assert run(engine, todo) == [ORACLE(*job) for job in todo]
    assert engine.metrics.num_draft_tokens > 50


@settings(max_examples=6)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 6), st.integers(3, 30), st.integers(10, 60))
def test_drawn_schedules(seed, slots, seats, budget, blocks):
    engine = Engine(
        fresh(),
        num_blocks=max(blocks, 16),
        block_size=4,
        max_num_seqs=seats,
        max_num_batched_tokens=budget,
        max_loras=slots,
    )
    todo = jobs(12, seed, most=8)
    assert run(engine, todo) == [ORACLE(*job) for job in todo]


@DEVICES
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_on_a_base_of_few_bits(device, kind):
    oracle = Oracle(device, kind)
    engine = Engine(
        fresh(device, kind), num_blocks=100, block_size=4, max_num_seqs=1, max_num_batched_tokens=64, max_loras=3
    )
    todo = jobs(8, 3)
    assert run(engine, todo) == [oracle(*job) for job in todo]


# ---- who is computed with what ---------------------------------------------------------------------------------------


def reloads(folder, requests: int, seed: int) -> None:
    """Adapters under three names, written anew again and again: each request gets what lay there when it came."""
    rng, engine = (
        random.Random(seed),
        Engine(fresh(), num_blocks=60, block_size=2, max_num_seqs=8, max_num_batched_tokens=60, max_loras=2),
    )
    lying, prompts = {}, [[3, 9, 27, 21], [3, 9, 27, 21, 5, 15], [4, 4, 4]]
    params, waiting = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True), []
    for _ in range(requests):
        name = rng.choice("abc")
        if name not in lying or rng.random() < 0.2:
            lying[name] = rng.choice(ADAPTERS)
            peft_format.save(lying[name], folder / name)
        prompt = rng.choice(prompts)
        adapter = LoRARequest(name, ord(name), folder / name)
        waiting.append((engine.add(prompt, params, lora_request=adapter)[0], prompt, lying[name]))
        while len(waiting) > 20 or (waiting and rng.random() < 0.3):
            engine.step()
            for job in [job for job in waiting if job[0].finished]:
                waiting.remove(job)
                assert job[0].output_token_ids == ORACLE(job[1], params, job[2])
    assert engine.metrics.num_cached_tokens > requests  # the prefix cache was of use


def test_hot_reloads_find_no_stale_block(tmp_path):
    reloads(tmp_path, 150, 1)


@pytest.mark.slow
def test_hot_reloads_find_no_stale_block_in_thousands(tmp_path):
    reloads(tmp_path, 10_000 if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else 1500, 2)


def test_equal_adapters_share_their_blocks_and_others_do_not():
    engine = Engine(fresh(), num_blocks=50, block_size=2, max_num_seqs=4, max_num_batched_tokens=60, max_loras=2)
    params, prompt = SamplingParams(temperature=0, max_tokens=1), [3, 9, 27, 21, 5]
    copy = Adapter(LoraConfig(r=9), dict(ADAPTERS[0].pairs))
    cached = []
    for adapter in (ADAPTERS[0], copy, ADAPTERS[1], None, ADAPTERS[0]):
        request = engine.add(prompt, params, lora_request=adapter and LoRARequest("x", 1, adapter))[0]
        while engine.has_unfinished():
            engine.step()
        cached.append(request.num_cached)
    assert cached == [0, 4, 0, 0, 4]


def test_who_waits_for_a_slot_is_not_overtaken_and_holds_up_none_without(tmp_path):
    """One slot: the second adapter waits until the first one's two are done; a third request of the first one's queues
    behind it, and those without an adapter go on.
    """
    engine = Engine(fresh(), num_blocks=100, block_size=4, max_num_seqs=8, max_num_batched_tokens=60, max_loras=1)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    order = [0, 0, 1, 0, None]
    requests = [
        engine.add([3, 9, 27], params, lora_request=None if i is None else LoRARequest("x", 1, ADAPTERS[i]))[0]
        for i in order
    ]
    ended = []
    while engine.has_unfinished():
        engine.step()
        ended += [i for i, r in enumerate(requests) if r.finished and i not in ended]
        running = {r.adapter.digest for r in engine.scheduler.running if r.adapter}
        assert len(running) <= 1
    assert ended.index(2) < ended.index(3)
    assert ended.index(4) < ended.index(2)


def test_the_one_unused_for_longest_makes_room():
    slots = AdapterSlots(fresh(), 2, 16)
    a, b, c = (slots.packed(adapter) for adapter in ADAPTERS[:3])
    assert (slots.take(a), slots.take(b), slots.take(c)) == (0, 1, None)
    slots.give_back(0)
    slots.give_back(1)
    assert slots.take(a) == 0  # still there, and used again
    slots.give_back(0)
    assert slots.take(c) == 1  # b's
    assert slots.take(b) == 0
    assert slots.take(a) is None


def test_a_registry_keeps_few_and_sees_what_was_written_anew(tmp_path):
    model = fresh()
    slots = AdapterSlots(model, 1, 16)
    registry = Registry(slots.packed, model, most=2)
    for name in "abc":
        peft_format.save(ADAPTERS[ord(name) - 97], tmp_path / name)
    first = registry.get(LoRARequest("a", 1, tmp_path / "a"))
    assert registry.get(LoRARequest("other", 9, str(tmp_path / "a"))) is first
    for name in "bc":
        registry.get(LoRARequest(name, 1, tmp_path / name))
    assert len(registry.found) == 2
    peft_format.save(ADAPTERS[4], tmp_path / "c")
    assert registry.get(LoRARequest("c", 1, tmp_path / "c")).digest == ADAPTERS[4].digest


# ---- what cannot be served -------------------------------------------------------------------------------------------


def serve(lora_request, **options):
    engine = Engine(fresh(), **{"num_blocks": 20, "max_num_batched_tokens": 60, "max_loras": 1, **options})
    return engine.add([1, 2, 3], lora_request=lora_request)


def test_adapters_that_cannot_be_served_are_named(tmp_path):
    adapter = ADAPTERS[0]
    with pytest.raises(ValueError, match="serves no adapters; give it max_loras"):
        serve(LoRARequest("x", 1, adapter), max_loras=0)
    with pytest.raises(ValueError, match="rank of at most 8 .max_lora_rank., got 16"):
        serve(LoRARequest("x", 1, ADAPTERS[1]), max_lora_rank=8)
    head = Adapter(adapter.config, {"lm_head": Pair(torch.zeros(2, 32), torch.zeros(VOCAB, 2), 1.0)})
    with pytest.raises(ValueError, match="lm_head: an adapted head is not served"):
        serve(LoRARequest("x", 1, head))
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        serve(LoRARequest("x", 1, tmp_path / "nowhere"))
    wrong = Adapter(
        adapter.config, {"model.layers.0.self_attn.q_proj": Pair(torch.zeros(2, 31), torch.zeros(32, 2), 1.0)}
    )
    with pytest.raises(ValueError, match=r"q_proj.lora_A: expected shape \[2, 32\]"):
        serve(LoRARequest("x", 1, wrong))
    with pytest.raises(TypeError, match="lora_request: expected a LoRARequest"):
        serve("x")
    with pytest.raises(ValueError, match="expected one without an adapter"):
        Engine(adapted(fresh(), LoraConfig()), num_blocks=20, max_loras=1)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (("", 1, ADAPTERS[0]), "lora_name"),
        ((3, 1, ADAPTERS[0]), "lora_name"),
        (("x", 0, ADAPTERS[0]), "lora_int_id"),
        (("x", True, ADAPTERS[0]), "lora_int_id"),
        (("x", 1, None), "lora_path"),
    ],
)
def test_requests_that_make_no_sense(fields, says):
    with pytest.raises((TypeError, ValueError), match=f"{says}: expected"):
        LoRARequest(*fields)


@pytest.mark.parametrize(("name", "value"), [("max_loras", -1), ("max_loras", 1.5), ("max_lora_rank", 0)])
def test_options_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected an integer"):
        Engine(fresh(), num_blocks=20, **{name: value})


def test_a_failing_copy_ends_its_request_alone(monkeypatch):
    engine = Engine(fresh(), num_blocks=60, block_size=4, max_num_seqs=4, max_num_batched_tokens=60, max_loras=2)
    take = engine.slots.take

    def broken(loaded):
        if loaded.digest == ADAPTERS[1].digest:
            raise RuntimeError("no memory")
        return take(loaded)

    monkeypatch.setattr(engine.slots, "take", broken)
    params = SamplingParams(temperature=0, max_tokens=4)
    todo = [([3, 9], params, adapter) for adapter in (ADAPTERS[0], ADAPTERS[1], None)]
    requests = [engine.add(p, q, lora_request=a and LoRARequest("x", 1, a))[0] for p, q, a in todo]
    while engine.has_unfinished():
        engine.step()
    assert str(requests[1].error) == "no memory"
    assert [requests[i].output_token_ids for i in (0, 2)] == [ORACLE(*todo[i]) for i in (0, 2)]
    assert engine.slots.held == [0, 0]


# ---- the face that users see -----------------------------------------------------------------------------------------


def test_llm_takes_one_for_all_or_one_each(tmp_path):
    from minillm.model.weights import save

    save(fresh(), tmp_path / "model")
    for i in (0, 1):
        peft_format.save(ADAPTERS[i], tmp_path / f"adapter-{i}")
    one, two = (LoRARequest(f"a{i}", i + 1, tmp_path / f"adapter-{i}") for i in (0, 1))
    llm = LLM(tmp_path / "model", device="cpu", num_blocks=60, max_loras=2, max_num_batched_tokens=60)
    params, prompts = SamplingParams(temperature=0, max_tokens=5), [[3, 9, 27], [4, 12], [3, 9]]
    each = llm.generate(prompts, params, use_tqdm=False, lora_request=[one, None, two])
    expected = [ORACLE(p, params, a) for p, a in zip(prompts, (ADAPTERS[0], None, ADAPTERS[1]), strict=True)]
    assert [output.token_ids for output in each] == expected
    same = llm.generate(prompts, params, use_tqdm=False, lora_request=two)
    assert [output.token_ids for output in same] == [ORACLE(p, params, ADAPTERS[1]) for p in prompts]
    stream = llm.stream([3, 9, 27], params, lora_request=one)
    list(stream)
    assert stream.output.token_ids == expected[0]
    with pytest.raises(ValueError, match=r"lora_request: expected one for all or one each \(3\), got 2"):
        llm.generate(prompts, params, lora_request=[one, two])
    for wrong in ("adapters/sql", 3):
        with pytest.raises(TypeError, match="lora_request: expected a LoRARequest or a list"):
            llm.generate(prompts, params, lora_request=wrong)
    with pytest.raises(TypeError, match="lora_request: expected a LoRARequest"):
        llm.generate(prompts, params, use_tqdm=False, lora_request=["a", None, two])
    assert not llm.engine.requests
