"""What one step needs, as tensors: an argument of the model, never a global. And what the device remembers in between.

The tokens of all sequences lie one after another, N in all. A sequence that decodes brings one token, a prompt many, a
chunk of a prompt some. The host says only which rows take part, from which token on, and how many (a `Plan`, see
`table.py`); everything else is computed from that on the device, where the rows are. So a step can be launched before
the tokens of the step before it are known to the host, and a CUDA graph can replay it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels import KERNELS, AttentionPlan, LoraPlan, append_tokens, step_inputs

__all__ = ["OPTIONS", "Batch", "DeviceTable", "RowLayout", "to_device"]

# What a request's row says beside its tokens: the one place. The host writes these from `SamplingParams` (and from
# `Request.options`, which goes first), `Batch.options` has them on the device, and who needs one there reads it.
OPTIONS: dict[str, torch.dtype] = {
    "seed": torch.int64,
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "repetition_penalty": torch.float32,
    "presence_penalty": torch.float32,
    "frequency_penalty": torch.float32,
}
NUMPY: dict[torch.dtype, Any] = {torch.int64: np.int64, torch.float32: np.float32, torch.int32: np.int32}


class RowLayout:
    """Where what stands in a row of int32: length | options (64 bits first, in two columns) | tokens | block table.

    max_tokens: of one request, those included that a step may give beyond the longest sequence.
    """

    def __init__(self, max_tokens: int, num_blocks: int, options: Mapping[str, torch.dtype] | None = None) -> None:
        options = OPTIONS if options is None else options
        if unknown := [f"{name} {dtype}" for name, dtype in options.items() if dtype not in NUMPY]:
            raise ValueError(f"options: expected {', '.join(map(str, NUMPY))}, got {unknown[0]}")
        self.wide = sum(dtype == torch.int64 for dtype in options.values())  # options of 64 bits
        self.options = dict(sorted(options.items(), key=lambda item: item[1] != torch.int64))
        self.num_columns = len(options) + self.wide  # of options
        self.first_token = 1 + self.num_columns
        self.first_block = self.first_token + max_tokens
        self.width = self.first_block + num_blocks

    def encode(self, values: Mapping[str, float]) -> list[int]:
        """The options' bits, as a row holds them."""
        parts = [np.array([values[name]], NUMPY[dtype]).view(np.int32) for name, dtype in self.options.items()]
        return np.concatenate(parts).tolist() if parts else []


