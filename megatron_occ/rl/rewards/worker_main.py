"""The verifier process: reads one JSON request a line, writes one JSON reply a line."""

from __future__ import annotations

import json
import os
import resource
import signal
import traceback
from collections.abc import Callable
from typing import IO, Any

from megatron_occ.rl.rewards.registry import NotAScore, checked_score, load_verifier
from megatron_occ.rl.stopping import SIGNALS

_MAX_DETAIL_CHARS = 500
# Only Linux tells a process its address space here, and only Linux enforces a limit on it.
_STATM = "/proc/self/statm"


def main(memory_bytes: int | None) -> None:
    """Serve requests until standard input ends, which it does when the trainer is gone.

    A request is ``{"path", "response", "answer", "limit"}``, or without response and answer to
    import the verifier only; ``{"path", "arguments", "limit"}`` is a call of another function. A
    reply is ``{"score"}``, of such a call ``{"value"}``, or ``{"error"}``.
    """
    # to the whole job, as Slurm sends them: the run acts on them, and may need the scores for it
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    requests, replies = _private_channel()
    verifiers: dict[str, Callable[..., Any]] = {}
    for line in requests:
        request = json.loads(line)
        # The trainer kills a process that is late. Should the trainer itself be gone, the alarm
        # does: with its default action it ends even a loop in C code that never returns.
        signal.setitimer(signal.ITIMER_REAL, 2 * request["limit"] + 1)
        reply = _serve(request, verifiers, memory_bytes)
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


def _serve(
    request: dict[str, Any], verifiers: dict[str, Callable[..., Any]], memory_bytes: int | None
) -> dict[str, Any]:
    path = request["path"]
    try:
        if path not in verifiers:
            _allow_memory(None)
            verifiers[path] = load_verifier(path)
            _allow_memory(memory_bytes)
        if "arguments" in request:
            return {"value": verifiers[path](*request["arguments"])}
        if "response" not in request:
            return {"score": 0.0}
        return {"score": checked_score(verifiers[path](request["response"], request["answer"]))}
    except NotAScore as error:
        return {"error": str(error)}
    except BaseException as error:  # SystemExit, RecursionError, MemoryError: all are the item's
        return {"error": _describe(error)}


def _describe(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"[:_MAX_DETAIL_CHARS]
    # The first frame is the call in this module: nothing to look at for who wrote the verifier.
    frames = traceback.extract_tb(error.__traceback__)[1:]
    return f"{text} (at {frames[-1].filename}:{frames[-1].lineno})" if frames else text


def _private_channel() -> tuple[IO[bytes], IO[bytes]]:
    """Keep the pipes for the protocol: a verifier that prints must not write into a reply."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return requests, replies


def _allow_memory(extra_bytes: int | None) -> None:
    """Limit the address space to what is in use now plus ``extra_bytes``; None lifts the limit.

    A short answer such as 9^{9^{9}} can ask for any amount of memory, and the system might then
    end the trainer instead of this process. Counted from now, because what the imports map (the
    libraries of a torch build with CUDA, say) is no sign of trouble.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = hard
    if extra_bytes is not None and os.path.exists(_STATM):
        with open(_STATM, encoding="ascii") as file:
            limit = int(file.read().split()[0]) * resource.getpagesize() + extra_bytes
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
