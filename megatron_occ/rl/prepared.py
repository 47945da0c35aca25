"""A mini-batch ready for passes of the model: constants of the loss, and counts over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_occ.config.schema import Config
from megatron_occ.losses.heads import HeadOutputs, JointTargets, LossReport, Normalizers
from megatron_occ.rl.batch import (
    MiniBatch,
    consecutive,
    joint_targets,
    masks_at_source,
    sequence_ends,
)
from megatron_occ.rl.correction import Corrections
from megatron_occ.rl.interfaces import Actor

CountedLoss = Callable[[HeadOutputs, JointTargets, Normalizers], tuple[Tensor, LossReport]]


@dataclass(frozen=True)
class Constants:
    """A micro-batch: token ids [b, s], constants of the loss, lengths where it is packed.

    ``ends``, ``masks`` and ``routes``: see ``Actor.micro_batch``.
    """

    ids: Tensor
    targets: JointTargets
    lengths: list[int] | None
    ends: Tensor
    masks: Tensor | None
    routes: Tensor | None


class _Masked(Protocol):
    targets: Any


def count_targets(actor: Actor, parts: Sequence[_Masked]) -> Normalizers:
    """Counts of a mini-batch over its micro-batches and all data-parallel ranks."""
    counts = torch.stack([Normalizers.count(part.targets.mask) for part in parts]).sum(0)
    return Normalizers.from_counts(actor.layout.all_reduce_data_parallel(counts))


class PreparedBatch:
    """This rank's part of a mini-batch.

    Args:
        config: the run's configuration.
        actor: the policy.
        mini_batch: with old log-probs.

    Attributes:
        parts: its micro-batches.
        normalizers: counts over all ranks.
        metrics: what ``rl.correction`` did, over all ranks, on the device.
    """

    def __init__(self, config: Config, actor: Actor, mini_batch: MiniBatch) -> None:
        self._actor, self._temperature = actor, config.rl.rollout.temperature
        loss = config.rl.loss
        self._has_terms_on_all = loss.kl_coefficient > 0 or loss.entropy_coefficient > 0
        corrected = Corrections(config.rl.correction)
        self.parts = [
            Constants(
                rows.ids,
                joint_targets(corrected(rows), actor.num_depths),
                lengths,
                # a row that is left out has no token for routers to balance
                sequence_ends(rows.response_mask),
                masks_at_source(rows),
                rows.routes,
            )
            for rows, lengths in mini_batch.micro_batches()
        ]
        self.normalizers = count_targets(actor, self.parts)
        self.metrics = corrected.metrics(actor.layout)
        self._spans = consecutive(mini_batch.parts or (len(self.parts),))

    @property
    def num_parts(self) -> int:
        """Parts of the mini-batch, which share no prompt."""
        return len(self._spans)

    def teaches_policy(self) -> bool:
        """Whether the policy loss has anything to learn from on any rank; called by all ranks.

        Otherwise its gradient is 0: no token that counts has an advantage, and no KL penalty or
        entropy bonus is about the others.
        """
        counts = torch.stack([self._taught_tokens(part.targets).sum() for part in self.parts])
        return bool(self._actor.layout.all_reduce_data_parallel(counts.sum()))

    def _taught_tokens(self, targets: JointTargets) -> Tensor:
        """[b, s] tokens that the main head's policy loss is about."""
        counts = targets.mask[0] > 0
        if self._has_terms_on_all:
            return counts
        counts = counts & (targets.advantages != 0).unsqueeze(1)
        weights = targets.importance_weights
        return counts if weights is None else counts & (weights != 0)

    def micro_batches(self, part: int | None = None, **wanted: Any) -> list[Any]:
        """For a pass of the actor, see ``Actor.micro_batch``; of one part, or of all."""
        span = range(len(self.parts)) if part is None else self._spans[part]
        return [
            self._actor.micro_batch(
                part.ids,
                part.targets,
                lengths=part.lengths,
                ends=part.ends,
                temperature=self._temperature,
                masks=part.masks,
                routes=part.routes,
                **wanted,
            )
            for part in self.parts[span.start : span.stop]
        ]

    def gradient(
        self,
        loss: CountedLoss,
        passes: tuple[tuple[bool, bool], ...],
        *,
        head: bool = False,
        part: int | None = None,
        **wanted: Any,
    ) -> tuple[Any, LossReport]:
        """Trunk gradient of a loss by a pass of its own, and the report over all ranks.

        Args:
            loss: from outputs, constants and counts, those of the whole mini-batch, to a scalar and
                a report.
            passes: of the MTP block, see ``Regime.passes``.
            head: also the gradient of the head's own parameters.
            part: of the mini-batch; None: all of it.
            wanted: what else the loss reads, or does not, see ``Actor.micro_batch``.
        """
        return self._actor.get_gradient(
            self.micro_batches(part, passes=passes, **wanted),
            lambda outputs, targets: loss(outputs, targets, self.normalizers),
            head=head,
        )
