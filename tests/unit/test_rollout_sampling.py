"""Two ways to draw: inverse CDF and exponential race; distributions and edges."""

from __future__ import annotations

import bisect
import itertools
import math

import pytest
import torch

from megatron_occ.rollout import (
    row_keys,
    sample_by_race,
    sample_from_uniform,
    token_keys,
    uniforms,
)

LARGEST = 1.0 - 2.0**-53  # the largest double below 1


def keys(count, seed=0):
    """Of the tokens of one response."""
    return token_keys(row_keys([seed]), torch.arange(count))[0]


def numbers(seed, count):
    return uniforms(keys(count, seed), 1)[:, 0]


def draw(probs, uniform):
    log_probs = torch.tensor(probs).log().expand(len(uniform), -1)
    return sample_from_uniform(log_probs, torch.tensor(uniform, dtype=torch.float64)).tolist()


def chi_square(counts, probs):
    total = sum(counts)
    pairs = zip(counts, probs, strict=True)
    return sum((count - total * p) ** 2 / (total * p) for count, p in pairs)


def test_draws_follow_the_distribution():
    probs = [0.02, 0.4, 0.08, 0.3, 0.15, 0.05]
    drawn = draw(probs, numbers(11, 50_000).tolist())
    counts = [drawn.count(token) for token in range(6)]
    # 5 degrees of freedom: the 0.999 quantile of chi-square is 20.5
    assert chi_square(counts, probs) < 20.5
    # and the same number rejects a distribution that is off by one percent of mass
    assert chi_square(counts, [0.03, 0.39, *probs[2:]]) > 20.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_each_draw_is_the_plain_inverse_of_the_cumulative_distribution(dtype):
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(200, 17, generator=generator, dtype=torch.float64)
    log_probs = logits.log_softmax(-1).to(dtype)
    uniform = numbers(4, 200)
    given = log_probs.clone()
    got = sample_from_uniform(log_probs, uniform).tolist()
    assert torch.equal(log_probs, given), "the caller's log-probs were changed"
    for row, u, token in zip(log_probs.double().exp().tolist(), uniform.tolist(), got, strict=True):
        cumulative = list(itertools.accumulate(row))
        assert token == bisect.bisect_right(cumulative, u * cumulative[-1])


def test_boundaries_between_tokens():
    """Token i owns the numbers from c_{i-1} up to c_i."""
    uniform = [0.0, 0.25 - 1e-6, 0.25 + 1e-6, 0.5 + 1e-6, 0.75 - 1e-6, 0.75 + 1e-6, LARGEST]
    assert draw([0.25, 0.25, 0.25, 0.25], uniform) == [0, 0, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("probs", "first", "last"),
    [
        ([0.0, 0.5, 0.0, 0.5, 0.0], 1, 3),
        ([0.0, 0.0, 1.0], 2, 2),
        ([1.0, 0.0, 0.0], 0, 0),
        ([0.3, 0.7, 0.0], 0, 1),
    ],
)
def test_tokens_of_probability_zero_are_never_drawn(probs, first, last):
    uniform = [0.0, 0.5, LARGEST, *numbers(7, 2_000).tolist()]
    drawn = draw(probs, uniform)
    assert all(probs[token] > 0 for token in drawn)
    assert (drawn[0], drawn[2]) == (first, last)


def test_largest_number_draws_a_possible_token_whatever_the_rounding():
    """Sums of many rounded probabilities end above or below 1."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(500, 300, generator=generator)
    logits[:, -7:] = -torch.inf
    log_probs = logits.log_softmax(-1)
    top = sample_from_uniform(log_probs, torch.full((500,), LARGEST, dtype=torch.float64))
    assert top.tolist() == [292] * 500
    bottom = sample_from_uniform(log_probs.flip(-1), torch.zeros(500, dtype=torch.float64))
    assert bottom.tolist() == [7] * 500


def test_rare_tokens_of_a_large_vocabulary_stay_reachable():
    """Mass 1e-9 at the end: single-precision numbers or sums would never get there."""
    log_probs = torch.full((2, 1001), -torch.inf, dtype=torch.float64)
    log_probs[:, 0], log_probs[:, 1000] = torch.tensor([1 - 1e-9, 1e-9], dtype=torch.float64).log()
    uniform = torch.tensor([1 - 2e-9, 1 - 0.5e-9], dtype=torch.float64)
    assert sample_from_uniform(log_probs, uniform).tolist() == [0, 1000]


def test_a_race_follows_the_distribution():
    probs = [0.02, 0.4, 0.08, 0.3, 0.15, 0.05]
    log_probs = torch.tensor(probs).log().expand(50_000, -1)
    counts = torch.bincount(sample_by_race(log_probs, keys(50_000)), minlength=6).tolist()
    assert chi_square(counts, probs) < 20.5
    assert chi_square(counts, [0.03, 0.39, *probs[2:]]) > 20.5


def test_consecutive_races_of_a_response_are_independent():
    """Pairs of tokens over many seeds."""
    pairs = token_keys(row_keys(range(20_000)), torch.arange(2))
    probs = torch.tensor([0.5, 0.3, 0.2])
    drawn = [sample_by_race(probs.log().expand(20_000, -1), pairs[:, i]) for i in (0, 1)]
    counts = torch.bincount(drawn[0] * 3 + drawn[1], minlength=9).tolist()
    assert chi_square(counts, torch.outer(probs, probs).flatten().tolist()) < 26.1  # 8 degrees


def test_each_race_is_won_by_the_first_to_arrive():
    log_probs = torch.randn(40, 9, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    expected = []
    for row, numbers_of_token in zip(log_probs.double(), uniforms(keys(40), 9), strict=True):
        times = [-math.log(1 - u) / math.exp(x) for x, u in zip(row, numbers_of_token, strict=True)]
        expected.append(times.index(min(times)))
    assert sample_by_race(log_probs, keys(40)).tolist() == expected


def test_a_race_never_draws_what_has_no_probability():
    log_probs = torch.full((5_000, 4), -torch.inf)
    log_probs[:, 1], log_probs[:, 2] = math.log(1e-9), 0.0
    assert set(sample_by_race(log_probs, keys(5_000)).tolist()) == {2}
    log_probs[:, 2] = -torch.inf
    assert set(sample_by_race(log_probs - log_probs[:, 1:2], keys(5_000)).tolist()) == {1}


@pytest.mark.parametrize("vocabulary", [2, 1_000])
def test_two_races_with_the_same_numbers_meet_as_often_as_they_should(vocabulary):
    """Both draw i with probability 1 / sum_j max(p_j / p_i, q_j / q_i)."""
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    noise = 0.4 * torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    p, q = logits.softmax(-1), (logits + noise).softmax(-1)
    ratios = torch.maximum(p / p.unsqueeze(1), q / q.unsqueeze(1))
    expected, variation = float((1 / ratios.sum(1)).sum()), float((p - q).clamp(min=0).sum())
    assert expected > (1 - variation) / (1 + variation)
    rows = 4_000
    drawn = [sample_by_race(x.log().expand(rows, -1), keys(rows)) for x in (p, q)]
    met = float((drawn[0] == drawn[1]).double().mean())
    assert abs(met - expected) < 4 * (expected * (1 - expected) / rows) ** 0.5
