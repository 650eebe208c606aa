"""How quantized weights lie in a checkpoint: packed into words, named and described as compressed-tensors does.

One format is written, that of the compressed-tensors library, which transformers and vLLM read. For a part of N rows of
K weights in groups of g:

    pack-quantized    weight_packed int32 [N, K · bits / 32], each q + 2^(bits-1), the first in a word's lowest bits;
                      weight_scale [N, K / g]; weight_shape int64 [2], N and K;
                      where there are zero points weight_zero_point int32 [N · bits / 32, K / g], packed down the rows
    int-quantized     weight int8 [N, K]; weight_scale [N, 1]; activations in 8 bits, each row by a scale of its own
    float-quantized   the same in float8_e4m3fn

Others' formats are converted on reading: see `importers.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .rtn import FP8, Grid, QuantizedTensor, Scheme

__all__ = ["CompressedTensors", "Format", "pack", "unpack"]

FORMATS = ("pack-quantized", "int-quantized", "float-quantized")


def pack(q: Tensor, bits: int) -> Tensor:
    """Signed integers of `bits` bits, one behind another, the first in a word's lowest bits; the end is padded with 0.

    A number may lie across two words, if bits do not divide 32.  int8 [N, K] -> int32 [N, ceil(K · bits / 32)]
    """
    digits, width = (q.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8) & (2**bits - 1), bits  # [N, K]
    if 8 % bits:  # bit by bit
        bit = torch.arange(bits, dtype=torch.uint8, device=q.device)
        digits, width = ((digits[..., None] >> bit) & 1).flatten(1), 1  # [N, K · bits]
    each = 8 // width  # in a byte; an int32 is four, the first the lowest
    digits = F.pad(digits, (0, 4 * each * _words(q.shape[1], bits) - digits.shape[1])).unflatten(1, (-1, each))
    octets = digits[..., 0]
    for i in range(1, each):
        octets = octets | digits[..., i] << (i * width)
    return octets.contiguous().view(torch.int32)


def _words(k: int, bits: int) -> int:
    return -(-k * bits // 32)


def unpack(words: Tensor, bits: int, k: int) -> Tensor:
    """What `pack` packed.  int32 [N, words] -> int8 [N, k]"""
    first = torch.arange(k, device=words.device) * bits  # of each number, among the bits of a row
    low, shift = first // 32, first % 32
    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    both = unsigned[:, low] | (unsigned[:, (low + 1).clamp(max=words.shape[1] - 1)] << 32)
    return (((both >> shift) & (2**bits - 1)) - 2 ** (bits - 1)).to(torch.int8)


class Format(Protocol):
    """How the weight of a part is stored."""

    @property
    def scheme(self) -> Scheme:
        """Of the weight."""

    @property
    def activations(self) -> bool:
        """Whether its input is quantized, too."""

    def wanted(self, rows: int, k: int) -> dict[str, torch.Size]:
        """Names and shapes of the tensors of a part [rows, k]."""

    def read(self, tensors: Mapping[str, Tensor], rows: int, k: int) -> tuple[QuantizedTensor, Tensor | None]:
        """The weight of a part, and, if its columns are not in order, which column of x each of them multiplies [K].

        Raises ValueError that names the tensor for numbers that cannot be right.
        """


@dataclass(frozen=True)
class CompressedTensors:
    """The format of the compressed-tensors library. activations: in 8 bits, a scale for each row, found as they come.

    Raises ValueError for a scheme that it has no name for.
    """

    scheme: Scheme
    activations: bool = False

    def __post_init__(self) -> None:
        s = self.scheme
        if s.kind == "nf":
            raise ValueError("kind: compressed-tensors has no NF4; use kind 'int'")
        if s.strategy == "tensor":
            raise ValueError("strategy: expected 'channel' or 'group', got 'tensor'; one scale for all serves no layer")
        if s.kind == "float" and not self.activations:
            raise ValueError("activations: expected True with fp8 weights, as every engine that reads them does")
        if self.activations and not (s.bits == 8 and s.symmetric and s.strategy == "channel"):
            raise ValueError("activations: expected symmetric weights of 8 bits with a scale for each channel")

    @property
    def name(self) -> str:
        """Of FORMATS."""
        if not self.activations:
            return "pack-quantized"
        return "int-quantized" if self.scheme.kind == "int" else "float-quantized"

    @property
    def scale_dtype(self) -> torch.dtype:
        """What scales are rounded to before weights are: where these are alone bf16, as kernels and vLLM read them."""
        return torch.float32 if self.activations else torch.bfloat16

    # ---- a part's tensors --------------------------------------------------------------------------------------------

    def wanted(self, rows: int, k: int) -> dict[str, torch.Size]:
        """As the format says. Raises ValueError where groups do not fill a row."""
        s = self.scheme
        scales = {"weight_scale": torch.Size((rows, s.groups(k)))}
        if self.activations:
            return {"weight": torch.Size((rows, k)), **scales}
        found = {"weight_packed": torch.Size((rows, _words(k, s.bits))), **scales, "weight_shape": torch.Size((2,))}
        if not s.symmetric:
            found["weight_zero_point"] = torch.Size((_words(rows, s.bits), s.groups(k)))
        return found

    def read(self, tensors: Mapping[str, Tensor], rows: int, k: int) -> tuple[QuantizedTensor, None]:
        """Unpacked. Raises ValueError that names the tensor."""
        s, scale = self.scheme, tensors["weight_scale"]
        if not scale.is_floating_point() or scale.element_size() < 2:
            raise ValueError(f"weight_scale: expected 16 or 32 bits, got {scale.dtype}")
        if not bool(scale.isfinite().all()):
            raise ValueError("weight_scale: expected finite numbers, got NaN or infinity")
        scale = scale.float()
        if self.activations:
            q, dtype = tensors["weight"], torch.int8 if s.kind == "int" else FP8
            if q.dtype != dtype:
                raise ValueError(f"weight: expected {dtype} for format {self.name}, got {q.dtype}")
            return QuantizedTensor(q, Grid(scale), s), None
        for name in ("weight_packed", "weight_zero_point"):
            if name in tensors and tensors[name].dtype != torch.int32:
                raise ValueError(f"{name}: expected int32, got {tensors[name].dtype}")
        if tensors["weight_shape"].tolist() != [rows, k]:
            raise ValueError(f"weight_shape: expected [{rows}, {k}], got {tensors['weight_shape'].tolist()}")
        zero = None
        if not s.symmetric:
            zero = unpack(tensors["weight_zero_point"].t(), s.bits, rows).t().float()
        return QuantizedTensor(unpack(tensors["weight_packed"], s.bits, k), Grid(scale, zero), s), None

    def write(self, weight: QuantizedTensor) -> dict[str, Tensor]:
        """As the format says; scales in fp32, which hold what they were rounded to."""
        q, grid, bits = weight.q, weight.grid, self.scheme.bits
        if self.activations:
            return {"weight": q, "weight_scale": grid.scale}
        found = {"weight_packed": pack(q, bits), "weight_scale": grid.scale, "weight_shape": torch.tensor(q.shape)}
        if grid.zero is not None:
            found["weight_zero_point"] = pack(grid.zero.t(), bits).t()
        return found

    # ---- config.json -------------------------------------------------------------------------------------------------

    def to_config(self, ignore: tuple[str, ...] = ("lm_head",)) -> dict[str, Any]:
        """The `quantization_config` of config.json; `ignore`: modules that stay as they are."""
        s = self.scheme
        weights = {
            "num_bits": s.bits, "type": s.kind, "symmetric": s.symmetric, "strategy": s.strategy,
            "group_size": s.group_size, "dynamic": False,
        }  # fmt: skip
        inputs = {**weights, "strategy": "token", "group_size": None, "dynamic": True} if self.activations else None
        return {
            "quant_method": "compressed-tensors", "format": self.name, "quantization_status": "compressed",
            "ignore": list(ignore),
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
        }  # fmt: skip

    @classmethod
    def from_config(cls, about: Mapping[str, Any]) -> "CompressedTensors":
        """What a `quantization_config` describes. Raises ValueError that names the entry for what is not supported:
        several groups, parts that are left out, activations with fixed scales.
        """
        groups = _entry(about, "config_groups", dict)
        if len(groups) != 1:
            raise ValueError(f"config_groups: expected one group for all layers, got {len(groups)}")
        group = next(iter(groups.values()))
        if not isinstance(group, dict) or group.get("targets") != ["Linear"]:
            raise ValueError("config_groups: expected a group with targets ['Linear'], others are not supported")
        if group.get("output_activations") is not None:
            raise ValueError("output_activations: expected null; quantized outputs are not supported")
        if about.get("kv_cache_scheme") is not None:
            raise ValueError("kv_cache_scheme: expected null; ask for a cache in 8 bits with kv_cache_dtype")
        patterns = [name for name in about.get("ignore") or [] if not isinstance(name, str) or name.startswith("re:")]
        if patterns:
            raise ValueError(f"ignore: expected names of modules, got {patterns[0]!r}")
        found = cls(_scheme(_entry(group, "weights", dict)), _dynamic(group.get("input_activations")))
        name = about.get("format")
        if name != found.name:
            raise ValueError(f"format: expected {found.name!r} for these config_groups, got {name!r}")
        return found


def _entry(about: Mapping[str, Any], name: str, kind: type) -> Any:
    value = about.get(name)
    if not isinstance(value, kind):
        raise ValueError(f"{name}: expected a {kind.__name__}, got {value!r}")
    return value


def _scheme(about: Mapping[str, Any]) -> Scheme:
    if about.get("dynamic"):
        raise ValueError("dynamic: expected False for weights")
    if about.get("actorder") not in (None, "static", "weight"):
        raise ValueError(f"actorder: expected null or 'static', got {about['actorder']!r}")
    size = about.get("group_size")
    return Scheme(
        _entry(about, "num_bits", int), about.get("type", "int"), bool(about.get("symmetric", True)),
        about.get("strategy", "tensor"), None if size in (None, -1) else size,
    )  # fmt: skip


def _dynamic(about: Mapping[str, Any] | None) -> bool:
    """Whether inputs are quantized, in the one way that is supported."""
    if about is None:
        return False
    right = (8, True, "token", True)
    got = (about.get("num_bits"), about.get("symmetric", True), about.get("strategy"), about.get("dynamic"))
    if got != right:
        raise ValueError(
            "input_activations: expected 8 bits, symmetric, strategy 'token', dynamic true, got"
            f" num_bits {got[0]}, symmetric {got[1]}, strategy {got[2]!r}, dynamic {got[3]}"
        )
    return True
