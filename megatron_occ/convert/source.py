"""A Hugging Face folder to read: config, index and safetensors, every header checked first.

Files are read with plain reads, not mapped: pages of a mapped file would count as memory of this
process.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_occ.config.words import counted
from megatron_occ.convert.dtypes import DTYPES, FP8
from megatron_occ.convert.errors import FolderError
from megatron_occ.convert.kinds import MODEL_FILE, what_it_is
from megatron_occ.convert.transforms import dequantize_blocks

SCALE = "_scale_inv"
INDEX = "model.safetensors.index.json"
# of MTP layers, beside an index that does not name it: GLM-4.6 has it, transformers leaves it alone
MTP_FILE = "mtp.safetensors"
# largest header that safetensors itself accepts
_LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Entry:
    """A tensor of a shard.

    Args:
        file: the shard.
        dtype: of its numbers.
        shape: of the tensor.
        start: first byte in the file.
        size: bytes.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


class Source:
    """The tensors of a folder, by name.

    Args:
        folder: with ``config.json`` and safetensors.

    Raises:
        FolderError: what is missing, cut off or contradicts itself.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self.block = _block_size(self.config, folder / MODEL_FILE)
        self.entries: dict[str, Entry] = {}
        problems: list[str] = []
        for file in self._shards():
            try:
                entries = read_header(file)
            except FolderError as error:
                problems += error.problems
                continue
            for name, entry in entries.items():
                if name in self.entries:
                    other = self.entries[name].file.name
                    problems.append(f"{file}: {name} is in {other} too")
                self.entries[name] = entry
        if problems:
            raise FolderError(problems)
        self._check_index()

    def tensor(self, name: str) -> Tensor:
        """A tensor of its own memory as it is stored; fp8 blocks multiplied out, in bf16.

        Raises:
            FolderError: the file ends too early.
        """
        entry = self.entries[name]
        raw = self._raw(entry)
        if entry.dtype != FP8:
            return raw
        try:
            whole = dequantize_blocks(raw, self._raw(self.entries[name + SCALE]), self.block)
        except ValueError as error:
            raise FolderError(f"{entry.file}: {name} {error}") from None
        return whole.to(torch.bfloat16)

    def dtype(self, name: str) -> torch.dtype:
        """Of what :meth:`tensor` returns."""
        dtype = self.entries[name].dtype
        return torch.bfloat16 if dtype == FP8 else dtype

    def _raw(self, entry: Entry) -> Tensor:
        data = torch.empty(entry.size, dtype=torch.uint8)
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.start)
            view, done = memoryview(data.numpy()), 0
            while done < entry.size:
                count = file.readinto(view[done:])
                if not count:
                    raise FolderError(f"{entry.file}: ends before its last tensor does")
                done += count
        return data.view(entry.dtype).view(entry.shape)

    def _shards(self) -> list[Path]:
        index = self.folder / INDEX
        self.index: dict[str, str] | None = None
        if index.is_file():
            content = read_json(index).get("weight_map")
            if not isinstance(content, dict) or not content:
                raise FolderError(f"{index}: has no weight_map")
            self.index = content
            names = sorted(set(content.values()))
            missing = [n for n in names if not (self.folder / _plain(n, index)).is_file()]
            if missing:
                raise FolderError([f"{index}: names {n}, which is not there" for n in missing])
            beside = [] if MTP_FILE in names else self._beside()
            return [self.folder / name for name in names] + beside
        beside = self._beside()
        found = sorted(set(self.folder.glob("*.safetensors")) - set(beside))
        if len(found) == 1:
            return found + beside
        if found:
            raise FolderError(
                f"{index}: is missing, and the folder has {counted(len(found), 'safetensors file')}"
            )
        pickled = sorted(self.folder.glob("*.bin"))
        hint = f": {pickled[0].name} is a pickle, which is never opened" if pickled else ""
        raise FolderError(f"{self.folder}: has no safetensors{hint}")

    def _beside(self) -> list[Path]:
        """The file of MTP layers, if there is one."""
        file = self.folder / MTP_FILE
        return [file] if file.is_file() else []

    def _check_index(self) -> None:
        if self.index is None:
            return
        problems, file = [], self.folder / INDEX
        for name, shard in self.index.items():
            entry = self.entries.get(name)
            if entry is None:
                problems.append(f"{self.folder / shard}: {name} is missing, {INDEX} has it there")
            elif entry.file.name != shard:
                problems.append(f"{file}: has {name} in {shard}, it is in {entry.file.name}")
        for name, entry in self.entries.items():
            if name not in self.index and entry.file.name != MTP_FILE:
                problems.append(f"{entry.file}: {name} is not in {INDEX}")
        if problems:
            raise FolderError(problems)


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a Hugging Face folder.

    Raises:
        FolderError: the folder is none; says what it is instead.
    """
    if not (folder / MODEL_FILE).is_file():
        found = what_it_is(
            folder,
            other="It needs no import: rl.init_from takes it, and `convert export` makes a Hugging "
            "Face folder of it",
            usual="Give a folder with config.json and safetensors",
        )
        raise FolderError(f"{folder}: is no Hugging Face folder: {found}")
    return read_json(folder / MODEL_FILE)


