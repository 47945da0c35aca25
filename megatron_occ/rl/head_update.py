"""The stage before RL: the MTP head learns to draft for the policy, which stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from megatron_occ.config.schema import Config
from megatron_occ.losses.head_loss import HeadLoss
from megatron_occ.losses.heads import HeadOutputs, HeadTargets, LossReport
from megatron_occ.rl.batch import MiniBatch, head_masks
from megatron_occ.rl.head_rows import HeadBatch, HeadRows
from megatron_occ.rl.interfaces import Actor
from megatron_occ.rl.prepared import count_targets
from megatron_occ.rl.reports import SKIPPED, on_host, update_metrics
from megatron_occ.rl.update import PolicyUpdater, Update


class HeadUpdater:
    """Updates the head alone (``rl.train_trunk=false``), in the place of a ``PolicyUpdater``.

    There is no ratio and no advantage: old log-probs are not computed, and rewards are no more than
    a metric. The policy is the same in all steps, so the states that rollouts left are those of a
    training pass at any update.

    Args:
        config: the run's configuration.
        actor: the policy, with a frozen trunk.
    """

    # nothing compares the log-probs of a training pass
    reuses_rollout = True
    parts = 1

    def __init__(self, config: Config, actor: Actor) -> None:
        self.config, self.actor = config, actor
        self.loss = HeadLoss(config.mtp.head.weight)

    def compute_logprobs(self, mini_batches: Sequence[MiniBatch]) -> list[MiniBatch]:
        """The same mini-batches: the head's loss knows no old policy."""
        return list(mini_batches)

    def run_update(self, mini_batch: MiniBatch, head: HeadRows | None = None) -> Update:
        """One optimizer update of the head.

        Args:
            mini_batch: responses, read by a pass through the trunk without a graph.
            head: responses with trunk states, in place of ``mini_batch``.
        """
        if head is None:
            parts = self._through_trunk(mini_batch)
        else:
            layout, depths = self.actor.layout, self.actor.num_depths
            parts = list(head.batches(self.config.rl, depths, layout.device))
        normalizers = count_targets(self.actor, parts)

        def loss(outputs: HeadOutputs, targets: HeadTargets) -> tuple[Tensor, LossReport]:
            return self.loss(outputs, targets, normalizers)

        batches = [part.for_actor(self.actor, self.config) for part in parts]
        report = self.actor.get_loss_and_metrics(batches, loss)
        step = self.actor.finish_training_step()
        events = [SKIPPED] if step.skipped else []
        metrics = update_metrics(on_host(report), step) | self.actor.pop_routing_metrics()
        return Update(metrics, events, {}, step.skipped)

    def state_dict(self) -> dict[str, Any]:
        """Nothing is kept from step to step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""

    def _through_trunk(self, mini_batch: MiniBatch) -> list[HeadBatch]:
        depths = self.actor.num_depths
        return [
            HeadBatch(
                rows.ids, HeadTargets(head_masks(rows.response_mask, depths)), lengths=lengths
            )
            for rows, lengths in mini_batch.micro_batches()
        ]


def build_updater(config: Config, actor: Actor) -> PolicyUpdater | HeadUpdater:
    """What updates the policy, or with ``rl.train_trunk=false`` its head alone."""
    return PolicyUpdater(config, actor) if config.rl.train_trunk else HeadUpdater(config, actor)
