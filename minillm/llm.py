"""`LLM`: load a model, generate text. The names are vLLM's.

llm = LLM("smollm2-135m-instruct")
outs = llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=32))
for piece in llm.stream("Tell me about caches", SamplingParams(max_tokens=200)): print(piece, end="")

Prompts become requests to an `Engine` (`llm.engine`), which runs them together.
"""

import dataclasses
import os
import warnings
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .adapters.serving import LoRARequest
from .config import EngineConfig, ModelConfig, SpeculativeConfig, sampling_defaults
from .engine.engine import Engine
from .engine.request import Request
from .model import Transformer
from .model.tokenizer_hf import load_tokenizer
from .model.weights import load, model_path, resolve_device, resolve_dtype
from .progress import progress_bar
from .quant import ON_THE_FLY, CompressedTensors, check_device, load_on_the_fly, on_the_fly, round_model
from .sampling import SamplingParams

__all__ = ["LLM", "Completion", "Metrics", "RequestOutput", "TextStream"]

# Text, token ids, or vLLM's dictionaries: {"prompt": text} or {"prompt_token_ids": ids}, with "cache_salt" if wanted.
Prompt = str | Sequence[int] | Mapping[str, Any]


@dataclass
class Metrics:
    """Wall-clock seconds of one request, from its arrival: until the first token, and in all. With several completions
    (n > 1) the first token is the earliest, and the tokens are those of all.
    """

    time_to_first_token: float = 0.0
    total_time: float = 0.0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over the whole time, prompt included."""
        return self.num_generated_tokens / self.total_time if self.total_time else 0.0


@dataclass
class Completion:
    """One continuation of a prompt. `finish_reason` is "stop" (end token, stop token or stop string), "length",
    "abort", or "error" (`error` says what happened); None while it runs.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[dict[int, float]] | None = None
    error: BaseException | None = None


@dataclass
class RequestOutput:
    """What one prompt gave: `outputs`, as many as `n` asked for. The first one's fields are this one's too.
    prompt_logprobs: for each token of the prompt but the first {token id: log probability}, if asked for.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Completion] = field(default_factory=lambda: [Completion()])
    metrics: Metrics = field(default_factory=Metrics)
    prompt_logprobs: list[dict[int, float] | None] | None = None
    cache_salt: str = field(default="", repr=False)
    lora_request: LoRARequest | None = field(default=None, repr=False)

    @property
    def text(self) -> str:
        """The first completion's text, as far as it is known."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        """The first completion's tokens, an end token included."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        """Why the first completion ended; None while it runs."""
        return self.outputs[0].finish_reason

    @property
    def logprobs(self) -> list[dict[int, float]] | None:
        """{token id: log probability} for each token of the first completion, if asked for."""
        return self.outputs[0].logprobs

    def update(self, requests: list[Request]) -> None:
        """Take over what the engine's requests have by now."""
        self.outputs = [
            Completion(r.text, list(r.output_token_ids), r.finish_reason, r.logprobs, r.error) for r in requests
        ]
        self.prompt_logprobs = requests[0].prompt_logprobs
        first = min((r.first_token_time for r in requests if r.first_token_time), default=0.0)
        arrival = requests[0].arrival_time
        self.metrics = Metrics(
            time_to_first_token=first - arrival if first else 0.0,
            total_time=max([r.last_token_time for r in requests] + [arrival]) - arrival,
            num_prompt_tokens=len(self.prompt_token_ids),
            num_cached_tokens=requests[0].num_cached,
            num_generated_tokens=sum(len(r.output_token_ids) for r in requests),
        )


