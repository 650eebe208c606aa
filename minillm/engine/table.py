"""From requests to arrays: what the runner is told of a step, and nothing else.

A `Plan` holds numbers only, so that a step can be sent to another process and run there on a cache of the same shape:
two runners with the same weights that get the same plans draw the same tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .batch import RowLayout
from .request import Request

__all__ = ["Edits", "Plan", "RequestTable", "prompt_part"]

Scheduled = Sequence[tuple[Request, int]]


@dataclass(frozen=True)
class Edits:
    """Numbers to add to logits before a token is drawn, -inf to forbid one: sequences, token_ids [E] int64, values [E]
    fp32; no pair of sequence and token twice.
    """

    sequences: np.ndarray
    token_ids: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Plan:
    """One step, as arrays.

    First go into the table: values [n] int32 to the places [n] int64 (`DeviceTable.update`). steps [4, rows + 1] int32,
    a column a sequence: row, first token (-1: the last known), how many tokens it gets at most (0: none; above 1: so
    many less one of its tokens are guesses), where its tokens begin. ready [R]: the sequences that get a token.
    longest: tokens of the longest sequence after this step, at most. width: for how many places of each sequence a
    token is drawn (1 where nobody has guesses). filtered: whether somebody asks for more than a temperature. penalized:
    (row, its prompt, its output so far) of rows that are new here and want penalties. logprobs: the sequences that want
    log probabilities, and of how many candidates. prompt_logprobs: rows of the batch, the token that follows each, and
    of how many candidates. adapted: whether somebody has an adapter. constrained: whether somebody's masks depend on
    the guesses.
    """

    places: np.ndarray
    values: np.ndarray
    steps: np.ndarray
    num_tokens: int
    num_sequences: int
    ready: np.ndarray
    longest: int | None = None
    width: int = 1
    filtered: bool = False
    penalized: tuple[tuple[int, np.ndarray, np.ndarray], ...] = ()
    edits: Edits | None = None
    logprobs: tuple[np.ndarray, int] | None = None
    prompt_logprobs: tuple[np.ndarray, np.ndarray, int] | None = None
    adapted: bool = False
    constrained: bool = False

    @property
    def is_decode(self) -> bool:
        """Whether every sequence has one token."""
        return self.num_tokens == self.num_sequences


class RequestTable:
    """Which row holds what of which request. `max_num_seqs` rows; the one behind them stands for padding. widths: of
    how many tokens a step may give a request, ascending; a step's is the least that suffices.
    """

    def __init__(
        self, layout: RowLayout, max_num_seqs: int, vocab_size: int, widths: Sequence[int] = (1,)
    ) -> None:  # fmt: skip
        self.layout, self.padding, self.vocab_size, self.widths = layout, max_num_seqs, vocab_size, widths

    def plan(self, scheduled: Scheduled) -> Plan:
        """The step that computes (request, number of its next tokens) pairs; what it says counts as on the device.

        Should the step fail, say so with `forget`: the rows are then written anew.
        """
        n, begin, longest, ready = len(scheduled), 0, 0, []
        steps = np.zeros((4, self.padding + 1), np.int32)
        numbers: list[int] = []
        special: list[tuple[int, Request]] = []  # who wants more of a draw than a temperature
        changed: list[Request] = []
        for column, (request, count) in enumerate(scheduled):
            first, most = request.num_computed, request.most(count)
            numbers += request.row, -1 if most == count else first, most, begin
            begin += count
            longest = max(longest, request.num_computed + count)
            if most:
                ready.append(column)
            if not request.is_plain:
                special.append((column, request))
            if not request.on_device or request.table.synced < len(request.table.blocks):
                changed.append(request)
        steps[0], steps[3] = self.padding, begin
        steps[:, :n] = np.array(numbers, np.int32).reshape(n, 4).T
        fresh = [request for request in changed if request.has_penalties and not request.on_device]
        places, values = self._changes(changed)
        drawing = [(i, request) for i, request in special if steps[2, i]]
        most_of_all = int(steps[2].max())
        return Plan(
            places, values, steps, begin, n, np.array(ready, np.int64), longest,
            width=next(width for width in self.widths if width >= most_of_all),
            filtered=any([request.is_filtered for _, request in drawing]),
            penalized=tuple(self._penalized(request) for request in fresh),
            edits=_edits([(i, request) for i, request in drawing if request.is_edited]),
            logprobs=_logprobs([(i, request) for i, request in drawing if request.logprobs is not None]),
            prompt_logprobs=_prompt_logprobs(scheduled) if any([r.prompt_logprobs for _, r in special]) else None,
            adapted=any([request.adapter is not None for request, _ in scheduled]),
            constrained=any([request.allowed is not None for request, _ in scheduled]),
        )  # fmt: skip

    @staticmethod
    def forget(requests: Sequence[Request]) -> None:
        """What the device holds of these requests is not known."""
        for request in requests:
            request.on_device = False

    def _changes(self, requests: Sequence[Request]) -> tuple[np.ndarray, np.ndarray]:
        """Everything of a request that is new here, new blocks of one that is not."""
        places: list[np.ndarray] = [np.zeros(0, np.int64)]
        values: list[np.ndarray] = [np.zeros(0, np.int32)]

        def write(start: int, numbers: list[int]) -> None:
            places.append(np.arange(start, start + len(numbers)))
            values.append(np.array(numbers, np.int32))

        for request in requests:
            table, start = request.table, request.row * self.layout.width
            if not request.on_device:
                tokens = request.tokens()
                write(start, [len(tokens), *self.layout.encode(self._options(request)), *tokens])
                table.synced = 0
            if table.synced < len(table.blocks):
                write(start + self.layout.first_block + table.synced, table.blocks[table.synced :])
            table.synced, request.on_device = len(table.blocks), True
        return np.concatenate(places), np.concatenate(values)

    def _options(self, request: Request) -> dict[str, float]:
        values = {name: request.options.get(name, getattr(request.params, name, 0)) for name in self.layout.options}
        if "top_k" in values:
            values["top_k"] = min(values["top_k"], self.vocab_size)
        return values

    @staticmethod
    def _penalized(request: Request) -> tuple[int, np.ndarray, np.ndarray]:
        prompt, output = (np.array(ids, np.int64) for ids in (request.prompt_token_ids, request.output_token_ids))
        return request.row, prompt, output


def _edits(drawing: list[tuple[int, Request]]) -> Edits | None:
    """Logit biases, and the ends that come too early."""
    sequences, token_ids, values = [], [], []  # type: list[int], list[int], list[float]
    for index, request in drawing:
        changes = dict(request.params.logit_bias or {})
        if request.num_output < request.params.min_tokens:
            changes |= dict.fromkeys(request.ends, -np.inf)
        sequences += [index] * len(changes)
        token_ids += changes.keys()
        values += changes.values()
    if not sequences:
        return None
    return Edits(np.array(sequences, np.int64), np.array(token_ids, np.int64), np.array(values, np.float32))


def _logprobs(drawing: list[tuple[int, Request]]) -> tuple[np.ndarray, int] | None:
    if not drawing:
        return None
    return np.array([index for index, _ in drawing]), max(request.params.logprobs or 0 for _, request in drawing)


def _prompt_logprobs(scheduled: Scheduled) -> tuple[np.ndarray, np.ndarray, int] | None:
    """Rows of the batch whose next token stands in the prompt, and that token."""
    rows, targets, most, begin = [], [], -1, 0  # type: list[int], list[int], int, int
    for request, count in scheduled:
        if request.params.prompt_logprobs is not None:
            first, last = prompt_part(request, request.num_computed, count)
            rows += range(begin, begin + last - first)
            targets += request.prompt_token_ids[first + 1 : last + 1]
            most = max(most, request.params.prompt_logprobs)
        begin += count
    return (np.array(rows, np.int64), np.array(targets, np.int64), most) if rows else None


def prompt_part(request: Request, start: int, count: int) -> tuple[int, int]:
    """Of the tokens start ... start + count - 1 those that a token of the prompt follows: (first, behind the last)."""
    last = min(start + count, len(request.prompt_token_ids) - 1)
    return start, max(start, last)
