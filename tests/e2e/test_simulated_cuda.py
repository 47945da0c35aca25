"""Whole runs on a pretended CUDA device: a tensor on the wrong side fails as it does on a GPU."""

from __future__ import annotations

import json
from unittest import mock

import pytest

from megatron_occ.cli import main
from megatron_occ.mcore.inference.attend import ALIGNED
from tests.e2e.conftest import TINY, metrics
from tests.mcore.distributed import run_ranks
from tests.mcore.simulated_cuda import simulated_cuda

PACKED = ("rl.micro_batch_size=128", "rl.micro_batch_tokens=64")
# there are no graphs of kernels that are not there, see tests/mcore/test_graphs.py
FIXED = ("rl.rollout.speculative.mode=fixed", "rl.rollout.cuda_graphs=false")
HEAD = ("mtp.preset=null", "mtp.trunk.signal=none", "mtp.trunk.coefficient=fixed")
CASES = {
    "packed, KL, correction": (
        "mtp.preset=occ_decoupled",
        "rl.loss.kl_coefficient=0.1",
        "rl.loss.kl_importance=true",
        "rl.correction.weights=token",
        "rl.correction.high=2",
        "rl.correction.reject=geometric",
        "rl.correction.reject_low=0.9",
        *PACKED,
    ),
    "head on the states of the rollout": (
        *HEAD,
        "mtp.head.signal=tv",
        "mtp.head.states=rollout",
        "recompute=full",
    ),
    "bf16, distributed optimizer, top-p, rejection": (
        "mtp.preset=occ",
        "precision=bf16",
        "parallel.distributed_optimizer=true",
        "rl.rollout.top_p=0.9",
        "rl.rollout.speculative.acceptance=rejection",
    ),
}
LAYOUTS = {
    "CP2": ("parallel.context=2",),
    "PP2": ("parallel.pipeline=2",),
    "TP2 + SP, packed": ("parallel.tensor=2", "parallel.sequence=true", *PACKED),
    "CP2, head on the states of the rollout": (
        "parallel.context=2",
        "mtp.head.states=rollout",
        "mtp.head.signal=tv",
    ),
    "DP2": ("parallel.distributed_optimizer=true", "mtp.head.states=rollout", "mtp.head.signal=tv"),
}
CLOCK = ("time", "tokens_per_second")


def learned(folder):
    """What a run logged, but for what follows the clock."""
    lines = metrics(folder, "rl") + metrics(folder, "validation")
    return [
        {name: value for name, value in line.items() if not any(c in name for c in CLOCK)}
        for line in lines
    ]


@pytest.mark.parametrize("case", CASES)
def test_a_run_learns_there_what_it_learns_here(run, pretrained, monkeypatch, case):
    # masks of other widths would round otherwise
    monkeypatch.setitem(ALIGNED, "cpu", ALIGNED["cuda"])
    settings = (*FIXED, *CASES[case], f"rl.init_from={pretrained(1)}")
    here = run("rl", "here", *settings)
    with simulated_cuda():
        there = run("rl", "there", *settings)
    assert learned(there) == learned(here)
    assert len(learned(there)) == 4


def test_pretraining_and_resuming_there(run):
    short = ("pretrain.steps=8", "pretrain.save_every=4", "mtp.num_layers=2")
    with simulated_cuda():
        folder = run("pretrain", "run", *short)
        run("pretrain", "run", *short, "pretrain.steps=12", "--resume")
    losses = [line["loss/main"] for line in metrics(folder, "pretrain")]
    assert losses[-1] < losses[0]


def run_there(folder, settings):
    # the process group is that of the ranks, which end together
    with simulated_cuda(), mock.patch("torch.distributed.destroy_process_group"):
        main(["rl", "--config", str(TINY), f"run_dir={folder}", *settings])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_message_between_ranks_lies_on_the_device(tmp_path, pretrained, layout):
    settings = (*FIXED, "mtp.preset=occ_decoupled", f"rl.init_from={pretrained(1)}")
    if any(setting.startswith("mtp.head") for setting in LAYOUTS[layout]):
        settings = (*FIXED, *HEAD, f"rl.init_from={pretrained(1)}")
    run_ranks(run_there, 2, tmp_path / "run", (*settings, *LAYOUTS[layout]))
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [event["kind"] for event in events if event["phase"] == "event"][-1] == "finished"
