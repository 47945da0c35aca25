"""A run stopped and resumed is the run that never stopped, bit for bit."""

from __future__ import annotations

import pytest
import torch

from megatron_occ.mcore.checkpoint import read_plain
from megatron_occ.mcore.checkpoint_folder import list_checkpoints
from megatron_occ.rl import pretraining, trainer
from megatron_occ.rl.pretraining import PretrainTrainer
from tests.e2e.conftest import Killed, kill_after, metrics


def contents(folder, phase):
    """Everything in the newest checkpoint by key, read without a model."""
    _, path = list_checkpoints(folder / "checkpoints" / phase)[-1]
    return dict(flatten(read_plain(path)))


def flatten(value, prefix=""):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flatten(item, f"{prefix}/{key}")
    else:
        yield prefix, value


SETTINGS = {
    "rl": (
        "rl.steps=4",
        "mtp.preset=occ_decoupled",
        "mtp.trunk.ema=0.5",
        # `auto` follows the clock
        "rl.rollout.speculative.mode=fixed",
    ),
    "exact": (
        "rl.steps=4",
        "rl.save_every=2",
        "mtp.preset=occ_exact",
        "mtp.trunk.exact.gate=0",
        "mtp.trunk.lambda_plus=1",
        "mtp.trunk.clamp=[null,null]",
        "mtp.trunk.exact.control=shuffled",
        "rl.rollout.speculative.mode=fixed",
    ),
    "pretrain": ("pretrain.steps=8", "pretrain.save_every=2", "pretrain.log_every=1"),
}


@pytest.mark.parametrize(
    ("kind", "trainer_class", "step"),
    [
        ("rl", trainer.GRPOTrainer, 3),
        ("exact", trainer.GRPOTrainer, 3),
        ("pretrain", pretraining.PretrainTrainer, 5),
    ],
)
def test_resumed_run_equals_undisturbed_run(
    run, pretrained, monkeypatch, kind, trainer_class, step
):
    settings, phase = SETTINGS[kind], "pretrain" if kind == "pretrain" else "rl"
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
    for part in ("exp_avg_sq", "trainer", "updates", "decoder", "mtp"):
        assert any(part in key for key in expected), part
    for key, value in expected.items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(state[key], value), key
    if phase == "rl":
        assert (cut / "rollouts.jsonl").read_text() == (whole / "rollouts.jsonl").read_text()


@pytest.mark.parametrize(
    ("phase", "trainer_class", "step", "late"),
    [
        ("rl", trainer.GRPOTrainer, 2, ("rl.save_every=10",)),
        ("rl", trainer.GRPOTrainer, 0, ()),
        ("pretrain", pretraining.PretrainTrainer, 5, ("pretrain.save_every=10",)),
    ],
)
def test_a_run_killed_before_its_first_checkpoint_starts_its_phase_anew(
    run, monkeypatch, phase, trainer_class, step, late
):
    settings = (*SETTINGS[phase], "pretrain.steps=8", "pretrain.log_every=1", *late)
    whole = run(phase, "whole", *settings)
    with monkeypatch.context() as patched:
        kill_after(patched, trainer_class, step)
        with pytest.raises(Killed):
            run(phase, "cut", *settings)
    # twice: the second time finds what the first resumption left
    with monkeypatch.context() as patched:
        kill_after(patched, trainer_class, step)
        with pytest.raises(Killed):
            run(phase, "cut", "--resume", *settings, "keep_checkpoints=3")
    cut = run(phase, "cut", "--resume", *settings, "keep_checkpoints=3")
    for name in ("pretrain", "rl", "validation"):
        assert metrics(cut, name) == metrics(whole, name)
    assert len(metrics(cut, phase)) == {"rl": 4, "pretrain": 8}[phase]
    if phase == "rl":
        assert (cut / "rollouts.jsonl").read_text() == (whole / "rollouts.jsonl").read_text()
    messages = [event["message"] for event in metrics(cut, "event")]
    assert messages.count(f"{phase} began anew: it had no checkpoint yet") == 2
    assert messages.count("resumed with keep_checkpoints was 2, is 3") == 1


