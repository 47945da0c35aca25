"""What every generated task is, and checks of the parameters."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

STOP = "."


class UnknownTask(ValueError):
    """There is no task of this name, or none that can be used here."""


@dataclass(frozen=True)
class Problem:
    """One problem: ``prompt + solution`` is the full text, ``answer`` what a verifier compares.

    ``task_name`` is the name of the verifier. ``solution`` is empty where none is known.
    """

    prompt: str
    solution: str
    answer: str
    task_name: str


class Task(Protocol):
    """A stateless source of problems.

    ``alphabet`` has the characters that a tokenizer of characters needs, ``stop`` ends each
    solution and with it a response; empty, where only the tokenizer's eos does.
    """

    name: str
    stop: str

    @property
    def alphabet(self) -> str: ...

    def problem(self, split: str, index: int) -> Problem:
        """Problem ``index`` of ``split`` ("train" or "validation"): always the same one."""
        ...

    def params(self) -> dict[str, Any]:
        """The parameters that ``build_task`` needs to make this task again."""
        ...


def check_int(name: str, value: int, low: int, high: int | None) -> None:
    """Raise ValueError unless ``value`` is an integer from ``low`` to ``high`` (None: no limit)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {limits}, got {value}")


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """End of a message about an unknown name: the closest known one, and all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f": did you mean {close[0]!r}?" if close else ":"
    return f"{hint} known: {', '.join(known)}"
