"""The model against transformers: the real SmolLM2, and small random models of each type in every variant."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from minillm.config import ModelConfig
from minillm.data import reference_text
from minillm.generate import cached, cached_batch, naive
from minillm.kernels import HAS_TRITON, apply_rope, use
from minillm.model import Transformer
from minillm.model.layers import NoCache, PaddedBatch, RMSNorm, attention, rope_tables
from minillm.model.linear import Dense, Linear
from minillm.model.weights import load, save
from minillm.sampling import SamplingParams

LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500_000.0,
}
LINEAR_ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}  # in transformers' Qwen2 and Qwen3
VARIANTS = [
    *itertools.product([LlamaConfig, Qwen3Config], [4, 2, 1], [True, False], [None], [{}]),
    *itertools.product([Qwen2Config, MistralConfig], [4, 2], [True, False], [None], [{}]),
    (LlamaConfig, 2, False, LLAMA_3_ROPE, {}),
    (LlamaConfig, 4, True, LINEAR_ROPE, {}),
    (Qwen3Config, 2, True, LLAMA_3_ROPE, {}),
    (LlamaConfig, 2, False, None, {"attention_bias": True}),
    (LlamaConfig, 2, True, None, {"mlp_bias": True}),
    (LlamaConfig, 4, False, None, {"attention_bias": True, "mlp_bias": True}),
    (Qwen3Config, 2, False, None, {"attention_bias": True}),
    (Qwen3Config, 2, True, None, WINDOW),
    (Qwen2Config, 2, True, LINEAR_ROPE, WINDOW),
    (Qwen2Config, 1, False, None, {**WINDOW, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}),
    (MistralConfig, 2, False, None, {"sliding_window": 9}),
    (MistralConfig, 2, True, None, {"sliding_window": None}),
]
CLASSES = {
    LlamaConfig: LlamaForCausalLM,
    MistralConfig: MistralForCausalLM,
    Qwen2Config: Qwen2ForCausalLM,
    Qwen3Config: Qwen3ForCausalLM,
}


def random_pair(folder, kind, kv_heads, tie, rope, layers=3, **more):
    """A small random model of transformers, and ours read from what it saves."""
    torch.manual_seed(0)
    config = kind(
        vocab_size=131,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=tie,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 10_000.0},
        initializer_range=0.2,
        **more,
    )
    theirs = CLASSES[kind](config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)  # weights of one would hide a forgotten multiplication
            elif name.endswith("bias"):
                parameter.normal_()  # and biases of zero a forgotten sum
    theirs.save_pretrained(folder)
    return theirs, load(folder, device="cpu", dtype="float32")


def _id(value) -> str:
    if isinstance(value, dict):
        return value.get("rope_type", "+".join(value) or "plain")
    return getattr(value, "__name__", None) or str(value)


@pytest.mark.parametrize(("kind", "kv_heads", "tie", "rope", "more"), VARIANTS, ids=_id)
@torch.no_grad()
def test_random_models_equal_transformers(tmp_path, kind, kv_heads, tie, rope, more):
    """Both ways: what transformers writes and we read, and what we write and transformers reads."""
    theirs, ours = random_pair(tmp_path / "theirs", kind, kv_heads, tie, rope, **more)
    token_ids = torch.randint(0, 131, (3, 100))
    expected = theirs(token_ids).logits
    torch.testing.assert_close(ours.logits(ours(token_ids)), expected, atol=1e-5, rtol=0)
    save(ours, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    torch.testing.assert_close(again(token_ids).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("kind", "more"), [(LlamaConfig, {}), (Qwen3Config, {}), (MistralConfig, {"sliding_window": 9})], ids=_id
)
@torch.no_grad()
def test_padded_batches(tmp_path, kind, more, side):
    """Padding on either side: equal to transformers with the same mask, and to each sequence alone."""
    theirs, ours = random_pair(tmp_path, kind, 2, True, None, **more)
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

    One forward pass of transformers over prompt and continuation shows what it would choose after every prefix: if
    each choice is the token that we generated there, its own greedy loop generates the same 64, by induction.
    """
    prompts, params = _ten_prompts(hf_tokenizer), SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    # The long one alone: every row of a static batch is as wide as its longest.
    for some in (prompts[:-1], prompts[-1:]):
        for ids, generated in zip(some, cached_batch(smollm, some, params), strict=True):
            assert len(generated) == 64
            likeliest = smollm_reference(torch.tensor([ids + generated[:-1]])).logits[0, len(ids) - 1 :].argmax(-1)
            assert generated == likeliest.tolist()


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
            at = lambda x, p: apply_rope(x, cos[p : p + 1].double(), sin[p : p + 1].double())  # noqa: E731
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


