"""Byte-level byte-pair encoding: text to token ids and back, equal to Hugging Face's `tokenizers`.

A text becomes ids in five steps:

1. cut out the special tokens that stand in it (`<|im_start|>`);
2. normalize the rest (Qwen3: Unicode NFC; Llama 3 and SmolLM2: nothing);
3. split it into words with regular expressions, so that no token ever spans two words;
4. spell each word in UTF-8 bytes, one token a byte;
5. join neighbors, the pair of the best rank first, until no pair is in the merge table.

The merge table is learned: `Tokenizer.train` joins the most frequent pair of a text, again and again.

The constructor takes what Hugging Face's `tokenizer.json` holds, `save` writes it back: one form, no conversion. The
byte-level family is read (GPT-2, SmolLM2, Llama 3, Qwen3), anything else is refused. Files are JSON; nothing is
unpickled. Unicode grows, and the tables behind `regex` and behind Hugging Face's library may be a version apart: the
two agree on every code point that Python 3.11 knows (the tests try them all), and may split a newer one differently.

Sources: Sennrich, Haddow and Birch, 2016, "Neural Machine Translation of Rare Words with Subword Units"; Radford et
al., 2019, "Language Models are Unsupervised Multitask Learners" (bytes instead of characters).
"""

import codecs
import heapq
import json
import os
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from operator import index
from pathlib import Path
from typing import Any

import regex

__all__ = ["BYTE_TO_CHAR", "GPT2_PATTERN", "StreamDecoder", "Tokenizer", "merge_pair"]

# GPT-2's word: a contraction; a run of letters, of digits or of signs, with the space before it; a run of white space.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CACHED_WORDS = 50_000  # words whose ids are remembered, since a text repeats its words


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
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
DIGITS_THEN_GPT2 = {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]}  # as SmolLM2


