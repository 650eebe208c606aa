"""LLM and the naive oracle: against transformers' generate, streaming, stopping, and bad input."""

import pytest
import torch

from minillm import LLM, SamplingParams
from minillm.config import ModelConfig
from minillm.engine.text import StopText
from minillm.generate import naive
from minillm.model import Transformer
from minillm.model.weights import save

GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture
def llm(smollm_llm):
    return smollm_llm


@pytest.fixture(scope="module")
def dummy(tmp_path_factory):
    """A tiny model with random weights and no tokenizer."""
    config = ModelConfig(60, 32, 48, 2, 4, 2, 8, max_position_embeddings=64, eos_token_ids=(0,))
    folder = save(Transformer(config), tmp_path_factory.mktemp("tiny") / "model")
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    return LLM(folder, load_format="dummy", device="cpu")


@pytest.mark.slow
def test_greedy_equals_transformers(llm, smollm_reference, hf_tokenizer):
    prompts = ["The capital of France is", "def add(a, b):", "🙂 In the beginning"]
    outs = llm.generate(prompts, GREEDY, use_tqdm=False)
    for prompt, out in zip(prompts, outs, strict=True):
        ids = hf_tokenizer(prompt, return_tensors="pt")
        whole = smollm_reference.generate(**ids, max_new_tokens=12, do_sample=False)[0]
        assert out.prompt_token_ids == ids["input_ids"][0].tolist()
        assert out.token_ids == whole[len(out.prompt_token_ids) :].tolist()
        assert out.text == hf_tokenizer.decode(out.token_ids, skip_special_tokens=True)
        assert out.metrics.num_generated_tokens == len(out.token_ids)


@pytest.mark.slow
def test_answers_sensibly(llm):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    [out] = llm.chat(question, SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
    assert "Paris" in out.text
    assert out.finish_reason == "stop"
    assert "<|im_end|>" not in out.text
    assert out.token_ids[-1] in llm.model.config.eos_token_ids


def test_chat_prompt_equals_transformers(llm, hf_tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a cache?"}]
    expected = hf_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert llm.chat_prompt(messages) == expected


@pytest.mark.slow
def test_stream_gives_the_same_text(llm):
    stream = llm.stream("Once upon a time", GREEDY)
    text = "".join(stream)
    assert text == llm.generate("Once upon a time", GREEDY, use_tqdm=False)[0].text == stream.output.text
    m = stream.output.metrics
    assert 0 < m.time_to_first_token < m.total_time
    assert m.tokens_per_second > 0


class TestStopping:
    def test_length(self, dummy):
        [out] = dummy.generate(
            [[1, 2, 3]], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), use_tqdm=False
        )
        assert (len(out.token_ids), out.finish_reason) == (5, "length")

    def test_context(self, dummy):
        """Generation ends when the context is full."""
        limit = dummy.max_model_len
        [out] = dummy.generate([[1] * (limit - 3)], SamplingParams(max_tokens=50, ignore_eos=True), use_tqdm=False)
        assert (len(out.token_ids), out.finish_reason) == (3, "length")

    def test_end_token_and_min_tokens(self, dummy):
        free = dummy.generate([[5]], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False)[0]
        end = free.token_ids[2]
        first = free.token_ids.index(end)
        stopped = dummy.generate(
            [[5]], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, stop_token_ids=[end]), use_tqdm=False
        )[0]
        assert stopped.token_ids == free.token_ids[: first + 1]
        assert stopped.finish_reason == "stop"
        params = SamplingParams(temperature=0, max_tokens=8, min_tokens=8, ignore_eos=True, stop_token_ids=[end])
        late = dummy.generate([[5]], params, use_tqdm=False)[0]
        assert len(late.token_ids) == 8
        assert end not in late.token_ids[:-1] or first >= 7

    @pytest.mark.slow
    def test_stop_string(self, llm):
        params = SamplingParams(temperature=0, max_tokens=40, stop=["Paris"])
        [out] = llm.generate(["The capital of France is"], params, use_tqdm=False)
        assert "Paris" not in out.text
        assert out.finish_reason == "stop"


class Letters:
    """A decoder whose tokens are characters."""

    def push(self, token: int) -> str:
        return chr(token)

    def flush(self) -> str:
        return ""


