"""LoRA: W x becomes W x + s B (A x), with W as it is and only A [r, in] and B [out, r] trained.

A change of rank r of a matrix [out, in] has r (in + out) numbers instead of in · out. What is trained needs gradients
and two moments of the optimizer; what is not needs neither, nor 16 or 32 bits: W may be stored in 4 (QLoRA). B begins
as 0, so an adapter begins as no change; s = alpha / r keeps the change's size when r is tried out, and alpha / sqrt(r)
(rsLoRA) keeps it for large r.

    config = LoraConfig(r=16, lora_alpha=32, target_modules=("q_proj", "v_proj"))
    adapted(model, config)                       # layers are `LoraLinear` now
    train(model, examples)                       # A and B alone
    adapter = adapter_of(model)                  # what `peft_format.save` writes, and an engine serves
    merge(model)                                 # W + s B A, at no cost in use

Sources: Hu et al., 2021, "LoRA"; Kalajdzievski, 2023, "A Rank Stabilization Scaling Factor" (rsLoRA); Dettmers et al.,
2023, "QLoRA". Fields of the config are named as in Hugging Face's PEFT.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import Transformer
from ..model.linear import Dense, Linear
from ..quant.linear import QuantLinear
from ..quant.rtn import QuantizedTensor, minmax_grid

if TYPE_CHECKING:
    from ..model.layers import Batch

__all__ = [
    "Adapter",
    "Around",
    "LoraConfig",
    "LoraLinear",
    "Pair",
    "adapted",
    "adapter_of",
    "attach",
    "check",
    "described",
    "detach",
    "linears",
    "merge",
    "modules",
    "prefix_of",
    "replace",
    "unmerge",
]


@dataclass(frozen=True)
class LoraConfig:
    """Which matrices are adapted, and how.

    - r, lora_alpha: the rank, and what the scale is made of.
    - target_modules: "all-linear" (all but the head), another string: a regular expression that the whole name matches,
      or names and ends of names after a dot ("q_proj"). exclude_modules: likewise, what is left out.
    - rank_pattern, alpha_pattern: {regular expression: value} for names that end so; the first that matches counts.
    - use_rslora: the scale is alpha / sqrt(r).
    - layers_to_transform: these layers' modules alone, where targets are ends of names. layers_pattern: what stands
      before a layer's number ("layers").

    A module's name is that in a checkpoint: "model.layers.0.self_attn.q_proj". Raises ValueError for values that make
    no sense.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: str | tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, rank in {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(f"{name}: expected a rank, 1 or more, got {rank!r}")
        alphas = {f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}
        for name, alpha in {"lora_alpha": self.lora_alpha, **alphas}.items():
            number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
            if not number or not math.isfinite(alpha):
                raise ValueError(f"{name}: expected a number, got {alpha!r}")
        if not self.target_modules:
            raise ValueError("target_modules: expected names, a regular expression or 'all-linear', got none")
        patterns = {"rank_pattern": [*self.rank_pattern], "alpha_pattern": [*self.alpha_pattern],
                    "layers_pattern": [*self.layers_pattern]}  # fmt: skip
        for name in ("target_modules", "exclude_modules"):
            patterns[name] = [value] if isinstance(value := getattr(self, name), str) else []
        for name, found in patterns.items():
            for pattern in found:
                try:
                    re.compile(pattern)
                except re.error as e:
                    raise ValueError(f"{name}: expected a regular expression, got {pattern!r} ({e})") from e

    def targets(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that are adapted. Rules, down to their order, are PEFT's."""
        return [name for name in names if not self._excluded(name) and self._targeted(name)]

    def rank(self, name: str) -> int:
        """Of a module's A and B."""
        return self.rank_pattern.get(_key(self.rank_pattern, name), self.r)

    def scale(self, name: str) -> float:
        """What a module's B A is multiplied by."""
        alpha, rank = self.alpha_pattern.get(_key(self.alpha_pattern, name), self.lora_alpha), self.rank(name)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _excluded(self, name: str) -> bool:
        if isinstance(self.exclude_modules, str):
            return bool(self.exclude_modules) and re.fullmatch(self.exclude_modules, name) is not None
        return _ends(name, self.exclude_modules)

    def _targeted(self, name: str) -> bool:
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == "all-linear":
                return name != "lm_head"
            return re.fullmatch(self.target_modules, name) is not None
        if name in self.target_modules:  # whatever its layer
            return True
        if not _ends(name, self.target_modules) or not self.layers_to_transform:
            return _ends(name, self.target_modules)
        before = [rf"(?:^|.*?\.){p}" for p in self.layers_pattern] or [r".*?\.[^.]*"]
        found = next((m for p in before if (m := re.match(rf"{p}\.(\d+)\.", name))), None)
        return found is not None and int(found[1]) in self.layers_to_transform


def _ends(name: str, ends: Iterable[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _key(patterns: Iterable[str], name: str) -> str:
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", name)), "")


# ---- an adapter ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A module's change, scale · b a.  a [r, in], b [out, r]"""

    a: Tensor
    b: Tensor
    scale: float

    def delta(self) -> Tensor:
        """[out, in], fp32."""
        return self.scale * (self.b.float() @ self.a.float())


@dataclass(frozen=True)
class Adapter:
    """What was trained: a pair for each adapted module, by names such as "model.layers.0.self_attn.q_proj"."""

    config: LoraConfig
    pairs: Mapping[str, Pair]

    @property
    def rank(self) -> int:
        """The largest."""
        return max(pair.a.shape[0] for pair in self.pairs.values())

    @cached_property
    def digest(self) -> bytes:
        """Of all that decides what it computes: equal digests are equal adapters, whatever they are called."""
        found = hashlib.blake2b(digest_size=16)
        for name, pair in sorted(self.pairs.items()):
            found.update(repr((name, pair.scale, pair.a.shape, pair.b.shape, pair.a.dtype, pair.b.dtype)).encode())
            for tensor in (pair.a, pair.b):
                found.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
        return found.digest()


# ---- in a model ------------------------------------------------------------------------------------------------------


class Around(Linear):
    """A layer around another, `base`, which keeps its weight: in a checkpoint it is that one."""

    def __init__(self, base: Linear) -> None:
        super().__init__(base.in_features, base.parts)
        self.base = base

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        return self.base.quantization_config

    def wanted(self) -> dict[str, torch.Size]:
        return self.base.wanted()

    def load(self, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
        self.base.load(tensors, device, dtype)

    def tensors(self) -> dict[str, Tensor]:
        return self.base.tensors()

    def tie(self, embedding: nn.Embedding) -> bool:
        return self.base.tie(embedding)


class LoraLinear(Around):
    """f(x W^T + b) + s (x A^T) B^T for each adapted part of `base`.

    A and B are fp32 and trained; of `scales` each part has one.
    """

    def __init__(self, base: Linear, pairs: Mapping[str, Pair]) -> None:
        super().__init__(base)
        self.scales = {part: pair.scale for part, pair in pairs.items()}
        self.lora_a = nn.ParameterDict({part: nn.Parameter(pair.a.float()) for part, pair in pairs.items()})
        self.lora_b = nn.ParameterDict({part: nn.Parameter(pair.b.float()) for part, pair in pairs.items()})

    def pairs(self) -> dict[str, Pair]:
        """By part."""
        return {
            part: Pair(a.detach(), self.lora_b[part].detach(), self.scales[part]) for part, a in self.lora_a.items()
        }

    def forward(self, x: Tensor, batch: "Batch | None" = None) -> Tensor:
        y = list(self.base(x, batch).split(list(self.parts.values()), -1))
        for i, part in enumerate(self.parts):
            if part in self.lora_a:
                low = F.linear(x.to(self.lora_a[part].dtype), self.lora_a[part])  # [..., r]
                y[i] = y[i] + (self.scales[part] * F.linear(low, self.lora_b[part])).to(y[i].dtype)
        return y[0] if len(y) == 1 else torch.cat(y, -1)


def modules(model: Transformer) -> dict[str, Linear]:
    """Every matrix that can be adapted, by its name in a checkpoint, and the layer that computes with it.

    Those that one layer merges, such as q, k and v, have a name each.
    """
    found: dict[str, Linear] = {}
    for name, layer in linears(model):
        found |= {prefix_of(name) + part: layer for part in layer.parts}
    return found


def adapted(model: Transformer, config: LoraConfig, seed: int = 0) -> Transformer:
    """Give a model a new adapter, in place: A is drawn as PEFT draws it, B is 0. All else is frozen. -> the model

    Raises ValueError where there is an adapter already, or the config's targets name nothing.
    """
    draw, pairs = torch.Generator().manual_seed(seed), {}
    layers = modules(model)
    for name in config.targets(layers):
        layer, rank, part = layers[name], config.rank(name), name.rpartition(".")[2]
        a = torch.empty(rank, layer.in_features)
        bound = 1 / math.sqrt(layer.in_features)  # Kaiming's for a uniform draw and a slope of sqrt(5)
        pairs[name] = Pair(a.uniform_(-bound, bound, generator=draw), torch.zeros(layer.parts[part], rank),
                           config.scale(name))  # fmt: skip
    if not pairs:
        raise ValueError(f"target_modules: expected names of this model, got {config.target_modules!r}; it has"
                         f" {', '.join(sorted({name.rpartition('.')[2] for name in layers}))}")  # fmt: skip
    model.requires_grad_(False)
    return attach(model, Adapter(config, pairs))


def attach(model: Transformer, adapter: Adapter) -> Transformer:
    """Have a model compute with an adapter, in place; its own weights stay as they are. -> the model

    Raises ValueError where there is one already, or for pairs that do not fit the model, before anything is changed.
    """
    check(model, adapter)
    for name, layer in linears(model):
        prefix = prefix_of(name)
        pairs = {part: adapter.pairs[prefix + part] for part in layer.parts if prefix + part in adapter.pairs}
        if pairs:
            replace(model, name, LoraLinear(layer, pairs).to(model.device))
    return model


def check(model: Transformer, adapter: Adapter) -> None:
    """Raise ValueError unless every pair fits a matrix of the model, which has no adapter yet."""
    layers = modules(model)
    if any(isinstance(layer, LoraLinear) for layer in layers.values()):
        raise ValueError("model: expected one without an adapter; detach or merge the one that it has")
    for name, pair in adapter.pairs.items():
        if name not in layers:
            raise ValueError(f"{name}: this model has no such matrix")
        rows = layers[name].parts[name.rpartition(".")[2]]
        for kind, tensor, shape in (
            ("lora_A", pair.a, (pair.a.shape[0], layers[name].in_features)),
            ("lora_B", pair.b, (rows, pair.a.shape[0])),
        ):
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name}.{kind}: expected shape {list(shape)}, got {list(tensor.shape)}; is the adapter of another"
                    " model?"
                )


def adapter_of(model: Transformer, config: LoraConfig | None = None) -> Adapter:
    """What a model's layers have been given and learnt since. `config`: what it was made by, for whoever stores it."""
    pairs: dict[str, Pair] = {}
    for name, layer in linears(model):
        if isinstance(layer, LoraLinear):
            prefix = prefix_of(name)
            pairs |= {prefix + part: pair for part, pair in layer.pairs().items()}
    if not pairs:
        raise ValueError("model: expected one with an adapter, got one without")
    return Adapter(config or described(pairs), pairs)


def described(pairs: Mapping[str, Pair]) -> LoraConfig:
    """A config that gives these pairs their ranks and scales, module by module where they differ."""
    ranks = {name: pair.a.shape[0] for name, pair in pairs.items()}
    alphas = {name: pair.scale * ranks[name] for name, pair in pairs.items()}
    rank = max(set(ranks.values()), key=[*ranks.values()].count)
    alpha = max(set(alphas.values()), key=[*alphas.values()].count)
    return LoraConfig(
        rank, alpha, tuple(sorted(pairs)),
        rank_pattern={re.escape(name): r for name, r in ranks.items() if r != rank},
        alpha_pattern={re.escape(name): a for name, a in alphas.items() if a != alpha},
    )  # fmt: skip


def detach(model: Transformer) -> Adapter:
    """Take the adapter out again, in place. -> it"""
    adapter = adapter_of(model)
    for name, layer in linears(model):
        if isinstance(layer, LoraLinear):
            replace(model, name, layer.base)
    return adapter


@torch.no_grad()
def merge(model: Transformer) -> Adapter:
    """Add the adapter into the weights, in place, after which it costs nothing. -> the adapter, for `unmerge`

    A weight in few bits is read back, added to and rounded anew where it changes, by the same scheme: of a small change
    little may be left. Raises ValueError for other layers, before anything is changed.
    """
    adapter = detach(model)
    _add(model, adapter, 1.0)
    return adapter


@torch.no_grad()
def unmerge(model: Transformer, adapter: Adapter) -> None:
    """Take a merged adapter out of the weights, in place: exactly, but for the rounding of a sum in their dtype.

    Raises ValueError for weights in few bits, which do not remember what they were.
    """
    few = [name for name, layer in modules(model).items() if name in adapter.pairs and isinstance(layer, QuantLinear)]
    if few:
        raise ValueError(f"{few[0]}: expected a weight in 16 or 32 bits; one in few bits cannot be unmerged")
    check(model, adapter)
    _add(model, adapter, -1.0)


def _add(model: Transformer, adapter: Adapter, sign: float) -> None:
    layers, few = modules(model), {}
    for name in adapter.pairs:
        if not isinstance(layers[name], Dense | QuantLinear):
            kind = type(layers[name]).__name__
            raise ValueError(f"{name}: expected a layer of plain weights or of few bits, got {kind}")
    for name, pair in adapter.pairs.items():
        layer, part = layers[name], name.rpartition(".")[2]
        before = list(layer.parts)[: list(layer.parts).index(part)]
        first = sum(layer.parts[p] for p in before)
        rows, change = slice(first, first + layer.parts[part]), sign * pair.delta()
        if isinstance(layer, Dense):
            layer.weight[rows] = (layer.weight[rows].float() + change.to(layer.weight.device)).to(layer.weight.dtype)
        elif isinstance(layer, QuantLinear):
            if layer not in few:
                few[layer] = torch.zeros(sum(layer.parts.values()), layer.in_features, device=layer.weight.device)
            few[layer][rows] += change.to(layer.weight.device)
    for layer, change in few.items():
        _add_to_few_bits(layer, change)
    model.revision += 1


def _add_to_few_bits(layer: QuantLinear, change: Tensor) -> None:
    """Rows that change [N, K] are rounded anew, on grids of their own; the others stay what they are."""
    old, scheme = layer.quantized(), layer.format.scheme
    w = old.dequantize(torch.float32) + (change if layer.order is None else change[:, layer.order])
    new = QuantizedTensor.round(w, minmax_grid(w, scheme, layer.format.scale_dtype), scheme)
    if scheme.strategy != "tensor":
        same = ~change.any(1)
        pairs = [(new.q, old.q), (new.grid.scale, old.grid.scale)]
        if new.grid.zero is not None and old.grid.zero is not None:
            pairs.append((new.grid.zero, old.grid.zero))
        for made, was in pairs:
            made[same] = was[same].to(made.dtype)
    layer.set(new, layer.bias, w.device, layer.order)


def prefix_of(name: str) -> str:
    """What a checkpoint puts before the names of a layer's parts."""
    parent = name.rpartition(".")[0]
    return f"model.{parent}." if parent else ""


def linears(model: Transformer) -> Iterator[tuple[str, Linear]]:
    """Layers by name; one that wraps another stands for it."""
    inside: set[int] = set()
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear) and id(module) not in inside:
            inside |= {id(m) for m in module.modules()}
            yield name, module


def replace(model: Transformer, name: str, layer: Linear) -> None:
    """Put another layer in the place of the one called so."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)
    model.revision += 1
