"""What the scripts in slurm/ do when a job is asked to stop, fails, or has a bad node."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.unit.slurm_jobs import ARRAY, RANKS, ROOT, SAVE, UNFINISHED, Job, asked, needs_bash

pytestmark = needs_bash


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


@pytest.mark.parametrize(
    ("before", "array", "requeued"),
    [(SAVE, {}, "123456"), (SAVE, ARRAY, "123456_3"), (UNFINISHED, {}, None), ("", {}, None)],
    ids=["job", "element of an array", "unfinished checkpoint", "no checkpoint"],
)
@pytest.mark.parametrize("ended", [75, 138], ids=["stopped as asked", "ended by the signal"])
def test_near_the_time_limit_the_ranks_are_asked_to_stop_and_the_job_is_requeued_if_it_got_further(
    job, before, array, requeued, ended
):
    run_dir = {"RUN_DIR": str(job.run_dir)}
    then = before.replace("$RUN_DIR", "$RUN_DIR/seed_3") if array else before
    done = job(STEP=asked(then, ended), **array, **run_dir)
    assert "time limit near: the ranks are asked to stop" in done.stdout
    assert f"ended with exit status {ended}" in done.stdout
    assert done.returncode == (0 if requeued else ended), done.stderr
    assert job.calls[1:] == ([f"requeue {requeued}"] if requeued else [])
    assert ("Save more often" in done.stdout) == (requeued is None)


def test_near_the_time_limit_an_old_checkpoint_is_no_progress(job):
    (job.run_dir / "checkpoints" / "rl" / "step_000004").mkdir(parents=True)
    assert job(STEP=asked("")).returncode == 75
    assert len(job.calls) == 1


def test_a_run_that_ends_although_it_was_asked_to_stop_is_done(job):
    assert job(STEP=asked(SAVE, ended=0)).returncode == 0
    assert len(job.calls) == 1


def test_a_second_signal_is_handed_on_too_and_the_step_is_waited_for(job):
    twice = """n=0; trap 'n=$((n + 1)); echo "signal $n" >>"$CALLS"' USR1; """
    # ten seconds at most for each: a busy machine takes its time
    arrived = 'for _ in $(seq 200); do [ "$n" -ge "$i" ] && break; sleep 0.05; done'
    twice += f'for i in 1 2; do kill -USR1 "$JOB_SHELL"; {arrived}; done; exit 7'
    done = job(STEP=twice)
    assert done.returncode == 7
    assert job.calls[1:] == ["signal 1", "signal 2"]


def test_a_job_whose_requeueing_fails_says_so_and_fails(job):
    done = job(STEP=asked(SAVE), RUN_DIR=str(job.run_dir), REFUSED="1")
    assert done.returncode == 75
    assert "that failed: submit the same command again" in done.stdout


@pytest.fixture
def ranks(job):
    """Ranks as slurm/rank.sh starts them; Python ends as STATUS says."""
    program = job.folder / "python"
    program.write_text('#!/bin/bash\nexit "$STATUS"\n')
    program.chmod(0o755)
    site = Path(job.environment["OCC_SITE"])
    site.write_text(f"{site.read_text()}PYTHON={program}\nsite_environment() {{ :; }}\n")
    return job


def test_ranks_that_stopped_as_asked_by_somebody_else_are_requeued(ranks):
    """``scancel --signal=USR1``: the job's script is not told, and srun has 0 of all ranks."""
    both = RANKS + "rank 0 75; echo srun $?; rank 1 75"
    done = ranks(STEP=both + "; " + SAVE, RUN_DIR=str(ranks.run_dir))
    assert "srun 0\n" in done.stdout
    assert "ended with exit status 75" in done.stdout
    assert ranks.calls[1:] == ["requeue 123456"]
    again = ranks(STEP=both)
    assert again.returncode == 75 and "Save more often" in again.stdout
    # the next attempt does not take what these ranks ended with for its own
    assert ranks(STEP="exit 0").returncode == 0
    assert len(ranks.calls) == 4


def test_an_error_of_a_rank_is_an_error_though_others_stopped_as_asked(ranks):
    done = ranks(STEP=RANKS + f"{SAVE} rank 0 75; rank 1 3", RUN_DIR=str(ranks.run_dir))
    assert done.returncode == 3
    assert len(ranks.calls) == 1


@pytest.mark.parametrize(
    ("preempted", "requeued"), [("2030-01-01T00:00:00", True), ("None", False)]
)
def test_a_job_that_fails_is_requeued_only_if_it_was_preempted(job, preempted, requeued):
    done = job(STEP="exit 143", PREEMPTED=preempted)
    assert done.returncode == (0 if requeued else 143)
    assert job.calls[1:] == (["requeue 123456"] if requeued else [])


