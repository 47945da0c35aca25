"""Defaults < yaml files < key=value overrides, checked against the schema, and back to yaml."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_occ.config.errors import ConfigError
from megatron_occ.config.keys import check_value, join, leaves, open_parent, spell
from megatron_occ.config.options import attribute_of, key_of
from megatron_occ.config.presets import PRESETS, preset_conflicts, preset_values
from megatron_occ.config.schema import Config
from megatron_occ.config.sources import Given, dump, read_file, read_override

_INTERPOLATION = "${"


# what may be given beside the values of a folder: context, initialisation, and what is added
_BESIDE_A_FOLDER = (
    "model.max_position_embeddings",
    "model.init_std",
    "model.moe.bias_update_rate",
    "mtp.num_layers",
    "tokenizer.kind",
    "tokenizer.path",
    "rl.optimizer.lr",
    "pretrain.optimizer.lr",
)


def load_config(
    config_paths: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    *,
    folder: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration that files and overrides describe, with presets expanded.

    Later wins: defaults, then the yaml files from left to right (a file comes after what it
    includes), then the overrides from left to right. An open mapping (``data.task.params``) is
    replaced as a whole; ``data.task.params.x=1`` sets one entry. A preset fills in what was not
    given. ``${other.key}`` refers to the final value of another key.

    Args:
        config_paths: yaml files; ``include`` in a file is relative to that file.
        overrides: ``dotted.key=value`` with the value in YAML.
        folder: values that ``model.from_hf`` brings, by key; files and overrides must not
            contradict them.

    Raises:
        ConfigError: unknown key, wrong type, value out of range, malformed yaml, missing file,
            or a key that contradicts a preset; with file and line where known. Contradictions
            between other keys are the business of :func:`megatron_occ.config.validate`.
    """
    values = {key: leaf.default() for key, leaf in leaves().items()}
    origins: dict[str, str] = {}
    for given in _read_all(config_paths, overrides):
        _put(values, given)
        origins[open_parent(given.key) or given.key] = given.origin
    for key, value in (folder or {}).items():
        if key not in origins:
            values[key] = value
            origins[key] = f"model.from_hf={values['model.from_hf']}"
    chosen = _interpolate(values, PRESETS, origins)
    for key, value in preset_values(chosen).items():
        if key not in origins:
            values[key] = value
    values |= _interpolate(values, values, origins)
    values = _check(values, origins)
    conflicts = preset_conflicts(values, origins) + _folder_conflicts(values, folder or {}, origins)
    if conflicts:
        raise ConfigError(conflicts)
    return _build(Config, "", values)


def _read_all(config_paths: Sequence[str | Path], overrides: Sequence[str]) -> list[Given]:
    readers = [(read_file, Path(path)) for path in config_paths]
    readers += [(read_override, text) for text in overrides]
    given, problems = [], []
    for read, source in readers:
        try:
            given += read(source)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return given


def _put(values: dict[str, Any], given: Given) -> None:
    owner = open_parent(given.key)
    if owner is None:
        values[given.key] = given.value
        return
    if not isinstance(values[owner], dict):
        raise ConfigError(f"{given.origin}: {owner} = {spell(values[owner])} has no entries to set")
    values[owner] = {**values[owner], given.key.rpartition(".")[2]: given.value}


def _folder_conflicts(
    values: Mapping[str, Any], folder: Mapping[str, Any], origins: Mapping[str, str]
) -> list[str]:
    return [
        f"{origins[key]}: {key} = {spell(values[key])} contradicts model.from_hf="
        f"{values['model.from_hf']}, whose config.json makes it {spell(value)}. Leave it out"
        for key, value in folder.items()
        if values[key] != value and key not in _BESIDE_A_FOLDER
    ]


def _interpolate(
    values: Mapping[str, Any], keys: Iterable[str], origins: Mapping[str, str]
) -> dict[str, Any]:
    """The values of ``keys`` with each ``${...}`` replaced by what it refers to."""
    resolved = {key: values[key] for key in keys}
    for key in [key for key, value in resolved.items() if _INTERPOLATION in str(value)]:
        try:
            value = OmegaConf.select(OmegaConf.create(_nest(values)), key)
            if OmegaConf.is_config(value):
                value = OmegaConf.to_container(value, resolve=True)
        except OmegaConfBaseException as error:
            reason = str(error).partition("\n")[0]
            where = origins.get(error.full_key or key, origins[key])
            raise ConfigError(f"{where}: {key} = {spell(values[key])}: {reason}") from error
        resolved[key] = value
    return resolved


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *parents, name = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def _check(values: Mapping[str, Any], origins: Mapping[str, str]) -> dict[str, Any]:
    checked, problems = {}, []
    for key, leaf in leaves().items():
        try:
            checked[key] = check_value(leaf, values[key])
        except ValueError as error:
            problems.append(f"{origins[key]}: {error}")
    if problems:
        raise ConfigError(problems)
    return checked


def _build(cls: type, prefix: str, values: Mapping[str, Any]) -> Any:
    arguments = {}
    for field in dataclasses.fields(cls):
        key = join(prefix, key_of(field.name))
        arguments[field.name] = (
            values[key] if key in leaves() else _build(field.default_factory, key, values)
        )
    return cls(**arguments)


def flat_values(config: Config) -> dict[str, Any]:
    """The values of a configuration by dotted key."""
    values = {}
    for key in leaves():
        node: Any = config
        for name in key.split("."):
            node = getattr(node, attribute_of(name))
        values[key] = node
    return values


def to_yaml(config: Config) -> str:
    """The whole resolved configuration; loading it gives an equal one."""
    return dump(_escape(_nest(flat_values(config))))


def _escape(value: Any) -> Any:
    """Strings that look like an interpolation, marked so that they stay what they are."""
    if isinstance(value, dict):
        return {name: _escape(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_escape(entry) for entry in value]
    if isinstance(value, str):
        return value.replace(_INTERPOLATION, "\\" + _INTERPOLATION)
    return value


def save_config(config: Config, path: str | Path) -> None:
    """Writes the resolved configuration to ``path``; its folder must exist."""
    # whole or not at all: a run that is continued compares itself with this file
    temporary = Path(f"{path}.tmp")
    temporary.write_text(to_yaml(config), encoding="utf-8")
    temporary.replace(path)
