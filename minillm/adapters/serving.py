"""Adapters of many requests at once: slots on the device, who is in them, and the layer that reads them.

A slot has room for an adapter of up to `max_rank` on every layer but the head, in one stretch of memory, so that an
adapter comes in one copy. Requests that run hold theirs; of those that nobody holds, the one not used for longest makes
room for the next (LRU). What a step computes with which adapter stands in the requests' rows, as their option
"adapter": 0 for none, else the slot's number plus 1. So a CUDA graph replays whatever is in the slots by then.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels import multi_lora
from ..model import Transformer
from ..model.linear import Linear
from . import peft_format
from .lora import Adapter, Around, check, linears, prefix_of, replace

if TYPE_CHECKING:
    from ..model.layers import Batch, RMSNorm

__all__ = ["AdapterSlots", "LoRARequest", "ManyLora", "Registry"]


@dataclass(frozen=True)
class LoRARequest:
    """Which adapter a request wants, as vLLM says it: a name, a number (1 or more), and where it lies: a folder in
    PEFT's format, or an `Adapter`. What is computed with is decided by the content alone, not by name or number.
    """

    lora_name: str
    lora_int_id: int
    lora_path: "str | os.PathLike | Adapter"

    def __post_init__(self) -> None:
        if not isinstance(self.lora_name, str) or not self.lora_name:
            raise ValueError(f"lora_name: expected text, got {self.lora_name!r}")
        number = self.lora_int_id
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"lora_int_id: expected an integer, 1 or more, got {number!r}")
        if not isinstance(self.lora_path, str | os.PathLike | Adapter):
            raise TypeError(f"lora_path: expected a folder or an Adapter, got {self.lora_path!r}")


class ManyLora(Around):
    """A layer whose rows have adapters of their own: `base`, and what `batch.lora` says of each token on top.

    a [slots, P, r, in] and b [slots, out, r] are views of the slots' memory.
    """

    def __init__(self, base: Linear, a: Tensor, b: Tensor, parts: Tensor) -> None:
        super().__init__(base)
        self.a, self.b, self.present = a, b, parts
        self.rows = tuple(base.parts.values())

    def forward(self, x: Tensor, batch: "Batch | None" = None) -> Tensor:
        y = self.base(x, batch)
        plan = getattr(batch, "lora", None)
        if plan is not None:
            multi_lora(y, x, self.a, self.b, self.present, self.rows, plan.adapters, plan.order, plan.starts)
        return y

    def add_norm(
        self, norm: "RMSNorm", branch: Tensor, stream: Tensor | None, batch: "Batch | None" = None,
        use_swiglu: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As the base's, in a step without adapters."""
        if getattr(batch, "lora", None) is None:
            return self.base.add_norm(norm, branch, stream, batch, use_swiglu)
        return super().add_norm(norm, branch, stream, batch, use_swiglu)


