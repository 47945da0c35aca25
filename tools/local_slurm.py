"""Start a real Slurm of two nodes on this host and interrupt an RL job on it.

    apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
    python tools/local_slurm.py [--folder DIR]

Needs root, Debian's Slurm and the Python of an installed checkout; takes about three minutes. Both
nodes are this host, under the addresses 127.0.0.1 and 127.0.0.2. Configuration, keys and logs lie
in the folder; nothing outside is changed, and all daemons are gone afterwards.

``slurm/rl.sbatch`` runs ``conf/rl/tiny.yaml`` over both nodes, a process on each, twice. One job is
requeued in pretraining, before there is a checkpoint, and again in RL by the signal that Slurm
sends when the time limit is near; the other is left alone. In the end both must have the same
checkpoint, bit for bit, and the same rollouts. Exits with 1 if not.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from compare_runs import compare, records

ROOT = Path(__file__).resolve().parent.parent
NODES = ("127.0.0.1", "127.0.0.2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel", "sinfo")
STEPS = 12
PATIENCE = 300  # seconds
UNFINISHED = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING")

CONFIGURATION = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job waits for as long as credentials last, two minutes by default
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# the nodes have as many CPUs as is said here
SlurmdParameters=config_overrides
KillWait=5
NodeName={nodes[0]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName={nodes[1]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=main Nodes=ALL Default=YES
"""

SITE = """\
source slurm/site.sh
unset SBATCH_GPUS_PER_NODE
# both nodes are this host, which may have other things to do
HEALTH_FREE_MEMORY=1
PYTHON={python}
site_environment() {{
    export OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo
}}
"""


def main() -> None:
    """Run both jobs, compare them, print a summary."""
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
        cut, whole = folder / "cut", folder / "whole"
        interrupted_run(cluster, cut)
        job = cluster.submit(whole)
        cluster.wait_for_end(job)
    report_attempts(cut, attempts=3)
    report_attempts(whole, attempts=1)
    sys.exit(0 if compare(cut, whole, "rl") else 1)


def check_machine() -> None:
    """Exit with what is missing."""
    if os.geteuid() != 0:
        sys.exit("Slurm's daemons need root here: run this in a container or a virtual machine")
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        packages = "slurmctld slurmd slurm-client munge"
        sys.exit(f"missing {missing}: apt-get install --no-install-recommends {packages}")


class Cluster:
    """Slurm's commands on the local cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "OCC_SITE": str(folder / "site.sh"),
        }

    def command(self, *words: str) -> str:
        """Output of a command, started in the checkout."""
        done = subprocess.run(
            words, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{' '.join(words)}: {done.stderr}")
        return done.stdout.strip()

    def submit(self, run_dir: Path) -> str:
        """Submit the RL job as a user does; returns its id."""
        words = ["sbatch", "--parsable", "--nodes=2", f"--output={run_dir}.out"]
        words += ["slurm/rl.sbatch", "--config", "conf/rl/tiny.yaml", f"run_dir={run_dir}"]
        # drafts of a fixed length: `auto` follows the clock, and the two runs are compared
        words += [f"rl.steps={STEPS}", "rl.rollout.speculative.mode=fixed"]
        return self.command("bash", "-c", 'source "$OCC_SITE"; exec "$@"', "bash", *words)

    def state(self, job: str) -> str:
        """Such as RUNNING or COMPLETED."""
        fields = self.command("scontrol", "show", "job", "--oneliner", job).split()
        return next(field for field in fields if field.startswith("JobState=")).split("=")[1]

    def wait_for_steps(self, job: str, run_dir: Path, phase: str, count: int) -> None:
        """Wait until a phase has logged as many steps; exits if the job ends before."""

        def reached() -> bool:
            if self.state(job) not in UNFINISHED:
                self.stop(job)
            return len(records(run_dir, phase)) >= count

        wait_for(reached, f"{phase} in job {job}")

    def wait_for_end(self, job: str) -> None:
        """Wait until a job is done; exits if it failed."""
        wait_for(lambda: self.state(job) not in UNFINISHED, f"the end of job {job}")
        if self.state(job) != "COMPLETED":
            self.stop(job)

    def stop(self, job: str) -> None:
        """Give up on a job."""
        sys.exit(f"job {job} is {self.state(job)}: see *.out and *.logs in {self.folder}")


@contextmanager
def local_slurm(folder: Path) -> Iterator[Cluster]:
    """A controller and two nodes; jobs and daemons end with the block."""
    folder.chmod(0o755)  # munged refuses a socket that others can't reach
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    settings = {"folder": folder, "host": socket.gethostname(), "ports": free_ports(3)}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(nodes=NODES, **settings))
    (folder / "site.sh").write_text(SITE.format(python=sys.executable))
    files = ("key", "socket", "pid", "log", "seed")
    munge = [f"--{n}{'' if n == 'socket' else '-file'}={folder}/munge.{n}" for n in files]
    cluster = Cluster(folder)
    with ExitStack() as stack:
        stack.enter_context(daemon(cluster, "munged", "--foreground", *munge))
        wait_for((folder / "munge.socket").exists, "munged")
        stack.enter_context(daemon(cluster, "slurmctld", "-D"))
        for node in NODES:
            stack.enter_context(daemon(cluster, "slurmd", "-D", "-N", node))
        states = ("sinfo", "--noheader", "--Node", "--format=%T")
        wait_for(lambda: cluster.command(*states).split() == ["idle"] * 2, "two idle nodes")
        print(f"{cluster.command('sinfo', '--version')}, nodes {' and '.join(NODES)}", flush=True)
        try:
            yield cluster
        finally:
            cluster.command("scancel", "--user=root")
            wait_for(lambda: not cluster.command("squeue", "--noheader"), "end of all jobs")


@contextmanager
def daemon(cluster: Cluster, *words: str) -> Iterator[None]:
    """A program that runs for the duration of the block."""
    log = cluster.folder / f"{words[0]}_{words[-1] if words[0] == 'slurmd' else 'log'}.txt"
    with log.open("w") as file:
        process = subprocess.Popen(words, env=cluster.environment, stdout=file, stderr=file)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Ask ten times a second."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            sys.exit(f"waited {PATIENCE} seconds for {what}")
        time.sleep(0.1)


def interrupted_run(cluster: Cluster, run_dir: Path) -> None:
    """Submit a job, requeue it from outside in pretraining, and by itself in RL."""
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
