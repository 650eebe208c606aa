"""Layers of few bits in the engine: with graphs, chunks and preemption the tokens of the model alone."""

import pytest
import torch

from minillm.engine.engine import Engine
from minillm.quant.methods import ON_THE_FLY, on_the_fly

from .conftest import assert_home, run
from .test_gpu import DEVICES, GREEDY, add_all, assert_explained, assert_oracles, jobs, model_of, rounded_and_exact

OPTIONS = {"num_blocks": 40, "max_num_seqs": 8, "max_num_batched_tokens": 60}


def quantized(device: str, kind: str, dtype: torch.dtype = torch.float32):
    model = model_of(dtype, device=device)
    on_the_fly(model, kind)
    assert model.config.quantization_config is not None
    return model


def served(model, todo, **options) -> list[list[int]]:
    engine = Engine(model, **{**OPTIONS, **options})
    requests = add_all(engine, todo)
    run(engine)
    assert_home(engine)
    return [request.output_token_ids for request in requests]


@pytest.mark.gpu  # on a CPU torch's packed products round x to bf16, which turns the last bit into the eighth
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_weights_in_few_bits_give_the_tokens_of_the_model_alone(kind):
    model = quantized("cuda", kind)
    engine = Engine(model, **OPTIONS)
    requests = add_all(engine, jobs(12, 40, 12))
    run(engine)
    assert_oracles(model, requests)
    assert_home(engine)


@pytest.mark.parametrize("kind", ON_THE_FLY)
def test_every_request_comes_home(kind):
    assert all(served(quantized("cpu", kind), jobs(4, 40, 8)))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["int4", "int8", "w8a8"])
def test_graphs_change_no_token(kind):
    """One after another, so that a step without graphs has the tiles of one with them."""
    model, todo = quantized("cuda", kind), jobs(6, 60, 20)
    alone = [served(model, [one], max_num_batched_tokens=200) for one in todo]
    assert alone == [served(model, [one], max_num_batched_tokens=200, enforce_eager=True) for one in todo]


@DEVICES
@pytest.mark.parametrize("kind", ON_THE_FLY)
def test_bf16_greedy_is_explained_by_rounding(kind, device):
    """What is rounded to 8 bits in every layer turns another order of sums into another eighth bit."""
    if kind == "fp8" and device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 on this GPU")
    rounded, exact = (on_the_fly(model, kind) for model in rounded_and_exact(device))
    engine = Engine(rounded, num_blocks=600, max_num_seqs=24, max_num_batched_tokens=200)
    requests = add_all(engine, [(p, GREEDY) for p, _ in (jobs(32) if device == "cuda" else jobs(6, longest=40))])
    run(engine)
    assert_home(engine)
    assert_explained(rounded, exact, requests, largest=0.6)
