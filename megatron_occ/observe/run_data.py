"""Reads back what a run wrote: the input of the report and of the summary."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_occ.observe.jsonl import read_records, to_number
from megatron_occ.observe.metrics import METRICS_FILE, ROLLOUTS_FILE
from megatron_occ.observe.plot_scale import Point
from megatron_occ.observe.text import format_percent

CONFIG_FILE = "config.yaml"
_SUB_RUNS = ("pretrain", "rl")
_TRAINING = ("pretrain", "rl")
# values that a level is the mean of, and no more than half of all
_LEVEL_VALUES = 10
# what a step needs without saving and validation, which the clock counts to the step after them
_STEP_TIMES = ("time/rollout", "time/reward", "time/logprobs", "time/train")


@dataclass(frozen=True)
class Level:
    """Mean of the first and of the last ``count`` values that were logged."""

    first: float
    last: float
    count: int

    @property
    def basis(self) -> str:
        """What the two numbers are."""
        if self.count == 1:
            return "first and last value logged"
        return f"mean of the first and last {self.count} values logged"


@dataclass
class RunData:
    """Everything a run logged. `series[phase][name]` maps a step to the value logged for it."""

    name: str
    series: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    configs: list[tuple[str, str]] = field(default_factory=list)
    rl_config: str = ""  # of the part that holds the RL log, else of a part before it
    started: float | None = None
    wall_seconds: float = 0.0
    finished: bool = False

    def points(self, phase: str, name: str) -> list[Point]:
        """Return the (step, value) points of a metric in order of steps; [] if it is missing."""
        values = self.series.get(phase, {}).get(name, {})
        return [(float(step), values[step]) for step in sorted(values)]

    def names(self, phase: str) -> list[str]:
        """Return the names of all metrics of a phase, sorted."""
        return sorted(self.series.get(phase, {}))

    def last_step(self, phase: str) -> int | None:
        """Return the last step logged for a phase, or None."""
        steps = [step for values in self.series.get(phase, {}).values() for step in values]
        return max(steps, default=None)

    def depths(self, phase: str, prefix: str) -> list[int]:
        """Return the depths k for which the metric `<prefix><k>` exists, in order."""
        tails = [n.removeprefix(prefix) for n in self.names(phase) if n.startswith(prefix)]
        return sorted(int(tail) for tail in tails if tail.isdecimal())

    @property
    def accuracy_metric(self) -> str | None:
        """The validation metric that holds sampled pass@1: `pass@1`, else `avg@k`, largest k."""
        return "pass@1" if "pass@1" in self.series.get("validation", {}) else self._average

    @property
    def score_metric(self) -> str | None:
        """The `avg@k` of a verifier with partial credit; None where it says the same as pass@1."""
        name = self._average
        if name is None or self.accuracy_metric == name:
            return None
        scores, rates = (self.points("validation", n) for n in (name, "pass@1"))
        # the mean of the same zeros and ones, but for the order in which it was added up
        same = len(scores) == len(rates) and all(
            math.isclose(score, rate, abs_tol=1e-6)
            for (_, score), (_, rate) in zip(scores, rates, strict=True)
        )
        return None if same else name

    @property
    def validation_sets(self) -> list[str]:
        """Names of the sets that validation was on; none where there is one without a name."""
        end = "/problems"
        return [n.removesuffix(end) for n in self.names("validation") if n.endswith(end)]

    @property
    def _average(self) -> str | None:
        names = self.series.get("validation", {})
        averages = [n for n in names if n.startswith("avg@") and n[4:].isdecimal()]
        return max(averages, key=lambda n: int(n[4:]), default=None)

    @property
    def status(self) -> str:
        """ "finished", or where the log ends."""
        if self.finished:
            return "finished"
        step = self.last_step("rl")
        if step is not None:
            return f"not finished: the log ends at RL step {step}"
        return f"not finished: the log ends at pretraining step {self.last_step('pretrain') or 0}"

    def level(self, phase: str, name: str) -> Level | None:
        """Return where a metric began and ended, or None if it has no finite value."""
        values = [y for _, y in self.points(phase, name) if math.isfinite(y)]
        if not values:
            return None
        count = min(_LEVEL_VALUES, -(-len(values) // 2))
        return Level(sum(values[:count]) / count, sum(values[-count:]) / count, count)


def load_run(run_dir: str | Path, parts: Sequence[str | Path] | None = None) -> RunData:
    """Read a run folder. `parts` are the folders that hold its logs, in order.

    By default the parts are the folder itself and its sub-folders `pretrain` and `rl`, as far as
    they hold metrics.

    Raises FileNotFoundError for a folder that does not exist, and ValueError if none of the parts
    holds any metrics.
    """
    run_dir = Path(run_dir)
    folders = [Path(part) for part in parts] if parts else _default_parts(run_dir)
    for folder in (run_dir, *folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"no run folder {folder}: check the path")
    run = RunData(name=run_dir.resolve().name)
    finished = []
    for folder in folders:
        records = list(read_records(folder / METRICS_FILE))
        _add_records(run, records)
        if records:
            finished.append(_is_finished(records))
        samples = read_records(folder / ROLLOUTS_FILE)
        run.samples.extend(s for s in samples if isinstance(s.get("step"), int))
        config = _add_config(run, folder)
        if not run.rl_config or any(record.get("phase") == "rl" for record in records):
            run.rl_config = config or run.rl_config
    if not run.series:
        places = ", ".join(str(folder / METRICS_FILE) for folder in folders)
        raise ValueError(f"no metrics in {places}: is {run_dir} the folder of a run?")
    run.finished = all(finished)
    return run


def _default_parts(run_dir: Path) -> list[Path]:
    subs = [run_dir / name for name in _SUB_RUNS]
    return [run_dir] + [sub for sub in subs if (sub / METRICS_FILE).is_file()]


def _add_config(run: RunData, folder: Path) -> str:
    path = folder / CONFIG_FILE
    if not path.is_file():
        return ""
    text = path.read_text("utf-8", errors="replace")
    run.configs.append((f"{folder.name}/{CONFIG_FILE}", text))
    return text


def _add_records(run: RunData, records: list[dict[str, Any]]) -> None:
    previous: float | None = None
    for record in records:
        phase, step, now = record.get("phase"), record.get("step"), to_number(record.get("time"))
        if not isinstance(phase, str) or not isinstance(step, int):
            continue
        if phase == "event":
            run.events.append(record)
        else:
            _add_metrics(run.series.setdefault(phase, {}), step, record)
        if now is None:
            continue
        # The time between a kill and the resumption is not time of the run.
        if previous is not None and record.get("kind") != "resumed":
            run.wall_seconds += max(0.0, now - previous)
        run.started = now if run.started is None else min(run.started, now)
        previous = now


def _add_metrics(target: dict[str, dict[int, float]], step: int, record: dict[str, Any]) -> None:
    for name, value in record.items():
        number = to_number(value)
        if number is not None and name not in ("step", "time"):
            target.setdefault(name, {})[step] = number


def _is_finished(records: list[dict[str, Any]]) -> bool:
    """Whether a "finished" event comes after everything else that training wrote."""
    kinds = [r.get("kind") for r in records if r.get("phase") in _TRAINING or r.get("kind")]
    return bool(kinds) and kinds[-1] == "finished"


def started_text(run: RunData) -> str:
    """Return the time of the first log line, in UTC."""
    if run.started is None:
        return "unknown"
    return time.strftime("%d %B %Y, %H:%M UTC", time.gmtime(run.started)).lstrip("0")


def accuracy_change(run: RunData) -> tuple[float, float] | None:
    """Return sampled pass@1 of the first and of the last validation, or None."""
    if run.accuracy_metric is None:
        return None
    points = run.points("validation", run.accuracy_metric)
    return points[0][1], points[-1][1]


def acceptance_lengths(run: RunData) -> list[Point]:
    """Return tokens a trunk pass on the validation problems, by RL step; [] without drafts.

    Only where every pass had a draft: other lengths say how often drafts were tried as well.
    """
    proposed = [share for _, share in run.points("validation", "draft/proposed_1")]
    lengths = run.points("validation", "draft/acceptance_length")
    # rounding of a share that is 1
    is_whole = len(proposed) == len(lengths) and all(share > 1 - 1e-9 for share in proposed)
    return lengths if is_whole else []


def accuracy_basis(run: RunData) -> str:
    """Say what pass@1 was measured on and how far chance alone can move the difference.

    The standard error of the difference of two means over n problems is at most
    sqrt((p(1-p) + q(1-q)) / n): the same problems in both only make it smaller. Shares are taken
    with one success and one failure more than there were, so that 0 of 8 is not taken for certain.
    Of the mean over S sets it is the root of the sum of squares, divided by S.
    """
    name = run.accuracy_metric or ""
    parts = [name] if name.startswith("avg@") else []
    prefixes = [f"{each}/" for each in run.validation_sets] or [""]
    counts = [run.points("validation", f"{prefix}problems") for prefix in prefixes]
    curves = [run.points("validation", f"{prefix}{name}") for prefix in prefixes]
    if not all(count and count[-1][1] >= 1 for count in counts) or not all(curves):
        return ", ".join(parts)
    sizes = [count[-1][1] for count in counts]
    ends = [(curve[0][1], curve[-1][1]) for curve in curves]
    squares = sum(_spread(size, change) for size, change in zip(sizes, ends, strict=True))
    of_sets = f" of {len(sizes)} sets" if len(sizes) > 1 else ""
    error = math.sqrt(squares) / len(sizes)
    parts += [
        f"{sum(sizes):g} problems{of_sets}",
        f"standard error ≤ {format_percent(error)[:-1]} points",
    ]
    return ", ".join(parts)


def _spread(count: float, change: tuple[float, float]) -> float:
    """Bound of the squared standard error of a set's difference."""
    shares = [(p * count + 1) / (count + 2) for p in change]
    return max(0.0, sum(p * (1 - p) for p in shares)) / count


def samples_per_second(run: RunData) -> float | None:
    """Return the median over steps of generated responses per second of rollout, or None."""
    lengths = dict(run.points("rl", "rollout/length_mean"))
    speeds = run.points("rl", "rollout/tokens_per_second")
    rates = sorted(
        speed / lengths[step] for step, speed in speeds if lengths.get(step, 0) > 0 and speed > 0
    )
    return rates[len(rates) // 2] if rates else None


def seconds_per_step(run: RunData) -> float:
    """Median over RL steps, nan without any.

    A step during which the machine did something else says nothing.
    """
    phases = [dict(run.points("rl", name)) for name in _STEP_TIMES]
    steps = {step for phase in phases for step in phase}
    sums = [sum(phase.get(step, 0.0) for phase in phases) for step in steps]
    return statistics.median(sums) if sums else math.nan
