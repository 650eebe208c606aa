"""Byte-level byte-pair encoding: text to token ids and back, equal to Hugging Face's `tokenizers`.

A text becomes ids in five steps:

1. cut out the special tokens that stand in it (`<|im_start|>`);
2. normalize the rest (Qwen3: Unicode NFC; Llama 3 and SmolLM2: nothing);
3. split it into words with regular expressions, so that no token ever spans two words;
4. spell each word in UTF-8 bytes, one token a byte;
5. join neighbors, the pair of the best rank first, until no pair is in the merge table.

The merge table is learned: `Tokenizer.train` joins the most frequent pair of a text, again and again.

The constructor takes what Hugging Face's `tokenizer.json` holds, `save` writes it back: one form, no conversion. The
byte-level family is read (GPT-2, SmolLM2, Llama 3, Qwen3), anything else is refused; `load_tokenizer` of
`tokenizer_hf.py` then lets Hugging Face's library serve it. Files are JSON; nothing is unpickled. Unicode grows, and
the tables behind `regex` and behind Hugging Face's library may be a version apart: the two agree on every code point
that Python 3.11 knows (the tests try them all), and may split a newer one differently.

Sources: Sennrich, Haddow and Birch, 2016, "Neural Machine Translation of Rare Words with Subword Units"; Radford et
al., 2019, "Language Models are Unsupervised Multitask Learners" (bytes instead of characters).
"""

import codecs
import heapq
import os
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from operator import index
from pathlib import Path
from typing import Any

import regex

from ..files import byte_level_bpe, write_json
from .chat import ChatFormat
from .tokenizer_files import TokenizerFiles, read_tokenizer_files

__all__ = ["BYTE_TO_CHAR", "GPT2_PATTERN", "NotByteLevel", "StreamDecoder", "Tokenizer", "merge_pair"]

# GPT-2's word: a contraction; a run of letters, of digits or of signs, with the space before it; a run of white space.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CACHE_BYTES = 16_000_000  # of words whose ids are remembered, since a text repeats its words


