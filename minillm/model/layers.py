"""The parts of a decoder layer: RMSNorm, rotary positions, attention, SwiGLU.

Shapes: B sequences, T tokens, H query heads, H_kv key/value heads, D features a head. Everything but attention itself
works on any leading dimensions, so the same layers serve a padded batch [B, T, ...] and an engine's flat list of
tokens [N, ...].
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from ..kernels import KERNELS, add_rms_norm, apply_rope, flash_attention, rms_norm, rope, rope_and_cache, swiglu
from .linear import LinearFactory, dense

__all__ = [
    "MLP",
    "Attention",
    "Batch",
    "Cache",
    "LayerCache",
    "NoCache",
    "NoCacheLayer",
    "PaddedBatch",
    "RMSNorm",
    "attention",
    "rope_tables",
    "rotate",
]

Rope = tuple[Tensor, Tensor]  # cos and sin of each token's angles, [..., D/2] each


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, over the last dimension; statistics in fp32.  [..., hidden] -> [..., hidden]

    Source: Zhang and Sennrich, 2019, "Root Mean Square Layer Normalization".
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, the sum itself), in one kernel on a GPU; without a residual x is the sum."""
        return (self(x), x) if residual is None else add_rms_norm(x, residual, self.weight, self.eps)


def rope_tables(config: ModelConfig, device: torch.device | str = "cpu") -> Rope:
    """cos and sin of every position's angles, each [max_position_embeddings, D/2] in fp32.

    Pair i of a head turns by position · theta^(-2i/D). Sources: Su et al., 2021, "RoFormer"; the llama3 scaling is
    that of Llama 3.1.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim  # [D/2]
    frequencies = _scaled(1.0 / config.rope_theta**exponents, config.rope_scaling)
    positions = torch.arange(config.max_position_embeddings, device=device).float()
    angles = torch.outer(positions, frequencies)  # [positions, D/2]
    return angles.cos(), angles.sin()


def _scaled(frequencies: Tensor, scaling: dict[str, Any] | None) -> Tensor:
    """Stretch RoPE to a longer context: all frequencies alike ("linear"), or only the slow ones ("llama3")."""
    if scaling is None:
        return frequencies
    slow = frequencies / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slow
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    # How often a pair turns within the original context: many turns stay as trained, few are stretched, a ramp lies
    # between.
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * slow


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`apply_rope` for queries and keys; one kernel, in place, on a GPU.

    q [..., H, D], k [..., H_kv, D], cos and sin [..., D/2] -> the same shapes.
    """
    if KERNELS["rope"].path(q, k) != "triton":
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    cos, sin = (x.expand(*q.shape[:-2], -1).reshape(-1, x.shape[-1]) for x in (cos, sin))  # [N, D/2]
    rope(q.view(-1, *q.shape[-2:]), k.view(-1, *k.shape[-2:]), cos, sin)
    return q, k


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v; causal when `mask` is None.

    q [B, T, H, D], k and v [B, S, H_kv, D], mask bool and broadcastable to [B, H, T, S] (True: may attend) -> [B, T,
    H, D]. Query head h reads key/value head h // (H / H_kv). Sources: Vaswani et al., 2017; Ainslie et al., 2023
    (grouped queries).
    """
    sequences, tokens = q.shape[:2]
    if mask is None and k.shape[1] == tokens and KERNELS["flash_attention"].path(q, k, v) == "triton":
        bounds = torch.arange(0, sequences * tokens + 1, tokens, dtype=torch.int32, device=q.device)
        out = flash_attention(*(x.flatten(0, 1) for x in (q, k, v)), bounds, bounds, tokens)  # [B · T, H, D]
        return out.unflatten(0, (sequences, tokens))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, heads, tokens, D]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)  # [B, T, H, D]


# ---- what a layer asks of a cache ----------------------------------------------------------------------------------


class Batch(Protocol):
    """Which tokens belong together. A cache knows the rest from its own kind of batch."""

    @property
    def positions(self) -> Tensor:
        """The place of each token in its sequence, of token_ids' shape."""


class LayerCache(Protocol):
    """One layer's memory of keys and values, in whatever form it likes, with a sliding window or without.

    Keys come normed and turned by RoPE. q [..., H, D], k and v [..., H_kv, D].
    """

    def slots(self, batch: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None] | None:
        """Where a kernel may write this step's turned keys and its values itself: caches of keys and of values, each
        [slots, H_kv, D], each token's slot [N], -1 for none, and for caches of 8 bits the scales of keys and of values,
        each [slots, H_kv]. None: by `write`, please.
        """

    def write(self, k: Tensor, v: Tensor, batch: Any) -> None:
        """Remember this step's keys and values."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: Any) -> Tensor:
        """Attention of this step's queries to what is remembered.  [..., H, D] -> [..., H, D]

        k and v are this step's, for caches that look at them before they store them. Where a kernel has written to
        `slots`, k is as it came from the projection: read the slots instead.
        """


class Cache(Protocol):
    """Every layer's memory."""

    @property
    def layers(self) -> Sequence[LayerCache]:
        """One a layer, from the first."""


@dataclass(frozen=True)
class PaddedBatch:
    """Sequences of different lengths in one rectangle: `attention_mask` [B, T] bool, False where a token is padding
    (on either side).
    """

    attention_mask: Tensor

    @property
    def positions(self) -> Tensor:
        """The position of each token in its own sequence, padding not counted.  [B, T]"""
        return (self.attention_mask.long().cumsum(-1) - 1).clamp(min=0)


