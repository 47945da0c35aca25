"""Every dotted key of the schema, what a key allows, and the nearest key to a misspelt one."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_occ.config.options import key_of
from megatron_occ.config.schema import Config
from megatron_occ.config.texts import means_null, text_problem

_SUGGESTIONS = 3
_SHOWN = 100  # characters of a refused text in the message
_CLOSE = 0.85  # below, whole dotted keys are alike by their common section alone
_NOUNS = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    dict: "a mapping of names to values",
}
_PLURALS = {float: "numbers", int: "integers", str: "texts"}
_LIMITS = {"min": ">=", "above": ">", "max": "<=", "below": "<"}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A key that holds a value, for example ``rl.optimizer.lr``.

    Attributes:
        key: the dotted key.
        section: the dotted key of its section, "" at the top.
        kind: int, float, str, bool, dict or list.
        item: the type of a list's entries, else None.
        nullable: whether null is allowed (for a list: as an entry).
        or_text: whether a mapping may also be a single text.
        text: one line of help.
        limits: choices, min, max, above and below, as far as they are set.
        reads: what the key's texts are, see :func:`text_problem`.
    """

    key: str
    section: str
    kind: type
    item: type | None
    nullable: bool
    or_text: bool
    text: str
    limits: Mapping[str, Any]
    reads: str
    field: dataclasses.Field

    def default(self) -> Any:
        """A fresh copy of the default value."""
        if self.field.default is not dataclasses.MISSING:
            return self.field.default
        return self.field.default_factory()

    def allowed(self) -> str:
        """What the key accepts, in words."""
        entries = f" or {spell(None)}" if self.nullable else ""
        bounds = " and ".join(
            f"{sign} {self.limits[name]:,}" for name, sign in _LIMITS.items() if name in self.limits
        )
        bounds = f" {bounds}" if bounds else ""
        if self.kind is list and "choices" in self.limits:
            return f"a list of any of {', '.join(self.limits['choices'])}"
        if self.kind is list:
            return f"a list of {_PLURALS[self.item]}{bounds}{entries}"
        if "choices" in self.limits:
            return f"one of {', '.join(self.limits['choices'])}{entries}"
        noun = f"a string or {_NOUNS[dict]}" if self.or_text else _NOUNS[self.kind]
        return f"{noun}{bounds}{entries}"


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of the schema: its dotted key ("" for the top), dataclass and help."""

    key: str
    cls: type
    text: str


def join(section: str, name: str) -> str:
    """The dotted key of ``name`` in ``section``."""
    return f"{section}.{name}" if section else name


@functools.cache
def sections() -> dict[str, Section]:
    """All sections by dotted key, in the order of the schema."""
    return {
        entry.key: entry for entry in _walk(Config, "", "the run") if isinstance(entry, Section)
    }


@functools.cache
def leaves() -> dict[str, Leaf]:
    """All value keys by dotted key, in the order of the schema."""
    return {entry.key: entry for entry in _walk(Config, "", "the run") if isinstance(entry, Leaf)}


def _walk(cls: type, prefix: str, text: str) -> Iterator[Section | Leaf]:
    yield Section(prefix, cls, text)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key, hint = join(prefix, key_of(field.name)), hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from _walk(hint, key, field.metadata["help"])
        else:
            yield _leaf(key, prefix, hint, field)


def _leaf(key: str, section: str, hint: Any, field: dataclasses.Field) -> Leaf:
    kind, nullable = _split_null(hint)
    or_text = isinstance(kind, tuple)
    if or_text:
        kind = dict
    item = None
    if typing.get_origin(kind) is list:
        item, nullable = _split_null(typing.get_args(kind)[0])
    reads = field.metadata["reads"]
    limits = {n: limit for n, limit in field.metadata.items() if n not in ("help", "reads")}
    kind = typing.get_origin(kind) or kind
    text = field.metadata["help"]
    return Leaf(key, section, kind, item, nullable, or_text, text, limits, reads, field)


def _split_null(hint: Any) -> tuple[Any, bool]:
    if not isinstance(hint, types.UnionType):
        return hint, False
    kinds = tuple(arg for arg in typing.get_args(hint) if arg is not type(None))
    nullable = type(None) in typing.get_args(hint)
    if len(kinds) == 1:
        return kinds[0], nullable
    assert {typing.get_origin(kind) or kind for kind in kinds} == {str, dict}, hint
    return kinds, nullable


def open_parent(key: str) -> str | None:
    """The open mapping (``data.task.params``) that a key such as ``data.task.params.x`` is in."""
    owner, _, name = key.rpartition(".")
    leaf = leaves().get(owner)
    return owner if leaf is not None and leaf.kind is dict and name else None


def spell(value: Any) -> str:
    """A value as a user would write it: null, true, 'text', 0.1."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(spell(entry) for entry in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {spell(entry)}' for name, entry in value.items())}}}"
    return repr(value)


