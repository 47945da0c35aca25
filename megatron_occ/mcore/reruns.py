"""What a module needs of a micro-batch, also where recompute runs it again."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import torch

Value = TypeVar("Value")


class OfMicroBatch(Generic[Value]):
    """A value of the micro-batch that a module is run on; one object for each module.

    Recompute runs a module again in the backward pass, when other micro-batches have gone forward
    since: their values then wait in a queue. A pass that will be run again has no graph the first
    time, and backward passes come in the order of the micro-batches. Several passes of one
    micro-batch, as over MTP layers, go backward last to first, and hold equal values.

    Attributes:
        trains: a backward pass follows the present micro-batch.
    """

    def __init__(self) -> None:
        self.trains = False
        self._value: Value | None = None
        self._again: deque[Value | None] = deque()

    def begin(self, value: Value | None, *, trains: bool) -> None:
        """Before a micro-batch.

        Args:
            value: of it.
            trains: a backward pass follows.
        """
        self._value, self.trains = value, trains

    def forget(self) -> None:
        """After a mini-batch: nothing is to be run again."""
        self._again.clear()
        self._value, self.trains = None, False

    def take(self) -> tuple[Value | None, bool]:
        """Once in each run of the module: the value, and whether the module is run again."""
        is_again = bool(self._again) and torch.is_grad_enabled()
        value = self._again.popleft() if is_again else self._value
        if self.trains and not torch.is_grad_enabled():
            self._again.append(value)
        return value, is_again
