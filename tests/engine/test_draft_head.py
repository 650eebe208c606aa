"""The trained draft: what it remembers is right whatever happened, and nobody can tell from tokens that it guessed."""

import functools
import itertools
import json
from dataclasses import replace

import pytest
import torch

from minillm.config import ModelConfig, SpeculativeConfig
from minillm.engine.draft_head import DraftHead, HeadRunner, fingerprint, load_head, save_head
from minillm.engine.draft_training import Passes, _guessed, agreement, new_head, own_outputs, train_head
from minillm.engine.engine import Engine
from minillm.kernels import KERNELS
from minillm.model import Transformer
from minillm.sampling import SamplingParams

from . import test_constraints as constraints
from .conftest import assert_home, oracle, run, tiny_model
from .heads import PROMPTS, head_path, trained
from .test_speculative import chi_square, names_of

BOTH = pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, seed=4, max_tokens=24, ignore_eos=True)
FILTERED = SamplingParams(temperature=1.2, seed=7, top_k=9, top_p=0.9, frequency_penalty=0.4, max_tokens=16)
JOBS = [(prompt, params) for prompt in PROMPTS[::2] for params in (GREEDY, SAMPLED, FILTERED)]
# Chunks, preemption, few seats, a cache where texts that were seen are found again.
OPTIONS = pytest.mark.parametrize(
    "options", [{}, {"num_blocks": 18}, {"max_num_batched_tokens": 5}, {"block_size": 1, "num_blocks": 160}], ids=str
)


def with_head(count: int = 3, model: Transformer | None = None, path=None, **options) -> Engine:
    speculative = SpeculativeConfig("draft_head", count, adaptive=False, path=path or head_path())
    return Engine(
        model or tiny_model(),
        **{"num_blocks": 80, "block_size": 4, "max_num_seqs": 4, "speculative": speculative, **options},
    )


def exact(engine: Engine, jobs, device: str = "cpu") -> None:
    requests = [engine.add(*job)[0] for job in jobs]
    run(engine)
    for request, (prompt, params) in zip(requests, jobs, strict=True):
        assert request.error is None
        assert request.output_token_ids == oracle(tuple(prompt), params, 64, device)
    assert_home(engine)


@BOTH
@OPTIONS
def test_tokens_are_those_of_plain_decoding(async_scheduling, options):
    engine = with_head(async_scheduling=async_scheduling, **options)
    for _ in range(2):  # then with a prefix cache
        exact(engine, JOBS)
    assert min(engine.metrics.num_accepted_tokens_per_pos) >= 5
    assert (engine.metrics.num_preemptions > 0) == (options.get("num_blocks") == 18)


# ---- what is remembered ----------------------------------------------------------------------------------------------


def guesses_of(head, tokens: list[int], guesses: list[int]) -> list[int]:
    """What the head says behind these tokens, all of it computed at once: guess after guess, those before it given."""
    ids = torch.tensor([[*tokens, *guesses]])
    states = _guessed(head, ids, head.model(ids), len(guesses))
    return [int(head.best(g[0, len(tokens) - 1 + ahead])) for ahead, g in enumerate(states)]


@BOTH
@OPTIONS
def test_guesses_are_those_of_the_whole_text(async_scheduling, options, monkeypatch):
    """In each step, after chunks, prefix hits, preemption and guesses that were wrong: as if nothing had been kept."""
    seen = []
    guess = HeadRunner._guess

    def watched(self, sequences, width):
        guesses, matrix, first = guess(self, sequences, width), self.table.matrix, self.table.layout.first_token
        for i, row in enumerate(self.table.steps[0, :sequences].tolist()):
            meant = int(self.table.steps[2, i]) - 1
            if meant > 0:
                tokens = matrix[row, first : first + int(matrix[row, 0])].tolist()
                seen.append((tokens, guesses[i, :meant].tolist()))
        return guesses

    monkeypatch.setattr(HeadRunner, "_guess", watched)
    engine = with_head(async_scheduling=async_scheduling, **options)
    for _ in range(2):
        exact(engine, JOBS[:6])
    assert len(seen) > 60
    assert max(len(guesses) for _, guesses in seen) == 3
    head = engine.runner.head
    wrong = [(tokens, guesses) for tokens, guesses in seen if guesses_of(head, tokens, guesses) != guesses]
    assert not wrong


