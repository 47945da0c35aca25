"""Where the numbers of a run go: `metrics.jsonl` always, TensorBoard and others on request, and
sampled responses to `rollouts.jsonl`."""

from __future__ import annotations

import atexit
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_occ.observe.alerts import Alerts
from megatron_occ.observe.jsonl import JsonlFile, read_records, to_number
from megatron_occ.observe.outlet import Outlet

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
LOCK_FILE = "writer.lock"  # held by the process that writes the run
PHASES = ("pretrain", "rl", "validation")
_RESERVED = frozenset({"phase", "step", "time"})


class MetricsLogger:
    """Writes the metrics of a run. On ranks other than the main one every method does nothing.

    One line of `metrics.jsonl` is `{"phase": ..., "step": ..., "time": <unix seconds>, **metrics}`.
    The same lines go to `outlets`, whose faults become events. `alerts` reads those of RL.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        outlets: Sequence[Outlet] = (),
        alerts: Alerts | None = None,
        is_main: bool = True,
    ) -> None:
        self._is_main = is_main
        self._file = JsonlFile(Path(run_dir) / METRICS_FILE)
        self._outlets, self._alerts = list(outlets), alerts
        self._step = 0
        if self._outlets:
            # also where the run ends by an exception
            atexit.register(self.close)

    def log(self, phase: str, step: int, metrics: dict[str, float]) -> None:
        """Append one line of metrics for `step` of `phase` ("pretrain", "rl" or "validation").

        Raises ValueError for an unknown phase or a metric named like one of the line's own fields.
        """
        if not self._is_main:
            return
        if phase not in PHASES:
            raise ValueError(f"unknown phase {phase!r}: use one of {', '.join(PHASES)}")
        if clash := _RESERVED & metrics.keys():
            raise ValueError(f"metric name {sorted(clash)} is taken by the log line: rename it")
        values = {name: float(value) for name, value in metrics.items()}
        now = time.time()
        self._step = int(step)
        self._file.append({"phase": phase, "step": int(step), "time": now, **values})
        for outlet in self._outlets:
            self._tell(outlet.put(phase, int(step), now, values))
        if phase == "rl" and self._alerts is not None:
            for message in self._alerts.check(values):
                self.event(step, message, kind="alert")

    def event(self, step: int, message: str, *, kind: str = "warning") -> None:
        """Record something a person should see, for example a lambda that is not finite.

        An event of kind "resumed" is about the run's history: no later resumption drops it.
        """
        if self._is_main:
            log.warning("step %d: %s", step, message)
            self._write_event(step, kind, message)

    def finish(self, step: int) -> None:
        """Record that the run reached its end, and close the files.

        Without this line the report calls the run stopped.
        """
        if self._is_main:
            self._close_outlets(finished=True)
            self._write_event(step, "finished", "run finished")
            self.close()

    def truncate_after(
        self, step: int | None, phase: str = "rl", *, validation_is_due: bool = False
    ) -> int:
        """Drop the lines written after the checkpoint of `step`; return how many were dropped.

        None stands for no checkpoint: the phase begins anew, and all its lines go, those of a
        validation at step 0 too.

        Call it on resume: the steps after the checkpoint run again, and their lines must not be
        doubled. `phase` says which counter `step` belongs to: "rl" covers "validation" too, and a
        run folder that holds both keeps the lines of the other one. Adds an event that tells the
        report where the run was interrupted. Where `validation_is_due`, the validation of `step`
        itself is made again: its line goes too, which in pretraining is that of the step.

        Raises ValueError for a phase other than "pretrain" and "rl".
        """
        if phase not in ("pretrain", "rl"):
            raise ValueError(f"phase {phase!r} has no step counter of its own: 'pretrain' or 'rl'")
        if not self._is_main:
            return 0
        kept = _KeepUpTo(step, phase, validation_is_due=validation_is_due)
        dropped = self._file.filter(kept)
        if self._alerts is not None:
            self._alerts.replay(_rl_steps(self._file.path))
        if step is not None:
            self._write_event(step, "resumed", f"resumed from the checkpoint of step {step}")
        elif dropped:
            self._write_event(0, "resumed", f"{phase} began anew: it had no checkpoint yet")
        return dropped

    def close(self) -> None:
        """Flush and close the files, and end the outlets, as those of an interrupted run."""
        self._close_outlets(finished=False)
        self._file.close()

    def _close_outlets(self, *, finished: bool) -> None:
        atexit.unregister(self.close)
        outlets, self._outlets = self._outlets, []
        for outlet in outlets:
            outlet.begin_end(finished=finished)
        for outlet in outlets:
            self._tell(outlet.close())

    def _tell(self, complaint: str) -> None:
        if complaint:
            self.event(self._step, complaint, kind="sink")

    def _write_event(self, step: int, kind: str, message: str) -> None:
        line = {"phase": "event", "step": int(step), "time": time.time()}
        self._file.append({**line, "kind": kind, "message": message})


class RolloutLog:
    """Writes sampled responses to `rollouts.jsonl`, one line each: `{"step": ..., **sample}`.

    A sample holds `prompt`, `response`, `answer`, `reward`, `advantage`, `finish_reason`, and
    whatever else is worth reading. On ranks other than the main one every method does nothing.
    """

    def __init__(self, run_dir: str | Path, *, is_main: bool = True) -> None:
        self._is_main = is_main
        self._file = JsonlFile(Path(run_dir) / ROLLOUTS_FILE)

    def write(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Append the samples of `step`. Raises TypeError for a value that JSON cannot hold."""
        if self._is_main:
            for sample in samples:
                self._file.append({"step": int(step), **sample})

    def truncate_after(self, step: int) -> int:
        """Drop the samples of steps later than `step`; return how many were dropped."""
        if not self._is_main:
            return 0
        return self._file.filter(lambda record: record.get("step", 0) <= step)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _KeepUpTo:
    """Decides, line by line in file order, what stays when a phase resumes at `step`.

    Pretraining and RL count their steps separately, and an event only has a step: it belongs to
    whichever of the two wrote the line before it.
    """

    def __init__(self, step: int | None, phase: str, *, validation_is_due: bool) -> None:
        self._step = -1 if step is None else step
        self._phase = phase
        self._owner = phase
        measured = "validation" if phase == "rl" else "pretrain"
        self._again = measured if validation_is_due else None

    def __call__(self, record: dict[str, Any]) -> bool:
        if record.get("phase") in PHASES:
            self._owner = "pretrain" if record["phase"] == "pretrain" else "rl"
        if record.get("kind") == "resumed":
            return True
        end = self._step - (record.get("phase") == self._again)
        return self._owner != self._phase or record.get("step", 0) <= end


def _rl_steps(path: Path) -> Iterator[dict[str, float]]:
    """Metrics of the RL steps in a log."""
    for record in read_records(path):
        if record.get("phase") == "rl":
            values = {name: to_number(value) for name, value in record.items()}
            yield {name: value for name, value in values.items() if value is not None}
