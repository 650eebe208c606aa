"""Plain generation, one sequence at a time: the oracle that every faster way must agree with.

`naive` recomputes the whole sequence for every token. That is slow (chapter 6 counts how slow) and obviously right.
"""

from collections.abc import Iterator

import torch

from .model import Transformer
from .sampling import SamplingParams, sample

__all__ = ["Step", "naive"]


class Step(int):
    """A generated token id. `is_end`: it ends the text and is no part of it. `logprobs` holds {token id: log
    probability} of the best candidates and of the token itself, when asked for.
    """

    is_end: bool = False
    logprobs: dict[int, float] | None = None


@torch.inference_mode()
def naive(
    model: Transformer, token_ids: list[int], params: SamplingParams, max_model_len: int | None = None
) -> Iterator[Step]:
    """Generate token ids after `token_ids`, one at a time, the end token included.

    Stops after `params.max_tokens` tokens, at an end token (unless `ignore_eos`), at one of `stop_token_ids`, or when
    the sequence is `max_model_len` tokens long. Log probabilities are those of the model, before temperature and
    filters, as in vLLM.
    """
    device = model.embed_tokens.weight.device
    limit = max_model_len or model.config.max_position_embeddings
    ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(model.config.eos_token_ids))
    generator = None if params.seed is None else torch.Generator(device).manual_seed(params.seed)
    sequence = list(token_ids)
    for count in range(params.max_tokens):
        if len(sequence) >= limit:
            return
        hidden_states = model(torch.tensor([sequence], device=device))  # [1, T, hidden]
        logits = model.logits(hidden_states[:, -1])  # [1, vocab]
        allowed = logits.clone()
        if count < params.min_tokens and ends:
            allowed[:, sorted(ends)] = float("-inf")  # too early to end
        token = Step(sample(allowed, params, [sequence], generator).item())
        token.is_end = int(token) in ends
        if params.logprobs is not None:
            token.logprobs = _logprobs(logits[0], int(token), params.logprobs)
        yield token
        sequence.append(int(token))
        if token.is_end:
            return


def _logprobs(logits: torch.Tensor, token: int, count: int) -> dict[int, float]:
    """The `count` best candidates' log probabilities, and the chosen token's.  logits [vocab]"""
    logprobs = logits.float().log_softmax(-1)
    best = logprobs.topk(count).indices.tolist() if count else []
    return {i: float(logprobs[i]) for i in dict.fromkeys([*best, token])}
