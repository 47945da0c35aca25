"""Rollouts: sampling mathematics, independent of the engine."""

from megatron_occ.rollout.sampling import sample_from_uniform, uniforms

__all__ = ["sample_from_uniform", "uniforms"]
