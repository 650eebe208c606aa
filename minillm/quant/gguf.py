"""Reading GGUF files of Llama's architecture, with weights as they are stored.

A row is cut into blocks of 32 numbers; each block has its scale d and comes as bytes (little-endian):

| type | bytes of a block | w |
|---|---|---|
| Q8_0 | d fp16, 32 int8 | d · q |
| Q4_0 | d fp16, 16 bytes: q[j] low, q[j + 16] high | d · (q - 8) |
| Q4_1 | d fp16, m fp16, 16 bytes, the same | d · q + m |

A block is a group of `rtn.py`'s. Q4_1 has a minimum instead of a zero point: z = -m / d, of which only fp32 is exact
enough; it is no whole number, and a layer that keeps zero points as integers cannot take it. A block of which all
numbers are equal has d = 0; it becomes q = 0, s = 1, z = -m.

Numbers of 16 or 32 bits remain as they are. Of other types whatever the package `gguf` decodes becomes fp32, with a
warning.

`load` and `LLM` take such a file by its name: `opened` makes, once, a Hugging Face directory of it in the cache, whose
layers keep their blocks. Those of 4 bits are computed with as they are; of 8 bits there is no product in groups of 32,
so `load` decodes them.

Source: ggml's `ggml-quants.c` and the GGUF specification.
"""

import dataclasses
import hashlib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import ModelConfig
from ..fetch import MANIFEST, alone, gguf_config, hugging_face_names, write_tokenizer
from ..files import atomic_directory, cache_dir, write_json, write_model
from ..model.linear import Dense, Linear, LinearFactory, dense
from .formats import CompressedTensors
from .linear import QuantLinear
from .rtn import Grid, QuantizedTensor, Scheme

__all__ = ["Blocks", "blocks", "factory", "opened", "read_gguf"]

BLOCK = 32
BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}  # of a block
PLAIN = ("F32", "F16")


def blocks(name: str, kind: str, raw: Tensor) -> QuantizedTensor:
    """The weight in the bytes of its rows.  uint8 [N, K / 32 · bytes of a block] -> [N, K]

    kind: "Q8_0", "Q4_0" or "Q4_1". `name` is what errors call it. Raises ValueError for bytes that fill no blocks, and
    for a scale or minimum that is no finite number.
    """
    if kind not in BYTES:
        raise ValueError(f"{name}: expected one of {', '.join(BYTES)}, got {kind}")
    if raw.dtype != torch.uint8 or raw.ndim != 2 or raw.shape[1] % BYTES[kind] or not raw.numel():
        raise ValueError(
            f"{name}: expected rows of blocks of {BYTES[kind]} bytes for {kind},"
            f" got {str(raw.dtype).removeprefix('torch.')} {tuple(raw.shape)}"
        )
    block = raw.unflatten(1, (-1, BYTES[kind]))  # [N, G, bytes]
    head = 4 if kind == "Q4_1" else 2
    numbers = block[..., :head].contiguous().view(torch.float16).float()  # [N, G, 1 or 2]
    if not bool(numbers.isfinite().all()):
        raise ValueError(f"{name}: expected finite scales, got NaN or infinity; the file is damaged")
    scale, rest = numbers[..., 0].contiguous(), block[..., head:]
    if kind == "Q8_0":
        q = rest.contiguous().view(torch.int8)
        return QuantizedTensor(q.flatten(1), Grid(scale), Scheme(8, group_size=BLOCK))
    q = torch.cat((rest & 15, rest >> 4), -1).view(torch.int8) - 8  # [N, G, 32]
    if kind == "Q4_0":
        return QuantizedTensor(q.flatten(1), Grid(scale), Scheme(4, group_size=BLOCK))
    least, flat = numbers[..., 1], scale == 0
    scale = torch.where(flat, 1.0, scale)
    zero = -least / scale - torch.where(flat, 0.0, 8.0)
    if bool(flat.any()):
        q = q.masked_fill(flat[..., None], 0)
    return QuantizedTensor(q.flatten(1), Grid(scale, zero), Scheme(4, "int", False, group_size=BLOCK))


