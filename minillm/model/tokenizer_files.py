"""What a Hugging Face directory says about its tokenizer, in up to six files that overlap.

`tokenizer.json` holds the tokenizer itself. `tokenizer_config.json` names special tokens and may hold a chat template
and further tokens (`added_tokens_decoder`); older directories spread these over `special_tokens_map.json` and
`added_tokens.json`. They are united as transformers does: the same token gets the same id.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["TokenizerFiles", "read_tokenizer_files"]

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass
class TokenizerFiles:
    """spec: the content of `tokenizer.json`, with the tokens of the other files added. named_tokens: {"eos_token":
    "<|end|>", ...}, those that are set. config: `tokenizer_config.json`. source: the file to name in errors.
    """

    spec: dict[str, Any]
    named_tokens: dict[str, str]
    chat_template: str | dict[str, str] | None
    config: dict[str, Any]
    source: Path


def read_tokenizer_files(directory: str | os.PathLike) -> TokenizerFiles:
    """Read what there is. Raises FileNotFoundError without a tokenizer.json, ValueError that names a damaged file."""
    folder = Path(directory)
    source = folder / "tokenizer.json"
    if not source.is_file():
        raise FileNotFoundError(f"{source}: not found; expected a Hugging Face model directory with this file")
    spec, config = _read_json(source), _read_json(folder / "tokenizer_config.json")
    tokens = spec.get("added_tokens") or []
    if not isinstance(tokens, list) or not all(
        isinstance(t, dict) and isinstance(t.get("content"), str) for t in tokens
    ):
        raise ValueError(f"{source}: added_tokens: expected a list of tokens")
    legacy = {} if "added_tokens_decoder" in config else _read_json(folder / "special_tokens_map.json")
    named, extra = _special(folder, {"pad_token": _dict(spec.get("padding")).get("pad_token")} | config | legacy)
    names = {name: token["content"] for name, token in named.items()}
    special = {*names.values(), *(token["content"] for token in extra)}
    added = _listed(folder, config, {token.get("id") for token in tokens}, special)
    united = _unite(source, spec, added, [*named.values(), *extra], {*names.values()})
    return TokenizerFiles(united, names, _chat_template(folder, config), config, source)


def _special(folder: Path, settings: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Special tokens that have a name (also names of the model's own: image_token), and the others."""
    named = {name: settings.get(name) for name in NAMED}
    others = {name: value for name, value in settings.items() if name.endswith("_token") and name not in NAMED}
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    if isinstance(extra, dict):  # each has a name
        others, extra = others | extra, []
    if not isinstance(extra, list):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: extra_special_tokens: expected a list, got {extra!r}")
    named |= {name: value for name, value in others.items() if isinstance(value, str) or "content" in _dict(value)}
    found = {name: token for name, value in named.items() if (token := _token(folder, name, value))}
    return found, [token for value in extra if (token := _token(folder, "extra_special_tokens", value))]


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _token(folder: Path, name: str, value: Any) -> dict[str, Any] | None:
    """A token and its flags, from "<s>" or from {"content": "<s>", "lstrip": false, ...}; None without one."""
    if value is None or value == "":
        return None
    token = {"content": value} if isinstance(value, str) else _dict(value)
    if not isinstance(token.get("content"), str):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: {name}: expected a token, got {value!r}")
    return {"content": token["content"], **{flag: bool(token[flag]) for flag in FLAGS if flag in token}}


def _listed(folder: Path, config: dict[str, Any], known: set[int], special: set[str]) -> list[dict[str, Any]]:
    """The tokens that tokenizer_config.json lists, or added_tokens.json, in the order of the ids given there."""
    if "added_tokens_decoder" in config:
        listed = config["added_tokens_decoder"]
        if not isinstance(listed, dict) or not all(text.isdecimal() for text in listed):
            raise ValueError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder: expected ids and their tokens")
        found = [_token(folder, f"added_tokens_decoder[{i}]", listed[i]) for i in sorted(listed, key=int)]
        return [token for token in found if token]
    ids = _read_json(folder / "added_tokens.json")
    if not all(isinstance(i, int) for i in ids.values()):
        raise ValueError(f"{folder / 'added_tokens.json'}: expected tokens and their ids")
    order = sorted((token for token in ids if ids[token] not in known), key=ids.__getitem__)
    return [{"content": token, "special": token in special, "normalized": token not in special} for token in order]


def _unite(source: Path, spec: dict[str, Any], listed: list, special: list, named: set[str]) -> dict[str, Any]:
    """`spec` with the tokens that it lacks. Their ids are those that `tokenizers` gives, whatever the files say: that
    of the model's vocabulary, or the next free one.
    """
    present = {token["content"]: token for token in spec.get("added_tokens") or []}
    new: dict[str, dict[str, Any]] = {}
    for token in listed:
        name = token["content"]
        if not _same(token, present.get(name)):
            special_before = {**present, **new}.get(name, {}).get("special")  # once special, always special
            new[name] = token | ({"special": True} if name in named or special_before else {})
    for token in special:
        if token["content"] not in present:
            new.setdefault(token["content"], token | {"special": True})
    if not new:
        return spec
    import tokenizers

    try:
        united = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as e:  # its own kind, and a bare Exception
        raise ValueError(f"{source}: not a tokenizer ({e}); fetch the model again") from e
    united.add_tokens([tokenizers.AddedToken(**token) for token in new.values()])
    return json.loads(united.to_str())


def _same(token: dict[str, Any], other: dict[str, Any] | None) -> bool:
    """Whether both are one token with the same flags. (Unless it is special, a token is normalized by default.)"""
    if other is None:
        return False
    full = [{"normalized": not t.get("special", False), **t} for t in (token, other)]
    return all(full[0].get(flag, False) == full[1].get(flag, False) for flag in FLAGS)


def _chat_template(folder: Path, config: dict[str, Any]) -> str | dict[str, str] | None:
    """Of files of its own, if there are any; else of tokenizer_config.json. One source, or several by name."""
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        sources = {name: _read_text(path) for name, path in files.items()}
        return sources["default"] if list(sources) == ["default"] else sources
    template = config.get("chat_template")
    try:
        several = {entry["name"]: entry["template"] for entry in template} if isinstance(template, list) else template
    except (TypeError, KeyError):
        several = {"": None}
    if several is None or isinstance(several, str):
        return several
    if not isinstance(several, dict) or not all(isinstance(source, str) for source in several.values()):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: chat_template: expected Jinja source, or several by name"
        )
    return several


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not UTF-8 ({e}); fetch the model again") from e


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path}: not valid JSON ({e}); the download may be cut off: fetch the model again") from e
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
