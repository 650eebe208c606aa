"""The loop: schedule, launch, take in the tokens of the step before.

What fails concerns as few as possible. Scheduling, launching, reading, turning a token into text and counting are each
watched request by request: who fails ends with its error, and its neighbors keep every token. Blocks that a failed step
should have filled lose their names, and who has read them computes anew.
"""

import gc
import hashlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import index as as_index
from typing import Any

import torch
from torch import Tensor

from ..adapters.serving import AdapterSlots, Loaded, LoRARequest, Registry
from ..cache.blocks import BlockPool, BlockTable
from ..config import EngineConfig
from ..constrained import Constraint
from ..model import Transformer
from ..model.tokenizer import Tokenizer
from ..model.tokenizer_hf import HuggingFaceTokenizer
from ..sampling import SamplingParams, new_seed
from .batch import OPTIONS, RowLayout
from .constraints import Constraints, Follower, Masks, masks_of
from .draft_head import HeadRunner
from .draft_length import Speculation
from .metrics import EngineMetrics, LogLine
from .request import Request, known
from .runner import Results, Runner
from .scheduler import Copies, Scheduled, Scheduler
from .speculative import SpeculativeRunner
from .table import Plan, RequestTable, prompt_part
from .text import StopText

__all__ = ["Engine", "InFlight", "Prepared"]

CPU_CACHE_BYTES = 2 << 30
KEPT = 4  # adapters on the host, for each slot on the device
LOG = logging.getLogger("minillm.engine")

Prepared = tuple[Loaded | None, Constraint | None]
Got = dict[Request, None]  # who got a token or ended in this step, in order


@dataclass
class InFlight:
    """A step on its way. What it computes for whom: of each request its first token in this step, the number of its
    tokens, the blocks that these are written into, and its epoch and preemptions at the launch, which tell whether it
    was declared void or preempted since. Then which of them get tokens, and how many at most; the results; and whose
    rows are where in the log probabilities (the first of them).
    """

    requests: list[Request]
    starts: list[int]
    counts: list[int]
    blocks: list[list[int]]
    epochs: list[int]
    preemptions: list[int]
    ready: list[int]
    most: list[int]
    results: Results
    logprob_rows: dict[int, int]
    prompt_rows: dict[int, int]

    def read(self) -> list[tuple[Request, list[int]]]:
        """Wait for the device -> each request that gets tokens, and these."""
        return [(self.requests[i], tokens) for i, tokens in zip(self.ready, self.results.read(), strict=True)]

    def is_valid(self, index: int) -> bool:
        """Whether what the request was computed from still counts."""
        return self.requests[index].epoch == self.epochs[index]


