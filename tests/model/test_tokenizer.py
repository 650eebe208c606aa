"""The tokenizer against Hugging Face's `tokenizers` and `transformers`, which share no code with it."""

import contextlib
import json
import random
import sys
import unicodedata
from functools import cache

import pytest
import regex
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from minillm.data import reference_text
from minillm.model.tokenizer import BYTE_TO_CHAR, CACHE_BYTES, NotByteLevel, StreamDecoder, Tokenizer, merge_pair
from minillm.model.weights import model_path

EXAMPLES = 600
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST
QWEN_3 = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST
TEXT = "\n\n".join(reference_text().values())
FAMILIES = ["smollm2", "llama3", "qwen3", "gpt2"]

# Python's tables are older than those of the libraries: a code point it does not know (Cn) may be a letter to one only.
any_text = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=60)
PIECES = [
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<|im_",
        "<think>",
        "<|begin_of_text|>",
        " the",
        "The",
        "'s",
        "'LL",
        "'Re",
        "don't",
    ),
    *("12345", "½²", "  ", "\n\n", "\r\n", "\t", " \n ", "\u00a0", "\u3000", "é", "e\u0301", "한국어", "\u1112\u1161"),
    *(
        "日本語",
        "👩‍👩‍👧",
        "\u0000",
        "\x1f",
        "\x04",
        "\U000e0001",
        "\U000f0000",
        "_",
        "__init__",
        " ...",
        "ſ",
        "K",
        "ß",
        "\u0338",
    ),
]
texts = any_text | st.lists(st.sampled_from(PIECES) | any_text, max_size=12).map("".join)
any_ids = st.lists(st.integers(0, 49_151), max_size=30)


def build(family: str) -> tokenizers.Tokenizer:
    """A small tokenizer of a family, trained by Hugging Face's library on some of the reference text."""
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=family == "llama3"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=family == "gpt2")
    pattern = {"llama3": LLAMA_3, "qwen3": QWEN_3}.get(family)
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    made.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level]) if steps else byte_level
    made.normalizer = normalizers.NFC() if family == "qwen3" else None
    made.decoder = decoders.ByteLevel()
    special = {
        "llama3": ["<|begin_of_text|>", "<|end_of_text|>"],
        "qwen3": ["<|im_start|>", "<|im_end|>"],
        "gpt2": ["<|endoftext|>"],
    }[family]
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT[:60_000]], trainer)
    if family == "qwen3":
        made.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    if family == "llama3":
        made.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]),
            ]
        )
        spec = json.loads(made.to_str())
        spec["model"]["vocab"]["wordword"] = len(spec["model"]["vocab"])  # no merges lead to this one
        made = tokenizers.Tokenizer.from_str(json.dumps(spec))
    return made


@cache
def build_once(family: str) -> str:
    return build(family).to_str()


@cache
def family(name: str) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """(ours, theirs) from the same tokenizer.json."""
    if name == "smollm2":
        path = model_path("smollm2-135m-instruct")
        return Tokenizer.from_pretrained(path), tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    theirs = build(name)
    return Tokenizer(json.loads(theirs.to_str())), theirs


# ---- equal to Hugging Face -----------------------------------------------------------------------------------------


@settings(max_examples=EXAMPLES)
@given(texts)
@example("a\x04b\U00050000c")  # bytes that SmolLM2 has no token for
@example("<|im_start|><|im_start|>user\n")
@example("word" * 200)
def test_smollm2_encodes_and_decodes_as_hugging_face(text):
    ours, theirs = family("smollm2")
    ids = ours.encode(text)
    assert ids == theirs.encode(text).ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", FAMILIES[1:])
@settings(max_examples=EXAMPLES // 5)
@given(text=texts)
def test_other_families_encode_and_decode_as_hugging_face(name, text):
    ours, theirs = family(name)
    for add in (True, False):
        ids = ours.encode(text, add_special_tokens=add)
        assert ids == theirs.encode(text, add_special_tokens=add).ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)


