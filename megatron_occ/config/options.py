"""A key of the configuration as a dataclass field: default, range and one line of help."""

from __future__ import annotations

import keyword
from dataclasses import field
from typing import Any


def option(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    reads: str = "name",
) -> Any:
    """A dataclass field with its help text and allowed range.

    Args:
        default: the default value; a dict or list is copied for each instance.
        text: one line for ``--help``.
        choices: the allowed strings.
        minimum, maximum: inclusive bounds.
        above, below: exclusive bounds.
        reads: what the texts of a string, list or mapping are: ``name``, ``path``, ``text`` or
            ``values``, see ``texts.text_problem``.
    """
    limits = {"choices": choices, "min": minimum, "max": maximum, "above": above, "below": below}
    metadata = {
        "help": text,
        "reads": reads,
        **{name: limit for name, limit in limits.items() if limit is not None},
    }
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def key_of(attribute: str) -> str:
    """The key of a field: one that Python keeps for itself (``async``) has a ``_`` behind it."""
    return attribute.removesuffix("_")


def attribute_of(key: str) -> str:
    """The field of a key, see :func:`key_of`."""
    return f"{key}_" if keyword.iskeyword(key) else key


def section(cls: type, text: str) -> Any:
    """A nested section of the configuration."""
    return field(default_factory=cls, metadata={"help": text})
