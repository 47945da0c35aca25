"""Runs whose sampling is ahead of training: nothing lost, nothing twice, whatever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_occ.rl import trainer
from tests.e2e.conftest import (
    ROOT,
    TINY,
    forked,
    metrics,
    read_lines,
)
from tests.e2e.served_policy import ServedPolicy
from tests.e2e.test_rollout_servers import at

STEPS = 4
LAG = ("rl.async.max_lag=1", f"rl.steps={STEPS}", "rl.save_every=1", "rl.rollout.log_samples=16")


@pytest.fixture
def serve():
    """Starts servers; they end with the test."""
    started = []

    def start():
        started.append(ServedPolicy())
        return started[-1]

    yield start
    for server in started:
        server.close()


def prompts_by_step(folder):
    found = {}
    for line in read_lines(folder / "rollouts.jsonl"):
        found.setdefault(line["step"], []).append(line["prompt"])
    return found


def lags(folder):
    return [line["lag/max"] for line in metrics(folder, "rl")]


def test_training_processes_are_ahead_on_any_layout(run, pretrained):
    # how many drafts pay is measured
    given = (f"rl.init_from={pretrained(1)}", *LAG, "rl.rollout.speculative.mode=off")
    one = run("rl", "one", *given)
    assert lags(one) == [0, 1, 1, 1]
    done = forked(run.folder / "two", 2, *given)
    assert done.returncode == 0, done.stderr[-3000:]
    for line, other in zip(metrics(one, "rl"), metrics(run.folder / "two", "rl"), strict=True):
        for name, value in line.items():
            if name != "phase":
                assert other[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    plain = run("rl", "plain", *given, "rl.async.max_lag=0")
    assert prompts_by_step(plain) == prompts_by_step(one)
    # the first step is that of weights that nothing has moved
    first, other = (metrics(folder, "rl")[0] for folder in (plain, one))
    assert {k: v for k, v in other.items() if not k.startswith("lag/")} == first


def in_a_process(folder, *arguments):
    """A run of its own, which goes on where it was killed."""
    command = [sys.executable, "-m", "megatron_occ", "rl", "--config", str(TINY)]
    command += [f"run_dir={folder}", "mtp.preset=occ", *arguments]
    if (folder / "config.yaml").is_file():
        command.append("--resume")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    log = folder.with_suffix(".log").open("ab")
    return subprocess.Popen(command, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def wait_for_step(folder, step, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        file = folder / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []
        if any(f'"step": {step},' in line and '"lag/max"' in line for line in lines):
            return
        time.sleep(0.01)
    raise AssertionError(folder.with_suffix(".log").read_text()[-3000:])


def test_a_trainer_that_is_killed_goes_on_with_the_same_prompts(run, pretrained, serve):
    server, start = serve(), f"rl.init_from={pretrained(1)}"
    plain = run("rl", "plain", start, *LAG, "rl.async.max_lag=0", *at(serve()))
    folder = run.folder / "killed"
    given = (start, *LAG, *at(server))
    process = in_a_process(folder, *given)
    # responses of step 3 are under way by now, or there
    wait_for_step(folder, 2)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert in_a_process(folder, *given).wait(240) == 0, folder.with_suffix(".log").read_text()
    lines = [line for line in read_lines(folder / "metrics.jsonl") if line["phase"] == "rl"]
    assert [line["step"] for line in lines if "lag/max" in line] == [1, 2, 3, 4]
    assert max(lags(folder)) == 1
    assert prompts_by_step(folder) == prompts_by_step(plain)


def test_a_server_that_goes_away_in_the_middle_loses_nothing(run, pretrained, serve, monkeypatch):
    one, other, step = serve(), serve(), trainer.GRPOTrainer.run_training
    start = f"rl.init_from={pretrained(1)}"

    def leave(self, *arguments):
        # the next step's responses are asked for
        if self.step == 1:
            other.close()
        return step(self, *arguments)

    plain = run("rl", "plain", start, *LAG, "rl.async.max_lag=0", *at(serve()))
    monkeypatch.setattr(trainer.GRPOTrainer, "run_training", leave)
    folder = run("rl", "run", start, *LAG, *at(one, other))
    assert [line["step"] for line in metrics(folder, "rl")] == [1, 2, 3, 4]
    assert prompts_by_step(folder) == prompts_by_step(plain)
    told = [x["message"] for x in read_lines(folder / "metrics.jsonl") if "message" in x]
    assert any(f"{other.url} is left out" in text for text in told)
    served = [line["server/1/version"] for line in metrics(folder, "rl")]
    assert served == [0, 2, 4, 6]


def test_sampling_goes_on_while_a_step_trains(run, pretrained, serve, monkeypatch):
    server, step, seen = serve(), trainer.GRPOTrainer.run_training, []

    def asked():
        # 8 of the validation before, and those of probes, whose seeds are small
        return sum(body["seed"] > 1000 for body in server.sampled()) - 8

    def train(self, *arguments):
        deadline = time.monotonic() + 30
        while asked() < min(self.step + 2, STEPS) * 32 and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append(asked())
        return step(self, *arguments)

    monkeypatch.setattr(trainer.GRPOTrainer, "run_training", train)
    given = (f"rl.init_from={pretrained(1)}", *LAG, *at(server))
    folder = run("rl", "run", *given)
    # those of the next step came while this one had not begun to train
    assert seen == [64, 96, 128, 128]
    assert lags(folder) == [0, 1, 1, 1]
