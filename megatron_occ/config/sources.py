"""Reads what a user gave: yaml files with includes, and key=value overrides."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from megatron_occ.config.errors import ConfigError
from megatron_occ.config.keys import (
    REPLACED,
    join,
    leaves,
    open_parent,
    sections,
    spell,
    unknown_key,
)

_TAG = "tag:yaml.org,2002:"
_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")


@dataclass(frozen=True)
class Given:
    """A value that the user gave, and where: ``conf/a.yaml:3`` or ``override 'a=b'``."""

    key: str
    value: Any
    origin: str


@dataclass(frozen=True)
class Document:
    """What a yaml text holds, and in which line each dotted key stands."""

    data: Any
    lines: dict[str, int]
    ignored: int  # where the value of the document ends, to see what follows it


class _Loader(yaml.SafeLoader):
    """Plain data with the scalars of YAML 1.2: ``1e-4`` is a number, ``yes`` and ``none`` are
    strings, dates stay strings. A key given twice is an error."""

    yaml_implicit_resolvers: ClassVar[dict] = {}
    yaml_constructors: ClassVar[dict] = {
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in _PLAIN
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for name in [name for name, _ in node.value if isinstance(name, yaml.ScalarNode)]:
            if name.value in seen:
                problem = f"key {name.value} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, name.start_mark)
            seen.add(name.value)
        return super().construct_mapping(node, deep)


_FLOAT = re.compile(
    r"[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)$|[-+]?\.inf$|\.nan$"
)
for _name, _pattern, _first in (
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"[-+]?(?:0|[1-9]\d*)$"), list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", re.compile(r"<<$"), ["<"]),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", _pattern, _first)


class _Dumper(yaml.SafeDumper):
    """Writes what both this loader and a YAML 1.1 loader read back as the same value."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))


def dump(data: dict) -> str:
    """``data`` as YAML, in its own order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _parse(text: str | bytes, origin: str) -> Document:
    """Parses the bytes of a file, or the text of an override, where a line says nothing."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Document(None, {}, 0)
        data = loader.construct_object(node, deep=True)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark and isinstance(text, bytes) else ""
        raise ConfigError(f"{origin}{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{origin}: not valid YAML: {error}") from error
    return Document(data, dict(_lines(node, "")), node.end_mark.index)


def _lines(node: yaml.Node, prefix: str) -> Iterator[tuple[str, int]]:
    if not isinstance(node, yaml.MappingNode):
        return
    for name, value in node.value:
        key = join(prefix, str(name.value))
        yield key, name.start_mark.line + 1
        yield from _lines(value, key)


def read_mapping(path: Path, by: str = "") -> Document:
    """The keys and values of a yaml file, whatever they mean.

    Args:
        path: the file.
        by: who names it, for the message.

    Raises:
        ConfigError: missing or unreadable file, malformed yaml, or not a mapping.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = "not found" if isinstance(error, FileNotFoundError) else str(error.strerror)
        raise ConfigError(f"configuration file {path}: {reason}{by}") from error
    document = _parse(content, str(path))
    data = {} if document.data is None else document.data
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must be a mapping of keys, not {spell(data)}")
    return Document(data, document.lines, document.ignored)


def read_file(path: Path, _including: tuple[Path, ...] = ()) -> list[Given]:
    """The values of a yaml file, after those of the files that its ``include`` names.

    Raises:
        ConfigError: missing or unreadable file, malformed yaml, a cycle of includes, unknown keys.
    """
    by = f", included by {_including[-1]}" if _including else ""
    document = read_mapping(path, by)
    data = document.data
    includes = _include_list(data.pop("include", []), path, document.lines.get("include"))
    given = []
    for include in includes:
        chain = (*_including, path)
        target = path.parent / include
        if target.resolve() in [earlier.resolve() for earlier in chain]:
            cycle = " -> ".join(str(name) for name in (*chain, target))
            raise ConfigError(
                f"{path}:{document.lines['include']}: include goes in a circle: {cycle}"
            )
        given += read_file(target, chain)
    return given + _flatten(data, str(path), document.lines)


def _include_list(value: Any, path: Path, line: int | None) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}:{line}: include = {spell(value)}: must be a file name or a list")
    return names


def read_override(text: str) -> list[Given]:
    """The value, or for a section the values, of one ``key=value``; the value is YAML.

    Raises:
        ConfigError: no "=", malformed YAML, or an unknown key.
    """
    origin = f"override {text!r}"
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        is_file = text.endswith((".yaml", ".yml"))
        hint = f"; a file goes to --config: --config {text}" if is_file else ""
        raise ConfigError(f"{origin}: must be key=value, for example rl.steps=10{hint}")
    document = _parse(value, origin)
    if value[document.ignored :].strip():
        raise ConfigError(f"{origin}: ' #' starts a comment in YAML: put the value in quotes")
    return _flatten({key.strip(): document.data}, origin, {})


def _flatten(data: dict, origin: str, lines: dict[str, int]) -> list[Given]:
    given: dict[str, Given] = {}
    problems = []
    for key, value in _walk(data, ""):
        where = f"{origin}:{lines[key]}" if key in lines else origin
        if key in given:
            problems.append(f"{where}: {key} is given twice in this file")
        elif key in leaves() or open_parent(key):
            given[key] = Given(key, value, where)
        elif key in sections():
            problems.append(
                f"{where}: {key} = {spell(value)}: {key} is a section; give its keys, "
                "or leave it out"
            )
        elif key not in REPLACED or value is not None:
            problems.append(f"{where}: {unknown_key(key)}")
    if problems:
        raise ConfigError(problems)
    return list(given.values())


def _walk(data: dict, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        key = join(prefix, str(name))
        if key in sections() and isinstance(value, dict):
            yield from _walk(value, key)
        else:
            yield key, value
