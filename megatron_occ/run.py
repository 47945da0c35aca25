"""Runs: what the commands do once the configuration is checked.

A run folder holds ``config.yaml``, ``metrics.jsonl``, ``rollouts.jsonl``, TensorBoard files,
``checkpoints/{pretrain,rl}/step_NNNNNN`` and ``report.html``.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_occ.config import check_resumed, load_config, pretrains_first, save_config
from megatron_occ.config.identity import describe
from megatron_occ.config.pipeline import what_parts_drafts
from megatron_occ.config.schema import Config
from megatron_occ.config.sizes import derive
from megatron_occ.convert.importing import import_folder
from megatron_occ.convert.plan import plan_import
from megatron_occ.convert.settings import choice_for
from megatron_occ.convert.source import Source
from megatron_occ.data.prompts import PromptStream
from megatron_occ.data.tasks import Task
from megatron_occ.data.tokenizers import Tokenizer
from megatron_occ.engines import build_engine
from megatron_occ.inputs import (
    PRETRAINING_PART,
    RL_PART,
    Inputs,
    check_lengths,
    prompt_room,
    read_inputs,
    read_task,
    read_tokenizer,
    register_verifiers,
)
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint import (
    DamagedCheckpointError,
    check_weights,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from megatron_occ.mcore.main_rank import MainRank
from megatron_occ.mcore.startup import Layout, barrier, initialize
from megatron_occ.mcore.versions import installed_version
from megatron_occ.observe import MetricsLogger, RolloutLog, print_summary, write_report
from megatron_occ.pretraining import PretrainTrainer
from megatron_occ.rl.calibration import regime_from
from megatron_occ.rl.evaluation import Validation, evaluate
from megatron_occ.rl.head_update import build_updater
from megatron_occ.rl.rewards import VerifierPool
from megatron_occ.rl.rollouts import RolloutSource
from megatron_occ.rl.sampler import Sampler
from megatron_occ.rl.trainer import GRPOTrainer
from megatron_occ.rollout import RolloutEngine, SamplingSettings

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

    def read_inputs(self, command: str) -> Inputs:
        """Read and check what a command needs, before the run folder is touched.

        Raises:
            ValueError: bad data (see ``inputs.read_inputs`` and ``inputs.check_lengths``), or
                ``rl.init_from`` does not fit.
        """
        config, trains = self.config, command in ("rl", "demo")
        start = config.rl.init_from if trains else None
        pretrains = command == "pretrain" or (trains and pretrains_first(config))
        if start is not None:
            check_weights(Path(start), self.describe({}))
        elif config.model.from_hf is not None and command != "eval":
            self._check_folder(Path(config.model.from_hf))
        inputs = read_inputs(
            config,
            self.task,
            self.tokenizer,
            pretrains=pretrains and config.pretrain.steps > 0 and not self.is_in_rl,
            trains=trains,
            evaluates=command == "eval",
        )
        # by one rank: a long file takes a while, and several cores
        MainRank().run(lambda: check_lengths(config, inputs, self.tokenizer))
        return inputs

    def _check_folder(self, folder: Path) -> None:
        """Account for every tensor of ``model.from_hf``; called by all ranks."""

        def check() -> None:
            plan_import(Source(folder), choice_for(folder, self.config.mtp.num_layers), None)

        MainRank().run(check)

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
        self.metrics = MetricsLogger(self.folder, is_main=is_main)
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


class _Phase:
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


def pretrain(run: Run, inputs: Inputs) -> Path | None:
    """Pretrain to the end; returns the final checkpoint, None where there is nothing to do."""
    config = run.config
    if inputs.corpus is None:
        return run.latest("pretrain")
    meta = run.describe({"corpus": inputs.fingerprint})
    actor = MegatronGPTActor(
        config,
        run.tokenizer.vocab_size,
        run.layout,
        optimizer=config.pretrain.optimizer,
        total_updates=derive(config, run.layout.world_size).pretrain_updates,
    )
    if config.model.from_hf is not None and run.latest("pretrain") is None:
        load_weights(converted(run), actor, meta)
    phase = _Phase(run, "pretrain", actor, meta)
    with _validation(run, actor, inputs.held_out, PRETRAINING_PART) as validate:
        trainer = PretrainTrainer(
            config, actor, inputs.corpus, validate=validate, logger=run.metrics, save=phase.save
        )
        phase.attach(trainer)
        trainer.fit()
    return run.latest("pretrain")


def first_weights(run: Run, inputs: Inputs) -> Path | None:
    """Checkpoint that RL starts from, which may have to be trained or converted first."""
    config = run.config
    if config.rl.init_from is not None:
        return Path(config.rl.init_from)
    if config.model.from_hf is not None:
        return converted(run)
    return pretrain(run, inputs)


def converted(run: Run) -> Path:
    """Checkpoint of the weights in ``model.from_hf``, in the run's folder; called by all ranks.

    Raises:
        ValueError: the folder can't be converted.
    """
    config, target = run.config, run.folder / "from_hf"
    assert config.model.from_hf is not None, "there is nothing to convert"
    folder = Path(config.model.from_hf)

    def convert() -> None:
        if not target.exists():
            mtp = choice_for(folder, config.mtp.num_layers)
            import_folder(folder, target, mtp=mtp, megatron_core=installed_version())

    MainRank().run(convert)
    return target


def reinforce(run: Run, inputs: Inputs, start: Path | None) -> None:
    """Run RL to the end from the weights in ``start`` (None: random)."""
    config, rl = run.config, run.config.rl
    train, held_out = inputs.train, inputs.held_out
    assert train is not None, "inputs of another command"
    assert held_out is not None, "inputs of another command"
    meta = run.describe({"prompts": train.fingerprint()})
    regime = regime_from(config.mtp)
    # Megatron's modules refer to each other in circles: two models must not stay in memory
    gc.collect()
    actor = MegatronGPTActor(
        config,
        run.tokenizer.vocab_size,
        run.layout,
        optimizer=rl.optimizer,
        total_updates=derive(config, run.layout.world_size).rl_updates,
        train_head=regime.trains_head,
        train_trunk=rl.train_trunk,
    )
    if start is not None:
        load_weights(start, actor, meta)
    if rl.loss.kl_coefficient > 0:
        actor.keep_reference()
    rollout_log = RolloutLog(run.folder, is_main=run.layout.is_main)
    with (
        VerifierPool(timeout_seconds=config.data.verifier_timeout) as verifiers,
        closing(build_engine(config, actor, run.tokenizer, train)) as engine,
    ):
        sampler = _sampler(run, actor, verifiers, engine)
        phase = _Phase(run, "rl", actor, meta)
        trainer = GRPOTrainer(
            config,
            build_updater(config, actor),
            RolloutSource(sampler, train, rl, config.seed, keep_states=regime.head_on_rollouts),
            validate=lambda: evaluate(sampler, held_out, rl.validation, config.seed, part=RL_PART),
            logger=run.metrics,
            rollout_log=rollout_log,
            save=phase.save,
        )
        phase.attach(trainer)
        if trainer.step == 0:
            for warning in inputs.warnings:
                run.metrics.event(0, warning)
        if run.resume:
            rollout_log.truncate_after(trainer.step)
        _say_what_is_not_drafted(run, trainer.step)
        trainer.fit()
    rollout_log.close()


def _say_what_is_not_drafted(run: Run, step: int) -> None:
    """``auto`` is the default, so that a layout without drafts is no error."""
    rollout = run.config.rl.rollout
    reason = what_parts_drafts(run.config)
    if rollout.engine == "megatron" and rollout.speculative.mode == "auto" and reason:
        run.metrics.event(step, f"rollouts draft nothing: {reason}")


def evaluate_checkpoint(run: Run, inputs: Inputs, checkpoint: Path) -> dict[str, float]:
    """Validation metrics of a checkpoint's weights."""
    config, meta = run.config, run.describe({})
    check_weights(checkpoint, meta)
    actor = MegatronGPTActor(
        config, run.tokenizer.vocab_size, run.layout, optimizer=config.rl.optimizer, total_updates=1
    )
    load_weights(checkpoint, actor, meta)
    with _validation(run, actor, inputs.held_out, RL_PART) as validate:
        metrics, events = validate()
    for event in events:
        logger.warning(event)
    return metrics


