"""Updates on the real model: independent of the cut into micro-batches, on every update."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from megatron_occ.config import load_config
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.cpu.backend import apply_cpu_backend
from megatron_occ.rl.batch import MiniBatch, RolloutBatch
from megatron_occ.rl.calibration import regime_from
from megatron_occ.rl.update import PolicyUpdater
from tests.mcore.conftest import (
    VOCABULARY,
    assert_same_up_to_rounding,
    random_ids,
    small_config,
)

PRESETS = ["none", "detach", "ce", "policy", "occ", "occ_decoupled"]


def rl_config(preset, micro_batch_size, *more):
    chosen = load_config([], [f"mtp.preset={preset}", *more])
    config = small_config(depths=2)
    config.mtp.trunk, config.mtp.head = chosen.mtp.trunk, chosen.mtp.head
    config.rl = chosen.rl
    config.rl.mini_batches = 2
    config.rl.micro_batch_size = micro_batch_size
    config.rl.optimizer.lr = 1e-2
    return config


def actor_and_updater(layout, config):
    torch.manual_seed(0)
    actor = MegatronGPTActor(
        config,
        VOCABULARY,
        layout,
        optimizer=config.rl.optimizer,
        total_updates=10,
        train_head=regime_from(config.mtp).trains_head,
        balance_loss=config.rl.balance_loss,
    )
    return actor, PolicyUpdater(config, actor)


def rollout_batch(rows=8):
    ids = random_ids(rows, 14)
    mask = torch.zeros(ids.shape)
    for row in range(rows):
        mask[row, 3 : 14 - row % 5] = 1.0
    advantages = torch.linspace(-1.5, 1.0, rows)
    return RolloutBatch(ids, mask, torch.zeros(ids.shape), advantages)


def mini_batch(updater):
    """Four sequences, cut as the configuration says, with log-probs of the current policy."""
    batch = rollout_batch().rows(0, 4)
    size = updater.config.rl.micro_batch_size
    return updater.compute_logprobs([MiniBatch.padded(batch, size)])[0]


def gradients_of(actor):
    return {
        name: p.main_grad.clone()
        for name, p in actor.chunks[0].named_parameters()
        if p.requires_grad
    }


def factor_of_rounding(name, metrics):
    """What an error of a log-prob is multiplied by in a metric.

    ``cross`` is <d_RL, d_k>. In a first update d_RL is 0, or the rounding of log-probs of size 6:
    with their errors independent, that of the product grows with the norm of d_k.
    """
    if not name.startswith("calibration/cross_"):
        return 1.0
    return math.sqrt(metrics[name.replace("cross", "norm_squared")])


@pytest.mark.parametrize("statistics", ["previous", "current"])
@pytest.mark.parametrize("preset", PRESETS)
def test_loss_gradients_and_lambda_do_not_depend_on_the_cut(layout, preset, statistics):
    overrides = ("mtp.trunk.clamp=[null,null]", f"mtp.trunk.statistics={statistics}")
    actor, updater = actor_and_updater(layout, rl_config(preset, 4, *overrides))
    batch = rollout_batch()
    halves = [MiniBatch.padded(batch.rows(start, start + 4), 4) for start in (0, 4)]
    halves = updater.compute_logprobs(halves)
    expected = []
    for mini in halves * 2:
        weights = copy.deepcopy(actor.chunks[0].state_dict())
        metrics = updater.run_update(mini).metrics
        expected.append((mini.rows, weights, metrics, gradients_of(actor)))

    for micro_batch_size in (2, 1):
        actor, updater = actor_and_updater(layout, rl_config(preset, micro_batch_size, *overrides))
        for rows, weights, whole_metrics, whole_gradients in expected:
            # Adam amplifies rounding: every update starts from the same weights
            actor.chunks[0].load_state_dict(weights)
            metrics = updater.run_update(MiniBatch.padded(rows, micro_batch_size)).metrics
            assert metrics.keys() == whole_metrics.keys()
            for name, value in whole_metrics.items():
                bound = 1e-6 * factor_of_rounding(name, whole_metrics)
                assert metrics[name] == pytest.approx(value, abs=bound, rel=1e-6), name
            for name, gradient in gradients_of(actor).items():
                difference = (gradient - whole_gradients[name]).abs().max()
                assert difference <= 1e-6 * whole_gradients[name].abs().max().clamp(min=1), name
    if preset.startswith("occ"):
        used = [metrics["lambda/mtp_1"] for _, _, metrics, _ in expected]
        assert used[0] == 0.0
        assert any(value != 0.0 for value in used)


@pytest.mark.parametrize("sizes", [[4], [1, 3], [2, 1, 1]])
@pytest.mark.parametrize("preset", ["ce", "occ_decoupled"])
def test_packed_micro_batches_update_as_padded_ones(layout, preset, sizes):
    results = []
    for packed in (False, True):
        actor, updater = actor_and_updater(layout, rl_config(preset, 4))
        rows = rollout_batch().rows(0, 4)
        lengths = rows.lengths().tolist()
        assert len(set(lengths)) == 4
        mini = MiniBatch(rows, sizes if packed else [4], lengths if packed else None)
        # old log-probs of a policy that was elsewhere, or the ratios would all be 1
        (mini,) = updater.compute_logprobs([mini])
        inside = torch.arange(rows.ids.size(1)) < torch.tensor(lengths).unsqueeze(1)
        old = torch.where(inside, mini.rows.old_logprobs, 0.0)
        moved = mini.with_logprobs(old + 0.1 * rows.ids.cos(), None)
        metrics = updater.run_update(moved).metrics
        results.append((old * rows.response_mask.roll(-1, 1), metrics, gradients_of(actor)))
    (old, metrics, gradients), (packed_old, packed_metrics, packed_gradients) = results
    assert_same_up_to_rounding(packed_old, old)
    for name, value in metrics.items():
        assert packed_metrics[name] == pytest.approx(value, abs=1e-6, rel=1e-5), name
    for name, gradient in gradients.items():
        difference = (packed_gradients[name] - gradient).abs().max()
        assert difference <= 1e-5 * gradient.abs().max(), name


def test_the_released_lambda_of_packed_rows_is_that_of_padded_ones(layout):
    found = []
    for packed in (False, True):
        overrides = ("mtp.trunk.estimator=released", "mtp.trunk.clamp=[null,null]")
        _, updater = actor_and_updater(layout, rl_config("occ", 4, *overrides))
        rows = rollout_batch().rows(0, 4)
        mini = MiniBatch(rows, [4], rows.lengths().tolist() if packed else None)
        old = rows.response_mask * (0.1 * rows.ids.cos() - 4.0)
        metrics = updater.run_update(mini.with_logprobs(old, None)).metrics
        found.append([metrics[f"lambda/mtp_{k}"] for k in (1, 2)])
    padded, in_one_row = found
    assert min(map(abs, padded)) > 1e-2
    assert in_one_row == pytest.approx(padded, rel=1e-4)


def test_the_second_update_uses_its_own_gradients_alone(layout):
    """p.grad aliases the buffer after an update; left there, the next backward counts twice."""
    config = rl_config("ce", 2)
    actor, updater = actor_and_updater(layout, config)
    mini = mini_batch(updater)
    updater.run_update(mini)
    weights = copy.deepcopy(actor.chunks[0].state_dict())
    updater.run_update(mini)
    second = gradients_of(actor)

    fresh, fresh_updater = actor_and_updater(layout, config)
    fresh.chunks[0].load_state_dict(weights)
    fresh_updater.run_update(mini)
    for name, gradient in gradients_of(fresh).items():
        torch.testing.assert_close(second[name], gradient, atol=1e-7, rtol=1e-6)


def test_the_head_is_clipped_on_its_own(layout):
    """A large head gradient must not shrink the trunk's update."""
    updates = {}
    for head_weight in (0.1, 1e4):
        config = rl_config("detach", 4, f"mtp.head.weight={head_weight}")
        config.rl.loss.clip_high = 0.28
        actor, updater = actor_and_updater(layout, config)
        # SGD shows the size of a gradient, which Adam would hide
        inner = actor.optimizer.megatron
        mini, seen = mini_batch(updater), {}
        inner.step_with_ready_grads = lambda inner=inner, seen=seen: seen.update(
            {id(p): p.grad.clone() for p in inner.get_parameters()}
        )
        metrics = updater.run_update(mini).metrics
        names = {id(p): name for name, p in actor.chunks[0].named_parameters()}
        updates[head_weight] = {names[key]: grad for key, grad in seen.items()}, metrics
    small, large = updates[0.1], updates[1e4]
    assert large[1]["grad_norm/head"] > 1.0 > small[1]["grad_norm/head"]
    head = [g for n, g in large[0].items() if n.startswith("mtp.")]
    norm = torch.stack([g.square().sum() for g in head]).sum().sqrt()
    assert float(norm) == pytest.approx(1.0, abs=1e-4)
    for name, gradient in small[0].items():
        if not name.startswith("mtp."):
            assert torch.equal(large[0][name], gradient), name


