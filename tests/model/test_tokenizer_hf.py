"""Tokenizers of other families through our face, against transformers' AutoTokenizer on the same directory."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from minillm.data import reference_text
from minillm.model.tokenizer import Tokenizer
from minillm.model.tokenizer_hf import HuggingFaceTokenizer, load_tokenizer

TEXT = "\n\n".join(reference_text().values())[:40_000]
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
FAMILIES = ["metaspace", "llama2", "unigram", "wordpiece", "cleaned", "prefixed", "stripping", "suffix", "gaps"]
texts = st.text(max_size=40) | st.lists(
    st.sampled_from(
        [" the", "The", "  ", "\n", " don 't", " .", " ' ", "日本語", "👩‍👩‍👧", "</s>", "<s>", "<x>", "é", "\ufffd"]
    )
    | st.text(max_size=5),
    max_size=10,
).map("".join)


def train(model, trainer) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.train_from_iterator(TEXT.split("\n"), trainer)
    return made


def bpe(**options) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL + BYTES, show_progress=False, **options)


def build(family: str) -> tokenizers.Tokenizer:
    if family == "metaspace":
        made = train(models.BPE(unk_token="<unk>"), bpe())
        made.decoder = decoders.Metaspace()
    elif family == "llama2":
        made = train(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True), bpe())
        made.pre_tokenizer = None
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        made.decoder = decoders.Sequence(steps)
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        spec = json.loads(made.to_str())
        spec["added_tokens"] = spec["added_tokens"][: len(SPECIAL)]  # bytes are tokens like others
        made = tokenizers.Tokenizer.from_str(json.dumps(spec))
    elif family == "unigram":
        trainer = trainers.UnigramTrainer(
            vocab_size=600, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
        made = train(models.Unigram(), trainer)
        made.normalizer = normalizers.NFKC()
        made.decoder = decoders.Metaspace()
    elif family in ("wordpiece", "cleaned"):
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
        made.normalizer = normalizers.BertNormalizer()
        trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=SPECIAL, show_progress=False)
        made.train_from_iterator([TEXT], trainer)
        ends = [("<s>", 1), ("</s>", 2)]
        made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    elif family == "suffix":
        made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder("</w>")
        made.train_from_iterator([TEXT], bpe(end_of_word_suffix="</w>"))
    else:  # byte-level, with something that ours does not read
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=family == "prefixed")
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
        made.train_from_iterator([TEXT], trainer)
        if family == "stripping":
            made.add_tokens([AddedToken("<x>", lstrip=True, rstrip=True)])
        if family == "gaps":
            spec = json.loads(made.to_str())
            spec["model"]["vocab"]["far"] = 900
            made = tokenizers.Tokenizer.from_str(json.dumps(spec))
    return made


@cache
def family(name: str):
    """(ours, transformers')"""
    from transformers import AutoTokenizer

    place = Path(mkdtemp())
    build(name).save(str(place / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "bos_token": "<s>",
        "unk_token": "<unk>",
    }
    config |= {"clean_up_tokenization_spaces": name == "cleaned"}
    (place / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(place)
    assert isinstance(ours, HuggingFaceTokenizer)
    return ours, AutoTokenizer.from_pretrained(place)


def streamed(ours, ids, skip) -> list[str]:
    decoder = ours.stream_decoder(skip)
    return [decoder.push(i) for i in ids] + [decoder.flush()]


@pytest.mark.parametrize("name", FAMILIES)
@given(text=texts, skip=st.booleans())
@example(text="", skip=True)
@example(text="The cat 's hat , is n't it ? </s> a", skip=True)
def test_text_and_ids_are_transformers(name, text, skip):
    ours, theirs = family(name)
    for add in (True, False):
        ids = ours.encode(text, add_special_tokens=add)
        assert ids == theirs.encode(text, add_special_tokens=add)
    assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert "".join(streamed(ours, ids, skip)) == ours.decode(ids, skip)


@pytest.mark.parametrize("name", FAMILIES)
@given(ids=st.lists(st.integers(0, 950), max_size=25), skip=st.booleans())
def test_any_ids_are_transformers_and_stream(name, ids, skip):
    """Also ids that no text gives: broken characters, runs of bytes, ids that nobody has."""
    ours, theirs = family(name)
    assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert "".join(streamed(ours, ids, skip)) == ours.decode(ids, skip)


@given(
    st.lists(st.sampled_from([0, 1, 2, 3 + 0xE2, 3 + 0x82, 3 + 0xAC, 3 + 0x41, 300, 301, 302]), max_size=12),
    st.booleans(),
)
@example([3 + 0xE2, 3 + 0x82, 3 + 0xAC, 3 + 0xE2], False)  # the last one makes the whole run no text
def test_runs_of_bytes_stream(ids, skip):
    ours, theirs = family("llama2")
    assert "".join(streamed(ours, ids, skip)) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", ["llama2", "prefixed", "unigram"])
def test_streams_words_as_they_come_and_no_half_character(name):
    ours, _ = family(name)
    text = "the number of people" if name == "unigram" else "the number 🙂 of people"
    pieces = streamed(ours, ours.encode(text, add_special_tokens=False), True)
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) >= 4
    assert len(pieces[-1]) <= 1


@pytest.mark.parametrize("name", FAMILIES)
def test_facts_are_transformers(name):
    ours, theirs = family(name)
    assert (ours.eos_token_id, ours.bos_token_id) == (theirs.eos_token_id, theirs.bos_token_id) == (2, 1)
    assert ours.special_tokens == theirs.get_added_vocab()
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    ours.chat_template = template = "{% for m in messages %}{{ bos_token + m.content + eos_token }}{% endfor %}"
    chat = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat, chat_template=template, tokenize=False)


@pytest.mark.parametrize("name", ["llama2", "prefixed", "unigram", "metaspace"])
def test_bytes_of_tokens_joined_are_the_text(name):
    ours, _ = family(name)
    text = "the number of people" if name in ("unigram", "metaspace") else "the number 🙂 of people"
    ids = ours.encode(text, add_special_tokens=False)
    assert b"".join(map(ours.token_bytes, ids)).decode().lstrip() == text
    assert ours.token_bytes(2) == b"</s>"


@pytest.mark.parametrize("options", [{}, {"legacy": True}, {"add_prefix_space": False}, {"add_bos_token": True}])
@pytest.mark.parametrize("name", ["llama2", "metaspace"])
def test_a_class_that_transformers_builds_anew(tmp_path, name, options):
    """LlamaTokenizer has its own idea of the spaces around special tokens, whatever tokenizer.json says."""
    from transformers import AutoTokenizer

    build(name).save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | options))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("hello world", "  two", "a\n b", "</s>x", "</s> x", "🙂 é", "", " the  the\n\n", "日本語 12345"):
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids) == "".join(streamed(ours, ids, False))


