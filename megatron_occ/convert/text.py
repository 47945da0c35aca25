"""What the conversion commands print."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from megatron_occ.config.load import flat_values
from megatron_occ.config.schema import Config
from megatron_occ.config.words import counted
from megatron_occ.convert.checkpoints import read_checkpoint
from megatron_occ.convert.distributed import DistributedReader
from megatron_occ.convert.dtypes import FP8, dtype_name
from megatron_occ.convert.errors import FolderError
from megatron_occ.convert.exporting import ExportPlan
from megatron_occ.convert.importing import Imported
from megatron_occ.convert.kinds import CHECKPOINT_FILE, MODEL_FILE, what_it_is
from megatron_occ.convert.plan import ImportPlan, MTPChoice, open_source, plan_import
from megatron_occ.convert.slots import model_slots
from megatron_occ.convert.source import MTP_FILE, Source

# what an interpreter with torch takes before any tensor is read
_RUNTIME = 400 * 10**6


def import_text(source: Source, plan: ImportPlan) -> str:
    """Every mapping, dtype and byte of an import, and the memory that it takes."""
    lines = [_headline(plan.family.architecture, plan.config), ""]
    peak = 0
    for move in plan.moves:
        kept = sum(source.entries[name].size for name in move.theirs)
        unpacked = any(source.entries[name].dtype == FP8 for name in move.theirs)
        peak = max(peak, plan.size(move.slot) * (4 if unpacked else 2) + kept)
        names = " + ".join(move.theirs) or "(fresh)"
        kind = type(move.transform).__name__
        dtype, size = plan.dtypes[move.slot.name], human(plan.size(move.slot))
        shape = "x".join(map(str, move.slot.shape))
        lines.append(
            f"{move.slot.name}  <-  {names}  [{kind}, {shape}, {dtype_name(dtype)}, {size}]"
        )
    for name, original in plan.duplicates.items():
        lines.append(f"(compared)  <-  {name} = {original}")
    lines += [f"(dropped)  <-  {name}" for name in plan.dropped]
    lines.append("")
    lines.append(
        f"{counted(len(source.entries), 'tensor')} in, {counted(len(plan.moves), 'parameter')} "
        f"out, {human(plan.bytes)}; peak memory about {human(peak + _RUNTIME)}"
    )
    return "\n".join(lines)


def done_text(done: Imported, target: Path) -> str:
    """After an import."""
    plan = done.plan
    again = (
        f", {done.parts - done.written} of them from before" if done.written < done.parts else ""
    )
    drafts = (
        f"; {plan.family.architecture} has no MTP layers of its own: this project drafts with "
        "them, and no server"
        if plan.family.mtp_beside and plan.config.mtp.num_layers
        else ""
    )
    layers = f"{counted(plan.config.mtp.num_layers, 'MTP layer')} (of {plan.source_depths} there)"
    return (
        f"{target}: {plan.family.architecture}, {counted(len(plan.moves), 'parameter')}, "
        f"{human(plan.bytes)}, {layers}, {counted(done.parts, 'file')}{again}{drafts}"
    )


def export_text(plan: ExportPlan) -> str:
    """Every mapping of an export."""
    lines = [f"{plan.family.architecture}, {counted(plan.depths, 'MTP layer')}", ""]
    for output in plan.outputs:
        move, _ = plan.places[output.name]
        origin = "(zeros)" if move.slot.name in plan.absent else move.slot.name
        shape, kind = "x".join(map(str, output.shape)), type(move.transform).__name__
        size = human(output.bytes)
        lines.append(
            f"{output.name}  <-  {origin}  [{kind}, {shape}, {dtype_name(output.dtype)}, {size}]"
        )
    return "\n".join([*lines, "", _written(plan)])


def exported_text(plan: ExportPlan, target: Path) -> str:
    """After an export."""
    layers = counted(plan.depths, "MTP layer")
    return f"{target}: {plan.family.architecture}, {layers}, {_written(plan)}"


def inspect_text(folder: Path) -> str:
    """What lies in a Hugging Face folder or in a checkpoint."""
    if not (folder / MODEL_FILE).is_file() and not (folder / CHECKPOINT_FILE).is_file():
        usual = "Give a folder with config.json and safetensors, or a checkpoint's"
        found = what_it_is(folder, usual=usual)
        raise FolderError(f"{folder}: is no Hugging Face folder and no checkpoint: {found}")
    if (folder / CHECKPOINT_FILE).is_file():
        found = read_checkpoint(folder)
        reader = DistributedReader(folder)
        depths = found.config.mtp.num_layers
        slots = model_slots(found.config.model, depths, found.vocab_size)
        lines = [_headline("checkpoint", found.config), ""]
        lines += [f"{slot.key}  {list(slot.whole)}" for slot in _first_of_each_key(slots.values())]
        strangers = sorted(reader.keys() - {slot.key for slot in slots.values()})
        lines += [f"{key}  (not a parameter of this model)" for key in strangers]
        reader.check(list(slots.values()))
        return "\n".join(lines)
    source = open_source(folder)
    return import_text(source, plan_import(source, MTPChoice("keep"), None))


def human(count: int) -> str:
    """Bytes, to read."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def _headline(name: str, config: Config) -> str:
    usual = flat_values(Config())
    values = {
        key: value
        for key, value in flat_values(config).items()
        if key.startswith(("model.", "mtp.num_layers")) and value != usual[key]
    }
    return "\n".join([name, *(f"  {key}={value}" for key, value in values.items())])


def _first_of_each_key(slots: Iterable) -> list:
    return list({slot.key: slot for slot in slots}.values())


def _written(plan: ExportPlan) -> str:
    size = human(sum(output.bytes for output in plan.outputs))
    written = f"{counted(len(plan.outputs), 'tensor')}, {size}"
    if plan.fits_head:
        return (
            f"{written}; MTP layers of this folder read the trunk's state before its final norm, "
            "those of the checkpoint after it: drafts will be nearly the same. For the same ones "
            "train with model.mtp_reads=before, or give --reader sglang"
        )
    if not plan.beside:
        return written
    return (
        f"{written}; the MTP layers are in {MTP_FILE}, from where this project takes them back: "
        f"{plan.family.architecture} has none, so transformers and servers run the trunk and draft "
        "with none of them"
    )
