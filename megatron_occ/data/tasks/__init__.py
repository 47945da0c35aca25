"""Generated problems with written-out solutions, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from megatron_occ.data.tasks.arithmetic import (
    ARITHMETIC_ALPHABET,
    ReversedAddition,
    ReversedMultiplication,
)
from megatron_occ.data.tasks.common import Problem, Task, UnknownTask, did_you_mean
from megatron_occ.data.tasks.reasoning_gym import PREFIX, ReasoningGym
from megatron_occ.data.tasks.star_paths import StarPaths

__all__ = [
    "ARITHMETIC_ALPHABET",
    "Problem",
    "ReasoningGym",
    "ReversedAddition",
    "ReversedMultiplication",
    "StarPaths",
    "Task",
    "UnknownTask",
    "build_task",
]

_GENERATED = (ReversedMultiplication, ReversedAddition, StarPaths)
_TASKS: dict[str, Callable[..., Task]] = {task.name: task for task in _GENERATED}


def build_task(name: str, **params: Any) -> Task:
    """Make a task by name, for example ``build_task("reversed_addition", digits=3, seed=1)``.

    ``reasoning_gym:NAME`` is a dataset of the package ``reasoning-gym``. Raises UnknownTask for an
    unknown name and ValueError for an unknown parameter (with the closest known one) and for a
    parameter out of range.
    """
    if name.startswith(PREFIX):
        return ReasoningGym(name.removeprefix(PREFIX), **params)
    if name not in _TASKS:
        raise UnknownTask(f"unknown task {name!r}{did_you_mean(name, list(_TASKS))}")
    task_class = _TASKS[name]
    known = list(inspect.signature(task_class).parameters)
    for key in params:
        if key not in known:
            raise ValueError(f"task {name} has no parameter {key!r}{did_you_mean(key, known)}")
    return task_class(**params)
