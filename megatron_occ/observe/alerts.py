"""What a person should be told of a run's metrics while it goes on: a sentence for each crossing.

Every rule compares a number of the steps so far with its limit, as a ratio: above 1 it is crossed.
It is told once, and again only after it has been clearly on the other side for a while.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from megatron_occ.config.schema_observe import AlertsConfig
from megatron_occ.observe.text import format_percent

# steps that a run's beginning and its present are the mean of
START_STEPS = 10
RECENT_STEPS = 5
# steps before, that a burst stands out from, and how many of them there have to be
BURST_STEPS = 20
BURST_LEAST = 5
# steps in a row in which the same rank has to be the slowest
STRAGGLER_STEPS = 3
# a rule that was told may be told again once its ratio was below this for as many steps in a row
CALM = 0.8
CALM_STEPS = 10
# as `time/<phase>` names them
STRAGGLER_PHASES = ("rollout", "reward", "logprobs", "train")

# shares of response tokens, and what became of them
_CORRECTED = {
    "rejected/tokens": "are rejected",
    "weight/high": "have a weight above the range",
    "weight/low": "have a weight below the range",
}


@dataclass(frozen=True)
class Reading:
    """How far a rule is: `ratio` above 1 is beyond its limit, and `text` says so."""

    ratio: float
    text: str


class Rule(Protocol):
    """What a step's metrics say by one rule; it keeps what it needs of the steps before."""

    name: str

    def read(self, metrics: Mapping[str, float]) -> Reading | None:
        """Take the metrics of the next step; None where they say nothing."""


@dataclass
class BelowStart:
    """The mean of the last steps, as a share of that of the first ones, is below `share`."""

    name: str
    metric: str
    share: float
    text: str
    _first: list[float] = field(default_factory=list)
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))

    def read(self, metrics: Mapping[str, float]) -> Reading | None:
        value = _finite(metrics, self.metric)
        if value is None:
            return None
        if len(self._first) < START_STEPS:
            self._first.append(value)
            return None
        self._recent.append(value)
        start, now = statistics.fmean(self._first), statistics.fmean(self._recent)
        if len(self._recent) < RECENT_STEPS or start <= 0:
            return None
        ratio = math.inf if now <= 0 else self.share * start / now
        return Reading(ratio, self.text.format(now=now, start=start, limit=self.share))


@dataclass
class Above:
    """The value of a step is above `limit`."""

    name: str
    metric: str
    limit: float
    text: str

    def read(self, metrics: Mapping[str, float]) -> Reading | None:
        value = _finite(metrics, self.metric)
        if value is None:
            return None
        return Reading(value / self.limit, self.text.format(now=value, limit=self.limit))


@dataclass
class AboveRecent:
    """The value of a step is more than `factor` times the mean of the steps before it."""

    name: str
    metric: str
    factor: float
    text: str
    _before: deque[float] = field(default_factory=lambda: deque(maxlen=BURST_STEPS))

    def read(self, metrics: Mapping[str, float]) -> Reading | None:
        value = _finite(metrics, self.metric)
        if value is None:
            return None
        before, reading = list(self._before), None
        self._before.append(value)
        if len(before) >= BURST_LEAST and (usual := statistics.fmean(before)) > 0:
            text = self.text.format(now=value, start=usual, limit=self.factor)
            reading = Reading(value / usual / self.factor, text)
        return reading


@dataclass
class SlowRank:
    """The same rank is the slowest of a phase for several steps, by more than `share` of each."""

    name: str
    phase: str
    share: float
    _rank: float = -1.0
    _lost: deque[float] = field(default_factory=lambda: deque(maxlen=STRAGGLER_STEPS))

    def read(self, metrics: Mapping[str, float]) -> Reading | None:
        lost = _finite(metrics, _behind(self.phase))
        rank = _finite(metrics, _slowest(self.phase))
        if lost is None or rank is None:
            return None
        if rank != self._rank:
            self._lost.clear()
        self._rank = rank
        self._lost.append(lost)
        if len(self._lost) < STRAGGLER_STEPS:
            return Reading(0.0, "")
        least = min(self._lost)
        return Reading(
            least / self.share,
            f"rank {rank:g} is slow in {self.phase}: {format_percent(least)} of a step or more "
            f"behind the median rank for {STRAGGLER_STEPS} steps "
            f"(alerts.straggler={self.share:g})",
        )


