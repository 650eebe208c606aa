"""From logits to the next token: greedy, temperature, top-k, top-p, min-p, penalties.

Everything works on logits [V] or [B, V] and returns the same shape. A filter sets the logits of the tokens that it
refuses to -inf and leaves the others alone, so that filters can follow one another and one softmax at the end makes
probabilities again. The order is vLLM's: penalties, temperature, min-p, top-k, top-p. It matters: transformers
applies min-p last, and then the same options may leave more tokens.

An option is a number, or a tensor [B] with one value a row, so that requests with different options share a batch.

Random numbers come from a generator, or from `kernels.gumbel_noise`, which computes them from (seed, position, token):
then a request's tokens do not depend on its neighbors in the batch, nor on how often it was interrupted.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import GREEDY_BELOW

__all__ = [
    "SamplingParams",
    "StructuredOutputsParams",
    "apply_count_penalties",
    "apply_logit_bias",
    "apply_repetition_penalty",
    "apply_temperature",
    "distribution",
    "draw",
    "greedy",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "new_seed",
    "sample",
]

REFUSED = float("-inf")


class _Biases(dict[int, float]):
    """A copy of the caller's, so that it stays as it is; parameters can be keys of a cache, so this can too."""

    def __hash__(self) -> int:  # type: ignore[override]  # dict says None
        return hash(frozenset(self.items()))


