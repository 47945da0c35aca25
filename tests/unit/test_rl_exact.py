"""Lambda from gradients, in the loop of the fake policy: what is measured, added and kept."""

from __future__ import annotations

import copy

import pytest
import torch

from megatron_occ.losses.heads import LossReport
from megatron_occ.rl.batch import MiniBatch
from megatron_occ.rl.prepared import PreparedBatch
from tests.unit.rl_setup import four_updates, mini_batches, run_updates, weights

EXACT = (
    "mtp.preset=occ_exact",
    "mtp.trunk.exact.every=1",
    "mtp.trunk.exact.metric=euclidean",
    "mtp.trunk.exact.gate=0",
    "mtp.trunk.exact.share_cap=null",
    "mtp.trunk.clamp=[null,null]",
    "mtp.trunk.lambda_plus=0.5",
    "mtp.trunk.ema=0.9",
)
COUPLED = ("mtp.preset=occ", "mtp.trunk.weighting=unit", "mtp.trunk.estimator=exact", *EXACT[1:])
TRUNK = ("embedding", "trunk", "output")
# of 4 samples in each of 4 mini-batches
TWO_PROMPTS = ("rl.prompts_per_step=8",)
NOTHING = LossReport()


def beside(trainer, *given):
    """Another trainer at the same weights, and its actor."""
    other, actor = four_updates(*given, micro=4)
    actor.model.load_state_dict(trainer.updater.actor.model.state_dict())
    return other, actor


def separate(trainer, batch):
    """RL's gradient and those of the depths with weight 1, at the present weights."""
    alone, actor = beside(trainer, "mtp.preset=none")
    alone.updater.run_update(batch)
    found = [actor.gradients[-1]]
    other, actor = beside(trainer, "mtp.preset=policy", "mtp.trunk.weighting=unit")
    prepared = PreparedBatch(other.config, actor, batch)
    for depth in range(actor.num_depths):
        gradient, _ = prepared.gradient(
            lambda *given, depth=depth: (other.updater.loss.trunk_losses(*given)[depth], NOTHING),
            ((True, True),),
        )
        found.append(dict(zip(TRUNK, gradient, strict=True)))
    return found


def dot(one, other):
    return float(sum((one[name] * other[name]).sum() for name in TRUNK))


def test_an_update_is_rls_gradient_and_the_weighted_ones_of_the_depths():
    trainer, actor = four_updates(*EXACT, "mtp.trunk.exact.pairs=same", micro=4)
    batch = mini_batches(trainer)[0]
    main, *depths = separate(trainer, batch)
    gram = torch.tensor([[dot(a, b) for b in depths] for a in depths], dtype=torch.float64)
    c = torch.tensor([dot(main, each) for each in depths], dtype=torch.float64)
    wanted = 0.5 * torch.linalg.solve(gram, c)
    metrics = trainer.updater.run_update(batch).metrics
    assert [metrics[f"exact/c_same_{k}"] for k in (1, 2)] == pytest.approx(c.tolist(), rel=1e-5)
    # lambda is divided by K in the loss
    found = [metrics[f"lambda/mtp_{k}"] / 2 for k in (1, 2)]
    assert found == pytest.approx(wanted.tolist(), rel=1e-4)
    for name in TRUNK:
        expected = main[name] + sum(w * d[name] for w, d in zip(wanted, depths, strict=True))
        torch.testing.assert_close(actor.gradients[-1][name], expected, rtol=1e-4, atol=1e-8)


def halves(batch):
    """Mini-batches of the two parts, with the rows of each."""
    count = batch.parts[0]
    rows = sum(batch.sizes[:count])
    spans = ((0, rows, batch.sizes[:count]), (rows, len(batch.rows), batch.sizes[count:]))
    return [MiniBatch(batch.rows.rows(start, stop), sizes) for start, stop, sizes in spans]


