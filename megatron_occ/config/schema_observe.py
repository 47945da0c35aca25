"""The configuration's sections ``log``, ``alerts`` and ``profile``. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_occ.config.options import option, section


@dataclass
class WandbConfig:
    mode: str = option(
        "off",
        "Weights & Biases: no, a folder to upload later with wandb sync, or its server",
        choices=("off", "offline", "online"),
    )
    project: str = option("megatron-occ", "project of the run")
    entity: str | None = option(None, "team or user of the project (null: the account's default)")
    name: str | None = option(None, "name of the run (null: that of the run folder)")


@dataclass
class MlflowConfig:
    uri: str | None = option(
        None, "MLflow's tracking URI, e.g. sqlite:///mlflow.db or http://host:5000 (null: off)"
    )
    experiment: str = option("megatron-occ", "experiment of the run")
    name: str | None = option(None, "name of the run (null: that of the run folder)")


@dataclass
class LogConfig:
    tensorboard: bool = option(True, "write the metrics for TensorBoard too")
    patience: float = option(
        60.0,
        "seconds without an answer after which TensorBoard, W&B or MLflow is told to hang, and "
        "which its end may take",
        above=0,
    )
    wandb: WandbConfig = section(WandbConfig, "metrics to Weights & Biases")
    mlflow: MlflowConfig = section(MlflowConfig, "metrics to MLflow")
