"""JSON over HTTP with limits of time and size; standard library only.

No proxy of the environment is used: the servers are in the same cluster. Redirects are not
followed. Each call opens a connection of its own, so that closing it ends just this call.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from megatron_occ.rollout.engine import EngineError

EXCERPT = 300
BUSY = (408, 425, 429)


class TransportError(EngineError):
    """A call to a server failed.

    Args:
        message: names the URL.
        retry: whether the same call may succeed later.
        status: HTTP status, if there was an answer.
    """

    def __init__(self, message: str, retry: bool, status: int | None = None) -> None:
        super().__init__(message)
        self.retry, self.status = retry, status


class Cancelled(EngineError):
    """The call was ended by :meth:`Client.cancel`."""


class _Call:
    """One connection; ``end`` makes its blocked reads return, from any thread."""

    def __init__(
        self, connection: http.client.HTTPConnection, stop: threading.Event | None
    ) -> None:
        self.connection, self.stop = connection, stop
        self.socket: socket.socket | None = None
        self.reason: str | None = None

    def connect(self) -> None:
        """Connect; keeps the socket, which http.client hands on to the answer."""
        self.connection.connect()
        self.socket = self.connection.sock

    def end(self, reason: str) -> None:
        self.reason = self.reason or reason
        if self.socket is not None:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)


class Client:
    """Calls to one server.

    Args:
        url: base URL.
        timeout: seconds for a whole call, unless it names its own.
        max_bytes: largest answer that is read.
        api_key: sent as a bearer token.

    Raises:
        EngineError: the URL is not one of http or https with a host.
    """

    def __init__(
        self, url: str, timeout: float, max_bytes: int, api_key: str | None = None
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise EngineError(f"{url!r} is no server's URL: write http://host:port")
        if parts.query or parts.fragment:
            raise EngineError(f"{url!r}: a server's URL has no ? and no #")
        self.url = url.rstrip("/")
        self._parts, self._prefix = parts, parts.path.rstrip("/")
        self._timeout, self._max_bytes = timeout, max_bytes
        self._headers = {"Accept": "*/*", "Connection": "close"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._open: set[_Call] = set()
        self._lock = threading.Lock()

    def get(self, path: str, timeout: float | None = None) -> Any:
        """JSON value that the path answers with; raises like :meth:`post`."""
        return self._json(path, self.raw("GET", path, None, timeout))

    def post(
        self,
        path: str,
        body: Any,
        timeout: float | None = None,
        stop: threading.Event | None = None,
    ) -> Any:
        """JSON value answered to a JSON body.

        Args:
            path: below the base URL, with its slash.
            body: anything that JSON holds.
            timeout: seconds for the whole call.
            stop: if set, the call does not start; a call with one can be cancelled.

        Raises:
            TransportError: no connection, a status other than 2xx, over a limit, or no JSON.
            Cancelled: :meth:`cancel` was called, or ``stop`` is set.
        """
        return self._json(path, self.raw("POST", path, body, timeout, stop))

    def raw(
        self,
        method: str,
        path: str,
        body: Any = None,
        timeout: float | None = None,
        stop: threading.Event | None = None,
    ) -> bytes:
        """Body of the answer as it came; raises like :meth:`post`."""
        seconds = self._timeout if timeout is None else timeout
        url = self.url + path
        with self._call(seconds, stop) as call:
            try:
                return self._exchange(call, method, path, body)
            except (OSError, http.client.HTTPException, ValueError) as error:
                # ValueError: http.client reads from a socket that end() has shut down
                if call.reason == "cancelled":
                    raise Cancelled(f"{url}: the call was cancelled") from None
                if call.reason or isinstance(error, TimeoutError):
                    raise TransportError(f"{url}: no answer in {seconds:g} s", True) from None
                message = f"{url}: {type(error).__name__}: {error}"
                raise TransportError(message[: len(url) + EXCERPT], True) from None

    def answers(self, path: str, timeout: float) -> bool:
        """Whether the path is answered with success, in the client's own time or ``timeout``."""
        try:
            self.raw("GET", path, timeout=min(timeout, self._timeout))
        except TransportError:
            return False
        return True

    def cancel(self, stop: threading.Event | None = None) -> None:
        """End calls under way, from any thread.

        Args:
            stop: those that were given this one; None: all that were given one.
        """
        with self._lock:
            for call in self._open:
                if stop is None or call.stop is stop:
                    call.end("cancelled")

    @contextlib.contextmanager
    def _call(self, seconds: float, stop: threading.Event | None) -> Iterator[_Call]:
        kind = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        connection = kind[self._parts.scheme](
            self._parts.hostname, self._parts.port, timeout=seconds
        )
        call = _Call(connection, stop)
        # a socket's own time limit is one of each read: a server that drips would never reach it
        watchdog = threading.Timer(seconds, call.end, ("late",))
        watchdog.daemon = True
        if stop is not None:
            with self._lock:
                self._open.add(call)
        try:
            if stop is not None and stop.is_set():
                raise Cancelled(f"{self.url}: the call was cancelled")
            watchdog.start()
            yield call
        finally:
            watchdog.cancel()
            with self._lock:
                self._open.discard(call)
            connection.close()

    def _exchange(self, call: _Call, method: str, path: str, body: Any) -> bytes:
        headers, content = dict(self._headers), None
        if body is not None:
            content = json.dumps(body, allow_nan=False).encode()
            headers["Content-Type"] = "application/json"
        call.connect()
        if call.reason:
            raise ConnectionAbortedError(call.reason)
        call.connection.request(method, self._prefix + path, content, headers)
        response = call.connection.getresponse()
        url = self.url + path
        if not 200 <= response.status < 300:
            text = response.read(4 * EXCERPT).decode("utf-8", "replace")[:EXCERPT]
            retry = response.status >= 500 or response.status in BUSY
            message = f"{url}: HTTP {response.status}: {text!r}"
            raise TransportError(message, retry, response.status)
        data = response.read(self._max_bytes + 1)
        if len(data) > self._max_bytes:
            raise TransportError(f"{url}: answer over {self._max_bytes} bytes", False)
        if response.length and call.reason:
            raise ConnectionAbortedError(call.reason)
        if response.length:
            raise TransportError(f"{url}: answer cut off, {response.length} bytes missing", True)
        return data

    def _json(self, path: str, data: bytes) -> Any:
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            text = data[: 4 * EXCERPT].decode("utf-8", "replace")[:EXCERPT]
            raise TransportError(f"{self.url}{path}: not JSON: {text!r}", True) from None
