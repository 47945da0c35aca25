"""A run stopped and resumed is the run that never stopped, bit for bit."""

from __future__ import annotations

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_occ import pretraining
from megatron_occ.mcore.checkpoint import list_checkpoints
from megatron_occ.mcore.startup import initialize, shutdown
from megatron_occ.rl import trainer
from tests.e2e.conftest import metrics


class Killed(BaseException):
    """Stands for a signal: nothing in the product catches it."""


def kill_after(monkeypatch, trainer_class, step):
    original = trainer_class.run_step

    def run_step(self):
        if self.step == step:
            raise Killed
        return original(self)

    monkeypatch.setattr(trainer_class, "run_step", run_step)


def tensors(folder, phase):
    """All tensors of the newest checkpoint, read without a model."""
    path = str(list_checkpoints(folder / "checkpoints" / phase)[-1][1])
    initialize()
    state = dist_checkpointing.load_plain_tensors(path)
    common = dist_checkpointing.load_common_state_dict(path)
    shutdown()
    return state, common


SETTINGS = {
    "rl": ("pretrain.steps=6", "rl.steps=4", "mtp.preset=occ_decoupled", "mtp.trunk.ema=0.5"),
    "pretrain": ("pretrain.steps=8", "pretrain.save_every=2", "pretrain.log_every=1"),
}


@pytest.mark.parametrize(
    ("phase", "trainer_class", "step"),
    [("rl", trainer.GRPOTrainer, 3), ("pretrain", pretraining.PretrainTrainer, 5)],
)
def test_resumed_run_equals_undisturbed_run(run, monkeypatch, phase, trainer_class, step):
    whole = run(phase, "whole", *SETTINGS[phase])
    with monkeypatch.context() as patched:
        kill_after(patched, trainer_class, step)
        with pytest.raises(Killed):
            run(phase, "cut", *SETTINGS[phase])
    cut = run(phase, "cut", "--resume", *SETTINGS[phase])

    for name in ("pretrain", "rl", "validation"):
        assert metrics(cut, name) == metrics(whole, name)
    (state, common), (expected, expected_common) = tensors(cut, phase), tensors(whole, phase)
    assert state.keys() == expected.keys()
    assert any("exp_avg_sq" in name for name in state)
    for name, value in expected.items():
        pairs = value.items() if name.startswith("rng") else [("", value)]
        found = state[name] if name.startswith("rng") else {"": state[name]}
        assert all(torch.equal(found[key], tensor) for key, tensor in pairs), name
    assert common["trainer"].keys() == expected_common["trainer"].keys()
    assert str(common["trainer"]) == str(expected_common["trainer"])
    if phase == "rl":
        assert (cut / "rollouts.jsonl").read_text() == (whole / "rollouts.jsonl").read_text()