def contents(engine: Engine) -> dict[bytes, list[torch.Tensor]]:
    """What each published block holds, by its name: keys, values, hidden states."""
    size, cache = engine.pool.block_size, engine.runner.cache
    return {
        name: [x[:, block * size : (block + 1) * size] for x in (cache.k, cache.v, cache.hidden)]
        for name, block in engine.pool._block_of.items()
    }


@BOTH
@pytest.mark.parametrize("end", ["length", "stop", "abort"])
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_a_block_with_a_name_holds_what_the_name_says(async_scheduling, end, block_size):
    """The model's keys and values, the head's, and hidden states: as of a text without guesses. No name has a guess."""
    prompt, free = [4, 5], oracle((4, 5), SAMPLED, 64)
    stop = next(i for i, token in enumerate(free) if i > 12 and token not in free[:i])
    params = replace(SAMPLED, stop_token_ids=[free[stop]] if end == "stop" else [])
    plain = with_head(num_blocks=60, block_size=block_size)
    plain.add([*prompt, *free], replace(GREEDY, max_tokens=1))
    run(plain)
    right = contents(plain)
    engine = with_head(num_blocks=60, async_scheduling=async_scheduling, block_size=block_size)
    [request] = engine.add(prompt, params)
    for step in itertools.count():
        if end == "abort" and step == 5:
            engine.abort(request)
        if not engine.has_unfinished():
            break
        known = set(names_of(engine, request.tokens()))
        engine.step()
        assert set(engine.pool._block_of) <= known | set(names_of(engine, request.tokens()))
    engine.step()  # and what was on its way when it ended
    assert engine.metrics.num_draft_tokens > engine.metrics.num_accepted_tokens
    found = contents(engine)
    assert len(found) >= (8 if end != "abort" else 3) // block_size
    for name, content in found.items():
        for got, expected in zip(content, right[name], strict=True):
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_a_copy_on_write_takes_hidden_states_along():
    """Several completions of one prompt share its blocks, and the last of these has room for more."""
    engine = with_head()
    made = engine.add([1, 2, 3, 4, 9], replace(SAMPLED, n=3))
    run(engine)
    for i, request in enumerate(made):
        assert request.output_token_ids == oracle((1, 2, 3, 4, 9), replace(SAMPLED, seed=4 + i), 64)
    cache = engine.runner.cache
    cache.copy([(3, 5)])
    for x in (cache.k, cache.v, cache.hidden):
        assert torch.equal(x[:, 12:16], x[:, 20:24])
    assert cache.bytes_per_token * 4 == engine.runner.block_bytes == 4 * (3 * 2 * 2 * 8 + 16) * 4


# ---- beside other features -------------------------------------------------------------------------------------------


@functools.cache
def without_guesses() -> tuple[list, list[list[int]], DraftHead]:
    """Requests with constraints, their tokens without guesses, and a head trained on these."""
    todo = constraints.jobs(most=30)
    plain = constraints.run(constraints.engine(), todo)
    head = trained(constraints.model(), [r.tokens()[:4] for r in plain], steps=60)
    return todo, [r.output_token_ids for r in plain], head


@BOTH
@pytest.mark.parametrize("options", [{}, {"num_blocks": 16}, {"max_num_batched_tokens": 5}], ids=str)
def test_constraints_hold_along_guesses(async_scheduling, options, tmp_path):
    todo, plain, head = without_guesses()
    path = save_head(head, tmp_path / "head")
    engine = with_head(
        model=constraints.model(), path=path, tokenizer=constraints.tokenizer(), async_scheduling=async_scheduling,
        **{"max_num_seqs": 6, **options},
    )  # fmt: skip
    requests = constraints.run(engine, todo)
    assert [r.error for r in requests] == [None] * len(todo)
    assert [r.output_token_ids for r in requests] == plain
    assert engine.metrics.num_draft_tokens > 50
    assert_home(engine)


