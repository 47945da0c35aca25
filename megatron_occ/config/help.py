"""The text of ``--help`` and the reference page, written from the schema."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from megatron_occ.config.errors import ConfigError
from megatron_occ.config.keys import Leaf, Section, leaves, sections, spell, unknown_key
from megatron_occ.config.presets import PRESETS, REGIME_KEYS
from megatron_occ.config.switches import SWITCHES
from megatron_occ.config.switches_rl import RL_SWITCHES

_WIDTH = 100
_COLUMN = 44

_INTRODUCTION = """\
# Configuration

Written from `megatron_occ/config/schema*.py` by
`megatron_occ.config.reference_markdown()`.

A configuration is put together from, later wins:

1. the defaults below;
2. yaml files, from left to right. A file may start with `include: other.yaml` (or a list), relative
   to itself; what it includes comes before it;
3. overrides `key=value` with dotted keys, from left to right. The value is YAML: `rl.steps=10`,
   `rl.optimizer.lr=1e-4`, `mtp.trunk.clamp=[0.0, null]`, `data.task.params.digits=2`.

`${other.key}` in a value refers to another key. An unknown key, a value of the wrong type or out of
range, and keys that contradict each other are errors; nothing is converted or ignored silently. A
key that has no effect because another one switches it off must keep its default, see
[switches](#switches). Sections of a phase that the command does not run are left alone, so that one
file can serve all commands.
Scalars are those of YAML 1.2: `1e-4` is a number; `yes`, `no` and `none` are strings. A missing
value is `null`: a text such as `None`, or an empty name, is refused.
A run writes its resolved configuration to `config.yaml`, which can be given as a file again.

## Presets

A preset sets the keys below where no file or override gives them: a given weight or clip wins over
the preset. For the keys that say which regime it is, a given value other than the preset's is an
error: drop the key or the preset. These are:
"""


def help_text(section_prefix: str | None = None) -> str:
    """Every key with default, what is allowed and help, grouped by section, 100 columns wide.

    Args:
        section_prefix: show only this section (``mtp``, ``mtp.trunk``) or key.

    Raises:
        ConfigError: no such section or key.
    """
    prefix = section_prefix or ""
    if prefix not in sections() and prefix not in leaves():
        raise ConfigError(unknown_key(prefix))
    blocks = []
    for section in sections().values():
        rows = [leaf for leaf in _of(section) if _inside(leaf.key, prefix)]
        if rows:
            lines = [line for leaf in rows for line in _row(leaf)]
            blocks.append("\n".join([f"{section.key or 'run'}: {section.text}", *lines]))
    return "\n\n".join(blocks) + "\n"


def _inside(key: str, prefix: str) -> bool:
    return not prefix or key == prefix or key.startswith(f"{prefix}.")


def _of(section: Section) -> list[Leaf]:
    return [leaf for leaf in leaves().values() if leaf.section == section.key]


def _row(leaf: Leaf) -> Iterator[str]:
    left = f"  {leaf.key}={_plain(leaf.default())}"
    right = textwrap.wrap(f"{leaf.text} [{leaf.allowed()}]", _WIDTH - _COLUMN)
    if len(left) >= _COLUMN:
        yield left
        left = ""
    yield f"{left:<{_COLUMN}}{right[0]}"
    for line in right[1:]:
        yield f"{'':<{_COLUMN}}{line}"
    for name, values in PRESETS.get(leaf.key, {}).items():
        settings = " ".join(f"{key}={_plain(value)}" for key, value in values.items())
        yield from textwrap.wrap(
            f"{name}: {settings}", _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 10
        )


def _plain(value: object) -> str:
    return value if isinstance(value, str) else spell(value)


def reference_markdown() -> str:
    """The page ``docs/configuration.md``: precedence, presets and a table for each section."""
    parts = [_INTRODUCTION + ", ".join(f"`{key}`" for key in REGIME_KEYS) + "."]
    for key, presets in PRESETS.items():
        parts += ["", f"| `{key}` | sets |", "|---|---|"]
        parts += [f"| `{name}` | {_settings(values)} |" for name, values in presets.items()]
    parts += ["", "## Switches", "", "| these act only | with |", "|---|---|"]
    for switch in SWITCHES + RL_SWITCHES:
        parts.append(f"| {', '.join(f'`{key}`' for key in switch.keys)} | {switch.needs} |")
    parts += ["", "## Keys"]
    for section in sections().values():
        rows = [_table_row(leaf) for leaf in _of(section)]
        if rows:
            title = f"### `{section.key}`: {section.text}" if section.key else "### The run"
            parts += ["", title, "", "| key | default | allowed | meaning |", "|---|---|---|---|"]
            parts += rows
    return "\n".join(parts) + "\n"


def _settings(values: dict[str, object]) -> str:
    return ", ".join(f"`{key}={_plain(value)}`" for key, value in values.items())


def _table_row(leaf: Leaf) -> str:
    text = leaf.text.replace("|", "\\|")
    return f"| `{leaf.key}` | `{_plain(leaf.default())}` | {leaf.allowed()} | {text} |"
