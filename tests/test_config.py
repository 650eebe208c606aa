"""ModelConfig: Hugging Face's config in and out, bad input, and costs against real tensors and torch's FLOP counter."""

import copy
import json
import re
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, LlamaConfig, Qwen3Config

from minillm.config import LLAMA_3_8B, EngineConfig, ModelConfig, sampling_defaults
from minillm.model import Transformer

WINDOW = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(("kind", "qk_norm"), [(LlamaConfig, False), (Qwen3Config, True)])
def test_reads_what_transformers_writes(tmp_path, kind, qk_norm, tie):
    theirs = kind(**SMALL, tie_word_embeddings=tie, rms_norm_eps=1e-5, eos_token_id=[2, 3], bos_token_id=1)
    theirs.save_pretrained(tmp_path)
    ours = ModelConfig.from_pretrained(tmp_path)
    for name, value in SMALL.items():
        assert getattr(ours, name) == value
    assert (ours.tie_word_embeddings, ours.qk_norm, ours.rms_norm_eps, ours.eos_token_ids) == (
        tie,
        qk_norm,
        1e-5,
        (2, 3),
    )
    (tmp_path / "config.json").write_text(json.dumps(ours.to_dict()))
    assert ModelConfig.from_pretrained(tmp_path) == ours
    assert kind.from_pretrained(tmp_path).num_key_value_heads == 2


def test_older_form_of_rope_fields():
    config = {"model_type": "llama", **SMALL, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    ours = ModelConfig.from_dict(config)
    assert ours.rope_theta == 5e5
    assert ours.rope_scaling["rope_type"] == "linear"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "mamba"}, "model_type: expected one of llama, mistral, qwen2, qwen3, got 'mamba'"),
        ({"model_type": None}, "model_type"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias: true is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor"),
        ({"head_dim": 7}, "head_dim: expected an even"),
        ({"hidden_size": -1}, "hidden_size: expected a positive"),
        ({"vocab_size": "many"}, "vocab_size: expected a positive"),
        ({"vocab_size": 97.0}, "vocab_size: expected a positive"),
        ({"max_position_embeddings": None}, "max_position_embeddings: expected a positive"),
        ({"model_type": "qwen3", "head_dim": None}, "head_dim: expected a positive"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: expected a positive number, got '1e-5'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: expected a positive number"),
        ({"rope_theta": None}, "rope_theta: expected a positive number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: expected true or false"),
        ({"attention_bias": 1}, "attention_bias: expected true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id: expected a token id"),
        ({"eos_token_id": [1, None]}, "eos_token_id: expected a token id"),
        ({"rope_parameters": [1]}, "rope_parameters: expected an object"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters: expected an object"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor: missing in rope_scaling"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor: expected a positive number"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "high_freq_factor: expected more than low_freq_factor"),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 1.5}, "original_max_position_embeddings"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_window: expected a number of tokens"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3}, "sliding_window: expected a number"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 3}, "layer_types: expected sliding_attention"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window: expected a positive integer"),
        ({**WINDOW, "layer_types": ["sliding_attention"] * 2}, r"layer_types: expected 3 \(num_hidden_layers\)"),
        ({**WINDOW, "layer_types": ["linear_attention"] * 3}, "layer_types: expected one of full_attention"),
        ({**WINDOW, "layer_types": "sliding_attention"}, "layer_types: expected one of full_attention"),
        ({**WINDOW, "max_window_layers": -1}, "max_window_layers: expected"),
    ],
)
def test_bad_config(change, says):
    with pytest.raises(ValueError, match=says):
        ModelConfig.from_dict({"model_type": "llama", **SMALL, **change})


LEFT_OUT = object()
FIELDS = {
    "num_key_value_heads": [4, None],
    "head_dim": [16],
    "max_position_embeddings": [256],
    "rms_norm_eps": [1e-4],
    "rope_theta": [5e5],
    "rope_parameters": [None, {"rope_type": "default", "rope_theta": 7e3}, {"rope_type": "linear", "factor": 2.0}],
    "rope_scaling": [
        None, {"type": "linear", "factor": 4.0}, LLAMA3, {**LLAMA3, "original_max_position_embeddings": 64}
    ],
    "original_max_position_embeddings": [32],
    "sliding_window": [8, None],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 2],
    "layer_types": [["full_attention", "sliding_attention"] * 2],
    "bos_token_id": [7, None],
    "eos_token_id": [5, [5, 6], None],
    "tie_word_embeddings": [True, False],
    "attention_bias": [True, False],
    "mlp_bias": [True, False],
}  # fmt: skip


