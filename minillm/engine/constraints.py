"""Requests whose output has a guaranteed form: from their parameters to the mask of the next token.

Constraints are compiled by whoever adds the request, not by the loop; the last ones are kept, since many requests ask
for the same schema. In the loop a request's `Follower` is asked before each draw (see `Engine._masks`): it goes on from
where it was, and a request that was preempted has the tokens that it had. Equal masks are one array, which stays on the
device (`MaskTable`): a step sends a number for each sequence.
"""

import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..constrained import Constraint, Vocabulary, compile_constraint, packed
from ..sampling import SamplingParams
from .batch import to_device

if TYPE_CHECKING:
    from .request import Request

__all__ = ["Constraints", "Follower", "MaskTable", "Masks", "masks_of"]

KEPT = 64  # compiled constraints
ROWS = 1024  # masks that stay on the device, 6 to 19 KB each


class Follower:
    """One request's way through its constraint."""

    def __init__(self, constraint: Constraint) -> None:
        self.constraint, self.seen, self.state = constraint, 0, constraint.start

    def masks(self, output_token_ids: Sequence[int], guesses: Sequence[int] = ()) -> list[NDArray[np.int32]]:
        """Which tokens may come next, as `Constraint.packed` says it; and behind each guess, as long as the guesses
        stay in the language: one that leaves it is never drawn, so nobody will ask what comes behind it.
        """
        for i in range(self.seen, len(output_token_ids)):
            self.state = self.constraint.advance(self.state, output_token_ids[i])
        self.seen, state = len(output_token_ids), self.state
        masks = [self.constraint.packed(state)]
        for guess in guesses:
            if not masks[-1][guess // 32] >> guess % 32 & 1:
                break
            state = self.constraint.advance(state, guess)
            masks.append(self.constraint.packed(state))
        return masks


def masks_of(request: "Request", size: int, guesses: Sequence[int] = ()) -> list[NDArray[np.int32]]:
    """What the request's next token may be, of `size`, as `Follower.masks`; none for any."""
    if isinstance(request.allowed, Follower):
        return request.allowed.masks(request.output_token_ids, guesses)
    allowed = request.allowed(request.tokens()) if request.allowed else None
    if allowed is not None and (allowed.shape != (size,) or allowed.dtype != torch.bool):
        raise ValueError(f"allowed: expected bool [{size}] or None, got {allowed.dtype} {list(allowed.shape)}")
    return [] if allowed is None else [packed(allowed.numpy())]


@dataclass(frozen=True)
class Masks:
    """Which tokens may come in some places that a step draws for: in places[i] those of masks[i]. Sequence s has the
    places W s ... W s + W - 1 (`Plan.width`).

    masks: as `packed` gives them. Those that are the same array are the same mask, and arrays are never written to.
    """

    places: list[int]
    masks: list[NDArray[np.int32]]


class MaskTable:
    """The masks of late, on the device: a step sends those that are new, and says which of them each place has.

    bits int32 [1 + rows, ceil(vocabulary / 32)], of which row 0 allows everything; which int64 [places].
    """

    def __init__(self, places: int, vocabulary: int, device: torch.device) -> None:
        rows = max(ROWS, places)  # a step may have as many masks as places
        self.bits = torch.full((1 + rows, -(-vocabulary // 32)), -1, dtype=torch.int32, device=device)
        self.which = torch.zeros(places, dtype=torch.int64, device=device)
        # By the array's id, which is nobody else's as long as the array is held here; the one used last at the end.
        self._held: OrderedDict[int, tuple[int, NDArray[np.int32]]] = OrderedDict()

    def set(self, masks: Masks) -> None:
        """What the next draw is to keep to."""
        held, which = self._held, np.zeros(len(self.which), np.int64)
        new: dict[int, NDArray[np.int32]] = {}
        for mask in masks.masks:
            if id(mask) in held:
                held.move_to_end(id(mask))
            else:
                new[id(mask)] = mask
        if new:
            self._send(new)
        which[masks.places] = [held[id(mask)][0] for mask in masks.masks]
        self.which.copy_(to_device(which, self.which.device), non_blocking=True)

    def _send(self, new: dict[int, NDArray[np.int32]]) -> None:
        """Into free rows, then into those of masks that nobody asked for for the longest time."""
        held, device = self._held, self.bits.device
        free = range(1 + len(held), len(self.bits))[: len(new)]
        old = list(islice(held, len(new) - len(free)))
        rows = [*free, *(held[key][0] for key in old)]
        self.bits[to_device(np.array(rows), device)] = to_device(np.stack(list(new.values())), device)
        for key in old:
            del held[key]
        held.update({key: (row, mask) for (key, mask), row in zip(new.items(), rows, strict=True)})


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
