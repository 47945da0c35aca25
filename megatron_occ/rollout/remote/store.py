"""Weights in the memory of the trainer's main rank, until the next version is served.

Anonymous memory of Linux (``memfd_create``): it needs no folder, counts as memory of this process
and its children, and is gone when they are, however they end. A process of the same user on
the same machine opens it as ``/proc/PID/fd/N``.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_occ.rollout.engine import EngineError
from megatron_occ.rollout.remote.manifest import BUCKET, Manifest, Piece, checksums_of, laid_out


class Store:
    """Room for the tensors of a version, filled one after the other.

    Args:
        pieces: tensors; where they lie is decided here.
        bucket: bytes of a bucket.

    Raises:
        EngineError: there is no such room, or nothing to keep.
    """

    def __init__(self, pieces: Sequence[Piece], bucket: int = BUCKET) -> None:
        try:
            placed, self.total = laid_out(pieces)
        except ValueError as error:
            raise EngineError(str(error)) from error
        if not self.total:
            raise EngineError("there are no weights to send")
        self.bucket = bucket
        self._pieces = {piece.name: piece for piece in placed}
        self._missing = set(self._pieces)
        self._file = _reserve(self.total)
        self._view = memoryview(mmap.mmap(self._file, self.total))
        self._bytes = torch.frombuffer(self._view, dtype=torch.uint8)

    def put(self, name: str, tensor: Tensor) -> None:
        """Enter a tensor.

        Args:
            name: of one of the pieces.
            tensor: of its shape, on any device, of any dtype.
        """
        piece = self._pieces[name]
        assert tuple(tensor.shape) == piece.shape, name
        room = self._bytes[piece.first : piece.end]
        if piece.bytes:
            room.view(piece.dtype).copy_(tensor.detach().reshape(-1))
        self._missing.discard(name)

    def seal(self, version: int) -> Manifest:
        """All tensors are there: take the checksums.

        Raises:
            EngineError: names tensors that are not there.
        """
        if self._missing:
            names = ", ".join(sorted(self._missing)[:5])
            raise EngineError(f"the export left out {len(self._missing)} tensors: {names}")
        numbers = range(-(-self.total // self.bucket))
        checksums = tuple(checksums_of(self._view, numbers, self.bucket))
        pieces = tuple(self._pieces.values())
        return Manifest(version, self.bucket, self.total, checksums, pieces)

    @property
    def path(self) -> str:
        """Where other processes of this user open it."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def span(self, first: int, end: int) -> memoryview:
        """Some of its bytes, without a copy."""
        return self._view[first:end]

    def close(self) -> None:
        """Give up the memory; who still reads a span keeps it until then."""
        if self._file < 0:
            return
        os.close(self._file)
        self._file, self._view, self._bytes = -1, memoryview(b""), torch.empty(0)


def _reserve(size: int) -> int:
    """A descriptor of so many bytes of memory, which are there: a later write can't fail."""
    if not hasattr(os, "memfd_create"):
        raise EngineError("rl.rollout.server.transfer: this system has no memfd_create: use folder")
    file = os.memfd_create("megatron_occ_weights")
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        os.close(file)
        raise EngineError(
            f"rl.rollout.server.transfer: no memory for {size / 1e9:.2f} GB of weights on the main "
            f"rank's machine ({error}): use rl.rollout.server.transfer=folder"
        ) from error
    return file
