"""What ``eval`` draws, with what it takes over from RL, and the sets it draws for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_occ.config.schema import Config


@dataclass(frozen=True)
class EvalSettings:
    """Section ``eval`` without nulls that stand for a value elsewhere.

    Attributes:
        samples: responses to a problem.
        problems: of each set; None: all of a file.
        temperature: of sampling, 0: greedy.
        top_p: probability mass that stays, 1: all.
        top_k: tokens that stay, None: all.
        max_response_length: tokens of a response at most.
        length_key: the key that this limit came from.
    """

    samples: int
    problems: int | None
    temperature: float
    top_p: float
    top_k: int | None
    max_response_length: int
    length_key: str


def eval_settings(config: Config) -> EvalSettings:
    """What ``eval`` draws under a configuration."""
    own, validation, rollout = config.eval, config.rl.validation, config.rl.rollout
    is_generated = config.data.task.name is not None
    length = own.max_response_length
    section = "rl.rollout" if length is None else "eval"
    return EvalSettings(
        samples=_first(own.samples, validation.samples),
        problems=_first(own.problems, validation.problems if is_generated else None),
        temperature=_first(own.temperature, validation.temperature),
        top_p=_first(own.top_p, rollout.top_p),
        # 0 is all, as None is for the sampler
        top_k=_first(own.top_k, rollout.top_k) or None,
        max_response_length=_first(length, rollout.max_response_length),
        length_key=f"{section}.max_response_length",
    )


def _first(own: Any, other: Any) -> Any:
    return other if own is None else own


def set_title(config: Config, name: str) -> str:
    """What a set is called: its name, or where it has none the task or the file's."""
    given = config.data.validation_prompts
    return name or config.data.task.name or Path(str(given)).stem
