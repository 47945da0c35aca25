"""Published regimes of MTP in RL and of the policy loss, as values of other keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_occ.config.algorithms import ALGORITHMS
from megatron_occ.config.keys import spell


def _regime(signal: str, coefficient: str, head: str) -> dict[str, Any]:
    return {
        "mtp.trunk.signal": signal,
        "mtp.trunk.coefficient": coefficient,
        "mtp.head.signal": head,
    }


# The clipped loss of the MTP heads in arXiv 2605.28184 has a dual clip whatever the policy's has.
_PAPER = {"mtp.trunk.weighting": "ppo", "mtp.trunk.dual_clip": 10.0}
_EXACT = {
    "mtp.trunk.weighting": "unit",
    "mtp.trunk.estimator": "exact",
    "mtp.trunk.lambda_plus": None,
    "mtp.trunk.ema": 0.98,
    # at a quarter more time for an update; three goes round the mini-batches of a step
    "mtp.trunk.exact.every": 3,
}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # The regimes compared in arXiv 2605.28184; occ_decoupled and occ_exact are this
    # project's.
    "mtp.preset": {
        "none": _regime("none", "fixed", "none"),
        "detach": _regime("none", "fixed", "ce") | {"mtp.head.weight": 0.1},
        "ce": _regime("ce", "fixed", "same_as_trunk") | {"mtp.trunk.weight": 0.1},
        "policy": _regime("policy", "fixed", "same_as_trunk") | _PAPER | {"mtp.trunk.weight": 1.0},
        "occ": _regime("policy", "occ", "same_as_trunk") | _PAPER,
        "occ_decoupled": _regime("policy", "occ", "ce") | {"mtp.head.weight": 0.1},
        "occ_exact": _regime("policy", "occ", "ce") | _EXACT | {"mtp.head.weight": 0.1},
        # A stage before RL, as in arXiv 2606.12370.
        "head_only": _regime("none", "fixed", "soft_ce")
        | {"mtp.head.weight": 1.0, "rl.train_trunk": False},
    },
    "rl.algorithm": ALGORITHMS,
}
# Keys that say which regime it is. A preset cannot be combined with another value of these.
REGIME_KEYS = (
    "mtp.trunk.signal",
    "mtp.trunk.coefficient",
    "mtp.head.signal",
    "rl.train_trunk",
    "rl.loss.aggregation",
    "rl.loss.kind",
)


def preset_values(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The values that the chosen presets stand for, by dotted key.

    Args:
        chosen: values of ``mtp.preset`` and ``rl.algorithm``; null and unknown names give nothing.
    """
    values = {}
    for key, presets in PRESETS.items():
        name = chosen.get(key)
        if isinstance(name, str):
            values |= presets.get(name, {})
    return values


def preset_conflicts(
    values: Mapping[str, Any], origins: Mapping[str, str] | None = None
) -> list[str]:
    """The regime keys that contradict a chosen preset, one message each.

    Args:
        values: a whole configuration by dotted key.
        origins: where a value was given, by dotted key, for the messages.
    """
    problems = []
    for preset_key, presets in PRESETS.items():
        name = values[preset_key]
        for key, wanted in presets.get(name, {}).items():
            if key not in REGIME_KEYS or values[key] == wanted:
                continue
            where = f"{origins[key]}: " if origins and key in origins else ""
            problems.append(
                f"{where}{key} = {spell(values[key])} contradicts {preset_key} = {name}, which "
                f"sets it to {spell(wanted)}. Drop one of the two ({preset_key}=null keeps {key}, "
                f"{key}={wanted} on the command line goes with the preset)"
            )
    return problems