def test_a_job_whose_ranks_hung_is_tried_again_once_without_progress(ranks):
    hung = RANKS + "rank 1 124"
    assert ranks(STEP=hung).returncode == 0
    assert ranks.calls[1:] == ["requeue 123456"]
    again = ranks(STEP=hung)
    assert again.returncode == 124
    assert "waited too long for the others again, without a checkpoint in between" in again.stdout
    assert len(ranks.calls) == 3
    # with one in between it is another hang
    assert ranks(STEP=SAVE + hung, RUN_DIR=str(ranks.run_dir)).returncode == 0
    assert ranks.calls[4:] == ["requeue 123456"]


BAD = 'if [[ $node == node8 ]]; then echo "unhealthy: GPU 3: lost"; exit 1; fi; echo healthy'


def test_each_node_is_checked_before_the_job_starts(job):
    job("rl.steps=3", SLURM_GPUS_ON_NODE="8")
    folder = f"{job.run_dir}.logs/123456/health"
    options = f"--folder {folder} --gpus 8 --free-memory 50 --free-gpu-memory 90"
    assert job.checks == [f"node7 {options}", f"node8 {options}"]
    assert len(job.calls) == 1


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (BAD, "node8 failed the health check: unhealthy: GPU 3: lost"),
        ("[[ $node == node8 ]] || echo healthy", "node8 failed the health check: no answer, see "),
    ],
    ids=["unhealthy", "no answer"],
)
@pytest.mark.parametrize(
    ("excluded", "then"), [("(null)", "node8"), ("node[1-2],node4", "node[1-2],node4,node8")]
)
def test_a_node_that_fails_the_check_is_left_out_of_the_next_attempt(
    job, answer, told, excluded, then
):
    done = job(HEALTH=answer, EXCLUDED=excluded, STEP="echo never")
    assert done.returncode == 1
    assert told in done.stdout
    assert job.calls == ["requeue 123456", f"update JobId=123456 ExcNodeList={then}"]


def test_a_node_that_does_not_answer_in_time_is_left_out(job):
    site = Path(job.environment["OCC_SITE"])
    site.write_text(f"{site.read_text()}HEALTH_SECONDS=0.5\n")
    hangs = "[[ $node == node7 ]] || sleep 60; echo healthy"
    done = job(HEALTH=hangs)
    assert "node8 failed the health check: no answer, see " in done.stdout
    assert job.calls == ["requeue 123456", "update JobId=123456 ExcNodeList=node8"]


def test_a_node_that_fails_during_the_run_is_left_out_of_the_next_attempt(job):
    """Healthy before, not after: the step has left a mark."""
    later = BAD.replace("== node8", '== node8 && -e "$CALLS.ran"')
    done = job(HEALTH=later, STEP='touch "$CALLS.ran"; exit 134')
    assert done.returncode == 0
    assert job.calls[1:] == ["requeue 123456", "update JobId=123456 ExcNodeList=node8"]
    assert len(job.checks) == 4


def test_where_all_nodes_fail_none_is_left_out(job):
    done = job(HEALTH="echo unhealthy: disk full; exit 1")
    assert done.returncode == 1
    assert "it is not the nodes" in done.stdout
    assert job.calls == []


def test_nodes_are_left_out_five_times_at_most(job):
    for _ in range(6):
        done = job(HEALTH=BAD)
    assert "five attempts have left out nodes: not requeued" in done.stdout
    assert len([call for call in job.calls if call.startswith("requeue")]) == 5


def test_the_health_check_can_be_left_out(job):
    site = Path(job.environment["OCC_SITE"])
    site.write_text(f"{site.read_text()}HEALTH_SECONDS=0\n")
    assert job(HEALTH=BAD).returncode == 0
    assert job.checks == []


def test_a_signal_during_the_check_does_not_make_a_node_unhealthy(job):
    """It interrupts bash's wait for the steps of the check."""
    done = job(HEALTH='kill -USR1 "$JOB_SHELL"; sleep 0.3; echo healthy')
    assert done.returncode == 0, done.stdout
    assert len(job.calls) == 1


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize(("ended", "srun"), [(75, 0), (3, 3)])
def test_a_rank_outlives_the_signal_that_its_python_acts_on(tmp_path, number, ended, srun):
    """Slurm signals all processes of a step; what Python ended with is written down."""
    program, site, folder = (tmp_path / name for name in ("python", "site.sh", "ended"))
    act = f"trap 'exit {ended}' {number.name}; touch {tmp_path}/ready"
    program.write_text(f"#!/bin/bash\n{act}\nfor i in {{1..100}}; do sleep 0.1; done\n")
    program.chmod(0o755)
    site.write_text(f"PYTHON={program}\nsite_environment() {{ :; }}\n")
    folder.mkdir()
    names = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "WORLD_SIZE": "8"}
    environment = {**names, "OCC_SITE": str(site), "OCC_ENDED": str(folder)}
    rank = subprocess.Popen(
        ["bash", "slurm/rank.sh", "rl"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environment},
        start_new_session=True,
    )
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    os.killpg(rank.pid, number)
    assert rank.wait(timeout=20) == srun
    assert {file.name: file.read_text() for file in folder.iterdir()} == {"5": f"{ended}\n"}
