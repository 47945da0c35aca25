"""Verifiers that turn responses into rewards, and the pool that runs them under a time limit."""

from __future__ import annotations

from megatron_occ.rl.rewards.pool import (
    Question,
    VerifierPool,
    VerifierResult,
    Votes,
    cores_of_rank,
)
from megatron_occ.rl.rewards.registry import (
    FULL_SCORE,
    Verifier,
    get_verifier,
    register_verifier,
    register_verifiers,
    verifier_names,
)

__all__ = [
    "FULL_SCORE",
    "Question",
    "Verifier",
    "VerifierPool",
    "VerifierResult",
    "Votes",
    "cores_of_rank",
    "get_verifier",
    "register_verifier",
    "register_verifiers",
    "verifier_names",
]
