"""Correction of a mini-batch for a rollout policy that differs from the trained one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_occ.config.schema_loss import CorrectionConfig
from megatron_occ.losses import shift_to_source, shift_to_tokens
from megatron_occ.losses.correction import CorrectionSettings, correct, correction_metrics
from megatron_occ.rl.batch import RolloutBatch
from megatron_occ.rl.interfaces import Collectives


class Corrections:
    """Corrects the parts of a mini-batch and tells what was done to all of them.

    What is rejected is left out for every head: no depth has a rejected token as its target, but
    where the head trains on the states of rollouts, which are those of all responses. A
    depth's weight of a token is the main head's of the same token, or its sequence's.

    Args:
        config: section ``rl.correction``.
    """

    def __init__(self, config: CorrectionConfig) -> None:
        self._settings = CorrectionSettings(**vars(config))
        self._sums: list[Tensor] = []

    def __call__(self, rows: RolloutBatch) -> RolloutBatch:
        """Rows with old log-probs; with weights, and without what is rejected."""
        if not self._settings.acts:
            return rows
        assert rows.old_logprobs is not None, "old log-probs are computed before training"
        found = correct(
            rows.old_logprobs,
            shift_to_source(rows.rollout_logprobs, 0),
            shift_to_source(rows.response_mask, 0),
            self._settings,
        )
        self._sums.append(found.sums)
        return replace(
            rows,
            response_mask=shift_to_tokens(found.keep.to(rows.response_mask), 0),
            importance_weights=_product(rows.importance_weights, found.weights),
        )

    def metrics(self, layout: Collectives) -> dict[str, Tensor]:
        """Of all parts on all ranks, on the device; called by all ranks."""
        if not self._settings.acts:
            return {}
        total = layout.all_reduce_data_parallel(_total(self._sums, layout.device))
        found = correction_metrics(total, self._settings)
        return {f"correction/{name}": value for name, value in found.items()}


def _product(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return one * other


def _total(sums: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.stack(list(sums)).sum(0) if sums else torch.zeros(8, device=device).double()