@settings(max_examples=EXAMPLES // 5)
@given(any_ids)
def test_any_ids_decode_as_hugging_face(ids):
    """Also ids that no text gives: their bytes need not be UTF-8."""
    ours, theirs = family("smollm2")
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


@given(any_ids, st.lists(st.integers(49_152, 60_000), max_size=5), st.booleans())
def test_ids_beyond_the_vocabulary_have_no_text(hf_tokenizer, ids, beyond, skip):
    """A model's embedding may have more rows than there are tokens, and a row without a token may be sampled."""
    ours, _ = family("smollm2")
    mixed = [i for pair in zip(ids, beyond, strict=False) for i in pair] + ids[len(beyond) :] + beyond[len(ids) :]
    assert ours.decode(mixed, skip) == ours.decode(ids, skip) == hf_tokenizer.decode(mixed, skip_special_tokens=skip)
    decoder = StreamDecoder(ours, skip)
    assert "".join(map(decoder.push, mixed)) + decoder.flush() == ours.decode(ids, skip)


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Sequence", "normalizers": []},
        {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
        {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [{"type": "NFC"}]}, {"type": "NFC"}]},
        {"type": "NFC"},
        None,
    ],
)
@given(
    text=st.text("é <x>q")
    | st.lists(st.sampled_from(["<x>", "<x", "e\u0301", "é", "<e\u0301>", "<é>", " a"])).map("".join)
)
@example(text="<x<é>>")
def test_normalizers_and_normalized_added_tokens_as_hugging_face(normalizer, text):
    """Added tokens are looked for in the text, those called normalized in the normalized text and only afterwards."""
    spec = json.loads(build_once("gpt2")) | {"normalizer": normalizer}
    tokens = [("<x>", True), ("<x", False), ("<e\u0301>", True), ("<é>>", False), ("q", True)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    ids = range(len(spec["model"]["vocab"]), 10_000)
    spec["added_tokens"] = spec["added_tokens"] + [
        {"id": i, "content": content, "normalized": normalized, "special": False, **flags}
        for i, (content, normalized) in zip(
            ids, [t for t in tokens if t[0] not in spec["model"]["vocab"]], strict=False
        )
    ]
    theirs = tokenizers.Tokenizer.from_str(json.dumps(spec))
    assert Tokenizer(spec).encode(text) == theirs.encode(text).ids


def test_an_empty_added_token_is_nowhere():
    spec = json.loads(build_once("gpt2"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec["added_tokens"] = [*spec["added_tokens"], {"id": len(spec["model"]["vocab"]), "content": "", **flags}]
    theirs = tokenizers.Tokenizer.from_str(json.dumps(spec))
    assert Tokenizer(spec).encode("hello there") == theirs.encode("hello there").ids
    assert Tokenizer(spec).vocab_size == theirs.get_vocab_size()


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["type", "pretokenizers", "normalizers", "content", "id", "vocab", "merges", "single"]),
                inner,
            )
        ),
    ),
    st.sampled_from(["model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder"]),
)
def test_any_other_spec_is_refused_with_a_name(part, name):
    spec = json.loads(build_once("gpt2"))
    with contextlib.suppress(NotByteLevel):
        Tokenizer(spec | {name: part})


def test_the_cache_of_words_is_bounded_in_bytes(monkeypatch):
    ours = Tokenizer(json.loads(build_once("gpt2")))
    for i in range(30):
        ours.encode("".join(random.Random(i).choices("abcdefgh", k=20_000)))
    kept = sum(sys.getsizeof(word) + sys.getsizeof(ids) for word, ids in ours._cache.items())
    assert kept < CACHE_BYTES // 100 * 30
    monkeypatch.setattr("minillm.model.tokenizer.CACHE_BYTES", 100_000)
    for i in range(3000):
        ours.encode(f"word{i:x}" * 3)
        held = sum(sys.getsizeof(word) + sys.getsizeof(ids) + 100 for word, ids in ours._cache.items())
        assert held == ours._cache_bytes <= 100_000
    assert ours._cache


