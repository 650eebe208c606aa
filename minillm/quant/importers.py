"""Reading what others quantized: checkpoints of GPTQ and AWQ, part by part (GGUF is in `gguf.py`).

Both store w ≈ (u - z) · s with unsigned integers u of `bits` bits, many in one int32, the first in its lowest bits;
here they become the signed ones of `rtn.py`. What differs is where the numbers lie, and how a zero point z is written:

| | qweight | qzeros | within an int32 | stored for z |
|---|---|---|---|---|
| GPTQ, "gptq" (v1) | [K/8, N]: 8 rows in one | [G, N/8] | in order | z - 1 |
| GPTQ, "gptq_v2" | the same | the same | in order | z |
| AWQ, "gemm" | [K, N/8]: 8 columns in one | [G, N/8] | columns 0 2 4 6 1 3 5 7 | z |

(for 4 bits; G groups a row; scales are [G, N]). v1 has no number for z = 0. Most tools then wrap each number for
itself, to 15; GPTQModel subtracts from whole int32s, so that a 0 borrows from its neighbor. Which of the two wrote a
file is in its config, and `parse` looks: `zeros` is "v1" or "v1 by words".

A GPTQ checkpoint with act-order (desc_act) has the weights of a group anywhere in a row: g_idx [K] says whose a column
is. `gptq` sorts the columns by group and returns that order; a layer multiplies x[..., order] by what it got.

Not read: 3 bits, whose packing differs between tools; Marlin's and GEMV's layouts; layers with settings of their own.

Sources: Frantar et al., 2022, "GPTQ"; Lin et al., 2023, "AWQ"; the packers of AutoGPTQ, GPTQModel and AutoAWQ.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .rtn import Grid, QuantizedTensor, Scheme

__all__ = ["Imported", "Recipe", "awq", "gptq", "parse", "wanted"]

BITS = {"gptq": (2, 4, 8), "awq": (4,)}
ZEROS = ("v1", "v1 by words", "v2")
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # which of 8 columns lies in the 1st, 2nd, ... 4 bits of an int32
SCALES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Recipe:
    """What a `quantization_config` says.

    - method: "gptq" or "awq". zeros: how GPTQ's zero points are stored, one of ZEROS.
    - kept: layers whose name contains one of these are not quantized. only: if there are any, those that end with one
      of these are, and no others. head: whether `lm_head` is.
    """

    method: str
    scheme: Scheme
    zeros: str = "v2"
    kept: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    head: bool = False

    def converts(self, layer: str, parts: Iterable[str]) -> bool:
        """Whether a layer is quantized.  ("layers.0.self_attn.qkv_proj", ["q_proj", "k_proj", "v_proj"]) -> bool

        Raises ValueError where that differs between parts, which one product computes.
        """
        above = layer.rpartition(".")[0]
        names = [f"model.{above}.{part}" if above else part for part in parts]
        found = {name: self._converts(name) for name in names}
        if len(set(found.values())) > 1:
            told = ", ".join(f"{name} is{'' if yes else ' not'}" for name, yes in found.items())
            raise ValueError(f"quantization_config: expected all parts of {layer} quantized or none, but {told}")
        return all(found.values())

    def _converts(self, name: str) -> bool:
        if name == "lm_head":
            return self.head
        chosen = not self.only or name.endswith(tuple(f".{end}" for end in self.only))
        return chosen and not any(kept in name for kept in self.kept)


def parse(config: Mapping[str, Any]) -> Recipe:
    """The `quantization_config` of a config.json whose quant_method is "gptq" or "awq".

    Raises ValueError that names the field for what is missing, of a wrong type, or not supported.
    """
    method = config.get("quant_method")
    if method not in ("gptq", "awq"):
        raise ValueError(f"quant_method: expected gptq or awq, got {method!r}")
    bits = _field(config, ("bits", "w_bit"), int)
    if bits not in BITS[method]:
        raise ValueError(f"bits: expected {' or '.join(map(str, BITS[method]))} for {method}, got {bits!r}")
    size = _field(config, ("group_size", "q_group_size"), int)
    if size != -1 and size < 1:
        raise ValueError(f"group_size: expected a size, or -1 for one group a row, got {size!r}")
    # To read zero points that are all the same is right, too: that is what silence means.
    symmetric = (
        _field(config, ("sym",), bool, False) if method == "gptq" else not _field(config, ("zero_point",), bool, True)
    )
    scheme = Scheme(bits, "int", symmetric, "channel" if size == -1 else "group", None if size == -1 else size)
    if method == "awq":
        for field in ("version", "format", "checkpoint_format"):
            _only(config, (field,), "gemm", "gemm")
        return Recipe("awq", scheme, kept=_names(config, "modules_to_not_convert"))
    layout = _only(config, ("checkpoint_format", "format"), "gptq", "gptq", "gptq_v2")
    _only(config, ("pack_dtype",), "int32", "int32")
    for field in ("is_marlin_format", "dynamic"):
        if config.get(field):
            raise ValueError(f"{field}: not supported, got {config[field]!r}; use a checkpoint without it")
    _field(config, ("desc_act",), bool, False)  # g_idx tells
    zeros = "v2" if layout == "gptq_v2" else "v1 by words" if _by_gptqmodel(config) else "v1"
    only = _names(config, "modules_in_block_to_quantize")
    return Recipe("gptq", scheme, zeros, only=only, head=_field(config, ("lm_head",), bool, False))


@dataclass(frozen=True)
class Imported:
    """A `Format` (see `formats.py`) that is read only: what a recipe says of a quantized layer's parts."""

    recipe: Recipe

    @property
    def scheme(self) -> Scheme:
        """Of the weight."""
        return self.recipe.scheme

    @property
    def activations(self) -> bool:
        """They are not quantized."""
        return False

    def wanted(self, rows: int, k: int) -> dict[str, torch.Size]:
        """Names and shapes of the tensors of a part."""
        return wanted(self.recipe.method, k, rows, self.scheme)

    def read(self, tensors: Mapping[str, Tensor], rows: int, k: int) -> tuple[QuantizedTensor, Tensor | None]:
        """As `gptq` and `awq`."""
        if self.recipe.method == "awq":
            return awq(tensors, k, rows, self.scheme), None
        return gptq(tensors, k, rows, self.scheme, self.recipe.zeros)


