"""From a Hugging Face folder to a distributed checkpoint that any layout can load."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_occ.config.identity import describe, free_settings
from megatron_occ.convert.distributed import DistributedWriter
from megatron_occ.convert.dtypes import dtype_name
from megatron_occ.convert.errors import FolderError
from megatron_occ.convert.fresh import fresh_weights
from megatron_occ.convert.kinds import CHECKPOINT_FILE
from megatron_occ.convert.plan import ImportPlan, MTPChoice, open_source, plan_import
from megatron_occ.convert.shards import split_into_files
from megatron_occ.convert.slots import Slot
from megatron_occ.convert.source import Source
from megatron_occ.convert.tokenizer_files import copy_side_files, has_tokenizer
from megatron_occ.convert.workspace import Workspace
from megatron_occ.data.tokenizers import HFTokenizer
from megatron_occ.observe.progress import Progress

logger = logging.getLogger(__name__)

# bytes of a file of the checkpoint, of which a part that was interrupted is written again
PART = 1 << 30
# in the checkpoint: what lay beside the weights, for the way back
SIDE_FOLDER = "hugging_face"


@dataclass(frozen=True)
class Imported:
    """What was done.

    Args:
        plan: of the conversion.
        written: parts written by this call; the others were there.
        parts: of the checkpoint.
    """

    plan: ImportPlan
    written: int
    parts: int


def import_folder(
    folder: Path,
    target: Path,
    *,
    mtp: MTPChoice,
    dtype: torch.dtype | None = None,
    force: bool = False,
    part: int = PART,
    megatron_core: str | None = None,
) -> Imported:
    """Convert a folder; continues where an interrupted call of the same conversion ended.

    One tensor is in memory at a time, with those that it is made of.

    Args:
        folder: Hugging Face's.
        target: the checkpoint.
        mtp: what becomes of the MTP layers.
        dtype: of the checkpoint; None: each tensor keeps its own (fp8 becomes bf16).
        force: replace the target.
        part: bytes of a file of the checkpoint.
        megatron_core: version whose format this is, for ``meta.json``.

    Raises:
        FolderError: the folder can't be converted, or the target is there.
    """
    source = open_source(folder)
    plan = plan_import(source, mtp, dtype)
    meta = _meta(source, plan, megatron_core)
    parts = split_into_files([move.slot for move in plan.moves], plan.size, part)
    _compare_duplicates(source, plan)
    workspace = Workspace(folder, target, _identity(source, plan, parts, meta), force=force)
    by_name = {move.slot.name: move for move in plan.moves}
    writer = DistributedWriter(workspace.folder, parts, plan.dtypes)
    done = sum(len(slots) for number, slots in enumerate(parts) if writer.is_written(number))
    written = 0
    with Progress(len(plan.moves), "import", done) as progress:

        def read(slot: Slot) -> Tensor:
            nonlocal done
            move = by_name[slot.name]
            done += 1
            progress.update(done)
            if not move.theirs:
                return fresh_weights(slot, plan.config.model)
            theirs = [source.tensor(name) for name in move.theirs]
            return move.transform.join(theirs, plan.config.model)

        for number in range(len(parts)):
            if not writer.is_written(number):
                writer.write(number, read)
                written += 1
    writer.finish()
    side = workspace.folder / SIDE_FOLDER
    copy_side_files(folder, side)
    shutil.copyfile(folder / "config.json", side / "config.json")
    (workspace.folder / CHECKPOINT_FILE).write_text(json.dumps(meta, indent=1))
    workspace.publish()
    return Imported(plan, written, len(parts))


def _meta(source: Source, plan: ImportPlan, megatron_core: str | None) -> dict[str, Any]:
    """``meta.json``: as a run writes it, and what the way back needs to know."""
    singles = [move for move in plan.moves if move.slot.single and move.theirs]
    return {
        **describe(plan.config, _tokenizer_state(source.folder), {}),
        "step": 0,
        "free": free_settings(plan.config),
        "megatron_core": megatron_core,
        "source": {
            "architecture": plan.family.architecture,
            "mtp_layers": plan.source_depths,
            "duplicates": any(name.startswith("model.layers.") for name in plan.duplicates),
            "expert_bias": dtype_name(source.dtype(singles[0].theirs[0])) if singles else None,
        },
    }


def _tokenizer_state(folder: Path) -> dict[str, Any] | None:
    """None where the folder has no tokenizer: the checkpoint then goes with any."""
    if not has_tokenizer(folder):
        return None
    try:
        return HFTokenizer(folder).state()
    except ValueError as error:
        logger.warning("the checkpoint will go with any tokenizer: %s", error)
        return None


def _identity(
    source: Source, plan: ImportPlan, parts: list[list[Slot]], meta: dict[str, Any]
) -> Any:
    """What an interrupted conversion must agree on to be continued: plan and files."""
    files = sorted({entry.file for entry in source.entries.values()})
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    moves = [
        (
            move.slot.name,
            move.theirs,
            type(move.transform).__name__,
            str(plan.dtypes[move.slot.name]),
        )
        for move in plan.moves
    ]
    return [str(source.folder.resolve()), stats, moves, [len(part) for part in parts], meta]


def _compare_duplicates(source: Source, plan: ImportPlan) -> None:
    problems = []
    for name, original in plan.duplicates.items():
        entry, other = source.entries[name], source.entries[original]
        same = (entry.shape, entry.dtype) == (other.shape, other.dtype)
        if same and torch.equal(source.tensor(name), source.tensor(original)):
            continue
        reason = "which MTP layers of this family share with the trunk"
        if name == "lm_head.weight":
            reason = (
                "to which config.json ties it (tie_word_embeddings=true). If the model has an "
                "output layer of its own, set that to false"
            )
        problems.append(
            f"{entry.file}: {name} is not the same as {original} ({other.file.name}), {reason}"
        )
    if problems:
        raise FolderError(problems)
