"""A checkpoint of this project, converted or of a run, as a Hugging Face folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_occ.config.schema import Config
from megatron_occ.config.words import counted
from megatron_occ.convert.distributed import DistributedReader
from megatron_occ.convert.errors import FolderError
from megatron_occ.convert.exporting import SHARD, ExportPlan, plan_export, write_weights
from megatron_occ.convert.families.dense import MIMO
from megatron_occ.convert.kinds import CHECKPOINT_FILE, what_it_is
from megatron_occ.convert.origin import origin_of
from megatron_occ.convert.plan import model_config
from megatron_occ.convert.source import read_config, read_json
from megatron_occ.convert.tokenizer_files import (
    copy_side_files,
    has_tokenizer,
    write_characters,
)
from megatron_occ.convert.workspace import Workspace
from megatron_occ.data.tokenizers import CharTokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says of itself.

    Args:
        folder: of the checkpoint.
        meta: content of its ``meta.json``.
        config: section ``model`` and ``mtp.num_layers``.
        vocab_size: ids that exist.
    """

    folder: Path
    meta: dict[str, Any]
    config: Config
    vocab_size: int


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read ``meta.json``.

    Raises:
        FolderError: there is none, or it lacks entries.
    """
    file = folder / CHECKPOINT_FILE
    if not file.is_file():
        found = what_it_is(
            folder,
            other="`convert import` makes a checkpoint of it",
            usual="Give a folder such as .../checkpoints/rl/step_000100",
        )
        raise FolderError(f"{folder}: is no checkpoint of this project: {found}")
    meta = read_json(file)
    try:
        model = {**meta["model"], **meta.get("free", {})}
        config = model_config(dict(_flat("", model)))
        config.mtp.num_layers = meta["mtp_layers"]
    except (KeyError, TypeError, ValueError) as error:
        raise FolderError(f"{file}: can't be read: {error!r}") from None
    return Checkpoint(folder, meta, config, _vocabulary(meta, config, file))


def export_checkpoint(
    checkpoint: Path,
    target: Path,
    *,
    architecture: str | None = None,
    like: Path | None = None,
    most_depths: int | None = None,
    dtype: torch.dtype | None = None,
    shard: int = SHARD,
    force: bool = False,
    for_sglang: bool = False,
    dry_run: bool = False,
) -> ExportPlan:
    """Write a Hugging Face folder; continues where an interrupted call ended.

    Args:
        checkpoint: folder.
        target: folder to write.
        architecture: family; None: that of ``like``, or the one that fits the model.
        like: folder whose config and tokenizer files to keep; None: those that came with the
            weights, see :func:`origin_of`.
        most_depths: MTP layers beyond the first so many are left behind; None: none is.
        dtype: of the weights; None: as they are.
        shard: bytes of a file at most.
        force: replace the target.
        for_sglang: MiMo's MTP layers read the trunk's state after its final norm, as SGLang has it.
        dry_run: plan alone.

    Raises:
        FolderError: what does not fit, or the target is there.
    """
    found = read_checkpoint(checkpoint)
    origin, tokenizer = found.meta.get("source", {}), found.meta.get("tokenizer")
    folder = like or origin_of(checkpoint, tokenizer)
    kept = _config_to_keep(folder, architecture, is_given=like is not None)
    if like is None and folder is not None:
        logger.info("config.json and the files beside it are those of %s", folder)
    like = folder
    reader, depths = DistributedReader(checkpoint), found.config.mtp.num_layers
    plan = plan_export(
        reader,
        found.config.model,
        depths if most_depths is None else min(depths, most_depths),
        found.vocab_size,
        architecture=architecture,
        like=kept,
        duplicates=origin.get("duplicates"),
        dtype=dtype,
        expert_bias=getattr(torch, origin.get("expert_bias") or "float32"),
        tokenizer=tokenizer,
        for_sglang=for_sglang,
    )
    _check_request(plan, checkpoint, like, tokenizer)
    if for_sglang:
        _check_reader(plan, found.config.model.mtp_reads)
    if dry_run:
        return plan
    identity = [str(checkpoint.resolve()), plan.content, [str(o) for o in plan.outputs]]
    identity += [shard, (checkpoint / ".metadata").stat().st_mtime_ns]
    workspace = Workspace(checkpoint, target, identity, force=force)
    write_weights(plan, reader, workspace.folder, shard=shard)
    if like is not None:
        copy_side_files(like, workspace.folder)
    if _lacks_characters(tokenizer, workspace.folder):
        write_characters(tokenizer["alphabet"], workspace.folder)
    workspace.publish()
    return plan


def _config_to_keep(
    folder: Path | None, architecture: str | None, *, is_given: bool
) -> dict[str, Any] | None:
    """``config.json`` of a folder; of one that was not asked for only if it is of this kind."""
    if folder is None:
        return None
    content = read_config(folder)
    if architecture in (None, *content.get("architectures", ())):
        return content
    if is_given:
        raise FolderError(
            f"--architecture {architecture}: {folder / 'config.json'} has another one. Leave out "
            "--like, or --architecture"
        )
    # another architecture is described anew
    return None


def _check_request(
    plan: ExportPlan,
    checkpoint: Path,
    like: Path | None,
    tokenizer: dict[str, Any] | None,
) -> None:
    if like is None and tokenizer is not None and tokenizer["kind"] != "char":
        raise FolderError(
            f"{checkpoint}: the tokenizer is not part of it. Give --like FOLDER, the folder that "
            "the tokenizer comes from"
        )


def _check_reader(plan: ExportPlan, reads: str) -> None:
    """Refuse ``--reader sglang`` where it would change nothing, or could not be done."""
    if plan.family is MIMO and plan.depths and reads == "after":
        return
    raise FolderError(
        f"--reader sglang: is for MiMo's MTP layers if they read the trunk's state after its final "
        f"norm; this is {plan.family.architecture} with {counted(plan.depths, 'MTP layer')}, and "
        f"model.mtp_reads={reads}. Leave it out"
    )


def _lacks_characters(tokenizer: dict[str, Any] | None, folder: Path) -> bool:
    return tokenizer is not None and tokenizer["kind"] == "char" and not has_tokenizer(folder)


def _flat(prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Values by dotted key."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{key}.", value)
        else:
            yield prefix + key, value


def _vocabulary(meta: dict[str, Any], config: Config, file: Path) -> int:
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    tokenizer = meta.get("tokenizer") or {}
    if "alphabet" in tokenizer:
        return CharTokenizer(tokenizer["alphabet"]).vocab_size
    if "vocab_size" in tokenizer:
        return tokenizer["vocab_size"]
    raise FolderError(f"{file}: does not say how many token ids there are")
