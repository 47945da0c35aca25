"""Rollouts: what is asked of an engine, and the mathematics of sampling and of drafts."""

from megatron_occ.rollout.engine import (
    DraftStatistics,
    EngineError,
    Generation,
    Request,
    RolloutEngine,
    SamplingSettings,
)
from megatron_occ.rollout.sampling import sample_from_uniform, uniforms
from megatron_occ.rollout.speculative import coupled_accept, speculative_accept

__all__ = [
    "DraftStatistics",
    "EngineError",
    "Generation",
    "Request",
    "RolloutEngine",
    "SamplingSettings",
    "coupled_accept",
    "sample_from_uniform",
    "speculative_accept",
    "uniforms",
]
