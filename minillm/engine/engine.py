"""The loop: schedule, run, take in the tokens."""

import itertools

from ..cache.blocks import BlockPool, BlockTable
from ..model import Transformer
from ..sampling import SamplingParams
from .request import Request
from .runner import Runner
from .scheduler import Scheduler

__all__ = ["Engine"]


class Engine:
    """Many requests at once over one model.

        engine = Engine(model, num_blocks=1000)
        engine.add_request([1, 2, 3], SamplingParams(temperature=0))
        while engine.has_unfinished():
            for request in engine.step(): ...     # those that got a token

    num_blocks, block_size: the cache. max_num_seqs: requests that run at once. max_num_batched_tokens: new tokens a
    step, prompts and decoding together. max_model_len: the longest sequence, at most what the cache holds.
    """

    def __init__(
        self, model: Transformer, num_blocks: int, block_size: int = 16, max_num_seqs: int = 256,
        max_num_batched_tokens: int = 8192, max_model_len: int | None = None, enable_prefix_caching: bool = True,
    ) -> None:  # fmt: skip
        self.pool = BlockPool(num_blocks, block_size, enable_prefix_caching)
        self.scheduler = Scheduler(self.pool, max_num_seqs, max_num_batched_tokens)
        self.runner = Runner(model, num_blocks, block_size)
        self.config = model.config
        self.max_model_len = min(max_model_len or self.config.max_position_embeddings, num_blocks * block_size)
        self.requests: dict[str, Request] = {}
        self._order = itertools.count()

    def add_request(
        self, prompt_token_ids: list[int], params: SamplingParams | None = None, request_id: str | None = None,
        priority: int = 0,
    ) -> str:  # fmt: skip
        """Queue a prompt -> the id of the request. A smaller `priority` goes first.

        Raises ValueError for an empty prompt, one that can never fit, and an id that is in use.
        """
        order = next(self._order)
        request_id = str(order) if request_id is None else request_id
        if request_id in self.requests:
            raise ValueError(f"request_id: {request_id!r} is in use; expected a new one")
        if not 1 <= len(prompt_token_ids) < self.max_model_len:
            raise ValueError(
                f"prompt_token_ids: expected 1 to {self.max_model_len - 1} tokens (max_model_len, or what the cache"
                f" holds, less one to generate), got {len(prompt_token_ids)}; shorten it, or give the cache more blocks"
            )
        params = params or SamplingParams()
        request = Request(request_id, list(prompt_token_ids), params, BlockTable(self.pool), order, priority)
        self.requests[request_id] = request
        self.scheduler.add(request)
        return request_id

    def has_unfinished(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self.requests)

    def abort(self, request_id: str) -> bool:
        """Drop a request, whatever it is doing -> whether there was one."""
        request = self.requests.get(request_id)
        if request is not None:
            self._finish(request, "abort")
        return request is not None

    def step(self) -> list[Request]:
        """One step -> the requests that got a token, some of them finished (`finish_reason`)."""
        scheduled, copies = self.scheduler.schedule()
        if not scheduled:
            return []
        tokens = self.runner.run(scheduled, copies)
        self.scheduler.advance(scheduled)
        for request, token in tokens.items():
            request.output_token_ids.append(token)
            if reason := self._stops(request, token):
                self._finish(request, reason)
        return list(tokens)

    def _stops(self, request: Request, token: int) -> str | None:
        params = request.params
        if token in params.stop_token_ids or (not params.ignore_eos and token in self.config.eos_token_ids):
            return "stop"
        full = len(request.output_token_ids) >= params.max_tokens or request.num_tokens >= self.max_model_len
        return "length" if full else None

    def _finish(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        self.scheduler.remove(request)
        del self.requests[request.id]
