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


def contents(folder, phase):
    """Everything in the newest checkpoint by key, read without a model."""
    initialize()
    path = str(list_checkpoints(folder / "checkpoints" / phase)[-1][1])
    state = dist_checkpointing.load_plain_tensors(path)
    shutdown()
    return dict(flatten(state))


def flatten(value, prefix=""):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flatten(item, f"{prefix}/{key}")
    else:
        yield prefix, value


SETTINGS = {
    "rl": ("rl.steps=4", "mtp.preset=occ_decoupled", "mtp.trunk.ema=0.5"),
    "pretrain": ("pretrain.steps=8", "pretrain.save_every=2", "pretrain.log_every=1"),
}


@pytest.mark.parametrize(
    ("phase", "trainer_class", "step"),
    [("rl", trainer.GRPOTrainer, 3), ("pretrain", pretraining.PretrainTrainer, 5)],
)
def test_resumed_run_equals_undisturbed_run(
    run, pretrained, monkeypatch, phase, trainer_class, step
):
    settings = SETTINGS[phase]
    if phase == "rl":
        settings += (f"rl.init_from={pretrained(1)}", "rl.loss.kl_coefficient=0.01")
    whole = run(phase, "whole", *settings)
    with monkeypatch.context() as patched:
        kill_after(patched, trainer_class, step)
        with pytest.raises(Killed):
            run(phase, "cut", *settings)
    cut = run(phase, "cut", "--resume", *settings)

    assert phase != "rl" or any(line["reward/mean"] > 0 for line in metrics(whole, "rl"))
    for name in ("pretrain", "rl", "validation"):
        assert metrics(cut, name) == metrics(whole, name)
    state, expected = contents(cut, phase), contents(whole, phase)
    assert state.keys() == expected.keys()
    for part in ("exp_avg_sq", "trainer", "common_step", "decoder", "mtp"):
        assert any(part in key for key in expected), part
    for key, value in expected.items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(state[key], value), key
    if phase == "rl":
        assert (cut / "rollouts.jsonl").read_text() == (whole / "rollouts.jsonl").read_text()


def test_a_refused_resume_leaves_the_folder_as_it_was(run):
    folder = run("pretrain", "run", "pretrain.steps=6")
    before = (folder / "config.yaml").read_text()
    with pytest.raises(SystemExit, match="seed was 0, is 1"):
        run("pretrain", "run", "pretrain.steps=6", "--resume", "seed=1")
    assert (folder / "config.yaml").read_text() == before


def test_a_longer_run_resumes_from_the_shorter_one(run):
    folder = run("rl", "run", "pretrain.steps=6", "rl.steps=1")
    run("rl", "run", "pretrain.steps=6", "rl.steps=2", "--resume")
    assert [line["step"] for line in metrics(folder, "rl")] == [1, 2]
    assert [line["step"] for line in metrics(folder, "pretrain")] == [6]