@contextmanager
def _validation(
    run: Run, actor: MegatronGPTActor, held_out: PromptStream | None, part: int
) -> Iterator[Callable[[], Validation]]:
    """A function that measures the actor on a part of the held-out problems."""
    config = run.config
    samplers: list[Sampler] = []
    with (
        VerifierPool(timeout_seconds=config.data.verifier_timeout) as verifiers,
        ExitStack() as engines,
    ):

        def validate() -> Validation:
            assert held_out is not None, "nothing is measured without held-out problems"
            # with the first measurement, if there is any: servers may be waited for
            if not samplers:
                engine = build_engine(config, actor, run.tokenizer, held_out)
                engines.enter_context(closing(engine))
                samplers.append(_sampler(run, actor, verifiers, engine))
            return evaluate(samplers[0], held_out, config.rl.validation, config.seed, part=part)

        yield validate


def _sampler(
    run: Run, actor: MegatronGPTActor, verifiers: VerifierPool, engine: RolloutEngine
) -> Sampler:
    rollout = run.config.rl.rollout
    stop = [run.tokenizer.eos_id]
    if run.task is not None:
        stop += run.tokenizer.encode(run.task.stop)
    sampling = SamplingSettings(
        temperature=rollout.temperature,
        max_response_length=rollout.max_response_length,
        stop_ids=tuple(stop),
        stop_strings=tuple(rollout.stop),
        top_p=rollout.top_p,
        top_k=rollout.top_k,
    )
    room = prompt_room(run.config)
    return Sampler(engine, actor, run.tokenizer, verifiers, sampling, max_prompt_length=room)
