"""The run folder: what it holds, how it is opened and resumed, and the checkpoints of its phases.

A run folder holds ``config.yaml``, ``metrics.jsonl``, ``rollouts.jsonl``, TensorBoard files,
``checkpoints/{pretrain,rl}/step_NNNNNN`` and ``report.html``.
"""

from __future__ import annotations

import dataclasses
import logging
from contextlib import ExitStack
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
from megatron_occ.mcore.checkpoint import load_checkpoint
from megatron_occ.mcore.checkpoint_folder import Keep, damage, list_checkpoints, set_aside
from megatron_occ.mcore.checkpoint_writer import CheckpointWriter
from megatron_occ.mcore.cpu.threads import Threads, choose_threads
from megatron_occ.mcore.startup import Layout, barrier, from_main_rank, initialize, places_of_ranks
from megatron_occ.observe import MetricsLogger, print_summary, write_report
from megatron_occ.observe.alerts import Alerts
from megatron_occ.observe.jsonl import read_records, to_number
from megatron_occ.observe.metrics import METRICS_FILE
from megatron_occ.observe.outlets import open_outlets
from megatron_occ.rl.non_finite import NonFiniteError, SkippedUpdates
from megatron_occ.rl.pretraining import PASS_RATE, PretrainTrainer
from megatron_occ.rl.rewards import register_verifiers
from megatron_occ.rl.stopping import StopRequested, StopSignal
from megatron_occ.rl.supervision import Supervision
from megatron_occ.rl.trainer import GRPOTrainer
from megatron_occ.rl.watchdog import Watchdog

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """One run folder and what all its phases share."""

    config: Config
    resume: bool = False
    stop: StopSignal = field(default_factory=StopSignal)
    layout: Layout = field(init=False)
    task: Task | None = field(init=False)
    tokenizer: Tokenizer = field(init=False)
    metrics: MetricsLogger = field(init=False)
    threads: Threads = field(init=False)
    watchdog: Watchdog = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        register_verifiers(config.data.verifiers)
        self.layout = initialize(config)
        self.threads = choose_threads(config, world_size=self.layout.world_size)
        limits = dataclasses.asdict(config.phase_limits)
        rank, size = self.layout.rank, self.layout.world_size
        self.watchdog = Watchdog(places_of_ranks(), rank, size, limits)
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
    """Checkpoints of one phase of a run; what is being written at the end of the block is finished.

    Args:
        run: of the phase.
        name: ``pretrain`` or ``rl``.
        actor: model and optimizer.
        meta: what its checkpoints have to agree with.
    """

    def __init__(self, run: Run, name: str, actor: MegatronGPTActor, meta: dict[str, Any]) -> None:
        self.run, self.name, self.actor, self.meta = run, name, actor, meta
        self.trainer: PretrainTrainer | GRPOTrainer | None = None
        self._opened = ExitStack()
        config = run.config
        self.writer = CheckpointWriter(
            run.checkpoints(name),
            actor,
            meta,
            keep=Keep(config.keep_checkpoints, config.keep_best, config.keep_every),
            background=config.save_in_background,
            scores=self._scores,
        )

    def __enter__(self) -> Phase:
        # until the last checkpoint is written: a signal may reach this rank later than others
        self._opened.enter_context(self.run.stop.noted())
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # after another error the other ranks may never come to finish it
        all_come = kind is None or issubclass(kind, (StopRequested, NonFiniteError))
        with self._opened:
            if all_come or self.run.layout.world_size == 1:
                self.finish()
            else:
                self.writer.abandon()

    def finish(self) -> None:
        """Wait for what is being written."""
        with self.run.watchdog.phase("save"):
            self.writer.finish()

    def attach(self, trainer: PretrainTrainer | GRPOTrainer) -> None:
        """Save this trainer's state from now on; restore it if the run resumes.

        A resumed run's log ends at the restored step afterwards: what comes is written once.

        Raises:
            ValueError: no checkpoint of the phase is whole, or they are of another run.
        """
        self.trainer = trainer
        if self.run.resume:
            self._restore(trainer)
        assert self.actor.has_weights, "built for a checkpoint, and none was loaded"

    def _restore(self, trainer: PretrainTrainer | GRPOTrainer) -> None:
        latest, broken = self._set_broken_aside()
        if latest is None:
            logger.info("no checkpoint of %s yet: it starts at step 0", self.name)
        else:
            trainer.load_state_dict(load_checkpoint(latest, self.actor, self.meta))
            logger.info("resumed from %s", latest)
        self.run.metrics.truncate_after(
            trainer.step if latest else None,
            self.name,
            validation_is_due=trainer.validation_is_due,
        )
        for text in broken:
            self.run.metrics.event(trainer.step, text, kind="resumed")

    def _set_broken_aside(self) -> tuple[Path | None, list[str]]:
        """The newest whole checkpoint, and what was wrong with newer ones, which are renamed."""
        wrong: dict[Path, str] = {}
        # one list for all ranks: a shared disk may show each of them another one
        listed = list_checkpoints(self.run.checkpoints(self.name))
        found = from_main_rank([path for _, path in listed])
        for path in reversed(found):
            if (text := damage(path)) is None:
                break
            wrong[path] = text
        told = [f"{path} is damaged ({text})" for path, text in wrong.items()]
        if found and len(wrong) == len(found):
            raise ValueError(
                f"{'; '.join(told)}: no whole checkpoint of {self.name} is left. Delete "
                f"{found[0].parent} to begin {self.name} anew"
            )
        if self.run.layout.is_main:
            for path in wrong:
                set_aside(path)
        barrier()
        whole = found[: len(found) - len(wrong)]
        broken = [f"{text} and was renamed to end in .broken" for text in told]
        return (whole[-1] if whole else None), broken

    def _scores(self) -> dict[int, float]:
        """Sampled pass@1 of validated steps."""
        phases = {"rl": "validation", "pretrain": "pretrain"}
        return {
            line["step"]: value
            for line in read_records(self.run.folder / METRICS_FILE)
            if line["phase"] == phases[self.name]
            and (value := to_number(line.get(PASS_RATE))) is not None
        }

    def supervision(self) -> Supervision:
        """What looks after the phase's trainer."""
        run = self.run
        limit, decode = run.config.max_skipped_updates, run.tokenizer.decode
        return Supervision(
            stop=run.stop,
            skips=SkippedUpdates(self.actor, run.layout, run.folder, limit, decode),
            watchdog=run.watchdog,
            before_step=self._before_step,
        )

    def _before_step(self) -> str | None:
        """Complete a checkpoint that is written by now; what is to be told of the threads."""
        self.writer.poll()
        return self.run.threads.follow()

    def save(self, step: int) -> None:
        """Write the checkpoint of a finished step, or begin to."""
        assert self.trainer is not None, "attach the trainer first"
        self.writer.save(step, self.trainer.state_dict())
