"""What becomes of every tensor of a folder, decided before a byte is copied."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_occ.config import ConfigError, load_config
from megatron_occ.config.schema import Config
from megatron_occ.config.schema_model import ModelConfig
from megatron_occ.convert.depths import (
    MTPChoice,
    below,
    mtp_prefix,
    source_depths,
    wanted_depths,
)
from megatron_occ.convert.dtypes import FP8, dtype_name, usual_dtype
from megatron_occ.convert.errors import FolderError
from megatron_occ.convert.families import family_of
from megatron_occ.convert.fresh import FRESH
from megatron_occ.convert.slots import Slot, model_slots
from megatron_occ.convert.source import SCALE, Source, read_config
from megatron_occ.convert.table import Family, Move, expand

# of a list of tensors in a message
_SHOWN = 20


@dataclass(frozen=True)
class ImportPlan:
    """A folder's conversion.

    Args:
        family: of the folder.
        config: our configuration: section ``model`` and ``mtp.num_layers``.
        moves: one for each parameter; a move without names is a fresh one, see ``fresh``.
        dtypes: of each parameter in the checkpoint, by name.
        duplicates: tensors that repeat another one, by name.
        dropped: tensors that are left behind on request.
        source_depths: MTP depths of the folder.
    """

    family: Family
    config: Config
    moves: list[Move]
    dtypes: dict[str, torch.dtype]
    duplicates: dict[str, str]
    dropped: list[str]
    source_depths: int

    @property
    def bytes(self) -> int:
        """Of all parameters in the checkpoint."""
        return sum(self.size(move.slot) for move in self.moves)

    def size(self, slot: Slot) -> int:
        """Bytes of a parameter in the checkpoint."""
        return math.prod(slot.shape) * self.dtypes[slot.name].itemsize


def open_source(folder: Path) -> Source:
    """A folder whose ``config.json`` describes a model that can be converted.

    Raises:
        FolderError: one that can't, before any of its files is missed; then as :class:`Source`.
    """
    read_model(folder, read_config(folder))
    return Source(folder)


def plan_import(source: Source, mtp: MTPChoice, dtype: torch.dtype | None) -> ImportPlan:
    """Account for every tensor.

    Args:
        source: the folder.
        mtp: what becomes of its MTP layers.
        dtype: of the checkpoint; None: each tensor keeps its own (fp8 becomes bf16).

    Raises:
        FolderError: a family that can't be converted; tensors that are missing, unknown, or of
            another shape or dtype than ``config.json`` says.
    """
    family, config = read_model(source.folder, source.config)
    found = source_depths(source, family, config, mtp)
    depths = wanted_depths(mtp, found, family)
    config.mtp.num_layers = depths
    model, rows = config.model, config.model.vocab_size
    assert rows is not None, "every family reads it"
    kept = min(depths, found)
    moves = list(expand(family, model, model_slots(model, kept, rows)))
    everything = moves + _more_depths(model_slots(model, depths, rows), moves, kept, mtp)
    duplicates = _duplicates(source, family, model, kept)
    dropped = [
        name
        for depth in range(kept, found)
        for name in below(source, mtp_prefix(family, model.num_layers, depth))
    ]
    _account(source, family, moves, [*duplicates, *dropped])
    _check(source, moves, config)
    dtypes = _dtypes(source, everything, dtype)
    return ImportPlan(family, config, everything, dtypes, duplicates, sorted(dropped), found)


def read_model(folder: Path, content: Mapping[str, Any]) -> tuple[Family, Config]:
    """The family of a folder, and our configuration of its model and MTP depths.

    Args:
        folder: for messages.
        content: of its ``config.json``.

    Raises:
        FolderError: what ``config.json`` asks for that can't be built.
    """
    file = folder / "config.json"
    try:
        family = family_of(content)
        config = model_config(family.read(content))
        config.mtp.num_layers = family.stated_depths(content)
        return family, config
    except ConfigError as error:
        raise FolderError([f"{file}: {problem}" for problem in error.problems]) from None
    except ValueError as error:
        raise FolderError(f"{file}: {error}") from None


def model_config(settings: dict[str, Any]) -> Config:
    """A configuration with these values of section ``model``."""
    given = [f"model.{key}={json.dumps(value)}" for key, value in settings.items()]
    return load_config([], given)


def _duplicates(source: Source, family: Family, model: ModelConfig, depths: int) -> dict[str, str]:
    """Tensors of the folder that repeat another one."""
    names = family.duplicate_names(model, depths)
    if model.tie_embeddings:
        names["lm_head.weight"] = family.embedding
    return {name: original for name, original in names.items() if name in source.entries}


def _more_depths(
    slots: dict[str, Slot], moves: list[Move], kept: int, mtp: MTPChoice
) -> list[Move]:
    """Moves of the depths that the folder does not have."""
    by_name = {move.slot.name: move for move in moves}
    extra = []
    for slot in slots.values():
        if slot.name in by_name:
            continue
        if mtp.kind == "init":
            extra.append(Move(slot, (), FRESH))
            continue
        last = re.sub(r"^mtp\.layers\.\d+\.", f"mtp.layers.{kept - 1}.", slot.name)
        extra.append(replace(by_name[last], slot=slot))
    return extra


def _account(source: Source, family: Family, moves: list[Move], others: list[str]) -> None:
    """Every tensor has a place, and every place a tensor."""
    used = {name for move in moves for name in move.theirs}
    missing = sorted(used - source.entries.keys())
    scales = {n + SCALE for n, e in source.entries.items() if e.dtype == FP8}
    known = used | set(others) | (scales & source.entries.keys())
    unknown = [
        name
        for name in sorted(source.entries.keys() - known)
        if not any(re.fullmatch(pattern, name) for pattern in family.ignored)
    ]
    problems = []
    if missing:
        problems.append(f"{source.folder}: {_listed(missing, 'is missing', 'are missing')}")
    for name in unknown[:_SHOWN]:
        file = source.entries[name].file
        problems.append(f"{file}: {name} has no place in {family.architecture} as configured")
    if len(unknown) > _SHOWN:
        problems.append(f"{source.folder}: and {len(unknown) - _SHOWN} more without a place")
    lost = sorted(scales - source.entries.keys())
    problems += [
        f"{source.entries[n.removesuffix(SCALE)].file}: {n.removesuffix(SCALE)} is fp8, and its "
        f"scales {n} are missing"
        for n in lost[:_SHOWN]
        if n.removesuffix(SCALE) in used
    ]
    if problems:
        raise FolderError(problems)


def _listed(names: list[str], one: str, many: str) -> str:
    if len(names) == 1:
        return f"{names[0]} {one}"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more} {many}"


def _check(source: Source, moves: Iterable[Move], config: Config) -> None:
    """Shapes as the model has them, and one dtype for what becomes one tensor."""
    problems = []
    for move in moves:
        shapes = move.transform.shapes(move.slot.shape, config.model)
        for name, shape in zip(move.theirs, shapes, strict=True):
            entry = source.entries[name]
            if entry.shape != shape:
                problems.append(
                    f"{entry.file}: {name} has the shape {list(entry.shape)}, config.json makes it "
                    f"{list(shape)}"
                )
        dtypes = {source.dtype(name) for name in move.theirs}
        if len(dtypes) > 1:
            file, names = source.entries[move.theirs[0]].file, ", ".join(move.theirs)
            problems.append(f"{file}: {names} have different dtypes: {_spelled(dtypes)}")
    if problems:
        raise FolderError(problems)


def _dtypes(
    source: Source, moves: Sequence[Move], wanted: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Of each parameter in the checkpoint; fresh ones have that of the others."""
    read = [move for move in moves if move.theirs]
    found = {move.slot.name: wanted or source.dtype(move.theirs[0]) for move in read}
    usual = usual_dtype(found.values())
    dtypes = {
        move.slot.name: torch.float32 if move.slot.single else found.get(move.slot.name, usual)
        for move in moves
    }
    _check_stacks(moves, dtypes)
    return dtypes


def _check_stacks(moves: Sequence[Move], dtypes: dict[str, torch.dtype]) -> None:
    """A checkpoint's tensor has one dtype, whatever layers are stacked in it."""
    found: dict[str, set[torch.dtype]] = {}
    for move in moves:
        found.setdefault(move.slot.key, set()).add(dtypes[move.slot.name])
    problems = [
        f"{key}: the layers have different dtypes ({_spelled(kinds)}). Give --dtype"
        for key, kinds in found.items()
        if len(kinds) > 1
    ]
    if problems:
        raise FolderError(problems)


def _spelled(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(map(dtype_name, dtypes)))
