"""Rollouts: sampling mathematics, independent of the engine."""

from megatron_occ.rollout.sampling import SamplingSettings, sample_from_uniform, uniforms

__all__ = ["SamplingSettings", "sample_from_uniform", "uniforms"]
