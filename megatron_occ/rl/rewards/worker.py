"""The trainer's end of one verifier process: start, ask with a time limit, kill."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

# A new interpreter and not a fork: forking a process with torch's or CUDA's threads can deadlock.
# Not multiprocessing's spawn either: that imports the user's main script again in every worker
# (with torch and Megatron, at each restart; and runs it again where it has no main guard) and
# sends objects as pickles.
_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from megatron_occ.rl.rewards.worker_main import main; main(json.loads(sys.argv[2]))"
)
# A user's module may import much, on a busy machine or from a network disk.
LOAD_TIMEOUT_SECONDS = 120.0
_READ_BYTES = 65536


class WorkerTimeout(Exception):
    """The process did not answer in time; it has been killed."""


class WorkerDied(Exception):
    """The process ended without an answer."""


class VerifierWorker:
    """One verifier process, started at the first request and again after each kill."""

    def __init__(self, memory_bytes: int | None) -> None:
        self._memory_bytes = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._loaded: set[str] = set()

    def ask(self, path: str, response: str, answer: str, timeout: float) -> dict[str, Any]:
        """Score one response: ``{"score": float}`` or ``{"error": str}``.

        The limit is for the verifier alone: the process is started and the verifier imported
        before it counts. Raises ValueError when the verifier cannot be imported, WorkerTimeout
        and WorkerDied.
        """
        self._ensure_loaded(path)
        return self._exchange({"path": path, "response": response, "answer": answer}, timeout)

    def call(self, path: str, arguments: Sequence[Any], timeout: float) -> dict[str, Any]:
        """Call a function of this package with what JSON can hold: ``{"value"}`` or ``{"error"}``.

        Raises as :meth:`ask`.
        """
        self._ensure_loaded(path)
        return self._exchange({"path": path, "arguments": arguments}, timeout)

    def kill(self) -> None:
        """End the process and all that it started."""
        process, self._process = self._process, None
        self._loaded.clear()
        if process is None:
            return
        # The process leads its own group; it may be gone already.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            # Closing flushes a request that could not be delivered.
            with contextlib.suppress(OSError):
                pipe.close()

    def _ensure_loaded(self, path: str) -> None:
        if self._process is not None and self._process.poll() is not None:
            self.kill()  # it ended between two requests: no fault of the next item
        if self._process is None:
            self._start()
        if path in self._loaded:
            return
        try:
            reply = self._exchange({"path": path}, LOAD_TIMEOUT_SECONDS)
        except (WorkerTimeout, WorkerDied) as error:
            raise ValueError(f"verifier {path!r} cannot be imported: {error}") from error
        if "error" in reply:
            raise ValueError(reply["error"])
        self._loaded.add(path)

    def _start(self) -> None:
        arguments = [json.dumps(sys.path), json.dumps(self._memory_bytes)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOTSTRAP, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def _exchange(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Send a request, wait for its reply. Whatever goes wrong, no late reply stays behind."""
        try:
            line = json.dumps({**request, "limit": timeout}).encode() + b"\n"
            self._process.stdin.write(line)
            self._process.stdin.flush()
            return json.loads(self._read_line(timeout))
        except (BrokenPipeError, EOFError):
            raise WorkerDied(self._obituary()) from None
        except BaseException:
            self.kill()
            raise

    def _read_line(self, timeout: float) -> bytes:
        deadline = time.monotonic() + timeout
        received = b""
        descriptor = self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while not received.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise WorkerTimeout(f"no answer within {timeout:g} s")
                chunk = os.read(descriptor, _READ_BYTES)
                if not chunk:
                    raise EOFError
                received += chunk
        return received

    def _obituary(self) -> str:
        # The pipe can close just before the process has ended.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1.0)
        code = self._process.returncode
        self.kill()
        return f"the verifier process ended with exit code {code}"
