"""One request on its way through the engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from ..adapters.serving import Loaded
from ..cache.blocks import BlockTable
from ..sampling import SamplingParams
from .constraints import Follower
from .text import StopText

if TYPE_CHECKING:
    from .draft_length import Acceptance

__all__ = ["Request", "known"]


@dataclass(eq=False)
class Request:
    """A prompt, what has been generated, and how far the cache is. Known by itself: names may come again.

    `num_computed` tokens have their keys and values in the cache (or will have, once the steps that were launched are
    done); it chases `num_tokens`, the tokens there are. Where it catches up, the next token is sampled: first it is
    pending (`num_pending`: it exists on the device, and the host has not read it yet), then it is in
    `output_token_ids`. A step that computes more tokens than there are checks guesses, up to `drafts` (see
    `speculative.py`; `acceptance`: how often they were right), and may give as many more: then both counts are bounds
    until it is read. Preemption sets `num_computed` back to 0. A running request has a `row`, where the device keeps
    its tokens and its block table; `on_device` says whether it is filled. `epoch` counts how often what was on its way
    was declared void.

    At most `max_tokens` are generated; one of `ends` is the last. `order` is the time of arrival, as a count; a smaller
    `priority` goes first. `parent`: the request whose prompt is the same, and whose blocks this one shares once they
    are computed (n > 1). `options`: values of the row that do not stand in `params` (the seed that was drawn).
    `allowed`: asked before each draw, with the tokens so far, for the tokens that may come: bool [vocabulary], or None
    for all; or a `Follower`. `adapter`: what its tokens are computed with beside the model; while it runs, in the
    device's `slot`. Times are in seconds, as `time.perf_counter` counts.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    table: BlockTable
    max_tokens: int
    ends: frozenset[int] = frozenset()
    options: dict[str, float] = field(default_factory=dict)
    order: int = 0
    priority: int = 0
    drafts: int = 0
    acceptance: "Acceptance | None" = None
    parent: "Request | None" = None
    allowed: Callable[[Sequence[int]], Tensor | None] | Follower | None = None
    adapter: Loaded | None = None
    slot: int = -1
    text_stream: StopText | None = None
    output_token_ids: list[int] = field(default_factory=list)
    new_token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[dict[int, float] | None] | None = None
    text: str = ""
    new_text: str = ""
    num_computed: int = 0
    num_pending: int = 0
    num_preemptions: int = 0
    num_cached: int = 0
    row: int = -1
    on_device: bool = False
    epoch: int = 0
    finish_reason: str | None = None
    error: BaseException | None = None
    arrival_time: float = 0.0
    admission_time: float = 0.0
    first_token_time: float = 0.0
    last_token_time: float = 0.0

    def __post_init__(self) -> None:
        p = self.params
        self.num_prompt_tokens = len(self.prompt_token_ids)
        self.has_penalties = p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
        filters = p.temperature > 0 and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0)
        self.is_filtered = self.has_penalties or filters  # more than a temperature decides the token
        self.is_edited = bool(p.logit_bias) or p.min_tokens > 0  # logits may change before that
        reported = p.logprobs is not None or p.prompt_logprobs is not None
        self.is_plain = not (self.is_filtered or self.is_edited or reported)

    @property
    def finished(self) -> bool:
        """Whether nothing more will come: `finish_reason` is "stop", "length", "abort" or "error"."""
        return self.finish_reason is not None

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output, the pending ones included."""
        return self.num_prompt_tokens + len(self.output_token_ids) + self.num_pending

    @property
    def num_output(self) -> int:
        """Tokens generated, the pending ones included."""
        return len(self.output_token_ids) + self.num_pending

    @property
    def is_full(self) -> bool:
        """Whether as many tokens as it may have are sampled, known or pending: nothing is left to compute."""
        return len(self.output_token_ids) + self.num_pending >= self.max_tokens

    @property
    def precedence(self) -> tuple[int, int]:
        """Who goes first: the smaller."""
        return self.priority, self.order

    def tokens(self) -> list[int]:
        """Prompt and output, as far as the host knows them."""
        return self.prompt_token_ids + self.output_token_ids

    @property
    def first_unsure(self) -> int:
        """Where the next step begins, at the earliest: guesses on their way may all be wrong."""
        if self.num_pending <= 1:
            return self.num_computed
        return min(self.num_computed, self.num_prompt_tokens + len(self.output_token_ids) - 1)

    def most(self, count: int) -> int:
        """How many tokens computing `count` more gives at most: one where it catches up, and one for each guess."""
        return max(0, self.num_computed + count - self.num_tokens + 1)


def known(value: int | None) -> int:
    """A field of `EngineConfig` that `resolved` has filled. Raises ValueError where it has not."""
    if value is None:
        raise ValueError("config: expected a resolved EngineConfig")
    return value
