"""From pieces to OpenAI's objects: a whole answer, or its chunks.

The forms of the two endpoints differ in three things: where a choice's text stands, how log probabilities are written,
and that a conversation's first chunk names the role. Source: OpenAI's API reference, "Chat" and "Completions".
"""

import time
import uuid
from collections.abc import Mapping
from typing import Any

from ..model.tokenizer import Tokenizer
from ..model.tokenizer_hf import HuggingFaceTokenizer
from .bridge import Piece
from .protocol import Asked

__all__ = ["Answer"]

LEAST = -9999.0  # OpenAI's number for a probability of 0: JSON has no infinity


class Answer:
    """What one request is answered. prompts: the token ids of each; model: the name that is told."""

    def __init__(
        self, asked: Asked, prompts: list[list[int]], tokenizer: Tokenizer | HuggingFaceTokenizer, model: str
    ) -> None:
        self.asked, self.prompts, self.tokenizer = asked, prompts, tokenizer
        self.chat = asked.messages is not None
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.facts = {"created": int(time.time()), "model": model}
        self.spent, self.cached = 0, dict[int, int]()  # tokens generated; of each prompt, what the cache held
        self.offsets: dict[int, int] = {}  # characters of each choice whose tokens have been told

    @property
    def choices(self) -> int:
        """How many there are."""
        return len(self.prompts) * self.asked.params.n

    # ---- chunks ------------------------------------------------------------------------------------------------------

    def first(self) -> list[dict[str, Any]]:
        """The chunks before any token: a conversation's role."""
        if not self.chat:
            return []
        start = {"role": "assistant", "content": ""}
        return [self._chunk({"index": i, "delta": start, "logprobs": None}) for i in range(self.choices)]

    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """What a piece becomes: its text, and at the choice's end why it ended."""
        found = []
        text, logprobs = self._take(index, piece)
        if text or logprobs:
            where: dict[str, Any] = {"delta": {"content": text}} if self.chat else {"text": text}
            found.append(self._chunk({"index": index, **where, "logprobs": logprobs}))
        if piece.finish_reason is not None:
            where = {"delta": {}} if self.chat else {"text": ""}
            found.append(self._chunk({"index": index, **where, "logprobs": None}, piece.finish_reason))
        return found

    def last(self) -> list[dict[str, Any]]:
        """The chunks behind all choices: what was used, if it was asked for."""
        usage = self._object(True) | {"choices": [], "usage": self.usage()}
        return [usage] if self.asked.include_usage else []

    # ---- whole -------------------------------------------------------------------------------------------------------

    def whole(self, pieces: Mapping[int, Piece]) -> dict[str, Any]:
        """The answer that is sent at once, of what each choice got in all."""
        choices = []
        for index in range(self.choices):
            text, logprobs = self._take(index, pieces[index])
            message = {"role": "assistant", "content": text, "refusal": None}
            where: dict[str, Any] = {"message": message} if self.chat else {"text": text}
            reason = pieces[index].finish_reason
            choices.append({"index": index, **where, "logprobs": logprobs, "finish_reason": reason})
        return self._object(False) | {"choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens, as far as they are known."""
        prompt = sum([len(ids) for ids in self.prompts])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.spent,
            "total_tokens": prompt + self.spent,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
        }

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _object(self, chunk: bool) -> dict[str, Any]:
        kind = f"chat.completion{'.chunk' if chunk else ''}" if self.chat else "text_completion"
        return {"id": self.id, "object": kind, **self.facts}

    def _chunk(self, choice: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        found = self._object(True) | {"choices": [choice | {"finish_reason": finish_reason}]}
        usage = self.usage() if self.asked.continuous_usage else None
        return found | {"usage": usage} if self.asked.include_usage else found

    def _take(self, index: int, piece: Piece) -> tuple[str, dict[str, Any] | None]:
        """A piece's text and log probabilities; where `echo` asks, with the prompt's before a choice's first one."""
        n, text, tokens, logprobs = self.asked.params.n, piece.text, piece.token_ids, list[Any](piece.logprobs)
        if index % n == 0:  # the others share the first one's blocks, which is no hit
            self.cached[index // n] = piece.num_cached
        if self.asked.only_prompt:
            text, tokens, logprobs = "", [], []
        self.spent += len(tokens)
        if self.asked.echo and index not in self.offsets:
            prompt = self.prompts[index // n]
            text = self._text_of(index // n) + text
            tokens, logprobs = prompt + tokens, (piece.prompt_logprobs or [None] * len(prompt)) + logprobs
        self.offsets.setdefault(index, 0)
        if self.asked.logprobs is None or not tokens:
            return text, None
        return text, self._chat_logprobs(tokens, logprobs) if self.chat else self._logprobs(index, tokens, logprobs)

    def _text_of(self, prompt: int) -> str:
        given = self.asked.prompts[prompt]
        return given if isinstance(given, str) else self.tokenizer.decode(given)

    def _token(self, token: int) -> tuple[str, bytes]:
        try:
            own = self.tokenizer.token_bytes(token)
        except ValueError:  # the model has rows that no token has
            own = b""
        return own.decode(errors="replace"), own

    def _chat_logprobs(self, tokens: list[int], logprobs: list[dict[int, float]]) -> dict[str, Any]:
        content = []
        for token, found in zip(tokens, logprobs, strict=True):
            best = [self._entry(one, value) for one, value in _best(found, self.asked.logprobs)]
            content.append(self._entry(token, found[token]) | {"top_logprobs": best})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text, own = self._token(token)
        return {"token": text, "logprob": max(logprob, LEAST), "bytes": list(own)}

    def _logprobs(self, index: int, tokens: list[int], logprobs: list[dict[int, float] | None]) -> dict[str, Any]:
        found: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token, known in zip(tokens, logprobs, strict=True):
            text, _ = self._token(token)
            found["text_offset"].append(self.offsets[index])
            found["tokens"].append(text)
            found["token_logprobs"].append(None if known is None else max(known[token], LEAST))
            best = None if known is None else {self._token(i)[0]: max(v, LEAST) for i, v in known.items()}
            found["top_logprobs"].append(best)
            self.offsets[index] += len(text)
        return found


def _best(found: dict[int, float], count: int | None) -> list[tuple[int, float]]:
    return sorted(found.items(), key=lambda item: -item[1])[: count or 0]
