"""Numbers that are not finite, and other failures: an event each, and the run goes on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.unit.fakes import FakeActor
from tests.unit.rl_setup import OPEN, four_updates, make_trainer, mini_batches, rl_config, weights


def broken_depth_1(outputs, target, forward_only):
    """NaN log-probs and gradients of MTP depth 1."""
    passes = tuple(torch.cat((p[:1] * torch.nan, p[1:])) for p in outputs.passes)
    return replace(outputs, passes=passes)


def broken_depth_1_in_forward_passes(outputs, target, forward_only):
    return broken_depth_1(outputs, target, forward_only) if forward_only else outputs


def not_a_number_outside_the_responses(outputs, target, forward_only):
    passes = tuple(torch.where(target.mask[1:] > 0, p, torch.nan) for p in outputs.passes)
    return replace(outputs, passes=passes)


def impossible_for_the_depths(outputs, target, forward_only):
    passes = tuple(torch.where(target.mask[1:] > 0, -torch.inf, p) for p in outputs.passes)
    return replace(outputs, passes=passes)


def untouched(outputs, target, forward_only):
    return outputs


def test_a_lambda_that_is_not_finite_is_an_event_and_the_next_update_uses_zero():
    trainer, actor = four_updates("mtp.preset=occ", OPEN)
    minis, updater = mini_batches(trainer), trainer.updater
    assert [updater.run_update(mini).events for mini in minis[:2]] == [[], []]
    before = weights(actor)
    actor.spoil = broken_depth_1
    calibration, update = updater.run_update(minis[2]).events
    assert calibration.startswith("lambda[1] not finite")
    assert calibration.endswith("using 0")
    assert update == "gradient not finite: update skipped"
    for name, value in weights(actor).items():
        assert torch.equal(value, before[name]), name

    actor.spoil = untouched
    update = updater.run_update(minis[3])
    assert update.metrics["lambda/mtp_1"] == 0.0
    assert update.metrics["lambda/mtp_2"] != 0.0  # the other depth keeps its own
    assert update.events == []
    assert any(not torch.equal(value, before[name]) for name, value in weights(actor).items())
    assert updater.coefficients.before_update(None)[0] != 0  # and comes back


def test_current_statistics_that_are_not_finite_give_an_update_with_lambda_zero():
    trainer, actor = four_updates("mtp.preset=occ", "mtp.trunk.statistics=current", OPEN)
    plain, reference = four_updates("mtp.preset=none")
    plain.updater.run_update(mini_batches(plain)[0])
    minis = mini_batches(trainer)
    actor.spoil = broken_depth_1_in_forward_passes
    updates = [trainer.updater.run_update(mini) for mini in minis[:2]]
    assert [update.metrics["lambda/mtp_1"] for update in updates] == [0.0, 0.0]
    assert [update.metrics["lambda/mtp_2"] for update in updates] != [0.0, 0.0]
    for update in updates:
        (event,) = update.events
        assert "lambda[1] not finite" in event
    # nothing of depth 1, the first update has nothing of depth 2 either
    assert actor.losses[0] == pytest.approx(reference.losses[0], abs=1e-7)


@pytest.mark.parametrize("estimator", ["logprob", "released"])
def test_numbers_outside_the_responses_do_not_reach_lambda_or_loss(estimator):
    """Weak point 2 of the released code, at its worst."""
    preset = "occ" if estimator == "released" else "occ_decoupled"
    settings = (f"mtp.preset={preset}", f"mtp.trunk.estimator={estimator}", OPEN)
    clean, expected = four_updates(*settings)
    dirty, actor = four_updates(*settings)
    actor.spoil = not_a_number_outside_the_responses
    for mini, same in zip(mini_batches(clean), mini_batches(dirty), strict=True):
        update = dirty.updater.run_update(same)
        assert update == clean.updater.run_update(mini)
        assert update.events == []
    assert actor.losses == expected.losses


def test_a_released_lambda_that_is_not_finite_is_an_event_and_acts_as_zero():
    """Tokens that the depths call impossible: infinity over infinity, where the loss is finite."""
    trainer, actor = four_updates("mtp.preset=occ", "mtp.trunk.estimator=released", OPEN)
    plain, reference = four_updates("mtp.preset=none")
    minis, same = mini_batches(trainer), mini_batches(plain)
    assert trainer.updater.run_update(minis[0]).events == []
    plain.updater.run_update(same[0])

    actor.model.load_state_dict(weights(reference))
    actor.spoil = impossible_for_the_depths
    update = trainer.updater.run_update(minis[1])
    plain.updater.run_update(same[1])
    assert update.events == ["released lambda not finite in a micro-batch: using 0"]
    assert (update.metrics["lambda/mtp_1"], update.metrics["lambda/mtp_2"]) == (0.0, 0.0)
    assert "calibration/non_finite" not in update.metrics
    assert actor.losses[1] == pytest.approx(reference.losses[1], abs=1e-12)
    for name, value in weights(reference).items():
        torch.testing.assert_close(weights(actor)[name], value, atol=1e-12, rtol=0)


def test_a_skipped_update_is_an_event_and_the_run_goes_on():
    trainer, actor = four_updates("mtp.preset=policy", "rl.steps=2")
    updates = {"count": 0}

    def spoil(outputs, target, forward_only):
        updates["count"] += 1
        if updates["count"] != 1:
            return outputs
        return replace(outputs, logprobs=outputs.logprobs * torch.nan)

    actor.spoil = spoil
    trainer.fit()
    assert trainer.recorder.events == [(1, "gradient not finite: update skipped")]
    assert trainer.step == 2
    assert all(torch.isfinite(value).all() for value in weights(actor).values())


def test_events_of_rollouts_are_logged_with_their_step():
    config = rl_config("rl.steps=1", "rl.dynamic_sampling.enabled=true")
    trainer = make_trainer(config, FakeActor(), score=lambda response, answer: 0.0)
    trainer.fit()
    ((step, message),) = trainer.recorder.events
    assert step == 1
    assert "4 groups without spread" in message
