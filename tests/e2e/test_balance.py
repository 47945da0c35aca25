"""The balance loss of experts in both phases of a run, by its keys."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import metrics

EXPERTS = (
    "model.moe={num_experts: 8, top_k: 2, ffn_hidden_size: 16}",
    "model.num_layers=2",
    "pretrain.steps=20",
    "rl.steps=1",
    # an update without anything to learn has no balance loss, and this policy is seldom right
    "rl.loss.kl_coefficient=0.01",
)


def test_each_phase_has_its_own_coefficient_and_the_page_shows_it(run):
    folder = run("rl", "both", *EXPERTS, "pretrain.balance_loss=0.5", "rl.balance_loss=0.01")
    pretrained, trained = metrics(folder, "pretrain"), metrics(folder, "rl")
    for line in (*pretrained, *trained):
        assert 0.9 < line["routing/balance"] < 4
        assert 0.9 < line["routing/balance_mtp"] < 4
    assert (folder / "report.html").read_text().count("<h3>Balance loss of experts</h3>") == 2
    folder = run("rl", "rl", *EXPERTS, "rl.balance_loss=0.01")
    other = metrics(folder, "pretrain")
    assert not any("routing/balance" in line for line in other)
    assert "routing/balance" in metrics(folder, "rl")[-1]
    # the loss of pretraining acts
    assert other[-1]["loss/main"] != pretrained[-1]["loss/main"]
    folder = run("rl", "pretrain", *EXPERTS, "pretrain.balance_loss=0.5")
    same = metrics(folder, "pretrain")
    assert same[-1]["loss/main"] == pytest.approx(pretrained[-1]["loss/main"], abs=1e-6)
    assert "routing/balance" not in metrics(folder, "rl")[-1]
