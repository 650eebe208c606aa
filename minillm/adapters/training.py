"""Training what has gradients: an adapter, or a whole model; on examples of which a part is given and the rest counts.

The loss is the mean over all answers' tokens of a step, also where a step is taken apart into smaller batches
(`accumulate`): each of those adds its sum, divided by the step's count. Means of means would give tokens of short
answers more weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ..model import Transformer
from ..model.layers import PaddedBatch

__all__ = ["Example", "asked", "loss_of", "train"]


@dataclass(frozen=True)
class Example:
    """Token ids, of which the first `given` are the prompt: what is to be learnt are those behind it, one or more."""

    token_ids: Sequence[int]
    given: int

    def __post_init__(self) -> None:
        if not 1 <= self.given < len(self.token_ids):
            raise ValueError(
                f"given: expected a prompt of 1 to {len(self.token_ids) - 1} of the {len(self.token_ids)} tokens, got"
                f" {self.given}"
            )

    @property
    def count(self) -> int:
        """Tokens that count."""
        return len(self.token_ids) - self.given


def asked(model: Transformer, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Logits of all answers' tokens, one example after another [tokens, vocab], and which tokens these are [tokens]."""
    longest = max(len(example.token_ids) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    there, counts = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for i, example in enumerate(examples):
        ids[i, : len(example.token_ids)] = torch.tensor(example.token_ids)
        there[i, : len(example.token_ids)] = True
        counts[i, example.given - 1 : len(example.token_ids) - 1] = True  # the token before says what comes
    ids, there, counts = (x.to(model.device) for x in (ids, there, counts))
    hidden = model(ids, PaddedBatch(there))
    return model.logits(hidden[counts]), ids.roll(-1, 1)[counts]


def loss_of(model: Transformer, examples: Sequence[Example]) -> tuple[Tensor, int]:
    """The sum of -ln p over all answers' tokens, a scalar with a gradient, and how many these are."""
    logits, targets = asked(model, examples)
    return F.cross_entropy(logits, targets, reduction="sum"), len(targets)


def train(
    model: Transformer, examples: Sequence[Example], steps: int = 100, *, lr: float = 1e-3, batch_size: int = 8,
    accumulate: int = 1, warmup: int | None = None, clip: float = 1.0, weight_decay: float = 0.0, seed: int = 0,
    progress: bool = True,
) -> list[float]:  # fmt: skip
    """Train every parameter that has a gradient, in place, by AdamW. -> the loss of each step, in nats a token

    Each step draws `batch_size` examples, one again only when all have been seen, and computes them in `accumulate`
    parts. The rate rises for `warmup` steps (a tenth of all, if not given), then falls in a line to
    0; gradients are clipped to norm `clip`. Raises ValueError for arguments that make no sense, and FloatingPointError
    for a loss that is no number, before the step is taken.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _check(trained, {"steps": steps, "batch_size": batch_size, "accumulate": accumulate, "examples": len(examples)})
    warmup = max(1, steps // 10 if warmup is None else warmup)
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)
    draw = torch.Generator().manual_seed(seed)
    order: list[int] = []
    losses: list[float] = []
    bar = tqdm(range(steps), disable=not progress, desc="training")
    for step in bar:
        while len(order) < batch_size:
            order += torch.randperm(len(examples), generator=draw).tolist()
        chosen, order = [examples[i] for i in order[:batch_size]], order[batch_size:]
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        optimizer.zero_grad()
        loss = _gradients(model, chosen, batch_size // accumulate)
        if not loss < float("inf"):
            raise FloatingPointError(f"step {step}: the loss is {loss}; lower lr, {lr}")
        torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        losses.append(loss)
        bar.set_postfix(loss=f"{loss:.3f}")
    model.revision += 1
    return losses


def _check(trained: list[torch.nn.Parameter], sizes: dict[str, int]) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}")
    if sizes["batch_size"] % sizes["accumulate"]:
        raise ValueError(
            f"accumulate: expected a divisor of batch_size, {sizes['batch_size']}, got {sizes['accumulate']}"
        )
    if not trained:
        raise ValueError("model: expected parameters with gradients; `adapted` makes some")


def _gradients(model: Transformer, examples: Sequence[Example], part: int) -> float:
    """Add up gradients, `part` examples at a time. -> the mean loss of all tokens that count"""
    total, count = 0.0, sum(example.count for example in examples)
    with torch.enable_grad():
        for first in range(0, len(examples), part):
            loss, _ = loss_of(model, examples[first : first + part])
            (loss / count).backward()
            total += float(loss.detach())
    return total / count
