"""Drawing with every option on the device: the token of `sampling.sample`, whichever path draws it."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.kernels import count_tokens, draw_tokens, gumbel_argmax, gumbel_noise, set_counts, use
from minillm.sampling import SamplingParams, sample

from .conftest import GPU

module = sys.modules[draw_tokens.triton.__module__]  # `minillm.kernels.draw_tokens` is the operation
DEVICE = "cuda" if GPU else "cpu"  # of tests that any device serves
SLACK = 1e-5  # of a nucleus: where its border lies this close to p, either token is right


def case(params: list[SamplingParams], logits: torch.Tensor, seed: int = 0, device=DEVICE):
    """The arguments of `draw_tokens`, and what `sample` needs to know of prompts and outputs."""
    generator = torch.Generator().manual_seed(seed)
    n, size = logits.shape
    prompts, outputs = (torch.randint(size, (n, length), generator=generator) for length in (5, 12))
    outputs[:, 3:6] = outputs[:, :1]  # one token occurs often
    rows = torch.randperm(n + 2, generator=generator)[:n].int()
    counts = torch.full((n + 2, size), -7, dtype=torch.int16)  # rows of nobody hold anything
    for i in range(n):
        set_counts(counts, int(rows[i]), prompts[i], outputs[i])
    options = [
        torch.tensor([p.temperature for p in params]),
        torch.arange(n) * 987654321987 + seed,
        torch.arange(n, dtype=torch.int32) * 7 + 1,
        torch.tensor([p.top_k for p in params], dtype=torch.int32),
        *(torch.tensor([float(getattr(p, name)) for p in params]) for name in (
            "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"
        )), rows, counts,
    ]  # fmt: skip
    return [logits.to(device), *(x.to(device) for x in options)], prompts.to(device), outputs.to(device)


def right(params: list[SamplingParams], arguments: list, prompts: torch.Tensor, outputs: torch.Tensor) -> list[set]:
    """For each row the tokens that `sample` draws for its p, and for a p a little below or above."""
    logits, _, seeds, positions = arguments[:4]
    noise, both = gumbel_noise(seeds, positions, logits.shape[1]), torch.cat((prompts, outputs), 1)
    accepted = []
    for i, row in enumerate(params):
        ps = {row.top_p} if row.top_p == 1 else {max(row.top_p + d, 1e-9) for d in (-SLACK, 0, SLACK)}
        accepted.append({
            int(sample(logits[i : i + 1].float(), [_with(row, min(p, 1.0))], both[i : i + 1],
                       output_token_ids=outputs[i : i + 1], noise=noise[i : i + 1]))
            for p in ps
        })  # fmt: skip
    return accepted


def _with(params: SamplingParams, top_p: float) -> SamplingParams:
    return SamplingParams(**{**params.__dict__, "top_p": top_p})


def holds(params: list[SamplingParams], logits: torch.Tensor, seed: int = 0, device=DEVICE) -> None:
    arguments, prompts, outputs = case(params, logits, seed, device)
    expected = right(params, arguments, prompts, outputs)
    got = draw_tokens(*arguments).tolist()
    for i, (token, tokens) in enumerate(zip(got, expected, strict=True)):
        assert token in tokens, (i, params[i], logits[i])


def mixture(values) -> st.SearchStrategy:
    return st.just(values[0]) | st.sampled_from(values)


PARAMS = st.builds(
    SamplingParams,
    temperature=mixture([1.0, 0.0, 0.3, 2.5, 1e-6]),
    top_k=mixture([0, 1, 2, 5, 40, 300, 10_000]),
    top_p=mixture([1.0, 0.9, 0.5, 0.05, 0.999, 1e-6]),
    min_p=mixture([0.0, 0.05, 0.3, 1.0]),
    repetition_penalty=mixture([1.0, 1.3, 0.7]),
    presence_penalty=mixture([0.0, 0.8, -2.0]),
    frequency_penalty=mixture([0.0, 0.5, -0.1]),
)
KINDS = ("flat", "peaked", "few values", "masked", "one", "outliers")


def logits_of(kind: str, n: int, size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, size, generator=generator)
    if kind == "flat":
        x *= 0.6
    elif kind == "peaked":
        x = 2 * x - 12
        x[:, torch.randint(size, (3,), generator=generator)] += 14
    elif kind == "few values":
        x = x.round()
    elif kind == "masked":
        x = 3 * x.masked_fill(torch.rand(n, size, generator=generator) < 0.8, float("-inf"))
    elif kind == "one":
        x = torch.full_like(x, float("-inf")).scatter(1, torch.randint(size, (n, 1), generator=generator), 0.5)
    else:
        x[:, ::3] -= 30_000
    return x.to(dtype)


@st.composite
def batches(draw, sizes):
    n, size = draw(st.integers(1, 4)), draw(sizes)
    params = draw(st.lists(PARAMS, min_size=n, max_size=n))
    dtype = draw(st.sampled_from([torch.float32, torch.float16]))
    seed = draw(st.integers(0, 999))
    return params, logits_of(draw(st.sampled_from(KINDS)), n, size, dtype, seed), seed


def triton_holds(params, logits, seed=0, device=DEVICE, capacity=16, chunk=128, block=128):
    """With small chunks and a short list, so that a few hundred tokens go every way that a vocabulary goes."""
    with pytest.MonkeyPatch.context() as patch, use("triton"):
        patch.setattr(module, "CAPACITY", capacity)
        patch.setattr(module, "CHUNK", chunk)
        patch.setattr(module, "BLOCK", block)
        patch.setattr(module, "COLLECTED", block)
        holds(params, logits, seed, device)


@given(batches(st.integers(1, 400)))
def test_torch_path_draws_what_sample_draws(batch):
    with use("torch"):
        holds(*batch)


@given(batches(st.integers(1, 400)))
def test_reference_draws_what_sample_draws(batch):
    with use("reference"):
        holds(*batch)


@settings(max_examples=60 if GPU else 15)
@given(batches(st.integers(1, 600)))
def kernels_draw(device, batch):
    triton_holds(*batch, device=device)


def test_kernels_draw_what_sample_draws(device):
    kernels_draw(device)


@pytest.mark.parametrize(("capacity", "kind"), [(128, "flat"), (1, "few values")])
def test_refused_tokens_beside_certain_ones(device, capacity, kind):
    """A long list, or all of the row for want of a list: here a draw is often refused."""
    logits = logits_of(kind, 1, 400, torch.float32, 8).expand(24, -1).contiguous()
    triton_holds([SamplingParams(top_p=0.5)] * 24, logits, 4, device, capacity)


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_a_row_does_not_depend_on_its_neighbors(path):
    params = [
        SamplingParams(top_p=0.8), SamplingParams(temperature=0.0), SamplingParams(top_k=7, top_p=0.7),
        SamplingParams(), SamplingParams(repetition_penalty=1.5, min_p=0.1),
    ]  # fmt: skip
    arguments, *_ = case(params, logits_of("flat", 5, 300, torch.float32, 3))
    with use(path):
        together = draw_tokens(*arguments)
        for i in range(5):
            assert draw_tokens(*(x[i : i + 1] for x in arguments[:-1]), arguments[-1]) == together[i]


@pytest.mark.parametrize("path", ["torch", "triton", "reference"])
def test_without_options_as_gumbel_argmax(path):
    params = [SamplingParams(temperature=t) for t in (0.0, 0.5, 1.0, 3.0)]
    arguments, *_ = case(params, logits_of("peaked", 4, 2500, torch.float32, 5))
    with use(path):
        assert draw_tokens(*arguments).tolist() == gumbel_argmax(*arguments[:4]).tolist()


def test_draws_follow_the_nucleus():
    """Chi-square over 2,000 positions: 3 degrees of freedom exceed 16.3 once in a thousand; the seed is fixed."""
    shares = torch.tensor([0.05, 0.3, 0.02, 0.2, 0.15, 0.25, 0.03])
    n, kept = 2000, [1, 3, 4, 5]  # 0.9 of 1: without 0.05, which would be the first beyond
    arguments, *_ = case([SamplingParams(top_p=0.88)] * n, shares.log().expand(n, -1).contiguous())
    found = draw_tokens(*arguments).bincount(minlength=7).float().cpu()
    expected = shares[kept] / shares[kept].sum() * n
    assert found.sum() == found[kept].sum()
    assert float(((found[kept] - expected) ** 2 / expected).sum()) < 16.3


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_of_equal_tokens_the_smallest_ids_are_kept(path):
    n = 20
    arguments, *_ = case([SamplingParams(top_p=0.25)] * n + [SamplingParams(top_k=2)] * n, torch.zeros(2 * n, 40))
    with use(path):
        tokens = draw_tokens(*arguments)
    assert int(tokens[:n].max()) <= 9  # a quarter of 40
    assert int(tokens[n:].max()) > 20  # all equal the second


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_nothing_hangs_on_nan_and_infinity(path):
    x = logits_of("flat", 4, 200, torch.float32, 0)
    x[0, 5], x[1, 5], x[2], x[3] = float("nan"), float("inf"), float("nan"), float("-inf")
    for params in (
        {"top_p": 0.9},
        {"top_k": 9},
        {"top_k": 150, "top_p": 0.5},
        {"min_p": 0.2},
        {},
        {"temperature": 0.0},
    ):
        arguments, *_ = case([SamplingParams(**params)] * 4, x)
        with use(path):
            tokens = draw_tokens(*arguments)
        assert bool(((tokens >= 0) & (tokens < 200)).all()), params
        assert tokens[3] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("size", [49_152, 151_936])
@pytest.mark.parametrize("kind", KINDS)
def test_vocabularies_on_the_gpu(kind, size):
    params = [SamplingParams(**p) for p in (
        {"top_p": 0.9}, {"top_k": 50}, {"top_k": 20, "top_p": 0.95}, {"min_p": 0.05}, {"repetition_penalty": 1.1},
        {"top_k": 20_000}, {"top_k": 20_000, "top_p": 0.5}, {"temperature": 0.0, "presence_penalty": 1.0}, {},
        {"top_p": 0.999, "temperature": 2.0}, {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "frequency_penalty": 0.3},
    )]  # fmt: skip
    for dtype in (torch.bfloat16, torch.float32):
        holds(params, logits_of(kind, len(params), size, dtype, 1), 1, "cuda")


@pytest.mark.gpu
def test_in_a_graph():
    """Captured once, it draws for options and logits that came later."""
    both = [case([p] * 3, logits_of("flat", 3, 5000, torch.float32, i), i, "cuda") for i, p in enumerate(
        (SamplingParams(), SamplingParams(top_p=0.6, repetition_penalty=1.2))
    )]  # fmt: skip
    (static, *_), (later, *_) = both
    draw_tokens(*static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = draw_tokens(*static)
    for x, y in zip(static, later, strict=True):
        x.copy_(y)
    graph.replay()
    assert got.tolist() == draw_tokens(*later).tolist()


def test_bad_arguments():
    arguments, *_ = case([SamplingParams()] * 2, torch.zeros(2, 10))
    names = ("logits", "temperatures", "seeds", "positions", "top_k", "top_p", "min_p", "repetition", "presence",
             "frequency", "rows", "counts")  # fmt: skip
    for i, name in enumerate(names):
        wrong = [*arguments]
        wrong[i] = arguments[i][:1] if 0 < i < 11 else arguments[i][0]
        with pytest.raises(ValueError, match=f"{name}: expected"):
            draw_tokens(*wrong)
        wrong[i] = arguments[i].bool()
        with pytest.raises((ValueError, TypeError), match=f"{name}: expected"):
            draw_tokens(*wrong)


# ---- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["torch", "triton", "reference"])
@given(st.lists(st.integers(0, 8), max_size=30), st.lists(st.integers(0, 8), max_size=30))
@settings(max_examples=15)
def test_counts_follow_the_output(path, prompt, output):
    counts = torch.full((3, 9), 99, dtype=torch.int16, device=DEVICE)
    start = len(output) // 2
    set_counts(counts, 1, *(torch.tensor(x, dtype=torch.int64, device=DEVICE) for x in (prompt, output[:start])))
    with use(path):
        for token in output[start:]:
            rows, tokens = counts.new_tensor([2, 1, 0], dtype=torch.int32), torch.tensor([3, token, 4], device=DEVICE)
            count_tokens(counts, rows, tokens, torch.tensor([False, True, False], device=DEVICE))
    for t in range(9):
        assert (int(counts[1, t]) & 0x7FFF, int(counts[1, t]) < 0) == (output.count(t), t in prompt)
    assert bool((counts[[0, 2]] == 99).all())


@pytest.mark.parametrize("path", ["torch", "triton", "reference"])
def test_a_count_that_is_full_stays(path):
    counts = torch.tensor([[32766, 0, 32767 - 32768]], dtype=torch.int16, device=DEVICE)
    row, active = counts.new_zeros(1, dtype=torch.int32), torch.tensor([True], device=DEVICE)
    with use(path):
        for token in (0, 0, 2, 2):
            count_tokens(counts, row, torch.tensor([token], device=DEVICE), active)
    assert counts.tolist() == [[32767, 0, -1]]


def test_bad_arguments_of_counts():
    counts, rows, tokens = torch.zeros(2, 9, dtype=torch.int16), torch.zeros(1, dtype=torch.int32), torch.tensor([3])
    active = torch.tensor([True])
    for bad, name in (
        ((counts.int(), rows, tokens, active), "counts"), ((counts, rows.long(), tokens, active), "rows"),
        ((counts, rows, tokens.int(), active), "tokens"), ((counts, rows, tokens, active.int()), "active"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: expected"):
            count_tokens(*bad)
