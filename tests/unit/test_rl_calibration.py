"""Loss, gradients and lambda of whole updates, against plain Python and under every way to cut."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch

from megatron_occ.observe.progress import Timers
from megatron_occ.rl.batch import RolloutBatch
from megatron_occ.rl.calibration import CoefficientTracker, regime_from
from tests.unit.fakes import FakeActor, make_trainer, rl_config, run_ranks

PRESETS = ("none", "detach", "ce", "policy", "occ", "occ_decoupled")
# lambda may be negative here: a clamp at 0 would hide differences
OPEN = "mtp.trunk.clamp=[null,null]"
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


def varied(response, answer):
    """A reward with spread in every group, so that no mini-batch is without a gradient."""
    return response.count("a") + len(response) / 6


def build(overrides, micro=MINI, layout=None):
    config = rl_config("rl.mini_batches=4", f"rl.micro_batch_size={micro}", *overrides)
    actor = FakeActor(layout=layout, seed=2)
    return make_trainer(config, actor, varied), actor


def scored_batch(trainer):
    return trainer.compute_logprobs(trainer.rollouts.generate(Timers()).batch)


def run(overrides, micro=MINI, change=lambda batch: batch):
    """All updates of a step: metrics of each, and the actor with its losses and gradients."""
    trainer, actor = build(overrides, micro)
    batch = change(trainer.rollouts.generate(Timers()).batch)
    minis = trainer.compute_logprobs(batch).split(MINI)
    return [trainer.run_update(mini) for mini in minis], actor


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


# --- plain Python -----------------------------------------------------------------------------


def per_token(actor, batch, temperature=1.0):
    """For each depth, main head first: (row, advantage, l, o, m) of every response token."""
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
                    current = float(outputs.logprobs[row, t - 1])
                    old = float(batch.old_logprobs[row, t - 1])
                    mine = float(head[row, t - 1 - depth])
                    tokens.append((float(batch.advantages[row]), current, old, mine))
        result.append(tokens)
    return result


def formula(tokens, lambda_plus=1.0):
    """lambda+ <l - o, m - o> / (|m - o|^2 + eps)"""
    cross = sum((now - old) * (mine - old) for _, now, old, mine in tokens)
    norm = sum((mine - old) ** 2 for _, _, old, mine in tokens)
    return lambda_plus * cross / (norm + 1e-8)


def clipped(tokens):
    """Mean over tokens of -min(A r, A clip(r, 0.8, 1.28))."""
    terms = []
    for advantage, _, old, mine in tokens:
        ratio = math.exp(mine - old)
        terms.append(-min(advantage * ratio, advantage * min(max(ratio, 0.8), 1.28)))
    return sum(terms) / len(terms)


def cross_entropy(tokens):
    return -sum(mine for *_, mine in tokens) / len(tokens)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_loss_of_every_preset_in_plain_python(preset):
    trainer, actor = build(VARIANTS[preset], micro=2)
    for mini in scored_batch(trainer).split(MINI):
        main, *depths = per_token(actor, mini)
        metrics = trainer.run_update(mini)
        lambdas = [metrics[f"lambda/mtp_{k}"] for k in (1, 2)]
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
        for k, tokens in enumerate(depths, start=1):
            assert metrics[f"loss/mtp_{k}"] == pytest.approx(cross_entropy(tokens), abs=1e-6)


@pytest.mark.parametrize("lambda_plus", [1.0, 3.0])
@pytest.mark.parametrize("statistics", ["previous", "current"])
def test_lambda_over_two_steps_equals_the_formula(statistics, lambda_plus):
    """previous: sums of the mini-batch before; both hold while the policy has not moved."""
    overrides = (f"mtp.trunk.statistics={statistics}", f"mtp.trunk.lambda_plus={lambda_plus}")
    trainer, actor = build((*VARIANTS["occ"], *overrides), micro=2)
    expected, current = [], [0.0, 0.0]
    used = []
    for _ in range(2):
        for position, mini in enumerate(scored_batch(trainer).split(MINI)):
            now = [formula(d, lambda_plus) for d in per_token(actor, mini)[1:]]
            before = current
            if position > 0:  # the first one of a step has d_RL = 0 and tells nothing
                current = now
            else:
                assert now == pytest.approx([0.0, 0.0], abs=1e-6)
            expected.append(current if statistics == "current" else before)
            metrics = trainer.run_update(mini)
            used.append([metrics[f"lambda/mtp_{k}"] for k in (1, 2)])
    for got, reference in zip(used, expected, strict=True):
        assert got == pytest.approx(reference, abs=1e-7)
    start = 1 if statistics == "current" else 2
    assert all(value == 0.0 for pair in used[:start] for value in pair)
    assert all(abs(value) > 1e-4 for pair in used[start:] for value in pair)
    held = (used[4], used[3]) if statistics == "current" else (used[5], used[4])
    assert held[0] == held[1]


def test_lambda_of_current_statistics_costs_one_forward_pass():
    for statistics, forward_only in (("previous", 0), ("current", 4)):
        trainer, actor = build((*VARIANTS["occ"], f"mtp.trunk.statistics={statistics}"))
        for mini in scored_batch(trainer).split(MINI):
            trainer.run_update(mini)
        assert len(actor.losses) == 4
        assert len(actor.reports) - len(actor.losses) == forward_only


def test_the_inner_products_are_logged_and_are_those_of_the_mini_batch():
    trainer, actor = build(VARIANTS["occ"], micro=1)
    for mini in scored_batch(trainer).split(MINI):
        depths = per_token(actor, mini)[1:]
        metrics = trainer.run_update(mini)
        for k, tokens in enumerate(depths, start=1):
            cross = sum((now - old) * (mine - old) for _, now, old, mine in tokens)
            norm = sum((mine - old) ** 2 for _, _, old, mine in tokens)
            assert metrics[f"calibration/cross_{k}"] == pytest.approx(cross, abs=1e-6)
            assert metrics[f"calibration/norm_squared_{k}"] == pytest.approx(norm, rel=1e-9)


def test_clamp_bounds_the_lambda_that_is_used():
    free, _ = run(VARIANTS["occ"])
    values = [update["lambda/mtp_1"] for update in free[2:]]
    low, high = sorted((0.0, values[0] / 2))
    trainer, _ = build(("mtp.preset=occ", f"mtp.trunk.clamp=[{low},{high}]"))
    bounded = [trainer.run_update(mini) for mini in scored_batch(trainer).split(MINI)]
    assert bounded[2]["lambda/mtp_1"] == pytest.approx(values[0] / 2, abs=1e-9)
    assert all(low <= update["lambda/mtp_1"] <= high for update in bounded)


@pytest.mark.parametrize(("preset", "fixed"), [("none", 0.0), ("ce", 0.1), ("policy", 1.0)])
def test_fixed_weights_are_logged_as_lambda(preset, fixed):
    metrics, _ = run((f"mtp.preset={preset}",))
    assert [update["lambda/mtp_2"] for update in metrics] == [fixed] * 4


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


# --- every way to cut a mini-batch --------------------------------------------------------------


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
        trainer, actor = build(VARIANTS[variant], micro=1, layout=layout)
        everything = build(VARIANTS[variant])[0].rollouts.generate(Timers()).batch
        minis = trainer.compute_logprobs(everything).split(MINI)
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


def test_the_released_lambda_does_change_with_the_cut_and_with_padding():
    """Documented behaviour of the released formula, kept for reproduction alone."""
    whole_metrics, whole = run(RELEASED)
    cut_metrics, cut = run(RELEASED, micro=2)
    assert cut.losses[0] == pytest.approx(whole.losses[0], abs=1e-6)  # lambda is 0 at first
    for update, other in zip(cut_metrics[1:], whole_metrics[1:], strict=True):
        assert abs(update["lambda/mtp_1"] - other["lambda/mtp_1"]) > 1e-3
    assert abs(cut.losses[1] - whole.losses[1]) > 1e-4


def test_the_released_lambda_in_plain_python():
    """(f/K) times the mean over all positions, response or not, of d_RL d_k / (d_k^2 + eps)."""
    trainer, actor = build((*RELEASED, "mtp.trunk.lambda_plus=0.3"))
    for mini in scored_batch(trainer).split(MINI):
        everything = replace(mini, response_mask=torch.ones_like(mini.response_mask))
        rows, width = mini.ids.shape
        expected = []
        for depth, tokens in enumerate(per_token(actor, everything)[1:], start=1):
            ratios = [
                (now - old) * (mine - old) / ((mine - old) ** 2 + 1e-8)
                for _, now, old, mine in tokens
            ]
            # tokens that the depth can't predict have m = 0, the first also l = o = 0
            early = [(row, t) for row in range(rows) for t in range(1, depth + 1)]
            with torch.no_grad():
                batch = actor.micro_batch(mini.ids, None, passes=())
                current = actor.outputs(batch).logprobs
            for row, t in early:
                old = float(mini.old_logprobs[row, t - 1])
                moved = float(current[row, t - 1]) - old
                ratios.append(moved * -old / (old**2 + 1e-8))
            expected.append(0.3 / 2 * sum(ratios) / (rows * width))
        metrics = trainer.run_update(mini)
        got = [metrics[f"lambda/mtp_{k}"] for k in (1, 2)]
        assert got == pytest.approx(expected, abs=1e-6)
