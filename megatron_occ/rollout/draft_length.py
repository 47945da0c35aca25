"""How many tokens to draft: what was accepted, and what a cycle costs, decide."""

from __future__ import annotations

from collections import deque
from statistics import median

from megatron_occ.rollout.engine import DraftStatistics

# cycles of each draft length whose times are remembered, and needed for a judgement
REMEMBERED, NEEDED = 9, 3
# of what earlier calls counted, when a call begins
FADING = 0.5
# cycles of a call that draft, whatever the judgement: acceptance changes as the policy learns
PROBES = 1


class DraftLength:
    """Chooses the draft length with the most tokens a second; 0: no drafts.

    A cycle of k drafts commits 1 + s_1 + ... + s_k tokens of each sequence on average, where s_j
    is the share of j-th drafts that were accepted (all before them included), and its time is
    measured: the median over the last cycles of that draft length with about as many sequences.
    A longer draft is tried as long as it could win: with the survival of the length before it, at
    that one's price. Leviathan et al. 2023 (2211.17192, section 3.3) have the same trade-off with
    a constant acceptance rate.

    Args:
        limit: tokens of a draft at most.
        adaptive: False: always ``limit``.
    """

    def __init__(self, limit: int, *, adaptive: bool) -> None:
        self.limit, self.adaptive = limit, adaptive
        self._seconds: dict[tuple[int, int], deque[float]] = {}
        self._proposed = [0.0] * limit
        self._accepted = [0.0] * limit
        self._probes = 0

    def begin(self) -> None:
        """A new call: what was accepted before counts for less."""
        self._probes = PROBES
        self._proposed = [FADING * count for count in self._proposed]
        self._accepted = [FADING * count for count in self._accepted]

    def choose(self, sequences: int) -> int:
        """Tokens to draft in the next cycle of so many sequences."""
        if not self.adaptive or self.limit == 0:
            return self.limit
        best, untried = self._judge(sequences)
        if untried is not None:
            return untried
        if best == 0 and self._probes > 0:
            self._probes -= 1
            return 1
        return best

    def observe(self, sequences: int, length: int, seconds: float, drafts: DraftStatistics) -> None:
        """What a cycle of ``length`` drafts took, and how they fared."""
        key = (_bucket(sequences), length)
        self._seconds.setdefault(key, deque(maxlen=REMEMBERED)).append(seconds)
        for index in range(length):
            self._proposed[index] += drafts.proposed[index]
            self._accepted[index] += drafts.accepted[index]

    def expected_tokens(self, length: int) -> float:
        """Tokens that a sequence gets of a cycle of ``length`` drafts, on average."""
        return 1.0 + sum(self._survival(index) for index in range(length))

    def _survival(self, index: int) -> float:
        """Share of the drafts at ``index`` that are accepted; that of the one before at most."""
        before = self._survival(index - 1) if index > 0 else 1.0
        if self._proposed[index] == 0:
            return before
        return min(before, self._accepted[index] / self._proposed[index])

    def _judge(self, sequences: int) -> tuple[int, int | None]:
        """Best length so far, and a length that has to be tried first, if any."""
        bucket, best, best_rate, price = _bucket(sequences), 0, 0.0, 0.0
        for length in range(self.limit + 1):
            times = self._seconds.get((bucket, length), ())
            if len(times) < NEEDED:
                hopeless = price > 0 and self.expected_tokens(length) / price <= best_rate
                return best, None if hopeless else length
            price = max(price, median(times))
            rate = self.expected_tokens(length) / median(times)
            if rate > best_rate:
                best, best_rate = length, rate
        return best, None


def _bucket(sequences: int) -> int:
    """Sizes with the same number of binary digits are judged together."""
    return sequences.bit_length()
