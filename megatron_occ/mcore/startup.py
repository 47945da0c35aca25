"""Start-up: process group, Megatron's parallel state, seeds, and the CPU back end."""

from __future__ import annotations

import logging
import os
import random
from typing import TypeVar

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

from megatron_occ.config.pipeline import model_chunks
from megatron_occ.config.schema import Config
from megatron_occ.mcore.cpu.backend import apply_cpu_backend
from megatron_occ.mcore.layout import PATIENCE, Layout, context_group_of_hosts

T = TypeVar("T")
_ENVIRONMENT = {
    # Megatron overlaps messages with matrix products by the order in which kernels are queued
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # TransformerEngine asks for TF32 where all of a product is fp32, and has no switch of its own;
    # cuBLAS reads this one when its first handle is made
    "NVIDIA_TF32_OVERRIDE": "0",
}
# Megatron says it once for each weight that is drawn on the host, as model.init_device=cpu asks for
_EXPECTED = "CPU RNG state changed within GPU RNG context"
_stores: list[torch.distributed.Store] = []


def initialize(config: Config) -> Layout:
    """Initialise torch.distributed and Megatron, once a process.

    Under ``torchrun`` or ``srun`` the environment names rank and world size; without it this
    process is the whole world.

    Args:
        config: its layout, and the seed of Python's and torch's generators.

    Returns:
        This process's place.
    """
    on_cpu = apply_cpu_backend()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not torch.distributed.is_initialized():
        _init_process_group("gloo" if on_cpu else "nccl")
    if not parallel_state.model_parallel_is_initialized():
        initialize_groups(config)
        if config.parallel.context > 1:
            # now, while all ranks are here: it is first used after rollouts of different lengths
            context_group_of_hosts()
    random.seed(config.seed)
    # stages draw their own weights, or the layers of all but the first would start alike
    stage = parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(config.seed + 100 * stage)
    if not on_cpu:
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        if config.model.init_device == "cpu":
            logging.getLogger(model_parallel_cuda_manual_seed.__module__).addFilter(_is_unexpected)
        # Megatron adds 100 for each expert rank: another stride, or stages would meet them
        model_parallel_cuda_manual_seed(config.seed + 100_003 * stage)
    return Layout.of_this_rank(torch.device("cpu" if on_cpu else "cuda"))


def initialize_groups(config: Config) -> None:
    """Megatron's process groups for the layout of ``config``."""
    parallel = config.parallel
    virtual = parallel.virtual_pipeline
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        distributed_timeout_minutes=int(PATIENCE.total_seconds() // 60),
        create_gloo_process_groups=False,
        get_embedding_ranks=lambda ranks: [ranks[stage] for stage in embedding_stages(config)],
    )


def embedding_stages(config: Config) -> list[int]:
    """Pipeline stages that hold a copy of the word embedding, in order.

    The first stage, the last one if it uses the embedding as output layer, and the one with the MTP
    layers. Megatron's default, first and last, adds an untied output layer to the embedding where
    the MTP layers have a stage of their own.
    """
    stages = config.parallel.pipeline
    holders = {0} | ({stages - 1} if config.model.tie_embeddings else set())
    chunks = enumerate(model_chunks(config))
    return sorted(holders | {index % stages for index, chunk in chunks if "m" in chunk})


def _init_process_group(backend: str) -> None:
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        # here all ranks have to come in torch's own time: one that never starts is told in minutes
        store, rank, size = next(torch.distributed.rendezvous("env://"))
    else:
        store, rank, size = torch.distributed.HashStore(), 0, 1
    # NCCL's ranks find each other in the store when they first have something to say
    store.set_timeout(PATIENCE)
    torch.distributed.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=PATIENCE
    )
    if size > 1:
        _stores.append(torch.distributed.PrefixStore("places", store.clone()))


def places_of_ranks() -> torch.distributed.Store | None:
    """Where ranks note what they are at, over a connection of its own; None for one process.

    One that waits for a key holds up all requests of its connection.
    """
    return _stores[-1] if _stores else None


def from_main_rank(value: T) -> T:
    """The main rank's value on all ranks, a picklable one."""
    box = [value]
    if torch.distributed.get_world_size() > 1:
        torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait for all ranks."""
    torch.distributed.barrier()


def shutdown() -> None:
    """Release Megatron's groups and the process group."""
    for rotary in (RotaryEmbedding, YarnRotaryEmbedding):
        # they cache results together with the module, and so with its group, which gloo polls
        rotary.forward.cache_clear()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    _stores.clear()


def _is_unexpected(record: logging.LogRecord) -> bool:
    return _EXPECTED not in record.getMessage()
