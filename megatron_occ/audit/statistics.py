"""Means over mini-batches and over pairs of them, with errors; agreement of two series.

Pure functions of numbers. Intervals of means, and of what is computed from means, are the value
-+ t standard errors, t the quantile of Student's distribution with n - 1 degrees of freedom for n
mini-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
# standard errors from which a value counts as clear of 0
CLEAR = 2.0
MIN_SAMPLES = 4
_RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error and 95% interval; nan where there is none."""

    value: float
    error: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether it is ``CLEAR`` standard errors from 0."""
        return abs(self.value) > CLEAR * self.error

    @staticmethod
    def around(value: float, error: float, samples: int) -> Estimate:
        """With the interval for that many independent samples."""
        reach = t_quantile(0.5 + LEVEL / 2, samples - 1) * error
        return Estimate(float(value), float(error), float(value - reach), float(value + reach))


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t, by the expansion in 1/degrees (Abramowitz & Stegun 26.7.5).

    Right to 1% from 3 degrees of freedom on at 0.975, to 0.1% from 5 on.
    """
    x = NormalDist().inv_cdf(probability)
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + sum(term / degrees**power for power, term in enumerate(terms, start=1))


class Means:
    """Means of quantities of single mini-batches and of pairs of them, and functions of the means.

    A mean over pairs is a U-statistic, whose terms depend on each other where they share a
    mini-batch. The jackknife leaves out one mini-batch with every pair that involves it. Its
    variance counts the noise that belongs to one pair alone twice, once for either mini-batch
    (Efron & Stein 1981), so that a second jackknife, over pairs, is taken off, as in the variance
    of dyadic means (Fafchamps & Gubert 2007). The true variance is never less than half of the
    jackknife's in expectation, and no smaller one is returned.

    Args:
        single: [n, A] a row for each mini-batch.
        paired: [N, B] a row for each pair.
        pairs: [N, 2] the two mini-batches of each pair.

    Raises:
        ValueError: fewer than ``MIN_SAMPLES`` mini-batches, or every pair has one in common.
    """

    def __init__(self, single: np.ndarray, paired: np.ndarray, pairs: np.ndarray) -> None:
        self.samples, self.pairs = len(single), pairs
        if self.samples < MIN_SAMPLES:
            raise ValueError(
                f"{self.samples} mini-batches are too few for an error: measure at least "
                f"{MIN_SAMPLES}"
            )
        # a pair of a mini-batch with itself would be no pair, and break the counts
        assert (pairs[:, 0] != pairs[:, 1]).all()
        counts = np.bincount(pairs.ravel(), minlength=self.samples)
        if counts.max() >= len(pairs):
            raise ValueError(
                f"mini-batch {counts.argmax()} is in every pair, which leaves no error: "
                "pair each mini-batch with an earlier one"
            )
        self._single, self._paired, self._counts = single, paired, counts
        self.values = np.concatenate([single.mean(axis=0), paired.mean(axis=0)])

    @cached_property
    def leave_one(self) -> np.ndarray:
        """[n, A + B] the means without each of the mini-batches."""
        n = self.samples
        single = (self._single.sum(axis=0) - self._single) / (n - 1)
        involved = np.zeros((n, self._paired.shape[1]))
        for side in (0, 1):
            np.add.at(involved, self.pairs[:, side], self._paired)
        left = len(self.pairs) - self._counts[:, None]
        paired = (self._paired.sum(axis=0) - involved) / left
        return np.concatenate([single, paired], axis=1)

    @cached_property
    def _pair_shifts(self) -> np.ndarray:
        """[N, A + B] change of the means when a single pair is left out."""
        paired = (self._paired.mean(axis=0) - self._paired) / (len(self.pairs) - 1)
        return np.concatenate([np.zeros((len(paired), self._single.shape[1])), paired], axis=1)

    def estimates(self) -> list[Estimate]:
        """Of each mean, singles first."""
        by_pairs = (self._pair_shifts**2).sum(axis=0)
        return self._estimates(self.values, self.leave_one, by_pairs)

    def of(self, function: Callable[[np.ndarray], np.ndarray]) -> list[Estimate]:
        """Of quantities computed from the means.

        Args:
            function: from the means [A + B] to the quantities [F]; smooth.
        """
        values = np.asarray(function(self.values), dtype=float)
        without = np.stack([np.asarray(function(row), dtype=float) for row in self.leave_one])
        # the pairs' part to first order: leaving out any one of them changes the means very little
        by_pairs = ((self._pair_shifts @ self._slopes(function, values)) ** 2).sum(axis=0)
        return self._estimates(values, without, by_pairs)

    def _slopes(self, function: Callable, values: np.ndarray) -> np.ndarray:
        """[A + B, F] derivatives of the function at the means."""
        slopes = np.zeros((len(self.values), len(values)))
        sizes = self._pair_shifts.std(axis=0)
        for index in np.flatnonzero(sizes):
            step = np.zeros_like(self.values)
            step[index] = sizes[index]
            ahead, behind = function(self.values + step), function(self.values - step)
            slopes[index] = (np.asarray(ahead) - np.asarray(behind)) / (2 * sizes[index])
        return slopes

    def _estimates(
        self, values: np.ndarray, without: np.ndarray, by_pairs: np.ndarray
    ) -> list[Estimate]:
        n = self.samples
        jackknife = (n - 1) / n * ((without - without.mean(axis=0)) ** 2).sum(axis=0)
        errors = np.sqrt(np.maximum(jackknife - by_pairs, jackknife / 2))
        return [Estimate.around(v, e, n) for v, e in zip(values, errors, strict=True)]