@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_reference_text(name):
    ours, theirs = family(name)
    ids = ours.encode(TEXT)
    assert ids == theirs.encode(TEXT).ids
    assert ours.decode(ids, skip_special_tokens=True) == TEXT
    assert ours.encode(TEXT) == ids, "the cache of words changed the result"


def test_facts_of_smollm2(hf_tokenizer):
    ours, _ = family("smollm2")
    assert ours.vocab_size == len(hf_tokenizer) == 49_152
    assert (ours.bos_token_id, ours.eos_token_id) == (hf_tokenizer.bos_token_id, hf_tokenizer.eos_token_id) == (1, 2)
    assert ours.special_tokens == hf_tokenizer.get_added_vocab()
    assert [ours.token_bytes(i) for i in ours.encode(" naïve")] == [b" na", "ïve".encode()]


def test_bytes_without_a_token_are_dropped():
    """As in Hugging Face's library: SmolLM2 cannot say them. What it lacks is what chapter 3 says it lacks."""
    ours, theirs = family("smollm2")
    missing = [byte for byte, character in enumerate(BYTE_TO_CHAR) if theirs.token_to_id(character) is None]
    in_utf8 = [byte for byte in missing if byte not in (0xC0, 0xC1, *range(0xF5, 0x100))]
    assert in_utf8 == [0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2]
    assert ours.decode(ours.encode("a\x04b")) == theirs.decode(theirs.encode("a\x04b").ids) == "ab"


def test_unknown_token_takes_the_place_of_missing_bytes():
    spec = json.loads(build("gpt2").to_str())
    spec["model"]["unk_token"] = "<|endoftext|>"
    last = spec["model"]["vocab"].pop("q")
    spec["model"]["vocab"] = {t: i - (i > last) for t, i in spec["model"]["vocab"].items() if "q" not in t}
    spec["model"]["merges"] = [m for m in spec["model"]["merges"] if "q" not in "".join(m)]
    order = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    spec["model"]["vocab"] = {t: i for i, t in enumerate(order)}
    theirs = tokenizers.Tokenizer.from_str(json.dumps(spec))
    assert Tokenizer(spec).encode("a quick qq") == theirs.encode("a quick qq").ids


@pytest.mark.slow
@pytest.mark.skipif(unicodedata.unidata_version > "16.0.0", reason="Python knows code points that Hugging Face may not")
@pytest.mark.parametrize("name", ["smollm2", "llama3"])
def test_every_code_point_splits_as_hugging_face_does(name):
    """Letters, digits and spaces are the same code points here and there: all that are assigned and public."""
    ours, theirs = family(name)
    known = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cs", "Cn", "Co")]
    for start in range(0, len(known), 2000):
        text = "\n".join(f"a{c}1{c} {c}.'{c}" for c in known[start : start + 2000])
        expected = [piece for piece, _ in theirs.pre_tokenizer.pre_tokenize_str(text)]
        assert ["".join(BYTE_TO_CHAR[b] for b in word.encode()) for word in ours._words(text)] == expected


# ---- streaming -----------------------------------------------------------------------------------------------------


@given(any_ids | texts.map(lambda text: family("smollm2")[0].encode(text)), st.booleans())
def test_a_stream_is_the_whole_in_pieces(ids, skip):
    ours, _ = family("smollm2")
    decoder = StreamDecoder(ours, skip_special_tokens=skip)
    pieces = [decoder.push(i) for i in ids]
    assert "".join(pieces) + decoder.flush() == ours.decode(ids, skip_special_tokens=skip)


@given(texts)
def test_a_stream_of_text_never_shows_half_a_character(text):
    ours, _ = family("gpt2")  # it has every byte
    decoder = StreamDecoder(ours)
    written = ""
    for i in ours.encode(text):
        written += decoder.push(i)
        assert text.startswith(written)
    assert written + decoder.flush() == text


def test_half_a_character_waits_and_is_replaced_at_the_end():
    ours, _ = family("gpt2")
    first, *rest = ours.encode("🙂")
    decoder = StreamDecoder(ours)
    assert decoder.push(first) == ""
    assert decoder.flush() == "\ufffd"
    decoder = StreamDecoder(ours)
    assert [decoder.push(i) for i in [first, *rest]] == [""] * len(rest) + ["🙂"]


