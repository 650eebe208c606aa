"""From what is asked for to a running request: its adapter, a place in the queue, tokens, the engine.

What may take long (a template, the tokens of a long text) is done by a few threads beside the event loop and the
engine's.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..adapters.serving import LoRARequest
from ..llm import LLM
from ..model.tokenizer import Tokenizer
from ..model.tokenizer_hf import HuggingFaceTokenizer
from .admission import Admission, Bucket, Ticket
from .answers import Answer
from .bodies import BodyReader, Refused
from .bridge import EngineThread, Piece, Prompt, Stream
from .errors import ApiError, of_generation, of_value
from .process import EngineProcess
from .protocol import Asked
from .response_cache import CacheConfig, Flight, ResponseCache, digest, is_determined

__all__ = ["Replayed", "Running", "ServerConfig", "Service"]

T = TypeVar("T")
WORKERS = 2  # threads for templates and tokens


@dataclass(frozen=True)
class ServerConfig:
    """What a server allows.

    - name: what the model is called. adapters: {name: folder in PEFT's format}, chosen by these names as `model`.
    - api_keys: one of them is needed for everything but /health and the page; none: everybody may.
    - max_queued_requests, max_queued_tokens: what may wait for its first token, in requests (each of n counts) and in
      tokens of prompts. tokens_per_minute: of each key, prompts and outputs together; None: no limit.
    - cache: where answers are kept that are determined, and given again; None: nowhere.
    - timeout: seconds that any request may take. body_seconds, send_seconds: that a client may take to send a body,
      and to take what it is sent. max_body_bytes: of one body; of all that are being read and tokenized, 32 times that.
    """

    name: str = "model"
    adapters: Mapping[str, str] = field(default_factory=dict)
    api_keys: tuple[str, ...] = ()
    max_queued_requests: int = 1024
    max_queued_tokens: int = 1 << 20
    tokens_per_minute: float | None = None
    timeout: float = 600.0
    body_seconds: float = 30.0
    send_seconds: float = 30.0
    max_body_bytes: int = 2 << 20
    cache: CacheConfig | None = None


class Service:
    """One model behind an HTTP server. Raises ValueError for a model without a tokenizer, and for an adapter that
    cannot be used.
    """

    def __init__(self, model: LLM | EngineProcess, config: ServerConfig) -> None:
        if model.tokenizer is None:
            raise ValueError("model: expected one with a tokenizer.json, as clients send text")
        self.model, self.config = model, config
        self.engine = model if isinstance(model, EngineProcess) else EngineThread(model.engine)
        self.tokenizer: Tokenizer | HuggingFaceTokenizer = model.tokenizer
        adapters = enumerate(config.adapters.items(), 1)
        self.adapters = {name: LoRARequest(name, number, path) for number, (name, path) in adapters}
        ids = range(self.tokenizer.vocab_size)
        self.longest = max([len(self.tokenizer.token_bytes(i)) for i in ids if self._has_token(i)], default=1)
        self.admission = Admission(config.max_queued_requests, config.max_queued_tokens)
        self.buckets: dict[str, Bucket] = {}
        self.pool = ThreadPoolExecutor(WORKERS, "tokens")
        self.bodies = BodyReader(config.max_queued_requests)
        self.cache: ResponseCache | None = None
        if config.cache is not None:
            self.cache = ResponseCache(config.cache, {n: digest(Path(p)) for n, p in config.adapters.items()})

    def _has_token(self, token: int) -> bool:
        try:
            return bool(self.tokenizer.token_bytes(token))
        except ValueError:
            return False

    def close(self) -> None:
        """Refuse what comes, drop what runs."""
        self.admission.closed = True
        self.engine.stop()
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.bodies.close()

    async def check(self, body: bytes | bytearray) -> None:
        """Have another process read a large body first. Raises ApiError for one that wants too much."""
        try:
            await asyncio.get_running_loop().run_in_executor(self.bodies.thread, self.bodies.check, body)
        except Refused as error:
            raise ApiError(400, error.message, error.param) from None

    async def in_pool(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function beside the event loop. What it refuses is the client's fault."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, function, *arguments)
        except (ValueError, TypeError) as error:
            raise of_value(error) from error

    async def begin(self, asked: Asked, key: str = "", fresh: bool = False) -> "Running | Replayed":
        """Queue a request, or find its answer unless it shall be fresh. Raises ApiError for what cannot be served, or
        not now.
        """
        self._adapter(asked.model)
        if self.cache is None or fresh or self.admission.closed or not is_determined(asked):
            return await self._queue(asked, key)
        name = await self.in_pool(self.cache.name, asked, key)
        flight, source = await self.cache.join(name, lambda: self._queue(asked, key))
        return Replayed(self, self._answer(asked, await flight.begun()), flight, source)

    async def _queue(self, asked: Asked, key: str) -> "Running":
        adapter = self._adapter(asked.model)
        ticket = self.admission.enter(max(1, len(asked.prompts)) * asked.params.n)
        charge = None
        try:
            prompts = await self.in_pool(self._prompts, asked, adapter)
            tokens = sum([len(prompt.token_ids) for prompt in prompts])
            ticket.sized(tokens)
            charge = self._charge(key, tokens, prompts)
            try:
                stream = await self.engine.submit(prompts)
            except (ValueError, TypeError) as error:
                raise of_value(error) from error
            except RuntimeError as error:
                raise of_generation(error) from error
        except BaseException:
            ticket.close()
            if charge is not None:
                charge[0].refund(charge[1])
            raise
        return Running(self, self._answer(asked, [prompt.token_ids for prompt in prompts]), stream, ticket, charge)

    def _answer(self, asked: Asked, prompts: list[list[int]]) -> Answer:
        return Answer(asked, prompts, self.tokenizer, asked.model or self.config.name)

    def encode(self, where: str, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text. Raises ApiError for one that is too long, before it is looked at."""
        if len(text) > self.longest * self.model.max_model_len:
            raise self._too_long(where, f"a text of {len(text)} characters")
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def chat_prompt(self, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> list[int]:
        """The tokens of a conversation. Raises as `encode`, and ValueError where the template does."""
        text = self.tokenizer.apply_chat_template(messages, **variables)
        return self.encode("messages", text, add_special_tokens=False)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _adapter(self, model: str | None) -> LoRARequest | None:
        if model in (None, self.config.name):
            return None
        if model not in self.adapters:
            known = ", ".join([self.config.name, *self.adapters])
            raise ApiError(404, f"model: expected one of {known}, got {model!r:.100}", "model", "model_not_found")
        return self.adapters[model]

    def _prompts(self, asked: Asked, adapter: LoRARequest | None) -> list[Prompt]:
        """In a thread of the pool."""
        where = "prompt" if asked.messages is None else "messages"
        if asked.messages is None:
            found = [self.encode(where, one) if isinstance(one, str) else one for one in asked.prompts]
        else:
            found = [self.chat_prompt(asked.messages, asked.variables)]
        for ids in found:
            if len(ids) >= self.model.max_model_len:
                raise self._too_long(where, f"{len(ids)}")
            self._in_vocabulary(ids, where)
        return [Prompt(ids, asked.params, adapter, asked.priority, asked.cache_salt) for ids in found]

    def _in_vocabulary(self, ids: list[int], where: str) -> None:
        size = self.model.vocab_size
        if not ids or min(ids) < 0 or max(ids) >= size:
            raise ApiError(400, f"{where}: expected token ids in 0..{size - 1}, at least one", where)

    def _too_long(self, where: str, got: str) -> ApiError:
        most = self.model.max_model_len - 1
        return ApiError(400, f"{where}: expected at most {most} tokens, got {got}", where, "context_length_exceeded")

    def _charge(self, key: str, tokens: int, prompts: list[Prompt]) -> tuple[Bucket, float] | None:
        """Take from the key's bucket -> (it, what may flow back)."""
        if self.config.tokens_per_minute is None:
            return None
        longest = self.model.max_model_len
        output = sum([p.params.n * min(p.params.max_tokens, longest - len(p.token_ids)) for p in prompts])
        bucket = self.buckets.setdefault(key, Bucket(self.config.tokens_per_minute))
        if tokens + output > bucket.per_minute:
            raise ApiError(400, f"max_tokens: expected a request of at most {bucket.per_minute:.0f} tokens, output"
                           f" included, got {tokens + output}", "max_tokens")  # fmt: skip
        if seconds := bucket.wait(tokens + output):
            advice = {"Retry-After": str(int(seconds) + 1)}
            raise ApiError(429, "this key's tokens of the minute are spent", code="rate_limit_exceeded", headers=advice)
        return bucket, output


@dataclass
class Replayed:
    """A request whose answer others read, too, or have read. `close` it, however it ends."""

    service: Service
    answer: Answer
    flight: Flight
    source: str  # hit, shared or miss

    def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """As `Running.pieces`."""
        return self.flight.pieces()

    def close(self) -> None:
        """Nobody wants more of it, for all this client cares."""
        self.flight.leave()


@dataclass
class Running:
    """A request that the engine has. `close` it, however it ends."""

    service: Service
    answer: Answer
    stream: Stream
    ticket: Ticket
    charge: tuple[Bucket, float] | None
    source = ""

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """What its choices get. Raises ApiError where one fails."""
        async for index, piece in self.stream:
            self.ticket.leave(index)
            if piece.finish_reason in ("error", "abort"):
                raise of_generation(piece.error)
            yield index, piece

    def close(self) -> None:
        """Nobody wants more of it."""
        self.service.engine.abort(self.stream)
        self.ticket.close()
        if self.charge is not None:
            bucket, output = self.charge
            bucket.refund(output - self.answer.spent)
