"""The weights of all ranks, put together on the main one without a checkpoint on a disk.

Megatron-Core's sharded state says of each rank's tensors where they lie in the whole ones, for any
layout: it is what a distributed checkpoint is written from. Here the parts go over the process
group (gloo, by way of the CPU) instead, one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    apply_factories,
    is_main_replica,
)
from torch import Tensor

from megatron_occ.convert.distributed import fits, overlap
from megatron_occ.convert.errors import FolderError
from megatron_occ.convert.slots import Slot
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint import model_state
from megatron_occ.mcore.main_rank import MainRank

Shape = tuple[int, ...]
Place = tuple[str, Shape]


@dataclass(frozen=True)
class Part:
    """What a rank has of a whole tensor.

    Args:
        key: of the whole tensor, as checkpoints name it.
        whole: shape of that.
        dtype: of its elements.
        offset: first entry of the part.
        sizes: shape of the part, of as many dimensions as the whole has.
        rank: that has it.
    """

    key: str
    whole: Shape
    dtype: torch.dtype
    offset: Shape
    sizes: Shape
    rank: int


class GatheringReader:
    """A ``Reader`` over all ranks: each makes the same calls in the same order.

    On the main rank parameters are on the CPU; the others send their parts, and get tensors without
    data (of the device ``meta``).

    Args:
        actor: the policy; its weights must not change meanwhile.
        main: where parameters are put together.
    """

    def __init__(self, actor: MegatronGPTActor, main: MainRank) -> None:
        self._main, self._rank = main, torch.distributed.get_rank()
        self._own = {_place(tensor): tensor for tensor in _kept_here(actor)}
        mine = [_part(tensor, self._rank) for tensor in self._own.values()]
        self._parts: dict[str, dict[Shape, Part]] = {}
        for parts in main.share(mine):
            for part in parts:
                # where two ranks keep one part, the first of them sends it
                self._parts.setdefault(part.key, {}).setdefault(part.offset, part)

    def check(self, slots: Sequence[Slot]) -> None:
        """See ``DistributedReader``.

        Raises:
            FolderError: lists the slots that are not there, or have another shape.
        """
        problems = []
        for slot in slots:
            found = self._any(slot)
            if found is None:
                problems.append(f"the model has no {slot.key}")
            elif not fits(found.whole, slot):
                problems.append(f"{slot.key} is {list(found.whole)}, wanted {list(slot.whole)}")
        if problems:
            raise FolderError(problems)

    def dtype(self, slot: Slot) -> torch.dtype:
        """See ``DistributedReader``."""
        found = self._any(slot)
        assert found is not None, f"{slot.key} was checked"
        return found.dtype

    def tensor(self, slot: Slot) -> Tensor:
        """See ``DistributedReader``.

        Raises:
            FolderError: no rank has some of it.
        """
        device = "cpu" if self._main.is_this else "meta"
        result = torch.empty(slot.box, dtype=self.dtype(slot), device=device)
        pieces = list(self._pieces(slot))
        if sum(result[ours].numel() for _, ours, _ in pieces) != result.numel():
            raise FolderError(f"{slot.key} is not complete")
        for part, ours, theirs in pieces:
            if self._main.is_this:
                result[ours] = self._fetched(part, theirs, result[ours].shape)
            elif part.rank == self._rank:
                self._main.send(self._local(part)[theirs])
        return result.view(slot.shape)

    def _any(self, slot: Slot) -> Part | None:
        return next(iter(self._parts.get(slot.key, {}).values()), None)

    def _pieces(self, slot: Slot) -> Iterator[tuple[Part, tuple[slice, ...], tuple[slice, ...]]]:
        """Parts that overlap a slot, and where, counted in the slot and in the part."""
        for part in self._parts[slot.key].values():
            found = overlap(slot, part.offset, part.sizes)
            if found is not None:
                yield part, *found

    def _fetched(self, part: Part, theirs: tuple[slice, ...], shape: torch.Size) -> Tensor:
        if part.rank == self._rank:
            return self._local(part)[theirs]
        room = torch.empty(shape, dtype=part.dtype)
        self._main.receive(room, part.rank)
        return room

    def _local(self, part: Part) -> Tensor:
        return self._own[part.key, part.offset].data.detach().view(part.sizes)


def _kept_here(actor: MegatronGPTActor) -> Iterator[ShardedTensor]:
    """Tensors of this rank that a checkpoint would have from it."""
    state = model_state(actor)
    apply_factories(state)
    for value in nested_values(state):
        if isinstance(value, ShardedTensor) and is_main_replica(value.replica_id):
            yield value


def _place(tensor: ShardedTensor) -> Place:
    return tensor.key, tuple(tensor.global_offset)


def _part(tensor: ShardedTensor, rank: int) -> Part:
    return Part(
        tensor.key,
        tuple(tensor.global_shape),
        tensor.dtype,
        tuple(tensor.global_offset),
        (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape),
        rank,
    )
