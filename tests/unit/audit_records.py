"""Records of audits of which the true inner products are known: gradients drawn, not measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

SIZE = 50
GROUPS = {"embedding": slice(0, 20), "layer 1": slice(20, 40), "output": slice(40, 50)}


@dataclass
class World:
    """Expected gradients, and noise of which RL's and each signal's share a part.

    g_0 = rl + e, g_s = signal + shared * e + own * f; e, f standard normal in 50 dimensions.
    """

    rl: np.ndarray
    signals: list[np.ndarray]
    shared: float = 0.5
    own: float = 0.5
    scale: np.ndarray = field(default_factory=lambda: np.linspace(0.5, 2.0, SIZE))

    def draw(self, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Gradients [n, D] and [n, S, D]."""
        random = np.random.default_rng(seed)
        common = random.normal(size=(samples, SIZE))
        own = random.normal(size=(samples, len(self.signals), SIZE))
        mtp = np.stack(self.signals) + self.shared * common[:, None] + self.own * own
        return self.rl + common, mtp

    def record(self, samples: int = 40, window: int = 4, seed: int = 0) -> dict[str, Any]:
        """A whole record."""
        rl, mtp = self.draw(samples, seed)
        weights = {"euclidean": np.ones(SIZE), "adam": self.scale}
        random = np.random.default_rng(seed + 1)
        names = [f"signal {index}" for index in range(len(self.signals))]
        return {
            "checkpoint": "runs/tiny/step_000100",
            "task": "multiplication",
            "updates": 1200,
            "parameters": SIZE,
            "world_size": 1,
            "seed": seed,
            "window": window,
            "signals": [{"name": name, "depth": 1} for name in names],
            "groups": list(GROUPS),
            "metrics": list(weights),
            "samples": [
                {
                    "round": index // 2,
                    "mini_batch": index % 2,
                    "sequences": 128,
                    "tokens": 1000,
                    "same": {m: _same(rl[index], mtp[index], w) for m, w in weights.items()},
                    "cross": {
                        m: [
                            _cross(rl, mtp, index, other, w)
                            for other in range(max(0, index - window), index)
                        ]
                        for m, w in weights.items()
                    },
                    "proxies": {
                        "logprob": [
                            float(random.normal()) if index % 2 else None for _ in self.signals
                        ],
                        "released": [float(x @ rl[index]) for x in mtp[index]],
                    },
                    "tails": [{"top": 0.1, "effective": 0.4} for _ in self.signals],
                }
                for index in range(samples)
            ],
        }


def aligned_world(signals: int = 1, **noise: float) -> World:
    """|rl|^2 = 4, every signal along it: c = 2, |M|^2 = 1."""
    direction = np.ones(SIZE) / SIZE**0.5
    return World(2 * direction, [direction] * signals, **noise)


def _groups(product: np.ndarray) -> list[float]:
    return [float(product[part].sum()) for part in GROUPS.values()]


def _same(rl: np.ndarray, mtp: np.ndarray, weight: np.ndarray) -> dict[str, Any]:
    return {
        "rl": _groups(weight * rl * rl),
        "c": [_groups(weight * rl * g) for g in mtp],
        "v2": [_groups(weight * g * g) for g in mtp],
    }


def _cross(
    rl: np.ndarray, mtp: np.ndarray, index: int, other: int, weight: np.ndarray
) -> dict[str, Any]:
    return {
        "other": other,
        "rl": _groups(weight * rl[index] * rl[other]),
        "c": [_groups(weight * rl[index] * g) for g in mtp[other]],
        "c_back": [_groups(weight * g * rl[other]) for g in mtp[index]],
        "v2": [_groups(weight * a * b) for a, b in zip(mtp[index], mtp[other], strict=True)],
    }
