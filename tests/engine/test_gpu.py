"""On a GPU, with CUDA graphs and a step on its way: fp32 exact, bf16 within what its rounding explains.

What needs no graph runs on a CPU too, on fewer and shorter requests, so that these tests are tested everywhere.
"""

import contextlib
import random
from collections.abc import Sequence

import pytest
import torch

from minillm.config import ModelConfig
from minillm.engine.engine import Engine
from minillm.engine.request import Request
from minillm.engine.runner import REPORTED, SHORT, Runner
from minillm.generate import naive, prompt_logprobs
from minillm.model import Transformer
from minillm.sampling import SamplingParams

from .conftest import assert_home, run

gpu = pytest.mark.gpu
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
VOCAB = 500
WINDOWS = {"sliding_window": 21, "layer_types": ("sliding_attention", "full_attention", "sliding_attention")}


def model_of(dtype: torch.dtype, std: float = 0.2, device: str = "cuda", **options) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(VOCAB, 128, 256, 3, 4, 2, 32, max_position_embeddings=2 * SHORT, eos_token_ids=(7,), **options)
    model = Transformer(config)
    model.reset_parameters(std=std)
    return model.to(device, dtype).eval().requires_grad_(False)


Job = tuple[list[int], SamplingParams]


def jobs(count: int, longest: int = 150, most: int = 60) -> list[Job]:
    """Prompts of up to `longest` tokens, some with a common beginning, with up to `most` outputs."""
    rng = random.Random(1)
    kinds = [{"temperature": 0}, {"temperature": 0}, {"temperature": 0.9}]
    kinds += [{"temperature": 1.1, "top_p": 0.9, "min_p": 0.01}]
    start = [rng.randrange(VOCAB) for _ in range(40)]
    return [
        (
            start[: rng.choice([0, 17, 40])] + [rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))],
            SamplingParams(seed=i, max_tokens=rng.randint(1, most), **kinds[i % 4]),
        )
        for i in range(count)
    ]


