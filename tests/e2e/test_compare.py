"""The command ``compare``: pretraining, runs as processes, pairing, resumption and page."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from megatron_occ.cli import main
from tests.e2e.conftest import ROOT, read_lines

STUDY = ROOT / "conf" / "compare" / "tiny.yaml"


def compare(*arguments):
    """The command in a process of its own, which starts others."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "megatron_occ", "compare", str(STUDY), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Folder of a study of two arms and two seeds, of which one run was interrupted."""
    folder = tmp_path_factory.mktemp("study")
    own = (f"folder={folder}", "rl.steps=2", "rl.save_every=1")
    # the first share alone: detach, of both seeds
    refused = compare(*own, "--share", "1/2")
    assert refused.returncode == 1 and "--start-only in place of --share" in refused.stderr
    assert compare(*own, "--start-only").returncode == 0
    assert compare(*own, "--share", "1/2", "--keep-checkpoints").returncode == 0
    interrupt(folder / "runs" / "detach" / "seed_1")
    done = compare(*own, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    return folder, done


def interrupt(run):
    """Make a finished run one that was killed before it could say so."""
    (newest,) = (run / "checkpoints" / "rl").iterdir()
    assert newest.name == "step_000002"
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))


def test_what_was_finished_is_not_done_again(study):
    folder, done = study
    assert "1 of 4 runs are finished already" in done.stdout
    log = (folder / "logs" / "detach.seed_0.log").read_text()
    assert log.count("-m megatron_occ rl") == 1
    resumed = (folder / "logs" / "detach.seed_1.log").read_text()
    assert resumed.count("-m megatron_occ rl") == 2 and resumed.count("--resume") == 1


def test_arms_of_a_seed_begin_alike_and_seeds_do_not(study):
    folder, _ = study
    first = {
        (arm, seed): [
            (line["prompt"], line["response"])
            for line in read_lines(folder / "runs" / arm / f"seed_{seed}" / "rollouts.jsonl")
            if line["step"] == 1
        ]
        for arm in ("detach", "ce")
        for seed in (0, 1)
    }
    assert first["detach", 0] == first["ce", 0] != first["detach", 1] == first["ce", 1]
    results = json.loads((folder / "results.json").read_text())
    marks = {(run["arm"], run["seed"]): run["first_rollouts"] for run in results["runs"]}
    assert marks["detach", 0] == marks["ce", 0] != marks["detach", 1] == marks["ce", 1]
    # and then they part
    entropy = {run["arm"]: run["means"]["entropy"][1] for run in results["runs"]}
    assert entropy["detach"] != entropy["ce"]


def test_results_page_and_table_are_there(study):
    folder, done = study
    results = json.loads((folder / "results.json").read_text())
    assert [run["finished"] for run in results["runs"]] == [True] * 4
    assert all(run["validation"]["step"] == [0, 1, 2] for run in results["runs"])
    assert (
        "were checked to be those of detach in every run" in (folder / "results.html").read_text()
    )
    assert "2 seeds: no interval is given below 5" in done.stdout


def test_checkpoints_of_finished_runs_are_gone_and_that_of_the_start_is_not(study):
    folder, _ = study
    assert list(folder.glob("runs/*/*/checkpoints")) == []
    assert [path.name for path in folder.glob("start/checkpoints/pretrain/*")] == ["step_000060"]


def test_another_study_in_the_folder_is_refused(study, capsys):
    folder, _ = study
    with pytest.raises(SystemExit) as caught:
        main(["compare", str(STUDY), f"folder={folder}", "rl.steps=3"])
    assert "detach/seed_0: rl.steps was 2, is 3" in str(caught.value)


def test_a_run_that_fails_is_told_with_its_last_lines(tmp_path):
    broken = (f"folder={tmp_path}", f"rl.init_from={tmp_path / 'nothing'}", "seeds=1")
    done = compare(*broken)
    assert done.returncode == 1
    assert "detach seed 0 failed with exit status 1:" in done.stderr
    assert "ce seed 0 failed with exit status 1:" in done.stderr
    assert "nothing" in done.stderr and "all of it:" in done.stderr
