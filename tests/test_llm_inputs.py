"""What LLM takes: prompts and conversations of any form, defaults of the model's files, tokenizers of any family; and
what it says to what it does not take.
"""

import json
import shutil

import numpy as np
import pytest
import torch

from minillm import LLM, SamplingParams
from minillm.model.tokenizer import Tokenizer

from .conftest import tiny_directory
from .model.test_tokenizer_hf import FAMILIES, family

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
HELLO = "hello"


# ---- forms of prompts ----------------------------------------------------------------------------------------------

ARRAYS = {
    "list": list,
    "tuple": tuple,
    "NumPy": np.array,
    "NumPy int32": lambda ids: np.array(ids, np.int32),
    "NumPy's ints": lambda ids: list(np.array(ids)),
    "torch": torch.tensor,
    "torch's ints": lambda ids: list(torch.tensor(ids)),
}


@pytest.mark.parametrize("make", ARRAYS.values(), ids=ARRAYS)
def test_ids_of_any_kind(tiny_llm, make):
    """Alone, in a list, in a dictionary: each is the same prompt. One id alone is one, too."""
    ids = tiny_llm.tokenizer.encode("hello world")
    for prompts, expected in (
        (make(ids), [ids]),
        ([make(ids)], [ids]),
        ([make(ids), make([5])], [ids, [5]]),
        ([make([5]), make(ids)], [[5], ids]),
        ({"prompt_token_ids": make(ids)}, [ids]),
        ([{"prompt_token_ids": make(ids)}, "hello"], [ids, tiny_llm.tokenizer.encode("hello")]),
    ):
        outs = tiny_llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        assert [out.prompt_token_ids for out in outs] == expected
        assert all(type(i) is int for out in outs for i in out.prompt_token_ids)
    stream = tiny_llm.stream(make(ids), GREEDY)
    assert "".join(stream) == tiny_llm.generate([ids], GREEDY, use_tqdm=False)[0].text


def test_text_in_any_form(tiny_llm):
    forms = [HELLO, [HELLO], {"prompt": HELLO}, [{"prompt": HELLO}], {"prompt": HELLO, "cache_salt": "a"}]
    forms += [{"prompt": HELLO, "prompt_token_ids": None}, (HELLO,), iter([HELLO])]
    for form in forms:
        [out] = tiny_llm.generate(form, GREEDY, use_tqdm=False)
        assert (out.prompt, out.prompt_token_ids) == (HELLO, tiny_llm.tokenizer.encode(HELLO))
        assert len(out.token_ids) == 8


def test_salts_divide_the_prefix_cache(tiny_llm):
    ids, cached = list(range(40)), []
    for salt in ("one", "two", "one"):
        [out] = tiny_llm.generate({"prompt_token_ids": ids, "cache_salt": salt}, GREEDY, use_tqdm=False)
        cached.append(out.metrics.num_cached_tokens)
    assert cached == [0, 0, 32]


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        (5, "prompts: expected text, token ids or a list of them, got 5"),
        (None, "prompts: expected text"),
        ([None], r"prompts\[0\]: expected text or a list of token ids, got NoneType"),
        ([[1.5, 2.7]], r"prompts\[0\]: expected text or a list"),
        ([[True, False]], r"prompts\[0\]: expected text or a list"),
        (np.array([1.5]), r"prompts\[0\]: expected text or a list"),
        ([torch.tensor([[1, 2]])], r"prompts\[0\]: expected text or a list"),
        ({}, r'prompts\[0\]: expected {"prompt_token_ids": ids} or {"prompt": text}, got \[\]'),
        ({"prompt_ids": [1]}, r"prompts\[0\]: expected .*, got \['prompt_ids'\]"),
        ({"prompt": "x", "multi_modal_data": 1}, r"prompts\[0\]: expected"),
        (["fine", {"prompt_token_ids": []}], r"prompts\[1\]: expected 1 to \d+ tokens"),
    ],
)
def test_other_forms_are_refused_by_name(tiny_llm, prompts, says):
    with pytest.raises((ValueError, TypeError), match=says):
        tiny_llm.generate(prompts, GREEDY, use_tqdm=False)
    assert not tiny_llm.engine.has_unfinished()


