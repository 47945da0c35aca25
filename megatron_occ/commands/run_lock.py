"""One writer a run folder: a lock that ends with the process that holds it.

A POSIX record lock (``fcntl``), which NFS and Lustre carry between machines and which a killed
process does not keep. That of a machine that is gone ends when the file server gives it up. Child
processes do not inherit it: a worker that outlives its run holds nothing.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_occ.config import ConfigError
from megatron_occ.observe.metrics import LOCK_FILE

logger = logging.getLogger(__name__)

# seconds that a file server keeps the lock of a machine that is gone (NFS 4: 90 by default)
_LEASE, _AGAIN = 180.0, 5.0
# file systems without locks, or mounted so
_UNSUPPORTED = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder on the main rank; the folder is made where it is missing.

    A folder in which nothing was written is gone again afterwards.

    Raises:
        ConfigError: another process holds it, or the folder can't be made.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        yield
        return
    path = folder / LOCK_FILE
    descriptor = _take(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # it holds a run
            folder.rmdir()


def _take(path: Path) -> int:
    deadline, waits = time.monotonic() + _LEASE, False
    while True:
        descriptor = _open(path)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                logger.warning(
                    "run_dir=%s: this file system has no locks (%s): nothing keeps a second "
                    "process from writing there",
                    path.parent,
                    error.strerror,
                )
                return descriptor
            holder = os.pread(descriptor, 1000, 0).decode("utf-8", "replace").strip()
            os.close(descriptor)
            if _may_be_gone(holder) and time.monotonic() < deadline:
                if not waits:
                    logger.warning("run_dir=%s: %s holds it: waiting", path.parent, holder)
                waits = True
                time.sleep(_AGAIN)
                continue
            raise ConfigError(
                f"run_dir={path.parent}: {holder or 'another process'} is writing to it: wait for "
                "it, stop it, or name another folder with run_dir=..."
            ) from None
        if _is_current(descriptor, path):
            text = f"process {os.getpid()} on {socket.gethostname()} since {_now()}\n"
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, text.encode(), 0)
            return descriptor
        # its last holder took the file away between our opening and locking it
        os.close(descriptor)


def _may_be_gone(holder: str) -> bool:
    """Whether the holder was another machine, whose lock a server keeps for a while."""
    return " on " in holder and f" on {socket.gethostname()} " not in holder


def _open(path: Path) -> int:
    if os.path.exists(path.parent) and not os.path.isdir(path.parent):
        raise ConfigError(f"run_dir={path.parent} is a file: name a folder with run_dir=...")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"run_dir={path.parent}: can't be made: {error}") from error


def _is_current(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _now() -> str:
    return time.strftime("%F %T %z")
