"""How well a model predicts a text: cross-entropy, perplexity, bits per byte.

The cross-entropy is the mean of -ln p(token | tokens before it). Perplexity is its exponential: a model that is as
unsure as a fair choice among k tokens has perplexity k. Both count per token, and a tokenizer with longer tokens makes
fewer and harder ones. Bits per byte divide the same sum by the bytes of the text, so they compare models with different
tokenizers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Score", "perplexity"]


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
