"""Which program of a Triton kernel touches which bytes, seen in Triton's interpreter.

    with footprint(x=x, y=y) as seen:
        kernel[grid](x, y, ...)
    seen.loads["x"]            # [(program, offsets), ...]: one entry a load, in the order of the run
    seen.picture("x")          # an array like x: the program that touched each element last, NaN where none did
    seen.bytes_moved()         # what the kernel asked memory for; reading a tensor twice counts twice
    seen.bytes_touched()       # the same without repeats: the least that any kernel would have to move

What it counts are requests, as the caches get them. Device memory sees as much only where nothing is reused.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor

__all__ = ["Footprint", "footprint"]


class Footprint:
    """The loads and stores of the launches in one `with footprint(...)` block, by the tensors' names.

    `loads[name]` and `stores[name]` are lists of (program, offsets): the program's number (its first axis counts
    fastest, as on the chip) and the elements' distances from the tensor's first one in memory, int64, in the order of
    the block, masked ones left out. `strays` counts accesses to addresses that none of the tensors holds.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.loads: dict[str, list[tuple[int, np.ndarray]]] = {name: [] for name in tensors}
        self.stores: dict[str, list[tuple[int, np.ndarray]]] = {name: [] for name in tensors}
        self.strays = 0

    def note(self, into: dict, program: int, addresses: np.ndarray) -> None:
        """Enter one load's or store's byte addresses under the tensors that hold them."""
        found = np.zeros(addresses.shape, bool)
        for name, t in self.tensors.items():
            offsets = addresses.astype(np.int64) - t.data_ptr()
            held = (offsets >= 0) & (offsets < _span(t) * t.element_size())
            if held.any():
                into[name].append((program, offsets[held] // t.element_size()))
            found |= held
        self.strays += int((~found).sum())

    def picture(self, name: str, shape: tuple[int, ...] | None = None, of: str = "both") -> np.ndarray:
        """For `plt.imshow`: the program that touched each element last, NaN where none did, in the tensor's shape or
        another one of as many elements. `of`: "loads", "stores" or "both".
        """
        t = self.tensors[name]
        memory = np.full(_span(t), np.nan)
        for program, offsets in self._events(name, of):
            memory[offsets] = program
        strides = [stride * memory.itemsize for stride in t.stride()]
        return np.lib.stride_tricks.as_strided(memory, tuple(t.shape), strides).reshape(shape or tuple(t.shape)).copy()

    def bytes_moved(self, *names: str, of: str = "both") -> int:
        """Bytes loaded and stored, every access counted, of the tensors named or of all. Lanes of one load or store
        that name the same element share it.
        """
        return sum(
            self.tensors[name].element_size() * len(np.unique(offsets))
            for name in names or self.tensors
            for _, offsets in self._events(name, of)
        )

    def bytes_touched(self, *names: str) -> int:
        """Bytes that were loaded at least once plus bytes that were stored at least once."""
        total = 0
        for name in names or self.tensors:
            for events in (self.loads[name], self.stores[name]):
                offsets = [offsets for _, offsets in events] or [np.empty(0, np.int64)]
                total += self.tensors[name].element_size() * len(np.unique(np.concatenate(offsets)))
        return total

    def _events(self, name: str, of: str) -> list[tuple[int, np.ndarray]]:
        if of not in ("loads", "stores", "both"):
            raise ValueError(f'of: expected "loads", "stores" or "both", got {of!r}')
        loads, stores = self.loads[name], self.stores[name]
        return {"loads": loads, "stores": stores, "both": loads + stores}[of]


def _span(t: Tensor) -> int:
    """Elements of memory from a tensor's first to its last one."""
    return 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0


@contextmanager
def footprint(**tensors: Tensor) -> Iterator[Footprint]:
    """Record which program loads and stores which elements of these CPU tensors while kernels run in the block.

    Plain, masked and tensor-descriptor loads and stores; no atomics. Raises RuntimeError where kernels are compiled:
    the environment variable TRITON_INTERPRET=1 must be set before Triton is imported.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("footprint: set TRITON_INTERPRET=1 before triton is imported; compiled kernels tell nothing")
    from triton.runtime.interpreter import InterpreterBuilder

    seen = Footprint(tensors)
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def noted(builder: InterpreterBuilder, into: dict, ptrs: Any, mask: Any) -> None:
        (x, y, z), (nx, ny, _) = builder.grid_idx, builder.grid_dim
        seen.note(into, x + nx * (y + ny * z), ptrs.data[np.broadcast_to(_data(mask), ptrs.data.shape)])

    def noted_load(builder: InterpreterBuilder, ptrs: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        noted(builder, seen.loads, ptrs, mask)
        return load(builder, ptrs, mask, *rest, **options)

    def noted_store(builder: InterpreterBuilder, ptrs: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        noted(builder, seen.stores, ptrs, mask)
        return store(builder, ptrs, value, mask, *rest, **options)

    # All other ways to read and write (unmasked, descriptors) end in these two.
    with (
        patch.object(InterpreterBuilder, "create_masked_load", noted_load),
        patch.object(InterpreterBuilder, "create_masked_store", noted_store),
    ):
        yield seen


def _data(mask: Any) -> np.ndarray:
    return np.asarray(mask.data, bool)