def wilson_interval(hits: int, trials: int) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927); (0, 1) without a trial."""
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    share, scale = hits / trials, 1 + z * z / trials
    center = (share + z * z / (2 * trials)) / scale
    reach = z / scale * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    return max(0.0, center - reach), min(1.0, center + reach)


def rank_correlation(x: np.ndarray, y: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Spearman's rank correlation, equal values sharing their mean rank.

    Args:
        x: [n].
        y: [n].
        counts: [B, n] how often each entry is there in each of B samples; by default once.

    Returns:
        [B]; nan where one of the two is constant.
    """
    counts = np.ones((1, len(x))) if counts is None else counts.astype(float)
    a, b = _ranks(x, counts), _ranks(y, counts)
    n = counts.sum(axis=1, keepdims=True)
    a -= (counts * a).sum(axis=1, keepdims=True) / n
    b -= (counts * b).sum(axis=1, keepdims=True) / n
    norm = np.sqrt((counts * a * a).sum(axis=1) * (counts * b * b).sum(axis=1))
    shared = (counts * a * b).sum(axis=1)
    return np.divide(shared, norm, out=np.full_like(norm, np.nan), where=norm > 1e-9)


def rank_correlation_interval(
    x: np.ndarray, y: np.ndarray, seed: int = 0
) -> tuple[float, float, float]:
    """Spearman's rank correlation with its 95% percentile bootstrap interval over entries.

    Args:
        x: [n].
        y: [n].
        seed: of the resampling.

    Returns:
        Value, low, high; nan for fewer than ``MIN_SAMPLES`` entries or where one is constant.
    """
    if len(x) < MIN_SAMPLES:
        return math.nan, math.nan, math.nan
    value = float(rank_correlation(x, y)[0])
    drawn = np.random.default_rng(seed).multinomial(len(x), [1 / len(x)] * len(x), _RESAMPLES)
    found = rank_correlation(x, y, drawn)
    found = found[np.isfinite(found)]
    if math.isnan(value) or not len(found):
        return math.nan, math.nan, math.nan
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return value, float(low), float(high)


def _ranks(x: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[B, n] mean ranks of the entries in each sample."""
    _, first, index = np.unique(np.sort(x), return_index=True, return_inverse=True)
    order = np.argsort(x, kind="stable")
    totals = np.add.reduceat(counts[:, order], first, axis=1)
    ranks = np.empty_like(counts)
    ranks[:, order] = (np.cumsum(totals, axis=1) - totals / 2 + 0.5)[:, index]
    return ranks
