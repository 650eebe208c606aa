"""Who computes what in the next step. No phases: prompts, chunks of prompts and decoding are one loop.

Every request has `num_tokens` tokens, and `num_computed` of them are in the cache; scheduling a request means giving it
some of the step's token budget to close the gap. A decoding request has a gap of 1. A fresh prompt has a gap of its
length, less what the prefix cache holds; a preempted request has a gap of all it has. The budget cuts long gaps into
chunks. Running requests come first, so that a long prompt never stops those that decode.

When the blocks do not suffice, the running request that goes last gives all of its own back, and starts over later
from its tokens (preemption by recomputing). The request that goes first is never preempted for another, so something
always gets done. Source: the scheduler of vLLM's V1 engine, 2025.

A block that the step will fill is published while it is scheduled: a request that comes with the same beginning in the
same step shares it. Should the step fail, whoever launched it takes the name back (`BlockTable.unpublish`).
"""

import bisect
import time

from ..adapters.serving import AdapterSlots
from ..cache.blocks import BlockPool, OutOfBlocks
from .metrics import EngineMetrics
from .request import Request

__all__ = ["Copies", "Scheduled", "Scheduler"]

Scheduled = list[tuple[Request, int]]
Copies = list[tuple[int, int]]


class Scheduler:
    """Requests that wait and requests that run, over one pool of blocks.

    max_num_seqs: requests that run at once. max_num_batched_tokens: the budget, in tokens a step. slots: for adapters;
    who wants one runs once it has a slot, and until then nobody who came later and wants one goes in front of it.
    """

    def __init__(
        self, pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int, metrics: EngineMetrics | None = None,
        slots: AdapterSlots | None = None,
    ) -> None:  # fmt: skip
        for name, value in (("max_num_seqs", max_num_seqs), ("max_num_batched_tokens", max_num_batched_tokens)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer, 1 or more, got {value!r}")
        self.pool, self.max_num_seqs, self.max_num_batched_tokens = pool, max_num_seqs, max_num_batched_tokens
        self.waiting: list[Request] = []  # both in order of precedence
        self.running: list[Request] = []
        self.failed: list[tuple[Request, Exception]] = []  # who could not be scheduled, and why: for the engine
        self.free_rows = list(range(max_num_seqs))[::-1]
        self.metrics, self.slots = metrics or EngineMetrics(), slots
        self.metrics.watch(self)

    def add(self, request: Request) -> None:
        """Let a request wait for its turn."""
        bisect.insort(self.waiting, request, key=lambda r: r.precedence)

    def schedule(self) -> tuple[Scheduled, Copies]:
        """The next step: (request, number of its tokens) pairs, and the blocks to copy first, as (from, to).

        `num_computed` still counts the tokens before the step; `advance` moves it on.
        """
        scheduled: dict[Request, int] = {}
        copies: dict[int, int] = {}  # to -> from; a block that changed hands twice in this step counts once
        budget, index, preempted = self.max_num_batched_tokens, 0, self.metrics.num_preemptions
        while index < len(self.running) and budget:  # whoever is preempted on the way stands behind `index`
            request = self.running[index]
            known, start = len(request.output_token_ids) + request.num_pending, request.num_computed
            if known < request.max_tokens:  # else only its last token is still on the way
                count = min(request.num_prompt_tokens + known - start + request.drafts, budget)
                try:  # mostly there is nothing to do: one more token in a block of its own
                    if not (count == 1 and request.table.has_room(start)):
                        count = self._make_room(request, count, copies)
                    if not count:
                        break
                except Exception as error:
                    self._fail(request, error)
                    continue
                scheduled[request] = count
                budget -= count
            index += 1
        # Who was preempted a moment ago would come straight back and take blocks that the others need next; and its
        # last token may still be on the device alone.
        if budget and self.waiting and self.metrics.num_preemptions == preempted:
            self._admit(scheduled, budget, copies)
        return list(scheduled.items()), [(old, new) for new, old in copies.items()]

    def _admit(self, scheduled: dict[Request, int], budget: int, copies: dict[int, int]) -> None:
        """Let waiting requests run, while there are rows, tokens of the budget, and blocks."""
        held_up = False  # by adapters whose slots others hold
        for request in list(self.waiting):
            if not budget or not self.free_rows:
                break
            if self._waits_for_parent(request) or (held_up and request.adapter is not None):
                continue
            try:
                if not self._has_adapter(request):
                    held_up = True
                    continue
                self._take_prefix(request)
                count = min(request.num_tokens - request.num_computed, budget)
                self._extend(request, count, copies)
            except OutOfBlocks:
                self._give_back(request)
                break
            except Exception as error:
                self._fail(request, error)
                continue
            request.row = self.free_rows.pop()
            bisect.insort(self.running, request, key=lambda r: r.precedence)
            try:
                if not request.admission_time:
                    self._admitted_first(request)
            except Exception as error:
                self._fail(request, error)
                continue
            scheduled[request] = count
            budget -= count
        self.waiting = [r for r in self.waiting if r.row < 0]

    def _has_adapter(self, request: Request) -> bool:
        """Whether the device has its adapter, which it holds from now on, if it wants one."""
        if request.adapter is None or self.slots is None:
            return True
        slot = self.slots.take(request.adapter)
        if slot is None:
            return False
        request.slot, request.options["adapter"] = slot, slot + 1
        return True

    def _admitted_first(self, request: Request) -> None:
        """Count what its prompt found in the cache: once, as what it finds after a preemption is its own."""
        request.num_cached, request.admission_time = request.num_computed, time.perf_counter()
        self.metrics.admitted(request)

    def _waits_for_parent(self, request: Request) -> bool:
        """One of several completions of a prompt waits until the first has computed it."""
        parent = request.parent
        if parent is None or parent.finished:
            return False
        return parent.num_computed < len(parent.prompt_token_ids)

    def _take_prefix(self, request: Request) -> None:
        """Start from blocks that hold the beginning of the request already: its parent's, or published ones."""
        parent = request.parent
        if request.params.prompt_logprobs is not None:
            request.num_computed = 0  # what is not computed has no logits
        elif parent is not None and parent.row >= 0 and not request.output_token_ids:
            request.table = parent.table.fork(len(request.prompt_token_ids))
            request.num_computed = len(request.prompt_token_ids) - 1  # the last one's output is the next token
        else:
            request.num_computed = request.table.match_prefix(request.tokens())

    def _make_room(self, request: Request, count: int, copies: dict[int, int]) -> int:
        """Blocks for `count` more tokens, if need be those of requests that go behind -> for how many; 0: it went
        itself. Guesses are not worth anybody's blocks: they are left out first.
        """
        while True:
            try:
                self._extend(request, count, copies)
                return count
            except OutOfBlocks:
                if request.most(count) > 1:
                    count = request.num_tokens - request.num_computed
                    continue
                victim = self.running[-1]
                self.preempt(victim)
                if victim is request:
                    return 0

    def _extend(self, request: Request, count: int, copies: dict[int, int]) -> None:
        """Blocks for the tokens; full ones get a name, if their tokens are known: never one with a guess in it."""
        table, start = request.table, request.num_computed
        stop = start + count
        for old, new in table.extend(start, stop):
            copies[new] = old
        if stop // self.pool.block_size > len(table.hashes) and self.pool.enable_prefix_caching:
            table.publish(request.tokens(), stop)

    def preempt(self, request: Request) -> None:
        """Take a running request's blocks; it waits again, and will be computed anew from its tokens."""
        self.running.remove(request)
        self._give_back(request)
        request.num_preemptions += 1
        self.metrics.num_preemptions += 1
        self.add(request)

    def _give_back(self, request: Request) -> None:
        request.table.free()
        request.num_computed, request.on_device = 0, False
        if request.slot >= 0 and self.slots is not None:
            self.slots.give_back(request.slot)
            request.slot = -1
        if request.row >= 0:
            self.free_rows.append(request.row)
            request.row = -1

    def _fail(self, request: Request, error: Exception) -> None:
        """What went wrong concerns this request alone."""
        request.table.unpublish(request.num_computed // self.pool.block_size)
        self.remove(request)
        self.failed.append((request, error))

    def advance(self, scheduled: Scheduled) -> None:
        """The step was launched: count its tokens, and the most that it gives whom."""
        for request, count in scheduled:
            if request.row < 0:
                continue  # ended while it was launched
            most = request.most(count)
            request.num_computed += count
            request.num_pending += most

    def remove(self, request: Request) -> None:
        """A request is finished, or not wanted any more; its blocks come home."""
        queue = self.running if request.row >= 0 else self.waiting
        if request in queue:
            queue.remove(request)
        self._give_back(request)