def read_gguf(path: str | os.PathLike) -> tuple[ModelConfig, dict[str, QuantizedTensor | Tensor]]:
    """A model's shape and its tensors, by the names that Hugging Face gives them; q and k in their order of rows.

    Raises ValueError for a file that is corrupt, cut off, or of another architecture, naming the tensor or field.
    """
    file = Path(path)
    config, tensors, kinds, _ = _contents(file)
    return config, {
        name: blocks(f"{file.name}: {called}", kind, tensors[name]) if kind in BYTES else tensors[name]
        for name, (called, kind) in kinds.items()
    }


def _contents(file: Path) -> tuple[ModelConfig, dict[str, Tensor], dict[str, tuple[str, str]], dict[str, Any]]:
    """Shape, tensors (blocks as bytes) under Hugging Face's names, (name in the file, type) of each, the metadata."""
    fields, kinds, raw = _read(file)
    if (found := fields.get("general.architecture")) != "llama":
        raise ValueError(f"{file.name}: general.architecture: expected llama, got {found!r}")
    scaling = [name for name in fields if name.startswith("llama.rope.scal") and fields[name] != "none"]
    if scaling:
        raise ValueError(f"{file.name}: {scaling[0]}: scaled rotary embeddings are not supported")
    try:
        config = gguf_config(file.name, fields, raw)
    except (ValueError, TypeError, ArithmeticError) as e:
        raise ValueError(f"{file.name}: {str(e).removeprefix(f'{file.name}: ')}") from e
    for field, value in (("rms_norm_eps", config.rms_norm_eps), ("rope_theta", config.rope_theta)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{file.name}: {field}: expected a positive number, got {value!r}")
    _check(file.name, config, {name: tuple(array.shape) for name, array in raw.items()}, kinds)
    # Rows are what is reordered; whether a row holds numbers or blocks does not matter.
    named = hugging_face_names(file.name, config, raw)
    return config, named, dict(zip(named, kinds.items(), strict=True)), fields


# ---- a file as a directory -------------------------------------------------------------------------------------------


def opened(path: str | os.PathLike) -> Path:
    """The Hugging Face directory of this file, in the cache: made when it is not there, or the file is another now.

    Raises as `read_gguf`, and for a tokenizer that is not supported.
    """
    file = Path(path).resolve()
    about = file.stat()
    state = hashlib.sha256(f"{file} {about.st_size} {about.st_mtime_ns}".encode()).hexdigest()[:12]
    target = cache_dir() / "gguf" / f"{file.stem}-{state}"
    if (target / MANIFEST).is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with alone(target.parent / f".{target.name}.lock", print):
        if not (target / MANIFEST).is_file():  # meanwhile, by another process
            _lay_out(file, target)
    return target


def _lay_out(file: Path, target: Path) -> None:
    with atomic_directory(target, keep=MANIFEST) as folder:
        config, tensors, kinds, fields = _contents(file)
        write_tokenizer(folder, file.name, fields, config)
        stored = {}
        for name, (called, kind) in kinds.items():
            if kind in BYTES:
                weight = blocks(f"{file.name}: {called}", kind, tensors[name])  # damage is found here, and named
                part = name.removesuffix(".weight")
                if ".layers." in name:
                    tensors[f"{part}.blocks"], stored[part] = tensors.pop(name), kind
                else:
                    tensors[name] = weight.dequantize(torch.float32)
        if stored:
            config = dataclasses.replace(config, quantization_config={"quant_method": "gguf", "kinds": stored})
        write_model(folder, config, tensors)
        write_json(folder / MANIFEST, {"source": str(file)})


@dataclass(frozen=True)
class Blocks:
    """A `Format` (see `formats.py`) that is read only: a part is `blocks`, uint8 [N, K / 32 · bytes of a block]."""

    kind: str
    activations: bool = False

    @property
    def scheme(self) -> Scheme:
        """Of the weight."""
        return Scheme(8 if self.kind == "Q8_0" else 4, "int", self.kind != "Q4_1", group_size=BLOCK)

    def wanted(self, rows: int, k: int) -> dict[str, torch.Size]:
        """The bytes alone."""
        return {"blocks": torch.Size((rows, k // BLOCK * BYTES[self.kind]))}

    def read(self, tensors: Mapping[str, Tensor], rows: int, k: int) -> tuple[QuantizedTensor, Tensor | None]:
        """As `blocks`."""
        return blocks("blocks", self.kind, tensors["blocks"]), None


class Decoded(Dense):
    """A dense layer that is stored in blocks, and decoded as it is loaded. `kinds`: of each part."""

    def __init__(self, in_features: int, parts: dict[str, int], kinds: dict[str, str]) -> None:
        super().__init__(in_features, parts, False)
        self.kinds = kinds

    def wanted(self) -> dict[str, torch.Size]:
        """Blocks, or the weight of a part that has none."""
        found = super().wanted()
        for part, kind in self.kinds.items():
            del found[f"{part}.weight"]
            found[f"{part}.blocks"] = Blocks(kind).wanted(self.parts[part], self.in_features)["blocks"]
        return found

    def load(self, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
        """As `Dense`."""
        plain = dict(tensors)
        for part, kind in self.kinds.items():
            plain[f"{part}.weight"] = blocks(f"{part}.blocks", kind, plain.pop(f"{part}.blocks")).dequantize(dtype)
        super().load(plain, device, dtype)


def factory(about: Mapping[str, Any]) -> LinearFactory:
    """Of a model whose config says, under "kinds", which parts lie in blocks of which type."""
    kinds = about.get("kinds")
    if not isinstance(kinds, dict) or not all(kind in BYTES for kind in kinds.values()):
        raise ValueError(f"kinds: expected {{part: {' or '.join(BYTES)}}}, got {kinds!r:.60}")

    def make(name: str, in_features: int, parts: dict[str, int], bias: bool) -> Linear:
        above = name.rpartition(".")[0]
        own = {part: kinds[f"model.{above}.{part}"] for part in parts if f"model.{above}.{part}" in kinds}
        if not own:
            return dense(name, in_features, parts, bias)
        alike = len(own) == len(parts) and len(set(own.values())) == 1
        if not alike or "Q8_0" in own.values():
            return Decoded(in_features, parts, own)
        stored = Blocks(next(iter(own.values())))
        return QuantLinear(in_features, parts, CompressedTensors(stored.scheme), bias, stored)

    return make


# ---- reading ---------------------------------------------------------------------------------------------------------


def _read(file: Path) -> tuple[dict[str, Any], dict[str, str], dict[str, np.ndarray]]:
    """Metadata, types and, as bytes [N, ...] or as numbers, tensors."""
    from gguf import GGUFReader, dequantize

    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found")
    try:
        reader = GGUFReader(file)
        fields = {name: entry.contents() for name, entry in reader.fields.items()}
        kinds = {t.name: t.tensor_type.name for t in reader.tensors}
        raw = {
            t.name: np.array(t.data if kinds[t.name] in (*BYTES, *PLAIN) else dequantize(t.data, t.tensor_type))
            for t in reader.tensors
        }
    except Exception as e:  # the reader raises whatever a wrong offset happens to lead to
        raise ValueError(f"{file.name}: not a GGUF file, corrupt or cut off ({type(e).__name__}: {e})") from e
    if decoded := sorted(name for name, kind in kinds.items() if kind not in (*BYTES, *PLAIN)):
        warnings.warn(
            f"{file.name}: {len(decoded)} tensors, such as {decoded[0]} ({kinds[decoded[0]]}), are decoded to fp32",
            stacklevel=3,
        )
    return fields, kinds, raw


def _check(file: str, config: ModelConfig, found: dict[str, tuple[int, ...]], kinds: dict[str, str]) -> None:
    """Hold names and shapes against the config, where a row of blocks is as long as its bytes."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    layer = {
        "attn_norm": (hidden,), "ffn_norm": (hidden,), "attn_q": (q, hidden), "attn_k": (kv, hidden),
        "attn_v": (kv, hidden), "attn_output": (hidden, q), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }  # fmt: skip
    expected = {"token_embd.weight": (config.vocab_size, hidden), "output_norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        expected["output.weight"] = (config.vocab_size, hidden)
    for i in range(min(config.num_hidden_layers, len(found))):  # a damaged number may be 4 billion
        expected |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    for what, names in (("lacks", expected.keys() - found.keys()), ("has the surplus", found.keys() - expected.keys())):
        if names:
            raise ValueError(f"{file}: {what} tensor {min(names)}; it is cut off or not a plain llama model")
    for name, shape in expected.items():
        kind = kinds[name]
        *rows, columns = shape
        if kind in BYTES:
            columns = columns * BYTES[kind] // BLOCK
        if found[name] != (*rows, columns) or (kind in BYTES and not rows):
            raise ValueError(f"{file}: {name}: expected shape {shape}, got {found[name]} ({kind})")
