"""The model against transformers: the real SmolLM2, and small random Llama and Qwen3 models in every variant."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from minillm.config import ModelConfig
from minillm.data import reference_text
from minillm.kernels.rope import rotated
from minillm.model import Transformer
from minillm.model.layers import PaddedBatch, RMSNorm, attention, rope_tables
from minillm.model.weights import load, save

LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500_000.0,
}
LINEAR_ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
VARIANTS = [
    *itertools.product([LlamaConfig], [4, 2, 1], [True, False], [None]),
    *itertools.product([Qwen3Config], [4, 2, 1], [True, False], [None]),
    (LlamaConfig, 2, False, LLAMA_3_ROPE),
    (LlamaConfig, 4, True, LINEAR_ROPE),
    (Qwen3Config, 2, True, LLAMA_3_ROPE),
]


def random_pair(folder, kind, kv_heads, tie, rope):
    """A small random model of transformers, and ours read from what it saves."""
    torch.manual_seed(0)
    config = kind(
        vocab_size=131,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=tie,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 10_000.0},
        initializer_range=0.2,
    )
    theirs = {LlamaConfig: LlamaForCausalLM, Qwen3Config: Qwen3ForCausalLM}[kind](config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)  # weights of one would hide a forgotten multiplication
    theirs.save_pretrained(folder)
    return theirs, load(folder, device="cpu", dtype="float32")


def _id(value) -> str:
    return getattr(value, "__name__", None) or (value["rope_type"] if isinstance(value, dict) else str(value))


@pytest.mark.parametrize(("kind", "kv_heads", "tie", "rope"), VARIANTS, ids=_id)
@torch.no_grad()
def test_random_models_equal_transformers(tmp_path, kind, kv_heads, tie, rope):
    theirs, ours = random_pair(tmp_path, kind, kv_heads, tie, rope)
    token_ids = torch.randint(0, 131, (3, 100))
    torch.testing.assert_close(ours.logits(ours(token_ids)), theirs(token_ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
@torch.no_grad()
def test_padded_batches(tmp_path, kind, side):
    """Padding on either side: equal to transformers with the same mask, and to each sequence alone."""
    theirs, ours = random_pair(tmp_path, kind, 2, True, None)
    lengths, longest = [5, 23, 1, 40], 40
    rows = [torch.randint(0, 131, (n,)) for n in lengths]
    token_ids, mask = torch.zeros(4, longest, dtype=torch.long), torch.zeros(4, longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        token_ids[i, where], mask[i, where] = row, True
    batch = PaddedBatch(mask)
    got = ours.logits(ours(token_ids, batch))
    expected = theirs(token_ids, attention_mask=mask.long(), position_ids=batch.positions).logits
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got[mask], expected[mask], atol=1e-5, rtol=0)
    for i, row in enumerate(rows):
        alone = ours.logits(ours(row[None]))[0]
        torch.testing.assert_close(got[i][mask[i]], alone, atol=1e-5, rtol=0)


PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "1, 1, 2, 3, 5, 8, 13,",
    "Once upon a time, in a village by the sea, there lived",
    "Q: What is 12 times 12?\nA:",
    "Les sanglots longs des violons de l'automne",
    "🙂 naïve café, Ωmega — “quotes” and\ttabs\n\n\n",
    "<|im_start|>user\nWhat is a cache?<|im_end|>\n<|im_start|>assistant\n",
    "x",
]


def _ten_prompts(tokenizer) -> list[list[int]]:
    text = reference_text()["function"] + reference_text()["class"] + reference_text()["assignment"]
    return [tokenizer.encode(p) for p in PROMPTS] + [tokenizer.encode(text)[:512]]


@pytest.mark.slow
@torch.no_grad()
def test_smollm_logits_equal_transformers(smollm, smollm_reference, hf_tokenizer):
    prompts = _ten_prompts(hf_tokenizer)
    assert len(prompts) == 10
    assert max(map(len, prompts)) == 512
    for ids in prompts:
        token_ids = torch.tensor([ids])
        got, expected = smollm.logits(smollm(token_ids)), smollm_reference(token_ids).logits
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@torch.no_grad()
def test_smollm_greedy_equals_transformers(smollm, smollm_reference, hf_tokenizer):
    """64 greedy tokens after each of ten prompts.

    One forward pass over prompt and continuation shows what our model would choose after every prefix: if each choice
    is the token that transformers generated there, our own greedy loop generates the same 64, by induction. (The loop
    itself is tested in test_llm.py.)
    """
    for ids in _ten_prompts(hf_tokenizer):
        settings = {
            "max_new_tokens": 64,
            "min_new_tokens": 64,
            "do_sample": False,
            "eos_token_id": [],
            "pad_token_id": 2,
        }
        whole = smollm_reference.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **settings)
        assert whole.shape[1] == len(ids) + 64
        chosen = smollm.logits(smollm(whole[:, :-1]))[0, len(ids) - 1 :].argmax(-1)
        assert chosen.tolist() == whole[0, len(ids) :].tolist()


class TestParts:
    @given(st.integers(1, 40), st.integers(1, 3), st.integers(0, 2**31))
    def test_rms_norm(self, size, rows, seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, size, generator=generator) * 10.0 ** (seed % 5 - 3)  # at 1e-3 epsilon counts
        norm = RMSNorm(size, 1e-5)
        norm.weight.data.uniform_(0.5, 2, generator=generator)
        expected = torch.nn.functional.rms_norm(x.double(), (size,), norm.weight.double(), 1e-5)
        torch.testing.assert_close(norm(x), expected.float(), atol=1e-5, rtol=1e-5)

    def test_rope_depends_on_the_distance_alone(self):
        config = ModelConfig(8, 32, 8, 1, 2, 2, 16, max_position_embeddings=64)
        cos, sin = rope_tables(config)
        q, k = torch.randn(1, 2, 16).double(), torch.randn(1, 2, 16).double()

        def score(i, j):
            at = lambda x, p: rotated(x, cos[p : p + 1].double(), sin[p : p + 1].double())  # noqa: E731
            return (at(q, i) * at(k, j)).sum(-1)

        torch.testing.assert_close(score(9, 4), score(50, 45), atol=1e-5, rtol=0)
        assert not torch.allclose(score(9, 4), score(9, 5), atol=1e-3)

    @given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([(4, 4), (4, 2), (6, 1)]), st.integers(0, 2**31))
    def test_attention_with_a_mask(self, queries, keys, heads, seed):
        """Against the formula, spelled out head by head."""
        generator = torch.Generator().manual_seed(seed)
        q = torch.randn(2, queries, heads[0], 8, generator=generator)
        k, v = (torch.randn(2, keys, heads[1], 8, generator=generator) for _ in range(2))
        mask = torch.rand(2, 1, queries, keys, generator=generator) < 0.6
        mask[..., 0] = True
        got = attention(q, k, v, mask)
        for b, h in itertools.product(range(2), range(heads[0])):
            kv = h // (heads[0] // heads[1])
            scores = q[b, :, h] @ k[b, :, kv].T / 8**0.5
            weights = scores.masked_fill(~mask[b, 0], float("-inf")).softmax(-1)
            torch.testing.assert_close(got[b, :, h], weights @ v[b, :, kv], atol=1e-5, rtol=1e-4)


class TestTransformer:
    CONFIG = ModelConfig(50, 32, 48, 2, 4, 2, 8, max_position_embeddings=16, tie_word_embeddings=True)

    @pytest.mark.parametrize("ids", [[[50]], [[-1]], [[0, 1, 99]]])
    def test_ids_outside_the_vocabulary(self, ids):
        with pytest.raises(ValueError, match=r"token_ids: expected ids in 0\.\.49"):
            Transformer(self.CONFIG)(torch.tensor(ids))

    def test_beyond_the_context(self):
        model = Transformer(self.CONFIG)
        model(torch.zeros(1, 16, dtype=torch.long))
        with pytest.raises(ValueError, match="at most 16 tokens"):
            model(torch.zeros(1, 17, dtype=torch.long))

    def test_trains(self):
        """Gradients reach every parameter, and a few steps learn a repeated sequence."""
        torch.manual_seed(0)
        model = Transformer(self.CONFIG)
        ids = torch.arange(12).repeat(4, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(30):
            logits = model.logits(model(ids[:, :-1]))
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 4

    def test_causal(self):
        """What comes later changes nothing before it."""
        model = Transformer(self.CONFIG)
        a = torch.arange(10)[None]
        b = a.clone()
        b[0, 6:] = 40
        with torch.no_grad():
            torch.testing.assert_close(model(a)[:, :6], model(b)[:, :6])
            assert not torch.allclose(model(a)[:, 6:], model(b)[:, 6:])

    def test_residual_projections_start_small(self):
        config = ModelConfig(50, 256, 256, 8, 4, 4, 64)
        model = Transformer(config)
        assert abs(model.layers[0].mlp.gate_up_proj.weight.std().item() - 0.02) < 1e-3
        assert abs(model.layers[0].mlp.down_proj.weight.std().item() - 0.02 / 4) < 1e-3

    def test_saves_what_transformers_reads(self, tmp_path):
        model = Transformer(self.CONFIG)
        save(model, tmp_path / "model")
        theirs = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
        ids = torch.randint(0, 50, (2, 12))
        with torch.no_grad():
            torch.testing.assert_close(model.logits(model(ids)), theirs(ids).logits, atol=1e-5, rtol=0)
