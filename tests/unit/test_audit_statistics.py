"""Errors of means over pairs, intervals of proportions and of rank correlations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from audit_records import SIZE, World, aligned_world

from megatron_occ.audit.statistics import (
    Means,
    rank_correlation,
    rank_correlation_interval,
    t_quantile,
    wilson_interval,
)


def window_pairs(samples: int, window: int) -> np.ndarray:
    return np.array([(i, j) for i in range(samples) for j in range(max(0, i - window), i)])


def means_of(world: World, samples: int, window: int, seed: int) -> Means:
    """Columns: c within; c, |G|^2 across."""
    rl, mtp = world.draw(samples, seed)
    mtp, pairs = mtp[:, 0], window_pairs(samples, window)
    a, b = pairs.T
    cross = ((rl[a] * mtp[b]).sum(-1) + (rl[b] * mtp[a]).sum(-1)) / 2
    return Means(
        (rl * mtp).sum(-1)[:, None], np.stack([cross, (rl[a] * rl[b]).sum(-1)], axis=1), pairs
    )


@pytest.mark.parametrize(
    ("degrees", "expected", "tolerance"),
    [(3, 3.18245, 0.01), (5, 2.57058, 0.001), (30, 2.04227, 1e-5), (1000, 1.96234, 1e-5)],
)
def test_quantiles_of_t_are_those_of_the_tables(degrees, expected, tolerance):
    assert t_quantile(0.975, degrees) == pytest.approx(expected, rel=tolerance)


def test_without_pairs_the_jackknife_is_the_standard_error_of_a_mean():
    values = np.random.default_rng(0).normal(size=(9, 1))
    found = Means(values, np.ones((8, 1)), window_pairs(9, 1)).estimates()[0]
    assert found.value == pytest.approx(values.mean())
    assert found.error == pytest.approx(values.std(ddof=1) / 3)
    assert found.high - found.value == pytest.approx(t_quantile(0.975, 8) * found.error)


def test_the_jackknife_over_pairs_equals_brute_force():
    random = np.random.default_rng(1)
    pairs = window_pairs(7, 3)
    single, paired = random.normal(size=(7, 1)) + 3, random.normal(size=(len(pairs), 1)) + 2

    def ratio(kept_samples: list[int], kept_pairs: list[int]) -> float:
        return paired[kept_pairs].mean() / single[kept_samples].mean()

    everyone, all_pairs = list(range(7)), list(range(len(pairs)))
    without = [
        ratio([i for i in everyone if i != k], [p for p in all_pairs if k not in pairs[p].tolist()])
        for k in everyone
    ]
    by_sample = 6 / 7 * sum((x - np.mean(without)) ** 2 for x in without)
    full = ratio(everyone, all_pairs)
    by_pair = sum(
        (ratio(everyone, [q for q in all_pairs if q != p]) - full) ** 2 for p in all_pairs
    )
    expected = math.sqrt(max(by_sample - by_pair, by_sample / 2))
    found = Means(single, paired, pairs).of(lambda m: np.array([m[1] / m[0]]))[0]
    assert found.value == pytest.approx(full)
    assert found.error == pytest.approx(expected, rel=1e-9)


def test_cross_pairs_cover_the_truth_and_same_pairs_miss_it():
    world = aligned_world(shared=0.5, own=0.5)
    covered, clear_of_truth, errors, values = 0, 0, [], []
    for seed in range(200):
        c_same, c_cross, _ = means_of(world, 30, 5, seed).estimates()
        covered += c_cross.low <= 2.0 <= c_cross.high
        clear_of_truth += abs(c_same.value - 2.0) > 3 * c_same.error
        errors.append(c_cross.error)
        values.append(c_cross.value)
    # 200 draws of 95% have a standard error of 1.5%
    assert 0.90 <= covered / 200 <= 0.995
    # the shared noise alone is 0.5 * 50
    assert clear_of_truth == 200
    assert abs(np.mean(values) - 2.0) < 3 * np.std(values) / math.sqrt(200)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(values), rel=0.15)


def test_the_error_is_right_where_pairs_are_noise_alone():
    """Without a signal the jackknife over mini-batches alone would be sqrt(2) too large."""
    world = World(np.zeros(SIZE), [np.zeros(SIZE)])
    found = [means_of(world, 40, 4, seed).estimates()[2] for seed in range(150)]
    spread = np.std([estimate.value for estimate in found])
    error = np.sqrt(np.mean([estimate.error**2 for estimate in found]))
    assert error == pytest.approx(spread, rel=0.2)


def test_too_few_or_pairs_with_one_in_common_are_refused():
    with pytest.raises(ValueError, match="3 mini-batches are too few"):
        Means(np.ones((3, 1)), np.ones((2, 1)), window_pairs(3, 1))
    star = np.array([(1, 0), (2, 0), (3, 0), (4, 0)])
    with pytest.raises(ValueError, match="mini-batch 0 is in every pair"):
        Means(np.ones((5, 1)), np.ones((4, 1)), star)


def test_wilson_intervals_are_those_computed_by_hand():
    # z = 1.96: (0.5 + z^2/20) / (1 + z^2/10) -+ z sqrt(0.025 + z^2/400) / (1 + z^2/10)
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_rank_correlation_shares_ranks_between_equal_values():
    # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: covariance 4.5, variances 4.5 and 5
    found = rank_correlation(np.array([1.0, 2, 2, 9]), np.array([10.0, 30, 20, 40]))
    assert found[0] == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert rank_correlation(np.array([1.0, 2, 3]), np.array([5.0, 4, 3]))[0] == pytest.approx(-1)
    assert math.isnan(rank_correlation(np.ones(4), np.arange(4.0))[0])


def test_a_resample_counts_as_its_entries_repeated():
    random = np.random.default_rng(3)
    x, y = random.integers(0, 5, 12).astype(float), random.normal(size=12)
    counts = random.multinomial(12, [1 / 12] * 12, 6)
    found = rank_correlation(x, y, counts)
    for row, value in zip(counts, found, strict=True):
        index = np.repeat(np.arange(12), row)
        assert value == pytest.approx(rank_correlation(x[index], y[index])[0])


def test_the_interval_of_a_rank_correlation_is_around_it_and_repeatable():
    random = np.random.default_rng(4)
    x = random.normal(size=80)
    y = x + random.normal(size=80)
    value, low, high = rank_correlation_interval(x, y)
    # Pearson's 0.707 has the rank correlation 6/pi asin(0.354) = 0.69
    assert 0.4 < low < value < high < 0.9 and low < 0.69 < high
    assert rank_correlation_interval(x, y) == (value, low, high)
    assert all(math.isnan(x) for x in rank_correlation_interval(np.arange(3.0), np.arange(3.0)))
