"""Runs: what the commands do once the configuration is checked.

A run folder holds ``config.yaml``, ``metrics.jsonl``, ``rollouts.jsonl``, TensorBoard files,
``checkpoints/{pretrain,rl}/step_NNNNNN`` and ``report.html``.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_occ.config import check_resumed, load_config, save_config
from megatron_occ.config.schema import Config
from megatron_occ.config.sizes import derive
from megatron_occ.data.corpus import TaskCorpus
from megatron_occ.data.prompts import PromptStream
from megatron_occ.data.tasks import Task, build_task
from megatron_occ.data.tokenizers import Tokenizer, build_tokenizer
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint import (
    describe,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from megatron_occ.mcore.startup import Layout, barrier, initialize
from megatron_occ.observe import MetricsLogger, RolloutLog, print_summary, write_report
from megatron_occ.pretraining import Corpus, PretrainTrainer
from megatron_occ.rl.evaluation import evaluate
from megatron_occ.rl.rewards import VerifierPool, get_verifier, register_verifier
from megatron_occ.rl.rollouts import RolloutSource, Sampler
from megatron_occ.rl.trainer import GRPOTrainer
from megatron_occ.rollout import SamplingSettings

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """One run folder and what all its phases share."""

    config: Config
    resume: bool = False
    layout: Layout = field(init=False)
    task: Task | None = field(init=False, default=None)
    tokenizer: Tokenizer = field(init=False)
    metrics: MetricsLogger = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        _register_verifiers(config.data.verifiers)
        self.layout = initialize(tensor_parallel_size=config.parallel.tensor, seed=config.seed)
        if config.data.task.name is not None:
            self.task = build_task(config.data.task.name, **config.data.task.params)
        self.tokenizer = _tokenizer(config, self.task)
        self.folder = Path(config.run_dir)

    def open_folder(self) -> None:
        """Create the run folder, or open it again to resume, and start the log."""
        is_main, saved = self.layout.is_main, self.folder / "config.yaml"
        changes = []
        if self.resume and saved.is_file():
            changes = check_resumed(load_config([saved], []), self.config)
        barrier()  # all ranks have read what the main one is about to write
        if is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_config(self.config, saved)
        self.metrics = MetricsLogger(self.folder, is_main=is_main)
        for change in changes:
            self.metrics.event(0, f"resumed with {change}")

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

    def attach(self, trainer: PretrainTrainer | GRPOTrainer) -> bool:
        """Save this trainer's state from now on; restore it if the run resumes. True if it did."""
        self.trainer = trainer
        latest = self.run.latest(self.name) if self.run.resume else None
        if latest is None:
            return False
        trainer.load_state_dict(load_checkpoint(latest, self.actor, self.meta))
        self.run.metrics.truncate_after(trainer.step, self.name)
        logger.info("resumed from %s", latest)
        return True

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


def pretrain(run: Run) -> Path | None:
    """Pretrain to the end; returns the final checkpoint, None where there is nothing to do."""
    config = run.config
    if config.pretrain.steps == 0:
        return None
    if run.resume and run.latest("rl") is not None:
        return run.latest("pretrain")
    corpus, fingerprint = _corpus(run)
    meta = run.describe({"corpus": fingerprint})
    actor = MegatronGPTActor(
        config,
        run.tokenizer.vocab_size,
        run.layout,
        optimizer=config.pretrain.optimizer,
        total_updates=derive(config, run.layout.world_size).pretrain_updates,
    )
    phase = _Phase(run, "pretrain", actor, meta)
    with _validation(run, actor) as validate:
        trainer = PretrainTrainer(
            config, actor, corpus, validate=validate, logger=run.metrics, save=phase.save
        )
        phase.attach(trainer)
        trainer.fit()
    return run.latest("pretrain")


def read_prompts(run: Run) -> tuple[PromptStream, PromptStream]:
    """Training and held-out prompts, read and checked before anything is trained.

    Raises:
        ValueError: a bad file, or a record whose verifier is not known.
    """
    streams = _prompts(run, "train"), _prompts(run, "validation")
    for stream in streams:
        for name in stream.task_names():
            get_verifier(name)
    return streams


