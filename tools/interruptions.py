"""Kill a run again and again, and see whether anything is lost.

Two runs of one configuration, in several processes: one undisturbed, one that is interrupted at
random moments and started again with ``--resume`` each time, as a cluster would. At the end
weights, optimizer, log and responses have to be equal, bit for bit.

    python tools/interruptions.py FOLDER [--times 20] [--ranks 4] [--signal KILL] [--seed 0]
        [--config conf/rl/tiny.yaml] [key=value ...]

``KILL`` hits one rank alone, as a bad node would; ``TERM`` all of them, as Slurm's preemption.
The moments go round: in start-up, in pretraining, and while a checkpoint is written; from the
middle on RL takes pretraining's place. Prints a line an interruption and ends with 1 if something
differs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OVERRIDES = (
    "pretrain.steps=150",
    "pretrain.save_every=5",
    "pretrain.log_every=1",
    "rl.steps=80",
    "rl.save_every=2",
    "mtp.preset=occ",
    # `auto` follows the clock
    "rl.rollout.speculative.mode=fixed",
)
# a first half of the interruptions in pretraining, the others in RL
MOMENTS = (("start", "pretrain", "checkpoint"), ("start", "rl", "checkpoint"))
_LIMIT = 300.0  # seconds of one attempt


@dataclass(frozen=True)
class Interruption:
    """What was done to an attempt, and how it ended."""

    moment: str
    rank: str
    status: int
    step: str
    left: int

    def row(self) -> str:
        """A line of the table."""
        return (
            f"{self.moment:<10}  {self.rank:>5}  {self.status:>6}  {self.step:<16}  {self.left:>9}"
        )


class Job:
    """A configuration in several processes under torchrun.

    Args:
        folder: takes the runs and their logs.
        ranks: processes.
        config: file.
        overrides: of the configuration.
    """

    def __init__(self, folder: Path, ranks: int, config: Path, overrides: Sequence[str]) -> None:
        self.folder, self.ranks = folder, ranks
        self.words = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
        self.words += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
        self.words += ["-m", "megatron_occ", "rl", "--config", str(config), *overrides]

    def start(self, name: str) -> subprocess.Popen:
        """One attempt, which goes on where the last one ended."""
        run = self.folder / name
        resume = ["--resume"] if (run / "config.yaml").is_file() else []
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [*self.words, f"run_dir={run}", *resume],
                env=_environment(),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def end_alike(self, name: str, other: str) -> bool:
        """Whether two finished runs are equal, bit for bit; prints what was compared."""
        command = [sys.executable, str(ROOT / "tools" / "compare_runs.py")]
        command += [str(self.folder / name), str(self.folder / other)]
        return subprocess.run(command, env=_environment(), check=False).returncode == 0

    def finish(self, name: str) -> int:
        """Run to the end; returns the exit status."""
        return self.start(name).wait(_LIMIT)

    def interrupt(self, name: str, moment: str, kind: str, draw: random.Random) -> Interruption:
        """One attempt that is interrupted in the given moment."""
        run, process = self.folder / name, self.start(name)
        _wait_for(process, run, moment, draw)
        ranks = children(process.pid)
        target = "all"
        if kind == "KILL" and ranks:
            victim = draw.choice(ranks)
            target = str(ranks.index(victim))
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        elif kind == "TERM":
            process.terminate()
        status = process.wait(_LIMIT)
        time.sleep(1.0)
        return Interruption(moment, target, status, last_step(run), len(session(process.pid)))


def _environment() -> dict[str, str]:
    # a fixed number of threads: the last bits depend on it
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _wait_for(process: subprocess.Popen, run: Path, moment: str, draw: random.Random) -> None:
    """Until the moment has come, or the run has ended without it."""
    begin, left, wanted = lines(run), _unfinished(run), draw.randint(1, 8)
    delay = draw.uniform(0.0, {"start": 8.0, "checkpoint": 0.3}.get(moment, 1.0))
    deadline = time.monotonic() + _LIMIT
    while process.poll() is None and time.monotonic() < deadline:
        if moment == "start" and children(process.pid):
            break
        if moment == "checkpoint" and _unfinished(run) - left:
            break
        # of its own or a later phase: the earlier one may be over
        new = [line["phase"] for line in lines(run)[len(begin) :]]
        if new.count(moment) >= wanted or (moment == "pretrain" and "rl" in new):
            break
        time.sleep(0.005)
    end = time.monotonic() + delay
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)


def _unfinished(run: Path) -> set[tuple[str, int]]:
    """Checkpoints that are not whole, with the time of their folder: a killed run leaves one."""
    found = set()
    for path in run.glob("checkpoints/*/*.tmp"):
        with contextlib.suppress(OSError):  # whole by now
            found.add((path.name, path.stat().st_ctime_ns))
    return found


def children(pid: int) -> list[int]:
    """Processes that a process has started, by their order."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        # of a thread that has ended meanwhile
        with contextlib.suppress(OSError):
            found += [int(word) for word in file.read_text().split()]
    return sorted(found)


def session(leader: int) -> list[int]:
    """Processes of a session that are still there."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


def lines(run: Path) -> list[dict]:
    """Of the run's log, whole ones."""
    file = run / "metrics.jsonl"
    found = file.read_text().splitlines() if file.is_file() else []
    with contextlib.suppress(json.JSONDecodeError):
        return [json.loads(line) for line in found]
    return [json.loads(line) for line in found[:-1]]


def last_step(run: Path) -> str:
    """Where the log ends."""
    known = [line for line in lines(run) if line["phase"] in ("pretrain", "rl")]
    return f"{known[-1]['phase']} {known[-1]['step']}" if known else "-"


def compare_interrupted(job: Job, moments: Sequence[str], kind: str, seed: int) -> list[str]:
    """Interrupt in each of the moments, finish and compare; prints the table.

    An undisturbed run that is in the folder already is not done again.

    Returns:
        What differs, or went wrong.
    """
    draw, cut = random.Random(seed), f"cut_{kind}"
    if not _is_finished(job.folder / "whole") and job.finish("whole") != 0:
        return [f"the undisturbed run failed: {job.folder / 'whole.log'}"]
    print("moment       rank  status  log ended at      processes left", flush=True)
    found = []
    for number, moment in enumerate(moments):
        outcome = job.interrupt(cut, moment, kind, draw)
        print(outcome.row(), flush=True)
        if outcome.left:
            found.append(f"{outcome.left} processes left after interruption {number + 1}")
        if _is_finished(job.folder / cut):
            print("finished before the last interruption", flush=True)
            break
    status = job.finish(cut)
    if status != 0:
        return [*found, f"the last attempt failed with {status}: {job.folder / cut}.log"]
    return [*found, *([] if job.end_alike("whole", cut) else ["the runs differ, see above"])]


def _is_finished(run: Path) -> bool:
    return (run / "report.html").is_file()


def _halves(number: int) -> tuple[int, int]:
    return (number + 1) // 2, number // 2


def main() -> None:
    """Parse, run, tell."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", type=Path, default=ROOT / "conf" / "rl" / "tiny.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    options.folder.mkdir(parents=True)
    job = Job(options.folder, options.ranks, options.config, (*OVERRIDES, *options.overrides))
    moments = [
        moment
        for half, times in zip(MOMENTS, _halves(options.times), strict=True)
        for moment in itertools.islice(itertools.cycle(half), times)
    ]
    found = compare_interrupted(job, moments, options.signal, options.seed)
    print("\n".join(found) or "nothing was lost: weights, log and responses are equal, bit for bit")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
