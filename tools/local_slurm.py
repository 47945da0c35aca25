"""Start a real Slurm of two nodes on this host and interrupt an RL job on it.

    apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
    python tools/local_slurm.py [--folder DIR]

Needs root, Debian's Slurm and the Python of an installed checkout; takes some ten minutes. Both
nodes are this host, under the addresses 127.0.0.1 and 127.0.0.2. Configuration, keys and logs lie
in the folder; nothing outside is changed, and all daemons are gone afterwards.

``slurm/rl.sbatch`` runs ``conf/rl/tiny.yaml`` over both nodes, a process on each: once left alone,
and again as each scenario below has it. In the end all must have the same
checkpoint, bit for bit, and the same rollouts. ``slurm/rl_servers.sbatch`` runs it with a stand-in
for vLLM. Exits with 1 if not.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from compare_runs import compare, records
from slurm_cluster import NODES, ROOT, STEPS, Cluster, check_machine, local_slurm, wait_for


def main() -> None:
    """Run all jobs, compare their runs, print a summary."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="for all files; default: a temporary folder")
    folder = parser.parse_args().folder
    check_machine()
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="local_slurm_"))
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        sys.exit(f"{folder} is not empty: name another --folder")
    print(f"files in {folder}", flush=True)
    with local_slurm(folder) as cluster:
        cluster.wait_for_end(cluster.submit(folder / "whole"))
        runs = [scenario(cluster) for scenario in (interrupted, hung, started_twice)]
        sick_node(cluster)
        evaluated(cluster, folder / "whole")
        served(cluster, folder / "whole")
    equal = [compare(run, folder / "whole", "rl") for run in runs]
    sys.exit(0 if all(equal) else 1)


