"""Published policy losses with their advantages, as values of other keys (``rl.algorithm``)."""

from __future__ import annotations

from typing import Any


def _advantage(baseline: str, normalize: bool, over: str = "group") -> dict[str, Any]:
    return {
        "rl.advantage.baseline": baseline,
        "rl.advantage.normalize": normalize,
        "rl.advantage.normalize_over": over,
    }


def _clipped(aggregation: str, low: float, high: float) -> dict[str, Any]:
    return {
        "rl.loss.kind": "clipped",
        "rl.loss.aggregation": aggregation,
        "rl.loss.clip_low": low,
        "rl.loss.clip_high": high,
    }


ALGORITHMS: dict[str, dict[str, Any]] = {
    # GRPO: arXiv 2402.03300, equation 3.
    "grpo": _advantage("mean", True) | _clipped("sequence", 0.2, 0.2),
    # DAPO: arXiv 2503.14476, equation 8; dual clip: arXiv 1912.09729.
    "dapo": _advantage("mean", True)
    | _clipped("token", 0.2, 0.28)
    | {"rl.loss.dual_clip": 10.0, "rl.dynamic_sampling.enabled": True},
    # GSPO: arXiv 2507.18071, equation 5 and section 5.1.
    "gspo": _advantage("mean", True) | _clipped("gspo", 3e-4, 4e-4),
    # Dr. GRPO: arXiv 2503.20783, section 3.2.
    "dr_grpo": _advantage("mean", False) | _clipped("constant", 0.2, 0.2),
    # RLOO: arXiv 2402.14740, section 3.2, which makes one update a step, where nothing is clipped.
    "rloo": _advantage("leave_one_out", False) | _clipped("sum", 0.2, 0.2),
    # REINFORCE++ and its variant with a baseline: arXiv 2501.03262, section 3.
    "reinforce_pp": _advantage("none", True, "step") | _clipped("token", 0.2, 0.2),
    "reinforce_pp_baseline": _advantage("mean", True, "step") | _clipped("token", 0.2, 0.2),
    # CISPO: arXiv 2506.13585, equation 4, without lower bound. It leaves the upper one open: a
    # weight of at most 5 is in the range that 2510.13786 tried.
    "cispo": _advantage("mean", True)
    | {
        "rl.loss.kind": "cispo",
        "rl.loss.aggregation": "token",
        "rl.loss.clip_low": 1.0,
        "rl.loss.clip_high": 4.0,
    },
    # SAPO: arXiv 2511.20347, equations 5 and 6.
    "sapo": _advantage("mean", True)
    | {
        "rl.loss.kind": "sapo",
        "rl.loss.aggregation": "sequence",
        "rl.loss.tau_positive": 1.0,
        "rl.loss.tau_negative": 1.05,
    },
    # DPPO: arXiv 2602.04879, equations 11 to 13: the old policy is the one that sampled.
    "dppo": _advantage("mean", True)
    | {
        "rl.old_logprobs": "rollout",
        "rl.loss.kind": "dppo",
        "rl.loss.aggregation": "token",
        "rl.loss.divergence": "tv",
        "rl.loss.divergence_limit": 0.15,
    },
}