def _byte_characters() -> list[str]:
    """GPT-2's printable character for each byte value, because `tokenizer.json` is text and a byte such as 0x0A is not.

    188 bytes stand for themselves, the other 68 (controls, spaces) borrow U+0100 and up: a space shows as "Ġ", a
    newline as "Ċ".
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    borrowed = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(borrowed)) for byte in range(256)]


BYTE_TO_CHAR = _byte_characters()
CHAR_TO_BYTE = {character: byte for byte, character in enumerate(BYTE_TO_CHAR)}


def merge_pair(ids: Sequence[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """Replace every `pair` of neighbors in `ids` by `new_id`, from left to right, so that a a a becomes (aa) a."""
    merged: list[int] = []
    i = 0
    while i < len(ids):
        found = i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair
        merged.append(new_id if found else ids[i])
        i += 2 if found else 1
    return merged


class NotByteLevel(ValueError):
    """A `tokenizer.json` that is not byte-level BPE, or has a part that this file does not read."""


class Tokenizer(ChatFormat):
    """A byte-level BPE tokenizer; `Tokenizer.from_pretrained` and `Tokenizer.train` make one.

    spec: the content of a `tokenizer.json`. bos_token, eos_token: the special tokens that begin and end a sequence, if
    there are any. chat_template: Jinja source that turns messages into a prompt. named_tokens: other special tokens
    that the template may name, {"pad_token": "<|pad|>"}.
    Raises NotByteLevel, a ValueError, when `spec` is not byte-level BPE, with what was expected and what it asks for.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        bos_token: str | None = None,
        eos_token: str | None = None,
        chat_template: str | dict[str, str] | None = None,
        named_tokens: dict[str, str] | None = None,
    ) -> None:
        self._spec, self.chat_template = spec, chat_template
        try:
            self._read(spec)
        except NotByteLevel:
            raise
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, regex.error) as e:
            raise NotByteLevel(f"tokenizer.json: not the expected form ({type(e).__name__}: {e})") from e
        self.bos_token, self.bos_token_id = bos_token, self._special_id("bos_token", bos_token)
        self.eos_token, self.eos_token_id = eos_token, self._special_id("eos_token", eos_token)
        own = {"bos_token": bos_token, "eos_token": eos_token}
        self.named_tokens = {**(named_tokens or {}), **{name: token for name, token in own.items() if token}}
        self._cache: dict[str, list[int]] = {}
        self._cache_bytes = 0

    def _read(self, spec: dict[str, Any]) -> None:
        model, added = _model(spec.get("model")), _added_tokens(spec)
        self.special_tokens: dict[str, int] = {token["content"]: token["id"] for token in added}
        vocab: dict[str, int] = {**model["vocab"], **self.special_tokens}
        _expect(sorted(vocab.values()) == list(range(len(vocab))), "the ids 0, 1, 2, ... once each", "gaps or repeats")
        self._token_bytes = [b""] * len(vocab)
        for token, i in vocab.items():
            self._token_bytes[i] = token.encode() if token in self.special_tokens else _bytes(token)
        self._hidden = {token["id"] for token in added if token.get("special")}
        self._nfc = _is_nfc(spec.get("normalizer"))
        # Most added tokens are looked for in the text as it comes, some (of code models) in the normalized one.
        self._special = _any_of(token["content"] for token in added if not token.get("normalized"))
        late = {self._normalize(token["content"]): token["id"] for token in added if token.get("normalized")}
        self._late, self._late_special = late, _any_of(late)
        self._patterns = [regex.compile(pattern) for pattern in _split_patterns(spec.get("pre_tokenizer"))]
        decoder = _steps(spec.get("decoder", {"type": "ByteLevel"}), "decoders")
        _expect([step.get("type") for step in decoder] == ["ByteLevel"], "the decoder ByteLevel", decoder)
        # A byte that has no token becomes `unk_token`, or is dropped when there is none: Hugging Face's rule. SmolLM2
        # lacks 8 of the 243 bytes that occur in UTF-8: six control characters and the lead bytes F1 and F2 of code
        # points that hardly anyone uses.
        unk_token: Any = model.get("unk_token")
        unknown = vocab.get(unk_token)
        self._byte_ids = [vocab.get(character, unknown) for character in BYTE_TO_CHAR]
        self._merges = _merge_table(model["merges"], vocab)
        # Llama 3: a word that is a token is taken as it is, whether merges lead there or not.
        self._whole_words = model["vocab"] if model.get("ignore_merges") else {}
        self._before, self._after = _template_ids(spec.get("post_processor"))

    def _special_id(self, name: str, token: str | None) -> int | None:
        if token is not None and token not in self.special_tokens:
            raise ValueError(f"{name}: expected one of the special tokens {list(self.special_tokens)}, got {token!r}")
        return None if token is None else self.special_tokens[token]

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included. The embedding of a model may have more rows, as padding."""
        return len(self._token_bytes)

    # ---- training --------------------------------------------------------------------------------------------------

    @classmethod
    def train(
        cls,
        text: str | Iterable[str],
        num_merges: int,
        special_tokens: Sequence[str] = (),
        eos_token: str | None = None,
    ) -> "Tokenizer":
        """Learn `num_merges` tokens from a text, or from several (a word never spans two).

        Words are split as SmolLM2 does. The ids are: special tokens, the 256 bytes in the order of their printable
        characters, merges in the order learned. Of equally frequent pairs the one with the smallest ids wins. Both are
        the rules of Hugging Face's `BpeTrainer`, so that both learn the same. Fewer merges come back when every word
        has become one token. `eos_token` is the padding token too, as is usual where there is no other.
        """
        if not isinstance(num_merges, int) or isinstance(num_merges, bool) or num_merges < 0:
            raise ValueError(f"num_merges: expected an integer, 0 or more, got {num_merges!r}")
        if isinstance(special_tokens, str) or len(set(special_tokens)) < len(special_tokens) or "" in special_tokens:
            raise ValueError(f"special_tokens: expected different strings, none empty, got {special_tokens!r}")
        tokens = [*special_tokens, *sorted(BYTE_TO_CHAR)]
        special = range(len(special_tokens))
        bare = cls(byte_level_bpe(tokens, [], special), eos_token=eos_token)
        counts: Counter[str] = Counter()
        for document in [text] if isinstance(text, str) else text:
            counts.update(bare._words(_text(document)))
        words = [bare._spell(word.encode()) for word in counts]
        merges = _learn(words, list(counts.values()), tokens, num_merges)
        named = {"pad_token": eos_token} if eos_token else {}
        return cls(byte_level_bpe(tokens, merges, special), eos_token=eos_token, named_tokens=named)

    # ---- text to ids -----------------------------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of `text`. A special token written in it is recognized, whoever wrote it.

        `add_special_tokens` puts in front and behind what `tokenizer.json` asks for (Llama 3: `<|begin_of_text|>`;
        SmolLM2 and Qwen3: nothing). Turn it off for the output of `apply_chat_template`, which has all of them already.
        """
        parts = self._special.split(_text(text)) if self._special else [_text(text)]
        ids: list[int] = []
        for i, part in enumerate(parts):  # text, special token, text, special token, ..., text
            if i % 2:
                ids.append(self.special_tokens[part])
            else:
                for word in self._words(part):
                    ids.extend(self._encode_word(word))
        return [*self._before, *ids, *self._after] if add_special_tokens else ids

    def _normalize(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self._nfc else text

    def _words(self, text: str) -> list[str]:
        """Split `text`: each pattern divides what the one before it left. Joined, the words are the normalized text."""
        text, words = self._normalize(text), []
        for i, part in enumerate(self._late_special.split(text) if self._late_special else [text]):
            pieces = [part]
            for pattern in self._patterns if i % 2 == 0 else []:  # the others are tokens as they are
                pieces = [piece for word in pieces for piece in _isolate(pattern, word)]
            words += pieces
        return words

    def _encode_word(self, word: str) -> list[int]:
        if word in self._late:
            return [self._late[word]]
        ids = self._cache.get(word)
        if ids is None:
            data = word.encode()
            whole = self._whole_words.get("".join(BYTE_TO_CHAR[byte] for byte in data)) if self._whole_words else None
            ids = self._join(self._spell(data)) if whole is None else [whole]
            self._remember(word, ids)
        return ids

    def _spell(self, data: bytes) -> list[int]:
        return [i for byte in data if (i := self._byte_ids[byte]) is not None]

    def _remember(self, word: str, ids: list[int]) -> None:
        size = sys.getsizeof(word) + sys.getsizeof(ids) + 100  # and its place in the dictionary
        if self._cache_bytes + size > CACHE_BYTES:
            self._cache, self._cache_bytes = {}, 0
        if size <= CACHE_BYTES // 100:  # a word as long as that will hardly come again
            self._cache[word] = ids
            self._cache_bytes += size

    def _join(self, ids: list[int]) -> list[int]:
        """Join neighbors, best rank first and leftmost of equals, until no pair is in the merge table.

        A heap of candidates over a linked list of what stands: O(n log n), so that a "word" of 100,000 letters cannot
        stall a server. `ids[i]` is the token that starts at i, or -1 once it was joined to its left neighbor.
        """
        merges, n = self._merges, len(ids)
        after, before = list(range(1, n + 1)), list(range(-1, n - 1))
        heap = [(merges[pair][0], i, merges[pair][1]) for i, pair in enumerate(pairwise(ids)) if pair in merges]
        heapq.heapify(heap)
        while heap:
            _, i, new_id = heapq.heappop(heap)
            right = after[i]
            if right == n or merges.get((ids[i], ids[right]), (0, -1))[1] != new_id:
                continue  # stale: one of the two has meanwhile been joined to another
            ids[i], ids[right] = new_id, -1
            after[i] = after[right]
            if after[i] < n:
                before[after[i]] = i
            for left in (before[i], i):  # the two pairs that the new token is part of
                if left >= 0 and after[left] < n and (merge := merges.get((ids[left], ids[after[left]]))):
                    heapq.heappush(heap, (merge[0], left, merge[1]))
        return [i for i in ids if i >= 0]

    # ---- ids to text -----------------------------------------------------------------------------------------------

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token; they may end inside a character. Raises ValueError for an id that no token has."""
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(
                f"token_id: expected an id in 0..{self.vocab_size - 1}, got {token_id}; another tokenizer's?"
            )
        return self._token_bytes[token_id]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`. Bytes that are not UTF-8 become U+FFFD, the replacement character.

        An id of `vocab_size` or more has no text: a model's vocabulary is often padded, and such an id can be sampled.
        """
        decoder = self.stream_decoder(skip_special_tokens)
        return "".join(decoder.push(i) for i in ids) + decoder.flush()

    def stream_decoder(self, skip_special_tokens: bool = False) -> "StreamDecoder":
        """What turns tokens that arrive one by one into text."""
        return StreamDecoder(self, skip_special_tokens)

    # ---- files -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> "Tokenizer":
        """Read a Hugging Face directory: `tokenizer.json`, and what `tokenizer_files.py` says if it is there.

        Raises FileNotFoundError without a tokenizer.json, ValueError for a damaged file, NotByteLevel for a tokenizer
        of another family; `load_tokenizer` reads those too.
        """
        return cls.from_files(read_tokenizer_files(directory))

    @classmethod
    def from_files(cls, files: TokenizerFiles) -> "Tokenizer":
        """The tokenizer of files that are read already."""
        named = files.named_tokens
        _expect(not files.config.get("split_special_tokens"), "split_special_tokens to be off", True)
        return cls(files.spec, named.get("bos_token"), named.get("eos_token"), files.chat_template, named)

    def save(self, directory: str | os.PathLike) -> None:
        """Write the files that `from_pretrained`, transformers and tokenizers read. Each appears whole or not."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        template: Any = self.chat_template
        named = {"bos_token": None, "eos_token": None, **self.named_tokens}
        if isinstance(template, dict):
            template = [{"name": name, "template": source} for name, source in template.items()]
        write_json(folder / "tokenizer.json", self._spec)
        write_json(folder / "tokenizer_config.json", {**config, **named, "chat_template": template})


class StreamDecoder:
    """Text for tokens that arrive one by one, never half a character.

    A character of UTF-8 is one to four bytes, spread over as many tokens or fewer. What is not whole yet waits here.
    All pieces joined, `flush()` included, are `tokenizer.decode` of all ids. An id beyond the vocabulary adds nothing.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer._hidden if skip_special_tokens else ()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes; "" while one is still open."""
        i = index(token_id)
        beyond = i >= self._tokenizer.vocab_size
        return "" if beyond or i in self._hidden else self._utf8.decode(self._tokenizer.token_bytes(i))

    def flush(self) -> str:
        """What is left at the end: "", or U+FFFD for a character that never became whole."""
        return self._utf8.decode(b"", final=True)


# ---- learning merges -----------------------------------------------------------------------------------------------


def _learn(words: list[list[int]], counts: list[int], tokens: list[str], num_merges: int) -> list[list[str]]:
    """Join the most frequent pair, `num_merges` times; append each new token to `tokens`. `words` occur `counts` times.

    Only the words that hold the joined pair are counted again. The heap's counts may be out of date but never too low,
    so that an entry on top whose count is true is the maximum.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    pair_counts: Counter[tuple[int, int]] = Counter()
    words_with: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for w, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += counts[w]
            words_with[pair].add(w)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    merges: list[list[str]] = []
    while heap and len(merges) < num_merges:
        count, pair = heapq.heappop(heap)
        if -count != pair_counts[pair]:
            if pair_counts[pair] > 0:
                heapq.heappush(heap, (-pair_counts[pair], pair))
            continue
        left, right = (tokens[i] for i in pair)
        merges.append([left, right])
        new_id = ids.setdefault(left + right, len(tokens))
        if new_id == len(tokens):  # else a special token is spelled like it
            tokens.append(left + right)
        touched = set()
        for w in words_with.pop(pair):
            for old in pairwise(words[w]):
                pair_counts[old] -= counts[w]
            words[w] = merge_pair(words[w], pair, new_id)
            for new in pairwise(words[w]):
                pair_counts[new] += counts[w]
                words_with[new].add(w)
                touched.add(new)
        for new in touched:
            heapq.heappush(heap, (-pair_counts[new], new))
    return merges


# ---- reading tokenizer.json: what is understood, and an error for everything else ----------------------------------


def _expect(holds: bool, expected: str, got: Any) -> None:
    if not holds:
        raise NotByteLevel(f"tokenizer.json: expected {expected}, as in byte-level BPE, got {got!r}")


def _model(model: Any) -> dict[str, Any]:
    _expect(isinstance(model, dict), "a model", model)
    _expect(model.get("type", "BPE") == "BPE", "a model of type BPE", model.get("type"))
    whole = isinstance(model.get("vocab"), dict) and isinstance(model.get("merges"), list)
    _expect(whole, "model.vocab and model.merges", list(model))
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "fuse_unk"):
        _expect(not model.get(option), f"model.{option} to be off", model.get(option))
    return model


