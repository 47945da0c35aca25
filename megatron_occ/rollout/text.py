"""Stop strings, found in the text of token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StopText:
    """A test whether response tokens contain a stop string.

    Asked after each token in turn, it finds the one that completes a string. Only the last tokens
    are decoded: as many as the longest string has bytes, fourfold, since a token may be special
    and have no text.

    Args:
        decode: text of token ids.
        strings: at least one.
    """

    decode: Callable[[Sequence[int]], str]
    strings: tuple[str, ...]

    @property
    def window(self) -> int:
        """Tokens that are looked at."""
        return 4 * max(len(text.encode()) for text in self.strings)

    def ends(self, tokens: list[int]) -> bool:
        """Whether the last tokens contain one of the strings."""
        text = self.decode(tokens[-self.window :])
        return any(stop in text for stop in self.strings)