@pytest.mark.parametrize("method", ["ngram", "draft_head"])
def test_the_distribution_is_kept(method, tmp_path):
    """50,000 draws of an engine that guesses, eight a request of two tokens: how often each of the 256 texts came,
    against the model's probabilities. 255 degrees of freedom: above 370 in one of 400,000 cases.
    """
    torch.manual_seed(1)
    model = Transformer(ModelConfig(2, 16, 24, 1, 2, 1, 8, max_position_embeddings=16)).eval().requires_grad_(False)
    model.reset_parameters(std=0.3)
    path = save_head(new_head(model, []), tmp_path / "head")
    how = {"path": path} if method == "draft_head" else {"prompt_lookup_max": 1}
    config = SpeculativeConfig(method, 3, adaptive=False, **how)
    engine = Engine(model, num_blocks=1500, block_size=4, max_num_seqs=256, speculative=config)
    prompt, count = [1, 0, 1], 6_250
    ids = torch.tensor([[*prompt, *text] for text in itertools.product(range(2), repeat=8)])
    log_p = model.logits(model(ids)).log_softmax(-1)
    p = sum(log_p[range(256), 2 + i, ids[:, 3 + i]] for i in range(8)).exp().double()
    counts = torch.zeros(256, dtype=torch.float64)
    requests = [
        engine.add(prompt, SamplingParams(temperature=1.0, seed=seed, max_tokens=8, ignore_eos=True))[0]
        for seed in range(count)
    ]
    run(engine, steps=10_000)
    for request in requests:
        counts[int("".join(map(str, request.output_token_ids)), 2)] += 1
    assert engine.metrics.num_accepted_tokens > count
    assert p.sum() == pytest.approx(1)
    assert chi_square(counts, p) < 370


# ---- training --------------------------------------------------------------------------------------------------------


def test_training_sees_what_the_engine_will_see():
    """Pass d of training is guess d: keys of true states up to where it began, then of each pass one token."""
    torch.manual_seed(0)
    cache, k = Passes(), torch.randn(3, 1, 6, 2, 8)
    q, v = torch.randn(1, 6, 4, 8), torch.randn(3, 1, 6, 2, 8)
    for number in range(3):
        cache.write(k[number], v[number], None)
    got = cache.attend(q, k[2], v[2], None)
    for i in range(2, 6):
        rows = [*((0, j) for j in range(i - 1)), (1, i - 1), (2, i)]
        keys, values = (torch.stack([x[a, 0, b] for a, b in rows], 1).repeat_interleave(2, 0) for x in (k, v))
        weights = (torch.einsum("hd,hsd->hs", q[0, i], keys) / 8**0.5).softmax(-1)
        torch.testing.assert_close(got[0, i], torch.einsum("hs,hsd->hd", weights, values))


def test_training_helps_and_leaves_the_model_as_it_is():
    model = tiny_model()
    before = fingerprint(model), [p.clone() for p in model.parameters()]
    engine = Engine(model, num_blocks=100, block_size=4, max_num_seqs=8)
    examples = own_outputs(engine, PROMPTS, GREEDY)
    assert all(example.given == len(prompt) for example, prompt in zip(examples, PROMPTS, strict=True))
    head = new_head(model, examples)
    untrained = agreement(head, examples, 3)
    losses = train_head(head, examples, 60, lr=6e-3, batch_size=8, progress=False)
    assert len(losses) == 60
    assert losses[-1] < 0.9 * losses[0]
    assert agreement(head, examples, 3)[0] > untrained[0] + 0.1
    assert not any(p.requires_grad for p in head.parameters())
    assert before[0] == fingerprint(model)
    assert all(torch.equal(a, b) for a, b in zip(before[1], model.parameters(), strict=True))


def test_what_training_measures_is_what_the_engine_accepts():
    """Of greedy texts: `agreement` over all places, the engine's over those where it began to guess."""
    engine = with_head(count=1)
    examples = own_outputs(engine, PROMPTS, GREEDY)
    [rate] = agreement(engine.runner.head, examples, 1)
    m = engine.metrics
    assert m.num_accepted_tokens / m.num_draft_tokens == pytest.approx(rate, abs=0.12)


def test_a_head_guesses_the_tokens_that_come_often():
    examples = own_outputs(Engine(tiny_model(), num_blocks=100, block_size=4), PROMPTS, GREEDY)
    said = [token for example in examples for token in example.token_ids[example.given :]]
    head = new_head(tiny_model(), examples, most_token_ids=5)
    kept = head.token_ids.tolist()
    assert kept == sorted(kept)
    assert min(map(said.count, kept)) >= max(said.count(token) for token in range(50) if token not in kept)
    assert set(head.best(torch.randn(40, 16)).tolist()) <= set(kept)
    everything = new_head(tiny_model(), examples, most_token_ids=50)  # also what was never said
    assert everything.token_ids.tolist() == list(range(50))
    with pytest.raises(ValueError, match="most_token_ids: expected 1 to 50"):
        new_head(tiny_model(), examples, most_token_ids=51)