def test_entropies_of_the_old_policy_are_those_of_the_first_update(layout):
    actor, updater = actor_and_updater(layout, rl_config("detach", 4))
    mini = mini_batch(updater)
    ids, mask = mini.rows.ids, mini.rows.response_mask[:, 1:]
    arguments = {"parts": [range(len(ids))], "lengths": None, "temperature": 1.0}
    logprobs, entropies = actor.get_inference_log_probs(ids, **arguments, entropies=True)
    assert torch.equal(logprobs, actor.get_inference_log_probs(ids, **arguments))
    expected = float((entropies[:, :-1] * mask).sum() / mask.sum())
    assert updater.run_update(mini).metrics["entropy"] == pytest.approx(expected, rel=1e-5)


def test_the_reference_policy_stays_while_the_policy_moves(layout):
    config = rl_config("ce", 4, "rl.loss.kl_coefficient=0.5")
    actor, updater = actor_and_updater(layout, config)
    actor.keep_reference()
    ids = random_ids(4, 14)
    arguments = {"parts": [range(4)], "lengths": None, "temperature": 1.0}
    before = actor.get_inference_log_probs(ids, **arguments)
    first = updater.run_update(mini_batch(updater)).metrics
    second = updater.run_update(mini_batch(updater)).metrics
    assert first["loss/kl"] == pytest.approx(0.0, abs=1e-9)
    assert second["loss/kl"] > 1e-6
    assert torch.equal(actor.get_init_policy_logprobs(ids, **arguments), before)
    assert not torch.allclose(actor.get_inference_log_probs(ids, **arguments), before, atol=1e-4)


