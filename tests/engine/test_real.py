"""The real model: 64 prompts at once, against transformers one by one; text, stop strings, characters of many bytes."""

import pytest
import torch

from minillm import SamplingParams
from minillm.data import reference_text


@pytest.fixture
def llm(smollm_llm):
    return smollm_llm


@pytest.mark.slow
def test_64_prompts_at_once_equal_transformers_one_by_one(llm, smollm_reference):
    """Beginnings of 64 topics, 3 to 24 tokens, some with a common prefix; prompts are cut into chunks on the way.

    Each token is the likeliest after all before it: that is greedy generation, and a whole answer is checked at once.
    """
    llm.engine.metrics.reset()
    topics = list(reference_text().values())
    prompts = [llm.tokenizer.encode(text[:200])[: 3 + 7 * i % 22] for i, text in enumerate(topics[:56])]
    prompts += [prompts[5] + prompt[:6] for prompt in prompts[:8]]
    outs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True), use_tqdm=False)
    assert llm.engine.metrics.num_steps < 64  # together, not one after another
    order = sorted(range(64), key=lambda i: len(prompts[i]))
    for some in (order[start : start + 8] for start in range(0, 64, 8)):
        rows = [torch.tensor(prompts[i] + outs[i].token_ids) for i in some]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # behind the last token, where nobody looks
        with torch.no_grad():
            likeliest = smollm_reference(ids).logits.argmax(-1)
        for i, row in zip(some, likeliest, strict=True):
            first = len(prompts[i]) - 1
            assert outs[i].token_ids == row[first : first + 6].tolist()
    for prompt, out in list(zip(prompts, outs, strict=True))[:2]:
        ids = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "min_new_tokens": 6}
        whole = smollm_reference.generate(ids, do_sample=False, **options)[0]
        assert out.token_ids == whole[len(prompt) :].tolist()


@pytest.mark.slow
def test_stop_string_across_tokens(llm):
    """Cut the free text in the middle of a token, stop there: the text ends before it, wherever tokens begin."""
    free = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)[0]
    pieces = [llm.tokenizer.decode([t]) for t in free.token_ids]
    border = len("".join(pieces[:6]))
    stop = free.text[border - 2 : border + 3]
    params = SamplingParams(temperature=0, max_tokens=16, stop=[stop])
    [out] = llm.generate("The capital of France is", params, use_tqdm=False)
    assert out.text == free.text[: free.text.index(stop)]
    assert out.finish_reason == "stop"
    assert len(out.token_ids) < len(free.token_ids)
    assert "".join(llm.stream("The capital of France is", params)) == out.text


def test_text_comes_in_whole_characters(llm):
    """An engine fed with the bytes of emoji and accents: pieces join to the text, and none holds half a character."""
    text = "naïve 🙂🙃 — Ελλάδα 日本"
    ids = llm.tokenizer.encode(text)
    request = llm.engine._request("x", [1], SamplingParams(), 0)
    pieces = [request.text_stream.push(i) for i in ids] + [request.text_stream.flush()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert any(piece == "" for piece in pieces[:-1])  # some tokens end inside a character


@pytest.mark.slow
class TestLLM:
    PROMPTS = ("The capital of France is", "Water boils at", "Once upon a time")

    def test_n_and_prefix_cache(self, llm):
        params = SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=6)
        [out] = llm.generate(self.PROMPTS[0], params, use_tqdm=False)
        assert len(out.outputs) == 3
        assert len({tuple(o.token_ids) for o in out.outputs}) > 1
        assert out.text == out.outputs[0].text
        alone = SamplingParams(temperature=1.0, seed=4, max_tokens=6)
        assert llm.generate(self.PROMPTS[0], alone, use_tqdm=False)[0].token_ids == out.outputs[1].token_ids
        assert out.metrics.num_generated_tokens == sum(len(o.token_ids) for o in out.outputs)

    def test_interrupt(self, llm, monkeypatch):
        """Ctrl-C: it is raised, and everything came home."""
        step, calls = llm.engine.step, []

        def interrupted():
            calls.append(None)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return step()

        monkeypatch.setattr(llm.engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(list(self.PROMPTS), SamplingParams(max_tokens=20), use_tqdm=False)
        assert not llm.engine.has_unfinished()
        assert llm.engine.pool.num_used == 0
        monkeypatch.undo()
        [out] = llm.generate(self.PROMPTS[0], SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
        assert out.text.startswith(" Paris")

    def test_leaving_a_stream_ends_its_request(self, llm):
        stream = llm.stream(self.PROMPTS[2], SamplingParams(temperature=0, max_tokens=50))
        next(stream)
        stream.close()
        assert stream.output.finish_reason == "abort"
        assert not llm.engine.has_unfinished()
        assert llm.engine.pool.num_used == 0

    def test_two_streams_side_by_side(self, llm):
        params = SamplingParams(temperature=0, max_tokens=8)
        streams = [llm.stream(p, params) for p in self.PROMPTS[:2]]
        texts = ["", ""]
        for _ in range(20):
            for i, stream in enumerate(streams):
                texts[i] += next(stream, "")
        assert texts == [out.text for out in llm.generate(list(self.PROMPTS[:2]), params, use_tqdm=False)]

    def test_a_failed_request_is_reported(self, llm, broken_sampling):
        params = [SamplingParams(temperature=0, max_tokens=3), SamplingParams(top_k=3)]
        with pytest.warns(UserWarning, match="failed: ValueError"):
            good, bad = llm.generate(list(self.PROMPTS[:2]), params, use_tqdm=False)
        assert good.text.startswith(" Paris")
        assert bad.finish_reason == "error"
        assert isinstance(bad.outputs[0].error, ValueError)
        with pytest.raises(ValueError, match="top-k"):
            llm.generate(self.PROMPTS[0], params[1], use_tqdm=False)

    def test_bad_prompt_leaves_nothing_behind(self, llm):
        with pytest.raises(ValueError, match="n: expected 1 in a stream"):
            llm.stream("x", SamplingParams(n=2))
        with pytest.raises(ValueError, match=r"prompts\[1\]"):
            llm.generate(["fine", ""], use_tqdm=False)
        assert not llm.engine.has_unfinished()
