"""An engine whose cache has 8 bits gives what a loop gives that recomputes everything with rounded keys and values.

Rounding is a function of a token's own key and value, and every token is attended to as it is stored, so prefixes that
are found, chunks, preemption and copies change nothing: in exact arithmetic. In floating point a batch of another size
gives a key that may differ in its last bits, and one that lies so close to the middle of two steps is stored a step
apart, which all later layers see. The tokens here are the same because this model's logits lie further apart.
"""

import contextlib
import dataclasses
import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from minillm import generate
from minillm.engine.engine import Engine
from minillm.kernels import use
from minillm.model.layers import NoCache, NoCacheLayer
from minillm.sampling import SamplingParams

from .conftest import KINDS, Letters, assert_home, run, tiny_model
from .test_exact import ARRIVALS, ENGINES, Arrival, Player, one_thread

__all__ = ["one_thread"]
STORED = ["int8", "fp8"]


def fake(x: torch.Tensor, stored: str) -> torch.Tensor:
    """What a cache gives back, written out: the nearest of a head's 256 steps, or of fp8's numbers by halving."""
    largest = x.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    if stored == "int8":
        step = largest / 127.5
        return torch.round(x / step).clamp(-128, 127) * step
    y = x / largest * 448
    step = 2.0 ** (y.abs().clamp(min=2**-6).log2().floor() - 3)  # three bits after the leading one
    return torch.round(y / step) * step * largest / 448


class Rounded(NoCacheLayer):
    """Attends to rounded keys and values."""

    stored = ""

    def attend(self, q, k, v, batch):
        return super().attend(q, fake(k, self.stored), fake(v, self.stored), batch)


@functools.cache
def rounded_oracle(prompt, params, limit, kind, stored) -> list:
    """`naive`, with such layers."""

    class Cache(NoCache):
        def __init__(self, config):
            layer = type("Layer", (Rounded,), {"stored": stored})
            self.layers = [layer(config.window(i)) for i in range(config.num_hidden_layers)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "NoCache", Cache)
        return list(generate.naive(tiny_model("cpu", kind), list(prompt), params, limit))


class RoundedPlayer(Player):
    """Knows what each request must give when keys and values are rounded."""

    def free(self, prompt, params):
        return rounded_oracle(prompt, params, self.engine.max_model_len, self.kind, self.engine.config.kv_cache_dtype)


def play(arrivals, device="cpu", kind="plain", **options) -> Engine:
    """Log probabilities are left to the engine of full precision: they move with a step."""
    plain = [dataclasses.replace(a, logprobs=None, prompt_logprobs=None) for a in arrivals]
    engine = Engine(tiny_model(device, kind), enforce_eager=True, tokenizer=Letters(), **options)
    player = RoundedPlayer(engine, plain, device, kind)
    for started in player.play():
        player.check(started)
    assert_home(engine)
    return engine


def drawn(device: str, arrivals: list, e, stored: str) -> None:
    play(
        arrivals, device, e.kind, num_blocks=e.num_blocks, block_size=e.block_size, max_num_seqs=e.max_num_seqs,
        max_num_batched_tokens=e.budget, enable_prefix_caching=e.prefix_caching, async_scheduling=e.async_scheduling,
        kv_cache_dtype=stored,
    )  # fmt: skip


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("stored", STORED)
def test_schedules(stored):
    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    @given(ARRIVALS, ENGINES)
    def inner(arrivals, e):
        drawn("cpu", arrivals, e, stored)

    inner()


@pytest.mark.gpu
@pytest.mark.parametrize("stored", STORED)
def test_schedules_on_a_gpu(stored):
    @settings(max_examples=15, suppress_health_check=list(HealthCheck))
    @given(ARRIVALS, ENGINES)
    def inner(arrivals, e):
        drawn("cuda", arrivals, e, stored)

    inner()


