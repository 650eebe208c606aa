"""Training a draft head on what its model says itself.

    examples = own_outputs(engine, prompts, params)         # prompts, and what the model answers
    head = new_head(model, examples, most_token_ids=8192)
    train_head(head, examples, steps=1000)
    head.rates = agreement(head, held_out, count=4)          # how often each guess is right
    save_head(head, "head")                                  # for LLM(speculative_config={"method": "draft_head", ...})

**On its own outputs**, since a guess is right if it is what the model itself says next, not what a text says.

**As it is used.** The first guess is made from the model's hidden states, the second one from the head's own first g,
and so on; a head that has seen true states alone in training falls off there. So each example goes through the head
`passes` times, pass d from the g of pass d - 1, and attention sees what it will see then: in pass d token i sees what
pass 1 stored of tokens up to i - d + 1 (that is what the cache holds), then what each later pass stored of one token
(`Passes`). Sources: Zhang et al., 2024, "Learning Harmonized Representations for Speculative Sampling"; Li et al.,
2025, "EAGLE-3".

The loss is the cross-entropy to the model's own distribution of the next token, over the tokens that the head can
guess: which token is the likeliest is learnt sooner from all probabilities than from one token that was drawn. Only
answers count, as guesses are only made there.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from ..adapters.training import Example
from ..model import Transformer
from ..model.layers import attention
from ..sampling import SamplingParams
from .draft_head import DraftHead
from .engine import Engine

__all__ = ["Passes", "agreement", "new_head", "own_outputs", "train_head"]

DECAY = 0.8  # what a pass counts in the loss, of the one before


def own_outputs(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
) -> list[Example]:  # fmt: skip
    """What the engine's model answers to the prompts, all run together; without those that have no answer."""
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    requests = [engine.add(prompt, p)[0] for prompt, p in zip(prompts, each, strict=True)]
    while engine.has_unfinished():
        engine.step()
    return [Example(r.tokens(), r.num_prompt_tokens) for r in requests if r.output_token_ids]


def new_head(
    model: Transformer, examples: Sequence[Example], most_token_ids: int | None = None, seed: int = 0
) -> DraftHead:  # fmt: skip
    """An untrained head. Of the vocabulary it can guess the `most_token_ids` that answers have most often (None: all).

    It begins as one whose layer adds little: g is nearly the hidden state that it is given. Raises ValueError for a
    number of tokens out of range.
    """
    vocab = model.config.vocab_size
    if most_token_ids is not None and not 1 <= most_token_ids <= vocab:
        raise ValueError(f"most_token_ids: expected 1 to {vocab} (the vocabulary) or None, got {most_token_ids}")
    kept = None
    if most_token_ids is not None:
        counts = Counter(token for example in examples for token in example.token_ids[example.given :])
        often = [token for token, _ in counts.most_common(most_token_ids)]
        others = (token for token in range(vocab) if token not in counts)
        kept = torch.tensor(sorted([*often, *(next(others) for _ in range(most_token_ids - len(often)))]))
    head, draw = DraftHead(model, kept), torch.Generator().manual_seed(seed)
    for name, parameter in head.named_parameters():
        if parameter.dim() == 2:
            std = 0.02 / 2**0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * std)
    weight = model.norm.weight.float()  # which g is multiplied by anew
    undone = torch.where(weight.abs() > 0.01 * weight.abs().mean(), 1 / weight, 0)
    head.merge.weight[:, len(weight) :] += torch.diag(undone).to(model.dtype)
    return head


class Passes:
    """The `LayerCache` of training: what each pass has stored, [B, T, H_kv, D] each."""

    def __init__(self) -> None:
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []

    def slots(self, batch: Any) -> None:
        """Nowhere: by `write`."""

    def write(self, k: Tensor, v: Tensor, batch: Any) -> None:
        """One more pass."""
        self.k.append(k)
        self.v.append(v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: Any) -> Tensor:
        """As in the engine at the guess of this number.  [B, T, H, D] -> the same"""
        passes, length = len(self.k), q.shape[1]
        i, j = torch.arange(length, device=q.device)[:, None], torch.arange(length, device=q.device)
        seen = [j <= i - passes + 1, *(j == i - passes + number for number in range(2, passes + 1))]
        return attention(q, torch.cat(self.k, 1), torch.cat(self.v, 1), torch.cat(seen, 1))


