"""Refuses a setting that another one switches off: nothing that was asked for is ignored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_occ.config.keys import leaves, spell
from megatron_occ.config.presets import PRESETS
from megatron_occ.config.switch import Switch
from megatron_occ.config.switches import SWITCHES
from megatron_occ.config.switches_rl import RL_ALONE_SWITCHES, RL_SWITCHES


def switch_problems(values: Mapping[str, Any], *, pretrains: bool, trains: bool) -> Iterator[str]:
    """Settings without effect, one message each.

    Args:
        values: a whole configuration by dotted key.
        pretrains: whether the command runs pretraining.
        trains: whether the command runs reinforcement learning.
    """
    switches = SWITCHES
    if trains:
        switches += RL_SWITCHES if pretrains else RL_SWITCHES + RL_ALONE_SWITCHES
    found: dict[str, str] = {}
    for switch in switches:
        if not switch.is_off(values[switch.key]):
            continue
        implied = _set_by_presets(switch.keys, values)
        for key in switch.keys:
            default = leaves()[key].default()
            if values[key] not in (default, switch.zero, implied.get(key, default)):
                found.setdefault(key, _message(switch, key, default, values))
    yield from found.values()


def _set_by_presets(keys: tuple[str, ...], values: Mapping[str, Any]) -> dict[str, Any]:
    """What presets among ``keys`` set: a preset that is refused itself speaks for all of it."""
    chosen = [PRESETS[key].get(values[key], {}) for key in keys if key in PRESETS]
    return {key: value for preset in chosen for key, value in preset.items()}


def _message(switch: Switch, key: str, default: Any, values: Mapping[str, Any]) -> str:
    return (
        f"{key}={_plain(values[key])}: has no effect with {switch.key}="
        f"{_plain(values[switch.key])}{_preset_of(switch.key, values)}. Give "
        f"{key}={_plain(default)}, its default, or {switch.needs}"
    )


def _preset_of(key: str, values: Mapping[str, Any]) -> str:
    for preset_key, presets in PRESETS.items():
        preset = presets.get(values[preset_key], {})
        if key in preset and preset[key] == values[key]:
            return f", set by {preset_key}={values[preset_key]}"
    return ""


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else spell(value)
