"""Run a test function on several ranks: one process each, gloo between them.

Processes are forked from a server that has imported torch and Megatron once and done nothing else:
as fresh as spawned ones, without seconds of imports each.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

# seconds that other ranks get to report their own error after a first one
GRACE = 2.0
PRELOAD = [
    "torch.distributed",
    # before Megatron: it hides what needs a device
    "megatron_occ.mcore",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    # whole runs
    "megatron_occ.phases.rl",
]


class RankError(AssertionError):
    """A rank raised, died or did not end in time."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120
) -> list[Any]:
    """Call ``function(*args)`` on every rank of a fresh process group.

    Args:
        function: at module level; ``torch.distributed`` is initialised when it is called, Megatron
            is not. Each rank has one thread.
        world_size: number of processes.
        args: pickled, the same on every rank.
        timeout: seconds for the whole call and for each collective.

    Returns:
        What the function returned, by rank: plain objects and tensors.

    Raises:
        RankError: with the tracebacks of the ranks that raised, the earliest first.
    """
    context = fork_server()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            context.Process(
                target=_run_rank, args=(function, rank, world_size, folder, timeout, args)
            )
            for rank in range(world_size)
        ]
        start_and_join(processes, timeout)
        return _collect(processes, folder, timeout)


def fork_server() -> ForkServerContext:
    """Where processes are forked from."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def free_port() -> int:
    """A port of this machine that nobody listens to."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_and_join(processes: list[BaseProcess], timeout: float) -> None:
    """Run processes to their end; those that are left after ``timeout`` seconds are killed."""
    try:
        for process in processes:
            process.start()
        _join(processes, time.monotonic() + timeout)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            if process.pid is not None:
                process.join()


def _join(processes: list[BaseProcess], deadline: float) -> None:
    """Wait for the processes; once one has failed, a few seconds only."""
    running = list(processes)
    while running and time.monotonic() < deadline:
        wait([p.sentinel for p in running], timeout=max(deadline - time.monotonic(), 0))
        running = [p for p in running if p.is_alive()]
        if any(not p.is_alive() and p.exitcode != 0 for p in processes):
            deadline = min(deadline, time.monotonic() + GRACE)


def _collect(processes: list[BaseProcess], folder: Path, timeout: float) -> list[Any]:
    results = [folder / f"result_{rank}.pt" for rank in range(len(processes))]
    codes = [process.exitcode for process in processes]
    if not any(codes):
        return [torch.load(path, weights_only=False) for path in results]
    errors = sorted(folder.glob("error_*.txt"), key=lambda path: path.stat().st_mtime_ns)
    raise RankError(
        f"exit codes by rank {codes} (-9: killed), time limit {timeout} s\n"
        + "\n".join(path.read_text() for path in errors)
    )


def _run_rank(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: Path,
    timeout: float,
    args: tuple,
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group(
            "gloo",
            store=torch.distributed.FileStore(str(folder / "store"), world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        torch.save(function(*args), folder / f"result_{rank}.pt")
        # a rank that leaves closes its connections: not before the others are done with them
        torch.distributed.barrier()
        # Megatron's checkpoint writer leaves one behind, which would hold our output open
        for child in multiprocessing.active_children():
            child.terminate()
    except BaseException:
        report = f"rank {rank} of {world_size}:\n{traceback.format_exc()}"
        (folder / f"error_{rank}.txt").write_text(report)
        os._exit(1)
    os._exit(0)
