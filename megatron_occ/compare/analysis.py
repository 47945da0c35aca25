"""From results to numbers: each arm's outcomes, and their paired differences to the reference."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

from megatron_occ.compare import statistics
from megatron_occ.observe.jsonl import to_number

# the outcome that decides
MAIN = "final"


@dataclass(frozen=True)
class Outcome:
    """A number that each run has.

    Attributes:
        name: its key.
        title: for people.
        percent: whether it is a share.
    """

    name: str
    title: str
    percent: bool = False


@dataclass(frozen=True)
class Difference:
    """An arm's outcome minus the reference's, over the seeds that both have finished.

    Attributes:
        arm: its name.
        by_seed: seed to difference.
        interval: 95%, None with too few seeds.
        p: of the sign-flip test.
        p_of_all: the same, allowing for the number of arms.
    """

    arm: str
    by_seed: dict[int, float]
    interval: tuple[float, float] | None
    p: float
    p_of_all: float

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.mean(list(self.by_seed.values()))

    @property
    def is_nothing(self) -> bool:
        """Whether there is no difference in any seed, as of two arms that did the same."""
        return not any(self.by_seed.values())

    @property
    def verdict(self) -> str:
        """``above`` or ``below`` where the interval excludes 0, else ``open``."""
        if self.interval is None:
            return "open"
        low, high = self.interval
        return "above" if low > 0 else "below" if high < 0 else "open"


@dataclass
class Arm:
    """An arm's finished runs.

    Attributes:
        name: its name.
        values: outcome to seed to value; a run without it is left out.
        runs: by seed, those that are not finished too.
    """

    name: str
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    runs: dict[int, dict[str, Any]] = field(default_factory=dict)

    def finished(self) -> list[dict[str, Any]]:
        """Its finished runs, in order of seeds."""
        return [self.runs[seed] for seed in sorted(self.runs) if self.runs[seed]["finished"]]

    def level(self, outcome: str) -> tuple[float, float]:
        """Mean and its standard error over seeds; nan where there are too few."""
        found = list(self.values.get(outcome, {}).values())
        return statistics.mean(found), statistics.standard_error(found)


@dataclass
class Comparison:
    """A study's numbers.

    Attributes:
        results: what they were computed from.
        arms: by name, in the order of the study.
        outcomes: those that some run has.
        differences: outcome to its differences, the largest first; the reference has none.
        unpaired: runs whose first rollouts are not those of the reference with the same seed.
    """

    results: dict[str, Any]
    arms: dict[str, Arm]
    outcomes: list[Outcome]
    differences: dict[str, list[Difference]]
    unpaired: list[str]

    @property
    def reference(self) -> Arm:
        """The arm that the others are compared with."""
        return self.arms[self.results["reference"]]

    def difference(self, outcome: str, arm: str) -> Difference | None:
        """Of an arm; None where no seed has both."""
        return next((d for d in self.differences.get(outcome, []) if d.arm == arm), None)


def analyse(results: dict[str, Any]) -> Comparison:
    """Compare the finished runs of a study."""
    arms = {name: Arm(name) for name in results["arms"]}
    for run in results["runs"]:
        if run["arm"] in arms:
            arms[run["arm"]].runs[run["seed"]] = run
    outcomes = _outcomes(results["runs"])
    for arm in arms.values():
        for outcome in outcomes:
            arm.values[outcome.name] = _values(arm, outcome.name)
    reference = arms[results["reference"]]
    found = {o.name: _differences(arms, reference, o.name) for o in outcomes}
    return Comparison(results, arms, outcomes, found, _unpaired(arms, reference))


def outcome_of(run: dict[str, Any], name: str) -> float:
    """An outcome of a run; nan where the run does not have it.

    ``final`` and ``final@k`` are the mean of the validations of the last quarter of the steps, of
    pass@1 and pass@k; ``best`` the highest one (of noisy numbers: too high, the more so the more
    there are); ``area`` the mean of pass@1 over all steps, by trapezoids; ``early`` the mean of the
    validations of the first third, the start left out. Others are means over the steps of the last
    quarter, lambda's over all steps.
    """
    validation = run.get("validation", {})
    kind, _, k = name.partition("@")
    if kind in _OF_CURVES:
        return _OF_CURVES[kind](_points(validation, f"pass@{k or 1}"))
    if name == "seconds_per_step":
        return _number(run.get(name))
    means = run.get("means", {}).get(name)
    if means is None:
        return math.nan
    return _number(means[0] if name.startswith("lambda/") else means[1])


def _number(value: Any) -> float:
    number = to_number(value)
    return math.nan if number is None else number


def _points(validation: dict[str, list], name: str) -> list[tuple[float, float]]:
    pairs = zip(validation.get("step", []), validation.get(name, []), strict=False)
    points = [(float(step), _number(value)) for step, value in pairs]
    return [(x, y) for x, y in points if math.isfinite(y)]


def _final(points: list[tuple[float, float]]) -> float:
    if not points:
        return math.nan
    last = points[-1][0]
    return statistics.mean([y for x, y in points if x > 0.75 * last or x == last])


def _best(points: list[tuple[float, float]]) -> float:
    return max((y for x, y in points if x > 0), default=math.nan)


def _area(points: list[tuple[float, float]]) -> float:
    if len(points) < 2:
        return math.nan
    pairs = itertools.pairwise(points)
    area = sum((x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in pairs)
    return area / (points[-1][0] - points[0][0])


def _early(points: list[tuple[float, float]]) -> float:
    early = [y for x, y in points if 0 < x <= points[-1][0] / 3]
    return statistics.mean(early) if early else math.nan


_OF_CURVES = {"final": _final, "best": _best, "area": _area, "early": _early}


def _outcomes(runs: list[dict[str, Any]]) -> list[Outcome]:
    """The outcomes that at least one finished run has."""
    names = {name for run in runs for name in run.get("validation", {}) if name.startswith("pass@")}
    ks = sorted({int(name[5:]) for name in names} - {1})[-1:]
    wanted = [Outcome("final", "final pass@1", True), Outcome("best", "best pass@1", True)]
    wanted += [Outcome("area", "mean pass@1", True), Outcome("early", "early pass@1", True)]
    for k in ks:
        wanted += [Outcome(f"final@{k}", f"final pass@{k}", True)]
        wanted += [Outcome(f"best@{k}", f"best pass@{k}", True)]
    wanted += [
        Outcome("entropy", "entropy"),
        Outcome("draft/acceptance_length", "acceptance length"),
        Outcome("agreement/mtp_1", "MTP agreement", True),
    ]
    depths = {n for run in runs for n in run.get("means", {}) if n.startswith("lambda/mtp_")}
    single = len(depths) == 1
    wanted += [Outcome(n, "lambda" if single else f"lambda {n[11:]}") for n in sorted(depths)]
    wanted += [Outcome("seconds_per_step", "seconds a step")]
    finished = [run for run in runs if run["finished"]]
    return [o for o in wanted if any(math.isfinite(outcome_of(r, o.name)) for r in finished)]


def _values(arm: Arm, outcome: str) -> dict[int, float]:
    found = {run["seed"]: outcome_of(run, outcome) for run in arm.finished()}
    return {seed: value for seed, value in found.items() if math.isfinite(value)}


def _differences(arms: dict[str, Arm], reference: Arm, outcome: str) -> list[Difference]:
    base = reference.values[outcome]
    by_arm = {}
    for arm in arms.values():
        own = arm.values[outcome]
        paired = {seed: own[seed] - base[seed] for seed in sorted(own) if seed in base}
        if arm is not reference and paired:
            by_arm[arm.name] = paired
    p_of_all = statistics.joint_sign_flip_p(by_arm) if by_arm else {}
    found = []
    for name, paired in by_arm.items():
        values = list(paired.values())
        interval, p = statistics.bootstrap_interval(values), statistics.sign_flip_p(values)
        found.append(Difference(name, paired, interval, p, p_of_all[name]))
    return sorted(found, key=lambda difference: -difference.mean)


def _unpaired(arms: dict[str, Arm], reference: Arm) -> list[str]:
    """Runs that did not see in their first step what the reference saw."""
    expected = {run["seed"]: run["first_rollouts"] for run in reference.finished()}
    return [
        f"{arm.name} seed {run['seed']}"
        for arm in arms.values()
        for run in arm.finished()
        if expected.get(run["seed"], run["first_rollouts"]) != run["first_rollouts"]
    ]
