"""Files: where the cache is, a folder that appears whole or not at all, and what a Hugging Face directory holds.

Whatever is written gets the mode that the user's umask asks for, so that a cache can be shared.
"""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import ModelConfig

if TYPE_CHECKING:  # torch takes two seconds, and the doctor asks for the cache only
    from torch import Tensor

__all__ = [
    "BYTE_LEVEL",
    "atomic_directory",
    "byte_level_bpe",
    "cache_dir",
    "copy_tokenizer",
    "write_json",
    "write_model",
    "write_tensors",
]

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
DIGITS_THEN_GPT2 = {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]}  # as SmolLM2


def cache_dir() -> Path:
    """Where fetched models and tuned sizes live: $MINILLM_CACHE, or the platform's user cache folder.

    `~` is the home folder, also where no shell expands it. A relative path counts from the home folder too: from the
    current one it would be another cache in every folder, and everything would be fetched again.
    """
    if not (asked := os.environ.get("MINILLM_CACHE")):
        from platformdirs import user_cache_dir

        return Path(user_cache_dir("minillm"))
    return Path(os.path.expanduser("~"), os.path.expanduser(asked)).absolute()


@contextmanager
def atomic_directory(target: Path, keep: str | None = None) -> Iterator[Path]:
    """A new folder beside `target` that takes its place when the block ends well, and vanishes when it does not.

    What stood at `target` stays until then. `keep`: if by then `target` holds a file of this name, it is complete
    (another process was faster), and stays. Two that write the same target both succeed; the last one's folder is
    kept. Raises NotADirectoryError when `target` is a file.
    """
    target = Path(os.path.realpath(target))  # through a link: its place is taken, not the link's
    if target.is_file():
        raise NotADirectoryError(f"{target}: expected a directory or nothing, got a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = _beside(target)
    folder.mkdir()  # unlike `tempfile`'s, with the mode that the umask asks for
    try:
        yield folder
        _take_place(folder, target, keep)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _beside(target: Path) -> Path:
    return target.parent / f".{target.name}-{secrets.token_hex(4)}"


def _take_place(folder: Path, target: Path, keep: str | None) -> None:
    """Rename `folder` to `target`. What is there is moved aside first and removed last: several may do this at once."""
    for _ in range(100):
        if keep and (target / keep).is_file():
            return
        aside = _beside(target)
        with suppress(FileNotFoundError):
            target.rename(aside)
        try:
            folder.rename(target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else another was faster
                with suppress(OSError):  # give back what stood there
                    aside.rename(target)
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    raise OSError(f"{target}: other processes keep writing it; end them and repeat")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON beside the target and rename over it: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, "Tensor"]) -> None:
    """Write a safetensors file that has the mode of any other new file (the library's own is 0600)."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode & 0o777)


def write_model(folder: Path, config: ModelConfig, tensors: dict[str, "Tensor"]) -> None:
    """Write config.json, generation_config.json and model.safetensors. Tensors have Hugging Face's names."""
    floating = (t.dtype for t in tensors.values() if t.is_floating_point() and t.element_size() > 1)  # not fp8
    dtype = str(next(floating)).removeprefix("torch.")
    ends = config.to_dict()["eos_token_id"]
    write_json(folder / "config.json", {**config.to_dict(), "dtype": dtype})
    write_json(folder / "generation_config.json", {"bos_token_id": config.bos_token_id, "eos_token_id": ends})
    write_tensors(folder / "model.safetensors", tensors)


TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.jinja")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Take a model's tokenizer, chat template and sampling defaults along."""
    for pattern in (*TOKENIZER, "generation_config.json"):
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def byte_level_bpe(tokens: Sequence[str], merges: Sequence[list[str]], special: Sequence[int]) -> dict[str, Any]:
    """The content of a `tokenizer.json`: byte-level BPE that splits words as SmolLM2 does.

    tokens: in the order of their ids, spelled in GPT-2's byte characters. merges: pairs of tokens, the best first.
    special: the ids of the special tokens.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    options = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    options |= dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    vocab = {token: i for i, token in enumerate(tokens)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], **flags} for i in special],
        "normalizer": None,
        "pre_tokenizer": DIGITS_THEN_GPT2,
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", **options, "vocab": vocab, "merges": list(merges)},
    }
