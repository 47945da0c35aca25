"""Experts from the rollout into the update of a run, on any number of processes."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import forked, metrics

EXPERTS = (
    "model.moe={num_experts: 8, top_k: 2, ffn_hidden_size: 16, first_dense_layers: 1}",
    "model.num_layers=3",
    "mtp.num_layers=2",
    "mtp.preset=detach",
    "rl.steps=1",
    "rl.mini_batches=4",
    # weights are random, and answers wrong: something has to move them
    "rl.loss.entropy_coefficient=0.1",
    "rl.optimizer.lr=0.02",
    # Adam makes a step of full size of a gradient that is rounding alone
    "rl.optimizer.eps=0.1",
    "rl.micro_batch_size=128",
    "rl.micro_batch_tokens=64",
    "rl.rollout.speculative.mode=fixed",
)


def test_two_processes_replay_what_one_does(run, tmp_path):
    arguments = (*EXPERTS, "rl.routing_replay=rollout")
    (expected,) = metrics(run("rl", "one", *arguments), "rl")
    assert expected["logprob_gap/max"] < 1e-4
    assert expected["routing/replaced"] > 0
    assert expected["routing/replaced_mtp"] > 0
    done = forked(tmp_path / "two", 2, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = metrics(tmp_path / "two", "rl")
    assert line.keys() == expected.keys()
    # sums of what cancels, and rounding itself
    names = {n for n in line if not n.startswith(("calibration/", "logprob_gap/", "phase"))}
    for name in names:
        assert line[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name


def test_old_log_probs_lend_their_experts_to_the_trunk(run):
    (line,) = metrics(run("rl", "one", *EXPERTS, "rl.routing_replay=training"), "rl")
    assert line["routing/replaced"] > 0
    assert "routing/replaced_mtp" not in line


def test_without_experts_there_is_nothing_to_replay(run):
    with pytest.raises(SystemExit, match=r"rl\.routing_replay=rollout: has no effect"):
        run("rl", "dense", "rl.routing_replay=rollout")