def reinforce(run: Run, prompts: tuple[PromptStream, PromptStream], start: Path | None) -> None:
    """Run RL to the end from the weights in ``start`` (None: random)."""
    config, rl = run.config, run.config.rl
    train, held_out = prompts
    meta = run.describe({"prompts": train.fingerprint()})
    actor = MegatronGPTActor(
        config,
        run.tokenizer.vocab_size,
        run.layout,
        optimizer=rl.optimizer,
        total_updates=derive(config, run.layout.world_size).rl_updates,
        train_head=config.mtp.trunk.signal != "none" or config.mtp.head.signal != "none",
    )
    if start is not None:
        load_weights(start, actor, meta)
    if rl.loss.kl_coefficient > 0:
        actor.keep_reference()
    rollout_log = RolloutLog(run.folder, is_main=run.layout.is_main)
    with VerifierPool(timeout_seconds=config.data.verifier_timeout) as verifiers:
        sampler = _sampler(run, actor, verifiers)
        phase = _Phase(run, "rl", actor, meta)
        trainer = GRPOTrainer(
            config,
            actor,
            RolloutSource(sampler, train, rl, config.seed),
            validate=lambda: evaluate(sampler, held_out, rl.validation, config.seed),
            logger=run.metrics,
            rollout_log=rollout_log,
            save=phase.save,
        )
        if phase.attach(trainer):
            rollout_log.truncate_after(trainer.step)
        trainer.fit()
    rollout_log.close()


def evaluate_checkpoint(run: Run, checkpoint: Path) -> dict[str, float]:
    """Validation metrics of a checkpoint's weights."""
    config = run.config
    actor = MegatronGPTActor(
        config, run.tokenizer.vocab_size, run.layout, optimizer=config.rl.optimizer, total_updates=1
    )
    load_weights(checkpoint, actor, run.describe({}))
    with _validation(run, actor) as validate:
        return validate()


@contextmanager
def _validation(run: Run, actor: MegatronGPTActor) -> Iterator[Callable[[], dict[str, float]]]:
    """A function that measures the actor on held-out problems."""
    config = run.config
    with VerifierPool(timeout_seconds=config.data.verifier_timeout) as verifiers:

        def validate() -> dict[str, float]:
            held_out, sampler = _prompts(run, "validation"), _sampler(run, actor, verifiers)
            return evaluate(sampler, held_out, config.rl.validation, config.seed)

        yield validate


def _register_verifiers(verifiers: dict[str, str]) -> None:
    """Make the user's verifiers known by name; one that can't be imported is told before any work.

    Modules are also looked for in the current folder, which ``python -m`` does and a console script
    does not. Verifier processes inherit the search path.
    """
    if verifiers and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name, path in verifiers.items():
        register_verifier(name, path)
        get_verifier(name)


def _tokenizer(config: Config, task: Task | None) -> Tokenizer:
    section = config.tokenizer
    alphabet = section.alphabet
    if section.kind == "char" and alphabet is None and task is not None:
        alphabet = task.alphabet
    return build_tokenizer(section.kind, alphabet=alphabet, path=section.path)


def _corpus(run: Run) -> tuple[Corpus, str]:
    config = run.config
    if config.data.corpus is not None:
        from megatron_occ.mcore.corpus import IndexedCorpus

        indexed = IndexedCorpus(config.data.corpus, run.tokenizer, config.seed)
        return indexed, indexed.fingerprint()
    assert run.task is not None, "validate refuses a run without corpus and task"
    fingerprint = PromptStream(run.task, config.seed).fingerprint()
    return TaskCorpus(run.task, run.tokenizer, config.seed), fingerprint


def _prompts(run: Run, split: str) -> PromptStream:
    data = run.config.data
    path = data.prompts if split == "train" else data.validation_prompts
    source = path if path is not None else run.task
    assert source is not None, "validate refuses a run without prompts and task"
    return PromptStream(source, run.config.seed, split, default_task_name=data.verifier)


def _sampler(run: Run, actor: MegatronGPTActor, verifiers: VerifierPool) -> Sampler:
    rollout = run.config.rl.rollout
    stop = [run.tokenizer.eos_id]
    if run.task is not None:
        stop += run.tokenizer.encode(run.task.stop)
    sampling = SamplingSettings(
        temperature=rollout.temperature,
        max_response_length=rollout.max_response_length,
        stop_ids=tuple(stop),
        batch_size=rollout.batch_size,
    )
    room = run.config.model.max_position_embeddings - rollout.max_response_length
    return Sampler(actor, run.tokenizer, verifiers, sampling, max_prompt_length=room)
