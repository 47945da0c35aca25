"""Scales and histories of delayed scaling in checkpoints, on modules like TransformerEngine's."""

from __future__ import annotations

import json
from types import MethodType, SimpleNamespace

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import nn

from megatron_occ.config import load_config
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint import load_checkpoint, model_state
from megatron_occ.mcore.fp8_state import has_scaling_state, load_scaling_state, scaling_state
from tests.mcore.conftest import VOCABULARY, small_config, write_checkpoint

HISTORY = 4


class Scaled(nn.Linear):
    """Has what a module of TransformerEngine has once it ran in FP8, and refuses its pickle."""

    def __init__(self, gemms=1):
        super().__init__(3, 3)
        self.fp8_meta = {"num_gemms": 0}
        self.gemms = gemms

    def init_fp8_meta_tensors(self, recipe):
        self.fp8_meta["recipe"] = recipe
        for name, each in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            count = each * self.fp8_meta["num_gemms"]
            state = SimpleNamespace(
                scale=torch.ones(count), amax_history=torch.zeros(HISTORY, count)
            )
            self.fp8_meta.setdefault(name, state)

    def ran(self):
        self.fp8_meta["num_gemms"] = self.gemms
        self.init_fp8_meta_tensors("delayed")
        for name in ("scaling_fwd", "scaling_bwd"):
            for tensor in vars(self.fp8_meta[name]).values():
                tensor.copy_(torch.rand_like(tensor))
        return self

    def get_extra_state(self):
        return torch.ones(5, dtype=torch.uint8)

    def set_extra_state(self, state):
        assert state is None, "a pickle"


def chunks(*, ran):
    layers = [Scaled(), Scaled(gemms=4), nn.Linear(2, 2), Scaled()]
    if ran:
        layers[0].ran()
        layers[1].ran()
    return [nn.Sequential(*layers[:2]), nn.Sequential(*layers[2:])]


def test_states_come_back_where_they_were():
    before, after = chunks(ran=True), chunks(ran=False)
    state = scaling_state(before)
    # of each direction a scale and a history; the last module never ran
    assert len(state) == 2 * 4
    load_scaling_state(after, state, "delayed")
    found = scaling_state(after)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert after[0][1].fp8_meta["num_gemms"] == 4
    assert "scaling_fwd" not in after[1][1].fp8_meta


def test_tensors_that_modules_hold_are_filled_not_replaced():
    """TransformerEngine's global buffers refer to them."""
    before, after = chunks(ran=True), chunks(ran=True)
    held = after[0][0].fp8_meta["scaling_fwd"].amax_history
    load_scaling_state(after, scaling_state(before), "delayed")
    assert torch.equal(held, before[0][0].fp8_meta["scaling_fwd"].amax_history)


def test_a_state_of_another_model_is_refused():
    state = scaling_state(chunks(ran=True))
    with pytest.raises(ValueError, match=r"modules that this model lacks: \['0\.1\.scaling"):
        load_scaling_state([chunks(ran=True)[0][:1]], state, "delayed")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((), False),
        (("fp8.format=hybrid", "fp8.scaling=delayed"), True),
        (("fp8.format=hybrid", "fp8.scaling=current"), False),
    ],
)
def test_only_delayed_scaling_has_a_state(settings, expected):
    assert has_scaling_state(load_config([], ["precision=bf16", *settings])) is expected


DESCRIPTION = {"model": "small"}


@pytest.fixture
def actor(layout):
    """A policy whose configuration asks for delayed scaling, with one layer that has run so."""
    config = small_config(1)
    actor = MegatronGPTActor(
        config, VOCABULARY, layout, optimizer=config.rl.optimizer, total_updates=10
    )
    actor.finish_training_step()
    config.fp8.format, config.fp8.scaling = "hybrid", "delayed"
    layer = actor.chunks[0].decoder.layers[0].self_attention.linear_proj
    layer.fp8_meta, layer.gemms = {"num_gemms": 0}, 1
    for method in (Scaled.init_fp8_meta_tensors, Scaled.ran):
        setattr(layer, method.__name__, MethodType(method, layer))
    layer.ran()
    return actor


def change_meta(path, **changes):
    file = path / "meta.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_resumed_run_has_the_scales_of_the_undisturbed_one(actor, tmp_path):
    path = write_checkpoint(tmp_path, 1, actor, {}, DESCRIPTION)
    state = scaling_state(actor.chunks)
    for tensor in state.values():
        assert tensor.unique().numel() > 1
    actor.chunks[0].decoder.layers[0].self_attention.linear_proj.ran()
    load_checkpoint(path, actor, DESCRIPTION)
    found = scaling_state(actor.chunks)
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("change", [{"fp8_scaling": False}, {"layout": {"world_size": 2}}])
def test_histories_begin_anew_where_they_do_not_fit(actor, tmp_path, change):
    path = write_checkpoint(tmp_path, 1, actor, {}, DESCRIPTION)
    change_meta(path, **change)
    actor.chunks[0].decoder.layers[0].self_attention.linear_proj.ran()
    state = scaling_state(actor.chunks)
    load_checkpoint(path, actor, DESCRIPTION)
    found = scaling_state(actor.chunks)
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_nothing_but_tensors_of_a_model_is_written_or_read(actor):
    parts = [part for chunk in model_state(actor).values() for part in chunk.values()]
    assert parts
    assert not any(isinstance(part, ShardedObject) for part in parts)
