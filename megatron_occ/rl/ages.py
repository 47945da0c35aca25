"""How old responses are when they train, in RL steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Lags:
    """Lags of the tokens of some responses.

    Args:
        sums: [4], to be added over ranks: lags of all tokens, tokens, responses whose tokens are
            of several versions, responses.
        largest: lag of a token.
    """

    sums: list[float]
    largest: int

    @staticmethod
    def metrics(sums: Sequence[float], largest: float) -> dict[str, float]:
        """Of all ranks: mean and largest lag of a token, and the share of responses in parts."""
        total, tokens, straddling, responses = sums
        return {
            "lag/mean": total / max(tokens, 1.0),
            "lag/max": largest,
            "lag/straddling": straddling / max(responses, 1.0),
        }


class Ages:
    """Which weights were the newest in which step.

    The lag of a token is the number of steps since its weights were the newest: 0 for those that
    the step begins with.
    """

    def __init__(self) -> None:
        self._step = 0
        self._newest: dict[int, int] = {}

    def begin_step(self, version: int) -> None:
        """A step begins with weights of this version; they may be those of the step before."""
        self._step += 1
        self._newest[version] = self._step

    def of(self, versions: Sequence[Sequence[int]]) -> Lags:
        """Lags of responses, from the versions of their tokens."""
        lags = [self._step - self._newest[version] for row in versions for version in row]
        straddling = sum(len(set(row)) > 1 for row in versions)
        sums = [float(sum(lags)), float(len(lags)), float(straddling), float(len(versions))]
        return Lags(sums, max(lags, default=0))
