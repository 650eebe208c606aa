"""From a name to a model in memory: where the files are, what must be in them, and how Hugging Face's names map to
ours.

Only safetensors are read. Pickled checkpoints (.bin, .pt, .pth) are refused: unpickling runs whatever code the file
contains.
"""

import dataclasses
import difflib
import os
import re
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import fetch
from ..config import ModelConfig
from ..files import atomic_directory, write_model
from ..kernels.common import SINCE
from .checkpoint import PICKLED, Checkpoint, weight_files
from .linear import Linear, LinearFactory, dense, floating
from .tokenizer import Tokenizer
from .transformer import Transformer

__all__ = ["load", "model_path", "resolve_device", "resolve_dtype", "save", "save_into"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# quant_method of a config.json's quantization_config -> what makes, from that, the factory of its layers
QUANTIZED: dict[str, Callable[[dict[str, Any]], LinearFactory]] = {}


def model_path(name: str | os.PathLike) -> Path:
    """The local Hugging Face directory behind `name`: a known name, a directory, a GGUF file, or a Hugging Face id.

    A known name is fetched when it is not there yet, a GGUF file is laid out anew in the cache; an id is downloaded by
    `huggingface_hub` into its own cache.
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
    if path.suffix == ".gguf" and path.is_file():
        return import_module("minillm.quant.gguf").opened(path)
    if path.exists():
        raise ValueError(f"name: expected a directory or a .gguf file, got the file {path}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not text.startswith((".", "/")):
        return _from_hub(text)
    near = difflib.get_close_matches(text.lower(), fetch.KNOWN, n=3, cutoff=0.4)
    raise ValueError(
        f"name: {text!r} is no known model, directory or Hugging Face id (owner/model);"
        f" {'did you mean ' + ' or '.join(near) + '?' if near else 'known: ' + ', '.join(fetch.KNOWN)}"
    )


def _from_hub(repo: str) -> Path:
    """Download what is small, look at it, and only then the weights: gigabytes of a model that we can use."""
    path = _download(repo, ["*.json", "*.jinja"])
    _factory(ModelConfig.from_pretrained(path), path)
    files = weight_files(path)
    if not all(file.is_file() for file in files):
        if (path / "tokenizer.json").is_file():
            Tokenizer.from_pretrained(path)
        path = _download(repo, [file.name for file in files])  # not what else lies there, such as consolidated copies
    if missing := [file.name for file in files if not (path / file.name).is_file()]:
        raise ValueError(f"name: {repo!r} has no {missing[0]} on the Hugging Face Hub; expected a model in safetensors")
    return path


def _download(repo: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
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
    """ "auto": fp32 on a CPU, bf16 on a GPU, fp16 on one too old for bf16; or a name of DTYPES, or a torch dtype.

    Raises ValueError for another one, and for bf16 on a GPU that does not have it.
    """
    has_bf16 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= SINCE[torch.bfloat16]
    if dtype == "auto" and device.type == "cuda":
        return torch.bfloat16 if has_bf16 else torch.float16
    if dtype == "auto":
        return torch.float32
    resolved = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in DTYPES.values():
        raise ValueError(f'dtype: expected "auto", {", ".join(DTYPES)}, got {dtype!r}')
    if resolved == torch.bfloat16 and not has_bf16:
        raise ValueError(
            'dtype: expected "auto", float16 or float32, as bfloat16 needs a GPU of compute capability 8.0 or later'
            f" (Ampere), got {torch.cuda.get_device_name(device)}"
        )
    return resolved


def load(
    name: str | os.PathLike, device: str = "auto", dtype: str = "auto", linear: LinearFactory | None = None
) -> Transformer:
    """Read a model: a known name, a Hugging Face directory or id, a GGUF file. `linear` makes its layers; by default
    they are what the checkpoint needs.

    What need not be merged or converted stays mapped from the file. Raises ValueError that names the tensor or file
    when one is corrupt, missing, surplus, of a wrong shape, or quantized in a way that is not supported.
    """
    path = model_path(name)
    where = resolve_device(device)
    number = resolve_dtype(dtype, where)
    config = ModelConfig.from_pretrained(path)
    linear = linear or _factory(config, path)
    checkpoint = Checkpoint(path)
    with torch.device("meta"), _NoInit():  # neither memory nor random numbers for what is about to be replaced
        try:
            model = Transformer(_tied(config, checkpoint), linear)
        except ValueError as e:  # of a layer that cannot be made as the checkpoint says
            raise ValueError(f"{path}: quantization_config: {e}") from e
    _check(model, checkpoint)
    for prefix, module in _modules(model):
        _fill(module, prefix, checkpoint, config.tie_word_embeddings, where, number)
    if model.tied:
        model.lm_head.tie(model.embed_tokens)
    return model.to(where).eval().requires_grad_(False)


def _factory(config: ModelConfig, path: Path) -> LinearFactory:
    """What makes the layers of this checkpoint. Raises ValueError for one that is quantized in an unknown way."""
    about = config.quantization_config
    if about is None:
        return dense
    import_module("minillm.quant")  # which builds on this package, and says there what it can read
    method = about.get("quant_method") if isinstance(about, dict) else about
    if not isinstance(method, str) or method not in QUANTIZED:
        raise ValueError(
            f"{path}: quantization_config: a checkpoint quantized by {method!r} is not supported"
            f" ({'expected one of ' + ', '.join(QUANTIZED) if QUANTIZED else 'no method is'}); use the unquantized one"
        )
    try:
        return QUANTIZED[method](about)
    except ValueError as e:
        raise ValueError(f"{path}: quantization_config: {e}") from e


def _tied(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """The config, untied where the file has another head after all: transformers 5 then takes both, too."""
    if not (config.tie_word_embeddings and EMBEDDING in checkpoint and HEAD in checkpoint):
        return config
    a, b = checkpoint.read((EMBEDDING, HEAD)).values()
    if a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b):
        return config
    warnings.warn(
        f"{checkpoint.directory}: tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}; both are used",
        stacklevel=3,
    )
    return dataclasses.replace(config, tie_word_embeddings=False)


class _NoInit(TorchFunctionMode):
    """Parameters without values. (Drawing them on "meta" would import torch's compiler first: two seconds.)"""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def _modules(model: Transformer) -> Iterator[tuple[str, nn.Module]]:
    """Whatever has weights, a `Linear` as one, and what a checkpoint puts before the names of its tensors."""

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if isinstance(module, Linear):
            parent = name.rpartition(".")[0]
            if not (module is model.lm_head and model.tied):
                yield f"model.{parent}." if parent else "", module
        else:
            if module._parameters:
                yield f"model.{name}.", module
            for child, inner in module.named_children():
                yield from walk(f"{name}.{child}" if name else child, inner)

    return walk("", model)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    """The tensors that a module wants."""
    if isinstance(module, Linear):
        return module.wanted()
    return {name: parameter.shape for name, parameter in module.named_parameters(recurse=False)}


def _stored(name: str, checkpoint: Checkpoint, tied: bool) -> str:
    """The name under which a tensor stands: a tied model may lack its head, or have it for its embedding."""
    other = {EMBEDDING: HEAD, HEAD: EMBEDDING}.get(name, "") if tied else ""
    return other if name not in checkpoint and other in checkpoint else name


def _fill(
    module: nn.Module, prefix: str, checkpoint: Checkpoint, tied: bool, device: torch.device, dtype: torch.dtype
) -> None:
    """Give a module its tensors, under its own names for them."""
    names = {name: _stored(prefix + name, checkpoint, tied) for name in _shapes(module)}
    found = checkpoint.read(names.values())
    tensors = {name: found[stored] for name, stored in names.items()}
    del found
    try:
        if isinstance(module, Linear):
            module.load(tensors, device, dtype)
            return
        for name, tensor in tensors.items():
            setattr(module, name, nn.Parameter(floating(name, tensor).to(device, dtype), requires_grad=False))
    except ValueError as e:
        raise ValueError(f"{checkpoint.directory}: {prefix}{e}") from e


def _check(model: Transformer, checkpoint: Checkpoint) -> None:
    """Hold names and shapes against what the model wants, before anything is read."""
    tied = model.config.tie_word_embeddings
    wanted = {prefix + name: shape for prefix, module in _modules(model) for name, shape in _shapes(module).items()}
    expected = {_stored(name, checkpoint, tied): shape for name, shape in wanted.items()}
    known = {EMBEDDING, HEAD} if tied else set()
    stored = checkpoint.entries.keys()
    missing, surplus = sorted(expected.keys() - stored), sorted(stored - expected.keys() - known)
    for kind, names in (("lacks", missing), ("has the surplus", surplus)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            why = _why(missing, surplus, checkpoint)
            raise ValueError(f"{checkpoint.directory}: {kind} tensor {', '.join(names[:3])}{more}; {why}")
    for name, shape in expected.items():
        if checkpoint.shape(name) != shape:
            raise ValueError(
                f"{checkpoint.directory}: {name} has shape {tuple(checkpoint.shape(name))}, expected {tuple(shape)}"
                " from config.json"
            )


SCALES = ("scale", "scales", "scale_inv", "zeros", "qweight", "qzeros", "g_idx", "zero_point", "packed", "absmax")


def _why(missing: list[str], surplus: list[str], checkpoint: Checkpoint) -> str:
    """What is probably the matter when names differ."""
    if any(name.endswith(SCALES) or not checkpoint.is_floating(name) for name in surplus):
        return "these weights are quantized, which is not supported here; use the unquantized checkpoint"
    if all(name.endswith(".bias") for name in missing + surplus):
        fields = {"attention_bias" if ".self_attn." in name else "mlp_bias" for name in missing + surplus}
        return f"are {' and '.join(sorted(fields))} in config.json those of these weights?"
    return "does config.json belong to these weights?"


def save(model: Transformer, directory: str | os.PathLike) -> Path:
    """Write `model` as a Hugging Face directory (config.json, model.safetensors) that `load` and transformers read;
    atomically.
    """
    with atomic_directory(Path(directory)) as folder:
        save_into(folder, model)
    return Path(directory)


def save_into(folder: Path, model: Transformer) -> None:
    """Write the files of `save` into a folder that is there.

    Raises ValueError for a model whose layers are stored in several ways, which a config.json has no words for.
    """
    tensors: dict[str, Tensor] = {}
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear)]
    stored = [module.quantization_config for _, module in linears if module.quantization_config is not None]
    if any(about != stored[0] for about in stored):
        raise ValueError("model: expected layers that are all quantized alike, to be written to one checkpoint")
    about = None
    if stored:
        plain = [(name, module) for name, module in linears if module.quantization_config is None]
        about = {**stored[0], "ignore": [part for name, module in plain for part in _part_names(name, module)]}
    config = dataclasses.replace(model.config, quantization_config=about)
    for prefix, module in _modules(model):
        own = module.tensors() if isinstance(module, Linear) else dict(module.named_parameters(recurse=False))
        tensors.update({prefix + name: tensor.detach().contiguous() for name, tensor in own.items()})
    write_model(folder, config, tensors)


def _part_names(name: str, linear: Linear) -> list[str]:
    """What a checkpoint calls the parts of a layer: "layers.0.mlp.gate_up_proj" has two."""
    parent = name.rpartition(".")[0]
    return [f"model.{parent}.{part}" if parent else part for part in linear.parts]
