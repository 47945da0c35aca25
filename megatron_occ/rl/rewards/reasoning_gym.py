"""Verifier of the tasks of ``reasoning-gym``: the package's own, in the verifier process."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from megatron_occ.data.tasks import build_task

_KEPT_TASKS = 8


def reasoning_gym_verifier(response: str, answer: str) -> float:
    """The score that the problem's own dataset gives the response.

    ``answer`` is the ``Problem.answer`` of ``ReasoningGym``. The task is opened by its name, so one
    whose verifier would run the response is refused here as well, whatever a data file says.
    Raises ValueError where the reference is no such thing.
    """
    try:
        reference = json.loads(answer)
        name, params = reference["task"], json.dumps(reference["params"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"reference {answer!r:.80} is not the answer of a reasoning_gym problem"
        ) from error
    return _task(name, params).score(response, reference)


@lru_cache(_KEPT_TASKS)
def _task(name: str, params: str) -> Any:
    return build_task(name, **json.loads(params))
