"""From scheduled requests to their next tokens: the model, its cache, sampling, CUDA graphs.

A step is launched and read at two different times (`launch`, `Step.read`), so that the GPU works on one step while the
host reads the last one and schedules the next. Nothing in between waits for the GPU: a token that was sampled stays on
the device, where the next step finds it (`Rows`).

A CUDA graph holds a whole step, from `Rows.batch` to the sampled tokens: launching some 300 kernels from Python takes
longer than running them. A graph has fixed shapes, so there is one for each of several sizes, and a step takes the next
larger one: for decoding, by sequences; for steps with prompts in them, by tokens. Within a step our kernels start
before the one in front of them is done (`dependent_launch`).
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..cache.paged import PagedCache
from ..kernels import dependent_launch, gumbel_argmax, gumbel_noise
from ..model import Transformer
from ..sampling import sample
from .batch import Rows, to_device
from .request import Request

__all__ = ["Runner", "Step"]


@dataclass
class Logprobs:
    """For some of a step's sequences, on the host once the step is done: the best candidates, and the token itself."""

    best_ids: Tensor  # [P, K], likeliest first
    best: Tensor  # [P, K]
    chosen: Tensor  # [P]
    row_of: dict[Request, int]

    def of(self, request: Request, token: int) -> dict[int, float] | None:
        """{token id: log probability} of as many candidates as the request wants, and of its token."""
        if request not in self.row_of:
            return None
        row, count = self.row_of[request], request.params.logprobs
        best = zip(self.best_ids[row, :count].tolist(), self.best[row, :count].tolist(), strict=True)
        return {**dict(best), token: float(self.chosen[row])}


@dataclass
class Step:
    """A step on its way: who gets a token; the tokens, on the host once `done` has happened."""

    requests: list[Request]
    tokens: Tensor
    logprobs: Logprobs | None = None
    done: torch.cuda.Event | None = None

    def read(self) -> list[tuple[Request, int, dict[int, float] | None]]:
        """Wait for the device -> (request, token, log probabilities if it asked for them)."""
        if self.done is not None:
            self.done.synchronize()
        found = self.logprobs
        return [
            (request, token, found.of(request, token) if found else None)
            for request, token in zip(self.requests, self.tokens.tolist(), strict=True)
        ]


