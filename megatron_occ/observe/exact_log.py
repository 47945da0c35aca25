"""The measurements of `mtp.trunk.estimator=exact`, read back from the log.

Steps are taken as independent samples where a mean over the run gets a standard error.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_occ.observe.plot_scale import Point
from megatron_occ.observe.run_data import RunData

# Steps below which a standard error says little.
MIN_STEPS = 8
CLEAR = 2.0  # standard errors


@dataclass(frozen=True)
class Estimate:
    """Mean over `count` steps and its standard error, NaN for one step."""

    value: float
    error: float
    count: int

    @property
    def is_clear(self) -> bool:
        """Whether it is away from 0, beyond chance."""
        return self.count >= MIN_STEPS and abs(self.value) > CLEAR * self.error


def mean_of(points: Sequence[Point]) -> Estimate | None:
    """Mean over steps; None without any."""
    values = [value for _, value in points]
    if not values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(statistics.fmean(values), error, len(values))


def running_means(points: Sequence[Point]) -> list[tuple[float, Estimate]]:
    """For each step the mean up to it."""
    found, total, squares = [], 0.0, 0.0
    for count, (step, value) in enumerate(points, start=1):
        total, squares = total + value, squares + value * value
        mean = total / count
        spread = max(0.0, squares - total * mean) / (count - 1) if count > 1 else math.nan
        found.append((step, Estimate(mean, math.sqrt(spread / count), count)))
    return found


class ExactLog:
    """What an RL run measured, by depth k and group of layers.

    `groups` are the suffixes of the metrics: `[""]` for the trunk as a whole, else `/layer 1` and
    so on. Inner products of the trunk are the sums of those of its groups.
    """

    def __init__(self, run: RunData) -> None:
        self._run = run
        # as they were logged: embedding, layers in order, output
        names = list(run.series.get("rl", {}))
        self.groups = [n.removeprefix("exact/share") for n in names if n.startswith("exact/share")]
        tails = {n.removeprefix("exact/c_same_").partition("/")[0] for n in names}
        self.depths = sorted(int(tail) for tail in tails if tail.isdecimal())
        self.per_layer = any(self.groups)

    def points(self, name: str) -> list[Point]:
        """Finite values of `exact/<name>`."""
        return _finite(self._run.points("rl", f"exact/{name}"))

    def total(self, name: str) -> list[Point]:
        """Sum over groups of `exact/<name>`, of steps that have all of them."""
        columns = [dict(self.points(name + group)) for group in self.groups]
        if not columns:
            return []
        steps = sorted(set(columns[0]).intersection(*columns[1:]))
        return [(step, sum(column[step] for column in columns)) for step in steps]

    def share(self) -> list[Point]:
        """Norm of the MTP part of the trunk's gradient as a share of the RL part's.

        Of several groups the root of the mean square, each weighing RL's squared norm in the step.
        """
        if not self.per_layer:
            return self.points("share")
        columns = [
            (dict(self.points(f"share{group}")), dict(self.points(f"rl_norm_squared{group}")))
            for group in self.groups
        ]
        found = []
        for step, norm in self.total("rl_norm_squared"):
            pairs = [(shares.get(step, 0.0), norms[step]) for shares, norms in columns]
            if norm > 0:
                mtp = sum(share * share * weight for share, weight in pairs)
                found.append((step, math.sqrt(mtp / norm)))
        return found

    def acted(self) -> dict[float, list[float]]:
        """Lambda that acted in the measured mini-batches, of all depths and groups, by step.

        Of a log without it, in all mini-batches.
        """
        found: dict[float, list[float]] = {}
        for depth in self.depths:
            for group in self.groups:
                for step, value in self.points(f"lambda_{depth}{group}"):
                    found.setdefault(step, []).append(value)
        return found or coefficients(self._run)

    def cosines(self, depth: int, pairs: str) -> list[Point]:
        """c over the root mean squares of both gradients, by step; `pairs` is `same` or `cross`."""
        rl, mtp = dict(self.total("rl_norm_squared")), dict(self.total(f"norm_squared_{depth}"))
        return [
            (step, c / math.sqrt(rl[step] * mtp[step]))
            for step, c in self.total(f"c_{pairs}_{depth}")
            if rl.get(step, 0.0) > 0 and mtp.get(step, 0.0) > 0
        ]

    def rl_signal_share(self) -> list[Point]:
        """RL's gradients of two mini-batches: their inner product over the squared norm of one."""
        norms = dict(self.total("rl_norm_squared"))
        return [(x, y / norms[x]) for x, y in self.total("rl_signal") if norms.get(x, 0.0) > 0]


def coefficients(run: RunData) -> dict[float, list[float]]:
    """Lambda that acted, of each depth, by step: the mean over its mini-batches."""
    found: dict[float, list[float]] = {}
    for depth in run.depths("rl", "lambda/mtp_"):
        for step, value in _finite(run.points("rl", f"lambda/mtp_{depth}")):
            found.setdefault(step, []).append(value)
    return found


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(y)]