class AdapterSlots:
    """Room for `count` adapters of a rank up to `max_rank` on the model's device. The model's layers become `ManyLora`.

    Raises ValueError for a model that has an adapter of its own.
    """

    def __init__(self, model: Transformer, count: int, max_rank: int) -> None:
        for name, value in (("max_loras", count), ("max_lora_rank", max_rank)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected an integer, 1 or more, got {value!r}")
        check(model, Adapter(peft_format.LoraConfig(), {}))
        self.model, self.count, self.max_rank = model, count, max_rank
        self.rank = max(16, 1 << (max_rank - 1).bit_length())
        self.held = [0] * count  # by how many running requests
        self.inside: OrderedDict[int, bytes | None] = OrderedDict((slot, None) for slot in range(count))  # oldest first
        self.layers: dict[str, ManyLora] = {}
        self._install()

    def _install(self) -> None:
        layers = {name: layer for name, layer in linears(self.model) if layer is not self.model.lm_head}
        sizes = [self.rank * (len(layer.parts) * layer.in_features + layer.out_features) for layer in layers.values()]
        device, dtype = self.model.device, self.model.dtype
        self.memory = torch.zeros(self.count, sum(sizes), dtype=dtype, device=device)
        columns = sum(len(layer.parts) for layer in layers.values())
        self.present = torch.zeros(self.count, columns, dtype=torch.int32, device=device)  # which parts are changed
        first, column = 0, 0
        for (name, layer), size in zip(layers.items(), sizes, strict=True):
            parts, of_a = len(layer.parts), len(layer.parts) * self.rank * layer.in_features
            whole = self.memory[:, first : first + size]
            a = whole[:, :of_a].unflatten(1, (parts, self.rank, layer.in_features))
            b = whole[:, of_a:].unflatten(1, (layer.out_features, self.rank))

            self.layers[name] = ManyLora(layer, a, b, self.present[:, column : column + parts])
            replace(self.model, name, self.layers[name])
            first, column = first + size, column + parts

    def packed(self, adapter: Adapter) -> "Loaded":
        """An adapter as it lies in a slot, on the host.

        b is multiplied by the scale in fp32, before it is rounded to the model's dtype. Raises ValueError for one that
        does not fit.
        """
        if adapter.rank > self.max_rank:
            raise ValueError(
                f"lora_request: expected a rank of at most {self.max_rank} (max_lora_rank), got {adapter.rank}"
            )
        if "lm_head" in adapter.pairs:
            raise ValueError("lora_request: lm_head: an adapted head is not served; merge it")
        pinned = self.memory.is_cuda
        flat = torch.zeros(self.memory.shape[1], dtype=self.memory.dtype, pin_memory=pinned)
        present, first = torch.zeros(self.present.shape[1], dtype=torch.int32, pin_memory=pinned), 0
        column = 0
        for name, layer in self.layers.items():
            of_a, of_b, row = layer.a[0].numel(), layer.b[0].numel(), 0
            a = flat[first : first + of_a].view(layer.a.shape[1:])
            b = flat[first + of_a : first + of_a + of_b].view(layer.b.shape[1:])
            for i, (part, rows) in enumerate(layer.parts.items()):
                pair = adapter.pairs.get(prefix_of(name) + part)
                if pair is not None:
                    rank = pair.a.shape[0]
                    a[i, :rank] = pair.a.to(flat.dtype)
                    b[row : row + rows, :rank] = (pair.scale * pair.b.float()).to(flat.dtype)
                    present[column] = 1
                row, column = row + rows, column + 1
            first += of_a + of_b
        return Loaded(adapter.digest, flat, present)

    def take(self, loaded: "Loaded") -> int | None:
        """Hold a slot with this adapter, copied there if it is in none -> its number; None: others hold all."""
        slot = next((slot for slot, digest in self.inside.items() if digest == loaded.digest), None)
        if slot is None:
            slot = next((slot for slot in self.inside if not self.held[slot]), None)
            if slot is None:
                return None
            self.inside[slot] = None  # until it is there
            with torch.inference_mode():  # steps that were launched before read what was there before
                self.memory[slot].copy_(loaded.flat, non_blocking=True)
                self.present[slot].copy_(loaded.present, non_blocking=True)
            self.inside[slot] = loaded.digest
        self.held[slot] += 1
        self.inside.move_to_end(slot)
        return slot

    def give_back(self, slot: int) -> None:
        """One request less holds it."""
        self.held[slot] -= 1


@dataclass(frozen=True)
class Loaded:
    """An adapter on the host, ready to be copied into a slot."""

    digest: bytes
    flat: Tensor  # a slot's memory
    present: Tensor  # which parts it changes, layer after layer


class Registry:
    """Adapters that have been read, by what they were read from; the `most` used last are kept.

    A folder is read anew when one of its two files has changed, in time of writing, size or place.
    """

    def __init__(self, pack: Callable[[Adapter], Loaded], model: Transformer, most: int) -> None:
        self.pack, self.model, self.most, self._lock = pack, model, most, threading.RLock()
        self.found: OrderedDict[Any, Loaded] = OrderedDict()

    def get(self, request: LoRARequest) -> Loaded:
        """Raises as `peft_format.load`, and ValueError for one that the slots have no room for."""
        with self._lock:
            return self._get(request)

    def _get(self, request: LoRARequest) -> Loaded:
        key = self._key(request.lora_path)
        loaded = self.found.get(key)
        if loaded is None:
            adapter = request.lora_path
            if not isinstance(adapter, Adapter):
                adapter = peft_format.load(adapter, self.model)
                if self._key(request.lora_path) != key:  # it was written meanwhile
                    return self._get(request)
            else:
                check(self.model, adapter)
            loaded = self.found[key] = self.pack(adapter)
            while len(self.found) > self.most:
                self.found.popitem(last=False)
        else:
            self.found.move_to_end(key)
        return loaded

    @staticmethod
    def _key(source: "str | os.PathLike | Adapter") -> Any:
        if isinstance(source, Adapter):
            return source.digest
        folder = Path(os.path.realpath(Path(source).expanduser()))
        facts: list[tuple[int, int, int] | None] = []
        for name in (peft_format.CONFIG, peft_format.TENSORS):
            try:
                stat = (folder / name).stat()
            except OSError:
                facts.append(None)  # whoever reads it says what is missing
            else:
                facts.append((stat.st_mtime_ns, stat.st_size, stat.st_ino))
        return folder, *facts
