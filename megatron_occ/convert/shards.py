"""Safetensors shards, written one tensor at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from megatron_occ.convert.dtypes import DTYPES
from megatron_occ.convert.source import INDEX

Item = TypeVar("Item")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Output:
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """In the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def split_into_files(
    items: Iterable[Item], size_of: Callable[[Item], int], limit: int
) -> list[list[Item]]:
    """Consecutive items of at most ``limit`` bytes together; one item at least."""
    files: list[list[Item]] = []
    size = 0
    for item in items:
        more = size_of(item)
        if not files or size + more > limit:
            files.append([])
            size = 0
        files[-1].append(item)
        size += more
    return files


def split_into_shards(outputs: Sequence[Output], limit: int) -> list[list[Output]]:
    """See :func:`split_into_files`."""
    return split_into_files(outputs, lambda output: output.bytes, limit)


def shard_name(number: int, count: int) -> str:
    """As Hugging Face names them."""
    if count == 1:
        return "model.safetensors"
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_shard(file: Path, outputs: Sequence[Output], read: Callable[[str], Tensor]) -> None:
    """Write a safetensors file, whole or not at all.

    Args:
        file: its name.
        outputs: its tensors, in order.
        read: gives a tensor by name; called for one after the other.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for output in outputs:
        ends = [offset, offset + output.bytes]
        entry = {"dtype": _NAMES[output.dtype], "shape": output.shape, "data_offsets": ends}
        header[output.name] = entry
        offset += output.bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    # tensors begin at a multiple of 8
    encoded += b" " * (-len(encoded) % 8)
    temporary = file.with_suffix(".tmp")
    with temporary.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for output in outputs:
            tensor = read(output.name)
            assert tuple(tensor.shape) == output.shape, output.name
            data = tensor.to(output.dtype).contiguous().flatten()
            stream.write(memoryview(data.view(torch.uint8).numpy()))
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def write_index(folder: Path, shards: Sequence[Sequence[Output]], *, always: bool = False) -> None:
    """``model.safetensors.index.json``, where there is more than one shard.

    Args:
        folder: exists.
        shards: tensors of each.
        always: for one shard too: a reader then leaves other safetensors files alone.
    """
    if len(shards) == 1 and not always:
        return
    weight_map = {
        output.name: shard_name(number, len(shards))
        for number, shard in enumerate(shards)
        for output in shard
    }
    total = sum(output.bytes for shard in shards for output in shard)
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(content, indent=1))
