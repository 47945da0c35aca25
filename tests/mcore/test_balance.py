"""The balance loss of experts on one process: its gradient, where it acts, and what it does.

Other layouts: ``test_layouts.py``.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_occ.config import load_config
from megatron_occ.losses.heads import LossReport
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.balance import BalanceTerm
from megatron_occ.mcore.micro_batches import MiniBatchPlacer
from megatron_occ.mcore.placement import place_packed
from megatron_occ.rl.batch import MiniBatch, RolloutBatch, route_dtype
from megatron_occ.rl.head_update import build_updater
from megatron_occ.rl.pretraining import PretrainTrainer
from tests.mcore.conftest import VOCABULARY, assert_same_up_to_rounding, random_ids, small_config
from tests.mcore.simulated_cuda import CUDA, simulated_cuda
from tests.unit.test_losses_balance import naive

SOFTMAX = dict(num_experts=8, top_k=2, ffn_hidden_size=16, first_dense_layers=1)
SIGMOID = dict(SOFTMAX, score_function="sigmoid", expert_bias=True)
GROUPS = dict(SIGMOID, groups=4, top_groups=2)
ENDS = torch.tensor([9, 2, 12, 5])
COUPLED, APART = ((True, True),), ((True, False), (False, True))


def moe_config(settings, *overrides):
    config = small_config(depths=2)
    chosen = load_config([], list(overrides))
    config.rl, config.pretrain, config.mtp = chosen.rl, chosen.pretrain, chosen.mtp
    config.mtp.num_layers, config.model.num_layers = 2, 3
    config.recompute = chosen.recompute
    for name, value in settings.items():
        setattr(config.model.moe, name, value)
    return config


def build(layout, config, balance_loss=0.7, **more):
    torch.manual_seed(0)
    config.rl.balance_loss = balance_loss
    actor = MegatronGPTActor(
        config,
        VOCABULARY,
        layout,
        optimizer=config.rl.optimizer,
        total_updates=10,
        balance_loss=balance_loss,
        **more,
    )
    for router in routers(actor):
        if router.expert_bias is not None:
            router.expert_bias.copy_(torch.linspace(-0.2, 0.2, router.expert_bias.numel()))
    return actor


def routers(actor):
    return [module for module in actor.chunks[0].modules() if hasattr(module, "routing")][1:]


def nothing(outputs, _payload):
    """A loss of 0 that reaches every part of the graph."""
    parts = [part.sum() for part in (outputs.logprobs, *outputs.passes) if part is not None]
    return 0.0 * torch.stack(parts).sum(), LossReport()


def batches(actor, passes, sizes=(4,), *, packed=False, routes=None, states=None):
    """Four rows of other lengths whose padding differs from one call to the next."""
    noise = random_ids(4, 14, seed=sum(sizes) + len(sizes))
    inside = torch.arange(14) < ENDS.unsqueeze(1)
    ids = torch.where(inside, random_ids(4, 14), noise)
    made, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        width = int(ENDS[rows].max()) if packed else 14
        made.append(
            actor.micro_batch(
                ids[rows, :width],
                None,
                lengths=ENDS[rows].tolist() if packed else None,
                passes=passes,
                ends=ENDS[rows],
                routes=None if routes is None else routes[rows, :width],
                states=states,
            )
        )
        start += size
    return made


def gradients_of(actor):
    parameters = actor.chunks[0].named_parameters()
    return {name: p.main_grad.clone() for name, p in parameters if p.requires_grad}


def balance_gradients(actor, *arguments, **named):
    actor.get_loss_and_metrics(batches(actor, *arguments, **named), nothing)
    return gradients_of(actor)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        difference = float((found[name] - gradient).abs().max())
        assert difference <= 2e-6 * max(scale, float(gradient.abs().max())), name


def by_hand(actor, passes, coefficient, routes=None):
    """Gradients and mean losses (trunk, MTP) from what routers read, in plain torch."""
    config, seen, moved = actor.config, [], []

    def see(router, inputs, output):
        logits = inputs[0].float() @ router.weight.float().t()
        highest = logits.topk(config.model.moe.top_k, dim=-1).indices
        asked = torch.zeros_like(logits).scatter(-1, highest, 1.0).flatten(0, 1)
        seen.append((logits, asked))
        # what a bias, groups and replay make of it is no part of the formula
        moved.append(bool((asked.bool() != output[1].bool()).any()))

    hooks = [router.register_forward_hook(see) for router in routers(actor)]
    placer = MiniBatchPlacer(config, actor.layout)
    (batch,) = placer.place(batches(actor, passes, routes=routes))
    places = torch.arange(batch.ids.size(1)).expand_as(batch.ids)
    actor.chunks[0](batch.ids, places, None, request=batch.request)
    for hook in hooks:
        hook.remove()
    moe, found = config.model.moe, []
    assert any(moved) == (moe.expert_bias or routes is not None)
    for number, (logits, chosen) in enumerate(seen):
        # two in the trunk, then one for each depth; the frozen copy of MTP layers is not seen
        depth = max(0, number - 1)
        rows = torch.arange(4).expand(logits.size(0), 4).flatten()
        position = torch.arange(logits.size(0)).repeat_interleave(4)
        lengths = (ENDS - depth).clamp(min=0)
        owner = torch.where(position < lengths[rows], rows, 4)
        total = naive(
            logits.flatten(0, 1).double(), chosen, owner, lengths, moe.top_k, moe.score_function
        )
        found.append((total, lengths.sum()))
    parameters = dict(actor.chunks[0].named_parameters())
    gradients = torch.autograd.grad(
        coefficient * sum(total / tokens for total, tokens in found),
        list(parameters.values()),
        allow_unused=True,
    )
    pairs = zip(parameters.items(), gradients, strict=True)
    sums = [[sum(pair) for pair in zip(*part, strict=True)] for part in (found[:2], found[2:])]
    means = [float(total.detach() / tokens) for total, tokens in sums]
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}, means


@pytest.mark.parametrize("passes", [COUPLED, APART], ids=["coupled", "apart"])
@pytest.mark.parametrize("settings", [SOFTMAX, SIGMOID, GROUPS], ids=["softmax", "bias", "groups"])
def test_gradients_of_the_whole_model_are_those_of_the_formula(layout, settings, passes):
    actor = build(layout, moe_config(settings))
    expected, (trunk, head) = by_hand(actor, passes, 0.7)
    found = balance_gradients(actor, passes)
    assert_same(found, expected)
    reached = {name for name, gradient in found.items() if gradient.abs().max() > 1e-6}
    assert {"decoder.layers.2.mlp.router.weight", "embedding.word_embeddings.weight"} <= reached
    # experts of the last layer come behind all trunk routers: MTP layers read them
    experts = any(name.startswith("decoder.layers.2.mlp.experts.") for name in reached)
    assert experts == (passes == COUPLED)
    metrics = actor.pop_routing_metrics()
    assert metrics["routing/balance"] == pytest.approx(trunk, rel=1e-5)
    assert metrics["routing/balance_mtp"] == pytest.approx(head, rel=1e-5)
    assert 1 < trunk < 4
    assert actor.pop_routing_metrics() == {}


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_it_does_not_depend_on_the_cut_on_packing_or_on_padding(layout, recompute):
    actor = build(layout, moe_config(SIGMOID, f"recompute={recompute}"))
    whole = balance_gradients(actor, COUPLED)
    balance = actor.pop_routing_metrics()
    for sizes, packed in (((1, 1, 1, 1), False), ((4,), True), ((1, 3), True), ((2, 2), False)):
        assert_same(balance_gradients(actor, COUPLED, sizes, packed=packed), whole)
        for name, value in actor.pop_routing_metrics().items():
            assert value == pytest.approx(balance[name], rel=1e-5), name


def test_recompute_changes_nothing(layout):
    actor = build(layout, moe_config(SIGMOID))
    expected = balance_gradients(actor, APART, (1, 2, 1))
    weights = actor.chunks[0].state_dict()
    again = build(layout, moe_config(SIGMOID, "recompute=full"))
    again.chunks[0].load_state_dict(weights)
    assert_same(balance_gradients(again, APART, (1, 2, 1)), expected)
    assert again.pop_routing_metrics() == pytest.approx(actor.pop_routing_metrics(), rel=1e-6)


def test_it_counts_the_highest_scores_and_not_the_experts_that_were_replayed(layout):
    actor = build(layout, moe_config(SIGMOID, "rl.routing_replay=rollout"))
    generator = torch.Generator().manual_seed(4)
    made = 1 + torch.rand(4, 14, 4, 8, generator=generator).topk(2, dim=3).indices
    routes = made.to(route_dtype(8))
    expected, (trunk, _) = by_hand(actor, COUPLED, 0.7, routes)
    found = balance_gradients(actor, COUPLED, (2, 2), routes=routes)
    assert_same(found, expected)
    assert actor.pop_routing_metrics()["routing/balance"] == pytest.approx(trunk, rel=1e-5)


def test_several_passes_of_the_head_count_once(layout):
    actor = build(layout, moe_config(SIGMOID))
    once = balance_gradients(actor, ((False, True),))
    twice = balance_gradients(actor, ((False, True), (False, True)))
    assert_same(twice, once)
    metrics = actor.pop_routing_metrics()
    assert metrics.keys() == {"routing/balance", "routing/balance_mtp"}
    # without a pass that trains the head its routers have none
    none = balance_gradients(actor, ((True, False),))
    assert actor.pop_routing_metrics().keys() == {"routing/balance"}
    for name, gradient in none.items():
        assert gradient.abs().max() == 0 or not name.startswith("mtp."), name
        if not name.startswith("mtp."):
            assert_same_up_to_rounding(gradient, once[name])


def test_kept_states_train_mtp_layers_and_leave_the_trunk_s_loss_alone(layout):
    actor = build(layout, moe_config(SIGMOID))
    (trunk,) = batches(actor, ())
    states = torch.randn(4, 14, 32, generator=torch.Generator().manual_seed(5))
    (kept,) = batches(actor, ((False, True),), states=states)
    found = []
    for made in ([trunk], [kept], [kept, trunk]):
        actor.get_loss_and_metrics(made, nothing)
        found.append((gradients_of(actor), actor.pop_routing_metrics()))
    (alone, trunk_metrics), (head, head_metrics), (both, metrics) = found
    assert_same(both, {name: head[name] if "mtp." in name else alone[name] for name in both})
    assert all(part.abs().max() == 0 for name, part in head.items() if "mtp." not in name)
    assert metrics == {**trunk_metrics, **head_metrics}
    assert metrics.keys() == {"routing/balance", "routing/balance_mtp"}


def rows_for_rl():
    mask = torch.zeros(4, 14)
    for row, end in enumerate((9, 4, 12, 7)):
        mask[row, 3:end] = 1.0
    return RolloutBatch(random_ids(4, 14), mask, -3 * mask, torch.tensor([1.0, -0.5, 0.3, -1.0]))


def rl_update(layout, balance_loss, *overrides, **more):
    """Gradients and metrics of an update of RL, and the actor."""
    config = moe_config(SIGMOID, *overrides)
    actor = build(layout, config, balance_loss, **more)
    updater = build_updater(config, actor)
    (mini,) = updater.compute_logprobs([MiniBatch.padded(rows_for_rl(), 2)])
    assert actor.pop_routing_metrics() == {}, "log-probs have no balance loss"
    return updater.run_update(mini).metrics, gradients_of(actor), actor


def test_an_update_of_rl_has_it_besides_its_own_losses(layout):
    arguments = ("mtp.preset=detach", "rl.optimizer.clip_grad=0", "mtp.head.clip_grad=0")
    metrics, plain, actor = rl_update(layout, 0.0, *arguments)
    assert not any(router._forward_hooks for router in routers(actor))
    assert not any(name.startswith("routing/") for name in metrics)
    balanced, found, actor = rl_update(layout, 0.7, *arguments)
    assert balanced["routing/balance"] > 1
    for name, value in metrics.items():
        assert balanced[name] == value or name.startswith("grad_norm/"), name
    rows = rows_for_rl()
    alone = build(layout, actor.config)
    one = alone.micro_batch(rows.ids, None, passes=((False, True),), ends=rows.lengths())
    alone.get_loss_and_metrics([one], nothing)
    added = gradients_of(alone)
    difference = {name: gradient - plain[name] for name, gradient in found.items()}
    scale = max(float(gradient.abs().max()) for gradient in plain.values())
    for name, gradient in added.items():
        assert (difference[name] - gradient).abs().max() <= 1e-6 * max(scale, 1), name


@pytest.mark.parametrize(
    "term", [None, "rl.loss.kl_coefficient=0.1", "rl.loss.entropy_coefficient=0.1"]
)
def test_an_update_of_rl_without_anything_to_learn_from_moves_no_trunk(layout, term):
    terms = ["rl.optimizer.warmup_steps=0"] + ([term] if term else [])
    config = moe_config(SIGMOID, "mtp.preset=detach", *terms)
    actor = build(layout, config)
    actor.keep_reference()
    updater, rows = build_updater(config, actor), rows_for_rl()
    rows = replace(rows, advantages=torch.zeros(4))
    (mini,) = updater.compute_logprobs([MiniBatch.padded(rows, 2)])
    before = {name: value.detach().clone() for name, value in actor.chunks[0].named_parameters()}
    metrics = updater.run_update(mini).metrics
    moved = {
        name.startswith("mtp.")
        for name, value in actor.chunks[0].named_parameters()
        if not torch.equal(value, before[name])
    }
    # the head trains by its own loss
    assert moved == ({True} if term is None else {True, False})
    assert ("routing/balance" in metrics) == (term is not None)
    assert (metrics["grad_norm/trunk"] == 0) == (term is None)


def test_gradients_that_are_measured_do_not_have_it(layout):
    def taken(balance_loss):
        actor = build(layout, moe_config(SIGMOID), balance_loss)

        def loss(outputs, _payload):
            return outputs.logprobs.mean() + outputs.passes[0].mean(), LossReport()

        gradient, _ = actor.get_gradient(batches(actor, COUPLED, (2, 2)), loss, head=True)
        assert actor.pop_routing_metrics() == {}
        return gradient.parts

    pairs = list(zip(taken(0.0), taken(0.7), strict=True))
    assert any(part.abs().max() > 0 for part, _ in pairs)
    assert all(torch.equal(part, other) for part, other in pairs)


def test_the_trunk_s_routers_have_none_where_the_trunk_is_frozen(layout):
    overrides = ("mtp.preset=head_only", "rl.train_trunk=false")
    _, plain, _ = rl_update(layout, 0.0, *overrides, train_trunk=False)
    metrics, found, _ = rl_update(layout, 0.7, *overrides, train_trunk=False)
    assert metrics.keys() & {"routing/balance", "routing/balance_mtp"} == {"routing/balance_mtp"}
    assert all(name.startswith("mtp.") for name in found)
    router = "mtp.layers.1.mtp_model_layer.mlp.router.weight"
    assert router in found or "mtp.layers.1.transformer_layer.mlp.router.weight" in found
    assert any((found[n] - plain[n]).abs().max() > 1e-4 for n in found if "router.weight" in n)


class _Text:
    """A corpus of fixed rows."""

    def batch(self, step, size, length):
        ids = random_ids(size, length, seed=100 + step % 3)
        mask = torch.ones(ids.shape)
        mask[:, 0] = 0
        mask[::2, length - 3 :] = 0
        return ids, mask


def pretrained(layout, balance_loss):
    """Share of the tokens at the busiest expert, over the trunk's routers, after 40 updates."""
    settings = ("batch_size=8", "micro_batch_size=4", "sequence_length=14", "optimizer.lr=0.003")
    config = moe_config(SOFTMAX, *(f"pretrain.{item}" for item in settings))
    config.model.moe.top_k, config.rl.optimizer = 2, config.pretrain.optimizer
    actor = build(layout, config, balance_loss)
    trainer = PretrainTrainer(config, actor, _Text(), validate=None, logger=None, save=None)
    for trainer.step in range(40):
        metrics = trainer.run_step()
    loads = []
    hooks = [
        router.register_forward_hook(lambda _r, _i, output: loads.append(output[1].sum(0)))
        for router in routers(actor)[:2]
    ]
    ids, _ = _Text().batch(0, 8, 14)
    actor.get_inference_log_probs(ids, parts=[range(8)], lengths=None, temperature=1.0)
    for hook in hooks:
        hook.remove()
    return max(float(load.max() / load.sum()) for load in loads), metrics