class Texts:
    """Examples on the model's device, and the model's hidden states of all their tokens, computed once: training looks
    at them again and again, and the model stays as it is. They take 2 · hidden bytes a token in 16 bits.
    """

    def __init__(self, model: Transformer, examples: Sequence[Example], batch_size: int) -> None:
        self.examples, self.model = examples, model
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].token_ids))
        self.states: list[Tensor] = [torch.empty(0)] * len(examples)
        for first in range(0, len(order), batch_size):
            some = order[first : first + batch_size]
            with torch.no_grad():
                hidden = model(self._ids(some))  # what stands behind an end changes nothing in front of it
            for i, row in zip(some, hidden, strict=True):
                self.states[i] = row[: len(examples[i].token_ids)].clone()

    def _ids(self, which: Sequence[int]) -> Tensor:
        rows = [torch.tensor(self.examples[i].token_ids) for i in which]
        return pad_sequence(rows, batch_first=True).to(self.model.device, non_blocking=True)

    def batch(self, which: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids [B, T], 0 behind an end; of which tokens the one that follows is an answer's [B, T] bool; hidden
        states [B, T, hidden].
        """
        ids, hidden = self._ids(which), pad_sequence([self.states[i] for i in which], batch_first=True)
        counts = torch.zeros(ids.shape, dtype=torch.bool)
        for row, example in zip(counts, (self.examples[i] for i in which), strict=True):
            row[example.given - 1 : len(example.token_ids) - 1] = True
        return ids, counts.to(ids.device, non_blocking=True), hidden


def _behind(x: Tensor) -> Tensor:
    """Of each token what the one before it has, 0 of the first.  [B, T, hidden] -> the same"""
    return F.pad(x, (0, 0, 1, -1))


def _guessed(head: DraftHead, ids: Tensor, hidden: Tensor, passes: int) -> list[Tensor]:
    """g of each pass, [B, T, hidden] each; the first d - 1 of pass d mean nothing."""
    states, cache, positions = [hidden], Passes(), torch.arange(ids.shape[1], device=ids.device)
    for _ in range(passes):
        states.append(head(ids, _behind(states[-1]), positions, cache))
    return states[1:]


def _loss(head: DraftHead, ids: Tensor, counts: Tensor, truth: Tensor, passes: int) -> Tensor:
    """The mean over tokens, summed over passes by their weights."""
    truth = truth.to(head.merge.weight.dtype)
    guessed = _guessed(head, ids, truth, passes)
    target = F.linear(truth[counts], head.rows).float().softmax(-1)
    losses = []
    for number, g in enumerate(guessed):
        there = (torch.arange(ids.shape[1], device=ids.device) >= number).expand_as(counts)[counts]
        said = F.linear(g[counts], head.rows).float().log_softmax(-1)
        losses.append(DECAY**number * -((target * said).sum(-1) * there).sum() / there.sum().clamp(min=1))
    return torch.stack(losses).sum()


def train_head(
    head: DraftHead, examples: Sequence[Example], steps: int, *, passes: int = 3, lr: float = 1e-3,
    batch_size: int = 32, warmup: int | None = None, clip: float = 1.0, seed: int = 0, progress: bool = True,
    watch: Callable[[int, float], None] | None = None,
) -> list[float]:  # fmt: skip
    """Train a head in place, by AdamW in fp32; its model stays as it is. -> the loss of each step

    Each step draws `batch_size` examples; the rate rises for `warmup` steps (None: a twentieth of all) and falls along
    a half cosine. watch: called with each step's number and loss (the host waits for the device then). Raises
    ValueError for numbers below 1, and FloatingPointError for a loss that is no number.
    """
    sizes = {"steps": steps, "passes": passes, "batch_size": batch_size, "examples": len(examples)}
    if bad := [name for name, value in sizes.items() if value < 1]:
        raise ValueError(f"{bad[0]}: expected 1 or more, got {sizes[bad[0]]}")
    dtype, precision = head.merge.weight.dtype, torch.get_float32_matmul_precision()
    parameters = list(head.float().requires_grad_(True).parameters())
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = max(1, steps // 20 if warmup is None else warmup)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * float(torch.tensor(step / steps * torch.pi).cos()))
    )
    draw, losses, texts = torch.Generator().manual_seed(seed), [], Texts(head.model, examples, batch_size)
    try:
        for step in tqdm(range(steps), disable=not progress, desc="draft head"):
            chosen = torch.randint(len(examples), (batch_size,), generator=draw).tolist()
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = _loss(head, *texts.batch(chosen), passes)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            if watch is not None:
                watch(step, float(loss.detach()))
    finally:
        torch.set_float32_matmul_precision(precision)
        head.to(dtype).requires_grad_(False)
    found: list[float] = torch.stack(losses).tolist()
    if bad_steps := [step for step, value in enumerate(found) if not value < float("inf")]:
        raise FloatingPointError(f"step {bad_steps[0]}: the loss is {found[bad_steps[0]]}; lower lr, {lr}")
    return found


@torch.inference_mode()
def agreement(head: DraftHead, examples: Sequence[Example], count: int, batch_size: int = 32) -> list[float]:
    """How often guess 1 ... count is the model's likeliest token where all guesses before it were, over the answers'
    tokens. With greedy decoding that is how often it is accepted, as the texts are the model's own.
    """
    reached, right = torch.zeros(count), torch.zeros(count)
    for first in range(0, len(examples), batch_size):
        some = examples[first : first + batch_size]
        ids, counts, truth = Texts(head.model, some, batch_size).batch(range(len(some)))
        guessed, likeliest = _guessed(head, ids, truth, count), torch.zeros_like(ids)
        likeliest[counts] = _likeliest(head.model, truth[counts])
        # Guess d that begins behind token i is about token i + d: pass d at i + d - 1.
        alive = counts.clone()
        for place, g in enumerate(guessed):
            ahead = F.pad(head.best(g) == likeliest, (0, place))[:, place:]
            # A text that was drawn goes on otherwise than the likeliest tokens: then nothing can be said.
            alive = alive & F.pad(counts, (0, place))[:, place:]
            if place:
                alive = alive & F.pad(ids == likeliest.roll(1, 1), (0, place))[:, place:]
            reached[place] += alive.sum().cpu()
            alive = alive & ahead
            right[place] += alive.sum().cpu()
    return (right / reached.clamp(min=1)).tolist()


def _likeliest(model: Transformer, hidden: Tensor) -> Tensor:
    """The model's likeliest next tokens, some at a time, as the vocabulary is large.  [N, hidden] -> [N]"""
    return torch.cat([model.logits(some).argmax(-1) for some in hidden.split(1024)])