class TextStream:
    """An iterator over pieces of text. `output` is the request so far; complete, with its metrics, once the iterator
    ends. Leaving the loop early (`close`, or dropping the stream) ends the request.
    """

    def __init__(self, output: RequestOutput, pieces: Generator[str, None, None]) -> None:
        self.output, self._pieces = output, pieces

    def __iter__(self) -> "TextStream":
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End the request."""
        self._pieces.close()


class LLM:
    """A model and its tokenizer, ready to generate.

    model: a known name, a Hugging Face directory or id. device: "auto", "cpu", "cuda". dtype: "auto" (bf16 on a GPU
    that has it, else fp16; fp32 on a CPU) or a name. load_format: "auto", or "dummy" for random weights from a
    `config.json` alone. generation_config: "auto" takes sampling parameters that the caller does not give from the
    model's `generation_config.json`, as vLLM does; "none" takes those of `SamplingParams`.
    quantization: "int8" or "int4", weights alone; "w8a8" or "fp8", activations too: rounded to the nearest as they are
    loaded. (A checkpoint that is quantized says so itself.)
    The other arguments are those of `EngineConfig`: max_model_len, max_num_seqs, max_num_batched_tokens, block_size,
    enable_prefix_caching, gpu_memory_utilization, enforce_eager, async_scheduling, ... speculative_config, a dictionary
    with the fields of `SpeculativeConfig`, lets a step give several tokens: {"method": "ngram",
    "num_speculative_tokens": 8}, or {"method": "draft_head", "path": "a/trained/head", "num_speculative_tokens": 4}.
    Raises ValueError for an argument that does not fit, and MemoryError when the device has no room, with what was
    expected.

    Threads may share an LLM: what several generate at once runs in one batch.
    """

    def __init__(
        self,
        model: str | os.PathLike,
        *,
        device: str = "auto",
        dtype: str = "auto",
        load_format: str = "auto",
        generation_config: str = "auto",
        quantization: str | None = None,
        **options: Any,
    ) -> None:
        for name, value, known in (
            ("load_format", load_format, ("auto", "dummy")), ("generation_config", generation_config, ("auto", "none"))
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{name}: expected {' or '.join(map(repr, known))}, got {value!r}")
        engine = _engine_config(options)
        path = model_path(model)
        # What is small is looked at before any weight is read.
        config = ModelConfig.from_pretrained(path)
        engine.resolved(config, on_gpu=False)
        if quantization not in (None, *ON_THE_FLY):
            raise ValueError(f"quantization: expected one of {', '.join(ON_THE_FLY)} or None, got {quantization!r}")
        if quantization is not None and config.quantization_config is not None:
            raise ValueError(f"quantization: expected None, as {path} is quantized already, got {quantization!r}")
        check_device(resolve_device(device), quantization, config.quantization_config)
        resolve_dtype(dtype, resolve_device(device))
        self.sampling_defaults = sampling_defaults(path) if generation_config == "auto" else {}
        self.default_params()
        self.tokenizer = load_tokenizer(path) if (path / "tokenizer.json").is_file() else None
        try:
            self.model = _loaded(path, config, load_format, quantization, device, dtype)
        except torch.OutOfMemoryError as error:
            needed = config.weight_bytes() / 1e9
            raise MemoryError(
                f"model: the weights ({needed:.1f} GB in bfloat16) do not fit beside what the GPU holds already; free"
                " it, take a smaller model or dtype"
            ) from error
        self.engine = Engine(self.model, engine, self.tokenizer)

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence, prompt included."""
        return self.engine.max_model_len

    @property
    def vocab_size(self) -> int:
        """Rows of the model's embedding: token ids are below it."""
        return self.model.config.vocab_size

    def default_params(self) -> SamplingParams:
        """What is used where no SamplingParams are given."""
        return SamplingParams(**self.sampling_defaults)

    # ---- what users call ---------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt (text, a list of token ids, or {"prompt_token_ids": ids}), with one `SamplingParams` for
        all or one each; without them with the model's own defaults. lora_request: likewise, an adapter for all or one
        (or None) each; the LLM must have been made with `max_loras`.

        All run together; every prompt is checked before the first is run. Should a request fail, the others go on, and
        a warning says which one; its `finish_reason` is "error". Raises ValueError for an empty or too long prompt and
        for ids outside the vocabulary; the error itself when all requests failed.
        """
        each = self._each(prompts, sampling_params, lora_request)
        requests = self._add(each)
        try:
            with progress_bar(total=len(each), desc="generate", unit="prompt", disable=not use_tqdm) as bar:
                self._finish(requests, bar)
        except BaseException:  # Ctrl-C too: nothing of these requests stays behind
            for some in requests:
                self.engine.abort(some[0])
            raise
        for (output, _), some in zip(each, requests, strict=True):
            output.update(some)
        self._report([request for some in requests for request in some])
        return [output for output, _ in each]

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several: lists of {"role": ..., "content": ...}. Else as `generate`."""
        if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
            raise ValueError(f'messages: expected a list of {{"role": ..., "content": ...}}, got {messages!r:.60}')
        several: Sequence[Any] = messages if isinstance(messages[0], list | tuple) else [messages]
        return self.generate([self.chat_prompt(m) for m in several], sampling_params, use_tqdm, lora_request)

    def chat_prompt(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """The token ids of a conversation in the model's own chat format, ready for the answer."""
        if self.tokenizer is None:
            raise ValueError(
                "messages: this model directory has no tokenizer.json, so no chat template; pass token ids"
            )
        # The template writes the special tokens itself: a second begin-of-text in front would be one too many.
        return self.tokenizer.encode(self.tokenizer.apply_chat_template(messages), add_special_tokens=False)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, lora_request: LoRARequest | None = None
    ) -> "TextStream":  # fmt: skip
        """Complete one prompt and yield the text piece by piece; a piece never ends inside a character or inside a
        stop string.
        """
        params = self.default_params() if sampling_params is None else sampling_params
        if isinstance(params, SamplingParams) and params.n != 1:
            raise ValueError(f"n: expected 1 in a stream, got {params.n}; `generate` gives several completions")
        [(output, _)] = self._each([prompt], params, lora_request)
        return TextStream(output, self._pieces(output, params))

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _each(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    ) -> list[tuple[RequestOutput, SamplingParams]]:
        try:
            several: list[Any] = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        except TypeError:
            raise ValueError(f"prompts: expected text, token ids or a list of them, got {prompts!r:.60}") from None
        # An id alone can be an index; an array of ids says that it can be one, too, and is a prompt.
        if several and hasattr(several[0], "__index__") and not getattr(several[0], "ndim", 0):
            several = [several]
        params = self.default_params() if sampling_params is None else sampling_params
        each = [params] * len(several) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(several):
            raise ValueError(f"sampling_params: expected one for all or one each ({len(several)}), got {len(each)}")
        if bad := [p for p in each if not isinstance(p, SamplingParams)]:
            raise TypeError(f"sampling_params: expected SamplingParams, got {bad[0]!r:.60}")
        for_all = lora_request is None or isinstance(lora_request, LoRARequest)
        adapters: Any = [lora_request] * len(several) if for_all else lora_request
        if not isinstance(adapters, Sequence) or isinstance(adapters, str):
            raise TypeError(f"lora_request: expected a LoRARequest or a list of them, got {adapters!r:.60}")
        if len(adapters) != len(several):
            raise ValueError(f"lora_request: expected one for all or one each ({len(several)}), got {len(adapters)}")
        outputs = [self._output(i, prompt) for i, prompt in enumerate(several)]
        for output, adapter in zip(outputs, adapters, strict=True):
            output.lora_request = adapter
        return list(zip(outputs, each, strict=True))

    def _output(self, index: int, prompt: Prompt) -> RequestOutput:
        """Encode and check one prompt."""
        where, salt = f"prompts[{index}]", ""
        if isinstance(prompt, Mapping):
            salt, prompt = prompt.get("cache_salt", ""), self._inner(where, prompt)
        ids: Any = prompt
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(f"{where}: expected token ids, got text: this model directory has no tokenizer.json")
            ids = self.tokenizer.encode(prompt)
        try:
            ids = self.engine.prompt_of(ids, where)
        except TypeError:
            raise ValueError(
                f"{where}: expected text or a list of token ids, got {type(prompt).__name__} {prompt!r:.40}"
            ) from None
        return RequestOutput(prompt if isinstance(prompt, str) else None, ids, cache_salt=salt)

    @staticmethod
    def _inner(where: str, prompt: Mapping[str, Any]) -> Any:
        """The text or the ids of one of vLLM's dictionaries."""
        known = {"prompt", "prompt_token_ids", "cache_salt"}
        given = [name for name in ("prompt_token_ids", "prompt") if prompt.get(name) is not None]
        if not given or not prompt.keys() <= known:
            raise ValueError(f'{where}: expected {{"prompt_token_ids": ids}} or {{"prompt": text}}, got {list(prompt)}')
        return prompt[given[0]]

    def _add(self, each: list[tuple[RequestOutput, SamplingParams]]) -> list[list[Request]]:
        """Queue all prompts, or none -> the requests of each."""
        added: list[list[Request]] = []
        try:
            for output, params in each:
                salt, adapter = output.cache_salt, output.lora_request
                added.append(self.engine.add(output.prompt_token_ids, params, cache_salt=salt, lora_request=adapter))
        except BaseException:
            for some in added:
                self.engine.abort(some[0])
            raise
        return added

    def _finish(self, requests: list[list[Request]], bar: Any) -> None:
        """Step until all are finished; another thread's steps count too, so their state is looked at."""
        done = 0
        while True:
            finished = sum(all(request.finished for request in some) for some in requests)
            bar.update(finished - done)
            done = finished
            if done == len(requests):
                return
            self.engine.step()

    def _report(self, requests: list[Request]) -> None:
        failed = [(request, request.error) for request in requests if request.error is not None]
        if failed and len(failed) == len(requests):
            raise failed[0][1]
        for request, error in failed:
            warnings.warn(f"request {request.request_id} failed: {error!r}; the others went on", stacklevel=3)

    def _pieces(self, output: RequestOutput, params: SamplingParams) -> Generator[str, None, None]:
        [[request]] = self._add([(output, params)])
        given = 0
        try:
            while not request.finished or len(request.text) > given:
                if len(request.text) == given:  # else another's step brought it
                    self.engine.step()
                output.update([request])
                piece, given = request.text[given:], len(request.text)
                if piece:
                    yield piece
        finally:
            self.engine.abort(request)
            output.update([request])
        if request.error is not None:
            raise request.error


