"""How many users a GPU serves, how fast and at what price, before anything runs: what `minillm plan` prints.

A decode step of B sequences with t tokens each in the cache takes (chapters 2 and 6 count bytes and FLOPs)

    seconds = (weights + B t · keys and values) / bandwidth + B · FLOPs(t) / rate + kernels · τ

one after another, as if nothing overlapped. Bandwidth and rate are what a copy and a large product reached, kernels and
τ what chapter 8's steps took beyond both: `gpus.json`, which benchmarks/capacity.py makes from the recorded results.
A prompt takes its FLOPs. From this follow, for B requests that run at any time, tokens a second and all the rest;
tests/test_capacity.py holds it against what the engine reached. Nothing here imports torch.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from .config import LLAMA_3_8B, ModelConfig

__all__ = ["SHAPES", "Estimate", "Gpu", "find_gpu", "find_shape", "plan", "table"]

# Published shapes, by the last part of their Hugging Face ids.
SHAPES = {
    "smollm2-135m": ModelConfig(49_152, 576, 1536, 30, 9, 3, 64, 8192, 1e-5, 1e5, tie_word_embeddings=True),
    "qwen3-0.6b": ModelConfig(
        151936, 1024, 3072, 28, 16, 8, 128, 40960, 1e-6, 1e6, tie_word_embeddings=True, qk_norm=True
    ),
    "llama-3.2-1b": ModelConfig(128_256, 2048, 8192, 16, 32, 8, 64, 131_072, 1e-5, 5e5, tie_word_embeddings=True),
    "llama-3.1-8b": LLAMA_3_8B,
}
# Bits of a weight in a layer, as `LLM(quantization=...)` stores it; of 4 bits, 128 share a 16-bit scale.
BITS = {None: 16, "int4": 4 + 16 / 128, "int8": 8, "w8a8": 8, "fp8": 8}
SHARE, CHUNK, BLOCK = 0.9, 8192, 16  # the engine's: of the memory, tokens of prompts in a step, tokens of a block


@dataclass(frozen=True)
class Gpu:
    """In bytes, bytes/s of a copy, FLOP/s of a 16-bit product. kernel_seconds: what a kernel takes beside its bytes and
    FLOPs in a step of one sequence ("alone") or of "several". measured: when, or "given".
    """

    name: str
    memory: float
    bandwidth: float
    rate: float
    kernel_seconds: dict[str, float]
    measured: str


def _table() -> dict[str, Any]:
    return json.loads((files("minillm") / "gpus.json").read_text(encoding="utf-8"))


def find_gpu(
    name: str, memory: float | None = None, bandwidth: float | None = None, tflops: float | None = None
) -> Gpu:
    """A recorded GPU; what is given (GB, GB/s, 16-bit TFLOP/s) takes the place of what is recorded.

    Raises ValueError for an unknown one of which not all three are given, and for figures that are not above 0.
    """
    known, given = _table()["gpus"], {"--memory": memory, "--bandwidth": bandwidth, "--tflops": tflops}
    _positive(given)
    if name.lower() not in known and None in given.values():
        raise ValueError(
            f"--gpu: {name!r} is not recorded; expected one of {', '.join(known)}, or give its figures yourself:"
            " --memory (GB), --bandwidth (GB/s) and --tflops (16-bit TFLOP/s)"
        )
    row = known.get(name.lower(), known["h100"] | {"name": name})  # another GPU's kernels: as an H100's
    return Gpu(
        row["name"], memory * 1e9 if memory else row["memory, bytes"],
        bandwidth * 1e9 if bandwidth else row["copy, bytes/s"], tflops * 1e12 if tflops else row["product, FLOP/s"],
        row["a kernel, s"], "given" if bandwidth or tflops else f"measured until {row['measured']}",
    )  # fmt: skip


def find_shape(model: str) -> ModelConfig:
    """The shape of a folder with a config.json (weights are not needed), or behind a name of SHAPES or its id.

    Raises ValueError for a name that is neither, and as `ModelConfig.from_pretrained`.
    """
    path, name = Path(model).expanduser(), model.lower().rpartition("/")[2].removesuffix("-instruct")
    if path.exists():
        return ModelConfig.from_pretrained(path if path.is_dir() else path.parent)
    if name not in SHAPES:
        raise ValueError(f"model: expected {', '.join(SHAPES)} or a folder with a config.json, got {model!r}")
    return SHAPES[name]


@dataclass(frozen=True)
class Estimate:
    """What a model takes on a GPU. quantization: of `LLM`, None for 16 bits. kv_cache_dtype: "auto" (16 bits), "int8"
    or "fp8". Raises ValueError for another of either.
    """

    config: ModelConfig
    gpu: Gpu
    quantization: str | None = None
    kv_cache_dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.quantization not in BITS:
            raise ValueError(
                f"--quantization: expected one of {', '.join(filter(None, BITS))}, got {self.quantization!r}"
            )
        if self.kv_cache_dtype not in ("auto", "int8", "fp8"):
            raise ValueError(f"--kv-cache-dtype: expected auto, int8 or fp8, got {self.kv_cache_dtype!r}")

    @property
    def weight_bytes(self) -> float:
        """All weights; embedding, head and norms stay in 16 bits."""
        layers = self.config.parameters()["attention"] + self.config.parameters()["mlp"]
        return layers * BITS[self.quantization] / 8 + (self.config.num_parameters() - layers) * 2

    @property
    def kv_bytes(self) -> int:
        """Of a token in the cache; in 8 bits a key and a value of each head have an fp32 scale."""
        if self.kv_cache_dtype == "auto":
            return self.config.kv_bytes_per_token()
        scales = 2 * 4 * self.config.num_hidden_layers * self.config.num_key_value_heads
        return self.config.kv_bytes_per_token("int8") + scales

    @property
    def step_bytes(self) -> float:
        """Of a step's own, roughly: the widest layer of a full chunk, logits; twice, as graphs keep theirs."""
        c = self.config
        return 2 * (2 * CHUNK * (2 * c.hidden_size + 3 * c.intermediate_size) + 4 * 256 * c.vocab_size)

    def kernels(self, alone: bool) -> tuple[int, float]:
        """(number in a step, seconds of each); 16-bit weights have quicker ones for one sequence alone."""
        kind = "alone" if alone and self.quantization is None else "several"
        count = _table()["kernels a step"][kind]
        return count["a layer"] * self.config.num_hidden_layers + count["besides"], self.gpu.kernel_seconds[kind]

    def step_seconds(self, running: float, context: float) -> float:
        """A decode step of so many sequences with so many tokens each in the cache."""
        c, layers = self.config, range(self.config.num_hidden_layers)
        seen = sum(min(context, c.window(i) or context) for i in layers) / len(layers)
        looked_up = 0 if c.tie_word_embeddings else 2 * c.parameters()["embedding"]  # a row of it a token
        moved = self.weight_bytes - looked_up + running * (seen + 1) * self.kv_bytes
        number, each = self.kernels(alone=running <= 1)
        flops = running * sum(c.flops_per_token(round(context)).values())
        return moved / self.gpu.bandwidth + flops / self.gpu.rate + number * each

    def prompt_seconds(self, prompt: int) -> float:
        """The FLOPs of a prompt, whose tokens see half of it on average; the head's count for its last one alone."""
        parts = self.config.flops_per_token(round(prompt / 2))
        return prompt * (sum(parts.values()) - parts["lm_head"]) / self.gpu.rate

    def requests_that_fit(self, context: int) -> int:
        """Of so many tokens each. Raises ValueError where not one does."""
        usable, own = SHARE * self.gpu.memory, self.weight_bytes + self.step_bytes
        request = math.ceil(context / BLOCK) * BLOCK * self.kv_bytes
        if (fit := int((usable - own) // request)) < 1:
            raise ValueError(
                f"--gpu: expected {(own + request) / 1e9:.1f} GB (weights, a step, a request of {context} tokens),"
                f" got {usable / 1e9:.1f}; take fewer bits (--quantization), a shorter --context or a larger GPU"
            )
        return fit


def plan(
    model: str, gpu: Gpu, context: int = 2048, output: int | None = None, rate: float | None = None,
    price: float | None = None, quantization: str | None = None, kv_cache_dtype: str = "auto", max_num_seqs: int = 256,
) -> dict[str, Any]:  # fmt: skip
    """What one GPU does for a model: for one stream, for as many requests as fit, at a rate of requests a second.

    A request has `context` tokens at its end, of which `output` (an eighth if not given) are its answer. price: of a
    GPU's hour, in dollars. -> "model", "gpu", "memory, GB", "requests that fit", "loads" (a dictionary each, units in
    the keys), "assumed". Raises ValueError that names the option for what cannot be.
    """
    estimate = Estimate(config := find_shape(model), gpu, quantization, kv_cache_dtype)
    if config.quantization_config and quantization is None:
        raise ValueError(f"--quantization: expected int4 or what else {model} has, which its config.json has quantized")
    output = max(1, context // 8) if output is None else output
    _positive({"--rate": rate, "--price": price, "--output": output, "--max-num-seqs": max_num_seqs})
    most = config.max_position_embeddings
    if not output < context <= most:
        raise ValueError(
            f"--context: expected more than --output ({output}), at most the model's {most}, got {context}"
        )
    fit, request = estimate.requests_that_fit(context), context * estimate.kv_bytes
    sizes = {"GPU": gpu.memory, "of it used": SHARE * gpu.memory, "weights": estimate.weight_bytes}
    sizes |= {"a step": estimate.step_bytes, "a request": request, "all requests that fit": fit * request}
    lengths, running = (context - output, output, price), min(fit, max_num_seqs)
    loads = [_load(estimate, name, n, *lengths) for name, n in (("one stream", 1), (f"{running} at once", running))]
    if rate is not None:
        loads.append(_at_rate(estimate, rate, loads[-1]["requests/s"], *lengths))
    return {
        "model": model, "weights": quantization or "16-bit", "gpu": gpu.name, "prompt": context - output,
        "output": output, "memory, GB": {name: size / 1e9 for name, size in sizes.items()},
        "requests that fit": fit, "loads": loads, "assumed": _assumed(estimate),
    }  # fmt: skip


def _load(estimate: Estimate, name: str, running: float, prompt: int, output: int, price: float | None) -> dict:
    """`running` requests at any time: each of their tokens waits for a step, and for its share of all prompts."""
    step, reading = estimate.step_seconds(running, prompt + output / 2), estimate.prompt_seconds(prompt)
    token = step + running * reading / output
    first = reading + math.ceil(prompt / CHUNK) * step
    found = {"load": name, "GPUs": 1, "running": running, "tokens/s": running / token, "ms a token": 1e3 * token}
    found |= {"ms to the first": 1e3 * first, "requests/s": running / token / output}
    return found | _cost(price, running / token)


def _cost(price: float | None, tokens_per_second: float) -> dict[str, float]:
    return {} if price is None else {"$ a million": price / 3600 / tokens_per_second * 1e6}


def _at_rate(estimate: Estimate, rate: float, most: float, prompt: int, output: int, price: float | None) -> dict:
    """`rate` requests a second, on as many GPUs as that takes, each of which does at most `most`. By Little's law
    B = rate · output · seconds a token, and these are a + b B: a step's own part, and each request's.
    """
    each = rate / (gpus := math.ceil(rate / most - 1e-9))
    two, three = (estimate.step_seconds(n, prompt + output / 2) for n in (2, 3))
    a, b = 3 * two - 2 * three, three - two + estimate.prompt_seconds(prompt) / output
    busy = max(1, each * output * a / (1 - each * output * b))
    found = _load(estimate, f"{rate:g} requests/s", busy, prompt, output, price)
    found |= {"GPUs": gpus, "running": each * output * found["ms a token"] / 1e3}
    return found | {"tokens/s": each * output, "requests/s": each} | _cost(price, each * output)


def _assumed(estimate: Estimate) -> list[str]:
    gpu, (many, each), (few, quick) = estimate.gpu, estimate.kernels(False), estimate.kernels(True)
    return [
        f"a step: bytes at {gpu.bandwidth / 1e9:,.0f} GB/s, FLOPs at {gpu.rate / 1e12:,.0f} TFLOP/s ({gpu.measured}),"
        f" {many} kernels of {1e6 * each:.1f} µs ({few} of {1e6 * quick:.1f} for one stream), one after another",
        "FLOPs take as long in 8 and 4 bits as in 16; a prompt takes its FLOPs, so the first token comes no sooner",
        "of each GPU; minillm's engine; requests of one length, which come evenly and share nothing: bursts wait",
    ]


def table(found: dict[str, Any]) -> str:
    """A plan for people."""
    shown = lambda v: v if isinstance(v, str) else f"{v:,.0f}" if v >= 100 else f"{v:,.3g}"  # noqa: E731
    title = f"{found['model']}, {found['weights']} weights, {found['gpu']}: {found['prompt']:,} tokens of prompt"
    memory = ", ".join(f"{name} {shown(size)}" for name, size in found["memory, GB"].items())
    rows = [list(found["loads"][0]), *([shown(v) for v in load.values()] for load in found["loads"])]
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    lines = ["".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    head = [f"{title} and {found['output']:,} of answer a request, {found['requests that fit']:,} of which fit"]
    return "\n".join([*head, f"GB: {memory}", "", *lines, "", *(f"- {line}" for line in found["assumed"])])


def _positive(options: Mapping[str, float | None]) -> None:
    for option, value in options.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{option}: expected a number above 0, got {value!r}")