def test_parameters_that_do_not_fit_the_model(tiny_llm):
    """They are looked at before anything runs: here, and where a request is added."""
    vocab = tiny_llm.model.config.vocab_size
    for options, says in (
        ({"logprobs": 10_000}, f"logprobs: expected at most {vocab}"),
        ({"prompt_logprobs": vocab + 1}, f"prompt_logprobs: expected at most {vocab}"),
        ({"stop_token_ids": [vocab]}, rf"stop_token_ids: expected ids in 0\.\.{vocab - 1}"),
        ({"logit_bias": {vocab: 1.0}}, rf"logit_bias: expected ids in 0\.\.{vocab - 1}"),
    ):
        params = SamplingParams(max_tokens=3, **options)
        with pytest.raises(ValueError, match=says):
            tiny_llm.generate([[5, 6], [7]], [GREEDY, params], use_tqdm=False)
        with pytest.raises(ValueError, match=says):
            tiny_llm.engine.add_request([5, 6], params)
        assert not tiny_llm.engine.has_unfinished()
    with pytest.raises(ValueError, match=r"sampling_params: expected one for all or one each \(2\), got 0"):
        tiny_llm.generate([[1], [2]], [], use_tqdm=False)
    with pytest.raises(TypeError, match="sampling_params: expected SamplingParams, got {'temperature': 1}"):
        tiny_llm.generate([[1]], [{"temperature": 1}], use_tqdm=False)
    with pytest.raises(TypeError, match="prompt_token_ids: expected a list of token ids"):
        tiny_llm.engine.add_request([1.5, 2.7], GREEDY)
    [out] = tiny_llm.generate([[5]], SamplingParams(max_tokens=1, logprobs=vocab), use_tqdm=False)
    assert len(out.logprobs[0]) == vocab


# ---- conversations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "messages",
    ["hello", {"role": "user", "content": "x"}, [], None, 5, [5], [[]], ["hello"], [[{"role": "user"}], 3],
     [[{"role": "user", "content": "x"}], []]],
    ids=str,
)  # fmt: skip
def test_what_is_no_conversation_is_refused_by_name(tiny_llm, messages):
    with pytest.raises((ValueError, TypeError), match="messages"):
        tiny_llm.chat(messages, GREEDY, use_tqdm=False)
    assert not tiny_llm.engine.has_unfinished()


def test_conversations(tiny_llm):
    llm, tokenizer = tiny_llm, tiny_llm.tokenizer
    one, other = [{"role": "user", "content": "hello"}], [{"role": "user", "content": "world"}]
    assert llm.chat_prompt(one) == tokenizer.encode("user: hello\n")
    [first] = llm.chat(one, GREEDY, use_tqdm=False)
    both = llm.chat([one, other], GREEDY, use_tqdm=False)
    assert [out.prompt_token_ids for out in both] == [llm.chat_prompt(one), llm.chat_prompt(other)]
    assert both[0].token_ids == first.token_ids


def test_a_conversation_needs_a_tokenizer(tiny_path, tmp_path):
    folder = shutil.copytree(tiny_path, tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"messages: this model directory has no tokenizer\.json"):
        LLM(folder, device="cpu").chat([{"role": "user", "content": "x"}], use_tqdm=False)


# ---- what the model's files say ------------------------------------------------------------------------------------


def test_recommended_parameters_are_used_when_none_are_given(tiny_path, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_path, tmp_path / "m")
    given = {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "repetition_penalty": 1.1, "max_new_tokens": 3}
    (folder / "generation_config.json").write_text(json.dumps({**given, "do_sample": True, "pad_token_id": 0}))
    recommended = SamplingParams(temperature=0.7, top_k=5, top_p=0.8, repetition_penalty=1.1, max_tokens=3)
    for option, expected in (({}, recommended), ({"generation_config": "none"}, SamplingParams())):
        llm, used = LLM(folder, device="cpu", **option), []
        add = llm.engine.add

        def spying(ids, params, add=add, used=used, **options):
            used.append(params)
            return add(ids, params, **options)

        monkeypatch.setattr(llm.engine, "add", spying)
        assert llm.default_params() == expected
        llm.generate(["hello", "world"], use_tqdm=False)
        "".join(llm.stream("hello"))
        assert used == [expected] * 3
        llm.generate("hello", GREEDY, use_tqdm=False)  # who gives some gets these alone
        assert used[3] == GREEDY
    with pytest.raises(ValueError, match="generation_config: expected 'auto' or 'none', got 'vllm'"):
        LLM(folder, generation_config="vllm")


@pytest.mark.parametrize("end", [1, None, [1, 3]])
def test_either_files_end_token_ends(tiny_path, tmp_path, end):
    """The tokenizer says <|im_end|>, config.json another one or none; all logits are equal, so token 0 is drawn."""
    tokenizer = Tokenizer.train("hello world " * 20, 10, ["<|im_end|>", "<|endoftext|>"], eos_token="<|im_end|>")
    folder = tiny_directory(tmp_path / "m", tokenizer)
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text()) | {"eos_token_id": end}
            (folder / name).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    llm = LLM(folder, device="cpu")
    assert llm.engine.end_token_ids == {0, *([end] if isinstance(end, int) else end or [2])}  # 2: Llama's own default
    llm.model.norm.weight.zero_()
    [out] = llm.generate("hello", SamplingParams(temperature=0, max_tokens=50), use_tqdm=False)
    assert (out.finish_reason, out.token_ids, out.text) == ("stop", [0], "")


