"""Keys of how a run is watched, whatever it computes."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_occ.config import limits
from megatron_occ.config.options import option


@dataclass
class PhaseLimitsConfig:
    pretrain: float | None = option(
        3600.0, "an update of pretraining", above=0, maximum=limits.SECONDS
    )
    rollout: float | None = option(14400.0, "responses of a round", above=0, maximum=limits.SECONDS)
    reward: float | None = option(
        21600.0,
        "scores of a round, and waiting for the responses of other ranks",
        above=0,
        maximum=limits.SECONDS,
    )
    logprobs: float | None = option(
        3600.0, "old log-probs of a step", above=0, maximum=limits.SECONDS
    )
    train: float | None = option(3600.0, "all updates of a step", above=0, maximum=limits.SECONDS)
    validation: float | None = option(14400.0, "a validation", above=0, maximum=limits.SECONDS)
    save: float | None = option(3600.0, "a checkpoint", above=0, maximum=limits.SECONDS)
    other: float | None = option(
        3600.0, "what is between these: ranks agree to go on", above=0, maximum=limits.SECONDS
    )
