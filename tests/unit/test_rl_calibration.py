"""Loss and lambda of whole updates against plain Python, from the tokens' log-probs alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from megatron_occ.rl.calibration import CoefficientTracker, regime_from
from tests.unit.fakes import FakeActor
from tests.unit.rl_setup import (
    OPEN,
    PRESETS,
    four_updates,
    make_trainer,
    mini_batches,
    rl_config,
    run_updates,
    varied,
)

OCC = ("mtp.preset=occ", OPEN)
RELEASED = (*OCC, "mtp.trunk.estimator=released")


@dataclass
class Token:
    """A response token as one head sees it; log-probs of the main head but for ``mine``."""

    advantage: float
    now: float
    old: float
    mine: float
    sampled: float = 0.0


def per_token(actor, batch, temperature=1.0):
    """Every response token that a head predicts, one list for each depth, main head first."""
    passes = ((False, False),)
    with torch.no_grad():
        outputs = actor.outputs(
            actor.micro_batch(batch.ids, None, passes=passes, temperature=temperature)
        )
    heads = [outputs.logprobs, *outputs.passes[0]]
    result = []
    for depth, head in enumerate(heads):
        tokens = []
        for row in range(len(batch)):
            for t in range(depth + 1, batch.ids.size(1)):  # t: the token
                if batch.response_mask[row, t]:
                    values = (
                        batch.advantages[row],
                        outputs.logprobs[row, t - 1],
                        batch.old_logprobs[row, t - 1],
                        head[row, t - 1 - depth],
                        batch.rollout_logprobs[row, t],
                    )
                    tokens.append(Token(*map(float, values)))
        result.append(tokens)
    return result


def inner_products(tokens):
    """<l - o, m - o> and |m - o|^2"""
    cross = sum((t.now - t.old) * (t.mine - t.old) for t in tokens)
    return cross, sum((t.mine - t.old) ** 2 for t in tokens)


def formula(tokens, lambda_plus=1.0):
    cross, norm = inner_products(tokens)
    return lambda_plus * cross / (norm + 1e-8)


def clipped(tokens, cap=None):
    """Mean over tokens of -w min(A r, A clip(r, 0.8, 1.28)), w = min(exp(o - sampled), cap)."""
    terms = []
    for t in tokens:
        ratio = math.exp(t.mine - t.old)
        gain = min(t.advantage * ratio, t.advantage * min(max(ratio, 0.8), 1.28))
        terms.append(-gain * (1.0 if cap is None else min(math.exp(t.old - t.sampled), cap)))
    return sum(terms) / len(terms)


def cross_entropy(tokens):
    return -sum(t.mine for t in tokens) / len(tokens)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_loss_of_every_preset_in_plain_python(preset, temperature):
    overrides = (f"mtp.preset={preset}", OPEN, f"rl.rollout.temperature={temperature}")
    trainer, actor = four_updates(*overrides)
    for mini in mini_batches(trainer):
        main, *depths = per_token(actor, mini.rows, temperature)
        metrics = trainer.updater.run_update(mini).metrics
        runs_mtp = preset != "none"
        lambdas = [metrics[f"lambda/mtp_{k}"] if runs_mtp else 0.0 for k in (1, 2)]
        policy = mean(w * clipped(d) for w, d in zip(lambdas, depths, strict=True))
        ce = mean(map(cross_entropy, depths))
        mtp = {
            "none": 0.0,
            "detach": 0.1 * ce,
            "ce": 0.1 * ce,
            "policy": mean(map(clipped, depths)),
            "occ": policy,
            "occ_decoupled": policy + 0.1 * ce,
        }
        assert actor.losses[-1] == pytest.approx(clipped(main) + mtp[preset], abs=1e-6)
        assert metrics["loss/policy"] == pytest.approx(clipped(main), abs=1e-6)
        for k, tokens in enumerate(depths if runs_mtp else (), start=1):
            assert metrics[f"loss/mtp_{k}"] == pytest.approx(cross_entropy(tokens), abs=1e-6)


@pytest.mark.parametrize("lambda_plus", [1.0, 3.0])
@pytest.mark.parametrize("statistics", ["previous", "current"])
def test_lambda_over_two_steps_equals_the_formula(statistics, lambda_plus):
    """previous: sums of the mini-batch before; both hold while the policy has not moved."""
    overrides = (f"mtp.trunk.statistics={statistics}", f"mtp.trunk.lambda_plus={lambda_plus}")
    trainer, actor = four_updates(*OCC, *overrides)
    expected, current = [], [0.0, 0.0]
    used = []
    for _ in range(2):
        for position, mini in enumerate(mini_batches(trainer)):
            now = [formula(d, lambda_plus) for d in per_token(actor, mini.rows)[1:]]
            before = current
            if position > 0:  # the first one of a step has d_RL = 0 and tells nothing
                current = now
            else:
                assert now == pytest.approx([0.0, 0.0], abs=1e-6)
            expected.append(current if statistics == "current" else before)
            metrics = trainer.updater.run_update(mini).metrics
            used.append([metrics[f"lambda/mtp_{k}"] for k in (1, 2)])
    for got, reference in zip(used, expected, strict=True):
        assert got == pytest.approx(reference, abs=1e-7)
    start = 1 if statistics == "current" else 2
    assert all(value == 0.0 for pair in used[:start] for value in pair)
    assert all(abs(value) > 1e-4 for pair in used[start:] for value in pair)
    held = (used[4], used[3]) if statistics == "current" else (used[5], used[4])
    assert held[0] == held[1]


@pytest.mark.parametrize("statistics", ["previous", "current"])
def test_the_average_takes_in_each_mini_batch_once(statistics):
    """Averages of both inner products over the mini-batches that moved, newest weight 1 - ema."""
    overrides = ("mtp.trunk.ema=0.7", f"mtp.trunk.statistics={statistics}")
    trainer, actor = four_updates(*OCC, *overrides)
    seen, expected, used = [], [0.0], []
    for position, mini in enumerate(mini_batches(trainer)):
        if position > 0:
            seen.append(inner_products(per_token(actor, mini.rows)[1]))
            cross, norm = (
                sum(0.7**age * products[i] for age, products in enumerate(reversed(seen)))
                / sum(0.7**age for age in range(len(seen)))
                for i in (0, 1)
            )
            expected.append(cross / (norm + 1e-8))
        used.append(trainer.updater.run_update(mini).metrics["lambda/mtp_1"])
    if statistics == "previous":
        expected = [0.0, *expected[:-1]]
    assert used == pytest.approx(expected, abs=1e-7)
    assert abs(used[3]) > 1e-4


WEIGHTS = ("mtp.preset=policy", "rl.correction.weights=token")


def test_importance_weights_follow_their_token_to_every_depth():
    """A rollout engine whose log-probs are off, differently for each token."""
    cap = 1.1
    trainer, actor = four_updates(*WEIGHTS, f"rl.correction.high={cap}")

    def disturb(batch):
        noise = torch.rand(batch.ids.shape, generator=torch.Generator().manual_seed(1)) - 0.5
        return replace(batch, rollout_logprobs=batch.rollout_logprobs + noise * batch.response_mask)

    for mini in mini_batches(trainer, disturb):
        main, *depths = per_token(actor, mini.rows)
        trainer.updater.run_update(mini)
        weighted = clipped(main, cap) + mean(clipped(d, cap) for d in depths)
        assert actor.losses[-1] == pytest.approx(weighted, abs=1e-6)
        assert abs(weighted - clipped(main) - mean(map(clipped, depths))) > 1e-3


def test_lambda_of_current_statistics_costs_one_forward_pass():
    for statistics, forward_only in (("previous", 0), ("current", 4)):
        trainer, actor = four_updates(*OCC, f"mtp.trunk.statistics={statistics}")
        run_updates(trainer)
        assert len(actor.losses) == 4
        assert len(actor.reports) - len(actor.losses) == forward_only


def test_the_inner_products_are_logged_and_are_those_of_the_mini_batch():
    trainer, actor = four_updates(*OCC, micro=1)
    for mini in mini_batches(trainer):
        depths = per_token(actor, mini.rows)[1:]
        metrics = trainer.updater.run_update(mini).metrics
        for k, tokens in enumerate(depths, start=1):
            cross, norm = inner_products(tokens)
            assert metrics[f"calibration/cross_{k}"] == pytest.approx(cross, abs=1e-6)
            assert metrics[f"calibration/norm_squared_{k}"] == pytest.approx(norm, rel=1e-9)


def test_clamp_bounds_the_lambda_that_is_used():
    free, _ = four_updates(*OCC)
    values = [metrics["lambda/mtp_1"] for metrics in run_updates(free)][2:]
    low, high = sorted((0.0, values[0] / 2))
    trainer, _ = four_updates("mtp.preset=occ", f"mtp.trunk.clamp=[{low},{high}]")
    bounded = run_updates(trainer)
    assert bounded[2]["lambda/mtp_1"] == pytest.approx(values[0] / 2, abs=1e-9)
    assert all(low <= update["lambda/mtp_1"] <= high for update in bounded)


@pytest.mark.parametrize(("preset", "fixed"), [("detach", 0.0), ("ce", 0.1), ("policy", 1.0)])
def test_fixed_weights_are_logged_as_lambda(preset, fixed):
    trainer, _ = four_updates(f"mtp.preset={preset}")
    metrics = run_updates(trainer)[0]
    assert (metrics["lambda/mtp_1"], metrics["lambda/mtp_2"]) == (fixed, fixed)


def test_a_frozen_head_without_effect_on_the_trunk_is_not_run():
    trainer, actor = four_updates("mtp.preset=none")
    build, asked = actor.micro_batch, []

    def spy(*args, passes, **rest):
        asked.append(passes)
        return build(*args, passes=passes, **rest)

    actor.micro_batch = spy
    metrics = run_updates(trainer)[0]
    assert set(asked) == {()}
    assert not [name for name in metrics if "mtp" in name or "calibration" in name]


def test_regime_of_the_configuration():
    config = rl_config("mtp.preset=occ_decoupled", "mtp.trunk.clamp=[null,2.0]").mtp
    regime = regime_from(config)
    assert (regime.trunk, regime.head, regime.trunk_weight) == ("policy", "ce", None)
    assert (regime.clamp, regime.head_weight) == ((None, 2.0), 0.1)
    assert regime_from(rl_config("mtp.preset=policy").mtp).trunk_weight == 1.0


def test_a_tracker_without_calibration_has_no_state_and_asks_for_no_forward_pass():
    def forbidden():
        raise AssertionError("no forward pass is needed")

    for overrides in (("mtp.preset=policy",), ("mtp.preset=detach",), RELEASED):
        tracker = CoefficientTracker(rl_config(*overrides).mtp)
        assert tracker.before_update(forbidden) is None
        assert tracker.state_dict() == {}
        tracker.load_state_dict({})
        assert tracker.after_update(None, None) == {}


@pytest.mark.parametrize("depths", [1, 2])
@pytest.mark.parametrize("cut", ["size=4", "size=1", "tokens=1000", "tokens=15"])
def test_the_released_lambda_in_plain_python(cut, depths):
    """(f/K) times the sum over response tokens of d_RL d_k / (d_k^2 + eps), by rows * 6 tokens."""
    more = ("mtp.trunk.lambda_plus=0.3", f"mtp.num_layers={depths}", f"rl.micro_batch_{cut}")
    config = rl_config("rl.mini_batches=4", *RELEASED, *more)
    actor = FakeActor(depths, seed=2)
    trainer = make_trainer(config, actor, varied)
    for position, mini in enumerate(mini_batches(trainer)):
        main, *heads = per_token(actor, mini.rows)
        loss, expected = clipped(main), [0.0] * depths
        for rows, _ in mini.micro_batches():
            for k, tokens in enumerate(per_token(actor, rows)[1:]):
                if not tokens:
                    continue  # one short row: it counts for nothing
                share = len(tokens) / len(heads[k])
                found = released(tokens, 0.3, depths, len(rows))
                loss += found * clipped(tokens) * share
                # logged as the mean over tokens, without the formula's 1/K as everywhere else
                expected[k] += depths * found * share
        metrics = trainer.updater.run_update(mini).metrics
        got = [metrics[f"lambda/mtp_{k + 1}"] for k in range(depths)]
        assert got == pytest.approx(expected, abs=1e-6)
        assert actor.losses[-1] == pytest.approx(loss, abs=1e-6)
        assert position == 0 or all(abs(value) > 1e-4 for value in got)


def released(tokens, factor, depths, rows):
    ratios = [(t.now - t.old) * (t.mine - t.old) / ((t.mine - t.old) ** 2 + 1e-8) for t in tokens]
    return factor / depths * sum(ratios) / (rows * 6)


@pytest.mark.parametrize("cut", ["rl.micro_batch_size=2", "rl.micro_batch_tokens=8"])
def test_rows_that_no_depth_predicts_leave_the_released_lambda_finite(cut):
    """Sequences of two tokens: depth 1 lacks both. A micro-batch of them alone has lambda 0."""
    trainer, actor = four_updates(*RELEASED, cut)

    def cut_short(batch):
        short = torch.arange(batch.ids.size(1)) < torch.tensor([[2], [9]]).repeat(8, 1)
        first = torch.arange(len(batch)) < 4  # of the first mini-batch all, then every other row
        mask = torch.where(first[:, None], short[:1], short) * torch.ones_like(batch.response_mask)
        mask[:, 0] = 0.0  # prompts of one token
        return replace(batch, response_mask=mask)

    updates = [trainer.updater.run_update(mini) for mini in mini_batches(trainer, cut_short)]
    assert [update.events for update in updates] == [[]] * 4
    assert updates[0].metrics["lambda/mtp_1"] == 0.0
    assert all(abs(update.metrics["lambda/mtp_1"]) > 1e-4 for update in updates[1:])
    assert all(map(math.isfinite, actor.losses))