# ---- training ------------------------------------------------------------------------------------------------------


def hugging_face_trains(text: list[str], num_merges: int, special_tokens: list[str]) -> dict:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special_tokens) + num_merges,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(text, trainer)
    return json.loads(made.to_str())["model"]


def trained(tokenizer: Tokenizer) -> dict:
    return tokenizer._spec["model"]


def test_learns_what_hugging_face_learns():
    documents = list(reference_text().values())
    ours = Tokenizer.train(documents, 1000, special_tokens=["<|endoftext|>"], eos_token="<|endoftext|>")
    theirs = hugging_face_trains(documents, 1000, ["<|endoftext|>"])
    assert trained(ours)["merges"] == theirs["merges"]
    assert trained(ours)["vocab"] == theirs["vocab"]
    assert (ours.vocab_size, ours.eos_token_id, ours.bos_token_id) == (1257, 0, None)
    assert ours.decode(ours.encode(TEXT)) == TEXT


@given(st.lists(st.text("ab c1é\n", max_size=80), max_size=3), st.integers(0, 40))
@example(["aaaaaaa aaaa aaa"], 5)
def test_learns_what_hugging_face_learns_from_any_text(documents, num_merges):
    """Few letters make many ties and overlaps, where two implementations would part."""
    assert (
        trained(Tokenizer.train(documents, num_merges))["merges"]
        == hugging_face_trains(documents, num_merges, [])["merges"]
    )


def test_by_hand():
    """low low low lower: l+o (4 times), then lo+w (4), then the space before low (3), then w's heirs."""
    tokenizer = Tokenizer.train("low low low lower", 3)
    assert trained(tokenizer)["merges"] == [["l", "o"], ["lo", "w"], ["Ġ", "low"]]
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode("low lowest")] == [b"low", b" low", b"e", b"s", b"t"]


def test_stops_when_words_are_whole():
    tokenizer = Tokenizer.train("ab ab", 100)
    assert trained(tokenizer)["merges"] == [["a", "b"], ["Ġ", "ab"]]
    assert Tokenizer.train("", 5).encode("hi") == [tokenizer.encode("h")[0], tokenizer.encode("i")[0]]


def test_a_word_spans_no_two_documents():
    assert trained(Tokenizer.train(["ab", "ab"], 9))["merges"] == [["a", "b"]]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [([], []), ([1], [1]), ([1, 2], [9]), ([1, 1, 2, 2], [1, 9, 2]), ([1, 2, 1, 2], [9, 9]), ([2, 1], [2, 1])],
)
def test_merge_pair(ids, expected):
    before = list(ids)
    assert merge_pair(ids, (1, 2), 9) == expected
    assert ids == before


def test_merge_pair_overlapping():
    assert merge_pair([5, 5, 5], (5, 5), 6) == [6, 5]


# ---- chat ----------------------------------------------------------------------------------------------------------

CHAT = [
    {"role": "user", "content": "  What is a <cache>?\n"},
    {"role": "assistant", "content": "Memory & speed."},
    {"role": "user", "content": "日本語で"},
]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", [CHAT, CHAT[:1], [{"role": "system", "content": "Be brief."}, *CHAT]])
def test_chat_template_as_transformers(hf_tokenizer, messages, add_generation_prompt):
    ours, _ = family("smollm2")
    expected = hf_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert ours.apply_chat_template(messages, add_generation_prompt) == expected
    assert ours.encode(expected, add_special_tokens=False) == hf_tokenizer.encode(expected, add_special_tokens=False)


