"""What sets of held-out problems and the section ``eval`` must satisfy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from megatron_occ.config.evaluation import eval_settings
from megatron_occ.config.keys import spell
from megatron_occ.config.schema import Config

_KEY = "data.validation_prompts"
# of a table's last column
_AVERAGE = "average"
# a part of metrics' names
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*", re.ASCII)


def set_problems(sets: Any) -> Iterator[str]:
    """Problems of ``data.validation_prompts``, one message each."""
    if not isinstance(sets, dict):
        return
    if not sets:
        yield f"{_KEY}={spell(sets)}: no file. Give at least one, {{name: file.jsonl}}"
    for name, path in sets.items():
        if not isinstance(path, str):
            yield (
                f"{_KEY}.{name}={spell(path)}: must be the file of the set {name!r}. Give "
                "{name: file.jsonl}"
            )
        elif not _NAME.fullmatch(name):
            yield (
                f"{_KEY}: {name!r} is no name for a set: it has letters, digits, '.', '_', '+' and "
                f"'-' only, and begins with a letter or digit. Give {{name: {path}}}"
            )
        elif name == _AVERAGE:
            yield f"{_KEY}.{name}={path}: is the column of means over sets. Give another name"


def eval_problems(config: Config) -> Iterator[str]:
    """Problems of the section ``eval``, one message each."""
    settings, limit = eval_settings(config), config.model.max_position_embeddings
    length, own = settings.max_response_length, config.eval.max_response_length
    if own is not None and length >= limit:
        yield (
            f"eval.max_response_length={length}: leaves no room for a prompt in "
            f"model.max_position_embeddings={limit}. Lower the one or raise the other"
        )
    if settings.temperature > 0:
        return
    for key, value in (("top_p", config.eval.top_p), ("top_k", config.eval.top_k)):
        if value is not None:
            yield (
                f"eval.{key}={value}: has no effect at temperature 0, where the likeliest token is "
                f"taken. Give eval.{key}=null, or eval.temperature=1.0"
            )
    if config.eval.samples is not None and config.eval.samples > 1:
        yield (
            f"eval.samples={config.eval.samples}: at temperature 0 all responses to a problem are "
            "the same. Give eval.samples=1, or eval.temperature=1.0"
        )
