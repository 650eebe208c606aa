"""Requests whose output has a guaranteed form: from their parameters to the mask of the next token.

Constraints are compiled by whoever adds the request, not by the loop; the last ones are kept, since many requests ask
for the same schema. In the loop `Request.allowed` is asked before each draw, with all tokens so far (see
`Engine._masks`): it goes on from where it was, and a request that was preempted has the tokens that it had.
"""

import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ..constrained import Constraint, Vocabulary, compile_constraint
from ..sampling import SamplingParams

__all__ = ["Constraints", "Follower"]

KEPT = 64  # compiled constraints


class Follower:
    """One request's way through its constraint: called with its tokens -> which may come next, bool [vocabulary]."""

    def __init__(self, constraint: Constraint, prompt: int) -> None:
        self.constraint, self.seen, self.state = constraint, prompt, constraint.start

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        for token in tokens[self.seen :]:
            self.state = self.constraint.advance(self.state, token)
        self.seen = len(tokens)
        return torch.tensor(self.constraint.allowed(self.state))


class Constraints:
    """What the requests of one engine ask for, over its tokenizer. end_ids: tokens that end a text; size: how many
    logits the model gives, those without a token included.
    """

    def __init__(self, tokenizer: Any, end_ids: Collection[int], size: int) -> None:
        self.tokenizer, self.end_ids, self.size = tokenizer, sorted(i for i in end_ids if i < size), size
        self.vocabulary: Vocabulary | None = None
        self.found: OrderedDict[Any, Constraint] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, params: SamplingParams) -> Constraint | None:
        """Raises ConstraintError, a ValueError, for what cannot be kept, and ValueError where it cannot be used."""
        wanted = params.structured_outputs
        if wanted is None:
            return None
        if self.tokenizer is None:
            raise ValueError("structured_outputs: expected none, as this engine has no tokenizer")
        with self._lock:
            if self.vocabulary is None:
                self.vocabulary = Vocabulary.of(self.tokenizer, self.end_ids, self.size)
            kept = self.found.get(wanted)
            if kept is not None:
                self.found.move_to_end(wanted)
                return kept
        made = compile_constraint(*wanted.asked, self.vocabulary)
        with self._lock:
            self.found[wanted] = made
            while len(self.found) > KEPT:
                self.found.popitem(last=False)
        return made
