"""Several tokens a step: guess what comes, check all guesses in one forward, keep those that are right.

A step that decodes reads all weights to compute one token a sequence; computing nine costs hardly more, as long as the
weights are what takes the time. So a step computes a sequence's last token and up to `num_speculative_tokens` guesses
behind it, and a token is drawn for every one of these places. The first draw is right whatever was guessed. If it is
the first guess, the second draw had the right tokens before it, and so on: the draws up to the first one that is not
what was guessed are given, and all behind it are dropped.

**The tokens are those that plain decoding gives.** A draw is a function of its logits, of the request's seed, of the
token's place (`gumbel_argmax`: the noise of token t in place i depends on seed, i and t, on nothing else), and, with
penalties, of the tokens before it. By induction: the first draw of a step has the tokens of plain decoding before it,
so it is plain decoding's next token. If draw j is plain decoding's, and equals guess j, then draw j + 1 was computed
behind the tokens of plain decoding, in the same place, with the same noise, under the same mask: it is plain
decoding's, too. This holds for any guesses, for each temperature, filter, penalty, bias and constraint.

**So the distribution is kept, and the rule is the known one.** Leviathan et al. (2023) and Chen et al. (2023) accept a
guess x, drawn from q, with probability min(1, p(x) / q(x)), and else draw from max(0, p - q), normalized. A guess that
is looked up has q(x) = 1: accepted with probability p(x), and else a draw from p without x, renormalised. That is what
happens here: the draw is x with probability p(x) (Gumbel, 1954: the largest of log p + noise has distribution p), and
given that it is not, it is distributed as p without x. One draw decides both, and no random number is used twice,
since every place has noise of its own. The one condition: guesses do not depend on the noise of the places they are
for. These depend on the tokens before them alone.

**Where guesses are made: on the device.** With asynchronous scheduling the host launches a step before it has seen the
tokens of the last one; were guesses the host's, each step of a request that speculates would have to wait for it. The
device has all tokens (`DeviceTable`), so prompt lookup runs there, in front of the layers: comparisons of fixed shape,
which a CUDA graph records. So does a trained network that guesses (`draft_head.py`). A step has a width, the tokens of
each sequence that there is room for: one of a few (`SpeculativeConfig.widths`), since each has graphs of its own. The
host knows bounds (`Request.num_pending`), until it reads how many were given. Who needs more than bounds has no guesses
(`draft_length.room`); constraints read the guesses back while the layers run.

What is written for wrong guesses: keys and values behind the last token given, which the next step writes anew; and
tokens behind a row's length. Blocks get names for tokens that the host has read, so never for a guess.
"""

import bisect
import time
from array import array
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import EngineConfig, SpeculativeConfig, StepCosts
from ..kernels import dependent_launch, gumbel_argmax, trusted
from ..model import Transformer
from .batch import RowLayout
from .runner import Kind, Runner, Shape, powers_of_2
from .table import Plan

__all__ = ["SpeculativeRunner", "count_given", "look_up", "look_up_one"]


# ---- guessing: prompt lookup (Saxena, 2023) --------------------------------------------------------------------------


def look_up_one(tokens: Sequence[int], count: int, most: int, least: int) -> list[int]:
    """What might follow: `count` tokens, as they followed the last time that the text ended as it does now.

    The longest agreement of `least` to `most` tokens wins, of equal ones the latest. What followed is continued by
    itself where it reaches the end: after a b a b comes a b a b. Without agreement: the last token again.
    """
    last, text = len(tokens), array("i", tokens).tobytes()
    for n in range(min(most, last - 1), least - 1, -1):
        tail = text[-4 * n :]
        at = text.rfind(tail, 0, -4)
        while at > 0 and at % 4:  # bytes of two tokens that look like one
            at = text.rfind(tail, 0, at + 4 * n - 1)
        if at >= 0:
            place = at // 4 + n
            return [tokens[place + j % (last - place)] for j in range(count)]
    return [tokens[-1]] * count


def look_up(tokens: Tensor, lengths: Tensor, count: int, most: int, least: int) -> Tensor:
    """`look_up_one` for many sequences at once, in shapes that do not depend on the data.

    tokens [S, T] int32, of which lengths [S] int32 are meant (0: of padding, guesses mean nothing) -> [S, count] int32
    """
    place = torch.arange(tokens.shape[1], device=tokens.device)  # where what followed would begin
    end = lengths.long()[:, None]
    agree, agreed = (place >= 1) & (place < end), torch.zeros_like(tokens)
    for back in range(1, most + 1):
        tail = tokens.gather(1, (end - back).clamp(min=0))
        agree = agree & (F.pad(tokens, (back, -back)) == tail) & (place >= back)
        agreed += agree
    # Agreement of fewer than `least` tokens is none. Of the places that agree best, the last.
    score = torch.where(agreed >= least, agreed, 0) * tokens.shape[1] + place * (agreed >= least)
    best, begin = score.max(1, keepdim=True)
    begin = torch.where(best > 0, begin, end - 1).clamp(min=0)
    ahead = torch.arange(count, device=tokens.device)
    return tokens.gather(1, begin + ahead % (end - begin).clamp(min=1))


