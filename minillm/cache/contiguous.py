"""The cache in a row: one stretch of slots a sequence, as long as the longest needs.

Without a window, position p of a sequence lies in slot p. With a window of W tokens in all layers the stretch is a ring
of W slots, and position p lies in slot p mod W: what it overwrites, position p - W, is seen by no token any more.
(Where only some layers have a window, all keep everything, and a mask hides what a layer must not see.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ModelConfig
from ..model.layers import attention

__all__ = ["ContiguousBatch", "ContiguousCache", "ContiguousLayer"]


@dataclass(frozen=True)
class ContiguousBatch:
    """One step: B sequences in a rectangle of T tokens, padded on the right.

    positions [B, T] int64, each token's place in its sequence (padding repeats the last one); cached [B] and new [B]
    int64, tokens before this step and in it; last [B] int64, the column of each sequence's last new token. Token
    [rows[n], columns[n]] goes to slot slots[n] of its row, each [N] int64. masks: for each window that some layer has
    (0: none) [B, 1, T, S] bool, True where a token may attend, or None: causal, to this step's tokens alone.
    """

    positions: Tensor
    cached: Tensor
    new: Tensor
    last: Tensor
    rows: Tensor
    columns: Tensor
    slots: Tensor
    masks: dict[int, Tensor | None]


class ContiguousCache:
    """Keys and values of `batch_size` sequences, each [layers, B, capacity, H_kv, D].

        batch = cache.extend([len(ids) for ids in new])           # makes room, counts the tokens as cached
        hidden_states = model(rectangle_of(new), batch, cache)    # [B, T, hidden]

    `lengths` counts each sequence's tokens so far. A step that does not fit doubles `capacity`, once or more. A token
    of a layer with a window attends to the last `config.window(layer)` tokens, itself included; with `window=W` that is
    W in all layers. Where all have the same, capacity stops at it. Raises ValueError for sizes and counts that make no
    sense.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        capacity: int = 64,
        window: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("capacity", capacity, 1), ("window", window, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}: expected an integer, {least} or more, got {value!r}")
        windows = [window or config.window(layer) for layer in range(config.num_hidden_layers)]
        self.window = windows[0] if len(set(windows)) == 1 else 0  # of the ring; 0: all tokens are kept
        self.lengths = [0] * batch_size
        slots = min(capacity, self.window) if self.window else capacity
        shape = (config.num_hidden_layers, batch_size, slots, config.num_key_value_heads, config.head_dim)
        keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self._stored = _Stored(keys, values, self.window)
        self.layers = [ContiguousLayer(self._stored, layer, w) for layer, w in enumerate(windows)]

    @property
    def k(self) -> Tensor:
        """All keys."""
        return self._stored.k

    @property
    def v(self) -> Tensor:
        """All values."""
        return self._stored.v

    @property
    def capacity(self) -> int:
        """Slots of each sequence."""
        return self.k.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes held: 2 · layers · B · capacity · H_kv · D · bytes of a number, whether the slots are used or not."""
        return self.k.nbytes + self.v.nbytes

    # ---- between steps -----------------------------------------------------------------------------------------------

    def extend(self, new: Sequence[int]) -> ContiguousBatch:
        """Make room for `new` more tokens of each sequence, and the batch that puts them there.

        A sequence may have fewer new tokens than another, or none. Raises ValueError when there is nothing to do, for
        a wrong number of counts, a negative one, and a sequence whose first step brings nothing.
        """
        if len(new) != len(self.lengths) or min(new, default=0) < 0 or max(new, default=0) == 0:
            raise ValueError(
                f"new: expected {len(self.lengths)} counts, one a sequence, 0 or more and not all 0, got {list(new)}"
            )
        if any(length + count == 0 for length, count in zip(self.lengths, new, strict=True)):
            raise ValueError(f"new: expected 1 or more for a sequence that has nothing cached yet, got {list(new)}")
        before = self.lengths
        self.lengths = [length + count for length, count in zip(before, new, strict=True)]
        self._reserve(max(self.lengths))
        return self._batch(torch.tensor(before), torch.tensor(new))

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all sequences but `rows`, in this order: row i of the next step is the sequence that was rows[i].

        Raises ValueError for an unknown or repeated row, and when none is left.
        """
        if not rows or len(set(rows)) != len(rows) or not all(0 <= row < len(self.lengths) for row in rows):
            raise ValueError(f"rows: expected different rows in 0..{len(self.lengths) - 1}, got {list(rows)}")
        index = torch.tensor(rows, device=self.k.device)
        self._stored.k, self._stored.v = (x.index_select(1, index) for x in (self.k, self.v))
        self.lengths = [self.lengths[row] for row in rows]

    def _reserve(self, tokens: int) -> None:
        needed, capacity = min(tokens, self.window or tokens), self.capacity
        while capacity < needed:
            capacity *= 2
        capacity = min(capacity, self.window or capacity)
        if capacity == self.capacity:
            return
        for name in ("k", "v"):  # one after the other: only one of them is there twice
            old = getattr(self._stored, name)
            grown = old.new_zeros(*old.shape[:2], capacity, *old.shape[3:])
            grown[:, :, : old.shape[2]] = old
            setattr(self._stored, name, grown)

    def _batch(self, cached: Tensor, new: Tensor) -> ContiguousBatch:
        offsets = torch.arange(int(new.max()))  # [T]
        is_new = offsets < new[:, None]  # [B, T], False: padding
        last = (new - 1).clamp(min=0)
        positions = cached[:, None] + torch.minimum(offsets, new[:, None] - 1)  # [B, T]
        # Of a prompt that is longer than the ring only the end is kept.
        kept = is_new & (offsets >= new[:, None] - self.window) if self.window else is_new
        rows, columns = kept.nonzero(as_tuple=True)  # [N] each
        slots = positions[rows, columns]
        if self.window:
            slots = slots % self.window
        device = self.k.device
        found = {window: self._mask(positions, is_new, cached, new, window) for window in self._windows()}
        masks = {window: None if mask is None else mask.to(device) for window, mask in found.items()}
        return ContiguousBatch(
            positions.to(device), cached.to(device), new.to(device), last.to(device), rows.to(device),
            columns.to(device), slots.to(device), masks,
        )  # fmt: skip

    def _windows(self) -> set[int]:
        return {layer.window for layer in self.layers}

    def _mask(self, positions: Tensor, is_new: Tensor, cached: Tensor, new: Tensor, window: int) -> Tensor | None:
        """Which token may attend to which key, in the order of the keys in `attend`.  [B, 1, T, S]"""
        tokens = positions.shape[1]
        if not cached.any() and (not window or tokens <= window):
            return None
        if self.window and tokens > 1:  # the ring as it was before, then the new tokens
            keys = torch.cat((self._positions_in_ring(cached), positions.masked_fill(~is_new, -1)), dim=1)  # [B, S]
        elif self.window:
            keys = self._positions_in_ring(cached + new)
        else:
            keys = torch.arange(max(self.lengths)).expand(len(cached), -1)  # slot p holds position p
        query, key = positions[:, None, :, None], keys[:, None, None, :]
        seen = (key >= 0) & (key <= query)
        return seen & (key > query - window) if window else seen

    def _positions_in_ring(self, lengths: Tensor) -> Tensor:
        """The position that each slot holds after `lengths` tokens, negative where none.  [B] -> [B, capacity]"""
        newest = lengths[:, None] - 1
        return newest - (newest - torch.arange(self.capacity)) % self.window


