"""One request on its way through the engine."""

from dataclasses import dataclass, field

from ..cache.blocks import BlockTable
from ..sampling import SamplingParams
from .text import StopText

__all__ = ["Request"]


@dataclass(eq=False)
class Request:
    """A prompt, what has been generated, and how far the cache is.

    `num_computed` tokens have their keys and values in the cache (or will have, once the steps that were launched are
    done); it chases `num_tokens`, the tokens there are. Where it catches up, the next token is sampled: first it is
    pending (`num_pending`: it exists on the device, and the host has not read it yet), then it is in
    `output_token_ids`. Preemption sets `num_computed` back to 0. A running request has a `row`, where the device keeps
    its tokens and its block table.

    At most `max_tokens` are generated; one of `ends` is the last. `order` is the time of arrival, as a count; a smaller
    `priority` goes first. `parent`: the request whose prompt is the same, and whose blocks this one shares once they
    are computed (n > 1). Times are in seconds, as `time.perf_counter` counts.
    """

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    table: BlockTable
    max_tokens: int
    ends: frozenset[int] = frozenset()
    seed: int = 0
    order: int = 0
    priority: int = 0
    parent: "Request | None" = None
    text_stream: StopText | None = None
    output_token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] | None = None
    text: str = ""
    new_text: str = ""
    num_computed: int = 0
    num_pending: int = 0
    num_preemptions: int = 0
    num_cached: int = 0
    row: int = -1
    on_device: bool = False
    finish_reason: str | None = None
    error: BaseException | None = None
    arrival_time: float = 0.0
    first_token_time: float = 0.0
    last_token_time: float = 0.0

    @property
    def request_id(self) -> str:
        """The name under which it was added."""
        return self.id

    @property
    def new_token_ids(self) -> list[int]:
        """What the last step gave: one token."""
        return self.output_token_ids[-1:]

    @property
    def finished(self) -> bool:
        """Whether nothing more will come: `finish_reason` is "stop", "length", "abort" or "error"."""
        return self.finish_reason is not None

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output, the pending one included."""
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.num_pending

    @property
    def num_output(self) -> int:
        """Tokens generated, the pending one included."""
        return len(self.output_token_ids) + self.num_pending

    @property
    def is_full(self) -> bool:
        """Whether as many tokens as it may have are sampled, known or pending: nothing is left to compute."""
        return len(self.output_token_ids) + self.num_pending >= self.max_tokens

    @property
    def rank(self) -> tuple[int, int]:
        """Who goes first: the smaller."""
        return self.priority, self.order

    def tokens(self) -> list[int]:
        """Prompt and output, as far as the host knows them."""
        return self.prompt_token_ids + self.output_token_ids
