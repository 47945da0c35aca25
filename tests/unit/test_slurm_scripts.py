"""The scripts in slurm/ run as in a job, with stand-ins for Slurm's commands.

A real Slurm runs them in ``tools/local_slurm.py``.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("pretrain", "rl")

pytestmark = pytest.mark.skipif(
    subprocess.run(["bash", "-c", "type mapfile"], capture_output=True).returncode != 0,
    reason="needs bash 4 or later",
)

# srun: the step with --dry-run answers with the run folder, the other runs what the test says
FAKES = {
    "srun": """
if [[ "$*" == *--dry-run ]]; then
    echo "folder             $RUN_DIR"
    printf 'command            rl\\nrun_dir            %s\\n%s' "$RUN_DIR" "${PLAN:-}"; exit
fi
echo "$WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >>"$CALLS"
eval "${STEP:-}"
""",
    "scontrol": """
case "$1 $2" in
"show hostnames") printf 'node7\\nnode8\\n' ;;
"show job") echo "JobId=$4 PreemptTime=${PREEMPTED:-None}" ;;
requeue*) echo "requeue $2" >>"$CALLS" ;;
esac
""",
    "squeue": """[[ "$*" != *"--jobs=${QUEUED:-none}" ]] || echo "$QUEUED RUNNING" """,
}


class Job:
    """A job of two nodes in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run_dir = folder, folder / "run"
        self.calls_file = folder / "calls"
        commands = folder / "bin"
        commands.mkdir()
        for name, body in FAKES.items():
            (commands / name).write_text(f"#!/bin/bash\n{body}")
            (commands / name).chmod(0o755)
        site = folder / "site.sh"
        site.write_text("source slurm/site.sh\nunset SBATCH_GPUS_PER_NODE\nexport JOB_SHELL=$$\n")
        self.environment = {
            "PATH": f"{commands}:{os.environ['PATH']}",
            "OCC_SITE": str(site),
            "RUN_DIR": str(self.run_dir),
            "CALLS": str(self.calls_file),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_CPUS_ON_NODE": "16",
        }

    def __call__(self, *arguments: str, script: str = "rl", **environment: str):
        return subprocess.run(
            ["bash", f"slurm/{script}.sbatch", *arguments],
            cwd=ROOT,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def directives(script: str) -> set[str]:
    lines = (ROOT / "slurm" / f"{script}.sbatch").read_text().splitlines()
    return {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}


@pytest.mark.parametrize("path", sorted((ROOT / "slurm").iterdir()), ids=lambda path: path.name)
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
    "SLURM_ARRAY_TASK_COUNT": "5",
}


@pytest.mark.parametrize(("array", "share"), [({}, ""), (ELEMENT, " --share 3/5")])
def test_a_study_is_one_process_and_an_array_element_does_its_share(job, array, share):
    done = job("study.yaml", "--jobs", "8", script="compare", **STUDY, **array)
    assert done.returncode == 0, done.stderr
    (call,) = job.calls
    options = "--cpus-per-task=16 --nodes=1 --ntasks=1 --ntasks-per-node=1 --kill-on-bad-exit=1"
    command = f"bash slurm/rank.sh compare study.yaml --jobs 8{share}"
    assert call == f"1 node7 23456 {options} {command}"
    assert {"--requeue", "--open-mode=append", "--nodes=1", "--ntasks=1"} <= directives("compare")
    assert "--signal=B:USR1@120" in directives("compare")


def test_a_study_near_the_time_limit_is_requeued_if_any_run_got_further(job):
    study = {**STUDY, "RUN_DIR": str(job.run_dir), "script": "compare"}
    further = 'mkdir -p "$RUN_DIR/runs/detach/seed_0/checkpoints/rl/step_000004"; '
    assert job("study.yaml", STEP=further + SIGNAL, **study).returncode == 0
    assert job.calls[1:] == ["requeue 123456"]
    job("study.yaml", STEP=SIGNAL, **study)
    assert len(job.calls) == 3


def test_the_share_of_an_array_element_is_not_given_twice(job):
    done = job("study.yaml", "--share", "1/2", script="compare", **STUDY, **ELEMENT)
    assert done.returncode == 1
    assert "an array gives --share" in done.stderr


@pytest.mark.parametrize("script", [*SCRIPTS, "convert", "compare"])
@pytest.mark.parametrize("missing", ["SLURM_JOB_ID", "SLURM_CPUS_ON_NODE"])
def test_outside_a_job_a_script_says_how_to_submit_it(job, script, missing):
    del job.environment[missing]
    done = job("import", "a", "b", script=script)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {missing} is not set, so this is not the script of a")
    assert "submit it with sbatch, see docs/cluster.md" in done.stderr
    assert job.calls == []


@pytest.mark.parametrize("script", [*SCRIPTS, "convert", "compare"])
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


@pytest.mark.parametrize("content", ["nothing", "empty", "run"])
def test_a_run_folder_with_a_run_in_it_is_resumed(job, content):
    if content != "nothing":
        job.run_dir.mkdir()
    if content == "run":
        (job.run_dir / "config.yaml").touch()
    job("rl.steps=3")
    assert job.calls[0].endswith("rl.steps=3 --resume" if content == "run" else "rl.steps=3")


ARRAY = {"SLURM_ARRAY_JOB_ID": "123456", "SLURM_ARRAY_TASK_ID": "3"}


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


SAVE = 'mkdir -p "$RUN_DIR/checkpoints/rl/step_000004"; '
UNFINISHED = 'mkdir -p "$RUN_DIR/checkpoints/rl/step_000004.tmp"; '
SIGNAL = 'kill -USR1 "$JOB_SHELL"; sleep 0.3'


@pytest.mark.parametrize(
    ("before", "array", "requeued"),
    [(SAVE, {}, "123456"), (SAVE, ARRAY, "123456_3"), (UNFINISHED, {}, None), ("", {}, None)],
    ids=["job", "element of an array", "unfinished checkpoint", "no checkpoint"],
)
def test_near_the_time_limit_a_job_with_a_new_checkpoint_is_requeued(job, before, array, requeued):
    run_dir = {"RUN_DIR": str(job.run_dir)}
    step = before.replace("$RUN_DIR", "$RUN_DIR/seed_3") if array else before
    done = job(STEP=step + SIGNAL, **array, **run_dir)
    assert done.returncode == 0, done.stderr
    assert job.calls[1:] == ([f"requeue {requeued}"] if requeued else [])
    assert ("Save more often" in done.stdout) == (requeued is None)


def test_near_the_time_limit_an_old_checkpoint_is_no_progress(job):
    (job.run_dir / "checkpoints" / "rl" / "step_000004").mkdir(parents=True)
    job(STEP=SIGNAL)
    assert len(job.calls) == 1


@pytest.mark.parametrize(
    ("preempted", "requeued"), [("2030-01-01T00:00:00", True), ("None", False)]
)
def test_a_job_that_fails_is_requeued_only_if_it_was_preempted(job, preempted, requeued):
    done = job(STEP="exit 143", PREEMPTED=preempted)
    assert done.returncode == 143
    assert job.calls[1:] == (["requeue 123456"] if requeued else [])


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
