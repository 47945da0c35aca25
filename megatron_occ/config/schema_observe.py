"""The configuration's sections ``log``, ``alerts`` and ``profile``. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_occ.config import limits
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
        maximum=limits.SECONDS,
    )
    wandb: WandbConfig = section(WandbConfig, "metrics to Weights & Biases")
    mlflow: MlflowConfig = section(MlflowConfig, "metrics to MLflow")


@dataclass
class AlertsConfig:
    entropy: float | None = option(
        0.1,
        "entropy of the last 5 RL steps, as a share of that of the first 10, below which a "
        "collapse is told (null: off)",
        above=0,
        below=1,
    )
    logprob_gap: float | None = option(
        0.05,
        "mean gap between the log-probs of rollout and training, in nats, above which it is told "
        "(null: off)",
        above=0,
        maximum=limits.FACTOR,
    )
    acceptance: float | None = option(
        0.7,
        "accepted share of first drafts in the last 5 RL steps with drafts, as a share of that in "
        "the first 10, below which it is told (null: off)",
        above=0,
        below=1,
    )
    length_burst: float | None = option(
        2.0,
        "mean response length of an RL step, as a multiple of that of the 20 before, above which "
        "it is told (null: off)",
        above=1,
        maximum=limits.FACTOR,
    )
    verifier_failures: float | None = option(
        0.1,
        "share of responses whose verifier failed or took too long, above which it is told "
        "(null: off)",
        above=0,
        below=1,
    )
    correction: float | None = option(
        0.1,
        "share of response tokens that rl.correction rejects, or whose weight is beyond its range, "
        "above which it is told (null: off)",
        above=0,
        below=1,
    )
    straggler: float | None = option(
        0.25,
        "share of an RL step by which the same rank is behind the median rank in a phase, three "
        "steps in a row, above which it is told (null: off)",
        above=0,
        below=1,
    )


@dataclass
class ProfileConfig:
    steps: list[int] = option(
        [],
        "first and last step of a trace by torch's profiler, e.g. [3, 5] ([]: none)",
        minimum=1,
        maximum=limits.STEPS,
    )
    phase: str = option("rl", "whose steps these are", choices=("pretrain", "rl"))
    ranks: list[int] = option(
        [0],
        "ranks that write a trace, to the folder profile in run_dir",
        minimum=0,
        maximum=limits.RANKS,
    )
