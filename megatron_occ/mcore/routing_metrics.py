"""What routers did in training passes, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_occ.mcore.layout import Layout
from megatron_occ.mcore.model import OCCGPTModel


def pop_routing_metrics(chunks: Sequence[OCCGPTModel], layout: Layout) -> dict[str, float]:
    """Metrics since the last call, each where there is any; called by all ranks.

    ``routing/replaced``: share of the replayed experts that the trunk's routers would not have
    chosen. ``routing/balance``: mean over the trunk's routers of the balance loss without its
    coefficient. ``routing/replaced_mtp`` and ``routing/balance_mtp``: the same of MTP layers.

    Args:
        chunks: of the model on this rank.
        layout: this rank's place.
    """
    found = {}
    if chunks[0].routing is not None:
        counts = sum(chunk.routing.pop_counts() for chunk in chunks)
        # replayed, and of these replaced
        found |= _quotients("routing/replaced", counts.flip(1), layout)
    if chunks[0].balance is not None:
        sums = sum(chunk.balance.pop_sums() for chunk in chunks)
        found |= _quotients("routing/balance", sums, layout)
    return found


def _quotients(name: str, parts: Tensor, layout: Layout) -> dict[str, float]:
    """Of sums over all ranks: parts [2, 2] are (part, whole) of the trunk and of MTP layers."""
    total = layout.gather_ranks(parts.to(layout.device).unsqueeze(0)).sum(0)
    pairs = zip((name, f"{name}_mtp"), total.tolist(), strict=True)
    return {key: part / whole for key, (part, whole) in pairs if whole}
