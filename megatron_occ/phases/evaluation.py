"""Validation of a checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint import load_weights
from megatron_occ.phases.inputs import RL_PART, Inputs
from megatron_occ.phases.sampling import validation
from megatron_occ.phases.start import check_checkpoint
from megatron_occ.run import Run

logger = logging.getLogger(__name__)


def evaluate_checkpoint(run: Run, inputs: Inputs, checkpoint: Path) -> dict[str, float]:
    """Validation metrics of a checkpoint's weights."""
    config = run.config
    check_checkpoint(run, checkpoint)
    actor = MegatronGPTActor(
        config, run.tokenizer.vocab_size, run.layout, optimizer=config.rl.optimizer, total_updates=1
    )
    load_weights(checkpoint, actor, run.describe({}))
    with validation(run, actor, inputs.held_out, RL_PART) as validate:
        metrics, events = validate()
    for event in events:
        logger.warning(event)
    return metrics
