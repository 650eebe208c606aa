"""The model: embedding, a stack of layers that each add to the residual stream, a norm, a head over the vocabulary."""

from typing import Any

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from .layers import MLP, Attention, AttentionCache, NoCache, RMSNorm, rope_tables

__all__ = ["Layer", "Transformer"]


class Layer(nn.Module):
    """Attention, then MLP, each behind a norm and added to the residual stream.

    In short: stream += attention(norm(stream)), stream += mlp(norm(stream)). The stream and the branch that is still to
    be added to it travel apart, so that adding and norming are one step: (branch, stream or None) -> (branch, stream),
    each [..., hidden].
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, branch: Tensor, stream: Tensor | None, rope: tuple[Tensor, Tensor], cache: AttentionCache, batch: Any
    ) -> tuple[Tensor, Tensor]:
        branch, stream = self.self_attn(self.input_layernorm, branch, stream, rope, cache, batch)
        return self.mlp(self.post_attention_layernorm, branch, stream)


class Transformer(nn.Module):
    """A decoder-only language model of the Llama family or Qwen3.

        model = Transformer(config)                     # random weights, ready to train
        hidden_states = model(token_ids)                # [B, T] -> [B, T, hidden]
        logits = model.logits(hidden_states[:, -1])     # [B, vocab]: take only the rows that are needed

    `batch` says what belongs together (a `PaddedBatch`, or an engine's batch) and has `positions` of token_ids'
    shape; without it every row of `token_ids` is one sequence from position 0. `cache` answers for attention; without
    it nothing is remembered. Raises ValueError for token ids outside the vocabulary and positions beyond
    `max_position_embeddings` (checked on the CPU only: on a GPU the check would make the host wait).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        cos, sin = rope_tables(config)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
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

    def forward(self, token_ids: Tensor, batch: Any = None, cache: AttentionCache | None = None) -> Tensor:
        """Hidden states of every token, after the last norm.  token_ids [...] int64 -> [..., hidden]"""
        positions = torch.arange(token_ids.shape[-1], device=token_ids.device) if batch is None else batch.positions
        if token_ids.device.type == "cpu":
            self._check(token_ids, positions)
        rope = self.rope_cos[positions], self.rope_sin[positions]  # [..., D/2] each
        branch, stream = self.embed_tokens(token_ids), None  # [..., hidden]
        for layer in self.layers:
            branch, stream = layer(branch, stream, rope, cache or NO_CACHE, batch)
        return self.norm.add(branch, stream)[0]

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Scores of the next token, in fp32.  [..., hidden] -> [..., vocab]"""
        return self.lm_head(hidden_states).float()

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


NO_CACHE = NoCache()
