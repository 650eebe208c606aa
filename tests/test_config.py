"""ModelConfig: Hugging Face's config in and out, bad input, and costs against real tensors and torch's FLOP counter."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, Qwen3Config

from minillm.config import LLAMA_3_8B, ModelConfig
from minillm.model import Transformer

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
    ],
)
def test_bad_config(change, says):
    with pytest.raises(ValueError, match=says):
        ModelConfig.from_dict({"model_type": "llama", **SMALL, **change})


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
    @pytest.mark.parametrize("qk_norm", [True, False])
    @pytest.mark.parametrize("tie", [True, False])
    def test_parameters_are_those_of_the_model(self, tie, qk_norm):
        config = ModelConfig(**SMALL, tie_word_embeddings=tie, qk_norm=qk_norm)
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

    def test_bytes(self):
        config = ModelConfig(**SMALL)
        assert config.weight_bytes("float32") == 4 * config.num_parameters()
        assert config.weight_bytes("int4") * 2 == config.num_parameters()
        with pytest.raises(ValueError, match="dtype: expected one of"):
            config.weight_bytes("int3")
