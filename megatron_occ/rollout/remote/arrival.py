"""Weights as they arrive in a server's worker: from memory of this machine, or over the network.

It imports nothing but torch: it runs inside of vLLM's workers. A bucket is compared with its
checksum before a byte of it is used.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import mmap
import os
import socket
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from torch import Tensor

from megatron_occ.rollout.remote.manifest import Manifest, Piece, checksums_of

# tries of a bucket, the pause before the second one in seconds (it doubles), and the seconds that
# the trainer may be silent
TRIES, PAUSE, SILENCE = 4, 0.25, 60.0


class ArrivalError(RuntimeError):
    """Weights did not arrive as they were sent."""


class Source(Protocol):
    """Bytes of a version."""

    def span(self, piece: Piece) -> Any:
        """The bytes of a tensor, in a buffer that can be written to.

        Raises:
            ArrivalError: they are not those that were sent.
        """
        ...

    def close(self) -> None: ...


@contextlib.contextmanager
def opened(manifest: Manifest, source: str) -> Iterator[Source]:
    """The source that a trainer named.

    Args:
        manifest: of the version.
        source: JSON: ``{"kind": "memory", "machine": ..., "path": ...}`` or ``{"kind": "network",
            "url": ...}``.

    Raises:
        ArrivalError: there is none.
    """
    found = json.loads(source)
    if found["kind"] == "memory":
        arrived: Source = MemorySource(manifest, found)
    else:
        arrived = NetworkSource(manifest, found["url"])
    try:
        yield arrived
    finally:
        arrived.close()


def tensors_of(
    manifest: Manifest, source: Source, *, for_drafter: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors, on the CPU, one after the other.

    Args:
        manifest: of the version.
        source: of its bytes.
        for_drafter: those alone that a drafter may want.
    """
    for piece in manifest.tensors:
        if for_drafter and not piece.drafter:
            continue
        if not piece.bytes:
            yield piece.name, torch.empty(piece.shape, dtype=piece.dtype)
            continue
        flat = torch.frombuffer(source.span(piece), dtype=piece.dtype)
        yield piece.name, flat.view(piece.shape)


def this_machine() -> str:
    """Tells whether two processes see each other under their numbers.

    The machine since it was started, and the namespace of processes: containers have their own.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"


class MemorySource:
    """Memory of the trainer's main rank, mapped; all of it is compared before any is used.

    Args:
        manifest: of the version.
        source: see :func:`opened`.
    """

    def __init__(self, manifest: Manifest, source: Mapping[str, str]) -> None:
        if source["machine"] != this_machine():
            raise ArrivalError(
                "rl.rollout.server.transfer=memory: the trainer's main rank is not on this machine "
                f"({socket.gethostname()}), or in another container: use network"
            )
        self._view = _mapped(source["path"], manifest.total)
        numbers = range(len(manifest.checksums))
        found = checksums_of(self._view, numbers, manifest.bucket)
        wrong = [n for n in numbers if found[n] != manifest.checksums[n]]
        if wrong:
            raise ArrivalError(
                f"version {manifest.version}: buckets {wrong[:5]} of {len(numbers)} are not what "
                "the trainer sent: their checksums differ"
            )

    def span(self, piece: Piece) -> memoryview:
        """See ``Source``; no copy."""
        return self._view[piece.first : piece.end]

    def close(self) -> None:
        """See ``Source``: a tensor that is still held keeps the memory."""
        self._view = memoryview(b"")


def _mapped(path: str, size: int) -> memoryview:
    """A private view of a file: what is written to it stays here."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ArrivalError(
            f"rl.rollout.server.transfer=memory: {error}: does the trainer run on this machine as "
            "the same user?"
        ) from error
    try:
        found = os.fstat(file).st_size
        if found != size:
            raise ArrivalError(f"{path} has {found} bytes, wanted {size}")
        return memoryview(mmap.mmap(file, size, access=mmap.ACCESS_COPY))
    finally:
        os.close(file)


class NetworkSource:
    """Buckets over HTTP from the trainer's main rank, asked for in order, one in memory at a time.

    A bucket that does not arrive, or not as it was sent, is asked for again.

    Args:
        manifest: of the version.
        url: of the version; a bucket lies at its number below it.
    """

    def __init__(self, manifest: Manifest, url: str) -> None:
        self._manifest = manifest
        self._place = urlsplit(url)
        self._connection: http.client.HTTPConnection | None = None
        self._last: tuple[int, bytearray] = (-1, bytearray())

    def span(self, piece: Piece) -> memoryview:
        """See ``Source``; a tensor within one bucket is not copied."""
        numbers = self._manifest.buckets_of(piece)
        if len(numbers) == 1:
            first, _ = self._manifest.span(numbers[0])
            return memoryview(self._bucket(numbers[0]))[piece.first - first : piece.end - first]
        whole = memoryview(bytearray(piece.bytes))
        for number in numbers:
            first, end = self._manifest.span(number)
            low, high = max(first, piece.first), min(end, piece.end)
            part = memoryview(self._bucket(number))[low - first : high - first]
            whole[low - piece.first : high - piece.first] = part
        return whole

    def close(self) -> None:
        """See ``Source``."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _bucket(self, number: int) -> bytearray:
        if self._last[0] != number:
            # the one before is given up first
            self._last = (-1, bytearray())
            self._last = (number, self._fetch(number))
        return self._last[1]

    def _fetch(self, number: int) -> bytearray:
        reason = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                found = self._ask(number)
            except (OSError, http.client.HTTPException) as error:
                reason = f"{type(error).__name__}: {error}"
                self.close()
                continue
            if zlib.crc32(found) == self._manifest.checksums[number]:
                return found
            reason = "its checksum is not that of what the trainer sent"
        raise ArrivalError(
            f"version {self._manifest.version}: bucket {number} of "
            f"{len(self._manifest.checksums)} did not arrive from {self._place.hostname}:"
            f"{self._place.port} in {TRIES} tries: {reason}"
        )

    def _ask(self, number: int) -> bytearray:
        if self._connection is None:
            host, port = self._place.hostname, self._place.port
            self._connection = http.client.HTTPConnection(host or "", port, timeout=SILENCE)
        self._connection.request("GET", f"{self._place.path}/{number}")
        response = self._connection.getresponse()
        first, end = self._manifest.span(number)
        if response.status != 200 or response.length != end - first:
            raise http.client.HTTPException(
                f"status {response.status} with {response.length} bytes, wanted {end - first}"
            )
        data = bytearray(end - first)
        room, done = memoryview(data), 0
        while done < len(data):
            count = response.readinto(room[done:])
            if not count:
                raise http.client.IncompleteRead(b"", len(data) - done)
            done += count
        return data