def test_cross_pairs_are_those_of_different_parts():
    trainer, actor = four_updates(*EXACT, *TWO_PROMPTS, micro=1)
    batch = mini_batches(trainer)[0]
    assert batch.parts == (4, 4)
    # separate() normalises by the counts of what it is given: put them back to the whole batch's
    whole, parts = separate(trainer, batch), [separate(trainer, half) for half in halves(batch)]
    tokens = [
        [float(PreparedBatch(trainer.config, actor, each).normalizers.tokens[d]) for d in range(3)]
        for each in (batch, *halves(batch))
    ]
    for half, counts in zip(parts, tokens[1:], strict=True):
        for depth in range(3):
            half[depth] = {n: g * counts[depth] / tokens[0][depth] for n, g in half[depth].items()}
    metrics = trainer.updater.run_update(batch).metrics
    for k in (1, 2):
        expected = 2 * (dot(parts[0][0], parts[1][k]) + dot(parts[1][0], parts[0][k]))
        assert metrics[f"exact/c_cross_{k}"] == pytest.approx(expected, rel=1e-4)
        assert metrics[f"exact/c_same_{k}"] == pytest.approx(dot(whole[0], whole[k]), rel=1e-4)
    expected = 4 * dot(parts[0][0], parts[1][0])
    assert metrics["exact/rl_signal"] == pytest.approx(expected, rel=1e-4)
    used = [metrics[f"lambda/mtp_{k}"] / 2 for k in (1, 2)]
    assert any(used)
    for name in TRUNK:
        added = sum(w * d[name] for w, d in zip(used, whole[1:], strict=True))
        torch.testing.assert_close(
            actor.gradients[-1][name], whole[0][name] + added, rtol=1e-4, atol=1e-8
        )
    other, alone = four_updates("mtp.preset=detach", *TWO_PROMPTS, micro=1)
    other.updater.run_update(mini_batches(other)[0])
    torch.testing.assert_close(
        actor.gradients[-1]["heads.0"], alone.gradients[-1]["heads.0"], rtol=1e-4, atol=1e-8
    )


def test_metrics_of_parts_add_up_to_those_of_the_mini_batch():
    cut, _ = four_updates(*EXACT, *TWO_PROMPTS, "mtp.trunk.clamp=[0,0.000001]", micro=2)
    plain, _ = four_updates("mtp.preset=detach", *TWO_PROMPTS, micro=2)
    found, expected = (t.updater.run_update(mini_batches(t)[0]).metrics for t in (cut, plain))
    for name in ("loss/policy", "entropy", "loss/mtp_1", "agreement/mtp_2", "approx_kl"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6), name


@pytest.mark.parametrize("preset", ["occ_exact", "coupled"])
def test_the_head_gets_its_own_loss_or_the_trunks_times_lambda(preset):
    given = EXACT if preset == "occ_exact" else COUPLED
    trainer, actor = four_updates(*given, "mtp.trunk.exact.pairs=same", micro=4)
    batch = mini_batches(trainer)[0]
    other, alone = four_updates("mtp.preset=detach", micro=4)
    other.updater.run_update(batch)
    used = trainer.updater.run_update(batch).metrics
    found, detached = actor.gradients[-1], alone.gradients[-1]
    if preset == "occ_exact":
        torch.testing.assert_close(found["heads.0"], detached["heads.0"])
        return
    plain, fixed = four_updates(
        "mtp.preset=policy", "mtp.trunk.weighting=unit", "mtp.trunk.weight=1", micro=4
    )
    plain.updater.run_update(batch)
    # depth 2 is the only loss that reaches its own matrix, with weight 1/K there and lambda/K here
    expected = fixed.gradients[-1]["heads.1"] * used["lambda/mtp_2"]
    torch.testing.assert_close(found["heads.1"], expected, rtol=1e-4, atol=1e-10)


EVERY_SECOND = ("mtp.trunk.exact.pairs=same", "mtp.trunk.exact.every=2")


