"""``rl.old_logprobs=rollout``: the same updates without a forward pass for old log-probs."""

from __future__ import annotations

import pytest
import torch

from megatron_occ.config import ConfigError, validate
from tests.unit.fake_layouts import run_ranks
from tests.unit.fakes import FakeActor
from tests.unit.rl_setup import OPEN, PRESETS, make_trainer, rl_config, varied

ROLLOUT = "rl.old_logprobs=rollout"
PACKED = "rl.micro_batch_tokens=40"


def two_steps(*overrides):
    """Metrics of two steps, and the actor after them."""
    actor = FakeActor(seed=2)
    trainer = make_trainer(rl_config(*overrides), actor, varied)
    calls, compute = [], actor.get_inference_log_probs
    actor.get_inference_log_probs = lambda *a, **k: calls.append(1) or compute(*a, **k)
    lines = [trainer.run_step(), trainer.run_step()]
    return lines, actor, len(calls)


@pytest.mark.parametrize("cut", ["rl.micro_batch_size=3", PACKED])
@pytest.mark.parametrize("extra", [(), ("rl.loss.kl_coefficient=0.1",)], ids=["", "kl"])
@pytest.mark.parametrize("preset", PRESETS)
def test_updates_are_those_with_log_probs_of_training(preset, extra, cut):
    settings = (f"mtp.preset={preset}", OPEN, cut, *extra)
    theirs, expected, passes = two_steps(*settings)
    lines, actor, own_passes = two_steps(*settings, ROLLOUT)
    assert (passes, own_passes) == (2, 0)
    for left, right in zip(expected.gradients, actor.gradients, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            torch.testing.assert_close(left[name], right[name], atol=1e-6, rtol=1e-5)
    for left, right in zip(theirs, lines, strict=True):
        assert left.keys() == right.keys()
        assert 0 < left["logprob_gap/mean"] <= left["logprob_gap/max"] < 1e-6
        assert 0 < right["logprob_gap/mean"] <= right["logprob_gap/max"] < 1e-6


def test_the_gap_is_that_of_the_first_update_alone():
    """Later updates have moved weights: against them the difference is no mismatch."""
    actor = FakeActor(seed=2)
    trainer = make_trainer(rl_config("mtp.preset=none", ROLLOUT), actor, varied)
    generate, lengths = actor.generate, []

    def shifted(requests, sampling):
        found = generate(requests, sampling)
        found.logprobs[:] = [[value - 0.25 for value in row] for row in found.logprobs]
        found.logprobs[1][0] -= 0.5  # of the first mini-batch
        lengths.extend(map(len, found.tokens))
        return found

    actor.generate = shifted
    gap = trainer.run_step()
    first = sum(lengths[: len(lengths) // 2])
    assert gap["logprob_gap/max"] == pytest.approx(0.75, abs=1e-6)
    assert gap["logprob_gap/mean"] == pytest.approx(0.25 + 0.5 / first, abs=1e-6)


def test_two_ranks_report_the_gap_of_one():
    def step(layout):
        config = rl_config("mtp.preset=none", ROLLOUT)
        metrics = make_trainer(config, FakeActor(seed=2, layout=layout), varied).run_step()
        return [metrics[f"logprob_gap/{name}"] for name in ("mean", "max")]

    (alone,) = run_ranks(1, step)
    for gap in run_ranks(2, step):
        assert gap == pytest.approx(alone, rel=1e-6)


def test_importance_weights_need_log_probs_of_training():
    config = rl_config("data.task.name=arithmetic", "rl.correction.weights=token", ROLLOUT)
    with pytest.raises(ConfigError) as caught:
        validate(config, command="rl")
    (problem,) = [line for line in str(caught.value).splitlines() if "old_logprobs" in line]
    parts = ("rl.correction.weights=token", "rl.old_logprobs=rollout", "old_logprobs=training")
    assert all(part in problem for part in parts)


def test_the_released_lambda_does_too_with_log_probs_of_the_rollout():
    """It reads response tokens alone, and those the rollout has."""
    settings = ("mtp.preset=occ", "mtp.trunk.estimator=released", OPEN)
    validate(rl_config(*settings, ROLLOUT), command="rl")
    (theirs, _, _), (lines, _, _) = two_steps(*settings), two_steps(*settings, ROLLOUT)
    for left, right in zip(theirs, lines, strict=True):
        assert abs(left["lambda/mtp_1"]) > 1e-3
        assert right["lambda/mtp_1"] == pytest.approx(left["lambda/mtp_1"], rel=1e-3)
