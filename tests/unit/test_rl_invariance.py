"""Loss, gradients and lambda don't depend on how a mini-batch is cut, padded or spread out."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from megatron_occ.rl.batch import RolloutBatch
from tests.unit.fake_layouts import run_ranks
from tests.unit.rl_setup import OPEN, PRESETS, four_updates, run_updates

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
        "rl.loss.kl_importance=true",
        "rl.correction.weights=token",
        "rl.correction.high=1.0",
        "rl.rollout.temperature=0.8",
        OPEN,
    ),
    "weights_of_sequences": (
        "mtp.preset=policy",
        "rl.correction.weights=sequence",
        "rl.correction.low=0.5",
        "rl.correction.high=2",
        "rl.correction.outside=mask",
    ),
    "tokens_rejected": (
        "mtp.preset=policy",
        "rl.correction.reject=token",
        "rl.correction.reject_low=0.7",
        "rl.correction.reject_high=1.45",
    ),
    "top_entropy": (
        "mtp.preset=policy",
        "rl.loss.top_entropy=0.4",
        "rl.correction.weights=token",
        "rl.correction.high=1.1",
    ),
    "sequences_rejected": (
        "mtp.preset=policy",
        "rl.algorithm=grpo",
        "rl.correction.reject=geometric",
        "rl.correction.reject_low=0.85",
    ),
    **{
        name: ("mtp.preset=policy", "mtp.trunk.weighting=truncated", f"rl.algorithm={name}")
        for name in ("dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "cispo", "sapo")
    },
    "dppo": (
        "mtp.preset=policy",
        "mtp.trunk.weighting=unit",
        "rl.algorithm=dppo",
        "rl.loss.divergence_limit=0.02",
    ),
}
MINI = 4  # sequences a mini-batch: 16 in 4 updates


def run(overrides, micro=MINI, change=lambda batch: batch, layout=None):
    """All updates of a step: metrics of each, and the actor with its losses and gradients."""
    trainer, actor = four_updates(*overrides, micro=micro, layout=layout)
    corrects = any(each.startswith("rl.correction") for each in overrides)
    return run_updates(trainer, lambda b: change(disturbed(b) if corrects else b)), actor


def disturbed(batch):
    """As if drawn by an engine whose log-probs are off, differently for each token."""
    places = torch.arange(batch.ids.size(1))
    noise = 0.4 * torch.sin(7.0 * batch.ids + 3.0 * places) * batch.response_mask
    return replace(batch, rollout_logprobs=batch.rollout_logprobs + noise)


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


def widened(batch):
    """Five more columns of tokens that mean nothing."""
    rows = len(batch)
    zeros, junk = torch.zeros(rows, 5), torch.full((rows, 5), 5)
    return RolloutBatch(
        torch.cat((batch.ids, junk), 1),
        torch.cat((batch.response_mask, zeros), 1),
        torch.cat((batch.rollout_logprobs, zeros), 1),
        batch.advantages,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_changes_nothing(variant):
    assert_same_run(run(VARIANTS[variant], change=widened), whole_run(variant))


def assert_same_ranks(ranks, expected):
    """Gradients, lambda and metrics of each rank are those of one; their losses add up."""
    whole_metrics, whole = expected
    for metrics, actor in ranks:
        assert_same_gradients(actor, whole)
        for update, other in zip(metrics, whole_metrics, strict=True):
            assert update == pytest.approx(other, abs=1e-6)
    parts = [actor.losses for _, actor in ranks]
    assert [sum(losses) for losses in zip(*parts, strict=True)] == pytest.approx(
        whole.losses, abs=1e-6
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_data_parallel_ranks_update_as_one(variant):
    """Each of the four mini-batches is one prompt's group: the ranks exchange rows."""
    ranks = run_ranks(2, lambda layout: run(VARIANTS[variant], 1, layout=layout))
    assert_same_ranks(ranks, whole_run(variant))


def packed(variant, budget, layout=None):
    tokens = f"rl.micro_batch_tokens={budget}"
    metrics, actor = run((*VARIANTS[variant], tokens), layout=layout)
    assert max(map(sum, actor.cuts)) <= budget
    return metrics, actor


@pytest.mark.parametrize("variant", VARIANTS)
def test_packing_changes_nothing(variant):
    """NaN stands behind every packed sequence; see the fake actor."""
    for budget in (8, 15, 1000):
        assert_same_run(packed(variant, budget), whole_run(variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_data_parallel_ranks_update_as_one_when_packed(variant):
    ranks = run_ranks(2, lambda layout: packed(variant, 15, layout))
    assert_same_ranks(ranks, whole_run(variant))
    first, second = (actor.cuts for _, actor in ranks)
    assert len(first) == len(second)


def test_the_released_lambda_is_that_of_the_rows_padded_or_packed():
    whole = run(RELEASED)
    assert min(abs(update["lambda/mtp_1"]) for update in whole[0][1:]) > 1e-3
    assert_same_run(run(RELEASED, change=widened), whole)
    assert_same_run(run((*RELEASED, "rl.micro_batch_tokens=1000")), whole)


def test_the_released_lambda_does_change_with_the_cut():
    """Documented behaviour of the released formula, kept for reproduction alone."""
    whole_metrics, whole = run(RELEASED)
    cut_metrics, cut = run(RELEASED, micro=2)
    assert cut.losses[0] == pytest.approx(whole.losses[0], abs=1e-6)  # lambda is 0 at first
    for update, other in zip(cut_metrics[1:], whole_metrics[1:], strict=True):
        assert abs(update["lambda/mtp_1"] - other["lambda/mtp_1"]) > 1e-3
    assert abs(cut.losses[1] - whole.losses[1]) > 1e-4