def test_what_transformers_does_not_know_the_library_reads(tmp_path):
    """Nor is code run that came with the model."""
    build("llama2").save(str(tmp_path / "tokenizer.json"))
    config = {
        "tokenizer_class": "Strange",
        "auto_map": {"AutoTokenizer": ["strange.Strange", None]},
        "eos_token": "</s>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "strange.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    ours = load_tokenizer(tmp_path)
    assert ours.encode("hello</s>") == build("llama2").encode("hello</s>").ids
    assert ours.eos_token_id == 2
    assert not (tmp_path / "ran").exists()


def test_bad_input():
    ours, _ = family("gaps")
    for call in (lambda: ours.decode([-1]), lambda: ours.token_bytes(-1), lambda: ours.stream_decoder().push(-1)):
        with pytest.raises(ValueError, match="token_id: expected an id in 0..900"):
            call()
    for unknown in (899, 5000):
        assert ours.decode([unknown]) == "" == "".join(streamed(ours, [unknown], False))
        with pytest.raises(ValueError, match="token_id"):
            ours.token_bytes(unknown)
    with pytest.raises(TypeError, match="text: expected a str"):
        ours.encode(b"x")
    with pytest.raises(ValueError, match="surrogate"):
        ours.encode("\ud800")


def test_ours_where_ours_reads_it(tmp_path):
    Tokenizer.train("hello world " * 9, 20, ["<e>"], eos_token="<e>").save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), Tokenizer)
    code = "import sys; from minillm.model.tokenizer_hf import load_tokenizer; load_tokenizer(sys.argv[1]);"
    code += "sys.exit('transformers' in sys.modules)"  # it takes seconds
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 0


@pytest.mark.parametrize(
    "change", [{"model": {"type": "Nonsense"}}, {"model": None}, {"pre_tokenizer": {"type": "Nonsense"}}]
)
def test_what_nobody_reads_names_the_file(tmp_path, change):
    Tokenizer.train("hello world " * 9, 20, ["<e>"], eos_token="<e>").save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec | change))
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(tmp_path)