# ---- tokenizers ----------------------------------------------------------------------------------------------------


def test_ids_that_no_token_has(tiny_llm):
    """The model has more rows than the tokenizer tokens; what is beyond has no text, and ends nothing."""
    size, hot = tiny_llm.tokenizer.vocab_size, [SamplingParams(max_tokens=60, seed=s, ignore_eos=True) for s in (1, 7)]
    outs = tiny_llm.generate(["hello", "world"], hot, use_tqdm=False)
    for out, params in zip(outs, hot, strict=True):
        assert out.finish_reason == "length"
        assert max(out.token_ids) >= size
        known = [i for i in out.token_ids if i < size]
        assert out.text == tiny_llm.tokenizer.decode(known, skip_special_tokens=True)
        assert "".join(tiny_llm.stream(out.prompt, params)) == out.text


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_give_transformers_text(tmp_path, name):
    """Tokens at random: byte tokens, pieces with and without a space in front, special ones, ids of nobody."""
    ours, theirs = family(name)
    folder = tiny_directory(tmp_path / "m", ours)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{theirs.name_or_path}/{file}", folder)
    llm = LLM(folder, device="cpu")
    params = [SamplingParams(max_tokens=40, seed=seed, ignore_eos=True, temperature=1.5) for seed in range(4)]
    outs = llm.generate(["The cat sat", "é 日本", "a b", "x"], params, use_tqdm=False)
    for out, one in zip(outs, params, strict=True):
        assert out.prompt_token_ids == theirs.encode(out.prompt)
        known = [i for i in out.token_ids if i < ours.vocab_size]
        assert out.text == theirs.decode(known, skip_special_tokens=True)
        assert "".join(llm.stream(out.prompt, one)) == out.text
    free = next(out for out in outs if len(out.text) > 12)
    stop = free.text[4:7]
    params = SamplingParams(
        max_tokens=40, seed=params[outs.index(free)].seed, ignore_eos=True, temperature=1.5, stop=stop
    )
    [out] = llm.generate(free.prompt, params, use_tqdm=False)
    assert (out.text, out.finish_reason) == (free.text[: free.text.index(stop)], "stop")


# ---- parameters together -------------------------------------------------------------------------------------------


def test_min_tokens_holds_back_stop_strings(tiny_llm):
    [free] = tiny_llm.generate("hello", GREEDY, use_tqdm=False)
    stop = next(text for t in free.token_ids if (text := tiny_llm.tokenizer.decode([t])).isascii() and text)
    options = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "stop": stop}
    [soon] = tiny_llm.generate("hello", SamplingParams(**options), use_tqdm=False)
    assert soon.finish_reason == "stop"
    count = len(soon.token_ids)
    [out] = tiny_llm.generate("hello", SamplingParams(**options, min_tokens=count + 1), use_tqdm=False)
    assert len(out.token_ids) > count
    assert stop in out.text


def test_numbers_beyond_fp32_are_refused():
    with pytest.raises(ValueError, match="temperature: expected a number, 0"):
        SamplingParams(temperature=1e39, min_tokens=4, max_tokens=5)
    with pytest.raises(ValueError, match="logit_bias: expected numbers"):
        SamplingParams(logit_bias={3: 1e39})
    with pytest.raises(ValueError, match="temperature"):
        SamplingParams(temperature=10**400)


def test_speculation_is_asked_for_by_vllms_names(tiny_path):
    asked = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    llm = LLM(tiny_path, device="cpu", speculative_config={**asked, "adaptive": False})
    config = llm.engine.config.speculative
    assert {name: getattr(config, name) for name in asked} == asked
    prompt, params = {"prompt_token_ids": [5, 6, 7] * 4}, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    [out] = llm.generate([prompt], params, use_tqdm=False)
    [plain] = LLM(tiny_path, device="cpu", speculative_config=None).generate([prompt], params, use_tqdm=False)
    assert out.token_ids == plain.token_ids
    assert llm.engine.metrics.num_drafts
    with pytest.raises(TypeError, match="speculative_config: expected some of method, .* got num_tokens"):
        LLM(tiny_path, device="cpu", speculative_config={"num_tokens": 3})
    with pytest.raises(TypeError, match="speculative_config: expected a dictionary or None, got 5"):
        LLM(tiny_path, device="cpu", speculative_config=5)