def wanted(method: str, in_features: int, rows: int, scheme: Scheme) -> dict[str, torch.Size]:
    """The tensors of one part of a layer and their shapes, by names such as "qweight".

    Raises ValueError for a part that the format cannot hold.
    """
    if method not in BITS or scheme.bits not in BITS[method] or scheme.kind != "int":
        raise ValueError(f"method: expected {' or '.join(BITS)} with bits that it has, got {method!r} with {scheme}")
    if scheme.strategy == "tensor":
        raise ValueError(f"strategy: expected channel or group, got {scheme.strategy!r}")
    per_word = 32 // scheme.bits
    for name, size in (("in_features", in_features), ("rows", rows)):
        if size % per_word and (name == "rows" or method == "gptq"):
            raise ValueError(f"{name}: expected a multiple of {per_word} for {scheme.bits} bits, got {size}")
    groups, words = scheme.groups(in_features), rows // per_word
    shapes = {
        "qweight": (in_features // per_word, rows) if method == "gptq" else (in_features, words),
        "qzeros": (groups, words),
        "scales": (groups, rows),
    } | ({"g_idx": (in_features,)} if method == "gptq" else {})
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def gptq(
    tensors: Mapping[str, Tensor], in_features: int, rows: int, scheme: Scheme, zeros: str = "v1", prefix: str = ""
) -> tuple[QuantizedTensor, Tensor | None]:
    """One part of GPTQ's, "{prefix}qweight" and so on  -> [N, K], order [K] int64 or None

    With an order, column i of the result is column order[i] of the weight: x W^T = x[..., order] result^T, and
    W = result[:, order.argsort()]. Raises ValueError that names the tensor.
    """
    found = _checked(tensors, wanted("gptq", in_features, rows, scheme), prefix)
    if zeros not in ZEROS:
        raise ValueError(f"zeros: expected one of {', '.join(ZEROS)}, got {zeros!r}")
    order = _order(found["g_idx"], found["scales"].shape[0], f"{prefix}g_idx")
    u = _unpacked(found["qweight"].T.contiguous(), scheme.bits).flatten(1)  # [N, K]
    z = _zeros(found["qzeros"], scheme.bits, zeros).T  # [N, G]
    # Some files that are v2 say v1, and some the reverse. Where the grid is symmetric, that does no harm.
    middle = 2 ** (scheme.bits - 1)
    even = (middle, middle - 1 if zeros == "v2" else middle + 1)
    return _signed(u if order is None else u[:, order], z, found["scales"], scheme, even, prefix), order


def awq(
    tensors: Mapping[str, Tensor], in_features: int, rows: int, scheme: Scheme, prefix: str = ""
) -> QuantizedTensor:  # fmt: skip
    """One part of AWQ's, "{prefix}qweight" and so on  -> [N, K]

    Raises ValueError that names the tensor.
    """
    found = _checked(tensors, wanted("awq", in_features, rows, scheme), prefix)
    where = torch.tensor(AWQ_COLUMNS).argsort().to(found["qweight"].device)  # of 8 columns, in the int32
    u = _unpacked(found["qweight"], 4)[..., where].flatten(1).T.contiguous()  # [N, K]
    z = _unpacked(found["qzeros"], 4)[..., where].flatten(1).T  # [N, G]
    return _signed(u, z, found["scales"], scheme, (8,), prefix)


def _signed(
    u: Tensor, z: Tensor, scales: Tensor, scheme: Scheme, even: tuple[int, ...], prefix: str
) -> QuantizedTensor:  # fmt: skip
    """From unsigned integers to ours.  u uint8 [N, K], z uint8 [N, G], scales [G, N]

    even: what z may be, everywhere the same, where the grid is symmetric.
    """
    middle = 2 ** (scheme.bits - 1)
    q = u.view(torch.int8) + -middle  # 8 bits: 200 is -56 as int8, and -56 - 128 wraps to 72
    scale = scales.T.float().contiguous()
    if not scheme.symmetric:
        return QuantizedTensor(q, Grid(scale, (z.float() - middle).contiguous()), scheme)
    if not any(bool((z == value).all()) for value in even):
        raise ValueError(
            f"{prefix}qzeros: expected zero points of {middle} alone, since the config says that the grid is symmetric,"
            f" got {int(z.min())} to {int(z.max())}"
        )
    return QuantizedTensor(q, Grid(scale), scheme)


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """int32 [..., J] -> uint8 [..., J, 32 / bits], lowest bits first"""
    out = torch.empty(*words.shape, 32 // bits, dtype=torch.uint8, device=words.device)
    for i in range(32 // bits):
        out[..., i] = (words >> (i * bits)) & (2**bits - 1)
    return out


def _zeros(words: Tensor, bits: int, zeros: str) -> Tensor:
    """Zero points.  int32 [G, J] -> uint8 [G, J · 32 / bits]"""
    if zeros == "v1 by words":  # a carry undoes the borrow
        words = words + (2**32 - 1) // (2**bits - 1)  # 0x11111111
    z = _unpacked(words, bits).flatten(1)
    return (z + 1) & (2**bits - 1) if zeros == "v1" else z


def _order(g_idx: Tensor, groups: int, name: str) -> Tensor | None:
    """The columns sorted by group, or None if they are.  int32 [K] -> int64 [K]"""
    size = len(g_idx) // groups
    if bool((g_idx < 0).any() | (g_idx >= groups).any()):
        raise ValueError(f"{name}: expected groups 0 to {groups - 1}, got {int(g_idx.min())} to {int(g_idx.max())}")
    counts = torch.bincount(g_idx, minlength=groups)
    if bool((counts != size).any()):
        group = int((counts != size).nonzero()[0])
        raise ValueError(f"{name}: expected {size} columns in each group, got {int(counts[group])} in group {group}")
    order = g_idx.argsort(stable=True)
    return order if bool((g_idx.diff() < 0).any()) else None


def _checked(tensors: Mapping[str, Tensor], shapes: dict[str, torch.Size], prefix: str) -> dict[str, Tensor]:
    """These tensors, without the prefix."""
    found = {}
    for name, shape in shapes.items():
        tensor = tensors.get(f"{prefix}{name}")
        if tensor is None:
            raise ValueError(f"{prefix}{name}: missing; expected {', '.join(shapes)}")
        if tensor.shape != shape:
            raise ValueError(f"{prefix}{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
        right = SCALES if name == "scales" else (torch.int32,)
        if tensor.dtype not in right:
            expected, got = (str(dtype).removeprefix("torch.") for dtype in (right[0], tensor.dtype))
            raise ValueError(f"{prefix}{name}: expected {expected}, got {got}")
        if name == "scales" and not bool(tensor.isfinite().all()):
            raise ValueError(f"{prefix}scales: expected finite numbers, got NaN or infinity")
        found[name] = tensor
    return found


def _field(config: Mapping[str, Any], names: tuple[str, ...], kind: type, default: Any = None) -> Any:
    """The first of these fields that there is."""
    value, name = next(((config[n], n) for n in names if config.get(n) is not None), (default, names[0]))
    if type(value) is not kind:  # True is an int, too
        raise ValueError(f"{name}: expected {kind.__name__}, got {value!r}")
    return value


def _only(config: Mapping[str, Any], names: tuple[str, ...], default: str, *right: str) -> str:
    """A field's text, in lower case, which must be one of `right`."""
    value = str(_field(config, names, str, default)).lower()
    if value not in right:
        raise ValueError(f"{names[0]}: expected {' or '.join(right)}, got {value!r}")
    return value


def _names(config: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """A list of names, or of lists of names."""
    value = config.get(field) or []
    flat: list[Any] = []
    for inner in value if isinstance(value, list) else [None]:
        flat += inner if isinstance(inner, list) else [inner]
    if not all(isinstance(name, str) and name for name in flat):
        raise ValueError(f"{field}: expected a list of names, got {value!r}")
    return tuple(flat)


def _by_gptqmodel(config: Mapping[str, Any]) -> bool:
    meta = config.get("meta")
    return "gptqmodel" in str(meta.get("quantizer") if isinstance(meta, dict) else "").lower()
