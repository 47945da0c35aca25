"""Experts taken down in one pass and replayed in another, on one process.

Layouts, packing and recompute: ``test_layouts.py``, ``test_generation_layouts.py``.
"""

from __future__ import annotations

import pytest
import torch

from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.inference.engine import MegatronEngine, Speculation
from megatron_occ.mcore.routing import Choices
from megatron_occ.rl.batch import MiniBatch, RolloutBatch, pad_routes, pad_sequences
from megatron_occ.rollout import Request, SamplingSettings
from tests.mcore.conftest import VOCABULARY, random_ids
from tests.mcore.test_training import actor_and_updater, rl_config

SCORES = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.7, 0.1, 0.1, 0.6]])
SAMPLING = SamplingSettings(1.0, 40, keep_routes=True)
LENGTHS = (5, 9, 3, 7, 12, 4, 6, 8)


def top(scores, topk, num_groups=None, group_topk=None):
    return scores.topk(topk, dim=1)


def ask(choices, scores=SCORES):
    return choices.get_replay_topk(scores, 2, default_compute_topk=top)


def test_a_router_is_told_what_to_choose_and_what_is_left_to_it():
    choices = Choices()
    choices.begin(torch.tensor([[4, 2], [0, 0]], dtype=torch.uint8), trains=True)
    values, experts = ask(choices)
    assert experts.tolist() == [[3, 1], [0, 3]]
    torch.testing.assert_close(values, torch.tensor([[0.2, 0.4], [0.7, 0.6]]))
    # of two replayed experts the router would have chosen one
    assert choices.counts.tolist() == [2, 1]
    choices.begin(None, trains=True)
    assert ask(choices)[1].tolist() == [[1, 2], [0, 3]]
    assert choices.counts.tolist() == [2, 1]


def test_passes_without_gradients_do_not_count():
    choices = Choices()
    choices.begin(torch.tensor([[4, 2], [3, 2]]), trains=False)
    with torch.no_grad():
        ask(choices)
    assert choices.counts is None


def test_a_pass_that_is_run_again_finds_its_own_experts():
    choices = Choices()
    first, second = torch.tensor([[4, 2], [1, 2]]), torch.tensor([[1, 3], [2, 4]])
    for wanted in (first, second):
        choices.begin(wanted, trains=True)
        with torch.no_grad():
            assert torch.equal(ask(choices)[1], wanted - 1)
    counted = choices.counts.tolist()
    # backward: the micro-batches in their order, while the second one was the last to go forward
    for wanted in (first, second):
        assert torch.equal(ask(choices)[1], wanted - 1)
    assert choices.counts.tolist() == counted
    choices.begin(first, trains=True)
    with torch.no_grad():
        ask(choices)
    choices.forget()
    # after a mini-batch a router chooses for itself
    assert ask(choices)[1].tolist() == [[1, 2], [0, 3]]
    choices.begin(second, trains=True)
    assert torch.equal(ask(choices)[1], second - 1)


