"""What one step needs, as tensors: an argument of the model, never a global. And what the device remembers in between.

The tokens of all sequences lie one after another, N in all. A sequence that decodes brings one token, a prompt many, a
chunk of a prompt some. The host says only which rows take part, from which token on, and how many (`steps`); everything
else is computed from that on the device, where the rows are. So a step can be launched before the tokens of the step
before it are known to the host, and a CUDA graph can replay it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..kernels import append_tokens, step_inputs
from .request import Request

__all__ = ["Batch", "Rows", "to_device"]


@dataclass(frozen=True)
class Batch:
    """One step: S sequences with N new tokens. Padding tokens have slot -1, padding sequences no tokens.

    token_ids and positions [N] int64, each token and its place in its sequence; slots [N] int64, where its key and
    value go; cu_seqlens_q [S + 1] int32, where each sequence's tokens begin; context_lens [S] int32, its tokens in the
    cache after this step; block_tables [S, W] int32; max_seqlen_q, at least the most new tokens of one sequence; last
    [S] int64, the row of each sequence's last new token, whose logits give the next one; sampling, what `gumbel_argmax`
    wants to draw that: temperatures fp32, seeds int64 and the token's place int32, [S] each.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    cu_seqlens_q: Tensor
    context_lens: Tensor
    block_tables: Tensor
    max_seqlen_q: int
    last: Tensor
    sampling: tuple[Tensor, Tensor, Tensor]


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device; for a GPU through pinned memory, so that the host need not wait."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Rows:
    """A row of one int32 matrix for each running request: its tokens, its block table, its sampling options.

    One more row stands for padding. `max_num_seqs` requests of at most `max_model_len` tokens.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self.device, self.block_size, self.padding = device, block_size, max_num_seqs
        table, options = max_model_len, max_model_len - (-max_model_len // block_size)  # first column of each
        self.columns, self.width = {"table": table, "options": options}, options + 3
        self.matrix = torch.zeros(max_num_seqs + 1, self.width, dtype=torch.int32, device=device)
        self.tokens, self.tables = self.matrix[:, :table], self.matrix[:, table:options]
        self.steps = torch.zeros(4, max_num_seqs + 1, dtype=torch.int32, device=device)

    # ---- from the host -----------------------------------------------------------------------------------------------

    def update(self, requests: Sequence[Request]) -> None:
        """Bring the rows up to date: everything of a request that is new here, new blocks of one that is not."""
        places: list[int] = []
        values: list[int] = []
        changed = [r for r in requests if not r.on_device or r.table.synced < len(r.table.blocks)]
        for request in changed:
            table, start = request.table, request.row * self.width
            if not request.on_device:
                for column, new in ((0, request.tokens()), (self.columns["options"], _options(request))):
                    places += range(start + column, start + column + len(new))
                    values += new
            first = start + self.columns["table"]
            places += range(first + table.synced, first + len(table.blocks))
            values += table.blocks[table.synced :]
        if changed:
            where, what = to_device(np.array((places, values), np.int64), self.device)
            self.matrix.view(-1).index_put_((where,), what.int())
        for request in changed:  # only now: should the above raise, all of it is due again
            request.on_device, request.table.synced = True, len(request.table.blocks)

    def set_steps(self, scheduled: Sequence[tuple[Request, int]]) -> None:
        """Say what the next step computes: (request, number of its next tokens) pairs.

        Four rows of numbers, a column a sequence: its row, its first token, the place of the token that it will sample,
        and where its tokens begin in the batch. A chunk that leaves tokens of the prompt samples too: nobody reads that
        token, and the right one comes to the same place.
        """
        steps = np.zeros((4, self.padding + 1), np.int32)
        steps[0], n = self.padding, len(scheduled)
        steps[:3, :n] = [[r.row for r, _ in scheduled], [r.num_computed for r, _ in scheduled],
                         [r.num_tokens for r, _ in scheduled]]  # fmt: skip
        counts = [count for _, count in scheduled]
        steps[3, 1 : n + 1] = np.cumsum(counts)
        steps[3, n + 1 :] = steps[3, n]
        self.steps.copy_(to_device(steps, self.device), non_blocking=True)

    # ---- on the device -----------------------------------------------------------------------------------------------

    def batch(self, tokens: int, sequences: int, decode: bool) -> Batch:
        """The batch that `set_steps` described, padded to so many tokens and sequences; decode: one token each."""
        token_ids, positions, slots, context_lens, block_tables, last, temperatures, seeds = step_inputs(
            self.steps, self.matrix, *self.columns.values(), self.block_size, tokens, sequences
        )
        return Batch(
            token_ids, positions, slots, self.steps[3, : sequences + 1], context_lens, block_tables,
            1 if decode else tokens, last, (temperatures, seeds, self.steps[2, :sequences]),
        )  # fmt: skip

    def append(self, sampled: Tensor) -> None:
        """Write each sequence's new token behind its others.  [S] int64"""
        append_tokens(self.steps, self.matrix, sampled)


def _options(request: Request) -> list[int]:
    """Temperature and seed as the bits of three int32."""
    bits = np.array([request.params.temperature], np.float32).view(np.int32)
    halves = np.array([request.seed], np.int64).view(np.int32)  # low, high
    return [*bits.tolist(), *halves.tolist()]
