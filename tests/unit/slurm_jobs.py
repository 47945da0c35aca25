"""A Slurm job in a folder of its own, with stand-ins for Slurm's commands."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

needs_bash = pytest.mark.skipif(
    subprocess.run(["bash", "-c", "type mapfile"], capture_output=True).returncode != 0,
    reason="needs bash 4 or later",
)

# srun: the step with --dry-run answers with the run folder, those of the health check do what
# HEALTH says, that of servers starts one of them, the other what STEP says
FAKES = {
    "srun": """
if [[ "$*" == *slurm/health.sh* ]]; then
    all=$*
    node=${all#*--nodelist=} node=${node%% *}
    echo "$node ${all#*health.sh }" >>"$CALLS.health"
    eval "${HEALTH:-echo healthy}"; exit
fi
if [[ "$*" == *--dry-run* ]]; then
    echo "folder             $RUN_DIR"
    printf 'command            rl\\nrun_dir            %s\\n%s' "$RUN_DIR" "${PLAN:-}"; exit
fi
if [[ "$*" == *slurm/server.sh* ]]; then
    echo "$*" >"$CALLS.servers"
    SLURM_LOCALID=${LOCAL:-0} exec bash slurm/server.sh
fi
echo "$WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >>"$CALLS"
eval "${STEP:-}"
""",
    "scontrol": """
case "$*" in
"show hostnames node[1-2]") printf 'node1\\nnode2\\n' ;;
"show hostnames node[7-8]") printf 'node7\\nnode8\\n' ;;
"show job"*) echo "JobId=$4 PreemptTime=${PREEMPTED:-None} ExcNodeList=${EXCLUDED:-(null)} X=1" ;;
requeue*) echo "requeue $2" >>"$CALLS"; exit "${REFUSED:-0}" ;;
update*) echo "$*" >>"$CALLS" ;;
esac
""",
    "vllm": """
echo "$$ $CUDA_VISIBLE_DEVICES $VLLM_SERVER_DEV_MODE $VLLM_API_KEY $PYTHONPATH $*" >>"$CALLS.vllm"
eval "${SERVE:-sleep 60}"
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
    def checks(self) -> list[str]:
        """Steps of the health check: the node, and the arguments of slurm/health.py."""
        file = Path(f"{self.calls_file}.health")
        return sorted(file.read_text().splitlines()) if file.exists() else []

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []


def directives(script: str) -> set[str]:
    lines = (ROOT / "slurm" / f"{script}.sbatch").read_text().splitlines()
    return {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}


ARRAY = {"SLURM_ARRAY_JOB_ID": "123456", "SLURM_ARRAY_TASK_ID": "3"}
SAVE = 'mkdir -p "$RUN_DIR/checkpoints/rl/step_000004"; '
UNFINISHED = 'mkdir -p "$RUN_DIR/checkpoints/rl/step_000004.tmp"; '
RANKS = "rank() { SLURM_PROCID=$1 SLURM_LOCALID=0 STATUS=$2 bash slurm/rank.sh rl; }; "


def asked(then: str, ended: int = 75) -> str:
    """A step that is running when Slurm signals the job, and on the signal does and ends so."""
    trap = f"""trap '{then} exit {ended}' USR1; touch "$CALLS.running"; """
    return trap + 'kill -USR1 "$JOB_SHELL"; for i in {1..100}; do sleep 0.1; done; exit 1'
