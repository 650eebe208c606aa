"""A tiny model, its oracle, and a driver that plays a schedule and checks what must hold whatever happened."""

import codecs
import functools
from collections.abc import Sequence

import pytest
import torch

from minillm.config import ModelConfig
from minillm.engine.engine import Engine
from minillm.engine.runner import Runner
from minillm.engine.speculative import SpeculativeRunner
from minillm.generate import Token, naive
from minillm.generate import prompt_logprobs as prompt_logprobs_of
from minillm.model import Transformer
from minillm.model.tokenizer import StreamDecoder
from minillm.sampling import SamplingParams

VOCAB, CONTEXT = 50, 64
# "windows": the first layer sees the last five tokens, the second all.
KINDS = {"plain": {}, "windows": {"sliding_window": 5, "layer_types": ("sliding_attention", "full_attention")}}


@functools.cache
def tiny_model(device: str = "cpu", kind: str = "plain") -> Transformer:
    """Weights so large that no two logits come near each other; the end token comes up now and then."""
    torch.manual_seed(0)
    config = ModelConfig(VOCAB, 16, 24, 2, 4, 2, 8, max_position_embeddings=CONTEXT, eos_token_ids=(7,), **KINDS[kind])
    model = Transformer(config).eval().requires_grad_(False)
    model.reset_parameters(std=0.4)
    return model.to(device)


@pytest.fixture
def model() -> Transformer:
    return tiny_model()


@functools.cache
def oracle_tokens(
    prompt: tuple[int, ...], params: SamplingParams, limit: int, device: str = "cpu", kind: str = "plain"
) -> list[Token]:
    """What one request gives alone, with everything recomputed for every token."""
    return list(naive(tiny_model(device, kind), list(prompt), params, limit))


def oracle(prompt: tuple[int, ...], params: SamplingParams, limit: int, device: str = "cpu") -> list[int]:
    """Those tokens as plain numbers."""
    return [int(token) for token in oracle_tokens(prompt, params, limit, device)]


@functools.cache
def prompt_oracle(prompt: tuple[int, ...], count: int, device: str = "cpu", kind: str = "plain") -> list:
    """Log probabilities of a prompt's tokens, all computed at once."""
    return prompt_logprobs_of(tiny_model(device, kind), list(prompt), count)


class Letters:
    """A tokenizer for the tiny model. Tokens are one to three letters, so that few ones make a stop string; 40 to 45
    are single bytes of "é", "€" and an emoji, in any order; 46 and 47 are hidden; 48 and 49 are beyond the vocabulary.
    """

    eos_token_id = 13  # the model's own is 7: either ends a text
    vocab_size = 48
    _hidden = frozenset({46, 47})

    def token_bytes(self, token: int) -> bytes:
        if token >= 40:
            return [b"\xc3", b"\xa9", b"\xe2", b"\x82", b"\xac", b"\xf0", b"<46>", b"<47>"][token - 40]
        return "ab"[token % 2].encode() + b"cde"[: token % 3]

    def stream_decoder(self, skip_special_tokens: bool = False) -> StreamDecoder:
        return StreamDecoder(self, skip_special_tokens)


def text_oracle(tokens: Sequence[Token], stop: Sequence[str], min_tokens: int) -> tuple[int, str, bool]:
    """How many of the oracle's tokens a request with stop strings gets, its text, and whether a string ended it.

    Looks for every string in the whole text after every token; one that was whole before `min_tokens` does not count.
    """
    decoder, text, seen = codecs.getincrementaldecoder("utf-8")("replace"), "", 0

    def cut() -> int | None:
        found = [text.find(s, max(0, seen - len(s) + 1)) for s in stop]
        return min((at for at in found if at >= 0), default=None)

    for count, token in enumerate(tokens, 1):
        if token.is_end:
            tokens = tokens[:count]
            break
        seen = len(text)
        if token < Letters.vocab_size and token not in Letters._hidden:
            text += decoder.decode(Letters().token_bytes(int(token)))
        if count >= min_tokens and (at := cut()) is not None:
            return count, text[:at], True
    seen = len(text)
    text += decoder.decode(b"", final=True)
    return len(tokens), text[: cut()], False


class FortuneTeller(SpeculativeRunner):
    """Guesses by what it is told (`futures`: sequences), and errs at places that depend on the length alone: as a draft
    model would be right more often than prompt lookup is.
    """

    futures: Sequence[Sequence[int]] = ()

    def guess(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        rows = []
        for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True):
            known = next((list(t) for t in self.futures if list(t[:length]) == row[:length]), [])
            future = (known[length:] + [0] * self.num_guesses)[: self.num_guesses]
            wrong = length % (self.num_guesses + 2)  # 0: it does not err
            rows.append([(t + 1) % VOCAB if i + 1 == wrong else t for i, t in enumerate(future)])
        return torch.tensor(rows, dtype=torch.int32)


class Guessing(Engine):
    """An engine whose guesses are `runner.futures`."""

    runner_class = FortuneTeller


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
