"""Pretraining of a run, from random weights or those of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from megatron_occ.config.sizes import derive
from megatron_occ.config.warnings import rate_warnings
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint import load_weights
from megatron_occ.mcore.startup import from_main_rank
from megatron_occ.phases.inputs import PRETRAINING_PART, Inputs
from megatron_occ.phases.sampling import HeldOut
from megatron_occ.phases.start import converted
from megatron_occ.rl.pretraining import PretrainTrainer
from megatron_occ.run import Phase, Run


def pretrain(run: Run, inputs: Inputs) -> Path | None:
    """Pretrain to the end; returns the final checkpoint, None where there is nothing to do."""
    config = run.config
    if inputs.corpus is None:
        return run.latest("pretrain")
    meta = run.describe({"corpus": inputs.fingerprint})
    # a shared disk may show each rank something else
    begins = from_main_rank(run.latest("pretrain") is None)
    actor = MegatronGPTActor(
        config,
        run.tokenizer.vocab_size,
        run.layout,
        optimizer=config.pretrain.optimizer,
        total_updates=derive(config, run.layout.world_size).pretrain_updates,
        draws=begins and config.model.from_hf is None,
        balance_loss=config.pretrain.balance_loss,
    )
    if config.model.from_hf is not None and begins:
        load_weights(converted(run), actor, meta)
    with (
        HeldOut(run, actor, inputs.held_out, PRETRAINING_PART) as held_out,
        Phase(run, "pretrain", actor, meta) as phase,
    ):
        supervision = phase.supervision()
        trainer = PretrainTrainer(
            config,
            actor,
            inputs.corpus,
            validate=lambda: held_out.measure(lambda: supervision.end_if_asked(run.layout)),
            logger=run.metrics,
            save=phase.save,
            supervision=supervision,
            abort=held_out.abort,
        )
        phase.attach(trainer)
        if trainer.step == 0:
            for warning in rate_warnings("pretrain.optimizer", config.pretrain.optimizer):
                run.metrics.event(0, warning)
        trainer.fit()
    return run.latest("pretrain")
