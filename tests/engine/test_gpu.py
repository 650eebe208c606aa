"""On a GPU, with CUDA graphs and a step on its way: fp32 exact, bf16 within what its rounding explains."""

import random

import pytest
import torch

from minillm.config import ModelConfig
from minillm.engine.engine import Engine
from minillm.generate import naive
from minillm.model import Transformer
from minillm.sampling import SamplingParams

from .conftest import assert_home, run

pytestmark = pytest.mark.gpu


def model_of(dtype: torch.dtype, qk_norm: bool, std: float) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(500, 128, 256, 3, 4, 2, 32, max_position_embeddings=512, qk_norm=qk_norm, eos_token_ids=(7,))
    model = Transformer(config)
    model.reset_parameters(std=std)
    return model.to("cuda", dtype).eval().requires_grad_(False)


def jobs(count: int) -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(1)
    kinds = [
        {"temperature": 0},
        {"temperature": 0},
        {"temperature": 0.9},
        {"temperature": 1.1, "top_p": 0.9, "min_p": 0.01},
    ]
    start = [rng.randrange(500) for _ in range(40)]
    return [
        (
            start[: rng.choice([0, 17, 40])] + [rng.randrange(500) for _ in range(rng.randint(1, 150))],
            SamplingParams(seed=i, max_tokens=rng.randint(1, 60), **kinds[i % 4]),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("options", [{}, {"async_scheduling": False}, {"enforce_eager": True}, {"num_blocks": 60}])
def test_fp32_is_the_oracle(qk_norm, options):
    """64 requests, mixed batches, chunks, shared prefixes, with 60 blocks also preemption."""
    model = model_of(torch.float32, qk_norm, std=0.2)
    engine = Engine(model, **{"num_blocks": 600, "max_num_seqs": 24, "max_num_batched_tokens": 200, **options})
    requests = [(engine.requests[engine.add_request(p, q)], p, q) for p, q in jobs(64)]
    run(engine)
    assert_home(engine)
    assert (engine.metrics.num_preemptions > 0) == ("num_blocks" in options)
    for request, prompt, params in requests:
        assert request.error is None
        assert request.output_token_ids == [int(t) for t in naive(model, prompt, params)]


def test_bf16_greedy_is_explained_by_rounding():
    """Each token's fp32 logit is the largest, or so near it that 2.5 times bf16's error covers the rest.

    Two logits may each be off by the error; the engine's order of sums differs from that of the model alone.
    """
    rounded, exact = model_of(torch.bfloat16, False, std=0.1), model_of(torch.float32, False, std=0.1)
    exact.load_state_dict({k: v.float() for k, v in rounded.state_dict().items()})
    engine = Engine(rounded, num_blocks=600, max_num_seqs=24, max_num_batched_tokens=200)
    greedy = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    requests = [engine.requests[engine.add_request(p, greedy)] for p, _ in jobs(32)]
    run(engine)
    equal = total = 0
    for request in requests:
        ids = torch.tensor([request.tokens()], device="cuda")
        with torch.inference_mode():
            logits = exact.logits(exact(ids))[0, len(request.prompt_token_ids) - 1 : -1]  # [T, vocab]
            error = (rounded.logits(rounded(ids))[0, len(request.prompt_token_ids) - 1 : -1] - logits).abs().max()
        chosen = logits.gather(1, torch.tensor(request.output_token_ids, device="cuda")[:, None])[:, 0]
        margin = logits.max(-1).values - chosen
        assert margin.max() <= 2.5 * error
        equal, total = equal + int((margin == 0).sum()), total + len(margin)
    assert equal > 0.9 * total


def test_memory_that_does_not_suffice_says_what_to_lower():
    model = model_of(torch.float32, False, std=0.1)
    with pytest.raises(
        MemoryError, match="lower max_model_len, max_num_batched_tokens or max_num_seqs, or raise gpu_mem"
    ):
        Engine(model, max_model_len=512, gpu_memory_utilization=0.001)
