"""Which sinks a configuration asks for, and whether their packages are there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_occ.config.schema_observe import LogConfig
from megatron_occ.observe.outlet import Outlet

TENSORBOARD_FOLDER = "tensorboard"
# what each sink's process prints, and the ids of runs that a resumed run continues
SINKS_FOLDER = "sinks"


def is_installed(package: str) -> bool:
    """Whether a package can be imported; a folder of its name, as W&B leaves behind, is none."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


def missing_packages(
    log: LogConfig, is_installed: Callable[[str], bool] = is_installed
) -> list[str]:
    """Sinks that are asked for and not installed, a sentence each with the remedy."""
    wanted = []
    if log.tensorboard:
        wanted.append(("tensorboard", "log.tensorboard=true", "log.tensorboard=false"))
    if log.wandb.mode != "off":
        wanted.append(("wandb", f"log.wandb.mode={log.wandb.mode}", "log.wandb.mode=off"))
    if log.mlflow.uri is not None:
        wanted.append(("mlflow", f"log.mlflow.uri={log.mlflow.uri}", "log.mlflow.uri=null"))
    return [
        f"{given}: the package {package} is not installed. Install it with `pip install "
        f"{package}`, or give {off}"
        for package, given, off in wanted
        if not is_installed(package)
    ]


def open_outlets(log: LogConfig, folder: Path, settings: Mapping[str, Any]) -> list[Outlet]:
    """Start the process of each sink that is asked for.

    Args:
        log: which ones.
        folder: of the run.
        settings: the resolved configuration by dotted key, which W&B and MLflow show.
    """
    state, name = folder / SINKS_FOLDER, folder.resolve().name
    wanted: list[tuple[str, str, dict[str, Any]]] = []
    if log.tensorboard:
        options = {"folder": str(folder / TENSORBOARD_FOLDER)}
        wanted.append(("tensorboard", "TensorBoardSink", options))
    if log.wandb.mode != "off":
        options = {
            "folder": str(folder),
            "state": str(state / "wandb.json"),
            "settings": dict(settings),
            "mode": log.wandb.mode,
            "project": log.wandb.project,
            "entity": log.wandb.entity,
            "name": log.wandb.name or name,
        }
        wanted.append(("wandb", "WandbSink", options))
    if log.mlflow.uri is not None:
        options = {
            "uri": log.mlflow.uri,
            "experiment": log.mlflow.experiment,
            "name": log.mlflow.name or name,
            "state": str(state / "mlflow.json"),
            "settings": dict(settings),
        }
        wanted.append(("mlflow", "MlflowSink", options))
    return [
        Outlet(
            title,
            f"megatron_occ.observe.sinks:{sink}",
            options,
            log=state / f"{title}.log",
            patience=log.patience,
        )
        for title, sink, options in wanted
    ]
