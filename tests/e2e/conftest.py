"""Whole runs through the command line, in this process: a torn-down Megatron can start again."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_occ.cli import main
from tests.mcore.distributed import fork_server, free_port, start_and_join

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "conf" / "rl" / "tiny.yaml"


def with_regime(arguments):
    """OCC, the regime with most parts, where the arguments name none."""
    named = any(word.startswith(("mtp.preset", "mtp.trunk", "mtp.head")) for word in arguments)
    return () if named else ("mtp.preset=occ",)


class Runner:
    """Runs commands into folders below a temporary one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, command: str, name: str, *arguments: str, config: Path = TINY) -> Path:
        target = self.folder / name
        regime = () if command == "audit" else with_regime(arguments)
        main([command, "--config", str(config), f"run_dir={target}", *regime, *arguments])
        return target


@pytest.fixture
def run(tmp_path):
    return Runner(tmp_path)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """Checkpoint, by number of depths, of a model that already earns some reward."""
    pretrain = Runner(tmp_path_factory.mktemp("pretrained"))

    @functools.cache
    def checkpoint(depths: int) -> Path:
        settings = ("pretrain.steps=120", f"mtp.num_layers={depths}")
        folder = pretrain("pretrain", f"depths_{depths}", *settings)
        return folder / "checkpoints" / "pretrain" / "step_000120"

    return checkpoint


# of servers: idle is a share of the time, and requests go to the one that is free
CLOCK = re.compile("per_second|request_seconds|/idle$|/requests$")


def metrics(folder: Path, phase: str) -> list[dict]:
    """Lines of one phase without clocks."""
    return [
        {k: v for k, v in line.items() if not (k.startswith("time") or CLOCK.search(k))}
        for line in read_lines(folder / "metrics.jsonl")
        if line["phase"] == phase
    ]


def read_lines(file: Path) -> list[dict]:
    """Objects of a jsonl file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


class Killed(BaseException):
    """Stands for a signal: nothing in the product catches it."""


def kill_after(monkeypatch, trainer_class, step):
    """Make a trainer stop dead in the step after ``step``."""
    original = trainer_class.run_step

    def run_step(self):
        if self.step == step:
            raise Killed
        return original(self)

    monkeypatch.setattr(trainer_class, "run_step", run_step)


def torchrun(folder, ranks, *arguments, config=TINY):
    """The command ``rl`` in several processes, for five minutes at most; returns how it ended."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += ["--master-addr=127.0.0.1", "--master-port=0", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", "-m", "megatron_occ"]
    command += words_of_rl(folder, arguments, config)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def forked(folder, ranks, *arguments, config=TINY):
    """As :func:`torchrun`, which costs each rank seconds of imports; they begin as under srun."""
    log = folder.with_name(f"{folder.name}.log")
    given = (ranks, free_port(), words_of_rl(folder, arguments, config), log)
    context = fork_server()
    processes = [context.Process(target=_as_rank, args=(rank, *given)) for rank in range(ranks)]
    start_and_join(processes, 300)
    status = next((process.exitcode for process in processes if process.exitcode), 0)
    output = log.read_text()
    return subprocess.CompletedProcess(given[2], status, output, output)


def words_of_rl(folder, arguments, config):
    """Of the command line."""
    given = [f"run_dir={folder}", *with_regime(arguments), *arguments]
    return ["rl", "--config", str(config), *given]


def _as_rank(rank, ranks, port, words, log):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    main(words)


def assert_same_numbers(folder, other, phases=("rl", "validation")):
    """Metrics are equal up to rounding."""
    for phase in phases:
        pairs = list(zip(metrics(folder, phase), metrics(other, phase), strict=True))
        assert pairs
        for line, expected in pairs:
            assert line.keys() == expected.keys()
            for name, value in expected.items():
                if name == "logprob_gap/max":
                    assert line[name] < 1e-5
                elif name not in ("phase", "logprob_gap/mean"):
                    assert line[name] == pytest.approx(value, rel=1e-3, abs=1e-5), (phase, name)
