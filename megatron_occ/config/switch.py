"""A key that switches others off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_occ.config.keys import leaves


def is_one_of(*values: Any) -> Callable[[Any], bool]:
    """Whether a value is one of these."""
    return lambda value: value in values


def is_given(value: Any) -> bool:
    """Whether a value is not null."""
    return value is not None


@dataclass(frozen=True)
class Switch:
    """Keys that act only while another one is on.

    Attributes:
        key: the key that switches.
        is_off: whether a value of it switches the others off.
        keys: the keys that then must have their defaults.
        needs: the settings that would make them act, in words.
        zero: a value of ``keys`` besides the default that asks for nothing, as a weight of 0 does.
    """

    key: str
    is_off: Callable[[Any], bool]
    keys: tuple[str, ...]
    needs: str
    zero: Any = None


def all_but(section: str, *names: str) -> tuple[str, ...]:
    """Keys of a section but those with these names."""
    without = {f"{section}.{name}" for name in names}
    return tuple(key for key in leaves() if key.startswith(f"{section}.") and key not in without)
