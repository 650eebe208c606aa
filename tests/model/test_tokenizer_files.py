"""Special tokens and added tokens out of up to six files, against transformers' AutoTokenizer on the same directory."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from minillm.model.tokenizer import Tokenizer
from minillm.model.tokenizer_files import read_tokenizer_files
from minillm.model.tokenizer_hf import load_tokenizer

TRAINED = Tokenizer.train("hello world, the quick brown fox. " * 20, 30, ["<|end|>", "<|im_end|>"], eos_token="<|end|>")
SIZE = TRAINED.vocab_size
NAMES = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token", "image_token"]
CONTENTS = ["<|new|>", "<|end|>", "<|im_end|>", "<|far|>", "hello", " the"]  # "é" decodes better here than there
TEXT = "hello<|new|> the <|end|>quick<|far|> hello<|im_end|>é"


def flagged(content: str, **flags) -> dict:
    base = {"content": content, "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    return base | {"single_word": False} | flags


def write(place: Path, files: dict[str, dict]) -> None:
    TRAINED.save(place)
    config = json.loads((place / "tokenizer_config.json").read_text())
    for name, content in files.items():
        if name == "tokenizer_config.json":
            content = {k: v for k, v in (config | content).items() if v is not ...}
        (place / name).write_text(json.dumps(content))


def both(files: dict[str, dict]) -> tuple:
    """(ours, theirs): ids of a text with and without, ends, and names."""
    with TemporaryDirectory() as name:
        write(Path(name), files)
        ours, theirs = load_tokenizer(name), AutoTokenizer.from_pretrained(name)
    ids = theirs.encode(TEXT)
    found = ours.encode(TEXT), ours.eos_token_id, ours.bos_token_id, ours.named_tokens, ours.decode(ids, True)
    ends = theirs.eos_token_id, theirs.bos_token_id
    return found, (ids, *ends, dict(theirs.special_tokens_map), theirs.decode(ids, skip_special_tokens=True))


CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
CASES = {
    "listed in the config": {CONFIG: {"added_tokens_decoder": {str(SIZE): flagged("<|new|>")}}},
    "and it is the end": {CONFIG: {"added_tokens_decoder": {str(SIZE): flagged("<|new|>")}, "eos_token": "<|new|>"}},
    "with a gap": {CONFIG: {"added_tokens_decoder": {str(SIZE + 9): flagged("<|new|>"), "2000": flagged("<|far|>")}}},
    "another id for a known one": {CONFIG: {"added_tokens_decoder": {"5": flagged("<|end|>")}}},
    "other flags": {CONFIG: {"added_tokens_decoder": {"0": flagged("<|end|>", lstrip=True, special=False)}}},
    "a file of its own": {ADDED: {"<|new|>": SIZE, "<|far|>": SIZE + 1}},
    "and its end in the map": {CONFIG: {"eos_token": ...}, ADDED: {"<|new|>": SIZE}, MAP: {"eos_token": "<|new|>"}},
    "end in the map only": {CONFIG: {"eos_token": None}, MAP: {"eos_token": "<|im_end|>"}},
    "the map takes it away": {MAP: {"eos_token": None}},
    "the map as dictionary": {MAP: {"eos_token": {"content": "<|im_end|>", "lstrip": False}}},
    "the map beside a list is not read": {CONFIG: {"added_tokens_decoder": {}}, MAP: {"eos_token": "<|im_end|>"}},
    "end as an AddedToken": {CONFIG: {"eos_token": {"__type": "AddedToken", **flagged("<|im_end|>")}}},
    "end nobody lists": {CONFIG: {"eos_token": "<|new|>"}},
    "end is a word": {CONFIG: {"eos_token": "hello"}},
    "more special ones": {CONFIG: {"additional_special_tokens": ["<|new|>", "<|im_end|>"]}},
    "more, newer name": {CONFIG: {"extra_special_tokens": ["<|far|>", "<|new|>"]}},
    "more with names": {CONFIG: {"extra_special_tokens": {"image_token": "<|new|>"}}},
    "a name of the model's own": {CONFIG: {"image_token": "<|new|>", "add_bos_token": True, "bos_token": "<|end|>"}},
    "not special": {CONFIG: {"added_tokens_decoder": {str(SIZE): flagged("<|new|>", special=False, normalized=True)}}},
}


@pytest.mark.parametrize("files", CASES.values(), ids=CASES)
def test_as_transformers(files):
    ours, theirs = both(files)
    assert ours == theirs


tokens = st.sampled_from(CONTENTS)
either = tokens | tokens.map(lambda t: {"__type": "AddedToken", **flagged(t)})
decoder = st.dictionaries(
    st.integers(0, SIZE + 5).map(str), st.builds(flagged, tokens, special=st.booleans(), normalized=st.booleans())
)
configs = st.fixed_dictionaries(
    {},
    optional={
        "added_tokens_decoder": decoder,
        "additional_special_tokens": st.lists(tokens, max_size=3, unique=True),
        **{name: st.none() | either for name in NAMES},
    },
)
maps = st.dictionaries(
    st.sampled_from(NAMES[:-1]), st.none() | tokens | tokens.map(lambda t: {"content": t}), max_size=3
)
added = st.dictionaries(tokens, st.integers(SIZE, SIZE + 5), max_size=3).filter(lambda d: len({*d.values()}) == len(d))


@settings(max_examples=400)
@given(configs, maps | st.none(), added | st.none())
@example({}, {"pad_token": "<|new|>"}, {"<|far|>": SIZE, "<|new|>": SIZE + 1})
def test_any_mixture_as_transformers(config, special_map, added_tokens):
    files = {CONFIG: config, MAP: special_map, ADDED: added_tokens}
    ours, theirs = both({name: content for name, content in files.items() if content is not None})
    assert ours == theirs


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({CONFIG: {"eos_token": 5}}, r"tokenizer_config\.json: eos_token: expected a token, got 5"),
        ({CONFIG: {"eos_token": {"lstrip": True}}}, r"tokenizer_config\.json: eos_token"),
        ({CONFIG: {"added_tokens_decoder": ["x"]}}, r"tokenizer_config\.json: added_tokens_decoder"),
        ({CONFIG: {"added_tokens_decoder": {"x": "y"}}}, r"tokenizer_config\.json: added_tokens_decoder"),
        ({CONFIG: {"added_tokens_decoder": {"5": 3}}}, r"tokenizer_config\.json: added_tokens_decoder\[5\]"),
        ({CONFIG: {"extra_special_tokens": 3}}, r"tokenizer_config\.json: extra_special_tokens"),
        ({CONFIG: {"chat_template": [{"name": "x"}]}}, r"tokenizer_config\.json: chat_template"),
        ({CONFIG: {"chat_template": 3}}, r"tokenizer_config\.json: chat_template"),
        ({ADDED: {"<|new|>": "one"}}, r"added_tokens\.json: expected tokens and their ids"),
        ({ADDED: ["<|new|>"]}, r"added_tokens\.json: expected a JSON object"),
        ({MAP: ["<|new|>"]}, r"special_tokens_map\.json: expected a JSON object"),
        ({"tokenizer.json": {"added_tokens": 3}}, r"tokenizer\.json: added_tokens: expected a list"),
        ({"tokenizer.json": {"added_tokens": [{}]}}, r"tokenizer\.json: added_tokens: expected a list"),
    ],
)
def test_malformed_files_are_named(tmp_path, files, says):
    write(tmp_path, files)
    with pytest.raises(ValueError, match=says):
        load_tokenizer(tmp_path)


def test_padding_of_the_tokenizer_names_a_token(tmp_path):
    write(tmp_path, {})
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["padding"] = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None}
    spec["padding"] |= {"pad_id": 1, "pad_type_id": 0, "pad_token": "<|im_end|>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert load_tokenizer(tmp_path).named_tokens["pad_token"] == AutoTokenizer.from_pretrained(tmp_path).pad_token
    assert load_tokenizer(tmp_path).encode("hello") == AutoTokenizer.from_pretrained(tmp_path).encode("hello")


def test_tokens_that_are_there_stay_as_they_are(tmp_path):
    """added_tokens.json knows no flags: what tokenizer.json says of the same ids holds."""
    write(tmp_path, {ADDED: {"<|im_end|>": 1, "<|end|>": 0}})
    assert read_tokenizer_files(tmp_path).spec == json.loads((tmp_path / "tokenizer.json").read_text())


def test_a_template_that_is_no_text_is_named(tmp_path):
    write(tmp_path, {})
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja: not UTF-8"):
        load_tokenizer(tmp_path)


def test_templates_in_files_of_their_own(tmp_path):
    write(tmp_path, {CONFIG: {"chat_template": "from the config"}})
    assert read_tokenizer_files(tmp_path).chat_template == "from the config"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (tmp_path / "chat_template.jinja").write_text("plain")
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.chat_template == theirs.chat_template == {"default": "plain", "tool_use": "tools"}
