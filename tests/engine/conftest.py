"""A tiny model, its oracle, and a driver that plays a schedule and checks what must hold whatever happened."""

import functools

import pytest
import torch

from minillm.config import ModelConfig
from minillm.engine.engine import Engine
from minillm.engine.runner import Runner
from minillm.generate import naive
from minillm.model import Transformer
from minillm.sampling import SamplingParams

VOCAB, CONTEXT = 50, 64


@functools.cache
def tiny_model(device: str = "cpu") -> Transformer:
    """Weights so large that no two logits come near each other; the end token comes up now and then."""
    torch.manual_seed(0)
    config = ModelConfig(VOCAB, 16, 24, 2, 4, 2, 8, max_position_embeddings=CONTEXT, eos_token_ids=(7,))
    model = Transformer(config).eval().requires_grad_(False)
    model.reset_parameters(std=0.4)
    return model.to(device)


@pytest.fixture
def model() -> Transformer:
    return tiny_model()


@functools.cache
def oracle(prompt: tuple[int, ...], params: SamplingParams, limit: int, device: str = "cpu") -> list[int]:
    """What one request gives alone, with everything recomputed for every token."""
    return [int(t) for t in naive(tiny_model(device), list(prompt), params, limit)]


@pytest.fixture
def broken_sampling(monkeypatch) -> None:
    """Drawing raises for whoever asks for a filter."""
    choose = Runner._choose

    def broken(self, logits, filtered):
        if filtered:
            raise ValueError("top-k")
        return choose(self, logits, filtered)

    monkeypatch.setattr(Runner, "_choose", broken)


def run(engine: Engine, steps: int = 2000) -> None:
    """Step until nothing is left."""
    for _ in range(steps):
        if not engine.has_unfinished():
            return
        engine.step()
    raise AssertionError("hangs")


def assert_home(engine: Engine) -> None:
    """Nothing runs, nothing waits, every block and every row came home."""
    assert not engine.requests
    assert not engine.scheduler.running
    assert not engine.scheduler.waiting
    assert engine.pool.num_used == 0
    assert not any(engine.pool.references)
    assert sorted(engine.scheduler.free_rows) == list(range(engine.scheduler.max_num_seqs))
