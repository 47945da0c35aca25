"""Folders of checkpoints: their names, what of them is whole, and which of them stay.

Beside Megatron's files a checkpoint has ``checksums.json``: size and SHA-256 of every one of them,
those of tensors by the rank that wrote them.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_occ.config.machine import flush
from megatron_occ.convert.kinds import CHECKPOINT_FILE

CHECKSUMS_FILE = "checksums.json"
_BROKEN = ".broken"
_PARTS = "checksums_{:06d}.json"
_NAME = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class Keep:
    """Which checkpoints of a phase stay.

    Attributes:
        newest: so many of the newest.
        best: so many of the best on validation, besides.
        every: those of steps that this divides, besides; None: none.
    """

    newest: int
    best: int = 0
    every: int | None = None

    def kept(self, steps: Sequence[int], scores: Mapping[int, float]) -> set[int]:
        """Of the given steps, oldest first, those that stay.

        Args:
            steps: of the checkpoints that there are.
            scores: of steps that were validated, larger is better; of equal ones the first stays.
        """
        measured = sorted((-scores[step], step) for step in steps if step in scores)
        kept = {*steps[-self.newest :], *(step for _, step in measured[: self.best])}
        return kept | {step for step in steps if self.every and step % self.every == 0}


def checkpoint_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step_{step:06d}"


def step_of(path: Path) -> int:
    """Step that a checkpoint's name tells, 0 for one that is named otherwise."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else 0


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints of a phase as (step, path), oldest first."""
    found = [(_NAME.fullmatch(path.name), path) for path in folder.glob("step_*")]
    return sorted((int(match[1]), path) for match, path in found if match)


def remove_old(folder: Path, keep: Keep, scores: Mapping[int, float]) -> None:
    """Remove the checkpoints that do not stay, and broken ones older than all; on one rank."""
    found = dict(list_checkpoints(folder))
    kept = keep.kept(list(found), scores)
    for step in sorted(found.keys() - kept):
        discard(found[step])
    for broken in folder.glob(f"step_*{_BROKEN}"):
        if step_of(broken.with_suffix("")) < min(kept, default=0):
            shutil.rmtree(broken, ignore_errors=True)


def discard(path: Path) -> None:
    """Remove a folder, if there is one, so that half of it never has its name; on one rank.

    What can't be removed, as another process reads it over NFS, stays under another name.
    """
    shutil.rmtree(_moved_away(path), ignore_errors=True)


def replace_folder(new: Path, target: Path) -> None:
    """Give a whole checkpoint its name, in place of what has it now; on one rank."""
    # to the disk, before older checkpoints are removed for this one
    for path in (*new.iterdir(), new):
        flush(path)
    old = _moved_away(target)
    new.rename(target)
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _moved_away(path: Path) -> Path:
    away = path.with_suffix(".old")
    shutil.rmtree(away, ignore_errors=True)
    if path.exists():
        path.rename(away)
    return away


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, on one rank, so that nothing takes it for one; where it is."""
    target = path.with_suffix(_BROKEN)
    shutil.rmtree(target, ignore_errors=True)
    return path.rename(target)


def write_checksums(folder: Path, rank: int, files: Sequence[Path]) -> None:
    """Those of the files that a rank has written to a checkpoint."""
    found = {file.name: _sum_of(file) for file in files if file.is_file()}
    (folder / _PARTS.format(rank)).write_text(json.dumps(found))


def gather_checksums(folder: Path) -> None:
    """One file in place of those of the ranks, with what no rank has counted; on one rank."""
    found: dict[str, list] = {}
    for part in sorted(folder.glob("checksums_*.json")):
        found |= json.loads(part.read_text())
        part.unlink()
    rest = [f for f in folder.iterdir() if f.name not in (*found, CHECKPOINT_FILE)]
    found |= {file.name: _sum_of(file) for file in rest}
    (folder / CHECKSUMS_FILE).write_text(json.dumps(found, indent=1))


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, None if they are whole; called by all ranks.

    Each rank reads a share of them. One that never had checksums, of an earlier version or a
    converter, is looked at no further.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found: list[str | None] = [None] * world
    torch.distributed.all_gather_object(found, _damage_of_share(path, rank, world))
    return next((text for text in found if text), None)


def _damage_of_share(path: Path, rank: int, world: int) -> str | None:
    # whatever is wrong: the other ranks wait for this one's word
    try:
        return _first_damage(path, rank, world)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{error}"


def _first_damage(path: Path, rank: int, world: int) -> str | None:
    meta = json.loads((path / CHECKPOINT_FILE).read_text())
    sums = path / CHECKSUMS_FILE
    if meta.get("has_checksums") and not sums.is_file():
        return f"{CHECKSUMS_FILE} is missing"
    expected = json.loads(sums.read_text()) if sums.is_file() else {}
    for name in sorted(expected)[rank::world]:
        file, (size, digest) = path / name, expected[name]
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, {size} were written"
        if _sum_of(file)[1] != digest:
            return f"{name} is not what was written (its SHA-256 differs)"
    return None


def _sum_of(file: Path) -> tuple[int, str]:
    """Size in bytes and SHA-256 of a file."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return file.stat().st_size, digest
