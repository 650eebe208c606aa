"""Adapters on disk, as Hugging Face's PEFT writes and reads them.

    folder/adapter_config.json            what was adapted and how: peft_type, r, lora_alpha, target_modules, ...
    folder/adapter_model.safetensors      base_model.model.<module>.lora_A.weight [r, in], .lora_B.weight [out, r]

PEFT fills a model with `strict=False`: a tensor that is missing or that nothing takes passes in silence. Here every
tensor is used, every A has its B, and every module that the config names its pair. What an adapter asks for that is not
built here is refused by its name and value, an unknown key too, unless it is null, false or empty: it would compute
something else than its author trained.

Source: PEFT 0.21, `utils/save_and_load.py` and `tuners/lora/config.py`.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import atomic_directory, write_json, write_tensors
from ..model import Transformer
from ..model.checkpoint import read_file
from ..model.linear import floating
from .lora import Adapter, LoraConfig, Pair, check, modules

__all__ = ["load", "save"]

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX, A, B, BASE = "base_model.model.", ".lora_A.weight", ".lora_B.weight", ".base_layer.weight"
READ = {
    "peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora",
    "layers_to_transform", "layers_pattern",
}  # fmt: skip
# What training alone needs, what says who made it, and drafts of these that PEFT takes out again.
IGNORED = {
    "task_type", "auto_mapping", "revision", "base_model_name_or_path", "inference_mode", "lora_dropout",
    "peft_version", "loftq_config", "eva_config", "megatron_core", "runtime_config", "qalora_group_size",
}  # fmt: skip
# Values that mean a plain LoRA, beside null, false and empty ones.
PLAIN: Mapping[str, tuple] = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal", "eva")}
WHY = {
    "bias": "biases are trained, too", "use_dora": "DoRA has a magnitude for each row, too",
    "modules_to_save": "whole modules are replaced", "trainable_token_indices": "rows of the embedding are replaced",
    "init_lora_weights": "it changed the base model's weights, too; convert it in PEFT"
    " (path_initial_model_for_weight_conversion)",
    "fan_in_fan_out": "its matrices are transposed",
}  # fmt: skip


def save(adapter: Adapter, folder: str | os.PathLike, base_model: str | None = None) -> Path:
    """Write an adapter, so that PEFT loads it. -> the folder, which appears whole or not at all

    base_model: the name or path of the model, for whoever loads the adapter.
    """
    config, names = adapter.config, sorted(adapter.pairs)
    tensors = {}
    for name in names:
        pair = adapter.pairs[name]
        tensors[PREFIX + name + A] = pair.a.detach().cpu().contiguous()
        tensors[PREFIX + name + B] = pair.b.detach().cpu().contiguous()
    content = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "inference_mode": True,
        "r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "target_modules": _plain(config.target_modules), "exclude_modules": _plain(config.exclude_modules) or None,
        "rank_pattern": dict(config.rank_pattern), "alpha_pattern": dict(config.alpha_pattern),
        "use_rslora": config.use_rslora, "layers_pattern": _plain(config.layers_pattern) or None,
        "layers_to_transform": config.layers_to_transform and list(config.layers_to_transform),
        "init_lora_weights": True, "modules_to_save": None,
    }  # fmt: skip
    target = Path(folder).expanduser()
    with atomic_directory(target) as new:
        write_json(new / CONFIG, content)
        write_tensors(new / TENSORS, tensors)
    return target


def load(folder: str | os.PathLike, model: Transformer | None = None) -> Adapter:
    """Read an adapter. `model`: which it is for; names and shapes are then held against it.

    Raises FileNotFoundError for a folder without one, ValueError that names the key or tensor for what does not fit or
    is not supported.
    """
    path = Path(folder).expanduser()
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(f"{path}: expected an adapter in PEFT's format, found no {CONFIG}")
    config = _config(path)
    if not (path / TENSORS).is_file():
        if (path / PICKLED).is_file():
            raise ValueError(
                f"{path / PICKLED}: a pickle, whose reading would run code stored in it; save the adapter with"
                " safe_serialization=True"
            )
        raise FileNotFoundError(f"{path}: expected {TENSORS}")
    tensors = read_file(path / TENSORS)
    _same_bases(path / TENSORS, tensors, model)
    pairs = _pairs(path / TENSORS, tensors, config)
    if model is not None:
        _fits(path, config, pairs, model)
    return Adapter(config, pairs)


def _config(path: Path) -> LoraConfig:
    try:
        content = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ValueError(f"{path / CONFIG}: expected JSON ({e})") from e
    if not isinstance(content, dict):
        raise ValueError(f"{path / CONFIG}: expected an object, got {type(content).__name__}")
    kind = content.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{path / CONFIG}: peft_type: expected 'LORA', got {kind!r}, which is not supported")
    for key, value in content.items():
        if key in READ | IGNORED or value is None or value is False or value in ("", [], {}):
            continue
        if not any(value is plain or (value == plain and isinstance(value, str)) for plain in PLAIN.get(key, ())):
            why = f": {WHY[key]}" if key in WHY else ""
            raise ValueError(f"{path / CONFIG}: {key} = {json.dumps(value)} is not supported{why}")
    try:
        return LoraConfig(
            r=content.get("r", 8), lora_alpha=content.get("lora_alpha", 8),
            target_modules=_names(content, "target_modules"), exclude_modules=_names(content, "exclude_modules"),
            rank_pattern=_mapping(content, "rank_pattern"), alpha_pattern=_mapping(content, "alpha_pattern"),
            use_rslora=bool(content.get("use_rslora")), layers_to_transform=_layers(content),
            layers_pattern=_listed(_names(content, "layers_pattern")),
        )  # fmt: skip
    except ValueError as e:
        raise ValueError(f"{path / CONFIG}: {e}") from e


def _names(content: Mapping[str, Any], key: str) -> str | tuple[str, ...]:
    value = content.get(key) or ()
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{key}: expected a text or a list of texts, got {value!r}")
    return tuple(value)


def _listed(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def _mapping(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{key}: expected an object, got {value!r}")
    return value


def _layers(content: Mapping[str, Any]) -> tuple[int, ...] | None:
    value = content.get("layers_to_transform")
    found = [value] if isinstance(value, int) else value
    if found is None or found == []:
        return None
    if not isinstance(found, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in found):
        raise ValueError(f"layers_to_transform: expected a number or a list of numbers, got {value!r}")
    return tuple(found)


def _plain(value: str | tuple[str, ...]) -> str | list[str]:
    return value if isinstance(value, str) else list(value)


def _same_bases(file: Path, tensors: dict[str, Tensor], model: Transformer | None) -> None:
    """Take out the weights of the base that PEFT puts beside an adapted head: they must be the model's own."""
    for key in [key for key in tensors if key.startswith(PREFIX) and key.endswith(BASE)]:
        name, stored = key.removeprefix(PREFIX).removesuffix(BASE), tensors.pop(key)
        layer = None if model is None else modules(model).get(name)
        weight = None if layer is None else layer.tensors().get(f"{name.rpartition('.')[2]}.weight")
        if weight is None or weight.shape != stored.shape or not torch.equal(weight.cpu(), stored.to(weight.dtype)):
            raise ValueError(
                f"{file}: {key}: expected the model's own weight, to compare with `model`; another one, as of a larger"
                " vocabulary, is not supported"
            )


