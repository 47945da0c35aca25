"""The runs of a study: where each lies, how far it is, and the command that does it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_occ.compare.study import Study, differences
from megatron_occ.config import Config, ConfigError, load_config, pretrains_first
from megatron_occ.config.keys import spell
from megatron_occ.observe.jsonl import read_records
from megatron_occ.observe.metrics import LOCK_FILE, METRICS_FILE

# what a run may differ in from what its study says: bookkeeping, not what a step computes
_FREE = ("run_dir", "keep_checkpoints", "rl.save_every", "log.", "alerts.", "profile.")
# what pretraining does not read
_NOT_OF_PRETRAINING = ("mtp.preset", "mtp.trunk.", "mtp.head.", "rl.")


@dataclass(frozen=True)
class RunSpec:
    """One run of a study, or the pretraining that all of them start from.

    Attributes:
        title: for people: ``detach seed 3``.
        folder: its run folder.
        log: file that its output goes to; beside the folder, which has to be empty at first.
        command: ``pretrain`` or ``rl``.
        base: configuration files.
        overrides: all ``key=value``.
        arm, seed: which run it is; empty and -1 for pretraining.
    """

    title: str
    folder: Path
    log: Path
    command: str
    base: tuple[Path, ...]
    overrides: tuple[str, ...]
    arm: str = ""
    seed: int = -1

    @property
    def state(self) -> str:
        """``missing``, ``unfinished`` or ``finished``, by the run's own log."""
        # a run that was killed at its start has left its lock's file at most
        if not self.folder.is_dir() or {p.name for p in self.folder.iterdir()} <= {LOCK_FILE}:
            return "missing"
        last = None
        for record in read_records(self.folder / METRICS_FILE):
            if record.get("phase") in ("pretrain", "rl") or record.get("kind"):
                last = record.get("kind")
        return "finished" if last == "finished" else "unfinished"

    @property
    def config(self) -> Config:
        """What the study says the run is."""
        return load_config(self.base, self.overrides)

    def words(self) -> list[str]:
        """The command line; an unfinished run goes on."""
        files = [word for path in self.base for word in ("--config", str(path))]
        words = [sys.executable, "-m", "megatron_occ", self.command, *files, *self.overrides]
        return words if self.state == "missing" else [*words, "--resume"]

    def changes(self) -> list[str]:
        """How the run that lies in the folder differs from what the study says; [] if not."""
        saved = self.folder / "config.yaml"
        if not saved.is_file():
            return []
        ignored = (*_FREE, *(_NOT_OF_PRETRAINING if self.command == "pretrain" else ()))
        found = differences(load_config([saved]), self.config, ignored)
        return [f"{key} was {spell(a)}, is {spell(b)}" for key, (a, b) in found.items()]


def start_run(study: Study) -> RunSpec | None:
    """The pretraining that a study does first; None where it is given a checkpoint."""
    if not pretrains_first(study.config(study.reference)):
        return None
    folder = study.folder / "start"
    return RunSpec(
        title="pretraining",
        folder=folder,
        log=study.folder / "logs" / "start.log",
        command="pretrain",
        base=study.base,
        overrides=(*study.overrides, f"run_dir={folder}", "keep_checkpoints=1"),
    )


def start_checkpoint(study: Study) -> Path:
    """The checkpoint that all arms start from.

    Raises:
        ConfigError: the study pretrains, and has not done so.
    """
    given = study.config(study.reference).rl.init_from
    if given is not None:
        return Path(given)
    folder = study.folder / "start" / "checkpoints" / "pretrain"
    found = sorted(path for path in folder.glob("step_*") if path.suffix != ".tmp")
    if not found:
        raise ConfigError(
            f"{folder} holds no checkpoint: the study has not pretrained yet. Run the command "
            "without --share once, with --start-only if it is to stop there"
        )
    return found[-1]


def study_runs(study: Study, start: Path | str) -> list[RunSpec]:
    """All runs in the order in which they are done: seeds outermost, so that any part is balanced.

    Args:
        start: checkpoint of all runs.
    """
    return [_run(study, arm, seed, start) for seed in study.seeds for arm in study.arms]


def _run(study: Study, arm: str, seed: int, start: Path | str) -> RunSpec:
    folder = study.folder / "runs" / arm / f"seed_{seed}"
    own = (f"rl.init_from={start}", f"seed={seed}", f"run_dir={folder}", "keep_checkpoints=1")
    return RunSpec(
        title=f"{arm} seed {seed}",
        folder=folder,
        log=study.folder / "logs" / f"{arm}.seed_{seed}.log",
        command="rl",
        base=study.base,
        overrides=(*study.overrides, *study.arms[arm], *own),
        arm=arm,
        seed=seed,
    )


def check_runs(runs: list[RunSpec]) -> None:
    """Refuse runs that were made by another study file.

    Raises:
        ConfigError: naming each of them and what differs.
    """
    changed = [(run, run.changes()) for run in runs]
    problems = [
        f"{run.folder}: {', '.join(found)}. Put the study back as it was, delete that folder, or "
        "give another folder=..."
        for run, found in changed
        if found
    ]
    if problems:
        raise ConfigError(problems)
