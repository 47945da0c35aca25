"""How weights get to servers: in a folder, or out of the main rank's memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_occ.rollout.remote.arrival import this_machine
from megatron_occ.rollout.remote.bucket_server import BucketServer
from megatron_occ.rollout.remote.manifest import Manifest
from megatron_occ.rollout.remote.publish import drop_others, publish
from megatron_occ.rollout.remote.store import Store


@dataclass(frozen=True)
class Shipment:
    """A version that servers fetch from memory.

    Args:
        manifest: what it consists of.
        text: the manifest as JSON.
        identity: tells these weights from all others.
        source_for: where a server finds it, by the server's URL: JSON for ``arrival.opened``.
            Raises ``TransportError`` where there is no way to the server.
    """

    manifest: Manifest
    text: str
    identity: str
    source_for: Callable[[str], dict[str, str]]


# a Hugging Face folder, or what is fetched from memory
Weights = Path | Shipment


def described(weights: Weights) -> str:
    """Size of a version, for the log."""
    if isinstance(weights, Path):
        size = sum(file.stat().st_size for file in weights.iterdir())
        return f"{size / 1e6:.1f} MB in {weights}"
    manifest = weights.manifest
    return f"{manifest.total / 1e6:.1f} MB in {len(manifest.checksums)} buckets"


class Carrier(Protocol):
    """Offers each version to servers; called by one thread."""

    def publish(self, version: int) -> Weights:
        """The present weights, complete; those of before are offered until :meth:`keep`.

        Raises:
            EngineError: they could not be written.
        """
        ...

    def keep(self, weights: Weights) -> None:
        """Servers have these: give up all others."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


class FolderCarrier:
    """A Hugging Face folder on a disk that trainer and servers see.

    Args:
        export: see ``publish``.
        root: folder of the versions' folders.
    """

    def __init__(self, export: Callable[[Path], None], root: Path) -> None:
        self._export, self._root = export, root

    def publish(self, version: int) -> Path:
        """See ``Carrier``."""
        return publish(self._export, self._root, version)

    def keep(self, weights: Weights) -> None:
        """See ``Carrier``."""
        assert isinstance(weights, Path), "this carrier's"
        drop_others(self._root, keep=weights)

    def close(self) -> None:
        """See ``Carrier``: the last version stays."""


class MemoryCarrier:
    """Memory of this process: servers of this machine map it, others fetch it.

    Args:
        take: gives the present weights, all of them entered.
        server: hands it out over the network; None: servers map it.
    """

    def __init__(self, take: Callable[[], Store], server: BucketServer | None = None) -> None:
        self._take, self._server = take, server
        self._kept: dict[int, Store] = {}
        self._served: int | None = None

    def publish(self, version: int) -> Shipment:
        """See ``Carrier``; a version that servers did not take is given up first."""
        self._drop_all_but(self._served)
        store = self._take()
        manifest = store.seal(version)
        self._kept[version] = store
        if self._server is not None:
            self._server.add(manifest, store)
        machine = {"kind": "memory", "machine": this_machine(), "path": store.path}

        def source_for(url: str) -> dict[str, str]:
            if self._server is None:
                return machine
            return {"kind": "network", "url": self._server.url_for(url, version)}

        return Shipment(manifest, manifest.to_json(), manifest.identity, source_for)

    def keep(self, weights: Weights) -> None:
        """See ``Carrier``."""
        assert isinstance(weights, Shipment), "this carrier's"
        self._served = weights.manifest.version
        self._drop_all_but(self._served)

    def close(self) -> None:
        """See ``Carrier``."""
        self._drop_all_but(None)
        if self._server is not None:
            self._server.close()

    def _drop_all_but(self, kept: int | None) -> None:
        for version in [version for version in self._kept if version != kept]:
            if self._server is not None:
                self._server.drop(version)
            self._kept.pop(version).close()
