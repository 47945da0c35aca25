"""Presets: what they set, what wins over them and what contradicts them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_occ.config import ConfigError, load_config


def refusal(paths: list[Path], overrides: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(paths, overrides)
    return str(caught.value)


MTP_REGIMES = {
    "none": ("none", "fixed", "none"),
    "detach": ("none", "fixed", "ce"),
    "ce": ("ce", "fixed", "same_as_trunk"),
    "policy": ("policy", "fixed", "same_as_trunk"),
    "occ": ("policy", "occ", "same_as_trunk"),
    "occ_decoupled": ("policy", "occ", "ce"),
    "head_only": ("none", "fixed", "soft_ce"),
}


@pytest.mark.parametrize("name", MTP_REGIMES)
def test_mtp_presets_set_the_regime(name):
    config = load_config([], [f"mtp.preset={name}"])
    mtp = config.mtp
    assert (mtp.trunk.signal, mtp.trunk.coefficient, mtp.head.signal) == MTP_REGIMES[name]
    assert mtp.trunk.weight == {"policy": 1.0}.get(name, 0.1)
    assert mtp.head.weight == {"head_only": 1.0}.get(name, 0.1)
    assert config.rl.train_trunk is (name != "head_only")


@pytest.mark.parametrize(
    ("name", "aggregation", "low", "high", "dual", "dynamic"),
    [
        ("grpo", "sequence", 0.2, 0.2, None, False),
        ("dapo", "token", 0.2, 0.28, 10.0, True),
        ("gspo", "gspo", 3e-4, 4e-4, None, False),
    ],
)
def test_algorithms_set_the_loss(name, aggregation, low, high, dual, dynamic):
    rl = load_config([], [f"rl.algorithm={name}"]).rl
    loss = (rl.loss.aggregation, rl.loss.clip_low, rl.loss.clip_high, rl.loss.dual_clip)
    assert loss == (aggregation, low, high, dual)
    assert rl.dynamic_sampling.enabled is dynamic
    assert (rl.advantage.baseline, rl.advantage.normalize) == ("mean", True)


@pytest.mark.parametrize(
    ("name", "advantage", "loss"),
    [
        ("dr_grpo", ("mean", False, "group"), ("clipped", "constant", 0.2, 0.2)),
        ("rloo", ("leave_one_out", False, "group"), ("clipped", "sum", 0.2, 0.2)),
        ("reinforce_pp", ("none", True, "step"), ("clipped", "token", 0.2, 0.2)),
        ("reinforce_pp_baseline", ("mean", True, "step"), ("clipped", "token", 0.2, 0.2)),
        ("cispo", ("mean", True, "group"), ("cispo", "token", 1.0, 4.0)),
        ("sapo", ("mean", True, "group"), ("sapo", "sequence", 0.2, 0.28)),
        ("dppo", ("mean", True, "group"), ("dppo", "token", 0.2, 0.28)),
    ],
)
def test_algorithms_of_other_losses(name, advantage, loss):
    rl = load_config([], [f"rl.algorithm={name}"]).rl
    found = (rl.advantage.baseline, rl.advantage.normalize, rl.advantage.normalize_over)
    assert found == advantage
    assert (rl.loss.kind, rl.loss.aggregation, rl.loss.clip_low, rl.loss.clip_high) == loss
    assert rl.old_logprobs == ("rollout" if name == "dppo" else "training")
    assert (rl.loss.tau_positive, rl.loss.tau_negative) == (1.0, 1.05)
    assert (rl.loss.divergence, rl.loss.divergence_limit) == ("tv", 0.15)


def test_given_weights_and_clips_win_over_a_preset(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("mtp: {trunk: {weight: 0.3}}\n", encoding="utf-8")
    config = load_config([path], ["mtp.preset=policy", "rl.algorithm=gspo", "rl.loss.clip_low=0.1"])
    assert config.mtp.trunk.weight == 0.3
    assert (config.rl.loss.clip_low, config.rl.loss.clip_high) == (0.1, 4e-4)


@pytest.mark.parametrize(
    ("preset", "given"),
    [
        ("mtp.preset=occ", "mtp.trunk.signal=ce"),
        ("mtp.preset=policy", "mtp.trunk.coefficient=occ"),
        ("mtp.preset=detach", "mtp.head.signal=tv"),
        ("mtp.preset=head_only", "mtp.head.signal=ce"),
        ("rl.algorithm=gspo", "rl.loss.aggregation=token"),
        ("rl.algorithm=cispo", "rl.loss.kind=sapo"),
    ],
)
def test_a_given_regime_key_that_contradicts_a_preset_is_refused(tmp_path, preset, given):
    (preset_key, name), (key, value) = preset.split("="), given.split("=")
    path = tmp_path / "a.yaml"
    path.write_text(f"\n{key}: {value}\n", encoding="utf-8")
    for message in (refusal([], [preset, given]), refusal([path], [preset])):
        assert f"{key} = '{value}' contradicts {preset_key} = {name}" in message
        assert "Drop one" in message
    assert f"{path}:2: " in refusal([path], [preset])
    load_config([path], [])  # alone it is fine


def test_a_regime_key_that_agrees_with_the_preset_is_accepted():
    assert load_config([], ["mtp.preset=occ", "mtp.trunk.signal=policy"]) == load_config(
        [], ["mtp.preset=occ"]
    )
