"""Files and folders that a configuration names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_occ.config.load import flat_values
from megatron_occ.config.schema import Config

_SETS = "data.validation_prompts"
_NAMED = (
    "model.from_hf",
    "tokenizer.path",
    "data.corpus",
    "data.prompts",
    _SETS,
    "rl.init_from",
)


def files_not_found(config: Config) -> list[str]:
    """Keys with their values, ``rl.init_from=...``, whose file or folder is not there."""
    values = flat_values(config)
    named = [(key, name) for key in _NAMED for name in files_of(key, values[key])]
    return [f"{key}={value}" for key, value in named if not _is_there(key, value)]


def files_of(key: str, value: Any) -> list[str]:
    """The files that a value of a key names: one, none, or several."""
    return list(sets_of(value).values()) if key == _SETS else file_names(value)


def file_names(value: Any) -> list[str]:
    """The files that a key names: one, none, or those that are given by weight."""
    if value is None:
        return []
    return list(value) if isinstance(value, dict) else [value]


def sets_of(value: Any) -> dict[str, str]:
    """The files of ``data.validation_prompts`` by name; "" is that of one given alone."""
    if value is None:
        return {}
    return value if isinstance(value, dict) else {"": value}


def _is_there(key: str, value: str) -> bool:
    # a corpus is named by what its files have in common
    return Path(f"{value}.idx" if key == "data.corpus" else value).exists()
