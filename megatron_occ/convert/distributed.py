"""Megatron-Core's distributed checkpoints, one tensor at a time; imports no Megatron.

The format is that of ``torch.distributed.checkpoint``: files of tensors, and ``.metadata``, which
says where each part of each tensor lies. Beside them Megatron-Core wants ``metadata.json`` and
``common.pt``.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_occ.convert.errors import FolderError
from megatron_occ.convert.slots import Slot
from megatron_occ.convert.workspace import NOTES

_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class DistributedWriter:
    """Writes a checkpoint in parts, each a file; finished parts outlive an interruption.

    Args:
        folder: of a ``Workspace``; may hold finished parts of the same checkpoint.
        parts: slots of each part.
        dtypes: of each slot, by name.
    """

    def __init__(
        self, folder: Path, parts: Sequence[Sequence[Slot]], dtypes: dict[str, torch.dtype]
    ) -> None:
        self.folder, self.parts, self.dtypes = folder, parts, dtypes
        self._writer = _Writer(folder)
        plans = [SavePlan([self._item(slot) for slot in part]) for part in parts]
        self._plans = self._writer.prepare_global_plan(plans)

    def is_written(self, number: int) -> bool:
        """Whether an earlier call has finished this part."""
        return self._record(number).is_file()

    def write(self, number: int, read: Callable[[Slot], Tensor]) -> None:
        """Write a part.

        Args:
            number: of the part.
            read: gives a slot's tensor; called for one after the other.
        """
        planner = _Planner(self.parts[number], read, self.dtypes)
        found = self._writer.write_data(self._plans[number], planner).wait()
        record = self._record(number)
        temporary = record.with_suffix(".tmp")
        temporary.write_text(json.dumps([_result_to_json(result) for result in found]))
        temporary.replace(record)

    def finish(self) -> None:
        """Write what makes a checkpoint of the parts."""
        results = []
        for number in range(len(self.parts)):
            rows = json.loads(self._record(number).read_text())
            results.append([_result_from_json(row) for row in rows])
        tensors: dict[str, TensorStorageMetadata] = {}
        for slot in (slot for part in self.parts for slot in part):
            entry = tensors.setdefault(slot.key, self._tensor(slot))
            entry.chunks.append(_chunk(slot))
        metadata = Metadata(state_dict_metadata=tensors)
        self._writer.finish(metadata, results)
        torch.save({}, self.folder / "common.pt")
        (self.folder / "metadata.json").write_text(json.dumps(_BACKEND))

    def _record(self, number: int) -> Path:
        return self.folder / NOTES / f"part_{number:05d}.json"

    def _tensor(self, slot: Slot) -> TensorStorageMetadata:
        properties = TensorProperties(dtype=self.dtypes[slot.name])
        return TensorStorageMetadata(properties, torch.Size(slot.whole), [])

    def _item(self, slot: Slot) -> WriteItem:
        return WriteItem(
            MetadataIndex(slot.key, torch.Size(slot.offset)),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                _chunk(slot),
                TensorProperties(dtype=self.dtypes[slot.name]),
                torch.Size(slot.whole),
            ),
        )


class _Writer(FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        """Neither path nor number of the call: the bytes depend on the content alone."""
        return StorageMeta()


class _Planner(DefaultSavePlanner):
    """Hands the writer one tensor after the other."""

    def __init__(
        self,
        slots: Sequence[Slot],
        read: Callable[[Slot], Tensor],
        dtypes: dict[str, torch.dtype],
    ) -> None:
        super().__init__()
        self._slots = {(slot.key, slot.offset): slot for slot in slots}
        self._read, self._dtypes = read, dtypes

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        index = write_item.index
        slot = self._slots[index.fqn, tuple(index.offset)]
        tensor = self._read(slot).to(self._dtypes[slot.name]).contiguous()
        return tensor.view(slot.box)


class DistributedReader:
    """Reads parameters of a checkpoint written under any layout, one at a time.

    Args:
        folder: of the checkpoint.

    Raises:
        FolderError: its metadata can't be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            with (folder / ".metadata").open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ValueError) as error:
            raise FolderError(f"{folder}: is no distributed checkpoint: {error}") from None
        self._tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._places = metadata.storage_data

    def check(self, slots: Sequence[Slot]) -> None:
        """Every slot is there, in its shape.

        Raises:
            FolderError: lists those that are not.
        """
        problems = {}
        for slot in slots:
            entry = self._tensors.get(slot.key)
            if entry is None:
                problems[slot.key] = f"{self.folder}: {slot.key} is missing"
            elif not fits(tuple(entry.size), slot):
                problems[slot.key] = (
                    f"{self.folder}: {slot.key} has the shape {list(entry.size)}, the model "
                    f"{list(slot.whole)}"
                )
        if problems:
            raise FolderError(list(problems.values()))

    def keys(self) -> set[str]:
        """Of weights; not those of an optimizer."""
        return {key for key in self._tensors if not key.startswith(("optimizer.", "trainer"))}

    def dtype(self, slot: Slot) -> torch.dtype:
        """Of a parameter."""
        return self._tensors[slot.key].properties.dtype

    def tensor(self, slot: Slot) -> Tensor:
        """A parameter, from the parts that overlap it.

        Raises:
            FolderError: a file is missing or damaged.
        """
        entry = self._tensors[slot.key]
        whole = [c for c in entry.chunks if (c.offsets, c.sizes) == (slot.offset, slot.box)]
        if whole:
            return self._part(slot.key, whole[0]).view(slot.shape)
        result = torch.empty(slot.box, dtype=entry.properties.dtype)
        covered = 0
        for chunk in entry.chunks:
            found = overlap(slot, chunk.offsets, chunk.sizes)
            if found is None:
                continue
            ours, theirs = found
            part = self._part(slot.key, chunk)[theirs]
            result[ours] = part
            covered += part.numel()
        if covered != result.numel():
            raise FolderError(f"{self.folder}: {slot.key} is not complete")
        return result.view(slot.shape)

    def _part(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        place = self._places[MetadataIndex(key, chunk.offsets)]
        file = self.folder / place.relative_path
        try:
            with file.open("rb") as stream:
                stream.seek(place.offset)
                data = stream.read(place.length)
            return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise FolderError(f"{file}: {key} can't be read: {error}") from None


class _MetadataUnpickler(pickle.Unpickler):
    """Of ``.metadata``, which torch pickles: the classes that it consists of, and nothing else."""

    _MODULES = tuple(
        f"torch.distributed.checkpoint.{m}" for m in ("metadata", "filesystem", "planner")
    )

    def find_class(self, module: str, name: str) -> Any:
        if module in self._MODULES and "." not in name:
            found = getattr(importlib.import_module(module), name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        if module == "torch" and (
            name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return getattr(torch, name)
        if (module, name) in (("torch.serialization", "_get_layout"), ("pathlib", "PosixPath")):
            return getattr(importlib.import_module(module), name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")


def fits(found: tuple[int, ...], slot: Slot) -> bool:
    """Whether a checkpoint's tensor has the shape that a slot wants.

    The vocabulary may have rows of padding that a layout needed.
    """
    if slot.name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        return found[0] >= slot.whole[0] and found[1:] == slot.whole[1:]
    return found == slot.whole


def _chunk(slot: Slot) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(slot.offset), torch.Size(slot.box))


def overlap(
    slot: Slot, offsets: Sequence[int], sizes: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where a slot and a part of its checkpoint's tensor overlap, counted in each of them.

    Args:
        slot: a parameter.
        offsets, sizes: first entry of the part, and its shape.
    """
    ours, theirs = [], []
    both = zip(slot.offset, slot.box, offsets, sizes, strict=True)
    for first, count, start, length in both:
        low, high = max(first, start), min(first + count, start + length)
        if low >= high:
            return None
        ours.append(slice(low - first, high - first))
        theirs.append(slice(low - start, high - start))
    return tuple(ours), tuple(theirs)


def _result_to_json(result: WriteResult) -> list[Any]:
    index, place = result.index, dataclasses.asdict(result.storage_data)
    return [index.fqn, list(index.offset or ()), result.size_in_bytes, place]


def _result_from_json(row: list[Any]) -> WriteResult:
    key, offset, size, place = row
    index = MetadataIndex(key, torch.Size(offset))
    return WriteResult(index=index, size_in_bytes=size, storage_data=_StorageInfo(**place))
