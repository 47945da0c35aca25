"""The reference policy: kept, in place for a pass, in checkpoints where it moves."""

from __future__ import annotations

import pytest
import torch

from megatron_occ.config import load_config
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint import load_checkpoint, sharded_state
from tests.mcore.conftest import VOCABULARY, write_checkpoint

SMALL = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=48",
    "model.num_attention_heads=4",
)
DESCRIPTION = {"model": "small"}
MOVES = ("rl.loss.kl_coefficient=0.1", "rl.loss.kl_reference_every=3")


def make_actor(layout, *settings):
    config = load_config([], [*SMALL, "mtp.num_layers=1", *settings])
    return MegatronGPTActor(
        config, VOCABULARY, layout, optimizer=config.rl.optimizer, total_updates=10
    )


def move(actor, by):
    with torch.no_grad():
        for number, parameter in enumerate(actor.chunks[0].parameters()):
            parameter.add_(by * (number + 1))


def weights(actor):
    return {name: p.clone() for name, p in actor.chunks[0].named_parameters()}


def reference(actor):
    with actor.reference.in_place():
        return weights(actor)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_stays_while_the_policy_moves_and_gives_its_place_back(layout):
    actor = make_actor(layout)
    before = weights(actor)
    actor.keep_reference()
    move(actor, 0.01)
    after = weights(actor)
    assert same(reference(actor), before)
    assert same(weights(actor), after)
    with pytest.raises(ZeroDivisionError), actor.reference.in_place():
        1 / 0  # noqa: B018
    assert same(weights(actor), after)
    actor.keep_reference()
    assert same(reference(actor), after)


@pytest.mark.parametrize("swiglu", [(), ("model.moe.num_experts=4",)])
def test_one_that_moves_comes_back_from_a_checkpoint(layout, tmp_path, swiglu):
    actor, other = (make_actor(layout, *MOVES, *swiglu) for _ in range(2))
    move(actor, 0.01)
    actor.keep_reference()
    kept = weights(actor)
    move(actor, 0.02)
    path = write_checkpoint(tmp_path, 7, actor, {}, DESCRIPTION)
    other.keep_reference()
    load_checkpoint(path, other, DESCRIPTION)
    assert same(weights(other), weights(actor))
    assert same(reference(other), kept)


@pytest.mark.parametrize("settings", [MOVES[:1], ()])
def test_one_that_stays_is_not_written(layout, settings):
    actor = make_actor(layout, *settings)
    actor.keep_reference()
    assert "reference" not in sharded_state(actor, loading=False)


def test_pretraining_has_none(layout):
    assert "reference" not in sharded_state(make_actor(layout, *MOVES), loading=False)
