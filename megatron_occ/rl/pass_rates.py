"""Figures of k responses to each of n problems, a value a problem, and their standard errors.

Pure functions of tensors; the mean of what they return over problems is the figure itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# groups of a response: RIGHT where it is correct, NO_ANSWER where none was read, others from 1 on
RIGHT, NO_ANSWER = 0, -1


class Figure(NamedTuple):
    """A mean over problems and its standard error; None for the error of a single problem."""

    value: float
    error: float | None


def mean_over_problems(by_problem: Tensor) -> Figure:
    """The mean [n] -> 1, with its standard error by problem.

    Responses to one problem are not independent of each other, so that the problem is the unit:
    the error is the standard deviation over problems, divided by the root of their number. For as
    many responses to each problem this is the clustered error of Miller, arXiv 2411.00640, with
    n - 1 in place of n.

    Raises:
        ValueError: there is no problem.
    """
    count = len(by_problem)
    if count == 0:
        raise ValueError("no problem: there is nothing to take the mean of")
    values = by_problem.double()
    error = float(values.std(correction=1)) / math.sqrt(count) if count > 1 else None
    return Figure(float(values.mean()), error)


def mean_over_sets(figures: Sequence[Figure]) -> Figure:
    """Unweighted mean of independent sets' figures; without an error where one has none.

    Raises:
        ValueError: there is no set.
    """
    if not figures:
        raise ValueError("no set: there is nothing to take the mean of")
    count = len(figures)
    errors = [figure.error for figure in figures if figure.error is not None]
    error = math.sqrt(sum(e**2 for e in errors)) / count if len(errors) == count else None
    return Figure(sum(figure.value for figure in figures) / count, error)


def pass_at(correct: Tensor, k: int) -> Tensor:
    """Unbiased pass@k of each problem: the chance that one of k responses is right.

    ``1 - C(n - c, k) / C(n, k)`` for k of n without replacement, c of which are right, as a product
    (Chen et al., arXiv 2107.03374, equation 1 and figure 3).

    Args:
        correct: [problems, n], true where a response is right.
        k: 1 to n.

    Returns:
        [problems], float64.

    Raises:
        ValueError: k is not in its range.
    """
    samples = correct.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f"k={k}: of {samples} responses a problem give 1 to {samples}")
    right = correct.double().sum(1)
    place = torch.arange(1, samples + 1, dtype=torch.float64, device=correct.device)
    # factors 1 - k / i of i = n - c + 1 to n; one of them is 0 where n - c < k
    factors = (1 - k / place).clamp(min=0)
    taken = place > (samples - right).unsqueeze(1)
    return 1 - torch.where(taken, factors, torch.ones_like(factors)).prod(1)


def majority_at(groups: Tensor) -> Tensor:
    """maj@n of each problem: whether the answer that most of n responses give is right.

    Each response with an answer has a vote (Wang et al., arXiv 2203.11171, without weights). Among
    several answers with as many votes one is drawn: the value is the chance that it is right, so
    that it does not depend on the order of the responses. Without any vote it is 0.

    Args:
        groups: [problems, n]: RIGHT, NO_ANSWER, or the number of a wrong answer, from 1 on.

    Returns:
        [problems], float64.
    """
    return torch.tensor([_majority(row) for row in groups.tolist()], dtype=torch.float64)


def _majority(groups: list[int]) -> float:
    votes = [group for group in groups if group != NO_ANSWER]
    if not votes:
        return 0.0
    counts = {group: votes.count(group) for group in set(votes)}
    most = max(counts.values())
    first = [group for group, count in counts.items() if count == most]
    return (RIGHT in first) / len(first)
