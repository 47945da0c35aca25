"""``rl.train_trunk=false`` on the real model: the trunk stays bit for bit and has no graph."""

from __future__ import annotations

import pytest
import torch

from megatron_occ.config import load_config
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.rl.batch import MiniBatch, RolloutBatch
from megatron_occ.rl.calibration import regime_from
from megatron_occ.rl.head_update import build_updater
from tests.mcore.conftest import VOCABULARY, random_ids, small_config

DETACHED = ("mtp.trunk.signal=none", "mtp.trunk.coefficient=fixed", "mtp.head.weight=1.0")
MOE = dict(num_experts=4, top_k=2, ffn_hidden_size=16, score_function="sigmoid", expert_bias=True)


def make(layout, *overrides, change=lambda config: None):
    chosen = load_config([], ["mtp.head.signal=soft_ce", *DETACHED, *overrides])
    config = small_config(depths=2)
    config.mtp.trunk, config.mtp.head, config.rl = chosen.mtp.trunk, chosen.mtp.head, chosen.rl
    config.rl.optimizer.lr, config.rl.optimizer.weight_decay = 1e-2, 0.5
    change(config)
    torch.manual_seed(0)
    actor = MegatronGPTActor(
        config,
        VOCABULARY,
        layout,
        optimizer=config.rl.optimizer,
        total_updates=100,
        train_head=regime_from(config.mtp).trains_head,
        train_trunk=config.rl.train_trunk,
    )
    return actor, build_updater(config, actor)


def mini_batch(updater, size=2, lengths=None):
    ids, mask = random_ids(4, 14), torch.zeros(4, 14)
    for row in range(4):
        mask[row, 3 : 14 - row] = 1.0
    rows = RolloutBatch(ids, mask, torch.zeros(ids.shape), torch.zeros(4))
    cut = MiniBatch.padded(rows, size) if lengths is None else MiniBatch(rows, [4], lengths)
    return updater.compute_logprobs([cut])[0]


def state(actor):
    """Weights and buffers."""
    tensors = {**dict(actor.chunks[0].named_parameters()), **dict(actor.chunks[0].named_buffers())}
    return {name: value.detach().clone() for name, value in tensors.items()}


def moe(config):
    config.model.tie_embeddings = False
    for name, value in MOE.items():
        setattr(config.model.moe, name, value)


def sixteen_bits(config):
    config.precision = "bf16"


def split(config):
    config.parallel.distributed_optimizer = config.parallel.overlap_grad_reduce = True


def split_sixteen_bits(config):
    sixteen_bits(config)
    split(config)


def recompute(config):
    config.recompute = "full"


CHANGES = [moe, sixteen_bits, split, split_sixteen_bits, recompute]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("signal", ["soft_ce", "tv"])
def test_the_head_learns_and_all_else_stays_bit_for_bit(layout, signal, change):
    settings = ("rl.train_trunk=false", f"mtp.head.signal={signal}")
    actor, updater = make(layout, *settings, change=change)
    before = state(actor)
    batch = mini_batch(updater)
    updates = [updater.run_update(batch).metrics for _ in range(8)]
    for name, value in state(actor).items():
        if not name.startswith("mtp."):
            assert torch.equal(value, before[name]), name
        elif value.dim() == 2 and "router" not in name:
            assert not torch.equal(value, before[name]), name
    for depth in (1, 2):
        assert updates[-1][f"loss/head_mtp_{depth}"] < updates[0][f"loss/head_mtp_{depth}"]
    assert updates[0]["grad_norm/trunk"] == 0 < updates[0]["grad_norm/head"]


def test_only_the_head_has_gradients_and_optimizer_state(layout):
    actor, updater = make(layout, "rl.train_trunk=false")
    updater.run_update(mini_batch(updater))
    head = {id(p) for p in actor.chunks[0].mtp.parameters()}
    owned = {id(p) for p in actor.optimizer.megatron.get_parameters()}
    assert owned == head
    assert {id(p) for p in actor.optimizer.megatron.chained_optimizers[0].optimizer.state} == head
    held = sum(b.numel_unpadded for b in actor.wrapped[0].buffers)
    assert held == sum(p.numel() for p in actor.chunks[0].mtp.parameters())


@pytest.mark.parametrize("lengths", [None, [14, 13, 12, 11]], ids=["padded", "packed"])
def test_the_gradient_is_that_of_the_head_next_to_a_trained_trunk(layout, lengths):
    grads = []
    for train_trunk in ("true", "false"):
        actor, updater = make(layout, f"rl.train_trunk={train_trunk}")
        updater.run_update(mini_batch(updater, lengths=lengths))
        named = actor.chunks[0].mtp.named_parameters()
        grads.append({name: p.main_grad.clone() for name, p in named})
    assert any(g.any() for g in grads[0].values())
    for name, expected in grads[0].items():
        torch.testing.assert_close(grads[1][name], expected, atol=1e-7, rtol=1e-5, msg=name)


def test_nothing_before_the_head_is_in_a_graph(layout):
    actor, updater = make(layout, "rl.train_trunk=false")
    model, seen = actor.chunks[0], []
    for module in (model.embedding, *model.decoder.layers):
        module.register_forward_hook(
            lambda module, arguments, output: seen.append(
                (output[0] if isinstance(output, tuple) else output).requires_grad
            )
        )
    updater.run_update(mini_batch(updater))
    assert seen
    assert not any(seen)
