"""``rl.train_trunk=false``: the head learns, the policy stays, and its rewards change nothing."""

from __future__ import annotations

import pytest
import torch

from megatron_occ.losses import soft_cross_entropy, total_variation
from tests.unit.fake_layouts import run_ranks
from tests.unit.fakes import FakeActor
from tests.unit.rl_setup import make_trainer, mini_batches, rl_config, varied, weights

DISTANCES = {"soft_ce": soft_cross_entropy, "tv": total_variation}
PACKED = "rl.micro_batch_tokens=40"


def stage(signal, *overrides, score=varied, layout=None):
    settings = ("mtp.trunk.signal=none", "mtp.trunk.coefficient=fixed", "rl.train_trunk=false")
    settings += (f"mtp.head.signal={signal}", "mtp.head.weight=0.7", *overrides)
    actor = FakeActor(seed=2, layout=layout)
    return make_trainer(rl_config(*settings), actor, score), actor


def by_loop(model, rows, signal, temperature):
    """Mean distance of each depth, row by row and token by token."""
    sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2)
    for ids, mask in zip(rows.ids, rows.response_mask, strict=True):
        hidden = model.hidden(ids[None])
        main = (hidden @ model.output.t())[0] / temperature
        for depth, logits in enumerate(model.mtp_logits(ids[None], hidden, False, True)):
            for position in range(len(ids) - 2 - depth):
                target = position + 2 + depth
                if not mask[target]:
                    continue
                teacher = main[target - 1].log_softmax(-1).detach()
                draft = logits[0, position] / temperature
                sums[depth] += DISTANCES[signal](draft, teacher)
                counts[depth] += 1
    return sums / counts


@pytest.mark.parametrize("cut", ["rl.micro_batch_size=3", PACKED])
@pytest.mark.parametrize("signal", DISTANCES)
def test_the_loss_is_the_mean_distance_over_response_tokens(signal, cut):
    trainer, actor = stage(signal, cut, "rl.rollout.temperature=0.7")
    (first, _) = mini_batches(trainer)
    expected = by_loop(actor.model, first.rows, signal, 0.7)
    update = trainer.updater.run_update(first)
    assert actor.losses == [pytest.approx(0.7 * float(expected.mean()), rel=1e-6)]
    for depth in (1, 2):
        found = update.metrics[f"loss/head_mtp_{depth}"]
        assert found == pytest.approx(float(expected[depth - 1]), rel=1e-6)
    assert update.metrics["grad_norm/trunk"] == 0 < update.metrics["grad_norm/head"]


@pytest.mark.parametrize("signal", DISTANCES)
def test_the_head_comes_closer_to_a_policy_that_stays(signal):
    trainer, actor = stage(signal)
    actor.lr = 5.0
    calls, compute = [], actor.get_inference_log_probs
    actor.get_inference_log_probs = lambda *a, **k: calls.append(1) or compute(*a, **k)
    before = weights(actor)
    lines = [trainer.run_step() for _ in range(40)]
    for name, value in weights(actor).items():
        assert torch.equal(value, before[name]) == (not name.startswith("heads.")), name
    for depth in (1, 2):
        losses = [line[f"loss/head_mtp_{depth}"] for line in lines]
        assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    assert calls == []
    assert not any(name.startswith("logprob_gap") for name in lines[0])


def test_rewards_change_nothing():
    outcomes = []
    for score in (varied, lambda response, answer: 0.0):
        trainer, actor = stage("tv", score=score)
        trainer.run_step()
        outcomes.append(weights(actor))
        assert {s["advantage"] for _, step in trainer.recorder.samples for s in step} == {0.0}
    for name, value in outcomes[0].items():
        assert torch.equal(outcomes[1][name], value), name


def test_one_response_to_a_prompt_is_enough():
    trainer, _ = stage("tv", "rl.samples_per_prompt=1", "rl.prompts_per_step=16")
    assert trainer.run_step()["grad_norm/head"] > 0


def losses_of(layout):
    trainer, actor = stage("soft_ce", "rl.micro_batch_size=2", layout=layout)
    lines = [trainer.run_step() for _ in range(2)]
    return [line["loss/head_mtp_2"] for line in lines], weights(actor)


def test_ranks_share_the_work_of_one():
    (expected, values), *_ = run_ranks(1, losses_of)
    for losses, found in run_ranks(2, losses_of):
        assert losses == pytest.approx(expected, rel=1e-9)
        for name, value in values.items():
            torch.testing.assert_close(found[name], value, atol=1e-9, rtol=1e-7)
