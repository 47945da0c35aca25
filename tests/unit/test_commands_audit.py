"""What the command `audit` refuses before anything is measured."""

from __future__ import annotations

import pytest

from megatron_occ.cli import main
from megatron_occ.commands.audit import audit_config
from megatron_occ.config import load_config


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["--rounds", "1"], ["--rounds 1", "4 mini-batches", "--rounds 2"]),
        (["--rounds", "2", "rl.mini_batches=1"], ["2 mini-batches", "--rounds 4"]),
        (["--rounds", "2", "--window", "1"], ["--window 1", "--rounds 3", "--window 2"]),
        (["mtp.trunk.weighting=truncated"], ["mtp.trunk.weighting=truncated", "Leave it out"]),
        (["mtp.trunk={weighting: truncated}"], ["weighting: truncated", "Leave it out"]),
        (["mtp={trunk: {weighting: truncated}}"], ["weighting: truncated", "Leave it out"]),
        (["mtp={preset: occ}"], ["preset: occ", "Leave it out"]),
        (["mtp.preset=occ_exact"], ["mtp.preset=occ_exact", "Leave it out"]),
    ],
)
def test_an_audit_that_would_measure_nothing_is_refused(given, parts, tmp_path, capsys):
    folder = tmp_path / "step_000001"
    folder.mkdir()
    with pytest.raises(SystemExit) as caught:
        main(["audit", "--checkpoint", str(folder), f"run_dir={tmp_path / 'run'}", *given])
    text = f"{caught.value} {capsys.readouterr().err}"
    assert all(part in text for part in parts), text


def test_an_audit_overlaps_no_messages_with_its_passes():
    overlapped = ["distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"]
    config = audit_config(load_config([], [f"parallel.{key}=true" for key in overlapped]))
    assert [getattr(config.parallel, key) for key in overlapped] == [True, False, False]


def test_an_audit_has_no_balance_loss_between_its_measurements():
    config = load_config([], ["model.moe.num_experts=4", "rl.balance_loss=0.01"])
    assert audit_config(config).rl.balance_loss == 0
    assert config.rl.balance_loss == 0.01
