"""Weights and optimizer as they were: a trial of a few updates leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron_occ.mcore.model import OCCGPTModel
from megatron_occ.mcore.moments import refresh_host_copies
from megatron_occ.mcore.optimizer import JointOptimizer
from megatron_occ.mcore.optimizer_state import main_parameters, state_tensors


@contextmanager
def restored(
    chunks: Sequence[OCCGPTModel], optimizer: JointOptimizer, *, moments: bool = True
) -> Iterator[None]:
    """Put weights, buffers, schedule and the optimizer's moments back at the end of the block.

    Copies lie on the host: weights once, with fp32 copies of 16-bit ones, moments twice that.

    Args:
        chunks: of the model on this rank.
        optimizer: of these chunks.
        moments: False keeps those that the block leaves, and the count of updates with them.
    """
    tensors = [
        tensor.data for chunk in chunks for tensor in (*chunk.parameters(), *chunk.buffers())
    ]
    parts = optimizer.megatron.chained_optimizers
    tensors += [main.data for part in parts for _, main in main_parameters(part)]
    if moments:
        tensors += state_tensors(optimizer.megatron)
    kept = [tensor.cpu().clone() for tensor in tensors]
    updates, schedule = optimizer.updates, optimizer.schedule.state_dict()
    try:
        yield
    finally:
        optimizer.finish_gathers()
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.copy_(value)
        refresh_host_copies(optimizer.megatron)
        # Megatron adds the steps of a loaded state to its own
        optimizer.schedule.num_steps = 0
        optimizer.schedule.load_state_dict(schedule)
        if moments:
            optimizer.set_updates(updates)
