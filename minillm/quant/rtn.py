"""Numbers of few bits: which they are (`Scheme`), how a tensor is spread over them (`Grid`), rounding to the nearest.

A weight w is stored as an integer q, of which there are 2^bits, with a scale s and, where the range is not symmetric, a
zero point z that many weights share:

    q = clamp(round(w / s) + z),        w ≈ (q - z) · s

Who shares them is the granularity: the whole tensor, an output channel (a row of the weight), or a group of neighbors
in a row. Fewer neighbors fit their range better and cost more scales. Floating formats (fp8) have a scale, too, and
round to the nearest number of the format; NF4 rounds to the nearest of 16 fixed levels.

This is the only rounding in the package: training (`qat`), GPTQ, exporting and evaluating all call `quantize` and
`dequantize`, so that what was measured is what is written. Conventions are those of compressed-tensors: integers are
signed, and a symmetric scale is max|w| over half the number of steps, (2^bits - 1) / 2: 7.5 for 4 bits, 127.5 for 8.

Sources: Jacob et al., 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference"; Micikevicius et al., 2022, "FP8 Formats for Deep Learning"; Dettmers et al., 2023, "QLoRA" (NF4).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.kernels.common import divided

__all__ = [
    "NF4",
    "Grid",
    "QuantizedTensor",
    "Scheme",
    "dequantize",
    "error_grid",
    "fake_quantize",
    "minmax_grid",
    "quantize",
]

KINDS = ("int", "float", "nf")
STRATEGIES = ("tensor", "channel", "group")
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
# The 16 quantiles of a normal distribution between -1 and 1 that QLoRA's appendix E lists, 0 among them.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """How the numbers of a tensor are stored, and who shares a scale.

    - bits: 2 to 8. kind: "int"; "float", which is fp8 E4M3 (8 bits); "nf", which is NF4 (4 bits).
    - symmetric: whether the range is centered on 0, without a zero point.
    - strategy: "tensor", "channel" (a row of a weight, a token of activations) or "group": `group_size` neighbors in a
      row.

    Raises ValueError for what does not exist.
    """

    bits: int = 4
    kind: str = "int"
    symmetric: bool = True
    strategy: str = "group"
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {self.strategy!r}")
        right = {"int": range(2, 9), "float": (8,), "nf": (4,)}[self.kind]
        if not isinstance(self.bits, int) or self.bits not in right:
            expected = f"{right[0]} to {right[-1]}" if len(right) > 1 else str(right[0])
            raise ValueError(f"bits: expected {expected} for kind {self.kind!r}, got {self.bits!r}")
        if not self.symmetric and self.kind != "int":
            raise ValueError(f"symmetric: expected True for kind {self.kind!r}, whose numbers have a sign")
        if (self.strategy == "group") != (self.group_size is not None):
            raise ValueError(f"group_size: expected a number for strategy 'group' alone, got {self.group_size!r}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size: expected 1 or more, got {self.group_size!r}")

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest integer: -8 and 7 for 4 bits."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def groups(self, k: int) -> int:
        """How many groups a row of k numbers has. Raises ValueError unless they fill it."""
        size = self.group_size or k
        if k % size:
            fits = [n for n in (32, 64, 96, 128, 192, 256) if k % n == 0]
            raise ValueError(
                f"group_size: expected a divisor of the row length {k}, got {size};"
                f" {'such as ' + ', '.join(map(str, fits)) if fits else 'use strategy channel'}"
            )
        return k // size

    def bits_per_weight(self, rows: int, k: int, scale_bits: int = 16) -> float:
        """With scales of `scale_bits` and zero points of `bits`, for a weight [rows, k]."""
        shared = 1 if self.strategy == "tensor" else rows * self.groups(k)
        return self.bits + shared * (scale_bits + (0 if self.symmetric else self.bits)) / (rows * k)


@dataclass(frozen=True)
class Grid:
    """The scale [N, G], fp32, and, unless symmetric, the zero point [N, G], a whole number but in GGUF's Q4_1.

    G groups a row; N and G are 1 where all share one.
    """

    scale: Tensor
    zero: Tensor | None = None

    def __getitem__(self, groups: int | slice | Tensor) -> "Grid":
        """Of some of the groups."""
        if isinstance(groups, int):
            groups = slice(groups, groups + 1)
        return Grid(self.scale[:, groups], None if self.zero is None else self.zero[:, groups])


def minmax_grid(w: Tensor, scheme: Scheme, scale_dtype: torch.dtype = torch.float32, shrink: float = 1.0) -> Grid:
    """The grid that reaches from the smallest to the largest number of each group, or `shrink` of it.  w [N, K]

    The range always holds 0, so that 0 stays 0. Scales are rounded to `scale_dtype` before anything is rounded by
    them: what is stored is what was used. A group of zeros has scale 1. Raises ValueError for NaN and infinity.
    """
    groups = _grouped(w.float(), scheme)  # [N, G, size]
    low, high = groups.amin(-1).clamp(max=0) * shrink, groups.amax(-1).clamp(min=0) * shrink  # [N, G]
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise ValueError("w: expected finite numbers, got NaN or infinity")
    first, last = scheme.limits
    largest = torch.maximum(-low, high)
    if scheme.kind == "int":
        scale = divided(high - low if not scheme.symmetric else 2 * largest, last - first)
    else:
        scale = divided(largest, FP8_MAX) if scheme.kind == "float" else largest
    scale = _stored(scale, scale_dtype)
    if scheme.symmetric:
        return Grid(scale)
    return Grid(scale, (first - low / scale).round().clamp(first, last))


def error_grid(
    w: Tensor, scheme: Scheme, weight: Tensor | None = None, scale_dtype: torch.dtype = torch.float32, steps: int = 20,
    narrowest: float = 0.5,
) -> Grid:  # fmt: skip
    """Of grids that reach `narrowest` to all of each group's range, the one of the smallest squared error, group by
    group: to clip one outlier may serve all its neighbors.

    w [N, K]; weight [K]: how much an error in each column counts, such as the mean square of its input.
    """
    best = minmax_grid(w, scheme, scale_dtype)
    count = torch.ones(w.shape[-1], device=w.device) if weight is None else weight.float()
    least = torch.full_like(best.scale, torch.inf)
    for step in range(steps + 1):
        grid = minmax_grid(w, scheme, scale_dtype, 1 - (1 - narrowest) * step / steps)
        error = _grouped((fake_quantize(w, grid, scheme).float() - w.float()).square() * count, scheme).sum(
            -1
        )  # [N, G]
        better = error < least
        least = torch.where(better, error, least)
        zero = None if best.zero is None or grid.zero is None else torch.where(better, grid.zero, best.zero)
        best = Grid(torch.where(better, grid.scale, best.scale), zero)
    return best


def quantize(w: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """Round to the nearest.  w [N, K] -> [N, K]: int8, or fp8 for kind "float", or the level's number, for "nf"

    Ties go to the even integer.
    """
    x = _grouped(w.float(), scheme) / grid.scale[..., None]  # [N, G, size]
    if scheme.kind == "float":
        return x.clamp(-FP8_MAX, FP8_MAX).to(FP8).reshape(w.shape)
    if scheme.kind == "nf":
        levels = torch.tensor(NF4, device=w.device)
        return torch.bucketize(x, (levels[1:] + levels[:-1]) / 2).to(torch.int8).reshape(w.shape)
    first, last = scheme.limits
    q = x.round() if grid.zero is None else x.round() + grid.zero[..., None]
    return q.clamp(first, last).to(torch.int8).reshape(w.shape)


def dequantize(q: Tensor, grid: Grid, scheme: Scheme, dtype: torch.dtype = torch.float32) -> Tensor:
    """(q - z) · s, computed in fp32.  q as `quantize` gives it -> [N, K]"""
    if scheme.kind == "nf":
        x = torch.tensor(NF4, device=q.device)[q.long()]
    else:
        x = q.float()
    groups = _grouped(x, scheme)
    if grid.zero is not None:
        groups = groups - grid.zero[..., None]
    return (groups * grid.scale[..., None]).reshape(q.shape).to(dtype)


def fake_quantize(w: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """What the weight is after it was stored and read back, in w's dtype.  [N, K] -> [N, K]"""
    return dequantize(quantize(w, grid, scheme), grid, scheme, w.dtype)


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight [N, K] as it is stored: q as `quantize` gives it, its grid, and by which scheme."""

    q: Tensor
    grid: Grid
    scheme: Scheme

    @classmethod
    def round(cls, w: Tensor, grid: Grid, scheme: Scheme) -> "QuantizedTensor":
        """Round to the nearest.  w [N, K]"""
        return cls(quantize(w, grid, scheme), grid, scheme)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the layer computes with.  -> [N, K]"""
        return dequantize(self.q, self.grid, self.scheme, dtype)


def _grouped(w: Tensor, scheme: Scheme) -> Tensor:
    """[N, K] -> [N, G, size]; for one scale of all [1, 1, N · K]."""
    if scheme.strategy == "tensor":
        return w.reshape(1, 1, -1)
    return w.unflatten(-1, (scheme.groups(w.shape[-1]), -1))


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As fp32, after rounding to the dtype that it is stored in; 1 where it would be 0."""
    scale = scale.to(dtype).float()
    return torch.where(scale > 0, scale, 1.0)
