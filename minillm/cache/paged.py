"""The cache in blocks: one pool of slots a layer, written by slot and read through block tables.

`blocks.py` decides which block is whose; here are the tensors. Block b covers the slots b · block_size ...
(b + 1) · block_size - 1. In a dtype of 8 bits a token's key and value have a scale a head (`quantize_heads`). Every
token is attended to as it is stored, in its own step too: a chunk of a prompt sees what a whole one does.
"""

from typing import Protocol

import torch
from torch import Tensor

from ..config import ModelConfig
from ..kernels import AttentionPlan, paged_attention
from ..kernels.rope import QUANTIZED_DTYPES, store_rows

__all__ = ["PagedBatch", "PagedCache", "PagedLayer"]

Slots = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


class PagedBatch(Protocol):
    """What a step says of its sequences: see `engine/batch.py`. plan: for the torch path, what all layers share."""

    positions: Tensor
    slots: Tensor
    cu_seqlens_q: Tensor
    context_lens: Tensor
    block_tables: Tensor
    max_seqlen_q: int
    max_seqlen_k: int | None
    plan: AttentionPlan | None


class PagedLayer:
    """One layer's keys and values, each [slots, H_kv, D], and their scales, each [slots, H_kv], if they have any.
    `window`: how many tokens a token sees; 0: all.
    """

    def __init__(
        self, k: Tensor, v: Tensor, block_size: int, window: int, k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.k, self.v, self.k_scale, self.v_scale = k, v, k_scale, v_scale
        self.block_size, self.window = block_size, window

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a token keeps here."""
        return 2 * (self.k[0].nbytes + (0 if self.k_scale is None else self.k_scale[0].nbytes))

    def slots(self, batch: PagedBatch) -> Slots:
        """Where a kernel may write this step's keys and values itself: k, v, tokens' slots (-1: nowhere), scales."""
        return self.k, self.v, batch.slots, self.k_scale, self.v_scale

    def write(self, k: Tensor, v: Tensor, batch: PagedBatch) -> None:
        """Store each token's key and value in its slot.  k and v [N, H_kv, D]"""
        if batch.plan is not None:
            batch.plan.write(k, v, self.k, self.v, self.k_scale, self.v_scale)
            return
        used = batch.slots >= 0
        store_rows(k[used], self.k, self.k_scale, batch.slots[used])
        store_rows(v[used], self.v, self.v_scale, batch.slots[used])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: PagedBatch) -> Tensor:
        """Attention of the batch's queries to all that their sequences have stored.  [N, H, D] -> [N, H, D]"""
        if batch.plan is not None:
            return batch.plan.attend(q, self.k, self.v, None, self.window, self.k_scale, self.v_scale)
        return paged_attention(
            q, self.k, self.v, batch.block_tables, batch.context_lens, batch.cu_seqlens_q, batch.max_seqlen_q,
            self.block_size, window=self.window, max_seqlen_k=batch.max_seqlen_k, k_scale=self.k_scale,
            v_scale=self.v_scale,
        )  # fmt: skip


class PagedCache:
    """Keys and values of `num_blocks` blocks in every layer, in a dtype of their own; int8 and float8_e4m3fn with
    scales, `k_scale` and `v_scale` [layers, slots, H_kv] fp32, else None.

    A step's batch says which token goes to which slot (`slots`) and which blocks each sequence reads (`block_tables`,
    `context_lens`, `cu_seqlens_q`, `max_seqlen_q`, `max_seqlen_k`).
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        if num_blocks < 1 or block_size < 1 or block_size & (block_size - 1):
            raise ValueError(
                f"block_size, num_blocks: expected a power of 2 and 1 or more, got {block_size} and {num_blocks}"
            )
        self.block_size, self.num_blocks = block_size, num_blocks
        shape = (config.num_hidden_layers, num_blocks * block_size, config.num_key_value_heads, config.head_dim)
        # Not cleared: nothing reads a slot before it is written, and a CPU takes memory only where it is touched.
        self.k, self.v = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
        self.k_scale = self.v_scale = None
        if dtype in QUANTIZED_DTYPES:  # a head's scales side by side: a program reads those of one head
            by_head = torch.empty(2, shape[0], shape[2], shape[1], device=device, dtype=torch.float32)
            self.k_scale, self.v_scale = by_head.transpose(2, 3)  # [layers, slots, H_kv] each
        self.layers = [
            PagedLayer(
                self.k[i], self.v[i], block_size, config.window(i),
                *(None if x is None else x[i] for x in (self.k_scale, self.v_scale)),
            )
            for i in range(config.num_hidden_layers)
        ]  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks: num_blocks · block_size · bytes_per_token."""
        return sum(x.nbytes for x in self._tensors)

    @property
    def _tensors(self) -> list[Tensor]:
        return [x for x in (self.k, self.v, self.k_scale, self.v_scale) if x is not None]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a token keeps, in all layers."""
        return sum(layer.bytes_per_token for layer in self.layers)

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to) each, in every layer, before a step writes: copy on write."""
        if not pairs:
            return
        blocks = torch.tensor(pairs, device=self.k.device)  # [pairs, 2]
        for cache in self._tensors:
            by_block = cache.unflatten(1, (-1, self.block_size))  # [layers, blocks, block_size, H_kv(, D)]
            by_block[:, blocks[:, 1]] = by_block[:, blocks[:, 0]]
