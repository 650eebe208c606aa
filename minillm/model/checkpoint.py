"""The tensors of a Hugging Face directory, mapped into memory from their files.

A safetensors file is a JSON header, {name: {dtype, shape, data_offsets}}, and then the numbers. A tensor is a stretch
of that file, mapped: nothing is read before it is looked at, processes that load the same model share the pages, and
what a tensor took is free again as soon as the tensor is. Writing to one changes a copy, never the file.
"""

import json
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Checkpoint", "read_file", "weight_files"]

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: bytes `start` to `end` of `file`."""

    file: Path
    dtype: str
    shape: torch.Size
    start: int
    end: int


class Checkpoint:
    """The tensors of `directory` by the names that a whole model's checkpoint gives them: "model.norm.weight", ...

    A base model's, which begin without "model.", get that in front; `rotary_emb.inv_freq` of old checkpoints is left
    out, since it follows from the config. Raises FileNotFoundError and ValueError that name the file for one that is
    not there, cut off, corrupt or pickled, and the tensor for one that stands in two files with different content.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        found: dict[str, Entry] = {}
        for file in weight_files(directory):
            for name, entry in _header(file).items():
                if name in found and not torch.equal(_mapped(found[name]), _mapped(entry)):
                    raise ValueError(
                        f"{directory}: {name} stands in {found[name].file.name} and, with other values, in {file.name};"
                        " delete the file that does not belong to this model"
                    )
                found[name] = entry
        whole = any(name.startswith("model.") for name in found)
        self.entries = {
            (name if whole or name.startswith("lm_head.") else f"model.{name}"): entry
            for name, entry in found.items()
            if not name.endswith("rotary_emb.inv_freq")
        }

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors. Neighbors in the file lie side by side in one storage, too.

        Raises ValueError for a dtype that is not known.
        """
        return _tensors(self.directory, {name: self.entries[name] for name in names})

    def shape(self, name: str) -> torch.Size:
        """A tensor's shape, without a look at its numbers."""
        return self.entries[name].shape

    def is_floating(self, name: str) -> bool:
        """Whether a tensor holds numbers of 16 bits or more, which need no scale."""
        return self.entries[name].dtype in ("F64", "F32", "F16", "BF16")


def read_file(file: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, mapped, by the names that they have there. Raises as `Checkpoint`."""
    return _tensors(file, _header(file))


def _tensors(where: Path, entries: dict[str, Entry]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for run in _runs(entries):
        stretches = _mapped(*run.values()).split([entry.end - entry.start for entry in run.values()])
        for (name, entry), stretch in zip(run.items(), stretches, strict=True):
            if entry.dtype not in DTYPES:
                raise ValueError(f"{where}: {name} holds {entry.dtype}, which is not supported")
            dtype = DTYPES[entry.dtype]
            aligned = stretch.data_ptr() % dtype.itemsize == stretch.storage_offset() % dtype.itemsize == 0
            tensors[name] = (stretch if aligned else stretch.clone()).view(dtype).view(entry.shape)
    return tensors


def _runs(entries: dict[str, Entry]) -> list[dict[str, Entry]]:
    """Groups of tensors that follow one another in a file without a gap."""
    runs: list[dict[str, Entry]] = []
    last: Entry | None = None
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].file, item[1].start)):
        if last is not None and (last.file, last.end) == (entry.file, entry.start):
            runs[-1][name] = entry
        else:
            runs.append({name: entry})
        last = entry
    return runs


def _mapped(*run: Entry) -> Tensor:
    """The bytes of tensors that follow one another.  -> uint8 [bytes]"""
    start, end = run[0].start, run[-1].end
    if end == start:
        return torch.empty(0, dtype=torch.uint8)
    offset = start % mmap.ALLOCATIONGRANULARITY
    with run[0].file.open("rb") as file:
        pages = mmap.mmap(file.fileno(), end - start + offset, access=mmap.ACCESS_COPY, offset=start - offset)
    return torch.frombuffer(pages, dtype=torch.uint8, offset=offset)


def _header(file: Path) -> dict[str, Entry]:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        pickled = sorted(p.name for p in file.parent.glob("*") if p.suffix in PICKLED)
        if pickled and not any(file.parent.glob("*.safetensors")):
            raise ValueError(
                f"{file.parent}: holds only the pickled checkpoint {pickled[0]}; reading it would run code stored in"
                " it. Convert it to safetensors first"
            )
        raise FileNotFoundError(f"{file}: not found; fetch the model again")
    try:
        with safe_open(file, framework="pt"):  # checks all of the header
            pass
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header: dict[str, Any] = json.loads(opened.read(size))
    except (SafetensorError, OSError, RuntimeError, ValueError) as e:
        raise ValueError(f"{file}: corrupt or cut off ({e}); delete it and fetch the model again") from e
    header.pop("__metadata__", None)
    return {
        name: Entry(file, about["dtype"], torch.Size(about["shape"]), *(8 + size + i for i in about["data_offsets"]))
        for name, about in header.items()
    }


def weight_files(directory: Path) -> list[Path]:
    """model.safetensors, or the files that an index names; whether they are there is not looked at.

    As in transformers, the one file goes first: an index beside it may be stale. Raises ValueError for a broken index.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if not index.is_file():
        return [single]
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{index}: not a safetensors index ({e}); fetch the model again") from e
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index}: weight_map: expected an object, tensor name -> file name; fetch the model again")
    if single.is_file():
        return [single]
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index}: weight_map: expected names of files beside it, got {outside[0]!r}")
    return [directory / name for name in names]
