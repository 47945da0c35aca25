"""Several runs together: read, told apart by name and colour, and what their configurations say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_occ.observe.plot import COLORS
from megatron_occ.observe.run_data import RunData, load_run

NOTHING = "\N{EN DASH}"
# each colour as a solid and as a dashed line
MOST_RUNS = 2 * COLORS
# what says which problems a run is about; the others say how it trains
_TASK_KEYS = (
    "data.task.name",
    "data.task.params",
    "data.prompts",
    "data.validation_prompts",
    "data.corpus",
)
# mappings whose entries are names that a user chose: one value each
_OPEN_KEYS = (
    "data.task.params",
    "data.prompts",
    "data.validation_prompts",
    "data.verifiers",
    "data.chat.kwargs",
)
_OWN_KEYS = ("run_dir",)


@dataclass(frozen=True)
class LabelledRun:
    """A run with the name and the line that stand for it in every plot and table."""

    label: str
    color: int
    dashed: bool
    data: RunData
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Differences:
    """Keys in which configurations differ.

    `values` holds a value for each run in order, a dash for one without a configuration. `lacking`
    are keys that some of the configurations do not have, as those written by another version of
    the program.
    """

    values: dict[str, list[Any]]
    lacking: list[str]


def load_several(folders: Sequence[Path]) -> list[LabelledRun]:
    """Read run folders, in the order given.

    Raises ValueError, which names every folder at fault: too many, the same one twice, not a
    folder, no run, or a run that has logged nothing yet.
    """
    problems = _problems_of_list(folders)
    runs: list[RunData] = []
    for folder in folders if not problems else ():
        try:
            runs.append(load_run(folder))
        except FileNotFoundError:
            problems.append(f"{folder} is not a folder: name the run_dir of a run")
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))
    return [
        LabelledRun(label, 1 + place % COLORS, place >= COLORS, run, flat_settings(run.rl_config))
        for place, (label, run) in enumerate(zip(labels_of(folders), runs, strict=True))
    ]


def _problems_of_list(folders: Sequence[Path]) -> list[str]:
    problems = []
    if len(folders) > MOST_RUNS:
        problems.append(
            f"{len(folders)} run folders: {MOST_RUNS} can be told apart in a plot. Name fewer, or "
            "compare them as a study with megatron-occ compare"
        )
    counts = Counter(folder.resolve() for folder in folders)
    for folder in (folder for folder, count in counts.items() if count > 1):
        given = " and ".join(str(f) for f in folders if f.resolve() == folder)
        problems.append(f"{given} are the same folder: name it once")
    return problems


def labels_of(folders: Sequence[Path]) -> list[str]:
    """The shortest end of each path that tells it from all others: `detach/seed_0`, `demo`."""
    parts = [folder.resolve().parts for folder in folders]
    return [_label(own, [other for other in parts if other != own]) for own in parts]


def _label(own: tuple[str, ...], others: Sequence[tuple[str, ...]]) -> str:
    for length in range(1, len(own)):
        if all(own[-length:] != other[-length:] for other in others):
            return "/".join(own[-length:])
    return "/".join(own)


def flat_settings(text: str) -> dict[str, Any]:
    """The values of a `config.yaml` by dotted key; {} for one that can't be read."""
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return _flat(document, "") if isinstance(document, dict) else {}


def _flat(node: dict, prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in _OPEN_KEYS:
            found |= _flat(value, f"{key}.")
        else:
            found[key] = value
    return found


def differences(runs: Sequence[LabelledRun]) -> Differences:
    """Keys in which the configurations differ; where the run is written says nothing of it."""
    known = [run.settings for run in runs if run.settings]
    keys = list(dict.fromkeys(key for settings in known for key in settings))
    shared = [key for key in keys if all(key in settings for settings in known)]
    differing = [
        key
        for key in shared
        if key not in _OWN_KEYS and any(each[key] != known[0][key] for each in known)
    ]
    values = {key: [run.settings.get(key, NOTHING) for run in runs] for key in differing}
    return Differences(values, sorted(set(keys) - set(shared)))


def setting_text(value: object, longest: int = 200) -> str:
    """A value of a configuration as YAML spells it, cut where it is longer than `longest`."""
    dumped = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    text = dumped.removesuffix("...\n").strip()
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def remarks(runs: Sequence[LabelledRun]) -> list[str]:
    """What a reader should know before comparing numbers, a sentence each."""
    found = []
    silent = [run.label for run in runs if not run.settings]
    if silent:
        found.append(f"No configuration was found of {', '.join(silent)}: it is not compared.")
    differing = differences(runs).values
    tasks = [key for key in _TASK_KEYS if key in differing]
    if tasks:
        found.append(
            f"These runs are about different problems ({', '.join(tasks)}): their pass@1 and "
            "rewards measure different things."
        )
    found += _phase_remarks(runs)
    return found


def _phase_remarks(runs: Sequence[LabelledRun]) -> list[str]:
    found = []
    with_rl = [run.data.last_step("rl") is not None for run in runs]
    if any(with_rl) and not all(with_rl):
        without = [run.label for run, has in zip(runs, with_rl, strict=True) if not has]
        found.append(f"No RL step in {', '.join(without)}: only pretraining is shown of it.")
    going = [f"{run.label} ({run.data.status})" for run in runs if not run.data.finished]
    if going:
        found.append(f"Not at its end: {', '.join(going)}.")
    return found
