"""The loop: schedule, launch, take in the tokens of the step before."""

import itertools
import time
from collections.abc import Sequence

from ..cache.blocks import BlockPool, BlockTable
from ..model import Transformer
from ..model.tokenizer import StreamDecoder, Tokenizer
from ..sampling import SamplingParams, new_seed
from .metrics import EngineMetrics
from .request import Request
from .runner import Runner, Step
from .scheduler import Copies, Scheduled, Scheduler
from .text import StopText

__all__ = ["Engine"]

CPU_CACHE_BYTES = 2 << 30


class Engine:
    """Many requests at once over one model.

        engine = Engine(model)
        engine.add_request([1, 2, 3], SamplingParams(temperature=0))
        while engine.has_unfinished():
            for request in engine.step(): ...     # those that got a token, or ended

    - num_blocks, block_size: the cache; by default what `gpu_memory_utilization` leaves room for, on a CPU 2 GiB.
    - max_num_seqs: requests that run at once. max_num_batched_tokens: new tokens a step, prompts and decoding together
      (8192; on a CPU 512). max_model_len: the longest sequence, at most the model's context and what the cache holds.
    - tokenizer: gives requests their `text`, and is needed for stop strings.
    - enforce_eager: no CUDA graphs. async_scheduling: launch a step before the tokens of the last one are known, so
      that the device never waits for the host (on a GPU); `step` then returns the tokens of the step before.

    Raises ValueError for arguments out of range and MemoryError when the device has no room, saying what to lower.
    """

    def __init__(
        self, model: Transformer, num_blocks: int | None = None, block_size: int = 16, max_num_seqs: int = 256,
        max_num_batched_tokens: int | None = None, max_model_len: int | None = None,
        enable_prefix_caching: bool = True, tokenizer: Tokenizer | None = None, enforce_eager: bool = False,
        async_scheduling: bool | None = None, gpu_memory_utilization: float = 0.9,
    ) -> None:  # fmt: skip
        on_gpu = model.embed_tokens.weight.device.type == "cuda"
        budget = (8192 if on_gpu else 512) if max_num_batched_tokens is None else max_num_batched_tokens
        context = model.config.max_position_embeddings
        _check(block_size, max_num_seqs, budget, max_model_len, context, gpu_memory_utilization)
        self.config, self.tokenizer = model.config, tokenizer
        self.async_scheduling = on_gpu if async_scheduling is None else async_scheduling
        self.max_model_len = max_model_len or context
        self.runner = Runner(model, block_size, max_num_seqs, budget, self.max_model_len)
        num_blocks = self._num_blocks(num_blocks, max_model_len, gpu_memory_utilization)
        self.max_model_len = min(self.max_model_len, num_blocks * block_size)
        self.runner.allocate(num_blocks)
        if on_gpu and not enforce_eager:
            self.runner.capture()
        self._prefix_caching = enable_prefix_caching
        self.metrics = EngineMetrics()
        self.reset()

    def _num_blocks(self, num_blocks: int | None, max_model_len: int | None, utilization: float) -> int:
        size, seqs = self.runner.block_size, self.runner.max_num_seqs
        if num_blocks is None:
            most = seqs * -(-self.max_model_len // size)
            if self.runner.device.type == "cuda":
                room = self.runner.blocks_that_fit(utilization)
            else:
                room = CPU_CACHE_BYTES // self.runner.block_bytes
            num_blocks = min(room, most)
            if num_blocks < -(-(max_model_len or 1) // size):
                raise MemoryError(
                    f"no room for the cache: a sequence of max_model_len ({max_model_len or size}) tokens takes"
                    f" {-(-(max_model_len or 1) // size)} blocks of {size}, and {max(0, room)} fit; lower"
                    " max_model_len, max_num_batched_tokens or max_num_seqs, or raise gpu_memory_utilization"
                )
        if not isinstance(num_blocks, int) or num_blocks < 1:
            raise ValueError(f"num_blocks: expected an integer, 1 or more, got {num_blocks!r}")
        return num_blocks

    def reset(self) -> None:
        """Drop everything: requests, steps on their way, and what the prefix cache holds."""
        for request in list(getattr(self, "requests", {}).values()):
            request.finish_reason = "abort"
        self.pool = BlockPool(self.runner.cache.num_blocks, self.runner.block_size, self._prefix_caching)
        self.scheduler = Scheduler(
            self.pool, self.runner.max_num_seqs, self.runner.max_num_batched_tokens, self.metrics
        )
        self.requests: dict[str, Request] = {}
        self._in_flight: list[Step] = []
        self._order = itertools.count()

    # ---- requests ----------------------------------------------------------------------------------------------------

    def add_request(
        self, prompt_token_ids: Sequence[int], params: SamplingParams | None = None, request_id: str | None = None,
        priority: int = 0,
    ) -> str:  # fmt: skip
        """Queue a prompt -> the id of the request. A smaller `priority` goes first.

        With `params.n` above 1 there are as many requests: "id", "id/1", "id/2", ..., which share the prompt's blocks.
        Raises ValueError for an empty prompt, one that can never fit, ids outside the vocabulary, stop strings without
        a tokenizer, and an id that is in use.
        """
        params, order = params or SamplingParams(), next(self._order)
        request_id = str(order) if request_id is None else request_id
        names = [request_id, *(f"{request_id}/{index}" for index in range(1, params.n))]
        if used := [name for name in names if name in self.requests]:
            raise ValueError(f"request_id: {used[0]!r} is in use; expected a new one")
        if not 1 <= len(prompt_token_ids) < self.max_model_len:
            raise ValueError(
                f"prompt_token_ids: expected 1 to {self.max_model_len - 1} tokens (max_model_len, or what the cache"
                f" holds, less one to generate), got {len(prompt_token_ids)}; shorten it, or give the cache more blocks"
            )
        if min(prompt_token_ids) < 0 or max(prompt_token_ids) >= self.config.vocab_size:
            raise ValueError(f"prompt_token_ids: expected ids in 0..{self.config.vocab_size - 1}")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop: expected none, as this engine has no tokenizer; use stop_token_ids")
        first = None
        for index, name in enumerate(names):
            request = self._request(name, list(prompt_token_ids), params, index)
            request.order, request.priority, request.parent = order, priority, first
            self.requests[name] = request
            self.scheduler.add(request)
            first = first or request
        self.metrics.num_requests += params.n
        return request_id

    def _request(self, name: str, prompt: list[int], params: SamplingParams, index: int) -> Request:
        ends = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else self.config.eos_token_ids)
        seed = new_seed() if params.seed is None else (params.seed + index + 2**63) % 2**64 - 2**63
        decoder = StreamDecoder(self.tokenizer, skip_special_tokens=True) if self.tokenizer else None
        return Request(
            name, prompt, params, BlockTable(self.pool), min(params.max_tokens, self.max_model_len - len(prompt)),
            ends=ends, seed=seed, text_stream=StopText(params.stop, decoder) if decoder else None,
            logprobs=None if params.logprobs is None else [], arrival_time=time.perf_counter(),
        )  # fmt: skip

    def has_unfinished(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self.requests)

    def abort(self, request_id: str) -> bool:
        """Drop a request and its siblings, whatever they are doing -> whether there was one."""
        found = [r for r in self.requests.values() if request_id in (r.id, r.parent.id if r.parent else None)]
        for request in found:
            self._finish(request, "abort")
        return bool(found)

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def step(self) -> list[Request]:
        """One step -> the requests that got a token or ended in an error; some of them are finished."""
        scheduled, copies = self.scheduler.schedule()
        failed: list[Request] = []
        launched = self._launch(scheduled, copies, failed) if scheduled else []
        if self.async_scheduling:
            launched, self._in_flight = self._in_flight, launched
        got = self._take(launched, failed)
        m, scheduler = self.metrics, self.scheduler
        m.running, m.waiting = len(scheduler.running), len(scheduler.waiting)
        m.cache_usage = self.pool.num_used / self.pool.num_blocks
        return got + failed

    def _launch(self, scheduled: Scheduled, copies: Copies, failed: list[Request]) -> list[Step]:
        """Start a step. If it raises, each of its requests is tried alone: who raises again fails, the others go on."""
        self.metrics.num_steps += 1
        self.metrics.num_scheduled_tokens += sum(count for _, count in scheduled)
        try:
            self.runner.cache.copy(copies)
        except Exception as error:  # their blocks do not hold what their tables say
            for request, _ in scheduled:
                self._fail(request, error, failed)
            return []
        try:
            step = self.runner.launch(scheduled)
            self.scheduler.advance(scheduled)
            return [step]
        except Exception:
            steps = []
            for request, count in scheduled:
                try:
                    steps.append(self.runner.launch([(request, count)]))
                    self.scheduler.advance([(request, count)])
                except Exception as error:
                    self._fail(request, error, failed)
            return steps

    def _take(self, steps: list[Step], failed: list[Request]) -> list[Request]:
        """Wait for steps, give their tokens to their requests."""
        got = []
        for step in steps:
            try:
                results = step.read()
            except Exception as error:
                for request in step.requests:
                    self._fail(request, error, failed)
                continue
            results = [result for result in results if not result[0].finished]  # some ended while this was on its way
            now = time.perf_counter()
            self.metrics.got_tokens([request for request, _, _ in results], now)
            for request, token, logprobs in results:
                request.num_pending -= 1
                request.output_token_ids.append(token)
                if request.logprobs is not None:
                    request.logprobs.append(logprobs)
                if reason := self._reads(request, token):
                    self._finish(request, reason)
                got.append(request)
        return got

    def _reads(self, request: Request, token: int) -> str | None:
        """Turn a token into text -> why the request ends here, if it does."""
        request.new_text = ""
        if token in request.ends:
            return "stop"
        if request.text_stream is not None:
            request.new_text = request.text_stream.push(token)
            request.text += request.new_text
            if request.text_stream.stopped:
                return "stop"
        return "length" if len(request.output_token_ids) >= request.max_tokens else None

    def _fail(self, request: Request, error: BaseException, failed: list[Request]) -> None:
        if not request.finished:
            request.error, request.new_text = error, ""
            self._finish(request, "error")
            failed.append(request)

    def _finish(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        if request.text_stream is not None:
            rest = request.text_stream.flush()
            request.text, request.new_text = request.text + rest, request.new_text + rest
        if reason in ("stop", "length"):  # the next turn of a conversation begins with all of this
            request.table.publish(request.tokens(), request.num_computed)
        self.scheduler.remove(request)
        del self.requests[request.id]
        self.metrics.finished(request, time.perf_counter())


def _check(
    block_size: int, max_num_seqs: int, budget: int, max_model_len: int | None, context: int, utilization: float
) -> None:
    for name, value in (
        ("block_size", block_size), ("max_num_seqs", max_num_seqs), ("max_num_batched_tokens", budget)
    ):  # fmt: skip
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: expected an integer, 1 or more, got {value!r}")
    if max_model_len is not None and (not isinstance(max_model_len, int) or not 1 < max_model_len <= context):
        raise ValueError(f"max_model_len: expected 2 to {context} (the model's context), got {max_model_len!r}")
    if not 0 < utilization <= 1:
        raise ValueError(f"gpu_memory_utilization: expected a share above 0 and up to 1, got {utilization!r}")
