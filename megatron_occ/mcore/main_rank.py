"""Work that one rank does for all of them: results and errors reach every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_occ.mcore.layout import PATIENCE
from megatron_occ.rollout import EngineError


class MainRank:
    """Rank 0 among all ranks; every method but ``send`` and ``receive`` is called by all of them.

    The messages go over gloo: NCCL's time limit would end a long wait, and its waiting keeps the
    device busy.
    """

    def __init__(self) -> None:
        self.size = torch.distributed.get_world_size()
        self.is_this = torch.distributed.get_rank() == 0
        self._group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)

    def gather(self, value: Any) -> list[Any]:
        """Python objects of all ranks, on the main one; elsewhere an empty list."""
        values: list[Any] = [None] * self.size if self.is_this else []
        torch.distributed.gather_object(
            value, values if self.is_this else None, dst=0, group=self._group
        )
        return values

    def share(self, value: Any) -> list[Any]:
        """Python objects of all ranks, on all of them."""
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=self._group)
        return values

    def send(self, tensor: Tensor) -> None:
        """Send a tensor to the main rank, which calls :meth:`receive` meanwhile."""
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        torch.distributed.send(data, dst=0, group=self._group)

    def receive(self, tensor: Tensor, rank: int) -> None:
        """Fill a contiguous tensor of the CPU with what another rank sends."""
        data = tensor.view(-1).view(torch.uint8)
        torch.distributed.recv(data, src=rank, group=self._group)

    def run(self, work: Callable[[], Sequence[Any] | None]) -> Any:
        """Call ``work`` on the main rank.

        Args:
            work: returns an object for each rank, or None.

        Returns:
            This rank's object.

        Raises:
            EngineError: ``work`` failed; on the main rank what it raised.
        """
        outcomes, error = None, None
        if self.is_this:
            try:
                results = work() or [None] * self.size
                outcomes = [(result, None) for result in results]
            except Exception as caught:
                error = caught
                outcomes = [(None, str(caught) or repr(caught))] * self.size
        mine: list[Any] = [None]
        torch.distributed.scatter_object_list(mine, outcomes, src=0, group=self._group)
        if error is not None:
            raise error
        result, message = mine[0]
        if message is not None:
            raise EngineError(message)
        return result