@dataclass(frozen=True)
class StructuredOutputsParams:
    """What form the output must have, with vLLM's names: one of

    - json: a JSON schema (a dict, True, or its text): the output is JSON that is valid by it.
    - regex: a pattern that the whole output matches. choice: strings of which it is one.

    The output is cut where max_tokens or a stop string ends it; else it is complete. Raises ValueError unless exactly
    one is given, and TypeError for a wrong type.
    """

    json: str | bool | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("json", "regex", "choice") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs: expected one of json, regex, choice, got {' and '.join(given) or 'none'}"
            )
        kinds = {"json": str | bool | Mapping, "regex": str, "choice": list | tuple}
        if not isinstance(value := getattr(self, given[0]), kinds[given[0]]):
            raise TypeError(f"{given[0]}: expected {kinds[given[0]]}, got {value!r:.60}")
        # Text and tuples: what is asked for can be the key of a cache, and does not change under its owner's hands.
        if given[0] == "json" and not isinstance(value, str):
            object.__setattr__(self, "json", json.dumps(value))
        if given[0] == "choice":
            object.__setattr__(self, "choice", tuple(value))

    @property
    def asked(self) -> tuple[str, Any]:
        """(which, what)"""
        return next((n, v) for n in ("json", "regex", "choice") if (v := getattr(self, n)) is not None)


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop, with vLLM's names.

    - temperature: 1 is the model's own distribution, more is flatter, 0 is greedy.
    - top_k: keep the k likeliest tokens; 0 or -1 keeps all.
    - top_p: keep the smallest set of tokens that has this probability; 1 keeps all.
    - min_p: keep the tokens that have at least this share of the likeliest one's probability; 0 keeps all.
    - repetition_penalty: above 1 makes the tokens of prompt and output less likely.
    - presence_penalty, frequency_penalty: taken off the logits of the output's tokens, once, and once an occurrence.
    - seed: same seed, same tokens.
    - n: how many completions of the prompt; the i-th of a seeded request has seed + i.
    - stop: strings that end the text and are not part of it. stop_token_ids: tokens that end it.
    - max_tokens, min_tokens: limits of the output's length. ignore_eos: go on after the end token.
    - logprobs: how many candidates to report with each token; None reports nothing. prompt_logprobs: the same for the
      tokens of the prompt.
    - logit_bias: {token id: what to add to its logit}, before everything else.
    - structured_outputs: a `StructuredOutputsParams` (or a dict of its fields): the output's form is guaranteed. Log
      probabilities are those of the model, which knows nothing of it.

    Raises ValueError for a value out of range and TypeError for a wrong type; the message names the argument and what
    was expected.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    max_tokens: int = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        self._number("temperature", lambda t: 0 <= t < math.inf, "a number, 0 (greedy) or more")
        self._number("top_p", lambda p: 0 < p <= 1, "a number above 0 and up to 1 (keeps all)")
        self._number("min_p", lambda p: 0 <= p <= 1, "a number from 0 (keeps all) to 1")
        self._number("repetition_penalty", lambda r: 0 < r < math.inf, "a number above 0; 1 changes nothing")
        for name in ("presence_penalty", "frequency_penalty"):
            self._number(name, lambda x: -2 <= x <= 2, "a number from -2 to 2; 0 changes nothing")
        self._number("n", lambda n: n >= 1, "an integer, 1 or more", int)
        self._number("top_k", lambda k: k >= -1, "an integer, 1 or more, or 0 to keep all", int)
        self._number("max_tokens", lambda n: n >= 1, "an integer, 1 or more", int)
        self._number("min_tokens", lambda n: 0 <= n <= self.max_tokens, "an integer from 0 to max_tokens", int)
        if self.seed is not None:
            self._number("seed", lambda s: -(2**63) <= s < 2**63, "an integer of 64 bits, or None", int)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._number(name, lambda n: n >= 0, "an integer, 0 or more, or None", int)
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos: expected True or False, got {self.ignore_eos!r}")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        self._sequence("stop", stop, lambda s: isinstance(s, str) and s, "strings, none empty")
        self._sequence("stop_token_ids", self.stop_token_ids, lambda i: type(i) is int and i >= 0, "token ids")
        self._biases()
        self._structure()

    def _structure(self) -> None:
        if isinstance(self.structured_outputs, dict):
            object.__setattr__(self, "structured_outputs", StructuredOutputsParams(**self.structured_outputs))
        if self.structured_outputs is None:
            return
        if not isinstance(self.structured_outputs, StructuredOutputsParams):
            raise TypeError(
                f"structured_outputs: expected StructuredOutputsParams, got {self.structured_outputs!r:.60}"
            )
        for name in ("min_tokens", "ignore_eos", "logit_bias"):
            if getattr(self, name):
                raise ValueError(f"structured_outputs: expected no {name} beside it, which could forbid what must come")

    def _number(self, name: str, in_range: Any, expected: str, kind: type = float) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
            raise TypeError(f"{name}: expected {expected}, got {value!r}")
        # False for NaN too: it compares with nothing. And the device computes in fp32: 1e39 is inf there, 1e-50 is 0.
        if not in_range(value) or (kind is float and not in_range(_fp32(value))):
            raise ValueError(f"{name}: expected {expected}, got {value!r}")

    def _biases(self) -> None:
        bias = self.logit_bias
        if bias is None:
            return
        if not isinstance(bias, Mapping):
            raise TypeError(f"logit_bias: expected {{token id: number}} or None, got {bias!r}")
        for token, value in bias.items():
            if type(token) is not int or token < 0:
                raise ValueError(f"logit_bias: expected token ids as keys, got {token!r}")
            if isinstance(value, bool) or not isinstance(value, int | float) or not _fp32(value) < math.inf:
                raise ValueError(f"logit_bias: expected numbers (-inf forbids a token), got {value!r} for {token}")
        object.__setattr__(self, "logit_bias", _Biases({t: float(v) for t, v in bias.items()}) if bias else None)

    def _sequence(self, name: str, values: Any, holds: Any, expected: str) -> None:
        """Store a tuple: the list that a caller passed may change later, and frozen objects must not."""
        if values is not None and not isinstance(values, list | tuple | set | frozenset):
            raise TypeError(f"{name}: expected a list of {expected}, got {values!r}")
        if bad := [value for value in values or () if not holds(value)]:
            raise ValueError(f"{name}: expected {expected}, got {bad[0]!r}")
        object.__setattr__(self, name, tuple(values or ()))


# ---- one step each -------------------------------------------------------------------------------------------------


