"""Inverse-CDF sampling: distribution, edges, and randomness that belongs to the sequence."""

from __future__ import annotations

import bisect
import itertools

import pytest
import torch

from megatron_occ.rollout import sample_from_uniform, uniforms

LARGEST = 1.0 - 2.0**-53  # the largest double below 1


def draw(probs, uniform):
    log_probs = torch.tensor(probs).log().expand(len(uniform), -1)
    return sample_from_uniform(log_probs, torch.tensor(uniform, dtype=torch.float64)).tolist()


def chi_square(counts, probs):
    total = sum(counts)
    pairs = zip(counts, probs, strict=True)
    return sum((count - total * p) ** 2 / (total * p) for count, p in pairs)


def test_draws_follow_the_distribution():
    probs = [0.02, 0.4, 0.08, 0.3, 0.15, 0.05]
    drawn = draw(probs, uniforms([11], 50_000)[0].tolist())
    counts = [drawn.count(token) for token in range(6)]
    # 5 degrees of freedom: the 0.999 quantile of chi-square is 20.5
    assert chi_square(counts, probs) < 20.5
    # and the same number rejects a distribution that is off by one percent of mass
    assert chi_square(counts, [0.03, 0.39, *probs[2:]]) > 20.5


def test_consecutive_numbers_of_a_row_are_independent():
    """Pairs of draws, as a response makes them, over many seeds."""
    rows = uniforms(list(range(4_000)), 2)
    first, second = ((rows[:, column] * 4).long() for column in (0, 1))
    counts = torch.bincount(first * 4 + second, minlength=16).tolist()
    assert chi_square(counts, [1 / 16] * 16) < 37.7  # 15 degrees of freedom, 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_each_draw_is_the_plain_inverse_of_the_cumulative_distribution(dtype):
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(200, 17, generator=generator, dtype=torch.float64)
    log_probs = logits.log_softmax(-1).to(dtype)
    uniform = uniforms([4], 200)[0]
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
    uniform = [0.0, 0.5, LARGEST, *uniforms([7], 2_000)[0].tolist()]
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


def test_uniform_numbers():
    rows = uniforms([0, 1], 20_000)
    assert rows.dtype == torch.float64
    assert rows.shape == (2, 20_000)
    assert rows.min() >= 0
    assert rows.max() < 1
    # 53 random bits, not the 24 of single precision
    assert (rows * 2**30).frac().count_nonzero() > 39_000
    standard_error = (1 / 12 / 20_000) ** 0.5
    assert (rows.mean(1) - 0.5).abs().max() < 4 * standard_error


def test_a_row_depends_on_its_own_seed_only():
    alone = uniforms([42], 30)[0]
    state = torch.get_rng_state()
    for seeds, row in (([42, 1, 2], 0), ([9, 42], 1), ([3, 2**63 - 1, 42, 42], 3)):
        assert torch.equal(uniforms(seeds, 30)[row], alone)
    assert torch.equal(uniforms([42], 12)[0], alone[:12])
    assert not torch.equal(uniforms([43], 30)[0], alone)
    assert torch.equal(torch.get_rng_state(), state)
