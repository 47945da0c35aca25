"""The reference policy of the KL penalty: weights of an earlier time, beside the present ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from torch import Tensor, nn

# of its tensors' names in a checkpoint
_PREFIX = "reference."


class ReferencePolicy:
    """Copies of the parameters on this rank.

    Args:
        chunks: gives those of the model on this rank.
    """

    def __init__(self, chunks: Callable[[], Sequence[nn.Module]]) -> None:
        self._chunks = chunks
        self._kept: list[Tensor] | None = None

    @property
    def is_kept(self) -> bool:
        """Whether there is one."""
        return self._kept is not None

    def keep(self) -> None:
        """The present weights are the reference from now on."""
        self._kept = [parameter.detach().clone() for parameter in self._parameters()]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A block in which the model has the reference's weights."""
        assert self._kept is not None, "keep() was not called"
        live = [parameter.data for parameter in self._parameters()]
        try:
            for parameter, kept in zip(self._parameters(), self._kept, strict=True):
                parameter.data = kept
            yield
        finally:
            for parameter, current in zip(self._parameters(), live, strict=True):
                parameter.data = current

    def sharded_state(self, model_state: dict[str, Any]) -> dict[str, Any]:
        """Sharded tensors of the copies, for a checkpoint.

        Args:
            model_state: of the model, see ``checkpoint.model_state``; buffers are left out.
        """
        assert self._kept is not None, "keep() was not called"
        pairs = zip(self._parameters(), self._kept, strict=True)
        copies = {id(parameter): kept for parameter, kept in pairs}
        state = {
            chunk: {
                name: _with(place, copies[id(place.data)])
                for name, place in places.items()
                if id(place.data) in copies
            }
            for chunk, places in model_state.items()
        }
        add_prefix_for_sharding(state, _PREFIX)
        return state

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Take over what was loaded for :meth:`sharded_state`."""
        assert self._kept is not None, "keep() was not called"
        places = (
            (f"model{index}", name)
            for index, chunk in enumerate(self._chunks())
            for name, _ in chunk.named_parameters()
        )
        for (chunk, name), kept in zip(places, self._kept, strict=True):
            kept.copy_(state[chunk][name])

    def _parameters(self) -> Iterator[nn.Parameter]:
        for chunk in self._chunks():
            yield from chunk.parameters()


def _with(place: Any, data: Tensor) -> Any:
    """The same place in a checkpoint for another tensor."""
    other = copy.copy(place)
    other.data = data
    return other
