"""The layer whose weight is stored in few bits, and the ways to multiply by it.

- Weights alone are quantized (W4A16, W8A16): a product reads fewer bytes, and computes with what they stand for in x's
  dtype. That is where one stream gains, whose time is the bytes of the weights.
- Activations too (W8A8): each row of x gets a scale as it comes, and the product is one of 8-bit numbers, which a GPU's
  tensor cores and a CPU's dot instructions do two to four times as fast. That is where large batches gain, too.

On a GPU our kernels do it. On a CPU torch's own operations do: for packed weights they want x in bf16 (fp32 takes a
slow path), so x is rounded to bf16 on the way. `use("reference")` computes with the dequantized weight, in x's dtype.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import KERNELS, norm_quantize_rows, quantize_rows, repack, swiglu, unpack, w4a16, w8a8, w8a16
from ..kernels.common import SINCE, capability
from ..model.linear import Dense, Linear, LinearFactory, dense, floating
from .formats import CompressedTensors, Format, pack
from .importers import Imported, Recipe
from .rtn import Grid, QuantizedTensor, Scheme, minmax_grid

if TYPE_CHECKING:
    from ..model.layers import Batch, RMSNorm

__all__ = ["QuantLinear", "factory", "imported", "rounding"]

ATEN_GROUPS = (32, 64, 128, 256)  # that torch's product with packed int4 takes on a CPU


class QuantLinear(Linear):
    """x W^T + b with W as `format` stores it, rows of all parts one after another. `source`: what it is read from, if
    that is another format.

    Buffers: `weight`, int8 or fp8 [N, K], or int4 packed as int32 [N, K/8]; `scale` fp32 [N, G]; `zero` int8 [N, G] or
    None (int4 on a GPU: all three as `repack` leaves them, scales in 16 bits if these hold them); `order` int64 [K],
    which column of x each column multiplies, or None; `offset` floating [N, G] or None: what is added to each weight of
    a group, of zero points between integers; `bias` [N] or None.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor | None
    offset: Tensor | None
    order: Tensor | None
    bias: Tensor | None

    def __init__(
        self, in_features: int, parts: dict[str, int], format: CompressedTensors, bias: bool = False,
        source: Format | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_features, parts)
        self.format, self.source, self.has_bias = format, source or format, bias
        self._packed: tuple[Tensor, ...] | None = None  # the weight once more, as torch's operations want it on a CPU
        for name in ("weight", "scale", "zero", "offset", "order", "bias"):
            self.register_buffer(name, None)

    @classmethod
    def of(cls, dense: Dense, weight: QuantizedTensor, format: CompressedTensors) -> "QuantLinear":
        """In the place of `dense`, whose weight was rounded to `weight` [N, K]."""
        layer = cls(dense.in_features, dense.parts, format, dense.bias is not None)
        layer.set(weight, None if dense.bias is None else dense.bias.detach(), dense.weight.device)
        return layer

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "QuantLinear":
        """`to`, `half` and the like move everything, and convert the offset and the bias alone."""
        kept = {name: getattr(self, name) for name in ("weight", "scale", "zero")}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            if tensor is not None:
                setattr(self, name, tensor.to(getattr(self, name).device))
        self._packed = None
        return self

    # ---- what it holds -----------------------------------------------------------------------------------------------

    def set(
        self, weight: QuantizedTensor, bias: Tensor | None, device: torch.device, order: Tensor | None = None
    ) -> None:
        """Take a weight [N, K], whose scheme is the format's."""
        zero, self.offset = weight.grid.zero, None
        if zero is not None and not torch.equal(zero, zero.round()):  # (q - z) s is q s and, for a group, - z s
            self.offset, zero = (-zero * weight.grid.scale).to(device), None
        self.weight = (pack(weight.q, 4) if self._is_packed else weight.q).to(device)
        self.scale = weight.grid.scale.to(device)
        self.zero = None if zero is None else zero.to(device, torch.int8)
        if self._is_packed and device.type == "cuda":
            self.weight, self.scale, self.zero = repack(self.weight, _in_16_bits(self.scale), self.zero)
        self.order = None if order is None else order.to(device)
        self.bias = None if bias is None else bias.to(device)
        self._packed = None

    def quantized(self) -> QuantizedTensor:
        """The weight [N, K] as it was set; its columns in `order`."""
        q = unpack(self.weight, self.in_features) if self._is_packed else self.weight
        scale, zero = self.scale.float(), None if self.zero is None else self.zero.float()
        if self.offset is not None:
            zero = -self.offset.float() / scale
        return QuantizedTensor(q, Grid(scale, zero), self.format.scheme)

    @property
    def _is_packed(self) -> bool:
        scheme = self.format.scheme
        return scheme.kind == "int" and scheme.bits == 4 and self.in_features % 8 == 0

    @property
    def _is_w8a16(self) -> bool:
        """Whether these are integers of 8 bits with one scale a row."""
        scheme = self.format.scheme
        return scheme.kind == "int" and scheme.bits == 8 and self.zero is None and self.scale.shape[1] == 1

    @property
    def quantization_config(self) -> dict[str, Any]:
        """As the format says."""
        return self.format.to_config()

    def wanted(self) -> dict[str, torch.Size]:
        """As the source says, for each part; and biases."""
        found: dict[str, torch.Size] = {}
        for part, rows in self.parts.items():
            found |= {f"{part}.{name}": size for name, size in self.source.wanted(rows, self.in_features).items()}
            if self.has_bias:
                found[f"{part}.bias"] = torch.Size((rows,))
        return found

    def load(self, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
        """Parts one after another. Raises ValueError that names the tensor."""
        parts, orders = [], []
        for part, rows in self.parts.items():
            own = {name.removeprefix(f"{part}."): x for name, x in tensors.items() if name.startswith(f"{part}.")}
            try:
                weight, order = self.source.read(own, rows, self.in_features)
            except ValueError as error:
                raise ValueError(f"{part}.{error}") from error
            parts.append(weight)
            orders.append(order)
            if not _same(order, orders[0]):
                raise ValueError(f"{part}.g_idx: expected the groups of {next(iter(self.parts))}, one product has both")
        bias = None
        if self.has_bias:
            bias = torch.cat([floating(f"{part}.bias", tensors[f"{part}.bias"]) for part in self.parts]).to(dtype)
        self.set(_joined(parts), bias, device, orders[0])
        self.offset = None if self.offset is None else self.offset.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        """What `load` takes, in the format. Raises ValueError for columns out of order, which it has no place for."""
        if self.order is not None:
            raise ValueError("g_idx: a checkpoint quantized in order of activations (desc_act) cannot be written anew")
        if self.offset is not None:
            raise ValueError("zero: expected whole zero points to write, got others (GGUF's Q4_1 has them)")
        found: dict[str, Tensor] = {}
        whole, first = self.quantized(), 0
        for part, rows in self.parts.items():
            own = slice(first, first + rows)
            grid = Grid(whole.grid.scale[own], None if whole.grid.zero is None else whole.grid.zero[own])
            stored = self.format.write(QuantizedTensor(whole.q[own], grid, whole.scheme))
            found |= {f"{part}.{name}": x for name, x in stored.items()}
            if self.bias is not None:
                found[f"{part}.bias"] = self.bias[own]
            first += rows
        return found

    # ---- what it computes --------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, batch: "Batch | None" = None) -> Tensor:
        """By the kernels; by torch's packed products on a CPU. Under autograd x has a gradient, the weight has none."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _ThroughFewBits.apply(x, self)
        if self.order is not None:
            x = x[..., self.order]
        if self.format.activations:
            q, scale = quantize_rows(x, self.weight.dtype)
            return self._of_rows(q, scale, x.dtype)
        if KERNELS["w4a16"].path(x) == "torch" and x.device.type == "cpu" and self._prepare():
            return self._on_cpu(x)
        if self._is_packed:
            y = w4a16(x, self.weight, self.scale, self.zero, self.bias)
            if self.offset is None:
                return y
            return y + F.linear(x.unflatten(-1, (self.offset.shape[1], -1)).sum(-1), self.offset.to(x.dtype))
        if self._is_w8a16:
            return w8a16(x, self.weight, self.scale, self.bias)
        return F.linear(x, self.quantized().dequantize(x.dtype), self.bias)

    def add_norm(
        self, norm: "RMSNorm", branch: Tensor, stream: Tensor | None, batch: "Batch | None" = None,
        use_swiglu: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As `Linear.add_norm`; rows that are quantized are so in the kernel of the norm."""
        if not self.format.activations:
            return super().add_norm(norm, branch, stream, batch, use_swiglu)
        q, scale, stream = norm_quantize_rows(branch, stream, norm.weight, norm.eps, self.weight.dtype)
        y = self._of_rows(q, scale, branch.dtype)
        return (swiglu(y) if use_swiglu else y), stream

    def _of_rows(self, q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return w8a8(q, scale, self.weight, self.scale, self.bias, dtype)

    def _prepare(self) -> bool:
        """Whether torch has a product for this weight on a CPU; if so it is laid out for that, once."""
        if self._packed is not None:
            return True
        scheme, (n, k) = self.format.scheme, (self.out_features, self.in_features)
        size = scheme.group_size or k
        if self._is_w8a16:
            self._packed = self.weight, self.scale[:, 0].bfloat16()
        elif self._is_packed and size in ATEN_GROUPS and n % 16 == 0:
            q = unpack(self.weight, k).to(torch.int32) + 8
            # (q - 8) s + z there, (q - 8 - z) s here
            zero = torch.zeros_like(self.scale) if self.zero is None else -self.zero * self.scale
            zero = zero if self.offset is None else self.offset.to(zero.dtype)
            both = torch.stack((self.scale, zero), -1).transpose(0, 1).contiguous().bfloat16()  # [G, N, 2]
            self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1), both
        return self._packed is not None

    def _on_cpu(self, x: Tensor) -> Tensor:
        assert self._packed is not None
        weight, scale = self._packed
        flat = x.reshape(-1, self.in_features).bfloat16()
        if self.weight.dtype == torch.int8:
            y = torch._weight_int8pack_mm(flat, weight, scale)
        else:
            size = self.format.scheme.group_size or self.in_features
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, weight, size, scale)
        y = y.to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class _ThroughFewBits(torch.autograd.Function):
    """The layer's own product; backward, that with what its weight reads back as."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantLinear) -> Tensor:
        ctx.layer = layer
        with torch.no_grad():
            return layer(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad, order = grads[0], ctx.layer.order
        found = grad @ ctx.layer.quantized().dequantize(grad.dtype)
        return found if order is None else torch.empty_like(found).index_copy_(-1, order, found), None


def _in_16_bits(scale: Tensor) -> Tensor:
    """If that loses nothing, in what the GPU has."""
    for dtype in (torch.bfloat16, torch.float16):
        if capability(scale.device) >= SINCE.get(dtype, (0, 0)) and torch.equal(scale.to(dtype).float(), scale.float()):
            return scale.to(dtype)
    return scale


def _joined(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """One below another."""
    zeros = [part.grid.zero for part in parts if part.grid.zero is not None]
    grid = Grid(torch.cat([part.grid.scale for part in parts]), torch.cat(zeros) if zeros else None)
    return QuantizedTensor(torch.cat([part.q for part in parts]), grid, parts[0].scheme)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


@dataclass(frozen=True)
class _Rounding:
    """A `Format` that is read only: plain weights, rounded to the nearest of `format` as they come, on `device`."""

    format: CompressedTensors
    device: torch.device

    @property
    def scheme(self) -> Scheme:
        return self.format.scheme

    @property
    def activations(self) -> bool:
        return self.format.activations

    def wanted(self, rows: int, k: int) -> dict[str, torch.Size]:
        return {"weight": torch.Size((rows, k))}

    def read(self, tensors: Mapping[str, Tensor], rows: int, k: int) -> tuple[QuantizedTensor, Tensor | None]:
        weight = floating("weight", tensors["weight"]).to(self.device)
        grid = minmax_grid(weight, self.scheme, self.format.scale_dtype)
        return QuantizedTensor.round(weight, grid, self.scheme), None


def rounding(format: CompressedTensors, device: torch.device) -> LinearFactory:
    """Of a model whose layers, but for its head, are rounded to the nearest as they are loaded, one after another."""
    return _factory(format, _Rounding(format, device), lambda name, parts: True)


def factory(format: CompressedTensors, ignore: Collection[str] = ("lm_head",)) -> LinearFactory:
    """Of a model whose layers are stored by `format`, but for its head and the parts that are to be ignored, such as
    "model.layers.0.mlp.up_proj". Raises ValueError where that parts what one product computes.
    """

    def quantized(name: str, parts: list[str]) -> bool:
        parent = name.rpartition(".")[0]
        left_out = [part for part in parts if f"model.{parent}.{part}" in ignore]
        if left_out and len(left_out) < len(parts):
            raise ValueError(f"ignore: expected all parts of {name} or none, got {', '.join(left_out)}")
        return not left_out

    return _factory(format, format, quantized)


def imported(recipe: Recipe) -> LinearFactory:
    """Of a model that GPTQ or AWQ stored. Raises ValueError for a head in few bits."""
    if recipe.head:
        raise ValueError("lm_head: expected False; a head in few bits is not supported")
    return _factory(CompressedTensors(recipe.scheme), Imported(recipe), recipe.converts)


def _factory(format: CompressedTensors, source: Format, quantized: Callable[[str, list[str]], bool]) -> LinearFactory:
    def make(name: str, in_features: int, parts: dict[str, int], bias: bool) -> Linear:
        if name == "lm_head" or not quantized(name, list(parts)):
            return dense(name, in_features, parts, bias)
        return QuantLinear(in_features, parts, format, bias, source)

    return make
