"""From a name to a model in memory: where the files are, what must be in them, and how Hugging Face's names map to
ours.

Only safetensors are read. Pickled checkpoints (.bin, .pt, .pth) are refused: unpickling runs whatever code the file
contains.
"""

import difflib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import fetch
from ..config import ModelConfig
from ..files import atomic_directory, write_model
from .transformer import Transformer

__all__ = ["load", "load_state_dict", "model_path", "resolve_device", "resolve_dtype", "save"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Ours <- Hugging Face's: what reads one input is stored as one matrix, rows stacked in this order.
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def model_path(name: str | os.PathLike) -> Path:
    """The local Hugging Face directory behind `name`: a known name, a directory, or a Hugging Face id.

    A known name is fetched when it is not there yet; an id is downloaded by `huggingface_hub` into its own cache.
    Raises ValueError for a name that is none of these (with the nearest known names), FileNotFoundError for a
    directory without a model.
    """
    text = os.fspath(name)
    if text.lower() in fetch.KNOWN:
        return fetch.fetch(text.lower())
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.suffix in PICKLED:
        raise ValueError(
            f"name: {path.name} is a pickled checkpoint; reading it would run code stored in it."
            " Convert it to safetensors first"
        )
    if path.exists():
        raise ValueError(f"name: expected a directory, got the file {path}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not text.startswith((".", "/")):
        return _from_hub(text)
    near = difflib.get_close_matches(text.lower(), fetch.KNOWN, n=3, cutoff=0.4)
    raise ValueError(
        f"name: {text!r} is no known model, directory or Hugging Face id (owner/model);"
        f" {'did you mean ' + ' or '.join(near) + '?' if near else 'known: ' + ', '.join(fetch.KNOWN)}"
    )


def _from_hub(repo: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as e:
        known = ", ".join(fetch.KNOWN)
        raise ValueError(
            f"name: {repo!r} could not be downloaded from the Hugging Face Hub ({type(e).__name__}:"
            f" {str(e).splitlines()[0]}); check the id and the network, or use a local directory"
            f" or a known name ({known})"
        ) from e


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """ "auto": the GPU where there is one, else the CPU. Raises ValueError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as e:
        raise ValueError(f'device: expected "auto", "cpu" or "cuda", got {device!r}') from e
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected 'cpu' or 'auto', got 'cuda': torch sees no GPU on this machine")
    return resolved


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto": bf16 on a GPU, fp32 on a CPU; or a name of DTYPES, or a torch dtype."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    resolved = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if resolved not in DTYPES.values():
        raise ValueError(f'dtype: expected "auto", {", ".join(DTYPES)}, got {dtype!r}')
    return resolved


def load(name: str | os.PathLike, device: str = "auto", dtype: str = "auto") -> Transformer:
    """Read a model: a known name, a Hugging Face directory or id.

    Raises ValueError that names the tensor or file when one is corrupt, missing, surplus or of a wrong shape.
    """
    path = model_path(name)
    where = resolve_device(device)
    config = ModelConfig.from_pretrained(path)
    with torch.device("meta"), _NoInit():  # neither memory nor random numbers for what is about to be replaced
        model = Transformer(config)
    tensors = {key: tensor.to(where, resolve_dtype(dtype, where)) for key, tensor in _read(path).items()}
    load_state_dict(model, tensors, source=str(path))
    return model.to(where).eval().requires_grad_(False)


class _NoInit(TorchFunctionMode):
    """Parameters without values. (Drawing them on "meta" would import torch's compiler first: two seconds.)"""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def load_state_dict(model: Transformer, tensors: dict[str, Tensor], source: str = "state dict") -> None:
    """Put Hugging Face's tensors into `model`; they are used as they are, not copied. `source` is named in errors."""
    expected = _expected(model)
    if model.config.tie_word_embeddings:
        tensors = {
            k: v for k, v in tensors.items() if k != "lm_head.weight"
        }  # some checkpoints store the tied head twice
    tensors = {
        k: v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")
    }  # old checkpoints: follows from the config
    missing, surplus = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    for kind, names in (("lacks", missing), ("has the surplus", surplus)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(
                f"{source}: {kind} tensor {', '.join(names[:3])}{more}; does config.json belong to these weights?"
            )
    for key, shape in expected.items():
        if tensors[key].shape != shape:
            raise ValueError(
                f"{source}: {key} has shape {tuple(tensors[key].shape)}, expected {tuple(shape)} from config.json"
            )
    state = {
        ours: torch.cat([tensors[key] for key in keys]) if len(keys) > 1 else tensors[keys[0]]
        for ours, keys in _sources(model).items()
    }
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight  # one parameter again, not two that share memory


def save(model: Transformer, directory: str | os.PathLike) -> Path:
    """Write `model` as a Hugging Face directory (config.json, model.safetensors) that `load` and transformers read;
    atomically.
    """
    tensors = {}
    state = model.state_dict()
    for ours, keys in _sources(model).items():
        sizes = [_expected(model)[key][0] for key in keys]
        tensors.update(zip(keys, (part.contiguous() for part in state[ours].split(sizes)), strict=True))
    with atomic_directory(Path(directory)) as folder:
        write_model(folder, model.config, tensors)
    return Path(directory)


def _sources(model: Transformer) -> dict[str, list[str]]:
    """Our parameter name -> the Hugging Face tensors that are stacked into it."""
    names = [name for name in model.state_dict() if not (model.config.tie_word_embeddings and name == "lm_head.weight")]
    sources = {}
    for name in names:
        fused = next((ours for ours in FUSED if ours in name), None)
        parts = [name.replace(fused, part) for part in FUSED[fused]] if fused else [name]
        sources[name] = [part if part.startswith("lm_head") else f"model.{part}" for part in parts]
    return sources


def _expected(model: Transformer) -> dict[str, torch.Size]:
    """Hugging Face tensor name -> the shape that the config implies."""
    config = model.config
    rows = {
        "q_proj": config.q_size,
        "k_proj": config.kv_size,
        "v_proj": config.kv_size,
        "gate_proj": config.intermediate_size,
    }
    rows["up_proj"] = rows["gate_proj"]
    shapes, state = {}, model.state_dict()
    for ours, keys in _sources(model).items():
        for key in keys:
            part = key.split(".")[-2]
            shapes[key] = torch.Size([rows[part], state[ours].shape[1]]) if part in rows else state[ours].shape
    return shapes


def _read(path: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face directory, mapped from disk (one file, or several with an index)."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({path / file for file in _read_index(index).values()})
    else:
        files = [path / "model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(_read_file(file))
    return tensors


def _read_index(index: Path) -> dict[str, str]:
    try:
        return json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError) as e:
        raise ValueError(f"{index}: not a safetensors index ({e}); fetch the model again") from e


def _read_file(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        if pickled := sorted(p.name for p in file.parent.glob("*") if p.suffix in PICKLED):
            raise ValueError(
                f"{file.parent}: holds only the pickled checkpoint {pickled[0]}; reading it would run code stored in"
                " it. Convert it to safetensors first"
            )
        raise FileNotFoundError(f"{file}: not found; fetch the model again")
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, RuntimeError) as e:
        raise ValueError(f"{file}: corrupt or cut off ({e}); delete it and fetch the model again") from e
