"""Loss, gradients and lambda don't depend on how a mini-batch is cut, padded or spread out."""

from __future__ import annotations

import functools

import pytest
import torch

from megatron_occ.rl.batch import RolloutBatch
from tests.unit.fakes import run_ranks
from tests.unit.rl_setup import OPEN, PRESETS, four_updates, mini_batches

RELEASED = ("mtp.preset=occ", "mtp.trunk.estimator=released", OPEN)
VARIANTS = {
    **{name: (f"mtp.preset={name}", OPEN) for name in PRESETS},
    "occ_current": ("mtp.preset=occ", "mtp.trunk.statistics=current", OPEN),
    "soft_ce": ("mtp.trunk.signal=policy", "mtp.head.signal=soft_ce", OPEN),
    "tv": ("mtp.trunk.signal=policy", "mtp.head.signal=tv", OPEN),
    "own_policy": ("mtp.trunk.signal=policy", "mtp.head.signal=policy", OPEN),
    "grpo": ("mtp.preset=occ_decoupled", "rl.algorithm=grpo", OPEN),
    "gspo": ("mtp.preset=occ", "rl.algorithm=gspo", OPEN),
    "extras": (
        "mtp.preset=occ",
        "rl.loss.entropy_coefficient=0.1",
        "rl.loss.kl_coefficient=0.2",
        "rl.loss.importance_cap=1.0",
        "rl.rollout.temperature=0.8",
        OPEN,
    ),
}
MINI = 4  # sequences a mini-batch: 16 in 4 updates


def run(overrides, micro=MINI, change=lambda batch: batch):
    """All updates of a step: metrics of each, and the actor with its losses and gradients."""
    trainer, actor = four_updates(*overrides, micro=micro)
    return [trainer.run_update(mini) for mini in mini_batches(trainer, change)], actor


@functools.cache
def whole_run(variant):
    return run(VARIANTS[variant])


def assert_same_run(got, expected, tolerance=1e-6):
    metrics, actor = got
    reference_metrics, reference = expected
    for update, other in zip(metrics, reference_metrics, strict=True):
        assert update == pytest.approx(other, abs=tolerance)
    assert actor.losses == pytest.approx(reference.losses, abs=tolerance)
    assert_same_gradients(actor, reference, tolerance)


def assert_same_gradients(actor, reference, tolerance=1e-6):
    for grads, others in zip(actor.gradients, reference.gradients, strict=True):
        assert grads.keys() == others.keys()
        assert max(g.abs().max() for g in others.values()) > 1e-3
        for name, gradient in others.items():
            torch.testing.assert_close(grads[name], gradient, atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_cutting_into_micro_batches_changes_nothing(variant):
    whole = whole_run(variant)
    for micro in (2, 1):
        assert_same_run(run(VARIANTS[variant], micro), whole)


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_changes_nothing(variant):
    """Five more columns of tokens that mean nothing."""

    def widen(batch):
        rows = len(batch)
        zeros, junk = torch.zeros(rows, 5), torch.full((rows, 5), 5)
        return RolloutBatch(
            torch.cat((batch.ids, junk), 1),
            torch.cat((batch.response_mask, zeros), 1),
            torch.cat((batch.rollout_logprobs, zeros), 1),
            batch.advantages,
        )

    assert_same_run(run(VARIANTS[variant], change=widen), whole_run(variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_data_parallel_ranks_update_as_one(variant):
    """Each rank has half of every mini-batch; gradients, lambda and metrics are those of one."""
    whole_metrics, whole = whole_run(variant)

    def work(layout):
        trainer, actor = four_updates(*VARIANTS[variant], micro=1, layout=layout)
        minis = mini_batches(four_updates(*VARIANTS[variant])[0])
        halves = [mini.split(2)[layout.data_parallel_rank] for mini in minis]
        return [trainer.run_update(half) for half in halves], actor

    ranks = run_ranks(2, work)
    for metrics, actor in ranks:
        assert_same_gradients(actor, whole)
        for update, other in zip(metrics, whole_metrics, strict=True):
            assert update == pytest.approx(other, abs=1e-6)
    parts = [actor.losses for _, actor in ranks]
    assert [sum(losses) for losses in zip(*parts, strict=True)] == pytest.approx(
        whole.losses, abs=1e-6
    )


def test_the_released_lambda_does_change_with_the_cut():
    """Documented behaviour of the released formula, kept for reproduction alone."""
    whole_metrics, whole = run(RELEASED)
    cut_metrics, cut = run(RELEASED, micro=2)
    assert cut.losses[0] == pytest.approx(whole.losses[0], abs=1e-6)  # lambda is 0 at first
    for update, other in zip(cut_metrics[1:], whole_metrics[1:], strict=True):
        assert abs(update["lambda/mtp_1"] - other["lambda/mtp_1"]) > 1e-3
    assert abs(cut.losses[1] - whole.losses[1]) > 1e-4
