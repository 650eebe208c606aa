"""The shape of a model, and what that shape costs: parameters, FLOPs, bytes.

`ModelConfig` describes Llama and its near relatives: Mistral (a sliding window), Qwen2 (biases on queries, keys and
values) and Qwen3 (a norm on queries and keys); it reads a Hugging Face `config.json`. `EngineConfig` is how an engine
runs one. Counting conventions: a multiply-add is 2 FLOPs, and only matrix products count. Norms, activations,
RoPE and softmax add less than 1 % to the cost of a model of any real size (Kaplan et al., 2020, "Scaling Laws for
Neural Language Models", count the same way).
"""

import json
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

__all__ = [
    "DTYPE_BYTES",
    "LLAMA_3_8B",
    "EngineConfig",
    "ModelConfig",
    "SpeculativeConfig",
    "StepCosts",
    "sampling_defaults",
]

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8": 1, "int8": 1, "int4": 0.5}
# What transformers calls a model type -> its class, and what its configuration says where config.json is silent.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32_768, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32_768, "sliding_window": 4096, "head_dim": 128},
}  # fmt: skip
ROPE_FACTORS = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
LAYER_TYPES = ("full_attention", "sliding_attention")
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

    `rope_scaling` is None or {"rope_type": "linear" | "llama3", "factor": ..., ...}. `qk_norm` is what tells Qwen3 from
    Llama, `qkv_bias` without `o_bias` what tells Qwen2. With a `sliding_window` the layers whose `layer_types` say
    "sliding_attention" (None: all, as in Mistral) see that many tokens; `window` answers for a layer.
    `quantization_config` is what config.json says about quantized weights, as it stands there.
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
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    quantization_config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in SIZES:
            _integer(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: expected a divisor of num_attention_heads ({self.num_attention_heads}), so that"
                f" query heads share evenly, got {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number (RoPE rotates pairs), got {self.head_dim}")
        if self.sliding_window is not None:
            _integer("sliding_window", self.sliding_window)
        if self.layer_types is not None and (
            len(self.layer_types) != self.num_hidden_layers or set(self.layer_types) - set(LAYER_TYPES)
        ):
            raise ValueError(
                f"layer_types: expected {self.num_hidden_layers} (num_hidden_layers) of {', '.join(LAYER_TYPES)}, got"
                f" {list(self.layer_types)}"
            )

    def window(self, layer: int) -> int:
        """How many tokens a token of this layer attends to, itself included; 0: all before it."""
        slides = self.layer_types is None or self.layer_types[layer] == "sliding_attention"
        return (self.sliding_window or 0) if slides else 0

    # ---- reading
    # -------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "ModelConfig":
        """Read `directory/config.json`, and the end tokens of `generation_config.json`: what either names is one.

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
            # It may name more end tokens than config.json, as in Llama 3. A default of the model type then counts
            # for nothing: transformers takes this file's word.
            both = [*_token_ids("eos_token_id", config.get("eos_token_id")), *_token_ids("eos_token_id", ends)]
            config["eos_token_id"] = list(dict.fromkeys(both))
        return cls.from_dict(config)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ModelConfig":
        """Build from the content of a Hugging Face `config.json` (both the older and the transformers 5 form of the
        RoPE fields). What it does not say is as in transformers' configuration of that model type.

        Raises ValueError that names the field for one that is missing, of a wrong type, or not supported.
        """
        kind = config.get("model_type")
        if not isinstance(kind, str) or kind not in ARCHITECTURES:
            raise ValueError(
                f"model_type: expected one of {', '.join(ARCHITECTURES)}, got {kind!r}; other architectures are not"
                " supported"
            )
        config = {**DEFAULTS[kind], **config}
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            raise ValueError(f"hidden_act: {config['hidden_act']!r} is not supported; expected 'silu'")
        sizes: dict[str, Any] = {name: _required(config, name) for name in SIZES[:5]}
        heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
        head_dim: Any = config.get("head_dim")
        [bos, *_] = [*_token_ids("bos_token_id", config.get("bos_token_id")), None]
        return cls(
            **sizes,
            num_key_value_heads=heads if (kv := config.get("num_key_value_heads")) is None else kv,
            head_dim=hidden // heads if head_dim is None and kind != "qwen3" else head_dim,
            max_position_embeddings=config["max_position_embeddings"],
            rms_norm_eps=_number("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=_flag(config, "tie_word_embeddings"),
            qk_norm=kind == "qwen3",
            bos_token_id=bos,
            eos_token_ids=tuple(_token_ids("eos_token_id", config.get("eos_token_id"))),
            quantization_config=config.get("quantization_config") or config.get("compression_config"),
            **_rope(config),
            **_biases(kind, config),
            **_windows(kind, config),
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of the Hugging Face `config.json` that describes this model.

        Raises ValueError for a combination of biases, windows and norms that no model type of transformers has.
        """
        kind, slides = self.model_type, self.sliding_window is not None
        same = (*SIZES, "rms_norm_eps", "tie_word_embeddings", "bos_token_id")
        ends = list(self.eos_token_ids)
        by_type: dict[str, dict[str, Any]] = {
            "llama": {"attention_bias": self.o_bias, "mlp_bias": self.mlp_bias},
            "mistral": {"sliding_window": self.sliding_window},
            "qwen2": {"use_sliding_window": slides},
            "qwen3": {"use_sliding_window": slides, "attention_bias": self.o_bias},
        }
        own = by_type[kind]
        if slides and kind in ("qwen2", "qwen3"):
            layers = ["sliding_attention" if self.window(i) else LAYER_TYPES[0] for i in range(self.num_hidden_layers)]
            own |= {"sliding_window": self.sliding_window, "layer_types": layers}
        if self.quantization_config is not None:
            own["quantization_config"] = self.quantization_config
        return {
            "architectures": [ARCHITECTURES[kind]],
            "model_type": kind,
            "hidden_act": "silu",
            **{name: getattr(self, name) for name in same},
            "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
            "rope_parameters": {"rope_type": "default", **(self.rope_scaling or {}), "rope_theta": self.rope_theta},
            **own,
        }

    @property
    def model_type(self) -> str:
        """What transformers calls a model with these parts. Raises ValueError where it knows none."""
        windows = {self.window(i) for i in range(self.num_hidden_layers)}
        if self.qk_norm and self.qkv_bias == self.o_bias and not self.mlp_bias:
            return "qwen3"
        if self.qkv_bias and not self.o_bias and not self.mlp_bias and not self.qk_norm:
            return "qwen2"
        if not self.qk_norm and windows == {0} and self.qkv_bias == self.o_bias:
            return "llama"
        if not (self.qk_norm or self.qkv_bias or self.o_bias or self.mlp_bias) and len(windows) == 1:
            return "mistral"
        raise ValueError(
            f"qk_norm, qkv_bias, o_bias, mlp_bias, sliding_window: expected those of one of {', '.join(ARCHITECTURES)},"
            f" got {self.qk_norm}, {self.qkv_bias}, {self.o_bias}, {self.mlp_bias}, {self.sliding_window} on"
            f" {sum(map(bool, map(self.window, range(self.num_hidden_layers))))} of {self.num_hidden_layers} layers"
        )

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
        """Number of parameters by part: embedding, attention, mlp, norms, lm_head (0 when tied to the embedding), and
        biases, if there are any.
        """
        layers, hidden = self.num_hidden_layers, self.hidden_size
        biases = layers * (
            self.qkv_bias * (self.q_size + 2 * self.kv_size)
            + self.o_bias * hidden
            + self.mlp_bias * (2 * self.intermediate_size + hidden)
        )
        return {
            "embedding": self.vocab_size * hidden,
            "attention": layers * hidden * (2 * self.q_size + 2 * self.kv_size),
            "mlp": layers * 3 * hidden * self.intermediate_size,
            "norms": layers * (2 * hidden + (2 * self.head_dim if self.qk_norm else 0)) + hidden,
            "lm_head": 0 if self.tie_word_embeddings else self.vocab_size * hidden,
        } | ({"biases": biases} if biases else {})

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
        seen = [min(context_length, self.window(i) or context_length) for i in range(self.num_hidden_layers)]
        return {
            "attention projections": 2 * parts["attention"],
            "attention over context": 4 * self.q_size * sum(seen),
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


# ---- fields of config.json ---------------------------------------------------------------------------------------


def _required(config: dict[str, Any], name: str) -> int:
    if name not in config:
        raise ValueError(f"{name}: missing in config.json; expected a positive integer")
    _integer(name, config[name])
    return config[name]


def _integer(name: str, value: Any, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def _number(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a positive number, got {value!r}")
    return float(value)


def _flag(config: dict[str, Any], name: str) -> bool:
    if not isinstance(value := config.get(name, False), bool):
        raise ValueError(f"{name}: expected true or false, got {value!r}")
    return value


def _token_ids(name: str, value: Any) -> list[int]:
    """A token id, a list of them, or null -> a list."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
        raise ValueError(f"{name}: expected a token id, a list of them, or null, got {value!r}")
    return ids


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """theta and scaling, resolved as transformers 5 does: rope_scaling, if there is one, replaces rope_parameters."""
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(name) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"{name}: expected an object of numbers, the same for all layers, got {rope!r}")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in ROPE_FACTORS:
        raise ValueError(f"rope_type: expected one of {', '.join(ROPE_FACTORS)}, got {rope_type!r}")
    if (partial := rope.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1)) != 1:
        raise ValueError(f"partial_rotary_factor: {partial!r} is not supported; expected 1")
    theta = _number("rope_theta", rope.get("rope_theta", config.get("rope_theta", 10_000.0)))
    if rope_type == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": rope_type}
    for factor in ROPE_FACTORS[rope_type]:
        if factor not in rope:
            raise ValueError(f"{factor}: missing in {name}; a rope_type of {rope_type!r} needs it")
        scaling[factor] = _number(factor, rope[factor])
    if rope_type == "llama3":
        if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
            raise ValueError(
                f"high_freq_factor: expected more than low_freq_factor ({scaling['low_freq_factor']}), got"
                f" {scaling['high_freq_factor']}"
            )
        original = "original_max_position_embeddings"
        scaling[original] = config.get(original, rope.get(original, config["max_position_embeddings"]))
        _integer(original, scaling[original])
    return {"rope_theta": theta, "rope_scaling": scaling}


def _biases(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """Which projections have a bias. Qwen2's q, k and v always have one; nothing in config.json says so."""
    known = {"llama": ("attention_bias", "mlp_bias"), "qwen2": ("attention_bias",), "qwen3": ("attention_bias",)}
    for name in ("attention_bias", "mlp_bias"):
        if _flag(config, name) and name not in known.get(kind, ()):
            raise ValueError(f"{name}: true is not supported for the model type {kind}, which has no such bias")
    if kind == "qwen2":
        return {"qkv_bias": True}
    attention = _flag(config, "attention_bias")
    return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": _flag(config, "mlp_bias")}


def _windows(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """The sliding window and the layers that have it, resolved as transformers 5 does. Llama has none."""
    window, types = config.get("sliding_window"), config.get("layer_types")
    if kind in ("qwen2", "qwen3"):
        window = window if _flag(config, "use_sliding_window") else None
        if types is None and window is not None:
            first, layers = config.get("max_window_layers", 28), config["num_hidden_layers"]
            _integer("max_window_layers", first, 0)
            types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    if types is not None and (not isinstance(types, list) or any(name not in LAYER_TYPES for name in types)):
        raise ValueError(f"layer_types: expected one of {', '.join(LAYER_TYPES)} for each layer, got {types!r}")
    sliding = "sliding_attention" in (types or [])
    if sliding and (window is None or kind == "llama"):
        raise ValueError(
            "sliding_window: expected a number of tokens, as layer_types has sliding_attention, but it is missing,"
            f" null, switched off or unknown to the model type {kind}"
        )
    if kind == "mistral" and window is not None and "full_attention" in (types or []):
        raise ValueError(f"layer_types: expected sliding_attention for all layers of a mistral, got {types!r}")
    if kind == "mistral":
        return {"sliding_window": window}
    return {"sliding_window": window, "layer_types": tuple(types or [])} if sliding else {}


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


SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")


def sampling_defaults(directory: str | Path) -> dict[str, Any]:
    """What `generation_config.json` recommends, by SamplingParams' names; {} without the file or a recommendation.

    As in vLLM: the numbers that are given are taken, `do_sample` is not looked at, and `max_new_tokens` becomes
    `max_tokens`. Raises ValueError, which names the field, for what is no number.
    """
    path = Path(directory) / "generation_config.json"
    content = _read_json(path) if path.is_file() else {}
    given = {name: content[name] for name in SAMPLING if content.get(name) is not None}
    for name, value in given.items():
        whole = name in ("top_k", "max_new_tokens")
        if not isinstance(value, int if whole else int | float) or isinstance(value, bool):
            raise ValueError(f"{path}: {name}: expected {'an integer' if whole else 'a number'}, got {value!r}")
    return {("max_tokens" if name == "max_new_tokens" else name): value for name, value in given.items()}


# ---- the engine ----------------------------------------------------------------------------------------------------

KV_CACHE_DTYPES = ("auto", "float32", "float16", "bfloat16", "int8", "fp8")


@dataclass(frozen=True)
class StepCosts:
    """How many seconds a step takes by its number of tokens, as (tokens, seconds) pairs in ascending order: `plain`
    steps, and those with guesses, `checked`.

    padded: of an engine whose steps are CUDA graphs, what those with guesses take, whatever they hold: by width (tokens
    of each sequence, one and its guesses), then as (sequences, seconds) pairs, one for each graph.
    Raises ValueError for none, or another order.
    """

    plain: tuple[tuple[int, float], ...]
    checked: tuple[tuple[int, float], ...]
    padded: tuple[tuple[int, tuple[tuple[int, float], ...]], ...] = ()

    def __post_init__(self) -> None:
        for name, pairs in (("plain", self.plain), ("checked", self.checked), *(("padded", p) for _, p in self.padded)):
            if not pairs or any(a[0] >= b[0] for a, b in pairwise(pairs)) or any(s <= 0 for _, s in pairs):
                raise ValueError(f"{name}: expected (tokens, seconds) pairs, tokens ascending, got {pairs!r}")


@dataclass(frozen=True)
class SpeculativeConfig:
    """How an engine guesses tokens, with vLLM's names. What it gives does not depend on it, only how fast.

    - method: "ngram", prompt lookup: what followed the last time that the text ended as it does now; or "draft_head",
      what a small network says that was trained on this model (`engine/draft_head.py`). path: the latter's folder.
    - num_speculative_tokens: guesses that a step checks of one request, at most.
    - prompt_lookup_max, prompt_lookup_min: how many tokens must agree; the longest agreement wins. min None: 2, or max
      if that is less.
    - adaptive: check as many guesses of each request as promise the most tokens a second; else always all of them.
      step_costs: what steps take, for that; None: the engine measures it when it is made.

    Raises ValueError that names the argument for one out of range or of a wrong type.
    """

    method: str = "ngram"
    num_speculative_tokens: int = 8
    prompt_lookup_max: int = 3
    prompt_lookup_min: int | None = None
    adaptive: bool = True
    step_costs: StepCosts | None = None
    path: str | Path | None = None

    def __post_init__(self) -> None:
        if self.method not in ("ngram", "draft_head"):
            raise ValueError(f"method: expected 'ngram' or 'draft_head', got {self.method!r}")
        if (self.method == "draft_head") != isinstance(self.path, str | Path):
            expected = "the folder of a draft head" if self.method == "draft_head" else "None with 'ngram'"
            raise ValueError(f"path: expected {expected}, got {self.path!r}")
        if self.prompt_lookup_min is None and isinstance(self.prompt_lookup_max, int):
            object.__setattr__(self, "prompt_lookup_min", min(2, self.prompt_lookup_max))
        for name in ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected an integer, 1 or more, got {value!r}")
        if not isinstance(self.adaptive, bool):
            raise ValueError(f"adaptive: expected True or False, got {self.adaptive!r}")
        if not isinstance(self.step_costs, StepCosts | None):
            raise ValueError(f"step_costs: expected StepCosts or None, got {self.step_costs!r}")
        if self.least > self.prompt_lookup_max:
            raise ValueError(
                f"prompt_lookup_min: expected at most prompt_lookup_max ({self.prompt_lookup_max}), got {self.least}"
            )

    @property
    def least(self) -> int:
        """`prompt_lookup_min`, once it is known."""
        return self.prompt_lookup_min or 1

    @property
    def widths(self) -> tuple[int, ...]:
        """For how many places of each sequence a step may draw: one; or one and all guesses, half of them, a quarter.
        A step has the least that its longest guess fits into, so that a short one does not pay for a long one.
        """
        most = self.num_speculative_tokens
        return tuple(sorted({1, *(1 + n for n in (most, most // 2, most // 4))}))


@dataclass(frozen=True)
class EngineConfig:
    """How an engine runs a model, with vLLM's names. None: chosen by `resolved`.

    - num_blocks, block_size: the cache, in blocks of so many tokens; None: what `gpu_memory_utilization` leaves room
      for. kv_cache_dtype: "auto" is the model's; "int8" and "fp8" (E4M3) take half of what 16 bits take, and a
      scale for each token and head.
    - max_num_seqs: requests that run at once. max_num_batched_tokens: new tokens a step, prompts and decoding together
      (None: 8192 on a GPU, 512 on a CPU). max_model_len: the longest sequence (None: the model's context).
    - enforce_eager: no CUDA graphs. async_scheduling: launch a step before the tokens of the last one are known
      (None: on a GPU).
    - max_loras: adapters that requests which run at once may have, of a rank up to max_lora_rank. 0: none is served.
    - speculative: how tokens are guessed, so that one step gives several. None: they are not.

    Raises ValueError that names the argument for one out of range or of a wrong type.
    """

    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    num_blocks: int | None = None
    enable_prefix_caching: bool = True
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    async_scheduling: bool | None = None
    kv_cache_dtype: str = "auto"
    max_loras: int = 0
    max_lora_rank: int = 16
    speculative: SpeculativeConfig | None = None

    @property
    def most_per_step(self) -> int:
        """Tokens that a step may give a request."""
        return self.widths[-1]

    @property
    def widths(self) -> tuple[int, ...]:
        """For how many places of each sequence a step may draw, ascending."""
        return (1,) if self.speculative is None else self.speculative.widths

    def __post_init__(self) -> None:
        least_of = {"block_size": 1, "max_num_seqs": 1, "max_num_batched_tokens": 1, "max_model_len": 2,
                    "num_blocks": 1, "max_loras": 0, "max_lora_rank": 1}  # fmt: skip
        for name, least in least_of.items():
            value = getattr(self, name)
            optional = name in ("max_num_batched_tokens", "max_model_len", "num_blocks")
            if value is None and optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}: expected an integer, {least} or more, got {value!r}")
        if self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size: expected a power of 2, got {self.block_size}")
        for name in ("enable_prefix_caching", "enforce_eager", "async_scheduling"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (value is None and name == "async_scheduling"):
                raise ValueError(f"{name}: expected True or False, got {value!r}")
        share = self.gpu_memory_utilization
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
            raise ValueError(f"gpu_memory_utilization: expected a share above 0 and up to 1, got {share!r}")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ValueError(
                f"kv_cache_dtype: expected one of {', '.join(KV_CACHE_DTYPES)}, got {self.kv_cache_dtype!r}"
            )
        if not isinstance(self.speculative, SpeculativeConfig | None):
            raise ValueError(f"speculative: expected a SpeculativeConfig or None, got {self.speculative!r}")

    def resolved(self, config: ModelConfig, on_gpu: bool) -> "EngineConfig":
        """The same with what depends on the model and the device filled in; only num_blocks may still be None.

        Raises ValueError for a max_model_len beyond the model's context.
        """
        context, length = config.max_position_embeddings, self.max_model_len
        if length is not None and length > context:
            raise ValueError(f"max_model_len: expected 2 to {context} (the model's context), got {length!r}")
        budget = self.max_num_batched_tokens
        return replace(
            self,
            max_num_batched_tokens=(8192 if on_gpu else 512) if budget is None else budget,
            max_model_len=context if length is None else length,
            async_scheduling=on_gpu if self.async_scheduling is None else self.async_scheduling,
        )


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