def _engine_config(options: dict[str, Any]) -> EngineConfig:
    if "speculative_config" in options:
        options = {**options, "speculative": _speculative(options["speculative_config"])}
        del options["speculative_config"]
    known = [f.name for f in dataclasses.fields(EngineConfig)]
    if unknown := sorted(options.keys() - set(known)):
        raise TypeError(f"{unknown[0]}: no such argument; expected some of {', '.join(known)}")
    return EngineConfig(**options)


def _speculative(given: Mapping[str, Any] | SpeculativeConfig | None) -> SpeculativeConfig | None:
    """vLLM's `speculative_config`: a dictionary of the fields of `SpeculativeConfig`."""
    if given is None or isinstance(given, SpeculativeConfig):
        return given
    if not isinstance(given, Mapping):
        raise TypeError(f"speculative_config: expected a dictionary or None, got {given!r}")
    known = [f.name for f in dataclasses.fields(SpeculativeConfig)]
    if unknown := sorted(given.keys() - set(known)):
        raise TypeError(f"speculative_config: expected some of {', '.join(known)}, got {unknown[0]}")
    return SpeculativeConfig(**given)


def _loaded(
    path: Path, config: ModelConfig, load_format: str, quantization: str | None, device: str, dtype: str
) -> Transformer:  # fmt: skip
    if load_format == "dummy":
        model = _random(config, device, dtype)
        return model if quantization is None else on_the_fly(model, quantization)
    if quantization is None:
        return load(path, device, dtype)
    return load_on_the_fly(path, quantization, device, dtype)


def _random(config: ModelConfig, device: str, dtype: str) -> Transformer:
    """A model of this shape with random weights."""
    where = resolve_device(device)
    with where:  # drawn where they will be
        model = Transformer(config)
    model = model.to(where, resolve_dtype(dtype, where)).eval().requires_grad_(False)
    if config.quantization_config is not None:
        round_model(model, CompressedTensors.from_config(config.quantization_config))
    return model