@given(
    st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
    st.fixed_dictionaries({name: st.sampled_from([LEFT_OUT, *values]) for name, values in FIELDS.items()}),
)
def test_resolves_as_transformers_does(kind, fields):
    """Fields given, left out, at odds with each other: what we take, and what transformers reads in what we write."""
    content = {"model_type": kind, "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128}
    content |= {"num_hidden_layers": 4, "num_attention_heads": 32}
    content |= {name: copy.deepcopy(value) for name, value in fields.items() if value is not LEFT_OUT}
    try:
        ours = ModelConfig.from_dict(copy.deepcopy(content))
    except ValueError:
        assume(False)
    if kind == "mistral":
        assume(fields["num_key_value_heads"] is not None)  # transformers refuses it
    assert ModelConfig.from_dict(ours.to_dict()) == ours
    for written in (content, ours.to_dict()):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(written))
            theirs = AutoConfig.from_pretrained(folder)
        theirs.standardize_rope_params()  # as its models do
        for name in (*SMALL, "rms_norm_eps", "tie_word_embeddings", "bos_token_id"):
            default = 2 if name == "head_dim" else None  # Qwen2 has no such field: hidden_size / heads
            assert getattr(theirs, name, default) == getattr(ours, name)
        ends = theirs.eos_token_id
        assert ours.eos_token_ids == tuple(ends if isinstance(ends, list) else [] if ends is None else [ends])
        scaling = ours.rope_scaling or {"rope_type": "default"}
        assert theirs.rope_parameters.items() >= (scaling | {"rope_theta": ours.rope_theta}).items()
        types = getattr(theirs, "layer_types", None) if theirs.model_type != "mistral" else None
        slides = [
            theirs.model_type != "llama" and (types is None or t == "sliding_attention") for t in types or 4 * [0]
        ]
        assert [ours.window(i) for i in range(4)] == [(theirs.sliding_window or 0) if s else 0 for s in slides]
        biases = getattr(theirs, "attention_bias", False) and theirs.model_type != "qwen2"
        assert (ours.qkv_bias, ours.o_bias) == (biases or theirs.model_type == "qwen2", biases)
        assert ours.mlp_bias == getattr(theirs, "mlp_bias", False)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["rope_type", "factor"]), inner),
    max_leaves=4,
)


@given(
    st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
    st.dictionaries(st.sampled_from([*FIELDS, *SMALL, "hidden_act", "model_type", "quantization_config"]), JSON),
    st.sets(st.sampled_from([*SMALL])),
)
def test_whatever_stands_there(kind, fields, missing):
    """A config, or an error that names a field."""
    content = {"model_type": kind, **SMALL, **fields}
    content = {name: value for name, value in content.items() if name not in missing}
    says, config = "", None
    try:
        config = ModelConfig.from_dict(content)
    except ValueError as error:
        says = str(error)
    assert config is None or ModelConfig.from_dict(config.to_dict()) == config
    assert config is not None or re.match(r"[a-z_]+: ", says), says


def test_combinations_that_transformers_does_not_know():
    for change in ({"o_bias": True}, {"mlp_bias": True, "qk_norm": True}, {"sliding_window": 4, "mlp_bias": True}):
        with pytest.raises(ValueError, match="qk_norm, qkv_bias, o_bias, mlp_bias, sliding_window: expected those of"):
            ModelConfig(**SMALL, **change).to_dict()


def test_quantization_is_kept(tmp_path):
    about = {"quant_method": "awq", "bits": 4}
    for name in ("quantization_config", "compression_config"):
        ours = ModelConfig.from_dict({"model_type": "llama", **SMALL, name: about})
        assert ours.quantization_config == ours.to_dict()["quantization_config"] == about
    assert (
        ModelConfig.from_dict({"model_type": "llama", **SMALL, "quantization_config": None}).quantization_config is None
    )


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (5, None, (5,)),
        (5, {}, (5,)),
        (5, {"eos_token_id": None}, (5,)),
        (5, {"eos_token_id": [6, 5, 7]}, (5, 6, 7)),
        ([5, 6], {"eos_token_id": 7}, (5, 6, 7)),
        (None, {"eos_token_id": 7}, (7,)),
        (None, {}, ()),
        (LEFT_OUT, {"eos_token_id": 7}, (7,)),
        (LEFT_OUT, None, (2,)),  # LlamaConfig's
    ],
)
def test_end_tokens_of_both_files(tmp_path, config, generation, expected):
    content = {"model_type": "llama", **SMALL} | ({} if config is LEFT_OUT else {"eos_token_id": config})
    (tmp_path / "config.json").write_text(json.dumps(content))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert ModelConfig.from_pretrained(tmp_path).eos_token_ids == expected


def test_sampling_defaults(tmp_path):
    assert sampling_defaults(tmp_path) == {}
    file = tmp_path / "generation_config.json"
    file.write_text(
        json.dumps({"do_sample": False, "temperature": 0.6, "top_k": 20, "top_p": None, "max_new_tokens": 9, "x": 1})
    )
    assert sampling_defaults(tmp_path) == {"temperature": 0.6, "top_k": 20, "max_tokens": 9}
    for name, value in (("temperature", "hot"), ("top_k", 2.5), ("min_p", True)):
        file.write_text(json.dumps({name: value}))
        with pytest.raises(ValueError, match=f"{name}: expected a"):
            sampling_defaults(tmp_path)


