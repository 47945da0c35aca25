"""``mtp.preset=head_only``: only the head of the checkpoint moves, and RL goes on from there."""

from __future__ import annotations

import pytest
import torch

from megatron_occ.mcore.checkpoint import read_plain
from megatron_occ.mcore.checkpoint_folder import list_checkpoints
from megatron_occ.rl.trainer import GRPOTrainer
from tests.e2e.conftest import Killed, assert_same_numbers, forked, kill_after, metrics
from tests.e2e.test_resume import contents, flatten

FIXED = ("rl.rollout.speculative.mode=fixed", "rl.rollout.speculative.draft_length=2")
SOFT_CE = ("mtp.preset=head_only", *FIXED)
TV = (
    "rl.train_trunk=false",
    "mtp.trunk.signal=none",
    "mtp.trunk.coefficient=fixed",
    "mtp.head.signal=tv",
    *FIXED,
)


def weights(checkpoint):
    """Tensors of the model by name."""
    found = dict(flatten(read_plain(checkpoint)))
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, torch.Tensor) and "optimizer" not in name and "rng" not in name
    }


def newest(folder):
    return list_checkpoints(folder / "checkpoints" / "rl")[-1][1]


@pytest.mark.parametrize("states", ["training", "rollout"])
@pytest.mark.parametrize("depths", [1, 2])
def test_rl_goes_on_from_the_same_policy_with_another_head(run, pretrained, depths, states):
    start = pretrained(depths)
    given = (f"mtp.num_layers={depths}", f"mtp.head.states={states}", "rl.optimizer.lr=1e-2")
    folder = run("rl", "head", *SOFT_CE, *given, f"rl.init_from={start}")
    before, after = weights(start), weights(newest(folder))
    assert before.keys() == after.keys()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved
    assert all("mtp" in name for name in moved)
    moments = [name for name in contents(folder, "rl") if "exp_avg" in name]
    assert moments
    assert all("mtp" in name for name in moments)
    for line in metrics(folder, "rl"):
        assert line["grad_norm/trunk"] == 0 < line["grad_norm/head"]
    first, last = metrics(folder, "validation")
    assert first["pass@1"] == last["pass@1"]

    rl = run("rl", "rl", f"mtp.num_layers={depths}", f"rl.init_from={newest(folder)}", *FIXED)
    after_stage, _ = metrics(rl, "validation")
    for name in last.keys() - {"step"}:
        assert after_stage[name] == last[name], name
    assert metrics(rl, "rl")[0]["grad_norm/trunk"] > 0


@pytest.mark.parametrize("stage", [SOFT_CE, TV], ids=["soft_ce", "tv"])
def test_states_of_rollouts_train_the_head_as_a_pass_through_the_trunk(run, pretrained, stage):
    """At every update: the policy is the one that drew the responses."""
    given = (*stage, f"rl.init_from={pretrained(1)}", "rl.mini_batches=1", "rl.steps=3")
    usual = run("rl", "training", *given)
    kept = run("rl", "rollout", *given, "mtp.head.states=rollout")
    for line, expected in zip(metrics(kept, "rl"), metrics(usual, "rl"), strict=True):
        assert line.keys() == expected.keys()
        for name in line.keys() - {"phase"}:
            assert line[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("stage", [SOFT_CE, TV], ids=["soft_ce", "tv"])
def test_more_drafts_are_accepted_after_the_stage(run, pretrained, stage, capsys):
    given = ("rl.steps=25", "rl.optimizer.lr=5e-3", "mtp.head.states=rollout", "mtp.head.weight=1")
    given += (
        "rl.validation={problems: 16, samples: 8, every: 0}",
        "rl.save_every=25",
        f"rl.init_from={pretrained(1)}",
    )
    folder = run("rl", "head", *stage, *given)
    lines = metrics(folder, "rl")
    for name, sign in (("loss/head_mtp_1", -1), ("agreement/mtp_1", 1)):
        first, last = (sum(line[name] for line in part) for part in (lines[:5], lines[-5:]))
        assert sign * last > sign * first, name
    first, last = (line["draft/acceptance_length"] for line in metrics(folder, "validation"))
    assert last > first
    assert f"acceptance length  {first:.2f} -> {last:.2f}" in capsys.readouterr().out


def test_a_resumed_stage_equals_the_undisturbed_one(run, pretrained, monkeypatch):
    given = (*SOFT_CE, "rl.steps=4", "mtp.head.states=rollout", f"rl.init_from={pretrained(1)}")
    whole = run("rl", "whole", *given)
    with monkeypatch.context() as patched:
        kill_after(patched, GRPOTrainer, 3)
        with pytest.raises(Killed):
            run("rl", "cut", *given)
    cut = run("rl", "cut", "--resume", *given)
    for phase in ("rl", "validation"):
        assert metrics(cut, phase) == metrics(whole, phase)
    found, expected = contents(cut, "rl"), contents(whole, "rl")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(found[name], value), name


def test_a_pipeline_whose_first_stage_trains_nothing_equals_one_process(run, pretrained, tmp_path):
    given = (*SOFT_CE, f"rl.init_from={pretrained(2)}", "mtp.num_layers=2")
    one = run("rl", "one", *given)
    layout = ("parallel.pipeline=2", "parallel.distributed_optimizer=true")
    done = forked(tmp_path / "two", 2, *given, *layout)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_numbers(tmp_path / "two", one)
    more = forked(tmp_path / "two", 2, *given, *layout, "rl.steps=3", "--resume")
    assert more.returncode == 0, more.stderr[-3000:]
    run("rl", "one", *given, "rl.steps=3", "--resume")
    assert [line["step"] for line in metrics(one, "rl")] == [1, 2, 3]
    assert_same_numbers(tmp_path / "two", one)