def test_pretraining_with_it_ends_with_a_more_even_load(layout):
    # so small a coefficient measures and changes nothing
    busiest, without = pretrained(layout, 1e-9)
    with_it, metrics = pretrained(layout, 0.3)
    assert metrics["routing/balance"] < 1.1 < 1.2 < without["routing/balance"]
    # an eighth is even
    assert with_it < 0.17 < 0.185 < busiest
    # and it learns all the same, from 3.1 = ln 23
    assert metrics["loss/main"] < 0.5


def test_what_it_computes_lies_on_the_device_and_the_host_does_not_wait(layout):
    actor = build(layout, moe_config(SIGMOID))
    balance, (router, *_) = actor.chunks[0].balance, routers(actor)
    with simulated_cuda() as mode:
        placement = place_packed((4, 14), ENDS.tolist(), CUDA, multiple=4)
        term = BalanceTerm(ENDS.cuda(), torch.tensor([0.1, 0.2, 0.3]).cuda())
        scores = torch.randn(placement.local.numel(), 8).cuda()
        chosen = scores > 0.5
        # its weights are on the host
        stand_in = SimpleNamespace(
            gating=lambda inputs: inputs * 2.0,
            topk=2,
            score_function="sigmoid",
            config=router.config,
            cp_group=router.cp_group,
        )
        mode.waits.clear()
        balance.begin(term, placement, trains=True)
        balance.begin_depths(term, placement, trains=True)
        hook = balance._depths[1]
        weights, _ = hook(stand_in, (scores.unsqueeze(1).requires_grad_(),), (scores, chosen))
        assert not mode.waits
        assert weights.device == hook.sums.device == CUDA
        assert float(balance.pop_sums()[1, 1]) == float((ENDS - 2).clamp(min=0).sum())


def test_a_mini_batch_that_failed_leaves_nothing_to_run_again(layout):
    actor = build(layout, moe_config(SIGMOID, "recompute=full"))

    def broken(_outputs, _payload):
        raise RuntimeError("in the loss")

    with pytest.raises(RuntimeError, match="in the loss"):
        actor.get_loss_and_metrics(batches(actor, COUPLED, (1, 3)), broken)
    found = balance_gradients(actor, COUPLED)
    fresh = build(layout, moe_config(SIGMOID, "recompute=full"))
    assert_same(found, balance_gradients(fresh, COUPLED))
