"""The model: embedding, a stack of layers that each add to the residual stream, a norm, a head over the vocabulary."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..kernels import KERNELS, rope_factors
from .layers import MLP, Attention, Batch, Cache, LayerCache, NoCache, RMSNorm, Rope, rope_tables
from .linear import LinearFactory, dense

__all__ = ["Layer", "Transformer"]


class Layer(nn.Module):
    """Attention, then MLP, each behind a norm and added to the residual stream.  [..., hidden] -> [..., hidden]"""

    def __init__(self, config: ModelConfig, name: str = "layer", linear: LinearFactory = dense) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, f"{name}.self_attn", linear)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, f"{name}.mlp", linear)

    def forward(
        self, x: Tensor, rope: Rope, cache: LayerCache, batch: Batch | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """rows: of which tokens (x [N, hidden]) the result is asked; keys and values of all are remembered."""
        branch = self.self_attn(self.input_layernorm(x), rope, cache, batch, rows)
        x = (x if rows is None else x[rows]) + branch
        return x + self.mlp(self.post_attention_layernorm(x), batch)

    def fused(
        self, branch: Tensor, stream: Tensor | None, rope: Rope, cache: LayerCache, batch: Batch | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The same in fewer kernels: sum, norm and product are one step (`Linear.add_norm`).

        So the stream travels apart from the branch that is still to be added to it: (branch, stream or None) ->
        (branch, stream), each [..., hidden]. rows as for `forward`.
        """
        attn, mlp = self.self_attn, self.mlp
        qkv, stream = attn.qkv_proj.add_norm(self.input_layernorm, branch, stream, batch)
        branch = attn.attend(qkv, rope, cache, batch, rows)
        stream = stream if rows is None else stream[rows]
        act, stream = mlp.gate_up_proj.add_norm(self.post_attention_layernorm, branch, stream, batch, use_swiglu=True)
        return mlp.down_proj(act, batch), stream


class Transformer(nn.Module):
    """A decoder-only language model: Llama, Mistral, Qwen2 or Qwen3.

        model = Transformer(config)                     # random weights, ready to train
        hidden_states = model(token_ids)                # [B, T] -> [B, T, hidden]
        logits = model.logits(hidden_states[:, -1])     # [B, vocab]: take only the rows that are needed

    `batch` says what belongs together (a `PaddedBatch`, or an engine's batch) and has `positions` of token_ids'
    shape; without it every row of `token_ids` is one sequence from position 0. `cache` answers for attention; without
    it nothing is remembered. `linear` makes every projection and the head. Raises ValueError for token ids outside the
    vocabulary and positions beyond `max_position_embeddings` (checked on the CPU only: on a GPU the check would make
    the host wait).

    Whoever changes weights or replaces modules adds 1 to `revision`: `fingerprint` then differs.
    """

    layers: Sequence[Layer]
    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: ModelConfig, linear: LinearFactory = dense) -> None:
        super().__init__()
        self.config = config
        self.revision = 0
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = [Layer(config, f"layers.{i}", linear) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)  # type: ignore[assignment]  # what it is beside what is in it
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = linear("lm_head", config.hidden_size, {"lm_head": config.vocab_size}, False)
        # Whether the head has no tensor of its own. (A head that cannot share the embedding's has one all the same.)
        self.tied = config.tie_word_embeddings and self.lm_head.tie(self.embed_tokens)
        cos, sin = rope_tables(config)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self._no_cache = NoCache(config)
        self._watched: tuple[int, list[Tensor]] = (-1, [])
        if self.norm.weight.device.type != "meta":
            self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw all matrices from N(0, std²); those that write into the residual stream from N(0, std² / (2 · layers)).

        So the stream's variance does not grow with depth. Source: Radford et al., 2019 (GPT-2), section 2.3.
        """
        residual_std = std / (2 * self.config.num_hidden_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=residual_std if into_residual else std)
        self.revision += 1

    def forward(
        self, token_ids: Tensor, batch: Batch | None = None, cache: Cache | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Hidden states of every token, after the last norm.  token_ids [...] int64 -> [..., hidden]

        rows [R] int64: of these tokens (of token_ids [N]) alone -> [R, hidden]. The last layer then computes for the
        others no more than their keys and values.
        """
        positions = torch.arange(token_ids.shape[-1], device=token_ids.device) if batch is None else batch.positions
        if batch is not None and positions.shape != token_ids.shape:
            raise ValueError(
                f"batch: expected positions of token_ids' shape {list(token_ids.shape)}, got {list(positions.shape)};"
                " is it another step's?"
            )
        if token_ids.device.type == "cpu":
            self._check(token_ids, positions)
        rope = self.rope_cos[positions], self.rope_sin[positions]  # [..., D/2] each
        caches = (self._no_cache if cache is None else cache).layers
        x = self.embed_tokens(token_ids)  # [..., hidden]
        asked = [None] * (len(self.layers) - 1) + [rows]  # of each layer
        if KERNELS["norm_linear"].path(x, self.norm.weight) == "triton":
            branch, stream = x, None  # type: Tensor, Tensor | None
            for i, layer in enumerate(self.layers):
                branch, stream = layer.fused(branch, stream, rope, caches[i], batch, asked[i])
            return self.norm.add(branch, stream)[0]
        if KERNELS["rope"].path(x) == "torch":
            rope = rope_factors(*rope, x.dtype)  # once for all layers
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, caches[i], batch, asked[i])
        return self.norm(x)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Scores of the next token, in fp32.  [..., hidden] -> [..., vocab]"""
        return self.lm_head(hidden_states).float()

    # ---- what it is --------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in, and what keys and values have. (Weights may be stored otherwise.)"""
        return self.norm.weight.dtype

    def fingerprint(self) -> tuple[int, int]:
        """Differs after weights have changed: by `revision`, or in place (`model.norm.weight.mul_(2)`).

        torch counts the changes of each tensor; those made behind its back, through `.data`, it does not see: then add
        1 to `revision`.
        """
        if self._watched[0] != self.revision:
            tensors = [*self.parameters(), *self.buffers()]
            self._watched = self.revision, [t for t in tensors if not t.is_inference()]  # those have no counter
        return self.revision, sum([t._version for t in self._watched[1]])

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Transformer":
        """`to`, `cuda`, `half` and the like."""
        self.revision += 1
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's; counts as a change."""
        self.revision += 1
        return super().load_state_dict(*args, **kwargs)

    def _check(self, token_ids: Tensor, positions: Tensor) -> None:
        if token_ids.numel() == 0:
            return
        low, high = int(token_ids.min()), int(token_ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"token_ids: expected ids in 0..{self.config.vocab_size - 1}, got {low if low < 0 else high};"
                " is this another model's tokenizer?"
            )
        if int(positions.max()) >= self.config.max_position_embeddings:
            raise ValueError(
                f"token_ids: expected at most {self.config.max_position_embeddings} tokens (the model's context),"
                f" got position {int(positions.max())}; shorten the prompt"
            )