@pytest.mark.parametrize("trunk", ["none", "policy"])
def test_a_frozen_head_gets_no_update_and_no_weight_decay(layout, trunk):
    config = rl_config("none", 4)
    config.mtp.trunk.signal = trunk
    config.rl.optimizer.weight_decay = 0.5
    actor, updater = actor_and_updater(layout, config)
    head = {n: p.clone() for n, p in actor.chunks[0].mtp.named_parameters()}
    updater.run_update(mini_batch(updater))
    for name, parameter in actor.chunks[0].mtp.named_parameters():
        assert torch.equal(parameter, head[name]), name


@pytest.mark.parametrize("preset", ["none", "detach"])
def test_a_step_without_advantages_leaves_the_trunk_as_it_is(layout, preset):
    """Neither weight decay nor the moments of the first update move it; the third one is usual."""
    config = rl_config(preset, 4)
    config.rl.optimizer.weight_decay = 0.5
    actor, updater = actor_and_updater(layout, config)
    mini = mini_batch(updater)
    nothing = replace(mini, rows=replace(mini.rows, advantages=0.0 * mini.rows.advantages))
    seen = []
    for given in (mini, nothing, mini):
        metrics = updater.run_update(given).metrics
        weights = {n: p.clone() for n, p in actor.chunks[0].named_parameters()}
        seen.append((metrics["grad_norm/trunk"], weights))
    (first, before), (norm, held), (last, after) = seen
    assert min(first, last) > 0 == norm
    for name, weight in held.items():
        is_still = not name.startswith("mtp.") or preset == "none"
        assert torch.equal(weight, before[name]) is is_still, name
        if not name.startswith("mtp."):
            assert not torch.equal(weight, after[name]), name


def test_non_finite_gradients_skip_the_update(layout):
    config = rl_config("ce", 4)
    actor, _ = actor_and_updater(layout, config)
    before = {n: p.clone() for n, p in actor.chunks[0].named_parameters()}
    next(iter(actor.chunks[0].parameters())).main_grad.fill_(float("nan"))
    assert actor.finish_training_step().skipped
    for name, parameter in actor.chunks[0].named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_the_cpu_back_end_is_applied_once_and_answers_megatrons_calls(layout):
    zeros = torch.zeros
    assert apply_cpu_backend()
    assert torch.zeros is zeros
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.tensor([1.0], device=torch.cuda.current_device()).device.type == "cpu"