def test_between_measurements_a_head_of_its_own_leaves_the_trunk_to_rl():
    trainer, actor = four_updates(*EXACT, *EVERY_SECOND, micro=4)
    first, second, third, _ = mini_batches(trainer)
    assert trainer.updater.run_update(first).metrics["lambda/mtp_1"] != 0
    main, *_ = separate(trainer, second)
    metrics = trainer.updater.run_update(second).metrics
    assert metrics["lambda/mtp_1"] == 0
    for name in TRUNK:
        torch.testing.assert_close(actor.gradients[-1][name], main[name], rtol=1e-4, atol=1e-8)
    assert float(actor.gradients[-1]["heads.0"].norm()) > 0
    assert trainer.updater.run_update(third).metrics["lambda/mtp_1"] != 0


def test_between_measurements_a_shared_loss_has_the_last_lambda():
    trainer, actor = four_updates(*COUPLED, *EVERY_SECOND, micro=4)
    first, second, *_ = mini_batches(trainer)
    measured = trainer.updater.run_update(first).metrics
    main, *depths = separate(trainer, second)
    metrics = trainer.updater.run_update(second).metrics
    assert metrics["lambda/mtp_1"] == measured["lambda/mtp_1"] != 0
    assert not any(name.startswith("exact/") for name in metrics)
    used = [metrics[f"lambda/mtp_{k}"] / 2 for k in (1, 2)]
    for name in TRUNK:
        expected = main[name] + sum(w * d[name] for w, d in zip(used, depths, strict=True))
        torch.testing.assert_close(actor.gradients[-1][name], expected, rtol=1e-4, atol=1e-8)


def test_adams_metric_waits_for_an_update():
    trainer, _ = four_updates(
        "mtp.preset=occ_exact", "mtp.trunk.exact.every=1", *TWO_PROMPTS, micro=4
    )
    first, second, *_ = run_updates(trainer)
    assert "exact/c_same_1" not in first and first["lambda/mtp_1"] == 0
    assert "exact/c_same_1" in second


def test_layers_have_coefficients_of_their_own():
    trainer, actor = four_updates(
        *EXACT, "mtp.trunk.exact.pairs=same", "mtp.trunk.exact.per=layer", "mtp.num_layers=2",
        micro=4,
    )  # fmt: skip
    batch = mini_batches(trainer)[0]
    main, *depths = separate(trainer, batch)
    metrics = trainer.updater.run_update(batch).metrics
    for name, group in zip(TRUNK, actor.gradient_space.groups, strict=True):
        gram = torch.tensor([[float((a[name] * b[name]).sum()) for b in depths] for a in depths])
        c = torch.tensor([float((main[name] * each[name]).sum()) for each in depths])
        wanted = 0.5 * torch.linalg.solve(gram.double(), c.double())
        used = [metrics[f"exact/lambda_{k}/{group}"] / 2 for k in (1, 2)]
        assert used == pytest.approx(wanted.tolist(), rel=1e-3)
        expected = main[name] + sum(w * d[name] for w, d in zip(wanted, depths, strict=True))
        torch.testing.assert_close(actor.gradients[-1][name], expected, rtol=1e-3, atol=1e-7)


def test_a_random_control_flips_signs_alone():
    settings = (*EXACT, "mtp.trunk.exact.pairs=same")
    trainer, actor = four_updates(*settings, "mtp.trunk.exact.control=random", micro=4)
    batch = mini_batches(trainer)[0]
    _, *depths = separate(trainer, batch)
    added, add = [], actor.gradient_space.add

    def adding(gradients, weights):
        added.extend(gradients)
        add(gradients, weights)

    actor.gradient_space.add = adding
    assert trainer.updater.run_update(batch).metrics["lambda/mtp_1"] != 0
    for found, depth in zip(added, depths, strict=True):
        found = dict(zip(TRUNK, found, strict=True))
        for name in TRUNK:
            torch.testing.assert_close(found[name].abs(), depth[name].abs(), rtol=1e-4, atol=1e-9)
        assert abs(dot(found, depth)) < 0.6 * dot(depth, depth)


