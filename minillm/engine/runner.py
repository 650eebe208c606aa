"""From a plan to its tokens: the model, its cache, drawing, CUDA graphs.

A step has three moments, so that the GPU works on one step while the host reads the last one and schedules the next.
`forward` starts the layers, `draw` the head and the choice of tokens, `Results.read` waits for them. Nothing before
`read` waits for the GPU: a token that was drawn stays on the device, where the next step finds it (`DeviceTable`). And
what decides which tokens may come (the masks of constrained requests) is needed at `draw` only, when the layers are at
work already.

A CUDA graph holds a whole `forward`, another one a whole `draw`: launching some 300 kernels from Python takes longer
than running them. A graph has fixed shapes, so there is one for each of several sizes, and a step takes the next larger
one. Draws that are rare (biases) are launched from Python instead, on the same logits. Within a step our kernels start
before the one in front of them is done (`dependent_launch`).
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cache.paged import PagedCache
from ..config import EngineConfig
from ..kernels import (
    count_tokens,
    dependent_launch,
    draw_tokens,
    gumbel_argmax,
    mask_logits,
    set_counts,
    top_logprobs,
    trusted,
)
from ..kernels.common import SINCE
from ..model import Transformer
from .batch import Batch, DeviceTable, RowLayout, to_device
from .constraints import Masks, MaskTable
from .request import known
from .table import Edits, Plan

__all__ = ["Logprobs", "Masks", "Results", "Runner"]

SHORT = 1024  # tokens: one sequence of no more has a graph of its own, with attention for short contexts
REPORTED = 20  # candidates of which a graph reports log probabilities, as many as vLLM allows unless told otherwise


@dataclass
class Logprobs:
    """Log probabilities on their way to the host: the best candidates, and the token itself."""

    best_ids: Tensor  # [P, K], likeliest first
    best: Tensor  # [P, K]
    chosen: Tensor  # [P]
    lists: tuple[list[list[int]], list[list[float]], list[float]] | None = field(default=None, init=False)

    def of(self, row: int, count: int, token: int) -> dict[int, float]:
        """{token id: log probability} of `count` candidates, and of the token. Once they are on the host."""
        if self.lists is None:
            self.lists = self.best_ids.tolist(), self.best.tolist(), self.chosen.tolist()
        ids, best, chosen = self.lists
        found = dict(zip(ids[row][:count], best[row][:count], strict=True))
        found[token] = chosen[row]
        return found


@dataclass
class Results:
    """What a step gives, on the host once `done` has happened: tokens [R, K] of the plan's ready sequences, of which
    the first given[r] are meant (None: all); log probabilities, as the plan asked for them.
    """

    tokens: Tensor
    given: Tensor | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    done: torch.cuda.Event | None = None

    def read(self) -> list[list[int]]:
        """Wait for the device -> the tokens of each sequence that gets any."""
        if self.done is not None:
            self.done.synchronize()
        rows: list[list[int]] = self.tokens.tolist()
        return rows if self.given is None else [r[:n] for r, n in zip(rows, self.given.tolist(), strict=True)]


@dataclass(frozen=True)
class Kind:
    """What a draw does beyond a temperature: filters and penalties; log probabilities; masks. And for how many places
    of each sequence it draws (`Plan.width`).
    """

    filtered: bool = False
    reported: bool = False
    masked: bool = False
    width: int = 1


@dataclass(frozen=True)
class Drawn:
    """Tokens [S, W] of W places of each sequence, of which given [S] are meant (None: all). Log probabilities, if
    reported, of its S W places: ids and values [S W, K] of the best, those of the tokens [S W].
    """

    tokens: Tensor
    given: Tensor | None = None
    logprobs: tuple[Tensor, ...] = ()


Shape = tuple[int, int, bool, int | None, int, int, int | None]  # of a graph of `forward`: `_forward`'s arguments


def powers_of_2(sizes: list[int]) -> list[int]:
    """Those that are powers of 2, and the largest: for what is recorded in fewer sizes."""
    return [n for n in sizes if n & (n - 1) == 0 or n == sizes[-1]]


def _cache_dtype(name: str, of_model: torch.dtype, device: torch.device) -> torch.dtype:
    """Raises ValueError for fp8 and bf16 on a GPU that does not have them."""
    if name == "auto":
        return of_model
    dtype = torch.float8_e4m3fn if name == "fp8" else getattr(torch, name)
    since = SINCE.get(dtype, (0, 0))
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < since:
        raise ValueError(
            f"kv_cache_dtype: {name} needs a GPU of compute capability {since[0]}.{since[1]} or later, got"
            f" {torch.cuda.get_device_name(device)}; int8 takes as few bytes as fp8, float16 as bfloat16"
        )
    return dtype


class Runner:
    """Runs the steps of one model on its device, over `allocate`d blocks of cache.

    `capture()` records CUDA graphs; without it (`enforce_eager`, or on a CPU) every kernel is launched from Python.
    config: resolved. layout: of a request's row.
    """

    def __init__(self, model: Transformer, config: EngineConfig, layout: RowLayout) -> None:
        self.model, self.config = model, config
        self.device, self.dtype = model.device, model.dtype
        self.max_num_seqs, self.max_num_batched_tokens = config.max_num_seqs, known(config.max_num_batched_tokens)
        places = config.max_num_seqs * config.most_per_step  # that a step draws tokens for
        self.cache_dtype = _cache_dtype(config.kv_cache_dtype, self.dtype, self.device)
        self.table = DeviceTable(layout, config.max_num_seqs, config.block_size, self.device)
        vocab = model.config.vocab_size  # how often which token stands in which row; written where penalties ask for it
        self.counts = torch.zeros(config.max_num_seqs + 1, vocab, dtype=torch.int16, device=self.device)
        self.reported = min(REPORTED, vocab)
        self.masks = MaskTable(places, vocab, self.device)
        self._last = torch.zeros(places, model.config.hidden_size, dtype=self.dtype, device=self.device)
        self._hidden_states = self._last  # of all tokens of the last step that was asked for them
        self.forward_graphs: dict[Shape, torch.cuda.CUDAGraph] = {}
        self.draw_graphs: dict[tuple[int, Kind], tuple[torch.cuda.CUDAGraph, Drawn]] = {}
        self.num_replays = 0
        # Memory that graphs share; not draws with layers, for results travel beside the next step, not before it.
        self._pools: dict[str, Any] = {}
        self._copying = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None
        self.decode_sizes: list[int] = []
        self.mixed_sizes: list[int] = []
        self.allocate(1)

    def allocate(self, num_blocks: int) -> None:
        """Make the cache."""
        self.cache = PagedCache(
            self.model.config, num_blocks, self.config.block_size, device=self.device, dtype=self.cache_dtype
        )

    @torch.inference_mode()
    def blocks_that_fit(self, gpu_memory_utilization: float) -> int:
        """How many blocks the GPU has room for, beside the weights and the largest step, which is run to see."""
        self.table.set_steps(self.table.nobody())
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self._forward(self.max_num_batched_tokens, min(self.max_num_seqs, self.max_num_batched_tokens), False,
                      slots=self.config.max_loras)  # fmt: skip
        self._draw(self.max_num_seqs, Kind(filtered=True, reported=True, masked=True, width=self.config.most_per_step))
        torch.cuda.synchronize()
        step = torch.cuda.max_memory_allocated() - before
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        room = gpu_memory_utilization * total - (total - free) - 2 * step  # graphs keep a step's memory of their own
        return int(room // self.block_bytes)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of the cache, all layers."""
        return self.config.block_size * self.cache.bytes_per_token

    # ---- a step ------------------------------------------------------------------------------------------------------

    def launch(self, plan: Plan, masks: Masks | None = None) -> Results:
        """Start a step: `forward`, then `draw`."""
        self.forward(plan)
        return self.draw(plan, masks)

    @torch.inference_mode()
    def forward(self, plan: Plan) -> None:
        """Start computing the hidden states of the plan's tokens. If it raises, nothing of the plan counts as sent."""
        self._receive(plan)
        slots = self.config.max_loras if plan.adapted else 0
        every = plan.prompt_logprobs is not None  # which no graph gives
        shape = None if every else self._shape(plan, slots)
        if shape is None:
            self._forward(
                plan.num_tokens, plan.num_sequences, plan.is_decode, slots=slots, width=plan.width, every=every
            )
            return
        self.forward_graphs[shape].replay()
        self.num_replays += 1

    def _shape(self, plan: Plan, slots: int) -> Shape | None:
        """The graph that has room for the plan; None: there is none."""
        sizes = self.decode_sizes if plan.is_decode else self.mixed_sizes
        at = bisect.bisect_left(sizes, plan.num_tokens)
        if at == len(sizes):
            return None
        short = SHORT if plan.num_tokens == 1 and plan.longest is not None and plan.longest <= SHORT else None
        sequences = sizes[at] if plan.is_decode else self.max_num_seqs
        return sizes[at], sequences, plan.is_decode, short, slots, plan.width, None

    def _receive(self, plan: Plan) -> None:
        """What the plan says, into the device's tables."""
        self.table.update(plan.places, plan.values)
        self.table.set_steps(plan.steps)
        for row, prompt, output in plan.penalized:
            set_counts(self.counts, row, to_device(prompt, self.device), to_device(output, self.device))

    def guesses(self, plan: Plan) -> list[list[int]]:
        """Once `forward` has started: the guesses of each sequence of the plan."""
        return [[]] * plan.num_sequences

    @torch.inference_mode()
    def draw(self, plan: Plan, masks: Masks | None = None) -> Results:
        """Start drawing the tokens of the step that `forward` started."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)  # a graph draws where the last one did
        prompt_logprobs = self._prompt_logprobs(plan)
        most = 0 if plan.logprobs is None else plan.logprobs[1]
        if masks is not None:
            self.masks.set(masks)
        kind = Kind(plan.filtered, plan.logprobs is not None, masks is not None, plan.width)
        if plan.edits is not None or most > self.reported or not self.decode_sizes:
            drawn = self._draw_edited(plan, kind)
        else:
            drawn = self._draw_graph(plan.num_sequences, kind)
        logprobs = None
        if plan.logprobs is not None:
            places = plan.logprobs[0][:, None] * plan.width + np.arange(plan.width)
            rows = to_device(places.reshape(-1), self.device)
            logprobs = Logprobs(*(self._to_host(x[rows]) for x in drawn.logprobs))
        tokens, given = drawn.tokens[: plan.num_sequences], drawn.given
        given = None if given is None else given[: plan.num_sequences]
        if len(plan.ready) < plan.num_sequences:
            ready = to_device(plan.ready, self.device)
            tokens, given = tokens[ready], None if given is None else given[ready]
        given = None if given is None else self._to_host(given)
        results = Results(self._to_host(tokens), given, logprobs, prompt_logprobs)
        if self._copying is not None:
            results.done = self._copied = torch.cuda.Event()
            results.done.record(self._copying)
        return results

    def _to_host(self, x: Tensor) -> Tensor:
        if self._copying is None:
            return x.clone()
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self._copying.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copying):
            host.copy_(x, non_blocking=True)
        x.record_stream(self._copying)
        return host

    def _forward(
        self, tokens: int, sequences: int, decode: bool, max_seqlen_k: int | None = None, slots: int = 0,
        width: int = 1, max_seqlen_q: int | None = None, every: bool = False,
    ) -> None:  # fmt: skip
        """Everything that a graph of `forward` holds: from rows to the hidden states that give tokens, in `_last`; and
        with `every` those of all tokens in `_hidden_states`.
        """
        with dependent_launch(), trusted():
            batch = self.table.batch(tokens, sequences, decode, max_seqlen_k, slots, max_seqlen_q)
            rows = batch.logit_rows if width == 1 else self.table.logit_rows(batch.logit_rows, width)
            # Adapters know which token has which: the last layer's, too, wants all of them.
            asked = None if decode or every or slots else rows
            hidden_states = self._layers(batch, asked)
            last = hidden_states if decode or asked is not None else hidden_states[rows]
            self._last[: sequences * width] = last  # [S W, hidden]
        self._hidden_states = hidden_states

    def _layers(self, batch: Batch, rows: Tensor | None = None) -> Tensor:
        """Hidden states of the batch's tokens, [N, hidden], or of these alone, [R, hidden]; all keys and values go into
        the cache.
        """
        return self.model(batch.token_ids, batch, self.cache, rows)

    def _draw(self, sequences: int, kind: Kind) -> Drawn:
        """Everything that a graph of `draw` holds: from hidden states to tokens [S, W], in the rows too."""
        with dependent_launch(), trusted():
            logits = self.model.lm_head(self._last[: sequences * kind.width])  # [S W, vocab]
            tokens, given = self._tokens(self._masked(logits, kind), kind)
            self.table.append(tokens, given)
            found = top_logprobs(logits, tokens.view(-1), self.reported) if kind.reported else ()
            return Drawn(tokens, given, found)

    def _tokens(self, logits: Tensor, kind: Kind) -> tuple[Tensor, Tensor | None]:
        """Logits [S W, vocab] -> tokens [S, W], and how many of each sequence's are meant [S] int32 (None: all)."""
        return self._choose(logits, kind.filtered)[:, None], None

    def _masked(self, logits: Tensor, kind: Kind) -> Tensor:
        """-inf where the step's masks forbid. In place, but for reported ones: these are the model's own."""
        if not kind.masked:
            return logits
        logits = logits.clone() if kind.reported else logits
        rows = torch.arange(len(logits), device=self.device)
        mask_logits(logits, rows, self.masks.which[: len(logits)], self.masks.bits)
        return logits

    def _choose(self, logits: Tensor, filtered: bool, ahead: int = 0, active: Tensor | None = None) -> Tensor:
        """A token of each sequence, for the place that lies so far ahead of its tokens.  [S, vocab] -> [S]

        active [S] bool: whose token is given, so that it counts for penalties; None: who gets any.
        """
        sequences = len(logits)
        o, lengths = self.table.options_of(sequences), self.table.lengths[:sequences]
        lengths = lengths + ahead if ahead else lengths  # a plain draw is not to pay for a sum
        if not filtered:
            return gumbel_argmax(logits, o["temperature"], o["seed"], lengths)
        rows = self.table.steps[0, :sequences]
        penalties = o["repetition_penalty"], o["presence_penalty"], o["frequency_penalty"]
        sampled = draw_tokens(
            logits, o["temperature"], o["seed"], lengths, o["top_k"], o["top_p"], o["min_p"], *penalties, rows,
            self.counts,
        )  # fmt: skip
        count_tokens(self.counts, rows, sampled, self.table.steps[2, :sequences] > 0 if active is None else active)
        return sampled

    def _draw_edited(self, plan: Plan, kind: Kind) -> Drawn:
        """`_draw` with what is rare: biases first, or many log probabilities (of the model's own logits)."""
        with trusted():
            logits = self.model.lm_head(self._last[: plan.num_sequences * kind.width])  # [S W, vocab]
            tokens, given = self._tokens(self._masked(self._edited(logits, plan.edits, kind.width), kind), kind)
            self.table.append(tokens, given)
            found = () if plan.logprobs is None else top_logprobs(logits, tokens.view(-1), plan.logprobs[1])
            return Drawn(tokens, given, found)

    def _edited(self, logits: Tensor, edits: Edits | None, width: int) -> Tensor:
        if edits is None:
            return logits
        logits = logits.float().clone() if self.dtype == torch.float32 else logits.float()  # a copy: see `_masked`
        places = edits.sequences[:, None] * width + np.arange(width)  # all of a sequence's places are edited alike
        index = to_device((places * logits.shape[1] + edits.token_ids[:, None]).reshape(-1), self.device)
        logits.view(-1)[index] += to_device(edits.values.repeat(width), self.device)
        return logits

    def _prompt_logprobs(self, plan: Plan) -> Logprobs | None:
        """Of the tokens of prompts, each after all before it; some rows at a time, as the vocabulary is large."""
        if plan.prompt_logprobs is None:
            return None
        rows, targets, count = plan.prompt_logprobs
        index, tokens = to_device(rows, self.device), to_device(targets, self.device)
        parts = []
        for chunk, target in zip(index.split(256), tokens.split(256), strict=True):
            parts.append(top_logprobs(self.model.lm_head(self._hidden_states[chunk]), target, count))
        return Logprobs(*(self._to_host(torch.cat(x)) for x in zip(*parts, strict=True)))

    # ---- CUDA graphs -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def capture(self) -> None:
        """Record a graph for every size, the largest first, so that the smaller ones reuse its memory."""
        decode = (1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, self.max_num_seqs, 32))
        self.decode_sizes = [*(n for n in decode if n < self.max_num_seqs), self.max_num_seqs]
        most = self.max_num_batched_tokens
        self.mixed_sizes = sorted({*range(most, 0, -max(256, most // 32)), *(n for n in (256, 512) if n < most)})
        self.table.set_steps(self.table.nobody())
        forwards: list[Shape] = []
        for slots in sorted({0, self.config.max_loras}):  # steps without adapters are not to pay for them
            forwards += self._shapes(slots)
        for shape in sorted(forwards, key=lambda shape: shape[:3], reverse=True):
            self.forward_graphs[shape], _ = self._record("layers", partial(self._forward, *shape))
        self._record_draws(self.decode_sizes, Kind())

    def _shapes(self, slots: int) -> list[Shape]:
        """What `_forward` is recorded for."""
        return [
            (1, 1, True, SHORT, slots, 1, None),
            *((n, self.max_num_seqs, False, None, slots, 1, None) for n in self.mixed_sizes),
            *((n, n, True, None, slots, 1, None) for n in self.decode_sizes),
        ]

    def _record_draws(self, sizes: list[int], like: Kind) -> None:
        """With and without filters, else as `like`."""
        steps = self.table.steps.clone()
        self.table.steps[2] = 0  # a draw that is tried out gives nobody a token
        for sequences in reversed(sizes):
            for kind in (replace(like, filtered=True), replace(like, filtered=False)):
                if (sequences, kind) not in self.draw_graphs:
                    self.draw_graphs[sequences, kind] = self._record("draws", partial(self._draw, sequences, kind))
        self.table.steps.copy_(steps)

    def _draw_graph(self, sequences: int, kind: Kind) -> Drawn:
        """Replay a draw. Log probabilities and masks are rarer: for a few sizes, recorded when first asked for."""
        sizes = self.decode_sizes
        if kind.reported or kind.masked or kind.width > 1:
            sizes = powers_of_2(sizes)
        key = sizes[bisect.bisect_left(sizes, sequences)], kind
        if key not in self.draw_graphs:
            self._record_draws(sizes, kind)
        graph, drawn = self.draw_graphs[key]
        graph.replay()
        self.num_replays += 1
        return drawn

    def _record(self, pool: str, run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """A graph of what `run` launches, and its results."""
        run()  # compiles kernels, which a graph could not record
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        if pool not in self._pools:
            self._pools[pool] = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pools[pool]):
            result = run()
        return graph, result
