"""Stop strings, found in the text of token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def stop_finder(
    decode: Callable[[Sequence[int]], str] | None, stop_strings: Sequence[str]
) -> Callable[[list[int]], bool] | None:
    """A test whether response tokens contain a stop string; None without stop strings.

    Called with each token in turn, it finds the one that completes a string. Only the last tokens
    are decoded: as many as the longest string has bytes, fourfold, since a token may be special
    and have no text.
    """
    if not stop_strings:
        return None
    assert decode is not None, "stop strings need a decoder"
    window = 4 * max(len(text.encode()) for text in stop_strings)

    def ends(tokens: list[int]) -> bool:
        text = decode(tokens[-window:])
        return any(stop in text for stop in stop_strings)

    return ends
