"""From a distributed checkpoint to a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_occ.config.schema_model import ModelConfig
from megatron_occ.convert.before_norm import BeforeFinalNorm
from megatron_occ.convert.described import as_family, content_of, special_ids
from megatron_occ.convert.dtypes import dtype_name, usual_dtype
from megatron_occ.convert.errors import FolderError
from megatron_occ.convert.families import family_for, family_of
from megatron_occ.convert.families.dense import MIMO
from megatron_occ.convert.reader import Reader
from megatron_occ.convert.shards import (
    Output,
    shard_name,
    split_into_shards,
    write_index,
    write_shard,
)
from megatron_occ.convert.slots import Slot, model_slots
from megatron_occ.convert.source import MTP_FILE
from megatron_occ.convert.table import Family, Move, expand
from megatron_occ.observe.progress import Progress

SHARD = 5 << 30


@dataclass(frozen=True)
class ExportPlan:
    """What is written.

    Args:
        family: of the folder.
        model: section ``model``, with what the family always has.
        depths: MTP depths.
        outputs: tensors in the order in which they are written.
        places: of each output by name: the move that it comes from, and its place in that.
        absent: names of slots that the checkpoint lacks and the family has: biases of zero, and
            the output layer of a tied model.
        content: of ``config.json``.
        fits_head: MTP layers of the checkpoint read the state after the final norm, those of the
            folder that before it: see ``BeforeFinalNorm``.
    """

    family: Family
    model: ModelConfig
    depths: int
    outputs: list[Output]
    places: dict[str, tuple[Move, int]]
    absent: frozenset[str]
    content: dict[str, Any]
    fits_head: bool

    @property
    def beside(self) -> list[Output]:
        """Tensors of MTP layers that go to a file of their own."""
        if not self.family.mtp_beside:
            return []
        return [o for o in self.outputs if self.places[o.name][0].slot.name.startswith("mtp.")]


def default_architecture(model: ModelConfig, depths: int) -> str:
    """The family that has what a model has.

    Args:
        model: section ``model``.
        depths: MTP depths.
    """
    if model.mla.enabled:
        return "DeepseekV3ForCausalLM"
    if model.moe.num_experts is not None and model.moe.score_function == "softmax":
        return "Qwen3MoeForCausalLM"
    if model.moe.num_experts is not None:
        return "Glm4MoeForCausalLM"
    if model.qk_layernorm:
        return "Qwen3ForCausalLM"
    if depths:
        return "MiMoForCausalLM"
    return "Qwen2ForCausalLM" if model.qkv_bias else "LlamaForCausalLM"


def plan_export(
    reader: Reader,
    model: ModelConfig,
    depths: int,
    vocab_size: int,
    *,
    architecture: str | None = None,
    like: Mapping[str, Any] | None = None,
    duplicates: bool | None = None,
    dtype: torch.dtype | None = None,
    expert_bias: torch.dtype = torch.float32,
    tokenizer: Mapping[str, Any] | None = None,
    for_sglang: bool = False,
) -> ExportPlan:
    """Decide what is written.

    Args:
        reader: of the checkpoint.
        model: section ``model``.
        depths: MTP depths to write.
        vocab_size: ids that exist.
        architecture: family; None: that of ``like``, or the one that fits.
        like: ``config.json`` to keep, as that of the folder that the weights came from.
        duplicates: write what the family's MTP layers repeat; None: as the family does.
        dtype: of the weights; None: as they are.
        expert_bias: dtype of the biases in the choice of experts.
        tokenizer: identity of the tokenizer, for the ids of special tokens; None: not known.
        for_sglang: the reader hands MiMo's MTP layers the state after the final norm, as SGLang
            does; MTP layers that read it there are then written as they are.

    Raises:
        FolderError: the model does not fit the family, or ``like``, or lacks tensors.
    """
    try:
        family = _family(model, depths, architecture, like)
        is_after = for_sglang and family is MIMO and model.mtp_reads == "after"
        more = {"mtp_reads": "after"} if is_after else {}
        wanted = as_family(family, model, depths, vocab_size, more)
        slots = model_slots(wanted, depths, vocab_size)
        present = model_slots(model, depths, vocab_size).keys()
        moves = list(expand(family, wanted, slots))
        content = content_of(family, wanted, depths, vocab_size, like and {**like, **more}) | more
    except ValueError as error:
        raise FolderError(str(error)) from None
    reader.check([slot for slot in slots.values() if slot.name in present])
    dtypes = _dtypes(reader, slots, present, dtype, expert_bias)
    places = {name: (move, place) for move in moves for place, name in enumerate(move.theirs)}
    outputs = [output for move in moves for output in _outputs(move, dtypes, wanted)]
    by_name = {output.name: output for output in outputs}
    repeated = _repeated(family, wanted, depths, duplicates)
    for name, original in repeated.items():
        outputs.append(replace(by_name[original], name=name))
        places[name] = places[original]
    if tokenizer is not None and (like is None or tokenizer["kind"] == "char"):
        content |= special_ids(tokenizer)
    content["torch_dtype"] = dtype_name(usual_dtype(o.dtype for o in outputs))
    content.pop("dtype", None)
    absent = frozenset(slots.keys() - present)
    fits_head = depths > 0 and wanted.mtp_reads != model.mtp_reads
    return ExportPlan(family, wanted, depths, outputs, places, absent, content, fits_head)


def _family(
    model: ModelConfig, depths: int, architecture: str | None, like: Mapping[str, Any] | None
) -> Family:
    if architecture is not None or like is None:
        return family_for(architecture or default_architecture(model, depths))
    return family_of(like)


def _repeated(
    family: Family, model: ModelConfig, depths: int, duplicates: bool | None
) -> dict[str, str]:
    """Tensors that are written a second time, by their second name."""
    wanted = family.writes_duplicates if duplicates is None else duplicates
    found = family.duplicate_names(model, depths) if wanted else {}
    if family.repeats_tied and model.tie_embeddings:
        found["lm_head.weight"] = family.embedding
    return found


def _dtypes(
    reader: Reader,
    slots: Mapping[str, Slot],
    present: Collection[str],
    wanted: torch.dtype | None,
    expert_bias: torch.dtype,
) -> dict[str, torch.dtype]:
    """Of each slot in the folder; what the checkpoint lacks has that of the others."""
    found = {name: wanted or reader.dtype(slots[name]) for name in slots if name in present}
    usual = usual_dtype(found.values())
    return {
        name: expert_bias if slot.single else found.get(name, usual) for name, slot in slots.items()
    }


def _outputs(move: Move, dtypes: Mapping[str, torch.dtype], model: ModelConfig) -> Iterator[Output]:
    shapes = move.transform.shapes(move.slot.shape, model)
    for name, shape in zip(move.theirs, shapes, strict=True):
        yield Output(name, shape, dtypes[move.slot.name])


def write_weights(
    plan: ExportPlan, reader: Reader, folder: Path, *, shard: int = SHARD, quiet: bool = False
) -> int:
    """Write shards, index and ``config.json``; shards that are there already stay.

    One tensor is in memory at a time, with the parameter that it comes from.

    Args:
        plan: what is written.
        reader: of the checkpoint.
        folder: exists.
        shard: bytes of a shard at most.
        quiet: no progress bar.

    Returns:
        The number of shards.
    """
    beside = plan.beside
    if plan.fits_head:
        reader = BeforeFinalNorm(reader)
    shards = split_into_shards(sent_outputs(plan), shard)
    parts = _Parts(plan, reader)
    done = 0
    with Progress(len(plan.outputs), "export", enabled=not quiet) as progress:

        def read(name: str) -> Tensor:
            nonlocal done
            done += 1
            progress.update(done)
            return parts.tensor(name)

        for number, outputs in enumerate(shards):
            file = folder / shard_name(number, len(shards))
            if file.is_file():
                done += len(outputs)
                continue
            write_shard(file, outputs, read)
        if beside and not (folder / MTP_FILE).is_file():
            write_shard(folder / MTP_FILE, beside, read)
    write_index(folder, shards, always=bool(beside))
    (folder / "config.json").write_text(json.dumps(plan.content, indent=1))
    for file in folder.glob("*.safetensors"):
        # readable by others, as config.json is: a server may be another user
        shutil.copymode(folder / "config.json", file)
    return len(shards)


def sent_outputs(plan: ExportPlan) -> list[Output]:
    """Tensors of a plan that a server reads, in order: without those beside."""
    apart = {output.name for output in plan.beside}
    return [output for output in plan.outputs if output.name not in apart]


def drafter_wants(plan: ExportPlan, name: str) -> bool:
    """Whether a drafter may want a tensor: all but the trunk's layers."""
    return not plan.places[name][0].slot.name.startswith("decoder.layers.")


def each_tensor(plan: ExportPlan, reader: Reader) -> Iterator[tuple[Output, Tensor]]:
    """The tensors of :func:`sent_outputs`, one after the other, of the reader's dtype."""
    parts = _Parts(plan, BeforeFinalNorm(reader) if plan.fits_head else reader)
    for output in sent_outputs(plan):
        yield output, parts.tensor(output.name)


class _Parts:
    """The tensors of a plan; a parameter that several come from is read once."""

    def __init__(self, plan: ExportPlan, reader: Reader) -> None:
        self._plan, self._reader = plan, reader
        self._last: tuple[str, list[Tensor]] = ("", [])

    def tensor(self, name: str) -> Tensor:
        move, place = self._plan.places[name]
        slot = move.slot
        if self._last[0] != slot.name:
            self._last = ("", [])
            whole = self._whole(slot)
            self._last = (slot.name, move.transform.split(whole, self._plan.model))
        return self._last[1][place]

    def _whole(self, slot: Slot) -> Tensor:
        if slot.name not in self._plan.absent:
            return self._reader.tensor(slot)
        if slot.name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"
            return self._reader.tensor(replace(slot, name=name, key=name))
        return torch.zeros(slot.shape)
