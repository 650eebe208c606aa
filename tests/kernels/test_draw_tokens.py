"""Drawing with every option on the device: the token of `sampling.sample`, whichever path draws it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.kernels import draw_tokens, gumbel_noise, set_counts, use
from minillm.kernels import draw_tokens as function
from minillm.sampling import SamplingParams, sample

from .conftest import GPU

module = __import__(function.triton.__module__, fromlist=["_"])
SLACK = 1e-5  # of a nucleus: where its border lies this close to p, either token is right


def case(params: list[SamplingParams], logits: torch.Tensor, seed: int = 0, device="cpu"):
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


def holds(params: list[SamplingParams], logits: torch.Tensor, seed: int = 0, device="cpu") -> None:
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


def triton_holds(params, logits, seed=0, device="cpu", capacity=16, chunk=128, block=128):
    """With small chunks and a short list, so that a few hundred tokens go every way that a vocabulary goes."""
    with pytest.MonkeyPatch.context() as patch, use("triton"):
        patch.setattr(module, "CAPACITY", capacity)
        patch.setattr(module, "CHUNK", chunk)
        patch.setattr(module, "BLOCK", block)
        holds(params, logits, seed, device)


@given(batches(st.integers(1, 400)))
def test_torch_path_draws_what_sample_draws(batch):
    with use("torch"):
        holds(*batch)


@given(batches(st.integers(1, 400)))
def test_reference_draws_what_sample_draws(batch):
    with use("reference"):
        holds(*batch)


@settings(max_examples=60 if GPU else 40)
@given(batches(st.integers(1, 600)))
def kernels_draw(device, batch):
    triton_holds(*batch, device=device)


def test_kernels_draw_what_sample_draws(device):
    kernels_draw(device)
