"""The study file: arms, seeds, and what all runs of a study have in common."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_occ.config import Config, ConfigError, flat_values, load_config, validate
from megatron_occ.config.keys import spell
from megatron_occ.config.sources import read_mapping, read_override

_KEYS = ("include", "base", "folder", "overrides", "reference", "seeds", "arms")
# of a file that a study includes: what several studies have in common
_INCLUDED = ("overrides", "reference", "seeds", "arms")
# keys that the command line may set too, beside those of the configuration
_FROM_COMMAND_LINE = ("folder", "reference", "seeds")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# what the study sets for each run
_SET_HERE = {
    "run_dir": "a run's folder is FOLDER/runs/ARM/seed_N",
    "seed": "the seeds of a study are its key seeds",
    "keep_checkpoints": "a study keeps the newest one of a run, and none of a finished run",
}
# an arm that differs in these is not paired with the others
_COMMON = (
    "model.",
    "data.",
    "tokenizer.",
    "pretrain.",
    "mtp.num_layers",
    "rl.init_from",
    "rl.steps",
    "rl.validation.",
)


@dataclass(frozen=True)
class Study:
    """What is compared, from a study file.

    Attributes:
        name: the file's name without its ending.
        folder: where runs and results go.
        base: configuration files, in order.
        overrides: ``key=value`` of all runs, after the files.
        arms: name of an arm to its own ``key=value``, in the order of the file.
        reference: the arm that the others are compared with.
        seeds: one run of each arm for each of them.
    """

    name: str
    folder: Path
    base: tuple[Path, ...]
    overrides: tuple[str, ...]
    arms: dict[str, tuple[str, ...]]
    reference: str
    seeds: tuple[int, ...]

    def config(self, arm: str) -> Config:
        """What the runs of an arm have in common.

        Raises:
            ConfigError: with the name of the arm.
        """
        try:
            return load_config(self.base, [*self.overrides, *self.arms[arm]])
        except ConfigError as error:
            raise ConfigError([f"arm {arm}: {text}" for text in error.problems]) from error


def read_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study file and check all of its arms.

    Args:
        path: yaml with ``base`` (a configuration file or a list, relative to this file),
            ``folder``, ``overrides``, ``reference``, ``seeds`` (how many, or a list) and ``arms``;
            ``include`` names a file or a list whose overrides and arms come before its own.
        overrides: ``key=value`` of the command line: ``folder``, ``reference`` and ``seeds`` of the
            study; any other key is of the configuration of all runs.

    Raises:
        ConfigError: with everything that is wrong.
    """
    source = _Source.read(path)
    common = source.apply(overrides)
    base = source.names("base", required=True)
    arms = source.arms()
    study = Study(
        name=path.stem,
        folder=Path(source.text("folder", f"runs/compare_{path.stem}")),
        base=tuple(Path(os.path.normpath(path.parent / name)) for name in base),
        overrides=(*source.names("overrides"), *common),
        arms=arms,
        reference=source.text("reference", "detach"),
        seeds=source.seeds(),
    )
    source.check_reference(study)
    if source.problems:
        raise ConfigError(source.problems)
    problems = _arm_problems(study)
    if problems:
        raise ConfigError([f"{path}: {text}" for text in problems])
    return study


