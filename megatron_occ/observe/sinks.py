"""TensorBoard, Weights & Biases and MLflow: where the lines of `metrics.jsonl` go as well.

Each sink lives in a process of its own (`sink_process.py`), which alone imports the package.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

# MLflow takes letters, digits and these in a metric's name, and 100 parameters in one request
_MLFLOW_FOREIGN = re.compile(r"[^\w\-./ ]")
_MLFLOW_PARAMETERS = 100
_MLFLOW_LONGEST = 500


class Sink(Protocol):
    """What a sink's process calls; any of it may raise or take its time."""

    def open(self) -> None:
        """Connect, and continue the run folder's earlier run if there is one."""

    def write(self, phase: str, step: int, now: float, values: Mapping[str, float]) -> None:
        """Take one line of metrics; `now` is in seconds since 1970."""

    def close(self, *, finished: bool) -> None:
        """Hand over what is left; `finished` tells a run at its end from an interrupted one."""


class TensorBoardSink:
    """Event files in `<run_dir>/tensorboard`, with tags `phase/name`."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._writer: Any = None

    def open(self) -> None:
        from tensorboard.summary import Writer

        self._writer = Writer(self._folder)

    def write(self, phase: str, step: int, now: float, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(tag(phase, name), value, step, wall_time=now)

    def close(self, *, finished: bool) -> None:
        self._writer.close()


class WandbSink:
    """A run of Weights & Biases, whose id lies in `state` so that a resumed run continues it.

    Steps are the metrics `<phase>/step`: W&B's own step may never go back, and steps after a
    checkpoint are logged again by a resumed run.
    """

    def __init__(self, folder: str, state: str, settings: dict[str, Any], **options: Any) -> None:
        self._folder, self._state = folder, Path(state)
        self._settings, self._options = settings, options
        self._run: Any = None

    def open(self) -> None:
        import wandb

        self._run = wandb.init(
            id=_kept(self._state, "id") or _keep(self._state, id=uuid.uuid4().hex[:8])["id"],
            resume="allow",
            dir=self._folder,
            config=self._settings,
            settings=wandb.Settings(console="off", save_code=False, disable_git=True),
            **self._options,
        )
        for phase in ("pretrain", "rl", "validation"):
            self._run.define_metric(f"{phase}/step", hidden=True)
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")

    def write(self, phase: str, step: int, now: float, values: Mapping[str, float]) -> None:
        tagged = {tag(phase, name): value for name, value in values.items()}
        self._run.log({**tagged, f"{phase}/step": step})

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class MlflowSink:
    """A run of MLflow, whose id lies in `state`; `pass@1` is called `pass_at_1` there."""

    def __init__(
        self, uri: str, experiment: str, name: str, state: str, settings: dict[str, Any]
    ) -> None:
        self._uri, self._experiment, self._name = uri, experiment, name
        self._state, self._settings = Path(state), settings
        self._client: Any = None
        self._id = ""

    def open(self) -> None:
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=self._uri)
        self._id = _kept(self._state, self._uri)
        if self._id:
            client.update_run(self._id, status="RUNNING")
        else:
            found = client.get_experiment_by_name(self._experiment)
            place = found.experiment_id if found else client.create_experiment(self._experiment)
            self._id = client.create_run(place, run_name=self._name).info.run_id
            _keep(self._state, **{self._uri: self._id})
            self._describe(client)
        self._client = client

    def _describe(self, client: Any) -> None:
        from mlflow.entities import Param

        values = [Param(key, str(v)[:_MLFLOW_LONGEST]) for key, v in self._settings.items()]
        for start in range(0, len(values), _MLFLOW_PARAMETERS):
            client.log_batch(self._id, params=values[start : start + _MLFLOW_PARAMETERS])

    def write(self, phase: str, step: int, now: float, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(mlflow_name(tag(phase, name)), value, round(1000 * now), step)
            for name, value in values.items()
        ]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self._id, status="FINISHED" if finished else "KILLED")


def tag(phase: str, name: str) -> str:
    """`phase/name`, once."""
    return name if name.startswith(f"{phase}/") else f"{phase}/{name}"


def mlflow_name(name: str) -> str:
    """A metric's name with the characters that MLflow takes."""
    return _MLFLOW_FOREIGN.sub("_", name.replace("@", "_at_"))


def _kept(path: Path, name: str) -> str:
    """What an earlier start wrote under a name; "" if there is nothing to read."""
    try:
        return str(json.loads(path.read_text("utf-8")).get(name, ""))
    except (OSError, ValueError, AttributeError):
        return ""


def _keep(path: Path, **values: str) -> dict[str, str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values) + "\n", "utf-8")
    return values
