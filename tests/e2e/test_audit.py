"""The command ``audit`` as a user types it."""

from __future__ import annotations

import json

import pytest

from tests.e2e.conftest import TINY


@pytest.mark.parametrize("depths", [1, 2])
def test_an_audit_prints_a_table_and_writes_figures_and_page(run, pretrained, depths, capsys):
    checkpoint = pretrained(depths)
    before = {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*")}
    settings = (f"mtp.num_layers={depths}", "rl.prompts_per_step=16", "--rounds", "3")
    folder = run("audit", "run", *settings, "--checkpoint", str(checkpoint))
    out = capsys.readouterr().out
    target = folder / "audit" / f"pretrain_{checkpoint.name}"
    assert "cross-entropy" in out and str(target / "audit.html") in out
    record = json.loads((target / "record.json").read_text())
    assert len(record["samples"]) == 6 and len(record["signals"]) == 6 * depths
    assert [sample["mini_batch"] for sample in record["samples"]] == [0, 1] * 3
    # in the first mini-batch of a round the policy has not moved
    proxies = [sample["proxies"]["logprob"][0] for sample in record["samples"]]
    assert [value is None for value in proxies] == [True, False] * 3
    page = (target / "audit.html").read_text()
    assert page.startswith("<!doctype html>") and "<script" not in page
    summary = json.loads((target / "audit.json").read_text())
    assert summary["recommendation"]["text"] in out
    assert {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*")} == before


def test_too_few_rounds_are_refused(run, pretrained):
    with pytest.raises(SystemExit, match=r"--rounds 1: 2 mini-batches.*--rounds 2 or more"):
        run("audit", "run", "--rounds", "1", "--checkpoint", str(pretrained(1)), config=TINY)
