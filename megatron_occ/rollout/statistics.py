"""How drafts fared, and what servers did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class DraftStatistics:
    """How drafts fared; entry j of a list is about the (j+1)-th drafted token.

    Args:
        proposed: drafted tokens that were verified.
        accepted: those that were kept.
        passes: trunk passes times sequences in them, prefill not counted.
        tokens: tokens that these passes committed.
        preempted: times that a sequence gave its room in the caches to others, to go on later.
    """

    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    passes: int = 0
    tokens: int = 0
    preempted: int = 0

    @property
    def acceptance_length(self) -> float:
        """Tokens committed by one sequence's trunk pass; 1 without drafts."""
        return self.tokens / self.passes if self.passes else 1.0

    def add(self, other: DraftStatistics) -> None:
        """Add the counts of ``other``."""
        for name in ("proposed", "accepted"):
            mine, theirs = getattr(self, name), getattr(other, name)
            mine += [0] * (len(theirs) - len(mine))
            for index, count in enumerate(theirs):
                mine[index] += count
        for name in ("passes", "tokens", "preempted"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass
class ServerWork:
    """What a server did since it was asked last.

    Args:
        url: of the server.
        version: of its weights.
        span: seconds since then.
        busy: seconds of them in which it had a request.
        requests: that it answered to their end.
        tokens: in its answers, those included that were interrupted.
        waited: seconds of these requests together, from sending to the answer.
        drafts: how they fared.
    """

    url: str
    version: int
    span: float = 0.0
    busy: float = 0.0
    requests: int = 0
    tokens: int = 0
    waited: float = 0.0
    drafts: DraftStatistics = field(default_factory=DraftStatistics)

    def add(self, later: ServerWork) -> None:
        """Add what it did after that."""
        self.version = later.version
        for name in ("span", "busy", "requests", "tokens", "waited"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        self.drafts.add(later.drafts)

    def metrics(self) -> dict[str, float]:
        """Version, tokens a second of its work, share of the time without any, seconds a request
        takes, and tokens a pass where it drafts."""
        found = {
            "version": float(self.version),
            "tokens_per_second": self.tokens / self.busy if self.busy else 0.0,
            "idle": 1 - self.busy / self.span if self.span else 0.0,
            "requests": float(self.requests),
            "request_seconds": self.waited / max(self.requests, 1),
        }
        if self.drafts.passes:
            found["acceptance_length"] = self.drafts.acceptance_length
        return found


def server_metrics(works: Sequence[ServerWork]) -> dict[str, float]:
    """``server/<number>/<name>`` of each server, counted from 1 in the order of their URLs.

    Args:
        works: of any number of calls, in each of them every server once, in the same order.
    """
    total: dict[str, ServerWork] = {}
    for work in works:
        total.setdefault(work.url, ServerWork(work.url, work.version)).add(work)
    return {
        f"server/{number}/{name}": value
        for number, work in enumerate(total.values(), start=1)
        for name, value in work.metrics().items()
    }
