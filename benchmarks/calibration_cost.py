"""What each MTP regime costs: time of one RL update relative to RL without MTP training.

Updates of all regimes are interleaved in one run; the table gives medians of per-round ratios to
the regime ``none``. ``occ (current)`` runs a forward pass more to take lambda from the mini-batch
itself; ``occ_decoupled`` runs the MTP block twice, once for the trunk and once for the head.

    python benchmarks/calibration_cost.py [--rounds 20] [--json FILE] [key=value ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_occ.config import load_config
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.startup import initialize, shutdown
from megatron_occ.rl.batch import MiniBatch, RolloutBatch
from megatron_occ.rl.calibration import regime_from
from megatron_occ.rl.update import PolicyUpdater

CONFIG = Path(__file__).resolve().parent.parent / "conf" / "demo.yaml"
VOCABULARY = 17
REGIMES = {
    "none": ("mtp.preset=none",),
    "detach": ("mtp.preset=detach",),
    "ce": ("mtp.preset=ce",),
    "policy": ("mtp.preset=policy",),
    "occ (previous)": ("mtp.preset=occ",),
    "occ (current)": ("mtp.preset=occ", "mtp.trunk.statistics=current"),
    "occ_decoupled": ("mtp.preset=occ_decoupled",),
}


@dataclass
class Contestant:
    """One regime's updater and the seconds of its updates."""

    updater: PolicyUpdater
    seconds: list[float]


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    layout = initialize(load_config([CONFIG], options.overrides))
    contestants = {
        name: _contestant(layout, given, options.overrides) for name, given in REGIMES.items()
    }
    mini_batch = _mini_batch(next(iter(contestants.values())).updater)
    for round_number in range(options.rounds + 2):
        for contestant in contestants.values():
            start = time.perf_counter()
            contestant.updater.run_update(mini_batch)
            if round_number >= 2:
                contestant.seconds.append(time.perf_counter() - start)
    results = _table(contestants)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    shutdown()


def _contestant(layout: object, given: tuple[str, ...], overrides: list[str]) -> Contestant:
    config = load_config([CONFIG], [*given, *overrides])
    torch.manual_seed(0)
    actor = MegatronGPTActor(
        config,
        VOCABULARY,
        layout,
        optimizer=config.rl.optimizer,
        total_updates=1000,
        train_head=regime_from(config.mtp).trains_head,
    )
    return Contestant(PolicyUpdater(config, actor), [])


def _mini_batch(updater: PolicyUpdater) -> MiniBatch:
    rl = updater.config.rl
    rows = rl.prompts_per_step * rl.samples_per_prompt // rl.mini_batches
    prompt, length = 7, 7 + rl.rollout.max_response_length
    ids = torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(rows, length)
    mask[:, prompt:] = 1.0
    batch = RolloutBatch(ids, mask, torch.zeros(rows, length), torch.randn(rows))
    (mini_batch,) = updater.compute_logprobs([MiniBatch.padded(batch, rl.micro_batch_size)])
    return mini_batch


def _table(contestants: dict[str, Contestant]) -> dict[str, dict[str, float]]:
    base = contestants["none"].seconds
    results = {}
    print(f"{'regime':<16} {'median s':>9} {'x none':>7}")
    for name, contestant in contestants.items():
        ratios = [a / b for a, b in zip(contestant.seconds, base, strict=True)]
        seconds, ratio = statistics.median(contestant.seconds), statistics.median(ratios)
        results[name] = {"seconds": seconds, "ratio": ratio}
        print(f"{name:<16} {seconds:>9.4f} {ratio:>7.2f}")
    return results


if __name__ == "__main__":
    main()
