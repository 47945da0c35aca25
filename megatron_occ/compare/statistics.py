"""Paired differences over seeds: interval by bootstrap, p-values by flipping signs.

Pure functions of numbers. A seed gives an arm and the reference the same prompts and the same
random numbers, so what is compared is their difference seed by seed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

# A percentile interval can't be wider than the data. With n seeds it covers the truth at most
# 1 - 2^(1-n) of the time (75% with 3), and the studentised one is far too wide with 4.
MIN_SEEDS = 5
_RESAMPLES = 20_000
_EXACT_UP_TO = 14  # seeds: 16,384 patterns of signs
_SAMPLED = 20_000


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; nan without a value."""
    return sum(values) / len(values) if values else math.nan


def standard_error(values: Sequence[float]) -> float:
    """Of the mean: sample standard deviation over sqrt(n); nan for fewer than two values."""
    n = len(values)
    if n < 2:
        return math.nan
    center = mean(values)
    return math.sqrt(sum((value - center) ** 2 for value in values) / (n - 1) / n)


def bootstrap_interval(
    differences: Sequence[float], level: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """Bootstrap-t interval of the mean (Efron & Tibshirani 1993, section 12.5).

    Resamples give the distribution of t* = (mean* - mean) / se*, whose quantiles take the place of
    Student's: [mean - q(1 - a/2) se, mean - q(a/2) se] with a = 1 - level. Resamples of equal
    values, which have no se*, are left out.

    Args:
        differences: one for each seed.
        level: coverage.
        seed: of the resampling.

    Returns:
        The interval; None for fewer than ``MIN_SEEDS`` differences, and for equal ones that are not
        0, which say nothing of chance.
    """
    values = np.asarray(differences, dtype=float)
    n = len(values)
    if n < MIN_SEEDS:
        return None
    center, error = values.mean(), standard_error(differences)
    if error <= 1e-12 * max(1.0, abs(center)):
        # alike in all seeds: nothing to resample, and no measure of chance
        return (0.0, 0.0) if abs(center) <= 1e-12 else None
    drawn = values[np.random.default_rng(seed).integers(n, size=(_RESAMPLES, n))]
    errors = drawn.std(axis=1, ddof=1) / math.sqrt(n)
    spread = errors > 1e-9 * error
    scores = (drawn.mean(axis=1)[spread] - center) / errors[spread]
    low, high = np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])
    return float(center - high * error), float(center - low * error)


def sign_flip_p(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p-value of "no difference": share of sign patterns with a mean as far from 0.

    If arm and reference are alike, each difference is as likely with the other sign. All 2^n
    patterns up to 14 seeds, else 20,000 drawn ones. It can't be below 2/2^n.

    Args:
        differences: one for each seed, at least one.
        seed: of the drawing.
    """
    return joint_sign_flip_p({"": dict(enumerate(differences))}, seed)[""]


def joint_sign_flip_p(
    differences: Mapping[str, Mapping[int, float]], seed: int = 0
) -> dict[str, float]:
    """p-values of several arms against one reference that allow for their number.

    The sign-flip test with the largest |t| over all arms (Westfall & Young 1993, algorithm 4.1,
    single step): a seed's sign is flipped for all arms at once, which keeps how they hang together
    by the shared reference. For an arm: the share of sign patterns in which any arm's |t| is at
    least as large as its own. For one arm t grows with |mean|, so it is the plain sign-flip test.

    Args:
        differences: arm to seed to difference; arms may lack seeds.
        seed: of the drawing where there are more than 14 seeds.
    """
    seeds = sorted({key for found in differences.values() for key in found})
    arms = list(differences)
    table = np.full((len(arms), len(seeds)), np.nan)
    for row, arm in enumerate(arms):
        for key, value in differences[arm].items():
            table[row, seeds.index(key)] = value
    largest = np.zeros(0)
    signs = _signs(len(seeds), seed)
    scores = [_t(table, part) for part in np.array_split(signs, max(1, len(signs) // 1024))]
    largest = np.concatenate([part.max(axis=1) for part in scores])
    own = _t(table, np.ones((1, len(seeds))))[0]
    # a pattern that differs from the data by rounding alone counts as equal
    shares = [(largest >= value * (1 - 1e-9)).mean() for value in own]
    return {arm: float(share) for arm, share in zip(arms, shares, strict=True)}


def _signs(count: int, seed: int) -> np.ndarray:
    """Patterns of signs [patterns, count]; the first is the data's own."""
    if count <= _EXACT_UP_TO:
        return np.array(list(itertools.product((1.0, -1.0), repeat=count))).reshape(-1, count)
    drawn = np.random.default_rng(seed).choice((1.0, -1.0), size=(_SAMPLED, count))
    return np.concatenate([np.ones((1, count)), drawn])


def _t(table: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """|t| of each arm under each pattern, [patterns, arms].

    As ``|mean| / rms``, of which |t| is a growing function, and which equal values leave finite.
    """
    counts = (~np.isnan(table)).sum(axis=1)
    filled = np.nan_to_num(table)
    means = np.abs(signs @ filled.T) / counts
    rms = np.sqrt((filled**2).sum(axis=1) / counts)
    return np.divide(means, rms, out=np.zeros_like(means), where=rms > 0) * np.sqrt(counts)
