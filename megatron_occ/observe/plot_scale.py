"""The arithmetic of a plot: ranges, tick positions, smoothing, thinning. Pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """A linear map from data values [low, high] to drawing positions [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def tick_step(low: float, high: float, target: int = 5) -> float:
    """Return the step of the form 1, 2 or 5 times a power of ten nearest to (high-low)/target.

    "Nearest" on a logarithmic scale: the thresholds are the geometric means of the neighbours.
    """
    raw = (high - low) / target
    power = 10.0 ** math.floor(math.log10(raw))
    residual = raw / power
    for factor, limit in ((1, math.sqrt(2)), (2, math.sqrt(10)), (5, math.sqrt(50))):
        if residual < limit:
            return factor * power
    return 10 * power


def ticks_within(low: float, high: float, step: float) -> list[float]:
    """Return the multiples of `step` in [low, high], free of accumulated rounding errors."""
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    decimals = max(0, 1 - math.floor(math.log10(step)))
    return [round(index * step, decimals) + 0.0 for index in range(first, last + 1)]


def nice_range(low: float, high: float, target: int = 5) -> tuple[float, float, list[float]]:
    """Widen [low, high] to multiples of the tick step; return (low, high, ticks)."""
    low, high = widen_empty(low, high)
    step = tick_step(low, high, target)
    low = math.floor(low / step + 1e-9) * step
    high = math.ceil(high / step - 1e-9) * step
    ticks = ticks_within(low, high, step)
    return ticks[0], ticks[-1], ticks


def step_ticks(low: float, high: float, target: int = 6) -> list[float]:
    """Return ticks for an axis of step numbers: whole numbers inside [low, high]."""
    low, high = widen_empty(low, high)
    return ticks_within(low, high, max(1.0, tick_step(low, high, target)))


def widen_empty(low: float, high: float) -> tuple[float, float]:
    """Give a range without extent (one point, a constant series) some room around its value."""
    if high - low > 1e-12 * max(abs(low), abs(high)):
        return low, high
    room = 0.1 * abs(low) or 1.0
    return low - room, high + room


def robust_range(values: Sequence[float]) -> tuple[float, float]:
    """Return (min, max), or the central 98% with a margin where a few spikes would hide the rest.

    Spikes count as hiding the rest if the full range is over four times the central one.
    """
    ordered = sorted(values)
    last = len(ordered) - 1
    low, high = ordered[round(0.01 * last)], ordered[round(0.99 * last)]
    if ordered[-1] - ordered[0] <= 4 * (high - low) or high <= low:
        return ordered[0], ordered[-1]
    margin = 0.25 * (high - low)
    return max(ordered[0], low - margin), min(ordered[-1], high + margin)


def smooth(points: Sequence[Point], half_width: int) -> list[Point]:
    """Running median, then running mean, over the 2*half_width+1 points around each one.

    The median keeps a single spike from showing as a hill. At the start, where curves are often
    steep, the window shrinks to a half; beyond the ends it is cut off. Values that are not finite
    are left out.
    """
    values = [value for _, value in points]
    for average in (_median, _mean):
        reaches = [min(half_width, max(i, half_width // 2)) for i in range(len(values))]
        values = [
            average(values[max(0, i - reach) : i + reach + 1]) for i, reach in enumerate(reaches)
        ]
    return [(x, value) for (x, _), value in zip(points, values, strict=True)]


def smoothing_half_width(count: int) -> int:
    """Return the half width used for a series of `count` points; 0 means: do not smooth."""
    return 0 if count < 16 else max(1, round(count / 40))


def thin(points: Sequence[Point], limit: int) -> list[Point]:
    """Reduce to about `limit` points, keeping the minimum and maximum of each stretch."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / (limit // 2))
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        finite = [p for p in stretch if math.isfinite(p[1])] or [stretch[0]]
        kept.extend(sorted({min(finite, key=_value), max(finite, key=_value)}))
    return kept


def bucket_means(points: Sequence[Point], limit: int) -> list[Point]:
    """Reduce to at most `limit` points by averaging stretches of equal length."""
    size = math.ceil(len(points) / limit)
    if size <= 1:
        return list(points)
    stretches = [points[start : start + size] for start in range(0, len(points), size)]
    return [(_mean([x for x, _ in s]), _mean([y for _, y in s])) for s in stretches]


def _value(point: Point) -> float:
    return point[1]


def _median(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else math.nan


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