def interrupted(cluster: Cluster) -> Path:
    """A job that is requeued from outside in pretraining, and by itself in RL.

    The first comes before there is a checkpoint, the second by the signal that Slurm sends when
    the time limit is near.
    """
    run_dir = cluster.folder / "interrupted"
    job = cluster.submit(run_dir)
    cluster.wait_for_steps(job, run_dir, "pretrain", 2)
    cluster.command("scontrol", "requeue", job)
    step = records(run_dir, "pretrain")[-1]["step"]
    print(f"job {job}: requeued after pretraining step {step}", flush=True)
    cluster.wait_for_steps(job, run_dir, "rl", STEPS // 3)
    # what #SBATCH --signal asks for
    cluster.command("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: cluster.state(job) == "PENDING", "the job's requeueing itself")
    step = records(run_dir, "rl")[-1]["step"]
    print(f"job {job}: requeued itself after RL step {step} of {STEPS}", flush=True)
    cluster.wait_for_end(job)
    report_attempts(run_dir, attempts=3)
    return run_dir


def hung(cluster: Cluster) -> Path:
    """A job one of whose ranks is stopped: the other one ends it, and it tries again once."""
    run_dir = cluster.folder / "hung"
    limits = ("rollout", "reward", "logprobs", "train", "validation", "save", "other")
    job = cluster.submit(run_dir, *(f"phase_limits.{name}=20" for name in limits))
    cluster.wait_for_steps(job, run_dir, "rl", STEPS // 3)
    os.kill(process_of(job, rank=1), signal.SIGSTOP)
    wait_for(lambda: cluster.state(job) == "PENDING", "the job's requeueing itself")
    cluster.wait_for_end(job)
    print(*lines_with(cluster.output(job), "a rank waited too long"), sep="\n", flush=True)
    report_attempts(run_dir, attempts=2)
    return run_dir


def started_twice(cluster: Cluster) -> Path:
    """A run folder that a job writes to: nobody else gets it.

    Two jobs at once; a third one, and a start by hand, while the first of them runs.
    """
    run_dir = cluster.folder / "twice"
    jobs = [cluster.submit(run_dir), cluster.submit(run_dir)]
    wait_for(lambda: len(records(run_dir, "pretrain")) >= 1, "one of two jobs")
    late = cluster.submit(run_dir)
    words = [sys.executable, "-m", "megatron_occ", "rl", "--config", "conf/rl/tiny.yaml"]
    by_hand = subprocess.run(
        [*words, f"run_dir={run_dir}", "--resume"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    states = {job: cluster.end_of(job) for job in (*jobs, late)}
    print(f"jobs {states}", f"by hand: {by_hand.stderr.strip()}", sep="\n", flush=True)
    if sorted(states.values()) != ["COMPLETED", "FAILED", "FAILED"] or not by_hand.returncode:
        sys.exit(f"{run_dir} was written to by more than one, or by none")
    for job, state in states.items():
        if state == "FAILED":
            print(*lines_with(cluster.output(job), "error: "), sep="\n", flush=True)
    return run_dir


def sick_node(cluster: Cluster) -> None:
    """A job on a node that fails the health check: it goes to the other one."""
    sick, other = NODES
    mark = cluster.folder / f"sick_{sick}"
    mark.touch()
    job = cluster.submit(cluster.folder / "sick", nodes=1)
    cluster.wait_for_end(job)
    mark.unlink()
    print(*lines_with(cluster.output(job), "health check"), sep="\n", flush=True)
    nodes = cluster.field(job, "NodeList")
    print(f"job {job}: {cluster.field(job, 'ExcNodeList')} left out, done on {nodes}", flush=True)
    if nodes != other:
        sys.exit(f"job {job} was to end on {other}")


def evaluated(cluster: Cluster, run_dir: Path) -> None:
    """The last checkpoint of a run, on both nodes."""
    (checkpoint,) = (run_dir / "checkpoints" / "rl").glob(f"step_*{STEPS}")
    words = ["--config", str(run_dir / "config.yaml"), "--checkpoint", str(checkpoint)]
    job = cluster.sbatch(2, "slurm/eval.sbatch", *words, f"run_dir={cluster.folder}/evaluated")
    cluster.wait_for_end(job)
    (log,) = (cluster.folder / "evaluated.logs" / job).glob("rank_0000.log")
    print(*log.read_text().splitlines()[-4:], sep="\n", flush=True)


def served(cluster: Cluster, run_dir: Path) -> None:
    """A job of trainer and server, a node for each, whose server is killed, and which is requeued.

    A stand-in for vLLM serves.
    """
    (start,) = (run_dir / "checkpoints" / "pretrain").glob("step_*")
    model, served_run = cluster.folder / "model", cluster.folder / "served"
    export = ("-m", "megatron_occ", "convert", "export", str(start), str(model))
    cluster.command(sys.executable, *export)
    cluster.environment["SERVER_MODEL"] = str(model)
    words = ["--config", "conf/rl/tiny.yaml", f"run_dir={served_run}", f"rl.init_from={start}"]
    words += [f"rl.steps={STEPS}", "rl.async.max_lag=1", "rl.rollout.batch_size=512"]
    job = cluster.sbatch(1, ":", "--nodes=1", "slurm/rl_servers.sbatch", *words)
    cluster.wait_for_steps(job, served_run, "rl", STEPS // 4)
    (server,) = servers_of(model)
    os.kill(server, signal.SIGKILL)
    cluster.wait_for_steps(job, served_run, "rl", STEPS // 2)
    cluster.command("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: cluster.state(job) == "PENDING", "the job's requeueing itself")
    cluster.wait_for_end(job)
    report_attempts(served_run, attempts=2)
    (log,) = Path(f"{served_run}.logs").glob("*/server_0000.log")
    starts = lines_with(log.read_text(), ": server on")
    print(*starts, sep="\n", flush=True)
    wait_for(lambda: not servers_of(model), "the end of the server")
    if len(starts) != 3 or len(records(served_run, "rl")) != STEPS:
        sys.exit(f"{served_run}: not {STEPS} steps with three starts of a server, see its logs")


def servers_of(model: Path) -> list[int]:
    """Processes of the stand-in for vLLM."""
    wanted, found = f"\0serve\0{model}\0".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone by now
            if wanted in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def process_of(job: str, rank: int) -> int:
    """Of a rank of a job that runs on this host."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"RANK={rank}".encode()}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            known = set((folder / "environ").read_bytes().split(b"\0"))
            words = (folder / "cmdline").read_bytes()
        except OSError:  # gone by now
            continue
        if wanted <= known and b"-m\0megatron_occ\0" in words:
            return int(folder.name)
    sys.exit(f"rank {rank} of job {job} is not there")


def lines_with(text: str, words: str) -> list[str]:
    """Of a text."""
    return [line for line in text.splitlines() if words in line]


def report_attempts(run_dir: Path, attempts: int) -> None:
    """Print how each attempt of a job began; exits if their number is another."""
    (log,) = Path(f"{run_dir}.logs").glob("*/rank_0000.log")
    lines = log.read_text().splitlines()
    words = ("attempt", "resumed from", "no checkpoint of")
    for line in lines:
        if any(word in line for word in words):
            print(f"{run_dir.name}: {line.replace(str(run_dir.parent), '...')}")
    found = sum(" attempt " in line for line in lines)
    if found != attempts:
        sys.exit(f"{run_dir} has {found} attempts, expected {attempts}")


if __name__ == "__main__":
    main()
