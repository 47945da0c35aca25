"""Made-up results of a study, as ``megatron_occ.compare.results`` writes them."""

from __future__ import annotations

import random


def made_up_run(arm, seed, *, gain=0.25, steps=300, every=20, draws=None, **changes):
    """A run whose pass@1 rises from 0.45 by ``gain``; ``draws`` adds noise."""
    at = list(range(0, steps + 1, every))
    noise = draws or random.Random(0)
    scale = 0.0 if draws is None else 0.01
    level = noise.gauss(0, scale)
    values = [
        0.45 + gain * (1 - 0.5 ** (8 * x / steps)) + level * (x > 0) + noise.gauss(0, scale)
        for x in at
    ]
    curve = [10.0 * i + 5 for i in range(30)]
    run = {
        "arm": arm,
        "seed": seed,
        "finished": True,
        "steps": steps,
        "first_rollouts": f"seed{seed}",
        "seconds_per_step": 1.5 + noise.gauss(0, scale),
        "validation": {"step": at, "pass@1": values, "pass@4": [v + 0.1 for v in values]},
        "means": {
            "entropy": [0.5, 0.3 + noise.gauss(0, scale)],
            "draft/acceptance_length": [1.5, 1.7 + noise.gauss(0, scale)],
            "lambda/mtp_1": [0.1, 0.05],
            "agreement/mtp_1": [0.6, 0.7],
        },
        "curves": {
            "entropy": [curve, [1 / (1 + 0.01 * x) + noise.gauss(0, scale) for x in curve]],
            "reward/mean": [curve, [0.4 + 0.001 * x + noise.gauss(0, scale) for x in curve]],
            "lambda/mtp_1": [curve, [0.1 for _ in curve]],
            "draft/acceptance_length": [curve, [1.5 + 0.0005 * x for x in curve]],
        },
    }
    return {**run, **changes}


def made_up_results(arms, seeds, runs, reference="detach"):
    """Results of a study with these arms (a list of names), seeds and runs."""
    return {
        "format": 1,
        "name": "made_up",
        "reference": reference,
        "seeds": list(seeds),
        "steps": 300,
        "start": "runs/made_up/start/checkpoints/pretrain/step_000500",
        "base": ["demo.yaml"],
        "overrides": ["rl.steps=300"],
        "arms": {
            name: {
                "overrides": [f"mtp.preset={name}"],
                "differs": {} if name == reference else {"mtp.trunk.signal": ["none", "policy"]},
            }
            for name in arms
        },
        "config": "run_dir: runs/made_up\nseed: 0\n",
        "runs": runs,
    }
