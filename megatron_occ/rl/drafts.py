"""How drafts fared, as metrics over all data-parallel ranks."""

from __future__ import annotations

import torch

from megatron_occ.rl.interfaces import Collectives
from megatron_occ.rollout import DraftStatistics


def draft_metrics(drafts: DraftStatistics, layout: Collectives) -> dict[str, float]:
    """Acceptance: tokens a trunk pass, and of the drafts at each place.

    Args:
        drafts: of this rank.
        layout: this rank's place.

    Returns:
        ``draft/acceptance_length``, 1 without drafts; for each place k that had drafts
        ``draft/proposed_k``, their share of the passes, and ``draft/accepted_k``, the share of them
        that stayed. Where caches were full ``rollout/preempted``, how often a sequence gave way.
    """
    places = torch.tensor(float(len(drafts.proposed)), dtype=torch.float64, device=layout.device)
    length = int(layout.all_reduce_data_parallel(places, maximum=True))
    counts = [drafts.passes, drafts.tokens, drafts.preempted]
    for each in (drafts.proposed, drafts.accepted):
        counts += [*each, *[0] * (length - len(each))]
    local = torch.tensor(counts, dtype=torch.float64, device=layout.device)
    sums = layout.all_reduce_data_parallel(local).tolist()
    (passes, tokens, preempted), places = sums[:3], sums[3:]
    proposed, accepted = places[:length], places[length:]
    metrics = {"draft/acceptance_length": tokens / passes if passes else 1.0}
    metrics |= {"rollout/preempted": preempted} if preempted else {}
    for place, (tried, kept) in enumerate(zip(proposed, accepted, strict=True), start=1):
        if tried:
            metrics[f"draft/proposed_{place}"] = tried / passes
            metrics[f"draft/accepted_{place}"] = kept / tried
    return metrics
