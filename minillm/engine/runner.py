"""From a batch to the next tokens: the model, its cache, and sampling."""

import torch

from ..cache.paged import PagedCache
from ..model import Transformer
from ..sampling import sample
from .batch import make_batch
from .request import Request

__all__ = ["Runner"]


class Runner:
    """Runs batches of one model on its device, with a cache of `num_blocks` blocks."""

    def __init__(self, model: Transformer, num_blocks: int, block_size: int) -> None:
        self.model = model
        weight = model.embed_tokens.weight
        self.device = weight.device
        self.cache = PagedCache(model.config, num_blocks, block_size, weight.device, weight.dtype)

    @torch.inference_mode()
    def run(self, scheduled: list[tuple[Request, int]], copies: list[tuple[int, int]]) -> dict[Request, int]:
        """Compute a step -> the next token of each request whose tokens are now all computed."""
        self.cache.copy(copies)
        batch = make_batch(scheduled, self.cache.block_size, self.device)
        hidden_states = self.model(batch.token_ids, batch, self.cache)  # [N, hidden]
        ready = [i for i, (r, count) in enumerate(scheduled) if r.num_computed + count == r.num_tokens]
        if not ready:
            return {}
        logits = self.model.logits(hidden_states[batch.last[ready]])  # [len(ready), vocab]
        requests = [scheduled[i][0] for i in ready]
        tokens = sample(logits, [r.params for r in requests], [r.tokens() for r in requests])
        return dict(zip(requests, tokens.tolist(), strict=True))