class Engine:
    """Many requests at once over one model.

        engine = Engine(model)
        engine.add_request([1, 2, 3], SamplingParams(temperature=0))
        while engine.has_unfinished():
            for request in engine.step(): ...     # those that got a token, or ended

    - config: an `EngineConfig`; its fields may also be given one by one: `Engine(model, max_num_seqs=8)`. num_blocks is
      by default what `gpu_memory_utilization` leaves room for, on a CPU 2 GiB. With `async_scheduling` a step is
      launched before the tokens of the last one are known, so that the device never waits for the host (on a GPU);
      `step` then returns the tokens of the step before.
    - tokenizer: gives requests their `text`, and is needed for stop strings.

    Whatever changes something takes one lock, so threads may share an engine: whoever calls `step` works for all, and a
    request that another thread's step has finished is `finished`. An exception that leaves `step` (Ctrl-C) has ended
    all requests. When the model's weights change, earlier entries of the prefix cache are not found any more.

    With `speculative` a step may give a request several tokens: the ones that it would get without (`speculative.py`).

    Raises ValueError for arguments out of range and MemoryError when the device has no room, saying what to lower.
    """

    def __init__(
        self,
        model: Transformer,
        config: EngineConfig | None = None,
        tokenizer: Tokenizer | HuggingFaceTokenizer | None = None,
        **options: Any,
    ) -> None:
        on_gpu = model.device.type == "cuda"
        asked = replace(config or EngineConfig(), **options)
        self.model, self.tokenizer, self.model_config = model, tokenizer, model.config
        self.config = asked.resolved(model.config, on_gpu)
        own = None if tokenizer is None else tokenizer.eos_token_id  # the model's files may name others
        self.end_token_ids = frozenset(model.config.eos_token_ids) | ({own} if own is not None else set())
        self.max_model_len = known(self.config.max_model_len)
        blocks = -(-self.max_model_len // self.config.block_size)
        self.slots, options = None, dict(OPTIONS)
        if self.config.max_loras:
            self.slots = AdapterSlots(model, self.config.max_loras, self.config.max_lora_rank)
            self.registry = Registry(self.slots.packed, model, most=KEPT * self.config.max_loras)
            options["adapter"] = torch.int32
        self.layout = RowLayout(self.max_model_len + self.config.most_per_step - 1, blocks, options)
        self.runner: Runner = self.runner_class(model, self.config, self.layout)
        num_blocks = self._num_blocks(asked)
        self.max_model_len = min(self.max_model_len, num_blocks * self.config.block_size)
        self.runner.allocate(num_blocks)
        if on_gpu and not self.config.enforce_eager:
            self.runner.capture()
            gc.collect()
            gc.freeze()  # model and graphs stay: a collection that walks through them stops a step for 30 ms
        self.metrics = EngineMetrics()
        self.speculation = self._speculation()
        self.constraints = Constraints(tokenizer, self.end_token_ids, model.config.vocab_size)
        self.requests: dict[str, Request] = {}
        self._lock, self._order, self._log = threading.RLock(), itertools.count(), LogLine(self.metrics)
        self._fresh()

    def _num_blocks(self, asked: EngineConfig) -> int:
        size, seqs = self.config.block_size, self.config.max_num_seqs
        if asked.num_blocks is not None:
            return asked.num_blocks
        if self.model.device.type == "cuda":
            room = self.runner.blocks_that_fit(self.config.gpu_memory_utilization)
        else:
            room = CPU_CACHE_BYTES // self.runner.block_bytes
        num_blocks = min(room, seqs * -(-self.max_model_len // size))
        if num_blocks < (needed := -(-(asked.max_model_len or 1) // size)):
            raise MemoryError(
                f"no room for the cache: a sequence of max_model_len ({asked.max_model_len or size}) tokens takes"
                f" {needed} blocks of {size}, and {max(0, room)} fit; lower"
                " max_model_len, max_num_batched_tokens or max_num_seqs, or raise gpu_memory_utilization"
            )
        return num_blocks

    @property
    def runner_class(self) -> type[Runner]:
        """What runs the steps. A subclass may guess in another way."""
        if self.config.speculative is None:
            return Runner
        return HeadRunner if self.config.speculative.method == "draft_head" else SpeculativeRunner

    def _speculation(self) -> Speculation | None:
        asked = self.config.speculative
        if asked is None:
            return None
        runner, costs, rates = self.runner, asked.step_costs, None
        if isinstance(runner, SpeculativeRunner):
            rates = runner.rates
            costs = runner.measure() if costs is None and asked.adaptive else costs
        budget = known(self.config.max_num_batched_tokens)
        return Speculation(asked, costs if asked.adaptive else None, budget, rates)

    def reset(self) -> None:
        """Drop everything: requests (as aborted), steps on their way, and what the prefix cache holds."""
        with self._lock:
            dropped = list(self.requests.values())
            for request in dropped:
                request.finish_reason = "abort"
            self.metrics.num_aborted += len(dropped)
            self._fresh()

    def _fresh(self) -> None:
        self.pool = BlockPool(self.runner.cache.num_blocks, self.config.block_size, self.config.enable_prefix_caching)
        budget = known(self.config.max_num_batched_tokens)
        if self.slots is not None:
            self.slots.held = [0] * self.slots.count
        self.scheduler = Scheduler(self.pool, self.config.max_num_seqs, budget, self.metrics, self.slots)
        self.table = RequestTable(
            self.layout, self.config.max_num_seqs, self.model_config.vocab_size, self.config.widths
        )
        self.requests.clear()
        self._in_flight: list[InFlight] = []

    # ---- requests ----------------------------------------------------------------------------------------------------

    def add_request(
        self, prompt_token_ids: Sequence[int], params: SamplingParams | None = None, request_id: str | None = None,
        priority: int = 0, cache_salt: str = "", allowed: Callable[[Sequence[int]], Tensor | None] | None = None,
        lora_request: LoRARequest | None = None,
    ) -> str:  # fmt: skip
        """Queue a prompt -> the id of the request. A smaller `priority` goes first.

        With `params.n` above 1 there are as many requests: "id", "id/1", "id/2", ..., which share the prompt's blocks.
        Requests of different `cache_salt`, or adapters of different content (`lora_request`), share nothing in the
        prefix cache. allowed: see `Request`. Raises as `Registry.get` for an adapter that cannot be used; ValueError or
        TypeError for an empty prompt, one that can never fit, what is no token id of this model (in the prompt, as
        stop token, in logit_bias), more log probabilities than there are tokens, stop strings without a tokenizer, and
        an id that is in use.
        """
        return self.add(prompt_token_ids, params, request_id, priority, cache_salt, allowed, lora_request)[0].request_id

    def add(
        self, prompt_token_ids: Sequence[int], params: SamplingParams | None = None, request_id: str | None = None,
        priority: int = 0, cache_salt: str = "", allowed: Callable[[Sequence[int]], Tensor | None] | None = None,
        lora_request: LoRARequest | None = None, prepared: Prepared | None = None,
    ) -> list[Request]:  # fmt: skip
        """`add_request` -> the requests themselves, `params.n` of them. prepared: of the same params and adapter."""
        params = params or SamplingParams()
        adapter, constraint = prepared or self.prepare(params, lora_request)  # before others are kept waiting
        if constraint is not None and allowed is not None:
            raise ValueError("allowed: expected none beside structured_outputs")
        with self._lock:
            order = next(self._order)
            prompt = self._checked(prompt_token_ids, params, priority)
            request_id = str(order) if request_id is None else request_id
            names = [request_id, *(f"{request_id}/{index}" for index in range(1, params.n))]
            if used := [name for name in names if name in self.requests]:
                raise ValueError(f"request_id: {used[0]!r} is in use; expected a new one")
            root = self._root(cache_salt, b"" if adapter is None else adapter.digest)
            made: list[Request] = []
            for index, name in enumerate(names):
                request = self._request(name, prompt, params, index, root)
                request.order, request.priority, request.allowed, request.adapter = order, priority, allowed, adapter
                request.parent = made[0] if made else None
                if constraint is not None:
                    request.allowed = Follower(constraint)
                made.append(request)
            for request in made:
                self.requests[request.request_id] = request
                self.scheduler.add(request)
            self.metrics.num_requests += params.n
            return made

    def prepare(self, params: SamplingParams, lora_request: LoRARequest | None = None) -> Prepared:
        """What of `add` may take long, an adapter read and a constraint compiled, without the lock: for whoever must
        not be kept waiting. Raises as `add`.
        """
        return self._adapter(lora_request), self.constraints.of(params)

    def _checked(self, prompt_token_ids: Sequence[int], params: SamplingParams, priority: int) -> list[int]:
        """The prompt as a list of ints. What depends on the model is looked at here, before anything runs."""
        vocab = self.model_config.vocab_size
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise TypeError(f"priority: expected an integer, got {priority!r}")
        prompt = self.prompt_of(prompt_token_ids)
        self._in_vocabulary("stop_token_ids", params.stop_token_ids)
        self._in_vocabulary("logit_bias", params.logit_bias or ())
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > vocab:
                raise ValueError(
                    f"{name}: expected at most {vocab} (the model's vocabulary), got {getattr(params, name)}"
                )
        if params.stop and self.tokenizer is None:
            raise ValueError("stop: expected none, as this engine has no tokenizer; use stop_token_ids")
        return prompt

    def prompt_of(self, token_ids: Any, name: str = "prompt_token_ids") -> list[int]:
        """`token_ids` as a list of ints (NumPy's and torch's too), if they can be a prompt.

        Raises TypeError for what are no integers; ValueError for none or too many, and for ids outside the vocabulary.
        The message calls them `name`.
        """
        prompt = _token_ids_of(token_ids, name)
        if not 1 <= len(prompt) < self.max_model_len:
            raise ValueError(
                f"{name}: expected 1 to {self.max_model_len - 1} tokens (max_model_len, or what the cache holds, less"
                f" one to generate), got {len(prompt)}; shorten it, or give the cache more blocks"
            )
        self._in_vocabulary(name, prompt)
        return prompt

    def _in_vocabulary(self, name: str, ids: Iterable[int]) -> None:
        vocab = self.model_config.vocab_size
        if bad := [i for i in ids if not 0 <= i < vocab]:
            raise ValueError(f"{name}: expected ids in 0..{vocab - 1} (the model's vocabulary), got {bad[0]}")

    def _adapter(self, lora_request: LoRARequest | None) -> Loaded | None:
        if lora_request is None:
            return None
        if not isinstance(lora_request, LoRARequest):
            raise TypeError(f"lora_request: expected a LoRARequest, got {lora_request!r}")
        if self.slots is None:
            raise ValueError(
                "lora_request: expected none, as this engine serves no adapters; give it max_loras=1 or more"
            )
        return self.registry.get(lora_request)

    def _root(self, cache_salt: str, adapter: bytes = b"") -> bytes:
        """What decides a block's content beside its tokens."""
        if not isinstance(cache_salt, str):
            raise TypeError(f"cache_salt: expected text, got {cache_salt!r}")
        facts = repr((self.model.fingerprint(), self.runner.cache_dtype, cache_salt, adapter))
        return hashlib.blake2b(facts.encode(), digest_size=16).digest()

    def _request(
        self, name: str, prompt: list[int], params: SamplingParams, index: int = 0, root: bytes = b""
    ) -> Request:
        vocab = self.model_config.vocab_size
        natural = () if params.ignore_eos else (end for end in self.end_token_ids if end < vocab)
        seed = new_seed() if params.seed is None else (params.seed + index + 2**63) % 2**64 - 2**63
        decoder = self.tokenizer.stream_decoder(skip_special_tokens=True) if self.tokenizer else None
        return Request(
            name, list(prompt), params, BlockTable(self.pool, root=root),
            min(params.max_tokens, self.max_model_len - len(prompt)),
            ends=frozenset((*params.stop_token_ids, *natural)), options={"seed": seed},
            text_stream=StopText(params.stop, decoder) if decoder else None,
            logprobs=None if params.logprobs is None else [],
            prompt_logprobs=None if params.prompt_logprobs is None else [None] * len(prompt),
            arrival_time=time.perf_counter(),
        )  # fmt: skip

    def has_unfinished(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self.requests)

    def abort(self, request: str | Request) -> bool:
        """Drop a request and its siblings, whatever they are doing -> whether there was one.

        By its id, or better by itself: an id may meanwhile be somebody else's.
        """
        with self._lock:
            if isinstance(request, Request):
                found = [r for r in self.requests.values() if request in (r, r.parent)]
            else:
                found = [
                    r for r in self.requests.values()
                    if request in (r.request_id, r.parent.request_id if r.parent else None)
                ]  # fmt: skip
            for one in found:
                self._finish(one, "abort")
            return bool(found)

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def step(self) -> list[Request]:
        """One step -> the requests that got a token or ended in an error; some of them are finished."""
        with self._lock:
            try:
                got = self._step()
            except BaseException:  # what is half done, is not known
                self.reset()
                raise
            if (line := self._log.due()) is not None:
                LOG.info(line)
            return got

    def _step(self) -> list[Request]:
        if self.speculation is not None:
            self.speculation.choose(self.scheduler)
        scheduled, copies = self.scheduler.schedule()
        got: Got = {}
        while self.scheduler.failed:
            self._fail(*self.scheduler.failed.pop(), got)
        launched = self._launch(scheduled, copies, got) if scheduled else []
        if self.config.async_scheduling:
            launched, self._in_flight = self._in_flight, launched
        self._take(launched, got)
        return list(got)

    def _launch(self, scheduled: Scheduled, copies: Copies, got: Got) -> list[InFlight]:
        """Start a step. If it raises, each of its requests is tried alone: who raises again fails, the others go on."""
        scheduled = self._copy(scheduled, copies, got)
        if not scheduled:
            return []
        self.metrics.launched(sum(count for _, count in scheduled))
        try:
            return [self._run(scheduled, got)]
        except Exception:
            self._take(self._in_flight, got)  # what is on its way is right, and has tokens that only the device knows
            self._in_flight = []
            self.table.forget([request for request, _ in scheduled])
            flights = []
            for request, count in scheduled:
                if request.row >= 0:  # else it ended, or must begin anew
                    try:
                        flights.append(self._run([(request, count)], got))
                    except Exception as error:
                        self._spoiled(request, count, error, got)
            return flights

    def _spoiled(self, request: Request, count: int, error: Exception, got: Got) -> None:
        """A request fails before its part of a step is done; others may have been promised its blocks."""
        self._distrust(set(self._written(request, count)), spared=[request])
        self._fail(request, error, got)

    def _copy(self, scheduled: Scheduled, copies: Copies, got: Got) -> Scheduled:
        """Make the copies on write -> who can go on: whose block could not be copied fails."""
        try:
            self.runner.cache.copy(copies)
        except Exception:
            for pair in copies:
                try:
                    self.runner.cache.copy([pair])
                except Exception as error:  # that block does not hold what its table says
                    for request, count in [(r, n) for r, n in scheduled if pair[1] in r.table.blocks]:
                        self._spoiled(request, count, error, got)
        return [(request, count) for request, count in scheduled if request.row >= 0]

    def _run(self, scheduled: Scheduled, got: Got) -> InFlight:
        """Launch one step: its layers first, then the draw, which may need to know the tokens of the step before."""
        # The longest first: programs of attention start in this order, and one that starts last should be short.
        scheduled = sorted(scheduled, key=lambda s: -s[0].num_computed)
        plan = self.table.plan(scheduled)
        self.runner.forward(plan)
        ready = plan.ready.tolist()
        results = self.runner.draw(plan, self._masks([(i, scheduled[i][0]) for i in ready], plan, got))
        flight = self._flight(scheduled, plan, results)
        self.scheduler.advance(scheduled)
        return flight

    def _flight(self, scheduled: Scheduled, plan: Plan, results: Results) -> InFlight:
        requests, counts = [request for request, _ in scheduled], [count for _, count in scheduled]
        starts = [request.num_computed for request in requests]
        blocks = [self._written(request, count) for request, count in scheduled]
        reported = [] if plan.logprobs is None else plan.logprobs[0].tolist()
        logprob_rows = {i: index * plan.width for index, i in enumerate(reported)}
        prompt_rows, row = {}, 0
        if plan.prompt_logprobs is not None:
            for i, request in enumerate(requests):
                if request.prompt_logprobs is not None:
                    first, last = prompt_part(request, starts[i], counts[i])
                    prompt_rows[i], row = row, row + last - first
        return InFlight(
            requests, starts, counts, blocks, [r.epoch for r in requests], [r.num_preemptions for r in requests],
            plan.ready.tolist(), plan.steps[2].tolist(), results, logprob_rows, prompt_rows,
        )  # fmt: skip

    def _masks(self, drawing: list[tuple[int, Request]], plan: Plan, got: Got) -> Masks | None:
        """Which tokens constrained requests may get, by all their tokens: so what is on its way is read first."""
        constrained = [(i, request) for i, request in drawing if request.allowed is not None]
        if not constrained:
            return None
        self._take(self._in_flight, got)
        self._in_flight = []
        places: list[int] = []
        masks = []
        guesses = self.runner.guesses(plan)
        for i, request in constrained:
            try:
                found = [] if request.finished else masks_of(request, self.model_config.vocab_size, guesses[i])
            except Exception as error:
                self._fail(request, error, got)
                continue
            places += range(i * plan.width, i * plan.width + len(found))
            masks += found
        return Masks(places, masks) if masks else None

    # ---- taking in ---------------------------------------------------------------------------------------------------

    def _take(self, flights: list[InFlight], got: Got) -> None:
        """Wait for steps, give their tokens to their requests."""
        for flight in flights:
            try:
                read = flight.read()
            except Exception as error:
                self._lost(flight, error, got)
                continue
            now = time.perf_counter()
            for i, row in flight.prompt_rows.items():
                try:
                    self._take_prompt(flight, i, row)
                except Exception as error:
                    self._fail(flight.requests[i], error, got)
            for i, (request, tokens) in zip(flight.ready, read, strict=True):
                if request.finish_reason is not None or request.epoch != flight.epochs[i]:
                    continue  # it ended, or what it was computed from was void, while this was on its way
                if request not in got:
                    got[request], request.new_token_ids, request.new_text = None, [], ""
                try:
                    self._take_tokens(flight, i, request, tokens, now)
                except Exception as error:
                    self._fail(request, error, got)

    def _take_tokens(self, flight: InFlight, i: int, request: Request, tokens: list[int], now: float) -> None:
        """What was a bound becomes a count; the tokens are read one by one, and one may end the request."""
        most = flight.most[i]
        request.num_pending -= most
        if most > 1:
            if request.num_preemptions == flight.preemptions[i]:
                request.num_computed -= most - len(tokens)
            self.metrics.checked(most - 1, len(tokens) - 1)
        if self.speculation is not None:
            self.speculation.learn(request, most - 1, tokens)
        count = 0
        for token in tokens:
            count += 1
            request.output_token_ids.append(token)
            request.new_token_ids.append(token)
            if request.logprobs is not None and flight.results.logprobs is not None:
                wanted = request.params.logprobs or 0
                request.logprobs.append(flight.results.logprobs.of(flight.logprob_rows[i] + count - 1, wanted, token))
            if (reason := self._reads(request, token)) is not None:
                self.metrics.got_tokens(request, count, now)
                self._finish(request, reason)
                return
        self.metrics.got_tokens(request, count, now)

    def _take_prompt(self, flight: InFlight, i: int, row: int) -> None:
        """Log probabilities of those tokens of a prompt that this step computed the predecessors of."""
        request, found = flight.requests[i], flight.results.prompt_logprobs
        if found is None or request.prompt_logprobs is None or not flight.is_valid(i):
            return
        for position in range(*prompt_part(request, flight.starts[i], flight.counts[i])):
            token = request.prompt_token_ids[position + 1]
            request.prompt_logprobs[position + 1] = found.of(row, request.params.prompt_logprobs or 0, token)
            row += 1

    def _reads(self, request: Request, token: int) -> str | None:
        """Turn a token into text -> why the request ends here, if it does."""
        if token in request.ends:
            return "stop"
        known = len(request.output_token_ids)
        if request.text_stream is not None:
            piece = request.text_stream.push(token, known >= request.params.min_tokens)
            request.text += piece
            request.new_text += piece
            if request.text_stream.stopped:
                return "stop"
        return "length" if known >= request.max_tokens else None

    # ---- ends and faults ---------------------------------------------------------------------------------------------

    def _lost(self, flight: InFlight, error: Exception, got: Got) -> None:
        """A step's results cannot be read: who was in it fails, and nothing that it should have written is trusted."""
        live = [r for i, r in enumerate(flight.requests) if not r.finished and flight.is_valid(i)]
        self._distrust({block for blocks in flight.blocks for block in blocks}, spared=live)
        for request in live:
            self._fail(request, error, got)

    def _distrust(self, blocks: set[int], spared: Sequence[Request] = ()) -> None:
        """These blocks do not hold what their names say: the names go, and who has read them computes anew."""
        victims: list[Request] = []
        spread = True
        for block in blocks:
            self.pool.forget(block)
        while spread:
            spread = False
            for request in self.scheduler.running:
                first = next((i for i, block in enumerate(request.table.blocks) if block in blocks), None)
                if first is None or request in victims:
                    continue
                victims.append(request)
                blocks = blocks | set(request.table.blocks[first:])  # made from what lies before them
                request.table.unpublish(first)
                spread = True
        for request in victims:
            if request not in spared:
                request.num_pending, request.epoch = 0, request.epoch + 1
                self.scheduler.preempt(request)

    def _written(self, request: Request, count: int) -> list[int]:
        """The blocks that a step of the request's next `count` tokens writes."""
        size, last = self.config.block_size, request.num_computed + count - 1
        return request.table.blocks[request.first_unsure // size : last // size + 1]

    def _fail(self, request: Request, error: Exception, got: Got) -> None:
        if not request.finished:
            request.error = error
            self._finish(request, "error")
            if request not in got:
                got[request], request.new_token_ids, request.new_text = None, [], ""

    def _finish(self, request: Request, reason: str) -> None:
        """The request ends; whatever goes wrong on the way is its error, and all it held comes home."""
        request.finish_reason = reason
        if self.requests.get(request.request_id) is request:
            del self.requests[request.request_id]
        try:
            if request.text_stream is not None:
                rest = request.text_stream.flush()
                request.text, request.new_text = request.text + rest, request.new_text + rest
            if reason in ("stop", "length"):  # the next turn of a conversation begins with all of this
                request.table.publish(request.tokens(), request.num_computed)
        except Exception as error:
            request.error = request.error or error
            request.finish_reason = "error"
        self.scheduler.remove(request)
        ended = self.metrics.num_ended
        try:
            self.metrics.finished(request, time.perf_counter())
        except Exception as error:
            request.error = request.error or error
            request.finish_reason = "error"
            self.metrics.num_failed += self.metrics.num_ended == ended


def _token_ids_of(values: Any, name: str) -> list[int]:
    """`values` as a list of ints (NumPy's and torch's too). Raises TypeError that names the argument."""
    try:
        ids = list(values)
        if all(type(i) is int for i in ids):
            return ids
        if any(isinstance(i, bool | str) for i in ids):
            raise TypeError
        return [as_index(i) for i in ids]
    except TypeError:
        got = f"{values!r:.60}"
        raise TypeError(f"{name}: expected a list of token ids (integers), got {got}") from None
