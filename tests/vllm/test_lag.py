"""Sampling ahead of training by a real vLLM: what it ends in the middle, and what is killed."""

from __future__ import annotations

import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_occ.rollout import Request, SamplingSettings
from megatron_occ.rollout.remote import RemoteEngine, RemoteSettings
from tests.e2e.conftest import metrics
from tests.e2e.test_lag import LAG, in_a_process, prompts_by_step, wait_for_step
from tests.vllm.conftest import MODEL
from tests.vllm.test_vllm import at, events, kill_during


@pytest.fixture(scope="module")
def versions(trained, tmp_path_factory):
    """Folders of two versions of the weights, by number."""
    other = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(trained[1], other)
    tensors = load_file(other / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    moved = {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
    save_file(moved, other / "model.safetensors", {"format": "pt"})
    return {1: trained[1], 2: other, 3: trained[1], 4: other}


def test_each_token_has_the_logprob_of_the_weights_that_its_version_names(
    versions, servers, tmp_path
):
    present = [1]

    def export(folder):
        shutil.copytree(versions[present[0]], folder, dirs_exist_ok=True)

    settings = RemoteSettings(
        "vllm", (servers[0].url,), tmp_path / "weights", 64, concurrency=16, update_timeout=300
    )
    engine = RemoteEngine(settings, export)
    requests = [Request([3, 4, 5 + index % 4], 1000 + index) for index in range(96)]
    engine.update_weights(1)
    pending = engine.submit(requests, SamplingSettings(1.0, max_response_length=12))
    member = engine._fleet.members[0]
    while member.load.queue < 16:
        time.sleep(0.01)
    time.sleep(0.3)
    present[0] = 2
    engine.update_weights(2)
    found = pending.result()
    assert [len(tokens) for tokens in found.tokens] == [12] * 96
    assert {version for row in found.versions for version in row} == {1, 2}
    straddling = [len(set(row)) > 1 for row in found.versions]
    assert 0 < sum(straddling) <= 16
    for version, place in ((1, 3), (2, 4)):
        present[0] = version
        engine.update_weights(place)
        for row, request in enumerate(requests):
            scores = member.server.score([*request.prompt, *found.tokens[row]])[2:]
            for score, logprob, drawn in zip(
                scores, found.logprobs[row], found.versions[row], strict=True
            ):
                if drawn == version:
                    assert logprob == pytest.approx(score, abs=1e-3)
    engine.close()


def test_a_server_that_is_killed_while_sampling_is_ahead(run, trained, servers, monkeypatch):
    sent = kill_during(monkeypatch, servers[0], requests=40)
    given = (f"rl.init_from={trained[0]}", *LAG)
    folder = run("rl", "run", *given, *at(*servers))
    servers[0].wait()
    lines = metrics(folder, "rl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["lag/max"] for line in lines] == [0, 1, 1, 1]
    assert any(servers[0].url in text for text in events(folder))
    assert len(sent) >= 40
    plain = run("rl", "plain", *given, "rl.async.max_lag=0", *MODEL)
    assert prompts_by_step(folder) == prompts_by_step(plain)


def test_a_trainer_that_is_killed_goes_on(run, trained, servers):
    given = (f"rl.init_from={trained[0]}", *LAG, *at(*servers))
    folder = run.folder / "killed"
    process = in_a_process(folder, *given)
    wait_for_step(folder, 2, seconds=200)
    process.kill()
    process.wait(60)
    assert in_a_process(folder, *given).wait(300) == 0, folder.with_suffix(".log").read_text()
    lines = metrics(folder, "rl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    plain = run("rl", "plain", f"rl.init_from={trained[0]}", *LAG, "rl.async.max_lag=0", *MODEL)
    assert prompts_by_step(folder) == prompts_by_step(plain)
