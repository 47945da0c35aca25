"""A Slurm of two nodes on this host, for ``local_slurm.py``."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from compare_runs import records

ROOT = Path(__file__).resolve().parent.parent
NODES = ("127.0.0.1", "127.0.0.2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel", "sinfo")
STEPS = 12
PATIENCE = 300  # seconds
UNFINISHED = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING")

VLLM = """\
#!/bin/bash
exec {python} -m tests.e2e.served_policy "$@"
"""

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
# the nodes have as many CPUs as is said here: room for several jobs
SlurmdParameters=config_overrides
KillWait=5
NodeName={nodes[0]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8
NodeName={nodes[1]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8
PartitionName=main Nodes=ALL Default=YES
"""

SITE = """\
source slurm/site.sh
unset SBATCH_GPUS_PER_NODE SBATCH_EXCLUSIVE
# both nodes are this host, which may have other things to do
HEALTH_FREE_MEMORY=1
PYTHON={python}
# in place of vLLM, a server that computes on the CPU with transformers
VLLM={folder}/vllm
site_environment() {{
    export OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo
    # a node that is to fail the health check
    [[ $0 != *health.sh || ! -e {folder}/sick_$SLURMD_NODENAME ]] || exit 1
}}
"""


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

    def submit(self, run_dir: Path, *overrides: str, nodes: int = 2) -> str:
        """Submit the RL job as a user does; returns its id."""
        words = ["slurm/rl.sbatch", "--config", "conf/rl/tiny.yaml", f"run_dir={run_dir}"]
        # drafts of a fixed length: `auto` follows the clock, and runs are compared
        words += [f"rl.steps={STEPS}", "rl.rollout.speculative.mode=fixed", *overrides]
        return self.sbatch(nodes, *words)

    def sbatch(self, nodes: int, *words: str) -> str:
        """Submit a script with its arguments; returns the job's id."""
        command = ["sbatch", "--parsable", f"--nodes={nodes}", f"--output={self.folder}/%j.out"]
        shell = ("bash", "-c", 'source "$OCC_SITE"; exec "$@"', "bash")
        return self.command(*shell, *command, *words)

    def field(self, job: str, name: str) -> str:
        """Of what Slurm says of a job."""
        fields = self.command("scontrol", "show", "job", "--oneliner", job).split()
        return next(field for field in fields if field.startswith(f"{name}=")).partition("=")[2]

    def state(self, job: str) -> str:
        """Such as RUNNING or COMPLETED."""
        return self.field(job, "JobState")

    def wait_for_steps(self, job: str, run_dir: Path, phase: str, count: int) -> None:
        """Wait until a phase has logged as many steps; exits if the job ends before."""

        def reached() -> bool:
            if self.state(job) not in UNFINISHED:
                self.stop(job)
            return len(records(run_dir, phase)) >= count

        wait_for(reached, f"{phase} in job {job}")

    def end_of(self, job: str) -> str:
        """Wait until a job is done; returns its state."""
        wait_for(lambda: self.state(job) not in UNFINISHED, f"the end of job {job}")
        return self.state(job)

    def wait_for_end(self, job: str) -> None:
        """Wait until a job is done; exits if it failed."""
        if self.end_of(job) != "COMPLETED":
            self.stop(job)

    def output(self, job: str) -> str:
        """What the job's script said."""
        return (self.folder / f"{job}.out").read_text()

    def stop(self, job: str) -> None:
        """Give up on a job."""
        sys.exit(f"job {job} is {self.state(job)}: see {job}.out and *.logs in {self.folder}")


@contextmanager
def local_slurm(folder: Path) -> Iterator[Cluster]:
    """A controller and two nodes; jobs and daemons end with the block."""
    folder.chmod(0o755)  # munged refuses a socket that others can't reach
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    settings = {"folder": folder, "host": socket.gethostname(), "ports": free_ports(3)}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(nodes=NODES, **settings))
    (folder / "site.sh").write_text(SITE.format(python=sys.executable, folder=folder))
    (folder / "vllm").write_text(VLLM.format(python=sys.executable))
    (folder / "vllm").chmod(0o755)
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
