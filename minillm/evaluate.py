"""How well a model predicts a text: cross-entropy, perplexity, bits per byte. What a change to a model has changed.

The cross-entropy is the mean of -ln p(token | tokens before it). Perplexity is its exponential: a model that is as
unsure as a fair choice among k tokens has perplexity k. Both count per token, and a tokenizer with longer tokens makes
fewer and harder ones. Bits per byte divide the same sum by the bytes of the text, so they compare models with different
tokenizers.

Whether a model of fewer bits is worse than its original (`compare`) is another question. Both read the same text, so
what makes a passage hard cancels in the difference: a difference far below the error of either perplexity can be
certain. Two models that are equally good may still not be alike. That is what the KL divergence between their
distributions shows, and the share of flips: positions where another token is the likeliest.

Source: Dutta et al., 2024, "Accuracy is Not All You Need" (KL divergence and flips).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Comparison", "Score", "choose", "compare", "perplexity", "windows"]

Model = Callable[[Tensor], Tensor]  # token ids [B, T] int64 -> logits [B, T, V]


@dataclass(frozen=True)
class Score:
    """What predicting a text cost: `nll`, the sum of -ln p in nats over `num_tokens` scored tokens, which stand for
    `num_bytes` bytes.

    Scores of several texts add up: `a + b` weights every token alike, which the mean of two perplexities does not.
    """

    nll: float
    num_tokens: int
    num_bytes: int | None = None

    @property
    def cross_entropy(self) -> float:
        """Nats a token."""
        return self.nll / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp(cross-entropy): the number of equally likely tokens that would be as hard to choose from."""
        return math.exp(self.cross_entropy)

    @property
    def bits_per_byte(self) -> float:
        """Bits an ideal coder with this model needs for a byte of text. Raises ValueError without `num_bytes`."""
        if not self.num_bytes:
            raise ValueError(
                "num_bytes: expected the length of the text in bytes, got none; pass num_bytes to perplexity()"
            )
        return self.nll / math.log(2) / self.num_bytes

    def __add__(self, other: "Score") -> "Score":
        known = None if self.num_bytes is None or other.num_bytes is None else self.num_bytes + other.num_bytes
        return Score(self.nll + other.nll, self.num_tokens + other.num_tokens, known)


@torch.inference_mode()
def perplexity(
    model: Callable[[Tensor], Tensor],
    token_ids: Sequence[int] | Tensor,
    window: int = 512,
    stride: int | None = None,
    num_bytes: int | None = None,
    device: torch.device | str = "cpu",
) -> Score:
    """Score every token of a text once, the first excepted: nothing precedes it. Begin with the end-of-text token to
    score all of the text.

    model: token ids [1, T] int64 -> logits [1, T, V]. token_ids: of one text, at least 2.
    window: positions that the model sees at once. stride: how far the window moves, 1 to `window`; window by default.
    num_bytes: bytes of the scored tokens, for bits per byte.

    A window of input tokens b .. b+window-1 predicts tokens b+1 .. b+window. Of those, the ones that an earlier window
    scored are left out, so a scored token sees at least window - stride + 1 tokens before it, except at the beginning
    of the text. A small stride is exact and dear: it reads every token window / stride times. Raises ValueError for a
    window, a stride or a text that does not fit.
    """
    stride = window if stride is None else stride
    ids = torch.as_tensor(token_ids, dtype=torch.long, device=device)
    if window < 1:
        raise ValueError(f"window: expected 1 or more positions, got {window}")
    if not 1 <= stride <= window:
        raise ValueError(f"stride: expected 1 to window ({window}), so that no token is left out, got {stride}")
    if ids.dim() != 1 or len(ids) < 2:
        raise ValueError(f"token_ids: expected one text of at least 2 tokens, got the shape {tuple(ids.shape)}")
    nll, scored = 0.0, 0
    for begin in range(0, len(ids) - 1, stride):
        end = min(begin + window, len(ids) - 1)
        logits = model(ids[None, begin:end])[0]  # [T, V]
        fresh = end - scored  # tokens scored+1 .. end are new
        losses = F.cross_entropy(logits[-fresh:].float(), ids[scored + 1 : end + 1], reduction="none")  # [fresh]
        nll += losses.double().sum().item()
        scored = end
        if end == len(ids) - 1:
            break
    return Score(nll, scored, num_bytes)


# ---- two models, one text ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A model beside its reference, window by window: each field is fp64 [N], a mean over a window's scored tokens.

    - reference_nll, nll: cross-entropy in nats a token. kl: KL(reference || model) of the next token's distribution.
      flips: the share of positions where the two models' likeliest tokens differ.

    Errors are standard errors of the mean over windows. They say how much another text of the same kind would change
    the number; those of `difference` and `log_ratio` are paired, from the differences within each window. With one
    window they are NaN.
    """

    reference_nll: Tensor
    nll: Tensor
    kl: Tensor
    flips: Tensor

    @property
    def reference_perplexity(self) -> float:
        """Of the reference."""
        return self.reference_nll.mean().exp().item()

    @property
    def perplexity(self) -> float:
        """Of the model."""
        return self.nll.mean().exp().item()

    @property
    def perplexity_error(self) -> float:
        """Of one perplexity by itself, unpaired: what `difference_error` is to be compared with."""
        return self.perplexity * _error(self.nll)

    @property
    def log_ratio(self) -> float:
        """ln(perplexity / reference perplexity), the difference of the cross-entropies: 0.01 is about 1 % more."""
        return (self.nll - self.reference_nll).mean().item()

    @property
    def log_ratio_error(self) -> float:
        """Paired."""
        return _error(self.nll - self.reference_nll)

    @property
    def difference(self) -> float:
        """perplexity - reference_perplexity."""
        return self.perplexity - self.reference_perplexity

    @property
    def difference_error(self) -> float:
        """Paired, to first order: a change d of a cross-entropy changes its perplexity by perplexity · d."""
        return _error(self.perplexity * self.nll - self.reference_perplexity * self.reference_nll)

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.3f}, {self.difference:+.3f} ± {self.difference_error:.3f}"
            f" ({self.log_ratio:+.2%} ± {self.log_ratio_error:.2%}), KL {self.kl.mean().item():.5f},"
            f" flips {self.flips.mean().item():.2%}"
        )


def _error(values: Tensor) -> float:
    """The standard error of the mean of [N]."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


