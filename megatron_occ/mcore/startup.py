"""Start-up: process group, Megatron's parallel state, seeds, and the CPU back end."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from megatron_occ.mcore.cpu_backend import apply_cpu_backend


@dataclass(frozen=True)
class Layout:
    """This process's place in the parallel layout."""

    rank: int
    world_size: int
    data_parallel_rank: int
    data_parallel_size: int
    tensor_parallel_rank: int
    tensor_parallel_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one process that writes to the terminal and to the run folder."""
        return self.rank == 0

    def all_reduce_data_parallel(
        self, values: torch.Tensor, *, maximum: bool = False
    ) -> torch.Tensor:
        """Sum (or maximum) of ``values`` over data-parallel ranks, in place; returns it."""
        if self.data_parallel_size > 1:
            operation = (
                torch.distributed.ReduceOp.MAX if maximum else torch.distributed.ReduceOp.SUM
            )
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            torch.distributed.all_reduce(values, op=operation, group=group)
        return values

    def broadcast_tensor_parallel(self, values: torch.Tensor) -> torch.Tensor:
        """Values of tensor-parallel rank 0 on all ranks of its group, in place; returns it."""
        if self.tensor_parallel_size > 1:
            group = parallel_state.get_tensor_model_parallel_group()
            source = parallel_state.get_tensor_model_parallel_src_rank()
            torch.distributed.broadcast(values, src=source, group=group)
        return values


def initialize(*, tensor_parallel_size: int = 1, seed: int = 0) -> Layout:
    """Initialise torch.distributed and Megatron, once a process.

    Under ``torchrun`` or ``srun`` the environment names rank and world size; without it this
    process is the whole world.

    Args:
        tensor_parallel_size: ranks that share a layer; the rest of the world is data-parallel.
        seed: of Python's and torch's generators.

    Returns:
        This process's layout.
    """
    on_cpu = apply_cpu_backend()
    if not torch.distributed.is_initialized():
        _init_process_group("gloo" if on_cpu else "nccl")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_parallel_size, create_gloo_process_groups=False
        )
    random.seed(seed)
    torch.manual_seed(seed)
    if not on_cpu:
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(seed)
    return Layout(
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_parallel_size=tensor_parallel_size,
        device=torch.device("cpu" if on_cpu else "cuda"),
    )


def _init_process_group(backend: str) -> None:
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group(backend)
    else:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)


def barrier() -> None:
    """Wait for all ranks."""
    torch.distributed.barrier()


def shutdown() -> None:
    """Release Megatron's groups and the process group."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
