"""How drafts of servers fared, of what was asked of them but for probes."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_occ.rollout.engine import DraftStatistics
from megatron_occ.rollout.remote.fleet import Fleet
from megatron_occ.rollout.remote.probe import difference


class DraftCounter:
    """Counts since they were asked for last.

    Args:
        fleet: the servers.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet, self._kept = fleet, DraftStatistics()
        self._before: list[DraftStatistics | None] = [None] * len(fleet.members)

    def keep(self) -> None:
        """Before a probe: what was counted so far counts."""
        now = self._fleet.drafts()
        self._kept.add(between(self._before, now))
        self._before = now

    def skip(self) -> None:
        """After a probe: what was counted since does not."""
        self._before = self._fleet.drafts()

    def pop(self) -> DraftStatistics:
        """What was counted."""
        self.keep()
        kept, self._kept = self._kept, DraftStatistics()
        return kept


def between(
    before: Sequence[DraftStatistics | None], after: Sequence[DraftStatistics | None]
) -> DraftStatistics:
    """Counts of all servers in between; a server that was down at one end is left out."""
    total = DraftStatistics()
    for old, new in zip(before, after, strict=True):
        if old is not None and new is not None:
            total.add(difference(new, old))
    return total
