"""The process that writes a rank's part of a checkpoint, around Megatron-Core's own writing."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint_folder import write_checksums
from megatron_occ.mcore.cpu.forking import Region, copied
from megatron_occ.mcore.optimizer_state import main_parameters, state_tensors
from megatron_occ.rl.stopping import belong_to_parent

# training comes first where processors are short
_NICE = 10


def what_updates_change(actor: MegatronGPTActor) -> Iterator[torch.Tensor]:
    """All that an update writes to on a CPU: weights, main copies, moments and gradients.

    Nothing on a GPU: its tensors are copied anyway, and memory of the host that a driver has
    registered is not to be touched.
    """
    if actor.layout.device.type != "cpu":
        return
    optimizer = actor.optimizer.megatron
    yield from state_tensors(optimizer)
    for part in optimizer.chained_optimizers:
        yield from (main for _, main in main_parameters(part))
    for chunk in actor.chunks:
        for parameter in chunk.parameters():
            yield parameter
            gradient = getattr(parameter, "main_grad", parameter.grad)
            if gradient is not None:
                yield gradient


def in_own_process(request: AsyncRequest, path: Path, owned: set[Region]) -> AsyncRequest:
    """Megatron's request to write a checkpoint, with what :func:`_write` adds to it.

    Args:
        request: of a save.
        path: folder that is written to.
        owned: memory that the process does not inherit; of tensors there it gets a copy.
    """
    if request.async_fn is None:  # nothing to write on this rank
        return request
    write = functools.partial(_write, request.async_fn, path, os.getpid())
    return request._replace(
        async_fn=write, preload_fn=functools.partial(_copied, request.preload_fn, owned)
    )


def _copied(preload: Callable[[], list[tuple]], owned: set[Region]) -> list[tuple]:
    def free(tensor: torch.Tensor) -> torch.Tensor:
        return copied(tensor) if Region.of(tensor) in owned else tensor

    return [
        (*names, (plain, [(item, free(tensor)) for item, tensor in tensors]))
        for *names, (plain, tensors) in preload()
    ]


def _write(
    write: Callable[..., None],
    folder: Path,
    parent: int,
    rank: int,
    buckets: Sequence[tuple],
    results: Any,
) -> None:
    """In a process of its own: Megatron's writing, then the checksums of what it wrote."""
    belong_to_parent(parent)
    os.nice(_NICE)
    # as those that Megatron starts from here belong to this one
    os.register_at_fork(after_in_child=functools.partial(belong_to_parent, os.getpid()))
    signal.signal(signal.SIGCHLD, _end_with_a_failed_child)
    write(rank, buckets, results)
    # a full disk is told by Megatron; the main rank counts what has no checksum
    with contextlib.suppress(OSError):
        write_checksums(folder, rank, [Path(bucket[0]) for bucket in buckets])


def _end_with_a_failed_child(*_: object) -> None:
    """Megatron would wait for its report for ever; who waits for this process sees it end."""
    with contextlib.suppress(ChildProcessError):  # all were waited for
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        # an exit status, or the signal that it was killed by
        if ended is not None and ended.si_status != 0:
            os._exit(1)