SPECIAL = {
    "plain": {"temperature": 0},
    "top_k": {"temperature": 0.9, "top_k": 7},
    "top_p": {"temperature": 1.1, "top_p": 0.8},
    "min_p": {"temperature": 1.3, "min_p": 0.05},
    "repetition": {"temperature": 0, "repetition_penalty": 1.3},
    "presence, frequency": {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "bias": {"temperature": 0, "logit_bias": {3: 9.0, 5: float("-inf"), 11: 2.5}},
    "min_tokens": {"temperature": 0.8, "min_tokens": 9, "stop_token_ids": list(range(20, 400))},
    "logprobs": {"temperature": 0, "logprobs": 3},
    "prompt_logprobs": {"temperature": 0, "prompt_logprobs": 2},
    "all": {"temperature": 1.2, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1,
            "frequency_penalty": 0.2, "logit_bias": {2: 2.0}, "logprobs": 0, "min_tokens": 3,
            "stop_token_ids": [1, 2, 3]},
}  # fmt: skip


UNEDITED = [kind for kind in SPECIAL.values() if not {"logit_bias", "min_tokens"} & kind.keys()]  # graphs hold these


def special_jobs(kinds: Sequence[dict] = (*SPECIAL.values(),)) -> list[Job]:
    """Two requests of each kind, whose prompts take several steps."""
    rng = random.Random(2)
    return [
        (
            [rng.randrange(VOCAB) for _ in range(rng.randint(3, 90))],
            SamplingParams(seed=100 + i, max_tokens=16, ignore_eos=True, **kind),
        )
        for i, kind in enumerate([*kinds] * 2)
    ]


def add_all(engine: Engine, todo: list[Job]) -> list[Request]:
    return [engine.add(list(prompt), params)[0] for prompt, params in todo]


def assert_oracles(model: Transformer, requests: list[Request]) -> None:
    """Tokens, and log probabilities as far as order of sums allows."""
    for request in requests:
        assert request.error is None
        tokens = list(naive(model, request.prompt_token_ids, request.params))
        assert request.output_token_ids == [int(token) for token in tokens]
        if request.logprobs is not None:
            assert_near(request.logprobs, [token.logprobs for token in tokens])
        if request.prompt_logprobs is not None:
            assert request.prompt_logprobs[0] is None
            expected = prompt_logprobs(model, request.prompt_token_ids, request.params.prompt_logprobs)
            assert_near(request.prompt_logprobs[1:], expected[1:])


def assert_near(got: list, expected: list) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert sorted(one) == sorted(other)
        for token, value in other.items():
            assert one[token] == pytest.approx(value, abs=1e-3)


@gpu
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("options", [{}, {"async_scheduling": False}, {"enforce_eager": True}, {"num_blocks": 60}])
def test_fp32_is_the_oracle(qk_norm, options):
    """64 requests, mixed batches, chunks, shared prefixes, with 60 blocks also preemption."""
    model = model_of(torch.float32, qk_norm=qk_norm)
    engine = Engine(model, **{"num_blocks": 600, "max_num_seqs": 24, "max_num_batched_tokens": 200, **options})
    requests = [(engine.requests[engine.add_request(p, q)], p, q) for p, q in jobs(64)]
    run(engine)
    assert_home(engine)
    assert (engine.metrics.num_preemptions > 0) == ("num_blocks" in options)
    for request, prompt, params in requests:
        assert request.error is None
        assert request.output_token_ids == [int(t) for t in naive(model, prompt, params)]


def assert_explained(rounded: Transformer, exact: Transformer, requests: list[Request], largest: float = 0.9) -> None:
    """Each greedy token's logit in fp32 is the largest, or so near it that 2.5 times bf16's error covers the rest.

    Two logits may each be off by the error; the engine's order of sums differs from that of the model alone.
    """
    equal = total = 0
    for request in requests:
        ids = torch.tensor([request.tokens()], device=exact.device)
        with torch.inference_mode():
            logits = exact.logits(exact(ids))[0, len(request.prompt_token_ids) - 1 : -1]  # [T, vocab]
            error = (rounded.logits(rounded(ids))[0, len(request.prompt_token_ids) - 1 : -1] - logits).abs().max()
        chosen = logits.gather(1, torch.tensor(request.output_token_ids, device=exact.device)[:, None])[:, 0]
        margin = logits.max(-1).values - chosen
        assert margin.max() <= 2.5 * error
        equal, total = equal + int((margin == 0).sum()), total + len(margin)
    assert equal > largest * total


def rounded_and_exact(device: str = "cuda") -> tuple[Transformer, Transformer]:
    """The same weights in bf16 and in fp32."""
    rounded, exact = model_of(torch.bfloat16, 0.1, device), model_of(torch.float32, 0.1, device)
    exact.load_state_dict({k: v.float() for k, v in rounded.state_dict().items()})
    return rounded, exact


GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


@gpu
def test_bf16_greedy_is_explained_by_rounding():
    rounded, exact = rounded_and_exact()
    engine = Engine(rounded, num_blocks=600, max_num_seqs=24, max_num_batched_tokens=200)
    requests = add_all(engine, [(p, GREEDY) for p, _ in jobs(32)])
    run(engine)
    assert_explained(rounded, exact, requests)


@gpu
def test_memory_that_does_not_suffice_says_what_to_lower():
    model = model_of(torch.float32, std=0.1)
    with pytest.raises(
        MemoryError, match="lower max_model_len, max_num_batched_tokens or max_num_seqs, or raise gpu_mem"
    ):
        Engine(model, max_model_len=512, gpu_memory_utilization=0.001)


# ---- every way to draw, windows, plans ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "options"),
    [
        ("cpu", {}),
        ("cpu", {"num_blocks": 30}),
        pytest.param("cuda", {}, marks=gpu),
        pytest.param("cuda", {"async_scheduling": False}, marks=gpu),
        pytest.param("cuda", {"enforce_eager": True}, marks=gpu),
        pytest.param("cuda", {"num_blocks": 30}, marks=gpu),
    ],
    ids=str,
)
def test_special_sampling_is_the_oracle(device, options):
    """Filters, penalties, biases, minimum lengths, log probabilities, one beside another in every batch."""
    model = model_of(torch.float32, device=device)
    engine = Engine(model, **{"num_blocks": 400, "max_num_seqs": 24, "max_num_batched_tokens": 64, **options})
    requests = add_all(engine, special_jobs())
    run(engine)
    assert_home(engine)
    assert (engine.metrics.num_preemptions > 0) == ("num_blocks" in options)
    assert_oracles(model, requests)


