"""A checkpoint of one layout goes on in another: the same outputs, and the same next updates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from benchmarks.layout_cases import (
    DENSE,
    MOE,
    PP2,
    SEQUENCE,
    TP2,
    UNTIED,
    read,
)
from benchmarks.layout_runs import VOCABULARY, mini_batches
from megatron_occ.config import Config, validate
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint import load_checkpoint, load_weights
from megatron_occ.mcore.startup import initialize
from megatron_occ.rl.update import PolicyUpdater
from tests.mcore.conftest import write_checkpoint
from tests.mcore.distributed import run_ranks

META = {"model": {}, "mtp_layers": 0, "tokenizer": {}}
UPDATES = 2
# a rate that changes with every update, and an epsilon small enough for the second moments
OPTIMIZER = (
    "rl.optimizer.eps=0.01",
    "rl.optimizer.beta2=0.7",
    "rl.optimizer.schedule=linear",
    "rl.optimizer.warmup_steps=1",
    "rl.optimizer.weight_decay=0.1",
)
TIED = (*DENSE, *OPTIMIZER, "mtp.num_layers=2")
EXPERTS = (*MOE, *UNTIED, *OPTIMIZER, "mtp.num_layers=1")
EP2 = "parallel.expert=2"
VPP2 = "parallel.virtual_pipeline=2"
HOLLOW = (PP2, VPP2, "parallel.pipeline_layout=Ett|tt||mmL")
BF16 = ("precision=bf16",)
# several buckets of gradients, with padding between them
SPREAD = ("parallel.distributed_optimizer=true", "parallel.overlap_grad_reduce=true")


@dataclass
class Curve:
    """Log-probs at the checkpoint, metrics of the updates after it, and log-probs then."""

    at_checkpoint: torch.Tensor
    metrics: list[dict[str, float]]
    after: torch.Tensor


class Run:
    """Actor and updater under a layout."""

    def __init__(self, config: Config) -> None:
        validate(config, command="rl", world_size=torch.distributed.get_world_size())
        layout = initialize(config)
        self.actor = MegatronGPTActor(
            config, VOCABULARY, layout, optimizer=config.rl.optimizer, total_updates=8
        )
        self.updater = PolicyUpdater(config, self.actor)
        self.batches = mini_batches(config, self.actor)

    def update(self, count: int) -> list[dict[str, float]]:
        return [self.updater.run_update(self.batches[step % 2]).metrics for step in range(count)]

    def logprobs(self) -> torch.Tensor:
        ids = torch.randint(0, VOCABULARY, (4, 11), generator=torch.Generator().manual_seed(3))
        parts = [[0, 1], [2, 3]]
        found = self.actor.get_inference_log_probs(ids, parts=parts, lengths=None, temperature=0.8)
        return found[:, :-1]

    def go_on(self) -> Curve:
        return Curve(self.logprobs(), self.update(UPDATES), self.logprobs())


@contextmanager
def fresh_groups() -> Iterator[None]:
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def save_and_go_on(model: tuple[str, ...], layout: tuple[str, ...], folder: Path) -> Curve:
    with fresh_groups():
        run = Run(read(model, layout))
        run.update(UPDATES)
        state = {"updater": run.updater.state_dict()}
        write_checkpoint(folder, UPDATES, run.actor, state, META)
        return run.go_on()


def load_and_go_on(model: tuple[str, ...], layout: tuple[str, ...], folder: Path) -> Curve:
    with fresh_groups():
        run = Run(read(model, (*layout, "seed=99")))
        path = folder / f"step_{UPDATES:06d}"
        run.updater.load_state_dict(load_checkpoint(path, run.actor, META)["updater"])
        return run.go_on()


def load_weights_and_go_on(model: tuple[str, ...], layout: tuple[str, ...], folder: Path) -> Curve:
    with fresh_groups():
        run = Run(read(model, (*layout, "seed=99")))
        load_weights(folder / f"step_{UPDATES:06d}", run.actor, META)
        return run.go_on()


def pass_on(model: tuple[str, ...], layout: tuple[str, ...], folder: Path, target: Path) -> None:
    """Load in this layout and save again."""
    with fresh_groups():
        run = Run(read(model, (*layout, "seed=99")))
        state = load_checkpoint(folder / f"step_{UPDATES:06d}", run.actor, META)
        write_checkpoint(target, UPDATES, run.actor, state, META)


def all_of(jobs):
    """What the jobs return on this rank, one after the other."""
    return [function(*arguments) for function, *arguments in jobs]


def start(ranks: int, *jobs: tuple) -> list[list[Curve]]:
    """[job][rank]"""
    by_rank = run_ranks(all_of, ranks, jobs, timeout=300)
    return [list(curves) for curves in zip(*by_rank, strict=True)]


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """(going on in the saved layout, going on in another), each by rank, by name."""
    folder = tmp_path_factory.mktemp("checkpoints")
    names = "abcdefgh"
    tied, moe, moe_ep, spread, plain, short, passed, empty = (folder / name for name in names)
    (saved,) = start(4, (save_and_go_on, TIED, (TP2, PP2), tied))
    one, weights, saved_moe, saved_plain, saved_short = start(
        1,
        (load_and_go_on, TIED, (), tied),
        (load_weights_and_go_on, TIED, (), tied),
        (save_and_go_on, EXPERTS, (), moe),
        (save_and_go_on, TIED, (), plain),
        (save_and_go_on, EXPERTS, BF16, short),
    )
    data, pipe, virtual, parallel, experts, saved_moe_ep, saved_spread, to_spread, _ = start(
        2,
        (load_and_go_on, TIED, (), tied),
        (load_and_go_on, TIED, (PP2,), tied),
        (load_and_go_on, TIED, (PP2, VPP2), tied),
        (load_and_go_on, TIED, (TP2, *SEQUENCE), tied),
        (load_and_go_on, EXPERTS, (EP2,), moe),
        (save_and_go_on, EXPERTS, (EP2,), moe_ep),
        (save_and_go_on, TIED, SPREAD, spread),
        (load_and_go_on, TIED, SPREAD, plain),
        (pass_on, EXPERTS, (EP2, *BF16), short, passed),
    )
    hollow, saved_hollow = start(
        2, (load_and_go_on, TIED, HOLLOW, tied), (save_and_go_on, TIED, HOLLOW, empty)
    )
    joined, from_spread, from_passed, from_hollow = start(
        1,
        (load_and_go_on, EXPERTS, (), moe_ep),
        (load_and_go_on, TIED, (), spread),
        (load_and_go_on, EXPERTS, BF16, passed),
        (load_and_go_on, TIED, (), empty),
    )
    (spread_parallel,) = start(2, (load_and_go_on, TIED, (TP2, *SPREAD), spread))
    return {
        "one process": (saved, one),
        "DP2": (saved, data),
        "PP2": (saved, pipe),
        "PP2 x VPP2": (saved, virtual),
        "to a chunk without layers": (saved, hollow),
        "from a chunk without layers": (saved_hollow, from_hollow),
        "TP2 + SP": (saved, parallel),
        "EP1 to EP2": (saved_moe, experts),
        "EP2 to EP1": (saved_moe_ep, joined),
        "to a distributed optimizer": (saved_plain, to_spread),
        "from a distributed optimizer": (saved_spread, from_spread),
        "distributed optimizer, DP2 to TP2": (saved_spread, spread_parallel),
        # bf16 rounds differently in every layout: it is compared in the layout that saved it
        "bf16, by way of EP2": (saved_short, from_passed),
        "weights alone": (saved, weights),
    }


NAMES = [
    "one process",
    "DP2",
    "PP2",
    "PP2 x VPP2",
    "to a chunk without layers",
    "from a chunk without layers",
    "TP2 + SP",
    "EP1 to EP2",
    "EP2 to EP1",
    "to a distributed optimizer",
    "from a distributed optimizer",
    "distributed optimizer, DP2 to TP2",
    "bf16, by way of EP2",
]


@pytest.mark.parametrize("name", NAMES)
def test_another_layout_has_the_same_outputs_and_goes_on_with_the_same_updates(curves, name):
    saved, loaded = curves[name]
    expected = saved[0]
    assert len(expected.metrics) == UPDATES
    for curve in (*saved, *loaded):
        torch.testing.assert_close(curve.at_checkpoint, expected.at_checkpoint, atol=1e-5, rtol=0)
        torch.testing.assert_close(curve.after, expected.after, atol=1e-5, rtol=0)
        for line, wanted in zip(curve.metrics, expected.metrics, strict=True):
            assert line == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_the_optimizer_state_is_what_makes_the_updates_equal(curves):
    (saved, *_), (weights,) = curves["weights alone"]
    torch.testing.assert_close(weights.at_checkpoint, saved.at_checkpoint, atol=1e-5, rtol=0)
    moved = (saved.after - saved.at_checkpoint).abs().max()
    assert (weights.after - saved.after).abs().max() > 0.01 * moved
    assert moved > 0.01
