"""What each MTP regime costs: time of one RL update relative to ``detach``.

Updates of all regimes are interleaved in one run; the table gives medians of per-round ratios, of
the update alone and with the forward pass for its old log-probs. Lambda is kept above 0, since a
regime leaves out passes whose coefficient is 0. ``occ (current)`` runs a forward pass more to take
lambda from the mini-batch itself; ``occ_decoupled`` runs the MTP block twice, for the trunk and for
the head; ``exact`` takes MTP's gradient by a pass of its own in every or every eighth update, for
which eight updates are timed together. ``coupled`` is a head that shares the trunk's loss.

    python benchmarks/calibration_cost.py [--rounds 8] [--only TEXT] [--json FILE] [key=value ...]
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
ACTS = "mtp.trunk.clamp=[0.01,null]"
EXACT = (ACTS, "mtp.trunk.exact.every=1", "mtp.trunk.exact.gate=0", "mtp.trunk.lambda_plus=1")
COUPLED = ("mtp.preset=occ", "mtp.trunk.estimator=exact", "mtp.trunk.ema=0.9")
REGIMES = {
    "none": ("mtp.preset=none",),
    "detach": ("mtp.preset=detach",),
    "ce": ("mtp.preset=ce",),
    "policy": ("mtp.preset=policy",),
    "occ (previous)": ("mtp.preset=occ", ACTS),
    "occ (current)": ("mtp.preset=occ", ACTS, "mtp.trunk.statistics=current"),
    "occ_decoupled": ("mtp.preset=occ_decoupled", ACTS),
    "exact, every": ("mtp.preset=occ_exact", *EXACT),
    "exact, 8th": ("mtp.preset=occ_exact", *EXACT, "mtp.trunk.exact.every=8"),
    "exact, every, coupled": (*COUPLED, *EXACT),
    "exact, 8th, coupled": (*COUPLED, *EXACT, "mtp.trunk.exact.every=8"),
}
# updates that are timed together: a rhythm of measurements
GROUP = 8


@dataclass
class Contestant:
    """One regime's updater, and seconds of an update alone and with its old log-probs."""

    updater: PolicyUpdater
    seconds: list[float]
    whole: list[float]


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--only", default="", metavar="TEXT", help="regimes with it in their name")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    layout = initialize(load_config([CONFIG], options.overrides))
    contestants = {
        name: _contestant(layout, given, options.overrides)
        for name, given in REGIMES.items()
        if name == "detach" or options.only in name
    }
    batch = _batch(next(iter(contestants.values())).updater)
    for round_number in range(options.rounds + 1):
        times = {name: [0.0, 0.0] for name in contestants}
        # regimes take turns within a group, so that a slow moment is shared
        for _ in range(GROUP):
            for name, contestant in contestants.items():
                start = time.perf_counter()
                (mini_batch,) = contestant.updater.compute_logprobs([batch])
                middle = time.perf_counter()
                contestant.updater.run_update(mini_batch)
                end = time.perf_counter()
                times[name][0] += (end - middle) / GROUP
                times[name][1] += (end - start) / GROUP
        for name, contestant in contestants.items() if round_number else ():
            contestant.seconds.append(times[name][0])
            contestant.whole.append(times[name][1])
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
    return Contestant(PolicyUpdater(config, actor), [], [])


def _batch(updater: PolicyUpdater) -> MiniBatch:
    rl = updater.config.rl
    rows = rl.prompts_per_step * rl.samples_per_prompt // rl.mini_batches
    prompt, length = 7, 7 + rl.rollout.max_response_length
    ids = torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(rows, length)
    mask[:, prompt:] = 1.0
    batch = RolloutBatch(ids, mask, torch.zeros(rows, length), torch.randn(rows))
    return MiniBatch.padded(batch, rl.micro_batch_size)


def _table(contestants: dict[str, Contestant]) -> dict[str, dict[str, float]]:
    base, results = contestants["detach"], {}
    print(f"{'regime':<22} {'median s':>9} {'x detach':>9} {'with log-probs':>15}")
    for name, contestant in contestants.items():
        seconds = statistics.median(contestant.seconds)
        alone = _ratio(contestant.seconds, base.seconds)
        whole = _ratio(contestant.whole, base.whole)
        results[name] = {"seconds": seconds, "ratio": alone, "whole_ratio": whole}
        print(f"{name:<22} {seconds:>9.4f} {alone:>9.3f} {whole:>15.3f}")
    return results


def _ratio(times: list[float], base: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


if __name__ == "__main__":
    main()
