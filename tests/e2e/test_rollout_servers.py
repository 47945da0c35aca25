"""RL whose responses a server samples, from the configuration alone."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_occ.cli import main
from megatron_occ.rl import trainer
from tests.e2e.conftest import (
    Killed,
    assert_same_numbers,
    forked,
    kill_after,
    metrics,
    read_lines,
    torchrun,
)
from tests.e2e.served_policy import ServedPolicy

SERVED = (
    "rl.rollout.engine=vllm",
    "rl.rollout.batch_size=512",
)


@pytest.fixture
def serve():
    """Starts servers; they end with the test."""
    started = []

    def start(**options):
        started.append(ServedPolicy(**options))
        return started[-1]

    yield start
    for server in started:
        server.close()


def at(*servers, **settings):
    """Overrides that name the servers."""
    urls = [server if isinstance(server, str) else server.url for server in servers]
    keys = {"urls": json.dumps(urls), "update_timeout": 5, **settings}
    return [*SERVED, *(f"rl.rollout.server.{key}={value}" for key, value in keys.items())]


def test_two_steps_by_a_server(run, pretrained, serve):
    server = serve()
    folder = run("rl", "run", f"rl.init_from={pretrained(1)}", *at(server))
    lines = metrics(folder, "rl")
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        # what the server sampled from is what the trainer computes
        assert line["logprob_gap/mean"] < 1e-5
    assert any(line["reward/mean"] > 0 for line in lines)
    # at the start, after each step of two updates
    assert server.updates == ["version-0", "version-2", "version-4"]
    kept = folder / "rollout_weights"
    assert [path.name for path in kept.iterdir()] == ["version-4"]


def test_a_resumed_run_goes_on_with_the_version_of_its_weights(run, pretrained, serve, monkeypatch):
    server, start = serve(), f"rl.init_from={pretrained(1)}"
    with monkeypatch.context() as patched:
        kill_after(patched, trainer.GRPOTrainer, 1)
        with pytest.raises(Killed):
            run("rl", "run", start, *at(server))
    del server.updates[:]
    other = serve()
    folder = run("rl", "run", "--resume", start, *at(server, other))
    assert server.updates == other.updates == ["version-2", "version-4"]
    events = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in events if line["phase"] == "rl"] == [1, 2]


def test_pretraining_is_measured_by_the_server_too(run, serve):
    server = serve()
    pretraining = ("pretrain.steps=6", "pretrain.validate_every=3", "rl.steps=1")
    run("rl", "run", *pretraining, *at(server))
    # RL counts its own updates
    assert server.updates == ["version-3", "version-6", "version-0", "version-2"]


def test_old_weights_end_the_run(run, pretrained, serve):
    server = serve(stuck=1)
    with pytest.raises(SystemExit, match=r"serves old (or partial )?weights: .*log-probs"):
        run("rl", "run", f"rl.init_from={pretrained(1)}", "rl.optimizer.lr=0.01", *at(server))
    assert len(metrics(run.folder / "run", "rl")) == 1


def test_no_server_ends_the_run(run, pretrained, serve):
    server = serve()
    server.close()
    with pytest.raises(SystemExit, match=rf"error: no server is up after 1 s: {server.url}"):
        run("rl", "run", f"rl.init_from={pretrained(1)}", *at(server, update_timeout=1))


def test_a_server_that_goes_away_ends_the_run(run, pretrained, serve, monkeypatch):
    server, step = serve(), trainer.GRPOTrainer.run_step

    def leave(self):
        if self.step == 1:
            server.close()
        return step(self)

    monkeypatch.setattr(trainer.GRPOTrainer, "run_step", leave)
    with pytest.raises(SystemExit, match=server.url):
        run("rl", "run", f"rl.init_from={pretrained(1)}", *at(server, update_timeout=1))


def test_eval_asks_the_server(run, pretrained, serve, capsys):
    server = serve()
    run("eval", "run", "--checkpoint", str(pretrained(1)), *at(server))
    assert "avg@1" in capsys.readouterr().out
    assert server.updates == ["version-0"]
    # the run folder of an evaluation holds nothing else
    assert {path.name for path in (run.folder / "run").iterdir()} == {"eval", "rollout_weights"}


def test_processes_share_the_server(run, pretrained, serve):
    start, server = f"rl.init_from={pretrained(1)}", serve()
    one = run("rl", "one", start, *at(server))
    other = serve()
    done = forked(run.folder / "several", 4, start, "parallel.tensor=2", *at(other))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_numbers(run.folder / "several", one)
    assert len(other.updates) == 3
    sent = [sorted(body["seed"] for body in each.sampled()) for each in (server, other)]
    assert sent[0] == sent[1]


@pytest.mark.parametrize(
    ("way", "layout"), [("memory", "pipeline"), ("network", "tensor")], ids=["memory", "network"]
)
def test_processes_send_weights_without_a_disk(run, pretrained, serve, tmp_path, way, layout):
    start, folder = f"rl.init_from={pretrained(1)}", tmp_path / "exported"
    main(["convert", "export", str(pretrained(1)), str(folder)])
    one = run("rl", "one", start, *at(serve()))
    server, several = serve(model=folder), run.folder / "several"
    given = (start, f"parallel.{layout}=2", *at(server, transfer=way))
    done = forked(several, 2, *given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_numbers(several, one)
    assert len(server.updates) == 3 and not (several / "rollout_weights").exists()


def test_every_process_ends_with_the_message(run, pretrained, serve):
    start, server = f"rl.init_from={pretrained(1)}", serve(stuck=1)
    folder, settings = run.folder / "run", ("parallel.pipeline=2", "rl.optimizer.lr=0.01")
    done = torchrun(folder, 2, start, *settings, *at(server))
    assert done.returncode != 0
    assert done.stderr.count("megatron-occ: error: http://") == 2
    assert "serves old" in done.stderr


def test_the_command_exports_what_a_run_gives_its_servers(run, pretrained, serve, tmp_path):
    folder = tmp_path / "exported"
    arguments = ["convert", "export", str(pretrained(1)), str(folder)]
    main(arguments)
    run("eval", "run", "--checkpoint", str(pretrained(1)), *at(serve()))
    given = run.folder / "run" / "rollout_weights" / "version-0"
    assert (folder / "config.json").read_text() == (given / "config.json").read_text()
    found, expected = (load_file(each / "model.safetensors") for each in (folder, given))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(SystemExit, match="is there already"):
        main(arguments)
