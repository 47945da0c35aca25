"""The loop: what is called when, what is logged, and exact continuation."""

from __future__ import annotations

import pytest
import torch

from megatron_occ.rl.evaluation import Validation
from megatron_occ.rl.rewards import VerifierPool, pool
from tests.unit.fakes import FakeActor
from tests.unit.rl_setup import (
    OPEN,
    PRESETS,
    LetterTask,
    four_updates,
    make_trainer,
    mini_batches,
    rl_config,
    run_updates,
    weights,
)


def without_clocks(metrics):
    return {k: v for k, v in metrics.items() if not k.startswith("time/") and "second" not in k}


# --- the loop ---------------------------------------------------------------------------------


def test_fit_validates_logs_and_saves_when_it_should():
    saved = []
    trainer, _ = four_updates(
        "rl.steps=5",
        "rl.validation.every=2",
        "rl.save_every=3",
        save=lambda step: saved.append(step),
    )
    trainer.fit()
    lines = [(phase, step) for phase, step, _ in trainer.recorder.lines]
    assert [step for phase, step in lines if phase == "rl"] == [1, 2, 3, 4, 5]
    assert lines[0] == ("validation", 0)
    assert [step for phase, step in lines if phase == "validation"] == [0, 2, 4, 5]
    assert lines.index(("validation", 2)) == lines.index(("rl", 2)) + 1
    assert saved == [3, 5]
    assert [step for step, _ in trainer.recorder.samples] == [1, 2, 3, 4, 5]
    assert trainer.step == trainer.rollouts.position == 5


def test_validation_only_before_and_after():
    trainer, _ = four_updates("rl.steps=3", "rl.validation.every=0")
    trainer.fit()
    steps = [step for phase, step, _ in trainer.recorder.lines if phase == "validation"]
    assert steps == [0, 3]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_step_logs_the_same_numbers(preset):
    trainer, _ = four_updates(f"mtp.preset={preset}", "rl.steps=2")
    trainer.fit()
    first, second = (metrics for phase, _, metrics in trainer.recorder.lines if phase == "rl")
    assert without_clocks(first).keys() == without_clocks(second).keys()
    wanted = "loss/policy entropy ratio/mean clip_fraction/low clip_fraction/high approx_kl lr "
    if preset != "none":  # its MTP block takes no part
        wanted += "loss/mtp_1 loss/mtp_2 agreement/mtp_1 agreement/mtp_2 lambda/mtp_1 lambda/mtp_2 "
        wanted += "calibration/cross_2 calibration/norm_squared_2 "
    wanted += "grad_norm/trunk grad_norm/head "
    wanted += "logprob_gap/mean logprob_gap/max reward/mean rollout/accuracy rollout/length_mean "
    wanted += "rollout/tokens_per_second time/rollout time/train time/logprobs time/reward "
    wanted += "verifier/errors verifier/timeouts time/step"
    assert not set(wanted.split()) - first.keys()
    assert all(isinstance(value, float) for value in first.values())
    if preset != "occ":  # its head is trained where lambda is above 0
        assert (first["grad_norm/head"] > 0) == (preset != "none")


def test_without_mtp_layers_nothing_of_mtp_is_logged():
    trainer, actor = four_updates("mtp.num_layers=0", "mtp.preset=none")
    actor.num_depths = 0
    metrics = trainer.run_step()
    assert not [name for name in metrics if "mtp" in name or "calibration" in name]
    assert metrics["grad_norm/trunk"] > 0
    assert metrics["grad_norm/head"] == 0


def test_step_metrics_are_means_over_the_updates():
    trainer, _ = four_updates("mtp.preset=policy")
    update, made = trainer.updater.run_update, []
    trainer.updater.run_update = lambda *given: made.append(update(*given)) or made[-1]
    metrics = trainer.run_step()
    assert len(made) == 4
    updates = [update.metrics for update in made]
    for name in ("loss/policy", "entropy", "lambda/mtp_1", "grad_norm/trunk", "approx_kl"):
        assert metrics[name] == pytest.approx(sum(u[name] for u in updates) / 4), name
    assert len({u["loss/policy"] for u in updates}) == 4


def test_rollout_and_training_forward_agree_at_any_temperature():
    trainer, _ = four_updates("rl.rollout.temperature=0.7")
    metrics = trainer.run_step()
    assert 0 < metrics["logprob_gap/max"] < 1e-6  # rollout log-probs are kept in fp32
    update = run_updates(trainer)[0]
    assert update["ratio/mean"] == pytest.approx(1.0, abs=1e-12)
    assert update["approx_kl"] == pytest.approx(0.0, abs=1e-12)
    minis = mini_batches(trainer)
    wrong = [mini.with_logprobs(mini.rows.old_logprobs + 0.25, None) for mini in minis]
    gap = trainer.updater.logprob_gap(wrong)
    assert gap["logprob_gap/mean"] == pytest.approx(0.25, abs=1e-6)


def test_the_reference_policy_is_asked_only_if_it_is_used():
    trainer, actor = four_updates("rl.loss.kl_coefficient=0.1")
    metrics = trainer.run_step()
    assert metrics["loss/kl"] > 0
    for mini in mini_batches(trainer):
        assert not torch.equal(mini.rows.ref_logprobs, mini.rows.old_logprobs)

    trainer, actor = four_updates()
    actor.get_init_policy_logprobs = None  # calling it would raise
    assert "loss/kl" not in trainer.run_step()