@dataclass
class _Stored:
    """What a cache and its layers share: keys and values of all layers, and the window of the ring (0: none)."""

    k: Tensor
    v: Tensor
    window: int


class ContiguousLayer:
    """One layer of a `ContiguousCache`: keys are stored as they come, normed and turned; a ring stores a step of
    several tokens after it has attended, as a new token may overwrite a key that an earlier one of the step still sees.
    """

    def __init__(self, stored: _Stored, layer: int, window: int) -> None:
        self._stored, self._layer, self.window = stored, layer, window

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a token keeps here."""
        return 2 * self._stored.k[0, 0, 0].nbytes

    def slots(self, batch: ContiguousBatch) -> None:
        """No kernel writes here by itself."""

    def write(self, k: Tensor, v: Tensor, batch: ContiguousBatch) -> None:
        """Store the step's keys and values.  k and v [B, T, H_kv, D]

        Raises ValueError when they do not fit the cache or the batch.
        """
        cache = self._stored
        if k.shape[:2] != batch.positions.shape or k.shape[0] != cache.k.shape[1] or k.dtype != cache.k.dtype:
            raise ValueError(
                f"k: expected {cache.k.dtype} of shape {[cache.k.shape[1], *batch.positions.shape[1:]]} + [H_kv, D]"
                f" (this cache's sequences and this batch's tokens), got {k.dtype} of shape {list(k.shape)}"
            )
        if not self._attends_first(k):
            self._keep(k, v, batch)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: ContiguousBatch) -> Tensor:
        """Attention of the new tokens to all that they may see.  [B, T, H, D] -> [B, T, H, D]"""
        mask, cache, layer = batch.masks[self.window], self._stored, self._layer
        if not self._attends_first(k):
            if mask is not None:
                k, v = (x[layer, :, : mask.shape[-1]] for x in (cache.k, cache.v))  # [B, S, H_kv, D]
            return attention(q, k, v, mask)
        keys, values = k, v
        if mask is not None:
            keys, values = torch.cat((cache.k[layer], k), dim=1), torch.cat((cache.v[layer], v), dim=1)
        out = attention(q, keys, values, mask)
        self._keep(k, v, batch)
        return out

    def _attends_first(self, k: Tensor) -> bool:
        return self._stored.window > 0 and k.shape[1] > 1

    def _keep(self, k: Tensor, v: Tensor, batch: ContiguousBatch) -> None:
        self._stored.k[self._layer, batch.rows, batch.slots] = k[batch.rows, batch.columns]
        self._stored.v[self._layer, batch.rows, batch.slots] = v[batch.rows, batch.columns]
