"""Tokenizers of other families (SentencePiece's, WordPiece, Unigram), served by Hugging Face's `tokenizers`.

`load_tokenizer` gives ours for byte-level BPE, which is the one to read, and else this face of the library. Both have
the same methods, so that nobody else needs to know which one it is.
"""

import json
import os
import re
from collections.abc import Iterable
from operator import index
from typing import Any

from ..extras import require
from .chat import ChatFormat
from .tokenizer import CHAR_TO_BYTE, NotByteLevel, Tokenizer, _text
from .tokenizer_files import TokenizerFiles, read_tokenizer_files

__all__ = ["HuggingFaceDecoder", "HuggingFaceTokenizer", "load_tokenizer"]

# transformers' `clean_up_tokenization`, for tokenizers that spell every sign as a word of its own.
CLEANING = [(" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m")]
CLEANING += [(" 's", "'s"), (" 've", "'ve"), (" 're", "'re")]
CLEANED = 12  # characters at the end of a text that cleaning may still change


def load_tokenizer(directory: str | os.PathLike) -> "Tokenizer | HuggingFaceTokenizer":
    """The tokenizer of a Hugging Face directory: ours where it reads `tokenizer.json` exactly, else the library's.

    Raises FileNotFoundError without a tokenizer.json, ValueError that names the file for one that neither can read.
    """
    files = read_tokenizer_files(directory)
    try:
        return Tokenizer.from_files(files)
    except NotByteLevel:
        _expect_byte_tokens(files)
        return HuggingFaceTokenizer(files)


def _expect_byte_tokens(files: TokenizerFiles) -> None:
    """A tokenizer that spells every byte as a character has nothing to fall back to: its file contradicts itself."""
    model = files.spec.get("model") or {}
    claims = model.get("byte_fallback") and "ByteLevel" in str(files.spec.get("pre_tokenizer"))
    if claims and "<0x00>" not in model.get("vocab", {}):
        raise ValueError(
            f"{files.source}: model.byte_fallback is on, and the vocabulary has no byte tokens (<0x00>, ...) to fall"
            " back to: expected it to be off, as in byte-level BPE; mend the file or fetch it again"
        )


def _backend(files: TokenizerFiles) -> tuple[Any, dict[str, str], bool]:
    """The library's tokenizer, its special tokens by name, and whether its text is cleaned up.

    transformers is asked first: for some families (Llama 2) it does not take all that `tokenizer.json` says. It runs
    no code that came with the model. What it does not know, the library may read all the same.
    """
    require("transformers", "transformers")
    import tokenizers
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(files.source.parent, local_files_only=True, trust_remote_code=False)
        return theirs.backend_tokenizer, dict(theirs.special_tokens_map), bool(theirs.clean_up_tokenization_spaces)
    except Exception:  # an unknown class, another configuration's field, ...: not yet the last word
        clean = bool(files.config.get("clean_up_tokenization_spaces"))
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(files.spec)), files.named_tokens, clean
    except Exception as e:  # the library raises a bare Exception
        raise ValueError(f"{files.source}: not a tokenizer that `tokenizers` can read ({e})") from e