class Int8(Linear):
    """A layer of another kind: rows in 8 bits, each with its scale, under names of its own."""

    made: list[tuple[str, dict[str, int]]] = []

    def __init__(self, name: str, in_features: int, parts: dict[str, int], bias: bool) -> None:
        super().__init__(in_features, parts)
        self.made.append((name, parts))
        assert not bias
        rows = self.out_features
        self.register_buffer("numbers", torch.randint(-127, 128, (rows, in_features), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(rows) / 500)

    def wanted(self):
        rows = self.parts.items()
        shapes = {f"{part}.weight_q": torch.Size((n, self.in_features)) for part, n in rows}
        return shapes | {f"{part}.scale": torch.Size((n,)) for part, n in rows}

    def load(self, tensors, device, dtype):
        assert tensors.keys() == self.wanted().keys()
        self.numbers = torch.cat([tensors[f"{part}.weight_q"] for part in self.parts]).to(device)
        self.scale = torch.cat([tensors[f"{part}.scale"] for part in self.parts]).to(device, dtype)

    def tensors(self):
        rows = list(self.parts.values())
        found = {f"{part}.weight_q": x for part, x in zip(self.parts, self.numbers.split(rows), strict=True)}
        return found | {f"{part}.scale": x for part, x in zip(self.parts, self.scale.split(rows), strict=True)}

    def forward(self, x, batch=None):
        return torch.nn.functional.linear(x, self.numbers.to(x.dtype)) * self.scale


def dense_twin(model: Transformer) -> Transformer:
    """The same model with plain matrices."""
    twin = Transformer(dataclasses.replace(model.config, tie_word_embeddings=False))
    for module, other in zip(model.modules(), twin.modules(), strict=True):
        if isinstance(module, Int8):
            assert isinstance(other, Dense)
            other.weight.data = module.numbers.float() * module.scale[:, None]
        elif isinstance(module, torch.nn.Embedding):
            other.weight.data = module.weight.data
    return twin


@pytest.mark.parametrize("tie", [True, False])
@torch.no_grad()
def test_another_kind_of_linear(tmp_path, tie):
    """Made, saved, loaded, run and generated with through the contract alone: all layers, and the head."""
    torch.manual_seed(0)
    Int8.made.clear()
    config = dataclasses.replace(TestTransformer.CONFIG, tie_word_embeddings=tie)
    model = Transformer(config, Int8)
    assert [name for name, _ in Int8.made] == [
        *(f"layers.{i}.{part}" for i in (0, 1)
          for part in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")),
        "lm_head",
    ]  # fmt: skip
    assert Int8.made[0][1] == {"q_proj": 32, "k_proj": 16, "v_proj": 16}
    stored = load_file(save(model, tmp_path / "m") / "model.safetensors")
    assert stored["model.layers.1.self_attn.k_proj.weight_q"].dtype == torch.int8
    assert stored["lm_head.scale"].shape == (50,)
    with pytest.raises(ValueError, match="quantized"):
        load(tmp_path / "m", "cpu")
    loaded, ids = load(tmp_path / "m", "cpu", linear=Int8), torch.randint(0, 50, (2, 12))
    assert torch.equal(loaded.logits(loaded(ids)), model.logits(model(ids)))
    twin = dense_twin(model)
    torch.testing.assert_close(loaded.logits(loaded(ids)), twin.logits(twin(ids)), atol=1e-5, rtol=1e-5)
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    tokens = list(cached(loaded, [1, 2, 3], params))
    assert tokens == list(naive(twin, [1, 2, 3], params))


@pytest.mark.parametrize("linear", [None, Int8])
@pytest.mark.parametrize("change", [{}, {"qk_norm": True}, {"qkv_bias": True}, {"o_bias": True, "mlp_bias": True}])
@torch.no_grad()
def test_the_fused_road_is_the_plain_one(linear, change):
    """On a CPU to the last bit: x + attention(norm(x)), or the branch carried beside the stream."""
    if linear is not None and change and "qk_norm" not in change:
        pytest.skip("has no biases")
    torch.manual_seed(0)
    config = dataclasses.replace(TestTransformer.CONFIG, **change)
    model = Transformer(config) if linear is None else Transformer(config, linear)
    for parameter in model.parameters():
        parameter.normal_(std=0.5)
    for tokens in (1, 7):
        x = branch = torch.randn(2, tokens, 32)
        rope, cache, stream = (model.rope_cos[:tokens], model.rope_sin[:tokens]), NoCache(config), None
        for i, layer in enumerate(model.layers):
            x = layer(x, rope, cache.layers[i])
            branch, stream = layer.fused(branch, stream, rope, cache.layers[i])
        assert torch.equal(x, branch + stream)


@pytest.mark.parametrize("path", ["torch", "triton"])
@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_rows_are_those_of_the_whole(layers, path):
    """Of the last layer alone some rows (of the first axis) are computed to their end, and nothing else differs."""
    if path == "triton" and not HAS_TRITON:
        pytest.skip("Triton is not installed here")
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(TestTransformer.CONFIG, num_hidden_layers=layers))
    ids, rows, seen = torch.randint(0, 50, (5, 4)), torch.tensor([3, 0, 3]), []
    for layer in model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    with use(path):
        whole, some = model(ids), model(ids, rows=rows)
    torch.testing.assert_close(some, whole[rows], atol=1e-6, rtol=1e-6)
    assert seen == [5] * (2 * layers - 1) + [3]


@torch.no_grad()
def test_windows_belong_to_layers():
    """What comes before the window reaches a token through the layers that have none, and only through them."""
    torch.manual_seed(0)
    config = dataclasses.replace(TestTransformer.CONFIG, sliding_window=3)
    a = torch.arange(12)[None]
    b = a.clone()
    b[0, 0] = 40
    changed = lambda model, cache=None: (model(a, cache=cache) != model(b, cache=cache)).any(-1)[0]  # noqa: E731
    assert changed(Transformer(config)).tolist() == [True] * 5 + [False] * 7  # 2 more tokens a layer
    mixed = dataclasses.replace(config, layer_types=("full_attention", "sliding_attention"))
    assert changed(Transformer(mixed)).all()
    assert changed(Transformer(mixed), NoCache(3)).tolist() == [True] * 5 + [False] * 7
    assert [NoCache(mixed).layers[i].window for i in (0, 1)] == [0, 3]


class TestFingerprint:
    """What an engine asks before it believes what it has cached."""

    def test_sees_changes(self):
        model = Transformer(TestTransformer.CONFIG).requires_grad_(False)
        seen = [model.fingerprint()]
        assert model.fingerprint() == seen[0]
        model(torch.arange(5)[None])
        assert model.fingerprint() == seen[0]

        def replace():
            model.layers[0].mlp.down_proj = Dense(48, {"down_proj": 32})
            model.revision += 1

        for change in (
            model.norm.weight.zero_,
            lambda: model.layers[1].mlp.gate_up_proj.weight[3].mul_(2),
            lambda: model.load_state_dict(Transformer(TestTransformer.CONFIG).state_dict()),
            lambda: model.to(torch.float64),
            model.reset_parameters,
            replace,
            lambda: model.layers[0].mlp.down_proj.weight.detach().add_(1),
        ):
            change()
            assert model.fingerprint() not in seen
            seen.append(model.fingerprint())

    def test_works_without_counters(self):
        with torch.inference_mode():
            model = Transformer(TestTransformer.CONFIG)
            assert model.fingerprint() == model.fingerprint()
