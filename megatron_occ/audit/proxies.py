"""Stand-ins for the exact coefficient of a mini-batch: do they have its sign, and its rank?"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from megatron_occ.audit.record import Products
from megatron_occ.audit.statistics import (
    rank_correlation_interval,
    wilson_interval,
)

NAMES = {"logprob": "log-prob (paper)", "released": "released formula"}
EXACT = "exact, same mini-batch"


def judged_proxies(record: dict[str, Any], by_metric: dict[str, Products]) -> list[dict[str, Any]]:
    """Every proxy of every signal against the exact `c / v^2` of the mini-batch.

    `same` compares with c within the mini-batch, `cross` with c between it and those it is paired
    with, which is unbiased, and to which the exact value within is a proxy too. All in the first
    metric of the record, over the whole trunk. A mini-batch counts where both numbers are there and
    neither is 0. The pairs of neighbours overlap, which the intervals of `cross` do not know.

    Args:
        record: see :mod:`megatron_occ.audit.record`.
        by_metric: its products in each metric.

    Returns:
        For each signal and proxy: `signal` (index), `proxy` (name), `same` and `cross`, each with
        `samples`, `agreement` {value, low, high} and `rank` {value, low, high}.
    """
    products = by_metric[record["metrics"][0]]
    judged = []
    for signal in range(len(record["signals"])):
        same, cross = _exact(products, signal)
        for name, values in _proxies(record, by_metric, signal).items():
            targets = {"cross": cross} if name == EXACT else {"same": same, "cross": cross}
            found = {target: _judged(values, exact) for target, exact in targets.items()}
            judged.append({"signal": signal, "proxy": name, "same": None, **found})
    return judged


def _exact(products: Products, signal: int) -> tuple[np.ndarray, np.ndarray]:
    """[n] c / v^2 of each mini-batch, with c within it, and across the pairs that it is in."""
    norms = products.v2[:, signal].sum(axis=-1)
    cross, counts = np.zeros(len(norms)), np.zeros(len(norms))
    values = products.cross_c[:, signal].sum(axis=-1)
    for side in (0, 1):
        np.add.at(cross, products.pairs[:, side], values)
        np.add.at(counts, products.pairs[:, side], 1)
    cross = _ratio(cross, counts)
    return _ratio(products.c[:, signal].sum(axis=-1), norms), _ratio(cross, norms)


def _proxies(
    record: dict[str, Any], by_metric: dict[str, Products], signal: int
) -> dict[str, np.ndarray]:
    """[n] of each proxy, nan where there is none."""
    first, *others = record["metrics"]
    found = {
        label: np.array(
            [s["proxies"][name][signal] for s in record["samples"]], dtype=float
        )  # None becomes nan
        for name, label in NAMES.items()
    }
    products = by_metric[first]
    parts = _ratio(products.c[:, signal], products.v2[:, signal])
    for label, group in _single_groups(record["groups"]).items():
        found[label] = parts[:, group]
    for metric in others:
        of_all = by_metric[metric]
        c, v2 = of_all.c[:, signal].sum(axis=-1), of_all.v2[:, signal].sum(axis=-1)
        found[f"exact in {metric.capitalize()}'s metric"] = _ratio(c, v2)
    found[EXACT] = _exact(products, signal)[0]
    return found


def _single_groups(groups: list[str]) -> dict[str, int]:
    """Label and index of the groups that stand in for all."""
    found = {"embedding alone": groups.index("embedding")} if "embedding" in groups else {}
    layers = [index for index, name in enumerate(groups) if name.startswith("layer")]
    if len(layers) == 1:
        return {**found, "layer alone": layers[0]}
    if layers:
        found.update({"first layer alone": layers[0], "last layer alone": layers[-1]})
    return found


def _judged(values: np.ndarray, exact: np.ndarray) -> dict[str, Any]:
    kept = np.isfinite(values) & np.isfinite(exact) & (values != 0) & (exact != 0)
    values, exact = values[kept], exact[kept]
    hits, trials = int((np.sign(values) == np.sign(exact)).sum()), len(values)
    agreement = (hits / trials if trials else math.nan, *wilson_interval(hits, trials))
    return {
        "samples": trials,
        "agreement": _named(agreement),
        "rank": _named(rank_correlation_interval(values, exact)),
    }


def _named(numbers: tuple[float, float, float]) -> dict[str, float | None]:
    finite = [number if math.isfinite(number) else None for number in numbers]
    return dict(zip(("value", "low", "high"), finite, strict=True))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)