def merge_pair(ids: Sequence[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """Replace every `pair` of neighbors in `ids` by `new_id`, from left to right, so that a a a becomes (aa) a."""
    merged: list[int] = []
    i = 0
    while i < len(ids):
        found = i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair
        merged.append(new_id if found else ids[i])
        i += 2 if found else 1
    return merged


class Tokenizer:
    """A byte-level BPE tokenizer; `Tokenizer.from_pretrained` and `Tokenizer.train` make one.

    spec: the content of a `tokenizer.json`. bos_token, eos_token: the special tokens that begin and end a sequence, if
    there are any. chat_template: Jinja source that turns messages into a prompt.
    Raises ValueError when `spec` is not byte-level BPE, with what was expected and what it asks for.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        bos_token: str | None = None,
        eos_token: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        self._spec, self.chat_template = spec, chat_template
        model = _model(spec.get("model"))
        self.special_tokens: dict[str, int] = _added_tokens(spec)
        vocab: dict[str, int] = {**model["vocab"], **self.special_tokens}
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError("tokenizer.json: expected the ids 0, 1, 2, ... once each, got gaps or repeats")
        self._token_bytes = [b""] * len(vocab)
        for token, i in vocab.items():
            self._token_bytes[i] = token.encode() if token in self.special_tokens else _bytes(token)
        self._hidden = {token["id"] for token in spec.get("added_tokens") or [] if token.get("special")}
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self._special = regex.compile("(" + "|".join(map(regex.escape, longest_first)) + ")") if longest_first else None
        self._nfc = _is_nfc(spec.get("normalizer"))
        self._patterns = [regex.compile(pattern) for pattern in _split_patterns(spec.get("pre_tokenizer"))]
        # A byte that has no token becomes `unk_token`, or is dropped when there is none: Hugging Face's rule. SmolLM2
        # lacks 8 of the 243 bytes that occur in UTF-8: six control characters and the lead bytes F1 and F2 of code
        # points that hardly anyone uses.
        unknown = vocab.get(model.get("unk_token"))
        self._byte_ids = [vocab.get(character, unknown) for character in BYTE_TO_CHAR]
        self._merges = _merge_table(model["merges"], vocab)
        # Llama 3: a word that is a token is taken as it is, whether merges lead there or not.
        self._whole_words = model["vocab"] if model.get("ignore_merges") else {}
        self._before, self._after = _template_ids(spec.get("post_processor"), vocab)
        self.bos_token, self.bos_token_id = bos_token, self._special_id("bos_token", bos_token)
        self.eos_token, self.eos_token_id = eos_token, self._special_id("eos_token", eos_token)
        self._cache: dict[str, list[int]] = {}

    def _special_id(self, name: str, token: str | None) -> int | None:
        if token is not None and token not in self.special_tokens:
            raise ValueError(f"{name}: expected one of the special tokens {list(self.special_tokens)}, got {token!r}")
        return self.special_tokens.get(token)

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
        has become one token.
        """
        if not isinstance(num_merges, int) or isinstance(num_merges, bool) or num_merges < 0:
            raise ValueError(f"num_merges: expected an integer, 0 or more, got {num_merges!r}")
        if isinstance(special_tokens, str) or len(set(special_tokens)) < len(special_tokens) or "" in special_tokens:
            raise ValueError(f"special_tokens: expected different strings, none empty, got {special_tokens!r}")
        tokens = [*special_tokens, *sorted(BYTE_TO_CHAR)]
        bare = cls(_trained(tokens, [], special_tokens), eos_token=eos_token)
        counts: Counter[str] = Counter()
        for document in [text] if isinstance(text, str) else text:
            counts.update(bare._words(_text(document)))
        words = [[bare._byte_ids[byte] for byte in word.encode()] for word in counts]
        merges = _learn(words, list(counts.values()), tokens, num_merges)
        return cls(_trained(tokens, merges, special_tokens), eos_token=eos_token)

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

    def _words(self, text: str) -> list[str]:
        """Split `text`: each pattern divides what the one before it left. Joined, the words are the normalized text."""
        words = [unicodedata.normalize("NFC", text) if self._nfc else text]
        for pattern in self._patterns:
            words = [piece for word in words for piece in _isolate(pattern, word)]
        return words

    def _encode_word(self, word: str) -> list[int]:
        ids = self._cache.get(word)
        if ids is None:
            data = word.encode()
            whole = self._whole_words.get("".join(BYTE_TO_CHAR[byte] for byte in data)) if self._whole_words else None
            spelled = [i for byte in data if (i := self._byte_ids[byte]) is not None]
            ids = self._join(spelled) if whole is None else [whole]
            if len(self._cache) >= CACHED_WORDS:
                self._cache.clear()
            self._cache[word] = ids
        return ids

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
        """The text of `ids`. Bytes that are not UTF-8 become U+FFFD, the replacement character."""
        hidden = self._hidden if skip_special_tokens else ()
        return b"".join(self.token_bytes(i) for i in map(index, ids) if i not in hidden).decode(errors="replace")

    # ---- chat ------------------------------------------------------------------------------------------------------

    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt for [{"role": ..., "content": ...}, ...], in the form that the model was trained on.

        `variables` reach the template (Qwen3: `enable_thinking=False`). A template is a program that came with the
        model, from a stranger: it runs in Jinja's sandbox, with the settings that transformers uses.
        """
        if self.chat_template is None:
            raise ValueError("chat_template: this tokenizer has none; give it one, or encode a plain prompt")
        if isinstance(messages, str | dict) or not all(isinstance(message, dict) for message in messages):
            raise ValueError(f'messages: expected a list of {{"role": ..., "content": ...}}, got {messages!r}')
        known = {"tools": None, "documents": None, "bos_token": self.bos_token or "", "eos_token": self.eos_token or ""}
        known |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        return _template(self.chat_template).render(known | variables)

    # ---- files -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> "Tokenizer":
        """Read a Hugging Face directory: `tokenizer.json`; `tokenizer_config.json` and `chat_template.jinja` if there.

        Raises FileNotFoundError without a tokenizer.json, ValueError for a damaged file or a tokenizer that is not
        byte-level BPE.
        """
        folder = Path(directory)
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{folder / 'tokenizer.json'}: not found; expected a Hugging Face model directory")
        config = _read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        template = config.get("chat_template")
        if isinstance(template, list):  # several, each with a name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        named = [config.get("bos_token"), config.get("eos_token")]
        bos, eos = (token["content"] if isinstance(token, dict) else token for token in named)
        return cls(_read_json(folder / "tokenizer.json"), bos, eos, template)

    def save(self, directory: str | os.PathLike) -> None:
        """Write the files that `from_pretrained`, transformers and tokenizers read. Each appears whole or not."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= {"bos_token": self.bos_token, "eos_token": self.eos_token, "chat_template": self.chat_template}
        _write(folder / "tokenizer.json", self._spec)
        _write(folder / "tokenizer_config.json", config)


class StreamDecoder:
    """Text for tokens that arrive one by one, never half a character.

    A character of UTF-8 is one to four bytes, spread over as many tokens or fewer. What is not whole yet waits here.
    All pieces joined, `flush()` included, are `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer._hidden if skip_special_tokens else ()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes; "" while one is still open."""
        data = self._tokenizer.token_bytes(token_id)
        return "" if index(token_id) in self._hidden else self._utf8.decode(data)

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


def _trained(tokens: list[str], merges: list[list[str]], special_tokens: Sequence[str]) -> dict[str, Any]:
    """The `tokenizer.json` for tokens whose ids are their places in the list, special ones first."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    options = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    options |= dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(special_tokens)],
        "normalizer": None,
        "pre_tokenizer": DIGITS_THEN_GPT2,
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", **options, "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges},
    }


# ---- reading tokenizer.json: what is understood, and an error for everything else ----------------------------------


def _expect(holds: bool, expected: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"tokenizer.json: expected {expected}, as in byte-level BPE, got {got!r}")


def _model(model: Any) -> dict[str, Any]:
    _expect(isinstance(model, dict), "a model", model)
    _expect(model.get("type", "BPE") == "BPE", "a model of type BPE", model.get("type"))
    whole = isinstance(model.get("vocab"), dict) and isinstance(model.get("merges"), list)
    _expect(whole, "model.vocab and model.merges", list(model))
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "fuse_unk"):
        _expect(not model.get(option), f"model.{option} to be off", model.get(option))
    return model


def _added_tokens(spec: dict[str, Any]) -> dict[str, int]:
    """Added tokens and their ids. All of them are cut out of a text before anything else happens to it."""
    tokens = spec.get("added_tokens") or []
    for token in tokens:
        on = [flag for flag in ("single_word", "lstrip", "rstrip") if token.get(flag)]
        on += ["normalized"] if token.get("normalized") and spec.get("normalizer") else []
        _expect(not on, f"the added token {token.get('content')!r} to be matched literally", on)
    return {token["content"]: token["id"] for token in tokens}


def _bytes(token: str) -> bytes:
    _expect(CHAR_TO_BYTE.keys() >= set(token), "tokens spelled in GPT-2's 256 byte characters", token)
    return bytes(CHAR_TO_BYTE[character] for character in token)


def _is_nfc(normalizer: dict[str, Any] | None) -> bool:
    kind = normalizer and normalizer.get("type")
    _expect(kind in (None, "NFC"), "normalizer null or NFC", kind)
    return kind == "NFC"


def _split_patterns(pre_tokenizer: dict[str, Any] | None) -> list[str]:
    """The regular expressions that split a text into words, in order."""
    spec = pre_tokenizer or {}
    steps = spec.get("pretokenizers", []) if spec.get("type") == "Sequence" else [spec]
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


def _template_ids(post_processor: dict[str, Any] | None, vocab: dict[str, int]) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts before and behind a text."""
    spec = post_processor or {"type": "ByteLevel"}
    before, after = [], []
    for step in spec["processors"] if spec.get("type") == "Sequence" else [spec]:
        kind = step.get("type")
        _expect(kind in ("ByteLevel", "TemplateProcessing"), "post_processor ByteLevel or TemplateProcessing", kind)
        side = before  # ByteLevel has no `single`: it only moves character offsets, which nobody asks us for
        for item in step.get("single", []):
            if "Sequence" in item:
                side = after
            else:
                side.append(vocab[item["SpecialToken"]["id"]])
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


@lru_cache(maxsize=16)
def _template(source: str) -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    jinja.filters["tojson"] = lambda value, ensure_ascii=False, **options: json.dumps(
        value, ensure_ascii=ensure_ascii, **options
    )
    jinja.globals |= {"raise_exception": _refuse_messages, "strftime_now": time.strftime}
    return jinja.from_string(source)


def _refuse_messages(message: str) -> None:
    raise ValueError(f"messages: the chat template refuses them: {message}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path}: not valid JSON ({e}); the download may be cut off: fetch the model again") from e
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write beside the target and rename over it: a reader sees the old file or the new one."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
