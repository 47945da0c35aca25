"""Calls to servers that are made again where a failure may pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from megatron_occ.rollout.remote.http import TransportError
from megatron_occ.rollout.remote.settings import RemoteSettings

T = TypeVar("T")


def patiently(work: Callable[[], T], settings: RemoteSettings) -> T:
    """Do something that may be done twice; after a failure that may pass, again.

    Args:
        work: asks a server.
        settings: ``retries`` and ``backoff``; none is begun once ``update_timeout`` has passed, so
            a server that hangs is waited for once.

    Raises:
        TransportError: the last one.
    """
    deadline = time.monotonic() + settings.update_timeout
    for attempt in range(settings.retries):
        try:
            return work()
        except TransportError as error:
            pause = settings.backoff * 2**attempt
            if not error.retry or time.monotonic() + pause > deadline:
                raise
            time.sleep(pause)
    return work()
