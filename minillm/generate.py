"""Plain generation: the oracle that every faster way must agree with, and the same loop with a cache.

`naive` recomputes the whole sequence for every token. That is slow (chapter 6 counts how slow) and obviously right.
`cached` computes each token once. `cached_batch` takes several sequences through the same steps: static batching.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .cache.contiguous import ContiguousCache
from .kernels import gumbel_noise
from .model import Transformer
from .model.layers import NoCache
from .sampling import SamplingParams, apply_logit_bias, new_seed, sample

__all__ = ["Token", "cached", "cached_batch", "naive", "occupancy", "prompt_logprobs", "token_logprobs"]


class Token(int):
    """A generated token id. `is_end`: it ends the text and is no part of it. `logprobs` holds {token id: log
    probability} of the best candidates and of the token itself, when asked for.
    """

    is_end: bool = False
    logprobs: dict[int, float] | None = None


def naive(
    model: Transformer,
    token_ids: list[int],
    params: SamplingParams,
    max_model_len: int | None = None,
    window: int = 0,
) -> Iterator[Token]:
    """Generate token ids after `token_ids`, one at a time, the end token included; computes everything every time.

    Stops after `params.max_tokens` tokens, at an end token (unless `ignore_eos`), at one of `stop_token_ids`, or when
    the sequence is `max_model_len` tokens long. With `window=W` a token attends to the last W tokens. Log
    probabilities are those of the model, before temperature and filters, as in vLLM.
    """
    cache = NoCache(window or model.config)

    def last_logits(running: list[_Sequence]) -> Tensor:
        token_ids = torch.tensor([running[0].token_ids], device=model.device)  # [1, T]
        return model.logits(model(token_ids, cache=cache)[:, -1])  # [1, vocab]

    for [step] in _steps([_Sequence(model, token_ids, params, max_model_len)], last_logits):
        yield step


def cached(
    model: Transformer,
    token_ids: list[int],
    params: SamplingParams,
    max_model_len: int | None = None,
    window: int = 0,
) -> Iterator[Token]:
    """As `naive`, each token computed once: the prompt in one step, then one token a step.

    The cache grows as needed; with `window=W` it holds W tokens and no more.
    """
    running = [_Sequence(model, token_ids, params, max_model_len)]
    for [step] in _steps(running, _with_cache(model, running, window)):
        yield step


def cached_batch(
    model: Transformer,
    prompts: Sequence[list[int]],
    params: SamplingParams | Sequence[SamplingParams],
    max_model_len: int | None = None,
    window: int = 0,
) -> list[list[int]]:
    """As `cached` for several prompts at once, one `SamplingParams` for all or one each: static batching.

    All prompts start together, and the batch ends with the longest output. Who is done earlier keeps its row and its
    memory and brings no more tokens: `occupancy` says how many rows did. Raises ValueError for an empty batch or
    prompt.
    """
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if not prompts or len(each) != len(prompts):
        raise ValueError(
            f"params: expected one for all or one each of 1 prompt or more, got {len(each)} and {len(prompts)}"
        )
    running = [_Sequence(model, ids, p, max_model_len) for ids, p in zip(prompts, each, strict=True)]
    able = [sequence for sequence in running if not sequence.is_done]  # not already as long as the model can take
    if able:
        for _ in _steps(able, _with_cache(model, able, window)):
            pass
    return [sequence.token_ids[sequence.prompt_length :] for sequence in running]


def occupancy(outputs: Sequence[Sequence[int]]) -> float:
    """The share of a static batch's row-steps that gave a token: it runs max(lengths) steps of len(outputs) rows."""
    lengths = [len(output) for output in outputs]
    return sum(lengths) / (len(lengths) * max(lengths)) if any(lengths) else 1.0


# ---- what all three share ------------------------------------------------------------------------------------------


