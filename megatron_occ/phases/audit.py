"""Audit of a checkpoint: rounds of fresh rollouts, each with the updates of an RL step undone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megatron_occ.config.files import file_names
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint_folder import step_of
from megatron_occ.observe.progress import Progress, Timers
from megatron_occ.phases.inputs import Inputs
from megatron_occ.phases.rl import build_policy
from megatron_occ.phases.sampling import rollout_source
from megatron_occ.rl.batch import MiniBatch
from megatron_occ.rl.exchange import distribute
from megatron_occ.rl.measuring import METRICS, Measuring
from megatron_occ.rl.rollouts import RolloutSource
from megatron_occ.rl.update import PolicyUpdater
from megatron_occ.run import Run

# Updates that Adam's moments need before they say something
WARM_UP_UPDATES = 20


def audit(run: Run, inputs: Inputs, checkpoint: Path, *, rounds: int, window: int) -> dict:
    """Measure a checkpoint; returns the record that ``audit.record`` describes.

    A round draws the responses of one RL step at the checkpoint's weights and measures each of its
    mini-batches. Between them it makes the update of an RL step without MTP in the trunk, since the
    paper's proxies need a policy that has moved; at the end of a round weights and moments are put
    back.

    Args:
        run: its configuration is that of ``commands.audit.audit_config``.
        inputs: training prompts.
        checkpoint: weights of any phase; Adam's moments are made anew.
        rounds: how many.
        window: mini-batches of earlier rounds that each is paired with.
    """
    train = inputs.train
    assert train is not None, "inputs of another command"
    actor = build_policy(run, checkpoint)
    updater = PolicyUpdater(run.config, actor)
    steps = step_of(checkpoint) if checkpoint.parent.name == "rl" else 0
    with rollout_source(run, actor, train) as source:
        # prompts that this policy has not been trained on
        source.position = steps
        _warm_up(actor, updater, source)
        measuring, samples = Measuring(run.config, actor, window), []
        with Progress(rounds, "audit", 0, enabled=run.layout.is_main) as progress:
            for number in range(rounds):
                samples += _round(actor, updater, source, measuring, number)
                progress.update(number + 1, {"mini-batches": float(len(samples))})
    return {
        "checkpoint": str(checkpoint),
        "task": run.config.data.task.name or ", ".join(file_names(run.config.data.prompts)),
        "updates": steps * run.config.rl.mini_batches,
        "parameters": actor.gradient_space.size(),
        "world_size": run.layout.world_size,
        "seed": run.config.seed,
        "signals": measuring.signals,
        "groups": list(actor.gradient_space.groups),
        "metrics": list(METRICS),
        "window": window,
        "samples": samples,
    }


def _round(
    actor: MegatronGPTActor,
    updater: PolicyUpdater,
    source: RolloutSource,
    measuring: Measuring,
    number: int,
) -> list[dict[str, Any]]:
    found = []
    batches = _mini_batches(updater, source)
    with actor.restored():
        for place, mini_batch in enumerate(batches):
            sample = measuring.measure(mini_batch)
            found.append({"round": number, "mini_batch": place, **sample})
            if place + 1 < len(batches):
                updater.run_update(mini_batch)
    measuring.end_round()
    return found


def _mini_batches(updater: PolicyUpdater, source: RolloutSource) -> list[MiniBatch]:
    """Those of a step, with old log-probs."""
    rollouts = source.generate(Timers())
    parts = distribute(rollouts.batch, rollouts.owners, updater.config.rl, updater.actor)
    return updater.compute_logprobs(parts)


def _warm_up(actor: MegatronGPTActor, updater: PolicyUpdater, source: RolloutSource) -> None:
    """Give the optimizer moments of this policy's gradients, at weights that stay as they are."""
    for _ in range(math.ceil(WARM_UP_UPDATES / updater.config.rl.mini_batches)):
        batches = _mini_batches(updater, source)
        with actor.restored(moments=False):
            for mini_batch in batches:
                updater.run_update(mini_batch)
