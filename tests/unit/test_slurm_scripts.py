"""The scripts in slurm/ start a job as they should, with stand-ins for Slurm's commands.

A real Slurm runs them in ``tools/local_slurm.py``.
"""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.unit.slurm_jobs import ARRAY, ROOT, Job, asked, directives, needs_bash

SCRIPTS = ("pretrain", "rl")

pytestmark = needs_bash


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


BASH = sorted(path for path in (ROOT / "slurm").iterdir() if path.suffix in (".sh", ".sbatch"))


@pytest.mark.parametrize("path", BASH, ids=lambda path: path.name)
def test_bash_can_read_it(path):
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_jobs_may_be_requeued_and_keep_their_output(script):
    assert directives(script) == {
        f"--job-name={script}",
        "--output=slurm-%x-%j.out",
        "--open-mode=append",
        "--requeue",
        "--signal=B:USR1@120",
    }


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_process_for_each_task_runs_the_command_with_the_arguments(job, script):
    done = job("--config", "a b.yaml", "rl.steps=3", script=script, SLURM_NTASKS_PER_NODE="4")
    assert done.returncode == 0, done.stderr
    (call,) = job.calls
    environment, _, options = call.partition(" --")
    # the port is 20000 + 123456 mod 10000
    assert environment == "8 node7 23456"
    log = f"{job.run_dir}.logs/123456/rank_%4t.log"
    wanted = ["cpus-per-task=4", "nodes=2", "ntasks=8", "ntasks-per-node=4"]
    wanted += ["kill-on-bad-exit=1", f"output={log}", "open-mode=append"]
    assert options.split(" bash ")[0].split(" --") == wanted
    assert call.endswith(f" bash slurm/rank.sh {script} --config a b.yaml rl.steps=3")
    assert not job.run_dir.exists()


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"SLURM_NTASKS_PER_NODE": "1"}, False),
        ({"OCC_SITE": "slurm/site.sh"}, False),
        ({"SLURM_NTASKS_PER_NODE": "4"}, False),
        ({"OCC_SITE": "slurm/site.sh", "SLURM_GPUS_PER_NODE": "a100:8"}, True),
    ],
    ids=["no GPUs", "GPUs in site.sh alone", "more tasks", "GPUs held"],
)
def test_a_conversion_is_one_process_with_all_cpus_and_no_gpu(job, environment, told):
    done = job("import", "a b", "out", script="convert", **environment)
    assert done.returncode == 0, done.stderr
    assert ("this job holds GPUs (a100:8), which" in done.stdout) == told
    (call,) = job.calls
    wanted = "--cpus-per-task=16 --nodes=1 --ntasks=1 bash slurm/rank.sh convert import a b out"
    assert call == f"1 node7 23456 {wanted}"
    assert {"--requeue", "--open-mode=append", "--nodes=1", "--ntasks=1"} <= directives("convert")
    assert not [line for line in directives("convert") if "gpu" in line or "exclusive" in line]


