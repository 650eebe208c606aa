"""The parts of a decoder layer: RMSNorm, rotary positions, attention, SwiGLU.

Shapes: B sequences, T tokens, H query heads, H_kv key/value heads, D features a head. Everything but attention itself
works on any leading dimensions, so the same layers serve a padded batch [B, T, ...] and an engine's flat list of
tokens [N, ...].
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from ..kernels import KERNELS, add_rms_norm, flash_attention, linear, norm_linear, rms_norm, rope

__all__ = [
    "MLP",
    "Attention",
    "AttentionCache",
    "Linear",
    "NoCache",
    "PaddedBatch",
    "RMSNorm",
    "apply_rope",
    "attention",
    "rope_tables",
    "rotate",
]


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


class Linear(nn.Linear):
    """x Wᵀ.  [..., in] -> [..., out]

    `after(norm, branch, stream)` is what a decoder layer wants of it: the residual stream goes on as branch + stream,
    and its norm goes through the weights. One token on a GPU takes one kernel for that.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)

    def after(
        self, norm: RMSNorm, branch: Tensor, stream: Tensor | None, use_swiglu: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(f(norm(branch + stream) Wᵀ), branch + stream); f is SwiGLU over the halves of the result, or nothing."""
        return norm_linear(branch, stream, norm.weight, self.weight, norm.eps, use_swiglu)


def rope_tables(config: ModelConfig, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
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


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) by its angle.  x [..., heads, D], cos and sin [..., D/2] -> [..., heads, D]

    Pairs are the two halves of a head, as in Hugging Face checkpoints (the paper pairs neighbors; the two differ by a
    fixed permutation).
    """
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)  # [..., 1, D/2]: the same for every head
    first, second = x.chunk(2, dim=-1)  # [..., heads, D/2] each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)  # [..., heads, D]


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norms: tuple[RMSNorm, RMSNorm] | None = None
) -> tuple[Tensor, Tensor]:
    """`apply_rope` for queries and keys, normed first where there are `norms`; one kernel, in place, on a GPU."""
    if norms is not None:
        q, k = norms[0](q), norms[1](k)
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


# cos and sin of each token's angles [..., D/2], and the norms of q and k that go first, if there are
Rope = tuple[Tensor, Tensor, tuple[RMSNorm, RMSNorm] | None]


class AttentionCache(Protocol):
    """What a layer asks for attention: it may remember earlier keys and values, in whatever form it likes."""

    def place(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rope, batch: Any) -> tuple[Tensor, Tensor]:
        """Turn q and k to their positions, as `rotate(q, k, *rope)`; who remembers k and v does it here -> q, k"""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Any) -> Tensor:
        """Attention of this step's queries.  q [..., H, D], k and v [..., H_kv, D] -> [..., H, D]"""


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


class NoCache:
    """The cache that keeps nothing: causal attention among the tokens of this call, [B, T, ...].

    With `window=W` a token attends to the last W tokens, itself included (Beltagy et al., 2020, "Longformer").
    """

    def __init__(self, window: int = 0) -> None:
        if not isinstance(window, int) or isinstance(window, bool) or window < 0:
            raise ValueError(f"window: expected an integer, 1 or more, or 0 for none, got {window!r}")
        self.window = window

    def place(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rope, batch: Any) -> tuple[Tensor, Tensor]:
        """Turn q and k, remember nothing."""
        return rotate(q, k, *rope)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: PaddedBatch | None) -> Tensor:
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


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, behind a norm.

    (branch, stream or None) -> (what attention adds, branch + stream), each [..., hidden].
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.sizes = [config.q_size, config.kv_size, config.kv_size]
        self.qkv_proj = Linear(config.hidden_size, sum(self.sizes))  # one matrix product instead of three
        self.o_proj = Linear(config.q_size, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None  # Qwen3
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self, norm: RMSNorm, branch: Tensor, stream: Tensor | None, rope: tuple[Tensor, Tensor],
        cache: AttentionCache, batch: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        qkv, stream = self.qkv_proj.after(norm, branch, stream)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in qkv.split(self.sizes, dim=-1))  # [..., heads, D]
        norms = None if self.q_norm is None else (self.q_norm, self.k_norm)
        q, k = cache.place(self.layer, q, k, v, (*rope, norms), batch)  # normed (Qwen3), turned by RoPE
        out = cache.attend(self.layer, q, k, v, batch)  # [..., H, D]
        return self.o_proj(out.flatten(-2)), stream  # [..., hidden]


class MLP(nn.Module):
    """SwiGLU behind a norm: down(silu(gate(x)) · up(x)).    Source: Shazeer, 2020, "GLU Variants Improve Transformer".

    (branch, stream) -> (what the MLP adds, branch + stream), each [..., hidden].
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, norm: RMSNorm, branch: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        act, stream = self.gate_up_proj.after(norm, branch, stream, use_swiglu=True)  # silu(gate) · up: [..., I]
        return self.down_proj(act), stream
