"""Logs of made-up RL runs: a configuration, and metrics as `rl` writes them."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

DETACH = {"signal": "none", "coefficient": "fixed", "weight": 0.1}
LOGPROB = {"signal": "policy", "coefficient": "occ", "estimator": "logprob"}
EXACT = {
    **LOGPROB,
    "estimator": "exact",
    "exact": {"pairs": "cross", "per": "trunk", "metric": "adam", "gate": 2.0},
}


def config(trunk: dict, head: str = "ce", preset: str | None = None, **rl) -> str:
    """The part of a `config.yaml` that says what MTP sends into the trunk."""
    mtp = {"num_layers": 1, "preset": preset, "trunk": trunk, "head": {"signal": head}}
    return yaml.safe_dump({"mtp": mtp, "rl": {"train_trunk": True, **rl}})


def exact_step(
    depths: int = 1,
    groups: tuple[str, ...] = ("",),
    acted: float = 0.0,
    share: float = 0.0,
    c_cross: float = 0.0,
    rl_signal: float = 1.0,
) -> dict[str, float]:
    """Metrics of one step, the same in all groups of layers.

    |g_RL|^2 is 100 and |g_MTP|^2 is 25 in each, c same 5 (cosine 0.1).
    """
    found: dict[str, float] = {f"lambda/mtp_{k}": acted for k in range(1, depths + 1)}
    for group in groups:
        for k in range(1, depths + 1):
            values = {"c_same": 5.0, "c_cross": c_cross, "norm_squared": 25.0}
            values |= {"lambda_raw": 0.5 * k, "lambda_error": 0.25, "lambda": acted}
            found |= {f"exact/{name}_{k}{group}": value for name, value in values.items()}
        norms = {"rl_norm_squared": 100.0, "rl_signal": rl_signal, "share": share}
        found |= {f"exact/{name}{group}": value for name, value in norms.items()}
    return found


def write_run(folder: Path, text: str, steps: list[dict[str, float]]) -> Path:
    """A run folder with a configuration and one line of metrics for each RL step."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"phase": "rl", "step": step, "time": 1000.0 + step, "reward/mean": 0.5, **metrics}
        for step, metrics in enumerate(steps, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(text)
    return folder