class TestEngineConfig:
    @pytest.mark.parametrize(
        ("change", "says"),
        [
            *(
                ({name: value}, f"{name}: expected an integer, {least} or more, got {value!r}")
                for name, least in (("max_num_seqs", 1), ("max_num_batched_tokens", 1), ("num_blocks", 1),
                                    ("max_model_len", 2), ("block_size", 1))
                for value in (0, True, 1.5, "8")
            ),
            ({"block_size": None}, "block_size: expected an integer"),
            ({"block_size": 12}, "block_size: expected a power of 2, got 12"),
            ({"gpu_memory_utilization": 0}, "gpu_memory_utilization: expected a share above 0 and up to 1, got 0"),
            ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization: expected a share"),
            ({"gpu_memory_utilization": "0.9"}, "gpu_memory_utilization: expected a share"),
            ({"enforce_eager": 1}, "enforce_eager: expected True or False, got 1"),
            ({"enable_prefix_caching": None}, "enable_prefix_caching: expected True or False"),
            ({"async_scheduling": "yes"}, "async_scheduling: expected True or False"),
            ({"kv_cache_dtype": "int3"}, "kv_cache_dtype: expected one of auto, float32, float16, bfloat16, int8, fp8"),
        ],
    )  # fmt: skip
    def test_bad_values(self, change, says):
        with pytest.raises(ValueError, match=says):
            EngineConfig(**change)

    def test_resolved(self):
        config = ModelConfig(**SMALL)
        gpu, cpu = (EngineConfig().resolved(config, on_gpu) for on_gpu in (True, False))
        assert (gpu.max_num_batched_tokens, gpu.async_scheduling, gpu.max_model_len) == (8192, True, 64)
        assert (cpu.max_num_batched_tokens, cpu.async_scheduling, cpu.max_model_len) == (512, False, 64)
        assert gpu.num_blocks is None
        given_ = EngineConfig(max_num_batched_tokens=7, async_scheduling=False, max_model_len=64, num_blocks=3)
        assert given_.resolved(config, True) == given_
        with pytest.raises(ValueError, match=r"max_model_len: expected 2 to 64 \(the model's context\), got 65"):
            EngineConfig(max_model_len=65).resolved(config, True)


def test_missing_field_and_files(tmp_path):
    config = {"model_type": "llama", **SMALL}
    del config["vocab_size"]
    with pytest.raises(ValueError, match="vocab_size: missing"):
        ModelConfig.from_dict(config)
    with pytest.raises(FileNotFoundError, match="config.json"):
        ModelConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match="not valid JSON"):
        ModelConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        ModelConfig.from_pretrained(tmp_path)


class TestCost:
    @pytest.mark.parametrize(
        "change", [{}, {"qk_norm": True}, {"qkv_bias": True}, {"qkv_bias": True, "o_bias": True, "mlp_bias": True}]
    )
    @pytest.mark.parametrize("tie", [True, False])
    def test_parameters_are_those_of_the_model(self, tie, change):
        config = ModelConfig(**SMALL, tie_word_embeddings=tie, **change)
        assert config.num_parameters() == sum(p.numel() for p in Transformer(config).parameters())

    def test_real_models(self, smollm):
        assert smollm.config.num_parameters() == 134_515_008 == sum(p.numel() for p in smollm.parameters())
        assert LLAMA_3_8B.num_parameters() == 8_030_261_248  # as the checkpoint's index says
        assert smollm.config.kv_bytes_per_token("bfloat16") == 2 * 30 * 3 * 64 * 2

    @pytest.mark.parametrize("tokens", [1, 7, 33])
    def test_flops_are_those_that_torch_counts(self, tokens):
        config = ModelConfig(**SMALL)
        model = Transformer(config)
        # The plain attention: torch's counter does not know the fused CPU kernel.
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model.logits(model(torch.zeros(1, tokens, dtype=torch.long)))
        # torch counts attention as a full square: every token against all of them.
        assert counter.get_total_flops() == tokens * sum(config.flops_per_token(tokens).values())

    def test_flops_of_windows(self):
        """A layer with a window of 4 costs no more than a context of 4."""
        plain = ModelConfig(**SMALL)
        types = ("full_attention", "sliding_attention", "sliding_attention")
        config = ModelConfig(**SMALL, sliding_window=4, layer_types=types)
        cost = [plain.flops_per_token(n)["attention over context"] for n in (3, 4, 30)]
        assert config.flops_per_token(3)["attention over context"] == cost[0]
        assert config.flops_per_token(30)["attention over context"] == cost[2] / 3 + cost[1] * 2 / 3

    def test_bytes(self):
        config = ModelConfig(**SMALL)
        assert config.weight_bytes("float32") == 4 * config.num_parameters()
        assert config.weight_bytes("int4") * 2 == config.num_parameters()
        with pytest.raises(ValueError, match="dtype: expected one of"):
            config.weight_bytes("int3")
