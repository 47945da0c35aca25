"""RL whose responses a real vLLM samples, with drafts of the MTP head that is trained."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading

import pytest
from safetensors.torch import load_file, save_file

from megatron_occ.mcore.export import HuggingFaceExport
from megatron_occ.rl import trainer
from megatron_occ.rollout.remote.vllm import VllmServer
from tests.e2e.conftest import ROOT, metrics, read_lines
from tests.vllm.conftest import MODEL, at


def seconds(folder):
    """Of the median step."""
    lines = read_lines(folder / "metrics.jsonl")
    return statistics.median(line["time/step"] for line in lines if line["phase"] == "rl")


def events(folder):
    """What a person is told."""
    return [x["message"] for x in read_lines(folder / "metrics.jsonl") if "message" in x]


def test_twenty_steps_like_those_of_the_embedded_engine(run, trained, servers, capsys):
    start = (f"rl.init_from={trained[0]}", "rl.steps=20")
    served = run("rl", "served", *start, *at(servers[0]))
    embedded = run("rl", "embedded", *start, *MODEL)
    lines, others = metrics(served, "rl"), metrics(embedded, "rl")
    assert [line["step"] for line in lines] == list(range(1, 21))
    mean, largest = (max(x[f"logprob_gap/{name}"] for x in lines) for name in ("mean", "max"))
    assert mean < 1e-5 and largest < 1e-3
    # versions were served one after the other, to the last
    assert [path.name for path in (served / "rollout_weights").iterdir()] == ["version-40"]
    # drafts are those of the head that is trained
    lengths = [[x["draft/acceptance_length"] for x in each] for each in (lines, others)]
    assert min(lengths[0]) > 1.2
    with capsys.disabled():
        print(f"\nlog-prob gap {mean:.1e} on average, {largest:.1e} at most")
        for folder, each in zip((served, embedded), lengths, strict=True):
            print(
                f"{folder.name}: acceptance length {each[0]:.3f} to {each[-1]:.3f}, "
                f"{seconds(folder):.2f} s a step"
            )


@pytest.mark.parametrize(
    ("part", "says"), [("trunk", "serves old"), ("head", "drafts with old weights of the head")]
)
def test_an_update_that_leaves_out_a_part_is_refused(
    run, trained, servers, monkeypatch, part, says
):
    write, first = HuggingFaceExport.write, {}

    def write_partly(self, folder):
        write(self, folder)
        tensors = load_file(folder / "model.safetensors")
        if not first:
            first.update({n: t for n, t in tensors.items() if ("mtp" in n) == (part == "head")})
        save_file({**tensors, **first}, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(HuggingFaceExport, "write", write_partly)
    with pytest.raises(SystemExit, match=f"{servers[0].url} {says}"):
        # whose head moves with the first step
        run("rl", "run", f"rl.init_from={trained[0]}", "mtp.preset=detach", *at(servers[0]))
    assert len(metrics(run.folder / "run", "rl")) == 1


def kill_during(monkeypatch, server, requests):
    """Kill and start a server again when so many requests of training were sent to it."""
    sample, lock, sent = VllmServer.sample, threading.Lock(), []

    def sample_and_kill(self, request, sampling, stop=None, top=False):
        if self.client.url == server.url and stop is not None:
            with lock:
                sent.append(request)
                if len(sent) == requests:
                    server.kill()
                    server.start()
        return sample(self, request, sampling, stop, top)

    monkeypatch.setattr(VllmServer, "sample", sample_and_kill)
    return sent


def test_a_server_that_is_killed_in_a_step_comes_back(run, trained, servers, monkeypatch):
    server, (step, start) = servers[0], (trainer.GRPOTrainer.run_step, trained[0])
    # 16 responses of a step, and 8 of the validation before
    sent = kill_during(monkeypatch, server, requests=30)

    def step_with_both(self):
        if self.step == 3:
            server.wait()
        return step(self)

    monkeypatch.setattr(trainer.GRPOTrainer, "run_step", step_with_both)
    folder = run("rl", "run", f"rl.init_from={start}", "rl.steps=4", *at(*servers))
    lines = metrics(folder, "rl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert max(line["logprob_gap/mean"] for line in lines) < 1e-5
    told = [line.split(f"{server.url} ")[1] for line in events(folder) if server.url in line]
    assert told[0].startswith("is left out")
    assert "is back" in told
    assert len(sent) > 40


def test_a_run_waits_for_its_only_server(run, trained, servers, monkeypatch):
    kill_during(monkeypatch, servers[1], requests=20)
    folder = run("rl", "run", f"rl.init_from={trained[0]}", *at(servers[1]))
    lines = metrics(folder, "rl")
    assert [line["step"] for line in lines] == [1, 2]
    assert max(line["logprob_gap/mean"] for line in lines) < 1e-5


def test_the_documented_test_of_a_server_passes_after_runs(trained, servers, tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", f"--basetemp={tmp_path / 'shared'}"]
    command += ["tests/e2e/test_remote_server.py"]
    given = {
        "ROLLOUT_SERVER_URL": servers[0].url,
        "ROLLOUT_SERVER_MODEL": str(trained[1]),
        "PYTEST_ADDOPTS": "-p no:cacheprovider",
    }
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **given}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:]
