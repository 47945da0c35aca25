"""Initial weights are drawn once: nowhere where a checkpoint overwrites them."""

from __future__ import annotations

import pytest

from megatron_occ.mcore import provider
from megatron_occ.rl.pretraining import PretrainTrainer
from tests.e2e.conftest import Killed, kill_after

STEPS = ("pretrain.steps=4", "pretrain.save_every=2", "rl.steps=1", "rl.prompts_per_step=2")
SHORT = (*STEPS, "pretrain.optimizer.warmup_steps=0", "rl.validation.problems=1")


@pytest.fixture
def drawn(monkeypatch):
    """Whether each trained model that is built is drawn, in order."""
    found, own = [], provider.transformer_config

    def noted(config, *, draws=True):
        found.append(draws)
        return own(config, draws=draws)

    monkeypatch.setattr(provider, "transformer_config", noted)
    return found


def test_weights_are_drawn_once_in_the_life_of_a_run(run, drawn, monkeypatch):
    with monkeypatch.context() as patch:
        kill_after(patch, PretrainTrainer, 3)
        with pytest.raises(Killed):
            run("rl", "run", *SHORT)
    assert drawn == [True]
    # the rest of pretraining, and RL from its weights
    folder = run("rl", "run", *SHORT, "--resume")
    assert drawn == [True, False, False]
    checkpoint = folder / "checkpoints" / "pretrain" / "step_000004"
    run("rl", "other", *SHORT, f"rl.init_from={checkpoint}")
    run("eval", "run", "--checkpoint", str(checkpoint), "eval.problems=1")
    assert drawn == [True] + 4 * [False]
