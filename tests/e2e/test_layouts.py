"""Two processes give the run of one, also from its middle: same rollouts, losses and lambda."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatron_occ.rl.trainer import GRPOTrainer
from tests.e2e.conftest import ROOT, TINY, Killed, kill_after, metrics

ARGUMENTS = ("rl.steps=2", "mtp.preset=occ_decoupled", "mtp.num_layers=2")


def launch(folder, *overrides):
    """The same command under torchrun with two processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--master-addr=127.0.0.1", "--master-port=0", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", "-m", "megatron_occ", "rl", "--config", str(TINY)]
    command += [f"run_dir={folder}", *ARGUMENTS, *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


LAYOUTS = pytest.mark.parametrize("overrides", [(), ("parallel.tensor=2",)], ids=["data", "tensor"])


@LAYOUTS
def test_two_processes_equal_one(run, pretrained, tmp_path, overrides):
    start = f"rl.init_from={pretrained(2)}"
    one = run("rl", "one", start, *ARGUMENTS)
    two = launch(tmp_path / "two", start, *overrides)
    assert (one / "rollouts.jsonl").read_text().count("\n") == 4
    assert any(line["grad_norm/trunk"] > 0 for line in metrics(one, "rl"))
    assert_same_numbers(two, one)


@LAYOUTS
def test_two_processes_go_on_with_the_run_of_one(run, pretrained, tmp_path, monkeypatch, overrides):
    start = f"rl.init_from={pretrained(2)}"
    one = run("rl", "one", start, *ARGUMENTS)
    with monkeypatch.context() as patched:
        kill_after(patched, GRPOTrainer, 1)
        with pytest.raises(Killed):
            run("rl", "two", start, *ARGUMENTS)
    two = launch(tmp_path / "two", start, *overrides, "--resume")
    assert [line["step"] for line in metrics(two, "rl")] == [1, 2]
    assert_same_numbers(two, one)


def assert_same_numbers(folder, other):
    """Metrics of RL and validation are equal up to rounding."""
    for phase in ("rl", "validation"):
        pairs = list(zip(metrics(folder, phase), metrics(other, phase), strict=True))
        assert pairs
        for line, expected in pairs:
            assert line.keys() == expected.keys()
            for name, value in expected.items():
                if name == "logprob_gap/max":
                    assert line[name] < 1e-5
                elif name not in ("phase", "logprob_gap/mean"):
                    assert line[name] == pytest.approx(value, rel=1e-3, abs=1e-5), (phase, name)
