"""RL of a run: its policy, its rollouts, its loop, and the weights it starts from."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

from megatron_occ.config.pipeline import what_parts_drafts
from megatron_occ.config.sizes import derive
from megatron_occ.config.warnings import rl_warnings
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint import load_weights
from megatron_occ.observe import RolloutLog
from megatron_occ.phases.evaluation import evaluate_policy
from megatron_occ.phases.inputs import RL_PART, Inputs
from megatron_occ.phases.pretraining import pretrain
from megatron_occ.phases.sampling import measure, rollout_source
from megatron_occ.phases.start import check_checkpoint, check_source, converted
from megatron_occ.rl.calibration import regime_from
from megatron_occ.rl.evaluation import Validation
from megatron_occ.rl.head_update import build_updater
from megatron_occ.rl.trainer import GRPOTrainer
from megatron_occ.run import Phase, Run


def check_first_weights(run: Run) -> None:
    """Check what :func:`first_weights` will read, before any work; called by all ranks.

    Raises:
        ValueError: ``rl.init_from`` does not fit, or ``model.from_hf`` can't be converted.
    """
    if run.config.rl.init_from is not None:
        check_checkpoint(run, Path(run.config.rl.init_from))
    else:
        check_source(run)


def first_weights(run: Run, inputs: Inputs) -> Path | None:
    """Checkpoint that RL starts from, which may have to be trained or converted first."""
    config = run.config
    if config.rl.init_from is not None:
        return Path(config.rl.init_from)
    if config.model.from_hf is not None:
        return converted(run)
    return pretrain(run, inputs)


def build_policy(run: Run, start: Path | None) -> MegatronGPTActor:
    """The actor of RL with its optimizer; called by all ranks.

    Args:
        run: its configuration describes model and optimizer.
        start: checkpoint of the weights; None: random ones.

    Raises:
        ValueError: the checkpoint is damaged or of another model.
    """
    config = run.config
    # Megatron's modules refer to each other in circles: two models must not stay in memory
    gc.collect()
    actor = MegatronGPTActor(
        config,
        run.tokenizer.vocab_size,
        run.layout,
        optimizer=config.rl.optimizer,
        total_updates=derive(config, run.layout.world_size).rl_updates,
        train_head=regime_from(config.mtp).trains_head,
        train_trunk=config.rl.train_trunk,
        # a resumed run too: random weights are what its reference policy has
        draws=start is None,
        balance_loss=config.rl.balance_loss,
    )
    if start is not None:
        load_weights(start, actor, run.describe({}))
    return actor


def reinforce(run: Run, inputs: Inputs, start: Path | None) -> None:
    """Run RL to the end from the weights in ``start`` (None: random)."""
    config = run.config
    train, held_out = inputs.train, inputs.held_out
    assert train is not None, "inputs of another command"
    assert held_out, "inputs of another command"
    actor = build_policy(run, start)
    if config.rl.loss.kl_coefficient > 0:
        actor.keep_reference()
    rollout_log = RolloutLog(run.folder, is_main=run.layout.is_main)
    keep_states = regime_from(config.mtp).head_on_rollouts
    meta = run.describe({"prompts": train.fingerprint()})
    with (
        rollout_source(run, actor, train, keep_states=keep_states) as rollouts,
        Phase(run, "rl", actor, meta) as phase,
    ):
        supervision = phase.supervision()

        def validate() -> Validation:
            # a signal cuts the set under way, and leaves out the ones after it
            return measure(
                run,
                rollouts.sampler,
                held_out,
                RL_PART,
                before_set=lambda: supervision.end_if_asked(run.layout),
            )

        trainer = GRPOTrainer(
            config,
            build_updater(config, actor),
            rollouts,
            validate=validate,
            logger=run.metrics,
            rollout_log=rollout_log,
            save=phase.save,
            supervision=supervision,
        )
        phase.attach(trainer)
        _say_how_it_starts(run, start, trainer.step)
        if trainer.step == 0:
            for warning in (*inputs.warnings, *rl_warnings(config)):
                run.metrics.event(0, warning)
        if run.resume:
            rollout_log.truncate_after(trainer.step)
        _say_what_is_not_drafted(run, trainer.step)
        trainer.fit()
        phase.finish()
        if config.eval.after_rl:
            text = evaluate_policy(run, rollouts.sampler, held_out, trainer.step)
            if run.layout.is_main:
                print(text, end="\n\n")
    rollout_log.close()


def _say_how_it_starts(run: Run, start: Path | None, step: int) -> None:
    """A line on what a person most often gets wrong with weights from elsewhere."""
    if not run.layout.is_main:
        return
    config = run.config
    start_text = f"RL from {config.model.from_hf or start or 'random weights'}"
    text = f"RL goes on from step {step}" if step else start_text
    settings = f"learning rate {config.rl.optimizer.lr:g}, {config.precision}"
    print(f"{text}: {settings}", file=sys.stderr, flush=True)


def _say_what_is_not_drafted(run: Run, step: int) -> None:
    """``auto`` is the default, so that a layout without drafts is no error."""
    rollout = run.config.rl.rollout
    reason = what_parts_drafts(run.config)
    if rollout.engine == "megatron" and rollout.speculative.mode == "auto" and reason:
        run.metrics.event(step, f"rollouts draft nothing: {reason}")