@dataclass(frozen=True)
class Batch:
    """One step: S sequences with N new tokens. Padding tokens have slot -1, padding sequences no tokens.

    token_ids and positions [N] int64, each token and its place in its sequence; slots [N] int64, where its key and
    value go; cu_seqlens_q [S + 1] int32, where each sequence's tokens begin; context_lens [S] int32, its tokens in the
    cache after this step; block_tables [S, W] int32; max_seqlen_q, at least the most new tokens of one sequence;
    logit_rows [S] int64, the row whose hidden state gives each sequence's next token; lengths [S] int32, the place of
    that token; options, what `OPTIONS` declares, [S] each; plan, on the torch path, what all layers' attention shares;
    max_seqlen_k, as many tokens as a sequence may have in the cache (None: any); lora, which token has which adapter
    (None: none has any).
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    cu_seqlens_q: Tensor
    context_lens: Tensor
    block_tables: Tensor
    max_seqlen_q: int
    logit_rows: Tensor
    lengths: Tensor
    options: dict[str, Tensor]
    plan: AttentionPlan | None = None
    max_seqlen_k: int | None = None
    lora: LoraPlan | None = None


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device; for a GPU through pinned memory, so that the host need not wait."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class DeviceTable:
    """The rows on the device: one matrix, a row for each running request and one more for padding.

    `steps` says what the next step computes; `options` and `lengths` are those of the sequences of the last `batch`.
    """

    def __init__(self, layout: RowLayout, max_num_seqs: int, block_size: int, device: torch.device) -> None:
        self.layout, self.block_size, self.padding = layout, block_size, max_num_seqs
        self.device = device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.matrix = zeros(max_num_seqs + 1, layout.width)
        self.steps = zeros(4, max_num_seqs + 1)
        self._sent = np.full(tuple(self.steps.shape), -2, np.int32)  # what the host said last: nobody's steps
        self.lengths = zeros(max_num_seqs)
        self._options = zeros(layout.num_columns, max_num_seqs)
        self.given = torch.ones(max_num_seqs, dtype=torch.int32, device=device)  # tokens that a plain step gives
        self.options: dict[str, Tensor] = {}
        column = 0
        for name, dtype in layout.options.items():
            columns = 2 if dtype == torch.int64 else 1
            self.options[name] = self._options[column : column + columns].view(-1).view(dtype)  # [max_num_seqs]
            column += columns

    # ---- from the host -----------------------------------------------------------------------------------------------

    def update(self, places: np.ndarray, values: np.ndarray) -> None:
        """Write numbers into the matrix.  places [n] int64, counted from its first number; values [n] int32"""
        if len(places):
            index = to_device(places, self.device)
            self.matrix.view(-1).index_put_((index,), to_device(values, self.device))

    def set_steps(self, steps: np.ndarray) -> None:
        """Say what the next step computes: as `Plan.steps`, [4, max_num_seqs + 1] int32.

        While the same sequences decode, that is what the step before computed, and nothing need be sent.
        """
        if not np.array_equal(steps, self._sent):
            self._sent.fill(-2)  # until it has been sent
            self.steps.copy_(to_device(steps, self.device), non_blocking=True)
            self._sent[:] = steps

    def nobody(self) -> np.ndarray:
        """Steps without a request: all padding."""
        steps = np.zeros(tuple(self.steps.shape), np.int32)
        steps[0] = self.padding
        return steps

    # ---- on the device -----------------------------------------------------------------------------------------------

    def batch(
        self, tokens: int, sequences: int, decode: bool, max_seqlen_k: int | None = None, num_adapters: int = 0,
        max_seqlen_q: int | None = None,
    ) -> Batch:  # fmt: skip
        """The batch that `set_steps` described, padded to so many tokens and sequences; decode: one token each.
        num_adapters: slots of adapters, where the step has some. max_seqlen_q: tokens that one may have (None: any).
        """
        token_ids, positions, slots, context_lens, block_tables, logit_rows = step_inputs(
            self.steps, self.matrix, self._options, self.lengths, self.layout.first_token, self.layout.first_block,
            self.layout.wide, self.block_size, tokens, sequences,
        )  # fmt: skip
        bounds, plan, max_seqlen_q = self.steps[3, : sequences + 1], None, 1 if decode else max_seqlen_q or tokens
        if KERNELS["paged_attention"].path(self.matrix) == "torch":
            plan = AttentionPlan(block_tables, context_lens, bounds, self.block_size)
        return Batch(
            token_ids, positions, slots, bounds, context_lens, block_tables, max_seqlen_q, logit_rows,
            self.lengths[:sequences], self.options_of(sequences), plan, max_seqlen_k,
            self._lora(tokens, sequences, decode, num_adapters) if num_adapters else None,
        )  # fmt: skip

    def _lora(self, tokens: int, sequences: int, decode: bool, slots: int) -> LoraPlan:
        """Each token has its sequence's adapter, one of padding none."""
        adapters = self.options["adapter"][:sequences]
        if not decode:
            ends = self.steps[3, 1 : sequences + 1]  # where each sequence's tokens end
            token = torch.arange(tokens, dtype=torch.int32, device=self.device)
            sequence = torch.searchsorted(ends, token, right=True).clamp_(max=sequences - 1)
            adapters = adapters[sequence].masked_fill_(token >= ends[-1], 0)
        return LoraPlan.of(adapters, slots)

    def options_of(self, sequences: int) -> dict[str, Tensor]:
        """The options of the first sequences of the last batch, [S] each."""
        return {name: values[:sequences] for name, values in self.options.items()}

    def logit_rows(self, last: Tensor, width: int) -> Tensor:
        """The rows of the batch whose hidden states give each sequence's next tokens: of its last token but its
        guesses, then of each guess. Where there are fewer, the last one's again.  last [S] -> [S W]
        """
        ahead = torch.arange(width, device=self.device)
        guesses = (self.steps[2, : len(last)] - 1).clamp(min=0)
        return (last[:, None] + (ahead - guesses[:, None]).clamp(max=0)).view(-1)

    def append(self, sampled: Tensor, given: Tensor | None = None) -> None:
        """Write each sequence's new tokens behind its others.  [S, K] int64, and how many are meant [S] int32"""
        given = self.given[: len(sampled)] if given is None else given
        append_tokens(self.steps, self.matrix, sampled, given, self.layout.first_token)
