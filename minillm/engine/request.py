"""One request on its way through the engine."""

from dataclasses import dataclass, field

from ..cache.blocks import BlockTable
from ..sampling import SamplingParams

__all__ = ["Request"]


@dataclass(eq=False)
class Request:
    """A prompt, what has been generated, and how far the cache is.

    `num_computed` tokens have their keys and values in the cache (or will have, once the steps that were launched are
    done); it chases `num_tokens`, the tokens there are. Where it catches up, the next token is sampled. Preemption sets
    it back to 0. `order` is the time of arrival, as a count; a smaller `priority` goes first.
    """

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    table: BlockTable
    order: int = 0
    priority: int = 0
    output_token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_preemptions: int = 0
    num_cached: int = 0
    finish_reason: str | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def rank(self) -> tuple[int, int]:
        """Who goes first: the smaller."""
        return self.priority, self.order

    def tokens(self, start: int = 0, count: int | None = None) -> list[int]:
        """Tokens start ... start + count - 1 of prompt and output; all from `start` on without a count."""
        prompt = len(self.prompt_token_ids)
        stop = self.num_tokens if count is None else start + count
        if start >= prompt:
            return self.output_token_ids[start - prompt : stop - prompt]
        return self.prompt_token_ids[start:stop] + self.output_token_ids[: max(0, stop - prompt)]
