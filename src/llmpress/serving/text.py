"""Tokens as the text of an answer, piece by piece, up to a stop string."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


@dataclass
class TextStream:
    """The text of tokens that come one after the other.

    Args:
        tokenizer: Of the tokens.
        stops: Strings before which the text ends.
        special: Whether special tokens are part of the text.

    Attributes:
        stopped: Whether a stop string came.
    """

    tokenizer: PreTrainedTokenizerBase
    stops: Sequence[str] = ()
    special: bool = False
    stopped: bool = False

    def __post_init__(self) -> None:
        self._tokens: list[int] = []
        self._text = ""
        self._sent = 0
        fast: Any = getattr(self.tokenizer, "backend_tokenizer", None)
        self._fast = fast
        self._stream = DecodeStream([], skip_special_tokens=not self.special) if fast else None

    def add(self, tokens: Sequence[int], *, last: bool) -> str:
        """Return the text that is certain now, nothing of what may be part of a stop string.

        Args:
            tokens: That came since.
            last: Whether no more will come.
        """
        if self.stopped:
            return ""
        self._tokens += tokens
        if self._stream is None or last:
            self._text = self._whole(last=last)
        else:
            for token in tokens:
                self._text += self._stream.step(self._fast, token) or ""
        end = len(self._text)
        found = [
            at for stop in self.stops if (at := self._text.find(stop, self._searched(stop))) >= 0
        ]
        if found:
            self.stopped, end = True, min(found)
        elif not last:
            end -= max((_overlap(self._text, stop) for stop in self.stops), default=0)
        piece = self._text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece

    def _searched(self, stop: str) -> int:
        return max(0, self._sent - len(stop))

    def _whole(self, *, last: bool) -> str:
        text = str(self.tokenizer.decode(self._tokens, skip_special_tokens=not self.special))
        if not last:  # bytes of a character that is not complete
            text = text.rstrip("\ufffd")
        return text if text.startswith(self._text[: self._sent]) else self._text


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text a stop string may begin with."""
    for count in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:count]):
            return count
    return 0