def test_template_features_as_transformers(hf_tokenizer):
    """Block trimming, tojson with non-ASCII, loop control, special tokens, variables of the caller."""
    ours, _ = family("smollm2")
    template = """{{ bos_token }}
    {% for m in messages %}
        {% if m.role == 'skip' %}
            {% continue %}
        {% endif %}
    [{{ m | tojson }}{{ eos_token }}]
    {% endfor %}
    {% if thinking is defined and thinking %}<think>{% endif %}{{ tools is none }}
    """
    messages = [{"role": "skip", "content": ""}, *CHAT]
    expected = hf_tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, thinking=True)
    changed = Tokenizer(ours._spec, ours.bos_token, ours.eos_token, template)
    assert changed.apply_chat_template(messages, add_generation_prompt=False, thinking=True) == expected


def test_a_template_may_refuse_and_may_not_reach_out():
    spec = build("gpt2").to_str()
    refusing = Tokenizer(json.loads(spec), chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match=r"messages: .*roles must alternate"):
        refusing.apply_chat_template(CHAT)
    reaching = Tokenizer(json.loads(spec), chat_template="{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(Exception, match="unsafe"):
        reaching.apply_chat_template(CHAT)
    dated = Tokenizer(json.loads(spec), chat_template="{{ strftime_now('%Y') }}")
    assert regex.fullmatch(r"20\d\d", dated.apply_chat_template(CHAT))


@pytest.mark.parametrize("messages", ["hello", {"role": "user", "content": "hi"}, ["hello"]])
def test_messages_of_another_shape(messages):
    with pytest.raises(ValueError, match="messages: expected a list"):
        family("smollm2")[0].apply_chat_template(messages)


def test_no_template():
    with pytest.raises(ValueError, match="chat_template: this tokenizer has none"):
        family("gpt2")[0].apply_chat_template(CHAT)


# ---- files ---------------------------------------------------------------------------------------------------------


def test_saved_and_read_again(tmp_path):
    ours = Tokenizer.train(TEXT[:20_000], 200, ["<|endoftext|>", "<|pad|>"], eos_token="<|endoftext|>")
    ours.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    ours.save(tmp_path / "new" / "folder")
    again = Tokenizer.from_pretrained(tmp_path / "new" / "folder")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "new" / "folder" / "tokenizer.json"))
    text = TEXT[20_000:40_000] + "<|pad|>é\x00"
    assert again.encode(text) == ours.encode(text) == theirs.encode(text).ids
    assert again.decode(ours.encode(text)) == theirs.decode(ours.encode(text), skip_special_tokens=False) == text
    assert (again.eos_token, again.bos_token, again.chat_template) == ("<|endoftext|>", None, ours.chat_template)
    assert again.named_tokens == ours.named_tokens == {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}


def test_transformers_reads_what_was_saved(tmp_path):
    from transformers import AutoTokenizer

    family("smollm2")[0].save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode("Hello 123<|im_end|>") == family("smollm2")[0].encode("Hello 123<|im_end|>")
    assert theirs.eos_token == "<|im_end|>"
    assert theirs.apply_chat_template(CHAT, tokenize=False) == family("smollm2")[0].apply_chat_template(CHAT, False)


