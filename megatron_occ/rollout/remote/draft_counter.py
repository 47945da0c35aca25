"""How drafts of servers fared, of what was asked of them but for probes."""

from __future__ import annotations

from megatron_occ.rollout.engine import DraftStatistics
from megatron_occ.rollout.remote.fleet import Fleet
from megatron_occ.rollout.remote.probe import difference


class DraftCounter:
    """Counts since they were asked for last, by server.

    Args:
        fleet: the servers.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._kept = [DraftStatistics() for _ in fleet.members]
        self._before: list[DraftStatistics | None] = [None] * len(fleet.members)

    def keep(self) -> None:
        """Before a probe: what was counted so far counts.

        A server that was down at one end is left out.
        """
        now = self._fleet.drafts()
        for kept, old, new in zip(self._kept, self._before, now, strict=True):
            if old is not None and new is not None:
                kept.add(difference(new, old))
        self._before = now

    def skip(self) -> None:
        """After a probe: what was counted since does not."""
        self._before = self._fleet.drafts()

    def pop(self) -> list[DraftStatistics]:
        """What was counted."""
        self.keep()
        kept, self._kept = self._kept, [DraftStatistics() for _ in self._kept]
        return kept