def test_a_refused_resume_leaves_the_folder_as_it_was(run):
    folder = run("pretrain", "run", "pretrain.steps=6")
    before = (folder / "config.yaml").read_text()
    with pytest.raises(SystemExit, match="seed was 0, is 1"):
        run("pretrain", "run", "pretrain.steps=6", "--resume", "seed=1")
    assert (folder / "config.yaml").read_text() == before


def test_pretraining_cannot_be_prolonged_once_rl_has_a_checkpoint(run):
    folder = run("rl", "run", "pretrain.steps=6", "rl.steps=1")
    before = (folder / "config.yaml").read_text()
    for command in ("rl", "pretrain"):
        with pytest.raises(SystemExit, match=r"pretrain\.steps was 6, is 9 .*rl\.init_from="):
            run(command, "run", "pretrain.steps=9", "rl.steps=1", "--resume")
    assert (folder / "config.yaml").read_text() == before


def test_pretraining_goes_on_while_rl_has_no_checkpoint(run, monkeypatch):
    settings = ("rl.steps=1", "pretrain.log_every=1")
    with monkeypatch.context() as patched:
        kill_after(patched, trainer.GRPOTrainer, 0)
        with pytest.raises(Killed):
            run("rl", "run", "pretrain.steps=6", *settings)
    folder = run("rl", "run", "pretrain.steps=8", *settings, "--resume")
    assert [line["step"] for line in metrics(folder, "pretrain")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [line["step"] for line in metrics(folder, "validation")] == [0, 1]


def test_a_longer_run_resumes_from_the_shorter_one(run):
    folder = run("rl", "run", "pretrain.steps=6", "rl.steps=1")
    run("rl", "run", "pretrain.steps=6", "rl.steps=2", "--resume")
    assert [line["step"] for line in metrics(folder, "rl")] == [1, 2]
    assert [line["step"] for line in metrics(folder, "pretrain")] == [6]


def test_a_resumed_run_takes_the_newest_whole_checkpoint_and_tells_of_the_others(run):
    settings = ("pretrain.steps=8", "pretrain.save_every=2", "keep_checkpoints=3")
    folder = run("pretrain", "run", *settings)
    whole, checkpoints = contents(folder, "pretrain"), folder / "checkpoints" / "pretrain"
    (checkpoints / "step_000008" / ".metadata").unlink()
    shard = sorted((checkpoints / "step_000006").glob("*.distcp"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    run("pretrain", "run", *settings, "--resume")
    for key, value in contents(folder, "pretrain").items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(value, whole[key]), key
    assert [line["step"] for line in metrics(folder, "pretrain")][-1] == 8
    events = [line["message"] for line in metrics(folder, "event")]
    told = [text for text in events if text.endswith("was renamed to end in .broken")]
    assert ".metadata is missing" in told[0]
    assert "bytes, " in told[1]
    assert "resumed from the checkpoint of step 4" in events
    assert {path.suffix for path in checkpoints.iterdir()} == {"", ".broken"}


def test_without_a_whole_checkpoint_a_resumed_run_is_refused(run):
    settings = ("pretrain.steps=6", "keep_checkpoints=1")
    folder = run("pretrain", "run", *settings)
    (folder / "checkpoints" / "pretrain" / "step_000006" / "meta.json").write_text("{")
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"no whole checkpoint of pretrain is left\. Delete"):
            run("pretrain", "run", *settings, "--resume")


def test_the_best_checkpoint_on_validation_stays(run, monkeypatch):
    rates = iter((0.5, 0.2, 0.1, 0.1, 0.1, 0.1))
    monkeypatch.setattr(
        PretrainTrainer, "_measured", lambda trainer: {"pass@1": next(rates)}, raising=True
    )
    settings = ("pretrain.steps=6", "pretrain.save_every=1", "keep_checkpoints=1", "keep_best=1")
    folder = run("pretrain", "run", *settings)
    found = [step for step, _ in list_checkpoints(folder / "checkpoints" / "pretrain")]
    assert found == [1, 6]
