"""pass@k, maj@k and standard errors: by hand, and against counting every case."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, permutations

import pytest
import torch

from megatron_occ.rl.pass_rates import (
    Figure,
    majority_at,
    mean_over_problems,
    mean_over_sets,
    pass_at,
)


def first_right(count, samples):
    return [place < count for place in range(samples)]


def test_pass_at_k_is_the_share_of_all_choices_of_k_with_a_right_one():
    samples = 6
    correct = torch.tensor([first_right(count, samples) for count in range(samples + 1)])
    for k in range(1, samples + 1):
        chosen = [list(combinations(row, k)) for row in correct.tolist()]
        expected = [sum(map(any, sets)) / len(sets) for sets in chosen]
        assert pass_at(correct, k).tolist() == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_by_hand():
    """1 - C(3, 2) / C(4, 2) for one right of four, 1 - C(2, 2) / C(4, 2) for two."""
    correct = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 1]]).bool()
    assert pass_at(correct, 2).tolist() == pytest.approx([1 / 2, 5 / 6])
    assert pass_at(correct, 1).tolist() == pytest.approx([1 / 4, 1 / 2])
    assert pass_at(correct, 4).tolist() == [1, 1]


def test_pass_at_k_of_many_samples_stays_a_share():
    """The naive quotient of binomials overflows here: 1 - (1 - 1/1000)^... is 512 / 1000."""
    correct = torch.tensor([first_right(1, 1000), first_right(999, 1000)])
    assert pass_at(correct, 512).tolist() == pytest.approx([0.512, 1.0])


@pytest.mark.parametrize("k", [0, 5])
def test_k_beyond_the_samples_is_refused(k):
    with pytest.raises(ValueError, match=f"k={k}: of 4 responses"):
        pass_at(torch.ones(2, 4).bool(), k)


def test_the_majority_by_hand():
    groups = [[0, 0, 1], [1, 1, 0], [0, 1, -1], [-1, -1, 0], [-1, -1, -1], [2, 0, 1], [2, 1, 1]]
    assert majority_at(torch.tensor(groups)).tolist() == pytest.approx(
        [1, 0, 1 / 2, 1, 0, 1 / 3, 0]
    )


@pytest.mark.parametrize(
    "row", [[0, 0, 1, 1, 2], [0, 1, 2, 3, -1], [0, 0, 1, 1, -1], [0, 1, 1, 1, 0]]
)
def test_a_tie_is_worth_what_the_first_answer_is_in_a_random_order(row):
    """``Counter`` puts the one that came first first."""
    orders = list(permutations(row))
    first = [Counter(g for g in order if g >= 0).most_common(1)[0][0] for order in orders]
    expected = sum(group == 0 for group in first) / len(orders)
    assert majority_at(torch.tensor([row])).item() == pytest.approx(expected)


def test_the_standard_error_is_over_problems():
    """Deviations of 0.5, 0.5, 0 and 0: variance 0.5 / 3, by four problems."""
    figure = mean_over_problems(torch.tensor([1.0, 0.0, 0.5, 0.5]))
    assert figure == pytest.approx((0.5, (0.5 / 3 / 4) ** 0.5))
    assert mean_over_problems(torch.tensor([0.25])) == (0.25, None)
    with pytest.raises(ValueError, match="no problem"):
        mean_over_problems(torch.tensor([]))


def test_the_standard_error_is_that_of_clusters():
    """Sums over a problem's responses of what they differ by from the mean of all."""
    generator = torch.Generator().manual_seed(1)
    scores = (
        torch.rand(40, 8, generator=generator) < torch.rand(40, 1, generator=generator)
    ).double()
    residuals = scores - scores.mean()
    clustered = residuals.sum(1).square().sum().sqrt() / scores.numel()
    error = mean_over_problems(scores.mean(1)).error
    assert error == pytest.approx(float(clustered) * (40 / 39) ** 0.5)
    # as if all responses were independent: far too small
    assert error > 1.3 * float(scores.std()) / scores.numel() ** 0.5


def test_the_mean_over_sets():
    """sqrt(0.03^2 + 0.04^2) / 2."""
    figures = [Figure(0.2, 0.03), Figure(0.6, 0.04)]
    assert mean_over_sets(figures) == pytest.approx((0.4, 0.025))
    assert mean_over_sets([*figures, Figure(0.1, None)]) == (pytest.approx(0.3), None)
    with pytest.raises(ValueError, match="no set"):
        mean_over_sets([])