@DEVICES
@pytest.mark.parametrize("windows", [WINDOWS, {"sliding_window": 16}, {"sliding_window": 1}], ids=str)
def test_windows_are_the_oracle(device, windows):
    """On some layers, on all; prompts longer than the window, cut into chunks on the way."""
    model = model_of(torch.float32, device=device, **windows)
    engine = Engine(model, num_blocks=400, max_num_seqs=16, max_num_batched_tokens=50)
    requests = add_all(engine, jobs(24, longest=120, most=30) if device == "cuda" else jobs(8, longest=50, most=10))
    run(engine)
    assert_home(engine)
    assert_oracles(model, requests)


@pytest.mark.parametrize(
    ("device", "options"),
    [("cpu", {}), pytest.param("cuda", {}, marks=gpu), pytest.param("cuda", {"enforce_eager": True}, marks=gpu)],
    ids=str,
)
def test_a_second_runner_of_the_same_plans_holds_the_same_tensors(device, options, monkeypatch):
    """As the ranks of a tensor-parallel group do. It launches every kernel from Python; the first replays graphs."""
    model = model_of(torch.float32, device=device, **WINDOWS)
    engine = Engine(model, **{"num_blocks": 20, "max_num_seqs": 8, "max_num_batched_tokens": 64, **options})
    other = Runner(model, engine.config, engine.layout)
    other.allocate(20)
    for runner in (engine.runner, other):
        runner.cache.k.zero_()
        runner.cache.v.zero_()
    launched, copies = [], []
    draw, copy = engine.runner.draw, engine.runner.cache.copy

    def recording(plan, masks=None):
        results = draw(plan, masks)
        launched.append((plan, copies[:], results))
        copies.clear()
        return results

    monkeypatch.setattr(engine.runner, "draw", recording)
    monkeypatch.setattr(engine.runner.cache, "copy", lambda pairs: (copies.append(list(pairs)), copy(pairs))[1])
    several = SamplingParams(temperature=1.0, seed=3, n=2, max_tokens=9, top_k=30, logprobs=2, ignore_eos=True)
    add_all(engine, [*special_jobs(), ([2, 3, 4, 5, 6], several)])
    run(engine)
    assert engine.metrics.num_preemptions
    for plan, before, results in launched:
        for pairs in before:
            other.cache.copy(pairs)
        assert other.launch(plan).read() == results.read()
    if device == "cuda" and not options:
        assert engine.runner.num_replays > len(launched)
    assert other.num_replays == 0
    rows = slice(0, engine.config.max_num_seqs)  # what is padded, is written by chance
    assert torch.equal(engine.runner.table.matrix[rows], other.table.matrix[rows])
    assert torch.equal(engine.runner.counts[rows], other.counts[rows])
    for one, two in ((engine.runner.cache.k, other.cache.k), (engine.runner.cache.v, other.cache.v)):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


# ---- graphs are replayed, and nothing waits -------------------------------------------------------------------------


def watch_replays(engine: Engine, monkeypatch) -> list[tuple[bool, bool, int]]:
    """For each step to come: whether all decode, whether something rare is drawn, how many graphs it replayed."""
    steps, runner = [], engine.runner
    forward, draw = runner.forward, runner.draw
    before = []

    def watched_forward(plan):
        before.append(runner.num_replays)
        forward(plan)

    def watched_draw(plan, masks=None):
        results = draw(plan, masks)
        is_rare = plan.edits is not None or (plan.logprobs is not None and plan.logprobs[1] > REPORTED)
        steps.append((plan.is_decode, is_rare, runner.num_replays - before.pop()))
        return results

    monkeypatch.setattr(runner, "forward", watched_forward)
    monkeypatch.setattr(runner, "draw", watched_draw)
    return steps


