"""`LLM`: load a model, generate text. The names are vLLM's.

llm = LLM("smollm2-135m-instruct")
outs = llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=32))
for piece in llm.stream("Tell me about caches", SamplingParams(max_tokens=200)): print(piece, end="")
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .config import ModelConfig
from .generate import naive
from .model import Transformer
from .model.tokenizer import StreamDecoder, Tokenizer
from .model.weights import load, model_path, resolve_device, resolve_dtype
from .sampling import SamplingParams

__all__ = ["LLM", "Metrics", "RequestOutput", "TextStream"]

Prompt = str | list[int]


@dataclass
class Metrics:
    """Wall-clock seconds of one request: until the first token, and in all."""

    time_to_first_token: float = 0.0
    total_time: float = 0.0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over the whole time, prompt included."""
        return self.num_generated_tokens / self.total_time if self.total_time else 0.0


@dataclass
class RequestOutput:
    """What one prompt gave. `finish_reason` is "stop" (end token, stop token or stop string) or "length"."""

    prompt: str | None
    prompt_token_ids: list[int]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[dict[int, float]] | None = None
    metrics: Metrics = field(default_factory=Metrics)


class TextStream:
    """An iterator over pieces of text. `output` is the request so far; complete, with its metrics, once the iterator
    ends.
    """

    def __init__(self, output: RequestOutput, pieces: Iterator[str]) -> None:
        self.output, self._pieces = output, pieces

    def __iter__(self) -> "TextStream":
        return self

    def __next__(self) -> str:
        return next(self._pieces)


class LLM:
    """A model and its tokenizer, ready to generate.

    model: a known name, a Hugging Face directory or id. device: "auto", "cpu", "cuda". dtype: "auto" (bf16 on a GPU,
    fp32 on a CPU) or a name. load_format: "auto", or "dummy" for random weights from a `config.json` alone.
    max_model_len: longest sequence, prompt included. Raises ValueError for an argument that does not fit, with what
    was expected.
    """

    def __init__(
        self,
        model: str | os.PathLike,
        *,
        device: str = "auto",
        dtype: str = "auto",
        load_format: str = "auto",
        max_model_len: int | None = None,
    ) -> None:
        if load_format not in ("auto", "dummy"):
            raise ValueError(f'load_format: expected "auto" or "dummy", got {load_format!r}')
        path = model_path(model)
        config = ModelConfig.from_pretrained(path)
        context = config.max_position_embeddings
        if max_model_len is not None and not 1 <= max_model_len <= context:
            raise ValueError(f"max_model_len: expected 1 to {context} (the model's context), got {max_model_len}")
        self.max_model_len = max_model_len or context
        if load_format == "dummy":
            where = resolve_device(device)
            self.model = Transformer(config).to(where, resolve_dtype(dtype, where)).eval().requires_grad_(False)
        else:
            self.model = load(path, device, dtype)
        self.tokenizer = Tokenizer.from_pretrained(path) if (path / "tokenizer.json").is_file() else None

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete each prompt (text, or a list of token ids), with one `SamplingParams` for all or one each.

        Every prompt is checked before the first is run. Raises ValueError for an empty or too long prompt and for ids
        outside the vocabulary.
        """
        from tqdm.auto import tqdm

        requests = self._requests(prompts, sampling_params)
        for request, params in tqdm(requests, desc="generate", unit="prompt", disable=not use_tqdm):
            for _ in self._run(request, params):
                pass
        return [request for request, _ in requests]

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
        [(request, params)] = self._requests([prompt], sampling_params)
        return TextStream(request, self._run(request, params))

    def _requests(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[tuple[RequestOutput, SamplingParams]]:
        if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
            prompts = [prompts]
        params = sampling_params or SamplingParams()
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"sampling_params: expected one for all or one each ({len(prompts)}), got {len(each)}")
        return [(self._request(i, prompt), p) for i, (prompt, p) in enumerate(zip(prompts, each, strict=True))]

    def _request(self, index: int, prompt: Prompt) -> RequestOutput:
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
        return RequestOutput(prompt=prompt if isinstance(prompt, str) else None, prompt_token_ids=ids)

    def _run(self, request: RequestOutput, params: SamplingParams) -> Iterator[str]:
        """Generate into `request`, yielding text that is final."""
        start = time.perf_counter()
        text = (
            _StopText(params.stop, StreamDecoder(self.tokenizer, skip_special_tokens=True)) if self.tokenizer else None
        )
        request.logprobs = None if params.logprobs is None else []
        request.metrics.num_prompt_tokens = len(request.prompt_token_ids)
        request.finish_reason = "length"
        for token in naive(self.model, request.prompt_token_ids, params, self.max_model_len):
            request.metrics.time_to_first_token = request.metrics.time_to_first_token or time.perf_counter() - start
            request.token_ids.append(int(token))
            if request.logprobs is not None:
                request.logprobs.append(token.logprobs)
            if token.is_end:
                request.finish_reason = "stop"
                break
            if text is not None:
                piece = text.push(int(token))
                request.text += piece
                if piece:
                    yield piece
                if text.stopped:
                    request.finish_reason = "stop"
                    break
        request.metrics.num_generated_tokens = len(request.token_ids)
        request.metrics.total_time = time.perf_counter() - start
        if text is not None and (rest := text.flush()):
            request.text += rest
            yield rest


class _StopText:
    """Text that ends before the first stop string: what might begin one is held back until it is clear."""

    def __init__(self, stop: Sequence[str], decoder: StreamDecoder) -> None:
        self.stop, self.decoder, self.held, self.stopped = stop, decoder, "", False

    def push(self, token: int) -> str:
        return self._release(self.decoder.push(token))

    def flush(self) -> str:
        if self.stopped:
            return ""
        piece = self._release(self.decoder.flush())
        rest, self.held = ("", "") if self.stopped else (self.held, "")
        return piece + rest

    def _release(self, piece: str) -> str:
        self.held += piece
        found = [at for stop in self.stop if (at := self.held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self.held[: min(found)]
        keep = max((n for stop in self.stop for n in range(1, len(stop)) if self.held.endswith(stop[:n])), default=0)
        ready, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return ready
