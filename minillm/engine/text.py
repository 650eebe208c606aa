"""Text out of tokens, piece by piece, and its end at a stop string."""

from collections.abc import Sequence
from typing import Protocol

__all__ = ["StopText"]


class Decoder(Protocol):
    """What turns tokens into text and holds back incomplete characters: `model.tokenizer.StreamDecoder`."""

    def push(self, token: int) -> str:
        """One more token -> the text that is complete by now."""

    def flush(self) -> str:
        """No more tokens -> what was held back."""


class StopText:
    """Text that ends before the first of the strings `stop`: what might begin one is held back until that is clear.

        text = StopText(["END"], StreamDecoder(tokenizer))
        piece = text.push(token)        # final text, perhaps empty; text.stopped: a stop string was found
        rest = text.flush()             # after the last token

    Stop strings are found across the borders of tokens, and a piece never ends inside a character.
    """

    def __init__(self, stop: Sequence[str], decoder: Decoder) -> None:
        self.stop, self.decoder, self.held, self.stopped = stop, decoder, "", False
        self.exempt = 0  # so many characters of `held` came when it might not stop: no string that ends in them counts

    def push(self, token: int, may_stop: bool = True) -> str:
        """One more token -> text that is final. A stop string that ends before `may_stop` does not count."""
        return self._release(self.decoder.push(token), may_stop)

    def flush(self) -> str:
        """The end -> what was held back."""
        if self.stopped:
            return ""
        piece = self._release(self.decoder.flush())
        rest, self.held = ("", "") if self.stopped else (self.held, "")
        return piece + rest

    def _release(self, piece: str, may_stop: bool = True) -> str:
        self.held += piece
        if not may_stop:
            self.exempt = len(self.held)
        found = [at for stop in self.stop if (at := self.held.find(stop, max(0, self.exempt - len(stop) + 1))) >= 0]
        if found:
            self.stopped = True
            return self.held[: min(found)]
        keep = max((n for stop in self.stop for n in range(1, len(stop)) if self.held.endswith(stop[:n])), default=0)
        ready, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        self.exempt = max(0, self.exempt - len(ready))
        return ready
