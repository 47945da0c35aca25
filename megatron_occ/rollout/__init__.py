"""Rollouts: what is asked of an engine, and the mathematics of sampling and of drafts."""

from megatron_occ.rollout.engine import (
    DraftStatistics,
    EngineError,
    Generation,
    Request,
    RolloutEngine,
    SamplingSettings,
)
from megatron_occ.rollout.noise import row_keys, token_keys, uniforms
from megatron_occ.rollout.sampling import sample_by_race, sample_from_uniform
from megatron_occ.rollout.speculative import coupled_accept, speculative_accept

__all__ = [
    "DraftStatistics",
    "EngineError",
    "Generation",
    "Request",
    "RolloutEngine",
    "SamplingSettings",
    "coupled_accept",
    "row_keys",
    "sample_by_race",
    "sample_from_uniform",
    "speculative_accept",
    "token_keys",
    "uniforms",
]