def apply_logit_bias(logits: Tensor, bias: Mapping[int, float] | None) -> Tensor:
    """Add `bias[token]` to the logit of each token that it names.  [V] -> [V], fp32 if there is any"""
    if not bias:
        return logits
    logits = logits.float().clone()
    index = torch.tensor(list(bias), device=logits.device)
    logits[index] += torch.tensor(list(bias.values()), device=logits.device)
    return logits


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token.  [..., V] -> [...] int64"""
    return logits.argmax(-1)


def apply_repetition_penalty(logits: Tensor, penalty: float | Tensor, previous_token_ids: Sequence) -> Tensor:
    """Make tokens that occurred less likely: divide their logit by `penalty` if it is positive, multiply if it is
    negative.

    previous_token_ids: the ids of prompt and output, for [B, V] one list a row, of any lengths. How often a token
    occurred makes no difference. Source: Keskar et al., 2019, "CTRL: A Conditional Transformer Language Model for
    Controllable Generation".
    """
    occurred = torch.zeros_like(logits, dtype=torch.bool)
    rows = [(occurred, previous_token_ids)] if logits.dim() == 1 else zip(occurred, previous_token_ids, strict=True)
    for row, ids in rows:
        row[torch.as_tensor(ids, dtype=torch.long, device=logits.device)] = True
    penalty = _column(penalty, logits)
    return torch.where(occurred, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def apply_count_penalties(
    logits: Tensor, presence: float | Tensor, frequency: float | Tensor, output_token_ids: Sequence
) -> Tensor:
    """logits - presence · [token occurred] - frequency · (how often), counted in the output alone.

    output_token_ids: for [B, V] one list a row. Source: OpenAI's API reference, "presence_penalty" and
    "frequency_penalty".
    """
    counts = torch.zeros_like(logits)
    rows = [(counts, output_token_ids)] if logits.dim() == 1 else zip(counts, output_token_ids, strict=True)
    for row, ids in rows:
        ids = torch.as_tensor(ids, dtype=torch.long, device=logits.device)
        row.index_add_(0, ids, torch.ones_like(ids, dtype=row.dtype))
    return logits - _column(presence, logits) * (counts > 0) - _column(frequency, logits) * counts


def apply_temperature(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """logits / temperature, up to a constant that softmax ignores: the largest becomes 0, so that nothing overflows."""
    if not isinstance(temperature, Tensor) and temperature == 1:
        return logits
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0 (0 is greedy(logits)), got {temperature!r}")
    return (logits - logits.amax(-1, keepdim=True)) / _column(temperature, logits)


def keep_top_k(logits: Tensor, k: int | Tensor) -> Tensor:
    """Keep the k largest logits, and all that equal the k-th, so that equal tokens are treated alike; k <= 0 keeps all.

    Source: Fan, Lewis and Dauphin, 2018, "Hierarchical Neural Story Generation".
    """
    size = logits.shape[-1]
    if isinstance(k, Tensor):
        k = torch.where((k <= 0) | (k > size), size, k).long()
        smallest = logits.sort(-1, descending=True).values.gather(-1, k.unsqueeze(-1) - 1)  # [B, 1]
    elif 0 < k < size:
        smallest = logits.topk(k).values[..., -1:]  # [..., 1]
    else:
        return logits
    return logits.masked_fill(logits < smallest, REFUSED)


def keep_top_p(logits: Tensor, p: float | Tensor) -> Tensor:
    """Keep the smallest set of tokens whose probability is at least p (nucleus sampling); at least one stays.

    A token stays while those that are likelier have less than p together. Of equally likely tokens at the border the
    smallest ids stay. p >= 1 keeps all without looking: the sum of fp32 probabilities may reach 1 before the last
    token.
    Source: Holtzman et al., 2020, "The Curious Case of Neural Text Degeneration".
    """
    if not isinstance(p, Tensor) and p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)  # [..., V] each
    sums = ordered.float().softmax(-1).cumsum(-1)  # [..., V]
    likelier = F.pad(sums[..., :-1], (1, 0))  # [..., V]: what the tokens before this one have together
    p = _column(p, logits)
    refused = (likelier >= p) & (likelier > 0) & (p < 1)
    return logits.masked_fill(torch.zeros_like(refused).scatter(-1, order, refused), REFUSED)


def keep_min_p(logits: Tensor, min_p: float | Tensor) -> Tensor:
    """Keep tokens at least `min_p` times as likely as the likeliest. In logits: at most -log(min_p) below the largest.

    Source: Nguyen et al., 2025, "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs".
    """
    if not isinstance(min_p, Tensor) and min_p <= 0:
        return logits
    difference = torch.as_tensor(min_p, device=logits.device).float().log()  # 0 gives -inf: nothing is refused
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + _column(difference, logits), REFUSED)


# ---- all steps -----------------------------------------------------------------------------------------------------


def distribution(
    logits: Tensor,
    params: SamplingParams | Sequence[SamplingParams],
    previous_token_ids: Sequence = (),
    output_token_ids: Sequence = (),
) -> Tensor:
    """The probabilities that `sample` draws from.  [V] or [B, V] -> the same shape, fp32

    params: one for all rows, or one a row. previous_token_ids: as in `apply_repetition_penalty`, output_token_ids: as
    in `apply_count_penalties`; needed only where a penalty is set.
    """
    each = _each(params)
    logits = _penalized(logits.float(), each, previous_token_ids, output_token_ids)
    return _filtered(logits, each).softmax(-1)


def _filtered(logits: Tensor, each: Sequence[SamplingParams]) -> Tensor:
    """Logits after temperature and filters; of a greedy row only the likeliest token is left."""
    is_greedy = [p.temperature < GREEDY_BELOW for p in each]
    best = torch.full_like(logits, REFUSED).scatter_(-1, greedy(logits).unsqueeze(-1), 0.0) if any(is_greedy) else None
    if best is not None and all(is_greedy):
        return best
    temperatures = [1.0 if row else p.temperature for row, p in zip(is_greedy, each, strict=True)]
    logits = apply_temperature(logits, _option(temperatures, logits))
    logits = keep_min_p(logits, _option([p.min_p for p in each], logits))
    logits = keep_top_k(logits, _option([p.top_k for p in each], logits))
    logits = keep_top_p(logits, _option([p.top_p for p in each], logits))
    return logits if best is None else torch.where(torch.tensor(is_greedy, device=logits.device)[:, None], best, logits)


def draw(probabilities: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
    """One token from each distribution.  [..., V] -> [...] int64

    A race: token i finishes after an exponential time of rate p_i, and is first with probability p_i. In logarithms it
    is the Gumbel-max trick (Maddison et al., 2014, "A* Sampling"). `torch.multinomial` would do, but it looks at its
    input on the host, and a GPU would wait for that at every token.
    One generator a row makes a row's token independent of which other rows are in the batch.
    """
    if isinstance(generator, Sequence):
        return torch.stack([draw(row, g) for row, g in zip(probabilities, generator, strict=True)])
    time = torch.empty_like(probabilities).exponential_(generator=generator)
    time = time.clamp_(min=torch.finfo(time.dtype).tiny)  # a time of 0 would make 0 / 0 = NaN, which wins every argmax
    return (probabilities / time).argmax(-1)


def sample(
    logits: Tensor,
    params: SamplingParams | Sequence[SamplingParams],
    previous_token_ids: Sequence = (),
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    output_token_ids: Sequence = (),
    noise: Tensor | None = None,
) -> Tensor:
    """The next token of each row.  logits [V] or [B, V] -> [] or [B] int64

    Arguments as in `distribution` and `draw`; with `noise` [..., V] from `gumbel_noise`, no generator is asked.
    """
    each = _each(params)
    if all(p.temperature < GREEDY_BELOW for p in each):
        return greedy(_penalized(logits, each, previous_token_ids, output_token_ids))
    if noise is None:
        return draw(distribution(logits, params, previous_token_ids, output_token_ids), generator)
    logits = _penalized(logits.float(), each, previous_token_ids, output_token_ids)
    return (_filtered(logits, each) + noise).argmax(-1)


def new_seed() -> int:
    """A seed for a request that has none, from torch's global generator: `torch.manual_seed` makes it repeatable."""
    return int(torch.randint(-(2**63), 2**63 - 1, ()).item())