class HuggingFaceTokenizer(ChatFormat):
    """A `tokenizers.Tokenizer` behind the face of `Tokenizer`: same methods, and transformers' results."""

    def __init__(self, files: TokenizerFiles) -> None:
        self._inner, self.named_tokens, clean = _backend(files)
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = bool(files.config.get("split_special_tokens"))
        self.chat_template = files.chat_template
        added = self._inner.get_added_tokens_decoder()
        self.special_tokens: dict[str, int] = {token.content: i for i, token in sorted(added.items())}
        self._hidden = {i for i, token in added.items() if token.special}
        self.bos_token, self.eos_token = self.named_tokens.get("bos_token"), self.named_tokens.get("eos_token")
        self.bos_token_id = None if self.bos_token is None else self._inner.token_to_id(self.bos_token)
        self.eos_token_id = None if self.eos_token is None else self._inner.token_to_id(self.eos_token)
        self._size = max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        steps = str(json.loads(self._inner.to_str())["decoder"])
        self.byte_fallback, self._byte_level = "'ByteFallback'" in steps, "'ByteLevel'" in steps
        self.cleans_up = clean and type(self._inner.model).__name__ != "BPE"

    @property
    def vocab_size(self) -> int:
        """The highest id and one: ids are below it, though some may be nobody's."""
        return self._size

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of `text`, with what `tokenizer.json` puts in front and behind unless that is turned off."""
        return self._inner.encode(_text(text), add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`. An id of `vocab_size` or more has none; a negative one raises ValueError."""
        text = self.decode_raw([self.check_id(i) for i in ids], skip_special_tokens)
        return clean_up(text) if self.cleans_up else text

    def decode_raw(self, ids: list[int], skip_special_tokens: bool) -> str:
        """The library's text of checked ids."""
        return self._inner.decode(ids, skip_special_tokens=skip_special_tokens)

    def stream_decoder(self, skip_special_tokens: bool = False) -> "HuggingFaceDecoder":
        """What turns tokens that arrive one by one into text."""
        return HuggingFaceDecoder(self, skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text which has begun; they may end inside a character. (The first token of
        a text may lack its leading space.) Raises ValueError for an id that no token has.
        """
        token = self._inner.id_to_token(self.check_id(token_id))
        if token is None:
            raise ValueError(f"token_id: expected an id that a token has, got {token_id}; another tokenizer's?")
        if self.is_byte(token_id):
            return bytes([int(token[3:5], 16)])
        if token in self.special_tokens:
            return token.encode()
        if self._byte_level and CHAR_TO_BYTE.keys() >= set(token):
            return bytes(CHAR_TO_BYTE[character] for character in token)
        once = self.decode_raw([token_id], False)
        return self.decode_raw([token_id, token_id], False)[len(once) :].encode()

    def has_text(self, token_id: int, skip_special_tokens: bool) -> bool:
        """Whether `decode` looks at the token: not at a special one that it skips, nor at nobody's id."""
        return not (skip_special_tokens and token_id in self._hidden) and self._inner.id_to_token(token_id) is not None

    def is_byte(self, token_id: int) -> bool:
        """Whether the token stands for one byte of a character that the vocabulary lacks: <0xE2>."""
        token = self._inner.id_to_token(token_id)
        return self.byte_fallback and token is not None and re.fullmatch(r"<0x[0-9A-F]{2}>", token) is not None

    def check_id(self, token_id: Any) -> int:
        """The id as an int. Raises ValueError for a negative one."""
        i = index(token_id)
        if not 0 <= i < 2**32:
            raise ValueError(f"token_id: expected an id in 0..{self._size - 1}, got {i}; another tokenizer's?")
        return i


class HuggingFaceDecoder:
    """Text for tokens that arrive one by one, never half a character; joined, it is `decode` of all ids.

    What a token adds depends on what is in front of it: the first one loses its space, bytes belong together. So a
    few tokens are decoded again, `_window`, whose first `_known` ones gave `_shown` already. Bytes wait until their run
    ends, as the library decides then whether the run is text.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer, skip_special_tokens: bool = False) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids: list[int] = []
        self._window: list[int] = []
        self._known, self._shown, self._given = 0, "", 0

    def push(self, token_id: int) -> str:
        """The characters that this token completes; "" while one is still open."""
        i = self._tokenizer.check_id(token_id)
        if not self._tokenizer.has_text(i, self._skip):
            return ""
        self._ids.append(i)
        self._window.append(i)
        if self._tokenizer.cleans_up:  # a later token may change the spaces in front of it
            return self._give(self._tokenizer.decode(self._ids, self._skip)[:-CLEANED][self._given :])
        text = self._tokenizer.decode_raw(self._window, self._skip)
        closed = not self._tokenizer.is_byte(i) and not text.endswith("\ufffd") and text.startswith(self._shown)
        if not closed or len(text) == len(self._shown):
            return ""
        piece = text[len(self._shown) :]
        self._window = self._window[self._known :]
        self._known, self._shown = len(self._window), self._tokenizer.decode_raw(self._window, self._skip)
        return self._give(piece)

    def flush(self) -> str:
        """What is left at the end."""
        return self._give(self._tokenizer.decode(self._ids, self._skip)[self._given :])

    def _give(self, piece: str) -> str:
        self._given += len(piece)
        return piece


def clean_up(text: str) -> str:
    """Spaces in front of signs taken out, as transformers does when tokenizer_config.json asks for it."""
    for old, new in CLEANING:
        text = text.replace(old, new)
    return text
