"""This process's place in the parallel layout, and sums and broadcasts over parts of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, get_backend

# how long ranks wait for each other: one may have its responses, or their scores, hours before
# another. A rank that is gone ends the waiting of the others at once: its connections close, and
# torchrun or srun ends the job
PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class Layout:
    """A rank's coordinates. Tensor, pipeline and context ranks share the same sequences."""

    rank: int
    world_size: int
    data_parallel_rank: int
    data_parallel_size: int
    tensor_parallel_rank: int
    tensor_parallel_size: int
    pipeline_rank: int
    pipeline_size: int
    context_parallel_rank: int
    context_parallel_size: int
    device: torch.device

    @classmethod
    def of_this_rank(cls, device: torch.device) -> Layout:
        """Read it from Megatron's parallel state."""
        return cls(
            rank=torch.distributed.get_rank(),
            world_size=torch.distributed.get_world_size(),
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
            tensor_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
            pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
            pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
            context_parallel_rank=parallel_state.get_context_parallel_rank(),
            context_parallel_size=parallel_state.get_context_parallel_world_size(),
            device=device,
        )

    @property
    def is_main(self) -> bool:
        """True on the one process that writes to the terminal and to the run folder."""
        return self.rank == 0

    @property
    def is_model_parallel_main(self) -> bool:
        """True on one of the ranks that share the same sequences."""
        ranks = (self.tensor_parallel_rank, self.pipeline_rank, self.context_parallel_rank)
        return not any(ranks)

    @property
    def is_last_stage(self) -> bool:
        """True where log-probs and losses are computed."""
        return self.pipeline_rank == self.pipeline_size - 1

    def any_rank(self, flag: bool) -> bool:
        """Whether any rank of the run has the flag, on all of them."""
        if self.world_size == 1:
            return flag
        found = torch.tensor(flag, dtype=torch.int32, device=self.device)
        torch.distributed.all_reduce(found, op=ReduceOp.MAX)
        return bool(found)

    def all_reduce_data_parallel(self, values: Tensor, *, maximum: bool = False) -> Tensor:
        """Sum (or maximum) of ``values`` over data-parallel ranks, in place; returns it.

        Context-parallel ranks hold the same values: they take no part.
        """
        if self.data_parallel_size > 1:
            operation = ReduceOp.MAX if maximum else ReduceOp.SUM
            group = parallel_state.get_data_parallel_group()
            torch.distributed.all_reduce(values, op=operation, group=group)
        return values

    def gather_data_parallel(self, values: Tensor) -> Tensor:
        """``values`` of all data-parallel ranks, equal shapes, concatenated on dim 0."""
        if self.data_parallel_size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.data_parallel_size)]
        group = parallel_state.get_data_parallel_group()
        torch.distributed.all_gather(parts, values.contiguous(), group=group)
        return torch.cat(parts)

    def gather_ranks(self, values: Tensor) -> Tensor:
        """``values`` of all ranks, equal shapes, concatenated on dim 0."""
        if self.world_size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def broadcast_model_parallel(self, values: Tensor) -> Tensor:
        """Values of the first of the ranks that share sequences, on all of them, in place."""
        groups = (
            (self.pipeline_size, parallel_state.get_pipeline_model_parallel_group),
            (self.context_parallel_size, parallel_state.get_context_parallel_group),
            (self.tensor_parallel_size, parallel_state.get_tensor_model_parallel_group),
        )
        for size, group in groups:
            if size > 1:
                torch.distributed.broadcast(values, group=group(), group_src=0)
        return values

    def broadcast_last_stage(self, values: Tensor) -> Tensor:
        """Values of the last pipeline stage on all stages, in place; returns it."""
        if self.pipeline_size > 1:
            group = parallel_state.get_pipeline_model_parallel_group()
            torch.distributed.broadcast(values, group=group, group_src=self.pipeline_size - 1)
        return values

    def share_last_stage(self, value: Any) -> Any:
        """A small Python object of the last pipeline stage on all stages."""
        if self.pipeline_size == 1:
            return value
        box = [value]
        group = parallel_state.get_pipeline_model_parallel_group()
        source = self.pipeline_size - 1
        torch.distributed.broadcast_object_list(box, group=group, group_src=source)
        return box[0]

    def largest_among_expert_ranks(self, values: list[int]) -> list[int]:
        """Maxima over the ranks that share experts; the host waits for them."""
        group = expert_sharing_group()
        if group is None:
            return values
        largest = torch.tensor(values, device=self.device)
        torch.distributed.all_reduce(largest, op=ReduceOp.MAX, group=group)
        return largest.tolist()

    def decide(self, choice: int, flag: bool) -> tuple[int, bool]:
        """One choice, and whether any rank has the flag, on all that share a model.

        Ranks that go through a model together have to do the same, also where a decision hangs on
        a clock or on a rank's own thread.

        Args:
            choice: at least 0; that of the first tensor and pipeline rank counts.
            flag: of this rank.
        """
        if self.tensor_parallel_size * self.pipeline_size == 1:
            return choice, flag
        is_first = self.tensor_parallel_rank == self.pipeline_rank == 0
        # the maximum over all is the first one's choice, and any flag
        decided = torch.tensor([choice if is_first else 0, int(flag)], device=self.device)
        for group in (
            parallel_state.get_pipeline_model_parallel_group(),
            parallel_state.get_tensor_model_parallel_group(),
        ):
            if group.size() > 1:
                torch.distributed.all_reduce(decided, op=ReduceOp.MAX, group=group)
        choice, flag = decided.tolist()
        return choice, bool(flag)

    def gather_context_parallel(self, value: Any) -> list[Any]:
        """Python objects of the context-parallel ranks, in rank order."""
        if self.context_parallel_size == 1:
            return [value]
        parts: list[Any] = [None] * self.context_parallel_size
        torch.distributed.all_gather_object(parts, value, group=context_group_of_hosts())
        return parts

    def broadcast_context_parallel(self, values: Tensor, source: int) -> Tensor:
        """A tensor on the host, of one context-parallel rank, on all of them, in place."""
        if self.context_parallel_size > 1 and values.numel():
            torch.distributed.broadcast(values, group=context_group_of_hosts(), group_src=source)
        return values


def context_group_of_hosts() -> ProcessGroup:
    """The context-parallel ranks over gloo, for what lies on the host.

    NCCL would take it through the device's memory. All ranks of the run come for it together the
    first time, which is at start-up.
    """
    group = parallel_state.get_context_parallel_group()
    return group if get_backend(group) == "gloo" else _over_gloo(group)


@functools.cache
def _over_gloo(group: ProcessGroup) -> ProcessGroup:
    """The ranks of a group over gloo; all ranks of the run come with their groups."""
    mine = torch.distributed.get_process_group_ranks(group)
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    # each rank makes all of them, in one order
    lists = sorted({tuple(ranks) for ranks in found})
    groups = {
        ranks: torch.distributed.new_group(list(ranks), timeout=PATIENCE, backend="gloo")
        for ranks in lists
    }
    return groups[tuple(mine)]


def expert_sharing_group() -> ProcessGroup | None:
    """Ranks that hold parts of the same experts, if they reach beyond one tensor-parallel group.

    Such ranks have sequences of their own, and each layer's tokens go to all of them: a forward
    pass is one of all of them. None where the tensor-parallel ranks share experts alone.
    """
    group = parallel_state.get_expert_tensor_and_model_parallel_group()
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    return group if group.size() > tensor else None