@dataclass
class _Source:
    """Values of a study file, where each stands, and what was found to be wrong with them."""

    path: str
    data: dict[str, Any]
    origins: dict[str, str]
    problems: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path, by: str = "") -> _Source:
        """Values of a file, after those of the files that it includes."""
        document = read_mapping(path, by)
        origins = {key: f"{path}:{line}" for key, line in document.lines.items()}
        source = cls(str(path), dict(document.data), origins)
        source.check_keys(_INCLUDED if by else _KEYS)
        # one level of files: an included one that includes is refused above
        for name in () if by else reversed(source.names("include")):
            source.follow(cls.read(path.parent / name, f", included by {path}"))
        return source

    def follow(self, other: _Source) -> None:
        """Put the values of an included file before these."""
        own = self.data
        words = [*other.names("overrides"), *self.names("overrides")]
        self.data = other.data | own | {"overrides": words}
        if "arms" in other.data and isinstance(own.get("arms", {}), dict):
            arms = {name: list(words) for name, words in other.arms().items()}
            self.data["arms"] = arms | own.get("arms", {})
        self.origins = other.origins | self.origins
        self.problems += other.problems

    def apply(self, overrides: Sequence[str]) -> list[str]:
        """Take the study's own keys from ``overrides``; return the others."""
        others = []
        for text in overrides:
            key, equals, _ = text.partition("=")
            if not equals or key.strip() not in _FROM_COMMAND_LINE:
                others.append(text)
                continue
            # as the value of any key that takes anything
            (given,) = read_override(f"data.task.params.x={text.partition('=')[2]}")
            self.data[key.strip()] = given.value
            self.origins.pop(key.strip(), None)
        return others

    def refuse(self, key: str, text: str) -> None:
        """Write down a problem of a key."""
        self.problems.append(f"{self.origins.get(key, self.path)}: {text}")

    def check_keys(self, known: Sequence[str]) -> None:
        """Every key must be known, and belong into such a file."""
        for key in self.data:
            if key in _KEYS and key not in known:
                self.refuse(key, f"{key}: belongs into the study itself, not into what it includes")
            elif key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f"Did you mean {close[0]}?" if close else f"There are: {', '.join(known)}"
                self.refuse(key, f"unknown key {key} of a study. {hint}")

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self.data.get(key, default)
        if not isinstance(value, str) or not value:
            self.refuse(key, f"{key} = {spell(value)}: must be a string")
            return default
        return value

    def names(self, key: str, *, required: bool = False) -> tuple[str, ...]:
        """A string or a list of strings."""
        value = self.data.get(key, [])
        entries = [value] if isinstance(value, str) else value
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            self.refuse(key, f"{key} = {spell(value)}: must be a string or a list of strings")
            return ()
        if required and not entries:
            self.refuse(key, f"{key} is missing: name the configuration file of all runs")
        return tuple(entries)

    def seeds(self) -> tuple[int, ...]:
        """The seeds: 3 means 0, 1, 2."""
        value = self.data.get("seeds", 8)
        is_count = isinstance(value, int) and not isinstance(value, bool)
        found = list(range(value)) if is_count else value
        good = isinstance(found, list) and all(type(seed) is int and seed >= 0 for seed in found)
        if not good or not found or len(set(found)) < len(found):
            self.refuse(
                "seeds",
                f"seeds = {spell(value)}: must be how many (8 means 0 to 7), or a list of "
                "different integers >= 0",
            )
            return (0,)
        return tuple(found)

    def arms(self) -> dict[str, tuple[str, ...]]:
        """Name of each arm to its overrides."""
        value = self.data.get("arms")
        if not isinstance(value, dict) or not value:
            self.refuse("arms", f"arms = {spell(value)}: must map names to lists of key=value")
            return {}
        found = {}
        for name, overrides in value.items():
            key = f"arms.{name}"
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                self.refuse(key, f"arm {spell(name)}: a name is letters, digits, '_', '-' and '.'")
            elif not isinstance(overrides, list) or not all(isinstance(o, str) for o in overrides):
                self.refuse(
                    key,
                    f"arm {name} = {spell(overrides)}: must be a list of key=value; one with a "
                    "comma or a bracket in quotes",
                )
            else:
                found[name] = tuple(overrides)
        return found

    def check_reference(self, study: Study) -> None:
        """The reference must be an arm, and there must be another one."""
        if not study.arms:
            return
        if study.reference not in study.arms:
            close = difflib.get_close_matches(study.reference, study.arms, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"Arms: {', '.join(study.arms)}"
            self.refuse("reference", f"reference = {study.reference}: is no arm. {hint}")
        elif len(study.arms) == 1:
            self.refuse("arms", f"arms: {study.reference} alone has nothing to be compared with")


def _arm_problems(study: Study) -> list[str]:
    """Everything that is wrong with the configurations of the arms, each problem once."""
    problems = _forbidden("overrides", study.overrides, tuple(_SET_HERE))
    for arm, overrides in study.arms.items():
        problems += _forbidden(f"arm {arm}", overrides, (*_SET_HERE, *_COMMON))
    if problems:
        return problems
    for arm in study.arms:
        try:
            config = study.config(arm)
            validate(config, command="rl", world_size=1)
            problems += _start_problems(config)
        except ConfigError as error:
            problems += [text.removeprefix(f"arm {arm}: ") for text in error.problems]
    return list(dict.fromkeys(problems))


def _forbidden(where: str, overrides: Sequence[str], keys: tuple[str, ...]) -> list[str]:
    problems = []
    for text in overrides:
        for given in read_override(text):
            hit = next((key for key in keys if given.key == key or _is_in(given.key, key)), None)
            if hit is None:
                continue
            reason = _SET_HERE.get(
                hit,
                "it is the same for all arms of a study, or they would not be paired. Give it "
                "in the study's overrides",
            )
            problems.append(f"{where}: {text}: {reason}")
    return problems


def _is_in(key: str, section: str) -> bool:
    return section.endswith(".") and key.startswith(section)


def _start_problems(config: Config) -> list[str]:
    if config.model.from_hf is not None:
        return [
            f"model.from_hf={config.model.from_hf}: each run would convert it again. Convert it "
            "once (`megatron-occ convert import`) and give rl.init_from=<checkpoint>"
        ]
    if config.rl.init_from is None and config.pretrain.steps == 0:
        return [
            "pretrain.steps=0: the arms would start from random weights of their own. Give "
            "rl.init_from=<checkpoint>, or pretrain.steps"
        ]
    return []


def differences(config: Config, other: Config, ignored: Sequence[str] = ()) -> dict[str, list]:
    """Keys in which two configurations differ, each with both values.

    Args:
        ignored: keys, or sections that end in ``.``, to leave out.
    """
    mine, others = flat_values(config), flat_values(other)
    return {
        key: [mine[key], others[key]]
        for key in mine
        if mine[key] != others[key]
        and not any(key == entry or _is_in(key, entry) for entry in ignored)
    }