class Runner:
    """Runs steps of one model on its device, over `num_blocks` blocks of cache.

    `capture()` records CUDA graphs; without it (`enforce_eager`, or on a CPU) every kernel is launched from Python.
    """

    def __init__(
        self, model: Transformer, block_size: int, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int
    ) -> None:
        self.model, self.block_size = model, block_size
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.device, self.dtype = model.embed_tokens.weight.device, model.embed_tokens.weight.dtype
        self.rows = Rows(max_num_seqs, max_model_len, block_size, self.device)
        self.graphs: dict[tuple[int, int, bool], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self.decode_sizes: list[int] = []
        self.mixed_sizes: list[int] = []
        self.allocate(1)

    def allocate(self, num_blocks: int) -> None:
        """Make the cache."""
        self.cache = PagedCache(self.model.config, num_blocks, self.block_size, self.device, self.dtype)

    @torch.inference_mode()
    def blocks_that_fit(self, gpu_memory_utilization: float) -> int:
        """How many blocks the GPU has room for, beside the weights and the largest step, which is run to see."""
        self.rows.set_steps([])  # all padding
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self._forward(self.max_num_batched_tokens, min(self.max_num_seqs, self.max_num_batched_tokens), False)
        torch.cuda.synchronize()
        step = torch.cuda.max_memory_allocated() - before
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        room = gpu_memory_utilization * total - (total - free) - 2 * step  # graphs keep a step's memory of their own
        return int(room // self.block_bytes)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of the cache, all layers."""
        return self.block_size * self.model.config.kv_bytes_per_token(str(self.dtype).removeprefix("torch."))

    # ---- a step ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, scheduled: Sequence[tuple[Request, int]]) -> Step:
        """Start computing (request, number of its next tokens) pairs. If it raises, it may be tried again."""
        # The longest first: programs of attention start in this order, and one that starts last should be short.
        scheduled = sorted(scheduled, key=lambda s: -s[0].num_computed)
        self.rows.update([request for request, _ in scheduled])
        self.rows.set_steps(scheduled)
        hidden_states, sampled = self._run(scheduled)  # [S, hidden], [S], and padding
        ready = [i for i, (r, count) in enumerate(scheduled) if r.num_computed + count == r.num_tokens]
        requests = [scheduled[i][0] for i in ready]
        logprobs = self._sample_specially(hidden_states, sampled, ready, requests)
        tokens = sampled[: len(scheduled)]
        if len(ready) < len(scheduled):
            tokens = tokens[torch.tensor(ready, dtype=torch.int64, device=self.device)]
        step = Step(requests, self._to_host(tokens), logprobs)
        if self.device.type == "cuda":
            step.done = torch.cuda.Event()
            step.done.record()
        return step

    def _to_host(self, x: Tensor) -> Tensor:
        if x.device.type != "cuda":
            return x.clone()
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)

    def _run(self, scheduled: Sequence[tuple[Request, int]]) -> tuple[Tensor, Tensor]:
        """The step itself, by a graph if one fits -> each sequence's last hidden states [S, hidden], next token [S]."""
        sequences, tokens = len(scheduled), sum(count for _, count in scheduled)
        decode = tokens == sequences
        sizes = self.decode_sizes if decode else self.mixed_sizes
        at = bisect.bisect_left(sizes, tokens)
        if at == len(sizes):
            return self._forward(tokens, sequences, decode)
        shape = (sizes[at], sizes[at] if decode else self.max_num_seqs, decode)
        graph, *results = self.graphs[shape]
        graph.replay()
        return tuple(results)

    def _forward(self, tokens: int, sequences: int, decode: bool) -> tuple[Tensor, Tensor]:
        """Everything that a graph holds, from rows to rows, one token longer -> hidden states and tokens as `_run`."""
        with dependent_launch():
            batch = self.rows.batch(tokens, sequences, decode)
            hidden_states = self.model(batch.token_ids, batch, self.cache)  # [N, hidden]
            hidden_states = hidden_states if decode else hidden_states[batch.last]  # [S, hidden]
            sampled = gumbel_argmax(self.model.lm_head(hidden_states), *batch.sampling)  # [S]
            self.rows.append(sampled)
        return hidden_states, sampled

    def _sample_specially(
        self, hidden_states: Tensor, sampled: Tensor, ready: list[int], requests: list[Request]
    ) -> Logprobs | None:
        """Sample again, in place, for those who want more than a temperature; log probabilities for who wants them."""
        wanting = [
            (i, r) for i, r in zip(ready, requests, strict=True) if _is_special(r) or r.params.logprobs is not None
        ]
        if not wanting:
            return None
        index = torch.tensor([i for i, _ in wanting], device=self.device)
        logits = self.model.logits(hidden_states[index])  # [P, vocab]
        again = [n for n, (_, r) in enumerate(wanting) if _is_special(r)]
        if again:
            sampled[index[again]] = self._sample(logits[again], [wanting[n][1] for n in again])
            self.rows.append(sampled)
        reported = [n for n, (_, r) in enumerate(wanting) if r.params.logprobs is not None]
        if not reported:
            return None
        logprobs = logits[reported].log_softmax(-1)  # those of the model, before any filter
        best = logprobs.topk(max(wanting[n][1].params.logprobs for n in reported))
        chosen = logprobs.gather(1, sampled[index[reported], None])[:, 0]
        row_of = {wanting[n][1]: row for row, n in enumerate(reported)}
        return Logprobs(*(self._to_host(x) for x in (best.indices, best.values, chosen)), row_of)

    def _sample(self, logits: Tensor, requests: list[Request]) -> Tensor:
        """By all of SamplingParams; the penalties read the tokens where they are, on the device.  -> [P] int64"""
        for row, request in zip(logits, requests, strict=True):
            if request.num_output < request.params.min_tokens and request.ends:
                row[sorted(request.ends)] = float("-inf")  # too early to end
        drawn = np.array([[r.seed for r in requests], [r.num_tokens for r in requests]], np.int64)
        noise = gumbel_noise(*to_device(drawn, self.device), logits.shape[1])
        known = [self.rows.tokens[r.row, : r.num_tokens] for r in requests]
        output = [ids[len(r.prompt_token_ids) :] for r, ids in zip(requests, known, strict=True)]
        return sample(logits, [r.params for r in requests], known, output_token_ids=output, noise=noise)

    # ---- CUDA graphs -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def capture(self) -> None:
        """Record a graph for every size, the largest first, so that the smaller ones reuse its memory."""
        decode = (1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, self.max_num_seqs, 32))
        self.decode_sizes = [*(n for n in decode if n < self.max_num_seqs), self.max_num_seqs]
        most = self.max_num_batched_tokens
        self.mixed_sizes = sorted({*range(most, 0, -max(256, most // 8)), *(n for n in (256, 512) if n < most)})
        shapes = [(n, self.max_num_seqs, False) for n in self.mixed_sizes] + [(n, n, True) for n in self.decode_sizes]
        shapes.sort(reverse=True)
        self.rows.set_steps([])  # all padding
        pool = torch.cuda.graph_pool_handle()
        for shape in shapes:
            self._forward(*shape)  # compiles kernels, which a graph could not record
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                results = self._forward(*shape)
            self.graphs[shape] = graph, *results


def _is_special(request: Request) -> bool:
    """Whether sampling is more than a temperature."""
    p = request.params
    filtered = p.top_k > 0 or p.top_p < 1 or p.min_p > 0
    penalized = p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
    return (filtered and p.temperature > 0) or penalized or request.num_output < p.min_tokens