LONG = tuple(range(1, 14))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", STORED)
def test_a_prefix_found_preemption_and_copies(stored, kind):
    """Each happens, and the tokens are the oracle's."""
    engine = play([Arrival(LONG), Arrival((*LONG, 20), at=20)], kind=kind, block_size=4, kv_cache_dtype=stored)
    assert engine.metrics.num_cached_tokens == 12
    arrivals = [Arrival((*LONG[:5], i), max_tokens=12, ignore_eos=True) for i in range(4)]
    engine = play(arrivals, kind=kind, block_size=2, num_blocks=22, max_num_batched_tokens=7, kv_cache_dtype=stored)
    assert engine.metrics.num_preemptions
    copied = []
    with pytest.MonkeyPatch.context() as patch:
        from minillm.cache.paged import PagedCache

        copy = PagedCache.copy
        patch.setattr(PagedCache, "copy", lambda self, pairs: copied.extend(pairs) or copy(self, pairs))
        play([Arrival(LONG[:6], n=3, kind="sampled")], kind=kind, block_size=4, kv_cache_dtype=stored)
    assert copied


@pytest.mark.parametrize("stored", STORED)
def test_log_probabilities_are_the_oracles_and_not_the_models(stored):
    """Of the token after a prompt in one chunk, where the last bits are alike, too."""
    engine = Engine(tiny_model(), kv_cache_dtype=stored, block_size=4)
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=3)
    [request] = engine.add(list(LONG), params)
    run(engine)
    [token] = rounded_oracle(LONG, params, 64, "plain", stored)
    [exact] = generate.naive(tiny_model(), list(LONG), params, 64)
    assert request.logprobs[0] == pytest.approx(token.logprobs, abs=1e-4)
    assert max(abs(token.logprobs[i] - exact.logprobs[i]) for i in exact.logprobs) > 1e-3


@pytest.mark.parametrize("stored", STORED)
def test_triton_kernels_in_an_engine(stored):
    """fp8 is written by torch here: the interpreter rounds to fp8 wrongly."""
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    engine = Engine(tiny_model(), kv_cache_dtype=stored, block_size=4, enforce_eager=True, num_blocks=16)
    [request] = engine.add(list(LONG), params)
    with contextlib.ExitStack() as stack:
        for name in ("paged_attention", "rope", "rope_and_cache")[: 3 if stored == "int8" else 1]:
            stack.enter_context(use("triton", name))
        run(engine)
    assert request.error is None
    assert request.output_token_ids == [int(t) for t in rounded_oracle(LONG, params, 64, "plain", stored)]


def test_engines_of_other_dtypes_share_no_block():
    roots = {Engine(tiny_model(), kv_cache_dtype=name)._root("") for name in ("auto", "float16", *STORED)}
    assert len(roots) == 4


def test_the_cache_on_a_cpu_holds_more_tokens():
    blocks = {}
    with pytest.MonkeyPatch.context() as patch:
        import minillm.engine.engine as module

        patch.setattr(module, "CPU_CACHE_BYTES", 60_000)
        for name in ("float32", "int8"):
            engine = Engine(tiny_model(), kv_cache_dtype=name, max_num_seqs=512)
            blocks[name] = engine.runner.cache.num_blocks
            assert engine.runner.cache.nbytes <= 60_000 < engine.runner.cache.nbytes + engine.runner.block_bytes
    assert blocks["int8"] == pytest.approx(
        blocks["float32"] * 32 / 12, abs=2
    )  # 8 numbers of 4 bytes; of 1, and a scale


def test_fp8_needs_a_gpu_that_has_it(monkeypatch):
    from minillm.engine.runner import _cache_dtype

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ValueError, match=r"kv_cache_dtype: fp8 needs a GPU of compute capability 8.9 .*A100; int8"):
        _cache_dtype("fp8", torch.bfloat16, torch.device("cuda"))
    assert _cache_dtype("int8", torch.bfloat16, torch.device("cuda")) == torch.int8
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match="kv_cache_dtype: bfloat16 needs a GPU of compute capability 8.0 or later"):
        _cache_dtype("bfloat16", torch.float16, torch.device("cuda"))
    assert _cache_dtype("auto", torch.float16, torch.device("cuda")) == torch.float16