def windows(token_ids: Sequence[int] | Tensor, window: int = 512, count: int = 24) -> Tensor:
    """The first `count` windows of a text, side by side.  [T] -> [count, window] int64

    Raises ValueError for a text that is too short.
    """
    ids = torch.as_tensor(token_ids, dtype=torch.long)
    if window < 2 or count < 1:
        raise ValueError(f"window, count: expected at least 2 tokens and 1 window, got {window} and {count}")
    if ids.dim() != 1 or len(ids) < window * count:
        raise ValueError(f"token_ids: expected a text of {window} · {count} tokens, got the shape {tuple(ids.shape)}")
    return ids[: window * count].view(count, window)


@torch.inference_mode()
def compare(
    reference: Model, models: Mapping[str, Model], token_ids: Tensor, bos: int | None = None
) -> dict[str, Comparison]:  # fmt: skip
    """Judge each model beside the reference, which reads every window once for all of them.

    token_ids [N, T]: windows, as `windows` and `data.held_out` cut them, on the models' device. bos: a token to put in
    front of each.

    Scored are tokens 1 .. T-1 of each window, with a bos and without: the numbers differ by what the bos does alone. It
    is attended to and says nothing, which is what the first token is otherwise made to do, whatever it is: models put
    huge activations there. Give all models the same bos, and quote it with the number.

    Raises ValueError for windows of fewer than 2 tokens.
    """
    if token_ids.dim() != 2 or token_ids.shape[0] < 1 or token_ids.shape[1] < 2:
        raise ValueError(f"token_ids: expected [N, T] with 2 tokens or more a window, got {tuple(token_ids.shape)}")
    rows: dict[str, list[Tensor]] = {name: [] for name in models}
    for ids in token_ids:  # one at a time: the logits of 512 tokens take 100 MB
        shown = ids if bos is None else torch.cat((ids.new_tensor([bos]), ids))
        first = len(shown) - len(ids)
        expected = _log_probs(reference, shown)[first:-1]  # [T - 1, V]
        for name, model in models.items():
            rows[name].append(_judge(expected, _log_probs(model, shown)[first:-1], ids[1:]))
    return {name: Comparison(*torch.stack(found, 1)) for name, found in rows.items()}


def _log_probs(model: Model, ids: Tensor) -> Tensor:
    """[T] -> [T, V] in fp32"""
    return model(ids[None])[0].float().log_softmax(-1)


def _judge(expected: Tensor, got: Tensor, targets: Tensor) -> Tensor:
    """What a `Comparison` has of one window, in its order.  Log-probabilities [T, V] twice, [T] -> fp64 [4]"""
    nll = [-x.gather(-1, targets[:, None]).double().mean() for x in (expected, got)]
    # Where the reference is sure, p = 0 and log p = -inf: such a token adds nothing.
    kl = torch.where(expected > -torch.inf, expected.exp() * (expected - got), 0.0).sum(-1)  # [T]
    flips = expected.argmax(-1) != got.argmax(-1)
    return torch.stack([*nll, kl.double().mean(), flips.double().mean()]).cpu()


@torch.inference_mode()
def choose(
    model: Model, prompt: Sequence[int], choices: Sequence[Sequence[int]], device: torch.device | str = "cpu"
) -> Tensor:  # fmt: skip
    """How likely each choice is as the prompt's continuation, by the mean log-probability of its tokens.  -> [C] fp32

    The largest is the model's answer. The sum would favor short choices: every further token costs. All choices are one
    batch, padded on the right, where a causal model does not look. Raises ValueError for an empty prompt or choice.
    """
    if not prompt or not choices or not all(choices):
        raise ValueError("prompt, choices: expected a prompt and choices of at least one token each, got an empty one")
    begin, longest = len(prompt) - 1, max(map(len, choices))
    rows = [[*prompt, *choice, *[0] * (longest - len(choice))] for choice in choices]
    ids = torch.tensor(rows, device=device)  # [C, T]
    log_probs = model(ids[:, :-1])[:, begin:].float().log_softmax(-1)  # [C, longest, V]
    own = log_probs.gather(-1, ids[:, begin + 1 :, None])[..., 0]  # [C, longest]
    lengths = torch.tensor([len(choice) for choice in choices], device=device)
    return own.where(torch.arange(longest, device=device) < lengths[:, None], 0.0).sum(-1) / lengths
