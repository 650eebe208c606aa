"""What one step needs, as tensors: an argument of the model, never a global.

The tokens of all sequences lie one after another, N in all. A sequence that decodes brings one token, a prompt many, a
chunk of a prompt some.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .request import Request

__all__ = ["Batch", "make_batch"]


@dataclass(frozen=True)
class Batch:
    """One step: S sequences with N new tokens.

    positions [N] int64, each token's place in its sequence; slots [N] int64, where its key and value go (-1: nowhere);
    cu_seqlens_q [S + 1] int32, where each sequence's tokens begin; context_lens [S] int32, its tokens in the cache
    after this step; block_tables [S, W] int32; max_seqlen_q, the most new tokens of one sequence; last [S] int64, the
    row of each sequence's last new token, whose logits give the next one.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    cu_seqlens_q: Tensor
    context_lens: Tensor
    block_tables: Tensor
    max_seqlen_q: int
    last: Tensor


def make_batch(scheduled: Sequence[tuple[Request, int]], block_size: int, device: torch.device | str = "cpu") -> Batch:
    """The batch of (request, number of new tokens) pairs, each request's `num_computed` counted up to before them."""
    counts = np.array([count for _, count in scheduled], np.int64)
    starts = np.array([request.num_computed for request, _ in scheduled], np.int64)
    bounds = np.concatenate(([0], counts.cumsum()))
    positions = np.arange(bounds[-1]) + np.repeat(starts - bounds[:-1], counts)  # [N]
    width = max(len(request.table.blocks) for request, _ in scheduled)
    tables = np.zeros((len(scheduled), width), np.int32)
    for row, (request, _) in zip(tables, scheduled, strict=True):
        row[: len(request.table.blocks)] = request.table.blocks
    owner = np.repeat(np.arange(len(scheduled)), counts)  # [N]
    slots = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
    token_ids = [t for request, count in scheduled for t in request.tokens(request.num_computed, count)]

    def tensor(values: np.ndarray | list[int], dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(values, dtype=dtype, device=device)

    return Batch(
        token_ids=tensor(token_ids, torch.int64),
        positions=tensor(positions, torch.int64),
        slots=tensor(slots, torch.int64),
        cu_seqlens_q=tensor(bounds, torch.int32),
        context_lens=tensor(starts + counts, torch.int32),
        block_tables=tensor(tables, torch.int32),
        max_seqlen_q=int(counts.max()),
        last=tensor(bounds[1:] - 1, torch.int64),
    )
