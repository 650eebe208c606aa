"""Prompting, measured: prompts from examples, labels by their probability, and differences with an interval.

    shots = pick(pool, 8, seed=0)                                   # as many of each label
    prompts = [few_shot(shots, text) for text in texts]
    scores = label_scores(llm, prompts, labels)                     # ln p of each label, [prompts, labels]
    right = scores.argmax(1) == expected
    difference(right, right_of_another_prompt)                      # paired: both saw the same texts

A small model's answer depends on what should not matter: the order of examples, the last label, how often a label is
said at all. So labels are scored, not generated; `calibrated` takes out what the prompt alone makes likely; and no
comparison goes without its interval, which for 100 texts is some 10 points wide.

Sources: Zhao et al., 2021, "Calibrate Before Use"; Lu et al., 2022, "Fantastically Ordered Prompts"; Wilson, 1927 (the
interval of a share); Efron, 1979 (the bootstrap).
"""

import math
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .llm import LLM
from .sampling import SamplingParams

__all__ = ["Difference", "Shot", "answer_of", "calibrated", "difference", "few_shot", "label_scores", "pick", "share"]

TEMPLATE = "Input: {text}\nLabel:{label}"


@dataclass(frozen=True)
class Shot:
    """An example: a text and its label, as they stand in the prompt. (A label mostly begins with a space.)"""

    text: str
    label: str


def few_shot(
    shots: Sequence[Shot], text: str, template: str = TEMPLATE, separator: str = "\n\n", instruction: str = ""
) -> str:  # fmt: skip
    """Examples in the order given, then the text, up to where its label begins. Zero-shot without examples.

    template: with {text} and, at its end, {label}. instruction: in front of all. The examples come first, so prompts of
    many texts share them in the prefix cache. Raises ValueError for a template without these two.
    """
    if "{text}" not in template or not template.endswith("{label}"):
        raise ValueError(f"template: expected text with {{text}} that ends with {{label}}, got {template!r}")
    # One after the other: a text may hold braces.
    parts = [template.removesuffix("{label}").replace("{text}", shot.text) + shot.label for shot in shots]
    parts.append(template.removesuffix("{label}").replace("{text}", text))
    return (instruction + separator if instruction else "") + separator.join(parts)


def pick(pool: Sequence[Shot], count: int, seed: int = 0, balanced: bool = True) -> list[Shot]:
    """Draw examples, in a drawn order. balanced: of each label equally many, one more of some where `count` asks so.

    Raises ValueError where the pool has too few.
    """
    draw = random.Random(seed)
    if not balanced:
        groups = [list(pool)]
    else:
        by_label: dict[str, list[Shot]] = defaultdict(list)
        for shot in pool:
            by_label[shot.label].append(shot)
        groups = list(by_label.values())
    if not groups or count < 0:
        raise ValueError(f"count: expected 0 or more, of a pool that is not empty, got {count} of {len(pool)}")
    draw.shuffle(groups)
    chosen: list[Shot] = []
    for i, group in enumerate(groups):
        wanted = count // len(groups) + (i < count % len(groups))
        if wanted > len(group):
            raise ValueError(f"pool: expected {wanted} examples with the label {group[0].label!r}, got {len(group)}")
        chosen += draw.sample(group, wanted)
    draw.shuffle(chosen)
    return chosen


def label_scores(llm: LLM, prompts: Sequence[str], labels: Sequence[str], mean: bool = False) -> Tensor:
    """ln p(label | prompt) of each label, summed over its tokens.  -> fp64 [prompts, labels]

    mean: a token's mean instead, for labels of different lengths. Raises ValueError where prompt and label share a
    token, as they do when a space stands between them in the prompt: let the label begin with it.
    """
    if not labels or not prompts:
        raise ValueError("labels: expected one or more, and prompts to score them after")
    tokenizer: Any = llm.tokenizer
    if tokenizer is None:
        raise ValueError("llm: expected one with a tokenizer")
    whole, first = [], []
    for prompt in prompts:
        given = tokenizer.encode(prompt)
        for label in labels:
            ids = tokenizer.encode(prompt + label)
            if ids[: len(given)] != given or len(ids) == len(given):
                raise ValueError(
                    f"labels: expected {label!r} to be tokens of its own behind the prompt; let it begin with the space"
                    " that the prompt ends with"
                )
            whole.append(ids)
            first.append(len(given))
    outputs = llm.generate(whole, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    scores = []
    for output, ids, begin in zip(outputs, whole, first, strict=True):
        known = output.prompt_logprobs or []
        found = [(known[i] or {})[ids[i]] for i in range(begin, len(ids))]
        scores.append(math.fsum(found) / (len(found) if mean else 1))
    return torch.tensor(scores, dtype=torch.float64).view(len(prompts), len(labels))


def calibrated(scores: Tensor, of_nothing: Tensor) -> Tensor:
    """Scores without what the prompt makes likely by itself.  [P, L], and those after the same prompt with a text that
    says nothing ("N/A"), [L] or [several, L], whose probabilities are averaged -> [P, L], ln of shares that add up to 1
    """
    empty = of_nothing.reshape(-1, scores.shape[1]).softmax(1).mean(0)
    return (scores.log_softmax(1) - empty.log()).log_softmax(1)


def answer_of(text: str, pattern: str) -> str | None:
    """What the last match of `pattern` in an output holds in its first group, such as the number behind a chain of
    thought; None where nothing matches.
    """
    found = [match[1] for match in re.finditer(pattern, text)]
    return found[-1] if found else None


@dataclass(frozen=True)
class Difference:
    """A mean of `count` cases, and its interval of 95 %, from `low` to `high`."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def difference(a: Any, b: Any, draws: int = 10_000, seed: int = 0) -> Difference:
    """mean(a) - mean(b) over the same cases, with a paired bootstrap: cases are drawn again, both answers of each.

    a, b: numbers or truth values, one a case. Raises ValueError for different numbers of cases, or none.
    """
    x, y = (torch.as_tensor(values, dtype=torch.float64).flatten() for values in (a, b))
    if len(x) != len(y) or not len(x):
        raise ValueError(f"b: expected as many cases as a, at least one, got {len(x)} and {len(y)}")
    each, generator = x - y, torch.Generator().manual_seed(seed)
    means = torch.cat([
        each[torch.randint(len(each), (min(500, draws - i), len(each)), generator=generator)].mean(1)
        for i in range(0, draws, 500)
    ])  # fmt: skip
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Difference(float(each.mean()), low, high, len(each))


def share(right: Any) -> Difference:
    """The share of cases that are right, with Wilson's interval, which stays between 0 and 1.

    Raises ValueError for no cases.
    """
    values = torch.as_tensor(right, dtype=torch.float64).flatten()
    n, z = len(values), 1.959964
    if not n:
        raise ValueError("right: expected one or more cases, got none")
    p = float(values.mean())
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + side) / (1 + z * z / n) for side in (-half, half))
    return Difference(p, max(low, 0.0), min(high, 1.0), n)  # rounding may leave them