@gpu
@pytest.mark.parametrize("async_scheduling", [True, False], ids=["async", "sync"])
def test_every_step_replays_two_graphs(async_scheduling, monkeypatch):
    """One of the layers, one of the draw: plain and filtered requests, prompts too, batches of every size; and what
    reports a few log probabilities.
    """
    engine = Engine(
        model_of(torch.float32), num_blocks=600, max_num_seqs=24, max_num_batched_tokens=200,
        async_scheduling=async_scheduling,
    )  # fmt: skip
    steps = watch_replays(engine, monkeypatch)
    requests = add_all(engine, [*jobs(64), *special_jobs(UNEDITED)])
    run(engine)
    assert all(request.error is None for request in requests)
    assert not any(is_rare for _, is_rare, _ in steps)
    decode = [replays for is_decode, _, replays in steps if is_decode]
    assert len(decode) > 40
    assert set(decode) == {2}
    assert {replays for _, _, replays in steps} == {2}
    assert engine.runner.num_replays == 2 * len(steps)


@DEVICES
def test_a_stream_that_grows_long(device):
    """A sequence that decodes alone takes another graph from some length on."""
    model = model_of(torch.float32, device=device)
    engine = Engine(model, num_blocks=200, max_num_seqs=4, max_num_batched_tokens=200)
    prompt = [3 + i * i % 401 for i in range(SHORT - 3)]
    requests = add_all(engine, [(prompt, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))])
    run(engine)
    assert_oracles(model, requests)
    if device == "cuda":
        assert {(1, 1, True, SHORT, 0, 1, None), (1, 1, True, None, 0, 1, None)} <= engine.runner.forward_graphs.keys()


@gpu
def test_a_rare_draw_replays_the_layers_alone(monkeypatch):
    engine = Engine(model_of(torch.float32), num_blocks=600, max_num_seqs=24, max_num_batched_tokens=200)
    steps = watch_replays(engine, monkeypatch)
    many = SamplingParams(max_tokens=9, logprobs=REPORTED + 1)
    requests = add_all(engine, [*special_jobs(), ([1, 2], many)])
    run(engine)
    assert all(request.error is None for request in requests)
    assert {replays for _, is_rare, replays in steps if is_rare} == {1}
    assert {replays for _, is_rare, replays in steps if not is_rare} <= {2}


@gpu
def test_eager_replays_none():
    engine = Engine(model_of(torch.float32), num_blocks=600, max_num_seqs=24, enforce_eager=True)
    add_all(engine, jobs(4))
    run(engine)
    assert engine.runner.num_replays == 0


@contextlib.contextmanager
def no_waiting():
    """Whatever makes the host wait for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def watch_waiting(engine: Engine, monkeypatch) -> list[bool]:
    """From now on no `forward` and no `draw` may wait; reading may. Notes of each step whether all decode."""
    steps, runner = [], engine.runner
    forward, draw = runner.forward, runner.draw

    def watched_forward(plan):
        steps.append(plan.is_decode)
        with no_waiting():
            forward(plan)

    def watched_draw(plan, masks=None):
        with no_waiting():
            return draw(plan, masks)

    monkeypatch.setattr(runner, "forward", watched_forward)
    monkeypatch.setattr(runner, "draw", watched_draw)
    return steps


@gpu
def test_the_watch_sees_who_waits():
    one = torch.ones(1, device="cuda")
    with no_waiting(), pytest.raises(RuntimeError, match="synchronizing"):
        one.item()
    assert one.item() == 1


@gpu
@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("kinds", [[*SPECIAL.values()], UNEDITED], ids=["special", "unedited"])
@pytest.mark.parametrize("when", ["decode", "always"])
def test_no_launch_waits_for_the_gpu(when, kinds, enforce_eager, monkeypatch):
    """Plain, filtered, penalized, biased requests, with and without log probabilities: decoding, and from the start.
    Once everything is compiled and recorded: the same requests have run before.
    """
    model = model_of(torch.float32)
    engine = Engine(
        model, num_blocks=600, max_num_seqs=24, max_num_batched_tokens=2048, enforce_eager=enforce_eager,
        async_scheduling=True, enable_prefix_caching=False,
    )  # fmt: skip
    add_all(engine, special_jobs(kinds))
    run(engine)
    requests = add_all(engine, special_jobs(kinds))
    if when == "decode":
        while not all(request.output_token_ids for request in requests):
            engine.step()
    steps = watch_waiting(engine, monkeypatch)
    run(engine)
    assert sum(steps) >= 6
    assert all(steps) == (when == "decode")
    assert_oracles(model, requests)