def check_value(leaf: Leaf, value: Any) -> Any:
    """The value, checked against type, choices and range; nothing is coerced but int to float.

    Raises:
        ValueError: with key, value and what is allowed; it does not say where the value stands.
    """
    if not _fits(leaf, value):
        raise ValueError(
            f"{leaf.key} = {_shortened(spell(value))}: must be {leaf.allowed()}{_hint(leaf, value)}"
        )
    if "choices" not in leaf.limits and (leaf.item or leaf.kind) in (str, dict):
        problem = text_problem(value, leaf.reads, _without_value(leaf))
        if problem:
            raise ValueError(f"{leaf.key} = {_shortened(spell(value))}: {problem}")
    if leaf.kind is float and value is not None:
        return float(value)
    if leaf.kind is list:
        return [None if entry is None else leaf.item(entry) for entry in value]
    return value


def _fits(leaf: Leaf, value: Any) -> bool:
    if leaf.kind is list:
        return isinstance(value, list) and all(_fits_one(leaf, leaf.item, v) for v in value)
    return _fits_one(leaf, leaf.kind, value)


def _fits_one(leaf: Leaf, kind: type, value: Any) -> bool:
    if value is None:
        return leaf.nullable
    if leaf.or_text and isinstance(value, str):
        return True
    if kind is dict:
        return isinstance(value, dict) and all(isinstance(name, str) for name in value)
    if kind in (int, float):
        numeric = isinstance(value, (int, kind)) and not isinstance(value, bool)
        return numeric and _in_range(leaf.limits, value)
    if not isinstance(value, kind):
        return False
    return value in leaf.limits.get("choices", (value,))


def _in_range(limits: Mapping[str, Any], value: float) -> bool:
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False
    return (
        finite
        and value >= limits.get("min", -math.inf)
        and value <= limits.get("max", math.inf)
        and value > limits.get("above", -math.inf)
        and value < limits.get("below", math.inf)
    )


def _without_value(leaf: Leaf) -> str:
    """What to write for no value of a key with texts."""
    if leaf.kind is list:
        return "Leave it out of the list"
    if leaf.reads == "values":
        return "Use null, or leave it out of the mapping"
    return "Use null" if leaf.nullable else "Leave the key out for its default, or give a name"


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _hint(leaf: Leaf, value: Any) -> str:
    entries = value if isinstance(value, list) else [value]
    if leaf.nullable and any(map(means_null, entries)) and "none" not in _choices(leaf):
        return ". Use null"
    if leaf.kind is str and isinstance(value, (int, float)):
        return '; write it in quotes to make it a string: "..."'
    if leaf.kind in (int, float) and isinstance(value, str):
        return ", not a string"
    if isinstance(value, str) and "choices" in leaf.limits:
        close = difflib.get_close_matches(value, leaf.limits["choices"], n=1)
        return f". Did you mean {close[0]}?" if close else ""
    return ""


def _choices(leaf: Leaf) -> tuple[str, ...]:
    return leaf.limits.get("choices", ())


# keys of earlier versions; null, as in saved configurations, asked for nothing
REPLACED = {"rl.loss.importance_cap": "rl.correction.weights=token and rl.correction.high"}


def suggest(key: str) -> list[str]:
    """At most three existing keys that an unknown one may stand for, best first.

    Keys of the same name elsewhere come first (those in the same part of the configuration
    alone, if there are any), then keys and names that are spelt alike.
    """
    known = [*leaves(), *(name for name in sections() if name)]
    parent, _, name = key.rpartition(".")
    found = [other for other in known if other.rpartition(".")[2] == name]
    near = [other for other in found if other.startswith(key.partition(".")[0] + ".")]
    found = near or found
    found.sort(key=lambda other: -difflib.SequenceMatcher(None, key, other).ratio())
    if not found:
        siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == parent}
        found = [siblings[n] for n in difflib.get_close_matches(name, siblings, _SUGGESTIONS)]
    found = found or difflib.get_close_matches(key, known, _SUGGESTIONS, _CLOSE)
    return found[:_SUGGESTIONS]


def unknown_key(key: str) -> str:
    """The message for an unknown key, with a suggestion or the keys of its section."""
    if key in REPLACED:
        return f"{key} is no key any more: give {REPLACED[key]}"
    found = suggest(key)
    if found:
        return f"unknown key {key}. Did you mean {' or '.join(found)}?"
    parent = key.rpartition(".")[0]
    while parent not in sections():
        parent = parent.rpartition(".")[0]
    names = ", ".join(key_of(field.name) for field in dataclasses.fields(sections()[parent].cls))
    return f"unknown key {key}. {f'{parent} has' if parent else 'There are'}: {names}"