def read_json(file: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        FolderError: the file is missing or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise FolderError(f"{file}: can't be read: {error.strerror}") from None
    except ValueError as error:
        raise FolderError(f"{file}: is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise FolderError(f"{file}: holds no object")
    return content


def read_header(file: Path) -> dict[str, Entry]:
    """Tensors of a safetensors file, whose size fits its header to the byte.

    Format: 8 bytes length of the header, little-endian; JSON; the tensors without gaps
    (https://huggingface.co/docs/safetensors).

    Raises:
        FolderError: the file is damaged, or has a dtype that is not converted.
    """
    size = os.path.getsize(file)
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise FolderError(f"{file}: is cut off or no safetensors file")
        try:
            content = json.loads(stream.read(length))
        except ValueError as error:
            raise FolderError(f"{file}: has a damaged header: {error}") from None
    if not isinstance(content, dict):
        raise FolderError(f"{file}: has a damaged header: no object")
    content.pop("__metadata__", None)
    entries, problems, ends = {}, [], []
    for name, described in content.items():
        try:
            kind, shape = described["dtype"], tuple(map(int, described["shape"]))
            first, last = map(int, described["data_offsets"])
        except (KeyError, TypeError, ValueError):
            problems.append(f"{file}: {name} has a damaged entry in the header")
            continue
        if kind not in DTYPES:
            problems.append(f"{file}: {name} has the dtype {kind}, which can't be converted")
            continue
        dtype = DTYPES[kind]
        if first < 0 or last - first != math.prod(shape) * dtype.itemsize:
            problems.append(f"{file}: {name} has {last - first} bytes, its shape says otherwise")
        entries[name] = Entry(file, dtype, shape, 8 + length + first, last - first)
        ends.append(8 + length + last)
    described = max(ends, default=8 + length)
    if not problems and described != size:
        problems.append(
            f"{file}: has {size} bytes, its header describes {described}: it is cut off or damaged"
        )
    if problems:
        raise FolderError(problems)
    return entries


def _plain(name: str, index: Path) -> str:
    """A file's name that leads nowhere else."""
    if Path(name).name != name:
        raise FolderError(f"{index}: names {name!r}, which is no file of this folder")
    return name


def _block_size(config: dict[str, Any], file: Path) -> tuple[int, int]:
    """Rows and columns of a block of fp8 weights."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return (128, 128)
    method = quantization.get("quant_method")
    if method != "fp8":
        raise FolderError(
            f"{file}: quantization_config has quant_method={method!r}: only blocks of fp8 "
            "(DeepSeek-V3's) can be read"
        )
    rows, columns = quantization.get("weight_block_size") or (128, 128)
    return (int(rows), int(columns))