class _Sequence:
    """A sequence and how its next token is chosen."""

    def __init__(
        self, model: Transformer, token_ids: list[int], params: SamplingParams, max_model_len: int | None
    ) -> None:
        if not token_ids:
            raise ValueError("token_ids: expected at least one token, got an empty prompt")
        if params.structured_outputs is not None:
            raise ValueError("structured_outputs: expected none, as only the engine keeps a form; use LLM or Engine")
        self.token_ids, self.prompt_length, self.params = list(token_ids), len(token_ids), params
        self.limit = max_model_len or model.config.max_position_embeddings
        self.ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(model.config.eos_token_ids))
        self.seed = torch.tensor([new_seed() if params.seed is None else params.seed], device=model.device)
        self.ended = False

    @property
    def count(self) -> int:
        return len(self.token_ids) - self.prompt_length

    @property
    def is_done(self) -> bool:
        return self.ended or self.count >= self.params.max_tokens or len(self.token_ids) >= self.limit

    def take(self, logits: Tensor) -> Token:
        """Choose a token and append it.  logits [1, vocab]"""
        params, allowed = self.params, apply_logit_bias(logits[0], self.params.logit_bias)[None].clone()
        if self.count < params.min_tokens and self.ends:
            allowed[:, sorted(self.ends)] = float("-inf")  # too early to end
        position = torch.tensor([len(self.token_ids)], device=logits.device)
        noise = gumbel_noise(self.seed, position, logits.shape[1]) if params.temperature else None
        output = self.token_ids[self.prompt_length :]
        token = Token(sample(allowed, params, [self.token_ids], output_token_ids=[output], noise=noise).item())
        token.is_end = self.ended = int(token) in self.ends
        if params.logprobs is not None:
            token.logprobs = token_logprobs(logits[0], int(token), params.logprobs)
        self.token_ids.append(int(token))
        return token


@torch.inference_mode()
def _steps(running: list[_Sequence], last_logits: Callable[[list[_Sequence]], Tensor]) -> Iterator[list[Token]]:
    """The loop: logits of every sequence's last token [B, vocab], then a token for each that is not done."""
    while not all(sequence.is_done for sequence in running):
        logits = last_logits(running)
        yield [s.take(logits[i : i + 1]) for i, s in enumerate(running) if not s.is_done]


def _with_cache(model: Transformer, running: list[_Sequence], window: int) -> Callable[[list[_Sequence]], Tensor]:
    """The logits of the last tokens, from a cache of all before: computes only what is not cached yet."""
    cache = ContiguousCache(model.config, len(running), window=window, device=model.device, dtype=model.dtype)

    def last_logits(running: list[_Sequence]) -> Tensor:
        new = [s.token_ids[n:] for s, n in zip(running, cache.lengths, strict=True)]
        batch = cache.extend([len(ids) for ids in new])
        longest = batch.positions.shape[1]
        rectangle = [ids + [0] * (longest - len(ids)) for ids in new]  # padded on the right
        hidden_states = model(torch.tensor(rectangle, device=model.device), batch, cache)  # [B, T, hidden]
        every = torch.arange(len(new), device=model.device)
        return model.logits(hidden_states[every, batch.last])  # [B, vocab]

    return last_logits


@torch.inference_mode()
def prompt_logprobs(model: Transformer, token_ids: list[int], count: int) -> list[dict[int, float] | None]:
    """For each token of a prompt what the model thought of it: {token id: log probability} of the `count` best
    candidates and of the token itself, after all tokens before it; None for the first, which nothing precedes.
    """
    hidden_states = model(torch.tensor([token_ids], device=model.device))[0]  # [T, hidden]
    logits = model.logits(hidden_states[:-1])  # [T - 1, vocab]
    return [None, *(token_logprobs(row, token, count) for row, token in zip(logits, token_ids[1:], strict=True))]


def token_logprobs(logits: Tensor, token: int, count: int) -> dict[int, float]:
    """The `count` best candidates' log probabilities, and the chosen token's.  logits [vocab]"""
    logprobs = logits.float().log_softmax(-1)
    best = logprobs.topk(count).indices.tolist() if count else []
    return {i: float(logprobs[i]) for i in dict.fromkeys([*best, token])}
