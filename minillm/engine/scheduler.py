"""Who computes what in the next step. No phases: prompts, chunks of prompts and decoding are one loop.

Every request has `num_tokens` tokens, and `num_computed` of them are in the cache; scheduling a request means giving it
some of the step's token budget to close the gap. A decoding request has a gap of 1. A fresh prompt has a gap of its
length, less what the prefix cache holds; a preempted request has a gap of all it has. The budget cuts long gaps into
chunks. Running requests come first, so that a long prompt never stops those that decode.

When the blocks do not suffice, the running request that ranks last gives all of its own back, and starts over later
from its tokens (preemption by recomputing). The request that ranks first is never preempted for another, so something
always gets done. Source: the scheduler of vLLM's V1 engine, 2025.
"""

import bisect

from ..cache.blocks import BlockPool, OutOfBlocks
from .request import Request

__all__ = ["Scheduler"]


class Scheduler:
    """Requests that wait and requests that run, over one pool of blocks.

    max_num_seqs: requests that run at once. max_num_batched_tokens: the budget, in tokens a step.
    """

    def __init__(self, pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        for name, value in (("max_num_seqs", max_num_seqs), ("max_num_batched_tokens", max_num_batched_tokens)):
            if value < 1:
                raise ValueError(f"{name}: expected 1 or more, got {value}")
        self.pool, self.max_num_seqs, self.max_num_batched_tokens = pool, max_num_seqs, max_num_batched_tokens
        self.waiting: list[Request] = []  # both in order of rank
        self.running: list[Request] = []
        self.num_preemptions = 0

    def add(self, request: Request) -> None:
        """Let a request wait for its turn."""
        bisect.insort(self.waiting, request, key=lambda r: r.rank)

    def schedule(self) -> tuple[list[tuple[Request, int]], list[tuple[int, int]]]:
        """The next step: (request, number of its tokens) pairs, and the blocks to copy first.

        `num_computed` still counts the tokens before the step; `advance` moves it on.
        """
        scheduled: dict[Request, int] = {}
        copies: dict[int, int] = {}  # to -> from; a block that changed hands twice in this step counts once
        budget, index, preempted = self.max_num_batched_tokens, 0, self.num_preemptions
        while index < len(self.running) and budget:  # whoever is preempted on the way stands behind `index`
            request = self.running[index]
            count = min(request.num_tokens - request.num_computed, budget)
            if not self._make_room(request, count, copies):
                break
            scheduled[request] = count
            budget, index = budget - count, index + 1
        # Who was preempted a moment ago would come straight back and take blocks that the others need next.
        full = self.num_preemptions > preempted
        while self.waiting and budget and len(self.running) < self.max_num_seqs and not full:
            request = self.waiting[0]
            if not request.table.blocks:
                request.num_computed = request.num_cached = request.table.match_prefix(request.tokens())
            count = min(request.num_tokens - request.num_computed, budget)
            try:
                self._extend(request, count, copies)
            except OutOfBlocks:
                self._give_back(request)
                break
            bisect.insort(self.running, self.waiting.pop(0), key=lambda r: r.rank)
            scheduled[request] = count
            budget -= count
        return list(scheduled.items()), [(old, new) for new, old in copies.items()]

    def _make_room(self, request: Request, count: int, copies: dict) -> bool:
        """Blocks for `count` more tokens, if need be those of requests that rank behind; False: it went itself."""
        while True:
            try:
                self._extend(request, count, copies)
                return True
            except OutOfBlocks:
                victim = self.running[-1]
                self.preempt(victim)
                if victim is request:
                    return False

    def _extend(self, request: Request, count: int, copies: dict) -> None:
        start = request.num_computed
        copies.update((new, old) for old, new in request.table.extend(start, start + count))

    def preempt(self, request: Request) -> None:
        """Take a running request's blocks; it waits again, and will be computed anew from its tokens."""
        self.running.remove(request)
        self._give_back(request)
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.add(request)

    def _give_back(self, request: Request) -> None:
        request.table.free()
        request.num_computed = 0

    def advance(self, scheduled: list[tuple[Request, int]]) -> None:
        """The step was computed: count its tokens, publish the blocks that it filled."""
        for request, count in scheduled:
            request.num_computed += count
            if request.num_computed // self.pool.block_size > len(request.table.hashes):
                request.table.publish(request.tokens(), request.num_computed)

    def remove(self, request: Request) -> None:
        """A request is finished, or not wanted any more; its blocks come home."""
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)
        self._give_back(request)
