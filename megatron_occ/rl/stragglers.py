"""The times of all ranks in a step, so that one that is slow can be named."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_occ.observe.alerts import STRAGGLER_PHASES, straggler_metrics
from megatron_occ.rl.interfaces import Collectives


def times_over_ranks(times: Mapping[str, float], layout: Collectives) -> dict[str, float]:
    """``straggler_metrics`` of all ranks, called by all of them; {} for a single one.

    Args:
        times: ``time/<phase>`` of this rank, in seconds.
        layout: gathers 4 numbers a rank.
    """
    if layout.world_size == 1:
        return {}
    own = [times.get(f"time/{phase}", 0.0) for phase in STRAGGLER_PHASES]
    here = torch.tensor(own, dtype=torch.float64, device=layout.device)
    return straggler_metrics(layout.gather_ranks(here).view(layout.world_size, -1).tolist())