def test_the_gradient_goes_to_the_scores_of_the_replayed_experts():
    scores = SCORES.clone().requires_grad_()
    choices = Choices()
    choices.begin(torch.tensor([[4, 2], [0, 0]]), trains=True)
    values, _ = ask(choices, scores)
    (values * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    assert scores.grad.tolist() == [[0, 2, 0, 1], [3, 0, 0, 4]]


def moe_config(replay, *more):
    config = rl_config("occ_decoupled", 4, f"rl.routing_replay={replay}", *more)
    moe = config.model.moe
    moe.num_experts, moe.top_k, moe.ffn_hidden_size, moe.first_dense_layers = 16, 4, 16, 1
    config.model.num_layers = 4
    return config


def rollout(actor: MegatronGPTActor, drafts: int = 2):
    """Prompts, and responses of the embedded engine with the experts of each token."""
    ids = random_ids(len(LENGTHS), max(LENGTHS)).clamp(min=3)
    prompts = [row[:length].tolist() for row, length in zip(ids, LENGTHS, strict=True)]
    engine = MegatronEngine(
        actor.inference_chunks, actor.layout, slots=5, speculation=Speculation(drafts)
    )
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    return prompts, engine.generate(requests, SAMPLING)


def as_mini_batch(prompts, found, *, routes=True) -> MiniBatch:
    advantages = torch.linspace(-1.0, 1.0, len(prompts))
    width = max(map(len, prompts)) + SAMPLING.max_response_length
    device = torch.device("cpu")
    rows = pad_sequences(prompts, found.tokens, found.logprobs, advantages, 0, width, device)
    if routes:
        kept = pad_routes(found.routes, width, found.routes[0])
        rows = RolloutBatch(**{**vars(rows), "routes": kept})
    return MiniBatch.padded(rows, 4)


def recorded_by_training(actor, rows: RolloutBatch):
    recorded = []
    parts = [[0, 1, 2, 3], [4, 5, 6, 7]]
    actor.get_inference_log_probs(
        rows.ids, parts=parts, lengths=None, temperature=1.0, recorded=recorded
    )
    return recorded[0]


@pytest.mark.parametrize("drafts", [0, 2])
def test_the_rollout_s_experts_are_those_of_a_training_pass(layout, drafts):
    actor, _ = actor_and_updater(layout, moe_config("rollout"))
    prompts, found = rollout(actor, drafts)
    rows = as_mini_batch(prompts, found).rows
    made = recorded_by_training(actor, rows)
    assert rows.routes.shape == made.shape == (8, rows.ids.size(1), 3 + 2, 4)
    assert rows.routes.dtype == made.dtype == torch.uint8
    sizes = zip(prompts, found.tokens, strict=True)
    for row, length in enumerate(len(p) + len(t) for p, t in sizes):
        trunk = rows.routes[row, : length - 1, :3].sort(-1).values
        assert torch.equal(trunk, made[row, : length - 1, :3].sort(-1).values)
        assert trunk.min() >= 1
        assert not rows.routes[row, length - 1 :].any()
    # MTP layers read while they draft
    assert bool(rows.routes[:, :, 3:].any()) == (drafts > 0)
    assert len(set(rows.routes[:, :, :3].flatten().tolist())) == 17


def test_mtp_layers_went_to_the_experts_that_training_sends_them_to(layout):
    """Replayed against their own choice: nothing is replaced, and nearly all is replayed."""
    actor, updater = actor_and_updater(layout, moe_config("rollout"))
    prompts, found = rollout(actor)
    (mini,) = updater.compute_logprobs([as_mini_batch(prompts, found)])
    metrics = updater.run_update(mini).metrics
    assert metrics["routing/replaced"] == 0
    assert metrics["routing/replaced_mtp"] == 0
    tokens = [len(p) + len(t) for p, t in zip(prompts, found.tokens, strict=True)]
    for depth in (0, 1):
        read = (mini.rows.routes[:, :, 3 + depth] > 0).all(-1).sum(1)
        for row, length in enumerate(tokens):
            # the last ones were never needed for a draft
            assert length - 5 <= int(read[row]) <= length - 1 - depth


def rounded_scores(monkeypatch):
    """From now on routers choose by scores rounded to bf16, and weigh by exact ones."""
    exact = Choices.get_replay_topk

    def perturbed(self, scores, topk, num_groups=None, group_topk=None, default_compute_topk=None):
        def choose(values, *arguments, **named):
            _, chosen = default_compute_topk(values.bfloat16().float(), *arguments, **named)
            return values.gather(1, chosen), chosen

        return exact(self, scores, topk, num_groups, group_topk, choose)

    monkeypatch.setattr(Choices, "get_replay_topk", perturbed)


@pytest.mark.parametrize("replay", ["none", "training", "rollout"])
def test_rollout_old_log_probs_and_update_agree_where_rounding_moves_a_router(
    layout, monkeypatch, replay
):
    config = moe_config("training" if replay == "none" else replay)
    actor, updater = actor_and_updater(layout, config)
    if replay == "none":
        # the same passes, whose experts nobody replays
        updater.config.rl.routing_replay = "none"
    prompts, found = rollout(actor)
    mini = as_mini_batch(prompts, found, routes=replay == "rollout")
    if replay == "rollout":
        # rollout against training
        rounded_scores(monkeypatch)
        (mini,) = updater.compute_logprobs([mini])
        assert updater.logprob_gap([mini])["logprob_gap/max"] < 2e-5
    else:
        # old log-probs against the update
        (mini,) = updater.compute_logprobs([mini])
        rounded_scores(monkeypatch)
    updater.config.rl.routing_replay = replay
    metrics = updater.run_update(mini).metrics
    if replay == "none":
        assert abs(metrics["approx_kl"]) > 1e-6
        return
    assert abs(metrics["approx_kl"]) < 1e-9
    assert metrics["ratio/mean"] == pytest.approx(1, abs=1e-6)
    assert 0 < metrics["routing/replaced"] < 0.1


def test_without_replay_the_rollout_and_training_do_not_agree(layout, monkeypatch):
    actor, updater = actor_and_updater(layout, moe_config("none"))
    prompts, found = rollout(actor)
    exact = updater.logprob_gap(
        updater.compute_logprobs([as_mini_batch(prompts, found, routes=False)])
    )
    assert exact["logprob_gap/max"] < 2e-5
    for chunk in actor.chunks:
        chunk.replay_routing(0)
    rounded_scores(monkeypatch)
    moved = updater.logprob_gap(
        updater.compute_logprobs([as_mini_batch(prompts, found, routes=False)])
    )
    assert moved["logprob_gap/max"] > 1e-3


def test_after_an_update_the_experts_of_the_old_log_probs_still_act(layout):
    actor, updater = actor_and_updater(layout, moe_config("training", "rl.optimizer.lr=0.03"))
    prompts, found = rollout(actor)
    minis = updater.compute_logprobs([as_mini_batch(prompts, found, routes=False)] * 2)
    for mini in minis:
        # no MTP layer is run with old log-probs
        assert not mini.rows.routes[:, :, 3:].any()
    first, second = (updater.run_update(mini).metrics for mini in minis)
    assert first["routing/replaced"] == 0
    assert second["routing/replaced"] > 0
    assert "routing/replaced_mtp" not in second
    assert abs(first["approx_kl"]) < 1e-9 < abs(second["approx_kl"])


def test_a_reference_policy_chooses_for_itself(layout):
    config = moe_config("rollout", "rl.loss.kl_coefficient=0.1")
    actor, updater = actor_and_updater(layout, config)
    actor.keep_reference()
    prompts, found = rollout(actor)
    mini = as_mini_batch(prompts, found)
    elsewhere = 1 + (mini.rows.routes.long() + 2) % 16
    moved = MiniBatch.padded(
        RolloutBatch(**{**vars(mini.rows), "routes": elsewhere.to(torch.uint8)}), 4
    )
    (mini,), (moved,) = (updater.compute_logprobs([each]) for each in (mini, moved))
    assert torch.equal(mini.rows.ref_logprobs, moved.rows.ref_logprobs)
    assert (mini.rows.old_logprobs - moved.rows.old_logprobs).abs().max() > 0.1


def test_gradients_by_passes_of_their_own_replay_too(layout):
    config = moe_config("rollout")
    config.mtp.preset = "occ_exact"
    exact = rl_config(
        "occ_exact",
        4,
        "mtp.trunk.exact={every: 1, pairs: same, metric: euclidean}",
        "mtp.trunk.lambda_plus=1",
    ).mtp
    config.mtp.trunk, config.mtp.head = exact.trunk, exact.head
    actor, updater = actor_and_updater(layout, config)
    prompts, found = rollout(actor)
    (mini,) = updater.compute_logprobs([as_mini_batch(prompts, found)])
    metrics = updater.run_update(mini).metrics
    assert metrics["routing/replaced"] == metrics["routing/replaced_mtp"] == 0
    elsewhere = mini.with_routes((1 + (mini.rows.routes.long() + 2) % 16).to(torch.uint8))
    moved = updater.run_update(elsewhere).metrics
    assert moved["routing/replaced"] > 0.5
    assert moved["exact/norm_squared_1"] != pytest.approx(metrics["exact/norm_squared_1"], rel=0.01)


def test_vocabulary_is_that_of_the_other_tests():
    assert int(random_ids(8, 12).max()) < VOCABULARY