STUDY = {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS_PER_NODE": "1"}
ELEMENT = {
    "SLURM_ARRAY_JOB_ID": "123456",
    "SLURM_ARRAY_TASK_ID": "6",
    "SLURM_ARRAY_TASK_MIN": "4",
    "SLURM_ARRAY_TASK_MAX": "8",
    "SLURM_ARRAY_TASK_COUNT": "5",
}
# --array=4-8:2
EVERY_SECOND = {**ELEMENT, "SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_COUNT": "3"}
# --array=6, as for one that failed: it does what is left of all
ALONE = {**ELEMENT, "SLURM_ARRAY_TASK_MIN": "6", "SLURM_ARRAY_TASK_MAX": "6"}
ALONE |= {"SLURM_ARRAY_TASK_COUNT": "1"}


@pytest.mark.parametrize(
    ("array", "share"),
    [
        ({}, ""),
        (ELEMENT, " --share 3/5"),
        (EVERY_SECOND, " --share 2/3"),
        (ALONE, " --share 1/1"),
    ],
)
def test_a_study_is_one_process_and_an_array_element_does_its_share(job, array, share):
    done = job("study.yaml", "--jobs", "8", script="compare", **STUDY, **array)
    assert done.returncode == 0, done.stderr
    (call,) = job.calls
    options = "--cpus-per-task=16 --nodes=1 --ntasks=1 --ntasks-per-node=1 --kill-on-bad-exit=1"
    command = f"bash slurm/rank.sh compare study.yaml --jobs 8{share}"
    assert call == f"1 node7 23456 {options} {command}"
    assert {"--requeue", "--open-mode=append", "--nodes=1", "--ntasks=1"} <= directives("compare")
    assert "--signal=B:USR1@120" in directives("compare")


def test_shares_of_an_uneven_array_are_refused(job):
    """--array=4,6,8,11 has no I-th of N."""
    uneven = {"SLURM_ARRAY_TASK_MAX": "11", "SLURM_ARRAY_TASK_COUNT": "4"}
    done = job("study.yaml", script="compare", **STUDY, **{**ELEMENT, **uneven})
    assert done.returncode == 1
    assert (
        "the elements of the array, 4 to 11, are not evenly spaced: give --array=1-N" in done.stderr
    )
    assert job.calls == []


def test_a_study_near_the_time_limit_is_requeued_if_any_run_got_further(job):
    study = {**STUDY, "RUN_DIR": str(job.run_dir), "script": "compare"}
    further = 'mkdir -p "$RUN_DIR/runs/detach/seed_0/checkpoints/rl/step_000004"; '
    assert job("study.yaml", STEP=asked(further, ended=130), **study).returncode == 0
    assert job.calls[1:] == ["requeue 123456"]
    assert job("study.yaml", STEP=asked("", ended=130), **study).returncode == 130
    assert len(job.calls) == 3


def test_an_evaluation_runs_on_all_nodes_and_is_not_resumed(job):
    job.run_dir.mkdir()
    (job.run_dir / "config.yaml").touch()
    given = ("--config", "a.yaml", "--checkpoint", "runs/a b/step_000004")
    done = job(*given, script="eval", SLURM_NTASKS_PER_NODE="2")
    assert done.returncode == 0, done.stderr
    (call,) = job.calls
    assert call.startswith("4 node7 23456 ") and "--ntasks=4 " in call
    assert call.endswith(f" bash slurm/rank.sh eval {' '.join(given)}")
    assert directives("eval") == {
        "--job-name=eval",
        "--output=slurm-%x-%j.out",
        "--open-mode=append",
        "--requeue",
    }
    job(*given, script="eval", STEP="exit 143", PREEMPTED="2030-01-01T00:00:00")
    assert job.calls[2:] == ["requeue 123456"]
    refused = job(*given, script="eval", **ARRAY)
    assert refused.returncode == 1 and "takes no --array" in refused.stderr


def test_the_share_of_an_array_element_is_not_given_twice(job):
    done = job("study.yaml", "--share", "1/2", script="compare", **STUDY, **ELEMENT)
    assert done.returncode == 1
    assert "an array gives --share" in done.stderr


@pytest.mark.parametrize("script", [*SCRIPTS, "rl_servers", "convert", "compare", "eval"])
@pytest.mark.parametrize("missing", ["SLURM_JOB_ID", "SLURM_CPUS_ON_NODE"])
def test_outside_a_job_a_script_says_how_to_submit_it(job, script, missing):
    del job.environment[missing]
    done = job("import", "a", "b", script=script)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {missing} is not set, so this is not the script of a")
    assert "submit it with sbatch, see docs/cluster.md" in done.stderr
    assert job.calls == []


@pytest.mark.parametrize("script", [*SCRIPTS, "rl_servers", "convert", "compare", "eval"])
def test_outside_a_job_help_is_the_head_of_the_script(job, script):
    del job.environment["SLURM_JOB_ID"]
    done = job("--help", script=script)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\n  sbatch --" in done.stdout and f" slurm/{script}.sbatch " in done.stdout
    assert "#SBATCH" not in done.stdout and "set -euo" not in done.stdout


@pytest.mark.parametrize(
    ("asked", "gpus"),
    [
        ({"SLURM_GPUS_ON_NODE": "8"}, 8),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_GPUS_PER_NODE": "a100:4"}, 4),
    ],
)
def test_with_gpus_there_is_a_process_for_each_that_was_asked_for(job, asked, gpus):
    job(SLURM_NTASKS_PER_NODE="1", **asked)
    assert job.calls[0].startswith(f"{2 * gpus} node7 ")
    wanted = f" --cpus-per-task={16 // gpus} --gpus-per-node={gpus} --gpu-bind=none "
    assert wanted in job.calls[0]


def test_a_job_without_the_gpus_of_the_site_is_refused(job):
    done = job(OCC_SITE="slurm/site.sh")
    assert done.returncode == 1
    assert "source slurm/site.sh` before sbatch" in done.stderr
    assert job.calls == []


@pytest.mark.parametrize("content", ["nothing", "empty", "lock", "run"])
def test_a_run_folder_with_a_run_in_it_is_resumed(job, content):
    if content != "nothing":
        job.run_dir.mkdir()
    if content in ("lock", "run"):
        (job.run_dir / "writer.lock").touch()
    if content == "run":
        (job.run_dir / "config.yaml").touch()
    job("rl.steps=3")
    assert job.calls[0].endswith("rl.steps=3 --resume" if content == "run" else "rl.steps=3")


def test_each_element_of_an_array_has_its_seed_and_folder(job):
    job("rl.steps=3", **ARRAY)
    folder = job.run_dir / "seed_3"
    assert job.calls[0].endswith(f"rl.steps=3 seed=3 run_dir={folder}")
    assert f"--output={folder}.logs/" in job.calls[0]


def test_an_array_refuses_a_seed(job):
    done = job("seed=1", **ARRAY)
    assert done.returncode == 1
    assert "an array gives seed=" in done.stderr


def test_a_run_folder_belongs_to_one_job_at_a_time(job):
    job()
    second = {"SLURM_JOB_ID": "123457"}
    done = job(QUEUED="123456", **second)
    assert done.returncode == 1
    assert "job 123456 uses run_dir=" in done.stderr
    assert len(job.calls) == 1
    assert job(**second).returncode == 0  # the first one has left the queue
    assert job(QUEUED="123457", **second).returncode == 0  # itself, requeued


def test_a_rank_gets_the_names_of_torch(tmp_path):
    program, site = tmp_path / "python", tmp_path / "site.sh"
    program.write_text('#!/bin/bash\necho "$RANK $LOCAL_RANK $WORLD_SIZE $GLOO_SOCKET_IFNAME $*"\n')
    program.chmod(0o755)
    site.write_text(f"PYTHON={program}\nsite_environment() {{ export GLOO_SOCKET_IFNAME=ib0; }}\n")
    names = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "WORLD_SIZE": "8", "OCC_SITE": str(site)}
    done = subprocess.run(
        ["bash", "slurm/rank.sh", "rl", "--config", "a b.yaml"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **names},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "5 1 8 ib0 -m megatron_occ rl --config a b.yaml\n"


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_LOCALID", "WORLD_SIZE"])
def test_a_rank_started_by_hand_says_what_starts_it(missing):
    names = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "WORLD_SIZE": "1"}
    del names[missing]
    done = subprocess.run(
        ["bash", "slurm/rank.sh", "rl"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **names},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {missing} is not set: slurm/rank.sh is called by the")
    assert "Submit one of them with sbatch" in done.stderr


def test_a_job_whose_files_are_not_there_does_not_start(job):
    done = job(PLAN="\nnot found          rl.init_from=GIVE/rl.init_from\n")
    assert done.returncode == 1
    assert "not found          rl.init_from=GIVE/rl.init_from\n" in done.stdout
    assert "files are not found, see above" in done.stderr
    assert not job.run_dir.exists()