def test_the_reference_policy_is_renewed_every_so_many_steps():
    config = ("rl.loss.kl_coefficient=0.1", "rl.loss.kl_reference_every=2", "rl.steps=6")
    trainer, actor = four_updates(*config)
    actor.keep_reference()

    def present(model):
        return {name: value.clone() for name, value in model.state_dict().items()}

    expected = present(actor.model)
    for trainer.step in range(5):
        if trainer.step in (2, 4):
            expected = present(actor.model)
        trainer.run_step()
        found = present(actor.reference)
        assert all(value.equal(expected[name]) for name, value in found.items())
        assert not all(value.equal(expected[name]) for name, value in weights(actor).items())


def test_training_raises_the_reward():
    """The sign of everything: advantages, ratio, loss, update."""
    config = rl_config("mtp.preset=occ_decoupled", "rl.samples_per_prompt=8", "rl.steps=20")
    actor = FakeActor(seed=0, lr=1.0)
    trainer = make_trainer(config, actor)
    trainer.fit()
    lines = [metrics for phase, _, metrics in trainer.recorder.lines if phase == "rl"]
    accuracy = [metrics["rollout/accuracy"] for metrics in lines]
    assert sum(accuracy[:3]) / 3 < 0.7
    assert sum(accuracy[-3:]) / 3 > 0.9
    assert lines[-1]["loss/mtp_1"] < lines[0]["loss/mtp_1"] - 0.1  # the drafter follows


def test_a_failing_verifier_does_not_stop_the_run(monkeypatch):
    """The real pool: responses of more than three characters are refused, and told."""
    monkeypatch.setattr(pool, "MAX_RESPONSE_CHARS", 3)
    monkeypatch.setattr(LetterTask, "name", "exact")
    config = rl_config("rl.steps=1", "rl.rollout.log_samples=16")
    with VerifierPool() as verifiers:
        trainer = make_trainer(config, FakeActor(seed=2), verifiers)
        trainer.fit()
    ((_, samples),) = trainer.recorder.samples
    refused = [len(sample["response"]) > 3 for sample in samples]
    assert len(refused) == 16
    assert 0 < sum(refused) < 16
    ((_, _, metrics),) = (line for line in trainer.recorder.lines if line[0] == "rl")
    assert (metrics["verifier/errors"], metrics["verifier/timeouts"]) == (sum(refused), 0.0)
    ((step, event),) = trainer.recorder.events
    assert step == 1
    assert event.startswith(f"{sum(refused)} of 16 responses scored 0")
    longer = next(sample for sample in samples if len(sample["response"]) > 3)
    reason = f"response has {len(longer['response'])} characters, the limit is 3"
    assert longer["verifier_failure"] == reason
    assert event.endswith(f"verifier 'exact': {reason}")
    assert [("verifier_failure" in sample) for sample in samples] == refused


def test_events_of_a_validation_are_logged_with_its_step():
    trainer, _ = four_updates("rl.steps=1", validate=lambda: Validation({"pass@1": 0.5}, ["bad"]))
    trainer.fit()
    assert trainer.recorder.events == [(0, "bad"), (1, "bad")]


# --- continuation -----------------------------------------------------------------------------


@pytest.mark.parametrize(("statistics", "cut"), [("previous", 1), ("previous", 3), ("current", 2)])
def test_a_restored_run_continues_exactly(statistics, cut):
    overrides = (
        "mtp.preset=occ_decoupled",
        "mtp.trunk.ema=0.5",
        f"mtp.trunk.statistics={statistics}",
        OPEN,
        "rl.steps=4",
        "rl.validation.every=0",
    )
    straight, whole = four_updates(*overrides)
    straight.fit()

    states = {}
    trainer, actor = four_updates(
        *overrides,
        "rl.save_every=1",
        save=lambda step: states.update({step: (trainer.state_dict(), weights(actor))}),
    )
    trainer.fit()
    state, saved = states[cut]

    resumed, fresh = four_updates(*overrides)
    fresh.model.load_state_dict(saved)
    resumed.load_state_dict(state)
    resumed.fit()
    expected = [line for line in straight.recorder.lines if line[1] > cut]
    assert [line[:2] for line in resumed.recorder.lines] == [line[:2] for line in expected]
    for (_, _, got), (_, _, reference) in zip(resumed.recorder.lines, expected, strict=True):
        assert without_clocks(got) == without_clocks(reference)
    assert expected[0][2]["lambda/mtp_1"] != 0
    for name, value in weights(whole).items():
        assert torch.equal(weights(fresh)[name], value), name


def test_the_calibration_state_matters():
    """Without it the first mini-batch after a restart would use another lambda."""
    trainer, _ = four_updates("mtp.preset=occ", OPEN, "rl.steps=1")
    trainer.fit()
    held = trainer.updater.coefficients.before_update(None).tolist()
    assert all(value != 0 for value in held)
    other, _ = four_updates("mtp.preset=occ", OPEN)
    assert other.updater.coefficients.before_update(None).tolist() == [0.0, 0.0]
    other.load_state_dict(trainer.state_dict())
    assert other.updater.coefficients.before_update(None).tolist() == held
    assert (other.step, other.rollouts.position) == (1, 1)
