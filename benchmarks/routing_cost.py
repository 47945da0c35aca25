"""What replayed experts cost: time of a whole RL step relative to one without.

The demo's model with experts: rollout by the embedded engine with two drafts, old log-probs and
updates. Steps with and without replay take turns in one run; the table gives medians of per-round
ratios, of each part and of the step.

    python -m benchmarks.routing_cost [--rounds 12] [--json FILE] [key=value ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.calibration_cost import CONFIG, VOCABULARY
from megatron_occ.config import load_config
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.inference.engine import MegatronEngine, Speculation
from megatron_occ.mcore.startup import initialize, shutdown
from megatron_occ.rl.batch import pad_routes, pad_sequences
from megatron_occ.rl.exchange import distribute
from megatron_occ.rl.update import PolicyUpdater
from megatron_occ.rollout import Request, SamplingSettings

EXPERTS = (
    "model.moe={num_experts: 16, top_k: 4, ffn_hidden_size: 96, first_dense_layers: 1}",
    "mtp.num_layers=2",
    "rl.prompts_per_step=16",
)
REPLAYS = ("none", "training", "rollout")
PARTS = ("rollout", "log-probs", "updates", "step")
PROMPT = 7


@dataclass
class Contestant:
    """One kind of replay, and seconds of the parts of its steps."""

    updater: PolicyUpdater
    engine: MegatronEngine
    sampling: SamplingSettings
    seconds: list[tuple[float, ...]]


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    layout = initialize(load_config([CONFIG], [*EXPERTS, *options.overrides]))
    contestants = {replay: _contestant(layout, replay, options.overrides) for replay in REPLAYS}
    for round_number in range(options.rounds + 1):
        for contestant in contestants.values():
            found = _step(contestant, round_number)
            # the first one warms up
            contestant.seconds += [found] if round_number else []
    results = _table(contestants)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    shutdown()


def _contestant(layout: object, replay: str, overrides: list[str]) -> Contestant:
    config = load_config([CONFIG], [*EXPERTS, *overrides, f"rl.routing_replay={replay}"])
    torch.manual_seed(0)
    actor = MegatronGPTActor(
        config, VOCABULARY, layout, optimizer=config.rl.optimizer, total_updates=1000
    )
    engine = MegatronEngine(actor.inference_chunks, layout, slots=512, speculation=Speculation(2))
    sampling = SamplingSettings(
        1.0, config.rl.rollout.max_response_length, keep_routes=replay == "rollout"
    )
    return Contestant(PolicyUpdater(config, actor), engine, sampling, [])


def _step(contestant: Contestant, seed: int) -> tuple[float, ...]:
    """Seconds of each part and of all."""
    updater = contestant.updater
    rl = updater.config.rl
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(2, VOCABULARY, (rl.prompts_per_step, PROMPT), generator=generator)
    rows = prompts.repeat_interleave(rl.samples_per_prompt, dim=0).tolist()
    times = [time.perf_counter()]
    found = contestant.engine.generate(
        [Request(prompt, 1000 * seed + number) for number, prompt in enumerate(rows)],
        contestant.sampling,
    )
    times.append(time.perf_counter())
    width = PROMPT + rl.rollout.max_response_length
    advantages = torch.randn(len(rows), generator=generator)
    batch = pad_sequences(
        rows, found.tokens, found.logprobs, advantages, 0, width, torch.device("cpu")
    )
    if found.routes:
        batch = replace(batch, routes=pad_routes(found.routes, width, found.routes[0]))
    minis = distribute(batch, [0] * len(rows), rl, updater.actor)
    minis = updater.compute_logprobs(minis)
    times.append(time.perf_counter())
    for mini in minis:
        updater.run_update(mini)
    times.append(time.perf_counter())
    return (*(later - t for t, later in pairwise(times)), times[-1] - times[0])


def _table(contestants: dict[str, Contestant]) -> dict[str, dict[str, float]]:
    base, results = contestants["none"].seconds, {}
    print(f"{'replay':<10}" + "".join(f"{part:>12}" for part in PARTS) + f"{'step, s':>10}")
    for name, contestant in contestants.items():
        ratios = [
            statistics.median(
                own[part] / other[part] for own, other in zip(contestant.seconds, base, strict=True)
            )
            for part in range(len(PARTS))
        ]
        seconds = statistics.median(times[-1] for times in contestant.seconds)
        results[name] = dict(zip(PARTS, ratios, strict=True)) | {"seconds": seconds}
        print(f"{name:<10}" + "".join(f"{r:>12.3f}" for r in ratios) + f"{seconds:>10.3f}")
    return results


if __name__ == "__main__":
    main()