@pytest.mark.parametrize("name", ["steps", "passes", "batch_size"])
def test_training_wants_numbers(name):
    head = new_head(tiny_model(), [])
    examples = own_outputs(Engine(tiny_model(), num_blocks=20, block_size=4), PROMPTS[:1], GREEDY)
    with pytest.raises(ValueError, match=f"{name}: expected 1 or more, got 0"):
        train_head(head, examples, **{"steps": 1, name: 0}, progress=False)
    with pytest.raises(ValueError, match="examples: expected 1 or more, got 0"):
        train_head(head, [], 1, progress=False)


# ---- on disk ---------------------------------------------------------------------------------------------------------


def test_a_head_comes_back_as_it_was_written(tmp_path):
    head = load_head(tiny_model(), head_path())
    head.rates = [0.5, 0.25]
    save_head(head, tmp_path / "copy")
    again = load_head(tiny_model(), tmp_path / "copy")
    assert again.rates == [0.5, 0.25]
    assert again.state_dict().keys() == head.state_dict().keys()
    assert all(torch.equal(x, head.state_dict()[name]) for name, x in again.state_dict().items())
    engine = with_head(count=4, path=tmp_path / "copy")
    assert engine.runner.rates == [0.5, 0.25, 0.25, 0.25]


def test_a_head_of_another_model_is_refused(tmp_path):
    torch.manual_seed(9)
    twin = Transformer(tiny_model().config)
    with pytest.raises(ValueError, match="path: the head in .* was trained on another model of this shape"):
        load_head(twin, head_path())
    wider = Transformer(replace(tiny_model().config, hidden_size=32))
    with pytest.raises(ValueError, match="trained on a model with hidden_size 16, and this one's is 32; train one"):
        load_head(wider, head_path())
    with pytest.raises(FileNotFoundError, match="has no draft_head.json; expected the folder of a trained draft head"):
        load_head(tiny_model(), tmp_path)
    assert fingerprint(tiny_model()) == fingerprint(tiny_model("cpu", "windows")) != fingerprint(twin)


def test_broken_files_are_refused(tmp_path):
    folder = save_head(load_head(tiny_model(), head_path()), tmp_path / "head")
    about = json.loads((folder / "draft_head.json").read_text())
    (folder / "draft_head.json").write_text("{")
    with pytest.raises(ValueError, match="holds no draft head that can be read"):
        load_head(tiny_model(), folder)
    (folder / "draft_head.json").write_text(json.dumps(about))
    (folder / "draft_head.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match="holds no draft head that can be read"):
        load_head(tiny_model(), folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "draft_head"}, "path: expected the folder of a draft head, got None"),
        ({"method": "draft_head", "path": 5}, "path: expected the folder of a draft head, got 5"),
        ({"path": "head"}, "path: expected None with 'ngram', got 'head'"),
    ],
)
def test_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        SpeculativeConfig(**fields)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@BOTH
def test_graphs_with_a_head(async_scheduling):
    """All widths are replayed; tokens, and what is remembered, are those of an engine without graphs."""
    options = {"max_num_batched_tokens": 64, "async_scheduling": async_scheduling}
    engine = with_head(model=tiny_model("cuda"), path=head_path("plain", "cuda"), **options)
    assert {width for _, width in engine.runner.guess_graphs} == {2, 4}
    for _ in range(2):
        exact(engine, JOBS, "cuda")
    assert engine.metrics.num_accepted_tokens > 50
    eager = with_head(model=tiny_model("cuda"), path=head_path("plain", "cuda"), enforce_eager=True, **options)
    exact(eager, JOBS, "cuda")
    found, right = contents(engine), contents(eager)
    assert len(found.keys() & right.keys()) > 5
    for name in found.keys() & right.keys():
        for got, expected in zip(found[name], right[name], strict=True):
            torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_on_a_gpu(dtype, tmp_path):
    """Trained in fp32 on a model of 16 bits, and used there."""
    model = Transformer(tiny_model().config).to("cuda", dtype).eval().requires_grad_(False)
    head = trained(model, PROMPTS, steps=20)
    assert head.merge.weight.dtype == dtype
    engine = with_head(model=model, path=save_head(head, tmp_path / "head"))
    engine.add([1, 2, 3], GREEDY)
    run(engine)
    assert engine.metrics.num_draft_tokens > 10
    assert KERNELS["rms_norm"].path(head.embedding_norm.weight) == "triton"