def _steps(spec: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """One part of a tokenizer as a flat list of steps, however its sequences are nested."""
    if spec is None:
        return []
    if spec.get("type") != "Sequence":
        return [spec]
    return [step for part in spec[name] for step in _steps(part, name)]


def _added_tokens(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Added tokens. They are cut out of a text before it is split into words; one without a letter is nowhere in it."""
    tokens = [token for token in spec.get("added_tokens") or [] if token["content"]]
    for token in tokens:
        on = [flag for flag in ("single_word", "lstrip", "rstrip") if token.get(flag)]
        _expect(not on, f"the added token {token['content']!r} to be matched literally", on)
    return tokens


def _any_of(tokens: Iterable[str]) -> regex.Pattern | None:
    """What finds any of the tokens, the longest where several begin."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return regex.compile("(" + "|".join(map(regex.escape, longest_first)) + ")") if longest_first else None


def _bytes(token: str) -> bytes:
    _expect(CHAR_TO_BYTE.keys() >= set(token), "tokens spelled in GPT-2's 256 byte characters", token)
    return bytes(CHAR_TO_BYTE[character] for character in token)


def _is_nfc(normalizer: dict[str, Any] | None) -> bool:
    kinds = [step.get("type") for step in _steps(normalizer, "normalizers")]
    _expect(set(kinds) <= {"NFC"}, "normalizer null or NFC", kinds)
    return bool(kinds)


def _split_patterns(pre_tokenizer: dict[str, Any] | None) -> list[str]:
    """The regular expressions that split a text into words, in order."""
    steps = _steps(pre_tokenizer, "pretokenizers")
    kinds = [step.get("type") for step in steps]
    known = kinds[-1:] == ["ByteLevel"] and set(kinds[:-1]) <= {"Digits", "Split"}
    _expect(known, "pre_tokenizer steps Digits and Split, then ByteLevel", kinds)
    patterns = []
    for step in steps:
        if step["type"] == "Digits":
            patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif step["type"] == "Split":
            isolates = step.get("behavior") == "Isolated" and not step.get("invert")
            _expect(isolates, "Split to isolate what it matches", step)
            [(kind, pattern)] = step["pattern"].items()
            patterns.append(pattern if kind == "Regex" else regex.escape(pattern))
        else:
            _expect(not step.get("add_prefix_space"), "add_prefix_space to be off", True)
            patterns += [GPT2_PATTERN] if step.get("use_regex", True) else []
    return patterns


def _isolate(pattern: regex.Pattern, text: str) -> list[str]:
    """Cut `text` so that each match stands alone, and so does what lies between two matches."""
    pieces, end = [], 0
    for match in pattern.finditer(text):
        pieces += [text[end : match.start()], match.group()]
        end = match.end()
    return [piece for piece in [*pieces, text[end:]] if piece]


def _merge_table(merges: list, vocab: dict[str, int]) -> dict[tuple[int, int], tuple[int, int]]:
    """{pair of ids: (rank, id of the two joined)} from "a b" or ["a", "b"] in the order of their ranks."""
    table = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        _expect(
            vocab.keys() >= {left, right, left + right}, f"merge {rank} to join two tokens to a third", [left, right]
        )
        table[vocab[left], vocab[right]] = rank, vocab[left + right]
    return table


def _template_ids(post_processor: dict[str, Any] | None) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts before and behind a text."""
    before, after = [], []  # type: list[int], list[int]
    for step in _steps(post_processor, "processors"):
        kind = step.get("type")
        _expect(kind in ("ByteLevel", "TemplateProcessing"), "post_processor ByteLevel or TemplateProcessing", kind)
        side = before  # ByteLevel has no `single`: it only moves character offsets, which nobody asks us for
        for item in step.get("single", []):
            if "Sequence" in item:
                side = after
            else:
                side += step["special_tokens"][item["SpecialToken"]["id"]]["ids"]
    return before, after


# ---- small change --------------------------------------------------------------------------------------------------


def _text(text: Any) -> str:
    if not isinstance(text, str):
        raise TypeError(f"text: expected a str, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"text: expected Unicode, got a lone surrogate at position {e.start}") from None
    return text
