"""A trained draft: one decoder layer on top of the model's own hidden states guesses the tokens to come.

Prompt lookup guesses well where a text repeats itself. Elsewhere somebody must know the language, and a second, smaller
model knows less of it than the first one's last hidden state does: that state has all that the model found out about
the text so far. So (EAGLE: Li et al., 2024, "EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty")

    x_i = W [norm(e(t_i)); h_(i-1)]          hidden state of the token before, and which token came: that was drawn, and
                                             the state alone does not say which one it became
    g_i = norm_model(layer(x_0 ... x_i))     what the model's own hidden state h_i will be, about
    guess = argmax of head_model(g_i)        what follows token i

with the model's embedding, last norm and head: only W, a norm and one layer are trained (`draft_training.py`). For the
guess behind it g_i stands in for h_i, and so on: so each is less sure than the one before. Of the head only the rows of
the `token_ids` that the model says most often are read (Zhao et al., 2025, "FR-Spec"): for SmolLM2 the head has a fifth
of all weights. Guesses are the likeliest tokens, never drawn, so they depend on the tokens before them alone, and the
rule of `speculative.py` keeps every token as it would be without guesses.

**What the layer remembers lies beside the model's keys and values**, in one more layer of the same cache (`HeadCache`),
and so do hidden states. Slot i belongs to token i: the layer's key and value of x_i, and h_i. All of that depends on
the tokens 0 ... i alone, as the model's own keys and values do, so a block's name says it as well. (With e(t_(i+1)) and
h_i in slot i, as published implementations have it, a block's last slot depends on a token of the next block; who
shares the block by its name finds another text's.) Whatever holds for the model's keys and values then holds for these:
chunks of prompts, preemption, prefixes out of the cache, copies on write, and guesses that were wrong, whose slots the
next step writes anew.

Every step writes the slots of the tokens that it computes, those of prompts too: W and the projection to keys and
values, no attention (`remember`). In front of a step with guesses the layer runs once for each of them (`_guesses`), a
token a sequence: first on the last token, whose h_(i-1) is in the cache, then on guess after guess.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..cache.paged import PagedCache
from ..config import EngineConfig, ModelConfig
from ..files import atomic_directory, write_json, write_tensors
from ..kernels import KERNELS, AttentionPlan, linear, rms_norm, rope_factors
from ..model import Transformer
from ..model.layers import Attention, LayerCache, RMSNorm, Rope
from ..model.linear import Dense
from ..model.transformer import Layer
from .batch import Batch, RowLayout
from .request import known
from .speculative import SpeculativeRunner

__all__ = ["DraftHead", "HeadCache", "HeadRunner", "fingerprint", "load_head", "save_head"]

FILES = ("draft_head.json", "draft_head.safetensors")
SHAPE = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")


# ---- the network -----------------------------------------------------------------------------------------------------


class DraftAttention(Attention):
    """Attention that can also remember tokens without asking for any."""

    def remember(self, qkv: Tensor, rope: Rope, cache: LayerCache, batch: Any) -> None:
        """Store keys and values.  qkv [N, (H + 2 H_kv) D]"""
        heads = qkv.view(*qkv.shape[:-1], -1, self.head_dim)
        q, k, v = heads.split_with_sizes(self.heads, -2)
        slots = cache.slots(batch)
        if slots is not None and KERNELS["rope_and_cache"].path(q, k, v) == "triton":
            self._turn_and_write(q, k, v, rope, slots)
        else:
            _, k = self._turn(heads, q, k, rope)
            cache.write(k, v, batch)


class DraftHead(nn.Module):
    """One layer that guesses, for one model.

    token_ids [V'] int64: the tokens that it can guess (None: all). rates: how often a guess was right where those
    before it were, by place, as far as that was measured; what they say of the last place holds for later ones.
    """

    token_ids: Tensor
    rows: Tensor

    def __init__(self, model: Transformer, token_ids: Tensor | None = None) -> None:
        super().__init__()
        c = model.config
        self._model = (model,)  # in a tuple: its weights are not the head's
        shape = replace(c, num_hidden_layers=1, sliding_window=None, layer_types=None, quantization_config=None)
        self.embedding_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.merge = Dense(2 * c.hidden_size, {"merge": c.hidden_size})
        self.layer = Layer(shape)
        self.layer.self_attn = DraftAttention(shape)
        self.rates: list[float] = []
        self.register_buffer("token_ids", torch.arange(c.vocab_size) if token_ids is None else token_ids)
        self.register_buffer("rows", _rows(model, self.token_ids), persistent=False)  # of the model's head [V', hidden]
        self.to(model.device, model.dtype).requires_grad_(False)

    @property
    def model(self) -> Transformer:
        """Whose tokens are guessed."""
        return self._model[0]

    def inputs(self, token_ids: Tensor, hidden: Tensor) -> Tensor:
        """x of tokens [...] int64, from the hidden states [..., hidden] of the tokens before them -> [..., hidden]"""
        e = self.model.embed_tokens(token_ids).to(hidden.dtype)
        return self.merge(torch.cat((self.embedding_norm(e), hidden), -1))

    def forward(
        self, token_ids: Tensor, hidden: Tensor, positions: Tensor, cache: LayerCache, batch: Any = None
    ) -> Tensor:  # fmt: skip
        """g of the tokens.  token_ids and positions [...] int64, hidden [..., hidden] -> [..., hidden]"""
        x, norm = self.inputs(token_ids, hidden), self.model.norm
        rope = self._rope(positions, x)
        if KERNELS["norm_linear"].path(x, self.merge.weight) == "triton":
            branch, stream = self.layer.fused(x, None, rope, cache, batch)
            return norm.add(branch, stream)[0]
        return rms_norm(self.layer(x, rope, cache, batch), norm.weight.to(x.dtype), norm.eps)

    def remember(self, token_ids: Tensor, hidden: Tensor, positions: Tensor, cache: LayerCache, batch: Any) -> None:
        """Store the tokens' keys and values; the arguments are those of `forward`."""
        x = self.inputs(token_ids, hidden)
        attention = cast(DraftAttention, self.layer.self_attn)
        qkv, _ = attention.qkv_proj.add_norm(self.layer.input_layernorm, x, None, batch)
        attention.remember(qkv, self._rope(positions, x), cache, batch)

    def best(self, hidden: Tensor) -> Tensor:
        """The likeliest token behind each state.  [..., hidden] -> [...] int64"""
        return self.token_ids[linear(hidden, self.rows).argmax(-1)]

    def _rope(self, positions: Tensor, x: Tensor) -> Rope:
        rope = self.model.rope_cos[positions], self.model.rope_sin[positions]
        return rope_factors(*rope, x.dtype) if KERNELS["rope"].path(x) == "torch" else rope


def _rows(model: Transformer, token_ids: Tensor) -> Tensor:
    """The rows of the model's head, in whatever form it stores them.  token_ids [V'] -> [V', hidden]"""
    unit = torch.eye(model.config.hidden_size, dtype=model.dtype, device=model.device)
    with torch.inference_mode(False), torch.no_grad():
        return model.lm_head(unit)[:, token_ids.to(model.device)].T.contiguous()


# ---- on disk ---------------------------------------------------------------------------------------------------------


def fingerprint(model: Transformer) -> str:
    """Tells models apart, by the parts that a head shares with them: last norm and embedding (some of its rows). Those
    are the same in each dtype, and with quantized layers.
    """
    embedding = model.embed_tokens.weight
    parts = (model.norm.weight, embedding[:: max(1, len(embedding) // 256)])
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_head(head: DraftHead, directory: str | Path) -> Path:
    """Write a head as draft_head.json and draft_head.safetensors, atomically."""
    about = {"model": {name: getattr(head.model.config, name) for name in SHAPE}, "rates": head.rates,
             "num_token_ids": len(head.token_ids), "fingerprint": fingerprint(head.model)}  # fmt: skip
    with atomic_directory(Path(directory)) as folder:
        write_json(folder / FILES[0], about)
        write_tensors(folder / FILES[1], {name: x.detach().contiguous() for name, x in head.state_dict().items()})
    return Path(directory)


def load_head(model: Transformer, directory: str | Path) -> DraftHead:
    """Read what `save_head` wrote, for this model, to its device and dtype.

    Raises FileNotFoundError for a folder without a head, and ValueError for files that are broken, or a head that was
    trained on another model.
    """
    folder = Path(directory)
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise FileNotFoundError(f"path: {folder} has no {missing[0]}; expected the folder of a trained draft head")
    try:
        about = json.loads((folder / FILES[0]).read_text(encoding="utf-8"))
        shape, rates = {name: about["model"][name] for name in SHAPE}, [float(rate) for rate in about["rates"]]
        tensors = load_file(folder / FILES[1])
    except Exception as error:
        raise ValueError(f"path: {folder} holds no draft head that can be read ({error}); train it anew") from error
    own = {name: getattr(model.config, name) for name in SHAPE}
    if wrong := [name for name in SHAPE if shape[name] != own[name]]:
        raise ValueError(
            f"path: the head in {folder} was trained on a model with {wrong[0]} {shape[wrong[0]]}, and this one's is"
            f" {own[wrong[0]]}; train one for this model"
        )
    if about.get("fingerprint") != fingerprint(model):
        raise ValueError(
            f"path: the head in {folder} was trained on another model of this shape (its embedding or last norm"
            " differ); train one for this model"
        )
    head = DraftHead(model, tensors.get("token_ids"))
    try:
        head.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"path: {folder / FILES[1]}: {error}; train it anew") from error
    head.rates = rates
    return head


# ---- in the engine ---------------------------------------------------------------------------------------------------


class HeadCache(PagedCache):
    """The model's cache, with one layer more, the head's, and the model's `hidden` [1, slots, hidden] of each token.

    Behind the slots of blocks are some of nobody's: the first holds zeros, which stand in front of a text, and into the
    last, number -1, goes what padding brings.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype,
        hidden_dtype: torch.dtype,
    ) -> None:  # fmt: skip
        layers, types = config.num_hidden_layers, None
        if config.sliding_window is not None:  # the head sees all
            types = tuple("sliding_attention" if config.window(i) else "full_attention" for i in range(layers))
            types = (*types, "full_attention")
        more = replace(config, num_hidden_layers=layers + 1, layer_types=types)
        super().__init__(more, num_blocks, block_size, device, dtype)
        self.nothing = num_blocks * block_size
        slots = self.nothing + 2 * block_size
        self.hidden = torch.empty(1, slots, config.hidden_size, device=device, dtype=hidden_dtype)
        self.hidden[:, self.nothing :] = 0

    @property
    def _tensors(self) -> list[Tensor]:
        return [*super()._tensors, self.hidden]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a token keeps, in all layers, and its hidden state."""
        return super().bytes_per_token + self.hidden[0, 0].nbytes


class HeadRunner(SpeculativeRunner):
    """A runner that guesses by a trained head."""

    def __init__(self, model: Transformer, config: EngineConfig, layout: RowLayout) -> None:
        super().__init__(model, config, layout)
        self.head = load_head(model, self.speculative.path or "")
        rates = self.head.rates or [0.5]
        self.rates = [rates[min(place, len(rates) - 1)] for place in range(self.num_guesses)]
        self.last_position = known(config.max_model_len) - 1

    def allocate(self, num_blocks: int) -> None:
        """Make the cache."""
        self.cache = self.states = HeadCache(
            self.model.config, num_blocks, self.config.block_size, self.device, self.cache_dtype, self.dtype
        )

    def _layers(self, batch: Batch, rows: Tensor | None = None) -> Tensor:
        """The model's layers; then the tokens' hidden states into their slots, and what the head remembers of them."""
        hidden_states = super()._layers(batch)
        self.states.hidden[0].index_put_((batch.slots,), hidden_states)
        token = torch.arange(len(batch.token_ids), dtype=torch.int32, device=self.device)
        sequence = token  # of each token
        if batch.max_seqlen_q > 1:
            ends = batch.cu_seqlens_q[1:]
            sequence = torch.searchsorted(ends, token, right=True).clamp_(max=len(ends) - 1)
        before = self._hidden(batch.block_tables, sequence, batch.positions - 1)
        self.head.remember(batch.token_ids, before, batch.positions, self.cache.layers[-1], batch)
        return hidden_states if rows is None else hidden_states[rows]

    def _hidden(self, block_tables: Tensor, sequence: Tensor, positions: Tensor) -> Tensor:
        """The hidden states of some tokens out of the cache, 0 in front of the first.

        block_tables [S, W] int32; sequence and positions [N], which of them and where in it -> [N, hidden]
        """
        size = self.config.block_size
        slots = block_tables[sequence, positions // size].long() * size + positions % size
        return self.states.hidden[0].index_select(0, torch.where(positions < 0, self.states.nothing, slots))

    def _guesses(self, rows: Tensor, lengths: Tensor, count: int) -> Tensor:
        """By one pass of the head after another, a token a sequence. Of a sequence that may have fewer guesses nothing
        is stored or read beyond these.
        """
        table, layout, size, sequences = self.table, self.table.layout, self.config.block_size, len(rows)
        sequence, last = torch.arange(sequences, device=self.device), lengths.long() - 1
        tables = table.matrix[:, layout.first_block :].index_select(0, rows)
        ahead = torch.arange(count, device=self.device)[:, None]
        # What all passes need, at once, [count, S] each: a graph of many small kernels takes longer than their work.
        positions = (last + ahead).clamp(0, self.last_position)
        used = table.steps[2, :sequences] - 1 > ahead
        slots = torch.where(used, tables[sequence, positions // size].long() * size + positions % size, -1)
        lens = torch.where(used, positions + 1, 0).int()
        bounds = torch.arange(sequences + 1, dtype=torch.int32, device=self.device)
        on_torch = KERNELS["paged_attention"].path(tables) == "torch"
        token = table.matrix[rows, layout.first_token + last.clamp(min=0)].long()
        hidden = self._hidden(tables, sequence, last - 1)
        guesses = []
        for place, slot, length in zip(positions, slots, lens, strict=True):
            plan = AttentionPlan(tables, length, bounds, size) if on_torch else None
            batch = Batch(token, place, slot, bounds, length, tables, 1, sequence, length, {}, plan)
            hidden = self.head(token, hidden, place, self.cache.layers[-1], batch)
            token = self.head.best(hidden)
            guesses.append(token)
        return torch.stack(guesses, 1).int()
