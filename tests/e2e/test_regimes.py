"""Every preset, depth and algorithm runs through the ``rl`` command and logs what it must."""

from __future__ import annotations

import math

import pytest

from megatron_occ.config import ConfigError
from tests.e2e.conftest import metrics

QUICK = ("rl.steps=2", "rl.prompts_per_step=16")


@pytest.mark.parametrize("depths", [1, 2])
@pytest.mark.parametrize("preset", ["none", "detach", "ce", "policy", "occ", "occ_decoupled"])
def test_every_preset_runs_at_one_and_two_depths(run, pretrained, preset, depths):
    settings = (f"mtp.preset={preset}", f"mtp.num_layers={depths}")
    folder = run("rl", "run", *QUICK, *settings, f"rl.init_from={pretrained(depths)}")
    lines = metrics(folder, "rl")
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["reward/mean"] > 0
        assert line["grad_norm/trunk"] > 0
        if preset == "none":
            assert not [name for name in line if "mtp" in name or "calibration" in name]
        for depth in range(1, depths + 1) if preset != "none" else ():
            for name in ("lambda/mtp", "loss/mtp", "agreement/mtp"):
                assert math.isfinite(line[f"{name}_{depth}"]), name
            assert line[f"calibration/norm_squared_{depth}"] > 0
            assert math.isfinite(line[f"calibration/cross_{depth}"])
        assert f"loss/mtp_{depths + 1}" not in line
        trained = preset not in ("none", "occ") or (preset == "occ" and line["lambda/mtp_1"] > 0)
        assert (line["grad_norm/head"] > 0) == trained
        assert line["logprob_gap/max"] < 1e-4
    assert (folder / "report.html").is_file()
    assert len(metrics(folder, "validation")) == 2


EXACT = (
    "mtp.preset=occ_exact",
    "mtp.trunk.exact.every=1",
    "mtp.trunk.exact.gate=0",
    "mtp.trunk.clamp=[null,null]",
)


@pytest.mark.parametrize("depths", [1, 2])
def test_lambda_from_gradients_is_measured_applied_and_logged(run, pretrained, depths):
    start = (f"mtp.num_layers={depths}", f"rl.init_from={pretrained(depths)}")
    folder = run("rl", "run", *QUICK, *EXACT, "mtp.trunk.lambda_plus=1", *start)
    first, second = metrics(folder, "rl")
    for depth in range(1, depths + 1):
        assert math.isfinite(first[f"lambda/mtp_{depth}"])
        assert second[f"lambda/mtp_{depth}"] != 0
        for name in ("c_same", "c_cross", "norm_squared", "lambda_raw"):
            assert math.isfinite(second[f"exact/{name}_{depth}"]), name
    assert 0 < second["exact/share"] <= 0.5
    assert second["exact/rl_norm_squared"] > 0 and second["grad_norm/head"] > 0


@pytest.mark.parametrize(
    "control", ["mtp.trunk.exact.control=random", "mtp.trunk.exact.control=shuffled"]
)
def test_controls_run(run, pretrained, control):
    settings = (*EXACT, "mtp.trunk.lambda_plus=1", control, f"rl.init_from={pretrained(1)}")
    *_, last = metrics(run("rl", "run", *QUICK, *settings), "rl")
    assert last["exact/share"] > 0


def test_a_warning_is_in_the_log(run, pretrained):
    settings = ("mtp.preset=policy", "mtp.trunk.dual_clip=null", f"rl.init_from={pretrained(1)}")
    events = metrics(run("rl", "run", *QUICK, *settings), "event")
    assert any("mtp.trunk.dual_clip=10" in event["message"] for event in events)


def test_a_high_learning_rate_is_in_the_log_of_its_phase(run):
    rates = ("pretrain.optimizer.lr=0.06", "rl.optimizer.lr=0.05", "pretrain.steps=6", "rl.steps=1")
    folder = run("rl", "run", *QUICK, *rates, "pretrain.optimizer.warmup_steps=0")
    told = [event["message"] for event in metrics(folder, "event")]
    first, second = (text for text in told if "Adam moves every weight" in text)
    assert first.startswith("pretrain.optimizer.lr=0.06: ")
    assert second.startswith("rl.optimizer.lr=0.05: ")


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "gspo"])
@pytest.mark.parametrize("head", ["soft_ce", "tv"])
def test_every_algorithm_runs_with_every_draft_loss(run, pretrained, algorithm, head):
    settings = (f"rl.algorithm={algorithm}", "mtp.trunk.coefficient=fixed", "mtp.trunk.signal=none")
    settings += ("mtp.preset=null", f"mtp.head.signal={head}", f"rl.init_from={pretrained(1)}")
    for line in metrics(run("rl", "run", *QUICK, *settings), "rl"):
        assert math.isfinite(line["loss/policy"])
        assert line["grad_norm/trunk"] > 0
        assert line["grad_norm/head"] > 0


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "gspo"])
@pytest.mark.parametrize("depths", [1, 2])
def test_every_algorithm_runs_with_a_calibrated_coefficient(run, pretrained, algorithm, depths):
    settings = (f"rl.algorithm={algorithm}", f"mtp.num_layers={depths}", "mtp.preset=occ_decoupled")
    start = f"rl.init_from={pretrained(depths)}"
    lines = metrics(
        run("rl", "run", "rl.steps=2", "rl.prompts_per_step=16", *settings, start), "rl"
    )
    for line in lines:
        assert math.isfinite(line["loss/policy"])
        assert line["grad_norm/trunk"] > 0
        assert math.isfinite(line[f"lambda/mtp_{depths}"])


@pytest.mark.parametrize("trunk", ["none", "policy"])
@pytest.mark.parametrize("head", ["soft_ce", "tv"])
def test_states_of_the_rollout_train_the_head_as_those_of_the_training_pass(
    run, pretrained, head, trunk
):
    """In the first update of a step the policy is the one that drew the responses."""
    arguments = (
        "mtp.preset=null",
        "mtp.num_layers=2",
        f"rl.init_from={pretrained(2)}",
        f"mtp.head.signal={head}",
        f"mtp.trunk.signal={trunk}",
        "mtp.trunk.coefficient=fixed",
        "rl.mini_batches=1",
        "rl.rollout.speculative.mode=fixed",
    )
    usual = run("rl", "training", *arguments)
    kept = run("rl", "rollout", *arguments, "mtp.head.states=rollout")
    for line, expected in zip(metrics(kept, "rl"), metrics(usual, "rl"), strict=True):
        missing = expected.keys() - line.keys()
        # nothing of the depths is known about the trunk's gradient where they have no pass in it
        assert all(name.startswith(("calibration/", "lambda/")) for name in missing)
        assert (trunk == "none") == bool(missing)
        assert line["grad_norm/head"] > 0
        for name in line.keys() - {"phase"}:
            assert line[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


def test_an_mtp_regime_without_mtp_layers_is_refused(run):
    with pytest.raises(SystemExit, match=r"mtp\.num_layers"):
        run("rl", "run", "mtp.num_layers=0", "mtp.preset=occ")


def test_a_used_folder_is_refused_and_nothing_in_it_changes(run):
    folder = run("pretrain", "run", "pretrain.steps=6")
    before = (folder / "metrics.jsonl").read_text()
    with pytest.raises(SystemExit, match="--resume"):
        run("pretrain", "run", "pretrain.steps=6")
    assert (folder / "metrics.jsonl").read_text() == before


def test_debug_shows_the_exception(run):
    with pytest.raises(ConfigError):
        run("rl", "run", "--debug", "mtp.num_layers=0", "mtp.preset=occ")
