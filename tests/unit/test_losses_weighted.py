"""Bounded policy losses of the MTP heads: gradients by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_occ.losses import clipped_policy_loss
from megatron_occ.losses.weighted import weighted_policy_loss

OLD = torch.tensor([[math.log(0.5), math.log(0.001), math.log(0.2)], [math.log(0.9)] * 3])
NEW = torch.tensor([[math.log(0.25), math.log(0.8), math.nan], [math.log(0.45), 0.0, 0.0]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])
ADVANTAGES = torch.tensor([-2.0, 1.0])


def gradient(ratio_cap, aggregation="token", normalizer=1.0, **more):
    new = NEW.clone().requires_grad_()
    loss = weighted_policy_loss(
        new, OLD, ADVANTAGES, MASK, ratio_cap=ratio_cap, aggregation=aggregation,
        normalizer=normalizer, **more,
    )  # fmt: skip
    loss.backward()
    return new.grad


def test_unit_weights_give_minus_the_advantage():
    assert gradient(None, normalizer=2.0).tolist() == [[1.0, 1.0, 0.0], [-0.5, 0.0, 0.0]]


def test_the_ratio_is_cut_and_carries_no_gradient():
    # ratios 0.5, 800 and 0.5: the second is what a clipped loss has no bound for
    found = gradient(1.0)
    torch.testing.assert_close(found, torch.tensor([[1.0, 2.0, 0.0], [-0.5, 0.0, 0.0]]))
    wider = gradient(3.0)
    torch.testing.assert_close(wider, torch.tensor([[1.0, 6.0, 0.0], [-0.5, 0.0, 0.0]]))


def test_the_clipped_loss_has_a_gradient_of_hundreds_there_and_a_dual_clip_cuts_it_off():
    def clipped(dual_clip):
        new = NEW.clone().requires_grad_()
        clipped_policy_loss(new, OLD, ADVANTAGES, MASK, dual_clip=dual_clip, normalizer=1.0)[
            0
        ].backward()
        return new.grad[0, 1].item()

    assert clipped(None) == pytest.approx(2 * 800, rel=1e-4)
    assert clipped(10.0) == 0.0


@pytest.mark.parametrize("aggregation", ["sequence", "gspo"])
def test_sequences_average_over_their_own_tokens(aggregation):
    found = gradient(None, aggregation, normalizer=2.0)
    assert found.tolist() == [[0.5, 0.5, 0.0], [-0.5, 0.0, 0.0]]


def test_importance_weights_multiply():
    weights = torch.tensor([[0.5, 1.0, math.nan], [2.0, 1.0, 1.0]])
    found = gradient(None, importance_weights=weights)
    assert found.tolist() == [[1.0, 2.0, 0.0], [-2.0, 0.0, 0.0]]


def test_gspo_clips_every_response_of_negative_advantage_and_bounded_weights_none():
    # log-ratio -0.5 a token, far below the clip range of GSPO: one-sided
    old = torch.full((2, 4), -1.0)
    mask = torch.ones(2, 4)
    advantages = torch.tensor([1.0, -1.0])

    def rows(loss):
        new = (old - 0.5).requires_grad_()
        loss(new).backward()
        return new.grad.abs().sum(1)

    ppo = rows(
        lambda new: clipped_policy_loss(
            new, old, advantages, mask, clip_low=3e-4, clip_high=4e-4, dual_clip=10.0,
            aggregation="gspo", normalizer=2.0,
        )[0]
    )  # fmt: skip
    assert ppo[0] > 0 and ppo[1] == 0
    bounded = rows(
        lambda new: weighted_policy_loss(
            new, old, advantages, mask, ratio_cap=1.0, aggregation="gspo", normalizer=2.0
        )
    )
    assert bounded[0] == pytest.approx(bounded[1].item()) and bounded[0] > 0


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="ratio_cap is 0"):
        gradient(0)
    with pytest.raises(ValueError, match="aggregation is 'mean'"):
        gradient(None, "mean")
