"""The configuration's section ``eval``. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_occ.config import limits
from megatron_occ.config.options import option


@dataclass
class EvalConfig:
    samples: int | None = option(
        None,
        "responses per problem, the k of avg@k, pass@k and maj@k (null: rl.validation.samples)",
        minimum=1,
        maximum=limits.SEQUENCES,
    )
    problems: int | None = option(
        None,
        "first problems of each set (null: all; of a generated task rl.validation.problems)",
        minimum=1,
        maximum=limits.SEQUENCES,
    )
    temperature: float | None = option(
        None,
        "sampling temperature, 0: greedy (null: rl.validation.temperature)",
        minimum=0,
        maximum=limits.FACTOR,
    )
    top_p: float | None = option(
        None,
        "nucleus sampling: probability mass kept, 1: all (null: rl.rollout.top_p)",
        above=0,
        maximum=1,
    )
    top_k: int | None = option(
        None,
        "number of most likely tokens kept, 0: all (null: rl.rollout.top_k)",
        minimum=0,
        maximum=limits.VOCABULARY,
    )
    max_response_length: int | None = option(
        None,
        "maximum tokens in a response (null: rl.rollout.max_response_length)",
        minimum=1,
        maximum=limits.TOKENS,
    )
    after_rl: bool = option(
        False, "evaluate the policy at the end of RL too, with table and responses in run_dir"
    )