@pytest.mark.parametrize(
    ("stop", "text", "expected"),
    [
        (["END"], "abcENDxyz", "abc"),
        (["END"], "abcENxEND", "abcENx"),
        (["END"], "abcEN", "abcEN"),
        (["aab"], "aaab", "a"),
        (["x", "abc"], "ababcx", "ab"),
        ([], "abc", "abc"),
    ],
)
def test_stop_strings_across_tokens(stop, text, expected):
    """Held back until it is clear; what was given out is never taken back."""
    stream, given = StopText(stop, Letters()), ""
    for character in text:
        given += stream.push(ord(character))
        assert expected.startswith(given)
        if stream.stopped:
            break
    assert given + stream.flush() == expected


@pytest.mark.parametrize(
    ("stop", "first", "expected"),
    [
        (["b"], 3, "abx"),  # came too early, alone
        (["b", "abc"], 3, "abx"),  # ... and still held back for the sake of the other
        (["bx"], 3, "a"),  # begins before, ends after
        (["x", "bx"], 3, "a"),
        (["ab"], 2, ""),
    ],
)
def test_a_stop_string_that_came_too_early_never_counts(stop, first, expected):
    stream, text = StopText(stop, Letters()), ""
    for count, character in enumerate("abx", 1):
        text += stream.push(ord(character), may_stop=count >= first)
        if stream.stopped:
            break
    assert text + stream.flush() == expected


class TestSampling:
    def test_seed(self, dummy):
        params = [SamplingParams(seed=s, max_tokens=10, ignore_eos=True) for s in (1, 1, 2)]
        a, b, c = dummy.generate([[3]] * 3, params, use_tqdm=False)
        assert a.token_ids == b.token_ids != c.token_ids

    def test_logprobs(self, dummy):
        params = SamplingParams(temperature=0, max_tokens=4, logprobs=3, ignore_eos=True)
        [out] = dummy.generate([[3, 4]], params, use_tqdm=False)
        assert len(out.logprobs) == 4
        with torch.no_grad():
            logits = dummy.model.logits(dummy.model(torch.tensor([[3, 4]])))[0, -1]
        best = logits.log_softmax(-1).topk(3)
        assert list(out.logprobs[0]) == best.indices.tolist()
        assert list(out.logprobs[0].values()) == pytest.approx(best.values.tolist(), abs=1e-5)
        [chosen] = dummy.generate([[3, 4]], SamplingParams(max_tokens=1, logprobs=0, seed=0), use_tqdm=False)
        assert list(chosen.logprobs[0]) == chosen.token_ids

    def test_oracle_recomputes_everything(self, dummy):
        """Greedy, spelled out with nothing but the model."""
        sequence = [7, 8, 9]
        for _ in range(6):
            with torch.no_grad():
                hidden_states = dummy.model(torch.tensor([sequence]))
                sequence.append(int(dummy.model.logits(hidden_states)[0, -1].argmax()))
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        assert [int(t) for t in naive(dummy.model, [7, 8, 9], params)] == sequence[3:]
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, stop_token_ids=[sequence[4]])
        stopped = list(naive(dummy.model, [7, 8, 9], params))
        assert stopped == sequence[3 : 4 + sequence[3:].index(sequence[4])]
        assert stopped[-1].is_end


class TestBadInput:
    @pytest.mark.parametrize(
        ("prompts", "says"),
        [
            ([[]], r"prompts\[0\]: expected 1 to \d+ tokens"),
            ([[1], [999]], r"prompts\[1\]: expected ids in 0\.\."),
            ([[-1]], "got -1"),
            ([[1] * 1000], "shorten it"),
            (["text"], "no tokenizer.json"),
            ([3.5], "expected text or a list of token ids, got float"),
            ([[1, "a"]], "expected text or a list"),
        ],
    )
    def test_prompts(self, dummy, prompts, says):
        with pytest.raises(ValueError, match=says):
            dummy.generate(prompts, GREEDY, use_tqdm=False)

    def test_params(self, dummy):
        with pytest.raises(ValueError, match=r"sampling_params: expected one for all or one each \(2\), got 1"):
            dummy.generate([[1], [2]], [GREEDY], use_tqdm=False)

    def test_arguments(self, smollm_path, tmp_path):
        with pytest.raises(ValueError, match="load_format"):
            LLM(smollm_path, load_format="gguf")
        with pytest.raises(ValueError, match="max_model_len: expected 2 to 8192"):
            LLM(smollm_path, max_model_len=10_000)
        with pytest.raises(ValueError, match="did you mean"):
            LLM("smollm2-135m")
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            LLM(tmp_path)

    def test_empty_list(self, dummy):
        assert dummy.generate([], GREEDY, use_tqdm=False) == []
