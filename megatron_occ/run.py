"""The run folder: what it holds, how it is opened and resumed, and the checkpoints of its phases.

A run folder holds ``config.yaml``, ``metrics.jsonl``, ``rollouts.jsonl``, TensorBoard files,
``checkpoints/{pretrain,rl}/step_NNNNNN`` and ``report.html``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_occ.config import check_resumed, load_config, save_config
from megatron_occ.config.identity import describe
from megatron_occ.config.load import flat_values
from megatron_occ.config.schema import Config
from megatron_occ.data.from_config import read_task, read_tokenizer
from megatron_occ.data.tasks import Task
from megatron_occ.data.tokenizers import Tokenizer
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint import (
    DamagedCheckpointError,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from megatron_occ.mcore.startup import Layout, barrier, initialize
from megatron_occ.observe import MetricsLogger, print_summary, write_report
from megatron_occ.observe.alerts import Alerts
from megatron_occ.observe.outlets import open_outlets
from megatron_occ.rl.pretraining import PretrainTrainer
from megatron_occ.rl.rewards import register_verifiers
from megatron_occ.rl.trainer import GRPOTrainer

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """One run folder and what all its phases share."""

    config: Config
    resume: bool = False
    layout: Layout = field(init=False)
    task: Task | None = field(init=False)
    tokenizer: Tokenizer = field(init=False)
    metrics: MetricsLogger = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        register_verifiers(config.data.verifiers)
        self.layout = initialize(config)
        self.task = read_task(config)
        self.tokenizer = read_tokenizer(config, self.task)
        self.folder = Path(config.run_dir)

    @property
    def is_in_rl(self) -> bool:
        """Whether a resumed run has left pretraining behind."""
        return self.resume and self.latest("rl") is not None

    def open_folder(self) -> None:
        """Create the run folder, or open it again to resume, and start the log.

        Raises:
            ValueError: the folder can't be made, or the run can't go on with this configuration.
        """
        is_main, saved = self.layout.is_main, self.folder / "config.yaml"
        changes, done = [], self._steps_done()
        if self.resume and saved.is_file():
            changes = check_resumed(load_config([saved], []), self.config, done=done)
        barrier()  # all ranks have read what the main one is about to write
        if is_main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"run_dir={self.folder}: can't be made: {error}") from error
            save_config(self.config, saved)
        settings = flat_values(self.config)
        outlets = open_outlets(self.config.log, self.folder, settings) if is_main else ()
        alerts = Alerts(self.config.alerts)
        self.metrics = MetricsLogger(self.folder, outlets=outlets, alerts=alerts, is_main=is_main)
        for change in changes:
            step = done["rl"] or done["pretrain"]
            self.metrics.event(step, f"resumed with {change}", kind="resumed")

    def _steps_done(self) -> dict[str, int]:
        """Step of the newest checkpoint of each phase, 0 without one."""
        found = {phase: list_checkpoints(self.checkpoints(phase)) for phase in ("pretrain", "rl")}
        return {phase: each[-1][0] if each else 0 for phase, each in found.items()}

    def checkpoints(self, phase: str) -> Path:
        """Folder of a phase's checkpoints."""
        return self.folder / "checkpoints" / phase

    def latest(self, phase: str) -> Path | None:
        """Newest complete checkpoint of a phase."""
        found = list_checkpoints(self.checkpoints(phase))
        return found[-1][1] if found else None

    def describe(self, data: dict[str, str]) -> dict[str, Any]:
        """What checkpoints of this run have to agree with."""
        return describe(self.config, self.tokenizer.state(), data)

    def finish(self, phase: str) -> None:
        """Close the log after a phase's last step, write the report, and say where it is."""
        self.metrics.finish(list_checkpoints(self.checkpoints(phase))[-1][0])
        if self.layout.is_main:
            write_report(self.folder)
            print_summary(self.folder)


class Phase:
    """Checkpoints of one phase of a run."""

    def __init__(self, run: Run, name: str, actor: MegatronGPTActor, meta: dict[str, Any]) -> None:
        self.run, self.name, self.actor, self.meta = run, name, actor, meta
        self.trainer: PretrainTrainer | GRPOTrainer | None = None

    def attach(self, trainer: PretrainTrainer | GRPOTrainer) -> None:
        """Save this trainer's state from now on; restore it if the run resumes.

        A resumed run's log ends at the restored step afterwards: what comes is written once.
        """
        self.trainer = trainer
        if not self.run.resume:
            return
        latest = self.run.latest(self.name)
        if latest is None:
            logger.info("no checkpoint of %s yet: it starts at step 0", self.name)
        else:
            trainer.load_state_dict(self._read(latest))
            logger.info("resumed from %s", latest)
        self.run.metrics.truncate_after(trainer.step if latest else None, self.name)

    def _read(self, latest: Path) -> dict[str, Any]:
        try:
            return load_checkpoint(latest, self.actor, self.meta)
        except DamagedCheckpointError as error:
            *_, before = (None, *list_checkpoints(self.run.checkpoints(self.name))[:-1])
            start = f"from {before[1].name}, the one before it" if before else "without it"
            raise ValueError(f"{error}. Delete the folder {latest} to go on {start}") from error

    def save(self, step: int) -> None:
        """Write the checkpoint of a finished step."""
        assert self.trainer is not None, "attach the trainer first"
        save_checkpoint(
            self.run.checkpoints(self.name),
            step,
            self.actor,
            trainer_state=self.trainer.state_dict(),
            meta=self.meta,
            keep=self.run.config.keep_checkpoints,
        )
