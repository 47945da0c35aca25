"""Sections of the GPU check on purposely wrong results: each can fail."""

from __future__ import annotations

import functools
import re
import shutil

import pytest

from benchmarks.layout_cases import Case
from benchmarks.layout_runs import measure, reference
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint import read_plain
from megatron_occ.mcore.checkpoint_folder import list_checkpoints
from megatron_occ.mcore.estimate.ranks import estimate
from megatron_occ.mcore.inference.engine import Speculation
from megatron_occ.mcore.startup import initialize, shutdown
from megatron_occ.rl.calibration import CoefficientTracker
from tests.e2e.conftest import Runner
from tests.mcore.simulated_cuda import simulated_cuda
from tools.gpu import training
from tools.gpu.correct import MODELS, engine_gap
from tools.gpu.judging import judge_deviations, judge_engine, judge_live
from tools.gpu.results import FAILED, OK
from tools.gpu.runs import resume_row
from tools.gpu.training import TOY_TRAINING, Side, live_bytes

CASE = Case("dense", 1, MODELS["dense"], ())


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What one process finds, and where it left it."""
    folder = tmp_path_factory.mktemp("reference")
    metrics = reference(CASE.model, folder)
    shutdown()
    return folder, metrics


@pytest.fixture(autouse=True)
def _torn_down():
    yield
    shutdown()


def judged(folder, metrics):
    found = measure(CASE, folder, metrics)
    deviations = {
        "loss": found.loss,
        "lambda": found.coefficient,
        "gradient": found.gradient,
        "weights": found.parameter,
    }
    row = judge_deviations("dense", deviations, found.missing)
    return row.status, {name for name, value in deviations.items() if value > 1e-4}


def test_the_same_computation_passes(expected):
    assert judged(*expected) == (OK, set())


def test_a_wrong_lambda_fails(expected, monkeypatch):
    own = CoefficientTracker.before_update
    monkeypatch.setattr(
        CoefficientTracker, "before_update", lambda *arguments: 1.001 * own(*arguments)
    )
    status, wrong = judged(*expected)
    assert status == FAILED
    assert "lambda" in wrong


def test_one_wrong_entry_of_a_gradient_fails(expected, monkeypatch):
    own = MegatronGPTActor.get_loss_and_metrics

    def spoilt(actor, *arguments, **named):
        report = own(actor, *arguments, **named)
        gradient = actor.chunks[0].mtp.layers[1].eh_proj.weight.main_grad
        gradient[0, 0] += 1e-3 * gradient.abs().max()
        return report

    monkeypatch.setattr(MegatronGPTActor, "get_loss_and_metrics", spoilt)
    status, wrong = judged(*expected)
    assert status == FAILED
    assert "gradient" in wrong
    assert "loss" not in wrong


def test_an_engine_of_other_weights_fails(monkeypatch):
    side = Side(TOY_TRAINING, (*TOY_TRAINING.dense, "precision=fp32"), "detach")
    assert judge_engine("dense", *engine_gap(side.actor, Speculation())).status == OK
    own = side.actor.get_inference_log_probs
    monkeypatch.setattr(
        side.actor,
        "get_inference_log_probs",
        lambda *arguments, **named: own(*arguments, **named) + 1e-3,
    )
    assert judge_engine("dense", *engine_gap(side.actor, Speculation())).status == FAILED


def test_a_corrupted_resume_fails(tmp_path):
    run = Runner(tmp_path)
    short = ("pretrain.steps=6", "rl.steps=1", "rl.rollout.speculative.mode=off")
    whole = run("rl", "whole", *short)
    names = ("same", "metrics", "weights")
    same, metrics, weights = (tmp_path / name for name in names)
    for copy in (same, metrics, weights):
        shutil.copytree(whole, copy)
    file = metrics / "metrics.jsonl"
    file.write_text(re.sub('"loss/policy": [^,}]+', '"loss/policy": 1.5', file.read_text()))
    _, checkpoint = list_checkpoints(weights / "checkpoints" / "rl")[-1]
    weight = (
        read_plain(checkpoint)["embedding.word_embeddings.weight"].flatten()[:16].numpy().tobytes()
    )
    for file in checkpoint.glob("*.distcp"):
        content = bytearray(file.read_bytes())
        if weight in content:
            content[content.index(weight)] ^= 0x10
            file.write_bytes(content)
    row = functools.partial(resume_row, whole)
    assert row(same, same).status == OK
    assert row(metrics, same).text == "differs from the undisturbed run"
    assert row(metrics, metrics).text.startswith("differs, but so do two undisturbed runs")
    assert row(weights, same).status == FAILED


def test_tensors_between_updates_are_those_of_the_estimate():
    side = Side(TOY_TRAINING, TOY_TRAINING.dense, "detach")
    side.update("detach", TOY_TRAINING.full_lengths())()
    live, config = live_bytes(side.actor), side.actor.config
    shutdown()
    resident = estimate(config, TOY_TRAINING.vocabulary, 1, 0).memory.resident
    assert live.keys() == resident.keys()
    assert judge_live("dense", live, resident).status == OK
    for name in live:
        assert judge_live("dense", {**live, name: live[name] // 2}, resident).status == FAILED


def test_the_sections_have_every_tensor_on_the_device(expected, monkeypatch):
    """On the pretended one: what is measured on a GPU must not mix it with the host."""
    folder, metrics = expected
    with simulated_cuda():
        assert judged(folder, metrics) == (OK, set())
        monkeypatch.setattr(training, "start", initialize)
        side = Side(TOY_TRAINING, TOY_TRAINING.dense, "detach")
        side.update("occ_decoupled", TOY_TRAINING.mixed_lengths())()
        gap, _ = engine_gap(side.actor, Speculation(2))
        (plain,) = training.Speeds(None, TOY_TRAINING).beside_plain(side)
    assert gap < 0.1
    assert plain.numbers["plain_pytorch"] > 0
