"""Weights as one stream of bytes, cut into buckets of equal size with a checksum each.

What servers are told of a version, as JSON (no pickle):

- ``tensors``: name, dtype, shape and first byte of each, in the names and shapes of a Hugging Face
  folder, little-endian and contiguous. Each begins at a multiple of ``ALIGNMENT``; what lies in
  between is zeros. ``drafter``: a drafter may want it, as MTP layers, embedding and output layer.
- ``bucket``: bytes of a bucket; the last one may be shorter. A tensor may lie in several.
- ``checksums``: CRC-32 of each bucket (as of zip and Ethernet): it tells damage, and is no
  protection against somebody who means harm.

It imports nothing but torch: servers read it too.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

FORMAT = 1
BUCKET = 64 * 2**20
ALIGNMENT = 64
# threads that take checksums: zlib lets go of the interpreter meanwhile
THREADS = 4
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
    )
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """A tensor of the stream.

    Args:
        name: as in a Hugging Face folder.
        dtype: of its elements.
        shape: in elements.
        drafter: a drafter may want it.
        first: its first byte.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    drafter: bool = False
    first: int = 0

    @property
    def bytes(self) -> int:
        """Of the tensor, without what follows it."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """The byte after its last one."""
        return self.first + self.bytes


@dataclass(frozen=True)
class Manifest:
    """A version of the weights.

    Args:
        version: as the engine counts.
        bucket: bytes of a bucket.
        total: bytes of the stream.
        checksums: of each bucket.
        tensors: in the order of the stream.
    """

    version: int
    bucket: int
    total: int
    checksums: tuple[int, ...]
    tensors: tuple[Piece, ...]

    def span(self, number: int) -> tuple[int, int]:
        """First byte of a bucket, and the byte after its last one."""
        first = number * self.bucket
        return first, min(first + self.bucket, self.total)

    def buckets_of(self, piece: Piece) -> range:
        """Numbers of the buckets that a tensor lies in."""
        return range(piece.first // self.bucket, -(-piece.end // self.bucket))

    def to_json(self) -> str:
        """For servers."""
        rows = [[p.name, _NAMES[p.dtype], p.shape, p.first, p.drafter] for p in self.tensors]
        return json.dumps(
            {
                "format": FORMAT,
                "version": self.version,
                "bucket": self.bucket,
                "total": self.total,
                "checksums": self.checksums,
                "tensors": rows,
            },
            separators=(",", ":"),
        )

    @property
    def identity(self) -> str:
        """Tells these weights from all others, of this run and of another one."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def read_manifest(text: str) -> Manifest:
    """What :meth:`Manifest.to_json` wrote.

    Raises:
        ValueError: it is none, or contradicts itself.
    """
    content = json.loads(text)
    if content.get("format") != FORMAT:
        raise ValueError(f"format {content.get('format')!r} of weights: this reads {FORMAT}")
    manifest = Manifest(
        content["version"],
        content["bucket"],
        content["total"],
        tuple(content["checksums"]),
        tuple(_piece(row) for row in content["tensors"]),
    )
    if manifest.bucket <= 0 or len(manifest.checksums) != -(-manifest.total // manifest.bucket):
        raise ValueError(f"{len(manifest.checksums)} checksums for {manifest.total} bytes")
    for piece in manifest.tensors:
        if not 0 <= piece.first <= piece.end <= manifest.total or piece.first % ALIGNMENT:
            raise ValueError(f"{piece.name} lies at {piece.first} to {piece.end}")
    return manifest


def _piece(row: list[Any]) -> Piece:
    name, dtype, shape, first, drafter = row
    if dtype not in DTYPES or any(size < 0 for size in shape):
        raise ValueError(f"{name}: no tensor of {dtype} and {shape}")
    return Piece(name, DTYPES[dtype], tuple(shape), bool(drafter), first)


def laid_out(pieces: Sequence[Piece]) -> tuple[list[Piece], int]:
    """Tensors with their places in the stream, in order, and the bytes of the stream.

    Raises:
        ValueError: a name is there twice, or a dtype can't be sent.
    """
    placed: list[Piece] = []
    total = 0
    for piece in pieces:
        if piece.dtype not in _NAMES:
            raise ValueError(f"{piece.name}: tensors of {piece.dtype} are not sent")
        placed.append(Piece(piece.name, piece.dtype, piece.shape, piece.drafter, total))
        total += -(-piece.bytes // ALIGNMENT) * ALIGNMENT
    if len({piece.name for piece in placed}) != len(placed):
        raise ValueError("two tensors have one name")
    return placed, total


def checksums_of(view: memoryview, numbers: Sequence[int], bucket: int) -> list[int]:
    """CRC-32 of some buckets of a stream that lies in memory."""

    def checksum(number: int) -> int:
        return zlib.crc32(view[number * bucket : (number + 1) * bucket])

    return _in_threads(checksum, numbers)


def _in_threads(work: Callable[[int], int], numbers: Sequence[int]) -> list[int]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, numbers))
