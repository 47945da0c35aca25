"""From the record of an audit to its summary: estimates with errors, and what follows from them."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from megatron_occ.audit.proxies import judged_proxies
from megatron_occ.audit.recommendation import depth_warnings, recommend, tail_warnings
from megatron_occ.audit.record import Products, read_products
from megatron_occ.audit.statistics import LEVEL, Estimate, Means, t_quantile
from megatron_occ.losses.mixture import best_mixture, mixture_slope, update_share

_COPIED = ("checkpoint", "task", "updates", "parameters", "world_size", "seed", "window")
# of regimes: a tenth as the paper's cross-entropy has it, and its policy losses
FIXED_WEIGHTS = ("0.1", "0.2", "0.5", "1")
# share of the sum of squared weights in the top 0.1% of tokens from which a tail is heavy
_HEAVY = 0.5


def summarize(record: dict[str, Any]) -> dict[str, Any]:
    """The summary of an audit, a plain dict without nan (null where a number is not measurable).

    Args:
        record: see :mod:`megatron_occ.audit.record`.

    Returns:
        The head of the record, counts, and
        `results`: metric -> `rl` and `signals`, see the functions below; an estimate is
        {value, error, low, high}, of a 95% interval;
        `judged_in`: the metric of the recommendation, the optimizer's where it was recorded;
        `proxies`, see :func:`~megatron_occ.audit.proxies.judged_proxies`; `tails` of each signal;
        `recommendation` {action, signal, text} and `warnings`, sentences.

    Raises:
        ValueError: too few mini-batches or pairs, or a number that is not finite.
    """
    samples, metrics = record["samples"], record["metrics"]
    by_metric = {metric: read_products(record, metric) for metric in metrics}
    summary = {key: record[key] for key in _COPIED}
    summary |= {
        "samples": len(samples),
        "pairs": len(by_metric[metrics[0]].pairs),
        "rounds": len({sample["round"] for sample in samples}),
        "sequences": sum(sample["sequences"] for sample in samples),
        "tokens": sum(sample["tokens"] for sample in samples),
        "signals": signal_labels(record["signals"]),
        "depths": max(signal["depth"] for signal in record["signals"]),
        "groups": record["groups"],
        "metrics": metrics,
        "judged_in": metrics[-1],
        "results": {metric: _results(record, by_metric[metric]) for metric in metrics},
        "proxies": judged_proxies(record, by_metric),
        "tails": [_tail(record, index) for index in range(len(record["signals"]))],
    }
    summary["recommendation"] = recommend(summary)
    summary["warnings"] = tail_warnings(summary) + depth_warnings(summary)
    return summary


def signal_labels(signals: list[dict[str, Any]]) -> list[str]:
    """Names of signals, with the depth where there are several."""
    several = len({signal["depth"] for signal in signals}) > 1
    return [s["name"] + (f", depth {s['depth']}" if several else "") for s in signals]


def _results(record: dict[str, Any], products: Products) -> dict[str, Any]:
    """`rl` and `signals` in one metric."""
    size, count = len(record["groups"]), len(record["signals"])
    groups = np.array([_plain(estimate) for estimate in products.group_means().estimates()])
    within, across = groups.reshape(2, 1 + 2 * count, size)
    means = [products.means(index) for index in range(count)]
    return {
        "rl": {**_rl(means[0]), "groups": {"same": list(within[0]), "cross": list(across[0])}},
        "signals": [
            {
                **_signal(means[index], products.v2[:, index].sum(axis=-1), count),
                "groups": {
                    "c_same": list(within[1 + index]),
                    "c_cross": list(across[1 + index]),
                    "v2": list(within[1 + count + index]),
                },
            }
            for index in range(count)
        ],
    }


def _rl(means: Means) -> dict[str, Any]:
    """RL's own gradient.

    `same` E|g|^2 of one mini-batch, `cross` |G|^2 of the expected gradient, `signal_share` of the
    second in the first, `clear`: |G|^2 is clear of 0, above it.
    """
    estimates = means.estimates()
    share = means.of(lambda m: np.array([_over(m[3], m[0])]))[0]
    clear = estimates[3].is_clear and estimates[3].value > 0
    return {
        "same": _plain(estimates[0]),
        "cross": _plain(estimates[3]),
        "signal_share": _plain(share),
        "clear": bool(clear),
    }


def _signal(means: Means, norms: np.ndarray, looks: int) -> dict[str, Any]:
    """One of ``looks`` MTP signals, with weight 1.

    `c_same`, `c_cross`, `v2` and `v2_cross`, |M|^2; the same as pure numbers: `cosine_same` and
    `cosine_cross`, c over the root mean squares of both gradients, `ratio_same` and `ratio_cross`,
    c / v^2, `signal_share`, |M|^2 / v^2; `cosine_expected`, of the expected gradients, null unless
    both are clear of 0; `share`, sqrt(v^2 / E|g|^2) of the trunk's update; `v2_spread` over
    mini-batches; `mixture`, and `gain_at` some weights what the best step with that fixed
    weight is expected to gain {value, low, high}, both null where RL's signal is not clear of 0.
    """
    _, c_same, v2, rl_cross, c_cross, v2_cross = means.estimates()
    names = ("cosine_same", "cosine_cross", "ratio_same", "ratio_cross", "signal_share", "share")
    found = {
        "c_same": _plain(c_same),
        "c_cross": _plain(c_cross),
        "v2": _plain(v2),
        "v2_cross": _plain(v2_cross),
        **dict(zip(names, map(_plain, means.of(_pure_numbers)), strict=True)),
        "v2_spread": {
            "median": float(np.median(norms)),
            "high": float(np.quantile(norms, 0.99)),
            "largest": float(norms.max()),
        },
        "clear": bool(c_cross.is_clear),
    }
    rl_clear = rl_cross.is_clear and rl_cross.value > 0
    mtp_clear = v2_cross.is_clear and v2_cross.value > 0
    cosine = means.of(_expected_cosine)[0] if rl_clear and mtp_clear else None
    found["cosine_expected"] = None if cosine is None else _plain(cosine)
    measurable = rl_clear and v2.value > 0
    found["mixture"] = _mixture(means, looks) if measurable else None
    found["gain_at"] = _gains_at(means) if measurable else None
    return found


def _pure_numbers(means: np.ndarray) -> np.ndarray:
    rl, c, v2, _, c_cross, v2_cross = means
    size = math.sqrt(rl * v2)
    ratios = (_over(c, v2), _over(c_cross, v2), _over(v2_cross, v2))
    return np.array([_over(c, size), _over(c_cross, size), *ratios, math.sqrt(_over(v2, rl))])


def _expected_cosine(means: np.ndarray) -> np.ndarray:
    squared = means[3] * means[5]
    return np.array([means[4] / math.sqrt(squared) if squared > 0 else math.nan])


def _mixture(means: Means, looks: int) -> dict[str, Any] | None:
    """The best weight of the signal, and what it is expected to bring.

    `weight` of its gradient where RL's weighs 1, `share` of the update (negative with a negative
    weight), `gain` of the best step over the best one along RL's gradient alone {value, low, high,
    low_of_all}; the last is the lower end that allows for ``looks`` signals (Bonferroni).

    The gain is a square, which noise alone makes positive. Its root with the sign of the weight is
    smooth through 0, so that its error can be had; the gain's interval is that of the root squared,
    and its value has the noise `error^2` taken off. A negative weight, which uses MTP's gradient to
    take noise off RL's, counts as no gain.
    """
    estimates = means.of(_best)
    if not all(math.isfinite(estimate.error) for estimate in estimates):
        return None
    weight, share, root = estimates
    value, low, high = (max(x, 0.0) ** 2 for x in (root.value, root.low, root.high))
    reach = t_quantile(1 - (1 - LEVEL) / 2 / looks, means.samples - 1) * root.error
    gain = {"value": max(value - root.error**2, 0.0), "low": low, "high": high}
    gain["low_of_all"] = max(root.value - reach, 0.0) ** 2
    return {"weight": _plain(weight), "share": _plain(share), "gain": gain}


def _best(means: np.ndarray) -> np.ndarray:
    """Weight, share and signed root of the gain of the best mixture."""
    same, signal = _matrices(means)
    mixture = best_mixture(same, signal)
    sign = math.copysign(1.0, float(mixture.weights))
    share = update_share(same, mixture.weights)
    return np.array(
        [float(mixture.weights), sign * share, sign * math.sqrt(max(mixture.gain, 0.0))]
    )


def _gains_at(means: Means) -> dict[str, Any] | None:
    """Of the best step with each fixed weight, from the slope, which is smooth through 0."""
    slopes = means.of(_slopes)
    if not all(math.isfinite(slope.error) for slope in slopes):
        return None
    found = {}
    for text, slope in zip(FIXED_WEIGHTS, slopes, strict=True):
        ends = {"value": slope.value, "low": slope.low, "high": slope.high}
        found[text] = {key: max(end, 0.0) ** 2 - 1.0 for key, end in ends.items()}
    return found


def _slopes(means: np.ndarray) -> np.ndarray:
    """Of the mixture with each of the fixed weights."""
    same, signal = _matrices(means)
    weights = [torch.tensor([float(text)]) for text in FIXED_WEIGHTS]
    return np.array([mixture_slope(same, signal, weight) for weight in weights])


def _matrices(means: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """S and h of :mod:`megatron_occ.losses.mixture` for RL and one signal."""
    rl, c, v2, rl_cross, c_cross, _ = means
    same = torch.tensor([[rl, c], [c, v2]], dtype=torch.float64)
    return same, torch.tensor([rl_cross, c_cross], dtype=torch.float64)


def _tail(record: dict[str, Any], signal: int) -> dict[str, float]:
    """Share of the sum of squared token weights in the top 0.1% of tokens, over mini-batches.

    `median`, `high` (99th percentile), `heavy`: share of mini-batches in which it is over a half;
    `effective`: median of the effective number of tokens as a share of all.
    """
    tails = [sample["tails"][signal] for sample in record["samples"]]
    top = np.array([tail["top"] for tail in tails], dtype=float)
    return {
        "median": float(np.median(top)),
        "high": float(np.quantile(top, 0.99)),
        "heavy": float((top > _HEAVY).mean()),
        "effective": float(np.median([tail["effective"] for tail in tails])),
    }


def _plain(estimate: Estimate) -> dict[str, float | None]:
    return {key: x if math.isfinite(x) else None for key, x in asdict(estimate).items()}


def _over(above: float, below: float) -> float:
    return above / below if below > 0 else math.nan
