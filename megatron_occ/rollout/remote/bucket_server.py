"""The main rank's end of a transfer over the network: it hands out buckets over HTTP.

It listens on those addresses alone under which this machine reaches the servers, on a port that the
system picks. Who asks must name a word that the servers were told, new for each run. Nothing is
encrypted: as between all processes of a run, the network must be one that is trusted.
"""

from __future__ import annotations

import contextlib
import hmac
import re
import secrets
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from megatron_occ.rollout.remote.http import TransportError
from megatron_occ.rollout.remote.manifest import Manifest
from megatron_occ.rollout.remote.store import Store

PLACE = re.compile(r"/([\w-]{1,64})/(\d{1,18})/(\d{1,9})")
# seconds that a server may be silent, and seconds to find out the way to one
SILENCE, REACH = 60.0, 10.0

Kept = dict[int, tuple[Manifest, Store]]


class BucketServer:
    """Hands out the buckets of the versions that it was given.

    Args:
        find: gives the bytes of a bucket; for tests that damage it.
    """

    def __init__(self, find: Callable[[memoryview], memoryview] = lambda found: found) -> None:
        self._word = secrets.token_urlsafe(16)
        self._kept: Kept = {}
        self._find = find
        self._open: dict[str, ThreadingHTTPServer] = {}
        self._lock = threading.Lock()

    def add(self, manifest: Manifest, store: Store) -> None:
        """Hand out a version from now on."""
        self._kept[manifest.version] = (manifest, store)

    def drop(self, version: int) -> None:
        """No longer."""
        self._kept.pop(version, None)

    def url_for(self, server: str, version: int) -> str:
        """Where a rollout server finds a version.

        Args:
            server: its URL.
            version: that was added.

        Raises:
            TransportError: there is no way to it.
        """
        host, family = _address_towards(server)
        with self._lock:
            if host not in self._open:
                self._open[host] = _listen(host, family, self._bucket)
            port = self._open[host].server_address[1]
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        return f"http://{shown}:{port}/{self._word}/{version}"

    def close(self) -> None:
        """Hand out nothing more."""
        for listener in self._open.values():
            listener.shutdown()
            listener.server_close()
        self._open.clear()
        self._kept.clear()

    def _bucket(self, path: str) -> memoryview | None:
        """What lies at a path; None: nothing."""
        parts = PLACE.fullmatch(path)
        if parts is None or not hmac.compare_digest(parts[1], self._word):
            return None
        kept = self._kept.get(int(parts[2]))
        if kept is None or int(parts[3]) >= len(kept[0].checksums):
            return None
        return self._find(kept[1].span(*kept[0].span(int(parts[3]))))


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    # of workers that connect at once
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """A server that is gone, which its own call tells."""


class _ListenerV6(_Listener):
    address_family = socket.AF_INET6


def _listen(
    host: str, family: socket.AddressFamily, find: Callable[[str], memoryview | None]
) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = SILENCE

        def log_message(self, *args: object) -> None:
            """The run's log is for the run."""

        def do_GET(self) -> None:
            found = find(self.path)
            self.send_response(404 if found is None else 200)
            self.send_header("Content-Length", str(0 if found is None else len(found)))
            self.end_headers()
            if found is not None:
                with contextlib.suppress(OSError):
                    self.wfile.write(found)

    listener = (_ListenerV6 if family == socket.AF_INET6 else _Listener)((host, 0), Handler)
    threading.Thread(target=listener.serve_forever, args=(0.1,), daemon=True).start()
    return listener


def _address_towards(server: str) -> tuple[str, socket.AddressFamily]:
    """The address of this machine that a connection to a server comes from."""
    parts = urlsplit(server)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname, port), timeout=REACH) as connection:
            return connection.getsockname()[0], connection.family
    except OSError as error:
        raise TransportError(f"{server}: no way to it for weights: {error}", True) from error
