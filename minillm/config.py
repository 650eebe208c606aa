"""The shape of a model, and what that shape costs: parameters, FLOPs, bytes.

`ModelConfig` describes the Llama family and Qwen3 (which adds a norm on queries and keys) and reads a Hugging Face
`config.json`. Counting conventions: a multiply-add is 2 FLOPs, and only matrix products count. Norms, activations,
RoPE and softmax add less than 1 % to the cost of a model of any real size (Kaplan et al., 2020, "Scaling Laws for
Neural Language Models", count the same way).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["DTYPE_BYTES", "LLAMA_3_8B", "ModelConfig"]

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8": 1, "int8": 1, "int4": 0.5}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ROPE_TYPES = ("default", "linear", "llama3")
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer, with Hugging Face's names.

    `rope_scaling` is None or {"rope_type": "linear" | "llama3", "factor": ..., ...}; `qk_norm` is what tells Qwen3
    from Llama.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        for name in SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: expected a divisor of num_attention_heads ({self.num_attention_heads}), so that"
                f" query heads share evenly, got {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number (RoPE rotates pairs), got {self.head_dim}")

    # ---- reading
    # -------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "ModelConfig":
        """Read `directory/config.json` (and the end tokens of `generation_config.json`).

        Raises FileNotFoundError without a config, ValueError for a broken one or an architecture that is not supported.
        """
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: not found; expected a Hugging Face model directory (config.json, *.safetensors,"
                " tokenizer.json)"
            )
        config = _read_json(path)
        generation = Path(directory) / "generation_config.json"
        if generation.is_file() and (ends := _read_json(generation).get("eos_token_id")) is not None:
            config["eos_token_id"] = ends  # may name more end tokens than config.json, as in Llama 3
        return cls.from_dict(config)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ModelConfig":
        """Build from the content of a Hugging Face `config.json` (both the older and the transformers 5 form of the
        RoPE fields).
        """
        kind = config.get("model_type")
        if kind not in ARCHITECTURES:
            raise ValueError(
                f"model_type: expected one of {', '.join(ARCHITECTURES)}, got {kind!r}; other architectures are not"
                " supported"
            )
        refused = [name for name in ("attention_bias", "mlp_bias", "use_sliding_window") if config.get(name)]
        if refused or config.get("hidden_act", "silu") != "silu":
            raise ValueError(
                f"{(refused or ['hidden_act'])[0]}: {config.get((refused or ['hidden_act'])[0])!r} is not supported"
            )
        heads = _required(config, "num_attention_heads")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type: expected one of {', '.join(ROPE_TYPES)}, got {rope_type!r}")
        ends = config.get("eos_token_id")
        return cls(
            vocab_size=_required(config, "vocab_size"),
            hidden_size=_required(config, "hidden_size"),
            intermediate_size=_required(config, "intermediate_size"),
            num_hidden_layers=_required(config, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or _required(config, "hidden_size") // heads,
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
            rope_scaling=None if rope_type == "default" else {**rope, "rope_type": rope_type},
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qk_norm=kind == "qwen3",
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,),
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of the Hugging Face `config.json` that describes this model."""
        kind = "qwen3" if self.qk_norm else "llama"
        same = (*SIZES, "rms_norm_eps", "tie_word_embeddings", "bos_token_id")
        return {
            "architectures": [ARCHITECTURES[kind]],
            "model_type": kind,
            "hidden_act": "silu",
            **{name: getattr(self, name) for name in same},
            "eos_token_id": (self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids))
            if self.eos_token_ids
            else None,
            "rope_parameters": {"rope_type": "default", **(self.rope_scaling or {}), "rope_theta": self.rope_theta},
        }

    # ---- cost
    # ----------------------------------------------------------------------------------------------------------------

    @property
    def q_size(self) -> int:
        """Features of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Features of all key heads together (the value heads have as many)."""
        return self.num_key_value_heads * self.head_dim

    def parameters(self) -> dict[str, int]:
        """Number of parameters by part: embedding, attention, mlp, norms, lm_head (0 when tied to the embedding)."""
        layers, hidden = self.num_hidden_layers, self.hidden_size
        return {
            "embedding": self.vocab_size * hidden,
            "attention": layers * hidden * (2 * self.q_size + 2 * self.kv_size),
            "mlp": layers * 3 * hidden * self.intermediate_size,
            "norms": layers * (2 * hidden + (2 * self.head_dim if self.qk_norm else 0)) + hidden,
            "lm_head": 0 if self.tie_word_embeddings else self.vocab_size * hidden,
        }

    def num_parameters(self) -> int:
        """All parameters; a tied embedding counts once."""
        return sum(self.parameters().values())

    def flops_per_token(self, context_length: int = 0) -> dict[str, int]:
        """Forward FLOPs of one token that attends to `context_length` positions, itself included, by part.

        Each weight of a matrix takes part in one multiply-add (2 FLOPs); scores and the weighted sum of values cost 2
        FLOPs each for every query feature and position. The embedding is a lookup and costs none; the head costs 2
        per weight whether it is tied or not.
        """
        parts = self.parameters()
        return {
            "attention projections": 2 * parts["attention"],
            "attention over context": 4 * self.num_hidden_layers * self.q_size * context_length,
            "mlp": 2 * parts["mlp"],
            "lm_head": 2 * self.vocab_size * self.hidden_size,
        }

    def weight_bytes(self, dtype: str = "bfloat16") -> int:
        """Bytes of all weights in `dtype` (a key of DTYPE_BYTES)."""
        return int(self.num_parameters() * _bytes(dtype))

    def kv_bytes_per_token(self, dtype: str = "bfloat16") -> int:
        """Bytes that one token keeps in the cache: a key and a value of `kv_size` features in every layer."""
        return int(2 * self.num_hidden_layers * self.kv_size * _bytes(dtype))


def _bytes(dtype: str) -> float:
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPE_BYTES)}, got {dtype!r}")
    return DTYPE_BYTES[dtype]


def _required(config: dict[str, Any], name: str) -> int:
    if name not in config:
        raise ValueError(f"{name}: missing in config.json; expected a positive integer")
    return config[name]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(
            f"{path}: not valid JSON ({e}); the download may be cut off: delete the directory and fetch it again"
        ) from e
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


# The 8B shape that chapters quote beside SmolLM2: Llama 3.1 8B (Grattafiori et al., 2024, "The Llama 3 Herd of
# Models", table 3).
LLAMA_3_8B = ModelConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131_072,
    rope_theta=500_000.0,
    rope_scaling={
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)