# ---- checking --------------------------------------------------------------------------------------------------------


def count_given(drawn: Tensor, guesses: Tensor, most: Tensor) -> Tensor:
    """How many draws are given: up to the first one that is not what was guessed, and that one.

    drawn [S, 1 + K] int64, guesses [S, K] int32, of which most - 1 are meant; most [S] int32 -> [S] int32, 1 or more
    """
    place = torch.arange(guesses.shape[1], device=guesses.device)
    right = (drawn[:, :-1] == guesses) & (place < most[:, None] - 1)
    return 1 + right.int().cumprod(1).sum(1, dtype=torch.int32)


class SpeculativeRunner(Runner):
    """A runner whose steps may have guesses. Whoever guesses otherwise overrides `guess`; or, to know more than tokens,
    `_guesses`.
    """

    def __init__(self, model: Transformer, config: EngineConfig, layout: RowLayout) -> None:
        super().__init__(model, config, layout)
        self.speculative = config.speculative or SpeculativeConfig()
        self.num_guesses = self.speculative.num_speculative_tokens
        self.widths = self.speculative.widths[1:]  # of steps with guesses
        self.check_sizes: list[int] = []  # of sequences, where graphs are recorded
        self.rates: list[float] | None = None  # how often guesses are right by place, if that is known beforehand
        self._told: tuple[Tensor, torch.cuda.Event | None] | None = None  # guesses on their way to the host
        self.guess_graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # by sequences and width

    def guess(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens [S, T] int32 of rows of these lengths [S] int32 -> what follows them, [S, num_guesses] int32."""
        s = self.speculative
        return look_up(tokens, lengths, self.num_guesses, s.prompt_lookup_max, s.least)

    def _receive(self, plan: Plan) -> None:
        super()._receive(plan)
        if plan.width == 1:
            return
        at = bisect.bisect_left(self.check_sizes, plan.num_sequences)
        if at < len(self.check_sizes):
            graph, guesses = self.guess_graphs[self.check_sizes[at], plan.width]
            graph.replay()
        else:
            guesses = self._guess(plan.num_sequences, plan.width)
        if plan.constrained:
            self._told = self._to_host(guesses[: plan.num_sequences]), None
            if self._copying is not None:
                event = torch.cuda.Event()
                event.record(self._copying)
                self._told = self._told[0], event

    @torch.inference_mode()
    def _guess(self, sequences: int, width: int) -> Tensor:
        """Guesses [S, width - 1], also written behind the sequences' tokens, where the batch finds them."""
        matrix = self.table.matrix
        rows = self.table.steps[0, :sequences].long()
        lengths = matrix[rows, 0]
        with dependent_launch(), trusted():
            guesses = self._guesses(rows, lengths, width - 1)
        matrix[rows[:, None], self._behind(lengths, width - 1)] = guesses
        return guesses

    def _guesses(self, rows: Tensor, lengths: Tensor, count: int) -> Tensor:
        """rows [S] int64 of the table, tokens in each [S] int32 -> what follows these, [S, count] int32."""
        layout = self.table.layout
        tokens = self.table.matrix[:, layout.first_token : layout.first_block].index_select(0, rows)
        return self.guess(tokens, lengths)[:, :count]

    def _behind(self, lengths: Tensor, count: int) -> Tensor:
        """The columns of the guesses, [S, count]."""
        return self.table.layout.first_token + lengths.long()[:, None] + torch.arange(count, device=self.device)

    def guesses(self, plan: Plan) -> list[list[int]]:
        if plan.width == 1 or self._told is None:
            return super().guesses(plan)
        found, copied = self._told
        if copied is not None:
            copied.synchronize()  # they were there before the layers began
        return [row[: max(0, most - 1)] for row, most in zip(found.tolist(), plan.steps[2].tolist(), strict=False)]

    # ---- CUDA graphs: for so many sequences, each with so many guesses; a step with fewer is padded ------------------

    @torch.inference_mode()
    def capture(self) -> None:
        """As the base does; and guessing, and layers and draws of steps that have guesses."""
        super().capture()
        self.check_sizes = [n for n in powers_of_2(self.decode_sizes) if self._fits(n)]
        for width in self.widths:
            for n in reversed(self.check_sizes):  # guesses are copied to the host while the layers run: memory apart
                self.guess_graphs[n, width] = self._record("guesses", partial(self._guess, n, width))
            self._record_draws(self.check_sizes, Kind(width=width))

    def _fits(self, sequences: int) -> bool:
        return sequences * (1 + self.num_guesses) <= self.max_num_batched_tokens

    def _shapes(self, slots: int) -> list[Shape]:
        shapes = super()._shapes(slots)
        small = [n for n in powers_of_2(self.decode_sizes) if self._fits(n)]
        for width in self.widths:
            shapes += [(n * width, n, False, None, slots, width, width) for n in small]
        return shapes

    def _shape(self, plan: Plan, slots: int) -> Shape | None:
        if plan.width > 1 and np.diff(plan.steps[3, : plan.num_sequences + 1]).max() <= plan.width:
            at = bisect.bisect_left(self.check_sizes, plan.num_sequences)
            for n in self.check_sizes[at : at + 1]:
                return n * plan.width, n, False, None, slots, plan.width, plan.width
        return super()._shape(plan, slots) if plan.width == 1 else None  # guesses beside a prompt: rare, see `_lengths`

    # ---- what steps cost ---------------------------------------------------------------------------------------------

    def measure(self) -> StepCosts:
        """Run plain steps and steps with guesses, of some sizes, and see how long they take.

        Before the first request: what they write goes into the padding's row and into a block that nobody has yet.
        """
        width, sizes = min(1 + self.num_guesses, self.max_num_batched_tokens), [1]
        most = min(self.max_num_seqs, self.max_num_batched_tokens // width, 4 if self.device.type == "cpu" else 1 << 20)
        while sizes[-1] < most:
            sizes.append(min(4 * sizes[-1], most))
        padded = tuple((w, tuple((n, self._seconds(n, w)) for n in self.check_sizes)) for w in self.widths)
        plain = tuple((n, self._seconds(n, 1)) for n in self.check_sizes or sizes)
        checked = dict(padded).get(width) or tuple((n, self._seconds(n, width)) for n in sizes)
        self.table.matrix[self.table.padding] = 0
        return StepCosts(plain, tuple((n * width, s) for n, s in checked), padded if self.check_sizes else ())

    def _seconds(self, sequences: int, count: int) -> float:
        """A step's time, while steps follow one another as they do with asynchronous scheduling: where the device is
        one of its own, it computes a step while the host launches the next. The shortest of some, after a first one.
        """
        steps = self.table.nobody()
        ends = np.arange(1, sequences + 1, dtype=np.int32) * count
        steps[1, :sequences], steps[2, :sequences], steps[3, 1:] = -1, count, ends[-1]
        steps[3, :sequences] = ends - count
        nothing = np.zeros(0, np.int64)
        plan = Plan(
            nothing, nothing.astype(np.int32), steps, sequences * count, sequences, np.arange(sequences),
            width=1 if count == 1 else next(width for width in self.widths if width >= count),
        )  # fmt: skip
        took, (times, steps_each) = [], (3, 1) if self.device.type == "cpu" else (4, 4)
        for _ in range(times):
            start = time.perf_counter()
            for _ in range(steps_each):
                self.table.matrix[self.table.padding, 0] = 1
                flight = self.launch(plan)
            flight.read()
            took.append((time.perf_counter() - start) / steps_each)
        return min(took[1:])

    # ---- checking ----------------------------------------------------------------------------------------------------

    def _tokens(self, logits: Tensor, kind: Kind) -> tuple[Tensor, Tensor | None]:
        if kind.width == 1:
            return super()._tokens(logits, kind)
        sequences = len(logits) // kind.width
        most, lengths = self.table.steps[2, :sequences], self.table.lengths[:sequences]
        rows = self.table.steps[0, :sequences].long()
        guesses = self.table.matrix[rows[:, None], self._behind(lengths, kind.width - 1)]
        if kind.filtered:
            drawn = self._one_by_one(logits.view(sequences, kind.width, -1), guesses, most)
        else:
            o = {name: self.table.options_of(sequences)[name] for name in ("temperature", "seed")}
            temperature, seed = (o[name].repeat_interleave(kind.width) for name in ("temperature", "seed"))
            places = lengths[:, None] + torch.arange(kind.width, dtype=lengths.dtype, device=self.device)
            drawn = gumbel_argmax(logits, temperature, seed, places.view(-1)).view(sequences, kind.width)
        return drawn, count_given(drawn, guesses, most)

    def _one_by_one(self, logits: Tensor, guesses: Tensor, most: Tensor) -> Tensor:
        """Draw place by place: a penalty wants to know of each token given before.  [S, W, vocab] -> [S, W]"""
        drawn, active = [], most > 0
        for place in range(logits.shape[1]):
            drawn.append(self._choose(logits[:, place], True, place, active))
            if place < guesses.shape[1]:
                active = active & (place + 1 < most) & (drawn[-1] == guesses[:, place])
        return torch.stack(drawn, 1)
