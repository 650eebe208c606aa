"""`LLM`: load a model, generate text. The names are vLLM's.

llm = LLM("smollm2-135m-instruct")
outs = llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=32))
for piece in llm.stream("Tell me about caches", SamplingParams(max_tokens=200)): print(piece, end="")

Prompts become requests to an `Engine` (`llm.engine`), which runs them together.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .config import ModelConfig
from .engine.engine import Engine
from .engine.request import Request
from .model import Transformer
from .model.tokenizer import Tokenizer
from .model.weights import load, model_path, resolve_device, resolve_dtype
from .sampling import SamplingParams

__all__ = ["LLM", "Completion", "Metrics", "RequestOutput", "TextStream"]

Prompt = str | list[int]


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
    """What one prompt gave: `outputs`, as many as `n` asked for. The first one's fields are this one's too."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Completion] = field(default_factory=list)
    metrics: Metrics = field(default_factory=Metrics)

    @property
    def text(self) -> str:
        """The first completion's text."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        """The first completion's tokens, an end token included."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        """Why the first completion ended."""
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

    def __init__(self, output: RequestOutput, pieces: Iterator[str]) -> None:
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

    model: a known name, a Hugging Face directory or id. device: "auto", "cpu", "cuda". dtype: "auto" (bf16 on a GPU,
    fp32 on a CPU) or a name. load_format: "auto", or "dummy" for random weights from a `config.json` alone.
    max_model_len: longest sequence, prompt included; by default the model's context, or what the cache holds.
    The other arguments are the `Engine`'s. Raises ValueError for an argument that does not fit, and MemoryError when
    the device has no room, with what was expected.
    """

    def __init__(
        self,
        model: str | os.PathLike,
        *,
        device: str = "auto",
        dtype: str = "auto",
        load_format: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int | None = None,
        block_size: int = 16,
        enable_prefix_caching: bool = True,
        gpu_memory_utilization: float = 0.9,
        enforce_eager: bool = False,
        async_scheduling: bool | None = None,
    ) -> None:
        if load_format not in ("auto", "dummy"):
            raise ValueError(f'load_format: expected "auto" or "dummy", got {load_format!r}')
        path = model_path(model)
        config = ModelConfig.from_pretrained(path)
        context = config.max_position_embeddings
        if max_model_len is not None and not 2 <= max_model_len <= context:  # before any weight is read
            raise ValueError(f"max_model_len: expected 2 to {context} (the model's context), got {max_model_len}")
        try:
            self.model = load(path, device, dtype) if load_format == "auto" else _random(config, device, dtype)
        except torch.OutOfMemoryError as error:
            needed = config.weight_bytes() / 1e9
            raise MemoryError(
                f"model: the weights ({needed:.1f} GB in bfloat16) do not fit beside what the GPU holds already; free"
                " it, take a smaller model or dtype"
            ) from error
        self.tokenizer = Tokenizer.from_pretrained(path) if (path / "tokenizer.json").is_file() else None
        self.engine = Engine(
            self.model, block_size=block_size, max_num_seqs=max_num_seqs, max_model_len=max_model_len,
            max_num_batched_tokens=max_num_batched_tokens, enable_prefix_caching=enable_prefix_caching,
            tokenizer=self.tokenizer, enforce_eager=enforce_eager, async_scheduling=async_scheduling,
            gpu_memory_utilization=gpu_memory_utilization,
        )  # fmt: skip

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence, prompt included."""
        return self.engine.max_model_len

    # ---- what users call ---------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete each prompt (text, or a list of token ids), with one `SamplingParams` for all or one each.

        All run together; every prompt is checked before the first is run. Should a request fail, the others go on, and
        a warning says which one; its `finish_reason` is "error". Raises ValueError for an empty or too long prompt and
        for ids outside the vocabulary; the error itself when all requests failed.
        """
        from tqdm.auto import tqdm

        each = self._each(prompts, sampling_params)
        with tqdm(total=len(each), desc="generate", unit="prompt", disable=not use_tqdm) as bar:
            requests = self._add(each)
            try:
                self._finish(requests, bar)
            except BaseException:  # Ctrl-C too: nothing of these requests stays behind
                self.engine.reset()
                raise
        for (output, _), some in zip(each, requests, strict=True):
            output.update(some)
        self._report([request for some in requests for request in some])
        return [output for output, _ in each]

    def chat(
        self,
        messages: list[dict[str, str]] | list[list[dict[str, str]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several: lists of {"role": ..., "content": ...}. Else as `generate`."""
        several = messages if messages and isinstance(messages[0], list) else [messages]
        return self.generate([self.chat_prompt(m) for m in several], sampling_params, use_tqdm)

    def chat_prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """The token ids of a conversation in the model's own chat format, ready for the answer."""
        if self.tokenizer is None:
            raise ValueError(
                "messages: this model directory has no tokenizer.json, so no chat template; pass token ids"
            )
        # The template writes the special tokens itself: a second begin-of-text in front would be one too many.
        return self.tokenizer.encode(self.tokenizer.apply_chat_template(messages), add_special_tokens=False)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> "TextStream":
        """Complete one prompt and yield the text piece by piece; a piece never ends inside a character or inside a
        stop string.
        """
        params = sampling_params or SamplingParams()
        if params.n != 1:
            raise ValueError(f"n: expected 1 in a stream, got {params.n}; `generate` gives several completions")
        [(output, _)] = self._each([prompt], params)
        return TextStream(output, self._pieces(output, params))

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _each(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[tuple[RequestOutput, SamplingParams]]:
        if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
            prompts = [prompts]
        params = sampling_params or SamplingParams()
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"sampling_params: expected one for all or one each ({len(prompts)}), got {len(each)}")
        return [(self._output(i, prompt), p) for i, (prompt, p) in enumerate(zip(prompts, each, strict=True))]

    def _output(self, index: int, prompt: Prompt) -> RequestOutput:
        """Encode and check one prompt."""
        where = f"prompts[{index}]"
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(f"{where}: expected token ids, got text: this model directory has no tokenizer.json")
            ids = self.tokenizer.encode(prompt)
        elif isinstance(prompt, Sequence) and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt):
            ids = list(prompt)
        else:
            raise ValueError(f"{where}: expected text or a list of token ids, got {type(prompt).__name__}")
        vocab = self.model.config.vocab_size
        if not ids:
            raise ValueError(f"{where}: expected at least one token, got an empty prompt")
        if bad := [i for i in ids if not 0 <= i < vocab]:
            raise ValueError(f"{where}: expected token ids in 0..{vocab - 1}, got {bad[0]}")
        if len(ids) >= self.max_model_len:
            raise ValueError(
                f"{where}: expected at most {self.max_model_len - 1} tokens (max_model_len less one to generate),"
                f" got {len(ids)}; shorten it"
            )
        return RequestOutput(prompt if isinstance(prompt, str) else None, ids)

    def _add(self, each: list[tuple[RequestOutput, SamplingParams]]) -> list[list[Request]]:
        """Queue all prompts, or none -> the requests of each."""
        added: list[list[Request]] = []
        try:
            for output, params in each:
                name = self.engine.add_request(output.prompt_token_ids, params)
                names = [name, *(f"{name}/{i}" for i in range(1, params.n))]
                added.append([self.engine.requests[name] for name in names])
        except ValueError:
            for some in added:
                self.engine.abort(some[0].id)
            raise
        return added

    def _finish(self, requests: list[list[Request]], bar: Any) -> None:
        """Step until all are finished."""
        group = {request: index for index, some in enumerate(requests) for request in some}
        left = [len(some) for some in requests]
        while any(left):
            for request in self.engine.step():
                if request.finished and request in group:
                    left[group[request]] -= 1
                    if not left[group[request]]:
                        bar.update()

    def _report(self, requests: list[Request]) -> None:
        failed = [request for request in requests if request.error is not None]
        if failed and len(failed) == len(requests):
            raise failed[0].error
        for request in failed:
            warnings.warn(f"request {request.id} failed: {request.error!r}; the others went on", stacklevel=3)

    def _pieces(self, output: RequestOutput, params: SamplingParams) -> Iterator[str]:
        [[request]] = self._add([(output, params)])
        given = 0
        try:
            while not request.finished or len(request.text) > given:
                if len(request.text) == given:  # else another stream's step brought it
                    self.engine.step()
                output.update([request])
                piece, given = request.text[given:], len(request.text)
                if piece:
                    yield piece
        finally:
            self.engine.abort(request.id)
            output.update([request])
        if request.error is not None:
            raise request.error


def _random(config: ModelConfig, device: str, dtype: str) -> Transformer:
    """A model of this shape with random weights."""
    where = resolve_device(device)
    with where:  # drawn where they will be
        model = Transformer(config)
    return model.to(where, resolve_dtype(dtype, where)).eval().requires_grad_(False)