class NoCacheLayer:
    """The layer that remembers nothing: causal attention among the tokens of this call, [B, T, ...].

    With `window=W` a token attends to the last W tokens, itself included (Beltagy et al., 2020, "Longformer").
    """

    def __init__(self, window: int = 0) -> None:
        if not isinstance(window, int) or isinstance(window, bool) or window < 0:
            raise ValueError(f"window: expected an integer, 1 or more, or 0 for none, got {window!r}")
        self.window = window

    def slots(self, batch: PaddedBatch | None) -> None:
        """Nowhere."""

    def write(self, k: Tensor, v: Tensor, batch: PaddedBatch | None) -> None:
        """Forget them."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: PaddedBatch | None) -> Tensor:
        """Attend; of `batch` only the mask matters. A padding row attends to itself and means nothing."""
        if batch is None and not self.window:
            return attention(q, k, v)
        tokens = q.shape[1]
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()  # causal
        if self.window:
            mask = mask.triu(1 - self.window)
        if batch is not None:
            itself = torch.eye(
                tokens, dtype=torch.bool, device=q.device
            )  # so that a padding row has something to attend to, not 0/0
            mask = (mask & batch.attention_mask.bool()[:, None, None, :]) | itself  # [B, 1, T, S]
        return attention(q, k, v, mask)


class NoCache:
    """The cache that keeps nothing. Each layer has the window that a config gives it, or all have the same (0: none).

    Raises ValueError for a window that makes no sense.
    """

    def __init__(self, windows: ModelConfig | int = 0) -> None:
        self.layers: Sequence[NoCacheLayer]
        if isinstance(windows, ModelConfig):
            self.layers = [NoCacheLayer(windows.window(i)) for i in range(windows.num_hidden_layers)]
        else:
            self.layers = _Same(NoCacheLayer(windows))


class _Same(Sequence):
    """One for all layers, however many there are."""

    def __init__(self, layer: NoCacheLayer) -> None:
        self.layer = layer

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: Any) -> Any:
        return self.layer


# ---- the two halves of a layer -------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Grouped-query attention with rotary positions.  [..., hidden] -> [..., hidden]

    `name` is where the layer stands in the model, `linear` makes its projections.
    """

    def __init__(self, config: ModelConfig, name: str = "self_attn", linear: LinearFactory = dense) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        parts = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
        self.qkv_proj = linear(f"{name}.qkv_proj", config.hidden_size, parts, config.qkv_bias)  # one product, not three
        self.o_proj = linear(f"{name}.o_proj", config.q_size, {"o_proj": config.hidden_size}, config.o_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None  # Qwen3
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self, x: Tensor, rope: Rope, cache: LayerCache, batch: Batch | None = None, rows: Tensor | None = None
    ) -> Tensor:
        return self.attend(self.qkv_proj(x, batch), rope, cache, batch, rows)

    def attend(
        self, qkv: Tensor, rope: Rope, cache: LayerCache, batch: Batch | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """All that comes after the first projection, of `rows` or of all.  [..., (H + 2 H_kv) D] -> [..., hidden]"""
        heads = qkv.view(*qkv.shape[:-1], -1, self.head_dim)  # [..., H + 2 H_kv, D]
        q, k, v = heads.split_with_sizes(self.heads, -2)
        slots = cache.slots(batch)
        if slots is not None and KERNELS["rope_and_cache"].path(q, k, v) == "triton":
            self._turn_and_write(q, k, v, rope, slots)
        else:
            q, k = self._turn(heads, q, k, rope)
            cache.write(k, v, batch)
        out = cache.attend(q, k, v, batch)  # [..., H, D]
        out = out if rows is None else out[rows]
        return self.o_proj(out.flatten(-2), batch)  # [..., hidden]

    def _turn(self, heads: Tensor, q: Tensor, k: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Every head to its position, after its norm if it has one."""
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        elif KERNELS["rope"].path(q, k) == "torch":  # both at once
            both = apply_rope(heads.narrow(-2, 0, self.heads[0] + self.heads[1]), *rope)
            q, k = both.split_with_sizes(self.heads[:2], -2)
            return q, k
        return rotate(q, k, *rope)

    def _turn_and_write(
        self, q: Tensor, k: Tensor, v: Tensor, rope: Rope,
        slots: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    ) -> None:  # fmt: skip
        """The same and the cache's `write` in one kernel: q in place, the turned keys in their slots alone."""
        if self.q_norm is not None and self.k_norm is not None:
            weights = {"q_weight": self.q_norm.weight, "k_weight": self.k_norm.weight}
            rope_and_cache(q, k, v, *rope, *slots, **weights, eps=self.q_norm.eps)
        else:
            rope_and_cache(q, k, v, *rope, *slots)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)).  [..., hidden] -> [..., hidden]

    Source: Shazeer, 2020, "GLU Variants Improve Transformer". `name` and `linear` as for `Attention`.
    """

    def __init__(self, config: ModelConfig, name: str = "mlp", linear: LinearFactory = dense) -> None:
        super().__init__()
        parts = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        self.gate_up_proj = linear(f"{name}.gate_up_proj", config.hidden_size, parts, config.mlp_bias)
        self.down_proj = linear(
            f"{name}.down_proj", config.intermediate_size, {"down_proj": config.hidden_size}, config.mlp_bias
        )

    def forward(self, x: Tensor, batch: Batch | None = None) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x, batch)), batch)