def _pairs(file: Path, tensors: dict[str, Tensor], config: LoraConfig) -> dict[str, Pair]:
    halves: dict[str, dict[str, Tensor]] = {A: {}, B: {}}
    for key, tensor in tensors.items():
        suffix = next((s for s in (A, B) if key.endswith(s)), None)
        if suffix is None or not key.startswith(PREFIX):
            raise ValueError(
                f"{file}: {key}: expected names such as {PREFIX}model.layers.0.self_attn.q_proj{A}; what this one holds"
                " would be left out"
            )
        if not bool(floating(key, tensor).isfinite().all()):
            raise ValueError(f"{file}: {key}: expected finite numbers, got NaN or infinity")
        halves[suffix][key.removeprefix(PREFIX).removesuffix(suffix)] = tensor
    for has, lacks in ((A, B), (B, A)):
        if alone := sorted(halves[has].keys() - halves[lacks].keys()):
            raise ValueError(f"{file}: {PREFIX}{alone[0]}{has} has no {lacks[1:7]} beside it")
    if not halves[A]:
        raise ValueError(f"{file}: expected tensors, got none")
    pairs = {}
    for name, a in halves[A].items():
        b, rank = halves[B][name], config.rank(name)
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise ValueError(
                f"{file}: {name}: expected lora_A [{rank}, in] and lora_B [out, {rank}] by {CONFIG}, got"
                f" {list(a.shape)} and {list(b.shape)}"
            )
        if name not in config.targets([name]):
            raise ValueError(f"{file}: {name}: {CONFIG} does not name it in target_modules")
        pairs[name] = Pair(_native(a), _native(b), config.scale(name))
    return pairs


def _native(x: Tensor) -> Tensor:
    """A tensor of its own: the file may go."""
    return x.clone() if x.dtype != torch.float64 else x.float()


def _fits(path: Path, config: LoraConfig, pairs: Mapping[str, Pair], model: Transformer) -> None:
    layers = modules(model)
    try:
        check(model, Adapter(config, pairs))
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    if missing := sorted(set(config.targets(layers)) - pairs.keys()):
        raise ValueError(f"{path}: {missing[0]}: {CONFIG} names it, but {TENSORS} has no tensors for it")