def _fp32(value: float) -> float:
    return (
        struct.unpack("f", struct.pack("f", value))[0]
        if abs(value) < 3.4028235677973366e38
        else (-math.inf if value < 0 else math.inf)
    )


def _each(params: SamplingParams | Sequence[SamplingParams]) -> Sequence[SamplingParams]:
    return [params] if isinstance(params, SamplingParams) else params


def _penalized(logits: Tensor, each: Sequence[SamplingParams], previous: Sequence, output: Sequence) -> Tensor:
    if any(p.repetition_penalty != 1 for p in each):
        logits = apply_repetition_penalty(logits, _option([p.repetition_penalty for p in each], logits), previous)
    if any(p.presence_penalty or p.frequency_penalty for p in each):
        presence, frequency = (
            _option([float(getattr(p, name)) for p in each], logits)
            for name in ("presence_penalty", "frequency_penalty")
        )
        logits = apply_count_penalties(logits, presence, frequency, output)
    return logits


def _option(values: list, logits: Tensor) -> Any:
    """One number when all requests agree (the common case, and cheaper), else a tensor [B]."""
    return values[0] if len(set(values)) == 1 else torch.tensor(values, device=logits.device)


def _column(value: float | Tensor, logits: Tensor) -> Any:
    """A tensor [B] as a column [B, 1] that broadcasts along the vocabulary; a number as it is."""
    return value.unsqueeze(-1) if isinstance(value, Tensor) and 0 < value.dim() < logits.dim() else value