def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    ours, _ = family("gpt2")
    ours.save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="no space"):
        family("smollm2")[0].save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_template_file_comes_before_the_one_in_the_config(tmp_path):
    family("gpt2")[0].save(tmp_path)
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    config = {"chat_template": templates, "eos_token": {"content": "<|endoftext|>", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_pretrained(tmp_path).apply_chat_template(CHAT) == "plain"
    assert Tokenizer.from_pretrained(tmp_path).apply_chat_template(CHAT, tools=[]) == "tools"
    assert Tokenizer.from_pretrained(tmp_path).apply_chat_template(CHAT, chat_template="tool_use") == "tools"
    assert Tokenizer.from_pretrained(tmp_path).eos_token == "<|endoftext|>"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.from_pretrained(tmp_path).apply_chat_template(CHAT) == "from the file"


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: not found"):
        Tokenizer.from_pretrained(tmp_path)
    family("gpt2")[0].save(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"tokenizer\.json: not valid JSON"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        Tokenizer.from_pretrained(tmp_path)


# ---- refused -------------------------------------------------------------------------------------------------------

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "a model"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "type BPE.*WordPiece"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}}}, "vocab and model.merges"),
        ({"model": {"vocab": {"a": 0}, "merges": [], "byte_fallback": True}}, "byte_fallback to be off"),
        ({"model": {"vocab": {"a": 0}, "merges": [], "end_of_word_suffix": "</w>"}}, "end_of_word_suffix to be off"),
        ({"model": {"vocab": {"a": 0}, "merges": ["a b"]}}, "merge 0 to join"),
        ({"model": {"vocab": {"a": 0, "b": 2}, "merges": []}}, "0, 1, 2"),
        ({"model": {"vocab": {"▁the": 0}, "merges": []}}, "byte characters.*▁the"),
        ({"normalizer": {"type": "NFKC"}}, "normalizer null or NFC.*NFKC"),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip"}]}},
            "null or NFC.*Strip",
        ),
        ({"decoder": None}, "decoder ByteLevel"),
        ({"decoder": {"type": "Metaspace"}}, "decoder ByteLevel.*Metaspace"),
        ({"pre_tokenizer": None}, "ByteLevel"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "ByteLevel.*Metaspace"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_LEVEL, {"type": "Digits"}]}}, "then ByteLevel"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space to be off"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [{"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Removed"}, BYTE_LEVEL],
                }
            },
            "isolate",
        ),
        ({"post_processor": {"type": "BertProcessing"}}, "post_processor.*BertProcessing"),
        ({"added_tokens": [{"id": 1, "content": "<x>", "lstrip": True}]}, "literally.*lstrip"),
    ],
)
def test_refuses_what_is_not_byte_level_bpe(change, message):
    """As a NotByteLevel, which `load_tokenizer` answers with Hugging Face's library."""
    spec = {"model": {"vocab": {"a": 0}, "merges": []}, "pre_tokenizer": BYTE_LEVEL}
    assert Tokenizer(spec).encode("aa") == [0, 0]
    with pytest.raises(NotByteLevel, match=rf"tokenizer\.json: expected .*{message}"):
        Tokenizer(spec | change)


def test_digits_and_literal_splits():
    """The pre-tokenizer steps that none of the families above uses in this form."""
    spec = json.loads(build("gpt2").to_str())
    digits, split = (
        {"type": "Digits", "individual_digits": False},
        {"type": "Split", "pattern": {"String": "."}, "behavior": "Isolated", "invert": False},
    )
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, digits, spec["pre_tokenizer"]]}
    theirs = tokenizers.Tokenizer.from_str(json.dumps(spec))
    for text in ("...a 12.5 x", "12 345,6.", ""):
        assert Tokenizer(spec).encode(text) == theirs.encode(text).ids


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: t.encode(None), TypeError, "text: expected a str, got NoneType"),
        (lambda t: t.encode(b"bytes"), TypeError, "text: expected a str, got bytes"),
        (lambda t: t.encode("ab\ud800"), ValueError, "text: .*surrogate at position 2"),
        (lambda t: t.decode([-1]), ValueError, "token_id: .*got -1"),
        (lambda t: t.token_bytes(49_152), ValueError, "token_id: expected an id in 0..49151, got 49152"),
        (lambda t: StreamDecoder(t).push(-5), ValueError, "token_id"),
        (lambda t: t.decode(["a"]), TypeError, "integer"),
        (
            lambda t: Tokenizer(t._spec, eos_token="<|nope|>"),
            ValueError,
            "eos_token: expected one of the special tokens",
        ),
        (lambda t: Tokenizer.train("abc", -1), ValueError, "num_merges"),
        (lambda t: Tokenizer.train("abc", 1.5), ValueError, "num_merges"),
        (lambda t: Tokenizer.train("abc", 5, special_tokens=["<a>", "<a>"]), ValueError, "special_tokens"),
        (lambda t: Tokenizer.train("abc", 5, special_tokens="<a>"), ValueError, "special_tokens"),
        (lambda t: Tokenizer.train(["abc", 5], 5), TypeError, "text"),
        (lambda t: Tokenizer.train("abc", 5, eos_token="<e>"), ValueError, "eos_token"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(family("smollm2")[0])