def test_a_shuffled_lambda_is_one_that_was_measured_and_is_what_acts():
    settings = (*EXACT, "mtp.trunk.exact.pairs=same", "mtp.trunk.exact.control=shuffled")
    trainer, actor = four_updates(*settings, micro=4)
    values, added, space = [], [], actor.gradient_space
    update, add = trainer.updater.exact._calibrator.update, space.add

    def updated(sample):
        answer = update(sample)
        values.append(answer.values)
        return answer

    def adding(gradients, weights):
        added.append(weights * 2)
        add(gradients, weights)

    trainer.updater.exact._calibrator.update, space.add = updated, adding
    lines = run_updates(trainer) + run_updates(trainer)
    for number, (line, used) in enumerate(zip(lines, added, strict=True)):
        assert any(torch.equal(used, value) for value in values[: number + 1])
        assert line["lambda/mtp_1"] == pytest.approx(float(used[0, 0]))
    assert any(not torch.equal(a, b) for a, b in zip(added, values, strict=True))


def test_a_gradient_that_is_not_finite_is_not_added_and_lambda_is_0_then():
    trainer, actor = four_updates(*EXACT, "mtp.trunk.exact.pairs=same", micro=4)
    first, second, *_ = mini_batches(trainer)
    assert trainer.updater.run_update(first).metrics["lambda/mtp_1"] != 0
    take = actor.gradient_space.take

    def broken(head):
        gradient = take(head)
        gradient[0][0] = torch.nan
        return gradient

    actor.gradient_space.take = broken
    update = trainer.updater.run_update(second)
    assert update.metrics["lambda/mtp_1"] == 0
    assert any("not finite: measured and added nothing" in event for event in update.events)
    assert all(torch.isfinite(g).all() for g in actor.gradients[-1].values())


def test_lambda_by_log_probs_begins_also_where_rollouts_train_the_head():
    def idle(*given):
        regime = "mtp={trunk: {signal: policy, coefficient: occ}, head: {signal: soft_ce}}"
        trainer, _ = four_updates("mtp.preset=null", regime, *given, micro=4)
        return trainer.updater._is_idle(torch.zeros(2))

    assert idle("mtp.head.states=training")
    # there the trunk's pass alone brings the statistics of the next lambda
    assert not idle("mtp.head.states=rollout")


def test_a_leaking_head_trains_the_output_layer_and_a_cut_one_does_not():
    def output(*given):
        trainer, actor = four_updates("mtp.preset=detach", *given, micro=4)
        batch = mini_batches(trainer)[0]
        trainer.updater.run_update(batch)
        return actor.gradients[-1]

    cut, leaking = output(), output("mtp.head.cut_output_layer=false")
    none, actor = four_updates("mtp.preset=none", micro=4)
    none.updater.run_update(mini_batches(none)[0])
    plain = actor.gradients[-1]
    torch.testing.assert_close(cut["output"], plain["output"])
    assert not torch.allclose(leaking["output"], plain["output"])
    torch.testing.assert_close(leaking["trunk"], plain["trunk"])
    torch.testing.assert_close(leaking["heads.0"], cut["heads.0"])


def test_a_resumed_run_goes_on_as_the_undisturbed_one():
    def trained(steps, saved_at=None):
        states = []
        trainer, actor = four_updates(
            *EXACT, *TWO_PROMPTS, "rl.save_every=1", f"rl.steps={steps}", micro=4
        )

        def save(step):
            states.append((trainer.state_dict(), actor.model.state_dict(), actor.version))

        trainer.save = save
        if saved_at is not None:
            state, model, actor.version = saved_at
            actor.model.load_state_dict(model)
            trainer.load_state_dict(state)
        trainer.fit()
        return weights(actor), states

    whole, states = trained(3)
    _, first = trained(1)
    resumed, _ = trained(3, copy.deepcopy(first[0]))
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
    assert len(states) == 3
