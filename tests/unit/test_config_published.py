"""The shipped cluster configurations, key by key against the published settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_occ.config import load_config, validate
from megatron_occ.config.load import flat_values
from megatron_occ.losses import group_advantages, overlong_penalty

CONF = Path(__file__).parents[2] / "conf" / "rl"
RUNS = ("dapo_mimo_7b", "gspo_mimo_7b", "dapo_glm45_air")

# [paper] arXiv 2605.28184, its experimental set-up; [code] the training script and the patched verl
# released with it. Where the two differ, [paper].
PUBLISHED = {
    "rl.prompts_per_step": 128,  # [paper]
    "rl.samples_per_prompt": 16,  # [paper]
    "rl.mini_batches": 4,  # [paper] mini-batches of 32 prompts
    "rl.steps": 200,  # [paper]; [code] 400
    "rl.optimizer.lr": 1e-6,  # [paper]
    "rl.optimizer.schedule": "constant",  # neither mentions a decay
    "rl.optimizer.warmup_steps": 10 * 4,  # [paper] 10; [code] counts RL steps, of 4 updates
    "rl.optimizer.weight_decay": 0.1,  # [paper]
    "rl.optimizer.beta2": 0.999,  # [code]
    "rl.optimizer.clip_grad": 1.0,  # [paper]
    "rl.loss.kl_coefficient": 0.0,  # [paper]
    "rl.loss.entropy_coefficient": 0.0,  # [paper]
    "rl.advantage.baseline": "mean",  # arXiv 2503.14476, equation 9
    "rl.advantage.normalize": True,  # the same
    "rl.dynamic_sampling.enabled": False,  # [code] no group is filtered
    "rl.rollout.max_response_length": 8192,  # [paper]
    "rl.rollout.temperature": 1.0,  # [paper]
    "model.max_position_embeddings": 2048 + 8192,  # [paper] prompt and response
    "rl.overlong.buffer": 4096,  # [paper]
    "rl.overlong.penalty": 1.0 / 2,  # [code] 1 for rewards of -1 and +1, which are 0 and 1 here
    "rl.validation.every": 10,  # [code]
    "rl.validation.samples": 32,  # [paper] avg@32; [code] 1, with top_p 0.7
    "mtp.num_layers": 1,  # both models
    "mtp.preset": "occ",  # [paper]
    "mtp.trunk.estimator": "logprob",  # [paper]
    "mtp.trunk.lambda_plus": 1.0,  # [paper]
    "parallel.tensor": 2,  # [paper]
    "parallel.pipeline": 2,  # [paper]
    "parallel.context": 2,  # [paper]
}
DAPO = {
    "rl.loss.aggregation": "token",  # [paper]
    "rl.loss.clip_low": 0.2,  # [paper]
    "rl.loss.clip_high": 0.28,  # [paper]
    "rl.loss.dual_clip": 10.0,  # [paper]
}
GSPO = {
    "rl.loss.aggregation": "gspo",  # [paper]
    "rl.loss.clip_low": 3e-4,  # arXiv 2507.18071, section 5.1
    "rl.loss.clip_high": 4e-4,  # the same
    "rl.loss.dual_clip": None,  # the same: its loss has none
}
# what makes a shipped configuration compute the coefficient of [code]
RELEASED = (
    "mtp.trunk.estimator=released",
    "mtp.trunk.lambda_plus=0.1",
    "mtp.trunk.clamp=[null,null]",
    "rl.micro_batch_tokens=null",
    "rl.micro_batch_size=2",
)


@pytest.mark.parametrize("name", RUNS)
def test_shipped_settings_are_the_published_ones(name):
    values = flat_values(load_config([CONF / f"{name}.yaml"]))
    published = PUBLISHED | (GSPO if name.startswith("gspo") else DAPO)
    assert {key: values[key] for key in published} == published


def test_the_run_on_512_gpus_differs_in_nothing_but_its_layout():
    large, small = (
        flat_values(load_config([CONF / f"dapo_glm45_air{size}.yaml"])) for size in ("_512", "")
    )
    changed = {key for key in small if large[key] != small[key]}
    assert changed == {
        "run_dir",
        "parallel.pipeline",
        "parallel.pipeline_layout",
        "parallel.expert",
    }


@pytest.mark.parametrize("name", RUNS)
def test_the_released_coefficient_is_accepted_with_each(name):
    padded = load_config([CONF / f"{name}.yaml"], list(RELEASED))
    packed = load_config([CONF / f"{name}.yaml"], list(RELEASED[:3]))
    for config in (padded, packed):
        validate(config, command="rl", world_size=128)


def test_half_the_penalty_for_half_the_rewards_gives_the_same_advantages():
    """Group advantages do not know the scale of rewards, but for the 1e-6 beside the deviation."""
    right = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    lengths = torch.tensor([500, 8192, 4096, 6000, 8000, 300, 8192, 7000])
    ours = right + overlong_penalty(lengths, 8192, 4096, 0.5)
    theirs = 2 * right - 1 + overlong_penalty(lengths, 8192, 4096, 1.0)
    expected = group_advantages(theirs, 8)
    torch.testing.assert_close(group_advantages(ours, 8), expected, rtol=1e-5, atol=0)
    assert expected.unique().numel() > 4


# what a loss's own paper says of it
LOSSES = {
    "grpo": {"rl.loss.aggregation": "sequence", "rl.loss.clip_low": 0.2, "rl.loss.clip_high": 0.2},
    "dr_grpo": {"rl.loss.aggregation": "constant", "rl.advantage.normalize": False},
    "rloo": {
        "rl.loss.aggregation": "sum",
        "rl.advantage.baseline": "leave_one_out",
        "rl.advantage.normalize": False,
        "rl.mini_batches": 1,
    },
    "reinforce_pp": {
        "rl.loss.aggregation": "token",
        "rl.advantage.baseline": "none",
        "rl.advantage.normalize_over": "step",
    },
    "cispo": {"rl.loss.kind": "cispo", "rl.loss.clip_low": 1.0, "rl.loss.clip_high": 4.0},
    "sapo": {"rl.loss.kind": "sapo", "rl.loss.tau_positive": 1.0, "rl.loss.tau_negative": 1.05},
    "dppo": {
        "rl.loss.kind": "dppo",
        "rl.loss.divergence": "tv",
        "rl.loss.divergence_limit": 0.15,
        "rl.old_logprobs": "rollout",
    },
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_recipe_is_the_loss_of_its_paper_in_the_run_of_this_one(name):
    config = load_config([CONF / f"{name}_mimo_7b.yaml"])
    for preset in ("none", "detach", "ce"):
        given = load_config([CONF / f"{name}_mimo_7b.yaml"], [f"mtp.preset={preset}"])
        validate(given, command="rl", world_size=128)
    values, usual = flat_values(config), flat_values(load_config([CONF / "dapo_mimo_7b.yaml"]))
    assert {key: values[key] for key in LOSSES[name]} == LOSSES[name]
    # model, sizes, optimizer: all that is no part of the loss
    loss = ("rl.loss", "rl.advantage", "rl.algorithm", "rl.old_logprobs", "mtp", "run_dir")
    differ = {key for key in values if values[key] != usual[key] and not key.startswith(loss)}
    assert differ == ({"rl.mini_batches"} if name == "rloo" else set())


@pytest.mark.parametrize("name", ["cispo", "sapo", "dppo"])
def test_the_regime_that_a_recipe_names_is_accepted(name):
    regime = ["mtp.preset=occ_decoupled", "mtp.trunk.weighting=truncated"]
    config = load_config([CONF / f"{name}_mimo_7b.yaml"], regime)
    validate(config, command="rl", world_size=128)