class Alerts:
    """The rules of a configuration over the steps of RL, and which of them are crossed now."""

    def __init__(self, config: AlertsConfig) -> None:
        self._config = config
        self._rules: list[Rule] = []
        # rules that were told, with the calm steps since
        self._crossed: dict[str, int] = {}
        self.replay(())

    def check(self, metrics: Mapping[str, float]) -> list[str]:
        """Take the metrics of the next step; returns a sentence for each limit just crossed."""
        found = []
        for rule in self._rules:
            reading = rule.read(metrics)
            if reading is None:
                continue
            if rule.name in self._crossed:
                self._count_calm(rule.name, reading)
            elif reading.ratio > 1:
                self._crossed[rule.name] = 0
                found.append(reading.text)
        return found

    def _count_calm(self, name: str, reading: Reading) -> None:
        self._crossed[name] = self._crossed[name] + 1 if reading.ratio < CALM else 0
        if self._crossed[name] == CALM_STEPS:
            del self._crossed[name]

    def replay(self, steps: Iterable[Mapping[str, float]]) -> None:
        """Start anew from the steps of a resumed run: what they told is not told again."""
        self._rules, self._crossed = rules_of(self._config), {}
        for metrics in steps:
            self.check(metrics)


def rules_of(config: AlertsConfig) -> list[Rule]:
    """The rules that are on."""
    found: list[Rule] = []
    if config.entropy is not None:
        text = (
            f"entropy collapses: {{now:.3g}} nats a token over {RECENT_STEPS} steps, of "
            "{start:.3g} at the start (alerts.entropy={limit:g})"
        )
        found.append(BelowStart("entropy", "entropy", config.entropy, text))
    if config.acceptance is not None:
        text = (
            f"acceptance falls: {{now:.1%}} of first drafts accepted over {RECENT_STEPS} steps, of "
            "{start:.1%} at the start (alerts.acceptance={limit:g})"
        )
        found.append(BelowStart("acceptance", "draft/accepted_1", config.acceptance, text))
    if config.logprob_gap is not None:
        text = (
            "log-probs of rollout and training are {now:.3g} nats apart on average "
            "(alerts.logprob_gap={limit:g})"
        )
        found.append(Above("gap", "logprob_gap/mean", config.logprob_gap, text))
    if config.verifier_failures is not None:
        text = (
            "verifiers fail: {now:.1%} of responses could not be scored "
            "(alerts.verifier_failures={limit:g})"
        )
        found.append(Above("verifier", "verifier/failed", config.verifier_failures, text))
    if config.correction is not None:
        for metric, what in _CORRECTED.items():
            text = (
                f"rollout and training are apart: {{now:.1%}} of response tokens {what} "
                "(alerts.correction={limit:g})"
            )
            found.append(Above(metric, f"correction/{metric}", config.correction, text))
    if config.length_burst is not None:
        text = (
            "responses grow at once: {now:.4g} tokens on average, of {start:.4g} in the steps "
            "before (alerts.length_burst={limit:g})"
        )
        found.append(AboveRecent("length", "rollout/length_mean", config.length_burst, text))
    if config.straggler is not None:
        found += [SlowRank(f"straggler {p}", p, config.straggler) for p in STRAGGLER_PHASES]
    return found


def straggler_metrics(by_rank: list[list[float]]) -> dict[str, float]:
    """Of each phase the rank that took longest, and how far it is behind the median rank.

    Args:
        by_rank: seconds of `STRAGGLER_PHASES`, for each rank.

    Returns:
        `time/<phase>_behind`, the difference as a share of the longest step of a rank, and
        `time/<phase>_slowest`, the rank.
    """
    step = max(sum(seconds) for seconds in by_rank)
    found: dict[str, float] = {}
    for place, phase in enumerate(STRAGGLER_PHASES):
        times = [seconds[place] for seconds in by_rank]
        behind = max(times) - statistics.median_low(times)
        found[_behind(phase)] = behind / step if step > 0 else 0.0
        found[_slowest(phase)] = float(times.index(max(times)))
    return found


def _behind(phase: str) -> str:
    return f"time/{phase}_behind"


def _slowest(phase: str) -> str:
    return f"time/{phase}_slowest"


def _finite(metrics: Mapping[str, float], name: str) -> float | None:
    value = metrics.get(name)
    return value if value is not None and math.isfinite(value) else None
